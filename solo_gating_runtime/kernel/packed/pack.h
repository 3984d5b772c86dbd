// Weights in the order in which tiles read them, and multipliers that take sums to a map's numbers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../memory.h"
#include "../network.h"
#include "tiles.h"

namespace gated {

inline int64_t up_to(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

// Channels of a map: whole vectors.
inline int64_t map_channels(int64_t channels) { return up_to(channels, kLanes); }

// Output channels whose rows are packed together.
constexpr int64_t kUnit = kRow;
constexpr int64_t kUnitGroups = std::max<int64_t>(1, kUnit / kGroupChannels);

inline PackedWeight packed_weight(const Convolution& conv, int64_t index) {
  if constexpr (kIntegers) return conv.quantised[index];
  return to_bfloat16(conv.weight[index]);
}

// A convolution of so many input channels adds up at most 255 · 127 each time.
inline void check_sums(const Convolution& conv) {
  if (!kIntegers) return;
  const int64_t terms = conv.in_channels * conv.kernel * conv.kernel;
  if (terms * 255 * 127 > INT32_MAX) throw std::length_error("too many input channels");
}

// Output channels in the order of a group's vectors; beyond the last one, -1.
inline std::vector<int64_t> group_order(int64_t channels) {
  const int64_t vectors = map_channels(channels) / kLanes;
  std::vector<int64_t> order;
  for (int64_t g = 0; g < vectors; g += kPair) {
    for (int64_t v = 0; v < kPair; ++v) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const bool one = g + 1 == vectors;
        const int64_t c = g * kLanes + (one ? channel_of<1>(v, lane) : channel_of<2>(v, lane));
        order.push_back(c < channels ? c : -1);
      }
    }
  }
  return order;
}

inline const float* in_order(const std::vector<float>& numbers, Arena& arena) {
  const std::vector<int64_t> order = group_order(numbers.size());
  return arena.add<float>(order.size(), [&](float* to) {
    for (size_t i = 0; i < order.size(); ++i) {
      if (order[i] >= 0) to[i] = numbers[order[i]];
    }
  });
}

// The column of a unit's rows that word `lane` of the q-th interleaved vector holds.
inline std::vector<int64_t> columns_of_words() {
  Row rows[kGroup] = {};
  PackedWeight numbers[kRow], words[4 * kRow];
  for (int64_t i = 0; i < kRow; ++i) numbers[i] = static_cast<PackedWeight>(i);
  for (Row& row : rows) std::memcpy(&row, numbers, sizeof row);
  interleave(rows, words, words + 2 * kRow);
  std::vector<int64_t> columns;
  for (int64_t i = 0; i < kGroup * kLanes; ++i) columns.push_back(words[i * kGroup]);
  return columns;
}

// float(multiplier), float(bias) of a convolution from a map of scale `in` to one of scale `out`.
// Floats have none, and all are 1.
struct Factors {
  std::vector<float> multiplier, bias;
};

inline Factors factors(const Convolution& conv, double in, double out) {
  Factors f;
  for (int64_t c = 0; c < conv.out_channels; ++c) {
    const double scale = kIntegers ? conv.scale[c] : 1.0;
    f.multiplier.push_back(static_cast<float>(in * scale / out));
    f.bias.push_back(static_cast<float>(conv.bias[c] / out));
  }
  return f;
}

// Dot products: output channel × row of the kernel × run of columns and channels. Where inputs are
// chosen, too, output channel × kernel element × channel, from which rows are made for each image.
struct DotWeights {
  int64_t in_channels = 0, out_channels = 0, kernel = 0, stride = 0;
  bool chosen_inputs = false;
  int64_t row = 0;         // of one output channel
  float out_scale = 0.0f;  // of its map
  const PackedWeight* weights = nullptr;
  std::vector<float> multiplier, bias;

  DotWeights(const Convolution& conv, double in, double out, int64_t channels, bool chosen_inputs,
             Arena& arena)
      : in_channels(conv.in_channels),
        out_channels(conv.out_channels),
        kernel(conv.kernel),
        stride(conv.stride),
        chosen_inputs(chosen_inputs),
        out_scale(static_cast<float>(out)) {
    check_sums(conv);
    const int64_t taps = kernel * kernel;
    const int64_t step = chosen_inputs ? up_to(in_channels, kRow) : channels;
    const int64_t run = chosen_inputs ? kernel * step : run_of(kernel, channels);
    row = kernel * run;
    weights = arena.add<PackedWeight>(out_channels * row, [&](PackedWeight* to) {
      for (int64_t c = 0; c < out_channels; ++c) {
        for (int64_t d = 0; d < in_channels; ++d) {
          for (int64_t t = 0; t < taps; ++t) {
            to[c * row + t / kernel * run + t % kernel * step + d] =
                packed_weight(conv, (c * in_channels + d) * taps + t);
          }
        }
      }
    });
    Factors f = factors(conv, in, out);
    multiplier = std::move(f.multiplier);
    bias = std::move(f.bias);
  }

  // Numbers that a row of the kernel reads from a map of so many channels: whole vectors.
  static int64_t run_of(int64_t kernel, int64_t channels) { return up_to(kernel * channels, kRow); }
};

// How the chosen channels of a hidden map are cut into words.
struct Cut {
  int64_t quads;  // planes of four channels
  int64_t words;  // of kGroup channels each
  int64_t tails;  // channels that follow, each with a plane of its own

  // A word for a single channel of a 3×3 convolution holds three of its pixels.
  Cut(int64_t number, int64_t kernel) {
    tails = kGroup == 4 && kernel == 3 && number % kQuad != 3 ? number % kQuad : 0;
    quads = up_to(number - tails, kQuad) / kQuad;
    words = up_to(number - tails, kGroup) / kGroup;
  }

  int64_t steps(int64_t kernel) const { return words * kernel * kernel + tails * kernel; }
};

// Outer products with chosen input channels: unit × input channel × kernel element × its columns.
struct OuterWeights {
  int64_t in_channels = 0, out_channels = 0, kernel = 0, taps = 0, units = 0;
  const PackedWeight* rows = nullptr;  // null if all inputs are computed
  const PackedWeight* words =
      nullptr;  // of all input channels, then: group × step × pair of vectors
  const float* multiplier = nullptr;
  const float* bias = nullptr;
  const PackedWeight* shortcut = nullptr;  // group × word × pair of vectors
  int64_t shortcut_words = 0;
  const float* shortcut_multiplier = nullptr;
  float ratio = 0.0f;

  OuterWeights(const Block& block, double in, double hidden, double out, bool chosen,
               Arena& arena) {
    const Convolution& conv = block.last();
    check_sums(conv);
    if (conv.stride != 1) throw std::length_error("the last convolution of a block has a stride");
    in_channels = conv.in_channels;
    out_channels = conv.out_channels;
    kernel = conv.kernel;
    taps = kernel * kernel;
    units = up_to(map_channels(out_channels), kUnit) / kUnit;
    const int64_t size = units * in_channels * row_size();
    if (chosen) {
      rows = arena.add<PackedWeight>(size, [&](PackedWeight* to) { pack_rows(conv, to); });
    } else {
      const Cut cut(in_channels, kernel);
      const int64_t unit = kUnitGroups * cut.steps(kernel) * kPair * kRow;
      words = arena.add<PackedWeight>(units * unit, [&](PackedWeight* to) {
        Storage<PackedWeight> all_rows(size);
        std::vector<int32_t> all;
        for (int64_t c = 0; c < in_channels; ++c) all.push_back(c);
        pack_rows(conv, all_rows.data());
        rows = all_rows.data();
        for (int64_t u = 0; u < units; ++u) {
          pack_unit(u, all.data(), in_channels, 0, cut.quads + cut.tails, to + u * unit);
        }
        rows = nullptr;
      });
    }
    Factors f = factors(conv, hidden, out);
    if (block.shortcut.exists()) {
      const Convolution& other = block.shortcut;
      check_sums(other);
      for (int64_t c = 0; c < out_channels; ++c) {
        f.bias[c] = static_cast<float>(
            (static_cast<double>(conv.bias[c]) + static_cast<double>(other.bias[c])) / out);
      }
      shortcut_multiplier = in_order(factors(other, in, out).multiplier, arena);
      pack_shortcut(other, arena);
    } else {
      ratio = static_cast<float>(in / out);
    }
    multiplier = in_order(f.multiplier, arena);
    bias = in_order(f.bias, arena);
  }

  int64_t row_size() const { return taps * kUnit; }

  // Pieces `begin` to `end` of a unit's words of the chosen input channels, a piece being a quad or
  // a tail: group × step × pair of vectors.
  void pack_unit(int64_t unit, const int32_t* chosen, int64_t number, int64_t begin, int64_t end,
                 PackedWeight* to) const {
    const Cut cut(number, kernel);
    const int64_t group = cut.steps(kernel) * kPair * kRow;
    const PackedWeight* from = rows + unit * in_channels * row_size();
    const auto row = [&](int64_t j) { return from + chosen[j] * row_size(); };
    // Steps of a group are a unit's first or only half.
    const auto put = [&](const Row* four, int64_t step) {
      interleave(four, to + step * kPair * kRow, to + group + step * kPair * kRow);
    };
    const auto fetch = [&](int64_t j) {
      const char* soon = reinterpret_cast<const char*>(row(j));
      const int64_t bytes = row_size() * sizeof(PackedWeight);
      for (int64_t e = 0; e < bytes; e += kCacheLine) __builtin_prefetch(soon + e);
    };
    constexpr int64_t kWords = kQuad / kGroup;
    const int64_t whole = number - cut.tails;
    for (int64_t q = begin; q < std::min(end, cut.quads); ++q) {
      for (int64_t j = (q + 2) * kQuad; j < std::min((q + 3) * kQuad, number); ++j) fetch(j);
      for (int64_t word = q * kWords; word < std::min((q + 1) * kWords, cut.words); ++word) {
        const PackedWeight* from_row[kGroup];
        const int64_t first = word * kGroup, there = std::min<int64_t>(kGroup, whole - first);
        for (int64_t k = 0; k < kGroup; ++k) from_row[k] = row(first + (k < there ? k : 0));
        for (int64_t t = 0; t < taps; ++t) {
          Row four[kGroup];
#pragma GCC unroll 4
          for (int64_t k = 0; k < kGroup; ++k) four[k] = load_as<Row>(from_row[k] + t * kUnit);
          if (there < kGroup) {
            for (int64_t k = there; k < kGroup; ++k) four[k] = Row{};
          }
          put(four, word * taps + t);
        }
      }
    }
    for (int64_t j = std::max(begin - cut.quads, int64_t{0});
         j < std::min(end - cut.quads, cut.tails); ++j) {
      for (int64_t y = 0; y < kernel; ++y) {
        Row four[kGroup] = {};
        for (int64_t x = 0; x < kernel; ++x) {
          four[x % kGroup] = load_as<Row>(row(cut.quads * kQuad + j) + (y * kernel + x) * kUnit);
        }
        put(four, cut.words * taps + j * kernel + y);
      }
    }
  }

 private:
  void pack_rows(const Convolution& conv, PackedWeight* to) const {
    const std::vector<int64_t> order = group_order(out_channels), columns = columns_of_words();
    for (size_t i = 0; i < order.size(); ++i) {
      if (order[i] < 0) continue;
      const int64_t unit = i / kUnit, column = columns[i % kUnit];
      for (int64_t d = 0; d < in_channels; ++d) {
        for (int64_t t = 0; t < taps; ++t) {
          to[(unit * in_channels + d) * row_size() + t * kUnit + column] =
              packed_weight(conv, (order[i] * in_channels + d) * taps + t);
        }
      }
    }
  }

  void pack_shortcut(const Convolution& conv, Arena& arena) {
    const std::vector<int64_t> order = group_order(out_channels);
    shortcut_words = up_to(conv.in_channels, kGroup) / kGroup;
    shortcut =
        arena.add<PackedWeight>(order.size() * shortcut_words * kGroup, [&](PackedWeight* to) {
          for (size_t i = 0; i < order.size(); ++i) {
            if (order[i] < 0) continue;
            const int64_t group = i / kGroupChannels, lane = i % kGroupChannels;
            for (int64_t d = 0; d < conv.in_channels; ++d) {
              const int64_t word = (group * shortcut_words + d / kGroup) * kGroupChannels + lane;
              to[word * kGroup + d % kGroup] = packed_weight(conv, order[i] * conv.in_channels + d);
            }
          }
        });
  }
};

// The first convolution, of packed pixels: group × row of the kernel × word × pair of vectors.
struct StemWeights {
  int64_t in_channels = 0, out_channels = 0, kernel = 0, stride = 0, padding = 0;
  int64_t words = 0;  // of a row of the kernel
  bool floats = false;
  float scale = 0.0f;  // what pixels, or a float32 stem's sums, are multiplied with
  const PackedWeight* weights = nullptr;
  const float* multiplier = nullptr;
  const float* bias = nullptr;
  const float* float_weights = nullptr;  // group of channels × input channel × tap × its channels

  StemWeights(const Convolution& conv, double image_scale, double stem_scale, Arena& arena)
      : in_channels(conv.in_channels),
        out_channels(conv.out_channels),
        kernel(conv.kernel),
        stride(conv.stride),
        padding(conv.padding),
        floats(kIntegers && conv.weight != nullptr) {
    const int64_t taps = kernel * kernel;
    const std::vector<int64_t> order = group_order(out_channels);
    if (floats) {
      scale = 1.0f / static_cast<float>(stem_scale);
      const int64_t terms = in_channels * taps;
      float_weights = arena.add<float>(order.size() * terms, [&](float* to) {
        for (size_t i = 0; i < order.size(); ++i) {
          if (order[i] < 0) continue;
          for (int64_t e = 0; e < terms; ++e) {
            to[(i / kGroupChannels * terms + e) * kGroupChannels + i % kGroupChannels] =
                conv.weight[order[i] * terms + e];
          }
        }
      });
      bias = in_order(std::vector<float>(conv.bias, conv.bias + out_channels), arena);
      return;
    }
    check_sums(conv);
    scale = 1.0f / static_cast<float>(image_scale);
    words = up_to(kernel * in_channels, kGroup) / kGroup;
    weights =
        arena.add<PackedWeight>(order.size() * kernel * words * kGroup, [&](PackedWeight* to) {
          for (size_t i = 0; i < order.size(); ++i) {
            if (order[i] < 0) continue;
            const int64_t group = i / kGroupChannels, lane = i % kGroupChannels;
            for (int64_t d = 0; d < in_channels; ++d) {
              for (int64_t t = 0; t < taps; ++t) {
                const int64_t number = t % kernel * in_channels + d;
                const int64_t step = group * kernel * words + t / kernel * words + number / kGroup;
                to[(step * kGroupChannels + lane) * kGroup + number % kGroup] =
                    packed_weight(conv, (order[i] * in_channels + d) * taps + t);
              }
            }
          }
        });
    Factors f = factors(conv, image_scale, stem_scale);
    for (int64_t c = 0; kIntegers && c < out_channels; ++c) {
      int64_t sum = 0;
      for (int64_t i = 0; i < in_channels * taps; ++i) {
        sum += conv.quantised[c * in_channels * taps + i];
      }
      const double offset = 1.0 * kOutside * sum * image_scale * conv.scale[c] / stem_scale;
      f.bias[c] = static_cast<float>(conv.bias[c] / stem_scale - offset);
    }
    multiplier = in_order(f.multiplier, arena);
    bias = in_order(f.bias, arena);
  }
};

}  // namespace gated

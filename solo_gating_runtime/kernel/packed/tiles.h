// The two inner loops: tiles of outer products and of dot products, of words.
//
// Maps are rows × columns × channels. A hidden map that outer products read is cut into quads of
// four channels: quads × rows × columns × 4.

#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "../padding.h"
#include "words.h"

namespace gated {

constexpr int kQuad = 4;
constexpr int kPair = 2;  // vectors of output channels in a group
constexpr int kGroupChannels = kPair * kLanes;

// Pixels of an outer product's tile: with two vectors of sums each, as many as registers hold.
constexpr int kOuterPixels = kRegisters == 32 ? 13 : 6;
// In maps that are no wider than this, a tile has two rows.
constexpr int kTwoRowsColumns = 3;
// Whole rows of maps that are tiles of their own kind: those of the last stages of images of 32×32
// and 224×224. (Not with NEON's correction of sums, which has all of a kernel's columns in it.)
constexpr int kLeastWholeRow = 4, kMostWholeRow = kOuterPixels < 9 ? kOuterPixels : 9;

// Pixels of a dot product's tile of four channels; one more is possible with 32 registers, or if
// one pixel's numbers need none.
constexpr int kDotChannels = kQuad;
constexpr int kDotPixels = kRegisters == 32 ? 4 : 2;
constexpr int kDotPixelsMost = kRegisters == 32 || kDotFromMemory ? kDotPixels + 1 : kDotPixels;
// And of its tile of one or two channels.
constexpr int kFewPixels = kRegisters == 32 ? 8 : 4;
constexpr int kLaneFactors = 16;
static_assert(kLaneFactors >= kLanes && kLaneFactors >= 2 * kFewPixels);

// A loop whose index is a constant: sums stay in registers only if loops are gone, and functions
// inlined, before anything else is optimised.
#define GATED_INLINE __attribute__((always_inline))

template <class Function, int... I>
GATED_INLINE inline void each(std::integer_sequence<int, I...>, Function function) {
  (function(std::integral_constant<int, I>{}), ...);
}

template <int Count, class Function>
GATED_INLINE inline void each(Function function) {
  each(std::make_integer_sequence<int, Count>{}, function);
}

// ------------------------------------------------------------------------------------------------

// Sums of words × weights over planes of words, each with its taps. Those that read nothing but the
// border are left out, the first and the last ones of a kernel.
struct Terms {
  const Number* x = nullptr;
  int64_t row = 0;    // from one row of the tile to the next
  int64_t plane = 0;  // from one plane to the next
  int64_t words = 0;
  const int32_t* taps = nullptr;  // those that are read
  int64_t num_taps = 0;
  const PackedWeight* weights = nullptr;  // word × tap × pair of vectors, from the first tap on
  int64_t skipped = 0;                    // numbers of them between two words

  // Of a kernel with so many taps in a row, whose first one's weights these are.
  void read(const KernelRows& rows, const std::vector<int32_t>& all, int64_t in_a_row,
            const PackedWeight* first) {
    taps = all.data() + rows.first * in_a_row;
    num_taps = rows.count * in_a_row;
    weights = first + rows.first * in_a_row * kPair * kRow;
    skipped = (static_cast<int64_t>(all.size()) - num_taps) * kPair * kRow;
  }
};

// Whether a tile packs the next unit's words while it computes: two rows at a time leave it enough
// registers.
constexpr bool kPacksAhead = kGroup == 2;

constexpr int kMostTaps = 9;

// y[p] = Σ · multiplier + bias + shortcut, as a map's number, for a tile of pixels and a group of
// channels. Sums of floats have no multiplier: they start at the bias, and go on from those of a
// convolution as shortcut.
struct OuterProduct {
  Terms main;      // kQuad / kGroup words share a plane
  Terms tail;      // planes of one channel, whose words are neighbouring pixels
  Terms shortcut;  // a convolution as shortcut, with a tap for each word
  const float* shortcut_multiplier = nullptr;
  // Or what is in y times this (not for the stem's tiles).
  float ratio = 0.0f;
  const float* multiplier = nullptr;
  const float* bias = nullptr;
  Number* y = nullptr;
  int64_t y_row = 0, y_pixel = 0;
  // Rows of weights to prefetch: one of them with each word, one cache line with each tap.
  const PackedWeight* ahead = nullptr;
  const int32_t* ahead_rows = nullptr;
  int64_t ahead_step = 0, ahead_size = 0;
  // Where words are packed to, of so many of these rows; null if they are not.
  PackedWeight* packed = nullptr;
  int64_t number = 0;
};

// `Step` is the number of numbers from one pixel of the tile's row to the next one. A tile that is
// a `WholeRow` of its map leaves out what a 3×3 kernel reads of the border beside it.
template <int Vectors, int Rows, int Columns, int Step, bool WholeRow = false>
void outer_tile(const OuterProduct& a) {
  constexpr int kPixels = Rows * Columns;
  Sums sum[kPixels][Vectors], offset[Vectors];
  const auto clear = [&]() GATED_INLINE {
    each<Vectors>([&](auto v) GATED_INLINE {
      Sums first{};
      if constexpr (!kIntegers) first = load(a.bias + v * kLanes);
      each<kPixels>([&](auto p) GATED_INLINE { sum[p][v] = first; });
      offset[v] = Sums{};
    });
  };
  const auto add_some = [&](const Number* x, int64_t row, const PackedWeight* w, auto step,
                            auto left_out) GATED_INLINE {
    Words weight[Vectors];
    each<Vectors>([&](auto v) GATED_INLINE {
      weight[v] = load_words(w + v * kRow);
      keep(weight[v]);
      if constexpr (kBiased) offset[v] = correct(offset[v], weight[v]);
    });
    each<kPixels>([&](auto p) GATED_INLINE {
      if constexpr (!left_out(p)) {
        Words value = broadcast_word(x + p / Columns * row + p % Columns * step);
        keep(value);
        each<Vectors>([&](auto v) GATED_INLINE { sum[p][v] = dot(sum[p][v], value, weight[v]); });
      }
    });
  };
  const auto add = [&](const Number* x, int64_t row, const PackedWeight* w, auto step)
                       GATED_INLINE { add_some(x, row, w, step, [](int) { return false; }); };
  const auto result = [&](auto p, auto v) GATED_INLINE {
    if constexpr (kBiased) return sum[p][v] + offset[v];
    return sum[p][v];
  };
  constexpr int kWordsInPlane = kQuad / kGroup;
  constexpr std::integral_constant<int, Step> step;
  constexpr std::integral_constant<int, 1> one;

  Vec shortcut[kPixels][Vectors];
  const bool has_shortcut = Step == kQuad && a.shortcut.words > 0;
  clear();
  if (has_shortcut) {
    const PackedWeight* w = a.shortcut.weights;
    for (int64_t j = 0; j < a.shortcut.words; ++j, w += kPair * kRow) {
      add(a.shortcut.x + j / kWordsInPlane * a.shortcut.plane + j % kWordsInPlane * kGroup,
          a.shortcut.row, w, step);
    }
    if constexpr (kIntegers) {
      each<Vectors>([&](auto v) GATED_INLINE {
        const Vec multiplier = load(a.shortcut_multiplier + v * kLanes);
        each<kPixels>([&](auto p)
                          GATED_INLINE { shortcut[p][v] = scaled(result(p, v), multiplier); });
      });
      clear();
    }
  }

  const PackedWeight* w = a.main.weights;
  [[maybe_unused]] PackedWeight* packed = a.packed;
  for (int64_t j = 0; j < a.main.words; ++j, w += a.main.skipped) {
    const Number* x = a.main.x + j / kWordsInPlane * a.main.plane + j % kWordsInPlane * kGroup;
    const PackedWeight* first = a.ahead + a.ahead_rows[j * a.ahead_step] * a.ahead_size;
    const char* first_bytes = reinterpret_cast<const char*>(first);
    const auto multiply = [&](auto beside) GATED_INLINE {
      if constexpr (!WholeRow) {
        for (int64_t t = 0; t < a.main.num_taps; ++t, w += kPair * kRow) {
          beside(t);
          add(x + a.main.taps[t], a.main.row, w, step);
        }
      } else {
        for (int64_t t = 0; t < a.main.num_taps; t += 3) {
          each<3>([&](auto column) GATED_INLINE {
            beside(t + column);
            constexpr int kShift = decltype(column)::value - 1;
            add_some(x + a.main.taps[t + column], a.main.row, w, step,
                     [](int p) { return p + kShift < 0 || p + kShift == Columns; });
            w += kPair * kRow;
          });
        }
      }
    };
    if (kPacksAhead && a.packed != nullptr) {
      static constexpr PackedWeight kZeros[kMostTaps * kRow] = {};
      const PackedWeight* second =
          2 * j + 1 < a.number ? a.ahead + a.ahead_rows[2 * j + 1] * a.ahead_size : kZeros;
      multiply([&](int64_t t) GATED_INLINE {
        const Row rows[kGroup] = {load_as<Row>(first + t * kRow), load_as<Row>(second + t * kRow)};
        interleave(rows, packed, packed);
        packed += kPair * kRow;
      });
    } else {
      multiply([&](int64_t t) GATED_INLINE { __builtin_prefetch(first_bytes + t * 64, 0, 2); });
    }
  }
  if constexpr (Step == kQuad && kGroup == 4) {
    const Number* x = a.tail.x;
    w = a.tail.weights;
    for (int64_t j = 0; j < a.tail.words; ++j, x += a.tail.plane, w += a.tail.skipped) {
      for (int64_t t = 0; t < a.tail.num_taps; ++t, w += kPair * kRow) {
        add(x + a.tail.taps[t], a.tail.row, w, one);
      }
    }
  }

  Vec multiplier[Vectors], bias[Vectors];
  each<Vectors>([&](auto v) GATED_INLINE {
    multiplier[v] = load(a.multiplier + v * kLanes);
    bias[v] = load(a.bias + v * kLanes);
  });
  const Vec ratio = broadcast(a.ratio);
  const auto finish = [&](auto convolution) GATED_INLINE {
    constexpr bool identity = Step == kQuad && !convolution;
    each<kPixels>([&](auto p) GATED_INLINE {
      Number* y = a.y + p / Columns * a.y_row + p % Columns * a.y_pixel;
      Vec value[Vectors], x[Vectors];
      if constexpr (identity) load_numbers<Vectors>(y, x);
      each<Vectors>([&](auto v) GATED_INLINE {
        value[v] = scaled(result(p, v), multiplier[v]);
        if constexpr (kIntegers) value[v] += bias[v];
        if constexpr (identity) value[v] = add_product(value[v], x[v], ratio);
        if constexpr (kIntegers && convolution) value[v] += shortcut[p][v];
      });
      store_numbers<Vectors>(y, value);
    });
  };
  if constexpr (Step == kQuad) {
    if (has_shortcut) {
      finish(std::true_type{});
      return;
    }
  }
  finish(std::false_type{});
}

// ------------------------------------------------------------------------------------------------

// y[m][p] = Σ_t Σ_c x[pixel[p] · channels + t · row + c] · w[m][t][c] · multiplier[m] + bias[m]
//
// as a map's number, for a tile of output channels m and pixels p. The pixels of a kernel's row are
// one run of numbers: t goes over the rows that are read and c over kernel · channels, in whole
// vectors; weights beyond are zeros.
struct DotProduct {
  const Number* x;
  const int32_t* pixel;                       // the first one that each of the tile's pixels reads
  int64_t channels;                           // of x
  int64_t row;                                // from one row of x to the next
  KernelRows rows;                            // that are read
  int64_t run;                                // numbers in each: whole vectors
  const PackedWeight* weights[kDotChannels];  // of each output channel
  float multiplier[kLaneFactors], bias[kLaneFactors];  // of each sum: see set_factors
  bool scales;  // whether sums of floats have a multiplier, too
  // Tiles of four channels write these together, others apart.
  Number* y[kDotChannels];
  int64_t y_pixel;
  const int32_t* position;  // of each pixel in y
  bool in_a_row;            // whether they are neighbours
  const char* ahead;        // something to prefetch with each vector ...
  int64_t ahead_step;       // ... and how much, in bytes
};

// What a tile's sums are multiplied with, from numbers for each channel.
inline void set_factors(const float* of_channel, int64_t channels, float* factors) {
  for (int64_t i = 0; i < kLaneFactors; ++i) {
    factors[i] = of_channel[channels == kDotChannels ? i % kDotChannels
                                                     : std::min(i / kFewPixels, channels - 1)];
  }
}

template <int Channels, int Pixels>
void dot_tile(const DotProduct& a) {
  constexpr int kSums = Channels * Pixels;
  // Four channels of a pixel are neighbours; or all pixels of a channel.
  constexpr bool kTogether = Channels == kDotChannels;
  constexpr auto at = [](int m, int p) { return kTogether ? p * Channels + m : m * Pixels + p; };
  Sums sum[kSums], offset[Channels];
  each<kSums>([&](auto i) GATED_INLINE { sum[i] = Sums{}; });
  each<Channels>([&](auto m) GATED_INLINE { offset[m] = Sums{}; });
  const Number* x[Pixels];
  const int64_t above = a.rows.first * a.row;
  each<Pixels>([&](auto p) GATED_INLINE { x[p] = a.x + a.pixel[p] * a.channels + above; });
  const PackedWeight* w[Channels];
  each<Channels>([&](auto m) GATED_INLINE { w[m] = a.weights[m] + a.rows.first * a.run; });
  const char* ahead = a.ahead;
  for (int64_t t = 0; t < a.rows.count; ++t) {
    for (int64_t c = 0; c < a.run; c += kRow) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += a.ahead_step;
      if constexpr (kDotFromMemory && kTogether && Pixels == kDotPixelsMost) {
        // Registers are those of sums, of all pixels' numbers but the last one's, of a channel's
        // weights and of products.
        Words value[Pixels];
        each<Pixels - 1>([&](auto p) GATED_INLINE {
          value[p] = load_words(x[p] + c);
          keep(value[p]);
        });
        each<Channels>([&](auto m) GATED_INLINE {
          Words weight = load_words(w[m] + c);
          keep(weight);
          constexpr int kLast = at(m, Pixels - 1);
          sum[kLast] = dot_from(sum[kLast], x[Pixels - 1] + c, weight);
          each<Pixels - 1>(
              [&](auto p) GATED_INLINE { sum[at(m, p)] = dot(sum[at(m, p)], value[p], weight); });
        });
        continue;
      }
      Words weight[Channels];
      each<Channels>([&](auto m) GATED_INLINE {
        weight[m] = load_words(w[m] + c);
        keep(weight[m]);
        if constexpr (kBiased) offset[m] = correct(offset[m], weight[m]);
      });
      each<Pixels>([&](auto p) GATED_INLINE {
        Words value = load_words(x[p] + c);
        keep(value);
        each<Channels>([&](auto m)
                           GATED_INLINE { sum[at(m, p)] = dot(sum[at(m, p)], value, weight[m]); });
      });
    }
    each<Pixels>([&](auto p) GATED_INLINE { x[p] += a.row; });
    each<Channels>([&](auto m) GATED_INLINE { w[m] += a.run; });
  }
  if constexpr (kBiased) {
    each<Channels>([&](auto m) GATED_INLINE {
      each<Pixels>([&](auto p) GATED_INLINE { sum[at(m, p)] += offset[m]; });
    });
  }

  constexpr int kVectors = (kSums + kLanes - 1) / kLanes;
  Number lanes[kVectors * kLanes];
  each<kVectors>([&](auto index) GATED_INLINE {
    constexpr int kFirst = index * kLanes;
    const int from = kTogether ? 0 : kFirst;
    const Sums totals = total<std::min(kSums - kFirst, kLanes)>(sum + kFirst);
    const Vec multiplier = load(a.multiplier + from);
    Vec value = scaled(totals, multiplier);
    if constexpr (!kIntegers) {
      if (a.scales) value *= multiplier;
    }
    const Numbers numbers = to_numbers(value + load(a.bias + from));
    std::memcpy(lanes + kFirst, &numbers, sizeof numbers);
  });
  if constexpr (kTogether) {
    if (a.in_a_row && a.y_pixel == kQuad) {
      std::memcpy(a.y[0] + a.position[0] * kQuad, lanes, kSums * sizeof(Number));
      return;
    }
#pragma GCC unroll 16
    for (int p = 0; p < Pixels; ++p) {
      std::memcpy(a.y[0] + a.position[p] * a.y_pixel, lanes + p * kQuad, kQuad * sizeof(Number));
    }
  } else {
    for (int m = 0; m < Channels; ++m) {
      if (a.in_a_row && a.y_pixel == 1) {
        std::memcpy(a.y[m] + a.position[0], lanes + m * Pixels, Pixels * sizeof(Number));
        continue;
      }
      for (int p = 0; p < Pixels; ++p) a.y[m][a.position[p] * a.y_pixel] = lanes[m * Pixels + p];
    }
  }
}

// ------------------------------------------------------------------------------------------------

using OuterTile = void (*)(const OuterProduct&);
using DotTile = void (*)(const DotProduct&);

template <int Vectors, int Rows, size_t... C>
constexpr std::array<OuterTile, sizeof...(C)> outer_tiles(std::index_sequence<C...>) {
  return {outer_tile<Vectors, Rows, C + 1, kQuad>...};
}

template <size_t... C>
constexpr std::array<OuterTile, sizeof...(C)> whole_row_tiles(std::index_sequence<C...>) {
  return {outer_tile<kPair, 1, kLeastWholeRow + C, kQuad, true>...};
}

inline OuterTile outer_tile_for(int64_t vectors, int64_t rows, int64_t columns,
                                bool whole_row = false) {
  if constexpr (!kBiased) {
    using Whole = std::make_index_sequence<kMostWholeRow - kLeastWholeRow + 1>;
    static constexpr auto kWhole = whole_row_tiles(Whole{});
    if (whole_row && vectors == kPair) return kWhole[columns - kLeastWholeRow];
  }
  using One = std::make_index_sequence<kOuterPixels>;
  using Two = std::make_index_sequence<kTwoRowsColumns>;
  static constexpr auto kNarrow = outer_tiles<1, 1>(One{});
  static constexpr auto kWide = outer_tiles<2, 1>(One{});
  static constexpr auto kNarrowTwo = outer_tiles<1, 2>(Two{});
  static constexpr auto kWideTwo = outer_tiles<2, 2>(Two{});
  if (rows == 2) return (vectors == 1 ? kNarrowTwo : kWideTwo)[columns - 1];
  return (vectors == 1 ? kNarrow : kWide)[columns - 1];
}

// Tiles of a stem that reads every Step-th number.
constexpr int kStemPixels = std::min(kOuterPixels, 12);
constexpr int kStemPixelsFew = kStemPixels == 12 ? 8 : 4;

template <int Step>
inline OuterTile stem_tile_for(int64_t vectors, int64_t columns) {
  if (columns == kStemPixels) {
    return vectors == 1 ? outer_tile<1, 1, kStemPixels, Step> : outer_tile<2, 1, kStemPixels, Step>;
  }
  return vectors == 1 ? outer_tile<1, 1, kStemPixelsFew, Step>
                      : outer_tile<2, 1, kStemPixelsFew, Step>;
}

// For four channels and kDotPixels or kDotPixelsMost pixels, or one or two channels and kFewPixels.
inline DotTile dot_tile_for(int64_t channels, int64_t pixels) {
  if (channels == 1) return dot_tile<1, kFewPixels>;
  if (channels == 2) return dot_tile<2, kFewPixels>;
  return pixels == kDotPixels ? dot_tile<kDotChannels, kDotPixels>
                              : dot_tile<kDotChannels, kDotPixelsMost>;
}

}  // namespace gated

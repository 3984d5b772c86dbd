// A ResNet on 32-bit words of several numbers, in which each image computes only the channels that
// its gates choose.
//
// All convolutions of a block but the last are dot products over input channels, of the chosen
// output channels only. The last one adds up the outer products of the hidden map's words with the
// chosen rows of its weights, which are packed into words for each image; scales, bias and shortcut
// follow while sums are in registers. What is computed is in `network.py`: bit for bit, whatever
// the number of threads and the images beside one, and of integers whatever the instructions, too.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../gates.h"
#include "../memory.h"
#include "../network.h"
#include "../runner.h"
#include "../team.h"
#include "layout.h"
#include "pack.h"
#include "tiles.h"

namespace gated {

// Of a map, as a file has it.
inline float map_scale(float scale) { return kIntegers ? scale : 1.0f; }

struct PackedBlock {
  std::vector<DotWeights> dots;
  OuterWeights last;
  std::vector<GateWeights> gates;
  float in_scale = 0.0f, out_scale = 0.0f;

  PackedBlock(const Block& block, float in, Arena& arena)
      : last(block, in, map_scale(block.scales[block.num_convolutions - 2]),
             map_scale(block.scales[block.num_convolutions - 1]), block.num_gates > 0, arena),
        in_scale(in),
        out_scale(map_scale(block.scales[block.num_convolutions - 1])) {
    float scale = in;
    for (int64_t k = 0; k + 1 < block.num_convolutions; ++k) {
      const Convolution& conv = block.convolutions[k];
      const int64_t channels =
          k == 0 ? map_channels(conv.in_channels) : up_to(conv.in_channels, kQuad);
      const float out = map_scale(block.scales[k]);
      dots.emplace_back(conv, scale, out, channels, k > 0 && block.num_gates > 0, arena);
      scale = out;
    }
    for (int64_t g = 0; g < block.num_gates; ++g) {
      gates.emplace_back(block.gates[g], block.first().in_channels,
                         block.convolutions[g].out_channels, arena);
    }
  }
};

struct PackedNetwork {
  StemWeights stem;
  std::vector<PackedBlock> blocks;
  const float* linear = nullptr;
  const float* linear_bias = nullptr;

  PackedNetwork(const Network& net, Arena& arena)
      : stem(net.stem, map_scale(net.image_scale), map_scale(net.stem_scale), arena) {
    float scale = map_scale(net.stem_scale);
    for (const Block& block : net.blocks) {
      blocks.emplace_back(block, scale, arena);
      scale = blocks.back().out_scale;
    }
    if (net.linear == nullptr) return;
    const int64_t channels = net.blocks.back().last().out_channels;
    const int64_t padded = padded_to_partials(channels);
    linear = arena.add<float>(net.features * padded, [&](float* to) {
      for (int64_t k = 0; k < net.features; ++k) {
        std::copy_n(net.linear + k * channels, channels, to + k * padded);
      }
    });
    linear_bias = arena.copy(net.linear_bias, net.features, net.features);
  }
};

class Engine {
 public:
  struct Layout : PackedLayout {
    Layout(const Engine& engine, int64_t height, int64_t width)
        : PackedLayout(engine.shape_, height, width) {}
  };

  // What one thread needs for itself.
  struct Scratch {
    Storage<Number> rows;        // the last three rows of the stem's convolution, and their maximum
    Storage<Number> gathered;    // a row's words
    Storage<PackedWeight> unit;  // packed words
    Storage<PackedWeight> weights;  // of chosen inputs
    Chooser inputs;
    // For each gate of a block, its logits and shifts, and the channels that it chooses.
    Buffer logits[kMostConvolutions - 1];
    Buffer shifts[kMostConvolutions - 1];
    std::vector<int32_t> chosen[kMostConvolutions - 1];
    bool finite = true;  // whether this thread's part of the image is
  };

  // What one image needs, for one thread or a team.
  struct Workspace {
    std::shared_ptr<const Layout> layout;
    Storage<Number> image;
    Buffer float_image;
    std::vector<Storage<Number>> maps;
    std::vector<Storage<Number>> quads;
    Storage<Number> between[2];  // hidden maps that dot products read, in turn
    Storage<Number> gathered;    // what a shortcut reads
    Storage<PackedWeight> unit;  // packed words that all threads use
    Buffer means;
    std::vector<Scratch> scratch;  // for each thread

    void prepare(const Engine& engine, std::shared_ptr<const Layout> wanted, int threads);
  };

  // The network's weights are copied.
  explicit Engine(const Network& net) : shape_(net) {
    PackedNetwork(net, arena_);  // only counts
    arena_.allocate();
    net_ = std::make_unique<PackedNetwork>(net, arena_);
    int64_t most = kQuad;
    for (const Block& block : net.blocks) {
      for (int64_t k = 0; k < block.num_convolutions; ++k) {
        most = std::max(most, block.convolutions[k].in_channels);
      }
    }
    for (int64_t c = 0; c < most; ++c) all_.push_back(c);
    for (int64_t i = 0; i < kBeyond; ++i) all_.push_back(most - 1);
  }

  const Network& shape() const { return shape_; }

  // Of the weights, in bytes.
  int64_t size() const { return arena_.used(); }

  Layout layout(int64_t height, int64_t width) const { return Layout(*this, height, width); }

  void prepare(Workspace& w, std::shared_ptr<const Layout> wanted, int threads) const {
    w.prepare(*this, std::move(wanted), threads);
  }

  void forward(Workspace& w, const float* image, Decisions decisions, const Results& results,
               Team team) const {
    if (!read_image(w, image, team)) {
      if (team.rank == 0) refuse(*w.layout, results);
      team.wait();
      return;
    }
    if (net_->stem.floats) {
      float_stem(w, team);
    } else {
      stem(w, team);
    }
    team.wait();
    uint8_t* mask = results.mask;
    size_t done = 0;
    for (size_t stage = 0; stage < shape_.stages.size(); ++stage) {
      for (int64_t i = 0; i < shape_.stages[stage]; ++i, ++done) {
        block(w, done, decisions, mask, team);
      }
      if (results.maps[stage] != nullptr) {
        write_map(w, done - 1, results.maps[stage], team);
      }
    }
    head(w, results.features, team);
    team.wait();
  }

 private:
  // Chosen channels are read beyond their end, by less than this.
  static constexpr int64_t kBeyond = 4 * kQuad;

  static constexpr int32_t kNoRow[1] = {0};

  // ----------------------------------------------------------------------------------------------

  // Features of an image that is not finite are NaN, and none of its channels are chosen.
  void refuse(const Layout& l, const Results& results) const {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::fill_n(results.features, shape_.features, nan);
    if (results.mask != nullptr) {
      std::fill_n(results.mask, shape_.channels(), shape_.gated ? 0 : 1);
    }
    const std::vector<MapShape> maps = shape_.maps(l.height, l.width);
    for (size_t i = 0; i < maps.size(); ++i) {
      if (results.maps[i] == nullptr) continue;
      std::fill_n(results.maps[i], maps[i].channels * maps[i].height * maps[i].width, nan);
    }
  }

  // Packs the pixels of an image; says whether they are finite.
  bool read_image(Workspace& w, const float* image, Team team) const {
    const Layout& l = *w.layout;
    const StemWeights& stem = net_->stem;
    const int64_t channels = stem.in_channels, plane = l.height * l.width;
    Words odd{};  // not zero where a pixel is not finite
    for (int64_t y = team.begin(l.height); y < team.end(l.height); ++y) {
      const float* from = image + y * l.width;
      const int64_t place = (y + stem.padding) * l.stem.row + stem.padding * channels;
      for (int64_t x = 0; x < l.width; x += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, l.width - x);
        Words pixels[3];
        for (int64_t c = 0; c < channels; ++c) {
          const float* row = from + c * plane + x;
          Vec value{};
          if (count == kLanes) {
            value = load(row);
          } else {
            std::memcpy(&value, row, count * sizeof(float));
          }
          odd |= value - value != Vec{};
          if (stem.floats) {
            for (int64_t i = 0; i < count; ++i) {
              w.float_image.data()[place + (x + i) * channels + c] = value[i];
            }
            continue;
          }
          const Words pixel = pixel_words(value, stem.scale);
          if (channels == 3) {
            pixels[c] = pixel;
            continue;
          }
          for (int64_t i = 0; i < count; ++i) {
            w.image.data()[place + (x + i) * channels + c] = pixel[i];
          }
        }
        if (channels == 3 && !stem.floats) {
          store_pixels(pixels, count, w.image.data() + place + x * channels);
        }
      }
    }
    bool finite = true;
    for (int i = 0; i < kLanes; ++i) finite &= odd[i] == 0;
    w.scratch[team.rank].finite = finite;
    team.wait();
    return std::all_of(w.scratch.begin(), w.scratch.begin() + team.size,
                       [](const Scratch& one) { return one.finite; });
  }

  // ----------------------------------------------------------------------------------------------

  void stem(Workspace& w, Team team) const {
    rows_of_stem(w, team, [&](int64_t y, Number* to) { stem_row(w, y, to, team); });
  }

  void float_stem(Workspace& w, Team team) const {
    rows_of_stem(w, team, [&](int64_t y, Number* to) { float_stem_row(w, y, to); });
  }

  // The stem's map, from a function that computes a row of its convolution.
  template <class Function>
  void rows_of_stem(Workspace& w, Team team, Function row) const {
    const Layout& l = *w.layout;
    const MapLayout& out = l.maps[0];
    const auto to = [&](int64_t y) {
      return w.maps[0].data() + ((y + 1) * (out.grid.width + 2) + 1) * out.channels;
    };
    // Only the last three rows of a convolution before a max-pool are kept.
    const int64_t size = l.stem.conv.width * out.channels;
    Number* rows = w.scratch[team.rank].rows.data();
    const int64_t begin = team.begin(out.grid.height), end = team.end(out.grid.height);
    for (int64_t y = begin; y < end; ++y) {
      if (!shape_.max_pool) {
        row(y, to(y));
        continue;
      }
      const int64_t first = std::max<int64_t>(2 * y - 1, 0);
      const int64_t last = std::min(2 * y + 1, l.stem.conv.height - 1);
      for (int64_t r = y == begin ? first : 2 * y; r <= last; ++r) row(r, rows + r % 3 * size);
      max_pool(rows, size, first, last, l.stem.conv.width, out.channels, out.grid.width, to(y));
    }
  }

  void stem_row(Workspace& w, int64_t y, Number* to, Team team) const {
    const StemShape& s = w.layout->stem;
    const StemWeights& stem = net_->stem;
    const int64_t channels = w.layout->maps[0].channels, vectors = channels / kLanes;
    const int64_t steps = stem.kernel * stem.words;
    const Number* x = w.image.data() + y * stem.stride * s.row;
    OuterProduct product;
    product.main.taps = s.taps.data();
    product.main.num_taps = s.taps.size();
    product.main.words = 1;
    product.y_pixel = channels;
    product.ahead = stem.weights;
    product.ahead_rows = kNoRow;
    const int64_t step = stem.stride * stem.in_channels;
    int64_t pixel = step;
    if (s.gathered) {
      gather_words(x, step, w.scratch[team.rank].gathered.data(), s);
      x = w.scratch[team.rank].gathered.data();
      pixel = kQuad;
      product.main.words = steps;
      product.main.plane = s.conv.width * kQuad;
    }
    for (int64_t v = 0; v < vectors; v += kPair) {
      product.main.weights = stem.weights + v * kRow * steps;
      product.multiplier = stem.multiplier + v * kLanes;
      product.bias = stem.bias + v * kLanes;
      const int64_t number = std::min<int64_t>(kPair, vectors - v);
      for (const OuterTileShape& tile : s.tiles) {
        product.main.x = x + tile.x * pixel;
        product.y = to + tile.x * channels + v * kLanes;
        if (s.gathered) {
          outer_tile_for(number, 1, tile.columns)(product);
        } else if (step == 3) {
          stem_tile_for<3>(number, tile.columns)(product);
        } else {
          stem_tile_for<6>(number, tile.columns)(product);
        }
      }
    }
  }

  // The words that a row of the stem's convolution reads, as planes of quads.
  void gather_words(const Number* x, int64_t step, Number* to, const StemShape& s) const {
    const StemWeights& stem = net_->stem;
    constexpr int64_t kWords = kQuad / kGroup;
    for (int64_t t = 0; t < stem.kernel * stem.words; ++t) {
      const Number* from = x + t / stem.words * s.row + t % stem.words * kGroup;
      Number* word = to + t / kWords * s.conv.width * kQuad + t % kWords * kGroup;
      for (int64_t i = 0; i < s.conv.width; ++i) {
        std::memcpy(word + i * kQuad, from + i * step, kGroup * sizeof(Number));
      }
    }
  }

  // The same in float32: each sum over input channels, rows and columns of the kernel in turn.
  void float_stem_row(Workspace& w, int64_t y, Number* to) const {
    constexpr int kPixels = 4;
    const StemShape& s = w.layout->stem;
    const StemWeights& stem = net_->stem;
    const int64_t channels = w.layout->maps[0].channels, inputs = stem.in_channels;
    const float* row = w.float_image.data() + y * stem.stride * s.row;
    const Vec scale = broadcast(stem.scale), zero{};
    for (int64_t v = 0; v < channels / kLanes; ++v) {
      const int64_t group = v / kPair, inside = v % kPair * kLanes;
      const int64_t terms = inputs * stem.kernel * stem.kernel;
      const float* weights = stem.float_weights + group * terms * kGroupChannels + inside;
      const Vec bias = load(stem.bias + v * kLanes);
      for (int64_t x = 0; x < s.conv.width; x += kPixels) {
        const float* pixel[kPixels];
        for (int p = 0; p < kPixels; ++p) {
          pixel[p] = row + std::min(x + p, s.conv.width - 1) * stem.stride * inputs;
        }
        Vec sum[kPixels] = {};
        const float* weight = weights;
        for (int64_t c = 0; c < inputs; ++c) {
          for (int64_t i = 0; i < stem.kernel; ++i) {
            for (int64_t j = 0; j < stem.kernel; ++j, weight += kGroupChannels) {
              const int64_t place = i * s.row + j * inputs + c;
              for (int p = 0; p < kPixels; ++p) {
                sum[p] += broadcast(pixel[p][place]) * load(weight);
              }
            }
          }
        }
        for (int p = 0; p < std::min<int64_t>(kPixels, s.conv.width - x); ++p) {
          Vec value = sum[p] + bias;
          value = (value > zero ? value : zero) * scale;
          Number lanes[kLanes];
          const Numbers numbers = to_numbers(value);
          std::memcpy(lanes, &numbers, sizeof numbers);
          // Lanes are in a group's order.
          const bool alone = v + 1 == channels / kLanes && v % kPair == 0;
          Number* first = to + (x + p) * channels + group * kGroupChannels;
          for (int i = 0; i < kLanes; ++i) {
            first[alone ? channel_of<1>(0, i) : channel_of<2>(v % kPair, i)] = lanes[i];
          }
        }
      }
    }
  }

  // One row of the 3×3 max-pool of stride 2, from rows `first` to `last` of the last three.
  static void max_pool(Number* rows, int64_t size, int64_t first, int64_t last, int64_t width,
                       int64_t channels, int64_t pooled_width, Number* to) {
    const int64_t row = first % 3 * size;
    const int64_t more[2] = {std::min(first + 1, last) % 3 * size, last % 3 * size};
    Number* most = rows + 3 * size;
    int64_t i = 0;
    for (; i + kRow <= size; i += kRow) {
      const NumberRow value = largest(
          load_as<NumberRow>(rows + row + i),
          largest(load_as<NumberRow>(rows + more[0] + i), load_as<NumberRow>(rows + more[1] + i)));
      std::memcpy(most + i, &value, sizeof value);
    }
    for (; i < size; ++i) {
      most[i] = std::max(rows[row + i], std::max(rows[more[0] + i], rows[more[1] + i]));
    }
    for (int64_t x = 0; x < pooled_width; ++x, to += channels) {
      const Number* a = most + std::max<int64_t>(2 * x - 1, 0) * channels;
      const Number* b = most + 2 * x * channels;
      const Number* c = most + std::min(2 * x + 1, width - 1) * channels;
      for (i = 0; i + kRow <= channels; i += kRow) {
        const NumberRow value =
            largest(load_as<NumberRow>(a + i),
                    largest(load_as<NumberRow>(b + i), load_as<NumberRow>(c + i)));
        std::memcpy(to + i, &value, sizeof value);
      }
      for (; i < channels; ++i) to[i] = std::max(a[i], std::max(b[i], c[i]));
    }
  }

  // ----------------------------------------------------------------------------------------------

  void block(Workspace& w, size_t index, Decisions& decisions, uint8_t*& mask, Team team) const {
    const PackedBlock& b = net_->blocks[index];
    const BlockShape& at = w.layout->blocks[index];
    const MapLayout& in = w.layout->maps[at.in_map];
    const Number* x = w.maps[at.in_map].data();
    const bool needs_means = std::any_of(b.gates.begin(), b.gates.end(),
                                         [](const GateWeights& gate) { return gate.hidden > 0; });
    if (needs_means) means(in, x, b.in_scale, w.means.data(), team);
    if (b.last.shortcut_words > 0) gather_shortcut(w, index, team);
    team.wait();

    Choice choice[kMostConvolutions - 1];
    decide(w, b, decisions, mask, team, choice);
    Choice read{all_.data(), b.dots[0].in_channels};
    int64_t channels = in.channels;
    for (size_t k = 0; k < b.dots.size(); ++k) {
      const bool last = k + 1 == b.dots.size();
      Target target;
      const int64_t number = choice[k].number;
      if (last) {
        const QuadShape& q = w.layout->quads[at.quads];
        target.tails = Cut(number, b.last.kernel).tails;
        target.tail = w.quads[at.quads].data();
        target.tail_plane = q.tail_plane();
        target.y = target.tail + q.first();
        target.quad = q.plane();
        target.pixel = kQuad;
      } else {
        target.y = w.between[k % 2].data();
        target.quad = kQuad;
        target.pixel = up_to(number, kQuad);
        clear_border(at.dots[k].out, target.y, target.pixel, team);
      }
      dots(w, b.dots[k], at.dots[k], x, channels, read, choice[k], target, last ? &b.last : nullptr,
           team);
      team.wait();
      x = target.y;
      channels = target.pixel;
      read = choice[k];
    }
    outer(w, index, read, team);
    team.wait();
  }

  // What the gates of a block choose, once there are the means of its input; moves on to the next
  // block's decisions and masks.
  void decide(Workspace& w, const PackedBlock& b, Decisions& decisions, uint8_t*& mask, Team team,
              Choice* choices) const {
    Scratch& own = w.scratch[team.rank];
    for (size_t g = 0; g < b.dots.size(); ++g) {
      const int64_t channels = b.dots[g].out_channels;
      choices[g] = {all_.data(), channels};
      if (!b.gates.empty()) {
        int32_t* chosen = own.chosen[g].data();
        float* logits = own.logits[g].data();
        const int64_t number =
            choose(b.gates[g], channels, w.means.data(), decisions, logits, chosen);
        std::fill_n(chosen + number, kBeyond, number > 0 ? chosen[number - 1] : 0);
        choices[g] = {chosen, number};
        if (b.gates[g].beta != nullptr) {
          boost(b.gates[g].beta, channels, logits, own.shifts[g].data());
          choices[g].scale = logits;
          choices[g].shift = own.shifts[g].data();
        }
        decisions.thresholds += channels;
        ++decisions.counts;
      }
      if (mask != nullptr) {
        if (team.rank == 0) write_mask(choices[g].channels, choices[g].number, channels, mask);
        mask += channels;
      }
    }
  }

  // Of a map's channels; those beyond the last one are 0.
  static void means(const MapLayout& map, const Number* x, float scale, float* means, Team team) {
    const float share =
        static_cast<float>(static_cast<double>(scale) / static_cast<double>(map.grid.pixels()));
    // Channels are added up in whole rows of numbers, those of the next pixel, too.
    const int64_t pieces = ceil_div(map.channels, kRow);
    for (int64_t i = team.begin(pieces); i < team.end(pieces); ++i) {
      MapSums sums;
      for (int64_t y = 1; y <= map.grid.height; ++y) {
        const Number* row = x + (y * (map.grid.width + 2) + 1) * map.channels;
        sums.add(row + i * kRow, map.channels, map.grid.width);
      }
      float result[kRow];
      sums.store(result);
      for (int64_t c = i * kRow; c < std::min((i + 1) * kRow, map.channels); ++c) {
        means[c] = result[c - i * kRow] * share;
      }
    }
  }

  static void clear_border(const Grid& grid, Number* map, int64_t channels, Team team) {
    const int64_t row = (grid.width + 2) * channels;
    for (int64_t y = team.begin(grid.height + 2); y < team.end(grid.height + 2); ++y) {
      Number* to = map + y * row;
      if (y == 0 || y == grid.height + 1) {
        std::fill_n(to, row, 0);
      } else {
        std::fill_n(to, channels, 0);
        std::fill_n(to + row - channels, channels, 0);
      }
    }
  }

  // The pixels that a shortcut reads, as planes of quads.
  void gather_shortcut(Workspace& w, size_t index, Team team) const {
    const BlockShape& at = w.layout->blocks[index];
    const MapLayout& in = w.layout->maps[at.in_map];
    const Grid& out = at.outer.grid;
    const int64_t stride = shape_.blocks[index].shortcut.stride;
    const int64_t quads = ceil_div(net_->blocks[index].last.shortcut_words * kGroup, kQuad);
    for (int64_t y = team.begin(out.height); y < team.end(out.height); ++y) {
      for (int64_t x = 0; x < out.width; ++x) {
        const Number* from =
            w.maps[at.in_map].data() +
            ((y * stride + 1) * (in.grid.width + 2) + x * stride + 1) * in.channels;
        Number* to = w.gathered.data() + (y * out.width + x) * kQuad;
        for (int64_t q = 0; q < quads; ++q) {
          std::memcpy(to + q * out.pixels() * kQuad, from + q * kQuad, kQuad * sizeof(Number));
        }
      }
    }
  }

  // ----------------------------------------------------------------------------------------------

  // A hidden map.
  struct Target {
    Number* y = nullptr;
    int64_t quad = 0;   // from one quad of channels to the next
    int64_t pixel = 0;  // from one pixel to the next
    Number* tail = nullptr;
    int64_t tail_plane = 0, tails = 0;
  };

  // The chosen channels of a convolution.
  void dots(Workspace& w, const DotWeights& conv, const DotShape& at, const Number* x,
            int64_t channels, const Choice& in, const Choice& out, const Target& to,
            const OuterWeights* next, Team team) const {
    // Four channels at once; the last one or two apart.
    const int64_t few = out.number % kQuad == 3 ? 0 : out.number % kQuad;
    const int64_t quads = ceil_div(out.number - few, kQuad);
    const int64_t pieces = quads + (few > 0);
    // Threads share the pieces, of which one may be cut; if there are few, each one's pixels.
    const int64_t all = at.tiles.size(), few_all = few > 0 ? at.few_tiles.size() : 0;
    const bool by_channel = pieces >= all || pieces >= 8;
    const int64_t begin = team.begin(quads * all + few_all), end = team.end(quads * all + few_all);

    Chooser& inputs = w.scratch[team.rank].inputs;
    if (conv.chosen_inputs) inputs.choose(in.channels, in.number);

    DotProduct product;
    product.x = x;
    product.channels = channels;
    product.row = (at.in.width + 2) * channels;
    product.scales = out.scale != nullptr;
    product.run = DotWeights::run_of(conv.kernel, channels);
    const int64_t steps = std::max<int64_t>(1, conv.kernel * product.run / kRow);
    for (int64_t i = 0; i < pieces; ++i) {
      const bool whole = i < quads;
      const int64_t number = whole ? kQuad : few;
      const std::vector<DotTileShape>& tiles = whole ? at.tiles : at.few_tiles;
      const int64_t count = tiles.size();
      const int64_t first =
          by_channel ? std::clamp<int64_t>(begin - i * all, 0, count) : team.begin(count);
      const int64_t last =
          by_channel ? std::clamp<int64_t>(end - i * all, 0, count) : team.end(count);
      if (first == last) continue;
      const bool more = i + 1 < pieces && (!by_channel || (i + 1) * all < end);
      float multiplier[kQuad], bias[kQuad];
      const PackedWeight* soon[kQuad];
      for (int64_t m = 0; m < number; ++m) {
        const int64_t j = std::min(i * kQuad + m, out.number - 1);
        const int64_t c = out.channels[j];
        multiplier[m] = conv.multiplier[c];
        bias[m] = conv.bias[c];
        if (out.scale != nullptr) {
          multiplier[m] *= out.scale[c];
          bias[m] = (bias[m] + out.shift[c] / conv.out_scale) * out.scale[c];
        }
        product.weights[m] = conv.weights + c * conv.row;
        const int64_t later = j + kQuad;
        soon[m] =
            more && later < out.number ? conv.weights + out.channels[later] * conv.row : nullptr;
        if (!whole && to.tails > 0) {
          product.y[m] = to.tail + m * to.tail_plane;
        } else {
          product.y[m] = to.y + i * to.quad + m;
        }
      }
      if (conv.chosen_inputs) {
        PackedWeight* rows = w.scratch[team.rank].weights.data();
        for (int64_t m = 0; m < number; ++m) {
          choose_inputs(conv, product.weights[m], inputs, channels, product.run, rows);
          product.weights[m] = rows;
          rows += conv.kernel * product.run;
        }
      }
      product.y_pixel = !whole && to.tails > 0 ? 1 : to.pixel;
      set_factors(multiplier, number, product.multiplier);
      set_factors(bias, number, product.bias);
      for (int64_t t = first; t < last; ++t) {
        // Each of the next four rows is prefetched by one tile, then rows of the next convolution.
        const int64_t ahead = t - first;
        product.ahead = reinterpret_cast<const char*>(product.weights[0]);
        product.ahead_step = 0;
        if (ahead < number) {
          if (soon[ahead] != nullptr) {
            product.ahead = reinterpret_cast<const char*>(soon[ahead]);
            product.ahead_step = 64;
          }
        } else if (next != nullptr && next->rows != nullptr && ahead < 2 * number) {
          const int32_t c = out.channels[std::min(i * kQuad + ahead - number, out.number - 1)];
          product.ahead = reinterpret_cast<const char*>(next->rows + c * next->row_size());
          product.ahead_step = next->row_size() * sizeof(PackedWeight) / steps;
        }
        product.pixel = at.pixel.data() + tiles[t].first;
        product.position = at.position.data() + tiles[t].first;
        product.in_a_row = tiles[t].in_a_row;
        product.rows = tiles[t].kernel;
        dot_tile_for(number, tiles[t].count)(product);
      }
    }
  }

  // An output channel's weights of the chosen inputs only, as rows of the kernel.
  static void choose_inputs(const DotWeights& conv, const PackedWeight* weights,
                            const Chooser& inputs, int64_t channels, int64_t run,
                            PackedWeight* to) {
    const int64_t step = up_to(conv.in_channels, kRow);
    std::fill_n(to, conv.kernel * run, 0);
    for (int64_t y = 0; y < conv.kernel; ++y) {
      for (int64_t x = 0; x < conv.kernel; ++x) {
        inputs.compress(weights + (y * conv.kernel + x) * step, step / kRow,
                        to + y * run + x * channels);
      }
    }
  }

  // A block's last convolution and its shortcut, into its map.
  void outer(Workspace& w, size_t index, const Choice& in, Team team) const {
    const OuterWeights& conv = net_->blocks[index].last;
    const BlockShape& at = w.layout->blocks[index];
    const OuterShape& shape = at.outer;
    const QuadShape& quads = w.layout->quads[at.quads];
    const MapLayout& out = w.layout->maps[at.out_map];
    const Cut cut(in.number, conv.kernel);
    const int64_t vectors = out.channels / kLanes, columns = shape.grid.width + 2;
    const int64_t group = cut.steps(conv.kernel) * kPair * kRow;
    const Number* hidden = w.quads[at.quads].data();

    OuterProduct product;
    product.main.row = columns * kQuad;
    product.main.plane = quads.plane();
    product.main.words = cut.words;
    product.tail.row = columns;
    product.tail.plane = quads.tail_plane();
    product.tail.words = cut.tails;
    product.shortcut.row = shape.grid.width * kQuad;
    product.shortcut.plane = shape.grid.pixels() * kQuad;
    product.shortcut.words = conv.shortcut_words;
    product.ratio = conv.ratio;
    product.y_row = columns * out.channels;
    product.y_pixel = out.channels;

    // Threads share units; if there are too few, they share each one's pixels.
    const Team alone{0, 1};
    const bool apart = conv.units >= team.size;
    const Team unit_team = apart ? team : alone, pixel_team = apart ? alone : team;
    const int64_t last_unit = unit_team.end(conv.units);
    const int64_t tiles = shape.tiles.size();
    // A unit's words are packed before it, or by a tile of the unit before.
    bool is_packed = false;
    PackedWeight* to = nullptr;
    if (conv.rows != nullptr) to = apart ? w.scratch[team.rank].unit.data() : w.unit.data();
    PackedWeight* next = apart && kPacksAhead && to != nullptr ? to + group : nullptr;
    for (int64_t u = unit_team.begin(conv.units); u < last_unit; ++u) {
      const PackedWeight* words = conv.words;
      if (conv.rows != nullptr) {
        const int64_t pieces = cut.quads + cut.tails;
        if (!is_packed) {
          conv.pack_unit(u, in.channels, in.number, pixel_team.begin(pieces),
                         pixel_team.end(pieces), to);
        }
        pixel_team.wait();
        words = to;
      } else {
        words += u * kUnitGroups * group;
      }
      int64_t tiles_done = 0;
      for (int64_t i = 0; i < kUnitGroups; ++i) {
        const int64_t v = (u * kUnitGroups + i) * kPair;
        if (v >= vectors) break;
        const int64_t number = std::min<int64_t>(kPair, vectors - v);
        const PackedWeight* weights = words + i * group;
        product.multiplier = conv.multiplier + v * kLanes;
        product.bias = conv.bias + v * kLanes;
        if (conv.shortcut_words > 0) {
          product.shortcut.weights = conv.shortcut + v * kRow * conv.shortcut_words;
          product.shortcut_multiplier = conv.shortcut_multiplier + v * kLanes;
        }
        for (int64_t t = pixel_team.begin(tiles); t < pixel_team.end(tiles); ++t, ++tiles_done) {
          const OuterTileShape& tile = shape.tiles[t];
          const int64_t next_unit = u + 1 < last_unit ? u + 1 : -1;
          product.main.read(tile.kernel, shape.taps, conv.kernel, weights);
          product.tail.read(tile.kernel, shape.tail_taps, 1,
                            weights + cut.words * conv.taps * kPair * kRow);
          product.packed = nullptr;
          if (next != nullptr && next_unit >= 0 &&
              tiles_done == std::min<int64_t>(kGroup, tiles - 1)) {
            rows_ahead(conv, next_unit, in.channels, product);
            // With each tap, one of all.
            product.main.read({0, static_cast<int32_t>(conv.kernel)}, shape.taps, conv.kernel,
                              weights);
            product.packed = next;
            product.number = in.number;
          } else {
            look_ahead(index, next_unit, tiles_done, in, cut.words, product);
          }
          const int64_t place = tile.y * columns + tile.x;
          product.main.x = hidden + quads.first() + place * kQuad;
          product.tail.x = hidden + place;
          product.shortcut.x = w.gathered.data() + (tile.y * shape.grid.width + tile.x) * kQuad;
          product.y = w.maps[at.out_map].data() + (place + columns + 1) * out.channels + v * kLanes;
          outer_tile_for(number, tile.rows, tile.columns, tile.whole_row)(product);
        }
      }
      if (conv.rows != nullptr) pixel_team.wait();
      if (next != nullptr) {
        std::swap(to, next);
        is_packed = true;
      }
    }
  }

  // Of a unit, every kGroup-th one from the first on.
  static void rows_ahead(const OuterWeights& conv, int64_t unit, const int32_t* first,
                         OuterProduct& product) {
    product.ahead = conv.rows + unit * conv.in_channels * conv.row_size();
    product.ahead_rows = first;
    product.ahead_step = kGroup;
    product.ahead_size = conv.row_size();
  }

  // What a tile prefetches: rows of the next unit, or the next block's gate.
  void look_ahead(size_t index, int64_t next_unit, int64_t tile, const Choice& in, int64_t words,
                  OuterProduct& product) const {
    const OuterWeights& conv = net_->blocks[index].last;
    product.ahead = product.main.weights;
    product.ahead_rows = kNoRow;
    product.ahead_step = product.ahead_size = 0;
    if (conv.rows == nullptr) return;
    if (next_unit >= 0) {
      if (tile >= kGroup) return;
      rows_ahead(conv, next_unit, in.channels + tile, product);
      return;
    }
    if (index + 1 == net_->blocks.size() || words == 0) return;
    const GateWeights& gate = net_->blocks[index + 1].gates[0];
    const int64_t row = conv.taps * 64, bytes = gate.size() * sizeof(float);
    if ((tile + 1) * words * row > bytes || words > static_cast<int64_t>(all_.size())) return;
    product.ahead = reinterpret_cast<const PackedWeight*>(gate.reduce) +
                    tile * words * row / static_cast<int64_t>(sizeof(PackedWeight));
    product.ahead_rows = all_.data();
    product.ahead_step = 1;
    product.ahead_size = row / static_cast<int64_t>(sizeof(PackedWeight));
  }

  // ----------------------------------------------------------------------------------------------

  // A stage's output as floats, channels × rows × columns.
  void write_map(Workspace& w, size_t index, float* to, Team team) const {
    const MapLayout& map = w.layout->maps[w.layout->blocks[index].out_map];
    const Number* x = w.maps[w.layout->blocks[index].out_map].data();
    const int64_t channels = shape_.blocks[index].last().out_channels, pixels = map.grid.pixels();
    const float scale = net_->blocks[index].out_scale;
    for (int64_t y = team.begin(map.grid.height); y < team.end(map.grid.height); ++y) {
      for (int64_t i = 0; i < map.grid.width; ++i) {
        const Number* pixel = x + ((y + 1) * (map.grid.width + 2) + i + 1) * map.channels;
        float* first = to + y * map.grid.width + i;
        for (int64_t c = 0; c < channels; ++c) first[c * pixels] = to_float(pixel[c]) * scale;
      }
    }
    team.wait();
  }

  // The mean over the last map, and the classifier if there is one.
  void head(Workspace& w, float* features, Team team) const {
    const int64_t last = w.layout->blocks.back().out_map;
    means(w.layout->maps[last], w.maps[last].data(), net_->blocks.back().out_scale, w.means.data(),
          team);
    team.wait();
    if (net_->linear == nullptr) {
      if (team.rank == 0) std::copy_n(w.means.data(), shape_.features, features);
      return;
    }
    const int64_t size = padded_to_partials(shape_.blocks.back().last().out_channels);
    for (int64_t k = team.begin(shape_.features); k < team.end(shape_.features); ++k) {
      features[k] = dot(w.means.data(), net_->linear + k * size, size) + net_->linear_bias[k];
    }
  }

  Network shape_;
  Arena arena_;
  std::unique_ptr<PackedNetwork> net_;
  std::vector<int32_t> all_;  // 0, 1, 2, ..., and the last one some more times
};

inline void Engine::Workspace::prepare(const Engine& engine, std::shared_ptr<const Layout> wanted,
                                       int threads) {
  const StemWeights& stem = engine.net_->stem;
  if (layout != wanted) {
    const Layout& l = *wanted;
    if (stem.floats) {
      float_image = Buffer(l.stem.image_size);
    } else {
      image = Storage<Number>(l.stem.image_size);
      std::fill_n(image.data(), l.stem.image_size, kOutside);
    }
    maps.clear();
    for (const MapLayout& map : l.maps) maps.emplace_back(map.size());
    quads.clear();
    for (const QuadShape& shape : l.quads) quads.emplace_back(shape.size());
    for (Storage<Number>& map : between) map = Storage<Number>(l.largest_between);
    gathered = Storage<Number>(l.largest_gathered);
    unit = Storage<PackedWeight>(l.largest_unit);
    means = Buffer(padded_to_partials(l.largest_channels));
    scratch.clear();
    layout = std::move(wanted);
  }
  while (static_cast<int>(scratch.size()) < threads) {
    const Layout& l = *layout;
    Scratch fresh;
    if (engine.shape_.max_pool) {
      fresh.rows = Storage<Number>(4 * l.stem.conv.width * l.maps[0].channels);
    }
    if (l.stem.gathered) {
      const int64_t quads = ceil_div(stem.kernel * stem.words * kGroup, kQuad);
      fresh.gathered = Storage<Number>(quads * l.stem.conv.width * kQuad);
    }
    fresh.unit = Storage<PackedWeight>(l.largest_unit * (kPacksAhead ? 2 : 1));
    fresh.weights = Storage<PackedWeight>(l.largest_rows);
    fresh.inputs.make_room(up_to(l.largest_channels, kRow) / kRow);
    for (Buffer& logits : fresh.logits) logits = Buffer(padded_to_partials(l.largest_channels));
    for (Buffer& shifts : fresh.shifts) shifts = Buffer(l.largest_channels);
    for (std::vector<int32_t>& chosen : fresh.chosen) {
      chosen.resize(l.largest_channels + kBeyond);
    }
    scratch.push_back(std::move(fresh));
  }
}

}  // namespace gated

// A ResNet in which each image computes only the channels that its gates choose.
//
// Blocks are computed in one of two ways. BasicBlocks have activations of rows × columns ×
// channels. Their first convolution computes the chosen channels only, with dot products over its
// input channels, into planes of a hidden map that has no place for the others; the second one adds
// up the outer products of these planes with the chosen rows of its weights. Bias, shortcut and
// ReLU happen while sums are in registers. All other blocks, such as Bottlenecks, have a plane for
// each channel (`planes.h`), because between their convolutions input and output channels are both
// chosen.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "../gates.h"
#include "../memory.h"
#include "../network.h"
#include "../runner.h"
#include "../simd.h"
#include "../team.h"
#include "layout.h"
#include "packing.h"
#include "planes.h"
#include "tiles.h"

namespace gated {
namespace {

// What one thread needs for itself.
struct Scratch {
  Buffer rows;                 // the last three rows of the stem's convolution
  std::vector<Buffer> planes;  // for each small map, hidden channels before they are copied
  Buffer partial;              // sums of a band of dot products
  // For each gate of a block, its logits, and the channels that it chooses.
  Buffer logits[kMostConvolutions - 1];
  Buffer shifts[kMostConvolutions - 1];
  std::vector<int32_t> chosen[kMostConvolutions - 1];
  bool extreme = false;  // whether this thread's part of the image is
};

// Tiles of dot products whose sums are kept until all input channels are in.
constexpr int64_t kBandTiles = 32;

// Rows times taps whose weights, for a group of output channels, share the innermost cache with
// the rest.
constexpr int64_t kMostTaps = 128;

constexpr float kZeros[kOuterVectors * kLanes] = {};

// Rows are copied with whole vectors, beyond a buffer's ends by less than two.
constexpr int64_t kMargin = 2 * kLanes;

inline Buffer with_margins(int64_t size) {
  return size > 0 ? Buffer(size + 2 * kMargin) : Buffer();
}

inline float* inside(const Buffer& buffer) { return buffer.data() + kMargin; }

// What one image needs, for one thread or a team.
struct Workspace {
  std::shared_ptr<const Layout> layout;
  Buffer image;
  std::vector<Buffer> maps;
  std::vector<Buffer> hidden;
  Buffer shortcut;
  Buffer planes[2];         // maps; a block that changes their shape writes the other one
  Buffer hidden_planes[2];  // maps between a block's convolutions, in turn
  Buffer copies;            // of the map that a convolution reads
  Buffer pooled;
  std::vector<Scratch> scratch;  // for each thread

  Blocked map(int64_t i) const {
    return {maps[i].data(), layout->maps[i].padded_pixels(), layout->maps[i].channels};
  }

  void prepare(const PackedNetwork& net, std::shared_ptr<const Layout> wanted, int threads) {
    if (layout != wanted) {
      const Layout& l = *wanted;
      image = Buffer(net.in_channels * l.stem.channel);
      maps.clear();
      hidden.clear();
      for (const Hidden& h : l.hidden) {
        maps.emplace_back(h.map.size());
        hidden.emplace_back(h.plane * h.planes);
      }
      shortcut = Buffer(l.largest_shortcut);
      for (Buffer& buffer : planes) buffer = with_margins(l.largest_map);
      for (Buffer& buffer : hidden_planes) buffer = with_margins(l.largest_hidden);
      copies = with_margins(l.largest_copies);
      pooled = Buffer(padded_to_partials(l.largest_channels));
      scratch.clear();
      layout = std::move(wanted);
    }
    while (static_cast<int>(scratch.size()) < threads) {
      const Layout& l = *layout;
      Scratch fresh;
      fresh.rows = Buffer(3 * l.stem.conv_width * padded_channels(net.width));
      for (const Hidden& h : l.hidden) {
        // Rows are read with whole vectors, beyond the end by less than one.
        const int64_t size = h.map.padded_pixels() * kDotChannels + kLanes;
        fresh.planes.emplace_back(h.copies ? size : 0);
      }
      fresh.partial = Buffer(kBandTiles * kDotChannels * kDotPixels * kLanes);
      for (Buffer& logits : fresh.logits) {
        logits = Buffer(padded_to_partials(l.largest_channels));
      }
      for (Buffer& shifts : fresh.shifts) shifts = Buffer(l.largest_channels);
      for (std::vector<int32_t>& chosen : fresh.chosen) chosen.resize(l.largest_channels);
      scratch.push_back(std::move(fresh));
    }
  }
};

// Inputs beyond this take the careful way, on which NaN and infinity do what they do in PyTorch.
constexpr float kExtreme = 1e18f;

class Engine {
 public:
  using Layout = gated::Layout;
  using Workspace = gated::Workspace;

  // The network's weights are copied.
  explicit Engine(const Network& net) : shape_(net) {
    PackedNetwork(net, arena_);  // only counts
    arena_.allocate();
    net_ = PackedNetwork(net, arena_);
    int64_t most = net_.in_channels;
    for (const PackedBlock& b : net_.blocks) {
      for (int64_t k = 0; k < b.num_convolutions; ++k) {
        most = std::max({most, b.convolutions[k].in_channels, b.convolutions[k].out_channels});
      }
    }
    for (int64_t c = 0; c < most; ++c) all_.push_back(c);
  }

  const Network& shape() const { return shape_; }

  // Size of the weights in bytes.
  int64_t size() const { return arena_.used(); }

  Layout layout(int64_t height, int64_t width) const {
    return Layout(shape_, net_.in_planes, height, width);
  }

  void prepare(Workspace& w, std::shared_ptr<const Layout> layout, int threads) const {
    w.prepare(net_, std::move(layout), threads);
  }

  void forward(Workspace& w, const float* image, Decisions decisions, const Results& results,
               Team team) const {
    const bool extreme = read_image(w, image, team);
    stem(w, extreme, team);
    Progress at{decisions, results.mask, results.maps, extreme};
    const float* last = nullptr;
    if (net_.in_planes) {
      last = planes(w, at, team);
    } else {
      if (extreme) clear_padding(w, 0, net_.width, team);
      int64_t index = 0;
      for (const int64_t blocks : shape_.stages) {
        for (int64_t i = 0; i < blocks; ++i) block(w, index++, at, team);
        write_map(w, w.layout->blocks[index - 1].out_map,
                  net_.blocks[index - 1].last().out_channels, at, team);
      }
    }
    head(w, last, results.features, team);
    team.wait();
  }

 private:
  // What is left of the decisions that blocks go by and of the places for their results.
  struct Progress {
    Decisions decisions;
    uint8_t* mask;
    float* const* map;
    bool extreme;  // the image is
  };

  // Copies an image into the stem's planes; says whether it has extreme values.
  bool read_image(Workspace& w, const float* image, Team team) const {
    const Stem& s = w.layout->stem;
    const int64_t height = w.layout->height, width = w.layout->width;
    const int64_t lines = net_.in_channels * height;
    int32_t extreme = 0;
    for (int64_t line = team.begin(lines); line < team.end(lines); ++line) {
      const float* from = image + line * width;
      float* to =
          w.image.data() + line / height * s.channel + (line % height + net_.padding) * s.columns;
      for (int64_t x = 0; x < width; ++x) extreme |= !(std::fabs(from[x]) <= kExtreme);
      for (int64_t phase = 0; phase < net_.stride; ++phase, to += s.phase) {
        // The first column of the image, without the padding, that belongs to this plane.
        const int64_t skipped = ceil_div(std::max<int64_t>(net_.padding - phase, 0), net_.stride);
        int64_t x = phase + skipped * net_.stride - net_.padding;
        for (float* target = to + skipped; x < width; x += net_.stride) *target++ = from[x];
      }
    }
    w.scratch[team.rank].extreme = extreme != 0;
    team.wait();
    return std::any_of(w.scratch.begin(), w.scratch.begin() + team.size,
                       [](const Scratch& one) { return one.extreme; });
  }

  void stem(Workspace& w, bool extreme, Team team) const {
    const Layout& l = *w.layout;
    const Map& out = l.maps[0];
    // Only the last three rows are kept; each is pixels × channels like a map.
    float* data = w.scratch[team.rank].rows.data();
    const int64_t size = l.stem.conv_width * out.channels;
    const auto kept = [&](int64_t r) {
      return Blocked{data + r % 3 * size, l.stem.conv_width, out.channels};
    };
    for (int64_t y = team.begin(out.height); y < team.end(out.height); ++y) {
      const int64_t first_pixel = (y + 1) * (out.width + 2) + 1;
      if (!net_.max_pool) {
        stem_row(w, y, w.map(0), first_pixel);
        continue;
      }
      const int64_t first = std::max<int64_t>(2 * y - 1, 0);
      const int64_t last = std::min(2 * y + 1, l.stem.conv_height - 1);
      const int64_t unknown = y == team.begin(out.height) ? first : 2 * y;
      for (int64_t r = unknown; r <= last; ++r) stem_row(w, r, kept(r), 0);
      Blocked rows[3];
      for (int64_t r = first; r <= last; ++r) rows[r - first] = kept(r);
      max_pool(rows, last - first + 1, extreme, w.map(0), first_pixel, out.width);
    }
    team.wait();
  }

  // One row of the stem's convolution.
  void stem_row(const Workspace& w, int64_t y, const Blocked& to, int64_t first_pixel) const {
    const Stem& s = w.layout->stem;
    const int64_t cuts = ceil_div(s.conv_width, kOuterPixels);
    OuterProduct product{};
    product.plane = s.channel;
    product.taps = s.taps.data();
    product.num_taps = s.taps.size();
    product.rows = all_.data();
    product.num_rows = net_.in_channels;
    product.rectify = true;
    for (int64_t c = 0; c < to.channels; c += kOuterVectors * kLanes) {
      const int64_t vectors = std::min<int64_t>(kOuterVectors, (to.channels - c) / kLanes);
      product.weights = net_.stem + net_.in_channels * product.num_taps * c;
      product.row_size = product.num_taps * vectors * kLanes;
      product.ahead = product.weights;
      product.ahead_rows = product.rows;
      product.bias = net_.stem_bias + c;
      product.channels = to.step(c);
      product.y = to.at(c) + first_pixel * product.channels;
      for (int64_t cut = 0; cut < cuts; ++cut) {
        const int64_t x = s.conv_width * cut / cuts;
        product.x = w.image.data() + y * net_.stride * s.columns + x;
        product.position = s.column.data() + x;
        gated::run(product, vectors, s.conv_width * (cut + 1) / cuts - x);
      }
    }
  }

  // One row of the 3×3 max-pool of stride 2, from up to three rows.
  static void max_pool(const Blocked* rows, int64_t num_rows, bool extreme, const Blocked& to,
                       int64_t first_pixel, int64_t pooled_width) {
    const int64_t width = rows[0].pixels;
    for (int64_t c = 0; c < to.channels; c += kLanes) {
      const int64_t step = to.step(c);
      for (int64_t x = 0; x < pooled_width; ++x) {
        const int64_t first = std::max<int64_t>(2 * x - 1, 0);
        const int64_t last = std::min(2 * x + 1, width - 1);
        Vec most = load(rows[0].at(c) + first * step);
        for (int64_t r = 0; r < num_rows; ++r) {
          for (int64_t i = first; i <= last; ++i) {
            const Vec value = load(rows[r].at(c) + i * step);
            most = extreme ? maximum_or_nan(most, value) : maximum(most, value);
          }
        }
        store(to.at(c) + (first_pixel + x) * step, most);
      }
    }
  }

  // What the gates of a block choose, once there are the means of its input; moves on to the next
  // block's decisions and masks.
  void decide(Workspace& w, const PackedBlock& b, Progress& at, Team team, Choice* choices) const {
    Decisions& decisions = at.decisions;
    uint8_t*& mask = at.mask;
    for (int64_t g = 0; g + 1 < b.num_convolutions; ++g) {
      const int64_t channels = b.convolutions[g].out_channels;
      choices[g] = all(channels);
      if (decisions.thresholds != nullptr) {
        float* logits = w.scratch[team.rank].logits[g].data();
        int32_t* chosen = w.scratch[team.rank].chosen[g].data();
        const int64_t number =
            choose(b.gates[g], channels, w.pooled.data(), decisions, logits, chosen);
        if (mask != nullptr && team.rank == 0) write_mask(chosen, number, channels, mask);
        if (!at.extreme) choices[g] = {chosen, number};
        const bool boosts = b.gates[g].beta != nullptr;
        if (boosts) {
          float* shifts = w.scratch[team.rank].shifts[g].data();
          boost(b.gates[g].beta, channels, logits, shifts);
          choices[g].scale = logits;
          choices[g].shift = shifts;
        }
        if (at.extreme) choices[g].scale = as_scale(chosen, number, channels, boosts, logits);
        decisions.thresholds += channels;
        ++decisions.counts;
      } else if (mask != nullptr && team.rank == 0) {
        std::fill_n(mask, channels, 1);
      }
      if (mask != nullptr) mask += channels;
    }
  }

  Choice all(int64_t channels) const { return {all_.data(), channels}; }

  // Whether a block's gates, if they choose, need the means of its input.
  static bool needs_means(const PackedBlock& b, const Decisions& decisions) {
    const auto has_weights = [](const GateWeights& gate) { return gate.hidden > 0; };
    return decisions.thresholds != nullptr &&
           std::any_of(b.gates, b.gates + b.num_convolutions - 1, has_weights);
  }

  void block(Workspace& w, int64_t index, Progress& progress, Team team) const {
    const PackedBlock& b = net_.blocks[index];
    const Layout& l = *w.layout;
    const BlockLayout& at = l.blocks[index];
    const Hidden& hidden = l.hidden[at.out_map];
    const bool has_shortcut = b.shortcut.weight != nullptr;

    if (needs_means(b, progress.decisions)) {
      pool(l.maps[at.in_map], w.map(at.in_map), w.pooled.data(), team);
    }
    if (has_shortcut) transpose_shortcut(w, at, team);
    team.wait();

    Choice choice[kMostConvolutions - 1];
    decide(w, b, progress, team, choice);
    first_convolution(w, b.convolutions[0], at, choice[0], team);
    team.wait();

    Outer sum[2];
    int terms = 0;
    if (has_shortcut) {
      // One row whose taps are the input channels.
      Outer& shortcut = sum[terms++];
      shortcut.x = w.shortcut.data();
      shortcut.tile_size = l.maps[at.in_map].channels * kTileStride;
      shortcut.taps = l.shortcut_taps.data();
      shortcut.num_taps = b.shortcut.in_channels;
      shortcut.rows = all_.data();
      shortcut.num_rows = shortcut.all_rows = 1;
      shortcut.weights = b.shortcut.weight;
      shortcut.bias = b.shortcut.bias;
    }
    Outer& second = sum[terms++];
    second.x = w.hidden[at.out_map].data();
    second.plane = hidden.plane;
    second.taps = hidden.taps.data();
    second.num_taps = 9;
    second.rows = choice[0].channels;
    second.num_rows = choice[0].number;
    second.all_rows = b.last().in_channels;
    second.weights = b.last().weight;
    second.bias = b.last().bias;
    outer(sum, terms, hidden, w.map(at.out_map), team);
    team.wait();
    if (progress.extreme) clear_padding(w, at.out_map, b.last().out_channels, team);
  }

  // NaN or infinity times the zero weights of padded channels is not zero.
  static void clear_padding(Workspace& w, int64_t index, int64_t channels, Team team) {
    const Map& map = w.layout->maps[index];
    const Blocked to = w.map(index);
    const std::vector<int32_t>& position = w.layout->hidden[index].position;
    for (int64_t p = team.begin(map.pixels()); p < team.end(map.pixels()); ++p) {
      for (int64_t c = channels; c < map.channels; ++c) to.at(c)[position[p] * to.step(c)] = 0.0f;
    }
    team.wait();
  }

  // The mean of each channel over a map, row by row.
  static void pool(const Map& map, const Blocked& x, float* mean, Team team) {
    const int64_t vectors = map.channels / kLanes;
    const Vec share = broadcast(1.0f / static_cast<float>(map.pixels()));
    for (int64_t v = team.begin(vectors); v < team.end(vectors); ++v) {
      const int64_t c = v * kLanes, step = x.step(c);
      Vec total{};
      for (int64_t y = 1; y <= map.height; ++y) {
        const float* pixel = x.at(c) + (y * (map.width + 2) + 1) * step;
        Vec row{};
        for (int64_t i = 0; i < map.width; ++i, pixel += step) row += load(pixel);
        total += row;
      }
      store(mean + c, total * share);
    }
    if (team.rank == 0) {
      std::fill(mean + map.channels, mean + padded_to_partials(map.channels), 0.0f);
    }
  }

  // Some channels (up to kLanes) of a tile's pixels, from pixels × channels to channels × pixels.
  static void transpose_tile(const float* x, int64_t step, const int32_t* pixel, int64_t count,
                             float* to, int64_t to_step, int64_t channels) {
    for (int64_t p = 0; p < count; p += kLanes) {
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        // Beyond the tile, repeat its last pixel; nobody reads that.
        const int64_t q = p + i < count ? p + i : count - 1;
        rows[i] = load(x + pixel[q] * step);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        if (i < channels) store(to + i * to_step + p, rows[i]);
      }
    }
  }

  // The pixels that a shortcut reads, as tiles × channels × pixels.
  static void transpose_shortcut(Workspace& w, const BlockLayout& at, Team team) {
    const Map& in = w.layout->maps[at.in_map];
    const std::vector<PixelTile>& tiles = w.layout->hidden[at.out_map].tiles;
    const Blocked x = w.map(at.in_map);
    // The middle of the kernel is where a 1×1 convolution of the same stride reads.
    const int64_t middle = in.width + 2 + 1;
    for (int64_t t = team.begin(tiles.size()); t < team.end(tiles.size()); ++t) {
      const int32_t* pixel = at.pixel.data() + tiles[t].first;
      float* to = w.shortcut.data() + t * in.channels * kTileStride;
      for (int64_t c = 0; c < in.channels; c += kLanes) {
        const int64_t step = x.step(c);
        transpose_tile(x.at(c) + middle * step, step, pixel, tiles[t].count, to + c * kTileStride,
                       kTileStride, kLanes);
      }
    }
  }

  // The mask as numbers, times the scale that there is if `boosts`: in an extreme image the masked
  // network computes NaN · 0 = NaN in channels that are not chosen, and so must we.
  static const float* as_scale(const int32_t* chosen, int64_t number, int64_t channels, bool boosts,
                               float* scale) {
    if (!boosts) std::fill_n(scale, channels, 1.0f);
    for (int64_t c = 0, j = 0; c < channels; ++c) {
      if (j < number && chosen[j] == c) {
        ++j;
      } else {
        scale[c] *= 0.0f;
      }
    }
    return scale;
  }

  // All blocks, on planes; returns those of the last map.
  const float* planes(Workspace& w, Progress& progress, Team team) const {
    const Layout& l = *w.layout;
    int current = 0;
    stem_planes(w, team);
    int64_t index = 0;
    for (const int64_t blocks : shape_.stages) {
      for (int64_t i = 0; i < blocks; ++i) plane_block(w, index++, progress, current, team);
      const PlaneShape& last = l.plane_blocks[index - 1].convolutions.back();
      write_planes(inside(w.planes[current]), last.height * last.width, last.out_plane(),
                   net_.blocks[index - 1].last().out_channels, progress, team);
    }
    return inside(w.planes[current]);
  }

  // One of them, from the current map to the next one.
  void plane_block(Workspace& w, int64_t i, Progress& progress, int& current, Team team) const {
    const PackedBlock& b = net_.blocks[i];
    const Layout& l = *w.layout;
    const PlaneBlock& at = l.plane_blocks[i];
    const float* x = inside(w.planes[current]);
    if (needs_means(b, progress.decisions)) {
      const PlaneShape& first = at.convolutions[0];
      pool_planes(x, first.in_height * first.in_width, b.convolutions[0].in_channels,
                  w.pooled.data(), team);
    }
    team.wait();
    Choice choice[kMostConvolutions];
    decide(w, b, progress, team, choice);
    choice[b.num_convolutions - 1] = all(b.last().out_channels);
    if (b.shortcut.weight != nullptr) {
      current = 1 - current;
      float* y = inside(w.planes[current]);
      plane_convolution(w, b.shortcut, true, at.shortcut[0], x, all(b.shortcut.in_channels), y,
                        all(b.shortcut.out_channels), false, false, team);
    }
    Choice in = all(b.convolutions[0].in_channels);
    for (int64_t k = 0; k < b.num_convolutions; ++k) {
      // The last one adds to the shortcut, which is in its output's place.
      const bool last = k + 1 == b.num_convolutions;
      float* y = inside(last ? w.planes[current] : w.hidden_planes[k % 2]);
      plane_convolution(w, b.convolutions[k], last, at.convolutions[k], x, in, y, choice[k], last,
                        true, team);
      x = y;
      in = choice[k];
    }
  }

  // A stage's output for whoever wants it, from planes ...
  static void write_planes(const float* planes, int64_t pixels, int64_t plane, int64_t channels,
                           Progress& progress, Team team) {
    float* to = *progress.map++;
    if (to == nullptr) return;
    for (int64_t c = team.begin(channels); c < team.end(channels); ++c) {
      std::copy_n(planes + c * plane, pixels, to + c * pixels);
    }
  }

  // ... or from a map of pixels × channels.
  static void write_map(const Workspace& w, int64_t index, int64_t channels, Progress& progress,
                        Team team) {
    float* to = *progress.map++;
    if (to == nullptr) return;
    const Blocked x = w.map(index);
    const std::vector<int32_t>& position = w.layout->hidden[index].position;
    const int64_t pixels = position.size();
    for (int64_t c = team.begin(channels); c < team.end(channels); ++c) {
      const float* from = x.at(c);
      const int64_t step = x.step(c);
      for (int64_t p = 0; p < pixels; ++p) to[c * pixels + p] = from[position[p] * step];
    }
  }

  // A convolution, when the planes that it reads are there.
  static void plane_convolution(Workspace& w, const PackedConvolution& conv, bool grouped,
                                const PlaneShape& shape, const float* x, const Choice& in, float* y,
                                const Choice& out, bool add, bool rectify, Team team) {
    if (shape.copies()) {
      const int64_t plane = plane_size(shape.in_height * shape.in_width);
      float* copies = inside(w.copies);
      for (int64_t j = team.begin(in.number); j < team.end(in.number); ++j) {
        write_copies(shape, x + j * plane, copies + j * shape.in_plane());
      }
      team.wait();
      x = copies;
    }
    convolve(conv, grouped, shape, x, in, y, out, add, rectify, team);
    team.wait();
  }

  // The stem's output as planes.
  void stem_planes(Workspace& w, Team team) const {
    const Map& map = w.layout->maps[0];
    const std::vector<int32_t>& position = w.layout->hidden[0].position;
    const Blocked x = w.map(0);
    const int64_t plane = plane_size(map.pixels()), vectors = plane / kLanes;
    const int64_t first = team.begin(vectors) * kLanes;
    const int64_t count = std::min(team.end(vectors) * kLanes, map.pixels()) - first;
    float* to = inside(w.planes[0]) + first;
    for (int64_t c = 0; c < net_.width; c += kLanes) {
      transpose_tile(x.at(c), x.step(c), position.data() + first, count, to + c * plane, plane,
                     net_.width - c);
    }
    team.wait();
  }

  // The chosen channels of a block's first convolution, into planes of the hidden map.
  static void first_convolution(Workspace& w, const PackedConvolution& conv, const BlockLayout& at,
                                const Choice& choice, Team team) {
    const int32_t* chosen = choice.channels;
    const float* scale = choice.scale;
    const int64_t number = choice.number;
    const Map& in = w.layout->maps[at.in_map];
    const Hidden& hidden = w.layout->hidden[at.out_map];
    const int64_t pixel_tiles = hidden.dots.size();
    const int64_t channel_tiles = ceil_div(number, kDotChannels);
    const int64_t row_size = 9 * in.channels;
    const Team alone{0, 1};
    // A plane can be copied when all of its pixels are there.
    const Team by_pixel = hidden.copies ? alone : team, by_channel = hidden.copies ? team : alone;
    const int64_t first_band = by_pixel.begin(pixel_tiles), last_band = by_pixel.end(pixel_tiles);
    const int64_t first_tile = by_channel.begin(channel_tiles),
                  last_tile = by_channel.end(channel_tiles);
    const Blocked x = w.map(at.in_map);
    const auto tile_of = [&](int64_t m, int64_t band, int64_t band_end) {
      const int64_t first = number * m / channel_tiles;
      const int64_t channels = number * (m + 1) / channel_tiles - first;
      // The last rows of the next tile, which are needed then, or again.
      const int64_t next = number * std::min(m + 2, channel_tiles) / channel_tiles - channels;
      DotProduct product{};
      product.stride = in.width + 2;
      float scales[kDotChannels];
      product.scale = scale == nullptr ? nullptr : scales;
      const Weight* rows[kDotChannels];
      const Weight* next_rows[kDotChannels];
      for (int64_t k = 0; k < channels; ++k) {
        const int64_t c = chosen[first + k];
        rows[k] = conv.weight + c * row_size;
        next_rows[k] = conv.weight + chosen[next + k] * row_size;
        product.bias[k] = conv.bias[c] + (choice.shift == nullptr ? 0.0f : choice.shift[c]);
        scales[k] = scale == nullptr ? 1.0f : scale[c];
        product.y[k] = hidden.copies ? w.scratch[team.rank].planes[at.out_map].data() +
                                           k * hidden.map.padded_pixels()
                                     : w.hidden[at.out_map].data() + (first + k) * hidden.plane;
      }
      for (int64_t c = 0; c < in.channels; c += Blocked::kBlock) {
        product.channels = x.step(c);
        product.x = x.at(c);
        product.first = c == 0;
        product.last = c + product.channels == in.channels;
        product.partial = w.scratch[team.rank].partial.data();
        for (int64_t k = 0; k < channels; ++k) product.weights[k] = rows[k] + 9 * c;
        int64_t fetched = 0;
        for (int64_t t = band; t < band_end; ++t) {
          const PixelTile& tile = hidden.dots[t];
          product.kernel = at.kernel[t];
          product.pixel = at.pixel.data() + tile.first;
          product.position = hidden.position.data() + tile.first;
          // Each row that is needed next is prefetched by one tile, evenly spread.
          product.ahead = nullptr;
          if (fetched < channels && (t - band) * channels >= fetched * (band_end - band)) {
            product.ahead =
                product.last ? next_rows[fetched] : rows[fetched] + 9 * (c + product.channels);
            ++fetched;
          }
          gated::run(product, channels, tile.count);
          product.partial += kDotChannels * kDotPixels * kLanes;
        }
      }
      if (!hidden.copies || band_end != last_band) return;
      for (int64_t k = 0; k < channels; ++k) {
        copy_shifted(hidden, product.y[k],
                     w.hidden[at.out_map].data() + (first + k) * hidden.plane);
      }
    };
    // The larger of map and weights is read once.
    const bool band_outside = !hidden.copies && number * row_size < in.size();
    const int64_t bands = ceil_div(last_band - first_band, kBandTiles);
    const auto begin_of = [&](int64_t i) {
      return first_band + (last_band - first_band) * i / bands;
    };
    if (band_outside) {
      for (int64_t i = 0; i < bands; ++i)
        for (int64_t m = first_tile; m < last_tile; ++m) tile_of(m, begin_of(i), begin_of(i + 1));
    } else {
      for (int64_t m = first_tile; m < last_tile; ++m)
        for (int64_t i = 0; i < bands; ++i) tile_of(m, begin_of(i), begin_of(i + 1));
    }
  }

  // One copy of a hidden channel for each column of the kernel, shifted accordingly.
  static void copy_shifted(const Hidden& hidden, const float* plane, float* to) {
    const int64_t width = hidden.map.width, stride = width + 2;
    for (int64_t shift = 0; shift < 3; ++shift) {
      for (int64_t y = 0; y < hidden.map.height + 2; ++y, to += width) {
        const float* from = plane + y * stride + shift;
        // Whole vectors: what is too much, the next row overwrites.
        for (int64_t x = 0; x < width; x += kLanes) store(to + x, load(from + x));
      }
    }
  }

  // A convolution as outer products with the chosen rows of its weights.
  struct Outer {
    const float* x;         // of the hidden map, or ...
    int64_t tile_size = 0;  // ... so many numbers for each tile
    int64_t plane = 0;      // from one row's input to the next one's
    const int32_t* taps;
    int64_t num_taps;
    const int32_t* rows;  // the chosen ones
    int64_t num_rows;
    int64_t all_rows;  // in the weights
    const Weight* weights;
    const float* bias;
  };

  // The sum of convolutions, rectified; with a single one, the shortcut is what is in the map.
  //
  // Rows come in pieces whose weights fit into the innermost cache, where all tiles find them;
  // while a piece is computed, its tiles prefetch the next one's weights, each tile a share.
  static void outer(const Outer* terms, int num_terms, const Hidden& hidden, const Blocked& to,
                    Team team) {
    const int64_t groups = ceil_div(to.channels, kOuterVectors * kLanes);
    const int64_t number = hidden.tiles.size();
    const Team alone{0, 1};
    const bool many = number >= 4 * team.size;
    const Team by_pixel = many ? team : alone, by_channel = many ? alone : team;
    const int64_t first_tile = by_pixel.begin(number), last_tile = by_pixel.end(number);
    const int64_t last_group = by_channel.end(groups);
    for (int64_t g = by_channel.begin(groups); g < last_group; ++g) {
      const int64_t c = g * kOuterVectors * kLanes;
      const int64_t vectors = std::min<int64_t>(kOuterVectors, (to.channels - c) / kLanes);
      OuterProduct product{};
      product.channels = to.step(c);
      product.y = to.at(c);
      for (int i = 0; i < num_terms; ++i) {
        const Outer& term = terms[i];
        const int64_t row_size = term.num_taps * vectors * kLanes;
        const int64_t share = row_size / std::max<int64_t>(1, last_tile - first_tile);
        const int64_t pieces =
            std::max<int64_t>(1, ceil_div(term.num_rows * term.num_taps, kMostTaps));
        const auto begin_of = [&](int64_t piece) { return term.num_rows * piece / pieces; };
        const Weight* weights = term.weights + term.all_rows * term.num_taps * c;
        product.weights = weights;
        product.row_size = row_size;
        product.plane = term.plane;
        product.taps = term.taps;
        product.num_taps = term.num_taps;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const bool last = piece + 1 == pieces;
          const int64_t row = begin_of(piece);
          product.rows = term.rows + row;
          product.num_rows = begin_of(piece + 1) - row;
          product.bias = piece == 0 ? term.bias + c : kZeros;
          product.add = piece > 0 || i > 0 || num_terms == 1;
          product.rectify = last && i + 1 == num_terms;
          const Weight* ahead = weights;
          const bool more = !last || g + 1 < last_group;
          if (last && more) ahead += term.all_rows * row_size;
          // The next piece may be longer by one row, which is not prefetched, but not shorter.
          product.ahead_rows =
              last ? term.rows
                   : term.rows + std::min(begin_of(piece + 1), term.num_rows - product.num_rows);
          product.ahead_step = more ? ceil_div(share, term.num_taps) : 0;
          for (int64_t t = first_tile; t < last_tile; ++t) {
            const int64_t offset = term.tile_size > 0 ? t * term.tile_size : hidden.tiles[t].offset;
            product.x = term.x + offset + row * term.plane;
            if (term.tile_size == 0) {
              const KernelRows& kernel = hidden.tiles[t].kernel;
              product.taps = term.taps + 3 * kernel.first;
              product.num_taps = 3 * kernel.count;
              product.weights = weights + 3 * kernel.first * vectors * kLanes;
            }
            product.position = hidden.position.data() + hidden.tiles[t].first;
            product.ahead = more ? ahead + share * (t - first_tile) : weights;
            gated::run(product, vectors, hidden.tiles[t].count);
          }
        }
      }
    }
  }

  // The mean over the last map, and the classifier if there is one.
  void head(Workspace& w, const float* planes, float* features, Team team) const {
    const int64_t channels = net_.blocks.back().last().out_channels;
    if (planes != nullptr) {
      pool_planes(planes, w.layout->last_pixels, channels, w.pooled.data(), team);
    } else {
      pool(w.layout->maps.back(), w.map(w.maps.size() - 1), w.pooled.data(), team);
    }
    team.wait();
    if (team.rank != 0) return;
    if (net_.linear == nullptr) {
      std::copy_n(w.pooled.data(), net_.features, features);
      return;
    }
    const int64_t size = padded_to_partials(channels);
    for (int64_t k = 0; k < net_.features; ++k) {
      features[k] = dot(w.pooled.data(), net_.linear + k * size, size) + net_.linear_bias[k];
    }
  }

  Network shape_;
  Arena arena_;
  PackedNetwork net_;
  std::vector<int32_t> all_;
};

}  // namespace
}  // namespace gated

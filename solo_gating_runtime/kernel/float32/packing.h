// Weights in the order in which they are read.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../gates.h"
#include "../memory.h"
#include "../network.h"
#include "../simd.h"
#include "layout.h"
#include "tiles.h"

namespace gated {

inline void assign(float& to, float value) { to = value; }

inline void assign(Bfloat16& to, float value) { to.upper = to_bfloat16(value); }

// A convolution's weights, in one of four orders, in which channels are padded with zeros to a
// multiple of kLanes in the first two only:
//
//   packed   cut into groups of kOuterVectors vectors of output channels, each group being input
//            channels × kernel elements × its output channels; the last group may be narrower
//   blocked  output channel × block of kBlock input channels × kernel elements × its channels
//   grouped  cut evenly into groups of up to kPlaneChannels output channels, each as in packed
//   plain    output channel × input channel × kernel elements
enum class Order { kPacked, kBlocked, kGrouped, kPlain };

class Packing {
 public:
  explicit Packing(Arena& arena) : arena_(arena) {}

  const Weight* weights(const Convolution& conv, Order order) const {
    switch (order) {
      case Order::kPacked:
        return packed(conv);
      case Order::kBlocked:
        return blocked(conv);
      case Order::kGrouped:
        return grouped(conv);
      default:
        return plain(conv);
    }
  }

  // Padded to whole vectors.
  const float* floats(const float* from, int64_t count) const {
    return arena_.copy(from, count, padded_channels(count));
  }

 private:
  static int64_t row_size(const Convolution& conv) {
    return conv.in_channels * conv.kernel * conv.kernel;
  }

  const Weight* packed(const Convolution& conv) const {
    const int64_t rows = row_size(conv), out = padded_channels(conv.out_channels);
    return arena_.add<Weight>(out * rows, [&](Weight* to) {
      for (int64_t c = 0; c < out; c += kOuterVectors * kLanes) {
        const int64_t width = std::min<int64_t>(kOuterVectors * kLanes, out - c);
        transpose_group(conv, c, std::min(width, conv.out_channels - c), width, to);
        to += width * rows;
      }
    });
  }

  const Weight* grouped(const Convolution& conv) const {
    const int64_t rows = row_size(conv), out = conv.out_channels;
    return arena_.add<Weight>(out * rows, [&](Weight* to) {
      const int64_t groups = ceil_div(out, kPlaneChannels);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = out * g / groups, width = out * (g + 1) / groups - first;
        transpose_group(conv, first, width, width, to);
        to += width * rows;
      }
    });
  }

  // Rows of some output channels become columns.
  static void transpose_group(const Convolution& conv, int64_t first, int64_t channels,
                              int64_t width, Weight* to) {
    constexpr int64_t kPiece = 64;  // so much of all rows fits into the innermost cache
    const int64_t rows = row_size(conv);
    for (int64_t piece = 0; piece < rows; piece += kPiece) {
      const int64_t end = std::min(piece + kPiece, rows);
      for (int64_t c = 0; c < channels; ++c) {
        const float* from = conv.weight + (first + c) * rows;
        for (int64_t i = piece; i < end; ++i) assign(to[i * width + c], from[i]);
      }
    }
  }

  const Weight* blocked(const Convolution& conv) const {
    const int64_t taps = conv.kernel * conv.kernel, in = padded_channels(conv.in_channels);
    return arena_.add<Weight>(conv.out_channels * in * taps, [&](Weight* to) {
      const float* from = conv.weight;
      for (int64_t out = 0; out < conv.out_channels; ++out) {
        for (int64_t c = 0; c < in; c += Blocked::kBlock) {
          const int64_t width = std::min(Blocked::kBlock, in - c);
          const int64_t channels = std::min(width, conv.in_channels - c);
          for (int64_t i = 0; i < channels; ++i) {
            for (int64_t t = 0; t < taps; ++t) assign(to[t * width + i], *from++);
          }
          to += width * taps;
        }
      }
    });
  }

  const Weight* plain(const Convolution& conv) const {
    const int64_t size = conv.out_channels * row_size(conv);
    return arena_.add<Weight>(size, [&](Weight* to) {
      for (int64_t i = 0; i < size; ++i) assign(to[i], conv.weight[i]);
    });
  }

  Arena& arena_;
};

struct PackedConvolution {
  int64_t in_channels = 0, out_channels = 0, kernel = 0, stride = 0;
  const Weight* weight = nullptr;  // null where there is no such convolution
  const float* bias = nullptr;

  PackedConvolution() = default;
  PackedConvolution(const Convolution& conv, Order order, const Packing& packing)
      : in_channels(conv.in_channels),
        out_channels(conv.out_channels),
        kernel(conv.kernel),
        stride(conv.stride) {
    if (!conv.exists()) return;
    weight = packing.weights(conv, order);
    bias = packing.floats(conv.bias, out_channels);
  }
};

struct PackedBlock {
  int64_t num_convolutions = 0;
  PackedConvolution convolutions[kMostConvolutions];
  PackedConvolution shortcut;
  GateWeights gates[kMostConvolutions - 1];

  const PackedConvolution& last() const { return convolutions[num_convolutions - 1]; }
};

// Whether a block is two 3×3 convolutions, the second of stride 1.
inline bool is_basic(const Block& block) {
  const Convolution* conv = block.convolutions;
  return block.num_convolutions == 2 && conv[0].kernel == 3 && conv[1].kernel == 3 &&
         conv[1].stride == 1;
}

struct PackedNetwork {
  int64_t in_channels = 0;
  int64_t width = 0;                            // channels of the stem
  int64_t kernel = 0, stride = 0, padding = 0;  // of the stem
  bool max_pool = false;
  int64_t features = 0;
  // How blocks are computed: BasicBlocks with a blocked and a packed convolution and a packed
  // shortcut, or blocks of any convolutions, the last one and the shortcut grouped, the others
  // plain.
  bool in_planes = false;
  const Weight* stem = nullptr;  // packed
  const float* stem_bias = nullptr;
  const float* linear = nullptr;  // padded to whole partials; null without a classifier
  const float* linear_bias = nullptr;
  std::vector<PackedBlock> blocks;

  PackedNetwork() = default;
  PackedNetwork(const Network& net, Arena& arena)
      : in_channels(net.stem.in_channels),
        width(net.stem.out_channels),
        kernel(net.stem.kernel),
        stride(net.stem.stride),
        padding(net.stem.padding),
        max_pool(net.max_pool),
        features(net.features),
        in_planes(!std::all_of(net.blocks.begin(), net.blocks.end(), is_basic)) {
    const Packing packing(arena);
    stem = packing.weights(net.stem, Order::kPacked);
    stem_bias = packing.floats(net.stem.bias, width);
    const Order few = in_planes ? Order::kPlain : Order::kBlocked;
    const Order all = in_planes ? Order::kGrouped : Order::kPacked;
    for (const Block& block : net.blocks) {
      PackedBlock packed;
      packed.num_convolutions = block.num_convolutions;
      for (int64_t i = 0; i < block.num_convolutions; ++i) {
        const bool last = i + 1 == block.num_convolutions;
        packed.convolutions[i] = {block.convolutions[i], last ? all : few, packing};
      }
      packed.shortcut = {block.shortcut, all, packing};
      for (int64_t g = 0; g < block.num_gates; ++g) {
        packed.gates[g] = GateWeights(block.gates[g], block.first().in_channels,
                                      block.convolutions[g].out_channels, arena);
      }
      blocks.push_back(packed);
    }
    if (net.linear == nullptr) return;
    const int64_t channels = blocks.back().last().out_channels;
    const int64_t padded = padded_to_partials(channels);
    linear = arena.add<float>(features * padded, [&](float* to) {
      for (int64_t k = 0; k < features; ++k) {
        std::copy_n(net.linear + k * channels, channels, to + k * padded);
      }
    });
    linear_bias = packing.floats(net.linear_bias, features);
  }
};

}  // namespace gated

// What Python hands over: the folded network's shape and its packed weights.
//
// `pack.py` mirrors these structures field by field.

#pragma once

#include <cstdint>

#include "simd.h"

namespace gated {

constexpr int kMostConvolutions = 3;  // of a block

// The order of the weights is one of four, in which channels are padded with zeros to a multiple of
// kLanes in the first two only:
//
//   packed   cut into groups of kOuterVectors vectors of output channels, each group being input
//            channels × kernel elements × its output channels; the last group may be narrower
//   blocked  output channel × block of kBlock input channels × kernel elements × its channels
//   grouped  cut evenly into groups of up to kPlaneChannels output channels, each as in packed
//   plain    output channel × input channel × kernel elements
struct Convolution {
  int64_t in_channels;
  int64_t out_channels;
  int64_t kernel;  // 1 or 3
  int64_t stride;
  const Weight* weight;  // null where there is no such convolution
  const float* bias;
};

struct Gate {
  int64_t channels;     // of its hidden layer; 0 without one
  const float* reduce;  // channel of the gate × input channel
  const float* bias;
  const float* expand;  // channel of the gate × channel that it chooses
};

// A residual block with a gate between each two convolutions.
struct Block {
  int64_t num_convolutions;
  Convolution convolutions[kMostConvolutions];
  Convolution shortcut;  // without weights where it is the identity
  Gate gates[kMostConvolutions - 1];

  const Convolution& last() const { return convolutions[num_convolutions - 1]; }
};

struct Network {
  int64_t in_channels;
  int64_t width;                    // channels of the stem
  int64_t kernel, stride, padding;  // of the stem
  int64_t max_pool;                 // whether a 3×3 max-pool of stride 2 follows it
  int64_t features;
  int64_t in_planes;  // how blocks are computed: 0 for BasicBlocks with a blocked and a packed
                      // convolution and a packed shortcut; 1 for blocks of any convolutions, the
                      // last one and the shortcut grouped, the others plain
  int64_t num_blocks;
  const Weight* stem;  // packed
  const float* stem_bias;
  const float* linear;  // feature × channel of the last block; null without a classifier
  const float* linear_bias;
  const Block* blocks;
};

}  // namespace gated

// What Python hands over: the folded network's shape and its packed weights.
//
// `pack.py` mirrors these structures field by field.

#pragma once

#include <cstdint>

#include "simd.h"

namespace gated {

// A BasicBlock. Channels in weights are padded with zeros to a multiple of kLanes. "Packed" means
// cut into groups of kOuterVectors vectors of output channels, each group being input channels ×
// kernel elements × its output channels; the last group may be narrower.
struct Block {
  int64_t in_channels;
  int64_t hidden_channels;  // that conv1 gives, and the gate chooses from
  int64_t out_channels;
  int64_t stride;
  int64_t gate_channels;  // of the gate's hidden layer; 0 without a gate
  const Weight* conv1;    // hidden channel × block of kBlock input channels × 9 × its channels
  const float* bias1;
  const Weight* conv2;  // packed
  const float* bias2;
  const Weight* shortcut;  // packed; null where the shortcut is the identity
  const float* shortcut_bias;
  const float* gate_reduce;  // channel of the gate × input channel
  const float* gate_bias;
  const float* gate_expand;  // channel of the gate × hidden channel
};

struct Network {
  int64_t in_channels;
  int64_t width;                    // channels of the stem
  int64_t kernel, stride, padding;  // of the stem
  int64_t max_pool;                 // whether a 3×3 max-pool of stride 2 follows it
  int64_t features;
  int64_t num_blocks;
  const Weight* stem;  // packed
  const float* stem_bias;
  const float* linear;  // feature × channel of the last block; null without a classifier
  const float* linear_bias;
  const Block* blocks;
};

}  // namespace gated

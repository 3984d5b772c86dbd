// Which channels an image computes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "float32/layout.h"
#include "network.h"
#include "simd.h"

namespace gated {

// What the gates go by; pointers move on from gate to gate.
struct Decisions {
  const float* thresholds;  // of each channel's logit; null to compute all channels
  const int64_t* counts;    // how many channels each gate chooses, or -1 for those that reach
                            // their thresholds; null where no gate has a count
};

// The channels that are computed.
struct Choice {
  const int32_t* channels;  // ascending
  int64_t number;
  const float* scale;  // what channel c is multiplied by; null for 1
};

// Some of the largest logits; of equal ones those that come first. NaN is the largest, as
// PyTorch sorts it.
inline int64_t choose_largest(const float* logits, int64_t channels, int64_t count,
                              int32_t* chosen) {
  for (int64_t c = 0; c < channels; ++c) chosen[c] = c;
  const auto larger = [&](int32_t a, int32_t b) {
    const float x = logits[a], y = logits[b];
    const bool x_nan = x != x, y_nan = y != y;
    if (x_nan != y_nan) return x_nan;
    return x_nan || x == y ? a < b : x > y;
  };
  if (count < channels) std::nth_element(chosen, chosen + count, chosen + channels, larger);
  std::sort(chosen, chosen + count);
  return count;
}

// Which of so many channels a gate chooses; returns their number.
//
// `pooled` are the means of the block's input, padded with zeros; `logits` is room for all of them.
inline int64_t choose(const Gate& gate, int64_t in_channels, int64_t channels, const float* pooled,
                      const Decisions& decisions, float* logits, int32_t* chosen) {
  const int64_t in = padded_channels(in_channels), out = padded_channels(channels);
  std::fill_n(logits, out, 0.0f);
  for (int64_t k = 0; k < gate.channels; ++k) {
    Vec sum{};
    for (int64_t c = 0; c < in; c += kLanes) {
      sum += load(pooled + c) * load(gate.reduce + k * in + c);
    }
    float hidden = sums<1>(&sum)[0] + gate.bias[k];
    if (hidden <= 0.0f) continue;
    for (int64_t c = 0; c < out; c += kLanes) {
      store(logits + c, load(logits + c) + broadcast(hidden) * load(gate.expand + k * out + c));
    }
  }
  const float* thresholds = decisions.thresholds;
  if (decisions.counts != nullptr && *decisions.counts >= 0) {
    for (int64_t c = 0; c < channels; ++c) logits[c] -= thresholds[c];
    return choose_largest(logits, channels, std::min(*decisions.counts, channels), chosen);
  }
  int64_t number = 0;
  for (int64_t c = 0; c < channels; ++c) {
    if (logits[c] >= thresholds[c]) chosen[number++] = c;
  }
  return number;
}

}  // namespace gated

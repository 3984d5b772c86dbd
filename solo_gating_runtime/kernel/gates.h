// Which channels an image computes.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "network.h"
#include "simd.h"

namespace gated {

// What the gates go by; pointers move on from gate to gate.
struct Decisions {
  const float* thresholds;  // of each channel's logit; null to compute all channels
  const int64_t* counts;    // how many channels each gate chooses, or -1 for those that reach
                            // their thresholds
};

// The channels that are computed, y: relu(y + shift) · scale.
struct Choice {
  const int32_t* channels;  // ascending
  int64_t number;
  const float* scale = nullptr;  // of channel c; null for 1
  const float* shift = nullptr;  // null for 0
};

// What a setting of the dial means for each gate.
class Dial {
 public:
  explicit Dial(const Network& net) {
    for (const Block& block : net.blocks) {
      for (int64_t g = 0; g < block.num_gates; ++g) {
        gates_.emplace_back(block.gates[g], block.convolutions[g].out_channels);
      }
    }
  }

  int64_t gates() const { return gates_.size(); }

  // Thresholds of all channels and counts of all gates.
  //
  // A budget that is not told is kNone; with a count logits are compared with each other, and
  // shifts are no thresholds.
  void decide(double threshold, double budget, float* thresholds, int64_t* counts) const {
    for (const Shifts& gate : gates_) {
      *counts = gate.number(budget);
      const std::vector<double> shifts = gate.at(budget);
      const double bar = *counts++ < 0 ? threshold : 0.0;
      for (const double shift : shifts) *thresholds++ = static_cast<float>(bar - shift);
    }
  }

 private:
  struct Shifts {
    int64_t count;
    std::vector<float> shift, weight, bias, expand;

    Shifts(const Gate& gate, int64_t channels)
        : count(gate.count),
          shift(channels),
          weight(gate.embedding_weight, gate.embedding_weight + gate.embedding),
          bias(gate.embedding_bias, gate.embedding_bias + gate.embedding),
          expand(gate.embedding_expand, gate.embedding_expand + channels * gate.embedding) {
      if (gate.shift != nullptr) std::copy_n(gate.shift, channels, shift.begin());
    }

    int64_t number(double budget) const {
      if (count != kByBudget && count != kBoosting) return count;
      // 0.3 · 10 may come out as 3.0000001; that is no reason for a fourth channel.
      constexpr double kRounding = 1e-3;
      const int64_t channels = shift.size();
      if (!(budget < 1.0)) return channels;
      return std::clamp<int64_t>(std::ceil(budget * channels - kRounding), 1, channels);
    }

    std::vector<double> at(double budget) const {
      std::vector<double> result(shift.begin(), shift.end());
      if (weight.empty() || std::isnan(budget)) return result;
      const double kept = std::clamp(budget, 0.01, 0.99), log_odds = std::log(kept / (1 - kept));
      for (size_t k = 0; k < weight.size(); ++k) {
        const double unit = std::max(weight[k] * log_odds + bias[k], 0.0);
        for (size_t c = 0; c < result.size(); ++c)
          result[c] += expand[c * weight.size() + k] * unit;
      }
      return result;
    }
  };

  std::vector<Shifts> gates_;
};

// Sums over channels are made of so many partial sums, the i-th over channels i, i + 16, ...: the
// same ones in the same order on every CPU. Rows that are summed over are padded with zeros.
constexpr int64_t kPartials = 16;

inline int64_t padded_to_partials(int64_t channels) {
  return ceil_div(channels, kPartials) * kPartials;
}

// The last step: partial sums i and i + 8 are added, then i and i + 4, i and i + 2, i and i + 1.
template <size_t Bit = kLanes / 2>
inline float folded(Vec sum) {
  if constexpr (Bit == 0) {
    return sum[0];
  } else {
    return folded<Bit / 2>(fold<Bit>(sum, Lanes{}));
  }
}

// Σ_c x[c] · rows[r · size + c] for so many rows.
template <int Rows>
inline void dots(const float* x, const float* rows, int64_t size, float* results) {
  constexpr int kVectors = kPartials / kLanes;
  Vec sum[Rows][kVectors] = {};
  for (int64_t c = 0; c < size; c += kPartials) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vec value = load(x + c + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[r][v] += value * load(rows + r * size + c + v * kLanes);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int half = kVectors / 2; half > 0; half /= 2) {
      for (int v = 0; v < half; ++v) sum[r][v] += sum[r][v + half];
    }
    results[r] = folded(sum[r][0]);
  }
}

inline float dot(const float* x, const float* row, int64_t size) {
  float result;
  dots<1>(x, row, size, &result);
  return result;
}

// A gate's weights as they are read; input and output channels are padded.
struct GateWeights {
  int64_t hidden = 0, in = 0, out = 0;
  const float* reduce = nullptr;  // hidden × in
  const float* bias = nullptr;
  const float* expand = nullptr;  // hidden × out; null if the gate boosts
  const float* beta = nullptr;    // of one that does, else null

  // Of reduce and expand, which lie one behind the other.
  int64_t size() const { return hidden * (in + (expand == nullptr ? 0 : out)); }

  GateWeights() = default;
  GateWeights(const Gate& gate, int64_t in_channels, int64_t channels, Arena& arena)
      : hidden(gate.hidden),
        in(padded_to_partials(in_channels)),
        out(padded_to_partials(channels)) {
    reduce = arena.add<float>(hidden * in, [&](float* to) {
      for (int64_t k = 0; k < hidden; ++k) {
        std::copy_n(gate.reduce + k * in_channels, in_channels, to + k * in);
      }
    });
    bias = arena.copy(gate.bias, hidden, hidden);
    if (gate.boosts()) {
      beta = arena.copy(gate.beta, channels, channels);
      return;
    }
    expand = arena.add<float>(hidden * out, [&](float* to) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t k = 0; k < hidden; ++k) to[k * out + c] = gate.expand[c * hidden + k];
      }
    });
  }
};

// Puts channels with so many of the largest logits first; of equal ones those with lower numbers.
// NaN is the largest, as PyTorch sorts it.
inline void largest_first(const float* logits, int64_t channels, int64_t count, int32_t* chosen) {
  for (int64_t c = 0; c < channels; ++c) chosen[c] = c;
  const auto larger = [&](int32_t a, int32_t b) {
    const float x = logits[a], y = logits[b];
    const bool x_nan = x != x, y_nan = y != y;
    if (x_nan != y_nan) return x_nan;
    return x_nan || x == y ? a < b : x > y;
  };
  if (count < channels) std::nth_element(chosen, chosen + count, chosen + channels, larger);
}

inline int64_t choose_largest(const float* logits, int64_t channels, int64_t count,
                              int32_t* chosen) {
  largest_first(logits, channels, count, chosen);
  std::sort(chosen, chosen + count);
  return count;
}

// The channels whose scores exceed the (count + 1)-th largest, or all of them: of equal ones at the
// border none, and no NaN.
inline int64_t choose_above(const float* scores, int64_t channels, int64_t count, int32_t* chosen) {
  largest_first(scores, channels, count, chosen);
  if (count >= channels) return channels;
  const float border = scores[chosen[count]];
  int64_t number = 0;
  for (int64_t c = 0; c < channels; ++c) {
    if (scores[c] > border) chosen[number++] = c;
  }
  return number;
}

// Which of so many channels a gate chooses; returns their number.
//
// `means` are those of the block's input, padded with zeros; `logits` is room for all of them,
// padded, or for a boosting gate's scores.
inline int64_t choose(const GateWeights& gate, int64_t channels, const float* means,
                      const Decisions& decisions, float* logits, int32_t* chosen) {
  constexpr int kTogether = kLanes == 4 ? 2 : 4;  // as registers allow
  // Longer rows come from memory, which is quickest one number after another.
  constexpr int64_t kLongRow = 1024;
  std::fill_n(logits, gate.out, 0.0f);
  for (int64_t k = 0; k < gate.hidden; k += kTogether) {
    float sum[kTogether];
    const int64_t number = std::min<int64_t>(kTogether, gate.hidden - k);
    const float* rows = gate.reduce + k * gate.in;
    if (number == kTogether && gate.in < kLongRow) {
      dots<kTogether>(means, rows, gate.in, sum);
    } else {
      for (int64_t i = 0; i < number; ++i) sum[i] = dot(means, rows + i * gate.in, gate.in);
    }
    for (int64_t i = 0; i < number; ++i) {
      const float hidden = sum[i] + gate.bias[k + i];
      if (gate.beta != nullptr) {
        logits[k + i] = hidden <= 0.0f ? 0.0f : hidden;  // NaN stays
        continue;
      }
      if (hidden <= 0.0f) continue;
      const float* expand = gate.expand + (k + i) * gate.out;
      for (int64_t c = 0; c < gate.out; c += kLanes) {
        store(logits + c, load(logits + c) + broadcast(hidden) * load(expand + c));
      }
    }
  }
  if (gate.beta != nullptr) {
    return choose_above(logits, channels, std::max<int64_t>(*decisions.counts, 0), chosen);
  }
  const float* thresholds = decisions.thresholds;
  if (*decisions.counts >= 0) {
    for (int64_t c = 0; c < channels; ++c) logits[c] -= thresholds[c];
    return choose_largest(logits, channels, std::min(*decisions.counts, channels), chosen);
  }
  int64_t number = 0;
  for (int64_t c = 0; c < channels; ++c) {
    if (logits[c] >= thresholds[c]) chosen[number++] = c;
  }
  return number;
}

// Scores s of a boosting gate as a choice's scale and shift: relu(s · y + β) = s · relu(y + β / s).
// Those below kLeast, 0 among them, count as it, which leaves β.
inline void boost(const float* beta, int64_t channels, float* scores, float* shifts) {
  constexpr float kLeast = 1e-20f;
  for (int64_t c = 0; c < channels; ++c) {
    if (scores[c] < kLeast) scores[c] = kLeast;  // NaN stays
    shifts[c] = beta[c] / scores[c];
  }
}

// An image's mask as bytes.
inline void write_mask(const int32_t* chosen, int64_t number, int64_t channels, uint8_t* mask) {
  std::fill_n(mask, channels, 0);
  for (int64_t j = 0; j < number; ++j) mask[chosen[j]] = 1;
}

}  // namespace gated

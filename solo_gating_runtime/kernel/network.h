// What a file says: one path of an encoder, with weights in PyTorch's order.
//
// `network.py` mirrors these structures and says what they compute. Every engine packs the weights
// as it wants them when it is opened.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace gated {

constexpr int kMostConvolutions = 3;  // of a block
constexpr int kMostStages = 8;

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

struct Convolution {
  int64_t in_channels = 0, out_channels = 0, kernel = 0, stride = 0, padding = 0;
  const float* weight = nullptr;      // C_out × C_in × k × k; null where weights are int8
  const int8_t* quantised = nullptr;  // the same; null where weights are float32
  const float* scale = nullptr;       // of int8 weights, for each output channel
  const float* bias = nullptr;        // C_out

  // Whether there is one: the identity is no convolution.
  bool exists() const { return out_channels > 0; }

  // Rows or columns of its output.
  int64_t out_size(int64_t in_size) const { return (in_size + 2 * padding - kernel) / stride + 1; }
};

// A gate's `count` that is none, or follows the budget; the latter also of a gate that boosts.
constexpr int64_t kByThreshold = -1;
constexpr int64_t kByBudget = -2;
constexpr int64_t kBoosting = -3;

struct Gate {
  int64_t hidden = 0;                       // 0: logits = shift; C_out for a gate that boosts
  const float* reduce = nullptr;            // hidden × C_in of the block's first convolution
  const float* bias = nullptr;              // hidden
  const float* expand = nullptr;            // C_out × hidden
  const float* shift = nullptr;             // C_out
  int64_t embedding = 0;                    // hidden units of the budget's; 0 without one
  const float* embedding_weight = nullptr;  // embedding
  const float* embedding_bias = nullptr;    // embedding
  const float* embedding_expand = nullptr;  // C_out × embedding
  int64_t count = kByThreshold;             // or kByBudget, kBoosting or a number of channels
  const float* beta = nullptr;  // C_out, of a gate that boosts: it has no expand or shift

  bool boosts() const { return count == kBoosting; }
};

// A residual block with a gate between each two convolutions.
struct Block {
  int64_t num_convolutions = 0;
  Convolution convolutions[kMostConvolutions];
  Convolution shortcut;
  int64_t num_gates = 0;  // 0 on the dense path, else num_convolutions - 1
  Gate gates[kMostConvolutions - 1];
  float scales[kMostConvolutions] = {};  // int8: of the maps after each convolution

  const Convolution& first() const { return convolutions[0]; }
  const Convolution& last() const { return convolutions[num_convolutions - 1]; }

  int64_t stride() const {
    int64_t product = 1;
    for (int64_t i = 0; i < num_convolutions; ++i) product *= convolutions[i].stride;
    return product;
  }
};

enum class Type : int64_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

struct MapShape {
  int64_t channels, height, width;
};

struct Network {
  Type type = Type::kFloat32;
  bool gated = false;
  int64_t dial = 0;                                      // 0: none, 1: threshold, 2: budget
  double lowest_budget = kNone, highest_budget = kNone;  // none for gates that are told none
  double threshold = 0.0, budget = kNone;                // until others are set
  Convolution stem;
  bool max_pool = false;  // whether a 3×3 max-pool of stride 2 follows the stem
  std::vector<Block> blocks;
  std::vector<int64_t> stages;  // number of blocks in each
  int64_t features = 0;
  const float* linear =
      nullptr;  // features × channels of the last block; null without a classifier
  const float* linear_bias = nullptr;
  float image_scale = 0, stem_scale = 0;  // int8

  // Whether gates can be told this; NaN for those that are told nothing.
  bool can_be_told(double budget) const {
    if (std::isnan(lowest_budget)) return std::isnan(budget);
    return lowest_budget <= budget && budget <= highest_budget;
  }

  // Of all gates, or where they would be: length of an image's mask.
  int64_t channels() const {
    int64_t sum = 0;
    for (const Block& block : blocks) {
      for (int64_t i = 0; i + 1 < block.num_convolutions; ++i) {
        sum += block.convolutions[i].out_channels;
      }
    }
    return sum;
  }

  int64_t gates() const {
    int64_t sum = 0;
    for (const Block& block : blocks) sum += block.num_gates;
    return sum;
  }

  // The height and width that images need.
  int64_t smallest_image() const {
    const int64_t least = stem.kernel - 2 * stem.padding;
    return least > 1 ? least : 1;
  }

  // After the stem and its max-pool.
  int64_t stem_size(int64_t in_size) const {
    const int64_t size = stem.out_size(in_size);
    return max_pool ? (size - 1) / 2 + 1 : size;
  }

  // The output of each stage, for an image of this size.
  std::vector<MapShape> maps(int64_t height, int64_t width) const {
    height = stem_size(height);
    width = stem_size(width);
    std::vector<MapShape> shapes;
    auto block = blocks.begin();
    for (const int64_t number : stages) {
      int64_t channels = 0;
      for (int64_t i = 0; i < number; ++i, ++block) {
        height = (height - 1) / block->stride() + 1;
        width = (width - 1) / block->stride() + 1;
        channels = block->last().out_channels;
      }
      shapes.push_back({channels, height, width});
    }
    return shapes;
  }
};

}  // namespace gated

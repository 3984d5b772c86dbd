// Reads the bytes of an .sgx file. `file.py` writes them, and says what they mean.
//
// Whatever the bytes are, they are either a network that engines can run, or refused.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "network.h"

namespace gated {

constexpr int64_t kVersion = 3;  // the newest that is read, back to the first
constexpr char kMagic[] = "\x89SGX\r\n\x1a\n";
constexpr int64_t kWord = 8;
constexpr int64_t kSealed = 4 * kWord;  // magic, version, size, checksum: what follows is summed

// One sentence that says why bytes are no network.
class FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void require(bool accepted, const char* message) {
  if (!accepted) throw FileError(message);
}

// Σ_i (2 i + 1) · word_i, modulo 2^64: any change of a single word changes it.
inline uint64_t checksum(const char* bytes, int64_t size) {
  uint64_t sum = 0, factor = 1;
  for (int64_t i = 0; i < size; i += kWord, factor += 2) {
    uint64_t word;
    std::memcpy(&word, bytes + i, sizeof word);
    sum += factor * word;
  }
  return sum;
}

class Reader {
 public:
  // Bytes on a word's boundary. They and the reader outlive the network, which points to them.
  Reader(const char* bytes, int64_t size) : bytes_(bytes), size_(size) {}

  Network network() {
    open();
    Network net;
    const int64_t type = word();
    require(0 <= type && type <= 2, kDamaged);
    net.type = static_cast<Type>(type);
    net.gated = flag();
    net.dial = word();
    require(0 <= net.dial && net.dial <= 2, kDamaged);
    net.lowest_budget = number();
    net.highest_budget = number();
    net.threshold = number();
    net.budget = number();
    net.image_scale = static_cast<float>(number());
    net.stem_scale = static_cast<float>(number());
    net.max_pool = flag();
    const int64_t stages = word();
    require(1 <= stages && stages <= kMostStages, kUnknown);
    int64_t blocks = 0;
    for (int64_t i = 0; i < stages; ++i) {
      net.stages.push_back(word());
      require(1 <= net.stages.back() && net.stages.back() <= words_left(), kDamaged);
      blocks += net.stages.back();
    }
    net.stem = convolution();
    for (int64_t i = 0; i < blocks; ++i) net.blocks.push_back(block(net));
    const Convolution& last = net.blocks.back().last();
    net.features = word();
    if (net.features > 0) {
      net.linear = array<float>({net.features, last.out_channels});
      net.linear_bias = array<float>({net.features});
    } else {
      require(net.features == 0, kDamaged);
      net.features = last.out_channels;
    }
    require(words_left() == 0 && place_ == size_, kDamaged);
    check(net);
    return net;
  }

 private:
  static constexpr char kDamaged[] = "got a damaged file, expected one as it was saved";
  static constexpr char kUnknown[] =
      "got a network that this version does not run, expected ResNets with blocks of 2 or 3 "
      "convolutions, 1×1 or 3×3";

  void open() {
    require(size_ >= static_cast<int64_t>(sizeof kMagic) - 1 &&
                std::memcmp(bytes_, kMagic, sizeof kMagic - 1) == 0,
            "got another kind of file, expected an encoder that was saved as .sgx");
    require(size_ >= kSealed + kWord, kShort);
    words_ = kWord;
    words_end_ = kSealed + kWord;
    version_ = word();
    if (version_ < 1 || version_ > kVersion) {
      throw FileError("got a file of version " + std::to_string(version_) + ", expected 1 to " +
                      std::to_string(kVersion));
    }
    require(word() <= size_, kShort);
    words_ -= kWord;
    require(word() == size_ && size_ % kWord == 0, kDamaged);
    const auto sum = static_cast<uint64_t>(word());
    require(sum == checksum(bytes_ + kSealed, size_ - kSealed), kDamaged);
    const int64_t words = word();
    require(0 <= words && words <= (size_ - words_) / kWord, kDamaged);
    words_end_ = words_ + words * kWord;
    place_ = ceil_div(words_end_, kCacheLine) * kCacheLine;
    require(place_ <= size_, kDamaged);
  }

  static constexpr char kShort[] = "got only a part of a file, expected all of it";

  int64_t words_left() const { return (words_end_ - words_) / kWord; }

  int64_t word() {
    require(words_left() > 0, kDamaged);
    int64_t value;
    std::memcpy(&value, bytes_ + words_, sizeof value);
    words_ += kWord;
    return value;
  }

  double number() {
    const int64_t bits = word();
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  bool flag() {
    const int64_t value = word();
    require(value == 0 || value == 1, kDamaged);
    return value == 1;
  }

  // A dimension of an array.
  int64_t size(int64_t least = 1) {
    const int64_t value = word();
    require(least <= value && value <= size_, kDamaged);
    return value;
  }

  template <class T>
  const T* array(std::initializer_list<int64_t> shape) {
    int64_t count = 1;
    for (const int64_t side : shape) {
      require(side == 0 || count <= size_ / side, kDamaged);
      count *= side;
    }
    const auto* begin = reinterpret_cast<const T*>(bytes_ + place_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    require(bytes <= size_ - place_, kDamaged);
    place_ += ceil_div(bytes, kCacheLine) * kCacheLine;
    require(place_ <= size_, kDamaged);
    return begin;
  }

  Convolution convolution() {
    Convolution conv;
    conv.out_channels = size();
    conv.in_channels = size();
    conv.kernel = size();
    conv.stride = size();
    conv.padding = size(0);
    const int64_t stored = word();
    require(kStoredFloat32 <= stored && stored <= kStoredBfloat16, kDamaged);
    const auto shape = {conv.out_channels, conv.in_channels, conv.kernel, conv.kernel};
    if (stored == kStoredInt8) {
      conv.quantised = array<int8_t>(shape);
      conv.scale = array<float>({conv.out_channels});
    } else if (stored == kStoredBfloat16) {
      const auto* upper = array<uint16_t>(shape);
      conv.weight =
          widened(upper, conv.out_channels * conv.in_channels * conv.kernel * conv.kernel);
    } else {
      conv.weight = array<float>(shape);
    }
    conv.bias = array<float>({conv.out_channels});
    return conv;
  }

  // Numbers of which the file has the upper halves, as floats.
  const float* widened(const uint16_t* upper, int64_t count) {
    widened_.emplace_back(count);
    float* to = widened_.back().data();
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(upper[i]) << 16;
      std::memcpy(to + i, &bits, sizeof bits);
    }
    return to;
  }

  Block block(const Network& net) {
    Block block;
    block.num_convolutions = word();
    require(2 <= block.num_convolutions && block.num_convolutions <= kMostConvolutions, kUnknown);
    for (int64_t i = 0; i < block.num_convolutions; ++i) block.convolutions[i] = convolution();
    if (flag()) block.shortcut = convolution();
    block.num_gates = net.gated ? block.num_convolutions - 1 : 0;
    for (int64_t i = 0; i < block.num_gates; ++i) {
      block.gates[i] = gate(block.first().in_channels, block.convolutions[i].out_channels);
    }
    for (int64_t i = 0; net.type == Type::kInt8 && i < block.num_convolutions; ++i) {
      block.scales[i] = static_cast<float>(number());
    }
    return block;
  }

  Gate gate(int64_t in_channels, int64_t channels) {
    Gate gate;
    gate.hidden = size(0);
    gate.embedding = size(0);
    gate.count = word();
    require(gate.count >= (version_ < 3 ? kByBudget : kBoosting), kDamaged);
    gate.reduce = array<float>({gate.hidden, in_channels});
    gate.bias = array<float>({gate.hidden});
    if (gate.boosts()) {
      require(gate.hidden == channels && gate.embedding == 0, kDamaged);
      gate.beta = array<float>({channels});
      return gate;
    }
    gate.expand = array<float>({channels, gate.hidden});
    gate.shift = array<float>({channels});
    gate.embedding_weight = array<float>({gate.embedding});
    gate.embedding_bias = array<float>({gate.embedding});
    gate.embedding_expand = array<float>({channels, gate.embedding});
    return gate;
  }

  // Refuses a network that is none.
  static void check(const Network& net) {
    const bool told =
        net.lowest_budget > 0 && net.lowest_budget <= net.highest_budget && net.highest_budget <= 1;
    require(told || (std::isnan(net.lowest_budget) && std::isnan(net.highest_budget)), kDamaged);
    require(!std::isnan(net.threshold), kDamaged);
    require(net.can_be_told(net.budget), kDamaged);
    const bool is_int8 = net.type == Type::kInt8;
    if (is_int8) require(is_scale(net.image_scale) && is_scale(net.stem_scale), kDamaged);
    const Convolution& stem = net.stem;
    require(is_int8 || stem.quantised == nullptr, kUnknown);
    require(stem.kernel <= kMostKernel && stem.stride <= stem.kernel && stem.padding <= stem.kernel,
            kUnknown);
    int64_t channels = stem.out_channels;
    for (const Block& block : net.blocks) {
      const int64_t in_channels = channels;
      for (int64_t i = 0; i < block.num_convolutions; ++i) {
        const Convolution& conv = block.convolutions[i];
        require(is_of_block(conv) && (conv.quantised != nullptr) == is_int8, kUnknown);
        require(conv.in_channels == channels, kDamaged);
        require(!is_int8 || is_scale(block.scales[i]), kDamaged);
        channels = conv.out_channels;
      }
      const Convolution& shortcut = block.shortcut;
      if (shortcut.exists()) {
        require(shortcut.kernel == 1 && shortcut.padding == 0 &&
                    shortcut.stride == block.stride() && (shortcut.quantised != nullptr) == is_int8,
                kUnknown);
        require(shortcut.in_channels == in_channels && shortcut.out_channels == channels, kDamaged);
      } else {
        require(block.stride() == 1 && in_channels == channels, kUnknown);
      }
    }
  }

  // How a weight is stored.
  static constexpr int64_t kStoredFloat32 = 0, kStoredInt8 = 1, kStoredBfloat16 = 2;

  static constexpr int64_t kMostKernel = 64;  // of the stem
  static constexpr int64_t kMostStride = 8;

  static bool is_of_block(const Convolution& conv) {
    return (conv.kernel == 1 || conv.kernel == 3) && conv.padding == conv.kernel / 2 &&
           conv.stride <= kMostStride;
  }

  static bool is_scale(float value) { return value > 0 && std::isfinite(value); }

  const char* bytes_;
  int64_t size_;
  int64_t words_ = 0, words_end_ = 0;  // the next word of the description, and the end
  int64_t place_ = 0;                  // of the next array
  int64_t version_ = 0;
  std::vector<std::vector<float>> widened_;
};

}  // namespace gated

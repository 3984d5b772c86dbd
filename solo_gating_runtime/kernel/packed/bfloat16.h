// Maps and weights in bfloat16, sums in float32.
//
// x86: vdpbf16ps adds the product of the upper numbers to a sum, then that of the lower ones; each
// of the two results is rounded to the nearest, halves to even. (Products are exact, and cannot
// overflow.) What is below the least normal float, read or computed, is 0.
//
// aarch64: bfdot adds both products at once, and rounds to odd.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../simd.h"

namespace gated {

// The upper half of a float.
using Number = uint16_t;
using PackedWeight = uint16_t;

constexpr bool kIntegers = false;
using Sums = Vec;
typedef Number Numbers __attribute__((vector_size(kLanes * sizeof(Number))));

constexpr int kGroup = 2;
constexpr int kRow = kLanes * kGroup;  // numbers in a vector

// ------------------------------------------------------------------------------------------------
// sum + the products of each word's numbers

constexpr bool kBiased = false;

#if defined(__AVX512BF16__)
inline Sums dot(Sums sum, Words x, Words w) {
  return (Sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline Sums dot(Sums sum, Words x, Words w) {
  return (Sums)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)x, (bfloat16x8_t)w);
}
#else
#error "bfloat16 needs AVX512-BF16, or NEON's instructions for it"
#endif

inline Sums correct(Sums sum, Words) { return sum; }

// ------------------------------------------------------------------------------------------------
// Between numbers of a map and floats

inline float to_float(Number number) {
  const uint32_t bits = static_cast<uint32_t>(number) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Vec to_floats(Words upper_halves) {
  Vec value;
  std::memcpy(&value, &upper_halves, sizeof value);
  return value;
}

inline Vec scaled(Sums sums, Vec) { return sums; }

// One of the factors is 0 or 1, so that it does not matter how often there is rounding.
inline Vec add_product(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#else
  return sum + a * b;
#endif
}

// The largest finite number. Maps saturate there, so that whatever a workspace holds gives 0 when
// it is multiplied by 0.
constexpr float kLargest = 3.3895313892515355e38f;

// As bfloat16 in the lower half of each lane, of finite values that are not beyond kLargest.
inline Words rounded(Vec value) {
#if defined(__AVX512BF16__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
  Words bits;
  std::memcpy(&bits, &value, sizeof bits);
  return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) & 0xffff;
#endif
}

// In 0 … kLargest; NaN is kLargest.
inline Vec clamped(Vec value) {
#if defined(__AVX512BF16__)
  const __m512 least = _mm512_min_ps((__m512)value, _mm512_set1_ps(kLargest));
  return (Vec)_mm512_max_ps(least, _mm512_setzero_ps());
#else
  const Vec zero{}, most = zero + kLargest;
  value = value < most ? value : most;
  return value > zero ? value : zero;
#endif
}

inline Numbers to_numbers(Vec value) {
#if defined(__AVX512BF16__)
  return load_as<Numbers>(
      &static_cast<const __m256bh&>(_mm512_cvtneps_pbh((__m512)clamped(value))));
#else
  return __builtin_convertvector(rounded(clamped(value)), Numbers);
#endif
}

// Which channel of a group lane i of its v-th vector holds.
template <int Vectors>
constexpr int channel_of(int v, int lane) {
  return v * kLanes + lane;
}

template <int Vectors>
inline void store_numbers(Number* to, const Vec* values) {
#if defined(__AVX512BF16__)
  if constexpr (Vectors == 2) {
    const __m512bh both =
        _mm512_cvtne2ps_pbh((__m512)clamped(values[1]), (__m512)clamped(values[0]));
    std::memcpy(to, &both, sizeof both);
    return;
  }
#endif
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) {
    const Numbers numbers = to_numbers(values[v]);
    std::memcpy(to + v * kLanes, &numbers, sizeof numbers);
  }
}

template <int Vectors>
inline void load_numbers(const Number* from, Vec* values) {
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) {
    const Numbers numbers = load_as<Numbers>(from + v * kLanes);
    values[v] = to_floats(__builtin_convertvector(numbers, Words) << 16);
  }
}

// ------------------------------------------------------------------------------------------------
// Over all numbers of a map

// Sums of kRow channels over pixels in float32, those of even and odd places apart until the end.
class MapSums {
 public:
  // So many pixels, `step` numbers apart: a row of a map.
  void add(const Number* pixel, int64_t step, int64_t count) {
    int64_t p = 0;
    for (; p + 2 <= count; p += 2, pixel += 2 * step) {
      add(pixel, sums_[0]);
      add(pixel + step, sums_[1]);
    }
    if (p < count) add(pixel, sums_[0]);
  }

  void store(float* to) const {
    for (int half = 0; half < 2; ++half) {
      const Vec sum = sums_[0][half] + sums_[1][half];
      for (int i = 0; i < kLanes; ++i) to[2 * i + half] = sum[i];
    }
  }

 private:
  static void add(const Number* pixel, Vec* sums) {
    const Words words = load_as<Words>(pixel);
    sums[0] += to_floats(words << 16);
    sums[1] += to_floats(words & static_cast<int32_t>(0xffff0000));
  }

  Vec sums_[2][2] = {};
};

// ------------------------------------------------------------------------------------------------
// Pixels of an image

// What lies outside of an image.
constexpr Number kOutside = 0;

// In -kLargest … kLargest; NaN is -kLargest.
inline Words pixel_words(Vec value, float) {
  const Vec least = broadcast(-kLargest), most = broadcast(kLargest);
  value = value > least ? value : least;
  return rounded(value < most ? value : most);
}

// Three channels of kLanes pixels, one pixel after another.
inline void store_pixels(const Words* channels, int64_t count, Number* to) {
#if defined(__AVX512BW__)
  if (count == kLanes) {
    // Numbers 0 to 31 are the first two channels' in turn, from 32 on the third's and zeros.
    alignas(64) static constexpr uint16_t kPlaces[64] = {
        0,  1,  32, 2,  3,  34, 4,  5,  36, 6,  7,  38, 8,  9,  40, 10,
        11, 42, 12, 13, 44, 14, 15, 46, 16, 17, 48, 18, 19, 50, 20, 21,
        52, 22, 23, 54, 24, 25, 56, 26, 27, 58, 28, 29, 60, 30, 31, 62};
    const __m512i two = (__m512i)(channels[0] | channels[1] << 16), third = (__m512i)channels[2];
    const __m512i first = _mm512_permutex2var_epi16(two, _mm512_load_si512(kPlaces), third);
    const __m512i last = _mm512_permutex2var_epi16(two, _mm512_load_si512(kPlaces + 32), third);
    _mm512_storeu_si512(to, first);
    _mm256_storeu_si256((__m256i*)(to + 32), _mm512_castsi512_si256(last));
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < 3; ++c) to[3 * i + c] = static_cast<Number>(channels[c][i]);
  }
}

}  // namespace gated

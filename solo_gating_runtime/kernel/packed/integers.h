// Maps of numbers from 0 to 255, and weights from -127 to 127.
//
//   kGroup  numbers of a map × weights   dot(sum, x, w)
//   4       u8 × s8                      AVX-512 VNNI, AVX-VNNI, NEON's dot products
//   2       s16 × s16                    vpmaddwd of AVX-512, AVX2 and SSE2, or plain C++; numbers
//                                        are those of 8 bits, so that sums are the same
//
// vpmaddubsw is not used because it saturates. Integer sums are exact and hence the same for all;
// what follows them are single operations on floats.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../simd.h"

namespace gated {

// Sums are integers, which multipliers take to a map's numbers.
constexpr bool kIntegers = true;

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD) || \
    defined(GATED_EMULATE_AVXVNNI)
using Number = uint8_t;
using PackedWeight = int8_t;
#else
using Number = int16_t;
using PackedWeight = int16_t;
#endif

using Sums = Words;
typedef Number Numbers __attribute__((vector_size(kLanes * sizeof(Number))));

constexpr int kGroup = 4 / sizeof(Number);
constexpr int kRow = kLanes * kGroup;  // numbers in a vector

// ------------------------------------------------------------------------------------------------
// sum + the products of each word's numbers

// NEON multiplies bytes of the same sign only: dot() takes 128 from each number, and correct()
// gives 128 · Σ w, which is the same for all pixels.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kBiased = true;
#else
constexpr bool kBiased = false;
#endif

#if defined(__AVX512VNNI__)
inline Sums dot(Sums sum, Words x, Words w) {
  return (Sums)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
}
#elif defined(__AVXVNNI__)
inline Sums dot(Sums sum, Words x, Words w) {
  return (Sums)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
}
#elif defined(GATED_EMULATE_AVXVNNI)
// The same for tests on a CPU with AVX-512 VNNI only.
inline Sums dot(Sums sum, Words x, Words w) {
  __asm__("%{evex%} vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  return sum;
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
inline Sums dot(Sums sum, Words x, Words w) {
  return (Sums)vusdotq_s32((int32x4_t)sum, (uint8x16_t)x, (int8x16_t)w);
}
#elif defined(__ARM_FEATURE_DOTPROD)
inline Sums dot(Sums sum, Words x, Words w) {
  const int8x16_t lowered = vreinterpretq_s8_u8(veorq_u8((uint8x16_t)x, vdupq_n_u8(128)));
  return (Sums)vdotq_s32((int32x4_t)sum, lowered, (int8x16_t)w);
}
#elif defined(__AVX512BW__)
inline Sums dot(Sums sum, Words x, Words w) {
  return sum + (Sums)_mm512_madd_epi16((__m512i)x, (__m512i)w);
}
#elif defined(__AVX2__)
inline Sums dot(Sums sum, Words x, Words w) {
  return sum + (Sums)_mm256_madd_epi16((__m256i)x, (__m256i)w);
}

// The same of numbers in memory, without a register for them: compilers would rather spill a sum.
#define GATED_DOT_FROM_MEMORY
inline Sums dot_from(Sums sum, const Number* x, Words w) {
  typedef Words Unaligned __attribute__((aligned(2), may_alias));
  Words products;
  __asm__("vpmaddwd %1, %2, %0"
          : "=x"(products)
          : "m"(*reinterpret_cast<const Unaligned*>(x)), "x"(w));
  return sum + products;
}
#elif defined(__SSE2__)
inline Sums dot(Sums sum, Words x, Words w) {
  return sum + (Sums)_mm_madd_epi16((__m128i)x, (__m128i)w);
}
#elif defined(__aarch64__)
inline Sums dot(Sums sum, Words x, Words w) {
  const int16x8_t a = (int16x8_t)x, b = (int16x8_t)w;
  return sum + (Sums)vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
}
#else
inline Sums dot(Sums sum, Words x, Words w) {
  return sum + ((x << 16) >> 16) * ((w << 16) >> 16) + (x >> 16) * (w >> 16);
}
#endif

inline Sums correct(Sums sum, [[maybe_unused]] Words w) {
#if defined(__ARM_FEATURE_DOTPROD)
  const int8x16_t half = vdupq_n_s8(64);
  int32x4_t value = vdotq_s32((int32x4_t)sum, half, (int8x16_t)w);
  return (Sums)vdotq_s32(value, half, (int8x16_t)w);
#else
  return sum;
#endif
}

// ------------------------------------------------------------------------------------------------
// Between numbers of a map and floats

inline float to_float(Number number) { return number; }

inline Vec to_floats(Sums sums) { return __builtin_convertvector(sums, Vec); }

inline Vec scaled(Sums sums, Vec multiplier) { return to_floats(sums) * multiplier; }

inline Vec add_product(Vec sum, Vec a, Vec b) { return sum + a * b; }

constexpr float kLargest = 255.0f;

// ⌊value⌉ in 0 … 255; NaN is 0.
inline Numbers to_numbers(Vec value) {
#if defined(__AVX512BW__)
  __m512i whole = _mm512_cvtps_epi32(_mm512_min_ps((__m512)value, _mm512_set1_ps(kLargest)));
  whole = _mm512_max_epi32(whole, _mm512_setzero_si512());
  if constexpr (sizeof(Number) == 1) {
    return load_as<Numbers>(&static_cast<const __m128i&>(_mm512_cvtepi32_epi8(whole)));
  } else {
    return load_as<Numbers>(&static_cast<const __m256i&>(_mm512_cvtepi32_epi16(whole)));
  }
#else
  const Vec zero{}, most = zero + kLargest;
  value = value > zero ? value : zero;
  value = value < most ? value : most;
  // Adding 1.5 · 2²³ leaves the integer, rounded as wanted, in the lowest bits.
  value += 12582912.0f;
  Words bits;
  std::memcpy(&bits, &value, sizeof bits);
  return __builtin_convertvector(bits & 255, Numbers);
#endif
}

inline Vec to_floats(Numbers numbers) { return to_floats(__builtin_convertvector(numbers, Sums)); }

// Which channel of a group lane i of its v-th vector holds: the order that comes of itself when
// vectors are packed within each 128 bits.
template <int Vectors>
constexpr int channel_of(int v, int lane) {
#if defined(__AVX512BW__)
  if (Vectors == 2) return 8 * (lane / 4) + 4 * v + lane % 4;
#endif
  return v * kLanes + lane;
}

template <int Vectors>
inline void store_numbers(Number* to, const Vec* values) {
#if defined(__AVX512BW__)
  if constexpr (Vectors == 2) {
    const __m512 most = _mm512_set1_ps(kLargest);
    const __m512i low = _mm512_cvtps_epi32(_mm512_min_ps((__m512)values[0], most));
    const __m512i high = _mm512_cvtps_epi32(_mm512_min_ps((__m512)values[1], most));
    const __m512i both = _mm512_max_epi16(_mm512_packs_epi32(low, high), _mm512_setzero_si512());
    if constexpr (sizeof(Number) == 1) {
      _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi16_epi8(both));
    } else {
      _mm512_storeu_si512(to, both);
    }
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
#if defined(__AVX512BW__)
  if constexpr (Vectors == 2) {
    __m512i both;
    if constexpr (sizeof(Number) == 1) {
      both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    } else {
      both = _mm512_loadu_si512(from);
    }
    const __m512i zero = _mm512_setzero_si512();
    values[0] = (Vec)_mm512_cvtepi32_ps(_mm512_unpacklo_epi16(both, zero));
    values[1] = (Vec)_mm512_cvtepi32_ps(_mm512_unpackhi_epi16(both, zero));
    return;
  }
#endif
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) values[v] = to_floats(load_as<Numbers>(from + v * kLanes));
}

// ------------------------------------------------------------------------------------------------
// Over all numbers of a map

// Sums of kRow channels over pixels, exact.
class MapSums {
 public:
  // So many pixels, `step` numbers apart.
  void add(const Number* pixel, int64_t step, int64_t count) {
    while (count > 0) {
      const int64_t now = std::min(count, room_);
      for (int64_t p = 0; p < now; ++p, pixel += step) {
        const Halves numbers = load_as<Halves>(pixel);
        if constexpr (kBytes) {
          even_ += numbers & 255;
          odd_ += numbers >> 8;
        } else {
          even_ += numbers;
        }
      }
      count -= now;
      room_ -= now;
      if (room_ == 0) flush();
    }
  }

  void store(float* to) {
    flush();
    for (int i = 0; i < kRow; ++i) to[i] = static_cast<float>(sums_[i]);
  }

 private:
  typedef uint16_t Halves __attribute__((vector_size(kRow * sizeof(Number))));
  static constexpr bool kBytes = sizeof(Number) == 1;
  static constexpr int64_t kMost = 256;  // numbers that 16 bits can add up

  void flush() {
    constexpr int kStep = kBytes ? 2 : 1;
    for (int i = 0; i < kRow / kStep; ++i) {
      sums_[i * kStep] += even_[i];
      if (kBytes) sums_[i * kStep + 1] += odd_[i];
    }
    even_ = odd_ = Halves{};
    room_ = kMost;
  }

  Halves even_{}, odd_{};
  int32_t sums_[kRow] = {};
  int64_t room_ = kMost;
};

// ------------------------------------------------------------------------------------------------
// Pixels of an image

// What lies outside of an image.
constexpr Number kOutside = 128;

// ⌊value · scale⌉ + 128 in 0 … 255.
inline Words pixel_words(Vec value, float scale) {
  const Vec least = broadcast(-128.0f), most = broadcast(127.0f);
  value *= broadcast(scale);
  value = value > least ? value : least;
  value = value < most ? value : most;
  value += 12582912.0f;  // as in to_numbers
  Words bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0xff) ^ 128;
}

// Three channels of kLanes pixels, one pixel after another; may write one number, 128, beyond.
inline void store_pixels(const Words* channels, int64_t count, Number* to) {
  if constexpr (sizeof(Number) == 1) {
    const Words pixels =
        channels[0] | channels[1] << 8 | channels[2] << 16 | static_cast<int32_t>(128u << 24);
#if defined(__AVX512VBMI__)
    if (count == kLanes) {
      alignas(64) static constexpr uint8_t kPlaces[64] = {
          0,  1,  2,  4,  5,  6,  8,  9,  10, 12, 13, 14, 16, 17, 18, 20, 21, 22, 24, 25, 26, 28,
          29, 30, 32, 33, 34, 36, 37, 38, 40, 41, 42, 44, 45, 46, 48, 49, 50, 52, 53, 54, 56, 57,
          58, 60, 61, 62, 3,  3,  3,  3,  3,  3,  3,  3,  3,  3,  3,  3,  3,  3,  3,  3};
      const __m512i packed = _mm512_permutexvar_epi8(_mm512_load_si512(kPlaces), (__m512i)pixels);
      _mm512_mask_storeu_epi8(to, 0x0000ffffffffffff, packed);
      return;
    }
#endif
    int32_t lanes[kLanes];
    std::memcpy(lanes, &pixels, sizeof lanes);
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + 3 * i, lanes + i, 4);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      for (int c = 0; c < 3; ++c) to[3 * i + c] = channels[c][i];
    }
  }
}

}  // namespace gated

// Instructions on vectors of 32-bit words that hold kGroup numbers each: all that engines differ
// in.
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
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../simd.h"

namespace gated {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD) || \
    defined(GATED_EMULATE_AVXVNNI)
using Number = uint8_t;
using Weight8 = int8_t;
#else
using Number = int16_t;
using Weight8 = int16_t;
#endif

constexpr int kGroup = 4 / sizeof(Number);
constexpr int kRow = kLanes * kGroup;  // numbers in a vector

typedef int32_t Words __attribute__((vector_size(kLanes * sizeof(int32_t))));
using Sums = Words;
typedef Number Numbers __attribute__((vector_size(kLanes * sizeof(Number))));
typedef Weight8 Row __attribute__((vector_size(kRow * sizeof(Weight8))));

template <class Vector>
inline Vector load_as(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Words load_words(const void* from) { return load_as<Words>(from); }

template <size_t... I>
inline Words broadcast_word(int32_t word, std::index_sequence<I...>) {
  return Words{(static_cast<void>(I), word)...};
}

// One word in all lanes.
inline Words broadcast_word(const Number* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return broadcast_word(word, Lanes{});
}

// As for floats (simd.h).
inline void keep(Words& value) {
#if defined(__aarch64__)
  __asm__("" : "+w"(value));
#elif defined(__x86_64__) || defined(__i386__)
  __asm__("" : "+v"(value));
#else
  static_cast<void>(value);
#endif
}

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
// Sums over lanes: as simd.h's of floats

template <size_t... Index>
inline Words shuffle(Words a, Words b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, static_cast<int>(Index)...);
#else
  return __builtin_shuffle(a, b, Words{static_cast<int32_t>(Index)...});
#endif
}

// Lane i becomes the sum of the lanes i and i ^ Bit of `a`, or of `b` where i has the bit.
template <size_t Bit, size_t... I>
inline Words merge(Words a, Words b, std::index_sequence<I...>) {
  return shuffle<((I & Bit ? kLanes : 0) + I)...>(a, b) +
         shuffle<((I & Bit ? kLanes : 0) + (I ^ Bit))...>(a, b);
}

template <size_t Bit, size_t... I>
inline Words fold(Words a, std::index_sequence<I...>) {
  return a + shuffle<(I ^ Bit)...>(a, a);
}

#if defined(__AVX512BW__)
// Four vectors' sums in each 128 bits.
inline __m512i sums_of_four(const Words* vectors) {
  const auto pair = [](Words first, Words second) {
    const __m512i a = (__m512i)first, b = (__m512i)second;
#if defined(__AVX512VBMI2__)
    // A blend and a shift are cheaper than two shuffles.
    return _mm512_add_epi32(_mm512_mask_blend_epi32(0xaaaa, a, b), _mm512_shldi_epi64(b, a, 32));
#else
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
#endif
  };
  const __m512i a = pair(vectors[0], vectors[1]), b = pair(vectors[2], vectors[3]);
#if defined(__AVX512VBMI2__)
  const __m512d c = _mm512_castsi512_pd(a), d = _mm512_castsi512_pd(b);
  return _mm512_add_epi32(_mm512_mask_blend_epi64(0xaa, a, b),
                          _mm512_castpd_si512(_mm512_shuffle_pd(c, d, 0x55)));
#else
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
#endif
}

inline Words sums_of_sixteen(const Words* vectors) {
  const __m512i a = sums_of_four(vectors), b = sums_of_four(vectors + 4);
  const __m512i c = sums_of_four(vectors + 8), d = sums_of_four(vectors + 12);
  const __m512i ab =
      _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  const __m512i cd =
      _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x44), _mm512_shuffle_i32x4(c, d, 0xee));
  return (Words)_mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88),
                                 _mm512_shuffle_i32x4(ab, cd, 0xdd));
}
#endif

// Lane i of the result is the sum of the i-th vector's lanes, for i < Count ≤ kLanes.
template <int Count, size_t Bit = 1>
inline Words total(const Words* vectors) {
#if defined(__AVX512BW__)
  if constexpr (Count == 16 && Bit == 1) return sums_of_sixteen(vectors);
#endif
  if constexpr (Bit == kLanes) {
    return vectors[0];
  } else {
    Words merged[(Count + 1) / 2];
#pragma GCC unroll 16
    for (int i = 0; i < Count / 2; ++i) {
      merged[i] = merge<Bit>(vectors[2 * i], vectors[2 * i + 1], Lanes{});
    }
    if constexpr (Count % 2 == 1) merged[Count / 2] = fold<Bit>(vectors[Count - 1], Lanes{});
    return total<(Count + 1) / 2, 2 * Bit>(merged);
  }
}

// ------------------------------------------------------------------------------------------------
// Between numbers of a map and floats

inline Vec to_floats(Sums sums) { return __builtin_convertvector(sums, Vec); }

constexpr float kLargest = 255.0f;

// ⌊value⌉ in 0 … 255; NaN is 0.
inline Numbers quantise(Vec value) {
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
    const Numbers numbers = quantise(values[v]);
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
// From rows to words

// Within each 128 bits, the numbers of the lower (upper) half of a and b in turn; a number is
// `Size` of the row's.
template <size_t Size, bool Upper, size_t... I>
inline Row zip(Row a, Row b, std::index_sequence<I...>) {
  constexpr size_t kPart = std::min<size_t>(16 / sizeof(Weight8), kRow);
  constexpr auto from = [](size_t i) {
    const size_t number = i % kPart / Size;
    return (number % 2 ? kRow : 0) + i / kPart * kPart + (Upper ? kPart / 2 : 0) +
           number / 2 * Size + i % Size;
  };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, static_cast<int>(from(I))...);
#else
  return __builtin_shuffle(a, b, Row{static_cast<Weight8>(from(I))...});
#endif
}

// kGroup rows become kGroup vectors of words with a number of each row, the first two to `first`
// and the others to `second`. Which column of the rows a word holds is up to the instructions.
inline void interleave(const Row* rows, Weight8* first, Weight8* second) {
  using All = std::make_index_sequence<kRow>;
  Row out[kGroup];
  if constexpr (kGroup == 4) {
    const Row a = zip<1, false>(rows[0], rows[1], All{}), b = zip<1, true>(rows[0], rows[1], All{});
    const Row c = zip<1, false>(rows[2], rows[3], All{}), d = zip<1, true>(rows[2], rows[3], All{});
    out[0] = zip<2, false>(a, c, All{});
    out[1] = zip<2, true>(a, c, All{});
    out[2] = zip<2, false>(b, d, All{});
    out[3] = zip<2, true>(b, d, All{});
  } else {
    out[0] = zip<1, false>(rows[0], rows[1], All{});
    out[1] = zip<1, true>(rows[0], rows[1], All{});
  }
  for (int i = 0; i < kGroup; ++i) {
    Weight8* to = i < 2 ? first + i * kRow : second + (i - 2) * kRow;
    std::memcpy(to, &out[i], sizeof(Row));
  }
}

// The chosen numbers of a row, one after another; may write whole vectors beyond the end.
inline void compress(const Weight8* row, const int32_t* chosen, int64_t number, Weight8* to) {
  for (int64_t i = 0; i < number; ++i) to[i] = row[chosen[i]];
}

// ------------------------------------------------------------------------------------------------
// Over all numbers of a map

typedef Number NumberRow __attribute__((vector_size(kRow * sizeof(Number))));
typedef uint16_t Halves __attribute__((vector_size(kRow * sizeof(Number))));

// Sums of kRow numbers in 16 bits, of at most so many.
constexpr int64_t kMostHalves = 256;

struct HalfSums {
  Halves even{}, odd{};

  void add(const Number* from) {
    const Halves numbers = load_as<Halves>(from);
    if constexpr (sizeof(Number) == 1) {
      even += numbers & 255;
      odd += numbers >> 8;
    } else {
      even += numbers;
    }
  }

  // Adds what there is to sums in 32 bits.
  void flush(int32_t* sums) {
    constexpr int kStep = sizeof(Number) == 1 ? 2 : 1;
    for (int i = 0; i < kRow / kStep; ++i) {
      sums[i * kStep] += even[i];
      if (kStep == 2) sums[i * kStep + 1] += odd[i];
    }
    even = odd = Halves{};
  }
};

// The largest of each two numbers.
inline NumberRow largest(NumberRow a, NumberRow b) { return a > b ? a : b; }

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

// One vector type whose width follows from the compiler's flags.
//
// Compiler vector extensions (GCC, Clang) only: the same source gives AVX-512 with 16 floats, AVX2
// with 8, and the portable path with 4, which is SSE on x86 and NEON on aarch64.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace gated {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(float))));

using Lanes = std::make_index_sequence<kLanes>;

// Integers of 32 bits.
using Words = Mask;

// For what inner loops consist of: compilers inline less in larger sources, and sums would leave
// their registers.
#define GATED_INLINE __attribute__((always_inline))

template <class Vector>
GATED_INLINE inline Vector load_as(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

GATED_INLINE inline Vec load(const float* from) { return load_as<Vec>(from); }

// bfloat16 is the upper half of a float.
struct Bfloat16 {
  uint16_t upper;
};

// Rounded to the nearest, halves to the even one.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool is_nan = value != value;
  return static_cast<uint16_t>((is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

GATED_INLINE inline Vec load(const Bfloat16* from) {
  typedef uint16_t Half __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  typedef uint32_t Whole __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  Half upper;
  std::memcpy(&upper, from, sizeof upper);
  const Whole bits = __builtin_convertvector(upper, Whole) << 16;
  Vec value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

GATED_INLINE inline float number(const float* from) { return *from; }

GATED_INLINE inline float number(const Bfloat16* from) {
  const uint32_t bits = static_cast<uint32_t>(from->upper) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// What the convolutions' weights are held in; sums and activations are always floats.
#if defined(GATED_BFLOAT16)
using Weight = Bfloat16;
#else
using Weight = float;
#endif

GATED_INLINE inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

template <size_t... I>
GATED_INLINE inline Vec broadcast(float value, std::index_sequence<I...>) {
  return Vec{(static_cast<void>(I), value)...};
}

GATED_INLINE inline Vec broadcast(float value) { return broadcast(value, Lanes{}); }

// Keeps a value in a register: otherwise compilers fold its load into each multiplication that uses
// it, and the load ports become the bottleneck.
GATED_INLINE inline void keep(Vec& value) {
#if defined(__aarch64__)
  __asm__("" : "+w"(value));
#elif defined(__x86_64__) || defined(__i386__)
  __asm__("" : "+v"(value));
#else
  static_cast<void>(value);
#endif
}

// max(0, x) with NaN staying NaN, as PyTorch's; a plain maximum could swallow it.
GATED_INLINE inline Vec relu(Vec x) {
  const Vec zero{};
  return zero > x ? zero : x;
}

// The larger of two, neither of them NaN.
GATED_INLINE inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// The larger of two; NaN if one of them is.
GATED_INLINE inline Vec maximum_or_nan(Vec a, Vec b) { return ((a > b) | (a != a)) ? a : b; }

// Of Vec, Words.
template <size_t... Index, class Vector>
GATED_INLINE inline Vector shuffle(Vector a, Vector b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, static_cast<int>(Index)...);
#else
  return __builtin_shuffle(a, b, Mask{static_cast<int32_t>(Index)...});
#endif
}

// One step of a transposing sum: lane i becomes the sum of the lanes i and i ^ Bit of `a`, or of
// `b` where i has the bit. (The first of the two is a blend, which is cheaper than a shuffle.)
template <size_t Bit, class Vector, size_t... I>
GATED_INLINE inline Vector merge(Vector a, Vector b, std::index_sequence<I...>) {
  return shuffle<((I & Bit ? kLanes : 0) + I)...>(a, b) +
         shuffle<((I & Bit ? kLanes : 0) + (I ^ Bit))...>(a, b);
}

template <size_t Bit, class Vector, size_t... I>
GATED_INLINE inline Vector fold(Vector a, std::index_sequence<I...>) {
  return a + shuffle<(I ^ Bit)...>(a, a);
}

// Lane i of the result is the sum of the i-th vector's lanes i, i + End, i + 2 · End, ..., for
// i < Count ≤ End.
template <int Count, size_t End = kLanes, size_t Bit = 1, class Vector>
GATED_INLINE inline Vector sums(const Vector* vectors) {
  if constexpr (Bit == End) {
    return vectors[0];
  } else {
    Vector merged[(Count + 1) / 2];
#pragma GCC unroll 16
    for (int i = 0; i < Count / 2; ++i) {
      merged[i] = merge<Bit>(vectors[2 * i], vectors[2 * i + 1], Lanes{});
    }
    if constexpr (Count % 2 == 1) merged[Count / 2] = fold<Bit>(vectors[Count - 1], Lanes{});
    return sums<(Count + 1) / 2, End, 2 * Bit>(merged);
  }
}

// Lanes below kLanes / 2 of one, the others of another.
template <size_t... I>
GATED_INLINE inline Vec halves(Vec low, Vec high, std::index_sequence<I...>) {
  return shuffle<(I < kLanes / 2 ? I : kLanes + I)...>(low, high);
}

template <size_t Bit, size_t... I>
GATED_INLINE inline void exchange(Vec& a, Vec& b, std::index_sequence<I...>) {
  const Vec low = shuffle<(I & Bit ? kLanes + (I ^ Bit) : I)...>(a, b);
  b = shuffle<(I & Bit ? kLanes + I : (I ^ Bit))...>(a, b);
  a = low;
}

// Rows become columns.
template <size_t Bit = 1>
GATED_INLINE inline void transpose(Vec* rows) {
  if constexpr (Bit < kLanes) {
#pragma GCC unroll 16
    for (size_t i = 0; i < kLanes; ++i) {
      if ((i & Bit) == 0) exchange<Bit>(rows[i], rows[i | Bit], Lanes{});
    }
    transpose<2 * Bit>(rows);
  }
}

}  // namespace gated

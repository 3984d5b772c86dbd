// Vectors of 32-bit words that hold kGroup numbers each, the same for all kinds of numbers.
//
// What engines differ in, the header of their kind says:
//
//   Number, PackedWeight     what maps and weights consist of
//   kIntegers                whether sums are integers, which multipliers take to a map's numbers
//   Sums, kBiased            what products add up to, and whether correct() must follow
//   dot(sum, x, w)           sum + the products of each word's numbers
//   dot_from(sum, x, w)      the same of numbers in memory (if GATED_DOT_FROM_MEMORY is defined)
//   scaled(sums, multiplier) as floats
//   add_product(sum, x, r)   sum + x · r, of a shortcut
//   to_numbers(floats)       what a map holds of them, after its ReLU
//   store_numbers, load_numbers, channel_of
//                            a group's vectors, and in which order they hold channels
//   MapSums                  sums over pixels
//   pixel_words, store_pixels, kOutside
//                            an image's numbers

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(GATED_NATIVE_BFLOAT16)
#include "bfloat16.h"
#else
#include "integers.h"
#endif

namespace gated {

typedef PackedWeight Row __attribute__((vector_size(kRow * sizeof(PackedWeight))));

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

#if defined(GATED_DOT_FROM_MEMORY)
constexpr bool kDotFromMemory = true;
#else
constexpr bool kDotFromMemory = false;

inline Sums dot_from(Sums sum, const Number* x, Words w) { return dot(sum, load_words(x), w); }
#endif

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
// Sums over lanes, in simd.h's order

#if defined(__AVX512BW__)
// Four vectors' sums in each 128 bits.
inline Sums sums_of_four(const Sums* vectors) {
  const auto pair = [](Sums first, Sums second) {
    const __m512 a = (__m512)first, b = (__m512)second;
    return (Sums)_mm512_shuffle_ps(a, b, 0x88) + (Sums)_mm512_shuffle_ps(a, b, 0xdd);
  };
  return pair(pair(vectors[0], vectors[1]), pair(vectors[2], vectors[3]));
}

inline Sums sums_of_sixteen(const Sums* vectors) {
  const auto pair = [](Sums first, Sums second) {
    const __m512i a = (__m512i)first, b = (__m512i)second;
    return (Sums)_mm512_shuffle_i32x4(a, b, 0x88) + (Sums)_mm512_shuffle_i32x4(a, b, 0xdd);
  };
  return pair(pair(sums_of_four(vectors), sums_of_four(vectors + 4)),
              pair(sums_of_four(vectors + 8), sums_of_four(vectors + 12)));
}
#endif

// Lane i of the result is the sum of the i-th vector's lanes, for i < Count ≤ kLanes.
template <int Count>
inline Sums total(const Sums* vectors) {
#if defined(__AVX512BW__)
  if constexpr (Count == 16) return sums_of_sixteen(vectors);
#endif
  return sums<Count>(vectors);
}

// ------------------------------------------------------------------------------------------------
// From rows to words

// Within each 128 bits, the numbers of the lower (upper) half of a and b in turn; a number is
// `Size` of the row's.
template <size_t Size, bool Upper, size_t... I>
inline Row zip(Row a, Row b, std::index_sequence<I...>) {
  constexpr size_t kPart = std::min<size_t>(16 / sizeof(PackedWeight), kRow);
  constexpr auto from = [](size_t i) {
    const size_t number = i % kPart / Size;
    return (number % 2 ? kRow : 0) + i / kPart * kPart + (Upper ? kPart / 2 : 0) +
           number / 2 * Size + i % Size;
  };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, static_cast<int>(from(I))...);
#else
  return __builtin_shuffle(a, b, Row{static_cast<PackedWeight>(from(I))...});
#endif
}

// kGroup rows become kGroup vectors of words with a number of each row, the first two to `first`
// and the others to `second`. Which column of the rows a word holds is up to the instructions.
inline void interleave(const Row* rows, PackedWeight* first, PackedWeight* second) {
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
    PackedWeight* to = i < 2 ? first + i * kRow : second + (i - 2) * kRow;
    std::memcpy(to, &out[i], sizeof(Row));
  }
}

// Takes chosen numbers out of rows.
class Chooser {
 public:
  // Of rows of at most so many vectors.
  void make_room(int64_t vectors) { marks_.resize(vectors); }

  void choose(const int32_t* chosen, int64_t number) {
    chosen_ = chosen;
    number_ = number;
    std::fill(marks_.begin(), marks_.end(), 0);
    for (int64_t i = 0; i < number; ++i) {
      marks_[chosen[i] / kRow] |= uint64_t{1} << chosen[i] % kRow;
    }
  }

  // Writes them one after another, and may write whole vectors of zeros beyond the end.
  void compress(const PackedWeight* row, int64_t vectors, PackedWeight* to) const {
#if defined(__AVX512BW__)
    // Not all CPUs with AVX-512 have these instructions.
    static const bool in_vectors = __builtin_cpu_supports("avx512vbmi2");
    if (in_vectors) return compress_vectors(row, vectors, to);
#endif
    for (int64_t i = 0; i < number_; ++i) to[i] = row[chosen_[i]];
  }

 private:
#if defined(__AVX512BW__)
  __attribute__((target("avx512vbmi2"))) void compress_vectors(const PackedWeight* row,
                                                               int64_t vectors,
                                                               PackedWeight* to) const {
    for (int64_t v = 0; v < vectors; ++v, row += kRow) {
      const __m512i numbers = _mm512_loadu_si512(row);
      const __m512i together =
          sizeof(PackedWeight) == 1
              ? _mm512_maskz_compress_epi8(static_cast<__mmask64>(marks_[v]), numbers)
              : _mm512_maskz_compress_epi16(static_cast<__mmask32>(marks_[v]), numbers);
      _mm512_storeu_si512(to, together);
      to += __builtin_popcountll(marks_[v]);
    }
  }
#endif

  const int32_t* chosen_ = nullptr;
  int64_t number_ = 0;
  std::vector<uint64_t> marks_;  // for each vector a bit for each number
};

// The largest of each two numbers, none of which is negative.
typedef Number NumberRow __attribute__((vector_size(kRow * sizeof(Number))));

inline NumberRow largest(NumberRow a, NumberRow b) { return a > b ? a : b; }

}  // namespace gated

// The three inner loops that all multiplications run in.
//
// Each keeps a tile of sums in registers. `outer_tile` has output channels in its lanes and reads
// one number of the input at a time, which suits convolutions of few, freely chosen input channels
// into all output channels. `dot_tile` has input channels in its lanes, which suits convolutions
// of all input channels into few, freely chosen output channels. `plane_tile` has pixels in its
// lanes and reads one weight at a time, so that input and output channels can both be chosen. None
// copies or pads the chosen weights.
//
// The order of additions in one output number depends on neither the tile's shape nor its place,
// so that results do not depend on the number of threads.

#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "../padding.h"
#include "../simd.h"

namespace gated {

// Shapes of the tiles: as many sums as there are registers, less those for the operands.
constexpr int kOuterVectors = 2;
constexpr int kOuterPixels = kRegisters == 32 ? 14 : 6;
// Room for a tile's pixels in whole vectors.
constexpr int kTileStride = (kOuterPixels + kLanes - 1) / kLanes * kLanes;
constexpr int kDotPixels = kLanes == 16 ? 7 : 4;
constexpr int kDotChannels = kRegisters == 32 ? (kLanes == 16 ? 4 : 6) : 3;
constexpr int kPlaneChannels = 6;
constexpr int kPlaneVectors = kRegisters == 32 ? 4 : 2;
static_assert(kDotPixels <= kLanes, "the sums of a channel fit one vector");

// y[p] = Σ_j Σ_t x[j · plane + taps[t] + p] · w[rows[j]][t], for a tile of pixels p.
struct OuterProduct {
  const float* x;
  int64_t plane;        // from one input channel to the next
  const int32_t* taps;  // offsets of those of the kernel's elements that are read
  int num_taps;
  const int32_t* rows;  // the input channel that each plane is
  int num_rows;
  const Weight* weights;  // input channels × taps × the tile's output channels, from the first tap
  int64_t row_size;       // in them, from one input channel to the next
  const Weight* ahead;    // weights of the same shape that are needed soon: of these rows, one
  const int32_t* ahead_rows;  // number in so many is prefetched, as many as there are taps
  int64_t ahead_step;
  const float* bias;
  float* y;                 // pixels × channels
  const int32_t* position;  // of each of the tile's pixels in y
  int64_t channels;         // from one pixel of y to the next
  bool add;                 // to what is in y
  bool rectify;
};

template <int Vectors, int Pixels>
void outer_tile(const OuterProduct& a) {
  constexpr int kWidth = Vectors * kLanes;
  Vec sum[Pixels][Vectors];
#pragma GCC unroll 32
  for (int p = 0; p < Pixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[p][v] = Vec{};
  }
  const float* plane = a.x;
  for (int j = 0; j < a.num_rows; ++j, plane += a.plane) {
    const Weight* w = a.weights + a.rows[j] * a.row_size;
    const Weight* ahead = a.ahead + a.ahead_rows[j] * a.row_size;
    for (int t = 0; t < a.num_taps; ++t, w += kWidth, ahead += a.ahead_step) {
      const float* x = plane + a.taps[t];
      Vec weight[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        weight[v] = load(w + v * kLanes);
        keep(weight[v]);
      }
      __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 32
      for (int p = 0; p < Pixels; ++p) {
        Vec value = broadcast(x[p]);
        if (Vectors > 1) keep(value);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[p][v] += value * weight[v];
      }
    }
  }
#pragma GCC unroll 32
  for (int p = 0; p < Pixels; ++p) {
    float* y = a.y + a.position[p] * a.channels;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      Vec value = sum[p][v] + load(a.bias + v * kLanes);
      if (a.add) value += load(y + v * kLanes);
      store(y + v * kLanes, a.rectify ? relu(value) : value);
    }
  }
}

// y[m][p] = relu(Σ_t Σ_c x[(pixel[p] + t · stride) · channels + c] · w[m][t][c] + bias[m])
//           · scale[m]
//
// for a tile of output channels m and pixels p. The three pixels of a kernel's row are one run of
// numbers, so that t goes over those of its three rows that are read and c over 3 · channels. Input
// channels come in blocks: the sums of all of them but the last are left in `partial`.
struct DotProduct {
  const float* x;
  const int32_t* pixel;                 // the first one that each of the tile's pixels reads
  int64_t stride;                       // from one row of x to the next, in pixels
  int64_t channels;                     // of x in this block, a multiple of kLanes
  const Weight* weights[kDotChannels];  // of each output channel, in this block
  const Weight* ahead;                  // as long as one of them, needed soon; may be null
  KernelRows kernel;                    // that are read
  bool first, last;                     // whether this block is
  float* partial;                       // Channels × Pixels vectors
  float bias[kDotChannels];
  const float* scale;       // of each output channel; null for 1
  float* y[kDotChannels];   // one plane for each output channel
  const int32_t* position;  // of each of the tile's pixels in a plane
};

// Adds up the lanes of a tile's sums, two channels at once where both fit one vector.
template <int Channels, int Pixels>
GATED_INLINE inline void finish(const DotProduct& a, const Vec (&sum)[Channels][Pixels]) {
  constexpr int kSlot = Pixels > kLanes / 2 ? kLanes : kLanes / 2;
  constexpr int kTogether = kLanes / kSlot;
  const bool in_a_row = a.position[Pixels - 1] - a.position[0] == Pixels - 1;
#pragma GCC unroll 16
  for (int m = 0; m < Channels; m += kTogether) {
    const int other = m + kTogether - 1 < Channels ? m + kTogether - 1 : m;
    Vec value = sums<Pixels, kSlot>(sum[m]);
    Vec bias = broadcast(a.bias[m]);
    if constexpr (kTogether == 2) {
      value = other == m ? fold<kSlot>(value, Lanes{})
                         : merge<kSlot>(value, sums<Pixels, kSlot>(sum[other]), Lanes{});
      bias = halves(bias, broadcast(a.bias[other]), Lanes{});
    }
    value = relu(value + bias);
    if (a.scale != nullptr)
      value *= halves(broadcast(a.scale[m]), broadcast(a.scale[other]), Lanes{});
    float lanes[kLanes];
    store(lanes, value);
    for (int k = m; k <= other; ++k) {
      const float* from = lanes + (k - m) * kSlot;
      if (in_a_row) {
        std::memcpy(a.y[k] + a.position[0], from, Pixels * sizeof(float));
      } else {
#pragma GCC unroll 16
        for (int p = 0; p < Pixels; ++p) a.y[k][a.position[p]] = from[p];
      }
    }
  }
}

template <int Channels, int Pixels>
void dot_tile(const DotProduct& a) {
  Vec sum[Channels][Pixels];
#pragma GCC unroll 16
  for (int m = 0; m < Channels; ++m) {
#pragma GCC unroll 16
    for (int p = 0; p < Pixels; ++p) {
      sum[m][p] = a.first ? Vec{} : load(a.partial + (m * Pixels + p) * kLanes);
    }
  }
  const int64_t run = 3 * a.channels;
  const int64_t step = a.stride * a.channels;
  const float* x = a.x + a.kernel.first * step;
  const float* pixel[Pixels];
#pragma GCC unroll 16
  for (int p = 0; p < Pixels; ++p) pixel[p] = x + a.pixel[p] * a.channels;
  const Weight* row[Channels];
#pragma GCC unroll 16
  for (int m = 0; m < Channels; ++m) row[m] = a.weights[m] + a.kernel.first * run;
  const Weight* ahead = a.ahead == nullptr ? row[0] : a.ahead;
  for (int t = 0; t < a.kernel.count; ++t) {
    for (int64_t c = 0; c < run; c += kLanes) {
      __builtin_prefetch(ahead + c);
      if constexpr (Channels <= Pixels) {
        Vec weight[Channels];
#pragma GCC unroll 16
        for (int m = 0; m < Channels; ++m) {
          weight[m] = load(row[m] + c);
          keep(weight[m]);
        }
#pragma GCC unroll 16
        for (int p = 0; p < Pixels; ++p) {
          Vec value = load(pixel[p] + c);
          keep(value);
#pragma GCC unroll 16
          for (int m = 0; m < Channels; ++m) sum[m][p] += value * weight[m];
        }
      } else {
        Vec value[Pixels];
#pragma GCC unroll 16
        for (int p = 0; p < Pixels; ++p) {
          value[p] = load(pixel[p] + c);
          keep(value[p]);
        }
#pragma GCC unroll 16
        for (int m = 0; m < Channels; ++m) {
          Vec weight = load(row[m] + c);
          keep(weight);
#pragma GCC unroll 16
          for (int p = 0; p < Pixels; ++p) sum[m][p] += value[p] * weight;
        }
      }
    }
    ahead += run;
#pragma GCC unroll 16
    for (int m = 0; m < Channels; ++m) row[m] += run;
#pragma GCC unroll 16
    for (int p = 0; p < Pixels; ++p) pixel[p] += step;
  }
  if (!a.last) {
#pragma GCC unroll 16
    for (int m = 0; m < Channels; ++m) {
#pragma GCC unroll 16
      for (int p = 0; p < Pixels; ++p) store(a.partial + (m * Pixels + p) * kLanes, sum[m][p]);
    }
    return;
  }
  finish<Channels, Pixels>(a, sum);
}

// y[m][p] = Σ_j Σ_t w[m][rows[j]][t] · x[j · plane + taps[t] + p], rectified and scaled, for a tile
// of output channels m and pixels p.
struct PlaneProduct {
  const float* x;
  int64_t plane;        // from one input channel to the next
  const int32_t* taps;  // offsets of the kernel's elements
  int num_taps;
  const int32_t* rows;  // the input channel that each plane is
  int num_rows;
  const Weight* weights[kPlaneChannels];  // of each output channel
  int64_t row_step;                       // in them, from one input channel to the next
  int64_t tap_step;                       // and from one of the kernel's elements
  float bias[kPlaneChannels];
  float scale[kPlaneChannels];
  float* y[kPlaneChannels];  // the tile's part of each plane
  bool add;                  // to what is in y
  bool rectify;
};

template <int Channels, int Vectors>
void plane_tile(const PlaneProduct& a) {
  Vec sum[Channels][Vectors];
#pragma GCC unroll 16
  for (int m = 0; m < Channels; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[m][v] = Vec{};
  }
  const Weight* row[Channels];
#pragma GCC unroll 16
  for (int m = 0; m < Channels; ++m) row[m] = a.weights[m];
  const auto add = [&](const float* x, int64_t place) {
    Vec value[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      value[v] = load(x + v * kLanes);
      keep(value[v]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < Channels; ++m) {
      Vec weight = broadcast(number(row[m] + place));
      keep(weight);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[m][v] += value[v] * weight;
    }
  };
  const float* plane = a.x;
  if (a.num_taps == 1) {  // without the inner loop, which costs as much as a narrow tile
    for (int j = 0; j < a.num_rows; ++j, plane += a.plane) add(plane, a.rows[j] * a.row_step);
  } else {
    for (int j = 0; j < a.num_rows; ++j, plane += a.plane) {
      int64_t place = a.rows[j] * a.row_step;
      for (int t = 0; t < a.num_taps; ++t, place += a.tap_step) add(plane + a.taps[t], place);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < Channels; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* y = a.y[m] + v * kLanes;
      Vec value = sum[m][v] + broadcast(a.bias[m]);
      if (a.add) value += load(y);
      if (a.rectify) value = relu(value);
      store(y, value * broadcast(a.scale[m]));
    }
  }
}

using OuterTile = void (*)(const OuterProduct&);
using DotTile = void (*)(const DotProduct&);
using PlaneTile = void (*)(const PlaneProduct&);

template <int Vectors, size_t... P>
constexpr std::array<OuterTile, sizeof...(P)> outer_tiles(std::index_sequence<P...>) {
  return {outer_tile<Vectors, P + 1>...};
}

template <int Channels, size_t... P>
constexpr std::array<DotTile, sizeof...(P)> dot_tiles(std::index_sequence<P...>) {
  return {dot_tile<Channels, P + 1>...};
}

template <size_t... M>
constexpr std::array<std::array<DotTile, kDotPixels>, sizeof...(M)> all_dot_tiles(
    std::index_sequence<M...>) {
  return {dot_tiles<M + 1>(std::make_index_sequence<kDotPixels>{})...};
}

template <int Channels, size_t... V>
constexpr std::array<PlaneTile, sizeof...(V)> plane_tiles(std::index_sequence<V...>) {
  return {plane_tile<Channels, V + 1>...};
}

template <size_t... M>
constexpr std::array<std::array<PlaneTile, kPlaneVectors>, sizeof...(M)> all_plane_tiles(
    std::index_sequence<M...>) {
  return {plane_tiles<M + 1>(std::make_index_sequence<kPlaneVectors>{})...};
}

inline void run(const OuterProduct& product, int vectors, int pixels) {
  static constexpr auto kOne = outer_tiles<1>(std::make_index_sequence<kOuterPixels>{});
  static constexpr auto kTwo = outer_tiles<2>(std::make_index_sequence<kOuterPixels>{});
  (vectors == 1 ? kOne[pixels - 1] : kTwo[pixels - 1])(product);
}

inline void run(const DotProduct& product, int channels, int pixels) {
  static constexpr auto kTiles = all_dot_tiles(std::make_index_sequence<kDotChannels>{});
  kTiles[channels - 1][pixels - 1](product);
}

inline void run(const PlaneProduct& product, int channels, int vectors) {
  static constexpr auto kTiles = all_plane_tiles(std::make_index_sequence<kPlaneChannels>{});
  kTiles[channels - 1][vectors - 1](product);
}

}  // namespace gated

// Blocks of any convolutions, on feature maps that are one plane for each channel.
//
// Pixels lie in the lanes and weights are read one number at a time, so that input channels and
// output channels can both be chosen freely: the planes of channels that are not chosen have no
// place in memory, and weights are read where they lie.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../gates.h"
#include "../team.h"
#include "layout.h"
#include "packing.h"
#include "tiles.h"

namespace gated {

// One copy of a plane for each column of the kernel, shifted accordingly and as wide as the output:
// in them, any run of output pixels reads runs of numbers. With a stride, a copy has one part for
// each row modulo the stride.
inline void write_copies(const PlaneShape& s, const float* from, float* to) {
  for (int64_t shift = -s.padding(); shift < s.kernel - s.padding(); ++shift) {
    // The output pixels whose input is inside the map.
    const int64_t first = ceil_div(std::max<int64_t>(-shift, 0), s.stride);
    const int64_t last =
        std::clamp<int64_t>(ceil_div(s.in_width - shift, s.stride), first, s.width);
    for (int64_t phase = 0; phase < s.phases(); ++phase) {
      for (int64_t r = 0; r < s.rows; ++r, to += s.width) {
        const int64_t y = r * s.stride + phase - s.padding();
        if (y < 0 || y >= s.in_height) {
          std::fill_n(to, s.width, 0.0f);
          continue;
        }
        const float* line = from + y * s.in_width + shift;
        if (s.stride == 1) {
          // Whole vectors: what is too much, the next row overwrites.
          for (int64_t x = 0; x < s.width; x += kLanes) store(to + x, load(line + x));
          std::fill_n(to, first, 0.0f);
          std::fill(to + last, to + s.width, 0.0f);
        } else {
          std::fill_n(to, first, 0.0f);
          for (int64_t x = first; x < last; ++x) to[x] = line[x * s.stride];
          std::fill(to + last, to + s.width, 0.0f);
        }
      }
    }
  }
}

// The mean of each plane; zero for channels that are but padding.
inline void pool_planes(const float* x, int64_t pixels, int64_t channels, float* mean, Team team) {
  const int64_t plane = plane_size(pixels), whole = pixels / kLanes * kLanes;
  const float share = 1.0f / static_cast<float>(pixels);
  for (int64_t c = team.begin(channels); c < team.end(channels); ++c) {
    const float* from = x + c * plane;
    Vec total{};
    for (int64_t p = 0; p < whole; p += kLanes) total += load(from + p);
    float sum = sums<1>(&total)[0];
    for (int64_t p = whole; p < pixels; ++p) sum += from[p];
    mean[c] = sum * share;
  }
  if (team.rank == 0) std::fill(mean + channels, mean + padded_to_partials(channels), 0.0f);
}

// A convolution of the chosen planes of x into the chosen planes of y.
//
// For each tile of pixels, whose part of the planes fits an inner cache, weights pass by.
inline void convolve(const PackedConvolution& conv, bool grouped, const PlaneShape& shape,
                     const float* x, const Choice& in, float* y, const Choice& out, bool add,
                     bool rectify, Team team) {
  const int64_t num_taps = shape.taps.size();
  const int64_t groups = ceil_div(out.number, kPlaneChannels), tiles = shape.tiles.size();
  const Team alone{0, 1};
  const bool many = tiles >= 4 * team.size;
  const Team by_pixel = many ? team : alone, by_channel = many ? alone : team;
  PlaneProduct product{};
  product.plane = shape.in_plane();
  product.taps = shape.taps.data();
  product.num_taps = num_taps;
  product.rows = in.channels;
  product.num_rows = in.number;
  product.add = add;
  product.rectify = rectify;
  for (int64_t t = by_pixel.begin(tiles); t < by_pixel.end(tiles); ++t) {
    const int64_t first_pixel = shape.tiles[t].first * kLanes;
    product.x = x + first_pixel;
    for (int64_t g = by_channel.begin(groups); g < by_channel.end(groups); ++g) {
      const int64_t first = out.number * g / groups;
      const int64_t channels = out.number * (g + 1) / groups - first;
      product.tap_step = grouped ? channels : 1;
      product.row_step = num_taps * product.tap_step;
      for (int64_t k = 0; k < channels; ++k) {
        const int64_t c = out.channels[first + k];
        product.weights[k] =
            conv.weight + conv.in_channels * num_taps * (grouped ? first : c) + (grouped ? k : 0);
        product.bias[k] = conv.bias[c] + (out.shift == nullptr ? 0.0f : out.shift[c]);
        product.scale[k] = out.scale == nullptr ? 1.0f : out.scale[c];
        product.y[k] = y + (first + k) * shape.out_plane() + first_pixel;
      }
      run(product, channels, shape.tiles[t].count);
    }
  }
}

}  // namespace gated

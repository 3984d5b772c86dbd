// Where everything lies in memory, for one network and one image size.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../memory.h"
#include "../network.h"
#include "../runner.h"
#include "tiles.h"

namespace gated {

inline int64_t padded_channels(int64_t channels) { return ceil_div(channels, kLanes) * kLanes; }

// Pixels × channels in blocks of channels, one block after another: what a tile of dot products
// reads of one block fits into the innermost cache, and at no stride that is a power of two.
struct Blocked {
  float* data;
  int64_t pixels, channels;

  static constexpr int64_t kBlock = 64;

  // The first pixel's channel c.
  float* at(int64_t c) const { return data + c / kBlock * kBlock * pixels + c % kBlock; }

  // From one pixel's channel c to the next one's: the size of its block.
  int64_t step(int64_t c) const { return std::min(kBlock, channels - c / kBlock * kBlock); }
};

// A feature map: rows × columns, with a border of one zero pixel on each side.
struct Map {
  int64_t height, width, channels;

  int64_t pixels() const { return height * width; }
  int64_t padded_pixels() const { return (height + 2) * (width + 2); }
  int64_t size() const { return padded_pixels() * channels; }
};

// Pixels that share a tile of an outer product.
struct PixelTile {
  int32_t first;  // among the map's pixels, row by row
  int32_t count;
  int32_t offset;  // of its first pixel's first kernel element in a hidden plane
  KernelRows kernel;
};

// Even pieces of a run of pixels, as few as possible. (They are kept, because divisions are slow.)
inline void cut(int64_t begin, int64_t length, int64_t offset, int64_t most,
                std::vector<PixelTile>& tiles) {
  const int64_t pieces = ceil_div(length, most);
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t from = length * i / pieces, to = length * (i + 1) / pieces;
    tiles.push_back({static_cast<int32_t>(begin + from),
                     static_cast<int32_t>(to - from),
                     static_cast<int32_t>(offset + from),
                     {}});
  }
}

// A block's map and its hidden map, which holds one plane for each computed channel.
//
// A plane is a padded image, and a tile lies in one row. If rows do not fit tiles well, a plane has
// a copy of the image for each column of the 3×3 kernel, shifted accordingly and as wide as the
// output, so that any run of pixels is a tile.
struct Hidden {
  Map map;
  bool copies;
  int64_t plane;                  // from one channel to the next
  int64_t planes = 0;             // at most
  std::vector<int32_t> position;  // of each pixel in the padded map
  std::vector<int32_t> taps;      // offsets of the kernel's elements in a plane
  std::vector<PixelTile> tiles;
  std::vector<PixelTile> dots;  // the same for dot products: of all pixels, or of each short row

  explicit Hidden(const Map& shape) : map(shape) {
    const int64_t stride = map.width + 2, pixels = map.pixels();
    for (int64_t y = 0; y < map.height; ++y) {
      for (int64_t x = 0; x < map.width; ++x) position.push_back((y + 1) * stride + x + 1);
    }
    const int64_t rows = map.height * ceil_div(map.width, kOuterPixels);
    copies = kWorthCopies * ceil_div(pixels, kOuterPixels) < rows;
    if (copies) {
      cut(0, pixels, 0, kOuterPixels, tiles);
    } else {
      for (int64_t y = 0; y < map.height; ++y) {
        cut(y * map.width, map.width, y * stride, kOuterPixels, tiles);
      }
    }
    const int64_t run = map.width <= kDotPixels ? map.width : pixels;
    for (int64_t p = 0; p < pixels; p += run) cut(p, run, 0, kDotPixels, dots);
    for (PixelTile& tile : tiles) tile.kernel = kernel_rows(tile, 1, map.height);
    // A copy is written with whole vectors, beyond its end by less than one.
    plane = copies ? 3 * copy() + kLanes : map.padded_pixels();
    for (int64_t t = 0; t < 9; ++t) {
      taps.push_back(copies ? t % 3 * copy() + t / 3 * map.width : t / 3 * stride + t % 3);
    }
  }

  // Those that a tile reads, with a convolution of this stride of a map of this height.
  KernelRows kernel_rows(const PixelTile& tile, int64_t stride, int64_t height) const {
    const int64_t first = tile.first / map.width, last = (tile.first + tile.count - 1) / map.width;
    return rows_inside(first * stride - 1, last * stride - 1, 3, height);
  }

  // Size of a copy.
  int64_t copy() const { return (map.height + 2) * map.width; }

  // With how many times as many tiles copies are worth their time.
  static constexpr double kWorthCopies = 1.6;
};

struct BlockLayout {
  int64_t in_map, out_map;     // among the layout's maps; equal where the shortcut is the identity
  std::vector<int32_t> pixel;  // of the input map, the first one that each output pixel reads
  std::vector<KernelRows> kernel;  // of the first convolution's tiles
};

// From one plane of so many pixels to the next: whole vectors.
inline int64_t plane_size(int64_t pixels) { return ceil_div(pixels, kLanes) * kLanes; }

// One convolution between maps that are planes without borders.
struct PlaneShape {
  int64_t in_height, in_width;
  int64_t kernel, stride;
  int64_t height, width;         // of the output
  int64_t rows;                  // of each part of a shifted copy
  std::vector<int32_t> taps;     // offsets of the kernel's elements
  std::vector<PixelTile> tiles;  // of the output, counted in vectors

  PlaneShape(int64_t in_height, int64_t in_width, const Convolution& conv)
      : in_height(in_height), in_width(in_width), kernel(conv.kernel), stride(conv.stride) {
    height = (in_height - 1) / stride + 1;
    width = (in_width - 1) / stride + 1;
    rows = ceil_div(in_height + 2 * padding(), stride);
    check_places(std::max(in_plane(), out_plane()));
    for (int64_t y = 0; y < kernel; ++y) {
      for (int64_t x = 0; x < kernel; ++x) {
        taps.push_back(x * copy() + y % stride * rows * width + y / stride * width);
      }
    }
    cut(0, out_plane() / kLanes, 0, kPlaneVectors, tiles);
  }

  int64_t padding() const { return kernel / 2; }

  // Whether it reads shifted copies of the input's planes instead of these.
  bool copies() const { return kernel > 1 || stride > 1; }

  // Parts of a copy, one for each row modulo the stride that the kernel reads.
  int64_t phases() const { return std::min(kernel, stride); }

  // Size of a copy.
  int64_t copy() const { return phases() * rows * width; }

  // From one input channel to the next. The last pixels of copies are read with whole vectors.
  int64_t in_plane() const {
    return copies() ? plane_size(kernel * copy()) + kLanes : plane_size(in_height * in_width);
  }

  int64_t out_plane() const { return plane_size(height * width); }
};

struct PlaneBlock {
  std::vector<PlaneShape> convolutions;
  std::vector<PlaneShape> shortcut;  // one, or none for the identity
};

// The stem's input: for each channel, one plane for each column modulo the stride, so that
// neighbouring outputs read neighbouring numbers.
struct Stem {
  int64_t rows, columns;            // of a plane
  int64_t phase;                    // from one plane of a channel to the next
  int64_t channel;                  // from one channel to the next
  int64_t conv_height, conv_width;  // of the convolution's output
  int64_t pooled_height, pooled_width;
  std::vector<int32_t> taps;
  std::vector<int32_t> column;  // 0, 1, 2, ...
};

struct Layout {
  int64_t height, width;  // of the image
  Stem stem;
  std::vector<Map> maps;
  std::vector<Hidden> hidden;  // for each map
  std::vector<BlockLayout> blocks;
  std::vector<int32_t> shortcut_taps;  // input channels of a tile of a shortcut
  int64_t largest_shortcut = 0;
  int64_t largest_channels = 0;  // of a map or a hidden map

  // Where maps are planes; only the stem's output is also in `maps`.
  std::vector<PlaneBlock> plane_blocks;
  int64_t largest_map = 0, largest_hidden = 0, largest_copies = 0;
  int64_t last_pixels = 0;  // of the last map

  // Of a network whose blocks are computed in planes, or not.
  Layout(const Network& net, bool in_planes, int64_t height, int64_t width)
      : height(height), width(width) {
    plan_stem(net);
    maps.push_back({stem.pooled_height, stem.pooled_width, padded_channels(net.stem.out_channels)});
    // The largest plane, and three copies of the largest map.
    check_places(std::max(stem.channel, 3 * maps[0].padded_pixels()));
    if (in_planes) {
      plan_planes(net);
      return;
    }
    for (const Block& block : net.blocks) plan_block(block);
    for (const Map& map : maps) {
      hidden.emplace_back(map);
      largest_channels = std::max(largest_channels, map.channels);
    }
    for (size_t i = 0; i < net.blocks.size(); ++i) {
      const Hidden& out = hidden[blocks[i].out_map];
      for (const PixelTile& tile : out.dots) {
        blocks[i].kernel.push_back(
            out.kernel_rows(tile, net.blocks[i].first().stride, maps[blocks[i].in_map].height));
      }
    }
    for (int64_t c = 0; c < largest_channels; ++c) shortcut_taps.push_back(c * kTileStride);
    for (size_t i = 0; i < net.blocks.size(); ++i) {
      const int64_t channels = net.blocks[i].convolutions[0].out_channels;
      int64_t& planes = hidden[blocks[i].out_map].planes;
      planes = std::max(planes, channels);
      largest_channels = std::max(largest_channels, padded_channels(channels));
    }
    for (size_t i = 0; i + 1 < maps.size(); ++i) {
      const int64_t rows = hidden[i + 1].tiles.size() * maps[i].channels;
      largest_shortcut = std::max(largest_shortcut, rows * kTileStride);
    }
  }

 private:
  void plan_stem(const Network& net) {
    Stem& s = stem;
    const int64_t kernel = net.stem.kernel, stride = net.stem.stride, padding = net.stem.padding;
    s.rows = height + 2 * padding;
    s.columns = ceil_div(width + 2 * padding, stride);
    s.phase = s.rows * s.columns;
    s.channel = stride * s.phase;
    s.conv_height = net.stem.out_size(height);
    s.conv_width = net.stem.out_size(width);
    s.pooled_height = net.stem_size(height);
    s.pooled_width = net.stem_size(width);
    for (int64_t y = 0; y < kernel; ++y) {
      for (int64_t x = 0; x < kernel; ++x) {
        s.taps.push_back(x % stride * s.phase + y * s.columns + x / stride);
      }
    }
    for (int64_t x = 0; x < s.conv_width; ++x) s.column.push_back(x);
  }

  void plan_block(const Block& block) {
    BlockLayout layout;
    layout.in_map = maps.size() - 1;
    const Map in = maps.back();
    const int64_t stride = block.convolutions[0].stride;
    if (block.shortcut.exists()) {
      maps.push_back({(in.height - 1) / stride + 1, (in.width - 1) / stride + 1,
                      padded_channels(block.last().out_channels)});
    }
    layout.out_map = maps.size() - 1;
    const Map out = maps.back();
    for (int64_t y = 0; y < out.height; ++y) {
      for (int64_t x = 0; x < out.width; ++x) {
        layout.pixel.push_back((y * (in.width + 2) + x) * stride);
      }
    }
    blocks.push_back(std::move(layout));
  }

  void plan_planes(const Network& net) {
    hidden.emplace_back(maps[0]);
    int64_t rows = maps[0].height, columns = maps[0].width;
    largest_channels = maps[0].channels;
    largest_map = net.stem.out_channels * plane_size(rows * columns);
    const auto shape = [&](int64_t in_height, int64_t in_width, const Convolution& conv) {
      PlaneShape s(in_height, in_width, conv);
      if (s.copies()) largest_copies = std::max(largest_copies, conv.in_channels * s.in_plane());
      largest_channels = std::max(largest_channels, padded_channels(conv.out_channels));
      return s;
    };
    for (const Block& block : net.blocks) {
      PlaneBlock planes;
      if (block.shortcut.exists()) {
        planes.shortcut.push_back(shape(rows, columns, block.shortcut));
      }
      for (int64_t k = 0; k < block.num_convolutions; ++k) {
        const Convolution& conv = block.convolutions[k];
        planes.convolutions.push_back(shape(rows, columns, conv));
        const PlaneShape& s = planes.convolutions.back();
        int64_t& largest = k + 1 < block.num_convolutions ? largest_hidden : largest_map;
        largest = std::max(largest, conv.out_channels * s.out_plane());
        rows = s.height;
        columns = s.width;
      }
      plane_blocks.push_back(std::move(planes));
    }
    last_pixels = rows * columns;
  }
};

}  // namespace gated

// Where everything lies in memory, for one network and one size of images.
//
// A map is rows × columns × channels with a border of one pixel of zeros. Between a block's
// convolutions there are hidden maps of the chosen channels only: those that dot products read are
// like maps; those that outer products read are quads × rows × columns × 4 with a border, after two
// planes of single channels.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../network.h"
#include "../runner.h"
#include "pack.h"

namespace gated {

// Rows are read with whole vectors, beyond a map's end by less than one.
constexpr int64_t kMargin = kRow;

struct Grid {
  int64_t height = 0, width = 0;

  int64_t pixels() const { return height * width; }
  int64_t padded() const { return (height + 2) * (width + 2); }
  bool operator==(const Grid& other) const {
    return height == other.height && width == other.width;
  }

  Grid after(const Convolution& conv) const {
    return {conv.out_size(height), conv.out_size(width)};
  }
};

// Of an outer product.
struct OuterTileShape {
  int32_t y, x, rows, columns;
  KernelRows kernel;
  bool whole_row;
};

// Of a dot product: the first of so many pixels, and whether they are neighbours.
struct DotTileShape {
  int32_t first, count;
  bool in_a_row = false;
  KernelRows kernel;
};

// Pieces of so many things, even and as few as possible.
template <class Function>
inline void cut(int64_t length, int64_t most, Function function) {
  const int64_t pieces = ceil_div(length, most);
  for (int64_t i = 0; i < pieces; ++i) {
    function(length * i / pieces, length * (i + 1) / pieces);
  }
}

struct OuterShape {
  Grid grid;
  std::vector<int32_t> taps, tail_taps;
  std::vector<OuterTileShape> tiles;

  OuterShape() = default;
  OuterShape(const Grid& grid, int64_t kernel) : grid(grid) {
    const int64_t columns = grid.width + 2, first = kernel == 1 ? 1 : 0;
    for (int64_t y = 0; y < kernel; ++y) {
      for (int64_t x = 0; x < kernel; ++x) {
        taps.push_back(((first + y) * columns + first + x) * kQuad);
      }
      tail_taps.push_back((first + y) * columns + first);
    }
    const int64_t most_rows = grid.width <= kTwoRowsColumns ? 2 : 1;
    const bool whole_row =
        !kBiased && kernel == 3 && grid.width >= kLeastWholeRow && grid.width <= kMostWholeRow;
    for (int64_t y = 0; y < grid.height; y += most_rows) {
      const int64_t rows = std::min(most_rows, grid.height - y);
      cut(grid.width, kOuterPixels, [&](int64_t begin, int64_t end) {
        tiles.push_back(
            {static_cast<int32_t>(y), static_cast<int32_t>(begin), static_cast<int32_t>(rows),
             static_cast<int32_t>(end - begin),
             rows_inside(y - kernel / 2, y + rows - 1 - kernel / 2, kernel, grid.height),
             whole_row});
      });
    }
    // Those that read all rows of the kernel, and prefetch most, come first.
    std::stable_partition(tiles.begin(), tiles.end(),
                          [&](const OuterTileShape& tile) { return tile.kernel.count == kernel; });
  }
};

struct DotShape {
  Grid in, out;
  std::vector<int32_t> pixel;     // the first one that each output reads
  std::vector<int32_t> position;  // of each output
  std::vector<DotTileShape> tiles, few_tiles;

  DotShape(const Grid& grid, const Convolution& conv) : in(grid), out(grid.after(conv)) {
    for (int64_t y = 0; y < out.height; ++y) {
      for (int64_t x = 0; x < out.width; ++x) {
        pixel.push_back((y * conv.stride + 1 - conv.padding) * (in.width + 2) + x * conv.stride +
                        1 - conv.padding);
        position.push_back((y + 1) * (out.width + 2) + x + 1);
      }
    }
    const int32_t number = out.pixels();
    const int32_t larger = larger_tiles(number);
    int32_t p = 0;
    for (; p + kDotPixels <= number - larger * kDotPixelsMost; p += kDotPixels) {
      tiles.push_back({p, kDotPixels});
    }
    for (int32_t i = 0; i < larger; ++i, p += kDotPixelsMost) tiles.push_back({p, kDotPixelsMost});
    // The last tile may overlap others.
    if (p < number) tiles.push_back({std::max(number - kDotPixels, 0), kDotPixels});
    for (p = 0; p < number; p += kFewPixels) {
      few_tiles.push_back({std::max(std::min(p, number - kFewPixels), 0), kFewPixels});
    }
    // A map may be smaller than a tile: the last pixel again and again.
    while (static_cast<int32_t>(pixel.size()) < std::max(kFewPixels, kDotPixels)) {
      pixel.push_back(pixel.back());
      position.push_back(position.back());
    }
    for (std::vector<DotTileShape>* list : {&tiles, &few_tiles}) {
      for (DotTileShape& tile : *list) {
        const auto row_of = [&](int64_t p) {
          return std::min<int64_t>(p, number - 1) / out.width * conv.stride - conv.padding;
        };
        tile.kernel = rows_inside(row_of(tile.first), row_of(tile.first + tile.count - 1),
                                  conv.kernel, in.height);
        const int32_t* at = position.data() + tile.first;
        tile.in_a_row =
            tile.first + tile.count <= number && at[tile.count - 1] - at[0] == tile.count - 1;
      }
    }
  }

 private:
  // Of so many pixels, the larger tiles that leave whole others: as few as possible, or, for those
  // of two and three pixels, as many.
  static int32_t larger_tiles(int32_t number) {
    if (kDotPixelsMost == kDotPixels || number < kDotPixels) return 0;
    if (kDotPixels == 2) return number / 3 - (number % 3 == 1);
    const int32_t larger = number % kDotPixels;
    return larger * kDotPixelsMost > number ? 0 : larger;
  }
};

// A hidden map that outer products read.
struct QuadShape {
  Grid grid;
  int64_t channels = 0;  // at most

  int64_t tail_plane() const { return up_to(grid.padded() + kQuad, 64); }
  int64_t first() const { return 2 * tail_plane(); }
  int64_t plane() const {
    const int64_t size = up_to(grid.padded() * kQuad, 64);
    return size % 4096 == 0 ? size + 64 : size;  // not all in the same part of the cache
  }
  int64_t size() const { return first() + ceil_div(channels, kQuad) * plane() + kMargin; }
};

struct BlockShape {
  int64_t in_map, out_map;  // equal where the shortcut is the identity
  std::vector<DotShape> dots;
  OuterShape outer;
  int64_t quads;  // which hidden map the last convolution reads
};

struct MapLayout {
  Grid grid;
  int64_t channels;  // padded

  int64_t size() const { return grid.padded() * channels + kMargin; }
};

struct StemShape {
  Grid image, conv, out;
  int64_t row = 0;  // of the padded image, in numbers
  int64_t image_size = 0;
  bool gathered = false;  // whether words of a row are copied before they are multiplied
  std::vector<int32_t> taps;
  std::vector<OuterTileShape> tiles;  // of a row
};

struct PackedLayout {
  int64_t height, width;
  StemShape stem;
  std::vector<MapLayout> maps;
  std::vector<QuadShape> quads;
  std::vector<BlockShape> blocks;
  int64_t largest_between = 0;  // of hidden maps that dot products read
  int64_t largest_gathered = 0;
  int64_t largest_unit = 0;  // of packed words
  int64_t largest_rows = 0;  // of four channels' weights of chosen inputs
  int64_t largest_channels = 0;

  PackedLayout(const Network& net, int64_t height, int64_t width) : height(height), width(width) {
    plan_stem(net);
    add_map(stem.out, net.stem.out_channels);
    for (const Block& block : net.blocks) plan_block(net, block);
  }

 private:
  void add_map(const Grid& grid, int64_t channels) {
    maps.push_back({grid, map_channels(channels)});
    check_places(grid.padded() * 255);
    check_places(maps.back().size());
    largest_channels = std::max(largest_channels, maps.back().channels);
  }

  void plan_stem(const Network& net) {
    const Convolution& conv = net.stem;
    stem.image = {height, width};
    stem.conv = stem.image.after(conv);
    stem.out = {net.stem_size(height), net.stem_size(width)};
    stem.row = up_to((width + 2 * conv.padding) * conv.in_channels + 2 * kQuad, 64);
    stem.image_size = (height + 2 * conv.padding) * stem.row + kMargin;
    check_places(stem.image_size);
    check_places(stem.conv.padded() * 255);
    const int64_t words = ceil_div(conv.kernel * conv.in_channels, kGroup);
    const int64_t step = conv.stride * conv.in_channels;
    stem.gathered = (step != 3 && step != 6) || stem.conv.width < kStemPixelsFew;
    if (stem.gathered) {
      stem.taps.push_back(0);
      cut(stem.conv.width, kOuterPixels, [&](int64_t begin, int64_t end) {
        stem.tiles.push_back(
            {0, static_cast<int32_t>(begin), 1, static_cast<int32_t>(end - begin), {}, false});
      });
      return;
    }
    for (int64_t y = 0; y < conv.kernel; ++y) {
      for (int64_t i = 0; i < words; ++i) stem.taps.push_back(y * stem.row + i * kGroup);
    }
    // Tiles of one size, of which the last may overlap another.
    const auto waste = [&](int32_t size) {
      return stem.conv.width < size ? 1 << 30 : up_to(stem.conv.width, size) - stem.conv.width;
    };
    const int32_t size = waste(kStemPixels) <= waste(kStemPixelsFew) ? kStemPixels : kStemPixelsFew;
    for (int32_t x = 0; x < stem.conv.width; x += size) {
      stem.tiles.push_back({0, std::min<int32_t>(x, stem.conv.width - size), 1, size, {}, false});
    }
  }

  void plan_block(const Network& net, const Block& block) {
    BlockShape shape;
    shape.in_map = maps.size() - 1;
    Grid grid = maps.back().grid;
    int64_t channels = 0;
    for (int64_t k = 0; k + 1 < block.num_convolutions; ++k) {
      const Convolution& conv = block.convolutions[k];
      shape.dots.emplace_back(grid, conv);
      grid = shape.dots.back().out;
      channels = conv.out_channels;
      largest_channels = std::max(largest_channels, up_to(channels, kPartials));
      if (k + 2 < block.num_convolutions) {
        largest_between =
            std::max(largest_between, grid.padded() * up_to(channels, kQuad) + kMargin);
      }
      if (k > 0 && net.gated) {
        const int64_t run = DotWeights::run_of(conv.kernel, up_to(conv.in_channels, kQuad));
        largest_rows = std::max(largest_rows, kDotChannels * conv.kernel * run + kRow);
      }
    }
    check_places(grid.padded() * up_to(channels, kQuad));
    const Convolution& last = block.last();
    shape.outer = OuterShape(grid, last.kernel);
    const auto same = std::find_if(quads.begin(), quads.end(),
                                   [&](const QuadShape& q) { return q.grid == grid; });
    shape.quads = same - quads.begin();
    if (same == quads.end()) quads.push_back({grid, 0});
    quads[shape.quads].channels = std::max(quads[shape.quads].channels, channels);
    if (net.gated) {
      const int64_t most = up_to(channels, kQuad) * last.kernel * last.kernel;
      largest_unit = std::max(largest_unit, kUnitGroups * most * kPair * kRow);
    }
    if (block.shortcut.exists()) {
      const int64_t in = maps.back().channels;
      add_map(grid, last.out_channels);
      largest_gathered = std::max(largest_gathered, grid.pixels() * in + kMargin);
    }
    shape.out_map = maps.size() - 1;
    blocks.push_back(std::move(shape));
  }
};

}  // namespace gated

// What convolutions need not read: maps have a border of zeros.

#pragma once

#include <algorithm>
#include <cstdint>

namespace gated {

// The rows of a kernel that are read: the others lie in the border for all pixels of a tile.
struct KernelRows {
  int32_t first, count;
};

// Of a kernel whose first row reads a map's row `first` for the first of a tile's pixels, and its
// row `last` for the last one, both counted without the border.
inline KernelRows rows_inside(int64_t first, int64_t last, int64_t kernel, int64_t height) {
  const int64_t begin = std::clamp<int64_t>(-last, 0, kernel - 1);
  const int64_t end = std::clamp<int64_t>(height - first, begin + 1, kernel);
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end - begin)};
}

}  // namespace gated

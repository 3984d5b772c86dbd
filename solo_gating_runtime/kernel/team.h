// The threads that work on one image together.

#pragma once

#include <cstdint>

namespace gated {

struct Team {
  int rank;
  int size;

  void wait() const {
    if (size > 1) {
#pragma omp barrier
    }
  }

  // This thread's share of `count` pieces of work.
  int64_t begin(int64_t count) const { return count * rank / size; }
  int64_t end(int64_t count) const { return count * (rank + 1) / size; }
};

}  // namespace gated

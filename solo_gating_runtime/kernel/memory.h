// Memory for activations and for weights.

#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace gated {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kCacheLine = 64;

// Numbers on a cache line's boundary, zero at first.
template <class T>
class Storage {
 public:
  Storage() = default;
  explicit Storage(int64_t size)
      : data_(static_cast<T*>(::operator new (size * sizeof(T), std::align_val_t{kCacheLine}))) {
    std::memset(static_cast<void*>(data_), 0, size * sizeof(T));
  }
  Storage(Storage&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Storage& operator=(Storage&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Storage() { ::operator delete (data_, std::align_val_t{kCacheLine}); }

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

using Buffer = Storage<float>;

// One piece of memory for all weights, on huge pages where the system has them: rows of weights are
// read at random. Weights are packed twice: at first they are only counted.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    if (map_ != MAP_FAILED) munmap(map_, map_size_);
  }

  // Takes memory for all that was counted.
  void allocate() {
    map_size_ = used_ + kHugePage;
    map_ = mmap(nullptr, map_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(map_, map_size_, MADV_HUGEPAGE);  // a system that has none goes on with small pages
#endif
    const auto begin = reinterpret_cast<uintptr_t>(map_);
    base_ = static_cast<char*>(map_) + (kHugePage - begin % kHugePage) % kHugePage;
    used_ = 0;
  }

  // Room for numbers on a cache line's boundary, zero at first, that `fill` writes into.
  template <class T, class Fill>
  const T* add(int64_t count, Fill fill) {
    T* place = nullptr;
    if (base_ != nullptr) fill(place = reinterpret_cast<T*>(base_ + used_));
    used_ += ceil_div(count * sizeof(T), kCacheLine) * kCacheLine;
    return place;
  }

  // A copy with zeros behind it, up to so many numbers.
  const float* copy(const float* from, int64_t count, int64_t padded) {
    return add<float>(padded, [&](float* to) { std::memcpy(to, from, count * sizeof(float)); });
  }

  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kHugePage = 2 << 20;

  void* map_ = MAP_FAILED;
  int64_t map_size_ = 0;
  char* base_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace gated

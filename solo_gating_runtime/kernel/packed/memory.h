// Memory on a cache line's boundary.

#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gated {

// Numbers, zero at first. Large ones are on large pages where there are: chosen rows of weights are
// all over them.
template <class T>
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t size) : size_(size) {
    const size_t bytes = size * sizeof(T);
    align_ = bytes >= kPage ? kPage : 64;
    data_ = static_cast<T*>(::operator new (bytes, std::align_val_t{align_}));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (align_ == kPage) madvise(data_, bytes / kPage * kPage, MADV_HUGEPAGE);
#endif
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(align_, other.align_);
    return *this;
  }
  ~Memory() {
    if (data_ != nullptr) ::operator delete (data_, std::align_val_t{align_});
  }

  T* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  static constexpr size_t kPage = size_t{1} << 21;

  T* data_ = nullptr;
  int64_t size_ = 0;
  size_t align_ = 64;
};

}  // namespace gated

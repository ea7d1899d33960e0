#include "core/allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

namespace {
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLeastCache = size_t{256} << 20;
}  // namespace

Allocator::~Allocator() { DropCache(); }

// Eight classes an octave: at most an eighth is wasted, and shapes that differ slightly share blocks.
size_t Allocator::Rounded(size_t bytes) {
  bytes = std::max<size_t>(bytes, 64);
  size_t step = 64;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* Allocator::Allocate(size_t bytes) {
  const size_t size = Rounded(bytes);
  const auto found = cache_.find(size);
  void* pointer = nullptr;
  if (found != cache_.end() && !found->second.empty()) {
    pointer = found->second.back();
    found->second.pop_back();
    cached_ -= size;
  } else {
    if (limit_ && live_ + cached_ + size > limit_) DropCache();
    if (limit_ && live_ + size > limit_) return nullptr;
    const size_t alignment = size >= kHugePage ? kHugePage : 64;
    pointer = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
    if (!pointer) {
      DropCache();
      pointer = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
      if (!pointer) return nullptr;
    }
    if (size >= kHugePage) madvise(pointer, size, MADV_HUGEPAGE);
  }
  live_ += bytes;
  peak_ = std::max(peak_.load(), live_.load());
  return pointer;
}

void Allocator::Free(void* pointer, size_t bytes) {
  const size_t size = Rounded(bytes);
  live_ -= bytes;
  // What is kept for reuse may not outgrow what has been in use at once.
  if (cached_ + size > std::max(kLeastCache, peak_.load())) {
    std::free(pointer);
    return;
  }
  cache_[size].push_back(pointer);
  cached_ += size;
}

void Allocator::DropCache() {
  for (auto& [size, blocks] : cache_)
    for (void* block : blocks) std::free(block);
  cache_.clear();
  cached_ = 0;
}

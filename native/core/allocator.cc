#include "core/allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace {
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSpare = size_t{256} << 20;

size_t Pages(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

// Large blocks are mappings of their own: what is freed goes back to the system at once and leaves no holes
// in a heap.
void* AcquireHost(size_t bytes) {
  if (bytes < kHugePage) return std::aligned_alloc(64, bytes);
  const size_t size = Pages(bytes), whole = size + kHugePage;
  void* mapped = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const from = static_cast<char*>(mapped);
  char* const at = reinterpret_cast<char*>(Pages(reinterpret_cast<uintptr_t>(mapped)));
  if (at != from) munmap(from, at - from);
  if (at + size != from + whole) munmap(at + size, from + whole - (at + size));
  madvise(at, size, MADV_HUGEPAGE);
  return at;
}

void ReturnHost(void* pointer, size_t bytes) {
  if (bytes < kHugePage)
    std::free(pointer);
  else
    munmap(pointer, Pages(bytes));
}
}  // namespace

Allocator::~Allocator() { Trim(0); }

void* Allocator::Acquire(size_t bytes) { return memory_ ? memory_->allocate(bytes) : AcquireHost(bytes); }
void Allocator::Return(void* pointer, size_t bytes) {
  if (memory_)
    memory_->release(pointer);
  else
    ReturnHost(pointer, bytes);
}

// Eight classes an octave: at most an eighth is wasted, and shapes that differ slightly share blocks.
size_t Allocator::Rounded(size_t bytes) {
  bytes = std::max<size_t>(bytes, 64);
  size_t step = 64;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// With all that is kept for reuse the process stays within what was in use at once, and a little more.
size_t Allocator::Room() const {
  const size_t most = std::max(peak_.load(), live_.load()) + kSpare;
  return most - live_;
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
    const size_t room = Room();
    if (cached_ + size > room) Trim(room > size ? room - size : 0);
    if (limit_ && live_ + cached_ + size > limit_) Trim(0);
    if (limit_ && live_ + size > limit_) return nullptr;
    pointer = Acquire(size);
    if (!pointer) {
      Trim(0);
      pointer = Acquire(size);
      if (!pointer) return nullptr;
    }
  }
  live_ += bytes;
  peak_ = std::max(peak_.load(), live_.load());
  return pointer;
}

void Allocator::Free(void* pointer, size_t bytes) {
  const size_t size = Rounded(bytes);
  live_ -= bytes;
  if (cached_ + size > Room()) return Return(pointer, size);
  cache_[size].push_back(pointer);
  cached_ += size;
}

void Allocator::Trim(size_t most) {
  // The largest first: few calls give much back.
  while (cached_ > most && !cache_.empty()) {
    const auto last = std::prev(cache_.end());
    for (auto& blocks = last->second; !blocks.empty() && cached_ > most; blocks.pop_back()) {
      Return(blocks.back(), last->first);
      cached_ -= last->first;
    }
    if (last->second.empty()) cache_.erase(last);
  }
}

// A caching allocator with exact counters. Used by the engine thread only; the counters may be read from
// anywhere.
#pragma once
#include <atomic>
#include <cstddef>
#include <map>
#include <vector>

#include "core/op.h"

class Allocator {
 public:
  // limit: most bytes to hold (live and cached); 0 = no limit. memory: a device's, or nullptr.
  explicit Allocator(size_t limit, const PfMemory* memory = nullptr) : limit_(limit), memory_(memory) {}
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  // At least 64-byte aligned, nullptr when the limit or the system says no. Zero bytes give a valid pointer.
  void* Allocate(size_t bytes);
  void Free(void* pointer, size_t bytes);
  // Gives back what is kept for reuse beyond this many bytes.
  void Trim(size_t most);
  // A block that is in use holds another number of bytes from here on, of the same class.
  void Recount(size_t from, size_t to) { live_ += to - from; }
  // The class of blocks that a number of bytes takes one of.
  static size_t Rounded(size_t bytes);

  size_t live() const { return live_; }
  size_t cached() const { return cached_; }
  size_t peak() const { return peak_; }
  void ResetPeak() { peak_ = live_.load(); }

 private:
  size_t Room() const;  // bytes that may be kept for reuse
  void* Acquire(size_t bytes);
  void Return(void* pointer, size_t bytes);

  const size_t limit_;
  const PfMemory* const memory_;
  std::map<size_t, std::vector<void*>> cache_;
  std::atomic<size_t> live_{0}, cached_{0}, peak_{0};
};

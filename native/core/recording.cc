#include "core/recording.h"

Recording::~Recording() {
  for (const auto& [data, held] : blocks_) allocator_->Free(data, held.bytes);
}

void* Recording::Allocate(size_t bytes) {
  auto& known = free_[Allocator::Rounded(bytes)];
  if (known.empty()) {
    void* const made = allocator_->Allocate(bytes);
    if (made) blocks_[made].bytes = bytes;
    return made;
  }
  void* const data = known.back();
  known.pop_back();
  Held& held = blocks_[data];
  allocator_->Recount(held.bytes, bytes);
  held.bytes = bytes;
  held.again = true;
  return data;
}

void* Recording::Pin(void* data, bool written) {
  Held& held = blocks_[data];
  if (held.pinned) return data;
  if (written) Break();
  if (!held.again) {
    held.pinned = true;
    return data;
  }
  void* const fresh = allocator_->Allocate(held.bytes);
  if (!fresh) return nullptr;
  blocks_[fresh] = {held.bytes, false, true};
  Free(data);
  return fresh;
}

void Recording::Free(void* data) {
  const Held& held = blocks_[data];
  if (open_ && !held.pinned) free_[Allocator::Rounded(held.bytes)].push_back(data);
}

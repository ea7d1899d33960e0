// Ops noted as they ran, with their operands' addresses: they can run again without anybody queueing them one
// by one. The memory that was made meanwhile stays as it is until the recording goes.
#pragma once
#include <map>
#include <utility>
#include <vector>

#include "core/allocator.h"
#include "core/op.h"

struct Block {
  void* data;
  size_t bytes;
};

struct NotedOp {
  int op;
  std::vector<PfView> in, out;
  std::vector<double> scalars;
  std::vector<Block> scratch;  // in the order in which the kernel asked for it
};

// Used by the engine thread only.
class Recording {
 public:
  Recording(Allocator* allocator, int job) : allocator_(allocator), job_(job) {}
  ~Recording();  // gives back what no tensor holds
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  int job() const { return job_; }
  bool open() const { return open_; }
  void Close() { open_ = false; }
  // Something that cannot be repeated: an op failed or was dropped, or a file was read.
  void Break() { broken_ = true; }
  bool broken() const { return broken_ || open_; }

  // Memory for a tensor or scratch: what an earlier op of the recording is done with, or a new block.
  void* Allocate(size_t bytes);
  // Nobody needs what is in the block.
  void Free(void* data);
  // A block instead of this one that no op writes, before or after, for bytes from outside; nullptr: no room.
  // `written`: whether an op has, so that the bytes come too late.
  void* Pin(void* data, bool written);
  // The tensor that has it now owns it from here on.
  void Yield(void* data) { blocks_.erase(data); }

  // A tensor that is not the recording's own: it has to be where it was whenever the ops run again.
  void Need(size_t slot, const void* data) { needs_[slot] = data; }
  const std::map<size_t, const void*>& needs() const { return needs_; }

  void Note(NotedOp op) { ops_.push_back(std::move(op)); }
  const std::vector<NotedOp>& ops() const { return ops_; }

  // A device's form of the ops, once it was asked for.
  bool compiled = false;
  void* graph = nullptr;

 private:
  struct Held {
    size_t bytes = 0;
    bool again = false;  // an earlier op wrote there
    bool pinned = false;
  };

  Allocator* const allocator_;
  const int job_;
  bool open_ = true, broken_ = false;
  std::vector<NotedOp> ops_;
  std::map<size_t, const void*> needs_;
  std::map<void*, Held> blocks_;
  std::map<size_t, std::vector<void*>> free_;  // by Allocator::Rounded
};

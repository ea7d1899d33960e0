// What the engine brings into memory and out of it: mapped files, weights, host arrays.
#include <algorithm>
#include <cstring>

#include "core/engine.h"

void Engine::Map(const double* w, const std::shared_ptr<MappedFile>& file) {
  const size_t id = static_cast<size_t>(w[0]), offset = static_cast<size_t>(w[2]),
               bytes = static_cast<size_t>(w[3]);
  if (id >= slots_.size()) slots_.resize(id + 1);
  if (!file || offset + bytes > file->size())
    return FailWith("ERR_IO", "a mapped tensor lies outside its file");
  Slot& slot = slots_[id];
  slot.job = job_;
  const char* const source = file->data() + offset;
  if (backend_->memory) {  // a device does not see the file: its bytes are sent once
    if (Failed()) return;
    slot.data = allocator_.Allocate(bytes);
    if (!slot.data) return FailWithoutRoom(bytes);
    slot.allocated = true;
    slot.bytes = bytes;
    char error[256];
    if (const int32_t status = backend_->memory->upload(slot.data, source, bytes, error))
      return FailWith(status, error);
  } else {
    slot.data = const_cast<char*>(source);
    slot.bytes = bytes;
    slot.file = file;
  }
  slot.written = true;
}

void Engine::Write(const Command& command) {
  const size_t id = static_cast<size_t>(command.words[0]), offset = static_cast<size_t>(command.words[1]);
  if (id >= slots_.size() || !slots_[id].data || offset + command.payload.size() > slots_[id].bytes)
    return FailWith("ERR_SHAPE", "write: outside its tensor");
  // The bytes do not come again when the ops that read them do.
  if (Recording* const recording = slots_[id].recording; recording && recording->open()) {
    void* const pinned = recording->Pin(slots_[id].data, slots_[id].written);
    if (!pinned) return FailWithoutRoom(slots_[id].bytes);
    slots_[id].data = pinned;
  }
  char* const target = static_cast<char*>(slots_[id].data) + offset;
  char error[256];
  if (!backend_->memory)
    memcpy(target, command.payload.data(), command.payload.size());
  else if (const int32_t status =
               backend_->memory->upload(target, command.payload.data(), command.payload.size(), error))
    return FailWith(status, error);
  slots_[id].written = true;
}

void Engine::Read(Command& command) {
  const size_t id = static_cast<size_t>(command.words[0]), offset = static_cast<size_t>(command.words[1]);
  // What the reader waits for is the work of whoever made the tensor.
  if (id < slots_.size()) job_ = slots_[id].job;
  if (!Failed()) {
    if (id >= slots_.size() || (!slots_[id].written && command.bytes) ||
        offset + command.bytes > slots_[id].bytes) {
      FailWith("ERR_SHAPE", "read: outside its tensor, or the tensor was lost to an earlier error");
    } else if (command.bytes) {
      const char* const source = static_cast<const char*>(slots_[id].data) + offset;
      char error[256];
      if (!backend_->memory)
        memcpy(command.target, source, command.bytes);
      else if (const int32_t status =
                   backend_->memory->download(command.target, source, command.bytes, error))
        FailWith(status, error);
    }
  }
  command.done(TakeError(job_));
}

void Engine::Load(const double* w, MappedFile* file) {
  size_t at = 3;
  PfView view;
  Slot* slot = nullptr;
  if (!ReadOperand(w, &at, &view, &slot)) return FailWith("ERR_DEVICE", "load: the target tensor was lost");
  const int32_t from = static_cast<int32_t>(w[2]);
  size_t offset = static_cast<size_t>(w[1]);
  const int64_t n = PfCount(view), step = 1 << 20;
  const PfMemory* const memory = backend_->memory;
  const bool converts = from != view.dtype;
  std::vector<char> buffer;
  char* staged = nullptr;  // a part in the file's type, where the kernel can read it
  const size_t staged_bytes = std::min(n, step) * PfSize(from);
  if (memory && converts && n > 0) {
    staged = static_cast<char*>(allocator_.Allocate(staged_bytes));
    if (!staged) return FailWithoutRoom(staged_bytes);
  }
  int32_t status = PF_OK;
  std::string error;
  for (int64_t i = 0; i < n && status == PF_OK; i += step) {
    const int64_t count = std::min(step, n - i);
    const size_t bytes = count * PfSize(from);
    char* const target = static_cast<char*>(view.data) + i * PfSize(view.dtype);
    char* read = target;
    if (memory || converts) {
      buffer.resize(bytes);
      read = buffer.data();
    }
    if (!file || !file->Read(offset, read, bytes)) {
      status = PF_ERR_IO;
      error = "a weight file ended early: it was truncated or replaced while loading";
      break;
    }
    offset += bytes;
    if (memory) {
      char text[256] = "";
      status = memory->upload(converts ? staged : target, read, bytes, text);
      error = text;
      read = staged;
    }
    if (!converts || status != PF_OK) continue;
    const PfView source{read, from, 1, {count}}, part{target, view.dtype, 1, {count}};
    PfArgs args{&source, &part, nullptr, 1, 1, 0, nullptr};
    status = Call(PF_OP_cast, &args, &error);
  }
  if (staged) allocator_.Free(staged, staged_bytes);
  if (status != PF_OK) return FailWith(status, error.c_str());
  if (slot) slot->written = true;
}

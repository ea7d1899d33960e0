// The engine's recordings: noting a job's ops, and running them again.
#include "core/engine.h"

Recording* Engine::Open() {
  for (const auto& [id, recording] : recordings_)
    if (recording->open() && recording->job() == job_) return recording.get();
  return nullptr;
}

void Engine::Record(int id, bool begins) {
  if (!begins) {
    if (recordings_.count(id)) recordings_[id]->Close();
    return;
  }
  Forget(id);
  recordings_[id] = std::make_unique<Recording>(&allocator_, job_);
  if (Failed()) recordings_[id]->Break();
}

void Engine::Forget(int id) {
  const auto found = recordings_.find(id);
  if (found == recordings_.end()) return;
  Recording* const recording = found->second.get();
  for (Slot& slot : slots_)
    if (slot.recording == recording) {
      recording->Yield(slot.data);
      slot.recording = nullptr;
    }
  if (recording->graph) backend_->memory->drop(recording->graph);
  recordings_.erase(found);
}

int32_t Engine::Repeat(const NotedOp& noted, std::string* error) {
  PfArgs args{noted.in.data(),
              noted.out.data(),
              noted.scalars.data(),
              static_cast<int32_t>(noted.in.size()),
              static_cast<int32_t>(noted.out.size()),
              static_cast<int32_t>(noted.scalars.size()),
              nullptr};
  return Measure(noted.op, &args, error, nullptr, &noted);
}

// A device that can keeps the launches as one; when it says no, they are made one by one as before.
void Engine::Compile(Recording* recording) {
  recording->compiled = true;
  char text[256];
  std::string error;
  if (backend_->memory->capture(text) != PF_OK) return;
  capturing_ = true;
  int32_t status = PF_OK;
  for (size_t i = 0; i < recording->ops().size() && status == PF_OK; ++i)
    status = Repeat(recording->ops()[i], &error);
  capturing_ = false;
  void* graph = nullptr;
  const int32_t ended = backend_->memory->captured(&graph, text);
  if (status == PF_OK && ended == PF_OK)
    recording->graph = graph;
  else if (graph)
    backend_->memory->drop(graph);
}

void Engine::Replay(int id) {
  const auto found = recordings_.find(id);
  if (found == recordings_.end() || found->second->broken())
    return FailWith("ERR_DEVICE", "replay: what was recorded is not whole");
  Recording* const recording = found->second.get();
  for (const auto& [slot, data] : recording->needs())
    if (slot >= slots_.size() || slots_[slot].data != data)
      return FailWith("ERR_DEVICE", "replay: a tensor that was read or written is gone");
  const PfMemory* const memory = backend_->memory;
  std::string error;
  int32_t status = PF_OK;
  if (memory && memory->capture && !profiling_ && !trace_) {
    if (!recording->compiled) Compile(recording);
    if (recording->graph) {
      char text[256];
      status = memory->launch(recording->graph, text);
      if (status == PF_OK) status = memory->pace(text);
      if (status != PF_OK) FailWith(status, text);
      return;
    }
  }
  {
    std::lock_guard lock(mutex_);
    replaying_ = job_;
    stop_replay_ = false;
  }
  for (const NotedOp& noted : recording->ops()) {
    if (stop_replay_ || stop_) {
      FailWith("ERR_ABORTED", "work was dropped by engine.cancel()");
      break;
    }
    if ((status = Repeat(noted, &error)) == PF_OK) continue;
    FailWith(status, error.append(" in a repeated ").append(kOpNames[noted.op]).c_str());
    break;
  }
  std::lock_guard lock(mutex_);
  replaying_ = -1;
}

#include "core/engine.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "core/check.h"

const char* const kOpNames[PF_OP_COUNT] = {
#define PF_OP(folder, name, inputs, outputs, scalars) #name,
#include "ops.def"
#undef PF_OP
};

namespace {

constexpr int CountOf(const char* names) {
  int count = *names ? 1 : 0;
  for (; *names; ++names) count += *names == ',';
  return count;
}

struct Signature {
  int inputs, outputs, scalars;
};
constexpr Signature kSignatures[PF_OP_COUNT] = {
#define PF_OP(folder, name, inputs, outputs, scalars) {inputs, outputs, CountOf(scalars)},
#include "ops.def"
#undef PF_OP
};

const char* CodeOf(int32_t status) {
  switch (status) {
    case PF_ERR_SHAPE: return "ERR_SHAPE";
    case PF_ERR_DTYPE: return "ERR_DTYPE";
    case PF_ERR_OPTION: return "ERR_OPTION";
    case PF_ERR_MEMORY: return "ERR_MEMORY";
    case PF_ERR_IO: return "ERR_IO";
    default: return "ERR_DEVICE";
  }
}

std::string Describe(const PfView& v) {
  if (!PfPresent(v) && v.rank < 0) return "-";
  static const char* const kNames[] = {"f32", "bf16", "i32", "u8", "f16", "f64", "i64"};
  std::string text = v.dtype >= 0 && v.dtype <= PF_I64 ? kNames[v.dtype] : "?";
  text += "[";
  for (int i = 0; i < v.rank; ++i) text.append(i ? "," : "").append(std::to_string(v.dims[i]));
  return text.append("]");
}

struct ScratchContext : PfContext {
  Allocator* allocator;
  Recording* recording;
  const NotedOp* noted;
  std::vector<Block> blocks;
  size_t next = 0;  // of the noted blocks
};

void* Scratch(PfContext* self, size_t bytes) {
  auto* context = static_cast<ScratchContext*>(self);
  void* data = nullptr;
  if (context->noted) {  // kernels ask for the same every time, but for what they tried in vain
    const std::vector<Block>& blocks = context->noted->scratch;
    size_t& next = context->next;
    while (next < blocks.size() && blocks[next].bytes != bytes) ++next;
    if (next < blocks.size()) data = blocks[next++].data;
  } else {
    data = context->recording ? context->recording->Allocate(bytes) : context->allocator->Allocate(bytes);
  }
  if (data) context->blocks.push_back({data, bytes});
  return data;
}

constexpr int kSpinMicroseconds = 30;
constexpr size_t kMostSpare = 64;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// body(step) for the steps of a batch: length, kind, operands.
template <class Body>
void ForSteps(Command& batch, Body body) {
  for (size_t at = 0; at < batch.words.size(); at += static_cast<size_t>(batch.words[at]))
    body(batch.words.data() + at);
}

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Engine::Engine(const PfBackendTable* backend, int threads, int device, size_t max_memory)
    : backend_(backend),
      threads_(threads),
      device_(device),
      allocator_(max_memory, backend->memory),
      profile_calls_(PF_OP_COUNT, 0),
      profile_seconds_(PF_OP_COUNT, 0) {
  if (const char* path = std::getenv("PYRAFLOW_TRACE")) trace_ = std::fopen(path, "w");
  if (trace_) std::fputs("[\n", trace_);
  thread_ = std::thread([this] { Loop(); });
}

Engine::~Engine() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    queue_.clear();
  }
  wake_.notify_one();
  thread_.join();
  if (trace_) {
    std::fputs("{}]\n", trace_);
    std::fclose(trace_);
  }
}

std::unique_lock<std::mutex> Engine::Lock() {
  // Both sides hold it for tens of nanoseconds: going to sleep over it would cost a hundred times as much.
  for (int i = 0; i < 200; ++i) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) return lock;
    Pause();
  }
  return std::unique_lock(mutex_);
}

void Engine::Submit(std::span<Command> commands) {
  bool wake;
  {
    const auto lock = Lock();
    for (Command& command : commands) {
      queue_.push_back(std::move(command));
      command.words.clear();
      if (spare_.empty()) continue;
      command.words.swap(spare_.back());
      spare_.pop_back();
    }
    queued_ = queue_.size();
    wake = sleeping_;
  }
  if (wake) wake_.notify_one();
}

void Engine::Cancel(std::optional<int> job) {
  std::lock_guard lock(mutex_);
  if (replaying_ >= 0 && job.value_or(replaying_) == replaying_) stop_replay_ = true;
  for (Command& command : queue_) {
    if (command.kind != CommandKind::kBatch || job.value_or(command.job) != command.job) continue;
    ForSteps(command, [](double* w) {
      const auto kind = static_cast<CommandKind>(w[1]);
      if (kind == CommandKind::kRun || kind == CommandKind::kLoad || kind == CommandKind::kReplay)
        w[1] = static_cast<double>(CommandKind::kDropped);
    });
  }
}

bool Engine::Start() {
  // OpenMP, or a device's stream, belongs to this thread: no other thread ever computes.
  char error[256] = "";
  int32_t status = backend_->init(threads_, error);
  if (status == PF_OK && backend_->memory) status = backend_->memory->begin(device_, &lent_, error);
  if (status != PF_OK) fatal_ = std::string(CodeOf(status)) + " " + error;
  return status == PF_OK;
}

void Engine::Loop() {
  const bool started = Start();
  Command command;
  for (;;) {
    // Commands come in bursts, and waking a thread takes longer than a small op.
    if (queued_ == 0) {
      const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(kSpinMicroseconds);
      while (queued_ == 0 && !stop_ && std::chrono::steady_clock::now() < until)
        for (int i = 0; i < 16; ++i) Pause();
    }
    {
      auto lock = Lock();
      if (command.words.capacity() > 0 && spare_.size() < kMostSpare)
        spare_.push_back(std::move(command.words));
      sleeping_ = true;
      wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      sleeping_ = false;
      if (stop_) break;
      command = std::move(queue_.front());
      queue_.pop_front();
      queued_ = queue_.size();
    }
    Execute(command);
    // Files and payloads go at once; only the room for words is kept.
    std::vector<double> words = std::move(command.words);
    command = Command{};
    command.words = std::move(words);
  }
  // A device's memory can only be given back by the thread that has its stream.
  while (!recordings_.empty()) Forget(recordings_.begin()->first);
  for (Slot& slot : slots_) Release(slot);
  allocator_.Trim(0);
  if (started && backend_->memory) backend_->memory->end();
}

void Engine::FailWith(int32_t status, const char* error) { FailWith(CodeOf(status), error); }

void Engine::FailWithoutRoom(size_t bytes) {
  if (DeviceBroke()) return;
  FailWith("ERR_MEMORY", "could not allocate " + std::to_string(bytes) + " bytes (" +
                             std::to_string(allocator_.live()) +
                             " are live). Use a smaller size or batch, or raise maxMemory.");
}

// A device that broke gives no memory either.
bool Engine::DeviceBroke() {
  if (!backend_->memory || capturing_) return false;
  char error[256];
  const int32_t status = backend_->memory->synchronize(error);
  if (status != PF_OK) FailWith(status, error);
  return status != PF_OK;
}

void Engine::FailWith(const std::string& code, const std::string& message) {
  errors_.emplace(job_, code + " " + message);
}

std::string Engine::TakeError(int job) {
  if (!fatal_.empty()) return fatal_;
  const auto found = errors_.find(job);
  if (found == errors_.end()) return "";
  std::string error = std::move(found->second);
  errors_.erase(found);
  return error;
}

void Engine::Release(Slot& slot) {
  if (slot.recording)
    slot.recording->Free(slot.data);
  else if (slot.allocated)
    allocator_.Free(slot.data, slot.bytes);
  if (slot.file) slot.file->Forget(static_cast<char*>(slot.data) - slot.file->data(), slot.bytes);
  slot = Slot{};
}

void Engine::Execute(Command& command) {
  job_ = command.job;
  switch (command.kind) {
    case CommandKind::kWrite:
      if (!Failed()) Write(command);
      break;
    case CommandKind::kRead: Read(command); break;
    case CommandKind::kFence: {
      if (trace_) std::fflush(trace_);
      char error[256];
      if (backend_->memory && fatal_.empty())
        if (const int32_t status = backend_->memory->synchronize(error)) FailWith(status, error);
      command.done(TakeError(job_));
      break;
    }
    default: ForSteps(command, [&](double* w) { Step(static_cast<CommandKind>(w[1]), w + 2, command.file); });
  }
}

void Engine::Step(CommandKind kind, const double* w, const std::shared_ptr<MappedFile>& file) {
  switch (kind) {
    case CommandKind::kRun:
      if (!Failed()) Run(w);
      if (Recording* const recording = Failed() ? Open() : nullptr) recording->Break();
      break;
    case CommandKind::kAlloc: Allocate(static_cast<size_t>(w[0]), static_cast<size_t>(w[1])); break;
    case CommandKind::kFree:
      if (static_cast<size_t>(w[0]) < slots_.size()) Release(slots_[static_cast<size_t>(w[0])]);
      break;
    case CommandKind::kLoad:
      if (Recording* const recording = Open()) recording->Break();
      if (!Failed()) Load(w, file.get());
      break;
    case CommandKind::kMap: Map(w, file); break;
    case CommandKind::kRecord: Record(static_cast<int>(w[0]), w[1] != 0); break;
    case CommandKind::kReplay:
      if (!Failed()) Replay(static_cast<int>(w[0]));
      break;
    case CommandKind::kForget: Forget(static_cast<int>(w[0])); break;
    default:
      if (Recording* const recording = Open()) recording->Break();
      FailWith("ERR_ABORTED", "work was dropped by engine.cancel()");
  }
}

void Engine::Allocate(size_t id, size_t bytes) {
  if (id >= slots_.size()) slots_.resize(id + 1);
  Slot& slot = slots_[id];
  slot.job = job_;
  if (Failed()) return;  // its users are skipped anyway
  Recording* const recording = Open();
  slot.data = recording ? recording->Allocate(bytes) : allocator_.Allocate(bytes);
  if (!slot.data) return FailWithoutRoom(bytes);
  slot.bytes = bytes;
  slot.allocated = true;
  slot.recording = recording;
}

bool Engine::ReadOperand(const double* w, size_t* at, PfView* view, Slot** slot) {
  const double storage = w[(*at)++];
  *view = PfView{};
  if (storage < 0) {
    view->rank = -1;
    return true;
  }
  const size_t id = static_cast<size_t>(storage), offset = static_cast<size_t>(w[*at]);
  view->dtype = static_cast<int32_t>(w[*at + 1]);
  view->rank = static_cast<int32_t>(w[*at + 2]);
  *at += 3;
  for (int i = 0; i < view->rank; ++i) view->dims[i] = static_cast<int64_t>(w[(*at)++]);
  if (id >= slots_.size() || !slots_[id].data) return false;
  *slot = &slots_[id];
  if (offset + PfCount(*view) * PfSize(view->dtype) > slots_[id].bytes) return false;
  view->data = static_cast<char*>(slots_[id].data) + offset;
  return true;
}

void Engine::Run(const double* w) {
  const int op = static_cast<int>(w[0]), n_in = static_cast<int>(w[1]), n_out = static_cast<int>(w[2]),
            n_scalars = static_cast<int>(w[3]);
  constexpr int kMost = 16;
  if (op < 0 || op >= PF_OP_COUNT) return FailWith("ERR_DEVICE", "bad command");
  const Signature& wants = kSignatures[op];
  if (n_in > wants.inputs || n_out > wants.outputs || n_scalars != wants.scalars)
    return FailWith("ERR_DEVICE",
                    std::string(kOpNames[op]) + ": expected at most " + std::to_string(wants.inputs) +
                        " inputs and " + std::to_string(wants.outputs) + " outputs, and " +
                        std::to_string(wants.scalars) + " scalars, received " + std::to_string(n_in) + ", " +
                        std::to_string(n_out) + " and " + std::to_string(n_scalars));
  static_assert(std::ranges::all_of(
      kSignatures, [](const Signature& s) { return s.inputs <= kMost && s.outputs <= kMost; }));
  PfView in[kMost], out[kMost];
  // Kernels look at all operands of their op: those that were left out are missing ones.
  for (PfView* views : {in, out})
    for (int i = 0; i < kMost; ++i) views[i].rank = -1;
  size_t at = 4;
  bool sound = true;
  Slot *from[kMost] = {}, *to[kMost] = {};
  for (int i = 0; i < n_in; ++i) {
    sound &= ReadOperand(w, &at, &in[i], &from[i]);
    // Made by an op that failed or was skipped, perhaps in another job: not to be computed with.
    if (from[i] && !from[i]->written && PfCount(in[i]) > 0) sound = false;
  }
  for (int i = 0; i < n_out; ++i) sound &= ReadOperand(w, &at, &out[i], &to[i]);
  std::string operands;
  const auto describe = [&] {
    for (int i = 0; i < n_in; ++i) operands.append(i ? ", " : " (").append(Describe(in[i]));
    operands += n_in ? ")" : "";
    for (int i = 0; i < n_out; ++i) operands.append(i ? ", " : " -> ").append(Describe(out[i]));
    return operands;
  };
  if (!sound)
    return FailWith("ERR_DEVICE",
                    std::string(kOpNames[op]) + describe() + ": an operand was lost to an earlier error");
  if (!backend_->kernels[op])
    return FailWith("ERR_DEVICE", std::string(kOpNames[op]) + ": not available on " + backend_->name);

  PfArgs args{in, out, w + at, n_in, n_out, n_scalars, nullptr};
  std::string error;
  Recording* const recording = Open();
  if (recording)
    for (const auto& slots : {from, to})
      for (int i = 0; i < kMost; ++i)
        if (slots[i] && slots[i]->recording != recording)
          recording->Need(slots[i] - slots_.data(), slots[i]->data);
  const int32_t status = Measure(op, &args, &error, recording, nullptr);
  for (Slot* slot : to)
    if (slot && status == PF_OK) slot->written = true;
  if (status == PF_ERR_MEMORY && DeviceBroke()) return;
  if (status != PF_OK)
    FailWith(CodeOf(status), (error.empty() ? std::string(kOpNames[op]) + " failed" : error) + " in " +
                                 kOpNames[op] + describe());
}

int32_t Engine::Measure(int op, PfArgs* args, std::string* error, Recording* recording,
                        const NotedOp* noted) {
  if (!profiling_ && !trace_) return Call(op, args, error, recording, noted);
  const double begin = Now();
  int32_t status = Call(op, args, error, recording, noted);
  char text[256];  // what a device still does is not over when the call is
  if (status == PF_OK && backend_->memory && (status = backend_->memory->synchronize(text))) *error = text;
  const double end = Now();
  if (profiling_) {
    std::lock_guard lock(profile_mutex_);
    profile_calls_[op] += 1;
    profile_seconds_[op] += end - begin;
  }
  if (trace_)
    std::fprintf(trace_, "{\"name\":\"%s\",\"ph\":\"X\",\"pid\":1,\"tid\":1,\"ts\":%.1f,\"dur\":%.1f},\n",
                 kOpNames[op], begin * 1e6, (end - begin) * 1e6);
  return status;
}

int32_t Engine::Call(int op, PfArgs* args, std::string* error, Recording* recording, const NotedOp* noted) {
  ScratchContext context;
  static_cast<PfContext&>(context) = lent_;
  context.scratch = Scratch;
  context.error[0] = 0;
  context.allocator = &allocator_;
  context.recording = recording;
  context.noted = noted;
  args->context = &context;
  int32_t status = backend_->kernels[op](args);
  if (status == PF_OK && backend_->memory && !capturing_) status = backend_->memory->pace(context.error);
  // A device may still be reading: whoever gets the block next is queued behind it.
  if (!noted)
    for (const auto& [data, bytes] : context.blocks)
      recording ? recording->Free(data) : allocator_.Free(data, bytes);
  if (recording && status == PF_OK)
    recording->Note({op,
                     {args->in, args->in + args->n_in},
                     {args->out, args->out + args->n_out},
                     {args->scalars, args->scalars + args->n_scalars},
                     std::move(context.blocks)});
  *error = context.error;
  return status;
}

void Engine::Profile(bool enabled) {
  std::lock_guard lock(profile_mutex_);
  profile_calls_.assign(PF_OP_COUNT, 0);
  profile_seconds_.assign(PF_OP_COUNT, 0);
  profiling_ = enabled;
}

void Engine::ProfileRead(std::vector<double>* calls, std::vector<double>* seconds) {
  std::lock_guard lock(profile_mutex_);
  *calls = profile_calls_;
  *seconds = profile_seconds_;
}

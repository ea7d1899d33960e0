// The engine thread: executes commands in order and owns all memory. Commands belong to jobs: the first error
// of a job skips the rest of it until one of its fences or reads takes the error, and leaves other jobs
// alone.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "core/allocator.h"
#include "core/backend.h"
#include "core/mapped_file.h"
#include "core/recording.h"

// First number of a command in the shared buffer; lib/engine/engine.ts has those that JavaScript writes
// there.
enum class CommandKind : int {
  kRun = 0,
  kAlloc = 1,
  kFree = 2,
  kLoad = 3,
  kMap = 4,
  kWrite = 5,
  kRead = 6,
  kFence = 7,
  kDropped = 8,
  kBatch = 9,
  kRecord = 10,  // begins or ends a recording of the job's ops
  kReplay = 11,
  kForget = 12
};

struct Command {
  CommandKind kind = CommandKind::kBatch;
  int job = 0;
  // kBatch: commands as in the shared buffer, each behind its length with this word; else the operands of
  // one. An op comes with what allocates and frees around it: a thread fetches one row of numbers sooner than
  // three.
  std::vector<double> words;
  std::vector<char> payload;              // kWrite
  void* target = nullptr;                 // kRead
  size_t bytes = 0;                       // kRead
  std::shared_ptr<MappedFile> file;       // of a batch's kLoad, kMap
  std::function<void(std::string)> done;  // kRead, kFence: called on the engine thread with the error or ""
};

class Engine {
 public:
  Engine(const PfBackendTable* backend, int threads, int device, size_t max_memory);
  ~Engine();  // drops the queue, waits for the running op

  // Takes the commands; what is left in their place are empty ones with room for words, to be filled again.
  void Submit(std::span<Command> commands);
  // Drops the queued ops of a job, or all; allocations, frees and fences stay, and whoever waits for a
  // dropped op is told.
  void Cancel(std::optional<int> job);

  const Allocator& allocator() const { return allocator_; }
  void ResetPeak() { allocator_.ResetPeak(); }
  size_t queued() const { return queued_; }
  const PfBackendTable* backend() const { return backend_; }

  void Profile(bool enabled);
  void ProfileRead(std::vector<double>* calls, std::vector<double>* seconds);

 private:
  struct Slot {
    void* data = nullptr;
    size_t bytes = 0;
    std::shared_ptr<MappedFile> file;  // set when data points into a mapping
    bool allocated = false;
    int job = 0;                     // that allocated it
    Recording* recording = nullptr;  // that the memory belongs to, else the allocator
    bool written = false;            // by an op that succeeded, or from outside
  };

  std::unique_lock<std::mutex> Lock();
  void Loop();
  void Execute(Command& command);
  void Step(CommandKind kind, const double* words, const std::shared_ptr<MappedFile>& file);
  void Run(const double* words);
  void Allocate(size_t id, size_t bytes);
  void Load(const double* words, MappedFile* file);
  void Map(const double* words, const std::shared_ptr<MappedFile>& file);
  void Write(const Command& command);
  void Read(Command& command);
  bool Start();  // on the engine thread, once
  // One call of a kernel, with the job's open recording taken along (nullptr: none) or an op of a finished
  // one repeated; the status, and the kernel's sentence in *error.
  int32_t Call(int op, PfArgs* args, std::string* error, Recording* recording = nullptr,
               const NotedOp* noted = nullptr);
  // The same, timed where somebody wants to know.
  int32_t Measure(int op, PfArgs* args, std::string* error, Recording* recording, const NotedOp* noted);
  Recording* Open();  // of the job
  void Record(int id, bool begins);
  void Replay(int id);
  int32_t Repeat(const NotedOp& noted, std::string* error);
  void Compile(Recording* recording);
  void Forget(int id);
  bool ReadOperand(const double* words, size_t* at, PfView* view, Slot** slot);
  bool Failed() const { return !fatal_.empty() || (!errors_.empty() && errors_.count(job_)); }
  void FailWith(const std::string& code, const std::string& message);
  void FailWith(int32_t status, const char* error);
  std::string TakeError(int job);
  void FailWithoutRoom(size_t bytes);
  // Whether the device broke in an earlier kernel; that is then the job's error.
  bool DeviceBroke();
  void Release(Slot& slot);

  const PfBackendTable* const backend_;
  const int threads_, device_;
  PfContext lent_{};  // stream and faults of a device backend
  Allocator allocator_;
  std::vector<Slot> slots_;
  std::map<int, std::unique_ptr<Recording>> recordings_;
  int job_ = 0;  // of the command that is being executed
  std::map<int, std::string> errors_;
  std::string fatal_;  // the backend did not start: nothing will ever run

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Command> queue_;
  std::vector<std::vector<double>> spare_;  // words of commands that were executed
  std::atomic<size_t> queued_{0};
  std::atomic<bool> stop_{false};
  bool sleeping_ = false;
  int replaying_ = -1;  // the job whose recording runs
  std::atomic<bool> stop_replay_{false};

  std::mutex profile_mutex_;
  std::atomic<bool> profiling_{false};
  std::vector<double> profile_calls_, profile_seconds_;
  FILE* trace_ = nullptr;
  bool capturing_ = false;

  std::thread thread_;  // last: it uses everything above
};

extern const char* const kOpNames[PF_OP_COUNT];

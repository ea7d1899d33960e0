// The JavaScript side of the engine: numbers in the shared buffer become commands, fences become promises.
#include <dlfcn.h>
#include <napi.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <string>

#include "core/engine.h"

namespace {

std::string LibraryDirectory() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&LibraryDirectory), &info) || !info.dli_fname) return ".";
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

// A promise that the engine thread will settle. The target keeps a read's buffer alive meanwhile.
struct Pending {
  Napi::Promise::Deferred deferred;
  Napi::ObjectReference target;
  std::string error;
  explicit Pending(Napi::Env env) : deferred(env) {}
};

class Addon : public Napi::Addon<Addon> {
 public:
  Addon(Napi::Env env, Napi::Object exports) {
    DefineAddon(
        exports,
        {InstanceMethod("open", &Addon::Open), InstanceMethod("close", &Addon::Close),
         InstanceMethod("submit", &Addon::Submit), InstanceMethod("write", &Addon::Write),
         InstanceMethod("read", &Addon::Read), InstanceMethod("fence", &Addon::Fence),
         InstanceMethod("cancel", &Addon::Cancel), InstanceMethod("openFile", &Addon::OpenFile),
         InstanceMethod("closeFile", &Addon::CloseFile), InstanceMethod("memory", &Addon::Memory),
         InstanceMethod("resetPeak", &Addon::ResetPeak), InstanceMethod("packBytes", &Addon::PackBytes),
         InstanceMethod("profile", &Addon::Profile), InstanceMethod("profileRead", &Addon::ProfileRead),
         InstanceMethod("info", &Addon::Info), InstanceMethod("benchCeiling", &Addon::BenchCeiling)});
    env_ = env;
  }
  ~Addon() { Shutdown(); }

 private:
  [[noreturn]] static void Throw(Napi::Env env, const std::string& code, const std::string& message) {
    throw Napi::Error::New(env, code + " " + message);
  }

  // Process exit or worker termination: the engine thread must be gone before the environment. Node itself
  // ends the thread-safe function then; touching it again would be a use after free.
  static void OnExit(void* self) {
    auto* addon = static_cast<Addon*>(self);
    addon->hooked_ = false;
    addon->engine_.reset();
    addon->settle_ = nullptr;
    addon->files_.clear();
  }

  void Shutdown() {
    if (hooked_) napi_remove_env_cleanup_hook(env_, &Addon::OnExit, this);
    hooked_ = false;
    engine_.reset();
    if (settle_) {
      settle_.Abort();
      settle_ = nullptr;
    }
    files_.clear();
  }

  Engine& Running(Napi::Env env) {
    if (!engine_) Throw(env, "ERR_DEVICE", "the engine is not open");
    return *engine_;
  }

  Napi::Value Open(const Napi::CallbackInfo& info) {
    const Napi::Object options = info[0].As<Napi::Object>();
    if (engine_) Throw(info.Env(), "ERR_DEVICE", "the engine is already open");
    // Idle OpenMP workers would spin on the core that JavaScript needs. Read by libgomp when it is mapped.
    setenv("GOMP_SPINCOUNT", "20000", 0);
    const int device = options.Get("deviceIndex").ToNumber().Int32Value();
    const Backend backend = ChooseBackend(LibraryDirectory(), options.Get("backend").ToString(), device);
    if (!backend.table) Throw(info.Env(), "ERR_DEVICE", "no usable backend: " + backend.reason);
    const int threads = options.Get("threads").ToNumber().Int32Value();
    const auto limit = static_cast<size_t>(options.Get("maxMemory").ToNumber().DoubleValue());
    auto commands = options.Get("commands").As<Napi::Float64Array>();
    commands_reference_ = Napi::Persistent(commands.As<Napi::Object>());
    commands_ = commands.Data();
    command_length_ = commands.ElementLength();
    settle_ = Napi::ThreadSafeFunction::New(
        info.Env(), Napi::Function::New(info.Env(), [](const Napi::CallbackInfo&) {}), "pyraflow", 0, 1);
    settle_.Unref(info.Env());
    // Hooks run newest first: ours must come after the thread-safe function's own, to run before it.
    napi_add_env_cleanup_hook(info.Env(), &Addon::OnExit, this);
    hooked_ = true;
    engine_ = std::make_unique<Engine>(backend.table, threads, device, limit);
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("backend", backend.table->name);
    result.Set("threads", threads);
    return result;
  }

  Napi::Value Close(const Napi::CallbackInfo& info) {
    Shutdown();
    return info.Env().Undefined();
  }

  // Length of the command at `begin` of the buffer, walking its operands; 0 when it is malformed.
  size_t CommandLength(size_t begin) const {
    const double* c = commands_ + begin;
    const size_t most = command_length_ - begin;
    const auto operand = [c](size_t at) -> size_t {
      return c[at] < 0 ? 1 : 4 + static_cast<size_t>(c[at + 3]);
    };
    switch (static_cast<CommandKind>(static_cast<int>(c[0]))) {
      case CommandKind::kAlloc: return 3;
      case CommandKind::kFree: return 2;
      case CommandKind::kRecord: return 3;
      case CommandKind::kReplay: return 2;
      case CommandKind::kForget: return 2;
      case CommandKind::kMap: return 5;
      case CommandKind::kLoad: return 4 + operand(4);
      case CommandKind::kRun: {
        size_t at = 5;
        for (int i = static_cast<int>(c[2] + c[3]); i > 0; --i) {
          at += operand(at);
          if (at + 8 > most) return 0;
        }
        return at + static_cast<size_t>(c[4]);
      }
      default: return 0;
    }
  }

  // Every command up to the first negative word, as one batch; those that need a file are batches of their
  // own.
  Napi::Value Submit(const Napi::CallbackInfo& info) {
    Engine& engine = Running(info.Env());
    size_t count = 0, length = 0;
    bool alone = true;
    for (size_t at = 0; commands_[at] >= 0; at += length) {
      length = CommandLength(at);
      if (length == 0 || at + length + 1 >= command_length_)
        Throw(info.Env(), "ERR_DEVICE", "malformed command");
      const double* words = commands_ + at;
      const auto kind = static_cast<CommandKind>(static_cast<int>(words[0]));
      const bool load = kind == CommandKind::kLoad, map = kind == CommandKind::kMap;
      if (alone || load || map) {
        if (count == next_.size()) next_.emplace_back();
        next_[count].job = Job();
        next_[count++].words.clear();
      }
      Command& batch = next_[count - 1];
      batch.words.push_back(static_cast<double>(length + 1));
      batch.words.insert(batch.words.end(), words, words + length);
      alone = load || map;
      if (alone) batch.file = FileOf(static_cast<int>(words[load ? 1 : 2]));
    }
    engine.Submit({next_.data(), count});
    return Napi::Value();
  }

  // The last word of the shared buffer stays what JavaScript set it to from one command to the next.
  int Job() const { return static_cast<int>(commands_[command_length_ - 1]); }

  std::shared_ptr<MappedFile> FileOf(int id) const {
    const auto found = files_.find(id);
    return found == files_.end() ? nullptr : found->second;
  }

  struct Bytes {
    char* data;
    size_t size;
  };
  static Bytes ViewOf(const Napi::Value& value) {
    if (value.IsTypedArray()) {
      const auto array = value.As<Napi::TypedArray>();
      return {static_cast<char*>(array.ArrayBuffer().Data()) + array.ByteOffset(), array.ByteLength()};
    }
    if (!value.IsDataView()) Throw(value.Env(), "ERR_OPTION", "expected a typed array");
    const auto view = value.As<Napi::DataView>();
    return {static_cast<char*>(view.Data()), view.ByteLength()};
  }

  Napi::Value Write(const Napi::CallbackInfo& info) {
    const Bytes bytes = ViewOf(info[2]);
    Command command;
    command.kind = CommandKind::kWrite;
    command.job = Job();
    command.words = {info[0].ToNumber().DoubleValue(), info[1].ToNumber().DoubleValue()};
    command.payload.assign(bytes.data, bytes.data + bytes.size);
    Running(info.Env()).Submit({&command, 1});
    return info.Env().Undefined();
  }

  // Settles on the JavaScript thread; while something is pending the process stays alive.
  std::function<void(std::string)> Settler(Napi::Env env, std::unique_ptr<Pending> pending) {
    if (pending_count_++ == 0) settle_.Ref(env);
    Pending* raw = pending.release();
    Napi::ThreadSafeFunction settle = settle_;
    return [this, raw, settle](std::string error) {
      raw->error = std::move(error);
      settle.NonBlockingCall(raw, [this](Napi::Env inner, Napi::Function, Pending* done) {
        std::unique_ptr<Pending> owned(done);
        if (inner == nullptr) return;
        if (--pending_count_ == 0 && settle_) settle_.Unref(inner);
        if (owned->error.empty())
          owned->deferred.Resolve(inner.Undefined());
        else
          owned->deferred.Reject(Napi::Error::New(inner, owned->error).Value());
      });
    };
  }

  Napi::Value Read(const Napi::CallbackInfo& info) {
    Engine& engine = Running(info.Env());
    const Bytes bytes = ViewOf(info[2]);
    auto pending = std::make_unique<Pending>(info.Env());
    pending->target = Napi::Persistent(info[2].As<Napi::Object>());
    const Napi::Promise promise = pending->deferred.Promise();
    Command command;
    command.kind = CommandKind::kRead;
    command.job = Job();
    command.words = {info[0].ToNumber().DoubleValue(), info[1].ToNumber().DoubleValue()};
    command.target = bytes.data;
    command.bytes = bytes.size;
    command.done = Settler(info.Env(), std::move(pending));
    engine.Submit({&command, 1});
    return promise;
  }

  Napi::Value Fence(const Napi::CallbackInfo& info) {
    Engine& engine = Running(info.Env());
    auto pending = std::make_unique<Pending>(info.Env());
    const Napi::Promise promise = pending->deferred.Promise();
    Command command;
    command.kind = CommandKind::kFence;
    command.job = Job();
    command.done = Settler(info.Env(), std::move(pending));
    engine.Submit({&command, 1});
    return promise;
  }

  Napi::Value Cancel(const Napi::CallbackInfo& info) {
    Engine& engine = Running(info.Env());
    if (info[0].IsNumber())
      engine.Cancel(info[0].As<Napi::Number>().Int32Value());
    else
      engine.Cancel(std::nullopt);
    return info.Env().Undefined();
  }

  Napi::Value OpenFile(const Napi::CallbackInfo& info) {
    std::string error;
    auto file = MappedFile::Open(info[0].ToString(), &error);
    if (!file) Throw(info.Env(), "ERR_IO", error + ". Check the path and its permissions.");
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("id", next_file_);
    result.Set("size", static_cast<double>(file->size()));
    files_[next_file_++] = std::move(file);
    return result;
  }

  Napi::Value CloseFile(const Napi::CallbackInfo& info) {
    files_.erase(info[0].ToNumber().Int32Value());
    return info.Env().Undefined();
  }

  Napi::Value Memory(const Napi::CallbackInfo& info) {
    const Engine& engine = Running(info.Env());
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("live", static_cast<double>(engine.allocator().live()));
    result.Set("cached", static_cast<double>(engine.allocator().cached()));
    result.Set("peak", static_cast<double>(engine.allocator().peak()));
    result.Set("queued", static_cast<double>(engine.queued()));
    return result;
  }

  Napi::Value ResetPeak(const Napi::CallbackInfo& info) {
    Running(info.Env()).ResetPeak();
    return info.Env().Undefined();
  }

  Napi::Value PackBytes(const Napi::CallbackInfo& info) {
    const size_t bytes = Running(info.Env())
                             .backend()
                             ->pack_bytes(info[0].ToNumber().Int64Value(), info[1].ToNumber().Int64Value(),
                                          info[2].ToNumber().Int32Value(), info[3].ToNumber().Int32Value());
    return Napi::Number::New(info.Env(), static_cast<double>(bytes));
  }

  Napi::Value Profile(const Napi::CallbackInfo& info) {
    Running(info.Env()).Profile(info[0].ToBoolean());
    return info.Env().Undefined();
  }

  Napi::Value ProfileRead(const Napi::CallbackInfo& info) {
    std::vector<double> calls, seconds;
    Running(info.Env()).ProfileRead(&calls, &seconds);
    const auto array = [&](const std::vector<double>& from) {
      auto to = Napi::Float64Array::New(info.Env(), from.size());
      for (size_t i = 0; i < from.size(); ++i) to[i] = from[i];
      return to;
    };
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("calls", array(calls));
    result.Set("seconds", array(seconds));
    return result;
  }

  // Symbols that only bench/ calls; they stand in the backend's library beside its table.
  void* BackendSymbol(Napi::Env env, const char* name) {
    Dl_info where;
    const void* table = Running(env).backend();
    void* library = dladdr(table, &where) ? dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
    void* symbol = library ? dlsym(library, name) : nullptr;
    if (library) dlclose(library);  // the count of this dlopen only; the backend stays
    if (!symbol)
      Throw(env, "ERR_DEVICE", std::string(name) + " is not available on " + Running(env).backend()->name);
    return symbol;
  }

  // benchCeiling(kind, job): what the machine does without pyraflow, measured on the engine thread in the
  // queue's order. job holds the parameters and receives the result in job[0].
  Napi::Value BenchCeiling(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    Engine& engine = Running(env);
    const std::string kind = info[0].ToString();
    const Bytes bytes = ViewOf(info[1]);
    double* job = reinterpret_cast<double*>(bytes.data);
    if (bytes.size < 5 * sizeof(double))
      Throw(env, "ERR_OPTION", "benchCeiling: expected a job of 5 numbers");
    std::function<double()> measure;
    if (kind == "clock") {
      measure = [] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
      };
    } else if (kind == "matmul") {
      const auto f = reinterpret_cast<double (*)(int64_t, int64_t, int64_t, int32_t, double)>(
          BackendSymbol(env, "pf_bench_matmul"));
      measure = [f, job] {
        return f(static_cast<int64_t>(job[0]), static_cast<int64_t>(job[1]), static_cast<int64_t>(job[2]),
                 static_cast<int32_t>(job[3]), job[4]);
      };
    } else if (kind == "copy") {
      const auto f = reinterpret_cast<double (*)(int64_t, double)>(BackendSymbol(env, "pf_bench_copy"));
      measure = [f, job] { return f(static_cast<int64_t>(job[0]), job[1]); };
    } else if (kind == "multiply-add") {
      const auto f =
          reinterpret_cast<double (*)(int32_t, double)>(BackendSymbol(env, "pf_bench_multiply_add"));
      measure = [f, job] { return f(static_cast<int32_t>(job[0]), job[1]); };
    } else if (kind == "onednn") {
      const auto f = reinterpret_cast<int32_t (*)()>(BackendSymbol(env, "pf_bench_onednn_version"));
      measure = [f] { return static_cast<double>(f()); };
    } else {
      Throw(env, "ERR_OPTION",
            "benchCeiling: expected clock, matmul, copy, multiply-add or onednn, received " + kind);
    }
    auto pending = std::make_unique<Pending>(env);
    pending->target = Napi::Persistent(info[1].As<Napi::Object>());
    const Napi::Promise promise = pending->deferred.Promise();
    // A fence's callback is the one place where foreign work may run on the engine thread, between two
    // commands.
    Command command;
    command.kind = CommandKind::kFence;
    command.job = Job();
    command.done = [measure, job, settle = Settler(env, std::move(pending))](std::string error) {
      if (error.empty()) job[0] = measure();
      settle(std::move(error));
    };
    engine.Submit({&command, 1});
    return promise;
  }

  Napi::Value Info(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    const std::string directory = LibraryDirectory();
    Napi::Array backends = Napi::Array::New(env);
    uint32_t n = 0;
    const auto add = [&](const std::string& name, const std::string& reason, const std::string& detail = "") {
      Napi::Object row = Napi::Object::New(env);
      row.Set("name", name);
      row.Set("usable", reason.empty());
      row.Set("reason", reason);
      row.Set("detail", detail);
      backends.Set(n++, row);
    };
    for (const CpuLevel& level : CpuLevels()) {
      const std::string library = directory + "/libpyraflow_" + level.name + ".so";
      const bool installed = access(library.c_str(), R_OK) == 0;
      add(level.name, !level.unusable.empty() ? level.unusable : installed ? "" : "library is not installed");
    }
    const bool installed = access((directory + "/libpyraflow_cuda.so").c_str(), R_OK) == 0;
    const Backend cuda = installed ? OpenBackend(directory, "cuda") : Backend{};
    add("cuda", installed ? cuda.reason : "library is not installed", cuda.detail);
    Napi::Object result = Napi::Object::New(env);
    result.Set("backends", backends);
    result.Set("cores", static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN)));
    return result;
  }

  Napi::Env env_{nullptr};
  bool hooked_ = false;
  std::unique_ptr<Engine> engine_;
  Napi::ThreadSafeFunction settle_;
  Napi::ObjectReference commands_reference_;
  double* commands_ = nullptr;
  size_t command_length_ = 0;
  std::vector<Command> next_;  // taken again and again, each with room for its words
  int pending_count_ = 0;
  int next_file_ = 1;
  std::map<int, std::shared_ptr<MappedFile>> files_;
};

}  // namespace

NODE_API_ADDON(Addon)

// Runs every op's cases: pf_op_test [--filter name] [--level beginning of a name] [--backends dir]. Prints
// one line per failure and a summary.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include "backends/ref/ref.h"
#include "core/backend.h"
#include "core/half.h"
#include "core/op_test.h"

namespace op_test {
namespace {

struct Folder {
  std::string name;
  void (*run)(Test&);
};
std::vector<Folder>& Folders() {
  static std::vector<Folder> folders;
  return folders;
}

const char* const kOpNames[] = {
#define PF_OP(folder, name, inputs, outputs, scalars) #name,
#include "ops.def"
#undef PF_OP
};

const PfBackendTable* g_ref = nullptr;
std::vector<const PfBackendTable*> g_backends;
int g_passed = 0, g_failed = 0;

std::map<const PfBackendTable*, PfContext> g_lent;  // stream and faults of device backends

struct Context : PfContext {
  const PfMemory* memory = nullptr;
  std::vector<std::unique_ptr<char[]>> blocks;
  std::vector<void*> on_device;
  ~Context() {
    for (void* block : on_device) memory->release(block);
  }
};
void* Scratch(PfContext* self, size_t bytes) {
  auto& blocks = static_cast<Context*>(self)->blocks;
  if (const PfMemory* memory = static_cast<Context*>(self)->memory) {
    void* block = memory->allocate(bytes ? bytes : 1);
    if (block) static_cast<Context*>(self)->on_device.push_back(block);
    return block;
  }
  blocks.emplace_back(new char[bytes + 64]);
  const auto p = reinterpret_cast<uintptr_t>(blocks.back().get());
  return reinterpret_cast<void*>((p + 63) & ~uintptr_t{63});
}

// A buffer with a guard on both sides, optionally shifted by one element from its alignment.
struct Buffer {
  std::vector<char> bytes;
  PfView view{};
  static constexpr int kGuard = 128;

  void Make(int32_t dtype, const Dims& dims, bool shifted) {
    view.dtype = dtype;
    view.rank = static_cast<int32_t>(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) view.dims[i] = dims[i];
    const size_t size = PfCount(view) * PfSize(dtype);
    bytes.assign(size + 2 * kGuard + 128, static_cast<char>(0x5a));
    auto p = (reinterpret_cast<uintptr_t>(bytes.data()) + kGuard + 63) & ~uintptr_t{63};
    if (shifted) p += PfSize(dtype);
    view.data = reinterpret_cast<void*>(p);
  }
  bool GuardsIntact() const {
    const char* begin = static_cast<const char*>(view.data);
    const char* end = begin + PfCount(view) * PfSize(view.dtype);
    for (const char* p = bytes.data(); p < begin; ++p)
      if (*p != 0x5a) return false;
    for (const char* p = end; p < bytes.data() + bytes.size(); ++p)
      if (*p != 0x5a) return false;
    return true;
  }
};

PfView MissingView() {
  PfView v{};
  v.rank = -1;
  return v;
}

int32_t FloatType(Kind kind, int32_t swept) {
  return kind == Kind::kInt ? PF_I32 : kind == Kind::kU8 ? PF_U8 : kind == Kind::kF32 ? PF_F32 : swept;
}

int OpIndex(const std::string& name) {
  for (int i = 0; i < PF_OP_COUNT; ++i)
    if (name == kOpNames[i]) return i;
  std::fprintf(stderr, "unknown op %s\n", name.c_str());
  std::exit(2);
}

std::string Describe(const std::vector<Operand>& operands) {
  std::string text;
  for (const Operand& o : operands) {
    text += o.kind == Kind::kMissing ? "-" : "[";
    for (size_t i = 0; i < o.dims.size(); ++i) text += (i ? "," : "") + std::to_string(o.dims[i]);
    if (o.kind != Kind::kMissing) text += "]";
  }
  return text;
}

}  // namespace

Register::Register(const char* folder, void (*run)(Test&)) { Folders().push_back({folder, run}); }

Case::Case(std::string op, uint64_t seed)
    : op_(std::move(op)), op_index_(OpIndex(op_)), state_(seed * 0x9e3779b97f4a7c15ull + op_index_ + 1) {}

std::vector<double> Case::Normal(int64_t n, double scale) {
  std::vector<double> values(n);
  auto uniform = [this] {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<double>((state_ >> 11) + 1) / 9007199254740993.0;
  };
  for (double& v : values)
    v = scale * std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform());
  return values;
}

Case& Case::Add(std::vector<Operand>& list, Kind kind, Dims dims, bool in_out) {
  Operand o{kind, std::move(dims), {}, in_out};
  list.push_back(std::move(o));
  return *this;
}

static int64_t Count(const Dims& dims) {
  int64_t n = 1;
  for (int64_t d : dims) n *= d;
  return n;
}

Case& Case::In(Dims dims, double scale) {
  Add(in_, Kind::kSweep, dims);
  in_.back().values = Normal(Count(dims), scale);
  return *this;
}
Case& Case::InF32(Dims dims, double scale) {
  In(std::move(dims), scale);
  in_.back().kind = Kind::kF32;
  return *this;
}
Case& Case::InValues(Dims dims, Values fn) {
  Add(in_, Kind::kSweep, dims);
  for (int64_t i = 0; i < Count(dims); ++i) in_.back().values.push_back(fn(i));
  return *this;
}
Case& Case::InInt(Dims dims, Values fn) {
  InValues(std::move(dims), std::move(fn));
  in_.back().kind = Kind::kInt;
  return *this;
}
Case& Case::InU8(Dims dims, Values fn) {
  InValues(std::move(dims), std::move(fn));
  in_.back().kind = Kind::kU8;
  return *this;
}
Case& Case::Missing() { return Add(in_, Kind::kMissing, {}); }
Case& Case::Out(Dims dims) { return Add(out_, Kind::kSweep, std::move(dims)); }
Case& Case::OutF32(Dims dims) { return Add(out_, Kind::kF32, std::move(dims)); }
Case& Case::OutU8(Dims dims) { return Add(out_, Kind::kU8, std::move(dims)); }
Case& Case::OutInt(Dims dims) { return Add(out_, Kind::kInt, std::move(dims)); }
Case& Case::InOut(Dims dims) {
  Add(out_, Kind::kSweep, dims, true);
  out_.back().values = Normal(Count(dims), 1);
  return *this;
}
Case& Case::InOutF32(Dims dims) {
  InOut(std::move(dims));
  out_.back().kind = Kind::kF32;
  return *this;
}
Case& Case::OutMissing() { return Add(out_, Kind::kMissing, {}); }
Case& Case::Scalars(std::vector<double> scalars) {
  scalars_ = std::move(scalars);
  return *this;
}
Case& Case::Tolerance(double f32, double bf16) {
  tolerance_f32_ = f32;
  tolerance_bf16_ = bf16;
  return *this;
}
Case& Case::F32Only() {
  f32_only_ = true;
  return *this;
}

static bool IsGpu(const PfBackendTable* backend) { return !std::strcmp(backend->name, "cuda"); }
bool HasGpu() { return std::any_of(g_backends.begin(), g_backends.end(), IsGpu); }

Case& Case::OnGpu(int repeats) {
  repeats_ = repeats;
  return *this;
}

// Copies of operands, guards included, where a device backend can reach them; back again on Fetch.
class OnDevice {
 public:
  OnDevice(const PfMemory* memory, std::vector<Buffer>& buffers, std::vector<PfView>* views)
      : memory_(memory) {
    if (!memory) return;
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (!PfPresent((*views)[i])) continue;
      Buffer& buffer = buffers[i];
      char* const block = static_cast<char*>(memory->allocate(buffer.bytes.size() + 64));
      // The same place in a line of 64 bytes, so that alignment is what the case asked for.
      char* const copy = block + reinterpret_cast<uintptr_t>(buffer.bytes.data()) % 64;
      copies_.push_back({&buffer, block, copy});
      (*views)[i].data = copy + (static_cast<char*>(buffer.view.data) - buffer.bytes.data());
    }
    Move(true);
  }
  ~OnDevice() {
    for (const Copy& copy : copies_) memory_->release(copy.block);
  }
  void Fetch() { Move(false); }

 private:
  struct Copy {
    Buffer* buffer;
    char *block, *data;
  };
  void Move(bool up) {
    char error[256] = "";
    for (const Copy& copy : copies_) {
      std::vector<char>& bytes = copy.buffer->bytes;
      const int32_t status = up ? memory_->upload(copy.data, bytes.data(), bytes.size(), error)
                                : memory_->download(bytes.data(), copy.data, bytes.size(), error);
      if (status != PF_OK) std::printf("FAIL transfer: %s\n", error), ++g_failed;
    }
  }
  const PfMemory* memory_;
  std::vector<Copy> copies_;
};

static int32_t Call(const PfBackendTable* table, int op, const std::vector<PfView>& in,
                    const std::vector<PfView>& out, const std::vector<double>& scalars, std::string* error) {
  Context context;
  if (table->memory) static_cast<PfContext&>(context) = g_lent[table];
  context.memory = table->memory;
  context.scratch = Scratch;
  context.error[0] = 0;
  PfArgs args{in.data(),
              out.data(),
              scalars.data(),
              static_cast<int32_t>(in.size()),
              static_cast<int32_t>(out.size()),
              static_cast<int32_t>(scalars.size()),
              &context};
  if (!table->kernels[op]) {
    *error = "no kernel";
    return PF_ERR_DEVICE;
  }
  int32_t status = table->kernels[op](&args);
  if (status == PF_OK && table->memory) status = table->memory->synchronize(context.error);
  *error = context.error;
  return status;
}

Case& Case::FromRef(std::string op, std::vector<int> inputs, std::vector<double> scalars,
                    std::vector<Dims> outputs, int which, bool f32) {
  std::vector<Buffer> in(inputs.size()), out(outputs.size());
  std::vector<PfView> in_views, out_views;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i] < 0 || in_[inputs[i]].kind == Kind::kMissing) {
      in_views.push_back(MissingView());
      continue;
    }
    const Operand& o = in_[inputs[i]];
    in[i].Make(FloatType(o.kind, PF_F64) == PF_F32 ? PF_F64 : FloatType(o.kind, PF_F64), o.dims, false);
    for (size_t k = 0; k < o.values.size(); ++k) Set(in[i].view, k, o.values[k]);
    in_views.push_back(in[i].view);
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    out[i].Make(PF_F64, outputs[i], false);
    for (int64_t k = 0; k < Count(outputs[i]); ++k) Set(out[i].view, k, 0);
    out_views.push_back(out[i].view);
  }
  std::string error;
  if (Call(g_ref, OpIndex(op), in_views, out_views, scalars, &error) != PF_OK)
    std::printf("FAIL %s: reference refused: %s\n", op.c_str(), error.c_str()), ++g_failed;
  Add(in_, f32 ? Kind::kF32 : Kind::kSweep, outputs[which]);
  for (int64_t k = 0; k < Count(outputs[which]); ++k) in_.back().values.push_back(Get(out[which].view, k));
  return *this;
}

void Case::RunOne(const PfBackendTable* backend, bool bf16, bool unaligned, int32_t expected) {
  const int32_t swept = bf16 ? PF_BF16 : PF_F32;
  std::vector<Buffer> in(in_.size()), ref_in(in_.size()), out(out_.size()), ref_out(out_.size());
  std::vector<PfView> in_v, ref_in_v, out_v, ref_out_v;
  for (size_t i = 0; i < in_.size(); ++i) {
    if (in_[i].kind == Kind::kMissing) {
      in_v.push_back(MissingView());
      ref_in_v.push_back(MissingView());
      continue;
    }
    const int32_t type = FloatType(in_[i].kind, swept);
    in[i].Make(type, in_[i].dims, unaligned);
    ref_in[i].Make(type == PF_F32 || type == PF_BF16 ? PF_F64 : type, in_[i].dims, false);
    for (size_t k = 0; k < in_[i].values.size(); ++k) {
      Set(in[i].view, k, in_[i].values[k]);
      Set(ref_in[i].view, k, Get(in[i].view, k));  // the judge sees the rounded value
    }
    in_v.push_back(in[i].view);
    ref_in_v.push_back(ref_in[i].view);
  }
  for (size_t i = 0; i < out_.size(); ++i) {
    if (out_[i].kind == Kind::kMissing) {
      out_v.push_back(MissingView());
      ref_out_v.push_back(MissingView());
      continue;
    }
    const int32_t type = FloatType(out_[i].kind, swept);
    out[i].Make(type, out_[i].dims, unaligned);
    ref_out[i].Make(type == PF_F32 || type == PF_BF16 ? PF_F64 : type, out_[i].dims, false);
    for (int64_t k = 0; k < Count(out_[i].dims); ++k) {
      const double before = out_[i].in_out ? out_[i].values[k] : NAN;
      Set(out[i].view, k, before);
      Set(ref_out[i].view, k, out_[i].in_out ? Get(out[i].view, k) : 0);
    }
    out_v.push_back(out[i].view);
    ref_out_v.push_back(ref_out[i].view);
  }
  const std::string label = std::string(backend->name) + " " + op_ + Describe(in_) + "->" + Describe(out_) +
                            (bf16 ? " bf16" : " f32") + (unaligned ? " unaligned" : "");
  auto fail = [&](const std::string& why) {
    ++g_failed;
    std::printf("FAIL %s: %s\n", label.c_str(), why.c_str());
  };
  std::string error;
  OnDevice device_in(backend->memory, in, &in_v), device_out(backend->memory, out, &out_v);
  const int32_t status = Call(backend, op_index_, in_v, out_v, scalars_, &error);
  device_in.Fetch();
  device_out.Fetch();
  const char* const most = std::getenv("PF_REPEATS");  // fewer under tools that slow everything down
  const int repeats = most ? std::min(std::atoi(most), repeats_) : repeats_;
  for (int i = 0; i < repeats && status == PF_OK; ++i) {
    const std::vector<Buffer> before = out;
    if (Call(backend, op_index_, in_v, out_v, scalars_, &error) != PF_OK) return fail("again: " + error);
    device_out.Fetch();
    for (size_t k = 0; k < out.size(); ++k)
      if (out[k].bytes != before[k].bytes) return fail("other bits when run again");
  }
  if (status != expected) return fail("status " + std::to_string(status) + " " + error);
  if (expected != PF_OK) {
    if (error.empty()) return fail("refused without a message");
    ++g_passed;
    return;
  }
  if (Call(g_ref, op_index_, ref_in_v, ref_out_v, scalars_, &error) != PF_OK)
    return fail("reference: " + error);
  const double tolerance = bf16 ? tolerance_bf16_ : tolerance_f32_;
  for (size_t i = 0; i < out_.size(); ++i) {
    if (out_[i].kind == Kind::kMissing) continue;
    if (!out[i].GuardsIntact()) return fail("output " + std::to_string(i) + " wrote outside its bounds");
    double difference = 0, norm = 0, worst = 0;
    int64_t at = -1;
    for (int64_t k = 0; k < Count(out_[i].dims); ++k) {
      const double got = Get(out[i].view, k), want = Get(ref_out[i].view, k);
      if (got == want || (got != got && want != want)) {
        norm += want == want && std::isfinite(want) ? want * want : 0;
        continue;
      }
      double d = got - want;
      if (!std::isfinite(d)) d = 1e30;
      difference += d * d;
      norm += std::isfinite(want) ? want * want : 0;
      if (std::fabs(d) > worst) worst = std::fabs(d), at = k;
    }
    const double relative = std::sqrt(difference) / (std::sqrt(norm) + 1e-30);
    if (relative > tolerance) {
      char text[200];
      std::snprintf(text, sizeof(text), "output %zu relative %.3g > %.3g, worst at %lld: got %.9g want %.9g",
                    i, relative, tolerance, static_cast<long long>(at), Get(out[i].view, at),
                    Get(ref_out[i].view, at));
      return fail(text);
    }
  }
  for (size_t i = 0; i < in_.size(); ++i)
    if (in_[i].kind != Kind::kMissing && !in[i].GuardsIntact()) return fail("wrote outside an input");
  ++g_passed;
}

void Case::Run() {
  for (const PfBackendTable* backend : g_backends) {
    if (!backend->kernels[op_index_]) continue;  // a library of some op folders only
    if (repeats_ >= 0) {
      if (IsGpu(backend)) RunOne(backend, true, false, PF_OK);
      continue;
    }
    for (int bf16 = 0; bf16 <= (f32_only_ ? 0 : 1); ++bf16)
      for (int unaligned = 0; unaligned <= 1; ++unaligned) RunOne(backend, bf16, unaligned, PF_OK);
  }
}

void Case::RunExpecting(int32_t status) {
  for (const PfBackendTable* backend : g_backends)
    if (backend->kernels[op_index_]) RunOne(backend, false, false, status);
}

}  // namespace op_test

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF,
               0);  // what failed is known even if the process does not end by itself
  std::string filter, only, directory = PF_OUT_DIR;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!std::strcmp(argv[i], "--filter")) filter = argv[i + 1];
    if (!std::strcmp(argv[i], "--level")) only = argv[i + 1];
    if (!std::strcmp(argv[i], "--backends")) directory = argv[i + 1];
  }
  const Backend ref = OpenBackend(directory, "ref");
  if (!ref.table) return std::fprintf(stderr, "ref: %s\n", ref.reason.c_str()), 1;
  op_test::g_ref = ref.table;
  char error[256] = "";
  std::vector<CpuLevel> levels = CpuLevels();
  for (size_t i = 0; i < levels.size();
       ++i)  // AMX code with its tiles emulated runs where the dot products do
    if (levels[i].name == "cpu_avx512_bf16") levels.push_back({"cpu_amx_emulated", levels[i].unusable});
  levels.push_back({"cuda", ""});
  levels.push_back({"cuda_emulated", ""});
  for (const CpuLevel& level : levels) {
    if (level.name.rfind(only, 0) != 0) continue;
    if (!level.unusable.empty()) {
      std::printf("skipped %s: %s\n", level.name.c_str(), level.unusable.c_str());
      continue;
    }
    const Backend backend = OpenBackend(directory, level.name);
    if (!backend.table) {
      std::printf("skipped %s: %s\n", level.name.c_str(), backend.reason.c_str());
      continue;
    }
    if (backend.table->init(2, error) != PF_OK)
      return std::fprintf(stderr, "%s: %s\n", level.name.c_str(), error), 1;
    if (backend.table->memory &&
        backend.table->memory->begin(0, &op_test::g_lent[backend.table], error) != PF_OK)
      return std::fprintf(stderr, "%s: %s\n", level.name.c_str(), error), 1;
    op_test::g_backends.push_back(backend.table);
  }
  for (const auto& folder : op_test::Folders()) {
    if (!filter.empty() && folder.name.find(filter) == std::string::npos) continue;
    const int before = op_test::g_passed, failed = op_test::g_failed;
    op_test::Test test;
    folder.run(test);
    std::printf("%-12s %d passed, %d failed\n", folder.name.c_str(), op_test::g_passed - before,
                op_test::g_failed - failed);
  }
  std::printf("native op cases: %d passed, %d failed\n", op_test::g_passed, op_test::g_failed);
  return op_test::g_failed || op_test::g_backends.empty() || op_test::g_passed == 0;
}

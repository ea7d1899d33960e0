#include "backends/cuda/cublaslt.h"

#if defined(PF_CUDA_EMULATED)

bool CublasLtMatmul(const PfArgs*, const GemmProblem&, int32_t, const CublasLtOperand&,
                    const CublasLtOperand&) {
  return false;
}
const char* CublasLtState() { return "not used by the emulator"; }

#else

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>

namespace {

// What we need of cublasLt.h and library_types.h. These numbers are part of the library's ABI and the same in
// all versions from 11 on.
enum DataType : int32_t { kF32 = 0, kBf16 = 14 };
enum ComputeType : int32_t { kCompute32F = 68 };  // f32 operands keep all their digits
enum Operation : int32_t { kPlain = 0, kTransposed = 1 };
enum DescAttribute : int32_t { kDescTransA = 3, kDescTransB = 4, kDescEpilogue = 7, kDescBias = 8 };
enum LayoutAttribute : int32_t { kLayoutBatch = 5, kLayoutStride = 6 };
enum PreferenceAttribute : int32_t {
  kMostWorkspace = 1,
  kReductions = 3,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8,
};
enum Epilogue : uint32_t { kDefault = 1, kBias = 4, kGelu = 32 };
enum ReductionScheme : uint32_t { kInComputeType = 2 };  // parts of a split sum are f32, added in order

typedef struct LtContext* LtHandle;
typedef struct LtDesc* LtMatmulDesc;
typedef struct LtLayout* LtMatrixLayout;
typedef struct LtPreference* LtMatmulPreference;

struct LtHeuristicResult {
  uint64_t algorithm[8];
  size_t workspace;
  int32_t status;
  float waves;
  int32_t reserved[4];
};
static_assert(sizeof(LtHeuristicResult) == 96);

struct Library {
  int32_t (*Create)(LtHandle*);
  int32_t (*Destroy)(LtHandle);
  size_t (*GetVersion)();
  int32_t (*MatmulDescCreate)(LtMatmulDesc*, int32_t compute, int32_t scale);
  int32_t (*MatmulDescDestroy)(LtMatmulDesc);
  int32_t (*MatmulDescSetAttribute)(LtMatmulDesc, int32_t, const void*, size_t);
  int32_t (*MatrixLayoutCreate)(LtMatrixLayout*, int32_t type, uint64_t rows, uint64_t columns, int64_t line);
  int32_t (*MatrixLayoutDestroy)(LtMatrixLayout);
  int32_t (*MatrixLayoutSetAttribute)(LtMatrixLayout, int32_t, const void*, size_t);
  int32_t (*MatmulPreferenceCreate)(LtMatmulPreference*);
  int32_t (*MatmulPreferenceDestroy)(LtMatmulPreference);
  int32_t (*MatmulPreferenceSetAttribute)(LtMatmulPreference, int32_t, const void*, size_t);
  int32_t (*MatmulAlgoGetHeuristic)(LtHandle, LtMatmulDesc, LtMatrixLayout a, LtMatrixLayout b,
                                    LtMatrixLayout c, LtMatrixLayout d, LtMatmulPreference, int wanted,
                                    LtHeuristicResult*, int* found);
  int32_t (*Matmul)(LtHandle, LtMatmulDesc, const void* alpha, const void* a, LtMatrixLayout, const void* b,
                    LtMatrixLayout, const void* beta, const void* c, LtMatrixLayout, void* d, LtMatrixLayout,
                    const void* algorithm, void* workspace, size_t bytes, void* stream);
  bool usable = false;
  std::string state;

  Library();
  void* Open();
};

void* Library::Open() {
  if (const char* named = getenv("PYRAFLOW_CUBLASLT"); named && *named) {
    if (!strcmp(named, "off")) {
      state = "switched off by PYRAFLOW_CUBLASLT";
      return nullptr;
    }
    state = named;
    void* const library = dlopen(named, RTLD_NOW | RTLD_LOCAL);
    if (!library) state = std::string("not usable: ") + dlerror();
    return library;
  }
  std::string folders[] = {"", "", "", "/usr/local/cuda/lib64/"};
  const char* const variables[] = {"CUDA_HOME", "CUDA_PATH"};
  for (int i = 0; i < 2; ++i)
    if (const char* root = getenv(variables[i]); root && *root)
      folders[1 + i] = std::string(root) + "/lib64/";
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11", "libcublasLt.so"})
    for (const std::string& folder : folders) {
      state = folder + name;
      if (void* library = dlopen(state.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    }
  state = "not installed; our own kernels are used instead";
  return nullptr;
}

Library::Library() {
  void* const library = Open();
  if (!library) return;
  usable = true;
  const auto find = [&](auto& function, const char* name) {
    const std::string symbol = std::string("cublasLt") + name;
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol.c_str()));
    if (function || !usable) return;
    usable = false;
    state += " is not usable: it has no " + symbol;
  };
  find(Create, "Create");
  find(Destroy, "Destroy");
  find(GetVersion, "GetVersion");
  find(MatmulDescCreate, "MatmulDescCreate");
  find(MatmulDescDestroy, "MatmulDescDestroy");
  find(MatmulDescSetAttribute, "MatmulDescSetAttribute");
  find(MatrixLayoutCreate, "MatrixLayoutCreate");
  find(MatrixLayoutDestroy, "MatrixLayoutDestroy");
  find(MatrixLayoutSetAttribute, "MatrixLayoutSetAttribute");
  find(MatmulPreferenceCreate, "MatmulPreferenceCreate");
  find(MatmulPreferenceDestroy, "MatmulPreferenceDestroy");
  find(MatmulPreferenceSetAttribute, "MatmulPreferenceSetAttribute");
  find(MatmulAlgoGetHeuristic, "MatmulAlgoGetHeuristic");
  find(Matmul, "Matmul");
  if (usable) state += " (version " + std::to_string(GetVersion()) + ")";
}

const Library& Lt() {
  static const Library library;
  return library;
}

// All that the choice of an algorithm depends on. Compared as bytes, so it has no gaps.
struct Key {
  int64_t batch, m, n, k, a_line, a_batch, b_line, b_batch, workspace;
  uint32_t epilogue;
  int32_t dtype, y_dtype, trans_a, trans_b, beta;
  uint32_t alignment[4];  // of b, a, c, y and c: the library's A, B, C, D
  bool operator<(const Key& other) const { return memcmp(this, &other, sizeof(Key)) < 0; }
};
static_assert(sizeof(Key) == 9 * 8 + 6 * 4 + 4 * 4);

// Handles of one product. The library is column-major, so it is told that y^T = b^T a^T: its A is our b.
struct Plan {
  LtMatmulDesc desc = nullptr;
  LtMatrixLayout a = nullptr, b = nullptr, y = nullptr;
  LtHeuristicResult choice = {};
  bool usable = false;

  Plan(LtHandle handle, const Key& key, const void* bias);
  ~Plan() {
    if (desc) Lt().MatmulDescDestroy(desc);
    for (LtMatrixLayout layout : {a, b, y})
      if (layout) Lt().MatrixLayoutDestroy(layout);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
};

Plan::Plan(LtHandle handle, const Key& key, const void* bias) {
  const Library& lt = Lt();
  bool good = true;
  const auto layout = [&](LtMatrixLayout* to, int32_t dtype, int64_t rows, int64_t columns, int64_t line,
                          int64_t batch) {
    const int32_t entries = static_cast<int32_t>(key.batch);
    good = good && !lt.MatrixLayoutCreate(to, dtype == PF_BF16 ? kBf16 : kF32, rows, columns, line) &&
           !lt.MatrixLayoutSetAttribute(*to, kLayoutBatch, &entries, sizeof(entries)) &&
           !lt.MatrixLayoutSetAttribute(*to, kLayoutStride, &batch, sizeof(batch));
  };
  const auto describe = [&](int32_t attribute, auto value) {
    good = good && !lt.MatmulDescSetAttribute(desc, attribute, &value, sizeof(value));
  };
  good = !lt.MatmulDescCreate(&desc, kCompute32F, kF32);
  describe(kDescTransA, int32_t{key.trans_b ? kTransposed : kPlain});
  describe(kDescTransB, int32_t{key.trans_a ? kTransposed : kPlain});
  describe(kDescEpilogue, key.epilogue);
  if (bias) describe(kDescBias, bias);  // the choice looks at its alignment
  layout(&b, key.dtype, key.trans_b ? key.k : key.n, key.trans_b ? key.n : key.k, key.b_line, key.b_batch);
  layout(&a, key.dtype, key.trans_a ? key.m : key.k, key.trans_a ? key.k : key.m, key.a_line, key.a_batch);
  layout(&y, key.y_dtype, key.n, key.m, key.n, key.m * key.n);

  LtMatmulPreference preference = nullptr;
  good = good && !lt.MatmulPreferenceCreate(&preference);
  const auto prefer = [&](int32_t attribute, auto value) {
    good = good && !lt.MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
  };
  prefer(kMostWorkspace, static_cast<uint64_t>(key.workspace));
  prefer(kReductions, uint32_t{kInComputeType});
  prefer(kAlignmentA, key.alignment[0]);
  prefer(kAlignmentB, key.alignment[1]);
  prefer(kAlignmentC, key.alignment[2]);
  prefer(kAlignmentD, key.alignment[3]);
  int found = 0;
  good = good && !lt.MatmulAlgoGetHeuristic(handle, desc, b, a, y, y, preference, 1, &choice, &found);
  usable = good && found > 0 && choice.status == 0;
  if (preference) lt.MatmulPreferenceDestroy(preference);
}

// Every engine thread has a handle and plans of its own.
class Session {
 public:
  Session() {
    if (Lt().Create(&handle_) != 0) handle_ = nullptr;
  }
  ~Session() {
    plans_.clear();
    if (handle_) Lt().Destroy(handle_);
  }
  LtHandle Handle() const { return handle_; }
  Plan& PlanOf(const Key& key, const void* bias) {
    const auto found = plans_.find(key);
    if (found != plans_.end()) return found->second;
    if (plans_.size() >= kMostPlans) plans_.clear();
    return plans_.try_emplace(key, handle_, key, bias).first->second;
  }

 private:
  static constexpr size_t kMostPlans = 4096;  // lengths of many clips
  LtHandle handle_ = nullptr;
  std::map<Key, Plan> plans_;
};

uint32_t AlignmentOf(const void* p) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) | 256;
  return static_cast<uint32_t>(at & -at);
}

}  // namespace

bool CublasLtMatmul(const PfArgs* args, const GemmProblem& p, int32_t dtype, const CublasLtOperand& a,
                    const CublasLtOperand& b) {
  const Library& lt = Lt();
  if (!lt.usable) return false;
  const bool bias = PfPresent(p.bias), residual = PfPresent(p.residual);
  // Left to us: what would round or multiply in another order, and gelu where its (bf16's) precision shows.
  if (bias && p.bias.dtype != p.y.dtype) return false;
  if (residual && (p.residual.dtype != p.y.dtype || p.activation != kActNone)) return false;
  if (p.activation == kActSilu || (p.activation == kActGeluTanh && p.y.dtype != PF_BF16)) return false;
  if (dtype == PF_F32 && p.y.dtype != PF_F32) return false;
  if (p.batch > INT32_MAX) return false;

  thread_local Session session;
  if (!session.Handle()) return false;
  const void* const c = residual ? p.residual.data : p.y.data;
  const float one = 1, beta = residual || p.accumulate ? 1 : 0;
  Key key{};
  key.batch = p.batch;
  key.m = p.m;
  key.n = p.n;
  key.k = p.k;
  key.a_line = a.line;
  key.a_batch = a.batch;
  key.b_line = b.line;
  key.b_batch = b.batch;
  key.epilogue = (p.activation == kActGeluTanh ? kGelu : 0u) | (bias ? kBias : 0u);
  if (key.epilogue == 0) key.epilogue = kDefault;
  key.dtype = dtype;
  key.y_dtype = p.y.dtype;
  key.trans_a = p.trans_a;
  key.trans_b = p.trans_b;
  key.beta = beta != 0;
  const void* const operands[4] = {b.data, a.data, c, p.y.data};
  for (int i = 0; i < 4; ++i) key.alignment[i] = AlignmentOf(operands[i]);
  // A bias that is less aligned than the matrices would need a plan of its own.
  if (bias && AlignmentOf(p.bias.data) < 16) return false;

  for (int64_t workspace : {int64_t{32} << 20, int64_t{0}}) {
    key.workspace = workspace;
    Plan& plan = session.PlanOf(key, p.bias.data);
    if (!plan.usable) continue;
    const size_t bytes = plan.choice.workspace;
    void* const scratch = bytes ? args->context->scratch(args->context, bytes) : nullptr;
    if (bytes && !scratch) continue;
    if (bias && lt.MatmulDescSetAttribute(plan.desc, kDescBias, &p.bias.data, sizeof(void*)) != 0)
      return false;
    if (lt.Matmul(session.Handle(), plan.desc, &one, b.data, plan.b, a.data, plan.a, &beta, c, plan.y,
                  p.y.data, plan.y, plan.choice.algorithm, scratch, bytes, args->context->stream) == 0)
      return true;
    plan.usable = false;
  }
  return false;
}

const char* CublasLtState() { return Lt().state.c_str(); }

#endif

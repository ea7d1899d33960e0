#include "backends/cpu/onednn.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdio.h>
#include <string.h>

#include <mutex>

#if !defined(DNNL_VERSION_MAJOR) || DNNL_VERSION_MAJOR != 2
#error "pyraflow is written for oneDNN 2.x (Debian/Ubuntu: apt-get install libdnnl-dev)"
#endif

namespace {

constexpr int kKeyLength = 32;
constexpr int kCacheSize = 1024;
enum KeyKind : int64_t { kKeyGemm = 1, kKeyPackLayout, kKeyConv };

// Everything inside oneDNN happens as if there were one thread. Setting is per OpenMP task, so it is undone.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) {
    if (before_ != 1) omp_set_num_threads(1);
  }
  ~OneThread() {
    if (before_ != 1) omp_set_num_threads(before_);
  }

 private:
  int before_;
};

}  // namespace

struct OnednnKernel {
  int64_t key[kKeyLength];
  uint64_t hash, used;
  int references;
  OnednnRank rank;
  dnnl_primitive_t primitive;
  dnnl_memory_desc_t a, b, c, bias,
      plain;  // gemm: a b -> c; convolution: x w -> y, plain = w in checkpoint order
  size_t scratch;
};

namespace {

// The cache, the engine and the stream are this library's only state. The primitives they hold are pure
// functions, so what is cached never changes a result; the mutex is for several engines in one process.
std::mutex g_mutex;
dnnl_engine_t g_engine;
dnnl_stream_t g_stream;
OnednnKernel* g_cache[kCacheSize];
uint64_t g_clock;
int g_bf16 = -1, g_int8 = -1;

int32_t Report(char* error, const char* what, dnnl_status_t status) {
  snprintf(error, 256, "oneDNN could not %s (status %d)", what, static_cast<int>(status));
  return status == dnnl_out_of_memory ? PF_ERR_MEMORY : PF_ERR_DEVICE;
}

bool Ready(char* error) {
  if (!g_engine) {
    const dnnl_status_t status = dnnl_engine_create(&g_engine, dnnl_cpu, 0);
    if (status != dnnl_success) return Report(error, "create a CPU engine", status), false;
  }
  if (!g_stream) {
    const dnnl_status_t status = dnnl_stream_create(&g_stream, g_engine, dnnl_stream_default_flags);
    if (status != dnnl_success) return Report(error, "create a stream", status), false;
  }
  return true;
}

dnnl_data_type_t Type(int64_t dtype) {
  switch (dtype) {
    case PF_BF16: return dnnl_bf16;
    case PF_I8: return dnnl_s8;
    case PF_I32: return dnnl_s32;
    default: return dnnl_f32;
  }
}
// Of a product's result.
int64_t SumType(int64_t dtype) { return dtype == PF_I8 ? PF_I32 : PF_F32; }

uint64_t Hash(const int64_t* key) {
  uint64_t h = 1469598103934665603ull;
  for (int i = 0; i < kKeyLength; ++i) h = (h ^ static_cast<uint64_t>(key[i])) * 1099511628211ull;
  return h;
}

// Looks up key or builds it with create(kernel) -> dnnl_status_t. The least recently used idle entry makes
// room.
template <class Create>
OnednnKernel* Cached(const int64_t* key, char* error, const char* what, Create create) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const uint64_t hash = Hash(key);
  int slot = -1;
  for (int i = 0; i < kCacheSize; ++i) {
    OnednnKernel* entry = g_cache[i];
    if (entry && entry->hash == hash && !memcmp(entry->key, key, sizeof(entry->key))) {
      entry->used = ++g_clock;
      __atomic_fetch_add(&entry->references, 1, __ATOMIC_RELAXED);
      return entry;
    }
    if (!entry) {
      if (slot < 0 || g_cache[slot]) slot = i;
    } else if (__atomic_load_n(&entry->references, __ATOMIC_ACQUIRE) == 0 &&
               (slot < 0 || (g_cache[slot] && entry->used < g_cache[slot]->used))) {
      slot = i;
    }
  }
  if (!Ready(error)) return nullptr;
  if (slot < 0) return Report(error, "keep so many kernels at once", dnnl_out_of_memory), nullptr;
  auto* kernel = new OnednnKernel{};
  memcpy(kernel->key, key, sizeof(kernel->key));
  kernel->hash = hash;
  const OneThread one;
  const dnnl_status_t status = create(kernel);
  if (status != dnnl_success) {
    delete kernel;
    Report(error, what, status);
    return nullptr;
  }
  if (g_cache[slot]) {
    if (g_cache[slot]->primitive) dnnl_primitive_destroy(g_cache[slot]->primitive);
    delete g_cache[slot];
  }
  g_cache[slot] = kernel;
  kernel->used = ++g_clock;
  kernel->references = 1;
  return kernel;
}

dnnl_memory_desc_t Query(const_dnnl_primitive_desc_t pd, dnnl_query_t what, int index = 0) {
  const dnnl_memory_desc_t* md = dnnl_primitive_desc_query_md(pd, what, index);
  return md ? *md : dnnl_memory_desc_t{};
}

// Finishes a kernel from its descriptor: the best implementation that is not the plain reference, if there is
// one.
dnnl_status_t Build(OnednnKernel* kernel, const_dnnl_op_desc_t desc, dnnl_primitive_desc_t hint,
                    dnnl_primitive_desc_t* kept) {
  dnnl_primitive_attr_t attr;
  dnnl_status_t status = dnnl_primitive_attr_create(&attr);
  if (status != dnnl_success) return status;
  dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
  dnnl_primitive_desc_t pd;
  status = dnnl_primitive_desc_create(&pd, desc, attr, g_engine, hint);
  dnnl_primitive_attr_destroy(attr);
  if (status != dnnl_success) return status;
  const char* name = "";
  dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, &name);
  kernel->rank = !strncmp(name, "ref", 3) ? kRankReference : strstr(name, "gemm") ? kRankGemm : kRankDirect;
  kernel->scratch = dnnl_memory_desc_get_size(dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0));
  status = dnnl_primitive_create(&kernel->primitive, pd);
  if (status != dnnl_success)
    dnnl_primitive_desc_destroy(pd);
  else
    *kept = pd;
  return status;
}

// Wraps caller memory for one execution.
class Arguments {
 public:
  ~Arguments() {
    for (int i = 0; i < count_; ++i) dnnl_memory_destroy(list_[i].memory);
  }
  void Add(int role, const dnnl_memory_desc_t& md, const void* data) {
    if (status_ != dnnl_success) return;
    list_[count_].arg = role;
    status_ = dnnl_memory_create(&list_[count_].memory, &md, g_engine, const_cast<void*>(data));
    if (status_ == dnnl_success) ++count_;
  }
  void AddScratch(size_t bytes, void* data) {
    if (!bytes) return;
    dnnl_memory_desc_t md;
    const dnnl_dims_t dims = {static_cast<dnnl_dim_t>(bytes)};
    dnnl_memory_desc_init_by_tag(&md, 1, dims, dnnl_u8, dnnl_a);
    Add(DNNL_ARG_SCRATCHPAD, md, data);
  }
  int32_t Execute(const_dnnl_primitive_t primitive, char* error) {
    if (status_ == dnnl_success) {
      const OneThread one;
      status_ = dnnl_primitive_execute(primitive, g_stream, count_, list_);
    }
    return status_ == dnnl_success ? PF_OK : Report(error, "run a kernel", status_);
  }

 private:
  dnnl_exec_arg_t list_[8];
  int count_ = 0;
  dnnl_status_t status_ = dnnl_success;
};

int32_t Reorder(const dnnl_memory_desc_t& from_md, const void* from, const dnnl_memory_desc_t& to_md,
                void* to, char* error) {
  const OneThread one;
  dnnl_primitive_desc_t pd;
  dnnl_status_t status =
      dnnl_reorder_primitive_desc_create(&pd, &from_md, g_engine, &to_md, g_engine, nullptr);
  if (status != dnnl_success) return Report(error, "reorder a weight", status);
  dnnl_primitive_t primitive;
  status = dnnl_primitive_create(&primitive, pd);
  dnnl_primitive_desc_destroy(pd);
  if (status != dnnl_success) return Report(error, "reorder a weight", status);
  Arguments arguments;
  arguments.Add(DNNL_ARG_FROM, from_md, from);
  arguments.Add(DNNL_ARG_TO, to_md, to);
  const int32_t result = arguments.Execute(primitive, error);
  dnnl_primitive_destroy(primitive);
  return result;
}

dnnl_memory_desc_t Matrix(int64_t rows, int64_t columns, int64_t dtype, int64_t row, int64_t column) {
  dnnl_memory_desc_t md;
  const dnnl_dims_t dims = {rows, columns}, strides = {row, column};
  dnnl_memory_desc_init_by_strides(&md, 2, dims, Type(dtype), strides);
  return md;
}

// The layout a packed tile has: what oneDNN chooses for tall inputs, whatever M a later call brings.
const OnednnKernel* PackLayout(int64_t n, int64_t k, int64_t dtype, char* error) {
  const int64_t key[kKeyLength] = {kKeyPackLayout, n, k, dtype};
  OnednnKernel* kernel = Cached(key, error, "choose a packed layout", [&](OnednnKernel* kernel) {
    const dnnl_memory_desc_t a = Matrix(1024, k, dtype, k, 1), c = Matrix(1024, n, SumType(dtype), n, 1);
    dnnl_memory_desc_t b;
    const dnnl_dims_t dims = {k, n};
    dnnl_memory_desc_init_by_tag(&b, 2, dims, Type(dtype), dnnl_format_tag_any);
    dnnl_matmul_desc_t desc;
    dnnl_status_t status = dnnl_matmul_desc_init(&desc, &a, &b, nullptr, &c);
    if (status != dnnl_success) return status;
    dnnl_primitive_desc_t pd;
    status = Build(kernel, &desc, nullptr, &pd);
    if (status != dnnl_success) return status;
    kernel->b = kernel->rank != kRankReference ? Query(pd, dnnl_query_weights_md) : Matrix(k, n, dtype, n, 1);
    dnnl_primitive_desc_destroy(pd);
    return dnnl_success;
  });
  if (kernel) OnednnRelease(kernel);
  return kernel;
}

struct PackHeader {
  uint64_t magic;
  int64_t n, k, dtype, tile_bytes;
  dnnl_memory_desc_t full, tail;
};
constexpr uint64_t kPackMagic = 0x314b434150465950ull;  // "PYFPACK1"
constexpr size_t kPackHeader = (sizeof(PackHeader) + 63) / 64 * 64;

// Fills the header for a weight; false with a message when oneDNN refuses.
bool MakeHeader(int64_t n, int64_t k, int64_t dtype, PackHeader* header, size_t* total, char* error) {
  memset(header, 0, sizeof(*header));
  header->magic = kPackMagic;
  header->n = n;
  header->k = k;
  header->dtype = dtype;
  const int64_t tiles = n / kOnednnPackColumns, rest = n % kOnednnPackColumns;
  size_t tail_bytes = 0;
  if (tiles) {
    const OnednnKernel* layout = PackLayout(kOnednnPackColumns, k, dtype, error);
    if (!layout) return false;
    header->full = layout->b;
    header->tile_bytes = (dnnl_memory_desc_get_size(&header->full) + 63) / 64 * 64;
  }
  if (rest) {
    const OnednnKernel* layout = PackLayout(rest, k, dtype, error);
    if (!layout) return false;
    header->tail = layout->b;
    tail_bytes = dnnl_memory_desc_get_size(&header->tail);
  }
  *total = kPackHeader + tiles * header->tile_bytes + tail_bytes;
  return true;
}

}  // namespace

int32_t OnednnInit(const char* level, char*) {
  dnnl_cpu_isa_t isa = dnnl_cpu_isa_all;
  if (!strcmp(level, "cpu_base")) isa = dnnl_cpu_isa_sse41;
  if (!strcmp(level, "cpu_avx2")) isa = dnnl_cpu_isa_avx2;
  if (!strcmp(level, "cpu_avx512")) isa = dnnl_cpu_isa_avx512_core_bf16;
  // Refused when another level of this process came first: then oneDNN stays at that level, which is only
  // slower.
  dnnl_set_max_cpu_isa(isa);
  return PF_OK;
}

static bool Has(dnnl_cpu_isa_t isa) { return (dnnl_get_effective_cpu_isa() & isa) == isa; }
bool OnednnHasBf16() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (g_bf16 < 0) g_bf16 = Has(dnnl_cpu_isa_avx512_core_bf16);
  return g_bf16 != 0;
}
bool OnednnHasInt8() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (g_int8 < 0) g_int8 = Has(dnnl_cpu_isa_avx512_core_vnni);
  return g_int8 != 0;
}

void OnednnRelease(OnednnKernel* kernel) {
  if (!kernel) return;
  // Without the mutex: a decrement that Cached() misses merely delays an eviction.
  __atomic_fetch_sub(&kernel->references, 1, __ATOMIC_RELEASE);
}
size_t OnednnScratchBytes(const OnednnKernel* kernel) { return kernel->scratch; }
OnednnRank OnednnGetRank(const OnednnKernel* kernel) { return kernel->rank; }

OnednnKernel* OnednnGetGemm(const OnednnGemm& g, char* error) {
  const int64_t key[kKeyLength] = {kKeyGemm, g.m,        g.n,     g.k,     g.a_row, g.a_column,
                                   g.b_row,  g.b_column, g.c_row, g.dtype, g.packed};
  const OnednnKernel* layout = g.packed ? PackLayout(g.n, g.k, g.dtype, error) : nullptr;
  if (g.packed && !layout) return nullptr;
  const dnnl_memory_desc_t packed = layout ? layout->b : dnnl_memory_desc_t{};
  return Cached(key, error, "build a matrix product", [&](OnednnKernel* kernel) {
    kernel->a = Matrix(g.m, g.k, g.dtype, g.a_row, g.a_column);
    kernel->b = g.packed ? packed : Matrix(g.k, g.n, g.dtype, g.b_row, g.b_column);
    kernel->c = Matrix(g.m, g.n, SumType(g.dtype), g.c_row, 1);
    dnnl_matmul_desc_t desc;
    dnnl_status_t status = dnnl_matmul_desc_init(&desc, &kernel->a, &kernel->b, nullptr, &kernel->c);
    if (status != dnnl_success) return status;
    dnnl_primitive_desc_t pd;
    status = Build(kernel, &desc, nullptr, &pd);
    if (status == dnnl_success) dnnl_primitive_desc_destroy(pd);
    return status;
  });
}

int32_t OnednnRunGemm(const OnednnKernel* kernel, const void* a, const void* b, void* c, void* scratch,
                      char* error) {
  Arguments arguments;
  arguments.Add(DNNL_ARG_SRC, kernel->a, a);
  arguments.Add(DNNL_ARG_WEIGHTS, kernel->b, b);
  arguments.Add(DNNL_ARG_DST, kernel->c, c);
  arguments.AddScratch(kernel->scratch, scratch);
  return arguments.Execute(kernel->primitive, error);
}

int32_t OnednnPackDType(int32_t dtype) { return dtype == PF_BF16 && OnednnHasBf16() ? PF_BF16 : PF_F32; }

size_t OnednnPackBytes(int64_t n, int64_t k, int32_t dtype) {
  char error[256];
  PackHeader header;
  size_t total;
  if (n <= 0 || k <= 0 || !MakeHeader(n, k, OnednnPackDType(dtype), &header, &total, error)) return 0;
  return total;
}

size_t OnednnPackTileBytes(int64_t n, int64_t k, int64_t dtype, char* error) {
  const OnednnKernel* layout = PackLayout(n, k, dtype, error);
  return layout ? (dnnl_memory_desc_get_size(&layout->b) + 63) / 64 * 64 : 0;
}
int32_t OnednnPackTile(const void* b, int64_t b_row, int64_t b_column, int64_t n, int64_t k, int64_t dtype,
                       void* tile, char* error) {
  const OnednnKernel* layout = PackLayout(n, k, dtype, error);
  if (!layout) return PF_ERR_DEVICE;
  return Reorder(Matrix(k, n, dtype, b_row, b_column), b, layout->b, tile, error);
}
int32_t OnednnPack(const void* w, int64_t n, int64_t k, int32_t dtype, void* blob, char* error) {
  PackHeader header;
  size_t total;
  if (!MakeHeader(n, k, dtype, &header, &total, error)) return PF_ERR_DEVICE;
  memcpy(blob, &header, sizeof(header));
  char* to = static_cast<char*>(blob) + kPackHeader;
  const char* from = static_cast<const char*>(w);
  for (int64_t n0 = 0; n0 < n; n0 += kOnednnPackColumns) {
    const int64_t count = n - n0 < kOnednnPackColumns ? n - n0 : kOnednnPackColumns;
    const int32_t status = OnednnPackTile(from + n0 * k * PfSize(dtype), 1, k, count, k, dtype, to, error);
    if (status != PF_OK) return status;
    to += header.tile_bytes;
  }
  return PF_OK;
}

int32_t OnednnOpenPacked(const void* blob, size_t bytes, OnednnPacked* packed, char* error) {
  PackHeader header, expected;
  size_t total = 0;
  if (bytes < kPackHeader || (memcpy(&header, blob, sizeof(header)), header.magic != kPackMagic) ||
      !MakeHeader(header.n, header.k, header.dtype, &expected, &total, error) || total > bytes ||
      header.tile_bytes != expected.tile_bytes || !dnnl_memory_desc_equal(&header.full, &expected.full) ||
      !dnnl_memory_desc_equal(&header.tail, &expected.tail)) {
    snprintf(error, 256,
             "matmul_packed: the packed weight was not made by matmul_pack on this machine and level");
    return PF_ERR_OPTION;
  }
  *packed = {header.n, header.k, header.dtype, static_cast<const char*>(blob) + kPackHeader,
             header.tile_bytes};
  return PF_OK;
}

int32_t OnednnUnpack(const OnednnPacked& packed, void* w, char* error) {
  const PackHeader* header = reinterpret_cast<const PackHeader*>(packed.data - kPackHeader);
  const int64_t n = packed.n, k = packed.k;
  const char* from = packed.data;
  for (int64_t n0 = 0; n0 < n; n0 += kOnednnPackColumns, from += packed.tile_bytes) {
    const int64_t count = n - n0 < kOnednnPackColumns ? n - n0 : kOnednnPackColumns;
    dnnl_memory_desc_t md;
    memcpy(&md, count == kOnednnPackColumns ? &header->full : &header->tail, sizeof(md));
    const int32_t status =
        Reorder(md, from, Matrix(k, count, packed.dtype, 1, k),
                static_cast<char*>(w) + n0 * k * PfSize(static_cast<int32_t>(packed.dtype)), error);
    if (status != PF_OK) return status;
  }
  return PF_OK;
}

OnednnKernel* OnednnGetConv(const OnednnConv& v, char* error) {
  static_assert(sizeof(OnednnConv) / 8 + 1 <= kKeyLength, "the key holds the whole description");
  int64_t key[kKeyLength] = {kKeyConv};
  memcpy(key + 1, &v, sizeof(v));
  return Cached(key, error, "build a convolution", [&](OnednnKernel* kernel) {
    const bool data = v.kind == kConvBackwardData, weights = v.kind == kConvBackwardWeights;
    dnnl_memory_desc_t x, w, y, bias;
    const dnnl_dims_t x_dims = {v.n, v.c_in, v.in[0], v.in[1], v.in[2]};
    const dnnl_dims_t y_dims = {v.n, v.c_out, v.out[0], v.out[1], v.out[2]};
    const dnnl_dims_t w_dims = {v.c_out, v.c_in, v.kernel[0], v.kernel[1], v.kernel[2]};
    const dnnl_dims_t bias_dims = {v.c_out};
    const dnnl_data_type_t type = Type(v.dtype), out = Type(v.out_dtype);
    dnnl_memory_desc_init_by_tag(&x, 5, x_dims, data ? out : type, dnnl_ndhwc);
    dnnl_memory_desc_init_by_tag(&y, 5, y_dims, v.kind == kConvForward ? out : type, dnnl_ndhwc);
    dnnl_memory_desc_init_by_tag(&w, 5, w_dims, weights ? dnnl_f32 : type, dnnl_format_tag_any);
    dnnl_memory_desc_init_by_tag(&kernel->plain, 5, w_dims, weights ? dnnl_f32 : type, dnnl_oidhw);
    dnnl_memory_desc_init_by_tag(&bias, 1, bias_dims, dnnl_f32, dnnl_a);
    kernel->a = x;
    kernel->c = y;
    kernel->bias = bias;
    const dnnl_dims_t strides = {v.stride[0], v.stride[1], v.stride[2]};
    const dnnl_dims_t left = {v.left[0], v.left[1], v.left[2]}, right = {v.right[0], v.right[1], v.right[2]};
    dnnl_convolution_desc_t desc;
    dnnl_primitive_desc_t hint = nullptr, pd;
    dnnl_status_t status;
    if (v.kind != kConvForward) {
      // Both backward descriptors ask for the forward one as a hint; only its layouts matter, so f32 weights
      // of a bf16 problem are described as bf16 there.
      dnnl_memory_desc_t hint_w, hint_x, hint_y;
      dnnl_memory_desc_init_by_tag(&hint_w, 5, w_dims, type, dnnl_format_tag_any);
      dnnl_memory_desc_init_by_tag(&hint_x, 5, x_dims, type, dnnl_ndhwc);
      dnnl_memory_desc_init_by_tag(&hint_y, 5, y_dims, type, dnnl_ndhwc);
      status = dnnl_convolution_forward_desc_init(&desc, dnnl_forward_training, dnnl_convolution_direct,
                                                  &hint_x, &hint_w, nullptr, &hint_y, strides, left, right);
      if (status != dnnl_success) return status;
      status = dnnl_primitive_desc_create(&hint, &desc, nullptr, g_engine, nullptr);
      if (status != dnnl_success) return status;
    }
    if (data)
      status = dnnl_convolution_backward_data_desc_init(&desc, dnnl_convolution_direct, &x, &w, &y, strides,
                                                        left, right);
    else if (weights)
      status = dnnl_convolution_backward_weights_desc_init(
          &desc, dnnl_convolution_direct, &x, &w, v.bias ? &bias : nullptr, &y, strides, left, right);
    else
      status = dnnl_convolution_forward_desc_init(&desc, dnnl_forward_training, dnnl_convolution_direct, &x,
                                                  &w, v.bias ? &bias : nullptr, &y, strides, left, right);
    if (status == dnnl_success) status = Build(kernel, &desc, hint, &pd);
    if (status == dnnl_success) {
      kernel->b = Query(pd, weights ? dnnl_query_diff_weights_md : dnnl_query_weights_md);
      dnnl_primitive_desc_destroy(pd);
    }
    if (hint) dnnl_primitive_desc_destroy(hint);
    return status;
  });
}

size_t OnednnConvWeightBytes(const OnednnKernel* kernel) { return dnnl_memory_desc_get_size(&kernel->b); }
bool OnednnSameWeightLayout(const OnednnKernel* a, const OnednnKernel* b) {
  return dnnl_memory_desc_equal(&a->b, &b->b) != 0;
}
int32_t OnednnReorderConvWeight(const OnednnKernel* kernel, bool from_plain, const void* from, void* to,
                                char* error) {
  return from_plain ? Reorder(kernel->plain, from, kernel->b, to, error)
                    : Reorder(kernel->b, from, kernel->plain, to, error);
}

int32_t OnednnRunConv(const OnednnKernel* kernel, void* x, void* w, void* bias, void* y, void* scratch,
                      char* error) {
  const int64_t kind = kernel->key[1];
  Arguments arguments;
  arguments.Add(kind == kConvBackwardData ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, kernel->a, x);
  arguments.Add(kind == kConvBackwardWeights ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS, kernel->b, w);
  arguments.Add(kind == kConvForward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST, kernel->c, y);
  if (bias) arguments.Add(kind == kConvForward ? DNNL_ARG_BIAS : DNNL_ARG_DIFF_BIAS, kernel->bias, bias);
  arguments.AddScratch(kernel->scratch, scratch);
  return arguments.Execute(kernel->primitive, error);
}

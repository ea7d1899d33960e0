// The kernel behind matrix products and convolutions: C [m, n] = A [m, k] B [k, n], sums in f32. Blocks take
// a tile of C and walk along k; 16-byte asynchronous copies fill a ring of shared tiles several steps ahead.
//
// Where elements come from is a Source: a matrix, or the inputs of a convolution. Each is read 16 bytes
// ("chunk") at a time, either along k or along rows of C (columns, for B), whichever is contiguous; what lies
// outside is zero. Multiplying is a Core's: tensor cores for bf16, plain multiply-adds for f32.
#pragma once
#include "backends/cuda/activations.h"
#include "backends/cuda/elementwise.h"
#include "backends/cuda/fast_div.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/mma.h"

constexpr int kGemmStages = 4;
constexpr int kLineBytes = 64;  // of k, that a step takes
template <class T>
constexpr int kStepK = kLineBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// Blocks that keep any GPU busy. The emulator pretends to be small, so that small cases reach every path.
#if defined(__CUDACC__)
constexpr int kEnoughBlocks = 120, kLeastSteps = 16;
#else
constexpr int kEnoughBlocks = 6, kLeastSteps = 4;
#endif

// Byte of chunk `chunk` in line `line` of a shared tile; a line is a row's 64 bytes of k, or (not kAlongK)
// one k of all rows. Chunks are permuted so that the 8 lines that ldmatrix reads at once lie in different
// banks.
template <class T, int kRows, bool kAlongK>
__device__ __forceinline__ int ChunkAt(int line, int chunk) {
  if constexpr (kAlongK)
    return line * kLineBytes + ((chunk ^ (line >> 1 & 3)) << 4);
  else
    return line * (kRows * static_cast<int>(sizeof(T))) + ((chunk ^ (line & 7)) << 4);
}

// Which chunks of a tile a thread copies: the same place in every kStep-th line.
template <class T, int kRows, int kThreads, bool kAlongK>
struct Share {
  static constexpr int kPerLine = kAlongK ? kLineBytes / 16 : kRows / kChunk<T>;
  static constexpr int kStep = kThreads / kPerLine;
  static constexpr int kCount = kRows * kLineBytes / 16 / kThreads;
  static constexpr int kStepBytes = kStep * (kAlongK ? kLineBytes : kRows * static_cast<int>(sizeof(T)));
  // A multiple of 8 keeps the permutation the same for all of a thread's chunks.
  static_assert(kThreads % kPerLine == 0 && kStep % 8 == 0 && kCount >= 1);
  static __device__ __forceinline__ int Line() { return threadIdx.x / kPerLine; }
  static __device__ __forceinline__ int Chunk() { return threadIdx.x % kPerLine; }
};

// A matrix whose contiguous side is a multiple of a chunk (or padded with zeros to one) and aligned.
template <class T, bool kAlongK_>
struct MatrixSource {
  static constexpr bool kAlongK = kAlongK_;
  const T* data;
  int64_t line, batch;  // elements from one line, one entry, to the next
  int rows, k;

  template <int kRows, int kThreads>
  class Loader {
   public:
    __device__ Loader(const MatrixSource& s, int64_t entry, int row) : step_(S::kStep * s.line) {
      const int line = S::Line(), along = S::Chunk() * kChunk<T>;
      to_ = ChunkAt<T, kRows, kAlongK>(line, S::Chunk());
      if constexpr (kAlongK) {
        from_ = s.data + entry * s.batch + (row + line) * s.line + along;
        lines_ = s.rows - row - line;
        along_ = s.k - along;
        advance_ = 1;
      } else {
        from_ = s.data + entry * s.batch + line * s.line + row + along;
        lines_ = row + along < s.rows ? s.k - line : 0;
        along_ = 0;
        advance_ = s.line;
      }
    }
    __device__ __forceinline__ void Load(unsigned char* tile, int k) const {
      const T* from = from_ + k * advance_;
      const int lines = kAlongK ? (k < along_ ? lines_ : 0) : lines_ - k;
#pragma unroll
      for (int i = 0; i < S::kCount; ++i)
        CopyAsync16(tile + to_ + i * S::kStepBytes, from + i * step_, i * S::kStep < lines);
    }

   private:
    using S = Share<T, kRows, kThreads, kAlongK>;
    const T* from_;
    int64_t step_, advance_;
    int to_, lines_, along_;
  };
};

// Place of (row, column) in the finished f32 tile, permuted against bank conflicts by groups of 4 columns.
template <int kN>
__device__ __forceinline__ int FinishedAt(int row, int column) {
  return row * kN + (column ^ ((row & 7) << 2));
}

// bf16 on tensor cores; warps side by side, each with a tile of kWarpM x kWarpN.
template <int kM_, int kN_, int kWarpM, int kWarpN, bool kAAlongK, bool kBAlongK>
class TensorCore {
 public:
  using Type = Bf16;
  static constexpr int kM = kM_, kN = kN_, kThreads = kM / kWarpM * (kN / kWarpN) * 32;
  static constexpr int kLeastBlocks = kM * kN > 64 * 64 ? 2 : 4;  // an SM has room for

  __device__ TensorCore() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum_[i][j][c] = 0;
  }

  __device__ __forceinline__ void Multiply(const unsigned char* a, const unsigned char* b) {
    const int lane = threadIdx.x % 32, low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t fa[kRowTiles][4], fb[kColumnTiles][2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int row = Row() + 16 * i;
        if constexpr (kAAlongK)
          LdMatrix(fa[i], a + ChunkAt<Bf16, kM, true>(row + 8 * middle + low, 2 * step + high));
        else
          LdMatrixTransposed(fa[i],
                             a + ChunkAt<Bf16, kM, false>(16 * step + 8 * high + low, row / 8 + middle));
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        const int column = Column() + 8 * j;
        uint32_t four[4];
        if constexpr (kBAlongK)
          LdMatrix(four, b + ChunkAt<Bf16, kN, true>(column + 8 * high + low, 2 * step + middle));
        else
          LdMatrixTransposed(four,
                             b + ChunkAt<Bf16, kN, false>(16 * step + 8 * middle + low, column / 8 + high));
        fb[j][0] = four[0], fb[j][1] = four[1];
        fb[j + 1][0] = four[2], fb[j + 1][1] = four[3];
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) MmaBf16(sum_[i][j], fa[i], fb[j]);
    }
  }

  __device__ __forceinline__ void Store(float* tile) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          StorePack<float, 2>(
              tile + FinishedAt<kN>(Row() + 16 * i + 8 * half + lane / 4, Column() + 8 * j + 2 * (lane % 4)),
              sum_[i][j] + 2 * half);
  }

 private:
  static constexpr int kRowTiles = kWarpM / 16, kColumnTiles = kWarpN / 8;
  static __device__ __forceinline__ int Row() { return threadIdx.x / 32 % (kM / kWarpM) * kWarpM; }
  static __device__ __forceinline__ int Column() { return threadIdx.x / 32 / (kM / kWarpM) * kWarpN; }
  float sum_[kRowTiles][kColumnTiles][4];
};

// f32 with all its digits; a warp is 4 x 8 threads, each with kPerM x kPerN sums. Their rows are neighbours
// by fours where the tile holds rows side by side, and interleaved with those of other threads where it holds
// k side by side: so one shared load serves several sums, without bank conflicts.
template <int kM_, int kN_, int kPerM, int kPerN, bool kAAlongK, bool kBAlongK>
class FmaCore {
 public:
  using Type = float;
  static constexpr int kM = kM_, kN = kN_, kThreads = kM / kPerM * (kN / kPerN), kLeastBlocks = 2;

  __device__ FmaCore() {
#pragma unroll
    for (int i = 0; i < kPerM; ++i)
#pragma unroll
      for (int j = 0; j < kPerN; ++j) sum_[i][j] = 0;
  }

  __device__ __forceinline__ void Multiply(const unsigned char* a, const unsigned char* b) {
#pragma unroll
    for (int k = 0; k < kStepK<float>; k += 2) {
      float fa[kPerM][2], fb[kPerN][2];
      Fetch<kM, kPerM, kAAlongK>(a, ThreadRow(), k, fa);
      Fetch<kN, kPerN, kBAlongK>(b, ThreadColumn(), k, fb);
#pragma unroll
      for (int of = 0; of < 2; ++of)
#pragma unroll
        for (int i = 0; i < kPerM; ++i)
#pragma unroll
          for (int j = 0; j < kPerN; ++j) sum_[i][j] = fmaf(fa[i][of], fb[j][of], sum_[i][j]);
    }
  }

  __device__ __forceinline__ void Store(float* tile) const {
#pragma unroll
    for (int i = 0; i < kPerM; ++i)
#pragma unroll
      for (int j = 0; j < kPerN; ++j)
        tile[FinishedAt<kN>(Place<kM / kPerM, kAAlongK>(ThreadRow(), i),
                            Place<kN / kPerN, kBAlongK>(ThreadColumn(), j))] = sum_[i][j];
  }

 private:
  static constexpr int kWarpsWide = kN / kPerN / 8;
  static __device__ __forceinline__ int ThreadRow() {
    return threadIdx.x / 32 / kWarpsWide * 4 + threadIdx.x % 32 / 8;
  }
  static __device__ __forceinline__ int ThreadColumn() {
    return threadIdx.x / 32 % kWarpsWide * 8 + threadIdx.x % 8;
  }
  // Row (or column) of a thread's i-th sum, of kApart threads side by side.
  template <int kApart, bool kAlongK>
  static __device__ __forceinline__ int Place(int thread, int i) {
    return kAlongK ? thread + kApart * i : (i / 4 * kApart + thread) * 4 + i % 4;
  }
  // Rows of a thread at k and k + 1.
  template <int kRows, int kPer, bool kAlongK>
  static __device__ __forceinline__ void Fetch(const unsigned char* tile, int thread, int k,
                                               float (&to)[kPer][2]) {
    if constexpr (kAlongK) {
#pragma unroll
      for (int i = 0; i < kPer; ++i)
        LoadPack<float, 2>(
            reinterpret_cast<const float*>(
                tile + ChunkAt<float, kRows, true>(Place<kRows / kPer, true>(thread, i), k / 4)) +
                k % 4,
            to[i]);
    } else {
#pragma unroll
      for (int of = 0; of < 2; ++of)
#pragma unroll
        for (int i = 0; i < kPer; i += 4) {
          float four[4];
          LoadPack<float, 4>(
              reinterpret_cast<const float*>(
                  tile + ChunkAt<float, kRows, false>(k + of, Place<kRows / kPer, false>(thread, i) / 4)),
              four);
#pragma unroll
          for (int c = 0; c < 4; ++c) to[i + c][of] = four[c];
        }
    }
  }
  float sum_[kPerM][kPerN];
};

template <class T, bool kLarge, bool kAAlongK, bool kBAlongK>
struct CoreOf;
template <bool kA, bool kB>
struct CoreOf<Bf16, true, kA, kB> {
  using Core = TensorCore<128, 128, 64, 64, kA, kB>;
};
template <bool kA, bool kB>
struct CoreOf<Bf16, false, kA, kB> {
  using Core = TensorCore<64, 64, 32, 32, kA, kB>;
};
template <bool kA, bool kB>
struct CoreOf<float, true, kA, kB> {
  using Core = FmaCore<128, 64, 8, 4, kA, kB>;
};
template <bool kA, bool kB>
struct CoreOf<float, false, kA, kB> {
  using Core = FmaCore<64, 64, 4, 4, kA, kB>;
};

// What happens to finished sums on their way into y.
struct Epilogue {
  FloatArray bias, residual, y;
  int32_t activation;
  bool accumulate;
  bool packs;  // 8 columns at a time: all operands are aligned, rows too
};
static inline Epilogue EpilogueTo(const FloatArray& y, int64_t n, const FloatArray& bias = {}) {
  return {bias, {}, y, kActNone, false, n % 8 == 0 && Aligned(y.data, 16)};
}

__device__ __forceinline__ float Activate(float x, int32_t activation) {
  if (activation == kActGeluTanh) return GeluTanh(x);
  if (activation == kActSilu) return Silu(x);
  return x;
}
// Up to 8 neighbouring columns of a row of n.
__device__ __forceinline__ void FinishColumns(const Epilogue& e, int64_t row, int column, int n,
                                              const float* bias, float* v) {
  const int64_t at = row * n + column;
  const FloatArray& other = e.accumulate ? e.y : e.residual;
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = Activate(v[i] + bias[i], e.activation);
  if (e.packs) {  // and so n is a multiple of 8
    if (other.data != nullptr) {
      float more[8];
      ReadPack<8>(other, at, more);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += more[i];
    }
    WritePack<8>(e.y, at, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (column + i < n) WriteOne(e.y, at + i, v[i] + ReadOne(other, at + i));
}
__device__ __forceinline__ void ReadBias(const Epilogue& e, int column, int n, float* bias) {
#pragma unroll
  for (int i = 0; i < 8; ++i) bias[i] = column + i < n ? ReadOne(e.bias, column + i) : 0;
}

// Rows of C are rows of y. So are those of any other Rows made without arguments.
struct SameRows {
  __device__ __forceinline__ int64_t operator()(int row) const { return row; }
};

template <class A, class B, class Rows>
struct GemmArgs {
  A a;
  B b;
  Rows rows;
  Epilogue end;
  int m, n, k;
  int tiles_m, tiles_n, splits, split_k;  // filled by LaunchGemm
};

constexpr int kTallGroup = 8;  // rows of tiles whose blocks follow one another, for the sake of the L2 cache

template <class Core, class A, class B, class Rows>
__global__ void __launch_bounds__(Core::kThreads, Core::kLeastBlocks)
    GemmKernel(const __grid_constant__ GemmArgs<A, B, Rows> p) {
  using T = typename Core::Type;
  constexpr int kM = Core::kM, kN = Core::kN, kStageBytes = (kM + kN) * kLineBytes;
  PF_DYNAMIC_SHARED(shared);

  const int tiles = p.tiles_m * p.tiles_n, layer = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int group = tile / (kTallGroup * p.tiles_n), in_group = tile % (kTallGroup * p.tiles_n);
  const int left = p.tiles_m - group * kTallGroup, tall = left < kTallGroup ? left : kTallGroup;
  const int row0 = (group * kTallGroup + in_group % tall) * kM, column0 = in_group / tall * kN;
  const int entry = layer / p.splits, begin = layer % p.splits * p.split_k;
  const int end = begin + p.split_k < p.k ? begin + p.split_k : p.k;

  const typename A::template Loader<kM, Core::kThreads> a(p.a, entry, row0);
  const typename B::template Loader<kN, Core::kThreads> b(p.b, entry, column0);
  const auto load = [&](int step, int k) {
    if (k < end) {
      unsigned char* const at = shared + step % kGemmStages * kStageBytes;
      a.Load(at, k);
      b.Load(at + kM * kLineBytes, k);
    }
    CopyAsyncCommit();
  };
#pragma unroll
  for (int step = 0; step < kGemmStages - 1; ++step) load(step, begin + step * kStepK<T>);

  Core core;
  for (int step = 0, k = begin; k < end; ++step, k += kStepK<T>) {
    CopyAsyncWait<kGemmStages - 2>();
    __syncthreads();  // this step has arrived for all, and all are done with the one before
    load(step + kGemmStages - 1, k + (kGemmStages - 1) * kStepK<T>);
    const unsigned char* const at = shared + step % kGemmStages * kStageBytes;
    core.Multiply(at, at + kM * kLineBytes);
  }
  CopyAsyncWait<0>();
  __syncthreads();
  float* const finished = reinterpret_cast<float*>(shared);
  core.Store(finished);
  __syncthreads();

  constexpr int kPerRow = kN / 8;
  const int column = threadIdx.x % kPerRow * 8;
  if (column0 + column >= p.n) return;
  float bias[8];
  ReadBias(p.end, column0 + column, p.n, bias);
  for (int row = threadIdx.x / kPerRow; row < kM && row0 + row < p.m; row += Core::kThreads / kPerRow) {
    float v[8];
    LoadPack<float, 4>(finished + FinishedAt<kN>(row, column), v);
    LoadPack<float, 4>(finished + FinishedAt<kN>(row, column + 4), v + 4);
    FinishColumns(p.end, static_cast<int64_t>(layer) * p.m + p.rows(row0 + row), column0 + column, p.n, bias,
                  v);
  }
}

// How a product is cut: by its lengths alone, so that the same call always gives the same bits.
struct GemmPlan {
  bool large;
  int splits;  // parts of k that are summed apart, one after the other in y
};
template <class T>
GemmPlan PlanGemm(int64_t m, int64_t n, int64_t k, int64_t batch) {
  using Large = typename CoreOf<T, true, true, true>::Core;
  const int64_t steps = CeilDiv(k, kStepK<T>);
  const int64_t large = CeilDiv(m, Large::kM) * CeilDiv(n, Large::kN) * batch;
  if (large >= kEnoughBlocks && m > 64 && n > 64) return {true, 1};
  const int64_t wanted = CeilDiv(kEnoughBlocks, large);
  if (m > 64 && n > 64 && steps >= 2 * kLeastSteps * wanted) return {true, static_cast<int>(wanted)};
  const int64_t small = CeilDiv(m, 64) * CeilDiv(n, 64) * batch;
  int64_t splits = small * 2 > kEnoughBlocks ? 1 : kEnoughBlocks / small;
  if (splits > steps / kLeastSteps) splits = steps / kLeastSteps;
  return {false, splits < 2 ? 1 : static_cast<int>(splits)};
}

template <class Core, class A, class B, class Rows>
int32_t LaunchCore(const PfArgs* args, GemmArgs<A, B, Rows> p, int splits, int64_t batch) {
  p.tiles_m = static_cast<int>(CeilDiv(p.m, Core::kM));
  p.tiles_n = static_cast<int>(CeilDiv(p.n, Core::kN));
  p.splits = splits;
  const int step = kStepK<typename Core::Type>;
  p.split_k = static_cast<int>(CeilDiv(CeilDiv(p.k, splits), step) * step);
  const int64_t blocks = static_cast<int64_t>(p.tiles_m) * p.tiles_n * splits * batch;
  if (blocks > INT32_MAX) return Fail(args, PF_ERR_SHAPE, "a product of %lld tiles", (long long)blocks);
  constexpr size_t kRing = kGemmStages * (Core::kM + Core::kN) * kLineBytes, kSums = Core::kM * Core::kN * 4;
  return Launch(args, &GemmKernel<Core, A, B, Rows>, dim3(static_cast<unsigned>(blocks)), Core::kThreads,
                kRing > kSums ? kRing : kSums, p);
}

// y of p is [batch, splits, m, n]. With splits it has to be f32, and summing them up is the caller's.
template <class T, class A, class B, class Rows>
int32_t LaunchGemm(const PfArgs* args, const GemmArgs<A, B, Rows>& p, const GemmPlan& plan, int64_t batch) {
  using Large = typename CoreOf<T, true, A::kAlongK, B::kAlongK>::Core;
  using Small = typename CoreOf<T, false, A::kAlongK, B::kAlongK>::Core;
  return plan.large ? LaunchCore<Large>(args, p, plan.splits, batch)
                    : LaunchCore<Small>(args, p, plan.splits, batch);
}

// y = end(the parts of every entry, added in order); y may be the one part there is.
template <class Rows>
__global__ void __launch_bounds__(kElementThreads)
    SumPartsKernel(const float* parts, bool packs, int splits, int64_t rows, int m, int n, FastDiv per_row,
                   Rows to, Epilogue end) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  const int64_t row = at / per_row.divisor;
  if (row >= rows) return;
  const int column = static_cast<int>(at - row * per_row.divisor) * 8;
  const int64_t entry = row / m, part = static_cast<int64_t>(m) * n;
  const int in_entry = static_cast<int>(row - entry * m);
  const float* from = parts + (entry * splits * m + in_entry) * n + column;
  float sum[8] = {}, bias[8];
  for (int p = 0; p < splits; ++p, from += part) {
    float v[8];
    if (packs) {
      LoadPack<float, 4>(from, v);
      LoadPack<float, 4>(from + 4, v + 4);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = column + i < n ? from[i] : 0;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += v[i];
  }
  ReadBias(end, column, n, bias);
  FinishColumns(end, entry * m + to(in_entry), column, n, bias, sum);
}

template <class Rows>
int32_t SumParts(const PfArgs* args, const float* parts, int splits, int64_t rows, int m, int n,
                 const Rows& to, const Epilogue& end) {
  const int64_t per_row = CeilDiv(n, 8);
  const dim3 grid(static_cast<unsigned>(CeilDiv(rows * per_row, kElementThreads)));
  const bool packs = n % 8 == 0 && Aligned(parts, 16);
  return Launch(args, &SumPartsKernel<Rows>, grid, kElementThreads, 0, parts, packs, splits, rows, m, n,
                FastDiv(per_row), to, end);
}

// p with all its parts summed.
template <class T, class A, class B, class Rows>
int32_t RunGemm(const PfArgs* args, const char* op, GemmArgs<A, B, Rows> p, int64_t batch) {
  const GemmPlan plan = PlanGemm<T>(p.m, p.n, p.k, batch);
  if (plan.splits == 1) return LaunchGemm<T>(args, p, plan, batch);
  const int64_t rows = batch * p.m;
  float* const parts = static_cast<float*>(DeviceScratch(args, rows * p.n * plan.splits * sizeof(float)));
  if (parts == nullptr) return Fail(args, PF_ERR_MEMORY, "%s: no memory for partial sums", op);
  const Rows to = p.rows;
  const Epilogue end = p.end;
  p.rows = Rows{};
  p.end = EpilogueTo({parts, PF_F32}, p.n);
  PF_TRY(LaunchGemm<T>(args, p, plan, batch));
  return SumParts(args, parts, plan.splits, rows, p.m, p.n, to, end);
}

// A matrix as kernels want it: of type T, its lines aligned and a multiple of a chunk long, zeros at the end.
// It is the operand itself where that is so already, else a copy in scratch.
template <class T>
struct Prepared {
  const T* data;
  int64_t line;
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    PadKernel(FloatArray from, int length, int64_t chunks, FastDiv per_line, T* to) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (at >= chunks) return;
  const int64_t line = at / per_line.divisor;
  const int column = static_cast<int>(at - line * per_line.divisor) * kChunk<T>;
  float v[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i)
    v[i] = column + i < length ? ReadOne(from, line * length + column + i) : 0;
  StorePack<T, kChunk<T>>(to + at * kChunk<T>, v);
}

template <class T>
int32_t Prepare(const PfArgs* args, const char* op, const PfView& v, int64_t lines, int64_t length,
                Prepared<T>* out) {
  constexpr int32_t kType = sizeof(T) == 4 ? PF_F32 : PF_BF16;
  const int64_t per_line = CeilDiv(length, kChunk<T>), chunks = lines * per_line;
  out->line = per_line * kChunk<T>;
  out->data = static_cast<const T*>(v.data);
  if (v.dtype == kType && out->line == length && Aligned(v.data, 16)) return PF_OK;
  T* const copy = static_cast<T*>(DeviceScratch(args, chunks * 16));
  if (copy == nullptr) return Fail(args, PF_ERR_MEMORY, "%s: no memory for a padded operand", op);
  out->data = copy;
  return Launch(args, &PadKernel<T>, dim3(static_cast<unsigned>(CeilDiv(chunks, kElementThreads))),
                kElementThreads, 0, ArrayOf(v), static_cast<int>(length), chunks, FastDiv(per_line), copy);
}

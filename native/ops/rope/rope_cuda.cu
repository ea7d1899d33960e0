#include <type_traits>

#include "backends/cuda/column_sums.h"
#include "backends/cuda/packs.h"
#include "ops/rope/rope.h"

namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;  // heads of one row that share its angles in registers

struct Rope {
  FloatArray x, w, out;  // out is y or dx
  const float *cos, *sin;
  int64_t rows;
  int heads, d;
  // Forward: what becomes of rstd, and eps. Backward: rstd as it was, and the gradient.
  float* rstd;
  float eps;
  FloatArray dy;
  float* parts;  // of dw, one a block; nullptr: not asked for
};

// A team of kLanes threads has a head of one row, eight elements a thread. A task is one row's heads first,
// first + step, ... of which there are at most kHeads.
struct Task {
  int64_t row;
  int first, step;
  __device__ Task(const Rope& p, int64_t task) {
    step = (p.heads + kHeads - 1) / kHeads;
    row = task / step;
    first = static_cast<int>(task - row * step);
  }
};
static inline int64_t TasksOf(const Rope& p) { return p.rows * CeilDiv(p.heads, kHeads); }

template <int kLanes>
__device__ __forceinline__ float TeamSum(float x) {
#pragma unroll
  for (int bits = kLanes / 2; bits > 0; bits >>= 1) x += __shfl_xor_sync(0xffffffffu, x, bits);
  return x;
}

// Angles of four pairs; no rotation without them.
struct Angles {
  float cos[4], sin[4];
  __device__ Angles(const Rope& p, int64_t row, int i, bool there) {
#pragma unroll
    for (int k = 0; k < 4; ++k) cos[k] = 1, sin[k] = 0;
    if (p.cos == nullptr || !there) return;
    const int64_t at = row * (p.d / 2) + i / 2;
    LoadPack<float, 4>(p.cos + at, cos);
    LoadPack<float, 4>(p.sin + at, sin);
  }
  // kBack: by the transpose.
  template <bool kBack>
  __device__ void Turn(float (&t)[8]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float s = kBack ? -sin[k] : sin[k], even = t[2 * k], odd = t[2 * k + 1];
      t[2 * k] = even * cos[k] - odd * s;
      t[2 * k + 1] = even * s + odd * cos[k];
    }
  }
};

// Where this thread's elements of the task's heads lie; -1: nowhere.
struct HeadPlaces {
  Task task;
  int heads, d, i;
  bool there;
  __device__ int64_t Head(int k) const {
    const int head = task.first + k * task.step;
    return there && head < heads ? task.row * heads + head : -1;
  }
  __device__ int64_t operator()(int k) const { return Head(k) >= 0 ? Head(k) * d + i : -1; }
};

template <int kLanes, bool kNorm>
__global__ void __launch_bounds__(kThreads) ForwardKernel(Rope p, int64_t tasks) {
  const int i = threadIdx.x % kLanes * 8;
  const int64_t mine = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const Task task(p, mine);
  const HeadPlaces at{task, p.heads, p.d, i, mine < tasks && i < p.d};
  float x[kHeads][8], w[1][8];
  ReadPacks(p.x, at, x);
  if (kNorm)
    ReadPacks(
        p.w, [&](int) { return int64_t{at.there ? i : -1}; }, w);
  const Angles angles(p, task.row, i, at.there);
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    if (kNorm) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += x[k][j] * x[k][j];
      const float rstd = 1 / sqrtf(TeamSum<kLanes>(sum) / p.d + p.eps);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[k][j] *= rstd * w[0][j];
      if (i == 0 && at(k) >= 0 && p.rstd) p.rstd[at.Head(k)] = rstd;
    }
    angles.Turn<false>(x[k]);
    if (at(k) >= 0) WritePack<8>(p.out, at(k), x[k]);
  }
}

// Blocks walk the tasks with a stride, so that the columns of dw are summed in registers first.
template <int kLanes, bool kNorm>
__global__ void __launch_bounds__(kThreads) BackwardKernel(Rope p, int64_t tasks) {
  constexpr int kTeams = kThreads / kLanes;
  __shared__ float of_team[kNorm ? kThreads * 8 : 1];
  const int team = threadIdx.x / kLanes, i = threadIdx.x % kLanes * 8;
  float w[1][8], dw[8] = {};
  if (kNorm)
    ReadPacks(
        p.w, [&](int) { return int64_t{i < p.d ? i : -1}; }, w);
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kTeams; base < tasks;
       base += static_cast<int64_t>(gridDim.x) * kTeams) {
    const Task task(p, base + team);
    const HeadPlaces at{task, p.heads, p.d, i, base + team < tasks && i < p.d};
    float x[kHeads][8], dy[kHeads][8], rstd[kHeads] = {};
    ReadPacks(p.dy, at, dy);
    if (kNorm) {
      ReadPacks(p.x, at, x);
#pragma unroll
      for (int k = 0; k < kHeads; ++k)
        if (at(k) >= 0) rstd[k] = p.rstd[at.Head(k)];
    }
    const Angles angles(p, task.row, i, at.there);
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      angles.Turn<true>(dy[k]);
      if (kNorm) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          x[k][j] *= rstd[k];
          dw[j] += dy[k][j] * x[k][j];
          dy[k][j] *= w[0][j];
          dot += dy[k][j] * x[k][j];
        }
        dot = TeamSum<kLanes>(dot) / p.d;
#pragma unroll
        for (int j = 0; j < 8; ++j) dy[k][j] = rstd[k] * (dy[k][j] - x[k][j] * dot);
      }
      if (at(k) >= 0) WritePack<8>(p.out, at(k), dy[k]);
    }
  }
  if constexpr (kNorm) {
    if (p.parts == nullptr) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) of_team[(team * 8 + j) * kLanes + i / 8] = dw[j];
    __syncthreads();
    for (int column = threadIdx.x; column < p.d; column += kThreads) {
      float sum = 0;
      for (int k = 0; k < kTeams; ++k) sum += of_team[(k * 8 + column % 8) * kLanes + column / 8];
      p.parts[static_cast<int64_t>(blockIdx.x) * p.d + column] = sum;
    }
  }
}

// Any head size and alignment: a warp a head, element by element, and columns of dw by a walk of their own.
struct Pair {
  float mine, other, cos, sin;  // an element, its partner, and the angle with the sign for this element
};
__device__ __forceinline__ Pair PairOf(const Rope& p, const FloatArray& v, int64_t head, int i) {
  Pair pair{ReadOne(v, head * p.d + i), 0, 1, 0};
  if (p.cos == nullptr) return pair;
  const int64_t angle = head / p.heads * (p.d / 2) + i / 2;
  pair.other = ReadOne(v, head * p.d + (i ^ 1));
  pair.cos = p.cos[angle];
  pair.sin = i % 2 ? p.sin[angle] : -p.sin[angle];
  return pair;
}

template <bool kNorm>
__global__ void __launch_bounds__(kThreads) AnyForwardKernel(Rope p) {
  const int64_t head = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (head >= p.rows * p.heads) return;
  const int lane = threadIdx.x % 32;
  float rstd = 1;
  if (kNorm) {
    float sum = 0;
    for (int i = lane; i < p.d; i += 32) {
      const float x = ReadOne(p.x, head * p.d + i);
      sum += x * x;
    }
    rstd = 1 / sqrtf(WarpSum(sum) / p.d + p.eps);
    if (lane == 0 && p.rstd) p.rstd[head] = rstd;
  }
  for (int i = lane; i < p.d; i += 32) {
    Pair x = PairOf(p, p.x, head, i);
    if (kNorm) {
      x.mine *= rstd * ReadOne(p.w, i);
      if (p.cos != nullptr) x.other *= rstd * ReadOne(p.w, i ^ 1);
    }
    WriteOne(p.out, head * p.d + i, x.mine * x.cos + x.other * x.sin);
  }
}

// The gradient before the rotation.
__device__ __forceinline__ float TurnedBack(const Rope& p, int64_t head, int i) {
  const Pair dy = PairOf(p, p.dy, head, i);
  return dy.mine * dy.cos - dy.other * dy.sin;
}

template <bool kNorm>
__global__ void __launch_bounds__(kThreads) AnyBackwardKernel(Rope p) {
  const int64_t head = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (head >= p.rows * p.heads) return;
  const int lane = threadIdx.x % 32;
  float dot = 0;
  const float rstd = kNorm ? p.rstd[head] : 1;
  if (kNorm) {
    for (int i = lane; i < p.d; i += 32)
      dot += TurnedBack(p, head, i) * ReadOne(p.w, i) * (ReadOne(p.x, head * p.d + i) * rstd);
    dot = WarpSum(dot) / p.d;
  }
  for (int i = lane; i < p.d; i += 32) {
    float dx = TurnedBack(p, head, i);
    if (kNorm) dx = rstd * (dx * ReadOne(p.w, i) - ReadOne(p.x, head * p.d + i) * rstd * dot);
    WriteOne(p.out, head * p.d + i, dx);
  }
}

__global__ void __launch_bounds__(kThreads) AnyWeightKernel(Rope p) {
  for (int i = threadIdx.x; i < p.d; i += kThreads) {
    float sum = 0;
    for (int64_t head = blockIdx.x; head < p.rows * p.heads; head += gridDim.x)
      sum += TurnedBack(p, head, i) * (ReadOne(p.x, head * p.d + i) * p.rstd[head]);
    p.parts[static_cast<int64_t>(blockIdx.x) * p.d + i] = sum;
  }
}

// fn(lanes) with the size of the teams as a type, 0 when only the general kernels serve.
template <class Fn>
int32_t WithLanes(const Rope& p, Fn fn) {
  const bool packs = p.d % 8 == 0 && Packs(p.x) && Packs(p.w) && Packs(p.out) && Packs(p.dy) &&
                     Aligned(p.cos, 16) && Aligned(p.sin, 16);
  if (packs && p.d <= 64) return fn(std::integral_constant<int, 8>{});
  if (packs && p.d <= 128) return fn(std::integral_constant<int, 16>{});
  if (packs && p.d <= 256) return fn(std::integral_constant<int, 32>{});
  return fn(std::integral_constant<int, 0>{});
}

Rope MakeRope(const PfArgs* a, const RopeShape& s) {
  Rope p{};
  p.x = ArrayOf(a->in[0]);
  p.w = ArrayOf(a->in[1]);
  p.out = ArrayOf(a->out[0]);
  p.cos = PfData<float>(a->in[2]);
  p.sin = PfData<float>(a->in[3]);
  p.rows = s.rows;
  p.heads = static_cast<int>(s.heads);
  p.d = static_cast<int>(s.d);
  return p;
}

unsigned WarpBlocks(const Rope& p) { return static_cast<unsigned>(CeilDiv(p.rows * p.heads, kThreads / 32)); }

template <bool kNorm>
int32_t LaunchForward(const PfArgs* a, const Rope& p) {
  return WithLanes(p, [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    if constexpr (kLanes == 0) {
      return Launch(a, &AnyForwardKernel<kNorm>, WarpBlocks(p), kThreads, 0, p);
    } else {
      const int64_t tasks = TasksOf(p);
      return Launch(a, &ForwardKernel<kLanes, kNorm>,
                    static_cast<unsigned>(CeilDiv(tasks * kLanes, kThreads)), kThreads, 0, p, tasks);
    }
  });
}

template <bool kNorm>
int32_t LaunchBackward(const PfArgs* a, Rope p, float* dw, bool accumulate) {
  const int64_t tasks = TasksOf(p);
  RowGroups parts{};
  const auto launch = [&](auto lanes) -> int32_t {
    constexpr int kLanes = decltype(lanes)::value;
    if constexpr (kLanes == 0) {
      PF_TRY(Launch(a, &AnyBackwardKernel<kNorm>, WarpBlocks(p), kThreads, 0, p));
      if (dw == nullptr) return PF_OK;
      const int64_t blocks = WarpBlocks(p) < kMostBlocks / 2 ? WarpBlocks(p) : kMostBlocks / 2;
      PF_TRY(MakeParts(a, blocks, p.d, 1, &parts));
      p.parts = parts.parts;
      return Launch(a, &AnyWeightKernel, static_cast<unsigned>(blocks), kThreads, 0, p);
    } else {
      int64_t blocks = CeilDiv(tasks * kLanes, kThreads);
      if (dw != nullptr) {
        if (blocks > kMostBlocks / 2) blocks = kMostBlocks / 2;
        PF_TRY(MakeParts(a, blocks, p.d, 1, &parts));
        p.parts = parts.parts;
      }
      return Launch(a, &BackwardKernel<kLanes, kNorm>, static_cast<unsigned>(blocks), kThreads, 0, p, tasks);
    }
  };
  if (tasks * p.d > 0)
    PF_TRY(WithLanes(p, launch));
  else if (dw != nullptr)
    PF_TRY(MakeParts(a, 0, p.d, 1, &parts));
  if (dw == nullptr) return PF_OK;
  parts.out[0] = {dw, PF_F32};
  return JoinSums(a, parts, 1, accumulate);
}

}  // namespace

int32_t pf_cuda_rope(const PfArgs* a) {
  RopeShape s;
  PF_TRY(RopeCheck(a, &s));
  PF_TRY(RopeDtypes(a));
  Rope p = MakeRope(a, s);
  p.rstd = PfData<float>(a->out[1]);
  p.eps = static_cast<float>(PfParams<RopeParams>(a).eps);
  if (PfCount(a->in[0]) == 0) return PF_OK;
  return p.w.data ? LaunchForward<true>(a, p) : LaunchForward<false>(a, p);
}

int32_t pf_cuda_rope_backward(const PfArgs* a) {
  RopeShape s;
  PF_TRY(RopeBackwardCheck(a, &s));
  PF_TRY(RopeBackwardDtypes(a));
  Rope p = MakeRope(a, s);
  p.rstd = PfData<float>(a->in[4]);
  p.dy = ArrayOf(a->in[5]);
  const bool accumulate = PfParams<RopeBackwardParams>(a).accumulate != 0;
  return p.w.data ? LaunchBackward<true>(a, p, PfData<float>(a->out[1]), accumulate)
                  : LaunchBackward<false>(a, p, nullptr, false);
}

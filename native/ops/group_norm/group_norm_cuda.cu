#include <type_traits>

#include "backends/cuda/column_sums.h"
#include "backends/cuda/packs.h"
#include "ops/group_norm/group_norm.h"

namespace {

constexpr int kThreads = 256;

// Frames are cut into chunks of pixels, channels into tiles; a block has a chunk of a tile. A thread keeps
// its pack of channels and walks every lanes-th pixel of the chunk.
struct Cut {
  int64_t pixels, chunk, chunks;  // of a frame
  int frames, channels, groups, width;
  int packs, lanes, tiles;
};

Cut MakeCut(const GroupNormShape& s, int pack) {
  Cut cut{};
  cut.pixels = s.pixels;
  cut.frames = static_cast<int>(s.frames);
  cut.channels = static_cast<int>(s.channels);
  cut.groups = static_cast<int>(s.groups);
  cut.width = cut.channels / cut.groups;
  const int packs = cut.channels / pack;
  cut.packs = packs < kThreads ? packs : kThreads;
  cut.lanes = kThreads / cut.packs;
  cut.tiles = static_cast<int>(CeilDiv(packs, cut.packs));
  const int64_t fewest = 4 * cut.lanes, share = CeilDiv(s.frames * s.pixels * cut.tiles, kMostBlocks);
  cut.chunk = CeilDiv(share > 0 ? share : 1, fewest) * fewest;
  cut.chunks = CeilDiv(s.pixels, cut.chunk);
  return cut;
}
unsigned BlocksOf(const Cut& cut) { return static_cast<unsigned>(cut.frames * cut.chunks * cut.tiles); }

// What this thread has of the cut.
template <int N>
struct Share {
  int64_t part, frame, first, last;  // the chunk among all, its frame, its pixels in the frame
  int tile, c, lane;                 // first channel of the tile and of this thread
  bool there;
  __device__ explicit Share(const Cut& cut) {
    part = blockIdx.x / cut.tiles;
    frame = part / cut.chunks;
    first = (part - frame * cut.chunks) * cut.chunk;
    last = first + cut.chunk < cut.pixels ? first + cut.chunk : cut.pixels;
    tile = static_cast<int>(blockIdx.x - part * cut.tiles) * cut.packs * N;
    lane = static_cast<int>(threadIdx.x) / cut.packs;
    c = tile + (static_cast<int>(threadIdx.x) - lane * cut.packs) * N;
    there = lane < cut.lanes && c < cut.channels;
  }
  // body(at, pixels there) with the places of up to K pixels at a time.
  template <int K, class Body>
  __device__ void ForPixels(const Cut& cut, Body body) const {
    if (!there) return;
    for (int64_t p = first + lane; p < last; p += K * cut.lanes) {
      const int64_t left = (last - p + cut.lanes - 1) / cut.lanes,
                    row = (frame * cut.pixels + p) * cut.channels + c;
      const int step = cut.lanes * cut.channels, n = left < K ? static_cast<int>(left) : K;
      body([=](int k) { return k < n ? row + static_cast<int64_t>(k) * step : -1; }, n);
    }
  }
};

// Of one channel, over some pixels.
struct Moments {
  float mean, square;  // square: sum of squared distances from the mean
};

// Mean and centred square sum of every channel of a chunk, parts [chunk of all, C]. Each step is centred on
// the mean so far, so values far from zero keep their digits.
template <int N>
__global__ void __launch_bounds__(kThreads) MomentsKernel(Cut cut, FloatArray x, Moments* parts) {
  constexpr int kPixels = 4;
  __shared__ Moments of_lane[kThreads * N];
  const Share<N> share(cut);
  float mean[N] = {}, square[N] = {}, seen = 0;
  share.template ForPixels<kPixels>(cut, [&](auto at, int n) {
    float v[kPixels][N];
    ReadPacks(x, at, v);
    const float scale = 1 / (seen + n);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (seen == 0) mean[j] = v[0][j];
      float sum = 0, squares = 0;
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        const float centred = k < n ? v[k][j] - mean[j] : 0;
        sum += centred;
        squares += centred * centred;
      }
      mean[j] += sum * scale;
      square[j] += squares - sum * sum * scale;
    }
    seen += n;
  });
  const int channels = cut.packs * N;
  if (share.lane < cut.lanes) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      of_lane[share.lane * channels + share.c - share.tile + j] = {mean[j], square[j]};
  }
  __syncthreads();
  const int64_t pixels = share.last - share.first;
  for (int c = threadIdx.x; c < channels && share.tile + c < cut.channels; c += kThreads) {
    const auto count = [&](int lane) {
      return static_cast<float>((pixels - lane + cut.lanes - 1) / cut.lanes);
    };
    const int lanes = pixels < cut.lanes ? static_cast<int>(pixels) : cut.lanes;
    Moments total{0, 0};
    for (int k = 0; k < lanes; ++k)
      total.mean += count(k) * (of_lane[k * channels + c].mean - of_lane[c].mean);
    total.mean = of_lane[c].mean + total.mean / static_cast<float>(pixels);
    for (int k = 0; k < lanes; ++k) {
      const Moments& m = of_lane[k * channels + c];
      total.square += m.square + count(k) * (m.mean - total.mean) * (m.mean - total.mean);
    }
    parts[share.part * cut.channels + share.tile + c] = total;
  }
}

// term(chunk, channel) summed over the chunks of a frame and the channels of a group, by a block.
template <class Term>
__device__ __forceinline__ float GroupTotal(const Cut& cut, int group, Term term) {
  float sum = 0;
  const int terms = static_cast<int>(cut.chunks) * cut.width;
  for (int i = threadIdx.x; i < terms; i += kThreads) {
    const int k = i / cut.width;
    sum += term(k, group * cut.width + i - k * cut.width);
  }
  return BlockSum<kThreads>(sum);
}

struct Statistics {
  float *mean, *rstd;  // [F, G]
};

// A block a group: Chan's combination, the spread inside the parts plus the spread of their means.
__global__ void __launch_bounds__(kThreads)
    StatisticsKernel(Cut cut, const Moments* parts, float eps, Statistics stats, Statistics out) {
  const int64_t frame = blockIdx.x / cut.groups;
  const int group = static_cast<int>(blockIdx.x - frame * cut.groups);
  const float total = static_cast<float>(cut.pixels) * static_cast<float>(cut.width);
  const auto at = [&](int64_t k, int c) { return parts[(frame * cut.chunks + k) * cut.channels + c]; };
  const auto count = [&](int64_t k) {
    const int64_t rest = cut.pixels - k * cut.chunk;
    return static_cast<float>(rest < cut.chunk ? rest : cut.chunk);
  };
  const float near = at(0, group * cut.width).mean;
  const float mean = near + GroupTotal(cut, group, [&](int64_t k, int c) {
                              return count(k) * (at(k, c).mean - near);
                            }) / total;
  const float square = GroupTotal(cut, group, [&](int64_t k, int c) {
    const Moments m = at(k, c);
    return m.square + count(k) * (m.mean - mean) * (m.mean - mean);
  });
  if (threadIdx.x != 0) return;
  const float rstd = 1 / sqrtf(fmaxf(square, 0.0f) / total + eps);
  stats.mean[blockIdx.x] = mean;
  stats.rstd[blockIdx.x] = rstd;
  if (out.mean) out.mean[blockIdx.x] = mean;
  if (out.rstd) out.rstd[blockIdx.x] = rstd;
}

template <int N>
__device__ __forceinline__ void ReadChannels(const FloatArray& v, int c, float (&to)[N]) {
  float pack[1][N];
  ReadPacks(
      v, [=](int) { return static_cast<int64_t>(c); }, pack);
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = pack[0][j];
}

__device__ __forceinline__ float Sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

template <int N, bool kSilu>
__global__ void __launch_bounds__(kThreads)
    ApplyKernel(Cut cut, FloatArray x, FloatArray w, FloatArray b, Statistics stats, FloatArray y) {
  constexpr int kPixels = 4;
  const Share<N> share(cut);
  float mean[N], factor[N], offset[N];
  if (share.there) {
    ReadChannels(w, share.c, factor);
    ReadChannels(b, share.c, offset);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t g = share.frame * cut.groups + (share.c + j) / cut.width;
      mean[j] = stats.mean[g];
      factor[j] *= stats.rstd[g];
    }
  }
  share.template ForPixels<kPixels>(cut, [&](auto at, int) {
    float v[kPixels][N];
    ReadPacks(x, at, v);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float z = (v[k][j] - mean[j]) * factor[j] + offset[j];
        v[k][j] = kSilu ? z * Sigmoid(z) : z;
      }
      if (at(k) >= 0) WritePack<N>(y, at(k), v[k]);
    }
  });
}

struct Backward {
  FloatArray x, w, b, dy, dx;
  Statistics stats;
  float* parts;        // [chunk of all, 2, C]: sums of dz * normal and of dz
  float *dots, *sums;  // [F, G]: means of w dz * normal and of w dz
};

// What the backward kernels know of their channels, and the gradient before SiLU.
template <int N, bool kSilu>
struct Channels {
  float mean[N], rstd[N], w[N], b[N];
  __device__ Channels(const Cut& cut, const Backward& p, const Share<N>& share) {
    if (!share.there) return;
    ReadChannels(p.w, share.c, w);
    ReadChannels(p.b, share.c, b);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t g = share.frame * cut.groups + (share.c + j) / cut.width;
      mean[j] = p.stats.mean[g];
      rstd[j] = p.stats.rstd[g];
    }
  }
  __device__ float Normal(float x, int j) const { return (x - mean[j]) * rstd[j]; }
  __device__ float Gradient(float dy, float normal, int j) const {
    if (!kSilu) return dy;
    const float z = normal * w[j] + b[j], sigmoid = Sigmoid(z);
    return dy * sigmoid * (1 + z * (1 - sigmoid));
  }
};

template <int N, bool kSilu>
__global__ void __launch_bounds__(kThreads) BackwardSumsKernel(Cut cut, Backward p) {
  constexpr int kPixels = 2;
  __shared__ float of_lane[2][kThreads * N];
  const Share<N> share(cut);
  const Channels<N, kSilu> channel(cut, p, share);
  float dw[N] = {}, db[N] = {};
  share.template ForPixels<kPixels>(cut, [&](auto at, int) {
    float x[kPixels][N], dy[kPixels][N];  // a dy of zero where there is no pixel
    ReadPacks(p.x, at, x);
    ReadPacks(p.dy, at, dy);
#pragma unroll
    for (int i = 0; i < kPixels * N; ++i) {
      const int j = i % N;
      const float normal = channel.Normal(x[i / N][j], j), dz = channel.Gradient(dy[i / N][j], normal, j);
      dw[j] += dz * normal;
      db[j] += dz;
    }
  });
  const int channels = cut.packs * N;
  if (share.lane < cut.lanes) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int at = share.lane * channels + share.c - share.tile + j;
      of_lane[0][at] = dw[j];
      of_lane[1][at] = db[j];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < channels && share.tile + c < cut.channels; c += kThreads) {
    for (int k = 0; k < 2; ++k) {
      float sum = 0;
      for (int lane = 0; lane < cut.lanes; ++lane) sum += of_lane[k][lane * channels + c];
      p.parts[(2 * share.part + k) * cut.channels + share.tile + c] = sum;
    }
  }
}

__global__ void __launch_bounds__(kThreads) BackwardMeansKernel(Cut cut, Backward p) {
  const int64_t frame = blockIdx.x / cut.groups;
  const int group = static_cast<int>(blockIdx.x - frame * cut.groups);
  const float total = static_cast<float>(cut.pixels) * static_cast<float>(cut.width);
  const auto mean = [&](int table) {
    return GroupTotal(cut, group,
                      [&](int64_t k, int c) {
                        return p.parts[(2 * (frame * cut.chunks + k) + table) * cut.channels + c] *
                               ReadOne(p.w, c);
                      }) /
           total;
  };
  const float dot = mean(0), sum = mean(1);
  if (threadIdx.x != 0) return;
  p.dots[blockIdx.x] = dot;
  p.sums[blockIdx.x] = sum;
}

template <int N, bool kSilu>
__global__ void __launch_bounds__(kThreads) BackwardApplyKernel(Cut cut, Backward p) {
  constexpr int kPixels = 2;
  const Share<N> share(cut);
  const Channels<N, kSilu> channel(cut, p, share);
  float dot[N], sum[N];
  if (share.there) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t g = share.frame * cut.groups + (share.c + j) / cut.width;
      dot[j] = p.dots[g];
      sum[j] = p.sums[g];
    }
  }
  share.template ForPixels<kPixels>(cut, [&](auto at, int) {
    float x[kPixels][N], dy[kPixels][N];
    ReadPacks(p.x, at, x);
    ReadPacks(p.dy, at, dy);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float normal = channel.Normal(x[k][j], j), dz = channel.Gradient(dy[k][j], normal, j);
        dy[k][j] = channel.rstd[j] * (dz * channel.w[j] - sum[j] - normal * dot[j]);
      }
      if (at(k) >= 0) WritePack<N>(p.dx, at(k), dy[k]);
    }
  });
}

template <int N, bool kSilu>
int32_t Forward(const PfArgs* a, const GroupNormShape& s) {
  const Cut cut = MakeCut(s, N);
  const int64_t groups = s.frames * s.groups;
  auto* parts = static_cast<Moments*>(DeviceScratch(a, s.frames * cut.chunks * s.channels * sizeof(Moments)));
  float* stats = static_cast<float*>(DeviceScratch(a, 2 * groups * sizeof(float)));
  if (!parts || !stats) return NoScratch(a);
  const Statistics own{stats, stats + groups}, out{PfData<float>(a->out[1]), PfData<float>(a->out[2])};
  const FloatArray x = ArrayOf(a->in[0]);
  PF_TRY(Launch(a, &MomentsKernel<N>, BlocksOf(cut), kThreads, 0, cut, x, parts));
  PF_TRY(Launch(a, &StatisticsKernel, static_cast<unsigned>(groups), kThreads, 0, cut, parts,
                static_cast<float>(PfParams<GroupNormParams>(a).eps), own, out));
  return Launch(a, &ApplyKernel<N, kSilu>, BlocksOf(cut), kThreads, 0, cut, x, ArrayOf(a->in[1]),
                ArrayOf(a->in[2]), own, ArrayOf(a->out[0]));
}

template <int N, bool kSilu>
int32_t BackwardOf(const PfArgs* a, const GroupNormShape& s) {
  const Cut cut = MakeCut(s, N);
  const int64_t groups = s.frames * s.groups;
  RowGroups parts;
  PF_TRY(MakeParts(a, s.frames * cut.chunks, s.channels, 2, &parts));
  float* means = static_cast<float*>(DeviceScratch(a, 2 * groups * sizeof(float)));
  if (!means) return NoScratch(a);
  const Backward p{ArrayOf(a->in[0]),  ArrayOf(a->in[1]),
                   ArrayOf(a->in[2]),  ArrayOf(a->in[5]),
                   ArrayOf(a->out[0]), {PfData<float>(a->in[3]), PfData<float>(a->in[4])},
                   parts.parts,        means,
                   means + groups};
  if (PfCount(a->in[0]) > 0) {
    PF_TRY(Launch(a, &BackwardSumsKernel<N, kSilu>, BlocksOf(cut), kThreads, 0, cut, p));
    PF_TRY(Launch(a, &BackwardMeansKernel, static_cast<unsigned>(groups), kThreads, 0, cut, p));
    PF_TRY(Launch(a, &BackwardApplyKernel<N, kSilu>, BlocksOf(cut), kThreads, 0, cut, p));
  }
  if (!PfPresent(a->out[1]) && !PfPresent(a->out[2])) return PF_OK;
  parts.out[0] = ArrayOf(a->out[1]);
  parts.out[1] = ArrayOf(a->out[2]);
  return JoinSums(a, parts, 1, PfParams<GroupNormBackwardParams>(a).accumulate != 0);
}

// fn(pack, silu) with both as types.
template <class Fn>
int32_t WithKernels(const PfArgs* a, const GroupNormShape& s, bool silu, Fn fn) {
  bool packs = s.channels % 8 == 0 && Aligned(a->out[0].data, 16);
  for (int i = 0; i < a->n_in; ++i)
    if (i != 3 && i != 4) packs &= Aligned(a->in[i].data, 16);
  const auto with = [&](auto pack) {
    return silu ? fn(pack, std::true_type{}) : fn(pack, std::false_type{});
  };
  return packs ? with(std::integral_constant<int, 8>{}) : with(std::integral_constant<int, 1>{});
}

}  // namespace

int32_t pf_cuda_group_norm(const PfArgs* a) {
  GroupNormShape s;
  PF_TRY(GroupNormForwardCheck(a, &s));
  PF_TRY(GroupNormDtypes(a));
  if (PfCount(a->in[0]) == 0) return PF_OK;
  return WithKernels(a, s, PfParams<GroupNormParams>(a).silu != 0, [&](auto pack, auto silu) {
    return Forward<decltype(pack)::value, decltype(silu)::value>(a, s);
  });
}

int32_t pf_cuda_group_norm_backward(const PfArgs* a) {
  GroupNormShape s;
  PF_TRY(GroupNormBackwardCheck(a, &s));
  PF_TRY(GroupNormBackwardDtypes(a));
  if (s.channels == 0) return PF_OK;
  return WithKernels(a, s, PfParams<GroupNormBackwardParams>(a).silu != 0, [&](auto pack, auto silu) {
    return BackwardOf<decltype(pack)::value, decltype(silu)::value>(a, s);
  });
}

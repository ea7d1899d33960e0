#include "ops/norm/norm.h"
#include "ops/norm/norm_rows.cuh"

namespace {

struct Forward {
  FloatArray x, scale, shift, y;  // the weight of rms_norm is the scale
  RowEntries entries;
  float *mean, *rstd;
  int64_t rows;
  int d;
  float eps;
};

template <class L, bool kRms>
__global__ void __launch_bounds__(L::kBlock) ForwardKernel(Forward p) {
  constexpr int N = L::N, kPacks = L::kPacks;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * L::kRowsPerBlock + threadIdx.x / L::kThreads;
  if (n >= p.rows) return;  // never a part of a block that shares a row
  const int64_t row = n * p.d;
  float x[kPacks][N], table[kPacks][N], mean = 0, sum[1] = {};
  const auto read = [&](int base) { ReadPacks(p.x, PackPlaces<L>{row, base, p.d}, x); };
  if (L::kWhole) read(0);  // before the row's entry is looked up, so that the two do not wait for each other
  const int64_t entry = static_cast<int64_t>(p.entries.Of(n)) * p.d;
  if (!kRms) {
    ForSegments<L>(p.d, [&](int base) {
      if (!L::kWhole) read(base);
#pragma unroll
      for (int i = 0; i < kPacks * N; ++i) sum[0] += x[i / N][i % N];
    });
    RowTotals<L>(sum);
    mean = sum[0] / p.d;
    sum[0] = 0;
  }
  // Centred before squaring: a row far from zero keeps its digits.
  ForSegments<L>(p.d, [&](int base) {
    if (!L::kWhole) read(base);
    const PackPlaces<L> at{row, base, p.d};
#pragma unroll
    for (int i = 0; i < kPacks * N; ++i) {
      const float centred = at(i / N) >= 0 ? x[i / N][i % N] - mean : 0;
      sum[0] += centred * centred;
    }
  });
  RowTotals<L>(sum);
  const float rstd = 1 / sqrtf(sum[0] / p.d + p.eps);
  ForSegments<L>(p.d, [&](int base) {
    if (!L::kWhole) read(base);
    const PackPlaces<L> at{row, base, p.d}, table_at{entry, base, p.d};
    ReadPacks(p.scale, table_at, table);
#pragma unroll
    for (int i = 0; i < kPacks * N; ++i) {
      float& v = x[i / N][i % N];
      v = (v - mean) * rstd;
      v = kRms ? v * table[i / N][i % N] : v + v * table[i / N][i % N];
    }
    if (!kRms) {
      ReadPacks(p.shift, table_at, table);
#pragma unroll
      for (int i = 0; i < kPacks * N; ++i) x[i / N][i % N] += table[i / N][i % N];
    }
    WritePacks<L>(p.y, at, x);
  });
  if (threadIdx.x % L::kThreads == 0) {
    if (p.mean) p.mean[n] = mean;
    if (p.rstd) p.rstd[n] = rstd;
  }
}

struct Backward {
  FloatArray x, scale, dy, dx;
  RowEntries entries;
  const float *mean, *rstd;
  int d;
};

// Columns of dy and dy * normal: modulation's dshift and dscale; rms_norm has only the second.
template <class L, bool kRms>
struct Sums {
  static constexpr int kTables = kRms ? 1 : 2;
  float of[kTables][L::kPacks][L::N];

  __device__ void Clear() {
#pragma unroll
    for (int i = 0; i < kTables * L::kPacks * L::N; ++i)
      of[i / (L::kPacks * L::N)][i / L::N % L::kPacks][i % L::N] = 0;
  }
  __device__ void Add(const float (&dy)[L::kPacks][L::N], const float (&normal)[L::kPacks][L::N]) {
#pragma unroll
    for (int i = 0; i < L::kPacks * L::N; ++i) {
      const float g = dy[i / L::N][i % L::N];
      if (!kRms) of[0][i / L::N][i % L::N] += g;
      of[kTables - 1][i / L::N][i % L::N] += g * normal[i / L::N][i % L::N];
    }
  }
  __device__ void Put(const RowGroups& groups, int64_t group, int64_t from, int64_t to, int32_t entry,
                      int base) const {
#pragma unroll
    for (int t = 0; t < kTables; ++t) {
      const SumPlace place = PlaceOfSums(groups, group, from, to, entry, t);
      WritePacks<L>(place.to, PackPlaces<L>{place.at, base, static_cast<int>(groups.d)}, of[t]);
    }
  }
};

// body(n, entry) for the rows of a group and end(from, to, entry) after each run of the same entry.
template <class Body, class End>
__device__ __forceinline__ void ForRuns(const RowGroups& groups, const RowEntries& entries, int64_t group,
                                        Body body, End end) {
  const int64_t first = groups.First(group), last = groups.Last(group);
  int64_t from = first;
  int32_t current = 0;
  for (int64_t k = first; k < last; ++k) {
    const int64_t n = groups.Row(k);
    const int32_t entry = entries.Of(n);
    if (k > from && entry != current) {
      end(from, k, current);
      from = k;
    }
    current = entry;
    body(n, entry);
  }
  end(from, last, current);
}

// x becomes normal: zeros in lanes behind the row are multiplied by a dy of zero.
template <class L, bool kRms>
__device__ __forceinline__ void ReadNormal(const Backward& p, int64_t n, int base,
                                           float (&x)[L::kPacks][L::N], float (&dy)[L::kPacks][L::N]) {
  const PackPlaces<L> at{n * p.d, base, p.d};
  ReadPacks(p.x, at, x);
  ReadPacks(p.dy, at, dy);
  const float mean = kRms ? 0 : p.mean[n], rstd = p.rstd[n];
#pragma unroll
  for (int i = 0; i < L::kPacks * L::N; ++i) x[i / L::N][i % L::N] = (x[i / L::N][i % L::N] - mean) * rstd;
}

// A group of rows after one another; with kSums their columns are summed on the way. Without sums a group is
// one row.
template <class L, bool kRms, bool kSums>
__global__ void __launch_bounds__(L::kBlock) BackwardKernel(Backward p, RowGroups groups) {
  constexpr int N = L::N, kPacks = L::kPacks;
  static_assert(L::kWhole || !kSums);
  const int64_t group = static_cast<int64_t>(blockIdx.x) * L::kRowsPerBlock + threadIdx.x / L::kThreads;
  if (group >= groups.groups) return;
  float x[kPacks][N], dy[kPacks][N], table[kPacks][N];
  Sums<L, kRms> sums;
  if (kSums) sums.Clear();
  const auto row = [&](int64_t n, int32_t entry) {
    const auto gradient = [&](int base) {
      ReadPacks(p.scale, PackPlaces<L>{static_cast<int64_t>(entry) * p.d, base, p.d}, table);
#pragma unroll
      for (int i = 0; i < kPacks * N; ++i) {
        float& g = dy[i / N][i % N];
        g = kRms ? g * table[i / N][i % N] : g + g * table[i / N][i % N];
      }
    };
    float dots[2] = {};  // means of g * normal and of g
    ForSegments<L>(p.d, [&](int base) {
      ReadNormal<L, kRms>(p, n, base, x, dy);
      if (kSums) sums.Add(dy, x);
      gradient(base);
#pragma unroll
      for (int i = 0; i < kPacks * N; ++i) {
        dots[0] += dy[i / N][i % N] * x[i / N][i % N];
        if (!kRms) dots[1] += dy[i / N][i % N];
      }
    });
    RowTotals<L>(dots);
    dots[0] /= p.d;
    dots[1] /= p.d;
    const float rstd = p.rstd[n];
    ForSegments<L>(p.d, [&](int base) {
      if (!L::kWhole) {
        ReadNormal<L, kRms>(p, n, base, x, dy);
        gradient(base);
      }
#pragma unroll
      for (int i = 0; i < kPacks * N; ++i) {
        float& g = dy[i / N][i % N];
        g = rstd * (g - dots[1] - x[i / N][i % N] * dots[0]);
      }
      WritePacks<L>(p.dx, PackPlaces<L>{n * p.d, base, p.d}, dy);
    });
  };
  ForRuns(groups, p.entries, group, row, [&](int64_t from, int64_t to, int32_t entry) {
    if (!kSums) return;
    sums.Put(groups, group, from, to, entry, 0);
    sums.Clear();
  });
}

// The sums alone, for rows that do not fit in registers: a block has a segment of a group.
template <class L, bool kRms>
__global__ void __launch_bounds__(L::kBlock) SumsKernel(Backward p, RowGroups groups) {
  static_assert(L::kRowsPerBlock == 1);
  const int segments = (p.d + L::kSegment - 1) / L::kSegment;
  const int64_t group = blockIdx.x / segments;
  const int base = static_cast<int>(blockIdx.x - group * segments) * L::kSegment;
  float x[L::kPacks][L::N], dy[L::kPacks][L::N];
  Sums<L, kRms> sums;
  sums.Clear();
  ForRuns(
      groups, p.entries, group,
      [&](int64_t n, int32_t) {
        ReadNormal<L, kRms>(p, n, base, x, dy);
        sums.Add(dy, x);
      },
      [&](int64_t from, int64_t to, int32_t entry) {
        sums.Put(groups, group, from, to, entry, base);
        sums.Clear();
      });
}

template <bool kRms>
int32_t LaunchForward(const PfArgs* a, const Forward& p) {
  if (p.rows == 0) return PF_OK;
  const bool packs = Packs(p.x) && Packs(p.scale) && Packs(p.shift) && Packs(p.y);
  return WithRowLayout(p.d, packs, [&](auto layout) {
    typedef decltype(layout) L;
    return Launch(a, &ForwardKernel<L, kRms>, static_cast<unsigned>(CeilDiv(p.rows, L::kRowsPerBlock)),
                  L::kBlock, 0, p);
  });
}

template <class L, bool kRms, bool kSums>
int32_t LaunchGroups(const PfArgs* a, const Backward& p, const RowGroups& groups) {
  return Launch(a, &BackwardKernel<L, kRms, kSums>,
                static_cast<unsigned>(CeilDiv(groups.groups, L::kRowsPerBlock)), L::kBlock, 0, p, groups);
}

// dx, and the column sums to the tables in `out`, of which either may be absent.
template <bool kRms>
int32_t LaunchBackward(const PfArgs* a, const Backward& p, int64_t rows, const FloatArray (&out)[2],
                       bool accumulate) {
  bool packs = Packs(p.x) && Packs(p.scale) && Packs(p.dy) && Packs(p.dx);
  for (const FloatArray& v : out) packs &= Packs(v);
  RowGroups single{};
  single.rows = single.groups = rows;
  single.per_group = 1;
  const bool sums = out[0].data != nullptr || out[1].data != nullptr;
  RowGroups groups{};
  if (sums) {
    PF_TRY(MakeRowGroups(a, p.entries, rows, p.d, kRms ? 1 : 2, &groups));
    groups.out[0] = out[0];
    groups.out[1] = out[1];
  }
  if (rows > 0)
    PF_TRY(WithRowLayout(p.d, packs, [&](auto layout) {
      typedef decltype(layout) L;
      if constexpr (L::kWhole) {
        if (sums) return LaunchGroups<L, kRms, true>(a, p, groups);
      } else if (sums) {
        const int64_t segments = CeilDiv(p.d, L::kSegment);
        PF_TRY(Launch(a, &SumsKernel<L, kRms>, static_cast<unsigned>(groups.groups * segments), L::kBlock, 0,
                      p, groups));
      }
      return LaunchGroups<L, kRms, false>(a, p, single);
    }));
  return sums ? JoinSums(a, groups, p.entries.count, accumulate) : PF_OK;
}

RowEntries EntriesOf(const PfArgs* a, const PfView& rows, const NormShape& s) {
  return {PfPresent(rows) && s.tables ? PfData<int32_t>(rows) : nullptr, static_cast<int32_t>(s.entries),
          Faults(a), kFaultRows};
}

}  // namespace

int32_t pf_cuda_norm_modulate(const PfArgs* a) {
  NormShape s;
  PF_TRY(NormModulateCheck(a, &s));
  PF_TRY(NormModulateDtypes(a));
  return LaunchForward<false>(
      a, {ArrayOf(a->in[0]), ArrayOf(a->in[2]), ArrayOf(a->in[1]), ArrayOf(a->out[0]),
          EntriesOf(a, a->in[3], s), PfData<float>(a->out[1]), PfData<float>(a->out[2]), s.rows,
          static_cast<int>(s.d), static_cast<float>(PfParams<NormParams>(a).eps)});
}

int32_t pf_cuda_norm_modulate_backward(const PfArgs* a) {
  NormShape s;
  PF_TRY(NormModulateBackwardCheck(a, &s));
  PF_TRY(NormModulateBackwardDtypes(a));
  const FloatArray out[2] = {ArrayOf(a->out[1]), ArrayOf(a->out[2])};
  return LaunchBackward<false>(
      a,
      {ArrayOf(a->in[0]), ArrayOf(a->in[3]), ArrayOf(a->in[5]), ArrayOf(a->out[0]), EntriesOf(a, a->in[4], s),
       PfData<float>(a->in[1]), PfData<float>(a->in[2]), static_cast<int>(s.d)},
      s.rows, out, false);
}

int32_t pf_cuda_rms_norm(const PfArgs* a) {
  NormShape s;
  PF_TRY(RmsNormCheck(a, &s));
  PF_TRY(RmsNormDtypes(a));
  return LaunchForward<true>(a, {ArrayOf(a->in[0]), ArrayOf(a->in[1]), FloatArray{}, ArrayOf(a->out[0]),
                                 EntriesOf(a, PfView{}, s), nullptr, PfData<float>(a->out[1]), s.rows,
                                 static_cast<int>(s.d), static_cast<float>(PfParams<NormParams>(a).eps)});
}

int32_t pf_cuda_rms_norm_backward(const PfArgs* a) {
  NormShape s;
  PF_TRY(RmsNormBackwardCheck(a, &s));
  PF_TRY(RmsNormBackwardDtypes(a));
  const FloatArray out[2] = {ArrayOf(a->out[1]), FloatArray{}};
  return LaunchBackward<true>(
      a,
      {ArrayOf(a->in[0]), ArrayOf(a->in[1]), ArrayOf(a->in[3]), ArrayOf(a->out[0]), EntriesOf(a, PfView{}, s),
       nullptr, PfData<float>(a->in[2]), static_cast<int>(s.d)},
      s.rows, out, PfParams<RmsNormBackwardParams>(a).accumulate != 0);
}

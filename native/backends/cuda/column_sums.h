// Sums of columns over rows, in two stages whose order depends on the shapes alone. Kernels that read all
// rows anyway sum groups of neighbouring rows on the way and leave a part a group; JoinKernel adds the parts.
// Where rows pick entries of a table, every entry has sums of its own: groups then follow the rows in the
// order of their entries, so that an entry that neither starts nor ends a group is finished by that group.
#pragma once
#include "backends/cuda/elementwise.h"

// The entry of a table that a row picks; a value outside is told to the host and reads as 0.
struct RowEntries {
  const int32_t* of_row;  // nullptr: all rows have entry 0
  int32_t count;
  int32_t* faults;
  int32_t fault;
  __device__ int32_t Of(int64_t row) const {
    if (of_row == nullptr) return 0;
    const int32_t entry = of_row[row];
    if (entry >= 0 && entry < count) return entry;
    *faults = fault;
    return 0;
  }
};

struct RowGroups {
  const int32_t *order, *offsets;  // rows by entry, and where entries begin there; nullptr: there is one
  int64_t rows, groups, per_group;
  int64_t d, width;  // columns of a table, and of all tables together
  float* parts;      // [groups, slots, width]: of the entries that start (slot 0) and end (1) a group
  FloatArray out[2];

  __device__ int64_t First(int64_t group) const { return group * per_group; }
  __device__ int64_t Last(int64_t group) const {
    return First(group) + per_group < rows ? First(group) + per_group : rows;
  }
  __device__ int64_t Row(int64_t k) const { return order ? order[k] : k; }
  __device__ int64_t Part(int64_t group, int slot) const {
    return (order ? 2 * group + slot : group) * width;
  }
};

// Where a group's sums of one table go, for the run [from, to) of rows with the same entry.
struct SumPlace {
  FloatArray to;
  int64_t at;
};
__device__ __forceinline__ SumPlace PlaceOfSums(const RowGroups& g, int64_t group, int64_t from, int64_t to,
                                                int32_t entry, int table) {
  if (from == g.First(group)) return {{g.parts, PF_F32}, g.Part(group, 0) + table * g.d};
  if (to == g.Last(group)) return {{g.parts, PF_F32}, g.Part(group, 1) + table * g.d};
  return {g.out[table], entry * g.d};
}

namespace {

constexpr int kSortThreads = 512;
constexpr int kJoinLanes = 32;
constexpr int64_t kFewestRows = 4;

// A block for every entry: how many rows have smaller ones, then its own rows behind them, in order. Every
// warp walks a stretch of the rows.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    SortRowsKernel(RowEntries entries, int64_t rows, int32_t* order, int32_t* offsets) {
  constexpr int kWarps = kThreads / 32;
  __shared__ int32_t smaller[kWarps], equal[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t mine = static_cast<int32_t>(blockIdx.x);
  const int64_t stretch = (rows + kThreads - 1) / kThreads * 32, first = warp * stretch;
  const int64_t last = first + stretch < rows ? first + stretch : rows;
  int32_t below = 0, same = 0;
  for (int64_t n = first; n < last; n += 32) {
    const int32_t entry = n + lane < last ? entries.Of(n + lane) : INT32_MAX;
    below += __popc(__ballot_sync(0xffffffffu, entry < mine));
    same += __popc(__ballot_sync(0xffffffffu, entry == mine));
  }
  if (lane == 0) smaller[warp] = below, equal[warp] = same;
  __syncthreads();
  int32_t begin = 0, at = 0;
  for (int i = 0; i < kWarps; ++i) {
    begin += smaller[i];
    if (i < warp) at += equal[i];
  }
  at += begin;
  for (int64_t n = first; n < last; n += 32) {
    const bool match = n + lane < last && entries.Of(n + lane) == mine;
    const uint32_t matches = __ballot_sync(0xffffffffu, match);
    if (match) order[at + __popc(matches & ((1u << lane) - 1))] = static_cast<int32_t>(n + lane);
    at += __popc(matches);
  }
  if (threadIdx.x == 0) {
    offsets[mine] = begin;
    if (mine == entries.count - 1) offsets[mine + 1] = static_cast<int32_t>(rows);
  }
}

// A block has kLanes columns (threadIdx.x) of an entry and as many threads that share each column's parts.
template <int kLanes>
__global__ void __launch_bounds__(kLanes* kLanes) JoinKernel(RowGroups g, bool accumulate) {
  static_assert(kLanes == 32);
  __shared__ float sums[kLanes][kLanes + 1];
  const int64_t tiles = (g.width + kLanes - 1) / kLanes, entry = blockIdx.x / tiles;
  const int64_t tile = (blockIdx.x - entry * tiles) * kLanes;
  const int64_t begin = g.offsets ? g.offsets[entry] : 0, end = g.offsets ? g.offsets[entry + 1] : g.rows;
  int64_t first = 0, last = 0;
  if (begin < end) {
    first = begin / g.per_group;
    last = (end - 1) / g.per_group + 1;
    if (last == first + 1 && begin > g.First(first) && end < g.Last(first)) return;  // finished by its group
  }
  const int64_t column = tile + threadIdx.x;
  float sum = 0;
  if (column < g.width) {
#pragma unroll 4
    for (int64_t k = first + threadIdx.y; k < last; k += kLanes)
      sum += g.parts[g.Part(k, begin > g.First(k)) + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = WarpSum(sums[threadIdx.x][threadIdx.y]);
  const int64_t mine = tile + threadIdx.y;
  if (threadIdx.x != 0 || mine >= g.width) return;
  const int64_t table = mine / g.d, at = entry * g.d + mine - table * g.d;
  if (g.out[table].data != nullptr)
    WriteOne(g.out[table], at, accumulate ? ReadOne(g.out[table], at) + sum : sum);
}

inline int32_t NoScratch(const PfArgs* a) { return Fail(a, PF_ERR_MEMORY, "no scratch memory left"); }

// Sums of d columns of `tables` (1 or 2) tables that a kernel leaves in as many parts as it likes.
inline int32_t MakeParts(const PfArgs* a, int64_t parts, int64_t d, int tables, RowGroups* g) {
  *g = {};
  g->rows = g->groups = parts;
  g->per_group = 1;
  g->d = d;
  g->width = tables * d;
  g->parts = static_cast<float*>(DeviceScratch(a, (parts * g->width + 1) * sizeof(float)));
  return g->parts ? PF_OK : NoScratch(a);
}

// The same for sums over rows, for every entry.
inline int32_t MakeRowGroups(const PfArgs* a, const RowEntries& entries, int64_t rows, int64_t d, int tables,
                             RowGroups* g) {
  const int64_t most = kMostBlocks / 2, spread = CeilDiv(rows, most);
  const int64_t per_group = spread > kFewestRows ? spread : kFewestRows, groups = CeilDiv(rows, per_group);
  const bool sorted = entries.of_row != nullptr && entries.count > 1;
  PF_TRY(MakeParts(a, sorted ? 2 * groups : groups, d, tables, g));
  g->rows = rows;
  g->groups = groups;
  g->per_group = per_group;
  if (!sorted) return PF_OK;
  int32_t* order = static_cast<int32_t*>(DeviceScratch(a, (rows + entries.count + 1) * sizeof(int32_t)));
  if (!order) return NoScratch(a);
  g->order = order;
  g->offsets = order + rows;
  return Launch(a, &SortRowsKernel<kSortThreads>, static_cast<unsigned>(entries.count), kSortThreads, 0,
                entries, rows, order, order + rows);
}

inline int32_t JoinSums(const PfArgs* a, const RowGroups& g, int64_t entries, bool accumulate) {
  if (g.width == 0 || entries == 0) return PF_OK;
  const dim3 block(kJoinLanes, kJoinLanes);
  return Launch(a, &JoinKernel<kJoinLanes>, static_cast<unsigned>(entries * CeilDiv(g.width, kJoinLanes)),
                block, 0, g, accumulate);
}

}  // namespace

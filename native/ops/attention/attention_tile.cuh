// Tiles of rows in shared memory, and which of them a block has to look at.
#pragma once
#include "backends/cuda/mma.h"
#include "ops/attention/attention_operands.cuh"

namespace {

// A tile of kRows rows lies in panels 128 bytes wide. The 16-byte chunks of a panel's row are exchanged by
// the row's number, so that eight rows at one column fall into different banks: what TMA and WGMMA call the
// 128-byte swizzle.
template <int kRows>
__device__ __forceinline__ int ChunkAt(int row, int chunk) {
  return chunk / 8 * (kRows * 128) + row * 128 + (((chunk ^ row) & 7) << 4);
}

// Rows [first, first + kRows) of one head and their chunks from chunk0 on, zeros beyond `length` rows and
// `chunks` chunks. Belongs to the open group of copies.
template <int kRows, int kChunks, int kThreads, class T>
__device__ __forceinline__ void CopyTile(unsigned char* to, const T* head, int64_t token, int first,
                                         int length, int chunk0, int chunks) {
  static_assert(kRows * kChunks % kThreads == 0 && kThreads % kChunks == 0);
  constexpr int kTurn = kThreads / kChunks;  // rows that the block copies at a time
  const int chunk = threadIdx.x % kChunks;
  int row = threadIdx.x / kChunks;
  const T* from = head + (first + row) * token + (chunk0 + chunk) * (16 / static_cast<int>(sizeof(T)));
  const bool inside = chunk0 + chunk < chunks;
#pragma unroll 1
  for (; row < kRows; row += kTurn, from += kTurn * token) {
    const bool present = inside && first + row < length;
    CopyAsync16(to + ChunkAt<kRows>(row, chunk), present ? from : head, present);
  }
}

// Words [first, first + kCount) of an array of `length`.
template <int kCount, int kThreads, class T>
__device__ __forceinline__ void CopyWords(T* to, const T* from, int first, int length) {
  static_assert(sizeof(T) == 4);
  for (int i = threadIdx.x; i < kCount; i += kThreads)
    CopyAsync4(to + i, first + i < length ? from + first + i : from, first + i < length);
}

template <bool kRowsAreQueries>
__device__ __forceinline__ Visibility SeeTile(const MaskBounds& rows, const MaskBounds& columns) {
  return kRowsAreQueries ? See(rows, columns) : See(columns, rows);
}
template <bool kRowsAreQueries>
__device__ __forceinline__ bool Seen(int32_t row_segment, int32_t row_order, int32_t column_segment,
                                     int32_t column_order) {
  return row_segment == column_segment &&
         (kRowsAreQueries ? row_order >= column_order : column_order >= row_order);
}

// The same of kTile columns, a part of a tile of bounds or several of them.
template <bool kRowsAreQueries, int kTile>
__device__ __forceinline__ Visibility SeeColumns(const MaskBounds& rows, const MaskBounds* bounds, int tiles,
                                                 int tile) {
  if constexpr (kTile <= kBoundsTile) {
    return SeeTile<kRowsAreQueries>(rows, bounds[tile * kTile / kBoundsTile]);
  } else {
    constexpr int kParts = kTile / kBoundsTile;
    bool any = false, all = true;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (tile * kParts + i >= tiles) break;
      const Visibility see = SeeTile<kRowsAreQueries>(rows, bounds[tile * kParts + i]);
      any |= see != kNothing;
      all &= see == kAll;
    }
    return all ? kAll : any ? kSome : kNothing;
  }
}

// The tiles of kTile columns that any of a block's rows meets, in ascending order; a warp looks at 32 at a
// time, and all warps of the block find the same.
template <bool kRowsAreQueries, int kRows, int kTile>
class TileWalk {
 public:
  // The rows begin at `first`, a multiple of kRows.
  static __device__ TileWalk Over(const Mask& mask, int first, int columns) {
    static_assert(kRows % kBoundsTile == 0 && (kBoundsTile % kTile == 0 || kTile % kBoundsTile == 0));
    TileWalk walk;
    walk.bounds_ = mask.bounds;
    walk.count_ = (columns + kTile - 1) / kTile;
    walk.base_ = mask.bounds ? -32 : 0;
    walk.found_ = 0;
    walk.first_ = first / kBoundsTile;
    walk.tiles_ = mask.tiles;
    return walk;
  }
  __device__ int count() const { return count_; }
  // count() when there are no more.
  __device__ int Next() {
    if (!bounds_) return base_ < count_ ? base_++ : count_;
    while (found_ == 0) {
      base_ += 32;
      if (base_ >= count_) return count_;
      const int tile = base_ + static_cast<int>(threadIdx.x % 32);
      MaskBounds own = bounds_[first_];
      for (int i = 1; i < kRows / kBoundsTile; ++i)
        if (first_ + i < tiles_) own = Union(own, bounds_[first_ + i]);
      const bool met =
          tile < count_ && SeeColumns<kRowsAreQueries, kTile>(own, bounds_, tiles_, tile) != kNothing;
      found_ = __ballot_sync(0xffffffffu, met);
    }
    const int next = __ffs(found_) - 1;
    found_ &= found_ - 1;
    return base_ + next;
  }

 private:
  const MaskBounds* bounds_;
  int first_, tiles_, count_, base_;
  uint32_t found_;
};

}  // namespace

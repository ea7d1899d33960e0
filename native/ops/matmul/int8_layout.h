// A weight [N, K] in eight bits: a header, the scales [groups, N], and for every kOnednnPackColumns outputs
// and every group of the sum one tile in the layout that oneDNN's kernels like best.
#pragma once
#include <stdio.h>

#include "backends/cpu/onednn.h"
#include "core/half.h"
#include "ops/matmul/int8.h"

struct Int8Layout {
  int64_t n, k;
  Int8Groups groups;
  int64_t columns, last_columns;  // tiles of outputs, and how many the last one has
  int64_t bytes[2][2];            // of a tile: [the last outputs][the last group]
  int64_t scales, tiles, total;   // offsets, and the length of it all

  int64_t TileAt(int64_t column, int64_t group) const {
    const auto& b = bytes[column == columns - 1];
    return tiles + column * (bytes[0][0] * (groups.count - 1) + bytes[0][1]) + group * b[0];
  }
};
struct Int8Header {
  uint64_t magic;
  Int8Layout layout;
};
static constexpr uint64_t kInt8Magic = 0x3854434150465950ull;  // "PYFPACT8"
static constexpr int64_t kInt8Header = (sizeof(Int8Header) + 63) / 64 * 64;

// False with a message where oneDNN refuses, or multiplies eight bits in no exact way.
static inline bool Int8LayoutOf(int64_t n, int64_t k, Int8Layout* l, char* error) {
  if (!OnednnHasInt8()) {
    snprintf(error, 256, "matmul_pack: this processor has no dot products of eight bits (AVX-512 VNNI, AMX)");
    return false;
  }
  l->n = n;
  l->k = k;
  l->groups = Int8GroupsOf(k);
  l->columns = (n + kOnednnPackColumns - 1) / kOnednnPackColumns;
  l->last_columns = n - (l->columns - 1) * kOnednnPackColumns;
  const int64_t last = l->groups.Length(l->groups.count - 1, k);
  for (int c = 0; c < 2; ++c)
    for (int g = 0; g < 2; ++g) {
      const int64_t columns = c ? l->last_columns : kOnednnPackColumns, length = g ? last : l->groups.size;
      l->bytes[c][g] = OnednnPackTileBytes(columns, length, PF_I8, error);
      if (!l->bytes[c][g]) return false;
    }
  l->scales = kInt8Header;
  l->tiles = l->scales + (l->groups.count * n * 4 + 63) / 64 * 64;
  l->total = l->TileAt(l->columns - 1, l->groups.count - 1) + l->bytes[1][1];
  return true;
}

static inline size_t Int8PackBytes(int64_t n, int64_t k) {
  char error[256];
  Int8Layout layout;
  if (n <= 0 || k <= 0 || !Int8LayoutOf(n, k, &layout, error)) return 0;
  return layout.total;
}

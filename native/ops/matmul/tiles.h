// What matmul and conv3d share: conversion of whole operands and the tile loop over threads.
#pragma once
#include <omp.h>

#include "backends/cpu/onednn.h"
#include "backends/cpu/simd.h"

// Below this many values a second thread costs more than it saves.
static constexpr int64_t kWorthThreads = 1 << 16;
static constexpr int64_t kWorthProducts = 1 << 21;

// to[i] = from[i], rounded to nearest even where that narrows.
template <class From, class To>
static void ConvertFloats(const From* from, To* to, int64_t n) {
  constexpr int64_t kChunk = 1 << 14;
#pragma omp parallel for schedule(static) if (n > kWorthThreads)
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    for (int64_t i = begin; i < end; i += kLanes) StoreN(to + i, LoadN(from + i, end - i), end - i);
  }
}
static inline void ConvertFloats(const void* from, int64_t from_type, void* to, int64_t to_type, int64_t n) {
  if (from_type == PF_BF16 && to_type == PF_BF16) memcpy(to, from, n * 2);
  if (from_type == PF_F32 && to_type == PF_F32) memcpy(to, from, n * 4);
  if (from_type == PF_F32 && to_type == PF_BF16)
    ConvertFloats(static_cast<const float*>(from), static_cast<Bf16*>(to), n);
  if (from_type == PF_BF16 && to_type == PF_F32)
    ConvertFloats(static_cast<const Bf16*>(from), static_cast<float*>(to), n);
}

static inline void* Scratch(const PfArgs* a, size_t bytes) {
  return a->context->scratch(a->context, bytes ? bytes : 1);
}
// The operand itself when it already has this dtype, else a converted copy (nullptr: no memory).
static inline void* As(const PfArgs* a, const PfView& v, int64_t dtype) {
  if (v.dtype == dtype) return v.data;
  void* copy = Scratch(a, PfCount(v) * PfSize(static_cast<int32_t>(dtype)));
  if (copy) ConvertFloats(v.data, v.dtype, copy, dtype, PfCount(v));
  return copy;
}
static inline int32_t NoMemory(const PfArgs* a, const char* op) {
  return Fail(a, PF_ERR_MEMORY, "%s: no scratch memory left", op);
}

// Runs body(tile, thread, error) -> status for every tile; the first failing tile's message reaches the
// caller. `products` counts the multiplications of all tiles. Which thread runs a tile is free: a tile's
// result never depends on it.
template <class Body>
static int32_t ForTiles(const PfArgs* a, int64_t tiles, int64_t products, const Body& body) {
  int32_t result = PF_OK;
#pragma omp parallel if (tiles > 1 && products > kWorthProducts)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      char error[256];
      const int32_t status = body(tile, thread, error);
      if (status != PF_OK) {
#pragma omp critical(pf_tiles)
        {
          result = status;
          memcpy(a->context->error, error, sizeof(error));
        }
      }
    }
  }
  return result;
}

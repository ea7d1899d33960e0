// What products of every kind share on the CPU: the shape of a tile, and what happens to a finished one.
#pragma once
#include "ops/matmul/matmul.h"
#include "ops/matmul/tiles.h"

namespace {

// Tall tiles share the cost of repacking b. Where that has been done before, a tile's rows had better leave
// room for its columns in the second-level cache.
#if PF_LANES == 16
constexpr int64_t kTall = 256, kTallPacked = 128, kPartRows = 16, kWholeRows = 1;
#else
// Without AVX-512 oneDNN sums rows past a multiple of 6 in another order, halves tall tiles, and cuts those
// of more than 96 rows its own way: a row's bits would depend on how many stand beside it. Rows come in
// twelves.
constexpr int64_t kTall = 96, kTallPacked = 96, kPartRows = 12, kWholeRows = 12;
#endif

// Tiles are a function of the shape alone; more, smaller ones only while a machine with many cores would
// otherwise idle.
struct TileShape {
  int64_t m, n;
};
TileShape ChooseTile(int64_t batch, int64_t all_m, int64_t all_n, int64_t k, bool packed) {
  int64_t m = all_m < kTall ? all_m : kTall, n = all_n < 512 ? all_n : 512;
  if (packed) {
    m = all_m < kTallPacked ? all_m : kTallPacked;
    n = all_n < kOnednnPackColumns ? all_n : kOnednnPackColumns;
  }
  for (;;) {
    const int64_t tiles = batch * ((all_m + m - 1) / m) * ((all_n + n - 1) / n);
    const int64_t cost = (2 * m * n + 16 * (m + n)) * k;
    if (tiles >= 16 || cost <= (8 << 20)) break;
    if (n > 256 && !packed)
      n = 256;
    else if (m > 64)
      m = RoundUp(m / 2, kPartRows);
    else if (n > 64 && !packed)
      n = (n / 2 + 15) / 16 * 16;
    else
      break;
  }
  return {m, n};
}

// What happens to a finished f32 tile on its way into y.
struct Epilogue {
  const float* bias;     // or nullptr
  const void* residual;  // or nullptr
  int32_t residual_type, y_type;
  int activation;
  bool accumulate;
  bool Trivial() const { return !bias && !residual && !activation && !accumulate && y_type == PF_F32; }
};

// Each row of a tile lies in a page of its own, where the hardware's prefetching stops: rows are asked for
// some rows ahead. Addresses past the end are harmless: a prefetch does not fault.
constexpr int64_t kRowsAhead = 8;
template <bool kWrite, class T>
inline void AskForRow(const T* row, int64_t n) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(p + i, kWrite);
}

template <class Y, class R>
void StoreTile(const Epilogue& e, const float* tile, int64_t m, int64_t n, int64_t ld, const float* bias,
               const R* residual, Y* y) {  // a residual lies like y
  for (int64_t i = 0; i < m; ++i, tile += n, y += ld) {
    if (i + kRowsAhead < m) {
      AskForRow<true>(y + kRowsAhead * ld, n);
      if (residual) AskForRow<false>(residual + (i + kRowsAhead) * ld, n);
    }
    for (int64_t j = 0; j < n; j += kLanes) {
      const int64_t left = n - j;
      Vf v = LoadN(tile + j, left);
      if (bias) v = v + LoadN(bias + j, left);
      if (e.activation == 1) v = GeluTanh(v);
      if (e.activation == 2) v = Silu(v);
      if (residual) v = v + LoadN(residual + i * ld + j, left);
      if (e.accumulate) v = v + LoadN(y + j, left);
      StoreN(y + j, v, left);
    }
  }
}

void StoreTile(const Epilogue& e, const float* tile, int64_t m, int64_t n, int64_t ld, int64_t column,
               int64_t at, char* y) {
  const float* bias = e.bias ? e.bias + column : nullptr;
  const char* residual = static_cast<const char*>(e.residual);
  if (residual) residual += at * PfSize(e.residual_type);
  y += at * PfSize(e.y_type);
  auto with_residual = [&](auto* y) {
    if (e.residual_type == PF_BF16)
      StoreTile(e, tile, m, n, ld, bias, reinterpret_cast<const Bf16*>(residual), y);
    else
      StoreTile(e, tile, m, n, ld, bias, reinterpret_cast<const float*>(residual), y);
  };
  if (e.y_type == PF_BF16)
    with_residual(reinterpret_cast<Bf16*>(y));
  else
    with_residual(reinterpret_cast<float*>(y));
}

}  // namespace

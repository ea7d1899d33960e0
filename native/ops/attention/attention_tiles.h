// AMX tiles, and a stand-in for processors without them (PF_EMULATE_AMX) that lets everything around them be
// tested anywhere. A tile holds 16 rows of 16 units of 32 bits: sums, or pairs of bf16 values.
#pragma once
#include "backends/cpu/simd.h"

#if defined(__AMX_BF16__) || defined(PF_EMULATE_AMX)
#define PF_TILES
#endif

namespace {
constexpr int64_t kTileSide = 16;
}

#if defined(PF_TILES)

namespace {

#if defined(PF_EMULATE_AMX)

thread_local uint32_t tile_registers[8][kTileSide][kTileSide];
thread_local bool tiles_ready = false;

// Tiles of this thread are usable while one of these lives.
struct TileState {
  TileState() { tiles_ready = true; }
  ~TileState() { tiles_ready = false; }
};

template <int kTile>
inline void TileZero() {
  memset(tile_registers[kTile], 0, sizeof(tile_registers[kTile]));
}
template <int kTile>
inline void TileLoad(const void* from, int64_t row_units) {
  if (!tiles_ready) __builtin_trap();  // the real instruction would end the process, too
  for (int64_t i = 0; i < kTileSide; ++i)
    memcpy(tile_registers[kTile][i], static_cast<const uint32_t*>(from) + i * row_units, 64);
}
template <int kTile>
inline void TileStore(void* to, int64_t row_units) {
  for (int64_t i = 0; i < kTileSide; ++i)
    memcpy(static_cast<uint32_t*>(to) + i * row_units, tile_registers[kTile][i], 64);
}
// sum[m, n] += over pairs k: a[m, k] · b[k, n].
template <int kSum, int kA, int kB>
inline void TileDot() {
  const auto value = [](uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
  };
  for (int64_t m = 0; m < kTileSide; ++m)
    for (int64_t k = 0; k < kTileSide; ++k) {
      const uint32_t a = tile_registers[kA][m][k];
      for (int64_t n = 0; n < kTileSide; ++n) {
        const uint32_t b = tile_registers[kB][k][n];
        float sum = value(tile_registers[kSum][m][n]);
        sum += value(a << 16) * value(b << 16);
        sum += value(a & 0xffff0000u) * value(b & 0xffff0000u);
        memcpy(&tile_registers[kSum][m][n], &sum, 4);
      }
    }
}

#else

// Tiles of this thread are usable while one of these lives. Written as assembly because the compiler's own
// wrappers do not say which memory they touch: it then drops the stores to the configuration and may move
// those to operands.
struct TileState {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);
  TileState() {
    Config config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = kTileSide;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  // Leaves the tiles empty, so that no switch of threads has to save them.
  ~TileState() { __asm__ volatile("tilerelease" : : : "memory"); }
};

template <int kTile>
inline void TileZero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
inline void TileLoad(const void* from, int64_t row_units) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_units * 4), "i"(kTile) : "memory");
}
template <int kTile>
inline void TileStore(void* to, int64_t row_units) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_units * 4), "i"(kTile) : "memory");
}
template <int kSum, int kA, int kB>
inline void TileDot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

#endif

// c[16 MT, 16 NT] (=|+=) a[16 MT, k] b[k, 16 NT]: four tiles of sums, two of a, two of b. From one tile of a
// to the next along the sum it is a_step units.
template <int MT, int NT>
void TileBlock(int64_t k, const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_row,
               float* c, int64_t c_row, bool accumulate) {
  const int64_t down = kTileSide * c_row;
  if (accumulate) {
    TileLoad<0>(c, c_row);
    if constexpr (NT == 2) TileLoad<1>(c + kTileSide, c_row);
    if constexpr (MT == 2) TileLoad<2>(c + down, c_row);
    if constexpr (MT == 2 && NT == 2) TileLoad<3>(c + down + kTileSide, c_row);
  } else {
    TileZero<0>();
    TileZero<1>();
    TileZero<2>();
    TileZero<3>();
  }
  for (int64_t i = 0; i < k; i += kTileSide, a += a_step, b += kTileSide * b_row) {
    TileLoad<4>(a, a_row);
    TileLoad<6>(b, b_row);
    TileDot<0, 4, 6>();
    if constexpr (NT == 2) {
      TileLoad<7>(b + kTileSide, b_row);
      TileDot<1, 4, 7>();
    }
    if constexpr (MT == 2) {
      TileLoad<5>(a + kTileSide * a_row, a_row);
      TileDot<2, 5, 6>();
    }
    if constexpr (MT == 2 && NT == 2) TileDot<3, 5, 7>();
  }
  TileStore<0>(c, c_row);
  if constexpr (NT == 2) TileStore<1>(c + kTileSide, c_row);
  if constexpr (MT == 2) TileStore<2>(c + down, c_row);
  if constexpr (MT == 2 && NT == 2) TileStore<3>(c + down + kTileSide, c_row);
}

// c[16 MT, 16] (=|+=) a[16 MT, k] b[k, 16]: MT tiles of sums keep the multiplier busy while one is added to.
template <int MT>
void TileColumn(int64_t k, const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_row,
                float* c, int64_t c_row, bool accumulate) {
  const int64_t down = kTileSide * c_row;
  if (accumulate) {
    TileLoad<0>(c, c_row);
    if constexpr (MT > 1) TileLoad<1>(c + down, c_row);
    if constexpr (MT > 2) TileLoad<2>(c + 2 * down, c_row);
    if constexpr (MT > 3) TileLoad<3>(c + 3 * down, c_row);
  } else {
    TileZero<0>();
    if constexpr (MT > 1) TileZero<1>();
    if constexpr (MT > 2) TileZero<2>();
    if constexpr (MT > 3) TileZero<3>();
  }
  for (int64_t i = 0; i < k; i += kTileSide, a += a_step, b += kTileSide * b_row) {
    TileLoad<7>(b, b_row);
    TileLoad<4>(a, a_row);
    TileDot<0, 4, 7>();
    if constexpr (MT > 1) {
      TileLoad<5>(a + kTileSide * a_row, a_row);
      TileDot<1, 5, 7>();
    }
    if constexpr (MT > 2) {
      TileLoad<6>(a + 2 * kTileSide * a_row, a_row);
      TileDot<2, 6, 7>();
    }
    if constexpr (MT > 3) {
      TileLoad<4>(a + 3 * kTileSide * a_row, a_row);
      TileDot<3, 4, 7>();
    }
  }
  TileStore<0>(c, c_row);
  if constexpr (MT > 1) TileStore<1>(c + down, c_row);
  if constexpr (MT > 2) TileStore<2>(c + 2 * down, c_row);
  if constexpr (MT > 3) TileStore<3>(c + 3 * down, c_row);
}

}  // namespace

#else

namespace {
struct TileState {
  TileState() {}  // not trivial: an unused variable of this type is no mistake
};
}  // namespace

#endif

// Small packed matrices and their register-blocked product. A unit is 32 bits of the summed dimension: one
// float, or two neighbouring bf16 values where the level multiplies those in pairs. Packing, strides and
// blocking are the same for both; only Dot differs. AMX multiplies the same pairs tile by tile; for it rows,
// columns and sums are padded to whole tiles.
#pragma once
#include "backends/cpu/rows.h"
#include "ops/attention/attention_layout.h"
#include "ops/attention/attention_tiles.h"
#include "ops/attention/attention_turn.h"

namespace {

using Unit = uint32_t;

// How many values of the summed dimension a unit holds.
template <class E>
constexpr int64_t kPerUnit = sizeof(Unit) / sizeof(E);

inline int64_t Units(int64_t n, int64_t per) { return (n + per - 1) / per; }

// Whether products of E run on tiles.
#if defined(PF_TILES)
template <class E>
constexpr bool kOnTiles = kPerUnit<E> == 2;
#else
template <class E>
constexpr bool kOnTiles = false;
#endif

// Queries are taken a strip at a time: what it needs lies close together. Three vectors fill a row of the
// micro-kernel (16 lanes), keys are its rows; tiles have 16 columns. What a block reads of keys and values
// serves all of its strips; the units of backward's products want all queries of a block at once.
template <class E>
constexpr int64_t kStrip = kOnTiles<E> ? 16 : 48;
template <class E>
constexpr int64_t kForwardBlock = kOnTiles<E> ? 128 : 144;
template <class E>
constexpr int64_t kBackwardBlock = kOnTiles<E> ? 128 : 48;
// Tiles are filled by keys and by pairs of keys or queries, elsewhere vectors by queries.
template <class E>
constexpr BlockSizes BlockSizesOf(int64_t queries) {
  return {queries, kOnTiles<E> ? 32 : kLanes, kOnTiles<E> ? 32 : 2};
}

struct Strip : MaskBounds {
  int64_t c, count, padded;  // begins at column c of its block
};

// The strips of a block; returns how many.
template <class E>
int64_t CutStrips(const Layout& l, const Block& q, Strip* strips) {
  int64_t n = 0;
  for (int64_t c = 0; c < q.count; c += kStrip<E>, ++n) {
    const int64_t left = q.count - c, count = left < kStrip<E> ? left : kStrip<E>;
    strips[n] = {BoundsOf(l, q, c, count), c, count, kOnTiles<E> ? kStrip<E> : RoundUp(count, kLanes)};
  }
  return n;
}

// Units of a packed row of d values.
template <class E>
inline int64_t RowUnits(int64_t d) {
  return RoundUp(Units(d, kPerUnit<E>), kOnTiles<E> ? 16 : 1);
}

inline Vf LoadUnits(const Unit* p) {
  Vf v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline Vf Broadcast(const Unit* p) { return (Vf)(*p - (Vu){}); }
template <class E>
inline Vf Dot(Vf a, Vf b, Vf sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPerUnit<E> == 2) return (Vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return Fma(a, b, sum);
}

#if PF_LANES == 16
constexpr int kMicroRows = 8;  // 8 x 3 or 6 x 4 of 32 registers hold the product
#else
constexpr int kMicroRows = 4;  // 4 x 3 of 16
#endif

// Memory that is wanted next, asked for a few lines at a time while something else is computed: all at once
// they would have to wait for each other.
struct Ahead {
  const Unit* at;
  int64_t lines;  // a time

  void Fetch() {
    for (int64_t i = 0; i < lines; ++i, at += 16) __builtin_prefetch(at, 0, 2);
  }
};

// c[m, n] (=|+=) sum over k units of a[m, k] b[k, n]; n is a multiple of kLanes. a is read one unit at a
// time, so any strides do. On tiles k is a multiple of 16, rows of a and c exist up to a multiple of 16, 16
// units of a row of a lie together, and a_column is how far it is to the next 16.
struct Product {
  int64_t k;
  const Unit* a;
  int64_t a_row, a_column;
  const Unit* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool accumulate;
  Ahead ahead = {};
};

// a_column of operands whose rows are contiguous.
template <class E>
constexpr int64_t kRowColumn = kOnTiles<E> ? kTileSide : 1;

// Part i of `parts` of count units, for a product whose first operand is a block of keys or values.
template <class E>
inline Ahead PartOf(const Unit* from, int64_t count, int64_t i, int64_t parts) {
  constexpr int64_t kTimes = kOnTiles<E> ? 1 : kKeyBlock / kMicroRows;
  const int64_t lines = Units(Units(count, 16), parts);
  return {from + i * lines * 16, Units(lines, kTimes)};
}

template <class E, int MR, int NR>
void Micro(const Product& g) {
  // Every loop over i and j must vanish, or the compiler keeps the sums in memory around the loop over k.
  Vf sum[MR][NR] = {};
  if (g.accumulate) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) sum[i][j] = LoadF(g.c + i * g.c_row + j * kLanes);
  }
  const Unit *a = g.a, *b = g.b;
  const int64_t a_row = g.a_row;
  for (int64_t k = 0; k < g.k; ++k, a += g.a_column, b += g.b_row) {
    Vf row[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) row[j] = LoadUnits(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Vf x = Broadcast(a + i * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) sum[i][j] = Dot<E>(x, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) StoreF(g.c + i * g.c_row + j * kLanes, sum[i][j]);
}

template <class E, int NR>
void MicroRows(int64_t m, const Product& g) {
  constexpr int kRows = NR == 4 ? 6 : kMicroRows;
  Product part = g;
  for (int64_t i = 0; i < m; i += kRows, part.a += kRows * g.a_row, part.c += kRows * g.c_row) {
    part.ahead.Fetch();
    switch (m - i) {
      case 1: Micro<E, 1, NR>(part); break;
      case 2: Micro<E, 2, NR>(part); break;
      case 3: Micro<E, 3, NR>(part); break;
#if PF_LANES == 16
      case 4: Micro<E, 4, NR>(part); break;
      case 5: Micro<E, 5, NR>(part); break;
      case 6: Micro<E, 6, NR>(part); break;
      case 7: Micro < E, kRows<7 ? kRows : 7, NR>(part); break;
#endif
      default: Micro<E, kRows, NR>(part); break;
    }
  }
}

#if defined(PF_TILES)
inline void MultiplyTiles(int64_t m, int64_t n, const Product& g) {
  Ahead ahead = g.ahead;
  constexpr int64_t kTwo = 2 * kTileSide, kFour = 4 * kTileSide;
  if (n == kTileSide) {
    for (int64_t i = 0; i < m; i += kFour) {
      const auto column = m - i > 3 * kTileSide ? TileColumn<4>
                          : m - i > kTwo        ? TileColumn<3>
                          : m - i > kTileSide   ? TileColumn<2>
                                                : TileColumn<1>;
      ahead.Fetch();
      column(g.k, g.a + i * g.a_row, g.a_row, g.a_column, g.b, g.b_row, g.c + i * g.c_row, g.c_row,
             g.accumulate);
    }
    return;
  }
  for (int64_t j = 0; j < n; j += kTwo)
    for (int64_t i = 0; i < m; i += kTwo) {
      const Unit *a = g.a + i * g.a_row, *b = g.b + j;
      float* c = g.c + i * g.c_row + j;
      const bool two_down = m - i > kTileSide, two_across = n - j > kTileSide;
      const auto block = two_down     ? two_across ? TileBlock<2, 2> : TileBlock<2, 1>
                             : two_across ? TileBlock<1, 2>
                                      : TileBlock<1, 1>;
      block(g.k, a, g.a_row, g.a_column, b, g.b_row, c, g.c_row, g.accumulate);
    }
}
#endif

template <class E>
void Multiply(int64_t m, int64_t n, const Product& g) {
#if defined(PF_TILES)
  if constexpr (kOnTiles<E>) return MultiplyTiles(m, n, g);
#endif
  Product part = g;
  for (int64_t left = n / kLanes; left > 0;) {
    int64_t take = left < 3 ? left : 3;
#if PF_LANES == 16
    if (left == 4 || left > 6) take = 4;
#endif
    switch (take) {
      case 1: MicroRows<E, 1>(m, part); break;
      case 2: MicroRows<E, 2>(m, part); break;
      case 3: MicroRows<E, 3>(m, part); break;
#if PF_LANES == 16
      default: MicroRows<E, 4>(m, part); break;
#endif
    }
    left -= take;
    part.b += take * kLanes;
    part.c += take * kLanes;
  }
}

// One row of a head: values `offset` .. `offset + d` of v as E. The memory itself where the types agree and
// nothing is to be done with them.
template <class E>
inline const E* RowOf(const PfView& v, int64_t offset, int64_t d, float* buffer, const Turn* turn = nullptr,
                      int64_t token = 0) {
  if (turn && (turn->weight || turn->cos)) {
    E* row = reinterpret_cast<E*>(buffer);
    if (v.dtype == PF_F32)
      TurnRow(*turn, token, PfData<float>(v) + offset, d, row);
    else
      TurnRow(*turn, token, PfData<Bf16>(v) + offset, d, row);
    return row;
  }
  if constexpr (kPerUnit<E> == 2)
    return PfData<Bf16>(v) + offset;
  else
    return ReadRow(v, offset, d, buffer);
}

// Asks for rows of one head some time before they are read: they lie too far apart for the processor to guess
// which comes next.
inline void FetchRows(const PfView& v, int64_t offset, int64_t step, int64_t count, int64_t d) {
  const int64_t size = v.dtype == PF_F32 ? 4 : 2;
  const char* row = static_cast<const char*>(v.data) + offset * size;
  for (int64_t i = 0; i < count; ++i, row += step * size)
    for (int64_t at = 0; at < d * size; at += 64) __builtin_prefetch(row + at);
}

// `padded` rows of one head, `step` elements apart, as [padded, RowUnits(d)]; those from count on are zero.
// turn is what happens to them on the way, token the first one's.
template <class E>
void PackRows(const PfView& v, int64_t offset, int64_t step, int64_t count, int64_t padded, int64_t d,
              float* buffer, Unit* to, const Turn* turn = nullptr, int64_t token = 0) {
  const int64_t units = RowUnits<E>(d);
  for (int64_t i = 0; i < count; ++i, to += units) {
    for (int64_t c = d / kPerUnit<E>; c < units; ++c) to[c] = 0;
    memcpy(to, RowOf<E>(v, offset + i * step, d, buffer, turn, token + i), d * sizeof(E));
  }
  memset(to, 0, (padded - count) * units * sizeof(Unit));
}

// The same rows with rows as the summed dimension: [Units(padded), width], unit (k, c) holds value c of rows
// k * kPerUnit on. Columns from d on are zero.
template <class E>
void PackPairs(const PfView& v, int64_t offset, int64_t step, int64_t count, int64_t padded, int64_t d,
               int64_t width, float* buffer, Unit* to) {
  for (int64_t i = 0; i < padded; i += kPerUnit<E>, to += width) {
    if (i >= count) {
      memset(to, 0, width * sizeof(Unit));
      continue;
    }
    const E* row = RowOf<E>(v, offset + i * step, d, buffer);
    if constexpr (kPerUnit<E> == 2) {
      const E* next = i + 1 < count ? row + step : nullptr;
      int64_t c = 0;
      for (; c + kLanes <= d; c += kLanes) {
        // A bf16 value is the upper half of its float.
        const Vu low = (Vu)LoadF(row + c) >> 16, high = next ? (Vu)LoadF(next + c) : (Vu){};
        const Vu both = low | high;
        memcpy(to + c, &both, sizeof(both));
      }
      for (; c < d; ++c) to[c] = row[c].bits | (next ? static_cast<Unit>(next[c].bits) << 16 : 0);
    } else {
      memcpy(to, row, d * sizeof(float));
    }
    for (int64_t c = d; c < width; ++c) to[c] = 0;
  }
}

// Rows that are turned into columns together, and those that a buffer holds: one more is zero.
constexpr int kTurned = kLanes, kBufferRows = kTurned + 1;

// Four values of each of the rows i, i + 4, ...; built in memory it would have to wait for its own stores.
inline Vf FourOfEach(const float* const from[], int i) {
#if PF_LANES > 4
  const auto four = [&](int row) { return _mm_loadu_ps(from[row + i]); };
#endif
#if PF_LANES == 16
  __m512 v = _mm512_castps128_ps512(four(0));
  v = _mm512_insertf32x4(v, four(4), 1);
  v = _mm512_insertf32x4(v, four(8), 2);
  return (Vf)_mm512_insertf32x4(v, four(12), 3);
#elif PF_LANES == 8
  return (Vf)_mm256_insertf128_ps(_mm256_castps128_ps256(four(0)), four(4), 1);
#else
  return LoadF(from[i]);
#endif
}

// Values 0 to 3 of kTurned rows as four rows of kTurned values: 4x4 blocks in all parts of a vector at once.
inline void Transpose(const float* const from[], float* to, int64_t to_row) {
  const Vf r[4] = {FourOfEach(from, 0), FourOfEach(from, 1), FourOfEach(from, 2), FourOfEach(from, 3)};
#if PF_LANES == 16
  const Vi low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  const Vi first = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
#elif PF_LANES == 8
  const Vi low = {0, 8, 1, 9, 4, 12, 5, 13}, first = {0, 1, 8, 9, 4, 5, 12, 13};
#else
  const Vi low = {0, 4, 1, 5}, first = {0, 1, 4, 5};
#endif
  const Vf a = __builtin_shuffle(r[0], r[1], low), b = __builtin_shuffle(r[2], r[3], low);
  const Vf c = __builtin_shuffle(r[0], r[1], low + 2), d = __builtin_shuffle(r[2], r[3], low + 2);
  StoreF(to, __builtin_shuffle(a, b, first));
  StoreF(to + to_row, __builtin_shuffle(a, b, first + 2));
  StoreF(to + 2 * to_row, __builtin_shuffle(c, d, first));
  StoreF(to + 3 * to_row, __builtin_shuffle(c, d, first + 2));
}

// What PackPairs gives, as the first operand of a product: on tiles its rows must lie along the summed
// dimension, so 16 pairs at a time are turned round to [padded / 32, width, 16]. Blocks that lie end to end
// are one such operand.
template <class E>
void PackSummed(const PfView& v, int64_t offset, int64_t step, int64_t count, int64_t padded, int64_t d,
                int64_t width, float* buffer, Unit* to) {
  if constexpr (!kOnTiles<E>) return PackPairs<E>(v, offset, step, count, padded, d, width, buffer, to);
  for (int64_t i = 0; i < padded; i += 2 * kTurned) {
    const int64_t left = i < count ? count - i : 0, some = left < 2 * kTurned ? left : 2 * kTurned;
    PackPairs<E>(v, offset + i * step, step, some, 2 * kTurned, d, width, nullptr,
                 reinterpret_cast<Unit*>(buffer));
    for (int64_t c = 0; c < width; c += 4) {
      const float* at[kTurned];
      for (int r = 0; r < kTurned; ++r) at[r] = buffer + r * width + c;
      Transpose(at, reinterpret_cast<float*>(to + i / 2 * width + c * kTurned), kTurned);
    }
  }
}

// The same rows as columns: [RowUnits(d), padded], a multiple of kTurned; negate flips every sign.
template <class E>
void PackColumns(const PfView& v, int64_t offset, int64_t step, int64_t count, int64_t padded, int64_t d,
                 bool negate, float* buffer, Unit* to, const Turn* turn = nullptr, int64_t token = 0) {
  const int64_t units = RowUnits<E>(d), whole = d / kPerUnit<E>, room = RoundUp(d, 16);
  const auto unit_of = [&](const E* row, int64_t c) {
    Unit unit = 0;
    const int64_t left = d - c * kPerUnit<E>;  // of the last unit only half may be there
    if (left > 0) memcpy(&unit, row + c * kPerUnit<E>, left < kPerUnit<E> ? sizeof(E) : sizeof(Unit));
    return unit;
  };
  float* zeros = buffer + kTurned * room;
  memset(zeros, 0, room * sizeof(float));
  for (int64_t i = 0; i < padded; i += kTurned) {
    const E* row[kTurned];
    for (int r = 0; r < kTurned; ++r)
      row[r] = i + r < count ? RowOf<E>(v, offset + (i + r) * step, d, buffer + r * room, turn, token + i + r)
                             : reinterpret_cast<const E*>(zeros);
    int64_t c = 0;
    for (; c + 4 <= whole; c += 4) {
      const float* at[kTurned];
      for (int r = 0; r < kTurned; ++r) at[r] = reinterpret_cast<const float*>(row[r]) + c;
      Transpose(at, reinterpret_cast<float*>(to + c * padded + i), padded);
    }
    for (; c < units; ++c)
      for (int r = 0; r < kTurned; ++r) to[c * padded + i + r] = unit_of(row[r], c);
  }
  if (!negate) return;
  const Unit signs = kPerUnit<E> == 2 ? 0x80008000u : 0x80000000u;
  for (int64_t j = 0; j < units * padded; ++j) to[j] ^= signs;
}

inline void WriteRow(const PfView& v, int64_t offset, int64_t n, const float* row) {
  if (v.dtype == PF_F32)
    memcpy(PfData<float>(v) + offset, row, n * sizeof(float));
  else
    CommitRow(v, offset, n, row);
}

// The first count columns of [d, columns_row] as rows of one head.
inline void WriteColumns(const float* columns, int64_t columns_row, int64_t d, int64_t count, const PfView& v,
                         int64_t offset, int64_t step, float* buffer) {
  const int64_t room = RoundUp(d, 16);
  for (int64_t i = 0; i < count; i += 4) {
    int64_t c = 0;
    // Columns are padded to whole vectors, so four of them can always be read.
    for (; c + kTurned <= d; c += kTurned) {
      const float* at[kTurned];
      for (int r = 0; r < kTurned; ++r) at[r] = columns + (c + r) * columns_row + i;
      Transpose(at, buffer + c, room);
    }
    for (; c < d; ++c)
      for (int r = 0; r < 4; ++r) buffer[r * room + c] = columns[c * columns_row + i + r];
    for (int64_t r = 0; r < 4 && i + r < count; ++r)
      WriteRow(v, offset + (i + r) * step, d, buffer + r * room);
  }
}

// One row of values as units of Multiply's second operand; for bf16 two neighbouring rows.
template <class E>
inline void PutUnits(Unit* to, Vf first, Vf second) {
  if constexpr (kPerUnit<E> == 2) {
#if PF_LANES == 16
    // Half an ulp more and cut off: three instructions for what takes eight otherwise. Ties go up.
    const Vu low = ((Vu)first + 0x8000u) >> 16, high = (Vu)second + 0x8000u;
    constexpr int kFirstOrSecondAndThird = 0xf8;
    const Vu both = (Vu)_mm512_ternarylogic_epi32((__m512i)low, (__m512i)high, _mm512_set1_epi32(-0x10000),
                                                  kFirstOrSecondAndThird);
#else
    const Vu both = Bf16Pairs(first, second);
#endif
    memcpy(to, &both, sizeof(both));
  } else {
    memcpy(to, &first, sizeof(first));
  }
}

// Two rows of weights as bf16, `row` values apart, and where pairs is not null both as one row of units.
inline void StoreRows(Bf16* to, int64_t row, Vf first, Vf second, Unit* pairs) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_extracti64x4_epi64(0xf, both, 0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + row), _mm512_maskz_extracti64x4_epi64(0xf, both, 1));
  if (!pairs) return;
  _mm512_storeu_si512(pairs, ByTurns(both));
#else
  StoreF(to, first);
  StoreF(to + row, second);
  if (pairs) PutUnits<Bf16>(pairs, first, second);
#endif
}

}  // namespace

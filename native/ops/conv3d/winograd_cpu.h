// Convolutions of 3 x 3 in rows and columns, any depth in frames, stride 1, with fewer products: Winograd's
// minimal filtering F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308). A square of 2 x 2 results is
//   A' [ sum over channels and frames of (G g G') . (B' d B) ] A
// of the 4 x 4 values d that it sees: 16 products in place of 36. At each of the 16 points the sum is one
// matrix product over many squares, whose inner dimension has frames and channels side by side.
#pragma once
#include "ops/conv3d/conv3d.h"
#include "ops/matmul/tiles.h"

namespace {

constexpr int64_t kPoints = 16, kFewestSquares = 256, kSquaresAhead = 4;

// One convolution: forward, or with the filters turned round the gradient of its input.
struct Winograd {
  int64_t batch, from[3], to[3], pad[3];  // sizes along t, h, w; zeros in front
  int64_t from_c, to_c;
  int64_t depth, first, frames;  // frames of the filters; those used: all, but for a single frame of results
  bool data;
  int64_t high, wide, squares;  // squares of a frame, and of all frames
  int64_t k, rows, columns;     // inner dimension; squares and channels of one product
};

Winograd WinogradOf(const Conv3dShape& s, bool data) {
  Winograd g{};
  g.batch = s.batch;
  g.data = data;
  g.depth = s.kernel[0];
  g.from_c = data ? s.c_out : s.c_in;
  g.to_c = data ? s.c_in : s.c_out;
  for (int i = 0; i < 3; ++i) {
    g.from[i] = data ? s.out[i] : s.in[i];
    g.to[i] = data ? s.in[i] : s.out[i];
    g.pad[i] = data ? s.kernel[i] - 1 - s.pad[i] : s.pad[i];
  }
  // A single frame may see fewer than the filters have: a picture sees itself only.
  const bool single = g.to[0] == 1;
  g.first = single && g.pad[0] > 0 ? g.pad[0] : 0;
  const int64_t end = g.from[0] + g.pad[0];
  g.frames = (single && end < g.depth ? end : g.depth) - g.first;
  g.pad[0] -= g.first;
  g.high = (g.to[1] + 1) / 2;
  g.wide = (g.to[2] + 1) / 2;
  g.squares = g.batch * g.to[0] * g.high * g.wide;
  g.k = g.frames * g.from_c;
  g.columns = g.to_c < kOnednnPackColumns ? g.to_c : kOnednnPackColumns;
  // lib/engine/convolution-bytes.ts counts along. What a block keeps stays within a few megabytes; smaller
  // ones only while many cores would idle.
  g.rows = g.k <= 768 && g.squares >= 16 * 128 ? 128 : 64;
  return g;
}

// Whether it takes clearly fewer products, channels are many beside the additions, and squares beside the
// filters. By shape alone, so that bits never depend on the machine's load or threads.
bool WinogradPays(const Conv3dShape& s, const Winograd& g) {
  for (int i = 0; i < 3; ++i)
    if (s.stride[i] != 1) return false;
  if (s.kernel[1] != 3 || s.kernel[2] != 3) return false;
  if (s.c_in < 64 || s.c_out < 64 || s.c_in % 16 != 0 || s.c_out % 16 != 0) return false;
  if (g.squares < kFewestSquares) return false;
  // The direct kernels skip taps on frames that are not there.
  int64_t taps = 0;
  for (int64_t t = 0; t < g.to[0]; ++t)
    for (int64_t p = 0; p < g.frames; ++p) taps += t + p >= g.pad[0] && t + p - g.pad[0] < g.from[0];
  return 2 * taps * 9 * g.to[1] * g.to[2] >= 3 * g.to[0] * g.frames * kPoints * g.high * g.wide;
}

// One side of each transform, for values `stride` apart; the other side is the same on the transpose.
inline void FilterSide(Vf a, Vf b, Vf c, Vf* to, int stride) {
  const Vf outer = (a + c) * 0.5f, middle = b * 0.5f;
  to[0] = a;
  to[stride] = outer + middle;
  to[2 * stride] = outer - middle;
  to[3 * stride] = c;
}
inline void InputSide(Vf a, Vf b, Vf c, Vf d, Vf* to, int stride) {
  to[0] = a - c;
  to[stride] = b + c;
  to[2 * stride] = c - b;
  to[3 * stride] = b - d;
}

// The filters that end in channel `o`, to `kPoints` rows of [frame, channel] that lie `step` values apart.
// taps: room for 9 rows of floats.
template <class T>
void TransformFilters(const Winograd& g, const T* w, int64_t o, float* taps, T* to, int64_t step) {
  for (int64_t c = 0; c < g.from_c; ++c) {
    const T* from = w + (g.data ? c * g.to_c + o : o * g.from_c + c) * 9 * g.depth;
    for (int64_t p = 0; p < g.frames; ++p)
      for (int64_t i = 0; i < 9; ++i) {
        const int64_t at = 9 * (g.first + p) + i;
        taps[i * g.k + p * g.from_c + c] = ToFloat(from[g.data ? 9 * g.depth - 1 - at : at]);
      }
  }
  for (int64_t i = 0; i < g.k; i += kLanes) {
    Vf half[12], u[kPoints];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j)
      FilterSide(LoadF(taps + j * g.k + i), LoadF(taps + (3 + j) * g.k + i), LoadF(taps + (6 + j) * g.k + i),
                 half + j, 3);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) FilterSide(half[3 * r], half[3 * r + 1], half[3 * r + 2], u + 4 * r, 1);
#pragma GCC unroll 16
    for (int e = 0; e < kPoints; ++e) StoreF(to + e * step + i, u[e]);
  }
}

// 4 x 4 values of every channel to 16 points.
template <class T>
void TransformSquare(const T* const* at, int64_t channels, T* to, int64_t step) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vf half[16], v[kPoints];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      InputSide(LoadF(at[j] + c), LoadF(at[4 + j] + c), LoadF(at[8 + j] + c), LoadF(at[12 + j] + c), half + j,
                4);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
      InputSide(half[4 * r], half[4 * r + 1], half[4 * r + 2], half[4 * r + 3], v + 4 * r, 1);
#pragma GCC unroll 16
    for (int e = 0; e < kPoints; ++e) StoreF(to + e * step + c, v[e]);
  }
}

// 16 points of sums to 2 x 2 results; to[i] is nullptr outside the frame.
template <class T>
void FinishSquare(const float* m, int64_t step, int64_t channels, const float* bias, T* const* to) {
  for (int64_t o = 0; o < channels; o += kLanes) {
    Vf top[4], low[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vf a = LoadF(m + j * step + o), b = LoadF(m + (4 + j) * step + o);
      const Vf c = LoadF(m + (8 + j) * step + o), d = LoadF(m + (12 + j) * step + o);
      top[j] = a + b + c;
      low[j] = b - c - d;
    }
    const Vf add = bias ? LoadF(bias + o) : Vf{};
    if (to[0]) StoreF(to[0] + o, top[0] + top[1] + top[2] + add);
    if (to[1]) StoreF(to[1] + o, top[1] - top[2] - top[3] + add);
    if (to[2]) StoreF(to[2] + o, low[0] + low[1] + low[2] + add);
    if (to[3]) StoreF(to[3] + o, low[1] - low[2] - low[3] + add);
  }
}

// Where a square's first result lies.
struct Square {
  int64_t b, t, row, column;
  Square(const Winograd& g, int64_t i)
      : b(i / (g.wide * g.high * g.to[0])),
        t(i / (g.wide * g.high) % g.to[0]),
        row(i / g.wide % g.high * 2),
        column(i % g.wide * 2) {}
};

// Squares [begin, begin + n) of x to v [16, n, k].
template <class T>
void TransformInputs(const Winograd& g, const T* x, const T* zeros, int64_t begin, int64_t n, T* v,
                     int64_t step) {
  const int64_t row = g.from[2] * g.from_c, frame = g.from[1] * row;
  for (int64_t i = 0; i < n; ++i) {
    const Square q(g, begin + i);
    for (int64_t p = 0; p < g.frames; ++p) {
      const int64_t t = q.t + p - g.pad[0];
      T* to = v + i * g.k + p * g.from_c;
      if (t < 0 || t >= g.from[0]) {
        for (int e = 0; e < kPoints; ++e) memset(to + e * step, 0, g.from_c * sizeof(T));
        continue;
      }
      const T* at[16];
      for (int j = 0; j < 16; ++j) {
        const int64_t r = q.row + j / 4 - g.pad[1], c = q.column + j % 4 - g.pad[2];
        const bool inside = r >= 0 && r < g.from[1] && c >= 0 && c < g.from[2];
        at[j] = inside ? x + (q.b * g.from[0] + t) * frame + r * row + c * g.from_c : zeros;
      }
      // What squares ahead see first lies where the hardware does not look for it.
      for (int j = 3; j < 16; j += 4) {
        const char* ahead = reinterpret_cast<const char*>(at[j] + (2 * kSquaresAhead - 1) * g.from_c);
        for (int64_t line = 0; line < 2 * g.from_c * static_cast<int64_t>(sizeof(T)); line += 64)
          __builtin_prefetch(ahead + line);
      }
      TransformSquare(at, g.from_c, to, step);
    }
  }
}

// m [16, n, channels] to channels [o, o + channels) of squares [begin, begin + n).
template <class T>
void FinishSquares(const Winograd& g, const float* m, int64_t step, const float* bias, int64_t begin,
                   int64_t n, int64_t o, int64_t channels, T* y) {
  const int64_t row = g.to[2] * g.to_c;
  for (int64_t i = 0; i < n; ++i) {
    const Square q(g, begin + i);
    T* first = y + ((q.b * g.to[0] + q.t) * g.to[1] + q.row) * row + q.column * g.to_c + o;
    T* to[4];
    for (int j = 0; j < 4; ++j) {
      const bool inside = q.row + j / 2 < g.to[1] && q.column + j % 2 < g.to[2];
      to[j] = inside ? first + j / 2 * row + j % 2 * g.to_c : nullptr;
    }
    FinishSquare(m + i * channels, step, channels, bias ? bias + o : nullptr, to);
  }
}

// The products of whole blocks and of the last, for all columns but the last and for those.
class WinogradProducts {
 public:
  WinogradProducts(const Winograd& g, int64_t dtype, char* error) {
    const int64_t heights[2] = {g.rows, (g.squares - 1) % g.rows + 1};
    const int64_t widths[2] = {g.columns, (g.to_c - 1) % g.columns + 1};
    for (int i = 0; i < 4; ++i) {
      const int64_t n = widths[i % 2];
      kernels_[i] = OnednnGetGemm({heights[i / 2], n, g.k, g.k, 1, 0, 0, n, dtype, 1}, error);
    }
  }
  ~WinogradProducts() {
    for (OnednnKernel* kernel : kernels_) OnednnRelease(kernel);
  }
  WinogradProducts(const WinogradProducts&) = delete;
  WinogradProducts& operator=(const WinogradProducts&) = delete;

  // Whether all of them are there, and more than oneDNN's reference loops.
  bool Fast() const {
    for (const OnednnKernel* kernel : kernels_)
      if (!kernel || OnednnGetRank(kernel) == kRankReference) return false;
    return true;
  }
  const OnednnKernel* At(bool last_rows, bool last_columns) const {
    return kernels_[2 * last_rows + last_columns];
  }
  size_t ScratchBytes() const {
    size_t most = 0;
    for (const OnednnKernel* kernel : kernels_)
      if (OnednnScratchBytes(kernel) > most) most = OnednnScratchBytes(kernel);
    return (most + 63) / 64 * 64;
  }

 private:
  OnednnKernel* kernels_[4] = {};
};

// w to packed products, [tile of columns, point].
template <class T>
int32_t PackFilters(const PfArgs* a, const Winograd& g, const T* w, int64_t dtype, int64_t bytes,
                    char* packed) {
  const int64_t step = g.columns * g.k;
  T* plain = static_cast<T*>(Scratch(a, kPoints * step * sizeof(T)));
  float* taps = static_cast<float*>(Scratch(a, omp_get_max_threads() * 9 * g.k * sizeof(float)));
  if (!plain || !taps) return PF_ERR_MEMORY;
  for (int64_t o = 0; o < g.to_c; o += g.columns, packed += kPoints * bytes) {
    const int64_t n = g.to_c - o < g.columns ? g.to_c - o : g.columns;
    int32_t status = ForTiles(a, n, n * g.k * kPoints, [&](int64_t i, int thread, char*) {
      TransformFilters(g, w, o + i, taps + thread * 9 * g.k, plain + i * g.k, step);
      return static_cast<int32_t>(PF_OK);
    });
    if (status == PF_OK)
      status = ForTiles(a, kPoints, n * g.k * kPoints, [&](int64_t e, int, char* error) {
        return OnednnPackTile(plain + e * step, 1, g.k, n, g.k, dtype, packed + e * bytes, error);
      });
    if (status != PF_OK) return status;
  }
  return PF_OK;
}

// y from x, both of g's sizes. T is what is multiplied: float, or Bf16 where that is fast.
template <class T>
int32_t RunWinograd(const PfArgs* a, const char* op, const Winograd& g, const WinogradProducts& products,
                    const PfView& x, const PfView& w, const PfView* bias, const PfView& y, int64_t dtype) {
  const int64_t bytes = OnednnPackTileBytes(g.columns, g.k, dtype, a->context->error);
  if (!bytes) return PF_ERR_DEVICE;
  // A line more than a multiple of a page, or all points of a square would share a few sets of the caches.
  const int64_t v_step = g.rows * g.k + 64 / static_cast<int64_t>(sizeof(T)),
                m_step = g.rows * g.columns + 16;
  const size_t scratch = products.ScratchBytes(), v_bytes = kPoints * v_step * sizeof(T);
  const size_t mine = scratch + v_bytes + kPoints * m_step * sizeof(float);
  const T* from = static_cast<const T*>(As(a, x, dtype));
  const T* filters = static_cast<const T*>(As(a, w, dtype));
  const bool biased = bias && PfPresent(*bias);
  const float* added = biased ? static_cast<const float*>(As(a, *bias, PF_F32)) : nullptr;
  char* packed = static_cast<char*>(Scratch(a, (g.to_c + g.columns - 1) / g.columns * kPoints * bytes));
  char* memory = static_cast<char*>(Scratch(a, omp_get_max_threads() * mine));
  T* zeros = static_cast<T*>(Scratch(a, g.from_c * sizeof(T)));
  if (!from || !filters || (biased && !added) || !packed || !memory || !zeros) return NoMemory(a, op);
  memset(zeros, 0, g.from_c * sizeof(T));
  const int32_t status = PackFilters(a, g, filters, dtype, bytes, packed);
  if (status != PF_OK) return status == PF_ERR_MEMORY ? NoMemory(a, op) : status;

  const int64_t blocks = (g.squares + g.rows - 1) / g.rows;
  return ForTiles(a, blocks, kWorthProducts + 1, [&](int64_t block, int thread, char* error) {
    char* at = memory + thread * mine;
    T* v = reinterpret_cast<T*>(at + scratch);
    float* m = reinterpret_cast<float*>(at + scratch + v_bytes);
    const int64_t begin = block * g.rows, n = g.squares - begin < g.rows ? g.squares - begin : g.rows;
    TransformInputs(g, from, zeros, begin, n, v, v_step);
    const char* weights = packed;
    for (int64_t o = 0; o < g.to_c; o += g.columns) {
      const int64_t channels = g.to_c - o < g.columns ? g.to_c - o : g.columns;
      const OnednnKernel* kernel = products.At(block + 1 == blocks, o + g.columns >= g.to_c);
      for (int64_t e = 0; e < kPoints; ++e, weights += bytes) {
        const int32_t status = OnednnRunGemm(kernel, v + e * v_step, weights, m + e * m_step, at, error);
        if (status != PF_OK) return status;
      }
      PF_FLOAT_DISPATCH(y, Y, FinishSquares(g, m, m_step, added, begin, n, o, channels, PfData<Y>(y)););
    }
    return static_cast<int32_t>(PF_OK);
  });
}

// Computes the convolution if it pays and this machine has the products; else *done stays false.
int32_t TryWinograd(const PfArgs* a, const char* op, const Conv3dShape& s, bool data, const PfView& x,
                    const PfView& w, const PfView* bias, const PfView& y, bool* done) {
  const Winograd g = WinogradOf(s, data);
  if (!WinogradPays(s, g)) return PF_OK;
  const bool bf16 = x.dtype == PF_BF16 && w.dtype == PF_BF16 && OnednnHasBf16();
  const int64_t dtype = bf16 ? PF_BF16 : PF_F32;
  const WinogradProducts products(g, dtype, a->context->error);
  if (!products.Fast()) return PF_OK;
  *done = true;
  return bf16 ? RunWinograd<Bf16>(a, op, g, products, x, w, bias, y, dtype)
              : RunWinograd<float>(a, op, g, products, x, w, bias, y, dtype);
}

}  // namespace

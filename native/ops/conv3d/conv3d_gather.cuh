// The inputs of a convolution as a matrix that is never written out: a line for every position of the result
// and, along it, every channel of every tap. Also the other way round, for the gradient of the weights.
#pragma once
#include "backends/cuda/gemm_kernel.h"

// Positions of the result, numbered (batch, t, h, w).
struct Positions {
  FastDiv t, h, w;  // by their lengths
  __device__ __forceinline__ void Split(int position, int (&at)[4]) const {
    at[3] = w.Split(&position);
    at[2] = h.Split(&position);
    at[1] = t.Split(&position);
    at[0] = position;
  }
};

// Position `at` of the result and tap (p, q, r) meet the source at (t, h, w) = scale at + shift + step (p, q,
// r).
template <class T>
struct Geometry {
  const T* data;  // channels last
  int channels;   // padded to a chunk
  int source[3], scale[3], shift[3], step;
  Positions positions;
  FastDiv by_channels, by_rows,
      by_columns;  // of taps * channels: the latter two by the taps' heights, widths

  // Channel and tap of column k, the tap already times step.
  __device__ __forceinline__ int Tap(int k, int (&tap)[3]) const {
    const int channel = by_channels.Split(&k);
    tap[2] = step * by_columns.Split(&k);
    tap[1] = step * by_rows.Split(&k);
    tap[0] = step * k;
    return channel;
  }
  __device__ __forceinline__ bool Inside(int axis, int at) const {
    return static_cast<unsigned>(at) < static_cast<unsigned>(source[axis]);
  }
  // Number of a position of the source; there are fewer than 2^30.
  __device__ __forceinline__ int Number(int b, int t, int h, int w) const {
    return ((b * source[0] + t) * source[1] + h) * source[2] + w;
  }
};

template <class T, bool kAlongK_>
struct ConvSource {
  static constexpr bool kAlongK = kAlongK_;
  Geometry<T> geometry;
  int rows, k;  // positions and taps * channels, or the other way round

  template <int kRows, int kThreads>
  class Loader {
   public:
    __device__ Loader(const ConvSource& s, int64_t, int row) : s_(s) {
      to_ = ChunkAt<T, kRows, kAlongK>(S::Line(), S::Chunk());
      if constexpr (kAlongK) {
#pragma unroll
        for (int i = 0; i < S::kCount; ++i) {
          const int position = row + S::Line() + i * S::kStep;
          int at[4];
          s.geometry.positions.Split(position, at);
#pragma unroll
          for (int axis = 0; axis < 3; ++axis)
            at_[i][axis] = at[1 + axis] * s.geometry.scale[axis] + s.geometry.shift[axis];
          number_[i] = s.geometry.Number(at[0], at_[i][0], at_[i][1], at_[i][2]);
          if (position >= s.rows) at_[i][0] = -(1 << 30);  // outside, whatever the tap
        }
      } else {
        const int column = row + S::Chunk() * kChunk<T>;
        channel_ = s.geometry.Tap(column, tap_);
        if (column >= s.rows) tap_[0] = -(1 << 30);
      }
    }

    __device__ __forceinline__ void Load(unsigned char* tile, int k) const {
      const Geometry<T>& g = s_.geometry;
      if constexpr (kAlongK) {
        k += S::Chunk() * kChunk<T>;
        int tap[3];
        const int channel = g.Tap(k, tap);
        const int number = g.Number(0, tap[0], tap[1], tap[2]);
#pragma unroll
        for (int i = 0; i < S::kCount; ++i) {
          const bool present = k < s_.k && g.Inside(0, at_[i][0] + tap[0]) &&
                               g.Inside(1, at_[i][1] + tap[1]) && g.Inside(2, at_[i][2] + tap[2]);
          Copy(tile, i, number_[i] + number, channel, present);
        }
      } else {
        k += S::Line();
#pragma unroll
        for (int i = 0; i < S::kCount; ++i) {
          const int position = k + i * S::kStep;
          int at[4];
          g.positions.Split(position, at);
#pragma unroll
          for (int axis = 0; axis < 3; ++axis)
            at[1 + axis] = at[1 + axis] * g.scale[axis] + g.shift[axis] + tap_[axis];
          const bool present =
              position < s_.k && g.Inside(0, at[1]) && g.Inside(1, at[2]) && g.Inside(2, at[3]);
          Copy(tile, i, g.Number(at[0], at[1], at[2], at[3]), channel_, present);
        }
      }
    }

   private:
    using S = Share<T, kRows, kThreads, kAlongK>;
    static constexpr int kKept = kAlongK ? S::kCount : 1;
    __device__ __forceinline__ void Copy(unsigned char* tile, int i, int number, int channel,
                                         bool present) const {
      const T* const from = s_.geometry.data + static_cast<int64_t>(number) * s_.geometry.channels + channel;
      CopyAsync16(tile + to_ + i * S::kStepBytes, from, present);
    }
    const ConvSource& s_;               // a kernel parameter: read from constant memory
    int at_[kKept][3], number_[kKept];  // of the source, where tap (0, 0, 0) meets the position
    int to_, tap_[3], channel_;
  };
};

// Rows of the product are every scale-th position of y, from first on.
struct ScatteredRows {
  Positions positions;
  int length[3], scale[3], first[3];
  bool scattered;
  __device__ __forceinline__ int64_t operator()(int row) const {
    if (!scattered) return row;
    int at[4];
    positions.Split(row, at);
    int64_t y = at[0];
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) y = y * length[axis] + at[1 + axis] * scale[axis] + first[axis];
    return y;
  }
};

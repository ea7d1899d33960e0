#include "backends/cpu/rows.h"
#include "ops/group_norm/group_norm.h"

namespace {

// Frames are cut into chunks of whole pixels that stay in a core's cache between the passes over them. The
// cut depends on the shape alone, and partial results are combined in chunk order: any number of threads,
// same bits.
constexpr int64_t kChunkElements = 8192;

struct Chunks {
  int64_t pixels, per_frame, total, elements;
  int64_t First(int64_t chunk) const { return chunk % per_frame * pixels; }
  int64_t Pixels(const GroupNormShape& s, int64_t chunk) const {
    const int64_t rest = s.pixels - First(chunk);
    return rest < pixels ? rest : pixels;
  }
  // First element of the chunk.
  int64_t Offset(const GroupNormShape& s, int64_t chunk) const {
    return (chunk / per_frame * s.pixels + First(chunk)) * s.channels;
  }
};

Chunks MakeChunks(const GroupNormShape& s) {
  int64_t pixels = kChunkElements / s.channels;
  if (pixels < 1) pixels = 1;
  if (pixels > s.pixels) pixels = s.pixels;
  const int64_t per_frame = (s.pixels + pixels - 1) / pixels;
  return {pixels, per_frame, per_frame * s.frames, RoundUp(pixels * s.channels, 16)};
}

// Vectors of channels whose sums stay in registers while a chunk is walked pixel by pixel, as it lies in
// memory: one vector at a time jumps, and hardware does not foresee that.
constexpr int kTile = 4;

// add(sums, pixel, c, lanes) for the pixels of a chunk and every vector of channels, then done(c, lanes,
// sums).
template <int kStep, class Sums, class Add, class Done>
void ForChannelTiles(int64_t pixels, int64_t channels, Add add, Done done) {
  int64_t c = 0;
  for (; c + kTile * kStep <= channels; c += kTile * kStep) {
    Sums sums[kTile] = {};
    for (int64_t p = 0; p < pixels; ++p)
      for (int k = 0; k < kTile; ++k) add(sums[k], p, c + k * kStep, int64_t{kStep});
    for (int k = 0; k < kTile; ++k) done(c + k * kStep, int64_t{kStep}, sums[k]);
  }
  for (; c < channels; c += kStep) {
    const int64_t lanes = channels - c < kStep ? channels - c : kStep;
    Sums sums = {};
    for (int64_t p = 0; p < pixels; ++p) add(sums, p, c, lanes);
    done(c, lanes, sums);
  }
}

// sums[c] = term over the pixels of a chunk.
template <class F>
void ChannelSums(int64_t pixels, int64_t channels, float* sums, F term) {
  ForChannelTiles<kLanes, Vf>(
      pixels, channels,
      [=](Vf& sum, int64_t p, int64_t c, int64_t m) { sum += term(p * channels + c, c, m); },
      [=](int64_t c, int64_t m, Vf sum) { StoreN(sums + c, sum, m); });
}

// Mean and centred square sum of every group over the pixels of a chunk, [groups, 2]; sums and means are
// buffers of a value a channel.
template <class T>
void ExactStatistics(const T* x, int64_t pixels, int64_t channels, int64_t groups, float* sums, float* means,
                     float* out) {
  const int64_t width = channels / groups;
  const float count = static_cast<float>(pixels * width);
  const auto group_sum = [=](int64_t g) {
    float sum = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += sums[c];
    return sum;
  };
  ChannelSums(pixels, channels, sums, [=](int64_t i, int64_t, int64_t m) { return LoadN(x + i, m); });
  for (int64_t g = 0; g < groups; ++g) {
    out[2 * g] = group_sum(g) / count;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) means[c] = out[2 * g];
  }
  ChannelSums(pixels, channels, sums, [=](int64_t i, int64_t c, int64_t m) {
    const Vf centred = LoadN(x + i, m) - LoadN(means + c, m);
    return centred * centred;
  });
  for (int64_t g = 0; g < groups; ++g) out[2 * g + 1] = group_sum(g);
}

template <class T>
void ChunkStatistics(const T* x, int64_t pixels, int64_t channels, int64_t groups, float* sums, float* means,
                     float* out) {
  ExactStatistics(x, pixels, channels, groups, sums, means, out);
}

#if defined(__AVX512BF16__)
// Sums and squares of neighbouring channels in one pass, an instruction each for 32 values. False where that
// does not serve: groups that part neighbours, or values so far from zero that the variance would drown.
bool PairStatistics(const Bf16* x, int64_t pixels, int64_t channels, int64_t groups, float* sums,
                    float* squares, float* out) {
  const int64_t width = channels / groups;
  if (width % 2 || channels % kPairs) return false;
  struct PairSums {
    Vf sum, square;
  };
  ForChannelTiles<kPairs, PairSums>(
      pixels, channels,
      [=](PairSums& s, int64_t p, int64_t c, int64_t) {
        const __m512bh v = LoadPairs(x + p * channels + c);
        s.sum = DotPairs(s.sum, v, OnePairs());
        s.square = DotPairs(s.square, v, v);
      },
      [=](int64_t c, int64_t, const PairSums& s) {
        StoreF(sums + c / 2, s.sum);
        StoreF(squares + c / 2, s.square);
      });
  const float count = static_cast<float>(pixels * width);
  for (int64_t g = 0; g < groups; ++g) {
    float sum = 0, square = 0;
    for (int64_t c = g * width / 2; c < (g + 1) * width / 2; ++c) sum += sums[c], square += squares[c];
    const float mean = sum / count, variance = square / count - mean * mean;
    if (!FewCancelled(mean, variance)) return false;
    out[2 * g] = mean;
    out[2 * g + 1] = variance * count;
  }
  return true;
}
void ChunkStatistics(const Bf16* x, int64_t pixels, int64_t channels, int64_t groups, float* sums,
                     float* means, float* out) {
  if (!PairStatistics(x, pixels, channels, groups, sums, means, out))
    ExactStatistics(x, pixels, channels, groups, sums, means, out);
}
#endif

// y = SiLU?((x − mean)·factor + b) = SiLU?(x·factor + offset) for the pixels of a chunk, which share these.
template <bool kSilu, class X, class Y>
void NormaliseChunk(const X* x, int64_t pixels, int64_t channels, const float* stats, const float* b, Y* y) {
  constexpr bool kCoarse = sizeof(Y) == sizeof(Bf16);
  const float *mean = stats, *factor = mean + channels, *offset = factor + channels;
  for (int64_t at = 0; at < pixels * channels; at += channels)
    WriteRow(y + at, channels, [=](int64_t c, int64_t m) {
      const Vf v = LoadN(x + at + c, m), f = LoadN(factor + c, m);
      // Values far from zero would lose digits in the second form that bf16 does not have.
      const Vf z = sizeof(X) == sizeof(Bf16) ? Fma(v, f, LoadN(offset + c, m))
                                             : Fma(v - LoadN(mean + c, m), f, LoadN(b + c, m));
      return kSilu ? Silu<kCoarse>(z) : z;
    });
}

}  // namespace

int32_t pf_cpu_group_norm(const PfArgs* a) {
  const char* op = "group_norm";
  GroupNormShape s;
  if (int32_t e = GroupNormForwardCheck(a, &s)) return e;
  if (int32_t e = GroupNormDtypes(a)) return e;
  if (PfCount(a->in[0]) == 0) return PF_OK;
  const auto& params = PfParams<GroupNormParams>(a);
  const bool silu = params.silu != 0;
  const int64_t C = s.channels, G = s.groups, width = C / G;
  const Chunks chunks = MakeChunks(s);
  const int64_t stride = 2 * RoundUp(C, 16);
  const float *w, *b;
  float* buffers = Scratch<float>(a, omp_get_max_threads() * stride);
  float* partial = Scratch<float>(a, chunks.total * G * 2);  // mean and centred square sum of a chunk
  float* stats = Scratch<float>(a, s.frames * 3 * C);        // of every channel: see NormaliseChunk
  if (!buffers || !partial || !stats || !AsFloats(a, a->in[1], &w) || !AsFloats(a, a->in[2], &b))
    return NoMemory(a, op);
  const bool parallel = PfCount(a->in[0]) > kParallelWork;

#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t chunk = 0; chunk < chunks.total; ++chunk) {
    float *sums = buffers + omp_get_thread_num() * stride, *means = sums + RoundUp(C, 16);
    float* out = partial + chunk * G * 2;
    const int64_t offset = chunks.Offset(s, chunk), pixels = chunks.Pixels(s, chunk);
    PF_FLOAT_DISPATCH(a->in[0], T,
                      { ChunkStatistics(PfData<T>(a->in[0]) + offset, pixels, C, G, sums, means, out); });
  }

  for (int64_t f = 0; f < s.frames; ++f)
    for (int64_t g = 0; g < G; ++g) {
      const auto at = [&](int64_t k) { return partial + ((f * chunks.per_frame + k) * G + g) * 2; };
      const auto count = [&](int64_t k) {
        const int64_t rest = s.pixels - k * chunks.pixels;
        return static_cast<double>(rest < chunks.pixels ? rest : chunks.pixels) * width;
      };
      double mean = 0, square = 0;
      for (int64_t k = 0; k < chunks.per_frame; ++k) mean += count(k) * at(k)[0];
      mean /= static_cast<double>(s.pixels) * width;
      // Chan's combination: the spread inside the chunks plus the spread of their means.
      for (int64_t k = 0; k < chunks.per_frame; ++k)
        square += at(k)[1] + count(k) * (at(k)[0] - mean) * (at(k)[0] - mean);
      const double rstd = 1 / sqrt(square / (static_cast<double>(s.pixels) * width) + params.eps);
      if (PfPresent(a->out[1])) PfData<float>(a->out[1])[f * G + g] = static_cast<float>(mean);
      if (PfPresent(a->out[2])) PfData<float>(a->out[2])[f * G + g] = static_cast<float>(rstd);
      float *means = stats + f * 3 * C, *factors = means + C, *offsets = factors + C;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        means[c] = static_cast<float>(mean);
        factors[c] = static_cast<float>(rstd) * w[c];
        offsets[c] = static_cast<float>(b[c] - mean * rstd * w[c]);
      }
    }

#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t chunk = 0; chunk < chunks.total; ++chunk) {
    const int64_t offset = chunks.Offset(s, chunk), pixels = chunks.Pixels(s, chunk);
    const float* shared = stats + chunk / chunks.per_frame * 3 * C;
    PF_FLOAT_DISPATCH(a->in[0], X, PF_FLOAT_DISPATCH(a->out[0], Y, {
                        const X* x = PfData<X>(a->in[0]) + offset;
                        Y* y = PfData<Y>(a->out[0]) + offset;
                        if (silu)
                          NormaliseChunk<true>(x, pixels, C, shared, b, y);
                        else
                          NormaliseChunk<false>(x, pixels, C, shared, b, y);
                      }););
  }
  return PF_OK;
}

int32_t pf_cpu_group_norm_backward(const PfArgs* a) {
  const char* op = "group_norm_backward";
  GroupNormShape s;
  if (int32_t e = GroupNormBackwardCheck(a, &s)) return e;
  if (int32_t e = GroupNormBackwardDtypes(a)) return e;
  const auto& params = PfParams<GroupNormBackwardParams>(a);
  const bool silu = params.silu != 0;
  const int64_t C = s.channels, G = s.groups, width = C / G;
  float* sums_out[2];  // dw, db
  for (int k = 0; k < 2; ++k) {
    sums_out[k] = PfData<float>(a->out[k + 1]);
    if (sums_out[k] && !params.accumulate) memset(sums_out[k], 0, C * sizeof(float));
  }
  if (PfCount(a->in[0]) == 0) return PF_OK;
  const Chunks chunks = MakeChunks(s);
  const int64_t stride = 3 * chunks.elements;
  const float *w, *b;
  float* buffers = Scratch<float>(a, omp_get_max_threads() * stride);
  float* partial = Scratch<float>(a, chunks.total * 2 * C);  // Σ dz·x̂ and Σ dz of a chunk, per channel
  float* stats = Scratch<float>(a, s.frames * 4 * C);  // mean, rstd, mean g, mean g·x̂, spread over channels
  double* totals = Scratch<double>(a, 4 * C);
  if (!buffers || !partial || !stats || !totals || !AsFloats(a, a->in[1], &w) || !AsFloats(a, a->in[2], &b))
    return NoMemory(a, op);
  const float *means = PfData<float>(a->in[3]), *rstds = PfData<float>(a->in[4]);
  for (int64_t f = 0; f < s.frames; ++f)
    for (int64_t c = 0; c < C; ++c) {
      stats[f * 4 * C + c] = means[f * G + c / width];
      stats[f * 4 * C + C + c] = rstds[f * G + c / width];
    }
  const bool parallel = PfCount(a->in[0]) > kParallelWork;
  // Gradient at z; SiLU's slope is σ(z)(1 + z(1 − σ(z))).
  const auto slope = [silu](Vf dy, Vf normal, Vf wv, Vf bv) {
    if (!silu) return dy;
    const Vf z = normal * wv + bv, sigmoid = Sigmoid(z);
    return dy * sigmoid * (1 + z * (1 - sigmoid));
  };

#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t chunk = 0; chunk < chunks.total; ++chunk) {
    float* buffer = buffers + omp_get_thread_num() * stride;
    const int64_t frame = chunk / chunks.per_frame, pixels = chunks.Pixels(s, chunk);
    const int64_t offset = chunks.Offset(s, chunk);
    const float* x = ReadRow(a->in[0], offset, pixels * C, buffer);
    const float* dy = ReadRow(a->in[5], offset, pixels * C, buffer + chunks.elements);
    const float *mean = stats + frame * 4 * C, *rstd = mean + C;
    float* out = partial + chunk * 2 * C;
    ForLanes(C, [&](int64_t c, int64_t m) {
      const Vf mv = LoadN(mean + c, m), rv = LoadN(rstd + c, m), wv = LoadN(w + c, m), bv = LoadN(b + c, m);
      Vf dw = {}, db = {};
      for (int64_t p = 0; p < pixels; ++p) {
        const Vf normal = (LoadN(x + p * C + c, m) - mv) * rv;
        const Vf dz = slope(LoadN(dy + p * C + c, m), normal, wv, bv);
        dw += dz * normal;
        db += dz;
      }
      StoreN(out + c, dw, m);
      StoreN(out + C + c, db, m);
    });
  }

  memset(totals, 0, 2 * C * sizeof(double));
  for (int64_t f = 0; f < s.frames; ++f) {
    double* frame_sums = totals + 2 * C;
    memset(frame_sums, 0, 2 * C * sizeof(double));
    for (int64_t k = 0; k < chunks.per_frame; ++k) {
      const float* from = partial + (f * chunks.per_frame + k) * 2 * C;
      for (int64_t i = 0; i < 2 * C; ++i) frame_sums[i] += from[i];
    }
    for (int64_t i = 0; i < 2 * C; ++i) totals[i] += frame_sums[i];
    const double count = static_cast<double>(s.pixels) * width;
    for (int64_t g = 0; g < G; ++g) {
      double dot = 0, sum = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        dot += frame_sums[c] * w[c];
        sum += frame_sums[C + c] * w[c];
      }
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        stats[f * 4 * C + 2 * C + c] = static_cast<float>(sum / count);
        stats[f * 4 * C + 3 * C + c] = static_cast<float>(dot / count);
      }
    }
  }
  for (int k = 0; k < 2; ++k)
    for (int64_t c = 0; sums_out[k] && c < C; ++c) sums_out[k][c] += static_cast<float>(totals[k * C + c]);

#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t chunk = 0; chunk < chunks.total; ++chunk) {
    float* buffer = buffers + omp_get_thread_num() * stride;
    const int64_t frame = chunk / chunks.per_frame, pixels = chunks.Pixels(s, chunk);
    const int64_t offset = chunks.Offset(s, chunk);
    const float* x = ReadRow(a->in[0], offset, pixels * C, buffer);
    const float* dy = ReadRow(a->in[5], offset, pixels * C, buffer + chunks.elements);
    float* dx = OpenRow(a->out[0], offset, buffer + 2 * chunks.elements);
    const float *mean = stats + frame * 4 * C, *rstd = mean + C, *sum = rstd + C, *dot = sum + C;
    for (int64_t p = 0; p < pixels; ++p)
      ForLanes(C, [&](int64_t c, int64_t m) {
        const Vf rv = LoadN(rstd + c, m), wv = LoadN(w + c, m);
        const Vf normal = (LoadN(x + p * C + c, m) - LoadN(mean + c, m)) * rv;
        const Vf dz = slope(LoadN(dy + p * C + c, m), normal, wv, LoadN(b + c, m));
        StoreN(dx + p * C + c, rv * (dz * wv - LoadN(sum + c, m) - normal * LoadN(dot + c, m)), m);
      });
    CommitRow(a->out[0], offset, pixels * C, dx);
  }
  return PF_OK;
}

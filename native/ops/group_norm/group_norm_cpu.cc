#include "backends/cpu/rows.h"
#include "ops/group_norm/group_norm.h"

namespace {

// Frames are cut into chunks of whole pixels that stay in a core's cache between the passes over them. The
// cut depends on the shape alone, and partial results are combined in chunk order: any number of threads,
// same bits.
constexpr int64_t kChunkElements = 16384;

struct Chunks {
  int64_t pixels, per_frame, total, elements;
  int64_t First(int64_t chunk) const { return chunk % per_frame * pixels; }
};

Chunks MakeChunks(const GroupNormShape& s) {
  int64_t pixels = kChunkElements / s.channels;
  if (pixels < 1) pixels = 1;
  if (pixels > s.pixels) pixels = s.pixels;
  const int64_t per_frame = (s.pixels + pixels - 1) / pixels;
  return {pixels, per_frame, per_frame * s.frames, RoundUp(pixels * s.channels, 16)};
}

int32_t Refuse(const PfArgs* a, const char* op, unsigned f32_inputs, unsigned f32_outputs) {
  for (int i = 0; i < a->n_in; ++i)
    if (!PfIsFloat(a->in[i]) || (f32_inputs >> i & 1 && a->in[i].dtype != PF_F32))
      return Fail(a, PF_ERR_DTYPE, "%s: input %d has a dtype this op does not take", op, i);
  for (int i = 0; i < a->n_out; ++i)
    if (PfPresent(a->out[i]) &&
        (!PfIsFloat(a->out[i]) || (f32_outputs >> i & 1 && a->out[i].dtype != PF_F32)))
      return Fail(a, PF_ERR_DTYPE, "%s: output %d has a dtype this op does not give", op, i);
  return PF_OK;
}

// sums[c] += term over the pixels of a chunk; one vector of channels at a time stays in registers.
template <class F>
void ChannelSums(int64_t pixels, int64_t channels, float* sums, F term) {
  ForLanes(channels, [&](int64_t c, int64_t m) {
    Vf even = {}, odd = {};
    int64_t p = 0;
    for (; p + 2 <= pixels; p += 2) {
      even += term(p * channels + c, c, m);
      odd += term((p + 1) * channels + c, c, m);
    }
    if (p < pixels) even += term(p * channels + c, c, m);
    StoreN(sums + c, even + odd, m);
  });
}

}  // namespace

int32_t pf_cpu_group_norm(const PfArgs* a) {
  const char* op = "group_norm";
  GroupNormShape s;
  if (int32_t e = GroupNormForwardCheck(a, &s)) return e;
  if (int32_t e = Refuse(a, op, 0, 6)) return e;
  if (PfCount(a->in[0]) == 0) return PF_OK;
  const auto& params = PfParams<GroupNormParams>(a);
  const bool silu = params.silu != 0;
  const int64_t C = s.channels, G = s.groups, width = C / G;
  const Chunks chunks = MakeChunks(s);
  const int64_t stride = 2 * chunks.elements + 2 * RoundUp(C, 16);
  const float *w, *b;
  float* buffers = Scratch<float>(a, omp_get_max_threads() * stride);
  float* partial = Scratch<float>(a, chunks.total * G * 2);  // mean and centred square sum of a chunk
  float* stats = Scratch<float>(a, s.frames * 2 * C);        // mean and rstd·w, spread over channels
  if (!buffers || !partial || !stats || !AsFloats(a, a->in[1], &w) || !AsFloats(a, a->in[2], &b))
    return NoMemory(a, op);
  const bool parallel = PfCount(a->in[0]) > kParallelWork;

#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t chunk = 0; chunk < chunks.total; ++chunk) {
    float* buffer = buffers + omp_get_thread_num() * stride;
    float *sums = buffer + 2 * chunks.elements, *means = sums + RoundUp(C, 16);
    const int64_t first = chunks.First(chunk);
    const int64_t pixels = s.pixels - first < chunks.pixels ? s.pixels - first : chunks.pixels;
    const float* x = ReadRow(a->in[0], (chunk / chunks.per_frame * s.pixels + first) * C, pixels * C, buffer);
    ChannelSums(pixels, C, sums, [&](int64_t i, int64_t, int64_t m) { return LoadN(x + i, m); });
    for (int64_t g = 0; g < G; ++g) {
      float sum = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += sums[c];
      const float mean = sum / static_cast<float>(pixels * width);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) means[c] = mean;
      partial[(chunk * G + g) * 2] = mean;
    }
    ChannelSums(pixels, C, sums, [&](int64_t i, int64_t c, int64_t m) {
      const Vf centred = LoadN(x + i, m) - LoadN(means + c, m);
      return centred * centred;
    });
    for (int64_t g = 0; g < G; ++g) {
      float sum = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += sums[c];
      partial[(chunk * G + g) * 2 + 1] = sum;
    }
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
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        stats[f * 2 * C + c] = static_cast<float>(mean);
        stats[f * 2 * C + C + c] = static_cast<float>(rstd) * w[c];
      }
    }

#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t chunk = 0; chunk < chunks.total; ++chunk) {
    float* buffer = buffers + omp_get_thread_num() * stride;
    const int64_t frame = chunk / chunks.per_frame, first = chunks.First(chunk);
    const int64_t pixels = s.pixels - first < chunks.pixels ? s.pixels - first : chunks.pixels;
    const int64_t offset = (frame * s.pixels + first) * C;
    const float* x = ReadRow(a->in[0], offset, pixels * C, buffer);
    float* y = OpenRow(a->out[0], offset, buffer + chunks.elements);
    const float *mean = stats + frame * 2 * C, *factor = mean + C;
    for (int64_t p = 0; p < pixels; ++p)
      ForLanes(C, [&](int64_t c, int64_t m) {
        const Vf z = (LoadN(x + p * C + c, m) - LoadN(mean + c, m)) * LoadN(factor + c, m) + LoadN(b + c, m);
        StoreN(y + p * C + c, silu ? Silu(z) : z, m);
      });
    CommitRow(a->out[0], offset, pixels * C, y);
  }
  return PF_OK;
}

int32_t pf_cpu_group_norm_backward(const PfArgs* a) {
  const char* op = "group_norm_backward";
  GroupNormShape s;
  if (int32_t e = GroupNormBackwardCheck(a, &s)) return e;
  if (int32_t e = Refuse(a, op, 1u << 3 | 1u << 4, 6)) return e;
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
    const int64_t frame = chunk / chunks.per_frame, first = chunks.First(chunk);
    const int64_t pixels = s.pixels - first < chunks.pixels ? s.pixels - first : chunks.pixels;
    const int64_t offset = (frame * s.pixels + first) * C;
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
    const int64_t frame = chunk / chunks.per_frame, first = chunks.First(chunk);
    const int64_t pixels = s.pixels - first < chunks.pixels ? s.pixels - first : chunks.pixels;
    const int64_t offset = (frame * s.pixels + first) * C;
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

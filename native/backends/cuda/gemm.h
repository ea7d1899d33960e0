// Products of plain matrices: by cuBLASLt where it is installed and takes the case, else by our own kernel.
#pragma once
#include "core/op.h"

enum GemmActivation : int32_t { kActNone = 0, kActGeluTanh = 1, kActSilu = 2 };

// y[e] = act(a[e] b[e] + bias) + residual[e], or y[e] += a[e] b[e]. Operands are f32 or bf16, packed as the
// matmul op's (ops/matmul/matmul.h); lengths are positive.
struct GemmProblem {
  int64_t batch, m, n, k;
  int64_t a_batch, b_batch;  // elements from one entry to the next; 0: the same for all
  bool trans_a, trans_b;     // a is [k, m], b is [n, k]
  PfView a, b, bias, residual, y;
  int32_t activation;
  bool accumulate;
};

int32_t Gemm(const PfArgs* args, const char* op, const GemmProblem& p);

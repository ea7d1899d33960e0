// cuBLASLt, NVIDIA's library of matrix products, looked for at run time: nothing of it is needed to build or
// to run. PYRAFLOW_CUBLASLT names its file, or is "off"; else the system's linker and the CUDA toolkit's
// folders are asked.
#pragma once
#include "backends/cuda/gemm.h"

// An operand of one of the two products' types, with aligned lines (Prepare in gemm_kernel.h).
struct CublasLtOperand {
  const void* data;
  int64_t line, batch;  // elements from one line, one entry, to the next
};

// Whether the product has been queued; if not, nothing has been written and our own kernel has to do it. p.a
// and p.b are read for nothing: a and b, both of this dtype, stand in for them.
bool CublasLtMatmul(const PfArgs* args, const GemmProblem& p, int32_t dtype, const CublasLtOperand& a,
                    const CublasLtOperand& b);

// Which library is used, or why none is.
const char* CublasLtState();

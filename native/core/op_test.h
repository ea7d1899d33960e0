// Describes op cases once; the runner sweeps dtype, alignment and every backend against the reference.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/op.h"

namespace op_test {

using Dims = std::vector<int64_t>;
using Values = std::function<double(int64_t)>;

enum class Kind { kSweep, kF32, kInt, kU8, kMissing };

struct Operand {
  Kind kind;
  Dims dims;
  std::vector<double> values;  // inputs, and in/out outputs before the call
  bool in_out = false;
};

class Case {
 public:
  Case(std::string op, uint64_t seed);
  // Inputs. Floats are standard normal, times scale.
  Case& In(Dims dims, double scale = 1.0);
  Case& InF32(Dims dims, double scale = 1.0);
  Case& InValues(Dims dims, Values fn);  // float, swept dtype
  Case& InInt(Dims dims, Values fn);     // i32
  Case& InU8(Dims dims, Values fn);
  Case& Missing();
  // An input computed by the reference: op on earlier inputs (index, -1 = missing), its outputs' dims, which
  // output.
  Case& FromRef(std::string op, std::vector<int> inputs, std::vector<double> scalars,
                std::vector<Dims> outputs, int which, bool f32 = true);
  // Outputs.
  Case& Out(Dims dims);
  Case& OutF32(Dims dims);
  Case& OutU8(Dims dims);
  Case& OutInt(Dims dims);
  Case& InOut(Dims dims);
  Case& InOutF32(Dims dims);
  Case& OutMissing();
  Case& Scalars(std::vector<double> scalars);
  Case& Tolerance(double f32, double bf16);  // relative L2 per output; 0 means equal bits
  Case& F32Only();
  // On a GPU alone and in bf16, and `repeats` times more, which have to give the same bits: races show there.
  Case& OnGpu(int repeats);
  void Run();
  // Runs expecting this refusal instead of a result.
  void RunExpecting(int32_t status);

 private:
  std::vector<double> Normal(int64_t n, double scale);
  Case& Add(std::vector<Operand>& list, Kind kind, Dims dims, bool in_out = false);
  void RunOne(const PfBackendTable* backend, bool bf16, bool unaligned, int32_t expected);

  std::string op_;
  int op_index_;
  uint64_t state_;
  std::vector<Operand> in_, out_;
  std::vector<double> scalars_;
  double tolerance_f32_ = 1e-6, tolerance_bf16_ = 1e-2;
  bool f32_only_ = false;
  int repeats_ = -1;
};

class Test {
 public:
  class Case Case(const std::string& op) {
    return {op, ++seed_};
  }

 private:
  uint64_t seed_ = 0;
};

// Whether a GPU is among what is tested.
bool HasGpu();

struct Register {
  Register(const char* folder, void (*run)(Test&));
};

}  // namespace op_test

#define PF_CASES(folder)                                                           \
  static void PfCases_##folder(op_test::Test& test);                               \
  static const op_test::Register pf_register_##folder(#folder, &PfCases_##folder); \
  static void PfCases_##folder([[maybe_unused]] op_test::Test& test)

// Finding, choosing and opening backends. The level is chosen by cpuid before the library is mapped, so no
// instruction of a level the machine lacks is ever reached.
#pragma once
#include <string>
#include <vector>

#include "core/op.h"

struct Backend {
  const PfBackendTable* table = nullptr;
  std::string name;
  std::string reason;  // why table is null, for `pyraflow info`
  std::string detail;  // what device it works on
};

// CPU levels, weakest first, with the reason a level is unusable here (empty when usable).
struct CpuLevel {
  std::string name;
  std::string unusable;
};
std::vector<CpuLevel> CpuLevels();

// Opens <directory>/libpyraflow_<name>.so, checks its table and asks it whether it can work with this device.
// Never throws.
Backend OpenBackend(const std::string& directory, const std::string& name, int device = 0);

// The best usable CPU level that is present; `wanted` ("ref", "cpu_avx2", "avx2" or empty) caps or replaces
// the choice, "cuda" and "cuda_emulated" take that library.
Backend ChooseBackend(const std::string& directory, const std::string& wanted, int device);

#include "core/backend.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#if defined(__x86_64__)

namespace {

uint64_t Xcr0() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 0;
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// Linux hands out the 8 KiB of tile state only on request, once per process.
bool RequestAmx() {
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

}  // namespace

std::vector<CpuLevel> CpuLevels() {
  uint32_t a = 0, b = 0, c = 0, d = 0, b1 = 0, c1 = 0, d1 = 0;
  __get_cpuid(1, &a, &b, &c1, &d);
  const bool fma = c1 & (1u << 12), f16c = c1 & (1u << 29);
  b = d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const bool avx2 = b & (1u << 5);
  const bool avx512 = (b & (1u << 16)) && (b & (1u << 17)) && (b & (1u << 30)) && (b & (1u << 31));
  const bool amx = (d & (1u << 22)) && (d & (1u << 24));
  const uint64_t xcr0 = Xcr0();
  a = 0;
  __get_cpuid_count(7, 1, &a, &b1, &c, &d1);
  const bool bf16 = a & (1u << 5);
  std::vector<CpuLevel> levels{
      {"cpu_base", ""}, {"cpu_avx2", ""}, {"cpu_avx512", ""}, {"cpu_avx512_bf16", ""}, {"cpu_amx", ""}};
  if (!avx2 || !fma || !f16c || (xcr0 & 6) != 6) levels[1].unusable = "the CPU has no AVX2 and FMA";
  if (!levels[1].unusable.empty() || !avx512 || (xcr0 & 0xe6) != 0xe6)
    levels[2].unusable = "the CPU has no AVX-512 (F, BW, DQ, VL)";
  if (!levels[2].unusable.empty() || !bf16) levels[3].unusable = "the CPU has no AVX-512 bf16 dot products";
  if (!levels[3].unusable.empty() || !amx)
    levels[4].unusable = "the CPU has no AMX-bf16 tiles";
  else if (!RequestAmx())
    levels[4].unusable = "the kernel refused AMX tile state";
  return levels;
}

#else

// Every 64-bit ARM processor has what the one level there asks for.
std::vector<CpuLevel> CpuLevels() { return {{"cpu_neon", ""}}; }

#endif

Backend OpenBackend(const std::string& directory, const std::string& name, int device) {
  Backend backend;
  backend.name = name;
  const std::string path = directory + "/libpyraflow_" + name + ".so";
  if (access(path.c_str(), R_OK) != 0) {
    backend.reason = "library libpyraflow_" + name + ".so is not installed";
    return backend;
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* message = dlerror();
    backend.reason = message ? message : "dlopen failed";
    return backend;
  }
  const auto entry = reinterpret_cast<PfBackendEntry>(dlsym(library, PF_BACKEND_ENTRY));
  const PfBackendTable* table = entry ? entry() : nullptr;
  if (!table || table->abi != PF_ABI_VERSION || table->op_count != PF_OP_COUNT)
    backend.reason = "library was built for another version: rebuild with `npm run build:native`";
  else
    backend.table = table;
  char text[256] = "";
  if (!backend.table || !table->probe) return backend;
  if (table->probe(device, text) == PF_OK) {
    backend.detail = text;
  } else {
    backend.table = nullptr;
    backend.reason = text;
  }
  return backend;
}

Backend ChooseBackend(const std::string& directory, const std::string& wanted, int device) {
  if (wanted == "ref" || wanted.rfind("cuda", 0) == 0) return OpenBackend(directory, wanted, device);
  std::string cap = wanted.empty() || wanted.rfind("cpu_", 0) == 0 ? wanted : "cpu_" + wanted;
  const auto levels = CpuLevels();
  int top = static_cast<int>(levels.size()) - 1;
  if (!cap.empty()) {
    while (top >= 0 && levels[top].name != cap) --top;
    if (top < 0) {
      Backend none;
      none.name = wanted;
      none.reason = "unknown backend '" + wanted + "': use ref, base, avx2, avx512, avx512_bf16, amx or cuda";
      return none;
    }
  }
  Backend last;
  last.reason = "no CPU backend library is installed: run `npm run build:native`";
  for (int i = top; i >= 0; --i) {
    if (!levels[i].unusable.empty()) continue;
    Backend backend = OpenBackend(directory, levels[i].name);
    if (backend.table) return backend;
    last = backend;
  }
  return last;
}

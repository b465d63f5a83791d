// Which table of kernels this process runs.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "fedlean/kernels.h"

// CMake defines one of these; by hand the compiler's own macros do.
#if !defined(FEDLEAN_X86) && !defined(FEDLEAN_ARM)
#if defined(__x86_64__)
#define FEDLEAN_X86 1
#elif defined(__aarch64__)
#define FEDLEAN_ARM 1
#endif
#endif

namespace fedlean {

extern const Kernels reference_table;
#if defined(FEDLEAN_X86)
extern const Kernels avx2_table, avx512_table;
#elif defined(FEDLEAN_ARM)
extern const Kernels neon_table;
#endif

const Kernels& reference_kernels() { return reference_table; }

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> tables = {&reference_table};
#if defined(FEDLEAN_X86)
  __builtin_cpu_init();  // we may run before the constructor that does it
  // Also false where the operating system does not save the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx2) tables.push_back(&avx2_table);
#if defined(FEDLEAN_WITHOUT_AVX512)
  (void)avx512;
#else
  if (avx2 && avx512) tables.push_back(&avx512_table);
#endif
#elif defined(FEDLEAN_ARM)
  tables.push_back(&neon_table);  // part of every aarch64 processor
#endif
  return tables;
}

const Kernels& best_kernels() {
  const std::vector<const Kernels*> tables = available_kernels();
  const char* const forced = std::getenv("FEDLEAN_INSTRUCTION_SET");
  if (!forced || !*forced) return *tables.back();
  std::string names;
  for (const Kernels* table : tables) {
    if (std::string(table->name) == forced) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::runtime_error("FEDLEAN_INSTRUCTION_SET is \"" + std::string(forced) +
                           "\", but this processor and build have: " + names +
                           "; set it to one of these, or unset it to get the fastest");
}

}  // namespace fedlean

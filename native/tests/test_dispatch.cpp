// Which table runs, and what FEDLEAN_INSTRUCTION_SET does about it.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "check.h"
#include "fedlean/kernels.h"

namespace {

std::string error_for(const char* value) {
  setenv("FEDLEAN_INSTRUCTION_SET", value, 1);
  try {
    fedlean::best_kernels();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

int main() {
  using namespace fedlean;
  unsetenv("FEDLEAN_INSTRUCTION_SET");
  const auto tables = available_kernels();
  CHECK(tables.front() == &reference_kernels());
  CHECK(reference_kernels().name == std::string("reference"));
  CHECK(&best_kernels() == tables.back());
  for (const Kernels* table : tables) {
    setenv("FEDLEAN_INSTRUCTION_SET", table->name, 1);
    CHECK(&best_kernels() == table);
  }
  setenv("FEDLEAN_INSTRUCTION_SET", "", 1);
  CHECK(&best_kernels() == tables.back());
  const std::string error = error_for("sse9");
  CHECK(error.find("FEDLEAN_INSTRUCTION_SET") != std::string::npos);
  CHECK(error.find("\"sse9\"") != std::string::npos);
  for (const Kernels* table : tables) CHECK(error.find(table->name) != std::string::npos);
  CHECK(error_for("AVX2").find("\"AVX2\"") != std::string::npos);  // names are exact
#if defined(__aarch64__)
  CHECK(error_for("avx2") != "");
  CHECK(tables.back()->name == std::string("neon"));
#else
  CHECK(error_for("neon") != "");
#endif
  return finish();
}

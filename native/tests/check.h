// Checks that count and go on; a test's main ends with `return finish();`.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

namespace fedlean {

inline long checks_done = 0, checks_failed = 0;
inline std::string check_context;  // what is being tested now; printed with a failure

inline void check(bool ok, const char* file, int line, const std::string& what) {
  ++checks_done;
  if (ok) return;
  if (++checks_failed <= 20)
    std::printf("%s:%d: %s [%s]\n", file, line, what.c_str(), check_context.c_str());
}

// Within tol, relative to b where that is larger than 1; NaN is close to NaN only.
inline bool is_close(double a, double b, double tol) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= tol * std::fmax(1.0, std::fabs(b));
}

inline int finish() {
  std::printf("%ld checks, %ld failed\n", checks_done, checks_failed);
  return checks_done > 0 && checks_failed == 0 ? 0 : 1;
}

}  // namespace fedlean

#define CHECK(cond) ::fedlean::check(bool(cond), __FILE__, __LINE__, #cond)
#define CHECK_CLOSE(a, b, tol)                                         \
  ::fedlean::check(::fedlean::is_close(a, b, tol), __FILE__, __LINE__, \
                   #a " = " + std::to_string(a) + ", not " + std::to_string(b))

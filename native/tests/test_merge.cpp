// The server's sums and means by hand, and the runs that are refused.
#include <stdexcept>
#include <vector>

#include "check.h"
#include "fedlean/merge.h"

namespace fedlean {
namespace {

using Numbers = std::vector<std::int64_t>;

Runs runs_of(const Numbers& rows, std::size_t row_size, const Numbers& firsts,
             const Numbers& sizes) {
  return {rows.data(), rows.size(), row_size, firsts.data(), sizes.data(), sizes.size()};
}

void check_refused(const char* what, const Numbers& rows, std::size_t row_size,
                   const Numbers& firsts, const Numbers& sizes) {
  check_context = what;
  bool refused = false;
  try {
    check_runs(runs_of(rows, row_size, firsts, sizes), 12);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

void test_sums() {
  check_context = "by hand";
  const Numbers rows = {2, 0}, firsts = {0, 3}, sizes = {2, 1};
  const Runs runs = runs_of(rows, 4, firsts, sizes);
  CHECK(check_runs(runs, 12) == 6);
  const float values[] = {1, 2, 3, 4, 5, 6};
  std::vector<double> total(12, 0.5);
  add_scaled(total.data(), values, 10, runs);
  const std::vector<double> expected = {40.5, 50.5, 0.5,  60.5, 0.5, 0.5,
                                        0.5,  0.5,  10.5, 20.5, 0.5, 30.5};
  CHECK(total == expected);
}

// The product is 1 + 2^-23 + 2^-52 + 2^-75, of which float64 keeps all but the last.
void test_rounding() {
  check_context = "rounding";
  const Numbers one = {0}, size = {1};
  const float value = 1 + 0x1p-23f;
  const double weight = 1 + 0x1p-52;
  double total = -1;
  add_scaled(&total, &value, weight, runs_of(one, 1, one, size));
  CHECK(total == 0x1p-23 + 0x1p-52);  // fused with the addition it has 2^-75 too
}

void test_means() {
  check_context = "means";
  const double total[] = {1, 2, 3, 4, 5, 6}, weights[] = {2, 0, 3};
  const float base[] = {10, 20, 30, 40, 50, 60};
  std::vector<float> merged(6, -1);
  divide(total, base, weights, 3, 2, merged.data());
  CHECK((merged == std::vector<float>{0.5f, 1, 30, 40, float(5.0 / 3), 2}));
}

void test_refusals() {
  constexpr std::int64_t most = INT64_MAX, least = INT64_MIN;
  check_refused("row behind the last", {3}, 4, {0}, {1});
  check_refused("negative row", {-1}, 4, {0}, {1});
  check_refused("row that overflows", {most}, 4, {0}, {1});
  check_refused("rows of nothing", {0}, 0, {0}, {0});
  check_refused("rows that do not fit", {0}, 5, {0}, {1});
  check_refused("run behind its row", {0}, 4, {4}, {1});
  check_refused("run over the end of its row", {0}, 4, {3}, {2});
  check_refused("negative start", {0}, 4, {-1}, {1});
  check_refused("negative size", {0}, 4, {2}, {-1});
  check_refused("start that overflows", {0}, 4, {most}, {2});
  check_refused("least start", {0}, 4, {least}, {1});
  check_refused("size that overflows", {0}, 4, {1}, {most});
}

}  // namespace
}  // namespace fedlean

int main() {
  fedlean::test_sums();
  fedlean::test_rounding();
  fedlean::test_means();
  fedlean::test_refusals();
  return fedlean::finish();
}

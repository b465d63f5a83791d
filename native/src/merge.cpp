#include "fedlean/merge.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace fedlean {

namespace {

// Asks for what is summed next: the processor foresees no gaps.  It foresees runs shorter than one
// of its cache's lines, which leave none out.
void fetch(const double* sums, std::size_t size) {
  constexpr std::size_t line = 64 / sizeof(double);
  if (size < line) return;
  for (std::size_t k = 0; k < size; k += line) __builtin_prefetch(sums + k, 1);
}

}  // namespace

std::size_t check_runs(const Runs& runs, std::size_t total_size) {
  if (runs.row_size == 0 || total_size % runs.row_size != 0)
    throw std::invalid_argument("the tensor does not fall into rows of this size");
  const std::uint64_t all_rows = total_size / runs.row_size;
  for (std::size_t i = 0; i < runs.num_rows; ++i)  // a negative number is a large one
    if (std::uint64_t(runs.rows[i]) >= all_rows)
      throw std::invalid_argument("a row is not in the tensor");
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
  std::size_t of_row = 0;
  for (std::size_t i = 0; i < runs.num_runs; ++i) {
    const std::uint64_t first = runs.firsts[i], size = runs.sizes[i];
    if (size > runs.row_size || first > runs.row_size - size)
      throw std::invalid_argument("a run is not in its row");
    if (size > most - of_row) throw std::invalid_argument("the runs have too many coordinates");
    of_row += size;
  }
  if (of_row != 0 && runs.num_rows > most / of_row)
    throw std::invalid_argument("the runs have too many coordinates");
  return runs.num_rows * of_row;
}

void add_scaled(double* total, const float* values, double weight, const Runs& runs) {
  for (std::size_t i = 0; i < runs.num_rows; ++i) {
    double* const row = total + std::size_t(runs.rows[i]) * runs.row_size;
    for (std::size_t j = 0; j < runs.num_runs; ++j) {
      double* const sums = row + runs.firsts[j];
      const std::size_t size = runs.sizes[j];
      if (j + 1 < runs.num_runs) fetch(row + runs.firsts[j + 1], runs.sizes[j + 1]);
      for (std::size_t k = 0; k < size; ++k) sums[k] += double(values[k]) * weight;
      values += size;
    }
  }
}

void divide(const double* total, const float* base, const double* weights, std::size_t num_chunks,
            std::size_t chunk_size, float* merged) {
  for (std::size_t i = 0; i < num_chunks; ++i) {
    const double weight = weights[i];
    const std::size_t first = i * chunk_size;
    if (weight > 0)
      for (std::size_t k = first; k < first + chunk_size; ++k) merged[k] = float(total[k] / weight);
    else
      std::copy_n(base + first, chunk_size, merged + first);
  }
}

}  // namespace fedlean

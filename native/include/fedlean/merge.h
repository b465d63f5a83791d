// The server's merge: weighted values of clients onto sums in float64, and their means.  Every
// operation rounds by itself, as NumPy's do, so that both give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedlean {

// Coordinates of a tensor that falls into rows of `row_size`: of each of the rows the same runs.
struct Runs {
  const std::int64_t* rows;  // their numbers
  std::size_t num_rows;
  std::size_t row_size;
  const std::int64_t* firsts;  // where in a row each run begins
  const std::int64_t* sizes;
  std::size_t num_runs;
};

// How many coordinates there are.  Throws std::invalid_argument unless all of them lie in a tensor
// of `total_size`.
std::size_t check_runs(const Runs& runs, std::size_t total_size);

// total[runs] += weight * values, in the order of the runs.  The runs are checked.
void add_scaled(double* total, const float* values, double weight, const Runs& runs);

// merged = total / weight where the weight is above 0, base elsewhere.  A weight is that of a
// chunk: all of the tensor falls into `num_chunks` of `chunk_size`.
void divide(const double* total, const float* base, const double* weights, std::size_t num_chunks,
            std::size_t chunk_size, float* merged);

}  // namespace fedlean

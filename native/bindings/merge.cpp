// The functions of fedlean._native for the server's merge: see fedlean/merge.h and fedlean.sums.

#include "fedlean/merge.h"

#include "guard.h"

namespace fedlean {

namespace {

// A copy, which nobody changes once it is checked.
std::vector<std::int64_t> copied(const char* what, const In<std::int64_t>& numbers) {
  if (numbers.ndim() != 1) throw std::invalid_argument(std::string(what) + " has another shape");
  expect_array(what, numbers, numbers.size());
  return {numbers.data(), numbers.data() + numbers.size()};
}

void add(Out<double> total, In<float> values, double weight, In<std::int64_t> rows,
         std::int64_t row_size, In<std::int64_t> firsts, In<std::int64_t> sizes) {
  const auto row = copied("rows", rows), first = copied("firsts", firsts),
             size = copied("sizes", sizes);
  expect_size("sizes", size.size(), first.size());
  if (row_size < 1) throw std::invalid_argument("row_size must be at least 1");
  const Runs runs = {row.data(),   row.size(),  std::size_t(row_size),
                     first.data(), size.data(), size.size()};
  expect_array("total", total, total.size());
  expect_array("values", values, check_runs(runs, total.size()));
  nb::gil_scoped_release release;
  add_scaled(total.data(), values.data(), weight, runs);
}

void mean(In<double> total, In<float> base, In<double> weights, Out<float> merged) {
  expect_array("total", total, total.size());
  expect_array("base", base, total.size());
  expect_array("weights", weights, weights.size());
  expect_array("merged", merged, total.size());
  if (weights.size() == 0 || total.size() % weights.size() != 0)
    throw std::invalid_argument("the tensor does not fall into so many chunks");
  const std::size_t chunk_size = total.size() / weights.size();
  nb::gil_scoped_release release;
  divide(total.data(), base.data(), weights.data(), weights.size(), chunk_size, merged.data());
}

}  // namespace

void bind_merge(nb::module_& m) {
  m.def("add_scaled", &add, nb::arg("total").noconvert(), nb::arg("values").noconvert(),
        nb::arg("weight"), nb::arg("rows").noconvert(), nb::arg("row_size"),
        nb::arg("firsts").noconvert(), nb::arg("sizes").noconvert());
  m.def("mean", &mean, nb::arg("total").noconvert(), nb::arg("base").noconvert(),
        nb::arg("weights").noconvert(), nb::arg("merged").noconvert());
}

}  // namespace fedlean

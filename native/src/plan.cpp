#include "fedlean/plan.h"

#include <algorithm>
#include <new>
#include <numeric>

namespace fedlean {

namespace {
constexpr std::size_t kAlign = 16;  // floats: one cache line
// No machine has 256 GiB for one array, and sums of so many stay in 64 bits.
constexpr std::size_t kMostFloats = std::size_t(1) << 36;
}  // namespace

int Plan::add(std::size_t floats, int first, int last) {
  if (floats > kMostFloats) throw std::bad_alloc();
  arrays_.push_back({(floats + kAlign - 1) / kAlign * kAlign, first, last, 0});
  return int(arrays_.size()) - 1;
}

void Plan::extend(int id, int first, int last) {
  arrays_[id].first = std::min(arrays_[id].first, first);
  arrays_[id].last = std::max(arrays_[id].last, last);
}

// Largest first, each at the lowest offset that is free during its whole life.
void Plan::place() {
  std::vector<int> order(arrays_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return arrays_[a].floats > arrays_[b].floats; });
  std::vector<int> placed;  // by offset
  for (int id : order) {
    Array& array = arrays_[id];
    std::size_t at = 0;
    for (int other_id : placed) {
      const Array& other = arrays_[other_id];
      if (other.last < array.first || array.last < other.first) continue;
      if (at + array.floats <= other.offset) break;
      at = std::max(at, other.offset + other.floats);
    }
    array.offset = at;
    floats_ = std::max(floats_, at + array.floats);
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), id,
                         [&](int a, int b) { return arrays_[a].offset < arrays_[b].offset; }),
        id);
  }
}

}  // namespace fedlean

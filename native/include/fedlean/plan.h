// The static memory plan: every array of a pass has a lifetime, and arrays whose lifetimes do not
// meet share memory.  The size is known before anything is allocated.
#pragma once

#include <cstddef>
#include <vector>

namespace fedlean {

class Plan {
public:
  // An array of `floats`, alive from time `first` to time `last`, both included; returns its id.
  // Throws std::bad_alloc where there cannot be so many.
  int add(std::size_t floats, int first, int last);
  // Lengthens a lifetime.
  void extend(int id, int first, int last);
  // Chooses offsets; call once, after the last `add`.
  void place();

  std::size_t floats() const { return floats_; }  // of the arena
  std::size_t offset(int id) const { return arrays_[id].offset; }
  std::size_t size(int id) const { return arrays_[id].floats; }
  int first(int id) const { return arrays_[id].first; }

private:
  struct Array {
    std::size_t floats;
    int first, last;
    std::size_t offset;
  };
  std::vector<Array> arrays_;
  std::size_t floats_ = 0;
};

}  // namespace fedlean

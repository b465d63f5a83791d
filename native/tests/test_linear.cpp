// Linear layers, sparse (columns) and dense (matrices): every table against the reference.
#include "buffers.h"

namespace fedlean {
namespace {

// ---- Sparse.

struct Sparse {
  int inputs, outputs;
  Bytes kept;  // (outputs, inputs)
  ColumnPattern pattern;
  int panels, lanes[2];
};

Sparse random_sparse(Random& random) {
  const int inputs = pick(random, 1, 40), outputs = pick(random, 1, 60);
  Sparse s{inputs, outputs, Bytes(std::size_t(inputs) * outputs), {}, 1, {0, 0}};
  const double densities[] = {0, 0.03, 0.2, 0.5, 1};
  const double density = densities[pick(random, 0, 4)];
  std::vector<bool> empty_row(outputs), empty_column(inputs);
  for (int o = 0; o < outputs; ++o) empty_row[o] = toss(random, 0.1);
  for (int i = 0; i < inputs; ++i) empty_column[i] = toss(random, 0.1);
  for (int o = 0; o < outputs; ++o)
    for (int i = 0; i < inputs; ++i)
      s.kept[std::size_t(o) * inputs + i] =
          !empty_row[o] && !empty_column[i] && toss(random, density);
  s.pattern =
      build_columns(s.kept.data(), outputs, inputs, inputs, 1, pick(random, 1, outputs + 5));
  s.panels = pick(random, 1, 2);
  s.lanes[0] = s.panels == 2 ? kPanelLanes : kLaneStep * pick(random, 1, 4);
  s.lanes[1] = s.panels == 2 ? kLaneStep * pick(random, 1, 4) : 0;
  check_context = "sparse " + std::to_string(inputs) + " -> " + std::to_string(outputs) +
                  ", blocks of " + std::to_string(s.pattern.block_rows) + ", lanes " +
                  std::to_string(s.lanes[0]) + " and " + std::to_string(s.lanes[1]) + ", kept " +
                  std::to_string(s.pattern.nonzeros());
  return s;
}

// Ordered by (block, input, output), each kept weight once.
void check_columns(const Sparse& s) {
  const ColumnPattern& p = s.pattern;
  CHECK(p.columns == s.inputs && p.rows == s.outputs);
  CHECK(p.start.size() == std::size_t(p.blocks()) * s.inputs + 1);
  CHECK(p.blocks() * p.block_rows >= s.outputs && (p.blocks() - 1) * p.block_rows < s.outputs);
  std::uint32_t k = 0;
  for (int block = 0; block < p.blocks(); ++block) {
    for (int i = 0; i < s.inputs; ++i) {
      CHECK(p.start[std::size_t(block) * s.inputs + i] == k);
      const int first = block * p.block_rows, last = std::min(first + p.block_rows, s.outputs);
      for (int o = first; o < last; ++o)
        if (s.kept[std::size_t(o) * s.inputs + i]) CHECK(p.row[k++] == o - first);
    }
  }
  CHECK(k == p.nonzeros() && p.start.back() == k);
}

// Both panels of one array.
struct Panels {
  Floats first, second;
  Panels(const Sparse& s, int rows, Random& random)
      : first(random_floats(std::size_t(rows) * s.lanes[0], random)),
        second(random_floats(std::size_t(rows) * s.lanes[1], random)) {}
};

void check_scatter(const Sparse& s, Random& random) {
  const Floats value = random_floats(s.pattern.nonzeros(), random);
  const Panels in(s, s.inputs, random), before(s, s.outputs, random);
  const int block = pick(random, -1, s.pattern.blocks() - 1);  // -1: all
  auto run = [&](const Kernels& kernels, Panels& out) {
    const ColumnArgs args = {&s.pattern,
                             value.data(),
                             s.panels,
                             {s.lanes[0], s.lanes[1]},
                             {in.first.data(), s.panels == 2 ? in.second.data() : nullptr},
                             {nullptr, nullptr},
                             {out.first.data(), s.panels == 2 ? out.second.data() : nullptr}};
    for (int b = 0; b < s.pattern.blocks(); ++b)
      if (block < 0 || b == block) kernels.scatter(args, b);
  };
  Panels want = before;
  run(reference_kernels(), want);
  for (const Kernels* kernels : available_kernels()) {
    Panels got = before;
    run(*kernels, got);
    auto in_block = [&](std::size_t row) {
      return block < 0 || int(row) / s.pattern.block_rows == block;
    };
    check_result(got.first, want.first, before.first,
                 [&](std::size_t i) { return in_block(i / s.lanes[0]); });
    check_result(got.second, want.second, before.second,
                 [&](std::size_t i) { return in_block(i / s.lanes[1]); });
  }
}

void check_column_backward(const Sparse& s, Random& random) {
  const ColumnPattern& p = s.pattern;
  const Floats value = random_floats(p.nonzeros(), random);
  const Panels in(s, s.inputs, random), grad(s, s.outputs, random), before(s, s.inputs, random);
  const Floats before_value = random_floats(p.nonzeros(), random);
  const bool with_inputs = toss(random, 0.7);
  const int begin = toss(random) ? 0 : pick(random, 0, s.inputs);
  const int end = toss(random) ? s.inputs : pick(random, begin, s.inputs);
  const std::vector<int> cuts = random_cuts(begin, end, random);
  auto run = [&](const Kernels& kernels, Panels& out, Floats& grad_value,
                 const std::vector<int>& ends) {
    const bool two = s.panels == 2;
    const ColumnArgs args = {&p,
                             value.data(),
                             s.panels,
                             {s.lanes[0], s.lanes[1]},
                             {in.first.data(), two ? in.second.data() : nullptr},
                             {grad.first.data(), two ? grad.second.data() : nullptr},
                             {with_inputs ? out.first.data() : nullptr,
                              with_inputs && two ? out.second.data() : nullptr}};
    for (int b = 0; b < p.blocks(); ++b)
      for (std::size_t i = 1; i < ends.size(); ++i)
        kernels.column_backward(
            args, b, ends[i - 1], ends[i],
            grad_value.data() + p.start[std::size_t(b) * s.inputs + ends[i - 1]]);
  };
  std::vector<bool> written(p.nonzeros(), false);
  for (int b = 0; b < p.blocks(); ++b)
    for (int i = begin; i < end; ++i)
      for (std::uint32_t k = p.start[b * s.inputs + i]; k < p.start[b * s.inputs + i + 1]; ++k)
        written[k] = true;
  auto input_written = [&](std::size_t i) {
    return with_inputs && int(i) >= begin && int(i) < end;
  };
  Panels want = before;
  Floats want_value = before_value;
  run(reference_kernels(), want, want_value, {begin, end});
  for (const Kernels* kernels : available_kernels()) {
    Panels whole = before, parts = before;
    Floats whole_value = before_value, parts_value = before_value;
    run(*kernels, whole, whole_value, {begin, end});
    run(*kernels, parts, parts_value, cuts);
    check_result(whole_value, want_value, before_value, [&](std::size_t i) { return written[i]; });
    check_result(whole.first, want.first, before.first,
                 [&](std::size_t i) { return input_written(i / s.lanes[0]); });
    check_result(whole.second, want.second, before.second,
                 [&](std::size_t i) { return input_written(i / s.lanes[1]); });
    CHECK(whole_value.same_bits(parts_value));
    if (with_inputs) {  // `collect` is the half of it that makes the columns
      Panels collected = before;
      const bool two = s.panels == 2;
      const ColumnArgs args = {&p,
                               value.data(),
                               s.panels,
                               {s.lanes[0], s.lanes[1]},
                               {nullptr, nullptr},
                               {grad.first.data(), two ? grad.second.data() : nullptr},
                               {collected.first.data(), two ? collected.second.data() : nullptr}};
      for (int b = 0; b < p.blocks(); ++b) kernels->collect(args, b, begin, end);
      CHECK(collected.first.same_bits(whole.first) && collected.second.same_bits(whole.second));
    }
    CHECK(whole.first.same_bits(parts.first) && whole.second.same_bits(parts.second));
  }
}

// W = [[2, 0], [0, -3], [4, 5]], blocks of two rows, four lanes that differ by factors.
void check_sparse_by_hand() {
  check_context = "sparse by hand";
  const std::uint8_t kept[] = {1, 0, 0, 1, 1, 1};
  const ColumnPattern pattern = build_columns(kept, 3, 2, 2, 1, 2);
  CHECK((pattern.start == std::vector<std::uint32_t>{0, 1, 2, 3, 4}));
  CHECK((pattern.row == std::vector<std::uint16_t>{0, 1, 0, 0}));
  const float value[] = {2, -3, 4, 5}, factor[] = {1, 10, 100, 1000};
  float in[8], grad[12], out[12], grad_in[8], grad_value[4] = {0, 0, 0, 0};
  for (const Kernels* kernels : available_kernels()) {
    for (int i = 0; i < 8; ++i) in[i] = (i / 4 ? 7 : 1) * factor[i % 4], grad_in[i] = 0;
    for (int i = 0; i < 12; ++i) out[i] = 0.5f, grad[i] = float(i / 4 + 1);
    for (float& g : grad_value) g = 0;
    const ColumnArgs forward = {&pattern,           value,         1, {4, 0}, {in, nullptr},
                                {nullptr, nullptr}, {out, nullptr}};
    const ColumnArgs backward = {
        &pattern, value, 1, {4, 0}, {in, nullptr}, {grad, nullptr}, {grad_in, nullptr}};
    for (int block = 0; block < 2; ++block) {
      kernels->scatter(forward, block);
      kernels->column_backward(backward, block, 0, 2, grad_value + 2 * block);
    }
    for (int lane = 0; lane < 4; ++lane) {
      CHECK(out[lane] == 2 * factor[lane] + 0.5f);
      CHECK(out[4 + lane] == -21 * factor[lane] + 0.5f);
      CHECK(out[8 + lane] == 39 * factor[lane] + 0.5f);
      CHECK(grad_in[lane] == 1 * 2 + 3 * 4);
      CHECK(grad_in[4 + lane] == 2 * -3 + 3 * 5);
    }
    const int want[] = {1 * 1, 2 * 7, 3 * 1, 3 * 7};
    for (int k = 0; k < 4; ++k) CHECK(grad_value[k] == want[k] * 1111);
  }
}

// ---- Dense.

void check_dense(int batch, int inputs, int outputs, Random& random) {
  check_context = "dense, batch " + std::to_string(batch) + ", " + std::to_string(inputs) + " -> " +
                  std::to_string(outputs);
  const Floats x = random_floats(std::size_t(batch) * inputs, random);
  const Floats w = random_floats(std::size_t(outputs) * inputs, random);
  const Floats grad = random_floats(std::size_t(outputs) * batch, random);
  const Floats bias = random_floats(outputs, random);
  const bool biased = toss(random);
  const int begin = pick(random, 0, outputs - 1), end = pick(random, begin, outputs);
  const int left = pick(random, 0, inputs - 1), right = pick(random, left, inputs);
  const std::vector<int> rows = random_cuts(begin, end, random);
  const std::vector<int> columns = random_cuts(left, right, random);
  auto forward = [&](const Kernels& k, Floats& y, int from, int to) {
    k.dense_forward(x.data(), w.data(), biased ? bias.data() : nullptr, y.data(), batch, inputs,
                    outputs, from, to);
  };
  auto backward = [&](const Kernels& k, Floats& grad_x, int row, int row_end, int from, int to) {
    k.dense_backward(grad.data(), w.data(), grad_x.data(), batch, inputs, row, row_end, from, to);
  };
  auto gradient = [&](const Kernels& k, float* out, int row, int count, int from, int to) {
    k.dense_grad(grad.data(), x.data(), out, batch, inputs, row, count, from, to);
  };
  const Floats before_y = random_floats(std::size_t(batch) * outputs, random);
  const Floats before_x = random_floats(std::size_t(batch) * inputs, random);
  const std::size_t width = right - left;
  const Floats before_w((end - begin) * width);
  Floats want_y = before_y, want_x = before_x, want_w = before_w;
  forward(reference_kernels(), want_y, begin, end);
  backward(reference_kernels(), want_x, begin, end, left, right);
  gradient(reference_kernels(), want_w.data(), begin, end - begin, left, right);
  for (const Kernels* kernels : available_kernels()) {
    Floats y = before_y, grad_x = before_x, grad_w = before_w;
    forward(*kernels, y, begin, end);
    backward(*kernels, grad_x, begin, end, left, right);
    gradient(*kernels, grad_w.data(), begin, end - begin, left, right);
    check_result(y, want_y, before_y, [&](std::size_t i) {
      return int(i % outputs) >= begin && int(i % outputs) < end;
    });
    check_result(grad_x, want_x, before_x,
                 [&](std::size_t i) { return int(i % inputs) >= left && int(i % inputs) < right; });
    check_result(grad_w, want_w, before_w, [](std::size_t) { return true; });
    Floats parts_y = before_y, parts_x = before_x;
    for (std::size_t r = 1; r < rows.size(); ++r) {
      forward(*kernels, parts_y, rows[r - 1], rows[r]);
      for (std::size_t c = 1; c < columns.size(); ++c) {
        backward(*kernels, parts_x, rows[r - 1], rows[r], columns[c - 1], columns[c]);
        const int high = rows[r] - rows[r - 1], wide = columns[c] - columns[c - 1];
        Floats part(std::size_t(high) * wide);
        gradient(*kernels, part.data(), rows[r - 1], high, columns[c - 1], columns[c]);
        bool same = true;
        for (int i = 0; i < high * wide; ++i)
          same &=
              part[i] ==
              grad_w[(rows[r - 1] - begin + i / wide) * width + columns[c - 1] - left + i % wide];
        CHECK(same && part.intact());
      }
    }
    CHECK(y.same_bits(parts_y));
    CHECK(grad_x.same_bits(parts_x));
  }
}

// W = [[1, 2, 3], [4, 5, 6]], X = [[1, 0, 2], [0, 1, 3]], b = [0.5, -1], dY = [[1, 3], [2, 4]].
void check_dense_by_hand() {
  check_context = "dense by hand";
  const float w[] = {1, 2, 3, 4, 5, 6}, x[] = {1, 0, 2, 0, 1, 3}, bias[] = {0.5f, -1};
  const float grad[] = {1, 2, 3, 4};  // transposed
  const float y[] = {7.5f, 15, 11.5f, 22};
  const float grad_x[] = {13.5f, 17.5f, 21.5f, 18.5f, 24.5f, 30.5f};  // half of it was there
  const float grad_w[] = {1, 2, 8, 3, 4, 18};
  for (const Kernels* kernels : available_kernels()) {
    float got_y[4], got_x[6], got_w[6];
    for (float& value : got_x) value = 0.5f;
    kernels->dense_forward(x, w, bias, got_y, 2, 3, 2, 0, 2);
    kernels->dense_backward(grad, w, got_x, 2, 3, 0, 2, 0, 3);
    kernels->dense_grad(grad, x, got_w, 2, 3, 0, 2, 0, 3);
    for (int i = 0; i < 4; ++i) CHECK(got_y[i] == y[i]);
    for (int i = 0; i < 6; ++i) CHECK(got_x[i] == grad_x[i] && got_w[i] == grad_w[i]);
  }
}

}  // namespace
}  // namespace fedlean

int main() {
  using namespace fedlean;
  Random random(3);
  check_sparse_by_hand();
  for (int i = 0; i < 500; ++i) {
    const Sparse s = random_sparse(random);
    check_columns(s);
    check_scatter(s, random);
    check_column_backward(s, random);
  }
  check_dense_by_hand();
  for (int batch = 1; batch <= 64; ++batch)
    for (int i = 0; i < 5; ++i)
      check_dense(batch, pick(random, 1, i ? 70 : 300), pick(random, 1, 30), random);
  return finish();
}

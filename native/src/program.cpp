#include "fedlean/program.h"

#include <algorithm>
#include <cstring>

namespace fedlean {

namespace {

bool keeps_values(Kind kind) { return kind == Kind::kFlatten; }
bool may_share(Kind kind) {
  return kind == Kind::kReLU || kind == Kind::kAdd || kind == Kind::kScaler ||
         kind == Kind::kDropout || kind == Kind::kFlatten;
}

std::vector<int> count_readers(const Network& network) {
  std::vector<int> readers(network.nodes.size() + 1, 0);
  for (const Node& node : network.nodes)
    for (int input : node.inputs) ++readers[input + 1];
  return readers;
}

// Per tensor, whether the output, a tap, or statistics that move depend on it.
std::vector<bool> needed(const Network& network, const std::vector<std::unique_ptr<Layer>>& layers,
                         const Mode& mode) {
  const std::size_t n = network.nodes.size();
  std::vector<bool> tensors(n + 1, false);
  tensors[n] = true;
  for (int node : mode.taps) tensors[node + 1] = true;
  for (std::size_t i = n; i-- > 0;) {
    if (mode.training && layers[i]->mixes_examples()) tensors[i + 1] = true;
    if (!tensors[i + 1]) continue;
    for (int input : network.nodes[i].inputs) tensors[input + 1] = true;
  }
  return tensors;
}

}  // namespace

Structure::Structure(const Network& network, const std::vector<bool>& trainable_nodes) {
  const std::size_t n = network.nodes.size();
  value_halo.assign(n + 1, {});
  grad_halo.assign(n + 1, {});
  needs_grad.assign(n + 1, false);
  const std::vector<int> readers = count_readers(network);
  for (std::size_t i = 0; i < n; ++i) {
    const Node& node = network.nodes[i];
    bool inputs_need = false;
    for (int input : node.inputs) inputs_need = inputs_need || needs_grad[input + 1];
    needs_grad[i + 1] = trainable_nodes[i] || inputs_need;
    if (node.kind != Kind::kConv2d) continue;
    Sides& halo = value_halo[node.inputs[0] + 1];
    halo = larger(halo, input_halo(node));
    if (inputs_need) grad_halo[i + 1] = gradient_halo(node, network.shape_of(node.inputs[0]));
  }
  // Tensors that could share memory get the same halo.
  for (std::size_t i = n; i-- > 0;) {
    const Node& node = network.nodes[i];
    if (!may_share(node.kind) || keeps_values(node.kind)) continue;
    Sides& halo = value_halo[node.inputs[0] + 1];
    if (readers[node.inputs[0] + 1] == 1) halo = larger(halo, value_halo[i + 1]);
  }
  for (std::size_t i = 0; i < n; ++i) {
    const Node& node = network.nodes[i];
    if (!may_share(node.kind) || keeps_values(node.kind)) continue;
    if (readers[node.inputs[0] + 1] == 1)
      grad_halo[i + 1] = larger(grad_halo[i + 1], grad_halo[node.inputs[0] + 1]);
  }
}

Program::Program(const Network& network, const std::vector<std::unique_ptr<Layer>>& layers,
                 const Structure& structure, const Mode& mode)
    : structure_(structure), training_(mode.training), group_panels_(mode.group_panels) {
  wire(network, layers, needed(network, layers, mode));
  for (int node : mode.taps) {
    tensors_[node + 1].tapped = true;
    tensors_[node + 1].seed = mode.training && tensors_[node + 1].needs_grad;
  }
  tensors_[output_].tapped = true;
  tensors_[output_].seed = mode.training && tensors_[output_].needs_grad;
  swap_relu_and_pool();
  producer_.assign(tensors_.size(), -1);
  for (std::size_t i = 0; i < steps_.size(); ++i) producer_[steps_[i].output] = int(i);
  find_region();
  share_values();
  if (mode.training) share_gradients();
  lay_out(mode);
}

void Program::wire(const Network& network, const std::vector<std::unique_ptr<Layer>>& layers,
                   const std::vector<bool>& needed) {
  const std::size_t n = network.nodes.size();
  tensors_.resize(n + 1);
  for (std::size_t t = 0; t <= n; ++t) {
    const Shape& shape = network.shape_of(int(t) - 1);
    tensors_[t].value_layout = {shape, structure_.value_halo[t]};
    tensors_[t].grad_layout = {shape, structure_.grad_halo[t]};
    tensors_[t].needs_grad = training_ && structure_.needs_grad[t];
  }
  for (std::size_t i = 0; i < n; ++i) {
    if (!needed[i + 1]) {  // a branch that ends in nothing
      if (tensors_[i + 1].needs_grad) unreached_.push_back(layers[i].get());
      continue;
    }
    Step step;
    step.layer = layers[i].get();
    for (int input : network.nodes[i].inputs) {
      step.inputs.push_back(input + 1);
      ++tensors_[input + 1].readers;
    }
    step.output = int(i) + 1;
    step.node = int(i);
    step.backward = tensors_[step.output].needs_grad;
    step.training = training_;
    steps_.push_back(step);
  }
  output_ = int(n);
}

// max(relu(x)) = relu(max(x)), gradients included: the ReLU then works on the pooled image, and the
// convolution's output is free once it is pooled.
void Program::swap_relu_and_pool() {
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    Step& relu = steps_[i];
    if (relu.layer->node.kind != Kind::kReLU || tensors_[relu.output].tapped ||
        tensors_[relu.output].readers != 1)
      continue;
    std::size_t j = i + 1;
    while (std::find(steps_[j].inputs.begin(), steps_[j].inputs.end(), relu.output) ==
           steps_[j].inputs.end())
      ++j;
    Step& pool = steps_[j];
    if (pool.layer->node.kind != Kind::kMaxPool) continue;
    // The pool now reads what the ReLU read; the ReLU makes the tensor that the pool made.
    const int between = relu.output;
    pool.inputs[0] = relu.inputs[0];
    relu.inputs[0] = between;
    relu.output = pool.output;
    pool.output = between;
    Tensor& tensor = tensors_[between];
    tensor.value_layout = tensors_[relu.output].value_layout;
    tensor.grad_layout = tensors_[relu.output].grad_layout = {tensor.value_layout.shape, {}};
    std::rotate(steps_.begin() + i, steps_.begin() + i + 1, steps_.begin() + j + 1);
    --i;  // another step is here now
  }
}

// The longest beginning that keeps nothing for backward and treats examples apart.
void Program::find_region() {
  while (region_ < steps_.size()) {
    const Step& step = steps_[region_];
    if (step.backward || (training_ && step.layer->mixes_examples())) break;
    ++region_;
  }
  std::vector<bool> leaves(tensors_.size(), false);
  for (std::size_t i = region_; i < steps_.size(); ++i)
    for (int input : steps_[i].inputs) leaves[input] = true;
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    const bool inside = t == 0 ? region_ > 0 : producer_[t] < int(region_);
    tensors_[t].local = inside && !leaves[t] && !tensors_[t].tapped;
  }
  for (std::size_t i = 0; i < region_; ++i) steps_[i].training = false;
}

// May the step write its output over that input?  Nobody else may need the value again.
bool Program::overwritable(const Step& step, int slot) const {
  int tensor = step.inputs[slot];
  const bool keeps = keeps_values(step.layer->node.kind);
  if (tensors_[tensor].readers != 1 || tensors_[tensor].tapped) return false;
  const bool saved = training_ && step.training;
  while (!keeps && saved && producer_[tensor] >= 0) {
    const Step& maker = steps_[producer_[tensor]];
    if (maker.layer->reads_output()) return false;
    if (!keeps_values(maker.layer->node.kind)) break;
    tensor = maker.inputs[0];  // the same memory, if it was shared
    if (tensors_[tensor].readers != 1 || tensors_[tensor].tapped) return false;
  }
  return true;
}

void Program::share_values() {
  for (Step& step : steps_) {
    Tensor& out = tensors_[step.output];
    const Tensor& in = tensors_[step.inputs[0]];
    const Kind kind = step.layer->node.kind;
    const bool elementwise = may_share(kind) || (!step.training && kind == Kind::kCurve);
    const bool fits = kind == Kind::kFlatten ? in.value_layout.bare() && out.value_layout.bare()
                                             : in.value_layout.halo == out.value_layout.halo;
    if (elementwise && fits && in.local == out.local && step.inputs[0] != 0 &&
        overwritable(step, 0))
      out.value_array = -2 - step.inputs[0];  // resolved in lay_out
    step.clear_out = out.value_array == -1 && !out.value_layout.bare();
  }
}

void Program::share_gradients() {
  std::vector<bool> written(tensors_.size(), false);
  for (std::size_t t = 0; t < tensors_.size(); ++t) written[t] = tensors_[t].seed;
  for (std::size_t i = steps_.size(); i-- > 0;) {
    Step& step = steps_[i];
    step.accumulate.assign(step.inputs.size(), false);
    step.clear_grad.assign(step.inputs.size(), false);
    if (step.backward && !written[step.output]) {
      unreached_.push_back(step.layer);
      step.backward = false;
    }
    if (!step.backward) continue;
    bool shared = false;
    for (std::size_t slot = 0; slot < step.inputs.size(); ++slot) {
      const int t = step.inputs[slot];
      Tensor& in = tensors_[t];
      const Tensor& out = tensors_[step.output];
      if (!in.needs_grad) continue;
      step.accumulate[slot] = written[t];
      const bool flat = step.layer->node.kind == Kind::kFlatten;
      const bool fits = flat ? in.grad_layout.bare() && out.grad_layout.bare()
                             : in.grad_layout.halo == out.grad_layout.halo;
      if (!shared && !written[t] && in.readers == 1 && !in.seed && fits && step.layer->in_place()) {
        in.grad_array = -2 - step.output;
        shared = true;
      } else if (!written[t]) {
        step.clear_grad[slot] = !in.grad_layout.bare();
      }
      written[t] = true;
    }
  }
}

Situation Program::situation(const Step& step, const Mode& mode, bool local) const {
  Situation s;
  const Batch batch{mode.examples};
  s.panels = local ? std::min(group_panels_, batch.panels()) : batch.panels();
  s.examples = std::min(mode.examples, s.panels * kPanelLanes);
  s.lanes = std::min(batch.padded(), s.panels * kPanelLanes);
  s.training = step.training && step.backward;
  s.dense_rows = mode.dense_rows.empty() ? 0 : mode.dense_rows[step.node];
  s.needs_grad_in = false;
  for (int input : step.inputs) s.needs_grad_in = s.needs_grad_in || tensors_[input].needs_grad;
  s.threads = mode.threads;
  return s;
}

void Program::lay_out(const Mode& mode) {
  const int end_of_region = int(region_) - 1, loss_time = int(steps_.size());
  const Batch batch{mode.examples};
  auto lanes_of = [&](const Tensor& t) {
    return t.local ? std::min(batch.padded(), group_panels_ * kPanelLanes) : batch.padded();
  };
  // Values, in the order in which they are made.
  auto add_value = [&](int t, int time) {
    Tensor& tensor = tensors_[t];
    const bool in_region = time < int(region_);
    const int first = in_region && !tensor.local ? 0 : time;
    if (tensor.value_array <= -2) {
      tensor.value_array = tensors_[-2 - tensor.value_array].value_array;
      plan_.extend(tensor.value_array, first, time);
    } else {
      tensor.value_array = plan_.add(tensor.value_layout.pixels() * lanes_of(tensor), first, time);
    }
  };
  add_value(0, 0);
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    Step& step = steps_[i];
    add_value(step.output, forward_time(i));
    for (int t : step.inputs)
      plan_.extend(tensors_[t].value_array, forward_time(i), forward_time(i));
    if (i < region_)
      for (int t : step.inputs)
        if (!tensors_[t].local) plan_.extend(tensors_[t].value_array, 0, end_of_region);
    if (!step.backward) continue;
    const int time = backward_time(i);
    if (step.layer->reads_input())
      for (int t : step.inputs) plan_.extend(tensors_[t].value_array, time, time);
    if (step.layer->reads_output()) plan_.extend(tensors_[step.output].value_array, time, time);
  }
  if (region_ > 0) {  // read again by every group
    const Tensor& input = tensors_[0];
    if (!input.local) plan_.extend(input.value_array, 0, end_of_region);
  }
  for (const Tensor& t : tensors_)
    if (t.tapped) plan_.extend(t.value_array, loss_time, training_ ? backward_time(0) : loss_time);
  // Gradients, in the order in which backward comes to them.
  for (std::size_t i = steps_.size(); training_ && i-- > 0;) {
    Step& step = steps_[i];
    if (!step.backward) continue;
    const int time = backward_time(i);
    Tensor& out = tensors_[step.output];
    const std::size_t floats = out.grad_layout.pixels() * batch.padded();
    if (out.grad_array == -1) out.grad_array = plan_.add(floats, out.seed ? loss_time : time, time);
    plan_.extend(out.grad_array, out.seed ? loss_time : time, time);
    for (int t : step.inputs) {
      Tensor& in = tensors_[t];
      if (!in.needs_grad) continue;
      if (in.grad_array <= -2) in.grad_array = out.grad_array;
      if (in.grad_array == -1)
        in.grad_array = plan_.add(in.grad_layout.pixels() * batch.padded(), time, time);
      plan_.extend(in.grad_array, in.seed ? loss_time : time, time);
    }
  }
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    Step& step = steps_[i];
    const Situation at = situation(step, mode, i < region_);
    const Needs needs = step.layer->needs(at);
    step.dense_gradient = at.dense_rows > 0;
    const int forward = forward_time(i), backward = backward_time(i);
    step.forward_scratch = plan_.add(needs.forward_scratch, forward, forward);
    if (mode.moved) step.moved = plan_.add(MovedLayer::floats(*step.layer), forward, forward);
    if (!step.backward) continue;
    step.saved = plan_.add(needs.saved, forward, backward);
    step.backward_scratch = plan_.add(needs.backward_scratch, backward, backward);
  }
  plan_.place();
}

View Program::view(float* arena, int array, const Layout& layout, int first_panel) const {
  View v;
  v.data = arena + plan_.offset(array);
  v.layout = layout;
  v.first_panel = first_panel;
  return v;
}

View Program::value(float* arena, int tensor) const {
  return view(arena, tensors_[tensor].value_array, tensors_[tensor].value_layout, 0);
}

View Program::gradient(float* arena, int tensor) const {
  if (tensors_[tensor].grad_array < 0) return {};
  return view(arena, tensors_[tensor].grad_array, tensors_[tensor].grad_layout, 0);
}

Pass Program::pass_of(const Step& step, const Kernels& kernels, ThreadPool& pool, float* arena,
                      Batch batch, int panel_begin, int panel_end) const {
  Pass pass{kernels,
            pool,
            batch,
            panel_begin,
            panel_end,
            step.training,
            step.dense_gradient,
            {},
            {},
            nullptr,
            nullptr,
            {},
            {},
            {},
            {}};
  auto value_of = [&](int t) {
    const Tensor& tensor = tensors_[t];
    return view(arena, tensor.value_array, tensor.value_layout, tensor.local ? panel_begin : 0);
  };
  pass.in_training = training_;
  for (int t : step.inputs) pass.in.push_back(value_of(t));
  pass.out = value_of(step.output);
  if (step.saved >= 0) pass.saved = arena + plan_.offset(step.saved);
  return pass;
}

// (examples, F) -> panels.
void Program::pack_vectors(const Pass& pass, const float* x) const {
  const std::size_t width = pass.out.layout.shape.channels;
  pass.split(int(width), [&](int, int begin, int end) {
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      const int lanes = pass.lanes(p), used = pass.batch.used(p);
      const float* rows[kPanelLanes] = {};
      for (int l = 0; l < lanes; ++l)
        rows[l] = x + (std::size_t(p) * kPanelLanes + std::min(l, used - 1)) * width + begin;
      pass.kernels.interleave(rows, pass.out.panel(p) + std::size_t(begin) * lanes, lanes,
                              end - begin);
    }
  });
}

// (examples, C, H, W) -> panels.
void Program::pack(const Pass& pass, const float* x) const {
  const View& v = pass.out;
  const Shape& s = v.layout.shape;
  clear_halo(pass, v);
  const std::size_t plane = std::size_t(s.height) * s.width;
  if (v.layout.plane() == 1) return pack_vectors(pass, x);
  pass.split(s.channels, [&](int, int begin, int end) {
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      const int lanes = pass.lanes(p), used = pass.batch.used(p);
      const float* const from = x + std::size_t(p) * kPanelLanes * s.size();
      const float* rows[kPanelLanes] = {};
      for (int c = begin; c < end; ++c) {
        for (int y = 0; y < s.height; ++y) {
          float* const to = v.interior(p, lanes) +
                            (std::size_t(c) * v.layout.plane() + y * v.layout.row()) * lanes;
          for (int l = 0; l < lanes; ++l)
            rows[l] =
                from + std::min(l, used - 1) * s.size() + c * plane + std::size_t(y) * s.width;
          pass.kernels.interleave(rows, to, lanes, s.width);
        }
      }
    }
  });
}

void Program::forward(const Kernels& kernels, ThreadPool& pool, float* arena, const float* x,
                      Batch batch, const Direction* direction) const {
  auto input_pass = [&](int begin, int end) {
    Pass pass{kernels, pool,    batch,   begin, end, false, false, {},
              {},      nullptr, nullptr, {},    {},  {},    {}};
    pass.out = view(arena, tensors_[0].value_array, tensors_[0].value_layout,
                    tensors_[0].local ? begin : 0);
    return pass;
  };
  auto run = [&](const Step& step, int begin, int end) {
    Pass pass = pass_of(step, kernels, pool, arena, batch, begin, end);
    pass.scratch = arena + plan_.offset(step.forward_scratch);
    if (step.clear_out) clear_halo(pass, pass.out);
    pass.out_end = step.layer->node.shape.channels;
    if (!direction || !step.layer->any_trainable()) return step.layer->forward(pass);
    MovedLayer moved(*step.layer, *direction, step.node, arena + plan_.offset(step.moved));
    for (const int all = pass.out_end; pass.out_begin < all; pass.out_begin = pass.out_end) {
      pass.out_end = moved.make(pass.out_begin, pass.moved);
      step.layer->forward(pass);
    }
  };
  if (!tensors_[0].local) pack(input_pass(0, batch.panels()), x);
  for (int begin = 0; region_ > 0 && begin < batch.panels(); begin += group_panels_) {
    const int end = std::min(begin + group_panels_, batch.panels());
    if (tensors_[0].local) pack(input_pass(begin, end), x);
    for (std::size_t i = 0; i < region_; ++i) run(steps_[i], begin, end);
  }
  for (std::size_t i = region_; i < steps_.size(); ++i) run(steps_[i], 0, batch.panels());
}

void Program::clear_seeds(const Kernels& kernels, ThreadPool& pool, float* arena,
                          Batch batch) const {
  const Pass pass{kernels, pool, batch, 0, batch.panels(), false, false, {}, {}, nullptr, nullptr,
                  {},      {},   {},    {}};
  for (std::size_t t = 0; t < tensors_.size(); ++t)
    if (tensors_[t].seed) clear(pass, gradient(arena, int(t)));
}

void Program::backward(const Kernels& kernels, ThreadPool& pool, float* arena, Batch batch,
                       const Sink& sink) const {
  for (std::size_t i = steps_.size(); i-- > 0;) {
    const Step& step = steps_[i];
    if (!step.backward) continue;
    Pass pass = pass_of(step, kernels, pool, arena, batch, 0, batch.panels());
    pass.scratch = arena + plan_.offset(step.backward_scratch);
    pass.grad_out = gradient(arena, step.output);
    pass.accumulate = step.accumulate;
    pass.sink = sink;
    for (std::size_t slot = 0; slot < step.inputs.size(); ++slot) {
      const Tensor& in = tensors_[step.inputs[slot]];
      pass.grad_in.push_back(in.needs_grad ? gradient(arena, step.inputs[slot]) : View{});
      if (step.clear_grad[slot]) clear_halo(pass, pass.grad_in.back());
    }
    step.layer->backward(pass);
  }
}

}  // namespace fedlean

// fedlean._native: the engine for Python.  Arrays are NumPy's, C-contiguous and of the exact type
// (nothing is converted silently); fedlean.engine.native checks shapes and values beforehand.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <stdexcept>

#include "fedlean/session.h"

namespace nb = nanobind;
using namespace fedlean;

namespace {

template <typename T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

void expect_size(const char* what, std::size_t got, std::size_t expected) {
  if (got != expected)
    throw std::invalid_argument(std::string(what) + " has " + std::to_string(got) +
                                " elements, expected " + std::to_string(expected));
}

template <typename T>
bool aligned(const In<T>& array) {
  return reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0;
}

Kind kind_of(const std::string& name) {
  static const std::pair<const char*, Kind> kinds[] = {
      {"Linear", Kind::kLinear},
      {"Conv2d", Kind::kConv2d},
      {"MaxPool2d", Kind::kMaxPool},
      {"AvgPool2d", Kind::kAvgPool},
      {"GlobalAvgPool", Kind::kGlobalAvgPool},
      {"GroupNorm", Kind::kGroupNorm},
      {"BatchNorm", Kind::kBatchNorm},
      {"ReLU", Kind::kReLU},
      {"Hardswish", Kind::kHardswish},
      {"Hardsigmoid", Kind::kHardsigmoid},
      {"Flatten", Kind::kFlatten},
      {"Add", Kind::kAdd},
      {"Scale", Kind::kScale},
  };
  for (const auto& [known, kind] : kinds)
    if (name == known) return kind;
  throw std::invalid_argument("the native engine has no layer " + name);
}

Shape shape_of(const std::vector<int>& s) {
  if (s.empty() || s.size() == 2 || s.size() > 3)
    throw std::invalid_argument("shapes are (C, H, W) or (F,)");
  return s.size() == 1 ? Shape{s[0], 1, 1} : Shape{s[0], s[1], s[2]};
}

// Session with the sizes of what Python passes checked: a wrong call must never corrupt memory.
class Bound {
  // Runs f while nothing else uses the engine, without holding Python's lock.
  template <typename F>
  auto alone(F&& f) const {
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(engine_->busy);
    return f();
  }

public:
  Bound(std::shared_ptr<Engine> engine, const Network& network, const Options& options,
        int input_rank)
      : engine_(engine),
        network_(network),
        options_(options),
        input_rank_(input_rank),
        session_(std::move(engine), network, options) {
    for (int i = 0; i < int(network.nodes.size()); ++i) {
      bool empty = true;
      for (int slot = 0; slot < kSlots; ++slot)
        empty = empty && session_.tensor_size(i, Slot(slot)) == 0;
      built_.push_back(empty);
    }
  }

  std::size_t planned_bytes(bool importance) const { return session_.planned_bytes(importance); }
  std::size_t held_bytes() const { return session_.held_bytes(); }

  void build(int node, const std::vector<nb::object>& masks) {
    check(node, 0);
    if (built_[node]) throw std::invalid_argument("a node is built once");
    expect_size("masks", masks.size(), kSlots);
    const std::uint8_t* pointers[kSlots] = {};
    for (int s = 0; s < kSlots; ++s) {
      if (masks[s].is_none() != (options_.tensors[node].kept[s] < 0))
        throw std::invalid_argument("masks are not those that were planned");
      if (masks[s].is_none()) continue;
      const auto mask = nb::cast<In<bool>>(masks[s]);
      expect_size("mask", mask.size(), session_.tensor_size(node, Slot(s)));
      pointers[s] = reinterpret_cast<const std::uint8_t*>(mask.data());
      const std::int64_t kept = count_kept(pointers[s], mask.size());
      if (kept != options_.tensors[node].kept[s])
        throw std::invalid_argument("mask keeps another number of coordinates than was planned");
    }
    alone([&] { session_.build(node, pointers); });
    built_[node] = true;
  }
  void reset() {
    alone([&] {
      tapped_.clear();
      session_.reset();
    });
  }
  void load(int node, int slot, In<float> values, bool packed, bool reference) {
    check_built(node);
    expect_size("tensor", values.size(), size(node, slot, packed));
    alone([&] { session_.load(node, Slot(slot), values.data(), packed, reference); });
  }
  void read(int node, int slot, Out<float> values, bool packed) const {
    check_built(node);
    expect_size("tensor", values.size(), size(node, slot, packed));
    alone([&] { session_.read(node, Slot(slot), values.data(), packed); });
  }

  // Of a tensor that was built with a mask.
  void read_mask(int node, int slot, Out<bool> kept) const {
    expect_size("mask", kept.size(), size(node, slot, false));
    check_built(node);
    if (options_.tensors[node].kept[slot] < 0) throw std::invalid_argument("there is no mask");
    alone([&] {
      session_.read_mask(node, Slot(slot), reinterpret_cast<std::uint8_t*>(kept.data()));
    });
  }

  double step(In<float> x, In<std::int64_t> y, bool importance) {
    const int examples = check_batch(x, &y);
    return alone([&] {
      tapped_.clear();
      return session_.step(x.data(), y.data(), examples, importance);
    });
  }
  double loss(In<float> x, In<std::int64_t> y) {
    const int examples = check_batch(x, &y);
    return alone([&] {
      tapped_.clear();
      return session_.loss(x.data(), y.data(), examples);
    });
  }
  void squares(int node, int slot, Out<float> values) const {
    expect_size("tensor", values.size(), size(node, slot, false));
    alone([&] { session_.squares(node, Slot(slot), values.data()); });
  }

  void forward(In<float> x, const std::vector<int>& nodes, bool training) {
    const int examples = check_batch(x, nullptr);
    for (int node : nodes) check(node, 0);
    alone([&] {
      tapped_.clear();
      session_.forward(x.data(), examples, nodes, training);
      examples_ = examples;
      tapped_ = nodes;
      tapped_.push_back(int(network_.nodes.size()) - 1);
    });
  }
  void activation(int node, Out<float> values) const {
    alone([&] {
      check_tapped(node);
      expect_size("activation", values.size(), network_.nodes[node].shape.size() * examples_);
      session_.activation(node, values.data());
    });
  }
  void backward(const std::vector<int>& nodes, const std::vector<In<float>>& gradients,
                bool dense) {
    expect_size("gradients", gradients.size(), nodes.size());
    alone([&] {
      std::vector<const float*> pointers;
      for (std::size_t i = 0; i < nodes.size(); ++i) {
        check_tapped(nodes[i]);
        expect_size("gradient", gradients[i].size(),
                    network_.nodes[nodes[i]].shape.size() * examples_);
        pointers.push_back(gradients[i].data());
      }
      tapped_.clear();
      session_.backward(nodes, pointers, dense);
    });
  }
  void gradient(int node, int slot, Out<float> values, bool dense) const {
    expect_size("gradient", values.size(), size(node, slot, false));
    if (!session_.has_gradient(node, Slot(slot), dense))
      throw std::invalid_argument("there is no gradient: call backward first");
    alone([&] { session_.gradient(node, Slot(slot), values.data(), dense); });
  }
  void drop_gradients() {
    alone([&] { session_.drop_gradients(); });
  }
  void set_gradient(int node, int slot, In<float> values) {
    check_built(node);
    expect_size("gradient", values.size(), size(node, slot, false));
    alone([&] { session_.set_gradient(node, Slot(slot), values.data()); });
  }
  void apply(const std::vector<int>& nodes, const std::vector<int>& slots) {
    expect_size("slots", slots.size(), nodes.size());
    std::vector<std::pair<int, Slot>> tensors;
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      check(nodes[i], slots[i]);
      if (!session_.has_gradient(nodes[i], Slot(slots[i]), false))
        throw std::invalid_argument("there is no gradient: call set_gradient first");
      tensors.push_back({nodes[i], Slot(slots[i])});
    }
    alone([&] { session_.apply(tensors); });
  }

private:
  void check(int node, int slot) const {
    if (node < 0 || node >= int(network_.nodes.size()) || slot < 0 || slot >= kSlots)
      throw std::invalid_argument("no such tensor");
  }
  void check_built(int node) const {
    check(node, 0);
    if (!built_[node]) throw std::invalid_argument("the node is not built yet");
  }
  std::size_t size(int node, int slot, bool packed) const {
    check(node, slot);
    const std::int64_t kept = options_.tensors[node].kept[slot];
    return packed && kept >= 0 ? std::size_t(kept) : session_.tensor_size(node, Slot(slot));
  }
  void check_tapped(int node) const {
    for (int tapped : tapped_)
      if (tapped == node) return;
    throw std::invalid_argument("node was not tapped by the last forward");
  }
  // Everything that fedlean.engine.checks.check_batch refuses; that one words the errors.
  int check_batch(const In<float>& x, const In<std::int64_t>* y) const {
    for (int i = 0; i < int(built_.size()); ++i) check_built(i);
    const Shape& shape = network_.input;
    const std::size_t examples = x.ndim() ? x.shape(0) : 0;
    if (examples == 0 || examples > std::size_t(options_.batch_size))
      throw std::invalid_argument("x must have 1 to batch_size examples");
    const bool image = x.ndim() == 4 && int(x.shape(1)) == shape.channels &&
                       int(x.shape(2)) == shape.height && int(x.shape(3)) == shape.width;
    const bool vector =
        x.ndim() == 2 && shape.height * shape.width == 1 && int(x.shape(1)) == shape.channels;
    if (!(input_rank_ == 3 ? image : vector)) throw std::invalid_argument("x has another shape");
    if (!aligned(x) || (y && !aligned(*y))) throw std::invalid_argument("an array is not aligned");
    if (!engine_->kernels.all_finite(x.data(), x.size()))
      throw std::invalid_argument("x holds NaN or infinity");
    if (!y) return int(examples);
    if (y->ndim() != 1 || y->size() != examples) throw std::invalid_argument("y has another shape");
    if (network_.nodes.back().shape.height * network_.nodes.back().shape.width != 1)
      throw std::invalid_argument("a loss needs one logit per class");
    const std::int64_t classes = network_.nodes.back().shape.channels;
    for (std::size_t i = 0; i < examples; ++i)
      if (y->data()[i] < 0 || y->data()[i] >= classes)
        throw std::invalid_argument("y has a label out of range");
    return int(examples);
  }

  std::shared_ptr<Engine> engine_;
  Network network_;
  Options options_;
  const int input_rank_;  // axes of one example
  Session session_;
  std::vector<bool> built_;  // nodes whose weights are set up, or that have none
  std::vector<int> tapped_;
  int examples_ = 0;
};

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "FedLean's sparse training engine; see fedlean.engine.native.";

  nb::class_<Engine>(m, "Engine")
      .def(nb::init<int>(), nb::arg("threads"))
      .def_prop_ro("instruction_set", [](const Engine& e) { return e.kernels.name; })
      .def_prop_ro("threads", [](const Engine& e) { return e.pool.threads(); });

  nb::class_<Network>(m, "Network")
      .def("__init__",
           [](Network* self, const std::vector<int>& input) {
             new (self) Network{shape_of(input), {}};
           })
      .def(
          "add",
          [](Network& self, const std::string& name, const std::string& kind,
             const std::vector<int>& inputs, const std::vector<int>& shape, int kernel, int stride,
             int padding, int groups, bool bias, float eps, float momentum) {
            for (int input : inputs)
              if (input < kModelInput || input >= int(self.nodes.size()))
                throw std::invalid_argument("inputs must be earlier nodes");
            if (inputs.empty()) throw std::invalid_argument("a node needs an input");
            if (kernel < 1 || stride < 1 || groups < 1 || padding < 0)
              throw std::invalid_argument("kernel, stride and groups must be at least 1");
            self.nodes.push_back({name, kind_of(kind), inputs, shape_of(shape), kernel, stride,
                                  padding, groups, bias, eps, momentum});
          },
          nb::arg("name"), nb::arg("kind"), nb::arg("inputs"), nb::arg("shape"), nb::kw_only(),
          nb::arg("kernel") = 1, nb::arg("stride") = 1, nb::arg("padding") = 0,
          nb::arg("groups") = 1, nb::arg("bias") = false, nb::arg("eps") = 1e-5f,
          nb::arg("momentum") = 0.1f);

  nb::class_<Bound>(m, "Session")
      .def(
          "__init__",
          [](Bound* self, std::shared_ptr<Engine> engine, const Network& network, int batch_size,
             const std::string& loss, float lr, float momentum, float weight_decay, float proximal,
             float clip_norm, int input_rank, const std::vector<std::vector<bool>>& trainable,
             const std::vector<std::vector<std::int64_t>>& kept) {
            expect_size("trainable", trainable.size(), network.nodes.size());
            expect_size("kept", kept.size(), network.nodes.size());
            if (batch_size < 1) throw std::invalid_argument("batch_size must be at least 1");
            if (network.nodes.empty()) throw std::invalid_argument("a network needs a layer");
            Options options;
            options.batch_size = batch_size;
            if (loss != "ce" && loss != "bce") throw std::invalid_argument("loss is 'ce' or 'bce'");
            options.loss = loss == "ce" ? Loss::kCrossEntropy : Loss::kBinaryCrossEntropy;
            options.rule = {lr, momentum, weight_decay, proximal};
            options.clip_norm = clip_norm;
            for (std::size_t i = 0; i < network.nodes.size(); ++i) {
              TensorOptions tensor;
              expect_size("trainable", trainable[i].size(), kSlots);
              expect_size("kept", kept[i].size(), kSlots);
              for (int s = 0; s < kSlots; ++s) {
                tensor.trainable[s] = trainable[i][s];
                tensor.kept[s] = kept[i][s];
              }
              options.tensors.push_back(tensor);
            }
            new (self) Bound(std::move(engine), network, options, input_rank);
          },
          nb::arg("engine"), nb::arg("network"), nb::kw_only(), nb::arg("batch_size"),
          nb::arg("loss"), nb::arg("lr"), nb::arg("momentum"), nb::arg("weight_decay"),
          nb::arg("proximal"), nb::arg("clip_norm"), nb::arg("input_rank"), nb::arg("trainable"),
          nb::arg("kept"))
      .def("planned_bytes", &Bound::planned_bytes, nb::arg("importance") = false)
      .def("held_bytes", &Bound::held_bytes)
      .def("build", &Bound::build)
      .def("reset", &Bound::reset)
      .def("load", &Bound::load, nb::arg("node"), nb::arg("slot"), nb::arg("values").noconvert(),
           nb::arg("packed"), nb::arg("reference"))
      .def("read", &Bound::read, nb::arg("node"), nb::arg("slot"), nb::arg("values").noconvert(),
           nb::arg("packed"))
      .def("read_mask", &Bound::read_mask, nb::arg("node"), nb::arg("slot"),
           nb::arg("kept").noconvert())
      .def("step", &Bound::step, nb::arg("x").noconvert(), nb::arg("y").noconvert(),
           nb::arg("importance"))
      .def("loss", &Bound::loss, nb::arg("x").noconvert(), nb::arg("y").noconvert())
      .def("squares", &Bound::squares, nb::arg("node"), nb::arg("slot"),
           nb::arg("values").noconvert())
      .def("forward", &Bound::forward, nb::arg("x").noconvert(), nb::arg("nodes"),
           nb::arg("training"))
      .def("activation", &Bound::activation, nb::arg("node"), nb::arg("values").noconvert())
      .def("backward", &Bound::backward, nb::arg("nodes"), nb::arg("gradients"), nb::arg("dense"))
      .def("gradient", &Bound::gradient, nb::arg("node"), nb::arg("slot"),
           nb::arg("values").noconvert(), nb::arg("dense"))
      .def("drop_gradients", &Bound::drop_gradients)
      .def("set_gradient", &Bound::set_gradient, nb::arg("node"), nb::arg("slot"),
           nb::arg("values").noconvert())
      .def("apply", &Bound::apply, nb::arg("nodes"), nb::arg("slots"));
}

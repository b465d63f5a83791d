// fedlean._native: the engine for Python.  Arrays are NumPy's, C-contiguous and of the exact type
// (nothing is converted silently); fedlean.engine.native checks shapes and values beforehand.

#include <nanobind/stl/tuple.h>

#include <tuple>

#include "guard.h"

using namespace fedlean;

namespace {

// Null where `name` is no curve.
const Curve::Name* curve_of(const std::string& name) {
  static const std::pair<const char*, Curve::Name> curves[] = {
      {"Hardswish", Curve::kHardswish}, {"Hardsigmoid", Curve::kHardsigmoid},
      {"LeakyReLU", Curve::kLeakyReLU}, {"Hardtanh", Curve::kHardtanh},
      {"Sigmoid", Curve::kSigmoid},     {"Tanh", Curve::kTanh},
      {"SiLU", Curve::kSiLU},           {"GELU", Curve::kGELU},
      {"GELUTanh", Curve::kGELUTanh},
  };
  for (const auto& [known, curve] : curves)
    if (name == known) return &curve;
  return nullptr;
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
      {"Scaler", Kind::kScaler},
      {"Flatten", Kind::kFlatten},
      {"Add", Kind::kAdd},
      {"Scale", Kind::kScale},
      {"Concat", Kind::kConcat},
      {"Dropout", Kind::kDropout},
  };
  for (const auto& [known, kind] : kinds)
    if (name == known) return kind;
  if (curve_of(name)) return Kind::kCurve;
  throw std::invalid_argument("the native engine has no layer " + name);
}

Shape shape_of(const std::vector<int>& s) {
  if (s.empty() || s.size() > 3)
    throw std::invalid_argument("shapes are (C, H, W), (C, L) or (F,)");
  if (s.size() == 3) return {s[0], s[1], s[2], 3};
  return s.size() == 2 ? Shape{s[0], 1, s[1], 2} : Shape{s[0], 1, 1, 1};
}

using Pair = std::tuple<int, int>;  // rows, columns
Sides sides_of(const Pair& pair) { return {std::get<0>(pair), std::get<1>(pair)}; }

using Rows = std::vector<std::tuple<int, int, int, int>>;  // node, slot, first row, rows

// Session with the sizes of what Python passes checked.
class Bound {
public:
  Bound(std::shared_ptr<Engine> engine, const Network& network, const Options& options)
      : session_(engine, network, options),
        guard_(std::move(engine), session_.model(), options.batch_size) {}

  std::size_t planned_bytes() const {
    return guard_.alone([&] { return session_.planned_bytes(); });
  }
  std::size_t held_bytes() const {
    return guard_.alone([&] { return session_.held_bytes(); });
  }

  void build(int node, const std::vector<nb::object>& masks) {
    guard_.build(node, masks, [&](auto pointers) { session_.build(node, pointers); });
  }
  void reset() {
    guard_.alone([&] {
      tapped_.clear();
      session_.reset();
    });
  }
  void load(int node, int slot, In<float> values, bool packed, bool reference) {
    expect_array("tensor", values, guard_.size(node, slot, packed));
    guard_.alone([&] {
      guard_.check_built(node);
      session_.load(node, Slot(slot), values.data(), packed, reference);
    });
  }
  void read(int node, int slot, Out<float> values, bool packed) const {
    expect_array("tensor", values, guard_.size(node, slot, packed));
    guard_.alone([&] {
      guard_.check_built(node);
      session_.model().read(node, Slot(slot), values.data(), packed);
    });
  }

  // Of a tensor that was built with a mask.
  void read_mask(int node, int slot, Out<bool> kept) const {
    expect_array("mask", kept, guard_.size(node, slot, false));
    guard_.alone([&] {
      guard_.check_masked(node, slot);
      session_.model().read_mask(node, Slot(slot), reinterpret_cast<std::uint8_t*>(kept.data()));
    });
  }

  double step(In<float> x, In<std::int64_t> y, const Rows& rows,
              const std::vector<std::uint64_t>& keys) {
    const Pieces pieces = pieces_of(rows);
    return guard_.alone([&] {
      session_.set_keys(keys);
      const Examples examples = guard_.check_batch(x, &y);
      tapped_.clear();
      return session_.step(x.data(), examples.labels.data(), examples.count, pieces);
    });
  }
  double loss(In<float> x, In<std::int64_t> y) {
    return guard_.alone([&] {
      const Examples examples = guard_.check_batch(x, &y);
      tapped_.clear();
      return session_.loss(x.data(), examples.labels.data(), examples.count);
    });
  }
  void squares(int node, int slot, Out<float> values) const {
    guard_.check(node, slot);
    guard_.alone([&] {
      expect_array("sums", values, session_.squares_size(node, Slot(slot)));
      session_.squares(node, Slot(slot), values.data());
    });
  }

  void forward(In<float> x, const std::vector<int>& nodes, bool training,
               const std::vector<std::uint64_t>& keys) {
    for (int node : nodes) guard_.check(node, 0);
    guard_.alone([&] {
      if (training) session_.set_keys(keys);
      const int examples = guard_.check_batch(x, nullptr).count;
      tapped_.clear();
      session_.forward(x.data(), examples, nodes, training);
      examples_ = examples;
      training_ = training;
      tapped_ = nodes;
      tapped_.push_back(int(guard_.network().nodes.size()) - 1);
    });
  }
  void activation(int node, Out<float> values) const {
    guard_.alone([&] {
      check_tapped(node);
      expect_array("activation", values, size_of(node));
      session_.activation(node, values.data());
    });
  }
  void backward(const std::vector<int>& nodes, const std::vector<In<float>>& gradients,
                bool dense) {
    guard_.alone([&] {
      const std::vector<const float*> pointers = entering(nodes, gradients);
      tapped_.clear();
      session_.backward(nodes, pointers, dense);
    });
  }
  void descend(const std::vector<int>& nodes, const std::vector<In<float>>& gradients,
               const Rows& rows) {
    const Pieces pieces = pieces_of(rows);
    guard_.alone([&] {
      const std::vector<const float*> pointers = entering(nodes, gradients);
      tapped_.clear();
      session_.descend(nodes, pointers, pieces);
    });
  }
  void gradient(int node, int slot, Out<float> values, bool dense) const {
    expect_array("gradient", values, guard_.size(node, slot, false));
    guard_.alone([&] {
      guard_.check_built(node);
      if (!session_.has_gradient(node, Slot(slot), dense))
        throw std::invalid_argument("there is no gradient: call backward first");
      session_.gradient(node, Slot(slot), values.data(), dense);
    });
  }
  void drop_gradients() {
    guard_.alone([&] { session_.drop_gradients(); });
  }
  void set_gradient(int node, int slot, In<float> values) {
    expect_array("gradient", values, guard_.size(node, slot, false));
    check_trainable(node, slot);
    guard_.alone([&] {
      guard_.check_built(node);
      session_.set_gradient(node, Slot(slot), values.data());
    });
  }
  void apply(const std::vector<int>& nodes, const std::vector<int>& slots) {
    expect_size("slots", slots.size(), nodes.size());
    for (std::size_t i = 0; i < nodes.size(); ++i) check_trainable(nodes[i], slots[i]);
    guard_.alone([&] {
      std::vector<std::pair<int, Slot>> tensors;
      for (std::size_t i = 0; i < nodes.size(); ++i) {
        guard_.check_built(nodes[i]);
        if (!session_.has_gradient(nodes[i], Slot(slots[i]), false))
          throw std::invalid_argument("there is no gradient: call set_gradient first");
        tensors.push_back({nodes[i], Slot(slots[i])});
      }
      session_.apply(tensors);
    });
  }

private:
  Pieces pieces_of(const Rows& given) const {
    Pieces pieces;
    for (auto [node, slot, first, rows] : given) {
      check_trainable(node, slot);
      const int most = guard_.network().nodes[node].shape.channels;
      if (first < 0 || rows < 1 || first >= most || rows > most - first)
        throw std::invalid_argument("a piece is of rows that the tensor has");
      for (const Piece& piece : pieces)
        if (piece.node == node && piece.slot == slot)
          throw std::invalid_argument("a tensor has one piece at a time");
      pieces.push_back({node, Slot(slot), first, rows});
    }
    return pieces;
  }
  void check_tapped(int node) const {
    for (int tapped : tapped_)
      if (tapped == node) return;
    throw std::invalid_argument("node was not tapped by the last forward");
  }
  // Alone: the arrays of gradients that enter at nodes of the last forward, if it was for training.
  std::vector<const float*> entering(const std::vector<int>& nodes,
                                     const std::vector<In<float>>& gradients) const {
    expect_size("gradients", gradients.size(), nodes.size());
    if (!training_) throw std::invalid_argument("the last forward was not for training");
    std::vector<const float*> pointers;
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      check_tapped(nodes[i]);
      expect_array("gradient", gradients[i], size_of(nodes[i]));
      pointers.push_back(gradients[i].data());
    }
    if (tapped_.empty()) throw std::invalid_argument("there was no forward");
    return pointers;
  }
  std::size_t size_of(int tapped) const {
    return guard_.network().nodes[tapped].shape.size() * examples_;
  }
  // A weight or a bias: the optimiser moves nothing else.
  void check_trainable(int node, int slot) const {
    guard_.check(node, slot);
    if (slot > kBias || !session_.model().tensors[node].trainable[slot])
      throw std::invalid_argument("the tensor is not trained");
  }

  Session session_;
  Guard guard_;
  std::vector<int> tapped_;
  int examples_ = 0;
  bool training_ = false;
};

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "FedLean's engine and the server's sums; see fedlean.engine.native and fedlean.sums.";

  nb::class_<Engine>(m, "Engine")
      .def(
          "__init__",
          [](Engine* self, int threads) {
            if (threads < 1 || threads > kMostThreads)
              throw std::invalid_argument("threads must be from 1 to " +
                                          std::to_string(kMostThreads));
            new (self) Engine(threads);
          },
          nb::arg("threads"))
      .def_prop_ro("instruction_set", [](const Engine& e) { return e.kernels.name; })
      .def_prop_ro("threads", [](const Engine& e) { return e.pool.threads(); });

  nb::class_<Network>(m, "Network")
      .def("__init__",
           [](Network* self, const std::vector<int>& input) {
             const Shape shape = shape_of(input);
             check_input(shape);
             new (self) Network{shape, {}};
           })
      .def(
          "add",
          [](Network& self, const std::string& name, const std::string& kind,
             const std::vector<int>& inputs, const std::vector<int>& shape, Pair kernel,
             Pair stride, Pair padding, Pair dilation, int groups, bool bias, float eps,
             float momentum, float factor, float low, float high, float p, bool whole_channels,
             bool slower) {
            Node node{name, kind_of(kind), inputs, shape_of(shape)};
            node.kernel = sides_of(kernel);
            node.stride = sides_of(stride);
            node.padding = sides_of(padding);
            node.dilation = sides_of(dilation);
            node.groups = groups;
            node.bias = bias;
            node.eps = eps;
            node.momentum = momentum;
            node.factor = factor;
            if (const Curve::Name* const curve = curve_of(kind)) node.curve = {*curve, low, high};
            node.p = p;
            node.whole_channels = whole_channels;
            node.slower = slower;
            check_node(self, node);
            self.nodes.push_back(node);
          },
          nb::arg("name"), nb::arg("kind"), nb::arg("inputs"), nb::arg("shape"), nb::kw_only(),
          nb::arg("kernel") = Pair{1, 1}, nb::arg("stride") = Pair{1, 1},
          nb::arg("padding") = Pair{0, 0}, nb::arg("dilation") = Pair{1, 1}, nb::arg("groups") = 1,
          nb::arg("bias") = false, nb::arg("eps") = 1e-5f, nb::arg("momentum") = 0.1f,
          nb::arg("factor") = 1.0f, nb::arg("low") = 0.0f, nb::arg("high") = 0.0f,
          nb::arg("p") = 0.0f, nb::arg("whole_channels") = false, nb::arg("slower") = false);

  nb::class_<Bound>(m, "Session")
      .def(
          "__init__",
          [](Bound* self, std::shared_ptr<Engine> engine, const Network& network, int batch_size,
             const std::string& loss, float lr, float momentum, float weight_decay, float proximal,
             float clip_norm, const std::vector<std::vector<bool>>& trainable,
             const std::vector<std::vector<std::int64_t>>& kept) {
            const Options options = {batch_size_of(batch_size),
                                     loss_of(loss),
                                     {lr, momentum, weight_decay, proximal},
                                     clip_norm,
                                     tensors_of(network, trainable, kept)};
            new (self) Bound(std::move(engine), network, options);
          },
          nb::arg("engine"), nb::arg("network"), nb::kw_only(), nb::arg("batch_size"),
          nb::arg("loss"), nb::arg("lr"), nb::arg("momentum"), nb::arg("weight_decay"),
          nb::arg("proximal"), nb::arg("clip_norm"), nb::arg("trainable"), nb::arg("kept"))
      .def("planned_bytes", &Bound::planned_bytes)
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
           nb::arg("pieces"), nb::arg("keys"))
      .def("loss", &Bound::loss, nb::arg("x").noconvert(), nb::arg("y").noconvert())
      .def("squares", &Bound::squares, nb::arg("node"), nb::arg("slot"),
           nb::arg("values").noconvert())
      .def("forward", &Bound::forward, nb::arg("x").noconvert(), nb::arg("nodes"),
           nb::arg("training"), nb::arg("keys"))
      .def("activation", &Bound::activation, nb::arg("node"), nb::arg("values").noconvert())
      .def("backward", &Bound::backward, nb::arg("nodes"), nb::arg("gradients").noconvert(),
           nb::arg("dense"))
      .def("descend", &Bound::descend, nb::arg("nodes"), nb::arg("gradients").noconvert(),
           nb::arg("pieces"))
      .def("gradient", &Bound::gradient, nb::arg("node"), nb::arg("slot"),
           nb::arg("values").noconvert(), nb::arg("dense"))
      .def("drop_gradients", &Bound::drop_gradients)
      .def("set_gradient", &Bound::set_gradient, nb::arg("node"), nb::arg("slot"),
           nb::arg("values").noconvert())
      .def("apply", &Bound::apply, nb::arg("nodes"), nb::arg("slots"));

  bind_forward(m);
  bind_merge(m);
}

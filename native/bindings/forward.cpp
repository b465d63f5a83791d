// fedlean._native.ForwardSession: see module.cpp.

#include "fedlean/forward.h"

#include "guard.h"

namespace fedlean {

namespace {

Direction::Kind kind_of(const std::string& name) {
  if (name == "gaussian") return Direction::kGaussian;
  if (name == "sign") return Direction::kSign;
  if (name == "rank1") return Direction::kRankOne;
  throw std::invalid_argument("kind is 'gaussian', 'sign' or 'rank1'");
}

class BoundForward {
public:
  BoundForward(std::shared_ptr<Engine> engine, const Network& network,
               const ForwardOptions& options)
      : session_(engine, network, options),
        guard_(std::move(engine), session_.model(), options.batch_size) {}

  std::size_t planned_bytes() const {
    return guard_.alone([&] { return session_.planned_bytes(); });
  }
  std::size_t held_bytes() const {
    return guard_.alone([&] { return session_.held_bytes(); });
  }

  void build(int node, const std::vector<nb::object>& masks) {
    guard_.build(node, masks, [&](auto pointers) { session_.model().build(node, pointers); });
  }
  void load(int node, int slot, In<float> values, bool packed) {
    expect_array("tensor", values, guard_.size(node, slot, packed));
    guard_.alone([&] {
      guard_.check_built(node);
      session_.model().load(node, Slot(slot), values.data(), packed);
    });
  }
  void read(int node, int slot, Out<float> values, bool packed) const {
    expect_array("tensor", values, guard_.size(node, slot, packed));
    guard_.alone([&] {
      guard_.check_built(node);
      session_.model().read(node, Slot(slot), values.data(), packed);
    });
  }
  void read_mask(int node, int slot, Out<bool> kept) const {
    expect_array("mask", kept, guard_.size(node, slot, false));
    guard_.alone([&] {
      guard_.check_masked(node, slot);
      session_.model().read_mask(node, Slot(slot), reinterpret_cast<std::uint8_t*>(kept.data()));
    });
  }

  double loss(In<float> x, In<std::int64_t> y) {
    return guard_.alone([&] {
      const Examples examples = guard_.check_batch(x, &y);
      return session_.loss(x.data(), examples.labels.data(), examples.count);
    });
  }
  // keys: (losses, nodes, 3); normals: the table of 65,536.
  void losses(In<float> x, In<std::int64_t> y, const std::string& kind, float sigma,
              In<float> normals, In<std::uint64_t> keys, Out<double> losses) {
    const std::size_t per_direction = guard_.network().nodes.size() * Direction::kKeys;
    expect_array("normals", normals, 65536);
    expect_array("losses", losses, losses.size());
    expect_array("keys", keys, losses.size() * per_direction);
    std::vector<Direction> directions;
    for (std::size_t i = 0; i < losses.size(); ++i)
      directions.push_back({kind_of(kind), sigma, normals.data(), keys.data() + i * per_direction});
    guard_.alone([&] {
      const Examples examples = guard_.check_batch(x, &y);
      session_.losses(x.data(), examples.labels.data(), examples.count, directions, losses.data());
    });
  }
  // Of `nodes`, each to its array.
  void forward(In<float> x, const std::vector<int>& nodes, const std::vector<Out<float>>& values) {
    expect_size("values", values.size(), nodes.size());
    for (int node : nodes) guard_.check(node, 0);
    guard_.alone([&] {
      const int examples = guard_.check_batch(x, nullptr).count;
      std::vector<float*> pointers;
      for (std::size_t i = 0; i < nodes.size(); ++i) {
        const Shape& shape = guard_.network().nodes[nodes[i]].shape;
        expect_array("activation", values[i], shape.size() * examples);
        pointers.push_back(values[i].data());
      }
      session_.forward(x.data(), examples, nodes, pointers);
    });
  }

private:
  ForwardSession session_;
  Guard guard_;
};

}  // namespace

void bind_forward(nb::module_& m) {
  nb::class_<BoundForward>(m, "ForwardSession")
      .def(
          "__init__",
          [](BoundForward* self, std::shared_ptr<Engine> engine, const Network& network,
             int batch_size, const std::string& loss, int directions_at_once,
             const std::vector<std::vector<bool>>& trainable,
             const std::vector<std::vector<std::int64_t>>& kept) {
            if (directions_at_once < 1)
              throw std::invalid_argument("directions_at_once must be at least 1");
            const ForwardOptions options = {batch_size_of(batch_size), loss_of(loss),
                                            directions_at_once,
                                            tensors_of(network, trainable, kept)};
            new (self) BoundForward(std::move(engine), network, options);
          },
          nb::arg("engine"), nb::arg("network"), nb::kw_only(), nb::arg("batch_size"),
          nb::arg("loss"), nb::arg("directions_at_once"), nb::arg("trainable"), nb::arg("kept"))
      .def("planned_bytes", &BoundForward::planned_bytes)
      .def("held_bytes", &BoundForward::held_bytes)
      .def("build", &BoundForward::build)
      .def("load", &BoundForward::load, nb::arg("node"), nb::arg("slot"),
           nb::arg("values").noconvert(), nb::arg("packed"))
      .def("read", &BoundForward::read, nb::arg("node"), nb::arg("slot"),
           nb::arg("values").noconvert(), nb::arg("packed"))
      .def("read_mask", &BoundForward::read_mask, nb::arg("node"), nb::arg("slot"),
           nb::arg("kept").noconvert())
      .def("loss", &BoundForward::loss, nb::arg("x").noconvert(), nb::arg("y").noconvert())
      .def("losses", &BoundForward::losses, nb::arg("x").noconvert(), nb::arg("y").noconvert(),
           nb::arg("kind"), nb::arg("sigma"), nb::arg("normals").noconvert(),
           nb::arg("keys").noconvert(), nb::arg("losses").noconvert())
      .def("forward", &BoundForward::forward, nb::arg("x").noconvert(), nb::arg("nodes"),
           nb::arg("values").noconvert());
}

}  // namespace fedlean

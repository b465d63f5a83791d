// fedlean._native.ForwardSession.

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
               const ForwardOptions& options, int input_rank)
      : session_(engine, network, options),
        guard_(std::move(engine), session_.model(), options.batch_size, input_rank) {}

  std::size_t planned_bytes() const { return session_.planned_bytes(); }
  std::size_t held_bytes() const { return session_.held_bytes(); }

  void build(int node, const std::vector<nb::object>& masks) {
    guard_.build(node, masks, [&](auto pointers) { session_.model().build(node, pointers); });
  }
  void load(int node, int slot, In<float> values, bool packed) {
    guard_.check_built(node);
    expect_size("tensor", values.size(), guard_.size(node, slot, packed));
    guard_.alone([&] { session_.model().load(node, Slot(slot), values.data(), packed); });
  }
  void read(int node, int slot, Out<float> values, bool packed) const {
    guard_.check_built(node);
    expect_size("tensor", values.size(), guard_.size(node, slot, packed));
    guard_.alone([&] { session_.model().read(node, Slot(slot), values.data(), packed); });
  }
  void read_mask(int node, int slot, Out<bool> kept) const {
    guard_.check_masked(node, slot);
    expect_size("mask", kept.size(), guard_.size(node, slot, false));
    guard_.alone([&] {
      session_.model().read_mask(node, Slot(slot), reinterpret_cast<std::uint8_t*>(kept.data()));
    });
  }

  double loss(In<float> x, In<std::int64_t> y) {
    const int examples = guard_.check_batch(x, &y);
    return guard_.alone([&] { return session_.loss(x.data(), y.data(), examples); });
  }
  // keys: (losses, nodes, 3); normals: the table of 65,536.
  void losses(In<float> x, In<std::int64_t> y, const std::string& kind, float sigma,
              In<float> normals, In<std::uint64_t> keys, Out<double> losses) {
    const int examples = guard_.check_batch(x, &y);
    const std::size_t per_direction = guard_.network().nodes.size() * Direction::kKeys;
    expect_size("normals", normals.size(), 65536);
    expect_size("keys", keys.size(), losses.size() * per_direction);
    std::vector<Direction> directions;
    for (std::size_t i = 0; i < losses.size(); ++i)
      directions.push_back({kind_of(kind), sigma, normals.data(), keys.data() + i * per_direction});
    guard_.alone([&] { session_.losses(x.data(), y.data(), examples, directions, losses.data()); });
  }
  // Of `nodes`, each to its array.
  void forward(In<float> x, const std::vector<int>& nodes, const std::vector<Out<float>>& values) {
    const int examples = guard_.check_batch(x, nullptr);
    expect_size("values", values.size(), nodes.size());
    std::vector<float*> pointers;
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      guard_.check(nodes[i], 0);
      expect_size("activation", values[i].size(),
                  guard_.network().nodes[nodes[i]].shape.size() * examples);
      pointers.push_back(values[i].data());
    }
    guard_.alone([&] { session_.forward(x.data(), examples, nodes, pointers); });
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
             int batch_size, const std::string& loss, int directions_at_once, int input_rank,
             const std::vector<std::vector<bool>>& trainable,
             const std::vector<std::vector<std::int64_t>>& kept) {
            if (batch_size < 1 || directions_at_once < 1)
              throw std::invalid_argument("batch_size and directions_at_once must be at least 1");
            const ForwardOptions options = {batch_size, loss_of(loss), directions_at_once,
                                            tensors_of(network, trainable, kept)};
            new (self) BoundForward(std::move(engine), network, options, input_rank);
          },
          nb::arg("engine"), nb::arg("network"), nb::kw_only(), nb::arg("batch_size"),
          nb::arg("loss"), nb::arg("directions_at_once"), nb::arg("input_rank"),
          nb::arg("trainable"), nb::arg("kept"))
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
           nb::arg("values"));
}

}  // namespace fedlean

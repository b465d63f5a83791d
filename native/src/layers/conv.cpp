// Which form a Conv2d takes.

#include "conv.h"

#include <stdexcept>
#include <string>

#include "thresholds.h"

namespace fedlean {

std::unique_ptr<Layer> make_conv(const Node& node, const Shape& in, Sides in_halo, Sides grad_halo,
                                 std::size_t nonzeros, bool needs_grad_in) {
  const std::size_t size =
      node.shape.channels * std::size_t(in.channels / node.groups) * node.kernel.area();
  const ConvGeometry g(node, in, in_halo, grad_halo);
  constexpr int most = 65536;  // offsets have 16 bits
  const bool addressable = g.in_plane() * g.phases() <= most && g.grad_plane() <= most;
  // A dense grouped convolution has nothing to share between its outputs: gather is as good.
  if (node.groups > 1 && !addressable)
    throw std::invalid_argument("layer '" + node.name + "' (Conv2d): images of more than 65536 " +
                                "pixels are not supported with groups");
  const bool sparse_is_faster = double(nonzeros) < kSparseConvBelow * double(size);
  if (node.groups > 1 || (addressable && sparse_is_faster != node.slower))
    return make_sparse_conv(node, in, in_halo, grad_halo, nonzeros, needs_grad_in);
  return make_dense_conv(node, in, in_halo, grad_halo);
}

}  // namespace fedlean

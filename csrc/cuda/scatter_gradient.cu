#include "scatter_gradient.cuh"

#include "queue.cuh"

namespace cem_fast::cuda {

void scatter_gradient(const ScatterGradient& p, const Context& context) {
  Queue queue(context);
  for_element(p.x.element, [&]<class X>(const X*) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(X)), kParameter = static_cast<int64_t>(sizeof(Parameter<X>));
    const int64_t D = p.x.dimension;
    const bool aligned = is_aligned(p.x.data, p.x.stride * kSize, D * kSize) && is_aligned(p.dx, 0, 0) &&
                         is_aligned(p.mixture.means, 0, D * kParameter) &&
                         (!p.mixture.diagonal || is_aligned(p.grad_scatter, 0, 0));
    const int64_t pieces = divide_up(D, aligned ? Piece<X, true, 4>::kDims : Piece<X, false, 4>::kDims);
    queue.launch(aligned ? scatter_gradient_kernel<X, true> : scatter_gradient_kernel<X, false>,
                 divide_up(p.x.rows * pieces, kWarps), p, pieces);
  });
}

}  // namespace cem_fast::cuda

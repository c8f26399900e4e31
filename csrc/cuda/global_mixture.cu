#include "global_mixture.cuh"

#include <algorithm>

namespace cem_fast::cuda {

namespace {

#ifdef CEM_FAST_SMALL_PARTS  // so that small problems come here, and in several windows
constexpr int64_t kFewestComponents = 20;
constexpr int64_t kFewestDimensions = 3;
constexpr int64_t kNumbersOfWindow = 1 << 12;
constexpr int64_t kEnoughTiles = 40;
#else
constexpr int64_t kFewestComponents = 128;
constexpr int64_t kFewestDimensions = 32;
constexpr int64_t kNumbersOfWindow = 1 << 22;  // of the posterior
constexpr int64_t kEnoughTiles = 512;          // a constant, so that every device gives the same bits
#endif

// Calls f with the features' type where it is not double.
template <class F>
void for_narrow_element(Element element, const F& f) {
  for_element(element, [&]<class X>(const X* none) {
    if constexpr (sizeof(X) < 8) f(none);
  });
}

bool is_vectorized(const Features& x, const Mixture& mixture) {
  const int64_t size = size_of(x.element), D = x.dimension;
  return is_aligned(x.data, x.stride * size, D * size) && is_aligned(mixture.means, 0, D * 4) &&
         (!mixture.diagonal || is_aligned(mixture.variances, 0, 0));
}

// Cuts the components into shares; returns the number of blocks, one for a tile of rows and a share.
int64_t share_out(GlobalMixture& p) {
  const int64_t K = p.mixture.components, tiles = divide_up(p.x.rows, kGlobalRows);
  const int64_t of_components = divide_up(K, kGlobalComponents);
  const int64_t shares = std::clamp<int64_t>(kEnoughTiles / tiles, 1, of_components);
  p.share_size = divide_up(of_components, shares) * kGlobalComponents;
  p.shares = divide_up(K, p.share_size);
  return tiles * p.shares;
}

}  // namespace

bool is_global(const Features& x, const Mixture& mixture, const void* responsibilities) {
  return responsibilities == nullptr && mixture.labels == nullptr && x.element != Element::kDouble && x.rows > 0 &&
         mixture.components >= kFewestComponents && x.dimension >= kFewestDimensions &&
         std::max(mixture.components, x.dimension) < 1 << 30;
}

void global_log_prob(Queue& queue, const LogProbForward& call) {
  GlobalMixture p{};
  p.x = call.x;
  p.mixture = call.mixture;
  p.log_prob = static_cast<float*>(call.log_prob);
  const int64_t blocks = share_out(p);
  if (p.shares > 1) {
    queue.allocate_all(p.best, p.shares * p.x.rows, p.mass, p.shares * p.x.rows);
    p.tickets = take_tickets(queue);
  }
  for_narrow_element(p.x.element, [&]<class X>(const X*) {
    queue.launch(is_vectorized(p.x, p.mixture) ? global_log_prob_kernel<true, X> : global_log_prob_kernel<false, X>,
                 blocks, p);
  });
}

void global_gradient(Queue& queue, const LogProbBackward& call) {
  const int64_t N = call.x.rows, D = call.x.dimension, K = call.mixture.components;
  const int64_t tiles = std::min(divide_up(N, kGlobalRows), std::max<int64_t>(1, kNumbersOfWindow / K / kGlobalRows));
  const int64_t window = tiles * kGlobalRows;
  float *posterior, *inverse;
  queue.allocate_all(posterior, window * K, inverse, K * D);
  for_narrow_element(call.x.element, [&]<class X>(const X*) {
    for (int64_t first = 0; first < N; first += window) {
      GlobalMixture p{};
      p.x = call.x;
      p.x.data = static_cast<const X*>(call.x.data) + first * call.x.stride;
      p.x.rows = std::min(window, N - first);
      p.mixture = call.mixture;
      p.log_prob = const_cast<float*>(static_cast<const float*>(call.log_prob)) + first;
      p.grad = static_cast<const float*>(call.grad) + first;
      p.dx = static_cast<X*>(call.dx) + first * D;
      p.posterior = posterior;
      p.pitch = window;
      p.inverse = inverse;
      const int64_t blocks = share_out(p);
      const bool vectorized = is_vectorized(p.x, p.mixture);
      queue.launch(vectorized ? global_posterior_kernel<true, X> : global_posterior_kernel<false, X>, blocks, p);
      queue.launch(vectorized ? global_gradient_kernel<true, X> : global_gradient_kernel<false, X>,
                   divide_up(p.x.rows, kPullRows) * divide_up(D, kPullDims), p);
    }
  });
}

}  // namespace cem_fast::cuda

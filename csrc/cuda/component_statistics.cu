#include "component_statistics.cuh"

#include <algorithm>

namespace cem_fast::cuda {

namespace {

#ifdef CEM_FAST_SMALL_PARTS  // so that small problems are sorted, too
constexpr int64_t kSearchedRows = 64;
#else
constexpr int64_t kSearchedRows = kSearched;
#endif
constexpr int64_t kSearchedClasses = 4096;  // because every block searches all rows
constexpr int64_t kRowsOfPart = kRows * kWarps;
constexpr int64_t kPartials = 1 << 24;     // maximum partial results of all runs, but for one of every class
constexpr int64_t kSortShared = 16 << 10;  // bytes that leave room for kStatisticsBlocks

// Whether there are kernels for aligned rows; doubles are for tests.
template <class X>
constexpr bool kAlignable = sizeof(X) < 8;

// Where a block keeps its sums.
struct Place {
  bool aligned;
  bool staged;
  bool together;
  int64_t pitch;
  int64_t shared;  // bytes
};

template <class X>
Place place_of(const Statistics<Parameter<X>>& p, bool weighted) {
  using T = Parameter<X>;
  const int64_t K = p.mixture.components, D = p.x.dimension, room = Machine::current().shared - kStaticShared;
  constexpr auto kSize = static_cast<int64_t>(sizeof(X));
  const bool aligned = kAlignable<X> && is_aligned(p.x.data, p.x.stride * kSize, D * kSize) &&
                       is_aligned(p.mixture.means, 0, D * static_cast<int64_t>(sizeof(T)));
  const int64_t span = aligned ? RowPiece<X, true>::kSpan : RowPiece<X, false>::kSpan;
  const int64_t pitch = divide_up(D, span) * span;
  if (!weighted) {
    // a warp a row; else all warps, with one copy of the sums
    const int64_t apart = Own<T>::bytes(K, kWarps, p.planes(), pitch);
    if (D <= (aligned ? RowPiece<X, true>::kDims : RowPiece<X, false>::kDims) && apart <= room / 2)
      return {aligned, true, false, pitch, apart};
    const int64_t together = Own<T>::bytes(K, 1, p.planes(), pitch);
    if (together <= room) return {aligned, true, true, pitch, together};
  }
  return {false, false, true, D, 0};
}

// Most rows of a run: a device should hold the blocks of all runs at once, or
// else each class is one.
int64_t run_size(const Features& x, const Mixture& mixture, int64_t planes, const Place& place) {
  const Machine& machine = Machine::current();
  const int64_t fit = place.shared == 0 ? kStatisticsBlocks : machine.shared / (place.shared + kStaticShared);
  const int64_t blocks = machine.multiprocessors * std::clamp<int64_t>(fit, 1, kStatisticsBlocks);
  const int64_t most = kPartials / std::max<int64_t>(planes * mixture.components * x.dimension, 1);
  const int64_t of_classes = std::max<int64_t>(1, blocks / mixture.classes) * mixture.classes;
  const int64_t runs = std::max<int64_t>(1, std::min(of_classes, most));
  // an eighth more, because classes differ in size
  return std::max<int64_t>(1, divide_up(divide_up(x.rows * 9, runs * 8), kRowsOfPart)) * kRowsOfPart;
}

// Whether blocks find the rows of their class among all labels, instead of rows in the order of classes.
bool is_searched(const Features& x, const Mixture& mixture) {
  return mixture.labels != nullptr && x.rows <= kSearchedRows && mixture.classes <= kSearchedClasses;
}

template <class X, class T>
auto kernel_of(const Place& place, bool wide) -> void (*)(Statistics<T>) {
  if (!place.staged) return statistics_kernel<X, false, true, false>;
  if constexpr (kAlignable<X>) {
    if (place.aligned) return wide ? statistics_kernel<X, true, true, true> : statistics_kernel<X, true, false, true>;
  }
  return statistics_kernel<X, false, true, true>;
}

template <class X>
void statistics_of(Queue& queue, Statistics<Parameter<X>>& p) {
  using T = Parameter<X>;
  const int64_t C = p.mixture.classes, K = p.mixture.components;
  // no labels at all have no address, but there are classes; nothing is read from this one
  if (p.x.rows == 0) p.mixture.labels = static_cast<const int64_t*>(p.mixture.means);
  const bool posterior = p.mixture.variances != nullptr, weighted = posterior && p.mixture.diagonal;
  const Place place = place_of<X>(p, weighted);
  p.pitch = static_cast<int32_t>(place.pitch);
  p.together = place.together;
  p.normalizers = posterior ? log_normalizers(queue, p.x, p.mixture) : nullptr;
  const int64_t size = run_size(p.x, p.mixture, p.planes(), place);
  const bool searched = is_searched(p.x, p.mixture), grouped = p.mixture.labels != nullptr && !searched;
  Grouping plan{};
  if (grouped) {
    plan = plan_every_class(p.x, p.mixture, size);
  } else if (searched) {
    p.parts = C < kTickets ? std::max<int64_t>(1, divide_up(p.x.rows, C * kRowsOfPart)) : 1;
  } else {
    p.parts = std::max<int64_t>(1, divide_up(p.x.rows, size));
  }
  const int64_t blocks = grouped ? plan.most_runs : C * p.parts;
  const bool alone = place.staged && !grouped && p.parts == 1;  // no class has several runs
  const int64_t runs = alone ? 0 : blocks, hinge = p.bounded && p.bound.official ? C * K : 0;
  const auto find = [&](auto&&... before) {
    queue.allocate_all(before..., p.run_totals, runs * K, p.room, place.staged ? 0 : C * 2 * kWarps * K, p.terms,
                       p.bounded ? C * K : 0, p.class_counts, hinge, p.class_totals, hinge, p.run_planes,
                       runs * p.planes() * K * p.x.dimension, p.run_counts, runs * K);
  };
  int64_t shared = place.shared;
  if (grouped) {
    p.groups = allocate(plan, find);
    p.tickets = {p.groups.tickets, 0};
    if (plan.at_once && plan.shared() <= kSortShared && plan.sort.ranges <= blocks) {
      p.sort = plan.sort;
      p.turns = take_tickets(queue);
      shared = std::max(shared, plan.shared());
    } else {
      sort(queue, plan);
    }
  } else {
    find();
    p.tickets = take_tickets(queue);
  }
  queue.launch_with(shared, kernel_of<X, T>(place, p.planes() > 0), blocks, p);
}

}  // namespace

void statistics_forward(const StatisticsForward& call, const Context& context) {
  Queue queue(context);
  for_element(call.x.element, [&]<class X>(const X*) {
    using T = Parameter<X>;
    Statistics<T> p{};
    p.x = call.x;
    p.mixture = call.mixture;
    p.assignment = call.assignment;
    p.scatter = call.per_dimension;
    p.sums = call.sums != nullptr;
    p.counts = static_cast<T*>(call.counts);
    p.totals = static_cast<T*>(call.scatter);
    p.sum = static_cast<T*>(call.sums);
    statistics_of<X>(queue, p);
  });
}

void cem_forward(const Bound& bound, const Features& x, const Mixture& mixture, int64_t* assignment,
                 const Context& context) {
  Queue queue(context);
  for_element(x.element, [&]<class X>(const X*) {
    Statistics<Parameter<X>> p{};
    p.x = x;
    p.mixture = mixture;
    p.assignment = assignment;
    p.scatter = bound.diagonal;
    p.bounded = true;
    p.bound = bound;
    statistics_of<X>(queue, p);
  });
}

}  // namespace cem_fast::cuda

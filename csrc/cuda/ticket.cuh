// The last block of a launch, or of a class, to finish its part adds up the parts of all: in a fixed order, whoever it
// is.
#pragma once

#include <atomic>

#include "queue.cuh"

namespace cem_fast::cuda {

constexpr int kTickets = 16;  // of a call
#ifdef CEM_FAST_SMALL_PARTS   // so that calls come back to the same place
constexpr int kCalls = 2;
#else
constexpr int kCalls = 1024;  // that can be on their way at once
#endif

// Counters of blocks that have finished, or of what they share out. All are 0 before a launch, and the last block sets
// them back to 0. Calls take turns with the places of `ring`, which costs no launch; a graph, which can run at any
// time, has counters of its own.
static __device__ unsigned ring[kCalls * kTickets];

struct Tickets {
  unsigned* given;  // or null: of the ring
  int place;

  __device__ unsigned* at(int64_t i) const { return given == nullptr ? ring + place * kTickets + i : given + i; }
};

// Counters for one launch, at most kTickets.
inline Tickets take_tickets(Queue& queue) {
  static std::atomic<unsigned> calls{0};
  if (queue.is_captured()) return {queue.zeros<unsigned>(kTickets), 0};
  return {nullptr, static_cast<int>(calls++ % kCalls)};
}

}  // namespace cem_fast::cuda

// Rows by the warp: each lane holds a few elements, loaded 16 bytes at a time where rows are aligned.
#pragma once

#include <cstring>
#include <type_traits>

#include "block.cuh"
#include "element.cuh"

namespace cem_fast::cuda {

// kCount loads of consecutive elements of a row by every lane, from one dimension on. Dimensions past the last are 0.
template <class X, bool kAligned, int kCount>
struct Piece {
  using Element = X;
  static constexpr int kLoads = kCount;
  static constexpr int kVector = kAligned ? 16 / static_cast<int>(sizeof(X)) : 1;  // elements of one load
  static constexpr int kSpan = kWarp * kVector;                                    // dimensions of one load of a warp
  static constexpr int kDims = kLoads * kSpan;
  using Load = std::conditional_t<kAligned, uint4, X>;

  Load load[kLoads];

  // The dimension of element 0 of a load.
  __device__ static int64_t dimension(int64_t start, int i) {
    return start + i * kSpan + static_cast<int64_t>(threadIdx.x % kWarp) * kVector;
  }

  __device__ void read(const X* row, int64_t start, int64_t end) {
    UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int64_t d = dimension(start, i);
      load[i] = d < end ? *reinterpret_cast<const Load*>(row + d) : Load{};
    }
  }

  __device__ void elements(int i, X (&out)[kVector]) const { memcpy(out, &load[i], sizeof out); }
};

// kCount consecutive numbers.
template <bool kAligned, int kCount, class T>
__device__ void read_vector(const T* from, T (&out)[kCount]) {
  if constexpr (kAligned) {
    static_assert(kCount * sizeof(T) % sizeof(uint4) == 0);
    UNROLL
    for (int i = 0; i < kCount * static_cast<int>(sizeof(T) / 4) / 4; ++i) {
      const uint4 bits = reinterpret_cast<const uint4*>(from)[i];
      memcpy(&out[i * static_cast<int>(sizeof bits / sizeof(T))], &bits, sizeof bits);
    }
  } else {
    UNROLL
    for (int i = 0; i < kCount; ++i) out[i] = from[i];
  }
}

template <bool kAligned, int kCount, class T>
__device__ void write_vector(const T (&from)[kCount], T* to) {
  if constexpr (kAligned) {
    static_assert(kCount * sizeof(T) % sizeof(uint4) == 0);
    UNROLL
    for (int i = 0; i < kCount * static_cast<int>(sizeof(T) / 4) / 4; ++i) {
      uint4 bits;
      memcpy(&bits, &from[i * static_cast<int>(sizeof bits / sizeof(T))], sizeof bits);
      reinterpret_cast<uint4*>(to)[i] = bits;
    }
  } else {
    UNROLL
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

// The squared distance of a row to a mean, by one thread: one that float cannot hold.
template <class X, class T>
__device__ double wide_distance(const X* row, const T* mean, int64_t D) {
  double total = 0;
  UNROLL_BY(1)
  for (int64_t d = 0; d < D; ++d) {
    const double deviation = static_cast<double>(widen(row[d])) - static_cast<double>(mean[d]);
    total += deviation * deviation;
  }
  return total;
}

// Whether rows can be read 16 bytes at a time: where they start, the distance between them and their length, in bytes.
inline bool is_aligned(const void* data, int64_t stride, int64_t length) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(stride) | static_cast<uint64_t>(length)) % 16 == 0;
}

inline int64_t size_of(Element element) { return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2; }

}  // namespace cem_fast::cuda

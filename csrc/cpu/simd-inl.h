// Vectors of CEM_FAST_WIDTH bytes: loads that widen, stores that round, and the few operations the kernels need.
// Included once for each instruction set, inside that set's namespace; no function of the standard library's templates
// is used here or in the kernels, because the linker would merge the copies of different instruction sets.

#define CEM_FAST_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class T>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(CEM_FAST_WIDTH)));
  typedef float Unaligned __attribute__((vector_size(CEM_FAST_WIDTH), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(CEM_FAST_WIDTH)));
  typedef uint16_t Short __attribute__((vector_size(CEM_FAST_WIDTH / 2)));
  typedef uint16_t UnalignedShort __attribute__((vector_size(CEM_FAST_WIDTH / 2), aligned(2), may_alias));
};

template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(CEM_FAST_WIDTH)));
  typedef double Unaligned __attribute__((vector_size(CEM_FAST_WIDTH), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(CEM_FAST_WIDTH)));
};

template <class T>
using Vector = typename VectorOf<T>::Type;
template <class T>
using Bits = typename VectorOf<T>::Bits;
using Unsigned32 = uint32_t __attribute__((vector_size(CEM_FAST_WIDTH)));

template <class T>
constexpr int kLanes = CEM_FAST_WIDTH / static_cast<int>(sizeof(T));

// The parameters' type for features of type X.
template <class X>
struct ParameterOf {
  using Type = float;
};
template <>
struct ParameterOf<double> {
  using Type = double;
};

template <class T>
CEM_FAST_INLINE constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
CEM_FAST_INLINE constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

CEM_FAST_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
CEM_FAST_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

template <class T>
CEM_FAST_INLINE Bits<T> lane_index() {
  Bits<T> index;
  for (int i = 0; i < kLanes<T>; ++i) index[i] = i;
  return index;
}

// ---- one number

CEM_FAST_INLINE float widen(float x) { return x; }
CEM_FAST_INLINE double widen(double x) { return x; }

CEM_FAST_INLINE float widen(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

CEM_FAST_INLINE float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // 2^112 moves the exponent's bias and makes subnormals exact; infinity and NaN have all exponent bits set instead
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  uint32_t bits = __builtin_bit_cast(uint32_t, scaled);
  if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;
  return __builtin_bit_cast(float, bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// Rounds to the nearest, ties to even.
CEM_FAST_INLINE void narrow(float value, float* out) { *out = value; }
CEM_FAST_INLINE void narrow(double value, double* out) { *out = value; }

CEM_FAST_INLINE void narrow(float value, BFloat16* out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

CEM_FAST_INLINE void narrow(float value, Half* out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the addition rounds to a multiple of 2^-24
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// ---- a full vector

CEM_FAST_INLINE Vector<float> load(const float* p) {
  return *reinterpret_cast<const typename VectorOf<float>::Unaligned*>(p);
}

CEM_FAST_INLINE Vector<double> load(const double* p) {
  return *reinterpret_cast<const typename VectorOf<double>::Unaligned*>(p);
}

CEM_FAST_INLINE Vector<float> load(const BFloat16* p) {
  const auto bits = *reinterpret_cast<const typename VectorOf<float>::UnalignedShort*>(p);
  return (Vector<float>)(__builtin_convertvector(bits, Unsigned32) << 16);
}

CEM_FAST_INLINE Vector<float> load(const Half* p) {
#if CEM_FAST_WIDTH == 64
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif CEM_FAST_WIDTH == 32
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vector<float> value;
  for (int i = 0; i < kLanes<float>; ++i) value[i] = widen(p[i]);
  return value;
#endif
}

CEM_FAST_INLINE void store(float* p, Vector<float> value) {
  *reinterpret_cast<typename VectorOf<float>::Unaligned*>(p) = value;
}

CEM_FAST_INLINE void store(double* p, Vector<double> value) {
  *reinterpret_cast<typename VectorOf<double>::Unaligned*>(p) = value;
}

CEM_FAST_INLINE void store(BFloat16* p, Vector<float> value) {
  const auto bits = (Unsigned32)value;
  auto rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  rounded = value == value ? rounded : Unsigned32{} + 0x7fc0;
  *reinterpret_cast<typename VectorOf<float>::UnalignedShort*>(p) =
      __builtin_convertvector(rounded, typename VectorOf<float>::Short);
}

CEM_FAST_INLINE void store(Half* p, Vector<float> value) {
#if CEM_FAST_WIDTH == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)value, 0));
#elif CEM_FAST_WIDTH == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)value, 0));
#else
  for (int i = 0; i < kLanes<float>; ++i) narrow(value[i], p + i);
#endif
}

// A store past the caches, p aligned to the vector.
template <class X, class V>
CEM_FAST_INLINE void stream(X* p, V value) {
#if defined(__x86_64__)
  if constexpr (sizeof(X) >= 4) {
    typedef long long Words __attribute__((vector_size(CEM_FAST_WIDTH), may_alias));
#if CEM_FAST_WIDTH == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)(Words)value);
#elif CEM_FAST_WIDTH == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)(Words)value);
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)(Words)value);
#endif
    return;
  }
#endif
  store(p, value);
}

// Whether to store rows past the caches: that saves fetching their lines, which from two megabytes on costs about what
// their reader would have saved by finding them in the last-level cache. Every row must be whole aligned vectors.
CEM_FAST_INLINE bool stream_rows(const void* rows, int64_t count, int64_t dimension, int64_t element_size) {
  const bool aligned = reinterpret_cast<uintptr_t>(rows) % 64 == 0 && dimension * element_size % 64 == 0;
  return aligned && count * dimension * element_size >= 2 << 20;
}

// Streaming stores are visible to other threads only after this.
CEM_FAST_INLINE void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- the last n < kLanes numbers of a row

// Zero in the lanes that are no part of the row. `wide`: at least kLanes numbers lie before p + n and may be read.
template <class X, class T = typename ParameterOf<X>::Type>
CEM_FAST_INLINE Vector<T> load_last(const X* p, int n, bool wide) {
  Vector<T> value{};
  if (wide || n == kLanes<T>) {
    value = load(p + n - kLanes<T>);
    return lane_index<T>() >= kLanes<T> - n ? value : Vector<T>{};
  }
  for (int i = 0; i < n; ++i) value[kLanes<T> - n + i] = widen(p[i]);
  return value;
}

// The lanes as load_last lays them out. Writes nothing else, so that neighbors may be another thread's.
template <class X, class V>
CEM_FAST_INLINE void store_last(X* p, int n, V value) {
  constexpr int lanes = static_cast<int>(sizeof(V) / sizeof(value[0]));
  if (n == lanes) return store(p, value);
  for (int i = 0; i < n; ++i) narrow(value[lanes - n + i], p + i);
}

// a * b + c with one rounding where the processor has such an instruction. Left to the compiler, the choice could
// depend on the size of a tile, and equal distances would differ.
CEM_FAST_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if CEM_FAST_WIDTH == 64
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif CEM_FAST_WIDTH == 32
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

CEM_FAST_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if CEM_FAST_WIDTH == 64
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif CEM_FAST_WIDTH == 32
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// ---- across lanes: always the same tree

template <class T, int bytes>
struct SumLanes {
  typedef T Whole __attribute__((vector_size(bytes)));
  typedef T Part __attribute__((vector_size(bytes / 2)));
  struct Parts {
    Part low, high;
  };
  static CEM_FAST_INLINE T of(Whole v) {
    const Parts parts = __builtin_bit_cast(Parts, v);
    return SumLanes<T, bytes / 2>::of(parts.low + parts.high);
  }
};

template <>
struct SumLanes<float, 16> {
  typedef float Whole __attribute__((vector_size(16)));
  static CEM_FAST_INLINE float of(Whole v) { return (v[0] + v[2]) + (v[1] + v[3]); }
};

template <>
struct SumLanes<double, 16> {
  typedef double Whole __attribute__((vector_size(16)));
  static CEM_FAST_INLINE double of(Whole v) { return v[0] + v[1]; }
};

template <class T>
CEM_FAST_INLINE T sum_lanes(Vector<T> v) {
  return SumLanes<T, CEM_FAST_WIDTH>::of(v);
}

// The sums of R vectors.
template <int R, class T>
CEM_FAST_INLINE void sum_lanes_of(const Vector<T>* v, T* out) {
#if CEM_FAST_WIDTH == 64
  if constexpr (R == 4 && sizeof(T) == 4) {
    // four sums for less than half the work of one each: halves are added, then quarters, then a transposition
    const auto halves = [](const Vector<T>& a, const Vector<T>& b, Vector<T>& sum) {
      sum = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
            __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    };
    Vector<T> a, b;
    halves(v[0], v[1], a);
    halves(v[2], v[3], b);
    const Vector<T> quarters =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    typedef T Four __attribute__((vector_size(16)));
    struct Parts {
      Four part[4];
    };
    const Parts p = __builtin_bit_cast(
        Parts, __builtin_shufflevector(quarters, quarters, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const Four sum = (p.part[0] + p.part[2]) + (p.part[1] + p.part[3]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) out[r] = sum[r];
    return;
  }
#endif
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) out[r] = sum_lanes<T>(v[r]);
}

CEM_FAST_INLINE bool all_lanes(Bits<double> mask) {
#if CEM_FAST_WIDTH == 64
  return _mm512_movepi64_mask((__m512i)mask) == 0xff;
#elif CEM_FAST_WIDTH == 32
  return _mm256_movemask_pd((__m256d)mask) == 0xf;
#else
  return (mask[0] & mask[1]) != 0;
#endif
}

// ---- kLanes<double> numbers as doubles

CEM_FAST_INLINE Vector<double> load_double(const double* p) { return load(p); }

CEM_FAST_INLINE Vector<double> load_double(const float* p) {
  typedef float Narrow __attribute__((vector_size(CEM_FAST_WIDTH / 2), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Vector<double>);
}

CEM_FAST_INLINE void store_double(double* p, Vector<double> value) { store(p, value); }

CEM_FAST_INLINE void store_double(float* p, Vector<double> value) {
  typedef float Narrow __attribute__((vector_size(CEM_FAST_WIDTH / 2)));
  typedef float Unaligned __attribute__((vector_size(CEM_FAST_WIDTH / 2), aligned(4), may_alias));
  *reinterpret_cast<Unaligned*>(p) = __builtin_convertvector(value, Narrow);
}

// Keeps a loaded vector in its register, where the compiler would load it again at every use.
template <class V>
CEM_FAST_INLINE void pin(V& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

// A vector widened to double: the first (part 0) or the second half of floats, or the doubles themselves.
CEM_FAST_INLINE Vector<double> doubles_of(Vector<double> x, int) { return x; }

CEM_FAST_INLINE Vector<double> doubles_of(Vector<float> x, int part) {
  typedef float HalfVector __attribute__((vector_size(CEM_FAST_WIDTH / 2)));
  struct Halves {
    HalfVector half[2];
  };
  return __builtin_convertvector(__builtin_bit_cast(Halves, x).half[part], Vector<double>);
}

CEM_FAST_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

template <class T>
void fill(T* out, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

template <class T>
void add(const T* terms, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] += terms[i];
}

// An uninitialized buffer, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T) + 64, std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Work below this many multiply-adds (some tens of microseconds) is not worth waking a thread for.
#ifndef CEM_FAST_SMALLEST_TASK  // lowered by tests that split small problems
#define CEM_FAST_SMALLEST_TASK (1 << 20)
#endif
constexpr int64_t kSmallestTask = CEM_FAST_SMALLEST_TASK;

// f(begin, end) over [0, items); `cost` is the multiply-adds of one item.
template <class F>
CEM_FAST_INLINE void parallel(ParallelFor parallel_for, int64_t items, int64_t cost, const F& f) {
  const int64_t grain = larger<int64_t>(1, kSmallestTask / larger<int64_t>(1, cost));
  if (items <= grain) {
    if (items > 0) f(0, items);
    return;
  }
  parallel_for(
      items, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

// exp, log and log1p of vectors of doubles, to about one unit in the last place.

CEM_FAST_INLINE Vector<double> as_double(Bits<double> bits) { return (Vector<double>)bits; }
CEM_FAST_INLINE Bits<double> as_bits(Vector<double> value) { return (Bits<double>)value; }

// For x <= 709; below -708 the result is zero.
CEM_FAST_INLINE Vector<double> exp_vector(Vector<double> x) {
  constexpr double kShift = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const Vector<double> shifted = x * 1.4426950408889634074 + kShift;
  const Vector<double> n = shifted - kShift;
  Vector<double> r = x - n * 6.93147180369123816490e-1;  // log 2 in two parts (the first has 20 zero bits at its end)
  r = r - n * 1.90821492927058770002e-10;
  Vector<double> p = broadcast(1.0 / 6227020800);
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  typedef uint64_t Words
      __attribute__((vector_size(CEM_FAST_WIDTH)));  // wraps around below -708, where nothing uses it
  const Words scale = ((Words)as_bits(shifted) << 52) + (Words)as_bits(broadcast(1.0));
  return x < -708.0 ? Vector<double>{} : p * as_double((Bits<double>)scale);
}

// 2^exponent * mantissa, mantissa in [sqrt 1/2, sqrt 2); x a positive normal number.
CEM_FAST_INLINE Vector<double> split_exponent(Vector<double> x, Vector<double>* exponent) {
  constexpr int64_t kRootHalf = 0x3fe6a09e667f3bcd;
  typedef uint64_t Words __attribute__((vector_size(CEM_FAST_WIDTH)));
  const Words offset = (Words)as_bits(x) - static_cast<uint64_t>(kRootHalf) + (1024ull << 52);
  const Words biased = offset >> 52;  // exponent + 1024
  *exponent = as_double((Bits<double>)(biased | 0x4330000000000000ull)) - (0x1p52 + 1024.0);
  return as_double((Bits<double>)((Words)as_bits(x) - ((biased - 1024) << 52)));
}

// log of a positive normal number.
CEM_FAST_INLINE Vector<double> log_normal(Vector<double> x) {
  Vector<double> n;
  const Vector<double> f = split_exponent(x, &n) - 1.0;
  // log(1 + f) = 2 atanh(s), written as f - (f^2/2 - s (f^2/2 + R)) to keep the leading term exact
  const Vector<double> s = f / (f + 2.0), z = s * s;
  Vector<double> p = broadcast(2.0 / 23);
  p = p * z + 2.0 / 21;
  p = p * z + 2.0 / 19;
  p = p * z + 2.0 / 17;
  p = p * z + 2.0 / 15;
  p = p * z + 2.0 / 13;
  p = p * z + 2.0 / 11;
  p = p * z + 2.0 / 9;
  p = p * z + 2.0 / 7;
  p = p * z + 2.0 / 5;
  p = p * z + 2.0 / 3;
  const Vector<double> half_square = 0.5 * f * f;
  return n * 6.93147180369123816490e-1 -
         ((half_square - (s * (half_square + p * z) + n * 1.90821492927058770002e-10)) - f);
}

CEM_FAST_INLINE Vector<double> log_vector(Vector<double> x) {
  const Bits<double> normal = (x >= 0x1p-1022) & (x <= 0x1.fffffffffffffp1023);
  Vector<double> y = log_normal(normal ? x : broadcast(1.0));
  if (__builtin_expect(!all_lanes(normal), 0)) {
    for (int i = 0; i < kLanes<double>; ++i) {
      if (!normal[i]) y[i] = __builtin_log(x[i]);
    }
  }
  return y;
}

CEM_FAST_INLINE Vector<double> log1p_vector(Vector<double> x) {
  const Vector<double> w = x + 1.0;
  const Bits<double> normal = (w >= 0x1p-1022) & (w <= 0x1.fffffffffffffp1023);
  const Vector<double> safe = normal ? w : broadcast(1.0);
  Vector<double> y = log_normal(safe) + (x - (w - 1.0)) / safe;  // log w, and what the rounding of 1 + x lost
  if (__builtin_expect(!all_lanes(normal), 0)) {
    for (int i = 0; i < kLanes<double>; ++i) {
      if (!normal[i]) y[i] = __builtin_log1p(x[i]);
    }
  }
  return y;
}

// Types, because a lambda that returns a vector also makes a plain function without the instruction set.
struct Exp {
  CEM_FAST_INLINE Vector<double> operator()(Vector<double> x) const { return exp_vector(x); }
};
struct Log {
  CEM_FAST_INLINE Vector<double> operator()(Vector<double> x) const { return log_vector(x); }
};

template <class F>
CEM_FAST_INLINE void map_doubles(double* values, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<double> <= n; i += kLanes<double>) store(values + i, f(load(values + i)));
  if (i < n) {
    Vector<double> last = broadcast(1.0);
    for (int64_t j = i; j < n; ++j) last[j - i] = values[j];
    last = f(last);
    for (int64_t j = i; j < n; ++j) values[j] = last[j - i];
  }
}

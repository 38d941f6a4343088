// Exponential functions, tanh and sigmoid: the same operations in the same order as elementary.py, which
// explains them. They vectorise, and no library call rounds in its own way.
#pragma once

namespace sparsify {

template <class F>
struct Format;

template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int MANTISSA = 23, BIAS = 127;
  static constexpr float ROUND_BIAS = 12582912.0f;
  static constexpr float LN2_HIGH = 0x1.62ep-1f, LN2_LOW = 0x1.0bfbe8p-15f;
  static constexpr float LEAST = -104.0f, MOST = 89.0f;
};

template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int MANTISSA = 52, BIAS = 1023;
  static constexpr double ROUND_BIAS = 6755399441055744.0;
  static constexpr double LN2_HIGH = 0x1.62e42ffp-1, LN2_LOW = -0x1.718432a1b0e26p-35;
  static constexpr double LEAST = -746.0, MOST = 710.0;
};

constexpr double INVERSE_LN2 = 0x1.71547652b82fep+0;

template <class F>
SPARSIFY_INLINE F round_to_integer(F x) {
  return (x + Format<F>::ROUND_BIAS) - Format<F>::ROUND_BIAS;
}

template <class F>
SPARSIFY_INLINE F power_of_two(F k) {
  const F biased = k + Format<F>::ROUND_BIAS;
  const auto bits = same_bits<typename Format<F>::Bits>(biased);
  return same_bits<F>((bits + Format<F>::BIAS) << Format<F>::MANTISSA);
}

// exp(r) - 1 for a small r.
SPARSIFY_INLINE float tail_of(float r) {
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 1.0f / 2;
  return r + r * r * series;
}
SPARSIFY_INLINE double tail_of(double r) {
  double series = 1.0 / 6227020800;
  series = series * r + 1.0 / 479001600;
  series = series * r + 1.0 / 39916800;
  series = series * r + 1.0 / 3628800;
  series = series * r + 1.0 / 362880;
  series = series * r + 1.0 / 40320;
  series = series * r + 1.0 / 5040;
  series = series * r + 1.0 / 720;
  series = series * r + 1.0 / 120;
  series = series * r + 1.0 / 24;
  series = series * r + 1.0 / 6;
  series = series * r + 1.0 / 2;
  return r + r * r * series;
}

template <class F>
SPARSIFY_INLINE F reduced_tail(F x, F k) {
  return tail_of(x - k * Format<F>::LN2_HIGH - k * Format<F>::LN2_LOW);
}

template <class F>
SPARSIFY_INLINE F exponential(F x) {
  x = x > Format<F>::MOST ? Format<F>::MOST : x;
  x = x < Format<F>::LEAST ? Format<F>::LEAST : x;
  const F k = round_to_integer(x * F(INVERSE_LN2));
  const F half = round_to_integer(k * F(0.5));
  return (F(1) + reduced_tail(x, k)) * power_of_two(half) * power_of_two(k - half);
}

template <class F>
SPARSIFY_INLINE F exponential_less_one(F x) {
  x = x > Format<F>::MOST ? Format<F>::MOST : x;
  x = x < F(-40) ? F(-40) : x;
  const F k = round_to_integer(x * F(INVERSE_LN2));
  const F half = power_of_two(k - F(1));
  const F found = (half * reduced_tail(x, k) + (half - F(0.5))) * F(2);
  return x == F(0) ? x : found;
}

template <class F>
SPARSIFY_INLINE F sigmoid(F x) {
  const F tail = exponential(-absolute(x));
  return (x < F(0) ? tail : F(1)) / (F(1) + tail);
}

template <class F>
SPARSIFY_INLINE F hyperbolic_tangent(F x) {
  F twice = F(2) * absolute(x);
  twice = twice > F(40) ? F(40) : twice;
  const F k = round_to_integer(twice * F(INVERSE_LN2));
  const F scale = power_of_two(k);
  const F less_one = scale * reduced_tail(twice, k) + (scale - F(1));
  return with_sign_of(less_one / (less_one + F(2)), x);
}

}  // namespace sparsify

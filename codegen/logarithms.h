// Logarithms: the same operations in the same order as logarithms.py, which explains them.
#pragma once

namespace sparsify {

template <class F>
struct Logarithm;

template <>
struct Logarithm<float> {
  static constexpr uint32_t ROOT_HALF = 0x3F3504F3u, ONE = 0x3F800000u;
  static constexpr int TERMS = 5;
  static constexpr float SUBNORMAL = 0x1p-126f, LIFT = 25.0f, LIFTED = 0x1p25f;
};

template <>
struct Logarithm<double> {
  static constexpr uint64_t ROOT_HALF = 0x3FE6A09E667F3BCDull, ONE = 0x3FF0000000000000ull;
  static constexpr int TERMS = 10;
  static constexpr double SUBNORMAL = 0x1p-1022, LIFT = 54.0, LIFTED = 0x1p54;
};

// log x + added for positive finite x.
template <class F>
SPARSIFY_INLINE F positive_logarithm(F x, F added) {
  using L = Logarithm<F>;
  using Bits = typename Format<F>::Bits;
  const bool is_small = x < L::SUBNORMAL;
  x = is_small ? x * L::LIFTED : x;
  Bits bits = same_bits<Bits>(x);
  bits += L::ONE - L::ROOT_HALF;
  F k = F(int32_t(bits >> Format<F>::MANTISSA)) - F(Format<F>::BIAS);
  k = k - (is_small ? L::LIFT : F(0));
  bits = (bits & ((Bits(1) << Format<F>::MANTISSA) - Bits(1))) + L::ROOT_HALF;
  const F less_one = same_bits<F>(bits) - F(1);
  const F s = less_one / (F(2) + less_one);
  const F square = s * s;
  F series = F(2) / F(2 * L::TERMS + 1);
  for (int n = L::TERMS - 1; n > 0; --n) series = series * square + F(2) / F(2 * n + 1);
  const F half = F(0.5) * less_one * less_one;
  const F rest = s * (half + square * series) + (k * Format<F>::LN2_LOW + added);
  return k * Format<F>::LN2_HIGH - ((half - rest) - less_one);
}

template <class F>
SPARSIFY_INLINE F logarithm_at_limits(F found, F x) {
  found = x == infinity<F>() ? x : found;
  found = x == F(0) ? -infinity<F>() : found;
  return ((x < F(0)) | (x != x)) ? not_a_number<F>() : found;
}

template <class F>
SPARSIFY_INLINE F logarithm(F x) {
  return logarithm_at_limits(positive_logarithm(x, F(0)), x);
}

template <class F>
SPARSIFY_INLINE F logarithm_of_one_plus(F x) {
  const F u = F(1) + x;
  const F lost = x - (u - F(1));
  const F found = logarithm_at_limits(positive_logarithm(u, lost / u), u);
  return x == F(0) ? x : found;
}

}  // namespace sparsify

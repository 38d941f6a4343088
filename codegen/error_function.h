// The error function: the same operations in the same order as error_function.py, which explains
// them.
#pragma once

namespace sparsify {

template <class F>
struct ErrorFunction;

template <>
struct ErrorFunction<float> {
  static constexpr int TERMS = 10, DEGREE = 6;
  static constexpr float MOST = 4.0f;
  // From the highest power down.
  static constexpr float FAR[] = {
    -0x1.736868p-3f, 0x1.d92c8ap-1f, -0x1.8185dep+0f, 0x1.710f92p-1f, 0x1.e865ap-2f,
    0x1.259ca8p-1f, -0x1.afec7ap-12f,
  };
};

template <>
struct ErrorFunction<double> {
  static constexpr int TERMS = 18, DEGREE = 17;
  static constexpr double MOST = 6.0;
  static constexpr double FAR[] = {
    0x1.449054356fa94p+6, -0x1.d85e7cecf9f9bp+8, 0x1.3deca42251e40p+10, -0x1.050efa8eb092cp+11,
    0x1.21cdb5c4d02c3p+11, -0x1.c5c59b1318822p+10, 0x1.f8da6d0237babp+9, -0x1.86a821e06b0a9p+8,
    0x1.962d6be336ddfp+6, -0x1.3d63d36047205p+4, 0x1.4113313193d66p+2, -0x1.0ad3059efe685p-1,
    -0x1.5ac574b16d271p-1, -0x1.21ca1289e1aecp-2, 0x1.20cf660a3e29ep-2, 0x1.20de82850acb7p-1,
    0x1.20dd67a0d6427p-1, 0x1.0a0b3f0f62cc4p-27,
  };
};

// (-1)**n / (n! (2 n + 1))
template <class F>
SPARSIFY_INLINE constexpr F error_coefficient(int n) {
  double factorial = 1;
  for (int i = 2; i <= n; ++i) factorial *= i;
  return F(n % 2 ? -1 : 1) / F(factorial * (2 * n + 1));
}

template <class F>
SPARSIFY_INLINE F error_function_near(F x) {
  const F square = x * x;
  F series = error_coefficient<F>(ErrorFunction<F>::TERMS);
  for (int n = ErrorFunction<F>::TERMS - 1; n >= 0; --n)
    series = series * square + error_coefficient<F>(n);
  return x * (F(0x1.20dd750429b6dp+0) * series);
}

template <class F>
SPARSIFY_INLINE F error_function_far(F size) {
  size = size > ErrorFunction<F>::MOST ? ErrorFunction<F>::MOST : size;
  const F u = F(1) / (F(1) + size);
  F series = ErrorFunction<F>::FAR[0];
  for (int n = 1; n <= ErrorFunction<F>::DEGREE; ++n) series = series * u + ErrorFunction<F>::FAR[n];
  return F(1) - exponential(-(size * size)) * series;
}

template <class F>
SPARSIFY_INLINE F error_function(F x) {
  const F size = absolute(x);
  return size < F(1) ? error_function_near(x) : with_sign_of(error_function_far(size), x);
}

}  // namespace sparsify

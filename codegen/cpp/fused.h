// Products that are added with one rounding, in vectors as long as a register or shorter.
#pragma once

namespace sparsify {

// weight * payload + sum. Processors without such an instruction take a call for each lane.
template <class V>
SPARSIFY_INLINE V fused(V weight, V payload, V sum) {
#if __has_builtin(__builtin_elementwise_fma)
  return __builtin_elementwise_fma(weight, payload, sum);
#else
  constexpr bool IS_FLOAT = sizeof(V{}[0]) == 4;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && IS_FLOAT)
    return __builtin_ia32_vfmaddps512_mask(weight, payload, sum, -1, 4);
  if constexpr (sizeof(V) == 64 && !IS_FLOAT)
    return __builtin_ia32_vfmaddpd512_mask(weight, payload, sum, -1, 4);
#endif
#if defined(__FMA__)
  if constexpr (sizeof(V) == 32 && IS_FLOAT)
    return __builtin_ia32_vfmaddps256(weight, payload, sum);
  if constexpr (sizeof(V) == 32 && !IS_FLOAT)
    return __builtin_ia32_vfmaddpd256(weight, payload, sum);
  if constexpr (sizeof(V) == 16 && IS_FLOAT)
    return __builtin_ia32_vfmaddps(weight, payload, sum);
  if constexpr (sizeof(V) == 16 && !IS_FLOAT)
    return __builtin_ia32_vfmaddpd(weight, payload, sum);
#endif
  SPARSIFY_UNROLL
  for (unsigned i = 0; i < sizeof(V) / sizeof(sum[0]); ++i)
    if constexpr (IS_FLOAT)
      sum[i] = __builtin_fmaf(weight[i], payload[i], sum[i]);
    else
      sum[i] = __builtin_fma(weight[i], payload[i], sum[i]);
  return sum;
#endif
}
SPARSIFY_INLINE Vector<float> fused(Vector<float> weight, float payload, Vector<float> sum) {
  return fused(weight, payload - Vector<float>{}, sum);
}
SPARSIFY_INLINE Vector<double> fused(Vector<double> weight, double payload, Vector<double> sum) {
  return fused(weight, payload - Vector<double>{}, sum);
}
SPARSIFY_INLINE float fused(float weight, float payload, float sum) {
  return __builtin_fmaf(weight, payload, sum);
}
SPARSIFY_INLINE double fused(double weight, double payload, double sum) {
  return __builtin_fma(weight, payload, sum);
}

}  // namespace sparsify

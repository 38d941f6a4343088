// What CUDA C++ has and C++ has not; test_emulator_language.py says what each kernel must compute.
struct Call {
  const float* a;      // [64]
  const float* b;      // [64]
  const int* i;        // [64]
  float* floats;       // [64, 16]
  int* ints;           // [64, 16]
  double* doubles;     // [64]
  unsigned* counters;  // [16]
};

extern "C" __global__ void rounded(const Call call) {
  const int t = threadIdx.x;
  const float a = call.a[t], b = call.b[t];
  float* out = call.floats + 16 * t;
  out[0] = __fadd_rn(a, b);
  out[1] = __fmul_rn(a, b);
  out[2] = __fmaf_rn(a, b, 1.0f);
  out[3] = a * b + 1.0f;  // two roundings
  out[4] = __fdiv_rn(a, b);
  out[5] = __fsqrt_rn(fabsf(a));
  out[6] = min(a, b);
  out[7] = max(a, b);
  out[8] = floor(a) + ceil(b);
  out[9] = copysignf(a, b);
  out[10] = a * 1e-42f;  // a denormal
  out[11] = fmodf(a, b);
  out[12] = rint(4.0f * a) + trunc(4.0f * b);
  out[13] = float(isnan(a)) + 2.0f * isinf(b) + 4.0f * signbit(a);
  out[14] = fminf(a, b) - fmaxf(a, b);
  out[15] = __uint2float_rn(unsigned(t)) + __int2float_rn(-t);
  call.doubles[t] = __fma_rn(double(a), double(b), 1.0) + __dadd_rn(a, b);
}

extern "C" __global__ void bits(const Call call) {
  const int t = threadIdx.x;
  const int i = call.i[t];
  int* out = call.ints + 16 * t;
  out[0] = __popc(i);
  out[1] = __clz(i);
  out[2] = __ffs(i);
  out[3] = int(__brev(unsigned(i)));
  out[4] = __popcll((long long)i << 16);
  out[5] = __clzll(i);
  out[6] = __ffsll((long long)i << 16);
  out[7] = __mulhi(i, 1 << 20);
  out[8] = int(__umulhi(unsigned(i), 1u << 20));
  out[9] = int(__funnelshift_l(unsigned(i), unsigned(t), 8));
  out[10] = int(__funnelshift_r(unsigned(i), unsigned(t), 8));
  out[11] = __float_as_int(call.a[t]);
  const int same = int(__double_as_longlong(__longlong_as_double(i)));
  out[12] = int(__float_as_uint(__int_as_float(same)));
  out[13] = __float2int_rn(call.a[t] * 8.0f) + __float2int_rz(call.b[t] * 8.0f);
  out[14] = min(i, t) + max(i, t);
  out[15] = int(__byte_perm(unsigned(i), unsigned(t), 0x8412u));
}

extern "C" __global__ void shuffles(const Call call) {
  const int t = threadIdx.x, lane = t & 31;
  int* out = call.ints + 16 * t;
  out[0] = __shfl_sync(~0u, t, 5);
  out[1] = __shfl_sync(~0u, t, 3, 8);
  out[2] = __shfl_up_sync(~0u, t, 2);
  out[3] = __shfl_down_sync(~0u, t, 2, 16);
  out[4] = __shfl_xor_sync(~0u, t, 16);
  out[5] = int(__ballot_sync(~0u, call.i[t] & 1));
  out[6] = __any_sync(~0u, call.i[t] == 7);
  out[7] = __all_sync(~0u, call.i[t] >= 0);
  out[8] = int(__match_any_sync(~0u, call.i[t] & 3));
  out[9] = __reduce_add_sync(~0u, call.i[t]);
  out[10] = __reduce_min_sync(~0u, call.i[t]) + __reduce_max_sync(~0u, call.i[t]);
  out[11] = int(__reduce_xor_sync(~0u, unsigned(call.i[t])));
  out[12] = int(__reduce_or_sync(~0u, unsigned(lane)) + __reduce_and_sync(~0u, unsigned(t | 1)));
  double wide = t;
  for (int by = 16; by; by >>= 1) wide += __shfl_xor_sync(~0u, wide, by);
  out[13] = int(wide);
  out[14] = __syncthreads_or(call.i[t] == 7) + 2 * __syncthreads_and(call.i[t] < 1000);
  out[15] = __syncthreads_count(call.i[t] & 1);
}

extern "C" __global__ void atomics(const Call call) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  unsigned* counters = call.counters;
  atomicAdd(&counters[0], 1u);
  atomicMax(&counters[1], unsigned(t));
  atomicMin(&counters[2], unsigned(t));
  atomicOr(&counters[3], 1u << (t & 31));
  atomicXor(&counters[4], unsigned(t));
  atomicAdd(reinterpret_cast<unsigned long long*>(counters + 6), 1ull << 31);
  atomicAdd(reinterpret_cast<float*>(counters + 8), 0.5f);
  atomicInc(&counters[9], 9u);
  atomicSub(&counters[10], 2u);
  unsigned seen = *static_cast<volatile unsigned*>(&counters[11]), old;
  do {
    old = seen;
    seen = atomicCAS(&counters[11], old, old + 3);
  } while (seen != old);
}

struct alignas(16) Pair {
  float weight;
  int index;
  double sum;
};
static_assert(sizeof(float4) == 16 && alignof(float4) == 16 && alignof(float3) == 4 && alignof(double2) == 16);

extern "C" __global__ void vectors(const Call call) {
  extern __shared__ __align__(16) unsigned char bytes[];
  Pair* pairs = reinterpret_cast<Pair*>(bytes);
  const int t = threadIdx.x;
  pairs[t] = {call.a[t], t, 2.0 * t};
  __syncthreads();
  const Pair other = pairs[63 - t];
  const float4 four = t < 16 ? __ldg(reinterpret_cast<const float4*>(call.a) + t) : make_float4(1, 2, 3, 4);
  float4* out = reinterpret_cast<float4*>(call.floats + 16 * t);
  out[0] = four;
  __stcg(out + 1, make_float4(other.weight, other.index, other.sum, four.x + four.w));
  __stcs(out + 2, __ldcs(out));
  out[3] = __ldcg(out + 1);
}

// A cluster's barrier, ranks, and the memory of others.
extern "C" __global__ void clusters(const Call call) {
  __shared__ int from[4];
  const unsigned rank = __clusterRelativeBlockRank(), size = __clusterSizeInBlocks();
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  if (threadIdx.x < size) *static_cast<int*>(__cluster_map_shared_rank(&from[rank], threadIdx.x)) = blockIdx.x;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  int* out = call.ints + 16 * blockIdx.x;
  if (threadIdx.x < size) out[threadIdx.x] = from[threadIdx.x];
  if (threadIdx.x) return;
  out[8] = int(rank + 10 * size);
  out[9] = int(__clusterIdx().x + 10 * __clusterGridDimInClusters().x);
  out[10] = int(__cluster_query_shared_rank(__cluster_map_shared_rank(from, 1)));
  out[11] = int(gridDim.x + 100 * blockDim.x);
}

__constant__ int PRIMES[4] = {2, 3, 5, 7};
template <int SIZE>
__device__ __forceinline__ int sum_of(const int (&numbers)[SIZE]) {
  int sum = 0;
#pragma unroll
  for (int i = 0; i < SIZE; ++i) sum += numbers[i];
  return sum;
}
template <class T>
__device__ T shared_sum(T mine) {
  __shared__ T all[64];
  all[threadIdx.x] = mine;
  __syncthreads();
  T sum = 0;
  for (int i = 0; i < 64; ++i) sum += all[i];
  __syncthreads();
  return sum;
}
extern "C" __global__ void __launch_bounds__(64, 1) declarations(const Call call) {
  __shared__ volatile int flag;
  if (threadIdx.x == 0) flag = sum_of(PRIMES);
  __syncthreads();
  call.ints[16 * threadIdx.x] = flag + shared_sum(int(threadIdx.x)) + int(shared_sum(0.5f)) + warpSize;
}

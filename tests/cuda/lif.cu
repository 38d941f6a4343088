// A recurrent layer of leaky neurons, by hand: 4 blocks share the neurons of each batch row and meet
// once a step. Every barrier and fence is needed (test_emulator_mutants.py takes each away).
constexpr int NEURONS = 256, THREADS = 64, BLOCKS = NEURONS / THREADS, WORDS = NEURONS / 32;

struct Call {
  const float* weights;  // [NEURONS senders][NEURONS]
  const float* inputs;   // [steps, rows, NEURONS]
  float* potentials;     // [rows, NEURONS]
  unsigned char* spikes; // [steps, rows, NEURONS]
  unsigned* masks;       // [2, rows, WORDS], zeros
  unsigned* arrivals;    // [1], zero
  long long steps, rows;
};

__device__ void wait_for_grid(unsigned* arrivals, unsigned goal) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrivals, 1u);
    while (*static_cast<volatile unsigned*>(arrivals) < goal) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

// The indices of the set bits, ascending; returns how many there are.
__device__ int list_events(const unsigned* mask, int* events, int* totals) {
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  int before = 0;
  for (int first = 0; first < NEURONS; first += THREADS) {
    const unsigned bits = __ldcg(&mask[(first + t) >> 5]);
    const unsigned ballot = __ballot_sync(~0u, bits >> lane & 1u);
    if (lane == 0) totals[warp] = __popc(ballot);
    __syncthreads();
    const int place = before + (warp ? totals[0] : 0) + __popc(ballot & ((1u << lane) - 1u));
    if (ballot >> lane & 1u) events[place] = first + t;
    before += totals[0] + totals[1];
    __syncthreads();
  }
  return before;
}

extern "C" __global__ void __launch_bounds__(THREADS) run_lif(const Call call) {
  __shared__ int events[NEURONS];
  __shared__ int totals[THREADS / 32];
  const int n = blockIdx.x % BLOCKS * THREADS + threadIdx.x;
  const long long row = blockIdx.x / BLOCKS;
  float v = 0.0f;
  for (long long step = 0; step < call.steps; ++step) {
    const unsigned* before = call.masks + ((step & 1) * call.rows + row) * WORDS;
    unsigned* after = call.masks + ((step + 1 & 1) * call.rows + row) * WORDS;
    const int count = list_events(before, events, totals);
    float sum = call.inputs[(step * call.rows + row) * NEURONS + n];
    for (int e = 0; e < count; ++e) sum += __ldg(&call.weights[events[e] * NEURONS + n]);
    v = 0.875f * v + sum;
    const bool fires = v >= 1.0f;
    if (fires) v -= 1.0f;
    call.spikes[(step * call.rows + row) * NEURONS + n] = fires;
    const unsigned ballot = __ballot_sync(~0u, fires);
    if (threadIdx.x % 32 == 0) after[n / 32] = ballot;
    wait_for_grid(call.arrivals, gridDim.x * unsigned(step + 1));
  }
  call.potentials[row * NEURONS + n] = v;
}

// What dense-tiles is made of: numbers in parts, and sums of 64 batch rows and 520 senders for a
// slice of 12 receivers.
#include "slice_sums.cuh"
#include "tile_sums.cuh"

using namespace sparsify;

constexpr int ROWS = 64, SENDERS = 520, SLICE = 12, PARTS = 3;

struct Call {
  const float* values;   // [rows][senders], or numbers [rows]; of halves, too
  const float* weights;  // [senders][slice]; the same
  float* result;         // [rows][slice], or parts of numbers [rows][3]
  int64_t rows, width;
};

template <class P>
__device__ void take_apart(const Call& call) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= call.rows) return;
  const P parts(call.values[i]);
  for (int part = 0; part < PARTS; ++part) call.result[i * PARTS + part] = parts.at[part];
}
extern "C" __global__ void run_parts(const Call call) { take_apart<Parts>(call); }
extern "C" __global__ void run_cut_parts(const Call call) { take_apart<CutParts>(call); }

// Weights are W, and so are values.
template <class W, int USED>
__device__ void add(const Call& call) {
  __shared__ TileValues<ROWS, USED> values;
  __shared__ float sums[ROWS][blocks_of(SENDERS)][SLICE];
  const Streamed<SLICE, float, W> weights{reinterpret_cast<const W*>(call.weights)};
  const int rows = int(call.rows);
  for (int block = 0; block < blocks_of(SENDERS); ++block) {
    __syncthreads();
    for (int row = warp_of(); row < whole_tiles(rows); row += warps_of()) {
      const Given<W> source{reinterpret_cast<const W*>(call.values) + row * SENDERS};
      values.template keep<W, USED>(row, source, block, SENDERS, row < rows);
    }
    __syncthreads();
    add_tiles<W, USED>(sums, weights, values, block, SENDERS, rows, int(call.width));
  }
  __syncthreads();
  for (int item = threadIdx.x; item < rows * call.width; item += blockDim.x) {
    const int row = item / int(call.width), i = item % int(call.width);
    call.result[row * SLICE + i] = add_blocks(sums[row], i);
  }
}

extern "C" __global__ void run_binary(const Call call) { add<float, 1>(call); }
extern "C" __global__ void run_real(const Call call) { add<float, 3>(call); }
extern "C" __global__ void run_bfloat16(const Call call) { add<bfloat16, 1>(call); }
extern "C" __global__ void run_float16(const Call call) { add<float16, 1>(call); }

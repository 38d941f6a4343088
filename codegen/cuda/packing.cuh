// Weights as kernels read them, in rows of padded length, and whether all of them are finite. One
// launch packs all weights of a call that have the same type.
#pragma once

#include "last_block.cuh"

namespace sparsify {

constexpr int JOBS = 8;   // weights of a launch
constexpr int SIDE = 32;  // of the squares that a block of threads moves, one after the other
constexpr int PACKING_WARPS = 8, PACKING_THREADS = PACKING_WARPS * WARP;

// Element (r, c) of `columns` is at weight[r * down + c * across], and at packed[r * row + c]; up to the
// end of the row there are zeros. Without `packed`, weights are only looked at. `total` becomes 0, or
// infinite if a weight is not finite; without it nobody asks. `progress` is 0 between launches, and
// `blocks` of threads share the squares.
template <class T>
struct Job {
  const T* weight;
  T* packed;
  decltype(+T())* total;
  unsigned* progress;
  int64_t rows, columns, row, down, across, blocks;
};

template <class T>
struct PackingCall {
  Job<T> jobs[JOBS];
};

// Moves a square through shared memory: neighbouring lanes read what is together, and write so.
// Returns whether what the thread has read is finite.
template <class T>
SPARSIFY_INLINE bool pack_square(const Job<T>& job, int64_t first_row, int64_t first_column,
                                 T (&square)[SIDE][SIDE + 1]) {
  const bool is_turned = job.across != 1;
  bool finite = true;
#pragma unroll
  for (int k = warp_of(); k < SIDE; k += PACKING_WARPS) {
    const int r = is_turned ? lane_of() : k, c = is_turned ? k : lane_of();
    const bool inside = first_row + r < job.rows && first_column + c < job.columns;
    T value = T(0.0f);
    if (inside) value = job.weight[(first_row + r) * job.down + (first_column + c) * job.across];
    finite = finite && is_finite(+value);
    square[r][c] = value;
  }
  if (!job.packed) return finite;
  __syncthreads();
#pragma unroll
  for (int r = warp_of(); r < SIDE; r += PACKING_WARPS) {
    const int64_t to = first_row + r, c = first_column + lane_of();
    if (to < job.rows && c < job.row) job.packed[to * job.row + c] = square[r][lane_of()];
  }
  __syncthreads();
  return finite;
}

// By block number `block` of those of the job. The last one to come says what all have seen.
template <class T>
SPARSIFY_INLINE void pack_weight(const Job<T>& job, int64_t block) {
  __shared__ T square[SIDE][SIDE + 1];
  const int64_t wide = (job.row + SIDE - 1) / SIDE, high = (job.rows + SIDE - 1) / SIDE;
  bool wild = false;
  for (int64_t at = block; at < high * wide; at += job.blocks)
    wild |= !pack_square(job, at / wide * SIDE, at % wide * SIDE, square);
  typedef decltype(+T()) F;
  if (job.total && is_last_block(job.progress, unsigned(job.blocks), wild))
    *job.total = wild ? infinity<F>() : F(0);
}

template <class T>
SPARSIFY_INLINE void pack_weights(const PackingCall<T>& call) {
  int64_t block = blockIdx.x;
  for (int job = 0; job < JOBS; ++job) {
    if (block >= 0 && block < call.jobs[job].blocks) pack_weight(call.jobs[job], block);
    block -= call.jobs[job].blocks;
  }
}

}  // namespace sparsify

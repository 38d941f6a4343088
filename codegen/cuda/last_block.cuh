// The last of some blocks of threads learns what any thread of them has seen; none waits for others.
#pragma once

#include "device.cuh"

namespace sparsify {

constexpr unsigned SEEN = 1u << 16;  // what a block adds to `progress` if one of its threads has seen it

// By all threads of `blocks` blocks, of which there are fewer than 65536. True for the first thread of
// the last one that comes; `seen` is then whether any thread has. `progress` is 0 between launches.
SPARSIFY_INLINE bool is_last_block(unsigned* progress, unsigned blocks, bool& seen) {
  const unsigned mine = __syncthreads_or(seen) ? 1u + SEEN : 1u;
  if (threadIdx.x) return false;
  const unsigned now = atomicAdd(progress, mine) + mine;
  if (now % SEEN != blocks) return false;
  seen = now > SEEN;
  atomicExch(progress, 0u);
  return true;
}

}  // namespace sparsify

// The masked rows of a slice of receivers, for sums of a team: see slice_sums.cuh.
#pragma once

#include "masked_rows.cuh"
#include "slice_sums.cuh"

namespace sparsify {

// From a sender and a receiver of the slice to the weight. All weights are read where there was not
// room for those that are not zero.
template <int SLICE, int ROOM, int ROW, class F, class W = F>
struct MaskedSlice {
  bool fits;
  MaskedRows<SLICE, ROOM, F, W> kept;
  Streamed<ROW, F, W> whole;

  SPARSIFY_INLINE F operator()(int s, int i) const { return fits ? kept(s, i) : whole(s, i); }
};

}  // namespace sparsify

// Packs weights without their zeros; Python loads it when the first such weight is met.
#include "compress.h"

using namespace sparsify;

#pragma GCC visibility push(default)
extern "C" {

int sparsify_count_kept(const Runtime* runtime, const void* words, int word_bytes,
                        const int64_t* shape, uint64_t exponent, int64_t band, int64_t run,
                        int64_t together, uint32_t* starts, int threads) {
  teams = runtime;
  bool all_finite = true;
  with_matrix(words, word_bytes, shape, exponent, [&](const auto& from) {
    all_finite = count_kept(from, band, run, together, starts, threads);
  });
  return all_finite;
}

void sparsify_fill_kept(const Runtime* runtime, const void* words, int word_bytes,
                        const int64_t* shape, int64_t band, int64_t run, int apart,
                        const uint32_t* starts, uint16_t* places, void* weights, int threads) {
  teams = runtime;
  with_matrix(words, word_bytes, shape, 0, [&](const auto& from) {
    auto* const to = static_cast<FloatOf<decltype(from)>*>(weights);
    fill_kept(from, band, run, apart != 0, starts, places, to, threads);
  });
}

void sparsify_fill_masked(const Runtime* runtime, const void* words, int word_bytes,
                          const int64_t* shape, int64_t tile, uint32_t* starts, void* lines,
                          int threads) {
  teams = runtime;
  with_matrix(words, word_bytes, shape, 0, [&](const auto& from) {
    fill_masked(from, tile, starts, static_cast<FloatOf<decltype(from)>*>(lines), threads);
  });
}

}  // extern "C"
#pragma GCC visibility pop

// The support library that Python loads once per process; see runtime.py for its callers.
#include "runtime.h"

#include "thread_pool.h"
#include "weights.h"

using namespace sparsify;

namespace {

const Runtime table = {
    [](Body body, void* context, int threads) { pool->parallel(body, context, threads); },
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const Runtime* sparsify_table() { return &table; }

// Lets teams be formed of the threads that torch uses; see thread_pool.h.
void sparsify_use_openmp(decltype(OpenMP::parallel) parallel, decltype(OpenMP::thread_num) thread_num,
                         decltype(OpenMP::num_threads) num_threads,
                         decltype(OpenMP::max_threads) max_threads) {
  pool->use(OpenMP{parallel, thread_num, num_threads, max_threads});
}

int sparsify_uses_openmp() { return pool->uses_openmp(); }

uint64_t sparsify_hash(const unsigned char* rows, int64_t count, int64_t row_bytes,
                       int64_t stride_bytes, int threads) {
  return hash_rows(rows, count, row_bytes, stride_bytes, threads);
}

int sparsify_pack_float16(const uint16_t* weight, int64_t receivers, int64_t senders,
                          int64_t stride_r, int64_t stride_s, int64_t tile, uint16_t* tiles,
                          int threads) {
  return pack<uint16_t, 0x7C00u>(weight, receivers, senders, stride_r, stride_s, tile, tiles,
                                 threads);
}

int sparsify_pack_bfloat16(const uint16_t* weight, int64_t receivers, int64_t senders,
                           int64_t stride_r, int64_t stride_s, int64_t tile, uint16_t* tiles,
                           int threads) {
  return pack<uint16_t, 0x7F80u>(weight, receivers, senders, stride_r, stride_s, tile, tiles,
                                 threads);
}

int sparsify_pack32(const uint32_t* weight, int64_t receivers, int64_t senders, int64_t stride_r,
                    int64_t stride_s, int64_t tile, uint32_t* tiles, int threads) {
  return pack<uint32_t, 0x7F800000u>(weight, receivers, senders, stride_r, stride_s, tile, tiles,
                                     threads);
}

int sparsify_pack64(const uint64_t* weight, int64_t receivers, int64_t senders, int64_t stride_r,
                    int64_t stride_s, int64_t tile, uint64_t* tiles, int threads) {
  return pack<uint64_t, 0x7FF0000000000000u>(weight, receivers, senders, stride_r, stride_s, tile,
                                             tiles, threads);
}

int64_t sparsify_count8(const uint8_t* words, int64_t count, uint8_t mask, int threads) {
  return count_nonzero(words, count, mask, threads);
}

int64_t sparsify_count16(const uint16_t* words, int64_t count, uint16_t mask, int threads) {
  return count_nonzero(words, count, mask, threads);
}

int64_t sparsify_count32(const uint32_t* words, int64_t count, uint32_t mask, int threads) {
  return count_nonzero(words, count, mask, threads);
}

int64_t sparsify_count64(const uint64_t* words, int64_t count, uint64_t mask, int threads) {
  return count_nonzero(words, count, mask, threads);
}

}  // extern "C"
#pragma GCC visibility pop

// The support library that Python loads once per process; see runtime.py for its callers.
#include "runtime.h"

#include "prepared_call.h"
#include "thread_pool.h"
#include "weights.h"
#include "write_watch.h"

using namespace sparsify;

namespace {

const Runtime table = {
    [](Body body, void* context, int threads) {
      pool->parallel(body, context, threads, take_aside());
    },
};

[[maybe_unused]] const bool has_teams = (teams = &table) != nullptr;

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

// Teams are formed however late their threads are, which tests of teams want.
void sparsify_ignore_lateness(int is_ignored) { Lateness::ignore(is_ignored != 0); }

uint64_t sparsify_hash(const unsigned char* rows, int64_t count, int64_t row_bytes,
                       int64_t stride_bytes, int threads) {
  return hash_rows(rows, count, row_bytes, stride_bytes, threads);
}

int sparsify_pack(const void* words, int word_bytes, const int64_t* shape, uint64_t exponent,
                  int64_t tile, void* tiles, int threads) {
  bool all_finite = true;
  with_matrix(words, word_bytes, shape, exponent, [&](const auto& from) {
    all_finite = pack(from, tile, static_cast<FloatOf<decltype(from)>*>(tiles), threads);
  });
  return all_finite;
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

// Null where the memory cannot be watched.
Watched* sparsify_watch(const unsigned char* data, int64_t bytes) {
  return take_watched(data, bytes);
}

void sparsify_unwatch(Watched* watched) {
  watch->release(watched->pages);
  delete watched;
}

uint64_t sparsify_watch_mark(const Watched* watched) { return watch->mark(*watched->pages); }

uint64_t sparsify_watch_edges(const Watched* watched) { return watched->hash_edges(); }

int sparsify_is_unwritten(const Question* question) { return question->is_unwritten(); }

int sparsify_call(const Prepared* prepared, void* const* pointers, const Question* questions,
                  int64_t count) {
  return call(&table, *prepared, pointers, questions, count);
}

}  // extern "C"
#pragma GCC visibility pop

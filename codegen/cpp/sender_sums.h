// What the listed senders of a channel read of the receivers: a vector of sums each, and their totals.
#pragma once

#include "strips.h"

namespace sparsify {

constexpr int MOST_WEIGHTS = VECTOR_BYTES == 64 ? 25 : 9;  // that stay in registers

// sums[k] += what `count` senders of a class read of one tile of receivers through some taps.
template <int CLASS, int FIRST, int COUNT, class Map, class F>
SPARSIFY_INLINE void multiply_taps(F* sums, const F* tile, const F* weights, const int32_t* place,
                                   int32_t count) {
  constexpr int64_t TILE = CHANNEL_TILE, VECTORS = TILE / WIDTH<F>;
  constexpr ClassTaps<Map> taps(CLASS);
  Vector<F> weight[COUNT * VECTORS];
  SPARSIFY_UNROLL
  for (int t = 0; t < COUNT; ++t)
    SPARSIFY_UNROLL
    for (int v = 0; v < VECTORS; ++v)
      weight[t * VECTORS + v] = load(weights + taps.tap[FIRST + t] * TILE + v * WIDTH<F>);
  for (int32_t k = 0; k < count; ++k) {
    const F* const from = tile + place[k] * TILE;
    SPARSIFY_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      F* const at = sums + k * TILE + v * WIDTH<F>;
      Vector<F> sum = load(at);
      SPARSIFY_UNROLL
      for (int t = 0; t < COUNT; ++t)
        sum = fused(load(from + taps.place[FIRST + t] * TILE + v * WIDTH<F>),
                    weight[t * VECTORS + v], sum);
      store(at, sum);
    }
  }
}

template <int CLASS, int FIRST, class Map, class F>
SPARSIFY_INLINE void multiply_all_taps(F* sums, const F* tile, const F* weights, const int32_t* place,
                                       int32_t count) {
  constexpr int VECTORS = CHANNEL_TILE / WIDTH<F>, LEFT = ClassTaps<Map>(CLASS).count - FIRST;
  constexpr int MOST = MOST_WEIGHTS / VECTORS;
  if constexpr (LEFT > 0) {
    constexpr int COUNT = LEFT < MOST ? LEFT : MOST;
    multiply_taps<CLASS, FIRST, COUNT, Map>(sums, tile, weights, place, count);
    multiply_all_taps<CLASS, FIRST + COUNT, Map>(sums, tile, weights, place, count);
  }
}

template <int CLASS, class Map, class F>
void multiply_classes(F* sums, const F* tile, const F* weights, const int32_t* place,
                      const Run* runs) {
  if (const int32_t count = runs[CLASS].count) {
    multiply_all_taps<CLASS, 0, Map>(sums, tile, weights, place, count);
    sums += count * CHANNEL_TILE, place += count;
  }
  if constexpr (CLASS + 1 < Strips<Map>::CLASSES)
    multiply_classes<CLASS + 1, Map>(sums, tile, weights, place, runs);
}

// out[target[k]] = the sum of the lanes of sums[k].
template <class F>
void write_sums(F* out, const int32_t* target, const F* sums, int64_t count) {
  using Word = typename WordOf<sizeof(F)>::type;
  using Row = typename RowOf<Word>::anywhere;
  constexpr int64_t TILE = CHANNEL_TILE, n = Square<Word>::n;
  typedef F Lanes __attribute__((vector_size(sizeof(Row))));
  int64_t k = 0;
  for (; k + n <= count; k += n) {
    Square<Word> square;
    for (int64_t i = 0; i < n; ++i) {
      Lanes sum{};
      for (int64_t lane = 0; lane < TILE; lane += n)
        sum += reinterpret_cast<Lanes>(*reinterpret_cast<const Row*>(sums + (k + i) * TILE + lane));
      square.rows[i] = reinterpret_cast<typename Square<Word>::Row>(sum);
    }
    square.transpose();
    Lanes total{};
    for (int64_t i = 0; i < n; ++i) total += reinterpret_cast<Lanes>(square.rows[i]);
    for (int64_t i = 0; i < n; ++i) out[target[k + i]] = total[i];
  }
  for (; k < count; ++k) {
    F total = 0;
    for (int64_t lane = 0; lane < TILE; ++lane) total += sums[k * TILE + lane];
    out[target[k]] = total;
  }
}

}  // namespace sparsify

// Steps that threads compute for each other, before one of them reads the results.
#pragma once

namespace sparsify {

// How many steps of so many rows a dense product takes at once, a divisor of STEPS: weights are read
// once for eight rows or more.
constexpr int64_t steps_at_once(int64_t rows) { return rows > 4 ? 1 : rows > 2 ? 2 : rows > 1 ? 4 : 8; }

constexpr int64_t least(int64_t some, int64_t others) { return some < others ? some : others; }

// Hands the results of steps on, in a ring of RING slots. Numbers of steps ascend through all rows of
// a thread; number n lies in slot n % RING. Steps are taken in blocks by whoever has time for them.
template <int64_t RING>
struct Ring {
  struct alignas(64) Line {  // of its own, because others wait for it
    int64_t number;
  };
  Line* ready;  // [RING], one more than the step that a slot holds
  Line* taken;  // where the next block begins
  Line* read;   // how many steps were read

  explicit Ring(Arena& arena)
      : ready(arena.take<Line>(RING)), taken(arena.take<Line>(1)), read(arena.take<Line>(1)) {}

  void clear() const {
    for (int64_t slot = 0; slot < RING; ++slot) ready[slot].number = 0;
    taken->number = read->number = 0;
  }

  // The first of a block of steps that the caller has to compute; `end` if none is left before that,
  // and FULL as long as their slots are still to be read.
  // `known` is how many steps the caller knows to be read: asking for that takes longer than a step
  // where threads do not share a cache.
  static constexpr int64_t FULL = -1;
  int64_t take(int64_t at_once, int64_t end, int64_t& known) const {
    int64_t number = __atomic_load_n(&taken->number, __ATOMIC_RELAXED);
    do {
      if (number >= end) return end;
      const int64_t last = least(number + at_once, end);
      if (last > known + RING) known = __atomic_load_n(&read->number, __ATOMIC_ACQUIRE);
      if (last > known + RING) return FULL;
    } while (!__atomic_compare_exchange_n(&taken->number, &number, number + at_once, true,
                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return number;
  }
  int64_t await_block(int64_t at_once, int64_t end, int64_t& known, const Team& team) const {
    int64_t number = FULL;
    wait_until([&] { return (number = take(at_once, end, known)) != FULL; }, team);
    return number;
  }
  // A block of steps by the number of the first one.
  void publish(int64_t number) const {
    __atomic_store_n(&ready[number % RING].number, number + 1, __ATOMIC_RELEASE);
  }

  // For the one thread that reads.
  bool is_ready(int64_t number) const {
    return __atomic_load_n(&ready[number % RING].number, __ATOMIC_ACQUIRE) == number + 1;
  }
  void fetch_ready(int64_t number) const { __builtin_prefetch(&ready[number % RING]); }
  void release(int64_t number) const {
    __atomic_store_n(&read->number, number + 1, __ATOMIC_RELEASE);
  }
};

// Asks for the sums of a tile at this step, and at the next one, which are `step` further.
template <class F>
SPARSIFY_INLINE void fetch_steps(const F* sums, int64_t step, bool now, bool next) {
  for (int64_t i = now ? 0 : step; i < (next ? 2 * step : step); i += 64 / int64_t(sizeof(F)))
    __builtin_prefetch(sums + i);
}

// gather_dense for each of some steps: sums of a step are `sums_step` further, its values `source_step`.
// Where the rows of all steps lie evenly, they are those of one product.
template <int TILE, class F, class W>
inline void gather_dense_steps(F* sums, int64_t sums_step, const W* weight, const F* source,
                               int64_t source_step, int64_t source_row, int64_t rows, int64_t steps,
                               int64_t senders) {
  const bool is_even = rows * TILE == sums_step && (rows == 1 || rows * source_row == source_step);
  const int64_t row = rows == 1 ? source_step : source_row, products = is_even ? 1 : steps;
  for (int64_t k = 0; k < products; ++k)
    gather_dense<TILE>(sums + k * sums_step, weight, source + k * source_step, is_even ? row : source_row,
                       is_even ? rows * steps : rows, senders);
}

}  // namespace sparsify

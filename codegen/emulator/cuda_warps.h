// Collectives of a warp. The mask names the lanes that take part; all of them must come.
#pragma once

namespace emulator {

template <class T>
inline unsigned long long word_of(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  unsigned long long word = 0;
  __builtin_memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
inline T value_of(unsigned long long word) {
  T value;
  __builtin_memcpy(&value, &word, sizeof(T));
  return value;
}
inline int lane_index() { return int(emulator_thread_index().x & 31); }

template <class T>
inline T shuffle(unsigned mask, T value, int from, Place place) {
  return value_of<T>(emulator_collective(Collective::shuffle, mask, word_of(value), from, place));
}
// A lane that would read beyond its group of `width` lanes reads its own value.
inline int first_of_group(int width) { return lane_index() & ~(width - 1); }
inline int within_group(int from, int width) {
  const int first = first_of_group(width);
  return from >= first && from < first + width ? from : lane_index();
}

}  // namespace emulator

inline void __syncwarp(unsigned mask = ~0u, EMULATOR_PLACE) {
  emulator::emulator_collective(emulator::Collective::sync, mask, 0, 0, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
  return unsigned(
      emulator::emulator_collective(emulator::Collective::ballot, mask, predicate != 0, 0, place));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
  return int(
      emulator::emulator_collective(emulator::Collective::any, mask, predicate != 0, 0, place));
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
  return int(
      emulator::emulator_collective(emulator::Collective::all, mask, predicate != 0, 0, place));
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, EMULATOR_PLACE) {
  return unsigned(emulator::emulator_collective(emulator::Collective::match, mask,
                                                emulator::word_of(value), 0, place));
}
inline unsigned __activemask(EMULATOR_PLACE) {
  emulator::emulator_fail("__activemask() has no value that a kernel may rely on", place);
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32, EMULATOR_PLACE) {
  return emulator::shuffle(mask, value, emulator::first_of_group(width) | (from & (width - 1)),
                           place);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, EMULATOR_PLACE) {
  const int from = emulator::lane_index() ^ with;
  const bool later_group = from >= emulator::first_of_group(width) + width;
  return emulator::shuffle(mask, value, later_group ? emulator::lane_index() : from, place);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATOR_PLACE) {
  return emulator::shuffle(mask, value,
                           emulator::within_group(emulator::lane_index() - int(by), width), place);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATOR_PLACE) {
  return emulator::shuffle(mask, value,
                           emulator::within_group(emulator::lane_index() + int(by), width), place);
}

// The argument says whether values are compared with their sign.
#define EMULATOR_REDUCE(NAME, WHAT)                                                              \
  inline unsigned NAME(unsigned mask, unsigned value, EMULATOR_PLACE) {                          \
    return unsigned(                                                                             \
        emulator::emulator_collective(emulator::Collective::WHAT, mask, value, 0, place));       \
  }                                                                                              \
  inline int NAME(unsigned mask, int value, EMULATOR_PLACE) {                                    \
    return int(emulator::emulator_collective(emulator::Collective::WHAT, mask,                   \
                                             (unsigned long long)(long long)(value), 1, place)); \
  }
EMULATOR_REDUCE(__reduce_add_sync, add)
EMULATOR_REDUCE(__reduce_min_sync, min)
EMULATOR_REDUCE(__reduce_max_sync, max)
#undef EMULATOR_REDUCE
#define EMULATOR_REDUCE_BITS(NAME, WHAT)                                                   \
  inline unsigned NAME(unsigned mask, unsigned value, EMULATOR_PLACE) {                    \
    return unsigned(                                                                       \
        emulator::emulator_collective(emulator::Collective::WHAT, mask, value, 0, place)); \
  }
EMULATOR_REDUCE_BITS(__reduce_and_sync, bit_and)
EMULATOR_REDUCE_BITS(__reduce_or_sync, bit_or)
EMULATOR_REDUCE_BITS(__reduce_xor_sync, bit_xor)
#undef EMULATOR_REDUCE_BITS

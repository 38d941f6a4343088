// Barriers of a block or of some of its warps, fences, the clock, loads and stores with a cache hint.
#pragma once

inline void __syncthreads(EMULATOR_PLACE) {
  emulator::emulator_block_barrier(emulator::Vote::none, 0, place);
}
inline int __syncthreads_count(int predicate, EMULATOR_PLACE) {
  return emulator::emulator_block_barrier(emulator::Vote::count, predicate != 0, place);
}
inline int __syncthreads_or(int predicate, EMULATOR_PLACE) {
  return emulator::emulator_block_barrier(emulator::Vote::any, predicate != 0, place);
}
inline int __syncthreads_and(int predicate, EMULATOR_PLACE) {
  return emulator::emulator_block_barrier(emulator::Vote::all, predicate != 0, place);
}
// Of so many threads of the block, of whole warps.
inline void __barrier_sync_count(unsigned barrier, unsigned threads, EMULATOR_PLACE) {
  emulator::emulator_named_barrier(barrier, threads, place);
}

inline void __threadfence_block() { emulator::emulator_fence(emulator::Scope::block); }
inline void __threadfence() { emulator::emulator_fence(emulator::Scope::device); }
inline void __threadfence_system() { emulator::emulator_fence(emulator::Scope::device); }

inline void __nanosleep(unsigned, EMULATOR_PLACE) { emulator::emulator_sleep(place); }
inline long long clock64() { return emulator::emulator_clock(); }
inline int clock() { return int(emulator::emulator_clock()); }
[[noreturn]] inline void __trap(EMULATOR_PLACE) { emulator::emulator_fail("__trap()", place); }
#define assert(condition) \
  ((condition) ? void() : emulator::emulator_fail("assert(" #condition ")", {__FILE__, __LINE__}))

namespace emulator {
template <class T>
struct Same {
  typedef T type;
};  // a parameter that does not take part in finding T
}  // namespace emulator

// The cache of __ldg is not kept up to date: what a kernel writes must not be read through it.
#ifdef EMULATOR_CHECKS
template <class T>
EMULATOR_UNCHECKED T __ldg(const T* from) {
  emulator::emulator_before_read_only(from, sizeof(T), __builtin_return_address(0));
  return *from;
}
#else
template <class T>
inline T __ldg(const T* from) {
  return *from;
}
#endif
// The others are ordinary accesses to data; a flag that threads wait for must be volatile.
template <class T>
inline T __ldca(const T* from) {
  return *from;
}
template <class T>
inline T __ldcg(const T* from) {
  return *from;
}
template <class T>
inline T __ldcs(const T* from) {
  return *from;
}
template <class T>
inline void __stcg(T* to, typename emulator::Same<T>::type value) {
  *to = value;
}
template <class T>
inline void __stcs(T* to, typename emulator::Same<T>::type value) {
  *to = value;
}
template <class T>
inline void __stwt(T* to, typename emulator::Same<T>::type value) {
  *to = value;
}

// Atomics. One thread of the processor runs all threads of a kernel, so each is a plain read and
// write; the checks are told that it is atomic, and the scheduler may let another thread go first.
#pragma once

#define EMULATOR_ATOMIC(NAME, TYPE, RESULT)                                                       \
  EMULATOR_UNCHECKED inline TYPE NAME(TYPE* address, TYPE value) {                                \
    emulator::emulator_before_atomic(address, sizeof(TYPE), __builtin_return_address(0));         \
    const TYPE old = *address;                                                                    \
    const TYPE result = (TYPE)(RESULT);                                                           \
    if (emulator::word_of(result) != emulator::word_of(old)) emulator::emulator_memory_changed(); \
    *address = result;                                                                            \
    return old;                                                                                   \
  }
#define EMULATOR_ATOMICS_OF_NUMBERS(TYPE)       \
  EMULATOR_ATOMIC(atomicAdd, TYPE, old + value) \
  EMULATOR_ATOMIC(atomicExch, TYPE, value)
#define EMULATOR_ATOMICS_OF_INTEGERS(TYPE)                                                \
  EMULATOR_ATOMICS_OF_NUMBERS(TYPE)                                                       \
  EMULATOR_ATOMIC(atomicMin, TYPE, value < old ? value : old)                             \
  EMULATOR_ATOMIC(atomicMax, TYPE, value > old ? value : old)                             \
  EMULATOR_ATOMIC(atomicAnd, TYPE, old& value)                                            \
  EMULATOR_ATOMIC(atomicOr, TYPE, old | value)                                            \
  EMULATOR_ATOMIC(atomicXor, TYPE, old ^ value)                                           \
  EMULATOR_UNCHECKED inline TYPE atomicCAS(TYPE* address, TYPE compare, TYPE value) {     \
    emulator::emulator_before_atomic(address, sizeof(TYPE), __builtin_return_address(0)); \
    const TYPE old = *address;                                                            \
    if (old == compare && old != value) emulator::emulator_memory_changed();              \
    if (old == compare) *address = value;                                                 \
    return old;                                                                           \
  }

EMULATOR_ATOMICS_OF_INTEGERS(int)
EMULATOR_ATOMICS_OF_INTEGERS(unsigned)
EMULATOR_ATOMICS_OF_INTEGERS(unsigned long long)
EMULATOR_ATOMICS_OF_NUMBERS(float)
EMULATOR_ATOMIC(atomicAdd, double, old + value)
EMULATOR_ATOMIC(atomicSub, int, old - value)
EMULATOR_ATOMIC(atomicSub, unsigned, old - value)
EMULATOR_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
EMULATOR_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
#undef EMULATOR_ATOMIC
#undef EMULATOR_ATOMICS_OF_NUMBERS
#undef EMULATOR_ATOMICS_OF_INTEGERS

// Small squares of words that are transposed in registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparsify {

template <class Word>
struct RowOf;
template <>
struct RowOf<uint16_t> {
  typedef uint16_t type __attribute__((vector_size(16)));
  typedef uint16_t anywhere __attribute__((vector_size(16), aligned(2), may_alias));
};
template <>
struct RowOf<uint32_t> {
  typedef uint32_t type __attribute__((vector_size(32)));
  typedef uint32_t anywhere __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct RowOf<uint64_t> {
  typedef uint64_t type __attribute__((vector_size(32)));
  typedef uint64_t anywhere __attribute__((vector_size(32), aligned(8), may_alias));
};
using Row16 = RowOf<uint16_t>::type;
using Row32 = RowOf<uint32_t>::type;
using Row64 = RowOf<uint64_t>::type;

// Words of the first (second) half of a, each followed by its neighbour in b.
#if defined(__clang__)
inline Row16 low(Row16 a, Row16 b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Row16 high(Row16 a, Row16 b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
inline Row32 low(Row32 a, Row32 b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Row32 high(Row32 a, Row32 b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
inline Row64 low(Row64 a, Row64 b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Row64 high(Row64 a, Row64 b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
inline Row16 low(Row16 a, Row16 b) {
  return __builtin_shuffle(a, b, Row16{0, 8, 1, 9, 2, 10, 3, 11});
}
inline Row16 high(Row16 a, Row16 b) {
  return __builtin_shuffle(a, b, Row16{4, 12, 5, 13, 6, 14, 7, 15});
}
inline Row32 low(Row32 a, Row32 b) {
  return __builtin_shuffle(a, b, Row32{0, 8, 1, 9, 2, 10, 3, 11});
}
inline Row32 high(Row32 a, Row32 b) {
  return __builtin_shuffle(a, b, Row32{4, 12, 5, 13, 6, 14, 7, 15});
}
inline Row64 low(Row64 a, Row64 b) { return __builtin_shuffle(a, b, Row64{0, 4, 1, 5}); }
inline Row64 high(Row64 a, Row64 b) { return __builtin_shuffle(a, b, Row64{2, 6, 3, 7}); }
#endif

// An n x n square of words in n vectors.
template <class Word>
struct Square {
  using Row = typename RowOf<Word>::type;
  static constexpr int n = sizeof(Row) / sizeof(Word);
  Row rows[n];

  // log2(n) perfect shuffles of n * n words turn rows into columns.
  void transpose() {
    for (int round = 1; round < n; round *= 2) {
      Row next[n];
      for (int i = 0; i < n / 2; ++i) {
        next[2 * i] = low(rows[i], rows[i + n / 2]);
        next[2 * i + 1] = high(rows[i], rows[i + n / 2]);
      }
      std::memcpy(rows, next, sizeof rows);
    }
  }
};

}  // namespace sparsify

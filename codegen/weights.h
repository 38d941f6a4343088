// Reads whole weights: hashing, packing, counting. All at the speed of memory.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "runtime.h"
#include "square.h"

namespace sparsify {
namespace {

// Whose teams work is shared out to: those of the one thread pool, which runtime.cpp has.
const Runtime* teams = nullptr;

// Calls work(first, last) for each part of [0, count), one part per thread of a team.
template <class Work>
void divide(int64_t count, int threads, Work work) {
  struct Context {
    int64_t count;
    Work& work;
  } context{count, work};
  auto body = [](void* pointer, const Team& team) {
    auto& [count, work] = *static_cast<Context*>(pointer);
    work(count * team.thread / team.threads, count * (team.thread + 1) / team.threads);
  };
  teams->parallel(body, &context, static_cast<int>(count < threads ? count : threads));
}

// Waking a thread takes as long as reading this much.
constexpr int64_t kBytesPerThread = 1024 * 1024;

inline int worthwhile(int64_t bytes, int threads) {
  const int64_t most = 1 + bytes / kBytesPerThread;
  return most < threads ? static_cast<int>(most) : threads;
}

// --- content hash ---
//
// Guarantee: one changed element of up to 8 bytes, wherever it lies, always changes the hash: each
// 64-bit lane is a chain of bijections, and so is the fold of the lanes. Several changes cancel with
// probability 2^-64: the shifts carry every difference into both halves of its lane. A product alone
// carries only upwards, so that flipping the signs of an even number of elements would cancel.

typedef uint32_t Halves __attribute__((vector_size(32)));
typedef uint64_t Lanes __attribute__((vector_size(32)));
typedef uint64_t LanesAnywhere __attribute__((vector_size(32), aligned(1), may_alias));
constexpr int kVectors = 8;  // independent chains that hide the latency of the product
constexpr int64_t kStripe = kVectors * sizeof(Lanes);
constexpr int64_t kBlock = 64 * 1024;  // hashed by one thread; fixed, so threads do not matter

inline uint64_t fold(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
  return hash ^ (hash >> 32);
}

inline void absorb(Lanes (&state)[kVectors], const unsigned char* stripe) {
  for (int v = 0; v < kVectors; ++v) {
    const Lanes words = *reinterpret_cast<const LanesAnywhere*>(stripe + v * sizeof(Lanes));
    state[v] = (Lanes)((Halves)(state[v] ^ words) * 0x9E3779B1u);
    state[v] ^= state[v] >> 29;
    state[v] += state[v] << 19;
  }
}

inline uint64_t hash_block(const unsigned char* data, int64_t bytes) {
  Lanes state[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) {
    for (int lane = 0; lane < 4; ++lane) {
      state[v][lane] = 0x9FB21C651E98DF25u * (4 * v + lane + 1);
    }
  }
  int64_t at = 0;
  for (; at + kStripe <= bytes; at += kStripe) absorb(state, data + at);
  if (at < bytes) {
    unsigned char padded[kStripe] = {};
    std::memcpy(padded, data + at, bytes - at);
    absorb(state, padded);
  }
  uint64_t hash = 0;
  for (const Lanes& lanes : state) {
    for (int lane = 0; lane < 4; ++lane) hash = fold(hash, lanes[lane]);
  }
  return hash;
}

// Copies bytes [from, from + bytes) of the rows laid end to end.
inline void copy_rows(const unsigned char* rows, int64_t row_bytes, int64_t stride, int64_t from,
                      int64_t bytes, unsigned char* out) {
  while (bytes > 0) {
    const int64_t row = from / row_bytes, column = from % row_bytes;
    const int64_t length = row_bytes - column < bytes ? row_bytes - column : bytes;
    std::memcpy(out, rows + row * stride + column, length);
    out += length, from += length, bytes -= length;
  }
}

inline uint64_t hash_rows(const unsigned char* rows, int64_t count, int64_t row_bytes,
                          int64_t stride, int threads) {
  const int64_t total = count * row_bytes, blocks = (total + kBlock - 1) / kBlock;
  uint64_t* const hashes = new uint64_t[blocks];
  divide(blocks, worthwhile(total, threads), [&](int64_t first, int64_t last) {
    unsigned char* const buffer = stride == row_bytes ? nullptr : new unsigned char[kBlock];
    for (int64_t block = first; block < last; ++block) {
      const int64_t from = block * kBlock, bytes = total - from < kBlock ? total - from : kBlock;
      const unsigned char* data = rows + from;
      if (stride != row_bytes) {
        copy_rows(rows, row_bytes, stride, from, bytes, buffer);
        data = buffer;
      }
      hashes[block] = hash_block(data, bytes);
    }
    delete[] buffer;
  });
  uint64_t hash = total;
  for (int64_t block = 0; block < blocks; ++block) hash = fold(hash, hashes[block]);
  delete[] hashes;
  return hash;
}

// --- packing ---

// A matrix in memory, with strides in elements. Words stand for floats of the same size. Its lines
// are senders whose places are receivers, or the other way round.
template <class Word>
struct Matrix {
  using Float = Word;
  const Word* words;
  int64_t lines, places, line_stride, place_stride;
  Word exponent;  // its bits are all set in infinities and NaN

  Word at(int64_t line, int64_t place) const {
    return words[line * line_stride + place * place_stride];
  }
};

// Places [first, first + rows) -> to[lines][tile], zero padded. Returns whether one of the floats is
// infinite or NaN.
template <class Word>
bool pack_tile(const Matrix<Word>& matrix, int64_t first, int64_t rows, int64_t tile, Word* to) {
  const int64_t senders = matrix.lines, stride_r = matrix.place_stride;
  const int64_t stride_s = matrix.line_stride;
  const Word* const from = matrix.words + first * stride_r;
  const Word exponent = matrix.exponent;
  using Block = Square<Word>;
  constexpr int n = Block::n;
  constexpr int64_t kAhead = 4 * n;  // too many streams for the processor to foresee
  typename Block::Row infinite{};
  const int64_t square_rows = stride_s == 1 ? rows / n * n : 0;
  const int64_t square_senders = senders / n * n;
  for (int64_t s = 0; s < square_senders; s += n) {
    for (int64_t r = 0; r < square_rows; r += n) {
      Block block;
      for (int i = 0; i < n; ++i) {
        const Word* row = from + (r + i) * stride_r + s;
        __builtin_prefetch(row + kAhead);
        block.rows[i] = *reinterpret_cast<const typename RowOf<Word>::anywhere*>(row);
        infinite |= (typename Block::Row)((block.rows[i] & exponent) == exponent);
      }
      block.transpose();
      for (int i = 0; i < n; ++i) {
        *reinterpret_cast<typename RowOf<Word>::anywhere*>(to + (s + i) * tile + r) = block.rows[i];
      }
    }
  }
  Word rest = 0;
  for (int64_t s = 0; s < senders; ++s) {
    const Word* column = from + s * stride_s;
    for (int64_t r = s < square_senders ? square_rows : 0; r < rows; ++r) {
      const Word word = column[r * stride_r];
      rest |= (word & exponent) == exponent;
      to[s * tile + r] = word;
    }
    std::memset(to + s * tile + rows, 0, (tile - rows) * sizeof(Word));
  }
  for (int i = 0; i < n; ++i) rest |= infinite[i];
  return rest != 0;
}

constexpr int64_t kLargePage = 2 << 20, kLargeWeight = 8 << 20;

// Of large weights each active sender reads a few other pages, and looking those up takes longer
// than reading them. Asked before they are written first, of what is as large as `least`.
inline void prefer_large_pages(void* memory, int64_t bytes, int64_t least = kLargeWeight) {
#if defined(MADV_HUGEPAGE)
  if (bytes < least) return;
  const auto begin = reinterpret_cast<int64_t>(memory), end = begin + bytes;
  const int64_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(first), end / kLargePage * kLargePage - first, MADV_HUGEPAGE);
#endif
}

// A matrix -> tiles[ceil(places / tile)][lines][tile]; returns whether all weights are finite.
template <class Word>
bool pack(const Matrix<Word>& from, int64_t tile, Word* tiles, int threads) {
  std::atomic<bool> all_finite{true};
  const int64_t bytes = from.places * from.lines * static_cast<int64_t>(sizeof(Word));
  const int team = worthwhile(4 * bytes, threads);  // slower than reading alone
  const int64_t count = (from.places + tile - 1) / tile;
  prefer_large_pages(tiles, count * tile * from.lines * static_cast<int64_t>(sizeof(Word)));
  divide(count, team, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t left = from.places - t * tile, rows = left < tile ? left : tile;
      if (pack_tile(from, t * tile, rows, tile, tiles + t * tile * from.lines)) {
        all_finite.store(false, std::memory_order_relaxed);
      }
    }
  });
  return all_finite;
}

// --- counting ---

// How many words have a bit of `mask` set: the mask leaves out the sign, because -0.0 is zero.
template <class Word>
int64_t count_nonzero(const Word* words, int64_t count, Word mask, int threads) {
  std::atomic<int64_t> total{0};
  const int64_t bytes = count * static_cast<int64_t>(sizeof(Word));
  divide(count, worthwhile(bytes, threads), [&](int64_t first, int64_t last) {
    int64_t found = 0;
    for (int64_t i = first; i < last; ++i) found += (words[i] & mask) != 0;
    total.fetch_add(found, std::memory_order_relaxed);
  });
  return total;
}

template <class Reference>
using FloatOf = typename std::remove_reference_t<Reference>::Float;

// Calls work(matrix) with words of the size of a weight: `shape` is lines, places and their strides.
template <class Work>
void with_matrix(const void* words, int word_bytes, const int64_t* shape, uint64_t exponent,
                 Work work) {
  const auto call = [&](auto* typed) {
    using Word = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    work(Matrix<Word>{typed, shape[0], shape[1], shape[2], shape[3], Word(exponent)});
  };
  if (word_bytes == 2) call(static_cast<const uint16_t*>(words));
  if (word_bytes == 4) call(static_cast<const uint32_t*>(words));
  if (word_bytes == 8) call(static_cast<const uint64_t*>(words));
}

}  // namespace
}  // namespace sparsify

// Reads whole weights: hashing, packing, counting. All at the speed of memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "thread_pool.h"

namespace sparsify {
namespace {

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
  pool->parallel(body, &context, static_cast<int>(count < threads ? count : threads));
}

// Waking a thread takes as long as reading this much.
constexpr int64_t kBytesPerThread = 256 * 1024;

inline int worthwhile(int64_t bytes, int threads) {
  const int64_t most = 1 + bytes / kBytesPerThread;
  return most < threads ? static_cast<int>(most) : threads;
}

// --- content hash ---
//
// Guarantee: one changed element of up to 8 bytes always changes the hash. Every step is a
// bijection of the running value for a fixed word, and of the word for a fixed running value. The
// shift matters as much as the product: a product alone only carries upwards, so flipping the sign
// of an even number of elements would cancel.

typedef uint32_t Lanes __attribute__((vector_size(32)));
constexpr int kVectors = 8;  // independent chains that hide the latency of the product
constexpr int64_t kStripe = kVectors * sizeof(Lanes);
constexpr int64_t kBlock = 64 * 1024;  // hashed by one thread; fixed, so threads do not matter

inline uint64_t fold(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
  return hash ^ (hash >> 32);
}

inline void absorb(Lanes (&state)[kVectors], const unsigned char* stripe) {
  for (int v = 0; v < kVectors; ++v) {
    Lanes words;
    std::memcpy(&words, stripe + v * sizeof(Lanes), sizeof words);
    state[v] = (state[v] ^ words) * 0x9E3779B1u;
    state[v] ^= state[v] >> 15;
  }
}

inline uint64_t hash_block(const unsigned char* data, int64_t bytes) {
  Lanes state[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    for (int lane = 0; lane < 8; ++lane) state[v][lane] = 0x85EBCA6Bu * (8 * v + lane + 1);
  }
  int64_t at = 0;
  for (; at + kStripe <= bytes; at += kStripe) absorb(state, data + at);
  if (at < bytes) {
    unsigned char padded[kStripe] = {};
    std::memcpy(padded, data + at, bytes - at);
    absorb(state, padded);
  }
  // Two lanes at a time: a double lies in two lanes and must reach the fold as one word.
  uint64_t pairs[kStripe / 8];
  std::memcpy(pairs, state, sizeof pairs);
  uint64_t hash = bytes;
  for (uint64_t pair : pairs) hash = fold(hash, pair);
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
  std::vector<uint64_t> hashes(blocks);
  divide(blocks, worthwhile(total, threads), [&](int64_t first, int64_t last) {
    std::vector<unsigned char> buffer(stride == row_bytes ? 0 : kBlock);
    for (int64_t block = first; block < last; ++block) {
      const int64_t from = block * kBlock, bytes = total - from < kBlock ? total - from : kBlock;
      const unsigned char* data = rows + from;
      if (stride != row_bytes) {
        copy_rows(rows, row_bytes, stride, from, bytes, buffer.data());
        data = buffer.data();
      }
      hashes[block] = hash_block(data, bytes);
    }
  });
  uint64_t hash = total;
  for (uint64_t block : hashes) hash = fold(hash, block);
  return hash;
}

// --- packing ---

// weight[R, S] with strides in elements -> tiles[ceil(R / tile)][S][tile], zero padded. Words stand
// for floats of the same size; returns whether none of them is infinite or NaN.
template <class Word, Word kExponent>
bool pack(const Word* weight, int64_t receivers, int64_t senders, int64_t stride_r,
          int64_t stride_s, int64_t tile, Word* tiles, int threads) {
  constexpr int64_t kColumns = 64 / sizeof(Word);  // one cache line of a row-major weight
  std::atomic<bool> all_finite{true};
  divide((receivers + tile - 1) / tile, threads, [&](int64_t first, int64_t last) {
    Word infinite = 0;
    for (int64_t t = first; t < last; ++t) {
      const int64_t rows = receivers - t * tile < tile ? receivers - t * tile : tile;
      const Word* from = weight + t * tile * stride_r;
      Word* to = tiles + t * tile * senders;
      for (int64_t s0 = 0; s0 < senders; s0 += kColumns) {
        const int64_t s1 = s0 + kColumns < senders ? s0 + kColumns : senders;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t s = s0; s < s1; ++s) {
            const Word word = from[r * stride_r + s * stride_s];
            infinite |= (word & kExponent) == kExponent;
            to[s * tile + r] = word;
          }
        }
        for (int64_t s = s0; s < s1; ++s) {
          std::memset(to + s * tile + rows, 0, (tile - rows) * sizeof(Word));
        }
      }
    }
    if (infinite) all_finite.store(false, std::memory_order_relaxed);
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

}  // namespace
}  // namespace sparsify

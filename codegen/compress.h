// Packs weights without those that are zero; kept_rows.h and masked_rows.h say how they are read.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "weights.h"

namespace sparsify {
namespace {

constexpr int kGroup = 64;            // of runs that are looked at together
constexpr int64_t kLinesAtOnce = 256;  // by one thread

template <class Word>
constexpr Word kMagnitude = Word(~Word(0)) >> 1;  // all bits but the sign: -0.0 is zero

// Bit i is set where words[i] is not zero.
template <class Word>
inline uint64_t nonzero_bits(const Word (&words)[kGroup]) {
  uint64_t bits = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(Word) == 4) {
    typedef float Floats __attribute__((vector_size(32)));
    typedef uint32_t Words __attribute__((vector_size(32)));
    for (int i = 0; i < kGroup; i += 8) {
      Words eight;
      std::memcpy(&eight, words + i, sizeof eight);
      const Floats signs = (Floats)(eight != 0);
      bits |= uint64_t(uint32_t(__builtin_ia32_movmskps256(signs))) << i;
    }
    return bits;
  }
#endif
  for (int i = 0; i < kGroup; ++i) bits |= uint64_t(words[i] != 0) << i;
  return bits;
}

// Calls visit(line, run, any, count, along_lines) for groups of runs of lines first .. last: any[i]
// is not zero where run `run` of line `line + i` has a weight that is not zero, or run `run + i` of
// `line`. The runs of a line come in ascending order. Returns whether all weights are finite.
template <class Word, class Visit>
bool each_group(const Matrix<Word>& from, int64_t first, int64_t last, int64_t run_length,
                Visit visit) {
  const int64_t runs = (from.places + run_length - 1) / run_length;
  Word infinite = 0;
  const auto look = [&](Word& any, Word word) {
    any |= word & kMagnitude<Word>;
    infinite |= Word((word & from.exponent) == from.exponent);
  };
  if (from.place_stride == 1 && from.line_stride != 1) {
    for (int64_t line = first; line < last; ++line)
      for (int64_t run = 0; run < runs; run += kGroup) {
        Word any[kGroup] = {};
        const int64_t place = run * run_length, left = from.places - place;
        const int64_t count = left < kGroup * run_length ? left : kGroup * run_length;
        const Word* const words = from.words + line * from.line_stride + place;
        if (run_length == 1)
          for (int64_t i = 0; i < count; ++i) look(any[i], words[i]);
        else
          for (int64_t i = 0, place = 0; place < count; ++i)
            for (int64_t end = place + run_length; place < end && place < count; ++place)
              look(any[i], words[place]);
        visit(line, run, any, (count + run_length - 1) / run_length, false);
      }
    return !infinite;
  }
  for (int64_t run = 0; run < runs; ++run)
    for (int64_t line = first; line < last; line += kGroup) {
      Word any[kGroup] = {};
      const int64_t count = last - line < kGroup ? last - line : kGroup;
      const int64_t end = (run + 1) * run_length;
      for (int64_t place = run * run_length; place < end && place < from.places; ++place) {
        const Word* const words = from.words + line * from.line_stride + place * from.place_stride;
        if (from.line_stride == 1)
          for (int64_t i = 0; i < count; ++i) look(any[i], words[i]);
        else
          for (int64_t i = 0; i < count; ++i) look(any[i], words[i * from.line_stride]);
      }
      visit(line, run, any, count, true);
    }
  return !infinite;
}

// The part of a matrix that belongs to places of one band.
template <class Word>
Matrix<Word> band_of(const Matrix<Word>& from, int64_t first, int64_t band) {
  Matrix<Word> part = from;
  part.words += first * from.place_stride;
  part.places = from.places - first < band ? from.places - first : band;
  return part;
}

// Calls work(first, last) for all lines, shared among threads.
template <class Word, class Work>
void divide_lines(const Matrix<Word>& from, int threads, Work work) {
  const int64_t bytes = from.lines * from.places * static_cast<int64_t>(sizeof(Word));
  const int64_t blocks = (from.lines + kLinesAtOnce - 1) / kLinesAtOnce;
  divide(blocks, worthwhile(4 * bytes, threads), [&](int64_t first, int64_t end) {
    for (int64_t block = first; block < end; ++block) {
      const int64_t last = (block + 1) * kLinesAtOnce;
      work(block * kLinesAtOnce, last < from.lines ? last : from.lines);
    }
  });
}

// starts[bands][lines + 1] get the numbers of units, each of `together` runs that are kept; the last
// one is how many there are. Returns whether all weights are finite.
template <class Word>
bool count_kept(const Matrix<Word>& from, int64_t band, int64_t run_length, int64_t together,
                uint32_t* starts, int threads) {
  std::atomic<bool> all_finite{true};
  divide_lines(from, threads, [&](int64_t first, int64_t last) {
    for (int64_t place = 0; place < from.places; place += band) {
      Word found[kLinesAtOnce] = {};  // of the word's type: the loop is one of vectors
      const auto count = [&](int64_t line, int64_t, const Word(&any)[kGroup], int64_t n, bool along) {
        Word* const to = found + (line - first);
        if (along)
          for (int64_t i = 0; i < n; ++i) to[i] += Word(any[i] != 0);
        else
          *to += Word(__builtin_popcountll(nonzero_bits(any)));
      };
      if (!each_group(band_of(from, place, band), first, last, run_length, count))
        all_finite.store(false, std::memory_order_relaxed);
      uint32_t* const to = starts + place / band * (from.lines + 1);
      for (int64_t line = first; line < last; ++line)
        to[line] = uint32_t((found[line - first] + together - 1) / together);
    }
  });
  uint32_t units = 0;
  for (int64_t place = 0; place < from.places; place += band) {
    uint32_t* const to = starts + place / band * (from.lines + 1);
    for (int64_t line = 0; line <= from.lines; ++line) {
      const uint32_t here = line < from.lines ? to[line] : 0;
      to[line] = units;
      units += here;
    }
  }
  return all_finite;
}

// Calls keep(line, run, number) for the runs of a band that are kept: `number` counts those of a line.
template <class Word, class Keep>
void each_kept(const Matrix<Word>& band, int64_t first, int64_t last, int64_t run_length,
               uint32_t (&found)[kLinesAtOnce], Keep keep) {
  each_group(band, first, last, run_length,
             [&](int64_t line, int64_t run, const Word(&any)[kGroup], int64_t, bool along) {
               for (uint64_t bits = nonzero_bits(any); bits; bits &= bits - 1) {
                 const int64_t i = __builtin_ctzll(bits), at = along ? line + i : line;
                 keep(at, along ? run : run + i, found[at - first]++);
               }
             });
}

// How many units were counted in bands, or tiles.
template <class Word>
int64_t count_units(const Matrix<Word>& from, int64_t band, const uint32_t* starts) {
  const int64_t bands = (from.places + band - 1) / band;
  return bands ? starts[bands * (from.lines + 1) - 1] : 0;
}

constexpr int64_t kChunk = 8;

// Fills in what `starts` counted: chunks, their places before their weights, or the places and the
// weights of runs. Chunks are filled up with zeros, at places behind the band if `apart`, so that no
// place is there twice, else at the band's first one.
template <class Word>
void fill_kept(const Matrix<Word>& from, int64_t band, int64_t run_length, bool apart,
               const uint32_t* starts, uint16_t* places, Word* weights, int threads) {
  constexpr int64_t kWords = kChunk + 2 * kChunk / sizeof(Word);  // of a chunk, places included
  const auto put = [&](uint32_t unit, int64_t n, int64_t place, Word weight) {
    places[unit * kWords * sizeof(Word) / 2 + n] = uint16_t(place);
    weights[unit * kWords + n] = weight;
  };
  const int64_t unit_words = run_length > 1 ? run_length : kWords;
  void* const memory = run_length > 1 ? static_cast<void*>(weights) : places;
  const int64_t count = count_units(from, band, starts);
  prefer_large_pages(memory, count * unit_words * int64_t(sizeof(Word)), kLargePage);
  divide_lines(from, threads, [&](int64_t first, int64_t last) {
    for (int64_t base = 0; base < from.places; base += band) {
      const Matrix<Word> part = band_of(from, base, band);
      const uint32_t* const units = starts + base / band * (from.lines + 1);
      uint32_t found[kLinesAtOnce] = {};
      if (run_length > 1) {
        each_kept(part, first, last, run_length, found, [&](int64_t line, int64_t run, uint32_t n) {
          const int64_t unit = int64_t(units[line]) + n;
          places[unit] = uint16_t(run);
          for (int64_t i = 0; i < run_length; ++i) {
            const int64_t place = run * run_length + i;
            weights[unit * run_length + i] = place < part.places ? part.at(line, place) : Word(0);
          }
        });
        continue;
      }
      each_kept(part, first, last, 1, found, [&](int64_t line, int64_t place, uint32_t n) {
        put(units[line] + n / kChunk, n % kChunk, place, part.at(line, place));
      });
      for (int64_t line = first; line < last; ++line)
        for (int64_t n = found[line - first]; n % kChunk; ++n) {
          const int64_t i = n % kChunk;
          put(units[line] + uint32_t(n / kChunk), i, apart ? band + i : 0, Word(0));
        }
    }
  });
}

// How many words a tile's line begins with: a bit for each of its places.
template <class Word>
constexpr int64_t mask_words(int64_t tile) {
  return (tile / 8 + int64_t(sizeof(Word)) - 1) / int64_t(sizeof(Word));
}

// Whether half a vector of 64 bytes, or of 16 halves, is too small for the weights of all its lanes.
template <class Word>
bool is_full(const Word* mask, int64_t tile) {
  constexpr int kLanes = sizeof(Word) == 8 ? 8 : 16;
  for (int64_t place = 0; place < tile; place += kLanes) {
    uint16_t bits = 0;
    std::memcpy(&bits, reinterpret_cast<const char*>(mask) + place / 8, kLanes / 8);
    if (__builtin_popcount(bits) > kLanes / 2) return true;
  }
  return false;
}

constexpr uint32_t kFull = 1u << 31;

// Fills in the lines of tiles of `tile` places: a mask, and the weights of those whose bits are set.
// `starts` counted weights; it gets where lines begin, and which of them are full.
template <class Word>
void fill_masked(const Matrix<Word>& from, int64_t tile, uint32_t* starts, Word* words,
                 int threads) {
  const int64_t mask = mask_words<Word>(tile), tiles = (from.places + tile - 1) / tile;
  const int64_t count = count_units(from, tile, starts) + tiles * from.lines * mask;
  prefer_large_pages(words, count * int64_t(sizeof(Word)), kLargePage);
  divide_lines(from, threads, [&](int64_t first, int64_t last) {
    for (int64_t base = 0; base < from.places; base += tile) {
      const int64_t before = base / tile * from.lines;  // lines of other tiles
      uint32_t* const own = starts + before + base / tile;
      const int64_t end = last < from.lines ? last : last + 1;
      for (int64_t line = first; line < end; ++line) own[line] += uint32_t((before + line) * mask);
      for (int64_t line = first; line < last; ++line)
        std::memset(words + own[line], 0, mask * sizeof(Word));
      uint32_t found[kLinesAtOnce] = {};
      const Matrix<Word> part = band_of(from, base, tile);
      each_kept(part, first, last, 1, found, [&](int64_t line, int64_t place, uint32_t n) {
        Word* const to = words + own[line];
        reinterpret_cast<uint8_t*>(to)[place / 8] |= uint8_t(1 << place % 8);
        to[mask + n] = part.at(line, place);
      });
      for (int64_t line = first; line < last; ++line)
        if (is_full(words + own[line], tile)) own[line] |= kFull;
    }
  });
}

}  // namespace
}  // namespace sparsify

// Whether teams gain anything, on cores that others use too.
//
// A thread whose core another process has taken comes back after some milliseconds, and its team waits
// for it: a kernel of 0.1 ms may take a hundred times as long as one thread alone needs.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime.h"

namespace sparsify {
namespace {

class Lateness {
 public:
  // Has teams formed however late their threads are.
  static void ignore(bool is_ignored) { is_ignored_.store(is_ignored, std::memory_order_relaxed); }

  // Whether a team is to run the body: not for a while after one lost more than it gained.
  bool allows(Body body, int64_t at_ns) {
    const Record& record = of(body);
    return is_ignored_.load(std::memory_order_relaxed) ||
           record.body.load(std::memory_order_relaxed) != body ||
           record.alone_until_ns.load(std::memory_order_relaxed) <= at_ns;
  }

  // What a team has lost of the time that it took. For the one thread whose team it was.
  void note(Body body, int threads, int64_t at_ns, int64_t took_ns, int64_t lost_ns) {
    Record& record = of(body);
    if (record.body.load(std::memory_order_relaxed) != body) {
      record.body.store(body, std::memory_order_relaxed);
      record.took_ns = record.lost_ns = record.alone_ns = 0;
      record.alone_until_ns.store(0, std::memory_order_relaxed);  // was another body's
    }
    if (record.took_ns > kRememberedNs) record.took_ns /= 2, record.lost_ns /= 2;
    record.took_ns += took_ns, record.lost_ns += lost_ns;
    // If threads halve the time for each doubling, one of them alone is faster from twice that share on.
    if (lost_ns == 0 || record.lost_ns * 2 * threads <= record.took_ns * (threads - 1)) {
      record.alone_ns = record.alone_ns > took_ns ? record.alone_ns - took_ns : 0;
      return;
    }
    const int64_t longer = record.alone_ns * kLonger, least = record.lost_ns * 2;
    record.alone_ns = longer > least ? longer : least;
    if (record.alone_ns > kMostAloneNs) record.alone_ns = kMostAloneNs;
    record.alone_until_ns.store(at_ns + record.alone_ns, std::memory_order_relaxed);
    record.took_ns = record.lost_ns = 0;
  }

 private:
  static constexpr int kRecords = 64;  // bodies that share one only forget sooner
  // Other processes run for moments on every machine: what is lost to them is little beside this.
  static constexpr int64_t kRememberedNs = 100'000'000;
  // While teams go on to lose, they are tried more seldom.
  static constexpr int64_t kLonger = 4, kMostAloneNs = 1'000'000'000;

  struct Record {
    std::atomic<Body> body{nullptr};
    std::atomic<int64_t> alone_until_ns{0};
    int64_t took_ns = 0, lost_ns = 0;  // by the teams of late
    int64_t alone_ns = 0;
  };

  Record& of(Body body) {
    const uint64_t mixed = reinterpret_cast<uintptr_t>(body) * 0x9e3779b97f4a7c15u;
    return records_[mixed / (UINT64_MAX / kRecords + 1)];
  }

  Record records_[kRecords];
  static inline std::atomic<bool> is_ignored_{false};  // in forked children, too
};

}  // namespace
}  // namespace sparsify

// Tells whether memory was written to without reading it: Linux protects its pages and notes the
// first write to each, whoever makes it and however; one call asks for what was noted.
//
// Answers are safe to err in one direction only: "perhaps written". That is the answer for pages
// that are mapped anew, moved, swapped out or shared with files or other processes, in a forked
// child, and where this kernel cannot tell. Memory that a device writes by itself is not noticed:
// see write_watch.py for what is done about that.
#pragma once

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <new>

#include "weights.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#endif

namespace sparsify {
namespace {

// Consecutive pages. Those who watch the same pages share one.
struct Pages {
  const uintptr_t start, end;
  const pid_t owner;
  int users;    // guarded by the watch's mutex
  Pages* next;  // guarded by the watch's mutex
  // Odd while notes of writes are being taken away, and another number afterwards: who has looked
  // before would miss those.
  std::atomic<uint64_t> notes{2};
};

#if defined(__linux__) && defined(SYS_userfaultfd)

// From <linux/userfaultfd.h> and <linux/fs.h> of Linux 6.7; older headers lack half of it.
namespace uapi {

struct Api {
  uint64_t api, features, ioctls;
};
struct Span {
  uint64_t start, bytes;
};
struct Register {
  Span span;
  uint64_t mode, ioctls;
};
struct Scan {
  uint64_t size, flags, start, end, walk_end, found, found_most, pages_most;
  uint64_t inverted, all_of, any_of, told;
};
struct Found {
  uint64_t start, end, categories;
};

constexpr int kUserModeOnly = 1;  // allows it to everybody; faults of the kernel never wait here
constexpr uint64_t kApi = 0xAA, kUnpopulated = 1 << 13, kAsynchronous = 1 << 15, kModeProtect = 2;
constexpr uint64_t kProtect = 1, kMustBeWatched = 2;                             // flags of a Scan
constexpr uint64_t kWritten = 1 << 1, kOfFile = 1 << 2, kPresent = 1 << 3;       // categories
constexpr unsigned long kAskApi = _IOWR(0xAA, 0x3F, Api), kRegister = _IOWR(0xAA, 0x00, Register);
constexpr unsigned long kUnregister = _IOR(0xAA, 0x01, Span), kScan = _IOWR('f', 16, Scan);

}  // namespace uapi

class WriteWatch {
 public:
  // Watches [start, end); null where that cannot be done. What is watched is in use until release.
  Pages* take(uintptr_t start, uintptr_t end) {
    pthread_mutex_lock(&mutex_);
    Pages* pages = open() ? find(start, end) : nullptr;
    if (pages != nullptr) ++pages->users;
    pthread_mutex_unlock(&mutex_);
    return pages;
  }

  void release(Pages* pages) {
    if (pages->owner != getpid()) return;  // of the parent process, where others may use it
    pthread_mutex_lock(&mutex_);
    if (--pages->users == 0) drop(pages);
    pthread_mutex_unlock(&mutex_);
  }

  // A number to be compared by `is_unwritten` with what happens from now on; 0 if it cannot be.
  // Asked before the content is read, so that a write in between is found later.
  uint64_t mark(const Pages& pages) const {
    const uint64_t notes = pages.notes.load();
    return notes % 2 == 0 && is_untouched(pages) ? notes : 0;
  }

  bool is_unwritten(const Pages& pages, uint64_t mark) const {
    // The order matters: notes that are taken away meanwhile have changed the number before.
    return mark != 0 && is_untouched(pages) && pages.notes.load() == mark;
  }

  // In a forked child, of which the descriptors tell nothing.
  void close() {
    if (faults_ >= 0) ::close(faults_);
    if (map_ >= 0) ::close(map_);
    faults_ = map_ = -1;
  }

 private:
  static constexpr int kMostPages = 1024;  // each divides a mapping, of which there are 65,530

  // Whether the kernel can tell; asked once.
  bool open() {
    if (asked_) return map_ >= 0;
    asked_ = true;
    faults_ = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | uapi::kUserModeOnly));
    if (faults_ < 0) return false;
    uapi::Api api{uapi::kApi, uapi::kUnpopulated | uapi::kAsynchronous, 0};
    if (ioctl(faults_, uapi::kAskApi, &api) == 0) {
      map_ = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    }
    if (map_ < 0) close();
    return map_ >= 0;
  }

  Pages* find(uintptr_t start, uintptr_t end) {
    for (Pages* pages = first_; pages != nullptr; pages = pages->next) {
      if (pages->start != start || pages->end != end) continue;
      const bool is_ready = is_untouched(*pages) || protect(*pages);
      return is_ready ? pages : nullptr;
    }
    if (count_ >= kMostPages) return nullptr;
    uapi::Register request{{start, end - start}, uapi::kModeProtect, 0};
    if (ioctl(faults_, uapi::kRegister, &request) != 0) return nullptr;
    Pages* const pages = new Pages{start, end, getpid(), 0, first_};
    first_ = pages;
    ++count_;
    if (protect(*pages) && is_private(*pages)) return pages;
    drop(pages);
    return nullptr;
  }

  // Notes no write as yet. All who watch one of these pages are told.
  bool protect(const Pages& pages) {
    const auto tell = [&] {
      for (Pages* each = first_; each != nullptr; each = each->next) {
        if (each->start < pages.end && pages.start < each->end) each->notes.fetch_add(1);
      }
    };
    tell();
    uapi::Scan scan = request(pages, uapi::kProtect | uapi::kMustBeWatched);
    scan.all_of = uapi::kWritten;
    const bool done = ioctl(map_, uapi::kScan, &scan) == 0 && scan.walk_end == pages.end;
    tell();
    return done;
  }

  // Whether all pages are present, watched, and not written to.
  bool is_untouched(const Pages& pages) const {
    if (pages.owner != getpid()) return false;
    uapi::Found found;
    uapi::Scan scan = request(pages, uapi::kMustBeWatched);
    scan.found = reinterpret_cast<uintptr_t>(&found);
    scan.found_most = scan.pages_most = 1;
    scan.inverted = uapi::kPresent;
    scan.any_of = scan.told = uapi::kWritten | uapi::kPresent;
    return ioctl(map_, uapi::kScan, &scan) == 0 && scan.walk_end == pages.end;
  }

  // Whether no other process can write to them, as it could to those of a file. What is counted are
  // the pages that can be seen: scans pass over the memory of devices without a word.
  bool is_private(const Pages& pages) const {
    uapi::Found found{};
    uapi::Scan scan = request(pages, uapi::kMustBeWatched);
    scan.found = reinterpret_cast<uintptr_t>(&found);
    scan.found_most = 1;  // neighbours are told as one
    scan.inverted = uapi::kOfFile;
    scan.all_of = uapi::kOfFile | uapi::kPresent, scan.told = uapi::kPresent;
    const bool is_one = ioctl(map_, uapi::kScan, &scan) == 1;
    return is_one && found.start == pages.start && found.end == pages.end;
  }

  static uapi::Scan request(const Pages& pages, uint64_t flags) {
    uapi::Scan scan{};
    scan.size = sizeof scan, scan.flags = flags, scan.start = pages.start, scan.end = pages.end;
    return scan;
  }

  void drop(Pages* pages) {
    for (Pages** link = &first_; *link != nullptr; link = &(*link)->next) {
      if (*link != pages) continue;
      *link = pages->next;
      break;
    }
    --count_;
    // Where others watch a part of it, they find it unwatched.
    uapi::Span span{pages->start, pages->end - pages->start};
    ioctl(faults_, uapi::kUnregister, &span);
    delete pages;
  }

  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  Pages* first_ = nullptr;
  int count_ = 0, faults_ = -1, map_ = -1;
  bool asked_ = false;
};

#else

class WriteWatch {
 public:
  Pages* take(uintptr_t, uintptr_t) { return nullptr; }
  void release(Pages*) {}
  uint64_t mark(const Pages&) const { return 0; }
  bool is_unwritten(const Pages&, uint64_t) const { return false; }
  void close() {}
};

#endif

// Raw storage, and another watch in a forked child, as in thread_pool.h.
alignas(WriteWatch) unsigned char watch_storage[sizeof(WriteWatch)];
WriteWatch* watch = new (watch_storage) WriteWatch;
[[maybe_unused]] const int watch_fork_handler = pthread_atfork(nullptr, nullptr, [] {
  watch->close();
  watch = new (watch_storage) WriteWatch;
});

// Memory of which the whole pages are watched; what shares a page with other things is hashed.
struct Watched {
  const unsigned char* data;
  int64_t bytes;
  Pages* pages;

  uint64_t hash_edges() const {
    const auto from = reinterpret_cast<uintptr_t>(data);
    const int64_t head = pages->start - from, tail = from + bytes - pages->end;
    return fold(hash_block(data, head), hash_block(data + bytes - tail, tail));
  }
};

// Whether memory holds what it held at a mark.
struct Question {
  const Watched* watched;
  uint64_t mark, edges;

  bool is_unwritten() const {
    return watch->is_unwritten(*watched->pages, mark) && watched->hash_edges() == edges;
  }
};

// Null where it cannot be watched.
inline Watched* take_watched(const unsigned char* data, int64_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto from = reinterpret_cast<uintptr_t>(data);
  const uintptr_t start = (from + page - 1) / page * page, end = (from + bytes) / page * page;
  Pages* const pages = start < end ? watch->take(start, end) : nullptr;
  return pages == nullptr ? nullptr : new Watched{data, bytes, pages};
}

}  // namespace
}  // namespace sparsify

#include "reports.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <set>
#include <vector>

#include "scheduler.h"
#include "threads.h"

namespace emulator {
namespace {

constexpr size_t MOST_REPORTS = 64;  // a wrong kernel is wrong in thousands of threads
std::vector<std::string> reports;
std::set<std::string> reported;

}  // namespace

std::string format(const char* pattern, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  return buffer;
}

void report(const std::string& key, const std::string& text) {
  if (reported.insert(key).second && reports.size() < MOST_REPORTS) reports.push_back(text);
}

bool has_reports() { return !reports.empty(); }

std::string take_reports() {
  std::string lines;
  for (const std::string& each : reports) lines += each + "\n";
  reports.clear();
  reported.clear();
  return lines;
}

std::string name_of_thread(int64_t block, int64_t thread) {
  return format("block %lld thread %lld", (long long)block, (long long)thread);
}

std::string name_of(const Thread& thread) {
  return name_of_thread(thread.block->index, thread.index);
}

std::string name_of(const Place& place) {
  const char* slash = strrchr(place.file, '/');
  return format("%s:%d", slash ? slash + 1 : place.file, place.line);
}

std::string name_of_code(const void* return_address) {
  Dl_info image;
  if (!return_address || !dladdr(return_address, &image)) return "(unknown place)";
  // Minus one: the address that a call returns to may belong to the next line already.
  const size_t offset =
      static_cast<const char*>(return_address) - static_cast<char*>(image.dli_fbase);
  return format("<+0x%zx>", offset - 1);
}

void fail(const std::string& key, const std::string& text) {
  report(key, text);
  end_launch();
}

}  // namespace emulator

#include "attempt.h"

#include "reports.h"
#include "scheduler.h"

namespace emulator {

std::string Attempt::describe() const {
  const char* what = kind == AccessKind::atomic ? "atomic" : writes(kind) ? "write" : "read";
  return format("%s of %d bytes by %s at %s", what, bytes, name_of(*running).c_str(),
                name_of_code(code).c_str());
}

std::string Attempt::key(const char* fault) const { return format("%s %p", fault, code); }

}  // namespace emulator

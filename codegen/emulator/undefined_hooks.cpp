// The functions that gcc's -fsanitize=undefined calls where a value is undefined in C++. Their
// names and arguments are gcc's; libubsan, which usually has them, is not linked.
#include <cstdint>

#include "memory.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {
namespace {

struct Where {  // the beginning of what gcc hands over, in every case
  const char* file;
  uint32_t line, column;
};

struct Alignment {
  Where where;
  const void* type;
  unsigned char power_of_two;
};

[[noreturn]] void stop(const char* kind, const Where& where, const std::string& text) {
  const std::string place = name_of(Place{where.file, int(where.line)});
  fail(kind + place,
       std::string(kind) + ": " + text + ", by " + name_of(*running) + " at " + place);
}

}  // namespace

extern "C" {
[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const Alignment* found,
                                                        const void* address) {
  const Region* region = region_at(address);
  const std::string what = region ? region->describe(address) : format("address %p", address);
  stop("misaligned", found->where,
       what + format(", used as what lies at multiples of %d", 1 << found->power_of_two));
}
[[noreturn]] void __ubsan_handle_out_of_bounds_abort(const Where* where, unsigned long index) {
  stop("undefined", *where, format("index %ld is outside of its array", long(index)));
}
[[noreturn]] void __ubsan_handle_shift_out_of_bounds_abort(const Where* where, unsigned long,
                                                           unsigned long by) {
  stop("undefined", *where, format("a shift by %ld, or of a negative number", long(by)));
}
[[noreturn]] void __ubsan_handle_add_overflow_abort(const Where* where, unsigned long,
                                                    unsigned long) {
  stop("undefined", *where, "a sum of signed integers overflows");
}
[[noreturn]] void __ubsan_handle_sub_overflow_abort(const Where* where, unsigned long,
                                                    unsigned long) {
  stop("undefined", *where, "a difference of signed integers overflows");
}
[[noreturn]] void __ubsan_handle_mul_overflow_abort(const Where* where, unsigned long,
                                                    unsigned long) {
  stop("undefined", *where, "a product of signed integers overflows");
}
[[noreturn]] void __ubsan_handle_negate_overflow_abort(const Where* where, unsigned long) {
  stop("undefined", *where, "the negative of a signed integer overflows");
}
[[noreturn]] void __ubsan_handle_divrem_overflow_abort(const Where* where, unsigned long,
                                                       unsigned long) {
  stop("undefined", *where, "a division by zero, or an overflow");
}
}

}  // namespace emulator

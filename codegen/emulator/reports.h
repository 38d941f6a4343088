// Reports of faults: one line each, which begins with its kind. A place in compiled code is written
// as <+0xOFFSET>, which Python replaces by the line of the kernel.
#pragma once

#include <string>

#include "cuda_runtime_calls.h"

namespace emulator {

struct Thread;

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
// Report a fault, unless one with the same key was reported.
void report(const std::string& key, const std::string& text);
bool has_reports();
std::string take_reports();

std::string name_of(const Thread& thread);  // "block 2 thread 7"
std::string name_of_thread(int64_t block, int64_t thread);
std::string name_of(const Place& place);               // "kernel.cu:12"
std::string name_of_code(const void* return_address);  // "<+0x11f0>"

// Report the fault and end the launch: the kernel cannot go on after it.
[[noreturn]] void fail(const std::string& key, const std::string& text);

}  // namespace emulator

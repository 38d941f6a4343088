// The parameter of every planted kernel; planted.py fills it.
#pragma once
struct Call {
  const float* in;       // [256]
  const int* indices;    // [256] from 0 to 15
  float* out;            // [256]
  float* scratch;        // [256], uninitialised
  unsigned* counters;    // [8], zeros
  long long n;           // 200
};
constexpr unsigned ALL = 0xffffffffu;

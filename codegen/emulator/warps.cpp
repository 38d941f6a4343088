// Collectives of a warp: all lanes of the mask come to the same one, then each gets its result.
#include "ordering.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {
namespace {

const char* name_of_collective(Collective what) {
  switch (what) {
    case Collective::sync:
      return "__syncwarp";
    case Collective::ballot:
      return "__ballot_sync";
    case Collective::any:
      return "__any_sync";
    case Collective::all:
      return "__all_sync";
    case Collective::shuffle:
      return "__shfl_sync";
    case Collective::match:
      return "__match_any_sync";
    case Collective::add:
      return "__reduce_add_sync";
    case Collective::min:
      return "__reduce_min_sync";
    case Collective::max:
      return "__reduce_max_sync";
    case Collective::bit_and:
      return "__reduce_and_sync";
    case Collective::bit_or:
      return "__reduce_or_sync";
    case Collective::bit_xor:
      return "__reduce_xor_sync";
  }
  return "";
}

bool has(unsigned mask, int lane) { return mask >> lane & 1; }

[[noreturn]] void fail_at(Collective what, const Place& place, const std::string& text) {
  const std::string where = std::string(name_of_collective(what)) + " at " + name_of(place);
  fail("warp " + where, "warp: " + where + ": " + text + ", " + name_of(*running));
}

void check_lanes(Collective what, unsigned mask, int argument, const Place& place) {
  const Thread& self = *running;
  const Warp& warp = *self.warp;
  if (!has(mask, self.lane))
    fail_at(what, place, format("the calling lane %d is not in mask 0x%x", self.lane, mask));
  if (mask & ~warp.existing)
    fail_at(
        what, place,
        format("mask 0x%x names lanes that do not exist (the warp has 0x%x)", mask, warp.existing));
  if (mask & warp.exited)
    fail_at(what, place, format("mask 0x%x names lanes that have ended (0x%x)", mask, warp.exited));
  if (what == Collective::shuffle && !has(mask, argument & (WARP - 1)))
    fail_at(what, place,
            format("lane %d reads lane %d, which is not in mask 0x%x", self.lane,
                   argument & (WARP - 1), mask));
}

// Lanes of one mask must meet in the same collective with the same mask. Comparing with all that
// wait is left to the last one to come; the others compare with the first.
void check_others(Collective what, unsigned mask, const Place& place) {
  const Warp& warp = *running->warp;
  unsigned others = warp.waiting & mask;
  if ((others | 1u << running->lane) != mask) others &= -others;
  for (; others; others &= others - 1) {
    const int lane = __builtin_ctz(others);
    const Thread& other = *warp.lanes[lane];
    if (other.collective == what && other.mask == mask && other.place.line == place.line) continue;
    fail_at(what, place,
            format("mask 0x%x, but lane %d waits in %s at %s with mask 0x%x", mask, lane,
                   name_of_collective(other.collective), name_of(other.place).c_str(), other.mask));
  }
}

bool is_less(unsigned long long a, unsigned long long b, bool with_sign) {
  return with_sign ? (long long)a < (long long)b : a < b;
}

unsigned long long combine(Collective what, unsigned long long a, const Thread& next) {
  const unsigned long long b = next.value;
  switch (what) {
    case Collective::ballot:
      return a | b << next.lane;
    case Collective::any:
    case Collective::bit_or:
      return a | b;
    case Collective::all:
    case Collective::bit_and:
      return a & b;
    case Collective::bit_xor:
      return a ^ b;
    case Collective::add:
      return a + b;
    case Collective::min:
      return is_less(b, a, next.argument) ? b : a;
    case Collective::max:
      return is_less(a, b, next.argument) ? b : a;
    default:
      return 0;
  }
}

unsigned long long matching(const Warp& warp, unsigned mask, unsigned long long value) {
  unsigned equal = 0;
  for (int lane = 0; lane < WARP; ++lane)
    if (has(mask, lane) && warp.lanes[lane]->value == value) equal |= 1u << lane;
  return equal;
}

void give_results(Warp& warp, Collective what, unsigned mask) {
  unsigned long long combined = 0;
  bool first = true;
  for (int lane = 0; lane < WARP; ++lane) {
    if (!has(mask, lane)) continue;
    const Thread& each = *warp.lanes[lane];
    combined = !first || what == Collective::ballot ? combine(what, combined, each) : each.value;
    first = false;
  }
  for (int lane = 0; lane < WARP; ++lane) {
    if (!has(mask, lane)) continue;
    Thread& each = *warp.lanes[lane];
    if (what == Collective::shuffle)
      each.result = warp.lanes[each.argument & (WARP - 1)]->value;
    else if (what == Collective::match)
      each.result = matching(warp, mask, each.value);
    else
      each.result = combined;
  }
}

}  // namespace

extern "C" unsigned long long emulator_collective(Collective what, unsigned mask,
                                                  unsigned long long value, int argument,
                                                  Place place) {
  Thread& self = *running;
  Warp& warp = *self.warp;
  if (what == Collective::sync && mask == ~0u) mask = warp.existing;  // the default of __syncwarp
  check_lanes(what, mask, argument, place);
  check_others(what, mask, place);
  self.collective = what;
  self.mask = mask;
  self.value = value;
  self.argument = argument;
  self.place = place;
  warp.waiting |= 1u << self.lane;
  if ((warp.waiting & mask) != mask) {
    wait_in(State::in_collective, place);
    return self.result;
  }
  warp.waiting &= ~mask;
  give_results(warp, what, mask);
  if (what == Collective::sync) {  // the others exchange values, but order no memory
    std::vector<Thread*> participants;
    for (int lane = 0; lane < WARP; ++lane)
      if (has(mask, lane)) participants.push_back(warp.lanes[lane]);
    order_all(participants);
  }
  for (int lane = 0; lane < WARP; ++lane)
    if (has(mask, lane)) wake(*warp.lanes[lane]);
  run_woken();
  return self.result;
}

}  // namespace emulator

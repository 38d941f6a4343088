#include "clocks.h"

#include <algorithm>
#include <map>
#include <set>

namespace emulator {
namespace {

using TicksOf = std::shared_ptr<const Ticks>;

TicksOf later_of(const TicksOf& a, const TicksOf& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  auto later = std::make_shared<Ticks>(*a);
  for (size_t i = 0; i < later->size(); ++i) (*later)[i] = std::max((*later)[i], (*b)[i]);
  return later;
}

}  // namespace

const Ticks* Known::of(int64_t block) const {
  auto found =
      std::lower_bound(blocks.begin(), blocks.end(), block,
                       [](const auto& entry, int64_t wanted) { return entry.first < wanted; });
  return found != blocks.end() && found->first == block ? found->second.get() : nullptr;
}

KnownBy join(const KnownBy& a, const KnownBy& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  auto joined = std::make_shared<Known>();
  auto i = a->blocks.begin(), j = b->blocks.begin();
  while (i != a->blocks.end() || j != b->blocks.end()) {
    if (j == b->blocks.end() || (i != a->blocks.end() && i->first < j->first)) {
      joined->blocks.push_back(*i++);
    } else if (i == a->blocks.end() || j->first < i->first) {
      joined->blocks.push_back(*j++);
    } else {
      joined->blocks.emplace_back(i->first, later_of(i->second, j->second));
      ++i, ++j;
    }
  }
  return joined;
}

KnownBy join_all(const std::vector<Participant>& participants) {
  KnownBy joined;
  std::set<const Known*> taken;
  for (const Participant& each : participants)
    if (taken.insert(each.known->get()).second) joined = join(joined, *each.known);
  auto result = std::make_shared<Known>(joined ? *joined : Known{});
  std::map<int64_t, std::shared_ptr<Ticks>> changed;  // the blocks of the participants
  for (const Participant& each : participants) {
    std::shared_ptr<Ticks>& ticks = changed[each.who.block];
    if (!ticks) {
      const Ticks* old = result->of(each.who.block);
      ticks = old ? std::make_shared<Ticks>(*old) : std::make_shared<Ticks>(each.who.threads, 0);
    }
    (*ticks)[each.who.thread] = std::max((*ticks)[each.who.thread], each.tick);
  }
  for (auto& [block, ticks] : changed) {
    auto place =
        std::lower_bound(result->blocks.begin(), result->blocks.end(), block,
                         [](const auto& entry, int64_t wanted) { return entry.first < wanted; });
    if (place == result->blocks.end() || place->first != block)
      place = result->blocks.emplace(place, block, nullptr);
    place->second = std::move(ticks);
  }
  return result;
}

KnownBy with_tick(const KnownBy& known, const Identity& who, uint32_t tick) {
  return join_all({{who, &known, tick}});
}

bool Clock::knows(int64_t block, int64_t thread, uint32_t tick) const {
  if (block != block_) return emulator::knows(known_, block, thread, tick);
  return of_own_block_ && (*of_own_block_)[thread] >= tick;
}

bool knows(const KnownBy& known, int64_t block, int64_t thread, uint32_t tick) {
  const Ticks* ticks = known ? known->of(block) : nullptr;
  return ticks && (*ticks)[thread] >= tick;
}

}  // namespace emulator

#include "access_history.h"

namespace emulator {

void AccessHistory::cover(size_t bytes) { cells_.resize((bytes + granule_ - 1) / granule_); }

void AccessHistory::refine_for(uintptr_t offset, int bytes) {
  size_t granule = granule_;
  while ((offset | uintptr_t(bytes)) % granule) granule /= 2;
  if (granule == granule_) return;
  const size_t parts = granule_ / granule;
  std::vector<Cell> finer(cells_.size() * parts);
  for (size_t i = 0; i < finer.size(); ++i) {  // each part was touched as the whole was
    const Cell& whole = cells_[i / parts];
    finer[i].write = whole.write;
    finer[i].read = whole.read;
    if (whole.reads) finer[i].reads = std::make_unique<std::vector<Access>>(*whole.reads);
    finer[i].is_written = whole.is_written;
  }
  cells_ = std::move(finer);
  granule_ = granule;
}

}  // namespace emulator

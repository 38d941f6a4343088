// One launch, from the request to the reports.
#pragma once

#include "launch_request.h"
#include "threads.h"

namespace emulator {

struct Launch {
  const LaunchRequest* request;
  std::vector<uint64_t> words;  // of the kernel's parameter
};

const Launch& current_launch();

}  // namespace emulator

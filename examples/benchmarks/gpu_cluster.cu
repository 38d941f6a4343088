// Barriers of a cluster of CLUSTER blocks, which is defined in front.
#include "cluster.cuh"

using namespace sparsify;

struct Call {
  int64_t repeats;
};

extern "C" __global__ void run_cluster_barrier(const Call call) {
  ClusterTeam<CLUSTER> team;
  for (int64_t i = 0; i < call.repeats; ++i) team.meet();
}

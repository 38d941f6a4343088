// Thread-block clusters, by the names that NVRTC itself knows (cooperative_groups builds on them).
#pragma once

inline unsigned __clusterRelativeBlockRank() { return emulator::emulator_cluster_rank(); }
inline unsigned __clusterSizeInBlocks() { return emulator::emulator_cluster_size(); }
inline bool __clusterDimIsSpecified() { return emulator::emulator_cluster_size() > 1; }
inline dim3 __clusterDim() { return dim3(emulator::emulator_cluster_size()); }
inline dim3 __clusterRelativeBlockIdx() { return dim3(emulator::emulator_cluster_rank(), 0, 0); }
inline dim3 __clusterIdx() { return dim3(blockIdx.x / emulator::emulator_cluster_size(), 0, 0); }
inline dim3 __clusterGridDimInClusters() {
  return dim3(gridDim.x / emulator::emulator_cluster_size());
}

// What a thread wrote before it arrives is seen by every thread that has waited.
inline void __cluster_barrier_arrive(EMULATOR_PLACE) {
  emulator::emulator_cluster_arrive(true, place);
}
inline void __cluster_barrier_arrive_relaxed(EMULATOR_PLACE) {
  emulator::emulator_cluster_arrive(false, place);
}
inline void __cluster_barrier_wait(EMULATOR_PLACE) { emulator::emulator_cluster_wait(place); }

// The same variable in the shared memory of another block of the cluster.
inline void* __cluster_map_shared_rank(const void* address, unsigned rank, EMULATOR_PLACE) {
  return emulator::emulator_map_shared(address, rank, place);
}
inline unsigned __cluster_query_shared_rank(const void* address) {
  return emulator::emulator_shared_rank(address);
}

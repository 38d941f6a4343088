// NVIDIA's own answer to how many blocks a multiprocessor holds.
#include <cuda_occupancy.h>

#include <climits>

extern "C" int nvidias_answer(int major, int minor, int multiprocessors, int shared_per_block,
                              int shared_per_multiprocessor, int registers, int threads_held,
                              int registers_of_thread, int static_shared, int threads,
                              int dynamic_shared) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = threads_held;
    device.regsPerBlock = registers;
    device.regsPerMultiprocessor = registers;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = shared_per_multiprocessor;
    device.numSms = multiprocessors;
    device.sharedMemPerBlockOptin = shared_per_block;
    device.reservedSharedMemPerBlock = major < 8 ? 0 : 1024;

    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = INT_MAX;
    function.numRegs = registers_of_thread;
    function.sharedSizeBytes = static_shared;
    function.partitionedGCConfig = PARTITIONED_GC_OFF;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = shared_per_block - static_shared;
    function.numBlockBarriers = 1;
    function.virtualResourceCount = 0;

    const cudaOccDeviceState state;
    cudaOccResult result;
    const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(
        &result, &device, &function, &state, threads, dynamic_shared);
    return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -error;
}

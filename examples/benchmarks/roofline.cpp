// What this machine can do at most: bytes read and floats added per second, on all threads.
#include <cstddef>

constexpr int LANES = 64;  // floats summed side by side: enough to hide the latency of an addition

// Sum `repeats` times over `count` floats (a multiple of LANES), each thread over its own share.
extern "C" float read_all(const float* data, size_t count, int repeats) {
    float total = 0;
#pragma omp parallel reduction(+ : total)
    for (int r = 0; r < repeats; ++r) {
        float sums[LANES] = {};
#pragma omp for schedule(static) nowait
        for (size_t block = 0; block < count / LANES; ++block) {
            const float* from = data + block * LANES;
#pragma omp simd
            for (int lane = 0; lane < LANES; ++lane) sums[lane] += from[lane];
        }
        for (int lane = 0; lane < LANES; ++lane) total += sums[lane];
    }
    return total;
}

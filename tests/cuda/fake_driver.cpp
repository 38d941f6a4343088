// A driver that keeps a log instead of having a GPU: the declarations are those of NVIDIA's cuda.h,
// so that what Python passes through ctypes is read as the real driver would read it.
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

namespace {

std::string journal;
std::map<std::string, int> answers;  // what a call fails with, and what an attribute is
int words = 0;                       // of the struct that a launch passes
thread_local CUcontext current = nullptr;
CUcontext home = nullptr;  // of the module that was loaded last

void note(const char *format, auto... values) {
    char line[400];
    std::snprintf(line, sizeof line, format, values...);
    journal += line;
    journal += '\n';
}

CUresult answer(const char *function) {
    const auto found = answers.find(function);
    return found == answers.end() ? CUDA_SUCCESS : static_cast<CUresult>(found->second);
}

int number(const std::string &name, int otherwise) {
    const auto found = answers.find(name);
    return found == answers.end() ? otherwise : found->second;
}

template <class T> T handle(long value) { return reinterpret_cast<T>(value); }
template <class T> long long plain(T value) { return reinterpret_cast<long long>(value); }

}  // namespace

extern "C" {

void fake_reset(int word_count) {
    journal.clear();
    answers.clear();
    words = word_count;
    current = nullptr;
}
void fake_answer(const char *name, int value) { answers[name] = value; }
const char *fake_journal() { return journal.c_str(); }

CUresult cuInit(unsigned) { return answer("cuInit"); }
CUresult cuDriverGetVersion(int *version) {
    *version = number("version", 13000);
    return answer("cuDriverGetVersion");
}
CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : nullptr;
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult, const char **text) {
    *text = "as the driver says it";
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
    *count = number("devices", 2);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = 40 + ordinal;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    std::snprintf(name, size, "Fake %d", device);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = number("major", 9); break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = number("minor", 0); break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 52428800; break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: *value = number("clusters", 1); break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    note("retain %d", device);
    *context = handle<CUcontext>(1000 + device);
    return answer("cuDevicePrimaryCtxRetain");
}
CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = current;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    note("context %lld", plain(context));
    current = context;
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    note("load %.3s in %lld", static_cast<const char *>(image) + 1, plain(current));
    home = current;
    *module = handle<CUmodule>(77);
    return answer("cuModuleLoadData");
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    note("find %s in %lld", name, plain(module));
    *function = handle<CUfunction>(88);
    return answer("cuModuleGetFunction");
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction) {
    *value = attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES ? 1024 : -1;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    const bool dynamic = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    const bool large = attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
    note("set %s of %lld to %d", dynamic ? "dynamic" : large ? "large clusters" : "?",
         plain(function), value);
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads,
                                                     size_t shared_bytes) {
    note("occupancy of %lld with %d threads, %zu bytes", plain(function), threads, shared_bytes);
    *blocks = 3;
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments,
                          void **extra) {
    if (const CUresult status = answer("cuLaunchKernelEx")) return status;
    if (home && current != home) return current ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_INVALID_CONTEXT;
    note("launch %lld on stream %lld in %lld: grid %u %u %u, block %u %u %u, shared %u%s",
         plain(function), plain(c->hStream), plain(current), c->gridDimX, c->gridDimY, c->gridDimZ,
         c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, extra ? ", extra" : "");
    for (unsigned i = 0; i < c->numAttrs; ++i) {
        const CUlaunchAttribute &a = c->attrs[i];
        if (a.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
            note("cooperative %d", a.value.cooperative);
        else if (a.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            note("cluster %u %u %u", a.value.clusterDim.x, a.value.clusterDim.y,
                 a.value.clusterDim.z);
        else
            note("attribute %d", static_cast<int>(a.id));
    }
    for (int i = 0; i < words; ++i) {
        std::int64_t word;
        std::memcpy(&word, static_cast<const char *>(arguments[0]) + 8 * i, 8);
        note("word %lld", static_cast<long long>(word));
    }
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) {
    note("wait for %lld", plain(stream));
    return answer("cuStreamSynchronize");
}

}  // extern "C"

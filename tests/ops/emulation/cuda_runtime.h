// CUDA C++ on the host, as far as the kernels of csrc/cuda need it: threads of a block are fibers
// that change at barriers alone. Stands before the toolkit's header of this name.
#ifndef EMULATION_CUDA_RUNTIME_H
#define EMULATION_CUDA_RUNTIME_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    unsigned x;
    unsigned y;
    unsigned z;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

extern dim3 threadIdx;
extern dim3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };

struct cudaLaunchConfig_t {
    dim3 gridDim;
    dim3 blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace emulation {

constexpr int kWarp = 32;

void run(const cudaLaunchConfig_t &config, const std::function<void()> &kernel);
void wait_for_warp();
void wait_for_block();
uint32_t *warp_memory();  // [kWarp, 8]: what the lanes of the current warp show each other
void check_read(const void *from, size_t bytes);
cudaError_t attribute(int *value, int which);

}  // namespace emulation

template <typename T>
T __ldg(const T *from) {
    emulation::check_read(from, sizeof(T));
    return *from;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    uint32_t *memory = emulation::warp_memory();
    memory[threadIdx.x % emulation::kWarp * 8] = static_cast<uint32_t>(value);
    emulation::wait_for_warp();
    const T result = static_cast<T>(memory[lane * 8]);
    emulation::wait_for_warp();
    return result;
}

float __shfl_xor_sync(unsigned mask, float value, int lanes);

inline void __syncwarp() {
    emulation::wait_for_warp();
}

inline void __syncthreads() {
    emulation::wait_for_block();
}

inline int min(int a, int b) {
    return std::min(a, b);
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
    return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int *index) {
    *index = 0;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int *value, int which, int) {
    return emulation::attribute(value, which);
}

inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

template <typename Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Argument),
                               const Argument &argument) {
    emulation::run(*config, [&] { kernel(argument); });
    return cudaSuccess;
}

#endif

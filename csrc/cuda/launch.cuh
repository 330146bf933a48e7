// Starts a kernel on the caller's stream; nothing waits for the host.
#ifndef OMNIQUANT_LAUNCH_CUH
#define OMNIQUANT_LAUNCH_CUH

#include <cuda_runtime.h>

#include <cstdint>

namespace omniquant {

// Returns a cudaError_t; an error also where the kernel cannot have so much shared memory.
template <typename Argument>
int32_t launch(void (*kernel)(Argument), dim3 grid, unsigned threads, int shared_bytes,
               void *stream, const Argument &argument) {
    constexpr int kWithoutAsking = 48 * 1024;
    if (shared_bytes > kWithoutAsking) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error != cudaSuccess) {
            return static_cast<int32_t>(error);
        }
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    return static_cast<int32_t>(cudaLaunchKernelEx(&config, kernel, argument));
}

}  // namespace omniquant

#endif

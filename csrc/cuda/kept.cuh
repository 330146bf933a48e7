// Values that stay in registers.
#ifndef OMNIQUANT_KEPT_CUH
#define OMNIQUANT_KEPT_CUH

#include <cuda_runtime.h>

#include <cstdint>

namespace omniquant {

// Returns the value of each lane, as an exchange of the warp with itself. The compiler recomputes
// constants and what follows from the thread's number at each use, inside of loops too; it cannot
// repeat an exchange.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
    return __shfl_sync(0xffffffffu, value, threadIdx.x % 32);
}

__device__ __forceinline__ int kept(int value) {
    return static_cast<int>(kept(static_cast<uint32_t>(value)));
}

template <typename T>
__device__ __forceinline__ T *kept(T *pointer) {
    const auto bits = reinterpret_cast<uint64_t>(pointer);
    const uint64_t upper = kept(static_cast<uint32_t>(bits >> 32));
    return reinterpret_cast<T *>(upper << 32 | kept(static_cast<uint32_t>(bits)));
}

}  // namespace omniquant

#endif

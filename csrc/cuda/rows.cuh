// Shares out the rows of a matrix to teams of threads: 16-byte accesses and reductions.
#ifndef OMNIQUANT_ROWS_CUH
#define OMNIQUANT_ROWS_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "ceil_divide.h"

namespace omniquant {

constexpr int kWarp = 32;
constexpr int kBlockThreads = 256;
constexpr int kAccess = 16;  // bytes a thread moves at once

__device__ inline float widen(float value) {
    return value;
}
__device__ inline float widen(__half value) {
    return __half2float(value);
}
__device__ inline float widen(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

template <typename T>
__device__ T narrow(float value) {
    if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(value);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(value);
    } else {
        return value;
    }
}

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
    T values[kVector];
};

// Extremes that keep NaN.
__device__ inline float minimum(float a, float b) {
    return a < b || a != a ? a : b;
}
__device__ inline float maximum(float a, float b) {
    return a > b || a != a ? a : b;
}

// The threads of a row: one warp, so that a block takes eight rows, or a whole block.
template <int kThreads>
struct Team {
    static constexpr int kRows = kBlockThreads / kThreads;

    __device__ static int64_t row() {
        return static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
    }

    __device__ static int rank() { return threadIdx.x % kThreads; }

    // Combines one value of each thread; every thread gets the result.
    template <typename Combine>
    __device__ static float reduce(float value, Combine combine) {
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
            value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
        }
        if constexpr (kThreads > kWarp) {
            __shared__ float partial[kThreads / kWarp];
            if (threadIdx.x % kWarp == 0) {
                partial[threadIdx.x / kWarp] = value;
            }
            __syncthreads();
            value = partial[0];
            for (int warp = 1; warp < kThreads / kWarp; ++warp) {
                value = combine(value, partial[warp]);
            }
            __syncthreads();  // before the next reduction writes its partials
        }
        return value;
    }

    __device__ static float sum(float value) {
        return reduce(value, [](float a, float b) { return a + b; });
    }

    __device__ static float minimum(float value) {
        return reduce(value, [](float a, float b) { return omniquant::minimum(a, b); });
    }

    __device__ static float maximum(float value) {
        return reduce(value, [](float a, float b) { return omniquant::maximum(a, b); });
    }
};

// Calls body(i) for each pack of the row that is this thread's.
template <int kVector, int kThreads, typename Body>
__device__ void for_packs(int64_t columns, Body body) {
    for (int64_t i = Team<kThreads>::rank(); i < columns / kVector; i += kThreads) {
        body(i);
    }
}

template <int kVector, typename T>
__device__ const Pack<T, kVector> *packs(const T *row) {
    return reinterpret_cast<const Pack<T, kVector> *>(row);
}

template <int kVector, typename T>
__device__ Pack<T, kVector> *packs(T *row) {
    return reinterpret_cast<Pack<T, kVector> *>(row);
}

template <typename... Pointers>
bool aligned(Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % kAccess == 0) && ...);
}

// Calls launch(vector width, threads a row, blocks) with the first two as constants.
template <typename T, typename Launch>
int32_t dispatch(int64_t rows, int64_t columns, bool is_aligned, Launch launch) {
    if (rows == 0) {
        return 0;
    }
    const auto by_team = [&](auto vector) {
        constexpr int kVector = decltype(vector)::value;
        if (columns <= static_cast<int64_t>(kVector) * kWarp * 8) {
            constexpr int kRows = Team<kWarp>::kRows;
            const auto blocks = static_cast<unsigned>(ceil_divide<int64_t>(rows, kRows));
            launch(vector, std::integral_constant<int, kWarp>{}, blocks);
        } else {
            launch(vector, std::integral_constant<int, kBlockThreads>{},
                   static_cast<unsigned>(rows));
        }
    };
    constexpr int kWidest = kAccess / static_cast<int>(sizeof(T));
    if (is_aligned && columns % kWidest == 0) {
        by_team(std::integral_constant<int, kWidest>{});
    } else {
        by_team(std::integral_constant<int, 1>{});
    }
    return static_cast<int32_t>(cudaGetLastError());
}

}  // namespace omniquant

#endif

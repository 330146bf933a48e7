// The instructions of csrc/cuda/ptx.cuh by their description in the PTX manual.
#ifndef OMNIQUANT_PTX_CUH
#define OMNIQUANT_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "fragments.h"

namespace emulation {

void copy_async(void *to, const void *from, size_t bytes, bool present);
void commit_copies();
void wait_for_copies(size_t groups);

}  // namespace emulation

namespace omniquant {

template <typename Format>
double number(uint32_t pair, int half) {
    const auto bits = static_cast<uint16_t>(pair >> (16 * half));
    if constexpr (std::is_same_v<Format, Float16>) {
        return __half2float({bits});
    } else {
        return __bfloat162float({bits});
    }
}

// mma.m16n8k16: places of the matrices in the registers of the lanes.
template <typename Format>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t *memory = emulation::warp_memory();
    const int lane = threadIdx.x % emulation::kWarp;
    std::copy(a, a + 4, memory + lane * 8);
    std::copy(b, b + 2, memory + lane * 8 + 4);
    emulation::wait_for_warp();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8;
        const int column = lane % 4 * 2 + i % 2;
        double sum = sums[i];
        for (int k = 0; k < 16; ++k) {
            const int a_lane = row % 8 * 4 + k % 8 / 2;
            const int b_lane = column * 4 + k % 8 / 2;
            const uint32_t a_pair = memory[a_lane * 8 + row / 8 + k / 8 * 2];
            const uint32_t b_pair = memory[b_lane * 8 + 4 + k / 8];
            sum += number<Format>(a_pair, k % 2) * number<Format>(b_pair, k % 2);
        }
        sums[i] = static_cast<float>(sum);
    }
    emulation::wait_for_warp();
}

inline void copy_16_async(uint32_t *to, const uint32_t *from, bool present) {
    emulation::copy_async(to, from, 16, present);
}

inline void copy_4_async(uint32_t *to, const uint32_t *from, bool present) {
    emulation::copy_async(to, from, 4, present);
}

inline void commit_copies() {
    emulation::commit_copies();
}

template <int kGroups>
void wait_for_copies() {
    emulation::wait_for_copies(kGroups);
}

}  // namespace omniquant

#endif

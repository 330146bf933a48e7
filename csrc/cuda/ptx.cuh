// Instructions that CUDA C++ has no function for: a warp's matrix product, asynchronous copies.
#ifndef OMNIQUANT_PTX_CUH
#define OMNIQUANT_PTX_CUH

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "fragments.h"

namespace omniquant {

// sums [16, 8] += a [16, 16] b [16, 8], in float32 (PTX: mma.m16n8k16). With g = lane / 4 and
// t = lane % 4, the pairs of a are the rows g, g + 8, g, g + 8 at the places 2t, 2t, 2t + 8, 2t + 8
// of the sum; those of b the column g at 2t, 2t + 8; the sums row g, columns 2t and 2t + 1, and
// row g + 8 likewise.
template <typename Format>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<Format, Float16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// Starts a copy of 16 aligned bytes into shared memory; zeros where it is not `present`. The line's
// other sectors are fetched into the L2 cache: a neighbouring warp is about to ask for them.
__device__ __forceinline__ void copy_16_async(uint32_t *to, const uint32_t *from, bool present) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    const int bytes = present ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(address),
                 "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_4_async(uint32_t *to, const uint32_t *from, bool present) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    const int bytes = present ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
}

// Ends a group of copies; it may be empty.
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits for this thread's copies, all but the newest kGroups groups.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

}  // namespace omniquant

#endif

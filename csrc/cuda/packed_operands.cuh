// Activations as operands: what a lane reads of a row of x, and the registers made of it.
#ifndef OMNIQUANT_PACKED_OPERANDS_CUH
#define OMNIQUANT_PACKED_OPERANDS_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "fragments.h"

namespace omniquant {

template <typename T>
struct Activations {
    static constexpr bool kWide = std::is_same_v<T, float>;
    static constexpr int kParts = kWide ? kFloatParts : 1;  // operands that are added
    static constexpr int kWords = kLaneCodes * static_cast<int>(sizeof(T)) / 4;
    using Format = std::conditional_t<std::is_same_v<T, __half>, Float16, Bfloat16>;
    using Bits = std::conditional_t<kWide, uint32_t, uint16_t>;

    uint32_t raw[kWords];

    // `count` of the lane's columns exist, at most 0 to none; the others are zero.
    __device__ __forceinline__ void load(const T *x, int64_t count, bool is_aligned) {
        if (is_aligned && count >= kLaneCodes) {
            const auto *from = reinterpret_cast<const uint4 *>(x);
#pragma unroll
            for (int i = 0; i < kWords / 4; ++i) {
                const uint4 four = __ldg(from + i);
                raw[4 * i] = four.x;
                raw[4 * i + 1] = four.y;
                raw[4 * i + 2] = four.z;
                raw[4 * i + 3] = four.w;
            }
            return;
        }
        const auto *from = reinterpret_cast<const Bits *>(x);
        constexpr int kEach = 4 / static_cast<int>(sizeof(T));
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            raw[i] = 0;
#pragma unroll
            for (int k = 0; k < kEach; ++k) {
                if (i * kEach + k < count) {
                    raw[i] |= static_cast<uint32_t>(__ldg(from + i * kEach + k)) << (16 * k);
                }
            }
        }
    }

    template <typename Codes>
    __device__ __forceinline__ void operands(uint32_t (&pairs)[kParts][kLanePairs]) const {
#pragma unroll
        for (int j = 0; j < kLanePairs; ++j) {
            const int first = Codes::first(j);
            if constexpr (kWide) {
                uint32_t low[kParts];
                uint32_t high[kParts];
                split(raw[first], low);
                split(raw[first + Codes::kStride], high);
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    pairs[part][j] = low[part] >> 16 | high[part];
                }
            } else {
                pairs[0][j] = pair_of(raw, first, Codes::kStride);
            }
        }
    }
};

}  // namespace omniquant

#endif

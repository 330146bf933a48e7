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
    using Format = std::conditional_t<std::is_same_v<T, __half>, Float16, Bfloat16>;
};

// The registers of kLaneCodes columns.
template <typename T>
struct LaneOperands {
    static constexpr int kParts = Activations<T>::kParts;

    uint32_t pairs[kParts][kLanePairs];
};

// kLaneCodes consecutive elements as they are stored.
template <typename T>
class LaneElements {
    static constexpr int kWords = kLaneCodes * static_cast<int>(sizeof(T)) / 4;
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

  public:
    // `count` of the columns exist, none where it is negative; the others are zero.
    __device__ __forceinline__ void load(const T *x, int count, bool is_aligned) {
        if (is_aligned && (count >= kLaneCodes || count <= 0)) {
            const auto *from = reinterpret_cast<const uint4 *>(x);
#pragma unroll
            for (int i = 0; i < kWords / 4; ++i) {
                uint4 four = {0, 0, 0, 0};
                if (count > 0) {
                    four = __ldg(from + i);
                }
                raw_[4 * i] = four.x;
                raw_[4 * i + 1] = four.y;
                raw_[4 * i + 2] = four.z;
                raw_[4 * i + 3] = four.w;
            }
            return;
        }
        const auto *from = reinterpret_cast<const Bits *>(x);
        constexpr int kEach = 4 / static_cast<int>(sizeof(T));
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            raw_[i] = 0;
#pragma unroll
            for (int k = 0; k < kEach; ++k) {
                if (i * kEach + k < count) {
                    raw_[i] |= static_cast<uint32_t>(__ldg(from + i * kEach + k)) << (16 * k);
                }
            }
        }
    }

    // In the order of Codes.
    template <typename Codes>
    __device__ __forceinline__ LaneOperands<T> operands() const {
        LaneOperands<T> result;
#pragma unroll
        for (int j = 0; j < kLanePairs; ++j) {
            const int first = Codes::first(j);
            if constexpr (Activations<T>::kWide) {
                uint32_t low[kFloatParts];
                uint32_t high[kFloatParts];
                split(raw_[first], low);
                split(raw_[first + Codes::kStride], high);
#pragma unroll
                for (int part = 0; part < kFloatParts; ++part) {
                    result.pairs[part][j] = upper_halves(low[part], high[part]);
                }
            } else {
                result.pairs[0][j] = pair_of(raw_, first, Codes::kStride);
            }
        }
        return result;
    }

  private:
    uint32_t raw_[kWords];
};

}  // namespace omniquant

#endif

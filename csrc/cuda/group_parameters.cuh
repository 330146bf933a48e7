// Scales and zero points of a group of columns.
#ifndef OMNIQUANT_GROUP_PARAMETERS_CUH
#define OMNIQUANT_GROUP_PARAMETERS_CUH

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kept.cuh"
#include "omniquant.h"
#include "packed_plan.h"

namespace omniquant {

// Scales [rows, groups] of an element type, zero points [rows, groups] or null.
struct PackedGroups {
    const void *scale;
    const uint8_t *zero_point;
    int groups;
    int dtype;

    __device__ __forceinline__ PackedGroups from_row(int row) const {
        const int64_t begin = int64_t{row} * groups;
        const int bytes = dtype == OMNIQUANT_FLOAT32 ? 4 : 2;
        return {static_cast<const char *>(scale) + begin * bytes,
                zero_point == nullptr ? nullptr : zero_point + begin, groups, dtype};
    }
};

// The scales and zero points of kLaneRows of the lane's rows. They are converted only when they are
// needed, so that nothing waits for the loads.
template <int kLaneRows>
class GroupParameters {
  public:
    // all: from the block's first row on, of which `rows` exist; first: the lane's first row. Its
    // other rows follow at half a tile each.
    __device__ __forceinline__ GroupParameters(const PackedGroups &all, int rows, int first)
        : all_{kept(all.scale), kept(all.zero_point), all.groups, all.dtype} {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            rows_[i] = kept(min(first + i * (kTileRows / 2), rows - 1) * all.groups);
        }
    }

    // The last group stands for those behind it.
    __device__ __forceinline__ void load(int group) {
        group = min(group, all_.groups - 1);
        if (all_.dtype == OMNIQUANT_FLOAT32) {
            load(scale_, static_cast<const uint32_t *>(all_.scale), group);
        } else {
            load(scale_, static_cast<const uint16_t *>(all_.scale), group);
        }
        if (all_.zero_point != nullptr) {
            load(zero_point_, all_.zero_point, group);
        }
    }

    // Without zero points, the zero point of symmetric codes, 2^(bits - 1).
    __device__ __forceinline__ void numbers(int bits, float (&scale)[kLaneRows],
                                            float (&zero_point)[kLaneRows]) const {
        convert(scale);
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            zero_point[i] =
                static_cast<float>(all_.zero_point == nullptr ? 1u << (bits - 1) : zero_point_[i]);
        }
    }

  private:
    template <typename T>
    __device__ __forceinline__ void load(uint32_t (&to)[kLaneRows], const T *from, int group) {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            to[i] = __ldg(from + (rows_[i] + group));
        }
    }

    __device__ __forceinline__ void convert(float (&scale)[kLaneRows]) const {
        if (all_.dtype == OMNIQUANT_FLOAT16) {
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i) {
                scale[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(scale_[i])));
            }
        } else {
            const int shift = all_.dtype == OMNIQUANT_BFLOAT16 ? 16 : 0;
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i) {
                scale[i] = float_of_bits(scale_[i] << shift);
            }
        }
    }

    PackedGroups all_;
    int rows_[kLaneRows];
    uint32_t scale_[kLaneRows];
    uint32_t zero_point_[kLaneRows];
};

}  // namespace omniquant

#endif

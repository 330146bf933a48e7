// The product of a few rows of activations with a packed weight, bound by the reading of the
// weight.
//
// A block takes 16 or 32 output channels; its warps take different columns of them, 64 bytes of
// each row at a time, and add their sums up at the end, in a fixed order. The weight comes through
// asynchronous copies in 16-byte pieces (weight_ring.cuh) and is read once; x comes from the
// caches, one step ahead of its use.
//
// The multiplying is the matrix units' work: 8 activations cost what one costs, and codes enter as
// they are, as small integers in 16-bit floats that a mask and a constant make of their bits
// (fragments.h). That leaves about one integer instruction a weight, which is what a 2-bit weight
// has time for. Products of codes with 16-bit activations are exact, sums are float32; float32
// activations go in as three bfloat16 parts.
//
// Scales and zero points wait until a group's sum is done:
//     y += scale * (sum (code + offset) x - sum offset x - zero_point * sum x)
// The two sums of x alone are the same for all rows: one more matrix instruction, with the offsets
// in its upper rows and ones in its lower ones, gives both in the registers where they are needed.
#ifndef OMNIQUANT_PACKED_LINEAR_CUH
#define OMNIQUANT_PACKED_LINEAR_CUH

#include <cuda_runtime.h>

#include <cstdint>

#include "omniquant.h"
#include "packed_operands.cuh"
#include "packed_plan.h"
#include "ptx.cuh"
#include "rows.cuh"
#include "weight_ring.cuh"

namespace omniquant {

struct PackedLinear {
    const void *x;              // [n, columns]
    const uint32_t *words;      // [rows, words_per_row]
    const void *scale;          // [rows, groups]
    const uint8_t *zero_point;  // [rows, groups], or null
    void *out;                  // [n, rows]
    int n;
    int columns;
    int rows;
    int groups;
    int words_per_row;
    int scale_type;
    bool words_are_aligned;
    bool x_is_aligned;
    GroupSteps steps;
};

__device__ inline float scale_of(uint32_t bits, int type) {
    switch (type) {
        case OMNIQUANT_FLOAT16:
            return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
        case OMNIQUANT_BFLOAT16:
            return float_of(bits << 16);
        default:
            return float_of(bits);
    }
}

// Scales and zero points of a group, in the lane's rows. As they are stored until they are needed,
// so that nothing waits for them.
template <int kRowTiles>
class GroupParameters {
  public:
    __device__ __forceinline__ void load(const PackedLinear &p, int first_row, int group,
                                         int lane) {
        group = group < p.groups ? group : p.groups - 1;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
            const int row = first_row + i * (kTileRows / 2) + lane / kQuad;
            const int64_t at =
                static_cast<int64_t>(row < p.rows ? row : p.rows - 1) * p.groups + group;
            scale_[i] = p.scale_type == OMNIQUANT_FLOAT32
                            ? __ldg(static_cast<const uint32_t *>(p.scale) + at)
                            : __ldg(static_cast<const uint16_t *>(p.scale) + at);
            if (p.zero_point != nullptr) {
                zero_point_[i] = __ldg(p.zero_point + at);
            }
        }
    }

    __device__ __forceinline__ float scale(int i, int type) const {
        return scale_of(scale_[i], type);
    }

    __device__ __forceinline__ float zero_point(int i, const PackedLinear &p, int bits) const {
        return static_cast<float>(p.zero_point != nullptr ? zero_point_[i] : 1u << (bits - 1));
    }

  private:
    uint32_t scale_[2 * kRowTiles];
    uint32_t zero_point_[2 * kRowTiles];
};

// A warp's sums, in the registers of the matrix instruction.
template <int kBits, typename T, int kRowTiles, int kColumnTiles>
class WarpSums {
    using X = Activations<T>;
    using Format = typename X::Format;

  public:
    using Decoder = Codes<kBits, Format, X::kWide>;

    template <typename Ring>
    __device__ __forceinline__ void multiply(
        const Ring &ring, int slot, int unit,
        const uint32_t (&x)[kColumnTiles][X::kParts][kLanePairs]) {
#pragma unroll
        for (int j = 0; j < kLanePairs; j += 2) {
            constexpr uint32_t kOne = powers_of_two<Format>(0);
            const uint32_t constants[4] = {Decoder::offset(j), kOne, Decoder::offset(j + 1), kOne};
            multiply_columns(of_x_, constants, x, j);
        }
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            uint32_t upper[Decoder::kTiles][kLanePairs];
            uint32_t lower[Decoder::kTiles][kLanePairs];
            decode(ring, slot, tile * kTileRows, unit, upper);
            decode(ring, slot, tile * kTileRows + kTileRows / 2, unit, lower);
#pragma unroll
            for (int part = 0; part < Decoder::kTiles; ++part) {
#pragma unroll
                for (int j = 0; j < kLanePairs; j += 2) {
                    const uint32_t codes[4] = {upper[part][j], lower[part][j], upper[part][j + 1],
                                               lower[part][j + 1]};
                    multiply_columns(of_codes_[tile], codes, x, j);
                }
            }
        }
    }

    // Ends a group: its sums go into the totals.
    __device__ __forceinline__ void scale(const GroupParameters<kRowTiles> &group,
                                          const PackedLinear &p) {
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
            const float scale = group.scale(i, p.scale_type);
            const float zero_point = group.zero_point(i, p, kBits);
#pragma unroll
            for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    float &sum = of_codes_[i / 2][tile][i % 2 * 2 + k];
                    float &total = totals_[i / 2][tile][i % 2 * 2 + k];
                    const float offsets = of_x_[tile][k];
                    const float ones = of_x_[tile][2 + k];
                    total = fmaf(scale, fmaf(-zero_point, ones, sum - offsets), total);
                    sum = 0.0f;
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                of_x_[tile][k] = 0.0f;
            }
        }
    }

    // The totals as a matrix [activations, rows].
    __device__ __forceinline__ void store(float *to, int lane) const {
        constexpr int kRows = kRowTiles * kTileRows;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
#pragma unroll
            for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int row = i * (kTileRows / 2) + lane / kQuad;
                    const int column = tile * kTileColumns + lane % kQuad * 2 + k;
                    to[column * kRows + row] = totals_[i / 2][tile][i % 2 * 2 + k];
                }
            }
        }
    }

  private:
    template <typename Ring>
    __device__ __forceinline__ void decode(const Ring &ring, int slot, int first, int unit,
                                           uint32_t (&pairs)[Decoder::kTiles][kLanePairs]) const {
        uint32_t words[Decoder::kWords];
        ring.read(slot, first, unit, words);
        Decoder::decode(words, ring.read_upper(slot, first, unit), pairs);
    }

    // The smallest part of x first.
    __device__ __forceinline__ void multiply_columns(
        float (&sums)[kColumnTiles][4], const uint32_t (&a)[4],
        const uint32_t (&x)[kColumnTiles][X::kParts][kLanePairs], int j) {
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
            for (int part = X::kParts - 1; part >= 0; --part) {
                const uint32_t b[2] = {x[tile][part][j], x[tile][part][j + 1]};
                multiply_add<Format>(sums[tile], a, b);
            }
        }
    }

    float of_codes_[kRowTiles][kColumnTiles][4] = {};
    float of_x_[kColumnTiles][4] = {};  // offsets in the first two, ones in the others
    float totals_[kRowTiles][kColumnTiles][4] = {};
};

// Adds up what the warps left in shared memory.
template <typename T, int kRows, int kColumns>
__device__ void write_sums(const float *sums, int warps, const PackedLinear &p, int first_row,
                           int first_column) {
    const int columns = p.n - first_column < kColumns ? p.n - first_column : kColumns;
    for (int i = threadIdx.x; i < kRows * columns; i += blockDim.x) {
        float total = 0.0f;
        for (int warp = 0; warp < warps; ++warp) {
            total += sums[warp * kRows * kColumns + i];
        }
        const int row = first_row + i % kRows;
        if (row < p.rows) {
            const int64_t column = first_column + i / kRows;
            static_cast<T *>(p.out)[column * p.rows + row] = narrow<T>(total);
        }
    }
}

extern __shared__ uint4 packed_shared[];

template <int kBits, typename T, int kRowTiles, int kColumnTiles>
__global__ void __launch_bounds__(kMaxWarps *kWarp) packed_linear_kernel(const PackedLinear p) {
    using X = Activations<T>;
    using Sums = WarpSums<kBits, T, kRowTiles, kColumnTiles>;
    constexpr int kRows = kRowTiles * kTileRows;
    constexpr int kColumns = kColumnTiles * kTileColumns;
    const int lane = threadIdx.x % kWarp;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);  // known to be uniform
    const int warps = blockDim.x / kWarp;
    const int first_column = blockIdx.x * kColumns;
    const int first_row = blockIdx.y * kRows;

    auto *shared = reinterpret_cast<uint32_t *>(packed_shared);
    WeightRing<kBits, kRows> ring(p.words + static_cast<int64_t>(first_row) * p.words_per_row,
                                  p.words_per_row, min(p.rows - first_row, kRows),
                                  p.words_are_aligned, p.columns,
                                  shared + warp * kStages * kRows * chunk_words(kBits), lane);
    const int chunk_steps = units_per_chunk(kBits) * p.steps.steps_per_unit;
    const int steps = ceil_divide(p.columns, kUnit) * p.steps.steps_per_unit;
    const int chunks = ceil_divide(steps, chunk_steps);
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
        ring.fetch(warp + stage * warps, stage);
    }

    // Rows of x behind the last are the last once more; their sums are not used.
    const T *x[kColumnTiles];
    X rows_of_x[kColumnTiles];
    const auto load_x = [&](int step) {
        const bool is_half = p.steps.steps_per_unit == 2;
        const int unit = is_half ? step / 2 : step;
        const bool takes_part = !is_half || lane % kQuad / 2 == step % 2;
        const int column = unit * kUnit + lane % kQuad * kLaneCodes;
        const int count = takes_part ? p.columns - column : 0;
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
            rows_of_x[tile].load(x[tile] + column, count, p.x_is_aligned);
        }
    };
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
        const int row = min(first_column + tile * kTileColumns + lane / kQuad, p.n - 1);
        x[tile] = static_cast<const T *>(p.x) + static_cast<int64_t>(row) * p.columns;
    }
    load_x(warp * chunk_steps);

    Sums sums;
    GroupParameters<kRowTiles> group;
    GroupCursor start = cursor_of(warp * chunk_steps, p.steps.steps_per_group);
    const GroupCursor stride = cursor_of(warps * chunk_steps, p.steps.steps_per_group);
    int slot = 0;
    for (int chunk = warp; chunk < chunks; chunk += warps) {
        ring.fetch(chunk + (kStages - 1) * warps, (slot + kStages - 1) % kStages);
        wait_for_copies<kStages - 1>();
        __syncwarp();
        GroupCursor cursor = start;
        const int end = min((chunk + 1) * chunk_steps, steps);
        for (int step = chunk * chunk_steps; step < end; ++step) {
            uint32_t operands[kColumnTiles][X::kParts][kLanePairs];
#pragma unroll
            for (int tile = 0; tile < kColumnTiles; ++tile) {
                rows_of_x[tile].template operands<typename Sums::Decoder>(operands[tile]);
            }
            const bool is_last = step + 1 == end;
            load_x(is_last ? (chunk + warps) * chunk_steps : step + 1);
            if (cursor.step == 0 || step == chunk * chunk_steps) {
                group.load(p, first_row, cursor.group, lane);
            }
            const int unit = (step - chunk * chunk_steps) / p.steps.steps_per_unit;
            sums.multiply(ring, slot, unit, operands);
            cursor.advance({0, 1}, p.steps.steps_per_group);
            if (cursor.step == 0 || is_last) {
                sums.scale(group, p);
            }
        }
        start.advance(stride, p.steps.steps_per_group);
        slot = (slot + 1) % kStages;
        __syncwarp();  // all have read the slot that is filled next
    }

    wait_for_copies<0>();
    __syncthreads();  // the rings are free
    auto *partial = reinterpret_cast<float *>(packed_shared);
    sums.store(partial + warp * kRows * kColumns, lane);
    __syncthreads();
    write_sums<T, kRows, kColumns>(partial, warps, p, first_row, first_column);
}

}  // namespace omniquant

#endif

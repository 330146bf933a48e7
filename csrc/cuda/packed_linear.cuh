// The product of a few tokens with a packed weight. Reading the weight limits its speed.
//
// A block takes 32 rows of the weight. Its warps take different columns, 64 bytes of each row at a
// time, and add up their sums at the end, in a fixed order. The weight is read once, by
// asynchronous copies of 16 bytes into a ring of each warp's own (weight_ring.cuh); x comes from
// the caches, a step ahead of its use (packed_x.cuh). A step is a span of 64 columns.
//
// The matrix units multiply: 8 tokens cost what one costs, and codes enter as they are, as small
// integers in 16-bit floats that a mask and a constant make of their bits (fragments.h). That
// leaves about one integer instruction for each element of the weight, which is what 2 bit has time
// for. Products of codes with 16-bit activations are exact, sums are float32; float32 activations
// enter as three bfloat16 parts.
//
// Scales and zero points wait until a group's sum is done:
//     y += scale * (sum (code + offset) x - sum offset x - zero_point * sum x)
// The two sums of x alone are the same for all rows: one more matrix instruction, with the offsets
// in its upper rows and ones in its lower ones, gives both in the registers where they are needed.
#ifndef OMNIQUANT_PACKED_LINEAR_CUH
#define OMNIQUANT_PACKED_LINEAR_CUH

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "group_parameters.cuh"
#include "packed_plan.h"
#include "packed_x.cuh"
#include "ptx.cuh"
#include "rows.cuh"
#include "warp_sums.cuh"
#include "weight_ring.cuh"

namespace omniquant {

struct PackedLinear {
    const void *x;          // [tokens, columns]
    const uint32_t *words;  // [rows, words_per_row]
    PackedGroups groups;
    void *out;  // [tokens, rows]
    int tokens;
    int columns;
    int rows;
    int words_per_row;
    bool words_are_aligned;
    bool x_is_aligned;
    int steps_per_group;
};

// Adds up what the warps left in shared memory.
template <typename T, int kTokens>
__device__ void write_sums(const float *sums, int warps, const PackedLinear &p, int first_row,
                           int first_token) {
    const int tokens = p.tokens - first_token < kTokens ? p.tokens - first_token : kTokens;
    for (int i = threadIdx.x; i < kBlockRows * tokens; i += blockDim.x) {
        float total = 0.0f;
        for (int warp = 0; warp < warps; ++warp) {
            total += sums[warp * kBlockRows * kTokens + i];
        }
        const int row = first_row + i % kBlockRows;
        if (row < p.rows) {
            const int64_t token = first_token + i / kBlockRows;
            static_cast<T *>(p.out)[token * p.rows + row] = narrow<T>(total);
        }
    }
}

extern __shared__ uint4 packed_shared[];

// kHalves: a step is half of a span, since a group may end inside of a span.
template <int kBits, typename T, int kTokenTiles, bool kIsVector, bool kHalves>
__global__ void __launch_bounds__(kMaxThreads) packed_linear_kernel(const PackedLinear p) {
    constexpr int kTokens = kIsVector ? 1 : kTokenTiles * kTileTokens;
    using Ring = WeightRing<kBits>;
    using Sums = WarpSums<kBits, T, kTokenTiles, kIsVector>;
    using Decoder = typename Sums::Decoder;
    using X = std::conditional_t<kIsVector, VectorX<T, Decoder, kHalves>,
                                 MatrixX<T, Decoder, kTokenTiles, kHalves>>;
    const int lane = threadIdx.x % kWarp;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);  // known to be uniform
    const int warps = blockDim.x / kWarp;
    const int first_token = blockIdx.x * kTokens;
    const int first_row = blockIdx.y * kBlockRows;
    const int rows = min(p.rows - first_row, kBlockRows);

    auto *shared =
        reinterpret_cast<uint32_t *>(packed_shared) + warp * (Ring::kWarpWords + X::kSharedWords);
    const Ring ring(p.words + int64_t{first_row} * p.words_per_row, p.words_per_row, rows,
                    p.words_are_aligned, shared, lane);
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) {
        ring.fetch(warp + stage * warps, stage);
    }
    constexpr int kChunkSteps = spans_per_chunk(kBits) * (kHalves ? 2 : 1);
    const int chunks = ceil_divide(p.columns, spans_per_chunk(kBits) * kSpan);
    X x(static_cast<const T *>(p.x), first_token, p.tokens, p.columns, kChunkSteps, p.x_is_aligned,
        shared + Ring::kWarpWords, lane);
    x.prepare(warp * kChunkSteps);
    Sums sums(lane);
    typename Sums::Parameters group(p.groups.from_row(first_row), rows, sums.first_row());
    GroupCursor start = cursor_of(warp * kChunkSteps, p.steps_per_group);
    const GroupCursor stride = cursor_of(warps * kChunkSteps, p.steps_per_group);

    unsigned slot = 0;
    for (int chunk = warp; chunk < chunks; chunk += warps) {
        const int first = chunk * kChunkSteps;
        const int next_first = (chunk + warps) * kChunkSteps;
        ring.fetch(chunk + (kStages - 1) * warps, (slot + kStages - 1) % kStages);
        x.begin_chunk(next_first);
        wait_for_copies<kStages - 1>();
        __syncwarp();  // what other lanes have copied and shown is there
        GroupCursor cursor = start;
#pragma unroll(kIsVector ? kChunkSteps : 1)
        for (int step = 0; step < kChunkSteps; ++step) {
            const bool is_last = step + 1 == kChunkSteps;
            LaneOperands<T> operands[kTokenTiles];
            x.take(step, is_last ? next_first : first + step + 1, operands);
            if (cursor.step == 0 || step == 0) {
                group.load(cursor.group);
            }
            sums.multiply(ring, slot, kHalves ? step / 2 : step, operands);
            cursor.advance({0, 1}, p.steps_per_group);
            if (cursor.step == 0 || is_last) {
                sums.end_group(group);
            }
        }
        start.advance(stride, p.steps_per_group);
        slot = (slot + 1) % kStages;
        __syncwarp();  // all have read the slot that is filled next
    }

    wait_for_copies<0>();
    __syncthreads();  // the rings are free
    auto *partial = reinterpret_cast<float *>(packed_shared);
    sums.store(partial + warp * kBlockRows * kTokens);
    __syncthreads();
    write_sums<T, kTokens>(partial, warps, p, first_row, first_token);
}

}  // namespace omniquant

#endif

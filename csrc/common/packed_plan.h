// How a product with a packed weight is cut into blocks, warps and steps: arithmetic for the host,
// which launches the kernel, and constants that both share.
#ifndef OMNIQUANT_PACKED_PLAN_H
#define OMNIQUANT_PACKED_PLAN_H

#include <algorithm>
#include <cstdint>

#include "ceil_divide.h"
#include "fragments.h"
#include "inline.h"

namespace omniquant {

constexpr int kTileRows = 16;  // output channels of a matrix instruction
constexpr int kRowTiles = 2;   // that a warp multiplies with the same tokens
constexpr int kBlockRows = kRowTiles * kTileRows;
constexpr int kTileTokens = 8;             // and its tokens
constexpr int kQuad = 4;                   // lanes that share a row
constexpr int kSpan = kQuad * kLaneCodes;  // columns that a warp takes at a time
constexpr int kChunkWords = 16;            // words of a row that a warp fetches at a time: 64 bytes
constexpr int kStages = 4;                 // chunks of a warp in flight
constexpr int kMaxWarps = 16;
constexpr int kMaxThreads = kMaxWarps * 32;

// Bits of a code in its widest plane.
OMNIQUANT_INLINE constexpr int plane_bits(int bits) {
    return bits == 3 ? 2 : bits;
}

OMNIQUANT_INLINE constexpr int spans_per_chunk(int bits) {
    return kChunkWords * 32 / plane_bits(bits) / kSpan;
}

// Words of a row's chunk, both planes.
OMNIQUANT_INLINE constexpr int chunk_words(int bits) {
    return kChunkWords * bits / plane_bits(bits);
}

// Steps of a chunk, at most: halves of its spans.
constexpr int kMaxChunkSteps = 2 * spans_per_chunk(2);

// Shared memory of a warp for the operands of a vector's chunk, in words.
constexpr int kVectorWords = kMaxChunkSteps * kQuad * kLanePairs;

struct PackedPlan {
    bool is_vector;   // one token of 16-bit elements
    bool halves;      // a step is half of a span, since a group may end inside of a span
    int token_tiles;  // that a warp multiplies with the same codes
    int warps;
    int shared_bytes;
};

// Every warp of a block takes its own columns of all the block's rows, so that a block reads x
// once. Few blocks have more warps each.
inline PackedPlan packed_plan(int bits, int64_t tokens, int64_t rows, int64_t columns,
                              int64_t group_size, bool is_wide, int processors,
                              int max_shared_bytes) {
    PackedPlan plan = {};
    plan.is_vector = tokens == 1 && !is_wide;
    plan.halves = group_size < columns && group_size % kSpan != 0;
    plan.token_tiles = tokens > kTileTokens && !is_wide && !plan.halves ? 2 : 1;
    const int64_t blocks = ceil_divide<int64_t>(rows, kBlockRows) *
                           ceil_divide<int64_t>(tokens, kTileTokens * plan.token_tiles);
    const int64_t chunks = ceil_divide<int64_t>(columns, spans_per_chunk(bits) * kSpan);
    const int ring_words = kStages * kBlockRows * chunk_words(bits);
    const int warp_bytes = 4 * (ring_words + (plan.is_vector ? kVectorWords : 0));
    const int most = blocks >= processors ? kMaxWarps / 2 : kMaxWarps;
    const int fitting = std::max(std::min(most, max_shared_bytes / warp_bytes), 1);
    plan.warps = static_cast<int>(std::min<int64_t>(fitting, chunks));
    plan.shared_bytes = plan.warps * warp_bytes;
    return plan;
}

// The length of a group, counted in steps.
inline int steps_per_group(int64_t columns, int64_t group_size, bool halves) {
    const int step = halves ? kSpan / 2 : kSpan;
    return static_cast<int>(ceil_divide<int64_t>(std::min(group_size, columns), step));
}

// Where a step stands among the groups.
struct GroupCursor {
    int group;
    int step;  // inside of the group

    OMNIQUANT_INLINE void advance(GroupCursor by, int steps_per_group) {
        group += by.group;
        step += by.step;
        if (step >= steps_per_group) {
            step -= steps_per_group;
            ++group;
        }
    }
};

OMNIQUANT_INLINE GroupCursor cursor_of(int steps, int steps_per_group) {
    return {steps / steps_per_group, steps % steps_per_group};
}

}  // namespace omniquant

#endif

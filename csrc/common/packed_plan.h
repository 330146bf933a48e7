// How a product with packed weights is cut into blocks, warps and steps. Plain arithmetic for the
// host that launches, and constants that the kernel shares with it.
#ifndef OMNIQUANT_PACKED_PLAN_H
#define OMNIQUANT_PACKED_PLAN_H

#include <algorithm>
#include <cstdint>

#include "fragments.h"
#include "inline.h"

namespace omniquant {

constexpr int kTileRows = 16;              // output channels of a matrix instruction
constexpr int kTileColumns = 8;            // activations of one
constexpr int kQuad = 4;                   // lanes that share a row
constexpr int kUnit = kQuad * kLaneCodes;  // columns that a warp takes at a time
constexpr int kChunkWords = 16;            // words of a row that a warp fetches at a time: 64 bytes
constexpr int kStages = 4;                 // chunks of a warp in flight
constexpr int kMaxWarps = 16;

// Bits of a code in its widest plane, and in the other.
OMNIQUANT_INLINE constexpr int plane_bits(int bits) {
    return bits == 3 ? 2 : bits;
}

OMNIQUANT_INLINE constexpr int units_per_chunk(int bits) {
    return kChunkWords * 32 / plane_bits(bits) / kUnit;
}

// Words of a row's chunk, both planes.
OMNIQUANT_INLINE constexpr int chunk_words(int bits) {
    return kChunkWords * bits / plane_bits(bits);
}

template <typename T>
OMNIQUANT_INLINE constexpr T ceil_divide(T count, T size) {
    return (count + size - 1) / size;
}

struct PackedPlan {
    int row_tiles;     // tiles of output channels that a warp multiplies with the same activations
    int column_tiles;  // tiles of activations that it multiplies with the same codes
    int warps;
    int shared_bytes;
};

// Every warp of a block takes its own columns and all the block's rows: the activations are read
// once a block. So blocks are tall where that still gives every multiprocessor one.
inline PackedPlan packed_plan(int bits, int64_t n, int64_t rows, int64_t columns, bool is_wide,
                              int processors, int max_shared_bytes) {
    PackedPlan plan = {};
    plan.column_tiles = n > kTileColumns && !is_wide ? 2 : 1;
    const bool is_tall = plan.column_tiles == 2 || rows >= int64_t{2} * kTileRows * processors;
    plan.row_tiles = is_tall ? 2 : 1;
    const int64_t blocks = ceil_divide<int64_t>(rows, kTileRows * plan.row_tiles) *
                           ceil_divide<int64_t>(n, kTileColumns * plan.column_tiles);
    const int64_t chunks = ceil_divide<int64_t>(columns, units_per_chunk(bits) * kUnit);
    const int warp_bytes = kStages * kTileRows * plan.row_tiles * chunk_words(bits) * 4;
    const int most = blocks >= processors ? kMaxWarps / 2 : kMaxWarps;
    const int fitting = std::max(std::min(most, max_shared_bytes / warp_bytes), 1);
    plan.warps = static_cast<int>(std::min<int64_t>(fitting, std::max<int64_t>(chunks, 1)));
    plan.shared_bytes = plan.warps * warp_bytes;
    return plan;
}

// Groups of input channels, counted in steps. A step is a unit; where groups may end inside of a
// unit it is half of one: half of the lanes multiply with zeros, then the other half.
struct GroupSteps {
    int steps_per_unit;
    int steps_per_group;
};

OMNIQUANT_INLINE GroupSteps group_steps(int64_t columns, int64_t group_size) {
    const int64_t half = kUnit / 2;
    const int64_t all = ceil_divide<int64_t>(columns, kUnit) * 2;
    const int64_t halves = group_size < columns ? group_size / half : all;
    return halves % 2 == 0 ? GroupSteps{1, static_cast<int>(halves / 2)}
                           : GroupSteps{2, static_cast<int>(halves)};
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

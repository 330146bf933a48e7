// The arithmetic of one element and of one row's grid, the same for host and device.
// Every operation is rounded on its own, in the order of the torch default.
#ifndef OMNIQUANT_GRID_H
#define OMNIQUANT_GRID_H

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "inline.h"

namespace omniquant {

struct Grid {
    float scale;
    float zero_point;
    float quant_min;  // smallest code
    float quant_max;  // largest code
};

// A row's extremes and zero; both NaN where the row holds a NaN.
struct Range {
    float low;
    float high;
};

// The sums over a row that the backward of a dynamic grid needs.
struct RowSums {
    float scale;      // gradient * slope
    float outside;    // gradients of the elements that were clamped
    float low_ties;   // elements equal to the range's low end; exact to 2^24
    float high_ties;  // elements equal to its high end
};

// Keeps NaN, as torch.clamp does.
OMNIQUANT_INLINE float clamp(float value, float low, float high) {
    const float raised = value < low ? low : value;
    return raised > high ? high : raised;
}

// Code of a ratio value / scale before the clamp. An element is inside where the clamp keeps it.
OMNIQUANT_INLINE float rounded_code(float ratio, Grid grid) {
    return rintf(ratio) + grid.zero_point;
}

OMNIQUANT_INLINE float clamped_code(float code, Grid grid) {
    return clamp(code, grid.quant_min, grid.quant_max);
}

OMNIQUANT_INLINE float fake_quantize(float x, Grid grid) {
    const float code = clamped_code(rounded_code(x / grid.scale, grid), grid);
    return (code - grid.zero_point) * grid.scale;
}

// Gradient of the result to the scale, rounding counted as the identity.
OMNIQUANT_INLINE float slope(float ratio, float clamped, bool inside, Grid grid) {
    return clamped - grid.zero_point - (inside ? ratio : 0.0f);
}

OMNIQUANT_INLINE float range_scale(float extent, float levels) {
    const float scale = extent / levels;
    return scale < FLT_MIN ? FLT_MIN : scale;
}

// The range that the grid covers: for symmetric codes, equally wide on both sides of zero.
OMNIQUANT_INLINE Range grid_range(Range range, bool symmetric) {
    const float highest = -range.low > range.high ? -range.low : range.high;
    return symmetric ? Range{-highest, highest} : range;
}

OMNIQUANT_INLINE Grid dynamic_grid(Range range, int32_t bits, bool symmetric) {
    const float half = static_cast<float>(1 << (bits - 1));
    if (symmetric) {
        return {range_scale(range.high, half - 1.0f), 0.0f, -half, half - 1.0f};
    }
    const float levels = 2.0f * half - 1.0f;
    const float scale = range_scale(range.high - range.low, levels);
    return {scale, clamp(rintf(-range.low / scale), 0.0f, levels), 0.0f, levels};
}

// Gradient that each element at an end of the range receives through scale and zero point. An end
// that is the constant zero receives none; a scale at its floor passes none.
OMNIQUANT_INLINE Range end_gradients(RowSums sums, Range range, Grid grid, bool symmetric) {
    const bool floored = !(grid.scale > FLT_MIN);
    if (symmetric) {
        const float ties = sums.low_ties + sums.high_ties;
        const float share = sums.scale / grid.quant_max / (ties > 0.0f ? ties : 1.0f);
        return floored ? Range{0.0f, 0.0f} : Range{-share, share};
    }
    // Rounding passes the zero point's gradient on to -low / scale unless the clamp caught it.
    const float ratio = range.low / grid.scale;
    const float zero = rintf(-ratio) == grid.zero_point ? -sums.outside : 0.0f;
    const float high = floored ? 0.0f : (sums.scale + zero * ratio) / grid.quant_max;
    const float low = -high - zero;
    return {range.low < 0.0f && sums.low_ties > 0.0f ? low / sums.low_ties : 0.0f,
            range.high > 0.0f && sums.high_ties > 0.0f ? high / sums.high_ties : 0.0f};
}

// Gradient that an element receives from the ends of the range that it is equal to.
OMNIQUANT_INLINE float end_share(float x, Range range, Range gradients) {
    const float low = x == range.low ? gradients.low : 0.0f;
    return low + (x == range.high ? gradients.high : 0.0f);
}

}  // namespace omniquant

#endif

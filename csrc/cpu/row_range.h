// The extremes of a row, in one pass.
#ifndef OMNIQUANT_ROW_RANGE_H
#define OMNIQUANT_ROW_RANGE_H

#include <cstdint>
#include <limits>

#include "grid.h"

namespace omniquant {

// Widens a range by the elements of a row; both ends are NaN where the row holds one.
OMNIQUANT_INLINE Range row_range(const float *__restrict x, int64_t columns, Range start) {
    float low = start.low;
    float high = start.high;
    int32_t nans = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : nans)
    for (int64_t i = 0; i < columns; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        nans |= static_cast<int32_t>(x[i] != x[i]);
    }
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return nans != 0 ? Range{nan, nan} : Range{low, high};
}

}  // namespace omniquant

#endif

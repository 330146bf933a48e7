// The extremes of float32 rows and where they stand, in one pass over memory: the second loop over
// a row finds it in the cache.
#include <cstdint>
#include <limits>

#include "inline.h"
#include "multiversion.h"
#include "omniquant.h"

namespace {

// First index of a value that stands in the row.
OMNIQUANT_INLINE int32_t first_of(const float *__restrict x, int32_t columns, float value) {
    int32_t first = columns;
#pragma omp simd reduction(min : first)
    for (int32_t i = 0; i < columns; ++i) {
        const int32_t at = x[i] == value ? i : columns;
        first = at < first ? at : first;
    }
    return first;
}

OMNIQUANT_INLINE int32_t first_nan(const float *x) {
    int32_t i = 0;
    while (x[i] == x[i]) {
        ++i;
    }
    return i;
}

}  // namespace

OMNIQUANT_MULTIVERSION
void omniquant_row_extremes(const float *x, float *low, float *high, int64_t *low_at,
                            int64_t *high_at, int64_t columns, int64_t begin, int64_t end) {
    const auto count = static_cast<int32_t>(columns);
    for (int64_t row = begin; row < end; ++row) {
        const float *__restrict values = x + row * columns;
        float lowest = values[0];
        float highest = values[0];
        int32_t nans = 0;
#pragma omp simd reduction(min : lowest) reduction(max : highest) reduction(| : nans)
        for (int32_t i = 0; i < count; ++i) {
            lowest = values[i] < lowest ? values[i] : lowest;
            highest = values[i] > highest ? values[i] : highest;
            nans |= static_cast<int32_t>(values[i] != values[i]);
        }
        if (nans != 0) {
            low[row] = high[row] = std::numeric_limits<float>::quiet_NaN();
            low_at[row] = high_at[row] = first_nan(values);
            continue;
        }
        low[row] = lowest;
        high[row] = highest;
        low_at[row] = first_of(values, count, lowest);
        high_at[row] = first_of(values, count, highest);
    }
}

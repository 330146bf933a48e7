// The extremes of float32 rows and where they stand, in one pass over memory: the second loop over
// a row finds it in the cache.
#include <cstdint>

#include "multiversion.h"
#include "omniquant.h"
#include "row_range.h"

using namespace omniquant;

namespace {

// First index of a value that the row contains.
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
        const Range range = row_range(values, columns, {values[0], values[0]});
        const bool has_nan = range.low != range.low;
        low[row] = range.low;
        high[row] = range.high;
        low_at[row] = has_nan ? first_nan(values) : first_of(values, count, range.low);
        high_at[row] = has_nan ? low_at[row] : first_of(values, count, range.high);
    }
}

// Fake quantization of float32 rows on grids made from their own extremes.
#include <cstdint>

#include "grid.h"
#include "multiversion.h"
#include "omniquant.h"
#include "row_range.h"

using namespace omniquant;

namespace {

// The range of a dynamic grid contains zero.
constexpr Range kZero = {0.0f, 0.0f};

// Writes the gradient of the elements themselves; returns the sums for the gradient of the
// extremes.
OMNIQUANT_INLINE RowSums pass_gradient(const float *__restrict grad, const float *__restrict x,
                                       float *__restrict grad_x, int64_t columns, Range range,
                                       Grid grid) {
    float sum = 0.0f;
    float outside = 0.0f;
    int32_t low_ties = 0;
    int32_t high_ties = 0;
#pragma omp simd reduction(+ : sum, outside, low_ties, high_ties)
    for (int64_t i = 0; i < columns; ++i) {
        const float ratio = x[i] / grid.scale;
        const float code = rounded_code(ratio, grid);
        const float clamped = clamped_code(code, grid);
        const bool inside = code == clamped;
        sum += grad[i] * slope(ratio, clamped, inside, grid);
        outside += inside ? 0.0f : grad[i];
        low_ties += static_cast<int32_t>(x[i] == range.low);
        high_ties += static_cast<int32_t>(x[i] == range.high);
        grad_x[i] = inside ? grad[i] : 0.0f;
    }
    return {sum, outside, static_cast<float>(low_ties), static_cast<float>(high_ties)};
}

}  // namespace

OMNIQUANT_MULTIVERSION
void omniquant_dynamic_fake_quantize(const float *x, float *out, int64_t columns, int64_t begin,
                                     int64_t end, int32_t bits, int32_t symmetric) {
    for (int64_t row = begin; row < end; ++row) {
        const float *__restrict values = x + row * columns;
        float *__restrict results = out + row * columns;
        const Range range = grid_range(row_range(values, columns, kZero), symmetric != 0);
        const Grid grid = dynamic_grid(range, bits, symmetric != 0);
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) {
            results[i] = fake_quantize(values[i], grid);
        }
    }
}

OMNIQUANT_MULTIVERSION
void omniquant_dynamic_fake_quantize_backward(const float *grad, const float *x, float *grad_x,
                                              int64_t columns, int64_t begin, int64_t end,
                                              int32_t bits, int32_t symmetric) {
    for (int64_t row = begin; row < end; ++row) {
        const float *__restrict values = x + row * columns;
        float *__restrict results = grad_x + row * columns;
        const Range range = grid_range(row_range(values, columns, kZero), symmetric != 0);
        const Grid grid = dynamic_grid(range, bits, symmetric != 0);
        const RowSums sums =
            pass_gradient(grad + row * columns, values, results, columns, range, grid);
        const Range gradients = end_gradients(sums, range, grid, symmetric != 0);
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) {
            results[i] += end_share(values[i], range, gradients);
        }
    }
}

// Fused fake quantization of float32 rows. Built without contraction and without fast-math: the
// forward equals the torch default bit for bit; only sums are reordered, by `omp simd`.
#include <cstdint>

#include "grid.h"
#include "multiversion.h"
#include "omniquant.h"

using namespace omniquant;

int32_t omniquant_abi_version(void) {
    return OMNIQUANT_ABI_VERSION;
}

OMNIQUANT_MULTIVERSION
void omniquant_fake_quantize(const float *x, const float *scale, const float *zero_point,
                             float *out, int64_t columns, int64_t begin, int64_t end,
                             int32_t quant_min, int32_t quant_max) {
    const auto min = static_cast<float>(quant_min);
    const auto max = static_cast<float>(quant_max);
    for (int64_t row = begin; row < end; ++row) {
        const Grid grid = {scale[row], zero_point[row], min, max};
        const float *__restrict values = x + row * columns;
        float *__restrict results = out + row * columns;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) {
            results[i] = fake_quantize(values[i], grid);
        }
    }
}

OMNIQUANT_MULTIVERSION
void omniquant_fake_quantize_backward(const float *grad, const float *x, const float *scale,
                                      const float *zero_point, float *grad_x, float *grad_scale,
                                      float *grad_zero_point, int64_t columns, int64_t begin,
                                      int64_t end, int32_t quant_min, int32_t quant_max) {
    const auto min = static_cast<float>(quant_min);
    const auto max = static_cast<float>(quant_max);
    for (int64_t row = begin; row < end; ++row) {
        const Grid grid = {scale[row], zero_point[row], min, max};
        const float *__restrict values = x + row * columns;
        const float *__restrict grads = grad + row * columns;
        float *__restrict results = grad_x + row * columns;
        float sum = 0.0f;
        float outside = 0.0f;
#pragma omp simd reduction(+ : sum, outside)
        for (int64_t i = 0; i < columns; ++i) {
            const float ratio = values[i] / grid.scale;
            const float code = rounded_code(ratio, grid);
            const float clamped = clamped_code(code, grid);
            const bool inside = code == clamped;
            sum += grads[i] * slope(ratio, clamped, inside, grid);
            outside += inside ? 0.0f : grads[i];
            results[i] = inside ? grads[i] : 0.0f;
        }
        grad_scale[row] = sum;
        grad_zero_point[row] = -(outside * grid.scale);
    }
}

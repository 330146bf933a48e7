// Fused fake quantization on the device. Built without contraction, so that the forward equals the
// torch default bit for bit. A warp takes a row, a block a long one; nothing waits for the host.
#include <cstdint>

#include "grid.h"
#include "omniquant.h"
#include "rows.cuh"

namespace omniquant {
namespace {

template <int kVector, int kThreads>
__global__ void forward_kernel(const float *x, const float *scale, const float *zero_point,
                               float *out, int64_t rows, int64_t columns, float quant_min,
                               float quant_max) {
    const int64_t row = Team<kThreads>::row();
    if (row >= rows) {
        return;
    }
    const Grid grid = {scale[row], zero_point[row], quant_min, quant_max};
    const int64_t begin = row * columns;
    for_packs<kVector, kThreads>(columns, [&](int64_t i) {
        auto pack = packs<kVector>(x + begin)[i];
        for (float &value : pack.values) {
            value = fake_quantize(value, grid);
        }
        packs<kVector>(out + begin)[i] = pack;
    });
}

template <int kVector, int kThreads>
__global__ void backward_kernel(const float *grad, const float *x, const float *scale,
                                const float *zero_point, float *grad_x, float *grad_scale,
                                float *grad_zero_point, int64_t rows, int64_t columns,
                                float quant_min, float quant_max) {
    const int64_t row = Team<kThreads>::row();
    if (row >= rows) {
        return;
    }
    const Grid grid = {scale[row], zero_point[row], quant_min, quant_max};
    const int64_t begin = row * columns;
    float sum = 0.0f;
    float outside = 0.0f;
    for_packs<kVector, kThreads>(columns, [&](int64_t i) {
        const auto values = packs<kVector>(x + begin)[i];
        auto grads = packs<kVector>(grad + begin)[i];
        for (int k = 0; k < kVector; ++k) {
            const float ratio = values.values[k] / grid.scale;
            const float code = rounded_code(ratio, grid);
            const float clamped = clamped_code(code, grid);
            const bool inside = code == clamped;
            sum += grads.values[k] * slope(ratio, clamped, inside, grid);
            outside += inside ? 0.0f : grads.values[k];
            grads.values[k] = inside ? grads.values[k] : 0.0f;
        }
        packs<kVector>(grad_x + begin)[i] = grads;
    });
    sum = Team<kThreads>::sum(sum);
    outside = Team<kThreads>::sum(outside);
    if (Team<kThreads>::rank() == 0) {
        grad_scale[row] = sum;
        grad_zero_point[row] = -(outside * grid.scale);
    }
}

}  // namespace
}  // namespace omniquant

using namespace omniquant;

int32_t omniquant_cuda_abi_version(void) {
    return OMNIQUANT_ABI_VERSION;
}

int32_t omniquant_cuda_usable(void) {
    cudaFuncAttributes attributes;
    return static_cast<int32_t>(cudaFuncGetAttributes(&attributes, forward_kernel<1, kWarp>));
}

int32_t omniquant_cuda_fake_quantize(const float *x, const float *scale, const float *zero_point,
                                     float *out, int64_t rows, int64_t columns, int32_t quant_min,
                                     int32_t quant_max, void *stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const bool is_aligned = aligned(x, out);
    return dispatch<float>(rows, columns, is_aligned, [&](auto vector, auto threads, auto blocks) {
        forward_kernel<vector(), threads()><<<blocks, kBlockThreads, 0, cuda_stream>>>(
            x, scale, zero_point, out, rows, columns, static_cast<float>(quant_min),
            static_cast<float>(quant_max));
    });
}

int32_t omniquant_cuda_fake_quantize_backward(const float *grad, const float *x, const float *scale,
                                              const float *zero_point, float *grad_x,
                                              float *grad_scale, float *grad_zero_point,
                                              int64_t rows, int64_t columns, int32_t quant_min,
                                              int32_t quant_max, void *stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const bool is_aligned = aligned(grad, x, grad_x);
    return dispatch<float>(rows, columns, is_aligned, [&](auto vector, auto threads, auto blocks) {
        backward_kernel<vector(), threads()><<<blocks, kBlockThreads, 0, cuda_stream>>>(
            grad, x, scale, zero_point, grad_x, grad_scale, grad_zero_point, rows, columns,
            static_cast<float>(quant_min), static_cast<float>(quant_max));
    });
}

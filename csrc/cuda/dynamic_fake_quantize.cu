// Fake quantization on the device, on grids made from each row's own extremes. Half-precision rows
// are widened and narrowed in registers.
#include <cstdint>

#include "grid.h"
#include "omniquant.h"
#include "rows.cuh"

namespace omniquant {
namespace {

template <int kVector, int kThreads, typename T>
__device__ Range row_range(const T *x, int64_t columns) {
    float low = 0.0f;
    float high = 0.0f;
    for_packs<kVector, kThreads>(columns, [&](int64_t i) {
        const auto pack = packs<kVector>(x)[i];
        for (const T element : pack.values) {
            const float value = widen(element);
            low = minimum(value, low);
            high = maximum(value, high);
        }
    });
    return {Team<kThreads>::minimum(low), Team<kThreads>::maximum(high)};
}

template <int kVector, int kThreads, typename T>
__device__ RowSums row_sums(const T *grad, const T *x, int64_t columns, Range range, Grid grid) {
    RowSums sums = {0.0f, 0.0f, 0.0f, 0.0f};
    for_packs<kVector, kThreads>(columns, [&](int64_t i) {
        const auto values = packs<kVector>(x)[i];
        const auto grads = packs<kVector>(grad)[i];
        for (int k = 0; k < kVector; ++k) {
            const float value = widen(values.values[k]);
            const float passed = widen(grads.values[k]);
            const float ratio = value / grid.scale;
            const float code = rounded_code(ratio, grid);
            const float clamped = clamped_code(code, grid);
            const bool inside = code == clamped;
            sums.scale += passed * slope(ratio, clamped, inside, grid);
            sums.outside += inside ? 0.0f : passed;
            sums.low_ties += value == range.low ? 1.0f : 0.0f;
            sums.high_ties += value == range.high ? 1.0f : 0.0f;
        }
    });
    return {Team<kThreads>::sum(sums.scale), Team<kThreads>::sum(sums.outside),
            Team<kThreads>::sum(sums.low_ties), Team<kThreads>::sum(sums.high_ties)};
}

template <int kVector, int kThreads, typename T>
__global__ void forward_kernel(const T *x, T *out, int64_t rows, int64_t columns, int bits,
                               bool symmetric) {
    const int64_t row = Team<kThreads>::row();
    if (row >= rows) {
        return;
    }
    const int64_t begin = row * columns;
    const Range range = grid_range(row_range<kVector, kThreads>(x + begin, columns), symmetric);
    const Grid grid = dynamic_grid(range, bits, symmetric);
    for_packs<kVector, kThreads>(columns, [&](int64_t i) {
        auto pack = packs<kVector>(x + begin)[i];
        for (T &element : pack.values) {
            element = narrow<T>(fake_quantize(widen(element), grid));
        }
        packs<kVector>(out + begin)[i] = pack;
    });
}

template <int kVector, int kThreads, typename T>
__global__ void backward_kernel(const T *grad, const T *x, T *grad_x, int64_t rows, int64_t columns,
                                int bits, bool symmetric) {
    const int64_t row = Team<kThreads>::row();
    if (row >= rows) {
        return;
    }
    const int64_t begin = row * columns;
    const Range range = grid_range(row_range<kVector, kThreads>(x + begin, columns), symmetric);
    const Grid grid = dynamic_grid(range, bits, symmetric);
    const RowSums sums = row_sums<kVector, kThreads>(grad + begin, x + begin, columns, range, grid);
    const Range gradients = end_gradients(sums, range, grid, symmetric);
    for_packs<kVector, kThreads>(columns, [&](int64_t i) {
        const auto values = packs<kVector>(x + begin)[i];
        auto grads = packs<kVector>(grad + begin)[i];
        for (int k = 0; k < kVector; ++k) {
            const float value = widen(values.values[k]);
            const float code = rounded_code(value / grid.scale, grid);
            const bool inside = code == clamped_code(code, grid);
            const float passed = inside ? widen(grads.values[k]) : 0.0f;
            grads.values[k] = narrow<T>(passed + end_share(value, range, gradients));
        }
        packs<kVector>(grad_x + begin)[i] = grads;
    });
}

template <typename T>
int32_t forward(const T *x, T *out, int64_t rows, int64_t columns, int32_t bits, bool symmetric,
                cudaStream_t stream) {
    const bool is_aligned = aligned(x, out);
    return dispatch<T>(rows, columns, is_aligned, [&](auto vector, auto threads, auto blocks) {
        forward_kernel<vector(), threads()>
            <<<blocks, kBlockThreads, 0, stream>>>(x, out, rows, columns, bits, symmetric);
    });
}

template <typename T>
int32_t backward(const T *grad, const T *x, T *grad_x, int64_t rows, int64_t columns, int32_t bits,
                 bool symmetric, cudaStream_t stream) {
    const bool is_aligned = aligned(grad, x, grad_x);
    return dispatch<T>(rows, columns, is_aligned, [&](auto vector, auto threads, auto blocks) {
        backward_kernel<vector(), threads()>
            <<<blocks, kBlockThreads, 0, stream>>>(grad, x, grad_x, rows, columns, bits, symmetric);
    });
}

// Calls run with a null pointer of the element type.
template <typename Run>
int32_t with_type(int32_t dtype, Run run) {
    switch (dtype) {
        case OMNIQUANT_FLOAT32:
            return run(static_cast<float *>(nullptr));
        case OMNIQUANT_FLOAT16:
            return run(static_cast<__half *>(nullptr));
        case OMNIQUANT_BFLOAT16:
            return run(static_cast<__nv_bfloat16 *>(nullptr));
        default:
            return static_cast<int32_t>(cudaErrorInvalidValue);
    }
}

}  // namespace
}  // namespace omniquant

using namespace omniquant;

int32_t omniquant_cuda_dynamic_fake_quantize(const void *x, void *out, int64_t rows,
                                             int64_t columns, int32_t bits, int32_t symmetric,
                                             int32_t dtype, void *stream) {
    return with_type(dtype, [&](auto type) {
        using Element = std::remove_pointer_t<decltype(type)>;
        return forward(static_cast<const Element *>(x), static_cast<Element *>(out), rows, columns,
                       bits, symmetric != 0, static_cast<cudaStream_t>(stream));
    });
}

int32_t omniquant_cuda_dynamic_fake_quantize_backward(const void *grad, const void *x, void *grad_x,
                                                      int64_t rows, int64_t columns, int32_t bits,
                                                      int32_t symmetric, int32_t dtype,
                                                      void *stream) {
    return with_type(dtype, [&](auto type) {
        using Element = std::remove_pointer_t<decltype(type)>;
        return backward(static_cast<const Element *>(grad), static_cast<const Element *>(x),
                        static_cast<Element *>(grad_x), rows, columns, bits, symmetric != 0,
                        static_cast<cudaStream_t>(stream));
    });
}

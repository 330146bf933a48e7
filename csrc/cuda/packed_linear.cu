// Chooses the kernel of a product with a packed weight; packed_linear.cuh explains how it works.
#include "packed_linear.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.cuh"
#include "omniquant.h"
#include "packed_plan.h"

namespace omniquant {
namespace {

constexpr int32_t kInvalidValue = cudaErrorInvalidValue;

struct Device {
    int processors;
    int shared_bytes;  // of a block, at most
};

cudaError_t current_device(Device *device) {
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, index);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&device->shared_bytes,
                                       cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    }
    return error;
}

using Kernel = void (*)(PackedLinear);

template <int kBits, typename T>
Kernel kernel_of(const PackedPlan &plan) {
    if constexpr (!Activations<T>::kWide) {
        if (plan.is_vector) {
            return plan.halves ? packed_linear_kernel<kBits, T, 1, true, true>
                               : packed_linear_kernel<kBits, T, 1, true, false>;
        }
        if (plan.token_tiles == 2) {
            return packed_linear_kernel<kBits, T, 2, false, false>;
        }
    }
    return plan.halves ? packed_linear_kernel<kBits, T, 1, false, true>
                       : packed_linear_kernel<kBits, T, 1, false, false>;
}

template <int kBits, typename T>
int32_t run(PackedLinear p, int64_t group_size, void *stream) {
    Device device = {};
    const cudaError_t error = current_device(&device);
    if (error != cudaSuccess) {
        return static_cast<int32_t>(error);
    }
    const PackedPlan plan =
        packed_plan(kBits, p.tokens, p.rows, p.columns, group_size, Activations<T>::kWide,
                    device.processors, device.shared_bytes);
    p.steps_per_group = steps_per_group(p.columns, group_size, plan.halves);
    const dim3 grid(ceil_divide(p.tokens, kTileTokens * plan.token_tiles),
                    ceil_divide(p.rows, kBlockRows));
    return launch(kernel_of<kBits, T>(plan), grid, static_cast<unsigned>(plan.warps * kWarp),
                  plan.shared_bytes, stream, p);
}

template <int kBits>
int32_t run(const PackedLinear &p, int64_t group_size, int32_t dtype, void *stream) {
    switch (dtype) {
        case OMNIQUANT_FLOAT32:
            return run<kBits, float>(p, group_size, stream);
        case OMNIQUANT_FLOAT16:
            return run<kBits, __half>(p, group_size, stream);
        case OMNIQUANT_BFLOAT16:
            return run<kBits, __nv_bfloat16>(p, group_size, stream);
        default:
            return kInvalidValue;
    }
}

int32_t run(const PackedLinear &p, int64_t group_size, int32_t bits, int32_t dtype, void *stream) {
    switch (bits) {
        case 2:
            return run<2>(p, group_size, dtype, stream);
        case 3:
            return run<3>(p, group_size, dtype, stream);
        case 4:
            return run<4>(p, group_size, dtype, stream);
        case 8:
            return run<8>(p, group_size, dtype, stream);
        default:
            return kInvalidValue;
    }
}

bool is_supported(int64_t tokens, int64_t columns, int64_t rows, int64_t group_size) {
    constexpr int64_t kMaxColumns = int64_t{1} << 24;  // places in a block are counted in 32 bits
    constexpr int64_t kMaxRows = int64_t{65535} * kBlockRows;
    constexpr int64_t kMaxTokens = INT32_MAX / 2;
    return tokens <= kMaxTokens && columns > 0 && columns <= kMaxColumns && rows <= kMaxRows &&
           group_size > 0 && (group_size >= columns || group_size % (kSpan / 2) == 0);
}

}  // namespace
}  // namespace omniquant

using namespace omniquant;

int32_t omniquant_cuda_packed_linear(const void *x, const uint32_t *words, const void *scale,
                                     const uint8_t *zero_point, void *out, int64_t tokens,
                                     int64_t columns, int64_t rows, int64_t group_size,
                                     int32_t bits, int32_t dtype, int32_t scale_dtype,
                                     void *stream) {
    if (!is_supported(tokens, columns, rows, group_size)) {
        return kInvalidValue;
    }
    if (tokens == 0 || rows == 0) {
        return 0;
    }
    PackedLinear p = {};
    p.x = x;
    p.words = words;
    p.out = out;
    p.tokens = static_cast<int>(tokens);
    p.columns = static_cast<int>(columns);
    p.rows = static_cast<int>(rows);
    p.groups = {scale, zero_point, static_cast<int>(ceil_divide(columns, group_size)), scale_dtype};
    p.words_per_row = ceil_divide(p.columns, 32) * bits;
    p.words_are_aligned = aligned(words) && p.words_per_row % 4 == 0;
    const int element_bytes = dtype == OMNIQUANT_FLOAT32 ? 4 : 2;
    p.x_is_aligned = aligned(x) && columns * element_bytes % kAccess == 0;
    return run(p, group_size, bits, dtype, stream);
}

// The packed product: x is arranged for the kernel, then the rows of the weight are shared out.
#include "packed_linear.h"

#include <algorithm>
#include <cstdint>

#include "arrange.h"
#include "omniquant.h"
#include "parallel.h"

using namespace omniquant;

namespace {

constexpr int64_t kMinParallelProducts = 1 << 19;  // as long as threads take to start
constexpr int64_t kMinParallelElements = 1 << 15;  // of x
constexpr int64_t kPiecesPerThread = 8;            // a thread that lags holds up one piece
constexpr int64_t kPieceMultiple = 12;             // rows; kernels take 1, 3 or 4 at once
constexpr int64_t kMaxLanes = 16;
constexpr int64_t kMinLanes = 8;
constexpr int64_t kMaxTokens = 16;  // arranged at a time, so that they stay in a core's cache

struct Kernel {
    PackedKernel run;
    int64_t lanes;
    int32_t paired;
    int64_t limit;  // tokens; measured against torch's product with a dequantized weight of 4 bit
};

// The widest kernel that the processor can run and the caller allows; 0 allows all.
Kernel choose_kernel(int32_t bits, int32_t dtype, int32_t lanes) {
#if defined(OMNIQUANT_X86)
    const int64_t widest = lanes == 0 ? kMaxLanes : lanes;
    const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (widest >= 16 && fma && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        const bool pairs = dtype == OMNIQUANT_BFLOAT16 && bits < 8;
        if (pairs && __builtin_cpu_supports("avx512bf16")) {
            return {packed_rows_avx512_bf16, 16, 2, INT64_MAX};
        }
        return {packed_rows_avx512, 16, 1, 64};
    }
    if (widest >= 8 && fma && __builtin_cpu_supports("avx2")) {
        return {packed_rows_avx2, 8, 1, 16};
    }
#endif
    (void)bits, (void)dtype, (void)lanes;
    return {packed_rows_portable, 8, 1, 8};
}

// Where a call's memory goes, in floats from a line's begin on.
struct Plan {
    int64_t units;
    int64_t groups;
    int64_t padded_columns;  // of x, whole blocks
    int64_t stride;          // of arranged tokens; not a power of two, which caches handle badly
    int64_t sums_stride;
    int64_t scratch;  // of a thread
    int64_t sums;     // from here on, where each part begins
    int64_t indices;
    int64_t first_groups;
    int64_t scratches;
    int64_t end;
};

Plan make_plan(int64_t tokens, int64_t columns, int64_t group_size, int32_t bits, int64_t lanes,
               int64_t threads) {
    const int64_t arranged = std::min(tokens, kMaxTokens);
    Plan plan;
    plan.units = ceil_divide(columns, kUnit);
    plan.groups = ceil_divide(columns, group_size);
    plan.padded_columns = round_up(columns, lanes * fields_of(bits));
    plan.stride = whole_lines(plan.padded_columns) + kLine;
    plan.sums_stride = whole_lines(plan.groups);
    plan.scratch = std::max(kMaxRows * scratch_of_row(plan.units, plan.groups),
                            whole_lines(plan.padded_columns));
    plan.sums = arranged * plan.stride;
    plan.indices = plan.sums + arranged * plan.sums_stride;
    plan.first_groups = plan.indices + whole_lines(plan.units);
    plan.scratches = plan.first_groups + whole_lines(plan.units / kMinLanes + 1);
    plan.end = plan.scratches + threads * plan.scratch;
    return plan;
}

// Finds the group of each vector's first unit, and each unit's group, counted from that.
void index_groups(int32_t *indices, int32_t *first_groups, int64_t units, int64_t group_units,
                  int64_t lanes) {
    for (int64_t begin = 0; begin < units; begin += lanes) {
        const int64_t first = begin / group_units;
        first_groups[begin / lanes] = static_cast<int32_t>(first);
        for (int64_t unit = begin; unit < begin + lanes; ++unit) {
            const int64_t group = std::min(unit, units - 1) / group_units;
            indices[unit] = static_cast<int32_t>(group - first);
        }
    }
}

// What the threads of one call share.
struct Call {
    Plan plan;
    Order order;
    Kernel kernel;
    PackedProduct product;
    const void *x;
    float *memory;
    int64_t columns;
    int64_t group_size;

    float *scratch(int32_t worker) const { return memory + plan.scratches + worker * plan.scratch; }
};

void arrange_tokens(const void *context, int32_t worker, int64_t begin, int64_t end) {
    const Call &call = *static_cast<const Call *>(context);
    const Plan &plan = call.plan;
    const Output &out = call.product.out;
    for (int64_t i = begin; i < end; ++i) {
        float *const values = call.scratch(worker);
        read_token(call.x, out.dtype, out.first + i, call.columns, values, plan.padded_columns);
        arrange_token(values, call.memory + i * plan.stride, plan.padded_columns, call.order);
        sum_groups(values, call.memory + plan.sums + i * plan.sums_stride, call.columns,
                   call.group_size, plan.sums_stride);
    }
}

void multiply_piece(const void *context, int32_t worker, int64_t begin, int64_t end) {
    const Call &call = *static_cast<const Call *>(context);
    call.kernel.run(call.product, call.scratch(worker), begin, end);
}

int64_t piece_of(int64_t rows, int32_t threads) {
    return round_up(ceil_divide(rows, threads * kPiecesPerThread), kPieceMultiple);
}

}  // namespace

int64_t omniquant_packed_linear_workspace(int64_t tokens, int64_t columns, int64_t group_size,
                                          int32_t bits, int32_t threads) {
    return make_plan(tokens, columns, group_size, bits, kMaxLanes, threads).end + kLine;
}

int64_t omniquant_packed_linear_limit(int32_t bits, int32_t dtype, int32_t lanes) {
    return choose_kernel(bits, dtype, lanes).limit;
}

void omniquant_packed_linear(const void *x, const uint32_t *words, const void *scale,
                             const uint8_t *zero_point, void *out, float *workspace, int64_t tokens,
                             int64_t columns, int64_t rows, int64_t group_size, int32_t bits,
                             int32_t dtype, int32_t scale_dtype, int32_t threads, int32_t lanes) {
    const Kernel kernel = choose_kernel(bits, dtype, lanes);
    const Plan plan = make_plan(tokens, columns, group_size, bits, kernel.lanes, threads);
    const auto misaligned = reinterpret_cast<uintptr_t>(workspace) / sizeof(float) % kLine;
    float *const memory = workspace + (kLine - static_cast<int64_t>(misaligned)) % kLine;
    auto *const indices = reinterpret_cast<int32_t *>(memory + plan.indices);
    const int64_t group_units =
        std::max<int64_t>(group_size >= columns ? plan.units : group_size / kUnit, 1);
    auto *const first_groups = reinterpret_cast<int32_t *>(memory + plan.first_groups);
    index_groups(indices, first_groups, plan.units, group_units, kernel.lanes);
    const PackedWeight weight = {words,      scale,       zero_point, plan.units * bits,
                                 plan.units, plan.groups, bits,       scale_dtype};
    for (int64_t first = 0; first < tokens; first += kMaxTokens) {
        const int64_t count = std::min(tokens - first, kMaxTokens);
        const ArrangedTokens arranged = {memory, memory + plan.sums, count, plan.stride,
                                         plan.sums_stride};
        const Output output = {out, first, rows, dtype};
        const Order order = make_order(bits, kernel.lanes, kernel.paired);
        const Call call = {plan, order,  kernel,  {weight, arranged, output, indices, first_groups},
                           x,    memory, columns, group_size};
        parallel_for(count, 1, count * columns < kMinParallelElements ? 1 : threads, arrange_tokens,
                     &call);
        parallel_for(rows, piece_of(rows, threads),
                     count * columns * rows < kMinParallelProducts ? 1 : threads, multiply_piece,
                     &call);
    }
}

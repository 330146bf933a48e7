// The packed product: x is arranged for the kernel, then the rows of the weight are shared out.
#include "packed_linear.h"

#include <algorithm>
#include <cstdint>

#include "arrange.h"
#include "omniquant.h"
#include "parallel.h"

using namespace omniquant;

namespace {

constexpr int64_t MIN_PARALLEL_PRODUCTS = 1 << 19;  // handing over costs what so many take
constexpr int64_t MIN_PARALLEL_NUMBERS = 1 << 15;   // of x
constexpr int64_t PIECES_PER_THREAD = 8;            // a thread that lags holds up one piece
constexpr int64_t PIECE_MULTIPLE = 12;              // rows, of 1, 3 or 4 at once
constexpr int64_t MAX_LANES = 16;
constexpr int64_t MIN_LANES = 8;
constexpr int64_t MAX_ROWS = 16;  // of x at a time, so that they stay in a core's cache

struct Kernel {
    PackedKernel run;
    int64_t lanes;
    int32_t paired;
    int64_t limit;  // rows of x, measured against torch's product of 4 bit, dequantized
};

// The widest that the processor has and the caller allows; 0 allows all.
Kernel choose_kernel(int32_t widest, int32_t type, int32_t bits) {
#if defined(OMNIQUANT_X86)
    const int32_t lanes = widest == 0 ? MAX_LANES : widest;
    const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (lanes >= 16 && fma && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        const bool pairs = type == OMNIQUANT_BFLOAT16 && bits < 8;
        if (pairs && __builtin_cpu_supports("avx512bf16")) {
            return {packed_rows_avx512_bf16, 16, 2, INT64_MAX};
        }
        return {packed_rows_avx512, 16, 1, 64};
    }
    if (lanes >= 8 && fma && __builtin_cpu_supports("avx2")) {
        return {packed_rows_avx2, 8, 1, 16};
    }
#endif
    (void)widest, (void)type, (void)bits;
    return {packed_rows_portable, 8, 1, 8};
}

// Where a call's memory goes, in floats from a line's begin on.
struct Plan {
    int64_t units;
    int64_t groups;
    int64_t columns;  // of a row of x, whole blocks
    int64_t stride;   // of arranged rows; not a power of two, which caches take badly
    int64_t sums_stride;
    int64_t scratch;  // of a thread
    int64_t sums;     // begins
    int64_t indices;
    int64_t first_groups;
    int64_t scratches;
    int64_t end;
};

Plan make_plan(int64_t n, int64_t in, int64_t group_size, int32_t bits, int64_t lanes,
               int64_t threads) {
    const int64_t block = lanes * fields_of(bits);
    const int64_t rows = std::min(n, MAX_ROWS);
    Plan plan;
    plan.units = (in + UNIT - 1) / UNIT;
    plan.groups = (in + group_size - 1) / group_size;
    plan.columns = (in + block - 1) / block * block;
    plan.stride = whole_lines(plan.columns) + LINE;
    plan.sums_stride = whole_lines(plan.groups);
    plan.scratch = std::max(MAX_ROWS_AT_ONCE * scratch_of_row(plan.units, plan.groups),
                            whole_lines(plan.columns));
    plan.sums = rows * plan.stride;
    plan.indices = plan.sums + rows * plan.sums_stride;
    plan.first_groups = plan.indices + whole_lines(plan.units);
    plan.scratches = plan.first_groups + whole_lines(plan.units / MIN_LANES + 1);
    plan.end = plan.scratches + threads * plan.scratch;
    return plan;
}

// The group of each vector's first unit, and each unit's group, counted from that.
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
    int64_t in;
    int64_t group_size;

    float *scratch(int32_t worker) const { return memory + plan.scratches + worker * plan.scratch; }
};

void arrange_rows(const void *context, int32_t worker, int64_t begin, int64_t end) {
    const Call &call = *static_cast<const Call *>(context);
    const Plan &plan = call.plan;
    const Output &out = call.product.out;
    for (int64_t i = begin; i < end; ++i) {
        float *const row = call.scratch(worker);
        read_row(call.x, out.type, out.first + i, call.in, row, plan.columns);
        arrange_row(row, call.memory + i * plan.stride, plan.columns, call.order);
        sum_groups(row, call.memory + plan.sums + i * plan.sums_stride, call.in, call.group_size,
                   plan.sums_stride);
    }
}

void multiply_piece(const void *context, int32_t worker, int64_t begin, int64_t end) {
    const Call &call = *static_cast<const Call *>(context);
    call.kernel.run(call.product, call.scratch(worker), begin, end);
}

int64_t piece_of(int64_t rows, int32_t threads) {
    const int64_t pieces = threads * PIECES_PER_THREAD;
    return ((rows + pieces - 1) / pieces + PIECE_MULTIPLE - 1) / PIECE_MULTIPLE * PIECE_MULTIPLE;
}

}  // namespace

int64_t omniquant_packed_linear_workspace(int64_t n, int64_t in, int64_t group_size, int32_t bits,
                                          int32_t threads) {
    return make_plan(n, in, group_size, bits, MAX_LANES, threads).end + LINE;
}

int64_t omniquant_packed_linear_limit(int32_t bits, int32_t type, int32_t lanes) {
    return choose_kernel(lanes, type, bits).limit;
}

void omniquant_packed_linear(const void *x, const uint32_t *words, const void *scale,
                             const uint8_t *zero_point, void *out, float *workspace, int64_t n,
                             int64_t in, int64_t out_features, int64_t group_size, int32_t bits,
                             int32_t type, int32_t scale_type, int32_t threads, int32_t lanes) {
    const Kernel kernel = choose_kernel(lanes, type, bits);
    const Plan plan = make_plan(n, in, group_size, bits, kernel.lanes, threads);
    const auto misaligned = reinterpret_cast<uintptr_t>(workspace) / sizeof(float) % LINE;
    float *const memory = workspace + (LINE - static_cast<int64_t>(misaligned)) % LINE;
    auto *const indices = reinterpret_cast<int32_t *>(memory + plan.indices);
    const int64_t group_units =
        std::max<int64_t>(group_size >= in ? plan.units : group_size / UNIT, 1);
    auto *const first_groups = reinterpret_cast<int32_t *>(memory + plan.first_groups);
    index_groups(indices, first_groups, plan.units, group_units, kernel.lanes);
    const PackedWeight weight = {words,      scale,       zero_point, plan.units * bits,
                                 plan.units, plan.groups, bits,       scale_type};
    for (int64_t first = 0; first < n; first += MAX_ROWS) {
        const int64_t rows = std::min(n - first, MAX_ROWS);
        const ArrangedRows arranged = {memory, memory + plan.sums, rows, plan.stride,
                                       plan.sums_stride};
        const Output output = {out, first, out_features, type};
        const Order order = make_order(bits, kernel.lanes, kernel.paired);
        const Call call = {plan, order,  kernel, {weight, arranged, output, indices, first_groups},
                           x,    memory, in,     group_size};
        parallel_for(rows, 1, rows * in < MIN_PARALLEL_NUMBERS ? 1 : threads, arrange_rows, &call);
        parallel_for(out_features, piece_of(out_features, threads),
                     rows * in * out_features < MIN_PARALLEL_PRODUCTS ? 1 : threads, multiply_piece,
                     &call);
    }
}

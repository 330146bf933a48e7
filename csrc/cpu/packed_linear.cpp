// The packed product: x is stood as the kernels read it, then the weight's rows are shared out.
#include "packed_linear.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "half.h"
#include "omniquant.h"
#include "parallel.h"

using namespace omniquant;

namespace {

constexpr int64_t MIN_PARALLEL_PRODUCTS = 1 << 19;  // handing over costs what so many take
constexpr int64_t PIECES_PER_THREAD = 8;            // a thread that lags holds up one piece
constexpr int64_t PIECE_MULTIPLE = 12;              // rows, of 1, 3 or 4 at once
constexpr int64_t MAX_LANES = 16;
constexpr int MAX_FIELDS = 16;
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
    int64_t lanes;
    int64_t block;    // columns of a vector of words
    int64_t columns;  // of a row of x, whole blocks
    int64_t stride;   // of stood rows; not a power of two, which caches take badly
    int64_t sums_stride;
    int64_t scratch;  // of a thread
    int64_t sums;     // begins
    int64_t indices;
    int64_t scratches;
    int64_t row;
    int64_t end;
};

Plan make_plan(int64_t n, int64_t in, int64_t group_size, int32_t bits, int64_t lanes,
               int64_t threads) {
    const int64_t units = (in + UNIT - 1) / UNIT;
    const int64_t groups = (in + group_size - 1) / group_size;
    Plan plan;
    plan.lanes = lanes;
    plan.block = lanes * fields_of(bits);
    plan.columns = (in + plan.block - 1) / plan.block * plan.block;
    plan.stride = whole_lines(plan.columns) + LINE;
    plan.sums_stride = whole_lines(groups);
    plan.scratch = MAX_ROWS_AT_ONCE * scratch_of_row(units, groups);
    plan.sums = std::min(n, MAX_ROWS) * plan.stride;
    plan.indices = plan.sums + std::min(n, MAX_ROWS) * plan.sums_stride;
    plan.scratches = plan.indices + whole_lines(units);
    plan.row = plan.scratches + threads * plan.scratch;
    plan.end = plan.row + plan.columns;
    return plan;
}

// Which column of a lane stands where, and what it is multiplied with.
struct Order {
    int32_t vectors;
    int32_t columns[MAX_FIELDS][2];
    float factors[MAX_FIELDS];
};

Order make_order(int32_t bits, int32_t paired) {
    Order order = {};
    order.vectors = vectors_of(bits, paired);
    for (int vector = 0; vector < order.vectors; ++vector) {
        for (int half = 0; half < paired; ++half) {
            order.columns[vector][half] = column_at(bits, paired, vector, half);
        }
        order.factors[vector] = std::ldexp(1.0f, -exponent_at(bits, paired, vector));
    }
    return order;
}

OMNIQUANT_MULTIVERSION
void read_row(const void *x, int32_t type, int64_t begin, int64_t in, float *row, int64_t columns) {
    if (type == OMNIQUANT_FLOAT32) {
        std::copy_n(static_cast<const float *>(x) + begin, in, row);
    } else if (type == OMNIQUANT_FLOAT16) {
        for (int64_t i = 0; i < in; ++i) {
            row[i] = float_of_float16(static_cast<const uint16_t *>(x)[begin + i]);
        }
    } else {
        for (int64_t i = 0; i < in; ++i) {
            row[i] = float_of_bfloat16(static_cast<const uint16_t *>(x)[begin + i]);
        }
    }
    std::fill(row + in, row + columns, 0.0f);
}

void stand(const float *row, float *to, const Plan &plan, const Order &order) {
    const int64_t fields = plan.block / plan.lanes;
    for (int64_t begin = 0; begin < plan.columns; begin += plan.block) {
        for (int32_t vector = 0; vector < order.vectors; ++vector) {
            const float *from = row + begin + order.columns[vector][0];
            for (int64_t lane = 0; lane < plan.lanes; ++lane) {
                *to++ = from[lane * fields] * order.factors[vector];
            }
        }
    }
}

// Numbers of bfloat16 as they are, two to a float's place.
void stand_pairs(const float *row, float *to, const Plan &plan, const Order &order) {
    const int64_t fields = plan.block / plan.lanes;
    for (int64_t begin = 0; begin < plan.columns; begin += plan.block) {
        for (int32_t vector = 0; vector < order.vectors; ++vector) {
            const float *low = row + begin + order.columns[vector][0];
            const float *high = row + begin + order.columns[vector][1];
            for (int64_t lane = 0; lane < plan.lanes; ++lane) {
                const uint32_t pair =
                    bits_of_float(low[lane * fields]) >> 16 | bits_of_float(high[lane * fields]);
                *to++ = float_of_bits(pair);
            }
        }
    }
}

OMNIQUANT_MULTIVERSION
void sum_groups(const float *row, float *sums, int64_t in, int64_t group_size, int64_t stride) {
    int64_t group = 0;
    for (int64_t begin = 0; begin < in; begin += group_size) {
        const int64_t end = std::min(in, begin + group_size);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; ++i) {
            sum += row[i];
        }
        sums[group++] = sum;
    }
    std::fill(sums + group, sums + stride, 0.0f);
}

// Each unit's group, counted from the group of its vector's first unit.
void index_groups(int32_t *indices, int64_t units, int64_t group_units, int64_t lanes) {
    for (int64_t unit = 0; unit < whole_lines(units); ++unit) {
        const int64_t first = unit / lanes * lanes / group_units;
        const int64_t group = std::min(unit, units - 1) / group_units;
        indices[unit] = static_cast<int32_t>(std::max<int64_t>(group - first, 0));
    }
}

struct Shared {
    PackedProduct product;
    PackedKernel run;
    float *scratches;
    int64_t scratch;
};

void run_piece(const void *context, int32_t worker, int64_t begin, int64_t end) {
    const Shared &shared = *static_cast<const Shared *>(context);
    shared.run(shared.product, shared.scratches + worker * shared.scratch, begin, end);
}

int64_t piece_of(int64_t rows, int64_t products, int32_t threads) {
    if (threads <= 1 || products < MIN_PARALLEL_PRODUCTS) {
        return std::max<int64_t>(rows, 1);
    }
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
    const Order order = make_order(bits, kernel.paired);
    const auto misaligned = reinterpret_cast<uintptr_t>(workspace) / sizeof(float) % LINE;
    float *const memory = workspace + (LINE - static_cast<int64_t>(misaligned)) % LINE;
    auto *const indices = reinterpret_cast<int32_t *>(memory + plan.indices);
    const int64_t units = (in + UNIT - 1) / UNIT;
    const int64_t group_units = std::max<int64_t>(group_size >= in ? units : group_size / UNIT, 1);
    index_groups(indices, units, group_units, kernel.lanes);
    const PackedWeight weight = {words,        scale, zero_point,
                                 units * bits, units, (in + group_size - 1) / group_size,
                                 group_units,  bits,  scale_type};
    for (int64_t first = 0; first < n; first += MAX_ROWS) {
        const int64_t rows = std::min(n - first, MAX_ROWS);
        float *const row = memory + plan.row;
        for (int64_t i = 0; i < rows; ++i) {
            read_row(x, type, (first + i) * in, in, row, plan.columns);
            (kernel.paired == 2 ? stand_pairs : stand)(row, memory + i * plan.stride, plan, order);
            sum_groups(row, memory + plan.sums + i * plan.sums_stride, in, group_size,
                       plan.sums_stride);
        }
        const StoodRows stood = {memory, memory + plan.sums, rows, plan.stride, plan.sums_stride};
        const Output output = {out, first, out_features, type};
        const Shared shared = {
            {weight, stood, output, indices}, kernel.run, memory + plan.scratches, plan.scratch};
        parallel_for(out_features, piece_of(out_features, rows * in * out_features, threads),
                     threads, run_piece, &shared);
    }
}

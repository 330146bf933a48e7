#include "arrange.h"

#include <algorithm>
#include <cmath>

#include "half.h"
#include "multiversion.h"
#include "omniquant.h"
#include "packed_linear.h"

namespace omniquant {
namespace {

void arrange_numbers(const float *row, float *to, int64_t columns, const Order &order) {
    for (int64_t begin = 0; begin < columns; begin += order.lanes * order.fields) {
        for (int32_t vector = 0; vector < order.vectors; ++vector) {
            const float *from = row + begin + order.columns[vector][0];
            for (int64_t lane = 0; lane < order.lanes; ++lane) {
                *to++ = from[lane * order.fields] * order.factors[vector];
            }
        }
    }
}

// Numbers of bfloat16, two in the place of a float.
void arrange_pairs(const float *row, float *to, int64_t columns, const Order &order) {
    for (int64_t begin = 0; begin < columns; begin += order.lanes * order.fields) {
        for (int32_t vector = 0; vector < order.vectors; ++vector) {
            const float *low = row + begin + order.columns[vector][0];
            const float *high = row + begin + order.columns[vector][1];
            for (int64_t lane = 0; lane < order.lanes; ++lane) {
                const uint32_t pair = bits_of_float(low[lane * order.fields]) >> 16 |
                                      bits_of_float(high[lane * order.fields]);
                *to++ = float_of_bits(pair);
            }
        }
    }
}

}  // namespace

Order make_order(int32_t bits, int64_t lanes, int32_t paired) {
    Order order = {};
    order.lanes = lanes;
    order.fields = fields_of(bits);
    order.paired = paired;
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
void read_row(const void *x, int32_t type, int64_t index, int64_t in, float *row, int64_t columns) {
    const int64_t begin = index * in;
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

void arrange_row(const float *row, float *to, int64_t columns, const Order &order) {
    if (order.paired == 2) {
        arrange_pairs(row, to, columns, order);
    } else {
        arrange_numbers(row, to, columns, order);
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

}  // namespace omniquant

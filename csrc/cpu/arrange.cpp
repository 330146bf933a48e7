#include "arrange.h"

#include <algorithm>
#include <cmath>

#include "float_bits.h"
#include "half.h"
#include "multiversion.h"
#include "omniquant.h"
#include "packed_linear.h"

namespace omniquant {
namespace {

void arrange_numbers(const float *values, float *to, int64_t padded_columns, const Order &order) {
    for (int64_t begin = 0; begin < padded_columns; begin += order.lanes * order.fields) {
        for (int32_t vector = 0; vector < order.vectors; ++vector) {
            const float *from = values + begin + order.columns[vector][0];
            for (int64_t lane = 0; lane < order.lanes; ++lane) {
                *to++ = from[lane * order.fields] * order.factors[vector];
            }
        }
    }
}

// Pairs of bfloat16 numbers, each in the place of a float.
void arrange_pairs(const float *values, float *to, int64_t padded_columns, const Order &order) {
    for (int64_t begin = 0; begin < padded_columns; begin += order.lanes * order.fields) {
        for (int32_t vector = 0; vector < order.vectors; ++vector) {
            const float *low = values + begin + order.columns[vector][0];
            const float *high = values + begin + order.columns[vector][1];
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
void read_token(const void *x, int32_t dtype, int64_t token, int64_t columns, float *values,
                int64_t padded_columns) {
    const int64_t begin = token * columns;
    if (dtype == OMNIQUANT_FLOAT32) {
        std::copy_n(static_cast<const float *>(x) + begin, columns, values);
    } else if (dtype == OMNIQUANT_FLOAT16) {
        for (int64_t i = 0; i < columns; ++i) {
            values[i] = float_of_float16(static_cast<const uint16_t *>(x)[begin + i]);
        }
    } else {
        for (int64_t i = 0; i < columns; ++i) {
            values[i] = float_of_bfloat16(static_cast<const uint16_t *>(x)[begin + i]);
        }
    }
    std::fill(values + columns, values + padded_columns, 0.0f);
}

void arrange_token(const float *values, float *to, int64_t padded_columns, const Order &order) {
    if (order.paired == 2) {
        arrange_pairs(values, to, padded_columns, order);
    } else {
        arrange_numbers(values, to, padded_columns, order);
    }
}

OMNIQUANT_MULTIVERSION
void sum_groups(const float *values, float *sums, int64_t columns, int64_t group_size,
                int64_t stride) {
    int64_t group = 0;
    for (int64_t begin = 0; begin < columns; begin += group_size) {
        const int64_t end = std::min(columns, begin + group_size);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; ++i) {
            sum += values[i];
        }
        sums[group++] = sum;
    }
    std::fill(sums + group, sums + stride, 0.0f);
}

}  // namespace omniquant

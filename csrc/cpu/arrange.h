// Arranges x in the order in which the kernels of the packed product read it.
#ifndef OMNIQUANT_ARRANGE_H
#define OMNIQUANT_ARRANGE_H

#include <cstdint>

namespace omniquant {

constexpr int kMaxFields = 16;

// For each vector of x: which columns of a lane it holds, and the factor they are multiplied with.
struct Order {
    int64_t lanes;
    int32_t fields;
    int32_t paired;
    int32_t vectors;
    int32_t columns[kMaxFields][2];
    float factors[kMaxFields];
};

Order make_order(int32_t bits, int64_t lanes, int32_t paired);

// Reads one token of x [tokens, columns] as float32, with zeros up to padded_columns, a multiple of
// lanes * fields.
void read_token(const void *x, int32_t dtype, int64_t token, int64_t columns, float *values,
                int64_t padded_columns);

// Writes the values that were read to `to`, in their order.
void arrange_token(const float *values, float *to, int64_t padded_columns, const Order &order);

// Writes the sum of each group of a token, with zeros up to `stride`.
void sum_groups(const float *values, float *sums, int64_t columns, int64_t group_size,
                int64_t stride);

}  // namespace omniquant

#endif

// Rows of x in the order in which the kernels of the packed product meet them.
#ifndef OMNIQUANT_ARRANGE_H
#define OMNIQUANT_ARRANGE_H

#include <cstdint>

namespace omniquant {

constexpr int MAX_FIELDS = 16;

// Which columns of its lane stand in a vector of x, and what they are multiplied with.
struct Order {
    int64_t lanes;
    int32_t fields;
    int32_t paired;
    int32_t vectors;
    int32_t columns[MAX_FIELDS][2];
    float factors[MAX_FIELDS];
};

Order make_order(int32_t bits, int64_t lanes, int32_t paired);

// Row `index` of x [.., in] as float32, zeros behind it up to `columns`.
void read_row(const void *x, int32_t type, int64_t index, int64_t in, float *row, int64_t columns);

// A read row, of whole blocks of lanes * fields columns, into its order.
void arrange_row(const float *row, float *to, int64_t columns, const Order &order);

// The sum of each group of a read row, zeros behind them up to `stride`.
void sum_groups(const float *row, float *sums, int64_t in, int64_t group_size, int64_t stride);

}  // namespace omniquant

#endif

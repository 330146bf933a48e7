// What the kernels of the packed product share: its operands, and the order of x.
//
// A vector of words holds many codes a lane. Kernels take a code of every lane at a time, so x is
// arranged once a call in the order in which they come: lane j holds as many columns as codes,
// those from j * fields on, and one field of all lanes meets one vector of x. Kernels of pairs take
// two codes a lane, of its lower and its upper half, which meet a vector of twice as many bfloat16.
//
// sum((code - zero) * scale * x) = sum over groups of scale * (sum(code * x) - zero * sum(x)).
#ifndef OMNIQUANT_PACKED_LINEAR_H
#define OMNIQUANT_PACKED_LINEAR_H

#include <cstdint>

#include "multiversion.h"

namespace omniquant {

constexpr int64_t UNIT = 32;             // columns; a group is whole units
constexpr int64_t MAX_ROWS_AT_ONCE = 4;  // of the weight

// Columns of one lane.
constexpr int fields_of(int bits) {
    return bits == 3 ? 16 : 32 / bits;
}

// Bits from field to field. 3 bit: two words of nibbles are made, of the even and of the odd
// columns, the fourth bit of which is never looked at.
constexpr int spacing_of(int bits) {
    return bits == 3 ? 4 : bits;
}

// Vectors of x that meet one word of fields; `paired` is the codes that a lane gives at a time.
constexpr int vectors_of_word(int bits, int paired) {
    return 32 / spacing_of(bits) / paired;
}

// Vectors of x that meet all fields of a lane.
constexpr int vectors_of(int bits, int paired) {
    return fields_of(bits) / paired;
}

// The column, within its lane, that stands as `half` of a pair in vector `vector`.
constexpr int column_at(int bits, int paired, int vector, int half) {
    const int each = vectors_of_word(bits, paired);
    const int field = vector % each + half * each;
    return bits == 3 ? 2 * field + vector / each : field;
}

// A single field is taken out of its word by a mask alone, and becomes a number that is too large
// by this power of two; x is divided by it. The one that reaches the sign is shifted down instead.
constexpr int exponent_at(int bits, int paired, int vector) {
    const int begin = vector % vectors_of_word(bits, paired) * spacing_of(bits);
    return paired == 2 || begin + bits == 32 ? 0 : begin;
}

struct PackedWeight {
    const uint32_t *words;  // [rows, words_per_row]
    const void *scale;      // [rows, groups]
    const uint8_t *zero_point;
    int64_t words_per_row;
    int64_t units;
    int64_t groups;
    int32_t bits;
    int32_t scale_type;
};

struct ArrangedRows {
    const float
        *values;        // [n, stride], zero where no column is; pairs of bfloat16 for such kernels
    const float *sums;  // [n, sums_stride], of each group
    int64_t n;
    int64_t stride;
    int64_t sums_stride;
};

struct Output {
    void *values;   // [rows, features]
    int64_t first;  // row, of the first of x
    int64_t features;
    int32_t type;
};

struct PackedProduct {
    PackedWeight weight;
    ArrangedRows x;
    Output out;
    const int32_t *group_of_unit;  // counted from the group of its vector's first unit
    const int32_t *first_groups;   // of each vector of units; a division a row would take long
};

constexpr int64_t LINE = 16;  // floats of a cache line, and of the widest vector

constexpr int64_t whole_lines(int64_t floats) {
    return (floats + LINE - 1) / LINE * LINE;
}

// Floats that a thread needs for a row of the weight: a scale for each unit, and one number for
// each group. A vector may begin at the last of either.
constexpr int64_t scratch_of_row(int64_t units, int64_t groups) {
    return whole_lines(units) + LINE + whole_lines(groups) + LINE;
}

// Weight rows [begin, end) for all rows of x.
using PackedKernel = void (*)(const PackedProduct &product, float *scratch, int64_t begin,
                              int64_t end);

void packed_rows_portable(const PackedProduct &product, float *scratch, int64_t begin, int64_t end);
#if defined(OMNIQUANT_X86)
void packed_rows_avx2(const PackedProduct &product, float *scratch, int64_t begin, int64_t end);
void packed_rows_avx512_bf16(const PackedProduct &product, float *scratch, int64_t begin,
                             int64_t end);
void packed_rows_avx512(const PackedProduct &product, float *scratch, int64_t begin, int64_t end);
#endif

}  // namespace omniquant

#endif

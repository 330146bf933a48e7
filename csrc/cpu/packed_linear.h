// What the kernels of the packed product share: its operands, and the order of x.
//
// Each lane of a vector of words holds several codes, its fields. A kernel takes one field of all
// lanes at a time, so x is arranged once a call in the same order: lane j holds the columns from
// j * fields on, and one field of all lanes meets one vector of x. Kernels of pairs take two fields
// a lane, one of its lower and one of its upper half, which meet a vector of twice as many bfloat16
// numbers.
//
// sum((code - zero_point) * scale * x) =
//     sum over groups of scale * (sum(code * x) - zero_point * sum(x))
#ifndef OMNIQUANT_PACKED_LINEAR_H
#define OMNIQUANT_PACKED_LINEAR_H

#include <cstdint>

#include "ceil_divide.h"

namespace omniquant {

constexpr int64_t kUnit = 32;    // columns; a group is whole units
constexpr int64_t kMaxRows = 4;  // of the weight at once

// Columns of one lane.
constexpr int fields_of(int bits) {
    return bits == 3 ? 16 : 32 / bits;
}

// Bits from field to field. 3 bit: the kernel makes two words of nibbles, one of the even and one
// of the odd columns; nothing reads the fourth bit of a nibble.
constexpr int spacing_of(int bits) {
    return bits == 3 ? 4 : bits;
}

// Vectors of x that meet one word of fields. `paired`: codes that a lane gives at a time, 1 or 2.
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

// A mask alone takes a single field out of its word, which leaves a number that is too large by
// this power of two; x is divided by it. The field that reaches the sign is shifted down instead.
constexpr int exponent_at(int bits, int paired, int vector) {
    const int begin = vector % vectors_of_word(bits, paired) * spacing_of(bits);
    return paired == 2 || begin + bits == 32 ? 0 : begin;
}

struct PackedWeight {
    const uint32_t *words;      // [rows, words_per_row]
    const void *scale;          // [rows, groups]
    const uint8_t *zero_point;  // [rows, groups] or null
    int64_t words_per_row;
    int64_t units;
    int64_t groups;
    int32_t bits;
    int32_t scale_dtype;
};

// Some tokens of x. Kernels of pairs take pairs of bfloat16 numbers as values.
struct ArrangedTokens {
    const float *values;  // [tokens, stride], zero where no column is
    const float *sums;    // [tokens, sums_stride], of each group
    int64_t tokens;
    int64_t stride;
    int64_t sums_stride;
};

struct Output {
    void *values;   // [all tokens, rows]
    int64_t first;  // the token of `values` that is the first of the arranged ones
    int64_t rows;
    int32_t dtype;
};

struct PackedProduct {
    PackedWeight weight;
    ArrangedTokens x;
    Output out;
    const int32_t *group_of_unit;  // counted from the group of its vector's first unit
    const int32_t *first_groups;   // of each vector of units; dividing for each row would be slow
};

constexpr int64_t kLine = 16;  // floats of a cache line, and of the widest vector

constexpr int64_t whole_lines(int64_t floats) {
    return round_up(floats, kLine);
}

// Floats that a thread needs for a row of the weight: a scale for each unit, and one number for
// each group. A vector may begin at the last of either.
constexpr int64_t scratch_of_row(int64_t units, int64_t groups) {
    return whole_lines(units) + kLine + whole_lines(groups) + kLine;
}

// Multiplies rows [begin, end) of the weight with all arranged tokens.
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

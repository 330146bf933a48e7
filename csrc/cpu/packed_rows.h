// The packed product over a vector type V. Each instruction set includes this once, with
// OMNIQUANT_TARGET as the attribute that lets a function use it.
#include <algorithm>
#include <cstdint>

#include "half.h"
#include "packed_linear.h"

#define OMNIQUANT_STEP static OMNIQUANT_TARGET OMNIQUANT_ALWAYS_INLINE

namespace omniquant {
namespace {

// The codes of one vector of words.
template <class V, int bits>
struct Codes {
    static constexpr int vectors = vectors_of(bits, V::paired);
    static constexpr int each = vectors_of_word(bits, V::paired);
    typename V::Int words[vectors / each];

    OMNIQUANT_STEP Codes load(const uint32_t *row, int64_t units, int64_t block) {
        if constexpr (bits == 3) {
            return join(V::load(row + block * V::lanes),
                        V::load_halves(high_plane(row, units) + block * V::lanes));
        } else {
            return {{V::load(row + block * V::lanes)}};
        }
    }

    // The first `lanes` lanes; the others are zero.
    OMNIQUANT_STEP Codes load_some(const uint32_t *row, int64_t units, int64_t block,
                                   int64_t lanes) {
        if constexpr (bits == 3) {
            return join(V::load_some(row + block * V::lanes, lanes),
                        V::load_some_halves(high_plane(row, units) + block * V::lanes, lanes));
        } else {
            return {{V::load_some(row + block * V::lanes, lanes)}};
        }
    }

    template <int vector>
    OMNIQUANT_TARGET OMNIQUANT_ALWAYS_INLINE typename V::Number number() const {
        return V::template number<bits, spacing_of(bits), vector % each>(words[vector / each]);
    }

  private:
    OMNIQUANT_STEP const uint16_t *high_plane(const uint32_t *row, int64_t units) {
        return reinterpret_cast<const uint16_t *>(row + 2 * units);
    }

    // 3 bit: a lane of the low plane has 16 pairs of bits, a half word of the high plane the bits
    // above them, which move apart until they stand over their pairs.
    OMNIQUANT_STEP Codes join(typename V::Int low, typename V::Int high) {
        high = V::template either_masked<0x00FF00FF>(high, V::template shift_left<8>(high));
        high = V::template either_masked<0x0F0F0F0F>(high, V::template shift_left<4>(high));
        high = V::template either_masked<0x33333333>(high, V::template shift_left<2>(high));
        return {{V::template select<0x33333333>(low, V::template shift_left<2>(high)),
                 V::template select<0x33333333>(V::template shift_right<2>(low),
                                                V::template shift_left<1>(high))}};
    }
};

// Sums of `rows` rows of the weight with `count` rows of x.
template <class V, int rows, int count>
struct Sums {
    typename V::Float at[rows][count];
};

template <class V, int bits, int rows, int count, int vector>
OMNIQUANT_STEP void add_vector(const Codes<V, bits> (&codes)[rows], const float *x, int64_t stride,
                               Sums<V, rows, count> &sums) {
    typename V::Number numbers[rows];
    for (int r = 0; r < rows; ++r) {
        numbers[r] = codes[r].template number<vector>();
    }
    for (int i = 0; i < count; ++i) {
        const typename V::Number values = V::load_x(x + i * stride + vector * V::lanes);
        for (int r = 0; r < rows; ++r) {
            if constexpr (vector == 0) {
                sums.at[r][i] = V::dot(numbers[r], values);
            } else {
                sums.at[r][i] = V::add_dot(sums.at[r][i], numbers[r], values);
            }
        }
    }
    if constexpr (vector + 1 < Codes<V, bits>::vectors) {
        add_vector<V, bits, rows, count, vector + 1>(codes, x, stride, sums);
    }
}

// Scales of some rows, spread over the units, and what their zero points take off.
struct Scratch {
    float *scales;  // [rows, scales_stride]
    float *zeros;  // [rows, zeros_stride]: scale * (zero_point + what the numbers are too large by)
    int64_t scales_stride;
    int64_t zeros_stride;
};

template <class V>
OMNIQUANT_STEP void spread_scales(const PackedProduct &product, int64_t row, float *scales,
                                  float *zeros) {
    const PackedWeight &weight = product.weight;
    const typename V::Float middle = V::fill(static_cast<float>(1 << (weight.bits - 1)));
    const int64_t first = row * weight.groups;
    // The scales go through the place of `zeros`, whose turn comes last.
    for (int64_t g = 0; g < weight.groups; g += V::lanes) {
        const int64_t some = std::min<int64_t>(weight.groups - g, V::lanes);
        V::store(zeros + g, V::load_elements(weight.scale, weight.scale_type, first + g, some));
    }
    for (int64_t u = 0; u < weight.units; u += V::lanes) {
        const typename V::Float near = V::load_unaligned(zeros + u / weight.group_units);
        V::store(scales + u, V::permute(near, product.group_of_unit + u));
    }
    for (int64_t g = 0; g < weight.groups; g += V::lanes) {
        const int64_t some = std::min<int64_t>(weight.groups - g, V::lanes);
        typename V::Float zero = weight.zero_point == nullptr
                                     ? middle
                                     : V::load_bytes(weight.zero_point + first + g, some);
        if constexpr (V::offset != 0) {
            zero = V::sum(zero, V::fill(V::offset));
        }
        V::store(zeros + g, V::product(V::load(zeros + g), zero));
    }
}

template <class V, int bits, int rows, int count>
OMNIQUANT_STEP void add_block(const Codes<V, bits> (&codes)[rows], const float *x, int64_t stride,
                              const Scratch &scratch, int64_t block, Sums<V, rows, count> &totals) {
    constexpr int units = V::lanes * fields_of(bits) / UNIT;
    Sums<V, rows, count> sums;
    add_vector<V, bits, rows, count, 0>(codes, x, stride, sums);
    for (int r = 0; r < rows; ++r) {
        const typename V::Float scale = V::template spread<V::lanes / units>(
            scratch.scales + r * scratch.scales_stride + block * units);
        for (int i = 0; i < count; ++i) {
            totals.at[r][i] = V::add_product(totals.at[r][i], sums.at[r][i], scale);
        }
    }
}

// The products of `rows` rows of the weight with `count` rows of x.
template <class V, int bits, int rows, int count>
static OMNIQUANT_TARGET void multiply(const PackedProduct &product, const Scratch &scratch,
                                      int64_t row, int64_t first) {
    constexpr int64_t lane = fields_of(bits);
    constexpr int64_t width = V::lanes * lane;
    constexpr int64_t x_width = V::lanes * Codes<V, bits>::vectors;
    const PackedWeight &weight = product.weight;
    const uint32_t *words = weight.words + row * weight.words_per_row;
    const float *x = product.x.values + first * product.x.stride;
    const int64_t columns = weight.units * UNIT;
    const int64_t blocks = columns / width;
    Sums<V, rows, count> totals;
    for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < count; ++i) {
            totals.at[r][i] = V::fill(0.0f);
        }
    }
    Codes<V, bits> codes[rows];
    for (int64_t block = 0; block < blocks; ++block) {
        for (int r = 0; r < rows; ++r) {
            const uint32_t *from = words + r * weight.words_per_row;
            V::prefetch(from + rows * weight.words_per_row + block * V::lanes);
            codes[r] = Codes<V, bits>::load(from, weight.units, block);
        }
        add_block<V, bits, rows, count>(codes, x + block * x_width, product.x.stride, scratch,
                                        block, totals);
    }
    if (const int64_t rest = columns - blocks * width; rest != 0) {
        for (int r = 0; r < rows; ++r) {
            codes[r] = Codes<V, bits>::load_some(words + r * weight.words_per_row, weight.units,
                                                 blocks, rest / lane);
        }
        add_block<V, bits, rows, count>(codes, x + blocks * x_width, product.x.stride, scratch,
                                        blocks, totals);
    }
    const float *sums = product.x.sums + first * product.x.sums_stride;
    for (int64_t g = 0; g < weight.groups; g += V::lanes) {
        for (int r = 0; r < rows; ++r) {
            const typename V::Float zeros = V::load(scratch.zeros + r * scratch.zeros_stride + g);
            for (int i = 0; i < count; ++i) {
                totals.at[r][i] = V::subtract_product(
                    totals.at[r][i], zeros, V::load(sums + i * product.x.sums_stride + g));
            }
        }
    }
    for (int i = 0; i < count; ++i) {
        for (int r = 0; r < rows; ++r) {
            store_element(product.out.values, product.out.type,
                          (product.out.first + first + i) * product.out.features + row + r,
                          V::total(totals.at[r][i]));
        }
    }
}

// With all rows of x from `first` on, `count` at a time, the rest by halves of that.
template <class V, int bits, int rows, int count>
static OMNIQUANT_TARGET void multiply_all(const PackedProduct &product, const Scratch &scratch,
                                          int64_t row, int64_t first) {
    for (; first + count <= product.x.n; first += count) {
        multiply<V, bits, rows, count>(product, scratch, row, first);
    }
    if constexpr (count > 1) {
        multiply_all<V, bits, rows, count / 2>(product, scratch, row, first);
    }
}

template <class V, int bits, int rows>
static OMNIQUANT_TARGET void multiply_rows(const PackedProduct &product, Scratch scratch,
                                           int64_t row) {
    for (int r = 0; r < rows; ++r) {
        spread_scales<V>(product, row + r, scratch.scales + r * scratch.scales_stride,
                         scratch.zeros + r * scratch.zeros_stride);
    }
    multiply_all<V, bits, rows, V::most>(product, scratch, row, 0);
}

template <class V, int bits>
static OMNIQUANT_TARGET void multiply_range(const PackedProduct &product, float *memory,
                                            int64_t begin, int64_t end) {
    const int64_t scales_stride = whole_lines(product.weight.units) + LINE;
    const int64_t zeros_stride = whole_lines(product.weight.groups) + LINE;
    const Scratch scratch = {memory, memory + V::rows * scales_stride, scales_stride, zeros_stride};
    int64_t row = begin;
    for (; row + V::rows <= end; row += V::rows) {
        multiply_rows<V, bits, V::rows>(product, scratch, row);
    }
    for (; row < end; ++row) {
        multiply_rows<V, bits, 1>(product, scratch, row);
    }
}

template <class V>
static OMNIQUANT_TARGET void multiply_any(const PackedProduct &product, float *scratch,
                                          int64_t begin, int64_t end) {
    switch (product.weight.bits) {
        case 2:
            return multiply_range<V, 2>(product, scratch, begin, end);
        case 3:
            return multiply_range<V, 3>(product, scratch, begin, end);
        case 4:
            return multiply_range<V, 4>(product, scratch, begin, end);
        default:
            return multiply_range<V, 8>(product, scratch, begin, end);
    }
}

}  // namespace
}  // namespace omniquant

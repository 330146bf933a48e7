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

    OMNIQUANT_STEP void prefetch(const uint32_t *row, int64_t units, int64_t block) {
        V::prefetch(row + block * V::lanes);
        if constexpr (bits == 3) {
            V::prefetch(row + 2 * units + block * V::lanes / 2);
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

// Some rows of the weight: as many as V takes at once. Where fewer are left the last one stands for
// those that are not there, whose results are thrown away.
template <class V>
struct Rows {
    const uint32_t *words[V::rows];
    const float *scales[V::rows];  // of each unit
    const float *zeros[V::rows];   // of each group: scale * what is to be taken off the codes
    int64_t first;
    int64_t count;
};

// Sums of these rows with `count` rows of x.
template <class V, int count>
struct Sums {
    typename V::Float at[V::rows][count];
};

template <class V, int bits, int count, int vector>
OMNIQUANT_STEP void add_vector(const Codes<V, bits> (&codes)[V::rows], const float *x,
                               int64_t stride, Sums<V, count> &sums) {
    typename V::Number numbers[V::rows];
    for (int r = 0; r < V::rows; ++r) {
        numbers[r] = codes[r].template number<vector>();
    }
    for (int i = 0; i < count; ++i) {
        const typename V::Number values = V::load_x(x + i * stride + vector * V::lanes);
        for (int r = 0; r < V::rows; ++r) {
            if constexpr (vector == 0) {
                sums.at[r][i] = V::dot(numbers[r], values);
            } else {
                sums.at[r][i] = V::add_dot(sums.at[r][i], numbers[r], values);
            }
        }
    }
    if constexpr (vector + 1 < Codes<V, bits>::vectors) {
        add_vector<V, bits, count, vector + 1>(codes, x, stride, sums);
    }
}

template <class V, int bits, int count>
OMNIQUANT_STEP void add_block(const Codes<V, bits> (&codes)[V::rows], const float *x,
                              int64_t stride, const Rows<V> &rows, int64_t block,
                              Sums<V, count> &totals) {
    constexpr int units = V::lanes * fields_of(bits) / UNIT;
    Sums<V, count> sums;
    add_vector<V, bits, count, 0>(codes, x, stride, sums);
    for (int r = 0; r < V::rows; ++r) {
        const typename V::Float scale =
            V::template spread<V::lanes / units>(rows.scales[r] + block * units);
        for (int i = 0; i < count; ++i) {
            totals.at[r][i] = V::add_product(totals.at[r][i], sums.at[r][i], scale);
        }
    }
}

// sum(scale * code * x)
template <class V, int bits, int count>
OMNIQUANT_STEP void add_blocks(const PackedProduct &product, const Rows<V> &rows, const float *x,
                               Sums<V, count> &totals) {
    constexpr int64_t lane = fields_of(bits);
    constexpr int64_t width = V::lanes * lane;
    constexpr int64_t x_width = V::lanes * Codes<V, bits>::vectors;
    const int64_t units = product.weight.units;
    const int64_t ahead = V::rows * product.weight.words_per_row;
    const int64_t blocks = units * UNIT / width;
    Codes<V, bits> codes[V::rows];
    for (int64_t block = 0; block < blocks; ++block) {
        for (int r = 0; r < V::rows; ++r) {
            Codes<V, bits>::prefetch(rows.words[r] + ahead, units, block);
            codes[r] = Codes<V, bits>::load(rows.words[r], units, block);
        }
        add_block<V, bits, count>(codes, x + block * x_width, product.x.stride, rows, block,
                                  totals);
    }
    if (const int64_t rest = units * UNIT - blocks * width; rest != 0) {
        for (int r = 0; r < V::rows; ++r) {
            codes[r] = Codes<V, bits>::load_some(rows.words[r], units, blocks, rest / lane);
        }
        add_block<V, bits, count>(codes, x + blocks * x_width, product.x.stride, rows, blocks,
                                  totals);
    }
}

// sum(scale * zero * sum(x))
template <class V, int count>
OMNIQUANT_STEP void subtract_zeros(const PackedProduct &product, const Rows<V> &rows,
                                   const float *sums, Sums<V, count> &totals) {
    for (int64_t g = 0; g < product.weight.groups; g += V::lanes) {
        for (int r = 0; r < V::rows; ++r) {
            const typename V::Float zeros = V::load(rows.zeros[r] + g);
            for (int i = 0; i < count; ++i) {
                totals.at[r][i] = V::subtract_product(
                    totals.at[r][i], zeros, V::load(sums + i * product.x.sums_stride + g));
            }
        }
    }
}

// The products of some rows of the weight with `count` rows of x.
template <class V, int bits, int count>
static OMNIQUANT_TARGET void multiply(const PackedProduct &product, const Rows<V> &rows,
                                      int64_t first) {
    Sums<V, count> totals;
    for (int r = 0; r < V::rows; ++r) {
        for (int i = 0; i < count; ++i) {
            totals.at[r][i] = V::fill(0.0f);
        }
    }
    const ArrangedRows &x = product.x;
    add_blocks<V, bits, count>(product, rows, x.values + first * x.stride, totals);
    subtract_zeros<V, count>(product, rows, x.sums + first * x.sums_stride, totals);
    const Output &out = product.out;
    for (int i = 0; i < count; ++i) {
        for (int r = 0; r < rows.count; ++r) {
            store_element(out.values, out.type,
                          (out.first + first + i) * out.features + rows.first + r,
                          V::total(totals.at[r][i]));
        }
    }
}

// With all rows of x from `first` on, `count` at a time, the rest by halves of that.
template <class V, int bits, int count>
static OMNIQUANT_TARGET void multiply_all(const PackedProduct &product, const Rows<V> &rows,
                                          int64_t first) {
    for (; first + count <= product.x.n; first += count) {
        multiply<V, bits, count>(product, rows, first);
    }
    if constexpr (count > 1) {
        multiply_all<V, bits, count / 2>(product, rows, first);
    }
}

// Reads a row's scales and zero points for all of the above.
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
        const typename V::Float near =
            V::load_unaligned(zeros + product.first_groups[u / V::lanes]);
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

template <class V, int bits>
static OMNIQUANT_TARGET void multiply_range(const PackedProduct &product, float *scratch,
                                            int64_t begin, int64_t end) {
    const PackedWeight &weight = product.weight;
    for (int64_t first = begin; first < end; first += V::rows) {
        Rows<V> rows;
        rows.first = first;
        rows.count = std::min<int64_t>(end - first, V::rows);
        for (int r = 0; r < V::rows; ++r) {
            const int64_t row = first + std::min<int64_t>(r, rows.count - 1);
            float *const memory = scratch + r * scratch_of_row(weight.units, weight.groups);
            float *const zeros = memory + whole_lines(weight.units) + LINE;
            spread_scales<V>(product, row, memory, zeros);
            rows.words[r] = weight.words + row * weight.words_per_row;
            rows.scales[r] = memory;
            rows.zeros[r] = zeros;
        }
        multiply_all<V, bits, V::most>(product, rows, 0);
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

// The packed product over a vector type V: Vectors and what derives from it. The file of each
// instruction set includes this once, after it has defined OMNIQUANT_TARGET.
#include <algorithm>
#include <cstdint>

#include "half.h"
#include "packed_linear.h"
#include "vectors.h"

namespace omniquant {
namespace {

// The codes of one vector of words.
template <typename V, int kBits>
struct Codes {
    static constexpr int kVectors = vectors_of(kBits, V::kPaired);
    static constexpr int kEach = vectors_of_word(kBits, V::kPaired);
    typename V::Int words[kVectors / kEach];

    OMNIQUANT_STEP Codes load(const uint32_t *row, int64_t units, int64_t block) {
        if constexpr (kBits == 3) {
            return join(V::load(row + block * V::kLanes),
                        V::load_halves(high_plane(row, units) + block * V::kLanes));
        } else {
            return {{V::load(row + block * V::kLanes)}};
        }
    }

    // The first `lanes` lanes; the others are zero.
    OMNIQUANT_STEP Codes load_some(const uint32_t *row, int64_t units, int64_t block,
                                   int64_t lanes) {
        if constexpr (kBits == 3) {
            return join(V::load_some(row + block * V::kLanes, lanes),
                        V::load_some_halves(high_plane(row, units) + block * V::kLanes, lanes));
        } else {
            return {{V::load_some(row + block * V::kLanes, lanes)}};
        }
    }

    OMNIQUANT_STEP void prefetch(const uint32_t *row, int64_t units, int64_t block) {
        V::prefetch(row + block * V::kLanes);
        if constexpr (kBits == 3) {
            V::prefetch(row + 2 * units + block * V::kLanes / 2);
        }
    }

    template <int kVector>
    OMNIQUANT_TARGET OMNIQUANT_INLINE typename V::Number number() const {
        return V::template number<kBits, spacing_of(kBits), kVector % kEach>(
            words[kVector / kEach]);
    }

  private:
    OMNIQUANT_STEP const uint16_t *high_plane(const uint32_t *row, int64_t units) {
        return reinterpret_cast<const uint16_t *>(row + 2 * units);
    }

    // 3 bit: a lane of the low plane has 16 pairs of bits, a half word of the high plane the bits
    // above them, which move apart until they stand over their pairs.
    OMNIQUANT_STEP Codes join(typename V::Int low, typename V::Int high) {
        constexpr uint32_t kPairs = 0x33333333u;
        high = (high | high << 8) & 0x00FF00FFu;
        high = (high | high << 4) & 0x0F0F0F0Fu;
        high = (high | high << 2) & kPairs;
        return {
            {(low & kPairs) | (high << 2 & ~kPairs), (low >> 2 & kPairs) | (high << 1 & ~kPairs)}};
    }
};

// As many rows of the weight as V takes at once. Where fewer are left, the last one fills the
// places, and its extra results are thrown away.
template <typename V>
struct Rows {
    const uint32_t *words[V::kRows];
    const float *scales[V::kRows];        // of each unit
    const float *scaled_zeros[V::kRows];  // of each group: scale * what is taken off the codes
    int64_t first;
    int64_t count;
};

// Sums over columns, of these rows with kTokens tokens.
template <typename V, int kTokens>
struct Sums {
    typename V::Float at[V::kRows][kTokens];
};

template <typename V, int kBits, int kTokens, int kVector>
OMNIQUANT_STEP void add_vector(const Codes<V, kBits> (&codes)[V::kRows], const float *x,
                               int64_t stride, Sums<V, kTokens> &sums) {
    typename V::Number numbers[V::kRows];
    for (int r = 0; r < V::kRows; ++r) {
        numbers[r] = codes[r].template number<kVector>();
    }
    for (int i = 0; i < kTokens; ++i) {
        const typename V::Number values = V::load_x(x + i * stride + kVector * V::kLanes);
        for (int r = 0; r < V::kRows; ++r) {
            if constexpr (kVector == 0) {
                sums.at[r][i] = V::dot(numbers[r], values);
            } else {
                sums.at[r][i] = V::add_dot(sums.at[r][i], numbers[r], values);
            }
        }
    }
    if constexpr (kVector + 1 < Codes<V, kBits>::kVectors) {
        add_vector<V, kBits, kTokens, kVector + 1>(codes, x, stride, sums);
    }
}

template <typename V, int kBits, int kTokens>
OMNIQUANT_STEP void add_block(const Codes<V, kBits> (&codes)[V::kRows], const float *x,
                              int64_t stride, const Rows<V> &rows, int64_t block,
                              Sums<V, kTokens> &totals) {
    constexpr int kUnits = V::kLanes * fields_of(kBits) / kUnit;
    Sums<V, kTokens> sums;
    add_vector<V, kBits, kTokens, 0>(codes, x, stride, sums);
    for (int r = 0; r < V::kRows; ++r) {
        const typename V::Float scale =
            V::template spread<V::kLanes / kUnits>(rows.scales[r] + block * kUnits);
        for (int i = 0; i < kTokens; ++i) {
            totals.at[r][i] = V::add_product(totals.at[r][i], sums.at[r][i], scale);
        }
    }
}

// sum(scale * code * x)
template <typename V, int kBits, int kTokens>
OMNIQUANT_STEP void add_blocks(const PackedProduct &product, const Rows<V> &rows, const float *x,
                               Sums<V, kTokens> &totals) {
    constexpr int64_t kFields = fields_of(kBits);
    constexpr int64_t kColumns = V::kLanes * kFields;
    constexpr int64_t kFloats = V::kLanes * Codes<V, kBits>::kVectors;
    const int64_t units = product.weight.units;
    const int64_t ahead = V::kRows * product.weight.words_per_row;
    const int64_t blocks = units * kUnit / kColumns;
    Codes<V, kBits> codes[V::kRows];
    for (int64_t block = 0; block < blocks; ++block) {
        for (int r = 0; r < V::kRows; ++r) {
            Codes<V, kBits>::prefetch(rows.words[r] + ahead, units, block);
            codes[r] = Codes<V, kBits>::load(rows.words[r], units, block);
        }
        add_block<V, kBits, kTokens>(codes, x + block * kFloats, product.x.stride, rows, block,
                                     totals);
    }
    if (const int64_t rest = units * kUnit - blocks * kColumns; rest != 0) {
        for (int r = 0; r < V::kRows; ++r) {
            codes[r] = Codes<V, kBits>::load_some(rows.words[r], units, blocks, rest / kFields);
        }
        add_block<V, kBits, kTokens>(codes, x + blocks * kFloats, product.x.stride, rows, blocks,
                                     totals);
    }
}

// sum(scale * zero_point * sum(x))
template <typename V, int kTokens>
OMNIQUANT_STEP void subtract_zeros(const PackedProduct &product, const Rows<V> &rows,
                                   const float *sums, Sums<V, kTokens> &totals) {
    for (int64_t g = 0; g < product.weight.groups; g += V::kLanes) {
        for (int r = 0; r < V::kRows; ++r) {
            const typename V::Float scaled_zeros = V::load(rows.scaled_zeros[r] + g);
            for (int i = 0; i < kTokens; ++i) {
                totals.at[r][i] = V::subtract_product(
                    totals.at[r][i], scaled_zeros, V::load(sums + i * product.x.sums_stride + g));
            }
        }
    }
}

// The products of these rows with kTokens tokens, from the token `first` on.
template <typename V, int kBits, int kTokens>
static OMNIQUANT_TARGET void multiply(const PackedProduct &product, const Rows<V> &rows,
                                      int64_t first) {
    Sums<V, kTokens> totals;
    for (int r = 0; r < V::kRows; ++r) {
        for (int i = 0; i < kTokens; ++i) {
            totals.at[r][i] = V::fill(0.0f);
        }
    }
    const ArrangedTokens &x = product.x;
    add_blocks<V, kBits, kTokens>(product, rows, x.values + first * x.stride, totals);
    subtract_zeros<V, kTokens>(product, rows, x.sums + first * x.sums_stride, totals);
    const Output &out = product.out;
    for (int i = 0; i < kTokens; ++i) {
        for (int r = 0; r < rows.count; ++r) {
            store_element(out.values, out.dtype,
                          (out.first + first + i) * out.rows + rows.first + r,
                          V::total(totals.at[r][i]));
        }
    }
}

// The products with all tokens from `first` on: kTokens at a time, then half as many, down to one.
template <typename V, int kBits, int kTokens>
static OMNIQUANT_TARGET void multiply_all(const PackedProduct &product, const Rows<V> &rows,
                                          int64_t first) {
    for (; first + kTokens <= product.x.tokens; first += kTokens) {
        multiply<V, kBits, kTokens>(product, rows, first);
    }
    if constexpr (kTokens > 1) {
        multiply_all<V, kBits, kTokens / 2>(product, rows, first);
    }
}

// A row's scales, one for each unit, and its scaled zero points, one for each group.
template <typename V>
OMNIQUANT_STEP void spread_scales(const PackedProduct &product, int64_t row, float *scales,
                                  float *scaled_zeros) {
    const PackedWeight &weight = product.weight;
    const typename V::Float middle = V::fill(static_cast<float>(1 << (weight.bits - 1)));
    const int64_t first = row * weight.groups;
    // The scales of the groups pass through `scaled_zeros`, which is filled last.
    for (int64_t g = 0; g < weight.groups; g += V::kLanes) {
        const int64_t count = std::min<int64_t>(weight.groups - g, V::kLanes);
        V::store(scaled_zeros + g,
                 V::load_elements(weight.scale, weight.scale_dtype, first + g, count));
    }
    for (int64_t u = 0; u < weight.units; u += V::kLanes) {
        const typename V::Float near = V::load(scaled_zeros + product.first_groups[u / V::kLanes]);
        V::store(scales + u, V::permute(near, product.group_of_unit + u));
    }
    for (int64_t g = 0; g < weight.groups; g += V::kLanes) {
        const int64_t count = std::min<int64_t>(weight.groups - g, V::kLanes);
        const typename V::Float zero_point =
            weight.zero_point == nullptr ? middle
                                         : V::load_bytes(weight.zero_point + first + g, count);
        V::store(scaled_zeros + g,
                 V::load(scaled_zeros + g) * (zero_point + static_cast<float>(V::kOffset)));
    }
}

template <typename V, int kBits>
static OMNIQUANT_TARGET void multiply_range(const PackedProduct &product, float *scratch,
                                            int64_t begin, int64_t end) {
    const PackedWeight &weight = product.weight;
    for (int64_t first = begin; first < end; first += V::kRows) {
        Rows<V> rows;
        rows.first = first;
        rows.count = std::min<int64_t>(end - first, V::kRows);
        for (int r = 0; r < V::kRows; ++r) {
            const int64_t row = first + std::min<int64_t>(r, rows.count - 1);
            float *const memory = scratch + r * scratch_of_row(weight.units, weight.groups);
            float *const scaled_zeros = memory + whole_lines(weight.units) + kLine;
            spread_scales<V>(product, row, memory, scaled_zeros);
            rows.words[r] = weight.words + row * weight.words_per_row;
            rows.scales[r] = memory;
            rows.scaled_zeros[r] = scaled_zeros;
        }
        multiply_all<V, kBits, V::kTokens>(product, rows, 0);
    }
}

template <typename V>
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

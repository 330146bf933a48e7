// The packed product for any processor: loops over eight lanes, which the compiler vectorises.
#include <algorithm>

#define OMNIQUANT_TARGET
#include "packed_rows.h"

namespace omniquant {
namespace {

struct Portable {
    static constexpr int lanes = 8;
    static constexpr int rows = 1;  // of the weight at once
    static constexpr int most = 2;  // rows of x at once
    struct Float {
        float at[lanes];
    };
    struct Int {
        uint32_t at[lanes];
    };

    OMNIQUANT_STEP void prefetch(const uint32_t *) {}

    OMNIQUANT_STEP Int load(const uint32_t *words) { return load_some(words, lanes); }

    OMNIQUANT_STEP Int load_some(const uint32_t *words, int64_t count) {
        Int result = {};
        std::copy(words, words + count, result.at);
        return result;
    }

    OMNIQUANT_STEP Int load_halves(const uint16_t *halves) {
        return load_some_halves(halves, lanes);
    }

    OMNIQUANT_STEP Int load_some_halves(const uint16_t *halves, int64_t count) {
        Int result = {};
        std::copy(halves, halves + count, result.at);
        return result;
    }

    OMNIQUANT_STEP Float load_bytes(const uint8_t *bytes, int64_t count) {
        Float result = {};
        std::copy(bytes, bytes + count, result.at);
        return result;
    }

    OMNIQUANT_STEP Float load_elements(const void *values, int32_t type, int64_t index,
                                       int64_t count) {
        Float result = {};
        for (int64_t i = 0; i < count; ++i) {
            result.at[i] = load_element(values, type, index + i);
        }
        return result;
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int masked(Int words) {
        for (uint32_t &word : words.at) {
            word &= mask;
        }
        return words;
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int either_masked(const Int &a, const Int &b) {
        Int result;
        for (int i = 0; i < lanes; ++i) {
            result.at[i] = (a.at[i] | b.at[i]) & mask;
        }
        return result;
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int select(const Int &where, const Int &elsewhere) {
        Int result;
        for (int i = 0; i < lanes; ++i) {
            result.at[i] = (where.at[i] & mask) | (elsewhere.at[i] & ~mask);
        }
        return result;
    }

    template <int count>
    OMNIQUANT_STEP Int shift_left(Int words) {
        for (uint32_t &word : words.at) {
            word <<= count;
        }
        return words;
    }

    template <int count>
    OMNIQUANT_STEP Int shift_right(Int words) {
        for (uint32_t &word : words.at) {
            word >>= count;
        }
        return words;
    }

    // Signed: that conversion is one instruction everywhere.
    OMNIQUANT_STEP Float number(const Int &words) {
        Float result;
        for (int i = 0; i < lanes; ++i) {
            result.at[i] = static_cast<float>(static_cast<int32_t>(words.at[i]));
        }
        return result;
    }

    OMNIQUANT_STEP Float fill(float value) {
        Float result;
        std::fill(result.at, result.at + lanes, value);
        return result;
    }

    OMNIQUANT_STEP Float load(const float *values) {
        Float result;
        std::copy(values, values + lanes, result.at);
        return result;
    }

    OMNIQUANT_STEP Float load_unaligned(const float *values) { return load(values); }

    OMNIQUANT_STEP void store(float *values, const Float &vector) {
        std::copy(vector.at, vector.at + lanes, values);
    }

    OMNIQUANT_STEP Float product(const Float &a, const Float &b) {
        Float result;
        for (int i = 0; i < lanes; ++i) {
            result.at[i] = a.at[i] * b.at[i];
        }
        return result;
    }

    OMNIQUANT_STEP Float add_product(const Float &sum, const Float &a, const Float &b) {
        Float result;
        for (int i = 0; i < lanes; ++i) {
            result.at[i] = sum.at[i] + a.at[i] * b.at[i];
        }
        return result;
    }

    OMNIQUANT_STEP Float subtract_product(const Float &sum, const Float &a, const Float &b) {
        Float result;
        for (int i = 0; i < lanes; ++i) {
            result.at[i] = sum.at[i] - a.at[i] * b.at[i];
        }
        return result;
    }

    OMNIQUANT_STEP Float permute(const Float &values, const int32_t *indices) {
        Float result;
        for (int i = 0; i < lanes; ++i) {
            result.at[i] = values.at[indices[i]];
        }
        return result;
    }

    // Every value stands in `times` lanes.
    template <int times>
    OMNIQUANT_STEP Float spread(const float *values) {
        Float result;
        for (int i = 0; i < lanes; ++i) {
            result.at[i] = values[i / times];
        }
        return result;
    }

    OMNIQUANT_STEP float sum(const Float &values) {
        const float *at = values.at;
        return ((at[0] + at[4]) + (at[2] + at[6])) + ((at[1] + at[5]) + (at[3] + at[7]));
    }
};

}  // namespace

void packed_rows_portable(const PackedProduct &product, float *scratch, int64_t begin,
                          int64_t end) {
    multiply_any<Portable>(product, scratch, begin, end);
}

}  // namespace omniquant

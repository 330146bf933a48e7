// The packed product for any processor: the compiler turns vectors into the processor's own.
#include <cstdint>

#include "half.h"

#define OMNIQUANT_TARGET
#include "packed_rows.h"

namespace omniquant {
namespace {

struct Portable : Vectors<Portable, 8> {
    static constexpr int kRows = 1;    // of the weight at once
    static constexpr int kTokens = 2;  // at once

    OMNIQUANT_STEP void prefetch(const uint32_t *) {}

    template <typename Narrow>
    OMNIQUANT_STEP Int widen(Narrow numbers) {
        return __builtin_convertvector(numbers, Int);
    }

    OMNIQUANT_STEP Float widen_float16(Halves halves) {
        Float result;
        for (int lane = 0; lane < kLanes; ++lane) {
            result[lane] = float_of_float16(halves[lane]);
        }
        return result;
    }

    OMNIQUANT_STEP Float add_product(Float sum, Float a, Float b) { return sum + a * b; }

    OMNIQUANT_STEP Float subtract_product(Float sum, Float a, Float b) { return sum - a * b; }

    // Lane i of the result is lane indices[i] of the values.
    OMNIQUANT_STEP Float permute(Float values, const int32_t *indices) {
        Float result;
        for (int lane = 0; lane < kLanes; ++lane) {
            result[lane] = values[indices[lane]];
        }
        return result;
    }

    // Lane i of the result is value i / kTimes.
    template <int kTimes>
    OMNIQUANT_STEP Float spread(const float *values) {
        const float *v = values;
        return Float{v[0 / kTimes], v[1 / kTimes], v[2 / kTimes], v[3 / kTimes],
                     v[4 / kTimes], v[5 / kTimes], v[6 / kTimes], v[7 / kTimes]};
    }

    OMNIQUANT_STEP float total(Float values) {
        const Float v = values;
        return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    }
};

}  // namespace

void packed_rows_portable(const PackedProduct &product, float *scratch, int64_t begin,
                          int64_t end) {
    multiply_any<Portable>(product, scratch, begin, end);
}

}  // namespace omniquant

// The packed product for any processor, in the vectors of gcc and clang, who make of them what the
// processor has.
#include <cstdint>
#include <cstring>

#define OMNIQUANT_TARGET
#include "packed_rows.h"

namespace omniquant {
namespace {

typedef float FloatVector __attribute__((vector_size(32)));
typedef uint32_t IntVector __attribute__((vector_size(32)));
typedef int32_t SignedVector __attribute__((vector_size(32)));

struct Portable {
    static constexpr int lanes = 8;
    static constexpr int rows = 1;  // of the weight at once
    static constexpr int most = 2;  // rows of x at once
    using Float = FloatVector;
    using Int = IntVector;
    using Number = Float;
    static constexpr int paired = 1;
    static constexpr int offset = 0;  // by which numbers are too large

    OMNIQUANT_STEP void prefetch(const uint32_t *) {}

    template <class Vector, class Element>
    OMNIQUANT_STEP Vector load_as(const Element *values) {
        Vector result;
        static_assert(sizeof result == lanes * sizeof *values, "one element a lane");
        std::memcpy(&result, values, sizeof result);
        return result;
    }

    OMNIQUANT_STEP Int load(const uint32_t *words) { return load_as<Int>(words); }

    OMNIQUANT_STEP Int load_some(const uint32_t *words, int64_t count) {
        uint32_t some[lanes] = {};
        std::memcpy(some, words, static_cast<size_t>(count) * sizeof *words);
        return load(some);
    }

    OMNIQUANT_STEP Int load_halves(const uint16_t *halves) {
        uint32_t words[lanes];
        for (int i = 0; i < lanes; ++i) {
            words[i] = halves[i];
        }
        return load(words);
    }

    OMNIQUANT_STEP Int load_some_halves(const uint16_t *halves, int64_t count) {
        uint16_t some[lanes] = {};
        std::memcpy(some, halves, static_cast<size_t>(count) * sizeof *halves);
        return load_halves(some);
    }

    OMNIQUANT_STEP Float load_bytes(const uint8_t *bytes, int64_t count) {
        float numbers[lanes] = {};
        for (int64_t i = 0; i < count; ++i) {
            numbers[i] = bytes[i];
        }
        return load(numbers);
    }

    OMNIQUANT_STEP Float load_elements(const void *values, int32_t type, int64_t index,
                                       int64_t count) {
        float numbers[lanes] = {};
        for (int64_t i = 0; i < count; ++i) {
            numbers[i] = load_element(values, type, index + i);
        }
        return load(numbers);
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int masked(Int words) {
        return words & mask;
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int either_masked(Int a, Int b) {
        return (a | b) & mask;
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int select(Int where, Int elsewhere) {
        return (where & mask) | (elsewhere & ~mask);
    }

    template <int count>
    OMNIQUANT_STEP Int shift_left(Int words) {
        return words << count;
    }

    template <int count>
    OMNIQUANT_STEP Int shift_right(Int words) {
        return words >> count;
    }

    // From signed numbers: that is one instruction everywhere.
    OMNIQUANT_STEP Float converted(Int words) {
        return __builtin_convertvector(reinterpret_cast<SignedVector>(words), Float);
    }

    // The codes that begin at bit index * spacing of their words.
    template <int bits, int spacing, int index>
    OMNIQUANT_STEP Number number(Int words) {
        constexpr int begin = index * spacing;
        if constexpr (begin + bits == 32) {
            return converted(words >> begin);
        } else {
            constexpr uint32_t mask = ((1u << bits) - 1) << begin;
            return converted(words & mask);
        }
    }

    OMNIQUANT_STEP Number load_x(const float *values) { return load(values); }

    OMNIQUANT_STEP Float dot(Number a, Number b) { return product(a, b); }

    OMNIQUANT_STEP Float add_dot(Float sum, Number a, Number b) { return add_product(sum, a, b); }

    OMNIQUANT_STEP Float fill(float value) { return Float{} + value; }

    OMNIQUANT_STEP Float load(const float *values) { return load_as<Float>(values); }

    OMNIQUANT_STEP Float load_unaligned(const float *values) { return load(values); }

    OMNIQUANT_STEP void store(float *values, Float vector) {
        std::memcpy(values, &vector, sizeof vector);
    }

    OMNIQUANT_STEP Float product(Float a, Float b) { return a * b; }

    OMNIQUANT_STEP Float add_product(Float sum, Float a, Float b) { return sum + a * b; }

    OMNIQUANT_STEP Float subtract_product(Float sum, Float a, Float b) { return sum - a * b; }

    OMNIQUANT_STEP Float permute(Float values, const int32_t *indices) {
        float from[lanes];
        float to[lanes];
        store(from, values);
        for (int i = 0; i < lanes; ++i) {
            to[i] = from[indices[i]];
        }
        return load(to);
    }

    // Every value stands in `times` lanes.
    template <int times>
    OMNIQUANT_STEP Float spread(const float *values) {
        const float *v = values;
        return Float{v[0 / times], v[1 / times], v[2 / times], v[3 / times],
                     v[4 / times], v[5 / times], v[6 / times], v[7 / times]};
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

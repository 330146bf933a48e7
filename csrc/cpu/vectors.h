// What the vector types of the packed product have in common, in the vectors of gcc and clang. A
// type V derives from Vectors<V, ..> and adds what depends on its instruction set: kRows and
// kTokens, the rows of the weight and the tokens that its registers hold sums for; widen and
// widen_float16; add_product and subtract_product; permute, spread and total.
#ifndef OMNIQUANT_VECTORS_H
#define OMNIQUANT_VECTORS_H

#include <cstdint>
#include <cstring>

#include "inline.h"
#include "omniquant.h"

// OMNIQUANT_TARGET is the attribute that lets a function use the instruction set; the including
// file defines it.
#define OMNIQUANT_STEP static OMNIQUANT_TARGET OMNIQUANT_INLINE

namespace omniquant {
namespace {

// The vectors of kLanes elements. They are listed because gcc takes no size that depends on a
// template.
template <int kLanes>
struct VectorTypes;

template <>
struct VectorTypes<8> {
    typedef float Float __attribute__((vector_size(32)));
    typedef uint32_t Int __attribute__((vector_size(32)));
    typedef int32_t Signed __attribute__((vector_size(32)));
    typedef uint16_t Halves __attribute__((vector_size(16)));
    typedef uint8_t Bytes __attribute__((vector_size(8)));
};

template <>
struct VectorTypes<16> {
    typedef float Float __attribute__((vector_size(64)));
    typedef uint32_t Int __attribute__((vector_size(64)));
    typedef int32_t Signed __attribute__((vector_size(64)));
    typedef uint16_t Halves __attribute__((vector_size(32)));
    typedef uint8_t Bytes __attribute__((vector_size(16)));
};

template <typename V, int kVectorLanes>
struct Vectors {
    static constexpr int kLanes = kVectorLanes;
    static constexpr int kPaired = 1;  // codes that a lane gives at a time
    static constexpr int kOffset = 0;  // by which numbers are too large

    using Float = typename VectorTypes<kLanes>::Float;
    using Int = typename VectorTypes<kLanes>::Int;
    using Signed = typename VectorTypes<kLanes>::Signed;
    using Halves = typename VectorTypes<kLanes>::Halves;
    using Bytes = typename VectorTypes<kLanes>::Bytes;
    using Number = Float;

    // Into the second-level cache.
    OMNIQUANT_STEP void prefetch(const uint32_t *words) { __builtin_prefetch(words, 0, 2); }

    template <typename Vector, typename Element>
    OMNIQUANT_STEP Vector load_as(const Element *from) {
        Vector result;
        static_assert(sizeof result == kLanes * sizeof *from, "one element a lane");
        std::memcpy(&result, from, sizeof result);
        return result;
    }

    // The first `count` elements, zeros behind them.
    template <typename Vector, typename Element>
    OMNIQUANT_STEP Vector load_some_as(const Element *from, int64_t count) {
        if (count == kLanes) {
            return load_as<Vector>(from);
        }
        Element some[kLanes] = {};
        std::memcpy(some, from, static_cast<size_t>(count) * sizeof *from);
        return load_as<Vector>(some);
    }

    OMNIQUANT_STEP Int load(const uint32_t *words) { return load_as<Int>(words); }

    OMNIQUANT_STEP Int load_some(const uint32_t *words, int64_t count) {
        return V::template load_some_as<Int>(words, count);
    }

    OMNIQUANT_STEP Int load_halves(const uint16_t *halves) {
        return V::widen(load_as<Halves>(halves));
    }

    OMNIQUANT_STEP Int load_some_halves(const uint16_t *halves, int64_t count) {
        return V::widen(V::template load_some_as<Halves>(halves, count));
    }

    OMNIQUANT_STEP Float load_bytes(const uint8_t *bytes, int64_t count) {
        return converted(V::widen(V::template load_some_as<Bytes>(bytes, count)));
    }

    OMNIQUANT_STEP Float load_elements(const void *values, int32_t dtype, int64_t index,
                                       int64_t count) {
        if (dtype == OMNIQUANT_FLOAT32) {
            return V::template load_some_as<Float>(static_cast<const float *>(values) + index,
                                                   count);
        }
        const auto halves =
            V::template load_some_as<Halves>(static_cast<const uint16_t *>(values) + index, count);
        return dtype == OMNIQUANT_FLOAT16 ? V::widen_float16(halves)
                                          : reinterpret_cast<Float>(V::widen(halves) << 16);
    }

    // From signed numbers: that is one instruction everywhere.
    OMNIQUANT_STEP Float converted(Int words) {
        return __builtin_convertvector(reinterpret_cast<Signed>(words), Float);
    }

    // The codes that begin at bit kIndex * kSpacing of their words.
    template <int kBits, int kSpacing, int kIndex>
    OMNIQUANT_STEP Number number(Int words) {
        constexpr int kBegin = kIndex * kSpacing;
        if constexpr (kBegin + kBits == 32) {
            return converted(words >> kBegin);
        } else {
            return converted(words & ((1u << kBits) - 1) << kBegin);
        }
    }

    OMNIQUANT_STEP Number load_x(const float *values) { return load(values); }

    OMNIQUANT_STEP Float dot(Number a, Number b) { return a * b; }

    OMNIQUANT_STEP Float add_dot(Float sum, Number a, Number b) {
        return V::add_product(sum, a, b);
    }

    OMNIQUANT_STEP Float fill(float value) { return Float{} + value; }

    OMNIQUANT_STEP Float load(const float *values) { return load_as<Float>(values); }

    OMNIQUANT_STEP void store(float *values, Float vector) {
        std::memcpy(values, &vector, sizeof vector);
    }
};

}  // namespace
}  // namespace omniquant

#endif

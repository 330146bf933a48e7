// The vector type of 512 bits, for a file that defines OMNIQUANT_TARGET.
#ifndef OMNIQUANT_AVX512_H
#define OMNIQUANT_AVX512_H

#if defined(__GNUC__) && !defined(__clang__)  // warnings about the compiler's own header, gcc 12
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "packed_rows.h"

namespace omniquant {
namespace {

struct Avx512 : Vectors<Avx512, 16> {
    static constexpr int kRows = 4;    // of the weight at once
    static constexpr int kTokens = 4;  // at once

    template <typename Vector, typename Element>
    OMNIQUANT_STEP Vector load_some_as(const Element *from, int64_t count) {
        const auto first = static_cast<__mmask16>((1u << count) - 1);
        if constexpr (sizeof(Element) == 4) {
            return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi32(first, from));
        } else if constexpr (sizeof(Element) == 2) {
            return reinterpret_cast<Vector>(_mm256_maskz_loadu_epi16(first, from));
        } else {
            return reinterpret_cast<Vector>(_mm_maskz_loadu_epi8(first, from));
        }
    }

    OMNIQUANT_STEP Int widen(Halves halves) {
        return reinterpret_cast<Int>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)));
    }

    OMNIQUANT_STEP Int widen(Bytes bytes) {
        return reinterpret_cast<Int>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(bytes)));
    }

    OMNIQUANT_STEP Float widen_float16(Halves halves) {
        return _mm512_cvtph_ps(reinterpret_cast<__m256i>(halves));
    }

    OMNIQUANT_STEP Float add_product(Float sum, Float a, Float b) {
        return _mm512_fmadd_ps(a, b, sum);
    }

    OMNIQUANT_STEP Float subtract_product(Float sum, Float a, Float b) {
        return _mm512_fnmadd_ps(a, b, sum);
    }

    // Lane i of the result is lane indices[i] of the values.
    OMNIQUANT_STEP Float permute(Float values, const int32_t *indices) {
        return _mm512_permutexvar_ps(_mm512_loadu_si512(indices), values);
    }

    // Lane i of the result is value i / kTimes.
    template <int kTimes>
    OMNIQUANT_STEP Float spread(const float *values) {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        constexpr int kShift = kTimes == 2 ? 1 : kTimes == 4 ? 2 : 3;
        return _mm512_permutexvar_ps(_mm512_srli_epi32(lane, kShift),
                                     _mm512_castps256_ps512(_mm256_loadu_ps(values)));
    }

    OMNIQUANT_STEP float total(Float values) { return _mm512_reduce_add_ps(values); }
};

}  // namespace
}  // namespace omniquant

#endif

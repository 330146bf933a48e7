// The vector type of 512 bits, for whoever has defined OMNIQUANT_TARGET.
#ifndef OMNIQUANT_AVX512_H
#define OMNIQUANT_AVX512_H

#if defined(__GNUC__) && !defined(__clang__)  // of gcc 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "packed_rows.h"

namespace omniquant {
namespace {

struct Avx512 {
    static constexpr int lanes = 16;
    static constexpr int rows = 4;  // of the weight at once
    static constexpr int most = 4;  // rows of x at once
    using Float = __m512;
    using Int = __m512i;
    using Number = Float;
    static constexpr int paired = 1;
    static constexpr int offset = 0;  // by which numbers are too large

    OMNIQUANT_STEP __mmask16 first(int64_t count) {
        return static_cast<__mmask16>((1u << count) - 1);
    }

    OMNIQUANT_STEP void prefetch(const uint32_t *words) {
        _mm_prefetch(reinterpret_cast<const char *>(words), _MM_HINT_T1);
    }

    OMNIQUANT_STEP Int load(const uint32_t *words) { return _mm512_loadu_si512(words); }

    OMNIQUANT_STEP Int load_some(const uint32_t *words, int64_t count) {
        return _mm512_maskz_loadu_epi32(first(count), words);
    }

    OMNIQUANT_STEP Int load_halves(const uint16_t *halves) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(halves)));
    }

    OMNIQUANT_STEP Int load_some_halves(const uint16_t *halves, int64_t count) {
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), halves));
    }

    OMNIQUANT_STEP Float load_bytes(const uint8_t *bytes, int64_t count) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), bytes)));
    }

    OMNIQUANT_STEP Float load_elements(const void *values, int32_t type, int64_t index,
                                       int64_t count) {
        if (type == OMNIQUANT_FLOAT32) {
            return _mm512_maskz_loadu_ps(first(count), static_cast<const float *>(values) + index);
        }
        const __m256i halves =
            _mm256_maskz_loadu_epi16(first(count), static_cast<const uint16_t *>(values) + index);
        return type == OMNIQUANT_FLOAT16
                   ? _mm512_cvtph_ps(halves)
                   : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int masked(Int words) {
        return _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int32_t>(mask)));
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int either_masked(Int a, Int b) {
        return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32(static_cast<int32_t>(mask)), 0xA8);
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int select(Int where, Int elsewhere) {
        return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int32_t>(mask)), where,
                                         elsewhere, 0xCA);
    }

    template <int count>
    OMNIQUANT_STEP Int shift_left(Int words) {
        return _mm512_slli_epi32(words, count);
    }

    template <int count>
    OMNIQUANT_STEP Int shift_right(Int words) {
        return _mm512_srli_epi32(words, count);
    }

    // The codes that begin at bit index * spacing of their words.
    template <int bits, int spacing, int index>
    OMNIQUANT_STEP Number number(Int words) {
        constexpr int begin = index * spacing;
        if constexpr (begin + bits == 32) {
            return _mm512_cvtepi32_ps(shift_right<begin>(words));
        } else {
            return _mm512_cvtepi32_ps(masked<((1u << bits) - 1) << begin>(words));
        }
    }

    OMNIQUANT_STEP Number load_x(const float *values) { return _mm512_load_ps(values); }

    OMNIQUANT_STEP Float dot(Number a, Number b) { return _mm512_mul_ps(a, b); }

    OMNIQUANT_STEP Float add_dot(Float sum, Number a, Number b) {
        return _mm512_fmadd_ps(a, b, sum);
    }

    OMNIQUANT_STEP Float fill(float value) { return _mm512_set1_ps(value); }

    OMNIQUANT_STEP Float load(const float *values) { return _mm512_load_ps(values); }

    OMNIQUANT_STEP Float load_unaligned(const float *values) { return _mm512_loadu_ps(values); }

    OMNIQUANT_STEP void store(float *values, Float vector) { _mm512_store_ps(values, vector); }

    OMNIQUANT_STEP Float product(Float a, Float b) { return _mm512_mul_ps(a, b); }

    OMNIQUANT_STEP Float add_product(Float sum, Float a, Float b) {
        return _mm512_fmadd_ps(a, b, sum);
    }

    OMNIQUANT_STEP Float subtract_product(Float sum, Float a, Float b) {
        return _mm512_fnmadd_ps(a, b, sum);
    }

    OMNIQUANT_STEP Float permute(Float values, const int32_t *indices) {
        return _mm512_permutexvar_ps(_mm512_load_si512(indices), values);
    }

    // Every value stands in `times` lanes.
    template <int times>
    OMNIQUANT_STEP Float spread(const float *values) {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        constexpr int shift = times == 2 ? 1 : times == 4 ? 2 : 3;
        return _mm512_permutexvar_ps(_mm512_srli_epi32(lane, shift),
                                     _mm512_castps256_ps512(_mm256_loadu_ps(values)));
    }

    OMNIQUANT_STEP float total(Float values) { return _mm512_reduce_add_ps(values); }
};

}  // namespace
}  // namespace omniquant

#endif

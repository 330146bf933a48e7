// The packed product in 256-bit vectors.
#include "packed_linear.h"

#if defined(OMNIQUANT_X86)
#include <immintrin.h>

#include <cstring>

#define OMNIQUANT_TARGET __attribute__((target("avx2,fma,f16c")))
#include "packed_rows.h"

namespace omniquant {
namespace {

struct Avx2 {
    static constexpr int lanes = 8;
    static constexpr int rows = 4;  // of the weight at once
    static constexpr int most = 2;  // rows of x at once
    using Float = __m256;
    using Int = __m256i;
    using Number = Float;
    static constexpr int paired = 1;
    static constexpr int offset = 0;  // by which numbers are too large

    OMNIQUANT_STEP void prefetch(const uint32_t *words) {
        _mm_prefetch(reinterpret_cast<const char *>(words), _MM_HINT_T1);
    }

    OMNIQUANT_STEP Int load(const uint32_t *words) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(words));
    }

    OMNIQUANT_STEP Int load_some(const uint32_t *words, int64_t count) {
        uint32_t some[lanes] = {};
        std::memcpy(some, words, static_cast<size_t>(count) * sizeof *words);
        return load(some);
    }

    OMNIQUANT_STEP Int load_halves(const uint16_t *halves) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(halves)));
    }

    OMNIQUANT_STEP Int load_some_halves(const uint16_t *halves, int64_t count) {
        if (count == lanes) {
            return load_halves(halves);
        }
        uint16_t some[lanes] = {};
        std::memcpy(some, halves, static_cast<size_t>(count) * sizeof *halves);
        return load_halves(some);
    }

    OMNIQUANT_STEP Float load_bytes(const uint8_t *bytes, int64_t count) {
        uint8_t some[lanes] = {};
        if (count < lanes) {
            std::memcpy(some, bytes, static_cast<size_t>(count));
            bytes = some;
        }
        return _mm256_cvtepi32_ps(
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes))));
    }

    OMNIQUANT_STEP Float load_elements(const void *values, int32_t type, int64_t index,
                                       int64_t count) {
        if (type == OMNIQUANT_FLOAT32) {
            const float *from = static_cast<const float *>(values) + index;
            float some[lanes] = {};
            if (count < lanes) {
                std::memcpy(some, from, static_cast<size_t>(count) * sizeof *from);
                from = some;
            }
            return _mm256_loadu_ps(from);
        }
        const Int halves = load_some_halves(static_cast<const uint16_t *>(values) + index, count);
        return type == OMNIQUANT_FLOAT16
                   ? _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(halves),
                                                      _mm256_extracti128_si256(halves, 1)))
                   : _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16));
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int masked(Int words) {
        return _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int32_t>(mask)));
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int either_masked(Int a, Int b) {
        return masked<mask>(_mm256_or_si256(a, b));
    }

    template <uint32_t mask>
    OMNIQUANT_STEP Int select(Int where, Int elsewhere) {
        return _mm256_or_si256(masked<mask>(where), masked<~mask>(elsewhere));
    }

    template <int count>
    OMNIQUANT_STEP Int shift_left(Int words) {
        return _mm256_slli_epi32(words, count);
    }

    template <int count>
    OMNIQUANT_STEP Int shift_right(Int words) {
        return _mm256_srli_epi32(words, count);
    }

    // The codes that begin at bit index * spacing of their words.
    template <int bits, int spacing, int index>
    OMNIQUANT_STEP Number number(Int words) {
        constexpr int begin = index * spacing;
        if constexpr (begin + bits == 32) {
            return _mm256_cvtepi32_ps(shift_right<begin>(words));
        } else {
            return _mm256_cvtepi32_ps(masked<((1u << bits) - 1) << begin>(words));
        }
    }

    OMNIQUANT_STEP Number load_x(const float *values) { return _mm256_load_ps(values); }

    OMNIQUANT_STEP Float dot(Number a, Number b) { return _mm256_mul_ps(a, b); }

    OMNIQUANT_STEP Float add_dot(Float sum, Number a, Number b) {
        return _mm256_fmadd_ps(a, b, sum);
    }

    OMNIQUANT_STEP Float fill(float value) { return _mm256_set1_ps(value); }

    OMNIQUANT_STEP Float load(const float *values) { return _mm256_load_ps(values); }

    OMNIQUANT_STEP Float load_unaligned(const float *values) { return _mm256_loadu_ps(values); }

    OMNIQUANT_STEP void store(float *values, Float vector) { _mm256_store_ps(values, vector); }

    OMNIQUANT_STEP Float product(Float a, Float b) { return _mm256_mul_ps(a, b); }

    OMNIQUANT_STEP Float add_product(Float sum, Float a, Float b) {
        return _mm256_fmadd_ps(a, b, sum);
    }

    OMNIQUANT_STEP Float subtract_product(Float sum, Float a, Float b) {
        return _mm256_fnmadd_ps(a, b, sum);
    }

    OMNIQUANT_STEP Float permute(Float values, const int32_t *indices) {
        return _mm256_permutevar8x32_ps(
            values, _mm256_load_si256(reinterpret_cast<const __m256i *>(indices)));
    }

    // Every value stands in `times` lanes.
    template <int times>
    OMNIQUANT_STEP Float spread(const float *values) {
        if constexpr (times == lanes) {
            return _mm256_broadcast_ss(values);
        } else {
            constexpr int shift = times == 2 ? 1 : 2;
            const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
            return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(values)),
                                            _mm256_srli_epi32(lane, shift));
        }
    }

    OMNIQUANT_STEP float total(Float values) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
};

}  // namespace

OMNIQUANT_TARGET void packed_rows_avx2(const PackedProduct &product, float *scratch, int64_t begin,
                                       int64_t end) {
    multiply_any<Avx2>(product, scratch, begin, end);
}

}  // namespace omniquant
#endif

// The packed product in 256-bit vectors.
#include "packed_linear.h"

#if defined(OMNIQUANT_X86)
#include <immintrin.h>

#define OMNIQUANT_TARGET __attribute__((target("avx2,fma,f16c")))
#include "packed_rows.h"

namespace omniquant {
namespace {

struct Avx2 : Vectors<Avx2, 8> {
    static constexpr int kRows = 4;    // of the weight at once
    static constexpr int kTokens = 2;  // at once

    OMNIQUANT_STEP Int widen(Halves halves) {
        return reinterpret_cast<Int>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
    }

    OMNIQUANT_STEP Int widen(Bytes bytes) { return __builtin_convertvector(bytes, Int); }

    OMNIQUANT_STEP Float widen_float16(Halves halves) {
        return _mm256_cvtph_ps(reinterpret_cast<__m128i>(halves));
    }

    OMNIQUANT_STEP Float add_product(Float sum, Float a, Float b) {
        return _mm256_fmadd_ps(a, b, sum);
    }

    OMNIQUANT_STEP Float subtract_product(Float sum, Float a, Float b) {
        return _mm256_fnmadd_ps(a, b, sum);
    }

    // Lane i of the result is lane indices[i] of the values.
    OMNIQUANT_STEP Float permute(Float values, const int32_t *indices) {
        return _mm256_permutevar8x32_ps(
            values, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(indices)));
    }

    // Lane i of the result is value i / kTimes.
    template <int kTimes>
    OMNIQUANT_STEP Float spread(const float *values) {
        if constexpr (kTimes == kLanes) {
            return _mm256_broadcast_ss(values);
        } else {
            constexpr int kShift = kTimes == 2 ? 1 : 2;
            const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
            return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(values)),
                                            _mm256_srli_epi32(lane, kShift));
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

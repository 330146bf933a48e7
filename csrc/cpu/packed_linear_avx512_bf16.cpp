// The packed product of bfloat16 rows in 512-bit vectors: one instruction multiplies 32 pairs and
// adds in float32. A code is put into the last bits of the bfloat16 number 128, which makes 128 +
// code.
#include "packed_linear.h"

#if defined(OMNIQUANT_X86)
#define OMNIQUANT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma,f16c")))
#include "avx512.h"

namespace omniquant {
namespace {

struct Avx512Bf16 : Avx512 {
    using Number = __m512bh;
    static constexpr int kRows = 3;  // of the weight: with 4 tokens, what the registers hold
    static constexpr int kPaired = 2;
    static constexpr int kOffset = 128;

    template <int kBits, int kSpacing, int kIndex>
    OMNIQUANT_STEP Number number(Int words) {
        constexpr int32_t kMask = ((1 << kBits) - 1) * 0x00010001;
        constexpr int32_t kNumbers = 0x43004300;
        return reinterpret_cast<Number>(_mm512_ternarylogic_epi32(
            reinterpret_cast<__m512i>(words >> kIndex * kSpacing), _mm512_set1_epi32(kMask),
            _mm512_set1_epi32(kNumbers), 0xEA));  // (words & kMask) | kNumbers
    }

    OMNIQUANT_STEP Number load_x(const float *values) {
        return reinterpret_cast<Number>(_mm512_load_si512(values));
    }

    OMNIQUANT_STEP Float dot(Number a, Number b) { return add_dot(fill(0.0f), a, b); }

    OMNIQUANT_STEP Float add_dot(Float sum, Number a, Number b) {
        return _mm512_dpbf16_ps(sum, a, b);
    }
};

}  // namespace

OMNIQUANT_TARGET void packed_rows_avx512_bf16(const PackedProduct &product, float *scratch,
                                              int64_t begin, int64_t end) {
    multiply_any<Avx512Bf16>(product, scratch, begin, end);
}

}  // namespace omniquant
#endif

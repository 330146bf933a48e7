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
    static constexpr int rows =
        3;  // with two times as many sums of 4 rows of x, what registers hold
    static constexpr int paired = 2;
    static constexpr int offset = 128;

    template <int bits, int spacing, int index>
    OMNIQUANT_STEP Number number(Int words) {
        constexpr int32_t mask = ((1 << bits) - 1) * 0x00010001;
        constexpr int32_t numbers = 0x43004300;
        const Int low = index == 0 ? words : shift_right<index * spacing>(words);
        return reinterpret_cast<Number>(_mm512_ternarylogic_epi32(
            low, _mm512_set1_epi32(mask), _mm512_set1_epi32(numbers), 0xEA));  // (low & mask) | it
    }

    OMNIQUANT_STEP Number load_x(const float *values) {
        return reinterpret_cast<Number>(_mm512_load_si512(values));
    }

    OMNIQUANT_STEP Float sum(Float a, Float b) { return _mm512_add_ps(a, b); }

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

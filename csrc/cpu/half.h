// Converts half precision by its bits, for every instruction set.
#ifndef OMNIQUANT_HALF_H
#define OMNIQUANT_HALF_H

#include <cstdint>

#include "float_bits.h"
#include "inline.h"
#include "omniquant.h"

namespace omniquant {

// A product rebases the exponent, which makes subnormals normal; infinity and NaN follow.
OMNIQUANT_INLINE float float_of_float16(uint16_t half) {
    const uint32_t magnitude = (half & 0x7FFFu) << 13;
    const uint32_t rebased = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    const uint32_t finite = magnitude < 0x0F800000u ? rebased : magnitude | 0x7F800000u;
    return float_of_bits(finite | (half & 0x8000u) << 16);
}

OMNIQUANT_INLINE float float_of_bfloat16(uint16_t half) {
    return float_of_bits(static_cast<uint32_t>(half) << 16);
}

// Rounds half to even: a large number whose last bit is the half's last bit is added and taken off.
inline uint16_t float16_of_float(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) {
        return static_cast<uint16_t>(sign | 0x7E00u);
    }
    if (magnitude >= 0x477FF000u) {  // rounds to 2^16 or more
        return static_cast<uint16_t>(sign | 0x7C00u);
    }
    if (magnitude < 0x38800000u) {  // below 2^-14: multiples of 2^-24
        const uint32_t rounded = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000u;
        return static_cast<uint16_t>(sign | rounded);
    }
    const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

inline uint16_t bfloat16_of_float(float value) {
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
        return static_cast<uint16_t>(bits >> 16 | 0x40u);
    }
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Element `index` of an array of an element type in omniquant.h.
OMNIQUANT_INLINE float load_element(const void *values, int32_t dtype, int64_t index) {
    if (dtype == OMNIQUANT_FLOAT32) {
        return static_cast<const float *>(values)[index];
    }
    const uint16_t half = static_cast<const uint16_t *>(values)[index];
    return dtype == OMNIQUANT_FLOAT16 ? float_of_float16(half) : float_of_bfloat16(half);
}

inline void store_element(void *values, int32_t dtype, int64_t index, float value) {
    if (dtype == OMNIQUANT_FLOAT32) {
        static_cast<float *>(values)[index] = value;
    } else {
        static_cast<uint16_t *>(values)[index] =
            dtype == OMNIQUANT_FLOAT16 ? float16_of_float(value) : bfloat16_of_float(value);
    }
}

}  // namespace omniquant

#endif

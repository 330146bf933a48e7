// binary16 as bits, converted by arithmetic.
#ifndef EMULATION_CUDA_FP16_H
#define EMULATION_CUDA_FP16_H

#include <cmath>
#include <cstdint>

struct __half {
    uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) {
    return {bits};
}

inline float __half2float(__half half) {
    const int exponent = half.bits >> 10 & 31;
    const int mantissa = half.bits & 1023;
    float value = 0.0f;
    if (exponent == 31) {
        value = mantissa == 0 ? INFINITY : NAN;
    } else {
        value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
    }
    return half.bits >> 15 != 0 ? -value : value;
}

// Half to even, by the host's rounding of the value in units of its last place.
inline __half __float2half_rn(float value) {
    const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
    const float size = std::fabs(value);
    if (std::isnan(value)) {
        return {0x7fff};
    }
    if (size >= 65520.0f) {
        return {static_cast<uint16_t>(sign | 0x7c00)};
    }
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return {static_cast<uint16_t>(sign | (steps + ((exponent + 14) << 10)))};
}

#endif

// Packed codes and activations as operands of the matrix instructions: registers of two 16-bit
// floating-point numbers. Integer arithmetic alone, so that a host can run all of it.
//
// Codes. Two codes stand 16 bits apart in a register. A field of a few bits is masked out of it and
// becomes mantissa bits of a number whose exponent makes a step of the code 1: the number is code +
// 2^n where the field begins n bits below the mantissa's top. No conversion, no subtraction: the
// product takes the known offsets off its sums. The higher the field the smaller the offset; where
// fields may stand lower, several codes share one shift.
//
// A lane holds kLaneCodes consecutive columns of a row. Its register j holds those of the columns
// first(j) and first(j) + kStride.
#ifndef OMNIQUANT_FRAGMENTS_H
#define OMNIQUANT_FRAGMENTS_H

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace omniquant {

constexpr int kLaneCodes = 16;
constexpr int kLanePairs = kLaneCodes / 2;

struct Float16 {
    static constexpr int kMantissa = 10;
    static constexpr int kBias = 15;
};

struct Bfloat16 {
    static constexpr int kMantissa = 7;
    static constexpr int kBias = 127;
};

OMNIQUANT_INLINE constexpr uint32_t twice(uint32_t half) {
    return half << 16 | half;
}

OMNIQUANT_INLINE constexpr uint32_t shifted(uint32_t word, int left) {
    return left >= 0 ? word << left : word >> -left;
}

// One instruction on the device, which the compiler does not find by itself.
OMNIQUANT_INLINE uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t ones) {
#if defined(__CUDA_ARCH__)
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(ones));
    return result;
#else
    return (word & mask) | ones;
#endif
}

// 2^exponent, in both halves.
template <typename Format>
OMNIQUANT_INLINE constexpr uint32_t powers_of_two(int exponent) {
    return twice(static_cast<uint32_t>(Format::kBias + exponent) << Format::kMantissa);
}

// The fields [from, from + width) of both halves as numbers: 2^unit * (2^below_top + field). They
// come to stand `below_top` bits below the top of the mantissa.
template <typename Format>
OMNIQUANT_INLINE uint32_t numbers(uint32_t word, int from, int below_top, int width, int unit = 0) {
    const int position = Format::kMantissa - below_top;
    const uint32_t mask = twice(((1u << width) - 1) << position);
    return masked_or(shifted(word, position - from), mask, powers_of_two<Format>(below_top + unit));
}

OMNIQUANT_INLINE constexpr uint32_t select_bits(uint32_t mask, uint32_t ones, uint32_t zeros) {
    return (ones & mask) | (zeros & ~mask);
}

// The codes of a lane. kWords: 32-bit words of its widest plane; kTiles: operands that are added;
// offset(j): what operand j holds besides the codes. kFine: no offset is above 2^kBits, for
// products as good as float32.
template <int kBits, typename Format, bool kFine>
struct Codes;

template <typename Format, bool kFine>
struct Codes<2, Format, kFine> {
    static constexpr int kWords = 1;
    static constexpr int kTiles = 1;
    static constexpr int kStride = 8;

    OMNIQUANT_INLINE static constexpr int first(int j) { return j; }

    // Two neighbours share a shift.
    OMNIQUANT_INLINE static constexpr int below_top(int j) { return kFine || j % 2 == 1 ? 2 : 4; }

    OMNIQUANT_INLINE static constexpr uint32_t offset(int j) {
        return powers_of_two<Format>(below_top(j));
    }

    OMNIQUANT_INLINE static void decode(const uint32_t (&words)[kWords], uint32_t,
                                        uint32_t (&pairs)[kTiles][kLanePairs]) {
        for (int j = 0; j < kLanePairs; ++j) {
            pairs[0][j] = numbers<Format>(words[0], 2 * first(j), below_top(j), 2);
        }
    }
};

// Code and upper bit are brought together in fields of four bits, even codes in one register, odd
// ones in another.
template <typename Format, bool kFine>
struct Codes<3, Format, kFine> {
    static constexpr int kWords = 1;
    static constexpr int kTiles = 1;
    static constexpr int kStride = 8;

    // 0 2, 1 3, 4 6, 5 7: two that share a shift follow each other.
    OMNIQUANT_INLINE static constexpr int first(int j) { return j / 4 * 4 + j % 2 * 2 + j / 2 % 2; }

    OMNIQUANT_INLINE static constexpr int below_top(int j) { return kFine || j % 2 == 1 ? 3 : 7; }

    OMNIQUANT_INLINE static constexpr uint32_t offset(int j) {
        return powers_of_two<Format>(below_top(j));
    }

    // upper: bit i belongs to code i.
    OMNIQUANT_INLINE static void decode(const uint32_t (&words)[kWords], uint32_t upper,
                                        uint32_t (&pairs)[kTiles][kLanePairs]) {
        const uint32_t halves = (upper & 0xffu) | (upper & 0xff00u) << 8;        // 8 bits in each
        const uint32_t fours = select_bits(twice(0x000f), halves, halves << 4);  // 4 in each byte
        const uint32_t even_upper = select_bits(twice(0x0f0f), fours << 2, fours << 4);
        const uint32_t odd_upper = select_bits(twice(0x0f0f), fours << 1, fours << 3);
        const uint32_t even = select_bits(twice(0x3333), words[0], even_upper);
        const uint32_t odd = select_bits(twice(0x3333), words[0] >> 2, odd_upper);
        for (int j = 0; j < kLanePairs; ++j) {
            const int code = first(j);
            pairs[0][j] =
                numbers<Format>(code % 2 == 0 ? even : odd, code / 2 * 4, below_top(j), 3);
        }
    }
};

template <typename Format, bool kFine>
struct Codes<4, Format, kFine> {
    static constexpr int kWords = 2;
    static constexpr int kTiles = 1;
    static constexpr int kStride = 4;

    OMNIQUANT_INLINE static constexpr int first(int j) { return j / 4 * 8 + j % 4; }

    OMNIQUANT_INLINE static constexpr uint32_t offset(int) { return powers_of_two<Format>(4); }

    OMNIQUANT_INLINE static void decode(const uint32_t (&words)[kWords], uint32_t,
                                        uint32_t (&pairs)[kTiles][kLanePairs]) {
        for (int j = 0; j < kLanePairs; ++j) {
            pairs[0][j] = numbers<Format>(words[j / 4], j % 4 * 4, 4, 4);
        }
    }
};

template <bool kFine>
struct Codes<8, Float16, kFine> {
    static constexpr int kWords = 4;
    static constexpr int kTiles = 1;
    static constexpr int kStride = 2;

    OMNIQUANT_INLINE static constexpr int first(int j) { return j / 2 * 4 + j % 2; }

    OMNIQUANT_INLINE static constexpr uint32_t offset(int) { return powers_of_two<Float16>(8); }

    OMNIQUANT_INLINE static void decode(const uint32_t (&words)[kWords], uint32_t,
                                        uint32_t (&pairs)[kTiles][kLanePairs]) {
        for (int j = 0; j < kLanePairs; ++j) {
            pairs[0][j] = numbers<Float16>(words[j / 2], j % 2 * 8, 8, 8);
        }
    }
};

// Eight bits are more than the mantissa: code = low + 16 * high, in two operands.
template <bool kFine>
struct Codes<8, Bfloat16, kFine> {
    static constexpr int kWords = 4;
    static constexpr int kTiles = 2;
    static constexpr int kStride = 2;

    OMNIQUANT_INLINE static constexpr int first(int j) { return j / 2 * 4 + j % 2; }

    // 2^4 + 2^8
    OMNIQUANT_INLINE static constexpr uint32_t offset(int) {
        return powers_of_two<Bfloat16>(8) | twice(1u << (Bfloat16::kMantissa - 4));
    }

    OMNIQUANT_INLINE static void decode(const uint32_t (&words)[kWords], uint32_t,
                                        uint32_t (&pairs)[kTiles][kLanePairs]) {
        for (int j = 0; j < kLanePairs; ++j) {
            pairs[0][j] = numbers<Bfloat16>(words[j / 2], j % 2 * 8, 4, 4);
            pairs[1][j] = numbers<Bfloat16>(words[j / 2], j % 2 * 8 + 4, 4, 4, 4);
        }
    }
};

// Activations. The register of the columns first and first + stride, of a lane's 16-bit numbers.
OMNIQUANT_INLINE uint32_t pair_of(const uint32_t (&x)[kLanePairs], int first, int stride) {
    const uint32_t low = x[first / 2];
    const uint32_t high = x[(first + stride) / 2];
    return first % 2 == 0 ? (low & 0xffffu) | high << 16 : low >> 16 | (high & 0xffff0000u);
}

// A float32 as the sum of bfloat16 numbers, each in the upper half of its part: all 24 bits where it
// is above 2^-110. Truncated, not rounded, so that the largest numbers do not overflow.
constexpr int kFloatParts = 3;

OMNIQUANT_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

OMNIQUANT_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

OMNIQUANT_INLINE void split(uint32_t bits, uint32_t (&parts)[kFloatParts]) {
    constexpr uint32_t kUpper = 0xffff0000u;
    constexpr uint32_t kInfinity = 0x7f800000u;
    constexpr uint32_t kQuiet = 0x00400000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    parts[0] = (bits & kUpper) | (magnitude > kInfinity ? kQuiet : 0u);  // NaN stays NaN
    float rest = magnitude >= kInfinity ? 0.0f : float_of(bits) - float_of(parts[0]);
    for (int i = 1; i < kFloatParts; ++i) {
        parts[i] = bits_of(rest) & kUpper;
        rest -= float_of(parts[i]);
    }
}

}  // namespace omniquant

#endif

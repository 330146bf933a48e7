// Packed codes and activations as operands of the matrix instructions: registers of two 16-bit
// floating-point numbers. Integer arithmetic alone, so that a host can run all of it.
//
// Codes. Two codes stand 16 bits apart in a register. A mask takes a field of a few bits out of it,
// which becomes mantissa bits of a number whose exponent makes a step of the code 1: the number is
// code + 2^n where the field begins n bits below the mantissa's top. No conversion, no subtraction:
// the product takes the known offsets off its sums. The higher the field, the smaller the offset;
// where fields may stand lower, several codes share one shift.
//
// A lane holds kLaneCodes consecutive columns of a row. Its register j holds those of the columns
// first(j) and first(j) + kStride.
#ifndef OMNIQUANT_FRAGMENTS_H
#define OMNIQUANT_FRAGMENTS_H

#include <cstdint>

#include "float_bits.h"
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

// Single instructions on the device, which the compiler does not always find by itself.
OMNIQUANT_INLINE uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t ones) {
#if defined(__CUDA_ARCH__)
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(ones));
    return result;
#else
    return (word & mask) | ones;
#endif
}

OMNIQUANT_INLINE uint32_t select_bits(uint32_t mask, uint32_t where_one, uint32_t where_zero) {
#if defined(__CUDA_ARCH__)
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xe2;"
        : "=r"(result)
        : "r"(where_one), "r"(mask), "r"(where_zero));
    return result;
#else
    return (where_one & mask) | (where_zero & ~mask);
#endif
}

// The lower or the upper halves of both.
OMNIQUANT_INLINE uint32_t lower_halves(uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(low, high, 0x5410);
#else
    return (low & 0xffffu) | high << 16;
#endif
}

OMNIQUANT_INLINE uint32_t upper_halves(uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(low, high, 0x7632);
#else
    return low >> 16 | (high & 0xffff0000u);
#endif
}

// The lower two bytes, one in each half.
OMNIQUANT_INLINE uint32_t bytes_apart(uint32_t word) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(word, 0, 0x4140);
#else
    return (word & 0xffu) | (word & 0xff00u) << 8;
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

// The codes of a lane. kWords: 32-bit words of its widest plane; kTiles: operands that are added;
// offset(j): what the operands of register j hold besides the codes. It repeats every two
// registers. kFine: no offset is above 2^kBits, for products as good as float32.
template <int kBits, typename Format, bool kFine>
class Codes;

template <typename Format, bool kFine>
class Codes<2, Format, kFine> {
  public:
    static constexpr int kWords = 1;
    static constexpr int kTiles = 1;
    static constexpr int kStride = 8;

    OMNIQUANT_INLINE static constexpr int first(int j) { return j; }

    OMNIQUANT_INLINE static constexpr uint32_t offset(int j) {
        return powers_of_two<Format>(below_top(j));
    }

    Codes() = default;

    OMNIQUANT_INLINE Codes(const uint32_t (&words)[kWords], uint32_t) : word_(words[0]) {}

    OMNIQUANT_INLINE uint32_t operand(int, int j) const {
        return numbers<Format>(word_, 2 * j, below_top(j), 2);
    }

  private:
    // Two neighbours share a shift.
    OMNIQUANT_INLINE static constexpr int below_top(int j) { return kFine || j % 2 == 1 ? 2 : 4; }

    uint32_t word_;
};

// Code and upper bit are brought together in fields of four bits, even codes in one register, odd
// ones in another.
template <typename Format, bool kFine>
class Codes<3, Format, kFine> {
  public:
    static constexpr int kWords = 1;
    static constexpr int kTiles = 1;
    static constexpr int kStride = 8;

    // 0 2, 1 3, 4 6, 5 7: two that share a shift follow each other.
    OMNIQUANT_INLINE static constexpr int first(int j) { return j / 4 * 4 + j % 2 * 2 + j / 2 % 2; }

    OMNIQUANT_INLINE static constexpr uint32_t offset(int j) {
        return powers_of_two<Format>(below_top(j));
    }

    Codes() = default;

    // upper: bit i belongs to code i.
    OMNIQUANT_INLINE Codes(const uint32_t (&words)[kWords], uint32_t upper) {
        const uint32_t eights = bytes_apart(upper);                      // a half has 8 bits
        const uint32_t fours = (eights | eights << 4) & twice(0x0f0f);   // a byte has 4 bits
        const uint32_t even_upper = (fours & twice(0x0505)) * (4 + 16);  // 0 to 2 and 2 to 6;
        const uint32_t odd_upper = (fours & twice(0x0a0a)) * (2 + 8);    // 1 to 2 and 3 to 6;
        even_ = select_bits(twice(0x3333), words[0], even_upper);        // what comes to 4 and 5
        odd_ = select_bits(twice(0x3333), words[0] >> 2, odd_upper);     // is not selected
    }

    OMNIQUANT_INLINE uint32_t operand(int, int j) const {
        const int code = first(j);
        return numbers<Format>(code % 2 == 0 ? even_ : odd_, code / 2 * 4, below_top(j), 3);
    }

  private:
    OMNIQUANT_INLINE static constexpr int below_top(int j) { return kFine || j % 2 == 1 ? 3 : 7; }

    uint32_t even_;
    uint32_t odd_;
};

template <typename Format, bool kFine>
class Codes<4, Format, kFine> {
  public:
    static constexpr int kWords = 2;
    static constexpr int kTiles = 1;
    static constexpr int kStride = 4;

    OMNIQUANT_INLINE static constexpr int first(int j) { return j / 4 * 8 + j % 4; }

    OMNIQUANT_INLINE static constexpr uint32_t offset(int) { return powers_of_two<Format>(4); }

    Codes() = default;

    OMNIQUANT_INLINE Codes(const uint32_t (&words)[kWords], uint32_t)
        : words_{words[0], words[1]} {}

    OMNIQUANT_INLINE uint32_t operand(int, int j) const {
        return numbers<Format>(words_[j / 4], j % 4 * 4, 4, 4);
    }

  private:
    uint32_t words_[kWords];
};

// Eight bits are more than bfloat16's mantissa: there a code is low + 16 * high, in two operands.
template <typename Format, bool kFine>
class Codes<8, Format, kFine> {
    static constexpr bool kIsWhole = Format::kMantissa >= 8;

  public:
    static constexpr int kWords = 4;
    static constexpr int kTiles = kIsWhole ? 1 : 2;
    static constexpr int kStride = 2;

    OMNIQUANT_INLINE static constexpr int first(int j) { return j / 2 * 4 + j % 2; }

    // 2^8, or 2^8 + 2^4
    OMNIQUANT_INLINE static constexpr uint32_t offset(int) {
        return powers_of_two<Format>(8) | (kIsWhole ? 0u : twice(1u << (Format::kMantissa - 4)));
    }

    Codes() = default;

    OMNIQUANT_INLINE Codes(const uint32_t (&words)[kWords], uint32_t)
        : words_{words[0], words[1], words[2], words[3]} {}

    OMNIQUANT_INLINE uint32_t operand(int tile, int j) const {
        const int from = j % 2 * 8;
        if constexpr (kIsWhole) {
            return numbers<Format>(words_[j / 2], from, 8, 8);
        } else {
            return numbers<Format>(words_[j / 2], from + 4 * tile, 4, 4, 4 * tile);
        }
    }

  private:
    uint32_t words_[kWords];
};

// Activations. The register of the columns first and first + stride, of a lane's 16-bit numbers.
OMNIQUANT_INLINE uint32_t pair_of(const uint32_t (&x)[kLanePairs], int first, int stride) {
    const uint32_t low = x[first / 2];
    const uint32_t high = x[(first + stride) / 2];
    return first % 2 == 0 ? lower_halves(low, high) : upper_halves(low, high);
}

// A float32 as the sum of bfloat16 numbers, each in the upper half of its part: all 24 bits where
// it is above 2^-110. Truncated, not rounded, so that the largest numbers do not overflow.
constexpr int kFloatParts = 3;

OMNIQUANT_INLINE void split(uint32_t bits, uint32_t (&parts)[kFloatParts]) {
    constexpr uint32_t kUpper = 0xffff0000u;
    constexpr uint32_t kInfinity = 0x7f800000u;
    constexpr uint32_t kQuiet = 0x00400000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    parts[0] = (bits & kUpper) | (magnitude > kInfinity ? kQuiet : 0u);  // NaN stays NaN
    float rest = magnitude >= kInfinity ? 0.0f : float_of_bits(bits) - float_of_bits(parts[0]);
    for (int i = 1; i < kFloatParts; ++i) {
        parts[i] = bits_of_float(rest) & kUpper;
        rest -= float_of_bits(parts[i]);
    }
}

}  // namespace omniquant

#endif

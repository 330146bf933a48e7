// Eight codes at once: as the bytes of a 64-bit number, and as a run of 8 * bits bits. The run of
// any width begins and ends at a byte, so every layout is made of such runs.
#ifndef OMNIQUANT_BITS8_H
#define OMNIQUANT_BITS8_H

#include <cstdint>
#include <cstring>

#include "multiversion.h"

#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as bytes");
#endif

namespace omniquant {

// `low` one-bits at the bottom of every field of `field` bits.
constexpr uint64_t field_mask(int low, int field) {
    uint64_t mask = 0;
    for (int begin = 0; begin < 64; begin += field) {
        mask |= ((uint64_t{1} << low) - 1) << begin;
    }
    return mask;
}

// A run becomes bytes: halves move apart to fields of 32 bits, then of 16, then of 8.
template <int bits>
OMNIQUANT_ALWAYS_INLINE uint64_t spread(uint64_t run) {
    if constexpr (bits < 8) {
        constexpr uint64_t low4 = field_mask(4 * bits, 64);
        constexpr uint64_t low2 = field_mask(2 * bits, 32);
        constexpr uint64_t low1 = field_mask(bits, 16);
        run = (run & low4) | (run << (32 - 4 * bits) & low4 << 32);
        run = (run & low2) | (run << (16 - 2 * bits) & low2 << 16);
        run = (run & low1) | (run << (8 - bits) & low1 << 8);
    }
    return run;
}

// Bytes become a run; what a byte holds above its code is dropped.
template <int bits>
OMNIQUANT_ALWAYS_INLINE uint64_t gather(uint64_t codes) {
    if constexpr (bits < 8) {
        constexpr uint64_t low1 = field_mask(bits, 16);
        constexpr uint64_t low2 = field_mask(2 * bits, 32);
        constexpr uint64_t low4 = field_mask(4 * bits, 64);
        codes = (codes & low1) | (codes >> (8 - bits) & low1 << bits);
        codes = (codes & low2) | (codes >> (16 - 2 * bits) & low2 << 2 * bits);
        codes = (codes & low4) | (codes >> (32 - 4 * bits) & low4 << 4 * bits);
    }
    return codes;
}

template <int bytes>
struct Unsigned;
template <>
struct Unsigned<1> {
    using Type = uint8_t;
};
template <>
struct Unsigned<2> {
    using Type = uint16_t;
};
template <>
struct Unsigned<4> {
    using Type = uint32_t;
};
template <>
struct Unsigned<8> {
    using Type = uint64_t;
};

template <int bytes>
OMNIQUANT_ALWAYS_INLINE uint64_t load_bytes(const uint8_t *from) {
    typename Unsigned<bytes>::Type value;
    std::memcpy(&value, from, bytes);
    return value;
}

template <int bytes>
OMNIQUANT_ALWAYS_INLINE void store_bytes(uint8_t *to, uint64_t value) {
    const auto low = static_cast<typename Unsigned<bytes>::Type>(value);
    std::memcpy(to, &low, bytes);
}

}  // namespace omniquant

#endif

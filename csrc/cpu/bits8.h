// Eight codes at once: as the bytes of a 64-bit number, and as a run of 8 * bits bits. A run of any
// width begins and ends at a byte, so every layout consists of such runs.
#ifndef OMNIQUANT_BITS8_H
#define OMNIQUANT_BITS8_H

#include <cstdint>
#include <cstring>

#include "inline.h"

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
template <int kBits>
OMNIQUANT_INLINE uint64_t spread(uint64_t run) {
    if constexpr (kBits < 8) {
        constexpr uint64_t kLow4 = field_mask(4 * kBits, 64);
        constexpr uint64_t kLow2 = field_mask(2 * kBits, 32);
        constexpr uint64_t kLow1 = field_mask(kBits, 16);
        run = (run & kLow4) | (run << (32 - 4 * kBits) & kLow4 << 32);
        run = (run & kLow2) | (run << (16 - 2 * kBits) & kLow2 << 16);
        run = (run & kLow1) | (run << (8 - kBits) & kLow1 << 8);
    }
    return run;
}

// Bytes become a run; bits above the code are dropped.
template <int kBits>
OMNIQUANT_INLINE uint64_t gather(uint64_t codes) {
    if constexpr (kBits < 8) {
        constexpr uint64_t kLow1 = field_mask(kBits, 16);
        constexpr uint64_t kLow2 = field_mask(2 * kBits, 32);
        constexpr uint64_t kLow4 = field_mask(4 * kBits, 64);
        codes = (codes & kLow1) | (codes >> (8 - kBits) & kLow1 << kBits);
        codes = (codes & kLow2) | (codes >> (16 - 2 * kBits) & kLow2 << 2 * kBits);
        codes = (codes & kLow4) | (codes >> (32 - 4 * kBits) & kLow4 << 4 * kBits);
    }
    return codes;
}

template <int kBytes>
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

template <int kBytes>
OMNIQUANT_INLINE uint64_t load_bytes(const uint8_t *from) {
    typename Unsigned<kBytes>::Type value;
    std::memcpy(&value, from, kBytes);
    return value;
}

template <int kBytes>
OMNIQUANT_INLINE void store_bytes(uint8_t *to, uint64_t value) {
    const auto low = static_cast<typename Unsigned<kBytes>::Type>(value);
    std::memcpy(to, &low, kBytes);
}

}  // namespace omniquant

#endif

// One word of a packed row, and one code of it: the layouts as omniquant.h describes them.
#ifndef OMNIQUANT_LAYOUTS_H
#define OMNIQUANT_LAYOUTS_H

#include <cstdint>

#include "ceil_divide.h"
#include "inline.h"
#include "omniquant.h"

namespace omniquant {

constexpr int kWordBits = 32;

OMNIQUANT_INLINE uint32_t low_bits(int count) {
    return (uint32_t{1} << count) - 1;
}

OMNIQUANT_INLINE uint32_t padded_columns(uint32_t columns) {
    return round_up<uint32_t>(columns, kWordBits);
}

// Bits [begin, begin + width) of a stream of words, width at most 8.
OMNIQUANT_INLINE uint32_t stream_bits(const uint32_t *words, uint32_t begin, int width) {
    const uint32_t *word = words + begin / kWordBits;
    const int shift = static_cast<int>(begin % kWordBits);
    uint32_t value = word[0] >> shift;
    if (shift + width > kWordBits) {
        value |= word[1] << (kWordBits - shift);
    }
    return value & low_bits(width);
}

// Code i of a row.
OMNIQUANT_INLINE uint32_t unpack_code(const uint32_t *words, uint32_t columns, uint32_t i, int bits,
                                      int layout) {
    if (layout == OMNIQUANT_STREAM) {
        return stream_bits(words, i * bits, bits);
    }
    if (layout == OMNIQUANT_WORDS) {
        const uint32_t each = kWordBits / bits;
        return stream_bits(words + i / each, i % each * bits, bits);
    }
    const uint32_t padded = padded_columns(columns);
    uint32_t code = 0;
    int low = 0;  // the plane's lowest bit of the code
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) != 0) {
            code |= stream_bits(words, padded * low + i * width, width) << low;
            low += width;
        }
    }
    return code;
}

// The `width` bits from `low` on of each code, as word `word` of a stream.
OMNIQUANT_INLINE uint32_t stream_word(const uint8_t *codes, uint32_t columns, uint32_t word,
                                      int low, int width) {
    const uint32_t begin = word * kWordBits;
    uint32_t value = 0;
    for (uint32_t i = begin / width; i < columns && i * width < begin + kWordBits; ++i) {
        const uint32_t code = codes[i] >> low & low_bits(width);
        const uint32_t bit = i * width;
        value |= bit < begin ? code >> (begin - bit) : code << (bit - begin);
    }
    return value;
}

// Word `word` of a row; what a code holds above its bits is dropped.
OMNIQUANT_INLINE uint32_t pack_word(const uint8_t *codes, uint32_t columns, uint32_t word, int bits,
                                    int layout) {
    if (layout == OMNIQUANT_STREAM) {
        return stream_word(codes, columns, word, 0, bits);
    }
    if (layout == OMNIQUANT_WORDS) {
        const uint32_t each = kWordBits / bits;
        const uint32_t begin = word * each;
        const uint32_t rest = columns - begin;
        return stream_word(codes + begin, rest < each ? rest : each, 0, 0, bits);
    }
    const uint32_t words_per_bit = padded_columns(columns) / kWordBits;
    int low = 0;
    int width = 8;
    while ((bits & width) == 0 || word >= words_per_bit * (low + width)) {
        low += bits & width;
        width /= 2;
    }
    return stream_word(codes, columns, word - words_per_bit * low, low, width);
}

}  // namespace omniquant

#endif

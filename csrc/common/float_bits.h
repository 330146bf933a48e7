// The bits of a float32, on host and device.
#ifndef OMNIQUANT_FLOAT_BITS_H
#define OMNIQUANT_FLOAT_BITS_H

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace omniquant {

OMNIQUANT_INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

OMNIQUANT_INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

}  // namespace omniquant

#endif

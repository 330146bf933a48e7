// Division of counts, rounded up.
#ifndef OMNIQUANT_CEIL_DIVIDE_H
#define OMNIQUANT_CEIL_DIVIDE_H

#include "inline.h"

namespace omniquant {

template <typename T>
OMNIQUANT_INLINE constexpr T ceil_divide(T count, T size) {
    return (count + size - 1) / size;
}

// The next multiple of `size`.
template <typename T>
OMNIQUANT_INLINE constexpr T round_up(T count, T size) {
    return ceil_divide(count, size) * size;
}

}  // namespace omniquant

#endif

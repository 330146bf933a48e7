// The packed product in 512-bit vectors.
#include "packed_linear.h"

#if defined(OMNIQUANT_X86)
#define OMNIQUANT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma,f16c")))
#include "avx512.h"

namespace omniquant {

OMNIQUANT_TARGET void packed_rows_avx512(const PackedProduct &product, float *scratch,
                                         int64_t begin, int64_t end) {
    multiply_any<Avx512>(product, scratch, begin, end);
}

}  // namespace omniquant
#endif

// Packs and unpacks codes on the device: a block takes a row, a thread a word or four codes.
#include <cstdint>

#include "launch.cuh"
#include "layouts.h"
#include "omniquant.h"

namespace omniquant {
namespace {

constexpr unsigned kBlockThreads = 256;
constexpr uint32_t kRun = 4;  // codes a thread unpacks: one 32-bit store where they are aligned

struct Rows {
    uint8_t *codes;
    uint32_t *words;
    uint32_t columns;
    uint32_t words_per_row;
};

template <int kBits, int kLayout>
__global__ void pack_kernel(const Rows rows) {
    const uint8_t *codes = rows.codes + static_cast<int64_t>(blockIdx.x) * rows.columns;
    uint32_t *words = rows.words + static_cast<int64_t>(blockIdx.x) * rows.words_per_row;
    for (uint32_t word = threadIdx.x; word < rows.words_per_row; word += blockDim.x) {
        words[word] = pack_word(codes, rows.columns, word, kBits, kLayout);
    }
}

template <int kBits, int kLayout>
__global__ void unpack_kernel(const Rows rows) {
    uint8_t *codes = rows.codes + static_cast<int64_t>(blockIdx.x) * rows.columns;
    const uint32_t *words = rows.words + static_cast<int64_t>(blockIdx.x) * rows.words_per_row;
    const bool is_aligned = reinterpret_cast<uintptr_t>(codes) % kRun == 0;
    for (uint32_t begin = threadIdx.x * kRun; begin < rows.columns; begin += blockDim.x * kRun) {
        if (is_aligned && begin + kRun <= rows.columns) {
            uint32_t run = 0;
            for (uint32_t k = 0; k < kRun; ++k) {
                run |= unpack_code(words, rows.columns, begin + k, kBits, kLayout) << (8 * k);
            }
            *reinterpret_cast<uint32_t *>(codes + begin) = run;
        } else {
            for (uint32_t i = begin; i < begin + kRun && i < rows.columns; ++i) {
                codes[i] =
                    static_cast<uint8_t>(unpack_code(words, rows.columns, i, kBits, kLayout));
            }
        }
    }
}

using Kernel = void (*)(Rows);

template <int kLayout>
Kernel kernel_of(int32_t bits, bool packs) {
    switch (bits) {
        case 1:
            return packs ? pack_kernel<1, kLayout> : unpack_kernel<1, kLayout>;
        case 2:
            return packs ? pack_kernel<2, kLayout> : unpack_kernel<2, kLayout>;
        case 3:
            return packs ? pack_kernel<3, kLayout> : unpack_kernel<3, kLayout>;
        case 4:
            return packs ? pack_kernel<4, kLayout> : unpack_kernel<4, kLayout>;
        case 5:
            return packs ? pack_kernel<5, kLayout> : unpack_kernel<5, kLayout>;
        case 6:
            return packs ? pack_kernel<6, kLayout> : unpack_kernel<6, kLayout>;
        case 7:
            return packs ? pack_kernel<7, kLayout> : unpack_kernel<7, kLayout>;
        case 8:
            return packs ? pack_kernel<8, kLayout> : unpack_kernel<8, kLayout>;
        default:
            return nullptr;
    }
}

Kernel kernel_of(int32_t bits, int32_t layout, bool packs) {
    switch (layout) {
        case OMNIQUANT_STREAM:
            return kernel_of<OMNIQUANT_STREAM>(bits, packs);
        case OMNIQUANT_WORDS:
            return kernel_of<OMNIQUANT_WORDS>(bits, packs);
        case OMNIQUANT_PLANES:
            return kernel_of<OMNIQUANT_PLANES>(bits, packs);
        default:
            return nullptr;
    }
}

int32_t run(uint8_t *codes, uint32_t *words, int64_t rows, int64_t columns, int64_t words_per_row,
            int32_t bits, int32_t layout, bool packs, void *stream) {
    constexpr int64_t kMaxRows = INT32_MAX;
    constexpr int64_t kMaxColumns = int64_t{1} << 28;  // a row's bits are counted in 32 bits
    const Kernel kernel = kernel_of(bits, layout, packs);
    if (kernel == nullptr || rows > kMaxRows || columns > kMaxColumns) {
        return static_cast<int32_t>(cudaErrorInvalidValue);
    }
    if (rows == 0 || columns == 0) {
        return 0;
    }
    const Rows matrix = {codes, words, static_cast<uint32_t>(columns),
                         static_cast<uint32_t>(words_per_row)};
    return launch(kernel, dim3(static_cast<unsigned>(rows)), kBlockThreads, 0, stream, matrix);
}

}  // namespace
}  // namespace omniquant

using namespace omniquant;

int32_t omniquant_cuda_pack(const uint8_t *codes, uint32_t *words, int64_t rows, int64_t columns,
                            int64_t words_per_row, int32_t bits, int32_t layout, void *stream) {
    return run(const_cast<uint8_t *>(codes), words, rows, columns, words_per_row, bits, layout,
               true, stream);
}

int32_t omniquant_cuda_unpack(const uint32_t *words, uint8_t *codes, int64_t rows, int64_t columns,
                              int64_t words_per_row, int32_t bits, int32_t layout, void *stream) {
    return run(codes, const_cast<uint32_t *>(words), rows, columns, words_per_row, bits, layout,
               false, stream);
}

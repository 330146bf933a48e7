// A warp's window on the packed weight: chunks of its rows, kStages of them in flight from device
// memory to shared memory. The warp fills and reads its own ring, so no warp waits for another.
//
// Per copy instruction a warp asks for 64 bytes of each of 8 rows (of the upper plane of 3 bit, 32
// bytes of 16 rows); the warps of a block take neighbouring chunks, so that together they read each
// row contiguously. The 16-byte pieces of a row are exchanged by a pattern of its number, which
// spreads what a warp reads at once over all banks.
#ifndef OMNIQUANT_WEIGHT_RING_CUH
#define OMNIQUANT_WEIGHT_RING_CUH

#include <cuda_runtime.h>

#include <cstdint>

#include "packed_plan.h"
#include "ptx.cuh"

namespace omniquant {

template <int kBits, int kRows>
class WeightRing {
  public:
    // words: the first of the block's rows, of which `rows` exist; slots: this warp's memory.
    __device__ __forceinline__ WeightRing(const uint32_t *words, int64_t words_per_row, int rows,
                                          bool is_aligned, int columns, uint32_t *slots, int lane)
        : words_(words),
          words_per_row_(static_cast<int>(words_per_row)),
          rows_(rows),
          columns_(columns),
          is_aligned_(is_aligned),
          slots_(slots),
          lane_(lane) {}

    // Starts the copies of a chunk, of none where it lies behind the row, and ends their group.
    __device__ __forceinline__ void fetch(int chunk, int slot) {
        fetch_plane<plane_bits(kBits)>(words_, slots_ + slot * kSlotWords, chunk);
        if constexpr (kUpperBits != 0) {
            const int lower_words = padded() / 32 * plane_bits(kBits);
            fetch_plane<kUpperBits>(words_ + lower_words, slots_ + slot * kSlotWords + kLowerWords,
                                    chunk);
        }
        commit_copies();
    }

    // The lane's codes of a unit, in the row of a tile that begins at `first` + lane / 4.
    template <int kWords>
    __device__ __forceinline__ void read(int slot, int first, int unit,
                                         uint32_t (&words)[kWords]) const {
        const uint32_t *row = slots_ + slot * kSlotWords + (first + lane_ / kQuad) * kChunkWords;
        const int word = (unit * kQuad + lane_ % kQuad) * kWords;
        const uint32_t *from = row + exchanged<kChunkWords>(lane_ / kQuad, word / 4) * 4 + word % 4;
        if constexpr (kWords == 4) {
            const uint4 four = *reinterpret_cast<const uint4 *>(from);
            words[0] = four.x;
            words[1] = four.y;
            words[2] = four.z;
            words[3] = four.w;
        } else if constexpr (kWords == 2) {
            const uint2 two = *reinterpret_cast<const uint2 *>(from);
            words[0] = two.x;
            words[1] = two.y;
        } else {
            words[0] = *from;
        }
    }

    // Their upper bits, where they stand in a plane of one bit.
    __device__ __forceinline__ uint32_t read_upper(int slot, int first, int unit) const {
        if constexpr (kUpperBits == 0) {
            return 0;
        } else {
            const uint32_t *row =
                slots_ + slot * kSlotWords + kLowerWords + (first + lane_ / kQuad) * kUpperWords;
            const int half = unit * kQuad + lane_ % kQuad;
            const uint32_t *from = row + exchanged<kUpperWords>(lane_ / kQuad, half / 8) * 4;
            return reinterpret_cast<const uint16_t *>(from)[half % 8];
        }
    }

  private:
    static constexpr int kUpperBits = kBits - plane_bits(kBits);
    static constexpr int kUpperWords = kUpperBits * kChunkWords / plane_bits(kBits);  // of a row
    static constexpr int kLowerWords = kRows * kChunkWords;
    static constexpr int kSlotWords = kRows * chunk_words(kBits);

    // Where the 16-byte piece of a row of a tile stands in its row.
    template <int kWords>
    __device__ __forceinline__ static int exchanged(int row, int piece) {
        if constexpr (kWords == kChunkWords) {
            return piece ^ ((row / 2 % 2) * 2 + row / 4 % 2);
        } else {
            return piece ^ (row / 4 % 2);
        }
    }

    __device__ __forceinline__ int padded() const { return ceil_divide(columns_, 32) * 32; }

    template <int kWidth>
    __device__ __forceinline__ void fetch_plane(const uint32_t *plane, uint32_t *slot, int chunk) {
        constexpr int kWords = kChunkWords * kWidth / plane_bits(kBits);
        constexpr int kPieces = kWords / 4;
        constexpr int kCopyRows = 32 / kPieces;
        const int piece = lane_ % kPieces;
        const int word = chunk * kWords + piece * 4;
        const int end = padded() / 32 * kWidth;
#pragma unroll
        for (int first = 0; first < kRows; first += kCopyRows) {
            const int row = first + lane_ / kPieces;
            const uint32_t *from = plane + (row < rows_ ? row : rows_ - 1) * words_per_row_ + word;
            uint32_t *to = slot + row * kWords + exchanged<kWords>(row % 8, piece) * 4;
            if (is_aligned_) {
                copy_16_async(to, word < end ? from : words_, word < end);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    copy_4_async(to + i, word + i < end ? from + i : words_, word + i < end);
                }
            }
        }
    }

    const uint32_t *words_;
    int words_per_row_;
    int rows_;
    int columns_;
    bool is_aligned_;
    uint32_t *slots_;
    int lane_;
};

}  // namespace omniquant

#endif

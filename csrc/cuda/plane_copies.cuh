// A warp's copies of one plane of the packed weight into shared memory, a chunk of its rows at a
// time.
#ifndef OMNIQUANT_PLANE_COPIES_CUH
#define OMNIQUANT_PLANE_COPIES_CUH

#include <cuda_runtime.h>

#include <cstdint>

#include "kept.cuh"
#include "packed_plan.h"
#include "ptx.cuh"

namespace omniquant {

constexpr int kPieceWords = 4;  // 16 bytes

// Where a piece stands in its row of a tile, the row's chunk being kWords long. The exchange
// spreads what the lanes of a warp read at once over all banks.
template <int kWords>
__device__ __forceinline__ int exchanged(int row, int piece) {
    constexpr bool kIsWhole = kWords == kChunkWords;
    return piece ^ (kIsWhole ? row / 2 % 2 * 2 + row / 4 % 2 : row / 4 % 2);
}

// With a copy instruction, each lane fetches a piece; together they fetch neighbouring pieces of
// kCopyRows rows.
template <int kWords>
class PlaneCopies {
  public:
    // plane: of the first row. `rows` rows exist; the plane has plane_words words of each.
    __device__ __forceinline__ PlaneCopies(const uint32_t *plane, int plane_words,
                                           int words_per_row, int rows, int lane)
        : plane_(kept(plane)),
          plane_words_(plane_words),
          first_word_(lane % kPieces * kPieceWords) {
        const int row = lane / kPieces;
        const int piece = exchanged<kWords>(row % (kTileRows / 2), lane % kPieces);
        to_ = kept(row * kWords + piece * kPieceWords);
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            rows_[i] = kept(min(i * kCopyRows + row, rows - 1) * words_per_row);
        }
    }

    // Copies zeros where the chunk lies behind the row. slot: this plane's part of the slot.
    __device__ __forceinline__ void start(int chunk, uint32_t *slot, bool is_aligned) const {
        const int word = chunk * kWords + first_word_;
        uint32_t *to = slot + to_;
        if (is_aligned) {
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                const uint32_t *from = plane_ + (rows_[i] + word);
                copy_16_async(to + i * kCopyRows * kWords, from, word < plane_words_);
            }
            return;
        }
#pragma unroll 1
        for (int k = 0; k < kPieceWords; ++k) {
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                const uint32_t *from = plane_ + (rows_[i] + word + k);
                copy_4_async(to + i * kCopyRows * kWords + k, from, word + k < plane_words_);
            }
        }
    }

  private:
    static constexpr int kPieces = kWords / kPieceWords;
    static constexpr int kCopyRows = 32 / kPieces;
    static constexpr int kCopies = kBlockRows / kCopyRows;

    const uint32_t *plane_;
    int plane_words_;
    int first_word_;
    int to_;
    int rows_[kCopies];
};

}  // namespace omniquant

#endif

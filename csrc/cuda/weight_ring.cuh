// A warp's window on the packed weight: chunks of its rows, kStages of them in flight from device
// memory to shared memory. The warp fills and reads its own ring, so no warp waits for another.
//
// With each copy instruction, a warp fetches 64 bytes of each of 8 rows, or 32 bytes of each of 16
// rows of the upper plane of 3 bit. The warps of a block take neighbouring chunks, so that together
// they read each row contiguously.
#ifndef OMNIQUANT_WEIGHT_RING_CUH
#define OMNIQUANT_WEIGHT_RING_CUH

#include <cuda_runtime.h>

#include <cstdint>

#include "kept.cuh"
#include "packed_plan.h"
#include "plane_copies.cuh"
#include "ptx.cuh"

namespace omniquant {

template <int kBits>
class WeightRing {
  public:
    static constexpr int kLaneWords = kLaneCodes * plane_bits(kBits) / 32;
    static constexpr int kWarpWords = kStages * kBlockRows * chunk_words(kBits);

    // words: of the block's first row, of which `rows` exist; slots: this warp's shared memory.
    __device__ __forceinline__ WeightRing(const uint32_t *words, int words_per_row, int rows,
                                          bool is_aligned, uint32_t *slots, int lane)
        : is_aligned_(is_aligned),
          slots_(slots),
          lower_(words, lower_words(words_per_row), words_per_row, rows, lane),
          upper_(words + lower_words(words_per_row), words_per_row - lower_words(words_per_row),
                 words_per_row, rows, lane) {
        const int row = lane / kQuad;
        const int word = lane % kQuad * kLaneWords;
        const int piece = exchanged<kChunkWords>(row, word / kPieceWords);
        lane_lower_ = kept(row * kChunkWords + piece * kPieceWords + word % kPieceWords);
        lane_upper_ =
            row * kUpperWords + exchanged<kUpperWords>(row, 0) * kPieceWords + lane % kQuad / 2;
        lane_half_ = lane % 2;
    }

    // Starts the copies of a chunk, of zeros where it lies behind the row, and ends their group.
    __device__ __forceinline__ void fetch(int chunk, int slot) const {
        lower_.start(chunk, slots_ + slot * kSlotWords, is_aligned_);
        if constexpr (kUpperWords != 0) {
            upper_.start(chunk, slots_ + slot * kSlotWords + kLowerWords, is_aligned_);
        }
        commit_copies();
    }

    // The lane's codes of a span, in row lane / 4 behind the row `first` of the block. A span's
    // pieces differ from the first span's in bits that the first span does not use.
    __device__ __forceinline__ void read(int slot, int first, int span,
                                         uint32_t (&words)[kLaneWords]) const {
        const uint32_t *from = slots_ + slot * kSlotWords + first * kChunkWords +
                               (lane_lower_ ^ span * kQuad * kLaneWords);
        if constexpr (kLaneWords == 4) {
            const uint4 four = *reinterpret_cast<const uint4 *>(from);
            words[0] = four.x;
            words[1] = four.y;
            words[2] = four.z;
            words[3] = four.w;
        } else if constexpr (kLaneWords == 2) {
            const uint2 two = *reinterpret_cast<const uint2 *>(from);
            words[0] = two.x;
            words[1] = two.y;
        } else {
            words[0] = *from;
        }
    }

    // The upper bits of these codes, where a plane of one bit holds them.
    __device__ __forceinline__ uint32_t read_upper(int slot, int first, int span) const {
        if constexpr (kUpperWords == 0) {
            return 0;
        } else {
            const uint32_t *from = slots_ + slot * kSlotWords + kLowerWords + first * kUpperWords +
                                   (lane_upper_ ^ span * kQuad / 2);
            return reinterpret_cast<const uint16_t *>(from)[lane_half_];
        }
    }

  private:
    static constexpr int kUpperWords = chunk_words(kBits) - kChunkWords;  // of a row
    static constexpr int kLowerWords = kBlockRows * kChunkWords;          // of a slot
    static constexpr int kSlotWords = kBlockRows * chunk_words(kBits);

    __device__ __forceinline__ static int lower_words(int words_per_row) {
        return words_per_row / kBits * plane_bits(kBits);
    }

    bool is_aligned_;
    uint32_t *slots_;
    PlaneCopies<kChunkWords> lower_;
    PlaneCopies<kUpperWords != 0 ? kUpperWords : kChunkWords> upper_;
    int lane_lower_;
    int lane_upper_;
    int lane_half_;
};

}  // namespace omniquant

#endif

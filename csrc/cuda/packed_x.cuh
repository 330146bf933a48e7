// A warp reads its activations a step ahead of their use.
#ifndef OMNIQUANT_PACKED_X_CUH
#define OMNIQUANT_PACKED_X_CUH

#include <cuda_runtime.h>

#include <cstdint>

#include "kept.cuh"
#include "packed_operands.cuh"
#include "packed_plan.h"

namespace omniquant {

// Where a lane's columns of a step begin, and how many of them take part and exist. In a step that
// is half of a span, half of the lanes take part.
template <bool kHalves>
struct LaneColumns {
    int begin;
    int count;

    __device__ __forceinline__ LaneColumns(int step, int quarter, int columns) {
        begin = (kHalves ? step / 2 : step) * kSpan + quarter * kLaneCodes;
        count = kHalves && step % 2 != quarter / 2 ? 0 : columns - begin;
    }
};

// Several tokens: each lane reads the columns that it needs. The last token stands for those that a
// tile lacks; their sums are not used.
template <typename T, typename Codes, int kTokenTiles, bool kHalves>
class MatrixX {
  public:
    static constexpr int kSharedWords = 0;

    __device__ __forceinline__ MatrixX(const T *x, int first_token, int tokens, int columns, int,
                                       bool is_aligned, uint32_t *, int lane)
        : quarter_(lane % kQuad), columns_(columns), is_aligned_(is_aligned) {
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
            const int token = min(first_token + tile * kTileTokens + lane / kQuad, tokens - 1);
            tokens_[tile] = kept(x + int64_t{token} * columns);
        }
    }

    // Before the first chunk.
    __device__ __forceinline__ void prepare(int first_step) { load(first_step); }

    __device__ __forceinline__ void begin_chunk(int) {}

    // `index` of the chunk's steps; next: the step behind it, of all steps.
    __device__ __forceinline__ void take(int, int next, LaneOperands<T> (&operands)[kTokenTiles]) {
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
            operands[tile] = elements_[tile].template operands<Codes>();
        }
        load(next);
        __syncwarp();  // lanes may have gone different ways
    }

  private:
    __device__ __forceinline__ void load(int step) {
        const LaneColumns<kHalves> place(step, quarter_, columns_);
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
            elements_[tile].load(tokens_[tile] + place.begin, place.count, is_aligned_);
        }
    }

    const T *tokens_[kTokenTiles];
    int quarter_;
    int columns_;
    bool is_aligned_;
    LaneElements<T> elements_[kTokenTiles];
};

// One token of 16-bit elements: all quads of lanes need the same operands, so they share the work.
// Each quad reads one of the next chunk's steps and shows the others its operands in shared memory.
template <typename T, typename Codes, bool kHalves>
class VectorX {
    static_assert(kMaxChunkSteps == 32 / kQuad, "each quad of a warp reads one");
    static constexpr int kPieces = kLanePairs / 4;  // of 16 bytes, a lane's operands

  public:
    static constexpr int kSharedWords = kVectorWords;

    __device__ __forceinline__ VectorX(const T *x, int, int, int columns, int chunk_steps,
                                       bool is_aligned, uint32_t *shared, int lane)
        : x_(x),
          columns_(lane / kQuad < chunk_steps ? columns : 0),
          is_aligned_(is_aligned),
          step_(kept(lane / kQuad)),
          quarter_(kept(lane % kQuad)),
          shared_(reinterpret_cast<uint4 *>(shared)) {}

    __device__ __forceinline__ void prepare(int first_step) { load(first_step); }

    // next: the first step of the warp's next chunk. A barrier of the warp has to follow.
    __device__ __forceinline__ void begin_chunk(int next) {
        const LaneOperands<T> operands = elements_.template operands<Codes>();
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const uint32_t *pairs = operands.pairs[0] + 4 * i;
            shared_[(step_ * kPieces + i) * kQuad + quarter_] = {pairs[0], pairs[1], pairs[2],
                                                                 pairs[3]};
        }
        load(next);
    }

    __device__ __forceinline__ void take(int index, int, LaneOperands<T> (&operands)[1]) const {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const uint4 four = shared_[(index * kPieces + i) * kQuad + quarter_];
            uint32_t *pairs = operands[0].pairs[0] + 4 * i;
            pairs[0] = four.x;
            pairs[1] = four.y;
            pairs[2] = four.z;
            pairs[3] = four.w;
        }
    }

  private:
    __device__ __forceinline__ void load(int first_step) {
        const LaneColumns<kHalves> place(first_step + step_, quarter_, columns_);
        elements_.load(x_ + place.begin, place.count, is_aligned_);
    }

    const T *x_;
    int columns_;
    bool is_aligned_;
    int step_;
    int quarter_;
    uint4 *shared_;
    LaneElements<T> elements_;
};

}  // namespace omniquant

#endif

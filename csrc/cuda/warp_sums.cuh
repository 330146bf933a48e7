// The sums of a warp: the rows of a block times a tile or two of tokens.
#ifndef OMNIQUANT_WARP_SUMS_CUH
#define OMNIQUANT_WARP_SUMS_CUH

#include <cuda_runtime.h>

#include <cstdint>

#include "group_parameters.cuh"
#include "kept.cuh"
#include "packed_operands.cuh"
#include "packed_plan.h"
#include "ptx.cuh"

namespace omniquant {

// They stand in the registers of the matrix instruction: a lane has the rows lane / 4 and lane / 4
// + 8 of each tile of rows, and two tokens of each tile of tokens. For a vector, all tokens of a
// tile are the same, so the four lanes of a quad share the totals of their four rows.
template <int kBits, typename T, int kTokenTiles, bool kIsVector>
class WarpSums {
    using X = Activations<T>;
    using Format = typename X::Format;
    static constexpr int kTileLaneRows = 2 * kRowTiles;
    static constexpr int kLaneRows = kIsVector ? 1 : kTileLaneRows;
    static constexpr int kLaneTokens = kIsVector ? 1 : 2;

  public:
    using Decoder = Codes<kBits, Format, X::kWide>;
    using Parameters = GroupParameters<kLaneRows>;

    __device__ __forceinline__ explicit WarpSums(int lane)
        : row_(lane / kQuad), quarter_(kept(lane % kQuad)) {}

    // The first of the rows whose totals the lane has; the others follow at half a tile each.
    __device__ __forceinline__ int first_row() const {
        return row_ + (kIsVector ? quarter_ * (kTileRows / 2) : 0);
    }

    template <typename Ring>
    __device__ __forceinline__ void multiply(const Ring &ring, int slot, int span,
                                             const LaneOperands<T> (&x)[kTokenTiles]) {
        Decoder codes[kTileLaneRows];
#pragma unroll
        for (int i = 0; i < kTileLaneRows; ++i) {
            uint32_t words[Decoder::kWords];
            ring.read(slot, i * (kTileRows / 2), span, words);
            codes[i] = Decoder(words, ring.read_upper(slot, i * (kTileRows / 2), span));
        }
#pragma unroll
        for (int j = 0; j < kLanePairs; j += 2) {
            multiply_tokens(of_x_, constants_, x, j);
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
                const Decoder &upper = codes[2 * tile];
                const Decoder &lower = codes[2 * tile + 1];
#pragma unroll
                for (int part = 0; part < Decoder::kTiles; ++part) {
                    const uint32_t a[4] = {upper.operand(part, j), lower.operand(part, j),
                                           upper.operand(part, j + 1), lower.operand(part, j + 1)};
                    multiply_tokens(of_codes_[tile], a, x, j);
                }
            }
        }
    }

    // Ends a group: its sums go into the totals.
    __device__ __forceinline__ void end_group(const Parameters &group) {
        float scale[kLaneRows];
        float zero_point[kLaneRows];
        group.numbers(kBits, scale, zero_point);
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
            for (int k = 0; k < kLaneTokens; ++k) {
                const float offsets = of_x_[tile][k];
                const float ones = of_x_[tile][2 + k];
#pragma unroll
                for (int i = 0; i < kLaneRows; ++i) {
                    float &total = totals_[i][tile][k];
                    const float sum = fmaf(-zero_point[i], ones, group_sum(i, tile, k) - offsets);
                    total = fmaf(scale[i], sum, total);
                }
            }
        }
        clear(of_x_);
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            clear(of_codes_[tile]);
        }
    }

    // The totals as a matrix [tokens, rows].
    __device__ __forceinline__ void store(float *to) const {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
                for (int k = 0; k < kLaneTokens; ++k) {
                    const int row = first_row() + i * (kTileRows / 2);
                    const int token = kIsVector ? 0 : tile * kTileTokens + quarter_ * 2 + k;
                    to[token * kBlockRows + row] = totals_[i][tile][k];
                }
            }
        }
    }

  private:
    // The smallest part of x first.
    __device__ __forceinline__ static void multiply_tokens(float (&sums)[kTokenTiles][4],
                                                           const uint32_t (&a)[4],
                                                           const LaneOperands<T> (&x)[kTokenTiles],
                                                           int j) {
#pragma unroll
        for (int part = X::kParts - 1; part >= 0; --part) {
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile) {
                const uint32_t b[2] = {x[tile].pairs[part][j], x[tile].pairs[part][j + 1]};
                multiply_add<Format>(sums[tile], a, b);
            }
        }
    }

    __device__ __forceinline__ float sum_of(int i, int tile, int k) const {
        return of_codes_[i / 2][tile][i % 2 * 2 + k];
    }

    __device__ __forceinline__ float group_sum(int i, int tile, int k) const {
        if constexpr (!kIsVector) {
            return sum_of(i, tile, k);
        } else {
            static_assert(kTileLaneRows == kQuad, "each lane of a row has one");
            const float even = quarter_ / 2 == 0 ? sum_of(0, 0, 0) : sum_of(2, 0, 0);
            const float odd = quarter_ / 2 == 0 ? sum_of(1, 0, 0) : sum_of(3, 0, 0);
            return quarter_ % 2 == 0 ? even : odd;
        }
    }

    __device__ __forceinline__ static void clear(float (&sums)[kTokenTiles][4]) {
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                sums[tile][k] = 0.0f;
            }
        }
    }

    int row_;
    int quarter_;
    // Offsets for the upper rows, ones for the lower.
    uint32_t constants_[4] = {kept(Decoder::offset(0)), kept(powers_of_two<Format>(0)),
                              kept(Decoder::offset(1)), kept(powers_of_two<Format>(0))};
    float of_codes_[kRowTiles][kTokenTiles][4] = {};
    float of_x_[kTokenTiles][4] = {};  // offsets in the first two, ones in the others
    float totals_[kLaneRows][kTokenTiles][kLaneTokens] = {};
};

}  // namespace omniquant

#endif

/* C interface of the compiled kernels. The signatures hold neither torch nor C++, so that one
 * binary serves every torch; ctypes loads it. Tensors are contiguous, rows first; the caller
 * allocates them.
 *
 * Each thing has one name, here and in the code behind it:
 *
 * rows, columns          shape of the matrix that is quantized or packed. In a weight, a row is an
 *                        output channel and a column an input channel.
 * begin, end             half-open range [begin, end), of rows unless stated otherwise
 * x, out                 input and result, [rows, columns]; in a product [tokens, columns] and
 *                        [tokens, rows]
 * tokens                 rows of activations in a product
 * grad, grad_x, ...      gradient of the result, and of x and so on; each has its tensor's shape
 * bits                   width of a code
 * codes                  [rows, columns], one in a byte
 * words                  [rows, words_per_row], packed codes, in the given layout
 * group_size, groups     neighbouring columns of a row that share a scale, and their number,
 *                        ceil(columns / group_size); the last group may be shorter
 * scale, zero_point      [rows], or [rows, groups] of a packed weight
 * quant_min, quant_max   smallest and largest code
 * low, high              smallest and largest value of a row, [rows]
 * dtype, scale_dtype     element type of x and out, and of scale
 * threads, lanes         of the host: threads to use, and floats of the widest vector to use
 * stream                 of the device: a cudaStream_t
 *
 * Constants are spelled OMNIQUANT_NAME here and kName behind it, template arguments included. */
#ifndef OMNIQUANT_H
#define OMNIQUANT_H

#include <stdint.h>

/* Rises whenever a signature below changes; the loader rejects a library of another version. */
#define OMNIQUANT_ABI_VERSION 3

#if defined(_WIN32)
#define OMNIQUANT_API __declspec(dllexport)
#else
#define OMNIQUANT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Layout of a row of integer codes in 32-bit words, the first code in the lowest bits.
 * STREAM: one contiguous bit stream; words = ceil(columns * bits / 32); codes may straddle words.
 * WORDS: floor(32 / bits) codes a word, none straddles, the upper bits are zero.
 * PLANES: columns are padded with zero codes to a multiple of 32, and the code is cut into the
 * binary digits of its width, its lowest bits in the widest plane (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
 * 7 = 4 + 2 + 1). A row is the streams of its planes, one after another. */
enum { OMNIQUANT_STREAM = 0, OMNIQUANT_WORDS = 1, OMNIQUANT_PLANES = 2 };

/* Element types where a function takes several; all of them compute in float32. */
enum { OMNIQUANT_FLOAT32 = 0, OMNIQUANT_FLOAT16 = 1, OMNIQUANT_BFLOAT16 = 2 };

/* ---- libomniquant: float32 on the host, rows [begin, end) of [rows, columns] ---- */

OMNIQUANT_API int32_t omniquant_abi_version(void);

/* out = (clamp(round(x / scale) + zero_point) - zero_point) * scale */
OMNIQUANT_API void omniquant_fake_quantize(const float *x, const float *scale,
                                           const float *zero_point, float *out, int64_t columns,
                                           int64_t begin, int64_t end, int32_t quant_min,
                                           int32_t quant_max);

/* Straight-through gradients of omniquant_fake_quantize. */
OMNIQUANT_API void omniquant_fake_quantize_backward(const float *grad, const float *x,
                                                    const float *scale, const float *zero_point,
                                                    float *grad_x, float *grad_scale,
                                                    float *grad_zero_point, int64_t columns,
                                                    int64_t begin, int64_t end, int32_t quant_min,
                                                    int32_t quant_max);

/* The same with scale and zero point from each row's extremes; bits is 2 to 16. */
OMNIQUANT_API void omniquant_dynamic_fake_quantize(const float *x, float *out, int64_t columns,
                                                   int64_t begin, int64_t end, int32_t bits,
                                                   int32_t symmetric);

OMNIQUANT_API void omniquant_dynamic_fake_quantize_backward(const float *grad, const float *x,
                                                            float *grad_x, int64_t columns,
                                                            int64_t begin, int64_t end,
                                                            int32_t bits, int32_t symmetric);

/* Extremes of each row, and the first column of either, low_at and high_at [rows]. For a row that
 * holds a NaN: NaN and the column of the first one. columns is 1 to 2^31 - 1. */
OMNIQUANT_API void omniquant_row_extremes(const float *x, float *low, float *high, int64_t *low_at,
                                          int64_t *high_at, int64_t columns, int64_t begin,
                                          int64_t end);

/* Codes into words and back; bits is 1 to 8. Packing drops what a code holds above its bits, and
 * clears the bits that hold no code. */
OMNIQUANT_API void omniquant_pack(const uint8_t *codes, uint32_t *words, int64_t columns,
                                  int64_t words_per_row, int64_t begin, int64_t end, int32_t bits,
                                  int32_t layout);

OMNIQUANT_API void omniquant_unpack(const uint32_t *words, uint8_t *codes, int64_t columns,
                                    int64_t words_per_row, int64_t begin, int64_t end, int32_t bits,
                                    int32_t layout);

/* out = x times the transpose of the weight (code - zero_point) * scale, summed in float32. words
 * are in PLANES; without zero_point it is 2^(bits - 1). bits is 2, 3, 4 or 8, and group_size a
 * multiple of 32, or columns or more. The workspace holds as many floats as the second function
 * returns. The library keeps its threads and shares out the rows to at most `threads` of them; the
 * result is the same for every number of threads and of tokens. lanes is 16, 8 or 1; 0 stands for
 * the widest that the processor has. */
OMNIQUANT_API void omniquant_packed_linear(const void *x, const uint32_t *words, const void *scale,
                                           const uint8_t *zero_point, void *out, float *workspace,
                                           int64_t tokens, int64_t columns, int64_t rows,
                                           int64_t group_size, int32_t bits, int32_t dtype,
                                           int32_t scale_dtype, int32_t threads, int32_t lanes);

OMNIQUANT_API int64_t omniquant_packed_linear_workspace(int64_t tokens, int64_t columns,
                                                        int64_t group_size, int32_t bits,
                                                        int32_t threads);

/* The number of tokens up to which this is faster than an ordinary product with the dequantized
 * weight. */
OMNIQUANT_API int64_t omniquant_packed_linear_limit(int32_t bits, int32_t dtype, int32_t lanes);

/* ---- libomniquant_cuda: device pointers, enqueued on a stream, never synchronising. The result is
 * a cudaError_t, 0 for success. The current device must be the tensors' device. ---- */

OMNIQUANT_API int32_t omniquant_cuda_abi_version(void);

/* 0 if the library supports the driver and the architecture of the current device. */
OMNIQUANT_API int32_t omniquant_cuda_usable(void);

OMNIQUANT_API int32_t omniquant_cuda_fake_quantize(const float *x, const float *scale,
                                                   const float *zero_point, float *out,
                                                   int64_t rows, int64_t columns, int32_t quant_min,
                                                   int32_t quant_max, void *stream);

OMNIQUANT_API int32_t omniquant_cuda_fake_quantize_backward(
    const float *grad, const float *x, const float *scale, const float *zero_point, float *grad_x,
    float *grad_scale, float *grad_zero_point, int64_t rows, int64_t columns, int32_t quant_min,
    int32_t quant_max, void *stream);

OMNIQUANT_API int32_t omniquant_cuda_dynamic_fake_quantize(const void *x, void *out, int64_t rows,
                                                           int64_t columns, int32_t bits,
                                                           int32_t symmetric, int32_t dtype,
                                                           void *stream);

OMNIQUANT_API int32_t omniquant_cuda_dynamic_fake_quantize_backward(const void *grad, const void *x,
                                                                    void *grad_x, int64_t rows,
                                                                    int64_t columns, int32_t bits,
                                                                    int32_t symmetric,
                                                                    int32_t dtype, void *stream);

/* Like the host's, for all rows. */
OMNIQUANT_API int32_t omniquant_cuda_pack(const uint8_t *codes, uint32_t *words, int64_t rows,
                                          int64_t columns, int64_t words_per_row, int32_t bits,
                                          int32_t layout, void *stream);

OMNIQUANT_API int32_t omniquant_cuda_unpack(const uint32_t *words, uint8_t *codes, int64_t rows,
                                            int64_t columns, int64_t words_per_row, int32_t bits,
                                            int32_t layout, void *stream);

/* Like the host's; made for up to 16 tokens. */
OMNIQUANT_API int32_t omniquant_cuda_packed_linear(const void *x, const uint32_t *words,
                                                   const void *scale, const uint8_t *zero_point,
                                                   void *out, int64_t tokens, int64_t columns,
                                                   int64_t rows, int64_t group_size, int32_t bits,
                                                   int32_t dtype, int32_t scale_dtype,
                                                   void *stream);

#ifdef __cplusplus
}
#endif

#endif

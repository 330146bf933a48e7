/* C interface of the compiled kernels. No torch, no C++ in the signatures: one binary serves every
 * torch and is loaded through ctypes. Tensors are contiguous, rows first; the caller allocates. */
#ifndef OMNIQUANT_H
#define OMNIQUANT_H

#include <stdint.h>

/* Raised whenever a signature below changes; the loader refuses a library of another version. */
#define OMNIQUANT_ABI_VERSION 3

#if defined(_WIN32)
#define OMNIQUANT_API __declspec(dllexport)
#else
#define OMNIQUANT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* How a row of integer codes stands in 32-bit words, the first code in the lowest bits.
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

/* Straight-through gradients of the above; grad_scale and grad_zero_point are [rows]. */
OMNIQUANT_API void omniquant_fake_quantize_backward(const float *grad, const float *x,
                                                    const float *scale, const float *zero_point,
                                                    float *grad_x, float *grad_scale,
                                                    float *grad_zero_point, int64_t columns,
                                                    int64_t begin, int64_t end, int32_t quant_min,
                                                    int32_t quant_max);

/* Scale and zero point from each row's extremes; bits is 2 to 16. */
OMNIQUANT_API void omniquant_dynamic_fake_quantize(const float *x, float *out, int64_t columns,
                                                   int64_t begin, int64_t end, int32_t bits,
                                                   int32_t symmetric);

OMNIQUANT_API void omniquant_dynamic_fake_quantize_backward(const float *grad, const float *x,
                                                            float *grad_x, int64_t columns,
                                                            int64_t begin, int64_t end,
                                                            int32_t bits, int32_t symmetric);

/* Lowest and highest value of each row, and the first index of either; of a row that holds a NaN,
 * NaN and the first of those. columns is 1 to 2^31 - 1. */
OMNIQUANT_API void omniquant_row_extremes(const float *x, float *low, float *high, int64_t *low_at,
                                          int64_t *high_at, int64_t columns, int64_t begin,
                                          int64_t end);

/* Rows [begin, end) of codes [rows, columns] and words [rows, words_per_row]; bits is 1 to 8.
 * Packing drops what a code holds above its bits, and clears the bits that hold no code. */
OMNIQUANT_API void omniquant_pack(const uint8_t *codes, uint32_t *words, int64_t columns,
                                  int64_t words_per_row, int64_t begin, int64_t end, int32_t bits,
                                  int32_t layout);

OMNIQUANT_API void omniquant_unpack(const uint32_t *words, uint8_t *codes, int64_t columns,
                                    int64_t words_per_row, int64_t begin, int64_t end, int32_t bits,
                                    int32_t layout);

/* out [n, out_features] = x [n, in] times the transpose of the weight (code - zero_point) * scale.
 * words [out_features, ...] are codes in planes; scale and zero_point [out_features, groups] with
 * groups = ceil(in / group_size); without zero_point it is 2^(bits - 1). bits is 2, 3, 4 or 8, and
 * group_size a multiple of 32 or at least in. type is that of x and out. The workspace holds as
 * many floats as the second function says. Rows of the weight are shared by at most `threads`
 * threads, which the library keeps; the result is the same for every number of them and every n.
 * `lanes` is the widest vector to use, in floats: 16, 8 or 1; 0 for what the processor has. */
OMNIQUANT_API void omniquant_packed_linear(const void *x, const uint32_t *words, const void *scale,
                                           const uint8_t *zero_point, void *out, float *workspace,
                                           int64_t n, int64_t in, int64_t out_features,
                                           int64_t group_size, int32_t bits, int32_t type,
                                           int32_t scale_type, int32_t threads, int32_t lanes);

OMNIQUANT_API int64_t omniquant_packed_linear_workspace(int64_t n, int64_t in, int64_t group_size,
                                                        int32_t bits, int32_t threads);

/* The n up to which this is faster than to dequantize the weight for an ordinary product. */
OMNIQUANT_API int64_t omniquant_packed_linear_limit(int32_t bits, int32_t type, int32_t lanes);

/* ---- libomniquant_cuda: device pointers, enqueued on a cudaStream_t, never synchronising.
 * The result is a cudaError_t, 0 for success. The current device is the tensors' device. ---- */

OMNIQUANT_API int32_t omniquant_cuda_abi_version(void);

/* 0 where the current device can run the kernels: its driver and architecture are supported. */
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

/* codes [rows, columns], words [rows, words_per_row]; bits is 1 to 8. Otherwise like the host's. */
OMNIQUANT_API int32_t omniquant_cuda_pack(const uint8_t *codes, uint32_t *words, int64_t rows,
                                          int64_t columns, int64_t words_per_row, int32_t bits,
                                          int32_t layout, void *stream);

OMNIQUANT_API int32_t omniquant_cuda_unpack(const uint32_t *words, uint8_t *codes, int64_t rows,
                                            int64_t columns, int64_t words_per_row, int32_t bits,
                                            int32_t layout, void *stream);

/* out [n, rows] = x [n, columns] times the transpose of (code - zero_point) * scale, summed in
 * float32. words are in PLANES; scale and zero_point are [rows, groups], a null zero_point is
 * 2^(bits - 1). bits is 2, 3, 4 or 8; group_size is a multiple of 32, or columns or more. dtype is
 * that of x and out, scale_dtype that of scale. Made for an n of up to 16. */
OMNIQUANT_API int32_t omniquant_cuda_packed_linear(const void *x, const uint32_t *words,
                                                   const void *scale, const uint8_t *zero_point,
                                                   void *out, int64_t n, int64_t columns,
                                                   int64_t rows, int64_t group_size, int32_t bits,
                                                   int32_t dtype, int32_t scale_dtype,
                                                   void *stream);

#ifdef __cplusplus
}
#endif

#endif

// Functions that host and device share.
#ifndef OMNIQUANT_INLINE_H
#define OMNIQUANT_INLINE_H

// Always inlined on the host: each machine-code version needs its own copy of every helper.
#if defined(__CUDACC__)
#define OMNIQUANT_INLINE __host__ __device__ inline
#elif defined(__GNUC__)
#define OMNIQUANT_INLINE inline __attribute__((always_inline))
#else
#define OMNIQUANT_INLINE inline
#endif

#endif

/* Vectors of VL floats, as wide as the machine has them, and what is done within one. */
#ifndef WATTLINE_VECTORS_H
#define WATTLINE_VECTORS_H

#include <math.h>
#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define VL 16
#else
#define VL 8
#endif
#define NV 2
#define NR (VL * NV)
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VL), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(4 * VL), aligned(4)));

/* Sum of the lanes: each step adds the lanes `distance` apart. */
INLINE float lane_sum(vf x) {
    typedef int32_t vi __attribute__((vector_size(4 * VL)));
#if VL == 16
    x += __builtin_shuffle(x, (vi){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    x += __builtin_shuffle(x, (vi){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    x += __builtin_shuffle(x, (vi){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    x += __builtin_shuffle(x, (vi){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
#else
    x += __builtin_shuffle(x, (vi){4, 5, 6, 7, 0, 1, 2, 3});
    x += __builtin_shuffle(x, (vi){2, 3, 0, 1, 6, 7, 4, 5});
    x += __builtin_shuffle(x, (vi){1, 0, 3, 2, 5, 4, 7, 6});
#endif
    return x[0];
}

INLINE float dot(const float *a, const float *b, const long size) {
    vf sum = {0};
    float rest = 0;
    long i = 0;
#pragma GCC unroll 8
    for (; i + VL <= size; i += VL) sum += *(const vf *)(a + i) * *(const vf *)(b + i);
    for (; i < size; i++) rest += a[i] * b[i];
    return lane_sum(sum) + rest;
}

/* x[i] becomes the halves of x[2i] and x[2i+1] added up: one level of the tree below. */
#define FOLD(count, ...) do { \
    const vi low = {__VA_ARGS__}, high = low + count; \
    _Pragma("GCC unroll 8") \
    for (int i = 0; i < count; i++) \
        x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], low) + __builtin_shuffle(x[2 * i], x[2 * i + 1], high); \
    } while (0)

/* The lane sums of VL vectors, as one vector: three operations a vector. */
INLINE vf lane_sums(vf *x) {
    typedef int32_t vi __attribute__((vector_size(4 * VL)));
#if VL == 16
    FOLD(8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    FOLD(4, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    FOLD(2, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
    FOLD(1, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#else
    FOLD(4, 0, 1, 2, 3, 8, 9, 10, 11);
    FOLD(2, 0, 1, 4, 5, 8, 9, 12, 13);
    FOLD(1, 0, 2, 4, 6, 8, 10, 12, 14);
#endif
    return x[0];
}

/* Lane by lane: yes where is_set is all ones, no where it is zero. */
INLINE vf blend(vu is_set, vf yes, vf no) { return (vf)((is_set & (vu)yes) | (~is_set & (vu)no)); }

/* The greater of both; y where either is not a number. */
INLINE vf greater(vf x, vf y) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return blend((vu)(x > y), x, y);
#endif
}

INLINE vf exponential(vf x) {
    /* 2^n * e^r with |r| <= ln2/2; relative error about 1e-7. NaN stays NaN, below -87 is 0. */
    const vf low = (vf){0} - 87.0f, high = (vf){0} + 88.0f;
    const vu is_low = (vu)(x < low);
    x = -greater(-high, -greater(low, x));
    const vf magic = (vf){0} + 12582912.0f;
    vf shifted = x * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return (vf)(~is_low & ((vu)y + ((vu)shifted << 23)));
}

static vf silu(vf x) { return x / (1.0f + exponential(-x)); }

#endif

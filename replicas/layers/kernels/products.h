/* Products with packed matrices: [panel][input][NR] floats, a panel being NR = 2 VL output rows; or, where every
 * value is a bfloat16, [panel][input][VL] words with row i in the lower half and row VL + i in the upper, which widen
 * exactly with a shift and a mask; or [panel][input][NR] bytes, signed, and one factor per row for the sum.
 * Every output is one sum over the inputs in order, whatever the number of tokens: results do not depend on the batch.
 */
#ifndef WATTLINE_PRODUCTS_H
#define WATTLINE_PRODUCTS_H

#include <string.h>

#include "pool.h"
#include "vectors.h"

#if VL == 16
#define MR 12
#else
#define MR 6
#endif
#define BLOCK_BYTES (384 * 1024)
#define AHEAD_BYTES 8192 /* Weights are asked for this early: with several rows the core does not look far enough ahead. */

enum { FULL, HALF, BYTE };
typedef struct { const void *data; const float *scales; long num_rows, num_columns, storage; } Matrix;

/* VL signed bytes as floats: said with intrinsics, since GCC turns the generic conversion into one byte at a time. */
INLINE vf widen(const int8_t *bytes) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)bytes)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)bytes)));
#else
    vf wide;
    for (int i = 0; i < VL; i++) wide[i] = bytes[i];
    return wide;
#endif
}

/* The weights of input k. */
INLINE void weights_at(const int storage, const void *panel, long k, vf *w) {
    if (storage == BYTE) {
        const int8_t *byte = (const int8_t *)panel + k * NR;
        __builtin_prefetch(byte + AHEAD_BYTES);
        w[0] = widen(byte), w[1] = widen(byte + VL);
    } else if (storage == HALF) {
        const uint32_t *half = (const uint32_t *)panel + k * VL;
        __builtin_prefetch((const char *)half + AHEAD_BYTES);
        vu words = *(const vu *)half;
        w[0] = (vf)(words << 16), w[1] = (vf)(words & 0xffff0000u);
    } else {
        const float *full = (const float *)panel + k * NR;
        __builtin_prefetch((const char *)full + AHEAD_BYTES);
        __builtin_prefetch((const char *)(full + VL) + AHEAD_BYTES);
        w[0] = *(const vf *)full, w[1] = *(const vf *)(full + VL);
    }
}

/* acc[m * panels + n] = x[m] . panel[n], for a compile-time number of rows and panels. */
INLINE void tile(const int rows, const int panels, const int storage, const float *const *x, const void *const *panel, long columns, vf (*acc)[NV]) {
    vf sum[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < rows * panels; i++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) sum[i][v] = (vf){0};
    for (long k = 0; k < columns; k++)
#pragma GCC unroll 4
        for (int n = 0; n < panels; n++) {
            vf w[NV];
            weights_at(storage, panel[n], k, w);
#pragma GCC unroll 16
            for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) sum[m * panels + n][v] += x[m][k] * w[v];
        }
#pragma GCC unroll 16
    for (int i = 0; i < rows * panels; i++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) acc[i][v] = sum[i][v];
}

typedef void (*Tile)(const float *const *, const void *const *, long, vf (*)[NV]);
#define TILE(name, rows, panels, storage) \
    static void name(const float *const *x, const void *const *w, long k, vf (*a)[NV]) { tile(rows, panels, storage, x, w, k, a); }
#define TILES(n) TILE(tile_f##n, n, 1, FULL) TILE(tile_h##n, n, 1, HALF) TILE(tile_b##n, n, 1, BYTE)
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)
#if MR == 12
TILES(7) TILES(8) TILES(9) TILES(10) TILES(11) TILES(12)
#define EACH(p) {NULL, p##1, p##2, p##3, p##4, p##5, p##6, p##7, p##8, p##9, p##10, p##11, p##12}
#else
#define EACH(p) {NULL, p##1, p##2, p##3, p##4, p##5, p##6}
#endif
static const Tile tiles[3][MR + 1] = {EACH(tile_f), EACH(tile_h), EACH(tile_b)};

/* With few rows the sums of one panel wait for each other: two panels at a time. */
#define FEW_ROWS 2
#define PAIRS(n) TILE(pair_f##n, n, 2, FULL) TILE(pair_h##n, n, 2, HALF) TILE(pair_b##n, n, 2, BYTE)
PAIRS(1) PAIRS(2)
static const Tile pairs[3][FEW_ROWS + 1] = {{NULL, pair_f1, pair_f2}, {NULL, pair_h1, pair_h2}, {NULL, pair_b1, pair_b2}};

static const void *panel_of(const Matrix *w, long panel) {
    return (const char *)w->data + (size_t)panel * w->num_columns * NR * (w->storage == FULL ? 4 : w->storage == HALF ? 2 : 1);
}

static long num_panels(const Matrix *w) { return (w->num_rows + NR - 1) / NR; }

static long rows_per_block(long columns) {
    long rows = BLOCK_BYTES / (columns * 4) / MR * MR;
    return rows < MR ? MR : rows;
}

static long chunk_of(const Pool *p, long count) {
    long chunk = count / (p->num_threads * 6);
    return chunk < 1 ? 1 : chunk;
}

/* `groups` of tokens, each with its own matrices (experts; a dense product is one group of all tokens). With
 * `up` the result is silu(x . w) * (x . up). Rows of group g are begin[g]..begin[g+1] of y; row r of x is
 * x[token[r]], or x[r]. */
typedef struct {
    const float *x;
    const int *token;
    float *y;
    const Matrix *w, *up;
    const int *group_matrix;
    const long *begin;
    long x_stride, y_stride, panels, together;
} Product;

static const float *x_row(const Product *p, long row) {
    return p->x + (p->token ? p->token[row] : row) * p->x_stride;
}

static long num_units(const Product *p) { return (p->panels + p->together - 1) / p->together; }

static void store(const vf *acc, float *y, long left) {
    if (left >= NR)
        for (int v = 0; v < NV; v++) *(vf *)(y + v * VL) = acc[v];
    else
        memcpy(y, acc, (size_t)left * sizeof(float));
}

/* The factors of a panel of bytes, for the sums of `rows` rows that lie `stride` apart. */
static void apply_scales(const Matrix *w, long panel, vf (*acc)[NV], long rows, long stride) {
    if (w->storage != BYTE) return;
    for (long m = 0; m < rows; m++)
        for (int v = 0; v < NV; v++) acc[m * stride][v] *= *(const vf *)(w->scales + panel * NR + v * VL);
}

static void activate(vf *gate, const vf *up) {
    for (int v = 0; v < NV; v++) gate[v] = silu(gate[v]) * up[v];
}

/* Rows `row` to `end` of a panel: with `up`, of the same panel of both. */
static void product_panel(const Product *p, const Matrix *w, const Matrix *up, long panel, long row, long end) {
    const void *data = panel_of(w, panel), *up_data = up ? panel_of(up, panel) : NULL;
    while (row < end) {
        /* Even shares: 16 rows are 8 + 8, not 12 + 4. */
        long turns = (end - row + MR - 1) / MR, rows = (end - row + turns - 1) / turns;
        const float *x[MR];
        vf acc[MR][NV], up_acc[MR][NV];
        for (long m = 0; m < rows; m++) x[m] = x_row(p, row + m);
        tiles[w->storage][rows](x, &data, w->num_columns, acc);
        apply_scales(w, panel, acc, rows, 1);
        if (up) {
            tiles[up->storage][rows](x, &up_data, w->num_columns, up_acc);
            apply_scales(up, panel, up_acc, rows, 1);
            for (long m = 0; m < rows; m++) activate(acc[m], up_acc[m]);
        }
        for (long m = 0; m < rows; m++) store(acc[m], p->y + (row + m) * p->y_stride + panel * NR, w->num_rows - panel * NR);
        row += rows;
    }
}

/* A few rows of two panels of equal storage: a panel and its `up`, or a panel and the next. */
static void product_pair(const Product *p, const Matrix *w, const Matrix *up, long panel, long row, long end) {
    const Matrix *other = up ? up : w;
    long rows = end - row, other_panel = up ? panel : panel + 1;
    const void *data[2] = {panel_of(w, panel), panel_of(other, other_panel)};
    const float *x[FEW_ROWS];
    vf acc[2 * FEW_ROWS][NV];
    for (long m = 0; m < rows; m++) x[m] = x_row(p, row + m);
    pairs[w->storage][rows](x, data, w->num_columns, acc);
    apply_scales(w, panel, acc, rows, 2);
    apply_scales(other, other_panel, acc + 1, rows, 2);
    for (long m = 0; m < rows; m++) {
        float *y = p->y + (row + m) * p->y_stride + panel * NR;
        if (up) activate(acc[2 * m], acc[2 * m + 1]);
        store(acc[2 * m], y, w->num_rows - panel * NR);
        if (!up) store(acc[2 * m + 1], y + NR, w->num_rows - other_panel * NR);
    }
}

/* One panel of a group, or two where `together` is 2. */
static void product_task(const void *job, long index) {
    const Product *p = job;
    long units = num_units(p), group = index / units, panel = index % units * p->together;
    int matrix = p->group_matrix ? p->group_matrix[group] : 0;
    const Matrix *w = p->w + matrix, *up = p->up ? p->up + matrix : NULL;
    long row = p->begin[group], end = p->begin[group + 1];
    int has_other = up ? up->storage == w->storage : p->together == 2 && panel + 1 < p->panels;
    if (end - row <= FEW_ROWS && has_other) product_pair(p, w, up, panel, row, end);
    else product_panel(p, w, up, panel, row, end);
}

/* The product of all groups; no group has more than `most_rows` rows. */
static void product(Pool *pool, Product *p, long num_groups, long most_rows) {
    p->panels = num_panels(p->w);
    p->together = most_rows <= FEW_ROWS && !p->up ? 2 : 1;
    run(pool, product_task, p, num_groups * num_units(p), chunk_of(pool, num_groups * num_units(p)));
}

static void dense(Pool *pool, const Matrix *w, const Matrix *up, const float *x, float *y, long num_tokens) {
    long block = rows_per_block(w->num_columns);
    for (long first = 0; first < num_tokens; first += block) {
        long begin[2] = {0, num_tokens - first < block ? num_tokens - first : block};
        Product p = {.x = x + first * w->num_columns, .y = y + first * w->num_rows, .w = w, .up = up, .begin = begin,
                     .x_stride = w->num_columns, .y_stride = w->num_rows};
        product(pool, &p, 1, begin[1]);
    }
}

#endif

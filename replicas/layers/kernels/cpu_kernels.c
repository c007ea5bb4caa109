/* The CPU kernels of a decoder step: products with packed weights, attention over pages, and what lies
 * between them, so that a layer is two calls. Compiled for this machine on first use (build.py), called
 * through ctypes (library.py), checked against the torch path by tests.
 *
 * Letters: T tokens, H hidden, N query heads, K key/value heads, D head_dim, G = N/K, F hidden columns.
 * A matrix is packed in panels of NR = 2 VL output rows: [panel][input][NR] floats; or, where every value is a
 * bfloat16, [panel][input][VL] words with row i in the lower half and row VL + i in the upper, which widen
 * exactly with a shift and a mask; or [panel][input][NR] bytes, signed, and one factor per row for the sum.
 * Every output is one sum over the inputs in order, whatever the number of tokens: results do not depend on
 * the batch.
 */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define VL 16
#define MR 12
#else
#define VL 8
#define MR 6
#endif
#define NV 2
#define NR (VL * NV)
#define SPIN_NS 100000
#define BLOCK_BYTES (384 * 1024)
#define QUERY_BLOCK 96 /* Queries of an attention task, and keys it turns into panels at a time. */
#define KEY_BLOCK 128
#define AHEAD_BYTES 8192 /* Weights are asked for this early: with several rows the core does not look far enough ahead. */
#define MAX_VECTORS (128 / VL) /* Of a head in attend_queries. */
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

/* ---- Threads: workers look for work for SPIN_NS after the last, then sleep in the kernel. ---- */

typedef void (*Task)(const void *job, long index);

typedef struct Pool {
    _Atomic int is_open, active, sleepers, is_stopped;
    _Atomic unsigned generation;
    _Atomic long next;
    long count, chunk;
    Task task;
    const void *job;
    int num_threads;
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    char *scratch;
    size_t scratch_size;
} Pool;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Buffers of a thread; workers keep theirs for life. */
static _Thread_local struct { float *data; size_t size; } own;

static void take(Pool *p) {
    long count = p->count, chunk = p->chunk, at;
    while ((at = atomic_fetch_add(&p->next, chunk)) < count)
        for (long end = at + chunk < count ? at + chunk : count; at < end; at++) p->task(p->job, at);
}

static void *work(void *argument) {
    Pool *p = argument;
    int64_t last = now_ns();
    while (!atomic_load(&p->is_stopped)) {
        unsigned seen = atomic_load(&p->generation);
        if (atomic_load(&p->is_open) && atomic_load(&p->next) < p->count) {
            /* Announce first, then look again: the caller closes first, then waits for the announced. */
            atomic_fetch_add(&p->active, 1);
            if (atomic_load(&p->is_open)) take(p);
            atomic_fetch_sub(&p->active, 1);
            last = now_ns();
        }
        for (int i = 0; i < 32 && !(atomic_load(&p->is_open) && atomic_load(&p->next) < p->count); i++) relax();
        if (now_ns() - last < SPIN_NS) continue;
        pthread_mutex_lock(&p->mutex);
        atomic_fetch_add(&p->sleepers, 1);
        while (atomic_load(&p->generation) == seen && !atomic_load(&p->is_stopped))
            pthread_cond_wait(&p->wake, &p->mutex);
        atomic_fetch_sub(&p->sleepers, 1);
        pthread_mutex_unlock(&p->mutex);
        last = now_ns();
    }
    free(own.data);
    return NULL;
}

static void wake_all(Pool *p) {
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

/* Run task(job, 0..count-1). Never waits for a worker that is still asleep. */
static void run(Pool *p, Task task, const void *job, long count, long chunk) {
    if (p->num_threads == 1 || count <= chunk) {
        for (long at = 0; at < count; at++) task(job, at);
        return;
    }
    p->task = task, p->job = job, p->count = count, p->chunk = chunk;
    atomic_store(&p->next, 0);
    atomic_fetch_add(&p->generation, 1);
    atomic_store(&p->is_open, 1);
    if (atomic_load(&p->sleepers)) wake_all(p);
    take(p);
    atomic_store(&p->is_open, 0);
    for (long turns = 0; atomic_load(&p->active); turns++)
        if (turns < 20000) relax(); else sched_yield();
}

static void *scratch(Pool *p, size_t size) {
    if (size > p->scratch_size) {
        free(p->scratch);
        p->scratch_size = (size + size / 2 + 4095) & ~(size_t)4095;
        p->scratch = aligned_alloc(4096, p->scratch_size);
        if (!p->scratch) abort();
    }
    return p->scratch;
}

Pool *wl_pool_new(int num_threads) {
    Pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->num_threads = 1;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->workers = calloc((size_t)num_threads, sizeof *p->workers);
    for (int i = 0; p->workers && i < num_threads - 1; i++) {
        if (pthread_create(&p->workers[i], NULL, work, p)) break;
        p->num_threads++;
    }
    return p;
}

void wl_pool_free(Pool *p) {
    atomic_store(&p->is_stopped, 1);
    wake_all(p);
    for (int i = 0; i < p->num_threads - 1; i++) pthread_join(p->workers[i], NULL);
    free(p->workers), free(p->scratch), free(p);
}

int wl_panel_rows(void) { return NR; }

const char *wl_instruction_set(void) {
#if defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "generic";
#endif
}

/* ---- Products with packed matrices. ---- */

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

INLINE vf exponential(vf x) {
    /* 2^n * e^r with |r| <= ln2/2; relative error about 1e-7. NaN stays NaN, below -87 is 0. */
    const vf low = (vf){0} - 87.0f, high = (vf){0} + 88.0f;
    vu is_low = (vu)(x < low);
    x = (vf)(((vu)(x > high) & (vu)high) | (~(vu)(x > high) & (vu)x));
    x = (vf)((is_low & (vu)low) | (~is_low & (vu)x));
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
    vf scaled = (vf)((vu)y + ((vu)shifted << 23));
    return (vf)(~is_low & (vu)scaled);
}

static vf silu(vf x) { return x / (1.0f + exponential(-x)); }

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

void wl_linear(Pool *pool, const Matrix *w, const float *x, float *y, long num_tokens) {
    dense(pool, w, NULL, x, y, num_tokens);
}

/* ---- Norm. ---- */

typedef struct { const float *x, *weight; float *y; long size; float eps; } Norm;

static void norm_task(const void *job, long row) {
    const Norm *n = job;
    const float *x = n->x + row * n->size;
    float *y = n->y + row * n->size;
    float scale = 1.0f / sqrtf(dot(x, x, n->size) / (float)n->size + n->eps);
    for (long i = 0; i < n->size; i++) y[i] = x[i] * scale * n->weight[i];
}

static void norm(Pool *pool, const float *x, const float *weight, float *y, long num_tokens, long size, float eps) {
    Norm n = {x, weight, y, size, eps};
    run(pool, norm_task, &n, num_tokens, 8);
}

/* Logits of the vocabulary rows `w` over normed tokens. */
void wl_head(Pool *pool, const float *norm_weight, const Matrix *w, const float *x, float *y, long num_tokens, float eps) {
    float *normed = scratch(pool, (size_t)(num_tokens * w->num_columns) * sizeof(float));
    norm(pool, x, norm_weight, normed, num_tokens, w->num_columns, eps);
    dense(pool, w, NULL, normed, y, num_tokens);
}

/* ---- Attention: norm, query/key/value, rotation and cache write, attention over pages, output. ---- */

typedef struct {
    const float *norm_weight;
    Matrix qkv, out;
    float *keys, *values;
} AttentionLayer;

/* sequences: [count][4] of first token, tokens, first position, row of the block table. */
typedef struct {
    long num_tokens, num_sequences, num_heads, num_kv_heads, head_dim, block_tokens, table_stride;
    const float *cosine, *signed_sine;
    const int64_t *slots, *sequences, *tables;
    float eps, scale;
} Step;

typedef struct { const Step *s; const AttentionLayer *layer; float *qkv, *mixed; const long *first_task; long block; } Attention;

static void rotate_task(const void *job, long t) {
    const Attention *a = job;
    const Step *s = a->s;
    long D = s->head_dim, half = D / 2, heads = s->num_heads + s->num_kv_heads;
    const float *c = s->cosine + t * D, *sine = s->signed_sine + t * D + half;
    float *row = a->qkv + t * (heads + s->num_kv_heads) * D;
    for (long h = 0; h < heads; h++) {
        float *x = row + h * D;
        for (long i = 0; i < half; i++) {
            float low = x[i], high = x[i + half];
            x[i] = low * c[i] - high * sine[i];
            x[i + half] = high * c[i] + low * sine[i];
        }
    }
    size_t width = (size_t)(s->num_kv_heads * D);
    memcpy(a->layer->keys + s->slots[t] * (long)width, row + s->num_heads * D, width * sizeof(float));
    memcpy(a->layer->values + s->slots[t] * (long)width, row + heads * D, width * sizeof(float));
}

static float *own_buffer(long count) {
    if ((size_t)count > own.size) {
        free(own.data);
        own.size = ((size_t)count * 2 + 63) & ~(size_t)63;
        own.data = aligned_alloc(64, own.size * sizeof(float));
        if (!own.data) abort();
    }
    return own.data;
}

static long row_of(const Step *s, const int64_t *table, long position) {
    return table[position / s->block_tokens] * s->block_tokens + position % s->block_tokens;
}

/* Scores become weights: exp(score - top). Returns their sum. */
static float weigh(float *score, long count, float top) {
    vf sums = {0};
    long j = 0;
    for (; j + VL <= count; j += VL) sums += *(vf *)(score + j) = exponential(*(vf *)(score + j) - top);
    float total = lane_sum(sums);
    for (; j < count; j++) total += score[j] = expf(score[j] - top);
    return total;
}

static float highest(const float *x, long count) {
    float top = -INFINITY;
    for (long j = 0; j < count; j++) top = x[j] > top ? x[j] : top;
    return top;
}

/* `Q` queries of one token that share a KV head, against `length` cached tokens; D a multiple of VL. */
INLINE void attend_queries(const Attention *a, const int64_t *table, const float *q, float *out, long head, long length, const long Q, const long D) {
    const Step *s = a->s;
    const long page = s->block_tokens, stride = s->num_kv_heads * D, V = D / VL;
    float *score = own_buffer(Q * (length + VL));
    vf sum[2][MAX_VECTORS];
    for (long at = 0; at < length; at += page) {
        const float *k = a->layer->keys + table[at / page] * page * stride + head * D;
        const float *value = a->layer->values + table[at / page] * page * stride + head * D;
        long count = length - at < page ? length - at : page, j = 0;
        /* A head's rows lie apart, so the core does not see them coming: the next page's keys, and the values. */
        const float *next = at + page < length ? a->layer->keys + table[at / page + 1] * page * stride + head * D : k;
        for (long i = 0; i < count; i++)
#pragma GCC unroll 8
            for (long d = 0; d < D; d += 16) __builtin_prefetch(next + i * stride + d), __builtin_prefetch(value + i * stride + d);
        for (; j + VL <= count; j += VL)
#pragma GCC unroll 2
            for (long g = 0; g < Q; g++) {
                vf x[VL];
#pragma GCC unroll 16
                for (long i = 0; i < VL; i++) {
                    x[i] = (vf){0};
#pragma GCC unroll 8
                    for (long v = 0; v < V; v++) x[i] += *(const vf *)(q + g * D + v * VL) * *(const vf *)(k + (j + i) * stride + v * VL);
                }
                *(vf *)(score + g * length + at + j) = lane_sums(x) * s->scale;
            }
        for (; j < count; j++)
            for (long g = 0; g < Q; g++) score[g * length + at + j] = dot(q + g * D, k + j * stride, D) * s->scale;
    }
    float total[2];
#pragma GCC unroll 2
    for (long g = 0; g < Q; g++) {
        total[g] = weigh(score + g * length, length, highest(score + g * length, length));
#pragma GCC unroll 16
        for (long v = 0; v < V; v++) sum[g][v] = (vf){0};
    }
    for (long at = 0; at < length; at += page) {
        const float *value = a->layer->values + table[at / page] * page * stride + head * D;
        long count = length - at < page ? length - at : page;
        for (long j = 0; j < count; j++)
#pragma GCC unroll 16
            for (long v = 0; v < V; v++) {
                vf part = *(const vf *)(value + j * stride + v * VL);
#pragma GCC unroll 2
                for (long g = 0; g < Q; g++) sum[g][v] += score[g * length + at + j] * part;
            }
    }
#pragma GCC unroll 2
    for (long g = 0; g < Q; g++)
#pragma GCC unroll 16
        for (long v = 0; v < V; v++) *(vf *)(out + g * D + v * VL) = sum[g][v] / total[g];
}

#define ATTEND(n, Q, D) static void attend_##n(const Attention *a, const int64_t *t, const float *q, float *out, long head, long length) \
    { attend_queries(a, t, q, out, head, length, Q, D); }
ATTEND(one_64, 1, 64) ATTEND(two_64, 2, 64) ATTEND(one_128, 1, 128) ATTEND(two_128, 2, 128)

/* A token's queries of one KV head, two at a time: keys and values are read once for both. */
static void attend_token(const Attention *a, const int64_t *table, long token, long head, long length) {
    const Step *s = a->s;
    long G = s->num_heads / s->num_kv_heads, D = s->head_dim, g = 0;
    const float *q = a->qkv + (token * (s->num_heads + 2 * s->num_kv_heads) + head * G) * D;
    float *out = a->mixed + (token * s->num_heads + head * G) * D;
    for (; g + 2 <= G; g += 2) (D == 64 ? attend_two_64 : attend_two_128)(a, table, q + g * D, out + g * D, head, length);
    if (g < G) (D == 64 ? attend_one_64 : attend_one_128)(a, table, q + g * D, out + g * D, head, length);
}

/* All queries of `count` tokens of a sequence and one KV head: keys and values become panels, block by block,
 * and both products run on the tiles of the matrices, with a running softmax between them. */
static void attend_block(const Attention *a, const int64_t *table, long token, long position, long count, long head) {
    const Step *s = a->s;
    long G = s->num_heads / s->num_kv_heads, D = s->head_dim, R = count * G, stride = s->num_kv_heads * D;
    long wide = (D + NR - 1) / NR * NR, length = position + count;
    float *keys = own_buffer(KEY_BLOCK * (D + wide + R) + R * (D + wide + 2) + 64), *values = keys + KEY_BLOCK * D;
    float *score = values + KEY_BLOCK * wide, *sum = score + R * KEY_BLOCK, *q = sum + R * wide, *top = q + R * D, *total = top + R;
    for (long r = 0; r < R; r++) {
        const float *from = a->qkv + ((token + r / G) * (s->num_heads + 2 * s->num_kv_heads) + head * G + r % G) * D;
        for (long d = 0; d < D; d++) q[r * D + d] = from[d] * s->scale;
        top[r] = -INFINITY, total[r] = 0;
    }
    memset(sum, 0, (size_t)(R * wide) * sizeof(float));
    for (long at = 0; at < length; at += KEY_BLOCK) {
        long n = length - at < KEY_BLOCK ? length - at : KEY_BLOCK;
        if (n < KEY_BLOCK || D < wide) memset(keys, 0, (size_t)(KEY_BLOCK * (D + wide)) * sizeof(float));
        for (long j = 0; j < n; j++) {
            long row = row_of(s, table, at + j) * stride + head * D;
            const float *k = a->layer->keys + row, *value = a->layer->values + row;
            float *panel = keys + j / NR * NR * D + j % NR;
            for (long d = 0; d < D; d++) panel[d * NR] = k[d];
            for (long d = 0; d < D; d += NR)
                memcpy(values + d * KEY_BLOCK + j * NR, value + d, (size_t)(D - d < NR ? D - d : NR) * sizeof(float));
        }
        const float *x[MR];
        vf acc[MR][NV];
        for (long r = 0; r < R; r += MR) {
            long rows = R - r < MR ? R - r : MR;
            for (long m = 0; m < rows; m++) x[m] = q + (r + m) * D;
            for (long j = 0; j < n; j += NR) {
                const void *panel = keys + j * D;
                tiles[FULL][rows](x, &panel, D, acc);
                for (long m = 0; m < rows; m++) store(acc[m], score + (r + m) * KEY_BLOCK + j, NR);
            }
        }
        for (long r = 0; r < R; r++) {
            float *p = score + r * KEY_BLOCK;
            long visible = position + r / G - at + 1;
            visible = visible < 0 ? 0 : visible < n ? visible : n;
            if (visible) {
                float best = highest(p, visible), new_top = best > top[r] ? best : top[r], factor = expf(top[r] - new_top);
                total[r] = total[r] * factor + weigh(p, visible, new_top);
                if (factor != 1.0f) for (long d = 0; d < wide; d++) sum[r * wide + d] *= factor;
                top[r] = new_top;
            }
            for (long j = visible; j < n; j++) p[j] = 0;
        }
        for (long r = 0; r < R; r += MR) {
            long rows = R - r < MR ? R - r : MR;
            for (long m = 0; m < rows; m++) x[m] = score + (r + m) * KEY_BLOCK;
            for (long d = 0; d < wide; d += NR) {
                const void *panel = values + d * KEY_BLOCK;
                tiles[FULL][rows](x, &panel, n, acc);
                for (long m = 0; m < rows; m++)
                    for (int v = 0; v < NV; v++) *(vf *)(sum + (r + m) * wide + d + v * VL) += acc[m][v];
            }
        }
    }
    for (long r = 0; r < R; r++) {
        float *out = a->mixed + ((token + r / G) * s->num_heads + head * G + r % G) * D;
        for (long d = 0; d < D; d++) out[d] = sum[r * wide + d] / total[r];
    }
}

static void attend_task(const void *job, long index) {
    const Attention *a = job;
    const Step *s = a->s;
    long K = s->num_kv_heads, unit = index / K, head = index % K, sequence = 0;
    while (a->first_task[sequence + 1] <= unit) sequence++;
    const int64_t *q = s->sequences + sequence * 4, *table = s->tables + q[3] * s->table_stride;
    long first = (unit - a->first_task[sequence]) * a->block;
    long count = q[1] - first < a->block ? q[1] - first : a->block;
    if (q[1] == 1 && (s->head_dim == 64 || s->head_dim == 128)) attend_token(a, table, q[0], head, q[2] + 1);
    else attend_block(a, table, q[0] + first, q[2] + first, count, head);
}

void wl_attention(Pool *pool, const AttentionLayer *layer, const Step *s, const float *x, float *out) {
    long T = s->num_tokens, H = layer->qkv.num_columns, Q = layer->qkv.num_rows, A = s->num_heads * s->head_dim;
    long *first_task = scratch(pool, (size_t)(s->num_sequences + 64) * sizeof(long) + (size_t)(T * (H + Q + A) + 64) * sizeof(float));
    long group = s->num_heads / s->num_kv_heads, block = group < QUERY_BLOCK ? QUERY_BLOCK / group : 1;
    first_task[0] = 0;
    for (long i = 0; i < s->num_sequences; i++)
        first_task[i + 1] = first_task[i] + (s->sequences[i * 4 + 1] + block - 1) / block;
    float *normed = (float *)(first_task + s->num_sequences + 8), *qkv = normed + T * H, *mixed = qkv + T * Q;
    Attention a = {s, layer, qkv, mixed, first_task, block};
    norm(pool, x, layer->norm_weight, normed, T, H, s->eps);
    dense(pool, &layer->qkv, NULL, normed, qkv, T);
    run(pool, rotate_task, &a, T, 8);
    run(pool, attend_task, &a, first_task[s->num_sequences] * s->num_kv_heads, 1);
    dense(pool, &layer->out, NULL, mixed, out, T);
}

/* ---- Gated MLP: norm, silu(gate) * up, down. ---- */

typedef struct { const float *norm_weight; Matrix gate, up, down; } MlpLayer;

void wl_mlp(Pool *pool, const MlpLayer *layer, const float *x, float *out, long num_tokens, float eps) {
    long H = layer->gate.num_columns, F = layer->gate.num_rows;
    float *normed = scratch(pool, (size_t)(num_tokens * (H + F)) * sizeof(float)), *hidden = normed + num_tokens * H;
    norm(pool, x, layer->norm_weight, normed, num_tokens, H, eps);
    dense(pool, &layer->gate, &layer->up, normed, hidden, num_tokens);
    dense(pool, &layer->down, NULL, hidden, out, num_tokens);
}

/* ---- Experts: norm, router, best choices, the experts hit as groups of one product, weighted sum. ---- */

typedef struct {
    const float *norm_weight;
    Matrix router;
    const Matrix *gate, *up, *down;
    long num_choices, first_expert, num_local;
    int64_t *tally; /* tokens that each expert of all ranks has got so far */
    /* Where hot experts have copies, else NULL: how many, and the local slot of each, `num_local` if elsewhere. */
    const int64_t *copies, *slots;
    long num_ranks;
} ExpertLayer;

/* The best `num_choices` logits of a token (lowest index of equals), which it overwrites, and their softmax.
 * A token without finite logits gets some expert; its share is then not a number. */
static void choose(float *logits, long count, long num_choices, int *choice, float *share) {
    float total = 0, top = 0;
    for (long c = 0; c < num_choices; c++) {
        long best = 0;
        for (long e = 1; e < count; e++)
            if (logits[e] > logits[best]) best = e;
        if (c == 0) top = logits[best];
        choice[c] = (int)best;
        share[c] = expf(logits[best] - top);
        total += share[c];
        logits[best] = -INFINITY;
    }
    for (long c = 0; c < num_choices; c++) share[c] /= total;
}

typedef struct { const int *place; const float *share, *y; float *out; long num_choices, size; } Combine;

static void combine_task(const void *job, long t) {
    const Combine *c = job;
    float *out = c->out + t * c->size;
    for (long i = 0; i < c->size; i++) out[i] = 0;
    for (long k = 0; k < c->num_choices; k++) {
        if (c->place[t * c->num_choices + k] < 0) continue;
        const float *y = c->y + (long)c->place[t * c->num_choices + k] * c->size, share = c->share[t * c->num_choices + k];
        for (long i = 0; i < c->size; i++) out[i] += share * y[i];
    }
}

/* Returns how many experts of all ranks were hit. */
long wl_experts(Pool *pool, const ExpertLayer *layer, const float *x, float *out, long num_tokens, float eps) {
    long H = layer->router.num_columns, X = layer->router.num_rows, F = layer->gate->num_rows, C = layer->num_choices;
    long M = num_tokens * C, E = layer->num_local, num_hit = 0, num_groups = 0, rows = 0;
    size_t words = (size_t)(num_tokens * (H + X) + M * (F + H + 4) + 2 * X + E + 64);
    long *begin = scratch(pool, (size_t)(E + 8) * sizeof(long) + words * sizeof(float));
    float *normed = (float *)(begin + E + 8), *logits = normed + num_tokens * H;
    float *hidden = logits + num_tokens * X, *y = hidden + M * F, *share = y + M * H;
    int *choice = (int *)(share + M), *token = choice + M, *place = token + M, *counts = place + M, *group = counts + X;
    norm(pool, x, layer->norm_weight, normed, num_tokens, H, eps);
    dense(pool, &layer->router, NULL, normed, logits, num_tokens);
    memset(counts, 0, (size_t)X * sizeof(int));
    for (long t = 0; t < num_tokens; t++) {
        choose(logits + t * X, X, C, choice + t * C, share + t * C);
        for (long c = 0; c < C; c++) counts[choice[t * C + c]]++;
    }
    for (long e = 0; e < X; e++) num_hit += counts[e] > 0, layer->tally[e] += counts[e];
    if (layer->copies) {
        /* From here on slots take the place of experts: token t goes to copy t % copies. */
        memset(counts, 0, (size_t)X * sizeof(int));
        for (long m = 0; m < M; m++) {
            choice[m] = (int)layer->slots[choice[m] * layer->num_ranks + m / C % layer->copies[choice[m]]];
            counts[choice[m]]++;
        }
    }
    for (long e = 0; e < X; e++) {
        long local = e - layer->first_expert;
        if (local < 0 || local >= E || !counts[e]) { counts[e] = -1; continue; }
        group[num_groups] = (int)local, begin[num_groups++] = rows;
        rows += counts[e], counts[e] = (int)begin[num_groups - 1];
    }
    begin[num_groups] = rows;
    for (long m = 0; m < M; m++) {
        place[m] = counts[choice[m]] < 0 ? -1 : counts[choice[m]]++;
        if (place[m] >= 0) token[place[m]] = (int)(m / C);
    }
    Product p = {.x = normed, .token = token, .y = hidden, .w = layer->gate, .up = layer->up, .group_matrix = group,
                 .begin = begin, .x_stride = H, .y_stride = F};
    product(pool, &p, num_groups, num_tokens);
    Product d = {.x = hidden, .y = y, .w = layer->down, .group_matrix = group, .begin = begin, .x_stride = F,
                 .y_stride = H};
    product(pool, &d, num_groups, num_tokens);
    Combine c = {place, share, y, out, C, H};
    run(pool, combine_task, &c, num_tokens, 4);
    return num_hit;
}

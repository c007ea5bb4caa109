/* Attention over pages: rotation and cache write, then one query of a sequence at a time (a decode step), or many.
 * Letters: T tokens, N query heads, K key/value heads, D head_dim, G = N/K, R = G x tokens.
 */
#ifndef WATTLINE_ATTENTION_H
#define WATTLINE_ATTENTION_H

#include <string.h>

#include "pool.h"
#include "products.h"
#include "vectors.h"

#if VL == 16
#define ROWS 8
#else
#define ROWS 4
#endif
#define QUERY_BLOCK 192 /* Queries of an attention task, and keys it looks at at a time. */
#define KEY_BLOCK 96
#define MAX_VECTORS (128 / VL) /* Of a head in attend_queries. */

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
    vf tops = (vf){0} - INFINITY;
    float top = -INFINITY;
    long j = 0;
    for (; j + VL <= count; j += VL) tops = greater(*(const vf *)(x + j), tops);
    for (int i = 0; i < VL; i++) top = tops[i] > top ? tops[i] : top;
    for (; j < count; j++) top = x[j] > top ? x[j] : top;
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

/* ---- Many queries: NR of them lie side by side in the lanes, so that nothing is transposed but the queries, and the
 * softmax needs no sums across lanes. Keys and values come in blocks that stay in the cache. ---- */

/* Queries of one KV head in panels: q and sum [panel][D][NR]; score [KEY_BLOCK][NR] is that of the panel at hand. */
typedef struct { float *keys, *values, *score, *q, *sum, *top, *total, *last; long wide, panels; } Block;

/* sum[m] (m < ROWS, NR lanes) of x[m * row + k * column] * panel[k]. */
INLINE void outer(const float *x, const long row, const long column, const float *panel, long count, vf (*sum)[NV]) {
    for (long k = 0; k < count; k++) {
        vf w[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) w[v] = *(const vf *)(panel + k * NR + v * VL);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) sum[m][v] += x[m * row + k * column] * w[v];
    }
}

/* Scores of `count` keys (of position `at` on) and their highest; with `is_edge`, those a query comes before are -INFINITY. */
INLINE void score_panel(const Block *b, const float *q, const float *last, long at, long count, const long D, const int is_edge, vf *best) {
    for (long j = 0; j < count; j += ROWS) {
        vf sum[ROWS][NV] = {0};
        outer(b->keys + j * D, D, 1, q, D, sum);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                if (is_edge) sum[m][v] = blend((vu)(*(const vf *)(last + v * VL) < (float)(at + j + m)), (vf){0} - INFINITY, sum[m][v]);
                best[v] = greater(sum[m][v], best[v]);
                *(vf *)(b->score + (j + m) * NR + v * VL) = sum[m][v];
            }
    }
}

/* One block of keys for one panel of queries: scores, running softmax, weighted values. */
INLINE void attend_panel(const Block *b, long panel, long at, long count, const long D) {
    float *sum = b->sum + panel * D * NR, *top = b->top + panel * NR, *total = b->total + panel * NR;
    vf best[NV], factor[NV], weights[NV];
    for (int v = 0; v < NV; v++) best[v] = *(vf *)(top + v * VL);
    const float *q = b->q + panel * D * NR, *last = b->last + panel * NR;
    if (at + (count + ROWS - 1) / ROWS * ROWS - 1 > last[0]) score_panel(b, q, last, at, count, D, 1, best);
    else score_panel(b, q, last, at, count, D, 0, best);
    for (int v = 0; v < NV; v++) {
        factor[v] = exponential(*(vf *)(top + v * VL) - best[v]), weights[v] = *(vf *)(total + v * VL) * factor[v];
        *(vf *)(top + v * VL) = best[v];
    }
    for (long j = 0; j < count; j++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            vf *score = (vf *)(b->score + j * NR + v * VL);
            weights[v] += *score = exponential(*score - best[v]);
        }
    for (int v = 0; v < NV; v++) *(vf *)(total + v * VL) = weights[v];
    for (long d = 0; d < D; d += ROWS) {
        vf part[ROWS][NV];
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) part[m][v] = *(vf *)(sum + (d + m) * NR + v * VL) * factor[v];
        outer(b->values + d, 1, D, b->score, count, part);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) *(vf *)(sum + (d + m) * NR + v * VL) = part[m][v];
    }
}

/* Copy keys and values from position `at` on, side by side; what lies beyond `count` is 0. */
INLINE void gather_block(const Attention *a, const Block *b, const int64_t *table, long at, long count, long head, const long D, const long wide) {
    const Step *s = a->s;
    long page = s->block_tokens, stride = s->num_kv_heads * D, rest = ((count + ROWS - 1) / ROWS * ROWS - count) * wide, j = 0;
    while (j < count) {
        long place = (at + j) % page, row = (table[(at + j) / page] * page + place) * stride + head * D;
        for (long end = j + page - place < count ? j + page - place : count; j < end; j++, row += stride) {
            memcpy(b->keys + j * wide, a->layer->keys + row, (size_t)D * sizeof(float));
            memcpy(b->values + j * wide, a->layer->values + row, (size_t)D * sizeof(float));
        }
    }
    memset(b->keys + count * wide, 0, (size_t)rest * sizeof(float));
    memset(b->values + count * wide, 0, (size_t)rest * sizeof(float));
}

/* `count` keys from position `at` on, for all queries of a block. */
INLINE void attend_keys(const Attention *a, const Block *b, const int64_t *table, long at, long count, long head, const long D, const long wide) {
    gather_block(a, b, table, at, count, head, D, wide);
    for (long panel = 0; panel < b->panels; panel++) {
        long visible = (long)b->last[panel * NR + NR - 1] + 1 - at;
        if (visible > 0) attend_panel(b, panel, at, visible < count ? visible : count, wide);
    }
}

#define ATTEND_KEYS(n, D, wide) static void attend_keys_##n(const Attention *a, const Block *b, const int64_t *t, long at, long count, long head) \
    { attend_keys(a, b, t, at, count, head, D, wide); }
ATTEND_KEYS(64, 64, 64) ATTEND_KEYS(128, 128, 128) ATTEND_KEYS(any, a->s->head_dim, b->wide)

static Block new_block(long D, long R) {
    Block b = {.wide = (D + ROWS - 1) / ROWS * ROWS, .panels = (R + NR - 1) / NR};
    long own_count = KEY_BLOCK * (2 * b.wide + NR) + b.panels * NR * (2 * b.wide + 3);
    b.keys = own_buffer(own_count);
    b.values = b.keys + KEY_BLOCK * b.wide, b.score = b.values + KEY_BLOCK * b.wide, b.q = b.score + KEY_BLOCK * NR;
    b.sum = b.q + b.panels * NR * b.wide, b.top = b.sum + b.panels * NR * b.wide;
    b.total = b.top + b.panels * NR, b.last = b.total + b.panels * NR;
    if (b.wide > D) memset(b.keys, 0, (size_t)(2 * KEY_BLOCK * b.wide) * sizeof(float));
    memset(b.q, 0, (size_t)(2 * b.panels * NR * b.wide) * sizeof(float));
    memset(b.total, 0, (size_t)(b.panels * NR) * sizeof(float));
    return b;
}

/* All queries of `count` tokens of a sequence and one KV head. */
static void attend_block(const Attention *a, const int64_t *table, long token, long position, long count, long head) {
    const Step *s = a->s;
    long G = s->num_heads / s->num_kv_heads, D = s->head_dim, R = count * G, length = position + count;
    Block b = new_block(D, R);
    for (long r = 0; r < b.panels * NR; r++) {
        b.top[r] = -INFINITY, b.last[r] = (float)(position + (r < R ? r : R - 1) / G);
        if (r >= R) continue;
        const float *from = a->qkv + ((token + r / G) * (s->num_heads + 2 * s->num_kv_heads) + head * G + r % G) * D;
        float *q = b.q + r / NR * NR * b.wide + r % NR;
        for (long d = 0; d < D; d++) q[d * NR] = from[d] * s->scale;
    }
    for (long at = 0; at < length; at += KEY_BLOCK)
        (D == 64 ? attend_keys_64 : D == 128 ? attend_keys_128 : attend_keys_any)(a, &b, table, at, length - at < KEY_BLOCK ? length - at : KEY_BLOCK, head);
    for (long r = 0; r < R; r++) {
        float *out = a->mixed + ((token + r / G) * s->num_heads + head * G + r % G) * D;
        const float *sum = b.sum + r / NR * NR * b.wide + r % NR;
        for (long d = 0; d < D; d++) out[d] = sum[d * NR] / b.total[r];
    }
}

/* Head by head, so that what sequences share is read while it is in the cache; the longest, which come last, first. */
static void attend_task(const void *job, long index) {
    const Attention *a = job;
    const Step *s = a->s;
    long units = a->first_task[s->num_sequences], head = index / units, unit = units - 1 - index % units, sequence = 0;
    while (a->first_task[sequence + 1] <= unit) sequence++;
    const int64_t *q = s->sequences + sequence * 4, *table = s->tables + q[3] * s->table_stride;
    long first = (unit - a->first_task[sequence]) * a->block;
    long count = q[1] - first < a->block ? q[1] - first : a->block;
    if (q[1] == 1 && (s->head_dim == 64 || s->head_dim == 128)) attend_token(a, table, q[0], head, q[2] + 1);
    else attend_block(a, table, q[0] + first, q[2] + first, count, head);
}

#endif

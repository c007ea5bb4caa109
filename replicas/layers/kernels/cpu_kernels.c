/* The CPU kernels of a decoder step, as Python calls them: products with packed weights, attention over pages, and
 * what lies between them, so that a layer is two calls. Compiled for this machine on first use (build.py), called
 * through ctypes (library.py), checked against the torch path by tests.
 *
 * Letters: T tokens, H hidden, N query heads, K key/value heads, D head_dim, F hidden columns.
 */
#include "attention.h"
#include "pool.h"
#include "products.h"
#include "vectors.h"

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

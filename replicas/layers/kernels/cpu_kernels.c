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

/* What a half layer reads: x, to which `scale` times `delta` of the one before is added first, unless that is NULL. */
typedef struct { float *x; const float *delta; float scale; long num_tokens, size; } Stream;

typedef struct { Stream from; const float *weight; float *y; float eps; } Norm;

static void add_task(const void *job, long row) {
    const Stream *s = job;
    float *x = s->x + row * s->size;
    const float *delta = s->delta + row * s->size;
    for (long i = 0; i < s->size; i++) x[i] += s->scale * delta[i];
}

static void norm_task(const void *job, long row) {
    const Norm *n = job;
    long size = n->from.size;
    const float *x = n->from.x + row * size;
    float *y = n->y + row * size;
    if (n->from.delta) add_task(&n->from, row);
    float scale = 1.0f / sqrtf(dot(x, x, size) / (float)size + n->eps);
    for (long i = 0; i < size; i++) y[i] = x[i] * scale * n->weight[i];
}

static void norm(Pool *pool, const Stream *from, const float *weight, float *y, float eps) {
    Norm n = {*from, weight, y, eps};
    run(pool, norm_task, &n, from->num_tokens, 8);
}

/* Logits of the vocabulary rows `w` over normed tokens. */
void wl_head(Pool *pool, const float *norm_weight, const Matrix *w, float *x, float *y, long num_tokens, float eps) {
    float *normed = scratch(pool, (size_t)(num_tokens * w->num_columns) * sizeof(float));
    Stream from = {.x = x, .num_tokens = num_tokens, .size = w->num_columns};
    norm(pool, &from, norm_weight, normed, eps);
    dense(pool, w, NULL, normed, y, num_tokens);
}

/* ---- The best of every row of logits: its value, not a number if one of the first `num_valid` is not finite, and the
 * first column that has it. ---- */

typedef struct { const float *x; long width, num_valid; float *best; int64_t *column; } Peaks;

static void peak_task(const void *job, long row) {
    const Peaks *p = job;
    const float *x = p->x + row * p->width;
    float top = highest(x, p->width), rest = 0;
    vf zeros = {0};
    long i = 0, at = 0;
    for (; i + VL <= p->num_valid; i += VL) zeros += *(const vf *)(x + i) * 0.0f;
    for (; i < p->num_valid; i++) rest += x[i] * 0.0f;
    int is_finite = lane_sum(zeros) + rest == 0.0f;
    while (is_finite && x[at] != top) at++;
    p->best[row] = is_finite ? top : NAN, p->column[row] = at;
}

void wl_peaks(Pool *pool, const float *x, long num_rows, long width, long num_valid, float *best, int64_t *column) {
    Peaks p = {x, width, num_valid, best, column};
    run(pool, peak_task, &p, num_rows, 4);
}

/* ---- Attention: norm, query/key/value, rotation and cache write, attention over pages, output. ---- */

static void attention(Pool *pool, const AttentionLayer *layer, const Step *s, const Stream *from, float *out) {
    long T = s->num_tokens, H = layer->qkv.num_columns, Q = layer->qkv.num_rows, A = s->num_heads * s->head_dim;
    long *first_task = scratch(pool, (size_t)(s->num_sequences + 64) * sizeof(long) + (size_t)(T * (H + Q + A) + 64) * sizeof(float));
    long group = s->num_heads / s->num_kv_heads, block = group < QUERY_BLOCK ? QUERY_BLOCK / group : 1;
    first_task[0] = 0;
    for (long i = 0; i < s->num_sequences; i++)
        first_task[i + 1] = first_task[i] + (s->sequences[i * 4 + 1] + block - 1) / block;
    float *normed = (float *)(first_task + s->num_sequences + 8), *qkv = normed + T * H, *mixed = qkv + T * Q;
    Attention a = {s, layer, qkv, mixed, first_task, block};
    norm(pool, from, layer->norm_weight, normed, s->eps);
    dense(pool, &layer->qkv, NULL, normed, qkv, T);
    run(pool, rotate_task, &a, T, 8);
    run(pool, attend_task, &a, first_task[s->num_sequences] * s->num_kv_heads, 1);
    dense(pool, &layer->out, NULL, mixed, out, T);
}

void wl_attention(Pool *pool, const AttentionLayer *layer, const Step *s, float *x, float *out) {
    Stream from = {.x = x, .num_tokens = s->num_tokens, .size = layer->qkv.num_columns};
    attention(pool, layer, s, &from, out);
}

/* ---- Gated MLP: norm, silu(gate) * up, down. ---- */

typedef struct { const float *norm_weight; Matrix gate, up, down; } MlpLayer;

static void mlp(Pool *pool, const MlpLayer *layer, const Stream *from, float *out, float eps) {
    long T = from->num_tokens, H = layer->gate.num_columns, F = layer->gate.num_rows;
    float *normed = scratch(pool, (size_t)(T * (H + F)) * sizeof(float)), *hidden = normed + T * H;
    norm(pool, from, layer->norm_weight, normed, eps);
    dense(pool, &layer->gate, &layer->up, normed, hidden, T);
    dense(pool, &layer->down, NULL, hidden, out, T);
}

void wl_mlp(Pool *pool, const MlpLayer *layer, float *x, float *out, long num_tokens, float eps) {
    Stream from = {.x = x, .num_tokens = num_tokens, .size = layer->gate.num_columns};
    mlp(pool, layer, &from, out, eps);
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
static long experts(Pool *pool, const ExpertLayer *layer, const Stream *from, float *out, float eps) {
    long H = layer->router.num_columns, X = layer->router.num_rows, F = layer->gate->num_rows, C = layer->num_choices;
    long num_tokens = from->num_tokens, M = num_tokens * C, E = layer->num_local, num_hit = 0, num_groups = 0, rows = 0;
    size_t words = (size_t)(num_tokens * (H + X) + M * (F + H + 4) + 2 * X + E + 64);
    long *begin = scratch(pool, (size_t)(E + 8) * sizeof(long) + words * sizeof(float));
    float *normed = (float *)(begin + E + 8), *logits = normed + num_tokens * H;
    float *hidden = logits + num_tokens * X, *y = hidden + M * F, *share = y + M * H;
    int *choice = (int *)(share + M), *token = choice + M, *place = token + M, *counts = place + M, *group = counts + X;
    norm(pool, from, layer->norm_weight, normed, eps);
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

long wl_experts(Pool *pool, const ExpertLayer *layer, float *x, float *out, long num_tokens, float eps) {
    Stream from = {.x = x, .num_tokens = num_tokens, .size = layer->router.num_columns};
    return experts(pool, layer, &from, out, eps);
}

/* ---- All layers of a rank that shares none of them with others. ---- */

/* One of `mlp` and `experts` is NULL. */
typedef struct { const AttentionLayer *attention; const MlpLayer *mlp; const ExpertLayer *experts; } Layer;

/* x becomes what the last layer gives; `delta` is as large, and free to use. Returns how many experts were hit. */
long wl_layers(Pool *pool, const Layer *layers, long num_layers, const Step *s, float *x, float *delta, float scale) {
    Stream from = {.x = x, .scale = scale, .num_tokens = s->num_tokens, .size = layers->attention->qkv.num_columns};
    long num_hit = 0;
    for (const Layer *layer = layers; layer < layers + num_layers; layer++) {
        attention(pool, layer->attention, s, &from, delta);
        from.delta = delta;
        if (layer->mlp) mlp(pool, layer->mlp, &from, delta, s->eps);
        else num_hit += experts(pool, layer->experts, &from, delta, s->eps);
    }
    run(pool, add_task, &from, s->num_tokens, 8);
    return num_hit;
}

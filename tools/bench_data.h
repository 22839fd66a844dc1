/* bench_data.h - what bench.c and bench_peers.c time, and what it must give: DeepSeek-V3.2's shapes, random rows, queries and weights, and
   the formulas written down a second time, in double precision - public domain or MIT, like dsa.h */
#ifndef BENCH_DATA_H_INCLUDED
#define BENCH_DATA_H_INCLUDED

#include "bench.h"

enum { H = 128, R = 512, ROPE = 64, WIDTH = R + ROPE, HI = 64, D = 128, TOP_K = 2048,
       HIDDEN = 7168, Q_LORA = 1536, NOPE = 128, V = 128 };

static const char *const format_names[] = { "f32", "bf16", "f16", "fp8", "int8" };   /* by dsa_type */

/* 1 if the list "a,b" has the name, or there is no list */
static inline int in_list(const char *list, const char *name)
{
    size_t n = strlen(name);
    if (!list) return 1;
    for (; *list; list += strcspn(list, ","), list += *list == ',')
        if (strcspn(list, ",") == n && strncmp(list, name, n) == 0) return 1;
    return 0;
}

/* Every call of the library must succeed. */
static inline void must(const dsa_ctx *ctx, dsa_status status, const char *call)
{
    char text[512];
    if (status == DSA_OK) return;
    snprintf(text, sizeof text, ": %s (%s)", dsa_status_text(status), ctx->config.detail ? ctx->config.detail : "");
    die(status == DSA_ERR_MEMORY || status == DSA_ERR_UNSUPPORTED ? 2 : 1, call, text);
}

/* A check that failed, with up to three numbers. */
static inline void wrong(const char *what, const char *format, double a, double b, double c)
{
    char text[256];
    snprintf(text, sizeof text, format, a, b, c);
    die(1, what, text);
}

/* ---- caches ------------------------------------------------------------------------------------------------------------------ */
/* Appends Gaussian rows until the cache has len. Row i holds the same numbers whatever the format rounds them to. */
static inline void grow_cache(const dsa_ctx *ctx, dsa_cache *c, int64_t len)
{
    int64_t width = c->dim + c->dim_rope;
    float *x = (float *)take((size_t)width, sizeof *x);
    while (c->len < len) {
        rng r = { (uint64_t)c->len * 31 + 77 };
        dsa_seq seq = { .latent = c->kind == DSA_LATENT ? c : NULL, .index = c->kind == DSA_INDEX_KEY ? c : NULL, .n_q = 1 };
        dsa_append_args args = { .n_seqs = 1, .seqs = &seq };
        if (c->kind == DSA_LATENT) args.latent = x;
        else args.index_key = x;
        random_normals(&r, x, width, 1.0f);
        must(ctx, dsa_append(ctx, &args), "dsa_append");
    }
    free(x);
}

static inline void make_cache(const dsa_ctx *ctx, dsa_kind kind, dsa_type format, int32_t page_size, int64_t capacity, dsa_cache *c)
{
    dsa_cache_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.kind = kind;
    desc.format = format;
    desc.capacity = capacity;
    desc.page_size = page_size;
    must(ctx, dsa_cache_create(ctx, &desc, c), "dsa_cache_create");
}

/* Copies of one cache, as many as it takes for a turn to find its rows cold. */
typedef struct rows { dsa_cache *copy; int32_t n; dsa_type format; int64_t len; } rows;

static inline size_t row_bytes(dsa_kind kind, dsa_type format)
{
    size_t bytes = 0;
    if (dsa_row_bytes(kind, format, kind == DSA_LATENT ? R : D, kind == DSA_LATENT ? ROPE : 0, &bytes) != DSA_OK) die(1, "dsa_row_bytes", "");
    return bytes;
}

static inline void rows_free(rows *r)
{
    for (int32_t i = 0; i < r->n; i++) dsa_cache_destroy(&r->copy[i]);
    free(r->copy);
    memset(r, 0, sizeof *r);
}

/* cold: bytes that the copies together must exceed. */
static inline void rows_make(const dsa_ctx *ctx, dsa_kind kind, dsa_type format, int32_t page_size, int64_t len, size_t cold, rows *r)
{
    if (r->n > 0 && r->format == format && r->len == len) return;
    rows_free(r);
    r->n = 1 + (int32_t)(cold / ((size_t)len * row_bytes(kind, format)));
    r->copy = (dsa_cache *)take((size_t)r->n, sizeof *r->copy);
    r->format = format;
    r->len = len;
    make_cache(ctx, kind, format, page_size, len, &r->copy[0]);
    grow_cache(ctx, &r->copy[0], len);
    for (int32_t i = 1; i < r->n; i++) {
        dsa_cache *c = &r->copy[i];
        make_cache(ctx, kind, format, page_size, len, c);
        memcpy(c->data, r->copy[0].data, (size_t)c->n_pages * c->page_stride);
        c->len = len;
        must(ctx, dsa_cache_check(ctx, c), "dsa_cache_check");
    }
}

/* ---- queries ----------------------------------------------------------------------------------------------------------------- */
static inline float *normals(uint64_t seed, int64_t n, float deviation)
{
    float *x = (float *)take((size_t)n, sizeof *x);
    rng r = { seed };
    random_normals(&r, x, n, deviation);
    return x;
}
static inline float *index_queries(int64_t n) { return normals(5, n * HI * D, 1.0f); }
static inline float *index_weights(int64_t n) { return normals(7, n * HI, 0.01104854f); }        /* (HI D)^-0.5 in it */

/* Rounded to bf16, as a model hands them over, and small enough for a softmax over many rows instead of one. */
static inline float *attention_queries(int64_t n)
{
    float *q = normals(6, n * H * WIDTH, 0.3f);
    for (int64_t i = 0; i < n * H * WIDTH; i++) q[i] = dsa_bf16_to_f32(dsa_f32_to_bf16(q[i]));
    return q;
}

/* One index query as the keys' format rounds it (contracts: both sides alike): [HI, D] as numbers, in `codes` what FP8 and INT8 store,
   in `scales` [HI] what a code is multiplied by. codes and scales optional. */
static inline void round_index_query(const dsa_cache *keys, const float *q, double *rounded, uint8_t *codes, float *scales)
{
    for (int h = 0; h < HI; h++) {
        float head[D], scale = 1;
        uint8_t code[D];
        memcpy(head, q + h * D, sizeof head);
        if (keys->hadamard) dsa_hadamard_rows(head, 1, D, D);
        if (keys->format == DSA_FP8) scale = dsa_quantize_e4m3(head, D, code);
        if (keys->format == DSA_INT8) scale = dsa_quantize_int8(head, D, (int8_t *)code);
        for (int d = 0; d < D; d++) {
            float x = head[d];
            if (keys->format == DSA_BF16) x = dsa_bf16_to_f32(dsa_f32_to_bf16(x));
            if (keys->format == DSA_FP8) x = dsa_e4m3_to_f32(code[d]);
            if (keys->format == DSA_INT8) x = (float)(int8_t)code[d];
            rounded[h * D + d] = (double)scale * (double)x;
        }
        if (codes) memcpy(codes + h * D, code, sizeof code);
        if (scales) scales[h] = scale;
    }
}

/* ---- the layer's weights ------------------------------------------------------------------------------------------------------- */
enum { W_Q_A, W_Q_B, W_KV_A, W_KV_B, W_O, W_INDEX_Q_B, W_INDEX_K, W_INDEX_W, N_WEIGHTS };
static const struct { int64_t out, in; } shapes[N_WEIGHTS] = {
    { Q_LORA, HIDDEN }, { H * (NOPE + ROPE), Q_LORA }, { WIDTH, HIDDEN }, { H * (NOPE + V), R }, { HIDDEN, H * V },
    { HI * D, Q_LORA }, { D, HIDDEN }, { HI, HIDDEN } };

typedef struct layer_data {
    dsa_tensor w[N_WEIGHTS];
    float gain[4][Q_LORA];          /* q_a_norm, kv_a_norm, index_k_norm, index_k_bias */
    dsa_layer_weights weights;      /* the same as dsa_layer takes them */
    dsa_cache latent, index;        /* in the format of the weights */
    double bytes;                   /* of all weights */
} layer_data;

static inline size_t type_bytes(dsa_type t) { return t == DSA_F32 ? 4 : t == DSA_FP8 ? 1 : 2; }
static inline double layer_parameters(void)
{
    double n = 0;
    for (int i = 0; i < N_WEIGHTS; i++) n += (double)(shapes[i].out * shapes[i].in);
    return n;
}

/* Values of variance 1/in. A million are drawn and then repeated: their number is odd, so that no two rows are equal. */
static inline dsa_tensor random_tensor(rng *r, dsa_type format, int64_t out, int64_t in, int huge)
{
    enum { DRAWN = 1000003 };
    size_t n = (size_t)(out * in), e = type_bytes(format), blocks = (size_t)((out + 127) / 128 * ((in + 127) / 128));
    float deviation = 1.0f / sqrtf((float)in), *drawn = (float *)take(DRAWN, sizeof *drawn), *scale = NULL;
    unsigned char *data = (unsigned char *)map_bytes(n * e, huge);
    dsa_tensor t;
    if (!data) die(2, "out of memory for the layer's weights", "");
    random_normals(r, drawn, DRAWN, 1.0f);
    for (size_t i = 0; i < DRAWN && i < n; i++) {
        float x = drawn[i] * deviation;
        uint16_t y = dsa_f32_to_bf16(x);
        if (format == DSA_F32) memcpy(data + 4 * i, &x, 4);
        else if (format == DSA_BF16) memcpy(data + 2 * i, &y, 2);
        else data[i] = dsa_f32_to_e4m3(drawn[i] * 64);
    }
    for (size_t done = DRAWN; done < n; done += DRAWN) memcpy(data + done * e, data, (n - done < DRAWN ? n - done : DRAWN) * e);
    if (format == DSA_FP8) {
        scale = (float *)take(blocks, sizeof *scale);
        for (size_t i = 0; i < blocks; i++) scale[i] = deviation / 64 * (0.75f + 0.5f * (float)random_below(r, 1000) / 1000);
    }
    free(drawn);
    t.data = data;
    t.type = format;
    t.scale_inv = scale;
    return t;
}

static inline dsa_tensor gain_tensor(const float *x)
{
    dsa_tensor t = { x, DSA_F32, NULL };
    return t;
}

static inline void layer_make(const dsa_ctx *ctx, dsa_type format, int32_t page_size, int64_t capacity, int huge, layer_data *l)
{
    dsa_layer_weights *w = &l->weights;
    rng r = { 17 };
    memset(l, 0, sizeof *l);
    for (int i = 0; i < N_WEIGHTS; i++) {
        l->w[i] = random_tensor(&r, format, shapes[i].out, shapes[i].in, huge);
        l->bytes += (double)(shapes[i].out * shapes[i].in) * (double)type_bytes(format);
    }
    for (int i = 0; i < 4; i++) {
        random_normals(&r, l->gain[i], Q_LORA, 0.1f);
        for (int j = 0; j < Q_LORA && i < 3; j++) l->gain[i][j] += 1;
    }
    w->q_a = l->w[W_Q_A];
    w->q_b = l->w[W_Q_B];
    w->kv_a = l->w[W_KV_A];
    w->kv_b = l->w[W_KV_B];
    w->o = l->w[W_O];
    w->index_q_b = l->w[W_INDEX_Q_B];
    w->index_k = l->w[W_INDEX_K];
    w->index_w = l->w[W_INDEX_W];
    w->q_a_norm = gain_tensor(l->gain[0]);
    w->kv_a_norm = gain_tensor(l->gain[1]);
    w->index_k_norm = gain_tensor(l->gain[2]);
    w->index_k_bias = gain_tensor(l->gain[3]);
    make_cache(ctx, DSA_LATENT, format, page_size, capacity, &l->latent);
    make_cache(ctx, DSA_INDEX_KEY, format, page_size, capacity, &l->index);
}

static inline void layer_free(layer_data *l)
{
    for (int i = 0; i < N_WEIGHTS; i++) {
        unmap_bytes((void *)(uintptr_t)l->w[i].data);
        free((void *)(uintptr_t)l->w[i].scale_inv);
    }
    dsa_cache_destroy(&l->latent);
    dsa_cache_destroy(&l->index);
}

/* Row o of a weight as f32. */
static inline void weight_row(const dsa_tensor *w, int64_t in, int64_t o, float *row)
{
    const unsigned char *p = (const unsigned char *)w->data + (size_t)(o * in) * type_bytes(w->type);
    float e4m3[256];
    if (w->type == DSA_F32) { memcpy(row, p, (size_t)in * 4); return; }
    for (int i = 0; w->type == DSA_FP8 && i < 256; i++) e4m3[i] = dsa_e4m3_to_f32((uint8_t)i);
    for (int64_t i = 0; i < in; i++) {
        uint16_t y;
        if (w->type == DSA_FP8) { row[i] = e4m3[p[i]] * w->scale_inv[o / 128 * ((in + 127) / 128) + i / 128]; continue; }
        memcpy(&y, p + 2 * i, 2);
        row[i] = dsa_bf16_to_f32(y);
    }
}

/* ---- the formulas a second time, in double --------------------------------------------------------------------------------------- */
static inline double dot(const double *a, const float *x, int64_t n)   /* n: a multiple of 8, as all of V3.2's widths are */
{
    double s[8] = { 0 };
    for (int64_t i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++) s[j] += a[i + j] * (double)x[i + j];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

/* 1 - 2<a,b> / (|a|^2 + |b|^2), written so that equal vectors give 0 and not its rounding; NaN anywhere gives 2 */
static inline double distance(const float *a, const double *b, int64_t n)
{
    double difference = 0, size = 1e-300;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)a[i] * (double)a[i] + b[i] * b[i];
    }
    return difference / size <= 2 ? difference / size : 2;
}

/* One query's list against the scores in double of the same rounded values: a row of the list must score at least what a row that was left
   out does, but for 8 2^-24 of the sum of magnitudes, and `slack` of the same. (A proof would need (D + HI) 2^-24, which lets f16 dot products
   pass; f32 sums of random terms lose less than 2.) Looks at the whole list and at up to 8192 other rows. scores, optional: those that came
   with the list must be as near. */
static inline void check_selection(const dsa_ctx *ctx, const char *name, const dsa_cache *keys, const float *q, const float *w,
                                   const int32_t *list, const float *scores, int64_t visible, double slack)
{
    enum { MOST = 8192 };
    static double rounded[HI * D], sizes[HI * D];
    double least = HUGE_VAL;                                 /* of the list's scores, each with its bound added */
    int64_t k = visible < TOP_K ? visible : TOP_K, others = visible - k < MOST ? visible - k : MOST, next = 0;
    rng r = { 9 };
    round_index_query(keys, q, rounded, NULL, NULL);
    for (int i = 0; i < HI * D; i++) sizes[i] = fabs(rounded[i]);
    for (int64_t i = 0; i < TOP_K; i++)
        if (i < k ? list[i] < 0 || list[i] >= visible || (i > 0 && list[i] <= list[i - 1]) : list[i] != -1)
            wrong(name, ": entry %.0f of the list is %.0f, of %.0f visible rows", (double)i, (double)list[i], (double)visible);
    for (int64_t i = 0; i < k + others;) {
        float key[D], size[D];
        double score = 0, bound = 0;
        int64_t s = i < k ? list[i] : others < MOST ? next++ : random_below(&r, visible), low = 0, high = k;
        while (i >= k && low < high) { if (list[(low + high) / 2] < s) low = (low + high) / 2 + 1; else high = (low + high) / 2; }
        if (i >= k && low < k && list[low] == s) continue;   /* it is in the list after all */
        must(ctx, dsa_cache_read(ctx, keys, s, s + 1, key), "dsa_cache_read");
        for (int d = 0; d < D; d++) size[d] = fabsf(key[d]);
        for (int h = 0; h < HI; h++) {
            score += (double)w[h] * fmax(dot(rounded + h * D, key, D), 0);
            bound += fabs((double)w[h]) * dot(sizes + h * D, size, D) * (8 * 0x1p-24 + slack);
        }
        if (i < k && scores && !(fabs((double)scores[i] - score) <= bound))
            wrong(name, ": row %.0f scores %.9g, the list says %.9g", (double)s, score, (double)scores[i]);
        if (i < k) least = fmin(least, score + bound);
        else if (!(score - bound <= least)) wrong(name, ": row %.0f scores %.9g and was left out, the list goes down to %.9g", (double)s, score, least);
        i++;
    }
}

/* Attention of one head over the listed rows (NULL: rows 0 .. n-1). out [R] */
static inline void attend_f64(const dsa_ctx *ctx, const dsa_cache *latents, const double *q, const int32_t *list, int64_t n, double *out)
{
    double max = -HUGE_VAL, sum = 0;
    memset(out, 0, R * sizeof *out);
    for (int64_t i = 0; i < n; i++) {
        int64_t s = list ? list[i] : i;
        float row[WIDTH];
        double x, p;
        must(ctx, dsa_cache_read(ctx, latents, s, s + 1, row), "dsa_cache_read");
        x = (double)ctx->config.softmax_scale * dot(q, row, WIDTH);
        if (x > max) {
            double shrink = exp(max - x);
            sum *= shrink;
            for (int d = 0; d < R; d++) out[d] *= shrink;
            max = x;
        }
        p = exp(x - max);
        sum += p;
        for (int d = 0; d < R; d++) out[d] += p * (double)row[d];
    }
    for (int d = 0; d < R; d++) out[d] /= sum;
}

/* How far outputs may be (spec 9): f32 rounding where every product is f32, FlashMLA's decode tolerance where P is rounded to bf16. */
static inline double allowed_distance(const dsa_ctx *ctx, dsa_type format)
{
    return format == DSA_F32 || dsa_query_isa(ctx) == DSA_ISA_SCALAR ? 1e-10 : 5e-6;
}

/* Three heads of one query. q [H, WIDTH], out [H, R] */
static inline void check_attention(const dsa_ctx *ctx, const char *name, const dsa_cache *latents, const float *q, const int32_t *list,
                                   int64_t n, const float *out)
{
    static const int heads[] = { 0, 61, H - 1 };
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        const float *got = out + heads[i] * R;
        double wide[WIDTH], want[R], far, limit = allowed_distance(ctx, latents->format);
        for (int d = 0; d < WIDTH; d++) wide[d] = (double)q[heads[i] * WIDTH + d];
        attend_f64(ctx, latents, wide, list, n, want);
        far = distance(got, want, R);
        if (!(far <= limit)) wrong(name, ": head %.0f is off by %.3g (1 - similarity; allowed %.3g)", heads[i], far, limit);
        for (int d = 0; d < R; d++) {
            double error = fabs((double)got[d] - want[d]);
            if (!(error < 1e-3 || error < 2.01 / 128 * fabs(want[d]))) wrong(name, ": head %.0f has %.9g instead of %.9g", heads[i], (double)got[d], want[d]);
        }
    }
}

/* ---- the layer in double (spec 2, 3.1) ---------------------------------------------------------------------------------------------- */
/* y = W[first .. first + n) x */
static inline void project(const layer_data *l, int which, int64_t first, int64_t n, const double *x, double *y)
{
    float row[H * V];
    for (int64_t o = 0; o < n; o++) {
        weight_row(&l->w[which], shapes[which].in, first + o, row);
        y[o] = dot(x, row, shapes[which].in);
    }
}
static inline void rms_f64(double *x, int64_t n, const float *gain, double eps)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    for (int64_t i = 0; i < n; i++) x[i] *= (double)gain[i] / sqrt(sum / (double)n + eps);
}
static inline void rotate_f64(double *x, dsa_rope rope, double position)
{
    double f[WIDTH];
    int n = rope.width, half = rope.layout == DSA_ROPE_HALF;
    dsa_rope_frequencies(&rope, f);
    for (int i = 0; i < n / 2; i++) {
        double *u = x + rope.offset + (half ? i : 2 * i), *v = half ? u + n / 2 : u + 1;
        double c = cos(position * f[i]), s = sin(position * f[i]), turned = *u * c - *v * s;
        *v = *u * s + *v * c;
        *u = turned;
    }
}

static inline void check_row(const dsa_ctx *ctx, const char *what, const dsa_cache *c, int64_t at, const double *want)
{
    static const double limits[] = { 1e-10, 5e-6, 0, 1e-3, 1e-4 };   /* what rounding to the format moves a row by, and some; by dsa_type */
    float row[WIDTH];
    double far;
    must(ctx, dsa_cache_read(ctx, c, at, at + 1, row), "dsa_cache_read");
    far = distance(row, want, c->dim + c->dim_rope);
    if (!(far <= limits[c->format])) wrong(what, " of row %.0f is off by %.3g (1 - similarity; allowed %.3g)", (double)at, far, limits[c->format]);
}

/* The row at `at`, the last of a call: what was appended, what was selected (list NULL: dense), and 64 of the outputs. x, y [HIDDEN].
   The projected index queries differ in their last f32 bits, so one of their e4m3 or int8 values may fall to the other side: the selection
   gets slack for that. The attention's q is rounded to bf16 where P is: 4 times its tolerance. */
static inline void check_layer(const dsa_ctx *ctx, const layer_data *l, const float *x32, int64_t at, const int32_t *list, const float *y)
{
    static double x[HIDDEN], qr[Q_LORA], kv[WIDTH], k[D], iq[HI * D], iw[HI], q[NOPE + ROPE], wide[WIDTH], o_lat[R], o[H * V], want[64];
    static float iq32[HI * D], iw32[HI], row[R], got[64], rotated[D];
    const dsa_config *c = &ctx->config;
    double mean = 0, variance = 0, far, limit = 4 * allowed_distance(ctx, l->latent.format);
    for (int i = 0; i < HIDDEN; i++) x[i] = (double)x32[i];
    project(l, W_Q_A, 0, Q_LORA, x, qr);
    rms_f64(qr, Q_LORA, l->gain[0], (double)c->norm_eps);
    project(l, W_KV_A, 0, WIDTH, x, kv);
    rms_f64(kv, R, l->gain[1], (double)c->norm_eps);
    rotate_f64(kv, dsa_config_rope(ctx, WIDTH), (double)at);
    check_row(ctx, "layer: the latent", &l->latent, at, kv);
    project(l, W_INDEX_K, 0, D, x, k);
    for (int i = 0; i < D; i++) mean += k[i] / D;
    for (int i = 0; i < D; i++) variance += (k[i] - mean) * (k[i] - mean) / D;
    for (int i = 0; i < D; i++) k[i] = (k[i] - mean) / sqrt(variance + (double)c->index_norm_eps) * (double)l->gain[2][i] + (double)l->gain[3][i];
    rotate_f64(k, dsa_config_index_rope(ctx), (double)at);
    for (int i = 0; i < D; i++) rotated[i] = (float)k[i];
    if (l->index.hadamard) dsa_hadamard_rows(rotated, 1, D, D);
    for (int i = 0; i < D; i++) k[i] = (double)rotated[i];
    check_row(ctx, "layer: the index key", &l->index, at, k);
    if (list) {
        project(l, W_INDEX_Q_B, 0, HI * D, qr, iq);
        project(l, W_INDEX_W, 0, HI, x, iw);
        for (int h = 0; h < HI; h++) {
            rotate_f64(iq + h * D, dsa_config_index_rope(ctx), (double)at);
            iw32[h] = (float)(iw[h] / sqrt((double)HI * D));
        }
        for (int i = 0; i < HI * D; i++) iq32[i] = (float)iq[i];
        check_selection(ctx, "layer", &l->index, iq32, iw32, list, NULL, at + 1, 1e-4);
    }
    for (int h = 0; h < H; h++) {
        project(l, W_Q_B, h * (NOPE + ROPE), NOPE + ROPE, qr, q);
        rotate_f64(q, dsa_config_rope(ctx, NOPE + ROPE), (double)at);
        memset(wide, 0, sizeof wide);
        for (int i = 0; i < NOPE; i++) {                     /* q_lat = W_UK^T q_nope */
            weight_row(&l->w[W_KV_B], R, h * (NOPE + V) + i, row);
            for (int j = 0; j < R; j++) wide[j] += q[i] * (double)row[j];
        }
        memcpy(wide + R, q + NOPE, ROPE * sizeof *q);
        attend_f64(ctx, &l->latent, wide, list, list && at + 1 > TOP_K ? TOP_K : at + 1, o_lat);
        project(l, W_KV_B, h * (NOPE + V) + NOPE, V, o_lat, o + h * V);
    }
    for (int i = 0; i < 64; i++) {
        int64_t channel = (int64_t)i * (HIDDEN / 64) + i;
        project(l, W_O, channel, 1, o, &want[i]);
        got[i] = y[channel];
    }
    far = distance(got, want, 64);
    if (!(far <= limit)) wrong("layer", ": y of row %.0f is off by %.3g (1 - similarity; allowed %.3g)", (double)at, far, limit);
}

#endif /* BENCH_DATA_H_INCLUDED */

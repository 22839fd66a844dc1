/* What the tests of caches, attention, step and layer share: memory that is given back at once, random numbers, comparisons,
   double-precision rounding of the cache formats, and the calls wrapped with their workspace. */
#ifndef DSA_TESTS_FIXTURE_H
#define DSA_TESTS_FIXTURE_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "../dsa.h"
#include "harness.h"

/* The call gives this status; on failure both are printed by their texts. */
#define IS(WANT, CALL) \
    do { dsa_status is_want = (WANT), is_got = (CALL); \
         if (is_got != is_want) { \
             printf("\n  expected \"%s\", got \"%s\"", dsa_status_text(is_want), dsa_status_text(is_got)); \
             FAILm(#CALL); } } while (0)
#define OK(CALL) IS(DSA_OK, CALL)
/* One case of a parametrised test, reported as TEST_NAME. */
#define CASE(NAME, TEST_, ...) do { greatest_set_test_suffix(NAME); RUN_TESTp(TEST_, __VA_ARGS__); } while (0)
/* |error| <= bound, and the figure is printed if not. */
#define WITHIN(BOUND, ERROR) ASSERT_IN_RANGE(0, ERROR, BOUND)

/* The ISA that the running suite is forced to; main runs the suites once for each that this build and this CPU have. */
extern dsa_isa test_isa;

/* ---- memory: every block has its exact size, so that a sanitizer sees one element too many ---- */
typedef struct bag { void **block; size_t n; } bag;

static inline void *bag_alloc(bag *b, size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    if ((b->n & (b->n - 1)) == 0) b->block = (void **)realloc(b->block, (b->n ? 2 * b->n : 1) * sizeof *b->block);
    if (p == NULL || b->block == NULL) { fprintf(stderr, "test set-up: out of memory\n"); abort(); }
    b->block[b->n++] = p;
    return p;
}
/* Gives back what came after the first `keep` blocks. */
static inline void bag_shrink(bag *b, size_t keep) { while (b->n > keep) free(b->block[--b->n]); }
static inline void bag_free(bag *b)
{
    bag_shrink(b, 0);
    free(b->block);
    b->block = NULL;
}
#define END(b) do { bag_free(&(b)); PASS(); } while (0)

static inline float   *floats(bag *b, int64_t n) { return (float *)bag_alloc(b, (size_t)n * sizeof(float)); }
static inline int32_t *ints(bag *b, int64_t n)   { return (int32_t *)bag_alloc(b, (size_t)n * sizeof(int32_t)); }
static inline int64_t *longs(bag *b, int64_t n)  { return (int64_t *)bag_alloc(b, (size_t)n * sizeof(int64_t)); }
static inline double  *doubles(bag *b, int64_t n){ return (double *)bag_alloc(b, (size_t)n * sizeof(double)); }

/* Workspace as hostile as the contract allows: odd address, full of NaN. */
static inline void *work(bag *b, size_t bytes)
{
    unsigned char *p = (unsigned char *)bag_alloc(b, bytes + 1);
    memset(p, 0xFF, bytes + 1);
    return p + 1;
}

/* ---- random numbers ------------------------------------------------------------------------ */
static inline uint32_t rnd(uint64_t *s)     /* xorshift64*, high half */
{
    *s ^= *s >> 12; *s ^= *s << 25; *s ^= *s >> 27;
    return (uint32_t)((*s * UINT64_C(2685821657736338717)) >> 32);
}
static inline int32_t rnd_below(uint64_t *s, int32_t n) { return (int32_t)(rnd(s) % (uint32_t)n); }
static inline float rnd_unit(uint64_t *s) { return (float)((double)rnd(s) / 2147483648.0 - 1.0); }   /* [-1, 1) */
static inline float *random_floats(bag *b, int64_t n, uint64_t seed, float size)
{
    float *x = floats(b, n);
    uint64_t s = seed * 7919 + 12345;
    for (int64_t i = 0; i < n; i++) x[i] = size * rnd_unit(&s);
    return x;
}
static inline void shuffle(int32_t *x, int32_t n, uint64_t seed)
{
    uint64_t s = seed * 104729 + 99;
    for (int32_t i = n - 1; i > 0; i--) { int32_t j = rnd_below(&s, i + 1), t = x[i]; x[i] = x[j]; x[j] = t; }
}
/* n page numbers out of [0, pool), each once, in random order. */
static inline int32_t *page_table(bag *b, int32_t n, int32_t pool, uint64_t seed)
{
    int32_t *all = ints(b, pool);
    for (int32_t i = 0; i < pool; i++) all[i] = i;
    shuffle(all, pool, seed);
    int32_t *t = ints(b, n);
    memcpy(t, all, (size_t)n * sizeof *t);
    return t;
}

/* ---- comparisons --------------------------------------------------------------------------- */
static inline int same_bits(const void *a, const void *b, int64_t n_floats) { return memcmp(a, b, (size_t)n_floats * 4) == 0; }
/* Largest |a - b| / max(1, |b|); infinite unless infinities and NaN stand at equal places. */
static inline double max_error(const float *a, const double *b, int64_t n)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        double e;
        if (isfinite(a[i]) && isfinite(b[i])) e = fabs((double)a[i] - b[i]) / fmax(1.0, fabs(b[i]));
        else e = (isinf(a[i]) && isinf(b[i]) && (a[i] > 0) == (b[i] > 0)) ? 0.0 : (double)INFINITY;
        if (e > worst) worst = e;
    }
    return worst;
}
static inline double max_error_f(const float *a, const float *b, int64_t n)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        double one = (double)b[i], e = max_error(&a[i], &one, 1);
        if (e > worst) worst = e;
    }
    return worst;
}

/* ---- the cache formats once more, in double and by searching instead of bit tricks ----------- */
static inline double e4m3_value(int code)   /* 0 .. 126 */
{
    int e = code >> 3, m = code & 7;
    return e == 0 ? ldexp(m, -9) : ldexp(8 + m, e - 10);
}
static inline uint8_t ref_e4m3(double x)    /* nearest, ties to the even code, saturating */
{
    double a = fabs(x), best = INFINITY;
    int code = 0;
    for (int c = 0; c <= 126; c++) {
        double d = fabs(e4m3_value(c) - a);
        if (d < best || (d == best && c % 2 == 0)) { best = d; code = c; }
    }
    return (uint8_t)(code | (signbit(x) ? 0x80 : 0));
}
static inline double ref_from_e4m3(uint8_t c) { return (c & 0x80 ? -1 : 1) * e4m3_value(c & 0x7F); }
static inline float ref_bf16(float x)       /* nearest bf16, ties to even, of a finite x */
{
    if (x == 0) return x;
    int e;
    (void)frexp((double)x, &e);
    double ulp = ldexp(1, (e < -125 ? -125 : e) - 8), q = (double)x / ulp, f = floor(q), d = q - f;
    if (d > 0.5 || (d == 0.5 && fmod(f, 2) != 0)) f += 1;
    return (float)(f * ulp);
}
static inline float ref_pow2_ceil(double x) { double p = ldexp(1, -140); while (p < x) p *= 2; return (float)p; }
static inline float ref_amax(const float *x, int32_t n)
{
    float m = 0;
    for (int32_t i = 0; i < n; i++) if (fabsf(x[i]) > m) m = fabsf(x[i]);
    return m;
}
/* FlashMLA row: e4m3 latent, a power-of-two f32 scale per 128 with (amax / 448) >= 1e-4, bf16 rope. */
static inline void ref_fp8_latent(const float *row, int32_t R, int32_t r, uint8_t *bytes)
{
    int32_t tiles = (R + 127) / 128;
    for (int32_t t = 0; t < tiles; t++) {
        int32_t n = R - t * 128 < 128 ? R - t * 128 : 128;
        float s = ref_pow2_ceil(fmax((double)ref_amax(row + t * 128, n) / 448.0, 1e-4));
        for (int32_t i = 0; i < n; i++) bytes[t * 128 + i] = ref_e4m3((double)row[t * 128 + i] / (double)s);
        memcpy(bytes + R + 4 * t, &s, 4);
    }
    for (int32_t i = 0; i < r; i++) {
        float v = ref_bf16(row[R + i]);
        uint32_t u;
        memcpy(&u, &v, 4);
        uint16_t h = (uint16_t)(u >> 16);
        memcpy(bytes + R + 4 * tiles + 2 * i, &h, 2);
    }
}
/* One index key in FP8 or int8: D codes and the scale. */
static inline float ref_index_key(const float *x, int32_t D, dsa_type format, uint8_t *codes)
{
    float amax = fmaxf(ref_amax(x, D), 1e-4f);
    if (format == DSA_FP8) {
        float s = ref_pow2_ceil((double)amax / 448.0);
        for (int32_t i = 0; i < D; i++) codes[i] = ref_e4m3((double)x[i] / (double)s);
        return s;
    }
    float s = amax / 127.0f;
    for (int32_t i = 0; i < D; i++) {
        double v = nearbyint((double)(x[i] / s));
        int8_t c = (int8_t)fmax(-127, fmin(127, v));
        memcpy(&codes[i], &c, 1);
    }
    return s;
}

/* ---- a parallel_for that keeps its promise in the least helpful way: last task first ---------- */
typedef struct backwards { int32_t n_threads; int broken; int calls; } backwards;
static inline void backwards_for(void *user, int32_t n_tasks, dsa_task task, void *arg)
{
    backwards *b = (backwards *)user;
    if (n_tasks > b->n_threads) b->broken = 1;
    b->calls++;
    for (int32_t i = n_tasks - 1; i >= 0; i--) task(arg, i);
}
static inline dsa_ctx with_threads(const dsa_ctx *ctx, backwards *b, int32_t n)
{
    dsa_ctx c = *ctx;
    b->n_threads = n;
    b->broken = 0;
    b->calls = 0;
    c.config.n_threads = n;
    c.config.parallel_for = backwards_for;
    c.config.parallel_user = b;
    return c;
}

/* ---- caches -------------------------------------------------------------------------------- */
static inline dsa_cache_desc desc_of(dsa_kind kind, dsa_type format, int64_t capacity, int32_t page_size)
{
    dsa_cache_desc d;
    memset(&d, 0, sizeof d);
    d.kind = kind;
    d.format = format;
    d.capacity = capacity;
    d.page_size = page_size;
    return d;
}
static inline dsa_cache cache_of(bag *b, const dsa_ctx *ctx, const dsa_cache_desc *desc)
{
    dsa_cache c;
    size_t bytes = 0;
    if (dsa_cache_bytes(ctx, desc, &bytes) != DSA_OK) { fprintf(stderr, "test set-up: dsa_cache_bytes refused\n"); abort(); }
    void *memory = bag_alloc(b, bytes);
    memset(memory, 0xFF, bytes);
    if (dsa_cache_init(ctx, desc, memory, bytes, &c) != DSA_OK) { fprintf(stderr, "test set-up: dsa_cache_init refused\n"); abort(); }
    return c;
}
static inline dsa_seq seq_of(dsa_cache *latent, dsa_cache *index, int32_t n_q)
{
    dsa_seq s;
    memset(&s, 0, sizeof s);
    s.latent = latent;
    s.index = index;
    s.n_q = n_q == 0 ? DSA_NONE : n_q;
    return s;
}
/* n rows behind what one sequence's caches hold. */
static inline dsa_status append(const dsa_ctx *ctx, dsa_cache *latent, dsa_cache *index, int32_t n, const float *rows, const float *keys)
{
    dsa_seq s = seq_of(latent, index, n);
    dsa_append_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &s;
    a.latent = rows;
    a.index_key = keys;
    return dsa_append(ctx, &a);
}

/* ---- calls with their workspace -------------------------------------------------------------- */
static inline dsa_attend_state state_of(bag *b, int64_t n_rows, int32_t n_heads, int32_t dim_v)
{
    dsa_attend_state s;
    memset(&s, 0, sizeof s);
    s.n_rows = n_rows;
    s.n_heads = n_heads;
    s.dim_v = dim_v;
    s.max = random_floats(b, n_rows * n_heads, 1, 1e30f);          /* begin must not trust what was there */
    s.sum = random_floats(b, n_rows * n_heads, 2, 1e30f);
    s.out = random_floats(b, n_rows * n_heads * dim_v, 3, 1e30f);
    return s;
}
static inline int same_value(float a, float b) { return memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }
static inline dsa_status add(bag *b, const dsa_ctx *ctx, dsa_attend_args a, const dsa_attend_state *s)
{
    size_t bytes = 0;
    dsa_status st = dsa_attend_workspace(ctx, &a, s, &bytes);
    if (st != DSA_OK) return st;
    a.workspace = work(b, bytes);
    a.workspace_size = bytes;
    return dsa_attend_add(ctx, &a, s);
}
/* begin, add, finish; and dsa_attend, which must refuse the same and give the same bits. Where it does not, a refusal is returned as
   DSA_OK, a result becomes NaN, and the test fails. */
static inline dsa_status attend(bag *b, const dsa_ctx *ctx, dsa_attend_args a, int64_t n_rows, int32_t n_heads, int32_t dim_v,
                                const float *sinks, float *out, float *lse, float *max)
{
    dsa_attend_state s = state_of(b, n_rows, n_heads, dim_v), whole = state_of(b, n_rows, n_heads, dim_v);
    int64_t n = n_rows * n_heads, i;
    float *l = random_floats(b, n, 4, 1e30f), *m = random_floats(b, n, 5, 1e30f);
    size_t bytes = 0;
    dsa_status st = dsa_attend_begin(ctx, &s), again;
    if (st == DSA_OK) st = add(b, ctx, a, &s);
    if (st == DSA_OK) st = dsa_attend_finish(ctx, &s, sinks, out, lse, max);
    again = dsa_attend_workspace(ctx, &a, &whole, &bytes);
    a.workspace = work(b, bytes);
    a.workspace_size = bytes;
    if (again == DSA_OK) again = dsa_attend(ctx, &a, &whole, sinks, lse ? l : NULL, max ? m : NULL);
    if (st != DSA_OK && again != st) return DSA_OK;
    for (i = 0; st == DSA_OK && i < n; i++) {
        if (again != DSA_OK || !same_value(s.max[i], whole.max[i]) || !same_value(s.sum[i], whole.sum[i])) out[i * dim_v] = NAN;
        if ((lse && !same_value(lse[i], l[i])) || (max && !same_value(max[i], m[i]))) out[i * dim_v] = NAN;
    }
    for (i = 0; st == DSA_OK && i < n * dim_v; i++) if (!same_value(out[i], whole.out[i])) out[i] = NAN;
    return st;
}
static inline dsa_status score_select(bag *b, const dsa_ctx *ctx, dsa_score_args a, const dsa_selection *out)
{
    size_t bytes = 0;
    dsa_status st = dsa_score_select_workspace(ctx, &a, out, &bytes);
    if (st != DSA_OK) return st;
    a.workspace = work(b, bytes);
    a.workspace_size = bytes;
    return dsa_score_select(ctx, &a, out);
}
static inline dsa_status step(bag *b, const dsa_ctx *ctx, dsa_step_args a)
{
    size_t bytes = 0;
    dsa_status st = dsa_step_workspace(ctx, &a, &bytes);
    if (st != DSA_OK) return st;
    a.workspace = work(b, bytes);
    a.workspace_size = bytes;
    return dsa_step(ctx, &a);
}
static inline dsa_status layer(bag *b, const dsa_ctx *ctx, dsa_layer_args a)
{
    size_t bytes = 0;
    dsa_status st = dsa_layer_workspace(ctx, &a, &bytes);
    if (st != DSA_OK) return st;
    a.workspace = work(b, bytes);
    a.workspace_size = bytes;
    return dsa_layer(ctx, &a);
}

/* ---- attention over given rows, in double, straight from the definition ---------------------- */
/* rows [.., width] f32 as attention sees them; list[n] row numbers. out may be NULL. */
static inline void ref_attend(const float *q, const float *rows, int32_t width, int32_t dim_v, const int32_t *list, int64_t n, double scale,
                              double sink, double *out, double *lse, double *max)
{
    double m = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++) {
        double x = 0;
        for (int32_t i = 0; i < width; i++) x += (double)q[i] * (double)rows[(int64_t)list[j] * width + i];
        if (x * scale > m) m = x * scale;
    }
    for (int32_t i = 0; i < dim_v; i++) out[i] = 0;
    for (int64_t j = 0; j < n; j++) {
        double x = 0;
        for (int32_t i = 0; i < width; i++) x += (double)q[i] * (double)rows[(int64_t)list[j] * width + i];
        double p = exp(x * scale - m);
        sum += p;
        for (int32_t i = 0; i < dim_v; i++) out[i] += p * (double)rows[(int64_t)list[j] * width + i];
    }
    *max = m;
    *lse = n > 0 ? m + log(sum) : (double)INFINITY;
    double weight = n == 0 ? 0 : 1 / (sum + exp(sink - m));
    for (int32_t i = 0; i < dim_v; i++) out[i] *= weight;
}

#endif

/* brute.h - what the tests compare dsa.h with: the formulas written down a second time, in double precision and in the
   shortest way, with no thought of speed. Only the f32 Hadamard rotation is taken from dsa.h (test_numeric.c checks it
   against the explicit matrix): a double rotation would round to e4m3 and int8 differently now and then. */
#ifndef BRUTE_H_INCLUDED
#define BRUTE_H_INCLUDED

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "../dsa.h"

/* ---- memory: a test cannot go on without it ---------------------------------------------------- */
static inline void *brute_alloc(size_t bytes)
{
    void *p = malloc(bytes > 0 ? bytes : 1);
    if (p == NULL) { fprintf(stderr, "test: out of memory (%zu bytes)\n", bytes); abort(); }
    return p;
}

/* ---- random numbers: splitmix64, the same on every machine ------------------------------------------ */
typedef struct brute_rng { uint64_t state; } brute_rng;

static inline uint64_t brute_u64(brute_rng *r)
{
    uint64_t z = (r->state += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}
static inline double brute_uniform(brute_rng *r) { return (double)(brute_u64(r) >> 11) * 0x1p-53; }           /* [0, 1) */
static inline int64_t brute_below(brute_rng *r, int64_t n) { return (int64_t)(brute_u64(r) % (uint64_t)n); }  /* [0, n) */
static inline double brute_normal(brute_rng *r)
{
    double u = 1.0 - brute_uniform(r), v = brute_uniform(r);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}
static inline void brute_fill_normal(brute_rng *r, float *x, int64_t n, double deviation)
{
    for (int64_t i = 0; i < n; i++) x[i] = (float)(deviation * brute_normal(r));
}
static inline float *brute_normals(brute_rng *r, int64_t n)
{
    float *x = brute_alloc((size_t)n * sizeof *x);
    brute_fill_normal(r, x, n, 1.0);
    return x;
}
static inline void brute_shuffle(brute_rng *r, int32_t *x, int64_t n)
{
    for (int64_t i = n - 1; i > 0; i--) {
        int64_t j = brute_below(r, i + 1);
        int32_t t = x[i]; x[i] = x[j]; x[j] = t;
    }
}

/* ---- number formats ------------------------------------------------------------------------------------ */
static inline uint32_t brute_bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
static inline float brute_float(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

/* Finite x to the nearest value with `fraction` bits behind the leading one and no finer than 2^(least - fraction);
   rint rounds halves to even. No overflow handling: the caller saturates. */
static inline double brute_round(double x, int fraction, int least)
{
    int e;
    if (x == 0) return x;
    frexp(x, &e);                                  /* |x| in [2^(e-1), 2^e) */
    e = (e - 1 > least ? e - 1 : least) - fraction;
    return ldexp(rint(ldexp(x, -e)), e);
}
static inline double brute_round_bf16(double x) { return brute_round(x, 7, -126); }
static inline double brute_round_e4m3(double x)
{
    double y = brute_round(x, 3, -6);
    return y > 448 ? 448 : y < -448 ? -448 : y;
}

/* What an index key, or the head row of an index query, becomes under a format: x[n] as given, y[n] the dequantised
   values both sides of the dot product see (contracts.md, "Values and formats"). */
static inline void brute_round_row(dsa_type format, int hadamard, const float *x, int32_t n, double *y)
{
    float *t = brute_alloc((size_t)n * sizeof *t), amax = 1e-4f;
    memcpy(t, x, (size_t)n * sizeof *t);
    if (hadamard) dsa_hadamard_rows(t, 1, n, n);
    for (int32_t i = 0; i < n; i++) if (fabsf(t[i]) > amax) amax = fabsf(t[i]);
    double power = ldexp(1.0, (int)ceil(log2((double)amax / 448)));     /* FP8: power of two, spec 3.4 */
    float step = amax / 127;                                            /* INT8 */
    for (int32_t i = 0; i < n; i++) {
        if (format == DSA_BF16)      y[i] = brute_round_bf16((double)t[i]);
        else if (format == DSA_FP8)  y[i] = brute_round_e4m3((double)t[i] / power) * power;
        else if (format == DSA_INT8) y[i] = (double)rintf(t[i] / step) * (double)step;
        else                         y[i] = (double)t[i];
    }
    free(t);
}

/* ---- index scores: I = sum_h w_h max(<q_h, k>, 0) ---------------------------------------------------------- */
/* *bound is a rigorous bound of what any order of f32 operations may lose: (number of roundings) 2^-24 sum |products|. */
static inline double brute_index_score(int32_t heads, int32_t dim, const double *q, const float *w, const double *key, double *bound)
{
    double score = 0, size = 0;
    for (int32_t h = 0; h < heads; h++) {
        double dot = 0, magnitude = 0;
        for (int32_t d = 0; d < dim; d++) {
            double p = q[(size_t)h * (size_t)dim + (size_t)d] * key[d];
            dot += p;
            magnitude += fabs(p);
        }
        score += (double)w[h] * (dot > 0 ? dot : 0);
        size += fabs((double)w[h]) * magnitude;
    }
    if (bound != NULL) *bound = (double)(dim + heads + 8) * 0x1p-24 * size + 1e-37;
    return score;
}

/* ---- exact top-k under the total order ------------------------------------------------------------------- */
typedef struct brute_entry { double score; int64_t index; } brute_entry;

static inline int brute_by_rank(const void *a, const void *b)
{
    const brute_entry *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}
static inline int brute_by_index(const void *a, const void *b)
{
    const brute_entry *x = a, *y = b;
    return x->index < y->index ? -1 : x->index > y->index;
}
/* Sorts the entries, drops NaN and -inf, keeps k, puts them in the asked order, pads. scores may be NULL. Returns the count. */
static inline int32_t brute_pick(brute_entry *entries, int64_t n, int32_t k, dsa_order order, int32_t *indices, float *scores)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++)
        if (entries[i].score > -HUGE_VAL) entries[kept++] = entries[i];
    qsort(entries, (size_t)kept, sizeof *entries, brute_by_rank);
    if (kept > k) kept = k;
    if (order == DSA_ORDER_INDEX) qsort(entries, (size_t)kept, sizeof *entries, brute_by_index);
    for (int32_t i = 0; i < k; i++) {
        indices[i] = i < kept ? (int32_t)entries[i].index : -1;
        if (scores != NULL) scores[i] = i < kept ? (float)entries[i].score : -HUGE_VALF;
    }
    return (int32_t)kept;
}
/* Over columns [ks, ke) of one row of n. */
static inline int32_t brute_topk(const float *row, int64_t n, int64_t ks, int64_t ke, int32_t k, dsa_order order,
                                 int32_t *indices, float *scores)
{
    ks = ks < 0 ? 0 : ks;
    ke = ke > n ? n : ke;
    int64_t m = ke > ks ? ke - ks : 0;
    brute_entry *entries = brute_alloc((size_t)m * sizeof *entries);
    for (int64_t i = 0; i < m; i++) { entries[i].score = (double)row[ks + i]; entries[i].index = ks + i; }
    int32_t count = brute_pick(entries, m, k, order, indices, scores);
    free(entries);
    return count;
}

/* ---- attention of one query row over rows kv [n_kv, dim_v + dim_rest] -------------------------------------- */
/* list NULL: rows [0, n_list). Anything outside [0, n_kv) is skipped. out [heads, dim_v], lse and max_logit [heads].
   The sink takes part in out only; an empty row gives 0, +inf, -inf. */
static inline void brute_attend(int32_t heads, int32_t dim_v, int32_t dim_rest, const float *q, const float *kv, int64_t n_kv,
                                const int32_t *list, int64_t n_list, double scale, const float *sinks,
                                double *out, double *lse, double *max_logit)
{
    size_t width = (size_t)dim_v + (size_t)dim_rest;
    double *x = brute_alloc((size_t)(n_list > 0 ? n_list : 0) * sizeof *x);
    for (int32_t h = 0; h < heads; h++) {
        double top = -HUGE_VAL, sum = 0;
        for (int64_t j = 0; j < n_list; j++) {
            int64_t s = list != NULL ? list[j] : j;
            x[j] = -HUGE_VAL;
            if (s < 0 || s >= n_kv) continue;
            double dot = 0;
            for (size_t d = 0; d < width; d++) dot += (double)q[(size_t)h * width + d] * (double)kv[(size_t)s * width + d];
            x[j] = scale * dot;
            if (x[j] > top) top = x[j];
        }
        for (int32_t d = 0; d < dim_v; d++) out[(size_t)h * (size_t)dim_v + (size_t)d] = 0;
        max_logit[h] = top;
        lse[h] = HUGE_VAL;
        if (top == -HUGE_VAL) continue;
        for (int64_t j = 0; j < n_list; j++) sum += exp(x[j] - top);
        double all = sum + (sinks != NULL ? exp((double)sinks[h] - top) : 0);
        for (int64_t j = 0; j < n_list; j++) {
            int64_t s = list != NULL ? list[j] : j;
            if (x[j] == -HUGE_VAL) continue;                     /* skipped rows may hold NaN */
            for (int32_t d = 0; d < dim_v; d++)
                out[(size_t)h * (size_t)dim_v + (size_t)d] += exp(x[j] - top) / all * (double)kv[(size_t)s * width + (size_t)d];
        }
        lse[h] = top + log(sum);
    }
    free(x);
}

/* ---- the ISAs a test runs on: every one that this build and this CPU have ------------------------------------ */
enum { BRUTE_ISAS = 5 };
/* The ISAs that this CPU has; DSA_TEST_ISA=neon in the environment: only that one, to save time where the others are tested elsewhere. */
static inline int brute_isas(dsa_isa *isas)                      /* [BRUTE_ISAS]; returns how many */
{
    const char *only = getenv("DSA_TEST_ISA");
    static const dsa_isa all[] = { DSA_ISA_SCALAR, DSA_ISA_AVX2, DSA_ISA_AVX512_BASE, DSA_ISA_AVX512, DSA_ISA_NEON };
    int n = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        dsa_config config;
        dsa_ctx ctx;
        memset(&config, 0, sizeof config);
        config.isa = all[i];
        if (only && strcmp(only, dsa_isa_name(all[i])) != 0) continue;
        if (dsa_init(&ctx, &config) != DSA_ERR_UNSUPPORTED) isas[n++] = all[i];
    }
    return n;
}

static inline const char *brute_type_name(dsa_type type)
{
    return type == DSA_F32 ? "f32" : type == DSA_BF16 ? "bf16" : type == DSA_F16 ? "f16" : type == DSA_FP8 ? "fp8" : "int8";
}

/* ---- parallel_for in the worst order: tasks last to first on one thread ----------------------------------------- */
/* user: int32_t *, set to the largest n_tasks seen. */
static inline void brute_reversed(void *user, int32_t n_tasks, dsa_task task, void *arg)
{
    int32_t *most = user;
    if (n_tasks > *most) *most = n_tasks;
    for (int32_t i = n_tasks; i-- > 0;) task(arg, i);
}

#endif /* BRUTE_H_INCLUDED */

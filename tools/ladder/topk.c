/* topk.c - the ladder of top-k selection from one stored row of f32 scores.

       cc -O2 -std=c99 -o build/topk tools/ladder/topk.c -lm -pthread && build/topk

   The floor is a plain read of the row. Zen 4, k = 2048, us for 64K / 128K / 1M random scores; plain read 10-14 / 19-25 / 150-200
   on this machine, whose neighbours take their share of the memory, so compare within one run:

    1  digits                        450 /  900 / 6800   bins wait for each other's stores; also 4 passes over the row
    2  heap of k                     850 / 1030 / 2300   fine where few enter, which takes a long row; 12 levels each, all mispredicted
    3  stream, no sample              38 /   53 /  220   what the fused kernel uses (there the scores are in L1: 27). Ascending rows
                                                         let everything in and cost 3 times as much
    4  maxima, then a scan            25 /   45 /  400   cannot guess too high, and reads everything twice: loses beyond L2
    5  sample, branch per vector      39 /   62 /  185   at 64K every other vector holds a candidate: the worst for a predictor
    6  sample, whole stores           22 /   37 /  225   two unaligned 64-byte stores a vector cost more than reading it
    7  sample, compress to memory    163 /  306 / 2250   microcode on Zen 4, 10 times slower than compress and store
    8  sample, walk over bits         28 /   46 /  190   a mispredicted loop end for every 64 scores
    9  sample, branch per 64          18 /   30 /  165   half stores suffice for up to 8 candidates
   10  sample, twice the buffer       17 /   26 /  150   no gain for random rows; a deceived sample costs more before it shows
   11  dsa.h, scalar                  55 /  100 /  680
   12  dsa.h, AVX2                    26 /   52 /  180
   13  dsa.h, AVX-512                 17 /   26 /  150   64 scores packed at once (VBMI2); within a tenth of the read from 128K on

   Not kept: prefetching 0.5 to 8 KiB ahead (nothing, or 10 % slower), two to eight read streams (up to 10 % faster over 4 KiB
   pages, nothing over huge ones, and the order of the candidates is lost), interpolation instead of bisection (fewer counts on
   smooth inputs, twice as many on others), indices alone with the scores gathered later (same speed, one more kernel).
   The sample: 128 to 256 lines cost 2-3 us cold. Half of them: as fast, but rows of tied blocks fail more often. Its rank plus
   4 sigma; without counting how many of the high scores share a line, one in ten rows of tied blocks is scanned twice.
   Hostile inputs, times the random row: at most 1.4, but 1.5-1.6 where exactly the sampled lines are high (two scans), 1.8 at
   64K where two samples in a row are deceived.

   Options: -n COLUMNS, -k K, -v VARIANT, -i INPUT (numbers from the lists that -l prints), -q verifies and times nothing.
   First every variant is compared with qsort on every input and several lengths. Then one thread selects from rows that are in
   no cache (more than 100 MiB of others come between two uses of one); medians; a plain read of the same bytes is timed in between. */
#define _POSIX_C_SOURCE 200809L
#define DSA_IMPLEMENTATION
#define DSA_STATIC
#include "../../dsa.h"
#include <stdio.h>
#include <time.h>

#if !defined(__x86_64__)
#  error "the variants are written for x86-64"
#endif

/* ---- small things -------------------------------------------------------------------------- */
static double now(void)                                              /* us */
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static void *take(size_t bytes)
{
    void *p = NULL;
    if (posix_memalign(&p, 4096, bytes) != 0) { fprintf(stderr, "topk: out of memory\n"); exit(2); }
    return p;
}

static uint64_t random_state;
static uint64_t random_bits(void)                                    /* splitmix64 */
{
    uint64_t z = (random_state += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}
static double uniform(void) { return (double)(random_bits() >> 11) * 0x1p-53; }
static float normal(void)                                            /* four uniforms: near enough, and fast */
{
    uint64_t a = random_bits(), b = random_bits();
    double sum = (double)(uint32_t)a + (double)(a >> 32) + (double)(uint32_t)b + (double)(b >> 32);
    return (float)((sum * 0x1p-32 - 2) * 1.7320508);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}
static double median(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    return x[n / 2];
}

/* ---- inputs: one that is kind, and all that a selection by sample, pivot or digits dislikes --- */
typedef enum input {
    RANDOM, EQUAL, ZERO, ASCENDING, DESCENDING, OUTLIER, DENORMAL, BLOCKS_16, BLOCKS_100, BLOCKS_1000, FEW, MIXED, SAWTOOTH,
    RELU, ORGAN_PIPE, EXPONENTS, HIDDEN_LOW, HIDDEN_HIGH, HIDDEN_TWICE, N_INPUTS
} input;
static const char *const input_names[N_INPUTS] = {
    "random", "equal", "zeros of both signs", "ascending", "descending", "outlier", "denormals", "ties in 16s", "ties in 100s",
    "ties in 1000s", "five values", "NaN and inf", "sawtooth", "98 % zeros", "organ pipe", "all exponents", "hidden, low sample",
    "hidden, high sample", "hidden from two"
};

/* Fills every piece that a sample (the salt-th, m pieces) of dsa__topk_guess reads from a row. */
static void fill_sample(float *x, int64_t n, int64_t m, uint32_t salt, float low, float deviation)
{
    int64_t pieces = n / 16, j, i;
    for (j = 0; j < m; j++) {
        uint32_t hash = ((uint32_t)j + 1 + salt * 0x10001u) * 2654435761u;
        int64_t piece = j * pieces / m + (int64_t)((uint64_t)hash * (uint64_t)(pieces / m) >> 32);
        for (i = 0; i < 16; i++) x[piece * 16 + i] = low + deviation * normal();
    }
}
static int64_t default_room(int64_t k) { return 2 * (k > 1024 ? k : 1024) + DSA__KEYS; }

static void fill(input kind, float *x, int64_t n, int64_t k)
{
    int64_t i, m, most;
    float v = 0;
    for (i = 0; i < n; i++) {
        double u = uniform();
        switch (kind) {
        case EQUAL:       x[i] = -1.25f; break;
        case ZERO:        x[i] = u < 0.5 ? -0.0f : 0.0f; break;
        case ASCENDING:   x[i] = (float)i; break;
        case DESCENDING:  x[i] = (float)(n - i); break;
        case OUTLIER:     x[i] = i == n / 3 ? 3e38f : normal(); break;
        case DENORMAL:    x[i] = dsa__from_bits((uint32_t)(random_bits() & 0x807FFFFFu)); break;
        case BLOCKS_16:   if (i % 16 == 0) v = normal(); x[i] = v; break;
        case BLOCKS_100:  if (i % 100 == 0) v = normal(); x[i] = v; break;
        case BLOCKS_1000: if (i % 1000 == 0) v = normal(); x[i] = v; break;
        case FEW:         x[i] = (float)(int)(5 * u); break;
        case MIXED:       x[i] = u < 0.3 ? dsa__nan() : u < 0.6 ? -dsa__infinity() : u < 0.601 ? dsa__infinity() : normal(); break;
        case SAWTOOTH:    x[i] = (float)(i % 1024); break;
        case RELU:        x[i] = u < 0.98 ? 0.0f : (float)(u - 0.98); break;
        case ORGAN_PIPE:  x[i] = (float)(i < n / 2 ? i : n - i); break;
        case EXPONENTS:   do x[i] = dsa__from_bits((uint32_t)random_bits()); while (!(x[i] - x[i] == 0)); break;
        case HIDDEN_LOW: case HIDDEN_TWICE: x[i] = (float)(i + 10); break;
        default:          x[i] = normal(); break;
        }
    }
    if (kind < HIDDEN_LOW || n <= 2 * default_room(k)) return;
    m = dsa__clamp64(n / 16 / 64, 128, 256);
    if (m > default_room(k) / 16) m = default_room(k) / 16;
    fill_sample(x, n, m, 0, kind == HIDDEN_HIGH ? 100.0f : 0.0f, kind == HIDDEN_HIGH ? 1.0f : 0.0f);
    if (kind != HIDDEN_TWICE) return;                                /* all enters, so the buffer is full after just `room` scores */
    n -= default_room(k);
    x += default_room(k);
    m = dsa__clamp64(n / 16 / 64, 128, 256);
    most = (default_room(k) - k) / 16;                               /* it lies in what the shrink has set free, k / 8 more or less */
    if (m > most - k / 8 / 16) for (m = most - k / 8 / 16; m < most; m++) fill_sample(x, n, m, 1, 0.0f, 0.0f);
    fill_sample(x, n, m < most ? m : most, 1, 0.0f, 0.0f);
}

/* ---- the oracle ---------------------------------------------------------------------------- */
static const float *sorted_row;
static int by_rank(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    if (sorted_row[x] != sorted_row[y]) return sorted_row[x] > sorted_row[y] ? -1 : 1;
    return x < y ? -1 : x > y;
}
static int by_index(const void *a, const void *b) { return *(const int32_t *)a < *(const int32_t *)b ? -1 : 1; }

static int64_t by_qsort(const float *s, int64_t n, int64_t k, int32_t *out)
{
    int64_t i, m = 0;
    for (i = 0; i < n; i++) if (s[i] > -dsa__infinity()) out[m++] = (int32_t)i;
    sorted_row = s;
    qsort(out, (size_t)m, sizeof *out, by_rank);
    if (m > k) m = k;
    qsort(out, (size_t)m, sizeof *out, by_index);
    return m;
}

/* ---- 1: digits ----------------------------------------------------------------------------- */
static uint32_t digit_key(float s) { return s > -dsa__infinity() ? dsa__sort_key(s) : 0; }

static int64_t by_digits(const float *s, int64_t n, int64_t k, int32_t *out)
{
    static uint32_t bins[2048];
    static const int shifts[3] = { 21, 10, 0 };
    uint32_t prefix = 0, mask = 0;
    int64_t left = k, i, m = 0;
    int pass;
    for (pass = 0; pass < 3; pass++) {
        uint32_t digit = 2047;
        memset(bins, 0, sizeof bins);
        for (i = 0; i < n; i++) {
            uint32_t key = digit_key(s[i]);
            if ((key & mask) == prefix && key != 0) bins[(key >> shifts[pass]) & 2047]++;
        }
        while (digit > 0 && (int64_t)bins[digit] < left) left -= bins[digit--];
        if (digit == 0 && (int64_t)bins[0] < left) { prefix = 0; left = n; break; }
        prefix |= digit << shifts[pass];
        mask |= 2047u << shifts[pass];
    }
    for (i = 0; i < n; i++) {
        uint32_t key = digit_key(s[i]);
        if (key == 0 || key < prefix || (key == prefix && left-- <= 0)) continue;
        out[m++] = (int32_t)i;
    }
    return m;
}

/* ---- 2: heap ------------------------------------------------------------------------------- */
static int64_t by_heap(const float *s, int64_t n, int64_t k, int32_t *out)
{
    int64_t m = 0, i, at, child;
    for (i = 0; i < n; i++) {
        if (!(s[i] > -dsa__infinity())) continue;
        if (m < k) {                                                 /* the worst on top; of equals the later one */
            for (at = m++; at > 0 && s[out[(at - 1) / 2]] >= s[i]; at = (at - 1) / 2) out[at] = out[(at - 1) / 2];
            out[at] = (int32_t)i;
        } else if (s[i] > s[out[0]]) {
            for (at = 0; (child = 2 * at + 1) < m; at = child) {
                if (child + 1 < m && dsa__ranks_before(s[out[child]], out[child], s[out[child + 1]], out[child + 1])) child++;
                if (s[out[child]] >= s[i]) break;
                out[at] = out[child];
            }
            out[at] = (int32_t)i;
        }
    }
    qsort(out, (size_t)m, sizeof *out, by_index);
    return m;
}

/* ---- 3 ..: dsa.h with one thing changed ----------------------------------------------------- */
static dsa_ctx ctx_scalar, ctx_avx2, ctx_avx512;
static float *buffer_s;
static int32_t *buffer_i;

static dsa__topk topk_over(const dsa__kernels *kernels, int64_t k, int64_t room)
{
    dsa__topk t;
    t.kernels = kernels;
    t.k = k;
    t.n = 0;
    t.room = room;
    t.above = -dsa__infinity();
    t.s = buffer_s;
    t.i = buffer_i;
    return t;
}
static int64_t finish(dsa__topk *t, int32_t *out)
{
    dsa__topk_compact(t);
    memcpy(out, t->i, (size_t)t->n * sizeof *out);
    return t->n;
}

static int64_t whole_row(const dsa__kernels *kernels, int64_t room, const float *s, int64_t n, int64_t k, int32_t *out)
{
    dsa__topk t = topk_over(kernels, k, room);
    dsa__topk_row(&t, s, n, 0);
    return finish(&t, out);
}

/* 3: as if the scores came 96 at a time from the kernel that makes them; no sample */
static int64_t by_stream(const float *s, int64_t n, int64_t k, int32_t *out)
{
    dsa__topk t = topk_over(ctx_avx512.kernels, k, default_room(k));
    int64_t at;
    for (at = 0; at < n; at += DSA__KEYS) dsa__topk_push(&t, s + at, n - at < DSA__KEYS ? n - at : DSA__KEYS, at);
    return finish(&t, out);
}

/* 4: no guess: the row as a table of g = 2 k columns; k columns have a maximum >= the k-th best maximum, so k scores are >= it */
DSA__AVX512 static int64_t by_maxima(const float *s, int64_t n, int64_t k, int32_t *out)
{
    dsa__topk t = topk_over(ctx_avx512.kernels, k, default_room(k));
    int64_t g = 2 * k / 16 * 16, at, j, m, unused;
    if (n >= 4 * g && g > 0) {
        for (j = 0; j < g; j++) t.s[j] = -dsa__infinity();
        for (at = 0; at + g <= n; at += g)
            for (j = 0; j < g; j += 16)
                _mm512_storeu_ps(t.s + j, _mm512_max_ps(_mm512_loadu_ps(s + at + j), _mm512_loadu_ps(t.s + j)));   /* NaN: the second */
        if (t.kernels->count(t.s, g, -FLT_MAX) > k) t.above = dsa__below(dsa__topk_cut(t.kernels, t.s, g, k, 0, &unused));
    }
    for (at = 0; at < n; at += m) {
        m = n - at < t.room - t.n ? n - at : t.room - t.n;
        if (m < 256 && m < n - at) { dsa__topk_make_room(&t); m = 0; continue; }
        t.n += t.kernels->filter(s + at, (int32_t)m, (int32_t)at, t.above, t.s + t.n, t.i + t.n);
    }
    return finish(&t, out);
}

/* 5: filter with a branch for every vector */
DSA__AVX512 static int32_t filter_branch(const float *s, int32_t n, int32_t first, float above, float *out_s, int32_t *out_i)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int32_t j, m = 0;
    for (j = 0; j < n; j += 16) {
        const __mmask16 lanes = dsa__lanes_avx512(n - j);
        const __m512 v = _mm512_maskz_loadu_ps(lanes, s + j);
        const __mmask16 mask = _mm512_mask_cmp_ps_mask(lanes, v, _mm512_set1_ps(above), _CMP_GT_OQ);
        if (mask) m += dsa__pack_avx512(mask, v, _mm512_add_epi32(lane, _mm512_set1_epi32(first + j)), out_s + m, out_i + m);
    }
    return m;
}

/* 6: filter without any branch: two whole vectors are stored for every one read */
DSA__AVX512 static int32_t filter_whole(const float *s, int32_t n, int32_t first, float above, float *out_s, int32_t *out_i)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int32_t j, m = 0;
    for (j = 0; j < n; j += 16) {
        const __mmask16 lanes = dsa__lanes_avx512(n - j);
        const __m512 v = _mm512_maskz_loadu_ps(lanes, s + j);
        const __mmask16 mask = _mm512_mask_cmp_ps_mask(lanes, v, _mm512_set1_ps(above), _CMP_GT_OQ);
        _mm512_storeu_ps(out_s + m, _mm512_maskz_compress_ps(mask, v));
        _mm512_storeu_si512((void *)(out_i + m), _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lane, _mm512_set1_epi32(first + j))));
        m += (int32_t)_mm_popcnt_u32(mask);
    }
    return m;
}

/* 7: filter compresses to memory */
DSA__AVX512 static int32_t filter_memory(const float *s, int32_t n, int32_t first, float above, float *out_s, int32_t *out_i)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int32_t j, m = 0;
    for (j = 0; j < n; j += 16) {
        const __mmask16 lanes = dsa__lanes_avx512(n - j);
        const __m512 v = _mm512_maskz_loadu_ps(lanes, s + j);
        const __mmask16 mask = _mm512_mask_cmp_ps_mask(lanes, v, _mm512_set1_ps(above), _CMP_GT_OQ);
        _mm512_mask_compressstoreu_ps(out_s + m, mask, v);
        _mm512_mask_compressstoreu_epi32(out_i + m, mask, _mm512_add_epi32(lane, _mm512_set1_epi32(first + j)));
        m += (int32_t)_mm_popcnt_u32(mask);
    }
    return m;
}

/* 8: filter makes 64 bits and walks over those that are set */
DSA__AVX512 static int32_t filter_walk(const float *s, int32_t n, int32_t first, float above, float *out_s, int32_t *out_i)
{
    int32_t j, l, m = 0;
    for (j = 0; j < n; j += 64) {
        uint64_t bits = 0;
        for (l = 0; l < 64 && j + l < n; l += 16) {
            const __mmask16 lanes = dsa__lanes_avx512(n - j - l);
            const __m512 v = _mm512_maskz_loadu_ps(lanes, s + j + l);
            bits |= (uint64_t)_mm512_mask_cmp_ps_mask(lanes, v, _mm512_set1_ps(above), _CMP_GT_OQ) << l;
        }
        for (; bits; bits &= bits - 1) {
            l = __builtin_ctzll(bits);
            out_s[m] = s[j + l];
            out_i[m++] = first + j + l;
        }
    }
    return m;
}

/* 9: filter with one branch for 64 scores and half stores: dsa.h where the CPU has no VBMI2 */
#define filter_groups dsa__filter_avx512

#define WITH_FILTER(name) \
    static int64_t by_##name(const float *s, int64_t n, int64_t k, int32_t *out) \
    { \
        dsa__kernels kernels = *ctx_avx512.kernels; \
        kernels.filter = filter_##name; \
        return whole_row(&kernels, default_room(k), s, n, k, out); \
    }
WITH_FILTER(branch)
WITH_FILTER(whole)
WITH_FILTER(memory)
WITH_FILTER(walk)
WITH_FILTER(groups)

/* 10: twice the buffer */
static int64_t by_large_buffer(const float *s, int64_t n, int64_t k, int32_t *out)
{
    return whole_row(ctx_avx512.kernels, 2 * default_room(k), s, n, k, out);
}

/* 11, 12, 13: dsa_select itself */
static int64_t by_dsa(const dsa_ctx *ctx, const float *s, int64_t n, int64_t k, int32_t *out)
{
    static unsigned char workspace[1 << 20];
    int32_t count = 0;
    dsa_select_args args;
    dsa_selection selection;
    memset(&args, 0, sizeof args);
    memset(&selection, 0, sizeof selection);
    args.n_rows = 1;
    args.scores = s;
    args.n_cols = args.stride = n;
    args.workspace = workspace;
    args.workspace_size = sizeof workspace;
    selection.top_k = (int32_t)k;
    selection.indices = out;
    selection.counts = &count;
    if (dsa_select(ctx, &args, &selection) != DSA_OK) { fprintf(stderr, "topk: dsa_select failed\n"); exit(1); }
    return count;
}
static int64_t by_scalar(const float *s, int64_t n, int64_t k, int32_t *out) { return by_dsa(&ctx_scalar, s, n, k, out); }
static int64_t by_avx2(const float *s, int64_t n, int64_t k, int32_t *out) { return by_dsa(&ctx_avx2, s, n, k, out); }
static int64_t by_avx512(const float *s, int64_t n, int64_t k, int32_t *out) { return by_dsa(&ctx_avx512, s, n, k, out); }

typedef struct variant { const char *name; int64_t (*select)(const float *s, int64_t n, int64_t k, int32_t *out); dsa_isa isa; } variant;
static const variant variants[] = {
    { "digits: 3 counting passes, 1 to collect", by_digits, DSA_ISA_SCALAR },
    { "heap of k", by_heap, DSA_ISA_SCALAR },
    { "stream of 96 scores, no sample", by_stream, DSA_ISA_AVX512 },
    { "maxima of 2 k columns, then one scan", by_maxima, DSA_ISA_AVX512 },
    { "sample; a branch per vector", by_branch, DSA_ISA_AVX512 },
    { "sample; no branch, whole stores", by_whole, DSA_ISA_AVX512 },
    { "sample; compress to memory", by_memory, DSA_ISA_AVX512 },
    { "sample; walk over bits", by_walk, DSA_ISA_AVX512 },
    { "sample; a branch per 64, half stores", by_groups, DSA_ISA_AVX512 },
    { "sample; twice the buffer", by_large_buffer, DSA_ISA_AVX512 },
    { "dsa.h, scalar", by_scalar, DSA_ISA_SCALAR },
    { "dsa.h, AVX2", by_avx2, DSA_ISA_AVX2 },
    { "dsa.h, AVX-512", by_avx512, DSA_ISA_AVX512 },
};
enum { N_VARIANTS = sizeof variants / sizeof *variants };

static int start(dsa_ctx *ctx, dsa_isa isa)
{
    dsa_config config;
    memset(&config, 0, sizeof config);
    config.isa = isa;
    return dsa_init(ctx, &config) == DSA_OK;
}

/* ---- verify -------------------------------------------------------------------------------- */
static int has_avx2, has_avx512;
static int runs(int v) { return variants[v].isa == DSA_ISA_AVX512 ? has_avx512 : variants[v].isa == DSA_ISA_AVX2 ? has_avx2 : 1; }

static void verify(void)
{
    static const int64_t ns[] = { 1, 17, 1000, 4096, 9000, 20000, 65536 }, ks[] = { 1, 100, 2048 };
    int32_t *want = (int32_t *)take(65536 * sizeof *want), *got = (int32_t *)take(65536 * sizeof *got);
    float *row = (float *)take(65536 * sizeof *row);
    int64_t m, checked = 0;
    int a, v, in, ik;
    for (a = 0; a < N_INPUTS; a++)
        for (in = 0; in < (int)(sizeof ns / sizeof *ns); in++)
            for (ik = 0; ik < 3; ik++) {
                random_state = (uint64_t)(a + 100 * in);
                fill((input)a, row, ns[in], ks[ik]);
                m = by_qsort(row, ns[in], ks[ik], want);
                for (v = 0; v < N_VARIANTS; v++, checked++) {
                    if (!runs(v)) continue;
                    if (variants[v].select(row, ns[in], ks[ik], got) == m && memcmp(want, got, (size_t)m * sizeof *got) == 0) continue;
                    printf("WRONG: variant %d, input %d, n %d, k %d\n", v + 1, a + 1, (int)ns[in], (int)ks[ik]);
                    exit(1);
                }
            }
    printf("verified against qsort: %d selections\n", (int)checked);
    free(want);
    free(got);
    free(row);
}

/* ---- time ---------------------------------------------------------------------------------- */
DSA__AVX512 static float read_avx512(const float *s, int64_t n)
{
    __m512 a = _mm512_setzero_ps(), b = a;
    int64_t j;
    for (j = 0; j + 32 <= n; j += 32) {
        a = _mm512_max_ps(a, _mm512_loadu_ps(s + j));
        b = _mm512_max_ps(b, _mm512_loadu_ps(s + j + 16));
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
}
static float read_scalar(const float *s, int64_t n)
{
    float a = 0;
    int64_t j;
    for (j = 0; j < n; j += 16) a += s[j];
    return a;
}

enum { MOST = 400 };
static const size_t pool_bytes = (size_t)128 << 20;
static float *pool;                          /* rows by turns random and of the input at hand: pages differ in speed, so both share them */
static int32_t *out;
static volatile float sink;

/* Times variant v on an input, on the random one and a plain read in turns. */
static void time_case(int v, input a, int64_t n, int64_t k)
{
    double t[3][MOST], us[3];
    int64_t pairs = (int64_t)(pool_bytes / sizeof(float)) / n / 2;
    int reps = n <= 65536 ? 150 : n <= 131072 ? 100 : 30, r;
    if (v < 2) reps = 5;                                             /* ms each */
    for (r = 0; r < reps; r++) {
        const float *x = pool + r * 5 % pairs * 2 * n, *y = pool + (r * 5 + 2) % pairs * 2 * n + n,
                    *z = pool + (r * 5 + 4) % pairs * 2 * n + r % 2 * n;
        double t0 = now(), t1, t2, t3;
        sink = has_avx512 ? read_avx512(z, n) : read_scalar(z, n);
        t1 = now();
        (void)variants[v].select(x, n, k, out);
        t2 = now();
        (void)variants[v].select(y, n, k, out);
        t3 = now();
        t[0][r] = t1 - t0;
        t[1][r] = t2 - t1;
        t[2][r] = t3 - t2;
    }
    for (r = 0; r < 3; r++) us[r] = median(t[r], reps);
    if (a == RANDOM) printf("%8d  %2d %-42s %9.1f us  %6.2f x read\n", (int)n, v + 1, variants[v].name, us[1], us[1] / us[0]);
    else printf("%8d  %2d %-42s %9.1f us  %6.2f x random  %6.2f x read\n", (int)n, v + 1, input_names[a],
                us[2], us[2] / us[1], us[2] / us[0]);
    fflush(stdout);
}

static void fill_pool(input a, int64_t n, int64_t k)
{
    int64_t pairs = (int64_t)(pool_bytes / sizeof(float)) / n / 2, r;
    random_state = (uint64_t)a + 1;
    for (r = 0; r < pairs; r++) fill(a, pool + (2 * r + (a != RANDOM)) * n, n, k);     /* all different: a CPU learns a row seen twice */
}

static void print_machine(void)
{
    char line[256], cpu[256] = "unknown CPU";
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
            snprintf(cpu, sizeof cpu, "%s", strchr(line, ':') + 2);
            cpu[strcspn(cpu, "\n")] = 0;
            break;
        }
    if (f) fclose(f);
    printf("%s, compiled by %s %s\n", cpu,
#if defined(__clang__)
           "clang", __clang_version__);
#else
           "gcc", __VERSION__);
#endif
}

int main(int argc, char **argv)
{
    static const int64_t sizes[] = { 65536, 131072, 1048576 };
    int64_t only_n = 0, k = 2048;
    int only_v = 0, only_a = 0, quick = 0, i, v, a, z;
    for (i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "-q")) quick = 1;
        else if (!strcmp(argv[i], "-l")) {
            for (v = 0; v < N_VARIANTS; v++) printf("-v %-2d %s\n", v + 1, variants[v].name);
            for (a = 0; a < N_INPUTS; a++) printf("-i %-2d %s\n", a + 1, input_names[a]);
            return 0;
        }
        else if (i + 1 < argc && !strcmp(argv[i], "-n")) only_n = atoll(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "-k")) k = atoll(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "-v")) only_v = atoi(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "-i")) only_a = atoi(argv[++i]);
        else { fprintf(stderr, "usage: topk [-n COLUMNS] [-k K] [-v VARIANT] [-i INPUT] [-q] [-l]\n"); return 2; }
    }
    if (k < 1 || k > 8192 || only_n < 0 || only_n > (int64_t)(pool_bytes / 32)) {
        fprintf(stderr, "topk: 1 <= K <= 8192, COLUMNS <= 4M\n");
        return 2;
    }
    if (!start(&ctx_scalar, DSA_ISA_SCALAR)) return 1;
    has_avx2 = start(&ctx_avx2, DSA_ISA_AVX2);
    has_avx512 = start(&ctx_avx512, DSA_ISA_AVX512);
    buffer_s = (float *)take(sizeof(float) * (size_t)(2 * default_room(8192) + 16));
    buffer_i = (int32_t *)take(sizeof(int32_t) * (size_t)(2 * default_room(8192) + 16));
    print_machine();
    verify();
    if (quick) return 0;

    pool = (float *)take(pool_bytes);
    memset(pool, 0, pool_bytes);
    out = (int32_t *)take(sizeof(int32_t) * 65536);
    for (z = 0; z < 3; z++) {
        int64_t n = only_n ? only_n : sizes[z];
        int last = has_avx512 ? 12 : has_avx2 ? 11 : 10;
        if (only_n && z > 0) break;
        fill_pool(RANDOM, n, k);
        if (only_a < 2)
            for (v = 0; v < N_VARIANTS; v++)
                if (runs(v) && (!only_v || v + 1 == only_v)) time_case(v, RANDOM, n, k);
        for (a = 1; a < N_INPUTS; a++) {
            if (only_a && a + 1 != only_a) continue;
            fill_pool((input)a, n, k);
            v = only_v ? only_v - 1 : last;
            if (v < N_VARIANTS && runs(v)) time_case(v, (input)a, n, k);
        }
    }
    return 0;
}

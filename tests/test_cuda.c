/* The GPU against the CPU's scalar path: build/test_cuda, a program of its own, since it needs dsa_cuda.o and a device.

   On the reference path every score, list, state and output must have the CPU's bits (lse: but for the last bit of a logarithm). The
   other paths are held to tolerances, and to the same bits whenever they repeat themselves. Rows that no table entry in use names
   stay NaN on both sides, workspaces start as NaN. */
#define DSA_CUDA
#include <cuda_runtime_api.h>
#include "brute.h"
#include "fixture.h"

GREATEST_MAIN_DEFS();

dsa_isa test_isa = DSA_ISA_SCALAR;
static dsa_cuda *gpu;                        /* of the running path */
static dsa_cuda_path path;
static int exact;                            /* the reference path: bits, not tolerances */

/* ---- device memory: given back at the end of each test ------------------------------------------ */
static void *blocks[4096];
static int n_blocks;
static int cuda_failed;

static void cuda_ok(cudaError_t e, int line)
{
    if (e == cudaSuccess) return;
    if (!cuda_failed) fprintf(stderr, "\ntest_cuda.c:%d: %s\n", line, cudaGetErrorString(e));
    cuda_failed = 1;
}
#define CUDA(CALL) cuda_ok((CALL), __LINE__)

/* Each block is as large as asked, filled with 0xFF: NaN, or indices of -1. */
static void *device(size_t bytes)
{
    void *p = NULL;
    if (n_blocks == 4096) { fprintf(stderr, "test set-up: too many blocks\n"); abort(); }
    CUDA(cudaMalloc(&p, bytes ? bytes : 1));
    CUDA(cudaMemset(p, 0xFF, bytes ? bytes : 1));
    blocks[n_blocks++] = p;
    return p;
}
static void *up(const void *from, size_t bytes)
{
    void *p = device(bytes);
    CUDA(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice));
    return p;
}
static void *down(bag *b, const void *from, size_t bytes)
{
    void *p = bag_alloc(b, bytes);
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(p, from, bytes, cudaMemcpyDeviceToHost));
    return p;
}
static void device_free(void)
{
    while (n_blocks > 0) CUDA(cudaFree(blocks[--n_blocks]));
}
#define DONE(b) do { device_free(); bag_free(&(b)); ASSERT_FALSE(cuda_failed); PASS(); } while (0)

/* ---- comparisons ------------------------------------------------------------------------------------ */
/* Equal bits, or NaN on both sides; else |error| / max(1, |want|) as far as `tolerance` allows. */
static int agree(const float *want, const float *got, int64_t n, double tolerance)
{
    for (int64_t i = 0; i < n; i++) {
        double w = (double)want[i], g = (double)got[i];
        if (brute_bits(want[i]) == brute_bits(got[i]) || (w != w && g != g)) continue;
        if (tolerance > 0 && (w == g || fabs(w - g) <= tolerance * fmax(1.0, fabs(w)))) continue;
        printf("\n  element %lld of %lld: %.9g on the CPU, %.9g on the GPU", (long long)i, (long long)n, w, g);
        return 0;
    }
    return 1;
}
/* Scores: on tensor cores, errors relative to the root mean square of what there is. */
static int agree_scores(const float *want, const float *got, int64_t n)
{
    double square = 0, tolerance = path == DSA_CUDA_HOPPER ? 5e-3 : 1e-5;
    int64_t m = 0;
    for (int64_t i = 0; i < n; i++) if (isfinite(want[i])) { square += (double)want[i] * (double)want[i]; m++; }
    square = m > 0 ? sqrt(square / (double)m) : 0;
    if (exact) return agree(want, got, n, 0);
    for (int64_t i = 0; i < n; i++) {
        if ((isnan(want[i]) && isnan(got[i])) || want[i] == got[i]) continue;
        if (fabs((double)want[i] - (double)got[i]) <= tolerance * square) continue;
        printf("\n  score %lld of %lld: %.9g on the CPU, %.9g on the GPU", (long long)i, (long long)n, (double)want[i], (double)got[i]);
        return 0;
    }
    return 1;
}
#define SCORES_SAME(WANT, GOT, N) ASSERT(agree_scores(WANT, GOT, N))
#define SAME(WANT, GOT, N) ASSERT(agree(WANT, GOT, N, exact ? 0 : tolerance))
#define LSE_SAME(WANT, GOT, N) ASSERT(agree(WANT, GOT, N, exact ? 2.4e-7 : tolerance))

/* ---- a CPU side and a GPU side of the same sequences ------------------------------------------------------ */
#define SEQS 3
typedef struct shape {
    const char *name;
    dsa_type latent, key;
    int32_t R, r, H, HI, D, k, page;         /* page 0: one page */
    int32_t len[SEQS], n_q[SEQS];
    dsa_hadamard hadamard;
} shape;

typedef struct twin {
    const shape *s;
    dsa_ctx cpu, gpu;
    dsa_cache cl[SEQS], ci[SEQS], gl[SEQS], gi[SEQS];
    dsa_seq cs[SEQS], gs[SEQS];
    size_t latent_bytes, index_bytes;        /* of the pools, which all sequences share */
    unsigned char *cpu_latent, *cpu_index, *gpu_latent, *gpu_index;
    int32_t *tables[2], n_pages, stride;     /* [SEQS, stride] latent, index */
    int64_t rows;
    float *q, *index_q, *index_w, *sinks;
    double tolerance;
} twin;

static int32_t page_of(const shape *s) { return s->page ? s->page : 4096; }

static dsa_ctx context(const shape *s, dsa_cuda *cuda)
{
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.n_heads = s->H;
    c.dim_latent = s->R;
    c.dim_rope = s->r ? s->r : DSA_NONE;
    c.n_index_heads = s->HI;
    c.dim_index = s->D;
    c.index_rope_width = DSA_NONE;
    c.top_k = s->k;
    c.hadamard = s->hadamard;
    c.isa = DSA_ISA_SCALAR;
    c.cuda = cuda;
    if (dsa_init(&ctx, &c) != DSA_OK) { fprintf(stderr, "test set-up: dsa_init refused\n"); abort(); }
    return ctx;
}

static dsa_status view(const dsa_ctx *ctx, dsa_kind kind, dsa_type format, int32_t page, dsa_device where, void *pool, int32_t n_pages,
                       const int32_t *table, int32_t n, dsa_cache *c)
{
    dsa_cache_desc d = desc_of(kind, format, 0, page);
    size_t bytes = 0;
    d.device = where;
    dsa_page_bytes(kind, format, kind == DSA_LATENT ? ctx->config.dim_latent : ctx->config.dim_index,
                   kind == DSA_LATENT ? ctx->config.dim_rope : 0, page, &bytes);
    return dsa_cache_view(ctx, &d, pool, n_pages, (bytes + 31) / 16 * 16, table, n, 0, c);   /* a gap behind each page */
}

/* Two pools for all sequences, shuffled pages, NaN everywhere; the rows of each sequence appended in two calls on both sides. */
static enum greatest_test_res twin_make(bag *b, const shape *s, uint64_t seed, twin *t)
{
    const int32_t page = page_of(s);
    int32_t used = 0, width = s->R + s->r;
    memset(t, 0, sizeof *t);
    t->s = s;
    t->cpu = context(s, NULL);
    t->gpu = context(s, gpu);
    for (int i = 0; i < SEQS; i++) {
        int32_t n = (s->len[i] + page - 1) / page;
        if (n > t->stride) t->stride = n;
        used += n;
        t->rows += s->n_q[i];
    }
    t->stride += 2;
    t->n_pages = used + 3;
    size_t latent_page = 0, index_page = 0;
    dsa_page_bytes(DSA_LATENT, s->latent, s->R, s->r, page, &latent_page);
    dsa_page_bytes(DSA_INDEX_KEY, s->key, s->D, 0, page, &index_page);
    t->latent_bytes = (latent_page + 31) / 16 * 16 * (size_t)t->n_pages;
    t->index_bytes = (index_page + 31) / 16 * 16 * (size_t)t->n_pages;
    t->cpu_latent = bag_alloc(b, t->latent_bytes);
    t->cpu_index = bag_alloc(b, t->index_bytes);
    memset(t->cpu_latent, 0xFF, t->latent_bytes);
    memset(t->cpu_index, 0xFF, t->index_bytes);
    t->gpu_latent = device(t->latent_bytes);
    t->gpu_index = device(t->index_bytes);
    for (int kind = 0; kind < 2; kind++) {
        int32_t *pages = page_table(b, used, t->n_pages, seed + (uint64_t)kind), at = 0;
        t->tables[kind] = ints(b, SEQS * t->stride);
        for (int i = 0; i < SEQS; i++)
            for (int32_t j = 0; j < t->stride; j++)       /* holes where no row is */
                t->tables[kind][i * t->stride + j] = j < (s->len[i] + page - 1) / page ? pages[at++] : j % 2 ? INT32_MIN : 1 << 30;
    }
    for (int i = 0; i < SEQS; i++) {
        const int32_t *lt = t->tables[0] + i * t->stride, *it = t->tables[1] + i * t->stride;
        OK(view(&t->cpu, DSA_LATENT, s->latent, page, DSA_DEVICE_CPU, t->cpu_latent, t->n_pages, lt, t->stride, &t->cl[i]));
        OK(view(&t->cpu, DSA_INDEX_KEY, s->key, page, DSA_DEVICE_CPU, t->cpu_index, t->n_pages, it, t->stride, &t->ci[i]));
        OK(view(&t->gpu, DSA_LATENT, s->latent, page, DSA_DEVICE_CUDA, t->gpu_latent, t->n_pages, lt, t->stride, &t->gl[i]));
        OK(view(&t->gpu, DSA_INDEX_KEY, s->key, page, DSA_DEVICE_AUTO, t->gpu_index, t->n_pages, it, t->stride, &t->gi[i]));
        ASSERT_EQ(DSA_DEVICE_CUDA, t->gi[i].device);
        float *rows = random_floats(b, (int64_t)s->len[i] * width, seed + 10 * (uint64_t)i, 2.0f);
        float *keys = random_floats(b, (int64_t)s->len[i] * s->D, seed + 10 * (uint64_t)i + 1, 2.0f);
        for (int32_t half = 0, at = 0; half < 2; half++) {
            int32_t n = half ? s->len[i] - at : s->len[i] / 2;
            OK(append(&t->cpu, &t->cl[i], &t->ci[i], n, rows + (int64_t)at * width, keys + (int64_t)at * s->D));
            OK(append(&t->gpu, &t->gl[i], &t->gi[i], n, rows + (int64_t)at * width, keys + (int64_t)at * s->D));
            at += n;
        }
        ASSERT_EQ(s->len[i], t->gl[i].len);
        t->cs[i] = seq_of(&t->cl[i], &t->ci[i], s->n_q[i]);
        t->gs[i] = seq_of(&t->gl[i], &t->gi[i], s->n_q[i]);
    }
    t->q = random_floats(b, t->rows * s->H * width, seed + 91, 0.5f);
    t->index_q = random_floats(b, t->rows * s->HI * s->D, seed + 92, 1.0f);
    t->index_w = random_floats(b, t->rows * s->HI, seed + 93, 1.0f);
    t->sinks = random_floats(b, s->H, seed + 94, 3.0f);
    t->tolerance = exact ? 0 : 3e-2;
    return GREATEST_TEST_RES_PASS;
}

static enum greatest_test_res pools_equal(bag *b, const twin *t)
{
    ASSERT_MEM_EQ(t->cpu_latent, down(b, t->gpu_latent, t->latent_bytes), t->latent_bytes);
    ASSERT_MEM_EQ(t->cpu_index, down(b, t->gpu_index, t->index_bytes), t->index_bytes);
    return GREATEST_TEST_RES_PASS;
}

static const shape shapes[] = {
    /* name       latent    key       R    r   H    HI  D    k    page len                n_q        hadamard */
    { "v32_fp8",  DSA_FP8,  DSA_FP8,  512, 64, 128, 64, 128, 64,  64, { 300, 65, 200 },   { 2, 1, 3 }, DSA_HADAMARD_AUTO },
    { "v32_bf16", DSA_BF16, DSA_BF16, 512, 64, 64,  32, 128, 128, 64, { 300, 65, 200 },   { 1, 1, 1 }, DSA_HADAMARD_AUTO },
    { "r0_fp8",   DSA_FP8,  DSA_FP8,  512, 0,  16,  8,  128, 96,  32, { 300, 0, 200 },    { 2, 0, 5 }, DSA_HADAMARD_OFF },
    { "tiny_fp8", DSA_FP8,  DSA_INT8, 128, 16, 8,   4,  32,  20,  7,  { 130, 19, 77 },    { 4, 19, 1 }, DSA_HADAMARD_AUTO },
    { "tiny_f32", DSA_F32,  DSA_F32,  128, 16, 8,   4,  32,  64,  0,  { 400, 1, 64 },     { 3, 1, 2 }, DSA_HADAMARD_ON },
    { "odd",      DSA_FP8,  DSA_FP8,  203, 6,  5,   3,  48,  9,   5,  { 100, 31, 1 },     { 2, 7, 1 }, DSA_HADAMARD_OFF },
    { "one",      DSA_BF16, DSA_BF16, 1,   0,  1,   1,  1,   1,   1,  { 9, 2, 1 },        { 3, 2, 1 }, DSA_HADAMARD_AUTO },
    { "wide",     DSA_BF16, DSA_BF16, 640, 32, 3,   70, 1000, 33, 16, { 90, 0, 60 },      { 2, 0, 1 }, DSA_HADAMARD_AUTO },
    { "glm",      DSA_FP8,  DSA_FP8,  512, 64, 64,  32, 128, 256, 64, { 1500, 700, 0 },   { 1, 4, 0 }, DSA_HADAMARD_AUTO },
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

/* ---- host level ----------------------------------------------------------------------------------------- */
TEST appends(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 1, &t));
    CHECK_CALL(pools_equal(&b, &t));
    for (int i = 0; i < SEQS; i++) {
        int64_t n = s->len[i] * (int64_t)(s->R + s->r), m = s->len[i] * (int64_t)s->D;
        float *a = floats(&b, n), *c = floats(&b, n), *d = floats(&b, m), *e = floats(&b, m);
        OK(dsa_cache_read(&t.cpu, &t.cl[i], 0, s->len[i], a));
        OK(dsa_cache_read(&t.gpu, &t.gl[i], 0, s->len[i], c));
        OK(dsa_cache_read(&t.cpu, &t.ci[i], 0, s->len[i], d));
        OK(dsa_cache_read(&t.gpu, &t.gi[i], 0, s->len[i], e));
        ASSERT(agree(a, c, n, 0));
        ASSERT(agree(d, e, m, 0));
    }
    DONE(b);
}

/* Rows full of infinities, NaN, denormals and zeros are stored alike. By slots, too, some of them skipped. */
TEST appends_any_value(const shape *s)
{
    enum { N = 40 };
    static const float odd[] = { INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 1e-40f, 3e38f, -3e38f, 1e-5f, 448.0f, 464.0f, 0.0078125f };
    bag b = { 0 };
    twin t;
    int64_t slots[N];
    CHECK_CALL(twin_make(&b, s, 2, &t));
    int32_t page = page_of(s), width = s->R + s->r;
    float *rows = random_floats(&b, (int64_t)N * width, 5, 100.0f), *keys = random_floats(&b, (int64_t)N * s->D, 6, 100.0f);
    uint64_t r = 77;
    for (int64_t i = 0; i < (int64_t)N * width; i++) if (rnd(&r) % 7 == 0) rows[i] = odd[rnd(&r) % 12];
    for (int64_t i = 0; i < (int64_t)N * s->D; i++) if (rnd(&r) % 7 == 0) keys[i] = odd[rnd(&r) % 12];
    for (int i = 0; i < N; i++) slots[i] = i % 5 == 4 || i >= t.n_pages * page ? -1 : (int64_t)t.n_pages * page - 1 - i;
    for (int side = 0; side < 2; side++) {
        dsa_seq seq = side ? t.gs[0] : t.cs[0];
        dsa_append_args a;
        memset(&a, 0, sizeof a);
        seq.n_q = N;
        a.n_seqs = 1;
        a.seqs = &seq;
        a.latent = rows;
        a.index_key = keys;
        a.slots = slots;
        OK(dsa_append(side ? &t.gpu : &t.cpu, &a));
    }
    unsigned char *got = down(&b, t.gpu_index, t.index_bytes);
    for (size_t i = 0; i < t.index_bytes && s->key == DSA_FP8; i++)      /* inf - inf has a sign of its own on each machine */
        if ((got[i] & 0x7F) == 0x7F && (t.cpu_index[i] & 0x7F) == 0x7F) got[i] = t.cpu_index[i];
    if (s->key == DSA_FP8) ASSERT_MEM_EQ(t.cpu_index, got, t.index_bytes);
    if (s->latent == DSA_FP8) ASSERT_MEM_EQ(t.cpu_latent, down(&b, t.gpu_latent, t.latent_bytes), t.latent_bytes);
    DONE(b);
}

static dsa_score_args score_args(const twin *t, int side)
{
    dsa_score_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = SEQS;
    a.seqs = side ? t->gs : t->cs;
    a.q = t->index_q;
    a.w = t->index_w;
    return a;
}

static dsa_status plain_score(bag *b, const dsa_ctx *ctx, dsa_score_args a, float *scores, int64_t n_cols, int64_t stride)
{
    size_t bytes = 0;
    dsa_status st = dsa_score_workspace(ctx, &a, &bytes);
    if (st != DSA_OK) return st;
    a.workspace = work(b, bytes);
    a.workspace_size = bytes;
    return dsa_score(ctx, &a, scores, n_cols, stride);
}

/* Ranges that reach beyond both ends, are empty, or run backwards. */
static void ranges(bag *b, int64_t n, int32_t len, int64_t **ks, int64_t **ke)
{
    uint64_t r = 5;
    *ks = longs(b, n);
    *ke = longs(b, n);
    for (int64_t i = 0; i < n; i++) {
        (*ks)[i] = rnd_below(&r, len + 20) - 10;
        (*ke)[i] = (*ks)[i] + rnd_below(&r, len + 20) - 3;
        if (i % 5 == 0) { (*ks)[i] = INT64_MIN; (*ke)[i] = INT64_MAX; }
    }
}

TEST scores(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 3, &t));
    for (int what = 0; what < 3; what++) {
        int64_t n_cols = what == 1 ? s->len[0] / 3 : s->len[0] + 5, stride = n_cols + 3;
        float *c = floats(&b, t.rows * stride), *g = floats(&b, t.rows * stride);
        memset(c, 0x11, (size_t)(t.rows * stride) * 4);
        memset(g, 0x11, (size_t)(t.rows * stride) * 4);
        dsa_score_args ca = score_args(&t, 0), ga = score_args(&t, 1);
        int64_t *ks, *ke;
        ranges(&b, t.rows, s->len[0], &ks, &ke);
        if (what == 2) { ca.ks = ga.ks = ks; ca.ke = ga.ke = ke; }
        OK(plain_score(&b, &t.cpu, ca, c, n_cols, stride));
        OK(plain_score(&b, &t.gpu, ga, g, n_cols, stride));
        SCORES_SAME(c, g, t.rows * stride);
    }
    DONE(b);
}

/* Lists of the faster paths: as many entries as the CPU's, each once, in order; what only one of the two has lies at the CPU's cut: within
   1e-5 of it on the portable path, on Hopper within what its FP8 sums may be off. */
static enum greatest_test_res lists_hold(bag *b, const twin *t, dsa_score_args a, const dsa_selection *want, const int32_t *got)
{
    int64_t n_cols = 0, k = want->top_k;
    for (int i = 0; i < SEQS; i++) if (t->s->len[i] > n_cols) n_cols = t->s->len[i];
    float *s = floats(b, t->rows * n_cols);
    unsigned char *seen = bag_alloc(b, (size_t)n_cols + 1);
    OK(plain_score(b, &t->cpu, a, s, n_cols, n_cols));
    for (int64_t row = 0; row < t->rows; row++) {
        const int32_t *w = want->indices + row * k, *g = got + row * k;
        const float *I = s + row * n_cols;
        double square = 0, cut = HUGE_VAL, tolerance;
        int64_t m = 0;
        for (int64_t i = 0; i < n_cols; i++) if (isfinite(I[i])) { square += (double)I[i] * (double)I[i]; m++; }
        memset(seen, 0, (size_t)n_cols + 1);
        for (int64_t i = 0; i < k && w[i] >= 0; i++) {
            seen[w[i]] = 1;
            if ((double)I[w[i]] < cut) cut = (double)I[w[i]];
        }
        tolerance = path == DSA_CUDA_HOPPER ? 1e-2 * (m > 0 ? sqrt(square / (double)m) : 0) : 1e-5 * fabs(cut);
        for (int64_t i = 0; i < k; i++) {
            ASSERT_EQ(w[i] < 0, g[i] < 0);
            if (w[i] < 0) continue;
            ASSERT(g[i] < n_cols && !(seen[g[i]] & 2));
            seen[g[i]] |= 2;
            if (want->order == DSA_ORDER_INDEX) ASSERT(i == 0 || g[i] > g[i - 1]);
        }
        for (int64_t i = 0; i < n_cols; i++) {
            if (seen[i] != 1 && seen[i] != 2) continue;
            if (fabs((double)I[i] - cut) <= tolerance) continue;
            printf("\n  row %lld: %lld is on the %s list only, score %.9g, cut %.9g", (long long)row, (long long)i,
                   seen[i] == 1 ? "CPU's" : "GPU's", (double)I[i], cut);
            FAIL();
        }
    }
    return GREATEST_TEST_RES_PASS;
}

TEST selects(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 4, &t));
    for (int what = 0; what < 8; what++) {
        int32_t k = what & 4 ? s->k * 2 + 1 : s->k;
        int64_t n = t.rows * k, *ks, *ke;
        dsa_selection co, go;
        memset(&co, 0, sizeof co);
        co.top_k = k;
        co.order = what & 1 ? DSA_ORDER_RANK : DSA_ORDER_INDEX;
        go = co;
        co.indices = ints(&b, n);
        go.indices = ints(&b, n);
        co.counts = ints(&b, t.rows);
        go.counts = ints(&b, t.rows);
        if (what & 2) { co.scores = floats(&b, n); go.scores = floats(&b, n); }
        dsa_score_args ca = score_args(&t, 0), ga = score_args(&t, 1);
        ranges(&b, t.rows, s->len[0], &ks, &ke);
        if (what & 4) { ca.ks = ga.ks = ks; ca.ke = ga.ke = ke; }
        OK(score_select(&b, &t.cpu, ca, &co));
        OK(score_select(&b, &t.gpu, ga, &go));
        if (exact) ASSERT_MEM_EQ(co.indices, go.indices, (size_t)n * 4);
        else CHECK_CALL(lists_hold(&b, &t, ca, &co, go.indices));
        ASSERT_MEM_EQ(co.counts, go.counts, (size_t)t.rows * 4);
        if (what & 2 && (exact || what & 1)) SCORES_SAME(co.scores, go.scores, n);
    }
    DONE(b);
}

static dsa_attend_args attend_of(const twin *t, int side, dsa_attend_what what)
{
    dsa_attend_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = SEQS;
    a.seqs = side ? t->gs : t->cs;
    a.q = t->q;
    a.scale = 0.2f;
    a.what = what;
    return a;
}

/* Lists with everything that an int32 can be. */
static int32_t *lists(bag *b, int64_t rows, int32_t n, int32_t len, uint64_t seed)
{
    int32_t *x = ints(b, rows * n);
    uint64_t r = seed;
    for (int64_t i = 0; i < rows * n; i++) {
        x[i] = rnd_below(&r, len + 2);
        switch (rnd(&r) % 23) {
        case 0: x[i] = -1; break;
        case 1: x[i] = INT32_MIN; break;
        case 2: x[i] = INT32_MAX; break;
        case 3: x[i] = -x[i]; break;
        case 4: if (i > 0) x[i] = x[i - 1]; break;
        default: break;
        }
    }
    return x;
}

TEST attends(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 5, &t));
    const double tolerance = t.tolerance;
    const int32_t n = 150, dv = s->R + s->r > 2 ? s->R + s->r - 1 : s->R;
    int64_t *ks, *ke;
    int32_t *list = lists(&b, t.rows, n + 5, s->len[0], 3), *counts = ints(&b, t.rows);
    ranges(&b, t.rows, s->len[0], &ks, &ke);
    for (int64_t i = 0; i < t.rows; i++) counts[i] = (int32_t)(i * 37 % (n + 30)) - 5;
    for (int what = 0; what < 5; what++) {
        dsa_attend_state cs = state_of(&b, t.rows, s->H, what == 3 ? dv : s->R), gs = state_of(&b, t.rows, s->H, what == 3 ? dv : s->R);
        OK(dsa_attend_begin(&t.cpu, &cs));
        OK(dsa_attend_begin(&t.gpu, &gs));
        for (int twice = 0; twice < 2; twice++) {            /* the second add goes on from the first one's state */
            dsa_attend_args ca = attend_of(&t, 0, what == 1 ? DSA_ATTEND_RANGE : what == 2 ? DSA_ATTEND_VISIBLE : DSA_ATTEND_LIST), ga = ca;
            ga.seqs = t.gs;
            ca.indices = ga.indices = list + twice;
            ca.n_indices = ga.n_indices = n;
            ca.index_stride = ga.index_stride = n + 5;
            ca.index_kind = ga.index_kind = what == 4 ? DSA_PHYSICAL : DSA_LOGICAL;
            if (what == 3) ca.counts = ga.counts = counts;
            ca.ks = ga.ks = ks;
            ca.ke = ga.ke = ke;
            if (what == 4) {                                 /* slots of rows that exist: the others are NaN, as they should be */
                int32_t *slots = ints(&b, t.rows * (n + 5));
                memcpy(slots, list, (size_t)(t.rows * (n + 5)) * 4);
                for (int64_t i = 0; i < t.rows * (n + 5); i++) {
                    int32_t p = list[i], page = page_of(s), of = s->len[0] > 0 ? 0 : 2;
                    slots[i] = p < 0 || p >= s->len[of] ? (p < 0 ? p : INT32_MAX) : t.tables[0][of * t.stride + p / page] * page + p % page;
                }
                ca.indices = ga.indices = slots;
            }
            OK(add(&b, &t.cpu, ca, &cs));
            OK(add(&b, &t.gpu, ga, &gs));
            int64_t m = t.rows * s->H;
            SAME(cs.max, gs.max, m);
            SAME(cs.sum, gs.sum, m);
            for (int64_t i = 0; i < m; i++)                  /* out is as large as sum */
                ASSERT(agree(cs.out + i * cs.dim_v, gs.out + i * cs.dim_v, cs.dim_v, exact ? 0 : tolerance * fmax(1.0, (double)cs.sum[i])));
        }
    }
    DONE(b);
}

TEST steps(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 6, &t));
    const double tolerance = t.tolerance;
    int64_t n = t.rows * s->H * s->R, m = t.rows * s->H;
    float *rows = random_floats(&b, t.rows * (s->R + s->r), 8, 2.0f), *keys = random_floats(&b, t.rows * s->D, 9, 2.0f);
    float *out[2], *lse[2];
    int32_t *list[2];
    for (int with_rows = 0; with_rows < 2; with_rows++) {
        for (int i = 0; i < SEQS && with_rows; i++) {        /* room for the new rows */
            OK(dsa_cache_truncate(&t.cpu, &t.cl[i], s->len[i] - s->n_q[i]));
            OK(dsa_cache_truncate(&t.cpu, &t.ci[i], s->len[i] - s->n_q[i]));
            OK(dsa_cache_truncate(&t.gpu, &t.gl[i], s->len[i] - s->n_q[i]));
            OK(dsa_cache_truncate(&t.gpu, &t.gi[i], s->len[i] - s->n_q[i]));
        }
        for (int side = 0; side < 2; side++) {
            dsa_step_args a;
            memset(&a, 0, sizeof a);
            a.n_seqs = SEQS;
            a.seqs = side ? t.gs : t.cs;
            a.q = t.q;
            a.index_q = t.index_q;
            a.index_w = t.index_w;
            a.sinks = t.sinks;
            a.out = out[side] = floats(&b, n);
            a.lse = lse[side] = floats(&b, m);
            list[side] = ints(&b, t.rows * s->k);
            a.indices = with_rows || !exact ? list[side] : NULL;
            if (with_rows) { a.latent = rows; a.index_key = keys; }
            OK(step(&b, side ? &t.gpu : &t.cpu, a));
        }
        if (exact && with_rows) ASSERT_MEM_EQ(list[0], list[1], (size_t)(t.rows * s->k) * 4);
        for (int64_t row = 0; row < t.rows; row++) {         /* rows that chose otherwise near the cut have another output */
            if (!exact && memcmp(list[0] + row * s->k, list[1] + row * s->k, (size_t)s->k * 4) != 0) continue;
            SAME(out[0] + row * (n / t.rows), out[1] + row * (n / t.rows), n / t.rows);
            LSE_SAME(lse[0] + row * s->H, lse[1] + row * s->H, s->H);
        }
    }
    CHECK_CALL(pools_equal(&b, &t));
    DONE(b);
}

/* ---- device level ----------------------------------------------------------------------------------------- */
static dsa_cuda_batch batch_of(bag *b, const twin *t, int uniform)
{
    const shape *s = t->s;
    dsa_cuda_batch x;
    int32_t first[SEQS + 1] = { 0 };
    (void)b;
    memset(&x, 0, sizeof x);
    for (int i = 0; i < SEQS; i++) {
        first[i + 1] = first[i] + s->n_q[i];
        if (s->len[i] > x.max_len) x.max_len = s->len[i];
    }
    x.n_seqs = SEQS;
    x.n_rows = t->rows;
    x.lens = up(s->len, sizeof s->len);
    if (!uniform) x.first_row = up(first, sizeof first);
    return x;
}
static dsa_cache pool_of(const twin *t, dsa_kind kind)
{
    dsa_cache c = kind == DSA_LATENT ? t->gl[0] : t->gi[0];
    c.block_table = up(t->tables[kind], (size_t)(SEQS * t->stride) * 4);
    c.n_blocks = t->stride;
    return c;
}
static uint16_t *to_bf16(bag *b, float *x, int64_t n)        /* x is rounded, too */
{
    uint16_t *y = bag_alloc(b, (size_t)n * 2);
    for (int64_t i = 0; i < n; i++) { y[i] = dsa_f32_to_bf16(x[i]); x[i] = dsa_bf16_to_f32(y[i]); }
    return y;
}
static float *widen(bag *b, const void *x, int64_t n, dsa_type type)
{
    float *y = floats(b, n);
    for (int64_t i = 0; i < n; i++) y[i] = type == DSA_BF16 ? dsa_bf16_to_f32(((const uint16_t *)x)[i]) : ((const float *)x)[i];
    return y;
}
/* Device workspace at an odd address, full of NaN. */
static void *device_work(size_t bytes) { return (unsigned char *)device(bytes + 1) + 1; }

static int uniform(const shape *s) { return s->n_q[0] == s->n_q[1] && s->n_q[1] == s->n_q[2]; }

/* The same pools through the device-level calls: ragged or uniform, f32 or bf16 operands, ranges, both orders. */
TEST device_scores(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 11, &t));
    int64_t n_q = t.rows * s->HI * s->D, *ks, *ke;
    uint16_t *half = to_bf16(&b, t.index_q, n_q);
    ranges(&b, t.rows, s->len[0], &ks, &ke);
    int32_t *ks32 = ints(&b, t.rows), *ke32 = ints(&b, t.rows);
    for (int64_t i = 0; i < t.rows; i++) {
        ks32[i] = ks[i] < INT32_MIN ? INT32_MIN : (int32_t)ks[i];
        ke32[i] = ke[i] > INT32_MAX ? INT32_MAX : (int32_t)ke[i];
    }
    dsa_cache index = pool_of(&t, DSA_INDEX_KEY);
    for (int what = 0; what < 8; what++) {
        dsa_cuda_score_args a;
        dsa_score_args ca = score_args(&t, 0);
        size_t bytes = 0;
        memset(&a, 0, sizeof a);
        a.batch = batch_of(&b, &t, uniform(s) && what % 2 == 0);
        a.index = &index;
        a.q_type = what & 1 ? DSA_BF16 : DSA_F32;
        a.q = what & 1 ? up(half, (size_t)n_q * 2) : up(t.index_q, (size_t)n_q * 4);
        a.w = up(t.index_w, (size_t)(t.rows * s->HI) * 4);
        if (what & 2) {
            a.ks = up(ks32, (size_t)t.rows * 4);
            a.ke = up(ke32, (size_t)t.rows * 4);
            ca.ks = ks;
            ca.ke = ke;
        }
        if (what & 4) {                                      /* selection */
            dsa_selection co, go;
            memset(&co, 0, sizeof co);
            co.top_k = s->k;
            co.order = what & 1 ? DSA_ORDER_RANK : DSA_ORDER_INDEX;
            go = co;
            int64_t n = t.rows * s->k;
            co.indices = ints(&b, n);
            co.scores = what & 2 ? floats(&b, n) : NULL;
            co.counts = ints(&b, t.rows);
            go.indices = device((size_t)n * 4);
            go.scores = what & 2 ? device((size_t)n * 4) : NULL;
            go.counts = device((size_t)t.rows * 4);
            OK(score_select(&b, &t.cpu, ca, &co));
            OK(dsa_cuda_score_select_workspace(&t.gpu, &a, &go, &bytes));
            a.workspace = device_work(bytes);
            a.workspace_size = bytes;
            int32_t *was = NULL;
            for (int repeat = 0; repeat < 20; repeat++) {
                CUDA(cudaMemset(a.workspace, 0xFF, bytes));
                OK(dsa_cuda_score_select(&t.gpu, &a, &go, NULL));
                int32_t *is = down(&b, go.indices, (size_t)n * 4);
                if (was) ASSERT_MEM_EQ(was, is, (size_t)n * 4);
                was = is;
            }
            if (exact) ASSERT_MEM_EQ(co.indices, was, (size_t)n * 4);
            else CHECK_CALL(lists_hold(&b, &t, ca, &co, was));
            ASSERT_MEM_EQ(co.counts, down(&b, go.counts, (size_t)t.rows * 4), (size_t)t.rows * 4);
            if (what & 2 && (exact || what & 1)) SCORES_SAME(co.scores, down(&b, go.scores, (size_t)n * 4), n);
        } else {
            int64_t n_cols = s->len[0] + 5, stride = n_cols + 3, n = t.rows * stride;
            float *c = floats(&b, n), *g = device((size_t)n * 4);
            memset(c, 0xFF, (size_t)n * 4);
            OK(plain_score(&b, &t.cpu, ca, c, n_cols, stride));
            OK(dsa_cuda_score_workspace(&t.gpu, &a, &bytes));
            a.workspace = device_work(bytes);
            a.workspace_size = bytes;
            OK(dsa_cuda_score(&t.gpu, &a, g, n_cols, stride, NULL));
            SCORES_SAME(c, down(&b, g, (size_t)n * 4), n);
        }
    }
    DONE(b);
}

/* FP8 queries that are rotated and rounded already, their scales in w. */
TEST device_prepared_queries(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 12, &t));
    int64_t heads = t.rows * s->HI, n_cols = s->len[0], n = t.rows * n_cols;
    uint8_t *q8 = bag_alloc(&b, (size_t)(heads * s->D));
    float *w = floats(&b, heads), *c = floats(&b, n), *g = device((size_t)n * 4), *head = floats(&b, s->D);
    size_t bytes = 0;
    for (int64_t h = 0; h < heads; h++) {
        memcpy(head, t.index_q + h * s->D, (size_t)s->D * 4);
        if (t.gi[0].hadamard) OK(dsa_hadamard_rows(head, 1, s->D, s->D));
        w[h] = t.index_w[h] * dsa_quantize_e4m3(head, s->D, q8 + h * s->D);
    }
    dsa_cache index = pool_of(&t, DSA_INDEX_KEY);
    dsa_cuda_score_args a;
    memset(&a, 0, sizeof a);
    a.batch = batch_of(&b, &t, 0);
    a.index = &index;
    a.q = up(q8, (size_t)(heads * s->D));
    a.q_type = DSA_FP8;
    a.w = up(w, (size_t)heads * 4);
    OK(dsa_cuda_score_workspace(&t.gpu, &a, &bytes));
    a.workspace = device_work(bytes);
    a.workspace_size = bytes;
    OK(plain_score(&b, &t.cpu, score_args(&t, 0), c, n_cols, n_cols));
    OK(dsa_cuda_score(&t.gpu, &a, g, n_cols, n_cols, NULL));
    SCORES_SAME(c, down(&b, g, (size_t)n * 4), n);
    DONE(b);
}

TEST device_attends(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 13, &t));
    const double tolerance = t.tolerance;
    const int32_t n = 150;
    int64_t n_q = t.rows * s->H * (s->R + s->r), n_out = t.rows * s->H * s->R, m = t.rows * s->H, *ks, *ke;
    uint16_t *half = to_bf16(&b, t.q, n_q);
    int32_t *list = lists(&b, t.rows, n, s->len[0], 3), *counts = ints(&b, t.rows), *ks32 = ints(&b, t.rows), *ke32 = ints(&b, t.rows);
    ranges(&b, t.rows, s->len[0], &ks, &ke);
    for (int64_t i = 0; i < t.rows; i++) {
        counts[i] = (int32_t)(i * 37 % (n + 30)) - 5;
        ks32[i] = ks[i] < INT32_MIN ? INT32_MIN : (int32_t)ks[i];
        ke32[i] = ke[i] > INT32_MAX ? INT32_MAX : (int32_t)ke[i];
    }
    dsa_cache latent = pool_of(&t, DSA_LATENT);
    for (int what = 0; what < 6; what++) {
        dsa_cuda_attend_args a;
        dsa_attend_args ca = attend_of(&t, 0, what % 3 == 1 ? DSA_ATTEND_RANGE : what % 3 == 2 ? DSA_ATTEND_VISIBLE : DSA_ATTEND_LIST);
        const float *sinks = what & 1 ? t.sinks : NULL;
        size_t bytes = 0, size = what < 3 ? 4 : 2;
        float *out = floats(&b, n_out), *lse = floats(&b, m), *max = floats(&b, m), *was = NULL;
        ca.indices = list;
        ca.n_indices = n;
        ca.counts = what == 3 ? counts : NULL;
        ca.ks = ks;
        ca.ke = ke;
        OK(attend(&b, &t.cpu, ca, t.rows, s->H, s->R, sinks, out, lse, max));
        memset(&a, 0, sizeof a);
        a.batch = batch_of(&b, &t, 0);
        a.latent = &latent;
        a.q_type = what < 3 ? DSA_F32 : DSA_BF16;
        a.q = what < 3 ? up(t.q, (size_t)n_q * 4) : up(half, (size_t)n_q * 2);
        a.scale = 0.2f;
        a.what = ca.what;
        a.indices = up(list, (size_t)(t.rows * n) * 4);
        a.n_indices = n;
        a.counts = ca.counts ? up(counts, (size_t)t.rows * 4) : NULL;
        a.ks = up(ks32, (size_t)t.rows * 4);
        a.ke = up(ke32, (size_t)t.rows * 4);
        a.sinks = sinks ? up(sinks, (size_t)s->H * 4) : NULL;
        a.out_type = what < 3 ? DSA_F32 : DSA_BF16;
        a.out = device((size_t)n_out * size);
        a.lse = device((size_t)m * 4);
        a.max_logit = device((size_t)m * 4);
        OK(dsa_cuda_attend_workspace(&t.gpu, &a, &bytes));
        a.workspace = device_work(bytes);
        a.workspace_size = bytes;
        for (int repeat = 0; repeat < 20; repeat++) {
            CUDA(cudaMemset(a.workspace, 0xFF, bytes));
            CUDA(cudaMemset(a.out, 0xFF, (size_t)n_out * size));
            OK(dsa_cuda_attend(&t.gpu, &a, NULL));
            float *is = widen(&b, down(&b, a.out, (size_t)n_out * size), n_out, a.out_type);
            if (was) ASSERT_MEM_EQ(was, is, (size_t)n_out * 4);
            was = is;
        }
        if (a.out_type == DSA_BF16) (void)to_bf16(&b, out, n_out);
        SAME(out, was, n_out);
        LSE_SAME(lse, down(&b, a.lse, (size_t)m * 4), m);
        SAME(max, down(&b, a.max_logit, (size_t)m * 4), m);
    }
    DONE(b);
}

/* Two partials and their merge. */
TEST device_merges(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 14, &t));
    const double tolerance = t.tolerance;
    const int32_t n = 60;
    int64_t n_q = t.rows * s->H * (s->R + s->r), n_out = t.rows * s->H * s->R, m = t.rows * s->H;
    dsa_cache latent = pool_of(&t, DSA_LATENT);
    float *outs = device((size_t)n_out * 8), *lses = device((size_t)m * 8), *gout = device((size_t)n_out * 4),
        *glse = device((size_t)m * 4);
    float *co[2], *cl[2], *out = floats(&b, n_out), *lse = floats(&b, m);
    for (int p = 0; p < 2; p++) {
        int32_t *list = lists(&b, t.rows, n, s->len[0], 31 + (uint64_t)p);
        for (int64_t i = 0; i < n; i++) list[i] = p ? list[i] : -1;      /* the first row of the first part is empty */
        dsa_attend_args ca = attend_of(&t, 0, DSA_ATTEND_LIST);
        dsa_attend_state state = state_of(&b, t.rows, s->H, s->R);
        ca.indices = list;
        ca.n_indices = n;
        co[p] = floats(&b, n_out);
        cl[p] = floats(&b, m);
        OK(dsa_attend_begin(&t.cpu, &state));
        OK(add(&b, &t.cpu, ca, &state));
        OK(dsa_attend_partial(&t.cpu, &state, co[p], cl[p]));
        dsa_cuda_attend_args a;
        size_t bytes = 0;
        memset(&a, 0, sizeof a);
        a.batch = batch_of(&b, &t, 0);
        a.latent = &latent;
        a.q = up(t.q, (size_t)n_q * 4);
        a.scale = 0.2f;
        a.indices = up(list, (size_t)(t.rows * n) * 4);
        a.n_indices = n;
        a.out = outs + p * n_out;
        a.lse = lses + p * m;
        OK(dsa_cuda_attend_workspace(&t.gpu, &a, &bytes));
        a.workspace = device_work(bytes);
        a.workspace_size = bytes;
        OK(dsa_cuda_attend(&t.gpu, &a, NULL));
    }
    OK(dsa_attend_merge(&t.cpu, 2, (const float *const *)co, (const float *const *)cl, t.rows, s->H, s->R, t.sinks, out, lse));
    OK(dsa_cuda_merge(&t.gpu, 2, outs, lses, t.rows, s->H, s->R, up(t.sinks, (size_t)s->H * 4), gout, DSA_F32, glse, NULL));
    ASSERT(agree(out, down(&b, gout, (size_t)n_out * 4), n_out, exact ? 2e-6 : tolerance));
    ASSERT(agree(lse, down(&b, glse, (size_t)m * 4), m, exact ? 5e-7 : tolerance));
    DONE(b);
}

/* A step with rows to append, captured in a graph and replayed: the first launch and every replay leave the same bits. */
TEST device_steps(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 15, &t));
    const double tolerance = t.tolerance;
    int64_t n_q = t.rows * s->H * (s->R + s->r), n_i = t.rows * s->HI * s->D, n_out = t.rows * s->H * s->R, m = t.rows * s->H;
    float *rows = random_floats(&b, t.rows * (s->R + s->r), 8, 2.0f), *keys = random_floats(&b, t.rows * s->D, 9, 2.0f);
    float *out = floats(&b, n_out), *lse = floats(&b, m);
    int32_t *list = ints(&b, t.rows * s->k);
    size_t bytes = 0;
    dsa_step_args ca;
    memset(&ca, 0, sizeof ca);
    for (int i = 0; i < SEQS; i++) {
        OK(dsa_cache_truncate(&t.cpu, &t.cl[i], s->len[i] - s->n_q[i]));
        OK(dsa_cache_truncate(&t.cpu, &t.ci[i], s->len[i] - s->n_q[i]));
    }
    ca.n_seqs = SEQS;
    ca.seqs = t.cs;
    ca.latent = rows;
    ca.index_key = keys;
    ca.q = t.q;
    ca.index_q = t.index_q;
    ca.index_w = t.index_w;
    ca.sinks = t.sinks;
    ca.out = out;
    ca.lse = lse;
    ca.indices = list;
    OK(step(&b, &t.cpu, ca));
    dsa_cache latent = pool_of(&t, DSA_LATENT), index = pool_of(&t, DSA_INDEX_KEY);
    dsa_cuda_step_args a;
    memset(&a, 0, sizeof a);
    a.batch = batch_of(&b, &t, uniform(s));
    a.latent = &latent;
    a.index = &index;
    a.latent_rows = up(rows, (size_t)(t.rows * (s->R + s->r)) * 4);
    a.index_rows = up(keys, (size_t)(t.rows * s->D) * 4);
    a.q = up(t.q, (size_t)n_q * 4);
    a.index_q = up(t.index_q, (size_t)n_i * 4);
    a.index_w = up(t.index_w, (size_t)(t.rows * s->HI) * 4);
    a.sinks = up(t.sinks, (size_t)s->H * 4);
    a.out = device((size_t)n_out * 4);
    a.lse = device((size_t)m * 4);
    a.indices = device((size_t)(t.rows * s->k) * 4);
    OK(dsa_cuda_step_workspace(&t.gpu, &a, &bytes));
    a.workspace = device_work(bytes);
    a.workspace_size = bytes;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t run;
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaStreamCreate(&stream));
    OK(dsa_cuda_step(&t.gpu, &a, stream));
    CUDA(cudaStreamSynchronize(stream));
    int32_t *got = down(&b, a.indices, (size_t)(t.rows * s->k) * 4);
    float *first = down(&b, a.out, (size_t)n_out * 4);
    if (exact) ASSERT_MEM_EQ(list, got, (size_t)(t.rows * s->k) * 4);
    float *first_lse = down(&b, a.lse, (size_t)m * 4);
    for (int64_t row = 0; row < t.rows; row++) {
        if (!exact && memcmp(list + row * s->k, got + row * s->k, (size_t)s->k * 4) != 0) continue;
        SAME(out + row * (n_out / t.rows), first + row * (n_out / t.rows), n_out / t.rows);
        LSE_SAME(lse + row * s->H, first_lse + row * s->H, s->H);
    }
    CHECK_CALL(pools_equal(&b, &t));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    OK(dsa_cuda_step(&t.gpu, &a, stream));
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiateWithFlags(&run, graph, 0));
    for (int repeat = 0; repeat < 20; repeat++) {
        CUDA(cudaMemset(a.out, 0xFF, (size_t)n_out * 4));
        CUDA(cudaMemset(a.workspace, 0xFF, bytes));
        CUDA(cudaDeviceSynchronize());
        CUDA(cudaGraphLaunch(run, stream));
        CUDA(cudaStreamSynchronize(stream));
        ASSERT_MEM_EQ(first, down(&b, a.out, (size_t)n_out * 4), (size_t)n_out * 4);
        ASSERT_MEM_EQ(got, down(&b, a.indices, (size_t)(t.rows * s->k) * 4), (size_t)(t.rows * s->k) * 4);
    }
    CUDA(cudaGraphExecDestroy(run));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    DONE(b);
}

/* One row's bits do not depend on its batch mates: each sequence alone gives what the batch gave. */
TEST device_rows_alone(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 16, &t));
    int64_t n_q = s->H * (int64_t)(s->R + s->r), n_i = s->HI * (int64_t)s->D, n_out = s->H * (int64_t)s->R, row = 0;
    float *all = NULL;
    int32_t *all_list = NULL;
    dsa_cache latent = pool_of(&t, DSA_LATENT), index = pool_of(&t, DSA_INDEX_KEY);
    float *q = up(t.q, (size_t)(t.rows * n_q) * 4), *iq = up(t.index_q, (size_t)(t.rows * n_i) * 4), *w = up(t.index_w,
        (size_t)(t.rows * s->HI) * 4);
    for (int i = -1; i < SEQS; i++) {
        dsa_cuda_step_args a;
        size_t bytes = 0;
        int64_t n = i < 0 ? t.rows : s->n_q[i];
        dsa_cache l = latent, x = index;
        if (n == 0) continue;
        memset(&a, 0, sizeof a);
        a.batch = batch_of(&b, &t, 0);
        if (i >= 0) {
            a.batch.n_seqs = 1;
            a.batch.n_rows = n;
            a.batch.first_row = NULL;
            a.batch.lens += i;
            l.block_table += i * t.stride;
            x.block_table += i * t.stride;
        }
        a.latent = &l;
        a.index = &x;
        a.q = q + row * n_q;
        a.index_q = iq + row * n_i;
        a.index_w = w + row * s->HI;
        a.out = device((size_t)(n * n_out) * 4);
        a.indices = device((size_t)(n * s->k) * 4);
        OK(dsa_cuda_step_workspace(&t.gpu, &a, &bytes));
        a.workspace = device_work(bytes);
        a.workspace_size = bytes;
        OK(dsa_cuda_step(&t.gpu, &a, NULL));
        float *out = down(&b, a.out, (size_t)(n * n_out) * 4);
        int32_t *list = down(&b, a.indices, (size_t)(n * s->k) * 4);
        if (i < 0) { all = out; all_list = list; continue; }
        ASSERT_MEM_EQ(all_list + row * s->k, list, (size_t)(n * s->k) * 4);
        ASSERT_MEM_EQ(all + row * n_out, out, (size_t)(n * n_out) * 4);
        row += n;
    }
    DONE(b);
}

/* The same where the kernels cut the work otherwise: a batch of many rows, which has one block for all of a row's list and several rows for
   a key, against one row at a time, which is shared by many blocks. */
TEST device_rows_of_many(const shape *s)
{
    enum { MANY = 70, STEP = 9 };
    bag b = { 0 };
    twin t;
    shape x = *s;
    x.len[0] = 900;
    x.len[1] = x.len[2] = 1;
    x.n_q[0] = MANY;
    x.n_q[1] = x.n_q[2] = 0;
    x.k = 600;
    CHECK_CALL(twin_make(&b, &x, 19, &t));
    int64_t n_q = x.H * (int64_t)(x.R + x.r), n_i = x.HI * (int64_t)x.D, n_out = x.H * (int64_t)x.R;
    float *q = up(t.q, (size_t)(MANY * n_q) * 4), *iq = up(t.index_q, (size_t)(MANY * n_i) * 4);
    float *w = up(t.index_w, (size_t)(MANY * x.HI) * 4), *all = NULL, *all_lse = NULL;
    int32_t *all_list = NULL;
    dsa_cache latent = pool_of(&t, DSA_LATENT), index = pool_of(&t, DSA_INDEX_KEY);
    for (int64_t row = -1; row < MANY; row += row < 0 ? 1 : STEP) {
        dsa_cuda_step_args a;
        size_t bytes = 0;
        int64_t n = row < 0 ? MANY : 1, from = row < 0 ? 0 : row;
        int32_t len = row < 0 ? x.len[0] : (int32_t)(x.len[0] - MANY + row + 1);
        memset(&a, 0, sizeof a);
        a.batch.n_seqs = 1;
        a.batch.n_rows = n;
        a.batch.max_len = x.len[0];
        a.batch.lens = up(&len, sizeof len);
        a.latent = &latent;
        a.index = &index;
        a.q = q + from * n_q;
        a.index_q = iq + from * n_i;
        a.index_w = w + from * x.HI;
        a.out = device((size_t)(n * n_out) * 4);
        a.lse = device((size_t)(n * x.H) * 4);
        a.indices = device((size_t)(n * x.k) * 4);
        OK(dsa_cuda_step_workspace(&t.gpu, &a, &bytes));
        a.workspace = device_work(bytes);
        a.workspace_size = bytes;
        OK(dsa_cuda_step(&t.gpu, &a, NULL));
        float *out = down(&b, a.out, (size_t)(n * n_out) * 4), *lse = down(&b, a.lse, (size_t)(n * x.H) * 4);
        int32_t *list = down(&b, a.indices, (size_t)(n * x.k) * 4);
        if (row < 0) { all = out; all_lse = lse; all_list = list; continue; }
        ASSERT_MEM_EQ(all_list + row * x.k, list, (size_t)x.k * 4);
        ASSERT_MEM_EQ(all + row * n_out, out, (size_t)n_out * 4);
        ASSERT_MEM_EQ(all_lse + row * x.H, lse, (size_t)x.H * 4);
    }
    DONE(b);
}

/* Any number of heads, pages of any size. */
TEST device_heads(const shape *s)
{
    static const int32_t heads[] = { 1, 2, 7, 8, 9, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128 }, pages[] = { 64, 1, 3, 100, 128 };
    for (int i = 0; i < 15; i++) {
        shape x = *s;
        x.H = heads[i];
        x.HI = heads[14 - i];
        x.page = pages[i % 5];
        enum greatest_test_res res = device_steps(&x);
        if (res != GREATEST_TEST_RES_PASS) printf("\n  %d heads, %d of the indexer, pages of %d", x.H, x.HI, x.page);
        if (res != GREATEST_TEST_RES_PASS) return res;
    }
    PASS();
}

/* Tables with holes among the rows that are seen: their keys score -inf and are never selected, their latents are skipped. */
TEST device_holes(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 20, &t));
    const double tolerance = t.tolerance;
    const int32_t page = page_of(s), bad[] = { -1, INT32_MIN, t.n_pages, INT32_MAX };
    int64_t n_cols = s->len[0], n_out = t.rows * s->H * s->R, m = t.rows * s->H, row = 0;
    float *c = floats(&b, t.rows * n_cols), *out = floats(&b, n_out), *lse = floats(&b, m);
    int32_t *list = ints(&b, t.rows * s->k), *counts = ints(&b, t.rows);
    dsa_selection sel;
    size_t bytes = 0;
    OK(plain_score(&b, &t.cpu, score_args(&t, 0), c, n_cols, n_cols));
    for (int i = 0; i < SEQS; i++)
        for (int32_t q = 0; q < s->n_q[i]; q++, row++)
            for (int32_t j = 0; j < n_cols; j++) if (j / page % 3 == 1) c[row * n_cols + j] = -INFINITY;
    for (int kind = 0; kind < 2; kind++)
        for (int32_t j = 0; j < SEQS * t.stride; j++) if (j % t.stride % 3 == 1) t.tables[kind][j] = bad[j % 4];
    dsa_cache latent = pool_of(&t, DSA_LATENT), index = pool_of(&t, DSA_INDEX_KEY);
    dsa_cuda_score_args a;
    memset(&a, 0, sizeof a);
    memset(&sel, 0, sizeof sel);
    a.batch = batch_of(&b, &t, 0);
    a.index = &index;
    a.q = up(t.index_q, (size_t)(t.rows * s->HI * s->D) * 4);
    a.w = up(t.index_w, (size_t)(t.rows * s->HI) * 4);
    OK(dsa_cuda_score_workspace(&t.gpu, &a, &bytes));
    a.workspace = device_work(bytes);
    a.workspace_size = bytes;
    float *g = device((size_t)(t.rows * n_cols) * 4);
    OK(dsa_cuda_score(&t.gpu, &a, g, n_cols, n_cols, NULL));
    SCORES_SAME(c, down(&b, g, (size_t)(t.rows * n_cols) * 4), t.rows * n_cols);
    sel.top_k = s->k;
    sel.order = DSA_ORDER_RANK;                              /* no row takes all that it sees unseen */
    sel.indices = device((size_t)(t.rows * s->k) * 4);
    sel.scores = device((size_t)(t.rows * s->k) * 4);
    sel.counts = device((size_t)t.rows * 4);
    OK(dsa_cuda_score_select_workspace(&t.gpu, &a, &sel, &bytes));
    a.workspace = device_work(bytes);
    a.workspace_size = bytes;
    OK(dsa_cuda_score_select(&t.gpu, &a, &sel, NULL));
    int32_t *got = down(&b, sel.indices, (size_t)(t.rows * s->k) * 4), *n_got = down(&b, sel.counts, (size_t)t.rows * 4);
    for (row = 0; row < t.rows; row++) {
        int64_t n = 0, finite = 0;
        for (int64_t i = 0; i < n_cols; i++) finite += c[row * n_cols + i] > -INFINITY;
        for (; n < s->k && got[row * s->k + n] >= 0; n++) ASSERT(c[row * n_cols + got[row * s->k + n]] > -INFINITY);
        counts[row] = (int32_t)(finite < s->k ? finite : s->k);
        ASSERT_EQ(counts[row], n);
        ASSERT_EQ(counts[row], n_got[row]);
    }
    /* attention over lists that name rows in holes: the CPU gets -1 in their place */
    uint64_t r = 21;
    for (int64_t i = 0; i < t.rows * s->k; i++) list[i] = rnd_below(&r, s->len[0] + 3);
    dsa_cuda_attend_args ga;
    memset(&ga, 0, sizeof ga);
    ga.batch = a.batch;
    ga.latent = &latent;
    ga.q = up(t.q, (size_t)(m * (s->R + s->r)) * 4);
    ga.scale = 0.2f;
    ga.indices = up(list, (size_t)(t.rows * s->k) * 4);
    ga.n_indices = s->k;
    ga.out = device((size_t)n_out * 4);
    ga.lse = device((size_t)m * 4);
    OK(dsa_cuda_attend_workspace(&t.gpu, &ga, &bytes));
    ga.workspace = device_work(bytes);
    ga.workspace_size = bytes;
    OK(dsa_cuda_attend(&t.gpu, &ga, NULL));
    for (int64_t i = 0; i < t.rows * s->k; i++) if (list[i] / page % 3 == 1) list[i] = -1;
    dsa_attend_args ca = attend_of(&t, 0, DSA_ATTEND_LIST);
    ca.indices = list;
    ca.n_indices = s->k;
    for (int i = 0; i < SEQS; i++) {                         /* the CPU looks at whole tables first */
        int32_t n = (s->len[i] + page - 1) / page, *of = t.tables[0] + i * t.stride;
        for (int32_t j = 0; j < n; j++) if (j % 3 == 1) of[j] = 0;
    }
    OK(attend(&b, &t.cpu, ca, t.rows, s->H, s->R, NULL, out, lse, NULL));
    SAME(out, down(&b, ga.out, (size_t)n_out * 4), n_out);
    LSE_SAME(lse, down(&b, ga.lse, (size_t)m * 4), m);
    DONE(b);
}

/* The workspace does not grow with rows times keys, and what serves many rows serves fewer. */
TEST workspaces(void)
{
    static const int64_t rows[] = { 4096, 64, 1, 7, 63, 448, 449, 1000 }, lens[] = { 1 << 20, 131072, 32768, 2048 };
    bag b = { 0 };
    dsa_config config;
    dsa_ctx ctx;
    dsa_cache latent, index;
    void *pool = device(1 << 16);
    OK(dsa_config_preset(DSA_DEEPSEEK_V32, &config));
    config.cuda = gpu;
    OK(dsa_init(&ctx, &config));
    OK(view(&ctx, DSA_LATENT, DSA_FP8, 64, DSA_DEVICE_CUDA, pool, 1 << 14, NULL, 1 << 14, &latent));
    OK(view(&ctx, DSA_INDEX_KEY, DSA_FP8, 64, DSA_DEVICE_CUDA, pool, 1 << 14, NULL, 1 << 14, &index));
    for (int l = 0; l < 4; l++) {
        size_t most_select = 0, most_step = 0, most_attend = 0;
        for (int i = 0; i < 8; i++) {
            dsa_cuda_step_args a;
            dsa_cuda_score_args s;
            dsa_cuda_attend_args t;
            dsa_selection out;
            size_t bytes[3] = { 0 };
            memset(&a, 0, sizeof a);
            memset(&s, 0, sizeof s);
            memset(&t, 0, sizeof t);
            memset(&out, 0, sizeof out);
            a.batch.n_seqs = 1;
            a.batch.n_rows = rows[i];
            a.batch.max_len = lens[l];
            a.batch.lens = pool;
            a.latent = &latent;
            a.index = &index;
            a.type = a.index_q_type = a.out_type = DSA_BF16;
            s.batch = t.batch = a.batch;
            if (rows[i] == 64) s.batch.n_seqs = t.batch.n_seqs = a.batch.n_seqs = 64;
            s.index = &index;
            s.q_type = DSA_FP8;
            t.latent = &latent;
            t.q_type = t.out_type = DSA_BF16;
            OK(dsa_cuda_score_select_workspace(&ctx, &s, &out, &bytes[0]));
            OK(dsa_cuda_step_workspace(&ctx, &a, &bytes[1]));
            OK(dsa_cuda_attend_workspace(&ctx, &t, &bytes[2]));
            if (i == 0) { most_select = bytes[0]; most_step = bytes[1]; most_attend = bytes[2]; }
            ASSERT(bytes[0] <= most_select && bytes[1] <= most_step && bytes[2] <= most_attend);
            ASSERT(bytes[0] <= (size_t)256 << 20 && bytes[2] <= (size_t)256 << 20);
            a.indices = pool;                                /* else the lists are in the workspace, too */
            OK(dsa_cuda_step_workspace(&ctx, &a, &bytes[1]));
            ASSERT(bytes[1] <= (size_t)256 << 20);
        }
    }
    DONE(b);
}

/* ---- selection over stored scores: dsa_select is the judge, on every path ------------------------------------ */
TEST device_selects(int kind)
{
    enum { ROWS = 7 };
    static const int64_t widths[] = { 1, 31, 64, 1000, 4096, 70001 };
    static const int32_t ks[] = { 1, 5, 64, 2048, 5000 };
    bag b = { 0 };
    shape s = shapes[0];
    dsa_ctx cpu = context(&s, NULL), on = context(&s, gpu);
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 5; j++)
            for (int order = 0; order < 2; order++) {
                int64_t n = widths[i], stride = n + 5, k = ks[j], *lo = longs(&b, ROWS), *hi = longs(&b, ROWS);
                float *x = random_floats(&b, ROWS * stride, (uint64_t)(i + 10 * j), 3.0f);
                int32_t lo32[ROWS], hi32[ROWS];
                uint64_t r = 9;
                for (int64_t e = 0; e < ROWS * stride; e++) {
                    if (kind == 1) x[e] = (float)(rnd(&r) % 5) - 2.0f;                            /* ties */
                    if (kind == 2) x[e] = rnd(&r) % 3 ? -INFINITY : rnd(&r) % 2 ? NAN : x[e];      /* few that may be selected */
                    if (kind == 3) { uint32_t u = rnd(&r); memcpy(&x[e], &u, 4); }                 /* any float */
                    if (kind == 4) x[e] = rnd(&r) % 2 ? 0.0f : -0.0f;
                    if (kind == 5) x[e] = (float)(e % stride) * (e / stride % 2 ? 1.0f : -1.0f);   /* sorted, both ways */
                    if (kind == 6) x[e] = rnd(&r) % 50 ? 1.0f + (float)(rnd(&r) % 3) * 1e-7f : INFINITY;
                }
                for (int64_t e = 0; e < ROWS; e++) {
                    lo[e] = lo32[e] = (int32_t)(e == 3 ? n / 2 : e == 4 ? n : e == 5 ? -5 : 0);
                    hi[e] = hi32[e] = (int32_t)(e == 5 ? n + 9 : e == 6 ? n / 3 : n);
                }
                dsa_select_args ca;
                dsa_cuda_select_args a;
                dsa_selection co, go;
                size_t bytes = 0;
                memset(&ca, 0, sizeof ca);
                memset(&a, 0, sizeof a);
                memset(&co, 0, sizeof co);
                co.top_k = (int32_t)k;
                co.order = order ? DSA_ORDER_RANK : DSA_ORDER_INDEX;
                go = co;
                co.indices = ints(&b, ROWS * k);
                co.scores = floats(&b, ROWS * k);
                co.counts = ints(&b, ROWS);
                go.indices = device((size_t)(ROWS * k) * 4);
                go.scores = device((size_t)(ROWS * k) * 4);
                go.counts = device(ROWS * 4);
                ca.n_rows = a.n_rows = ROWS;
                ca.n_cols = a.n_cols = n;
                ca.stride = a.stride = stride;
                ca.scores = x;
                ca.ks = lo;
                ca.ke = hi;
                a.scores = up(x, (size_t)(ROWS * stride) * 4);
                a.ks = up(lo32, sizeof lo32);
                a.ke = up(hi32, sizeof hi32);
                OK(dsa_select_workspace(&cpu, &ca, &co, &bytes));
                ca.workspace = work(&b, bytes);
                ca.workspace_size = bytes;
                OK(dsa_select(&cpu, &ca, &co));
                OK(dsa_cuda_select_workspace(&on, &a, &go, &bytes));
                a.workspace = device_work(bytes);
                a.workspace_size = bytes;
                OK(dsa_cuda_select(&on, &a, &go, NULL));
                ASSERT_MEM_EQ(co.counts, down(&b, go.counts, ROWS * 4), ROWS * 4);
                ASSERT_MEM_EQ(co.indices, down(&b, go.indices, (size_t)(ROWS * k) * 4), (size_t)(ROWS * k) * 4);
                ASSERT(agree(co.scores, down(&b, go.scores, (size_t)(ROWS * k) * 4), ROWS * k, exact ? 0 : 1e-30));   /* -0 may come as 0 */
                device_free();
                bag_shrink(&b, 0);
            }
    DONE(b);
}

/* NaN in index keys and queries is never selected, +inf is a score like others; a NaN row reaches only those who read it. */
TEST nan_keys(const shape *s)
{
    bag b = { 0 };
    twin t;
    CHECK_CALL(twin_make(&b, s, 17, &t));
    int32_t n = s->len[0];
    float *keys = random_floats(&b, (int64_t)n * s->D, 3, 1.0f), *rows = random_floats(&b, (int64_t)n * (s->R + s->r), 4, 1.0f);
    uint64_t r = 3;
    for (int32_t i = 0; i < n; i += 3) keys[(int64_t)i * s->D + rnd_below(&r, s->D)] = i % 2 ? NAN : INFINITY;
    for (int side = 0; side < 2; side++) {
        dsa_cache *l = side ? &t.gl[0] : &t.cl[0], *x = side ? &t.gi[0] : &t.ci[0];
        const dsa_ctx *ctx = side ? &t.gpu : &t.cpu;
        OK(dsa_cache_truncate(ctx, l, 0));
        OK(dsa_cache_truncate(ctx, x, 0));
        OK(append(ctx, l, x, n, rows, keys));
    }
    dsa_selection co, go;
    memset(&co, 0, sizeof co);
    go = co;
    co.indices = ints(&b, t.rows * s->k);
    go.indices = ints(&b, t.rows * s->k);
    OK(score_select(&b, &t.cpu, score_args(&t, 0), &co));
    OK(score_select(&b, &t.gpu, score_args(&t, 1), &go));
    if (exact) ASSERT_MEM_EQ(co.indices, go.indices, (size_t)(t.rows * s->k) * 4);
    for (int32_t i = 0; i < s->k && n - s->n_q[0] + 1 > s->k; i++) {     /* what was chosen has a score */
        int32_t p = go.indices[i];
        if (p >= 0 && p % 3 == 0 && p % 2 == 1) FAILm("a key with a NaN was selected");
    }
    DONE(b);
}

/* ---- errors ------------------------------------------------------------------------------------------------- */
TEST errors(void)
{
    bag b = { 0 };
    const shape *s = &shapes[0];
    twin t;
    CHECK_CALL(twin_make(&b, s, 18, &t));
    dsa_cache c;
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_FP8, 100, 0);
    d.device = DSA_DEVICE_CUDA;
    IS(DSA_ERR_NO_DEVICE, dsa_cache_create(&t.cpu, &d, &c));
    IS(DSA_ERR_NO_DEVICE, dsa_cache_check(&t.cpu, &t.gl[0]));
    d.device = DSA_DEVICE_AUTO;
    OK(dsa_cache_create(&t.cpu, &d, &c));
    ASSERT_EQ(DSA_DEVICE_CPU, c.device);
    dsa_cache_destroy(&c);
    OK(dsa_cache_create(&t.gpu, &d, &c));
    ASSERT_EQ(DSA_DEVICE_CUDA, c.device);
    dsa_cache_destroy(&c);
    d.capacity = (int64_t)1 << 30;                        /* 704 GB */
    IS(DSA_ERR_MEMORY, dsa_cache_create(&t.gpu, &d, &c));
    dsa_seq mixed[2] = { t.gs[0], t.cs[1] };
    dsa_score_args a = score_args(&t, 1);
    dsa_selection out;
    size_t bytes = 0;
    memset(&out, 0, sizeof out);
    out.indices = ints(&b, t.rows * s->k);
    a.n_seqs = 2;
    a.seqs = mixed;
    IS(DSA_ERR_FORMAT, dsa_score_select_workspace(&t.gpu, &a, &out, &bytes));
    dsa_cuda *small = NULL, *none = NULL;
    dsa_cuda_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.device = 1000;
    IS(DSA_ERR_NO_DEVICE, dsa_cuda_create(&desc, &none));
    desc.device = 0;
    desc.path = (dsa_cuda_path)9;
    IS(DSA_ERR_ARGUMENT, dsa_cuda_create(&desc, &none));
    ASSERT(none == NULL);
    desc.path = path;
    desc.scratch = 4096;                                  /* no query of 128 heads fits: refused before anything happens */
    OK(dsa_cuda_create(&desc, &small));
    dsa_ctx ctx = context(s, small);
    IS(DSA_ERR_WORKSPACE, dsa_score_select_workspace(&ctx, &(dsa_score_args){ .n_seqs = SEQS, .seqs = t.gs }, &out, &bytes));
    dsa_cuda_destroy(small);
    /* a scratch for few rows at a time gives the same lists */
    dsa_selection few = out;
    few.indices = ints(&b, t.rows * s->k);
    desc.scratch = 200 << 10;
    OK(dsa_cuda_create(&desc, &small));
    ctx = context(s, small);
    OK(score_select(&b, &t.gpu, score_args(&t, 1), &out));
    OK(score_select(&b, &ctx, score_args(&t, 1), &few));
    ASSERT_MEM_EQ(out.indices, few.indices, (size_t)(t.rows * s->k) * 4);
    dsa_cuda_destroy(small);
    dsa_cuda_score_args g;
    memset(&g, 0, sizeof g);
    dsa_cache index = pool_of(&t, DSA_INDEX_KEY);
    g.batch = batch_of(&b, &t, 0);
    g.index = &index;
    IS(DSA_ERR_NO_DEVICE, dsa_cuda_score_workspace(&t.cpu, &g, &bytes));
    OK(dsa_cuda_score_workspace(&t.gpu, &g, &bytes));
    IS(DSA_ERR_NULL, dsa_cuda_score(&t.gpu, &g, NULL, 1, 1, NULL));
    g.q = g.w = device(4);
    IS(DSA_ERR_NULL, dsa_cuda_score(&t.gpu, &g, NULL, 1, 1, NULL));
    g.workspace = device(bytes);
    g.workspace_size = bytes - 1;
    IS(DSA_ERR_WORKSPACE, dsa_cuda_score(&t.gpu, &g, device(4), 1, 1, NULL));
    g.q_type = DSA_INT8;
    IS(DSA_ERR_FORMAT, dsa_cuda_score_workspace(&t.gpu, &g, &bytes));
    g.index = &t.ci[0];
    IS(DSA_ERR_NO_DEVICE, dsa_cuda_score_workspace(&t.gpu, &g, &bytes));
    DONE(b);
}

#define EACH(TEST_) do { for (int i = 0; i < N_SHAPES; i++) CASE(shapes[i].name, TEST_, &shapes[i]); } while (0)

static void cuda_suite(void)
{
    EACH(appends);
    EACH(appends_any_value);
    EACH(scores);
    EACH(selects);
    EACH(attends);
    EACH(steps);
    EACH(device_scores);
    for (int i = 0; i < N_SHAPES; i++) if (shapes[i].key == DSA_FP8) CASE(shapes[i].name, device_prepared_queries, &shapes[i]);
    EACH(device_attends);
    EACH(device_merges);
    EACH(device_steps);
    EACH(device_rows_alone);
    EACH(device_rows_of_many);
    EACH(device_holes);
    CASE("fp8", device_heads, &shapes[0]);
    CASE("bf16", device_heads, &shapes[1]);
    CASE("tiny", device_heads, &shapes[3]);
    RUN_TEST(workspaces);
    EACH(nan_keys);
    static const char *const kinds[] = { "random", "ties", "few", "any", "zeros", "sorted", "close" };
    for (int i = 0; i < 7; i++) CASE(kinds[i], device_selects, i);
    RUN_TEST(errors);
}

int main(int argc, char **argv)
{
    static const char *const names[] = { "", "reference", "portable", "hopper" };
    GREATEST_MAIN_BEGIN();
    for (int p = DSA_CUDA_REFERENCE; p <= DSA_CUDA_HOPPER; p++) {
        char full[64];
        dsa_cuda_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.path = path = (dsa_cuda_path)p;
        exact = p == DSA_CUDA_REFERENCE;
        dsa_status st = dsa_cuda_create(&desc, &gpu);
        if (st != DSA_OK && p == DSA_CUDA_REFERENCE) {
            fprintf(stderr, "test_cuda: %s\n", dsa_status_text(st));
            return EXIT_FAILURE;
        }
        if (st != DSA_OK) continue;
        snprintf(full, sizeof full, "cuda_suite (%s)", names[p]);
        greatest_run_suite(cuda_suite, full);
        dsa_cuda_destroy(gpu);
    }
    GREATEST_MAIN_END();
}

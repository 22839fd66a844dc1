/* bench_cuda.h - bench --cuda: the device-level calls at DeepSeek-V3.2's shapes.

   A call is captured in a CUDA graph together with its repetitions over other buffers, more of them than the L2 holds, and the graph is
   replayed until at least 200 calls are timed; us is the median. Each case is checked on some of its rows against the reference path, which
   has the CPU's bits (tests/test_cuda.c): largest error of outputs, or the part of the lists that agrees. */
#ifndef BENCH_CUDA_H
#define BENCH_CUDA_H

#include <cuda_runtime_api.h>
#include <time.h>
#include "device.h"

#define CU(CALL) bench_cuda_ok((CALL), #CALL, __LINE__)

static void bench_cuda_ok(cudaError_t e, const char *what, int line)
{
    if (e == cudaSuccess) return;
    fprintf(stderr, "bench_cuda.h:%d: %s: %s\n", line, what, cudaGetErrorString(e));
    exit(1);
}

enum { CUDA_SETS = 16, CUDA_CALLS = 240, CUDA_PAGE = 64, CUDA_ROWS_CHECKED = 8 };

typedef struct cuda_bench {
    dsa_cuda *fast, *exact;
    dsa_ctx ctx, ref;                /* their contexts */
    const char *path, *only;
    FILE *csv;
    char device[256], date[32];
    cudaStream_t stream;
    void *work, *ref_work;
    size_t work_bytes, ref_bytes;
    void *blocks[512];
    int n_blocks, failed;
} cuda_bench;

static void *cuda_alloc(cuda_bench *b, size_t bytes)
{
    void *p = NULL;
    CU(cudaMalloc(&p, bytes));
    CU(cudaMemset(p, 0xFF, bytes));
    b->blocks[b->n_blocks++] = p;
    return p;
}
static void cuda_clear(cuda_bench *b)
{
    CU(cudaDeviceSynchronize());
    while (b->n_blocks > 0) CU(cudaFree(b->blocks[--b->n_blocks]));
}
/* Random bytes made once on the host, doubled on the device until they fill the block. */
static void *cuda_repeat(cuda_bench *b, const void *from, size_t bytes, size_t total)
{
    unsigned char *p = (unsigned char *)cuda_alloc(b, total);
    size_t have = bytes < total ? bytes : total;
    CU(cudaMemcpy(p, from, have, cudaMemcpyHostToDevice));
    for (; have < total; have *= 2) CU(cudaMemcpy(p + have, p, have < total - have ? have : total - have, cudaMemcpyDeviceToDevice));
    return p;
}
static float *cuda_normals(int64_t n, float size, uint64_t seed)
{
    float *x = (float *)malloc((size_t)n * sizeof *x);
    if (x == NULL) exit(1);
    for (int64_t i = 0; i < n; i++) {                        /* a sum of four uniform numbers is near enough */
        double s = -2.0;
        for (int j = 0; j < 4; j++) { seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
            s += (double)(seed >> 11) / 9007199254740992.0; }
        x[i] = size * (float)(s * 1.7320508);
    }
    return x;
}
static void *cuda_floats(cuda_bench *b, int64_t n, float size, uint64_t seed)
{
    int64_t m = n < 3000017 ? n : 3000017;
    float *x = cuda_normals(m, size, seed);
    void *p = cuda_repeat(b, x, (size_t)m * 4, (size_t)n * 4);
    free(x);
    return p;
}
static void *cuda_halves(cuda_bench *b, int64_t n, float size, uint64_t seed)
{
    int64_t m = n < 3000017 ? n : 3000017;
    float *x = cuda_normals(m, size, seed);
    uint16_t *y = (uint16_t *)malloc((size_t)m * 2);
    for (int64_t i = 0; i < m; i++) y[i] = dsa_f32_to_bf16(x[i]);
    void *p = cuda_repeat(b, y, (size_t)m * 2, (size_t)n * 2);
    free(x);
    free(y);
    return p;
}
static int32_t *cuda_ints(cuda_bench *b, const int32_t *x, int64_t n)
{
    int32_t *p = (int32_t *)cuda_alloc(b, (size_t)n * 4);
    CU(cudaMemcpy(p, x, (size_t)n * 4, cudaMemcpyHostToDevice));
    return p;
}
static void cuda_down(void *to, const void *from, size_t bytes) { CU(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost)); }

static void cuda_must(cuda_bench *b, dsa_status st, const char *what)
{
    if (st == DSA_OK) return;
    fprintf(stderr, "bench: %s: %s (%s)\n", what, dsa_status_text(st), b->ctx.config.detail);
    exit(1);
}

/* A pool of n_pages shuffled pages with n_seqs tables of `blocks` entries over it, filled by dsa_cuda_append of random rows, then by
   copies of those. */
static dsa_cache cuda_pool(cuda_bench *b, dsa_kind kind, dsa_type format, int32_t n_seqs, int64_t len)
{
    dsa_cache_desc d;
    dsa_cache c;
    size_t page = 0;
    int64_t blocks = (len + CUDA_PAGE - 1) / CUDA_PAGE, n_pages = blocks * n_seqs, made = n_pages < 97 ? n_pages : 97;
    int32_t *table = (int32_t *)malloc((size_t)n_pages * 4), lens[1];
    int64_t width = kind == DSA_LATENT ? 576 : 128;
    memset(&d, 0, sizeof d);
    d.kind = kind;
    d.format = format;
    d.page_size = CUDA_PAGE;
    d.device = DSA_DEVICE_CUDA;
    dsa_page_bytes(kind, format, kind == DSA_LATENT ? 512 : 128, kind == DSA_LATENT ? 64 : 0, CUDA_PAGE, &page);
    void *pool = cuda_alloc(b, page * (size_t)n_pages);
    cuda_must(b, dsa_cache_view(&b->ctx, &d, pool, n_pages, 0, NULL, n_pages, 0, &c), "dsa_cache_view");
    dsa_cuda_append_args a;
    memset(&a, 0, sizeof a);
    a.batch.n_seqs = 1;
    a.batch.n_rows = a.batch.max_len = made * CUDA_PAGE;
    lens[0] = (int32_t)a.batch.n_rows;
    a.batch.lens = cuda_ints(b, lens, 1);
    if (kind == DSA_LATENT) { a.latent = &c; a.latent_rows = cuda_floats(b, a.batch.n_rows * width, 1.0f, 5); }
    else { a.index = &c; a.index_rows = cuda_floats(b, a.batch.n_rows * width, 1.0f, 6); }
    cuda_must(b, dsa_cuda_append(&b->ctx, &a, NULL), "dsa_cuda_append");
    CU(cudaDeviceSynchronize());
    for (size_t have = (size_t)made * page, total = (size_t)n_pages * page; have < total; have *= 2)
        CU(cudaMemcpy((char *)pool + have, pool, have < total - have ? have : total - have, cudaMemcpyDeviceToDevice));
    uint64_t seed = 1;
    for (int64_t i = 0; i < n_pages; i++) table[i] = (int32_t)i;
    for (int64_t i = n_pages - 1; i > 0; i--) {
        seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
        int64_t j = (int64_t)((seed >> 33) % (uint64_t)(i + 1));
        int32_t t = table[i]; table[i] = table[j]; table[j] = t;
    }
    c.block_table = cuda_ints(b, table, n_pages);
    c.n_blocks = blocks;
    free(table);
    return c;
}

/* ---- timing --------------------------------------------------------------------------------------------- */
typedef dsa_status (*cuda_call)(const dsa_ctx *ctx, void *arg, int set, void *workspace, size_t bytes, void *stream);

static int cuda_by_size(const void *a, const void *b) { double x = *(const double *)a, y = *(const double *)b; return x < y ? -1 : x > y; }

static double cuda_time(cuda_bench *b, cuda_call call, void *arg, int sets)
{
    cudaGraph_t graph;
    cudaGraphExec_t run;
    cudaEvent_t from, to;
    float ms = 0;
    double us[CUDA_CALLS];
    CU(cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < sets; i++) cuda_must(b, call(&b->ctx, arg, i, b->work, b->work_bytes, b->stream), "call");
    CU(cudaStreamEndCapture(b->stream, &graph));
    CU(cudaGraphInstantiateWithFlags(&run, graph, 0));
    CU(cudaEventCreate(&from));
    CU(cudaEventCreate(&to));
    for (int i = 0; i < 5; i++) CU(cudaGraphLaunch(run, b->stream));
    CU(cudaStreamSynchronize(b->stream));
    int n = (CUDA_CALLS + sets - 1) / sets;
    for (int i = 0; i < n; i++) {
        CU(cudaEventRecord(from, b->stream));
        CU(cudaGraphLaunch(run, b->stream));
        CU(cudaEventRecord(to, b->stream));
        CU(cudaEventSynchronize(to));
        CU(cudaEventElapsedTime(&ms, from, to));
        us[i] = 1e3 * (double)ms / sets;
    }
    CU(cudaEventDestroy(from));
    CU(cudaEventDestroy(to));
    CU(cudaGraphExecDestroy(run));
    CU(cudaGraphDestroy(graph));
    qsort(us, (size_t)n, sizeof *us, cuda_by_size);
    return us[n / 2];
}

static void cuda_workspace(cuda_bench *b, size_t bytes, size_t ref)
{
    b->work = cuda_alloc(b, bytes ? bytes : 1);
    b->work_bytes = bytes;
    b->ref_work = cuda_alloc(b, ref ? ref : 1);
    b->ref_bytes = ref;
}

/* work: floating-point operations or bytes, whichever the unit says. must, goal in us, 0: none. */
static void cuda_line(cuda_bench *b, const char *name, double us, double must, double goal, double work, const char *unit,
    const char *check, int bad)
{
    if (strcmp(b->path, "portable") == 0) { must /= 0.35; goal = 0; }        /* 35 % of the speed that Hopper's path must have */
    const char *verdict = bad ? "WRONG" : must == 0 ? "" : us <= goal ? "goal" : us <= must ? "must" : "MISSED";
    printf("%-34s %10.1f us %9.1f %-8s %s  %s\n", name, us, work / us * 1e-6, unit, check, verdict);
    fflush(stdout);
    if (b->csv) fprintf(b->csv, "%s,%s,%s,%s,%.2f,%.0f,%.0f,%.1f,%s,%s\n", b->date, b->device, b->path, name, us, must, goal,
        work / us * 1e-6, unit, verdict);
    b->failed |= bad;
}

static int cuda_wanted(const cuda_bench *b, const char *name) { return b->only == NULL || strstr(name, b->only) != NULL; }

/* Largest difference of two outputs relative to the larger's largest, bf16 or f32. */
static double cuda_difference(const void *x, const void *y, int64_t n, dsa_type type)
{
    size_t size = type == DSA_BF16 ? 2 : 4;
    unsigned char *a = (unsigned char *)malloc((size_t)n * size), *c = (unsigned char *)malloc((size_t)n * size);
    double most = 0, worst = 0;
    cuda_down(a, x, (size_t)n * size);
    cuda_down(c, y, (size_t)n * size);
    for (int64_t i = 0; i < n; i++) {
        double u = type == DSA_BF16 ? (double)dsa_bf16_to_f32(((uint16_t *)a)[i]) : (double)((float *)a)[i];
        double v = type == DSA_BF16 ? (double)dsa_bf16_to_f32(((uint16_t *)c)[i]) : (double)((float *)c)[i];
        if (!(fabs(u - v) <= worst)) worst = u == u && v == v ? fabs(u - v) : HUGE_VAL;
        if (fabs(v) > most) most = fabs(v);
    }
    free(a);
    free(c);
    return most > 0 ? worst / most : worst;
}

/* The part of the entries of two lists [n, k] that agree as sets (ascending, -1 behind). */
static double cuda_recall(const int32_t *x, const int32_t *y, int64_t n, int64_t k)
{
    int32_t *a = (int32_t *)malloc((size_t)(n * k) * 4), *c = (int32_t *)malloc((size_t)(n * k) * 4);
    int64_t hits = 0, all = 0;
    cuda_down(a, x, (size_t)(n * k) * 4);
    cuda_down(c, y, (size_t)(n * k) * 4);
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0, j = 0; j < k && c[r * k + j] >= 0; j++) {
            while (i < k && a[r * k + i] >= 0 && a[r * k + i] < c[r * k + j]) i++;
            hits += i < k && a[r * k + i] == c[r * k + j];
            all++;
        }
    free(a);
    free(c);
    return all > 0 ? (double)hits / (double)all : 1;
}

/* The part of the k best positions by scores in double that row `row`'s list has: q in e4m3, one sequence. */
typedef struct cuda_scored { double score; int32_t at; } cuda_scored;

static int cuda_by_rank(const void *x, const void *y)
{
    const cuda_scored *a = (const cuda_scored *)x, *b = (const cuda_scored *)y;
    return a->score != b->score ? (a->score > b->score ? -1 : 1) : a->at < b->at ? -1 : a->at > b->at;
}

static double cuda_recall_double(const dsa_cuda_score_args *a, int64_t row, const int32_t *list, int64_t k, int64_t len)
{
    enum { HI = 64, D = 128, PAGE_BYTES = CUDA_PAGE * (D + 4) };
    const int64_t n_pages = a->index->n_pages, blocks = a->index->n_blocks;
    unsigned char *pool = (unsigned char *)malloc((size_t)n_pages * PAGE_BYTES), q8[HI * D], *best = (unsigned char *)calloc((size_t)len, 1);
    int32_t *table = (int32_t *)malloc((size_t)blocks * 4), *got = (int32_t *)malloc((size_t)k * 4);
    cuda_scored *s = (cuda_scored *)malloc((size_t)len * sizeof *s);
    double value[256], q[D][HI];
    float w[HI], scale;
    int64_t hits = 0;
    cuda_down(pool, a->index->data, (size_t)n_pages * PAGE_BYTES);
    cuda_down(table, a->index->block_table, (size_t)blocks * 4);
    cuda_down(got, list, (size_t)k * 4);
    cuda_down(q8, (const uint8_t *)a->q + row * HI * D, sizeof q8);
    cuda_down(w, a->w + row * HI, sizeof w);
    for (int i = 0; i < 256; i++) value[i] = (double)dsa_e4m3_to_f32((uint8_t)i);
    for (int h = 0; h < HI; h++) for (int d = 0; d < D; d++) q[d][h] = value[q8[h * D + d]];
    for (int64_t i = 0; i < len; i++) {
        const unsigned char *page = pool + (size_t)table[i / CUDA_PAGE] * PAGE_BYTES, *key = page + i % CUDA_PAGE * D;
        double dot[HI] = { 0 }, sum = 0;
        for (int d = 0; d < D; d++) for (int h = 0; h < HI; h++) dot[h] += value[key[d]] * q[d][h];
        for (int h = 0; h < HI; h++) sum += (double)w[h] * (dot[h] > 0 ? dot[h] : 0);
        memcpy(&scale, page + CUDA_PAGE * D + 4 * (i % CUDA_PAGE), 4);
        s[i].score = sum * (double)scale;
        s[i].at = (int32_t)i;
    }
    qsort(s, (size_t)len, sizeof *s, cuda_by_rank);
    for (int64_t i = 0; i < k; i++) best[s[i].at] = 1;
    for (int64_t i = 0; i < k; i++) hits += got[i] >= 0 && got[i] < len && best[got[i]];
    free(pool); free(table); free(got); free(best); free(s);
    return (double)hits / (double)k;
}

/* ---- sparse attention ------------------------------------------------------------------------------------ */
typedef struct cuda_attend_case { dsa_cuda_attend_args a[CUDA_SETS]; } cuda_attend_case;

static dsa_status cuda_attend_call(const dsa_ctx *ctx, void *arg, int set, void *workspace, size_t bytes, void *stream)
{
    dsa_cuda_attend_args a = ((cuda_attend_case *)arg)->a[set];
    a.workspace = workspace;
    a.workspace_size = bytes;
    return dsa_cuda_attend(ctx, &a, stream);
}

static int32_t *cuda_lists(cuda_bench *b, int64_t rows, int64_t k, int64_t len, uint64_t seed)
{
    int32_t *x = (int32_t *)malloc((size_t)(rows * k) * 4);
    for (int64_t i = 0; i < rows * k; i++) {                 /* ascending, as selection leaves them */
        seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
        x[i] = (int32_t)((i % k * len + (int64_t)((seed >> 33) % (uint64_t)len)) / k);
    }
    int32_t *p = cuda_ints(b, x, rows * k);
    free(x);
    return p;
}

static void cuda_attention(cuda_bench *b, const char *name, dsa_type format, int32_t n_seqs, int64_t n_rows, int64_t len, double must,
    double goal)
{
    static cuda_attend_case c;
    const int64_t k = 2048, W = 576, H = 128;
    int sets = n_rows > 256 ? 1 : n_rows > 16 ? 4 : CUDA_SETS;
    size_t bytes = 0, ref = 0;
    if (!cuda_wanted(b, name)) return;
    dsa_cache pool = cuda_pool(b, DSA_LATENT, format, n_seqs, len);
    int32_t *lens = (int32_t *)malloc((size_t)n_seqs * 4);
    for (int32_t i = 0; i < n_seqs; i++) lens[i] = (int32_t)len;
    int32_t *device_lens = cuda_ints(b, lens, n_seqs);
    free(lens);
    for (int i = 0; i < sets; i++) {
        dsa_cuda_attend_args *a = &c.a[i];
        memset(a, 0, sizeof *a);
        a->batch.n_seqs = n_seqs;
        a->batch.n_rows = n_rows;
        a->batch.max_len = len;
        a->batch.lens = device_lens;
        a->latent = &pool;
        a->q = cuda_halves(b, n_rows * H * W, 1.0f, 100 + (uint64_t)i);
        a->q_type = a->out_type = DSA_BF16;
        a->indices = cuda_lists(b, n_rows, k, len, 7 + (uint64_t)i);
        a->out = cuda_alloc(b, (size_t)(n_rows * H * 512) * 2);
        a->lse = (float *)cuda_alloc(b, (size_t)(n_rows * H) * 4);
    }
    dsa_cuda_attend_args few = c.a[0];
    few.batch.n_rows = n_seqs == 1 ? (n_rows < CUDA_ROWS_CHECKED ? n_rows : CUDA_ROWS_CHECKED) : (n_seqs < CUDA_ROWS_CHECKED ? n_seqs
        : CUDA_ROWS_CHECKED);
    few.batch.n_seqs = n_seqs == 1 ? 1 : (int32_t)few.batch.n_rows;
    few.out = cuda_alloc(b, (size_t)(few.batch.n_rows * H * 512) * 2);
    few.lse = NULL;
    cuda_must(b, dsa_cuda_attend_workspace(&b->ctx, &c.a[0], &bytes), name);
    cuda_must(b, dsa_cuda_attend_workspace(&b->ref, &few, &ref), name);
    cuda_workspace(b, bytes, ref);
    double us = cuda_time(b, cuda_attend_call, &c, sets);
    few.workspace = b->ref_work;
    few.workspace_size = ref;
    cuda_must(b, dsa_cuda_attend(&b->ref, &few, NULL), name);
    CU(cudaDeviceSynchronize());
    double error = cuda_difference(c.a[0].out, few.out, few.batch.n_rows * H * 512, DSA_BF16);
    char check[64];
    snprintf(check, sizeof check, "error %.1e", error);
    cuda_line(b, name, us, must, goal, 2.0 * (double)(n_rows * H * k) * (576 + 512), "TFLOP/s", check, !(error < 3e-2));
    cuda_clear(b);
}

/* ---- index logits, with and without selection ---------------------------------------------------------------- */
typedef struct cuda_score_case {
    dsa_cuda_score_args a[CUDA_SETS];
    dsa_selection out[CUDA_SETS];
    float *scores;
    int64_t n_cols;
} cuda_score_case;

static dsa_status cuda_score_call_(const dsa_ctx *ctx, void *arg, int set, void *workspace, size_t bytes, void *stream)
{
    cuda_score_case *c = (cuda_score_case *)arg;
    dsa_cuda_score_args a = c->a[set];
    a.workspace = workspace;
    a.workspace_size = bytes;
    if (c->scores) return dsa_cuda_score(ctx, &a, c->scores, c->n_cols, c->n_cols, stream);
    return dsa_cuda_score_select(ctx, &a, &c->out[set], stream);
}

/* n_seqs > 1: one query each at the end; else n_rows queries, causal: the last one sees all. q in e4m3. */
static void cuda_scoring(cuda_bench *b, const char *name, int select, int32_t n_seqs, int64_t n_rows, int64_t len, double must, double goal)
{
    static cuda_score_case c;
    const int64_t HI = 64, D = 128, k = 2048;
    int sets = n_seqs * len > 2000000 || n_rows > 256 ? 1 : CUDA_SETS / (int)n_seqs > 0 ? CUDA_SETS / (int)n_seqs : 1;
    size_t bytes = 0, ref = 0;
    if (!cuda_wanted(b, name)) return;
    memset(&c, 0, sizeof c);
    dsa_cache pool[CUDA_SETS];
    int32_t *lens = (int32_t *)malloc((size_t)n_seqs * 4);
    uint8_t *q8 = (uint8_t *)malloc(1000003);
    uint64_t seed = 3;
    for (int i = 0; i < 1000003; i++) {
        seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
        q8[i] = (uint8_t)((seed >> 60 & 8) << 4 | (0x28 + (seed >> 40) % 0x28));
    }
    for (int32_t i = 0; i < n_seqs; i++) lens[i] = (int32_t)len;
    int32_t *device_lens = cuda_ints(b, lens, n_seqs);
    for (int i = 0; i < sets; i++) {
        dsa_cuda_score_args *a = &c.a[i];
        pool[i] = cuda_pool(b, DSA_INDEX_KEY, DSA_FP8, n_seqs, len);
        a->batch.n_seqs = n_seqs;
        a->batch.n_rows = n_rows;
        a->batch.max_len = len;
        a->batch.lens = device_lens;
        a->index = &pool[i];
        a->q = cuda_repeat(b, q8, 1000003, (size_t)(n_rows * HI * D));
        a->q_type = DSA_FP8;
        a->w = (float *)cuda_floats(b, n_rows * HI, 0.01f, 9 + (uint64_t)i);
        c.out[i].top_k = (int32_t)k;
        if (select) c.out[i].indices = (int32_t *)cuda_alloc(b, (size_t)(n_rows * k) * 4);
    }
    c.n_cols = len;
    if (!select) c.scores = (float *)cuda_alloc(b, (size_t)(n_rows * len) * 4);
    /* the last rows again, by ranges of their own */
    dsa_cuda_score_args few = c.a[select ? 0 : sets - 1];    /* plain scores are the last set's */
    int64_t m = n_rows < CUDA_ROWS_CHECKED ? n_rows : CUDA_ROWS_CHECKED, from = n_seqs > 1 ? 0 : n_rows - m;
    few.batch.n_rows = m;
    few.batch.n_seqs = n_seqs > 1 ? (int32_t)m : 1;
    few.q = (const uint8_t *)few.q + from * HI * D;
    few.w += from * HI;
    dsa_selection list = c.out[0];
    if (select) {
        list.indices = (int32_t *)cuda_alloc(b, (size_t)(m * k) * 4);
        cuda_must(b, dsa_cuda_score_select_workspace(&b->ctx, &c.a[0], &c.out[0], &bytes), name);
        cuda_must(b, dsa_cuda_score_select_workspace(&b->ref, &few, &list, &ref), name);
    } else {
        cuda_must(b, dsa_cuda_score_workspace(&b->ctx, &c.a[0], &bytes), name);
        cuda_must(b, dsa_cuda_score_workspace(&b->ref, &few, &ref), name);
    }
    cuda_workspace(b, bytes, ref);
    double us = cuda_time(b, cuda_score_call_, &c, sets), error;
    char check[64];
    few.workspace = b->ref_work;
    few.workspace_size = ref;
    if (select) {
        cuda_must(b, dsa_cuda_score_select(&b->ref, &few, &list, NULL), name);
        CU(cudaDeviceSynchronize());
        error = 1 - cuda_recall(c.out[0].indices + from * k, list.indices, m, k);
        snprintf(check, sizeof check, "recall %.5f, against double %.5f, %zu MiB", 1 - error,
                 cuda_recall_double(&c.a[0], n_rows - 1, c.out[0].indices + (n_rows - 1) * k, k, len), bytes >> 20);
    } else {
        float *scores = (float *)cuda_alloc(b, (size_t)(m * len) * 4);
        cuda_must(b, dsa_cuda_score(&b->ref, &few, scores, len, len, NULL), name);
        CU(cudaDeviceSynchronize());
        error = cuda_difference(c.scores + from * len, scores, m * len, DSA_F32);
        snprintf(check, sizeof check, "error %.1e", error);
    }
    double pairs = n_seqs > 1 ? (double)(n_rows * len) : (double)n_rows * ((double)len - (double)(n_rows - 1) / 2);
    if (n_rows > 256) cuda_line(b, name, us, must, goal, 2.0 * pairs * (double)(HI * D), "TFLOP/s", check, !(error < 1e-2));
    else cuda_line(b, name, us, must, goal, (double)(n_seqs * len) * 132 * 1e0, "TB/s", check, !(error < 1e-2));
    free(lens);
    free(q8);
    cuda_clear(b);
}

/* ---- selection alone ---------------------------------------------------------------------------------------- */
typedef struct cuda_select_case { dsa_cuda_select_args a[CUDA_SETS]; dsa_selection out; } cuda_select_case;

static dsa_status cuda_select_call(const dsa_ctx *ctx, void *arg, int set, void *workspace, size_t bytes, void *stream)
{
    cuda_select_case *c = (cuda_select_case *)arg;
    dsa_cuda_select_args a = c->a[set];
    a.workspace = workspace;
    a.workspace_size = bytes;
    return dsa_cuda_select(ctx, &a, &c->out, stream);
}

static void cuda_selecting(cuda_bench *b, const char *name, int64_t n_rows, int64_t n, double must, double goal)
{
    static cuda_select_case c;
    const int64_t k = 2048;
    int sets = n_rows * n > 20000000 ? 1 : n_rows * n > 4000000 ? 4 : CUDA_SETS;
    size_t bytes = 0, ref = 0;
    if (!cuda_wanted(b, name)) return;
    memset(&c, 0, sizeof c);
    for (int i = 0; i < sets; i++) {
        c.a[i].n_rows = n_rows;
        c.a[i].n_cols = c.a[i].stride = n;
        c.a[i].scores = (float *)cuda_floats(b, n_rows * n, 1.0f, 11 + (uint64_t)i);
    }
    c.out.top_k = (int32_t)k;
    c.out.indices = (int32_t *)cuda_alloc(b, (size_t)(n_rows * k) * 4);
    cuda_must(b, dsa_cuda_select_workspace(&b->ctx, &c.a[0], &c.out, &bytes), name);
    dsa_cuda_select_args few = c.a[sets - 1];
    dsa_selection list = c.out;
    few.n_rows = n_rows < CUDA_ROWS_CHECKED ? n_rows : CUDA_ROWS_CHECKED;
    list.indices = (int32_t *)cuda_alloc(b, (size_t)(few.n_rows * k) * 4);
    cuda_must(b, dsa_cuda_select_workspace(&b->ref, &few, &list, &ref), name);
    cuda_workspace(b, bytes, ref);
    double us = cuda_time(b, cuda_select_call, &c, sets);
    few.workspace = b->ref_work;
    few.workspace_size = ref;
    cuda_must(b, dsa_cuda_select(&b->ref, &few, &list, NULL), name);
    CU(cudaDeviceSynchronize());
    double recall = cuda_recall(c.out.indices, list.indices, few.n_rows, k);
    cuda_line(b, name, us, must, goal, (double)(n_rows * n) * 4, "TB/s", recall == 1 ? "exact" : "not exact", recall != 1);
    cuda_clear(b);
}

/* ---- a stream's whole step ------------------------------------------------------------------------------------ */
typedef struct cuda_step_case { dsa_cuda_step_args a[CUDA_SETS]; } cuda_step_case;

static dsa_status cuda_step_call(const dsa_ctx *ctx, void *arg, int set, void *workspace, size_t bytes, void *stream)
{
    dsa_cuda_step_args a = ((cuda_step_case *)arg)->a[set];
    a.workspace = workspace;
    a.workspace_size = bytes;
    return dsa_cuda_step(ctx, &a, stream);
}

static void cuda_stepping(cuda_bench *b, const char *name, int32_t n_seqs, int64_t len, double must, double goal)
{
    static cuda_step_case c;
    static dsa_cache latent[CUDA_SETS], index[CUDA_SETS];
    const int64_t H = 128, HI = 64, k = 2048, n = n_seqs;
    int sets = n_seqs > 1 ? 1 : CUDA_SETS;
    size_t bytes = 0, ref = 0;
    if (!cuda_wanted(b, name)) return;
    int32_t *lens = (int32_t *)malloc((size_t)n_seqs * 4);
    for (int32_t i = 0; i < n_seqs; i++) lens[i] = (int32_t)len;
    int32_t *device_lens = cuda_ints(b, lens, n_seqs);
    free(lens);
    for (int i = 0; i < sets; i++) {
        dsa_cuda_step_args *a = &c.a[i];
        latent[i] = cuda_pool(b, DSA_LATENT, DSA_FP8, n_seqs, len);
        index[i] = cuda_pool(b, DSA_INDEX_KEY, DSA_FP8, n_seqs, len);
        memset(a, 0, sizeof *a);
        a->batch.n_seqs = n_seqs;
        a->batch.n_rows = n;
        a->batch.max_len = len;
        a->batch.lens = device_lens;
        a->latent = &latent[i];
        a->index = &index[i];
        a->type = a->index_q_type = a->out_type = DSA_BF16;
        a->latent_rows = cuda_halves(b, n * 576, 1.0f, 21);
        a->index_rows = cuda_halves(b, n * 128, 1.0f, 22);
        a->q = cuda_halves(b, n * H * 576, 1.0f, 23 + (uint64_t)i);
        a->index_q = cuda_halves(b, n * HI * 128, 1.0f, 24 + (uint64_t)i);
        a->index_w = (float *)cuda_floats(b, n * HI, 0.01f, 25 + (uint64_t)i);
        a->out = cuda_alloc(b, (size_t)(n * H * 512) * 2);
        a->indices = (int32_t *)cuda_alloc(b, (size_t)(n * k) * 4);
    }
    dsa_cuda_step_args one = c.a[0];
    one.batch.n_seqs = 1;
    one.batch.n_rows = 1;
    one.out = cuda_alloc(b, (size_t)(H * 512) * 2);
    one.indices = (int32_t *)cuda_alloc(b, (size_t)k * 4);
    cuda_must(b, dsa_cuda_step_workspace(&b->ctx, &c.a[0], &bytes), name);
    cuda_must(b, dsa_cuda_step_workspace(&b->ref, &one, &ref), name);
    cuda_workspace(b, bytes, ref);
    double us = cuda_time(b, cuda_step_call, &c, sets);
    one.workspace = b->ref_work;
    one.workspace_size = ref;
    cuda_must(b, dsa_cuda_step(&b->ref, &one, NULL), name);
    CU(cudaDeviceSynchronize());
    double recall = cuda_recall(c.a[0].indices, one.indices, 1, k), error = cuda_difference(c.a[0].out, one.out, H * 512, DSA_BF16);
    char check[64];
    snprintf(check, sizeof check, "recall %.4f, error %.1e", recall, error);
    cuda_line(b, name, us, must, goal, (double)(n * len) * 132 + (double)(n * k) * 656, "TB/s", check, !(recall > 0.99 && error < 3e-2));
    cuda_clear(b);
}

static int bench_cuda(int argc, char **argv)
{
    static const char usage[] =
        "usage: bench --cuda PATH [--only TEXT] [--csv FILE]\n"
        "\n"
        "Times the device-level calls on the GPU. PATH: auto, portable, hopper, reference. --only: cases whose name holds TEXT. --csv: appends lines\n"
        "date, device, path, case, us, must, goal, rate, its unit, verdict (issue 4's table).\n";
    static const char *const paths[] = { "auto", "reference", "portable", "hopper" };
    static char detail[256];
    cuda_bench b;
    dsa_config config;
    dsa_cuda_desc exact;
    struct cudaDeviceProp properties;
    time_t now_ = time(NULL);
    memset(&b, 0, sizeof b);
    if (argc < 1 || strcmp(argv[0], "--help") == 0) return fputs(usage, stdout) == EOF ? 2 : argc < 1 ? 2 : 0;
    b.path = argv[0];
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 < argc && strcmp(argv[i], "--only") == 0) b.only = argv[i + 1];
        else if (i + 1 < argc && strcmp(argv[i], "--csv") == 0) {
            b.csv = fopen(argv[i + 1], "a");
            if (b.csv == NULL) { fprintf(stderr, "bench: cannot write %s\n", argv[i + 1]); return 2; }
        } else {
            fprintf(stderr, "bench: unknown option %s\n%s", argv[i], usage);
            return 2;
        }
    }
    if (device_open("bench", b.path, &b.fast) != 0) return 2;
    b.path = paths[dsa_cuda_query_path(b.fast)];
    memset(&exact, 0, sizeof exact);
    exact.path = DSA_CUDA_REFERENCE;
    if (dsa_cuda_create(&exact, &b.exact) != DSA_OK) return 2;
    dsa_config_preset(DSA_DEEPSEEK_V32, &config);
    config.detail = detail;
    config.detail_size = sizeof detail;
    config.cuda = b.fast;
    if (dsa_init(&b.ctx, &config) != DSA_OK) return 2;
    config.cuda = b.exact;
    if (dsa_init(&b.ref, &config) != DSA_OK) return 2;
    CU(cudaGetDeviceProperties(&properties, 0));
    snprintf(b.device, sizeof b.device, "%s", properties.name);
    strftime(b.date, sizeof b.date, "%Y-%m-%d", gmtime(&now_));
    CU(cudaStreamCreate(&b.stream));
    printf("%s, path %s, %s\n", b.device, b.path, b.date);
    cuda_stepping(&b, "step 1 x 128K", 1, 131072, 45, 25);
    cuda_stepping(&b, "step 64 x 32K", 64, 32768, 0, 0);
    cuda_attention(&b, "sparse decode 1", DSA_FP8, 1, 1, 32768, 14, 8);
    cuda_attention(&b, "sparse decode 8", DSA_FP8, 8, 8, 32768, 0, 0);
    cuda_attention(&b, "sparse decode 64", DSA_FP8, 64, 64, 32768, 130, 100);
    cuda_attention(&b, "sparse decode 128", DSA_FP8, 128, 128, 32768, 240, 185);
    cuda_attention(&b, "sparse prefill 4096 over 32K bf16", DSA_BF16, 1, 4096, 32768, 7100, 4200);
    cuda_scoring(&b, "logits + top-k 4096 over 32K", 1, 1, 4096, 32768, 4500, 2600);
    cuda_scoring(&b, "logits + top-k 1 x 128K", 1, 1, 1, 131072, 0, 0);
    cuda_scoring(&b, "paged logits 1 x 128K", 0, 1, 1, 131072, 0, 0);
    cuda_scoring(&b, "paged logits 64 x 128K", 0, 64, 64, 131072, 480, 400);
    cuda_selecting(&b, "top-k 1 x 128K", 1, 131072, 16, 8);
    cuda_selecting(&b, "top-k 1 x 1M", 1, 1048576, 40, 20);
    cuda_selecting(&b, "top-k 64 x 128K", 64, 131072, 60, 35);
    cuda_selecting(&b, "top-k 1024 x 128K", 1024, 131072, 600, 400);
    CU(cudaStreamDestroy(b.stream));
    dsa_cuda_destroy(b.fast);
    dsa_cuda_destroy(b.exact);
    if (b.csv && fclose(b.csv) != 0) return 2;
    return b.failed;
}

#endif

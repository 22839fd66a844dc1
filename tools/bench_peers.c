/* bench_peers - the same work by dsa.h and by the GEMMs of oneDNN, OpenBLAS and BLIS, side by side in one run - public domain or MIT

   Build and run: make bench-peers   (tools/bench_peers.sh finds which of the libraries are here)

   A GEMM library has no indexer and no sparse attention, so each is given the best frame that GEMMs allow, written by hand below:
     score      chunks of keys that stay in L2: S = K Q^T, then I = sum_h w_h ReLU(S_h) vectorised. No top-k: the peers have a head start
     attention  rows gathered into a block, S = Q K^T, a vectorised online softmax, O += P V
     project    y = x W^T for the eight weight matrices of a layer; dsa.h's time is that of a whole layer at a context of 64 rows
     layer      dsa_layer with the library's sgemm in the config's GEMM hook
   The threads are the pool's, one single-threaded GEMM each, as that scales best for all three; in `layer` they are the library's own.
   What a peer computes is compared with dsa.h's result before it is timed. */
#define BENCH_MAIN bench_main
#include "bench.c"
#if defined(HAVE_ONEDNN)
#  include <dnnl.h>
void omp_set_num_threads(int n);    /* oneDNN's threads; of the library it was built with */
#endif
#if defined(HAVE_OPENBLAS)
#  include <cblas-openblas.h>
#  undef I                          /* complex.h comes with it */
#endif
#if defined(HAVE_BLIS)
#  include <blis.h>
#endif

static const char peers_help[] =
    "usage: bench_peers [--threads LIST] [--isa NAME] [--huge]\n"
    "\n"
    "Prints milliseconds of dsa.h and of the GEMM libraries this program was built with, DeepSeek-V3.2's shapes, cold rows, medians.\n"
    "A line with BUSY was measured while other processes took processors from this one. Options as in bench. Exit status: 0 success, 1 a check failed, 2 bad usage.\n";

typedef enum peer { ONEDNN_BF16 = 0, ONEDNN_S8, ONEDNN_F32, OPENBLAS_F32, BLIS_F32, N_PEERS } peer;
static const char *const peer_names[N_PEERS] = { "oneDNN bf16", "oneDNN s8", "oneDNN f32", "OpenBLAS f32", "BLIS f32" };
static const dsa_type peer_formats[N_PEERS] = { DSA_BF16, DSA_INT8, DSA_F32, DSA_F32, DSA_F32 };

static int have(peer p)
{
#if defined(HAVE_ONEDNN)
    if (p <= ONEDNN_F32) return 1;
#endif
#if defined(HAVE_OPENBLAS)
    if (p == OPENBLAS_F32) return 1;
#endif
#if defined(HAVE_BLIS)
    if (p == BLIS_F32) return 1;
#endif
    (void)p;
    return 0;
}

static int onednn_threads = 1;
static void library_threads(int n)
{
    onednn_threads = n;                                      /* OpenMP counts per calling thread: gemm() sets it */
#if defined(HAVE_OPENBLAS)
    openblas_set_num_threads(n);
#endif
#if defined(HAVE_BLIS)
    bli_thread_set_num_threads(n);
#endif
    (void)n;
}

/* ---- one GEMM: C[m, n] = A[m, k] B, B being [n, k] transposed or [k, n]; row-major, C in f32 (s8: int32) ---------------------------- */
#if defined(HAVE_ONEDNN)
typedef struct matmul { int64_t m, n, k, lda, ldb, ldc; int transposed; dnnl_primitive_t primitive; dnnl_memory_desc_t a, b, c, scratch; } matmul;
static matmul matmuls[64];
static int n_matmuls;
static dnnl_engine_t engine;
static pthread_mutex_t matmul_lock = PTHREAD_MUTEX_INITIALIZER;

static void dnnl_must(dnnl_status_t status, const char *call)
{
    if (status != dnnl_success) wrong("oneDNN: ", call, 0, 0, 0);
}

static const matmul *find_matmul(int transposed, int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc)
{
    matmul *g;
    pthread_mutex_lock(&matmul_lock);
    for (g = matmuls; g < matmuls + n_matmuls; g++)
        if (g->m == m && g->n == n && g->k == k && g->lda == lda && g->ldb == ldb && g->ldc == ldc && g->transposed == transposed) break;
    if (g == matmuls + n_matmuls) {
        dnnl_dims_t da = { m, k }, db = { k, n }, dc = { m, n }, sa = { lda, 1 }, sb = { ldb, 1 }, sc = { ldc, 1 };
        dnnl_matmul_desc_t desc;
        dnnl_primitive_desc_t pd;
        dnnl_primitive_attr_t attr;
        if (n_matmuls == 64) die(1, "oneDNN: too many shapes", "");
        if (transposed) { sb[0] = 1; sb[1] = ldb; }
        if (!engine) dnnl_must(dnnl_engine_create(&engine, dnnl_cpu, 0), "dnnl_engine_create");
        dnnl_must(dnnl_memory_desc_init_by_strides(&g->a, 2, da, dnnl_bf16, sa), "memory_desc a");
        dnnl_must(dnnl_memory_desc_init_by_strides(&g->b, 2, db, dnnl_bf16, sb), "memory_desc b");
        dnnl_must(dnnl_memory_desc_init_by_strides(&g->c, 2, dc, dnnl_f32, sc), "memory_desc c");
        dnnl_must(dnnl_matmul_desc_init(&desc, &g->a, &g->b, NULL, &g->c), "dnnl_matmul_desc_init");
        dnnl_must(dnnl_primitive_attr_create(&attr), "dnnl_primitive_attr_create");   /* its own scratch memory is not for several threads */
        dnnl_must(dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user), "scratchpad_mode");
        dnnl_must(dnnl_primitive_desc_create(&pd, &desc, attr, engine, NULL), "dnnl_primitive_desc_create");
        g->scratch = *dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
        dnnl_must(dnnl_primitive_create(&g->primitive, pd), "dnnl_primitive_create");
        dnnl_primitive_desc_destroy(pd);
        dnnl_primitive_attr_destroy(attr);
        g->m = m; g->n = n; g->k = k; g->lda = lda; g->ldb = ldb; g->ldc = ldc; g->transposed = transposed;
        n_matmuls++;
    }
    pthread_mutex_unlock(&matmul_lock);
    return g;
}

static void matmul_bf16(int transposed, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb, void *c, int64_t ldc)
{
    const matmul *g = find_matmul(transposed, m, n, k, lda, ldb, ldc);
    dnnl_exec_arg_t args[4] = { { DNNL_ARG_SRC, NULL }, { DNNL_ARG_WEIGHTS, NULL }, { DNNL_ARG_DST, NULL }, { DNNL_ARG_SCRATCHPAD, NULL } };
    static __thread void *scratch;                           /* kept until the thread ends, and then lost: a few per run */
    static __thread size_t scratch_bytes;
    dnnl_stream_t stream;
    if (dnnl_memory_desc_get_size(&g->scratch) > scratch_bytes) {
        free(scratch);
        scratch_bytes = dnnl_memory_desc_get_size(&g->scratch);
        scratch = take(scratch_bytes, 1);
    }
    dnnl_must(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags), "dnnl_stream_create");
    dnnl_must(dnnl_memory_create(&args[0].memory, &g->a, engine, (void *)(uintptr_t)a), "memory a");
    dnnl_must(dnnl_memory_create(&args[1].memory, &g->b, engine, (void *)(uintptr_t)b), "memory b");
    dnnl_must(dnnl_memory_create(&args[2].memory, &g->c, engine, c), "memory c");
    dnnl_must(dnnl_memory_create(&args[3].memory, &g->scratch, engine, scratch), "memory of the scratchpad");
    dnnl_must(dnnl_primitive_execute(g->primitive, stream, 4, args), "dnnl_primitive_execute");
    dnnl_must(dnnl_stream_wait(stream), "dnnl_stream_wait");
    for (int i = 0; i < 4; i++) dnnl_memory_destroy(args[i].memory);
    dnnl_stream_destroy(stream);
}
#endif

static void gemm(peer p, int transposed, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb, void *c, int64_t ldc)
{
#if defined(HAVE_ONEDNN)
    if (p <= ONEDNN_F32) omp_set_num_threads(onednn_threads);
    if (p == ONEDNN_BF16) matmul_bf16(transposed, m, n, k, a, lda, b, ldb, c, ldc);
    if (p == ONEDNN_S8) {
        int32_t zero = 0;
        dnnl_must(dnnl_gemm_s8s8s32('N', transposed ? 'T' : 'N', 'F', m, n, k, 1, (const int8_t *)a, lda, 0, (const int8_t *)b, ldb, 0, 0,
                                    (int32_t *)c, ldc, &zero), "dnnl_gemm_s8s8s32");
    }
    if (p == ONEDNN_F32)
        dnnl_must(dnnl_sgemm('N', transposed ? 'T' : 'N', m, n, k, 1, (const float *)a, lda, (const float *)b, ldb, 0, (float *)c, ldc), "dnnl_sgemm");
#endif
#if defined(HAVE_OPENBLAS)
    if (p == OPENBLAS_F32 && m == 1 && transposed)           /* its own advice for a vector */
        cblas_sgemv(CblasRowMajor, CblasNoTrans, (blasint)n, (blasint)k, 1, (const float *)b, (blasint)ldb, (const float *)a, 1, 0, (float *)c, 1);
    else if (p == OPENBLAS_F32)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, transposed ? CblasTrans : CblasNoTrans, (blasint)m, (blasint)n, (blasint)k, 1, (const float *)a,
                    (blasint)lda, (const float *)b, (blasint)ldb, 0, (float *)c, (blasint)ldc);
#endif
#if defined(HAVE_BLIS)
    if (p == BLIS_F32) {                                     /* 0.9 lacks const */
        float one = 1, zero = 0, *x = (float *)(uintptr_t)a, *y = (float *)(uintptr_t)b;
        if (m == 1 && transposed) bli_sgemv(BLIS_NO_TRANSPOSE, BLIS_NO_CONJUGATE, n, k, &one, y, ldb, 1, x, 1, &zero, (float *)c, 1);
        else bli_sgemm(BLIS_NO_TRANSPOSE, BLIS_NO_TRANSPOSE, m, n, k, &one, x, lda, 1, y, transposed ? 1 : ldb, transposed ? ldb : 1, &zero, (float *)c, ldc, 1);
    }
#endif
    (void)p; (void)transposed; (void)m; (void)n; (void)k; (void)a; (void)lda; (void)b; (void)ldb; (void)c; (void)ldc;
}

/* ---- the hand-written parts: 16 lanes, compiled once more for the widest ISA -------------------------------------------------------- */
typedef float lanes __attribute__((vector_size(64)));
typedef int32_t int_lanes __attribute__((vector_size(64)));
#define INLINE static inline __attribute__((always_inline))

INLINE void load(lanes *v, const float *p) { memcpy(v, p, sizeof *v); }
INLINE void store(float *p, const lanes *v) { memcpy(p, v, sizeof *v); }
INLINE void spread(lanes *v, float x) { *v = (lanes){ 0 } + x; }
INLINE void larger(lanes *a, const lanes *b)
{
    int_lanes less = *a < *b;
    *a = (lanes)(((int_lanes)*a & ~less) | ((int_lanes)*b & less));
}
INLINE float add_up(const lanes *v)
{
    float s = 0;
    for (int i = 0; i < 16; i++) s += (*v)[i];
    return s;
}

/* I[j] = scale[j] sum_h w[h] ReLU(S[j][h]) */
INLINE void epilogue_body(const void *S, int is_int, int64_t ld, int64_t n, const float *w, const float *scale, float *I)
{
    lanes zero = { 0 };
    for (int64_t j = 0; j < n; j++) {
        lanes sum = { 0 };
        for (int h = 0; h < HI; h += 16) {
            lanes s, v;
            if (is_int) {
                int_lanes t;
                memcpy(&t, (const int32_t *)S + j * ld + h, sizeof t);
                s = __builtin_convertvector(t, lanes);
            } else load(&s, (const float *)S + j * ld + h);
            larger(&s, &zero);
            load(&v, w + h);
            sum += s * v;
        }
        I[j] = add_up(&sum) * (scale ? scale[j] : 1);
    }
}

/* One block of the online softmax of a head: logits x[n] become P; returns e^(old max - new max). e^x by 2^i times a polynomial of 2^f. */
INLINE float softmax_body(float *x, int64_t n, float scale, float *max, float *sum)
{
    lanes top, total = { 0 }, shift;
    float old = *max, shrink;
    spread(&top, *max / scale);
    for (int64_t i = 0; i < n; i += 16) { lanes v; load(&v, x + i); larger(&top, &v); }
    for (int i = 0; i < 16; i++) if (top[i] * scale > *max) *max = top[i] * scale;
    spread(&shift, *max * 1.44269504f);
    for (int64_t i = 0; i < n; i += 16) {
        lanes v, f, p;
        int_lanes e;
        load(&v, x + i);
        v = v * (scale * 1.44269504f) - shift;
        spread(&f, -126);
        larger(&v, &f);
        f = v + 12582912.0f;                                 /* rounds to a whole number */
        e = (int_lanes)f << 23;
        f = v - (f - 12582912.0f);
        p = ((((1.33335581e-3f * f + 9.61812911e-3f) * f + 5.55041087e-2f) * f + 2.40226507e-1f) * f + 6.93147181e-1f) * f + 1.0f;
        p = (lanes)((int_lanes)p + e);
        total += p;
        store(x + i, &p);
    }
    shrink = expf(old - *max);
    *sum = *sum * shrink + add_up(&total);
    return shrink;
}

INLINE void to_bf16_body(const float *x, int64_t n, uint16_t *y)   /* finite x */
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t b;
        memcpy(&b, x + i, 4);
        y[i] = (uint16_t)((b + 0x7FFFu + (b >> 16 & 1u)) >> 16);
    }
}

/* out = shrink out + add, [n] */
INLINE void fold_body(float *out, float shrink, const float *add, int64_t n)
{
    for (int64_t i = 0; i < n; i += 16) {
        lanes a, b;
        load(&a, out + i);
        load(&b, add + i);
        a = a * shrink + b;
        store(out + i, &a);
    }
}

typedef struct hand {
    void (*epilogue)(const void *, int, int64_t, int64_t, const float *, const float *, float *);
    float (*softmax)(float *, int64_t, float, float *, float *);
    void (*to_bf16)(const float *, int64_t, uint16_t *);
    void (*fold)(float *, float, const float *, int64_t);
} hand;
#define HAND(name, target) \
    target static void epilogue_##name(const void *S, int is_int, int64_t ld, int64_t n, const float *w, const float *scale, float *I) \
    { if (is_int) epilogue_body(S, 1, ld, n, w, scale, I); else epilogue_body(S, 0, ld, n, w, scale, I); } \
    target static float softmax_##name(float *x, int64_t n, float scale, float *max, float *sum) { return softmax_body(x, n, scale, max, sum); } \
    target static void to_bf16_##name(const float *x, int64_t n, uint16_t *y) { to_bf16_body(x, n, y); } \
    target static void fold_##name(float *out, float shrink, const float *add, int64_t n) { fold_body(out, shrink, add, n); } \
    static const hand hand_##name = { epilogue_##name, softmax_##name, to_bf16_##name, fold_##name };
HAND(plain, )
#if defined(__x86_64__)
HAND(avx2, __attribute__((target("avx2,fma"))))
HAND(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

static const hand *best_hand(void)
{
#if defined(__x86_64__)
    if (widest_isa() == DSA_ISA_AVX512 && __builtin_cpu_supports("avx512dq")) return &hand_avx512;
    if (widest_isa() == DSA_ISA_AVX2) return &hand_avx2;
#endif
    return &hand_plain;
}

/* ---- score ------------------------------------------------------------------------------------------------------------------------- */
enum { CHUNK = 1024,               /* keys; S of 4 queries is 1 MB then */
       GROUP = 4,                  /* queries of one GEMM */
       BLOCK_ROWS = 2048 };

typedef struct peer_score {
    bench *b;
    peer p;
    score_state *s;                /* the same keys and queries */
    void *q;                       /* [queries, HI, D] in the peer's format */
    float *w;                      /* [queries, HI], the queries' int8 scales in it */
    float *I;                      /* [queries, context] */
    float *S[256];                 /* per thread [CHUNK, GROUP * HI] */
    int64_t turn;
} peer_score;

static void score_task(void *arg, int32_t task)
{
    peer_score *x = (peer_score *)arg;
    const dsa_cache *c = &x->s->keys->copy[x->turn % x->s->keys->n];
    const hand *hand = best_hand();
    int64_t context = x->s->p.context, queries = x->s->p.queries, size = x->p == ONEDNN_S8 ? 1 : x->p == ONEDNN_BF16 ? 2 : 4;
    for (int64_t key = task * CHUNK; key < context; key += x->b->m.threads * CHUNK) {
        const unsigned char *rows_at = (const unsigned char *)c->data + key * D * size;
        const float *scale = x->p == ONEDNN_S8 ? (const float *)(const void *)((const unsigned char *)c->data + context * D) + key : NULL;
        for (int64_t i = 0; i < queries; i += GROUP) {
            int64_t group = queries - i < GROUP ? queries - i : GROUP;
            gemm(x->p, 1, CHUNK, group * HI, D, rows_at, D, (const unsigned char *)x->q + i * HI * D * size, D, x->S[task], group * HI);
            for (int64_t j = 0; j < group; j++)
                hand->epilogue(x->S[task] + j * HI, x->p == ONEDNN_S8, group * HI, CHUNK, x->w + (i + j) * HI, scale, x->I + (i + j) * context + key);
        }
    }
}

static void on_threads(bench *b, void (*task)(void *, int32_t), void *arg)
{
    if (b->m.pool) dsa_pool_run(b->m.pool, b->m.threads, task, arg);
    else task(arg, 0);
}
static void run_peer_score(bench *b, void *state, int64_t turn)
{
    ((peer_score *)state)->turn = turn;
    on_threads(b, score_task, state);
}

/* Median seconds of a call. */
static double typical(bench *b, void (*run)(bench *, void *, int64_t), void *state)
{
    double samples[256], begin = now();
    int64_t n = 0;
    run(b, state, 0);
    while (n < 256 && (n < 3 || now() - begin < 0.7)) {
        double start = now();
        run(b, state, n + 1);
        samples[n++] = now() - start;
    }
    return median(samples, n);
}

static void print_row(const bench *b, const char *name, int64_t queries, int64_t context, int64_t threads, const double *dsa, const double *peers, double floor_s)
{
    printf("%-20s %7lld %8lld %7lld", name, (long long)queries, (long long)context, (long long)threads);
    for (int i = 0; i < 3; i++) if (dsa[i] > 0) printf(" %9.3f", 1e3 * dsa[i]); else printf(" %9s", "-");
    for (int i = 0; i < N_PEERS; i++) if (peers[i] > 0) printf(" %12.3f", 1e3 * peers[i]); else printf(" %12s", "-");
    if (floor_s > 0) printf(" %10.3f", 1e3 * floor_s); else printf(" %10s", "-");
    printf("%s\n", b->m.cpu < 0.9 * b->m.wall ? "  BUSY" : "");   /* while the floor's peaks were measured, just now */
    fflush(stdout);
}

static double bf16_floor(bench *b, double flops, double bytes)
{
    double arithmetic = 0, read = 0;
    b->m.cpu = b->m.wall = 0;
    for (int i = 0; i < 3; i++) {
        arithmetic = fmax(arithmetic, peak_measure(&b->m, unit_of(DSA_BF16, widest_isa()), widest_isa(), NULL));
        read = fmax(read, peak_measure(&b->m, UNIT_READ, widest_isa(), NULL));
    }
    return fmax(flops / arithmetic, bytes / read);
}

/* Columns of dsa.h: bf16, int8, f32. */
static const dsa_type own[3] = { DSA_BF16, DSA_INT8, DSA_F32 };

static void compare(const char *what, peer p, const float *got, const float *want, int64_t n, double limit)
{
    double *wide = (double *)take((size_t)n, sizeof *wide), far;
    for (int64_t i = 0; i < n; i++) wide[i] = (double)want[i];
    far = distance(got, wide, n);
    free(wide);
    if (!(far <= limit)) wrong(peer_names[p], what, far, limit, 0);
}

static void peers_score(bench *b, int64_t context, int64_t queries)
{
    params p = { DSA_BF16, "random", context, queries };
    double dsa[8][3], peers[8][N_PEERS];
    memset(dsa, 0, sizeof dsa);
    memset(peers, 0, sizeof peers);
    for (int f = 0; f < 3; f++) {
        score_state s;
        float *want = (float *)take((size_t)context, sizeof *want);
        p.format = own[f];
        score_open(b, &p, &s);
        for (int t = 0; t < b->threads.n; t++) {
            set_threads(b, b->threads.x[t]);
            start_score(b, &s);
            dsa[t][f] = typical(b, run_score, &s);
        }
        set_threads(b, 1);
        s.seq.n_q = 1;                                       /* the first query's scores, of all keys */
        start_score(b, &s);
        must(&b->ctx, dsa_score(&b->ctx, &s.args, want, context, context), "dsa_score");
        for (int i = 0; i < N_PEERS; i++) {
            peer_score x;
            double *rounded = (double *)take((size_t)(queries * HI * D), sizeof *rounded);
            float scales[HI];
            if (peer_formats[i] != own[f] || !have((peer)i)) { free(rounded); continue; }
            memset(&x, 0, sizeof x);
            x.b = b;
            x.p = (peer)i;
            x.s = &s;
            x.q = take((size_t)(queries * HI * D), 4);
            x.w = index_weights(queries);
            x.I = (float *)take((size_t)(queries * context), sizeof(float));
            for (int64_t j = 0; j < queries; j++) {
                round_index_query(&s.keys->copy[0], s.args.q + j * HI * D, rounded, own[f] == DSA_INT8 ? (uint8_t *)x.q + j * HI * D : NULL, scales);
                for (int h = 0; h < HI; h++) if (own[f] == DSA_INT8) x.w[j * HI + h] *= scales[h];
                for (int64_t d = 0; d < HI * D; d++) {
                    if (own[f] == DSA_BF16) ((uint16_t *)x.q)[j * HI * D + d] = dsa_f32_to_bf16((float)rounded[d]);
                    if (own[f] == DSA_F32) ((float *)x.q)[j * HI * D + d] = (float)rounded[d];
                }
            }
            for (int t = 0; t < 256; t++) x.S[t] = t < b->threads.x[b->threads.n - 1] ? (float *)take(CHUNK * GROUP * HI, sizeof(float)) : NULL;
            for (int t = 0; t < b->threads.n; t++) {
                set_threads(b, b->threads.x[t]);
                run_peer_score(b, &x, 0);
                /* with several queries the first one does not see the last rows */
                compare(": scores are off by %.3g (allowed %.3g)", (peer)i, x.I, want, context - queries + 1, 1e-9);
                peers[t][i] = typical(b, run_peer_score, &x);
            }
            for (int t = 0; t < 256; t++) free(x.S[t]);
            free(rounded);
            free(x.q);
            free(x.w);
            free(x.I);
        }
        free(want);
        score_close(&s);
    }
    for (int t = 0; t < b->threads.n; t++) {
        set_threads(b, b->threads.x[t]);
        print_row(b, "score (dsa: + top-k)", queries, context, b->threads.x[t], dsa[t], peers[t],
                  bf16_floor(b, 2.0 * HI * D * (double)(context * queries), 256.0 * (double)context));
    }
}

/* ---- attention ----------------------------------------------------------------------------------------------------------------------- */
typedef struct peer_attend {
    bench *b;
    peer p;
    attend_state *s;
    void *q;                        /* [queries, H, WIDTH] in the peer's format */
    float *out;                     /* [queries, H, R] */
    unsigned char *block[256];      /* per thread: gathered rows [BLOCK_ROWS, WIDTH] */
    float *S[256], *O[256];         /* [H, BLOCK_ROWS], [H, R] */
    uint16_t *P[256];               /* S in bf16 */
    int64_t turn;
} peer_attend;

/* A unit is one query, or half of its heads where there are fewer queries than threads. */
static void attend_task(void *arg, int32_t task)
{
    peer_attend *x = (peer_attend *)arg;
    const attend_state *s = x->s;
    const hand *hand = best_hand();
    const dsa_cache *c = s->seq.latent;
    int64_t size = x->p == ONEDNN_BF16 ? 2 : 4, heads = s->p.queries < x->b->m.threads ? H / 2 : H, units = s->p.queries * H / heads;
    for (int64_t unit = task; unit < units; unit += x->b->m.threads) {
        int64_t query = unit * heads / H, head = unit * heads % H, total = s->lists ? s->k : s->p.context - s->p.queries + 1 + query;
        float *out = x->out + (query * H + head) * R, max[H], sum[H];
        for (int h = 0; h < heads; h++) { max[h] = -1e30f; sum[h] = 0; }
        memset(out, 0, (size_t)heads * R * sizeof *out);
        for (int64_t at = 0; at < total; at += BLOCK_ROWS) {
            int64_t n = total - at < BLOCK_ROWS ? total - at : BLOCK_ROWS;
            const unsigned char *block = (const unsigned char *)c->data + (size_t)at * c->row_stride;
            const void *P = x->S[task];
            if (s->lists) {
                for (int64_t i = 0; i < n; i++)
                    memcpy(x->block[task] + i * WIDTH * size, (const unsigned char *)c->data + (size_t)s->indices[query * s->k + at + i] * c->row_stride, (size_t)(WIDTH * size));
                block = x->block[task];
            }
            gemm(x->p, 1, heads, n, WIDTH, (const unsigned char *)x->q + (query * H + head) * WIDTH * size, WIDTH, block, WIDTH, x->S[task], BLOCK_ROWS);
            for (int h = 0; h < heads; h++) {
                float *S = x->S[task] + h * BLOCK_ROWS, shrink;
                for (int64_t i = n; i < (n + 15) / 16 * 16; i++) S[i] = -1e30f;
                shrink = hand->softmax(S, (n + 15) / 16 * 16, x->b->ctx.config.softmax_scale, &max[h], &sum[h]);
                if (shrink != 1) for (int d = 0; d < R; d++) out[h * R + d] *= shrink;
                if (size == 2) hand->to_bf16(S, n, x->P[task] + h * BLOCK_ROWS);
            }
            if (size == 2) P = x->P[task];
            gemm(x->p, 0, heads, R, n, P, BLOCK_ROWS, block, WIDTH, x->O[task], R);
            hand->fold(out, 1, x->O[task], heads * R);
        }
        for (int h = 0; h < heads; h++)
            for (int d = 0; d < R; d++) out[h * R + d] /= sum[h];
    }
}
static void run_peer_attend(bench *b, void *state, int64_t turn)
{
    peer_attend *x = (peer_attend *)state;
    attend_state *s = x->s;
    attend_turn(s, turn);
    on_threads(b, attend_task, x);
}

static void peers_attention(bench *b, int64_t context, int64_t queries, int dense)
{
    params p = { DSA_BF16, "random", context, queries };
    double own_times[8][3], peers[8][N_PEERS], n;
    memset(own_times, 0, sizeof own_times);
    memset(peers, 0, sizeof peers);
    for (int f = 0; f < 3; f += 2) {
        attend_state s;
        p.format = own[f];
        attend_open(b, &p, dense, &s);
        for (int t = 0; t < b->threads.n; t++) {
            set_threads(b, b->threads.x[t]);
            start_attend(b, &s);
            own_times[t][f] = typical(b, run_attend, &s);
        }
        for (int i = 0; i < N_PEERS; i++) {
            peer_attend x;
            if (peer_formats[i] != own[f] || !have((peer)i)) continue;
            memset(&x, 0, sizeof x);
            x.b = b;
            x.p = (peer)i;
            x.s = &s;
            x.q = take((size_t)(queries * H * WIDTH), 4);
            x.out = (float *)take((size_t)(queries * H * R), sizeof(float));
            if (own[f] == DSA_BF16) best_hand()->to_bf16(s.args.q, queries * H * WIDTH, (uint16_t *)x.q);
            else memcpy(x.q, s.args.q, (size_t)(queries * H * WIDTH) * 4);
            for (int t = 0; t < b->threads.x[b->threads.n - 1]; t++) {
                x.block[t] = (unsigned char *)take(BLOCK_ROWS * WIDTH, 4);
                x.S[t] = (float *)take(H * BLOCK_ROWS, sizeof(float));
                x.P[t] = (uint16_t *)take(H * BLOCK_ROWS, sizeof(uint16_t));
                x.O[t] = (float *)take(H * R, sizeof(float));
            }
            for (int t = 0; t < b->threads.n; t++) {
                set_threads(b, b->threads.x[t]);
                start_attend(b, &s);
                run_attend(b, &s, 0);
                run_peer_attend(b, &x, 0);
                compare(": attention is off by %.3g (allowed %.3g)", (peer)i, x.out, s.sum.out, queries * H * R, 1e-5);
                peers[t][i] = typical(b, run_peer_attend, &x);
            }
            for (int t = 0; t < 256; t++) { free(x.block[t]); free(x.S[t]); free(x.P[t]); free(x.O[t]); }
            free(x.q);
            free(x.out);
        }
        attend_close(&s);
    }
    n = pairs(&p, dense ? context : TOP_K);
    for (int t = 0; t < b->threads.n; t++) {
        set_threads(b, b->threads.x[t]);
        print_row(b, dense ? "dense_attention" : "sparse_attention", queries, context, b->threads.x[t], own_times[t], peers[t],
                  bf16_floor(b, 2.0 * H * (WIDTH + R) * n, 1152.0 * fmin(n, (double)context)));
    }
}

/* ---- projections of a layer, and the layer with the library's sgemm in its hook ------------------------------------------------------- */
typedef struct peer_project { bench *b; peer p; const layer_data *l; const void *x; float *y; int64_t queries; } peer_project;

static void project_task(void *arg, int32_t task)            /* x [queries, in], the same for all weights; their y's one after the other */
{
    const peer_project *x = (const peer_project *)arg;
    size_t size = x->p == ONEDNN_BF16 ? 2 : 4;
    float *y = x->y;
    for (int i = 0; i < N_WEIGHTS; y += x->queries * shapes[i++].out) {
        int64_t in = shapes[i].in, out = shapes[i].out, part = (out / x->b->m.threads + 63) / 64 * 64, first = task * part;
        if (first >= out) continue;
        if (part > out - first) part = out - first;
        gemm(x->p, 1, x->queries, part, in, x->x, in, (const unsigned char *)x->l->w[i].data + (size_t)(first * in) * size, in, y + first, out);
    }
}
static void run_project(bench *b, void *state, int64_t turn)
{
    (void)turn;
    on_threads(b, project_task, state);
}

static void hook(void *user, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc)
{
    gemm(*(const peer *)user, 1, m, n, k, a, lda, b, ldb, c, ldc);
}

static void peers_layer(bench *b, int64_t context, int64_t queries)
{
    double own_times[8][3], peers[8][N_PEERS], own_layer[8][3], layers[8][N_PEERS];
    memset(own_times, 0, sizeof own_times);
    memset(peers, 0, sizeof peers);
    memset(own_layer, 0, sizeof own_layer);
    memset(layers, 0, sizeof layers);
    for (int f = 0; f < 3; f += 2) {
        layer_data *l = (layer_data *)take(1, sizeof *l);
        float *x = normals(29, queries * H * V, 1.0f), *y, *last;
        uint16_t *x16 = (uint16_t *)take((size_t)queries * H * V, sizeof *x16);
        layer_state s, small;
        int64_t outs = 0;
        for (int i = 0; i < N_WEIGHTS; i++) outs += shapes[i].out;
        y = (float *)take((size_t)(queries * outs), sizeof *y);
        last = y + queries * outs - 1;                       /* of the last weight, query and channel */
        layer_make(&b->ctx, own[f], b->page, context, b->huge, l);
        best_hand()->to_bf16(x, queries * H * V, x16);
        for (int t = 0; t < b->threads.n; t++) {
            set_threads(b, b->threads.x[t]);
            layer_open(b, l, 64, queries, DSA_LAYER_SPARSE, &small);
            must(&b->ctx, dsa_cache_truncate(&b->ctx, &l->latent, 64 - queries), "dsa_cache_truncate");
            must(&b->ctx, dsa_cache_truncate(&b->ctx, &l->index, 64 - queries), "dsa_cache_truncate");
            start_layer(b, &small);
            own_times[t][f] = typical(b, run_layer, &small);
            layer_close(&small);
            layer_open(b, l, context, queries, DSA_LAYER_SPARSE, &s);
            start_layer(b, &s);
            own_layer[t][f] = typical(b, run_layer, &s);
            for (int i = 0; i < N_PEERS; i++) {
                peer_project c = { b, (peer)i, l, own[f] == DSA_BF16 ? (const void *)x16 : (const void *)x, y, queries };
                double want;
                float row[HIDDEN];
                if (peer_formats[i] != own[f] || !have((peer)i)) continue;
                run_project(b, &c, 0);
                weight_row(&l->w[W_INDEX_W], HIDDEN, HI - 1, row);
                want = 0;
                for (int d = 0; d < HIDDEN; d++) {
                    float z = x[(queries - 1) * HIDDEN + d];
                    want += (double)row[d] * (double)(own[f] == DSA_BF16 ? dsa_bf16_to_f32(dsa_f32_to_bf16(z)) : z);
                }
                if (!(fabs((double)*last - want) < 1e-3)) wrong(peer_names[i], ": a projection is %.9g instead of %.9g", (double)*last, want, 0);
                peers[t][i] = typical(b, run_project, &c);
                if (own[f] == DSA_F32) {
                    dsa_config config = b->ctx.config;
                    dsa_ctx kept = b->ctx;
                    float *plain = (float *)take((size_t)queries * HIDDEN, sizeof *plain);
                    peer which = (peer)i;
                    run_layer(b, &s, 0);
                    memcpy(plain, s.args.y, (size_t)queries * HIDDEN * sizeof *plain);
                    config.gemm = hook;
                    config.gemm_user = &which;
                    must(&kept, dsa_init(&b->ctx, &config), "dsa_init");
                    library_threads((int)b->threads.x[t]);
                    start_layer(b, &s);
                    run_layer(b, &s, 0);
                    /* a rounding may swap two keys of nearly equal score */
                    compare(": y of the layer is off by %.3g (allowed %.3g)", which, s.args.y, plain, queries * HIDDEN, 1e-6);
                    layers[t][i] = typical(b, run_layer, &s);
                    library_threads(1);
                    b->ctx = kept;
                    start_layer(b, &s);
                    free(plain);
                }
            }
            layer_close(&s);
        }
        layer_free(l);
        free(l);
        free(x);
        free(y);
        free(x16);
    }
    for (int t = 0; t < b->threads.n; t++) {
        set_threads(b, b->threads.x[t]);
        print_row(b, "project (dsa: layer)", queries, 64, b->threads.x[t], own_times[t], peers[t],
                  bf16_floor(b, 2 * layer_parameters() * (double)queries, 2 * layer_parameters()));
        print_row(b, "layer (gemm hook)", queries, context, b->threads.x[t], own_layer[t], layers[t], 0);
    }
}

int main(int argc, char **argv)
{
    static bench b;
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    const int64_t many = 32;
    for (int i = 1; i < argc; i++) {
        const char *o = argv[i], *v = i + 1 < argc ? argv[i + 1] : NULL;
        int bad = 0;
        if (strcmp(o, "--help") == 0) { fputs(peers_help, stdout); return 0; }
        if (strcmp(o, "--huge") == 0) { b.huge = 1; continue; }
        if (!v) return usage("unknown option, or its value is missing: ", o);
        i++;
        if (strcmp(o, "--threads") == 0) bad = parse_numbers(v, 256, &b.threads) != 0 || b.threads.n > 8;
        else if (strcmp(o, "--isa") == 0) bad = parse_isa(v, &b.isa) != 0;
        else return usage("unknown option: ", o);
        if (bad) return usage("no such value, or out of range: ", v);
    }
    if (b.threads.n == 0) {
        b.threads.x[b.threads.n++] = 1;
        if (processors > 1) b.threads.x[b.threads.n++] = processors > 256 ? 256 : processors;
    }
    machine_open(&b.m, b.huge);
    set_threads(&b, 1);
    library_threads(1);
    print_machine(stdout, "bench_peers");
    printf("ISA       %s; milliseconds, median of cold calls\n\n", dsa_isa_name(dsa_query_isa(&b.ctx)));
    for (int i = 0; i < N_PEERS; i++) if (!have((peer)i)) printf("%s is missing: this program was built without it\n", peer_names[i]);
    for (double warm = now(); now() - warm < 0.5;) peak_measure(&b.m, UNIT_F32, dsa_query_isa(&b.ctx), NULL);
    printf("%-20s %7s %8s %7s %9s %9s %9s", "case", "queries", "context", "threads", "dsa bf16", "dsa int8", "dsa f32");
    for (int i = 0; i < N_PEERS; i++) printf(" %12s", peer_names[i]);
    printf(" %10s\n", "bf16 floor");
    peers_score(&b, 64 * K, 1);
    peers_score(&b, 64 * K, many);
    peers_attention(&b, 128 * K, 1, 0);
    peers_attention(&b, 128 * K, many, 0);
    peers_attention(&b, 16 * K, 1, 1);
    peers_layer(&b, 8 * K, 1);
    peers_layer(&b, 8 * K, many);
    for (int i = 0; i < 2; i++) rows_free(&b.kept[i]);
    free(b.work);
    machine_close(&b.m);
    return fflush(stdout) != 0 || ferror(stdout) ? 2 : 0;
}

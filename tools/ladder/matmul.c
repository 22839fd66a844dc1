/* matmul.c - the ladder to the projections of the layer, checked against f64, then timed beside the machine's own peaks.

       cc -O2 tools/ladder/matmul.c -lm -pthread -o build/ladder_matmul && build/ladder_matmul

   Zen 4, 2 cores, cold weights; the machine was shared, so only shares of a peak of the same run compare. bf16 / FP8:

                                             read bandwidth, n = 1, 1 thread          2 threads      f32 fma, n = 32
     outer: rows of x in the lanes            .55-.75 / .36-.60                        .78-.96 / .54-.94    .71-.73 / .56-.61
     dsa.h: columns of W in the lanes         .70-1.0 / .55-.66                        .95-.97 / .77-.97    .80-.83 / .81-.83

   outer is the version before (matmul.inc). It sums a chunk's outputs in plain order and a single row's by lanes, so that chunking moved
   the bits; dsa.h has one order for both.

   One row of x (limited by reading W):
     streams               one row of W at a time is as fast as four while x is in L1 (in = 1536: .96), and half as fast once it is not:
                           then four rows must share a load of x. Eight rows: no faster, and slower at in = 1536
     x in L1 by passes     over 2048 or 4096 columns: .50-.56; a row's next piece lies far away, and the prefetchers start again
     asking a page ahead   L2: bf16 .65 -> .72, FP8 .53 -> .69 where in >= 7168; but .98 -> .75 of bf16 at in = 1536. L1: worse
     FP8                   10 cycles for 64 weights in cache, 7.3 were possible (5 shuffles, 2 shifts, 4 fma): 24 GB/s at most. Through f16
                           (no VBMI) 16 cycles. Dealing x out so that a permutation is saved brings nothing
     bf16                  8 cycles for 64 weights in their order, 5 dealt out even before odd: memory takes 15
     W_UK                  four rows at a time, which saves loads and stores of the sums: half the speed of one after the other
   32 rows (limited by fma):
     tile of 4 x 6         100 % in L1; all rows over one expansion 94 %, since x comes from L2; expanding 4 x 512 weights is 6 % (bf16) or
                           9 % (FP8) of that, dealing x out 3 %: .84 with W in cache
     reading W ahead       .63 without, .80-.83 with; L1 or L2 is the same. gcc drops calls of a function that only prefetches: see there
     eight outputs a time  for each group of x: nothing, or .02 less
     expanding the next    between the tiles, so that its stores hide behind their fma: .71; they delay the loads that follow
     passes of 256, 1024   columns: less (.67), the same with twice the memory
*/
#define _GNU_SOURCE
#define DSA_IMPLEMENTATION
#define DSA_STATIC
#include "../../dsa.h"
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

/* The flags under which dsa.h compiles its implementation. */
#if defined(__GNUC__) && !defined(__clang__)
#  pragma GCC optimize ("fp-contract=off")
#  if defined(__OPTIMIZE__)
#    pragma GCC optimize ("O2", "tree-loop-vectorize", "vect-cost-model=dynamic")
#  endif
#endif
#include "matmul.inc"

typedef void (*matmul_fn)(int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx, const dsa_tensor *w, int64_t first,
                          float *y, int64_t ldy, void *scratch);
#define F(x) (1u << (x))
#define ALL (F(DSA_F32) | F(DSA_BF16) | F(DSA_F16) | F(DSA_FP8))

typedef struct variant {
    const char *name, *isa;
    unsigned types;
    int n_max;                   /* rows of x it is made for */
    int64_t (*bytes)(int64_t n, int64_t in, int64_t in_t);
    matmul_fn matmul, matmul_t;
} variant;

#if defined(__x86_64__)
static int64_t outer_bytes(int64_t n, int64_t in, int64_t in_t) { (void)n; (void)in_t; return outer__matmul_bytes_vector(in, in); }
#endif

static const variant variants[] = {
    { "dsa.h", "scalar", ALL, 32, dsa__ref_matmul_bytes, dsa__ref_matmul, dsa__ref_matmul_t },
#if defined(__x86_64__)
    { "dsa.h", "avx512", ALL, 32, dsa__matmul_bytes, dsa__matmul_avx512, dsa__matmul_t_avx512 },
    { "dsa.h base", "avx512", ALL, 32, dsa__matmul_bytes, dsa__matmul_avx512f, dsa__matmul_t_avx512f },
    { "dsa.h", "avx2", ALL, 32, dsa__matmul_bytes, dsa__matmul_f32x8, dsa__matmul_t_f32x8 },
    { "outer", "avx512", ALL, 32, outer_bytes, outer__matmul_avx512, outer__matmul_t_avx512 },
#endif
};
#define N_VARIANTS ((int)(sizeof variants / sizeof *variants))

static int has(const char *isa)
{
#if defined(__x86_64__)
    if (!strcmp(isa, "avx512")) return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    (void)isa;
    return 1;
}

/* ---- data -------------------------------------------------------------------------------------- */
static uint64_t rng = 0x9E3779B97F4A7C15u;
static uint32_t next32(void) { rng ^= rng << 13; rng ^= rng >> 7; rng ^= rng << 17; return (uint32_t)(rng >> 32); }
static float uniform(void) { return (float)(next32() >> 8) * (1.0f / 8388608.0f) - 1.0f; }
static float gauss(void) { return uniform() + uniform() + uniform(); }
static const char *type_name(dsa_type t) { return t == DSA_F32 ? "f32" : t == DSA_BF16 ? "bf16" : t == DSA_F16 ? "f16" : "fp8"; }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec; }
static int by_value(const void *a, const void *b) { double x = *(const double *)a, y = *(const double *)b; return (x > y) - (x < y); }
static double median(double *t, int n) { qsort(t, (size_t)n, sizeof *t, by_value); return t[n / 2]; }

static void *take(size_t bytes)
{
    void *p = NULL;
    if (posix_memalign(&p, 4096, (bytes + 4095) & ~(size_t)4095)) { fprintf(stderr, "out of memory\n"); exit(2); }
    return p;
}

static void put(dsa_type type, float x, unsigned char *p)
{
    if (type == DSA_F32) memcpy(p, &x, 4);
    else if (type == DSA_BF16) { uint16_t b = dsa_f32_to_bf16(x); memcpy(p, &b, 2); }
    else if (type == DSA_F16) { uint16_t b = dsa_f32_to_f16(x); memcpy(p, &b, 2); }
    else *p = dsa_f32_to_e4m3(x * 64.0f);
}

/* ---- check: against f64, the weights expanded by the library's scalar code ---------------------------------------- */
static int check_one(const variant *v, dsa_type type, int64_t n, int64_t in, int64_t n_out, int64_t first, int transposed, int mode)
{
    int64_t rows = first + n_out + 3, esize = dsa__type_bytes(type), i, o, t, xn = transposed ? n_out : in, yn = transposed ? in : n_out;
    int64_t ldx = xn + 5, ldy = yn + 3, blocks = (rows + 127) / 128 * ((in + 127) / 128);
    size_t wbytes = (size_t)((first + n_out) * in * esize);
    /* the weight ends at an unmapped page, and begins at an odd address whenever its size is odd */
    size_t span = (wbytes + 4095) & ~(size_t)4095;
    unsigned char *map = (unsigned char *)mmap(NULL, span + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *data = map + span - wbytes;
    float *x = (float *)take((size_t)(n * ldx) * 4), *y = (float *)take((size_t)(n * ldy) * 4), *s = (float *)take((size_t)blocks * 4);
    float *row = (float *)take((size_t)in * 4);
    double *want = (double *)take((size_t)(n * yn) * 8), *mass = (double *)take((size_t)(n * yn) * 8), worst = 0;
    void *scratch = take((size_t)v->bytes(n, dsa__max64(in, n_out), in) + 64);
    int bad = 0;
    dsa_tensor w;
    mprotect(map + span, 4096, PROT_NONE);
    w.data = data; w.type = type; w.scale_inv = s;
    for (i = 0; i < (int64_t)wbytes / esize; i++) put(type, gauss(), data + i * esize);
    if (type == DSA_FP8 && mode == 1) for (i = 0; i < (int64_t)wbytes; i++) data[i] = (unsigned char)(next32() % 127u | (next32() & 0x80u));   /* every finite code */
    if (mode == 2) {                                     /* a NaN somewhere */
        i = (int64_t)(next32() % (uint32_t)(n_out * in)) + first * in;
        if (type == DSA_FP8) data[i] = (unsigned char)(0x7Fu | (next32() & 0x80u));
        else put(type, dsa__nan(), data + i * esize);
    }
    for (i = 0; i < blocks; i++) s[i] = mode == 3 ? 0x1p-70f * (1.5f + uniform()) : 0.01f * (1.5f + uniform());
    for (i = 0; i < n * ldx; i++) x[i] = gauss() * (mode == 4 ? 1e-30f : mode == 5 ? 1e30f : 1.0f);
    memset(y, 0xFF, (size_t)(n * ldy) * 4);
    memset(want, 0, (size_t)(n * yn) * 8);
    memset(mass, 0, (size_t)(n * yn) * 8);
    for (o = 0; o < n_out; o++) {
        dsa__weight_row(&w, first + o, in, row);
        for (t = 0; t < n; t++)
            for (i = 0; i < in; i++) {
                double p = (double)row[i] * (double)x[t * ldx + (transposed ? o : i)];
                int64_t at = t * yn + (transposed ? i : o);
                want[at] += p;
                mass[at] += fabs(p);
            }
    }
    (transposed ? v->matmul_t : v->matmul)(n, in, n_out, x, ldx, &w, first, y, ldy, scratch);
    for (t = 0; t < n; t++) {
        for (i = 0; i < yn; i++) {
            double e = fabs((double)y[t * ldy + i] - want[t * yn + i]) / (mass[t * yn + i] + 1e-40);
            if (want[t * yn + i] != want[t * yn + i]) e = y[t * ldy + i] == y[t * ldy + i] ? 1.0 : 0.0;
            if (!(e <= worst)) worst = e;
        }
        for (i = yn; i < ldy; i++) { uint32_t b = dsa__bits(y[t * ldy + i]); if (b != 0xFFFFFFFFu) bad = 1; }
    }
    if (!(worst < 1e-6) || bad) {
        printf("WRONG %s %s%s n %d in %d n_out %d first %d mode %d: %.2g of Sum |x||w|%s\n", v->isa, type_name(type), transposed ? " transposed" : "",
               (int)n, (int)in, (int)n_out, (int)first, mode, worst, bad ? ", wrote outside" : "");
        bad = 1;
    }
    /* the same bits for any split of the outputs at multiples of 64 */
    if (!transposed && n_out > 64) {
        float *z = (float *)take((size_t)(n * ldy) * 4);
        for (o = 0; o < n_out; o += i) {
            i = dsa__min64(64 * (1 + next32() % 3), n_out - o);
            v->matmul(n, in, i, x, ldx, &w, first + o, z + o, ldy, scratch);
        }
        for (t = 0; t < n; t++)
            if (mode != 2 && memcmp(y + t * ldy, z + t * ldy, (size_t)yn * 4)) { printf("SPLIT %s %s n %d in %d n_out %d changes bits\n", v->isa, type_name(type), (int)n, (int)in, (int)n_out); bad = 1; break; }
        free(z);
    }
    munmap(map, span + 4096);
    free(x); free(y); free(s); free(row); free(want); free(mass); free(scratch);
    return bad;
}

static int check(const variant *v)
{
    static const int64_t shape[][3] = { {1, 1, 0}, {3, 5, 1}, {7, 2, 0}, {16, 8, 3}, {17, 9, 0}, {31, 33, 2}, {48, 16, 5}, {64, 64, 0}, {65, 70, 60},
                                        {127, 130, 1}, {128, 128, 128}, {129, 3, 126}, {200, 257, 100}, {256, 96, 0}, {300, 64, 130}, {513, 19, 0}, {1000, 12, 7}, {2100, 5, 0}, {4100, 11, 125} };
    static const int64_t rows[] = {1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 25, 31, 32};
    int bad = 0, type, mode;
    size_t i, j;
    for (type = DSA_F32; type <= DSA_FP8; type++)
        for (i = 0; i < sizeof shape / sizeof *shape; i++)
            for (j = 0; j < sizeof rows / sizeof *rows; j++)
                for (mode = 0; mode < 6; mode++) {
                    if (mode && (i + j + (size_t)mode) % 3) continue;
                    if ((mode == 1 || mode == 3) && type != DSA_FP8) continue;
                    bad += check_one(v, (dsa_type)type, rows[j], shape[i][0], shape[i][1], shape[i][2], 0, mode);
                    bad += check_one(v, (dsa_type)type, rows[j], shape[i][0], shape[i][1], shape[i][2], 1, mode);
                    if (bad > 20) return bad;
                }
    return bad;
}

/* ---- peaks ------------------------------------------------------------------------------------- */
#if defined(__x86_64__)
#define FMA_PEAK(NAME, TARGET, VEC, N, LANES, SET, FMA, STORE) \
TARGET static double NAME(void) \
{ \
    VEC a[N], c = SET(0.999f); \
    float out[16]; \
    double best = 0, t0, t; \
    int i, q; \
    for (q = 0; q < 5; q++) { \
        DSA__UNROLL for (i = 0; i < N; i++) a[i] = SET((float)i); \
        t0 = now(); \
        for (i = 0; i < 3000000; i++) { \
            int j; \
            DSA__UNROLL for (j = 0; j < N; j++) a[j] = FMA(a[j], c, c); \
        } \
        t = 3e6 * N * LANES * 2 / (now() - t0); \
        if (t > best) best = t; \
        DSA__UNROLL for (i = 1; i < N; i++) a[0] = FMA(a[i], c, a[0]); \
        STORE(out, a[0]); \
        if (out[0] == 12345.0f) printf(" "); \
    } \
    return best; \
}
FMA_PEAK(fma_peak_avx512, DSA__AVX512, __m512, 14, 16, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_storeu_ps)
FMA_PEAK(fma_peak_avx2, __attribute__((target("avx2,fma"))), __m256, 12, 8, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_storeu_ps)

DSA__AVX512 static uint64_t read_avx512(const unsigned char *p, size_t bytes)
{
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    size_t i;
    for (i = 0; i + 256 <= bytes; i += 256) {
        a = _mm512_xor_si512(a, _mm512_loadu_si512(p + i));
        b = _mm512_xor_si512(b, _mm512_loadu_si512(p + i + 64));
        c = _mm512_xor_si512(c, _mm512_loadu_si512(p + i + 128));
        d = _mm512_xor_si512(d, _mm512_loadu_si512(p + i + 192));
    }
    return (uint64_t)_mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)));
}

__attribute__((target("avx2"))) static uint64_t read_avx2(const unsigned char *p, size_t bytes)
{
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    uint64_t out[4];
    size_t i;
    for (i = 0; i + 128 <= bytes; i += 128) {
        a = _mm256_xor_si256(a, _mm256_loadu_si256((const __m256i *)(const void *)(p + i)));
        b = _mm256_xor_si256(b, _mm256_loadu_si256((const __m256i *)(const void *)(p + i + 32)));
        c = _mm256_xor_si256(c, _mm256_loadu_si256((const __m256i *)(const void *)(p + i + 64)));
        d = _mm256_xor_si256(d, _mm256_loadu_si256((const __m256i *)(const void *)(p + i + 96)));
    }
    _mm256_storeu_si256((__m256i *)(void *)out, _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d)));
    return out[0] + out[1] + out[2] + out[3];
}
#endif

static uint64_t read_plain(const unsigned char *p, size_t bytes)
{
    uint64_t s = 0, v;
    size_t i;
#if defined(__x86_64__)
    if (has("avx512")) return read_avx512(p, bytes);
    if (has("avx2")) return read_avx2(p, bytes);
#endif
    for (i = 0; i + 8 <= bytes; i += 8) { memcpy(&v, p + i, 8); s ^= v; }
    return s;
}

/* ---- timing: cold weights, copies of the matrix one after the other through an arena ------------------------------------- */
static unsigned char *arena;
static size_t arena_bytes = (size_t)512 << 20;

typedef struct job {
    const variant *v;            /* NULL: read only */
    dsa_type type;
    int64_t n, in, n_out, heads, first, per_head;   /* heads > 0: one call per head, rows first + h per_head */
    int transposed, threads, copies, repeats;
    pthread_barrier_t barrier;
    double t[16];
    const float *x;
    const float *scales;
} job;
typedef struct worker { job *j; int index; } worker;
static volatile uint64_t sink;

static void *work(void *arg)
{
    worker *me = (worker *)arg;
    job *j = me->j;
    int64_t units = j->heads ? j->heads : (j->n_out + 63) / 64, a = units * me->index / j->threads, b = units * (me->index + 1) / j->threads, h;
    int64_t rows = j->heads ? j->heads * j->per_head : j->n_out;
    size_t bytes = (size_t)(rows * j->in * dsa__type_bytes(j->type));
    int r, c;
    float *y = (float *)take((size_t)(j->n * (j->heads ? j->heads * dsa__max64(j->in, j->n_out) : j->n_out)) * 4 + 4096);
    void *scratch = take(j->v ? (size_t)j->v->bytes(j->n, dsa__max64(j->in, j->n_out), j->in) : 64);
#if defined(__linux__) && defined(CPU_SET)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(me->index, &set);
    sched_setaffinity(0, sizeof set, &set);
#endif
    for (r = 0; r < j->repeats; r++) {
        double t0;
        pthread_barrier_wait(&j->barrier);
        t0 = now();
        for (c = 0; c < j->copies; c++) {
            dsa_tensor w;
            w.data = arena + (size_t)c * ((bytes + 4095) & ~(size_t)4095);
            w.type = j->type;
            w.scale_inv = j->scales;
            if (!j->v) {
                sink += read_plain((const unsigned char *)w.data + bytes / (size_t)j->threads * (size_t)me->index, bytes / (size_t)j->threads);
            } else if (j->heads) {
                int64_t xn = j->transposed ? j->n_out : j->in, yn = j->transposed ? j->in : j->n_out;
                for (h = a; h < b; h++)
                    (j->transposed ? j->v->matmul_t : j->v->matmul)(j->n, j->in, j->n_out, j->x + h * xn, j->heads * xn, &w, j->first + h * j->per_head,
                                                                    y + h * yn, j->heads * yn, scratch);
            } else {
                int64_t o = 64 * a, e = dsa__min64(64 * b, j->n_out);
                if (e > o) j->v->matmul(j->n, j->in, e - o, j->x, j->in, &w, o, y + o, j->n_out, scratch);
            }
        }
        pthread_barrier_wait(&j->barrier);
        if (me->index == 0) j->t[r] = (now() - t0) / j->copies;
    }
    free(y);
    free(scratch);
    return NULL;
}

/* Median seconds of one product. */
static double run(job *j)
{
    pthread_t thread[64];
    worker w[64];
    int i;
    pthread_barrier_init(&j->barrier, NULL, (unsigned)j->threads);
    for (i = 0; i < j->threads; i++) { w[i].j = j; w[i].index = i; }
    for (i = 0; i < j->threads; i++) pthread_create(&thread[i], NULL, work, &w[i]);
    for (i = 0; i < j->threads; i++) pthread_join(thread[i], NULL);
    pthread_barrier_destroy(&j->barrier);
    return median(j->t, j->repeats);
}

typedef struct shape { const char *name; int64_t in, n_out, heads, first, per_head; int transposed; } shape;
static const shape shapes[] = {                          /* DeepSeek-V3.2 */
    { "q_a",  7168,  1536, 0, 0, 0, 0 },
    { "q_b",  1536, 24576, 0, 0, 0, 0 },
    { "kv_a", 7168,   576, 0, 0, 0, 0 },
    { "o",   16384,  7168, 0, 0, 0, 0 },
    { "w_uk",  512,   128, 128, 0, 256, 1 },
    { "w_uv",  512,   128, 128, 128, 256, 0 },
};

static void fill(dsa_type type)
{
    size_t i, esize = (size_t)dsa__type_bytes(type);
    static unsigned char block[1 << 16];
    for (i = 0; i < sizeof block; i += esize) put(type, gauss() * 0.5f, block + i);
    for (i = 0; i < arena_bytes; i += sizeof block) memcpy(arena + i, block, dsa__min64((int64_t)(arena_bytes - i), (int64_t)sizeof block) > 0 ? sizeof block : 0);
}

int main(int argc, char **argv)
{
    const char *only_shape = NULL, *only_type = NULL, *only_isa = NULL;
    int only_n = 0, only_threads = 0, huge = 1, do_check = 1, i, type, k;
    float *x = (float *)take(32 * 128 * 512 * 4 + 32 * 16384 * 4), *scales = (float *)take(1 << 20);
    for (i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--shape") && i + 1 < argc) only_shape = argv[++i];
        else if (!strcmp(argv[i], "--type") && i + 1 < argc) only_type = argv[++i];
        else if (!strcmp(argv[i], "--isa") && i + 1 < argc) only_isa = argv[++i];
        else if (!strcmp(argv[i], "--n") && i + 1 < argc) only_n = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--threads") && i + 1 < argc) only_threads = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--small-pages")) huge = 0;
        else if (!strcmp(argv[i], "--time")) do_check = 0;
        else if (!strcmp(argv[i], "--check")) do_check = 2;
        else { fprintf(stderr, "usage: matmul [--check | --time] [--shape S] [--type T] [--isa I] [--n N] [--threads N] [--small-pages]\n"); return 2; }
    }
    if (do_check) {
        int bad = 0;
        for (i = 0; i < N_VARIANTS; i++)
            if (has(variants[i].isa) && (!only_isa || !strcmp(only_isa, variants[i].isa))) {
                int b = check(&variants[i]);
                printf("%-8s %-8s %s\n", variants[i].isa, variants[i].name, b ? "WRONG" : "checked");
                bad += b;
            }
        if (bad || do_check == 2) return bad != 0;
    }
    arena = (unsigned char *)mmap(NULL, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(arena, arena_bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    for (i = 0; i < 32 * 128 * 512 + 32 * 16384; i++) x[i] = gauss();
    for (i = 0; i < (1 << 18); i++) scales[i] = 0.01f * (1.5f + uniform());
#if defined(__x86_64__)
    printf("f32 FMA peak of one thread: ");
    if (has("avx512")) printf("avx512 %.1f GFLOP/s  ", fma_peak_avx512() * 1e-9);
    printf("avx2 %.1f GFLOP/s\n", fma_peak_avx2() * 1e-9);
#endif
    for (type = DSA_F32; type <= DSA_FP8; type++) {
        if (only_type ? strcmp(only_type, type_name((dsa_type)type)) : type == DSA_F16) continue;
        fill((dsa_type)type);
        for (k = 0; k < (int)(sizeof shapes / sizeof *shapes); k++) {
            static const int ns[] = {1, 2, 4, 8, 16, 32};
            const shape *s = &shapes[k];
            int a, threads;
            if (only_shape && strcmp(only_shape, s->name)) continue;
            for (a = 0; a < 6; a++)
                for (threads = 1; threads <= 2; threads++) {
                    job j;
                    double bytes = (double)((s->heads ? s->heads : 1) * s->n_out * s->in * dsa__type_bytes((dsa_type)type)), read, t;
                    double flops = 2.0 * (double)(ns[a] * (s->heads ? s->heads : 1) * s->n_out * s->in), peak = 1;
                    int64_t rows = s->heads ? s->heads * s->per_head : s->n_out;
                    if (only_n ? only_n != ns[a] : ns[a] != 1 && ns[a] != 32) continue;
                    if (only_threads && only_threads != threads) continue;
                    memset(&j, 0, sizeof j);
                    j.type = (dsa_type)type; j.n = ns[a]; j.in = s->in; j.n_out = s->n_out; j.heads = s->heads; j.first = s->first; j.per_head = s->per_head;
                    j.transposed = s->transposed; j.threads = threads; j.x = x; j.scales = scales;
                    j.copies = (int)(arena_bytes / (((size_t)(rows * s->in * dsa__type_bytes((dsa_type)type)) + 4095) & ~(size_t)4095));
                    if (j.copies < 1) continue;     /* o in f32 */
                    if (ns[a] > 1 && j.copies > 8) j.copies = 8;
                    if (ns[a] > 8 && j.copies > 2) j.copies = 2;
                    for (i = 0; i < N_VARIANTS; i++) {
                        const variant *v = &variants[i];
                        if (!has(v->isa) || v->n_max < ns[a] || !(v->types & F(type)) || (only_isa ? strcmp(only_isa, v->isa) : !strcmp(v->isa, "scalar"))) continue;
                        j.v = NULL;
                        j.repeats = ns[a] > 1 ? 1 : 3;
                        (void)run(&j);
                        read = run(&j);
                        j.v = v;
                        j.repeats = 3;
                        t = run(&j);
                        j.v = NULL;
                        read = (read + run(&j)) / 2;
                        read = (double)rows * (double)(s->in * dsa__type_bytes((dsa_type)type)) / read;
#if defined(__x86_64__)
                        peak = threads * (!strcmp(v->isa, "avx512") ? fma_peak_avx512() : fma_peak_avx2());
#endif
                        printf("%-5s %-4s n %2d threads %d %-7s %-20s %8.3f ms %6.1f GB/s of %5.1f (%.2f) %6.1f GFLOP/s of %5.1f (%.2f)\n", s->name, type_name((dsa_type)type),
                               ns[a], threads, v->isa, v->name, t * 1e3, bytes / t * 1e-9, read * 1e-9, bytes / t / read, flops / t * 1e-9, peak * 1e-9, flops / t / peak);
                        fflush(stdout);
                    }
                }
        }
    }
    return 0;
}

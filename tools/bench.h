/* bench.h - the machine's side of bench.c and bench_peers.c: clock, memory, random numbers, threads, and what this machine can do
   at most: multiply-adds of each kind, bytes read in order, rows gathered from random places - public domain or MIT, like dsa.h

   Define DSA_IMPLEMENTATION, include dsa.h and define _DEFAULT_SOURCE (for madvise) before this. */
#ifndef BENCH_H_INCLUDED
#define BENCH_H_INCLUDED

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#  include <immintrin.h>
#elif defined(__aarch64__)
#  include <arm_neon.h>
#  if defined(__linux__)
#    include <sys/auxv.h>
#  endif
#endif

static inline void die(int status, const char *what, const char *detail)
{
    fflush(stdout);
    fprintf(stderr, "bench: %s%s\n", what, detail);
    exit(status);
}

/* ---- clock ------------------------------------------------------------------------------------------------------------------- */
static inline double now(void)   /* seconds */
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline double cpu_seconds(void)   /* of all threads of this process */
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}
static inline double median(double *x, int64_t n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

/* ---- memory ------------------------------------------------------------------------------------------------------------------ */
/* Straight from mmap, on 2 MB, and with huge pages when asked for: malloc would give pages of whichever size it happens to hold.
   The first bytes, a cache line, remember the mapping. */
enum { HUGE_PAGE = 1 << 21, MAP_HEAD = 64 };

static inline void *map_bytes(size_t bytes, int huge)
{
    size_t total = bytes + MAP_HEAD + HUGE_PAGE, start;
    unsigned char *raw, *p;
    if (total < bytes) return NULL;
    raw = (unsigned char *)mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == (unsigned char *)MAP_FAILED) return NULL;
    start = (size_t)(-(uintptr_t)raw & (uintptr_t)(HUGE_PAGE - 1));
    p = raw + start;
#if defined(MADV_HUGEPAGE)
    madvise(p, bytes + MAP_HEAD, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
    (void)huge;
#endif
    memcpy(p, &raw, sizeof raw);
    memcpy(p + sizeof raw, &total, sizeof total);
    return p + MAP_HEAD;
}

static inline void unmap_bytes(void *memory)
{
    unsigned char *p = (unsigned char *)memory, *raw;
    size_t total;
    if (!p) return;
    memcpy(&raw, p - MAP_HEAD, sizeof raw);
    memcpy(&total, p - MAP_HEAD + sizeof raw, sizeof total);
    munmap(raw, total);
}

/* The dsa_allocator of the caches. user: int, whether to ask for huge pages. */
static inline void *bench_alloc(void *user, size_t bytes) { return map_bytes(bytes, *(int *)user); }
static inline void bench_release(void *user, void *memory) { (void)user; unmap_bytes(memory); }

static inline void *take(size_t n, size_t element)   /* ordinary memory */
{
    void *p = malloc(n * element + 1);
    if (!p) die(2, "out of memory", "");
    return p;
}

/* ---- random numbers ------------------------------------------------------------------------------------------------------------ */
typedef struct rng { uint64_t state; } rng;

static inline uint64_t random_bits(rng *r)   /* splitmix64 */
{
    uint64_t z = (r->state += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}
static inline int64_t random_below(rng *r, int64_t n) { return (int64_t)(random_bits(r) % (uint64_t)n); }

/* Near enough to Gaussian, and quick: the sum of four uniform numbers (it ends at 3.46 deviations). */
static inline void random_normals(rng *r, float *x, int64_t n, float deviation)
{
    const float unit = deviation * 2.6427e-5f;               /* sqrt(3) / 65536 */
    for (int64_t i = 0; i < n; i++) {
        uint64_t b = random_bits(r);
        int32_t sum = (int32_t)(b & 65535) + (int32_t)(b >> 16 & 65535) + (int32_t)(b >> 32 & 65535) + (int32_t)(b >> 48);
        x[i] = unit * (float)(sum - 131070);
    }
}
static inline void random_order(rng *r, int32_t *x, int64_t n)   /* 0 .. n-1, shuffled */
{
    for (int64_t i = 0; i < n; i++) {
        int64_t j = random_below(r, i + 1);
        x[i] = x[j];
        x[j] = (int32_t)i;
    }
}

/* ---- peaks: arithmetic --------------------------------------------------------------------------------------------------------- */
typedef enum unit { UNIT_F32 = 0, UNIT_BF16, UNIT_INT8, UNIT_READ, UNIT_GATHER, N_UNITS } unit;
static const char *const unit_names[N_UNITS] = { "peak_f32", "peak_bf16", "peak_int8", "peak_read", "peak_gather" };

/* Independent chains, enough of them to cover latency times width (4 cycles x 2 on x86, 4 x 4 on large Arm cores), in registers.
   Each chain starts elsewhere, so that none is the copy of another. They run n times; the result goes to a volatile. */
#define CHAINS_12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define CHAINS_16(X) CHAINS_12(X) X(12) X(13) X(14) X(15)

/* The scalar ISA is plain C that the compiler vectorises for its baseline: a multiply, then an add, 4 lanes wide. */
typedef float plain_vector __attribute__((vector_size(16)));
static inline double ops_f32_scalar(int64_t n, float x)
{
    plain_vector m = { x, x, x, x }, sum = { 0, 0, 0, 0 };
#define START(i) plain_vector a##i = { x * (i + 1), x, x, x };
#define STEP(i)  a##i = a##i * m + m;
#define END(i)   sum += a##i;
    CHAINS_12(START)
    for (; n > 0; n--) { CHAINS_12(STEP) }
    CHAINS_12(END)
#undef START
#undef STEP
#undef END
    return (double)(sum[0] + sum[1] + sum[2] + sum[3]);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static inline double ops_f32_avx2(int64_t n, float x)
{
    __m256 m = _mm256_set1_ps(x), sum = _mm256_setzero_ps();
#define START(i) __m256 a##i = _mm256_set1_ps(x * (i + 1));
#define STEP(i)  a##i = _mm256_fmadd_ps(a##i, m, m);
#define END(i)   sum = _mm256_add_ps(sum, a##i);
    CHAINS_12(START)
    for (; n > 0; n--) { CHAINS_12(STEP) }
    CHAINS_12(END)
#undef START
#undef STEP
#undef END
    return (double)_mm256_cvtss_f32(sum);
}
__attribute__((target("avx512f"))) static inline double ops_f32_avx512(int64_t n, float x)
{
    __m512 m = _mm512_set1_ps(x), sum = _mm512_setzero_ps();
#define START(i) __m512 a##i = _mm512_set1_ps(x * (i + 1));
#define STEP(i)  a##i = _mm512_fmadd_ps(a##i, m, m);
#define END(i)   sum = _mm512_add_ps(sum, a##i);
    CHAINS_16(START)
    for (; n > 0; n--) { CHAINS_16(STEP) }
    CHAINS_16(END)
#undef START
#undef STEP
#undef END
    return (double)_mm_cvtss_f32(_mm512_castps512_ps128(sum));
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) static inline double ops_bf16_avx512(int64_t n, float x)
{
    __m512bh m = _mm512_cvtne2ps_pbh(_mm512_set1_ps(x), _mm512_set1_ps(-x));
    __m512 sum = _mm512_setzero_ps();
#define START(i) __m512 a##i = _mm512_set1_ps(x * (i + 1));
#define STEP(i)  a##i = _mm512_dpbf16_ps(a##i, m, m);
#define END(i)   sum = _mm512_add_ps(sum, a##i);
    CHAINS_16(START)
    for (; n > 0; n--) { CHAINS_16(STEP) }
    CHAINS_16(END)
#undef START
#undef STEP
#undef END
    return (double)_mm_cvtss_f32(_mm512_castps512_ps128(sum));
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) static inline double ops_int8_avx512(int64_t n, float x)
{
    __m512i m = _mm512_set1_epi32((int32_t)(x * 1e6f)), sum = _mm512_setzero_si512();
#define START(i) __m512i a##i = _mm512_set1_epi32(i);
#define STEP(i)  a##i = _mm512_dpbusd_epi32(a##i, m, m);
#define END(i)   sum = _mm512_add_epi32(sum, a##i);
    CHAINS_16(START)
    for (; n > 0; n--) { CHAINS_16(STEP) }
    CHAINS_16(END)
#undef START
#undef STEP
#undef END
    return (double)_mm_cvtsi128_si32(_mm512_castsi512_si128(sum));
}
#elif defined(__aarch64__)
static inline double ops_f32_neon(int64_t n, float x)
{
    float32x4_t m = vdupq_n_f32(x), sum = vdupq_n_f32(0);
#define START(i) float32x4_t a##i = vdupq_n_f32(x * (i + 1));
#define STEP(i)  a##i = vfmaq_f32(m, a##i, m);
#define END(i)   sum = vaddq_f32(sum, a##i);
    CHAINS_16(START)
    for (; n > 0; n--) { CHAINS_16(STEP) }
    CHAINS_16(END)
#undef START
#undef STEP
#undef END
    return (double)vaddvq_f32(sum);
}
/* clang 14 has these intrinsics only where the whole file may use them. */
#  if defined(__linux__) && ((defined(__GNUC__) && !defined(__clang__)) || defined(__ARM_FEATURE_DOTPROD))
#    define BENCH_NEON_DOT 1
__attribute__((target("arch=armv8.2-a+dotprod"))) static inline double ops_int8_neon(int64_t n, float x)
{
    int8x16_t m = vdupq_n_s8((int8_t)(x * 100));
    int32x4_t sum = vdupq_n_s32(0);
#define START(i) int32x4_t a##i = vdupq_n_s32(i);
#define STEP(i)  a##i = vdotq_s32(a##i, m, m);
#define END(i)   sum = vaddq_s32(sum, a##i);
    CHAINS_16(START)
    for (; n > 0; n--) { CHAINS_16(STEP) }
    CHAINS_16(END)
#undef START
#undef STEP
#undef END
    return (double)vaddvq_s32(sum);
}
#  endif
#  if defined(__linux__) && ((defined(__GNUC__) && !defined(__clang__)) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#    define BENCH_NEON_BF16 1
__attribute__((target("arch=armv8.2-a+bf16"))) static inline double ops_bf16_neon(int64_t n, float x)
{
    bfloat16x8_t m = vreinterpretq_bf16_u16(vdupq_n_u16((uint16_t)(0x3F00 + (int)(8 * x))));
    float32x4_t sum = vdupq_n_f32(0);
#define START(i) float32x4_t a##i = vdupq_n_f32(x * (i + 1));
#define STEP(i)  a##i = vbfdotq_f32(a##i, m, m);
#define END(i)   sum = vaddq_f32(sum, a##i);
    CHAINS_16(START)
    for (; n > 0; n--) { CHAINS_16(STEP) }
    CHAINS_16(END)
#undef START
#undef STEP
#undef END
    return (double)vaddvq_f32(sum);
}
#  endif
#endif

/* ops: of one round of the loop; n: rounds that take some 4 ms, so that waking the threads does not count */
typedef struct arithmetic { double (*run)(int64_t n, float x); double ops; int64_t n; } arithmetic;

/* What the ISA's unit is measured with; run is NULL where the CPU, the ISA or this build has none. A multiply-add is two ops. */
static inline arithmetic arithmetic_of(unit u, dsa_isa isa)
{
    arithmetic a = { NULL, 0, 3 << 20 };
    if (isa == DSA_ISA_SCALAR && u == UNIT_F32) { a.run = ops_f32_scalar; a.ops = 12 * 4 * 2; }
#if defined(__x86_64__)
    if (isa == DSA_ISA_AVX2 && u == UNIT_F32 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        a.run = ops_f32_avx2;
        a.ops = 12 * 8 * 2;
    }
    if (isa == DSA_ISA_AVX512 && __builtin_cpu_supports("avx512f")) {
        a.n = 1 << 20;
        if (u == UNIT_F32) { a.run = ops_f32_avx512; a.ops = 16 * 16 * 2; }
        if (u == UNIT_BF16 && __builtin_cpu_supports("avx512bf16")) { a.run = ops_bf16_avx512; a.ops = 16 * 32 * 2; }
        if (u == UNIT_INT8 && __builtin_cpu_supports("avx512vnni")) { a.run = ops_int8_avx512; a.ops = 16 * 64 * 2; }
    }
#elif defined(__aarch64__)
    if (isa == DSA_ISA_NEON && u == UNIT_F32) { a.run = ops_f32_neon; a.ops = 16 * 4 * 2; }
#  if defined(BENCH_NEON_DOT)
    if (isa == DSA_ISA_NEON && u == UNIT_INT8 && (getauxval(AT_HWCAP) >> 20 & 1)) { a.run = ops_int8_neon; a.ops = 16 * 16 * 2; }
#  endif
#  if defined(BENCH_NEON_BF16)
    if (isa == DSA_ISA_NEON && u == UNIT_BF16 && (getauxval(AT_HWCAP2) >> 14 & 1)) { a.run = ops_bf16_neon; a.ops = 16 * 8 * 2; }
#  endif
#endif
    return a;
}

static inline dsa_isa widest_isa(void)
{
    static const dsa_isa down[] = { DSA_ISA_AVX512, DSA_ISA_AVX2, DSA_ISA_NEON };
    for (size_t i = 0; i < sizeof down / sizeof *down; i++)
        if (arithmetic_of(UNIT_F32, down[i]).run) return down[i];
    return DSA_ISA_SCALAR;
}

/* The unit that multiplies this format under this ISA at best: what a floor is computed from. */
static inline unit unit_of(dsa_type format, dsa_isa isa)
{
    unit u = format == DSA_INT8 ? UNIT_INT8 : format == DSA_BF16 || format == DSA_FP8 ? UNIT_BF16 : UNIT_F32;
    return arithmetic_of(u, isa).run ? u : UNIT_F32;
}

/* ---- peaks: memory, and measuring ---------------------------------------------------------------------------------------------- */
enum { PEAK_MEMORY = 256 << 20,     /* bytes, far beyond any cache it may find in L3 */
       PEAK_BURST = 64 << 20,       /* bytes per thread and burst */
       GATHER_ROW = 1152,           /* a bf16 latent row of V3.2 */
       GATHER_ROWS = 32768,         /* per thread and burst */
       BURSTS = 8 };

typedef struct machine {
    dsa_pool *pool;
    int32_t threads;                /* of the pool; 1: none */
    unsigned char *stream, *table;  /* PEAK_MEMORY each; stream has huge pages, table those that the caches have */
    uint64_t turn;
    double cpu, wall;               /* seconds that peak_measure got and wanted, of all threads: fewer mean that others use the machine */
    volatile double sink[256];      /* per thread, so that nothing measured is dead code */
} machine;

static inline void machine_open(machine *m, int huge)
{
    memset(m, 0, sizeof *m);
    m->threads = 1;
    m->stream = (unsigned char *)map_bytes(PEAK_MEMORY, 1);
    m->table = (unsigned char *)map_bytes(PEAK_MEMORY, huge);
    if (!m->stream || !m->table) die(2, "out of memory for the peaks", "");
    memset(m->stream, 1, PEAK_MEMORY);
    memset(m->table, 1, PEAK_MEMORY);
}
static inline void machine_threads(machine *m, int32_t threads)
{
    if (threads == m->threads) return;
    dsa_pool_destroy(m->pool);
    m->pool = NULL;
    m->threads = threads;
    if (threads > 1 && dsa_pool_create(NULL, threads, &m->pool) != DSA_OK) die(2, "could not start the threads", "");
}
static inline void machine_close(machine *m)
{
    dsa_pool_destroy(m->pool);
    unmap_bytes(m->stream);
    unmap_bytes(m->table);
}

typedef uint64_t line_vector __attribute__((vector_size(16)));
static inline line_vector add_line(const unsigned char *p, line_vector sum)   /* one cache line, whatever is in it */
{
    const line_vector *v = (const line_vector *)(const void *)p;
    return sum + ((v[0] + v[1]) + (v[2] + v[3]));
}

/* Two streams without prefetch: what was quickest of 1 to 8 streams and of prefetching 512 to 8192 bytes ahead (Zen 4: 33 GB/s). */
static inline line_vector read_stream(const unsigned char *p, line_vector sum)
{
    for (size_t i = 0; i < PEAK_BURST / 2; i += 64) {
        sum = add_line(p + i, sum);
        sum = add_line(p + PEAK_BURST / 2 + i, sum);
    }
    return sum;
}

/* Each row is prefetched 4 rows ahead, into L2: 11.6 GB/s on Zen 4 with 4 KB pages and 12.8 with huge ones. A prefetch into L1 must wait
   for one of its few miss buffers (8 GB/s), and one row ahead is too late (8 GB/s). */
static inline line_vector gather_rows(const unsigned char *table, uint64_t seed, line_vector sum)
{
    enum { AHEAD = 4, N_ROWS = PEAK_MEMORY / GATHER_ROW };
    const unsigned char *next[AHEAD];
    rng r = { seed };
    for (int i = 0; i < AHEAD; i++) next[i] = table + random_below(&r, N_ROWS) * GATHER_ROW;
    for (int i = 0; i < GATHER_ROWS; i++) {
        const unsigned char *row = next[i % AHEAD], *ahead = next[i % AHEAD] = table + random_below(&r, N_ROWS) * GATHER_ROW;
        for (int l = 0; l < GATHER_ROW; l += 64) __builtin_prefetch(ahead + l, 0, 2);
        for (int l = 0; l < GATHER_ROW; l += 64) sum = add_line(row + l, sum);
    }
    return sum;
}

typedef struct burst { machine *m; unit u; arithmetic a; } burst;

static inline void burst_task(void *arg, int32_t task)
{
    const burst *b = (const burst *)arg;
    machine *m = b->m;
    line_vector sum = { 0, 0 };
    if (b->a.run) {
        m->sink[task & 255] = b->a.run(b->a.n, 0.5f + 1e-3f * (float)task);
        return;
    }
    if (b->u == UNIT_READ) {
        uint64_t part = (m->turn * (uint64_t)m->threads + (uint64_t)task) % (PEAK_MEMORY / PEAK_BURST);
        sum = read_stream(m->stream + part * PEAK_BURST, sum);
    } else {
        sum = gather_rows(m->table, m->turn * 1009 + (uint64_t)task, sum);
    }
    m->sink[task & 255] = (double)sum[0] + (double)sum[1];
}

/* The best of some bursts of a few milliseconds, in ops or bytes per second, on the machine's threads; 0 if there is no such unit.
   The best and not the median: what disturbs a burst makes it slower, never faster, and a floor is what the machine could do.
   (Cases are medians: they stand for a typical call.) work, optional: ops or bytes of one burst. */
static inline double peak_measure(machine *m, unit u, dsa_isa isa, double *work)
{
    burst b = { m, u, arithmetic_of(u, isa) };
    double amount = u == UNIT_READ ? PEAK_BURST : u == UNIT_GATHER ? (double)GATHER_ROWS * GATHER_ROW : b.a.ops * (double)b.a.n, best = 0;
    double wanted = fmin(m->threads, (double)sysconf(_SC_NPROCESSORS_ONLN));
    if (u < UNIT_READ && !b.a.run) return 0;
    amount *= m->threads;
    m->cpu -= cpu_seconds();
    m->wall -= now() * wanted;
    for (int i = 0; i < BURSTS; i++) {
        double start = now();
        m->turn++;
        if (m->pool) dsa_pool_run(m->pool, m->threads, burst_task, &b);
        else burst_task(&b, 0);
        best = fmax(best, amount / (now() - start));
    }
    m->cpu += cpu_seconds();
    m->wall += now() * wanted;
    if (work) *work = amount;
    return best;
}

/* ---- what this machine is ------------------------------------------------------------------------------------------------------ */
#ifndef DSA_BUILD
#  define DSA_BUILD "unknown flags"
#endif
#if defined(__clang__)
#  define BENCH_COMPILER "clang " __clang_version__
#else
#  define BENCH_COMPILER "gcc " __VERSION__
#endif

static inline long huge_megabytes(void)   /* of this process, as Linux tells; -1 elsewhere */
{
    char line[256];
    long kilobytes = -1024;
    FILE *f = fopen("/proc/self/smaps_rollup", "r");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "AnonHugePages:", 14) == 0) kilobytes = atol(line + 14);
    if (f) fclose(f);
    return kilobytes / 1024;
}

static inline void cpu_name(char *text, size_t size)   /* "AMD EPYC, family 25, model 17" */
{
    char line[256], name[128] = "unknown CPU";
    int family = 0, model = 0;
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f)) {
        char *value = strchr(line, ':');
        if (!value && family) break;                         /* the first processor only */
        if (!value || value[1] == 0) continue;
        if (strncmp(line, "model name", 10) == 0) snprintf(name, sizeof name, "%.*s", (int)strcspn(value + 2, "\n"), value + 2);
        else if (strncmp(line, "cpu family", 10) == 0) family = atoi(value + 2);
        else if (strncmp(line, "model", 5) == 0) model = atoi(value + 2);
    }
    if (f) fclose(f);
    if (family) snprintf(text, size, "%s, family %d, model %d", name, family, model);
    else snprintf(text, size, "%s", name);
}

static inline void print_machine(FILE *f, const char *program)
{
    char name[192], date[32] = "";
    time_t t = time(NULL);
    dsa_isa isa = widest_isa();
    cpu_name(name, sizeof name);
    strftime(date, sizeof date, "%Y-%m-%d %H:%M UTC", gmtime(&t));
    fprintf(f, "%s, dsa.h %s, %s\n", program, DSA_VERSION_STRING, date);
    fprintf(f, "CPU       %s; %ld online; %s%s%s\n", name, sysconf(_SC_NPROCESSORS_ONLN), dsa_isa_name(isa),
            arithmetic_of(UNIT_BF16, isa).run ? ", bf16 unit" : "", arithmetic_of(UNIT_INT8, isa).run ? ", int8 unit" : "");
    fprintf(f, "compiler  %s: %s\n", BENCH_COMPILER, DSA_BUILD);
    if (huge_megabytes() == 0) fprintf(f, "note      this system grants no huge pages (/sys/kernel/mm/transparent_hugepage/enabled)\n");
}

#endif /* BENCH_H_INCLUDED */

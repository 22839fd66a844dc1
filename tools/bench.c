/* bench - how long the calls of dsa.h take, beside what this machine could do at most - public domain or MIT, like dsa.h

   Build and run: make bench        (by hand: cc -O3 -o build/bench tools/bench.c -lm -pthread, then build/bench --help)

   Only the public calls of dsa.h are used. Each case is first checked against formulas written down here a second time, in double
   precision, on some of its outputs; then it is timed with rows that no cache holds any more, and with the machine's peaks measured
   before, between and after its samples, because the clock drifts. A floor is what the peaks allow:
       max(flops / peak of the unit that multiplies this format under this ISA, bytes / peak of reading in order) */
#define _DEFAULT_SOURCE
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include "bench.h"

static const char help[] =
    "usage: bench [options]\n"
    "\n"
    "Times dsa.h at DeepSeek-V3.2's shapes beside the floor that this machine's own peaks set. Lists are separated by commas; K and M\n"
    "stand for 1024 and 1048576.\n"
    "\n"
    "  --case LIST      score_select, topk, sparse_attention, dense_attention, dsa_step (index keys in the given format, bf16 latents,\n"
    "                   no projections), layer (weights and caches in the given format; queries 1: decode, more: a prefill chunk),\n"
    "                   peak_f32, peak_bf16, peak_int8, peak_read, peak_gather. Default: all. The peaks are always measured first.\n"
    "  --format LIST    f32, bf16, fp8, int8 (index keys only). Default: each case's own\n"
    "  --context LIST   rows in the cache. Default: each case's own\n"
    "  --queries LIST   queries in one call. Default: each case's own\n"
    "  --input LIST     scores of topk: random, ascending, descending, equal, outlier. Default: all five\n"
    "  --threads LIST   default: 1 and the number of processors; topk: 1\n"
    "  --isa NAME       auto (default), scalar, avx2, avx512, neon\n"
    "  --huge           caches in huge pages (their allocator asks for them with madvise)\n"
    "  --page N         rows per page of the caches. Default: one page\n"
    "  --seconds N      time to aim at; default 50 for one case, 110 for more. A case is run at least once whatever it takes\n"
    "  --json           one object a line on stdout; the rest goes to stderr\n"
    "  --sweep FILE     instead: one layer's decode and a prefill chunk (--queries, default 32) over contexts from 1K to 1M, sparse and\n"
    "                   dense, as CSV (tools/plot.py draws it). Dense is cut off where a call would take longer than --seconds (20)\n"
    "  --help\n"
    "\n"
    "ms is the median of a call's times; ratio is ms to floor. Exit status: 0 success, 1 a check failed, 2 bad usage or bad input.\n";

enum { H = 128, R = 512, ROPE = 64, WIDTH = R + ROPE, HI = 64, D = 128, TOP_K = 2048,
       HIDDEN = 7168, Q_LORA = 1536, NOPE = 128, V = 128,
       COLD = 96 << 20,            /* bytes between two uses of a row: three times the largest L3 that one core sees here */
       MAX_LIST = 16, MAX_SAMPLES = 4096, ROUNDS = 3 };

static const char *const format_names[] = { "f32", "bf16", "f16", "fp8", "int8" };   /* by dsa_type */

typedef struct numbers { int64_t x[MAX_LIST]; int32_t n; } numbers;

typedef struct params { dsa_type format; const char *input; int64_t context, queries; } params;

/* Copies of one cache, as many as it takes for a turn to find its rows cold. */
typedef struct rows { dsa_cache *copy; int32_t n; dsa_type format; int64_t len; } rows;

typedef struct bench {
    const char *cases, *formats, *inputs, *sweep;
    numbers contexts, queries, threads;
    dsa_isa isa;
    int json, huge, counting;
    int32_t page;
    double seconds, deadline;
    int64_t lines;                  /* still to be measured */
    machine m;
    dsa_ctx ctx;                    /* for the present number of threads */
    char detail[256];
    void *work;                     /* the workspace of calls */
    size_t work_bytes;
    rows kept[2];                   /* by dsa_kind: the last that were made */
} bench;

static void must(const bench *b, dsa_status status, const char *call)
{
    char text[512];
    if (status == DSA_OK) return;
    snprintf(text, sizeof text, ": %s (%s)", dsa_status_text(status), b->detail);
    die(status == DSA_ERR_MEMORY || status == DSA_ERR_UNSUPPORTED ? 2 : 1, call, text);
}

static void set_threads(bench *b, int64_t threads)
{
    dsa_config c;
    machine_threads(&b->m, (int32_t)threads);
    dsa_config_preset(DSA_DEEPSEEK_V32, &c);
    c.isa = b->isa;
    c.n_threads = (int32_t)threads;
    if (threads > 1) c.parallel_for = dsa_pool_run;
    c.parallel_user = b->m.pool;
    c.allocator.alloc = bench_alloc;
    c.allocator.release = bench_release;
    c.allocator.user = &b->huge;
    c.detail = b->detail;
    c.detail_size = sizeof b->detail;
    must(b, dsa_init(&b->ctx, &c), "dsa_init");
}

static void *workspace(bench *b, size_t bytes)
{
    if (bytes <= b->work_bytes) return b->work;
    free(b->work);
    b->work_bytes = bytes;
    return b->work = take(bytes, 1);
}

/* ---- one line of the report ------------------------------------------------------------------------------------------------------ */
typedef struct line {
    const char *name, *format, *input;
    int64_t queries, context;
    double flops[UNIT_READ];        /* by the unit that multiplies */
    double bytes;
    char note[64];
} line;

static void print_heading(const bench *b)
{
    if (!b->json)
        printf("\n%-16s %-6s %-10s %8s %7s %7s %-7s %10s %10s %7s %9s %7s\n", "case", "format", "input", "context", "queries", "threads", "isa", "ms",
               "floor ms", "ratio", "GFLOP/s", "GB/s");
}

static void print_line(const bench *b, const line *l, dsa_isa isa, double ms, double floor_ms)
{
    double flops = l->flops[UNIT_F32] + l->flops[UNIT_BF16] + l->flops[UNIT_INT8];
    if (b->json)
        printf("{\"case\":\"%s\",\"format\":\"%s\",\"input\":\"%s\",\"isa\":\"%s\",\"threads\":%d,\"queries\":%lld,\"context\":%lld,"
               "\"ms\":%.6g,\"floor_ms\":%.6g,\"ratio\":%.4f,\"bytes\":%.0f,\"flops\":%.0f}\n", l->name, l->format, l->input, dsa_isa_name(isa),
               (int)b->m.threads, (long long)l->queries, (long long)l->context, ms, floor_ms, ms / floor_ms, l->bytes, flops);
    else
        printf("%-16s %-6s %-10s %8lld %7lld %7d %-7s %10.4f %10.4f %7.3f %9.1f %7.2f  %s\n", l->name, l->format, l->input, (long long)l->context,
               (long long)l->queries, (int)b->m.threads, dsa_isa_name(isa), ms, floor_ms, ms / floor_ms, 1e-6 * flops / ms, 1e-6 * l->bytes / ms, l->note);
    fflush(stdout);
}

/* The peaks of the present number of threads, also of a wider ISA than the one in use. Keeps the better of two looks. */
static void measure_peaks(bench *b, const char *only)
{
    const dsa_isa isas[2] = { dsa_query_isa(&b->ctx), widest_isa() };
    for (int u = 0; u < N_UNITS; u++)
        for (int i = 0; i < (u < UNIT_READ && isas[0] != isas[1] ? 2 : 1); i++) {
            double work = 0, ms = 0, best_ms = 0;
            line l = { unit_names[u], u < UNIT_READ ? unit_names[u] + 5 : "", "", 0, 0, { 0, 0, 0 }, 0, "" };
            if (only && strstr(only, "peak_") && !strstr(only, unit_names[u])) continue;
            for (int again = 0; again < 2; again++)
                if (peak_measure(&b->m, (unit)u, isas[i], &work, &ms) > 0 && (best_ms == 0 || ms < best_ms)) best_ms = ms;
            if (best_ms == 0) continue;
            if (u < UNIT_READ) l.flops[u] = work; else l.bytes = work;
            print_line(b, &l, u < UNIT_READ ? isas[i] : isas[0], best_ms, best_ms);
        }
}

/* Samples a call between looks at the peaks it is compared with, and prints the line. turn 0 was the checked call and took `first` seconds:
   where the time is spent already, that is all there is. */
static void measure(bench *b, const line *l, void (*run)(bench *b, void *state, int64_t turn), void *state, double first)
{
    static double samples[MAX_SAMPLES];
    dsa_isa isa = dsa_query_isa(&b->ctx);
    double share = (b->deadline - now()) / (double)(b->lines > 0 ? b->lines : 1) - 0.4, peak[N_UNITS] = { 0 }, floor_s = 0;
    int64_t n = 0, turn = 1;
    int rounds = first < share ? ROUNDS : 0;
    if (share > 2) share = 2;
    for (int round = 0; round <= rounds; round++) {
        for (int u = 0; u <= UNIT_READ; u++)
            if (u == UNIT_READ || l->flops[u] > 0) {
                double rate = peak_measure(&b->m, (unit)u, isa, NULL, NULL);
                if (rate > peak[u]) peak[u] = rate;
            }
        if (round == rounds) break;
        for (double begin = now(); n < MAX_SAMPLES * (round + 1) / ROUNDS; turn++) {
            double start = now(), end;
            run(b, state, turn);
            end = now();
            samples[n++] = end - start;
            if (end - begin > share / ROUNDS) break;
        }
    }
    for (int u = 0; u < UNIT_READ; u++) if (l->flops[u] > 0) floor_s += l->flops[u] / peak[u];
    floor_s = fmax(floor_s, l->bytes / peak[UNIT_READ]);
    print_line(b, l, isa, 1e3 * (n > 0 ? median(samples, n) : first), 1e3 * floor_s);
    b->lines--;
}

/* ---- data ------------------------------------------------------------------------------------------------------------------------ */
static void rows_free(rows *r)
{
    for (int32_t i = 0; i < r->n; i++) dsa_cache_destroy(&r->copy[i]);
    free(r->copy);
    memset(r, 0, sizeof *r);
}

/* Appends Gaussian rows until the cache has len. The same keys whatever their format. */
static void grow(const bench *b, dsa_cache *c, int64_t len)
{
    enum { BLOCK = 256 };
    int64_t width = c->dim + c->dim_rope;
    float *x = (float *)take(BLOCK * (size_t)width, sizeof *x);
    while (c->len < len) {
        int64_t n = len - c->len < BLOCK ? len - c->len : BLOCK;
        dsa_seq seq = { c, c, 0, (int32_t)n };
        dsa_append_args args;
        rng r = { (uint64_t)c->len + 77 };
        memset(&args, 0, sizeof args);
        args.n_seqs = 1;
        args.seqs = &seq;
        if (c->kind == DSA_LATENT) { seq.index = NULL; args.latent = x; }
        else { seq.latent = NULL; args.index_key = x; }
        random_normals(&r, x, n * width, 1.0f);
        must(b, dsa_append(&b->ctx, &args), "dsa_append");
    }
    free(x);
}

static void make_cache(const bench *b, dsa_kind kind, dsa_type format, int64_t capacity, int64_t len, dsa_cache *c)
{
    dsa_cache_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.kind = kind;
    desc.format = format;
    desc.capacity = capacity;
    desc.page_size = b->page;
    must(b, dsa_cache_create(&b->ctx, &desc, c), "dsa_cache_create");
    grow(b, c, len);
}

static const rows *cold_rows(bench *b, dsa_kind kind, dsa_type format, int64_t len)
{
    rows *r = &b->kept[kind];
    size_t bytes;
    if (r->n > 0 && r->format == format && r->len == len) return r;
    rows_free(r);
    must(b, dsa_row_bytes(kind, format, kind == DSA_LATENT ? R : D, kind == DSA_LATENT ? ROPE : 0, &bytes), "dsa_row_bytes");
    r->n = 1 + (int32_t)((COLD - 1) / ((size_t)len * bytes));
    r->copy = (dsa_cache *)take((size_t)r->n, sizeof *r->copy);
    r->format = format;
    r->len = len;
    make_cache(b, kind, format, len, len, &r->copy[0]);
    for (int32_t i = 1; i < r->n; i++) {
        dsa_cache *c = &r->copy[i];
        make_cache(b, kind, format, len, 0, c);
        memcpy(c->data, r->copy[0].data, (size_t)c->n_pages * c->page_stride);
        c->len = len;
        must(b, dsa_cache_check(&b->ctx, c), "dsa_cache_check");
    }
    return r;
}

/* Index queries and weights, attention queries. These are rounded to bf16, as a model hands them over, and small enough for a softmax over
   many rows instead of one. */
static float *index_queries(int64_t n, float **w)
{
    float *q = (float *)take((size_t)n * HI * D, sizeof *q);
    rng r = { 5 };
    *w = (float *)take((size_t)n * HI, sizeof **w);
    random_normals(&r, q, n * HI * D, 1.0f);
    random_normals(&r, *w, n * HI, 0.01104854f);             /* (HI D)^-0.5 */
    return q;
}
static float *attention_queries(int64_t n)
{
    float *q = (float *)take((size_t)n * H * WIDTH, sizeof *q);
    rng r = { 6 };
    random_normals(&r, q, n * H * WIDTH, 0.3f);
    for (int64_t i = 0; i < n * H * WIDTH; i++) q[i] = dsa_bf16_to_f32(dsa_f32_to_bf16(q[i]));
    return q;
}

/* ---- the formulas a second time, in double --------------------------------------------------------------------------------------- */
static double dot(const double *a, const float *x, int64_t n)   /* n: a multiple of 8, as all of V3.2's widths */
{
    double s[8] = { 0 };
    for (int64_t i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++) s[j] += a[i + j] * (double)x[i + j];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

/* 1 - 2<a,b> / (|a|^2 + |b|^2), written so that equal vectors give 0 and not its rounding; NaN anywhere gives 2 */
static double distance(const float *a, const double *b, int64_t n)
{
    double difference = 0, size = 1e-300;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)a[i] * (double)a[i] + b[i] * b[i];
    }
    return difference / size <= 2 ? difference / size : 2;
}

/* One query's list against the scores in double of the same rounded values: every row of the list must score at least what a row that was
   left out does, but for what f32 sums may lose (n 2^-24 of the sum of magnitudes) plus `slack` of it. Looks at the whole list and at
   up to 8192 other rows. */
static void check_selection(const bench *b, const char *name, const dsa_cache *keys, const float *q, const float *w, const int32_t *list,
                            int64_t visible, double slack)
{
    enum { OTHERS = 8192 };
    static double rounded[HI * D];
    static float head[D], key[D];
    double least = HUGE_VAL;                                 /* of the list's scores, each with its bound added */
    char text[128];
    int64_t k = visible < TOP_K ? visible : TOP_K, others = visible - k < OTHERS ? visible - k : OTHERS, left = 0;
    rng r = { 9 };
    for (int h = 0; h < HI; h++) {                           /* contracts: both sides are rounded to the key's format */
        double scale = 1;
        uint8_t code[D];
        memcpy(head, q + h * D, sizeof head);
        if (keys->hadamard) dsa_hadamard_rows(head, 1, D, D);
        if (keys->format == DSA_FP8) scale = (double)dsa_quantize_e4m3(head, D, code);
        if (keys->format == DSA_INT8) scale = (double)dsa_quantize_int8(head, D, (int8_t *)code);
        for (int d = 0; d < D; d++)
            rounded[h * D + d] = keys->format == DSA_FP8 ? scale * (double)dsa_e4m3_to_f32(code[d]) : keys->format == DSA_INT8 ? scale * (int8_t)code[d]
                               : keys->format == DSA_BF16 ? (double)dsa_bf16_to_f32(dsa_f32_to_bf16(head[d])) : (double)head[d];
    }
    for (int64_t i = 0; i < TOP_K; i++)
        if (i < k ? list[i] < 0 || list[i] >= visible || (i > 0 && list[i] <= list[i - 1]) : list[i] != -1) {
            snprintf(text, sizeof text, ": entry %lld of the list is %ld", (long long)i, (long)list[i]);
            die(1, name, text);
        }
    for (int64_t i = 0; i < k + others; i++) {
        int64_t s = i < k ? list[i] : others < OTHERS ? left++ : random_below(&r, visible), low = 0, high = k;
        double score = 0, size = 0, bound;
        if (i >= k) {                                        /* is it in the list after all? */
            while (low < high) { if (list[(low + high) / 2] < s) low = (low + high) / 2 + 1; else high = (low + high) / 2; }
            if (low < k && list[low] == s) { if (others < OTHERS) i--; continue; }
        }
        must(b, dsa_cache_read(&b->ctx, keys, s, s + 1, key), "dsa_cache_read");
        for (int h = 0; h < HI; h++) {
            double x = dot(rounded + h * D, key, D), norm = 0;
            for (int d = 0; d < D; d++) norm += fabs(rounded[h * D + d] * (double)key[d]);
            score += (double)w[h] * (x > 0 ? x : 0);
            size += fabs((double)w[h]) * norm;
        }
        bound = size * ((D + HI) * 0x1p-24 + slack);
        if (i < k && score + bound < least) least = score + bound;
        if (i >= k && !(score - bound <= least)) {
            snprintf(text, sizeof text, ": row %lld scores %.9g but was left out; the list goes down to %.9g", (long long)s, score, least);
            die(1, name, text);
        }
    }
}

/* Attention of one head over the listed rows (NULL: rows 0 .. n-1) in double. out [R] */
static void attend_f64(const bench *b, const dsa_cache *latents, const double *q, double scale, const int32_t *list, int64_t n, double *out)
{
    static float row[WIDTH];
    double max = -HUGE_VAL, sum = 0;
    memset(out, 0, R * sizeof *out);
    for (int64_t i = 0; i < n; i++) {
        int64_t s = list ? list[i] : i;
        double x, p;
        must(b, dsa_cache_read(&b->ctx, latents, s, s + 1, row), "dsa_cache_read");
        x = scale * dot(q, row, WIDTH);
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

/* What an output may be off by (spec 9): f32 rounding where every product is f32, FlashMLA's decode tolerance where P is rounded to bf16. */
static double allowed(const bench *b, dsa_type format)
{
    return format == DSA_F32 || dsa_query_isa(&b->ctx) == DSA_ISA_SCALAR ? 1e-10 : 5e-6;
}

static void check_attention(const bench *b, const char *name, const dsa_cache *latents, const float *q, const int32_t *list, int64_t n, const float *out)
{
    static const int heads[] = { 0, 61, H - 1 };
    double limit = allowed(b, latents->format), wide[WIDTH], want[R];
    char text[128];
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        const float *got = out + heads[i] * R;
        double far;
        for (int d = 0; d < WIDTH; d++) wide[d] = (double)q[heads[i] * WIDTH + d];
        attend_f64(b, latents, wide, (double)b->ctx.config.softmax_scale, list, n, want);
        far = distance(got, want, R);
        snprintf(text, sizeof text, ": head %d is off by %.3g (1 - similarity; allowed %.3g)", heads[i], far, limit);
        if (!(far <= limit)) die(1, name, text);
        for (int d = 0; d < R; d++) {
            double error = fabs((double)got[d] - want[d]);
            snprintf(text, sizeof text, ": head %d, channel %d is %.9g instead of %.9g", heads[i], d, (double)got[d], want[d]);
            if (!(error < 1e-3 || error < 2.01 / 128 * fabs(want[d]))) die(1, name, text);
        }
    }
}

/* ---- score_select ---------------------------------------------------------------------------------------------------------------- */
typedef struct score_state { const rows *keys; dsa_seq seq; dsa_score_args args; dsa_selection out; } score_state;

static void run_score(bench *b, void *state, int64_t turn)
{
    score_state *s = (score_state *)state;
    s->seq.index = &s->keys->copy[turn % s->keys->n];
    must(b, dsa_score_select(&b->ctx, &s->args, &s->out), "dsa_score_select");
}

static void start_score(bench *b, score_state *s)
{
    s->args.n_seqs = 1;
    s->args.seqs = &s->seq;
    must(b, dsa_score_select_workspace(&b->ctx, &s->args, &s->out, &s->args.workspace_size), "dsa_score_select_workspace");
    s->args.workspace = workspace(b, s->args.workspace_size);
}

/* The share of the list that the unrounded keys would have chosen, too. */
static double recall(bench *b, const score_state *rounded, int64_t context)
{
    int32_t *list = (int32_t *)take(TOP_K, sizeof *list), i = 0, j = 0, both = 0;
    dsa_cache keys;
    rows one = { &keys, 1, DSA_F32, context };
    score_state s = *rounded;
    make_cache(b, DSA_INDEX_KEY, DSA_F32, context, context, &keys);
    s.keys = &one;
    s.seq.index = &keys;
    s.out.indices = list;
    start_score(b, &s);
    run_score(b, &s, 0);
    while (i < TOP_K && j < TOP_K) {
        if (list[i] == rounded->out.indices[j]) { both++; i++; j++; }
        else if (list[i] < rounded->out.indices[j]) i++;
        else j++;
    }
    dsa_cache_destroy(&keys);
    free(list);
    return (double)both / TOP_K;
}

/* (query, row) pairs that n queries at the end of a context see */
static double pairs(const params *p, int64_t limit)
{
    double sum = 0;
    for (int64_t i = 0; i < p->queries; i++) {
        int64_t visible = p->context - p->queries + 1 + i;
        sum += (double)(visible < limit ? visible : limit);
    }
    return sum;
}

static void case_score_select(bench *b, const params *p)
{
    line l = { "score_select", format_names[p->format], p->input, p->queries, p->context, { 0, 0, 0 }, 0, "" };
    score_state s;
    float *w, *q;
    size_t bytes;
    if (p->context <= TOP_K) die(2, "score_select: nothing is scored up to 2048 rows; --context must be larger", "");
    memset(&s, 0, sizeof s);
    s.keys = cold_rows(b, DSA_INDEX_KEY, p->format, p->context);
    s.args.q = q = index_queries(p->queries, &w);
    s.args.w = w;
    s.seq.n_q = (int32_t)p->queries;
    s.seq.index = &s.keys->copy[0];
    s.out.indices = (int32_t *)take((size_t)p->queries * TOP_K, sizeof(int32_t));
    must(b, dsa_row_bytes(DSA_INDEX_KEY, p->format, D, 0, &bytes), "dsa_row_bytes");
    l.bytes = (double)bytes * (double)p->context;
    l.flops[unit_of(p->format, dsa_query_isa(&b->ctx))] = 2.0 * HI * D * pairs(p, p->context);
    for (int32_t t = 0; t < b->threads.n; t++) {
        double start;
        set_threads(b, b->threads.x[t]);
        start_score(b, &s);
        start = now();
        run_score(b, &s, 0);
        start = now() - start;
        for (int64_t i = 0; i < p->queries; i += p->queries > 1 ? p->queries - 1 : 1)
            check_selection(b, l.name, s.seq.index, q + i * HI * D, w + i * HI, s.out.indices + i * TOP_K, p->context - p->queries + 1 + i, 0);
        if (t == 0 && p->queries == 1) snprintf(l.note, sizeof l.note, "recall %.4f", recall(b, &s, p->context));
        start_score(b, &s);
        measure(b, &l, run_score, &s, start);
    }
    free(q);
    free(w);
    free(s.out.indices);
}

/* ---- topk ------------------------------------------------------------------------------------------------------------------------- */
typedef struct topk_state { const float *scores; int64_t n_rows, stride; dsa_select_args args; dsa_selection out; } topk_state;

static void run_topk(bench *b, void *state, int64_t turn)
{
    topk_state *s = (topk_state *)state;
    s->args.scores = s->scores + turn % s->n_rows * s->stride;
    must(b, dsa_select(&b->ctx, &s->args, &s->out), "dsa_select");
}

typedef struct entry { float score; int32_t index; } entry;
static int by_rank(const void *a, const void *b)
{
    const entry *x = (const entry *)a, *y = (const entry *)b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}
static int by_index(const void *a, const void *b)
{
    const entry *x = (const entry *)a, *y = (const entry *)b;
    return x->index < y->index ? -1 : x->index > y->index;
}

static void check_topk(const params *p, const float *scores, const int32_t *list)
{
    entry *e = (entry *)take((size_t)p->context, sizeof *e);
    int64_t k = p->context < TOP_K ? p->context : TOP_K;
    char text[96];
    for (int64_t i = 0; i < p->context; i++) { e[i].score = scores[i]; e[i].index = (int32_t)i; }
    qsort(e, (size_t)p->context, sizeof *e, by_rank);
    qsort(e, (size_t)k, sizeof *e, by_index);
    for (int64_t i = 0; i < k; i++)
        if (list[i] != e[i].index) {
            snprintf(text, sizeof text, ", %s: place %lld holds %ld instead of %ld", p->input, (long long)i, (long)list[i], (long)e[i].index);
            die(1, "topk", text);
        }
    free(e);
}

static void case_topk(bench *b, const params *p)
{
    line l = { "topk", "f32", p->input, p->queries, p->context, { 0, 0, 0 }, 4.0 * (double)p->context * (double)p->queries, "" };
    int64_t most = p->queries + (int64_t)((COLD - 1) / (4 * p->context) + 1);
    float *scores = (float *)take((size_t)(most * p->context), sizeof *scores);
    topk_state s;
    rng r = { 11 };
    memset(&s, 0, sizeof s);
    random_normals(&r, scores, most * p->context, 1.0f);
    for (int64_t row = 0; row < most; row++) {
        float *x = scores + row * p->context;
        if (strcmp(p->input, "outlier") == 0) x[random_below(&r, p->context)] = 1e9f;
        for (int64_t i = 0; i < p->context; i++) {
            if (strcmp(p->input, "ascending") == 0) x[i] = (float)i * 1e-3f - 7.0f;
            if (strcmp(p->input, "descending") == 0) x[i] = 7.0f - (float)i * 1e-3f;
            if (strcmp(p->input, "equal") == 0) x[i] = 0.5f;
        }
    }
    s.scores = scores;
    s.n_rows = most - p->queries + 1;
    s.stride = p->context;
    s.args.n_rows = p->queries;
    s.args.n_cols = s.args.stride = p->context;
    s.out.indices = (int32_t *)take((size_t)p->queries * TOP_K, sizeof(int32_t));
    for (int32_t t = 0; t < b->threads.n; t++) {
        double start;
        set_threads(b, b->threads.x[t]);
        must(b, dsa_select_workspace(&b->ctx, &s.args, &s.out, &s.args.workspace_size), "dsa_select_workspace");
        s.args.workspace = workspace(b, s.args.workspace_size);
        run_topk(b, &s, 1);
        check_topk(p, s.args.scores, s.out.indices);
        start = now();
        run_topk(b, &s, 0);
        start = now() - start;
        check_topk(p, s.args.scores + (p->queries - 1) * p->context, s.out.indices + (p->queries - 1) * TOP_K);
        measure(b, &l, run_topk, &s, start);
    }
    free(scores);
    free(s.out.indices);
}

/* ---- sparse_attention and dense_attention ----------------------------------------------------------------------------------------- */
typedef struct attend_state {
    const rows *latents;
    const int32_t *lists;           /* [n_lists, k], each row of a copy in one list at most; NULL: dense */
    int64_t n_lists, k;
    dsa_seq seq;
    dsa_attend_args args;
    dsa_attend_state sum;
    int32_t *indices;               /* [queries, k] */
} attend_state;

static void run_attend(bench *b, void *state, int64_t turn)
{
    attend_state *s = (attend_state *)state;
    int64_t first = turn * s->seq.n_q;
    s->seq.latent = &s->latents->copy[s->lists ? first / s->n_lists % s->latents->n : turn % s->latents->n];
    if (s->lists)                                            /* lists one after the other, around the end; copied as a selection writes them */
        for (int64_t i = 0; i < s->seq.n_q; i++) memcpy(s->indices + i * s->k, s->lists + (first + i) % s->n_lists * s->k, (size_t)s->k * sizeof *s->lists);
    must(b, dsa_attend_begin(&b->ctx, &s->sum), "dsa_attend_begin");
    must(b, dsa_attend_add(&b->ctx, &s->args, &s->sum), "dsa_attend_add");
    must(b, dsa_attend_finish(&b->ctx, &s->sum, NULL, s->sum.out, NULL, NULL), "dsa_attend_finish");
}

static void attention(bench *b, const params *p, const char *name, int dense)
{
    line l = { name, format_names[p->format], p->input, p->queries, p->context, { 0, 0, 0 }, 0, "" };
    int64_t k = p->context < TOP_K ? p->context : TOP_K, n_lists = p->context / k;
    int32_t *order = NULL;
    float *q;
    attend_state s;
    size_t bytes;
    memset(&s, 0, sizeof s);
    s.latents = cold_rows(b, DSA_LATENT, p->format, p->context);
    s.args.q = q = attention_queries(p->queries);
    s.args.n_seqs = 1;
    s.args.seqs = &s.seq;
    s.args.what = dense ? DSA_ATTEND_VISIBLE : DSA_ATTEND_LIST;
    s.seq.n_q = (int32_t)p->queries;
    s.seq.latent = &s.latents->copy[0];
    if (!dense) {
        rng r = { 13 };
        order = (int32_t *)take((size_t)p->context, sizeof *order);
        random_order(&r, order, p->context);
        for (int64_t i = 0; i < n_lists; i++) {
            entry *e = (entry *)take((size_t)k, sizeof *e);
            for (int64_t j = 0; j < k; j++) e[j].index = order[i * k + j];
            qsort(e, (size_t)k, sizeof *e, by_index);
            for (int64_t j = 0; j < k; j++) order[i * k + j] = e[j].index;
            free(e);
        }
        s.lists = order;
        s.n_lists = n_lists;
        s.k = k;
        s.args.indices = s.indices = (int32_t *)take((size_t)(p->queries * k), sizeof *s.indices);
        s.args.n_indices = k;
    }
    s.sum.n_rows = p->queries;
    s.sum.max = (float *)take((size_t)p->queries * H, sizeof(float));
    s.sum.sum = (float *)take((size_t)p->queries * H, sizeof(float));
    s.sum.out = (float *)take((size_t)p->queries * H * R, sizeof(float));
    must(b, dsa_row_bytes(DSA_LATENT, p->format, R, ROPE, &bytes), "dsa_row_bytes");
    l.bytes = (double)bytes * (double)(dense ? p->context : p->queries < n_lists ? p->queries * k : n_lists * k);
    l.flops[unit_of(p->format, dsa_query_isa(&b->ctx))] = 2.0 * H * (WIDTH + R) * (dense ? pairs(p, p->context) : (double)(p->queries * k));
    for (int32_t t = 0; t < b->threads.n; t++) {
        double start;
        set_threads(b, b->threads.x[t]);
        must(b, dsa_attend_workspace(&b->ctx, &s.args, &s.sum, &s.args.workspace_size), "dsa_attend_workspace");
        s.args.workspace = workspace(b, s.args.workspace_size);
        start = now();
        run_attend(b, &s, 0);
        start = now() - start;
        for (int64_t i = 0; i < p->queries; i += p->queries > 1 ? p->queries - 1 : 1)
            check_attention(b, name, s.seq.latent, q + i * H * WIDTH, dense ? NULL : s.indices + i * k,
                            dense ? p->context - p->queries + 1 + i : k, s.sum.out + i * H * R);
        measure(b, &l, run_attend, &s, start);
    }
    free(q);
    free(order);
    free(s.indices);
    free(s.sum.max);
    free(s.sum.sum);
    free(s.sum.out);
}
static void case_sparse_attention(bench *b, const params *p) { attention(b, p, "sparse_attention", 0); }
static void case_dense_attention(bench *b, const params *p) { attention(b, p, "dense_attention", 1); }

/* ---- dsa_step ----------------------------------------------------------------------------------------------------------------------- */
typedef struct step_state { const rows *keys, *latents; dsa_seq seq; dsa_step_args args; } step_state;

static void run_step(bench *b, void *state, int64_t turn)
{
    step_state *s = (step_state *)state;
    s->seq.index = &s->keys->copy[turn % s->keys->n];
    s->seq.latent = &s->latents->copy[turn % s->latents->n];
    must(b, dsa_step(&b->ctx, &s->args), "dsa_step");
}

static void case_dsa_step(bench *b, const params *p)
{
    line l = { "dsa_step", format_names[p->format], p->input, p->queries, p->context, { 0, 0, 0 }, 0, "" };
    dsa_type latent = p->format == DSA_F32 ? DSA_F32 : DSA_BF16;
    dsa_isa isa = dsa_query_isa(&b->ctx);
    float *w, *q, *iq;
    step_state s;
    size_t key, row;
    memset(&s, 0, sizeof s);
    s.keys = cold_rows(b, DSA_INDEX_KEY, p->format, p->context);
    s.latents = cold_rows(b, DSA_LATENT, latent, p->context);
    s.args.n_seqs = 1;
    s.args.seqs = &s.seq;
    s.args.q = q = attention_queries(p->queries);
    s.args.index_q = iq = index_queries(p->queries, &w);
    s.args.index_w = w;
    s.args.out = (float *)take((size_t)p->queries * H * R, sizeof(float));
    s.args.indices = (int32_t *)take((size_t)p->queries * TOP_K, sizeof(int32_t));
    s.seq.n_q = (int32_t)p->queries;
    s.seq.index = &s.keys->copy[0];
    s.seq.latent = &s.latents->copy[0];
    must(b, dsa_row_bytes(DSA_INDEX_KEY, p->format, D, 0, &key), "dsa_row_bytes");
    must(b, dsa_row_bytes(DSA_LATENT, latent, R, ROPE, &row), "dsa_row_bytes");
    l.bytes = (double)row * fmin(pairs(p, TOP_K), (double)p->context);
    if (p->context > TOP_K) {
        l.bytes += (double)key * (double)p->context;
        l.flops[unit_of(p->format, isa)] = 2.0 * HI * D * pairs(p, p->context);
    }
    l.flops[unit_of(latent, isa)] += 2.0 * H * (WIDTH + R) * pairs(p, TOP_K);
    for (int32_t t = 0; t < b->threads.n; t++) {
        double start;
        set_threads(b, b->threads.x[t]);
        must(b, dsa_step_workspace(&b->ctx, &s.args, &s.args.workspace_size), "dsa_step_workspace");
        s.args.workspace = workspace(b, s.args.workspace_size);
        start = now();
        run_step(b, &s, 0);
        start = now() - start;
        for (int64_t i = 0; i < p->queries; i += p->queries > 1 ? p->queries - 1 : 1) {
            int64_t visible = p->context - p->queries + 1 + i;
            const int32_t *list = s.args.indices + i * TOP_K;
            check_selection(b, l.name, s.seq.index, iq + i * HI * D, w + i * HI, list, visible, 0);
            check_attention(b, l.name, s.seq.latent, q + i * H * WIDTH, list, visible < TOP_K ? visible : TOP_K, s.args.out + i * H * R);
        }
        measure(b, &l, run_step, &s, start);
    }
    free(q);
    free(iq);
    free(w);
    free(s.args.out);
    free(s.args.indices);
}

/* ---- layer -------------------------------------------------------------------------------------------------------------------------- */
static const struct { int64_t out, in; } shapes[] = {        /* the weight matrices, in the order of layer_data.w */
    { Q_LORA, HIDDEN }, { H * (NOPE + ROPE), Q_LORA }, { WIDTH, HIDDEN }, { H * (NOPE + V), R }, { HIDDEN, H * V },
    { HI * D, Q_LORA }, { D, HIDDEN }, { HI, HIDDEN } };
enum { W_Q_A, W_Q_B, W_KV_A, W_KV_B, W_O, W_IQ_B, W_IK, W_IW, N_WEIGHTS };

typedef struct layer_data {
    dsa_tensor w[N_WEIGHTS];
    float gain[4][Q_LORA];          /* q_a_norm, kv_a_norm, index_k_norm, index_k_bias */
    dsa_layer_weights weights;
    dsa_cache latent, index;
    double weight_bytes;
} layer_data;

static size_t type_bytes(dsa_type t) { return t == DSA_F32 ? 4 : t == DSA_FP8 ? 1 : 2; }

static dsa_tensor gain_tensor(const float *x)
{
    dsa_tensor t = { x, DSA_F32, NULL };
    return t;
}

/* Random weights of variance 1/in. A million values are drawn and then repeated: their number is odd, so that no two rows are equal. */
static void layer_make(bench *b, dsa_type format, int64_t capacity, int64_t len, layer_data *d)
{
    enum { DRAWN = 1000003 };
    float *drawn = (float *)take(DRAWN, sizeof *drawn);
    rng r = { 17 };
    memset(d, 0, sizeof *d);
    random_normals(&r, drawn, DRAWN, 1.0f);
    for (int i = 0; i < N_WEIGHTS; i++) {
        size_t n = (size_t)(shapes[i].out * shapes[i].in), e = type_bytes(format), blocks;
        float deviation = 1.0f / sqrtf((float)shapes[i].in);
        unsigned char *data = (unsigned char *)map_bytes(n * e, b->huge);
        if (!data) die(2, "out of memory for the layer's weights", "");
        for (size_t j = 0; j < DRAWN && j < n; j++) {
            float x = drawn[j] * deviation;
            if (format == DSA_F32) memcpy(data + 4 * j, &x, 4);
            else if (format == DSA_BF16) { uint16_t y = dsa_f32_to_bf16(x); memcpy(data + 2 * j, &y, 2); }
            else data[j] = dsa_f32_to_e4m3(drawn[j] * 64);
        }
        for (size_t done = DRAWN; done < n; done += DRAWN) memcpy(data + done * e, data, (n - done < DRAWN ? n - done : DRAWN) * e);
        d->w[i].data = data;
        d->w[i].type = format;
        d->weight_bytes += (double)(n * e);
        if (format == DSA_FP8) {
            float *scale;
            blocks = (size_t)((shapes[i].out + 127) / 128 * ((shapes[i].in + 127) / 128));
            d->w[i].scale_inv = scale = (float *)take(blocks, sizeof *scale);
            for (size_t j = 0; j < blocks; j++) scale[j] = deviation / 64 * (0.75f + 0.5f * (float)random_below(&r, 1000) / 1000);
            d->weight_bytes += 4 * (double)blocks;
        }
    }
    for (int i = 0; i < 4; i++) {
        random_normals(&r, d->gain[i], Q_LORA, 0.1f);
        for (int j = 0; j < Q_LORA && i < 3; j++) d->gain[i][j] += 1;
    }
    d->weights.q_a = d->w[W_Q_A];
    d->weights.q_b = d->w[W_Q_B];
    d->weights.kv_a = d->w[W_KV_A];
    d->weights.kv_b = d->w[W_KV_B];
    d->weights.o = d->w[W_O];
    d->weights.index_q_b = d->w[W_IQ_B];
    d->weights.index_k = d->w[W_IK];
    d->weights.index_w = d->w[W_IW];
    d->weights.q_a_norm = gain_tensor(d->gain[0]);
    d->weights.kv_a_norm = gain_tensor(d->gain[1]);
    d->weights.index_k_norm = gain_tensor(d->gain[2]);
    d->weights.index_k_bias = gain_tensor(d->gain[3]);
    make_cache(b, DSA_LATENT, format, capacity, len, &d->latent);
    make_cache(b, DSA_INDEX_KEY, format, capacity, len, &d->index);
    free(drawn);
}

static void layer_free(layer_data *d)
{
    for (int i = 0; i < N_WEIGHTS; i++) {
        unmap_bytes((void *)(uintptr_t)d->w[i].data);
        free((void *)(uintptr_t)d->w[i].scale_inv);
    }
    dsa_cache_destroy(&d->latent);
    dsa_cache_destroy(&d->index);
}

/* y = W[first .. first + n) x */
static void weight_row(const dsa_tensor *w, int64_t in, int64_t o, float *row)
{
    static float e4m3[256];
    const unsigned char *p = (const unsigned char *)w->data + (size_t)(o * in) * type_bytes(w->type);
    if (w->type == DSA_F32) { memcpy(row, p, (size_t)in * 4); return; }
    if (e4m3[0x38] == 0) for (int i = 0; i < 256; i++) e4m3[i] = dsa_e4m3_to_f32((uint8_t)i);
    for (int64_t i = 0; i < in; i++) {
        uint16_t y;
        if (w->type == DSA_FP8) { row[i] = e4m3[p[i]] * w->scale_inv[o / 128 * ((in + 127) / 128) + i / 128]; continue; }
        memcpy(&y, p + 2 * i, 2);
        row[i] = dsa_bf16_to_f32(y);
    }
}
static void project(const layer_data *d, int which, int64_t first, int64_t n, const double *x, double *y)
{
    static float row[H * V];
    for (int64_t o = 0; o < n; o++) {
        weight_row(&d->w[which], shapes[which].in, first + o, row);
        y[o] = dot(x, row, shapes[which].in);
    }
}
static void rms(double *x, int64_t n, const float *gain, double eps)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    for (int64_t i = 0; i < n; i++) x[i] *= (double)gain[i] / sqrt(sum / (double)n + eps);
}
static void rotate(double *x, const dsa_rope *rope, double position)
{
    double f[WIDTH];
    int n = rope->width, half = rope->layout == DSA_ROPE_HALF;
    dsa_rope_frequencies(rope, f);
    x += rope->offset;
    for (int i = 0; i < n / 2; i++) {
        double *u = half ? x + i : x + 2 * i, *v = half ? x + i + n / 2 : x + 2 * i + 1;
        double c = cos(position * f[i]), s = sin(position * f[i]), a = *u * c - *v * s;
        *v = *u * s + *v * c;
        *u = a;
    }
}
static void check_row(const bench *b, const char *what, const dsa_cache *c, int64_t at, const double *want, int64_t n)
{
    static const double limits[] = { 1e-10, 5e-6, 0, 1e-3, 1e-4 };   /* what rounding to the cache's format moves a row by, and some */
    float row[WIDTH];
    char text[96];
    double far;
    must(b, dsa_cache_read(&b->ctx, c, at, at + 1, row), "dsa_cache_read");
    far = distance(row, want, n);
    snprintf(text, sizeof text, " of row %lld is off by %.3g", (long long)at, far);
    if (!(far <= limits[c->format])) die(1, what, text);
}

/* The layer in double for the row at `at`, the last one of a call (spec 2, 3.1): what was appended, what was selected (list NULL: dense),
   and 64 of the outputs. The projected queries differ in their last f32 bits, so an e4m3 or int8 value of a query may fall to the other
   side: the selection check gets slack for that. */
static void check_layer(const bench *b, const layer_data *d, const float *x32, int64_t at, const int32_t *list, const float *y)
{
    static double x[HIDDEN], qr[Q_LORA], kv[WIDTH], k[D], iq[HI * D], iw[HI], q[NOPE + ROPE], wide[WIDTH], o_lat[R], o[H * V], want[64];
    static float iq32[HI * D], iw32[HI], row[R], got[64], hadamard[D];
    const dsa_config *c = &b->ctx.config;
    dsa_rope rope = dsa_config_rope(&b->ctx, NOPE + ROPE), index_rope = dsa_config_index_rope(&b->ctx), cache_rope = dsa_config_rope(&b->ctx, WIDTH);
    double mean = 0, variance = 0, limit = 4 * allowed(b, d->latent.format);   /* q is rounded, too */
    char text[96];
    for (int i = 0; i < HIDDEN; i++) x[i] = (double)x32[i];
    project(d, W_Q_A, 0, Q_LORA, x, qr);
    rms(qr, Q_LORA, d->gain[0], (double)c->norm_eps);
    project(d, W_KV_A, 0, WIDTH, x, kv);
    rms(kv, R, d->gain[1], (double)c->norm_eps);
    rotate(kv, &cache_rope, (double)at);
    check_row(b, "layer: the latent", &d->latent, at, kv, WIDTH);
    project(d, W_IK, 0, D, x, k);
    for (int i = 0; i < D; i++) mean += k[i] / D;
    for (int i = 0; i < D; i++) variance += (k[i] - mean) * (k[i] - mean) / D;
    for (int i = 0; i < D; i++) k[i] = (k[i] - mean) / sqrt(variance + (double)c->index_norm_eps) * (double)d->gain[2][i] + (double)d->gain[3][i];
    rotate(k, &index_rope, (double)at);
    if (d->index.hadamard) {
        for (int i = 0; i < D; i++) hadamard[i] = (float)k[i];
        dsa_hadamard_rows(hadamard, 1, D, D);
        for (int i = 0; i < D; i++) k[i] = (double)hadamard[i];
    }
    check_row(b, "layer: the index key", &d->index, at, k, D);
    if (list) {
        project(d, W_IQ_B, 0, HI * D, qr, iq);
        project(d, W_IW, 0, HI, x, iw);
        for (int h = 0; h < HI; h++) {
            rotate(iq + h * D, &index_rope, (double)at);
            iw32[h] = (float)(iw[h] / sqrt((double)HI * D));
        }
        for (int i = 0; i < HI * D; i++) iq32[i] = (float)iq[i];
        check_selection(b, "layer", &d->index, iq32, iw32, list, at + 1, 1e-4);
    }
    for (int h = 0; h < H; h++) {
        project(d, W_Q_B, h * (NOPE + ROPE), NOPE + ROPE, qr, q);
        rotate(q, &rope, (double)at);
        memset(wide, 0, sizeof wide);
        for (int i = 0; i < NOPE; i++) {                     /* q_lat = W_UK^T q_nope */
            weight_row(&d->w[W_KV_B], R, h * (NOPE + V) + i, row);
            for (int j = 0; j < R; j++) wide[j] += q[i] * (double)row[j];
        }
        memcpy(wide + R, q + NOPE, ROPE * sizeof *q);
        attend_f64(b, &d->latent, wide, (double)c->softmax_scale, list, list && at + 1 > TOP_K ? TOP_K : at + 1, o_lat);
        project(d, W_KV_B, h * (NOPE + V) + NOPE, V, o_lat, o + h * V);
    }
    for (int i = 0; i < 64; i++) {
        int64_t channel = (int64_t)i * (HIDDEN / 64) + i;
        project(d, W_O, channel, 1, o, &want[i]);
        got[i] = y[channel];
    }
    mean = distance(got, want, 64);
    snprintf(text, sizeof text, ": y is off by %.3g (1 - similarity; allowed %.3g)", mean, limit);
    if (!(mean <= limit)) die(1, "layer", text);
}

typedef struct layer_state { layer_data *d; dsa_seq seq; dsa_layer_args args; int64_t len; } layer_state;

static void run_layer(bench *b, void *state, int64_t turn)
{
    layer_state *s = (layer_state *)state;
    (void)turn;                                              /* cold: 200 million weights pass between two uses of a row */
    must(b, dsa_cache_truncate(&b->ctx, &s->d->latent, s->len), "dsa_cache_truncate");
    must(b, dsa_cache_truncate(&b->ctx, &s->d->index, s->len), "dsa_cache_truncate");
    must(b, dsa_layer(&b->ctx, &s->args), "dsa_layer");
}

static void layer_start(bench *b, layer_state *s, layer_data *d, int64_t context, int64_t queries, dsa_layer_mode mode)
{
    float *x = (float *)take((size_t)(queries * HIDDEN), sizeof *x);
    rng r = { 23 };
    random_normals(&r, x, queries * HIDDEN, 1.0f);
    memset(s, 0, sizeof *s);
    s->d = d;
    s->len = context - queries;
    s->seq.latent = &d->latent;
    s->seq.index = &d->index;
    s->seq.n_q = (int32_t)queries;
    s->args.weights = &d->weights;
    s->args.n_seqs = 1;
    s->args.seqs = &s->seq;
    s->args.x = x;
    s->args.y = (float *)take((size_t)(queries * HIDDEN), sizeof(float));
    s->args.mode = mode;
    if (mode == DSA_LAYER_SPARSE) s->args.indices_out = (int32_t *)take((size_t)queries * TOP_K, sizeof(int32_t));
    (void)b;
}
static void layer_stop(layer_state *s)
{
    free((void *)(uintptr_t)s->args.x);
    free(s->args.y);
    free(s->args.indices_out);
}
/* One call, checked in its last row; returns its seconds. */
static double layer_first(bench *b, layer_state *s, int check)
{
    int64_t last = s->seq.n_q - 1;
    double start;
    must(b, dsa_layer_workspace(&b->ctx, &s->args, &s->args.workspace_size), "dsa_layer_workspace");
    s->args.workspace = workspace(b, s->args.workspace_size);
    start = now();
    run_layer(b, s, 0);
    start = now() - start;
    if (check)
        check_layer(b, s->d, s->args.x + last * HIDDEN, s->len + last, s->args.indices_out ? s->args.indices_out + last * TOP_K : NULL, s->args.y + last * HIDDEN);
    return start;
}

static void case_layer(bench *b, const params *p)
{
    line l = { "layer", format_names[p->format], p->input, p->queries, p->context, { 0, 0, 0 }, 0, "" };
    dsa_isa isa = dsa_query_isa(&b->ctx);
    layer_data *d = (layer_data *)take(1, sizeof *d);
    layer_state s;
    size_t key, row;
    if (p->context <= p->queries) die(2, "layer: --context must be larger than --queries", "");
    layer_make(b, p->format, p->context, p->context - p->queries, d);
    layer_start(b, &s, d, p->context, p->queries, DSA_LAYER_SPARSE);
    must(b, dsa_row_bytes(DSA_INDEX_KEY, p->format, D, 0, &key), "dsa_row_bytes");
    must(b, dsa_row_bytes(DSA_LATENT, p->format, R, ROPE, &row), "dsa_row_bytes");
    for (int i = 0; i < N_WEIGHTS; i++) l.flops[UNIT_F32] += 2.0 * (double)(shapes[i].out * shapes[i].in * p->queries);   /* f32 activations */
    l.bytes = d->weight_bytes + (double)row * fmin(pairs(p, TOP_K), (double)p->context);
    if (p->context > TOP_K) {
        l.bytes += (double)key * (double)p->context;
        l.flops[unit_of(p->format, isa)] += 2.0 * HI * D * pairs(p, p->context);
    }
    l.flops[unit_of(p->format, isa)] += 2.0 * H * (WIDTH + R) * pairs(p, TOP_K);
    for (int32_t t = 0; t < b->threads.n; t++) {
        double first;
        set_threads(b, b->threads.x[t]);
        first = layer_first(b, &s, 1);
        measure(b, &l, run_layer, &s, first);
    }
    layer_stop(&s);
    layer_free(d);
    free(d);
}

/* ---- sweep -------------------------------------------------------------------------------------------------------------------------- */
static int sweep(bench *b)
{
    dsa_type format = DSA_FP8;
    FILE *f = fopen(b->sweep, "w");
    layer_data *d = (layer_data *)take(1, sizeof *d);
    double limit = b->seconds > 0 ? b->seconds : 20, last[2][2] = { { 0, 0 }, { 0, 0 } };
    int64_t chunk = b->queries.n ? b->queries.x[0] : DSA_LAYER_TILE, capacity = 1 << 20;
    if (!f) die(2, "cannot write ", b->sweep);
    for (int i = 0; i < 5; i++) if (b->formats && strcmp(b->formats, format_names[i]) == 0) format = (dsa_type)i;
    if (b->contexts.n) capacity = b->contexts.x[b->contexts.n - 1];
    set_threads(b, b->threads.x[b->threads.n - 1]);
    fprintf(f, "# one layer of DeepSeek-V3.2, %s weights and caches, isa %s, %d threads, median ms of a call\n", format_names[format],
            dsa_isa_name(dsa_query_isa(&b->ctx)), (int)b->m.threads);
    fprintf(f, "phase,mode,context,queries,ms,note\n");
    layer_make(b, format, capacity, 0, d);
    for (int64_t context = 1024; context <= capacity; context *= 2)
        for (int phase = 0; phase < 2; phase++)
            for (int dense = 0; dense < 2; dense++) {
                const char *names[2] = { phase ? "prefill" : "decode", dense ? "dense" : "dsa" };
                int64_t queries = phase ? chunk : 1, n = 1;
                double samples[64];
                layer_state s;
                if (dense && 2 * last[phase][1] > limit) {   /* twice the rows, about twice the time */
                    last[phase][1] *= 2;
                    fprintf(f, "%s,%s,%lld,%lld,,cut off: about %.0f s\n", names[0], names[1], (long long)context, (long long)queries, last[phase][1]);
                    fprintf(stderr, "%-8s %-6s %8lld  cut off: would take about %.0f s\n", names[0], names[1], (long long)context, last[phase][1]);
                    continue;
                }
                grow(b, &d->latent, context - queries);
                grow(b, &d->index, context - queries);
                layer_start(b, &s, d, context, queries, dense ? DSA_LAYER_DENSE : DSA_LAYER_SPARSE);
                samples[0] = layer_first(b, &s, context <= 4096);
                for (double begin = now(); n < 64 && (samples[0] < 2 && now() - begin < 1); n++) {
                    double start = now();
                    run_layer(b, &s, n);
                    samples[n] = now() - start;
                }
                last[phase][dense] = n > 1 ? median(samples + 1, n - 1) : samples[0];
                fprintf(f, "%s,%s,%lld,%lld,%.6g,\n", names[0], names[1], (long long)context, (long long)queries, 1e3 * last[phase][dense]);
                fprintf(stderr, "%-8s %-6s %8lld  %10.3f ms\n", names[0], names[1], (long long)context, 1e3 * last[phase][dense]);
                fflush(f);
                layer_stop(&s);
            }
    layer_free(d);
    free(d);
    if (fclose(f) != 0) die(2, "cannot write ", b->sweep);
    return 0;
}

/* ---- command line ------------------------------------------------------------------------------------------------------------------- */
enum { F32 = 1 << DSA_F32, BF16 = 1 << DSA_BF16, FP8 = 1 << DSA_FP8, INT8 = 1 << DSA_INT8, K = 1024 };

/* What a case is run with unless options say otherwise: formats, then (context, queries) one pair after the other. */
static const struct {
    const char *name;
    void (*run)(bench *b, const params *p);
    unsigned formats, allowed;
    int64_t pair[3][2];
} cases[] = {
    { "score_select",     case_score_select,     F32 | BF16 | FP8 | INT8, F32 | BF16 | FP8 | INT8, { { 64 * K, 1 }, { 128 * K, 1 }, { 64 * K, 32 } } },
    { "topk",             case_topk,             F32,                     F32,                     { { 64 * K, 1 }, { 128 * K, 1 }, { 1024 * K, 1 } } },
    { "sparse_attention", case_sparse_attention, F32 | BF16 | FP8,        F32 | BF16 | FP8,        { { 128 * K, 1 }, { 128 * K, 32 }, { 0, 0 } } },
    { "dense_attention",  case_dense_attention,  F32 | BF16 | FP8,        F32 | BF16 | FP8,        { { 16 * K, 1 }, { 64 * K, 1 }, { 0, 0 } } },
    { "dsa_step",         case_dsa_step,         INT8,                    F32 | BF16 | FP8 | INT8, { { 64 * K, 1 }, { 128 * K, 1 }, { 0, 0 } } },
    { "layer",            case_layer,            BF16 | FP8,              F32 | BF16 | FP8,        { { 64 * K, 1 }, { 64 * K, 32 }, { 0, 0 } } },
};
enum { N_CASES = sizeof cases / sizeof *cases };
static const char *const inputs[] = { "random", "ascending", "descending", "equal", "outlier" };

static int in_list(const char *list, const char *name)   /* no list: everything is */
{
    size_t n = strlen(name);
    if (!list) return 1;
    for (; *list; list += strcspn(list, ","), list += *list == ',')
        if (strcspn(list, ",") == n && strncmp(list, name, n) == 0) return 1;
    return 0;
}

/* Calls one case with all that the options choose, or counts the lines it would print. */
static void each(bench *b, size_t i)
{
    int topk = strcmp(cases[i].name, "topk") == 0;
    int64_t pair[MAX_LIST * MAX_LIST][2];
    int32_t n = 0, default_threads = b->threads.n;
    if (b->contexts.n) {                                     /* every context with every number of queries */
        for (int32_t c = 0; c < b->contexts.n; c++)
            for (int32_t q = 0; q < (b->queries.n ? b->queries.n : 1); q++, n++) {
                pair[n][0] = b->contexts.x[c];
                pair[n][1] = b->queries.n ? b->queries.x[q] : 1;
            }
    } else
        for (int j = 0; j < 3 && cases[i].pair[j][0]; j++)
            for (int32_t q = 0; q < (b->queries.n ? b->queries.n : 1); q++) {
                if (b->queries.n && cases[i].pair[j][1] != 1) continue;
                pair[n][0] = cases[i].pair[j][0];
                pair[n++][1] = b->queries.n ? b->queries.x[q] : cases[i].pair[j][1];
            }
    if (topk && b->threads.n > 1 && b->threads.x[0] == 1) b->threads.n = 1;
    for (int f = 0; f < 5; f++) {
        if (!(cases[i].allowed >> f & 1u) || (b->formats ? !in_list(b->formats, format_names[f]) : !(cases[i].formats >> f & 1u))) continue;
        for (int32_t j = 0; j < n; j++)
            for (size_t k = 0; k < sizeof inputs / sizeof *inputs; k++) {
                params p = { (dsa_type)f, inputs[k], pair[j][0], pair[j][1] };
                if (topk ? !in_list(b->inputs, inputs[k]) : k > 0) continue;
                if (p.queries > p.context) die(2, cases[i].name, ": more queries than rows");
                if (b->counting) b->lines += b->threads.n;
                else cases[i].run(b, &p);
            }
    }
    b->threads.n = default_threads;
}

static int usage(const char *what, const char *detail)
{
    fprintf(stderr, "bench: %s%s (bench --help explains)\n", what, detail);
    return 2;
}

/* "64K,1M" */
static int parse_numbers(const char *text, int64_t most, numbers *out)
{
    out->n = 0;
    while (*text) {
        char *end;
        long long x = strtoll(text, &end, 10);
        if (end == text || x < 1 || x > most || out->n == MAX_LIST) return -1;
        if (*end == 'K') { x *= 1024; end++; }
        else if (*end == 'M') { x *= 1048576; end++; }
        if (x > most || (*end && *end != ',')) return -1;
        out->x[out->n++] = x;
        text = *end ? end + 1 : end;
    }
    return out->n > 0 ? 0 : -1;
}

/* Every name of a list is one of the n known ones. */
static int known(const char *list, const char *const *names, size_t n)
{
    char one[32];
    if (!*list) return 0;
    for (; *list; list += strcspn(list, ","), list += *list == ',') {
        size_t length = strcspn(list, ","), i;
        if (length >= sizeof one) return 0;
        memcpy(one, list, length);
        one[length] = 0;
        for (i = 0; i < n && strcmp(one, names[i]) != 0; i++) { }
        if (i == n) return 0;
    }
    return 1;
}

int main(int argc, char **argv)
{
    static bench b;
    static const char *const isas[] = { "auto", "scalar", "avx2", "avx512", "neon" };   /* by dsa_isa */
    const char *names[N_CASES + N_UNITS];
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    numbers one;
    int n_cases = 0;
    for (int i = 0; i < N_CASES; i++) names[i] = cases[i].name;
    for (int i = 0; i < N_UNITS; i++) names[N_CASES + i] = unit_names[i];
    for (int i = 1; i < argc; i++) {
        const char *o = argv[i], *v = i + 1 < argc ? argv[i + 1] : NULL;
        int bad = 0;
        if (strcmp(o, "--help") == 0) { fputs(help, stdout); return 0; }
        if (strcmp(o, "--json") == 0) { b.json = 1; continue; }
        if (strcmp(o, "--huge") == 0) { b.huge = 1; continue; }
        if (!v) return usage("unknown option, or its value is missing: ", o);
        i++;
        if (strcmp(o, "--case") == 0) { b.cases = v; bad = !known(v, names, N_CASES + N_UNITS); }
        else if (strcmp(o, "--format") == 0) { b.formats = v; bad = !known(v, format_names, 5) || in_list(v, "f16"); }
        else if (strcmp(o, "--input") == 0) { b.inputs = v; bad = !known(v, inputs, 5); }
        else if (strcmp(o, "--context") == 0) bad = parse_numbers(v, INT64_C(1) << 27, &b.contexts) != 0;
        else if (strcmp(o, "--queries") == 0) bad = parse_numbers(v, 4096, &b.queries) != 0;
        else if (strcmp(o, "--threads") == 0) bad = parse_numbers(v, 256, &b.threads) != 0;
        else if (strcmp(o, "--page") == 0) { bad = parse_numbers(v, 1 << 20, &one) != 0 || one.n != 1; b.page = bad ? 0 : (int32_t)one.x[0]; }
        else if (strcmp(o, "--seconds") == 0) { bad = parse_numbers(v, 3600, &one) != 0 || one.n != 1; b.seconds = bad ? 0 : (double)one.x[0]; }
        else if (strcmp(o, "--sweep") == 0) b.sweep = v;
        else if (strcmp(o, "--isa") == 0) {
            int isa = 0;
            while (isa < 5 && strcmp(isas[isa], v) != 0) isa++;
            bad = isa == 5;
            b.isa = (dsa_isa)isa;
        } else return usage("unknown option: ", o);
        if (bad) return usage("no such value, or out of range: ", v);
    }
    if (b.threads.n == 0) {
        b.threads.x[b.threads.n++] = 1;
        if (processors > 1) b.threads.x[b.threads.n++] = processors > 256 ? 256 : processors;
    }
    machine_open(&b.m, b.huge);
    set_threads(&b, 1);                                      /* a forced ISA that is missing ends here */
    print_machine(b.json ? stderr : stdout, "bench");
    fprintf(b.json ? stderr : stdout, "ISA       %s; caches in %s pages, %s\n", dsa_isa_name(dsa_query_isa(&b.ctx)), b.huge ? "huge" : "ordinary",
            b.page ? "paged" : "contiguous");
    for (double warm = now(); now() - warm < 0.5;) peak_measure(&b.m, UNIT_F32, dsa_query_isa(&b.ctx), NULL, NULL);
    if (b.sweep) return sweep(&b);
    b.counting = 1;
    for (size_t i = 0; i < N_CASES; i++)
        if (in_list(b.cases, cases[i].name)) { n_cases++; each(&b, i); }
    b.counting = 0;
    if (b.cases && n_cases > 0 && b.lines == 0) return usage("no case has a format or an input of that name", "");
    b.deadline = now() + (b.seconds > 0 ? b.seconds : n_cases == 1 ? 50 : 110);
    print_heading(&b);
    for (int32_t t = 0; t < b.threads.n; t++) {
        set_threads(&b, b.threads.x[t]);
        measure_peaks(&b, n_cases > 0 ? NULL : b.cases);
    }
    for (size_t i = 0; i < N_CASES; i++) if (in_list(b.cases, cases[i].name)) each(&b, i);
    for (int i = 0; i < 2; i++) rows_free(&b.kept[i]);
    free(b.work);
    machine_close(&b.m);
    if (fflush(stdout) != 0 || ferror(stdout)) return 2;
    return 0;
}

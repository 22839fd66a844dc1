/* bench - how long the calls of dsa.h take, beside what this machine could do at most - public domain or MIT, like dsa.h

   Build and run: make bench        (by hand: cc -O3 -o build/bench tools/bench.c -lm -pthread, then build/bench --help)

   Only the public calls of dsa.h are used. Each case is first checked against the formulas in double precision of bench_data.h, on some of
   its outputs; then it is timed with rows that no cache holds any more, and with the machine's peaks measured before, between and after its
   samples, because the clock drifts. A floor is what the peaks allow:
       max(flops / peak of the unit that multiplies this format under this ISA, bytes / peak of reading in order) */
#define _DEFAULT_SOURCE
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include "bench_data.h"
#ifdef DSA_CUDA
#include "bench_cuda.h"
#endif

static const char help[] =
    "usage: bench [options]\n"
    "\n"
    "Times dsa.h at DeepSeek-V3.2's shapes beside the floor that this machine's own peaks set. Lists are separated by commas; K and M\n"
    "stand for 1024 and 1048576.\n"
    "\n"
    "  --case LIST      score_select, topk, sparse_attention, dense_attention, dsa_step (index keys in the given format, bf16 latents,\n"
    "                   no projections), layer (weights and caches in the given format; 1 query: decode, more: a prefill chunk),\n"
    "                   peak_f32, peak_bf16, peak_int8, peak_read, peak_gather. Default: all. The peaks are always measured first.\n"
    "  --format LIST    f32, bf16, fp8, int8 (index keys only). Default: each case's own\n"
    "  --context LIST   rows in the cache. Default: each case's own\n"
    "  --queries LIST   queries in one call. Default: each case's own; 1 where --context is given\n"
    "  --input LIST     scores of topk: random, ascending, descending, equal, outlier. Default: all five\n"
    "  --threads LIST   default: 1 and the number of processors; topk: 1\n"
    "  --isa NAME       auto (default), scalar, avx2, avx512, neon\n"
    "  --huge           caches in huge pages (their allocator asks for them with madvise)\n"
    "  --page N         rows per page of the caches. Default: one page\n"
    "  --seconds N      time to aim at; default 40 for one case, 100 for more. Every line takes at least one call, whatever that takes\n"
    "  --json           one object a line on stdout; the rest goes to stderr\n"
    "  --sweep FILE     instead: one layer's decode and a prefill chunk (--queries, default 32; --format, default fp8) over contexts from\n"
    "                   1K to 1M (or --context), sparse and dense, as CSV (tools/plot.py draws it). Dense is cut off where one call\n"
    "                   would take longer than --seconds (default 20)\n"
    "  --help\n"
    "\n"
    "ms is the median of a call's times, ratio is ms to floor, recall the share of the 2048 chosen that unrounded keys choose, too.\n"
    "A line with BUSY was measured while other processes took processors from this one: repeat it.\n"
    "Exit status: 0 success, 1 a check failed, 2 bad usage or bad input.\n";

enum { COLD = 96 << 20,            /* bytes that pass between two uses of a row: three times the L3 that a core sees on large servers */
       MAX_LIST = 16, MAX_SAMPLES = 4096, ROUNDS = 3 };

typedef struct numbers { int64_t x[MAX_LIST]; int32_t n; } numbers;

typedef struct bench {
    const char *cases, *formats, *inputs, *sweep;
    numbers contexts, queries, threads;
    dsa_isa isa;
    int json, huge, counting;
    int32_t page;
    double seconds, deadline;
    int64_t lines, done;            /* to be printed; printed */
    double spent, last;             /* seconds outside of sampling, and when the last sampling ended */
    machine m;
    dsa_ctx ctx;                    /* for the machine's present number of threads */
    char detail[256];
    void *work;                     /* the workspace of calls */
    size_t work_bytes;
    rows kept[2];                   /* by dsa_kind: the last that were made */
} bench;

static void set_threads(bench *b, int64_t threads)
{
    dsa_config c;
    machine_threads(&b->m, (int32_t)threads);
    dsa_config_preset(DSA_DEEPSEEK_V32, &c);
    c.isa = b->isa;
    c.n_threads = (int32_t)threads;
    c.parallel_for = threads > 1 ? dsa_pool_run : NULL;
    c.parallel_user = b->m.pool;
    c.allocator.alloc = bench_alloc;
    c.allocator.release = bench_release;
    c.allocator.user = &b->huge;
    c.detail = b->ctx.config.detail = b->detail;
    c.detail_size = sizeof b->detail;
    must(&b->ctx, dsa_init(&b->ctx, &c), "dsa_init");
}

static void *workspace(bench *b, size_t bytes)
{
    if (bytes <= b->work_bytes) return b->work;
    free(b->work);
    b->work_bytes = bytes;
    return b->work = take(bytes, 1);
}

static const rows *cold_rows(bench *b, dsa_kind kind, dsa_type format, int64_t len)
{
    rows_make(&b->ctx, kind, format, b->page, len, COLD, &b->kept[kind]);
    return &b->kept[kind];
}

/* ---- lines and their times --------------------------------------------------------------------------------------------------------- */
typedef struct params { dsa_type format; const char *input; int64_t context, queries; } params;

/* One case: start sizes the workspace for the number of threads, run makes a call with the turn's rows, check looks at what turn 0 gave. */
typedef struct call {
    const char *name;
    params p;
    double flops[UNIT_READ];        /* by the unit that multiplies */
    double bytes;
    char note[48];
    void *state;
    void (*start)(bench *b, void *state);
    void (*run)(bench *b, void *state, int64_t turn);
    void (*check)(bench *b, void *state);
} call;

static void print_line(const bench *b, const call *c, const char *format, dsa_isa isa, double ms, double floor_ms)
{
    double flops = c->flops[UNIT_F32] + c->flops[UNIT_BF16] + c->flops[UNIT_INT8];
    if (b->json)
        printf("{\"case\":\"%s\",\"format\":\"%s\",\"input\":\"%s\",\"isa\":\"%s\",\"threads\":%ld,\"queries\":%lld,\"context\":%lld,"
               "\"ms\":%.6g,\"floor_ms\":%.6g,\"ratio\":%.4f,\"bytes\":%.0f,\"flops\":%.0f}\n", c->name, format, c->p.input, dsa_isa_name(isa),
               (long)b->m.threads, (long long)c->p.queries, (long long)c->p.context, ms, floor_ms, ms / floor_ms, c->bytes, flops);
    else
        printf("%-16s %-6s %-10s %8lld %7lld %7ld %-7s %10.4f %10.4f %7.3f %9.1f %7.2f  %s\n", c->name, format, c->p.input, (long long)c->p.context,
               (long long)c->p.queries, (long)b->m.threads, dsa_isa_name(isa), ms, floor_ms, ms / floor_ms, 1e-6 * flops / ms, 1e-6 * c->bytes / ms, c->note);
    fflush(stdout);
}

/* Of the present number of threads; of the ISA in use and of the widest. */
static void print_peaks(const bench *b, machine *m, int all)
{
    const dsa_isa isas[2] = { dsa_query_isa(&b->ctx), widest_isa() };
    for (int u = 0; u < N_UNITS; u++)
        for (int i = 0; i < (u < UNIT_READ && isas[0] != isas[1] ? 2 : 1); i++) {
            double work = 0, rate = 0;
            call c = { unit_names[u], { DSA_F32, "", 0, 0 }, { 0, 0, 0 }, 0, "", NULL, NULL, NULL, NULL };
            if (!all && !in_list(b->cases, unit_names[u])) continue;
            for (int again = 0; again < 2; again++) rate = fmax(rate, peak_measure(m, (unit)u, isas[i], &work));
            if (rate == 0) continue;
            if (u < UNIT_READ) c.flops[u] = work; else c.bytes = work;
            print_line(b, &c, u < UNIT_READ ? unit_names[u] + 5 : "", isas[i], 1e3 * work / rate, 1e3 * work / rate);
        }
}

/* Samples a call between looks at the peaks that its floor is made of, and prints the line. `first` are the seconds of the call that was
   checked: where there is no time for more, that is the sample. */
static void measure(bench *b, call *c, double first)
{
    static double samples[MAX_SAMPLES];
    double peak[N_UNITS] = { 0 }, floor_s = 0, left, share;
    int64_t n = 0, turn = 1;
    int rounds;
    b->spent += now() - b->last;
    b->done++;
    b->m.cpu = b->m.wall = 0;
    left = b->deadline - now();
    share = left / (double)(b->lines - b->done + 1) - b->spent / (double)b->done - 0.3;   /* what others cost without samples, and peaks */
    rounds = share > ROUNDS * first ? ROUNDS : share > first ? 1 : 0;
    if (share > 2) share = 2;
    for (int round = 0; round <= (rounds ? rounds : 1); round++) {
        for (int u = 0; u <= UNIT_READ; u++)
            if (u == UNIT_READ || c->flops[u] > 0) peak[u] = fmax(peak[u], peak_measure(&b->m, (unit)u, dsa_query_isa(&b->ctx), NULL));
        for (double begin = now(), end = begin; round < rounds && n < MAX_SAMPLES * (round + 1) / rounds && end - begin < share / rounds; turn++) {
            double start = now();
            c->run(b, c->state, turn);
            end = now();
            samples[n++] = end - start;
        }
    }
    for (int u = 0; u < UNIT_READ; u++) if (c->flops[u] > 0) floor_s += c->flops[u] / peak[u];
    floor_s = fmax(floor_s, c->bytes / peak[UNIT_READ]);
    if (b->m.cpu < 0.9 * b->m.wall) {                        /* say it: peaks and samples may then have met different machines */
        double got = 100 * b->m.cpu / b->m.wall;
        size_t used = strlen(c->note);
        snprintf(c->note + used, sizeof c->note - used, "  BUSY: had %.0f %% of its CPUs", got);
        if (b->json) fprintf(stderr, "bench: BUSY: the next line had %.0f %% of its CPUs\n", got);
    }
    print_line(b, c, format_names[c->p.format], dsa_query_isa(&b->ctx), 1e3 * (n > 0 ? median(samples, n) : first), 1e3 * floor_s);
    b->last = now();
}

/* A case's lines, one for each number of threads. */
static void time_call(bench *b, call *c)
{
    char note[sizeof c->note];
    memcpy(note, c->note, sizeof note);
    for (int32_t t = 0; t < b->threads.n; t++) {
        double first;
        set_threads(b, b->threads.x[t]);
        memcpy(c->note, note, sizeof note);
        c->start(b, c->state);
        first = now();
        c->run(b, c->state, 0);
        first = now() - first;
        c->check(b, c->state);
        measure(b, c, first);
    }
}

static call new_call(const char *name, const params *p, void *state, void (*start)(bench *, void *), void (*run)(bench *, void *, int64_t),
                     void (*check)(bench *, void *))
{
    call c;
    memset(&c, 0, sizeof c);
    c.name = name;
    c.p = *p;
    c.state = state;
    c.start = start;
    c.run = run;
    c.check = check;
    return c;
}

/* (query, row) pairs that the queries at the end of a context see, at most `limit` rows each */
static double pairs(const params *p, int64_t limit)
{
    double sum = 0;
    for (int64_t visible = p->context - p->queries + 1; visible <= p->context; visible++) sum += (double)(visible < limit ? visible : limit);
    return sum;
}

/* The first and the last query of a call are checked. */
static int64_t next_checked(const params *p, int64_t i) { return i < p->queries - 1 ? p->queries - 1 : p->queries; }

/* What scoring and attention over the lists add to a call's floor. */
static void add_scoring(const bench *b, dsa_type format, call *c)
{
    if (c->p.context <= TOP_K) return;                       /* the dense fallback scores nothing */
    c->bytes += (double)row_bytes(DSA_INDEX_KEY, format) * (double)c->p.context;
    c->flops[unit_of(format, dsa_query_isa(&b->ctx))] += 2.0 * HI * D * pairs(&c->p, c->p.context);
}
static void add_attention(const bench *b, dsa_type format, int64_t rows_each, call *c)
{
    double n = pairs(&c->p, rows_each);
    c->bytes += (double)row_bytes(DSA_LATENT, format) * fmin(n, (double)c->p.context);
    c->flops[unit_of(format, dsa_query_isa(&b->ctx))] += 2.0 * H * (WIDTH + R) * n;
}

/* ---- score_select ---------------------------------------------------------------------------------------------------------------- */
typedef struct score_state { params p; const rows *keys; dsa_seq seq; dsa_score_args args; dsa_selection out; } score_state;

static void start_score(bench *b, void *state)
{
    score_state *s = (score_state *)state;
    must(&b->ctx, dsa_score_select_workspace(&b->ctx, &s->args, &s->out, &s->args.workspace_size), "dsa_score_select_workspace");
    s->args.workspace = workspace(b, s->args.workspace_size);
}
static void run_score(bench *b, void *state, int64_t turn)
{
    score_state *s = (score_state *)state;
    s->seq.index = &s->keys->copy[turn % s->keys->n];
    must(&b->ctx, dsa_score_select(&b->ctx, &s->args, &s->out), "dsa_score_select");
}
static void check_score(bench *b, void *state)
{
    score_state *s = (score_state *)state;
    for (int64_t i = 0; i < s->p.queries; i = next_checked(&s->p, i))
        check_selection(&b->ctx, "score_select", s->seq.index, s->args.q + i * HI * D, s->args.w + i * HI, s->out.indices + i * TOP_K, NULL,
                        s->p.context - s->p.queries + 1 + i, 0);
    if (s->p.queries > 1) return;
    s->out.scores = (float *)take(TOP_K, sizeof(float));     /* once more, to see the scores */
    start_score(b, s);
    run_score(b, s, 0);
    check_selection(&b->ctx, "score_select", s->seq.index, s->args.q, s->args.w, s->out.indices, s->out.scores, s->p.context, 0);
    free(s->out.scores);
    s->out.scores = NULL;
    start_score(b, s);
}

/* The share of the list that the unrounded keys would have chosen, too. One query. */
static double recall(bench *b, score_state *s)
{
    int32_t *exact = (int32_t *)take(TOP_K, sizeof *exact), *list = s->out.indices, both = 0;
    const rows *keys = s->keys;
    rows unrounded;
    memset(&unrounded, 0, sizeof unrounded);
    rows_make(&b->ctx, DSA_INDEX_KEY, DSA_F32, b->page, s->p.context, 0, &unrounded);
    start_score(b, s);
    run_score(b, s, 0);
    s->keys = &unrounded;
    s->seq.index = &unrounded.copy[0];
    s->out.indices = exact;
    start_score(b, s);
    run_score(b, s, 0);
    for (int32_t i = 0, j = 0; i < TOP_K && j < TOP_K;) {
        both += exact[i] == list[j];
        if (exact[i] <= list[j]) i++; else j++;
    }
    s->keys = keys;
    s->seq.index = &keys->copy[0];
    s->out.indices = list;
    rows_free(&unrounded);
    free(exact);
    return (double)both / TOP_K;
}

static void score_open(bench *b, const params *p, score_state *s)
{
    memset(s, 0, sizeof *s);
    s->p = *p;
    s->keys = cold_rows(b, DSA_INDEX_KEY, p->format, p->context);
    s->seq.n_q = (int32_t)p->queries;
    s->seq.index = &s->keys->copy[0];
    s->args.n_seqs = 1;
    s->args.seqs = &s->seq;
    s->args.q = index_queries(p->queries);
    s->args.w = index_weights(p->queries);
    s->out.indices = (int32_t *)take((size_t)p->queries * TOP_K, sizeof(int32_t));
}
static void score_close(score_state *s)
{
    free((void *)(uintptr_t)s->args.q);
    free((void *)(uintptr_t)s->args.w);
    free(s->out.indices);
}

static void case_score_select(bench *b, const params *p)
{
    score_state s;
    call c = new_call("score_select", p, &s, start_score, run_score, check_score);
    if (p->context <= TOP_K) die(2, "score_select: up to 2048 rows nothing is scored, --context must be larger", "");
    score_open(b, p, &s);
    add_scoring(b, p->format, &c);
    if (p->queries == 1) snprintf(c.note, sizeof c.note, "recall %.4f", recall(b, &s));
    time_call(b, &c);
    score_close(&s);
}

/* ---- topk ------------------------------------------------------------------------------------------------------------------------- */
typedef struct topk_state { params p; const float *scores; int64_t n_rows; dsa_select_args args; dsa_selection out; } topk_state;

static void start_topk(bench *b, void *state)
{
    topk_state *s = (topk_state *)state;
    must(&b->ctx, dsa_select_workspace(&b->ctx, &s->args, &s->out, &s->args.workspace_size), "dsa_select_workspace");
    s->args.workspace = workspace(b, s->args.workspace_size);
}
static void run_topk(bench *b, void *state, int64_t turn)
{
    topk_state *s = (topk_state *)state;
    s->args.scores = s->scores + turn * s->p.queries % (s->n_rows - s->p.queries + 1) * s->p.context;
    must(&b->ctx, dsa_select(&b->ctx, &s->args, &s->out), "dsa_select");
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
    int32_t x = ((const entry *)a)->index, y = ((const entry *)b)->index;
    return x < y ? -1 : x > y;
}
static void check_topk(bench *b, void *state)                /* by sorting everything */
{
    topk_state *s = (topk_state *)state;
    int64_t n = s->p.context, k = n < TOP_K ? n : TOP_K;
    entry *e = (entry *)take((size_t)n, sizeof *e);
    (void)b;
    for (int64_t row = 0; row < s->p.queries; row = next_checked(&s->p, row)) {
        for (int64_t i = 0; i < n; i++) { e[i].score = s->args.scores[row * n + i]; e[i].index = (int32_t)i; }
        qsort(e, (size_t)n, sizeof *e, by_rank);
        qsort(e, (size_t)k, sizeof *e, by_index);
        for (int64_t i = 0; i < k; i++)
            if (s->out.indices[row * TOP_K + i] != e[i].index)
                wrong("topk", ": place %.0f holds %.0f instead of %.0f", (double)i, (double)s->out.indices[row * TOP_K + i], (double)e[i].index);
    }
    free(e);
}

static void case_topk(bench *b, const params *p)
{
    topk_state s;
    call c = new_call("topk", p, &s, start_topk, run_topk, check_topk);
    float *scores;
    rng r = { 12 };
    memset(&s, 0, sizeof s);
    s.p = *p;
    s.n_rows = p->queries + COLD / (4 * p->context);
    s.scores = scores = normals(11, s.n_rows * p->context, 1.0f);
    for (int64_t row = 0; row < s.n_rows; row++) {
        float *x = scores + row * p->context;
        if (strcmp(p->input, "outlier") == 0) x[random_below(&r, p->context)] = 1e9f;
        for (int64_t i = 0; i < p->context; i++) {
            if (strcmp(p->input, "ascending") == 0) x[i] = (float)i * 1e-3f - 7.0f;
            if (strcmp(p->input, "descending") == 0) x[i] = 7.0f - (float)i * 1e-3f;
            if (strcmp(p->input, "equal") == 0) x[i] = 0.5f;
        }
    }
    s.args.n_rows = p->queries;
    s.args.n_cols = s.args.stride = p->context;
    s.out.indices = (int32_t *)take((size_t)p->queries * TOP_K, sizeof(int32_t));
    c.bytes = 4.0 * (double)p->context * (double)p->queries;   /* a plain read */
    time_call(b, &c);
    free(scores);
    free(s.out.indices);
}

/* ---- sparse_attention and dense_attention ----------------------------------------------------------------------------------------- */
typedef struct attend_state {
    params p;
    const char *name;
    const rows *latents;
    int32_t *lists;                 /* [n_lists, k] ascending, a row of the cache in one list only; NULL: dense */
    int64_t n_lists, k;
    int32_t *indices;               /* [queries, k]: the call's */
    dsa_seq seq;
    dsa_attend_args args;
    dsa_attend_state sum;
} attend_state;

static void start_attend(bench *b, void *state)
{
    attend_state *s = (attend_state *)state;
    must(&b->ctx, dsa_attend_workspace(&b->ctx, &s->args, &s->sum, &s->args.workspace_size), "dsa_attend_workspace");
    s->args.workspace = workspace(b, s->args.workspace_size);
}
static void attend_turn(attend_state *s, int64_t turn)
{
    int64_t first = turn * s->p.queries;
    s->seq.latent = &s->latents->copy[(s->lists ? first / s->n_lists : turn) % s->latents->n];
    for (int64_t i = 0; s->lists && i < s->p.queries; i++)   /* the next lists, around the end; warm, as a selection leaves them */
        memcpy(s->indices + i * s->k, s->lists + (first + i) % s->n_lists * s->k, (size_t)s->k * sizeof *s->lists);
}
static void run_attend(bench *b, void *state, int64_t turn)
{
    attend_state *s = (attend_state *)state;
    attend_turn(s, turn);
    must(&b->ctx, dsa_attend(&b->ctx, &s->args, &s->sum, NULL, NULL, NULL), "dsa_attend");
}
static void check_attend(bench *b, void *state)
{
    attend_state *s = (attend_state *)state;
    for (int64_t i = 0; i < s->p.queries; i = next_checked(&s->p, i))
        check_attention(&b->ctx, s->name, s->seq.latent, s->args.q + i * H * WIDTH, s->lists ? s->indices + i * s->k : NULL,
                        s->lists ? s->k : s->p.context - s->p.queries + 1 + i, s->sum.out + i * H * R);
}

static void attend_open(bench *b, const params *p, int dense, attend_state *s)
{
    memset(s, 0, sizeof *s);
    s->p = *p;
    s->name = dense ? "dense_attention" : "sparse_attention";
    s->latents = cold_rows(b, DSA_LATENT, p->format, p->context);
    s->k = p->context < TOP_K ? p->context : TOP_K;
    s->seq.n_q = (int32_t)p->queries;
    s->seq.latent = &s->latents->copy[0];
    s->args.n_seqs = 1;
    s->args.seqs = &s->seq;
    s->args.q = attention_queries(p->queries);
    s->args.what = dense ? DSA_ATTEND_VISIBLE : DSA_ATTEND_LIST;
    if (!dense) {                                            /* deal the rows out: list by list of a random order */
        int32_t *order = (int32_t *)take((size_t)p->context, sizeof *order);
        entry *e = (entry *)take((size_t)s->k, sizeof *e);
        rng r = { 13 };
        random_order(&r, order, p->context);
        s->n_lists = p->context / s->k;
        for (int64_t i = 0; i < s->n_lists; i++) {
            for (int64_t j = 0; j < s->k; j++) e[j].index = order[i * s->k + j];
            qsort(e, (size_t)s->k, sizeof *e, by_index);
            for (int64_t j = 0; j < s->k; j++) order[i * s->k + j] = e[j].index;
        }
        free(e);
        s->lists = order;
        s->args.indices = s->indices = (int32_t *)take((size_t)(p->queries * s->k), sizeof *s->indices);
        s->args.n_indices = s->k;
    }
    s->sum.n_rows = p->queries;
    s->sum.max = (float *)take((size_t)p->queries * H, sizeof(float));
    s->sum.sum = (float *)take((size_t)p->queries * H, sizeof(float));
    s->sum.out = (float *)take((size_t)p->queries * H * R, sizeof(float));
}
static void attend_close(attend_state *s)
{
    free((void *)(uintptr_t)s->args.q);
    free(s->lists);
    free(s->indices);
    free(s->sum.max);
    free(s->sum.sum);
    free(s->sum.out);
}

static void attention(bench *b, const params *p, int dense)
{
    attend_state s;
    call c = new_call(dense ? "dense_attention" : "sparse_attention", p, &s, start_attend, run_attend, check_attend);
    attend_open(b, p, dense, &s);
    add_attention(b, p->format, dense ? p->context : TOP_K, &c);
    time_call(b, &c);
    attend_close(&s);
}
static void case_sparse_attention(bench *b, const params *p) { attention(b, p, 0); }
static void case_dense_attention(bench *b, const params *p) { attention(b, p, 1); }

/* ---- dsa_step ----------------------------------------------------------------------------------------------------------------------- */
typedef struct step_state { params p; const rows *keys, *latents; dsa_seq seq; dsa_step_args args; } step_state;

static void start_step(bench *b, void *state)
{
    step_state *s = (step_state *)state;
    must(&b->ctx, dsa_step_workspace(&b->ctx, &s->args, &s->args.workspace_size), "dsa_step_workspace");
    s->args.workspace = workspace(b, s->args.workspace_size);
}
static void run_step(bench *b, void *state, int64_t turn)
{
    step_state *s = (step_state *)state;
    s->seq.index = &s->keys->copy[turn % s->keys->n];
    s->seq.latent = &s->latents->copy[turn % s->latents->n];
    must(&b->ctx, dsa_step(&b->ctx, &s->args), "dsa_step");
}
static void check_step(bench *b, void *state)
{
    step_state *s = (step_state *)state;
    for (int64_t i = 0; i < s->p.queries; i = next_checked(&s->p, i)) {
        int64_t visible = s->p.context - s->p.queries + 1 + i;
        const int32_t *list = s->args.indices + i * TOP_K;
        check_selection(&b->ctx, "dsa_step", s->seq.index, s->args.index_q + i * HI * D, s->args.index_w + i * HI, list, NULL, visible, 0);
        check_attention(&b->ctx, "dsa_step", s->seq.latent, s->args.q + i * H * WIDTH, list, visible < TOP_K ? visible : TOP_K, s->args.out + i * H * R);
    }
}

static void case_dsa_step(bench *b, const params *p)
{
    dsa_type latent = p->format == DSA_F32 ? DSA_F32 : DSA_BF16;
    float *q = attention_queries(p->queries), *index_q = index_queries(p->queries), *index_w = index_weights(p->queries);
    step_state s;
    call c = new_call("dsa_step", p, &s, start_step, run_step, check_step);
    memset(&s, 0, sizeof s);
    s.p = *p;
    s.keys = cold_rows(b, DSA_INDEX_KEY, p->format, p->context);
    s.latents = cold_rows(b, DSA_LATENT, latent, p->context);
    s.seq.n_q = (int32_t)p->queries;
    s.seq.index = &s.keys->copy[0];
    s.seq.latent = &s.latents->copy[0];
    s.args.n_seqs = 1;
    s.args.seqs = &s.seq;
    s.args.q = q;
    s.args.index_q = index_q;
    s.args.index_w = index_w;
    s.args.out = (float *)take((size_t)p->queries * H * R, sizeof(float));
    s.args.indices = (int32_t *)take((size_t)p->queries * TOP_K, sizeof(int32_t));
    add_scoring(b, p->format, &c);
    add_attention(b, latent, TOP_K, &c);
    time_call(b, &c);
    free(q);
    free(index_q);
    free(index_w);
    free(s.args.out);
    free(s.args.indices);
}

/* ---- layer -------------------------------------------------------------------------------------------------------------------------- */
typedef struct layer_state { layer_data *l; int64_t len; dsa_seq seq; dsa_layer_args args; } layer_state;

static void start_layer(bench *b, void *state)
{
    layer_state *s = (layer_state *)state;
    must(&b->ctx, dsa_layer_workspace(&b->ctx, &s->args, &s->args.workspace_size), "dsa_layer_workspace");
    s->args.workspace = workspace(b, s->args.workspace_size);
}
static void run_layer(bench *b, void *state, int64_t turn)
{
    layer_state *s = (layer_state *)state;
    (void)turn;                                              /* cold: 200 million weights pass between two uses of a row */
    must(&b->ctx, dsa_cache_truncate(&b->ctx, &s->l->latent, s->len), "dsa_cache_truncate");
    must(&b->ctx, dsa_cache_truncate(&b->ctx, &s->l->index, s->len), "dsa_cache_truncate");
    must(&b->ctx, dsa_layer(&b->ctx, &s->args), "dsa_layer");
}
static void check_layer_state(bench *b, void *state)         /* the last row of the chunk */
{
    layer_state *s = (layer_state *)state;
    int64_t last = s->seq.n_q - 1;
    check_layer(&b->ctx, s->l, s->args.x + last * HIDDEN, s->len + last, s->args.indices_out ? s->args.indices_out + last * TOP_K : NULL,
                s->args.y + last * HIDDEN);
}

static void layer_open(bench *b, layer_data *l, int64_t context, int64_t queries, dsa_layer_mode mode, layer_state *s)
{
    memset(s, 0, sizeof *s);
    s->l = l;
    s->len = context - queries;
    grow_cache(&b->ctx, &l->latent, s->len);
    grow_cache(&b->ctx, &l->index, s->len);
    s->seq.latent = &l->latent;
    s->seq.index = &l->index;
    s->seq.n_q = (int32_t)queries;
    s->args.weights = &l->weights;
    s->args.n_seqs = 1;
    s->args.seqs = &s->seq;
    s->args.x = normals(23, queries * HIDDEN, 1.0f);
    s->args.y = (float *)take((size_t)(queries * HIDDEN), sizeof(float));
    s->args.mode = mode;
    if (mode == DSA_LAYER_SPARSE) s->args.indices_out = (int32_t *)take((size_t)queries * TOP_K, sizeof(int32_t));
}
static void layer_close(layer_state *s)
{
    free((void *)(uintptr_t)s->args.x);
    free(s->args.y);
    free(s->args.indices_out);
}

static void case_layer(bench *b, const params *p)
{
    layer_data *l = (layer_data *)take(1, sizeof *l);
    layer_state s;
    call c = new_call("layer", p, &s, start_layer, run_layer, check_layer_state);
    layer_make(&b->ctx, p->format, b->page, p->context, b->huge, l);
    layer_open(b, l, p->context, p->queries, DSA_LAYER_SPARSE, &s);
    c.bytes = l->bytes;
    c.flops[UNIT_F32] = 2.0 * layer_parameters() * (double)p->queries;   /* activations stay f32 */
    add_scoring(b, p->format, &c);
    add_attention(b, p->format, TOP_K, &c);
    time_call(b, &c);
    layer_close(&s);
    layer_free(l);
    free(l);
}

/* ---- sweep -------------------------------------------------------------------------------------------------------------------------- */
static void sweep(bench *b)
{
    static const char *const phases[] = { "decode", "prefill" }, *const modes[] = { "dsa", "dense" };
    dsa_type format = DSA_FP8;
    layer_data *l = (layer_data *)take(1, sizeof *l);
    double limit = b->seconds > 0 ? b->seconds : 20, last[2] = { 0, 0 };   /* of dense, by phase */
    int64_t chunk = b->queries.n ? b->queries.x[0] : DSA_LAYER_TILE, end = b->contexts.n ? b->contexts.x[b->contexts.n - 1] : 1 << 20;
    char cpu[192];
    FILE *f = fopen(b->sweep, "w");
    if (!f) die(2, "cannot write ", b->sweep);
    for (int i = 0; i < 4; i++) if (b->formats && in_list(b->formats, format_names[i])) format = (dsa_type)i;
    set_threads(b, b->threads.x[b->threads.n - 1]);
    layer_make(&b->ctx, format, b->page, end, b->huge, l);
    cpu_name(cpu, sizeof cpu);
    fprintf(f, "# one layer of DeepSeek-V3.2, %s weights and caches, median ms of a call with cold rows; %s, %ld thread%s, isa %s\n", format_names[format],
            cpu, (long)b->m.threads, b->m.threads > 1 ? "s" : "", dsa_isa_name(dsa_query_isa(&b->ctx)));
    fprintf(f, "phase,mode,context,queries,ms,note\n");
    for (int64_t context = 1024; context <= end; context *= 2)
        for (int i = 0; i < 4; i++) {
            int phase = i / 2, dense = i % 2;
            int64_t queries = phase ? chunk : 1, n = 0;
            double samples[64], first;
            layer_state s;
            if (queries >= context) die(2, "--sweep: --queries must be smaller than every context", "");
            if (dense && 2 * last[phase] > limit) {          /* twice the rows, about twice the time */
                last[phase] *= 2;
                fprintf(f, "%s,%s,%lld,%lld,,cut off: about %.0f s a call\n", phases[phase], modes[dense], (long long)context, (long long)queries, last[phase]);
                printf("%-8s %-6s %8lld  cut off: about %.0f s a call\n", phases[phase], modes[dense], (long long)context, last[phase]);
                continue;
            }
            layer_open(b, l, context, queries, dense ? DSA_LAYER_DENSE : DSA_LAYER_SPARSE, &s);
            start_layer(b, &s);
            first = now();
            run_layer(b, &s, 0);
            first = now() - first;
            if (context <= 4096) check_layer_state(b, &s);   /* larger ones take the same code, and minutes to check when dense */
            for (double begin = now(); first < 2 && n < 64 && now() - begin < 1.5; n++) {
                double start = now();
                run_layer(b, &s, n);
                samples[n] = now() - start;
            }
            if (n > 0) first = median(samples, n);
            if (dense) last[phase] = first;
            fprintf(f, "%s,%s,%lld,%lld,%.6g,\n", phases[phase], modes[dense], (long long)context, (long long)queries, 1e3 * first);
            printf("%-8s %-6s %8lld  %10.3f ms\n", phases[phase], modes[dense], (long long)context, 1e3 * first);
            fflush(f);
            fflush(stdout);
            layer_close(&s);
        }
    layer_free(l);
    free(l);
    if (fclose(f) != 0) die(2, "cannot write ", b->sweep);
}

/* ---- command line ------------------------------------------------------------------------------------------------------------------- */
enum { F32 = 1 << DSA_F32, BF16 = 1 << DSA_BF16, FP8 = 1 << DSA_FP8, INT8 = 1 << DSA_INT8, K = 1024 };

/* What a case is run with unless options say otherwise: formats, and pairs of context and queries. */
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

/* Runs one case with all that the options choose, or counts its lines. */
static void each(bench *b, size_t i)
{
    int topk = cases[i].run == case_topk;
    int32_t n = 0, all_threads = b->threads.n;
    int64_t pair[MAX_LIST * MAX_LIST][2];
    for (int32_t c = 0; c < (b->contexts.n ? b->contexts.n : 3); c++)
        for (int32_t q = 0; q < (b->queries.n ? b->queries.n : 1); q++, n++) {
            pair[n][0] = b->contexts.n ? b->contexts.x[c] : cases[i].pair[c][0];
            pair[n][1] = b->queries.n ? b->queries.x[q] : b->contexts.n ? 1 : cases[i].pair[c][1];
            if (!b->contexts.n && (pair[n][0] == 0 || (b->queries.n && cases[i].pair[c][1] > 1))) n--;   /* no pair, or its context had its turn */
        }
    if (topk && b->threads.x[0] == 1) b->threads.n = 1;      /* one row keeps one thread busy; --threads 2 still asks for two */
    for (int f = 0; f < 5; f++) {
        if (!(cases[i].allowed >> f & 1u) || (b->formats ? !in_list(b->formats, format_names[f]) : !(cases[i].formats >> f & 1u))) continue;
        for (int32_t j = 0; j < n; j++)
            for (size_t k = 0; k < (topk ? sizeof inputs / sizeof *inputs : 1); k++) {
                params p = { (dsa_type)f, inputs[k], pair[j][0], pair[j][1] };
                if (topk && !in_list(b->inputs, inputs[k])) continue;
                if (p.queries >= p.context) die(2, cases[i].name, ": --context must be larger than --queries");
                if (b->counting) b->lines += b->threads.n;
                else cases[i].run(b, &p);
            }
    }
    b->threads.n = all_threads;
}

static int usage(const char *what, const char *detail)
{
    fprintf(stderr, "bench: %s%s (bench --help explains)\n", what, detail);
    return 2;
}

static int parse_numbers(const char *text, int64_t most, numbers *out)   /* "64K,1M" */
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

static int parse_isa(const char *text, dsa_isa *isa)
{
    for (int i = DSA_ISA_AUTO; i <= DSA_ISA_NEON; i++)
        if (strcmp(dsa_isa_name((dsa_isa)i), text) == 0) { *isa = (dsa_isa)i; return 0; }
    return -1;
}

/* Every name of the list is one of the n known ones. */
static int known(const char *list, const char *const *names, size_t n)
{
    size_t length = 0, found = 0;
    for (const char *c = list; *c; c++) length += *c == ',';
    for (size_t i = 0; i < n; i++) found += (size_t)in_list(list, names[i]);
    return *list && found == length + 1;
}

#ifndef BENCH_MAIN
#  define BENCH_MAIN main           /* bench_peers.c has its own */
#endif
int BENCH_MAIN(int argc, char **argv)
{
    static bench b;
    const char *names[N_CASES + N_UNITS];
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    numbers one;
    int n_cases = 0;
    FILE *head;
#ifdef DSA_CUDA
    if (argc > 1 && strcmp(argv[1], "--cuda") == 0) return bench_cuda(argc - 2, argv + 2);
#endif
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
        else if (strcmp(o, "--context") == 0) bad = parse_numbers(v, 1 << 24, &b.contexts) != 0;
        else if (strcmp(o, "--queries") == 0) bad = parse_numbers(v, 1024, &b.queries) != 0;
        else if (strcmp(o, "--threads") == 0) bad = parse_numbers(v, 256, &b.threads) != 0;
        else if (strcmp(o, "--page") == 0) { bad = parse_numbers(v, 1 << 20, &one) != 0 || one.n != 1; b.page = bad ? 0 : (int32_t)one.x[0]; }
        else if (strcmp(o, "--seconds") == 0) { bad = parse_numbers(v, 3600, &one) != 0 || one.n != 1; b.seconds = bad ? 0 : (double)one.x[0]; }
        else if (strcmp(o, "--sweep") == 0) b.sweep = v;
        else if (strcmp(o, "--isa") == 0) bad = parse_isa(v, &b.isa) != 0;
        else return usage("unknown option: ", o);
        if (bad) return usage("no such value, or out of range: ", v);
    }
    if (b.threads.n == 0) {
        b.threads.x[b.threads.n++] = 1;
        if (processors > 1) b.threads.x[b.threads.n++] = processors > 256 ? 256 : processors;
    }
    b.counting = 1;
    for (size_t i = 0; i < N_CASES; i++) if (in_list(b.cases, cases[i].name)) { n_cases++; each(&b, i); }
    b.counting = 0;
    if (n_cases > 0 && b.lines == 0) return usage("none of these cases has such a format or input", "");
    head = b.json ? stderr : stdout;
    machine_open(&b.m, b.huge);
    set_threads(&b, 1);                                      /* a forced ISA that is missing ends here */
    print_machine(head, "bench");
    fprintf(head, "ISA       %s; caches %s, in %s pages\n\n", dsa_isa_name(dsa_query_isa(&b.ctx)), b.page ? "paged" : "contiguous", b.huge ? "huge" : "ordinary");
    for (double warm = now(); now() - warm < 0.5;) peak_measure(&b.m, UNIT_F32, dsa_query_isa(&b.ctx), NULL);
    if (b.sweep) {
        sweep(&b);
    } else {
        b.deadline = now() + (b.seconds > 0 ? b.seconds : n_cases == 1 ? 40 : 100);
        if (!b.json)
            printf("%-16s %-6s %-10s %8s %7s %7s %-7s %10s %10s %7s %9s %7s\n", "case", "format", "input", "context", "queries", "threads", "isa", "ms",
                   "floor ms", "ratio", "GFLOP/s", "GB/s");
        for (int32_t t = 0; t < b.threads.n; t++) {
            set_threads(&b, b.threads.x[t]);
            print_peaks(&b, &b.m, n_cases > 0);
        }
        b.last = now();
        for (size_t i = 0; i < N_CASES; i++) if (in_list(b.cases, cases[i].name)) each(&b, i);
    }
    for (int i = 0; i < 2; i++) rows_free(&b.kept[i]);
    free(b.work);
    machine_close(&b.m);
    return fflush(stdout) != 0 || ferror(stdout) ? 2 : 0;
}

/* dsa_score and dsa_score_select against the formula in double precision, over every key format. */
#define _POSIX_C_SOURCE 200809L
#include "../dsa.h"
#include "harness.h"
#include "brute.h"

/* ---- a world: sequences with index keys, queries and weights ------------------------------------------ */
enum { MAX_SEQS = 7 };

typedef struct shape {
    dsa_isa isa;
    dsa_type format;
    dsa_hadamard hadamard;
    int32_t heads, dim;
    int32_t page_size;              /* 0: every sequence contiguous in memory of its own; else shuffled pages of one pool */
} shape;

typedef struct world {
    shape shape;
    int32_t n_seqs;
    int64_t rows, len[MAX_SEQS];
    int32_t n_q[MAX_SEQS];
    float *keys[MAX_SEQS], *q, *w;  /* [len, D], [rows, HI, D], [rows, HI] */
    dsa_cache cache[MAX_SEQS];
    dsa_seq seqs[MAX_SEQS];
    void *memory[MAX_SEQS];
    int32_t *table;
} world;

static dsa_ctx context(const shape *s, int32_t n_threads, dsa_parallel_for parallel_for, void *user)
{
    dsa_config config;
    dsa_ctx ctx;
    memset(&config, 0, sizeof config);
    config.isa = s->isa;
    config.n_index_heads = s->heads;
    config.dim_index = s->dim;
    config.index_rope_width = DSA_NONE;
    config.hadamard = s->hadamard;
    config.n_threads = n_threads;
    config.parallel_for = parallel_for;
    config.parallel_user = user;
    if (dsa_init(&ctx, &config) != DSA_OK) { fprintf(stderr, "test: dsa_init failed\n"); abort(); }
    return ctx;
}

/* Draws keys, queries and weights; a test may change them before world_fill writes the caches. The draw depends on the
   seed and the sequence's number only, not on format or paging. n_q 0 stands for no query of that sequence. */
static world world_new(shape s, uint64_t seed, int32_t n_seqs, const int64_t *len, const int32_t *n_q)
{
    world g;
    memset(&g, 0, sizeof g);
    g.shape = s;
    g.n_seqs = n_seqs;
    for (int32_t i = 0; i < n_seqs; i++) {
        brute_rng r = { seed * 1000 + (uint64_t)i };
        g.len[i] = len[i];
        g.n_q[i] = n_q[i];
        g.rows += n_q[i];
        g.keys[i] = brute_normals(&r, len[i] * s.dim);
    }
    brute_rng r = { seed * 1000 + 999 };
    g.q = brute_normals(&r, g.rows * s.heads * s.dim);
    g.w = brute_normals(&r, g.rows * s.heads);
    return g;
}

/* Appends the keys. All memory is full of `filler` first, so that rows and pages which hold no key are NaN under 0xFF. */
static dsa_status world_fill(world *g, int filler)
{
    dsa_ctx ctx = context(&g->shape, 1, NULL, NULL);
    dsa_status status = DSA_OK;
    int64_t n_pages = 3, n_blocks[MAX_SEQS], first = 0, total = 0;
    int32_t page = g->shape.page_size;
    for (int32_t i = 0; i < g->n_seqs; i++) {
        n_blocks[i] = page > 0 ? (g->len[i] + page - 1) / page + 1 : 1;      /* a spare block each */
        n_pages += n_blocks[i];
        total += g->len[i];
    }
    if (page > 0) {
        brute_rng r = { 77 };
        size_t bytes = 0;
        status = dsa_page_bytes(DSA_INDEX_KEY, g->shape.format, g->shape.dim, 0, page, &bytes);
        g->memory[0] = brute_alloc((size_t)n_pages * bytes);
        memset(g->memory[0], filler, (size_t)n_pages * bytes);
        g->table = brute_alloc((size_t)n_pages * sizeof *g->table);
        for (int64_t i = 0; i < n_pages; i++) g->table[i] = (int32_t)i;
        brute_shuffle(&r, g->table, n_pages);
    }
    float *rows = brute_alloc((size_t)(total * g->shape.dim) * sizeof *rows), *next = rows;
    for (int32_t i = 0; i < g->n_seqs && status == DSA_OK; i++) {
        dsa_cache_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.kind = DSA_INDEX_KEY;
        desc.format = g->shape.format;
        desc.capacity = g->len[i] + 9;
        desc.page_size = page;
        if (page > 0) {
            desc.capacity = n_blocks[i] * page;
            status = dsa_cache_view(&ctx, &desc, g->memory[0], n_pages, 0, g->table + first, n_blocks[i], 0, &g->cache[i]);
        } else {
            size_t bytes = 0;
            status = dsa_cache_bytes(&ctx, &desc, &bytes);
            if (status != DSA_OK) break;
            g->memory[i] = brute_alloc(bytes);
            memset(g->memory[i], filler, bytes);
            status = dsa_cache_init(&ctx, &desc, g->memory[i], bytes, &g->cache[i]);
        }
        first += n_blocks[i];
        g->seqs[i].index = &g->cache[i];
        g->seqs[i].n_q = g->len[i] > 0 ? (int32_t)g->len[i] : DSA_NONE;
        memcpy(next, g->keys[i], (size_t)(g->len[i] * g->shape.dim) * sizeof *next);
        next += g->len[i] * g->shape.dim;
    }
    dsa_append_args args;
    memset(&args, 0, sizeof args);
    args.n_seqs = g->n_seqs;
    args.seqs = g->seqs;
    args.index_key = rows;
    if (status == DSA_OK) status = dsa_append(&ctx, &args);
    free(rows);
    for (int32_t i = 0; i < g->n_seqs; i++) g->seqs[i].n_q = g->n_q[i] > 0 ? g->n_q[i] : DSA_NONE;
    return status;
}

/* seqs point into the world itself: it may not be copied once filled. */
static void world_free(world *g)
{
    for (int32_t i = 0; i < g->n_seqs; i++) { free(g->keys[i]); free(g->memory[i]); }
    free(g->q); free(g->w); free(g->table);
}

static dsa_score_args args_of(const world *g)
{
    dsa_score_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = g->n_seqs;
    a.seqs = g->seqs;
    a.q = g->q;
    a.w = g->w;
    return a;
}

/* ---- running: a workspace of just the asked size, full of NaN, off every alignment ----------------------------- */
static dsa_status run_score(const dsa_ctx *ctx, dsa_score_args args, float *scores, int64_t n_cols, int64_t stride)
{
    size_t bytes = 0;
    dsa_status status = dsa_score_workspace(ctx, &args, &bytes);
    if (status != DSA_OK) return status;
    unsigned char *memory = brute_alloc(bytes + 1);
    memset(memory, 0xFF, bytes + 1);
    args.workspace = memory + 1;
    args.workspace_size = bytes;
    status = dsa_score(ctx, &args, scores, n_cols, stride);
    free(memory);
    return status;
}

static dsa_status run_score_select(const dsa_ctx *ctx, dsa_score_args args, const dsa_selection *out)
{
    size_t bytes = 0;
    dsa_status status = dsa_score_select_workspace(ctx, &args, out, &bytes);
    if (status != DSA_OK) return status;
    unsigned char *memory = brute_alloc(bytes + 1);
    memset(memory, 0xFF, bytes + 1);
    args.workspace = memory + 1;
    args.workspace_size = bytes;
    status = dsa_score_select(ctx, &args, out);
    free(memory);
    return status;
}

static dsa_selection selection_of(int32_t k, dsa_order order, int32_t *indices, float *scores, int32_t *counts)
{
    dsa_selection s;
    memset(&s, 0, sizeof s);
    s.top_k = k;
    s.order = order;
    s.indices = indices;
    s.scores = scores;
    s.counts = counts;
    return s;
}

/* The row's key range by the rules of dsa_seq and dsa_score_args. */
static void range_of(const world *g, const int64_t *ks, const int64_t *ke, int64_t row, int32_t seq, int32_t query, int64_t *begin, int64_t *end)
{
    *begin = ks ? ks[row] : 0;
    *end = ke ? ke[row] : g->len[seq] - g->n_q[seq] + query + 1;
    if (*begin < 0) *begin = 0;
    if (*end > g->len[seq]) *end = g->len[seq];
    if (*end < *begin) *end = *begin;
}

static int rotated(const shape *s)
{
    return s->hadamard == DSA_HADAMARD_ON || (s->hadamard == DSA_HADAMARD_AUTO && (s->format == DSA_FP8 || s->format == DSA_INT8));
}

/* Every score of every row in double against `scores` [rows, stride], -inf outside the range. exact: to the last bit. */
static enum greatest_test_res check_scores(const world *g, const int64_t *ks, const int64_t *ke, const float *scores, int64_t n_cols, int64_t stride, int exact)
{
    size_t heads = (size_t)g->shape.heads, dim = (size_t)g->shape.dim;
    double *q = brute_alloc(heads * dim * sizeof *q), *keys = NULL;
    int64_t row = 0, bad_row = -1, bad_col = 0;
    double want_bad = 0, got_bad = 0, bound_bad = 0;
    for (int32_t s = 0; s < g->n_seqs && bad_row < 0; s++) {
        keys = brute_alloc((size_t)g->len[s] * dim * sizeof *keys);
        for (int64_t i = 0; i < g->len[s]; i++)
            brute_round_row(g->shape.format, rotated(&g->shape), g->keys[s] + i * g->shape.dim, g->shape.dim, keys + (size_t)i * dim);
        for (int32_t i = 0; i < g->n_q[s] && bad_row < 0; i++, row++) {
            int64_t begin, end;
            range_of(g, ks, ke, row, s, i, &begin, &end);
            for (size_t h = 0; h < heads; h++)
                brute_round_row(g->shape.format, rotated(&g->shape), g->q + ((size_t)row * heads + h) * dim, g->shape.dim, q + h * dim);
            for (int64_t c = 0; c < n_cols && bad_row < 0; c++) {
                double want = -HUGE_VAL, bound = 0, got = (double)scores[row * stride + c];
                if (c >= begin && c < end)
                    want = brute_index_score(g->shape.heads, g->shape.dim, q, g->w + (size_t)row * heads, keys + (size_t)c * dim, &bound);
                if (exact) bound = 0;
                if (!(got == want || fabs(got - want) <= bound)) {
                    bad_row = row; bad_col = c; want_bad = want; got_bad = got; bound_bad = bound;
                }
            }
        }
        free(keys);
    }
    free(q);
    if (bad_row >= 0) {
        printf("\n  row %lld key %lld: expected %.9g +- %.2g, got %.9g", (long long)bad_row, (long long)bad_col, want_bad, bound_bad, got_bad);
        FAILm("a score is off");
    }
    PASS();
}

/* ---- score -------------------------------------------------------------------------------------------------------- */
static const int64_t ragged_len[] = { 70, 1, 133, 40 };
static const int32_t ragged_n_q[] = { 3, 1, 1, 40 };
enum { RAGGED = 4, RAGGED_ROWS = 45 };

TEST scores_match_double(shape s)
{
    enum { COLS = 140, STRIDE = 150 };
    world g = world_new(s, 1, RAGGED, ragged_len, ragged_n_q);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    dsa_status filled = world_fill(&g, 0xFF), status = DSA_OK;
    float *scores = brute_alloc(sizeof *scores * RAGGED_ROWS * STRIDE);
    for (int i = 0; i < RAGGED_ROWS * STRIDE; i++) scores[i] = 12345;
    if (filled == DSA_OK) status = run_score(&ctx, args_of(&g), scores, COLS, STRIDE);
    enum greatest_test_res ended = GREATEST_TEST_RES_PASS;
    int gap = 1;
    if (filled == DSA_OK && status == DSA_OK) {
        ended = check_scores(&g, NULL, NULL, scores, COLS, STRIDE, 0);
        for (int t = 0; t < RAGGED_ROWS; t++) for (int c = COLS; c < STRIDE; c++) gap = gap && scores[t * STRIDE + c] == 12345;
    }
    free(scores);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)filled, "%d");
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(gap);
    return ended;
}

/* Fewer columns than keys: the rest of the scores goes nowhere, not even into the gap behind the columns. */
TEST columns_bound_what_is_written(shape s)
{
    enum { COLS = 30, STRIDE = 50 };
    world g = world_new(s, 20, RAGGED, ragged_len, ragged_n_q);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    dsa_status status = world_fill(&g, 0xFF);
    float scores[RAGGED_ROWS * STRIDE];
    int gap = 1;
    for (int i = 0; i < RAGGED_ROWS * STRIDE; i++) scores[i] = 12345;
    if (status == DSA_OK) status = run_score(&ctx, args_of(&g), scores, COLS, STRIDE);
    enum greatest_test_res ended = GREATEST_TEST_RES_PASS;
    if (status == DSA_OK) ended = check_scores(&g, NULL, NULL, scores, COLS, STRIDE, 0);
    for (int t = 0; t < RAGGED_ROWS; t++) for (int c = COLS; c < STRIDE; c++) gap = gap && scores[t * STRIDE + c] == 12345;
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(gap);
    return ended;
}

/* Small integers keep every sum exact, so scores must equal the formula to the bit in whatever order they are summed,
   and the selection must equal qsort's with its many ties. */
static void make_integers(world *g)
{
    brute_rng r = { 4242 };
    for (int32_t s = 0; s < g->n_seqs; s++)
        for (int64_t i = 0; i < g->len[s] * g->shape.dim; i++) g->keys[s][i] = (float)(brute_below(&r, 5) - 2);
    for (int64_t i = 0; i < g->rows * g->shape.heads * g->shape.dim; i++) g->q[i] = (float)(brute_below(&r, 5) - 2);
    for (int64_t i = 0; i < g->rows * g->shape.heads; i++) g->w[i] = (float)(brute_below(&r, 9) - 4) / 4;
}

TEST integers_are_exact(shape s, dsa_order order)
{
    enum { COLS = 600, ROWS = 6, K = 50 };
    static const int64_t len[2] = { 600, 377 };
    static const int32_t n_q[2] = { 4, 2 };
    world g = world_new(s, 2, 2, len, n_q);
    make_integers(&g);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    dsa_status filled = world_fill(&g, 0xFF), status = DSA_OK, selected = DSA_OK;
    float *scores = brute_alloc(sizeof *scores * ROWS * COLS), got_scores[ROWS * K], want_scores[K];
    int32_t got[ROWS * K], want[K], counts[ROWS], same = 1;
    dsa_selection out = selection_of(K, order, got, got_scores, counts);
    if (filled == DSA_OK) status = run_score(&ctx, args_of(&g), scores, COLS, COLS);
    if (filled == DSA_OK) selected = run_score_select(&ctx, args_of(&g), &out);
    enum greatest_test_res ended = GREATEST_TEST_RES_PASS;
    if (filled == DSA_OK && status == DSA_OK && selected == DSA_OK) {
        ended = check_scores(&g, NULL, NULL, scores, COLS, COLS, 1);
        for (int t = 0; t < ROWS; t++) {
            int32_t n = brute_topk(scores + t * COLS, COLS, 0, COLS, K, order, want, want_scores);
            same = same && n == counts[t] && memcmp(want, got + t * K, sizeof want) == 0;
            for (int i = 0; i < K; i++) same = same && want_scores[i] == got_scores[t * K + i];
        }
    }
    free(scores);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)filled, "%d");
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT_EQ_FMT((int)DSA_OK, (int)selected, "%d");
    if (ended == GREATEST_TEST_RES_PASS) ASSERT(same);
    return ended;
}

/* Two heads written out: w = (1, -2), dots (3, -1) give 3; (-3, 2) give -4; (-1, -1) give 0, which beats -4. */
TEST relu_and_negative_weights(dsa_isa isa)
{
    shape s = { isa, DSA_F32, DSA_HADAMARD_OFF, 2, 2, 0 };
    static const int64_t len[1] = { 3 };
    static const int32_t n_q[1] = { 1 };
    static const float keys[6] = { -3, 2, -1, -1, 3, -1 }, q[4] = { 1, 0, 0, 1 }, w[2] = { 1, -2 };
    world g = world_new(s, 3, 1, len, n_q);
    memcpy(g.keys[0], keys, sizeof keys);
    memcpy(g.q, q, sizeof q);
    memcpy(g.w, w, sizeof w);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    float scores[3] = { 0, 0, 0 };
    int32_t indices[2] = { 0, 0 };
    dsa_selection out = selection_of(2, DSA_ORDER_RANK, indices, NULL, NULL);
    dsa_status filled = world_fill(&g, 0xFF), status = run_score(&ctx, args_of(&g), scores, 3, 3);
    dsa_status selected = run_score_select(&ctx, args_of(&g), &out);
    world_free(&g);
    ASSERT_EQ(DSA_OK, filled);
    ASSERT_EQ(DSA_OK, status);
    ASSERT_EQ(DSA_OK, selected);
    ASSERT_EQ_FMT(-4.0, (double)scores[0], "%g");
    ASSERT_EQ_FMT(0.0, (double)scores[1], "%g");
    ASSERT_EQ_FMT(3.0, (double)scores[2], "%g");
    ASSERT_EQ_FMT(2, indices[0], "%d");
    ASSERT_EQ_FMT(1, indices[1], "%d");
    PASS();
}

/* Ranges clamped, empty, reversed, past the causal limit; keys outside the range that is asked for are NaN in no case. */
TEST ranges_are_half_open_and_clamped(shape s)
{
    enum { LEN = 90, ROWS = 10, K = 20 };
    static const int64_t len[1] = { LEN };
    static const int32_t n_q[1] = { ROWS };
    static const int64_t ks[ROWS] = { 0, 0, 89, 45, 46, -7, INT64_MIN, 90, 30, 10 };
    static const int64_t ke[ROWS] = { 90, 1, 90, 45, 45, 5, INT64_MAX, 120, 500, 40 };
    world g = world_new(s, 4, 1, len, n_q);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    dsa_status filled = world_fill(&g, 0xFF), status = DSA_OK, selected = DSA_OK;
    float scores[ROWS * LEN];
    int32_t got[ROWS * K], want[K], counts[ROWS], same = 1;
    dsa_score_args args = args_of(&g);
    args.ks = ks;
    args.ke = ke;
    dsa_selection out = selection_of(K, DSA_ORDER_INDEX, got, NULL, counts);
    if (filled == DSA_OK) status = run_score(&ctx, args, scores, LEN, LEN);
    if (filled == DSA_OK) selected = run_score_select(&ctx, args, &out);
    enum greatest_test_res ended = GREATEST_TEST_RES_PASS;
    if (filled == DSA_OK && status == DSA_OK && selected == DSA_OK) {
        ended = check_scores(&g, ks, ke, scores, LEN, LEN, 0);
        for (int t = 0; t < ROWS; t++) {
            int32_t n = brute_topk(scores + t * LEN, LEN, ks[t], ke[t], K, DSA_ORDER_INDEX, want, NULL);
            same = same && n == counts[t] && memcmp(want, got + t * K, sizeof want) == 0;
        }
    }
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)filled, "%d");
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT_EQ_FMT((int)DSA_OK, (int)selected, "%d");
    if (ended == GREATEST_TEST_RES_PASS) ASSERT(same);
    return ended;
}

/* H is orthonormal: rotating queries and keys leaves f32 scores where they were, up to rounding. */
TEST hadamard_keeps_f32_scores(dsa_isa isa)
{
    enum { LEN = 50 };
    static const int64_t len[1] = { LEN };
    static const int32_t n_q[1] = { 1 };
    float scores[2][LEN];
    for (int on = 0; on < 2; on++) {
        shape s = { isa, DSA_F32, on ? DSA_HADAMARD_ON : DSA_HADAMARD_OFF, 8, 64, 0 };
        world g = world_new(s, 5, 1, len, n_q);
        dsa_ctx ctx = context(&s, 1, NULL, NULL);
        dsa_status filled = world_fill(&g, 0xFF), status = run_score(&ctx, args_of(&g), scores[on], LEN, LEN);
        int flag = g.cache[0].hadamard;
        world_free(&g);
        ASSERT_EQ(DSA_OK, filled);
        ASSERT_EQ(DSA_OK, status);
        ASSERT_EQ_FMT(on, flag, "%d");
    }
    for (int i = 0; i < LEN; i++) ASSERT_IN_RANGE(scores[0][i], scores[1][i], 2e-4);
    ASSERT(memcmp(scores[0], scores[1], sizeof scores[0]) != 0);     /* it did rotate */
    PASS();
}

TEST hadamard_wants_a_power_of_two(dsa_type format, dsa_hadamard hadamard)
{
    shape s = { DSA_ISA_AUTO, format, DSA_HADAMARD_AUTO, 3, 96, 0 };
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    dsa_cache_desc desc;
    dsa_cache cache, before;
    size_t bytes = 0;
    memset(&desc, 0, sizeof desc);
    desc.kind = DSA_INDEX_KEY;
    desc.format = format;
    desc.capacity = 10;
    desc.hadamard = DSA_HADAMARD_OFF;
    ASSERT_EQ(DSA_OK, dsa_cache_bytes(&ctx, &desc, &bytes));
    desc.hadamard = hadamard;
    memset(&cache, 0x11, sizeof cache);
    memcpy(&before, &cache, sizeof cache);
    void *memory = brute_alloc(bytes);
    dsa_status init = dsa_cache_init(&ctx, &desc, memory, bytes, &cache);
    free(memory);
    ASSERT_EQ_FMT((int)DSA_ERR_SHAPE, (int)init, "%d");
    ASSERT_MEM_EQ(&before, &cache, sizeof cache);
    PASS();
}

/* seq.len may be less than the cache's: readers beside an appender. */
TEST own_length_equals_truncated_cache(shape s)
{
    enum { LEN = 80, OWN = 61, N_Q = 4 };
    static const int64_t len[1] = { LEN };
    static const int32_t n_q[1] = { N_Q };
    world g = world_new(s, 6, 1, len, n_q);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    float own[N_Q * LEN], cut[N_Q * LEN];
    dsa_status status = world_fill(&g, 0xFF);
    g.seqs[0].len = OWN;
    if (status == DSA_OK) status = run_score(&ctx, args_of(&g), own, LEN, LEN);
    g.seqs[0].len = 0;
    if (status == DSA_OK) status = dsa_cache_truncate(&ctx, &g.cache[0], OWN);
    if (status == DSA_OK) status = run_score(&ctx, args_of(&g), cut, LEN, LEN);
    enum greatest_test_res ended = GREATEST_TEST_RES_PASS;
    g.len[0] = OWN;
    if (status == DSA_OK) ended = check_scores(&g, NULL, NULL, own, LEN, LEN, 0);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT_MEM_EQ(cut, own, sizeof own);
    return ended;
}

/* args.n_index_heads stands over the config's. */
TEST heads_of_the_call(dsa_isa isa)
{
    enum { LEN = 33 };
    shape s = { isa, DSA_F32, DSA_HADAMARD_OFF, 5, 16, 0 }, other = { isa, DSA_F32, DSA_HADAMARD_OFF, 64, 16, 0 };
    static const int64_t len[1] = { LEN };
    static const int32_t n_q[1] = { 2 };
    world g = world_new(s, 7, 1, len, n_q);
    dsa_ctx ctx = context(&other, 1, NULL, NULL);
    float scores[2 * LEN];
    dsa_status status = world_fill(&g, 0xFF);
    dsa_score_args args = args_of(&g);
    args.n_index_heads = 5;
    if (status == DSA_OK) status = run_score(&ctx, args, scores, LEN, LEN);
    enum greatest_test_res ended = GREATEST_TEST_RES_PASS;
    if (status == DSA_OK) ended = check_scores(&g, NULL, NULL, scores, LEN, LEN, 0);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    return ended;
}

/* ---- same bits ------------------------------------------------------------------------------------------------------ */
/* What a world gives: all scores, a selection in index order (with the dense fallback) and one by rank with scores. */
typedef struct outcome {
    int64_t rows, cols;
    int32_t k;
    float *scores, *best;
    int32_t *indices, *ranked, *counts;
} outcome;

static outcome outcome_new(int64_t rows, int64_t cols, int32_t k)
{
    outcome o = { rows, cols, k, NULL, NULL, NULL, NULL, NULL };
    size_t places = (size_t)rows * (size_t)k;
    o.scores = brute_alloc((size_t)rows * (size_t)cols * sizeof *o.scores);
    o.best = brute_alloc(places * sizeof *o.best);
    o.indices = brute_alloc(places * sizeof *o.indices);
    o.ranked = brute_alloc(places * sizeof *o.ranked);
    o.counts = brute_alloc((size_t)rows * sizeof *o.counts);
    return o;
}
static void outcome_free(outcome *o) { free(o->scores); free(o->best); free(o->indices); free(o->ranked); free(o->counts); }

/* Rows [first, first + args' rows) of the outcome. */
static dsa_status outcome_run(const dsa_ctx *ctx, dsa_score_args args, int64_t first, outcome *o)
{
    dsa_status status = run_score(ctx, args, o->scores + first * o->cols, o->cols, o->cols);
    dsa_selection by_index = selection_of(o->k, DSA_ORDER_INDEX, o->indices + first * o->k, NULL, o->counts + first);
    if (status == DSA_OK) status = run_score_select(ctx, args, &by_index);
    dsa_selection by_rank = selection_of(o->k, DSA_ORDER_RANK, o->ranked + first * o->k, o->best + first * o->k, NULL);
    if (status == DSA_OK) status = run_score_select(ctx, args, &by_rank);
    return status;
}

static int same_bits(const outcome *a, const outcome *b)
{
    size_t places = (size_t)a->rows * (size_t)a->k;
    return memcmp(a->scores, b->scores, (size_t)a->rows * (size_t)a->cols * sizeof *a->scores) == 0
        && memcmp(a->best, b->best, places * sizeof *a->best) == 0
        && memcmp(a->indices, b->indices, places * sizeof *a->indices) == 0
        && memcmp(a->ranked, b->ranked, places * sizeof *a->ranked) == 0
        && memcmp(a->counts, b->counts, (size_t)a->rows * sizeof *a->counts) == 0;
}

/* the fourth sequence asks nothing, the sixth has more queries than rows, the last is empty */
static const int64_t batch_len[] = { 700, 3, 290, 64, 65, 2, 0 };
static const int32_t batch_n_q[] = { 2, 1, 17, 0, 5, 4, 1 };
enum { BATCH = 7, BATCH_ROWS = 30, BATCH_COLS = 700, BATCH_K = 48 };

/* The selection fused with scoring equals selection from the stored scores, in both orders, scores and all. */
TEST fused_equals_score_then_select(shape s)
{
    world g = world_new(s, 8, BATCH, batch_len, batch_n_q);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    outcome o = outcome_new(BATCH_ROWS, BATCH_COLS, BATCH_K);
    dsa_status status = world_fill(&g, 0xFF);
    if (status == DSA_OK) status = outcome_run(&ctx, args_of(&g), 0, &o);
    int32_t want[BATCH_K], same = 1;
    float best[BATCH_K];
    for (int64_t t = 0; t < BATCH_ROWS && status == DSA_OK; t++) {
        const float *row = o.scores + t * BATCH_COLS;
        int32_t n = brute_topk(row, BATCH_COLS, 0, BATCH_COLS, BATCH_K, DSA_ORDER_INDEX, want, NULL);
        same = same && n == o.counts[t] && memcmp(want, o.indices + t * BATCH_K, sizeof want) == 0;
        brute_topk(row, BATCH_COLS, 0, BATCH_COLS, BATCH_K, DSA_ORDER_RANK, want, best);
        same = same && memcmp(want, o.ranked + t * BATCH_K, sizeof want) == 0;
        for (int i = 0; i < BATCH_K; i++) same = same && best[i] == o.best[t * BATCH_K + i];
    }
    outcome_free(&o);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(same);
    PASS();
}

/* Each sequence alone, and each query alone with its own visible length, gives the bits of the whole batch. */
TEST batch_equals_single_queries(shape s)
{
    world g = world_new(s, 9, BATCH, batch_len, batch_n_q);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    outcome all = outcome_new(BATCH_ROWS, BATCH_COLS, BATCH_K), seqs = outcome_new(BATCH_ROWS, BATCH_COLS, BATCH_K),
            single = outcome_new(BATCH_ROWS, BATCH_COLS, BATCH_K);
    dsa_status status = world_fill(&g, 0xFF);
    if (status == DSA_OK) status = outcome_run(&ctx, args_of(&g), 0, &all);
    int64_t row = 0, per_row = (int64_t)s.heads * s.dim;
    for (int32_t i = 0; i < BATCH && status == DSA_OK; i++) {
        dsa_seq seq = g.seqs[i];
        dsa_score_args args = args_of(&g);
        args.n_seqs = 1;
        args.seqs = &seq;
        args.q = g.q + row * per_row;
        args.w = g.w + row * s.heads;
        if (g.n_q[i] > 0) status = outcome_run(&ctx, args, row, &seqs);
        for (int32_t j = 0; j < g.n_q[i] && status == DSA_OK; j++, row++) {
            seq.n_q = 1;
            int64_t visible = g.len[i] - g.n_q[i] + j + 1;
            seq.len = visible > 0 ? visible : DSA_NONE;
            args.q = g.q + row * per_row;
            args.w = g.w + row * s.heads;
            status = outcome_run(&ctx, args, row, &single);
        }
    }
    int by_seq = status == DSA_OK && same_bits(&all, &seqs), by_query = status == DSA_OK && same_bits(&all, &single);
    outcome_free(&all); outcome_free(&seqs); outcome_free(&single);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(by_seq);
    ASSERT(by_query);
    PASS();
}

/* Shuffled pages of one shared pool give the bits of contiguous caches. */
TEST paged_equals_contiguous(shape s)
{
    static const int32_t pages[] = { 1, 3, 16, 64, 100, 1024 };
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    outcome plain = outcome_new(BATCH_ROWS, BATCH_COLS, BATCH_K), paged = outcome_new(BATCH_ROWS, BATCH_COLS, BATCH_K);
    world g = world_new(s, 10, BATCH, batch_len, batch_n_q);
    dsa_status status = world_fill(&g, 0xFF);
    if (status == DSA_OK) status = outcome_run(&ctx, args_of(&g), 0, &plain);
    world_free(&g);
    int same = 1;
    for (size_t i = 0; i < sizeof pages / sizeof *pages && status == DSA_OK && same; i++) {
        s.page_size = pages[i];
        world h = world_new(s, 10, BATCH, batch_len, batch_n_q);
        status = world_fill(&h, 0xFF);
        if (status == DSA_OK) status = outcome_run(&ctx, args_of(&h), 0, &paged);
        same = status == DSA_OK && same_bits(&plain, &paged);
        world_free(&h);
    }
    outcome_free(&plain); outcome_free(&paged);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(same);
    PASS();
}

TEST threads_do_not_matter(shape s)
{
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    outcome one = outcome_new(BATCH_ROWS, BATCH_COLS, BATCH_K), many = outcome_new(BATCH_ROWS, BATCH_COLS, BATCH_K);
    world g = world_new(s, 11, BATCH, batch_len, batch_n_q);
    dsa_status status = world_fill(&g, 0xFF);
    if (status == DSA_OK) status = outcome_run(&ctx, args_of(&g), 0, &one);
    int same = 1;
    for (int32_t n = 2; n <= 8 && status == DSA_OK && same; n += n < 4 ? 1 : 4) {
        dsa_pool *pool = NULL;
        int32_t most = 0;
        status = dsa_pool_create(NULL, n, &pool);
        dsa_ctx parallel = context(&s, n, dsa_pool_run, pool), reversed = context(&s, n, brute_reversed, &most);
        if (status == DSA_OK) status = outcome_run(&parallel, args_of(&g), 0, &many);
        same = status == DSA_OK && same_bits(&one, &many);
        if (status == DSA_OK) status = outcome_run(&reversed, args_of(&g), 0, &many);
        same = same && status == DSA_OK && same_bits(&one, &many) && most <= n;
        dsa_pool_destroy(pool);
    }
    world_free(&g);
    outcome_free(&one); outcome_free(&many);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(same);
    PASS();
}

/* One query over one long sequence: what decode does, and where the keys of a row are shared out among threads. */
TEST threads_do_not_matter_in_decode(shape s)
{
    enum { LEN = 20000, K = 300 };
    static const int64_t len[1] = { LEN };
    static const int32_t n_q[1] = { 1 };
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    outcome one = outcome_new(1, LEN, K), many = outcome_new(1, LEN, K);
    world g = world_new(s, 12, 1, len, n_q);
    for (int64_t i = 0; i < LEN; i++)                                 /* every key ten times: ties at the cut */
        memcpy(g.keys[0] + i * s.dim, g.keys[0] + i % (LEN / 10) * s.dim, (size_t)s.dim * sizeof(float));
    dsa_status status = world_fill(&g, 0xFF);
    if (status == DSA_OK) status = outcome_run(&ctx, args_of(&g), 0, &one);
    int32_t want[K];
    int same = 1, exact = 0;
    if (status == DSA_OK) {
        brute_topk(one.scores, LEN, 0, LEN, K, DSA_ORDER_RANK, want, NULL);
        exact = memcmp(want, one.ranked, sizeof want) == 0;
    }
    for (int32_t n = 2; n <= 8 && status == DSA_OK && same; n += n < 4 ? 1 : 4) {
        dsa_pool *pool = NULL;
        int32_t most = 0;
        status = dsa_pool_create(NULL, n, &pool);
        dsa_ctx parallel = context(&s, n, dsa_pool_run, pool), reversed = context(&s, n, brute_reversed, &most);
        if (status == DSA_OK) status = outcome_run(&parallel, args_of(&g), 0, &many);
        same = status == DSA_OK && same_bits(&one, &many);
        if (status == DSA_OK) status = outcome_run(&reversed, args_of(&g), 0, &many);
        same = same && status == DSA_OK && same_bits(&one, &many) && most <= n;
        dsa_pool_destroy(pool);
    }
    world_free(&g);
    outcome_free(&one); outcome_free(&many);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(exact);
    ASSERT(same);
    PASS();
}

/* With k >= length every key must come out, however the keys were shared out: lengths around blocks times threads. */
TEST every_key_is_seen(shape s)
{
    static const int64_t lens[] = { 1, 7, 63, 64, 65, 127, 129, 257, 511, 513, 600, 1025 };
    int all = 1, most_ok = 1;
    dsa_status status = DSA_OK;
    for (size_t i = 0; i < sizeof lens / sizeof *lens; i++) {
        static const int32_t n_q[1] = { 1 };
        int32_t k = (int32_t)lens[i] + 1, *got = brute_alloc((size_t)k * sizeof *got), count = 0;
        float *best = brute_alloc((size_t)k * sizeof *best);
        dsa_selection out = selection_of(k, DSA_ORDER_INDEX, got, best, &count);
        world g = world_new(s, 21, 1, &lens[i], n_q);
        if (status == DSA_OK) status = world_fill(&g, 0xFF);
        for (int32_t n = 1; n <= 8 && status == DSA_OK; n++) {
            int32_t most = 0;
            dsa_ctx ctx = context(&s, n, brute_reversed, &most);
            status = run_score_select(&ctx, args_of(&g), &out);
            all = all && count == lens[i] && got[lens[i]] == -1;
            for (int32_t j = 0; j < lens[i]; j++) all = all && got[j] == j;
            most_ok = most_ok && most <= n;
        }
        world_free(&g);
        free(got); free(best);
    }
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(all);
    ASSERT(most_ok);
    PASS();
}

/* What lies in rows behind len and in pages of nobody is never read: NaN there and zeros there give the same bits. */
TEST unused_memory_does_not_matter(shape s)
{
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    outcome o[2];
    dsa_status status = DSA_OK;
    s.page_size = 32;
    for (int i = 0; i < 2; i++) {
        world g = world_new(s, 13, BATCH, batch_len, batch_n_q);
        o[i] = outcome_new(BATCH_ROWS, BATCH_COLS, BATCH_K);
        if (status == DSA_OK) status = world_fill(&g, i == 0 ? 0xFF : 0);
        if (status == DSA_OK) status = outcome_run(&ctx, args_of(&g), 0, &o[i]);
        world_free(&g);
    }
    int same = status == DSA_OK && same_bits(&o[0], &o[1]);
    outcome_free(&o[0]); outcome_free(&o[1]);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(same);
    PASS();
}

/* ---- dense fallback and NaN ------------------------------------------------------------------------------------------ */
enum { FALLBACK_LEN = 40, FALLBACK_N_Q = 20, FALLBACK_K = 30 };      /* queries see 21 .. 40 rows: a chunk across the boundary */

static void poison_key(world *g, int64_t row)
{
    for (int32_t d = 0; d < g->shape.dim; d++) g->keys[0][row * g->shape.dim + d] = brute_float(0x7FC00000);
}

/* Rows with at most k visible keys take them all in ascending order, NaN keys included; the others never take a NaN key. */
TEST dense_fallback(shape s)
{
    static const int64_t len[1] = { FALLBACK_LEN };
    static const int32_t n_q[1] = { FALLBACK_N_Q };
    world g = world_new(s, 14, 1, len, n_q);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    poison_key(&g, 5);
    poison_key(&g, 20);
    dsa_status status = world_fill(&g, 0xFF);
    int32_t got[FALLBACK_N_Q * FALLBACK_K], counts[FALLBACK_N_Q];
    dsa_selection out = selection_of(FALLBACK_K, DSA_ORDER_INDEX, got, NULL, counts);
    if (status == DSA_OK) status = run_score_select(&ctx, args_of(&g), &out);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    for (int t = 0; t < FALLBACK_N_Q; t++) {
        int visible = FALLBACK_LEN - FALLBACK_N_Q + t + 1;
        const int32_t *list = got + t * FALLBACK_K;
        if (visible <= FALLBACK_K) {
            ASSERT_EQ_FMT(visible, counts[t], "%d");
            for (int i = 0; i < FALLBACK_K; i++) ASSERT_EQ_FMT(i < visible ? i : -1, list[i], "%d");
        } else {
            int most = visible - 2 < FALLBACK_K ? visible - 2 : FALLBACK_K;      /* two keys are NaN */
            ASSERT_EQ_FMT(most, counts[t], "%d");
            for (int i = 0; i < most; i++) {
                ASSERT(list[i] != 5 && list[i] != 20 && list[i] < visible);
                ASSERT(i == 0 || list[i] > list[i - 1]);
            }
            for (int i = most; i < FALLBACK_K; i++) ASSERT_EQ_FMT(-1, list[i], "%d");
        }
    }
    PASS();
}

/* By rank, or with scores asked for, short rows are scored like all others: NaN keys stay out. */
TEST no_fallback_when_scores_matter(shape s, dsa_order order, int with_scores)
{
    static const int64_t len[1] = { FALLBACK_LEN };
    static const int32_t n_q[1] = { FALLBACK_N_Q };
    world g = world_new(s, 15, 1, len, n_q);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    poison_key(&g, 0);
    poison_key(&g, 7);
    dsa_status status = world_fill(&g, 0xFF);
    float *scores = brute_alloc(sizeof *scores * FALLBACK_N_Q * FALLBACK_LEN), best[FALLBACK_N_Q * FALLBACK_K];
    int32_t got[FALLBACK_N_Q * FALLBACK_K], want[FALLBACK_K], counts[FALLBACK_N_Q], same = 1;
    dsa_selection out = selection_of(FALLBACK_K, order, got, with_scores ? best : NULL, counts);
    if (status == DSA_OK) status = run_score(&ctx, args_of(&g), scores, FALLBACK_LEN, FALLBACK_LEN);
    if (status == DSA_OK) status = run_score_select(&ctx, args_of(&g), &out);
    for (int t = 0; t < FALLBACK_N_Q && status == DSA_OK; t++) {
        float want_best[FALLBACK_K];
        int visible = FALLBACK_LEN - FALLBACK_N_Q + t + 1, most = visible - 2 < FALLBACK_K ? visible - 2 : FALLBACK_K;
        scores[t * FALLBACK_LEN] = scores[t * FALLBACK_LEN + 7] = -HUGE_VALF;    /* whatever they came out as */
        int32_t n = brute_topk(scores + t * FALLBACK_LEN, FALLBACK_LEN, 0, visible, FALLBACK_K, order, want, want_best);
        same = same && n == most && counts[t] == most && memcmp(want, got + t * FALLBACK_K, sizeof want) == 0;
        for (int i = 0; i < FALLBACK_K && with_scores; i++) same = same && want_best[i] == best[t * FALLBACK_K + i];
    }
    free(scores);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(same);
    PASS();
}

/* A key that is NaN in a single channel, with a query that multiplies it by zero there, with negative dots around it: ReLU
   must not turn its NaN into the 0 that would win. A NaN query row selects nothing and leaves its neighbours alone. */
TEST nan_is_never_selected(shape s)
{
    enum { LEN = 64, N_Q = 2, K = 8 };
    static const int64_t len[1] = { LEN };
    static const int32_t n_q[1] = { N_Q };
    world g = world_new(s, 16, 1, len, n_q);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    for (int64_t i = 0; i < LEN * s.dim; i++) g.keys[0][i] = fabsf(g.keys[0][i]) + 0.1f;
    for (int64_t i = 0; i < N_Q * s.heads * s.dim; i++) g.q[i] = fabsf(g.q[i]) + 0.1f;
    for (int64_t i = 0; i < N_Q * s.heads; i++) g.w[i] = -1;          /* honest scores are all below 0 */
    for (int64_t t = 0; t < N_Q; t++) for (int64_t h = 0; h < s.heads; h++) g.q[(t * s.heads + h) * s.dim + 1] = 0;
    g.keys[0][9 * s.dim + 1] = brute_float(0x7FC00000);
    g.keys[0][30 * s.dim] = brute_float(0xFFC00000);
    g.q[s.heads * s.dim] = brute_float(0x7FC00000);                   /* row 1, head 0 */
    dsa_status status = world_fill(&g, 0xFF);
    int32_t got[N_Q * K], counts[N_Q], clean = 1;
    dsa_selection out = selection_of(K, DSA_ORDER_INDEX, got, NULL, counts);
    if (status == DSA_OK) status = run_score_select(&ctx, args_of(&g), &out);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    for (int i = 0; i < K; i++) clean = clean && got[i] >= 0 && got[i] != 9 && got[i] != 30;
    ASSERT(clean);
    ASSERT_EQ_FMT(K, counts[0], "%d");
    ASSERT_EQ_FMT(0, counts[1], "%d");
    for (int i = 0; i < K; i++) ASSERT_EQ_FMT(-1, got[K + i], "%d");
    PASS();
}

/* A key of +inf scores +inf and comes first, or -inf under a negative weight and never comes. */
TEST infinite_keys(dsa_isa isa)
{
    enum { LEN = 40, N_Q = 2, K = LEN + 5 };
    shape s = { isa, DSA_F32, DSA_HADAMARD_OFF, 1, 2, 0 };
    static const int64_t len[1] = { LEN }, ks[N_Q] = { 0, 0 }, ke[N_Q] = { LEN, LEN };
    static const int32_t n_q[1] = { N_Q };
    world g = world_new(s, 19, 1, len, n_q);
    dsa_ctx ctx = context(&s, 1, NULL, NULL);
    for (int i = 0; i < LEN; i++) { g.keys[0][2 * i] = (float)i; g.keys[0][2 * i + 1] = 0; }
    g.keys[0][2 * 17] = HUGE_VALF;
    for (int t = 0; t < N_Q; t++) { g.q[2 * t] = 1; g.q[2 * t + 1] = 0; g.w[t] = t == 0 ? 1.0f : -1.0f; }
    int32_t got[N_Q * K];
    dsa_selection out = selection_of(K, DSA_ORDER_RANK, got, NULL, NULL);
    dsa_score_args args = args_of(&g);
    dsa_status status = world_fill(&g, 0xFF);
    args.ks = ks;
    args.ke = ke;
    if (status == DSA_OK) status = run_score_select(&ctx, args, &out);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT_EQ_FMT(17, got[0], "%d");
    for (int i = 1, key = LEN - 1; i < LEN; i++, key--) {
        key -= key == 17;
        ASSERT_EQ_FMT(key, got[i], "%d");
    }
    for (int i = LEN; i < K; i++) ASSERT_EQ_FMT(-1, got[i], "%d");
    for (int i = 0; i < LEN - 1; i++) ASSERT_EQ_FMT(i < 17 ? i : i + 1, got[K + i], "%d");
    for (int i = LEN - 1; i < K; i++) ASSERT_EQ_FMT(-1, got[K + i], "%d");
    PASS();
}

/* ---- workspace ---------------------------------------------------------------------------------------------------------- */
/* Score and select of one query over 2^20 keys at V3.2's sizes fits in 256 KiB per thread (issue 2, "Memory"). Only the
   size query runs, so the view may lie over memory that is not there. */
TEST workspace_is_bounded(dsa_isa isa, dsa_type format, int32_t n_threads)
{
    enum { LEN = 1 << 20 };
    shape s = { isa, format, DSA_HADAMARD_AUTO, 64, 128, 0 };
    dsa_ctx ctx = context(&s, n_threads, NULL, NULL);
    dsa_cache_desc desc;
    dsa_cache cache;
    dsa_seq seq;
    world g;
    float one[1] = { 0 };
    int32_t index[1];
    size_t bytes = 0;
    memset(&desc, 0, sizeof desc);
    memset(&cache, 0, sizeof cache);
    memset(&seq, 0, sizeof seq);
    memset(&g, 0, sizeof g);
    desc.kind = DSA_INDEX_KEY;
    desc.format = format;
    desc.capacity = LEN;
    desc.page_size = 64;
    ASSERT_EQ(DSA_OK, dsa_cache_view(&ctx, &desc, one, LEN / 64, 0, NULL, LEN / 64, LEN, &cache));
    seq.index = &cache;
    dsa_score_args args = args_of(&g);
    args.n_seqs = 1;
    args.seqs = &seq;
    args.q = one;
    args.w = one;
    for (int order = 0; order < 2; order++)
        for (int with_scores = 0; with_scores < 2; with_scores++) {
            dsa_selection out = selection_of(2048, order ? DSA_ORDER_RANK : DSA_ORDER_INDEX, index, with_scores ? one : NULL, NULL);
            ASSERT_EQ(DSA_OK, dsa_score_select_workspace(&ctx, &args, &out, &bytes));
            ASSERT(bytes > 0);
            ASSERT_LTE(bytes, (size_t)n_threads * 256 * 1024);
        }
    PASS();
}

TEST short_workspace_is_an_error(shape s)
{
    enum { K = BATCH_K, COLS = 32 };
    world g = world_new(s, 17, BATCH, batch_len, batch_n_q);
    dsa_ctx ctx = context(&s, 2, NULL, NULL);
    dsa_status status = world_fill(&g, 0xFF), query = DSA_OK, fused = DSA_OK, query_score = DSA_OK, plain = DSA_ERR_WORKSPACE;
    int32_t indices[BATCH_ROWS * K], counts[BATCH_ROWS], marks = 1;
    float best[BATCH_ROWS * K], scores[BATCH_ROWS * COLS];
    for (int i = 0; i < BATCH_ROWS * K; i++) { indices[i] = 7; best[i] = 7; }
    for (int i = 0; i < BATCH_ROWS; i++) counts[i] = 7;
    for (int i = 0; i < BATCH_ROWS * COLS; i++) scores[i] = 7;
    dsa_selection out = selection_of(K, DSA_ORDER_RANK, indices, best, counts);
    dsa_score_args args = args_of(&g);
    size_t bytes = 0, bytes_score = 0;
    if (status == DSA_OK) {
        query = dsa_score_select_workspace(&ctx, &args, &out, &bytes);
        query_score = dsa_score_workspace(&ctx, &args, &bytes_score);
        args.workspace = brute_alloc(bytes + bytes_score);
        args.workspace_size = bytes - 1;
        if (query == DSA_OK && bytes > 0) fused = dsa_score_select(&ctx, &args, &out);
        args.workspace_size = bytes_score - 1;
        if (query_score == DSA_OK && bytes_score > 0) plain = dsa_score(&ctx, &args, scores, COLS, COLS);
        free(args.workspace);
    }
    for (int i = 0; i < BATCH_ROWS * K; i++) marks = marks && indices[i] == 7 && best[i] == 7;
    for (int i = 0; i < BATCH_ROWS; i++) marks = marks && counts[i] == 7;
    for (int i = 0; i < BATCH_ROWS * COLS; i++) marks = marks && scores[i] == 7;
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT_EQ(DSA_OK, query);
    ASSERT_EQ(DSA_OK, query_score);
    ASSERT_EQ_FMT((int)DSA_ERR_WORKSPACE, (int)fused, "%d");
    ASSERT_EQ_FMT((int)DSA_ERR_WORKSPACE, (int)plain, "%d");
    ASSERT(marks);
    PASS();
}

/* ---- hostile keys at full length --------------------------------------------------------------------------------------- */
typedef enum hostile { ALL_EQUAL, ALL_ZERO, RISING, FALLING, ONE_OUTLIER, FEW_VALUES, HOSTILE_COUNT } hostile;
static const char *const hostile_names[HOSTILE_COUNT] = { "all_equal", "all_zero", "rising", "falling", "one_outlier", "few_values" };

/* 2^20 keys whose scores defeat a selection that hopes for random ones; one head, q = (1, 0, 0, 0), so that the score is the
   first channel and the answer is known. */
TEST hostile_keys_are_exact(dsa_isa isa, hostile kind)
{
    enum { LEN = 1 << 20, K = 2048, D = 4 };
    shape s = { isa, DSA_F32, DSA_HADAMARD_OFF, 1, D, 0 };
    static const int64_t len[1] = { LEN };
    static const int32_t n_q[1] = { 1 };
    world g = world_new(s, 18, 1, len, n_q);
    float *first = brute_alloc(sizeof *first * LEN);
    for (int i = 0; i < LEN; i++) {
        first[i] = kind == ALL_EQUAL ? 1.5f : kind == ALL_ZERO ? 0 : kind == RISING ? (float)i : kind == FALLING ? (float)(LEN - i)
                 : kind == ONE_OUTLIER ? (i == 777777 ? 1e30f : 1e-10f * (float)(i % 1000)) : (float)(i % 5 % 3);
        g.keys[0][i * D] = first[i];
    }
    g.q[0] = 1;
    g.q[1] = g.q[2] = g.q[3] = 0;
    g.w[0] = 1;
    int32_t *want = brute_alloc(sizeof *want * K), *got = brute_alloc(sizeof *got * K), count = 0, n_want;
    dsa_selection out = selection_of(K, DSA_ORDER_INDEX, got, NULL, &count);
    dsa_ctx ctx = context(&s, 2, NULL, NULL);
    dsa_status status = world_fill(&g, 0xFF);
    if (status == DSA_OK) status = run_score_select(&ctx, args_of(&g), &out);
    n_want = brute_topk(first, LEN, 0, LEN, K, DSA_ORDER_INDEX, want, NULL);
    int same = n_want == count && memcmp(want, got, sizeof *want * K) == 0;
    free(want); free(got); free(first);
    world_free(&g);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(same);
    PASS();
}

SUITE(score_suite)
{
    static const dsa_type formats[] = { DSA_F32, DSA_BF16, DSA_FP8, DSA_INT8 };
    static const struct { int32_t heads, dim; dsa_hadamard hadamard; } dims[] = {
        { 1, 1, DSA_HADAMARD_AUTO }, { 3, 4, DSA_HADAMARD_AUTO }, { 8, 32, DSA_HADAMARD_AUTO }, { 32, 64, DSA_HADAMARD_AUTO },
        { 64, 128, DSA_HADAMARD_AUTO }, { 3, 96, DSA_HADAMARD_OFF }, { 5, 7, DSA_HADAMARD_OFF }, { 4, 128, DSA_HADAMARD_OFF },
        { 3, 64, DSA_HADAMARD_ON } };
    dsa_isa isas[BRUTE_ISAS];
    int n_isas = brute_isas(isas);
    char name[64];
#define CASE(...) (snprintf(name, sizeof name, __VA_ARGS__), greatest_set_test_suffix(name))
    for (int i = 0; i < n_isas; i++) {
        const char *isa = dsa_isa_name(isas[i]);
        for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
            const char *format = brute_type_name(formats[f]);
            for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
                shape s = { isas[i], formats[f], dims[d].hadamard, dims[d].heads, dims[d].dim, 0 };
                CASE("%s_%s_%dx%d%s", isa, format, s.heads, s.dim,
                     s.hadamard == DSA_HADAMARD_ON ? "_rotated" : s.hadamard == DSA_HADAMARD_OFF ? "_plain" : "");
                RUN_TESTp(scores_match_double, s);
            }
            shape s = { isas[i], formats[f], DSA_HADAMARD_AUTO, 4, 32, 0 }, odd = { isas[i], formats[f], DSA_HADAMARD_OFF, 3, 20, 0 };
            CASE("%s_%s", isa, format);
            RUN_TESTp(ranges_are_half_open_and_clamped, s);
            CASE("%s_%s", isa, format);
            RUN_TESTp(own_length_equals_truncated_cache, s);
            CASE("%s_%s", isa, format);
            RUN_TESTp(fused_equals_score_then_select, s);
            CASE("%s_%s_odd", isa, format);
            RUN_TESTp(fused_equals_score_then_select, odd);
            CASE("%s_%s", isa, format);
            RUN_TESTp(batch_equals_single_queries, s);
            CASE("%s_%s_odd", isa, format);
            RUN_TESTp(batch_equals_single_queries, odd);
            CASE("%s_%s", isa, format);
            RUN_TESTp(paged_equals_contiguous, s);
            CASE("%s_%s_odd", isa, format);
            RUN_TESTp(paged_equals_contiguous, odd);
            CASE("%s_%s", isa, format);
            RUN_TESTp(threads_do_not_matter, s);
            CASE("%s_%s", isa, format);
            RUN_TESTp(threads_do_not_matter_in_decode, s);
            CASE("%s_%s", isa, format);
            RUN_TESTp(every_key_is_seen, s);
            CASE("%s_%s", isa, format);
            RUN_TESTp(columns_bound_what_is_written, s);
            CASE("%s_%s", isa, format);
            RUN_TESTp(unused_memory_does_not_matter, s);
            CASE("%s_%s", isa, format);
            RUN_TESTp(short_workspace_is_an_error, s);
            for (int32_t n = 1; n <= 8; n *= n == 1 ? 2 : 4) {
                CASE("%s_%s_%d_threads", isa, format, n);
                RUN_TESTp(workspace_is_bounded, isas[i], formats[f], n);
            }
            shape small = odd;
            small.dim = 8;
            if (formats[f] != DSA_INT8) {                             /* int8 rounds integers, by a scale of amax/127 */
                CASE("%s_%s_by_index", isa, format);
                RUN_TESTp(integers_are_exact, small, DSA_ORDER_INDEX);
                CASE("%s_%s_by_rank", isa, format);
                RUN_TESTp(integers_are_exact, small, DSA_ORDER_RANK);
            }
            CASE("%s_%s", isa, format);
            RUN_TESTp(dense_fallback, s);
            CASE("%s_%s_by_rank", isa, format);
            RUN_TESTp(no_fallback_when_scores_matter, s, DSA_ORDER_RANK, 0);
            CASE("%s_%s_with_scores", isa, format);
            RUN_TESTp(no_fallback_when_scores_matter, s, DSA_ORDER_INDEX, 1);
            CASE("%s_%s", isa, format);
            RUN_TESTp(nan_is_never_selected, odd);
        }
        CASE("%s", isa);
        RUN_TESTp(relu_and_negative_weights, isas[i]);
        CASE("%s", isa);
        RUN_TESTp(hadamard_keeps_f32_scores, isas[i]);
        CASE("%s", isa);
        RUN_TESTp(heads_of_the_call, isas[i]);
        CASE("%s", isa);
        RUN_TESTp(infinite_keys, isas[i]);
        for (int h = 0; h < HOSTILE_COUNT; h++) {
            CASE("%s_%s", isa, hostile_names[h]);
            RUN_TESTp(hostile_keys_are_exact, isas[i], (hostile)h);
        }
    }
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
        CASE("%s_on", brute_type_name(formats[f]));
        RUN_TESTp(hadamard_wants_a_power_of_two, formats[f], DSA_HADAMARD_ON);
    }
    CASE("fp8_auto");
    RUN_TESTp(hadamard_wants_a_power_of_two, DSA_FP8, DSA_HADAMARD_AUTO);
    CASE("int8_auto");
    RUN_TESTp(hadamard_wants_a_power_of_two, DSA_INT8, DSA_HADAMARD_AUTO);
#undef CASE
}

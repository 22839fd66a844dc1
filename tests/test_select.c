/* dsa_select and dsa_merge_topk against qsort in the total order: score descending, then lower index, NaN and -inf never. */
#define _POSIX_C_SOURCE 200809L
#include <time.h>
#if defined(__SSE2__)
#  include <xmmintrin.h>
#endif
#include "../dsa.h"
#include "harness.h"
#include "brute.h"

static dsa_ctx context(dsa_isa isa, int32_t n_threads, dsa_parallel_for parallel_for, void *user)
{
    dsa_config config;
    dsa_ctx ctx;
    memset(&config, 0, sizeof config);
    config.isa = isa;
    config.n_threads = n_threads;
    config.parallel_for = parallel_for;
    config.parallel_user = user;
    if (dsa_init(&ctx, &config) != DSA_OK) { fprintf(stderr, "test: dsa_init failed\n"); abort(); }
    return ctx;
}

/* One result, with room for every output. */
typedef struct result { int64_t n_rows; int32_t k; int32_t *indices, *counts; float *scores; } result;

static result result_new(int64_t n_rows, int32_t k)
{
    result r = { n_rows, k, NULL, NULL, NULL };
    size_t places = (size_t)n_rows * (size_t)k;
    r.indices = brute_alloc(places * sizeof *r.indices);
    r.scores = brute_alloc(places * sizeof *r.scores);
    r.counts = brute_alloc((size_t)n_rows * sizeof *r.counts);
    memset(r.indices, 0x5A, places * sizeof *r.indices);             /* so that a place nobody writes is noticed */
    memset(r.scores, 0x5A, places * sizeof *r.scores);
    memset(r.counts, 0x5A, (size_t)n_rows * sizeof *r.counts);
    return r;
}
static void result_free(result *r) { free(r->indices); free(r->scores); free(r->counts); }

/* Equal indices, counts and scores by value: -0 may stand for +0. */
static int same_result(const result *a, const result *b)
{
    size_t places = (size_t)a->n_rows * (size_t)a->k;
    if (a->n_rows != b->n_rows || a->k != b->k) return 0;
    if (memcmp(a->indices, b->indices, places * sizeof *a->indices) != 0) return 0;
    if (memcmp(a->counts, b->counts, (size_t)a->n_rows * sizeof *a->counts) != 0) return 0;
    for (size_t i = 0; i < places; i++) if (!(a->scores[i] == b->scores[i])) return 0;
    return 1;
}

static dsa_selection selection_of(const result *r, dsa_order order)
{
    dsa_selection s;
    memset(&s, 0, sizeof s);
    s.top_k = r->k;
    s.order = order;
    s.indices = r->indices;
    s.scores = r->scores;
    s.counts = r->counts;
    return s;
}

/* dsa_select in a workspace of just the asked size, full of NaN and off every alignment. */
static dsa_status select_rows(const dsa_ctx *ctx, dsa_select_args args, const dsa_selection *out)
{
    size_t bytes = 0;
    dsa_status status = dsa_select_workspace(ctx, &args, out, &bytes);
    if (status != DSA_OK) return status;
    unsigned char *memory = brute_alloc(bytes + 1);
    memset(memory, 0xFF, bytes + 1);
    args.workspace = memory + 1;
    args.workspace_size = bytes;
    status = dsa_select(ctx, &args, out);
    free(memory);
    return status;
}

static result brute_select(const dsa_select_args *a, int32_t k, dsa_order order)
{
    result r = result_new(a->n_rows, k);
    for (int64_t t = 0; t < a->n_rows; t++)
        r.counts[t] = brute_topk(a->scores + t * a->stride, a->n_cols, a->ks ? a->ks[t] : 0, a->ke ? a->ke[t] : a->n_cols, k, order,
                                 r.indices + t * k, r.scores + t * k);
    return r;
}

static enum greatest_test_res check_select(const dsa_ctx *ctx, const dsa_select_args *args, int32_t k, dsa_order order)
{
    result want = brute_select(args, k, order), got = result_new(args->n_rows, k);
    dsa_selection out = selection_of(&got, order);
    dsa_status status = select_rows(ctx, *args, &out);
    int same = same_result(&want, &got);
    /* the optional outputs change nothing */
    memset(got.indices, 0x5A, (size_t)got.n_rows * (size_t)k * sizeof *got.indices);
    out.scores = NULL;
    out.counts = NULL;
    dsa_status bare = select_rows(ctx, *args, &out);
    int same_bare = memcmp(want.indices, got.indices, (size_t)got.n_rows * (size_t)k * sizeof *got.indices) == 0;
    result_free(&want);
    result_free(&got);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(same);
    ASSERT_EQ_FMT((int)DSA_OK, (int)bare, "%d");
    ASSERT(same_bare);
    PASS();
}

static dsa_select_args rows_of(const float *scores, int64_t n_rows, int64_t n_cols, int64_t stride)
{
    dsa_select_args a;
    memset(&a, 0, sizeof a);
    a.scores = scores;
    a.n_rows = n_rows;
    a.n_cols = n_cols;
    a.stride = stride;
    return a;
}

/* ---- kinds of rows ------------------------------------------------------------------------------------- */
typedef enum fill {
    FILL_NORMAL, FILL_EQUAL, FILL_ZERO, FILL_SIGNED_ZERO, FILL_ASCENDING, FILL_DESCENDING, FILL_OUTLIER, FILL_DENORMAL, FILL_MIXED,
    FILL_ALL_NAN, FILL_ALL_MINUS_INF, FILL_ALL_PLUS_INF, FILL_PLATEAU, FILL_FEW_VALUES, FILL_ONE_ULP, FILL_NEGATIVE, FILL_HUGE_RANGE,
    FILL_SPARSE, FILL_TIES_16, FILL_TIES_100, FILL_SAWTOOTH, FILL_PIPE, FILL_SAMPLE_LOW, FILL_SAMPLE_HIGH, FILL_SAMPLE_TIES,
    FILL_COUNT
} fill;
static const char *const fill_names[FILL_COUNT] = {
    "normal", "all_equal", "all_zero", "signed_zeros", "ascending", "descending", "one_outlier", "denormals", "nan_and_inf",
    "all_nan", "all_minus_inf", "all_plus_inf", "plateau_at_the_cut", "few_values", "one_ulp_apart", "negative", "all_exponents",
    "relu_plateau", "ties_in_16s", "ties_in_100s", "sawtooth", "organ_pipe", "low_where_sampled", "high_where_sampled",
    "ties_behind_a_low_sample"
};

/* What dsa_select reads first of a row (dsa__topk_guess): 128 pieces of 16 scores, one in each part of the row, wherever the
   hash says. Should that change, these rows are two ordinary ones. */
static void fill_sampled(brute_rng *r, float *x, int64_t n, float value)
{
    int64_t pieces = n / 16;
    for (uint32_t j = 0; j < 128 && pieces >= 128; j++) {
        uint32_t hash = (j + 1) * 2654435761u;
        int64_t piece = j * pieces / 128 + (int64_t)((uint64_t)hash * (uint64_t)(pieces / 128) >> 32);
        for (int i = 0; i < 16; i++) x[piece * 16 + i] = value + (float)brute_uniform(r);
    }
}

static void fill_row(brute_rng *r, fill kind, float *x, int64_t n)
{
    float same = 0;
    for (int64_t i = 0; i < n; i++) {
        double u = brute_uniform(r);
        switch (kind) {
        case FILL_EQUAL:         x[i] = -1.25f; break;
        case FILL_ZERO:          x[i] = 0; break;
        case FILL_SIGNED_ZERO:   x[i] = u < 0.5 ? -0.0f : 0.0f; break;
        case FILL_ASCENDING:     x[i] = (float)i; break;
        case FILL_DESCENDING:    x[i] = (float)(n - i); break;
        case FILL_OUTLIER:       x[i] = i == n / 2 ? 3e38f : (float)(1e-3 * u); break;
        case FILL_DENORMAL:      x[i] = brute_float((uint32_t)brute_below(r, 0x800000) | (u < 0.5 ? 0x80000000u : 0)); break;
        case FILL_MIXED:         x[i] = u < 0.1 ? brute_float(0x7FC00000) : u < 0.2 ? brute_float(0xFF800001) : u < 0.3 ? -HUGE_VALF
                                      : u < 0.31 ? HUGE_VALF : u < 0.4 ? -0.0f : (float)brute_normal(r); break;
        case FILL_ALL_NAN:       x[i] = brute_float(u < 0.5 ? 0x7FFFFFFF : 0xFFC00000); break;
        case FILL_ALL_MINUS_INF: x[i] = -HUGE_VALF; break;
        case FILL_ALL_PLUS_INF:  x[i] = HUGE_VALF; break;
        case FILL_PLATEAU:       x[i] = u < 0.001 ? 2 : u < 0.9 ? 1 : (float)u - 1; break;
        case FILL_FEW_VALUES:    x[i] = (float)(int)(4 * u) - 1.5f; break;
        case FILL_ONE_ULP:       x[i] = brute_float(0x3F800000 + (uint32_t)brute_below(r, 3)); break;
        case FILL_NEGATIVE:      x[i] = -(float)exp(8 * u); break;
        case FILL_HUGE_RANGE:    do x[i] = brute_float((uint32_t)brute_u64(r)); while (!isfinite(x[i])); break;
        case FILL_SPARSE:        x[i] = u < 0.98 ? 0 : (float)(u - 0.99); break;   /* what ReLU leaves: a plateau at exactly 0 */
        case FILL_TIES_16:       if (i % 16 == 0) same = (float)brute_normal(r); x[i] = same; break;
        case FILL_TIES_100:      if (i % 100 == 0) same = (float)brute_normal(r); x[i] = same; break;
        case FILL_SAWTOOTH:      x[i] = (float)(i % 1024); break;
        case FILL_PIPE:          x[i] = (float)(i < n / 2 ? i : n - i); break;
        case FILL_SAMPLE_LOW:    x[i] = (float)(i + 10); break;
        case FILL_SAMPLE_TIES:   x[i] = u < (i < 6000 ? 0.01 : 0.05) ? 9 : 2 + (float)(int)(4 * u); break;   /* 9: a later sample's cut */
        default:                 x[i] = (float)brute_normal(r); break;
        }
    }
    if (kind == FILL_SAMPLE_LOW || kind == FILL_SAMPLE_TIES) fill_sampled(r, x, n, 0);
    if (kind == FILL_SAMPLE_HIGH) fill_sampled(r, x, n, 100);
}

static float *filled(uint64_t seed, fill kind, int64_t n)
{
    brute_rng r = { seed };
    float *x = brute_alloc((size_t)n * sizeof *x);
    fill_row(&r, kind, x, n);
    return x;
}

/* ---- tests --------------------------------------------------------------------------------------------------- */
/* Every size around powers of two and block sizes with every k around the size. */
TEST matches_brute_force_over_sizes(dsa_isa isa, dsa_order order)
{
    static const int64_t sizes[] = { 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 255, 257, 1000, 1025, 4095, 4097, 9999 };
    static const int32_t ks[] = { 1, 2, 3, 8, 63, 64, 65, 200, 1000, 2048, 4096 };
    static const fill kinds[] = { FILL_NORMAL, FILL_FEW_VALUES, FILL_MIXED };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t f = 0; f < sizeof kinds / sizeof *kinds; f++) {
            float *x = filled(100 + i, kinds[f], sizes[i]);
            dsa_select_args args = rows_of(x, 1, sizes[i], sizes[i]);
            enum greatest_test_res ended = GREATEST_TEST_RES_PASS;
            for (size_t j = 0; j < sizeof ks / sizeof *ks && ended == GREATEST_TEST_RES_PASS; j++)
                ended = check_select(&ctx, &args, ks[j], order);
            for (int32_t d = -1; d <= 1 && ended == GREATEST_TEST_RES_PASS; d++)
                if (sizes[i] + d >= 1) ended = check_select(&ctx, &args, (int32_t)sizes[i] + d, order);
            free(x);
            if (ended != GREATEST_TEST_RES_PASS) return ended;
        }
    PASS();
}

/* Rows that break a selection which counts on random scores: exact all the same, in both orders and for small and large k. */
TEST exact_on(dsa_isa isa, fill kind)
{
    enum { N = 20000 };
    static const int32_t ks[] = { 1, 64, 2048, N - 1, N, N + 5 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    float *x = filled(200, kind, N);
    dsa_select_args args = rows_of(x, 1, N, N);
    enum greatest_test_res ended = GREATEST_TEST_RES_PASS;
    for (size_t j = 0; j < sizeof ks / sizeof *ks && ended == GREATEST_TEST_RES_PASS; j++) {
        ended = check_select(&ctx, &args, ks[j], DSA_ORDER_INDEX);
        if (ended == GREATEST_TEST_RES_PASS) ended = check_select(&ctx, &args, ks[j], DSA_ORDER_RANK);
    }
    free(x);
    return ended;
}

/* Long enough to be sampled, full of chances to guess wrong; odd lengths and addresses. */
TEST exact_on_long_rows_of(dsa_isa isa, fill kind)
{
    enum { N = 70001, K = 2048 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    float *x = filled(250, kind, N + 3);
    dsa_select_args args = rows_of(x, 1, N, N);
    enum greatest_test_res ended = check_select(&ctx, &args, K, DSA_ORDER_INDEX);
    if (ended == GREATEST_TEST_RES_PASS) {
        args.scores = x + 3;
        ended = check_select(&ctx, &args, 7, DSA_ORDER_INDEX);
    }
    free(x);
    return ended;
}

#if defined(__SSE2__)
/* A program built with -ffast-math tells the CPU to take denormals for 0; then they are 0 here too, and ties are ties. */
TEST denormals_may_count_as_zero(dsa_isa isa, fill kind)
{
    enum { N = 20000, K = 2048 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    float *x = filled(260, kind, N);
    dsa_select_args args = rows_of(x, 1, N, N);
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);                                       /* flush to zero, denormals are zero */
    enum greatest_test_res ended = check_select(&ctx, &args, K, DSA_ORDER_INDEX);
    _mm_setcsr(mode);
    free(x);
    return ended;
}
#endif

/* Bad rows cost at most a small factor of random ones (1.5 was measured on a quiet machine, this may be a busy one). */
TEST worst_cases_cost_little_more_than_random(dsa_isa isa)
{
    enum { N = 1 << 18, K = 2048, TRIES = 9 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    result r = result_new(1, K);
    dsa_selection out = selection_of(&r, DSA_ORDER_INDEX);
    double random = 0;
    for (int kind = 0; kind < FILL_COUNT; kind++) {
        float *x = filled(300, (fill)kind, N);
        dsa_select_args args = rows_of(x, 1, N, N);
        double best = HUGE_VAL;
        dsa_status status = DSA_OK;
        for (int t = 0; t < TRIES && status == DSA_OK; t++) {
            clock_t start = clock();
            status = select_rows(&ctx, args, &out);
            best = fmin(best, (double)(clock() - start) / CLOCKS_PER_SEC);
        }
        free(x);
        if (kind == FILL_NORMAL) random = best;
        if (status != DSA_OK || best > 5 * random + 0.001) {
            printf("\n  %s: %.4f s, random %.4f s", fill_names[kind], best, random);
            result_free(&r);
            FAILm("a worst case costs too much");
        }
    }
    result_free(&r);
    PASS();
}

TEST a_million_columns(dsa_isa isa)
{
    enum { N = 1 << 20, K = 2048 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    float *x = filled(400, FILL_NORMAL, N);
    dsa_select_args args = rows_of(x, 1, N, N);
    enum greatest_test_res ended = check_select(&ctx, &args, K, DSA_ORDER_INDEX);
    free(x);
    return ended;
}

TEST plus_inf_comes_first(dsa_isa isa)
{
    float x[8] = { 1, -HUGE_VALF, HUGE_VALF, brute_float(0x7FC00000), 3e38f, HUGE_VALF, -3e38f, 0 };
    static const int32_t by_rank[8] = { 2, 5, 4, 0, 7, 6, -1, -1 }, by_index[3] = { 2, 4, 5 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    dsa_select_args args = rows_of(x, 1, 8, 8);
    result r = result_new(1, 8);
    dsa_selection out = selection_of(&r, DSA_ORDER_RANK);
    dsa_status status = select_rows(&ctx, args, &out);
    int rank = memcmp(by_rank, r.indices, sizeof by_rank) == 0, count = r.counts[0];
    float last = r.scores[7];
    out.top_k = 3;
    out.order = DSA_ORDER_INDEX;
    dsa_status again = select_rows(&ctx, args, &out);
    int index = memcmp(by_index, r.indices, sizeof by_index) == 0;
    result_free(&r);
    ASSERT_EQ(DSA_OK, status);
    ASSERT(rank);
    ASSERT_EQ_FMT(6, count, "%d");
    ASSERT_EQ(-HUGE_VALF, last);
    ASSERT_EQ(DSA_OK, again);
    ASSERT(index);
    PASS();
}

TEST minus_zero_equals_zero(dsa_isa isa)
{
    float x[6] = { -0.0f, 0.0f, -0.0f, -1e-45f, 0.0f, 1e-45f };
    static const int32_t want[5] = { 5, 0, 1, 2, 4 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    dsa_select_args args = rows_of(x, 1, 6, 6);
    result r = result_new(1, 5);
    dsa_selection out = selection_of(&r, DSA_ORDER_RANK);
    dsa_status status = select_rows(&ctx, args, &out);
    int same = memcmp(want, r.indices, sizeof want) == 0;
    result_free(&r);
    ASSERT_EQ(DSA_OK, status);
    ASSERT(same);
    PASS();
}

/* Ranges of all kinds, and +inf or NaN everywhere outside: those columns may not be looked at. */
TEST ranges_are_half_open_and_clamped(dsa_isa isa, dsa_order order)
{
    enum { N = 500, STRIDE = 517, ROWS = 14 };
    static const int64_t ks[ROWS] = { 0, 0, 1, 499, 250, 250, 251, -5, INT64_MIN, 0, 500, 600, 100, 17 };
    static const int64_t ke[ROWS] = { 500, 1, 2, 500, 250, 251, 250, 3, INT64_MAX, 9999, 501, 700, INT64_MIN, 400 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    float *x = filled(500, FILL_NORMAL, ROWS * STRIDE);
    for (int t = 0; t < ROWS; t++)
        for (int64_t i = 0; i < STRIDE; i++)
            if (i < ks[t] || i >= ke[t] || i >= N) x[t * STRIDE + i] = i % 2 ? HUGE_VALF : brute_float(0x7FC00000);
    dsa_select_args args = rows_of(x, ROWS, N, STRIDE);
    args.ks = ks;
    args.ke = ke;
    enum greatest_test_res ended = check_select(&ctx, &args, 64, order);
    free(x);
    return ended;
}

TEST columns_behind_n_cols_are_not_read(dsa_isa isa)
{
    enum { N = 70, STRIDE = 100, ROWS = 3 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    float *x = filled(600, FILL_NORMAL, ROWS * STRIDE);
    for (int t = 0; t < ROWS; t++) for (int i = N; i < STRIDE; i++) x[t * STRIDE + i] = HUGE_VALF;
    dsa_select_args args = rows_of(x, ROWS, N, STRIDE);
    enum greatest_test_res ended = check_select(&ctx, &args, 10, DSA_ORDER_RANK);
    free(x);
    return ended;
}

TEST no_rows_and_no_columns(dsa_isa isa)
{
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    float x[4] = { 1, 2, 3, 4 };
    int32_t indices[3] = { 7, 7, 7 }, counts[1] = { 7 };
    float scores[3] = { 7, 7, 7 };
    dsa_selection out;
    memset(&out, 0, sizeof out);
    out.top_k = 3;
    out.indices = indices;
    out.scores = scores;
    out.counts = counts;
    ASSERT_EQ(DSA_OK, select_rows(&ctx, rows_of(x, 0, 4, 4), &out));
    ASSERT_EQ_FMT(7, indices[0], "%d");                              /* no row: nothing is written */
    ASSERT_EQ(DSA_OK, select_rows(&ctx, rows_of(x, 1, 0, 4), &out));
    for (int i = 0; i < 3; i++) {
        ASSERT_EQ_FMT(-1, indices[i], "%d");
        ASSERT_EQ(-HUGE_VALF, scores[i]);
    }
    ASSERT_EQ_FMT(0, counts[0], "%d");
    PASS();
}

TEST top_k_of_zero_is_the_configs(dsa_isa isa)
{
    enum { N = 300, K = 37 };
    dsa_config config;
    dsa_ctx ctx;
    memset(&config, 0, sizeof config);
    config.isa = isa;
    config.top_k = K;
    ASSERT_EQ(DSA_OK, dsa_init(&ctx, &config));
    float *x = filled(700, FILL_NORMAL, N);
    dsa_select_args args = rows_of(x, 1, N, N);
    result want = brute_select(&args, K, DSA_ORDER_INDEX), got = result_new(1, K);
    dsa_selection out = selection_of(&got, DSA_ORDER_INDEX);
    out.top_k = 0;
    dsa_status status = select_rows(&ctx, args, &out);
    int same = same_result(&want, &got);
    result_free(&want); result_free(&got); free(x);
    ASSERT_EQ(DSA_OK, status);
    ASSERT(same);
    PASS();
}

/* Many rows on 1 to 8 threads of a pool, and with the tasks run last to first: equal to brute force, so equal to each other. */
TEST threads_do_not_matter(dsa_isa isa, fill kind)
{
    enum { N = 3000, ROWS = 37, K = 100 };
    float *x = filled(800, kind, ROWS * N);
    int64_t ks[ROWS], ke[ROWS];
    brute_rng r = { 801 };
    for (int t = 0; t < ROWS; t++) { ks[t] = brute_below(&r, N / 2); ke[t] = brute_below(&r, N + 1); }
    dsa_select_args args = rows_of(x, ROWS, N, N);
    args.ks = ks;
    args.ke = ke;
    enum greatest_test_res ended = GREATEST_TEST_RES_PASS;
    for (int32_t n = 1; n <= 8 && ended == GREATEST_TEST_RES_PASS; n++) {
        dsa_pool *pool = NULL;
        int32_t most = 0;
        if (dsa_pool_create(NULL, n, &pool) != DSA_OK) { free(x); FAILm("no pool"); }
        dsa_ctx parallel = context(isa, n, dsa_pool_run, pool), reversed = context(isa, n, brute_reversed, &most);
        ended = check_select(&parallel, &args, K, DSA_ORDER_INDEX);
        if (ended == GREATEST_TEST_RES_PASS) ended = check_select(&reversed, &args, K, DSA_ORDER_INDEX);
        dsa_pool_destroy(pool);
        if (most > n) { free(x); FAILm("more tasks than config.n_threads"); }
    }
    free(x);
    return ended;
}

/* A single long row: the case where a library might cut the row itself among threads. */
TEST threads_do_not_matter_within_a_row(dsa_isa isa, fill kind)
{
    enum { N = 200000, K = 512 };
    float *x = filled(900, kind, N);
    dsa_select_args args = rows_of(x, 1, N, N);
    enum greatest_test_res ended = GREATEST_TEST_RES_PASS;
    for (int32_t n = 1; n <= 8 && ended == GREATEST_TEST_RES_PASS; n += n == 1 ? 2 : 5) {
        dsa_pool *pool = NULL;
        int32_t most = 0;
        if (dsa_pool_create(NULL, n, &pool) != DSA_OK) { free(x); FAILm("no pool"); }
        dsa_ctx parallel = context(isa, n, dsa_pool_run, pool), reversed = context(isa, n, brute_reversed, &most);
        ended = check_select(&parallel, &args, K, DSA_ORDER_RANK);
        if (ended == GREATEST_TEST_RES_PASS) ended = check_select(&reversed, &args, K, DSA_ORDER_RANK);
        dsa_pool_destroy(pool);
    }
    free(x);
    return ended;
}

/* One byte less than the size query says is an error, and nothing has been written. */
TEST short_workspace_is_an_error(dsa_isa isa)
{
    enum { N = 5000, K = 64, ROWS = 2 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    float *x = filled(1000, FILL_NORMAL, ROWS * N);
    dsa_select_args args = rows_of(x, ROWS, N, N);
    result r = result_new(ROWS, K), before = result_new(ROWS, K);
    dsa_selection out = selection_of(&r, DSA_ORDER_INDEX);
    size_t bytes = 0;
    dsa_status query = dsa_select_workspace(&ctx, &args, &out, &bytes);
    unsigned char *memory = brute_alloc(bytes);
    args.workspace = memory;
    args.workspace_size = bytes - 1;
    dsa_status status = bytes > 0 ? dsa_select(&ctx, &args, &out) : DSA_OK;
    int untouched = memcmp(before.indices, r.indices, sizeof(int32_t) * ROWS * K) == 0
                 && memcmp(before.scores, r.scores, sizeof(float) * ROWS * K) == 0
                 && memcmp(before.counts, r.counts, sizeof(int32_t) * ROWS) == 0;
    result_free(&r); result_free(&before); free(x); free(memory);
    ASSERT_EQ(DSA_OK, query);
    ASSERT(bytes > 0);
    ASSERT_EQ(DSA_ERR_WORKSPACE, status);
    ASSERT(untouched);
    PASS();
}

/* Per thread 128 KiB, however long the rows. */
TEST workspace_is_bounded(dsa_isa isa)
{
    static const int64_t lengths[] = { 1, 3000, 1 << 16, 1 << 20, INT32_MAX };
    for (int32_t n_threads = 1; n_threads <= 8; n_threads *= 2) {
        dsa_ctx ctx = context(isa, n_threads, NULL, NULL);
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
            dsa_select_args args = rows_of(NULL, 100, lengths[i], lengths[i]);
            dsa_selection out;
            size_t bytes = 0;
            memset(&out, 0, sizeof out);
            out.top_k = 2048;
            ASSERT_EQ(DSA_OK, dsa_select_workspace(&ctx, &args, &out, &bytes));
            ASSERT(bytes > 0);
            ASSERT_LTE(bytes, (size_t)n_threads * 128 * 1024);
        }
    }
    PASS();
}

/* ---- merging ---------------------------------------------------------------------------------------------------- */
static dsa_status merge_parts(const dsa_ctx *ctx, dsa_merge_topk_args args, const dsa_selection *out)
{
    size_t bytes = 0;
    dsa_status status = dsa_merge_topk_workspace(ctx, &args, out, &bytes);
    if (status != DSA_OK) return status;
    unsigned char *memory = brute_alloc(bytes + 1);
    memset(memory, 0xFF, bytes + 1);
    args.workspace = memory + 1;
    args.workspace_size = bytes;
    status = dsa_merge_topk(ctx, &args, out);
    free(memory);
    return status;
}

/* Column i belongs to part i % n_parts (interleaved shards, so ties cross them); each part's own top-k, indices made
   global, merged: equals the selection from the whole row. Part order must not matter either. */
TEST merge_equals_one_shot(dsa_isa isa, fill kind, int32_t n_parts, dsa_order order)
{
    enum { N = 4001, ROWS = 3, K = 150, MOST = 8 };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    float *x = filled(1100, kind, ROWS * N);
    dsa_select_args whole = rows_of(x, ROWS, N, N);
    result want = brute_select(&whole, K, order), got = result_new(ROWS, K), part[MOST];
    const int32_t *indices[MOST];
    const float *scores[MOST];
    dsa_status status = DSA_OK;
    for (int32_t p = 0; p < n_parts; p++) {
        int64_t m = (N - p + n_parts - 1) / n_parts;
        float *mine = brute_alloc((size_t)(ROWS * m) * sizeof *mine);
        for (int64_t t = 0; t < ROWS; t++) for (int64_t i = 0; i < m; i++) mine[t * m + i] = x[t * N + i * n_parts + p];
        part[p] = result_new(ROWS, K);
        dsa_selection out = selection_of(&part[p], p % 2 ? DSA_ORDER_INDEX : DSA_ORDER_RANK);
        if (status == DSA_OK) status = select_rows(&ctx, rows_of(mine, ROWS, m, m), &out);
        for (int32_t i = 0; i < ROWS * K; i++) if (part[p].indices[i] >= 0) part[p].indices[i] = part[p].indices[i] * n_parts + p;
        free(mine);
    }
    for (int32_t p = 0; p < n_parts; p++) {                          /* handed over last part first */
        indices[p] = part[n_parts - 1 - p].indices;
        scores[p] = part[n_parts - 1 - p].scores;
    }
    dsa_merge_topk_args args;
    memset(&args, 0, sizeof args);
    args.n_parts = n_parts;
    args.k_in = K;
    args.n_rows = ROWS;
    args.indices = indices;
    args.scores = scores;
    dsa_selection out = selection_of(&got, order);
    if (status == DSA_OK) status = merge_parts(&ctx, args, &out);
    int same = same_result(&want, &got);
    for (int32_t p = 0; p < n_parts; p++) result_free(&part[p]);
    result_free(&want); result_free(&got); free(x);
    ASSERT_EQ_FMT((int)DSA_OK, (int)status, "%d");
    ASSERT(same);
    PASS();
}

/* k_in and top_k differ, -1 stands anywhere in a part, a part is empty, and threads split the rows. */
TEST merge_skips_empty_places(dsa_isa isa)
{
    enum { ROWS = 9, K_IN = 5, PARTS = 3, K = 7 };
    int32_t index[PARTS][ROWS * K_IN];
    float score[PARTS][ROWS * K_IN];
    brute_rng r = { 1200 };
    const int32_t *indices[PARTS] = { index[0], index[1], index[2] };
    const float *scores[PARTS] = { score[0], score[1], score[2] };
    result want = result_new(ROWS, K), got = result_new(ROWS, K);
    for (int t = 0; t < ROWS; t++) {
        brute_entry all[PARTS * K_IN];
        int64_t n = 0;
        for (int p = 0; p < PARTS; p++)
            for (int i = 0; i < K_IN; i++) {
                int at = t * K_IN + i;
                int used = p != 1 && brute_below(&r, 3) > 0;
                index[p][at] = used ? 1000 * (i * PARTS + p) + (int)brute_below(&r, 900) : -1;
                /* an unused place may hold any score */
                score[p][at] = used ? (float)brute_below(&r, 3) : i % 2 ? HUGE_VALF : brute_float(0x7FC00000);
                /* and a used one a score that is never selected */
                if (used && i == 4) score[p][at] = t % 2 ? -HUGE_VALF : brute_float(0xFFC00000);
                if (used) { all[n].score = (double)score[p][at]; all[n++].index = index[p][at]; }
            }
        want.counts[t] = brute_pick(all, n, K, DSA_ORDER_RANK, want.indices + t * K, want.scores + t * K);
    }
    dsa_merge_topk_args args;
    memset(&args, 0, sizeof args);
    args.n_parts = PARTS;
    args.k_in = K_IN;
    args.n_rows = ROWS;
    args.indices = indices;
    args.scores = scores;
    int same = 1;
    for (int32_t n = 1; n <= 4; n++) {
        int32_t most = 0;
        dsa_ctx ctx = context(isa, n, brute_reversed, &most);
        dsa_selection out = selection_of(&got, DSA_ORDER_RANK);
        memset(got.indices, 0x5A, sizeof(int32_t) * ROWS * K);
        same = same && merge_parts(&ctx, args, &out) == DSA_OK && same_result(&want, &got) && most <= n;
    }
    result_free(&want); result_free(&got);
    ASSERT(same);
    PASS();
}

TEST merge_of_nothing(dsa_isa isa)
{
    enum { K = 3 };
    static const int32_t index[4] = { -1, -1, -1, -1 };
    static const float score[4] = { 1, 2, 3, 4 };
    const int32_t *indices[2] = { index, index };
    const float *scores[2] = { score, score };
    dsa_ctx ctx = context(isa, 1, NULL, NULL);
    result r = result_new(2, K);
    dsa_selection out = selection_of(&r, DSA_ORDER_INDEX);
    dsa_merge_topk_args args;
    memset(&args, 0, sizeof args);
    args.n_parts = 2;
    args.k_in = 2;
    args.n_rows = 2;
    args.indices = indices;
    args.scores = scores;
    dsa_status status = merge_parts(&ctx, args, &out);
    int empty = r.counts[0] == 0 && r.counts[1] == 0;
    for (int i = 0; i < 2 * K; i++) empty = empty && r.indices[i] == -1 && r.scores[i] == -HUGE_VALF;
    result_free(&r);
    ASSERT_EQ(DSA_OK, status);
    ASSERT(empty);
    PASS();
}

SUITE(select_suite)
{
    dsa_isa isas[BRUTE_ISAS];
    int n_isas = brute_isas(isas);
    char name[64];
    for (int i = 0; i < n_isas; i++) {
        const char *isa = dsa_isa_name(isas[i]);
#define CASE(...) (snprintf(name, sizeof name, __VA_ARGS__), greatest_set_test_suffix(name))
        CASE("%s_by_index", isa);
        RUN_TESTp(matches_brute_force_over_sizes, isas[i], DSA_ORDER_INDEX);
        CASE("%s_by_rank", isa);
        RUN_TESTp(matches_brute_force_over_sizes, isas[i], DSA_ORDER_RANK);
        for (int f = 0; f < FILL_COUNT; f++) {
            CASE("%s_%s", isa, fill_names[f]);
            RUN_TESTp(exact_on, isas[i], (fill)f);
        }
        for (int f = 0; f < FILL_COUNT; f++) {
            CASE("%s_%s", isa, fill_names[f]);
            RUN_TESTp(exact_on_long_rows_of, isas[i], (fill)f);
        }
#if defined(__SSE2__)
        static const fill tiny[] = { FILL_DENORMAL, FILL_SIGNED_ZERO, FILL_SPARSE, FILL_NORMAL };
        for (size_t f = 0; f < sizeof tiny / sizeof *tiny; f++) {
            CASE("%s_%s", isa, fill_names[tiny[f]]);
            RUN_TESTp(denormals_may_count_as_zero, isas[i], tiny[f]);
        }
#endif
        CASE("%s", isa);
        RUN_TESTp(worst_cases_cost_little_more_than_random, isas[i]);
        CASE("%s", isa);
        RUN_TESTp(a_million_columns, isas[i]);
        CASE("%s", isa);
        RUN_TESTp(plus_inf_comes_first, isas[i]);
        CASE("%s", isa);
        RUN_TESTp(minus_zero_equals_zero, isas[i]);
        CASE("%s_by_index", isa);
        RUN_TESTp(ranges_are_half_open_and_clamped, isas[i], DSA_ORDER_INDEX);
        CASE("%s_by_rank", isa);
        RUN_TESTp(ranges_are_half_open_and_clamped, isas[i], DSA_ORDER_RANK);
        CASE("%s", isa);
        RUN_TESTp(columns_behind_n_cols_are_not_read, isas[i]);
        CASE("%s", isa);
        RUN_TESTp(no_rows_and_no_columns, isas[i]);
        CASE("%s", isa);
        RUN_TESTp(top_k_of_zero_is_the_configs, isas[i]);

        static const fill threaded[] = { FILL_NORMAL, FILL_FEW_VALUES, FILL_MIXED };
        for (size_t f = 0; f < sizeof threaded / sizeof *threaded; f++) {
            CASE("%s_%s", isa, fill_names[threaded[f]]);
            RUN_TESTp(threads_do_not_matter, isas[i], threaded[f]);
            CASE("%s_%s", isa, fill_names[threaded[f]]);
            RUN_TESTp(threads_do_not_matter_within_a_row, isas[i], threaded[f]);
        }
        CASE("%s", isa);
        RUN_TESTp(short_workspace_is_an_error, isas[i]);
        CASE("%s", isa);
        RUN_TESTp(workspace_is_bounded, isas[i]);

        static const fill merged[] = { FILL_NORMAL, FILL_FEW_VALUES, FILL_MIXED, FILL_EQUAL };
        for (size_t f = 0; f < sizeof merged / sizeof *merged; f++) {
            CASE("%s_%s_2_parts_by_index", isa, fill_names[merged[f]]);
            RUN_TESTp(merge_equals_one_shot, isas[i], merged[f], 2, DSA_ORDER_INDEX);
            CASE("%s_%s_7_parts_by_rank", isa, fill_names[merged[f]]);
            RUN_TESTp(merge_equals_one_shot, isas[i], merged[f], 7, DSA_ORDER_RANK);
        }
        CASE("%s", isa);
        RUN_TESTp(merge_equals_one_shot, isas[i], FILL_NORMAL, 1, DSA_ORDER_INDEX);
        CASE("%s", isa);
        RUN_TESTp(merge_skips_empty_places, isas[i]);
        CASE("%s", isa);
        RUN_TESTp(merge_of_nothing, isas[i]);
#undef CASE
    }
}

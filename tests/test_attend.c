/* Attention against a double-precision definition, and its promises: invalid indices, empty rows, sinks, NaN rows, the same bits
   whatever the threads, batch and pages, the running state and partials. */
#include "fixture.h"

/* One problem: n_rows queries over one cache of len rows. */
typedef struct problem {
    bag b;
    dsa_ctx ctx;
    dsa_cache cache;
    dsa_seq seq;
    int32_t H, R, r, W;
    int64_t len;
    int32_t n_q;
    float *stored;               /* [len, W] as the cache gives them back: what the reference attends over */
    float *q;                    /* [n_q, H, W] */
    float *out, *lse, *max;
} problem;

static dsa_ctx context(int32_t H, int32_t R, int32_t r)
{
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.n_heads = H;
    c.dim_latent = R;
    c.dim_rope = r ? r : DSA_NONE;
    c.softmax_scale = 0.25f;
    c.top_k = 16;
    c.isa = test_isa;
    c.precision = DSA_PRECISION_F32;
    c.index_rope_width = DSA_NONE;
    c.dim_index = 8;
    if (dsa_init(&ctx, &c) != DSA_OK) { fprintf(stderr, "test set-up: dsa_init refused\n"); abort(); }
    return ctx;
}

static void open_problem(problem *p, dsa_type format, int32_t H, int32_t R, int32_t r, int32_t len, int32_t n_q, int32_t page)
{
    memset(p, 0, sizeof *p);
    p->ctx = context(H, R, r);
    p->H = H;
    p->R = R;
    p->r = r;
    p->W = R + r;
    p->len = len;
    p->n_q = n_q;
    dsa_cache_desc d = desc_of(DSA_LATENT, format, len, page);
    p->cache = cache_of(&p->b, &p->ctx, &d);
    p->seq = seq_of(&p->cache, NULL, n_q);
    p->stored = random_floats(&p->b, (int64_t)len * p->W, 21, 1.5f);
    if (append(&p->ctx, &p->cache, NULL, len, p->stored, NULL) != DSA_OK ||
        dsa_cache_read(&p->ctx, &p->cache, 0, len, p->stored) != DSA_OK) { fprintf(stderr, "test set-up: append refused\n"); abort(); }
    p->q = random_floats(&p->b, (int64_t)n_q * H * p->W, 22, 1);
    p->out = floats(&p->b, (int64_t)n_q * H * R);
    p->lse = floats(&p->b, (int64_t)n_q * H);
    p->max = floats(&p->b, (int64_t)n_q * H);
}

static dsa_attend_args args_of(problem *p, dsa_attend_what what)
{
    dsa_attend_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &p->seq;
    a.q = p->q;
    a.what = what;
    return a;
}
static dsa_attend_args list_of(problem *p, const int32_t *indices, int64_t n)
{
    dsa_attend_args a = args_of(p, DSA_ATTEND_LIST);
    a.indices = indices;
    a.n_indices = n;
    return a;
}
static dsa_status solve(problem *p, dsa_attend_args a, const float *sinks)
{
    return attend(&p->b, &p->ctx, a, p->n_q, p->H, p->R, sinks, p->out, p->lse, p->max);
}
/* Largest error of out, lse and max of one query row against the rows in list. */
static double row_error(problem *p, int32_t row, const int32_t *list, int64_t n, double scale, const float *sinks)
{
    double worst = 0, *out = doubles(&p->b, p->R), lse, max;
    for (int32_t h = 0; h < p->H; h++) {
        int64_t at = (int64_t)row * p->H + h;
        ref_attend(p->q + at * p->W, p->stored, p->W, p->R, list, n, scale, sinks ? (double)sinks[h] : (double)-INFINITY, out, &lse, &max);
        worst = fmax(worst, max_error(p->out + at * p->R, out, p->R));
        worst = fmax(worst, max_error(p->lse + at, &lse, 1));
        worst = fmax(worst, max_error(p->max + at, &max, 1));
    }
    return worst;
}
static int32_t *counting(bag *b, int32_t from, int32_t to)
{
    int32_t *x = ints(b, to - from);
    for (int32_t i = from; i < to; i++) x[i - from] = i;
    return x;
}
/* n random rows of [0, len) per query. */
static int32_t *random_lists(bag *b, int32_t rows, int32_t n, int32_t len, uint64_t seed)
{
    int32_t *x = ints(b, (int64_t)rows * n), *all = counting(b, 0, len);
    for (int32_t i = 0; i < rows; i++) {
        shuffle(all, len, seed + (uint64_t)i);
        memcpy(x + (int64_t)i * n, all, (size_t)n * sizeof *x);
    }
    return x;
}

/* ---- against the definition ---------------------------------------------------------------------- */
typedef struct shape { const char *name; int32_t H, R, r, len, n_q; } shape;
static const shape shapes[] = {
    { "1x5+2", 1, 5, 2, 40, 5 }, { "3x128+16", 3, 128, 16, 90, 4 }, { "128x512+64", 128, 512, 64, 70, 2 },
    { "3x512+0", 3, 512, 0, 60, 3 }, { "2x200+24", 2, 200, 24, 50, 3 } };

TEST a_list_matches(dsa_type format, const shape *s)
{
    problem p;
    open_problem(&p, format, s->H, s->R, s->r, s->len, s->n_q, 16);
    int32_t *lists = random_lists(&p.b, s->n_q, 33, s->len, 3);
    OK(solve(&p, list_of(&p, lists, 33), NULL));
    for (int32_t i = 0; i < s->n_q; i++) WITHIN(1e-5, row_error(&p, i, lists + 33 * i, 33, 0.25, NULL));
    END(p.b);
}

TEST a_range_matches(dsa_type format, const shape *s)
{
    problem p;
    open_problem(&p, format, s->H, s->R, s->r, s->len, s->n_q, 0);
    int64_t *ks = longs(&p.b, s->n_q), *ke = longs(&p.b, s->n_q);
    for (int32_t i = 0; i < s->n_q; i++) { ks[i] = 3 * i; ke[i] = s->len - i; }
    dsa_attend_args a = args_of(&p, DSA_ATTEND_RANGE);
    a.ks = ks;
    a.ke = ke;
    OK(solve(&p, a, NULL));
    for (int32_t i = 0; i < s->n_q; i++)
        WITHIN(1e-5, row_error(&p, i, counting(&p.b, (int32_t)ks[i], (int32_t)ke[i]), ke[i] - ks[i], 0.25, NULL));
    END(p.b);
}

TEST everything_visible_matches(dsa_type format, const shape *s)
{
    problem p;
    open_problem(&p, format, s->H, s->R, s->r, s->len, s->n_q, 7);
    OK(solve(&p, args_of(&p, DSA_ATTEND_VISIBLE), NULL));
    for (int32_t i = 0; i < s->n_q; i++) {
        int32_t sees = s->len - s->n_q + i + 1;       /* causal: the query sits at row len - n_q + i */
        WITHIN(1e-5, row_error(&p, i, counting(&p.b, 0, sees), sees, 0.25, NULL));
    }
    END(p.b);
}

TEST a_long_row_matches(void)
{
    problem p;
    open_problem(&p, DSA_F32, 2, 24, 8, 5000, 1, 64);
    OK(solve(&p, args_of(&p, DSA_ATTEND_VISIBLE), NULL));
    WITHIN(3e-6, row_error(&p, 0, counting(&p.b, 0, 5000), 5000, 0.25, NULL));
    int32_t *lists = random_lists(&p.b, 1, 2048, 5000, 8);
    OK(solve(&p, list_of(&p, lists, 2048), NULL));
    WITHIN(3e-6, row_error(&p, 0, lists, 2048, 0.25, NULL));
    END(p.b);
}

TEST a_shorter_len_hides_the_rest(void)
{
    problem p;
    open_problem(&p, DSA_F32, 3, 12, 4, 40, 2, 8);
    p.seq.len = 25;                                   /* a reader beside an appender */
    OK(solve(&p, args_of(&p, DSA_ATTEND_VISIBLE), NULL));
    WITHIN(3e-6, row_error(&p, 0, counting(&p.b, 0, 24), 24, 0.25, NULL));
    WITHIN(3e-6, row_error(&p, 1, counting(&p.b, 0, 25), 25, 0.25, NULL));
    const int32_t list[8] = { 24, 25, 30, 39, 3, 24, 25, 26 };
    OK(solve(&p, list_of(&p, list, 4), NULL));
    WITHIN(3e-6, row_error(&p, 0, list, 1, 0.25, NULL));            /* 25 and beyond are invalid now */
    const int32_t second[2] = { 3, 24 };
    WITHIN(3e-6, row_error(&p, 1, second, 2, 0.25, NULL));
    p.seq.len = DSA_NONE;
    p.seq.n_q = 2;
    OK(solve(&p, list_of(&p, list, 4), NULL));
    WITHIN(0, row_error(&p, 0, NULL, 0, 0.25, NULL));
    END(p.b);
}

TEST the_scale_is_explicit(void)
{
    problem p;
    open_problem(&p, DSA_F32, 2, 10, 4, 30, 1, 0);
    dsa_attend_args a = args_of(&p, DSA_ATTEND_VISIBLE);
    int32_t *all = counting(&p.b, 0, 30);
    OK(solve(&p, a, NULL));
    WITHIN(3e-6, row_error(&p, 0, all, 30, 0.25, NULL));            /* 0 = the config's */
    a.scale = 0.7f;
    OK(solve(&p, a, NULL));
    WITHIN(3e-6, row_error(&p, 0, all, 30, (double)0.7f, NULL));
    a.scale = -0.5f;
    OK(solve(&p, a, NULL));
    WITHIN(3e-6, row_error(&p, 0, all, 30, -0.5, NULL));
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    OK(dsa_init(&ctx, &c));
    ASSERT_IN_RANGE(1 / sqrt(192.0), ctx.config.softmax_scale, 1e-8);   /* (nope + rope)^-0.5, not 576^-0.5 */
    OK(dsa_config_preset(DSA_DEEPSEEK_V32, &c));
    OK(dsa_init(&ctx, &c));
    ASSERT_IN_RANGE(0.1352338, ctx.config.softmax_scale, 1e-7);
    OK(dsa_config_preset(DSA_GLM_5, &c));
    OK(dsa_init(&ctx, &c));
    ASSERT_IN_RANGE(0.0625, ctx.config.softmax_scale, 1e-8);
    END(p.b);
}

/* ---- indices ------------------------------------------------------------------------------------- */
TEST invalid_indices_are_skipped_everywhere(dsa_index_kind kind)
{
    problem p;
    enum { LEN = 37, PAGE = 8, POOL = 5 * PAGE };
    open_problem(&p, DSA_F32, 3, 12, 4, LEN, 1, PAGE);
    const int32_t end = kind == DSA_LOGICAL ? LEN : POOL;           /* physical slots run to the end of the pool */
    const int32_t list[16] = { INT32_MIN, 5, INT32_MAX, -1, end, end - 1, end + 1, 0, -2, 17, INT32_MIN + 1, INT32_MAX - 1,
                               -end, 1 << 30, -(1 << 30), 17 };
    const int32_t logical[5] = { 5, LEN - 1, 0, 17, 17 }, physical[5] = { 5, POOL - 1, 0, 17, 17 };
    float *pool = floats(&p.b, POOL * p.W);
    for (int32_t i = 0; i < POOL; i++)                              /* give the last page's tail a value: it may be read by slot */
        for (int32_t j = 0; j < p.W; j++) pool[i * p.W + j] = i < LEN ? p.stored[i * p.W + j] : (float)(i - j) / 40.0f;
    memcpy(p.cache.data, pool, (size_t)(POOL * p.W) * 4);
    p.stored = pool;
    dsa_attend_args a = list_of(&p, list, 16);
    a.index_kind = kind;
    OK(solve(&p, a, NULL));
    WITHIN(3e-6, row_error(&p, 0, kind == DSA_LOGICAL ? logical : physical, 5, 0.25, NULL));
    END(p.b);
}

/* Every invalid value stands alone in a list: each must give the empty row. */
TEST a_list_of_one_invalid_index_is_empty(dsa_index_kind kind)
{
    problem p;
    enum { LEN = 16 };
    open_problem(&p, DSA_FP8, 2, 12, 4, LEN, 1, 8);
    uint64_t s = 5;
    for (int i = 0; i < 400; i++) {
        int32_t bad = (int32_t)rnd(&s);
        if (i == 0) bad = INT32_MIN;
        if (i == 1) bad = INT32_MAX;
        if (i == 2) bad = -1;
        if (i == 3) bad = LEN;
        if (bad >= 0 && bad < LEN) continue;
        dsa_attend_args a = list_of(&p, &bad, 1);
        a.index_kind = kind;
        OK(solve(&p, a, NULL));
        WITHIN(0, row_error(&p, 0, NULL, 0, 0.25, NULL));
    }
    END(p.b);
}

TEST duplicates_count_as_often_as_they_appear(void)
{
    problem p;
    open_problem(&p, DSA_F32, 2, 12, 4, 20, 1, 0);
    const int32_t list[7] = { 4, 4, 9, 4, 2, 9, 4 };
    OK(solve(&p, list_of(&p, list, 7), NULL));
    WITHIN(3e-6, row_error(&p, 0, list, 7, 0.25, NULL));
    END(p.b);
}

TEST counts_cut_each_row(void)
{
    problem p;
    open_problem(&p, DSA_F32, 2, 12, 4, 30, 6, 4);
    int32_t *lists = random_lists(&p.b, 6, 12, 30, 9);
    const int32_t counts[6] = { 0, 1, 12, 99, -4, 7 }, want[6] = { 0, 1, 10, 10, 0, 7 };
    dsa_attend_args a = list_of(&p, lists, 10);
    a.index_stride = 12;                              /* rows further apart than read */
    a.counts = counts;
    OK(solve(&p, a, NULL));
    for (int32_t i = 0; i < 6; i++) WITHIN(3e-6, row_error(&p, i, lists + 12 * i, want[i], 0.25, NULL));
    END(p.b);
}

TEST n_indices_defaults_to_top_k(void)
{
    problem p;
    open_problem(&p, DSA_F32, 2, 12, 4, 30, 2, 0);
    int32_t *lists = random_lists(&p.b, 2, 16, 30, 10);
    OK(solve(&p, list_of(&p, lists, 0), NULL));       /* the config's 16 */
    WITHIN(3e-6, row_error(&p, 0, lists, 16, 0.25, NULL));
    WITHIN(3e-6, row_error(&p, 1, lists + 16, 16, 0.25, NULL));
    END(p.b);
}

TEST physical_slots_equal_logical_positions(void)
{
    problem p;
    enum { LEN = 50, PAGE = 4, POOL = 20 };
    open_problem(&p, DSA_BF16, 3, 12, 4, LEN, 2, PAGE);
    int32_t *table = page_table(&p.b, 13, POOL, 31), *lists = random_lists(&p.b, 2, 20, LEN, 11), *slots = ints(&p.b, 40);
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_BF16, 0, PAGE);
    d.dim = p.R;
    d.dim_rope = p.r;
    dsa_cache c;
    void *pool = bag_alloc(&p.b, (size_t)(POOL * PAGE * p.W * 2));
    memset(pool, 0xFF, (size_t)(POOL * PAGE * p.W * 2));
    OK(dsa_cache_view(&p.ctx, &d, pool, POOL, 0, table, 13, 0, &c));
    OK(append(&p.ctx, &c, NULL, LEN, p.stored, NULL));
    for (int i = 0; i < 40; i++) slots[i] = table[lists[i] / PAGE] * PAGE + lists[i] % PAGE;
    p.seq.latent = &c;
    OK(solve(&p, list_of(&p, lists, 20), NULL));
    float *first = floats(&p.b, 2 * p.H * p.R);
    memcpy(first, p.out, (size_t)(2 * p.H * p.R) * 4);
    WITHIN(3e-6, row_error(&p, 1, lists + 20, 20, 0.25, NULL));
    dsa_attend_args a = list_of(&p, slots, 20);
    a.index_kind = DSA_PHYSICAL;
    OK(solve(&p, a, NULL));
    ASSERT(same_bits(first, p.out, 2 * p.H * p.R));
    END(p.b);
}

TEST nan_in_unselected_rows_never_leaks(dsa_type format)
{
    problem p;
    enum { LEN = 200 };
    open_problem(&p, format, 3, 130, 6, LEN, 3, 16);
    int32_t *lists = random_lists(&p.b, 3, 40, LEN, 12);
    unsigned char used[LEN] = { 0 };
    for (int i = 0; i < 120; i++) { if (i % 5 == 0) lists[i] = -1 - i; else used[lists[i]] = 1; }
    OK(solve(&p, list_of(&p, lists, 40), NULL));
    float *clean = floats(&p.b, 3 * 3 * 130);
    memcpy(clean, p.out, 3 * 3 * 130 * 4);
    for (int32_t i = 0; i < 208; i++)                 /* 0xFF is NaN in every one of the formats; the pool's tail as well */
        if (i >= LEN || !used[i])
            memset((unsigned char *)p.cache.data + (size_t)(i / 16) * p.cache.page_stride + (size_t)(i % 16) * p.cache.row_stride, 0xFF, p.cache.row_stride);
    OK(solve(&p, list_of(&p, lists, 40), NULL));
    ASSERT(same_bits(clean, p.out, 3 * 3 * 130));
    for (int i = 0; i < 3 * 3 * 130; i++) ASSERT(isfinite(p.out[i]));
    END(p.b);
}

TEST nan_beyond_the_range_never_leaks(void)
{
    problem p;
    open_problem(&p, DSA_F32, 2, 12, 4, 64, 4, 8);
    int64_t ks[4] = { 5, 6, 7, 8 }, ke[4] = { 20, 21, 22, 23 };
    float bad[16];
    for (int i = 0; i < 16; i++) bad[i] = NAN;
    for (int64_t i = 0; i < 64; i++)
        if (i < 5 || i >= 23) memcpy((char *)p.cache.data + (size_t)(i / 8) * p.cache.page_stride + (size_t)(i % 8) * p.cache.row_stride, bad, 64);
    dsa_attend_args a = args_of(&p, DSA_ATTEND_RANGE);
    a.ks = ks;
    a.ke = ke;
    OK(solve(&p, a, NULL));
    for (int32_t i = 0; i < 4; i++)
        WITHIN(3e-6, row_error(&p, i, counting(&p.b, (int32_t)ks[i], (int32_t)ke[i]), 15, 0.25, NULL));
    END(p.b);
}

/* ---- empty rows, sinks, ranges -------------------------------------------------------------------- */
TEST empty_rows_are_zero_with_infinite_lse(void)
{
    problem p;
    open_problem(&p, DSA_F32, 3, 12, 4, 20, 3, 0);
    int64_t ks[3] = { 5, 9, 20 }, ke[3] = { 5, 4, 30 };
    const float sinks[3] = { 0.5f, -INFINITY, INFINITY };
    dsa_attend_args a = args_of(&p, DSA_ATTEND_RANGE);
    a.ks = ks;
    a.ke = ke;
    for (int with = 0; with < 2; with++) {
        OK(solve(&p, a, with ? sinks : NULL));
        for (int i = 0; i < 3 * 3 * 12; i++) ASSERT_EQ_FMT(0.0, (double)p.out[i], "%g");
        for (int i = 0; i < 9; i++) { ASSERT(isinf(p.lse[i]) && p.lse[i] > 0); ASSERT(isinf(p.max[i]) && p.max[i] < 0); }
    }
    END(p.b);
}

TEST sinks_match(void)
{
    problem p;
    open_problem(&p, DSA_F32, 6, 12, 4, 40, 3, 8);
    const float sinks[6] = { 0, 2.5f, -3, -INFINITY, INFINITY, 60 };
    int32_t *lists = random_lists(&p.b, 3, 10, 40, 13);
    OK(solve(&p, list_of(&p, lists, 10), sinks));
    for (int32_t i = 0; i < 3; i++) {
        WITHIN(3e-6, row_error(&p, i, lists + 10 * i, 10, 0.25, sinks));
        for (int j = 0; j < 12; j++) ASSERT_EQ_FMT(0.0, (double)p.out[(i * 6 + 4) * 12 + j], "%g");
    }
    /* -inf changes no bit */
    float none[6];
    for (int h = 0; h < 6; h++) none[h] = -INFINITY;
    OK(solve(&p, list_of(&p, lists, 10), NULL));
    float *plain = floats(&p.b, 3 * 6 * 12);
    memcpy(plain, p.out, 3 * 6 * 12 * 4);
    OK(solve(&p, list_of(&p, lists, 10), none));
    ASSERT(same_bits(plain, p.out, 3 * 6 * 12));
    END(p.b);
}

/* Sinks far above and far below the logits, relative to what little is left: out = acc / (sum + e^(z - max)). */
TEST sinks_keep_their_weight_at_any_distance(void)
{
    dsa_ctx ctx = context(1, 3, 2);
    const float distance[] = { -3e38f, -200, -87.5f, -60, -20, -1, 0, 1, 20, 40, 60, 80 };
    float max = 2.5f, sum = 3.5f, acc[3] = { 7, -1e-3f, 2e20f }, out[3], merged[3], lse[2], part[3], part_lse;
    dsa_attend_state s;
    memset(&s, 0, sizeof s);
    s.n_rows = 1;
    s.max = &max;
    s.sum = &sum;
    s.out = acc;
    const float *parts = part, *part_lses = &part_lse;
    OK(dsa_attend_partial(&ctx, &s, part, &part_lse));
    for (size_t i = 0; i < sizeof distance / sizeof *distance; i++) {
        float z = max + distance[i];
        OK(dsa_attend_finish(&ctx, &s, &z, out, &lse[0], NULL));
        OK(dsa_attend_merge(&ctx, 1, &parts, &part_lses, 1, 1, 3, &z, merged, &lse[1]));
        for (int d = 0; d < 3; d++) {
            double want = (double)acc[d] / ((double)sum + exp((double)z - (double)max));
            ASSERT_IN_RANGE(1, (double)out[d] / want, 2e-6);
            ASSERT_IN_RANGE(1, (double)merged[d] / want, 2e-5);      /* lse near 80 carries 4e-6 of rounding */
        }
        for (int j = 0; j < 2; j++) ASSERT_IN_RANGE((double)max + log((double)sum), (double)lse[j], 1e-6);
    }
    const float beyond[3] = { 300, 3e38f, INFINITY };                    /* nothing is left */
    for (int i = 0; i < 3; i++) {
        OK(dsa_attend_finish(&ctx, &s, &beyond[i], out, NULL, NULL));
        OK(dsa_attend_merge(&ctx, 1, &parts, &part_lses, 1, 1, 3, &beyond[i], merged, NULL));
        for (int d = 0; d < 3; d++) {
            ASSERT_EQ_FMT(0.0, (double)out[d], "%g");
            ASSERT_EQ_FMT(0.0, (double)merged[d], "%g");
        }
    }
    PASS();
}

/* One row with logit 0 and value 1, one far below it with a huge value: e^x has to hold down to its end at -87. */
TEST a_far_logit_keeps_its_weight(void)
{
    const double logit[5] = { -10, -30, -60, -80, -86 }, value[5] = { 1e5, 1e14, 1e27, 1e36, 1e38 };
    for (int i = 0; i < 5; i++) {
        bag b = { NULL, 0 };
        dsa_ctx ctx = context(2, 4, 2);
        dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, 2, 0);
        dsa_cache cache = cache_of(&b, &ctx, &d);
        dsa_seq s = seq_of(&cache, NULL, 1);
        float rows[2][6] = { { 1, 1, 1, 1, 0, 0 } }, q[2][6] = { { 0 } }, out[8], lse[2], max[2];
        for (int j = 0; j < 4; j++) rows[1][j] = (float)value[i];
        rows[1][4] = (float)(logit[i] / 0.25);
        q[0][4] = q[1][4] = 1;
        OK(append(&ctx, &cache, NULL, 2, rows[0], NULL));
        dsa_attend_args a;
        memset(&a, 0, sizeof a);
        a.n_seqs = 1;
        a.seqs = &s;
        a.q = q[0];
        a.what = DSA_ATTEND_VISIBLE;
        OK(attend(&b, &ctx, a, 1, 2, 4, NULL, out, lse, max));
        double p = exp(logit[i]), want = (1 + p * (double)rows[1][0]) / (1 + p);
        for (int j = 0; j < 8; j++) ASSERT_IN_RANGE(1, (double)out[j] / want, 3e-6);
        bag_free(&b);
    }
    PASS();
}

/* A logit of -inf weighs nothing, even where no other came before: rows [0, 200) have one, rows [200, 300) do not. */
TEST minus_infinite_logits_weigh_nothing(dsa_type format, dsa_precision precision)
{
    bag b = { NULL, 0 };
    enum { H = 3, R = 24, RR = 8, W = R + RR, N = 300, NONE = 200 };
    dsa_ctx ctx = context(H, R, RR);
    ctx.config.precision = precision;
    dsa_cache_desc d = desc_of(DSA_LATENT, format, N, 16);
    dsa_cache cache = cache_of(&b, &ctx, &d);
    float *rows = random_floats(&b, N * W, 60, 1), *q = random_floats(&b, H * W, 61, 1);
    for (int j = 0; j < NONE; j++) rows[j * W + R] = -INFINITY;
    for (int h = 0; h < H; h++) q[h * W + R] = 0.75f;
    OK(append(&ctx, &cache, NULL, N, rows, NULL));
    dsa_seq s = seq_of(&cache, NULL, 1);
    int64_t ks = 0, ke = NONE;
    dsa_attend_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &s;
    a.q = q;
    a.what = DSA_ATTEND_RANGE;
    a.ks = &ks;
    a.ke = &ke;
    float out[3][H * R], lse[3][H], max[3][H];
    OK(attend(&b, &ctx, a, 1, H, R, NULL, out[0], lse[0], max[0]));      /* nothing else: an empty row */
    for (int i = 0; i < H * R; i++) ASSERT_EQ_FMT(0.0, (double)out[0][i], "%g");
    for (int h = 0; h < H; h++) {
        ASSERT(isinf(lse[0][h]) && lse[0][h] > 0);
        ASSERT(isinf(max[0][h]) && max[0][h] < 0);
    }
    ke = N;
    OK(attend(&b, &ctx, a, 1, H, R, NULL, out[1], lse[1], max[1]));      /* before others, in one call */
    dsa_attend_state state = state_of(&b, 1, H, R);
    OK(dsa_attend_begin(&ctx, &state));
    ke = NONE;
    OK(add(&b, &ctx, a, &state));                                        /* before others, in a call of its own */
    ks = NONE;
    ke = N;
    OK(add(&b, &ctx, a, &state));
    OK(dsa_attend_finish(&ctx, &state, NULL, out[0], lse[0], max[0]));
    OK(attend(&b, &ctx, a, 1, H, R, NULL, out[2], lse[2], max[2]));      /* the others alone */
    ASSERT(same_bits(out[0], out[2], H * R));
    ASSERT(same_bits(lse[0], lse[2], H));
    ASSERT(same_bits(max[1], max[2], H));
    const double bound = precision == DSA_PRECISION_F32 ? 3e-6 : 1e-2;   /* the blocks begin elsewhere */
    WITHIN(bound, max_error_f(out[1], out[2], H * R));
    WITHIN(bound, max_error_f(lse[1], lse[2], H));
    END(b);
}

/* A NaN that only the logit sees, in a row that is read: that query's whole output, and nobody else's. */
TEST nan_in_a_selected_row_reaches_its_query(dsa_type format)
{
    bag b = { NULL, 0 };
    enum { H = 3, R = 24, RR = 8, W = R + RR, N = 300, BAD = 17 };
    dsa_ctx ctx = context(H, R, RR);
    dsa_cache_desc d = desc_of(DSA_LATENT, format, N, 16);
    dsa_cache cache = cache_of(&b, &ctx, &d);
    float *rows = random_floats(&b, N * W, 62, 1), *q = random_floats(&b, 3 * H * W, 63, 1), out[3][H * R], lse[3][H];
    rows[BAD * W + R + 1] = NAN;
    OK(append(&ctx, &cache, NULL, N, rows, NULL));
    int32_t lists[3][N];
    for (int i = 0; i < N; i++) {
        lists[0][i] = i;                                                 /* early */
        lists[1][i] = i == BAD ? -1 : i;                                 /* not at all */
        lists[2][i] = N - 1 - i;                                         /* in a later block */
    }
    dsa_seq s = seq_of(&cache, NULL, 3);
    dsa_attend_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &s;
    a.q = q;
    a.indices = lists[0];
    a.n_indices = N;
    OK(attend(&b, &ctx, a, 3, H, R, NULL, out[0], lse[0], NULL));
    for (int row = 0; row < 3; row++) {
        for (int i = 0; i < H * R; i++) ASSERT_EQ_FMT(row != 1, isnan(out[row][i]) != 0, "%d");
        for (int h = 0; h < H; h++) ASSERT_EQ_FMT(row != 1, isnan(lse[row][h]) != 0, "%d");
    }
    END(b);
}

TEST ranges_are_clamped(void)
{
    problem p;
    open_problem(&p, DSA_F32, 2, 12, 4, 20, 4, 0);
    int64_t ks[4] = { -5, INT64_MIN, 18, 7 }, ke[4] = { 3, INT64_MAX, 500, 8 };
    dsa_attend_args a = args_of(&p, DSA_ATTEND_RANGE);
    a.ks = ks;
    a.ke = ke;
    OK(solve(&p, a, NULL));
    WITHIN(3e-6, row_error(&p, 0, counting(&p.b, 0, 3), 3, 0.25, NULL));
    WITHIN(3e-6, row_error(&p, 1, counting(&p.b, 0, 20), 20, 0.25, NULL));
    WITHIN(3e-6, row_error(&p, 2, counting(&p.b, 18, 20), 2, 0.25, NULL));
    WITHIN(3e-6, row_error(&p, 3, counting(&p.b, 7, 8), 1, 0.25, NULL));
    END(p.b);
}

TEST huge_logits_are_stable(void)
{
    problem p;
    open_problem(&p, DSA_F32, 2, 12, 4, 50, 2, 0);
    for (int i = 0; i < 2 * 2 * 16; i++) p.q[i] *= 1e4f;
    dsa_attend_args a = args_of(&p, DSA_ATTEND_VISIBLE);
    a.scale = 1;
    const float sinks[2] = { 1e4f, -1e4f };
    OK(solve(&p, a, NULL));
    /* logits near 1e4 carry an f32 rounding of 1e-3 each, so only a sharp winner can be compared closely */
    for (int i = 0; i < 2 * 2 * 12; i++) ASSERT(isfinite(p.out[i]) && fabsf(p.out[i]) <= 1.5f);
    for (int i = 0; i < 4; i++) { ASSERT(isfinite(p.lse[i])); ASSERT_IN_RANGE(p.max[i], p.lse[i], 4); }
    WITHIN(2e-2, row_error(&p, 1, counting(&p.b, 0, 50), 50, 1, NULL));
    OK(solve(&p, a, sinks));
    for (int i = 0; i < 2 * 2 * 12; i++) ASSERT(isfinite(p.out[i]));
    END(p.b);
}

TEST lse_and_max_of_one_row_are_its_logit(void)
{
    problem p;
    open_problem(&p, DSA_F32, 3, 12, 4, 20, 1, 0);
    const int32_t one = 11;
    OK(solve(&p, list_of(&p, &one, 1), NULL));
    for (int h = 0; h < 3; h++) {
        double x = 0;
        for (int i = 0; i < 16; i++) x += (double)p.q[h * 16 + i] * (double)p.stored[11 * 16 + i];
        ASSERT_IN_RANGE(x * 0.25, p.max[h], 1e-6);
        ASSERT_EQ_FMT((double)p.max[h], (double)p.lse[h], "%.9g");  /* ln 1 = 0 */
        ASSERT(same_bits(p.stored + 11 * 16, p.out + h * 12, 12));  /* weight exactly 1 */
    }
    END(p.b);
}

TEST lse_and_max_are_optional(void)
{
    problem p;
    open_problem(&p, DSA_F32, 3, 12, 4, 20, 2, 0);
    OK(solve(&p, args_of(&p, DSA_ATTEND_VISIBLE), NULL));
    float *again = floats(&p.b, 2 * 3 * 12);
    OK(attend(&p.b, &p.ctx, args_of(&p, DSA_ATTEND_VISIBLE), 2, 3, 12, NULL, again, NULL, NULL));
    ASSERT(same_bits(p.out, again, 2 * 3 * 12));
    END(p.b);
}

/* Only the first dim_v channels are the value. */
TEST the_value_may_be_narrower(void)
{
    problem p;
    open_problem(&p, DSA_F32, 3, 12, 4, 20, 1, 0);
    int32_t *all = counting(&p.b, 0, 20);
    float *narrow = floats(&p.b, 3 * 7);
    OK(solve(&p, args_of(&p, DSA_ATTEND_VISIBLE), NULL));
    WITHIN(3e-6, row_error(&p, 0, all, 20, 0.25, NULL));
    OK(attend(&p.b, &p.ctx, args_of(&p, DSA_ATTEND_VISIBLE), 1, 3, 7, NULL, narrow, p.lse, p.max));
    for (int h = 0; h < 3; h++) WITHIN(3e-6, max_error_f(narrow + 7 * h, p.out + 12 * h, 7));
    END(p.b);
}

/* ---- the same bits --------------------------------------------------------------------------------- */
TEST a_list_of_a_range_is_the_range(dsa_type format)
{
    problem p;
    open_problem(&p, format, 3, 140, 8, 700, 3, 32);
    int64_t ks[3] = { 0, 17, 333 }, ke[3] = { 600, 617, 933 };
    int32_t *lists = ints(&p.b, 3 * 600), counts[3] = { 600, 600, 367 };
    for (int i = 0; i < 3; i++) for (int j = 0; j < 600; j++) lists[600 * i + j] = (int32_t)ks[i] + j;
    dsa_attend_args a = args_of(&p, DSA_ATTEND_RANGE);
    a.ks = ks;
    a.ke = ke;
    OK(solve(&p, a, NULL));
    float *out = floats(&p.b, 3 * 3 * 140), *lse = floats(&p.b, 9);
    memcpy(out, p.out, 3 * 3 * 140 * 4);
    memcpy(lse, p.lse, 9 * 4);
    OK(solve(&p, list_of(&p, lists, 600), NULL));     /* row 2 runs past len: invalid entries, as clamped */
    ASSERT(same_bits(out, p.out, 3 * 3 * 140));
    ASSERT(same_bits(lse, p.lse, 9));
    a = list_of(&p, lists, 600);
    a.counts = counts;
    OK(solve(&p, a, NULL));
    ASSERT(same_bits(out, p.out, 3 * 3 * 140));
    END(p.b);
}

TEST visible_is_the_range_up_to_the_query(void)
{
    problem p;
    open_problem(&p, DSA_BF16, 3, 24, 8, 300, 5, 32);
    int64_t ks[5] = { 0 }, ke[5];
    for (int i = 0; i < 5; i++) ke[i] = 296 + i;
    OK(solve(&p, args_of(&p, DSA_ATTEND_VISIBLE), NULL));
    float *out = floats(&p.b, 5 * 3 * 24);
    memcpy(out, p.out, 5 * 3 * 24 * 4);
    dsa_attend_args a = args_of(&p, DSA_ATTEND_RANGE);
    a.ks = ks;
    a.ke = ke;
    OK(solve(&p, a, NULL));
    ASSERT(same_bits(out, p.out, 5 * 3 * 24));
    END(p.b);
}

TEST padding_changes_no_bit(void)
{
    problem p;
    open_problem(&p, DSA_F32, 3, 24, 8, 400, 1, 0);
    int32_t *list = random_lists(&p.b, 1, 150, 400, 14), *padded = ints(&p.b, 1000);
    for (int i = 0; i < 1000; i++) padded[i] = i < 150 ? list[i] : -1;
    OK(solve(&p, list_of(&p, list, 150), NULL));
    float out[3 * 24], lse[3];
    memcpy(out, p.out, sizeof out);
    memcpy(lse, p.lse, sizeof lse);
    OK(solve(&p, list_of(&p, padded, 1000), NULL));
    ASSERT(same_bits(out, p.out, 72));
    ASSERT(same_bits(lse, p.lse, 3));
    END(p.b);
}

TEST threads_change_no_bit(dsa_attend_what what)
{
    problem p;
    open_problem(&p, DSA_FP8, 8, 140, 8, 900, 3, 16);
    int32_t *lists = random_lists(&p.b, 3, 500, 900, 15);
    int64_t ks[3] = { 0, 5, 800 }, ke[3] = { 700, 900, 801 };
    dsa_attend_args a = list_of(&p, lists, 500);
    a.what = what;
    a.ks = ks;
    a.ke = ke;
    float *out = NULL, *lse = NULL, *max = NULL;
    const dsa_ctx plain = p.ctx;
    const int32_t threads[4] = { 1, 2, 3, 8 };
    for (int t = 0; t < 4; t++) {
        backwards b;
        p.ctx = with_threads(&plain, &b, threads[t]);
        OK(solve(&p, a, NULL));
        ASSERT_FALSE(b.broken);
        if (t == 0) { out = p.out; lse = p.lse; max = p.max; p.out = floats(&p.b, 3 * 8 * 140); p.lse = floats(&p.b, 24); p.max = floats(&p.b, 24); continue; }
        ASSERT(same_bits(out, p.out, 3 * 8 * 140));
        ASSERT(same_bits(lse, p.lse, 24));
        ASSERT(same_bits(max, p.max, 24));
    }
    END(p.b);
}

/* Fewer rows than threads: the heads are split. 40 heads are no multiple of any part. */
TEST split_heads_change_no_bit(int32_t n_rows)
{
    problem p;
    enum { H = 40, R = 24, LEN = 300 };
    open_problem(&p, DSA_F32, H, R, 8, LEN, n_rows, 16);
    int32_t *lists = random_lists(&p.b, n_rows, 250, LEN, 16);
    const int64_t n = (int64_t)n_rows * H;
    float *out = NULL, *lse = NULL, *max = NULL;
    const dsa_ctx plain = p.ctx;
    const int32_t threads[5] = { 1, 2, 3, 4, 8 };
    for (int t = 0; t < 5; t++) {
        backwards b;
        p.ctx = with_threads(&plain, &b, threads[t]);
        OK(solve(&p, list_of(&p, lists, 250), NULL));
        ASSERT_FALSE(b.broken);
        ASSERT(threads[t] == 1 || b.calls > 0);
        if (t == 0) {
            for (int32_t i = 0; i < n_rows; i++) WITHIN(1e-5, row_error(&p, i, lists + 250 * i, 250, 0.25, NULL));
            out = p.out; lse = p.lse; max = p.max;
            p.out = floats(&p.b, n * R); p.lse = floats(&p.b, n); p.max = floats(&p.b, n);
            continue;
        }
        ASSERT(same_bits(out, p.out, n * R));
        ASSERT(same_bits(lse, p.lse, n));
        ASSERT(same_bits(max, p.max, n));
    }
    END(p.b);
}

/* A ragged batch, paged differently per sequence, equals each row alone over a contiguous cache. */
TEST batch_and_paging_change_no_bit(void)
{
    bag b = { NULL, 0 };
    enum { H = 3, R = 40, RR = 8, W = R + RR, ROWS = 7 };
    dsa_ctx ctx = context(H, R, RR);
    const int32_t len[3] = { 90, 33, 260 }, n_q[3] = { 1, 4, 2 }, page[3] = { 4, 16, 1 };
    dsa_cache paged[3], plain[3];
    dsa_seq seqs[3];
    float *q = random_floats(&b, ROWS * H * W, 40, 1), *out = floats(&b, ROWS * H * R), *lse = floats(&b, ROWS * H), one[H * R], one_lse[H];
    for (int i = 0; i < 3; i++) {
        float *rows = random_floats(&b, len[i] * W, (uint64_t)(50 + i), 1);
        dsa_cache_desc d = desc_of(DSA_LATENT, DSA_BF16, len[i], 0);
        plain[i] = cache_of(&b, &ctx, &d);
        d.page_size = page[i];
        d.dim = R;
        d.dim_rope = RR;
        int32_t blocks = (len[i] + page[i] - 1) / page[i], pool = blocks + 5;
        void *memory = bag_alloc(&b, (size_t)pool * (size_t)page[i] * W * 2);
        OK(dsa_cache_view(&ctx, &d, memory, pool, 0, page_table(&b, blocks, pool, (uint64_t)i), blocks, 0, &paged[i]));
        OK(append(&ctx, &plain[i], NULL, len[i], rows, NULL));
        OK(append(&ctx, &paged[i], NULL, len[i], rows, NULL));
        seqs[i] = seq_of(&paged[i], NULL, n_q[i]);
    }
    dsa_attend_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 3;
    a.seqs = seqs;
    a.q = q;
    a.what = DSA_ATTEND_VISIBLE;
    OK(attend(&b, &ctx, a, ROWS, H, R, NULL, out, lse, NULL));
    for (int i = 0, row = 0; i < 3; i++)
        for (int j = 0; j < n_q[i]; j++, row++) {
            dsa_seq s = seq_of(&plain[i], NULL, 1);
            s.len = len[i] - n_q[i] + j + 1;
            a.n_seqs = 1;
            a.seqs = &s;
            a.q = q + row * H * W;
            OK(attend(&b, &ctx, a, 1, H, R, NULL, one, one_lse, NULL));
            ASSERT(same_bits(one, out + row * H * R, H * R));
            ASSERT(same_bits(one_lse, lse + row * H, H));
        }
    END(b);
}

/* ---- the running state --------------------------------------------------------------------------------- */
TEST two_adds_are_one_over_the_union(void)
{
    problem p;
    open_problem(&p, DSA_F32, 3, 24, 8, 300, 2, 16);
    int32_t *lists = random_lists(&p.b, 2, 200, 300, 16);
    OK(solve(&p, list_of(&p, lists, 200), NULL));
    dsa_attend_state s = state_of(&p.b, 2, 3, 24);
    OK(dsa_attend_begin(&p.ctx, &s));
    dsa_attend_args a = list_of(&p, lists, 130);
    a.index_stride = 200;
    OK(add(&p.b, &p.ctx, a, &s));
    a.indices = lists + 130;
    a.n_indices = 70;
    OK(add(&p.b, &p.ctx, a, &s));
    float *out = floats(&p.b, 2 * 3 * 24), *lse = floats(&p.b, 6), *max = floats(&p.b, 6);
    OK(dsa_attend_finish(&p.ctx, &s, NULL, out, lse, max));
    WITHIN(1e-6, max_error_f(out, p.out, 2 * 3 * 24));
    WITHIN(1e-6, max_error_f(lse, p.lse, 6));
    ASSERT(same_bits(max, p.max, 6));
    END(p.b);
}

/* A second pool, in another format's shoes: other cache, other page size, one softmax. */
TEST an_add_over_a_second_cache_joins_the_softmax(void)
{
    problem p, o;
    open_problem(&p, DSA_F32, 3, 24, 8, 60, 2, 16);
    open_problem(&o, DSA_FP8, 3, 24, 8, 45, 2, 2);
    for (int i = 0; i < 45 * 32; i++) o.stored[i] = -0.5f * o.stored[i];
    OK(dsa_cache_truncate(&o.ctx, &o.cache, 0));
    OK(append(&o.ctx, &o.cache, NULL, 45, o.stored, NULL));
    OK(dsa_cache_read(&o.ctx, &o.cache, 0, 45, o.stored));
    dsa_attend_state s = state_of(&p.b, 2, 3, 24);
    OK(dsa_attend_begin(&p.ctx, &s));
    OK(add(&p.b, &p.ctx, args_of(&p, DSA_ATTEND_VISIBLE), &s));
    dsa_attend_args a = args_of(&o, DSA_ATTEND_VISIBLE);
    a.q = p.q;
    OK(add(&p.b, &p.ctx, a, &s));
    OK(dsa_attend_finish(&p.ctx, &s, NULL, p.out, p.lse, p.max));
    float *both = floats(&p.b, 105 * 32);
    memcpy(both, p.stored, 60 * 32 * 4);
    memcpy(both + 60 * 32, o.stored, 45 * 32 * 4);
    p.stored = both;
    int32_t *list = ints(&p.b, 105);
    for (int row = 0; row < 2; row++) {
        int n = 0;
        for (int i = 0; i < 59 + row; i++) list[n++] = i;
        for (int i = 0; i < 44 + row; i++) list[n++] = 60 + i;
        WITHIN(3e-6, row_error(&p, row, list, n, 0.25, NULL));
    }
    bag_free(&o.b);
    END(p.b);
}

TEST an_empty_add_changes_no_bit(void)
{
    problem p;
    open_problem(&p, DSA_F32, 3, 24, 8, 50, 2, 16);
    const int32_t none[4] = { -1, 50, INT32_MIN, 1 << 20 };
    int64_t ks[2] = { 9, 50 }, ke[2] = { 9, 60 };
    dsa_attend_args empty = list_of(&p, none, 2), range = args_of(&p, DSA_ATTEND_RANGE);
    range.ks = ks;
    range.ke = ke;
    OK(solve(&p, args_of(&p, DSA_ATTEND_VISIBLE), NULL));
    for (int where = 0; where < 3; where++) {         /* before, after, both */
        dsa_attend_state s = state_of(&p.b, 2, 3, 24);
        float *out = floats(&p.b, 2 * 3 * 24), *lse = floats(&p.b, 6);
        OK(dsa_attend_begin(&p.ctx, &s));
        if (where != 1) OK(add(&p.b, &p.ctx, empty, &s));
        OK(add(&p.b, &p.ctx, args_of(&p, DSA_ATTEND_VISIBLE), &s));
        if (where != 0) OK(add(&p.b, &p.ctx, range, &s));
        OK(dsa_attend_finish(&p.ctx, &s, NULL, out, lse, NULL));
        ASSERT(same_bits(p.out, out, 2 * 3 * 24));
        ASSERT(same_bits(p.lse, lse, 6));
    }
    END(p.b);
}

/* The documented meaning of max, sum and out. */
TEST the_state_is_what_the_header_says(void)
{
    problem p;
    open_problem(&p, DSA_F32, 3, 24, 8, 50, 2, 16);
    dsa_attend_state s = state_of(&p.b, 2, 3, 24);
    OK(dsa_attend_begin(&p.ctx, &s));
    for (int i = 0; i < 6; i++) { ASSERT(isinf(s.max[i]) && s.max[i] < 0); ASSERT_EQ_FMT(0.0, (double)s.sum[i], "%g"); }
    for (int i = 0; i < 6 * 24; i++) ASSERT_EQ_FMT(0.0, (double)s.out[i], "%g");
    OK(add(&p.b, &p.ctx, args_of(&p, DSA_ATTEND_VISIBLE), &s));
    OK(solve(&p, args_of(&p, DSA_ATTEND_VISIBLE), NULL));
    for (int i = 0; i < 6; i++) {
        ASSERT_EQ_FMT((double)p.max[i], (double)s.max[i], "%.9g");
        ASSERT_IN_RANGE((double)p.lse[i], (double)s.max[i] + log((double)s.sum[i]), 1e-6);
        for (int j = 0; j < 24; j++) ASSERT_IN_RANGE((double)p.out[24 * i + j], (double)s.out[24 * i + j] / (double)s.sum[i], 1e-6);
    }
    /* finish may write in place */
    OK(dsa_attend_finish(&p.ctx, &s, NULL, s.out, NULL, NULL));
    ASSERT(same_bits(p.out, s.out, 2 * 3 * 24));
    END(p.b);
}

/* Shards, one of them empty, merged: the whole. */
TEST merged_partials_are_the_whole(int n_parts)
{
    problem p;
    enum { LEN = 300, ROWS = 3, H = 3, R = 24 };
    open_problem(&p, DSA_F32, H, R, 8, LEN, ROWS, 16);
    const float sinks[H] = { 0.3f, -INFINITY, 5 };
    float *out[8], *lse[8], merged[ROWS * H * R], merged_lse[ROWS * H];
    const float *outs[8], *lses[8];
    for (int part = 0; part < n_parts; part++) {
        int64_t ks[ROWS], ke[ROWS];
        for (int i = 0; i < ROWS; i++) {
            int64_t sees = LEN - ROWS + i + 1;
            ks[i] = sees * part / n_parts;
            ke[i] = sees * (part + 1) / n_parts;
            if (part == 1 && n_parts > 2) ke[i] = ks[i];                      /* an empty shard ... */
            if (part == 2 && n_parts > 2) ks[i] = sees / n_parts;            /* ... whose rows the next one takes */
        }
        dsa_attend_args a = args_of(&p, DSA_ATTEND_RANGE);
        a.ks = ks;
        a.ke = ke;
        dsa_attend_state s = state_of(&p.b, ROWS, H, R);
        OK(dsa_attend_begin(&p.ctx, &s));
        OK(add(&p.b, &p.ctx, a, &s));
        outs[part] = out[part] = floats(&p.b, ROWS * H * R);
        lses[part] = lse[part] = floats(&p.b, ROWS * H);
        OK(dsa_attend_partial(&p.ctx, &s, out[part], lse[part]));
        if (part == 1 && n_parts > 2)
            for (int i = 0; i < ROWS * H; i++) { ASSERT(isinf(lse[1][i]) && lse[1][i] < 0); ASSERT_EQ_FMT(0.0, (double)out[1][R * i], "%g"); }
    }
    for (int with = 0; with < 2; with++) {
        OK(solve(&p, args_of(&p, DSA_ATTEND_VISIBLE), with ? sinks : NULL));
        OK(dsa_attend_merge(&p.ctx, n_parts, outs, lses, ROWS, H, R, with ? sinks : NULL, merged, merged_lse));
        WITHIN(1e-6, max_error_f(merged, p.out, ROWS * H * R));
        WITHIN(1e-6, max_error_f(merged_lse, p.lse, ROWS * H));
    }
    END(p.b);
}

TEST merging_nothing_but_empty_shards_is_an_empty_row(void)
{
    dsa_ctx ctx = context(2, 4, 2);
    float out[2][8] = { { 0 } }, lse[2][2] = { { -INFINITY, -INFINITY }, { -INFINITY, 1.5f } }, merged[8], l[2];
    for (int i = 4; i < 8; i++) out[1][i] = 3.0f;
    const float *outs[2] = { out[0], out[1] }, *lses[2] = { lse[0], lse[1] };
    OK(dsa_attend_merge(&ctx, 2, outs, lses, 1, 2, 4, NULL, merged, l));
    for (int i = 0; i < 4; i++) ASSERT_EQ_FMT(0.0, (double)merged[i], "%g");
    for (int i = 4; i < 8; i++) ASSERT_EQ_FMT(3.0, (double)merged[i], "%g");
    ASSERT(isinf(l[0]) && l[0] > 0);
    ASSERT_EQ_FMT(1.5, (double)l[1], "%g");
    PASS();
}

/* e^lse would overflow or vanish; only differences may be exponentiated. */
TEST merging_survives_huge_lse(void)
{
    dsa_ctx ctx = context(2, 1, 2);
    float out[2][2] = { { 1, 1 }, { 3, 3 } }, lse[2][2] = { { 5000, -5000 }, { 5000, -5000 } }, merged[2], l[2];
    const float *outs[2] = { out[0], out[1] }, *lses[2] = { lse[0], lse[1] };
    OK(dsa_attend_merge(&ctx, 2, outs, lses, 1, 2, 1, NULL, merged, l));
    for (int i = 0; i < 2; i++) {
        ASSERT_IN_RANGE(2, merged[i], 1e-6);
        ASSERT_IN_RANGE((double)lse[0][i] + log(2), l[i], 1e-3);
    }
    PASS();
}

/* A window: the newest rows and, added to it, a list of older ones. */
TEST a_window_and_a_list_share_one_softmax(void)
{
    problem p;
    open_problem(&p, DSA_F32, 3, 24, 8, 100, 1, 16);
    int64_t ks = 84, ke = 100;
    int32_t *list = random_lists(&p.b, 1, 30, 84, 17), all[46];
    dsa_attend_args a = args_of(&p, DSA_ATTEND_RANGE);
    a.ks = &ks;
    a.ke = &ke;
    dsa_attend_state s = state_of(&p.b, 1, 3, 24);
    OK(dsa_attend_begin(&p.ctx, &s));
    OK(add(&p.b, &p.ctx, a, &s));
    OK(add(&p.b, &p.ctx, list_of(&p, list, 30), &s));
    OK(dsa_attend_finish(&p.ctx, &s, NULL, p.out, p.lse, p.max));
    for (int i = 0; i < 46; i++) all[i] = i < 16 ? 84 + i : list[i - 16];
    WITHIN(3e-6, row_error(&p, 0, all, 46, 0.25, NULL));
    END(p.b);
}

/* PRECISION_AUTO may round to bf16 over bf16 latents, but stays near; over f32 it must not round at all. */
TEST automatic_precision_stays_near(dsa_type format)
{
    problem p;
    open_problem(&p, format, 4, 128, 16, 200, 2, 0);
    p.ctx.config.precision = DSA_PRECISION_AUTO;
    OK(solve(&p, args_of(&p, DSA_ATTEND_VISIBLE), NULL));
    WITHIN(format == DSA_F32 ? 3e-6 : 2e-2, row_error(&p, 1, counting(&p.b, 0, 200), 200, 0.25, NULL));
    END(p.b);
}

SUITE(attend_suite)
{
    static const char *const names[3] = { "f32", "bf16", "fp8" };
    static const dsa_type formats[3] = { DSA_F32, DSA_BF16, DSA_FP8 };
    for (int f = 0; f < 3; f++)
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
            char suffix[64];
            snprintf(suffix, sizeof suffix, "%s_%s", names[f], shapes[i].name);
            CASE(suffix, a_list_matches, formats[f], &shapes[i]);
            CASE(suffix, a_range_matches, formats[f], &shapes[i]);
            CASE(suffix, everything_visible_matches, formats[f], &shapes[i]);
        }
    RUN_TEST(a_long_row_matches);
    RUN_TEST(a_shorter_len_hides_the_rest);
    RUN_TEST(the_scale_is_explicit);
    CASE("logical", invalid_indices_are_skipped_everywhere, DSA_LOGICAL);
    CASE("physical", invalid_indices_are_skipped_everywhere, DSA_PHYSICAL);
    CASE("logical", a_list_of_one_invalid_index_is_empty, DSA_LOGICAL);
    CASE("physical", a_list_of_one_invalid_index_is_empty, DSA_PHYSICAL);
    RUN_TEST(duplicates_count_as_often_as_they_appear);
    RUN_TEST(counts_cut_each_row);
    RUN_TEST(n_indices_defaults_to_top_k);
    RUN_TEST(physical_slots_equal_logical_positions);
    CASE("f32", nan_in_unselected_rows_never_leaks, DSA_F32);
    CASE("bf16", nan_in_unselected_rows_never_leaks, DSA_BF16);
    CASE("fp8", nan_in_unselected_rows_never_leaks, DSA_FP8);
    RUN_TEST(nan_beyond_the_range_never_leaks);
    RUN_TEST(empty_rows_are_zero_with_infinite_lse);
    RUN_TEST(sinks_match);
    RUN_TEST(sinks_keep_their_weight_at_any_distance);
    RUN_TEST(a_far_logit_keeps_its_weight);
    CASE("f32", minus_infinite_logits_weigh_nothing, DSA_F32, DSA_PRECISION_F32);
    CASE("bf16", minus_infinite_logits_weigh_nothing, DSA_BF16, DSA_PRECISION_F32);
    CASE("fp8", minus_infinite_logits_weigh_nothing, DSA_FP8, DSA_PRECISION_F32);
    CASE("bf16_auto", minus_infinite_logits_weigh_nothing, DSA_BF16, DSA_PRECISION_AUTO);
    CASE("fp8_auto", minus_infinite_logits_weigh_nothing, DSA_FP8, DSA_PRECISION_AUTO);
    CASE("f32", nan_in_a_selected_row_reaches_its_query, DSA_F32);
    CASE("bf16", nan_in_a_selected_row_reaches_its_query, DSA_BF16);
    CASE("fp8", nan_in_a_selected_row_reaches_its_query, DSA_FP8);
    RUN_TEST(ranges_are_clamped);
    RUN_TEST(huge_logits_are_stable);
    RUN_TEST(lse_and_max_of_one_row_are_its_logit);
    RUN_TEST(lse_and_max_are_optional);
    RUN_TEST(the_value_may_be_narrower);
    CASE("f32", a_list_of_a_range_is_the_range, DSA_F32);
    CASE("fp8", a_list_of_a_range_is_the_range, DSA_FP8);
    RUN_TEST(visible_is_the_range_up_to_the_query);
    RUN_TEST(padding_changes_no_bit);
    CASE("list", threads_change_no_bit, DSA_ATTEND_LIST);
    CASE("range", threads_change_no_bit, DSA_ATTEND_RANGE);
    CASE("visible", threads_change_no_bit, DSA_ATTEND_VISIBLE);
    CASE("1_row", split_heads_change_no_bit, 1);
    CASE("2_rows", split_heads_change_no_bit, 2);
    RUN_TEST(batch_and_paging_change_no_bit);
    RUN_TEST(two_adds_are_one_over_the_union);
    RUN_TEST(an_add_over_a_second_cache_joins_the_softmax);
    RUN_TEST(an_empty_add_changes_no_bit);
    RUN_TEST(the_state_is_what_the_header_says);
    CASE("1", merged_partials_are_the_whole, 1);
    CASE("2", merged_partials_are_the_whole, 2);
    CASE("5", merged_partials_are_the_whole, 5);
    RUN_TEST(merging_nothing_but_empty_shards_is_an_empty_row);
    RUN_TEST(merging_survives_huge_lse);
    RUN_TEST(a_window_and_a_list_share_one_softmax);
    CASE("f32", automatic_precision_stays_near, DSA_F32);
    CASE("bf16", automatic_precision_stays_near, DSA_BF16);
}

/* Random batches: whatever the shapes, the lengths, the mix of n_q, the pages and the number of threads, a call gives the bits that
   one thread gives, stays within the workspace that it asked for, and writes nothing beside its outputs. */
#include "fixture.h"

enum { MOST_SEQS = 5, CANARY = 64 };

/* ---- memory with a canary behind it, which shows a write even where no sanitizer looks ------------------------------------------ */
typedef struct guarded { unsigned char *p; size_t bytes; } guarded;
static guarded guard(bag *b, size_t bytes)
{
    guarded g;
    g.p = (unsigned char *)work(b, bytes + CANARY);
    g.bytes = bytes;
    memset(g.p + bytes, 0xC5, CANARY);
    return g;
}
static int intact(guarded g)
{
    for (size_t i = 0; i < CANARY; i++) if (g.p[g.bytes + i] != 0xC5) return 0;
    return 1;
}
static float *guarded_floats(bag *b, int64_t n, guarded *g)          /* aligned, full of a pattern */
{
    g->bytes = (size_t)n * sizeof(float);
    g->p = (unsigned char *)bag_alloc(b, g->bytes + CANARY);
    memset(g->p, 0x5C, g->bytes);
    memset(g->p + g->bytes, 0xC5, CANARY);
    return (float *)(void *)g->p;
}

/* Equal bits, but a NaN is a NaN: its sign and payload come from whichever operand the compiler put first. */
static int same_floats(guarded a, guarded b)
{
    for (size_t i = 0; i < a.bytes; i += 4) {
        float x, y;
        memcpy(&x, a.p + i, 4);
        memcpy(&y, b.p + i, 4);
        if (memcmp(a.p + i, b.p + i, 4) != 0 && !(isnan(x) && isnan(y))) return 0;
    }
    return a.bytes == b.bytes;
}

/* ---- random batches --------------------------------------------------------------------------------------------------------------- */
typedef struct batch {
    bag b;
    dsa_ctx ctx;
    dsa_cache latent[MOST_SEQS], index[MOST_SEQS];
    dsa_seq seqs[MOST_SEQS];
    int32_t n_seqs;
    int64_t rows;
    float *q, *index_q, *index_w;
    int64_t *ks, *ke;
} batch;

static int32_t pick(uint64_t *s, const int32_t *from, int32_t n) { return from[rnd_below(s, n)]; }

/* Small numbers mostly, sometimes one around a tile, a chunk or a block. */
static int32_t some(uint64_t *s, int32_t most)
{
    static const int32_t edges[] = { 1, 2, 7, 8, 9, 31, 32, 33, 95, 96, 97, 191, 192, 193, 200, 201, 385 };
    int32_t n = rnd_below(s, 3) == 0 ? pick(s, edges, 17) : 1 + rnd_below(s, 40);
    return n > most ? most : n;
}

static int64_t some_end(uint64_t *s, int64_t len)
{
    switch (rnd_below(s, 8)) {
    case 0: return INT64_MIN;
    case 1: return INT64_MAX;
    case 2: return -1;
    case 3: return len + 1;
    default: return rnd_below(s, (int32_t)len + 1);
    }
}

static dsa_cache filled(batch *x, uint64_t *s, dsa_kind kind, dsa_type format, int64_t capacity, int64_t len)
{
    static const int32_t pages[] = { 0, 1, 3, 16, 64 };
    dsa_cache_desc d = desc_of(kind, format, capacity, pick(&(uint64_t){ rnd(s) | 1u }, pages, 5));
    dsa_cache c = cache_of(&x->b, &x->ctx, &d);
    int64_t width = (int64_t)c.dim + c.dim_rope;
    size_t keep = x->b.n;
    float *rows = random_floats(&x->b, capacity * width, rnd(s), 1);
    if (rnd_below(s, 4) == 0) for (int i = 0; i < 5; i++) rows[rnd_below(s, (int32_t)(capacity * width))] = NAN;
    dsa_status st = append(&x->ctx, kind == DSA_LATENT ? &c : NULL, kind == DSA_LATENT ? NULL : &c, (int32_t)capacity,
                           kind == DSA_LATENT ? rows : NULL, kind == DSA_LATENT ? NULL : rows);
    if (st != DSA_OK) { fprintf(stderr, "test set-up: append: %s\n", dsa_status_text(st)); abort(); }
    bag_shrink(&x->b, keep);
    if (c.page_size > 1 && c.n_pages > 1) {              /* a shuffled table over the same pages: other rows, all of them there */
        c.block_table = page_table(&x->b, (int32_t)c.n_pages, (int32_t)c.n_pages, rnd(s));
        c.n_blocks = c.n_pages;
    }
    c.len = len;                                         /* the rows behind it are written, too: seq.len may vouch for them */
    return c;
}

static void open_batch(batch *x, uint64_t seed)
{
    static const int32_t dims[] = { 1, 4, 8, 20, 32, 128, 136 }, key_dims[] = { 8, 16, 32, 64, 128 };
    static const dsa_type latents[] = { DSA_F32, DSA_BF16, DSA_FP8 }, keys[] = { DSA_F32, DSA_BF16, DSA_FP8, DSA_INT8 };
    uint64_t s = seed * 7919 + 1;
    for (int i = 0; i < 5; i++) rnd(&s);
    dsa_config c;
    memset(x, 0, sizeof *x);
    memset(&c, 0, sizeof c);
    c.isa = test_isa;
    c.n_heads = some(&s, 70);
    c.dim_latent = pick(&s, dims, 7);
    c.dim_rope = rnd_below(&s, 3) == 0 ? DSA_NONE : 2 * (1 + rnd_below(&s, 8));
    c.n_index_heads = some(&s, 33);
    c.dim_index = pick(&s, key_dims, 5);
    c.index_rope_width = DSA_NONE;
    c.top_k = some(&s, 100);
    if (dsa_init(&x->ctx, &c) != DSA_OK) { fprintf(stderr, "test set-up: dsa_init refused\n"); abort(); }
    dsa_type latent = latents[rnd_below(&s, 3)], key = keys[rnd_below(&s, 4)];
    x->n_seqs = 1 + rnd_below(&s, MOST_SEQS);
    for (int i = 0; i < x->n_seqs; i++) {
        int32_t n_q = rnd_below(&s, 5) == 0 ? 0 : (rnd_below(&s, 2) ? 1 : 1 + rnd_below(&s, 12));
        int64_t len = some(&s, 400), capacity = len + rnd_below(&s, 30);
        x->latent[i] = filled(x, &s, DSA_LATENT, latent, capacity, len);
        x->index[i] = filled(x, &s, DSA_INDEX_KEY, key, capacity, len);
        x->seqs[i] = seq_of(&x->latent[i], &x->index[i], n_q);
        switch (rnd_below(&s, 4)) {                      /* shorter, longer or as long as the cache says; n_q may exceed it */
        case 0: x->seqs[i].len = 1 + rnd_below(&s, (int32_t)capacity); break;
        case 1: x->seqs[i].len = rnd_below(&s, 4) == 0 ? DSA_NONE : capacity; break;
        default: break;
        }
        x->rows += n_q;
    }
    x->q = random_floats(&x->b, x->rows * c.n_heads * (x->ctx.config.dim_latent + x->ctx.config.dim_rope) + 1, seed + 1, 1);
    x->index_q = random_floats(&x->b, x->rows * c.n_index_heads * c.dim_index + 1, seed + 2, 1);
    x->index_w = random_floats(&x->b, x->rows * c.n_index_heads + 1, seed + 3, 1);
    x->ks = longs(&x->b, x->rows + 1);
    x->ke = longs(&x->b, x->rows + 1);
    for (int64_t t = 0; t < x->rows; t++) {              /* empty, short, backwards, beyond both ends */
        x->ks[t] = some_end(&s, 400);
        x->ke[t] = rnd_below(&s, 4) == 0 && x->ks[t] >= 0 && x->ks[t] <= 400 ? x->ks[t] + rnd_below(&s, 40) : some_end(&s, 400);
    }
}

/* 1 .. 70 threads, often around the number of rows: there the way of cutting changes. */
static int32_t some_threads(uint64_t *s, int64_t rows)
{
    int64_t n = rnd_below(s, 2) ? rows - 2 + rnd_below(s, 5) : 1 + rnd_below(s, 70);
    return (int32_t)(n < 1 ? 1 : (n > 70 ? 70 : n));
}

/* ---- the step: what one thread gives, any number gives --------------------------------------------------------------------------- */
typedef struct result { guarded out, lse, indices, workspace; } result;
static dsa_status step_of(batch *x, const dsa_ctx *ctx, bag *b, result *r)
{
    const dsa_config *c = &ctx->config;
    dsa_step_args a;
    size_t bytes = 0;
    memset(&a, 0, sizeof a);
    a.n_seqs = x->n_seqs;
    a.seqs = x->seqs;
    a.q = x->q;
    a.index_q = x->index_q;
    a.index_w = x->index_w;
    a.out = guarded_floats(b, x->rows * c->n_heads * c->dim_latent, &r->out);
    a.lse = guarded_floats(b, x->rows * c->n_heads, &r->lse);
    a.indices = (int32_t *)(void *)guarded_floats(b, x->rows * c->top_k, &r->indices);
    dsa_status st = dsa_step_workspace(ctx, &a, &bytes);
    if (st != DSA_OK) return st;
    r->workspace = guard(b, bytes);
    a.workspace = r->workspace.p;
    a.workspace_size = bytes;
    return dsa_step(ctx, &a);
}

TEST steps_on_any_number_of_threads(uint64_t first, int n)
{
    for (uint64_t seed = first; seed < first + (uint64_t)n; seed++) {
        batch x;
        backwards many;
        result one, other;
        uint64_t s = seed + 77;
        open_batch(&x, seed);
        OK(step_of(&x, &x.ctx, &x.b, &one));
        for (int i = 0; i < 3; i++) {
            size_t keep = x.b.n;
            dsa_ctx ctx = with_threads(&x.ctx, &many, some_threads(&s, x.rows));
            OK(step_of(&x, &ctx, &x.b, &other));
            ASSERT_FALSE(many.broken);
            ASSERT_MEM_EQ(one.indices.p, other.indices.p, one.indices.bytes);
            ASSERT(same_floats(one.out, other.out) && same_floats(one.lse, other.lse));
            ASSERT(intact(other.out) && intact(other.lse) && intact(other.indices) && intact(other.workspace));
            bag_shrink(&x.b, keep);
        }
        bag_free(&x.b);
    }
    PASS();
}

/* ---- scores and selections over random ranges ------------------------------------------------------------------------------------ */
typedef struct scored { guarded scores, workspace, indices, chosen, counts, select_workspace; int64_t n_cols, stride; dsa_order order; int with_scores; } scored;
static dsa_status score_of(batch *x, const dsa_ctx *ctx, bag *b, int ranges, scored *r)
{
    dsa_score_args a;
    dsa_selection sel;
    size_t bytes = 0;
    dsa_status st;
    memset(&a, 0, sizeof a);
    memset(&sel, 0, sizeof sel);
    a.n_seqs = x->n_seqs;
    a.seqs = x->seqs;
    a.q = x->index_q;
    a.w = x->index_w;
    if (ranges) { a.ks = x->ks; a.ke = x->ke; }
    st = dsa_score_workspace(ctx, &a, &bytes);
    if (st != DSA_OK) return st;
    r->workspace = guard(b, bytes);
    a.workspace = r->workspace.p;
    a.workspace_size = bytes;
    st = dsa_score(ctx, &a, guarded_floats(b, x->rows * r->stride, &r->scores), r->n_cols, r->stride);
    if (st != DSA_OK) return st;
    sel.order = r->order;
    sel.indices = (int32_t *)(void *)guarded_floats(b, x->rows * ctx->config.top_k, &r->indices);
    sel.counts = (int32_t *)(void *)guarded_floats(b, x->rows, &r->counts);
    sel.scores = guarded_floats(b, x->rows * ctx->config.top_k, &r->chosen);
    if (!r->with_scores) sel.scores = NULL;
    st = dsa_score_select_workspace(ctx, &a, &sel, &bytes);
    if (st != DSA_OK) return st;
    r->select_workspace = guard(b, bytes);
    a.workspace = r->select_workspace.p;
    a.workspace_size = bytes;
    return dsa_score_select(ctx, &a, &sel);
}

TEST scores_on_any_number_of_threads(uint64_t first, int n)
{
    for (uint64_t seed = first; seed < first + (uint64_t)n; seed++) {
        batch x;
        backwards many;
        scored one, other;
        uint64_t s = seed + 78;
        open_batch(&x, seed);
        memset(&one, 0, sizeof one);
        one.n_cols = rnd_below(&s, 3) == 0 ? rnd_below(&s, 50) : 430;
        one.stride = one.n_cols + rnd_below(&s, 3);
        one.order = rnd_below(&s, 2) ? DSA_ORDER_RANK : DSA_ORDER_INDEX;
        one.with_scores = one.order == DSA_ORDER_INDEX && rnd_below(&s, 2);
        int ranges = rnd_below(&s, 2);
        other = one;
        OK(score_of(&x, &x.ctx, &x.b, ranges, &one));
        const float *scores = (const float *)(const void *)one.scores.p;
        for (int64_t t = 0; t < x.rows; t++)             /* the gap between rows is nobody's */
            for (int64_t i = one.n_cols; i < one.stride; i++) { uint32_t u; memcpy(&u, scores + t * one.stride + i, 4); ASSERT(u == 0x5C5C5C5Cu); }
        if (one.n_cols == 430 && (one.with_scores || one.order == DSA_ORDER_RANK)) {      /* no fallback: selecting what was stored */
            dsa_select_args a;
            dsa_selection sel;
            size_t bytes = 0;
            guarded want;
            memset(&a, 0, sizeof a);
            memset(&sel, 0, sizeof sel);
            a.n_rows = x.rows;
            a.scores = scores;
            a.n_cols = one.n_cols;
            a.stride = one.stride;
            sel.order = one.order;
            sel.indices = (int32_t *)(void *)guarded_floats(&x.b, x.rows * x.ctx.config.top_k, &want);
            OK(dsa_select_workspace(&x.ctx, &a, &sel, &bytes));
            guarded w = guard(&x.b, bytes);
            a.workspace = w.p;
            a.workspace_size = bytes;
            OK(dsa_select(&x.ctx, &a, &sel));
            ASSERT(intact(w) && intact(want));
            ASSERT_MEM_EQ(want.p, one.indices.p, want.bytes);
        }
        for (int i = 0; i < 3; i++) {
            size_t keep = x.b.n;
            dsa_ctx ctx = with_threads(&x.ctx, &many, some_threads(&s, x.rows));
            OK(score_of(&x, &ctx, &x.b, ranges, &other));
            ASSERT_FALSE(many.broken);
            ASSERT(same_floats(one.scores, other.scores));
            ASSERT_MEM_EQ(one.indices.p, other.indices.p, one.indices.bytes);
            ASSERT_MEM_EQ(one.counts.p, other.counts.p, one.counts.bytes);
            ASSERT_MEM_EQ(one.chosen.p, other.chosen.p, one.chosen.bytes);
            ASSERT(intact(other.scores) && intact(other.indices) && intact(other.counts) && intact(other.chosen));
            ASSERT(intact(other.workspace) && intact(other.select_workspace));
            bag_shrink(&x.b, keep);
        }
        bag_free(&x.b);
    }
    PASS();
}

/* A row that has nothing to score, because its range is empty or because it takes all, shares a pass with one that has: it may not
   bring its query, which nobody prepared. */
TEST an_idle_row_beside_a_busy_one(dsa_type format, int idle)
{
    enum { LEN = 90, K = 5, HI = 3, D = 32 };
    bag b = { NULL, 0 };
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.isa = test_isa;
    c.n_index_heads = HI;
    c.dim_index = D;
    c.index_rope_width = DSA_NONE;
    c.top_k = K;
    OK(dsa_init(&ctx, &c));
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, format, LEN, 0);
    dsa_cache cache = cache_of(&b, &ctx, &d);
    OK(append(&ctx, NULL, &cache, LEN, NULL, random_floats(&b, LEN * D, 60, 1)));
    dsa_seq s = seq_of(NULL, &cache, 2);
    int64_t ks[2] = { 40, 0 }, ke[2] = { 40 + (idle == 1 ? K : idle == 2 ? -7 : 0), LEN };
    int32_t together[2 * K], alone[K];
    dsa_score_args a;
    dsa_selection sel;
    memset(&a, 0, sizeof a);
    memset(&sel, 0, sizeof sel);
    a.n_seqs = 1;
    a.seqs = &s;
    a.q = random_floats(&b, 2 * HI * D, 61, 1);
    a.w = random_floats(&b, 2 * HI, 62, 1);
    a.ks = ks;
    a.ke = ke;
    sel.indices = together;
    OK(score_select(&b, &ctx, a, &sel));
    s.n_q = 1;
    a.q += HI * D;
    a.w += HI;
    a.ks++;
    a.ke++;
    sel.indices = alone;
    OK(score_select(&b, &ctx, a, &sel));
    ASSERT_MEM_EQ(alone, together + K, sizeof alone);
    for (int i = 0; i < K; i++) ASSERT_EQ_FMT(idle == 1 ? 40 + i : -1, together[i], "%d");
    END(b);
}

/* ---- attention over random lists and ranges --------------------------------------------------------------------------------------- */
typedef struct attended { guarded max, sum, out, workspace; } attended;
static dsa_status attend_of(batch *x, const dsa_ctx *ctx, bag *b, const dsa_attend_args *args, int32_t dim_v, attended *r)
{
    dsa_attend_args a = *args;
    dsa_attend_state state;
    size_t bytes = 0;
    dsa_status st;
    memset(&state, 0, sizeof state);
    state.n_rows = x->rows;
    state.dim_v = dim_v;
    state.max = guarded_floats(b, x->rows * ctx->config.n_heads, &r->max);
    state.sum = guarded_floats(b, x->rows * ctx->config.n_heads, &r->sum);
    state.out = guarded_floats(b, x->rows * ctx->config.n_heads * dim_v, &r->out);
    st = dsa_attend_begin(ctx, &state);
    if (st == DSA_OK) st = dsa_attend_workspace(ctx, &a, &state, &bytes);
    if (st != DSA_OK) return st;
    r->workspace = guard(b, bytes);
    a.workspace = r->workspace.p;
    a.workspace_size = bytes;
    return dsa_attend_add(ctx, &a, &state);
}

TEST attention_on_any_number_of_threads(uint64_t first, int n)
{
    for (uint64_t seed = first; seed < first + (uint64_t)n; seed++) {
        batch x;
        backwards many;
        attended one, other;
        dsa_attend_args a;
        uint64_t s = seed + 79;
        open_batch(&x, seed);
        memset(&a, 0, sizeof a);
        a.n_seqs = x.n_seqs;
        a.seqs = x.seqs;
        a.q = x.q;
        a.what = (dsa_attend_what)rnd_below(&s, 3);
        a.index_kind = rnd_below(&s, 3) == 0 ? DSA_PHYSICAL : DSA_LOGICAL;
        a.n_indices = some(&s, 300);
        a.index_stride = a.n_indices + rnd_below(&s, 3);
        a.ks = x.ks;
        a.ke = x.ke;
        int32_t dim_v = x.ctx.config.dim_latent + (rnd_below(&s, 2) ? 0 : x.ctx.config.dim_rope);
        int32_t *list = ints(&x.b, x.rows * a.index_stride + 1), *counts = ints(&x.b, x.rows + 1);
        for (int64_t i = 0; i < x.rows * a.index_stride; i++) list[i] = rnd_below(&s, 10) == 0 ? (int32_t)rnd(&s) : rnd_below(&s, 420);
        for (int64_t t = 0; t < x.rows; t++) counts[t] = rnd_below(&s, 4) == 0 ? (int32_t)rnd(&s) : rnd_below(&s, (int32_t)a.n_indices + 1);
        a.indices = list;
        if (rnd_below(&s, 2)) a.counts = counts;
        OK(attend_of(&x, &x.ctx, &x.b, &a, dim_v, &one));
        for (int i = 0; i < 3; i++) {
            size_t keep = x.b.n;
            dsa_ctx ctx = with_threads(&x.ctx, &many, some_threads(&s, x.rows));
            OK(attend_of(&x, &ctx, &x.b, &a, dim_v, &other));
            ASSERT_FALSE(many.broken);
            ASSERT(same_floats(one.max, other.max) && same_floats(one.sum, other.sum) && same_floats(one.out, other.out));
            ASSERT(intact(other.max) && intact(other.sum) && intact(other.out) && intact(other.workspace));
            bag_shrink(&x.b, keep);
        }
        bag_free(&x.b);
    }
    PASS();
}

/* ---- layers ------------------------------------------------------------------------------------------------------------------------ */
typedef struct layered { guarded y, lists, workspace; dsa_cache latent[MOST_SEQS], index[MOST_SEQS]; } layered;
static dsa_status layer_of(const dsa_ctx *ctx, bag *b, const dsa_layer_args *args, int64_t rows, const int32_t *before, dsa_type latent, dsa_type key, layered *r)
{
    dsa_layer_args a = *args;
    dsa_seq seqs[MOST_SEQS];
    size_t bytes = 0;
    int64_t at = 0;
    dsa_status st = DSA_OK;
    for (int i = 0; i < a.n_seqs && st == DSA_OK; i++) {
        dsa_cache_desc dl = desc_of(DSA_LATENT, latent, 150, 16), dk = desc_of(DSA_INDEX_KEY, key, 150, 64);
        r->latent[i] = cache_of(b, ctx, &dl);
        r->index[i] = cache_of(b, ctx, &dk);
        st = append(ctx, &r->latent[i], &r->index[i], before[i], random_floats(b, before[i] * 100 + 1, (uint64_t)i + 40, 1),
                    random_floats(b, before[i] * 100 + 1, (uint64_t)i + 50, 1));
        seqs[i] = a.seqs[i];
        seqs[i].latent = &r->latent[i];
        seqs[i].index = &r->index[i];
        at += seqs[i].n_q;
    }
    a.seqs = seqs;
    a.y = guarded_floats(b, rows * ctx->config.dim_hidden, &r->y);
    a.indices_out = (int32_t *)(void *)guarded_floats(b, rows * ctx->config.top_k, &r->lists);
    if (st == DSA_OK) st = dsa_layer_workspace(ctx, &a, &bytes);
    if (st != DSA_OK) return st;
    r->workspace = guard(b, bytes);
    a.workspace = r->workspace.p;
    a.workspace_size = bytes;
    return dsa_layer(ctx, &a);
}

TEST layers_on_any_number_of_threads(uint64_t first, int n)
{
    static const dsa_type latents[] = { DSA_F32, DSA_BF16, DSA_FP8 }, keys[] = { DSA_F32, DSA_BF16, DSA_FP8, DSA_INT8 };
    for (uint64_t seed = first; seed < first + (uint64_t)n; seed++) {
        bag b = { NULL, 0 };
        backwards many;
        dsa_config c;
        dsa_ctx base;
        dsa_layer_weights w;
        dsa_layer_args a;
        dsa_seq seqs[MOST_SEQS];
        layered one, other;
        int32_t before[MOST_SEQS];
        int64_t rows = 0;
        uint64_t s = seed * 31 + 5;
        for (int i = 0; i < 5; i++) rnd(&s);
        memset(&c, 0, sizeof c);
        memset(&a, 0, sizeof a);
        c.isa = test_isa;
        c.n_heads = some(&s, 40);
        c.dim_latent = 1 + rnd_below(&s, 40);
        c.dim_rope = 2 * (1 + rnd_below(&s, 6));
        c.n_index_heads = 1 + rnd_below(&s, 9);
        c.dim_index = 8 << rnd_below(&s, 3);
        c.index_rope_width = 2 * rnd_below(&s, 4);
        if (c.index_rope_width == 0) c.index_rope_width = DSA_NONE;
        c.top_k = some(&s, 60);
        c.dim_hidden = 1 + rnd_below(&s, 50);
        c.dim_q_lora = 1 + rnd_below(&s, 30);
        c.dim_nope = 1 + rnd_below(&s, 12);
        c.dim_v = 1 + rnd_below(&s, 12);
        OK(dsa_init(&base, &c));
        const float *weights = random_floats(&b, 40000, seed, 0.3f);
        for (size_t i = 0; i < sizeof w / sizeof(dsa_tensor); i++) { memset(&(&w.q_a)[i], 0, sizeof(dsa_tensor)); (&w.q_a)[i].data = weights + 7 * i; }
        a.n_seqs = 1 + rnd_below(&s, MOST_SEQS);
        for (int i = 0; i < a.n_seqs; i++) {
            int32_t n_q = rnd_below(&s, 4) == 0 ? 0 : (rnd_below(&s, 2) ? 1 + rnd_below(&s, 3) : 1 + rnd_below(&s, 40));
            before[i] = rnd_below(&s, 90);
            seqs[i] = seq_of(NULL, NULL, n_q);
            rows += n_q;
        }
        a.weights = &w;
        a.seqs = seqs;
        a.x = random_floats(&b, rows * c.dim_hidden + 1, seed + 1, 1);
        a.mode = (dsa_layer_mode)(rnd_below(&s, 2) ? 0 : rnd_below(&s, 3));
        dsa_type latent = latents[rnd_below(&s, 3)], key = keys[rnd_below(&s, 4)];
        OK(layer_of(&base, &b, &a, rows, before, latent, key, &one));
        for (int i = 0; i < 3; i++) {
            size_t keep = b.n;
            dsa_ctx ctx = with_threads(&base, &many, some_threads(&s, i == 0 ? rows % DSA_LAYER_TILE : rows));     /* the last tile is a short one */
            OK(layer_of(&ctx, &b, &a, rows, before, latent, key, &other));
            ASSERT_FALSE(many.broken);
            ASSERT_MEM_EQ(one.lists.p, other.lists.p, one.lists.bytes);
            ASSERT(same_floats(one.y, other.y));
            ASSERT(intact(other.y) && intact(other.lists) && intact(other.workspace));
            bag_shrink(&b, keep);
        }
        bag_free(&b);
    }
    PASS();
}

/* ---- one workspace for all sizes ---------------------------------------------------------------------------------------------------- */
/* More rows, or longer sequences, never need less: who asks for the largest batch may run any smaller one. */
TEST workspaces_grow_with_the_batch(int32_t n_threads)
{
    enum { MOST = 40, CAPACITY = 200 };
    bag b = { NULL, 0 };
    dsa_config c;
    dsa_ctx ctx;
    dsa_layer_weights w;
    float one = 1;
    memset(&c, 0, sizeof c);
    c.isa = test_isa;
    c.n_heads = 40;
    c.dim_latent = 32;
    c.dim_rope = 8;
    c.dim_index = 32;
    c.index_rope_width = 8;
    c.top_k = 20;
    c.n_threads = n_threads;
    c.dim_hidden = c.dim_q_lora = c.dim_nope = c.dim_v = 8;
    OK(dsa_init(&ctx, &c));
    for (size_t i = 0; i < sizeof w / sizeof(dsa_tensor); i++) { memset(&(&w.q_a)[i], 0, sizeof(dsa_tensor)); (&w.q_a)[i].data = &one; }
    dsa_cache_desc dl = desc_of(DSA_LATENT, DSA_FP8, CAPACITY, 0), dk = desc_of(DSA_INDEX_KEY, DSA_FP8, CAPACITY, 0);
    dsa_cache latent = cache_of(&b, &ctx, &dl), index = cache_of(&b, &ctx, &dk);
    for (int shape = 0; shape < 3; shape++) {            /* one sequence of n rows, n sequences of one, n of three */
        size_t last[4] = { 0, 0, 0, 0 }, now[4];
        for (int32_t n = 1; n <= MOST; n++) {
            dsa_seq s[MOST];
            dsa_score_args score;
            dsa_selection sel;
            dsa_attend_args attend;
            dsa_attend_state state;
            dsa_step_args step;
            dsa_layer_args layer;
            memset(&score, 0, sizeof score);
            memset(&sel, 0, sizeof sel);
            memset(&attend, 0, sizeof attend);
            memset(&state, 0, sizeof state);
            memset(&step, 0, sizeof step);
            memset(&layer, 0, sizeof layer);
            for (int32_t i = 0; i < n; i++) s[i] = seq_of(&latent, &index, shape == 0 ? n : shape == 1 ? 1 : 3);
            score.n_seqs = attend.n_seqs = step.n_seqs = layer.n_seqs = shape == 0 ? 1 : n;
            score.seqs = attend.seqs = step.seqs = layer.seqs = s;
            state.n_rows = shape == 2 ? 3 * n : n;
            layer.weights = &w;
            OK(dsa_score_select_workspace(&ctx, &score, &sel, &now[0]));
            OK(dsa_attend_workspace(&ctx, &attend, &state, &now[1]));
            OK(dsa_step_workspace(&ctx, &step, &now[2]));
            OK(dsa_layer_workspace(&ctx, &layer, &now[3]));
            for (int i = 0; i < 4; i++) {
                ASSERT(now[i] >= last[i]);
                last[i] = now[i];
            }
        }
    }
    END(b);
}

#ifndef ROUNDS
#define ROUNDS 40
#endif
SUITE(random_suite)
{
    RUN_TESTp(steps_on_any_number_of_threads, 1, ROUNDS);
    RUN_TESTp(scores_on_any_number_of_threads, 1000, ROUNDS);
    CASE("f32", an_idle_row_beside_a_busy_one, DSA_F32, 0);
    CASE("bf16", an_idle_row_beside_a_busy_one, DSA_BF16, 0);
    CASE("int8", an_idle_row_beside_a_busy_one, DSA_INT8, 0);
    CASE("fp8_empty", an_idle_row_beside_a_busy_one, DSA_FP8, 0);
    CASE("fp8_takes_all", an_idle_row_beside_a_busy_one, DSA_FP8, 1);
    CASE("fp8_backwards", an_idle_row_beside_a_busy_one, DSA_FP8, 2);
    RUN_TESTp(attention_on_any_number_of_threads, 2000, ROUNDS);
    static const int32_t threads[] = { 1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 33, 64 };
    for (int i = 0; i < 12; i++) {
        char name[8];
        snprintf(name, sizeof name, "%d", (int)threads[i]);
        CASE(name, workspaces_grow_with_the_batch, threads[i]);
    }
    RUN_TESTp(layers_on_any_number_of_threads, 3000, ROUNDS);
}

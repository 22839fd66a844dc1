/* What other models change: groups, scores without ReLU or weights, blocks, pools, tails, grouped queries. Each parameter against its
   definition in double, and against the plain algorithm where the two must agree to the bit. */
#include "brute.h"
#include "fixture.h"

static dsa_config small(int32_t heads, int32_t index_heads, int32_t D, int32_t k)
{
    dsa_config c;
    memset(&c, 0, sizeof c);
    c.isa = test_isa;
    c.n_heads = heads;
    c.dim_latent = 24;
    c.dim_rope = 8;
    c.n_index_heads = index_heads;
    c.dim_index = D;
    c.index_rope_width = DSA_NONE;
    c.top_k = k;
    return c;
}
static dsa_status plain_scores(bag *b, const dsa_ctx *ctx, dsa_score_args a, float *scores, int64_t n_cols)
{
    size_t bytes = 0;
    dsa_status st = dsa_score_workspace(ctx, &a, &bytes);
    if (st != DSA_OK) return st;
    a.workspace = work(b, bytes);
    a.workspace_size = bytes;
    return dsa_score(ctx, &a, scores, n_cols, n_cols);
}
static dsa_compressor compressor_of(bag *b, const dsa_ctx *ctx, const dsa_compressor_desc *d)
{
    dsa_compressor c;
    size_t bytes = 0;
    if (dsa_compressor_bytes(ctx, d, &bytes) != DSA_OK || dsa_compressor_init(ctx, d, work(b, bytes), bytes, &c) != DSA_OK) {
        fprintf(stderr, "test set-up: compressor refused\n");
        abort();
    }
    return c;
}
static dsa_score_args score_of(const dsa_seq *seq, const float *q, const float *w)
{
    dsa_score_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = seq;
    a.q = q;
    a.w = w;
    return a;
}

/* ---- scores ------------------------------------------------------------------------------------------ */
/* A group's scores and lists are those of a smaller indexer that has its heads alone, bit for bit. */
TEST groups_are_small_indexers(dsa_type format, int linear)
{
    enum { T = 230, N = 9, HI = 12, D = 32, K = 17 };
    bag b = { NULL, 0 };
    static const int32_t groups[] = { 1, 2, 3, 12 };
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        const int32_t G = groups[i], per = HI / G;
        dsa_config c = small(12, HI, D, K), one = small(12, per, D, K);
        dsa_ctx ctx, alone;
        backwards back;
        c.index_groups = G;
        c.index_linear = one.index_linear = linear;
        OK(dsa_init(&ctx, &c));
        OK(dsa_init(&alone, &one));
        dsa_cache_desc d = desc_of(DSA_INDEX_KEY, format, T, 16);
        dsa_cache keys = cache_of(&b, &ctx, &d);
        OK(append(&ctx, NULL, &keys, T, NULL, random_floats(&b, T * D, 3, 1)));
        float *q = random_floats(&b, N * HI * D, 4, 1), *w = random_floats(&b, N * HI, 5, 1);
        float *all = floats(&b, N * G * T), *part = floats(&b, N * T);
        int32_t *lists = ints(&b, N * G * K), *list = ints(&b, N * K);
        dsa_seq seq = seq_of(NULL, &keys, N);
        dsa_selection sel = { 0, DSA_ORDER_INDEX, lists, NULL, NULL }, sub = { 0, DSA_ORDER_INDEX, list, NULL, NULL };
        OK(plain_scores(&b, &ctx, score_of(&seq, q, w), all, T));
        for (int32_t threads = 1; threads <= 5; threads += 2) {
            dsa_ctx many = with_threads(&ctx, &back, threads);
            memset(lists, 0x55, sizeof(int32_t) * N * (size_t)(G * K));
            OK(score_select(&b, &many, score_of(&seq, q, w), &sel));
            for (int32_t g = 0; g < G; g++) {
                float *qg = floats(&b, N * per * D), *wg = floats(&b, N * per);
                for (int32_t t = 0; t < N; t++) {
                    memcpy(qg + t * per * D, q + (t * HI + g * per) * D, sizeof(float) * (size_t)(per * D));
                    memcpy(wg + t * per, w + t * HI + g * per, sizeof(float) * (size_t)per);
                }
                OK(plain_scores(&b, &alone, score_of(&seq, qg, wg), part, T));
                OK(score_select(&b, &alone, score_of(&seq, qg, wg), &sub));
                for (int32_t t = 0; t < N; t++) {
                    ASSERT(same_bits(part + t * T, all + (t * G + g) * T, T));
                    ASSERT_MEM_EQ(list + t * K, lists + (t * G + g) * K, K * sizeof(int32_t));
                }
            }
        }
    }
    END(b);
}

/* Without ReLU a score is Sum_h w <q, k>; without weights every head weighs index_scale. */
TEST scores_by_definition(dsa_type format, int linear, int weightless)
{
    enum { T = 150, N = 5, HI = 6, D = 64 };
    bag b = { NULL, 0 };
    dsa_config c = small(6, HI, D, 10);
    dsa_ctx ctx;
    c.index_linear = linear;
    c.index_no_weights = weightless;
    c.index_scale = weightless ? 0.37f : 0;
    c.hadamard = DSA_HADAMARD_OFF;
    OK(dsa_init(&ctx, &c));
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, format, T, 0);
    dsa_cache keys = cache_of(&b, &ctx, &d);
    float *k = random_floats(&b, T * D, 13, 1), *q = random_floats(&b, N * HI * D, 14, 1), *w = random_floats(&b, N * HI, 15, 1);
    float *scores = floats(&b, N * T);
    OK(append(&ctx, NULL, &keys, T, NULL, k));
    dsa_seq seq = seq_of(NULL, &keys, N);
    OK(plain_scores(&b, &ctx, score_of(&seq, q, weightless ? NULL : w), scores, T));
    for (int32_t t = 0; t < N; t++)
        for (int32_t s = 0; s < T; s++) {
            double key[D], head[D], want = 0, size = 0;
            if (s > T - N + t) {
                ASSERT(isinf(scores[t * T + s]) && scores[t * T + s] < 0);
                continue;
            }
            brute_round_row(format, 0, k + s * D, D, key);
            for (int32_t h = 0; h < HI; h++) {
                double dot = 0, weight = weightless ? (double)0.37f : (double)w[t * HI + h];
                brute_round_row(format, 0, q + (t * HI + h) * D, D, head);
                for (int32_t i = 0; i < D; i++) { dot += head[i] * key[i]; size += fabs(weight * head[i] * key[i]); }
                want += weight * (linear || dot > 0 ? dot : 0);
            }
            ASSERT_IN_RANGE(want, scores[t * T + s], (2 * D + 2 * HI) * 0x1p-24 * size);
        }
    END(b);
}

/* ---- blocks, local blocks, pools and tails ------------------------------------------------------------- */
/* One query's list as the definition has it, from the scores of its visible entries. */
static int32_t brute_list(const dsa_ctx *ctx, const float *scores, int64_t visible, int32_t *list)
{
    const dsa_config *c = &ctx->config;
    int64_t entries = visible / c->stride, items = (entries + c->block_size - 1) / c->block_size;
    int64_t local = c->n_local_blocks < items ? c->n_local_blocks : items, length = dsa_list_length(ctx, 0), n = 0;
    brute_entry *e = brute_alloc((size_t)items * sizeof *e);
    int32_t *picked = brute_alloc((size_t)c->top_k * sizeof *picked), count;
    for (int64_t i = 0; i < items; i++) {
        e[i].index = i;
        e[i].score = -HUGE_VAL;
        for (int64_t s = i * c->block_size; s < (i + 1) * c->block_size && s < entries; s++)
            if ((double)scores[s] > e[i].score) e[i].score = (double)scores[s];
        if (items <= c->top_k || i >= items - local) e[i].score = HUGE_VAL;       /* the dense fallback, too */
    }
    count = brute_pick(e, items, c->top_k, DSA_ORDER_INDEX, picked, NULL);
    for (int32_t i = 0; i < count; i++) {
        int64_t span = c->list_entries ? 1 : (int64_t)c->stride * c->block_size;
        for (int64_t s = picked[i] * span; s < (picked[i] + 1) * span; s++)
            if (c->list_entries || s < visible) list[n++] = (int32_t)s;
    }
    if (c->keep_tail) for (int64_t s = entries * c->stride; s < visible; s++) list[n++] = (int32_t)s;
    count = (int32_t)n;
    while (n < length) list[n++] = -1;
    free(e);
    free(picked);
    return count;
}

/* Random shapes of blocks and pools against it, over pages, chunks of queries and threads. The scores that it starts from are dsa_score's,
   which other tests hold to their definition. */
TEST lists_by_definition(int seed)
{
    bag b = { NULL, 0 };
    uint64_t s = (uint64_t)seed * 7919 + 1;
    for (int i = 0; i < 5; i++) rnd(&s);
    static const int32_t blocks[] = { 1, 2, 5, 8, 96, 100, 128 }, strides[] = { 1, 2, 4, 16 };
    dsa_config c = small(8, 4 * (1 + rnd_below(&s, 3)), 32, 1 + rnd_below(&s, 12));
    dsa_ctx ctx;
    backwards back;
    const int pooled = rnd_below(&s, 2);
    const int32_t T = 1 + rnd_below(&s, 900), D = 32;
    c.index_groups = rnd_below(&s, 2) ? 4 : 1;
    c.index_linear = rnd_below(&s, 2);
    if (pooled) {
        c.stride = strides[rnd_below(&s, 4)];
        c.pooling = DSA_POOL_MEAN;
        c.index_norm = DSA_NORM_NONE;
        c.keep_tail = rnd_below(&s, 2);
    } else {
        c.block_size = blocks[rnd_below(&s, 7)];
        c.n_local_blocks = rnd_below(&s, 1 + (c.top_k < 3 ? c.top_k : 3));
    }
    c.list_entries = !c.keep_tail && rnd_below(&s, 2);
    OK(dsa_init(&ctx, &c));
    const int32_t G = ctx.config.index_groups, HI = ctx.config.n_index_heads, most_q = T < 40 ? T : 40, n_q = 1 + rnd_below(&s, most_q);
    const int64_t length = dsa_list_length(&ctx, 0), entries = T / ctx.config.stride;
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, rnd_below(&s, 2) ? DSA_F32 : DSA_BF16, T, rnd_below(&s, 2) ? 16 : 0);
    dsa_cache_desc latent_desc = desc_of(DSA_LATENT, DSA_F32, T, 0);
    dsa_cache keys = cache_of(&b, &ctx, &d), latent = cache_of(&b, &ctx, &latent_desc);
    float *k = random_floats(&b, (int64_t)T * D, rnd(&s), 1);
    if (rnd_below(&s, 3) == 0) for (int i = 0; i < 3; i++) k[rnd_below(&s, T * D)] = NAN;
    if (pooled) {
        dsa_compressor_desc cd;
        memset(&cd, 0, sizeof cd);
        cd.kind = DSA_INDEX_KEY;
        dsa_compressor pool = compressor_of(&b, &ctx, &cd);
        OK(dsa_compress(&ctx, &pool, T, k, NULL, &keys));
    } else {
        OK(append(&ctx, NULL, &keys, T, NULL, k));
    }
    latent.len = T;
    float *q = random_floats(&b, (int64_t)n_q * HI * D, rnd(&s), 1), *w = random_floats(&b, n_q * HI, rnd(&s), 1);
    float *scores = floats(&b, n_q * G * (entries + 1));
    int32_t *got = ints(&b, n_q * G * length), *want = ints(&b, length), *counts = ints(&b, n_q * G);
    dsa_seq seq = seq_of(&latent, &keys, n_q);
    OK(plain_scores(&b, &ctx, score_of(&seq, q, w), scores, entries));
    for (int32_t threads = 1; threads <= 7; threads += 3) {
        dsa_ctx many = with_threads(&ctx, &back, threads);
        dsa_selection sel = { 0, DSA_ORDER_INDEX, got, NULL, counts };
        memset(got, 0x55, sizeof(int32_t) * (size_t)(n_q * G * length));
        OK(score_select(&b, &many, score_of(&seq, q, w), &sel));
        ASSERT_FALSE(back.broken);
        for (int32_t t = 0; t < n_q; t++)
            for (int32_t g = 0; g < G; g++) {
                int64_t row = t * G + g;
                int32_t n = brute_list(&ctx, scores + row * entries, T - n_q + t + 1, want);
                ASSERT_EQ_FMT(n, counts[row], "%d");
                ASSERT_MEM_EQ(want, got + row * length, sizeof(int32_t) * (size_t)length);
            }
    }
    for (int32_t t = 0; t < n_q; t++) {                  /* each query on its own, by a len of its own */
        dsa_seq one = seq_of(NULL, &keys, 1);
        one.len = T - n_q + t + 1;
        int32_t *alone = ints(&b, G * length);
        dsa_selection sel = { 0, DSA_ORDER_INDEX, alone, NULL, NULL };
        OK(score_select(&b, &ctx, score_of(&one, q + (int64_t)t * HI * D, w + t * HI), &sel));
        ASSERT_MEM_EQ(got + t * G * length, alone, sizeof(int32_t) * (size_t)(G * length));
    }
    END(b);
}

/* Scores and ranks of blocks that are named themselves: local ones are +inf, so they come first. */
TEST blocks_by_rank(void)
{
    enum { T = 100, D = 8, K = 4, BLOCK = 8 };
    bag b = { NULL, 0 };
    dsa_config c = small(4, 1, D, K);
    dsa_ctx ctx;
    c.index_linear = 1;
    c.block_size = BLOCK;
    c.n_local_blocks = 2;
    c.list_entries = 1;
    OK(dsa_init(&ctx, &c));
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, DSA_F32, T, 0);
    dsa_cache keys = cache_of(&b, &ctx, &d);
    float *k = floats(&b, T * D), q[D] = { 1 }, w[1] = { 1 }, scores[K];
    int32_t list[K], count;
    memset(k, 0, sizeof(float) * T * D);
    for (int32_t s = 0; s < T; s++) k[s * D] = -1.0f - (float)s;         /* older is better, all below 0 */
    k[70 * D] = 5;                                                       /* and block 8 best of all */
    k[71 * D] = NAN;
    OK(append(&ctx, NULL, &keys, T, NULL, k));
    dsa_seq seq = seq_of(NULL, &keys, 1);
    dsa_selection sel = { 0, DSA_ORDER_RANK, list, scores, &count };
    OK(score_select(&b, &ctx, score_of(&seq, q, w), &sel));
    ASSERT_EQ_FMT(4, count, "%d");
    ASSERT_EQ_FMT(11, list[0], "%d");                                    /* 100 tokens: blocks 0 .. 12 */
    ASSERT_EQ_FMT(12, list[1], "%d");
    ASSERT_EQ_FMT(8, list[2], "%d");
    ASSERT_EQ_FMT(0, list[3], "%d");
    ASSERT(isinf(scores[0]) && isinf(scores[1]) && scores[2] == 5 && scores[3] == -1);
    END(b);
}

/* ---- pools ------------------------------------------------------------------------------------------------ */
/* A pool of one row is the row: the keys in the cache have the bits of those that dsa_append put there, whatever the kind of pool. */
TEST pool_of_one(void)
{
    enum { T = 50, D = 32 };
    bag b = { NULL, 0 };
    float *k = random_floats(&b, T * D, 5, 1), *z = random_floats(&b, T * D, 6, 9), *gain = random_floats(&b, D, 7, 1), *bias = random_floats(&b, D, 8, 1);
    for (int pooling = DSA_POOL_NONE; pooling <= DSA_POOL_GATED; pooling++)
        for (int after = 0; after <= 1; after++)
            for (int norm = DSA_NORM_LAYER; norm <= DSA_NORM_NONE; norm++) {
                dsa_config c = small(4, 2, D, 8);
                dsa_ctx ctx;
                c.pooling = (dsa_pooling)pooling;
                c.norm_pooled = after;
                c.index_norm = (dsa_norm)norm;
                c.index_rope_width = 16;
                c.index_rope_offset = 8;
                OK(dsa_init(&ctx, &c));
                dsa_cache_desc d = desc_of(DSA_INDEX_KEY, DSA_F32, T, 0);
                dsa_cache pooled = cache_of(&b, &ctx, &d), tokens = cache_of(&b, &ctx, &d);
                dsa_compressor_desc cd = { DSA_INDEX_KEY, gain, bias, NULL, 0 };
                dsa_compressor pool = compressor_of(&b, &ctx, &cd);
                dsa_rope rope = dsa_config_index_rope(&ctx);
                float *rows = floats(&b, T * D);
                int64_t at[T];
                memcpy(rows, k, sizeof(float) * T * D);
                for (int64_t t = 0; t < T; t++) at[t] = t;
                OK(dsa_norm_rows(c.index_norm, rows, T, D, D, gain, bias, ctx.config.index_norm_eps));
                OK(dsa_rope_rows(rows, T, D, 1, 0, D, &rope, at, 0));
                OK(append(&ctx, NULL, &tokens, T, NULL, rows));
                OK(dsa_compress(&ctx, &pool, T, k, pooling == DSA_POOL_GATED ? z : NULL, &pooled));
                ASSERT_EQ_FMT((long)T, (long)pooled.len, "%ld");
                ASSERT_MEM_EQ(tokens.data, pooled.data, T * D * sizeof(float));
            }
    END(b);
}

/* One entry in double, as spec 3.5 has it. */
static void brute_entry_of(const dsa_ctx *ctx, dsa_kind kind, const float *x, const float *z, const float *bias, const float *gain, int64_t w, double *y)
{
    const dsa_config *c = &ctx->config;
    const int32_t dim = kind == DSA_INDEX_KEY ? c->dim_index : c->dim_latent + c->dim_rope, m = c->stride;
    const int overlap = c->pooling == DSA_POOL_GATED_OVERLAP, mean = c->pooling == DSA_POOL_MEAN;
    const int32_t width = overlap ? 2 * dim : dim;
    double square = 0;
    for (int32_t d = 0; d < dim; d++) {
        double sum = 0, all = 0;
        for (int half = overlap && w > 0 ? 0 : 1; half < 2; half++)
            for (int32_t i = 0; i < m; i++) {
                int64_t j = (w - (half == 0)) * m + i, ch = overlap && half == 1 ? dim + d : d;
                double e = mean ? 1 : exp((double)z[j * width + ch] + (double)bias[i * width + ch]);
                sum += e;
                all += e * (double)x[j * width + ch];
            }
        y[d] = all / sum;
        square += y[d] * y[d] / dim;
    }
    for (int32_t d = 0; d < dim; d++) y[d] *= (double)gain[d] / sqrt(square + 1e-6);
    dsa_rope r = kind == DSA_INDEX_KEY ? dsa_config_index_rope(ctx) : dsa_config_rope(ctx, dim);
    for (int32_t i = 0; i < r.width / 2; i++) {
        int32_t a = r.offset + (r.layout == DSA_ROPE_HALF ? i : 2 * i), p = r.layout == DSA_ROPE_HALF ? a + r.width / 2 : a + 1;
        double angle = (double)(w * m) * pow(c->rope_theta, -2.0 * i / r.width), u = y[a], v = y[p];
        y[a] = u * cos(angle) - v * sin(angle);
        y[p] = u * sin(angle) + v * cos(angle);
    }
}

/* By its definition; any chunking gives the same bits; and after going back to any token, so does going on from there. */
TEST pools_any_chunking(dsa_pooling pooling, dsa_kind kind, int32_t stride)
{
    enum { T = 75 };
    bag b = { NULL, 0 };
    dsa_config c = small(4, 2, 16, 8);
    dsa_ctx ctx;
    c.stride = stride;
    c.pooling = pooling;
    c.index_norm = DSA_NORM_RMS;
    c.norm_pooled = 1;
    c.index_rope_width = 8;
    c.index_rope_offset = 8;
    c.index_rope_interleaved = 1;
    OK(dsa_init(&ctx, &c));
    const int gated = pooling >= DSA_POOL_GATED, overlap = pooling == DSA_POOL_GATED_OVERLAP;
    const int32_t dim = kind == DSA_INDEX_KEY ? 16 : 32, width = dim * (overlap ? 2 : 1);
    float *x = random_floats(&b, T * width, 21, 1), *z = random_floats(&b, T * width, 22, 3), *bias = random_floats(&b, stride * width, 23, 1);
    float *gain = random_floats(&b, dim, 24, 1);
    dsa_cache_desc d = desc_of(kind, DSA_F32, T, 4);
    dsa_cache whole = cache_of(&b, &ctx, &d);
    dsa_compressor_desc cd = { kind, gain, NULL, gated ? bias : NULL, 0 };
    dsa_compressor one = compressor_of(&b, &ctx, &cd);
    OK(dsa_compress(&ctx, &one, T, x, gated ? z : NULL, &whole));
    ASSERT_EQ_FMT((long)(T / stride), (long)whole.len, "%ld");
    float *want = floats(&b, (T / stride + 1) * dim), *got = floats(&b, (T / stride + 1) * dim);
    OK(dsa_cache_read(&ctx, &whole, 0, whole.len, want));
    for (int64_t w = 0; w < whole.len; w++) {
        double y[32];
        brute_entry_of(&ctx, kind, x, z, bias, gain, w, y);
        WITHIN(4e-6, max_error(want + w * dim, y, dim));
    }
    for (int run = 0; run < 8; run++) {
        dsa_cache cache = cache_of(&b, &ctx, &d);
        dsa_compressor pool;
        uint64_t s = (uint64_t)run * 31 + 7;
        cd.n_kept = run < 4 ? 0 : T;                     /* run 4 and up: everything is kept, so any token may be gone back to */
        pool = compressor_of(&b, &ctx, &cd);
        for (int turns = 0; pool.len < T; turns++) {
            int64_t n = run == 0 ? 1 : rnd_below(&s, 14), at = pool.len;
            if (n > T - at) n = T - at;
            OK(dsa_compress(&ctx, &pool, n, x + at * width, gated ? z + at * width : NULL, &cache));
            ASSERT_EQ_FMT((long)(pool.len / stride), (long)cache.len, "%ld");
            if (run >= 4 && turns < 40 && rnd_below(&s, 2)) {
                int64_t back = rnd_below(&s, (int32_t)pool.len + 1);
                OK(dsa_compressor_truncate(&ctx, &pool, &cache, back));
                ASSERT_EQ_FMT((long)(back / stride), (long)cache.len, "%ld");
            }
        }
        OK(dsa_cache_read(&ctx, &cache, 0, cache.len, got));
        ASSERT(same_bits(want, got, whole.len * dim));
    }
    END(b);
}

/* What is kept decides how far back truncation goes; a refusal changes nothing. */
TEST pools_keep_what_they_say(dsa_pooling pooling)
{
    enum { T = 64, M = 4, D = 16 };
    bag b = { NULL, 0 };
    dsa_config c = small(4, 2, D, 8);
    dsa_ctx ctx;
    const int overlap = pooling == DSA_POOL_GATED_OVERLAP;
    const int32_t width = overlap ? 2 * D : D;
    c.stride = M;
    c.pooling = pooling;
    c.index_norm = DSA_NORM_NONE;
    OK(dsa_init(&ctx, &c));
    float *x = random_floats(&b, T * width, 31, 1), *z = random_floats(&b, T * width, 32, 1);
    for (int32_t kept = 0; kept <= 9; kept += 3) {
        dsa_compressor_desc cd = { DSA_INDEX_KEY, NULL, NULL, NULL, kept };
        dsa_cache_desc d = desc_of(DSA_INDEX_KEY, DSA_F32, T, 0);
        for (int32_t n = 0; n <= T; n++) {
            dsa_cache cache = cache_of(&b, &ctx, &d), copy;
            dsa_compressor pool = compressor_of(&b, &ctx, &cd), was;
            OK(dsa_compress(&ctx, &pool, T, x, z, &cache));
            copy = cache;
            was = pool;
            int64_t need = n / M * M - (overlap && n >= M ? M : 0), room = (overlap ? 2 : 1) * M + kept;
            dsa_status want = need < n && need < T - room ? DSA_ERR_CAPACITY : DSA_OK;
            ASSERT(T - n > kept || want == DSA_OK);
            IS(want, dsa_compressor_truncate(&ctx, &pool, &cache, n));
            if (want != DSA_OK) {
                ASSERT(memcmp(&copy, &cache, sizeof copy) == 0 && memcmp(&was, &pool, sizeof was) == 0);
                continue;
            }
            ASSERT(pool.len == n && cache.len == n / M);
            OK(dsa_compress(&ctx, &pool, T - n, x + (int64_t)n * width, z + (int64_t)n * width, &cache));
        }
        bag_shrink(&b, 2);
    }
    END(b);
}

/* ---- attention ----------------------------------------------------------------------------------------------- */
/* Grouped queries and a list for each group, against the definition; every ISA, thread count and way to name rows. */
TEST grouped_queries(dsa_type format, int32_t H, int32_t n_kv, int32_t n_lists, int32_t dk, int32_t dv)
{
    enum { T = 260, N = 3, L = 220 };
    bag b = { NULL, 0 };
    dsa_config c = small(H, n_lists, 8, L);
    dsa_ctx ctx;
    backwards back;
    uint64_t s = 5;
    c.n_kv_heads = n_kv;
    c.dim_latent = dk;
    c.dim_value = dv;
    c.dim_rope = DSA_NONE;
    c.index_groups = n_lists;
    OK(dsa_init(&ctx, &c));
    dsa_cache_desc dkd = desc_of(DSA_LATENT, format, T, 16), dvd = desc_of(DSA_VALUE, format, T, 16);
    dsa_cache k = cache_of(&b, &ctx, &dkd), v = cache_of(&b, &ctx, &dvd);
    int32_t *table = page_table(&b, (T + 15) / 16, (T + 15) / 16, 9);
    k.block_table = v.block_table = table;
    dsa_seq seq = seq_of(&k, NULL, T);
    seq.value = &v;
    dsa_append_args ap;
    memset(&ap, 0, sizeof ap);
    ap.n_seqs = 1;
    ap.seqs = &seq;
    ap.latent = random_floats(&b, (int64_t)T * n_kv * dk, 41, 1);
    ap.value = random_floats(&b, (int64_t)T * n_kv * dv, 42, 1);
    OK(dsa_append(&ctx, &ap));
    float *K = floats(&b, (int64_t)T * n_kv * dk), *V = floats(&b, (int64_t)T * n_kv * dv), *q = random_floats(&b, (int64_t)N * H * dk, 43, 1);
    float *sinks = random_floats(&b, H, 44, 1);
    OK(dsa_cache_read(&ctx, &k, 0, T, K));
    OK(dsa_cache_read(&ctx, &v, 0, T, V));
    int32_t *lists = ints(&b, N * n_lists * L), *slots = ints(&b, N * n_lists * L);
    for (int32_t i = 0; i < N * n_lists * L; i++) {
        lists[i] = rnd_below(&s, 9) == 0 ? (int32_t)rnd(&s) : rnd_below(&s, T);
        if (lists[i] >= 0 && lists[i] < T) slots[i] = table[lists[i] / 16] * 16 + lists[i] % 16;
        else lists[i] = -7, slots[i] = -1;
    }
    seq.n_q = N;
    dsa_attend_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &seq;
    a.q = q;
    a.indices = lists;
    float *out = floats(&b, (int64_t)N * H * dv), *lse = floats(&b, N * H), *max = floats(&b, N * H), *first = floats(&b, (int64_t)N * H * dv);
    for (int32_t run = 0; run < 4; run++) {
        dsa_ctx many = with_threads(&ctx, &back, 1 + 3 * (run / 2));
        a.indices = run % 2 ? slots : lists;
        a.index_kind = run % 2 ? DSA_PHYSICAL : DSA_LOGICAL;
        OK(attend(&b, &many, a, N, H, dv, sinks, out, lse, max));
        if (run == 0) memcpy(first, out, sizeof(float) * (size_t)(N * H * dv));
        ASSERT(same_bits(first, out, (int64_t)N * H * dv));
    }
    for (int32_t t = 0; t < N; t++)
        for (int32_t h = 0; h < H; h++) {
            const int32_t *list = lists + (t * n_lists + h * n_lists / H) * L, kv = h * n_kv / H;
            float *rows = floats(&b, (int64_t)T * (dv + dk)), *qh = floats(&b, dv + dk);
            double *want = doubles(&b, dv), l, m;
            memset(qh, 0, sizeof(float) * (size_t)(dv + dk));
            memcpy(qh + dv, q + (int64_t)(t * H + h) * dk, sizeof(float) * (size_t)dk);
            for (int32_t j = 0; j < T; j++) {
                memcpy(rows + (int64_t)j * (dv + dk), V + ((int64_t)j * n_kv + kv) * dv, sizeof(float) * (size_t)dv);
                memcpy(rows + (int64_t)j * (dv + dk) + dv, K + ((int64_t)j * n_kv + kv) * dk, sizeof(float) * (size_t)dk);
            }
            brute_attend(1, dv, dk, qh, rows, T, list, L, (double)ctx.config.softmax_scale, sinks + h, want, &l, &m);
            WITHIN(format == DSA_F32 ? 3e-6 : 8e-3, max_error(out + (int64_t)(t * H + h) * dv, want, dv));
            WITHIN(format == DSA_F32 ? 3e-6 : 8e-3, fabs(l - (double)lse[t * H + h]));
        }
    ASSERT_IN_RANGE(1 / sqrt(dk), ctx.config.softmax_scale, 1e-7);
    END(b);
}

/* Lists per group over one latent cache: each group of heads as if it were alone with its list. */
TEST lists_per_group(dsa_type format)
{
    enum { T = 240, N = 2, H = 12, L = 30 };
    bag b = { NULL, 0 };
    dsa_config c = small(H, 6, 8, L), one = small(4, 2, 8, L);
    dsa_ctx ctx, alone;
    uint64_t s = 77;
    c.index_groups = 3;
    OK(dsa_init(&ctx, &c));
    OK(dsa_init(&alone, &one));
    dsa_cache_desc d = desc_of(DSA_LATENT, format, T, 0);
    dsa_cache kv = cache_of(&b, &ctx, &d);
    OK(append(&ctx, &kv, NULL, T, random_floats(&b, T * 32, 51, 1), NULL));
    float *q = random_floats(&b, N * H * 32, 52, 1), *out = floats(&b, N * H * 24), *part = floats(&b, 4 * 24);
    int32_t *lists = ints(&b, N * 3 * L), *counts = ints(&b, N * 3);
    for (int32_t i = 0; i < N * 3 * L; i++) lists[i] = rnd_below(&s, T);
    for (int32_t i = 0; i < N * 3; i++) counts[i] = rnd_below(&s, L + 1);
    dsa_seq seq = seq_of(&kv, NULL, N), single = seq_of(&kv, NULL, 1);
    dsa_attend_args a, p;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &seq;
    a.q = q;
    a.scale = 0.2f;
    a.indices = lists;
    a.counts = counts;
    OK(attend(&b, &ctx, a, N, H, 24, NULL, out, NULL, NULL));
    for (int32_t t = 0; t < N; t++)
        for (int32_t g = 0; g < 3; g++) {
            p = a;
            p.seqs = &single;
            p.q = q + (t * H + g * 4) * 32;
            p.indices = lists + (t * 3 + g) * L;
            p.counts = counts + t * 3 + g;
            OK(attend(&b, &alone, p, 1, 4, 24, NULL, part, NULL, NULL));
            ASSERT(same_bits(part, out + (t * H + g * 4) * 24, 4 * 24));
        }
    END(b);
}

/* DeepSeek-V4's union, once as ranges, once as lists: a window of one cache and entries of another, in one softmax. */
TEST window_and_entries(dsa_type format)
{
    enum { T = 300, E = 70, N = 5, H = 6, W = 128 };
    bag b = { NULL, 0 };
    dsa_config c = small(H, 2, 8, 40);
    dsa_ctx ctx;
    c.dim_value = 32;                                    /* the whole row */
    OK(dsa_init(&ctx, &c));
    dsa_cache_desc d = desc_of(DSA_LATENT, format, T, 0);
    dsa_cache rows = cache_of(&b, &ctx, &d), entries = cache_of(&b, &ctx, &d);
    float *kv = random_floats(&b, (T + E) * 32, 61, 1), *q = random_floats(&b, N * H * 32, 62, 1), *sinks = random_floats(&b, H, 63, 1);
    OK(append(&ctx, &rows, NULL, T, kv, NULL));
    OK(append(&ctx, &entries, NULL, E, kv + T * 32, NULL));
    if (format != DSA_F32) {
        OK(dsa_cache_read(&ctx, &rows, 0, T, kv));
        OK(dsa_cache_read(&ctx, &entries, 0, E, kv + T * 32));
    }
    int64_t ks[N], ke[N], zero[N] = { 0 }, seen[N];
    int32_t *window = ints(&b, N * W), *all = ints(&b, N * E), *both = ints(&b, W + E);
    for (int32_t t = 0; t < N; t++) {
        ke[t] = T - N + t + 1;
        ks[t] = ke[t] - W;
        seen[t] = ke[t] / 4 < E ? ke[t] / 4 : E;
        for (int32_t j = 0; j < W; j++) window[t * W + j] = (int32_t)ks[t] + j;
        for (int32_t j = 0; j < E; j++) all[t * E + j] = j < seen[t] ? j : -1;
    }
    dsa_attend_state s[2];
    for (int lists = 0; lists < 2; lists++) {
        dsa_seq seq = seq_of(&rows, NULL, N);
        dsa_attend_args a;
        memset(&a, 0, sizeof a);
        a.n_seqs = 1;
        a.seqs = &seq;
        a.q = q;
        a.scale = 0.3f;
        a.what = lists ? DSA_ATTEND_LIST : DSA_ATTEND_RANGE;
        s[lists] = state_of(&b, N, H, 0);
        s[lists].dim_v = 0;                              /* dim_value */
        s[lists].out = floats(&b, N * H * 32);
        OK(dsa_attend_begin(&ctx, &s[lists]));
        a.ks = ks;
        a.ke = ke;
        a.indices = window;
        a.n_indices = W;
        OK(add(&b, &ctx, a, &s[lists]));
        seq.latent = &entries;
        a.ks = zero;
        a.ke = seen;
        a.indices = all;
        a.n_indices = E;
        OK(add(&b, &ctx, a, &s[lists]));
        OK(dsa_attend_finish(&ctx, &s[lists], sinks, s[lists].out, NULL, NULL));
    }
    ASSERT(same_bits(s[0].out, s[1].out, N * H * 32));
    for (int32_t t = 0; t < N; t++)
        for (int32_t h = 0; h < H; h++) {
            double want[32], l, m;
            for (int32_t j = 0; j < W; j++) both[j] = window[t * W + j];
            for (int32_t j = 0; j < E; j++) both[W + j] = j < seen[t] ? T + j : -1;
            brute_attend(1, 32, 0, q + (t * H + h) * 32, kv, T + E, both, W + E, 0.3f, sinks + h, want, &l, &m);
            WITHIN(format == DSA_F32 ? 3e-6 : 8e-3, max_error(s[0].out + (t * H + h) * 32, want, 32));
        }
    END(b);
}

TEST norms_and_gates(void)
{
    enum { N = 3, D = 20 };
    bag b = { NULL, 0 };
    float *x = random_floats(&b, N * D, 71, 1), *g = random_floats(&b, D, 72, 1), *bias = random_floats(&b, D, 73, 1), *y = floats(&b, N * D), *z = floats(&b, N * D);
    const size_t bytes = sizeof(float) * N * D;
    memcpy(y, x, bytes);
    memcpy(z, x, bytes);
    OK(dsa_norm_rows(DSA_NORM_NONE, y, N, D, D, NULL, NULL, 1e-6f));
    ASSERT_MEM_EQ(x, y, bytes);
    OK(dsa_norm_rows(DSA_NORM_LAYER, y, N, D, D, g, bias, 1e-6f));
    OK(dsa_layer_norm(z, N, D, D, g, bias, 1e-6f));
    ASSERT_MEM_EQ(z, y, bytes);
    for (int kind = 0; kind < 3; kind++) {               /* weight, 1 + weight, no weight */
        memcpy(y, x, bytes);
        OK(dsa_norm_rows(kind == 1 ? DSA_NORM_RMS_PLUS_ONE : DSA_NORM_RMS, y, N, D, D, kind == 2 ? NULL : g, NULL, 1e-3f));
        for (int32_t t = 0; t < N; t++) {
            double square = 0;
            for (int32_t i = 0; i < D; i++) square += (double)x[t * D + i] * (double)x[t * D + i] / D;
            for (int32_t i = 0; i < D; i++) {
                double gain = kind == 2 ? 1 : (double)g[i] + (kind == 1);
                ASSERT_IN_RANGE((double)x[t * D + i] * gain / sqrt(square + (double)1e-3f), y[t * D + i], 3e-7);
            }
        }
    }
    float gates[] = { -1e30f, -90, -3, -1e-9f, 0, 0.5f, 30, 1e30f, NAN }, ones[9];
    for (int i = 0; i < 9; i++) ones[i] = 1;
    OK(dsa_gate(ones, gates, 9));
    for (int i = 0; i < 8; i++) ASSERT_IN_RANGE(1 / (1 + exp(-(double)gates[i])), ones[i], 2e-7);
    ASSERT(isnan(ones[8]));
    IS(DSA_ERR_NULL, dsa_gate(NULL, gates, 1));
    IS(DSA_ERR_SHAPE, dsa_gate(ones, gates, -1));
    OK(dsa_gate(NULL, NULL, 0));
    IS(DSA_ERR_NULL, dsa_norm_rows(DSA_NORM_RMS_PLUS_ONE, y, N, D, D, NULL, NULL, 1e-6f));
    IS(DSA_ERR_NULL, dsa_norm_rows(DSA_NORM_RMS, NULL, N, D, D, NULL, NULL, 1e-6f));
    IS(DSA_ERR_SHAPE, dsa_norm_rows(DSA_NORM_RMS, y, N, D - 1, D, NULL, NULL, 1e-6f));
    IS(DSA_ERR_ARGUMENT, dsa_norm_rows((dsa_norm)9, y, N, D, D, g, NULL, 1e-6f));
    END(b);
}

/* ---- presets, and what is refused ----------------------------------------------------------------------------- */
TEST presets(void)
{
    static const struct { dsa_preset preset; int64_t length; int layer; double scale; } rows[] = {
        { DSA_DEEPSEEK_V32, 2048, 1, 0.1352338 }, { DSA_GLM_5, 2048, 1, 0.0625 }, { DSA_GLM_52, 2048, 1, 0.0625 },
        { DSA_DEEPSEEK_V3, 2048, 1, 0.1352338 }, { DSA_AXK2, 2048, 0, 0.1020621 }, { DSA_HY_V4, 2048, 0, 0.0625 },
        { DSA_GLM5_NEXT, 2048 + 15, 0, 0.0625 }, { DSA_MINIMAX_M3, 2048, 0, 0.0883883 }, { DSA_QWEN4_EXP, 0, 0, 0.0625 },
        { DSA_DEEPSEEK_V4_FLASH, 512, 0, 0.0441942 }, { DSA_DEEPSEEK_V4_PRO, 1024, 0, 0.0441942 },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        dsa_config c;
        dsa_ctx ctx;
        dsa_layer_args a;
        dsa_layer_weights w;
        size_t bytes;
        OK(dsa_config_preset(rows[i].preset, &c));
        c.isa = test_isa;
        if (rows[i].preset == DSA_QWEN4_EXP) {
            IS(DSA_ERR_SHAPE, dsa_init(&ctx, &c));
            c.stride = 4;
            c.top_k = 6;
            OK(dsa_init(&ctx, &c));
            ASSERT_EQ_FMT(27L, (long)dsa_list_length(&ctx, 0), "%ld");
            ASSERT_IN_RANGE(1 / sqrt(128), ctx.config.index_scale, 1e-7);
        } else {
            OK(dsa_init(&ctx, &c));
            ASSERT_EQ_FMT((long)rows[i].length, (long)dsa_list_length(&ctx, 0), "%ld");
        }
        ASSERT_IN_RANGE(rows[i].scale, ctx.config.softmax_scale, 1e-6);
        memset(&a, 0, sizeof a);
        memset(&w, 0, sizeof w);
        a.weights = &w;
        IS(rows[i].layer ? DSA_ERR_NULL : DSA_ERR_UNSUPPORTED, dsa_layer_workspace(&ctx, &a, &bytes));   /* NULL: weight q_a */
    }
    for (int32_t i = 0; i < 12; i++) ASSERT_EQ(i == 0 || i % 4 == 1, dsa_layer_has_indexer(4, 2, i));    /* hy_v4: full at 0, 1, 5, 9 */
    PASS();
}

/* Each of these is refused with its own status, and says why. */
TEST refusals(void)
{
    bag b = { NULL, 0 };
    dsa_config c, plain = small(8, 4, 32, 5);
    dsa_ctx ctx;
    char why[200];
    size_t bytes;
#define REFUSED(STATUS, CALL) do { why[0] = 0; IS(STATUS, CALL); ASSERT(why[0] != 0); } while (0)
#define BAD(STATUS, ...) do { c = plain; c.detail = why; c.detail_size = sizeof why; __VA_ARGS__; REFUSED(STATUS, dsa_init(&ctx, &c)); } while (0)
    BAD(DSA_ERR_SHAPE, c.stride = -2);
    BAD(DSA_ERR_SHAPE, c.block_size = DSA_NONE);
    BAD(DSA_ERR_SHAPE, c.n_local_blocks = -1);
    BAD(DSA_ERR_SHAPE, c.n_local_blocks = 6);
    BAD(DSA_ERR_SHAPE, c.index_groups = 3);
    BAD(DSA_ERR_SHAPE, c.n_kv_heads = 3, c.dim_rope = DSA_NONE);
    BAD(DSA_ERR_SHAPE, c.n_kv_heads = 2);                /* dim_rope is 8 */
    BAD(DSA_ERR_SHAPE, c.n_kv_heads = 8, c.dim_rope = DSA_NONE, c.dim_value = DSA_MAX_DIM);
    BAD(DSA_ERR_SHAPE, c.dim_value = 33);
    BAD(DSA_ERR_SHAPE, c.rope_width = 3);
    BAD(DSA_ERR_SHAPE, c.rope_width = 34);
    BAD(DSA_ERR_ARGUMENT, c.stride = 4);                 /* and no pooling */
    BAD(DSA_ERR_ARGUMENT, c.pooling = (dsa_pooling)4);
    BAD(DSA_ERR_ARGUMENT, c.index_norm = (dsa_norm)4);
    BAD(DSA_ERR_ARGUMENT, c.index_scale = -1);
    BAD(DSA_ERR_ARGUMENT, c.keep_tail = 1, c.list_entries = 1);
    BAD(DSA_ERR_UNSUPPORTED, c.stride = 4, c.pooling = DSA_POOL_MEAN, c.block_size = 2);
    BAD(DSA_ERR_OVERFLOW, c.block_size = 1 << 30);
    ASSERT_EQ_FMT(0L, (long)dsa_list_length(NULL, 0), "%ld");

    static const struct { int32_t stride, groups, linear, weightless, block, kv; } forms[] = {
        { 4, 0, 0, 0, 0, 0 }, { 0, 2, 0, 0, 0, 0 }, { 0, 0, 1, 0, 0, 0 }, { 0, 0, 0, 1, 0, 0 }, { 0, 0, 0, 0, 4, 0 }, { 0, 0, 0, 0, 0, 2 },
    };
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        c = plain;
        c.detail = why;
        c.detail_size = sizeof why;
        c.dim_rope = DSA_NONE;
        c.stride = forms[i].stride;
        c.pooling = c.stride ? DSA_POOL_MEAN : DSA_POOL_NONE;
        c.index_groups = forms[i].groups;
        c.index_linear = forms[i].linear;
        c.index_no_weights = forms[i].weightless;
        c.block_size = forms[i].block;
        c.n_kv_heads = forms[i].kv;
        OK(dsa_init(&ctx, &c));
        dsa_cache_desc kd = desc_of(DSA_INDEX_KEY, DSA_F32, 40, 0), ld = desc_of(DSA_LATENT, DSA_F32, 40, 0);
        dsa_cache keys = cache_of(&b, &ctx, &kd), latent = cache_of(&b, &ctx, &ld);
        dsa_seq seq = seq_of(&latent, &keys, 1);
        dsa_step_args step_args;
        dsa_index_backward_args back;
        dsa_attend_backward_args attend_back;
        dsa_layer_args layer_args;
        dsa_layer_weights weights;
        memset(&step_args, 0, sizeof step_args);
        memset(&back, 0, sizeof back);
        memset(&attend_back, 0, sizeof attend_back);
        memset(&layer_args, 0, sizeof layer_args);
        memset(&weights, 0, sizeof weights);
        step_args.n_seqs = back.set.n_seqs = attend_back.attend.n_seqs = 1;
        step_args.seqs = back.set.seqs = attend_back.attend.seqs = &seq;
        layer_args.weights = &weights;
        REFUSED(DSA_ERR_UNSUPPORTED, dsa_step_workspace(&ctx, &step_args, &bytes));
        REFUSED(DSA_ERR_UNSUPPORTED, dsa_index_backward_workspace(&ctx, &back, &bytes));
        REFUSED(DSA_ERR_UNSUPPORTED, dsa_attend_backward_workspace(&ctx, &attend_back, &bytes));
        REFUSED(DSA_ERR_UNSUPPORTED, dsa_layer_workspace(&ctx, &layer_args, &bytes));

        float *x = random_floats(&b, 4096, 81, 1);
        int32_t list[200];
        int64_t range[1] = { 0 };
        float scores[5];
        dsa_score_args a = score_of(&seq, x, forms[i].weightless ? NULL : x);
        dsa_selection sel = { 0, DSA_ORDER_INDEX, list, NULL, NULL };
        latent.len = 40;
        keys.len = 40 / (forms[i].stride ? forms[i].stride : 1);
        if (forms[i].stride || forms[i].block) {
            dsa_select_args select_args;
            memset(&select_args, 0, sizeof select_args);
            REFUSED(DSA_ERR_UNSUPPORTED, dsa_select_workspace(&ctx, &select_args, &sel, &bytes));
            sel.order = DSA_ORDER_RANK;
            REFUSED(DSA_ERR_UNSUPPORTED, score_select(&b, &ctx, a, &sel));
            sel.order = DSA_ORDER_INDEX;
            sel.scores = scores;
            REFUSED(DSA_ERR_UNSUPPORTED, score_select(&b, &ctx, a, &sel));
            sel.scores = NULL;
            a.ks = a.ke = range;
            REFUSED(DSA_ERR_UNSUPPORTED, score_select(&b, &ctx, a, &sel));
            a.ks = a.ke = NULL;
        }
        if (forms[i].stride) {
            REFUSED(DSA_ERR_UNSUPPORTED, append(&ctx, NULL, &keys, 1, NULL, x));
            keys.len--;
            REFUSED(DSA_ERR_ARGUMENT, score_select(&b, &ctx, a, &sel));
            keys.len++;
            seq.latent = NULL;
            REFUSED(DSA_ERR_NULL, score_select(&b, &ctx, a, &sel));
            seq.latent = &latent;
        }
        if (forms[i].weightless) {
            a.w = x;
            REFUSED(DSA_ERR_ARGUMENT, score_select(&b, &ctx, a, &sel));
            a.w = NULL;
        }
        OK(score_select(&b, &ctx, a, &sel));
        if (forms[i].kv) {
            dsa_cache_desc vd = desc_of(DSA_VALUE, DSA_BF16, 40, 0);
            dsa_cache value = cache_of(&b, &ctx, &vd);
            dsa_attend_args at;
            float *out = floats(&b, 8 * 24);
            memset(&at, 0, sizeof at);
            at.n_seqs = 1;
            at.seqs = &seq;
            at.q = x;
            at.what = DSA_ATTEND_VISIBLE;
            REFUSED(DSA_ERR_NULL, attend(&b, &ctx, at, 1, 8, 24, NULL, out, NULL, NULL));
            seq.value = &value;
            value.len = 40;
            REFUSED(DSA_ERR_UNSUPPORTED, attend(&b, &ctx, at, 1, 8, 24, NULL, out, NULL, NULL));     /* bf16 beside f32 */
            vd.format = DSA_F32;
            value = cache_of(&b, &ctx, &vd);
            value.len = 39;
            REFUSED(DSA_ERR_ARGUMENT, attend(&b, &ctx, at, 1, 8, 24, NULL, out, NULL, NULL));
            value.len = 40;
            memset(value.data, 0, 40 * 2 * 24 * 4);
            memset(latent.data, 0, 40 * 2 * 24 * 4);
            REFUSED(DSA_ERR_SHAPE, attend(&b, &ctx, at, 1, 8, 25, NULL, floats(&b, 8 * 25), NULL, NULL));
            at.n_lists = 3;
            REFUSED(DSA_ERR_SHAPE, attend(&b, &ctx, at, 1, 8, 24, NULL, out, NULL, NULL));
            at.n_lists = 0;
            OK(attend(&b, &ctx, at, 1, 8, 24, NULL, out, NULL, NULL));
            vd.format = DSA_FP8;
            IS(DSA_ERR_FORMAT, dsa_cache_bytes(&ctx, &vd, &bytes));
        }
    }
    /* compressors */
    c = plain;
    c.detail = why;
    c.detail_size = sizeof why;
    c.stride = 4;
    c.pooling = DSA_POOL_GATED;
    OK(dsa_init(&ctx, &c));
    float *x = random_floats(&b, 64 * 32, 82, 1);
    dsa_compressor_desc cd = { DSA_INDEX_KEY, x, x, NULL, 0 };
    dsa_cache_desc kd = desc_of(DSA_INDEX_KEY, DSA_F32, 5, 0), ld = desc_of(DSA_LATENT, DSA_F32, 5, 0);
    dsa_cache keys = cache_of(&b, &ctx, &kd), latent = cache_of(&b, &ctx, &ld);
    dsa_compressor pool = compressor_of(&b, &ctx, &cd);
    OK(dsa_compress(&ctx, &pool, 6, x, x, &keys));
    REFUSED(DSA_ERR_NULL, dsa_compress(&ctx, &pool, 1, x, NULL, &keys));
    REFUSED(DSA_ERR_NULL, dsa_compress(&ctx, &pool, 1, NULL, x, &keys));
    REFUSED(DSA_ERR_NULL, dsa_compress(&ctx, &pool, 1, x, x, NULL));
    REFUSED(DSA_ERR_FORMAT, dsa_compress(&ctx, &pool, 1, x, x, &latent));
    REFUSED(DSA_ERR_SHAPE, dsa_compress(&ctx, &pool, -1, x, x, &keys));
    REFUSED(DSA_ERR_CAPACITY, dsa_compress(&ctx, &pool, 18, x, x, &keys));
    OK(dsa_compress(&ctx, &pool, 17, x, x, &keys));      /* 23 tokens, 5 entries: full, but the tail goes on */
    REFUSED(DSA_ERR_ARGUMENT, dsa_compressor_truncate(&ctx, &pool, &keys, 24));
    keys.len = 4;
    REFUSED(DSA_ERR_ARGUMENT, dsa_compress(&ctx, &pool, 0, NULL, NULL, &keys));
    keys.len = 5;
    cd.bias = NULL;
    REFUSED(DSA_ERR_NULL, dsa_compressor_bytes(&ctx, &cd, &bytes));
    cd.bias = x;
    cd.n_kept = -1;
    REFUSED(DSA_ERR_SHAPE, dsa_compressor_bytes(&ctx, &cd, &bytes));
    cd.n_kept = 0;
    cd.kind = DSA_VALUE;
    REFUSED(DSA_ERR_ARGUMENT, dsa_compressor_bytes(&ctx, &cd, &bytes));
    cd.kind = DSA_INDEX_KEY;
    OK(dsa_compressor_bytes(&ctx, &cd, &bytes));
    REFUSED(DSA_ERR_CAPACITY, dsa_compressor_init(&ctx, &cd, work(&b, bytes), bytes - 1, &pool));
    c.pooling = DSA_POOL_GATED_OVERLAP;
    OK(dsa_init(&ctx, &c));
    REFUSED(DSA_ERR_UNSUPPORTED, dsa_compressor_bytes(&ctx, &cd, &bytes));                            /* LayerNorm of the rows before */
    END(b);
}

SUITE(models_suite)
{
    static const dsa_type formats[] = { DSA_F32, DSA_BF16, DSA_FP8, DSA_INT8 };
    char name[64];
    for (int i = 0; i < 4; i++)
        for (int linear = 0; linear < 2; linear++) {
            snprintf(name, sizeof name, "%s_%s", brute_type_name(formats[i]), linear ? "linear" : "relu");
            CASE(name, groups_are_small_indexers, formats[i], linear);
            CASE(name, scores_by_definition, formats[i], linear, 0);
            CASE(name, scores_by_definition, formats[i], linear, 1);
        }
    for (int seed = 0; seed < 60; seed++) {
        snprintf(name, sizeof name, "%d", seed);
        CASE(name, lists_by_definition, seed);
    }
    RUN_TEST(blocks_by_rank);
    RUN_TEST(pool_of_one);
    for (int stride = 1; stride <= 16; stride *= 4)
        for (int pooling = DSA_POOL_MEAN; pooling <= DSA_POOL_GATED_OVERLAP; pooling++) {
            snprintf(name, sizeof name, "%d_%d", pooling, stride);
            CASE(name, pools_any_chunking, (dsa_pooling)pooling, DSA_INDEX_KEY, stride);
            CASE(name, pools_any_chunking, (dsa_pooling)pooling, DSA_LATENT, stride);
        }
    RUN_TESTp(pools_keep_what_they_say, DSA_POOL_GATED);
    RUN_TESTp(pools_keep_what_they_say, DSA_POOL_GATED_OVERLAP);
    for (int i = 0; i < 2; i++) {
        snprintf(name, sizeof name, "%s", brute_type_name(formats[i]));
        CASE(name, grouped_queries, formats[i], 8, 2, 2, 32, 32);
        CASE(name, grouped_queries, formats[i], 64, 4, 4, 128, 128);
        CASE(name, grouped_queries, formats[i], 12, 6, 4, 20, 36);
        CASE(name, grouped_queries, formats[i], 6, 1, 1, 40, 7);
        CASE(name, grouped_queries, formats[i], 16, 2, 1, 256, 256);
        CASE(name, window_and_entries, formats[i]);
    }
    for (int i = 0; i < 3; i++) CASE(brute_type_name(formats[i]), lists_per_group, formats[i]);
    RUN_TEST(norms_and_gates);
    RUN_TEST(presets);
    RUN_TEST(refusals);
}

/* Shards: one sequence dealt to 1, 2, 3, 4 and 8 caches gives the list of one cache bit for bit, and its output up to f32 rounding. */
#include "fixture.h"

enum { H = 3, R = 40, RR = 8, W = R + RR, HI = 4, D = 32, K = 48, LEN = 700, N_Q = 3, MOST = 8 };

static dsa_ctx context(void)
{
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.n_heads = H;
    c.dim_latent = R;
    c.dim_rope = RR;
    c.n_index_heads = HI;
    c.dim_index = D;
    c.index_rope_width = 8;
    c.top_k = K;
    c.isa = test_isa;
    c.precision = DSA_PRECISION_F32;
    if (dsa_init(&ctx, &c) != DSA_OK) { fprintf(stderr, "test set-up: dsa_init refused\n"); abort(); }
    return ctx;
}

static dsa_shard shard_of(int32_t n_shards, int32_t shard, int32_t block)
{
    dsa_shard s;
    s.n_shards = n_shards;
    s.shard = shard;
    s.block = block;
    return s;
}

/* ---- the arithmetic, against dealing rows out one by one ------------------------------------------ */
TEST rows_are_dealt_in_blocks(int32_t n_shards, int32_t block)
{
    int64_t held[MOST] = { 0 }, n, ks[5], ke[5];
    for (int32_t g = 0; g < 200; g++) {
        int32_t owner = g / block % n_shards;
        for (int32_t p = 0; p < n_shards; p++) {
            dsa_shard s = shard_of(n_shards, p, block);
            int32_t local = g, global = (int32_t)held[p];
            OK(dsa_shard_len(&s, g, &n));
            ASSERT_EQ(held[p], n);
            OK(dsa_shard_to_local(&s, 1, &local, &local));
            ASSERT_EQ_FMT(p == owner ? (int32_t)held[p] : -1, local, "%d");
            if (p != owner) continue;
            OK(dsa_shard_to_global(&s, 1, &global));
            ASSERT_EQ_FMT(g, global, "%d");
        }
        held[owner]++;
        for (int32_t p = 0; p < n_shards; p++) {                   /* the newest of g + 1 rows sees all, the one before not the last, .. */
            dsa_shard s = shard_of(n_shards, p, block);
            OK(dsa_shard_ranges(&s, g + 1, 5, ks, ke));
            ASSERT_EQ(held[p], ke[4]);
            for (int i = 0; i < 5; i++) {
                OK(dsa_shard_len(&s, g - 3 + i > 0 ? g - 3 + i : 0, &n));
                ASSERT(ks[i] == 0 && ke[i] == n);
            }
        }
    }
    PASS();
}

TEST shards_refuse(void)
{
    dsa_shard s = shard_of(3, 1, 16), bad[4] = { { 0, 0, 1 }, { 3, 3, 1 }, { 3, -1, 1 }, { 3, 1, 0 } };
    int32_t list[3] = { 4, -7, INT32_MAX };
    int64_t n = 77, ks[1] = { 77 }, ke[1] = { 77 };
    for (int i = 0; i < 4; i++) {
        IS(DSA_ERR_ARGUMENT, dsa_shard_len(&bad[i], 5, &n));
        IS(DSA_ERR_ARGUMENT, dsa_shard_ranges(&bad[i], 5, 1, ks, ke));
        IS(DSA_ERR_ARGUMENT, dsa_shard_to_global(&bad[i], 3, list));
        IS(DSA_ERR_ARGUMENT, dsa_shard_to_local(&bad[i], 3, list, list));
    }
    IS(DSA_ERR_NULL, dsa_shard_len(NULL, 5, &n));
    IS(DSA_ERR_NULL, dsa_shard_len(&s, 5, NULL));
    IS(DSA_ERR_NULL, dsa_shard_ranges(&s, 5, 1, NULL, ke));
    IS(DSA_ERR_NULL, dsa_shard_ranges(&s, 5, 1, ks, NULL));
    IS(DSA_ERR_NULL, dsa_shard_to_global(&s, 1, NULL));
    IS(DSA_ERR_NULL, dsa_shard_to_local(&s, 1, NULL, list));
    IS(DSA_ERR_NULL, dsa_shard_to_local(&s, 1, list, NULL));
    IS(DSA_ERR_ARGUMENT, dsa_shard_len(&s, -1, &n));
    IS(DSA_ERR_ARGUMENT, dsa_shard_len(&s, INT64_C(1) << 31, &n));
    IS(DSA_ERR_ARGUMENT, dsa_shard_ranges(&s, 5, -1, ks, ke));
    IS(DSA_ERR_ARGUMENT, dsa_shard_ranges(&s, -1, 1, ks, ke));
    IS(DSA_ERR_SHAPE, dsa_shard_to_global(&s, -1, list));
    IS(DSA_ERR_SHAPE, dsa_shard_to_local(&s, -1, list, list));
    IS(DSA_ERR_OVERFLOW, dsa_shard_to_global(&s, 3, list));                /* the last entry; the first two stay */
    ASSERT(list[0] == 4 && list[1] == -7 && list[2] == INT32_MAX && n == 77 && ks[0] == 77 && ke[0] == 77);
    list[2] = -1;
    OK(dsa_shard_to_global(&s, 3, list));
    ASSERT(list[0] == 20 && list[1] == -1 && list[2] == -1);
    list[1] = -7;
    OK(dsa_shard_to_local(&s, 3, list, list));
    ASSERT(list[0] == 4 && list[1] == -1 && list[2] == -1);
    s = shard_of(3, 0, 16);                                                /* -7 / 16 is 0, a block of this shard */
    list[1] = -7;
    OK(dsa_shard_to_local(&s, 1, list + 1, list + 2));
    ASSERT_EQ_FMT(-1, list[2], "%d");
    list[2] = INT32_MAX;
    s = shard_of(INT32_MAX, INT32_MAX - 1, INT32_MAX);                     /* products near 2^62 */
    IS(DSA_ERR_OVERFLOW, dsa_shard_to_global(&s, 1, list));
    OK(dsa_shard_len(&s, INT32_MAX, &n));
    ASSERT_EQ((int64_t)0, n);
    s = shard_of(INT32_MAX, 0, 1);
    list[0] = 1;
    OK(dsa_shard_to_global(&s, 1, list));
    ASSERT_EQ_FMT(INT32_MAX, list[0], "%d");
    list[0] = 2;
    IS(DSA_ERR_OVERFLOW, dsa_shard_to_global(&s, 1, list));
    s = shard_of(1, 0, INT32_MAX);
    OK(dsa_shard_len(&s, INT32_MAX, &n));
    ASSERT_EQ((int64_t)INT32_MAX, n);
    PASS();
}

/* ---- the whole of it -------------------------------------------------------------------------------- */
typedef struct data { float *rows, *keys, *q, *iq, *iw; dsa_type latent, key; } data;

static data data_of(bag *b, dsa_type latent, dsa_type key)
{
    data d;
    d.rows = random_floats(b, LEN * W, 1, 1);
    d.keys = random_floats(b, LEN * D, 2, 1);
    for (int t = 0; t < LEN; t += 3) memcpy(d.keys + t * D, d.keys + t % 60 * D, D * sizeof(float));   /* ties, across all shards */
    d.q = random_floats(b, N_Q * H * W, 3, 1);
    d.iq = random_floats(b, N_Q * HI * D, 4, 1);
    d.iw = random_floats(b, N_Q * HI, 5, 1);
    d.latent = latent;
    d.key = key;
    return d;
}

/* What N_Q queries over `len` rows in n_shards caches choose and return. */
static enum greatest_test_res sharded(bag *b, const dsa_ctx *ctx, const data *d, int64_t len, int32_t n_shards, int32_t block, dsa_order order,
                                      int32_t *indices, float *scores, float *out, float *lse)
{
    dsa_cache latent[MOST], key[MOST];
    dsa_seq seq[MOST];
    const int32_t *part_indices[MOST];
    const float *part_scores[MOST], *outs[MOST], *lses[MOST];
    int32_t *local = ints(b, N_Q * K);
    dsa_merge_topk_args merge;
    dsa_selection chosen;
    size_t bytes = 0;
    for (int32_t p = 0; p < n_shards; p++) {
        dsa_shard s = shard_of(n_shards, p, block);
        dsa_cache_desc dl = desc_of(DSA_LATENT, d->latent, LEN, 16), dk = desc_of(DSA_INDEX_KEY, d->key, LEN, 16);
        dsa_score_args a;
        dsa_selection sel;
        int64_t ks[N_Q], ke[N_Q], n = 0;
        latent[p] = cache_of(b, ctx, &dl);
        key[p] = cache_of(b, ctx, &dk);
        for (int32_t g = 0; g < len; g++)
            if (g / block % n_shards == p) OK(append(ctx, &latent[p], &key[p], 1, d->rows + g * W, d->keys + g * D));
        OK(dsa_shard_len(&s, len, &n));
        ASSERT(latent[p].len == n);
        OK(dsa_shard_ranges(&s, len, N_Q, ks, ke));
        seq[p] = seq_of(&latent[p], &key[p], N_Q);
        memset(&a, 0, sizeof a);
        a.n_seqs = 1;
        a.seqs = &seq[p];
        a.q = d->iq;
        a.w = d->iw;
        a.ks = ks;
        a.ke = ke;
        memset(&sel, 0, sizeof sel);
        sel.indices = ints(b, N_Q * K);
        sel.scores = floats(b, N_Q * K);
        part_indices[p] = sel.indices;
        part_scores[p] = sel.scores;
        OK(score_select(b, ctx, a, &sel));
        OK(dsa_shard_to_global(&s, N_Q * K, sel.indices));
    }
    memset(&merge, 0, sizeof merge);
    merge.n_parts = n_shards;
    merge.k_in = K;
    merge.n_rows = N_Q;
    merge.indices = part_indices;
    merge.scores = part_scores;
    memset(&chosen, 0, sizeof chosen);
    chosen.order = order;
    chosen.indices = indices;
    chosen.scores = scores;
    OK(dsa_merge_topk_workspace(ctx, &merge, &chosen, &bytes));
    merge.workspace = work(b, bytes);
    merge.workspace_size = bytes;
    OK(dsa_merge_topk(ctx, &merge, &chosen));
    for (int32_t p = 0; p < n_shards; p++) {
        dsa_shard s = shard_of(n_shards, p, block);
        dsa_attend_state state = state_of(b, N_Q, H, R);
        dsa_attend_args a;
        float *l = floats(b, N_Q * H);
        OK(dsa_shard_to_local(&s, N_Q * K, indices, local));
        memset(&a, 0, sizeof a);
        a.n_seqs = 1;
        a.seqs = &seq[p];
        a.q = d->q;
        a.indices = local;
        OK(dsa_attend_begin(ctx, &state));
        OK(add(b, ctx, a, &state));
        OK(dsa_attend_partial(ctx, &state, state.out, l));
        outs[p] = state.out;
        lses[p] = l;
    }
    OK(dsa_attend_merge(ctx, n_shards, outs, lses, N_Q, H, R, NULL, out, lse));
    PASS();
}

TEST any_number_of_shards_is_one(dsa_type latent, dsa_type key, int64_t len, int32_t block, dsa_order order)
{
    static const int32_t counts[] = { 1, 2, 3, 4, 8 };
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    data d = data_of(&b, latent, key);
    dsa_cache_desc dl = desc_of(DSA_LATENT, latent, LEN, 0), dk = desc_of(DSA_INDEX_KEY, key, LEN, 0);
    dsa_cache whole = cache_of(&b, &ctx, &dl), keys = cache_of(&b, &ctx, &dk);
    dsa_seq seq = seq_of(&whole, &keys, N_Q);
    dsa_score_args a;
    dsa_selection sel;
    dsa_attend_args at;
    int32_t *indices = ints(&b, N_Q * K);
    float *scores = floats(&b, N_Q * K), *out = floats(&b, N_Q * H * R), *lse = floats(&b, N_Q * H);
    float *one_out = floats(&b, N_Q * H * R), *one_lse = floats(&b, N_Q * H);
    OK(append(&ctx, &whole, &keys, (int32_t)len, d.rows, d.keys));
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &seq;
    a.q = d.iq;
    a.w = d.iw;
    memset(&sel, 0, sizeof sel);
    sel.order = order;
    sel.indices = ints(&b, N_Q * K);
    sel.scores = floats(&b, N_Q * K);
    OK(score_select(&b, &ctx, a, &sel));
    memset(&at, 0, sizeof at);
    at.n_seqs = 1;
    at.seqs = &seq;
    at.q = d.q;
    at.indices = sel.indices;
    OK(attend(&b, &ctx, at, N_Q, H, R, NULL, one_out, one_lse, NULL));
    for (int i = 0; i < 5; i++) {
        int32_t each = block ? block : (int32_t)((len + counts[i] - 1) / counts[i]);
        CHECK_CALL(sharded(&b, &ctx, &d, len, counts[i], each, order, indices, scores, out, lse));
        ASSERT_MEM_EQ(sel.indices, indices, N_Q * K * sizeof *indices);
        ASSERT_MEM_EQ(sel.scores, scores, N_Q * K * sizeof *scores);
        for (int j = 0; j < N_Q * H * R; j++) ASSERT_IN_RANGE(one_out[j], out[j], 1e-6);
        for (int j = 0; j < N_Q * H; j++) ASSERT_IN_RANGE(one_lse[j], lse[j], 1e-6 * (1 + fabs((double)one_lse[j])));
    }
    END(b);
}

SUITE(shards_suite)
{
    if (test_isa == DSA_ISA_SCALAR) {
        CASE("1_by_7", rows_are_dealt_in_blocks, 1, 7);
        CASE("2_by_1", rows_are_dealt_in_blocks, 2, 1);
        CASE("3_by_16", rows_are_dealt_in_blocks, 3, 16);
        CASE("8_by_5", rows_are_dealt_in_blocks, 8, 5);
        CASE("4_pieces", rows_are_dealt_in_blocks, 4, 50);
        RUN_TEST(shards_refuse);
    }
    CASE("f32_pages", any_number_of_shards_is_one, DSA_F32, DSA_F32, LEN, 16, DSA_ORDER_INDEX);
    CASE("f32_pieces", any_number_of_shards_is_one, DSA_F32, DSA_F32, LEN, 0, DSA_ORDER_RANK);
    CASE("fp8_rows", any_number_of_shards_is_one, DSA_FP8, DSA_FP8, LEN, 1, DSA_ORDER_RANK);
    CASE("bf16_int8_pages", any_number_of_shards_is_one, DSA_BF16, DSA_INT8, LEN, 64, DSA_ORDER_INDEX);
    CASE("bf16_short", any_number_of_shards_is_one, DSA_BF16, DSA_BF16, 30, 4, DSA_ORDER_INDEX);   /* fewer rows than k; empty shards */
    CASE("five_rows", any_number_of_shards_is_one, DSA_F32, DSA_FP8, 5, 0, DSA_ORDER_INDEX);
}

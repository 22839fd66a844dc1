/* The 25 faults that the field has made (dsa-spec.md, chapter 10), and the tests that would see each. tests/check.sh holds the names in this
   table against the list of tests.

    1 indexer's RoPE layout     preset_rope_layouts rope_matches_double_half a_layer_matches_plain_attention_glm_indexer
    2 no ReLU                   relu_and_negative_weights a_layer_matches_plain_attention_glm_indexer
    3 un-normalised q_a         a_layer_matches_plain_attention_v32 a_model_matches_transformers_deepseek_v32_small
    4 NaN scores selected       nan_is_never_selected exact_on_scalar_all_nan exact_on_scalar_nan_and_inf
    5 candidate buffer too small  exact_on_long_rows_of_scalar_plateau_at_the_cut exact_on_scalar_one_ulp_apart hostile_keys_are_exact
    6 ties in any order         exact_on_scalar_ties_in_16s exact_on_scalar_relu_plateau threads_do_not_matter_within_a_row
    7 scores outside [ks, ke)   columns_behind_n_cols_are_not_read nan_beyond_the_range_never_leaks
    8 lists of nothing but -1   a_list_of_one_invalid_index_is_empty empty_rows_are_zero_with_infinite_lse
    9 NaN in unused rows        nan_in_unselected_rows_never_leaks unused_memory_does_not_matter
   10 only -1 taken for invalid invalid_indices_are_skipped_everywhere_logical invalid_indices_are_skipped_everywhere_physical
   11 scale read as exponent    any_scale_is_read deepgemm_logits
   12 scale keeps mantissa bits ue8m0_rounds_up pow2_ceil_is_the_least_power quantize_e4m3_matches_the_formula
   13 e4m3fnuz                  e4m3_decodes_every_code e4m3_saturates_and_keeps_nan
   14 planar page read as rows  planar_page_bytes paged_equals_contiguous scales_may_live_elsewhere deepgemm_logits
   15 wrong past k rows         decode_crosses_2048_rows dense_fallback_straddles_top_k
   16 more than two drafts      drafts_of_any_number_see_their_rows any_chunking_gives_the_same_bits
   17 stale shared list         shared_lists_serve_a_layer_without_indexer index_share_pattern
   18 fully masked rows         empty_rows_are_zero_with_infinite_lse attention_list scores_list
   19 score gradient clipped    a_tiny_softmax_keeps_its_gradient scores_visible_blocks
   20 keys not written while short  index_keys_are_written_in_every_mode dense_fallback_straddles_top_k
   21 arguments baked in        decode_crosses_2048_rows
   22 F16 mask, F32 scores      there are no masks: ranges_are_half_open_and_clamped
   23 base of the lse           lse_and_max_of_one_row_are_its_logit merged_partials_are_the_whole
   24 alignment                 unaligned_memory_works_index unaligned_memory_works_latent
   25 missing barriers          memory_is_ordered_around_a_run a_reader_may_run_beside_an_appender (under TSan: make check)

   Behind them, edges that mutation testing (tools/mutate.py) found without a test. */
#include "brute.h"
#include "fixture.h"
#include "ref_layer.h"

/* Fault 11: rows written by others have any f32 scale. 0.3 and 7 lie far from the power of two that their exponents say. */
TEST any_scale_is_read(void)
{
    bag b = { NULL, 0 };
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.dim_latent = 200;
    c.dim_rope = 8;
    c.n_heads = 2;
    c.index_rope_width = DSA_NONE;
    c.precision = DSA_PRECISION_F32;
    c.isa = test_isa;
    OK(dsa_init(&ctx, &c));
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_FP8, 5, 2);
    dsa_cache cache = cache_of(&b, &ctx, &d);
    float *rows = random_floats(&b, 5 * 208, 1, 1), *back = floats(&b, 5 * 208), *q = random_floats(&b, 2 * 208, 2, 0.02f), *out = floats(&b, 400), lse[2], max[2];
    OK(append(&ctx, &cache, NULL, 5, rows, NULL));
    for (int32_t i = 0; i < 5; i++) {
        const float scales[2] = { 0.3f + 0.01f * (float)i, 7.0f };
        memcpy((unsigned char *)cache.data + (size_t)(i / 2) * cache.page_stride + (size_t)(i % 2) * cache.row_stride + 200, scales, 8);
    }
    OK(dsa_cache_read(&ctx, &cache, 0, 5, back));
    for (int32_t i = 0; i < 5; i++)
        for (int32_t j = 0; j < 200; j++) {
            const uint8_t code = ((unsigned char *)cache.data)[(size_t)(i / 2) * cache.page_stride + (size_t)(i % 2) * cache.row_stride + (size_t)j];
            ASSERT_IN_RANGE(ref_from_e4m3(code) * (double)(j < 128 ? 0.3f + 0.01f * (float)i : 7.0f), back[i * 208 + j], 1e-4);
        }
    dsa_seq s = seq_of(&cache, NULL, 1);
    dsa_attend_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &s;
    a.q = q;
    a.what = DSA_ATTEND_VISIBLE;
    a.scale = 0.05f;
    OK(attend(&b, &ctx, a, 1, 2, 200, NULL, out, lse, max));
    const int32_t all[5] = { 0, 1, 2, 3, 4 };
    for (int32_t h = 0; h < 2; h++) {
        double want[200], l, m;
        ref_attend(q + h * 208, back, 208, 200, all, 5, (double)0.05f, -INFINITY, want, &l, &m);
        for (int32_t i = 0; i < 200; i++) WITHIN(1e-4 * (1 + fabs(want[i])), fabs((double)out[h * 200 + i] - want[i]));
        WITHIN(1e-4, fabs((double)lse[h] - l));
    }
    END(b);
}

/* Fault 15, and 21: one sequence grows from 2040 to 2060 rows with k = 2048, by the same argument struct; every step against the formulas. */
TEST decode_crosses_2048_rows(void)
{
    bag b = { NULL, 0 };
    enum { FIRST = 2040, LAST = 2060, HI = 3, D = 16, H = 2, R = 24, W = 32, K = 2048 };
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.n_heads = H;
    c.dim_latent = R;
    c.dim_rope = W - R;
    c.n_index_heads = HI;
    c.dim_index = D;
    c.isa = test_isa;
    OK(dsa_init(&ctx, &c));
    ASSERT_EQ(K, ctx.config.top_k);
    float *rows = random_floats(&b, LAST * W, 1, 1), *keys = random_floats(&b, LAST * D, 2, 1), *q = floats(&b, H * W), *iq = floats(&b, HI * D), iw[HI];
    float *out = floats(&b, H * R), lse[H];
    double *scores = doubles(&b, LAST);
    int32_t *list = ints(&b, K), *want = ints(&b, K);
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, LAST, 64), e = desc_of(DSA_INDEX_KEY, DSA_F32, LAST, 64);
    dsa_cache latent = cache_of(&b, &ctx, &d), index = cache_of(&b, &ctx, &e);
    dsa_seq s = seq_of(&latent, &index, FIRST);
    OK(append(&ctx, &latent, &index, FIRST, rows, keys));
    s.n_q = 1;
    dsa_step_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &s;
    a.q = q;
    a.index_q = iq;
    a.index_w = iw;
    a.out = out;
    a.lse = lse;
    a.indices = list;
    OK(dsa_step_workspace(&ctx, &a, &a.workspace_size));
    a.workspace = work(&b, a.workspace_size);
    for (int32_t len = FIRST + 1; len <= LAST; len++) {
        uint64_t seed = (uint64_t)len * 977;
        for (int32_t i = 0; i < H * W; i++) q[i] = rnd_unit(&seed);
        for (int32_t i = 0; i < HI * D; i++) iq[i] = rnd_unit(&seed);
        for (int32_t i = 0; i < HI; i++) iw[i] = 0.5f + rnd_unit(&seed);
        a.latent = rows + (len - 1) * W;
        a.index_key = keys + (len - 1) * D;
        OK(dsa_step(&ctx, &a));
        ASSERT_EQ_FMT((long)len, (long)latent.len, "%ld");
        int32_t n = 0;
        for (int32_t j = 0; j < len; j++) {
            scores[j] = 0;
            for (int32_t h = 0; h < HI; h++) {
                double dot = 0;
                for (int32_t i = 0; i < D; i++) dot += (double)iq[h * D + i] * (double)keys[j * D + i];
                scores[j] += (double)iw[h] * fmax(dot, 0);
            }
        }
        for (int32_t j = 0; j < len; j++) {                              /* in: fewer than k come before it */
            int32_t before = 0;
            for (int32_t i = 0; i < len && before < K; i++) before += scores[i] > scores[j] || (scores[i] == scores[j] && i < j);
            if (before < K && n < K) want[n++] = j;
        }
        ASSERT_EQ_FMT(len < K ? len : K, n, "%d");
        for (int32_t j = 0; j < K; j++) ASSERT_EQ_FMT(j < n ? want[j] : -1, list[j], "%d");
        for (int32_t h = 0; h < H; h++) {
            double o[R], l, m;
            ref_attend(q + h * W, rows, W, R, want, n, (double)ctx.config.softmax_scale, -INFINITY, o, &l, &m);
            WITHIN(2e-6, max_error(out + h * R, o, R));
        }
    }
    END(b);
}

/* Fault 16: 1 to 7 queries at once, each over exactly its own rows. */
TEST drafts_of_any_number_see_their_rows(void)
{
    bag b = { NULL, 0 };
    model m;
    open_model(&m, small_config());
    enum { T = 40 };
    const int32_t hid = m.ctx.config.dim_hidden;
    float *x = inputs(&m, T, 901), *y = floats(&m.b, T * hid), *z = floats(&m.b, T * hid);
    dsa_cache l, k;
    run_args r = plain;
    r.chunk = 1;
    OK(run(&m, r, T, x, y, NULL, &l, &k));
    for (r.chunk = 2; r.chunk <= 7; r.chunk++) {
        OK(run(&m, r, T, x, z, NULL, &l, &k));
        WITHIN(2e-5, max_error_f(z, y, T * hid));
    }
    bag_free(&m.b);
    END(b);
}

/* Fault 19: a target where the indexer's softmax is e^-60. The exact gradient weight (sigma - p) is -weight p, not 0. */
TEST a_tiny_softmax_keeps_its_gradient(void)
{
    bag b = { NULL, 0 };
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.n_index_heads = 1;
    c.dim_index = 2;
    c.index_rope_width = DSA_NONE;
    c.isa = test_isa;
    OK(dsa_init(&ctx, &c));
    const float keys[4] = { 1, 0, 61, 0 }, q[2] = { 1, 0 }, w = 1, target[2] = { 1, 0 };
    float loss, d_w = 0, d_key[4] = { 0, 0, 0, 0 }, *parts[1] = { d_key };
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, DSA_F32, 2, 0);
    dsa_cache index = cache_of(&b, &ctx, &d);
    OK(append(&ctx, NULL, &index, 2, NULL, keys));
    dsa_seq s = seq_of(NULL, &index, 1);
    dsa_index_backward_args a;
    memset(&a, 0, sizeof a);
    a.set.n_seqs = 1;
    a.set.seqs = &s;
    a.set.what = DSA_ATTEND_VISIBLE;
    a.q = q;
    a.w = &w;
    a.target = target;
    a.stride = 2;
    a.weight = 1;
    a.loss = &loss;
    a.d_w = &d_w;
    a.d_key = parts;
    OK(dsa_index_backward_workspace(&ctx, &a, &a.set.workspace_size));
    a.set.workspace = work(&b, a.set.workspace_size);
    OK(dsa_index_backward(&ctx, &a));
    ASSERT_IN_RANGE(60.0, loss, 1e-4);
    ASSERT_IN_RANGE(60.0, d_w, 1e-4);                                    /* -1 at the score 1, +1 at the score 61 */
    ASSERT_IN_RANGE(-1.0, d_key[0], 1e-6);
    ASSERT_IN_RANGE(1.0, d_key[2], 1e-6);
    END(b);
}

/* Fault 20: dense, window, and sparse with k beyond the length: none looks at index keys, all write them, the same ones. */
TEST index_keys_are_written_in_every_mode(void)
{
    bag b = { NULL, 0 };
    enum { T = 30 };
    float want[T * 64], got[T * 64];
    for (int i = 0; i < 4; i++) {
        model m;
        dsa_config c = small_config();
        dsa_cache l, k;
        run_args r = plain;
        if (i == 1) c.top_k = 64;
        open_model(&m, c);
        r.mode = i == 2 ? DSA_LAYER_DENSE : i == 3 ? DSA_LAYER_WINDOW : DSA_LAYER_SPARSE;
        const int32_t D = m.ctx.config.dim_index;
        ASSERT(D <= 64 && small_config().top_k < T);
        float *y = floats(&m.b, T * m.ctx.config.dim_hidden);
        OK(run(&m, r, T, inputs(&m, T, 902), y, NULL, &l, &k));
        ASSERT_EQ_FMT((long)T, (long)k.len, "%ld");
        OK(dsa_cache_read(&m.ctx, &k, 0, T, i == 0 ? want : got));
        if (i > 0) ASSERT(same_bits(want, got, T * D));
        bag_free(&m.b);
    }
    END(b);
}

/* ---- edges ------------------------------------------------------------------------------------ */

TEST presets_have_their_eps(void)
{
    for (int i = 0; i < 3; i++) {
        const float eps = 1e-6f;                             /* stored: the x87's constants are wider than a float */
        dsa_config c;
        OK(dsa_config_preset((dsa_preset)i, &c));
        ASSERT(c.norm_eps == eps && c.index_norm_eps == eps);
        ASSERT_EQ_FMT(64, c.index_rope_width, "%d");
    }
    PASS();
}

TEST init_empties_the_detail(void)
{
    char why[2] = { 'x', 'y' };
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.detail = why;
    c.detail_size = 1;
    OK(dsa_init(&ctx, &c));
    ASSERT(why[0] == 0 && why[1] == 'y');
    PASS();
}

TEST capacities_at_the_limit(void)
{
    dsa_cache c;
    memset(&c, 0, sizeof c);
    c.page_size = 2;
    c.n_pages = 1073741823;
    ASSERT_EQ(INT64_C(2147483646), dsa_cache_capacity(&c));
    c.n_pages = 1073741824;
    ASSERT_EQ(INT64_C(2147483647), dsa_cache_capacity(&c));
    PASS();
}

TEST views_by_hand(void)
{
    dsa_ctx ctx;
    float memory[64], scales[8];
    OK(dsa_init(&ctx, NULL));
    dsa_cache c;
    memset(&c, 0, sizeof c);
    c.kind = DSA_INDEX_KEY;
    c.format = DSA_FP8;
    c.dim = 16;
    c.page_size = 4;
    c.n_pages = 1;
    c.data = memory;
    c.scales = scales;                                                    /* a stride that no second page needs may be 0 */
    OK(dsa_cache_check(&ctx, &c));
    c.n_pages = 2;
    c.page_stride = 64;
    IS(DSA_ERR_SHAPE, dsa_cache_check(&ctx, &c));
    c.scale_page_stride = 15;
    IS(DSA_ERR_SHAPE, dsa_cache_check(&ctx, &c));
    c.scale_page_stride = 16;
    OK(dsa_cache_check(&ctx, &c));
    c.n_pages = 0;
    c.data = NULL;                                                        /* no pages, no rows, no memory */
    OK(dsa_cache_check(&ctx, &c));
    PASS();
}

TEST appends_say_what_is_wrong(void)
{
    bag b = { NULL, 0 };
    char why[100] = "";
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.dim_latent = 8;
    c.dim_rope = 4;
    c.n_heads = 1;
    c.dim_index = 8;
    c.detail = why;
    c.detail_size = sizeof why;
    OK(dsa_init(&ctx, &c));
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, 4, 0);
    dsa_cache wide, index;
    float x[64] = { 0 };
    d.dim_rope = 6;
    wide = cache_of(&b, &ctx, &d);
    IS(DSA_ERR_FORMAT, append(&ctx, &wide, NULL, 1, x, NULL));
    d = desc_of(DSA_INDEX_KEY, DSA_F32, 4, 0);
    index = cache_of(&b, &ctx, &d);
    IS(DSA_ERR_NULL, append(&ctx, NULL, &index, 1, x, x));
    ASSERT(strstr(why, "latent") != NULL);
    d = desc_of(DSA_LATENT, DSA_F32, 4, 0);
    wide = cache_of(&b, &ctx, &d);
    IS(DSA_ERR_NULL, append(&ctx, &wide, NULL, 1, x, x));
    ASSERT(strstr(why, "index") != NULL);
    END(b);
}

/* One row is enough for a missing pointer to be an error; no row at all never is. */
TEST pointers_of_one_row_and_none(void)
{
    bag b = { NULL, 0 };
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.dim_index = 8;
    c.n_index_heads = 1;
    c.index_rope_width = DSA_NONE;
    c.top_k = 2;
    OK(dsa_init(&ctx, &c));
    float x[16] = { 1, 2, 3, 4, 5, 6, 7, 8, 8, 7, 6, 5, 4, 3, 2, 1 };
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, DSA_F32, 2, 0);
    dsa_cache index = cache_of(&b, &ctx, &d);
    OK(append(&ctx, NULL, &index, 2, NULL, x));
    dsa_seq s = seq_of(NULL, &index, 1);
    dsa_score_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &s;
    a.w = x;
    OK(dsa_score_workspace(&ctx, &a, &a.workspace_size));
    a.workspace = work(&b, a.workspace_size);
    float scores[2] = { 9, 9 };
    IS(DSA_ERR_NULL, dsa_score(&ctx, &a, scores, 2, 2));
    a.q = x;
    OK(dsa_score(&ctx, &a, scores, 0, 2));                                /* no column: nothing is written */
    ASSERT(scores[0] == 9 && scores[1] == 9);

    const int32_t one[1] = { 0 }, *lists[1] = { one };
    const float high[1] = { 1 }, *with[1] = { high };
    dsa_merge_topk_args merge;
    dsa_selection out;
    memset(&merge, 0, sizeof merge);
    memset(&out, 0, sizeof out);
    merge.n_parts = merge.k_in = 1;
    merge.n_rows = 1;
    merge.indices = lists;
    merge.scores = with;
    OK(dsa_merge_topk_workspace(&ctx, &merge, &out, &merge.workspace_size));
    merge.workspace = work(&b, merge.workspace_size);
    IS(DSA_ERR_NULL, dsa_merge_topk(&ctx, &merge, &out));

    dsa_attend_state state;
    memset(&state, 0, sizeof state);
    OK(dsa_attend_finish(&ctx, &state, NULL, NULL, NULL, NULL));
    END(b);
}

TEST ranges_that_end_at_the_start(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx;
    OK(dsa_init(&ctx, NULL));
    const float scores[12] = { 3, 2, 1, 3, 2, 1, 3, 2, 1, 3, 2, 1 };
    const int64_t ks[4] = { 0, 0, -5, 0 }, ke[4] = { 0, -3, 1, 2 };
    int32_t list[8], n[4];
    dsa_select_args a;
    dsa_selection out;
    memset(&a, 0, sizeof a);
    memset(&out, 0, sizeof out);
    a.n_rows = 4;
    a.scores = scores;
    a.n_cols = a.stride = 3;
    a.ks = ks;
    a.ke = ke;
    out.top_k = 2;
    out.indices = list;
    out.counts = n;
    OK(dsa_select_workspace(&ctx, &a, &out, &a.workspace_size));
    a.workspace = work(&b, a.workspace_size);
    OK(dsa_select(&ctx, &a, &out));
    ASSERT(n[0] == 0 && n[1] == 0 && n[2] == 1 && n[3] == 2);
    ASSERT(list[0] == -1 && list[2] == -1 && list[4] == 0 && list[5] == -1 && list[6] == 0 && list[7] == 1);
    END(b);
}

TEST small_backward_calls(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx;
    OK(dsa_init(&ctx, NULL));
    float x = 3, dy = 2, gain = 1, dx = 0, d_gain = 0, d_bias = 0;
    OK(dsa_layer_norm_backward(&x, &dy, 1, 1, 1, &gain, 1e-6f, &dx, &d_gain, &d_bias));
    ASSERT(dx == 0 && d_gain == 0 && d_bias == 2);
    dsa_linear_args a;
    memset(&a, 0, sizeof a);
    a.n_rows = a.dim_in = a.dim_out = 1;
    a.x = &x;
    a.y = &dy;
    OK(dsa_linear_workspace(&ctx, &a, &a.workspace_size));
    a.workspace = work(&b, a.workspace_size);
    IS(DSA_ERR_NULL, dsa_linear(&ctx, &a));                               /* no weight */
    dsa_config c;
    dsa_index_backward_args back;
    size_t bytes;
    memset(&c, 0, sizeof c);
    memset(&back, 0, sizeof back);
    c.n_index_heads = DSA_NONE;                                           /* heads of a call of dsa_score only: nothing to differentiate */
    back.d_scores = &x;
    back.set.what = DSA_ATTEND_VISIBLE;
    OK(dsa_init(&ctx, &c));
    IS(DSA_ERR_SHAPE, dsa_index_backward_workspace(&ctx, &back, &bytes));
    END(b);
}

/* The indexer's backward over keys in another format is that over the same keys in F32: rounding is passed straight through. With more
   keys than one block holds, too, and against the formulas in double. */
TEST backward_over_rounded_keys(dsa_type format, dsa_hadamard hadamard, int32_t len)
{
    bag b = { NULL, 0 };
    enum { HI = 3, D = 32, N = 2 };
    dsa_config c;
    dsa_ctx ctx, plain_ctx;
    memset(&c, 0, sizeof c);
    c.n_index_heads = HI;
    c.dim_index = D;
    c.index_rope_width = DSA_NONE;
    c.hadamard = hadamard;
    c.isa = test_isa;
    OK(dsa_init(&ctx, &c));
    c.hadamard = DSA_HADAMARD_OFF;
    OK(dsa_init(&plain_ctx, &c));
    float *keys = random_floats(&b, (int64_t)len * D, 1, 1), *real = floats(&b, (int64_t)len * D), *q = random_floats(&b, N * HI * D, 2, 1);
    float *w = random_floats(&b, N * HI, 3, 1), *g = random_floats(&b, (int64_t)N * len, 4, 1), *d_q = floats(&b, N * HI * D), d_w[N * HI];
    float *d_k = floats(&b, (int64_t)len * D), *parts[1] = { d_k };
    double *want_q = doubles(&b, N * HI * D), want_w[N * HI] = { 0 }, *want_k = doubles(&b, (int64_t)len * D), most = 0;
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, format, len, 24);
    dsa_cache index = cache_of(&b, &ctx, &d);
    OK(append(&ctx, NULL, &index, len, NULL, keys));
    OK(dsa_cache_read(&ctx, &index, 0, len, real));
    if (index.hadamard) OK(dsa_hadamard_rows(real, len, D, D));
    dsa_seq s = seq_of(NULL, &index, N);
    dsa_index_backward_args a;
    memset(&a, 0, sizeof a);
    memset(d_q, 0, N * HI * D * sizeof *d_q);
    memset(d_w, 0, sizeof d_w);
    memset(d_k, 0, (size_t)len * D * sizeof *d_k);
    memset(want_q, 0, N * HI * D * sizeof *want_q);
    memset(want_k, 0, (size_t)len * D * sizeof *want_k);
    a.set.n_seqs = 1;
    a.set.seqs = &s;
    a.set.what = DSA_ATTEND_VISIBLE;
    a.q = q;
    a.w = w;
    a.d_scores = g;
    a.stride = len;
    a.d_q = d_q;
    a.d_w = d_w;
    a.d_key = parts;
    OK(dsa_index_backward_workspace(&ctx, &a, &a.set.workspace_size));
    a.set.workspace = work(&b, a.set.workspace_size);
    OK(dsa_index_backward(&ctx, &a));
    for (int32_t t = 0; t < N; t++)
        for (int32_t j = 0; j < len - N + t + 1; j++)
            for (int32_t h = 0; h < HI; h++) {
                double dot = 0, u;
                const float *qh = q + (t * HI + h) * D, *k = real + (int64_t)j * D;
                for (int32_t i = 0; i < D; i++) dot += (double)qh[i] * (double)k[i];
                if (dot <= 0) continue;
                want_w[t * HI + h] += (double)g[t * len + j] * dot;
                u = (double)g[t * len + j] * (double)w[t * HI + h];
                for (int32_t i = 0; i < D; i++) {
                    want_q[(t * HI + h) * D + i] += u * (double)k[i];
                    want_k[(int64_t)j * D + i] += u * (double)qh[i];
                }
            }
    for (int32_t i = 0; i < N * HI; i++) most = fmax(most, fabs(want_w[i]));
    for (int32_t i = 0; i < N * HI; i++) WITHIN(1e-5 * most, fabs((double)d_w[i] - want_w[i]));
    for (int32_t i = 0; i < N * HI * D; i++) WITHIN(1e-5 * most, fabs((double)d_q[i] - want_q[i]));
    for (int64_t i = 0; i < (int64_t)len * D; i++) WITHIN(3e-5, fabs((double)d_k[i] - want_k[i]));
    END(b);
}

/* F32 rows at an odd address are expanded instead of read in place. */
TEST backward_over_unaligned_rows(void)
{
    bag b = { NULL, 0 };
    enum { T = 9, H = 2, R = 6, W = 8 };
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.n_heads = H;
    c.dim_latent = R;
    c.dim_rope = W - R;
    c.index_rope_width = DSA_NONE;
    c.isa = test_isa;
    OK(dsa_init(&ctx, &c));
    float *rows = random_floats(&b, T * W, 1, 1), *q = random_floats(&b, H * W, 2, 1), *dy = random_floats(&b, H * R, 3, 1), out[H * R], lse[H];
    float d_q[2][H * W], d_kv[2][T * W], *parts[1];
    memset(d_q, 0, sizeof d_q);
    memset(d_kv, 0, sizeof d_kv);
    for (int i = 0; i < 2; i++) {
        dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, T, 0);
        dsa_cache cache;
        OK(dsa_cache_init(&ctx, &d, (char *)bag_alloc(&b, T * W * 4 + 1) + i, T * W * 4, &cache));
        OK(append(&ctx, &cache, NULL, T, rows, NULL));
        dsa_seq s = seq_of(&cache, NULL, 1);
        dsa_attend_backward_args a;
        memset(&a, 0, sizeof a);
        a.attend.n_seqs = 1;
        a.attend.seqs = &s;
        a.attend.q = q;
        a.attend.what = DSA_ATTEND_VISIBLE;
        OK(attend(&b, &ctx, a.attend, 1, H, R, NULL, out, lse, NULL));
        parts[0] = d_kv[i];
        a.out = out;
        a.lse = lse;
        a.d_out = dy;
        a.d_q = d_q[i];
        a.d_latent = parts;
        OK(dsa_attend_backward_workspace(&ctx, &a, &a.attend.workspace_size));
        a.attend.workspace = work(&b, a.attend.workspace_size);
        OK(dsa_attend_backward(&ctx, &a));
        parts[0] = NULL;                                                  /* the first sequence's gradient array is looked at, too */
        IS(DSA_ERR_NULL, dsa_attend_backward(&ctx, &a));
    }
    ASSERT(same_bits(d_q[0], d_q[1], H * W) && same_bits(d_kv[0], d_kv[1], T * W));
    END(b);
}

TEST a_layer_without_indexer_has_no_loss(void)
{
    model m;
    enum { T = 12 };
    dsa_layer_grads grads;
    dsa_cache l, k;
    float loss[T];
    run_args r = plain;
    open_model(&m, small_config());
    memset(&grads, 0, sizeof grads);
    m.lw.index_q_b.data = m.lw.index_k.data = m.lw.index_k_norm.data = m.lw.index_k_bias.data = m.lw.index_w.data = NULL;
    r.mode = DSA_LAYER_DENSE;
    const int32_t hid = m.ctx.config.dim_hidden;
    float *x = inputs(&m, T, 903), *y = floats(&m.b, T * hid);
    OK(run(&m, r, T, x, y, NULL, &l, &k));
    for (int i = 0; i < T; i++) loss[i] = 5;
    dsa_seq s = seq_of(&l, NULL, T);
    dsa_layer_backward_args a;
    memset(&a, 0, sizeof a);
    a.layer.weights = &m.lw;
    a.layer.n_seqs = 1;
    a.layer.seqs = &s;
    a.layer.x = x;
    a.layer.mode = DSA_LAYER_DENSE;
    a.d_y = y;
    a.grads = &grads;
    a.index_weight = 1;
    a.index_loss = loss;
    OK(dsa_layer_backward_workspace(&m.ctx, &a, &a.layer.workspace_size));
    a.layer.workspace = work(&m.b, a.layer.workspace_size);
    OK(dsa_layer_backward(&m.ctx, &a));
    for (int i = 0; i < T; i++) ASSERT(loss[i] == 0);
    END(m.b);
}

SUITE(faults_suite)
{
    RUN_TEST(any_scale_is_read);
    RUN_TEST(decode_crosses_2048_rows);
    RUN_TEST(drafts_of_any_number_see_their_rows);
    RUN_TEST(a_tiny_softmax_keeps_its_gradient);
    RUN_TEST(index_keys_are_written_in_every_mode);
    RUN_TEST(presets_have_their_eps);
    RUN_TEST(init_empties_the_detail);
    RUN_TEST(capacities_at_the_limit);
    RUN_TEST(views_by_hand);
    RUN_TEST(appends_say_what_is_wrong);
    RUN_TEST(pointers_of_one_row_and_none);
    RUN_TEST(ranges_that_end_at_the_start);
    RUN_TEST(small_backward_calls);
    CASE("fp8", backward_over_rounded_keys, DSA_FP8, DSA_HADAMARD_AUTO, 50);
    CASE("fp8_plain", backward_over_rounded_keys, DSA_FP8, DSA_HADAMARD_OFF, 50);
    CASE("int8", backward_over_rounded_keys, DSA_INT8, DSA_HADAMARD_AUTO, 50);
    CASE("bf16", backward_over_rounded_keys, DSA_BF16, DSA_HADAMARD_OFF, 50);
    CASE("f32_blocks", backward_over_rounded_keys, DSA_F32, DSA_HADAMARD_OFF, 2100);
    CASE("fp8_blocks", backward_over_rounded_keys, DSA_FP8, DSA_HADAMARD_AUTO, 2100);
    RUN_TEST(backward_over_unaligned_rows);
    RUN_TEST(a_layer_without_indexer_has_no_loss);
}

/* The layer against multi-head attention written out in double without absorption, and its promises: any chunking, shared lists,
   replay, dense and window modes, every weight type, the gemm hook. */
#include "ref_layer.h"

/* ---- against the reference ---------------------------------------------------------------------------------------------------- */
/* The lists are a top-k of the reference's scores up to rounding, the outputs are the reference's over these lists. */
static enum greatest_test_res check(model *m, int32_t T, const int64_t *positions)
{
    const dsa_config *c = &m->ctx.config;
    const int32_t hid = c->dim_hidden, k = c->top_k;
    float *x = inputs(m, T, 200), *y = floats(&m->b, T * hid), *back = floats(&m->b, T * c->dim_index);
    int32_t *lists = ints(&m->b, T * k);
    double *want = doubles(&m->b, T * hid), *scores = doubles(&m->b, T * T), *keys = doubles(&m->b, T * c->dim_index);
    dsa_cache latent, index;
    run_args r = plain;
    r.positions = positions;
    OK(run(m, r, T, x, y, lists, &latent, &index));
    ref_layer(&m->b, c, &m->w, T, x, positions, lists, 0, want, scores, keys, NULL, NULL);
    WITHIN(1e-5, max_error(y, want, T * hid));
    OK(dsa_cache_read(&m->ctx, &index, 0, T, back));
    WITHIN(1e-5, max_error(back, keys, T * c->dim_index));
    for (int32_t t = 0; t < T; t++) {
        const int32_t *list = lists + t * k, n = t + 1 < k ? t + 1 : k;
        double worst_in = INFINITY, best_out = -INFINITY;
        for (int32_t j = 0; j < k; j++) {
            if (j >= n) { ASSERT_EQ_FMT(-1, list[j], "%d"); continue; }
            ASSERT(list[j] >= 0 && list[j] <= t && (j == 0 || list[j] > list[j - 1]));
            worst_in = fmin(worst_in, scores[t * T + list[j]]);
        }
        for (int32_t s = 0, j = 0; s <= t; s++) {
            if (j < n && list[j] == s) { j++; continue; }
            best_out = fmax(best_out, scores[t * T + s]);
        }
        ASSERT(worst_in >= best_out - 1e-5);
    }
    return GREATEST_TEST_RES_PASS;
}
typedef struct variant { const char *name; dsa_config c; } variant;
static void variants(variant *v)
{
    for (int i = 0; i < 8; i++) v[i].c = small_config();
    v[0].name = "v32";
    v[1].name = "glm_indexer";
    v[1].c.index_rope_interleaved = 1;
    v[2].name = "half_split_main";
    v[2].c.rope_layout = DSA_ROPE_HALF;
    v[3].name = "index_rope_behind";
    v[3].c.index_rope_offset = 6;
    v[3].c.index_rope_width = 10;
    v[3].c.index_rope_interleaved = 1;
    v[4].name = "yarn";
    v[4].c.rope_factor = 40;
    v[4].c.rope_original_context = 64;
    v[4].c.rope_theta = 1000;
    v[5].name = "no_rope";
    v[5].c.dim_rope = DSA_NONE;
    v[5].c.index_rope_width = DSA_NONE;
    v[6].name = "eps_and_no_mscale";
    v[6].c.norm_eps = 0.05f;
    v[6].c.index_norm_eps = 0.03f;
    v[6].c.rope_factor = 4;
    v[6].c.mscale = (float)DSA_NONE;
    v[7].name = "wide";
    v[7].c.dim_latent = 130;
    v[7].c.n_heads = 1;
    v[7].c.top_k = 33;
    v[7].c.dim_v = 30;
}

TEST a_layer_matches_plain_attention(const variant *v)
{
    model m;
    open_model(&m, v->c);
    CHECK_CALL(check(&m, 45, NULL));
    END(m.b);
}

TEST positions_are_rope_positions(void)
{
    model m;
    int64_t far[45], rows[45];
    for (int i = 0; i < 45; i++) { far[i] = 1000 + 3 * i; rows[i] = i; }
    open_model(&m, small_config());
    CHECK_CALL(check(&m, 45, far));
    /* the default is the row number */
    float *x = inputs(&m, 45, 201), *y = floats(&m.b, 45 * 48), *z = floats(&m.b, 45 * 48);
    dsa_cache l, k;
    run_args r = plain;
    OK(run(&m, r, 45, x, y, NULL, &l, &k));
    r.positions = rows;
    OK(run(&m, r, 45, x, z, NULL, &l, &k));
    ASSERT(same_bits(y, z, 45 * 48));
    r.chunk = 7;
    r.positions = NULL;
    OK(run(&m, r, 45, x, z, NULL, &l, &k));
    ASSERT(same_bits(y, z, 45 * 48));
    END(m.b);
}

TEST the_latent_cache_holds_normed_latent_and_rotated_key(void)
{
    model m;
    open_model(&m, small_config());
    enum { T = 9 };
    float *x = inputs(&m, T, 202), *y = floats(&m.b, T * 48), back[T * 28];
    dsa_cache l, k;
    OK(run(&m, plain, T, x, y, NULL, &l, &k));
    OK(dsa_cache_read(&m.ctx, &l, 0, T, back));
    for (int t = 0; t < T; t++) {
        double h[48], kv[28];
        for (int i = 0; i < 48; i++) h[i] = (double)x[t * 48 + i];
        matvec(m.w.kv_a, 28, 48, h, kv);
        rms(kv, 20, m.w.kv_a_norm, 1e-6);
        rotate(kv + 20, 8, 0, t, &m.ctx.config);      /* interleaved, in place: FlashMLA's bytes, not HF's */
        WITHIN(1e-5, max_error(back + 28 * t, kv, 28));
    }
    END(m.b);
}

TEST dense_and_window_modes_match(dsa_layer_mode mode)
{
    model m;
    open_model(&m, small_config());
    enum { T = 45 };
    float *x = inputs(&m, T, 203), *y = floats(&m.b, T * 48);
    double *want = doubles(&m.b, T * 48);
    dsa_cache l, k;
    run_args r = plain;
    r.mode = mode;
    OK(run(&m, r, T, x, y, NULL, &l, &k));
    ref_layer(&m.b, &m.ctx.config, &m.w, T, x, NULL, NULL, mode == DSA_LAYER_WINDOW, want, NULL, NULL, NULL, NULL);
    WITHIN(1e-5, max_error(y, want, T * 48));
    float *z = floats(&m.b, T * 48);
    r.chunk = 1;
    OK(run(&m, r, T, x, z, NULL, &l, &k));
    ASSERT(same_bits(y, z, T * 48));
    END(m.b);
}

/* A chunk straddles top_k: the rows up to it take everything, and the index keys are written all along. */
TEST dense_fallback_straddles_top_k(void)
{
    model m;
    open_model(&m, small_config());
    enum { T = 25, K = 10 };
    float *x = inputs(&m, T, 204), *y = floats(&m.b, T * 48), *z = floats(&m.b, T * 48), *back = floats(&m.b, T * 16);
    int32_t lists[T * K];
    double *keys = doubles(&m.b, T * 16), *want = doubles(&m.b, T * 48);
    dsa_cache l, k;
    run_args r = plain;
    r.chunk = 8;                                      /* rows 8 .. 15 straddle */
    OK(run(&m, r, T, x, y, lists, &l, &k));
    for (int t = 0; t < K; t++)
        for (int j = 0; j < K; j++) ASSERT_EQ_FMT(j <= t ? j : -1, lists[t * K + j], "%d");
    ref_layer(&m.b, &m.ctx.config, &m.w, T, x, NULL, lists, 0, want, NULL, keys, NULL, NULL);
    ASSERT_EQ_FMT((long long)T, (long long)k.len, "%lld");
    OK(dsa_cache_read(&m.ctx, &k, 0, T, back));
    WITHIN(1e-5, max_error(back, keys, T * 16));
    r.mode = DSA_LAYER_DENSE;                         /* up to top_k rows sparse is dense, bit for bit */
    OK(run(&m, r, T, x, z, NULL, &l, &k));
    ASSERT(same_bits(y, z, K * 48));
    ASSERT_FALSE(same_bits(y, z, T * 48));
    ASSERT_EQ_FMT((long long)T, (long long)k.len, "%lld");   /* and dense layers keep the index cache up too */
    END(m.b);
}

/* ---- lists from elsewhere ------------------------------------------------------------------------------------------------------ */
TEST shared_lists_serve_a_layer_without_indexer(void)
{
    model m;
    open_model(&m, small_config());
    enum { T = 45, K = 10 };
    float *x = inputs(&m, T, 205), *y = floats(&m.b, T * 48);
    int32_t lists[T * K], used[T * K];
    uint64_t seed = 4;
    for (int t = 0; t < T; t++)                       /* somebody else's choice: every third row, its own always */
        for (int j = 0; j < K; j++) lists[t * K + j] = j == 0 ? t : 3 * j - 3 + (t % 3) <= t ? 3 * j - 3 + (t % 3) : -1 - rnd_below(&seed, 50);
    for (int t = 0; t < T; t++) for (int j = 1; j < K; j++) if (lists[t * K + j] == t) lists[t * K + j] = -1;
    double *want = doubles(&m.b, T * 48);
    m.lw.index_q_b.data = m.lw.index_k.data = m.lw.index_k_norm.data = m.lw.index_k_bias.data = m.lw.index_w.data = NULL;
    dsa_cache l = new_cache(&m, DSA_LATENT, DSA_F32, T, 8);
    for (int t = 0; t < T; t += 15) {
        dsa_seq s = seq_of(&l, NULL, 15);
        dsa_layer_args a;
        memset(&a, 0, sizeof a);
        a.weights = &m.lw;
        a.n_seqs = 1;
        a.seqs = &s;
        a.x = x + t * 48;
        a.y = y + t * 48;
        a.indices_in = lists + t * K;
        a.indices_out = used + t * K;
        OK(layer(&m.b, &m.ctx, a));
    }
    ref_layer(&m.b, &m.ctx.config, &m.w, T, x, NULL, lists, 0, want, NULL, NULL, NULL, NULL);
    WITHIN(1e-5, max_error(y, want, T * 48));
    ASSERT(same_bits(lists, used, T * K));
    END(m.b);
}

TEST record_and_replay(dsa_type latent, dsa_type index)
{
    model m;
    open_model(&m, small_config());
    enum { T = 45, K = 10 };
    float *x = inputs(&m, T, 206), *y = floats(&m.b, T * 48), *z = floats(&m.b, T * 48), *k0 = floats(&m.b, T * 16), *k1 = floats(&m.b, T * 16);
    int32_t lists[T * K], again[T * K];
    dsa_cache l, k;
    run_args r = plain;
    r.latent = latent;
    r.index = index;
    OK(run(&m, r, T, x, y, lists, &l, &k));
    OK(dsa_cache_read(&m.ctx, &k, 0, T, k0));
    r.lists = lists;
    r.chunk = 11;
    OK(run(&m, r, T, x, z, again, &l, &k));
    OK(dsa_cache_read(&m.ctx, &k, 0, T, k1));
    ASSERT(same_bits(y, z, T * 48));
    ASSERT(same_bits(lists, again, T * K));
    ASSERT_EQ_FMT((long long)T, (long long)k.len, "%lld");   /* replayed, yet the index keys are written */
    ASSERT(same_bits(k0, k1, T * 16));
    END(m.b);
}

/* Given lists may look ahead, at rows of the same chunk, of the same tile or of later calls: such entries are skipped like any
   invalid one, or else the result would depend on what happened to be there already. */
TEST lists_that_look_ahead(dsa_type latent, dsa_layer_mode mode)
{
    model m;
    open_model(&m, small_config());
    enum { T = 70, K = 10 };
    const int32_t chunks[5] = { 1, 2, 13, 32, 33 };
    float *x = inputs(&m, T, 208), *y = floats(&m.b, T * 48), *z = floats(&m.b, T * 48);
    int32_t lists[T * K], behind[T * K], used[T * K];
    int ahead = 0;
    dsa_cache l, k;
    run_args r = plain;
    r.latent = latent;
    r.mode = mode;
    for (int t = 0; t < T; t++)
        for (int j = 0; j < K; j++) {
            int32_t s = t % 5 == 0 ? t + j - 1 : (t + 9 * j) % T;
            lists[t * K + j] = s;
            behind[t * K + j] = s <= t ? s : -1;
            ahead += s > t;
        }
    ASSERT(ahead > T);
    r.lists = behind;
    OK(run(&m, r, T, x, y, NULL, &l, &k));
    r.lists = lists;
    for (int i = 0; i < T * K; i++) used[i] = -77;
    OK(run(&m, r, T, x, z, used, &l, &k));
    ASSERT(same_bits(y, z, T * 48));
    for (int i = 0; i < T * K; i++) ASSERT_EQ_FMT(mode == DSA_LAYER_SPARSE ? lists[i] : -77, used[i], "%d");    /* handed on, if used */
    for (int i = 0; i < 5; i++) {
        size_t keep = m.b.n;
        r.chunk = chunks[i];
        OK(run(&m, r, T, x, z, NULL, &l, &k));
        ASSERT(same_bits(y, z, T * 48));
        bag_shrink(&m.b, keep);
    }
    END(m.b);
}

/* ---- the same bits -------------------------------------------------------------------------------------------------------------- */
typedef struct cache_kind { const char *name; dsa_type latent, index; int32_t page; } cache_kind;
static const cache_kind cache_kinds[] = { { "f32", DSA_F32, DSA_F32, 0 }, { "bf16", DSA_BF16, DSA_BF16, 16 }, { "fp8", DSA_FP8, DSA_FP8, 4 }, { "fp8_int8", DSA_FP8, DSA_INT8, 0 } };

TEST any_chunking_gives_the_same_bits(const cache_kind *f)
{
    model m;
    open_model(&m, small_config());
    enum { T = 75, K = 10 };
    const int32_t chunks[6] = { 1, 2, 7, 31, 32, 33 };   /* around the tile of 32 */
    float *x = inputs(&m, T, 207), *y = floats(&m.b, T * 48), *z = floats(&m.b, T * 48);
    int32_t lists[T * K], other[T * K];
    dsa_cache l, k;
    run_args r = plain;
    r.latent = f->latent;
    r.index = f->index;
    r.page = f->page;
    OK(run(&m, r, T, x, y, lists, &l, &k));
    for (int i = 0; i < 6; i++) {
        size_t keep = m.b.n;
        r.chunk = chunks[i];
        r.page = i % 2 ? 0 : f->page;                 /* nor does paging matter */
        OK(run(&m, r, T, x, z, other, &l, &k));
        ASSERT(same_bits(lists, other, T * K));
        ASSERT(same_bits(y, z, T * 48));
        bag_shrink(&m.b, keep);
    }
    END(m.b);
}

TEST a_ragged_batch_is_its_sequences(const cache_kind *f)
{
    model m;
    open_model(&m, small_config());
    enum { K = 10, ROWS = 43 };
    const int32_t old[4] = { 0, 30, 5, 12 }, n[4] = { 35, 1, 7, 0 };   /* prefill, decode, drafts, idle */
    dsa_cache l[4], k[4], l1[4], k1[4];
    dsa_seq s[4];
    float *x = inputs(&m, ROWS, 208), *y = floats(&m.b, ROWS * 48), *z = floats(&m.b, ROWS * 48), *skip = floats(&m.b, 30 * 48);
    int32_t lists[ROWS * K], other[ROWS * K];
    dsa_layer_args a;
    memset(&a, 0, sizeof a);
    a.weights = &m.lw;
    a.n_seqs = 1;
    for (int i = 0, row = 0; i < 4; row += n[i], i++) {
        l[i] = new_cache(&m, DSA_LATENT, f->latent, 40, f->page);
        k[i] = new_cache(&m, DSA_INDEX_KEY, f->index, 40, f->page);
        l1[i] = new_cache(&m, DSA_LATENT, f->latent, 40, f->page);
        k1[i] = new_cache(&m, DSA_INDEX_KEY, f->index, 40, f->page);
        float *past = inputs(&m, old[i], (uint64_t)(300 + i));
        dsa_seq one = seq_of(&l[i], &k[i], old[i]), two = seq_of(&l1[i], &k1[i], old[i]);
        a.x = past;
        a.y = skip;
        a.seqs = &one;
        if (old[i] > 0) OK(layer(&m.b, &m.ctx, a));
        a.seqs = &two;
        if (old[i] > 0) OK(layer(&m.b, &m.ctx, a));
        two.n_q = n[i];
        a.x = x + row * 48;
        a.y = z + row * 48;
        a.indices_out = other + row * K;
        if (n[i] > 0) OK(layer(&m.b, &m.ctx, a));
        a.indices_out = NULL;
        s[i] = seq_of(&l[i], &k[i], n[i]);
    }
    a.n_seqs = 4;
    a.seqs = s;
    a.x = x;
    a.y = y;
    a.indices_out = lists;
    OK(layer(&m.b, &m.ctx, a));
    ASSERT(same_bits(lists, other, ROWS * K));
    ASSERT(same_bits(y, z, ROWS * 48));
    for (int i = 0; i < 4; i++) ASSERT_EQ_FMT((long long)(old[i] + n[i]), (long long)l[i].len, "%lld");
    END(m.b);
}

TEST threads_change_no_bit(dsa_layer_mode mode)
{
    model m;
    open_model(&m, small_config());
    enum { T = 45 };
    const int32_t threads[3] = { 2, 3, 8 };
    float *x = inputs(&m, T, 209), *y = floats(&m.b, T * 48), *z = floats(&m.b, T * 48);
    dsa_cache l, k;
    dsa_ctx one = m.ctx;
    run_args r = plain;
    r.mode = mode;
    r.latent = DSA_FP8;
    r.index = DSA_FP8;
    OK(run(&m, r, T, x, y, NULL, &l, &k));
    for (int t = 0; t < 3; t++) {
        backwards b;
        m.ctx = with_threads(&one, &b, threads[t]);
        r.chunk = t == 1 ? 1 : 0;
        OK(run(&m, r, T, x, z, NULL, &l, &k));
        ASSERT_FALSE(b.broken);
        ASSERT(same_bits(y, z, T * 48));
    }
    END(m.b);
}

/* ---- weights ---------------------------------------------------------------------------------------------------------------------- */
/* Rounds the f32 array in place to what the 16-bit tensor holds and returns that tensor, at an odd address. */
static dsa_tensor narrow(bag *b, float *w, int64_t n, dsa_type type)
{
    unsigned char *data = (unsigned char *)bag_alloc(b, (size_t)n * 2 + 1) + 1;
    for (int64_t i = 0; i < n; i++) {
        uint16_t h = type == DSA_BF16 ? dsa_f32_to_bf16(w[i]) : dsa_f32_to_f16(w[i]);
        memcpy(data + 2 * i, &h, 2);
        w[i] = type == DSA_BF16 ? dsa_bf16_to_f32(h) : dsa_f16_to_f32(h);
    }
    dsa_tensor t = f32_of(NULL);
    t.data = data;
    t.type = type;
    return t;
}

TEST half_precision_weights_are_their_values(dsa_type type)
{
    model m;
    open_model(&m, small_config());
    enum { T = 40 };
    float *x = inputs(&m, T, 210), *y = floats(&m.b, T * 48), *z = floats(&m.b, T * 48);
    dsa_cache l, k;
    dsa_layer_weights lw;
    lw.q_a = narrow(&m.b, m.w.q_a, 24 * 48, type);
    lw.q_a_norm = narrow(&m.b, m.w.q_a_norm, 24, type);
    lw.q_b = narrow(&m.b, m.w.q_b, 60 * 24, type);
    lw.kv_a = narrow(&m.b, m.w.kv_a, 28 * 48, type);
    lw.kv_a_norm = narrow(&m.b, m.w.kv_a_norm, 20, type);
    lw.kv_b = narrow(&m.b, m.w.kv_b, 66 * 20, type);
    lw.o = narrow(&m.b, m.w.o, 48 * 30, type);
    lw.index_q_b = narrow(&m.b, m.w.iq_b, 80 * 24, type);
    lw.index_k = narrow(&m.b, m.w.ik, 16 * 48, type);
    lw.index_k_norm = narrow(&m.b, m.w.ik_norm, 16, type);
    lw.index_k_bias = narrow(&m.b, m.w.ik_bias, 16, type);
    lw.index_w = narrow(&m.b, m.w.iw, 5 * 48, type);
    OK(run(&m, plain, T, x, y, NULL, &l, &k));
    m.lw = lw;
    OK(run(&m, plain, T, x, z, NULL, &l, &k));
    ASSERT(same_bits(y, z, T * 48));
    END(m.b);
}

/* DeepSeek's block-scaled FP8 [out, in]: codes and scales, w becomes the dequantised values. */
static dsa_tensor block_fp8(bag *b, float *w, int32_t out, int32_t in)
{
    uint8_t *codes = (uint8_t *)bag_alloc(b, (size_t)out * (size_t)in);
    int32_t wide = (in + 127) / 128;
    float *scales = random_floats(b, (int64_t)((out + 127) / 128) * wide, (uint64_t)(out + in), 0.3f);
    for (int32_t i = 0; i < (out + 127) / 128 * wide; i++) scales[i] = (1.0f + scales[i]) / 300.0f;   /* no power of two */
    for (int32_t o = 0; o < out; o++)
        for (int32_t i = 0; i < in; i++) {
            float s = scales[o / 128 * wide + i / 128], *v = &w[(int64_t)o * in + i];
            codes[(int64_t)o * in + i] = ref_e4m3((double)*v / (double)s);
            *v = (float)ref_from_e4m3(codes[(int64_t)o * in + i]) * s;
        }
    dsa_tensor t = f32_of(NULL);
    t.data = codes;
    t.type = DSA_FP8;
    t.scale_inv = scales;
    return t;
}

TEST fp8_weights_have_block_scales(void)
{
    model m;
    dsa_config c = small_config();
    c.dim_hidden = 136;                               /* a second, partial block in every matrix: 200 x 136 and the like */
    c.dim_q_lora = 136;
    c.n_heads = 5;
    c.dim_nope = 32;
    c.dim_v = 30;
    c.dim_latent = 192;
    c.n_index_heads = 9;
    open_model(&m, c);
    enum { T = 20 };
    float *x = inputs(&m, T, 211), *y = floats(&m.b, T * 136), *z = floats(&m.b, T * 136);
    dsa_cache l, k;
    dsa_layer_weights lw = m.lw;
    lw.q_a = block_fp8(&m.b, m.w.q_a, 136, 136);
    lw.q_b = block_fp8(&m.b, m.w.q_b, 200, 136);
    lw.kv_a = block_fp8(&m.b, m.w.kv_a, 200, 136);
    lw.kv_b = block_fp8(&m.b, m.w.kv_b, 310, 192);
    lw.o = block_fp8(&m.b, m.w.o, 136, 150);
    lw.index_q_b = block_fp8(&m.b, m.w.iq_b, 144, 136);
    lw.index_k = block_fp8(&m.b, m.w.ik, 16, 136);
    lw.index_w = block_fp8(&m.b, m.w.iw, 9, 136);
    CHECK_CALL(check(&m, T, NULL));
    OK(run(&m, plain, T, x, y, NULL, &l, &k));
    m.lw = lw;
    OK(run(&m, plain, T, x, z, NULL, &l, &k));
    WITHIN(1e-6, max_error_f(z, y, T * 136));
    END(m.b);
}

/* ---- hooks and memory ---------------------------------------------------------------------------------------------------------------- */
typedef struct gemm_log { int calls; double work; } gemm_log;
static void own_gemm(void *user, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc)
{
    gemm_log *log = (gemm_log *)user;
    log->calls++;
    log->work += (double)m * (double)n * (double)k;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++) sum += (double)a[i * lda + l] * (double)b[j * ldb + l];
            c[i * ldc + j] = (float)sum;
        }
}

TEST the_gemm_hook_does_the_projections(void)
{
    model m;
    dsa_config c = small_config();
    c.dim_hidden = 80;                                /* more rows of o than one call of the hook gets */
    open_model(&m, c);
    enum { T = 40 };
    gemm_log log = { 0, 0 };
    float *x = inputs(&m, T, 212), *y = floats(&m.b, T * 80), *z = floats(&m.b, T * 80);
    int32_t lists[T * 10];
    dsa_cache l, k;
    run_args r = plain;
    OK(run(&m, r, T, x, y, lists, &l, &k));
    m.ctx.config.gemm = own_gemm;
    m.ctx.config.gemm_user = &log;
    r.lists = lists;
    OK(run(&m, r, T, x, z, NULL, &l, &k));
    ASSERT(log.calls > 0);
    ASSERT(log.work >= T * (24.0 * 80 + 60 * 24 + 28 * 80 + 80 * 30));   /* q_a, q_b, kv_a, o at the least */
    WITHIN(1e-5, max_error_f(z, y, T * 80));
    END(m.b);
}

TEST the_workspace_does_not_grow_with_the_chunk(void)
{
    model m;
    open_model(&m, small_config());
    dsa_cache l = new_cache(&m, DSA_LATENT, DSA_F32, 5000, 0), k = new_cache(&m, DSA_INDEX_KEY, DSA_F32, 5000, 0);
    dsa_seq s = seq_of(&l, &k, 64);
    float one = 0;
    dsa_layer_args a;
    size_t small = 0, large = 0;
    memset(&a, 0, sizeof a);
    a.weights = &m.lw;
    a.n_seqs = 1;
    a.seqs = &s;
    a.x = &one;
    a.y = &one;
    OK(dsa_layer_workspace(&m.ctx, &a, &small));
    s.n_q = 5000;
    OK(dsa_layer_workspace(&m.ctx, &a, &large));
    ASSERT(small > 0);
    ASSERT(large <= small + small / 2);
    END(m.b);
}

/* Quantised caches move the output a little, and not more: a wrong scale or a missing rotation moves it by its own size. */
TEST quantised_caches_stay_near(const cache_kind *f)
{
    model m;
    dsa_config c = small_config();
    c.dim_latent = 140;
    open_model(&m, c);
    enum { T = 60 };
    float *x = inputs(&m, T, 213), *y = floats(&m.b, T * 48), *z = floats(&m.b, T * 48);
    int32_t lists[T * 10];
    dsa_cache l, k;
    run_args r = plain;
    OK(run(&m, r, T, x, y, lists, &l, &k));
    r.lists = lists;
    r.latent = f->latent;
    r.index = f->index;
    OK(run(&m, r, T, x, z, NULL, &l, &k));
    double dot = 0, yy = 0, zz = 0;
    for (int i = 0; i < T * 48; i++) {
        dot += (double)y[i] * (double)z[i];
        yy += (double)y[i] * (double)y[i];
        zz += (double)z[i] * (double)z[i];
    }
    ASSERT(1 - 2 * dot / (yy + zz) <= (f->latent == DSA_BF16 ? 6e-5 : 2e-3));
    END(m.b);
}

/* ---- GLM-5.2 IndexShare ------------------------------------------------------------------------------------------------------------------ */
TEST index_share_pattern(void)
{
    int full = 0;
    const int first[4] = { 0, 1, 2, 6 };
    int n = 0;
    for (int32_t i = 0; i < 78; i++) {
        int has = dsa_layer_has_indexer(4, 3, i);
        full += has;
        if (has && n < 4) ASSERT_EQ_FMT(first[n++], (int)i, "%d");
        ASSERT_EQ_FMT(1, dsa_layer_has_indexer(0, 0, i), "%d");
        ASSERT_EQ_FMT(1, dsa_layer_has_indexer(1, 3, i), "%d");
    }
    ASSERT_EQ_FMT(21, full, "%d");
    ASSERT_EQ_FMT(1, dsa_layer_has_indexer(4, 3, 74), "%d");
    ASSERT_EQ_FMT(0, dsa_layer_has_indexer(4, 3, 77), "%d");
    PASS();
}

SUITE(layer_suite)
{
    variant v[8];
    variants(v);
    for (int i = 0; i < 8; i++) CASE(v[i].name, a_layer_matches_plain_attention, &v[i]);
    RUN_TEST(positions_are_rope_positions);
    RUN_TEST(the_latent_cache_holds_normed_latent_and_rotated_key);
    CASE("dense", dense_and_window_modes_match, DSA_LAYER_DENSE);
    CASE("window", dense_and_window_modes_match, DSA_LAYER_WINDOW);
    RUN_TEST(dense_fallback_straddles_top_k);
    RUN_TEST(shared_lists_serve_a_layer_without_indexer);
    CASE("f32", lists_that_look_ahead, DSA_F32, DSA_LAYER_SPARSE);
    CASE("fp8", lists_that_look_ahead, DSA_FP8, DSA_LAYER_SPARSE);
    CASE("dense", lists_that_look_ahead, DSA_F32, DSA_LAYER_DENSE);
    CASE("f32", record_and_replay, DSA_F32, DSA_F32);
    CASE("fp8", record_and_replay, DSA_FP8, DSA_FP8);
    for (size_t i = 0; i < sizeof cache_kinds / sizeof cache_kinds[0]; i++) {
        CASE(cache_kinds[i].name, any_chunking_gives_the_same_bits, &cache_kinds[i]);
        CASE(cache_kinds[i].name, a_ragged_batch_is_its_sequences, &cache_kinds[i]);
        if (i > 0) CASE(cache_kinds[i].name, quantised_caches_stay_near, &cache_kinds[i]);
    }
    CASE("sparse", threads_change_no_bit, DSA_LAYER_SPARSE);
    CASE("dense", threads_change_no_bit, DSA_LAYER_DENSE);
    CASE("window", threads_change_no_bit, DSA_LAYER_WINDOW);
    CASE("bf16", half_precision_weights_are_their_values, DSA_BF16);
    CASE("f16", half_precision_weights_are_their_values, DSA_F16);
    RUN_TEST(fp8_weights_have_block_scales);
    RUN_TEST(the_gemm_hook_does_the_projections);
    RUN_TEST(the_workspace_does_not_grow_with_the_chunk);
    RUN_TEST(index_share_pattern);
}

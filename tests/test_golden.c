/* The reference vectors (tests/vectors/README.md): FlashMLA's attention and FP8 bytes, DeepGEMM's logits, transformers' models layer by layer. */
#include "fixture.h"
#include "../examples/safetensors.h"

static st_file file;
static enum greatest_test_res open_file(const char *name)
{
    char path[200], err[300];
    snprintf(path, sizeof path, "tests/vectors/%s.safetensors", name);
    if (st_open(path, &file, err, sizeof err) != 0) { printf("\n  %s (run from the root of the repository)", err); FAILm("cannot read the vectors"); }
    return GREATEST_TEST_RES_PASS;
}
static const st_tensor *tensor(const char *name)
{
    const st_tensor *t = st_find(&file, name);
    if (t == NULL) { fprintf(stderr, "test vectors: tensor %s is missing\n", name); abort(); }
    return t;
}
/* Any float tensor as f32. */
static float *values(bag *b, const char *name)
{
    const st_tensor *t = tensor(name);
    float *x = floats(b, t->count);
    for (int64_t i = 0; i < t->count; i++) {
        if (strcmp(t->dtype, "BF16") == 0) { uint16_t h; memcpy(&h, (const char *)t->data + 2 * i, 2); x[i] = dsa_bf16_to_f32(h); }
        else memcpy(&x[i], (const char *)t->data + 4 * i, 4);
    }
    return x;
}
static const int32_t *integers(const char *name) { return (const int32_t *)tensor(name)->data; }

/* FlashMLA's own tolerances (spec 9). */
static int near_out(double a, double b) { return fabs(a - b) < 8e-4 || fabs(a - b) < 3.01 / 128 * fabs(b); }
static int near_lse(double a, double b) { return a == b || fabs(a - b) < 1e-6 || fabs(a - b) < 2.01 / 65536 * fabs(b); }

TEST flashmla_forward(const char *name, dsa_type format)
{
    bag b = { NULL, 0 };
    CHECK_CALL(open_file(name));
    const st_tensor *tq = tensor("q"), *ti = tensor("indices");
    int32_t rows = (int32_t)tq->shape[0], H = (int32_t)tq->shape[1], W = (int32_t)tq->shape[2], R = (int32_t)tensor("out_f32")->shape[2];
    int64_t n_kv = tensor("kv")->shape[0];
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.n_heads = H;
    c.dim_latent = R;
    c.dim_rope = W - R > 0 ? W - R : DSA_NONE;
    c.precision = DSA_PRECISION_F32;
    c.isa = test_isa;
    OK(dsa_init(&ctx, &c));
    dsa_cache_desc d = desc_of(DSA_LATENT, format, n_kv, 0);
    dsa_cache cache = cache_of(&b, &ctx, &d);
    OK(append(&ctx, &cache, NULL, (int32_t)n_kv, values(&b, "kv"), NULL));
    dsa_seq s = seq_of(&cache, NULL, rows);
    dsa_attend_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &s;
    a.q = values(&b, "q");
    a.scale = values(&b, "sm_scale")[0];
    a.indices = integers("indices");
    a.n_indices = ti->shape[2];
    a.counts = st_find(&file, "topk_length") ? integers("topk_length") : NULL;
    float *out = floats(&b, (int64_t)rows * H * R), *lse = floats(&b, rows * H), *max = floats(&b, rows * H);
    OK(attend(&b, &ctx, a, rows, H, R, st_find(&file, "attn_sink") ? values(&b, "attn_sink") : NULL, out, lse, max));
    float *want = values(&b, "out_f32"), *want_lse = values(&b, "lse"), *want_max = values(&b, "max_logits");
    double worst = 0;
    for (int64_t i = 0; i < (int64_t)rows * H * R; i++) {
        ASSERT(near_out((double)out[i], (double)want[i]));
        worst = fmax(worst, fabs((double)out[i] - (double)want[i]));
    }
    WITHIN(5e-5, worst);                              /* bf16 inputs are exact in both formats: f32 against f32 */
    for (int32_t i = 0; i < rows * H; i++) {
        ASSERT(near_lse((double)lse[i], (double)want_lse[i]));
        ASSERT(near_lse((double)max[i], (double)want_max[i]));
    }
    st_close(&file);
    END(b);
}

TEST flashmla_cache_bytes_are_exact(void)
{
    bag b = { NULL, 0 };
    CHECK_CALL(open_file("flashmla_fp8_cache"));
    const st_tensor *kv = tensor("kv"), *bytes = tensor("v32_bytes");
    dsa_ctx ctx;
    OK(dsa_init(&ctx, NULL));                         /* 512 + 64 */
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_FP8, kv->shape[0] * kv->shape[1], (int32_t)kv->shape[1]);
    dsa_cache c = cache_of(&b, &ctx, &d);
    ASSERT_EQ_FMT((size_t)bytes->shape[3], c.row_stride, "%zu");
    OK(append(&ctx, &c, NULL, (int32_t)d.capacity, values(&b, "kv"), NULL));
    ASSERT_MEM_EQ(bytes->data, c.data, bytes->bytes);
    float *back = floats(&b, kv->count), *want = values(&b, "v32_dequant");
    OK(dsa_cache_read(&ctx, &c, 0, d.capacity, back));
    for (int64_t i = 0; i < kv->count; i++) ASSERT_EQ_FMT((double)want[i], (double)ref_bf16(back[i]), "%.9g");
    st_close(&file);
    END(b);
}

TEST deepgemm_logits(void)
{
    bag b = { NULL, 0 };
    CHECK_CALL(open_file("deepgemm_mqa_logits"));
    const st_tensor *tq = tensor("q"), *tk = tensor("k");
    int32_t M = (int32_t)tq->shape[0], H = (int32_t)tq->shape[1], D = (int32_t)tq->shape[2], N = (int32_t)tk->shape[0];
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.n_index_heads = H;
    c.dim_index = D;
    c.hadamard = DSA_HADAMARD_OFF;                    /* the file's keys are what they are */
    c.isa = test_isa;
    OK(dsa_init(&ctx, &c));
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, DSA_FP8, 0, N);
    dsa_cache cache;
    unsigned char *page = (unsigned char *)bag_alloc(&b, (size_t)N * (size_t)(D + 4));
    memcpy(page, tk->data, (size_t)N * (size_t)D);
    memcpy(page + (size_t)N * (size_t)D, tensor("k_scale")->data, (size_t)N * 4);
    OK(dsa_cache_view(&ctx, &d, page, 1, 0, NULL, 0, N, &cache));
    /* the file gives e4m3 queries; as floats they re-quantise to other codes of the same values (a power of two apart) */
    float *q = floats(&b, (int64_t)M * H * D), *got = floats(&b, (int64_t)M * N), *want = values(&b, "logits");
    int64_t *ks = longs(&b, M), *ke = longs(&b, M);
    for (int64_t i = 0; i < tq->count; i++) q[i] = dsa_e4m3_to_f32(((const uint8_t *)tq->data)[i]);
    for (int32_t i = 0; i < M; i++) { ks[i] = integers("ks")[i]; ke[i] = integers("ke")[i]; }
    dsa_seq s = seq_of(NULL, &cache, M);
    dsa_score_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &s;
    a.q = q;
    a.w = values(&b, "weights");
    a.ks = ks;
    a.ke = ke;
    OK(dsa_score_workspace(&ctx, &a, &a.workspace_size));
    a.workspace = work(&b, a.workspace_size);
    OK(dsa_score(&ctx, &a, got, N, N));
    double dot = 0, gg = 0, ww = 0;
    for (int64_t i = 0; i < (int64_t)M * N; i++) {
        ASSERT_EQ_FMT(!!isinf(want[i]), !!isinf(got[i]), "%d");
        if (isinf(want[i])) { ASSERT(got[i] < 0); continue; }
        dot += (double)got[i] * (double)want[i];
        gg += (double)got[i] * (double)got[i];
        ww += (double)want[i] * (double)want[i];
    }
    WITHIN(5e-6, 1 - 2 * dot / (gg + ww));
    st_close(&file);
    END(b);
}

/* ---- models ----------------------------------------------------------------------------------------------------------- */
typedef struct golden_model { const char *name; int32_t layers; float eps; int yarn, glm, shared; dsa_config c; } golden_model;
static golden_model model_of(const char *name, int32_t layers, int32_t hidden, int32_t q_lora, int32_t H, int32_t nope, int32_t rope, int32_t v, int32_t R,
                             int32_t HI, int32_t D, int32_t k)
{
    golden_model g;
    memset(&g, 0, sizeof g);
    g.name = name;
    g.layers = layers;
    g.eps = 1e-6f;
    g.c.dim_hidden = hidden;
    g.c.dim_q_lora = q_lora;
    g.c.n_heads = H;
    g.c.dim_nope = nope;
    g.c.dim_rope = rope;
    g.c.dim_v = v;
    g.c.dim_latent = R;
    g.c.n_index_heads = HI;
    g.c.dim_index = D;
    g.c.top_k = k;
    g.c.precision = DSA_PRECISION_F32;
    return g;
}
static dsa_tensor weight(int32_t layer_number, const char *name)
{
    char full[200];
    snprintf(full, sizeof full, "w.model.layers.%d.self_attn.%s.weight", (int)layer_number, name);
    if (strcmp(name, "indexer.k_norm.bias") == 0) snprintf(full, sizeof full, "w.model.layers.%d.self_attn.%s", (int)layer_number, name);
    const st_tensor *t = st_find(&file, full);
    dsa_tensor w;
    memset(&w, 0, sizeof w);
    if (t == NULL) return w;
    w.data = t->data;
    w.type = strcmp(t->dtype, "BF16") == 0 ? DSA_BF16 : DSA_F32;
    return w;
}
static float *layer_values(bag *b, int32_t i, const char *name)
{
    char full[200];
    snprintf(full, sizeof full, "w.model.layers.%d.%s.weight", (int)i, name);
    return values(b, full);
}
static void linear(const float *w, int64_t out, int64_t in, const float *x, int64_t S, float *y)
{
    for (int64_t t = 0; t < S; t++)
        for (int64_t o = 0; o < out; o++) {
            double sum = 0;
            for (int64_t i = 0; i < in; i++) sum += (double)w[o * in + i] * (double)x[t * in + i];
            y[t * out + o] = (float)sum;
        }
}
/* Index scores of a layer: queries by the library's row operations, keys out of the cache that the layer has just filled. */
static enum greatest_test_res check_scores(bag *b, const dsa_ctx *ctx, int32_t i, int32_t S, const float *h, dsa_cache *index, const int32_t *lists)
{
    const dsa_config *c = &ctx->config;
    char name[64];
    float *qr = floats(b, (int64_t)S * c->dim_q_lora), *iq = floats(b, (int64_t)S * c->n_index_heads * c->dim_index), *iw = floats(b, (int64_t)S * c->n_index_heads);
    float *got = floats(b, (int64_t)S * S);
    int64_t *rows = longs(b, S);
    dsa_rope rope = dsa_config_index_rope(ctx);
    for (int32_t t = 0; t < S; t++) rows[t] = t;
    linear(layer_values(b, i, "self_attn.q_a_proj"), c->dim_q_lora, c->dim_hidden, h, S, qr);
    OK(dsa_rms_norm(qr, S, c->dim_q_lora, c->dim_q_lora, layer_values(b, i, "self_attn.q_a_layernorm"), 1e-6f));
    linear(layer_values(b, i, "self_attn.indexer.wq_b"), c->n_index_heads * c->dim_index, c->dim_q_lora, qr, S, iq);
    OK(dsa_rope_rows(iq, S, c->n_index_heads * c->dim_index, c->n_index_heads, c->dim_index, c->dim_index, &rope, rows, 0));
    linear(layer_values(b, i, "self_attn.indexer.weights_proj"), c->n_index_heads, c->dim_hidden, h, S, iw);
    for (int32_t t = 0; t < S * c->n_index_heads; t++) iw[t] *= (float)(1 / sqrt((double)c->n_index_heads * c->dim_index));
    dsa_seq s = seq_of(NULL, index, S);
    dsa_score_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &s;
    a.q = iq;
    a.w = iw;
    OK(dsa_score_workspace(ctx, &a, &a.workspace_size));
    a.workspace = work(b, a.workspace_size);
    OK(dsa_score(ctx, &a, got, S, S));
    snprintf(name, sizeof name, "index_scores.%d", (int)i);
    const float *want = values(b, name);
    for (int64_t j = 0; j < (int64_t)S * S; j++)
        if (isinf(want[j])) ASSERT(isinf(got[j]) && got[j] < 0); else ASSERT_IN_RANGE(want[j], got[j], 5e-5);
    /* the layer's sets are the file's (whose rows also name the future: those entries are dropped) */
    snprintf(name, sizeof name, "topk.%d", (int)i);
    const int32_t *topk = integers(name), k = c->top_k;
    for (int32_t t = 0; t < S; t++) {
        int n = 0, m = 0;
        for (int32_t j = 0; j < k; j++) m += lists[t * k + j] >= 0;
        for (int32_t j = 0; j < k; j++) {
            int32_t x = topk[t * k + j];
            if (x > t) continue;
            n++;
            int found = 0;
            for (int32_t l = 0; l < k; l++) found += lists[t * k + l] == x;
            ASSERT_EQ_FMT(1, found, "%d");
        }
        ASSERT_EQ_FMT(n, m, "%d");
    }
    return GREATEST_TEST_RES_PASS;
}

/* The whole model, its MLPs and norms written out here: every attn_out, every set, and the logits, in chunks of `chunk` tokens. */
TEST a_model_matches_transformers(const golden_model *g, int32_t chunk)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx;
    dsa_config c = g->c;
    if (g->yarn) c.rope_factor = 40;
    c.index_rope_interleaved = g->glm;
    c.isa = test_isa;
    OK(dsa_init(&ctx, &c));
    CHECK_CALL(open_file(g->name));
    int32_t S = (int32_t)tensor("input_ids")->shape[1], hid = c.dim_hidden, V = (int32_t)tensor("logits")->shape[2];
    float *x = floats(&b, S * hid), *h = floats(&b, S * hid), *y = floats(&b, S * hid), *table = values(&b, "w.model.embed_tokens.weight");
    int32_t *lists = ints(&b, S * c.top_k);
    for (int32_t t = 0; t < S; t++) memcpy(x + t * hid, table + integers("input_ids")[t] * hid, (size_t)hid * 4);
    for (int32_t i = 0; i < g->layers; i++) {
        char name[64];
        dsa_layer_weights w;
        w.q_a = weight(i, "q_a_proj");
        w.q_a_norm = weight(i, "q_a_layernorm");
        w.q_b = weight(i, "q_b_proj");
        w.kv_a = weight(i, "kv_a_proj_with_mqa");
        w.kv_a_norm = weight(i, "kv_a_layernorm");
        w.kv_b = weight(i, "kv_b_proj");
        w.o = weight(i, "o_proj");
        w.index_q_b = weight(i, "indexer.wq_b");
        w.index_k = weight(i, "indexer.wk");
        w.index_k_norm = weight(i, "indexer.k_norm");
        w.index_k_bias = weight(i, "indexer.k_norm.bias");
        w.index_w = weight(i, "indexer.weights_proj");
        int full = w.index_k.data != NULL;
        ASSERT_EQ_FMT(!g->shared || i % 2 == 0, full, "%d");   /* a shared layer reuses the list of the one before */
        memcpy(h, x, (size_t)(S * hid) * 4);
        OK(dsa_rms_norm(h, S, hid, hid, layer_values(&b, i, "input_layernorm"), g->eps));
        dsa_cache_desc dl = desc_of(DSA_LATENT, DSA_F32, S, 16), di = desc_of(DSA_INDEX_KEY, DSA_F32, S, 16);
        dsa_cache latent = cache_of(&b, &ctx, &dl), index = cache_of(&b, &ctx, &di);
        for (int32_t t = 0, n; t < S; t += n) {
            n = S - t < chunk ? S - t : chunk;
            dsa_seq s = seq_of(&latent, full ? &index : NULL, n);
            dsa_layer_args a;
            memset(&a, 0, sizeof a);
            a.weights = &w;
            a.n_seqs = 1;
            a.seqs = &s;
            a.x = h + t * hid;
            a.y = y + t * hid;
            if (full) a.indices_out = lists + t * c.top_k; else a.indices_in = lists + t * c.top_k;
            OK(layer(&b, &ctx, a));
        }
        snprintf(name, sizeof name, "attn_out.%d", (int)i);
        const float *want = values(&b, name);
        for (int32_t j = 0; j < S * hid; j++) ASSERT_IN_RANGE(want[j], y[j], 5e-5);
        if (full) CHECK_CALL(check_scores(&b, &ctx, i, S, h, &index, lists));
        /* residual, then the dense MLP: down(silu(gate) * up) */
        snprintf(name, sizeof name, "w.model.layers.%d.mlp.gate_proj.weight", (int)i);
        int32_t mid = (int32_t)tensor(name)->shape[0];
        float *gate = floats(&b, S * mid), *up = floats(&b, S * mid);
        for (int32_t j = 0; j < S * hid; j++) h[j] = x[j] += y[j];
        OK(dsa_rms_norm(h, S, hid, hid, layer_values(&b, i, "post_attention_layernorm"), g->eps));
        linear(layer_values(&b, i, "mlp.gate_proj"), mid, hid, h, S, gate);
        linear(layer_values(&b, i, "mlp.up_proj"), mid, hid, h, S, up);
        for (int32_t j = 0; j < S * mid; j++) up[j] *= (float)((double)gate[j] / (1 + exp(-(double)gate[j])));
        linear(layer_values(&b, i, "mlp.down_proj"), hid, mid, up, S, y);
        for (int32_t j = 0; j < S * hid; j++) x[j] += y[j];
    }
    OK(dsa_rms_norm(x, S, hid, hid, values(&b, "w.model.norm.weight"), g->eps));
    float *logits = floats(&b, S * V), *want = values(&b, "logits");
    linear(values(&b, "w.lm_head.weight"), V, hid, x, S, logits);
    for (int32_t j = 0; j < S * V; j++) ASSERT_IN_RANGE(want[j], logits[j], 5e-5);
    st_close(&file);
    END(b);
}

SUITE(golden_suite)
{
    static const char *const how[3] = { "one_shot", "chunked", "token_by_token" };
    static const int32_t chunks[3] = { 1000, 13, 1 };
    golden_model g[4];
    g[0] = model_of("deepseek_v32_small", 2, 128, 64, 4, 32, 16, 32, 64, 16, 32, 16);
    g[1] = model_of("deepseek_v32_yarn", 2, 128, 64, 4, 32, 16, 32, 64, 16, 32, 24);
    g[1].yarn = 1;
    g[2] = model_of("deepseek_v32_realdims", 1, 256, 128, 8, 128, 64, 128, 512, 32, 128, 64);
    g[2].yarn = 1;
    g[3] = model_of("glm_moe_dsa_shared", 4, 128, 64, 4, 48, 16, 64, 64, 16, 32, 16);
    g[3].glm = g[3].shared = 1;
    g[3].eps = 1e-5f;
    CASE("f32", flashmla_forward, "flashmla_sparse_fwd", DSA_F32);
    CASE("bf16", flashmla_forward, "flashmla_sparse_fwd", DSA_BF16);
    CASE("sink_f32", flashmla_forward, "flashmla_sparse_fwd_sink", DSA_F32);
    CASE("sink_bf16", flashmla_forward, "flashmla_sparse_fwd_sink", DSA_BF16);
    RUN_TEST(flashmla_cache_bytes_are_exact);
    RUN_TEST(deepgemm_logits);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 3; j++) {
            char name[100];
            snprintf(name, sizeof name, "%s_%s", g[i].name, how[j]);
            CASE(name, a_model_matches_transformers, &g[i], chunks[j]);
        }
}

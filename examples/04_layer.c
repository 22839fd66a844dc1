/* 04 - a layer from weights: hidden states in, hidden states out.

       cc -O2 examples/04_layer.c -lm -pthread && ./a.out

   The first attention layer of examples/tiny-dsa reads a text: the prompt in one call, then token by token, with the same
   call. dsa_layer does all that stands between input_layernorm and the residual: projections, norms, RoPE, indexer,
   selection, attention, output projection. The same rows in a single call are the judge. Each call hands out the rows it
   chose; a last run without the indexer takes these lists instead, as layers that share an index list do (GLM-5.2). */
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include "safetensors.h"
#include <math.h>

enum { PROMPT = 300, TOKENS = 320, TOP_K = 64, HIDDEN = 256 };

static float x[TOKENS][HIDDEN];                                 /* what input_layernorm puts out */
static float whole[TOKENS][HIDDEN], stepped[TOKENS][HIDDEN], replayed[TOKENS][HIDDEN];
static int32_t whole_list[TOKENS][TOP_K], stepped_list[TOKENS][TOP_K];

static void fail(const char *what)
{
    fprintf(stderr, "04_layer: %s\n", what);
    exit(EXIT_FAILURE);
}

static void check(dsa_status status)
{
    if (status != DSA_OK) fail(dsa_status_text(status));
}

/* A size from config.json. */
static int32_t size(const js_value *config, const char *name)
{
    double n = js_number(js_get(config, name));
    if (!(n >= 1 && n <= 1e6)) fail(name);
    return (int32_t)n;
}

/* Weights stay where the file was loaded, in their own format; a tensor is only a pointer. */
static dsa_tensor tensor(const st_file *file, const char *name, int64_t count)
{
    const st_tensor *t = st_find(file, name);
    if (!t || t->count != count || strcmp(t->dtype, "BF16") != 0) fail(name);
    return (dsa_tensor){ .data = t->data, .type = DSA_BF16 };
}

/* Feeds x in a chunk of `first` rows and then row by row, into fresh caches. */
static void run(const dsa_ctx *ctx, const dsa_layer_weights *weights, int32_t first, const int32_t *lists_in, int32_t *lists_out, float *y)
{
    dsa_cache latents, keys;
    dsa_seq seq = { .latent = &latents, .n_q = first };
    dsa_layer_args args = { .weights = weights, .n_seqs = 1, .seqs = &seq };
    void *workspace;
    check(dsa_cache_create(ctx, &(dsa_cache_desc){ .kind = DSA_LATENT, .capacity = TOKENS }, &latents));
    check(dsa_cache_create(ctx, &(dsa_cache_desc){ .kind = DSA_INDEX_KEY, .capacity = TOKENS }, &keys));
    if (weights->index_k.data) seq.index = &keys;
    check(dsa_layer_workspace(ctx, &args, &args.workspace_size));   /* for the first, the longest call; it does not grow later */
    workspace = args.workspace = malloc(args.workspace_size);
    if (!workspace) check(DSA_ERR_MEMORY);
    for (int32_t row = 0; row < TOKENS; row += seq.n_q) {
        seq.n_q = row == 0 ? first : 1;
        args.x = x[row];
        args.y = y + row * HIDDEN;
        args.indices_in = lists_in ? lists_in + row * TOP_K : NULL;
        args.indices_out = lists_out ? lists_out + row * TOP_K : NULL;
        check(dsa_layer(ctx, &args));
    }
    free(workspace);
    dsa_cache_destroy(&latents);
    dsa_cache_destroy(&keys);
}

int main(void)
{
    const char *self = "model.layers.0.self_attn.";
    dsa_config config = { 0 };
    dsa_layer_weights w = { 0 };
    float gain[HIDDEN], largest = 0.0f;
    char error[256], name[128];
    st_file file;
    size_t n;
    dsa_ctx ctx;

    /* Shapes: from the model's own config. What is not set here keeps dsa.h's defaults, which are DeepSeek-V3.2's. */
    char *text = st_read_file("examples/tiny-dsa/config.json", &n, error, sizeof error);
    js_value *json = text ? js_parse(text, n, error, sizeof error) : NULL;
    if (!json) fail(error);
    free(text);
    config.n_heads = size(json, "num_attention_heads");
    config.dim_latent = size(json, "kv_lora_rank");
    config.dim_rope = size(json, "qk_rope_head_dim");
    config.n_index_heads = size(json, "index_n_heads");
    config.dim_index = size(json, "index_head_dim");
    config.top_k = size(json, "index_topk");
    config.dim_hidden = size(json, "hidden_size");
    config.dim_q_lora = size(json, "q_lora_rank");
    config.dim_nope = size(json, "qk_nope_head_dim");
    config.dim_v = size(json, "v_head_dim");
    config.rope_theta = js_number(js_get(js_get(json, "rope_parameters"), "rope_theta"));
    if (config.top_k != TOP_K || config.dim_hidden != HIDDEN) fail("config.json does not belong to tiny-dsa");
    check(dsa_init(&ctx, &config));

    /* Weights: under their Hugging Face names. */
    const int64_t H = config.n_heads, R = config.dim_latent, r = config.dim_rope, A = config.dim_q_lora, D = config.dim_index;
    const struct { dsa_tensor *to; const char *name; int64_t count; } list[] = {
        { &w.q_a, "q_a_proj.weight", A * HIDDEN }, { &w.q_a_norm, "q_a_layernorm.weight", A },
        { &w.q_b, "q_b_proj.weight", H * (config.dim_nope + r) * A }, { &w.kv_a, "kv_a_proj_with_mqa.weight", (R + r) * HIDDEN },
        { &w.kv_a_norm, "kv_a_layernorm.weight", R }, { &w.kv_b, "kv_b_proj.weight", H * (config.dim_nope + config.dim_v) * R },
        { &w.o, "o_proj.weight", HIDDEN * H * config.dim_v }, { &w.index_q_b, "indexer.wq_b.weight", config.n_index_heads * D * A },
        { &w.index_k, "indexer.wk.weight", D * HIDDEN }, { &w.index_k_norm, "indexer.k_norm.weight", D },
        { &w.index_k_bias, "indexer.k_norm.bias", D }, { &w.index_w, "indexer.weights_proj.weight", config.n_index_heads * HIDDEN } };
    if (st_open("examples/tiny-dsa/model.safetensors", &file, error, sizeof error) != 0) fail(error);
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        snprintf(name, sizeof name, "%s%s", self, list[i].name);
        *list[i].to = tensor(&file, name, list[i].count);
    }

    /* Input: one row of the embedding per byte of text, normalised. */
    const uint16_t *embed = (const uint16_t *)tensor(&file, "model.embed_tokens.weight", 256 * HIDDEN).data;
    const uint16_t *norm = (const uint16_t *)tensor(&file, "model.layers.0.input_layernorm.weight", HIDDEN).data;
    text = st_read_file("examples/kjv-heldout.txt", &n, error, sizeof error);
    if (!text || n < TOKENS) fail(text ? "the text is too short" : error);
    for (int i = 0; i < HIDDEN; i++) gain[i] = dsa_bf16_to_f32(norm[i]);
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < HIDDEN; i++) x[t][i] = dsa_bf16_to_f32(embed[(unsigned char)text[t] * HIDDEN + i]);
    check(dsa_rms_norm(x[0], TOKENS, HIDDEN, HIDDEN, gain, 1e-6f));

    run(&ctx, &w, TOKENS, NULL, whole_list[0], whole[0]);
    run(&ctx, &w, PROMPT, NULL, stepped_list[0], stepped[0]);
    w.index_q_b = w.index_k = w.index_k_norm = w.index_k_bias = w.index_w = (dsa_tensor){ 0 };
    run(&ctx, &w, PROMPT, stepped_list[0], NULL, replayed[0]);

    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < HIDDEN; i++) largest = fmaxf(largest, fabsf(whole[t][i] - stepped[t][i]));
    int lists = memcmp(whole_list, stepped_list, sizeof whole_list) == 0, same = memcmp(stepped, replayed, sizeof stepped) == 0;
    const int32_t *last = stepped_list[TOKENS - 1];
    printf("%d tokens; the last one chose %d of them: %d, %d, %d, ... %d.\n", TOKENS, TOP_K,
           (int)last[0], (int)last[1], (int)last[2], (int)last[TOP_K - 1]);
    printf("%d in one call and %d one by one: %s lists as in a single call, outputs at most %.1e apart%s.\n", PROMPT, TOKENS - PROMPT,
           lists ? "the same" : "OTHER", (double)largest, memcmp(whole, stepped, sizeof whole) == 0 ? ": the same bits" : "");
    printf("Without the indexer, from these lists: %s.\n", same ? "the same output, bit for bit" : "ANOTHER output");
    js_free(json);
    free(text);
    st_close(&file);
    return lists && same && largest < 1e-5f ? EXIT_SUCCESS : EXIT_FAILURE;
}

/* engine.h - the small engine around dsa_layer() that the tools and the demo share - public domain or MIT, like dsa.h

   It runs models of the types deepseek_v32 and glm_moe_dsa: embedding, RMSNorm, attention (dsa.h), SwiGLU MLP or mixture of
   experts, final norm, lm_head. dsa.h knows nothing of all that, and an engine author replaces this file with his own.

       engine_model model; engine e;
       if (engine_load_dir(&model, "examples/tiny-dsa", 0) != 0) puts(model.error);
       engine_options options = { .n_threads = 2, .max_tokens = 8192 };
       if (engine_open(&e, &model, &options) != 0) puts(e.error);
       engine_forward(&e, tokens, n, logits, n_logits, NULL);
       engine_close(&e); engine_unload(&model);

   A model is read only and may serve several engines (say, one per cache format). Both structs must stay where they are.
   Model files are untrusted: every tensor's type and shape is checked against the config before use.
   Results do not depend on the number of threads: each sum is taken in one order, whoever takes it. */
#ifndef ENGINE_H_INCLUDED
#define ENGINE_H_INCLUDED

#include <math.h>
#include "../dsa.h"
#include "../examples/safetensors.h"
#include "device.h"

#ifdef DSA_BLIS
#include "blis.h"
#define ENGINE_GEMM dsa_blis_gemm
#else
#define ENGINE_GEMM NULL
#endif

enum {
    ENGINE_CHUNK = 128,          /* rows that pass through all layers together; bounds the scratch memory, not the results */
    ENGINE_AS_STORED = 1,        /* load flag: attention weights go to dsa_layer in their own type, not expanded to f32 */
    ENGINE_FAILED = -1,          /* bad input, no memory, or a status of dsa.h; the text is in .error */
    ENGINE_UNSUPPORTED = -2      /* a well-formed model of a type that this engine does not run */
};

typedef struct engine_mlp { const float *gate, *up, *down; int32_t inter; } engine_mlp;   /* [inter, hidden] twice, [hidden, inter] */

typedef struct engine_block {    /* one layer of the model */
    const float *input_norm, *post_norm;   /* [hidden] */
    dsa_layer_weights attention;
    int has_indexer;             /* 0: it attends over the list of the nearest earlier layer that has one */
    engine_mlp mlp;              /* the dense MLP, or the shared experts (inter 0: none) */
    engine_mlp *experts;         /* [n_experts], NULL in a dense layer */
    const float *router, *router_bias;     /* [n_experts, hidden], [n_experts] */
} engine_block;

typedef struct engine_model {
    char error[512];             /* what went wrong, naming file and field */
    char type[32];               /* model_type */
    int32_t n_vocab, n_layers, dim_hidden, dim_inter, dim_expert;
    int32_t n_experts, n_experts_used, n_shared_experts, n_groups, n_groups_used;
    int norm_expert_weights, tied;
    float expert_scale, norm_eps;
    int64_t max_positions;
    dsa_config dsa;              /* the model part: what dsa_layer needs */
    engine_block *blocks;        /* [n_layers] */
    const float *embedding, *final_norm, *lm_head;   /* [vocab, hidden], [hidden], [vocab, hidden] */
    void **memory;               /* all allocations, for engine_unload */
    size_t n_memory;
} engine_model;

typedef struct engine_options {
    dsa_isa isa;
    dsa_precision precision;
    int32_t n_threads;           /* 0 = 1; above 1 the engine keeps a pool */
    dsa_type latent_format;      /* F32, BF16, FP8 */
    dsa_type index_format;       /* F32, BF16, FP8, INT8 */
    dsa_hadamard hadamard;
    int32_t page_size;           /* 0 = contiguous */
    int64_t max_tokens;          /* capacity of the caches */
    dsa_layer_mode mode;
    int32_t top_k;               /* also the width of DSA_LAYER_WINDOW; 0 = the model's */
    dsa_gemm gemm;               /* NULL = built-in */
    void *gemm_user;
    dsa_cuda *cuda;              /* NULL = caches on the host */
} engine_options;

/* Taps into a forward pass. Every member is an array of n_layers pointers or NULL, and so is every entry.
   Row i of a buffer is the i-th token of the call; lists are [n, k] with k = e->ctx.config.top_k (mode SPARSE only). */
typedef struct engine_hooks {
    float *const *attn_in;               /* gets the layer's x: [n, hidden], output of input_layernorm */
    float *const *attn_out;              /* gets the layer's y: [n, hidden], before the residual */
    int32_t *const *lists_out;           /* gets the lists attended over */
    const int32_t *const *lists_in;      /* replaces the selection; layers that share follow the list of their full layer */
    const float *const *attn_in_forced;  /* replaces x: [n, hidden] */
} engine_hooks;

typedef struct engine {
    char error[512];
    const engine_model *model;
    engine_options options;      /* resolved: no zeros left where a default exists */
    dsa_ctx ctx;
    dsa_pool *pool;              /* NULL with one thread */
    dsa_cache *latent, *index;   /* [n_layers]; index is unused in layers without indexer */
    int64_t len;                 /* tokens in the caches */
    float *x, *norm, *y;         /* [CHUNK, hidden] */
    float *hidden, *gate, *down; /* experts: [CHUNK, hidden] gathered rows, [CHUNK, inter], [CHUNK, hidden] */
    float *router;               /* [CHUNK, n_experts] logits, then weights */
    float *group_score;          /* [n_groups] scratch of the router */
    char *mark;                  /* [n_groups + n_experts] scratch of the router */
    int32_t *list;               /* [CHUNK, k] of the newest full layer */
    void *workspace;
    size_t workspace_size;
    char detail[256];            /* dsa.h's own words about a failed call */
} engine;

/* ---- small helpers ------------------------------------------------------------------------------------------------ */
static inline void *engine__keep(engine_model *m, size_t count, size_t size) {
    void *p = count != 0 && size <= SIZE_MAX / count ? calloc(count, size) : NULL;
    void **more = (void **)realloc(m->memory, (m->n_memory + 1) * sizeof *more);
    if (more != NULL) m->memory = more;
    if (p == NULL || more == NULL) { free(p); st__fail(m->error, sizeof m->error, "out of memory while loading the model"); return NULL; }
    m->memory[m->n_memory++] = p;
    return p;
}

static inline void engine_unload(engine_model *m) {
    for (size_t i = 0; i < m->n_memory; i++) free(m->memory[i]);
    free(m->memory);
    m->memory = NULL;
    m->n_memory = 0;
}

/* ---- config ------------------------------------------------------------------------------------------------------- */
typedef struct engine__source { engine_model *model; const char *file, *prefix; const st_file *tensors; int flags; } engine__source;

/* Reads an integer in [low, high]; an absent or null one takes `fallback`, or is an error where fallback < low. */
static inline int engine__int(const engine__source *s, const js_value *object, const char *key, int64_t low, int64_t high, int64_t fallback, int32_t *out) {
    const js_value *v = js_get(object, key);
    double x = js_number(v);
    if (v == NULL || js_is_null(v)) {
        if (fallback < low) return st__fail(s->model->error, sizeof s->model->error, "%s: config: '%s' is missing", s->file, key);
        x = (double)fallback;
    } else if (!js_is_number(v) || !(x >= (double)low && x <= (double)high) || x != floor(x)) {
        return st__fail(s->model->error, sizeof s->model->error, "%s: config: '%s' must be an integer from %lld to %lld", s->file, key, (long long)low, (long long)high);
    }
    *out = (int32_t)x;
    return 0;
}

static inline int engine__real(const engine__source *s, const js_value *object, const char *key, double fallback, double *out) {
    const js_value *v = js_get(object, key);
    *out = fallback;
    if (v == NULL || js_is_null(v)) {
        if (fallback >= 0) return 0;
        return st__fail(s->model->error, sizeof s->model->error, "%s: config: '%s' is missing", s->file, key);
    }
    *out = js_number(v);
    if (!js_is_number(v) || !(*out >= 0 && *out <= 1e12)) return st__fail(s->model->error, sizeof s->model->error, "%s: config: '%s' must be a number from 0 to 1e12", s->file, key);
    return 0;
}

/* Settings that would change the arithmetic in a way that this engine does not know. */
static inline int engine__expect(const engine__source *s, const js_value *object, const char *key, const char *value) {
    const js_value *v = js_get(object, key);
    if (v == NULL || js_is_null(v) || (js_is_string(v) && strcmp(js_string(v), value) == 0)) return 0;
    st__fail(s->model->error, sizeof s->model->error, "%s: config: '%s' is not \"%s\": not supported", s->file, key, value);
    return ENGINE_UNSUPPORTED;
}

/* rope_parameters (theta inside), or the older pair rope_theta and rope_scaling (null without YaRN). */
static inline int engine__rope(const engine__source *s, const js_value *config) {
    dsa_config *c = &s->model->dsa;
    const js_value *rope = js_get(config, "rope_parameters"), *theta = config;
    double mscale, all;
    int status;
    if (js_is_object(rope)) theta = rope; else rope = js_get(config, "rope_scaling");
    if (engine__real(s, theta, "rope_theta", -1, &c->rope_theta) != 0) return ENGINE_FAILED;
    if (!(c->rope_theta > 1)) return st__fail(s->model->error, sizeof s->model->error, "%s: config: 'rope_theta' must be above 1", s->file);
    if (rope == NULL || js_is_null(rope)) return 0;
    if (!js_is_object(rope)) return st__fail(s->model->error, sizeof s->model->error, "%s: config: 'rope_scaling' is no object", s->file);
    const char *key = js_get(rope, "rope_type") != NULL ? "rope_type" : "type";
    if (js_get(rope, key) == NULL || (js_is_string(js_get(rope, key)) && strcmp(js_string(js_get(rope, key)), "default") == 0)) return 0;
    if ((status = engine__expect(s, rope, key, "yarn")) != 0) return status;
    if (engine__real(s, rope, "factor", -1, &c->rope_factor) != 0 || engine__real(s, rope, "original_max_position_embeddings", -1, &c->rope_original_context) != 0 ||
        engine__real(s, rope, "beta_fast", 32, &c->rope_beta_fast) != 0 || engine__real(s, rope, "beta_slow", 1, &c->rope_beta_slow) != 0 ||
        engine__real(s, rope, "mscale_all_dim", 0, &all) != 0 || engine__real(s, rope, "mscale", all, &mscale) != 0) return ENGINE_FAILED;
    if (!(c->rope_factor >= 1 && c->rope_original_context >= 1))
        return st__fail(s->model->error, sizeof s->model->error, "%s: config: YaRN's 'factor' and 'original_max_position_embeddings' must be at least 1", s->file);
    if (all != 0 && mscale != all) {   /* would scale cos and sin, which V3.2 and GLM never do */
        st__fail(s->model->error, sizeof s->model->error, "%s: config: 'mscale' differs from 'mscale_all_dim': not supported", s->file);
        return ENGINE_UNSUPPORTED;
    }
    c->mscale = all == 0 ? (float)DSA_NONE : (float)all;
    return 0;
}

/* The item of a per-layer list of strings, NULL with an error if the list does not fit; *present = 0 if there is none. */
static inline const char *engine__per_layer(const engine__source *s, const js_value *config, const char *key, int32_t layer, int *present) {
    const js_value *list = js_get(config, key);
    *present = list != NULL && !js_is_null(list);
    if (!*present) return NULL;
    const char *text = js_is_array(list) && js_count(list) >= s->model->n_layers ? js_string(js_at(list, layer)) : NULL;
    if (text == NULL) st__fail(s->model->error, sizeof s->model->error, "%s: config: '%s' must list one string per layer", s->file, key);
    return text;
}

/* IndexShare: an explicit list, else a pattern of F and S, else a frequency with its offset (model-variants 1). */
static inline int engine__indexer_types(const engine__source *s, const js_value *config) {
    engine_model *m = s->model;
    const char *pattern = js_string(js_get(config, "index_topk_pattern"));
    int32_t freq = 1, offset = 0;     /* every layer has an indexer of its own */
    int present;
    if (engine__int(s, config, "index_topk_freq", 1, 100000, 1, &freq) != 0) return ENGINE_FAILED;
    if (freq > 1 && engine__int(s, config, "index_skip_topk_offset", 0, 100000, -1, &offset) != 0) return ENGINE_FAILED;
    if (pattern != NULL && strlen(pattern) < (size_t)m->n_layers) return st__fail(m->error, sizeof m->error, "%s: config: 'index_topk_pattern' is shorter than the model", s->file);
    for (int32_t i = 0; i < m->n_layers; i++) {
        const char *type = engine__per_layer(s, config, "indexer_types", i, &present);
        if (present && type == NULL) return ENGINE_FAILED;
        if (present && strcmp(type, "full") != 0 && strcmp(type, "shared") != 0)
            return st__fail(m->error, sizeof m->error, "%s: config: 'indexer_types' holds '%.40s', neither full nor shared", s->file, type);
        m->blocks[i].has_indexer = present ? strcmp(type, "full") == 0 : pattern != NULL ? pattern[i] == 'F' : dsa_layer_has_indexer(freq, offset, i);
    }
    if (!m->blocks[0].has_indexer) return st__fail(m->error, sizeof m->error, "%s: config: layer 0 shares an index list, but no layer comes before it", s->file);
    return 0;
}

static inline int engine__config(const engine__source *s, const js_value *config) {
    engine_model *m = s->model;
    dsa_config *c = &m->dsa;
    const js_value *v;
    double eps, scale;
    int status, present;
    const int32_t top = 1 << 20;      /* no model is wider; keeps every product of two of these inside int64 */
    if (!js_is_object(config)) return st__fail(m->error, sizeof m->error, "%s: config: it must be an object", s->file);
    const char *type = js_string(js_get(config, "model_type"));
    if (type == NULL) return st__fail(m->error, sizeof m->error, "%s: config: 'model_type' is missing or no string", s->file);
    int glm = strcmp(type, "glm_moe_dsa") == 0;
    if (!glm && strcmp(type, "deepseek_v32") != 0) {
        st__fail(m->error, sizeof m->error, "%s: unsupported: model_type '%.60s' (supported: deepseek_v32, glm_moe_dsa)", s->file, type);
        return ENGINE_UNSUPPORTED;
    }
    strcpy(m->type, type);
    if (engine__int(s, config, "vocab_size", 1, 1 << 24, 0, &m->n_vocab) != 0 || engine__int(s, config, "num_hidden_layers", 1, 10000, 0, &m->n_layers) != 0 ||
        engine__int(s, config, "hidden_size", 1, top, 0, &m->dim_hidden) != 0 || engine__int(s, config, "intermediate_size", 1, top, 0, &m->dim_inter) != 0 ||
        engine__int(s, config, "num_attention_heads", 1, 65536, 0, &c->n_heads) != 0 || engine__int(s, config, "kv_lora_rank", 1, top, 0, &c->dim_latent) != 0 ||
        engine__int(s, config, "q_lora_rank", 1, top, 0, &c->dim_q_lora) != 0 || engine__int(s, config, "qk_nope_head_dim", 1, top, 0, &c->dim_nope) != 0 ||
        engine__int(s, config, "qk_rope_head_dim", 2, top, 0, &c->dim_rope) != 0 || engine__int(s, config, "v_head_dim", 1, top, 0, &c->dim_v) != 0 ||
        engine__int(s, config, "index_n_heads", 1, 65536, 0, &c->n_index_heads) != 0 || engine__int(s, config, "index_head_dim", 1, top, 0, &c->dim_index) != 0 ||
        engine__int(s, config, "index_topk", 1, 1 << 30, 0, &c->top_k) != 0) return ENGINE_FAILED;
    c->dim_hidden = m->dim_hidden;
    if (c->dim_rope % 2 != 0 || c->dim_rope > c->dim_index) return st__fail(m->error, sizeof m->error, "%s: config: 'qk_rope_head_dim' must be even and fit into 'index_head_dim'", s->file);
    if ((status = engine__expect(s, config, "hidden_act", "silu")) != 0 || (status = engine__expect(s, config, "scoring_func", "sigmoid")) != 0 ||
        (status = engine__rope(s, config)) != 0) return status;
    if (js_bool(js_get(config, "attention_bias"))) {
        st__fail(m->error, sizeof m->error, "%s: config: 'attention_bias' is true: not supported", s->file);
        return ENGINE_UNSUPPORTED;
    }
    if (engine__real(s, config, "rms_norm_eps", -1, &eps) != 0) return ENGINE_FAILED;
    m->norm_eps = (float)eps;
    c->norm_eps = 1e-6f;              /* q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says (golden README) */
    v = js_get(config, "indexer_rope_interleave");
    c->index_rope_interleaved = js_is_bool(v) ? js_bool(v) : glm;
    m->tied = js_bool(js_get(config, "tie_word_embeddings"));
    v = js_get(config, "max_position_embeddings");
    m->max_positions = js_is_number(v) && js_number(v) >= 1 && js_number(v) <= 2147483647.0 ? (int64_t)js_number(v) : 2147483647;

    m->blocks = (engine_block *)engine__keep(m, (size_t)m->n_layers, sizeof *m->blocks);
    if (m->blocks == NULL || engine__indexer_types(s, config) != 0) return ENGINE_FAILED;

    /* Which layers are mixtures: an explicit list, else all from first_k_dense_replace on. */
    int32_t first = m->n_layers, n_sparse = 0;
    if (js_is_number(js_get(config, "n_routed_experts")) && engine__int(s, config, "first_k_dense_replace", 0, 100000, 0, &first) != 0) return ENGINE_FAILED;
    for (int32_t i = 0; i < m->n_layers; i++) {
        const char *kind = engine__per_layer(s, config, "mlp_layer_types", i, &present);
        if (present && kind == NULL) return ENGINE_FAILED;
        if (present && strcmp(kind, "dense") != 0 && strcmp(kind, "sparse") != 0)
            return st__fail(m->error, sizeof m->error, "%s: config: 'mlp_layer_types' holds '%.40s', neither dense nor sparse", s->file, kind);
        m->blocks[i].mlp.inter = (present ? strcmp(kind, "dense") == 0 : i < first) ? m->dim_inter : 0;
        n_sparse += m->blocks[i].mlp.inter == 0;
    }
    if (n_sparse == 0) return 0;
    if (engine__int(s, config, "n_routed_experts", 1, 65536, 0, &m->n_experts) != 0 || engine__int(s, config, "moe_intermediate_size", 1, top, 0, &m->dim_expert) != 0 ||
        engine__int(s, config, "num_experts_per_tok", 1, m->n_experts, 0, &m->n_experts_used) != 0 || engine__int(s, config, "n_shared_experts", 0, 1024, 0, &m->n_shared_experts) != 0 ||
        engine__int(s, config, "n_group", 1, m->n_experts, 1, &m->n_groups) != 0 || engine__int(s, config, "topk_group", 1, m->n_groups, 1, &m->n_groups_used) != 0 ||
        engine__real(s, config, "routed_scaling_factor", 1, &scale) != 0) return ENGINE_FAILED;
    m->expert_scale = (float)scale;
    v = js_get(config, "norm_topk_prob");
    m->norm_expert_weights = js_is_bool(v) ? js_bool(v) : 1;
    if (m->n_experts % m->n_groups != 0) return st__fail(m->error, sizeof m->error, "%s: config: 'n_group' does not divide 'n_routed_experts'", s->file);
    if (m->n_experts_used > m->n_experts / m->n_groups * m->n_groups_used)
        return st__fail(m->error, sizeof m->error, "%s: config: 'num_experts_per_tok' is more than 'topk_group' groups hold", s->file);
    return 0;
}

/* ---- weights ------------------------------------------------------------------------------------------------------ */
/* The tensor of that name (behind the file's prefix) if its shape is [n, out, in] without the leading dims that are 0. */
static inline const st_tensor *engine__find(const engine__source *s, const char *name, int64_t n, int64_t out, int64_t in) {
    int64_t want[3];
    int32_t rank = 0;
    char full[256];
    if (n > 0) want[rank++] = n;
    if (out > 0) want[rank++] = out;
    want[rank++] = in;
    snprintf(full, sizeof full, "%s%s", s->prefix, name);
    const st_tensor *t = st_find(s->tensors, full);
    if (t == NULL) { st__fail(s->model->error, sizeof s->model->error, "%s: tensor '%s' is missing", s->file, full); return NULL; }
    int same = t->rank == rank;
    for (int32_t i = 0; same && i < rank; i++) same = t->shape[i] == want[i];
    if (same) return t;
    char got[120] = "", need[120] = "";
    for (int32_t i = 0; i < t->rank && i < 4; i++) snprintf(got + strlen(got), sizeof got - strlen(got), i == 0 ? "%lld" : ", %lld", (long long)t->shape[i]);
    for (int32_t i = 0; i < rank; i++) snprintf(need + strlen(need), sizeof need - strlen(need), i == 0 ? "%lld" : ", %lld", (long long)want[i]);
    st__fail(s->model->error, sizeof s->model->error, "%s: tensor '%s': its shape is [%s], the config needs [%s]", s->file, full, got, need);
    return NULL;
}

/* FP8 weights carry one f32 scale per block of 128 x 128 values in a tensor beside them. */
static inline const float *engine__scales(const engine__source *s, const char *name, int64_t n, int64_t out, int64_t in) {
    char scale_name[224];
    snprintf(scale_name, sizeof scale_name, "%s_scale_inv", name);
    const st_tensor *t = engine__find(s, scale_name, n, (out + 127) / 128, (in + 127) / 128);
    if (t == NULL) return NULL;
    if (strcmp(t->dtype, "F32") == 0) return (const float *)t->data;
    st__fail(s->model->error, sizeof s->model->error, "%s: tensor '%s': dtype %s where F32 is needed", s->file, t->name, t->dtype);
    return NULL;
}

static inline int engine__type(const engine__source *s, const st_tensor *t, dsa_type *type) {
    static const struct { const char *name; dsa_type type; } known[4] = { { "F32", DSA_F32 }, { "BF16", DSA_BF16 }, { "F16", DSA_F16 }, { "F8_E4M3", DSA_FP8 } };
    for (int i = 0; i < 4; i++)
        if (strcmp(t->dtype, known[i].name) == 0) { *type = known[i].type; return 0; }
    return st__fail(s->model->error, sizeof s->model->error, "%s: tensor '%s': dtype %s is no type of weights (F32, BF16, F16, F8_E4M3)", s->file, t->name, t->dtype);
}

/* A copy as f32, [n, out, in]; out and n may be 0 for vectors and single matrices. NULL: see model->error. */
static inline float *engine__f32(const engine__source *s, const char *name, int64_t n, int64_t out, int64_t in) {
    const st_tensor *t = engine__find(s, name, n, out, in);
    const float *scales = NULL;
    dsa_type type = DSA_F32;
    if (t == NULL || engine__type(s, t, &type) != 0) return NULL;
    if (type == DSA_FP8 && out == 0) { st__fail(s->model->error, sizeof s->model->error, "%s: tensor '%s': a vector cannot be F8_E4M3", s->file, t->name); return NULL; }
    if (type == DSA_FP8 && (scales = engine__scales(s, name, n, out, in)) == NULL) return NULL;
    float *w = (float *)engine__keep(s->model, (size_t)t->count, sizeof *w);
    if (w == NULL) return NULL;
    const uint16_t *half = (const uint16_t *)t->data;
    const uint8_t *byte = (const uint8_t *)t->data;
    if (type == DSA_F32) memcpy(w, t->data, t->bytes);
    else if (type == DSA_BF16) for (int64_t i = 0; i < t->count; i++) w[i] = dsa_bf16_to_f32(half[i]);
    else if (type == DSA_F16) for (int64_t i = 0; i < t->count; i++) w[i] = dsa_f16_to_f32(half[i]);
    else for (int64_t i = 0; i < t->count; i++) {
        int64_t row = i / in, column = i % in, block_row = row / out * ((out + 127) / 128) + row % out / 128;
        w[i] = dsa_e4m3_to_f32(byte[i]) * scales[block_row * ((in + 127) / 128) + column / 128];
    }
    return w;
}

/* A weight of dsa_layer: f32, or as stored with ENGINE_AS_STORED. */
static inline int engine__tensor(const engine__source *s, const char *name, int64_t out, int64_t in, dsa_tensor *w) {
    memset(w, 0, sizeof *w);
    if ((s->flags & ENGINE_AS_STORED) == 0) {
        w->data = engine__f32(s, name, 0, out, in);
        return w->data == NULL ? ENGINE_FAILED : 0;
    }
    const st_tensor *t = engine__find(s, name, 0, out, in);
    if (t == NULL || engine__type(s, t, &w->type) != 0) return ENGINE_FAILED;
    void *copy = engine__keep(s->model, t->bytes, 1);
    if (copy == NULL) return ENGINE_FAILED;
    w->data = memcpy(copy, t->data, t->bytes);
    if (w->type != DSA_FP8) return 0;
    if (out == 0) return st__fail(s->model->error, sizeof s->model->error, "%s: tensor '%s': a vector cannot be F8_E4M3", s->file, t->name);
    const float *scales = engine__scales(s, name, 0, out, in);
    size_t n_scales = (size_t)((out + 127) / 128 * ((in + 127) / 128));
    float *kept = scales == NULL ? NULL : (float *)engine__keep(s->model, n_scales, sizeof *kept);
    if (kept == NULL) return ENGINE_FAILED;
    w->scale_inv = (const float *)memcpy(kept, scales, n_scales * sizeof *kept);
    return 0;
}

/* gate_proj, up_proj and down_proj below `stem`. */
static inline int engine__mlp(const engine__source *s, const char *stem, int32_t inter, engine_mlp *mlp) {
    char name[256];
    int64_t hidden = s->model->dim_hidden;
    mlp->inter = inter;
    snprintf(name, sizeof name, "%s.gate_proj.weight", stem);
    if ((mlp->gate = engine__f32(s, name, 0, inter, hidden)) == NULL) return ENGINE_FAILED;
    snprintf(name, sizeof name, "%s.up_proj.weight", stem);
    if ((mlp->up = engine__f32(s, name, 0, inter, hidden)) == NULL) return ENGINE_FAILED;
    snprintf(name, sizeof name, "%s.down_proj.weight", stem);
    return (mlp->down = engine__f32(s, name, 0, hidden, inter)) == NULL ? ENGINE_FAILED : 0;
}

static inline int engine__experts(const engine__source *s, int32_t layer, engine_block *b) {
    engine_model *m = s->model;
    char name[200], full[256];
    int64_t n = m->n_experts, inter = m->dim_expert, hidden = m->dim_hidden;
    snprintf(name, sizeof name, "model.layers.%ld.mlp.gate.weight", (long)layer);
    if ((b->router = engine__f32(s, name, 0, n, hidden)) == NULL) return ENGINE_FAILED;
    snprintf(name, sizeof name, "model.layers.%ld.mlp.gate.e_score_correction_bias", (long)layer);
    if ((b->router_bias = engine__f32(s, name, 0, 0, n)) == NULL) return ENGINE_FAILED;
    snprintf(name, sizeof name, "model.layers.%ld.mlp.shared_experts", (long)layer);
    if (m->n_shared_experts > 0 && engine__mlp(s, name, m->n_shared_experts * m->dim_expert, &b->mlp) != 0) return ENGINE_FAILED;
    if ((b->experts = (engine_mlp *)engine__keep(m, (size_t)n, sizeof *b->experts)) == NULL) return ENGINE_FAILED;
    snprintf(name, sizeof name, "model.layers.%ld.mlp.experts.gate_up_proj", (long)layer);
    snprintf(full, sizeof full, "%s%s", s->prefix, name);
    if (st_find(s->tensors, full) == NULL) {              /* one set of tensors per expert */
        for (int32_t e = 0; e < n; e++) {
            snprintf(name, sizeof name, "model.layers.%ld.mlp.experts.%ld", (long)layer, (long)e);
            if (engine__mlp(s, name, m->dim_expert, &b->experts[e]) != 0) return ENGINE_FAILED;
        }
        return 0;
    }
    const float *gate_up = engine__f32(s, name, n, 2 * inter, hidden);
    snprintf(name, sizeof name, "model.layers.%ld.mlp.experts.down_proj", (long)layer);
    const float *down = gate_up == NULL ? NULL : engine__f32(s, name, n, hidden, inter);
    if (down == NULL) return ENGINE_FAILED;
    for (int64_t e = 0; e < n; e++) {
        b->experts[e].gate = gate_up + e * 2 * inter * hidden;
        b->experts[e].up = b->experts[e].gate + inter * hidden;
        b->experts[e].down = down + e * hidden * inter;
        b->experts[e].inter = m->dim_expert;
    }
    return 0;
}

static inline int engine__block(const engine__source *s, int32_t layer, engine_block *b) {
    const dsa_config *c = &s->model->dsa;
    dsa_layer_weights *w = &b->attention;
    int64_t heads = c->n_heads, hidden = c->dim_hidden, nope = c->dim_nope, rope = c->dim_rope, latent = c->dim_latent;
    const struct { const char *name; int64_t out, in; dsa_tensor *to; int indexer; } table[] = {
        { "q_a_proj.weight",               c->dim_q_lora,            hidden,        &w->q_a, 0 },
        { "q_a_layernorm.weight",          0,                        c->dim_q_lora, &w->q_a_norm, 0 },
        { "q_b_proj.weight",               heads * (nope + rope),    c->dim_q_lora, &w->q_b, 0 },
        { "kv_a_proj_with_mqa.weight",     latent + rope,            hidden,        &w->kv_a, 0 },
        { "kv_a_layernorm.weight",         0,                        latent,        &w->kv_a_norm, 0 },
        { "kv_b_proj.weight",              heads * (nope + c->dim_v), latent,       &w->kv_b, 0 },
        { "o_proj.weight",                 hidden,                   heads * c->dim_v, &w->o, 0 },
        { "indexer.wq_b.weight",           (int64_t)c->n_index_heads * c->dim_index, c->dim_q_lora, &w->index_q_b, 1 },
        { "indexer.wk.weight",             c->dim_index,             hidden,        &w->index_k, 1 },
        { "indexer.k_norm.weight",         0,                        c->dim_index,  &w->index_k_norm, 1 },
        { "indexer.k_norm.bias",           0,                        c->dim_index,  &w->index_k_bias, 1 },
        { "indexer.weights_proj.weight",   c->n_index_heads,         hidden,        &w->index_w, 1 } };
    char name[200];
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        if (table[i].indexer && !b->has_indexer) continue;
        snprintf(name, sizeof name, "model.layers.%ld.self_attn.%s", (long)layer, table[i].name);
        if (engine__tensor(s, name, table[i].out, table[i].in, table[i].to) != 0) return ENGINE_FAILED;
    }
    snprintf(name, sizeof name, "model.layers.%ld.input_layernorm.weight", (long)layer);
    if ((b->input_norm = engine__f32(s, name, 0, 0, hidden)) == NULL) return ENGINE_FAILED;
    snprintf(name, sizeof name, "model.layers.%ld.post_attention_layernorm.weight", (long)layer);
    if ((b->post_norm = engine__f32(s, name, 0, 0, hidden)) == NULL) return ENGINE_FAILED;
    if (b->mlp.inter == 0) return engine__experts(s, layer, b);
    snprintf(name, sizeof name, "model.layers.%ld.mlp", (long)layer);
    return engine__mlp(s, name, b->mlp.inter, &b->mlp);
}

static inline int engine__load(engine_model *m, const st_file *tensors, const char *file, const js_value *config, const char *config_file, int flags) {
    engine__source s = { m, config_file, st_find(tensors, "w.model.embed_tokens.weight") != NULL ? "w." : "", tensors, flags };
    int status = engine__config(&s, config);
    if (status != 0) return status;
    s.file = file;
    int64_t hidden = m->dim_hidden;
    if ((m->embedding = engine__f32(&s, "model.embed_tokens.weight", 0, m->n_vocab, hidden)) == NULL) return ENGINE_FAILED;
    if ((m->final_norm = engine__f32(&s, "model.norm.weight", 0, 0, hidden)) == NULL) return ENGINE_FAILED;
    m->lm_head = m->tied ? m->embedding : engine__f32(&s, "lm_head.weight", 0, m->n_vocab, hidden);
    if (m->lm_head == NULL) return ENGINE_FAILED;
    for (int32_t i = 0; i < m->n_layers; i++)
        if (engine__block(&s, i, &m->blocks[i]) != 0) return ENGINE_FAILED;
    return 0;
}

/* A model from one open file that carries its config as metadata (the golden model files; weights named w.model...).
   0, ENGINE_FAILED or ENGINE_UNSUPPORTED with m->error; the file may be closed afterwards. engine_unload() in any case. */
static inline int engine_load_file(engine_model *m, const st_file *tensors, const char *file, int flags) {
    char why[200];
    memset(m, 0, sizeof *m);
    const char *text = st_metadata(tensors, "config");
    if (text == NULL) return st__fail(m->error, sizeof m->error, "%s: __metadata__: 'config' is missing", file);
    js_value *config = js_parse(text, strlen(text), why, sizeof why);
    if (config == NULL) return st__fail(m->error, sizeof m->error, "%s: __metadata__: 'config': %s", file, why);
    int status = engine__load(m, tensors, file, config, file, flags);
    js_free(config);
    return status;
}

/* A model from a Hugging Face folder: config.json and model.safetensors. Returns as engine_load_file. */
static inline int engine_load_dir(engine_model *m, const char *dir, int flags) {
    char path[1024], config_path[1024], why[200];
    st_file tensors;
    size_t n;
    memset(m, 0, sizeof *m);
    if (strlen(dir) > sizeof path - 32) return st__fail(m->error, sizeof m->error, "the path of the model folder is too long");
    snprintf(config_path, sizeof config_path, "%s/config.json", dir);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    char *text = st_read_file(config_path, &n, m->error, sizeof m->error);
    if (text == NULL) return ENGINE_FAILED;
    js_value *config = js_parse(text, n, why, sizeof why);
    free(text);
    if (config == NULL) return st__fail(m->error, sizeof m->error, "%s: %s", config_path, why);
    int status = st_open(path, &tensors, m->error, sizeof m->error);
    if (status == 0) {
        status = engine__load(m, &tensors, path, config, config_path, flags);
        st_close(&tensors);
    }
    js_free(config);
    return status;
}

/* ---- matrices ----------------------------------------------------------------------------------------------------- */
/* sum[64] += one row of A times a panel [depth, 64] of B, in ascending order of p. The inner loop runs over columns, so that a
   compiler may vectorise it without changing a sum; it is too long to be unrolled away, which is what makes gcc -O2, gcc -O3
   and clang all do so (a 4 x 8 tile is twice as fast in some of them and four times as slow in others). */
static inline void engine__row(int64_t depth, const float *a, const float *restrict panel, float *restrict sum) {
    int64_t p = 0;
    for (; p + 4 <= depth; p += 4) {
        const float *w = panel + p * 64;
        float x0 = a[p], x1 = a[p + 1], x2 = a[p + 2], x3 = a[p + 3];
        for (int j = 0; j < 64; j++) sum[j] = (((sum[j] + x0 * w[j]) + x1 * w[64 + j]) + x2 * w[128 + j]) + x3 * w[192 + j];
    }
    for (; p < depth; p++)
        for (int j = 0; j < 64; j++) sum[j] += a[p] * panel[p * 64 + j];
}

/* Columns [n0, n1) of C[m, n] = A[m, k] . B[n, k]^T. */
static inline void engine__columns(int64_t m, int64_t n0, int64_t n1, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc) {
    enum { DEPTH = 64 };
    float panel[DEPTH * 64], sum[64];
    for (int64_t j0 = n0; j0 < n1; j0 += 64) {
        int64_t width = n1 - j0 < 64 ? n1 - j0 : 64;
        memset(panel, 0, sizeof panel);                   /* columns behind the last are computed and dropped */
        for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
            int64_t depth = k - k0 < DEPTH ? k - k0 : DEPTH;
            for (int64_t j = 0; j < width; j++)
                for (int64_t p = 0; p < depth; p++) panel[p * 64 + j] = b[(j0 + j) * ldb + k0 + p];
            for (int64_t i = 0; i < m; i++) {
                memset(sum, 0, sizeof sum);
                if (k0 > 0) memcpy(sum, c + i * ldc + j0, (size_t)width * sizeof *c);
                engine__row(depth, a + i * lda + k0, panel, sum);
                memcpy(c + i * ldc + j0, sum, (size_t)width * sizeof *c);
            }
        }
    }
}

typedef struct engine__product {   /* C = A B^T, or C = silu(A B^T) * (A up^T) */
    int64_t m, n, k;
    const float *a, *b, *up;
    float *c, *c_up;
    int32_t n_tasks;
} engine__product;

static inline void engine__swiglu(const engine__product *p, int64_t n0, int64_t n1) {
    for (int64_t i = 0; i < p->m; i++)
        for (int64_t j = n0; j < n1; j++) {
            float g = p->c[i * p->n + j];
            p->c[i * p->n + j] = g / (1.0f + expf(-g)) * p->c_up[i * p->n + j];
        }
}

static inline void engine__product_task(void *arg, int32_t task) {
    const engine__product *p = (const engine__product *)arg;
    int64_t panels = (p->n + 63) / 64, n0 = panels * task / p->n_tasks * 64, n1 = panels * (task + 1) / p->n_tasks * 64;
    if (n1 > p->n) n1 = p->n;
    engine__columns(p->m, n0, n1, p->k, p->a, p->k, p->b, p->k, p->c, p->n);
    if (p->up == NULL) return;
    engine__columns(p->m, n0, n1, p->k, p->a, p->k, p->up, p->k, p->c_up, p->n);
    engine__swiglu(p, n0, n1);
}

static inline void engine__multiply(engine *e, engine__product *p) {
    if (e->options.gemm != NULL) {
        e->options.gemm(e->options.gemm_user, p->m, p->n, p->k, p->a, p->k, p->b, p->k, p->c, p->n);
        if (p->up == NULL) return;
        e->options.gemm(e->options.gemm_user, p->m, p->n, p->k, p->a, p->k, p->up, p->k, p->c_up, p->n);
        engine__swiglu(p, 0, p->n);
        return;
    }
    p->n_tasks = e->options.n_threads;
    if (e->pool != NULL) dsa_pool_run(e->pool, p->n_tasks, engine__product_task, p);
    else engine__product_task(p, 0);
}

/* C[m, n] = A[m, k] . B[n, k]^T, all tight. */
static inline void engine_matmul(engine *e, int64_t m, int64_t n, int64_t k, const float *a, const float *b, float *c) {
    engine__product p = { m, n, k, a, b, NULL, c, NULL, 1 };
    engine__multiply(e, &p);
}

/* ---- the engine --------------------------------------------------------------------------------------------------- */
static inline int engine__fail(engine *e, const char *what, long layer, dsa_status status) {
    if (layer >= 0) return st__fail(e->error, sizeof e->error, "%s, layer %ld: %s%s%s", what, layer, dsa_status_text(status), e->detail[0] != '\0' ? ": " : "", e->detail);
    return st__fail(e->error, sizeof e->error, "%s: %s%s%s", what, dsa_status_text(status), e->detail[0] != '\0' ? ": " : "", e->detail);
}

static inline void engine_close(engine *e) {
    if (e->model != NULL)
        for (int32_t i = 0; i < e->model->n_layers; i++) {
            if (e->latent != NULL) dsa_cache_destroy(&e->latent[i]);
            if (e->index != NULL) dsa_cache_destroy(&e->index[i]);
        }
    dsa_pool_destroy(e->pool);
    free(e->latent); free(e->index); free(e->x); free(e->norm); free(e->y); free(e->hidden); free(e->gate); free(e->down);
    free(e->router); free(e->group_score); free(e->mark); free(e->list); free(e->workspace);
    e->model = NULL; e->pool = NULL; e->latent = e->index = NULL; e->workspace = NULL; e->workspace_size = 0; e->list = NULL;
    e->x = e->norm = e->y = e->hidden = e->gate = e->down = e->router = e->group_score = NULL; e->mark = NULL;
}

/* Switches between DSA, dense and window and sets k; the caches stay as they are. 0 or ENGINE_FAILED. */
static inline int engine_set_attention(engine *e, dsa_layer_mode mode, int32_t top_k) {
    dsa_config c = e->model->dsa;
    if (top_k > 0) c.top_k = top_k;
    c.isa = e->options.isa;
    c.precision = e->options.precision;
    c.hadamard = e->options.hadamard;
    c.n_threads = e->options.n_threads;
    if (e->pool != NULL) { c.parallel_for = dsa_pool_run; c.parallel_user = e->pool; }
    c.gemm = e->options.gemm;
    c.gemm_user = e->options.gemm_user;
    c.cuda = e->options.cuda;
    c.detail = e->detail;
    c.detail_size = sizeof e->detail;
    e->detail[0] = '\0';
    dsa_status status = dsa_init(&e->ctx, &c);
    if (status != DSA_OK) return engine__fail(e, "dsa_init", -1, status);
    e->options.mode = mode;
    e->options.top_k = c.top_k;
    int32_t *list = (int32_t *)realloc(e->list, (size_t)ENGINE_CHUNK * (size_t)c.top_k * sizeof *list);
    if (list == NULL) return st__fail(e->error, sizeof e->error, "out of memory for index lists");
    e->list = list;
    return 0;
}

static inline int engine__open(engine *e) {
    const engine_model *m = e->model;
    dsa_status status;
    if (e->options.n_threads > 1 && (status = dsa_pool_create(NULL, e->options.n_threads, &e->pool)) != DSA_OK) return engine__fail(e, "dsa_pool_create", -1, status);
    if (engine_set_attention(e, e->options.mode, e->options.top_k) != 0) return ENGINE_FAILED;
    size_t hidden = ENGINE_CHUNK * (size_t)m->dim_hidden * sizeof(float), inter = 1;
    for (int32_t i = 0; i < m->n_layers; i++) {
        if ((size_t)m->blocks[i].mlp.inter > inter) inter = (size_t)m->blocks[i].mlp.inter;
        if (m->blocks[i].experts != NULL && (size_t)m->dim_expert > inter) inter = (size_t)m->dim_expert;
    }
    e->latent = (dsa_cache *)calloc((size_t)m->n_layers, sizeof *e->latent);
    e->index = (dsa_cache *)calloc((size_t)m->n_layers, sizeof *e->index);
    e->x = (float *)malloc(hidden);
    e->norm = (float *)malloc(hidden);
    e->y = (float *)malloc(hidden);
    e->hidden = (float *)malloc(hidden);
    e->down = (float *)malloc(hidden);
    e->gate = (float *)malloc(2 * ENGINE_CHUNK * inter * sizeof(float));       /* gate and up */
    e->router = (float *)malloc(ENGINE_CHUNK * ((size_t)m->n_experts + 1) * sizeof(float));   /* + 1: never zero bytes */
    e->group_score = (float *)malloc(((size_t)m->n_groups + 1) * sizeof(float));
    e->mark = (char *)malloc((size_t)m->n_groups + (size_t)m->n_experts + 1);
    if (e->latent == NULL || e->index == NULL || e->x == NULL || e->norm == NULL || e->y == NULL || e->hidden == NULL || e->down == NULL || e->gate == NULL || e->router == NULL || e->group_score == NULL || e->mark == NULL)
        return st__fail(e->error, sizeof e->error, "out of memory for the engine's buffers");
    for (int32_t i = 0; i < m->n_layers; i++) {
        dsa_cache_desc d;
        memset(&d, 0, sizeof d);
        d.kind = DSA_LATENT;
        d.format = e->options.latent_format;
        d.capacity = e->options.max_tokens;
        d.page_size = e->options.page_size;
        d.device = DSA_DEVICE_AUTO;
        if ((status = dsa_cache_create(&e->ctx, &d, &e->latent[i])) != DSA_OK) return engine__fail(e, "latent cache", i, status);
        d.kind = DSA_INDEX_KEY;
        d.format = e->options.index_format;
        if (m->blocks[i].has_indexer && (status = dsa_cache_create(&e->ctx, &d, &e->index[i])) != DSA_OK) return engine__fail(e, "index cache", i, status);
    }
    return 0;
}

/* Set-up: context, pool, caches and scratch. 0, or ENGINE_FAILED with e->error (nothing is left to close then). */
static inline int engine_open(engine *e, const engine_model *m, const engine_options *options) {
    memset(e, 0, sizeof *e);
    e->model = m;
    e->options = *options;
    if (e->options.n_threads < 1) e->options.n_threads = 1;
    if (e->options.max_tokens < 1) return st__fail(e->error, sizeof e->error, "engine: max_tokens must be at least 1");
    int status = engine__open(e);
    if (status != 0) engine_close(e);
    return status;
}

/* Forgets all tokens behind the first n. */
static inline int engine_truncate(engine *e, int64_t n) {
    dsa_status status = n < 0 || n > e->len ? DSA_ERR_ARGUMENT : DSA_OK;
    for (int32_t i = 0; status == DSA_OK && i < e->model->n_layers; i++) {
        status = dsa_cache_truncate(&e->ctx, &e->latent[i], n);
        if (status == DSA_OK && e->model->blocks[i].has_indexer) status = dsa_cache_truncate(&e->ctx, &e->index[i], n);
    }
    if (status != DSA_OK) return engine__fail(e, "truncate", -1, status);
    e->len = n;
    return 0;
}

static inline int engine_reset(engine *e) { return engine_truncate(e, 0); }

/* One attention layer alone: appends n rows to that layer's caches. Lists as in dsa_layer. Mixing this with
   engine_forward is up to the caller: e->len does not move. */
static inline int engine_attention(engine *e, int32_t layer, const float *x, int32_t n, float *y, const int32_t *indices_in, int32_t *indices_out) {
    const engine_block *b = &e->model->blocks[layer];
    dsa_seq seq;
    dsa_layer_args args;
    size_t need;
    memset(&seq, 0, sizeof seq);
    memset(&args, 0, sizeof args);
    seq.latent = &e->latent[layer];
    seq.index = b->has_indexer ? &e->index[layer] : NULL;
    seq.n_q = n;
    args.weights = &b->attention;
    args.n_seqs = 1;
    args.seqs = &seq;
    args.x = x;
    args.y = y;
    args.mode = e->options.mode;
    args.indices_in = indices_in;
    args.indices_out = indices_out;
    e->detail[0] = '\0';
    dsa_status status = dsa_layer_workspace(&e->ctx, &args, &need);
    if (status != DSA_OK) return engine__fail(e, "dsa_layer_workspace", layer, status);
    if (need > e->workspace_size) {
        free(e->workspace);
        e->workspace = malloc(need);
        e->workspace_size = e->workspace != NULL ? need : 0;
        if (e->workspace == NULL) return st__fail(e->error, sizeof e->error, "out of memory for the workspace");
    }
    args.workspace = e->workspace;
    args.workspace_size = e->workspace_size;
    status = dsa_layer(&e->ctx, &args);
    return status == DSA_OK ? 0 : engine__fail(e, "dsa_layer", layer, status);
}

/* out[rows, hidden] = down . (silu(gate . x) * (up . x)) */
static inline void engine__run_mlp(engine *e, const engine_mlp *mlp, const float *x, int64_t rows, float *out) {
    engine__product p = { rows, mlp->inter, e->model->dim_hidden, x, mlp->gate, mlp->up, e->gate, e->gate + (int64_t)ENGINE_CHUNK * mlp->inter, 1 };
    engine__multiply(e, &p);
    engine_matmul(e, rows, e->model->dim_hidden, mlp->inter, e->gate, mlp->down, out);
}

/* The router of one token: logits [n_experts] in, weights out (0 for experts that are not used). Sigmoid scores plus bias
   choose: first the groups, by the sum of their two best, then the experts inside them; the plain scores weigh.
   Ties go to the lower number. group_score [n_groups], group_in [n_groups] and used [n_experts] are scratch. */
static inline void engine__route(const engine_model *m, const float *bias, float *w, float *group_score, char *group_in, char *used) {
    int32_t n = m->n_experts, size = n / m->n_groups;
    float total = 0;
    for (int32_t i = 0; i < n; i++) w[i] = 1.0f / (1.0f + expf(-w[i]));
    memset(group_in, 0, (size_t)m->n_groups);
    memset(used, 0, (size_t)n);
    for (int32_t g = 0; g < m->n_groups; g++) {
        float one = -INFINITY, two = -INFINITY;
        for (int32_t i = g * size; i < (g + 1) * size; i++) {
            float score = w[i] + bias[i];
            if (score > one) { two = one; one = score; } else if (score > two) two = score;
        }
        group_score[g] = size > 1 ? one + two : one;
    }
    for (int32_t pick = 0; pick < m->n_groups_used; pick++) {
        int32_t best = -1;
        for (int32_t g = 0; g < m->n_groups; g++)
            if (!group_in[g] && (best < 0 || group_score[g] > group_score[best])) best = g;
        group_in[best] = 1;
    }
    for (int32_t pick = 0; pick < m->n_experts_used; pick++) {
        int32_t best = -1;
        for (int32_t i = 0; i < n; i++)
            if (group_in[i / size] && !used[i] && (best < 0 || w[i] + bias[i] > w[best] + bias[best])) best = i;
        used[best] = 1;
        total += w[best];
    }
    float scale = m->expert_scale / (m->norm_expert_weights ? total + 1e-20f : 1.0f);
    for (int32_t i = 0; i < n; i++) w[i] = used[i] ? w[i] * scale : 0.0f;
}

/* x [rows, hidden] -> out: shared experts plus the weighted sum of the chosen ones, in the order of the experts. */
static inline void engine__run_experts(engine *e, const engine_block *b, const float *x, int64_t rows, float *out) {
    const engine_model *m = e->model;
    int64_t hidden = m->dim_hidden, n = m->n_experts;
    if (b->mlp.inter > 0) engine__run_mlp(e, &b->mlp, x, rows, out);
    else memset(out, 0, (size_t)(rows * hidden) * sizeof *out);
    engine_matmul(e, rows, n, hidden, x, b->router, e->router);
    for (int64_t r = 0; r < rows; r++) engine__route(m, b->router_bias, e->router + r * n, e->group_score, e->mark, e->mark + m->n_groups);
    for (int64_t k = 0; k < n; k++) {
        int64_t used = 0;
        for (int64_t r = 0; r < rows; r++)
            if (e->router[r * n + k] != 0) memcpy(e->hidden + used++ * hidden, x + r * hidden, (size_t)hidden * sizeof *x);
        if (used == 0) continue;
        engine__run_mlp(e, &b->experts[k], e->hidden, used, e->down);
        used = 0;
        for (int64_t r = 0; r < rows; r++) {
            float weight = e->router[r * n + k];
            if (weight == 0) continue;
            for (int64_t i = 0; i < hidden; i++) out[r * hidden + i] += weight * e->down[used * hidden + i];
            used++;
        }
    }
}

/* Rows [row, row + rows) of a call, through all layers; e->x then holds the final residual. */
static inline int engine__chunk(engine *e, const int32_t *tokens, int64_t row, int32_t rows, const engine_hooks *hooks) {
    const engine_model *m = e->model;
    int64_t hidden = m->dim_hidden, size = rows * hidden, k = e->options.top_k;
    const int32_t *list = NULL;      /* of the newest layer with an indexer */
    for (int32_t r = 0; r < rows; r++) memcpy(e->x + r * hidden, m->embedding + tokens[row + r] * hidden, (size_t)hidden * sizeof(float));
    for (int32_t l = 0; l < m->n_layers; l++) {
        const engine_block *b = &m->blocks[l];
        int32_t *own = NULL;
        memcpy(e->norm, e->x, (size_t)size * sizeof(float));
        dsa_rms_norm(e->norm, rows, hidden, m->dim_hidden, b->input_norm, m->norm_eps);
        if (hooks != NULL && hooks->attn_in_forced != NULL && hooks->attn_in_forced[l] != NULL) memcpy(e->norm, hooks->attn_in_forced[l] + row * hidden, (size_t)size * sizeof(float));
        if (hooks != NULL && hooks->attn_in != NULL && hooks->attn_in[l] != NULL) memcpy(hooks->attn_in[l] + row * hidden, e->norm, (size_t)size * sizeof(float));
        if (e->options.mode == DSA_LAYER_SPARSE) {
            if (hooks != NULL && hooks->lists_in != NULL && hooks->lists_in[l] != NULL) list = hooks->lists_in[l] + row * k;
            else if (b->has_indexer) { own = e->list; list = NULL; }
        }
        if (engine_attention(e, l, e->norm, rows, e->y, list, own) != 0) return ENGINE_FAILED;
        if (own != NULL) list = own;
        if (list != NULL && hooks != NULL && hooks->lists_out != NULL && hooks->lists_out[l] != NULL) memcpy(hooks->lists_out[l] + row * k, list, (size_t)(rows * k) * sizeof *list);
        if (hooks != NULL && hooks->attn_out != NULL && hooks->attn_out[l] != NULL) memcpy(hooks->attn_out[l] + row * hidden, e->y, (size_t)size * sizeof(float));
        for (int64_t i = 0; i < size; i++) e->x[i] += e->y[i];
        memcpy(e->norm, e->x, (size_t)size * sizeof(float));
        dsa_rms_norm(e->norm, rows, hidden, m->dim_hidden, b->post_norm, m->norm_eps);
        if (b->experts != NULL) engine__run_experts(e, b, e->norm, rows, e->y);
        else engine__run_mlp(e, &b->mlp, e->norm, rows, e->y);
        for (int64_t i = 0; i < size; i++) e->x[i] += e->y[i];
    }
    return 0;
}

/* Feeds n tokens behind those already fed. logits (may be NULL if n_logits is 0) gets one row of n_vocab for each of the
   last n_logits tokens. On an error the engine is as before the call. */
static inline int engine_forward(engine *e, const int32_t *tokens, int32_t n, float *logits, int32_t n_logits, const engine_hooks *hooks) {
    const engine_model *m = e->model;
    int64_t hidden = m->dim_hidden, first = (int64_t)n - n_logits;
    if (n < 1 || n_logits < 0 || n_logits > n) return st__fail(e->error, sizeof e->error, "engine_forward: n or n_logits is out of range");
    if (n > e->options.max_tokens - e->len) return st__fail(e->error, sizeof e->error, "engine_forward: %ld tokens do not fit behind %lld of %lld", (long)n, (long long)e->len, (long long)e->options.max_tokens);
    for (int32_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= m->n_vocab) return st__fail(e->error, sizeof e->error, "engine_forward: token %ld is %ld, the vocabulary has %ld", (long)i, (long)tokens[i], (long)m->n_vocab);
    for (int64_t row = 0; row < n; row += ENGINE_CHUNK) {
        int32_t rows = n - row < ENGINE_CHUNK ? (int32_t)(n - row) : ENGINE_CHUNK;
        if (engine__chunk(e, tokens, row, rows, hooks) != 0) {
            for (int32_t i = 0; i < m->n_layers; i++) {   /* layers before the failed one are longer */
                dsa_cache_truncate(&e->ctx, &e->latent[i], e->len);
                if (m->blocks[i].has_indexer) dsa_cache_truncate(&e->ctx, &e->index[i], e->len);
            }
            return ENGINE_FAILED;
        }
        int64_t from = first > row ? first : row;
        if (from >= row + rows) continue;
        dsa_rms_norm(e->x, rows, hidden, m->dim_hidden, m->final_norm, m->norm_eps);
        engine_matmul(e, row + rows - from, m->n_vocab, hidden, e->x + (from - row) * hidden, m->lm_head, logits + (from - first) * m->n_vocab);
    }
    e->len += n;
    return 0;
}

/* Cache bytes that the newest token read, all layers: DSA scores every index key (unless all rows fit into k, when it scores
   none) and reads k latent rows; dense reads every latent row; window the newest k. */
static inline int64_t engine_bytes_per_token(const engine *e) {
    const dsa_config *c = &e->ctx.config;
    size_t latent = 0, key = 0;
    int64_t total = 0, len = e->len, kept = len < c->top_k || e->options.mode == DSA_LAYER_DENSE ? len : c->top_k;
    dsa_row_bytes(DSA_LATENT, e->options.latent_format, c->dim_latent, c->dim_rope, &latent);
    dsa_row_bytes(DSA_INDEX_KEY, e->options.index_format, c->dim_index, 0, &key);
    for (int32_t i = 0; i < e->model->n_layers; i++) {
        total += kept * (int64_t)latent;
        if (e->options.mode == DSA_LAYER_SPARSE && e->model->blocks[i].has_indexer && len > kept) total += len * (int64_t)key;
    }
    return total;
}

static inline int32_t engine_argmax(const float *row, int32_t n) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (row[i] > row[best]) best = i;
    return best;
}

/* ---- command lines ------------------------------------------------------------------------------------------------ */
/* Each returns 0, or -1 if the text is no such thing. */
static inline int engine_parse_int(const char *text, int64_t low, int64_t high, int64_t *out) {
    char *end;
    long long x = strtoll(text, &end, 10);
    if (end == text || *end != '\0' || x < low || x > high) return -1;
    *out = x;
    return 0;
}

static inline int engine_parse_mode(const char *text, dsa_layer_mode *mode) {
    if (strcmp(text, "dsa") == 0) *mode = DSA_LAYER_SPARSE;
    else if (strcmp(text, "dense") == 0) *mode = DSA_LAYER_DENSE;
    else if (strcmp(text, "window") == 0) *mode = DSA_LAYER_WINDOW;
    else return -1;
    return 0;
}

static inline int engine_parse_isa(const char *text, dsa_isa *isa) {
    for (int i = DSA_ISA_AUTO; i <= DSA_ISA_AVX512_BASE; i++)
        if (strcmp(text, dsa_isa_name((dsa_isa)i)) == 0) { *isa = (dsa_isa)i; return 0; }
    return -1;
}

/* splitmix64: small, and the same on every machine, so that a seed names a document and a sampled text for good. */
static inline uint64_t engine_random(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

#endif /* ENGINE_H_INCLUDED */

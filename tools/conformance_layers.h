/* conformance_layers.h - files that hold attention layers of other models: `attn_in`, `attn_out`, what was selected, weights.

   The projections, gates and norms around the mechanism are written here, once for each family of layers (absorbed MLA,
   grouped queries, DeepSeek-V4); the mechanism is the library's: append or compress, score_select, attend. A preset and the numbers
   of the file's config are all that tells the models apart there. Each layer is fed its own attn_in, token by token, in ragged
   chunks and in one go, over contiguous and over paged f32 caches. */
#ifndef CONFORMANCE_LAYERS_H
#define CONFORMANCE_LAYERS_H

#define LAYER_BOUND 5e-6         /* the wanted 2e-5 would not see a wrong eps (tests/vectors/models/README.md) */
#define ENTRY_BOUND 1e-5         /* V4's index scores, whose size is up to 3 */

typedef enum layer_family { FAMILY_MLA, FAMILY_GROUPED, FAMILY_V4 } layer_family;

typedef struct layer_file {
    const run *r;
    const st_file *file;
    js_value *config;
    const char *type;
    layer_family family;
    dsa_preset preset;
    dsa_config base;             /* preset, numbers of the file, options of the run */
    int32_t n_tokens;
    int layer, bad;
    char prefix[64];
} layer_file;

/* One layer at work: its caches, and what it reads besides weights. */
typedef struct layer_run {
    layer_file *f;
    dsa_ctx ctx;
    int has_indexer, compresses;
    int32_t n_heads, dim_k, dim_o, n_lists;
    int64_t length;
    store latent, value, index, entries;
    dsa_compressor index_pool, entry_pool;
    void *index_memory, *entry_memory;
    float *gain[4];              /* vectors that compressors point to: index gain, bias, gate bias; entry gain */
    float *entry_bias;
    int32_t *lists;              /* [n_tokens, n_lists, length] this layer's, or those of the layer that it shares */
    int64_t done;
} layer_run;

/* ---- numbers and weights of the file -------------------------------------------------------- */
static int32_t layer_int(layer_file *f, const char *key)
{
    const js_value *v = js_get(f->config, key);
    double x = js_number(v);
    if (!js_is_number(v) || !(x >= 0 && x <= 1 << 20) || x != (double)(int32_t)x) {
        bad_file(f->r, "config: %s is missing or no count", key);
        f->bad = 1;
        return 1;
    }
    return (int32_t)x;
}

static const st_tensor *layer_tensor(layer_file *f, const char *name)
{
    char full[160];
    snprintf(full, sizeof full, "%s%s", f->prefix, name);
    return st_find(f->file, full);
}

/* A vector or small matrix as floats, or NULL with f->bad set. The caller frees it. */
static float *layer_floats(layer_file *f, const char *name, int64_t count)
{
    const st_tensor *t = layer_tensor(f, name);
    if (!t || t->count != count) {
        bad_file(f->r, "layer %d: %s is missing or has another size", f->layer, name);
        f->bad = 1;
        return (float *)memset(allocate_floats(count), 0, sizeof(float) * (size_t)count);
    }
    float *x = tensor_floats(f->r, t);
    f->bad |= x == NULL;
    return x ? x : (float *)memset(allocate_floats(count), 0, sizeof(float) * (size_t)count);
}

/* y [n, out] = x [n, in] W^T for rows [first, first + out) of a weight. The caller frees it. */
static float *layer_project(layer_run *l, const float *x, int64_t n, int32_t in, const char *name, int32_t first, int32_t out)
{
    const st_tensor *t = layer_tensor(l->f, name);
    float *y = allocate_floats(n * out);
    memset(y, 0, sizeof(float) * (size_t)(n * out));
    if (!t || t->rank != 2 || t->shape[1] != in || t->shape[0] < first + out || !(has_dtype(t, "BF16") || has_dtype(t, "F32"))) {
        bad_file(l->f->r, "layer %d: %s is missing or has another shape", l->f->layer, name);
        l->f->bad = 1;
        return y;
    }
    int f32 = has_dtype(t, "F32");
    dsa_linear_args a = { 0 };
    a.n_rows = n;
    a.dim_in = in;
    a.dim_out = out;
    a.w.data = (const unsigned char *)t->data + (size_t)first * (size_t)in * (f32 ? 4u : 2u);
    a.w.type = f32 ? DSA_F32 : DSA_BF16;
    a.x = x;
    a.y = y;
    size_t bytes = 0;
    l->f->bad |= dsa_linear_workspace(&l->ctx, &a, &bytes) != DSA_OK;
    a.workspace = poisoned(bytes);
    a.workspace_size = bytes;
    l->f->bad |= dsa_linear(&l->ctx, &a) != DSA_OK;
    free(a.workspace);
    return y;
}

static void layer_norm(layer_run *l, dsa_norm norm, float *x, int64_t n, int64_t stride, int32_t dim, const char *name, double eps)
{
    char bias_name[128];
    float *gain = name ? layer_floats(l->f, name, dim) : NULL, *bias = NULL;
    if (norm == DSA_NORM_LAYER) {
        snprintf(bias_name, sizeof bias_name, "%.*sbias", (int)(strlen(name) - strlen("weight")), name);
        bias = layer_floats(l->f, bias_name, dim);
    }
    l->f->bad |= dsa_norm_rows(norm, x, n, stride, dim, gain, bias, (float)eps) != DSA_OK;
    free(gain);
    free(bias);
}

static void layer_rope(layer_run *l, dsa_rope rope, float *x, int64_t n, int32_t heads, int32_t dim, const int64_t *positions, int inverse)
{
    l->f->bad |= dsa_rope_rows(x, n, (int64_t)heads * dim, heads, dim, dim, &rope, positions, inverse) != DSA_OK;
}

/* ---- the config: a preset, then the numbers of the file ----------------------------------------- */
static int layer_config(layer_file *f)
{
    static const struct { const char *type; dsa_preset preset; layer_family family; } models[] = {
        { "axk2", DSA_AXK2, FAMILY_MLA }, { "hy_v4", DSA_HY_V4, FAMILY_MLA }, { "glm5_next_text", DSA_GLM5_NEXT, FAMILY_MLA },
        { "minimax_m3_vl_text", DSA_MINIMAX_M3, FAMILY_GROUPED }, { "qwen4_exp_text", DSA_QWEN4_EXP, FAMILY_GROUPED },
        { "deepseek_v4", DSA_DEEPSEEK_V4_FLASH, FAMILY_V4 },
    };
    size_t i, n = sizeof models / sizeof models[0];
    const js_value *rope = js_get(f->config, "rope_parameters");
    f->type = js_string(js_get(f->config, "model_type"));
    for (i = 0; i < n && (!f->type || strcmp(f->type, models[i].type) != 0); i++) { }
    if (i == n) return bad_file(f->r, "unsupported: attention layers of model_type %s", f->type ? f->type : "(none)");
    f->preset = models[i].preset;
    f->family = models[i].family;
    dsa_config *c = &f->base;
    if (dsa_config_preset(f->preset, c) != DSA_OK) return bad_file(f->r, "the library lacks the preset");
    c->isa = f->r->base.isa;
    c->n_threads = f->r->base.n_threads;
    c->parallel_for = f->r->base.parallel_for;
    c->parallel_user = f->r->base.parallel_user;
    c->detail = f->r->base.detail;
    c->detail_size = f->r->base.detail_size;
    c->n_heads = layer_int(f, "num_attention_heads");
    c->dim_hidden = layer_int(f, "hidden_size");
    double theta = js_number(js_get(rope, "rope_theta")), factor = 1;
    if (js_is_number(js_get(rope, "partial_rotary_factor"))) factor = js_number(js_get(rope, "partial_rotary_factor"));
    if (theta > 0) c->rope_theta = theta;
    if (f->family == FAMILY_MLA) {
        int32_t rope_dim = layer_int(f, "qk_rope_head_dim"), none = rope_dim ? rope_dim : DSA_NONE;
        c->dim_latent = layer_int(f, "kv_lora_rank");
        c->dim_rope = c->index_rope_width = none;
        c->dim_q_lora = layer_int(f, "q_lora_rank");
        c->dim_nope = layer_int(f, "qk_nope_head_dim");
        c->dim_v = layer_int(f, "v_head_dim");
        c->n_index_heads = layer_int(f, "index_n_heads");
        c->dim_index = layer_int(f, "index_head_dim");
        c->top_k = layer_int(f, "index_topk");
        if (c->index_rope_offset) c->index_rope_offset = c->dim_index - rope_dim;
        if (c->stride > 1) {
            c->stride = layer_int(f, "index_kpool");
            c->top_k /= c->stride;
            c->keep_tail = js_bool(js_get(f->config, "index_kpool_always_select_tail"));
        }
    } else if (f->family == FAMILY_GROUPED) {
        c->n_kv_heads = layer_int(f, "num_key_value_heads");
        c->dim_latent = c->dim_value = layer_int(f, "head_dim");
        c->rope_width = c->index_rope_width = (int32_t)(c->dim_latent * factor);
        if (f->preset == DSA_MINIMAX_M3) {
            c->n_index_heads = c->index_groups = layer_int(f, "index_n_heads");
            c->dim_index = layer_int(f, "index_head_dim");
            c->block_size = layer_int(f, "index_block_size");
            c->top_k = layer_int(f, "index_topk_blocks");
            c->n_local_blocks = layer_int(f, "index_local_blocks");
        } else {
            c->n_index_heads = layer_int(f, "indexer_n_heads");
            c->dim_index = layer_int(f, "indexer_head_dim");
            c->stride = layer_int(f, "indexer_compress_ratio");
            c->top_k = layer_int(f, "indexer_budget") / c->stride;
        }
    } else {
        int32_t width = layer_int(f, "qk_rope_head_dim");
        c->dim_value = layer_int(f, "head_dim");
        c->dim_rope = c->index_rope_width = width;
        c->dim_latent = c->dim_value - width;
        c->softmax_scale = (float)(1 / sqrt((double)c->dim_value));
        c->dim_q_lora = layer_int(f, "q_lora_rank");
        c->n_index_heads = layer_int(f, "index_n_heads");
        c->dim_index = layer_int(f, "index_head_dim");
        c->index_rope_offset = c->dim_index - width;
        c->top_k = layer_int(f, "index_topk");
        c->window = layer_int(f, "sliding_window");
        c->rope_factor = 1;
    }
    return f->bad ? FILE_BAD : FILE_OK;
}

/* ---- caches --------------------------------------------------------------------------------- */
static void layer_cache(layer_run *l, dsa_kind kind, int64_t capacity, int32_t page, store *s)
{
    dsa_cache_desc desc = { 0 };
    desc.kind = kind;
    desc.capacity = capacity;
    desc.dim = kind == DSA_INDEX_KEY ? l->ctx.config.dim_index : kind == DSA_VALUE ? l->ctx.config.dim_value * l->ctx.config.n_kv_heads
             : l->ctx.config.dim_latent * (l->ctx.config.n_kv_heads ? l->ctx.config.n_kv_heads : 1);
    desc.dim_rope = kind == DSA_LATENT && l->ctx.config.dim_rope ? l->ctx.config.dim_rope : DSA_NONE;
    l->f->bad |= store_make(&l->ctx, desc, page, s) != DSA_OK;
}

static void layer_pool(layer_run *l, dsa_kind kind, const float *gain, const float *bias, const float *gate_bias, dsa_compressor *c, void **memory)
{
    dsa_compressor_desc desc = { 0 };
    size_t bytes = 0;
    desc.kind = kind;
    desc.gain = gain;
    desc.bias = bias;
    desc.gate_bias = gate_bias;
    dsa_status st = dsa_compressor_bytes(&l->ctx, &desc, &bytes);
    *memory = poisoned(bytes);
    if (st == DSA_OK) st = dsa_compressor_init(&l->ctx, &desc, *memory, bytes, c);
    l->f->bad |= st != DSA_OK;
}

/* ---- the mechanism: the same four calls for every model ------------------------------------------- */
static void layer_append(layer_run *l, int64_t n, const float *latent, const float *value, const float *key)
{
    dsa_seq seq = { 0 };
    dsa_append_args a = { 0 };
    seq.latent = &l->latent.cache;
    seq.value = value ? &l->value.cache : NULL;
    seq.index = key ? &l->index.cache : NULL;
    seq.n_q = (int32_t)n;
    a.n_seqs = 1;
    a.seqs = &seq;
    a.latent = latent;
    a.value = value;
    a.index_key = key;
    l->f->bad |= dsa_append(&l->ctx, &a) != DSA_OK;
}

static void layer_select(layer_run *l, int64_t n, const float *q, const float *w, int32_t *lists, float *scores, int64_t n_cols)
{
    dsa_seq seq = { 0 };
    dsa_score_args a = { 0 };
    dsa_selection sel = { 0 };
    size_t bytes = 0;
    seq.latent = &l->latent.cache;
    seq.index = &l->index.cache;
    seq.n_q = (int32_t)n;
    a.n_seqs = 1;
    a.seqs = &seq;
    a.q = q;
    a.w = w;
    sel.indices = lists;
    dsa_status st = dsa_score_select_workspace(&l->ctx, &a, &sel, &bytes);
    a.workspace = poisoned(bytes);
    a.workspace_size = bytes;
    if (st == DSA_OK) st = dsa_score_select(&l->ctx, &a, &sel);
    free(a.workspace);
    if (st == DSA_OK && scores) {
        st = dsa_score_workspace(&l->ctx, &a, &bytes);
        a.workspace = poisoned(bytes);
        a.workspace_size = bytes;
        if (st == DSA_OK) st = dsa_score(&l->ctx, &a, scores, n_cols, n_cols);
        free(a.workspace);
    }
    l->f->bad |= st != DSA_OK;
}

static void layer_add(layer_run *l, int64_t n, store *rows, const float *q, const int32_t *lists, const int64_t *ks, const int64_t *ke,
                      const dsa_attend_state *state)
{
    dsa_seq seq = { 0 };
    dsa_attend_args a = { 0 };
    size_t bytes = 0;
    seq.latent = &rows->cache;
    seq.value = l->ctx.config.n_kv_heads ? &l->value.cache : NULL;
    seq.n_q = (int32_t)n;
    a.n_seqs = 1;
    a.seqs = &seq;
    a.q = q;
    a.what = lists ? DSA_ATTEND_LIST : DSA_ATTEND_RANGE;
    a.indices = lists;
    a.ks = ks;
    a.ke = ke;
    dsa_status st = dsa_attend_workspace(&l->ctx, &a, state, &bytes);
    a.workspace = poisoned(bytes);
    a.workspace_size = bytes;
    if (st == DSA_OK) st = dsa_attend_add(&l->ctx, &a, state);
    free(a.workspace);
    l->f->bad |= st != DSA_OK;
}

/* Attention over the lists, or (lists NULL) over rows [ks, ke) of `rows`, or both; sinks may be NULL. The caller frees the result. */
static float *layer_attend(layer_run *l, int64_t n, const float *q, const int32_t *lists, store *listed, store *ranged, const int64_t *ks,
                           const int64_t *ke, const float *sinks)
{
    dsa_attend_state s = { 0 };
    int32_t dim = l->ctx.config.dim_value;
    s.n_rows = n;
    s.max = allocate_floats(n * l->n_heads);
    s.sum = allocate_floats(n * l->n_heads);
    s.out = allocate_floats(n * l->n_heads * dim);
    dsa_status st = dsa_attend_begin(&l->ctx, &s);
    if (lists) layer_add(l, n, listed, q, lists, NULL, NULL, &s);
    if (ranged) layer_add(l, n, ranged, q, NULL, ks, ke, &s);
    if (st == DSA_OK) st = dsa_attend_finish(&l->ctx, &s, sinks, s.out, NULL, NULL);
    l->f->bad |= st != DSA_OK;
    free(s.max);
    free(s.sum);
    return s.out;
}

static void layer_compress(layer_run *l, dsa_compressor *c, int64_t n, const float *rows, const float *gates, store *s)
{
    l->f->bad |= dsa_compress(&l->ctx, c, n, rows, gates, &s->cache) != DSA_OK;
}

/* ---- axk2, hy_v4, glm5_next: absorbed MLA ----------------------------------------------------------- */
static void layer_mla(layer_run *l, const float *x, int64_t n, const int64_t *at, float *y)
{
    layer_file *f = l->f;
    const dsa_config *c = &l->ctx.config;
    const int ax = f->preset == DSA_AXK2, hy = f->preset == DSA_HY_V4, gl = f->preset == DSA_GLM5_NEXT;
    const int32_t hid = c->dim_hidden, H = c->n_heads, R = c->dim_latent, r = c->dim_rope, nope = c->dim_nope, v = c->dim_v, ql = c->dim_q_lora;
    const int32_t D = c->dim_index, HI = c->n_index_heads, dq = nope + r;
    int32_t *lists = l->lists + l->done * l->length;
    float *qa = layer_project(l, x, n, hid, "q_a_proj.weight", 0, ql), *both = allocate_floats(n * 2 * ql), *q, *gate = NULL;
    for (int64_t t = 0; t < n; t++) memcpy(both + t * 2 * ql + ql, qa + t * ql, sizeof(float) * (size_t)ql);
    layer_norm(l, DSA_NORM_RMS, qa, n, ql, ql, "q_a_layernorm.weight", c->norm_eps);
    for (int64_t t = 0; t < n; t++) memcpy(both + t * 2 * ql, qa + t * ql, sizeof(float) * (size_t)ql);
    if (ax) {                                            /* rows [q | gate] of each head, from [normed | raw] */
        float *all = layer_project(l, both, n, 2 * ql, "q_gate_proj.weight", 0, H * (dq + v));
        q = allocate_floats(n * H * dq);
        gate = allocate_floats(n * H * v);
        for (int64_t i = 0; i < n * H; i++) {
            memcpy(q + i * dq, all + i * (dq + v), sizeof(float) * (size_t)dq);
            memcpy(gate + i * v, all + i * (dq + v) + dq, sizeof(float) * (size_t)v);
        }
        free(all);
    } else {
        q = layer_project(l, qa, n, ql, "q_b_proj.weight", 0, H * dq);
        if (hy) gate = layer_project(l, x, n, hid, "gate_proj.weight", 0, H * v);
    }
    layer_rope(l, dsa_config_rope(&l->ctx, dq), q, n, H, dq, at, 0);
    float *kv = layer_project(l, x, n, hid, "kv_a_proj_with_mqa.weight", 0, R + r), *key = NULL;
    layer_norm(l, DSA_NORM_RMS, kv, n, R + r, R, "kv_a_layernorm.weight", c->norm_eps);
    layer_rope(l, dsa_config_rope(&l->ctx, R + r), kv, n, 1, R + r, at, 0);
    if (l->has_indexer) {
        key = layer_project(l, x, n, hid, "indexer.wk.weight", 0, D);
        if (!gl) layer_norm(l, c->index_norm, key, n, D, D, "indexer.k_norm.weight", c->index_norm_eps);
        if (!gl) layer_rope(l, dsa_config_index_rope(&l->ctx), key, n, 1, D, at, 0);
    }
    layer_append(l, n, kv, NULL, gl ? NULL : key);
    if (l->has_indexer) {
        if (gl) {
            float *gates = layer_project(l, x, n, hid, "indexer.index_kpool_compress_gate", 0, D);
            layer_compress(l, &l->index_pool, n, key, gates, &l->index);
            free(gates);
        }
        float *qi = layer_project(l, qa, n, ql, "indexer.wq_b.weight", 0, HI * D);
        float *w = layer_project(l, x, n, hid, "indexer.weights_proj.weight", 0, HI);
        layer_rope(l, dsa_config_index_rope(&l->ctx), qi, n, HI, D, at, 0);
        for (int64_t i = 0; i < n * HI; i++) w[i] *= c->index_scale;
        layer_select(l, n, qi, w, lists, NULL, 0);
        free(qi);
        free(w);
    }
    /* q_lat = W_UK^T q_nope, head by head */
    float *b = layer_floats(f, "kv_b_proj.weight", (int64_t)H * (nope + v) * R), *q_abs = allocate_floats(n * H * (R + r));
    for (int64_t t = 0; t < n; t++)
        for (int32_t h = 0; h < H; h++) {
            const float *qh = q + (t * H + h) * dq, *bh = b + (int64_t)h * (nope + v) * R;
            float *z = q_abs + (t * H + h) * (R + r);
            for (int32_t i = 0; i < R; i++) {
                double sum = 0;
                for (int32_t d = 0; d < nope; d++) sum += (double)qh[d] * bh[(int64_t)d * R + i];
                z[i] = (float)sum;
            }
            memcpy(z + R, qh + nope, sizeof(float) * (size_t)r);
        }
    float *sinks = hy ? layer_floats(f, "sinks", H) : NULL;
    float *lat = layer_attend(l, n, q_abs, lists, &l->latent, NULL, NULL, NULL, sinks), *o = allocate_floats(n * H * v);
    for (int64_t i = 0; i < n * H; i++)
        for (int32_t d = 0; d < v; d++) {
            const float *row = b + ((i % H) * (nope + v) + nope + d) * R;
            double sum = 0;
            for (int32_t k = 0; k < R; k++) sum += (double)row[k] * lat[i * R + k];
            o[i * v + d] = (float)sum;
        }
    if (gate) f->bad |= dsa_gate(o, gate, n * H * v) != DSA_OK;
    float *out = layer_project(l, o, n, H * v, "o_proj.weight", 0, hid);
    memcpy(y, out, sizeof(float) * (size_t)(n * hid));
    float *all[] = { qa, both, q, gate, kv, key, b, q_abs, sinks, lat, o, out };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

/* ---- minimax_m3, qwen4_exp: grouped queries ---------------------------------------------------------- */
static void layer_grouped(layer_run *l, const float *x, int64_t n, const int64_t *at, float *y)
{
    layer_file *f = l->f;
    const dsa_config *c = &l->ctx.config;
    const int qw = f->preset == DSA_QWEN4_EXP;
    const int32_t hid = c->dim_hidden, H = c->n_heads, G = c->n_kv_heads, d = c->dim_latent, D = c->dim_index, HI = c->n_index_heads;
    const dsa_rope rope = dsa_config_rope(&l->ctx, d), index_rope = dsa_config_index_rope(&l->ctx);
    int32_t *lists = l->lists + l->done * l->n_lists * l->length;
    float *q = layer_project(l, x, n, hid, "q_proj.weight", 0, H * d * (qw ? 2 : 1)), *gate = NULL;
    if (qw) {                                            /* rows [q | gate] of each head */
        gate = allocate_floats(n * H * d);
        for (int64_t i = 0; i < n * H; i++) {
            memcpy(gate + i * d, q + i * 2 * d + d, sizeof(float) * (size_t)d);
            memmove(q + i * d, q + i * 2 * d, sizeof(float) * (size_t)d);
        }
    }
    float *k = layer_project(l, x, n, hid, "k_proj.weight", 0, G * d), *v = layer_project(l, x, n, hid, "v_proj.weight", 0, G * d);
    layer_norm(l, DSA_NORM_RMS_PLUS_ONE, q, n * H, d, d, "q_norm.weight", c->norm_eps);
    layer_norm(l, DSA_NORM_RMS_PLUS_ONE, k, n * G, d, d, "k_norm.weight", c->norm_eps);
    layer_rope(l, rope, q, n, H, d, at, 0);
    layer_rope(l, rope, k, n, G, d, at, 0);
    float *qi, *key;
    if (qw) {
        qi = layer_project(l, x, n, hid, "indexer.index_qk_proj.weight", 0, HI * D);
        key = layer_project(l, x, n, hid, "indexer.index_qk_proj.weight", HI * D, D);
        layer_norm(l, c->index_norm, qi, n * HI, D, D, "indexer.q_layernorm.weight", c->index_norm_eps);
        layer_append(l, n, k, v, NULL);
        layer_compress(l, &l->index_pool, n, key, NULL, &l->index);
    } else {
        qi = layer_project(l, x, n, hid, "indexer.q_proj.weight", 0, HI * D);
        key = layer_project(l, x, n, hid, "indexer.k_proj.weight", 0, D);
        layer_norm(l, c->index_norm, qi, n * HI, D, D, "indexer.q_norm.weight", c->index_norm_eps);
        layer_norm(l, c->index_norm, key, n, D, D, "indexer.k_norm.weight", c->index_norm_eps);
        layer_rope(l, index_rope, key, n, 1, D, at, 0);
        layer_append(l, n, k, v, key);
    }
    layer_rope(l, index_rope, qi, n, HI, D, at, 0);
    layer_select(l, n, qi, NULL, lists, NULL, 0);
    float *o = layer_attend(l, n, q, lists, &l->latent, NULL, NULL, NULL, NULL);
    if (gate) f->bad |= dsa_gate(o, gate, n * H * d) != DSA_OK;
    float *out = layer_project(l, o, n, H * d, "o_proj.weight", 0, hid);
    memcpy(y, out, sizeof(float) * (size_t)(n * hid));
    float *all[] = { q, gate, k, v, qi, key, o, out };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

/* ---- deepseek_v4: a window, and entries: chosen ones, all, or none ------------------------------------- */
static void layer_v4(layer_run *l, const float *x, int64_t n, const int64_t *at, float *y, float *scores, int64_t n_cols)
{
    layer_file *f = l->f;
    const dsa_config *c = &l->ctx.config;
    const int32_t hid = c->dim_hidden, H = c->n_heads, d = c->dim_value, D = c->dim_index, HI = c->n_index_heads, ql = c->dim_q_lora;
    const int32_t groups = layer_int(f, "o_groups"), rank = layer_int(f, "o_lora_rank"), wide = l->entry_pool.width;
    const dsa_rope rope = dsa_config_rope(&l->ctx, d);
    int32_t *lists = l->has_indexer ? l->lists + l->done * l->length : NULL;
    int64_t *ks = (int64_t *)allocate((size_t)n * 4, sizeof *ks), *ke = ks + n, *none = ke + n, *whole = none + n;
    float *qa = layer_project(l, x, n, hid, "q_a_proj.weight", 0, ql), *kv = layer_project(l, x, n, hid, "kv_proj.weight", 0, d);
    layer_norm(l, DSA_NORM_RMS, qa, n, ql, ql, "q_a_norm.weight", c->norm_eps);
    float *q = layer_project(l, qa, n, ql, "q_b_proj.weight", 0, H * d), *sinks = layer_floats(f, "sinks", H);
    layer_norm(l, DSA_NORM_RMS, q, n * H, d, d, NULL, c->norm_eps);
    layer_norm(l, DSA_NORM_RMS, kv, n, d, d, "kv_norm.weight", c->norm_eps);
    layer_rope(l, rope, q, n, H, d, at, 0);
    layer_rope(l, rope, kv, n, 1, d, at, 0);
    layer_append(l, n, kv, NULL, NULL);
    if (l->compresses) {
        float *rows = layer_project(l, x, n, hid, "compressor.kv_proj.weight", 0, wide);
        float *gates = layer_project(l, x, n, hid, "compressor.gate_proj.weight", 0, wide);
        layer_compress(l, &l->entry_pool, n, rows, gates, &l->entries);
        free(rows);
        free(gates);
    }
    if (l->has_indexer) {
        float *rows = layer_project(l, x, n, hid, "compressor.indexer.kv_proj.weight", 0, 2 * D);
        float *gates = layer_project(l, x, n, hid, "compressor.indexer.gate_proj.weight", 0, 2 * D);
        float *qi = layer_project(l, qa, n, ql, "compressor.indexer.q_b_proj.weight", 0, HI * D);
        float *w = layer_project(l, x, n, hid, "compressor.indexer.scorer.weights_proj.weight", 0, HI);
        layer_compress(l, &l->index_pool, n, rows, gates, &l->index);
        layer_rope(l, dsa_config_index_rope(&l->ctx), qi, n, HI, D, at, 0);
        for (int64_t i = 0; i < n * HI; i++) w[i] *= c->index_scale;
        layer_select(l, n, qi, w, lists, scores, n_cols);
        free(rows);
        free(gates);
        free(qi);
        free(w);
    }
    for (int64_t t = 0; t < n; t++) {
        ke[t] = l->done + t + 1;
        ks[t] = ke[t] > c->window ? ke[t] - c->window : 0;
        none[t] = 0;
        whole[t] = ke[t] / c->stride;
    }
    dsa_attend_state s = { 0 };
    s.n_rows = n;
    s.max = allocate_floats(n * H);
    s.sum = allocate_floats(n * H);
    s.out = allocate_floats(n * H * d);
    f->bad |= dsa_attend_begin(&l->ctx, &s) != DSA_OK;
    layer_add(l, n, &l->latent, q, NULL, ks, ke, &s);
    if (l->compresses) layer_add(l, n, &l->entries, q, lists, none, whole, &s);
    f->bad |= dsa_attend_finish(&l->ctx, &s, sinks, s.out, NULL, NULL) != DSA_OK;
    layer_rope(l, rope, s.out, n, H, d, at, 1);
    float *mid = allocate_floats(n * groups * rank);
    for (int32_t g = 0; g < groups; g++) {               /* o_a: each group of heads has its own rows */
        int32_t in = H / groups * d;
        float *part = allocate_floats(n * in), *z;
        for (int64_t t = 0; t < n; t++) memcpy(part + t * in, s.out + t * H * d + g * in, sizeof(float) * (size_t)in);
        z = layer_project(l, part, n, in, "o_a_proj.weight", g * rank, rank);
        for (int64_t t = 0; t < n; t++) memcpy(mid + (t * groups + g) * rank, z + t * rank, sizeof(float) * (size_t)rank);
        free(part);
        free(z);
    }
    float *out = layer_project(l, mid, n, groups * rank, "o_b_proj.weight", 0, hid);
    memcpy(y, out, sizeof(float) * (size_t)(n * hid));
    float *all[] = { qa, kv, q, sinks, s.max, s.sum, s.out, mid, out };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    free(ks);
}

/* ---- one layer, one schedule ------------------------------------------------------------------------- */
static int layer_open(layer_run *l, layer_file *f, const char *kind, int32_t page)
{
    dsa_config c = f->base;
    int64_t T = f->n_tokens;
    memset(l, 0, sizeof *l);
    l->f = f;
    if (f->family == FAMILY_V4) {
        const js_value *rates = js_get(f->config, "compress_rates"), *rope = js_get(f->config, "rope_parameters");
        int sliding = strcmp(kind, "sliding_attention") == 0;
        l->has_indexer = strcmp(kind, "compressed_sparse_attention") == 0;
        l->compresses = !sliding;
        c.rope_theta = js_number(js_get(js_get(rope, sliding ? "main" : "compress"), "rope_theta"));
        if (l->compresses) c.stride = (int32_t)js_number(js_get(rates, kind));
        if (l->compresses && !l->has_indexer) c.pooling = DSA_POOL_GATED;
    } else {
        l->has_indexer = f->family == FAMILY_GROUPED || layer_tensor(f, "indexer.wk.weight") != NULL;
    }
    dsa_status st = dsa_init(&l->ctx, &c);
    if (st != DSA_OK) {
        bad_file(f->r, "layer %d: dsa_init: %s", f->layer, c.detail ? c.detail : dsa_status_text(st));
        return 0;
    }
    l->n_heads = l->ctx.config.n_heads;
    l->n_lists = l->ctx.config.index_groups;
    l->length = dsa_list_length(&l->ctx, 0);
    layer_cache(l, DSA_LATENT, T, page, &l->latent);
    if (l->ctx.config.n_kv_heads) layer_cache(l, DSA_VALUE, T, page, &l->value);
    if (l->has_indexer) layer_cache(l, DSA_INDEX_KEY, T, page, &l->index);
    const int32_t D = l->ctx.config.dim_index, stride = l->ctx.config.stride;
    if (f->preset == DSA_GLM5_NEXT && l->has_indexer) {
        l->gain[0] = layer_floats(f, "indexer.k_norm.weight", D);
        l->gain[1] = layer_floats(f, "indexer.k_norm.bias", D);
        l->gain[2] = layer_floats(f, "indexer.index_kpool_compress_ape", (int64_t)stride * D);
    } else if (f->preset == DSA_QWEN4_EXP) {
        l->gain[0] = layer_floats(f, "indexer.k_layernorm.weight", D);
    } else if (f->family == FAMILY_V4 && l->has_indexer) {
        l->gain[0] = layer_floats(f, "compressor.indexer.kv_norm.weight", D);
        l->gain[2] = layer_floats(f, "compressor.indexer.position_bias", (int64_t)stride * 2 * D);
    }
    if (l->gain[0]) layer_pool(l, DSA_INDEX_KEY, l->gain[0], l->gain[1], l->gain[2], &l->index_pool, &l->index_memory);
    if (l->compresses) {
        int32_t d = l->ctx.config.dim_value;
        layer_cache(l, DSA_LATENT, T, page, &l->entries);
        l->gain[3] = layer_floats(f, "compressor.kv_norm.weight", d);
        l->entry_bias = layer_floats(f, "compressor.position_bias", (int64_t)stride * d * (l->has_indexer ? 2 : 1));
        layer_pool(l, DSA_LATENT, l->gain[3], NULL, l->entry_bias, &l->entry_pool, &l->entry_memory);
    }
    return !f->bad;
}

static void layer_close(layer_run *l)
{
    store_free(&l->latent);
    store_free(&l->value);
    store_free(&l->index);
    store_free(&l->entries);
    free(l->index_memory);
    free(l->entry_memory);
    for (int i = 0; i < 4; i++) free(l->gain[i]);
    free(l->entry_bias);
}

/* The stored selection as a mask [n_lists, n_tokens, n_cols] of what may be attended, in tokens or entries as the lists name them. */
static unsigned char *stored_mask(layer_run *l, const st_tensor *t, int64_t n_cols)
{
    const layer_file *f = l->f;
    const int64_t T = f->n_tokens, G = l->n_lists, block = l->ctx.config.block_size, k = t->shape[t->rank - 1];
    unsigned char *mask = (unsigned char *)allocate((size_t)(G * T * n_cols), 1);
    memset(mask, 0, (size_t)(G * T * n_cols));
    if (has_dtype(t, "F32") ? t->count != T * T : t->count != G * T * k) {
        bad_file(f->r, "%s: shape", t->name);
        l->f->bad = 1;
        return mask;
    }
    for (int64_t i = 0; i < t->count; i++) {
        if (has_dtype(t, "F32")) {                       /* an additive mask, 0 = chosen */
            float x;
            memcpy(&x, (const char *)t->data + 4 * i, 4);
            mask[i] = x == 0 && i % T <= i / T;
            continue;
        }
        int32_t id;
        memcpy(&id, (const char *)t->data + 4 * i, 4);
        for (int64_t s = (int64_t)id * block; id >= 0 && s < ((int64_t)id + 1) * block && s < n_cols; s++)
            mask[i / k * n_cols + s] = l->ctx.config.list_entries || s <= i / k % T;
    }
    return mask;
}

/* Rows whose list, as a set, is not the stored one. */
static double lists_differ(layer_run *l, const unsigned char *mask, int64_t n_cols)
{
    const int64_t T = l->f->n_tokens, G = l->n_lists;
    int64_t bad = 0;
    for (int64_t t = 0; t < T; t++)
        for (int64_t g = 0; g < G; g++) {
            const unsigned char *want = mask + (g * T + t) * n_cols;
            const int32_t *list = l->lists + (t * G + g) * l->length;
            int64_t n = 0, ok = 1;
            for (int64_t s = 0; s < n_cols; s++) n += want[s];
            for (int64_t i = 0; i < l->length; i++) {
                if (list[i] == -1) continue;
                ok &= list[i] >= 0 && list[i] < n_cols && (i == 0 || list[i] > list[i - 1]) && want[list[i]];
                n--;
            }
            bad += !ok || n != 0;
        }
    return (double)bad;
}

static void check_layer_run(run *r, layer_file *f, const char *kind, layout where, schedule plan, int32_t **shared)
{
    char name[96];
    const int32_t hid = f->base.dim_hidden;
    const int64_t T = f->n_tokens;
    const st_tensor *x_in, *y_in, *sel, *scores_in;
    layer_run l;
    snprintf(name, sizeof name, "attn_in.%d", f->layer);
    x_in = st_find(f->file, name);
    snprintf(name, sizeof name, "attn_out.%d", f->layer);
    y_in = st_find(f->file, name);
    snprintf(name, sizeof name, "select.%d", f->layer);
    sel = st_find(f->file, name);
    snprintf(name, sizeof name, "index_scores.%d", f->layer);
    scores_in = st_find(f->file, name);
    if (!y_in || !has_dtype(x_in, "F32") || !has_dtype(y_in, "F32") || x_in->count != T * hid || y_in->count != T * hid) {
        bad_file(r, "layer %d: attn_in and attn_out", f->layer);
        f->bad = 1;
        return;
    }
    if (layer_open(&l, f, kind, where == PAGED ? 7 : 0)) {
        int64_t n_cols = scores_in ? scores_in->shape[scores_in->rank - 1] : 0, *at = (int64_t *)allocate((size_t)T, sizeof *at), m;
        float *x = tensor_floats(r, x_in), *want = tensor_floats(r, y_in), *y = allocate_floats(T * hid), *scores = allocate_floats(T * n_cols);
        if (l.has_indexer || !*shared) {
            free(*shared);
            *shared = (int32_t *)poisoned(sizeof(int32_t) * (size_t)(T * l.n_lists * l.length));
        }
        l.lists = *shared;
        for (int64_t t = 0; t < T; t++) at[t] = t;
        for (; l.done < T && !f->bad; l.done += m) {
            m = next_chunk(plan, l.done, T);
            const float *xs = x + l.done * hid;
            float *ys = y + l.done * hid;
            if (f->family == FAMILY_MLA) layer_mla(&l, xs, m, at + l.done, ys);
            else if (f->family == FAMILY_GROUPED) layer_grouped(&l, xs, m, at + l.done, ys);
            else layer_v4(&l, xs, m, at + l.done, ys, scores_in ? scores + l.done * n_cols : NULL, n_cols);
        }
        snprintf(name, sizeof name, "layer%d/f32/%s/%s", f->layer, layout_names[where], schedule_names[plan]);
        if (f->bad && r->base.detail && r->base.detail[0]) fprintf(stderr, "conformance: %s: %s: %s\n", r->path, name, r->base.detail);
        report(r, "max_abs", f->bad ? (double)NAN : max_abs(y, want, T * hid), LAYER_BOUND, "%s", name);
        if (sel && l.has_indexer && !f->bad) {
            int64_t cols = l.ctx.config.list_entries ? T / l.ctx.config.stride : T;
            unsigned char *mask = stored_mask(&l, sel, cols);
            report(r, "rows_differ", lists_differ(&l, mask, cols), 0, "%s/select", name);
            free(mask);
        }
        if (scores_in && !f->bad) {                      /* stored before masking: compare what is visible */
            float *stored = tensor_floats(r, scores_in);
            double worst = 0;
            for (int64_t t = 0; t < T; t++)
                for (int64_t w = 0; w < n_cols; w++) {
                    double a = scores[t * n_cols + w], b = stored[t * n_cols + w];
                    if (w < (t + 1) / l.ctx.config.stride) worst = larger(worst, fabs(a - b));
                    else if (a != -HUGE_VAL) worst = HUGE_VAL;
                }
            report(r, "max_abs", worst, ENTRY_BOUND, "%s/scores", name);
            free(stored);
        }
        free(at);
        free(x);
        free(want);
        free(y);
        free(scores);
    }
    layer_close(&l);
}

static int check_layers(run *r, const st_file *file)
{
    layer_file f = { 0 };
    char error[256];
    const char *text = st_metadata(file, "config");
    f.r = r;
    f.file = file;
    if (!text) return bad_file(r, "the metadata hold no config");
    f.config = js_parse(text, strlen(text), error, sizeof error);
    if (!f.config) return bad_file(r, "config: %s", error);
    int result = layer_config(&f);
    for (int where = CONTIGUOUS; !result && where <= PAGED; where++)
        for (int plan = 0; plan < N_SCHEDULES; plan++) {
            int32_t *shared = NULL;
            for (f.layer = 0; !f.bad; f.layer++) {
                char name[64];
                snprintf(name, sizeof name, "attn_in.%d", f.layer);
                const st_tensor *x = st_find(file, name);
                const char *kind = js_string(js_at(js_get(f.config, "layer_types"), f.layer));
                if (!x) break;
                if (!kind || x->rank != 3) {
                    bad_file(r, "layer %d: layer_types, or the rank of attn_in", f.layer);
                    f.bad = 1;
                    break;
                }
                f.n_tokens = (int32_t)x->shape[1];
                snprintf(f.prefix, sizeof f.prefix, "w.model.layers.%d.self_attn.", f.layer);
                if (!layer_tensor(&f, "q_proj.weight") && !layer_tensor(&f, "q_a_proj.weight"))
                    snprintf(f.prefix, sizeof f.prefix, "w.layers.%d.self_attn.", f.layer);
                check_layer_run(r, &f, kind, (layout)where, (schedule)plan, &shared);
            }
            free(shared);
        }
    js_free(f.config);
    return result || f.bad ? FILE_BAD : FILE_OK;
}

#endif

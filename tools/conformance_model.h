/* conformance_model.h - files that hold a model with its inner results, and model folders with a reference file.

   Three rounds over a model file:
   1. the whole model over f32 caches through tools/engine.h, with the library's own selection; where a row's set differs
      from the stored one within a tie, again with the stored lists;
   2. layer by layer, each fed with the f32 hidden states and the stored lists, for every cache format;
   3. in the same caches, selection alone against a top-k in double precision over what the cache really holds. */
#ifndef CONFORMANCE_MODEL_H
#define CONFORMANCE_MODEL_H

#define F32_BOUND 5e-5           /* tests/vectors/README.md, "Acceptance" */
#define TIE 1e-5                 /* scores this close to the cut may be chosen either way: absolute in f32, relative otherwise */
#define MODEL_BOUND 2e-3         /* logits of a model folder */
#define GREEDY_TOKENS 200        /* a folder's `greedy` is a prompt and this many greedy tokens (tiny-dsa/README.md) */
#define PROBE_ROWS 256           /* query rows scored in one call at most: bounds the memory for their scores */

typedef struct reference {
    int64_t n;                   /* tokens */
    int32_t k;                   /* the model's top_k: width of the lists */
    int32_t n_layers;
    int32_t *ids;
    float *logits;               /* [n, vocab] */
    float **attn_out;            /* per layer [n, hidden], NULL where the file has none, as in the next two */
    float **scores;              /* [n, n] */
    float **margin;              /* [n] */
    int32_t **lists;             /* [n, k] visible positions ascending, then -1; NULL in layers that share a list */
} reference;

static void reference_free(reference *ref)
{
    for (int32_t i = 0; ref->lists && i < ref->n_layers; i++) {
        free(ref->attn_out[i]);
        free(ref->scores[i]);
        free(ref->margin[i]);
        free(ref->lists[i]);
    }
    free(ref->attn_out);
    free(ref->scores);
    free(ref->margin);
    free(ref->lists);
    free(ref->ids);
    free(ref->logits);
}

/* The list that a layer attends over: its own, or that of the nearest earlier layer with an indexer. */
static const int32_t *stored_list(const reference *ref, int32_t layer)
{
    while (!ref->lists[layer]) layer--;      /* the engine has checked that layer 0 has one */
    return ref->lists[layer];
}

static void **allocate_pointers(int32_t n)
{
    void **p = (void **)allocate((size_t)n, sizeof *p);
    for (int32_t i = 0; i < n; i++) p[i] = NULL;
    return p;
}

/* One optional float tensor of a layer. 0 only after a message. */
static int read_layer_floats(const run *r, const st_file *file, const char *stem, int32_t layer, int rank,
                             const int64_t *shape, float **out)
{
    char name[64];
    snprintf(name, sizeof name, "%s.%ld", stem, (long)layer);
    const st_tensor *t = st_find(file, name);
    if (!t) return 1;
    if (!has_shape(r, t, rank, shape)) return 0;
    *out = tensor_floats(r, t);
    return *out != NULL;
}

static int reference_read(const run *r, const st_file *file, const engine_model *m, reference *ref)
{
    const st_tensor *ids = st_find(file, "input_ids"), *logits = st_find(file, "logits");
    const int64_t row[] = { 1, -1 };
    memset(ref, 0, sizeof *ref);
    if (!ids || !logits) return bad_file(r, "tensor %s is missing", ids ? "logits" : "input_ids");
    if (!has_shape(r, ids, 2, row)) return FILE_BAD;
    const int64_t n = ids->shape[1], want_logits[] = { 1, n, m->n_vocab }, want_out[] = { 1, n, m->dim_hidden };
    const int64_t want_scores[] = { n, n }, want_list[] = { 1, n, -1 };
    if (!has_shape(r, logits, 3, want_logits)) return FILE_BAD;
    ref->n = n;
    ref->k = m->dsa.top_k;
    ref->n_layers = m->n_layers;
    ref->attn_out = (float **)allocate_pointers(m->n_layers);
    ref->scores = (float **)allocate_pointers(m->n_layers);
    ref->margin = (float **)allocate_pointers(m->n_layers);
    ref->lists = (int32_t **)allocate_pointers(m->n_layers);
    ref->ids = tensor_int32(r, ids);
    ref->logits = tensor_floats(r, logits);
    if (!ref->ids || !ref->logits) return FILE_BAD;
    for (int64_t i = 0; i < n; i++)
        if (ref->ids[i] < 0 || ref->ids[i] >= m->n_vocab)
            return bad_file(r, "input_ids: token %lld is outside the vocabulary", (long long)i);
    for (int32_t l = 0; l < m->n_layers; l++) {
        char name[64];
        if (!read_layer_floats(r, file, "attn_out", l, 3, want_out, &ref->attn_out[l]) ||
            !read_layer_floats(r, file, "index_scores", l, 2, want_scores, &ref->scores[l]) ||
            !read_layer_floats(r, file, "cut_margin", l, 1, want_scores, &ref->margin[l]))
            return FILE_BAD;
        if (!m->blocks[l].has_indexer) continue;
        snprintf(name, sizeof name, "topk.%ld", (long)l);
        const st_tensor *t = st_find(file, name);
        if (!t) return bad_file(r, "tensor %s is missing", name);
        if (!has_shape(r, t, 3, want_list)) return FILE_BAD;
        /* A text shorter than top_k has narrower lists. */
        if (t->shape[2] > ref->k || (t->shape[2] < ref->k && t->shape[2] < n))
            return bad_file(r, "%s: %lld entries a row where top_k is %ld", name, (long long)t->shape[2], (long)ref->k);
        int32_t width = (int32_t)t->shape[2], *stored = tensor_int32(r, t);
        if (!stored) return FILE_BAD;
        ref->lists[l] = (int32_t *)poisoned((size_t)n * (size_t)ref->k * sizeof(int32_t));    /* 0xFF: -1 */
        for (int64_t i = 0; i < n; i++) visible_set(stored + i * width, width, i + 1, ref->lists[l] + i * ref->k);
        free(stored);
    }
    return 0;
}

/* ---- the indexer's queries, as the layer makes them ---------------------------------------- */
/* C[m, n] = A[m, k] . B[n, k]^T in double precision. Also the layer's own GEMM where selection over rounded queries is
   checked: then the layer and this file round the same numbers, and no rounding can fall to different sides. */
static void exact_gemm(void *user, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb,
                       float *c, int64_t ldc)
{
    enum { LANES = 8 };          /* side by side, so that the sum does not wait for itself */
    (void)user;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            const float *x = a + i * lda, *y = b + j * ldb;
            double lane[LANES] = { 0 }, sum = 0;
            int64_t p = 0;
            for (; p + LANES <= k; p += LANES)
                for (int l = 0; l < LANES; l++) lane[l] += (double)x[p + l] * (double)y[p + l];
            for (; p < k; p++) sum += (double)x[p] * (double)y[p];
            for (int l = 0; l < LANES; l++) sum += lane[l];
            c[i * ldc + j] = (float)sum;
        }
}

/* q [n, HI, D] after RoPE and w [n, HI] with HI^-0.5 D^-0.5 in it, of the rows x [n, hidden] at positions from `first`.
   The model's attention weights are f32 (they were loaded expanded). */
static dsa_status index_queries(const dsa_ctx *ctx, const dsa_layer_weights *weights, const float *x, int64_t n, int64_t first, float *q, float *w)
{
    const dsa_config *c = &ctx->config;
    int64_t heads = c->n_index_heads, dim = c->dim_index, lora = c->dim_q_lora;
    float *qr = allocate_floats(n * lora), scale = 1 / sqrtf((float)(heads * dim));
    int64_t *positions = (int64_t *)allocate((size_t)n, sizeof *positions);
    dsa_rope rope = dsa_config_index_rope(ctx);
    for (int64_t i = 0; i < n; i++) positions[i] = first + i;
    exact_gemm(NULL, n, lora, c->dim_hidden, x, c->dim_hidden, (const float *)weights->q_a.data, c->dim_hidden, qr, lora);
    dsa_status status = dsa_rms_norm(qr, n, lora, (int32_t)lora, (const float *)weights->q_a_norm.data, c->norm_eps);
    exact_gemm(NULL, n, heads * dim, lora, qr, lora, (const float *)weights->index_q_b.data, lora, q, heads * dim);
    if (status == DSA_OK)
        status = dsa_rope_rows(q, n, heads * dim, (int32_t)heads, dim, (int32_t)dim, &rope, positions, 0);
    exact_gemm(NULL, n, heads, c->dim_hidden, x, c->dim_hidden, (const float *)weights->index_w.data, c->dim_hidden, w, heads);
    for (int64_t i = 0; i < n * heads; i++) w[i] *= scale;
    free(qr);
    free(positions);
    return status;
}

/* Rounds queries to what the format of the keys asks for (contracts: "the format fixes what both sides are rounded to"). */
static dsa_status round_queries(const dsa_cache *cache, int64_t n, int32_t heads, float *q, float *w)
{
    int32_t dim = cache->dim;
    dsa_status status = cache->hadamard ? dsa_hadamard_rows(q, n * heads, dim, dim) : DSA_OK;
    uint8_t *e4m3 = (uint8_t *)allocate((size_t)dim, 1);
    int8_t *bytes = (int8_t *)allocate((size_t)dim, 1);
    for (int64_t i = 0; i < n * heads; i++) {
        float *row = q + i * dim;
        if (cache->format == DSA_BF16)
            for (int32_t j = 0; j < dim; j++) row[j] = dsa_bf16_to_f32(dsa_f32_to_bf16(row[j]));
        if (cache->format == DSA_FP8) {
            w[i] *= dsa_quantize_e4m3(row, dim, e4m3);
            for (int32_t j = 0; j < dim; j++) row[j] = dsa_e4m3_to_f32(e4m3[j]);
        }
        if (cache->format == DSA_INT8) {
            w[i] *= dsa_quantize_int8(row, dim, bytes);
            for (int32_t j = 0; j < dim; j++) row[j] = (float)bytes[j];
        }
    }
    free(e4m3);
    free(bytes);
    return status;
}

/* I[t, s] = sum_h w[t, h] ReLU(<q[t, h], k[s]>), V3.2-Exp paper eq. (1), in double precision, for s in [0, visible). */
static void exact_scores(const float *q, const float *w, const float *keys, int32_t heads, int32_t dim, int64_t visible, double *scores)
{
    for (int64_t s = 0; s < visible; s++) {
        scores[s] = 0;
        for (int32_t h = 0; h < heads; h++) {
            double dot = 0;
            for (int32_t i = 0; i < dim; i++) dot += (double)q[h * dim + i] * (double)keys[s * dim + i];
            if (dot > 0) scores[s] += (double)w[h] * dot;
        }
    }
}

/* ---- comparing sets ------------------------------------------------------------------------- */
typedef struct set_count {
    int64_t rows, wrong, tied;   /* wrong: differs by more than a tie at the cut; tied: differs by a tie */
    double common, wanted;
} set_count;

/* Compares a row's list with the stored one. Where they differ, every entry that only one of them has must score within
   TIE of the cut. scores: the run's own, [0, visible). spare: 2k entries; spare_scores: visible. */
static void count_set(set_count *c, const int32_t *list, const int32_t *stored, int32_t k, int64_t visible, const float *scores,
                      int32_t *spare, double *spare_scores)
{
    int32_t *a = spare, *b = spare + k, n_a = visible_set(list, k, visible, a), n_b = visible_set(stored, k, visible, b);
    int32_t common = common_entries(a, n_a, b, n_b);
    int64_t want = visible < k ? visible : k;
    c->rows++;
    c->common += common;
    c->wanted += n_b;
    for (int32_t i = 0; i < k; i++)
        if (list[i] != -1 && (list[i] < 0 || list[i] >= visible)) n_a = -1;      /* names what it cannot see */
    if (n_a == common && n_b == common && n_a == want) return;
    for (int64_t s = 0; s < visible; s++) spare_scores[s] = (double)scores[s];
    qsort(spare_scores, (size_t)visible, sizeof *spare_scores, compare_descending);
    double cut = spare_scores[want - 1];
    int ok = n_a == want && n_b == want;
    for (int32_t i = 0, j = 0; ok && (i < n_a || j < n_b);) {
        int32_t s;
        if (i < n_a && j < n_b && a[i] == b[j]) { i++; j++; continue; }
        if (j == n_b || (i < n_a && a[i] < b[j])) s = a[i++];
        else s = b[j++];
        ok = fabs((double)scores[s] - cut) <= TIE;
    }
    if (ok) c->tied++;
    else c->wrong++;
}

/* A list of a set twice over the same position would pass as a set: it must ascend strictly, as the layer promises. */
static int ascends(const int32_t *list, int32_t k)
{
    for (int32_t i = 1; i < k; i++)
        if (list[i] != -1 && list[i] <= list[i - 1]) return 0;
    return 1;
}

/* ---- scoring and selecting over a full index cache ----------------------------------------- */
/* Scores and lists of query rows [first, first + n) of a sequence. scores [n, stride]. */
static dsa_status score_rows(const dsa_ctx *ctx, dsa_cache *cache, int64_t first, int64_t n, const float *q, const float *w,
                             float *scores, int64_t stride, int32_t *lists)
{
    dsa_seq seq = { 0 };
    dsa_score_args args = { 0 };
    dsa_selection picked = { 0 };
    size_t bytes = 0;
    seq.index = cache;
    seq.len = first + n;
    seq.n_q = (int32_t)n;
    args.n_seqs = 1;
    args.seqs = &seq;
    args.q = q;
    args.w = w;
    picked.indices = lists;
    dsa_status status = dsa_score_workspace(ctx, &args, &bytes);
    args.workspace = poisoned(bytes);
    args.workspace_size = bytes;
    if (status == DSA_OK) status = dsa_score(ctx, &args, scores, stride, stride);
    free(args.workspace);
    if (status == DSA_OK) status = dsa_score_select_workspace(ctx, &args, &picked, &bytes);
    args.workspace = poisoned(bytes);
    args.workspace_size = bytes;
    if (status == DSA_OK) status = dsa_score_select(ctx, &args, &picked);
    free(args.workspace);
    return status;
}

/* The indexer of one layer over its finished f32 cache: scores and cut margins against the file, then the sets of the
   layer (`lists`, may be NULL) and of dsa_score_select against the stored one. Returns how many rows differ by a tie. */
static int64_t check_indexer(run *r, const dsa_ctx *ctx, const engine_block *block, dsa_cache *cache, const float *x,
                             const int32_t *lists, const reference *ref, int32_t layer, schedule plan, const char *path)
{
    const dsa_config *c = &ctx->config;
    int64_t rows = ref->n < PROBE_ROWS ? ref->n : PROBE_ROWS, done = 0, n, misordered = 0;
    int64_t q_width = (int64_t)c->n_index_heads * c->dim_index;
    float *q = allocate_floats(rows * q_width), *w = allocate_floats(rows * c->n_index_heads), *scores = allocate_floats(rows * ref->n);
    int32_t *picked = (int32_t *)allocate((size_t)rows * (size_t)ref->k, sizeof *picked);
    int32_t *spare = (int32_t *)allocate((size_t)ref->k, 2 * sizeof *spare);
    double *sorted = (double *)allocate((size_t)ref->n, sizeof *sorted), score_gap = 0, margin_gap = 0;
    set_count layer_sets = { 0 }, call_sets = { 0 };
    dsa_status status = DSA_OK;
    for (; status == DSA_OK && done < ref->n; done += n) {
        n = next_chunk(plan, done, ref->n);
        if (n > rows) n = rows;
        status = index_queries(ctx, &block->attention, x + done * c->dim_hidden, n, done, q, w);
        if (status == DSA_OK) status = score_rows(ctx, cache, done, n, q, w, scores, ref->n, picked);
        if (status != DSA_OK) break;
        if (ref->scores[layer]) score_gap = larger(score_gap, max_abs(scores, ref->scores[layer] + done * ref->n, n * ref->n));
        for (int64_t i = 0; i < n; i++) {
            int64_t t = done + i;
            const float *row = scores + i * ref->n;
            const int32_t *stored = ref->lists[layer] + t * ref->k;
            if (lists) count_set(&layer_sets, lists + t * ref->k, stored, ref->k, t + 1, row, spare, sorted);
            if (lists) misordered += !ascends(lists + t * ref->k, ref->k);
            count_set(&call_sets, picked + i * ref->k, stored, ref->k, t + 1, row, spare, sorted);
            misordered += !ascends(picked + i * ref->k, ref->k);
            if (!ref->margin[layer]) continue;
            float margin = HUGE_VALF;    /* k-th score minus the next one */
            if (t + 1 > ref->k) {
                for (int64_t s = 0; s <= t; s++) sorted[s] = (double)row[s];
                qsort(sorted, (size_t)(t + 1), sizeof *sorted, compare_descending);
                margin = (float)(sorted[ref->k - 1] - sorted[ref->k]);
            }
            margin_gap = larger(margin_gap, max_abs(&margin, ref->margin[layer] + t, 1));
        }
    }
    if (called(r, status, path)) {
        if (ref->scores[layer]) report(r, "max_abs", score_gap, F32_BOUND, "%s/index_scores.%ld", path, (long)layer);
        if (ref->margin[layer])          /* the difference of two scores */
            report(r, "max_abs", margin_gap, 2 * F32_BOUND, "%s/cut_margin.%ld", path, (long)layer);
        if (lists) report(r, "rows_differ", (double)layer_sets.wrong, 0, "%s/topk.%ld", path, (long)layer);
        report(r, "rows_differ", (double)call_sets.wrong, 0, "%s/score_select.%ld", path, (long)layer);
        report(r, "rows_not_ascending", (double)misordered, 0, "%s/topk.%ld", path, (long)layer);
        if (layer_sets.tied + call_sets.tied)
            report(r, "rows_tied", (double)(layer_sets.tied > call_sets.tied ? layer_sets.tied : call_sets.tied), (double)NAN,
                   "%s/topk.%ld", path, (long)layer);
    }
    free(q);
    free(w);
    free(scores);
    free(picked);
    free(spare);
    free(sorted);
    return layer_sets.tied;
}

/* ---- 1. the whole model ---------------------------------------------------------------------- */
/* What one pass leaves behind, per layer. */
typedef struct trace {
    int32_t n_layers;
    float **x, **y;              /* [n, hidden] input and output of the attention layer */
    int32_t **lists;             /* [n, k] */
    float *logits;               /* [n, vocab] */
} trace;

static trace trace_make(const engine_model *m, const reference *ref)
{
    trace t;
    t.n_layers = m->n_layers;
    t.x = (float **)allocate_pointers(m->n_layers);
    t.y = (float **)allocate_pointers(m->n_layers);
    t.lists = (int32_t **)allocate_pointers(m->n_layers);
    for (int32_t i = 0; i < m->n_layers; i++) {
        t.x[i] = allocate_floats(ref->n * m->dim_hidden);
        t.y[i] = allocate_floats(ref->n * m->dim_hidden);
        t.lists[i] = (int32_t *)poisoned((size_t)ref->n * (size_t)ref->k * sizeof(int32_t));
    }
    t.logits = allocate_floats(ref->n * m->n_vocab);
    return t;
}

static void trace_free(trace *t)
{
    for (int32_t i = 0; i < t->n_layers; i++) { free(t->x[i]); free(t->y[i]); free(t->lists[i]); }
    free(t->x);
    free(t->y);
    free(t->lists);
    free(t->logits);
}

/* A failed engine call is a failed comparison, as in called(). */
static int engine_called(run *r, int status, const engine *e, const char *path)
{
    if (status == 0) return 1;
    fprintf(stderr, "conformance: %s: %s: %s\n", r->path, path, e->error);
    report(r, "status", (double)status, 0, "%s", path);
    return 0;
}

/* An engine over f32 caches; paged: over shuffled pages (`stores` then owns them: latents, then index keys). */
static int open_engine(run *r, engine *e, const engine_model *m, int64_t n, layout where, store *stores, const char *path)
{
    engine_options options = { 0 };
    options.isa = r->base.isa;
    options.cuda = r->base.cuda;
    options.n_threads = r->base.n_threads;
    options.max_tokens = n;
    options.gemm = ENGINE_GEMM;
    for (int32_t i = 0; i < 2 * m->n_layers; i++) memset(&stores[i], 0, sizeof stores[i]);
    if (!engine_called(r, engine_open(e, m, &options), e, path)) return 0;
    for (int32_t i = 0; where == PAGED && i < 2 * m->n_layers; i++) {
        dsa_cache *cache = i < m->n_layers ? &e->latent[i] : &e->index[i - m->n_layers];
        dsa_cache_desc desc = { 0 };
        desc.kind = i < m->n_layers ? DSA_LATENT : DSA_INDEX_KEY;
        desc.capacity = n;
        if (desc.kind == DSA_INDEX_KEY && !m->blocks[i - m->n_layers].has_indexer) continue;
        if (!called(r, store_make(&e->ctx, desc, PAGE, &stores[i]), path)) {
            engine_close(e);
            return 0;
        }
        dsa_cache_destroy(cache);
        *cache = stores[i].cache;
    }
    return 1;
}

static void close_engine(engine *e, store *stores, int32_t n_layers)
{
    engine_close(e);
    for (int32_t i = 0; i < 2 * n_layers; i++) store_free(&stores[i]);
}

/* Feeds all tokens in the calls of a schedule. lists_in: replayed lists per layer, or NULL. */
static int feed(run *r, engine *e, const reference *ref, schedule plan, int32_t *const *lists_in, trace *t, const char *path)
{
    const engine_model *m = e->model;
    int32_t layers = m->n_layers;
    float **x = (float **)allocate_pointers(layers), **y = (float **)allocate_pointers(layers);
    int32_t **out = (int32_t **)allocate_pointers(layers);
    const int32_t **in = (const int32_t **)allocate_pointers(layers);
    engine_hooks hooks = { 0 };
    int ok = 1;
    hooks.attn_in = x;
    hooks.attn_out = y;
    hooks.lists_out = out;
    hooks.lists_in = in;
    for (int64_t done = 0, n; ok && done < ref->n; done += n) {
        n = next_chunk(plan, done, ref->n);
        for (int32_t i = 0; i < layers; i++) {
            x[i] = t->x[i] + done * m->dim_hidden;
            y[i] = t->y[i] + done * m->dim_hidden;
            out[i] = t->lists[i] + done * ref->k;
            in[i] = lists_in && lists_in[i] ? lists_in[i] + done * ref->k : NULL;
        }
        ok = engine_called(r, engine_forward(e, ref->ids + done, (int32_t)n, t->logits + done * m->n_vocab, (int32_t)n, &hooks), e, path);
    }
    free(x);
    free(y);
    free(out);
    free(in);
    return ok;
}

/* One pass over the model and all its comparisons. replay: over the stored lists. bound: of logits and attention outputs.
   Returns the rows whose set differs by a tie, -1 if the pass failed. While there are such rows, the outputs of a pass with
   its own selection are shown without a bound if `ties_replayed` promises that the caller compares them again. */
static int64_t check_pass(run *r, const engine_model *m, const reference *ref, layout where, schedule plan, int replay,
                          double bound, int ties_replayed, trace *t)
{
    engine e;
    store *stores = (store *)allocate((size_t)m->n_layers, 2 * sizeof *stores);
    char path[96];
    int64_t tied = 0;
    snprintf(path, sizeof path, "%s/%s/%s", layout_names[where], schedule_names[plan], replay ? "replay" : "own");
    if (!open_engine(r, &e, m, ref->n, where, stores, path)) {
        tied = -1;
    } else if (!feed(r, &e, ref, plan, replay ? ref->lists : NULL, t, path)) {
        tied = -1;
    } else {
        for (int32_t i = 0; i < m->n_layers; i++)
            if (m->blocks[i].has_indexer)
                tied += check_indexer(r, &e.ctx, &m->blocks[i], &e.index[i], t->x[i], replay ? NULL : t->lists[i], ref, i, plan, path);
        if (tied && ties_replayed) bound = (double)NAN;
        for (int32_t i = 0; i < m->n_layers; i++)
            if (ref->attn_out[i])
                report(r, "max_abs", max_abs(t->y[i], ref->attn_out[i], ref->n * m->dim_hidden), bound, "%s/attn_out.%ld", path, (long)i);
        report(r, "max_abs", max_abs(t->logits, ref->logits, ref->n * m->n_vocab), bound, "%s/logits", path);
    }
    close_engine(&e, stores, m->n_layers);
    free(stores);
    return tied;
}

/* ---- 2 and 3. layer by layer ------------------------------------------------------------------ */
typedef struct format {
    const char *name;
    dsa_type latent, index;
    double sim;                  /* bound for the attention output; 0: f32, compared by F32_BOUND */
} format;

static const format formats[] = {
    { "f32",      DSA_F32,  DSA_F32,  0 },
    { "bf16",     DSA_BF16, DSA_BF16, 6e-5 },
    { "fp8",      DSA_FP8,  DSA_FP8,  2e-3 },
    { "fp8+int8", DSA_FP8,  DSA_INT8, 2e-3 },
};

/* Runs one layer over all rows in the calls of a schedule. */
static dsa_status run_layer(const dsa_ctx *ctx, const dsa_layer_weights *weights, store *latent, store *index, const float *x, int64_t n,
                            schedule plan, const int32_t *lists_in, int32_t *lists_out, float *y)
{
    const dsa_config *c = &ctx->config;
    dsa_status status = DSA_OK;
    for (int64_t done = 0, m; status == DSA_OK && done < n; done += m) {
        dsa_seq seq = { 0 };
        dsa_layer_args args = { 0 };
        size_t bytes = 0;
        m = next_chunk(plan, done, n);
        seq.latent = &latent->cache;
        seq.index = index ? &index->cache : NULL;
        seq.n_q = (int32_t)m;
        args.weights = weights;
        args.n_seqs = 1;
        args.seqs = &seq;
        args.x = x + done * c->dim_hidden;
        args.y = y + done * c->dim_hidden;
        args.indices_in = lists_in ? lists_in + done * c->top_k : NULL;
        args.indices_out = lists_out ? lists_out + done * c->top_k : NULL;
        status = dsa_layer_workspace(ctx, &args, &bytes);
        args.workspace = poisoned(bytes);
        args.workspace_size = bytes;
        if (status == DSA_OK) status = dsa_layer(ctx, &args);
        free(args.workspace);
    }
    return status;
}

/* Selection over what the cache really holds: the layer's lists and dsa_score_select's against a top-k in double precision
   over the dequantised keys and equally rounded queries. */
static void check_rounded_selection(run *r, const dsa_ctx *ctx, const engine_block *block, dsa_cache *cache, const float *x,
                                    const int32_t *lists, const reference *ref, int32_t layer, schedule plan, const char *path)
{
    const dsa_config *c = &ctx->config;
    int32_t heads = c->n_index_heads, dim = c->dim_index;
    int64_t rows = ref->n < PROBE_ROWS ? ref->n : PROBE_ROWS, done = 0, n, wrong_layer = 0, wrong_call = 0, misplaced = 0;
    float *q = allocate_floats(rows * heads * dim), *w = allocate_floats(rows * heads), *scores = allocate_floats(rows * ref->n);
    float *keys = allocate_floats(ref->n * dim);
    int32_t *picked = (int32_t *)allocate((size_t)rows * (size_t)ref->k, sizeof *picked);
    int32_t *a = (int32_t *)allocate((size_t)ref->k, sizeof *a), *b = (int32_t *)allocate((size_t)ref->k, sizeof *b);
    double *exact = (double *)allocate((size_t)ref->n, 2 * sizeof *exact), common = 0, wanted = 0, ab = 0, squares = 0;
    dsa_status status = dsa_cache_read(ctx, cache, 0, ref->n, keys);
    for (; status == DSA_OK && done < ref->n; done += n) {
        n = next_chunk(plan, done, ref->n);
        if (n > rows) n = rows;
        status = index_queries(ctx, &block->attention, x + done * c->dim_hidden, n, done, q, w);
        if (status == DSA_OK) status = score_rows(ctx, cache, done, n, q, w, scores, ref->n, picked);
        if (status == DSA_OK) status = round_queries(cache, n, heads, q, w);
        if (status != DSA_OK) break;
        for (int64_t i = 0; i < n; i++) {
            int64_t t = done + i;
            const float *row = scores + i * ref->n;
            const int32_t *list = lists + t * ref->k;
            exact_scores(q + i * heads * dim, w + i * heads, keys, heads, dim, t + 1, exact);
            wrong_layer += !is_top_k(list, ref->k, exact, 0, t + 1, 0, TIE, exact + ref->n);
            wrong_call += !is_top_k(picked + i * ref->k, ref->k, exact, 0, t + 1, 0, TIE, exact + ref->n);
            for (int64_t s = 0; s < ref->n; s++) {
                if (s > t) misplaced += row[s] != -HUGE_VALF;
                else ab += (double)row[s] * exact[s], squares += (double)row[s] * (double)row[s] + exact[s] * exact[s];
            }
            int32_t n_a = visible_set(list, ref->k, t + 1, a), n_b = visible_set(ref->lists[layer] + t * ref->k, ref->k, t + 1, b);
            common += common_entries(a, n_a, b, n_b);
            wanted += n_b;
        }
    }
    if (called(r, status, path)) {
        report(r, "sim", squares == 0 ? 0 : 1 - 2 * ab / squares, 5e-6, "%s/index_scores.%ld", path, (long)layer);
        report(r, "inf_misplaced", (double)misplaced, 0, "%s/index_scores.%ld", path, (long)layer);
        report(r, "rows_differ", (double)wrong_layer, 0, "%s/topk.%ld", path, (long)layer);
        report(r, "rows_differ", (double)wrong_call, 0, "%s/score_select.%ld", path, (long)layer);
        report(r, "recall", wanted > 0 ? common / wanted : 1, (double)NAN, "%s/topk.%ld", path, (long)layer);
    }
    free(q);
    free(w);
    free(scores);
    free(keys);
    free(picked);
    free(a);
    free(b);
    free(exact);
}

static dsa_status layer_stores(const dsa_ctx *ctx, const format *f, int64_t n, layout where, int has_indexer, store *latent, store *index)
{
    dsa_cache_desc desc = { 0 };
    desc.capacity = n;
    desc.format = f->latent;
    memset(index, 0, sizeof *index);
    dsa_status status = store_make(ctx, desc, where == PAGED ? PAGE : 0, latent);
    desc.kind = DSA_INDEX_KEY;
    desc.format = f->index;
    if (status == DSA_OK && has_indexer) status = store_make(ctx, desc, where == PAGED ? PAGE : 0, index);
    return status;
}

/* One layer in one cache format. weights: as stored in the file; block: the same expanded to f32. */
static void check_layer(run *r, const dsa_config *config, const engine_block *block, const dsa_layer_weights *weights, const reference *ref,
                        int32_t layer, const float *x, const format *f, layout where, schedule plan)
{
    dsa_config exact = *config;
    dsa_ctx ctx, exact_ctx;
    store latent = { 0 }, index = { 0 };
    int64_t size = ref->n * config->dim_hidden;
    float *y = allocate_floats(size);
    int32_t *lists = (int32_t *)poisoned((size_t)ref->n * (size_t)ref->k * sizeof *lists);
    char path[96];
    exact.gemm = exact_gemm;
    snprintf(path, sizeof path, "layer/%s/%s/%s", f->name, layout_names[where], schedule_names[plan]);
    if (called(r, dsa_init(&ctx, config), path) && called(r, dsa_init(&exact_ctx, &exact), path)) {
        if (ref->attn_out[layer] &&
            called(r, layer_stores(&ctx, f, ref->n, where, block->has_indexer, &latent, &index), path) &&
            called(r, run_layer(&ctx, weights, &latent, block->has_indexer ? &index : NULL, x, ref->n, plan, stored_list(ref, layer), NULL, y), path)) {
            if (f->sim > 0)
                report(r, "sim", similarity_gap(y, ref->attn_out[layer], size), f->sim, "%s/attn_out.%ld", path, (long)layer);
            else
                report(r, "max_abs", max_abs(y, ref->attn_out[layer], size), F32_BOUND, "%s/attn_out.%ld", path, (long)layer);
        }
        store_free(&latent);
        store_free(&index);
        if (block->has_indexer &&
            called(r, layer_stores(&exact_ctx, f, ref->n, where, 1, &latent, &index), path) &&
            called(r, run_layer(&exact_ctx, weights, &latent, &index, x, ref->n, plan, NULL, lists, y), path))
            check_rounded_selection(r, &exact_ctx, block, &index.cache, x, lists, ref, layer, plan, path);
        store_free(&latent);
        store_free(&index);
    }
    free(y);
    free(lists);
}

/* The engine's texts name the file themselves. */
static int bad_model(const engine_model *m)
{
    fprintf(stderr, "conformance: %s\n", m->error);
    return FILE_BAD;
}

static int check_model(run *r, const st_file *file)
{
    engine_model model, stored;  /* attention weights expanded to f32; as the file has them */
    reference ref = { 0 };
    int result = engine_load_file(&model, file, r->path, 0) ? bad_model(&model) : 0;
    memset(&stored, 0, sizeof stored);
    if (!result && engine_load_file(&stored, file, r->path, ENGINE_AS_STORED)) result = bad_model(&stored);
    if (!result) result = reference_read(r, file, &model, &ref);
    if (!result) {
        trace first = trace_make(&model, &ref), other = trace_make(&model, &ref);
        int64_t failed = 0;
        for (int where = CONTIGUOUS; where <= PAGED; where++)
            for (int plan = 0; plan < N_SCHEDULES; plan++) {
                int is_first = where == CONTIGUOUS && plan == ONE_SHOT;
                int64_t tied = check_pass(r, &model, &ref, (layout)where, (schedule)plan, 0, F32_BOUND, 1, is_first ? &first : &other);
                if (tied > 0) tied = check_pass(r, &model, &ref, (layout)where, (schedule)plan, 1, F32_BOUND, 0, is_first ? &first : &other);
                if (is_first) failed = tied < 0;
            }
        dsa_config config = model.dsa;
        config.isa = r->base.isa;
        config.cuda = r->base.cuda;
        config.n_threads = r->base.n_threads;
        config.parallel_for = r->base.parallel_for;
        config.parallel_user = r->base.parallel_user;
        config.gemm = ENGINE_GEMM;
        config.detail = r->base.detail;
        config.detail_size = r->base.detail_size;
        for (size_t f = 0; !failed && f < sizeof formats / sizeof formats[0]; f++)
            for (int where = CONTIGUOUS; where <= PAGED; where++)
                for (int plan = 0; plan < N_SCHEDULES; plan++)
                    for (int32_t i = 0; i < model.n_layers; i++)
                        check_layer(r, &config, &model.blocks[i], &stored.blocks[i].attention, &ref, i, first.x[i], &formats[f], (layout)where, (schedule)plan);
        trace_free(&first);
        trace_free(&other);
    }
    reference_free(&ref);
    engine_unload(&stored);
    engine_unload(&model);
    return result;
}

/* ---- a model folder ---------------------------------------------------------------------------- */
/* `greedy`: a prompt and the tokens that greedy decoding puts behind it. */
static int check_greedy(run *r, const engine_model *m, const st_tensor *t)
{
    const int64_t row[] = { 1, -1 };
    if (!has_shape(r, t, 2, row)) return FILE_BAD;
    int64_t n = t->shape[1], prompt = n > GREEDY_TOKENS ? n - GREEDY_TOKENS : 1, wrong = 0;
    int32_t *want = tensor_int32(r, t);
    if (!want) return FILE_BAD;
    engine e;
    store *stores = (store *)allocate((size_t)m->n_layers, 2 * sizeof *stores);
    float *logits = allocate_floats(m->n_vocab);
    int ok = open_engine(r, &e, m, n, CONTIGUOUS, stores, "greedy");
    if (ok) ok = engine_called(r, engine_forward(&e, want, (int32_t)prompt, logits, 1, NULL), &e, "greedy");
    for (int64_t i = prompt; ok && i < n; i++) {
        int32_t token = engine_argmax(logits, m->n_vocab);   /* its own choice goes on, as in generation */
        wrong += token != want[i];
        if (i + 1 < n) ok = engine_called(r, engine_forward(&e, &token, 1, logits, 1, NULL), &e, "greedy");
    }
    if (ok) report(r, "bytes_differ", (double)wrong, 0, "greedy");
    close_engine(&e, stores, m->n_layers);
    free(stores);
    free(want);
    free(logits);
    return 0;
}

static int check_model_folder(run *r, const st_file *file, const char *dir)
{
    static const struct { layout where; schedule plan; int replay; } passes[] = {
        { CONTIGUOUS, ONE_SHOT, 1 }, { PAGED, CHUNKED, 1 }, { CONTIGUOUS, ONE_SHOT, 0 }, { CONTIGUOUS, DECODE, 0 }, { PAGED, CHUNKED, 0 } };
    engine_model model;
    reference ref = { 0 };
    const st_tensor *greedy = st_find(file, "greedy");
    int result = engine_load_dir(&model, dir, 0) ? bad_model(&model) : reference_read(r, file, &model, &ref);
    if (!result) {
        trace t = trace_make(&model, &ref);
        for (size_t i = 0; i < sizeof passes / sizeof passes[0]; i++)
            check_pass(r, &model, &ref, passes[i].where, passes[i].plan, passes[i].replay, MODEL_BOUND, 0, &t);
        trace_free(&t);
        if (greedy) result = check_greedy(r, &model, greedy);
    }
    reference_free(&ref);
    engine_unload(&model);
    return result;
}

#endif

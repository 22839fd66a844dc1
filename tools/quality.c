/* quality - how much of dense attention does the indexer's choice keep, layer by layer and head by head?

   Build: cc -O3 -o build/quality tools/quality.c -lm -pthread      (or: make tools) */
#define _POSIX_C_SOURCE 200809L
#define DSA_IMPLEMENTATION
#include "needle.h"

static const char help[] =
    "usage: quality MODEL_DIR --text FILE [options]\n"
    "\n"
    "Lets a byte-level model read documents (running text with facts and questions, as needle makes them) with dense attention, and\n"
    "asks at every position what sparse attention would have kept, for each budget:\n"
    "  mass     probability that dense attention gives to the selected rows, per head (1: nothing is lost)\n"
    "  window   the same for the newest rows instead, and\n"
    "  best     for the best choice there is, the top-k of the head-summed attention\n"
    "  recall   part of that best choice that the indexer selects\n"
    "  error    |out - dense out| / |dense out| of a head, over the latents\n"
    "averaged over the second half of the positions. Then the loss and the retrieval of the whole model for each budget, beside\n"
    "dense and window.\n"
    "\n"
    "  --text FILE        running text; the names come from it too (examples/kjv-heldout.txt)\n"
    "  --context N        bytes in a document (default 2048)\n"
    "  --documents N      for the masses (default 2)\n"
    "  --queries N        questions asked for each retrieval figure, at least (default 40; 0: no retrieval)\n"
    "  --budgets A,B,..   default 16,32,64,128,256\n"
    "  --seed S           of the documents (default 0)\n"
    "  --threads N        default 1\n"
    "  --isa NAME         auto (default), scalar, avx2, avx512, neon\n"
    "  --json             one JSON object instead of text; tools/plot.py draws it\n"
    "\n"
    "Exit status: 0 success, 2 bad usage or bad input. Progress goes to standard error.\n";

enum { MAX_BUDGETS = 16 };

typedef struct figure { double mass, window, best, recall, error; } figure;   /* sums over rows; recall does not depend on the head */

typedef struct quality {
    engine *e;
    int32_t n_budgets, budgets[MAX_BUDGETS], context, documents;
    figure *of;                  /* [layers, budgets, heads] */
    double rows;                 /* that each sum is over */
    float *in;                   /* [layers][context, hidden] what the layers saw */
    void *workspace;
    size_t workspace_size;
} quality;

static void die(const char *what, const char *detail) {
    fprintf(stderr, "quality: %s%s%s\n", what, detail[0] != '\0' ? ": " : "", detail);
    exit(2);
}
static void *must(void *p) { if (p == NULL) die("out of memory", ""); return p; }
static float *floats(int64_t n) { return (float *)must(calloc((size_t)n + 1, sizeof(float))); }
static void check(const quality *q, dsa_status status) { if (status != DSA_OK) die(dsa_status_text(status), q->e->detail); }
static void *room(quality *q, size_t bytes) {
    if (bytes > q->workspace_size) {
        free(q->workspace);
        q->workspace = must(malloc(bytes));
        q->workspace_size = bytes;
    }
    return q->workspace;
}

static void project(quality *q, const dsa_tensor *w, int64_t rows, int64_t in, int64_t out, const float *x, float *y) {
    dsa_linear_args a;
    memset(&a, 0, sizeof a);
    a.n_rows = rows;
    a.dim_in = (int32_t)in;
    a.dim_out = (int32_t)out;
    a.w = *w;
    a.x = x;
    a.y = y;
    check(q, dsa_linear_workspace(&q->e->ctx, &a, &a.workspace_size));
    a.workspace = room(q, a.workspace_size);
    check(q, dsa_linear(&q->e->ctx, &a));
}

/* out and lse [rows, H] of attention over lists, a range or all visible rows. */
static void attend(quality *q, dsa_attend_args a, int64_t rows, float *out, float *lse) {
    const dsa_config *c = &q->e->ctx.config;
    dsa_attend_state s;
    memset(&s, 0, sizeof s);
    s.n_rows = rows;
    s.max = floats(rows * c->n_heads);
    s.sum = floats(rows * c->n_heads);
    s.out = out;
    check(q, dsa_attend_workspace(&q->e->ctx, &a, &s, &a.workspace_size));
    a.workspace = room(q, a.workspace_size);
    check(q, dsa_attend(&q->e->ctx, &a, &s, NULL, lse, NULL));
    free(s.max);
    free(s.sum);
}

/* The mass of a set is e^(lse of the set - lse of all): nothing of size [heads, rows, rows] is needed. */
static void add_mass(const quality *q, int64_t rows, int64_t first, const float *lse, const float *all, figure *f, size_t field) {
    const int32_t H = q->e->ctx.config.n_heads;
    for (int64_t t = first; t < rows; t++)
        for (int32_t h = 0; h < H; h++) *(double *)(void *)((char *)&f[h] + field) += exp((double)lse[t * H + h] - (double)all[t * H + h]);
}

/* One layer after a dense pass: its caches hold the document. Queries are computed again from what the layer saw. */
static void layer_quality(quality *q, int32_t layer) {
    engine *e = q->e;
    const dsa_config *c = &e->ctx.config;
    const dsa_layer_weights *w = &e->model->blocks[layer].attention;
    const int64_t n = q->context, H = c->n_heads, R = c->dim_latent, W = R + c->dim_rope, dim_q = c->dim_nope + c->dim_rope, first = n / 2;
    const int64_t index_dim = (int64_t)c->n_index_heads * c->dim_index;
    const float *x = q->in + layer * n * c->dim_hidden;
    float *qr = floats(n * c->dim_q_lora), *qh = floats(n * H * dim_q), *q_abs = floats(n * H * W);
    float *iq = floats(n * index_dim), *iw = floats(n * c->n_index_heads);
    float *dense = floats(n * H * R), *lse_all = floats(n * H), *out = floats(n * H * R), *lse = floats(n * H), *p = floats(n * n);
    int64_t *positions = (int64_t *)must(malloc((size_t)n * sizeof *positions)), *ks = (int64_t *)must(malloc((size_t)n * sizeof *ks)),
            *ke = (int64_t *)must(malloc((size_t)n * sizeof *ke));
    const float *kv_b = (const float *)w->kv_b.data;
    dsa_rope rope = dsa_config_rope(&e->ctx, (int32_t)dim_q), index_rope = dsa_config_index_rope(&e->ctx);
    for (int64_t t = 0; t < n; t++) { positions[t] = t; ke[t] = t + 1; }
    project(q, &w->q_a, n, c->dim_hidden, c->dim_q_lora, x, qr);
    dsa_rms_norm(qr, n, c->dim_q_lora, c->dim_q_lora, (const float *)w->q_a_norm.data, c->norm_eps);
    project(q, &w->q_b, n, c->dim_q_lora, H * dim_q, qr, qh);
    dsa_rope_rows(qh, n, H * dim_q, c->n_heads, dim_q, (int32_t)dim_q, &rope, positions, 0);
    for (int64_t i = 0; i < n * H; i++) {                /* q_lat = W_UK^T q_nope, q_pe behind it */
        const float *uk = kv_b + i % H * (c->dim_nope + c->dim_v) * R;
        for (int32_t o = 0; o < c->dim_nope; o++)
            for (int64_t k = 0; k < R; k++) q_abs[i * W + k] += qh[i * dim_q + o] * uk[o * R + k];
        memcpy(q_abs + i * W + R, qh + i * dim_q + c->dim_nope, (size_t)c->dim_rope * sizeof(float));
    }
    project(q, &w->index_q_b, n, c->dim_q_lora, index_dim, qr, iq);
    dsa_rope_rows(iq, n, index_dim, c->n_index_heads, c->dim_index, c->dim_index, &index_rope, positions, 0);
    project(q, &w->index_w, n, c->dim_hidden, c->n_index_heads, x, iw);
    for (int64_t i = 0; i < n * c->n_index_heads; i++) iw[i] *= (float)(1 / sqrt((double)index_dim));

    dsa_seq seq;
    memset(&seq, 0, sizeof seq);
    seq.latent = &e->latent[layer];
    seq.index = &e->index[layer];
    seq.n_q = (int32_t)n;
    dsa_attend_backward_args b;                          /* gives p, the heads' attention summed up, without any gradient */
    memset(&b, 0, sizeof b);
    b.attend.n_seqs = 1;
    b.attend.seqs = &seq;
    b.attend.q = q_abs;
    b.attend.what = DSA_ATTEND_VISIBLE;
    attend(q, b.attend, n, dense, lse_all);
    b.lse = lse_all;
    b.target = p;
    b.target_stride = n;
    check(q, dsa_attend_backward_workspace(&e->ctx, &b, &b.attend.workspace_size));
    b.attend.workspace = room(q, b.attend.workspace_size);
    check(q, dsa_attend_backward(&e->ctx, &b));

    for (int32_t i = 0; i < q->n_budgets; i++) {
        const int32_t k = q->budgets[i];
        figure *f = q->of + (layer * q->n_budgets + i) * H;
        int32_t *chosen = (int32_t *)must(malloc((size_t)(2 * n * k) * sizeof *chosen)), *best = chosen + n * k;
        dsa_score_args score;
        dsa_select_args select;
        dsa_selection sel;
        dsa_attend_args a = b.attend;
        memset(&score, 0, sizeof score);
        memset(&select, 0, sizeof select);
        memset(&sel, 0, sizeof sel);
        sel.top_k = k;
        sel.indices = chosen;
        score.n_seqs = 1;
        score.seqs = &seq;
        score.q = iq;
        score.w = iw;
        check(q, dsa_score_select_workspace(&e->ctx, &score, &sel, &score.workspace_size));
        score.workspace = room(q, score.workspace_size);
        check(q, dsa_score_select(&e->ctx, &score, &sel));
        sel.indices = best;
        select.n_rows = n;
        select.scores = p;
        select.n_cols = select.stride = n;
        for (int64_t t = 0; t < n; t++) ks[t] = 0;
        select.ks = ks;
        select.ke = ke;
        check(q, dsa_select_workspace(&e->ctx, &select, &sel, &select.workspace_size));
        select.workspace = room(q, select.workspace_size);
        check(q, dsa_select(&e->ctx, &select, &sel));

        a.what = DSA_ATTEND_LIST;
        a.n_indices = k;
        a.indices = chosen;
        attend(q, a, n, out, lse);
        add_mass(q, n, first, lse, lse_all, f, offsetof(figure, mass));
        for (int64_t t = first; t < n; t++) {
            int32_t common = 0, u = 0, v = 0;            /* both lists ascend */
            for (int64_t h = 0; h < H; h++) {
                double d = 0, all = 0;
                for (int64_t r = 0; r < R; r++) {
                    const double have = (double)out[(t * H + h) * R + r], want = (double)dense[(t * H + h) * R + r];
                    d += (have - want) * (have - want);
                    all += want * want;
                }
                f[h].error += sqrt(d / (all > 0 ? all : 1));
            }
            while (u < k && v < k) {
                const int32_t x_ = chosen[t * k + u], y_ = best[t * k + v];
                if (x_ < 0 || y_ < 0) break;
                common += x_ == y_;
                u += x_ <= y_;
                v += y_ <= x_;
            }
            for (int64_t h = 0; h < H; h++) f[h].recall += (double)common / (double)(t + 1 < k ? t + 1 : k);
        }
        a.indices = best;
        attend(q, a, n, out, lse);
        add_mass(q, n, first, lse, lse_all, f, offsetof(figure, best));
        a.what = DSA_ATTEND_RANGE;
        for (int64_t t = 0; t < n; t++) ks[t] = t + 1 > k ? t + 1 - k : 0;
        a.ks = ks;
        a.ke = ke;
        attend(q, a, n, out, lse);
        add_mass(q, n, first, lse, lse_all, f, offsetof(figure, window));
        free(chosen);
    }
    free(qr); free(qh); free(q_abs); free(iq); free(iw);
    free(dense); free(lse_all); free(out); free(lse); free(p);
    free(positions); free(ks); free(ke);
}

static void all_masses(quality *q, const needle_text *text, uint64_t seed) {
    const engine_model *m = q->e->model;
    float **taps = (float **)must(calloc((size_t)m->n_layers, sizeof *taps));
    engine_hooks hooks;
    memset(&hooks, 0, sizeof hooks);
    hooks.attn_in = taps;
    for (int32_t i = 0; i < m->n_layers; i++) taps[i] = q->in + (int64_t)i * q->context * m->dim_hidden;
    for (int32_t d = 0; d < q->documents; d++) {
        needle_document doc;
        fprintf(stderr, "quality: document %ld of %ld\n", (long)d + 1, (long)q->documents);
        if (needle_document_make(&doc, text, q->context, &seed) != 0) die("out of memory", "");
        if (engine_reset(q->e) != 0 || engine_forward(q->e, doc.tokens, doc.n, NULL, 0, &hooks) != 0) die(q->e->error, "");
        for (int32_t i = 0; i < m->n_layers; i++) layer_quality(q, i);
        q->rows += q->context - q->context / 2;
        needle_document_free(&doc);
    }
    free(taps);
}

static const char *mode_name(dsa_layer_mode mode) {
    return mode == DSA_LAYER_DENSE ? "dense" : mode == DSA_LAYER_WINDOW ? "window" : "dsa";
}
static needle_result retrieval(quality *q, const needle_text *text, dsa_layer_mode mode, int32_t k, int64_t queries, uint64_t seed) {
    needle_result r;
    float *logits = floats((int64_t)NEEDLE_CHUNK * 256);
    memset(&r, 0, sizeof r);
    if (engine_set_attention(q->e, mode, k) != 0) die(q->e->error, "");
    fprintf(stderr, "quality: retrieval, %s %ld\n", mode_name(mode), (long)k);
    while (r.asked < queries) {
        needle_document d;
        if (needle_document_make(&d, text, q->context, &seed) != 0) die("out of memory", "");
        if (needle_read(q->e, &d, logits, &r, NULL, NULL) != 0) die(q->e->error, "");
        needle_document_free(&d);
    }
    free(logits);
    return r;
}

/* Mean over the heads [0, n) of a field. */
static double mean(const quality *q, const figure *f, int32_t n, size_t field) {
    double sum = 0;
    for (int32_t h = 0; h < n; h++) sum += *(const double *)(const void *)((const char *)&f[h] + field);
    return sum / n / q->rows;
}
static double over_layers(const quality *q, int32_t budget, size_t field) {
    double sum = 0;
    for (int32_t l = 0; l < q->e->model->n_layers; l++)
        sum += mean(q, q->of + (l * q->n_budgets + budget) * q->e->ctx.config.n_heads, q->e->ctx.config.n_heads, field);
    return sum / q->e->model->n_layers;
}

static void print_retrieval(quality *q, const needle_text *text, dsa_layer_mode mode, int32_t k, int64_t queries, uint64_t seed, int json,
                            int last) {
    needle_result r = retrieval(q, text, mode, k, queries, seed);
    const double right = (double)r.right / (double)r.asked, bits = r.bits / (double)r.n_bytes;
    if (json)
        printf("    {\"attention\": \"%s\", \"budget\": %ld, \"accuracy\": %.6f, \"bits_per_byte\": %.6f, \"asked\": %lld}%s\n",
               mode_name(mode), (long)k, right, bits, (long long)r.asked, last ? "" : ",");
    else printf("%-8s %6ld   %6.1f %%   %.4f\n", mode_name(mode), (long)k, 100 * right, bits);
    fflush(stdout);
}

static void print(quality *q, const char *dir, const needle_text *text, int64_t queries, uint64_t seed, int json) {
    const int32_t L = q->e->model->n_layers, H = q->e->ctx.config.n_heads;
    if (json) {
        printf("{\"context\": %ld, \"documents\": %ld, \"isa\": \"%s\",\n  \"layers\": [\n", (long)q->context, (long)q->documents,
               dsa_isa_name(dsa_query_isa(&q->e->ctx)));
        for (int32_t l = 0; l < L; l++)
            for (int32_t i = 0; i < q->n_budgets; i++)
                for (int32_t h = 0; h < H; h++) {
                    const figure *f = q->of + (l * q->n_budgets + i) * H + h;
                    printf("    {\"layer\": %ld, \"head\": %ld, \"budget\": %ld, \"mass\": %.6f, \"window\": %.6f, \"best\": %.6f, ",
                           (long)l, (long)h, (long)q->budgets[i], f->mass / q->rows, f->window / q->rows, f->best / q->rows);
                    printf("\"recall\": %.6f, \"error\": %.6f}%s\n", f->recall / q->rows, f->error / q->rows,
                           l + 1 == L && i + 1 == q->n_budgets && h + 1 == H ? "" : ",");
                }
        printf("  ],\n  \"retrieval\": [\n");
    } else {
        printf("%s, context %ld, %ld documents, second half of the positions, %s\n\n", dir, (long)q->context, (long)q->documents,
               dsa_isa_name(dsa_query_isa(&q->e->ctx)));
        printf("layer  budget    mass  window    best  recall   error   mass by head\n");
        for (int32_t l = 0; l <= L; l++)
            for (int32_t i = 0; i < q->n_budgets; i++) {
                const figure *f = q->of + ((l < L ? l : 0) * q->n_budgets + i) * H;
                const size_t at[5] = { offsetof(figure, mass), offsetof(figure, window), offsetof(figure, best), offsetof(figure, recall),
                                       offsetof(figure, error) };
                if (l < L) printf("%5ld  %6ld", (long)l, (long)q->budgets[i]);
                else printf("  all  %6ld", (long)q->budgets[i]);
                for (int k = 0; k < 5; k++) printf("  %6.3f", l < L ? mean(q, f, H, at[k]) : over_layers(q, i, at[k]));
                for (int32_t h = 0; h < H && l < L && h < 16; h++) printf("%s%.2f", h == 0 ? "   " : " ", f[h].mass / q->rows);
                printf("\n");
            }
        if (queries > 0) printf("\nattention  k      right    bits per byte\n");
    }
    if (queries > 0) {
        print_retrieval(q, text, DSA_LAYER_DENSE, q->context, queries, seed, json, 0);
        for (int32_t i = 0; i < q->n_budgets; i++) print_retrieval(q, text, DSA_LAYER_SPARSE, q->budgets[i], queries, seed, json, 0);
        for (int32_t i = 0; i < q->n_budgets; i++)
            print_retrieval(q, text, DSA_LAYER_WINDOW, q->budgets[i], queries, seed, json, i + 1 == q->n_budgets);
    }
    if (json) printf("  ]\n}\n");
}

static int usage_error(const char *what, const char *detail) {
    fprintf(stderr, "quality: %s%s (quality --help explains)\n", what, detail);
    return 2;
}

int main(int argc, char **argv) {
    const char *dir = NULL, *text_path = NULL;
    int64_t context = 2048, documents = 2, queries = 40, threads = 1, seed = 0;
    int json = 0;
    char error[512];
    engine_options options;
    quality q;
    memset(&options, 0, sizeof options);
    memset(&q, 0, sizeof q);
    options.gemm = ENGINE_GEMM;
    q.n_budgets = 5;
    for (int i = 0; i < 5; i++) q.budgets[i] = 16 << i;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        int bad = 0;
        if (strcmp(name, "--help") == 0) return fputs(help, stdout) == EOF || fflush(stdout) != 0 ? 2 : 0;
        if (strcmp(name, "--json") == 0) { json = 1; continue; }
        if (name[0] != '-') {
            if (dir != NULL) return usage_error("more than one model folder: ", name);
            dir = name;
            continue;
        }
        if (value == NULL) return usage_error("unknown option, or its value is missing: ", name);
        if (strcmp(name, "--text") == 0) text_path = value;
        else if (strcmp(name, "--context") == 0) bad = engine_parse_int(value, NEEDLE_MIN_CONTEXT, 1 << 16, &context);
        else if (strcmp(name, "--documents") == 0) bad = engine_parse_int(value, 1, 1 << 20, &documents);
        else if (strcmp(name, "--queries") == 0) bad = engine_parse_int(value, 0, 1 << 30, &queries);
        else if (strcmp(name, "--threads") == 0) bad = engine_parse_int(value, 1, 256, &threads);
        else if (strcmp(name, "--seed") == 0) bad = engine_parse_int(value, 0, INT64_MAX, &seed);
        else if (strcmp(name, "--isa") == 0) bad = engine_parse_isa(value, &options.isa);
        else if (strcmp(name, "--budgets") == 0) {
            char *end = argv[i + 1];
            for (q.n_budgets = 0; bad == 0 && *end != '\0';) {
                long k = strtol(end, &end, 10);
                if (k < 1 || k > 1 << 16 || q.n_budgets == MAX_BUDGETS || (*end != ',' && *end != '\0')) bad = 1;
                else q.budgets[q.n_budgets++] = (int32_t)k;
                if (*end == ',') end++;
            }
            bad |= q.n_budgets == 0;
        } else return usage_error("unknown option: ", name);
        if (bad != 0) {
            fprintf(stderr, "quality: %s: '%s' is no valid value (quality --help explains)\n", name, value);
            return 2;
        }
        i++;
    }
    if (dir == NULL) return usage_error("which model? MODEL_DIR is missing", "");
    if (text_path == NULL) return usage_error("--text is missing", "");

    needle_text text;
    engine_model model;
    engine e;
    if (needle_text_load(&text, text_path, error, sizeof error) != 0) die(error, "");
    options.n_threads = (int32_t)threads;
    options.max_tokens = context;
    options.mode = DSA_LAYER_DENSE;
    if (engine_load_dir(&model, dir, 0) != 0) die(model.error, "");
    if (model.n_vocab != 256) die("this tool needs a byte-level model (vocab_size 256)", "");
    if (context > model.max_positions) die("--context is more than the model's positions", "");
    for (int32_t i = 0; i < model.n_layers; i++)
        if (!model.blocks[i].has_indexer) die("a layer without an indexer of its own: not supported", "");
    if (engine_open(&e, &model, &options) != 0) die(e.error, "");
    q.e = &e;
    q.context = (int32_t)context;
    q.documents = (int32_t)documents;
    q.of = (figure *)must(calloc((size_t)(model.n_layers * q.n_budgets) * (size_t)model.dsa.n_heads, sizeof *q.of));
    q.in = floats((int64_t)model.n_layers * context * model.dim_hidden);
    all_masses(&q, &text, (uint64_t)seed);
    print(&q, dir, &text, queries, (uint64_t)seed, json);
    engine_close(&e);
    engine_unload(&model);
    needle_text_free(&text);
    free(q.of);
    free(q.in);
    free(q.workspace);
    if (fflush(stdout) == 0 && !ferror(stdout)) return 0;
    fprintf(stderr, "quality: cannot write to standard output\n");
    return 2;
}

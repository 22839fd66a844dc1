/* dsa.h inside ggml: DeepSeek Sparse Attention as a custom operation of somebody else's engine.

       make engine-ggml && build/engine_ggml        (ggml comes from PyPI: pip install libggml-python, MIT licence)

   The graph holds the cache as ggml tensors, f32 [width, rows] as llama.cpp keeps them. The custom operation lays a dsa_cache over each
   of them, no copy, and runs dsa_step on ggml's own threads: each takes some of the queries, whose bits do not depend on who does.
   The judge is ggml itself, in the same graph: ggml_lightning_indexer, ggml_top_k, ggml_get_rows, ggml_mul_mat and ggml_soft_max_ext for
   each query. Once with more rows than k, once with fewer, where everything visible is attended to. */
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include <ggml.h>
#include <ggml-cpu.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 8, LATENT = 128, ROPE = 16, WIDTH = LATENT + ROPE, INDEX_HEADS = 32, INDEX_DIM = 128, TOP_K = 64, THREADS = 2 };

/* ---- the operation ------------------------------------------------------------------------------ */
typedef struct sparse_attention {
    dsa_ctx ctx;
    size_t bytes;                        /* workspace of one thread */
    char *workspace;                     /* [THREADS, bytes] */
    dsa_status failed[THREADS];
} sparse_attention;

static void check(dsa_status status)
{
    if (status == DSA_OK) return;
    fprintf(stderr, "dsa: %s\n", dsa_status_text(status));
    exit(EXIT_FAILURE);
}

/* A cache over a contiguous f32 tensor [width, rows]: one page. */
static dsa_cache cache_over(const dsa_ctx *ctx, dsa_kind kind, struct ggml_tensor *t)
{
    dsa_cache cache;
    dsa_cache_desc desc = { .kind = kind, .format = DSA_F32, .page_size = (int32_t)t->ne[1] };
    check(dsa_cache_view(ctx, &desc, t->data, 1, t->nb[1] * (size_t)t->ne[1], NULL, 0, t->ne[1], &cache));
    return cache;
}

/* src: q [WIDTH, HEADS, T], rows [WIDTH, N], index_q [INDEX_DIM, INDEX_HEADS, T], keys [INDEX_DIM, N], w [INDEX_HEADS, T].
   dst [LATENT, HEADS, T]. Query t sits at row N - T + t. */
static void sparse_attention_op(struct ggml_tensor *dst, int ith, int nth, void *userdata)
{
    sparse_attention *op = userdata;
    dsa_cache latents = cache_over(&op->ctx, DSA_LATENT, dst->src[1]), keys = cache_over(&op->ctx, DSA_INDEX_KEY, dst->src[3]);
    const int64_t n = dst->src[1]->ne[1], n_q = dst->ne[2];
    for (int64_t t = ith; t < n_q; t += nth) {
        dsa_seq seq = { .latent = &latents, .index = &keys, .len = n - n_q + t + 1, .n_q = 1 };
        dsa_step_args args = { .n_seqs = 1, .seqs = &seq, .q = (float *)((char *)dst->src[0]->data + (size_t)t * dst->src[0]->nb[2]),
                               .index_q = (float *)((char *)dst->src[2]->data + (size_t)t * dst->src[2]->nb[2]),
                               .index_w = (float *)((char *)dst->src[4]->data + (size_t)t * dst->src[4]->nb[1]),
                               .out = (float *)((char *)dst->data + (size_t)t * dst->nb[2]),
                               .workspace = op->workspace + (size_t)ith * op->bytes, .workspace_size = op->bytes };
        dsa_status status = dsa_step(&op->ctx, &args);
        if (status != DSA_OK) op->failed[ith] = status;
    }
}

static void sparse_attention_init(sparse_attention *op)
{
    dsa_config config = { .n_heads = HEADS, .dim_latent = LATENT, .dim_rope = ROPE, .n_index_heads = INDEX_HEADS, .dim_index = INDEX_DIM,
                          .top_k = TOP_K, .dim_nope = 32 };
    *op = (sparse_attention){ 0 };
    check(dsa_init(&op->ctx, &config));
    dsa_cache latents, keys;
    dsa_seq seq = { .latent = &latents, .index = &keys, .n_q = 1 };
    check(dsa_cache_create(&op->ctx, &(dsa_cache_desc){ .kind = DSA_LATENT, .capacity = 1 }, &latents));
    check(dsa_cache_create(&op->ctx, &(dsa_cache_desc){ .kind = DSA_INDEX_KEY, .capacity = 1 }, &keys));
    check(dsa_step_workspace(&op->ctx, &(dsa_step_args){ .n_seqs = 1, .seqs = &seq }, &op->bytes));
    dsa_cache_destroy(&latents);
    dsa_cache_destroy(&keys);
    op->workspace = malloc(THREADS * op->bytes);
    if (!op->workspace) exit(EXIT_FAILURE);
}

/* ---- the same by ggml ------------------------------------------------------------------------------ */

/* One query's attention over its list, or over its first `visible` rows where list is NULL. */
static struct ggml_tensor *attend(struct ggml_context *g, struct ggml_tensor *q, struct ggml_tensor *rows, struct ggml_tensor *list,
                                  int64_t visible, float scale)
{
    struct ggml_tensor *kv = list ? ggml_get_rows(g, rows, list) : ggml_view_2d(g, rows, WIDTH, visible, rows->nb[1], 0);
    struct ggml_tensor *p = ggml_soft_max_ext(g, ggml_mul_mat(g, kv, q), NULL, scale, 0.0f);           /* [rows, HEADS] */
    struct ggml_tensor *values = ggml_view_2d(g, kv, LATENT, kv->ne[1], kv->nb[1], 0);
    return ggml_mul_mat(g, ggml_cont(g, ggml_transpose(g, values)), p);                               /* [LATENT, HEADS] */
}

static uint64_t state = 1;
static float uniform(void)
{
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return (float)(state >> 40) / 8388608.0f - 1.0f;
}
static struct ggml_tensor *random_tensor(struct ggml_context *g, int64_t a, int64_t b, int64_t c, float size)
{
    struct ggml_tensor *t = ggml_new_tensor_3d(g, GGML_TYPE_F32, a, b, c);
    for (int64_t i = 0; i < a * b * c; i++) ((float *)t->data)[i] = size * uniform();
    return t;
}

/* Largest difference, relative to the largest value. */
static double compare(sparse_attention *op, int64_t n, int64_t n_q)
{
    struct ggml_context *g = ggml_init((struct ggml_init_params){ .mem_size = (size_t)256 << 20 });
    if (!g) exit(EXIT_FAILURE);
    struct ggml_tensor *q = random_tensor(g, WIDTH, HEADS, n_q, 1), *rows = random_tensor(g, WIDTH, n, 1, 1);
    struct ggml_tensor *index_q = random_tensor(g, INDEX_DIM, INDEX_HEADS, n_q, 1), *keys = random_tensor(g, INDEX_DIM, n, 1, 1);
    struct ggml_tensor *w = random_tensor(g, INDEX_HEADS, n_q, 1, 0.02f), *mask = ggml_new_tensor_2d(g, GGML_TYPE_F16, n, n_q);
    for (int64_t i = 0; i < n * n_q; i++) ((ggml_fp16_t *)mask->data)[i] = ggml_fp32_to_fp16(i % n <= n - n_q + i / n ? 0.0f : -INFINITY);

    struct ggml_tensor *args[5] = { q, rows, index_q, keys, w };
    struct ggml_tensor *ours = ggml_custom_4d(g, GGML_TYPE_F32, LATENT, HEADS, n_q, 1, args, 5, sparse_attention_op, THREADS, op);
    struct ggml_cgraph *graph = ggml_new_graph(g);
    ggml_build_forward_expand(graph, ours);

    struct ggml_tensor **theirs = calloc((size_t)n_q, sizeof *theirs);
    if (!theirs) exit(EXIT_FAILURE);
    struct ggml_tensor *scores = ggml_lightning_indexer(g, index_q, ggml_reshape_3d(g, keys, INDEX_DIM, 1, n), w, mask);
    struct ggml_tensor *lists = n > TOP_K + n_q ? ggml_top_k(g, scores, TOP_K) : NULL;                /* of [n, n_q]: [TOP_K, n_q] */
    for (int64_t t = 0; t < n_q; t++) {
        struct ggml_tensor *list = lists ? ggml_view_1d(g, lists, TOP_K, (size_t)t * lists->nb[1]) : NULL;
        theirs[t] = attend(g, ggml_view_2d(g, q, WIDTH, HEADS, q->nb[1], (size_t)t * q->nb[2]), rows, list, n - n_q + t + 1,
                           op->ctx.config.softmax_scale);
        ggml_build_forward_expand(graph, theirs[t]);
    }
    if (ggml_graph_compute_with_ctx(g, graph, THREADS) != GGML_STATUS_SUCCESS) exit(EXIT_FAILURE);
    for (int i = 0; i < THREADS; i++) check(op->failed[i]);

    double largest = 0, error = 0;
    for (int64_t t = 0; t < n_q; t++)
        for (int64_t i = 0; i < LATENT * HEADS; i++) {
            double a = (double)((float *)ours->data)[t * LATENT * HEADS + i], b = (double)((float *)theirs[t]->data)[i];
            largest = fmax(largest, fabs(b));
            error = !(fabs(a - b) <= error) ? fabs(a - b) : error;
        }
    free(theirs);
    ggml_free(g);
    return error / largest;
}

int main(void)
{
    static const struct { int64_t n, n_q; const char *what; } cases[] = {
        { 2000, 1, "decode, 64 of 2000 rows" }, { 1500, 5, "5 queries, 64 of 1500 rows" }, { 50, 7, "7 queries, all of 50 rows" } };
    sparse_attention op;
    int bad = 0;
    sparse_attention_init(&op);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double error = compare(&op, cases[i].n, cases[i].n_q);
        printf("%-28s dsa.h (%s) and ggml differ by %.1e of the largest output\n", cases[i].what,
               dsa_isa_name(dsa_query_isa(&op.ctx)), error);
        bad |= !(error <= 1e-5);
    }
    free(op.workspace);
    return bad ? EXIT_FAILURE : EXIT_SUCCESS;
}

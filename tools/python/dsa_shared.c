/* dsa_shared.c - dsa.h as a shared library, with flat calls for dsa_peers.py

       cc -O3 -shared -fPIC -o build/libdsa.so tools/python/dsa_shared.c -lm -pthread        (or: make shared)

   The library exports every public function of dsa.h. The two calls added here take plain numbers and pointers instead of structs, so
   that Python need not repeat struct layouts, which may change between versions: the compiler checks them here. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define DSA_IMPLEMENTATION
#include "../../dsa.h"

/* What all calls share: kernels, threads, and a buffer for the reason of a failure. */
typedef struct flat_options {
    int32_t isa, precision, n_threads;
    dsa_pool *pool;                      /* of n_threads; NULL: one task after the other */
    char *detail;
    size_t detail_size;
} flat_options;

/* Rows of n_seqs sequences in one pool of pages. block_table NULL: the pool as it lies, which all sequences share. */
typedef struct flat_pages {
    void *data;
    const float *scales;                 /* index keys: scales of one page elsewhere; NULL: in the pages */
    int64_t n_pages;
    int32_t page_size, format;           /* a dsa_type */
    size_t row_stride, page_stride;      /* bytes */
    const int32_t *block_table;          /* [n_seqs, table_stride] */
    int64_t n_blocks, table_stride;      /* entries that count in a row of it; int32s from row to row */
    const int64_t *lens;                 /* [n_seqs] */
} flat_pages;

DSA_API dsa_status dsa_flat_attend_add(const flat_options *o, const flat_pages *pages, int32_t n_seqs, int32_t n_q, int32_t n_heads,
                                       int32_t dim_latent, int32_t dim_rope, const float *q, float scale, int32_t what, int32_t physical,
                                       const int32_t *indices, int64_t n_indices, int64_t index_stride, const int32_t *counts,
                                       const int64_t *ks, const int64_t *ke, float *max, float *sum, float *out);
DSA_API dsa_status dsa_flat_attend_finish(const flat_options *o, int64_t n_rows, int32_t n_heads, int32_t dim_v, const float *sinks,
                                          float *max, float *sum, float *out, float *lse, float *max_logit);
DSA_API dsa_status dsa_flat_score(const flat_options *o, const flat_pages *pages, int32_t n_seqs, int32_t n_q, int32_t n_heads, int32_t dim,
                                  const float *q, const float *w, const int64_t *ks, const int64_t *ke, int64_t n_cols, float *scores);

static dsa_status flat_init(const flat_options *o, dsa_config *config, dsa_ctx *ctx)
{
    config->isa = (dsa_isa)o->isa;
    config->precision = (dsa_precision)o->precision;
    config->n_threads = o->n_threads;
    config->parallel_for = o->pool ? dsa_pool_run : NULL;
    config->parallel_user = o->pool;
    config->hadamard = DSA_HADAMARD_OFF;                 /* keys and queries come rotated, if at all */
    config->detail = o->detail;
    config->detail_size = o->detail_size;
    return dsa_init(ctx, config);
}

/* One cache and one dsa_seq per sequence. The caller frees *caches and *seqs. */
static dsa_status flat_seqs(const dsa_ctx *ctx, const flat_pages *p, dsa_kind kind, int32_t n_seqs, int32_t n_q, dsa_cache **caches,
                            dsa_seq **seqs)
{
    int32_t i;
    *caches = (dsa_cache *)calloc((size_t)n_seqs + 1, sizeof **caches);
    *seqs = (dsa_seq *)calloc((size_t)n_seqs + 1, sizeof **seqs);
    if (!*caches || !*seqs) return DSA_ERR_MEMORY;
    for (i = 0; i < n_seqs; i++) {
        dsa_cache *c = &(*caches)[i];
        dsa_seq *s = &(*seqs)[i];
        dsa_status status;
        c->kind = kind;
        c->format = (dsa_type)p->format;
        c->dim = kind == DSA_LATENT ? ctx->config.dim_latent : ctx->config.dim_index;
        c->dim_rope = kind == DSA_LATENT ? ctx->config.dim_rope : 0;
        c->page_size = p->page_size;
        c->n_pages = p->n_pages;
        c->n_blocks = p->n_blocks;
        c->block_table = p->block_table ? p->block_table + i * p->table_stride : NULL;
        c->data = p->data;
        c->scales = (void *)(uintptr_t)p->scales;        /* only read */
        c->row_stride = p->row_stride;
        c->page_stride = p->page_stride;
        c->len = p->lens ? p->lens[i] : p->n_pages * p->page_size;
        status = dsa_cache_check(ctx, c);
        if (status != DSA_OK) return status;
        s->latent = kind == DSA_LATENT ? c : NULL;
        s->index = kind == DSA_INDEX_KEY ? c : NULL;
        s->n_q = n_q == 0 ? DSA_NONE : n_q;
        s->len = c->len == 0 ? DSA_NONE : c->len;
    }
    return DSA_OK;
}

static dsa_status flat_heads(const flat_options *o, int32_t n_heads, int32_t dim_latent, int32_t dim_rope, dsa_ctx *ctx)
{
    dsa_config config;
    memset(&config, 0, sizeof config);
    config.n_heads = n_heads;
    config.dim_latent = dim_latent;
    config.dim_rope = dim_rope == 0 ? DSA_NONE : dim_rope;
    config.index_rope_width = DSA_NONE;
    return flat_init(o, &config, ctx);
}

/* Adds one cache to the running softmax of n_seqs n_q rows; max, sum, out as dsa_attend_begin leaves them before the first. */
DSA_API dsa_status dsa_flat_attend_add(const flat_options *o, const flat_pages *pages, int32_t n_seqs, int32_t n_q, int32_t n_heads,
                                       int32_t dim_latent, int32_t dim_rope, const float *q, float scale, int32_t what, int32_t physical,
                                       const int32_t *indices, int64_t n_indices, int64_t index_stride, const int32_t *counts,
                                       const int64_t *ks, const int64_t *ke, float *max, float *sum, float *out)
{
    dsa_ctx ctx;
    dsa_cache *caches = NULL;
    dsa_seq *seqs = NULL;
    dsa_attend_state state;
    dsa_attend_args args;
    dsa_status status = flat_heads(o, n_heads, dim_latent, dim_rope, &ctx);
    if (status != DSA_OK) return status;
    memset(&state, 0, sizeof state);
    memset(&args, 0, sizeof args);
    state.n_rows = (int64_t)n_seqs * n_q;
    state.max = max;
    state.sum = sum;
    state.out = out;
    status = flat_seqs(&ctx, pages, DSA_LATENT, n_seqs, n_q, &caches, &seqs);
    args.n_seqs = n_seqs;
    args.seqs = seqs;
    args.q = q;
    args.scale = scale;
    args.what = (dsa_attend_what)what;
    args.index_kind = physical ? DSA_PHYSICAL : DSA_LOGICAL;
    args.indices = indices;
    args.n_indices = n_indices;
    args.index_stride = index_stride;
    args.counts = counts;
    args.ks = ks;
    args.ke = ke;
    if (status == DSA_OK) status = dsa_attend_workspace(&ctx, &args, &state, &args.workspace_size);
    if (status == DSA_OK) {
        args.workspace = malloc(args.workspace_size ? args.workspace_size : 1);
        status = args.workspace ? dsa_attend_add(&ctx, &args, &state) : DSA_ERR_MEMORY;
        free(args.workspace);
    }
    free(caches);
    free(seqs);
    return status;
}

/* out becomes the result in place. */
DSA_API dsa_status dsa_flat_attend_finish(const flat_options *o, int64_t n_rows, int32_t n_heads, int32_t dim_v, const float *sinks,
                                          float *max, float *sum, float *out, float *lse, float *max_logit)
{
    dsa_ctx ctx;
    dsa_attend_state state;
    dsa_status status = flat_heads(o, n_heads, dim_v, 0, &ctx);
    if (status != DSA_OK) return status;
    memset(&state, 0, sizeof state);
    state.n_rows = n_rows;
    state.max = max;
    state.sum = sum;
    state.out = out;
    return dsa_attend_finish(&ctx, &state, sinks, out, lse, max_logit);
}

/* Index scores of n_seqs n_q rows over FP8 keys: scores [rows, n_cols], -inf outside [ks, ke). */
DSA_API dsa_status dsa_flat_score(const flat_options *o, const flat_pages *pages, int32_t n_seqs, int32_t n_q, int32_t n_heads, int32_t dim,
                                  const float *q, const float *w, const int64_t *ks, const int64_t *ke, int64_t n_cols, float *scores)
{
    dsa_ctx ctx;
    dsa_config config;
    dsa_cache *caches = NULL;
    dsa_seq *seqs = NULL;
    dsa_score_args args;
    dsa_status status;
    memset(&config, 0, sizeof config);
    config.n_index_heads = n_heads;
    config.dim_index = dim;
    config.index_rope_width = DSA_NONE;
    status = flat_init(o, &config, &ctx);
    if (status != DSA_OK) return status;
    memset(&args, 0, sizeof args);
    status = flat_seqs(&ctx, pages, DSA_INDEX_KEY, n_seqs, n_q, &caches, &seqs);
    args.n_seqs = n_seqs;
    args.seqs = seqs;
    args.q = q;
    args.w = w;
    args.ks = ks;
    args.ke = ke;
    if (status == DSA_OK) status = dsa_score_workspace(&ctx, &args, &args.workspace_size);
    if (status == DSA_OK) {
        args.workspace = malloc(args.workspace_size ? args.workspace_size : 1);
        status = args.workspace ? dsa_score(&ctx, &args, scores, n_cols, n_cols) : DSA_ERR_MEMORY;
        free(args.workspace);
    }
    free(caches);
    free(seqs);
    return status;
}

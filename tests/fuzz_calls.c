/* fuzz_calls.c - the public calls with small random shapes and bad values.

   Every byte of the input is a decision: the config, the caches (owned, or views with a random block table), then a row
   of calls. Arrays are as long as the documentation asks for and not a byte longer, so that a sanitizer sees every step
   beyond. A call may refuse; what it must not do is crash, touch a cache that it refused to change, take a workspace
   that is too small, or hand out values outside their documented range. See fuzz.h for how to run it. */
#include "fuzz.h"
#include <math.h>
#include <setjmp.h>

#include <assert.h>
#define DSA_ASSERT(x) assert(x)
#define DSA_STATIC
#define DSA_IMPLEMENTATION
#include "../dsa.h"

enum { SEQS = 3, MOST_BYTES = 1 << 24 };

/* One run's world. Static, so that nothing lives in registers across the longjmp. */
static fuzz_input in;
static uint32_t bulk;                          /* state of the bulk data */
static int special;                            /* bulk data hold NaN, infinities and denormals */
static dsa_ctx ctx;
static dsa_cache latents[SEQS], keys[SEQS];
static int has_latent[SEQS], has_key[SEQS];
static void *blocks[256];                      /* everything that get() gave out */
static int n_blocks;
static size_t total;
static jmp_buf enough;

/* Memory of exactly this size until the end of the run. Shapes too large to try end the run. */
static void *get(int64_t count, size_t size)
{
    size_t bytes;
    void *p;
    if (count < 0) count = 0;
    if ((uint64_t)count > MOST_BYTES || (size_t)count * size > MOST_BYTES - total || n_blocks == 256) longjmp(enough, 1);
    bytes = (size_t)count * size;
    total += bytes;
    p = malloc(bytes ? bytes : 1);
    if (!p) longjmp(enough, 1);
    memset(p, 0xA5, bytes);
    blocks[n_blocks++] = p;
    return p;
}

static float *floats(int64_t count)
{
    static const float odd[] = { 0.0f, -0.0f, 1e-40f, -3e38f, 3e38f, 448.0f, 1e-4f, 65504.0f };
    float *x = (float *)get(count, sizeof *x);
    int64_t i;
    for (i = 0; i < count; i++) {
        uint32_t r = fuzz_random(&bulk);
        x[i] = ((float)(r >> 8) / 8388608.0f - 1.0f) * 2.0f;
        if (special && r % 16 == 0) {
            uint32_t kind = r >> 4 & 15;
            x[i] = kind < 8 ? odd[kind] : kind < 11 ? (float)NAN : kind < 13 ? (float)INFINITY : -(float)INFINITY;
        }
    }
    return x;
}

/* One decision in `chance` replaces a good value with an arbitrary one. */
static int32_t bad(int32_t good, int32_t chance)
{
    static const int32_t odd[] = { -1, 0, 1, 2, 3, 5, 7, 100, 255, -2, INT32_MAX, INT32_MIN, 1 << 30, 65536, 1025, -1000 };
    if (fuzz_below(&in, chance) != 0) return good;
    return odd[fuzz_below(&in, 16)];
}

static int64_t position(int64_t len)
{
    switch (fuzz_below(&in, 8)) {
    case 0: return INT64_MIN;
    case 1: return INT64_MAX;
    case 2: return -1;
    case 3: return len + 1;
    default: return fuzz_below(&in, (int32_t)(len < 200 ? len + 1 : 200));
    }
}

static int64_t *positions(int64_t rows, int64_t len)
{
    int64_t *p = (int64_t *)get(rows, sizeof *p), i;
    for (i = 0; i < rows; i++) p[i] = position(len);
    return p;
}

/* A workspace of the queried size; now and then one byte less, which the call must notice. */
static void *workspace(size_t wanted, size_t *given, int *too_small)
{
    *too_small = wanted > 0 && fuzz_below(&in, 8) == 0;
    *given = wanted - (size_t)*too_small;
    return get((int64_t)(*given > MOST_BYTES ? MOST_BYTES + 1 : *given), 1);
}

/* A batch without rows has nothing to do and may be content with any workspace. */
static void require_noticed(int too_small, int64_t rows, dsa_status status)
{
    REQUIRE(!too_small || rows == 0 || status != DSA_OK);
}

/* Tasks may run in any order: last to first here. */
static void backwards(void *user, int32_t n_tasks, dsa_task task, void *arg)
{
    const int32_t *most = (const int32_t *)user;
    REQUIRE(n_tasks <= *most);
    while (n_tasks-- > 0) task(arg, n_tasks);
}

/* ---- the world ----------------------------------------------------------------------------- */

static dsa_status make_config(void)
{
    static const int32_t dims[] = { 1, 2, 4, 8, 16, 20, 32, 130 };
    static int32_t n_threads;
    static char detail[40];
    dsa_config c;
    dsa_status status;
    memset(&c, 0, sizeof c);
    c.n_heads = bad(1 + fuzz_below(&in, 3), 32);
    c.dim_latent = bad(dims[fuzz_below(&in, 8)], 32);
    c.dim_rope = bad(fuzz_below(&in, 4) == 0 ? DSA_NONE : 2 * (1 + fuzz_below(&in, 4)), 32);
    c.n_index_heads = bad(1 + fuzz_below(&in, 3), 32);
    c.dim_index = bad(dims[3 + fuzz_below(&in, 4)], 32);
    c.top_k = bad(1 + fuzz_below(&in, 12), 32);
    c.dim_hidden = bad(1 + fuzz_below(&in, 9), 32);
    c.dim_q_lora = bad(1 + fuzz_below(&in, 9), 32);
    c.dim_nope = bad(1 + fuzz_below(&in, 5), 32);
    c.dim_v = bad(1 + fuzz_below(&in, 5), 32);
    c.softmax_scale = (float)bad(0, 16);
    c.rope_factor = bad(0, 8);
    c.rope_theta = bad(0, 16);
    c.rope_layout = (dsa_rope_layout)(bad(fuzz_below(&in, 2), 32) & 3);
    c.index_rope_interleaved = fuzz_below(&in, 2);
    c.index_rope_offset = bad(0, 8);
    c.index_rope_width = bad(0, 8);
    c.hadamard = (dsa_hadamard)fuzz_below(&in, 4);
    c.precision = (dsa_precision)fuzz_below(&in, 2);
    c.isa = fuzz_below(&in, 16) == 0 ? DSA_ISA_AVX512 : DSA_ISA_AUTO;
    c.n_threads = bad(1 + fuzz_below(&in, 4), 32);
    if (fuzz_below(&in, 2)) {
        c.parallel_for = backwards;
        c.parallel_user = &n_threads;
    }
    c.detail = detail;
    c.detail_size = (size_t)fuzz_below(&in, (int32_t)sizeof detail + 1);
    status = dsa_init(&ctx, &c);
    if (status == DSA_OK) n_threads = ctx.config.n_threads;
    return status;
}

static int make_cache(dsa_kind kind, dsa_cache *cache)
{
    dsa_cache_desc d;
    int64_t n_pages, n_table, i, len;
    int32_t *table = NULL;
    size_t page_bytes;
    memset(&d, 0, sizeof d);
    d.kind = kind;
    d.format = (dsa_type)bad(fuzz_below(&in, 2) ? DSA_F32 : fuzz_below(&in, 5), 64);
    d.dim = bad(0, 64);
    d.hadamard = (dsa_hadamard)(fuzz_below(&in, 8) == 0 ? fuzz_below(&in, 3) : 0);
    d.capacity = bad(1 + fuzz_below(&in, 40), 32);
    d.page_size = bad(fuzz_below(&in, 9), 32);
    if (fuzz_below(&in, 2)) {
        size_t bytes;
        if (dsa_cache_bytes(&ctx, &d, &bytes) != DSA_OK || bytes > MOST_BYTES) return 0;
        return dsa_cache_init(&ctx, &d, get((int64_t)bytes, 1), bytes, cache) == DSA_OK;
    }
    /* A view needs the pool to be what the caller says; everything else may be wrong. */
    n_pages = 1 + fuzz_below(&in, 9);
    if (d.page_size == 0) d.page_size = 1 + fuzz_below(&in, 5);
    if (dsa_page_bytes(kind, d.format, d.dim ? d.dim : kind == DSA_LATENT ? ctx.config.dim_latent : ctx.config.dim_index,
                       ctx.config.dim_rope, d.page_size, &page_bytes) != DSA_OK) return 0;
    n_table = fuzz_below(&in, 9);
    if (fuzz_below(&in, 4)) {
        table = (int32_t *)get(n_table, sizeof *table);
        for (i = 0; i < n_table; i++) table[i] = bad(fuzz_below(&in, (int32_t)n_pages), 32);
    }
    len = bad(fuzz_below(&in, 20), 16);
    if (page_bytes > MOST_BYTES / 16) return 0;
    return dsa_cache_view(&ctx, &d, memset(get(n_pages, page_bytes), 0, (size_t)n_pages * page_bytes), n_pages, 0, table, n_table, len, cache) == DSA_OK;
}

/* Wrong fields in a copy: the check must live with any of them. What passes may still be a lie, so it is not used. */
static void check_damaged(const dsa_cache *cache)
{
    dsa_cache c = *cache;
    switch (fuzz_below(&in, 10)) {
    case 0: c.page_size = bad(0, 1); break;
    case 1: c.n_pages = bad(0, 1); break;
    case 2: c.n_blocks = fuzz_below(&in, 3) - 2; break;
    case 3: c.data = NULL; break;
    case 4: c.row_stride = (size_t)bad(0, 1); break;
    case 5: c.page_stride = (size_t)bad(0, 1); break;
    case 6: c.len = position(c.len); break;
    case 7: c.dim = bad(0, 1); break;
    case 8: c.dim_rope = bad(0, 1); break;
    default: c.format = (dsa_type)fuzz_below(&in, 8); break;
    }
    (void)dsa_cache_check(&ctx, &c);
}

/* What one call works on: sequence i has the caches i. */
typedef struct batch {
    int32_t n;
    dsa_seq seqs[SEQS];
    int64_t rows;
    int64_t longest;
} batch;

static batch make_batch(void)
{
    batch b;
    int32_t i;
    memset(&b, 0, sizeof b);
    b.n = bad(1 + fuzz_below(&in, SEQS), 64);
    if (b.n > SEQS) b.n = SEQS;
    for (i = 0; i < b.n; i++) {
        dsa_seq *s = &b.seqs[i];
        s->latent = has_latent[i] && fuzz_below(&in, 32) ? &latents[i] : NULL;
        s->index = has_key[i] && fuzz_below(&in, 32) ? &keys[i] : NULL;
        s->len = fuzz_below(&in, 4) ? 0 : fuzz_below(&in, 4) ? fuzz_below(&in, 24) : position(20);
        s->n_q = fuzz_below(&in, 32) ? fuzz_below(&in, 5) - 1 : -1000;
        b.rows += s->n_q == 0 ? 1 : s->n_q > 0 ? s->n_q : 0;
        if (s->index && s->index->len > b.longest) b.longest = s->index->len;
        if (s->latent && s->latent->len > b.longest) b.longest = s->latent->len;
    }
    return b;
}

/* len before a call that appends, to see what it changed. */
typedef struct lens { int64_t latent[SEQS], key[SEQS]; } lens;

static lens take_lens(void)
{
    lens l;
    int i;
    for (i = 0; i < SEQS; i++) {
        l.latent[i] = has_latent[i] ? latents[i].len : 0;
        l.key[i] = has_key[i] ? keys[i].len : 0;
    }
    return l;
}

static void require_lens(const lens *before, const batch *b, int grown_latent, int grown_key)
{
    int i;
    for (i = 0; i < SEQS; i++) {
        int64_t n = i < b->n ? b->seqs[i].n_q : 0;
        if (i < b->n && n == 0) n = 1;
        if (n == DSA_NONE) n = 0;
        if (has_latent[i]) REQUIRE(latents[i].len == before->latent[i] + (grown_latent && i < b->n && b->seqs[i].latent ? n : 0));
        if (has_key[i]) REQUIRE(keys[i].len == before->key[i] + (grown_key && i < b->n && b->seqs[i].index ? n : 0));
        if (has_latent[i]) REQUIRE(latents[i].len <= dsa_cache_capacity(&latents[i]));
        if (has_key[i]) REQUIRE(keys[i].len <= dsa_cache_capacity(&keys[i]));
    }
}

/* A list is a front of distinct places in [0, limit), in its order, and -1 behind. */
static void require_selection(const dsa_selection *s, int64_t rows, int32_t k, int64_t limit)
{
    int64_t r;
    int32_t i, j, n;
    for (r = 0; r < rows; r++) {
        const int32_t *list = s->indices + r * k;
        for (n = 0; n < k && list[n] >= 0; n++) REQUIRE(list[n] < limit);
        for (i = n; i < k; i++) REQUIRE(list[i] == -1);
        if (s->counts) REQUIRE(s->counts[r] == n);
        for (i = 0; i < n; i++) {
            if (s->order == DSA_ORDER_INDEX && i > 0) REQUIRE(list[i - 1] < list[i]);
            for (j = 0; j < i; j++) REQUIRE(list[i] != list[j]);
        }
        if (!s->scores) continue;
        for (i = 0; i < k; i++) {
            const float *score = s->scores + r * k;
            if (i >= n) REQUIRE(score[i] == -(float)INFINITY);
            else REQUIRE(score[i] > -(float)INFINITY);
            if (s->order == DSA_ORDER_RANK && i > 0 && i < n) {
                REQUIRE(score[i - 1] > score[i] || (score[i - 1] == score[i] && list[i - 1] < list[i]));
            }
        }
    }
}

static dsa_selection make_selection(int64_t rows, int32_t *k)
{
    dsa_selection s;
    memset(&s, 0, sizeof s);
    s.top_k = fuzz_below(&in, 2) ? 0 : bad(1 + fuzz_below(&in, 20), 32);
    *k = s.top_k ? s.top_k : ctx.config.top_k;
    s.order = (dsa_order)fuzz_below(&in, 2);
    s.indices = (int32_t *)get(rows * (int64_t)(*k > 0 ? *k : 0), sizeof *s.indices);
    if (fuzz_below(&in, 2)) s.scores = (float *)get(rows * (int64_t)(*k > 0 ? *k : 0), sizeof *s.scores);
    if (fuzz_below(&in, 2)) s.counts = (int32_t *)get(rows, sizeof *s.counts);
    return s;
}

/* ---- the calls ----------------------------------------------------------------------------- */

static void call_append(void)
{
    batch b = make_batch();
    dsa_append_args a;
    lens before = take_lens();
    int32_t i;
    int no_slots;
    memset(&a, 0, sizeof a);
    a.n_seqs = b.n;
    a.seqs = b.seqs;
    if (fuzz_below(&in, 8)) a.latent = floats(b.rows * (ctx.config.dim_latent + ctx.config.dim_rope));
    if (fuzz_below(&in, 8)) a.index_key = floats(b.rows * ctx.config.dim_index);
    for (i = 0; i < b.n; i++) {                 /* caches of other dims would need other arrays */
        if (b.seqs[i].latent && (latents[i].dim != ctx.config.dim_latent || latents[i].dim_rope != ctx.config.dim_rope)) return;
        if (b.seqs[i].index && keys[i].dim != ctx.config.dim_index) return;
    }
    no_slots = fuzz_below(&in, 4) != 0;
    if (!no_slots) a.slots = positions(b.rows, 30);
    if (dsa_append(&ctx, &a) == DSA_OK) require_lens(&before, &b, no_slots && a.latent, no_slots && a.index_key);
    else require_lens(&before, &b, 0, 0);
}

static void call_edit(void)
{
    int i = fuzz_below(&in, SEQS), key = fuzz_below(&in, 2);
    dsa_cache *c = key ? &keys[i] : &latents[i];
    int64_t len, begin, end;
    if (key ? !has_key[i] : !has_latent[i]) return;
    len = c->len;
    if (fuzz_below(&in, 2)) {
        int64_t n = position(len);
        if (dsa_cache_truncate(&ctx, c, n) == DSA_OK) REQUIRE(n >= 0 && n <= len && c->len == n);
        else REQUIRE(c->len == len);
        return;
    }
    begin = position(len);
    end = position(len);
    if (begin < 0 || end < begin || end > len) {
        float nothing;
        REQUIRE(dsa_cache_read(&ctx, c, begin, end, &nothing) != DSA_OK);
        return;
    }
    (void)dsa_cache_read(&ctx, c, begin, end, (float *)get((end - begin) * (c->dim + c->dim_rope), sizeof(float)));
}

static dsa_score_args make_score(const batch *b)
{
    dsa_score_args a;
    int32_t heads;
    memset(&a, 0, sizeof a);
    a.n_seqs = b->n;
    a.seqs = b->seqs;
    a.n_index_heads = bad(0, 16);
    heads = a.n_index_heads > 0 ? a.n_index_heads : ctx.config.n_index_heads;
    a.q = floats(b->rows * heads * ctx.config.dim_index);
    a.w = floats(b->rows * heads);
    if (fuzz_below(&in, 4) == 0) {
        a.ks = positions(b->rows, b->longest);
        a.ke = positions(b->rows, b->longest);
    }
    return a;
}

/* Caches of dims other than the config's make the query arrays above too short. */
static int config_dims(const batch *b)
{
    int32_t i;
    for (i = 0; i < b->n; i++) {
        if (b->seqs[i].index && keys[i].dim != ctx.config.dim_index) return 0;
        if (b->seqs[i].latent && (latents[i].dim != ctx.config.dim_latent || latents[i].dim_rope != ctx.config.dim_rope)) return 0;
    }
    return 1;
}

static void call_score(void)
{
    batch b = make_batch();
    dsa_score_args a;
    size_t bytes;
    int too_small;
    int64_t n_cols = bad(20, 8), stride = n_cols + fuzz_below(&in, 4);
    float *scores;
    dsa_status status;
    if (!config_dims(&b)) return;
    a = make_score(&b);
    if (dsa_score_workspace(&ctx, &a, &bytes) != DSA_OK) return;
    a.workspace = workspace(bytes, &a.workspace_size, &too_small);
    scores = (float *)get(b.rows * (stride > 0 ? stride : 0), sizeof *scores);
    status = dsa_score(&ctx, &a, scores, n_cols, stride);
    require_noticed(too_small, b.rows, status);
}

static void call_score_select(void)
{
    batch b = make_batch();
    dsa_score_args a;
    dsa_selection s;
    size_t bytes;
    int too_small;
    int32_t k;
    dsa_status status;
    if (!config_dims(&b)) return;
    a = make_score(&b);
    s = make_selection(b.rows, &k);
    if (dsa_score_select_workspace(&ctx, &a, &s, &bytes) != DSA_OK) return;
    a.workspace = workspace(bytes, &a.workspace_size, &too_small);
    status = dsa_score_select(&ctx, &a, &s);
    require_noticed(too_small, b.rows, status);
    if (status == DSA_OK) require_selection(&s, b.rows, k, INT32_MAX);
}

static void call_select(void)
{
    dsa_select_args a;
    dsa_selection s;
    size_t bytes;
    int too_small;
    int32_t k;
    dsa_status status;
    memset(&a, 0, sizeof a);
    a.n_rows = bad(1 + fuzz_below(&in, 4), 16);
    a.n_cols = bad(fuzz_below(&in, 200), 16);
    a.stride = a.n_cols + bad(0, 8);
    a.scores = floats(a.n_rows > 0 && a.stride > 0 ? a.n_rows * a.stride : 0);
    if (fuzz_below(&in, 4) == 0 && a.n_rows > 0) {
        a.ks = positions(a.n_rows, a.n_cols > 0 ? a.n_cols : 0);
        a.ke = positions(a.n_rows, a.n_cols > 0 ? a.n_cols : 0);
    }
    s = make_selection(a.n_rows > 0 ? a.n_rows : 0, &k);
    if (dsa_select_workspace(&ctx, &a, &s, &bytes) != DSA_OK) return;
    a.workspace = workspace(bytes, &a.workspace_size, &too_small);
    status = dsa_select(&ctx, &a, &s);
    require_noticed(too_small, a.n_rows, status);
    if (status == DSA_OK) require_selection(&s, a.n_rows, k, a.n_cols);
}

/* Two disjoint parts: the even and the odd places. */
static void call_merge_topk(void)
{
    dsa_merge_topk_args a;
    const int32_t *indices[2];
    const float *scores[2];
    dsa_selection s;
    size_t bytes;
    int too_small;
    int32_t k, p, *list;
    int64_t r, i;
    dsa_status status;
    memset(&a, 0, sizeof a);
    a.n_parts = bad(2, 16);
    if (a.n_parts > 2) a.n_parts = 2;
    a.k_in = bad(1 + fuzz_below(&in, 12), 16);
    a.n_rows = bad(1 + fuzz_below(&in, 3), 16);
    for (p = 0; p < 2; p++) {
        int64_t count = a.k_in > 0 && a.n_rows > 0 ? a.k_in * a.n_rows : 0;
        list = (int32_t *)get(count, sizeof *list);
        for (r = 0; r < a.n_rows && a.k_in > 0; r++) {
            for (i = 0; i < a.k_in; i++) list[r * a.k_in + i] = fuzz_below(&in, 8) ? (int32_t)(2 * i + p) : -1;
        }
        indices[p] = list;
        scores[p] = floats(count);
    }
    a.indices = indices;
    a.scores = scores;
    s = make_selection(a.n_rows > 0 ? a.n_rows : 0, &k);
    if (dsa_merge_topk_workspace(&ctx, &a, &s, &bytes) != DSA_OK) return;
    a.workspace = workspace(bytes, &a.workspace_size, &too_small);
    status = dsa_merge_topk(&ctx, &a, &s);
    require_noticed(too_small, a.n_rows, status);
    if (status == DSA_OK) require_selection(&s, a.n_rows, k, 2 * (int64_t)a.k_in);
}

static int32_t *make_indices(int64_t count)
{
    int32_t *list = (int32_t *)get(count, sizeof *list);
    int64_t i;
    for (i = 0; i < count; i++) list[i] = bad(fuzz_below(&in, 30), 8);
    return list;
}

static void call_attend(void)
{
    batch b = make_batch();
    dsa_attend_state s;
    dsa_attend_args a;
    size_t bytes;
    int too_small;
    int32_t h, dim_v, n;
    int64_t width = ctx.config.dim_latent + ctx.config.dim_rope, stride, i;
    float *out, *lse;
    const float *outs[1], *lses[1], *sinks;
    dsa_status status;
    if (!config_dims(&b)) return;
    memset(&s, 0, sizeof s);
    memset(&a, 0, sizeof a);
    s.n_rows = b.rows;
    s.n_heads = bad(0, 16);
    s.dim_v = bad(0, 16);
    h = s.n_heads > 0 ? s.n_heads : ctx.config.n_heads;
    dim_v = s.dim_v > 0 ? s.dim_v : ctx.config.dim_latent;
    s.max = (float *)get(b.rows * h, sizeof(float));
    s.sum = (float *)get(b.rows * h, sizeof(float));
    s.out = (float *)get(b.rows * h, sizeof(float) * (size_t)(dim_v < MOST_BYTES ? dim_v : MOST_BYTES));
    if (dsa_attend_begin(&ctx, &s) != DSA_OK) return;
    a.n_seqs = b.n;
    a.seqs = b.seqs;
    a.q = floats(b.rows * h * width);
    a.scale = (float)bad(0, 4);
    a.what = (dsa_attend_what)fuzz_below(&in, 3);
    a.index_kind = (dsa_index_kind)fuzz_below(&in, 2);
    a.n_indices = bad(0, 2);
    n = a.n_indices > 0 ? (int32_t)a.n_indices : ctx.config.top_k;
    a.index_stride = bad(0, 8);
    stride = a.index_stride > 0 ? a.index_stride : n;
    if (a.what == DSA_ATTEND_LIST) a.indices = make_indices(b.rows * (stride > n ? stride : n));
    if (fuzz_below(&in, 4) == 0) a.counts = make_indices(b.rows);
    if (a.what == DSA_ATTEND_RANGE) {
        a.ks = positions(b.rows, b.longest);
        a.ke = positions(b.rows, b.longest);
    }
    if (dsa_attend_workspace(&ctx, &a, &s, &bytes) != DSA_OK) return;
    a.workspace = workspace(bytes, &a.workspace_size, &too_small);
    status = dsa_attend_add(&ctx, &a, &s);
    require_noticed(too_small, b.rows, status);
    if (status != DSA_OK) return;

    out = (float *)get(b.rows * h * dim_v, sizeof(float));
    lse = (float *)get(b.rows * h, sizeof(float));
    sinks = fuzz_below(&in, 2) ? floats(h) : NULL;
    REQUIRE(dsa_attend_finish(&ctx, &s, sinks, out, lse, NULL) == DSA_OK);
    for (i = 0; i < b.rows * h; i++) {
        if (s.sum[i] == 0.0f) REQUIRE(lse[i] == (float)INFINITY && out[i * dim_v] == 0.0f);
    }
    REQUIRE(dsa_attend_partial(&ctx, &s, out, lse) == DSA_OK);
    outs[0] = out;
    lses[0] = lse;
    REQUIRE(dsa_attend_merge(&ctx, 1, outs, lses, b.rows, h, dim_v, sinks, (float *)get(b.rows * h * dim_v, sizeof(float)), NULL) == DSA_OK);
}

static void call_step(void)
{
    batch b = make_batch();
    dsa_step_args a;
    lens before = take_lens();
    size_t bytes;
    int too_small;
    int64_t width = ctx.config.dim_latent + ctx.config.dim_rope;
    int32_t k;
    dsa_status status;
    if (!config_dims(&b)) return;
    memset(&a, 0, sizeof a);
    a.n_seqs = b.n;
    a.seqs = b.seqs;
    if (fuzz_below(&in, 4)) a.latent = floats(b.rows * width);
    if (fuzz_below(&in, 4)) a.index_key = floats(b.rows * ctx.config.dim_index);
    a.q = floats(b.rows * ctx.config.n_heads * width);
    a.index_q = floats(b.rows * ctx.config.n_index_heads * ctx.config.dim_index);
    a.index_w = floats(b.rows * ctx.config.n_index_heads);
    if (fuzz_below(&in, 4) == 0) a.sinks = floats(ctx.config.n_heads);
    a.top_k = fuzz_below(&in, 2) ? 0 : bad(1 + fuzz_below(&in, 20), 32);
    k = a.top_k ? a.top_k : ctx.config.top_k;
    a.out = (float *)get(b.rows * ctx.config.n_heads * ctx.config.dim_latent, sizeof(float));
    if (fuzz_below(&in, 2)) a.indices = (int32_t *)get(b.rows * (k > 0 ? k : 0), sizeof(int32_t));
    if (dsa_step_workspace(&ctx, &a, &bytes) != DSA_OK) return;
    a.workspace = workspace(bytes, &a.workspace_size, &too_small);
    status = dsa_step(&ctx, &a);
    require_noticed(too_small, b.rows, status);
    require_lens(&before, &b, status == DSA_OK && a.latent, status == DSA_OK && a.index_key);
    if (status == DSA_OK && a.indices) {
        dsa_selection s;
        memset(&s, 0, sizeof s);
        s.indices = a.indices;
        require_selection(&s, b.rows, k, INT32_MAX);
    }
}

static dsa_tensor tensor(int64_t rows, int64_t columns)
{
    static const size_t size[] = { 4, 2, 2, 1 };
    dsa_tensor t;
    memset(&t, 0, sizeof t);
    t.type = (dsa_type)fuzz_below(&in, 4);
    if (t.type == DSA_F32) {
        t.data = floats(rows * columns);
    } else {
        uint8_t *bytes = (uint8_t *)get(rows * columns, size[t.type]);
        int64_t i;
        for (i = 0; i < rows * columns * (int64_t)size[t.type]; i++) bytes[i] = (uint8_t)(fuzz_random(&bulk) >> 9);
        t.data = bytes;
    }
    if (t.type == DSA_FP8) t.scale_inv = floats(((rows + 127) / 128) * ((columns + 127) / 128));
    if (fuzz_below(&in, 128) == 0) t.data = NULL;
    return t;
}

/* The layer's backward behind a forward call that went well, on the same arguments. */
static void layer_backward(const batch *b, dsa_layer_args a)
{
    const dsa_config *c = &ctx.config;
    dsa_layer_backward_args back;
    dsa_layer_grads grads;
    size_t bytes;
    int too_small;
    dsa_status status;
    memset(&back, 0, sizeof back);
    memset(&grads, 0, sizeof grads);
    back.layer = a;
    back.layer.indices_out = NULL;
    back.layer.indices_in = a.indices_out ? a.indices_out : a.indices_in;
    if (fuzz_below(&in, 4)) back.d_y = floats(b->rows * c->dim_hidden);
    if (fuzz_below(&in, 2)) back.d_x = floats(b->rows * c->dim_hidden);
    if (fuzz_below(&in, 2)) grads.q_a = floats((int64_t)c->dim_q_lora * c->dim_hidden);
    if (fuzz_below(&in, 2)) grads.kv_b = floats((int64_t)c->n_heads * (c->dim_nope + c->dim_v) * c->dim_latent);
    if (fuzz_below(&in, 2)) grads.kv_a_norm = floats(c->dim_latent);
    if (fuzz_below(&in, 2)) grads.o = floats((int64_t)c->dim_hidden * c->n_heads * c->dim_v);
    if (fuzz_below(&in, 2)) grads.index_k = floats((int64_t)c->dim_index * c->dim_hidden);
    if (fuzz_below(&in, 2)) grads.index_w = floats((int64_t)c->n_index_heads * c->dim_hidden);
    back.grads = &grads;
    back.index_weight = (float)bad(1, 4);
    if (fuzz_below(&in, 2)) back.index_loss = (float *)get(b->rows, sizeof(float));
    if (dsa_layer_backward_workspace(&ctx, &back, &bytes) != DSA_OK) return;
    back.layer.workspace = workspace(bytes, &back.layer.workspace_size, &too_small);
    status = dsa_layer_backward(&ctx, &back);
    require_noticed(too_small, b->rows, status);
}

static void call_layer(void)
{
    const dsa_config *c = &ctx.config;
    batch b = make_batch();
    dsa_layer_weights w;
    dsa_layer_args a;
    lens before = take_lens();
    size_t bytes;
    int too_small;
    dsa_status status;
    if (!config_dims(&b)) return;
    memset(&w, 0, sizeof w);
    memset(&a, 0, sizeof a);
    w.q_a = tensor(c->dim_q_lora, c->dim_hidden);
    w.q_a_norm = tensor(1, c->dim_q_lora);
    w.q_b = tensor((int64_t)c->n_heads * (c->dim_nope + c->dim_rope), c->dim_q_lora);
    w.kv_a = tensor(c->dim_latent + c->dim_rope, c->dim_hidden);
    w.kv_a_norm = tensor(1, c->dim_latent);
    w.kv_b = tensor((int64_t)c->n_heads * (c->dim_nope + c->dim_v), c->dim_latent);
    w.o = tensor(c->dim_hidden, (int64_t)c->n_heads * c->dim_v);
    if (fuzz_below(&in, 8)) {
        w.index_q_b = tensor((int64_t)c->n_index_heads * c->dim_index, c->dim_q_lora);
        w.index_k = tensor(c->dim_index, c->dim_hidden);
        w.index_k_norm = tensor(1, c->dim_index);
        w.index_k_bias = tensor(1, c->dim_index);
        w.index_w = tensor(c->n_index_heads, c->dim_hidden);
    }
    a.weights = &w;
    a.n_seqs = b.n;
    a.seqs = b.seqs;
    a.x = floats(b.rows * c->dim_hidden);
    a.y = (float *)get(b.rows * c->dim_hidden, sizeof(float));
    if (fuzz_below(&in, 4) == 0) a.positions = positions(b.rows, 1000);
    a.mode = (dsa_layer_mode)fuzz_below(&in, 3);
    if (fuzz_below(&in, 4) == 0) a.indices_in = make_indices(b.rows * c->top_k);
    if (fuzz_below(&in, 4) == 0) a.indices_out = (int32_t *)get(b.rows * c->top_k, sizeof(int32_t));
    if (dsa_layer_workspace(&ctx, &a, &bytes) != DSA_OK) return;
    a.workspace = workspace(bytes, &a.workspace_size, &too_small);
    status = dsa_layer(&ctx, &a);
    require_noticed(too_small, b.rows, status);
    require_lens(&before, &b, status == DSA_OK, status == DSA_OK && w.index_k.data);
    if (status == DSA_OK && fuzz_below(&in, 2)) layer_backward(&b, a);
}

static void call_rows(void)
{
    int64_t rows = fuzz_below(&in, 4), stride;
    int32_t dim = bad(8, 8), heads = bad(1, 8);
    dsa_rope rope;
    float *x, *gain;
    uint8_t y[64];
    stride = dim > 0 ? dim : 0;
    if (dim > 64 || heads > 8) return;
    x = floats(rows * stride * (heads > 1 ? heads : 1));
    gain = floats(stride);
    (void)dsa_rms_norm(x, rows, stride, dim, gain, 1e-6f);
    (void)dsa_layer_norm(x, rows, stride, dim, gain, gain, 1e-6f);
    (void)dsa_hadamard_rows(x, rows, stride, dim);
    memset(&rope, 0, sizeof rope);
    rope.layout = (dsa_rope_layout)fuzz_below(&in, 3);
    rope.offset = bad(0, 4);
    rope.width = bad(4, 4);
    rope.factor = bad(0, 4);
    rope.theta = bad(0, 4);
    (void)dsa_rope_rows(x, rows, stride * heads, heads, stride, dim, &rope, positions(rows, 100000), fuzz_below(&in, 2));
    if (dim > 0 && rows > 0) {
        (void)dsa_quantize_e4m3(x, dim, y);
        (void)dsa_quantize_int8(x, dim, (int8_t *)y);
    }
}

/* Sizes of any shape: refused, or without wrapping around. */
static void call_sizes(void)
{
    int32_t dim = bad(128, 1), dim_rope = bad(0, 1), page_size = bad(64, 1);
    dsa_kind kind = (dsa_kind)fuzz_below(&in, 2);
    dsa_type format = (dsa_type)fuzz_below(&in, 6);
    size_t row, page;
    if (dsa_row_bytes(kind, format, dim, dim_rope, &row) != DSA_OK) return;
    REQUIRE(row >= (size_t)dim);
    if (dsa_page_bytes(kind, format, dim, dim_rope, page_size, &page) == DSA_OK) REQUIRE(page / (size_t)page_size >= row);
}

/* begin, add and finish in one. */
static void call_attend_whole(void)
{
    batch b = make_batch();
    dsa_attend_state s;
    dsa_attend_args a;
    size_t bytes;
    int too_small;
    const int32_t h = ctx.config.n_heads;
    int64_t i;
    float *lse;
    dsa_status status;
    if (!config_dims(&b)) return;
    memset(&s, 0, sizeof s);
    memset(&a, 0, sizeof a);
    s.n_rows = bad(1, 16) == 1 ? b.rows : bad((int32_t)b.rows, 1);
    s.max = (float *)get(b.rows * h, sizeof(float));
    s.sum = (float *)get(b.rows * h, sizeof(float));
    s.out = (float *)get(b.rows * h * ctx.config.dim_latent, sizeof(float));
    a.n_seqs = b.n;
    a.seqs = b.seqs;
    a.q = floats(b.rows * h * (ctx.config.dim_latent + ctx.config.dim_rope));
    a.what = fuzz_below(&in, 2) ? DSA_ATTEND_LIST : DSA_ATTEND_VISIBLE;
    a.indices = make_indices(b.rows * ctx.config.top_k);
    if (dsa_attend_workspace(&ctx, &a, &s, &bytes) != DSA_OK) return;
    a.workspace = workspace(bytes, &a.workspace_size, &too_small);
    lse = (float *)get(b.rows * h, sizeof(float));
    status = dsa_attend(&ctx, &a, &s, fuzz_below(&in, 2) ? floats(h) : NULL, lse,
                        fuzz_below(&in, 2) ? (float *)get(b.rows * h, sizeof(float)) : NULL);
    require_noticed(too_small, b.rows, status);
    for (i = 0; status == DSA_OK && i < b.rows * h; i++) if (s.sum[i] == 0.0f) REQUIRE(lse[i] == (float)INFINITY);
}

/* The set of a backward call, and one gradient array per sequence's rows; now and then a NULL among them, which is refused. */
static void make_set(batch *b, dsa_attend_args *a)
{
    memset(a, 0, sizeof *a);
    a->n_seqs = b->n;
    a->seqs = b->seqs;
    a->what = (dsa_attend_what)fuzz_below(&in, 3);
    a->index_kind = fuzz_below(&in, 16) == 0 ? DSA_PHYSICAL : DSA_LOGICAL;
    if (a->what == DSA_ATTEND_LIST) a->indices = make_indices(b->rows * ctx.config.top_k);
    if (fuzz_below(&in, 4) == 0) a->counts = make_indices(b->rows);
    if (a->what == DSA_ATTEND_RANGE) {
        a->ks = positions(b->rows, b->longest);
        a->ke = positions(b->rows, b->longest);
    }
}

static int64_t seq_rows(const dsa_seq *s, const dsa_cache *c)
{
    return s->len > 0 ? s->len : s->len == 0 && c ? c->len : 0;
}

static float **row_gradients(const batch *b, int of_keys, int64_t width)
{
    float **d = (float **)get(b->n > 0 ? b->n : 0, sizeof *d);
    int32_t i;
    for (i = 0; i < b->n; i++) {
        int64_t n = seq_rows(&b->seqs[i], of_keys ? b->seqs[i].index : b->seqs[i].latent);
        d[i] = fuzz_below(&in, 32) == 0 ? NULL : (float *)get(n > 200 ? 200 : n, sizeof(float) * (size_t)width);
        if (n > 200) longjmp(enough, 1);
    }
    return d;
}

static void call_attend_backward(void)
{
    batch b = make_batch();
    dsa_attend_backward_args a;
    size_t bytes;
    int too_small;
    const int64_t h = ctx.config.n_heads, R = ctx.config.dim_latent, width = R + ctx.config.dim_rope;
    int64_t n_target;
    dsa_status status;
    if (!config_dims(&b)) return;
    memset(&a, 0, sizeof a);
    make_set(&b, &a.attend);
    a.attend.q = floats(b.rows * h * width);
    a.attend.scale = (float)bad(0, 4);
    a.out = floats(b.rows * h * R);
    a.lse = floats(b.rows * h);
    if (fuzz_below(&in, 2)) a.sinks = floats(h);
    if (fuzz_below(&in, 8)) a.d_out = floats(b.rows * h * R);
    if (fuzz_below(&in, 4)) a.d_q = floats(b.rows * h * width);
    if (fuzz_below(&in, 4)) a.d_latent = row_gradients(&b, 0, width);
    if (fuzz_below(&in, 4)) a.d_sinks = floats(h);
    n_target = a.attend.what == DSA_ATTEND_LIST ? ctx.config.top_k : 200;
    if (fuzz_below(&in, 2)) {
        a.target_stride = bad((int32_t)n_target, 8);
        if (a.target_stride > 1000) a.target_stride = 1000;
        a.target = floats(b.rows * (a.target_stride > 0 ? a.target_stride : 0));
    }
    if (dsa_attend_backward_workspace(&ctx, &a, &bytes) != DSA_OK) return;
    a.attend.workspace = workspace(bytes, &a.attend.workspace_size, &too_small);
    status = dsa_attend_backward(&ctx, &a);
    require_noticed(too_small, b.rows, status);
}

static void call_index_backward(void)
{
    batch b = make_batch();
    dsa_index_backward_args a;
    size_t bytes;
    int too_small;
    const int64_t hi = ctx.config.n_index_heads, D = ctx.config.dim_index;
    float *g;
    dsa_status status;
    if (!config_dims(&b)) return;
    memset(&a, 0, sizeof a);
    make_set(&b, &a.set);
    a.q = floats(b.rows * hi * D);
    a.w = floats(b.rows * hi);
    a.stride = bad(a.set.what == DSA_ATTEND_LIST ? ctx.config.top_k : 200, 8);
    if (a.stride > 1000) a.stride = 1000;
    g = floats(b.rows * (a.stride > 0 ? a.stride : 0));
    if (fuzz_below(&in, 2)) a.d_scores = g; else a.target = g;
    a.weight = (float)bad(1, 8);
    if (fuzz_below(&in, 2)) a.loss = (float *)get(b.rows, sizeof(float));
    if (fuzz_below(&in, 4)) a.d_q = floats(b.rows * hi * D);
    if (fuzz_below(&in, 4)) a.d_w = floats(b.rows * hi);
    if (fuzz_below(&in, 4)) a.d_key = row_gradients(&b, 1, D);
    if (dsa_index_backward_workspace(&ctx, &a, &bytes) != DSA_OK) return;
    a.set.workspace = workspace(bytes, &a.set.workspace_size, &too_small);
    status = dsa_index_backward(&ctx, &a);
    require_noticed(too_small, b.rows, status);
}

static void call_linear(void)
{
    dsa_linear_args a;
    size_t bytes;
    int too_small;
    int64_t rows, in_, out_;
    dsa_status status;
    memset(&a, 0, sizeof a);
    a.n_rows = bad(fuzz_below(&in, 40), 16);
    a.dim_in = bad(1 + fuzz_below(&in, 200), 16);
    a.dim_out = bad(1 + fuzz_below(&in, 200), 16);
    rows = a.n_rows > 0 ? a.n_rows : 0;
    in_ = a.dim_in > 0 ? a.dim_in : 0;
    out_ = a.dim_out > 0 ? a.dim_out : 0;
    if (rows > 4096 || in_ > 4096 || out_ > 4096) {
        (void)dsa_linear_workspace(&ctx, &a, &bytes);
        return;
    }
    a.w = tensor(out_, in_);
    a.x = floats(rows * in_);
    a.y = (float *)get(rows * out_, sizeof(float));
    a.d_y = floats(rows * out_);
    if (fuzz_below(&in, 4)) a.d_x = floats(rows * in_);
    if (fuzz_below(&in, 4)) a.d_w = floats(out_ * in_);
    if (dsa_linear_workspace(&ctx, &a, &bytes) != DSA_OK) return;
    a.workspace = workspace(bytes, &a.workspace_size, &too_small);
    status = dsa_linear(&ctx, &a);
    require_noticed(too_small, rows, status);
    status = dsa_linear_backward(&ctx, &a);
    require_noticed(too_small, rows, status);
}

static void call_norms_backward(void)
{
    int64_t rows = fuzz_below(&in, 4), stride;
    int32_t dim = bad(8, 8);
    float *x, *dy, *gain;
    if (dim > 64) return;
    stride = (dim > 0 ? dim : 0) + fuzz_below(&in, 3);
    x = floats(rows * stride);
    dy = floats(rows * stride);
    gain = floats(stride);
    (void)dsa_rms_norm_backward(x, dy, rows, stride, dim, gain, 1e-6f, floats(rows * stride), fuzz_below(&in, 2) ? floats(stride) : NULL);
    (void)dsa_layer_norm_backward(x, dy, rows, stride, dim, gain, 1e-6f, floats(rows * stride), fuzz_below(&in, 2) ? floats(stride) : NULL,
                                  fuzz_below(&in, 2) ? floats(stride) : NULL);
}

/* Every bit pattern of the number formats, and the calls that only look things up. */
static void call_numbers(void)
{
    uint32_t bits = fuzz_random(&bulk);
    float x, scale;
    double f[32];
    dsa_rope rope;
    dsa_config c;
    dsa_pool *pool = NULL;
    memcpy(&x, &bits, 4);
    if (x == x) {
        REQUIRE(dsa_f32_to_bf16(dsa_bf16_to_f32(dsa_f32_to_bf16(x))) == dsa_f32_to_bf16(x));
        REQUIRE(dsa_f32_to_f16(dsa_f16_to_f32(dsa_f32_to_f16(x))) == dsa_f32_to_f16(x));
        REQUIRE(dsa_f32_to_e4m3(dsa_e4m3_to_f32(dsa_f32_to_e4m3(x))) == dsa_f32_to_e4m3(x));
    }
    if (x > 0 && x <= 1e38f) {
        scale = dsa_pow2_ceil(x);
        REQUIRE(scale >= x && scale / 2 <= x);
        REQUIRE(dsa_ue8m0_to_f32(dsa_f32_to_ue8m0_ceil(x)) >= x);
    }
    memset(&rope, 0, sizeof rope);
    rope.width = 2 * fuzz_below(&in, 32);
    rope.theta = bad(10000, 4);
    rope.factor = bad(4, 4);
    rope.original_context = bad(4096, 4);
    rope.beta_fast = bad(32, 4);
    rope.beta_slow = bad(1, 4);
    (void)dsa_rope_frequencies(&rope, f);
    (void)dsa_config_preset((dsa_preset)(bad(1, 2) & 7), &c);
    (void)dsa_layer_has_indexer(bad(4, 2), bad(3, 2), bad(7, 2));
    REQUIRE(dsa_status_text((dsa_status)bad(3, 2)) != NULL && dsa_isa_name((dsa_isa)bad(1, 2)) != NULL);
    if (dsa_pool_create(NULL, fuzz_below(&in, 64) == 0 ? 2 : bad(0, 1) < 4096 ? 0 : 5000, &pool) == DSA_OK) dsa_pool_destroy(pool);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const calls[])(void) = { call_append, call_append, call_edit, call_score, call_score_select, call_select,
        call_merge_topk, call_attend, call_step, call_step, call_layer, call_rows, call_sizes,
        call_attend_whole, call_attend_backward, call_index_backward, call_linear, call_norms_backward, call_numbers };
    static int n;
    in.p = data;
    in.n = size;
    bulk = 1 + fuzz_byte(&in);
    special = fuzz_below(&in, 3) == 0;
    memset(has_latent, 0, sizeof has_latent);
    memset(has_key, 0, sizeof has_key);
    total = 0;
    n_blocks = 0;
    if (setjmp(enough) == 0 && make_config() == DSA_OK) {
        for (n = 0; n < SEQS; n++) {
            has_latent[n] = make_cache(DSA_LATENT, &latents[n]);
            has_key[n] = make_cache(DSA_INDEX_KEY, &keys[n]);
            if (has_latent[n]) check_damaged(&latents[n]);
            if (has_key[n]) check_damaged(&keys[n]);
        }
        for (n = 0; n < 16 && in.n > 0; n++) calls[fuzz_below(&in, (int32_t)(sizeof calls / sizeof calls[0]))]();
    }
    while (n_blocks > 0) free(blocks[--n_blocks]);
    return 0;
}

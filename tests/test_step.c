/* The fused step: append, score + select and attend in one call, bit for bit what the three give one after the other. */
#include "fixture.h"

/* Counts what the whole process asks of malloc while `watching`, by standing in front of glibc's. Sanitizers bring their own malloc. */
#if defined(__has_feature)
#  if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#    define SANITIZED 1
#  endif
#endif
#if defined(__GLIBC__) && defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(SANITIZED)
#define COUNTS_MALLOC 1
static int watching, n_mallocs;
extern void *__libc_malloc(size_t bytes);
extern void *__libc_calloc(size_t n, size_t bytes);
extern void *__libc_realloc(void *memory, size_t bytes);
static void note(void) { if (__atomic_load_n(&watching, __ATOMIC_RELAXED)) __atomic_fetch_add(&n_mallocs, 1, __ATOMIC_RELAXED); }
void *malloc(size_t bytes) { note(); return __libc_malloc(bytes); }
void *calloc(size_t n, size_t bytes) { note(); return __libc_calloc(n, bytes); }
void *realloc(void *memory, size_t bytes) { note(); return __libc_realloc(memory, bytes); }
#endif

enum { H = 3, R = 40, RR = 8, W = R + RR, HI = 4, D = 16, K = 12 };

static dsa_config config(void)
{
    dsa_config c;
    memset(&c, 0, sizeof c);
    c.n_heads = H;
    c.dim_latent = R;
    c.dim_rope = RR;
    c.n_index_heads = HI;
    c.dim_index = D;
    c.top_k = K;
    c.softmax_scale = 0.3f;
    c.isa = test_isa;
    return c;
}
static dsa_ctx context(void)
{
    dsa_config c = config();
    dsa_ctx ctx;
    if (dsa_init(&ctx, &c) != DSA_OK) { fprintf(stderr, "test set-up: dsa_init refused\n"); abort(); }
    return ctx;
}

/* Some sequences with their own caches, and the data of one call over all of them. */
enum { MAX_SEQS = 4 };
typedef struct batch {
    bag b;
    dsa_ctx ctx;
    int32_t n_seqs, rows, n_q[MAX_SEQS];
    dsa_cache latent[MAX_SEQS], index[MAX_SEQS];
    dsa_seq seqs[MAX_SEQS];
    float *new_latent, *new_key, *q, *index_q, *index_w;
    float *out, *lse;
    int32_t *indices;
} batch;

static void open_batch(batch *x, dsa_type latent, dsa_type index, int32_t page, int32_t n_seqs, const int32_t *len, const int32_t *n_q)
{
    memset(x, 0, sizeof *x);
    x->ctx = context();
    x->n_seqs = n_seqs;
    for (int32_t i = 0; i < n_seqs; i++) {
        dsa_cache_desc dl = desc_of(DSA_LATENT, latent, len[i] + n_q[i] + 3, page), di = desc_of(DSA_INDEX_KEY, index, len[i] + n_q[i] + 3, page);
        x->latent[i] = cache_of(&x->b, &x->ctx, &dl);
        x->index[i] = cache_of(&x->b, &x->ctx, &di);
        x->seqs[i] = seq_of(&x->latent[i], &x->index[i], n_q[i]);
        x->n_q[i] = n_q[i];
        x->rows += n_q[i];
        if (append(&x->ctx, &x->latent[i], &x->index[i], len[i], random_floats(&x->b, len[i] * W, (uint64_t)(60 + i), 1),
                   random_floats(&x->b, len[i] * D, (uint64_t)(70 + i), 1)) != DSA_OK) { fprintf(stderr, "test set-up: append refused\n"); abort(); }
    }
    x->new_latent = random_floats(&x->b, x->rows * W, 80, 1);
    x->new_key = random_floats(&x->b, x->rows * D, 81, 1);
    x->q = random_floats(&x->b, x->rows * H * W, 82, 1);
    x->index_q = random_floats(&x->b, x->rows * HI * D, 83, 1);
    x->index_w = random_floats(&x->b, x->rows * HI, 84, 1);
    x->out = floats(&x->b, x->rows * H * R);
    x->lse = floats(&x->b, x->rows * H);
    x->indices = ints(&x->b, x->rows * K);
}
static dsa_step_args args_of(batch *x, int appends)
{
    dsa_step_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = x->n_seqs;
    a.seqs = x->seqs;
    a.latent = appends ? x->new_latent : NULL;
    a.index_key = appends ? x->new_key : NULL;
    a.q = x->q;
    a.index_q = x->index_q;
    a.index_w = x->index_w;
    a.out = x->out;
    a.lse = x->lse;
    a.indices = x->indices;
    return a;
}
/* The three calls by hand. */
static dsa_status by_hand(batch *x, int appends, const float *sinks, float *out, float *lse, int32_t *indices)
{
    dsa_status st = DSA_OK;
    if (appends) {
        dsa_append_args a;
        memset(&a, 0, sizeof a);
        a.n_seqs = x->n_seqs;
        a.seqs = x->seqs;
        a.latent = x->new_latent;
        a.index_key = x->new_key;
        st = dsa_append(&x->ctx, &a);
    }
    dsa_score_args s;
    dsa_selection sel;
    memset(&s, 0, sizeof s);
    memset(&sel, 0, sizeof sel);
    s.n_seqs = x->n_seqs;
    s.seqs = x->seqs;
    s.q = x->index_q;
    s.w = x->index_w;
    sel.indices = indices;
    if (st == DSA_OK) st = score_select(&x->b, &x->ctx, s, &sel);
    dsa_attend_args t;
    memset(&t, 0, sizeof t);
    t.n_seqs = x->n_seqs;
    t.seqs = x->seqs;
    t.q = x->q;
    t.indices = indices;
    if (st == DSA_OK) st = attend(&x->b, &x->ctx, t, x->rows, H, R, sinks, out, lse, NULL);
    return st;
}

typedef struct formats { const char *name; dsa_type latent, index; int32_t page; } formats;
static const formats kinds[] = { { "f32", DSA_F32, DSA_F32, 0 }, { "bf16", DSA_BF16, DSA_BF16, 8 }, { "fp8", DSA_FP8, DSA_FP8, 4 }, { "fp8_int8", DSA_FP8, DSA_INT8, 16 } };

TEST the_step_is_its_parts(const formats *f, int appends)
{
    batch x, y;
    const int32_t len[4] = { 50, 5, 130, 11 }, n_q[4] = { 1, 3, 2, 4 };   /* below k, across k, far above k */
    const float sinks[H] = { 0.5f, -INFINITY, 2 };
    open_batch(&x, f->latent, f->index, f->page, 4, len, n_q);
    open_batch(&y, f->latent, f->index, f->page, 4, len, n_q);
    dsa_step_args a = args_of(&x, appends);
    a.sinks = sinks;
    OK(step(&x.b, &x.ctx, a));
    OK(by_hand(&y, appends, sinks, y.out, y.lse, y.indices));
    ASSERT(same_bits(x.indices, y.indices, x.rows * K));
    ASSERT(same_bits(x.out, y.out, x.rows * H * R));
    ASSERT(same_bits(x.lse, y.lse, x.rows * H));
    for (int i = 0; i < 4; i++) {
        ASSERT_EQ_FMT((long long)(len[i] + (appends ? n_q[i] : 0)), (long long)x.latent[i].len, "%lld");
        ASSERT_EQ_FMT((long long)(len[i] + (appends ? n_q[i] : 0)), (long long)x.index[i].len, "%lld");
        float *r0 = floats(&x.b, x.latent[i].len * W), *r1 = floats(&x.b, x.latent[i].len * W);
        OK(dsa_cache_read(&x.ctx, &x.latent[i], 0, x.latent[i].len, r0));
        OK(dsa_cache_read(&y.ctx, &y.latent[i], 0, y.latent[i].len, r1));
        ASSERT(same_bits(r0, r1, x.latent[i].len * W));
        OK(dsa_cache_read(&x.ctx, &x.index[i], 0, x.index[i].len, r0));
        OK(dsa_cache_read(&y.ctx, &y.index[i], 0, y.index[i].len, r1));
        ASSERT(same_bits(r0, r1, x.index[i].len * D));
    }
    bag_free(&y.b);
    END(x.b);
}

TEST a_step_selects_and_attends_correctly(void)
{
    batch x;
    const int32_t len = 60, one = 1;
    open_batch(&x, DSA_F32, DSA_F32, 0, 1, &len, &one);
    OK(step(&x.b, &x.ctx, args_of(&x, 1)));
    /* independent: scores in double, the K best by counting who is better, attention by definition */
    float keys[61 * D], rows[61 * W];
    double score[61], out[R], lse, max;
    int32_t best[K], n = 0;
    OK(dsa_cache_read(&x.ctx, &x.index[0], 0, 61, keys));
    OK(dsa_cache_read(&x.ctx, &x.latent[0], 0, 61, rows));
    for (int s = 0; s < 61; s++) {
        score[s] = 0;
        for (int h = 0; h < HI; h++) {
            double d = 0;
            for (int i = 0; i < D; i++) d += (double)x.index_q[h * D + i] * (double)keys[s * D + i];
            if (d > 0) score[s] += d * (double)x.index_w[h];
        }
    }
    for (int s = 0; s < 61; s++) {
        int better = 0;
        for (int t = 0; t < 61; t++) if (score[t] > score[s] || (score[t] == score[s] && t < s)) better++;
        if (better < K) best[n++] = s;
    }
    ASSERT_EQ_FMT((int)K, (int)n, "%d");
    for (int i = 0; i < K; i++) ASSERT_EQ_FMT(best[i], x.indices[i], "%d");
    for (int h = 0; h < H; h++) {
        ref_attend(x.q + h * W, rows, W, R, best, K, (double)0.3f, -INFINITY, out, &lse, &max);
        WITHIN(3e-6, max_error(x.out + h * R, out, R));
        WITHIN(3e-6, max_error(x.lse + h, &lse, 1));
    }
    END(x.b);
}

/* Drafts: a ragged batch equals one call per sequence, and several queries equal single steps. */
TEST a_ragged_batch_is_its_sequences(const formats *f)
{
    batch x, y;
    const int32_t len[4] = { 33, 80, 4, 12 }, n_q[4] = { 2, 1, 5, 3 };
    open_batch(&x, f->latent, f->index, f->page, 4, len, n_q);
    open_batch(&y, f->latent, f->index, f->page, 4, len, n_q);
    OK(step(&x.b, &x.ctx, args_of(&x, 1)));
    for (int i = 0, row = 0; i < 4; i++)
        for (int j = 0; j < n_q[i]; j++, row++) {
            dsa_step_args a = args_of(&y, 1);
            dsa_seq one = seq_of(&y.latent[i], &y.index[i], 1);
            a.n_seqs = 1;
            a.seqs = &one;
            a.latent += row * W;
            a.index_key += row * D;
            a.q += row * H * W;
            a.index_q += row * HI * D;
            a.index_w += row * HI;
            a.out += row * H * R;
            a.lse += row * H;
            a.indices += row * K;
            OK(step(&y.b, &y.ctx, a));
        }
    ASSERT(same_bits(x.indices, y.indices, x.rows * K));
    ASSERT(same_bits(x.out, y.out, x.rows * H * R));
    ASSERT(same_bits(x.lse, y.lse, x.rows * H));
    bag_free(&y.b);
    END(x.b);
}

TEST lse_and_indices_are_optional(void)
{
    batch x, y;
    const int32_t len[2] = { 33, 6 }, n_q[2] = { 2, 1 };
    open_batch(&x, DSA_BF16, DSA_FP8, 8, 2, len, n_q);
    open_batch(&y, DSA_BF16, DSA_FP8, 8, 2, len, n_q);
    OK(step(&x.b, &x.ctx, args_of(&x, 1)));
    dsa_step_args a = args_of(&y, 1);
    a.lse = NULL;
    a.indices = NULL;
    OK(step(&y.b, &y.ctx, a));
    ASSERT(same_bits(x.out, y.out, x.rows * H * R));
    bag_free(&y.b);
    END(x.b);
}

TEST scale_and_top_k_override_the_config(void)
{
    batch x, y;
    const int32_t len = 70, one = 1;
    open_batch(&x, DSA_F32, DSA_F32, 0, 1, &len, &one);
    open_batch(&y, DSA_F32, DSA_F32, 0, 1, &len, &one);
    y.ctx.config.softmax_scale = 0.9f;
    y.ctx.config.top_k = 5;
    dsa_step_args a = args_of(&x, 1);
    a.scale = 0.9f;
    a.top_k = 5;
    OK(step(&x.b, &x.ctx, a));
    OK(step(&y.b, &y.ctx, args_of(&y, 1)));
    ASSERT(same_bits(x.indices, y.indices, 5));
    ASSERT(same_bits(x.out, y.out, H * R));
    bag_free(&y.b);
    END(x.b);
}

TEST a_sequence_without_queries_is_passed_over(void)
{
    batch x, y;
    const int32_t len[3] = { 20, 20, 20 }, n_q[3] = { 1, 0, 1 }, len2[2] = { 20, 20 }, n_q2[2] = { 1, 1 };
    open_batch(&x, DSA_F32, DSA_F32, 0, 3, len, n_q);
    open_batch(&y, DSA_F32, DSA_F32, 0, 2, len2, n_q2);
    OK(dsa_cache_truncate(&y.ctx, &y.latent[1], 0));  /* y's second sequence takes x's third's data */
    OK(dsa_cache_truncate(&y.ctx, &y.index[1], 0));
    float rows[20 * W], keys[20 * D];
    OK(dsa_cache_read(&x.ctx, &x.latent[2], 0, 20, rows));
    OK(dsa_cache_read(&x.ctx, &x.index[2], 0, 20, keys));
    OK(append(&y.ctx, &y.latent[1], &y.index[1], 20, rows, keys));
    OK(step(&x.b, &x.ctx, args_of(&x, 1)));
    OK(step(&y.b, &y.ctx, args_of(&y, 1)));
    ASSERT_EQ_FMT(20LL, (long long)x.latent[1].len, "%lld");
    ASSERT(same_bits(x.out, y.out, 2 * H * R));
    bag_free(&y.b);
    END(x.b);
}

/* The first token of a sequence: it sees itself only, so its output is its own latent. */
TEST the_first_token_attends_to_itself(void)
{
    batch x;
    const int32_t len = 0, one = 1;
    open_batch(&x, DSA_F32, DSA_F32, 0, 1, &len, &one);
    OK(step(&x.b, &x.ctx, args_of(&x, 1)));
    for (int h = 0; h < H; h++) ASSERT(same_bits(x.new_latent, x.out + h * R, R));
    ASSERT_EQ_FMT(0, x.indices[0], "%d");
    for (int i = 1; i < K; i++) ASSERT_EQ_FMT(-1, x.indices[i], "%d");
    END(x.b);
}

TEST threads_change_no_bit(const formats *f)
{
    batch x, y;
    const int32_t len[3] = { 700, 9, 40 }, n_q[3] = { 1, 2, 3 }, threads[4] = { 1, 2, 3, 8 };
    open_batch(&x, f->latent, f->index, f->page, 3, len, n_q);
    OK(step(&x.b, &x.ctx, args_of(&x, 1)));
    for (int t = 0; t < 4; t++) {
        backwards b;
        open_batch(&y, f->latent, f->index, f->page, 3, len, n_q);
        y.ctx = with_threads(&y.ctx, &b, threads[t]);
        OK(step(&y.b, &y.ctx, args_of(&y, 1)));
        ASSERT_FALSE(b.broken);
        ASSERT(same_bits(x.indices, y.indices, x.rows * K));
        ASSERT(same_bits(x.out, y.out, x.rows * H * R));
        ASSERT(same_bits(x.lse, y.lse, x.rows * H));
        bag_free(&y.b);
    }
    END(x.b);
}

#ifndef DSA_NO_THREADS
TEST a_real_pool_changes_no_bit(const formats *f)
{
    batch x, y;
    const int32_t len[3] = { 700, 9, 40 }, n_q[3] = { 1, 2, 3 };
    dsa_pool *pool;
    open_batch(&x, f->latent, f->index, f->page, 3, len, n_q);
    open_batch(&y, f->latent, f->index, f->page, 3, len, n_q);
    OK(dsa_pool_create(NULL, 3, &pool));
    y.ctx.config.n_threads = 3;
    y.ctx.config.parallel_for = dsa_pool_run;
    y.ctx.config.parallel_user = pool;
    OK(step(&x.b, &x.ctx, args_of(&x, 1)));
    OK(step(&y.b, &y.ctx, args_of(&y, 1)));
    dsa_pool_destroy(pool);
    ASSERT(same_bits(x.indices, y.indices, x.rows * K));
    ASSERT(same_bits(x.out, y.out, x.rows * H * R));
    bag_free(&y.b);
    END(x.b);
}
#endif

static int hook_calls;
static void *hook_alloc(void *user, size_t bytes) { (void)user; hook_calls++; return malloc(bytes); }
static void hook_release(void *user, void *memory) { (void)user; hook_calls++; free(memory); }

/* 50 decode steps after set-up, with a pool: not one allocation, through the hook or around it. */
TEST decoding_allocates_nothing(const formats *f)
{
    batch x;
    const int32_t len = 0, one = 1;
    open_batch(&x, f->latent, f->index, 0, 1, &len, &one);
    dsa_cache_desc dl = desc_of(DSA_LATENT, f->latent, 64, f->page), di = desc_of(DSA_INDEX_KEY, f->index, 64, f->page);
    x.ctx.config.allocator.alloc = hook_alloc;
    x.ctx.config.allocator.release = hook_release;
    dsa_cache latent, index;
    OK(dsa_cache_create(&x.ctx, &dl, &latent));
    OK(dsa_cache_create(&x.ctx, &di, &index));
#ifndef DSA_NO_THREADS
    dsa_pool *pool;
    OK(dsa_pool_create(NULL, 2, &pool));
    x.ctx.config.n_threads = 2;
    x.ctx.config.parallel_for = dsa_pool_run;
    x.ctx.config.parallel_user = pool;
#endif
    dsa_seq s = seq_of(&latent, &index, 1), longest = s;
    dsa_step_args a = args_of(&x, 1);
    size_t bytes = 0, need = 0;
    a.seqs = &longest;
    OK(append(&x.ctx, &latent, &index, 63, random_floats(&x.b, 63 * W, 90, 1), random_floats(&x.b, 63 * D, 91, 1)));
    OK(dsa_step_workspace(&x.ctx, &a, &bytes));       /* the size for the longest step serves them all */
    OK(dsa_cache_truncate(&x.ctx, &latent, 0));
    OK(dsa_cache_truncate(&x.ctx, &index, 0));
    a.seqs = &s;
    a.workspace = work(&x.b, bytes);
    a.workspace_size = bytes;
    hook_calls = 0;
#ifdef COUNTS_MALLOC
    n_mallocs = 0;
    free(malloc(1));
    __atomic_store_n(&watching, 1, __ATOMIC_RELAXED);
    char *volatile probe = (char *)malloc(1);         /* the counter counts */
    int counted = n_mallocs;
    free(probe);
    n_mallocs = 0;
#endif
    dsa_status st = DSA_OK;
    for (int t = 0; t < 50 && st == DSA_OK; t++) {
        if (st == DSA_OK) st = dsa_step_workspace(&x.ctx, &a, &need);
        if (st == DSA_OK) st = dsa_step(&x.ctx, &a);
    }
#ifdef COUNTS_MALLOC
    __atomic_store_n(&watching, 0, __ATOMIC_RELAXED);
    ASSERT_EQ_FMT(1, counted, "%d");
    ASSERT_EQ_FMT(0, n_mallocs, "%d");
#endif
    OK(st);
    ASSERT_EQ_FMT(0, hook_calls, "%d");
    ASSERT_EQ_FMT(50LL, (long long)latent.len, "%lld");
    ASSERT(need <= bytes);
#ifndef DSA_NO_THREADS
    dsa_pool_destroy(pool);
#endif
    dsa_cache_destroy(&latent);
    dsa_cache_destroy(&index);
    ASSERT_EQ_FMT(2, hook_calls, "%d");
    END(x.b);
}

SUITE(step_suite)
{
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s_appending", kinds[i].name);
        CASE(name, the_step_is_its_parts, &kinds[i], 1);
        CASE(kinds[i].name, the_step_is_its_parts, &kinds[i], 0);
        CASE(kinds[i].name, a_ragged_batch_is_its_sequences, &kinds[i]);
        CASE(kinds[i].name, threads_change_no_bit, &kinds[i]);
        CASE(kinds[i].name, decoding_allocates_nothing, &kinds[i]);
#ifndef DSA_NO_THREADS
        CASE(kinds[i].name, a_real_pool_changes_no_bit, &kinds[i]);
#endif
    }
    RUN_TEST(a_step_selects_and_attends_correctly);
    RUN_TEST(lse_and_indices_are_optional);
    RUN_TEST(scale_and_top_k_override_the_config);
    RUN_TEST(a_sequence_without_queries_is_passed_over);
    RUN_TEST(the_first_token_attends_to_itself);
}

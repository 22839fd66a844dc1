/* Calls on caches that live on a device, without one: a device made of host memory stands in. What it is asked to do it gives back to the
   CPU on caches that say so, so every result must have the CPU's bits; what it refuses must come out of the call. tests/test_cuda.c has
   the real one. */
#include "fixture.h"

typedef struct fake {
    dsa_cuda device;                         /* first */
    int calls, runs;                         /* of the hooks; those that were not only asked */
    dsa_status answer;                       /* of every call that runs */
    dsa_status ask;                          /* of every call that only asks */
} fake;

static void *fake_alloc(void *user, size_t bytes) { (void)user; return malloc(bytes); }
static void fake_release(void *user, void *memory) { (void)user; free(memory); }

/* The context and the caches as if all were on the CPU. */
static dsa_ctx host_ctx(const dsa_ctx *ctx) { dsa_ctx c = *ctx; c.config.cuda = NULL; return c; }

enum { MOST = 8 };
typedef struct host_seqs { dsa_cache latent[MOST], index[MOST]; dsa_seq seqs[MOST]; } host_seqs;

static const dsa_seq *to_host(const dsa_seq *seqs, int32_t n, host_seqs *h)
{
    for (int32_t i = 0; i < n; i++) {
        h->seqs[i] = seqs[i];
        if (seqs[i].latent) { h->latent[i] = *seqs[i].latent; h->latent[i].device = DSA_DEVICE_CPU; h->seqs[i].latent = &h->latent[i]; }
        if (seqs[i].index) { h->index[i] = *seqs[i].index; h->index[i].device = DSA_DEVICE_CPU; h->seqs[i].index = &h->index[i]; }
    }
    return h->seqs;
}

static dsa_status fake_append(const dsa_ctx *ctx, const dsa_cache *cache, int64_t n, const float *x, const int64_t *slots)
{
    fake *f = (fake *)(void *)ctx->config.cuda;
    dsa_ctx host = host_ctx(ctx);
    dsa_cache c = *cache;
    dsa_seq seq;
    dsa_append_args a;
    f->calls++;
    f->runs++;
    if (f->answer != DSA_OK) return f->answer;
    memset(&seq, 0, sizeof seq);
    memset(&a, 0, sizeof a);
    c.device = DSA_DEVICE_CPU;
    seq.n_q = (int32_t)n;
    a.n_seqs = 1;
    a.seqs = &seq;
    a.slots = slots;
    if (c.kind == DSA_LATENT) { seq.latent = &c; a.latent = x; }
    else { seq.index = &c; a.index_key = x; }
    return dsa_append(&host, &a);
}

static dsa_status fake_read(const dsa_ctx *ctx, const dsa_cache *cache, int64_t begin, int64_t end, float *out)
{
    fake *f = (fake *)(void *)ctx->config.cuda;
    dsa_ctx host = host_ctx(ctx);
    dsa_cache c = *cache;
    f->calls++;
    f->runs++;
    if (f->answer != DSA_OK) return f->answer;
    c.device = DSA_DEVICE_CPU;
    return dsa_cache_read(&host, &c, begin, end, out);
}

static dsa_status fake_score(const dsa_ctx *ctx, const dsa_score_args *args, const dsa_selection *out, int64_t n_rows, float *scores,
    int64_t n_cols,
                             int64_t stride, int run)
{
    fake *f = (fake *)(void *)ctx->config.cuda;
    dsa_ctx host = host_ctx(ctx);
    dsa_score_args a = *args;
    host_seqs h;
    size_t bytes = 0;
    dsa_status st;
    (void)n_rows;
    f->calls++;
    f->runs += run;
    if (!run || f->answer != DSA_OK) return run ? f->answer : f->ask;
    a.seqs = to_host(args->seqs, args->n_seqs, &h);
    st = out ? dsa_score_select_workspace(&host, &a, out, &bytes) : dsa_score_workspace(&host, &a, &bytes);
    if (st != DSA_OK) return st;
    a.workspace = malloc(bytes);
    a.workspace_size = bytes;
    st = out ? dsa_score_select(&host, &a, out) : dsa_score(&host, &a, scores, n_cols, stride);
    free(a.workspace);
    return st;
}

/* A causal list ends where its query sits: entries behind it become invalid. */
static dsa_status fake_attend(const dsa_ctx *ctx, const dsa_attend_args *args, const dsa_attend_state *state, int exact, int fused,
    int causal,
                              const float *sinks, float *lse, float *max_logit, int run)
{
    fake *f = (fake *)(void *)ctx->config.cuda;
    dsa_ctx host = host_ctx(ctx);
    dsa_attend_args a = *args;
    host_seqs h;
    size_t bytes = 0;
    int32_t *list = NULL;
    dsa_status st;
    (void)exact;
    f->calls++;
    f->runs += run;
    if (!run || f->answer != DSA_OK) return run ? f->answer : f->ask;
    a.seqs = to_host(args->seqs, args->n_seqs, &h);
    if (causal && a.what == DSA_ATTEND_LIST) {
        int64_t row = 0;
        list = (int32_t *)malloc((size_t)(state->n_rows * a.index_stride) * sizeof *list);
        memcpy(list, a.indices, (size_t)(state->n_rows * a.index_stride) * sizeof *list);
        for (int32_t s = 0; s < a.n_seqs; s++) {
            int64_t n = a.seqs[s].n_q == 0 ? 1 : a.seqs[s].n_q == DSA_NONE ? 0 : a.seqs[s].n_q, len = a.seqs[s].len ? a.seqs[s].len
                : a.seqs[s].latent->len;
            for (int64_t i = 0; i < n; i++, row++)
                for (int64_t j = 0; j < a.n_indices; j++)
                    if (list[row * a.index_stride + j] > len - n + i) list[row * a.index_stride + j] = -1;
        }
        a.indices = list;
    }
    st = dsa_attend_workspace(&host, &a, state, &bytes);
    a.workspace = malloc(bytes);
    a.workspace_size = bytes;
    if (st == DSA_OK && fused) st = dsa_attend_begin(&host, state);
    if (st == DSA_OK) st = dsa_attend_add(&host, &a, state);
    if (st == DSA_OK && fused) st = dsa_attend_finish(&host, state, sinks, state->out, lse, max_logit);
    free(a.workspace);
    free(list);
    return st;
}

static void fake_open(fake *f)
{
    memset(f, 0, sizeof *f);
    f->device.allocator.alloc = fake_alloc;
    f->device.allocator.release = fake_release;
    f->device.append = fake_append;
    f->device.read = fake_read;
    f->device.score = fake_score;
    f->device.attend = fake_attend;
}

enum { HEADS = 5, R = 24, ROPE = 8, WIDTH = R + ROPE, HI = 3, DIM = 16, K = 6, PAGE = 7, ROWS = 40 };

static dsa_ctx small(bag *b, fake *f)
{
    dsa_config c;
    dsa_ctx ctx;
    char *why = (char *)bag_alloc(b, 200);
    memset(&c, 0, sizeof c);
    c.n_heads = HEADS;
    c.dim_latent = R;
    c.dim_rope = ROPE;
    c.n_index_heads = HI;
    c.dim_index = DIM;
    c.index_rope_width = ROPE;
    c.top_k = K;
    c.dim_hidden = 20;
    c.dim_q_lora = 12;
    c.dim_nope = 10;
    c.dim_v = 9;
    c.isa = DSA_ISA_SCALAR;
    c.cuda = f ? &f->device : NULL;
    c.detail = why;
    c.detail_size = 200;
    if (dsa_init(&ctx, &c) != DSA_OK) { fprintf(stderr, "test set-up: dsa_init refused\n"); abort(); }
    return ctx;
}

static enum greatest_test_res caches(const dsa_ctx *ctx, dsa_cache *latent, dsa_cache *index, int32_t page)
{
    dsa_cache_desc l = desc_of(DSA_LATENT, DSA_FP8, 2 * ROWS, page), x = desc_of(DSA_INDEX_KEY, DSA_FP8, 2 * ROWS, page);
    l.device = x.device = DSA_DEVICE_AUTO;
    OK(dsa_cache_create(ctx, &l, latent));
    OK(dsa_cache_create(ctx, &x, index));
    ASSERT_EQ(ctx->config.cuda ? DSA_DEVICE_CUDA : DSA_DEVICE_CPU, latent->device);
    ASSERT_EQ(latent->device, index->device);
    return GREATEST_TEST_RES_PASS;
}

/* Every call that touches rows, on two sequences, on either side. */
static enum greatest_test_res everything(bag *b, const dsa_ctx *ctx, float *results, int64_t *n_results)
{
    dsa_cache latent[2], index[2];
    dsa_seq seqs[2];
    float *rows = random_floats(b, (int64_t)2 * ROWS * WIDTH, 1, 1.0f), *keys = random_floats(b, (int64_t)2 * ROWS * DIM, 2, 1.0f);
    float *q = random_floats(b, 8 * HEADS * WIDTH, 3, 1.0f), *iq = random_floats(b, 8 * HI * DIM, 4, 1.0f), *w = random_floats(b, 8 * HI,
        5, 1.0f);
    float *sinks = random_floats(b, HEADS, 6, 1.0f), *at = results;
    for (int i = 0; i < 2; i++) {
        CHECK_CALL(caches(ctx, &latent[i], &index[i], i ? PAGE : 0));
        OK(append(ctx, &latent[i], &index[i], ROWS - 5 * i, rows + i * ROWS * WIDTH, keys + i * ROWS * DIM));
        ASSERT_EQ(ROWS - 5 * i, latent[i].len);
        OK(dsa_cache_read(ctx, &latent[i], 3, 20, at));
        at += 17 * WIDTH;
        OK(dsa_cache_read(ctx, &index[i], 0, 9, at));
        at += 9 * DIM;
        seqs[i] = seq_of(&latent[i], &index[i], 1 + 2 * i);
    }
    dsa_score_args score;
    dsa_selection sel;
    size_t bytes = 0;
    memset(&score, 0, sizeof score);
    memset(&sel, 0, sizeof sel);
    score.n_seqs = 2;
    score.seqs = seqs;
    score.q = iq;
    score.w = w;
    OK(dsa_score_workspace(ctx, &score, &bytes));
    score.workspace = work(b, bytes);
    score.workspace_size = bytes;
    OK(dsa_score(ctx, &score, at, ROWS, ROWS));
    at += 4 * ROWS;
    sel.order = DSA_ORDER_RANK;
    sel.indices = (int32_t *)(void *)at;
    at += 4 * K;
    sel.scores = at;
    at += 4 * K;
    OK(score_select(b, ctx, score, &sel));
    dsa_attend_args attend;
    memset(&attend, 0, sizeof attend);
    attend.n_seqs = 2;
    attend.seqs = seqs;
    attend.q = q;
    attend.indices = sel.indices;
    dsa_attend_state state = state_of(b, 4, HEADS, R);
    OK(dsa_attend_begin(ctx, &state));
    OK(add(b, ctx, attend, &state));
    attend.what = DSA_ATTEND_VISIBLE;
    OK(add(b, ctx, attend, &state));
    memcpy(at, state.out, sizeof(float) * 4 * HEADS * R);
    at += 4 * HEADS * R;
    OK(dsa_attend_workspace(ctx, &attend, &state, &bytes));
    attend.workspace = work(b, bytes);
    attend.workspace_size = bytes;
    OK(dsa_attend(ctx, &attend, &state, sinks, at, at + 4 * HEADS));
    at += 8 * HEADS;
    memcpy(at, state.out, sizeof(float) * 4 * HEADS * R);
    at += 4 * HEADS * R;
    dsa_step_args s;
    memset(&s, 0, sizeof s);
    s.n_seqs = 2;
    s.seqs = seqs;
    s.latent = rows;
    s.index_key = keys;
    s.q = q;
    s.index_q = iq;
    s.index_w = w;
    s.sinks = sinks;
    s.out = at;
    s.lse = at + 4 * HEADS * R;
    OK(step(b, ctx, s));
    at += 4 * HEADS * (R + 1);
    ASSERT_EQ(ROWS + 1, latent[0].len);
    for (int i = 0; i < 2; i++) { dsa_cache_destroy(&latent[i]); dsa_cache_destroy(&index[i]); }
    *n_results = at - results;
    return GREATEST_TEST_RES_PASS;
}

TEST same_as_the_cpu(void)
{
    bag b = { 0 };
    fake f;
    fake_open(&f);
    dsa_ctx cpu = small(&b, NULL), on = small(&b, &f);
    float *want = floats(&b, 20000), *got = floats(&b, 20000);
    int64_t n = 0, m = 0;
    CHECK_CALL(everything(&b, &cpu, want, &n));
    ASSERT_EQ(0, f.calls);
    CHECK_CALL(everything(&b, &on, got, &m));
    ASSERT(f.runs > 10 && f.calls > f.runs);
    ASSERT_EQ(n, m);
    ASSERT(same_bits(want, got, n));
    END(b);
}

/* What the device says comes out; an append that failed leaves the length, and nobody runs what was refused when asked. */
TEST refusals(void)
{
    bag b = { 0 };
    fake f;
    fake_open(&f);
    dsa_ctx cpu = small(&b, NULL), on = small(&b, &f);
    dsa_cache latent, index, host_latent, host_index;
    float *rows = random_floats(&b, ROWS * WIDTH, 1, 1.0f), *keys = random_floats(&b, ROWS * DIM, 2, 1.0f), *x = floats(&b, ROWS * WIDTH);
    CHECK_CALL(caches(&on, &latent, &index, PAGE));
    CHECK_CALL(caches(&cpu, &host_latent, &host_index, PAGE));
    OK(append(&on, &latent, &index, 20, rows, keys));
    f.answer = DSA_ERR_DEVICE;
    IS(DSA_ERR_DEVICE, append(&on, &latent, &index, 5, rows, keys));
    ASSERT_EQ(20, latent.len);
    ASSERT_STRN_EQ("cuda:", on.config.detail, 5);
    IS(DSA_ERR_DEVICE, dsa_cache_read(&on, &latent, 0, 1, x));
    dsa_seq seq = seq_of(&latent, &index, 1);
    dsa_step_args s;
    memset(&s, 0, sizeof s);
    s.n_seqs = 1;
    s.seqs = &seq;
    s.q = rows;
    s.index_q = keys;
    s.index_w = keys;
    s.out = x;
    IS(DSA_ERR_DEVICE, step(&b, &on, s));
    f.answer = DSA_OK;
    f.ask = DSA_ERR_WORKSPACE;
    int runs = f.runs;
    s.latent = rows;
    s.index_key = keys;
    IS(DSA_ERR_WORKSPACE, step(&b, &on, s));
    ASSERT_EQ(runs, f.runs);                                 /* not even the append */
    ASSERT_EQ(20, latent.len);
    f.ask = DSA_OK;
    /* a batch lives in one place; a context without a device knows no device; gradients stay on the host */
    OK(append(&cpu, &host_latent, &host_index, 20, rows, keys));
    dsa_seq mixed[2] = { seq_of(&latent, &index, 1), seq_of(&host_latent, &host_index, 1) };
    s.latent = s.index_key = NULL;
    s.n_seqs = 2;
    s.seqs = mixed;
    IS(DSA_ERR_FORMAT, step(&b, &on, s));
    IS(DSA_ERR_NO_DEVICE, dsa_cache_check(&cpu, &latent));
    latent.device = DSA_DEVICE_AUTO;
    IS(DSA_ERR_ARGUMENT, dsa_cache_check(&on, &latent));
    latent.device = DSA_DEVICE_CUDA;
    dsa_attend_backward_args back;
    size_t bytes = 0;
    memset(&back, 0, sizeof back);
    back.attend.n_seqs = 1;
    back.attend.seqs = &seq;
    IS(DSA_ERR_UNSUPPORTED, dsa_attend_backward_workspace(&on, &back, &bytes));
    dsa_pages_desc books;                                    /* they copy rows themselves */
    memset(&books, 0, sizeof books);
    books.n_planes = 1;
    books.planes = &latent;
    books.max_seqs = 1;
    IS(DSA_ERR_UNSUPPORTED, dsa_pages_bytes(&on, &books, &bytes));
    dsa_cache_destroy(&latent);
    dsa_cache_destroy(&index);
    dsa_cache_destroy(&host_latent);
    dsa_cache_destroy(&host_index);
    END(b);
}

SUITE(device_suite)
{
    RUN_TEST(same_as_the_cpu);
    RUN_TEST(refusals);
}

/* The pool: every task exactly once, whatever the counts, reused and in parallel with a second pool. */
#include "fixture.h"

#ifndef DSA_NO_THREADS
#include <pthread.h>

enum { MANY = 1000 };
/* One byte of padding per task would do; ints that only task i touches make a double run visible to TSan as well. */
typedef struct tally { int seen[MANY]; int out_of_range; int32_t n; } tally;
static void tick(void *arg, int32_t i)
{
    tally *t = (tally *)arg;
    if (i < 0 || i >= t->n) t->out_of_range = 1;
    else t->seen[i]++;
}
static int each_once(dsa_pool *pool, tally *t, int32_t n)
{
    memset(t, 0, sizeof *t);
    t->n = n;
    dsa_pool_run(pool, n, tick, t);
    for (int32_t i = 0; i < MANY; i++) if (t->seen[i] != (i < n)) return 0;
    return !t->out_of_range;
}

TEST every_task_runs_exactly_once(int32_t n_threads)
{
    tally t;
    dsa_pool *pool = NULL;
    OK(dsa_pool_create(NULL, n_threads, &pool));
    const int32_t n[9] = { 1, n_threads, n_threads - 1, n_threads + 1, 7 * n_threads, 2, 3, 0, MANY };
    for (int i = 0; i < 9; i++) ASSERT(each_once(pool, &t, n[i]));
    dsa_pool_destroy(pool);
    PASS();
}

TEST a_pool_can_be_reused_many_times(void)
{
    tally t;
    dsa_pool *pool = NULL;
    OK(dsa_pool_create(NULL, 4, &pool));
    for (int i = 0; i < 3000; i++) ASSERT(each_once(pool, &t, i % 9));
    dsa_pool_destroy(pool);
    PASS();
}

TEST pools_come_and_go(void)
{
    tally t;
    for (int i = 0; i < 100; i++) {
        dsa_pool *pool = NULL;
        OK(dsa_pool_create(NULL, 1 + i % 5, &pool));
        if (i % 3) ASSERT(each_once(pool, &t, i));     /* now and then none is ever used */
        dsa_pool_destroy(pool);
    }
    dsa_pool_destroy(NULL);
    PASS();
}

/* The tasks of one run see what the caller wrote before it, and the caller sees what they wrote. */
static void square(void *arg, int32_t i) { int64_t *x = (int64_t *)arg; x[MANY + i] = x[i] * x[i]; }
TEST memory_is_ordered_around_a_run(void)
{
    bag b = { NULL, 0 };
    int64_t *x = longs(&b, 2 * MANY);
    dsa_pool *pool = NULL;
    OK(dsa_pool_create(NULL, 3, &pool));
    for (int round = 0; round < 200; round++) {
        for (int i = 0; i < MANY; i++) x[i] = round + i;
        dsa_pool_run(pool, MANY, square, x);
        for (int64_t i = 0; i < MANY; i++) ASSERT_EQ_FMT((long long)((round + i) * (round + i)), (long long)x[MANY + i], "%lld");
    }
    dsa_pool_destroy(pool);
    END(b);
}

/* Both halves of a pool of two must be able to run at once: each task waits until the other has begun. */
typedef struct meeting { pthread_mutex_t lock; pthread_cond_t here; int n; } meeting;
static void meet(void *arg, int32_t i)
{
    meeting *m = (meeting *)arg;
    (void)i;
    pthread_mutex_lock(&m->lock);
    m->n++;
    pthread_cond_broadcast(&m->here);
    while (m->n < 2) pthread_cond_wait(&m->here, &m->lock);
    pthread_mutex_unlock(&m->lock);
}
TEST tasks_run_at_the_same_time(void)
{
    meeting m;
    dsa_pool *pool = NULL;
    pthread_mutex_init(&m.lock, NULL);
    pthread_cond_init(&m.here, NULL);
    m.n = 0;
    OK(dsa_pool_create(NULL, 2, &pool));
    dsa_pool_run(pool, 2, meet, &m);                  /* a pool that runs them one after the other would hang here */
    ASSERT_EQ_FMT(2, m.n, "%d");
    dsa_pool_destroy(pool);
    pthread_cond_destroy(&m.here);
    pthread_mutex_destroy(&m.lock);
    PASS();
}

typedef struct counter { int allocs, releases, fail_at; } counter;
static void *count_alloc(void *user, size_t bytes)
{
    counter *c = (counter *)user;
    return ++c->allocs == c->fail_at ? NULL : malloc(bytes);
}
static void count_release(void *user, void *memory) { ((counter *)user)->releases += memory != NULL; free(memory); }

TEST a_pool_uses_its_allocator(void)
{
    counter n = { 0, 0, 0 };
    dsa_allocator a;
    a.alloc = count_alloc;
    a.release = count_release;
    a.user = &n;
    dsa_pool *pool = NULL;
    OK(dsa_pool_create(&a, 3, &pool));
    ASSERT(n.allocs > 0);
    int made = n.allocs;
    tally t;
    ASSERT(each_once(pool, &t, 50));
    ASSERT_EQ_FMT(made, n.allocs, "%d");
    dsa_pool_destroy(pool);
    ASSERT_EQ_FMT(made, n.releases, "%d");
    for (int at = 1; at <= made; at++) {              /* each allocation fails once; what came before is given back */
        counter f = { 0, 0, 0 };
        dsa_pool *none = NULL;
        f.fail_at = at;
        a.user = &f;
        IS(DSA_ERR_MEMORY, dsa_pool_create(&a, 3, &none));
        ASSERT(none == NULL);
        ASSERT_EQ_FMT(at - 1, f.releases, "%d");
    }
    PASS();
}

TEST bad_pools_are_refused(void)
{
    dsa_pool *pool = NULL;
    IS(DSA_ERR_NULL, dsa_pool_create(NULL, 2, NULL));
    IS(DSA_ERR_ARGUMENT, dsa_pool_create(NULL, 0, &pool));
    IS(DSA_ERR_ARGUMENT, dsa_pool_create(NULL, -3, &pool));
    IS(DSA_ERR_ARGUMENT, dsa_pool_create(NULL, 4097, &pool));
    counter n = { 0, 0, 0 };
    dsa_allocator half = { count_alloc, NULL, &n };   /* half an allocator is a mistake, not a wish for malloc */
    IS(DSA_ERR_NULL, dsa_pool_create(&half, 2, &pool));
    half.alloc = NULL;
    half.release = count_release;
    IS(DSA_ERR_NULL, dsa_pool_create(&half, 2, &pool));
    ASSERT_EQ_FMT(0, n.allocs + n.releases, "%d");
    ASSERT(pool == NULL);
    half.release = NULL;
    OK(dsa_pool_create(&half, 2, &pool));             /* a zeroed one is malloc, as in the config */
    dsa_pool_destroy(pool);
    PASS();
}

/* ---- results on pools ------------------------------------------------------------------------------------------------------------------ */
enum { H = 4, R = 36, RR = 4, W = R + RR, HI = 3, D = 32, K = 20, LEN = 600, ROWS = 2 };
typedef struct work_item { dsa_ctx ctx; dsa_cache latent, index; float *q, *iq, *iw, out[ROWS * H * R]; int32_t indices[ROWS * K]; dsa_status status; int rounds; } work_item;

static void open_item(bag *b, work_item *x, uint64_t seed)
{
    dsa_config c;
    memset(&c, 0, sizeof c);
    memset(x, 0, sizeof *x);
    c.n_heads = H;
    c.dim_latent = R;
    c.dim_rope = RR;
    c.n_index_heads = HI;
    c.dim_index = D;
    c.top_k = K;
    c.isa = test_isa;
    if (dsa_init(&x->ctx, &c) != DSA_OK) abort();
    dsa_cache_desc dl = desc_of(DSA_LATENT, DSA_FP8, LEN, 16), di = desc_of(DSA_INDEX_KEY, DSA_FP8, LEN, 16);
    x->latent = cache_of(b, &x->ctx, &dl);
    x->index = cache_of(b, &x->ctx, &di);
    if (append(&x->ctx, &x->latent, &x->index, LEN, random_floats(b, LEN * W, seed, 1), random_floats(b, LEN * D, seed + 1, 1)) != DSA_OK) abort();
    x->q = random_floats(b, ROWS * H * W, seed + 2, 1);
    x->iq = random_floats(b, ROWS * HI * D, seed + 3, 1);
    x->iw = random_floats(b, ROWS * HI, seed + 4, 1);
    x->rounds = 1;
}
static void *work_on(void *arg)
{
    work_item *x = (work_item *)arg;
    bag b = { NULL, 0 };
    for (int i = 0; i < x->rounds && x->status == DSA_OK; i++) {
        dsa_seq s = seq_of(&x->latent, &x->index, ROWS);
        dsa_step_args a;
        memset(&a, 0, sizeof a);
        a.n_seqs = 1;
        a.seqs = &s;
        a.q = x->q;
        a.index_q = x->iq;
        a.index_w = x->iw;
        a.out = x->out;
        a.indices = x->indices;
        x->status = step(&b, &x->ctx, a);
        bag_free(&b);
    }
    return NULL;
}

TEST results_do_not_depend_on_the_pool(void)
{
    bag b = { NULL, 0 };
    work_item one, x;
    open_item(&b, &one, 500);
    work_on(&one);
    OK(one.status);
    for (int32_t n = 1; n <= 6; n++) {
        dsa_pool *pool = NULL;
        OK(dsa_pool_create(NULL, n, &pool));
        open_item(&b, &x, 500);
        x.ctx.config.n_threads = n;
        x.ctx.config.parallel_for = dsa_pool_run;
        x.ctx.config.parallel_user = pool;
        x.rounds = 5;
        work_on(&x);
        dsa_pool_destroy(pool);
        OK(x.status);
        ASSERT(same_bits(one.out, x.out, ROWS * H * R));
        ASSERT(same_bits(one.indices, x.indices, ROWS * K));
    }
    END(b);
}

/* Two user threads, each with its context and pool, and both reading the same caches. */
TEST two_contexts_work_side_by_side(void)
{
    bag b = { NULL, 0 };
    work_item alone[2], x[2];
    dsa_pool *pool[2];
    pthread_t thread[2];
    for (int i = 0; i < 2; i++) {
        open_item(&b, &alone[i], 600);
        open_item(&b, &x[i], 600);
        if (i == 1) {
            x[1].latent = x[0].latent;
            x[1].index = x[0].index;
            x[1].q = random_floats(&b, ROWS * H * W, 700, 1);
            alone[1].q = x[1].q;
        }
        work_on(&alone[i]);
        OK(alone[i].status);
        OK(dsa_pool_create(NULL, 2 + i, &pool[i]));
        x[i].ctx.config.n_threads = 2 + i;
        x[i].ctx.config.parallel_for = dsa_pool_run;
        x[i].ctx.config.parallel_user = pool[i];
        x[i].rounds = 40;
    }
    for (int i = 0; i < 2; i++) ASSERT_EQ_FMT(0, pthread_create(&thread[i], NULL, work_on, &x[i]), "%d");
    for (int i = 0; i < 2; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < 2; i++) {
        dsa_pool_destroy(pool[i]);
        OK(x[i].status);
        ASSERT(same_bits(alone[i].out, x[i].out, ROWS * H * R));
        ASSERT(same_bits(alone[i].indices, x[i].indices, ROWS * K));
    }
    ASSERT_FALSE(same_bits(x[0].out, x[1].out, ROWS * H * R));
    END(b);
}

/* A reader with its own len beside an appender of the same sequence. */
typedef struct appender { dsa_ctx ctx; dsa_cache latent, index; float *rows, *keys; dsa_status status; } appender;
static void *keep_appending(void *arg)
{
    appender *a = (appender *)arg;
    for (int i = 0; i < 200 && a->status == DSA_OK; i++) a->status = append(&a->ctx, &a->latent, &a->index, 1, a->rows, a->keys);
    return NULL;
}
TEST a_reader_may_run_beside_an_appender(void)
{
    bag b = { NULL, 0 };
    work_item before, beside;
    appender a;
    pthread_t thread;
    open_item(&b, &before, 800);
    open_item(&b, &beside, 800);
    dsa_cache_desc dl = desc_of(DSA_LATENT, DSA_FP8, LEN + 200, 16), di = desc_of(DSA_INDEX_KEY, DSA_FP8, LEN + 200, 16);
    memset(&a, 0, sizeof a);
    a.ctx = beside.ctx;
    a.latent = cache_of(&b, &a.ctx, &dl);
    a.index = cache_of(&b, &a.ctx, &di);
    OK(append(&a.ctx, &a.latent, &a.index, LEN, random_floats(&b, LEN * W, 800, 1), random_floats(&b, LEN * D, 801, 1)));
    a.rows = random_floats(&b, W, 805, 1);
    a.keys = random_floats(&b, D, 806, 1);
    beside.latent = a.latent;                         /* the reader's own view, len = LEN */
    beside.index = a.index;
    beside.rounds = 40;
    work_on(&before);
    ASSERT_EQ_FMT(0, pthread_create(&thread, NULL, keep_appending, &a), "%d");
    work_on(&beside);
    pthread_join(thread, NULL);
    OK(a.status);
    OK(beside.status);
    ASSERT_EQ_FMT((long long)(LEN + 200), (long long)a.latent.len, "%lld");
    ASSERT(same_bits(before.out, beside.out, ROWS * H * R));
    END(b);
}
#endif

SUITE(threads_suite)
{
#ifndef DSA_NO_THREADS
    CASE("1", every_task_runs_exactly_once, 1);
    CASE("2", every_task_runs_exactly_once, 2);
    CASE("3", every_task_runs_exactly_once, 3);
    CASE("8", every_task_runs_exactly_once, 8);
    RUN_TEST(a_pool_can_be_reused_many_times);
    RUN_TEST(pools_come_and_go);
    RUN_TEST(memory_is_ordered_around_a_run);
    RUN_TEST(tasks_run_at_the_same_time);
    RUN_TEST(a_pool_uses_its_allocator);
    RUN_TEST(bad_pools_are_refused);
    RUN_TEST(results_do_not_depend_on_the_pool);
    RUN_TEST(two_contexts_work_side_by_side);
    RUN_TEST(a_reader_may_run_beside_an_appender);
#endif
}

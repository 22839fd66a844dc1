/* Pages that sequences share: prefixes found to the token, forks, copy on write, eviction, exact counts. A row's values spell its prefix,
   so that a row of somebody else's, or one written over, is seen. tests/soak_pages.c does the same at random. */
#include "fixture.h"

enum { PAGE = 4, PAGES = 12, SEQS = 8, R = 4, RR = 2, W = R + RR, D = 8, LONGEST = 64 };

typedef struct world {
    bag b;
    dsa_ctx ctx;
    dsa_cache planes[2];
    dsa_pages *pages;
    void *books;
    size_t bytes;
    int32_t tokens[SEQS][LONGEST];       /* of every open sequence */
    char detail[200];
} world;

static void start(world *w, int32_t n_pages, int32_t max_seqs)
{
    dsa_config c;
    dsa_cache_desc latent = desc_of(DSA_LATENT, DSA_BF16, n_pages * PAGE, PAGE), key = desc_of(DSA_INDEX_KEY, DSA_FP8, n_pages * PAGE, PAGE);
    dsa_pages_desc d;
    memset(w, 0, sizeof *w);
    memset(&c, 0, sizeof c);
    c.n_heads = 2;
    c.dim_latent = R;
    c.dim_rope = RR;
    c.n_index_heads = 2;
    c.dim_index = D;
    c.index_rope_width = 2;
    c.top_k = 4;
    c.hadamard = DSA_HADAMARD_OFF;
    c.detail = w->detail;
    c.detail_size = sizeof w->detail;
    memset(&d, 0, sizeof d);
    d.n_planes = 2;
    d.planes = w->planes;
    d.max_seqs = max_seqs;
    d.max_len = LONGEST;
    if (dsa_init(&w->ctx, &c) != DSA_OK) abort();
    w->planes[0] = cache_of(&w->b, &w->ctx, &latent);
    w->planes[1] = cache_of(&w->b, &w->ctx, &key);
    if (dsa_pages_bytes(&w->ctx, &d, &w->bytes) != DSA_OK) abort();
    w->books = work(&w->b, w->bytes);
    if (dsa_pages_init(&w->ctx, &d, w->books, w->bytes, &w->pages) != DSA_OK) abort();
}

/* Small integers that spell tokens [0, row]: exact in both formats. */
static void row_of(const int32_t *tokens, int64_t row, float *latent, float *key)
{
    uint64_t h = 1;
    for (int64_t i = 0; i <= row; i++) h = (h * 31 + (uint64_t)tokens[i] + 7) * UINT64_C(0x9E3779B97F4A7C15) >> 3;
    for (int i = 0; i < W; i++) latent[i] = (float)(h >> (5 * i) & 15);
    for (int i = 0; i < D; i++) key[i] = (float)(h >> (4 * i + 3) & 15);
}

static enum greatest_test_res extend(world *w, int32_t seq, const int32_t *tokens, int32_t n)
{
    dsa_cache latent, key;
    float rows[LONGEST * W], keys[LONGEST * D];
    int64_t len;
    OK(dsa_pages_reserve(&w->ctx, w->pages, seq, n));
    OK(dsa_pages_view(&w->ctx, w->pages, seq, 0, &latent));
    OK(dsa_pages_view(&w->ctx, w->pages, seq, 1, &key));
    len = latent.len;
    memcpy(w->tokens[seq] + len, tokens, (size_t)n * sizeof *tokens);
    for (int32_t i = 0; i < n; i++) row_of(w->tokens[seq], len + i, rows + i * W, keys + i * D);
    if (n > 0) OK(append(&w->ctx, &latent, &key, n, rows, keys));
    OK(dsa_pages_commit(&w->ctx, w->pages, seq, tokens, n));
    OK(dsa_pages_check(&w->ctx, w->pages));
    PASS();
}

/* Opens a sequence of these tokens; `cached` of them must be there, and their rows must be right. */
static enum greatest_test_res opened(world *w, const int32_t *tokens, int32_t n, int64_t cached, int32_t *seq)
{
    int64_t got = -1;
    OK(dsa_pages_open(&w->ctx, w->pages, tokens, n, seq, &got));
    ASSERT_EQ(cached, got);
    memcpy(w->tokens[*seq], tokens, (size_t)n * sizeof *tokens);
    OK(dsa_pages_check(&w->ctx, w->pages));
    PASS();
}

static enum greatest_test_res holds(world *w, int32_t seq, int64_t len)
{
    dsa_cache latent, key;
    float want[W], want_key[D], got[LONGEST * W], got_key[LONGEST * D];
    int32_t tokens[LONGEST];
    OK(dsa_pages_view(&w->ctx, w->pages, seq, 0, &latent));
    OK(dsa_pages_view(&w->ctx, w->pages, seq, 1, &key));
    ASSERT_EQ(len, latent.len);
    ASSERT_EQ(len, key.len);
    OK(dsa_cache_read(&w->ctx, &latent, 0, len, got));
    OK(dsa_cache_read(&w->ctx, &key, 0, len, got_key));
    for (int64_t i = 0; i < len; i++) {
        row_of(w->tokens[seq], i, want, want_key);
        ASSERT_MEM_EQ(want, got + i * W, sizeof want);
        ASSERT_MEM_EQ(want_key, got_key + i * D, sizeof want_key);
    }
    OK(dsa_pages_tokens(&w->ctx, w->pages, seq, 0, len, tokens));
    ASSERT_MEM_EQ(w->tokens[seq], tokens, (size_t)len * sizeof *tokens);
    PASS();
}

static enum greatest_test_res pool_is(world *w, int32_t held, int32_t cached)
{
    dsa_pages_usage u;
    OK(dsa_pages_check(&w->ctx, w->pages));
    OK(dsa_pages_get_usage(&w->ctx, w->pages, DSA_NONE, &u));
    ASSERT_EQ_FMT(held, u.n_pages, "%d");
    ASSERT_EQ_FMT(cached, u.n_cached, "%d");
    ASSERT_EQ_FMT(PAGES - held - cached, u.n_free, "%d");
    PASS();
}

static const int32_t A[] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30 };

TEST a_sequence_grows_and_is_counted(void)
{
    world w;
    int32_t s;
    dsa_pages_usage u;
    start(&w, PAGES, SEQS);
    CHECK_CALL(pool_is(&w, 0, 0));
    CHECK_CALL(opened(&w, A, 10, 0, &s));
    CHECK_CALL(extend(&w, s, A, 10));
    CHECK_CALL(extend(&w, s, A + 10, 0));
    CHECK_CALL(extend(&w, s, A + 10, 1));
    CHECK_CALL(holds(&w, s, 11));
    CHECK_CALL(pool_is(&w, 3, 0));
    OK(dsa_pages_get_usage(&w.ctx, w.pages, s, &u));
    ASSERT_EQ((int64_t)11, u.n_rows);
    ASSERT(u.n_pages == 3 && u.n_own == 3);
    ASSERT_EQ((size_t)(3 * PAGE * 2 * W), u.latent_bytes);
    ASSERT_EQ((size_t)(3 * PAGE * (D + 4)), u.index_bytes);
    ASSERT(u.own_latent_bytes == u.latent_bytes && u.own_index_bytes == u.index_bytes);
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    CHECK_CALL(pool_is(&w, 0, 3));
    OK(dsa_pages_evict(&w.ctx, w.pages, INT32_MAX));
    CHECK_CALL(pool_is(&w, 0, 0));
    END(w.b);
}

TEST a_prefix_is_found_to_the_token(void)
{
    world w;
    int32_t s, t, other[20];
    start(&w, PAGES, SEQS);
    CHECK_CALL(opened(&w, A, 10, 0, &s));
    CHECK_CALL(extend(&w, s, A, 10));
    CHECK_CALL(opened(&w, A, 10, 8, &t));            /* while s is open: its full pages */
    OK(dsa_pages_close(&w.ctx, w.pages, t));
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    for (int32_t n = 0; n <= 12; n++) {              /* closed: every token, and no more than asked for */
        CHECK_CALL(opened(&w, A, n, n < 10 ? n : 10, &t));
        CHECK_CALL(holds(&w, t, n < 10 ? n : 10));
        OK(dsa_pages_close(&w.ctx, w.pages, t));
    }
    for (int32_t wrong = 0; wrong < 10; wrong++) {
        memcpy(other, A, sizeof other);
        other[wrong] = 99;
        CHECK_CALL(opened(&w, other, 12, wrong, &t));
        CHECK_CALL(extend(&w, t, other + wrong, 1));
        CHECK_CALL(holds(&w, t, wrong + 1));
        OK(dsa_pages_truncate(&w.ctx, w.pages, t, 0));
        OK(dsa_pages_close(&w.ctx, w.pages, t));
    }
    CHECK_CALL(opened(&w, A, 10, 10, &t));           /* unharmed */
    CHECK_CALL(holds(&w, t, 10));
    OK(dsa_pages_open(&w.ctx, w.pages, A, 10, &t, NULL));
    END(w.b);
}

TEST equal_tokens_behind_another_prefix_are_another_page(void)
{
    world w;
    int32_t s, t;
    static const int32_t x[] = { 7, 7, 7, 7, 1, 1, 1, 1 }, y[] = { 8, 8, 8, 8, 1, 1, 1, 1 }, z[] = { 1, 1, 1, 1 };
    start(&w, PAGES, SEQS);
    CHECK_CALL(opened(&w, x, 8, 0, &s));
    CHECK_CALL(extend(&w, s, x, 8));
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    CHECK_CALL(opened(&w, z, 4, 0, &t));
    CHECK_CALL(opened(&w, y, 8, 0, &s));
    CHECK_CALL(extend(&w, s, y, 8));
    CHECK_CALL(holds(&w, s, 8));
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    CHECK_CALL(opened(&w, x, 8, 8, &s));
    CHECK_CALL(holds(&w, s, 8));
    END(w.b);
}

TEST forks_part_at_any_token(void)
{
    world w;
    int32_t s, f, tail[3] = { 70, 71, 72 };
    dsa_pages_usage u;
    for (int32_t at = 0; at <= 10; at++) {
        start(&w, PAGES, SEQS);
        CHECK_CALL(opened(&w, A, 10, 0, &s));
        CHECK_CALL(extend(&w, s, A, 10));
        OK(dsa_pages_fork(&w.ctx, w.pages, s, at, &f));
        memcpy(w.tokens[f], A, sizeof A);
        CHECK_CALL(pool_is(&w, 3, 0));               /* no page taken */
        CHECK_CALL(holds(&w, f, at));
        OK(dsa_pages_get_usage(&w.ctx, w.pages, s, &u));
        ASSERT_EQ_FMT(3 - (at + PAGE - 1) / PAGE, u.n_own, "%d");
        CHECK_CALL(extend(&w, f, tail, 3));
        CHECK_CALL(extend(&w, s, A + 10, 3));
        CHECK_CALL(holds(&w, f, at + 3));
        CHECK_CALL(holds(&w, s, 13));
        OK(dsa_pages_close(&w.ctx, w.pages, s));
        CHECK_CALL(holds(&w, f, at + 3));
        OK(dsa_pages_close(&w.ctx, w.pages, f));
        CHECK_CALL(opened(&w, A, 13, 13, &s));
        CHECK_CALL(holds(&w, s, 13));
        memcpy(w.tokens[7], A, sizeof A);
        memcpy(w.tokens[7] + at, tail, sizeof tail);
        CHECK_CALL(opened(&w, w.tokens[7], at + 3, at + 3, &f));
        CHECK_CALL(holds(&w, f, at + 3));
        OK(dsa_pages_close(&w.ctx, w.pages, f));
        OK(dsa_pages_close(&w.ctx, w.pages, s));
        OK(dsa_pages_evict(&w.ctx, w.pages, PAGES));
        CHECK_CALL(pool_is(&w, 0, 0));
        bag_free(&w.b);
    }
    PASS();
}

/* A last page is copied only where somebody would miss a row of it. */
TEST pages_are_copied_only_when_they_must_be(void)
{
    world w;
    int32_t s, t, tail[3] = { 70, 71, 72 };
    start(&w, PAGES, SEQS);
    CHECK_CALL(opened(&w, A, 6, 0, &s));
    CHECK_CALL(extend(&w, s, A, 6));
    CHECK_CALL(extend(&w, s, A + 6, 1));             /* its own: in place */
    CHECK_CALL(pool_is(&w, 2, 0));
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    CHECK_CALL(opened(&w, A, 7, 7, &s));             /* all rows that the index has of it: in place again */
    CHECK_CALL(extend(&w, s, A + 7, 1));
    CHECK_CALL(pool_is(&w, 2, 0));
    OK(dsa_pages_truncate(&w.ctx, w.pages, s, 6));   /* the index has row 7: a copy */
    CHECK_CALL(extend(&w, s, tail, 1));
    CHECK_CALL(pool_is(&w, 2, 1));
    CHECK_CALL(opened(&w, A, 8, 8, &t));
    CHECK_CALL(holds(&w, t, 8));
    CHECK_CALL(holds(&w, s, 7));
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    OK(dsa_pages_truncate(&w.ctx, w.pages, t, 7));
    OK(dsa_pages_close(&w.ctx, w.pages, t));
    CHECK_CALL(opened(&w, A, 8, 8, &t));             /* row 7 is there still */
    END(w.b);
}

TEST drafts_are_written_over(void)
{
    world w;
    int32_t s, wrong[3] = { 50, 51, 52 };
    dsa_cache latent, key;
    float rows[3 * W], keys[3 * D];
    start(&w, PAGES, SEQS);
    CHECK_CALL(opened(&w, A, 6, 0, &s));
    CHECK_CALL(extend(&w, s, A, 6));
    OK(dsa_pages_reserve(&w.ctx, w.pages, s, 3));    /* rows 6, 7, 8: into a third page */
    memcpy(w.tokens[s] + 6, wrong, sizeof wrong);
    for (int i = 0; i < 3; i++) row_of(w.tokens[s], 6 + i, rows + i * W, keys + i * D);
    OK(dsa_pages_view(&w.ctx, w.pages, s, 0, &latent));
    OK(dsa_pages_view(&w.ctx, w.pages, s, 1, &key));
    OK(append(&w.ctx, &latent, &key, 3, rows, keys));
    IS(DSA_ERR_ARGUMENT, dsa_pages_commit(&w.ctx, w.pages, s, wrong, 4));
    OK(dsa_pages_commit(&w.ctx, w.pages, s, wrong, 1));      /* one accepted */
    CHECK_CALL(holds(&w, s, 7));
    CHECK_CALL(extend(&w, s, A, 4));
    CHECK_CALL(holds(&w, s, 11));
    OK(dsa_pages_truncate(&w.ctx, w.pages, s, 9));
    IS(DSA_ERR_ARGUMENT, dsa_pages_commit(&w.ctx, w.pages, s, wrong, 1));   /* what was reserved is gone */
    CHECK_CALL(extend(&w, s, A, 5));
    CHECK_CALL(holds(&w, s, 14));
    END(w.b);
}

TEST running_out_of_pages_changes_nothing(void)
{
    world w;
    int32_t s, t, u;
    start(&w, PAGES, SEQS);
    void *before = bag_alloc(&w.b, w.bytes);
    CHECK_CALL(opened(&w, A, 30, 0, &s));
    CHECK_CALL(extend(&w, s, A, 30));                /* 8 pages */
    CHECK_CALL(opened(&w, A + 1, 5, 0, &t));
    CHECK_CALL(extend(&w, t, A + 1, 5));             /* 10 */
    CHECK_CALL(opened(&w, A + 2, 8, 0, &u));
    CHECK_CALL(extend(&w, u, A + 2, 4));
    OK(dsa_pages_close(&w.ctx, w.pages, u));         /* 11 with a cached one */
    memcpy(before, w.books, w.bytes);
    IS(DSA_ERR_CAPACITY, dsa_pages_reserve(&w.ctx, w.pages, t, 12));
    ASSERT(strstr(w.detail, "out of pages") != NULL);
    ASSERT_MEM_EQ(before, w.books, w.bytes);         /* not even the cached page went */
    OK(dsa_pages_reserve(&w.ctx, w.pages, t, 11));
    CHECK_CALL(pool_is(&w, 12, 0));
    OK(dsa_pages_truncate(&w.ctx, w.pages, t, 5));
    CHECK_CALL(extend(&w, t, A, 11));
    CHECK_CALL(holds(&w, s, 30));
    CHECK_CALL(holds(&w, t, 16));
    OK(dsa_pages_truncate(&w.ctx, w.pages, t, 14));  /* row 14, 15 are in the index, and no page is left for a copy */
    CHECK_CALL(extend(&w, t, A + 5, 2));
    CHECK_CALL(holds(&w, t, 16));
    OK(dsa_pages_fork(&w.ctx, w.pages, s, 30, &u));  /* here the page is somebody's: no way */
    memcpy(before, w.books, w.bytes);
    IS(DSA_ERR_CAPACITY, dsa_pages_reserve(&w.ctx, w.pages, u, 1));
    IS(DSA_ERR_CAPACITY, dsa_pages_reserve(&w.ctx, w.pages, s, 35));
    ASSERT(strstr(w.detail, "max_len") != NULL);
    ASSERT_MEM_EQ(before, w.books, w.bytes);
    OK(dsa_pages_close(&w.ctx, w.pages, u));
    OK(dsa_pages_close(&w.ctx, w.pages, t));
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    OK(dsa_pages_evict(&w.ctx, w.pages, INT32_MAX));
    CHECK_CALL(pool_is(&w, 0, 0));
    END(w.b);
}

TEST the_least_recently_used_goes_first(void)
{
    world w;
    int32_t s[3], t, seqs[3][8] = { { 11, 12, 13, 14, 15, 16, 17, 18 }, { 21, 22, 23, 24, 25, 26, 27, 28 }, { 31, 32, 33, 34, 35, 36, 37, 38 } };
    start(&w, PAGES, SEQS);
    for (int i = 0; i < 3; i++) {
        CHECK_CALL(opened(&w, seqs[i], 8, 0, &s[i]));
        CHECK_CALL(extend(&w, s[i], seqs[i], 8));
        OK(dsa_pages_close(&w.ctx, w.pages, s[i]));
    }
    CHECK_CALL(opened(&w, seqs[0], 3, 3, &t));       /* the first one's first page is used again */
    OK(dsa_pages_close(&w.ctx, w.pages, t));
    OK(dsa_pages_evict(&w.ctx, w.pages, 1));         /* the oldest leaf: the first one's second page */
    CHECK_CALL(opened(&w, seqs[0], 8, 4, &t));
    OK(dsa_pages_close(&w.ctx, w.pages, t));
    OK(dsa_pages_evict(&w.ctx, w.pages, 1));         /* then the second one, from its end */
    CHECK_CALL(opened(&w, seqs[1], 8, 4, &t));
    OK(dsa_pages_close(&w.ctx, w.pages, t));
    OK(dsa_pages_evict(&w.ctx, w.pages, 2));         /* then all of the third, which nobody has asked for since */
    CHECK_CALL(opened(&w, seqs[2], 8, 0, &t));
    CHECK_CALL(opened(&w, seqs[0], 8, 4, &t));       /* held: cannot go */
    OK(dsa_pages_evict(&w.ctx, w.pages, INT32_MAX));
    CHECK_CALL(pool_is(&w, 1, 0));
    CHECK_CALL(holds(&w, t, 4));
    IS(DSA_ERR_ARGUMENT, dsa_pages_evict(&w.ctx, w.pages, -1));
    END(w.b);
}

/* Two sequences compute the same prefix side by side: neither's rows move, and what the second adds is found once it closes. */
TEST a_prefix_computed_twice_is_kept_once(void)
{
    world w;
    int32_t s, t, u;
    start(&w, PAGES, SEQS);
    CHECK_CALL(opened(&w, A, 8, 0, &s));
    CHECK_CALL(opened(&w, A, 14, 0, &t));
    CHECK_CALL(extend(&w, s, A, 8));
    CHECK_CALL(extend(&w, t, A, 14));
    CHECK_CALL(pool_is(&w, 6, 0));
    CHECK_CALL(opened(&w, A, 14, 8, &u));
    OK(dsa_pages_close(&w.ctx, w.pages, u));
    OK(dsa_pages_fork(&w.ctx, w.pages, t, 13, &u));  /* somebody else holds t's pages: they cannot move behind those of s */
    memcpy(w.tokens[u], A, sizeof A);
    OK(dsa_pages_close(&w.ctx, w.pages, t));
    CHECK_CALL(pool_is(&w, 6, 0));
    CHECK_CALL(holds(&w, u, 13));
    OK(dsa_pages_close(&w.ctx, w.pages, u));         /* now nobody does */
    CHECK_CALL(pool_is(&w, 2, 2));
    CHECK_CALL(opened(&w, A, 14, 13, &u));
    CHECK_CALL(holds(&w, u, 13));
    CHECK_CALL(holds(&w, s, 8));
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    OK(dsa_pages_close(&w.ctx, w.pages, u));
    OK(dsa_pages_evict(&w.ctx, w.pages, INT32_MAX));
    CHECK_CALL(pool_is(&w, 0, 0));
    END(w.b);
}

/* A few buckets and many rounds: pages with equal tokens and another parent meet in one bucket. */
TEST a_hash_is_not_trusted(void)
{
    world w;
    int32_t s;
    start(&w, PAGES, SEQS);
    for (int32_t round = 0; round < 40; round++) {
        for (int32_t i = 0; i < 5; i++) {
            int32_t x[8] = { 100 * round + i, 2, 2, 2, 1, 1, 1, 1 };
            CHECK_CALL(opened(&w, x, 8, 0, &s));
            CHECK_CALL(extend(&w, s, x, 8));
            OK(dsa_pages_close(&w.ctx, w.pages, s));
            CHECK_CALL(opened(&w, x, 8, 8, &s));
            CHECK_CALL(holds(&w, s, 8));
            OK(dsa_pages_close(&w.ctx, w.pages, s));
        }
        OK(dsa_pages_evict(&w.ctx, w.pages, INT32_MAX));
    }
    END(w.b);
}

TEST last_pages_that_begin_alike_are_both_kept(void)
{
    world w;
    int32_t s, y[7] = { 1, 2, 3, 4, 5, 6, 99 };
    start(&w, PAGES, SEQS);
    CHECK_CALL(opened(&w, A, 7, 0, &s));
    CHECK_CALL(extend(&w, s, A, 7));
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    CHECK_CALL(opened(&w, y, 7, 6, &s));
    CHECK_CALL(extend(&w, s, y + 6, 1));
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    CHECK_CALL(opened(&w, y, 7, 7, &s));
    CHECK_CALL(opened(&w, A, 7, 7, &s));
    CHECK_CALL(holds(&w, s, 7));
    OK(dsa_pages_reserve(&w.ctx, w.pages, s, 3));
    OK(dsa_pages_reserve(&w.ctx, w.pages, s, 1));    /* takes nothing back */
    OK(dsa_pages_commit(&w.ctx, w.pages, s, A + 7, 3));
    OK(dsa_pages_check(&w.ctx, w.pages));
    END(w.b);
}

TEST unknown_tokens_are_not_found(void)
{
    world w;
    int32_t s, t;
    int64_t n = -1;
    start(&w, PAGES, SEQS);
    CHECK_CALL(opened(&w, A, 6, 0, &s));
    CHECK_CALL(extend(&w, s, A, 6));
    OK(dsa_pages_reserve(&w.ctx, w.pages, s, 5));
    OK(dsa_pages_commit(&w.ctx, w.pages, s, NULL, 3));
    OK(dsa_pages_commit(&w.ctx, w.pages, s, A + 9, 2));      /* behind unknown ones */
    OK(dsa_pages_known(&w.ctx, w.pages, s, &n));
    ASSERT_EQ((int64_t)6, n);
    IS(DSA_ERR_ARGUMENT, dsa_pages_tokens(&w.ctx, w.pages, s, 0, 7, &t));
    OK(dsa_pages_close(&w.ctx, w.pages, s));
    CHECK_CALL(pool_is(&w, 0, 2));
    CHECK_CALL(opened(&w, A, 11, 6, &t));
    CHECK_CALL(holds(&w, t, 6));
    END(w.b);
}

/* A decode step over pages of the pool, one of them copied, gives the bits of caches in one piece. */
TEST steps_over_shared_pages_have_the_same_bits(void)
{
    world w;
    int32_t s, f;
    dsa_cache latent, key, plain[2];
    float rows[20 * W], keys[20 * D], *q, *iq, *iw, out[2][2 * R];
    dsa_cache_desc dl = desc_of(DSA_LATENT, DSA_BF16, 20, 0), dk = desc_of(DSA_INDEX_KEY, DSA_FP8, 20, 0);
    dsa_seq seq;
    dsa_step_args a;
    start(&w, PAGES, SEQS);
    q = random_floats(&w.b, 2 * W, 1, 1);
    iq = random_floats(&w.b, 2 * D, 2, 1);
    iw = random_floats(&w.b, 2, 3, 1);
    plain[0] = cache_of(&w.b, &w.ctx, &dl);
    plain[1] = cache_of(&w.b, &w.ctx, &dk);
    for (int i = 0; i < 20; i++) row_of(A, i, rows + i * W, keys + i * D);
    OK(append(&w.ctx, &plain[0], &plain[1], 19, rows, keys));
    CHECK_CALL(opened(&w, A, 18, 0, &s));
    CHECK_CALL(extend(&w, s, A, 18));
    OK(dsa_pages_fork(&w.ctx, w.pages, s, 17, &f));
    memcpy(w.tokens[f], A, sizeof A);
    CHECK_CALL(extend(&w, f, A + 17, 2));
    OK(dsa_pages_reserve(&w.ctx, w.pages, f, 1));
    OK(dsa_pages_view(&w.ctx, w.pages, f, 0, &latent));
    OK(dsa_pages_view(&w.ctx, w.pages, f, 1, &key));
    for (int which = 0; which < 2; which++) {
        seq = which ? seq_of(&plain[0], &plain[1], 1) : seq_of(&latent, &key, 1);
        memset(&a, 0, sizeof a);
        a.n_seqs = 1;
        a.seqs = &seq;
        a.latent = rows + 19 * W;
        a.index_key = keys + 19 * D;
        a.q = q;
        a.index_q = iq;
        a.index_w = iw;
        a.out = out[which];
        OK(step(&w.b, &w.ctx, a));
    }
    OK(dsa_pages_commit(&w.ctx, w.pages, f, A + 19, 1));
    CHECK_CALL(holds(&w, f, 20));
    ASSERT_MEM_EQ(out[0], out[1], sizeof out[0]);
    END(w.b);
}

TEST pages_refuse(void)
{
    world w;
    int32_t s, t;
    int64_t n;
    size_t bytes = 77;
    dsa_cache c, planes[2];
    dsa_pages_usage u;
    dsa_pages_desc d;
    dsa_pages *none = NULL, *two;
    start(&w, PAGES, 2);
    void *before = bag_alloc(&w.b, w.bytes);
    CHECK_CALL(opened(&w, A, 6, 0, &s));
    CHECK_CALL(extend(&w, s, A, 6));
    CHECK_CALL(opened(&w, A, 6, 4, &t));
    memcpy(before, w.books, w.bytes);
    IS(DSA_ERR_CAPACITY, dsa_pages_open(&w.ctx, w.pages, A, 6, &t, &n));
    IS(DSA_ERR_CAPACITY, dsa_pages_fork(&w.ctx, w.pages, s, 3, &t));
    IS(DSA_ERR_NULL, dsa_pages_open(NULL, w.pages, A, 6, &t, &n));
    IS(DSA_ERR_NULL, dsa_pages_open(&w.ctx, NULL, A, 6, &t, &n));
    IS(DSA_ERR_NULL, dsa_pages_open(&w.ctx, w.pages, NULL, 6, &t, &n));
    IS(DSA_ERR_NULL, dsa_pages_open(&w.ctx, w.pages, A, 6, NULL, &n));
    IS(DSA_ERR_SHAPE, dsa_pages_open(&w.ctx, w.pages, A, -1, &t, &n));
    for (int32_t bad = -2; bad <= 2; bad += bad == -1 ? 3 : 1) {        /* -2, -1, 2 */
        IS(DSA_ERR_ARGUMENT, dsa_pages_fork(&w.ctx, w.pages, bad, 0, &t));
        IS(DSA_ERR_ARGUMENT, dsa_pages_reserve(&w.ctx, w.pages, bad, 1));
        IS(DSA_ERR_ARGUMENT, dsa_pages_commit(&w.ctx, w.pages, bad, A, 0));
        IS(DSA_ERR_ARGUMENT, dsa_pages_truncate(&w.ctx, w.pages, bad, 0));
        IS(DSA_ERR_ARGUMENT, dsa_pages_close(&w.ctx, w.pages, bad));
        IS(DSA_ERR_ARGUMENT, dsa_pages_view(&w.ctx, w.pages, bad, 0, &c));
        IS(DSA_ERR_ARGUMENT, dsa_pages_known(&w.ctx, w.pages, bad, &n));
        IS(DSA_ERR_ARGUMENT, dsa_pages_tokens(&w.ctx, w.pages, bad, 0, 0, &t));
        if (bad != DSA_NONE) IS(DSA_ERR_ARGUMENT, dsa_pages_get_usage(&w.ctx, w.pages, bad, &u));
    }
    IS(DSA_ERR_ARGUMENT, dsa_pages_fork(&w.ctx, w.pages, s, 7, &t));
    IS(DSA_ERR_ARGUMENT, dsa_pages_fork(&w.ctx, w.pages, s, -1, &t));
    IS(DSA_ERR_NULL, dsa_pages_fork(&w.ctx, w.pages, s, 1, NULL));
    IS(DSA_ERR_ARGUMENT, dsa_pages_reserve(&w.ctx, w.pages, s, -1));
    IS(DSA_ERR_CAPACITY, dsa_pages_reserve(&w.ctx, w.pages, s, INT64_MAX));
    IS(DSA_ERR_ARGUMENT, dsa_pages_commit(&w.ctx, w.pages, s, A, 1));
    IS(DSA_ERR_ARGUMENT, dsa_pages_commit(&w.ctx, w.pages, s, A, -1));
    IS(DSA_ERR_ARGUMENT, dsa_pages_truncate(&w.ctx, w.pages, s, 7));
    IS(DSA_ERR_ARGUMENT, dsa_pages_truncate(&w.ctx, w.pages, s, -1));
    IS(DSA_ERR_ARGUMENT, dsa_pages_view(&w.ctx, w.pages, s, 2, &c));
    IS(DSA_ERR_ARGUMENT, dsa_pages_view(&w.ctx, w.pages, s, -1, &c));
    IS(DSA_ERR_NULL, dsa_pages_view(&w.ctx, w.pages, s, 0, NULL));
    IS(DSA_ERR_NULL, dsa_pages_known(&w.ctx, w.pages, s, NULL));
    IS(DSA_ERR_NULL, dsa_pages_tokens(&w.ctx, w.pages, s, 0, 1, NULL));
    IS(DSA_ERR_ARGUMENT, dsa_pages_tokens(&w.ctx, w.pages, s, 2, 1, &t));
    IS(DSA_ERR_ARGUMENT, dsa_pages_tokens(&w.ctx, w.pages, s, -1, 1, &t));
    IS(DSA_ERR_NULL, dsa_pages_get_usage(&w.ctx, w.pages, s, NULL));
    IS(DSA_ERR_NULL, dsa_pages_get_usage(&w.ctx, NULL, DSA_NONE, &u));
    IS(DSA_ERR_NULL, dsa_pages_evict(&w.ctx, NULL, 1));
    IS(DSA_ERR_NULL, dsa_pages_check(&w.ctx, NULL));
    ASSERT_MEM_EQ(before, w.books, w.bytes);

    memset(&d, 0, sizeof d);
    d.n_planes = 2;
    d.planes = planes;
    d.max_seqs = 2;
#define REFUSES(STATUS, SPOIL) do { memcpy(planes, w.planes, sizeof planes); dsa_pages_desc bad = d; dsa_pages_desc *p = &bad; (void)p; \
        SPOIL; IS(STATUS, dsa_pages_bytes(&w.ctx, p, &bytes)); IS(STATUS, dsa_pages_init(&w.ctx, p, w.books, w.bytes, &none)); } while (0)
    REFUSES(DSA_ERR_NULL, p = NULL);
    REFUSES(DSA_ERR_NULL, bad.planes = NULL);
    REFUSES(DSA_ERR_SHAPE, bad.n_planes = 0);
    REFUSES(DSA_ERR_SHAPE, bad.max_seqs = 0);
    REFUSES(DSA_ERR_SHAPE, bad.max_len = -1);
    REFUSES(DSA_ERR_SHAPE, planes[1].n_pages--);
    REFUSES(DSA_ERR_SHAPE, (planes[1].page_size /= 2, planes[1].n_pages *= 2));
    REFUSES(DSA_ERR_SHAPE, planes[0].n_pages = planes[1].n_pages = 0);
    REFUSES(DSA_ERR_ARGUMENT, (planes[1].block_table = A, planes[1].n_blocks = 1));
    REFUSES(DSA_ERR_FORMAT, planes[0].kind = (dsa_kind)5);
    REFUSES(DSA_ERR_NULL, planes[0].data = NULL);
    if (sizeof(size_t) > 4) REFUSES(DSA_ERR_OVERFLOW, planes[0].page_stride = planes[1].page_stride = (size_t)-1 / 2 / PAGES & ~(size_t)3);
#undef REFUSES
    memcpy(planes, w.planes, sizeof planes);
    IS(DSA_ERR_NULL, dsa_pages_bytes(&w.ctx, &d, NULL));
    OK(dsa_pages_bytes(&w.ctx, &d, &bytes));
    IS(DSA_ERR_CAPACITY, dsa_pages_init(&w.ctx, &d, w.books, bytes - 1, &none));
    IS(DSA_ERR_NULL, dsa_pages_init(&w.ctx, &d, NULL, bytes, &none));
    IS(DSA_ERR_NULL, dsa_pages_init(&w.ctx, &d, w.books, bytes, NULL));
    ASSERT(none == NULL);
    ASSERT_MEM_EQ(before, w.books, w.bytes);
    OK(dsa_pages_create(&w.ctx, &d, &two));
    OK(dsa_pages_check(&w.ctx, two));
    dsa_pages_destroy(two);
    dsa_pages_destroy(NULL);
    END(w.b);
}

static int allocations, allowed;
static void *count_alloc(void *user, size_t bytes) { (void)user; if (allowed == 0) return NULL; allowed--; allocations++; return malloc(bytes); }
static void count_release(void *user, void *memory) { (void)user; allocations--; free(memory); }

TEST books_come_from_the_allocator_once(void)
{
    world w;
    int32_t s, t;
    dsa_pages_desc d;
    dsa_pages *p = NULL;
    start(&w, PAGES, SEQS);
    w.ctx.config.allocator.alloc = count_alloc;
    w.ctx.config.allocator.release = count_release;
    memset(&d, 0, sizeof d);
    d.n_planes = 2;
    d.planes = w.planes;
    d.max_seqs = 3;
    allocations = allowed = 0;
    IS(DSA_ERR_MEMORY, dsa_pages_create(&w.ctx, &d, &p));
    ASSERT(p == NULL && allocations == 0);
    allowed = 1;
    OK(dsa_pages_create(&w.ctx, &d, &p));
    ASSERT_EQ_FMT(1, allocations, "%d");
    w.pages = p;
    CHECK_CALL(opened(&w, A, 10, 0, &s));            /* nothing is allowed any more */
    CHECK_CALL(extend(&w, s, A, 10));
    OK(dsa_pages_fork(&w.ctx, p, s, 9, &t));
    CHECK_CALL(extend(&w, t, A, 20));
    dsa_pages_destroy(p);
    ASSERT_EQ_FMT(0, allocations, "%d");
    END(w.b);
}

SUITE(pages_suite)
{
    RUN_TEST(a_sequence_grows_and_is_counted);
    RUN_TEST(a_prefix_is_found_to_the_token);
    RUN_TEST(equal_tokens_behind_another_prefix_are_another_page);
    RUN_TEST(forks_part_at_any_token);
    RUN_TEST(pages_are_copied_only_when_they_must_be);
    RUN_TEST(drafts_are_written_over);
    RUN_TEST(running_out_of_pages_changes_nothing);
    RUN_TEST(the_least_recently_used_goes_first);
    RUN_TEST(a_prefix_computed_twice_is_kept_once);
    RUN_TEST(a_hash_is_not_trusted);
    RUN_TEST(last_pages_that_begin_alike_are_both_kept);
    RUN_TEST(unknown_tokens_are_not_found);
    RUN_TEST(steps_over_shared_pages_have_the_same_bits);
    RUN_TEST(pages_refuse);
    RUN_TEST(books_come_from_the_allocator_once);
}

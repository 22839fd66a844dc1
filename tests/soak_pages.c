/* Soak test of dsa_pages: random operations over hundreds of sequences against a naive model, every count checked after each.

       cc -O2 -g tests/soak_pages.c -lm -pthread -o build/soak_pages && build/soak_pages        20,000 operations
       build/soak_pages -n 1000000 -s 7                                                          as many, another seed

   The model keeps each sequence's tokens in an array of its own. A row's values are a hash of the tokens up to it, so a row that
   belongs to another prefix, was written over, or was lost is seen when it is read. Where nothing has been evicted the model also
   knows how long the longest cached prefix must be. After a refusal the books must be what they were, byte for byte. */
#include <assert.h>
#define DSA_ASSERT(x) assert(x)
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include <stdio.h>

enum { SEQS = 300, PAGE = 4, MOST = 160, R = 4, RR = 2, W = R + RR, D = 8, STEMS = 12, HISTORY = 4096, PLANES = 3 };

#define REQUIRE(condition) \
    do { if (!(condition)) { fprintf(stderr, "%s:%d: not true: %s (operation %ld) %s\n", __FILE__, __LINE__, #condition, at, detail); exit(1); } } while (0)

typedef struct text { int32_t n, n_known; int32_t token[MOST]; } text;      /* tokens behind n_known are the model's secret */

static long at;
static char detail[200];
static uint64_t state;
static dsa_ctx ctx;
static dsa_cache planes[PLANES];
static dsa_pages *pages;
static unsigned char *books, *before;
static size_t bytes;
static text seqs[SEQS], stems[STEMS], history[HISTORY];
static int32_t open_seqs[SEQS], n_open, n_history;
static long n_exact, n_hits, n_rows_hit, n_refused, n_copied, n_ops[8];

static uint32_t rnd(void)
{
    state ^= state >> 12; state ^= state << 25; state ^= state >> 27;
    return (uint32_t)((state * UINT64_C(2685821657736338717)) >> 32);
}
static int32_t below(int32_t n) { return (int32_t)(rnd() % (uint32_t)n); }

/* One float per channel, exact in every format: small integers out of the hash of a prefix. */
static void spell(uint64_t h, int n, float *x) { for (int i = 0; i < n; i++) x[i] = (float)((h * (uint64_t)(2 * i + 1) >> 40) & 15); }
static uint64_t mix(uint64_t h, int32_t token) { h = (h ^ ((uint64_t)(uint32_t)token + 1)) * UINT64_C(0x9E3779B97F4A7C15); return h ^ h >> 29; }

static dsa_cache plane(dsa_kind kind, dsa_type format, int32_t n_pages)
{
    dsa_cache_desc d;
    dsa_cache c;
    memset(&d, 0, sizeof d);
    d.kind = kind;
    d.format = format;
    d.capacity = n_pages * PAGE;
    d.page_size = PAGE;
    REQUIRE(dsa_cache_create(&ctx, &d, &c) == DSA_OK);
    return c;
}

static void start(int32_t n_pages)
{
    dsa_config c;
    dsa_pages_desc d;
    memset(&c, 0, sizeof c);
    c.dim_latent = R;
    c.dim_rope = RR;
    c.dim_index = D;
    c.index_rope_width = 2;
    c.hadamard = DSA_HADAMARD_OFF;
    c.detail = detail;
    c.detail_size = sizeof detail;
    REQUIRE(dsa_init(&ctx, &c) == DSA_OK);
    planes[0] = plane(DSA_LATENT, DSA_FP8, n_pages);
    planes[1] = plane(DSA_INDEX_KEY, DSA_FP8, n_pages);
    planes[2] = plane(DSA_LATENT, DSA_F32, n_pages);
    memset(&d, 0, sizeof d);
    d.n_planes = PLANES;
    d.planes = planes;
    d.max_seqs = SEQS;
    d.max_len = MOST;
    REQUIRE(dsa_pages_bytes(&ctx, &d, &bytes) == DSA_OK);
    books = (unsigned char *)malloc(bytes);
    before = (unsigned char *)malloc(bytes);
    REQUIRE(books && before && dsa_pages_init(&ctx, &d, books, bytes, &pages) == DSA_OK);
    n_open = n_history = 0;
    for (int i = 0; i < STEMS; i++) {                    /* prompts begin alike: a few stems, themselves beginning alike */
        stems[i].n = MOST / 2;
        for (int j = 0; j < stems[i].n; j++) stems[i].token[j] = i && j < 10 * (i % 4) ? stems[i - 1].token[j] : below(1000);
    }
}

static dsa_pages_usage usage(int32_t seq)
{
    dsa_pages_usage u;
    REQUIRE(dsa_pages_get_usage(&ctx, pages, seq, &u) == DSA_OK);
    return u;
}

/* Reads some of a sequence's rows, all of them if asked, and compares. */
static void verify(int32_t seq, int all)
{
    const text *t = &seqs[seq];
    int64_t known = -1;
    dsa_cache c[PLANES];
    uint64_t h = 1;
    int32_t tokens[MOST], from = all ? 0 : below(t->n + 1);
    for (int i = 0; i < PLANES; i++) {
        REQUIRE(dsa_pages_view(&ctx, pages, seq, i, &c[i]) == DSA_OK);
        REQUIRE(c[i].len == t->n);
    }
    REQUIRE(dsa_pages_known(&ctx, pages, seq, &known) == DSA_OK && known == t->n_known);
    REQUIRE(dsa_pages_tokens(&ctx, pages, seq, 0, known, tokens) == DSA_OK && memcmp(tokens, t->token, (size_t)known * 4) == 0);
    for (int32_t i = 0; i < t->n && (all || i < from + 8); i++) {
        float want[W + D], got[W + D];
        h = mix(h, t->token[i]);
        if (i < from) continue;
        spell(h, W, want);
        for (int p = 0; p < PLANES; p += 2) {
            REQUIRE(dsa_cache_read(&ctx, &c[p], i, i + 1, got) == DSA_OK);
            REQUIRE(memcmp(want, got, W * sizeof *want) == 0);
        }
        spell(h * 3, D, want);
        REQUIRE(dsa_cache_read(&ctx, &c[1], i, i + 1, got) == DSA_OK);
        REQUIRE(memcmp(want, got, D * sizeof *want) == 0);
    }
}

static int32_t common(const text *a, int32_t n_a, const text *b)
{
    int32_t i = 0;
    while (i < n_a && i < b->n && a->token[i] == b->token[i]) i++;
    return i;
}

static void add_open(int32_t seq) { open_seqs[n_open++] = seq; }

static void op_open(void)
{
    text t = stems[below(STEMS)];
    int64_t n_cached = -1;
    int32_t seq, least = 0;
    dsa_status st;
    t.n = below(t.n + 1);
    while (t.n < MOST && below(6)) t.token[t.n++] = below(3);
    memcpy(before, books, bytes);
    st = dsa_pages_open(&ctx, pages, t.token, t.n, &seq, &n_cached);
    REQUIRE(st == (n_open < SEQS ? DSA_OK : DSA_ERR_CAPACITY));
    if (st != DSA_OK) { REQUIRE(memcmp(before, books, bytes) == 0); return; }
    for (int i = 0; i < n_history; i++) {                /* closed sequences, since the last eviction */
        int32_t n = common(&t, t.n, &history[i]);
        if (n > least) least = n;
    }
    REQUIRE(n_cached >= least && n_cached <= t.n);
    n_exact += least > 0 && n_cached == least;
    n_hits += n_cached > 0;
    n_rows_hit += (long)n_cached;
    t.n = t.n_known = (int32_t)n_cached;
    seqs[seq] = t;
    add_open(seq);
    verify(seq, 1);
}

static int32_t pick(void) { return below(n_open); }

static void op_fork(void)
{
    int32_t from, seq, n, held;
    dsa_status st;
    if (n_open == 0) return;
    from = open_seqs[pick()];
    n = below(seqs[from].n + 1);
    held = usage(DSA_NONE).n_pages;
    st = dsa_pages_fork(&ctx, pages, from, n, &seq);
    REQUIRE(st == (n_open < SEQS ? DSA_OK : DSA_ERR_CAPACITY));
    REQUIRE(usage(DSA_NONE).n_pages == held);
    if (st != DSA_OK) return;
    seqs[seq] = seqs[from];
    seqs[seq].n = n;
    if (seqs[seq].n_known > n) seqs[seq].n_known = n;
    add_open(seq);
}

/* Reserve, write, commit; now and then fewer than were reserved, or without saying the tokens. */
static void op_append(void)
{
    int32_t seq, n, accepted;
    text *t;
    dsa_pages_usage pool, own, after;
    dsa_cache c[PLANES];
    dsa_seq s;
    dsa_append_args a;
    float rows[MOST * W], keys[MOST * D];
    int32_t tokens[MOST];
    uint64_t h = 1;
    int64_t fresh;
    dsa_status st;
    if (n_open == 0) return;
    seq = open_seqs[pick()];
    t = &seqs[seq];
    n = below(8) ? below(12) : below(60);
    pool = usage(DSA_NONE);
    own = usage(seq);
    fresh = (t->n + n + PAGE - 1) / PAGE - own.n_pages;
    if (fresh < 0) fresh = 0;
    memcpy(before, books, bytes);
    st = dsa_pages_reserve(&ctx, pages, seq, n);
    if (st != DSA_OK) {
        REQUIRE(st == DSA_ERR_CAPACITY && n > 0);
        REQUIRE(t->n + n > MOST || fresh + 1 > pool.n_free + pool.n_cached);
        REQUIRE(memcmp(before, books, bytes) == 0);
        n_refused++;
        return;
    }
    REQUIRE(t->n + n <= MOST && fresh <= pool.n_free + pool.n_cached);
    after = usage(DSA_NONE);
    n_copied += pool.n_free + pool.n_cached - (after.n_free + after.n_cached) < fresh ||
                pool.n_free - after.n_free > fresh;
    if (pool.n_free < fresh + 1) n_history = 0;          /* may have evicted */
    if (n == 0) return;
    for (int32_t i = 0; i < t->n; i++) h = mix(h, t->token[i]);
    for (int32_t i = 0; i < n; i++) {
        tokens[i] = below(4) ? stems[i % STEMS].token[(t->n + i) % stems[0].n] : below(3);
        h = mix(h, tokens[i]);
        spell(h, W, rows + i * W);
        spell(h * 3, D, keys + i * D);
    }
    for (int i = 0; i < PLANES; i++) {
        REQUIRE(dsa_pages_view(&ctx, pages, seq, i, &c[i]) == DSA_OK);
        memset(&s, 0, sizeof s);
        s.latent = s.index = &c[i];
        s.n_q = n;
        memset(&a, 0, sizeof a);
        a.n_seqs = 1;
        a.seqs = &s;
        if (c[i].kind == DSA_LATENT) a.latent = rows; else a.index_key = keys;
        REQUIRE(dsa_append(&ctx, &a) == DSA_OK);
    }
    accepted = below(4) ? n : below(n + 1);
    memcpy(t->token + t->n, tokens, (size_t)accepted * sizeof *tokens);
    REQUIRE(dsa_pages_commit(&ctx, pages, seq, tokens, pages->seqs[seq].reserved - t->n + 1) == DSA_ERR_ARGUMENT);
    if (below(30)) {
        REQUIRE(dsa_pages_commit(&ctx, pages, seq, tokens, accepted) == DSA_OK);
        if (t->n_known == t->n) t->n_known += accepted;
    } else {
        REQUIRE(dsa_pages_commit(&ctx, pages, seq, NULL, accepted) == DSA_OK);
    }
    t->n += accepted;
    if (below(10) == 0) REQUIRE(dsa_pages_commit(&ctx, pages, seq, tokens, 0) == DSA_OK);
}

static void op_truncate(void)
{
    int32_t seq, n;
    if (n_open == 0) return;
    seq = open_seqs[pick()];
    n = below(3) ? seqs[seq].n - below(seqs[seq].n < 6 ? seqs[seq].n + 1 : 6) : below(seqs[seq].n + 1);
    REQUIRE(dsa_pages_truncate(&ctx, pages, seq, n) == DSA_OK);
    seqs[seq].n = n;
    if (seqs[seq].n_known > n) seqs[seq].n_known = n;
}

static void op_close(void)
{
    int32_t i, seq;
    if (n_open == 0) return;
    i = pick();
    seq = open_seqs[i];
    verify(seq, 1);
    if (n_history < HISTORY && usage(seq).n_own == usage(seq).n_pages) {     /* what others hold may have to wait for their end */
        history[n_history] = seqs[seq];
        history[n_history++].n = seqs[seq].n_known;
    }
    REQUIRE(dsa_pages_close(&ctx, pages, seq) == DSA_OK);
    open_seqs[i] = open_seqs[--n_open];
}

static void op_evict(void)
{
    int32_t n = below(20) ? below(10) : INT32_MAX;
    dsa_pages_usage was = usage(DSA_NONE), is;
    REQUIRE(dsa_pages_evict(&ctx, pages, n) == DSA_OK);
    is = usage(DSA_NONE);
    REQUIRE(is.n_cached == (n < was.n_cached ? was.n_cached - n : 0) && is.n_pages == was.n_pages);
    if (n > 0) n_history = 0;
}

/* Bytes of all sequences, page by page, against the pool's own figure. */
static void check_bytes(void)
{
    static unsigned char seen[1 << 16];
    dsa_pages_usage pool = usage(DSA_NONE);
    size_t own = 0, page_latent = 0, page_index = 0;
    int32_t n = 0;
    memset(seen, 0, sizeof seen);
    for (int i = 0; i < PLANES; i++) *(planes[i].kind == DSA_LATENT ? &page_latent : &page_index) += planes[i].page_stride;
    for (int i = 0; i < n_open; i++) {
        dsa_pages_usage u = usage(open_seqs[i]);
        dsa_cache c;
        REQUIRE(dsa_pages_view(&ctx, pages, open_seqs[i], 0, &c) == DSA_OK && u.n_pages == c.n_blocks && u.n_rows == c.len);
        REQUIRE(u.latent_bytes == page_latent * (size_t)u.n_pages && u.index_bytes == page_index * (size_t)u.n_pages);
        for (int64_t b = 0; b < c.n_blocks; b++) { n += !seen[c.block_table[b]]; seen[c.block_table[b]] = 1; }
        own += u.own_latent_bytes;
    }
    REQUIRE(n == pool.n_pages && pool.latent_bytes == page_latent * (size_t)n && pool.index_bytes == page_index * (size_t)n);
    REQUIRE(own == pool.own_latent_bytes && own == page_latent * (size_t)pool.n_own && pool.n_seqs == n_open);
}

/* Whatever is changed in the books behind its back, the checker says so. */
static void plant_faults(void)
{
    int32_t held = -1, cached = pages->oldest, seq = open_seqs[0], sibling = -1, i;
    for (i = 0; i < pages->n_pages; i++) {
        if (pages->page[i].refs > 0 && pages->page[i].n_tokens > 0) held = i;
        if (pages->page[i].n_tokens > 0 && pages->page[i].next >= 0) sibling = i;
    }
    for (i = 0; i < n_open && usage(seq).n_rows < 2 * PAGE; i++) seq = open_seqs[i];
    REQUIRE(held >= 0 && cached >= 0 && sibling >= 0 && pages->free_page >= 0 && usage(seq).n_rows >= 2 * PAGE && pages->seqs[seq].n_published > 0);
    memcpy(before, books, bytes);
#define CAUGHT(change) do { change; REQUIRE(dsa_pages_check(&ctx, pages) == DSA_ERR_DATA && #change[0]); memcpy(books, before, bytes); \
        REQUIRE(dsa_pages_check(&ctx, pages) == DSA_OK); } while (0)
    CAUGHT(pages->page[held].refs++);
    CAUGHT(pages->page[cached].refs++);
    CAUGHT(pages->page[pages->free_page].refs++);
    CAUGHT(pages->page[held].n_tokens = 0);
    CAUGHT(pages->page[cached].n_tokens = PAGE + 1);
    CAUGHT(pages->tokens[cached * PAGE] ^= 1 << 20; pages->tokens[held * PAGE] ^= 1 << 20);
    CAUGHT(pages->page[sibling].next = -1);
    CAUGHT(pages->page[sibling].prev = sibling);
    CAUGHT(pages->page[cached].newer = -1);
    CAUGHT(pages->oldest = pages->page[cached].newer);
    CAUGHT(pages->newest = cached);
    CAUGHT(pages->n_cached--);
    CAUGHT(pages->n_free++);
    CAUGHT(pages->n_free--);
    CAUGHT(pages->free_page = pages->page[pages->free_page].newer);
    CAUGHT(pages->n_seqs--);
    CAUGHT(pages->seqs[seq].len++; pages->seqs[seq].reserved = pages->seqs[seq].len - 1);
    CAUGHT(pages->seqs[seq].n_known = pages->seqs[seq].len + 1);
    CAUGHT(pages->seqs[seq].reserved += 1000);
    CAUGHT(pages->seqs[seq].n_published = pages->seqs[seq].n_blocks + 1);
    CAUGHT(pages->tables[seq * pages->max_blocks]++);
    CAUGHT(pages->tables[seq * pages->max_blocks + pages->seqs[seq].n_blocks] = 0);
    CAUGHT(pages->seqs[seq].open = 0);
    for (i = 0; i < pages->n_buckets; i++) if (pages->bucket[i] >= 0) { CAUGHT(pages->bucket[i] = -1); break; }
#undef CAUGHT
}

static void soak(long n, int32_t n_pages)
{
    int planted = 0;
    start(n_pages);
    for (long i = 0; i < n; i++, at++) {
        int32_t what = below(100);
        int32_t crowded = n_open > SEQS - 20;
        if (what < (crowded ? 4 : 14)) { op_open(); n_ops[0]++; }
        else if (what < (crowded ? 8 : 24)) { op_fork(); n_ops[1]++; }
        else if (what < 70) { op_append(); n_ops[2]++; }
        else if (what < 82) { op_truncate(); n_ops[3]++; }
        else if (what < 99) { op_close(); n_ops[4]++; }
        else if (n_pages < 10000) { op_evict(); n_ops[5]++; }
        if (n_pages < 10000 || i % 8 == 0) REQUIRE(dsa_pages_check(&ctx, pages) == DSA_OK);
        if (n_open > 0) verify(open_seqs[pick()], 0);
        if (i % 64 == 0) check_bytes();
        if (!planted && i > n / 2 && pages->n_cached > 2 && pages->n_free > 2 && n_open > 20 && pages->seqs[open_seqs[0]].n_published > 0) {
            plant_faults();
            planted = 1;
        }
    }
    REQUIRE(planted || n_pages < 1000);
    while (n_open > 0) op_close();
    REQUIRE(usage(DSA_NONE).n_pages == 0);
    REQUIRE(dsa_pages_evict(&ctx, pages, INT32_MAX) == DSA_OK);
    REQUIRE(dsa_pages_check(&ctx, pages) == DSA_OK && usage(DSA_NONE).n_free == n_pages);
    for (int i = 0; i < PLANES; i++) dsa_cache_destroy(&planes[i]);
    free(books);
    free(before);
}

int main(int argc, char **argv)
{
    long n = 20000;
    state = 88172645463325252u;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "-n") == 0) n = atol(argv[i + 1]);
        else if (strcmp(argv[i], "-s") == 0) state += (uint64_t)atol(argv[i + 1]) * 7919;
        else { fprintf(stderr, "usage: %s [-n OPERATIONS] [-s SEED]\n", argv[0]); return 2; }
    }
    soak(n / 4, 16384);                                  /* pages enough for all: the longest prefix is known */
    soak(n / 2, 700);                                    /* eviction */
    soak(n - n / 4 - n / 2, 60);                         /* hardly a page left */
    printf("%ld operations: %ld opened (%ld with a cached prefix, of %.1f rows, the model had foretold %ld), %ld forked, %ld appended (%ld refused, %ld with a copied page), "
           "%ld truncated, %ld closed, %ld evictions; no page is left\n", n, n_ops[0], n_hits, n_hits ? (double)n_rows_hit / (double)n_hits : 0.0, n_exact,
           n_ops[1], n_ops[2], n_refused, n_copied, n_ops[3], n_ops[4], n_ops[5]);
    return 0;
}

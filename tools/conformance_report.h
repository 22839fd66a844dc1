/* conformance_report.h - what the comparisons of conformance.c share: the printed line, the metrics, caches in
   awkward memory, and the three ways of cutting a sequence into calls. */
#ifndef CONFORMANCE_REPORT_H
#define CONFORMANCE_REPORT_H

/* ---- one run over one file ---------------------------------------------------------------- */
typedef struct run {
    const char *path;            /* as the user gave it */
    char stem[128];              /* file name without folder and ending: the first part of every line's name */
    dsa_config base;             /* ISA, threads, detail buffer: what every config of this run starts from */
    int json;
    long checks, failed;
} run;

enum { FILE_OK = 0, FILE_BAD = 2 };

/* Says on stderr what is wrong with the file; the value is what the checker of the file returns. */
static int bad_file(const run *r, const char *format, ...)
{
    va_list list;
    fprintf(stderr, "conformance: %s: ", r->path);
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    return FILE_BAD;
}

static void *allocate(size_t count, size_t size)
{
    void *memory = NULL;
    if (size == 0 || count <= SIZE_MAX / size) memory = malloc(count && size ? count * size : 1);
    if (!memory) {
        fprintf(stderr, "conformance: out of memory (%zu items of %zu bytes)\n", count, size);
        exit(2);
    }
    return memory;
}

static float *allocate_floats(int64_t count) { return (float *)allocate((size_t)count, sizeof(float)); }

static void print_json_string(const char *text)
{
    putchar('"');
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') printf("\\%c", c);
        else if (c < 0x20) printf("\\u%04x", c);
        else putchar(c);
    }
    putchar('"');
}

static void print_json_number(const char *key, double x)
{
    if (isfinite(x)) printf(",\"%s\":%.6g", key, x);
    else printf(",\"%s\":null", key);      /* JSON has neither inf nor NaN */
}

/* The line of one comparison: "name metric value bound ok|FAIL". bound NAN: the value is for information only and the
   bound prints as "-". The test is value <= bound, which a NaN value fails. */
static int report(run *r, const char *metric, double value, double bound, const char *name_format, ...)
{
    char name[256];
    va_list list;
    int ok = isnan(bound) || value <= bound;
    va_start(list, name_format);
    vsnprintf(name, sizeof name, name_format, list);
    va_end(list);
    r->checks++;
    r->failed += !ok;
    if (r->json) {
        printf("{\"file\":");
        print_json_string(r->path);
        printf(",\"name\":");
        print_json_string(name);
        printf(",\"metric\":\"%s\"", metric);
        print_json_number("value", value);
        print_json_number("bound", bound);
        printf(",\"ok\":%s}\n", ok ? "true" : "false");
    } else {
        printf("%s/%s %s %.4g ", r->stem, name, metric, value);
        if (isnan(bound)) printf("- ");
        else printf("%g ", bound);
        puts(ok ? "ok" : "FAIL");
    }
    fflush(stdout);
    return ok;
}

/* 1 if a library call succeeded. A call that refuses what the file asks for is a failed comparison, with its reason on
   stderr; only bad files and bad usage end with status 2. */
static int called(run *r, dsa_status status, const char *name)
{
    if (status == DSA_OK) return 1;
    fprintf(stderr, "conformance: %s: %s: %s%s%s\n", r->path, name, dsa_status_text(status),
            r->base.detail[0] ? ": " : "", r->base.detail);
    r->base.detail[0] = '\0';
    report(r, "status", (double)status, 0, "%s", name);
    return 0;
}

/* ---- tensors of the file ------------------------------------------------------------------ */
static int has_dtype(const st_tensor *t, const char *dtype) { return strcmp(t->dtype, dtype) == 0; }

/* A whole F32, BF16 or F16 tensor as floats; the caller frees it. NULL (and a message) for any other type. */
static float *tensor_floats(const run *r, const st_tensor *t)
{
    size_t count = t->bytes / (has_dtype(t, "F32") ? 4u : 2u);
    const unsigned char *bytes = t->data;
    if (!has_dtype(t, "F32") && !has_dtype(t, "BF16") && !has_dtype(t, "F16")) {
        bad_file(r, "%s: dtype %s where F32, BF16 or F16 is wanted", t->name, t->dtype);
        return NULL;
    }
    float *x = (float *)allocate(count, sizeof *x);
    if (has_dtype(t, "F32")) {
        memcpy(x, bytes, count * sizeof *x);
        return x;
    }
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, bytes + 2 * i, sizeof half);
        x[i] = has_dtype(t, "BF16") ? dsa_bf16_to_f32(half) : dsa_f16_to_f32(half);
    }
    return x;
}

static int32_t *tensor_int32(const run *r, const st_tensor *t)
{
    if (!has_dtype(t, "I32")) {
        bad_file(r, "%s: dtype %s where I32 is wanted", t->name, t->dtype);
        return NULL;
    }
    int32_t *x = (int32_t *)allocate(t->bytes / 4, sizeof *x);
    memcpy(x, t->data, t->bytes);
    return x;
}

/* Checks rank and shape; -1 in `shape` matches any size. Sizes are limited to 1 .. 2^31 - 1, as the library's are. */
static int has_shape(const run *r, const st_tensor *t, int rank, const int64_t *shape)
{
    int ok = t->rank == rank;
    for (int i = 0; ok && i < rank; i++)
        ok = t->shape[i] >= 1 && t->shape[i] <= INT32_MAX && (shape[i] < 0 || t->shape[i] == shape[i]);
    if (!ok) bad_file(r, "%s: shape does not fit the other tensors", t->name);
    return ok;
}

/* ---- metrics ------------------------------------------------------------------------------ */
static int same_value(double a, double b) { return a == b || (isnan(a) && isnan(b)); }

/* The larger of two; unlike fmax it keeps a NaN, which no bound lets pass. */
static double larger(double a, double b) { return isnan(a) || a > b ? a : b; }

/* max |a - b|; infinities must stand at equal places. */
static double max_abs(const float *a, const float *b, int64_t n)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = same_value(a[i], b[i]) ? 0 : fabs((double)a[i] - (double)b[i]);
        worst = larger(worst, d);
    }
    return worst;
}

/* FlashMLA's element test "abs < atol or rel < rtol" as one figure: the largest min(abs / atol, rel / rtol); it passes
   up to 1 (spec 9). */
static double tolerance_used(const float *a, const float *b, int64_t n, double atol, double rtol)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        if (same_value(a[i], b[i])) continue;
        if (!isfinite(a[i]) || !isfinite(b[i])) return HUGE_VAL;
        double d = fabs((double)a[i] - (double)b[i]);
        double used = fmin(d / atol, b[i] != 0 ? d / fabs((double)b[i]) / rtol : HUGE_VAL);
        if (used > worst) worst = used;
    }
    return worst;
}

/* sim(a, b) = 1 - 2<a, b> / (|a|^2 + |b|^2) (spec 9). Places where both hold the same infinity are left out, any
   other infinity or NaN makes the result NaN. */
static double similarity_gap(const float *a, const float *b, int64_t n)
{
    double ab = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) {
        double x = a[i], y = b[i];
        if (isinf(x) && x == y) continue;
        ab += x * y;
        squares += x * x + y * y;
    }
    return squares == 0 ? 0 : 1 - 2 * ab / squares;
}

static double values_differ(const float *a, const float *b, int64_t n)
{
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += !same_value(a[i], b[i]);
    return (double)count;
}

/* ---- index sets --------------------------------------------------------------------------- */
static int compare_positions(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* Copies the entries of a list that lie in [0, visible) to `set`, ascending, and counts them. The reference lists name
   future positions where fewer than k are visible, and the library pads with -1: both drop out here. */
static int32_t visible_set(const int32_t *list, int32_t k, int64_t visible, int32_t *set)
{
    int32_t n = 0;
    for (int32_t i = 0; i < k; i++)
        if (list[i] >= 0 && list[i] < visible) set[n++] = list[i];
    qsort(set, (size_t)n, sizeof *set, compare_positions);
    return n;
}

static int32_t common_entries(const int32_t *a, int32_t n_a, const int32_t *b, int32_t n_b)
{
    int32_t i = 0, j = 0, n = 0;
    while (i < n_a && j < n_b) {
        if (a[i] == b[j]) { n++; i++; j++; }
        else if (a[i] < b[j]) i++;
        else j++;
    }
    return n;
}

static int compare_descending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* Is `list` a top-k of scores[first, end)? Right size, no entry twice, none outside the range, none left out that beats
   the cut (the k-th largest score) by more than `tie`, none taken that misses it by more. spare: end - first doubles.
   Scores of -inf and NaN cannot be selected. */
static int is_top_k(const int32_t *list, int32_t k, const double *scores, int64_t first, int64_t end,
                    double tie_absolute, double tie_relative, double *spare)
{
    int64_t n = 0;
    int32_t want, got = 0;
    for (int64_t s = first; s < end; s++)
        if (scores[s] > -HUGE_VAL) spare[n++] = scores[s];
    qsort(spare, (size_t)n, sizeof *spare, compare_descending);
    want = n < k ? (int32_t)n : k;
    double cut = want ? spare[want - 1] : 0, tie = tie_absolute + tie_relative * fabs(cut);

    int32_t *set = (int32_t *)allocate((size_t)k, sizeof *set);
    int ok = 1;
    for (int32_t i = 0; i < k; i++)
        if (list[i] != -1) set[got++] = list[i];
    qsort(set, (size_t)got, sizeof *set, compare_positions);
    ok = got == want;
    for (int32_t i = 0; ok && i < got; i++)
        ok = set[i] >= first && set[i] < end && (i == 0 || set[i] > set[i - 1]) && scores[set[i]] >= cut - tie;
    for (int64_t s = first, i = 0; ok && s < end; s++) {
        if (i < got && set[i] == s) i++;
        else ok = !(scores[s] > cut + tie);
    }
    free(set);
    return ok;
}

/* ---- calls -------------------------------------------------------------------------------- */
/* The three ways of cutting n rows into calls. */
typedef enum schedule { ONE_SHOT, DECODE, CHUNKED, N_SCHEDULES } schedule;
static const char *const schedule_names[N_SCHEDULES] = { "one-shot", "decode", "chunked" };

/* Rows of the next call when `done` of n are behind us. The ragged chunks are coprime to page sizes and to each other,
   so that their borders fall everywhere. */
static int64_t next_chunk(schedule s, int64_t done, int64_t n)
{
    static const int64_t ragged[] = { 1, 7, 3, 37, 2, 13, 5, 71 };
    int64_t want = s == ONE_SHOT ? n : 1, at = 0;
    for (size_t i = 0; s == CHUNKED; i++) {
        want = ragged[i % (sizeof ragged / sizeof ragged[0])];
        if (at == done) break;
        at += want;
    }
    return want < n - done ? want : n - done;
}

/* A workspace of exactly the size asked for, filled with 0xFF (NaN as a float, -1 as an index), so that a read before
   the first write shows. */
static void *poisoned(size_t bytes)
{
    void *memory = allocate(bytes, 1);
    memset(memory, 0xFF, bytes);
    return memory;
}

/* ---- caches in awkward memory --------------------------------------------------------------- */
typedef struct store {
    dsa_cache cache;
    unsigned char *memory;
    size_t bytes;
    int shared;                  /* memory is the device's as well */
    int32_t *table;              /* NULL when contiguous */
} store;

/* Poisoned memory where the context's caches live. */
static unsigned char *store_memory(const dsa_ctx *ctx, size_t bytes, int *shared)
{
    unsigned char *memory;
    *shared = ctx->config.cuda != NULL;
    if (!*shared) return (unsigned char *)poisoned(bytes);
    memory = (unsigned char *)device_shared(bytes);
    if (!memory) {
        fprintf(stderr, "conformance: out of memory\n");
        exit(2);
    }
    memset(memory, 0xFF, bytes);
    return memory;
}

static void store_memory_free(unsigned char *memory, int shared)
{
    if (shared) device_shared_free(memory);
    else free(memory);
}

static void store_free(store *s)
{
    store_memory_free(s->memory, s->shared);
    free(s->table);
    memset(s, 0, sizeof *s);
}

/* The pages of a pool in shuffled order (Fisher-Yates, fixed seed): the first n_blocks of them are a block table. */
static int32_t *shuffled_table(int64_t n_pages)
{
    int32_t *page = (int32_t *)allocate((size_t)n_pages, sizeof *page);
    uint32_t seed = 12345;
    for (int64_t i = 0; i < n_pages; i++) page[i] = (int32_t)i;
    for (int64_t i = n_pages - 1; i > 0; i--) {
        seed = seed * 1664525u + 1013904223u;
        int64_t j = (int64_t)(seed >> 8) % (i + 1);
        int32_t t = page[i];
        page[i] = page[j];
        page[j] = t;
    }
    return page;
}

/* An empty cache over poisoned memory: contiguous when page_size is 0, otherwise pages in shuffled order, some of
   them unused, each followed by a gap (FlashMLA's own tests use a page stride of one row more than tight). */
static dsa_status store_make(const dsa_ctx *ctx, dsa_cache_desc desc, int32_t page_size, store *s)
{
    dsa_status status;
    memset(s, 0, sizeof *s);
    desc.page_size = page_size;
    desc.device = DSA_DEVICE_AUTO;
    if (!page_size) {
        status = dsa_cache_bytes(ctx, &desc, &s->bytes);
        if (status != DSA_OK) return status;
        s->memory = store_memory(ctx, s->bytes, &s->shared);
        return dsa_cache_init(ctx, &desc, s->memory, s->bytes, &s->cache);
    }
    int64_t n_blocks = (desc.capacity + page_size - 1) / page_size, n_pages = n_blocks + 3;
    size_t page, row;
    int32_t dim = desc.dim ? desc.dim : desc.kind == DSA_LATENT ? ctx->config.dim_latent : ctx->config.dim_index;
    int32_t dim_rope = desc.kind == DSA_INDEX_KEY ? 0 : desc.dim_rope ? desc.dim_rope : ctx->config.dim_rope;
    status = dsa_page_bytes(desc.kind, desc.format, dim, dim_rope, page_size, &page);
    if (status == DSA_OK) status = dsa_row_bytes(desc.kind, desc.format, dim, dim_rope, &row);
    if (status != DSA_OK) return status;
    page += (row + 3) / 4 * 4;
    s->bytes = page * (size_t)n_pages;
    s->memory = store_memory(ctx, s->bytes, &s->shared);
    s->table = shuffled_table(n_pages);
    return dsa_cache_view(ctx, &desc, s->memory, n_pages, page, s->table, n_blocks, 0, &s->cache);
}

/* Appends rows of one cache in the calls of a schedule. */
static dsa_status store_append(const dsa_ctx *ctx, store *s, const float *rows, int64_t n, schedule plan)
{
    int64_t width = s->cache.dim + s->cache.dim_rope;
    dsa_status status = DSA_OK;
    for (int64_t done = 0, m; status == DSA_OK && done < n; done += m) {
        dsa_seq seq = { 0 };
        dsa_append_args args = { 0 };
        m = next_chunk(plan, done, n);
        seq.n_q = (int32_t)m;
        if (s->cache.kind == DSA_LATENT) seq.latent = &s->cache, args.latent = rows + done * width;
        else seq.index = &s->cache, args.index_key = rows + done * width;
        args.n_seqs = 1;
        args.seqs = &seq;
        status = dsa_append(ctx, &args);
    }
    return status;
}

/* The sequences of a call whose n_rows queries all read one cache: one sequence where the queries are fewer than the
   cached rows, otherwise one sequence per query (a query must sit on a row). */
static dsa_seq *query_seqs(store *s, int64_t n_rows, int32_t *n_seqs)
{
    int64_t per = n_rows <= s->cache.len ? n_rows : 1;
    dsa_seq *seqs = (dsa_seq *)allocate((size_t)(n_rows / per), sizeof *seqs);
    *n_seqs = (int32_t)(n_rows / per);
    for (int32_t i = 0; i < *n_seqs; i++) {
        memset(&seqs[i], 0, sizeof seqs[i]);
        if (s->cache.kind == DSA_LATENT) seqs[i].latent = &s->cache;
        else seqs[i].index = &s->cache;
        seqs[i].n_q = (int32_t)per;
    }
    return seqs;
}

#endif

/* Caches: layout calculators, every format byte by byte, pages, tables, slots, append's all-or-nothing. */
#if !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE                  /* mmap's MAP_ANONYMOUS and MAP_NORESERVE, for the offsets beyond 4 GiB */
#endif
#include "fixture.h"
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

enum { R = 200, RR = 6, W = R + RR, D = 32 };        /* two FP8 tiles, the second short; an index key of its own width */

static dsa_ctx context(void)
{
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.dim_latent = R;
    c.dim_rope = RR;
    c.dim_index = D;
    c.index_rope_width = 4;
    if (dsa_init(&ctx, &c) != DSA_OK) { fprintf(stderr, "test set-up: dsa_init refused\n"); abort(); }
    return ctx;
}

/* ---- calculators ------------------------------------------------------------------------------ */
static size_t row_bytes(dsa_kind kind, dsa_type format, int32_t dim, int32_t rope)
{
    size_t n = 0;
    return dsa_row_bytes(kind, format, dim, rope, &n) == DSA_OK ? n : 0;
}
static size_t page_bytes(dsa_kind kind, dsa_type format, int32_t dim, int32_t rope, int32_t page)
{
    size_t n = 0;
    return dsa_page_bytes(kind, format, dim, rope, page, &n) == DSA_OK ? n : 0;
}

TEST latent_rows_have_the_published_sizes(void)
{
    ASSERT_EQ_FMT((size_t)656, row_bytes(DSA_LATENT, DSA_FP8, 512, 64), "%zu");
    ASSERT_EQ_FMT((size_t)164, row_bytes(DSA_LATENT, DSA_FP8, 128, 16), "%zu");
    ASSERT_EQ_FMT((size_t)264, row_bytes(DSA_LATENT, DSA_FP8, 192, 32), "%zu");
    ASSERT_EQ_FMT((size_t)1152, row_bytes(DSA_LATENT, DSA_BF16, 512, 64), "%zu");
    ASSERT_EQ_FMT((size_t)2304, row_bytes(DSA_LATENT, DSA_F32, 512, 64), "%zu");
    ASSERT_EQ_FMT((size_t)(7 + 4 + 2), row_bytes(DSA_LATENT, DSA_FP8, 7, 1), "%zu");
    PASS();
}

TEST latent_rows_without_rope(void)
{
    ASSERT_EQ_FMT((size_t)528, row_bytes(DSA_LATENT, DSA_FP8, 512, DSA_NONE), "%zu");
    ASSERT_EQ_FMT((size_t)528, row_bytes(DSA_LATENT, DSA_FP8, 512, 0), "%zu");
    ASSERT_EQ_FMT((size_t)1024, row_bytes(DSA_LATENT, DSA_BF16, 512, DSA_NONE), "%zu");
    ASSERT_EQ_FMT((size_t)2048, row_bytes(DSA_LATENT, DSA_F32, 512, DSA_NONE), "%zu");
    PASS();
}

TEST index_rows_have_the_published_sizes(void)
{
    ASSERT_EQ_FMT((size_t)132, row_bytes(DSA_INDEX_KEY, DSA_FP8, 128, 0), "%zu");
    ASSERT_EQ_FMT((size_t)132, row_bytes(DSA_INDEX_KEY, DSA_INT8, 128, 0), "%zu");
    ASSERT_EQ_FMT((size_t)256, row_bytes(DSA_INDEX_KEY, DSA_BF16, 128, 0), "%zu");
    ASSERT_EQ_FMT((size_t)512, row_bytes(DSA_INDEX_KEY, DSA_F32, 128, 0), "%zu");
    PASS();
}

TEST pages_have_the_published_sizes(void)
{
    ASSERT_EQ_FMT((size_t)8448, page_bytes(DSA_INDEX_KEY, DSA_FP8, 128, 0, 64), "%zu");
    ASSERT_EQ_FMT((size_t)8448, page_bytes(DSA_INDEX_KEY, DSA_INT8, 128, 0, 64), "%zu");
    ASSERT_EQ_FMT((size_t)28, page_bytes(DSA_INDEX_KEY, DSA_FP8, 5, 0, 3), "%zu");   /* 27, and a stride is a multiple of 4 */
    ASSERT_EQ_FMT((size_t)41984, page_bytes(DSA_LATENT, DSA_FP8, 512, 64, 64), "%zu");
    ASSERT_EQ_FMT((size_t)16384, page_bytes(DSA_INDEX_KEY, DSA_BF16, 128, 0, 64), "%zu");
    PASS();
}

TEST calculators_refuse(void)
{
    size_t n = 77;
    IS(DSA_ERR_NULL, dsa_row_bytes(DSA_LATENT, DSA_F32, 8, 0, NULL));
    IS(DSA_ERR_SHAPE, dsa_row_bytes(DSA_LATENT, DSA_F32, 0, 0, &n));
    IS(DSA_ERR_SHAPE, dsa_row_bytes(DSA_LATENT, DSA_F32, -5, 0, &n));
    IS(DSA_ERR_SHAPE, dsa_row_bytes(DSA_LATENT, DSA_F32, 8, -2, &n));
    IS(DSA_ERR_FORMAT, dsa_row_bytes(DSA_LATENT, DSA_INT8, 8, 0, &n));
    IS(DSA_ERR_FORMAT, dsa_row_bytes(DSA_LATENT, DSA_F16, 8, 0, &n));
    IS(DSA_ERR_FORMAT, dsa_row_bytes(DSA_INDEX_KEY, DSA_F16, 8, 0, &n));
    ASSERT(dsa_row_bytes((dsa_kind)7, DSA_F32, 8, 0, &n) != DSA_OK);
    ASSERT(dsa_row_bytes(DSA_LATENT, (dsa_type)42, 8, 0, &n) != DSA_OK);
    IS(DSA_ERR_NULL, dsa_page_bytes(DSA_LATENT, DSA_F32, 8, 0, 4, NULL));
    IS(DSA_ERR_SHAPE, dsa_page_bytes(DSA_LATENT, DSA_F32, 8, 0, 0, &n));
    IS(DSA_ERR_SHAPE, dsa_page_bytes(DSA_LATENT, DSA_F32, 8, 0, -1, &n));
    IS(DSA_ERR_FORMAT, dsa_page_bytes(DSA_LATENT, DSA_INT8, 8, 0, 4, &n));
    ASSERT_EQ_FMT((size_t)77, n, "%zu");
    PASS();
}

TEST huge_sizes_are_exact(void)
{
    dsa_ctx ctx = context();
    size_t n = 0;
    if (sizeof(size_t) < 8) SKIPm("32-bit size_t");
    OK(dsa_page_bytes(DSA_LATENT, DSA_FP8, 512, 64, INT32_MAX, &n));
    ASSERT_EQ_FMT((unsigned long long)656 * INT32_MAX, (unsigned long long)n, "%llu");
    OK(dsa_page_bytes(DSA_INDEX_KEY, DSA_FP8, 128, 0, INT32_MAX, &n));
    ASSERT_EQ_FMT((unsigned long long)132 * INT32_MAX, (unsigned long long)n, "%llu");
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, INT32_MAX, 0);
    d.dim = 512;
    d.dim_rope = 64;
    OK(dsa_cache_bytes(&ctx, &d, &n));
    ASSERT(n >= (size_t)2304 * INT32_MAX);
    ASSERT(n < (size_t)2304 * INT32_MAX + 4096);
    d.page_size = 64;                                /* the last page is whole */
    OK(dsa_cache_bytes(&ctx, &d, &n));
    ASSERT(n >= (size_t)2304 * ((size_t)INT32_MAX + 1));
    ASSERT(n < (size_t)2304 * ((size_t)INT32_MAX + 1) + 4096);
    PASS();
}

TEST sizes_that_overflow_are_refused(void)
{
    dsa_ctx ctx = context();
    size_t n = 5;
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, INT32_MAX, 0);
    dsa_cache c;
    IS(DSA_ERR_SHAPE, dsa_row_bytes(DSA_LATENT, DSA_F32, INT32_MAX, INT32_MAX, &n));   /* wider than any row may be */
    IS(DSA_ERR_SHAPE, dsa_page_bytes(DSA_LATENT, DSA_F32, INT32_MAX, 0, INT32_MAX, &n));
    d.dim = INT32_MAX;
    IS(DSA_ERR_SHAPE, dsa_cache_bytes(&ctx, &d, &n));
    d = desc_of(DSA_LATENT, DSA_F32, 0, 1 << 30);
    float row[W];
    IS(DSA_ERR_OVERFLOW, dsa_cache_view(&ctx, &d, row, INT32_MAX, SIZE_MAX / 1024, NULL, INT32_MAX, 0, &c));
    IS(DSA_ERR_OVERFLOW, dsa_cache_view(&ctx, &d, row, (int64_t)INT32_MAX + 1, 0, NULL, 0, 0, &c));
    d.dim = 8;
    d.dim_rope = 4;
    d.capacity = (int64_t)INT32_MAX + 1;
    ASSERT(dsa_cache_bytes(&ctx, &d, &n) != DSA_OK);  /* rows beyond int32 positions */
    d.capacity = 0;
    ASSERT(dsa_cache_bytes(&ctx, &d, &n) != DSA_OK);
    ASSERT_EQ_FMT((size_t)5, n, "%zu");
    PASS();
}

/* ---- making caches ---------------------------------------------------------------------------- */
TEST init_wants_exactly_the_queried_bytes(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    const dsa_type formats[4] = { DSA_F32, DSA_BF16, DSA_FP8, DSA_INT8 };
    for (int kind = 0; kind < 2; kind++)
        for (int f = 0; f < 3 + kind; f++)
            for (int32_t page = 0; page <= 7; page += 7) {
                dsa_cache_desc d = desc_of((dsa_kind)kind, formats[f], 20, page);
                dsa_cache c, untouched;
                size_t bytes = 0;
                memset(&c, 0x5A, sizeof c);
                untouched = c;
                OK(dsa_cache_bytes(&ctx, &d, &bytes));
                void *memory = bag_alloc(&b, bytes);
                IS(DSA_ERR_CAPACITY, dsa_cache_init(&ctx, &d, memory, bytes - 1, &c));
                ASSERT_MEM_EQ(&untouched, &c, sizeof c);
                OK(dsa_cache_init(&ctx, &d, memory, bytes, &c));
                /* every row can be written and read without leaving the block (a sanitizer sees it if not) */
                float *rows = random_floats(&b, 20 * W, 3, 1);
                OK(append(&ctx, kind == 0 ? &c : NULL, kind == 0 ? NULL : &c, 20, kind == 0 ? rows : NULL, kind == 0 ? NULL : rows));
                ASSERT_EQ_FMT((long long)20, (long long)c.len, "%lld");
                OK(dsa_cache_read(&ctx, &c, 0, 20, floats(&b, 20 * W)));
            }
    END(b);
}

TEST init_resolves_every_field(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_BF16, 21, 8);
    dsa_cache c = cache_of(&b, &ctx, &d);
    ASSERT_EQ(DSA_LATENT, c.kind);
    ASSERT_EQ(DSA_BF16, c.format);
    ASSERT_EQ_FMT(R, c.dim, "%d");
    ASSERT_EQ_FMT(RR, c.dim_rope, "%d");
    ASSERT_EQ_FMT(8, c.page_size, "%d");
    ASSERT_EQ_FMT(0LL, (long long)c.len, "%lld");
    ASSERT_EQ_FMT(0, c.hadamard, "%d");
    ASSERT(dsa_cache_capacity(&c) >= 21);
    ASSERT_EQ(DSA_DEVICE_CPU, c.device);
    ASSERT(c.owned == NULL);
    OK(dsa_cache_check(&ctx, &c));
    dsa_cache_destroy(&c);                            /* owns nothing: nothing is freed twice by END */
    d.page_size = 0;
    d.dim_rope = DSA_NONE;
    d.dim = 12;
    c = cache_of(&b, &ctx, &d);
    ASSERT_EQ_FMT(0, c.dim_rope, "%d");
    ASSERT_EQ_FMT(12, c.dim, "%d");
    ASSERT_EQ_FMT(21LL, (long long)dsa_cache_capacity(&c), "%lld");
    d = desc_of(DSA_INDEX_KEY, DSA_FP8, 21, 8);
    c = cache_of(&b, &ctx, &d);
    ASSERT_EQ_FMT(D, c.dim, "%d");
    ASSERT_EQ_FMT(0, c.dim_rope, "%d");
    END(b);
}

typedef struct counter { int allocs, releases; size_t bytes; int fail; } counter;
static void *count_alloc(void *user, size_t bytes)
{
    counter *c = (counter *)user;
    if (c->fail) return NULL;
    c->allocs++;
    c->bytes += bytes;
    return malloc(bytes);
}
static void count_release(void *user, void *memory)
{
    counter *c = (counter *)user;
    if (memory != NULL) c->releases++;
    free(memory);
}

TEST create_uses_the_allocator_of_the_config(void)
{
    counter n = { 0, 0, 0, 0 };
    dsa_ctx ctx = context();
    ctx.config.allocator.alloc = count_alloc;
    ctx.config.allocator.release = count_release;
    ctx.config.allocator.user = &n;
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_FP8, 100, 16);
    dsa_cache c;
    size_t bytes = 0;
    OK(dsa_cache_bytes(&ctx, &d, &bytes));
    OK(dsa_cache_create(&ctx, &d, &c));
    ASSERT_EQ_FMT(1, n.allocs, "%d");
    ASSERT(n.bytes >= bytes);
    float *row = (float *)calloc(W, sizeof(float));
    OK(append(&ctx, &c, NULL, 1, row, NULL));
    ASSERT_EQ_FMT(1, n.allocs, "%d");
    dsa_cache_destroy(&c);
    ASSERT_EQ_FMT(1, n.releases, "%d");
    free(row);
    PASS();
}

TEST create_reports_a_failed_allocation(void)
{
    counter n = { 0, 0, 0, 1 };
    dsa_ctx ctx = context();
    ctx.config.allocator.alloc = count_alloc;
    ctx.config.allocator.release = count_release;
    ctx.config.allocator.user = &n;
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, DSA_F32, 100, 0);
    dsa_cache c, before;
    memset(&c, 0x3C, sizeof c);
    before = c;
    IS(DSA_ERR_MEMORY, dsa_cache_create(&ctx, &d, &c));
    ASSERT_MEM_EQ(&before, &c, sizeof c);
    ASSERT_EQ_FMT(0, n.allocs + n.releases, "%d");
    PASS();
}

TEST destroy_takes_null_and_zeroed(void)
{
    dsa_ctx ctx = context();
    dsa_cache c;
    memset(&c, 0, sizeof c);
    dsa_cache_destroy(NULL);
    dsa_cache_destroy(&c);
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, 4, 0);
    OK(dsa_cache_create(&ctx, &d, &c));               /* malloc's own */
    ASSERT(c.owned != NULL);
    dsa_cache_destroy(&c);
    ASSERT(c.owned == NULL);                          /* so that a second destroy is harmless */
    dsa_cache_destroy(&c);
    PASS();
}

TEST devices(void)
{
    dsa_ctx ctx = context();
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, 4, 0);
    dsa_cache c, before;
    memset(&c, 0x11, sizeof c);
    before = c;
    d.device = DSA_DEVICE_CUDA;
    IS(DSA_ERR_NO_DEVICE, dsa_cache_create(&ctx, &d, &c));
    ASSERT_MEM_EQ(&before, &c, sizeof c);
    d.device = DSA_DEVICE_AUTO;
    OK(dsa_cache_create(&ctx, &d, &c));
    ASSERT_EQ(DSA_DEVICE_CPU, c.device);
    dsa_cache_destroy(&c);
    PASS();
}

/* ---- formats: what is written, and what comes back --------------------------------------------- */
/* Rows that try a quantiser: zeros, tiny, huge, one outlier, ties of the bf16 grid. */
static float *hard_rows(bag *b, int32_t n, int32_t width)
{
    float *x = random_floats(b, (int64_t)n * width, 77, 1);
    for (int32_t i = 0; i < n; i++) {
        float *row = x + (int64_t)i * width;
        float size = ldexpf(1.25f, i % 24 - 12);
        for (int32_t j = 0; j < width; j++) row[j] *= size;
        if (i % 7 == 1) memset(row, 0, (size_t)width * sizeof *row);
        if (i % 7 == 2) for (int32_t j = 0; j < width; j++) row[j] = 1.0f + (float)(2 * (j % 4) + 1) / 256.0f;
        if (i % 7 == 3) row[width / 2] = 3000.0f;
        if (i % 7 == 4) for (int32_t j = 0; j < width; j++) row[j] *= 1e-7f;
        if (i % 7 == 5) row[0] = -row[0];
    }
    return x;
}

TEST f32_rows_come_back_exactly(int32_t page)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, 30, page), di = desc_of(DSA_INDEX_KEY, DSA_F32, 30, page);
    dsa_cache latent = cache_of(&b, &ctx, &d), index = cache_of(&b, &ctx, &di);
    float *rows = hard_rows(&b, 30, W), *keys = hard_rows(&b, 30, D), *back = floats(&b, 30 * W);
    OK(append(&ctx, &latent, &index, 11, rows, keys));
    OK(append(&ctx, &latent, &index, 19, rows + 11 * W, keys + 11 * D));
    OK(dsa_cache_read(&ctx, &latent, 0, 30, back));
    ASSERT(same_bits(rows, back, 30 * W));
    OK(dsa_cache_read(&ctx, &latent, 9, 17, back));
    ASSERT(same_bits(rows + 9 * W, back, 8 * W));
    OK(dsa_cache_read(&ctx, &index, 0, 30, back));
    ASSERT(same_bits(keys, back, 30 * D));
    OK(dsa_cache_read(&ctx, &index, 30, 30, back));   /* an empty range is no error */
    END(b);
}

TEST bf16_rows_are_rounded_to_nearest_even(int32_t page)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_BF16, 30, page), di = desc_of(DSA_INDEX_KEY, DSA_BF16, 30, page);
    dsa_cache latent = cache_of(&b, &ctx, &d), index = cache_of(&b, &ctx, &di);
    float *rows = hard_rows(&b, 30, W), *keys = hard_rows(&b, 30, D), *back = floats(&b, 30 * W);
    OK(append(&ctx, &latent, &index, 30, rows, keys));
    OK(dsa_cache_read(&ctx, &latent, 0, 30, back));
    for (int i = 0; i < 30 * W; i++) ASSERT_EQ_FMT((double)ref_bf16(rows[i]), (double)back[i], "%.9g");
    OK(dsa_cache_read(&ctx, &index, 0, 30, back));
    for (int i = 0; i < 30 * D; i++) ASSERT_EQ_FMT((double)ref_bf16(keys[i]), (double)back[i], "%.9g");
    END(b);
}

TEST fp8_latent_bytes_are_flashmlas(int32_t page)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_FP8, 30, page);
    dsa_cache c = cache_of(&b, &ctx, &d);
    enum { ROW = R + 8 + 2 * RR };
    float *rows = hard_rows(&b, 30, W), *back = floats(&b, 30 * W);
    OK(append(&ctx, &c, NULL, 30, rows, NULL));
    OK(dsa_cache_read(&ctx, &c, 0, 30, back));
    for (int i = 0; i < 30; i++) {
        uint8_t want[ROW];
        int32_t ps = page ? page : 30;
        const uint8_t *got = (const uint8_t *)c.data + (size_t)(i / ps) * c.page_stride + (size_t)(i % ps) * c.row_stride;
        ASSERT_EQ_FMT((size_t)ROW, c.row_stride, "%zu");
        ref_fp8_latent(rows + i * W, R, RR, want);
        ASSERT_MEM_EQ(want, got, ROW);
        for (int j = 0; j < W; j++) {
            float s = 0;
            if (j < R) memcpy(&s, want + R + 4 * (j / 128), 4);
            double v = j < R ? ref_from_e4m3(want[j]) * (double)s : (double)ref_bf16(rows[i * W + j]);
            ASSERT_EQ_FMT(v, (double)back[i * W + j], "%.9g");
        }
    }
    END(b);
}

TEST fp8_latents_with_any_scale_are_read(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_FP8, 1, 0);
    dsa_cache c = cache_of(&b, &ctx, &d);
    uint8_t *row = (uint8_t *)c.data;
    float scale[2] = { 0.37f, 1234.5f }, back[W];
    for (int i = 0; i < R; i++) row[i] = (uint8_t)(i == 127 || i == 128 ? 1 : i & 0x7E);
    memcpy(row + R, scale, 8);
    memset(row + R + 8, 0, 2 * RR);
    c.len = 1;
    OK(dsa_cache_read(&ctx, &c, 0, 1, back));
    for (int i = 0; i < R; i++) {
        float want = (float)ref_from_e4m3(row[i]) * scale[i / 128];      /* assigned: x87 would keep more bits */
        ASSERT_EQ_FMT((double)want, (double)back[i], "%.9g");
    }
    END(b);
}

/* DeepGEMM's planar page: all codes first, then all scales. */
TEST planar_page_bytes(dsa_type format)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    enum { PAGE = 5, N = 12, STRIDE = PAGE * (D + 4) };
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, format, N, PAGE);
    d.hadamard = DSA_HADAMARD_OFF;
    dsa_cache c = cache_of(&b, &ctx, &d);
    float *keys = hard_rows(&b, N, D), *back = floats(&b, N * D);
    ASSERT_EQ_FMT((size_t)STRIDE, c.page_stride, "%zu");
    OK(append(&ctx, NULL, &c, N, NULL, keys));
    OK(dsa_cache_read(&ctx, &c, 0, N, back));
    for (int i = 0; i < N; i++) {
        const uint8_t *pg = (const uint8_t *)c.data + (size_t)(i / PAGE) * STRIDE;
        uint8_t codes[D];
        float s = ref_index_key(keys + i * D, D, format, codes), got;
        ASSERT_MEM_EQ(codes, pg + (i % PAGE) * D, D);
        memcpy(&got, pg + PAGE * D + 4 * (i % PAGE), 4);
        ASSERT_EQ_FMT((double)s, (double)got, "%.9g");
        for (int j = 0; j < D; j++) {
            int8_t i8;
            memcpy(&i8, &codes[j], 1);
            float v = format == DSA_FP8 ? (float)ref_from_e4m3(codes[j]) * s : (float)i8 * s;
            ASSERT_EQ_FMT((double)v, (double)back[i * D + j], "%.9g");
        }
    }
    END(b);
}

TEST hadamard_is_automatic_per_format(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    const dsa_type formats[4] = { DSA_F32, DSA_BF16, DSA_FP8, DSA_INT8 };
    const int automatic[4] = { 0, 0, 1, 1 };
    for (int i = 0; i < 4; i++) {
        dsa_cache_desc d = desc_of(DSA_INDEX_KEY, formats[i], 4, 0);
        dsa_cache c = cache_of(&b, &ctx, &d);
        ASSERT_EQ_FMT(automatic[i], c.hadamard, "%d");
        d.hadamard = DSA_HADAMARD_ON;
        c = cache_of(&b, &ctx, &d);
        ASSERT_EQ_FMT(1, c.hadamard, "%d");
        d.hadamard = DSA_HADAMARD_OFF;
        c = cache_of(&b, &ctx, &d);
        ASSERT_EQ_FMT(0, c.hadamard, "%d");
    }
    END(b);
}

TEST hadamard_needs_a_power_of_two(void)
{
    dsa_ctx ctx = context();
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, DSA_F32, 4, 0);
    size_t n;
    d.dim = 24;
    OK(dsa_cache_bytes(&ctx, &d, &n));
    d.hadamard = DSA_HADAMARD_ON;
    IS(DSA_ERR_SHAPE, dsa_cache_bytes(&ctx, &d, &n));
    d.hadamard = DSA_HADAMARD_AUTO;
    d.format = DSA_FP8;                               /* auto is on here */
    IS(DSA_ERR_SHAPE, dsa_cache_bytes(&ctx, &d, &n));
    d.hadamard = DSA_HADAMARD_OFF;
    OK(dsa_cache_bytes(&ctx, &d, &n));
    PASS();
}

TEST rotated_keys_are_stored_rotated(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = desc_of(DSA_INDEX_KEY, DSA_F32, 9, 4);
    d.hadamard = DSA_HADAMARD_ON;
    dsa_cache c = cache_of(&b, &ctx, &d);
    float *keys = random_floats(&b, 9 * D, 5, 3), *back = floats(&b, 9 * D);
    OK(append(&ctx, NULL, &c, 9, NULL, keys));
    OK(dsa_cache_read(&ctx, &c, 0, 9, back));
    for (int i = 0; i < 9; i++)
        for (int j = 0; j < D; j++) {                 /* Sylvester: H[j][l] = (-1)^popcount(j & l) */
            double v = 0;
            for (int l = 0; l < D; l++) {
                int bits = 0;
                for (int m = j & l; m; m >>= 1) bits ^= m & 1;
                v += (bits ? -1.0 : 1.0) * (double)keys[i * D + l];
            }
            ASSERT_IN_RANGE(v / sqrt((double)D), back[i * D + j], 2e-6);
        }
    OK(dsa_hadamard_rows(back, 9, D, D));
    WITHIN(2e-6, max_error_f(back, keys, 9 * D));
    /* and the quantised formats code the rotated row */
    d.format = DSA_FP8;
    dsa_cache q = cache_of(&b, &ctx, &d);
    OK(append(&ctx, NULL, &q, 9, NULL, keys));
    float *rotated = floats(&b, 9 * D);
    OK(dsa_cache_read(&ctx, &c, 0, 9, rotated));
    OK(dsa_cache_read(&ctx, &q, 0, 9, back));
    for (int i = 0; i < 9; i++) {
        uint8_t codes[D];
        float s = ref_index_key(rotated + i * D, D, DSA_FP8, codes);
        for (int j = 0; j < D; j++) ASSERT_EQ_FMT(ref_from_e4m3(codes[j]) * (double)s, (double)back[i * D + j], "%.9g");
    }
    END(b);
}

/* ---- views -------------------------------------------------------------------------------------- */
static dsa_cache view_of(bag *b, const dsa_ctx *ctx, const dsa_cache_desc *d, int32_t pool, size_t slack, const int32_t *table, int64_t n_blocks)
{
    dsa_cache c;
    size_t page = 0;
    if (dsa_page_bytes(d->kind, d->format, d->dim, d->dim_rope, d->page_size, &page) != DSA_OK) abort();
    unsigned char *memory = (unsigned char *)bag_alloc(b, (page + slack) * (size_t)pool);
    memset(memory, 0xEE, (page + slack) * (size_t)pool);
    dsa_status st = dsa_cache_view(ctx, d, memory, pool, page + slack, table, n_blocks, 0, &c);
    if (st != DSA_OK) { fprintf(stderr, "test set-up: dsa_cache_view: %s\n", dsa_status_text(st)); abort(); }
    return c;
}
static dsa_cache_desc full_desc(dsa_kind kind, dsa_type format, int32_t page)
{
    dsa_cache_desc d = desc_of(kind, format, 0, page);
    d.dim = kind == DSA_LATENT ? R : D;
    d.dim_rope = kind == DSA_LATENT ? RR : DSA_NONE;
    return d;
}

TEST a_shuffled_block_table_equals_contiguous(dsa_kind kind, dsa_type format)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    enum { N = 43, PAGE = 4, POOL = 17 };
    int32_t width = kind == DSA_LATENT ? W : D;
    dsa_cache_desc plain = desc_of(kind, format, N, 0), paged = full_desc(kind, format, PAGE);
    dsa_cache a = cache_of(&b, &ctx, &plain), p = view_of(&b, &ctx, &paged, POOL, 12, page_table(&b, 11, POOL, 4), 11);
    float *rows = hard_rows(&b, N, width), *x = floats(&b, N * width), *y = floats(&b, N * width);
    ASSERT_EQ_FMT(44LL, (long long)dsa_cache_capacity(&p), "%lld");
    for (int32_t done = 0, n = 1; done < N; done += n, n = n % 5 + 1) {
        if (n > N - done) n = N - done;
        const float *from = rows + (int64_t)done * width;
        if (kind == DSA_LATENT) { OK(append(&ctx, &a, NULL, n, from, NULL)); OK(append(&ctx, &p, NULL, n, from, NULL)); }
        else { OK(append(&ctx, NULL, &a, n, NULL, from)); OK(append(&ctx, NULL, &p, n, NULL, from)); }
    }
    OK(dsa_cache_read(&ctx, &a, 0, N, x));
    OK(dsa_cache_read(&ctx, &p, 0, N, y));
    ASSERT(same_bits(x, y, (int64_t)N * width));
    END(b);
}

TEST a_wide_page_stride_leaves_the_gap_alone(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    enum { PAGE = 3, POOL = 4, GAP = 20 };
    dsa_cache_desc d[2] = { full_desc(DSA_LATENT, DSA_FP8, PAGE), full_desc(DSA_INDEX_KEY, DSA_FP8, PAGE) };
    for (int k = 0; k < 2; k++) {
        dsa_cache c = view_of(&b, &ctx, &d[k], POOL, GAP, NULL, POOL);
        float *rows = random_floats(&b, 12 * W, 6, 1);
        OK(append(&ctx, k ? NULL : &c, k ? &c : NULL, 12, k ? NULL : rows, k ? rows : NULL));
        for (int p = 0; p < POOL; p++)
            for (int i = 1; i <= GAP; i++)
                ASSERT_EQ_FMT(0xEE, (int)((unsigned char *)c.data)[(size_t)(p + 1) * c.page_stride - (size_t)i], "%02x");
    }
    END(b);
}

TEST scales_may_live_elsewhere(dsa_type format)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    enum { N = 10, PAGE = 4 };
    dsa_cache_desc d = full_desc(DSA_INDEX_KEY, format, PAGE);
    const int32_t table[3] = { 2, 0, 1 };
    dsa_cache planar = view_of(&b, &ctx, &d, 3, 0, table, 3), split = planar;
    split.data = bag_alloc(&b, 3 * PAGE * D);
    split.page_stride = PAGE * D;
    split.scales = bag_alloc(&b, 3 * 24);
    split.scale_page_stride = 24;                     /* 16 used */
    memset(split.scales, 0xAB, 3 * 24);
    OK(dsa_cache_check(&ctx, &split));
    float *keys = hard_rows(&b, N, D), *x = floats(&b, N * D), *y = floats(&b, N * D);
    OK(append(&ctx, NULL, &planar, N, NULL, keys));
    OK(append(&ctx, NULL, &split, N, NULL, keys));
    OK(dsa_cache_read(&ctx, &planar, 0, N, x));
    OK(dsa_cache_read(&ctx, &split, 0, N, y));
    ASSERT(same_bits(x, y, N * D));
    for (int p = 0; p < 3; p++)                       /* data and scales of every page, where they belong */
        ASSERT_MEM_EQ((uint8_t *)planar.data + (size_t)p * planar.page_stride + PAGE * D,
                      (uint8_t *)split.scales + p * 24, (size_t)(p == 1 ? 8 : 16));     /* page 1 holds rows 8, 9 only */
    ASSERT_EQ_FMT(0xAB, (int)((uint8_t *)split.scales)[16], "%02x");
    END(b);
}

/* row_stride has no part in a planar page's layout, so a view filled by hand need not set it. */
TEST a_planar_view_filled_by_hand_ignores_row_stride(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = full_desc(DSA_INDEX_KEY, DSA_FP8, 4);
    dsa_cache c = view_of(&b, &ctx, &d, 2, 0, NULL, 2), hand = view_of(&b, &ctx, &d, 2, 0, NULL, 2);
    float *keys = random_floats(&b, 8 * D, 19, 1);
    hand.row_stride = 0;
    OK(dsa_cache_check(&ctx, &hand));
    OK(append(&ctx, NULL, &c, 8, NULL, keys));
    OK(append(&ctx, NULL, &hand, 8, NULL, keys));
    ASSERT_MEM_EQ(c.data, hand.data, 2 * c.page_stride);
    END(b);
}

TEST unaligned_memory_works(dsa_kind kind, dsa_type format)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    enum { N = 9 };
    int32_t width = kind == DSA_LATENT ? W : D;
    dsa_cache_desc d = desc_of(kind, format, N, 4);
    dsa_cache a = cache_of(&b, &ctx, &d), c;
    size_t bytes = 0;
    OK(dsa_cache_bytes(&ctx, &d, &bytes));
    OK(dsa_cache_init(&ctx, &d, (unsigned char *)bag_alloc(&b, bytes + 1) + 1, bytes, &c));
    float *rows = hard_rows(&b, N, width), *x = floats(&b, N * width), *y = floats(&b, N * width);
    OK(append(&ctx, kind ? NULL : &a, kind ? &a : NULL, N, kind ? NULL : rows, kind ? rows : NULL));
    OK(append(&ctx, kind ? NULL : &c, kind ? &c : NULL, N, kind ? NULL : rows, kind ? rows : NULL));
    OK(dsa_cache_read(&ctx, &a, 0, N, x));
    OK(dsa_cache_read(&ctx, &c, 0, N, y));
    ASSERT(same_bits(x, y, (int64_t)N * width));
    END(b);
}

/* Nobody has 6 GiB of test data, but two pages 3 GiB apart in reserved address space do as well. */
TEST rows_beyond_four_gigabytes(void)
{
#if (defined(__unix__) || defined(__APPLE__)) && defined(MAP_ANONYMOUS) && defined(MAP_NORESERVE)
    dsa_ctx ctx = context();
    const size_t stride = (size_t)3 << 30;
    if (sizeof(size_t) < 8) SKIPm("32-bit addresses");
    void *memory = mmap(NULL, 3 * stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) SKIPm("9 GiB of addresses are not to be had here");
    dsa_cache_desc d = full_desc(DSA_LATENT, DSA_F32, 2);
    dsa_cache c;
    float rows[5 * W], back[5 * W], direct[W];
    for (int i = 0; i < 5 * W; i++) rows[i] = (float)i;
    OK(dsa_cache_view(&ctx, &d, memory, 3, stride, NULL, 3, 0, &c));
    OK(append(&ctx, &c, NULL, 5, rows, NULL));
    OK(dsa_cache_read(&ctx, &c, 0, 5, back));
    ASSERT(same_bits(rows, back, 5 * W));
    memcpy(direct, (char *)memory + 2 * stride, sizeof direct);   /* row 4 opens page 2 */
    ASSERT(same_bits(rows + 4 * W, direct, W));
    munmap(memory, 3 * stride);
    PASS();
#else
    SKIPm("no mmap");
#endif
}

TEST a_view_may_start_with_rows(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = full_desc(DSA_LATENT, DSA_F32, 4);
    float *pool = random_floats(&b, 8 * W, 9, 1), *back = floats(&b, 8 * W);
    float *copy = floats(&b, 8 * W);
    memcpy(copy, pool, 8 * W * 4);
    dsa_cache c;
    OK(dsa_cache_view(&ctx, &d, pool, 2, 0, NULL, 2, 7, &c));
    ASSERT_EQ_FMT(7LL, (long long)c.len, "%lld");
    OK(dsa_cache_read(&ctx, &c, 0, 7, back));
    ASSERT(same_bits(pool, back, 7 * W));
    OK(append(&ctx, &c, NULL, 1, copy, NULL));
    ASSERT(same_bits(copy, pool + 7 * W, W));
    ASSERT(same_bits(copy, pool, 7 * W));             /* row 0..6 stay */
    IS(DSA_ERR_TABLE, dsa_cache_view(&ctx, &d, pool, 2, 0, NULL, 2, 9, &c));
    END(b);
}

/* ---- append, truncate ---------------------------------------------------------------------------- */
TEST truncate_then_append_overwrites(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, 10, 3);
    dsa_cache c = cache_of(&b, &ctx, &d);
    float *rows = random_floats(&b, 20 * W, 8, 1), *back = floats(&b, 10 * W);
    OK(append(&ctx, &c, NULL, 8, rows, NULL));
    IS(DSA_ERR_ARGUMENT, dsa_cache_truncate(&ctx, &c, 9));
    IS(DSA_ERR_ARGUMENT, dsa_cache_truncate(&ctx, &c, -1));
    OK(dsa_cache_truncate(&ctx, &c, 5));
    ASSERT_EQ_FMT(5LL, (long long)c.len, "%lld");
    OK(append(&ctx, &c, NULL, 2, rows + 10 * W, NULL));
    ASSERT_EQ_FMT(7LL, (long long)c.len, "%lld");
    OK(dsa_cache_read(&ctx, &c, 0, 7, back));
    ASSERT(same_bits(rows, back, 5 * W));
    ASSERT(same_bits(rows + 10 * W, back + 5 * W, 2 * W));
    IS(DSA_ERR_ARGUMENT, dsa_cache_read(&ctx, &c, 0, 8, back));
    OK(dsa_cache_truncate(&ctx, &c, 0));
    ASSERT_EQ_FMT(0LL, (long long)c.len, "%lld");
    END(b);
}

TEST a_full_cache_refuses_and_stays(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_FP8, 6, 0);
    dsa_cache c = cache_of(&b, &ctx, &d);
    size_t bytes = 0;
    float *rows = random_floats(&b, 6 * W, 10, 1);
    OK(append(&ctx, &c, NULL, 5, rows, NULL));
    OK(dsa_cache_bytes(&ctx, &d, &bytes));
    void *before = bag_alloc(&b, bytes);
    memcpy(before, c.data, bytes);
    IS(DSA_ERR_CAPACITY, append(&ctx, &c, NULL, 2, rows, NULL));
    ASSERT_EQ_FMT(5LL, (long long)c.len, "%lld");
    ASSERT_MEM_EQ(before, c.data, bytes);
    OK(append(&ctx, &c, NULL, 1, rows, NULL));
    IS(DSA_ERR_CAPACITY, append(&ctx, &c, NULL, 1, rows, NULL));
    OK(append(&ctx, &c, NULL, 0, rows, NULL));        /* no rows always fit */
    ASSERT_EQ_FMT(6LL, (long long)c.len, "%lld");
    END(b);
}

TEST a_ragged_append_serves_every_sequence(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc dl = desc_of(DSA_LATENT, DSA_BF16, 9, 2), di = desc_of(DSA_INDEX_KEY, DSA_INT8, 9, 2);
    dsa_cache l[4], k[4], l1[4], k1[4];
    dsa_seq s[4];
    const int32_t n[4] = { 3, 1, 0, 5 };
    float *rows = random_floats(&b, 9 * W, 11, 1), *keys = random_floats(&b, 9 * D, 12, 1), *x = floats(&b, 9 * W), *y = floats(&b, 9 * W);
    dsa_append_args a;
    memset(&a, 0, sizeof a);
    for (int i = 0, at = 0; i < 4; at += n[i], i++) {
        l[i] = cache_of(&b, &ctx, &dl);
        k[i] = cache_of(&b, &ctx, &di);
        l1[i] = cache_of(&b, &ctx, &dl);
        k1[i] = cache_of(&b, &ctx, &di);
        s[i] = seq_of(&l[i], &k[i], n[i]);
        s[i].len = 7;                                 /* append ignores it */
        OK(append(&ctx, &l1[i], &k1[i], n[i], rows + at * W, keys + at * D));
    }
    a.n_seqs = 4;
    a.seqs = s;
    a.latent = rows;
    a.index_key = keys;
    OK(dsa_append(&ctx, &a));
    for (int i = 0; i < 4; i++) {
        ASSERT_EQ_FMT((long long)n[i], (long long)l[i].len, "%lld");
        ASSERT_EQ_FMT((long long)n[i], (long long)k[i].len, "%lld");
        OK(dsa_cache_read(&ctx, &l[i], 0, n[i], x));
        OK(dsa_cache_read(&ctx, &l1[i], 0, n[i], y));
        ASSERT(same_bits(x, y, n[i] * W));
        OK(dsa_cache_read(&ctx, &k[i], 0, n[i], x));
        OK(dsa_cache_read(&ctx, &k1[i], 0, n[i], y));
        ASSERT(same_bits(x, y, n[i] * D));
    }
    END(b);
}

/* The last sequence has no room in its index cache: nothing at all is written. */
TEST a_ragged_append_is_all_or_nothing(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc dl = desc_of(DSA_LATENT, DSA_F32, 6, 0), di = desc_of(DSA_INDEX_KEY, DSA_F32, 6, 0);
    dsa_cache l[3], k[3];
    dsa_seq s[3];
    float *rows = random_floats(&b, 9 * W, 13, 1), *keys = random_floats(&b, 9 * D, 14, 1);
    unsigned char *before[6];
    dsa_append_args a;
    memset(&a, 0, sizeof a);
    for (int i = 0; i < 3; i++) {
        dsa_cache_desc small = di;
        small.capacity = i == 2 ? 4 : 6;
        l[i] = cache_of(&b, &ctx, &dl);
        k[i] = cache_of(&b, &ctx, &small);
        OK(append(&ctx, &l[i], &k[i], 2, rows, keys));
        s[i] = seq_of(&l[i], &k[i], 3);
        before[2 * i] = (unsigned char *)bag_alloc(&b, 6 * W * 4);
        before[2 * i + 1] = (unsigned char *)bag_alloc(&b, (size_t)small.capacity * D * 4);
        memcpy(before[2 * i], l[i].data, 6 * W * 4);
        memcpy(before[2 * i + 1], k[i].data, (size_t)small.capacity * D * 4);
    }
    a.n_seqs = 3;
    a.seqs = s;
    a.latent = rows;
    a.index_key = keys;
    IS(DSA_ERR_CAPACITY, dsa_append(&ctx, &a));
    for (int i = 0; i < 3; i++) {
        ASSERT_EQ_FMT(2LL, (long long)l[i].len, "%lld");
        ASSERT_EQ_FMT(2LL, (long long)k[i].len, "%lld");
        ASSERT_MEM_EQ(before[2 * i], l[i].data, 6 * W * 4);
        ASSERT_MEM_EQ(before[2 * i + 1], k[i].data, (size_t)(i == 2 ? 4 : 6) * D * 4);
    }
    END(b);
}

/* A cache that would get rows twice is found wherever its two places are, and then no length has moved. Without rows to append, or
   with slots, a cache may be there as often as one likes. */
TEST a_cache_twice_in_a_batch_is_found(void)
{
    enum { N = 40 };
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc dl = desc_of(DSA_LATENT, DSA_F32, 6, 0), di = desc_of(DSA_INDEX_KEY, DSA_F32, 6, 0);
    dsa_cache l[N], k[N];
    dsa_seq s[N];
    float *rows = random_floats(&b, 2 * N * W, 15, 1), *keys = random_floats(&b, 2 * N * D, 16, 1);
    int64_t slots[N];
    uint64_t seed = 17;
    dsa_append_args a;
    memset(&a, 0, sizeof a);
    for (int i = 0; i < N; i++) {
        l[i] = cache_of(&b, &ctx, &dl);
        k[i] = cache_of(&b, &ctx, &di);
        OK(append(&ctx, &l[i], &k[i], i % 3, rows, keys));
        slots[i] = 0;
    }
    a.n_seqs = N;
    a.seqs = s;
    a.latent = rows;
    a.index_key = keys;
    for (int round = 0; round < 200; round++) {
        int32_t p = rnd_below(&seed, N), q = rnd_below(&seed, N - 1);
        q += q >= p;
        for (int i = 0; i < N; i++) s[i] = seq_of(&l[i], &k[i], i == p || i == q ? 1 : i % 2);
        if (round % 2) s[p].latent = s[q].latent; else s[p].index = s[q].index;
        IS(DSA_ERR_ARGUMENT, dsa_append(&ctx, &a));
        for (int i = 0; i < N; i++) {
            ASSERT_EQ_FMT((long long)(i % 3), (long long)l[i].len, "%lld");
            ASSERT_EQ_FMT((long long)(i % 3), (long long)k[i].len, "%lld");
        }
    }
    for (int i = 0; i < N; i++) s[i] = seq_of(&l[0], &k[0], i == 7);
    OK(dsa_append(&ctx, &a));
    ASSERT_EQ_FMT(1LL, (long long)l[0].len, "%lld");
    for (int i = 0; i < N; i++) s[i] = seq_of(&l[0], &k[0], 1);
    a.slots = slots;
    OK(dsa_append(&ctx, &a));
    ASSERT_EQ_FMT(1LL, (long long)l[0].len, "%lld");
    END(b);
}

TEST slots_write_anywhere_and_skip(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    enum { PAGE = 4, POOL = 3 };
    dsa_cache_desc d = full_desc(DSA_LATENT, DSA_F32, PAGE);
    const int32_t table[3] = { 1, 2, 0 };
    dsa_cache c = view_of(&b, &ctx, &d, POOL, 8, table, 3);
    float *rows = random_floats(&b, 4 * W, 15, 1), got[W];
    const int64_t slots[4] = { 11, 0, -1, 6 };
    dsa_seq s = seq_of(&c, NULL, 4);
    dsa_append_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 1;
    a.seqs = &s;
    a.latent = rows;
    a.slots = slots;
    OK(dsa_append(&ctx, &a));
    ASSERT_EQ_FMT(0LL, (long long)c.len, "%lld");     /* slots do not move the length */
    for (int64_t slot = 0; slot < PAGE * POOL; slot++) {
        unsigned char untouched[W * 4];
        const unsigned char *at = (unsigned char *)c.data + (size_t)(slot / PAGE) * c.page_stride + (size_t)(slot % PAGE) * c.row_stride;
        int row = slot == 11 ? 0 : slot == 0 ? 1 : slot == 6 ? 3 : -1;
        memset(untouched, 0xEE, sizeof untouched);
        ASSERT_MEM_EQ(row < 0 ? (const void *)untouched : (const void *)(rows + row * W), at, W * 4);
    }
    c.len = 3;                                        /* logical row 2 = page 1, offset 2 = slot 6 */
    OK(dsa_cache_read(&ctx, &c, 2, 3, got));
    ASSERT(same_bits(rows + 3 * W, got, W));
    END(b);
}

TEST a_slot_outside_the_pool_stops_everything(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc d = full_desc(DSA_LATENT, DSA_F32, 4);
    dsa_cache c = view_of(&b, &ctx, &d, 2, 0, NULL, 2);
    float *rows = random_floats(&b, 2 * W, 16, 1);
    unsigned char *before = (unsigned char *)bag_alloc(&b, 8 * W * 4);
    memcpy(before, c.data, 8 * W * 4);
    const int64_t bad[4] = { 8, -2, INT64_MAX, INT64_MIN };
    for (int i = 0; i < 4; i++) {
        int64_t slots[2];
        slots[0] = 3;
        slots[1] = bad[i];
        dsa_seq s = seq_of(&c, NULL, 2);
        dsa_append_args a;
        memset(&a, 0, sizeof a);
        a.n_seqs = 1;
        a.seqs = &s;
        a.latent = rows;
        a.slots = slots;
        ASSERT(dsa_append(&ctx, &a) != DSA_OK);
        ASSERT_MEM_EQ(before, c.data, 8 * W * 4);
    }
    END(b);
}

TEST latent_and_keys_may_be_written_apart(void)
{
    bag b = { NULL, 0 };
    dsa_ctx ctx = context();
    dsa_cache_desc dl = desc_of(DSA_LATENT, DSA_F32, 4, 0), di = desc_of(DSA_INDEX_KEY, DSA_F32, 4, 0);
    dsa_cache l = cache_of(&b, &ctx, &dl), k = cache_of(&b, &ctx, &di);
    float *rows = random_floats(&b, 4 * W, 17, 1), *keys = random_floats(&b, 4 * D, 18, 1);
    OK(append(&ctx, &l, &k, 2, rows, NULL));          /* keys NULL: the index cache is left alone */
    ASSERT_EQ_FMT(2LL, (long long)l.len, "%lld");
    ASSERT_EQ_FMT(0LL, (long long)k.len, "%lld");
    OK(append(&ctx, &l, &k, 2, NULL, keys));
    ASSERT_EQ_FMT(2LL, (long long)l.len, "%lld");
    ASSERT_EQ_FMT(2LL, (long long)k.len, "%lld");
    END(b);
}

SUITE(cache_suite)
{
    static const char *const names[4] = { "f32", "bf16", "fp8", "int8" };
    static const dsa_type formats[4] = { DSA_F32, DSA_BF16, DSA_FP8, DSA_INT8 };
    RUN_TEST(latent_rows_have_the_published_sizes);
    RUN_TEST(latent_rows_without_rope);
    RUN_TEST(index_rows_have_the_published_sizes);
    RUN_TEST(pages_have_the_published_sizes);
    RUN_TEST(calculators_refuse);
    RUN_TEST(huge_sizes_are_exact);
    RUN_TEST(sizes_that_overflow_are_refused);
    RUN_TEST(init_wants_exactly_the_queried_bytes);
    RUN_TEST(init_resolves_every_field);
    RUN_TEST(create_uses_the_allocator_of_the_config);
    RUN_TEST(create_reports_a_failed_allocation);
    RUN_TEST(destroy_takes_null_and_zeroed);
    RUN_TEST(devices);
    for (int32_t page = 0; page <= 7; page += 7) {
        const char *p = page ? "paged" : "contiguous";
        CASE(p, f32_rows_come_back_exactly, page);
        CASE(p, bf16_rows_are_rounded_to_nearest_even, page);
        CASE(p, fp8_latent_bytes_are_flashmlas, page);
    }
    RUN_TEST(fp8_latents_with_any_scale_are_read);
    for (int f = 2; f < 4; f++) {
        CASE(names[f], planar_page_bytes, formats[f]);
        CASE(names[f], scales_may_live_elsewhere, formats[f]);
    }
    RUN_TEST(hadamard_is_automatic_per_format);
    RUN_TEST(hadamard_needs_a_power_of_two);
    RUN_TEST(rotated_keys_are_stored_rotated);
    for (int kind = 0; kind < 2; kind++)
        for (int f = 0; f < 3 + kind; f++) {
            char name[64];
            snprintf(name, sizeof name, "%s_%s", kind ? "index" : "latent", names[f]);
            CASE(name, a_shuffled_block_table_equals_contiguous, (dsa_kind)kind, formats[f]);
            CASE(name, unaligned_memory_works, (dsa_kind)kind, formats[f]);
        }
    RUN_TEST(a_wide_page_stride_leaves_the_gap_alone);
    RUN_TEST(a_planar_view_filled_by_hand_ignores_row_stride);
    RUN_TEST(rows_beyond_four_gigabytes);
    RUN_TEST(a_view_may_start_with_rows);
    RUN_TEST(truncate_then_append_overwrites);
    RUN_TEST(a_full_cache_refuses_and_stays);
    RUN_TEST(a_ragged_append_serves_every_sequence);
    RUN_TEST(a_ragged_append_is_all_or_nothing);
    RUN_TEST(a_cache_twice_in_a_batch_is_found);
    RUN_TEST(slots_write_anywhere_and_skip);
    RUN_TEST(a_slot_outside_the_pool_stops_everything);
    RUN_TEST(latent_and_keys_may_be_written_apart);
}

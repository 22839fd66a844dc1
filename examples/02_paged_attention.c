/* 02 - paged attention: sparse attention over pages that the engine owns.

       cc -O2 examples/02_paged_attention.c -lm -pthread && ./a.out

   Serving engines keep one pool of pages for all sequences and give each sequence a block table: entry b names the
   page that holds its rows [64 b, 64 b + 64). dsa.h lays a view over such memory and never allocates. The rows are
   FlashMLA's FP8 rows: 512 e4m3 + 4 f32 scales + 64 bf16 = 656 bytes instead of 2304 as f32. The same attention over
   plain f32 rows in one piece shows what the rounding costs. */
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 1000, PAGE = 64, PAGES_IN_POOL = 40, BLOCKS = (ROWS + PAGE - 1) / PAGE,
       HEADS = 16, LATENT = 512, ROPE = 64, WIDTH = LATENT + ROPE, CHOSEN = 128 };

static float rows[ROWS][WIDTH], q[HEADS][WIDTH];
static float max[HEADS], sum[HEADS];        /* the running softmax: the caller's, like all memory */
static float paged_out[HEADS][LATENT], plain_out[HEADS][LATENT];
static int32_t chosen[CHOSEN];
static char workspace[1 << 20];

static void random_floats(float *x, size_t n)
{
    while (n-- > 0) *x++ = (float)rand() / (float)RAND_MAX - 0.5f;
}

static void check(dsa_status status)
{
    if (status == DSA_OK) return;
    fprintf(stderr, "dsa: %s\n", dsa_status_text(status));
    exit(EXIT_FAILURE);
}

/* One list, one pass. A union over several caches is begin, an add for each, finish. */
static void attend(const dsa_ctx *ctx, dsa_cache *cache, float *out)
{
    dsa_seq seq = { .latent = cache };
    dsa_attend_state state = { .n_rows = 1, .max = max, .sum = sum, .out = out };
    dsa_attend_args args = { .n_seqs = 1, .seqs = &seq, .q = q[0], .what = DSA_ATTEND_LIST,
                             .indices = chosen, .n_indices = CHOSEN,
                             .workspace = workspace, .workspace_size = sizeof workspace };
    check(dsa_attend(ctx, &args, &state, NULL, NULL, NULL));
}

int main(void)
{
    dsa_config config = { .n_heads = HEADS, .dim_latent = LATENT, .dim_rope = ROPE };
    dsa_cache_desc fp8 = { .kind = DSA_LATENT, .format = DSA_FP8, .capacity = BLOCKS * PAGE, .page_size = PAGE };
    dsa_cache_desc f32 = { .kind = DSA_LATENT, .format = DSA_F32, .capacity = ROWS };
    int32_t block_table[BLOCKS];
    size_t row_bytes, page_bytes;
    double difference = 0.0, norm = 0.0;
    dsa_cache paged, plain;
    dsa_seq seq = { .n_q = ROWS };
    void *pool;
    dsa_ctx ctx;
    int i;

    random_floats(rows[0], ROWS * WIDTH);
    random_floats(q[0], HEADS * WIDTH);
    check(dsa_init(&ctx, &config));

    /* The engine's pool, and this sequence's pages, scattered through it. */
    check(dsa_row_bytes(DSA_LATENT, DSA_FP8, LATENT, ROPE, &row_bytes));
    check(dsa_page_bytes(DSA_LATENT, DSA_FP8, LATENT, ROPE, PAGE, &page_bytes));
    pool = malloc(PAGES_IN_POOL * page_bytes);
    if (!pool) check(DSA_ERR_MEMORY);
    for (i = 0; i < BLOCKS; i++) block_table[i] = (7 * i + 3) % PAGES_IN_POOL;   /* 7 and 40 share no factor: no page twice */
    check(dsa_cache_view(&ctx, &fp8, pool, PAGES_IN_POOL, 0, block_table, BLOCKS, 0, &paged));
    check(dsa_cache_create(&ctx, &f32, &plain));

    seq.latent = &paged;
    check(dsa_append(&ctx, &(dsa_append_args){ .n_seqs = 1, .seqs = &seq, .latent = rows[0] }));
    seq.latent = &plain;
    check(dsa_append(&ctx, &(dsa_append_args){ .n_seqs = 1, .seqs = &seq, .latent = rows[0] }));

    /* Any list of positions; an indexer would choose it. Whatever is no position of the sequence is skipped. */
    for (i = 0; i < CHOSEN; i++) chosen[i] = rand() % ROWS;
    chosen[5] = -1;
    attend(&ctx, &paged, paged_out[0]);
    attend(&ctx, &plain, plain_out[0]);

    for (i = 0; i < HEADS * LATENT; i++) {
        double a = (&paged_out[0][0])[i], b = (&plain_out[0][0])[i];
        difference += (a - b) * (a - b);
        norm += b * b;
    }
    difference = sqrt(difference / norm);
    printf("%d rows of %d bytes in %d of %d pages (the first three: %d, %d, %d).\n", ROWS, (int)row_bytes, BLOCKS,
           PAGES_IN_POOL, (int)block_table[0], (int)block_table[1], (int)block_table[2]);
    printf("%d heads attended to %d rows through the block table.\n", HEADS, CHOSEN - 1);
    printf("Against f32 rows in one piece the output moved by %.2f %%: the rounding to FP8.\n", 100.0 * difference);
    dsa_cache_destroy(&plain);
    free(pool);
    return difference < 0.05 ? EXIT_SUCCESS : EXIT_FAILURE;
}

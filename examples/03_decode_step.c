/* 03 - the decode step: what an engine calls once per layer and token, for a whole ragged batch.

       cc -O2 examples/03_decode_step.c -lm -pthread && ./a.out

   Three sequences of different lengths decode together; the second one checks two draft tokens, so it has two more
   queries. dsa_step appends the new rows, selects and attends in one call. All memory is taken before the loop: the
   allocator counts, and the count must not move. Two threads share the work, and the same steps on one thread must
   give the same bits. */
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEQS = 3, MOST_ROWS = 5, CAPACITY = 4096, STEPS = 50, THREADS = 2,
       HEADS = 8, LATENT = 128, ROPE = 16, WIDTH = LATENT + ROPE, INDEX_HEADS = 8, INDEX_DIM = 32, TOP_K = 64 };

static const int32_t prompt[SEQS] = { 3000, 40, 1200 };         /* rows in the cache before the first step */
static const int32_t n_queries[SEQS] = { 1, 3, 1 };             /* one token, a token and two drafts, one token */

static float latent[CAPACITY * WIDTH], index_key[CAPACITY * INDEX_DIM];
static float q[MOST_ROWS * HEADS * WIDTH], index_q[MOST_ROWS * INDEX_HEADS * INDEX_DIM], index_w[MOST_ROWS * INDEX_HEADS];
static float out[2][STEPS][MOST_ROWS * HEADS * LATENT];         /* of both runs, to compare */
static int allocations;

static void *counting_alloc(void *user, size_t bytes)
{
    ++*(int *)user;
    return malloc(bytes);
}

static void counting_release(void *user, void *memory)
{
    (void)user;
    free(memory);
}

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

/* All steps on so many threads; returns the allocations made inside the loop. */
static int decode(int32_t n_threads, float (*result)[MOST_ROWS * HEADS * LATENT])
{
    dsa_config config = { .n_heads = HEADS, .dim_latent = LATENT, .dim_rope = ROPE,
                          .n_index_heads = INDEX_HEADS, .dim_index = INDEX_DIM, .top_k = TOP_K,
                          .n_threads = n_threads, .allocator = { counting_alloc, counting_release, &allocations } };
    dsa_cache_desc latent_desc = { .kind = DSA_LATENT, .format = DSA_BF16, .capacity = CAPACITY };
    dsa_cache_desc index_desc = { .kind = DSA_INDEX_KEY, .format = DSA_FP8, .capacity = CAPACITY, .page_size = 64 };
    dsa_cache latents[SEQS], keys[SEQS];
    dsa_seq seqs[SEQS];
    dsa_pool *pool;
    dsa_ctx ctx;
    void *workspace;
    int before, i, step;

    check(dsa_pool_create(&config.allocator, n_threads, &pool));
    config.parallel_for = dsa_pool_run;
    config.parallel_user = pool;
    check(dsa_init(&ctx, &config));
    srand(1);
    for (i = 0; i < SEQS; i++) {                                /* prefill each sequence on its own */
        check(dsa_cache_create(&ctx, &latent_desc, &latents[i]));
        check(dsa_cache_create(&ctx, &index_desc, &keys[i]));
        seqs[i] = (dsa_seq){ .latent = &latents[i], .index = &keys[i], .n_q = prompt[i] };
        random_floats(latent, (size_t)prompt[i] * WIDTH);
        random_floats(index_key, (size_t)prompt[i] * INDEX_DIM);
        check(dsa_append(&ctx, &(dsa_append_args){ .n_seqs = 1, .seqs = &seqs[i], .latent = latent, .index_key = index_key }));
        seqs[i].n_q = n_queries[i];
    }

    dsa_step_args args = { .n_seqs = SEQS, .seqs = seqs, .latent = latent, .index_key = index_key,
                           .q = q, .index_q = index_q, .index_w = index_w, .out = result[0] };
    check(dsa_step_workspace(&ctx, &args, &args.workspace_size));
    workspace = args.workspace = malloc(args.workspace_size);
    if (!workspace) check(DSA_ERR_MEMORY);

    before = allocations;
    for (step = 0; step < STEPS; step++) {
        random_floats(latent, MOST_ROWS * WIDTH);               /* a model would compute these five from the new tokens */
        random_floats(index_key, MOST_ROWS * INDEX_DIM);
        random_floats(q, sizeof q / sizeof *q);
        random_floats(index_q, sizeof index_q / sizeof *index_q);
        random_floats(index_w, sizeof index_w / sizeof *index_w);
        args.out = result[step];
        check(dsa_step(&ctx, &args));
        check(dsa_cache_truncate(&ctx, &latents[1], latents[1].len - 2));   /* the two drafts were wrong: roll back */
        check(dsa_cache_truncate(&ctx, &keys[1], keys[1].len - 2));
    }
    before = allocations - before;

    printf("%d thread%s: %d steps, lengths now %d, %d, %d; workspace %d KiB; %d allocations in the loop.\n", (int)n_threads,
           n_threads > 1 ? "s" : "", STEPS, (int)latents[0].len, (int)latents[1].len, (int)latents[2].len,
           (int)((args.workspace_size + 1023) / 1024), before);
    for (i = 0; i < SEQS; i++) {
        dsa_cache_destroy(&latents[i]);
        dsa_cache_destroy(&keys[i]);
    }
    free(workspace);
    dsa_pool_destroy(pool);
    return before;
}

int main(void)
{
    int inside = decode(1, out[0]) + decode(THREADS, out[1]);
    int same = memcmp(out[0], out[1], sizeof out[0]) == 0;
    printf("The outputs of both runs are %s.\n", same ? "the same, bit for bit" : "different");
    return inside == 0 && same ? EXIT_SUCCESS : EXIT_FAILURE;
}

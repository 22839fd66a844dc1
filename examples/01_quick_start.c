/* 01 - quick start: one decode step of DeepSeek Sparse Attention.

       cc -O2 examples/01_quick_start.c -lm -pthread && ./a.out

   Random rows stand in for a model. One of the 4096 is planted so that the query matches it: the indexer has to
   find it, and attention then reads 64 rows and leaves 4032 alone. */
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 4096, TOP_K = 64, HEADS = 8, LATENT = 128, ROPE = 16, INDEX_HEADS = 4, INDEX_DIM = 32, PLANTED = 1234 };

static float latent[ROWS][LATENT + ROPE], index_key[ROWS][INDEX_DIM];               /* a row of each per token */
static float q[HEADS][LATENT + ROPE], index_q[INDEX_HEADS][INDEX_DIM], index_w[INDEX_HEADS];   /* one query */
static float out[HEADS][LATENT];
static int32_t indices[TOP_K];
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

int main(void)
{
    int i, found = 0;
    random_floats(&latent[0][0], sizeof latent / sizeof(float));
    random_floats(&index_key[0][0], sizeof index_key / sizeof(float));
    random_floats(&q[0][0], sizeof q / sizeof(float));
    random_floats(&index_q[0][0], sizeof index_q / sizeof(float));
    for (i = 0; i < INDEX_HEADS; i++) index_w[i] = 1.0f;
    for (i = 0; i < INDEX_DIM; i++) index_key[PLANTED][i] = 2.0f * index_q[0][i];

    /* The quick start: describe the model, make two caches, append what the model computed, attend. */
    dsa_config config = { .n_heads = HEADS, .dim_latent = LATENT, .dim_rope = ROPE,
                          .n_index_heads = INDEX_HEADS, .dim_index = INDEX_DIM, .top_k = TOP_K };
    dsa_ctx ctx;
    dsa_cache latents, keys;
    check(dsa_init(&ctx, &config));
    check(dsa_cache_create(&ctx, &(dsa_cache_desc){ .kind = DSA_LATENT, .capacity = ROWS }, &latents));
    check(dsa_cache_create(&ctx, &(dsa_cache_desc){ .kind = DSA_INDEX_KEY, .capacity = ROWS }, &keys));
    dsa_seq seq = { .latent = &latents, .index = &keys, .n_q = ROWS };
    check(dsa_append(&ctx, &(dsa_append_args){ .n_seqs = 1, .seqs = &seq, .latent = latent[0], .index_key = index_key[0] }));
    seq.n_q = 1;
    check(dsa_step(&ctx, &(dsa_step_args){ .n_seqs = 1, .seqs = &seq, .q = q[0], .index_q = index_q[0], .index_w = index_w,
        .out = out[0], .indices = indices, .workspace = workspace, .workspace_size = sizeof workspace }));

    for (i = 0; i < TOP_K; i++) found |= indices[i] == PLANTED;
    printf("The indexer scored %d rows and kept %d: %d, %d, %d, ... %d.\n", ROWS, TOP_K,
           (int)indices[0], (int)indices[1], (int)indices[2], (int)indices[TOP_K - 1]);
    printf("The planted row %d is %s.\n", PLANTED, found ? "among them" : "missing");
    printf("Attention read %.0f KiB of latents instead of %.0f; out[0] = %.4f %.4f %.4f ...\n",
           TOP_K * sizeof latent[0] / 1024.0, sizeof latent / 1024.0, out[0][0], out[0][1], out[0][2]);
    dsa_cache_destroy(&latents);
    dsa_cache_destroy(&keys);
    return found ? EXIT_SUCCESS : EXIT_FAILURE;
}

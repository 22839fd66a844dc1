/* 05 - sharded attention: one long sequence whose rows live in three places.

       cc -O2 examples/05_sharded_attention.c -lm -pthread && ./a.out

   Each shard (a GPU, a machine, a disk) scores its own keys and keeps its own best k. A row that is not among the best k
   of its shard cannot be among the best k of all, so merging the three lists gives the exact list of the whole. Each
   shard then attends to the part of that list which it holds, and returns a partial: its normalised output and its
   log-sum-exp. Merging the partials is exact as well. What travels is k scores and one row of output per head, never
   the cache. The same query over one undivided cache is the judge. */
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 3000, SHARDS = 3, SPLIT = 700,                    /* shards of 700, 1400 and 900 rows */
       HEADS = 8, LATENT = 128, ROPE = 16, WIDTH = LATENT + ROPE, INDEX_HEADS = 8, INDEX_DIM = 32, TOP_K = 128 };

static const int32_t begin[SHARDS + 1] = { 0, SPLIT, 3 * SPLIT, ROWS };
static float latent[ROWS * WIDTH], index_key[ROWS * INDEX_DIM];
static float q[HEADS * WIDTH], index_q[INDEX_HEADS * INDEX_DIM], index_w[INDEX_HEADS];
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

/* The caches of rows [from, to). */
static dsa_seq make_shard(const dsa_ctx *ctx, int32_t from, int32_t to, dsa_cache *latents, dsa_cache *keys)
{
    dsa_seq seq = { .latent = latents, .index = keys, .n_q = to - from };
    check(dsa_cache_create(ctx, &(dsa_cache_desc){ .kind = DSA_LATENT, .capacity = to - from }, latents));
    check(dsa_cache_create(ctx, &(dsa_cache_desc){ .kind = DSA_INDEX_KEY, .capacity = to - from }, keys));
    check(dsa_append(ctx, &(dsa_append_args){ .n_seqs = 1, .seqs = &seq, .latent = latent + (ptrdiff_t)from * WIDTH,
                                              .index_key = index_key + (ptrdiff_t)from * INDEX_DIM }));
    seq.n_q = 1;
    return seq;
}

/* The best k of one shard with their scores; the positions are the shard's own. */
static void select_rows(const dsa_ctx *ctx, const dsa_seq *seq, int32_t *indices, float *scores)
{
    dsa_score_args args = { .n_seqs = 1, .seqs = seq, .q = index_q, .w = index_w,
                            .workspace = workspace, .workspace_size = sizeof workspace };
    dsa_selection out = { .indices = indices, .scores = scores };
    check(dsa_score_select(ctx, &args, &out));
}

/* The partial of one shard over a list of its own positions. */
static void attend(const dsa_ctx *ctx, const dsa_seq *seq, const int32_t *indices, float *out, float *lse)
{
    static float max[HEADS], sum[HEADS];
    dsa_attend_state state = { .n_rows = 1, .max = max, .sum = sum, .out = out };
    dsa_attend_args args = { .n_seqs = 1, .seqs = seq, .q = q, .what = DSA_ATTEND_LIST, .indices = indices,
                             .workspace = workspace, .workspace_size = sizeof workspace };
    check(dsa_attend_begin(ctx, &state));
    check(dsa_attend_add(ctx, &args, &state));
    check(dsa_attend_partial(ctx, &state, out, lse));
}

int main(void)
{
    static float shard_out[SHARDS][HEADS * LATENT], whole_out[HEADS * LATENT], merged_out[HEADS * LATENT];
    static float shard_scores[SHARDS][TOP_K], whole_scores[TOP_K], shard_lse[SHARDS][HEADS], whole_lse[HEADS];
    static int32_t shard_indices[SHARDS][TOP_K], whole_indices[TOP_K], merged_indices[TOP_K], local[TOP_K];
    const int32_t *index_parts[SHARDS];
    const float *score_parts[SHARDS], *out_parts[SHARDS], *lse_parts[SHARDS];
    dsa_config config = { .n_heads = HEADS, .dim_latent = LATENT, .dim_rope = ROPE,
                          .n_index_heads = INDEX_HEADS, .dim_index = INDEX_DIM, .top_k = TOP_K };
    dsa_cache latents[SHARDS + 1], keys[SHARDS + 1];
    dsa_seq seqs[SHARDS + 1];
    int s, i, same, count[SHARDS] = { 0 };
    float largest = 0.0f;
    dsa_ctx ctx;

    random_floats(latent, ROWS * WIDTH);
    random_floats(index_key, ROWS * INDEX_DIM);
    random_floats(q, HEADS * WIDTH);
    random_floats(index_q, INDEX_HEADS * INDEX_DIM);
    random_floats(index_w, INDEX_HEADS);
    check(dsa_init(&ctx, &config));
    for (s = 0; s < SHARDS; s++) seqs[s] = make_shard(&ctx, begin[s], begin[s + 1], &latents[s], &keys[s]);
    seqs[SHARDS] = make_shard(&ctx, 0, ROWS, &latents[SHARDS], &keys[SHARDS]);

    /* Round 1: every shard selects; its positions become positions of the whole; the lists are merged. */
    for (s = 0; s < SHARDS; s++) {
        select_rows(&ctx, &seqs[s], shard_indices[s], shard_scores[s]);
        for (i = 0; i < TOP_K; i++) if (shard_indices[s][i] >= 0) shard_indices[s][i] += begin[s];
        index_parts[s] = shard_indices[s];
        score_parts[s] = shard_scores[s];
    }
    dsa_merge_topk_args merge = { .n_parts = SHARDS, .k_in = TOP_K, .n_rows = 1, .indices = index_parts, .scores = score_parts,
                                  .workspace = workspace, .workspace_size = sizeof workspace };
    check(dsa_merge_topk(&ctx, &merge, &(dsa_selection){ .indices = merged_indices }));

    /* Round 2: every shard gets the merged list in its own positions. What it does not hold is no position of its own
       (below 0 or beyond its length), and such entries are skipped. */
    for (s = 0; s < SHARDS; s++) {
        for (i = 0; i < TOP_K; i++) {
            local[i] = merged_indices[i] - begin[s];
            count[s] += local[i] >= 0 && merged_indices[i] < begin[s + 1];
        }
        attend(&ctx, &seqs[s], local, shard_out[s], shard_lse[s]);
        out_parts[s] = shard_out[s];
        lse_parts[s] = shard_lse[s];
    }
    check(dsa_attend_merge(&ctx, SHARDS, out_parts, lse_parts, 1, HEADS, LATENT, NULL, merged_out, NULL));

    /* The judge. */
    select_rows(&ctx, &seqs[SHARDS], whole_indices, whole_scores);
    attend(&ctx, &seqs[SHARDS], whole_indices, whole_out, whole_lse);
    same = memcmp(merged_indices, whole_indices, sizeof whole_indices) == 0;
    for (i = 0; i < HEADS * LATENT; i++) largest = fmaxf(largest, fabsf(merged_out[i] - whole_out[i]));

    printf("Of the %d rows chosen out of %d, the shards hold %d, %d and %d.\n", TOP_K, ROWS, count[0], count[1], count[2]);
    printf("The merged list %s the list of the undivided cache.\n", same ? "equals" : "DIFFERS from");
    printf("The merged output differs from the undivided one by at most %.1e.\n", (double)largest);
    for (s = 0; s <= SHARDS; s++) {
        dsa_cache_destroy(&latents[s]);
        dsa_cache_destroy(&keys[s]);
    }
    return same && largest < 1e-5f ? EXIT_SUCCESS : EXIT_FAILURE;
}

/* context parallelism over MPI: one long sequence whose rows are spread over ranks, on one machine or many.

       mpicc -O2 examples/context_parallel_mpi.c -o context_parallel -lm -pthread && mpirun -n 4 ./context_parallel

   Row i lives on rank i % n, so that a growing sequence stays balanced. A step of decoding, here with two drafts behind it:
     1. rank 0 hands the queries to all; the owners of the new rows append them;
     2. each rank scores its own keys and keeps its best k with scores (dsa_score_select); all gather all lists;
     3. each rank merges them into the exact list of the whole (dsa_merge_topk): the same list everywhere;
     4. each rank attends to the rows of that list which it holds (dsa_attend_partial); rank 0 merges the partials (dsa_attend_merge).
   What travels per token does not depend on the length of the sequence: k pairs of index and score, and H (R + 1) floats a rank.
   Rank 0 keeps an undivided copy as well, only to judge: same lists, outputs within 1e-6.

   A rank that dies ends the run: MPI's default error handler is fatal, and mpirun kills the others and returns an error.
   Options: --rows N, --steps N, --die RANK (that rank kills itself in the middle, to see it). */
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include <math.h>
#include <mpi.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 16, LATENT = 128, ROPE = 16, WIDTH = LATENT + ROPE, INDEX_HEADS = 8, INDEX_DIM = 32, TOP_K = 128, QUERIES = 3 };
enum { Q = HEADS * WIDTH, INDEX_Q = INDEX_HEADS * INDEX_DIM, QUERY = Q + INDEX_Q + INDEX_HEADS, OUT = HEADS * LATENT };

static char workspace[1 << 22];
static int rank, n_ranks;

static void check(dsa_status status)
{
    if (status == DSA_OK) return;
    fprintf(stderr, "rank %d: dsa: %s\n", rank, dsa_status_text(status));
    MPI_Abort(MPI_COMM_WORLD, 2);
}

static void *get(size_t bytes)
{
    void *p = malloc(bytes);
    if (!p) MPI_Abort(MPI_COMM_WORLD, 2);
    return p;
}

/* n numbers in [-1/2, 1/2) that depend on what and which only: every rank can make any row, as if the model had computed it. */
static void make(float *x, int n, uint64_t what, uint64_t which)
{
    uint64_t s = (what << 40 | which) * UINT64_C(0x9E3779B97F4A7C15) + 1;
    for (int i = 0; i < n; i++) {
        s ^= s >> 12; s ^= s << 25; s ^= s >> 27;
        x[i] = (float)(s * UINT64_C(2685821657736338717) >> 40) / 16777216.0f - 0.5f;
    }
}

/* Some rows of a sequence: every n-th one from `first` on. */
typedef struct shard { dsa_cache latents, keys; dsa_seq seq; int64_t first, every; } shard;

static void shard_create(const dsa_ctx *ctx, shard *s, int64_t first, int64_t every, int64_t most)
{
    *s = (shard){ .seq = { .latent = &s->latents, .index = &s->keys, .n_q = 1 }, .first = first, .every = every };
    check(dsa_cache_create(ctx, &(dsa_cache_desc){ .kind = DSA_LATENT, .capacity = most / every + 1 }, &s->latents));
    check(dsa_cache_create(ctx, &(dsa_cache_desc){ .kind = DSA_INDEX_KEY, .capacity = most / every + 1 }, &s->keys));
}

/* How many of its rows lie below row `end` of the sequence. */
static int64_t below(const shard *s, int64_t end) { return end <= s->first ? 0 : (end - s->first + s->every - 1) / s->every; }

static void shard_append(const dsa_ctx *ctx, shard *s, int64_t begin, int64_t end)
{
    float latent[WIDTH], key[INDEX_DIM];
    s->seq.n_q = 1;
    for (int64_t i = s->first + below(s, begin) * s->every; i < end; i += s->every) {
        make(latent, WIDTH, 1, (uint64_t)i);
        make(key, INDEX_DIM, 2, (uint64_t)i);
        check(dsa_append(ctx, &(dsa_append_args){ .n_seqs = 1, .seqs = &s->seq, .latent = latent, .index_key = key }));
    }
}

/* The best k of each query among this shard's rows, as positions of the sequence. Query t sits at row begin + t. */
static void shard_select(const dsa_ctx *ctx, shard *s, int64_t begin, const float *query, int32_t *indices, float *scores)
{
    int64_t ks[QUERIES] = { 0 }, ke[QUERIES];
    for (int t = 0; t < QUERIES; t++) ke[t] = below(s, begin + t + 1);
    s->seq.n_q = QUERIES;
    dsa_score_args args = { .n_seqs = 1, .seqs = &s->seq, .q = query + QUERIES * Q, .w = query + QUERIES * (Q + INDEX_Q),
                            .ks = ks, .ke = ke, .workspace = workspace, .workspace_size = sizeof workspace };
    check(dsa_score_select(ctx, &args, &(dsa_selection){ .indices = indices, .scores = scores }));
    for (int i = 0; i < QUERIES * TOP_K; i++) if (indices[i] >= 0) indices[i] = (int32_t)(s->first + indices[i] * s->every);
}

/* The partial over the rows of the lists that lie here; the others are marked as no rows, and skipped. */
static void shard_attend(const dsa_ctx *ctx, shard *s, const float *query, const int32_t *indices, float *out, float *lse)
{
    static float max[QUERIES * HEADS], sum[QUERIES * HEADS];
    int32_t local[QUERIES * TOP_K];
    for (int i = 0; i < QUERIES * TOP_K; i++) {
        int64_t at = indices[i] - s->first;
        local[i] = indices[i] < 0 || at % s->every != 0 ? -1 : (int32_t)(at / s->every);
    }
    s->seq.n_q = QUERIES;
    dsa_attend_state state = { .n_rows = QUERIES, .max = max, .sum = sum, .out = out };
    dsa_attend_args args = { .n_seqs = 1, .seqs = &s->seq, .q = query, .what = DSA_ATTEND_LIST, .indices = local,
                             .workspace = workspace, .workspace_size = sizeof workspace };
    check(dsa_attend_begin(ctx, &state));
    check(dsa_attend_add(ctx, &args, &state));
    check(dsa_attend_partial(ctx, &state, out, lse));
}

int main(int argc, char **argv)
{
    int64_t rows = 20000, steps = 20, die = -1;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &n_ranks);
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--rows")) rows = atoll(argv[i + 1]);
        if (!strcmp(argv[i], "--steps")) steps = atoll(argv[i + 1]);
        if (!strcmp(argv[i], "--die")) die = atoll(argv[i + 1]);
    }
    if (rows < 0 || rows > 100000000 || steps < 1 || steps > 1000000) {
        if (rank == 0) fprintf(stderr, "--rows takes 0 to 100000000, --steps 1 to 1000000\n");
        MPI_Finalize();
        return 2;
    }

    dsa_config config = { .n_heads = HEADS, .dim_latent = LATENT, .dim_rope = ROPE,
                          .n_index_heads = INDEX_HEADS, .dim_index = INDEX_DIM, .top_k = TOP_K };
    dsa_ctx ctx;
    shard mine, whole;
    const size_t n_pairs = QUERIES * TOP_K, n_out = QUERIES * OUT, n_lse = QUERIES * HEADS;
    float *query = get(QUERIES * QUERY * sizeof *query), *merged = get(n_out * sizeof *merged), *judge = get(n_out * sizeof *judge);
    int32_t *list = get(n_pairs * sizeof *list), *lists = get((size_t)n_ranks * n_pairs * sizeof *lists), judge_list[QUERIES * TOP_K];
    float *score = get(n_pairs * sizeof *score), *scores = get((size_t)n_ranks * n_pairs * sizeof *scores), lse[QUERIES * HEADS];
    float *outs = get((size_t)n_ranks * n_out * sizeof *outs), *lses = get((size_t)n_ranks * n_lse * sizeof *lses);
    float *out = get(n_out * sizeof *out);
    const int32_t **list_parts = get((size_t)n_ranks * sizeof *list_parts);
    const float **score_parts = get((size_t)n_ranks * sizeof *score_parts), **out_parts = get((size_t)n_ranks * sizeof *out_parts);
    const float **lse_parts = get((size_t)n_ranks * sizeof *lse_parts);
    for (int p = 0; p < n_ranks; p++) {
        list_parts[p] = lists + (size_t)p * n_pairs;
        score_parts[p] = scores + (size_t)p * n_pairs;
        out_parts[p] = outs + (size_t)p * n_out;
        lse_parts[p] = lses + (size_t)p * n_lse;
    }
    check(dsa_init(&ctx, &config));
    shard_create(&ctx, &mine, rank, n_ranks, rows + steps * QUERIES);
    shard_append(&ctx, &mine, 0, rows);
    if (rank == 0) {
        shard_create(&ctx, &whole, 0, 1, rows + steps * QUERIES);
        shard_append(&ctx, &whole, 0, rows);
    }

    uint64_t hash = UINT64_C(14695981039346656037);
    int64_t wrong = 0;
    float largest = 0.0f;
    for (int64_t step = 0; step < steps; step++, rows += QUERIES) {
        if (rank == 0) make(query, QUERIES * QUERY, 3, (uint64_t)step);
        MPI_Bcast(query, QUERIES * QUERY, MPI_FLOAT, 0, MPI_COMM_WORLD);
        shard_append(&ctx, &mine, rows, rows + QUERIES);
        if (step == steps / 2 && rank == die) raise(SIGKILL);

        shard_select(&ctx, &mine, rows, query, list, score);
        MPI_Allgather(list, (int)n_pairs, MPI_INT32_T, lists, (int)n_pairs, MPI_INT32_T, MPI_COMM_WORLD);
        MPI_Allgather(score, (int)n_pairs, MPI_FLOAT, scores, (int)n_pairs, MPI_FLOAT, MPI_COMM_WORLD);
        dsa_merge_topk_args merge = { .n_parts = n_ranks, .k_in = TOP_K, .n_rows = QUERIES, .indices = list_parts, .scores = score_parts,
                                      .workspace = workspace, .workspace_size = sizeof workspace };
        check(dsa_merge_topk(&ctx, &merge, &(dsa_selection){ .indices = list }));

        shard_attend(&ctx, &mine, query, list, out, lse);
        MPI_Gather(out, (int)n_out, MPI_FLOAT, outs, (int)n_out, MPI_FLOAT, 0, MPI_COMM_WORLD);
        MPI_Gather(lse, (int)n_lse, MPI_FLOAT, lses, (int)n_lse, MPI_FLOAT, 0, MPI_COMM_WORLD);
        if (rank != 0) continue;
        check(dsa_attend_merge(&ctx, n_ranks, out_parts, lse_parts, QUERIES, HEADS, LATENT, NULL, merged, NULL));

        shard_append(&ctx, &whole, rows, rows + QUERIES);
        shard_select(&ctx, &whole, rows, query, judge_list, score);
        shard_attend(&ctx, &whole, query, judge_list, judge, lse);
        for (size_t i = 0; i < n_pairs; i++) {
            wrong += judge_list[i] != list[i];
            hash = (hash ^ (uint32_t)list[i]) * UINT64_C(1099511628211);
        }
        for (size_t i = 0; i < n_out; i++) {
            float error = fabsf(merged[i] - judge[i]);
            wrong += !(error <= 1e-6f);
            if (error > largest) largest = error;
        }
    }
    if (rank == 0) {
        const size_t row = (WIDTH + INDEX_DIM) * sizeof(float), pairs = 8 * TOP_K, partial = (OUT + HEADS) * sizeof(float);
        printf("%d ranks, %lld rows, %lld lists: %s; outputs differ from the undivided sequence's by at most %.1e\n",
               n_ranks, (long long)rows, (long long)(steps * QUERIES), wrong ? "SOME ARE WRONG" : "all as in the undivided sequence",
               (double)largest);
        printf("hash of all lists %016llx\n", (unsigned long long)hash);
        printf("a token sends: %zu bytes of query to each rank, %zu of list and %zu of partial from each; the cache has %zu bytes\n",
               QUERY * sizeof(float), pairs, partial, (size_t)rows * row);
    }
    MPI_Finalize();
    return wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

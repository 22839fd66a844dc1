/* context parallelism over MPI: one long sequence whose rows are spread over ranks, on one machine or many.

       mpicc -O2 examples/context_parallel_mpi.c -o context_parallel -lm -pthread && mpirun -n 4 ./context_parallel

   Rows are dealt to the ranks in blocks of 16 (dsa_shard), so that a growing sequence stays balanced. A step of decoding, here with two drafts behind it:
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

enum { HEADS = 16, LATENT = 128, ROPE = 16, WIDTH = LATENT + ROPE, INDEX_HEADS = 8, INDEX_DIM = 32, TOP_K = 128, QUERIES = 3, BLOCK = 16 };
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

/* The rows of a sequence that one rank holds. */
typedef struct piece { dsa_shard shard; dsa_cache latents, keys; dsa_seq seq; } piece;

static void piece_create(const dsa_ctx *ctx, piece *p, int32_t n_shards, int32_t shard, int64_t most)
{
    *p = (piece){ .shard = { n_shards, shard, BLOCK }, .seq = { .latent = &p->latents, .index = &p->keys } };
    int64_t rows;
    check(dsa_shard_len(&p->shard, most, &rows));
    check(dsa_cache_create(ctx, &(dsa_cache_desc){ .kind = DSA_LATENT, .capacity = rows + 1 }, &p->latents));
    check(dsa_cache_create(ctx, &(dsa_cache_desc){ .kind = DSA_INDEX_KEY, .capacity = rows + 1 }, &p->keys));
}

/* Those of rows [begin, end) that belong here. */
static void piece_append(const dsa_ctx *ctx, piece *p, int64_t begin, int64_t end)
{
    float latent[WIDTH], key[INDEX_DIM];
    p->seq.n_q = 1;
    for (int64_t i = begin; i < end; i++) {
        int32_t row = (int32_t)i;
        check(dsa_shard_to_local(&p->shard, 1, &row, &row));
        if (row < 0) continue;
        make(latent, WIDTH, 1, (uint64_t)i);
        make(key, INDEX_DIM, 2, (uint64_t)i);
        check(dsa_append(ctx, &(dsa_append_args){ .n_seqs = 1, .seqs = &p->seq, .latent = latent, .index_key = key }));
    }
}

/* The best k of each query among the rows here, as positions of the sequence, which has `len` rows with those of the queries. */
static void piece_select(const dsa_ctx *ctx, piece *p, int64_t len, const float *query, int32_t *indices, float *scores)
{
    int64_t ks[QUERIES], ke[QUERIES];
    check(dsa_shard_ranges(&p->shard, len, QUERIES, ks, ke));
    p->seq.n_q = QUERIES;
    dsa_score_args args = { .n_seqs = 1, .seqs = &p->seq, .q = query + QUERIES * Q, .w = query + QUERIES * (Q + INDEX_Q),
                            .ks = ks, .ke = ke, .workspace = workspace, .workspace_size = sizeof workspace };
    check(dsa_score_select(ctx, &args, &(dsa_selection){ .indices = indices, .scores = scores }));
    check(dsa_shard_to_global(&p->shard, QUERIES * TOP_K, indices));
}

/* The partial over the rows of the lists that lie here; the others are marked as no rows, and skipped. */
static void piece_attend(const dsa_ctx *ctx, piece *p, const float *query, const int32_t *indices, float *out, float *lse)
{
    static float max[QUERIES * HEADS], sum[QUERIES * HEADS];
    int32_t local[QUERIES * TOP_K];
    check(dsa_shard_to_local(&p->shard, QUERIES * TOP_K, indices, local));
    p->seq.n_q = QUERIES;
    dsa_attend_state state = { .n_rows = QUERIES, .max = max, .sum = sum, .out = out };
    dsa_attend_args args = { .n_seqs = 1, .seqs = &p->seq, .q = query, .what = DSA_ATTEND_LIST, .indices = local,
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
    piece mine, whole;
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
    piece_create(&ctx, &mine, n_ranks, rank, rows + steps * QUERIES);
    piece_append(&ctx, &mine, 0, rows);
    if (rank == 0) {
        piece_create(&ctx, &whole, 1, 0, rows + steps * QUERIES);
        piece_append(&ctx, &whole, 0, rows);
    }

    uint64_t hash = UINT64_C(14695981039346656037);
    int64_t wrong = 0;
    float largest = 0.0f;
    for (int64_t step = 0; step < steps; step++, rows += QUERIES) {
        if (rank == 0) make(query, QUERIES * QUERY, 3, (uint64_t)step);
        MPI_Bcast(query, QUERIES * QUERY, MPI_FLOAT, 0, MPI_COMM_WORLD);
        piece_append(&ctx, &mine, rows, rows + QUERIES);
        if (step == steps / 2 && rank == die) raise(SIGKILL);

        piece_select(&ctx, &mine, rows + QUERIES, query, list, score);
        MPI_Allgather(list, (int)n_pairs, MPI_INT32_T, lists, (int)n_pairs, MPI_INT32_T, MPI_COMM_WORLD);
        MPI_Allgather(score, (int)n_pairs, MPI_FLOAT, scores, (int)n_pairs, MPI_FLOAT, MPI_COMM_WORLD);
        dsa_merge_topk_args merge = { .n_parts = n_ranks, .k_in = TOP_K, .n_rows = QUERIES, .indices = list_parts, .scores = score_parts,
                                      .workspace = workspace, .workspace_size = sizeof workspace };
        check(dsa_merge_topk(&ctx, &merge, &(dsa_selection){ .indices = list }));

        piece_attend(&ctx, &mine, query, list, out, lse);
        MPI_Gather(out, (int)n_out, MPI_FLOAT, outs, (int)n_out, MPI_FLOAT, 0, MPI_COMM_WORLD);
        MPI_Gather(lse, (int)n_lse, MPI_FLOAT, lses, (int)n_lse, MPI_FLOAT, 0, MPI_COMM_WORLD);
        if (rank != 0) continue;
        check(dsa_attend_merge(&ctx, n_ranks, out_parts, lse_parts, QUERIES, HEADS, LATENT, NULL, merged, NULL));

        piece_append(&ctx, &whole, rows, rows + QUERIES);
        piece_select(&ctx, &whole, rows + QUERIES, query, judge_list, score);
        piece_attend(&ctx, &whole, query, judge_list, judge, lse);
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

/* 06 - the same calls on a GPU: caches that live there, operands and results here.

       make cuda && cc -O2 -DDSA_CUDA examples/06_cuda_decode.c build/dsa_cuda.o -L/usr/local/cuda/lib64 -lcudart_static \
           -lstdc++ -ldl -lrt -lm -pthread && ./a.out

   Three lines differ from the CPU: dsa_cuda_create, config.cuda and the device in the caches' descriptions. The step below runs on both,
   over equal caches. The lists may differ in entries at the very cut (the GPU sums in another order), the outputs in what those entries
   weigh and in bf16 rounding. An engine that lives on the GPU takes the calls on device pointers instead: dsa_cuda_step and its kin at the
   end of dsa.h's declarations. */
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 20000, STEPS = 20, HEADS = 128, LATENT = 512, ROPE = 64, WIDTH = LATENT + ROPE, INDEX_HEADS = 64, INDEX_DIM = 128,
    TOP_K = 2048 };

static float latent[(ROWS + STEPS) * WIDTH], index_key[(ROWS + STEPS) * INDEX_DIM];
static float q[HEADS * WIDTH], index_q[INDEX_HEADS * INDEX_DIM], index_w[INDEX_HEADS], out[2][STEPS][HEADS * LATENT];
static int32_t indices[2][STEPS][TOP_K];

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

/* A prompt, then STEPS decode steps of one sequence. gpu NULL: on the CPU. */
static void decode(dsa_cuda *gpu, float (*result)[HEADS * LATENT], int32_t (*lists)[TOP_K])
{
    dsa_config config;
    dsa_cache_desc latent_desc = { .kind = DSA_LATENT, .format = DSA_FP8, .capacity = ROWS + STEPS, .page_size = 64 };
    dsa_cache_desc index_desc = { .kind = DSA_INDEX_KEY, .format = DSA_FP8, .capacity = ROWS + STEPS, .page_size = 64 };
    dsa_cache latents, keys;
    dsa_ctx ctx;
    size_t bytes;

    check(dsa_config_preset(DSA_DEEPSEEK_V32, &config));
    config.cuda = gpu;                                        /* no device: the CPU, */
    latent_desc.device = index_desc.device = DSA_DEVICE_AUTO; /* and AUTO takes what there is */
    check(dsa_init(&ctx, &config));
    check(dsa_cache_create(&ctx, &latent_desc, &latents));
    check(dsa_cache_create(&ctx, &index_desc, &keys));

    dsa_seq seq = { .latent = &latents, .index = &keys, .n_q = ROWS };
    check(dsa_append(&ctx, &(dsa_append_args){ .n_seqs = 1, .seqs = &seq, .latent = latent, .index_key = index_key }));

    seq.n_q = 1;
    dsa_step_args step = { .n_seqs = 1, .seqs = &seq, .q = q, .index_q = index_q, .index_w = index_w, .indices = lists[0] };
    check(dsa_step_workspace(&ctx, &step, &bytes));           /* on the host: next to nothing where the caches are on the GPU */
    step.workspace = malloc(bytes);
    step.workspace_size = bytes;
    for (int i = 0; i < STEPS; i++) {
        step.latent = latent + (ROWS + i) * WIDTH;            /* the token's own row comes first */
        step.index_key = index_key + (ROWS + i) * INDEX_DIM;
        step.out = result[i];
        step.indices = lists[i];
        check(dsa_step(&ctx, &step));
    }
    printf("%s: %d steps over %ld rows, workspace %zu bytes\n", latents.device == DSA_DEVICE_CUDA ? "GPU" : "CPU", STEPS,
        (long)latents.len, bytes);
    free(step.workspace);
    dsa_cache_destroy(&latents);
    dsa_cache_destroy(&keys);
}

int main(void)
{
    dsa_cuda *gpu = NULL;
    random_floats(latent, sizeof latent / sizeof *latent);
    random_floats(index_key, sizeof index_key / sizeof *index_key);
    random_floats(q, sizeof q / sizeof *q);
    random_floats(index_q, sizeof index_q / sizeof *index_q);
    random_floats(index_w, INDEX_HEADS);

    check(dsa_cuda_create(NULL, &gpu));                       /* the first device, the fastest kernels it has, 256 MiB for operands */
    decode(gpu, out[0], indices[0]);
    decode(NULL, out[1], indices[1]);
    dsa_cuda_destroy(gpu);

    double dot = 0, square = 0;
    long same = 0;
    for (int i = 0; i < STEPS; i++) {
        for (int j = 0; j < HEADS * LATENT; j++) {
            double a = out[0][i][j], b = out[1][i][j];
            dot += a * b;
            square += a * a + b * b;
        }
        for (int j = 0, k = 0; j < TOP_K; j++) {              /* both ascending */
            while (k < TOP_K && indices[1][i][k] < indices[0][i][j]) k++;
            same += k < TOP_K && indices[1][i][k] == indices[0][i][j];
        }
    }
    /* gap = |a - b|^2 / (|a|^2 + |b|^2). These weights are nearly equal and these rows random, so m other entries of k make it m / k; twice
       that is allowed, and a little for rounding: 2^-9 of a value is 1e-6 of its square. */
    double gap = 1 - 2 * dot / square, recall = (double)same / (STEPS * TOP_K), most = 2 * (1 - recall) + 1e-5;
    printf("lists agree in %.3f %%, outputs differ by %.1e of their squares (at most %.1e)\n", 100 * recall, gap, most);
    return recall > 0.999 && fabs(gap) < most ? EXIT_SUCCESS : EXIT_FAILURE;
}

/* bench_backward - each backward call beside the forward call that it belongs to, f32, one thread - public domain or MIT, like dsa.h

   Build and run: make bench-backward

   The two are timed in turn in one run, because only the ratio of neighbours leaves the clock and other processes out. */
#define _POSIX_C_SOURCE 200809L
#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { ROUNDS = 9 };

static dsa_ctx ctx;
static char detail[256];
static void must(int fine, const char *what) {
    if (fine) return;
    fprintf(stderr, "bench_backward: %s: %s\n", what, detail);
    exit(2);
}
static void ok(dsa_status status, const char *call) { must(status == DSA_OK, call); }
static void *zeros(size_t n, size_t size) {
    void *p = calloc(n, size);
    must(p != NULL, "out of memory");
    return p;
}
static float *random_floats(int64_t n, float scale) {
    static uint32_t seed = 1;
    float *x = (float *)zeros((size_t)n, sizeof *x);
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = scale * ((float)(seed >> 8) / 8388608.0f - 1);
    }
    return x;
}
static float *floats(int64_t n) { return (float *)zeros((size_t)n, sizeof(float)); }
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct pair { const char *name; void (*forward)(void *), (*backward)(void *); void *user; } pair;
static void time_pair(const pair *p) {
    double f[ROUNDS], b[ROUNDS], ratio[ROUNDS];
    p->forward(p->user);
    p->backward(p->user);
    for (int i = 0; i < ROUNDS; i++) {
        const double t0 = now();
        p->forward(p->user);
        const double t1 = now();
        p->backward(p->user);
        const double t2 = now();
        f[i] = t1 - t0;
        b[i] = t2 - t1;
        ratio[i] = b[i] / f[i];
    }
    qsort(f, ROUNDS, sizeof *f, by_size);
    qsort(b, ROUNDS, sizeof *b, by_size);
    qsort(ratio, ROUNDS, sizeof *ratio, by_size);
    printf("%-44s %9.2f %9.2f %7.2f\n", p->name, 1e3 * f[ROUNDS / 2], 1e3 * b[ROUNDS / 2], ratio[ROUNDS / 2]);
    fflush(stdout);
}

/* ---- attention and index scores at DeepSeek-V3.2's shapes ---- */
typedef struct calls {
    dsa_attend_args attend;
    dsa_attend_state state;
    float *lse;
    dsa_attend_backward_args back;
    dsa_score_args score;
    float *scores;
    dsa_index_backward_args index;
} calls;
static void attend(void *u) { calls *c = (calls *)u; ok(dsa_attend(&ctx, &c->attend, &c->state, NULL, c->lse, NULL), "dsa_attend"); }
static void attend_back(void *u) { calls *c = (calls *)u; ok(dsa_attend_backward(&ctx, &c->back), "dsa_attend_backward"); }
static void score(void *u) {
    calls *c = (calls *)u;
    ok(dsa_score(&ctx, &c->score, c->scores, c->index.stride, c->index.stride), "dsa_score");
}
static void index_back(void *u) { calls *c = (calls *)u; ok(dsa_index_backward(&ctx, &c->index), "dsa_index_backward"); }

static dsa_cache *cache_of(dsa_kind kind, int64_t capacity) {
    dsa_cache *c = (dsa_cache *)zeros(1, sizeof *c);
    dsa_cache_desc d;
    memset(&d, 0, sizeof d);
    d.kind = kind;
    d.capacity = capacity;
    ok(dsa_cache_create(&ctx, &d, c), "dsa_cache_create");
    return c;
}

static void primitives(void) {
    enum { L = 4096, N = 16, K = 2048 };
    dsa_config config;
    dsa_config_preset(DSA_DEEPSEEK_V32, &config);
    config.detail = detail;
    config.detail_size = sizeof detail;
    ok(dsa_init(&ctx, &config), "dsa_init");
    const int64_t H = config.n_heads, R = config.dim_latent, W = R + config.dim_rope, HI = config.n_index_heads, D = config.dim_index;
    dsa_seq seq;
    dsa_append_args append;
    memset(&seq, 0, sizeof seq);
    memset(&append, 0, sizeof append);
    seq.latent = cache_of(DSA_LATENT, L);
    seq.index = cache_of(DSA_INDEX_KEY, L);
    seq.n_q = L;
    append.n_seqs = 1;
    append.seqs = &seq;
    append.latent = random_floats(L * W, 1);
    append.index_key = random_floats(L * D, 1);
    ok(dsa_append(&ctx, &append), "dsa_append");
    seq.n_q = N;
    seq.len = L;

    static const char *const names[3] = { "attention, list of 2048", "attention, range of 4080", "index scores + KL, range of 4080" };
    for (int all = 0; all < 2; all++) {
        calls c;
        memset(&c, 0, sizeof c);
        int32_t *list = (int32_t *)zeros((size_t)N * K, sizeof *list);
        int64_t *ks = (int64_t *)zeros(N, sizeof *ks), *ke = (int64_t *)zeros(N, sizeof *ke);
        for (int i = 0; i < N; i++) {
            ke[i] = L - N;
            for (int j = 0; j < K; j++) list[i * K + j] = (int32_t)((j * (L - N) / K + i) % (L - N));
        }
        float **grads = (float **)zeros(2, sizeof *grads);
        grads[0] = floats(L * W);
        grads[1] = floats(L * D);
        c.attend.n_seqs = 1;
        c.attend.seqs = &seq;
        c.attend.q = random_floats(N * H * W, 0.3f);
        c.attend.what = all ? DSA_ATTEND_RANGE : DSA_ATTEND_LIST;
        c.attend.indices = list;
        c.attend.n_indices = K;
        c.attend.ks = ks;
        c.attend.ke = ke;
        c.index.set = c.attend;
        c.back.attend = c.attend;
        c.state.n_rows = N;
        c.state.max = floats(N * H);
        c.state.sum = floats(N * H);
        c.state.out = floats(N * H * R);
        c.lse = floats(N * H);
        ok(dsa_attend_workspace(&ctx, &c.attend, &c.state, &c.attend.workspace_size), "dsa_attend_workspace");
        c.attend.workspace = zeros(c.attend.workspace_size, 1);
        c.back.out = c.state.out;
        c.back.lse = c.lse;
        c.back.d_out = random_floats(N * H * R, 1);
        c.back.d_q = floats(N * H * W);
        c.back.d_latent = grads;
        c.back.target = floats((int64_t)N * L);
        c.back.target_stride = all ? L : K;
        ok(dsa_attend_backward_workspace(&ctx, &c.back, &c.back.attend.workspace_size), "dsa_attend_backward_workspace");
        c.back.attend.workspace = zeros(c.back.attend.workspace_size, 1);
        pair p = { names[all], attend, attend_back, &c };
        time_pair(&p);                                   /* leaves the target behind for the indexer */

        c.score.n_seqs = 1;
        c.score.seqs = &seq;
        c.score.q = random_floats(N * HI * D, 1);
        c.score.w = random_floats(N * HI, 0.01f);
        c.scores = floats((int64_t)N * L);
        ok(dsa_score_workspace(&ctx, &c.score, &c.score.workspace_size), "dsa_score_workspace");
        c.score.workspace = zeros(c.score.workspace_size, 1);
        c.index.q = c.score.q;
        c.index.w = c.score.w;
        c.index.target = c.back.target;
        c.index.stride = all ? L : K;
        c.index.weight = 1.0f / N;
        c.index.loss = floats(N);
        c.index.d_q = floats(N * HI * D);
        c.index.d_w = floats(N * HI);
        c.index.d_key = grads + 1;
        ok(dsa_index_backward_workspace(&ctx, &c.index, &c.index.set.workspace_size), "dsa_index_backward_workspace");
        c.index.set.workspace = zeros(c.index.set.workspace_size, 1);
        if (all) { p.name = names[2]; p.forward = score; p.backward = index_back; time_pair(&p); }
    }
}

/* ---- a layer of tiny-dsa's shape ---- */
typedef struct layer { dsa_layer_args forward; dsa_layer_backward_args back; dsa_seq seq; } layer;
static void layer_forward(void *u) {
    layer *l = (layer *)u;
    ok(dsa_cache_truncate(&ctx, l->seq.latent, 0), "dsa_cache_truncate");
    ok(dsa_cache_truncate(&ctx, l->seq.index, 0), "dsa_cache_truncate");
    ok(dsa_layer(&ctx, &l->forward), "dsa_layer");
}
static void layer_backward(void *u) { layer *l = (layer *)u; ok(dsa_layer_backward(&ctx, &l->back), "dsa_layer_backward"); }

static void layers(void) {
    enum { T = 2048, HIDDEN = 256, A = 128, R = 128, ROPE = 16, NOPE = 32, V = 32, H = 8, HI = 8, D = 32, K = 64 };
    static const int64_t size[12] = { A * HIDDEN, A, H * (NOPE + ROPE) * A, (R + ROPE) * HIDDEN, R, H * (NOPE + V) * R, HIDDEN * H * V,
                                      HI * D * A, D * HIDDEN, D, D, HI * HIDDEN };
    dsa_config config;
    memset(&config, 0, sizeof config);
    config.n_heads = H; config.dim_latent = R; config.dim_rope = ROPE; config.n_index_heads = HI; config.dim_index = D;
    config.top_k = K; config.dim_hidden = HIDDEN; config.dim_q_lora = A; config.dim_nope = NOPE; config.dim_v = V;
    config.detail = detail;
    config.detail_size = sizeof detail;
    ok(dsa_init(&ctx, &config), "dsa_init");
    dsa_layer_weights w;
    dsa_layer_grads g;
    memset(&w, 0, sizeof w);
    dsa_tensor *const to[12] = { &w.q_a, &w.q_a_norm, &w.q_b, &w.kv_a, &w.kv_a_norm, &w.kv_b, &w.o, &w.index_q_b, &w.index_k,
                                 &w.index_k_norm, &w.index_k_bias, &w.index_w };
    float **const of[12] = { &g.q_a, &g.q_a_norm, &g.q_b, &g.kv_a, &g.kv_a_norm, &g.kv_b, &g.o, &g.index_q_b, &g.index_k,
                             &g.index_k_norm, &g.index_k_bias, &g.index_w };
    for (int i = 0; i < 12; i++) {
        to[i]->data = random_floats(size[i], 0.1f);
        *of[i] = floats(size[i]);
    }
    static const char *const names[3] = { "layer, dense, model alone", "layer, dense, indexer alone (warm-up)", "layer, sparse, both" };
    for (int kind = 0; kind < 3; kind++) {
        layer l;
        memset(&l, 0, sizeof l);
        int32_t *lists = (int32_t *)zeros((size_t)T * K, sizeof *lists);
        l.seq.latent = cache_of(DSA_LATENT, T);
        l.seq.index = cache_of(DSA_INDEX_KEY, T);
        l.seq.n_q = T;
        l.forward.weights = &w;
        l.forward.n_seqs = 1;
        l.forward.seqs = &l.seq;
        l.forward.x = random_floats(T * HIDDEN, 1);
        l.forward.mode = kind == 2 ? DSA_LAYER_SPARSE : DSA_LAYER_DENSE;
        l.back.layer = l.forward;
        l.forward.y = floats(T * HIDDEN);
        l.forward.indices_out = kind == 2 ? lists : NULL;
        l.back.layer.indices_in = kind == 2 ? lists : NULL;
        l.back.d_y = kind == 1 ? NULL : random_floats(T * HIDDEN, 1);
        l.back.d_x = kind == 1 ? NULL : floats(T * HIDDEN);
        l.back.grads = &g;
        l.back.index_weight = kind == 0 ? 0.0f : 1.0f / T;
        ok(dsa_layer_workspace(&ctx, &l.forward, &l.forward.workspace_size), "dsa_layer_workspace");
        l.forward.workspace = zeros(l.forward.workspace_size, 1);
        layer_forward(&l);
        ok(dsa_layer_backward_workspace(&ctx, &l.back, &l.back.layer.workspace_size), "dsa_layer_backward_workspace");
        l.back.layer.workspace = zeros(l.back.layer.workspace_size, 1);
        pair p = { names[kind], layer_forward, layer_backward, &l };
        time_pair(&p);
    }
}

int main(void) {
    printf("f32, 1 thread, medians of %d rounds              forward  backward   ratio (ms)\n", ROUNDS);
    primitives();
    layers();
    return fflush(stdout) == 0 && !ferror(stdout) ? 0 : 2;
}

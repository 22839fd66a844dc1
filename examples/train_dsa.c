/* train_dsa - a language model with DeepSeek Sparse Attention, trained from nothing on a laptop - public domain or MIT, like dsa.h

   Build and run: make train      (by hand: cc -O3 -o build/train_dsa examples/train_dsa.c -lm -pthread, then build/train_dsa --help)

   The recipe of DeepSeek-V3.2-Exp, small. Top-k has no gradient, so the indexer cannot learn from the model's loss; it has its own:
     dense     the model learns the task with dense attention; the indexer rests
     warm-up   the model rests; the indexer learns to score rows as the heads attend to them: KL to their summed attention, all rows
     sparse    all learns; attention sees the k best rows only, and the KL runs over those
   The indexer learns from its KL alone and the model from its language-model loss alone: dsa_layer_backward keeps them apart.

   Two tasks. By default multi-query associative recall: pairs (key, value), then the keys once more in another order, and the model
   must say the values. That is what attention is for, and a window cannot do it. With --text FILE: running text with facts and questions
   about them, the mix that tiny-dsa was trained on (tools/needle.h). Models are saved in Hugging Face format, as transformers'
   DeepseekV32ForCausalLM reads them.

   dsa.h has the layer, projections and norms, forward and backward. Here is the rest: model, loss, a batch on threads, AdamW, files. */
#define _POSIX_C_SOURCE 200809L
#define DSA_IMPLEMENTATION
#include "../tools/needle.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

static const char help[] =
    "usage: train_dsa --out DIR [options]\n"
    "\n"
    "Trains a model by the recipe of DeepSeek Sparse Attention: dense, indexer warm-up, sparse. Writes DIR/config.json and\n"
    "DIR/model.safetensors (Hugging Face, f32) and DIR/state.safetensors, from which --resume goes on exactly. Ctrl-C saves.\n"
    "\n"
    "  --out DIR          where the model goes; made if it is missing, refused if a model is in it already\n"
    "  --resume           go on where DIR/state.safetensors ends, with the settings of that run\n"
    "  --text FILE        byte-level text with facts and questions instead of associative recall\n"
    "  --model DIR        start from this model instead of random weights\n"
    "  --reset-indexer    with random indexers\n"
    "  --steps A,B,C      of the dense stage, the warm-up and the sparse stage (0 leaves one out). Default 600,300,400;\n"
    "                     text 6000,300,1000\n"
    "  --context N        tokens in a sequence. Default 512; text 2048\n"
    "  --warm-context N   of the warm-up, whose attention is dense. Default: --context\n"
    "  --batch N          tokens in a step. Default 2048; text 8192\n"
    "  --topk K           rows that sparse attention sees. Default: context / 16; text 64\n"
    "  --lr A,B,C         highest learning rates: model in the dense stage, indexer in the warm-up (a third of it in the sparse\n"
    "                     stage), model in the sparse stage. Default 1e-3,2e-3,3e-4\n"
    "  --seed S           of weights and data (default 1)\n"
    "  --stop N           save and stop after N steps of this call, as Ctrl-C would\n"
    "  --save SECONDS     between two saves, besides those at the end of a stage (default 60; 0: after each step)\n"
    "  --eval N           sequences of each evaluation, after every stage (default 32; 0: none)\n"
    "  --threads N        default 2; a step makes use of 4 at most\n"
    "  --isa NAME         auto (default), scalar, avx2, avx512, neon\n"
    "  --log FILE         stage,step,context,loss,kl of every step as CSV; a resumed run adds to it. tools/plot.py draws it\n"
    "\n"
    "Same seed, same settings, same ISA: the same bits, whatever the number of threads and however often it was interrupted.\n"
    "Exit status: 0 success, 1 stopped by Ctrl-C or --stop after saving, 2 bad usage, bad input or nothing could be written.\n";

enum { DENSE, WARM_UP, SPARSE, N_STAGES };
static const char *const stage_names[N_STAGES] = { "dense", "warm-up", "sparse" };

typedef struct settings {        /* what the bits of a run depend on: kept in the state file */
    int64_t steps[N_STAGES], context, warm_context, batch, top_k, seed;
    int64_t text;                /* a checksum of the text; 0: associative recall */
    double lr[N_STAGES];
} settings;

/* One tensor of the model: which part of the flat arrays it is, and where the engine keeps its address. */
typedef struct param {
    char name[112];              /* as in the files of transformers */
    int64_t out, in, at;         /* [out, in], or [in] where out is 0; from w[at] on */
    int indexer;                 /* 1: it learns from the KL */
    float init;                  /* a vector's value; a matrix has the standard deviation init / sqrt(in) */
    const float **address;       /* one of the two: of a plain array, of a weight of dsa_layer */
    dsa_tensor *tensor;
} param;

typedef struct layer_state {     /* what a step keeps of a layer: the inputs of its norms and products, [rows, ..] */
    float *x0, *n1, *x1, *n2, *gate, *up, *act;
    int32_t *lists;              /* [rows, k] that attention saw in the sparse stage */
    dsa_cache *latent, *index;   /* [sequences] */
} layer_state;

/* A part of the batch, worked through by one thread. There are always SHARDS of them, whatever the number of threads, and their
   gradients are added in order: so the bits do not depend on it. No thread waits for another inside a step, which is worth a factor of
   two over threads within the calls: at these sizes a call takes microseconds. */
enum { SHARDS = 4 };
typedef struct trainer trainer;
typedef struct shard {
    trainer *t;
    dsa_ctx ctx;                 /* for one thread */
    float *g;                    /* gradients, laid out like the trainer's w */
    dsa_layer_grads *grads;      /* [layers], into g */
    layer_state *layers;         /* [layers] */
    float *x, *y, *d_x, *d_y, *d_n, *d_act, *d_gate, *d_up, *normed, *picked, *logits, *kl;
    int32_t *tokens, *targets;   /* targets: what is to be said after a token, -1 for nothing */
    int32_t *asked, n_asked;     /* the rows that have a target */
    int32_t sequences;           /* of this step */
    dsa_seq *seqs;
    void *workspace;
    size_t workspace_size;
    double loss, kl_sum;
    char detail[256];
} shard;

struct trainer {
    settings set;
    int32_t threads;
    dsa_isa isa;
    engine_model model;          /* its pointers lead into w: so the engine of the tools evaluates what is trained here */
    char *config;                /* config.json */
    param *params;
    int32_t n_params;
    int64_t n_weights;
    float *w, *g, *m, *v;        /* weights, gradients, AdamW's two moments */
    dsa_pool *pool;
    shard shards[SHARDS];
    int stage;                   /* of the step in work: its stage, tokens in a sequence, targets and rows of all shards */
    int32_t n;
    int64_t n_targets, n_rows;
    needle_text text, held_out;
    int64_t step;                /* of all stages together */
    int64_t rung;                /* of the ladder of contexts in the dense stage */
    double rung_loss, rung_weight;   /* running mean of the loss since the last rung */
    FILE *log;
};

static volatile sig_atomic_t interrupted;
static void on_signal(int number) { (void)number; interrupted = 1; }

/* Bad input, or no memory: nothing that has been saved is touched. */
static void die(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fflush(stdout);
    fprintf(stderr, "train_dsa: ");
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n");
    va_end(list);
    exit(2);
}
static void *must(void *p) { if (p == NULL) die("out of memory"); return p; }
static void *zeros(int64_t n, size_t size) { return must(calloc((size_t)(n > 0 ? n : 1), size)); }
static float *floats(int64_t n) { return (float *)zeros(n, sizeof(float)); }
static int32_t *ints(int64_t n) { return (int32_t *)zeros(n, sizeof(int32_t)); }
static void check(const shard *s, dsa_status status, const char *call) {
    if (status != DSA_OK) die("%s: %s: %s", call, dsa_status_text(status), s->detail);
}

/* ---- the model ------------------------------------------------------------------------------------------- */
static param *add(trainer *t, float init, int64_t out, int64_t in, const char *name, int32_t layer) {
    param *p = &t->params[t->n_params++];
    if (layer < 0) snprintf(p->name, sizeof p->name, "%s", name);
    else snprintf(p->name, sizeof p->name, "model.layers.%d.%s", (int)layer, name);
    p->out = out;
    p->in = in;
    p->at = t->n_weights;
    p->init = init;
    t->n_weights += (out > 0 ? out : 1) * in;
    return p;
}
static void add_array(trainer *t, const float **address, float init, int64_t out, int64_t in, const char *name, int32_t layer) {
    add(t, init, out, in, name, layer)->address = address;
}
static void add_tensor(trainer *t, dsa_tensor *w, float init, int64_t out, int64_t in, const char *name, int32_t layer) {
    char full[80];
    snprintf(full, sizeof full, "self_attn.%s", name);
    param *p = add(t, init, out, in, full, layer);
    p->tensor = w;
    p->indexer = strncmp(name, "indexer.", 8) == 0;
}

/* What is added to the residual stream begins smaller, so that its variance does not grow with the depth. */
static void list_params(trainer *t) {
    engine_model *m = &t->model;
    const dsa_config *c = &m->dsa;
    const int64_t hidden = m->dim_hidden, heads = c->n_heads, q_lora = c->dim_q_lora, latent = c->dim_latent;
    const int64_t nope = c->dim_nope, rope = c->dim_rope, v = c->dim_v, index = (int64_t)c->n_index_heads * c->dim_index;
    const float deep = 1 / sqrtf(2.0f * (float)m->n_layers);
    t->params = (param *)zeros((int64_t)m->n_layers * 17 + 3, sizeof *t->params);
    add_array(t, &m->embedding, 0.5f * sqrtf((float)hidden), m->n_vocab, hidden, "model.embed_tokens.weight", -1);
    for (int32_t i = 0; i < m->n_layers; i++) {
        engine_block *b = &m->blocks[i];
        dsa_layer_weights *a = &b->attention;
        const int64_t inter = b->mlp.inter;
        add_array(t, &b->input_norm, 1, 0, hidden, "input_layernorm.weight", i);
        add_array(t, &b->post_norm, 1, 0, hidden, "post_attention_layernorm.weight", i);
        add_tensor(t, &a->q_a, 1, q_lora, hidden, "q_a_proj.weight", i);
        add_tensor(t, &a->q_a_norm, 1, 0, q_lora, "q_a_layernorm.weight", i);
        add_tensor(t, &a->q_b, 1, heads * (nope + rope), q_lora, "q_b_proj.weight", i);
        add_tensor(t, &a->kv_a, 1, latent + rope, hidden, "kv_a_proj_with_mqa.weight", i);
        add_tensor(t, &a->kv_a_norm, 1, 0, latent, "kv_a_layernorm.weight", i);
        add_tensor(t, &a->kv_b, 1, heads * (nope + v), latent, "kv_b_proj.weight", i);
        add_tensor(t, &a->o, deep, hidden, heads * v, "o_proj.weight", i);
        add_tensor(t, &a->index_q_b, 1, index, q_lora, "indexer.wq_b.weight", i);
        add_tensor(t, &a->index_k, 1, c->dim_index, hidden, "indexer.wk.weight", i);
        add_tensor(t, &a->index_k_norm, 1, 0, c->dim_index, "indexer.k_norm.weight", i);
        add_tensor(t, &a->index_k_bias, 0, 0, c->dim_index, "indexer.k_norm.bias", i);
        add_tensor(t, &a->index_w, 1, c->n_index_heads, hidden, "indexer.weights_proj.weight", i);
        add_array(t, &b->mlp.gate, 1, inter, hidden, "mlp.gate_proj.weight", i);
        add_array(t, &b->mlp.up, 1, inter, hidden, "mlp.up_proj.weight", i);
        add_array(t, &b->mlp.down, deep, hidden, inter, "mlp.down_proj.weight", i);
    }
    add_array(t, &m->final_norm, 1, 0, hidden, "model.norm.weight", -1);
    add_array(t, &m->lm_head, 0.8f, m->n_vocab, hidden, "lm_head.weight", -1);
}

static int64_t param_size(const param *p) { return (p->out > 0 ? p->out : 1) * p->in; }

static double unit(uint64_t *seed) { return ((double)(engine_random(seed) >> 11) + 0.5) / 9007199254740992.0; }
static float normal(uint64_t *seed) {
    double radius = sqrt(-2 * log(unit(seed)));
    return (float)(radius * cos(6.283185307179586 * unit(seed)));
}
/* Each tensor has a random stream of its own; but lm_head starts as the embedding, so that saying a token that was read is half learned.
   There are no biases, so a head can attend by position only along a direction that all tokens share: the embeddings begin with one. */
static void initialise(const trainer *t, const param *p, float *w) {
    const uint64_t first = (uint64_t)t->set.seed * 1000003u;
    uint64_t seed = p->address == &t->model.lm_head ? first : first + (uint64_t)(p - t->params);
    const int64_t shared = p->address == &t->model.embedding ? p->in / 16 : 0;
    for (int64_t i = 0; i < param_size(p); i++) {
        w[i] = p->out > 0 ? p->init / sqrtf((float)p->in) * normal(&seed) : p->init;
        if (i % p->in < shared) w[i] = 1;
    }
}

/* A model of random weights: for recall small, for text of tiny-dsa's shape. */
static void new_model(trainer *t) {
    engine_model *m = &t->model;
    dsa_config *c = &m->dsa;
    const int text = t->set.text != 0;
    memset(m, 0, sizeof *m);
    strcpy(m->type, "deepseek_v32");
    m->n_vocab = 256;
    m->n_layers = text ? 4 : 2;
    m->dim_hidden = c->dim_hidden = text ? 256 : 128;
    m->dim_inter = text ? 768 : 256;
    m->norm_eps = c->norm_eps = 1e-6f;
    m->max_positions = 65536;
    c->n_heads = text ? 8 : 4;
    c->dim_latent = text ? 128 : 64;
    c->dim_rope = 16;
    c->dim_q_lora = text ? 128 : 64;
    c->dim_nope = c->dim_v = 32;
    c->n_index_heads = 8;
    c->dim_index = 32;
    c->rope_theta = text ? 100000 : 10000;
    m->blocks = (engine_block *)engine__keep(m, (size_t)m->n_layers, sizeof *m->blocks);
    if (m->blocks == NULL) die("%s", m->error);
    for (int32_t i = 0; i < m->n_layers; i++) {
        m->blocks[i].has_indexer = 1;
        m->blocks[i].mlp.inter = m->dim_inter;
    }
}

/* config.json of a new model. transformers wants the fields of the experts, too, where there are none. */
static void new_config(trainer *t) {
    const engine_model *m = &t->model;
    const dsa_config *c = &m->dsa;
    const size_t size = 4096;
    char kinds[400] = "", mlps[200] = "";
    for (int32_t i = 0; i < m->n_layers; i++) {          /* 4 at most */
        strcat(kinds, i == 0 ? "\"deepseek_sparse_attention\"" : ", \"deepseek_sparse_attention\"");
        strcat(mlps, i == 0 ? "\"dense\"" : ", \"dense\"");
    }
    t->config = (char *)must(malloc(size));
    int n = snprintf(t->config, size,
        "{\n  \"architectures\": [\"DeepseekV32ForCausalLM\"],\n  \"model_type\": \"deepseek_v32\",\n  \"dtype\": \"float32\",\n"
        "  \"attention_bias\": false,\n  \"attention_dropout\": 0.0,\n  \"bos_token_id\": 0,\n  \"eos_token_id\": 0,\n"
        "  \"pad_token_id\": null,\n  \"hidden_act\": \"silu\",\n  \"initializer_range\": 0.02,\n  \"mlp_bias\": false,\n"
        "  \"moe_intermediate_size\": 256,\n  \"n_group\": 1,\n  \"n_routed_experts\": 4,\n  \"n_shared_experts\": 1,\n"
        "  \"norm_topk_prob\": true,\n  \"num_experts_per_tok\": 2,\n  \"routed_scaling_factor\": 2.5,\n  \"topk_group\": 1,\n"
        "  \"tie_word_embeddings\": false,\n  \"use_cache\": true,\n  \"layer_types\": [%s],\n  \"mlp_layer_types\": [%s],\n",
        kinds, mlps);
    n += snprintf(t->config + n, size - (size_t)n,
        "  \"vocab_size\": %d,\n  \"num_hidden_layers\": %d,\n  \"first_k_dense_replace\": %d,\n  \"hidden_size\": %d,\n"
        "  \"intermediate_size\": %d,\n  \"max_position_embeddings\": %lld,\n  \"rms_norm_eps\": %g,\n",
        (int)m->n_vocab, (int)m->n_layers, (int)m->n_layers, (int)m->dim_hidden, (int)m->dim_inter, (long long)m->max_positions,
        (double)m->norm_eps);
    snprintf(t->config + n, size - (size_t)n,
        "  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n  \"q_lora_rank\": %d,\n  \"kv_lora_rank\": %d,\n"
        "  \"qk_head_dim\": %d,\n  \"qk_nope_head_dim\": %d,\n  \"qk_rope_head_dim\": %d,\n  \"head_dim\": %d,\n  \"v_head_dim\": %d,\n"
        "  \"index_head_dim\": %d,\n  \"index_n_heads\": %d,\n  \"index_topk\": %lld,\n"
        "  \"rope_parameters\": {\"rope_theta\": %.17g, \"rope_type\": \"default\"}\n}\n",
        (int)c->n_heads, (int)c->n_heads, (int)c->dim_q_lora, (int)c->dim_latent, (int)(c->dim_nope + c->dim_rope), (int)c->dim_nope,
        (int)c->dim_rope, (int)c->dim_rope, (int)c->dim_v, (int)c->dim_index, (int)c->n_index_heads, (long long)t->set.top_k,
        c->rope_theta);
}

/* The value behind "key": in the config, a number or a string, becomes another one. Keys that are not there stay away. */
static void change_config(trainer *t, const char *key, const char *value) {
    char quoted[40];
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    char *at = strstr(t->config, quoted);
    if (at == NULL) return;
    at += strlen(quoted);
    at += strspn(at, " \t\r\n:");
    const char *rest = at + strcspn(at, ",}\r\n");
    const size_t before = (size_t)(at - t->config), size = before + strlen(value) + strlen(rest) + 1;
    char *text = (char *)must(malloc(size));
    snprintf(text, size, "%.*s%s%s", (int)before, t->config, value, rest);
    free(t->config);
    t->config = text;
}

/* A model from a folder, as f32. Its config goes into what is saved, with this run's k and the type that is saved. */
static void load_model(trainer *t, const char *dir) {
    char path[1100], why[400], k[24];
    size_t n;
    engine_model *m = &t->model;
    if (engine_load_dir(m, dir, 0) != 0) die("%s", m->error);
    for (int32_t i = 0; i < m->n_layers; i++)
        if (!m->blocks[i].has_indexer || m->blocks[i].experts != NULL)
            die("%s: models with shared indexers or experts are not trained here", dir);
    if (m->tied) die("%s: models with tied embeddings are not trained here", dir);
    if (m->n_vocab != 256) die("%s: vocab_size is not 256: both tasks are made of bytes", dir);
    snprintf(path, sizeof path, "%s/config.json", dir);
    if ((t->config = st_read_file(path, &n, why, sizeof why)) == NULL) die("%s", why);
    t->config = (char *)must(realloc(t->config, n + 1));
    t->config[n] = '\0';
    if (strstr(t->config, "\"quantization_config\"") != NULL) die("%s: quantised models are not trained here", dir);
    snprintf(k, sizeof k, "%lld", (long long)t->set.top_k);
    change_config(t, "index_topk", k);
    change_config(t, "dtype", "\"float32\"");
    change_config(t, "torch_dtype", "\"float32\"");
}

/* Flat arrays for weights, gradients and moments, filled from the loaded model or at random, and the engine's pointers into them. */
static void open_params(trainer *t, int loaded, int reset_indexer) {
    list_params(t);
    t->w = floats(t->n_weights);
    t->g = floats(t->n_weights);
    t->m = floats(t->n_weights);
    t->v = floats(t->n_weights);
    for (int32_t i = 0; i < t->n_params; i++) {
        const param *p = &t->params[i];
        float *w = t->w + p->at;
        const void *from = p->tensor != NULL ? p->tensor->data : *p->address;
        if (!loaded || (reset_indexer && p->indexer)) initialise(t, p, w);
        else memcpy(w, from, (size_t)param_size(p) * sizeof *w);
        if (p->tensor != NULL) p->tensor->data = w;
        else *p->address = w;
    }
}

/* ---- data ------------------------------------------------------------------------------------------------ */
/* Associative recall: up to 64 pairs of a key in [0, 64) and a value in [64, 128), then every key once more, in another order, each to be
   answered with its value. Noise from [128, 256) lies between the two halves, and in place of the answers: shown, they would let a model
   of few pairs guess what is left over. Short sequences draw their keys from fewer, so that each is met often. */
enum { PAIRS = 64 };
static void shuffle(uint64_t *seed, int32_t n, int32_t *x) {
    for (int32_t i = 0; i < n; i++) x[i] = i;
    for (int32_t i = n - 1; i > 0; i--) {
        const int32_t j = (int32_t)needle__below(seed, i + 1), kept = x[i];
        x[i] = x[j];
        x[j] = kept;
    }
}
static int32_t noise(uint64_t *seed) { return 2 * PAIRS + (int32_t)needle__below(seed, 256 - 2 * PAIRS); }
static void make_recall(uint64_t *seed, int32_t n, int32_t *tokens, int32_t *targets) {
    int32_t key[PAIRS], value[PAIRS], order[PAIRS], pairs = n / 4 < PAIRS ? n / 4 : PAIRS, at = 0;
    shuffle(seed, 2 * pairs < PAIRS ? 2 * pairs : PAIRS, key);
    shuffle(seed, pairs, order);
    for (int32_t i = 0; i < n; i++) targets[i] = -1;
    for (int32_t i = 0; i < pairs; i++) {
        tokens[at++] = key[i];
        tokens[at++] = value[i] = PAIRS + (int32_t)needle__below(seed, PAIRS);
    }
    while (at < n - 2 * pairs) tokens[at++] = noise(seed);
    for (int32_t i = 0; i < pairs; i++) {
        tokens[at] = key[order[i]];
        targets[at++] = value[order[i]];
        tokens[at++] = noise(seed);
    }
}

/* Every byte but the last has its successor to say. */
static void make_text(const trainer *t, uint64_t *seed, int32_t n, int32_t *tokens, int32_t *targets) {
    needle_document d;
    if (needle_document_make(&d, &t->text, n, seed) != 0) die("out of memory");
    for (int32_t i = 0; i < n; i++) {
        tokens[i] = d.tokens[i];
        targets[i] = i + 1 < n ? d.tokens[i + 1] : -1;
    }
    needle_document_free(&d);
}

/* The dense stage of recall begins with short sequences: there the task is learned in 200 steps, at 512 tokens not in thousands. When the
   loss, a running mean over about ten steps, has come down to NEXT_RUNG nats, the context doubles. */
enum { FIRST_CONTEXT = 16 };
static const double NEXT_RUNG = 0.3;
static int64_t rung_context(const trainer *t) {
    const int64_t context = (int64_t)FIRST_CONTEXT << t->rung;
    return t->set.text != 0 || context > t->set.context ? t->set.context : context;
}
static void climb(trainer *t, double loss) {
    t->rung_weight = 0.9 * t->rung_weight + 0.1;
    t->rung_loss += (loss - t->rung_loss) * 0.1 / t->rung_weight;
    if (t->rung_weight < 0.5 || t->rung_loss > NEXT_RUNG || rung_context(t) == t->set.context) return;
    t->rung++;
    t->rung_loss = t->rung_weight = 0;
}

/* The batch of a step, dealt out to the shards: a function of seed, step and rung alone. */
static void make_batch(trainer *t) {
    uint64_t seed = (uint64_t)t->set.seed * 0x9E3779B9u + (uint64_t)t->step * 0x85EBCA6Bu + 77;
    const int64_t context = t->stage == DENSE ? rung_context(t) : t->stage == WARM_UP ? t->set.warm_context : t->set.context;
    const int64_t sequences = t->set.batch > context ? t->set.batch / context : 1;
    t->n = (int32_t)context;
    t->n_targets = 0;
    t->n_rows = sequences * context;
    for (int k = 0; k < SHARDS; k++) t->shards[k].sequences = 0;
    for (int64_t i = 0; i < sequences; i++) {
        shard *s = &t->shards[i % SHARDS];
        int32_t *tokens = s->tokens + s->sequences * context, *targets = s->targets + s->sequences * context;
        s->sequences++;
        if (t->set.text) make_text(t, &seed, t->n, tokens, targets);
        else make_recall(&seed, t->n, tokens, targets);
        for (int32_t k = 0; k < t->n; k++) t->n_targets += targets[k] >= 0;
    }
}

/* ---- one step -------------------------------------------------------------------------------------------- */
/* Where the shard gathers the gradient of a weight: g is laid out as w is. */
static float *gradient(const shard *s, const void *w) { return s->g + ((const float *)w - s->t->w); }

static void open_shard(trainer *t, shard *s) {
    const engine_model *m = &t->model;
    const int64_t longest = t->set.context > t->set.warm_context ? t->set.context : t->set.warm_context;
    const int64_t rows = t->set.batch / SHARDS + longest;                /* the last sequence may not fill its share */
    const int64_t sequences = rows / (longest < FIRST_CONTEXT ? longest : FIRST_CONTEXT) + 1;
    const int64_t state = rows * m->dim_hidden, inner = rows * m->dim_inter;
    dsa_config c = m->dsa;
    s->t = t;
    c.top_k = (int32_t)t->set.top_k;
    c.isa = t->isa;
    c.detail = s->detail;
    c.detail_size = sizeof s->detail;
    check(s, dsa_init(&s->ctx, &c), "dsa_init");
    s->g = floats(t->n_weights);
    s->grads = (dsa_layer_grads *)zeros(m->n_layers, sizeof *s->grads);
    s->layers = (layer_state *)zeros(m->n_layers, sizeof *s->layers);
    for (int32_t i = 0; i < m->n_layers; i++) {
        const dsa_layer_weights *a = &m->blocks[i].attention;
        dsa_layer_grads *g = &s->grads[i];
        layer_state *l = &s->layers[i];
        g->q_a = gradient(s, a->q_a.data);
        g->q_a_norm = gradient(s, a->q_a_norm.data);
        g->q_b = gradient(s, a->q_b.data);
        g->kv_a = gradient(s, a->kv_a.data);
        g->kv_a_norm = gradient(s, a->kv_a_norm.data);
        g->kv_b = gradient(s, a->kv_b.data);
        g->o = gradient(s, a->o.data);
        g->index_q_b = gradient(s, a->index_q_b.data);
        g->index_k = gradient(s, a->index_k.data);
        g->index_k_norm = gradient(s, a->index_k_norm.data);
        g->index_k_bias = gradient(s, a->index_k_bias.data);
        g->index_w = gradient(s, a->index_w.data);
        l->x0 = floats(state);
        l->n1 = floats(state);
        l->x1 = floats(state);
        l->n2 = floats(state);
        l->gate = floats(inner);
        l->up = floats(inner);
        l->act = floats(inner);
        l->lists = ints(rows * t->set.top_k);
        l->latent = (dsa_cache *)zeros(sequences, sizeof *l->latent);
        l->index = (dsa_cache *)zeros(sequences, sizeof *l->index);
    }
    float **const states[7] = { &s->x, &s->y, &s->d_x, &s->d_y, &s->d_n, &s->normed, &s->picked };
    float **const inners[3] = { &s->d_act, &s->d_gate, &s->d_up };
    for (int i = 0; i < 7; i++) *states[i] = floats(state);
    for (int i = 0; i < 3; i++) *inners[i] = floats(inner);
    s->logits = floats(rows * m->n_vocab);
    s->kl = floats(rows);
    s->tokens = ints(rows);
    s->targets = ints(rows);
    s->asked = ints(rows);
    s->seqs = (dsa_seq *)zeros(sequences, sizeof *s->seqs);
}

static void *workspace(shard *s, size_t bytes) {
    if (bytes > s->workspace_size) {
        free(s->workspace);
        s->workspace = must(malloc(bytes));
        s->workspace_size = bytes;
    }
    return s->workspace;
}

static void clear(float *x, int64_t n) { memset(x, 0, (size_t)n * sizeof *x); }
static void copy(float *to, const float *from, int64_t n) { memcpy(to, from, (size_t)n * sizeof *to); }
static void add_to(float *x, const float *y, int64_t n) { for (int64_t i = 0; i < n; i++) x[i] += y[i]; }

/* y = x W^T, W [out, in]. */
static void linear(shard *s, int64_t rows, int64_t out, int64_t in, const float *w, const float *x, float *y) {
    dsa_linear_args a;
    memset(&a, 0, sizeof a);
    a.n_rows = rows;
    a.dim_in = (int32_t)in;
    a.dim_out = (int32_t)out;
    a.w.data = w;
    a.x = x;
    a.y = y;
    check(s, dsa_linear_workspace(&s->ctx, &a, &a.workspace_size), "dsa_linear_workspace");
    a.workspace = workspace(s, a.workspace_size);
    check(s, dsa_linear(&s->ctx, &a), "dsa_linear");
}
/* Adds to d_x, and to the gradient of W. */
static void linear_backward(shard *s, int64_t rows, int64_t out, int64_t in, const float *w, const float *x, const float *d_y, float *d_x) {
    dsa_linear_args a;
    memset(&a, 0, sizeof a);
    a.n_rows = rows;
    a.dim_in = (int32_t)in;
    a.dim_out = (int32_t)out;
    a.w.data = w;
    a.x = x;
    a.d_y = d_y;
    a.d_x = d_x;
    a.d_w = gradient(s, w);
    check(s, dsa_linear_workspace(&s->ctx, &a, &a.workspace_size), "dsa_linear_workspace");
    a.workspace = workspace(s, a.workspace_size);
    check(s, dsa_linear_backward(&s->ctx, &a), "dsa_linear_backward");
}

static void norm(const shard *s, int64_t rows, const float *gain, const float *x, float *y) {
    const engine_model *m = &s->t->model;
    copy(y, x, rows * m->dim_hidden);
    dsa_rms_norm(y, rows, m->dim_hidden, m->dim_hidden, gain, m->norm_eps);
}
static void norm_backward(const shard *s, int64_t rows, const float *gain, const float *x, const float *d_y, float *d_x) {
    const engine_model *m = &s->t->model;
    const dsa_status status =
        dsa_rms_norm_backward(x, d_y, rows, m->dim_hidden, m->dim_hidden, gain, m->norm_eps, d_x, gradient(s, gain));
    check(s, status, "dsa_rms_norm_backward");
}

/* act = silu(gate) up */
static void swiglu(const layer_state *l, int64_t n) {
    for (int64_t i = 0; i < n; i++) l->act[i] = l->gate[i] / (1.0f + expf(-l->gate[i])) * l->up[i];
}
static void swiglu_backward(shard *s, const layer_state *l, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float sigmoid = 1.0f / (1.0f + expf(-l->gate[i])), g = l->gate[i], d = s->d_act[i];
        s->d_up[i] = d * g * sigmoid;
        s->d_gate[i] = d * l->up[i] * sigmoid * (1.0f + g * (1.0f - sigmoid));
    }
}

/* The loss of the rows that have a target; their logits become the loss's derivative, softmax - one. Both are means over all shards. */
static double cross_entropy(shard *s) {
    const int32_t vocab = s->t->model.n_vocab;
    const float part = 1.0f / (float)s->t->n_targets;
    double loss = 0;
    for (int32_t r = 0; r < s->n_asked; r++) {
        float *x = s->logits + (int64_t)r * vocab, max = x[0], sum = 0;
        const int32_t target = s->targets[s->asked[r]];
        for (int32_t i = 1; i < vocab; i++) max = x[i] > max ? x[i] : max;
        loss += (double)(max - x[target]);
        for (int32_t i = 0; i < vocab; i++) { x[i] = expf(x[i] - max); sum += x[i]; }
        loss += log((double)sum);
        for (int32_t i = 0; i < vocab; i++) x[i] *= part / sum;
        x[target] -= part;
    }
    return loss * (double)part;
}

/* A layer's caches for this step's sequences, empty. They are kept from step to step where they are long enough. */
static void empty_caches(shard *s, layer_state *l) {
    for (int32_t i = 0; i < s->sequences; i++) {
        dsa_cache_desc d;
        if (l->latent[i].data != NULL && dsa_cache_capacity(&l->latent[i]) >= s->t->n) {
            check(s, dsa_cache_truncate(&s->ctx, &l->latent[i], 0), "dsa_cache_truncate");
            check(s, dsa_cache_truncate(&s->ctx, &l->index[i], 0), "dsa_cache_truncate");
            continue;
        }
        dsa_cache_destroy(&l->latent[i]);
        dsa_cache_destroy(&l->index[i]);
        memset(&d, 0, sizeof d);
        d.capacity = s->t->n;
        check(s, dsa_cache_create(&s->ctx, &d, &l->latent[i]), "dsa_cache_create");
        d.kind = DSA_INDEX_KEY;
        check(s, dsa_cache_create(&s->ctx, &d, &l->index[i]), "dsa_cache_create");
    }
}

/* What dsa_layer and dsa_layer_backward have in common. */
static dsa_layer_args layer_args(shard *s, int32_t i) {
    layer_state *l = &s->layers[i];
    dsa_layer_args a;
    memset(&a, 0, sizeof a);
    for (int32_t k = 0; k < s->sequences; k++) {
        s->seqs[k].latent = &l->latent[k];
        s->seqs[k].index = &l->index[k];
        s->seqs[k].len = 0;
        s->seqs[k].n_q = s->t->n;
    }
    a.weights = &s->t->model.blocks[i].attention;
    a.n_seqs = s->sequences;
    a.seqs = s->seqs;
    a.x = l->n1;
    a.mode = s->t->stage == SPARSE ? DSA_LAYER_SPARSE : DSA_LAYER_DENSE;
    return a;
}

/* From the tokens to the loss. In the sparse stage the lists that attention saw are kept. */
static void forward(shard *s, int64_t rows) {
    const engine_model *m = &s->t->model;
    const int64_t hidden = m->dim_hidden;
    for (int64_t r = 0; r < rows; r++) copy(s->x + r * hidden, m->embedding + s->tokens[r] * hidden, hidden);
    for (int32_t i = 0; i < m->n_layers; i++) {
        layer_state *l = &s->layers[i];
        const engine_block *b = &m->blocks[i];
        empty_caches(s, l);
        copy(l->x0, s->x, rows * hidden);
        norm(s, rows, b->input_norm, l->x0, l->n1);
        dsa_layer_args a = layer_args(s, i);
        a.y = s->y;
        a.indices_out = s->t->stage == SPARSE ? l->lists : NULL;
        check(s, dsa_layer_workspace(&s->ctx, &a, &a.workspace_size), "dsa_layer_workspace");
        a.workspace = workspace(s, a.workspace_size);
        check(s, dsa_layer(&s->ctx, &a), "dsa_layer");
        add_to(s->x, s->y, rows * hidden);

        copy(l->x1, s->x, rows * hidden);
        norm(s, rows, b->post_norm, l->x1, l->n2);
        linear(s, rows, b->mlp.inter, hidden, b->mlp.gate, l->n2, l->gate);
        linear(s, rows, b->mlp.inter, hidden, b->mlp.up, l->n2, l->up);
        swiglu(l, rows * b->mlp.inter);
        linear(s, rows, hidden, b->mlp.inter, b->mlp.down, l->act, s->y);
        add_to(s->x, s->y, rows * hidden);
    }
    s->n_asked = 0;
    for (int64_t r = 0; r < rows; r++)
        if (s->targets[r] >= 0) {
            copy(s->picked + s->n_asked * hidden, s->x + r * hidden, hidden);
            s->asked[s->n_asked++] = (int32_t)r;
        }
    norm(s, s->n_asked, m->final_norm, s->picked, s->normed);
    linear(s, s->n_asked, m->n_vocab, hidden, m->lm_head, s->normed, s->logits);
    s->loss = cross_entropy(s);
}

/* From the loss to the gradients of what the stage trains; d_x is that of the residual stream. In the warm-up the model rests: each layer's
   indexer has its own loss, and nothing flows from layer to layer. */
static void backward(shard *s, int64_t rows) {
    const engine_model *m = &s->t->model;
    const int stage = s->t->stage;
    const int64_t hidden = m->dim_hidden;
    s->kl_sum = 0;
    clear(s->d_x, rows * hidden);
    if (stage != WARM_UP) {
        clear(s->d_n, rows * hidden);
        clear(s->d_y, rows * hidden);
        linear_backward(s, s->n_asked, m->n_vocab, hidden, m->lm_head, s->normed, s->logits, s->d_n);
        norm_backward(s, s->n_asked, m->final_norm, s->picked, s->d_n, s->d_y);
        for (int64_t r = 0; r < s->n_asked; r++) copy(s->d_x + s->asked[r] * hidden, s->d_y + r * hidden, hidden);
    }
    for (int32_t i = m->n_layers - 1; i >= 0; i--) {
        layer_state *l = &s->layers[i];
        const engine_block *b = &m->blocks[i];
        const int64_t inter = b->mlp.inter;
        if (stage != WARM_UP) {
            clear(s->d_act, rows * inter);
            clear(s->d_n, rows * hidden);
            linear_backward(s, rows, hidden, inter, b->mlp.down, l->act, s->d_x, s->d_act);
            swiglu_backward(s, l, rows * inter);
            linear_backward(s, rows, inter, hidden, b->mlp.gate, l->n2, s->d_gate, s->d_n);
            linear_backward(s, rows, inter, hidden, b->mlp.up, l->n2, s->d_up, s->d_n);
            norm_backward(s, rows, b->post_norm, l->x1, s->d_n, s->d_x);
            clear(s->d_n, rows * hidden);
        }
        dsa_layer_backward_args a;
        memset(&a, 0, sizeof a);
        a.layer = layer_args(s, i);
        a.layer.indices_in = stage == SPARSE ? l->lists : NULL;
        a.d_y = stage != WARM_UP ? s->d_x : NULL;
        a.d_x = stage != WARM_UP ? s->d_n : NULL;
        a.grads = &s->grads[i];
        a.index_weight = stage != DENSE ? 1.0f / (float)s->t->n_rows : 0.0f;
        a.index_loss = stage != DENSE ? s->kl : NULL;
        check(s, dsa_layer_backward_workspace(&s->ctx, &a, &a.layer.workspace_size), "dsa_layer_backward_workspace");
        a.layer.workspace = workspace(s, a.layer.workspace_size);
        check(s, dsa_layer_backward(&s->ctx, &a), "dsa_layer_backward");
        if (stage != WARM_UP) norm_backward(s, rows, b->input_norm, l->x0, s->d_n, s->d_x);
        if (stage != DENSE)
            for (int64_t r = 0; r < rows; r++) s->kl_sum += (double)s->kl[r];
    }
    if (stage == WARM_UP) return;
    for (int64_t r = 0; r < rows; r++) add_to(gradient(s, m->embedding) + s->tokens[r] * hidden, s->d_x + r * hidden, hidden);
}

static void shard_task(void *arg, int32_t i) {
    trainer *t = (trainer *)arg;
    for (int32_t k = i; k < SHARDS; k += t->threads) {
        shard *s = &t->shards[k];
        const int64_t rows = (int64_t)s->sequences * t->n;
        if (rows == 0) continue;
        clear(s->g, t->n_weights);
        forward(s, rows);
        backward(s, rows);
    }
}
/* All shards, and their sums in order. kl: mean over rows and layers. */
static void run_batch(trainer *t, double *loss, double *kl) {
    if (t->pool != NULL) dsa_pool_run(t->pool, t->threads, shard_task, t);
    else shard_task(t, 0);
    clear(t->g, t->n_weights);
    *loss = *kl = 0;
    for (int k = 0; k < SHARDS; k++) {
        const shard *s = &t->shards[k];
        if (s->sequences == 0) continue;
        *loss += s->loss;
        *kl += s->kl_sum / ((double)t->n_rows * t->model.n_layers);
        add_to(t->g, s->g, t->n_weights);
    }
}

/* ---- AdamW ----------------------------------------------------------------------------------------------- */
/* Rises over the first 20 steps (a tenth of short stages), then half a cosine down to a tenth. */
static double learning_rate(double highest, int64_t step, int64_t steps) {
    const double rise = steps < 200 ? (double)steps / 10 : 20, at = (double)step;
    if (at < rise) return highest * (at + 1) / (rise + 1);
    return highest * (0.1 + 0.9 * 0.5 * (1 + cos(3.141592653589793 * (at - rise) / ((double)steps - rise))));
}

/* One update of the model (indexer 0) or the indexers (1): gradients clipped to the norm 1 all together, moments 0.9 and 0.98, weight
   decay 0.01 for matrices. */
typedef struct adam_call { trainer *t; int indexer; float clip, rate, m_scale, v_scale; } adam_call;
static void adam_task(void *arg, int32_t task) {
    const adam_call *c = (const adam_call *)arg;
    trainer *t = c->t;
    for (int32_t k = task; k < t->n_params; k += t->threads) {
        const param *p = &t->params[k];
        if (p->indexer != c->indexer) continue;
        const float decay = p->out > 0 ? 0.01f * c->rate : 0.0f;
        float *w = t->w + p->at, *m = t->m + p->at, *v = t->v + p->at;
        const float *g = t->g + p->at;
        for (int64_t i = 0; i < param_size(p); i++) {
            const float d = g[i] * c->clip;
            m[i] = 0.9f * m[i] + 0.1f * d;
            v[i] = 0.98f * v[i] + 0.02f * d * d;
            w[i] -= c->rate * (m[i] * c->m_scale / (sqrtf(v[i] * c->v_scale) + 1e-8f)) + decay * w[i];
        }
    }
}
/* updates: how many these weights have had before, for the correction of moments that began as zero. */
static void adam(trainer *t, int indexer, double rate, int64_t updates) {
    double norm = 0;
    for (int32_t k = 0; k < t->n_params; k++)
        for (int64_t i = 0; t->params[k].indexer == indexer && i < param_size(&t->params[k]); i++) {
            const double d = (double)t->g[t->params[k].at + i];
            norm += d * d;
        }
    norm = sqrt(norm);
    if (!(norm <= 1e30)) die("the gradient is not finite; a lower --lr may help");
    adam_call c;
    c.t = t;
    c.indexer = indexer;
    c.clip = norm > 1 ? (float)(1 / norm) : 1.0f;
    c.rate = (float)rate;
    c.m_scale = (float)(1 / (1 - pow(0.9, (double)updates + 1)));
    c.v_scale = (float)(1 / (1 - pow(0.98, (double)updates + 1)));
    if (t->pool != NULL) dsa_pool_run(t->pool, t->threads, adam_task, &c);
    else adam_task(&c, 0);
}

/* Each stage updates what it trains. The indexers go on in the sparse stage at a third of the warm-up's rate: the rows that they must
   tell apart change slowly by then. */
static void update(trainer *t, int64_t in_stage) {
    const settings *s = &t->set;
    const double rate = learning_rate(s->lr[t->stage], in_stage, s->steps[t->stage]);
    if (t->stage == DENSE) adam(t, 0, rate, in_stage);
    if (t->stage == WARM_UP) adam(t, 1, rate, in_stage);
    if (t->stage == SPARSE) {
        adam(t, 0, rate, s->steps[DENSE] + in_stage);
        adam(t, 1, learning_rate(s->lr[WARM_UP] / 3, in_stage, s->steps[SPARSE]), s->steps[WARM_UP] + in_stage);
    }
}

/* ---- files ----------------------------------------------------------------------------------------------- */
/* A file appears whole or not at all: written beside its place, flushed to the disk, then renamed. */
typedef struct out_file { FILE *f; char path[1100], part[1110]; int error; } out_file;
static void out_open(out_file *o, const char *dir, const char *name) {
    snprintf(o->path, sizeof o->path, "%s/%s", dir, name);
    snprintf(o->part, sizeof o->part, "%s.part", o->path);
    o->f = fopen(o->part, "wb");
    o->error = o->f != NULL ? 0 : errno;
}
static void out_write(out_file *o, const void *data, size_t bytes) {
    if (o->error == 0 && fwrite(data, 1, bytes, o->f) != bytes) o->error = errno;
}
/* 0, or -1 with the old file, if any, as it was. */
static int out_close(out_file *o) {
    if (o->error == 0 && (fflush(o->f) != 0 || fsync(fileno(o->f)) != 0)) o->error = errno;
    if (o->f != NULL && fclose(o->f) != 0 && o->error == 0) o->error = errno;
    if (o->error == 0 && rename(o->part, o->path) != 0) o->error = errno;
    if (o->error == 0) return 0;
    fprintf(stderr, "\ntrain_dsa: %s: %s; what was saved there before is still whole\n", o->path, strerror(o->error));
    if (o->f != NULL) remove(o->part);
    return -1;
}

/* A safetensors file of n_sets arrays laid out like t->w, each tensor as prefix + name; meta is the inside of __metadata__. */
static int save_tensors(const trainer *t, const char *dir, const char *name, int n_sets, const char *const *prefix, float *const *sets,
                        const char *meta) {
    const size_t room = 4096 + strlen(meta) + (size_t)n_sets * (size_t)t->n_params * 240;
    char *header = (char *)must(malloc(room));
    uint64_t bytes, begin = 0;
    size_t at = (size_t)snprintf(header, room, "{\"__metadata__\":{%s}", meta);
    for (int s = 0; s < n_sets; s++)
        for (int32_t k = 0; k < t->n_params; k++) {
            const param *p = &t->params[k];
            const uint64_t end = begin + (uint64_t)param_size(p) * sizeof(float);
            char shape[60];
            if (p->out > 0) snprintf(shape, sizeof shape, "%lld,%lld", (long long)p->out, (long long)p->in);
            else snprintf(shape, sizeof shape, "%lld", (long long)p->in);
            at += (size_t)snprintf(header + at, room - at, ",\"%s%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[%llu,%llu]}",
                                   prefix[s], p->name, shape, (unsigned long long)begin, (unsigned long long)end);
            begin = end;
        }
    header[at++] = '}';
    while (at % 8 != 0) header[at++] = ' ';
    bytes = at;
    out_file o;
    out_open(&o, dir, name);
    out_write(&o, &bytes, 8);
    out_write(&o, header, at);
    for (int s = 0; s < n_sets; s++) out_write(&o, sets[s], (size_t)t->n_weights * sizeof(float));
    free(header);
    return out_close(&o);
}

/* The state comes last: killed in between, a run goes on from the older state, which is as good. */
static int save(const trainer *t, const char *dir) {
    const settings *s = &t->set;
    char meta[1024];
    const char *const none[1] = { "" }, *const three[3] = { "w.", "m.", "v." };
    float *const model[1] = { t->w }, *const state[3] = { t->w, t->m, t->v };
    out_file o;
    out_open(&o, dir, "config.json");
    out_write(&o, t->config, strlen(t->config));
    if (out_close(&o) != 0) return -1;
    if (save_tensors(t, dir, "model.safetensors", 1, none, model, "\"format\":\"pt\"") != 0) return -1;
    int n = snprintf(meta, sizeof meta,
        "\"step\":\"%lld\",\"steps\":\"%lld,%lld,%lld\",\"context\":\"%lld\",\"warm_context\":\"%lld\",\"batch\":\"%lld\","
        "\"top_k\":\"%lld\",",
        (long long)t->step, (long long)s->steps[DENSE], (long long)s->steps[WARM_UP], (long long)s->steps[SPARSE], (long long)s->context,
        (long long)s->warm_context, (long long)s->batch, (long long)s->top_k);
    snprintf(meta + n, sizeof meta - (size_t)n,
        "\"seed\":\"%lld\",\"text\":\"%lld\",\"lr\":\"%.17g,%.17g,%.17g\",\"rung\":\"%lld\",\"rung_state\":\"%.17g,%.17g\"",
        (long long)s->seed, (long long)s->text, s->lr[DENSE], s->lr[WARM_UP], s->lr[SPARSE], (long long)t->rung, t->rung_loss,
        t->rung_weight);
    return save_tensors(t, dir, "state.safetensors", 3, three, state, meta);
}

/* A whole number from the state's metadata. */
static int64_t saved_number(const st_file *f, const char *path, const char *key, int64_t low, int64_t high) {
    const char *text = st_metadata(f, key);
    int64_t x = 0;
    if (text == NULL || engine_parse_int(text, low, high, &x) != 0)
        die("%s: __metadata__: '%s' is missing or out of range: this is no state of a training run", path, key);
    return x;
}
static int three(const char *text, double *x) {
    char more;
    return sscanf(text, "%lf,%lf,%lf%c", &x[0], &x[1], &x[2], &more) == 3 ? 0 : -1;
}

/* What a saved run was about; and, once the model is known, how far it had come. */
static void resume_settings(trainer *t, const st_file *f, const char *path) {
    settings *s = &t->set;
    const char *steps = st_metadata(f, "steps"), *lr = st_metadata(f, "lr"), *rung = st_metadata(f, "rung_state");
    double n[N_STAGES];
    s->context = saved_number(f, path, "context", FIRST_CONTEXT, 1 << 20);
    s->warm_context = saved_number(f, path, "warm_context", FIRST_CONTEXT, 1 << 20);
    s->batch = saved_number(f, path, "batch", 1, 1 << 24);
    s->top_k = saved_number(f, path, "top_k", 1, 1 << 20);
    s->seed = saved_number(f, path, "seed", 0, INT64_MAX);
    s->text = saved_number(f, path, "text", 0, INT64_MAX);
    t->rung = saved_number(f, path, "rung", 0, 20);
    if (steps == NULL || three(steps, n) != 0 || lr == NULL || three(lr, s->lr) != 0 || rung == NULL ||
        sscanf(rung, "%lf,%lf", &t->rung_loss, &t->rung_weight) != 2)
        die("%s: __metadata__: 'steps', 'lr' or 'rung_state' is damaged", path);
    for (int i = 0; i < N_STAGES; i++) {
        if (!(n[i] >= 0 && n[i] <= 1e9 && s->lr[i] > 0)) die("%s: __metadata__: 'steps' or 'lr' is out of range", path);
        s->steps[i] = (int64_t)n[i];
    }
    t->step = saved_number(f, path, "step", 0, s->steps[DENSE] + s->steps[WARM_UP] + s->steps[SPARSE]);
}
static void resume_arrays(trainer *t, const st_file *f, const char *path) {
    const char *const prefix[3] = { "w.", "m.", "v." };
    float *const to[3] = { t->w, t->m, t->v };
    for (int s = 0; s < 3; s++)
        for (int32_t k = 0; k < t->n_params; k++) {
            const param *p = &t->params[k];
            char name[120];
            snprintf(name, sizeof name, "%s%s", prefix[s], p->name);
            const st_tensor *x = st_find(f, name);
            if (x == NULL || strcmp(x->dtype, "F32") != 0 || x->count != param_size(p))
                die("%s: tensor '%s' is missing or has another shape or type", path, name);
            copy(to[s] + p->at, (const float *)x->data, x->count);
        }
}

/* ---- how good is it? ------------------------------------------------------------------------------------- */
typedef struct score { double right, asked, bits, n; } score;

static void score_recall(const trainer *t, engine *e, uint64_t *seed, float *logits, score *r) {
    const int32_t n = (int32_t)t->set.context, vocab = t->model.n_vocab;
    int32_t *tokens = t->shards[0].tokens, *targets = t->shards[0].targets;        /* free between steps */
    make_recall(seed, n, tokens, targets);
    if (engine_reset(e) != 0 || engine_forward(e, tokens, n, logits, n, NULL) != 0) die("%s", e->error);
    for (int32_t i = 0; i < n; i++) {
        const float *x = logits + (int64_t)i * vocab;
        if (targets[i] < 0) continue;
        const int32_t best = engine_argmax(x, vocab);
        double sum = 0;
        for (int32_t k = 0; k < vocab; k++) sum += exp((double)(x[k] - x[best]));
        r->bits += (log(sum) + (double)(x[best] - x[targets[i]])) / log(2.0);
        r->right += best == targets[i];
        r->asked++;
        r->n++;
    }
}
static void score_text(const trainer *t, engine *e, uint64_t *seed, float *logits, score *r) {
    needle_document d;
    needle_result q;
    memset(&q, 0, sizeof q);
    if (needle_document_make(&d, &t->held_out, (int32_t)t->set.context, seed) != 0) die("out of memory");
    if (needle_read(e, &d, logits, &q, NULL, NULL) != 0) die("%s", e->error);
    needle_document_free(&d);
    r->right += (double)q.right;
    r->asked += (double)q.asked;
    r->bits += q.bits;
    r->n += (double)q.n_bytes;
}

/* One kind of attention, by the engine that generate and needle use, on sequences that training has not seen. */
static void evaluate(trainer *t, const char *name, dsa_layer_mode mode, int64_t sequences) {
    engine e;
    engine_options options;
    score r = { 0, 0, 0, 0 };
    uint64_t seed = 0xE7A1u;
    const int64_t n = t->set.context > NEEDLE_CHUNK ? t->set.context : NEEDLE_CHUNK;
    memset(&options, 0, sizeof options);
    options.n_threads = t->threads;
    options.isa = t->isa;
    options.max_tokens = t->set.context;
    options.mode = mode;
    options.top_k = (int32_t)t->set.top_k;
    if (engine_open(&e, &t->model, &options) != 0) die("%s", e.error);
    float *logits = floats(n * t->model.n_vocab);
    for (int64_t s = 0; s < sequences; s++) {
        if (t->set.text) score_text(t, &e, &seed, logits, &r);
        else score_recall(t, &e, &seed, logits, &r);
    }
    free(logits);
    engine_close(&e);
    printf("  %-24s %6.2f %% right   %.4f bits\n", name, 100 * r.right / (r.asked > 0 ? r.asked : 1), r.bits / (r.n > 0 ? r.n : 1));
    fflush(stdout);
}

/* Puts random indexers in place of the trained ones, or those back; g keeps them meanwhile, as it is free between steps. */
static void randomise_indexers(trainer *t, int back) {
    for (int32_t i = 0; i < t->n_params; i++) {
        const param *p = &t->params[i];
        if (!p->indexer) continue;
        if (back) { copy(t->w + p->at, t->g + p->at, param_size(p)); continue; }
        copy(t->g + p->at, t->w + p->at, param_size(p));
        initialise(t, p, t->w + p->at);
    }
}

static void report(trainer *t, int stage, int64_t sequences) {
    char name[48];
    if (sequences == 0) return;
    printf("after the %s stage, %lld sequences of %lld that training has not seen; bits of %s:\n", stage_names[stage], (long long)sequences,
           (long long)t->set.context, t->set.text ? "a byte of the text" : "a value");
    evaluate(t, "dense", DSA_LAYER_DENSE, sequences);
    snprintf(name, sizeof name, "DSA, k = %lld", (long long)t->set.top_k);
    evaluate(t, name, DSA_LAYER_SPARSE, sequences);
    snprintf(name, sizeof name, "window of %lld", (long long)t->set.top_k);
    evaluate(t, name, DSA_LAYER_WINDOW, sequences);
    randomise_indexers(t, 0);
    snprintf(name, sizeof name, "random indexer, k = %lld", (long long)t->set.top_k);
    evaluate(t, name, DSA_LAYER_SPARSE, sequences);
    randomise_indexers(t, 1);
}

/* ---- the run --------------------------------------------------------------------------------------------- */
typedef struct run { const char *dir; int64_t stop, sequences, started_at; double save_every, started; } run;

/* On a terminal one line that changes five times a second; elsewhere a line now and then. */
static void progress(const trainer *t, const run *r, int64_t in_stage, double loss, double kl, double seconds) {
    static double shown;
    const int terminal = isatty(1), last = in_stage + 1 == t->set.steps[t->stage];
    const double now = needle_seconds();
    int64_t left = -t->step - 1;
    if (!last && (terminal ? now - shown < 0.2 : in_stage % 50 != 0)) return;
    shown = now;
    for (int s = 0; s < N_STAGES; s++) left += t->set.steps[s];
    const double eta = (now - r->started) / (double)(t->step + 1 - r->started_at) * (double)left;
    printf("%s%-8s%5lld/%lld  %4lld x %ld  loss %.4f", terminal ? "\r" : "", stage_names[t->stage], (long long)in_stage + 1,
           (long long)t->set.steps[t->stage], (long long)t->n_rows / t->n, (long)t->n, loss);
    if (t->stage != DENSE) printf("  KL %.4f", kl);
    printf("  %6.0f tokens/s  %ld:%02ld left%s%s", (double)t->n_rows / seconds, (long)eta / 60, (long)eta % 60, terminal ? "   " : "",
           terminal && !last ? "" : "\n");
    fflush(stdout);
}

/* Trains from t->step to the end. 0; 1 when it was stopped, after saving; 2 when it could not save. */
static int train(trainer *t, run *r) {
    double saved = needle_seconds(), loss_mean = 0, kl_mean = 0, weight = 0;
    int64_t total = 0;
    for (int s = 0; s < N_STAGES; s++) total += t->set.steps[s];
    r->started = saved;
    r->started_at = t->step;
    if (t->step == 0 && save(t, r->dir) != 0) return 2;  /* what cannot be written is known now, not after hours */
    while (t->step < total) {
        int64_t in_stage = t->step;
        double begin = needle_seconds(), loss, kl;
        for (t->stage = DENSE; in_stage >= t->set.steps[t->stage]; t->stage++) in_stage -= t->set.steps[t->stage];
        if (in_stage == 0) loss_mean = kl_mean = weight = 0;
        make_batch(t);
        run_batch(t, &loss, &kl);
        if (!(loss < 1e30 && kl < 1e30)) die("the loss is not finite; a lower --lr may help");
        update(t, in_stage);
        weight = 0.95 * weight + 0.05;                   /* running means, for the eye */
        loss_mean += (loss - loss_mean) * 0.05 / weight;
        kl_mean += (kl - kl_mean) * 0.05 / weight;
        progress(t, r, in_stage, loss_mean, kl_mean, needle_seconds() - begin);
        if (t->log != NULL) {
            fprintf(t->log, "%s,%lld,%ld,%.6f,%.6f\n", stage_names[t->stage], (long long)in_stage, (long)t->n, loss, kl);
            if (fflush(t->log) != 0) die("the log cannot be written: %s", strerror(errno));
        }
        if (t->stage == DENSE) climb(t, loss);
        t->step++;
        const int last = in_stage + 1 == t->set.steps[t->stage];
        const int stop = interrupted || t->step - r->started_at == r->stop;
        if (stop || last || needle_seconds() - saved >= r->save_every) {
            if (save(t, r->dir) != 0) return 2;
            saved = needle_seconds();
        }
        if (stop && t->step < total) {
            printf("\nstopped after step %lld of %lld and saved; --resume goes on\n", (long long)t->step, (long long)total);
            return 1;
        }
        if (last && t->step < total) report(t, t->stage, r->sequences);
    }
    return 0;
}

/* The text without its last twentieth is for training, that for the evaluation; names are shared. */
static void open_text(trainer *t, const char *path) {
    char why[400];
    if (needle_text_load(&t->text, path, why, sizeof why) != 0) die("%s", why);
    uint64_t sum = 14695981039346656037u;                /* FNV-1a */
    for (size_t i = 0; i < t->text.size; i++) sum = (sum ^ (unsigned char)t->text.bytes[i]) * 1099511628211u;
    t->set.text = (int64_t)(sum >> 2) + 1;
    const size_t held = t->text.size / 20;
    t->held_out = t->text;
    t->text.size -= held;
    t->held_out.bytes += t->text.size;
    t->held_out.size = held;
}

static void open_state(trainer *t, st_file *state, const char *dir, const char *text) {
    char path[1100], why[400];
    snprintf(path, sizeof path, "%s/state.safetensors", dir);
    if (st_open(path, state, why, sizeof why) != 0) die("%s", why);
    resume_settings(t, state, path);
    const int64_t trained_on = t->set.text;
    if (trained_on != 0 && text == NULL) die("%s: this run trains on text: --text FILE is needed again", dir);
    if (trained_on == 0 && text != NULL) die("%s: this run does not train on text", dir);
    if (text != NULL) open_text(t, text);
    if (t->set.text != trained_on) die("%s: this run trains on another text than %s", dir, text);
    load_model(t, dir);
    open_params(t, 1, 0);
    resume_arrays(t, state, path);
}

/* A run begins in a folder without a model: what took hours is not overwritten by a slip. */
static void refuse_occupied(const char *dir) {
    const char *const names[3] = { "config.json", "model.safetensors", "state.safetensors" };
    char path[1100];
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        if (access(path, F_OK) == 0) die("%s is there already: --resume goes on with a run, another --out begins one", path);
    }
}

int main(int argc, char **argv) {
    static trainer t;
    static settings given;       /* 0: not given */
    const char *out = NULL, *text = NULL, *from = NULL, *log_path = NULL, *setting = NULL;
    double steps[N_STAGES] = { -1, -1, -1 };
    int64_t threads = 2, seconds = 60;
    int resume = 0, reset = 0;
    st_file state;
    run r;
    memset(&r, 0, sizeof r);
    r.sequences = 32;
    given.seed = 1;
    for (int i = 1; i < argc; i++) {
        const char *o = argv[i], *v = i + 1 < argc ? argv[i + 1] : "";
        int bad = 0, takes = 1, is_setting = 1;
        if (strcmp(o, "--help") == 0) return fputs(help, stdout) == EOF || fflush(stdout) != 0 ? 2 : 0;
        else if (strcmp(o, "--model") == 0) from = v;
        else if (strcmp(o, "--reset-indexer") == 0) { reset = 1; takes = 0; }
        else if (strcmp(o, "--steps") == 0)
            bad = three(v, steps) != 0 || !(steps[0] >= 0 && steps[1] >= 0 && steps[2] >= 0 && steps[0] + steps[1] + steps[2] <= 1e9);
        else if (strcmp(o, "--lr") == 0) bad = three(v, given.lr) != 0 || !(given.lr[0] > 0 && given.lr[1] > 0 && given.lr[2] > 0);
        else if (strcmp(o, "--context") == 0) bad = engine_parse_int(v, FIRST_CONTEXT, 1 << 20, &given.context);
        else if (strcmp(o, "--warm-context") == 0) bad = engine_parse_int(v, FIRST_CONTEXT, 1 << 20, &given.warm_context);
        else if (strcmp(o, "--batch") == 0) bad = engine_parse_int(v, 1, 1 << 24, &given.batch);
        else if (strcmp(o, "--topk") == 0) bad = engine_parse_int(v, 1, 1 << 20, &given.top_k);
        else if (strcmp(o, "--seed") == 0) bad = engine_parse_int(v, 0, INT64_MAX, &given.seed);
        else {
            is_setting = 0;
            if (strcmp(o, "--resume") == 0) { resume = 1; takes = 0; }
            else if (strcmp(o, "--out") == 0) out = v;
            else if (strcmp(o, "--text") == 0) text = v;
            else if (strcmp(o, "--log") == 0) log_path = v;
            else if (strcmp(o, "--threads") == 0) bad = engine_parse_int(v, 1, 4096, &threads);
            else if (strcmp(o, "--stop") == 0) bad = engine_parse_int(v, 1, INT64_MAX, &r.stop);
            else if (strcmp(o, "--save") == 0) bad = engine_parse_int(v, 0, 1 << 30, &seconds);
            else if (strcmp(o, "--eval") == 0) bad = engine_parse_int(v, 0, 1 << 20, &r.sequences);
            else if (strcmp(o, "--isa") == 0) bad = engine_parse_isa(v, &t.isa);
            else die("unknown option %s (train_dsa --help explains)", o);
        }
        if (bad || (takes && i + 1 >= argc)) die("%s needs another value (train_dsa --help explains)", o);
        if (is_setting) setting = o;
        i += takes;
    }
    if (out == NULL) die("--out is missing (train_dsa --help explains)");
    if (strlen(out) > 1000) die("--out is too long");
    if (reset && from == NULL) die("--reset-indexer needs --model: without one, all weights are random");
    if (resume && setting != NULL) die("--resume goes on with the run as it was: %s cannot be given", setting);
    if (mkdir(out, 0777) != 0 && errno != EEXIST) die("%s: %s", out, strerror(errno));
    t.threads = (int32_t)threads;
    r.dir = out;
    r.save_every = (double)seconds;
    if (resume) open_state(&t, &state, out, text);
    else {
        static const int64_t text_steps[N_STAGES] = { 6000, 300, 1000 }, recall_steps[N_STAGES] = { 600, 300, 400 };
        static const double usual_lr[N_STAGES] = { 1e-3, 2e-3, 3e-4 };
        settings *s = &t.set;
        refuse_occupied(out);
        *s = given;
        if (s->context == 0) s->context = text != NULL ? 2048 : 512;
        if (s->warm_context == 0) s->warm_context = s->context;
        if (s->batch == 0) s->batch = text != NULL ? 8192 : 2048;
        if (s->top_k == 0) s->top_k = text != NULL ? 64 : s->context / 16;
        for (int i = 0; i < N_STAGES; i++) {
            s->steps[i] = steps[i] >= 0 ? (int64_t)steps[i] : text != NULL ? text_steps[i] : recall_steps[i];
            if (!(s->lr[i] > 0)) s->lr[i] = usual_lr[i];
        }
        if (text != NULL && (s->context < NEEDLE_MIN_CONTEXT || s->warm_context < NEEDLE_MIN_CONTEXT))
            die("--context: documents have %d bytes at least", (int)NEEDLE_MIN_CONTEXT);
        if (text != NULL) open_text(&t, text);
        if (from != NULL) load_model(&t, from);
        else { new_model(&t); new_config(&t); }
        open_params(&t, from != NULL, reset);
    }
    if (resume) st_close(&state);
    if (t.threads > 1 && dsa_pool_create(NULL, t.threads, &t.pool) != DSA_OK) die("the threads cannot be started");
    for (int k = 0; k < SHARDS; k++) open_shard(&t, &t.shards[k]);
    if (log_path != NULL && (t.log = fopen(log_path, resume ? "a" : "w")) == NULL) die("%s: %s", log_path, strerror(errno));
    if (t.log != NULL && fseek(t.log, 0, SEEK_END) == 0 && ftell(t.log) == 0) fprintf(t.log, "stage,step,context,loss,kl\n");
    printf("%lld parameters, %d layers, context %lld, k = %lld, %s kernels, %d threads\n", (long long)t.n_weights, (int)t.model.n_layers,
           (long long)t.set.context, (long long)t.set.top_k, dsa_isa_name(dsa_query_isa(&t.shards[0].ctx)), (int)t.threads);
    fflush(stdout);

    struct sigaction action;     /* signal() may be good for one signal only, and Ctrl-C often comes twice */
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    int status = train(&t, &r);
    int last = SPARSE;
    while (last > DENSE && t.set.steps[last] == 0) last--;
    if (status == 0) report(&t, last, r.sequences);
    if (t.log != NULL && fclose(t.log) != 0) { fprintf(stderr, "train_dsa: %s: the log is not complete\n", log_path); status = 2; }
    if (fflush(stdout) != 0 || ferror(stdout)) { fprintf(stderr, "train_dsa: cannot write to standard output\n"); status = 2; }
    return status;
}

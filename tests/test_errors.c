/* Every bad argument gives its documented status, a sentence in the detail buffer, and leaves every cache and output as it was.
   All that a call may write stands in one struct, so that one memcmp sees any change. */
#include "fixture.h"

enum { H = 2, R = 8, RR = 4, W = R + RR, HI = 2, D = 8, K = 4, HID = 12, QL = 6, NOPE = 4, V = 6, CAP = 16, PAGE = 4, LEN = 7, ROWS = 2, WORK = 1 << 18 };

typedef struct world {                       /* what calls write */
    dsa_cache latent, index, other;          /* other: the second sequence's, of whatever kind a test needs */
    unsigned char latent_data[CAP * W * 4], index_data[CAP * D * 4], other_data[CAP * W * 4];
    float out[ROWS * H * R], lse[ROWS * H], max[ROWS * H], sum[ROWS * H], scores[ROWS * CAP], y[ROWS * HID];
    int32_t indices[ROWS * K], counts[ROWS];
    size_t bytes;
} world;
typedef struct inputs {                      /* what they read, and the valid arguments that each test spoils in one place */
    float rows[ROWS * W], keys[ROWS * D], q[ROWS * H * W], iq[ROWS * HI * D], iw[ROWS * HI], x[ROWS * HID], weights[1024];
    int64_t ks[ROWS], ke[ROWS], slots[ROWS];
    dsa_seq seqs[2];
    dsa_layer_weights w;
    dsa_append_args append;
    dsa_score_args score;
    dsa_selection sel;
    dsa_select_args select;
    dsa_merge_topk_args merge;
    dsa_attend_args attend;
    dsa_attend_state state;
    dsa_step_args step;
    dsa_layer_args layer;
    const int32_t *parts_i[2];
    const float *parts_s[2];
} inputs;

static world now, before;
static inputs in;
static dsa_ctx ctx;
static dsa_config config;
static char detail[200];
static unsigned char workspace[WORK];

static dsa_cache cache_over(dsa_kind kind, dsa_type format, int32_t dim, int32_t rope, void *memory, size_t bytes)
{
    dsa_cache_desc d = desc_of(kind, format, CAP, PAGE);
    dsa_cache c;
    d.dim = dim;
    d.dim_rope = rope;
    if (dsa_cache_init(&ctx, &d, memory, bytes, &c) != DSA_OK) { fprintf(stderr, "test set-up: %s\n", detail); abort(); }
    return c;
}

/* A fresh, valid state of the world. */
static void reset(void)
{
    uint64_t s = 77;
    memset(&now, 0, sizeof now);
    memset(&in, 0, sizeof in);
    memset(&config, 0, sizeof config);
    config.n_heads = H;
    config.dim_latent = R;
    config.dim_rope = RR;
    config.n_index_heads = HI;
    config.dim_index = D;
    config.top_k = K;
    config.dim_hidden = HID;
    config.dim_q_lora = QL;
    config.dim_nope = NOPE;
    config.dim_v = V;
    config.detail = detail;
    config.detail_size = sizeof detail;
    if (dsa_init(&ctx, &config) != DSA_OK) { fprintf(stderr, "test set-up: dsa_init refused\n"); abort(); }
    for (size_t i = 0; i < sizeof in.rows / 4; i++) in.rows[i] = rnd_unit(&s);
    for (size_t i = 0; i < sizeof in.keys / 4; i++) in.keys[i] = rnd_unit(&s);
    for (size_t i = 0; i < sizeof in.q / 4; i++) in.q[i] = rnd_unit(&s);
    for (size_t i = 0; i < sizeof in.iq / 4; i++) in.iq[i] = rnd_unit(&s);
    for (size_t i = 0; i < sizeof in.iw / 4; i++) in.iw[i] = rnd_unit(&s);
    for (size_t i = 0; i < sizeof in.x / 4; i++) in.x[i] = rnd_unit(&s);
    for (size_t i = 0; i < sizeof in.weights / 4; i++) in.weights[i] = rnd_unit(&s);
    for (size_t i = 0; i < sizeof now.out / 4; i++) now.out[i] = rnd_unit(&s);
    for (size_t i = 0; i < sizeof now.y / 4; i++) now.y[i] = rnd_unit(&s);
    now.latent = cache_over(DSA_LATENT, DSA_F32, R, RR, now.latent_data, sizeof now.latent_data);
    now.index = cache_over(DSA_INDEX_KEY, DSA_F32, D, 0, now.index_data, sizeof now.index_data);
    now.other = now.latent;
    now.other.data = now.other_data;
    now.latent.len = now.index.len = now.other.len = LEN;
    in.seqs[0] = seq_of(&now.latent, &now.index, ROWS);
    in.seqs[1] = seq_of(&now.other, &now.other, 0);
    in.ke[0] = in.ke[1] = LEN;
    in.slots[0] = 3;
    in.slots[1] = -1;

    in.append.n_seqs = in.score.n_seqs = in.attend.n_seqs = in.step.n_seqs = in.layer.n_seqs = 1;
    in.append.seqs = in.score.seqs = in.attend.seqs = in.step.seqs = in.layer.seqs = in.seqs;
    in.append.latent = in.step.latent = in.rows;
    in.append.index_key = in.step.index_key = in.keys;
    in.score.q = in.step.index_q = in.iq;
    in.score.w = in.step.index_w = in.iw;
    in.attend.q = in.step.q = in.q;
    in.sel.indices = now.indices;
    in.sel.counts = now.counts;
    in.select.n_rows = ROWS;
    in.select.scores = in.weights;
    in.select.n_cols = in.select.stride = CAP;
    in.merge.n_parts = 2;
    in.merge.k_in = K;
    in.merge.n_rows = ROWS;
    in.merge.indices = in.parts_i;
    in.merge.scores = in.parts_s;
    in.parts_i[0] = in.parts_i[1] = now.indices;
    in.parts_s[0] = in.parts_s[1] = in.weights;
    in.state.n_rows = ROWS;
    in.state.max = now.max;
    in.state.sum = now.sum;
    in.state.out = now.out;
    in.attend.indices = now.indices;
    in.attend.ks = in.ks;
    in.attend.ke = in.ke;
    in.step.out = now.out;
    in.step.lse = now.lse;
    in.step.indices = now.indices;
    dsa_tensor *t = &in.w.q_a;                /* twelve alike: all matrices fit in `weights` */
    for (size_t i = 0; i < sizeof in.w / sizeof *t; i++) t[i].data = in.weights;
    in.layer.weights = &in.w;
    in.layer.x = in.x;
    in.layer.y = now.y;
    in.layer.indices_out = now.indices;
    in.score.workspace = in.select.workspace = in.merge.workspace = in.attend.workspace = in.step.workspace = in.layer.workspace = workspace;
    in.score.workspace_size = in.select.workspace_size = in.merge.workspace_size = in.attend.workspace_size = in.step.workspace_size = in.layer.workspace_size = WORK;
}

/* SPOIL one thing, then the call must refuse with WANT, say why, and change nothing. */
#define REFUSES(WANT, SPOIL, CALL) \
    do { reset(); SPOIL; detail[0] = 0; before = now; \
         IS(WANT, CALL); \
         ASSERT(detail[0] != 0); \
         ASSERT_MEM_EQ(&before, &now, sizeof now); } while (0)
/* Without a context there is no buffer to write to. */
#define REFUSES_SILENTLY(WANT, CALL) do { reset(); before = now; IS(WANT, CALL); ASSERT_MEM_EQ(&before, &now, sizeof now); } while (0)
/* The same arguments unspoilt are good. */
#define ACCEPTS(CALL) do { reset(); OK(CALL); } while (0)

TEST every_status_has_a_text(void)
{
    for (int i = 0; i < (int)DSA__STATUS_COUNT; i++) {
        const char *text = dsa_status_text((dsa_status)i);
        ASSERT(text != NULL && text[0] != 0);
        for (int j = 0; j < i; j++) ASSERT(strcmp(text, dsa_status_text((dsa_status)j)) != 0);
    }
    ASSERT(dsa_status_text((dsa_status)999) != NULL);
    ASSERT(dsa_status_text((dsa_status)-1) != NULL);
    ASSERT_EQ_FMT(0, (int)DSA_OK, "%d");
    PASS();
}

#define BAD_CONFIG(WANT, SPOIL) \
    do { reset(); dsa_config c = config; SPOIL; dsa_ctx t, keep; memset(&t, 0x77, sizeof t); keep = t; detail[0] = 0; \
         IS(WANT, dsa_init(&t, &c)); ASSERT(detail[0] != 0); ASSERT_MEM_EQ(&keep, &t, sizeof t); } while (0)

TEST bad_configs(void)
{
    dsa_config c;
    IS(DSA_ERR_NULL, dsa_init(NULL, NULL));
    IS(DSA_ERR_NULL, dsa_config_preset(DSA_GLM_5, NULL));
    IS(DSA_ERR_ARGUMENT, dsa_config_preset((dsa_preset)(DSA_DEEPSEEK_V4_PRO + 1), &c));
    BAD_CONFIG(DSA_ERR_SHAPE, c.n_heads = -3);
    BAD_CONFIG(DSA_ERR_SHAPE, c.dim_latent = -3);
    BAD_CONFIG(DSA_ERR_SHAPE, c.dim_rope = -3);
    BAD_CONFIG(DSA_ERR_SHAPE, c.dim_rope = 5);
    BAD_CONFIG(DSA_ERR_SHAPE, (c.dim_rope = 5, c.index_rope_width = 4));
    BAD_CONFIG(DSA_ERR_SHAPE, (c.dim_rope = 4, c.index_rope_width = 5));
    BAD_CONFIG(DSA_ERR_SHAPE, c.n_index_heads = -3);
    BAD_CONFIG(DSA_ERR_SHAPE, c.dim_index = INT32_MIN);
    BAD_CONFIG(DSA_ERR_SHAPE, c.top_k = -3);
    BAD_CONFIG(DSA_ERR_SHAPE, c.dim_hidden = -3);
    BAD_CONFIG(DSA_ERR_SHAPE, c.dim_q_lora = -3);
    BAD_CONFIG(DSA_ERR_SHAPE, c.dim_nope = -3);
    BAD_CONFIG(DSA_ERR_SHAPE, c.dim_v = INT32_MAX);
    BAD_CONFIG(DSA_ERR_SHAPE, c.index_rope_width = D + 2);
    BAD_CONFIG(DSA_ERR_SHAPE, c.index_rope_offset = D - 2);
    BAD_CONFIG(DSA_ERR_SHAPE, c.index_rope_offset = -1);
    BAD_CONFIG(DSA_ERR_SHAPE, (c.dim_index = 24, c.hadamard = DSA_HADAMARD_ON));
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.hadamard = (dsa_hadamard)7);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.rope_layout = (dsa_rope_layout)7);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.precision = (dsa_precision)7);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.isa = (dsa_isa)77);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.n_threads = -2);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.norm_eps = -1);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.index_norm_eps = NAN);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.softmax_scale = INFINITY);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.rope_theta = -1);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.rope_theta = INFINITY);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.rope_factor = 0.5);
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.rope_original_context = INFINITY);        /* YaRN's ramp would be NaN */
    BAD_CONFIG(DSA_ERR_ARGUMENT, c.rope_beta_slow = NAN);
    PASS();
}

TEST a_detail_text_fits_its_buffer(void)
{
    char small[8];
    reset();
    memset(small, 'x', sizeof small);
    ctx.config.detail = small;
    ctx.config.detail_size = 5;
    IS(DSA_ERR_NULL, dsa_append(&ctx, NULL));
    ASSERT_EQ_FMT(4, (int)strlen(small), "%d");
    ASSERT_EQ_FMT('x', small[5], "%c");               /* not a byte beyond */
    ctx.config.detail_size = 0;
    small[0] = 'y';
    IS(DSA_ERR_NULL, dsa_append(&ctx, NULL));
    ASSERT_EQ_FMT('y', small[0], "%c");
    ctx.config.detail = NULL;
    ctx.config.detail_size = 100;
    IS(DSA_ERR_NULL, dsa_append(&ctx, NULL));
    PASS();
}

TEST bad_caches(void)
{
    static dsa_cache_desc d;
    static unsigned char memory[4096];
#define DESC (d = desc_of(DSA_LATENT, DSA_F32, CAP, PAGE))
    REFUSES(DSA_ERR_NULL, DESC, dsa_cache_bytes(&ctx, &d, NULL));
    REFUSES(DSA_ERR_NULL, DESC, dsa_cache_bytes(&ctx, NULL, &now.bytes));
    REFUSES(DSA_ERR_SHAPE, (DESC, d.capacity = -1), dsa_cache_bytes(&ctx, &d, &now.bytes));
    REFUSES(DSA_ERR_SHAPE, (DESC, d.capacity = 0), dsa_cache_bytes(&ctx, &d, &now.bytes));
    REFUSES(DSA_ERR_SHAPE, (DESC, d.page_size = -1), dsa_cache_bytes(&ctx, &d, &now.bytes));
    REFUSES(DSA_ERR_SHAPE, (DESC, d.dim = -4), dsa_cache_bytes(&ctx, &d, &now.bytes));
    REFUSES(DSA_ERR_FORMAT, (DESC, d.format = DSA_F16), dsa_cache_bytes(&ctx, &d, &now.bytes));
    REFUSES(DSA_ERR_FORMAT, (DESC, d.format = DSA_INT8), dsa_cache_bytes(&ctx, &d, &now.bytes));
    REFUSES(DSA_ERR_FORMAT, (DESC, d.kind = (dsa_kind)5), dsa_cache_bytes(&ctx, &d, &now.bytes));
    REFUSES(DSA_ERR_ARGUMENT, (DESC, d.device = (dsa_device)5), dsa_cache_bytes(&ctx, &d, &now.bytes));
    REFUSES(DSA_ERR_NO_DEVICE, (DESC, d.device = DSA_DEVICE_CUDA), dsa_cache_bytes(&ctx, &d, &now.bytes));
    REFUSES(DSA_ERR_NULL, DESC, dsa_cache_init(&ctx, &d, NULL, sizeof memory, &now.other));
    REFUSES(DSA_ERR_NULL, DESC, dsa_cache_init(&ctx, &d, memory, sizeof memory, NULL));
    REFUSES(DSA_ERR_CAPACITY, DESC, dsa_cache_init(&ctx, &d, memory, CAP * W * 4 - 1, &now.other));
    REFUSES(DSA_ERR_NULL, DESC, dsa_cache_create(&ctx, &d, NULL));
    REFUSES(DSA_ERR_NULL, DESC, dsa_cache_view(&ctx, &d, NULL, 4, 0, NULL, 0, 0, &now.other));
    REFUSES(DSA_ERR_NULL, DESC, dsa_cache_view(&ctx, &d, memory, 4, 0, NULL, 0, 0, NULL));
    REFUSES(DSA_ERR_SHAPE, DESC, dsa_cache_view(&ctx, &d, memory, -1, 0, NULL, 0, 0, &now.other));
    REFUSES(DSA_ERR_SHAPE, DESC, dsa_cache_view(&ctx, &d, memory, 4, PAGE * W * 4 - 1, NULL, 0, 0, &now.other));
    REFUSES(DSA_ERR_ARGUMENT, DESC, dsa_cache_view(&ctx, &d, memory, 4, 0, NULL, 0, -1, &now.other));
    REFUSES(DSA_ERR_TABLE, DESC, dsa_cache_view(&ctx, &d, memory, 4, 0, NULL, 0, CAP + 1, &now.other));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_cache_check(&ctx, NULL));
    REFUSES(DSA_ERR_NULL, now.latent.data = NULL, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_SHAPE, now.latent.page_size = 0, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_SHAPE, now.latent.row_stride = W * 4 - 1, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_SHAPE, now.latent.page_stride = 1, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_SHAPE, now.latent.dim = 0, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_SHAPE, now.latent.hadamard = 1, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_SHAPE, now.latent.dim_rope = DSA_NONE, dsa_cache_check(&ctx, &now.latent));            /* a resolved field: 0 says none */
    REFUSES(DSA_ERR_SHAPE, now.latent.dim_rope = DSA_NONE, dsa_cache_read(&ctx, &now.latent, 0, 1, now.out));
    REFUSES(DSA_ERR_SHAPE, now.index.dim_rope = DSA_NONE, dsa_cache_check(&ctx, &now.index));
    REFUSES(DSA_ERR_ARGUMENT, now.index.hadamard = DSA_HADAMARD_OFF, dsa_cache_check(&ctx, &now.index));   /* a flag, not the enum */
    REFUSES(DSA_ERR_ARGUMENT, now.index.hadamard = -1, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_ARGUMENT, now.latent.hadamard = DSA_HADAMARD_OFF, dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_FORMAT, now.latent.format = DSA_INT8, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_FORMAT, now.latent.kind = (dsa_kind)3, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_NO_DEVICE, now.latent.device = DSA_DEVICE_CUDA, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_OVERFLOW, now.latent.page_stride = SIZE_MAX / 2, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_ARGUMENT, now.latent.len = INT64_MAX, dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_cache_truncate(&ctx, NULL, 0));
    REFUSES(DSA_ERR_ARGUMENT, (void)0, dsa_cache_truncate(&ctx, &now.latent, LEN + 1));
    REFUSES(DSA_ERR_ARGUMENT, (void)0, dsa_cache_truncate(&ctx, &now.latent, -1));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_cache_read(&ctx, NULL, 0, 0, now.out));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_cache_read(&ctx, &now.latent, 0, 1, NULL));
    REFUSES(DSA_ERR_ARGUMENT, (void)0, dsa_cache_read(&ctx, &now.latent, -1, 1, now.out));
    REFUSES(DSA_ERR_ARGUMENT, (void)0, dsa_cache_read(&ctx, &now.latent, 2, 1, now.out));
    REFUSES(DSA_ERR_ARGUMENT, (void)0, dsa_cache_read(&ctx, &now.latent, 0, LEN + 1, now.out));
    ACCEPTS((DESC, dsa_cache_view(&ctx, &d, memory, 4, 0, NULL, 0, CAP, &now.other)));
    ACCEPTS(dsa_cache_check(&ctx, &now.latent));
    PASS();
}

/* Tables: too short, or naming a page outside the pool; entries beyond the rows are not looked at. */
TEST bad_block_tables(void)
{
    static int32_t table[4];
#define TABLE(C, A, B, N) (table[0] = (A), table[1] = (B), table[2] = table[3] = 99, now.C.block_table = table, now.C.n_blocks = (N))
    REFUSES(DSA_ERR_TABLE, TABLE(latent, 0, 1, 1), dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_TABLE, TABLE(latent, 0, 4, 2), dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_TABLE, TABLE(latent, -1, 1, 2), dsa_cache_check(&ctx, &now.latent));
    REFUSES(DSA_ERR_TABLE, TABLE(latent, 0, 99, 2), dsa_attend_add(&ctx, &in.attend, &in.state));
    REFUSES(DSA_ERR_TABLE, TABLE(index, 0, -1, 2), dsa_score(&ctx, &in.score, now.scores, CAP, CAP));
    REFUSES(DSA_ERR_TABLE, TABLE(index, 0, -1, 2), dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_TABLE, TABLE(latent, 0, 1, 3), dsa_append(&ctx, &in.append));   /* 7 + 2 rows reach block 2, whose entry is 99 */
    REFUSES(DSA_ERR_TABLE, TABLE(index, 0, 1, 3), dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_TABLE, TABLE(latent, 0, 1, 3), dsa_step(&ctx, &in.step));
    REFUSES(DSA_ERR_TABLE, TABLE(index, 0, 1, 3), dsa_layer(&ctx, &in.layer));
    REFUSES(DSA_ERR_CAPACITY, TABLE(latent, 0, 1, 2), dsa_append(&ctx, &in.append));
    ACCEPTS((TABLE(latent, 3, 1, 4), dsa_cache_check(&ctx, &now.latent)));
    PASS();
}

TEST bad_batches(void)
{
    dsa_cache bf16, wide;
#define TWO (in.seqs[1].n_q = 1, in.append.n_seqs = in.score.n_seqs = in.attend.n_seqs = in.step.n_seqs = in.layer.n_seqs = 2, in.state.n_rows = 3)
    reset();
    bf16 = cache_over(DSA_LATENT, DSA_BF16, R, RR, now.other_data, sizeof now.other_data);
    wide = cache_over(DSA_LATENT, DSA_F32, R - 2, RR, now.other_data, sizeof now.other_data);
    REFUSES(DSA_ERR_FORMAT, (TWO, now.other = bf16), dsa_attend_add(&ctx, &in.attend, &in.state));
    REFUSES(DSA_ERR_FORMAT, (TWO, now.other = wide), dsa_attend_add(&ctx, &in.attend, &in.state));
    REFUSES(DSA_ERR_FORMAT, in.seqs[0].latent = &now.index, dsa_attend_add(&ctx, &in.attend, &in.state));
    REFUSES(DSA_ERR_FORMAT, in.seqs[0].index = &now.latent, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_FORMAT, (TWO, now.other = now.index, now.other.hadamard = 1), dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_FORMAT, (ctx.config.hadamard = DSA_HADAMARD_ON), dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_FORMAT, (ctx.config.hadamard = DSA_HADAMARD_OFF, now.index.hadamard = 1), dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_FORMAT, (ctx.config.hadamard = DSA_HADAMARD_ON), dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_FORMAT, (ctx.config.hadamard = DSA_HADAMARD_ON), dsa_step(&ctx, &in.step));
    REFUSES(DSA_ERR_FORMAT, (ctx.config.hadamard = DSA_HADAMARD_ON), dsa_layer(&ctx, &in.layer));
    REFUSES(DSA_ERR_SHAPE, in.append.n_seqs = -1, dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_SHAPE, in.score.n_seqs = -1, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_SHAPE, in.attend.n_seqs = -1, dsa_attend_add(&ctx, &in.attend, &in.state));
    REFUSES(DSA_ERR_SHAPE, in.step.n_seqs = -1, dsa_step(&ctx, &in.step));
    REFUSES(DSA_ERR_SHAPE, in.layer.n_seqs = -1, dsa_layer(&ctx, &in.layer));
    REFUSES(DSA_ERR_NULL, in.append.seqs = NULL, dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_NULL, in.step.seqs = NULL, dsa_step(&ctx, &in.step));
    REFUSES(DSA_ERR_NULL, in.layer.seqs = NULL, dsa_layer(&ctx, &in.layer));
    REFUSES(DSA_ERR_SHAPE, in.seqs[0].n_q = -2, dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_SHAPE, in.seqs[0].n_q = INT32_MIN, dsa_attend_add(&ctx, &in.attend, &in.state));
    REFUSES(DSA_ERR_ARGUMENT, in.seqs[0].len = -2, dsa_attend_add(&ctx, &in.attend, &in.state));
    REFUSES(DSA_ERR_ARGUMENT, in.seqs[0].len = INT64_MAX, dsa_attend_add(&ctx, &in.attend, &in.state));
    REFUSES(DSA_ERR_TABLE, in.seqs[0].len = CAP + 1, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_OVERFLOW, (TWO, in.seqs[0].n_q = INT32_MAX, in.seqs[1].n_q = INT32_MAX), dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_OVERFLOW, (TWO, in.seqs[0].n_q = INT32_MAX, in.seqs[1].n_q = INT32_MAX), dsa_score_select(&ctx, &in.score, &in.sel));
    PASS();
}

TEST bad_appends(void)
{
    REFUSES(DSA_ERR_NULL, (void)0, dsa_append(&ctx, NULL));
    REFUSES(DSA_ERR_NULL, in.append.latent = in.append.index_key = NULL, dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_NULL, in.seqs[0].latent = NULL, dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_NULL, in.seqs[0].index = NULL, dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_CAPACITY, now.latent.len = CAP - 1, dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_CAPACITY, now.index.len = CAP, dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_TABLE, (in.append.slots = in.slots, in.slots[1] = CAP), dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_TABLE, (in.append.slots = in.slots, in.slots[1] = -2), dsa_append(&ctx, &in.append));
    REFUSES(DSA_ERR_ARGUMENT, (TWO, now.other.len = 0, in.seqs[1] = in.seqs[0]), dsa_append(&ctx, &in.append));   /* one cache twice */
    ACCEPTS(dsa_append(&ctx, &in.append));
    PASS();
}

TEST bad_scores(void)
{
    REFUSES(DSA_ERR_NULL, (void)0, dsa_score(&ctx, NULL, now.scores, CAP, CAP));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_score(&ctx, &in.score, NULL, CAP, CAP));
    REFUSES(DSA_ERR_SHAPE, (void)0, dsa_score(&ctx, &in.score, now.scores, CAP, CAP - 1));
    REFUSES(DSA_ERR_SHAPE, (void)0, dsa_score(&ctx, &in.score, now.scores, -1, CAP));
    REFUSES(DSA_ERR_NULL, in.score.q = NULL, dsa_score(&ctx, &in.score, now.scores, CAP, CAP));
    REFUSES(DSA_ERR_NULL, in.score.w = NULL, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_NULL, in.score.ks = in.ks, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_NULL, in.score.ke = in.ke, dsa_score(&ctx, &in.score, now.scores, CAP, CAP));
    REFUSES(DSA_ERR_SHAPE, in.score.n_index_heads = -1, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_NULL, in.seqs[0].index = NULL, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_NULL, in.score.workspace = NULL, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_WORKSPACE, in.score.workspace_size = 0, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_score_select(&ctx, &in.score, NULL));
    REFUSES(DSA_ERR_NULL, in.sel.indices = NULL, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_SHAPE, in.sel.top_k = -1, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_ARGUMENT, in.sel.order = (dsa_order)5, dsa_score_select(&ctx, &in.score, &in.sel));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_score_workspace(&ctx, NULL, &now.bytes));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_score_workspace(&ctx, &in.score, NULL));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_score_select_workspace(&ctx, &in.score, &in.sel, NULL));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_score_select_workspace(&ctx, &in.score, NULL, &now.bytes));    /* as the call does */
    REFUSES(DSA_ERR_NULL, (void)0, dsa_select_workspace(&ctx, &in.select, NULL, &now.bytes));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_merge_topk_workspace(&ctx, &in.merge, NULL, &now.bytes));
    ACCEPTS(dsa_score(&ctx, &in.score, now.scores, CAP, CAP));
    ACCEPTS(dsa_score_select(&ctx, &in.score, &in.sel));
    PASS();
}

TEST bad_selections(void)
{
    REFUSES(DSA_ERR_NULL, (void)0, dsa_select(&ctx, NULL, &in.sel));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_select(&ctx, &in.select, NULL));
    REFUSES(DSA_ERR_NULL, in.select.scores = NULL, dsa_select(&ctx, &in.select, &in.sel));
    REFUSES(DSA_ERR_NULL, in.sel.indices = NULL, dsa_select(&ctx, &in.select, &in.sel));
    REFUSES(DSA_ERR_NULL, in.select.ks = in.ks, dsa_select(&ctx, &in.select, &in.sel));
    REFUSES(DSA_ERR_SHAPE, in.select.n_rows = -1, dsa_select(&ctx, &in.select, &in.sel));
    REFUSES(DSA_ERR_SHAPE, in.select.n_cols = -1, dsa_select(&ctx, &in.select, &in.sel));
    REFUSES(DSA_ERR_SHAPE, in.select.stride = CAP - 1, dsa_select(&ctx, &in.select, &in.sel));
    REFUSES(DSA_ERR_SHAPE, in.sel.top_k = -7, dsa_select(&ctx, &in.select, &in.sel));
    REFUSES(DSA_ERR_ARGUMENT, in.sel.order = (dsa_order)-1, dsa_select(&ctx, &in.select, &in.sel));
    REFUSES(DSA_ERR_NULL, in.select.workspace = NULL, dsa_select(&ctx, &in.select, &in.sel));
    REFUSES(DSA_ERR_WORKSPACE, in.select.workspace_size = 1, dsa_select(&ctx, &in.select, &in.sel));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_select_workspace(&ctx, &in.select, &in.sel, NULL));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_merge_topk(&ctx, NULL, &in.sel));
    REFUSES(DSA_ERR_NULL, in.merge.indices = NULL, dsa_merge_topk(&ctx, &in.merge, &in.sel));
    REFUSES(DSA_ERR_NULL, in.parts_s[1] = NULL, dsa_merge_topk(&ctx, &in.merge, &in.sel));
    REFUSES(DSA_ERR_NULL, in.sel.indices = NULL, dsa_merge_topk(&ctx, &in.merge, &in.sel));
    REFUSES(DSA_ERR_SHAPE, in.merge.n_parts = -1, dsa_merge_topk(&ctx, &in.merge, &in.sel));
    REFUSES(DSA_ERR_SHAPE, in.merge.k_in = -1, dsa_merge_topk(&ctx, &in.merge, &in.sel));
    REFUSES(DSA_ERR_SHAPE, in.merge.n_rows = -1, dsa_merge_topk(&ctx, &in.merge, &in.sel));
    REFUSES(DSA_ERR_WORKSPACE, in.merge.workspace_size = 1, dsa_merge_topk(&ctx, &in.merge, &in.sel));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_merge_topk_workspace(&ctx, &in.merge, &in.sel, NULL));
    ACCEPTS(dsa_select(&ctx, &in.select, &in.sel));
    PASS();
}

TEST bad_attention(void)
{
    static const float *parts[2];
#define ADD dsa_attend_add(&ctx, &in.attend, &in.state)
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend_begin(&ctx, NULL));
    REFUSES(DSA_ERR_NULL, in.state.sum = NULL, dsa_attend_begin(&ctx, &in.state));
    REFUSES(DSA_ERR_SHAPE, in.state.n_rows = -1, dsa_attend_begin(&ctx, &in.state));
    REFUSES(DSA_ERR_SHAPE, in.state.n_heads = -1, dsa_attend_begin(&ctx, &in.state));
    REFUSES(DSA_ERR_SHAPE, in.state.dim_v = -1, dsa_attend_begin(&ctx, &in.state));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend_add(&ctx, NULL, &in.state));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend_add(&ctx, &in.attend, NULL));
    REFUSES(DSA_ERR_NULL, in.state.out = NULL, ADD);
    REFUSES(DSA_ERR_NULL, in.attend.q = NULL, ADD);
    REFUSES(DSA_ERR_NULL, in.attend.indices = NULL, ADD);
    REFUSES(DSA_ERR_NULL, (in.attend.what = DSA_ATTEND_RANGE, in.attend.ks = NULL), ADD);
    REFUSES(DSA_ERR_NULL, (in.attend.what = DSA_ATTEND_RANGE, in.attend.ke = NULL), ADD);
    REFUSES(DSA_ERR_NULL, in.seqs[0].latent = NULL, ADD);
    REFUSES(DSA_ERR_NULL, in.attend.workspace = NULL, ADD);
    REFUSES(DSA_ERR_WORKSPACE, in.attend.workspace_size = 10, ADD);
    REFUSES(DSA_ERR_ARGUMENT, in.attend.what = (dsa_attend_what)9, ADD);
    REFUSES(DSA_ERR_ARGUMENT, in.attend.index_kind = (dsa_index_kind)9, ADD);
    REFUSES(DSA_ERR_ARGUMENT, in.attend.scale = NAN, ADD);
    REFUSES(DSA_ERR_ARGUMENT, in.attend.scale = INFINITY, ADD);
    REFUSES(DSA_ERR_SHAPE, in.attend.n_indices = -1, ADD);
    REFUSES(DSA_ERR_SHAPE, in.attend.index_stride = K - 1, ADD);
    REFUSES(DSA_ERR_SHAPE, in.state.n_rows = ROWS + 1, ADD);
    REFUSES(DSA_ERR_SHAPE, in.state.dim_v = W + 1, ADD);
#define WHOLE dsa_attend(&ctx, &in.attend, &in.state, NULL, now.lse, now.max)
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend(&ctx, NULL, &in.state, NULL, now.lse, now.max));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend(&ctx, &in.attend, NULL, NULL, now.lse, now.max));
    REFUSES(DSA_ERR_NULL, in.attend.q = NULL, WHOLE);
    REFUSES(DSA_ERR_NULL, in.state.max = NULL, WHOLE);
    REFUSES(DSA_ERR_WORKSPACE, in.attend.workspace_size = 10, WHOLE);
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend_workspace(&ctx, &in.attend, &in.state, NULL));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend_finish(&ctx, &in.state, NULL, NULL, now.lse, now.max));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend_finish(&ctx, NULL, NULL, now.out, now.lse, now.max));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend_partial(&ctx, &in.state, now.out, NULL));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend_partial(&ctx, &in.state, NULL, now.lse));
    REFUSES(DSA_ERR_NULL, (parts[0] = in.q, parts[1] = NULL), dsa_attend_merge(&ctx, 2, parts, parts, ROWS, H, R, NULL, now.out, now.lse));
    REFUSES(DSA_ERR_NULL, parts[1] = in.q, dsa_attend_merge(&ctx, 2, NULL, parts, ROWS, H, R, NULL, now.out, now.lse));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_attend_merge(&ctx, 2, parts, parts, ROWS, H, R, NULL, NULL, now.lse));
    REFUSES(DSA_ERR_SHAPE, (void)0, dsa_attend_merge(&ctx, -1, parts, parts, ROWS, H, R, NULL, now.out, now.lse));
    REFUSES(DSA_ERR_SHAPE, (void)0, dsa_attend_merge(&ctx, 2, parts, parts, -1, H, R, NULL, now.out, now.lse));
    REFUSES(DSA_ERR_SHAPE, (void)0, dsa_attend_merge(&ctx, 2, parts, parts, ROWS, 0, R, NULL, now.out, now.lse));
    REFUSES(DSA_ERR_SHAPE, (void)0, dsa_attend_merge(&ctx, 2, parts, parts, ROWS, H, 0, NULL, now.out, now.lse));
    ACCEPTS(ADD);
    PASS();
}

TEST bad_steps(void)
{
#define STEP dsa_step(&ctx, &in.step)
    REFUSES(DSA_ERR_NULL, (void)0, dsa_step(&ctx, NULL));
    REFUSES(DSA_ERR_NULL, in.step.latent = NULL, STEP);
    REFUSES(DSA_ERR_NULL, in.step.index_key = NULL, STEP);
    REFUSES(DSA_ERR_NULL, in.step.q = NULL, STEP);
    REFUSES(DSA_ERR_NULL, in.step.index_q = NULL, STEP);
    REFUSES(DSA_ERR_NULL, in.step.index_w = NULL, STEP);
    REFUSES(DSA_ERR_NULL, in.step.out = NULL, STEP);
    REFUSES(DSA_ERR_NULL, in.step.workspace = NULL, STEP);
    REFUSES(DSA_ERR_NULL, in.seqs[0].latent = NULL, STEP);
    REFUSES(DSA_ERR_NULL, in.seqs[0].index = NULL, STEP);
    REFUSES(DSA_ERR_SHAPE, in.step.top_k = -1, STEP);
    REFUSES(DSA_ERR_ARGUMENT, in.step.scale = NAN, STEP);
    REFUSES(DSA_ERR_CAPACITY, now.latent.len = now.index.len = CAP - 1, STEP);
    REFUSES(DSA_ERR_ARGUMENT, now.index.len = CAP, STEP);                    /* a list from one cache addresses the other */
    REFUSES(DSA_ERR_NULL, (void)0, dsa_step_workspace(&ctx, &in.step, NULL));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_step_workspace(&ctx, NULL, &now.bytes));
    ACCEPTS(dsa_step_workspace(&ctx, &in.step, &now.bytes));
    size_t need = now.bytes;
    REFUSES(DSA_ERR_WORKSPACE, in.step.workspace_size = need - 1, STEP);      /* one byte short is refused, the size itself is enough */
    ACCEPTS((in.step.workspace_size = need, STEP));
    PASS();
}

TEST bad_layers(void)
{
#define LAYER dsa_layer(&ctx, &in.layer)
    REFUSES(DSA_ERR_NULL, (void)0, dsa_layer(&ctx, NULL));
    REFUSES(DSA_ERR_NULL, in.layer.weights = NULL, LAYER);
    REFUSES(DSA_ERR_NULL, in.layer.x = NULL, LAYER);
    REFUSES(DSA_ERR_NULL, in.layer.y = NULL, LAYER);
    REFUSES(DSA_ERR_NULL, in.layer.workspace = NULL, LAYER);
    REFUSES(DSA_ERR_NULL, in.seqs[0].latent = NULL, LAYER);
    REFUSES(DSA_ERR_NULL, in.seqs[0].index = NULL, LAYER);
    for (size_t i = 0; i < sizeof in.w / sizeof(dsa_tensor); i++) {
        if (&in.w.q_a + i != &in.w.index_k)           /* index_k NULL says: this layer has no indexer */
            REFUSES(DSA_ERR_NULL, (&in.w.q_a)[i].data = NULL, LAYER);
        REFUSES(DSA_ERR_NULL, (&in.w.q_a)[i].type = DSA_FP8, LAYER);           /* without scales */
        REFUSES(DSA_ERR_FORMAT, (&in.w.q_a)[i].type = DSA_INT8, LAYER);
    }
    REFUSES(DSA_ERR_NULL, in.w.index_k.data = NULL, LAYER);                   /* then it needs a list */
    REFUSES(DSA_ERR_ARGUMENT, in.layer.mode = (dsa_layer_mode)6, LAYER);
    REFUSES(DSA_ERR_CAPACITY, now.latent.len = now.index.len = CAP - 1, LAYER);
    REFUSES(DSA_ERR_ARGUMENT, now.index.len = CAP - 1, LAYER);               /* one length for both caches */
    REFUSES(DSA_ERR_OVERFLOW, ctx.config.n_heads = ctx.config.dim_v = 1 << 16, dsa_layer_workspace(&ctx, &in.layer, &now.bytes));   /* o_proj's width */
    REFUSES(DSA_ERR_NULL, (void)0, dsa_layer_workspace(&ctx, &in.layer, NULL));
    REFUSES(DSA_ERR_NULL, (void)0, dsa_layer_workspace(&ctx, NULL, &now.bytes));
    ACCEPTS(dsa_layer_workspace(&ctx, &in.layer, &now.bytes));
    size_t need = now.bytes;
    REFUSES(DSA_ERR_WORKSPACE, in.layer.workspace_size = need - 1, LAYER);
    ACCEPTS((in.layer.workspace_size = need, LAYER));
    PASS();
}

TEST bad_row_operations(void)
{
    dsa_rope r;
    double f[4];
    const int64_t position = 3;
    float x[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    memset(&r, 0, sizeof r);
    r.width = 4;
    IS(DSA_ERR_NULL, dsa_rms_norm(NULL, 1, 8, 8, x, 1e-6f));
    IS(DSA_ERR_NULL, dsa_rms_norm(x, 1, 8, 8, NULL, 1e-6f));
    IS(DSA_ERR_SHAPE, dsa_rms_norm(x, 1, 8, 0, x, 1e-6f));
    IS(DSA_ERR_SHAPE, dsa_rms_norm(x, -1, 8, 8, x, 1e-6f));
    IS(DSA_ERR_NULL, dsa_layer_norm(x, 1, 8, 8, x, NULL, 1e-6f));
    IS(DSA_ERR_SHAPE, dsa_layer_norm(x, 1, 8, -8, x, x, 1e-6f));
    IS(DSA_ERR_NULL, dsa_hadamard_rows(NULL, 1, 8, 8));
    IS(DSA_ERR_SHAPE, dsa_hadamard_rows(x, 1, 8, 6));
    IS(DSA_ERR_SHAPE, dsa_hadamard_rows(x, 1, 8, 0));
    IS(DSA_ERR_NULL, dsa_rope_rows(NULL, 1, 8, 1, 8, 8, &r, &position, 0));
    IS(DSA_ERR_NULL, dsa_rope_rows(x, 1, 8, 1, 8, 8, NULL, &position, 0));
    IS(DSA_ERR_NULL, dsa_rope_rows(x, 1, 8, 1, 8, 8, &r, NULL, 0));
    r.offset = 6;
    IS(DSA_ERR_SHAPE, dsa_rope_rows(x, 1, 8, 1, 8, 8, &r, &position, 0));
    r.offset = 0;
    r.theta = -1e4;
    IS(DSA_ERR_ARGUMENT, dsa_rope_frequencies(&r, f));
    r.theta = 1;
    IS(DSA_ERR_ARGUMENT, dsa_rope_rows(x, 1, 8, 1, 8, 8, &r, &position, 0));
    r.theta = 0;
    r.width = 3;
    IS(DSA_ERR_SHAPE, dsa_rope_rows(x, 1, 8, 1, 8, 8, &r, &position, 0));
    IS(DSA_ERR_NULL, dsa_rope_frequencies(NULL, f));
    r.width = 4;
    IS(DSA_ERR_NULL, dsa_rope_frequencies(&r, NULL));
    for (int i = 0; i < 8; i++) ASSERT_EQ_FMT((double)(i + 1), (double)x[i], "%g");
    PASS();
}

/* No context, or one that dsa_init has not accepted: refused by every call, not followed. */
TEST a_context_is_required(void)
{
    static dsa_cache_desc d;
    dsa_ctx none;
    memset(&none, 0, sizeof none);
    d = desc_of(DSA_LATENT, DSA_F32, CAP, PAGE);
    for (int i = 0; i < 2; i++) {
        const dsa_ctx *c = i ? &none : NULL;
        dsa_status want = i ? DSA_ERR_ARGUMENT : DSA_ERR_NULL;
        REFUSES_SILENTLY(want, dsa_cache_bytes(c, &d, &now.bytes));
        REFUSES_SILENTLY(want, dsa_cache_init(c, &d, now.other_data, sizeof now.other_data, &now.other));
        REFUSES_SILENTLY(want, dsa_cache_create(c, &d, &now.other));
        REFUSES_SILENTLY(want, dsa_cache_check(c, &now.latent));
        REFUSES_SILENTLY(want, dsa_cache_truncate(c, &now.latent, 0));
        REFUSES_SILENTLY(want, dsa_cache_read(c, &now.latent, 0, 1, now.out));
        REFUSES_SILENTLY(want, dsa_append(c, &in.append));
        REFUSES_SILENTLY(want, dsa_score(c, &in.score, now.scores, CAP, CAP));
        REFUSES_SILENTLY(want, dsa_score_select(c, &in.score, &in.sel));
        REFUSES_SILENTLY(want, dsa_select(c, &in.select, &in.sel));
        REFUSES_SILENTLY(want, dsa_merge_topk(c, &in.merge, &in.sel));
        REFUSES_SILENTLY(want, dsa_attend_begin(c, &in.state));
        REFUSES_SILENTLY(want, dsa_attend_add(c, &in.attend, &in.state));
        REFUSES_SILENTLY(want, dsa_attend_finish(c, &in.state, NULL, now.out, now.lse, now.max));
        REFUSES_SILENTLY(want, dsa_attend_partial(c, &in.state, now.out, now.lse));
        REFUSES_SILENTLY(want, dsa_step(c, &in.step));
        REFUSES_SILENTLY(want, dsa_layer(c, &in.layer));
    }
    PASS();
}

/* A call without rows is no error, and needs none of the pointers. */
TEST nothing_to_do_is_fine(void)
{
    ACCEPTS((in.append.n_seqs = 0, in.append.seqs = NULL, dsa_append(&ctx, &in.append)));
    ACCEPTS((in.seqs[0].n_q = DSA_NONE, in.score.q = NULL, dsa_score_select(&ctx, &in.score, &in.sel)));
    ACCEPTS((in.seqs[0].n_q = DSA_NONE, in.attend.q = NULL, in.state.n_rows = 0, dsa_attend_add(&ctx, &in.attend, &in.state)));
    ACCEPTS((in.seqs[0].n_q = DSA_NONE, in.step.q = NULL, dsa_step(&ctx, &in.step)));
    ACCEPTS((in.seqs[0].n_q = DSA_NONE, in.layer.x = NULL, dsa_layer(&ctx, &in.layer)));
    PASS();
}

SUITE(errors_suite)
{
    RUN_TEST(every_status_has_a_text);
    RUN_TEST(bad_configs);
    RUN_TEST(a_detail_text_fits_its_buffer);
    RUN_TEST(bad_caches);
    RUN_TEST(bad_block_tables);
    RUN_TEST(bad_batches);
    RUN_TEST(bad_appends);
    RUN_TEST(bad_scores);
    RUN_TEST(bad_selections);
    RUN_TEST(bad_attention);
    RUN_TEST(bad_steps);
    RUN_TEST(bad_layers);
    RUN_TEST(bad_row_operations);
    RUN_TEST(a_context_is_required);
    RUN_TEST(nothing_to_do_is_fine);
}

/* The backward pass. Every gradient against central differences of the same formula in double, over odd sizes, duplicates, invalid
   entries, empty rows, sinks, pages, several blocks of keys; then what PyTorch's automatic differentiation gives for whole layers, and
   the promises: no number of threads, no cut of the batch changes a bit; what is not asked for is not touched. */
#include "ref_layer.h"
#include "../examples/safetensors.h"

/* max |got - want| <= 1e-5 max |want| */
#define GRADIENT 1e-5

static double largest(const double *x, int64_t n)
{
    double m = 0;
    for (int64_t i = 0; i < n; i++) m = fmax(m, fabs(x[i]));
    return m;
}
/* Largest |got - want| / max |want|. */
static double gradient_error(const float *got, const double *want, int64_t n)
{
    double worst = 0, scale = fmax(largest(want, n), 1e-30);
    for (int64_t i = 0; i < n; i++) {
        double e = fabs((double)got[i] - want[i]) / scale;
        if (!(e <= worst)) worst = e;
    }
    return worst;
}
static float *zeros(bag *b, int64_t n)
{
    float *x = floats(b, n);
    for (int64_t i = 0; i < n; i++) x[i] = 0;
    return x;
}
static double *widened(bag *b, const float *x, int64_t n)
{
    double *y = doubles(b, n);
    for (int64_t i = 0; i < n; i++) y[i] = (double)x[i];
    return y;
}

/* The gradient `got` of f(user) by the doubles x [n] against central differences at every `step`th place, relative to the largest. The
   differences are of fourth order, so that h can be large enough for f's own rounding. */
typedef double (*scalar)(void *user);
static double difference(scalar f, void *user, double *x)
{
    const double h = 1e-3, at = *x;
    double v[4];
    for (int k = 0; k < 4; k++) { *x = at + h * (k < 2 ? k - 2 : k - 1); v[k] = f(user); }
    *x = at;
    return (v[0] - 8 * v[1] + 8 * v[2] - v[3]) / (12 * h);
}
static double gradient_of(scalar f, void *user, double *x, const float *got, int64_t n, int64_t step)
{
    double worst = 0, scale = 1e-30;
    for (int64_t i = 0; i < n; i += step) {
        double want = difference(f, user, &x[i]), e = fabs((double)got[i] - want);
        if (!(e <= worst)) worst = e;
        scale = fmax(scale, fabs(want));
    }
    return worst / scale;
}

/* ---- row operations ------------------------------------------------------------------------- */
typedef struct norm_case { int layer; int32_t rows, dim; double eps, *x, *gain, *bias, *c; } norm_case;
static double norm_loss(void *user)
{
    norm_case *n = (norm_case *)user;
    double loss = 0;
    for (int32_t t = 0; t < n->rows; t++) {
        const double *x = n->x + t * n->dim;
        double mean = 0, var = 0;
        for (int32_t i = 0; i < n->dim && n->layer; i++) mean += x[i] / n->dim;
        for (int32_t i = 0; i < n->dim; i++) var += (x[i] - mean) * (x[i] - mean) / n->dim;
        for (int32_t i = 0; i < n->dim; i++)
            loss += n->c[t * n->dim + i] * ((x[i] - mean) / sqrt(var + n->eps) * n->gain[i] + (n->layer ? n->bias[i] : 0));
    }
    return loss;
}
TEST norms(int layer_norm, int32_t dim)
{
    bag b = { NULL, 0 };
    enum { ROWS = 3 };
    const int64_t n = ROWS * (int64_t)dim, stride = dim + 2;
    float *x = random_floats(&b, n, 1, 2), *gain = gains(&b, dim, 2), *bias = random_floats(&b, dim, 3, 1), *c = random_floats(&b, n, 4, 1);
    float *wx = zeros(&b, ROWS * stride), *wc = zeros(&b, ROWS * stride), *dx = zeros(&b, ROWS * stride), *dg = zeros(&b, dim), *db = zeros(&b, dim);
    float *packed = floats(&b, n);
    for (int32_t t = 0; t < ROWS; t++) {
        memcpy(wx + t * stride, x + t * dim, (size_t)dim * 4);
        memcpy(wc + t * stride, c + t * dim, (size_t)dim * 4);
    }
    if (layer_norm) OK(dsa_layer_norm_backward(wx, wc, ROWS, stride, dim, gain, 1e-2f, dx, dg, db));
    else OK(dsa_rms_norm_backward(wx, wc, ROWS, stride, dim, gain, 1e-2f, dx, dg));
    for (int32_t t = 0; t < ROWS; t++) {
        memcpy(packed + t * dim, dx + t * stride, (size_t)dim * 4);
        ASSERT(dx[t * stride + dim] == 0 && dx[t * stride + dim + 1] == 0);
    }
    norm_case k = { layer_norm, ROWS, dim, (double)1e-2f, widened(&b, x, n), widened(&b, gain, dim), widened(&b, bias, dim), widened(&b, c, n) };
    WITHIN(GRADIENT, gradient_of(norm_loss, &k, k.x, packed, n, 1));
    WITHIN(GRADIENT, gradient_of(norm_loss, &k, k.gain, dg, dim, 1));
    if (layer_norm) WITHIN(GRADIENT, gradient_of(norm_loss, &k, k.bias, db, dim, 1));
    /* gradients add up; each is optional */
    float *twice = zeros(&b, dim);
    for (int i = 0; i < 2; i++) {
        if (layer_norm) OK(dsa_layer_norm_backward(wx, wc, ROWS, stride, dim, gain, 1e-2f, NULL, twice, NULL));
        else OK(dsa_rms_norm_backward(wx, wc, ROWS, stride, dim, gain, 1e-2f, NULL, twice));
    }
    for (int32_t i = 0; i < dim; i++) ASSERT_IN_RANGE(2 * dg[i], twice[i], 1e-5);
    IS(DSA_ERR_NULL, dsa_rms_norm_backward(NULL, wc, 1, stride, dim, gain, 1e-6f, dx, NULL));
    IS(DSA_ERR_SHAPE, dsa_rms_norm_backward(wx, wc, 1, dim - 1, dim, gain, 1e-6f, dx, NULL));
    IS(DSA_ERR_SHAPE, dsa_layer_norm_backward(wx, wc, -1, stride, dim, gain, 1e-6f, dx, NULL, NULL));
    IS(DSA_ERR_NULL, dsa_layer_norm_backward(wx, NULL, 1, stride, dim, gain, 1e-6f, dx, NULL, NULL));
    END(b);
}

/* <dy, J dx> for J linear: the transpose is what the manual calls the backward. */
TEST rotations(int half, int yarn)
{
    bag b = { NULL, 0 };
    enum { ROWS = 4, HEADS = 3, DIM = 16 };
    const int64_t n = ROWS * HEADS * DIM, positions[ROWS] = { 0, 7, 4097, 100000 };
    dsa_rope rope;
    memset(&rope, 0, sizeof rope);
    rope.layout = half ? DSA_ROPE_HALF : DSA_ROPE_INTERLEAVED;
    rope.offset = 3;
    rope.width = 12;
    rope.factor = yarn ? 40 : 1;
    double *want = doubles(&b, n);
    float *c = random_floats(&b, n, 5, 1), *got = floats(&b, n), *e = floats(&b, n);
    for (int64_t i = 0; i < n; i++) {                 /* d <c, R x> / dx_i = <c, R e_i> */
        for (int64_t j = 0; j < n; j++) e[j] = i == j;
        OK(dsa_rope_rows(e, ROWS, HEADS * DIM, HEADS, DIM, DIM, &rope, positions, 0));
        want[i] = 0;
        for (int64_t j = 0; j < n; j++) want[i] += (double)c[j] * (double)e[j];
    }
    memcpy(got, c, (size_t)n * 4);
    OK(dsa_rope_rows(got, ROWS, HEADS * DIM, HEADS, DIM, DIM, &rope, positions, 1));
    WITHIN(GRADIENT, gradient_error(got, want, n));
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) e[j] = i == j;
        OK(dsa_hadamard_rows(e, ROWS * HEADS, DIM, DIM));
        want[i] = 0;
        for (int64_t j = 0; j < n; j++) want[i] += (double)c[j] * (double)e[j];
    }
    memcpy(got, c, (size_t)n * 4);
    OK(dsa_hadamard_rows(got, ROWS * HEADS, DIM, DIM));
    WITHIN(GRADIENT, gradient_error(got, want, n));
    END(b);
}

/* ---- projections ----------------------------------------------------------------------------- */
static dsa_ctx context(int32_t n_threads, backwards *order)
{
    dsa_config c = small_config();
    dsa_ctx ctx;
    if (dsa_init(&ctx, &c) != DSA_OK) abort();
    return n_threads > 1 ? with_threads(&ctx, order, n_threads) : ctx;
}
TEST linear(int64_t rows, int32_t in, int32_t out, dsa_type type)
{
    bag b = { NULL, 0 };
    backwards order;
    dsa_ctx one = context(1, NULL), five = context(5, &order);
    float *w = random_floats(&b, (int64_t)in * out, 1, 1), *x = random_floats(&b, rows * in, 2, 1), *dy = random_floats(&b, rows * out, 3, 1), *scale = NULL;
    unsigned char *stored = (unsigned char *)bag_alloc(&b, (size_t)in * (size_t)out * 4 + 1) + 1;     /* any alignment */
    if (type == DSA_FP8) {
        int64_t across = (in + 127) / 128, n = (out + 127) / 128 * across;
        scale = random_floats(&b, n, 4, 1);
        for (int32_t o = 0; o < out; o++)
            for (int32_t i = 0; i < in; i++) {
                stored[(int64_t)o * in + i] = dsa_f32_to_e4m3(w[(int64_t)o * in + i]);
                w[(int64_t)o * in + i] = dsa_e4m3_to_f32(stored[(int64_t)o * in + i]) * scale[o / 128 * across + i / 128];
            }
    } else for (int64_t i = 0; i < (int64_t)in * out; i++) {
        uint16_t h = type == DSA_BF16 ? dsa_f32_to_bf16(w[i]) : dsa_f32_to_f16(w[i]);
        if (type == DSA_F32) memcpy(stored + 4 * i, &w[i], 4);
        else { memcpy(stored + 2 * i, &h, 2); w[i] = type == DSA_BF16 ? dsa_bf16_to_f32(h) : dsa_f16_to_f32(h); }
    }
    double *y = doubles(&b, rows * out), *dx = doubles(&b, rows * in), *dw = doubles(&b, (int64_t)in * out);
    memset(y, 0, (size_t)(rows * out) * sizeof *y);
    memset(dx, 0, (size_t)(rows * in) * sizeof *dx);
    memset(dw, 0, (size_t)in * (size_t)out * sizeof *dw);
    for (int64_t t = 0; t < rows; t++)
        for (int32_t o = 0; o < out; o++)
            for (int32_t i = 0; i < in; i++) {
                double wi = (double)w[(int64_t)o * in + i], xi = (double)x[t * in + i], di = (double)dy[t * out + o];
                y[t * out + o] += wi * xi;
                dx[t * in + i] += wi * di;
                dw[(int64_t)o * in + i] += xi * di;
            }
    float *got_y[2], *got_dx[2], *got_dw[2];
    for (int k = 0; k < 2; k++) {
        const dsa_ctx *ctx = k ? &five : &one;
        dsa_linear_args a;
        size_t bytes = 0;
        memset(&a, 0, sizeof a);
        a.n_rows = rows;
        a.dim_in = in;
        a.dim_out = out;
        a.w.data = stored;
        a.w.type = type;
        a.w.scale_inv = scale;
        a.x = x;
        a.d_y = dy;
        a.y = got_y[k] = random_floats(&b, rows * out, 9, 1);      /* is overwritten */
        a.d_x = got_dx[k] = zeros(&b, rows * in);
        a.d_w = got_dw[k] = zeros(&b, (int64_t)in * out);
        OK(dsa_linear_workspace(ctx, &a, &bytes));
        a.workspace = work(&b, bytes);
        a.workspace_size = bytes;
        OK(dsa_linear(ctx, &a));
        OK(dsa_linear_backward(ctx, &a));
        a.workspace_size = bytes - 1;
        IS(DSA_ERR_WORKSPACE, dsa_linear(ctx, &a));
    }
    WITHIN(GRADIENT, gradient_error(got_y[0], y, rows * out));
    WITHIN(GRADIENT, gradient_error(got_dx[0], dx, rows * in));
    WITHIN(GRADIENT, gradient_error(got_dw[0], dw, (int64_t)in * out));
    ASSERT(same_bits(got_y[0], got_y[1], rows * out) && same_bits(got_dx[0], got_dx[1], rows * in) && same_bits(got_dw[0], got_dw[1], (int64_t)in * out));
    END(b);
}

/* ---- attention and scores over sets ---------------------------------------------------------- */
/* Two sequences whose sets are lists, ranges or all visible rows. Lists hold duplicates, invalid entries and rows after the query;
   one of them is empty. */
typedef struct set_case {
    const char *name;
    int32_t H, R, r, HI, D, len[2], n_q[2], k;
    dsa_attend_what what;
    int sinks, hadamard;
    int32_t page;
} set_case;

typedef struct set_run {         /* a case made up, in double, too */
    bag b;
    dsa_ctx ctx;
    set_case s;
    int32_t rows, total, columns;
    dsa_cache latent[2], index[2];
    dsa_seq seq[2];
    int32_t *lists, *counts;
    int64_t *ks, *ke;
    float *q, *kv, *sink, *c, *iq, *iw, *keys, *g;
    double *dq, *dkv, *dsink, *dc, *diq, *diw, *dkeys, *dg, *target;
    char *on;                    /* [rows, HI, total] which ReLUs are on. Fixed, so that no step of a difference crosses a corner; off at 0 */
    int mode;                    /* of the score loss: 0 <g, I>, 1 Sum KL */
} set_run;

/* The positions of row t's set with their columns; returns how many. */
static int32_t set_of(const set_run *m, int32_t t, int32_t *position, int32_t *column, int32_t *seq)
{
    const int32_t second = t >= m->s.n_q[0], i = second ? t - m->s.n_q[0] : t, len = m->s.len[second], visible = len - m->s.n_q[second] + i + 1;
    int32_t n = 0;
    *seq = second;
    if (m->s.what == DSA_ATTEND_LIST) {
        for (int32_t j = 0; j < m->counts[t] && j < m->s.k; j++) {
            int32_t p = m->lists[t * m->s.k + j];
            if (p >= 0 && p < len) { position[n] = p; column[n++] = j; }
        }
        return n;
    }
    for (int32_t p = 0; p < len; p++) {
        if (m->s.what == DSA_ATTEND_RANGE ? (p < m->ks[t] || p >= m->ke[t]) : p >= visible) continue;
        position[n] = p;
        column[n++] = p;
    }
    return n;
}
static double set_attend_loss(void *user)
{
    set_run *m = (set_run *)user;
    const int32_t W = m->s.R + m->s.r;
    int32_t *position = ints(&m->b, 2 * m->columns), *column = position + m->columns, seq;
    double *x = doubles(&m->b, m->columns), loss = 0;
    for (int32_t t = 0; t < m->rows; t++) {
        int32_t n = set_of(m, t, position, column, &seq);
        for (int32_t h = 0; h < m->s.H && n > 0; h++) {
            const double *q = m->dq + (t * m->s.H + h) * W, *c = m->dc + (t * m->s.H + h) * m->s.R;
            double max = -INFINITY, sum = 0;
            for (int32_t j = 0; j < n; j++) {
                const double *kv = m->dkv + (seq * m->s.len[0] + position[j]) * (int64_t)W;
                x[j] = 0;
                for (int32_t i = 0; i < W; i++) x[j] += (double)m->ctx.config.softmax_scale * q[i] * kv[i];
                max = fmax(max, x[j]);
            }
            for (int32_t j = 0; j < n; j++) sum += x[j] = exp(x[j] - max);
            if (m->s.sinks) sum += exp(m->dsink[h] - max);
            for (int32_t j = 0; j < n; j++) {
                const double *kv = m->dkv + (seq * m->s.len[0] + position[j]) * (int64_t)W;
                for (int32_t i = 0; i < m->s.R; i++) loss += x[j] / sum * c[i] * kv[i];
            }
            for (int32_t j = 0; j < n && m->target; j++) m->target[(int64_t)t * m->columns + column[j]] += x[j] / sum;
        }
    }
    bag_shrink(&m->b, m->b.n - 2);
    return loss;
}
static double set_score_loss(void *user)
{
    set_run *m = (set_run *)user;
    const int32_t D = m->s.D;
    int32_t *position = ints(&m->b, 2 * m->columns), *column = position + m->columns, seq;
    double *I = doubles(&m->b, m->columns), loss = 0;
    for (int32_t t = 0; t < m->rows; t++) {
        int32_t n = set_of(m, t, position, column, &seq);
        double max = -INFINITY, sum = 0, total = 0;
        for (int32_t j = 0; j < n; j++) {
            const double *k = m->dkeys + (seq * m->s.len[0] + position[j]) * (int64_t)D;
            I[j] = 0;
            for (int32_t h = 0; h < m->s.HI; h++) {
                double d = 0;
                for (int32_t i = 0; i < D; i++) d += m->diq[(t * m->s.HI + h) * D + i] * k[i];
                if (m->on[(t * m->s.HI + h) * m->total + seq * m->s.len[0] + position[j]]) I[j] += m->diw[t * m->s.HI + h] * d;
            }
            max = fmax(max, I[j]);
            total += m->dg[(int64_t)t * m->columns + column[j]];
            if (m->mode == 0) loss += I[j] * m->dg[(int64_t)t * m->columns + column[j]];
        }
        for (int32_t j = 0; j < n; j++) sum += exp(I[j] - max);
        for (int32_t j = 0; j < n && m->mode == 1 && total > 0; j++) {
            double p = m->dg[(int64_t)t * m->columns + column[j]];
            if (p > 0) loss += 0.3 * p * (log(p) - (I[j] - max - log(sum)));
        }
    }
    bag_shrink(&m->b, m->b.n - 2);
    return loss;
}

static enum greatest_test_res set_open(set_run *m, set_case s, int32_t n_threads, backwards *order)
{
    memset(m, 0, sizeof *m);
    m->s = s;
    dsa_config c;
    memset(&c, 0, sizeof c);
    c.n_heads = s.H;
    c.dim_latent = s.R;
    c.dim_rope = s.r ? s.r : DSA_NONE;
    c.n_index_heads = s.HI;
    c.dim_index = s.D;
    c.index_rope_width = DSA_NONE;
    c.top_k = s.k ? s.k : 4;
    c.hadamard = s.hadamard ? DSA_HADAMARD_ON : DSA_HADAMARD_OFF;
    c.isa = test_isa;
    OK(dsa_init(&m->ctx, &c));
    m->rows = s.n_q[0] + s.n_q[1];
    m->total = s.len[0] + s.len[1];
    m->columns = s.what == DSA_ATTEND_LIST ? s.k : s.len[0] > s.len[1] ? s.len[0] : s.len[1];
    const int64_t W = s.R + s.r;
    m->q = random_floats(&m->b, m->rows * s.H * W, 11, 1.5f);
    m->kv = random_floats(&m->b, m->total * W, 12, 1);
    m->sink = random_floats(&m->b, s.H, 13, 2);
    m->c = random_floats(&m->b, (int64_t)m->rows * s.H * s.R, 14, 1);
    m->iq = random_floats(&m->b, (int64_t)m->rows * s.HI * s.D, 15, 1);
    m->iw = random_floats(&m->b, (int64_t)m->rows * s.HI, 16, 1);
    m->keys = random_floats(&m->b, (int64_t)m->total * s.D, 17, 1);
    m->g = random_floats(&m->b, (int64_t)m->rows * m->columns, 18, 1);
    for (int32_t i = 0; i < s.D; i++) m->keys[2 * s.D + i] = 0;          /* a key whose every dot product is 0: it learns nothing */
    m->lists = ints(&m->b, (int64_t)m->rows * (s.k ? s.k : 1));
    m->counts = ints(&m->b, m->rows);
    m->ks = longs(&m->b, m->rows);
    m->ke = longs(&m->b, m->rows);
    uint64_t seed = 77;
    for (int32_t t = 0; t < m->rows; t++) {
        int32_t len = s.len[t >= s.n_q[0]];
        m->counts[t] = t == 1 ? 0 : t == 2 ? s.k / 2 : s.k;            /* an empty row and one with fewer than k */
        for (int32_t j = 0; j < s.k; j++) {
            int32_t kind = rnd_below(&seed, 12);
            m->lists[t * s.k + j] = kind == 0 ? -1 : kind == 1 ? len + rnd_below(&seed, 9) : kind == 2 && j > 0 ? m->lists[t * s.k + j - 1] : rnd_below(&seed, len);
        }
        m->ks[t] = rnd_below(&seed, len) - 3;
        m->ke[t] = t == 1 ? m->ks[t] : m->ks[t] + rnd_below(&seed, len + 5);
    }
    m->dq = widened(&m->b, m->q, m->rows * s.H * W);
    m->dkv = widened(&m->b, m->kv, m->total * W);
    m->dsink = widened(&m->b, m->sink, s.H);
    m->dc = widened(&m->b, m->c, (int64_t)m->rows * s.H * s.R);
    m->diq = widened(&m->b, m->iq, (int64_t)m->rows * s.HI * s.D);
    m->diw = widened(&m->b, m->iw, (int64_t)m->rows * s.HI);
    m->dkeys = widened(&m->b, m->keys, (int64_t)m->total * s.D);
    m->on = (char *)bag_alloc(&m->b, (size_t)(m->rows * s.HI) * (size_t)m->total);
    for (int32_t i = 0; i < m->rows * s.HI * m->total; i++) {
        double dot = 0;
        for (int32_t d = 0; d < s.D; d++) dot += m->diq[i / m->total * s.D + d] * m->dkeys[i % m->total * s.D + d];
        m->on[i] = dot > 0;
    }
    for (int i = 0; i < 2; i++) {
        dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, s.len[i], s.page);
        m->latent[i] = cache_of(&m->b, &m->ctx, &d);
        d = desc_of(DSA_INDEX_KEY, DSA_F32, s.len[i], s.page);
        m->index[i] = cache_of(&m->b, &m->ctx, &d);
        m->seq[i] = seq_of(&m->latent[i], &m->index[i], s.len[i]);
        OK(append(&m->ctx, &m->latent[i], &m->index[i], s.len[i], m->kv + i * s.len[0] * W, m->keys + i * s.len[0] * s.D));
        m->seq[i] = seq_of(&m->latent[i], &m->index[i], s.n_q[i]);
    }
    if (n_threads > 1) m->ctx = with_threads(&m->ctx, order, n_threads);
    return GREATEST_TEST_RES_PASS;
}
static dsa_attend_args set_args(const set_run *m)
{
    dsa_attend_args a;
    memset(&a, 0, sizeof a);
    a.n_seqs = 2;
    a.seqs = m->seq;
    a.q = m->q;
    a.what = m->s.what;
    a.indices = m->lists;
    a.n_indices = m->s.k;
    a.counts = m->counts;
    a.ks = m->ks;
    a.ke = m->ke;
    return a;
}
static enum greatest_test_res set_attend_backward(set_run *m, float *d_q, float *d_kv, float *d_sinks, float *target)
{
    const int64_t n_out = (int64_t)m->rows * m->s.H * m->s.R;
    float *out = floats(&m->b, n_out), *lse = floats(&m->b, (int64_t)m->rows * m->s.H), *parts[2];
    dsa_attend_backward_args a;
    size_t bytes = 0;
    memset(&a, 0, sizeof a);
    a.attend = set_args(m);
    OK(attend(&m->b, &m->ctx, a.attend, m->rows, m->s.H, m->s.R, m->s.sinks ? m->sink : NULL, out, lse, NULL));
    parts[0] = d_kv;
    parts[1] = d_kv + m->s.len[0] * (int64_t)(m->s.R + m->s.r);
    a.out = out;
    a.lse = lse;
    a.sinks = m->s.sinks ? m->sink : NULL;
    a.d_out = m->c;
    a.d_q = d_q;
    a.d_latent = d_kv ? parts : NULL;
    a.d_sinks = d_sinks;
    a.target = target;
    a.target_stride = m->columns;
    OK(dsa_attend_backward_workspace(&m->ctx, &a, &bytes));
    a.attend.workspace = work(&m->b, bytes);
    a.attend.workspace_size = bytes;
    OK(dsa_attend_backward(&m->ctx, &a));
    a.attend.workspace_size--;
    IS(DSA_ERR_WORKSPACE, dsa_attend_backward(&m->ctx, &a));
    return GREATEST_TEST_RES_PASS;
}
TEST attention(set_case s)
{
    set_run m, more;
    backwards order;
    CHECK_CALL(set_open(&m, s, 1, NULL));
    const int64_t W = s.R + s.r, n_q = m.rows * s.H * W, n_kv = m.total * W, n_p = (int64_t)m.rows * m.columns;
    float *d_q = zeros(&m.b, n_q), *d_kv = zeros(&m.b, n_kv), *d_sinks = zeros(&m.b, s.H), *target = random_floats(&m.b, n_p, 5, 1);
    CHECK_CALL(set_attend_backward(&m, d_q, d_kv, d_sinks, target));
    const int64_t step_q = n_q / 150 + 1, step_kv = n_kv / 150 + 1;
    WITHIN(GRADIENT, gradient_of(set_attend_loss, &m, m.dq, d_q, n_q, step_q));
    WITHIN(GRADIENT, gradient_of(set_attend_loss, &m, m.dkv, d_kv, n_kv, step_kv));
    if (s.sinks) WITHIN(GRADIENT, gradient_of(set_attend_loss, &m, m.dsink, d_sinks, s.H, 1));
    else for (int32_t h = 0; h < s.H; h++) ASSERT(d_sinks[h] == 0);
    m.target = doubles(&m.b, n_p);
    memset(m.target, 0, (size_t)n_p * sizeof *m.target);
    (void)set_attend_loss(&m);
    for (int32_t t = 0; t < m.rows; t++) {
        double sum = 0;
        for (int32_t j = 0; j < m.columns; j++) sum += m.target[(int64_t)t * m.columns + j];
        for (int32_t j = 0; j < m.columns; j++) m.target[(int64_t)t * m.columns + j] /= sum > 0 ? sum : 1;
    }
    WITHIN(2e-6, max_error(target, m.target, n_p));
    for (int32_t threads = 2; threads <= 7; threads += 5) {     /* the same bits, and no gradient needs the others */
        CHECK_CALL(set_open(&more, s, threads, &order));
        float *q2 = zeros(&more.b, n_q), *kv2 = zeros(&more.b, n_kv), *sinks2 = zeros(&more.b, s.H), *p2 = zeros(&more.b, n_p);
        CHECK_CALL(set_attend_backward(&more, q2, kv2, sinks2, p2));
        ASSERT(same_bits(d_q, q2, n_q) && same_bits(d_kv, kv2, n_kv) && same_bits(d_sinks, sinks2, s.H) && same_bits(target, p2, n_p));
        memset(kv2, 0, (size_t)n_kv * 4);
        CHECK_CALL(set_attend_backward(&more, NULL, kv2, NULL, NULL));
        ASSERT(same_bits(d_kv, kv2, n_kv));
        bag_free(&more.b);
    }
    END(m.b);
}

static enum greatest_test_res set_index_backward(set_run *m, const float *target, float *loss, float *d_q, float *d_w, float *d_k)
{
    dsa_index_backward_args a;
    float *parts[2];
    size_t bytes = 0;
    memset(&a, 0, sizeof a);
    a.set = set_args(m);
    a.q = m->iq;
    a.w = m->iw;
    a.d_scores = target ? NULL : m->g;
    a.target = target;
    a.stride = m->columns;
    a.weight = 0.3f;
    a.loss = loss;
    a.d_q = d_q;
    a.d_w = d_w;
    parts[0] = d_k;
    parts[1] = d_k + (int64_t)m->s.len[0] * m->s.D;
    a.d_key = parts;
    OK(dsa_index_backward_workspace(&m->ctx, &a, &bytes));
    a.set.workspace = work(&m->b, bytes);
    a.set.workspace_size = bytes;
    OK(dsa_index_backward(&m->ctx, &a));
    a.set.workspace_size--;
    IS(DSA_ERR_WORKSPACE, dsa_index_backward(&m->ctx, &a));
    return GREATEST_TEST_RES_PASS;
}
TEST scores(set_case s, int loss_kind)
{
    set_run m, more;
    backwards order;
    CHECK_CALL(set_open(&m, s, 1, NULL));
    const int64_t n_q = (int64_t)m.rows * s.HI * s.D, n_w = (int64_t)m.rows * s.HI, n_k = (int64_t)m.total * s.D, n_g = (int64_t)m.rows * m.columns;
    float *d_q = zeros(&m.b, n_q), *d_w = zeros(&m.b, n_w), *d_k = zeros(&m.b, n_k), *loss = random_floats(&m.b, m.rows, 3, 1), *target = NULL;
    m.mode = loss_kind;
    if (loss_kind == 1) {                                /* rows of probabilities, with zeros; one row without any */
        int32_t *position = ints(&m.b, 2 * m.columns), *column = position + m.columns, seq;
        target = zeros(&m.b, n_g);
        for (int32_t t = 0; t < m.rows; t++) {
            int32_t n = set_of(&m, t, position, column, &seq);
            float sum = 0;
            for (int32_t j = 0; j < n; j++) sum += target[(int64_t)t * m.columns + column[j]] = t == 3 || j % 5 == 1 ? 0 : fabsf(m.g[(int64_t)t * m.columns + column[j]]);
            for (int32_t j = 0; j < n && sum > 0; j++) target[(int64_t)t * m.columns + column[j]] /= sum;
        }
        memcpy(m.g, target, (size_t)n_g * 4);
    }
    m.dg = widened(&m.b, m.g, n_g);
    CHECK_CALL(set_index_backward(&m, target, loss, d_q, d_w, d_k));
    if (loss_kind == 1) {
        double sum = 0;
        for (int32_t t = 0; t < m.rows; t++) sum += 0.3 * (double)loss[t];
        ASSERT_IN_RANGE(set_score_loss(&m), sum, 1e-5);
    }
    WITHIN(GRADIENT, gradient_of(set_score_loss, &m, m.diw, d_w, n_w, n_w / 150 + 1));
    WITHIN(GRADIENT, gradient_of(set_score_loss, &m, m.diq, d_q, n_q, n_q / 150 + 1));
    WITHIN(GRADIENT, gradient_of(set_score_loss, &m, m.dkeys, d_k, n_k, n_k / 150 + 1));
    for (int32_t i = 0; i < s.D; i++) ASSERT(d_k[2 * s.D + i] == 0);
    for (int32_t threads = 2; threads <= 7; threads += 5) {
        CHECK_CALL(set_open(&more, s, threads, &order));
        memcpy(more.g, m.g, (size_t)n_g * 4);
        float *q2 = zeros(&more.b, n_q), *w2 = zeros(&more.b, n_w), *k2 = zeros(&more.b, n_k);
        CHECK_CALL(set_index_backward(&more, target, NULL, q2, w2, k2));
        ASSERT(same_bits(d_q, q2, n_q) && same_bits(d_w, w2, n_w) && same_bits(d_k, k2, n_k));
        bag_free(&more.b);
    }
    END(m.b);
}

TEST set_errors(void)
{
    set_case s = { "errors", 3, 10, 4, 3, 8, { 9, 7 }, { 4, 3 }, 6, DSA_ATTEND_LIST, 1, 0, 0 };
    set_run m;
    CHECK_CALL(set_open(&m, s, 1, NULL));
    float *out = zeros(&m.b, 7 * 3 * 10), *lse = zeros(&m.b, 21), *rows[2] = { out, NULL };
    dsa_attend_backward_args a;
    dsa_index_backward_args x;
    size_t bytes = 0, index_bytes = 0;
    memset(&a, 0, sizeof a);
    memset(&x, 0, sizeof x);
    a.attend = x.set = set_args(&m);
    a.out = out;
    a.lse = lse;
    a.d_out = m.c;
    x.q = m.iq;
    x.w = m.iw;
    x.target = m.g;
    x.stride = 6;
    OK(dsa_attend_backward_workspace(&m.ctx, &a, &bytes));
    OK(dsa_index_backward_workspace(&m.ctx, &x, &index_bytes));
    a.attend.workspace = work(&m.b, bytes);
    x.set.workspace = work(&m.b, index_bytes);
    a.attend.workspace_size = bytes;
    x.set.workspace_size = index_bytes;
    OK(dsa_attend_backward(&m.ctx, &a));
    OK(dsa_index_backward(&m.ctx, &x));
#define WRONG(WANT, CALL, ARGS, SET) do { ARGS##_t bad = ARGS; bad.SET; IS(WANT, CALL(&m.ctx, &bad)); } while (0)
    typedef dsa_attend_backward_args a_t;
    typedef dsa_index_backward_args x_t;
    IS(DSA_ERR_NULL, dsa_attend_backward(NULL, &a));
    IS(DSA_ERR_NULL, dsa_attend_backward(&m.ctx, NULL));
    IS(DSA_ERR_NULL, dsa_attend_backward_workspace(&m.ctx, &a, NULL));
    WRONG(DSA_ERR_NULL, dsa_attend_backward, a, lse = NULL);
    WRONG(DSA_ERR_NULL, dsa_attend_backward, a, out = NULL);
    WRONG(DSA_ERR_NULL, dsa_attend_backward, a, attend.q = NULL);
    WRONG(DSA_ERR_NULL, dsa_attend_backward, a, attend.indices = NULL);
    WRONG(DSA_ERR_NULL, dsa_attend_backward, a, d_latent = rows);
    WRONG(DSA_ERR_NULL, dsa_attend_backward, a, attend.workspace = NULL);
    WRONG(DSA_ERR_ARGUMENT, dsa_attend_backward, a, attend.index_kind = DSA_PHYSICAL);
    WRONG(DSA_ERR_ARGUMENT, dsa_attend_backward, a, attend.what = (dsa_attend_what)9);
    WRONG(DSA_ERR_ARGUMENT, dsa_attend_backward, a, attend.scale = (float)NAN);
    WRONG(DSA_ERR_SHAPE, dsa_attend_backward, a, attend.index_stride = 5);
    WRONG(DSA_ERR_SHAPE, dsa_attend_backward, a, target = out);          /* its stride is 0 */
    IS(DSA_ERR_NULL, dsa_index_backward(NULL, &x));
    IS(DSA_ERR_NULL, dsa_index_backward(&m.ctx, NULL));
    WRONG(DSA_ERR_NULL, dsa_index_backward, x, q = NULL);
    WRONG(DSA_ERR_NULL, dsa_index_backward, x, w = NULL);
    WRONG(DSA_ERR_NULL, dsa_index_backward, x, target = NULL);
    WRONG(DSA_ERR_NULL, dsa_index_backward, x, d_scores = out);          /* both */
    WRONG(DSA_ERR_NULL, dsa_index_backward, x, d_key = rows);
    WRONG(DSA_ERR_SHAPE, dsa_index_backward, x, stride = 5);
    WRONG(DSA_ERR_ARGUMENT, dsa_index_backward, x, weight = (float)INFINITY);
    WRONG(DSA_ERR_ARGUMENT, dsa_index_backward, x, set.index_kind = DSA_PHYSICAL);
    WRONG(DSA_ERR_NULL, dsa_index_backward, x, set.seqs = NULL);
    END(m.b);
}

/* ---- the layer ---------------------------------------------------------------------------------- */
static const int n_weights = 12;
static float **weight_at(weights *w, int i) { return &w->q_a + i; }
static const char *const weight_names[12] = { "q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b", "o", "index_q_b", "index_k", "index_k_norm",
                                              "index_k_bias", "index_w" };
static int64_t weight_size(const dsa_config *c, int i)
{
    const int64_t r = c->dim_rope > 0 ? c->dim_rope : 0;
    const int64_t size[12] = { (int64_t)c->dim_q_lora * c->dim_hidden, c->dim_q_lora, c->n_heads * (c->dim_nope + r) * c->dim_q_lora, (c->dim_latent + r) * c->dim_hidden,
                               c->dim_latent, (int64_t)c->n_heads * (c->dim_nope + c->dim_v) * c->dim_latent, (int64_t)c->dim_hidden * c->n_heads * c->dim_v,
                               (int64_t)c->n_index_heads * c->dim_index * c->dim_q_lora, (int64_t)c->dim_index * c->dim_hidden, c->dim_index, c->dim_index,
                               (int64_t)c->n_index_heads * c->dim_hidden };
    return size[i];
}
static dsa_layer_grads grads_of(bag *b, const dsa_config *c, float **all)
{
    dsa_layer_grads g;
    for (int i = 0; i < n_weights; i++) all[i] = zeros(b, weight_size(c, i));
    memcpy(&g, all, sizeof g);
    return g;
}
static dsa_status layer_backward(bag *b, const dsa_ctx *ctx, dsa_layer_backward_args a)
{
    size_t bytes = 0;
    dsa_status st = dsa_layer_backward_workspace(ctx, &a, &bytes);
    if (st != DSA_OK) return st;
    a.layer.workspace = work(b, bytes);
    a.layer.workspace_size = bytes;
    return dsa_layer_backward(ctx, &a);
}

/* Steps of single weights through the double reference. x and the weights are f32: a step is as long as rounding makes it. */
typedef struct layer_case { model *m; int32_t T; float *x; const int64_t *positions; const int32_t *lists; int window, dense; float *dy, weight; double *target; signed char *on; } layer_case;
static double layer_loss(const layer_case *l, int of_indexer)
{
    const dsa_config *c = &l->m->ctx.config;
    bag b = { NULL, 0 };
    double *y = doubles(&b, l->T * c->dim_hidden), *I = doubles(&b, l->T * l->T), loss = 0;
    ref_layer(&b, c, &l->m->w, l->T, l->x, l->positions, l->lists, l->window, y, I, NULL, NULL, l->on);
    for (int32_t i = 0; i < l->T * c->dim_hidden && !of_indexer; i++) loss += y[i] * (double)l->dy[i];
    for (int32_t t = 0; t < l->T && of_indexer; t++) {
        double max = -INFINITY, sum = 0;
        const double *p = l->target + t * l->T;
        for (int32_t s = 0; s <= t; s++) if (p[s] > 0) max = fmax(max, I[t * l->T + s]);
        for (int32_t s = 0; s <= t; s++) if (p[s] > 0) sum += exp(I[t * l->T + s] - max);
        for (int32_t s = 0; s <= t; s++) if (p[s] > 0) loss += (double)l->weight * p[s] * (log(p[s]) - I[t * l->T + s] + max + log(sum));
    }
    bag_free(&b);
    return loss;
}
static double layer_difference(const layer_case *l, float *w, int of_indexer)
{
    const float h = 0.00390625f, at = *w;
    double v[4], where[4];
    for (int k = 0; k < 4; k++) { *w = at + h * (float)(k < 2 ? k - 2 : k - 1); where[k] = (double)*w; v[k] = layer_loss(l, of_indexer); }
    *w = at;
    return (8 * (v[2] - v[1]) / (where[2] - where[1]) * 2 - (v[3] - v[0]) / (where[3] - where[0]) * 4) / 12;
}
TEST a_layer(dsa_config c, dsa_layer_mode mode)
{
    model m;
    enum { T = 37 };
    open_model(&m, c);
    c = m.ctx.config;
    const int32_t hid = c.dim_hidden, k = c.top_k;
    int64_t *positions = longs(&m.b, T);
    for (int32_t t = 0; t < T; t++) positions[t] = 3 * t + (t > 20 ? 1000 : 5);
    float *x = inputs(&m, T, 300), *y = floats(&m.b, T * hid), *dy = random_floats(&m.b, T * hid, 301, 1), *dx = zeros(&m.b, T * hid), *kl = floats(&m.b, T), *all[12];
    int32_t *lists = ints(&m.b, T * k);
    dsa_cache latent, index;
    run_args r = plain;
    r.mode = mode;
    r.positions = positions;
    OK(run(&m, r, T, x, y, mode == DSA_LAYER_SPARSE ? lists : NULL, &latent, &index));
    dsa_layer_grads grads = grads_of(&m.b, &c, all);
    dsa_seq s = seq_of(&latent, &index, T);
    dsa_layer_backward_args a;
    memset(&a, 0, sizeof a);
    a.layer.weights = &m.lw;
    a.layer.n_seqs = 1;
    a.layer.seqs = &s;
    a.layer.x = x;
    a.layer.positions = positions;
    a.layer.mode = mode;
    a.layer.indices_in = mode == DSA_LAYER_SPARSE ? lists : NULL;
    a.d_y = dy;
    a.d_x = dx;
    a.grads = &grads;
    a.index_weight = 0.25f;
    a.index_loss = kl;
    OK(layer_backward(&m.b, &m.ctx, a));

    layer_case l = { &m, T, x, positions, mode == DSA_LAYER_SPARSE ? lists : NULL, mode == DSA_LAYER_WINDOW, mode == DSA_LAYER_DENSE, dy, 0.25f, NULL, (signed char *)bag_alloc(&m.b, (size_t)(T * c.n_index_heads * T)) };
    memset(l.on, -1, (size_t)(T * c.n_index_heads * T));          /* filled in by the first call, at the point itself */
    double *mass = doubles(&m.b, T * T), *want_y = doubles(&m.b, T * hid), total = 0;
    ref_layer(&m.b, &c, &m.w, T, x, positions, l.lists, l.window, want_y, NULL, NULL, mass, NULL);
    for (int32_t t = 0; t < T; t++) {
        double sum = 0;
        for (int32_t i = 0; i <= t; i++) sum += mass[t * T + i];
        for (int32_t i = 0; i <= t; i++) mass[t * T + i] /= sum;
    }
    l.target = mass;
    for (int32_t t = 0; t < T; t++) total += 0.25 * (double)kl[t];
    ASSERT_IN_RANGE(layer_loss(&l, 1), total, 2e-5 * fmax(1, total));
    for (int i = 0; i < n_weights; i++) {                /* a dozen places of each weight */
        const int64_t n = weight_size(&c, i), step = n / 12 + 1;
        double worst = 0, scale = 0;
        for (int64_t j = 0; j < n; j++) scale = fmax(scale, fabs((double)all[i][j]));
        ASSERT(scale > 0);
        for (int64_t j = i % step; j < n; j += step) worst = fmax(worst, fabs((double)all[i][j] - layer_difference(&l, *weight_at(&m.w, i) + j, i >= 7)));
        if (worst > GRADIENT * scale) printf("\n  %s", weight_names[i]);
        WITHIN(GRADIENT, worst / scale);
    }
    double worst = 0, scale = 0;
    for (int64_t j = 0; j < T * hid; j++) scale = fmax(scale, fabs((double)dx[j]));
    for (int64_t j = 7; j < T * hid; j += 97) worst = fmax(worst, fabs((double)dx[j] - layer_difference(&l, x + j, 0)));
    WITHIN(GRADIENT, worst / scale);

    /* the same bits from any number of threads; frozen parts stay what they were and change nothing elsewhere */
    backwards order;
    dsa_ctx many = with_threads(&m.ctx, &order, 3);
    float *dx2 = zeros(&m.b, T * hid), *kl2 = floats(&m.b, T), *all2[12];
    dsa_layer_grads grads2 = grads_of(&m.b, &c, all2);
    a.grads = &grads2;
    a.d_x = dx2;
    a.index_loss = kl2;
    OK(layer_backward(&m.b, &many, a));
    ASSERT(same_bits(dx, dx2, T * hid) && same_bits(kl, kl2, T) && !order.broken);
    for (int i = 0; i < n_weights; i++) ASSERT(same_bits(all[i], all2[i], weight_size(&c, i)));
    dsa_pool *pool;
    OK(dsa_pool_create(NULL, 2, &pool));
    many.config.n_threads = 2;
    many.config.parallel_for = dsa_pool_run;
    many.config.parallel_user = pool;
    memset(dx2, 0, (size_t)(T * hid) * 4);
    grads2 = grads_of(&m.b, &c, all2);
    OK(layer_backward(&m.b, &many, a));
    dsa_pool_destroy(pool);
    ASSERT(same_bits(dx, dx2, T * hid) && same_bits(kl, kl2, T));
    for (int i = 0; i < n_weights; i++) ASSERT(same_bits(all[i], all2[i], weight_size(&c, i)));
    grads2 = grads_of(&m.b, &c, all2);
    a.d_y = NULL;                                        /* the warm-up */
    a.d_x = NULL;
    OK(layer_backward(&m.b, &m.ctx, a));
    for (int i = 0; i < n_weights; i++)
        for (int64_t j = 0; j < weight_size(&c, i); j++) ASSERT(i < 7 ? all2[i][j] == 0 : same_bits(&all[i][j], &all2[i][j], 1));
    grads2 = grads_of(&m.b, &c, all2);
    a.d_y = dy;
    a.d_x = NULL;
    a.index_weight = 0;                                  /* the language model's loss alone, without what an indexer needs */
    a.index_loss = NULL;
    grads2.kv_b = NULL;
    OK(layer_backward(&m.b, &m.ctx, a));
    for (int i = 0; i < n_weights; i++)
        for (int64_t j = 0; j < weight_size(&c, i); j++) ASSERT(i >= 7 || i == 5 ? all2[i][j] == 0 : same_bits(&all[i][j], &all2[i][j], 1));
    bag_free(&m.b);
    PASS();
}

/* Sequences of a batch add their gradients; rows before the call's own are constants. */
TEST a_batch_of_layers(void)
{
    model m;
    enum { T = 21, BEFORE = 6 };
    open_model(&m, small_config());
    const dsa_config c = m.ctx.config;
    const int32_t hid = c.dim_hidden, k = c.top_k;
    float *x = inputs(&m, 2 * T, 310), *y = floats(&m.b, 2 * T * hid), *dy = random_floats(&m.b, 2 * T * hid, 311, 1), *kl = floats(&m.b, 2 * T);
    float *all[12], *one[12], *dx = zeros(&m.b, 2 * T * hid), *dx1 = zeros(&m.b, 2 * T * hid);
    int32_t *lists = ints(&m.b, 2 * T * k);
    dsa_cache latent[2], index[2];
    dsa_seq s[2];
    dsa_layer_args f;
    memset(&f, 0, sizeof f);
    for (int i = 0; i < 2; i++) {
        latent[i] = new_cache(&m, DSA_LATENT, DSA_F32, T + BEFORE, 4);
        index[i] = new_cache(&m, DSA_INDEX_KEY, DSA_F32, T + BEFORE, 4);
        s[i] = seq_of(&latent[i], &index[i], i == 0 ? BEFORE : DSA_NONE);
    }
    f.weights = &m.lw;
    f.n_seqs = 2;
    f.seqs = s;
    f.x = inputs(&m, BEFORE, 312);
    f.y = y;
    OK(layer(&m.b, &m.ctx, f));                          /* a prefix of the first sequence */
    s[0].n_q = s[1].n_q = T;
    f.x = x;
    f.indices_out = lists;
    OK(layer(&m.b, &m.ctx, f));
    dsa_layer_backward_args a;
    memset(&a, 0, sizeof a);
    a.layer = f;
    a.layer.indices_out = NULL;
    a.layer.indices_in = lists;
    a.d_y = dy;
    a.index_weight = 0.1f;
    a.index_loss = kl;
    dsa_layer_grads g = grads_of(&m.b, &c, all), g1 = grads_of(&m.b, &c, one);
    a.grads = &g;
    a.d_x = dx;
    OK(layer_backward(&m.b, &m.ctx, a));
    a.grads = &g1;
    for (int i = 0; i < 2; i++) {
        a.layer.n_seqs = 1;
        a.layer.seqs = &s[i];
        a.layer.x = x + i * T * hid;
        a.layer.indices_in = lists + i * T * k;
        a.d_y = dy + i * T * hid;
        a.d_x = dx1 + i * T * hid;
        a.index_loss = kl + i * T;
        OK(layer_backward(&m.b, &m.ctx, a));
    }
    WITHIN(1e-5, max_error_f(dx, dx1, 2 * T * hid));
    for (int i = 0; i < n_weights; i++) {
        double *want = widened(&m.b, one[i], weight_size(&c, i));
        WITHIN(GRADIENT, gradient_error(all[i], want, weight_size(&c, i)));
    }
    dsa_cache_truncate(&m.ctx, &latent[1], 3);
    dsa_cache_truncate(&m.ctx, &index[1], 3);
    size_t bytes;
    IS(DSA_ERR_ARGUMENT, dsa_layer_backward_workspace(&m.ctx, &a, &bytes));
    a.layer.seqs = &s[0];
    a.layer.indices_in = NULL;
    IS(DSA_ERR_NULL, layer_backward(&m.b, &m.ctx, a));
    a.grads = NULL;
    IS(DSA_ERR_NULL, dsa_layer_backward_workspace(&m.ctx, &a, &bytes));
    bag_free(&m.b);
    PASS();
}

/* ---- PyTorch's gradients in float64 (tools/make_backward_vectors.py) ------------------------------ */
static st_file torch_file;
static const void *torch_data(const char *name, const char *what, int64_t *n)
{
    char full[80];
    snprintf(full, sizeof full, "%s.%s", name, what);
    const st_tensor *t = st_find(&torch_file, full);
    if (t == NULL) { fprintf(stderr, "test vectors: tensor %s is missing\n", full); abort(); }
    if (n) *n = t->count;
    return t->data;
}
static double torch_error(const char *name, const char *what, const float *got)
{
    int64_t n;
    const float *want = (const float *)torch_data(name, what, &n);
    double worst = 0, scale = 0;
    for (int64_t i = 0; i < n; i++) {
        double e = fabs((double)got[i] - (double)want[i]);
        if (!(e <= worst)) worst = e;
        scale = fmax(scale, fabs((double)want[i]));
    }
    if (!(worst <= GRADIENT * scale)) printf("\n  %s.%s", name, what);
    return worst / scale;
}
static const js_value *torch_config(js_value **all, const char *name)
{
    char why[100];
    const char *text = st_metadata(&torch_file, "config");
    *all = text ? js_parse(text, strlen(text), why, sizeof why) : NULL;
    const js_value *c = js_get(*all, name);
    if (c == NULL) { fprintf(stderr, "test vectors: the config of %s is missing\n", name); abort(); }
    return c;
}
static int32_t number(const js_value *c, const char *key) { return (int32_t)js_number(js_get(c, key)); }

TEST torch_layer(const char *name)
{
    bag b = { NULL, 0 };
    js_value *all;
    const js_value *j = torch_config(&all, name);
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.n_heads = number(j, "n_heads");
    c.dim_latent = number(j, "dim_latent");
    c.dim_rope = number(j, "dim_rope");
    c.n_index_heads = number(j, "n_index_heads");
    c.dim_index = number(j, "dim_index");
    c.top_k = number(j, "top_k");
    c.dim_hidden = number(j, "dim_hidden");
    c.dim_q_lora = number(j, "dim_q_lora");
    c.dim_nope = number(j, "dim_nope");
    c.dim_v = number(j, "dim_v");
    c.rope_factor = js_number(js_get(j, "rope_factor"));
    c.rope_original_context = js_number(js_get(j, "rope_original_context"));
    c.index_rope_interleaved = number(j, "index_rope_interleaved");
    c.index_rope_width = number(j, "index_rope_width");
    c.isa = test_isa;
    OK(dsa_init(&ctx, &c));
    const int sparse = strcmp(js_string(js_get(j, "mode")), "sparse") == 0;
    float *grads_all[12], *w[12];
    dsa_layer_weights lw;
    dsa_tensor tensors[12];
    for (int i = 0; i < n_weights; i++) {
        char what[40];
        int64_t n;
        snprintf(what, sizeof what, "w.%s", weight_names[i]);
        const void *data = torch_data(name, what, &n);
        ASSERT_EQ_FMT(weight_size(&ctx.config, i), n, "%ld");
        w[i] = floats(&b, n);
        memcpy(w[i], data, (size_t)n * 4);
        tensors[i] = f32_of(w[i]);
    }
    memcpy(&lw, tensors, sizeof lw);
    int64_t n_x;
    const float *x = (const float *)torch_data(name, "x", &n_x);
    const int32_t T = (int32_t)(n_x / c.dim_hidden);
    const int64_t *positions = (const int64_t *)torch_data(name, "positions", NULL);
    const int32_t *want_lists = (const int32_t *)torch_data(name, "lists", NULL);
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, T, 0);
    dsa_cache latent = cache_of(&b, &ctx, &d), index;
    d.kind = DSA_INDEX_KEY;
    index = cache_of(&b, &ctx, &d);
    dsa_seq s = seq_of(&latent, &index, T);
    float *y = floats(&b, n_x), *dx = zeros(&b, n_x), *kl = floats(&b, T);
    int32_t *lists = ints(&b, T * c.top_k);
    dsa_layer_args f;
    memset(&f, 0, sizeof f);
    f.weights = &lw;
    f.n_seqs = 1;
    f.seqs = &s;
    f.x = x;
    f.y = y;
    f.positions = positions;
    f.mode = sparse ? DSA_LAYER_SPARSE : DSA_LAYER_DENSE;
    f.indices_out = sparse ? lists : NULL;
    OK(layer(&b, &ctx, f));
    WITHIN(GRADIENT, torch_error(name, "y", y));
    if (sparse) ASSERT_MEM_EQ(want_lists, lists, (size_t)(T * c.top_k) * 4);
    dsa_layer_backward_args a;
    memset(&a, 0, sizeof a);
    a.layer = f;
    a.layer.indices_out = NULL;
    a.layer.indices_in = f.indices_out;
    a.d_y = (const float *)torch_data(name, "d_y", NULL);
    a.d_x = dx;
    dsa_layer_grads g = grads_of(&b, &ctx.config, grads_all);
    a.grads = &g;
    a.index_weight = (float)js_number(js_get(j, "index_weight"));
    a.index_loss = kl;
    OK(layer_backward(&b, &ctx, a));
    WITHIN(GRADIENT, torch_error(name, "d_x", dx));
    WITHIN(GRADIENT, torch_error(name, "kl", kl));
    for (int i = 0; i < n_weights; i++) {
        char what[40];
        snprintf(what, sizeof what, "d.%s", weight_names[i]);
        WITHIN(GRADIENT, torch_error(name, what, grads_all[i]));
    }
    js_free(all);
    END(b);
}

TEST torch_sinks(void)
{
    bag b = { NULL, 0 };
    js_value *all;
    const js_value *j = torch_config(&all, "sinks");
    dsa_config c;
    dsa_ctx ctx;
    memset(&c, 0, sizeof c);
    c.n_heads = number(j, "n_heads");
    c.dim_latent = number(j, "dim_latent");
    c.dim_rope = number(j, "dim_rope");
    c.top_k = number(j, "top_k");
    c.softmax_scale = (float)js_number(js_get(j, "softmax_scale"));
    c.isa = test_isa;
    OK(dsa_init(&ctx, &c));
    int64_t n_q, n_kv;
    const float *q = (const float *)torch_data("sinks", "q", &n_q), *kv = (const float *)torch_data("sinks", "kv", &n_kv);
    const int32_t W = c.dim_latent + c.dim_rope, N = (int32_t)(n_kv / W), T = (int32_t)(n_q / W / c.n_heads);
    dsa_cache_desc d = desc_of(DSA_LATENT, DSA_F32, N, 0);
    dsa_cache latent = cache_of(&b, &ctx, &d);
    OK(append(&ctx, &latent, NULL, N, kv, NULL));
    dsa_seq s = seq_of(&latent, NULL, T);
    float *out = floats(&b, n_q), *lse = floats(&b, n_q), *d_q = zeros(&b, n_q), *d_kv = zeros(&b, n_kv), *d_sinks = zeros(&b, c.n_heads);
    dsa_attend_backward_args a;
    size_t bytes = 0;
    memset(&a, 0, sizeof a);
    a.attend.n_seqs = 1;
    a.attend.seqs = &s;
    a.attend.q = q;
    a.attend.indices = (const int32_t *)torch_data("sinks", "lists", NULL);
    a.sinks = (const float *)torch_data("sinks", "sinks", NULL);
    OK(attend(&b, &ctx, a.attend, T, c.n_heads, c.dim_latent, a.sinks, out, lse, NULL));
    a.out = out;
    a.lse = lse;
    a.d_out = (const float *)torch_data("sinks", "d_out", NULL);
    a.d_q = d_q;
    a.d_latent = &d_kv;
    a.d_sinks = d_sinks;
    OK(dsa_attend_backward_workspace(&ctx, &a, &bytes));
    a.attend.workspace = work(&b, bytes);
    a.attend.workspace_size = bytes;
    OK(dsa_attend_backward(&ctx, &a));
    WITHIN(GRADIENT, torch_error("sinks", "d_q", d_q));
    WITHIN(GRADIENT, torch_error("sinks", "d_kv", d_kv));
    WITHIN(GRADIENT, torch_error("sinks", "d_sinks", d_sinks));
    js_free(all);
    END(b);
}

SUITE(backward_suite)
{
    const set_case sets[] = {
        { "list", 3, 21, 6, 5, 12, { 19, 13 }, { 6, 5 }, 9, DSA_ATTEND_LIST, 0, 0, 0 },
        { "list_sinks_pages", 5, 16, 8, 4, 16, { 11, 9 }, { 5, 4 }, 7, DSA_ATTEND_LIST, 1, 1, 3 },
        { "list_blocks", 2, 7, 2, 3, 5, { 40, 30 }, { 3, 3 }, 300, DSA_ATTEND_LIST, 1, 0, 0 },
        { "range", 3, 9, 4, 9, 8, { 17, 12 }, { 5, 6 }, 0, DSA_ATTEND_RANGE, 1, 1, 5 },
        { "visible_blocks", 2, 8, 2, 3, 6, { 530, 261 }, { 2, 35 }, 0, DSA_ATTEND_VISIBLE, 0, 0, 16 },
        { "many_heads", 35, 10, 0, 18, 8, { 12, 9 }, { 4, 3 }, 6, DSA_ATTEND_LIST, 1, 0, 0 } };
    dsa_config yarn = small_config(), narrow = small_config();
    yarn.rope_factor = 40;
    yarn.rope_original_context = 64;
    yarn.index_rope_interleaved = 1;
    yarn.index_rope_offset = 4;
    yarn.rope_layout = DSA_ROPE_HALF;
    narrow.n_heads = 9;
    narrow.dim_latent = 7;
    narrow.dim_nope = 5;
    narrow.dim_v = 3;
    narrow.dim_q_lora = 11;
    narrow.n_index_heads = 2;
    for (int32_t dim = 1; dim <= 40; dim += 13) {
        if (dim > 1) RUN_TESTp(norms, 1, dim);
        RUN_TESTp(norms, 0, dim);
    }
    RUN_TESTp(rotations, 0, 0);
    RUN_TESTp(rotations, 1, 1);
    RUN_TESTp(linear, 3, 7, 5, DSA_F32);
    RUN_TESTp(linear, 150, 131, 49, DSA_BF16);
    RUN_TESTp(linear, 33, 300, 27, DSA_F16);
    RUN_TESTp(linear, 17, 200, 150, DSA_FP8);
    for (size_t i = 0; i < sizeof sets / sizeof sets[0]; i++) {
        CASE(sets[i].name, attention, sets[i]);
        CASE(sets[i].name, scores, sets[i], 0);
        CASE(sets[i].name, scores, sets[i], 1);
    }
    RUN_TEST(set_errors);
    CASE("sparse", a_layer, small_config(), DSA_LAYER_SPARSE);
    CASE("dense", a_layer, small_config(), DSA_LAYER_DENSE);
    CASE("window", a_layer, small_config(), DSA_LAYER_WINDOW);
    CASE("yarn", a_layer, yarn, DSA_LAYER_SPARSE);
    CASE("narrow", a_layer, narrow, DSA_LAYER_DENSE);
    RUN_TEST(a_batch_of_layers);
    char err[300];
    if (st_open("tests/vectors/backward/torch.safetensors", &torch_file, err, sizeof err) != 0) {
        fprintf(stderr, "%s (run from the root of the repository)\n", err);
        abort();
    }
    CASE("sparse", torch_layer, "sparse");
    CASE("dense", torch_layer, "dense");
    CASE("glm_yarn", torch_layer, "glm_yarn");
    RUN_TEST(torch_sinks);
    st_close(&torch_file);
}

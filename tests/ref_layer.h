/* A layer of random weights, and the same layer in double: multi-head attention written out without absorption (spec 2 and 3.1). For
   the tests of dsa_layer and of its backward. */
#ifndef DSA_TESTS_REF_LAYER_H
#define DSA_TESTS_REF_LAYER_H

#include "fixture.h"

/* ---- a layer in double (spec 2, the non-absorbed form, and 3.1) ----------------------------------------------------------- */
typedef struct weights { float *q_a, *q_a_norm, *q_b, *kv_a, *kv_a_norm, *kv_b, *o, *iq_b, *ik, *ik_norm, *ik_bias, *iw; } weights;

static inline void matvec(const float *w, int32_t out, int32_t in, const double *x, double *y)
{
    for (int32_t o = 0; o < out; o++) {
        y[o] = 0;
        for (int32_t i = 0; i < in; i++) y[o] += (double)w[(int64_t)o * in + i] * x[i];
    }
}
static inline void rms(double *x, int32_t n, const float *gain, double eps)
{
    double m = 0;
    for (int32_t i = 0; i < n; i++) m += x[i] * x[i] / n;
    for (int32_t i = 0; i < n; i++) x[i] *= (double)gain[i] / sqrt(m + eps);
}
static inline void rotate(double *x, int32_t n, int half, double position, const dsa_config *c)
{
    double theta = c->rope_theta, low = 0, high = 1;
    int yarn = c->rope_factor > 1;
    if (yarn) {
        double orig = c->rope_original_context, two_pi = 2 * acos(-1);
        low = fmax(floor(n * log(orig / (c->rope_beta_fast * two_pi)) / (2 * log(theta))), 0);
        high = fmin(ceil(n * log(orig / (c->rope_beta_slow * two_pi)) / (2 * log(theta))), n - 1);
        if (low == high) high += 0.001;
    }
    for (int32_t i = 0; i < n / 2; i++) {
        double f = pow(theta, -2.0 * i / n);
        if (yarn) {
            double ramp = fmin(fmax((i - low) / (high - low), 0), 1);
            f = f * (1 - ramp) + f / c->rope_factor * ramp;
        }
        double *a = half ? &x[i] : &x[2 * i], *b = half ? &x[i + n / 2] : &x[2 * i + 1];
        double s = sin(position * f), k = cos(position * f), u = *a * k - *b * s, v = *a * s + *b * k;
        *a = u;
        *b = v;
    }
}

/* T tokens of one sequence. lists [T, top_k] (NULL: dense, or the window if window != 0). y [T, hidden]; scores [T, T] and keys
   [T, D] may be NULL; mass [T, T], may be NULL: Sum_h of the attention weights. on [T, HI, T], may be
   NULL: which ReLUs are on, -1 to be filled in; so differences can step past a corner. `c` is resolved. */
static inline void ref_layer(bag *b, const dsa_config *c, const weights *w, int32_t T, const float *x, const int64_t *positions, const int32_t *lists,
                      int window, double *y, double *scores, double *keys, double *mass, signed char *on)
{
    const int32_t hid = c->dim_hidden, ql = c->dim_q_lora, H = c->n_heads, R = c->dim_latent, r = c->dim_rope > 0 ? c->dim_rope : 0, nope = c->dim_nope,
                  v = c->dim_v, HI = c->n_index_heads, D = c->dim_index, iw = c->index_rope_width > 0 ? c->index_rope_width : 0;
    double *h = doubles(b, hid), *qr = doubles(b, ql), *q = doubles(b, (int64_t)T * H * (nope + r)), *kv = doubles(b, R + r), *up = doubles(b, H * (nope + v));
    double *k = doubles(b, (int64_t)T * H * (nope + r)), *val = doubles(b, (int64_t)T * H * v), *iq = doubles(b, (int64_t)T * HI * D), *ik = doubles(b, (int64_t)T * D),
           *hw = doubles(b, (int64_t)T * HI), *p = doubles(b, T), *o = doubles(b, H * v);
    for (int32_t t = 0; t < T; t++) {
        double pos = positions ? (double)positions[t] : t;
        for (int32_t i = 0; i < hid; i++) h[i] = (double)x[(int64_t)t * hid + i];
        matvec(w->q_a, ql, hid, h, qr);
        rms(qr, ql, w->q_a_norm, (double)c->norm_eps);
        matvec(w->q_b, H * (nope + r), ql, qr, q + (int64_t)t * H * (nope + r));
        matvec(w->kv_a, R + r, hid, h, kv);
        rms(kv, R, w->kv_a_norm, (double)c->norm_eps);
        rotate(kv + R, r, c->rope_layout == DSA_ROPE_HALF, pos, c);
        matvec(w->kv_b, H * (nope + v), R, kv, up);
        for (int32_t a = 0; a < H; a++) {
            rotate(q + ((int64_t)t * H + a) * (nope + r) + nope, r, c->rope_layout == DSA_ROPE_HALF, pos, c);
            memcpy(k + ((int64_t)t * H + a) * (nope + r), up + a * (nope + v), (size_t)nope * sizeof *k);
            memcpy(k + ((int64_t)t * H + a) * (nope + r) + nope, kv + R, (size_t)r * sizeof *k);
            memcpy(val + ((int64_t)t * H + a) * v, up + a * (nope + v) + nope, (size_t)v * sizeof *k);
        }
        if (w->ik == NULL) continue;
        matvec(w->iq_b, HI * D, ql, qr, iq + (int64_t)t * HI * D);
        matvec(w->ik, D, hid, h, ik + (int64_t)t * D);
        double *key = ik + (int64_t)t * D, mean = 0, var = 0;
        for (int32_t i = 0; i < D; i++) mean += key[i] / D;
        for (int32_t i = 0; i < D; i++) var += (key[i] - mean) * (key[i] - mean) / D;
        for (int32_t i = 0; i < D; i++) key[i] = (key[i] - mean) / sqrt(var + (double)c->index_norm_eps) * (double)w->ik_norm[i] + (double)w->ik_bias[i];
        rotate(key + c->index_rope_offset, iw, !c->index_rope_interleaved, pos, c);
        for (int32_t a = 0; a < HI; a++) rotate(iq + ((int64_t)t * HI + a) * D + c->index_rope_offset, iw, !c->index_rope_interleaved, pos, c);
        matvec(w->iw, HI, hid, h, hw + (int64_t)t * HI);
        for (int32_t s = 0; s <= t && scores; s++) {
            double sum = 0;
            for (int32_t a = 0; a < HI; a++) {
                double d = 0;
                for (int32_t i = 0; i < D; i++) d += iq[((int64_t)t * HI + a) * D + i] * ik[(int64_t)s * D + i];
                signed char own = -1, *is_on = on ? &on[((int64_t)t * HI + a) * T + s] : &own;
                if (*is_on < 0) *is_on = d > 0;
                if (*is_on) sum += d * hw[(int64_t)t * HI + a];
            }
            scores[(int64_t)t * T + s] = sum / sqrt((double)HI * D);
        }
    }
    if (keys) memcpy(keys, ik, (size_t)T * (size_t)D * sizeof *keys);
    if (mass) memset(mass, 0, (size_t)T * (size_t)T * sizeof *mass);
    double m = c->rope_factor > 1 && c->mscale > 0 ? 0.1 * (double)c->mscale * log(c->rope_factor) + 1 : 1, scale = m * m / sqrt((double)(nope + r));
    for (int32_t t = 0; t < T; t++) {
        for (int32_t a = 0; a < H; a++) {
            double max = -INFINITY, sum = 0;
            for (int32_t s = 0; s <= t; s++) {
                int seen = lists == NULL && (!window || s > t - c->top_k);
                for (int32_t j = 0; j < c->top_k && lists && !seen; j++) seen = lists[(int64_t)t * c->top_k + j] == s;
                p[s] = seen ? 0 : -INFINITY;
                for (int32_t i = 0; i < nope + r && seen; i++)
                    p[s] += q[((int64_t)t * H + a) * (nope + r) + i] * k[((int64_t)s * H + a) * (nope + r) + i] * scale;
                max = fmax(max, p[s]);
            }
            for (int32_t s = 0; s <= t; s++) sum += p[s] = exp(p[s] - max);
            for (int32_t s = 0; s <= t && mass; s++) mass[(int64_t)t * T + s] += p[s] / sum;
            for (int32_t i = 0; i < v; i++) {
                o[a * v + i] = 0;
                for (int32_t s = 0; s <= t; s++) o[a * v + i] += p[s] / sum * val[((int64_t)s * H + a) * v + i];
            }
        }
        matvec(w->o, hid, H * v, o, y + (int64_t)t * hid);
    }
}

/* ---- random layers ------------------------------------------------------------------------------------------------------------ */
static inline dsa_config small_config(void)
{
    dsa_config c;
    memset(&c, 0, sizeof c);
    c.n_heads = 3;
    c.dim_latent = 20;
    c.dim_rope = 8;
    c.n_index_heads = 5;
    c.dim_index = 16;
    c.top_k = 10;
    c.dim_hidden = 48;
    c.dim_q_lora = 24;
    c.dim_nope = 12;
    c.dim_v = 10;
    c.isa = test_isa;
    return c;
}

typedef struct model {
    bag b;
    dsa_ctx ctx;
    weights w;
    dsa_layer_weights lw;
} model;

static inline float *matrix(bag *b, int32_t out, int32_t in, uint64_t seed) { return random_floats(b, (int64_t)out * in, seed, (float)sqrt(3.0 / in)); }
static inline float *gains(bag *b, int32_t n, uint64_t seed)
{
    float *g = random_floats(b, n, seed, 0.3f);
    for (int32_t i = 0; i < n; i++) g[i] += 1;
    return g;
}
static inline dsa_tensor f32_of(const float *data)
{
    dsa_tensor t;
    t.data = data;
    t.type = DSA_F32;
    t.scale_inv = NULL;
    return t;
}
static inline void use_f32(model *m)
{
    m->lw.q_a = f32_of(m->w.q_a);
    m->lw.q_a_norm = f32_of(m->w.q_a_norm);
    m->lw.q_b = f32_of(m->w.q_b);
    m->lw.kv_a = f32_of(m->w.kv_a);
    m->lw.kv_a_norm = f32_of(m->w.kv_a_norm);
    m->lw.kv_b = f32_of(m->w.kv_b);
    m->lw.o = f32_of(m->w.o);
    m->lw.index_q_b = f32_of(m->w.iq_b);
    m->lw.index_k = f32_of(m->w.ik);
    m->lw.index_k_norm = f32_of(m->w.ik_norm);
    m->lw.index_k_bias = f32_of(m->w.ik_bias);
    m->lw.index_w = f32_of(m->w.iw);
}
static inline void open_model(model *m, dsa_config c)
{
    memset(m, 0, sizeof *m);
    dsa_status st = dsa_init(&m->ctx, &c);
    if (st != DSA_OK) { fprintf(stderr, "test set-up: dsa_init: %s\n", dsa_status_text(st)); abort(); }
    c = m->ctx.config;
    int32_t r = c.dim_rope > 0 ? c.dim_rope : 0;
    m->w.q_a = matrix(&m->b, c.dim_q_lora, c.dim_hidden, 101);
    m->w.q_a_norm = gains(&m->b, c.dim_q_lora, 102);
    m->w.q_b = matrix(&m->b, c.n_heads * (c.dim_nope + r), c.dim_q_lora, 103);
    m->w.kv_a = matrix(&m->b, c.dim_latent + r, c.dim_hidden, 104);
    m->w.kv_a_norm = gains(&m->b, c.dim_latent, 105);
    m->w.kv_b = matrix(&m->b, c.n_heads * (c.dim_nope + c.dim_v), c.dim_latent, 106);
    m->w.o = matrix(&m->b, c.dim_hidden, c.n_heads * c.dim_v, 107);
    m->w.iq_b = matrix(&m->b, c.n_index_heads * c.dim_index, c.dim_q_lora, 108);
    m->w.ik = matrix(&m->b, c.dim_index, c.dim_hidden, 109);
    m->w.ik_norm = gains(&m->b, c.dim_index, 110);
    m->w.ik_bias = random_floats(&m->b, c.dim_index, 111, 0.2f);
    m->w.iw = matrix(&m->b, c.n_index_heads, c.dim_hidden, 112);
    use_f32(m);
}
static inline float *inputs(model *m, int32_t T, uint64_t seed) { return random_floats(&m->b, (int64_t)T * m->ctx.config.dim_hidden, seed, 1.7f); }
static inline dsa_cache new_cache(model *m, dsa_kind kind, dsa_type format, int64_t capacity, int32_t page)
{
    dsa_cache_desc d = desc_of(kind, format, capacity, page);
    return cache_of(&m->b, &m->ctx, &d);
}

/* T tokens through new caches of one sequence, `chunk` at a time (0: all at once). */
typedef struct run_args { dsa_type latent, index; int32_t page, chunk; dsa_layer_mode mode; const int64_t *positions; const int32_t *lists; } run_args;
static inline dsa_status run(model *m, run_args r, int32_t T, const float *x, float *y, int32_t *lists, dsa_cache *latent, dsa_cache *index)
{
    const int32_t hid = m->ctx.config.dim_hidden, k = m->ctx.config.top_k;
    *latent = new_cache(m, DSA_LATENT, r.latent, T, r.page);
    *index = new_cache(m, DSA_INDEX_KEY, r.index, T, r.page);
    for (int32_t t = 0, n; t < T; t += n) {
        n = r.chunk == 0 || r.chunk > T - t ? T - t : r.chunk;
        dsa_seq s = seq_of(latent, index, n);
        dsa_layer_args a;
        memset(&a, 0, sizeof a);
        a.weights = &m->lw;
        a.n_seqs = 1;
        a.seqs = &s;
        a.x = x + (int64_t)t * hid;
        a.y = y + (int64_t)t * hid;
        a.positions = r.positions ? r.positions + t : NULL;
        a.mode = r.mode;
        a.indices_in = r.lists ? r.lists + (int64_t)t * k : NULL;
        a.indices_out = lists ? lists + (int64_t)t * k : NULL;
        dsa_status st = layer(&m->b, &m->ctx, a);
        if (st != DSA_OK) return st;
    }
    return DSA_OK;
}
static const run_args plain = { DSA_F32, DSA_F32, 0, 0, DSA_LAYER_SPARSE, NULL, NULL };

#endif

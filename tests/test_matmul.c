/* The projection kernels by themselves, against double precision: every weight type at odd addresses, odd sizes, partial blocks of scales,
   1 to 33 rows; and that an output's bits depend on nothing but its row of x and its weights. A private copy of the implementation gives
   access to the kernel table. */
#define DSA_STATIC
#define DSA_IMPLEMENTATION
#include "fixture.h"
#include "brute.h"

typedef struct matrix { dsa_tensor w; int64_t in, rows; float *value; } matrix;

/* Rows of a weight whose last byte is the last of its memory. The values are those that a reader of the format gets. */
static matrix new_matrix(bag *b, dsa_type type, int64_t in, int64_t rows, uint64_t seed)
{
    const int64_t n = in * rows, size = type == DSA_F32 ? 4 : type == DSA_FP8 ? 1 : 2, wide = (in + 127) / 128, tall = (rows + 127) / 128;
    unsigned char *data = (unsigned char *)bag_alloc(b, (size_t)(n * size) + 1) + 1;
    unsigned char *scales = (unsigned char *)bag_alloc(b, (size_t)(4 * wide * tall) + 1) + 1;
    matrix m;
    m.in = in;
    m.rows = rows;
    m.value = random_floats(b, n, seed, 1.0f);
    for (int64_t i = 0; i < wide * tall; i++) {
        float s = 0.001f * (float)(1 + rnd_below(&seed, 999));
        memcpy(scales + 4 * i, &s, 4);
    }
    for (int64_t i = 0; i < n; i++) {
        float *v = &m.value[i], s;
        uint16_t h = type == DSA_BF16 ? dsa_f32_to_bf16(*v) : dsa_f32_to_f16(*v);
        if (type == DSA_F32) {
            memcpy(data + 4 * i, v, 4);
        } else if (type == DSA_FP8) {
            uint8_t code = (uint8_t)rnd_below(&seed, 256);   /* every number that there is, subnormals included */
            if ((code & 0x7F) == 0x7F) code ^= 1;
            data[i] = code;
            memcpy(&s, scales + 4 * (i / in / 128 * wide + i % in / 128), 4);
            *v = (float)ref_from_e4m3(code) * s;
        } else {
            memcpy(data + 2 * i, &h, 2);
            *v = type == DSA_BF16 ? dsa_bf16_to_f32(h) : dsa_f16_to_f32(h);
        }
    }
    m.w.data = data;
    m.w.type = type;
    m.w.scale_inv = (const float *)(const void *)scales;
    return m;
}

typedef struct product { const matrix *m; int transposed; int64_t n, n_out, first, ldx, ldy; const float *x; } product;

static int64_t width_in(const product *p)  { return p->transposed ? p->n_out : p->m->in; }
static int64_t width_out(const product *p) { return p->transposed ? p->m->in : p->n_out; }

static void multiply(bag *b, const product *p, float *y)
{
    const dsa__kernels *k = dsa__kernels_for(test_isa);
    size_t keep = b->n, bytes = (size_t)k->matmul_bytes(p->n, p->m->in, p->m->in);
    unsigned char *scratch = (unsigned char *)bag_alloc(b, bytes + 64);
    memset(scratch, 0xFF, bytes + 64);                       /* whatever is read before it is written is NaN */
    scratch += (size_t)(-(uintptr_t)scratch & 63u);
    (p->transposed ? k->matmul_t : k->matmul)(p->n, p->m->in, p->n_out, p->x, p->ldx, &p->m->w, p->first, y, p->ldy, scratch);
    bag_shrink(b, keep);
}

/* The largest error of y, relative to the sum of the magnitudes of its terms. */
static double worst(const product *p, const float *y)
{
    double most = 0;
    for (int64_t t = 0; t < p->n; t++)
        for (int64_t o = 0; o < width_out(p); o++) {
            double sum = 0, mass = 0;
            for (int64_t i = 0; i < width_in(p); i++) {
                int64_t row = p->first + (p->transposed ? i : o), col = p->transposed ? o : i;
                double term = (double)p->m->value[row * p->m->in + col] * (double)p->x[t * p->ldx + i];
                sum += term;
                mass += fabs(term);
            }
            double e = fabs((double)y[t * p->ldy + o] - sum) / (mass + 1e-30);
            if (!(e <= most)) most = e;                      /* NaN stays */
        }
    return most;
}

TEST products_match_double(dsa_type type, int transposed)
{
    static const int64_t shapes[][3] = {                     /* in, n_out, first */
        { 1, 1, 0 }, { 3, 5, 1 }, { 15, 2, 3 }, { 16, 8, 0 }, { 17, 9, 2 }, { 31, 33, 0 }, { 32, 4, 5 }, { 33, 7, 0 },
        { 63, 64, 1 }, { 64, 65, 0 }, { 65, 70, 60 }, { 127, 130, 0 }, { 128, 128, 128 }, { 129, 3, 126 }, { 200, 257, 100 }, { 511, 6, 0 },
        { 512, 13, 125 }, { 513, 19, 0 }, { 577, 140, 3 }, { 1100, 12, 7 }, { 2111, 5, 0 } };
    bag b = { NULL, 0 };
    int64_t round = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        const int64_t in = shapes[i][0], n_out = shapes[i][1], first = shapes[i][2];
        matrix m = new_matrix(&b, type, in, first + n_out, 7000 + i);
        product p = { &m, transposed, 0, n_out, first, 0, 0, NULL };
        p.ldx = width_in(&p) + 3;
        p.ldy = width_out(&p) + 2;
        float *x = random_floats(&b, 33 * p.ldx, 7100 + i, 2.0f), *y = floats(&b, 33 * p.ldy + 1) + 1, *z = floats(&b, p.ldy);
        p.x = x;
        for (int64_t n = 1; n <= 33; n += in * n_out < 5000 || n == 1 || n > 31 ? 1 : 1 + (round++ % 5)) {
            p.n = n;
            for (int64_t j = 0; j < n * p.ldy; j++) y[j] = -77.0f;
            multiply(&b, &p, y);
            WITHIN(1e-6, worst(&p, y));
            for (int64_t t = 0; t < n; t++)
                for (int64_t j = width_out(&p); j < p.ldy; j++) ASSERT(y[t * p.ldy + j] == -77.0f);
            /* each row alone */
            for (int64_t t = 0; t < n; t += n > 3 ? n - 1 : 1) {
                product one = p;
                one.n = 1;
                one.x = x + t * p.ldx;
                multiply(&b, &one, z);
                ASSERT(same_bits(z, y + t * p.ldy, width_out(&p)));
            }
        }
        bag_free(&b);
    }
    PASS();
}

/* A thread gets any run of outputs. */
TEST outputs_may_be_split_anywhere(dsa_type type)
{
    bag b = { NULL, 0 };
    const int64_t rows[4] = { 1, 2, 7, 32 };
    matrix m = new_matrix(&b, type, 700, 300, 7200);
    float *x = random_floats(&b, 32 * 700, 7201, 1.0f), *y = floats(&b, 32 * 290), *z = floats(&b, 32 * 290);
    uint64_t seed = 7;
    for (int i = 0; i < 4; i++) {
        product p = { &m, 0, rows[i], 290, 10, 700, 290, x };
        multiply(&b, &p, y);
        for (int64_t o = 0; o < 290; o += p.n_out) {
            p.first = 10 + o;
            p.n_out = 1 + rnd_below(&seed, 150);
            if (p.n_out > 290 - o) p.n_out = 290 - o;
            multiply(&b, &p, z + o);
        }
        ASSERT(same_bits(y, z, rows[i] * 290));
    }
    END(b);
}

/* One column, x = 1, no scale: every e4m3 code as itself. */
TEST every_code_is_its_value(int transposed)
{
    bag b = { NULL, 0 };
    uint8_t codes[256];
    float scales[2] = { 1, 1 }, x[2 * 256], y[2 * 256];
    for (int i = 0; i < 256; i++) codes[i] = (uint8_t)i;
    for (int i = 0; i < 512; i++) x[i] = 1;
    for (int64_t n = 1; n <= 2; n++) {
        matrix m = { { codes, DSA_FP8, scales }, transposed ? 256 : 1, transposed ? 1 : 256, NULL };
        product p = { &m, transposed, n, transposed ? 1 : 256, 0, 1, 256, x };
        multiply(&b, &p, y);
        for (int64_t j = 0; j < n * 256; j++) {
            if (j % 128 == 127) ASSERT(y[j] != y[j]);
            else ASSERT_EQ((float)ref_from_e4m3((uint8_t)(j % 256)), y[j]);
        }
    }
    END(b);
}

/* A NaN weight and an infinite x reach the outputs that they belong to, and no other. */
TEST nan_and_infinity_stay_where_they_belong(dsa_type type)
{
    bag b = { NULL, 0 };
    enum { IN = 190, OUT = 21 };
    const int64_t size = type == DSA_F32 ? 4 : type == DSA_FP8 ? 1 : 2;
    const float nan = dsa__nan();
    for (int round = 0; round < 24; round++) {
        const int64_t n = 1 + round % 8, row = round * 5 % OUT, col = round * 37 % IN, out = n * (round % 2 ? IN : OUT);
        matrix m = new_matrix(&b, type, IN, OUT, 7300 + (uint64_t)round);
        product p = { &m, round % 2, n, OUT, 0, IN, round % 2 ? IN : OUT, NULL };
        float *x = random_floats(&b, 8 * IN, 7400, 1.0f), *y = floats(&b, out);
        unsigned char *at = (unsigned char *)(uintptr_t)m.w.data + (row * IN + col) * size;
        p.x = x;
        if (type == DSA_F32) memcpy(at, &nan, 4);
        else if (type == DSA_FP8) *at = round % 4 < 2 ? 0x7F : 0xFF;
        else { uint16_t h = type == DSA_BF16 ? 0x7FC1 : 0xFE01; memcpy(at, &h, 2); }
        multiply(&b, &p, y);
        for (int64_t t = 0; t < n; t++)
            for (int64_t o = 0; o < p.ldy; o++) {
                float v = y[t * p.ldy + o];
                if (o == (p.transposed ? col : row)) ASSERT(v != v);
                else ASSERT(fabs((double)v) < 1e9);
            }
        bag_free(&b);
        m = new_matrix(&b, type, IN, OUT, 7500);
        x = random_floats(&b, 8 * IN, 7400, 1.0f);
        y = floats(&b, out);
        x[(n - 1) * IN + round % OUT] = dsa__infinity();
        p.m = &m;
        p.x = x;
        multiply(&b, &p, y);
        for (int64_t t = 0; t < n; t++)
            for (int64_t o = 0; o < p.ldy; o++) ASSERT((fabs((double)y[t * p.ldy + o]) < 1e9) == (t < n - 1));
        bag_free(&b);
    }
    PASS();
}

SUITE(matmul_suite)
{
    char name[32];
    for (int type = DSA_F32; type <= DSA_FP8; type++) {
        CASE(brute_type_name((dsa_type)type), products_match_double, (dsa_type)type, 0);
        CASE(brute_type_name((dsa_type)type), outputs_may_be_split_anywhere, (dsa_type)type);
        CASE(brute_type_name((dsa_type)type), nan_and_infinity_stay_where_they_belong, (dsa_type)type);
        snprintf(name, sizeof name, "transposed_%s", brute_type_name((dsa_type)type));
        CASE(name, products_match_double, (dsa_type)type, 1);
    }
    CASE("plain", every_code_is_its_value, 0);
    CASE("transposed", every_code_is_its_value, 1);
}

/* Number formats, row operations and the constants of the presets, each against formulas in double precision. */
#define _POSIX_C_SOURCE 200809L
#include <float.h>
#include "../dsa.h"
#include "harness.h"
#include "brute.h"

/* ---- bf16 --------------------------------------------------------------------------------------- */
/* Value of a code of a small float format from its fields; the infinities and NaN of bf16 and f16 are the caller's. */
static double decode(uint32_t code, int exponent_bits, int fraction_bits)
{
    int bias = (1 << (exponent_bits - 1)) - 1;
    int e = (int)(code >> fraction_bits) & ((1 << exponent_bits) - 1);
    double fraction = (double)(code & ((1u << fraction_bits) - 1));
    double v = e == 0 ? ldexp(fraction, 1 - bias - fraction_bits)
                      : ldexp(fraction + ldexp(1.0, fraction_bits), e - bias - fraction_bits);
    return code >> (exponent_bits + fraction_bits) & 1 ? -v : v;
}

TEST bf16_decodes_every_code(void)
{
    for (uint32_t c = 0; c < 65536; c++) {
        float x = dsa_bf16_to_f32((uint16_t)c);
        if ((c & 0x7F80) != 0x7F80) ASSERT_EQ_FMT(decode(c, 8, 7), (double)x, "%.17g");
        else if (c & 0x7F) ASSERT(isnan(x));
        else ASSERT(isinf(x));
        ASSERT_EQ_FMT(c >> 15, brute_bits(x) >> 31, "%u");
    }
    PASS();
}

TEST bf16_round_trips_every_code(void)
{
    for (uint32_t c = 0; c < 65536; c++) {
        uint32_t back = dsa_f32_to_bf16(dsa_bf16_to_f32((uint16_t)c));
        if ((c & 0x7FFF) > 0x7F80) ASSERT((back & 0x7FFF) > 0x7F80);
        else ASSERT_EQ_FMT(c, back, "%04x");
    }
    PASS();
}

/* The f32 halfway between two neighbours goes to the even one, one ulp to either side to the nearer one: for every
   neighbouring pair, the step from the largest finite value to infinity included. */
TEST bf16_rounds_halves_to_even(void)
{
    for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000)
        for (uint32_t c = 0; c < 0x7F80; c++) {
            uint32_t half = (sign | c) << 16 | 0x8000;
            ASSERT_EQ_FMT(sign | (c + (c & 1)), (uint32_t)dsa_f32_to_bf16(brute_float(half)), "%04x");
            ASSERT_EQ_FMT(sign | c, (uint32_t)dsa_f32_to_bf16(brute_float(half - 1)), "%04x");
            ASSERT_EQ_FMT(sign | (c + 1), (uint32_t)dsa_f32_to_bf16(brute_float(half + 1)), "%04x");
        }
    PASS();
}

/* A NaN whose payload lies in the bits that are dropped must not turn into infinity. */
TEST bf16_keeps_nan(void)
{
    static const uint32_t nans[] = { 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF };
    for (size_t i = 0; i < sizeof nans / sizeof *nans; i++)
        ASSERT((dsa_f32_to_bf16(brute_float(nans[i])) & 0x7FFF) > 0x7F80);
    PASS();
}

TEST bf16_matches_double_rounding(void)
{
    brute_rng r = { 1 };
    for (int i = 0; i < 300000; i++) {
        float x = brute_float((uint32_t)brute_u64(&r));
        if (!(fabsf(x) < 3e38f)) continue;
        ASSERT_EQ_FMT(brute_round_bf16((double)x), (double)dsa_bf16_to_f32(dsa_f32_to_bf16(x)), "%.17g");
    }
    PASS();
}

/* ---- f16 ---------------------------------------------------------------------------------------- */
TEST f16_decodes_every_code(void)
{
    for (uint32_t c = 0; c < 65536; c++) {
        float x = dsa_f16_to_f32((uint16_t)c);
        if ((c & 0x7C00) != 0x7C00) ASSERT_EQ_FMT(decode(c, 5, 10), (double)x, "%.17g");
        else if (c & 0x3FF) ASSERT(isnan(x));
        else ASSERT(isinf(x));
        ASSERT_EQ_FMT(c >> 15, brute_bits(x) >> 31, "%u");
    }
    PASS();
}

TEST f16_round_trips_every_code(void)
{
    for (uint32_t c = 0; c < 65536; c++) {
        uint32_t back = dsa_f32_to_f16(dsa_f16_to_f32((uint16_t)c));
        if ((c & 0x7FFF) > 0x7C00) ASSERT((back & 0x7FFF) > 0x7C00);
        else ASSERT_EQ_FMT(c, back, "%04x");
    }
    PASS();
}

TEST f16_rounds_halves_to_even(void)
{
    for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000)
        for (uint32_t c = 0; c < 0x7C00; c++) {
            /* code 0x7C00 read as a number is 65536, the value the step to infinity is measured by */
            float half = (float)((decode(c, 5, 10) + decode(c + 1, 5, 10)) / 2);
            uint32_t b = brute_bits(half) | sign << 16;
            ASSERT_EQ_FMT(sign | (c + (c & 1)), (uint32_t)dsa_f32_to_f16(brute_float(b)), "%04x");
            ASSERT_EQ_FMT(sign | c, (uint32_t)dsa_f32_to_f16(brute_float(b - 1)), "%04x");
            ASSERT_EQ_FMT(sign | (c + 1), (uint32_t)dsa_f32_to_f16(brute_float(b + 1)), "%04x");
        }
    PASS();
}

TEST f16_handles_the_ends_of_the_range(void)
{
    ASSERT_EQ_FMT(0x7C00, dsa_f32_to_f16(HUGE_VALF), "%04x");
    ASSERT_EQ_FMT(0xFC00, dsa_f32_to_f16(-HUGE_VALF), "%04x");
    ASSERT_EQ_FMT(0x7C00, dsa_f32_to_f16(FLT_MAX), "%04x");
    ASSERT_EQ_FMT(0xFC00, dsa_f32_to_f16(-1e6f), "%04x");
    ASSERT_EQ_FMT(0x7BFF, dsa_f32_to_f16(65504.0f), "%04x");
    ASSERT_EQ_FMT(0x0000, dsa_f32_to_f16(FLT_MIN), "%04x");
    ASSERT_EQ_FMT(0x8000, dsa_f32_to_f16(-FLT_MIN), "%04x");
    ASSERT_EQ_FMT(0x0000, dsa_f32_to_f16(brute_float(1)), "%04x");           /* an f32 subnormal */
    ASSERT_EQ_FMT(0x8000, dsa_f32_to_f16(-0.0f), "%04x");
    ASSERT((dsa_f32_to_f16(brute_float(0x7F800001)) & 0x7FFF) > 0x7C00);
    ASSERT((dsa_f32_to_f16(brute_float(0xFFFFFFFF)) & 0x7FFF) > 0x7C00);
    PASS();
}

TEST f16_matches_double_rounding(void)
{
    brute_rng r = { 2 };
    for (int i = 0; i < 300000; i++) {
        float x = (float)(brute_normal(&r) * ldexp(1.0, (int)brute_below(&r, 44) - 28));
        if (!(fabsf(x) < 65504)) continue;
        ASSERT_EQ_FMT(brute_round((double)x, 10, -14), (double)dsa_f16_to_f32(dsa_f32_to_f16(x)), "%.17g");
    }
    PASS();
}

/* ---- e4m3 --------------------------------------------------------------------------------------- */
TEST e4m3_decodes_every_code(void)
{
    for (uint32_t c = 0; c < 256; c++) {
        float x = dsa_e4m3_to_f32((uint8_t)c);
        if ((c & 0x7F) == 0x7F) { ASSERT(isnan(x)); continue; }
        ASSERT_EQ_FMT(decode(c, 4, 3), (double)x, "%.17g");
        ASSERT_EQ_FMT(c >> 7, brute_bits(x) >> 31, "%u");
    }
    ASSERT_EQ_FMT(448.0, (double)dsa_e4m3_to_f32(0x7E), "%g");
    ASSERT_EQ_FMT(0x1p-9, (double)dsa_e4m3_to_f32(0x01), "%g");
    PASS();
}

TEST e4m3_round_trips_every_code(void)
{
    for (uint32_t c = 0; c < 256; c++)
        ASSERT_EQ_FMT(c, (uint32_t)dsa_f32_to_e4m3(dsa_e4m3_to_f32((uint8_t)c)), "%02x");
    PASS();
}

TEST e4m3_rounds_halves_to_even(void)
{
    for (uint32_t sign = 0; sign <= 0x80; sign += 0x80)
        for (uint32_t c = 0; c < 0x7E; c++) {
            float half = (float)((decode(c, 4, 3) + decode(c + 1, 4, 3)) / 2);
            uint32_t b = brute_bits(half) | sign << 24;
            ASSERT_EQ_FMT(sign | (c + (c & 1)), (uint32_t)dsa_f32_to_e4m3(brute_float(b)), "%02x");
            ASSERT_EQ_FMT(sign | c, (uint32_t)dsa_f32_to_e4m3(brute_float(b - 1)), "%02x");
            ASSERT_EQ_FMT(sign | (c + 1), (uint32_t)dsa_f32_to_e4m3(brute_float(b + 1)), "%02x");
        }
    PASS();
}

TEST e4m3_saturates_and_keeps_nan(void)
{
    static const float large[] = { 448.0f, 449.0f, 464.0f, 465.0f, 480.0f, 1e10f, FLT_MAX, HUGE_VALF };
    for (size_t i = 0; i < sizeof large / sizeof *large; i++) {
        ASSERT_EQ_FMT(0x7E, dsa_f32_to_e4m3(large[i]), "%02x");
        ASSERT_EQ_FMT(0xFE, dsa_f32_to_e4m3(-large[i]), "%02x");
    }
    ASSERT_EQ_FMT(0x7F, dsa_f32_to_e4m3(brute_float(0x7FC00000)), "%02x");
    ASSERT_EQ_FMT(0xFF, dsa_f32_to_e4m3(brute_float(0xFFC00000)), "%02x");
    ASSERT_EQ_FMT(0x7F, dsa_f32_to_e4m3(brute_float(0x7F800001)), "%02x");
    ASSERT_EQ_FMT(0xFF, dsa_f32_to_e4m3(brute_float(0xFF800001)), "%02x");
    ASSERT_EQ_FMT(0x00, dsa_f32_to_e4m3(0.0f), "%02x");
    ASSERT_EQ_FMT(0x80, dsa_f32_to_e4m3(-0.0f), "%02x");
    ASSERT_EQ_FMT(0x00, dsa_f32_to_e4m3(FLT_MIN), "%02x");
    ASSERT_EQ_FMT(0x80, dsa_f32_to_e4m3(-brute_float(1)), "%02x");
    PASS();
}

/* The nearest of all 254 numbers, found by looking at every one; of two equally near the one with the even code. */
static uint8_t nearest_e4m3(double x)
{
    uint32_t best = 0;
    double least = HUGE_VAL;
    for (uint32_t c = 0; c < 0x7F; c++) {
        double distance = fabs(fabs(x) - decode(c, 4, 3));
        if (distance < least || (distance == least && c % 2 == 0)) { least = distance; best = c; }
    }
    return (uint8_t)(best | (signbit(x) ? 0x80u : 0));
}

TEST e4m3_matches_a_search_for_the_nearest(void)
{
    brute_rng r = { 3 };
    for (int i = 0; i < 60000; i++) {
        /* magnitudes from far below the smallest subnormal to above 448, every exponent equally often */
        uint32_t b = (uint32_t)(brute_below(&r, 24) + 113) << 23 | (uint32_t)(brute_u64(&r) & 0x807FFFFF);
        if (i % 3 == 0) b &= 0xFFF80000;                          /* short fractions: many exact ties */
        float x = brute_float(b);
        ASSERT_EQ_FMT(nearest_e4m3((double)x), dsa_f32_to_e4m3(x), "%02x");
        ASSERT_EQ_FMT(brute_round_e4m3((double)x), (double)dsa_e4m3_to_f32(dsa_f32_to_e4m3(x)), "%g");
    }
    for (int i = 0; i < 60000; i++) {
        float x = brute_float((uint32_t)brute_u64(&r));
        if (isnan(x)) continue;
        ASSERT_EQ_FMT(nearest_e4m3(fabsf(x) > 448 ? copysign(448.0, (double)x) : (double)x), dsa_f32_to_e4m3(x), "%02x");
    }
    PASS();
}

/* ---- ue8m0 and powers of two -------------------------------------------------------------------- */
TEST ue8m0_decodes_every_code(void)
{
    for (int c = 0; c < 255; c++)
        ASSERT_EQ_FMT(ldexp(1.0, c - 127), (double)dsa_ue8m0_to_f32((uint8_t)c), "%g");
    ASSERT(isnan(dsa_ue8m0_to_f32(255)));
    PASS();
}

TEST ue8m0_rounds_up(void)
{
    for (int c = 0; c < 255; c++) {
        float x = (float)ldexp(1.0, c - 127);
        ASSERT_EQ_FMT(c, dsa_f32_to_ue8m0_ceil(x), "%d");
        if (c > 0) ASSERT_EQ_FMT(c, dsa_f32_to_ue8m0_ceil(nextafterf(x, 0)), "%d");
        if (c < 254) ASSERT_EQ_FMT(c + 1, dsa_f32_to_ue8m0_ceil(nextafterf(x, HUGE_VALF)), "%d");
    }
    ASSERT_EQ_FMT(0, dsa_f32_to_ue8m0_ceil(brute_float(1)), "%d");
    PASS();
}

TEST pow2_ceil_is_the_least_power(void)
{
    brute_rng r = { 4 };
    for (int e = -149; e <= 127; e++) {
        float x = (float)ldexp(1.0, e);
        ASSERT_EQ_FMT((double)x, (double)dsa_pow2_ceil(x), "%g");
        if (e < 127) ASSERT_EQ_FMT(ldexp(1.0, e + 1), (double)dsa_pow2_ceil(nextafterf(x, HUGE_VALF)), "%g");
    }
    for (int i = 0; i < 100000; i++) {
        float x = fabsf(brute_float((uint32_t)brute_u64(&r)));
        if (!(x > 0 && x <= 0x1p127f)) continue;
        double p = (double)dsa_pow2_ceil(x);
        int e;
        ASSERT_EQ_FMT(0.5, frexp(p, &e), "%g");
        ASSERT(p >= (double)x && p / 2 < (double)x);
    }
    PASS();
}

/* ---- quantised rows ----------------------------------------------------------------------------- */
TEST quantize_e4m3_matches_the_formula(int32_t n)
{
    brute_rng r = { 5 };
    float *x = brute_alloc((size_t)n * sizeof *x);
    uint8_t *y = brute_alloc((size_t)n);
    double *want = brute_alloc((size_t)n * sizeof *want);
    int ok = 1;
    for (int trial = 0; trial < 200; trial++) {
        brute_fill_normal(&r, x, n, ldexp(1.0, (int)brute_below(&r, 60) - 30));
        float scale = dsa_quantize_e4m3(x, n, y);
        int e;
        ok = ok && frexp((double)scale, &e) == 0.5;
        brute_round_row(DSA_FP8, 0, x, n, want);
        for (int32_t i = 0; i < n; i++) ok = ok && want[i] == (double)scale * (double)dsa_e4m3_to_f32(y[i]);
    }
    free(x); free(y); free(want);
    ASSERT(ok);
    PASS();
}

/* Spec 3.4: the floor of amax is 1e-4, so the least scale is 2^ceil(log2(1e-4/448)) = 2^-22, and amax/448 that is already
   a power of two is kept. */
TEST quantize_e4m3_scale_edges(void)
{
    uint8_t y[4];
    float zero[4] = { 0, -0.0f, 0, 0 }, tiny[4] = { 1e-30f, -1e-5f, 0, 9.9e-5f };
    float exact[4] = { 448, -1, 0.5f, 447 }, above[4] = { -448.0001f, 1, 2, 3 };
    ASSERT_EQ_FMT(0x1p-22, (double)dsa_quantize_e4m3(zero, 4, y), "%g");
    for (int i = 0; i < 4; i++) ASSERT_EQ_FMT(0, y[i] & 0x7F, "%d");
    ASSERT_EQ_FMT(0x1p-22, (double)dsa_quantize_e4m3(tiny, 4, y), "%g");
    ASSERT_EQ_FMT(1.0, (double)dsa_quantize_e4m3(exact, 4, y), "%g");
    ASSERT_EQ_FMT(0x7E, y[0], "%02x");
    ASSERT_EQ_FMT(0xB8, y[1], "%02x");
    ASSERT_EQ_FMT(2.0, (double)dsa_quantize_e4m3(above, 4, y), "%g");
    ASSERT_EQ_FMT(0xF6, y[0], "%02x");                              /* -224 */
    PASS();
}

/* Infinity counts as the largest finite number, so that a scale stays finite; NaN has no part in it. */
TEST scales_stay_finite(void)
{
    float x[4] = { -INFINITY, 1, NAN, INFINITY }, s;
    uint8_t y[4];
    int8_t z[4];
    s = dsa_quantize_e4m3(x, 4, y);
    ASSERT_EQ_FMT(0x1p120, (double)s, "%g");                        /* 2^ceil(log2(FLT_MAX / 448)) */
    ASSERT_EQ_FMT(0xFE, y[0], "%02x");
    ASSERT_EQ_FMT(0x00, y[1], "%02x");
    ASSERT_EQ_FMT(0x7F, y[2] & 0x7F, "%02x");
    ASSERT_EQ_FMT(0x7E, y[3], "%02x");
    const float with_nan[3] = { 1, NAN, -2 };
    ASSERT_EQ_FMT(0x1p-7, (double)dsa_quantize_e4m3(with_nan, 3, y), "%g");     /* 2^ceil(log2(2 / 448)) */
    ASSERT_EQ_FMT(0xF8, y[2], "%02x");                              /* -256 */
    x[2] = 2;
    s = dsa_quantize_int8(x, 4, z);
    const float most = FLT_MAX / 127;                               /* assigned: x87 would keep more bits */
    ASSERT_EQ_FMT((double)most, (double)s, "%g");
    ASSERT_EQ_FMT(-127, z[0], "%d");
    ASSERT_EQ_FMT(0, z[1], "%d");
    ASSERT_EQ_FMT(127, z[3], "%d");
    PASS();
}

TEST quantize_int8_matches_the_formula(int32_t n)
{
    brute_rng r = { 6 };
    float *x = brute_alloc((size_t)n * sizeof *x);
    int8_t *y = brute_alloc((size_t)n);
    int ok = 1;
    for (int trial = 0; trial < 200; trial++) {
        float amax = 1e-4f;
        brute_fill_normal(&r, x, n, ldexp(1.0, (int)brute_below(&r, 60) - 30));
        for (int32_t i = 0; i < n; i++) if (fabsf(x[i]) > amax) amax = fabsf(x[i]);
        float scale = dsa_quantize_int8(x, n, y), want = amax / 127;
        ok = ok && scale == want;
        for (int32_t i = 0; i < n; i++) {
            float ratio = x[i] / scale;
            ok = ok && y[i] == (int)rintf(ratio);
        }
    }
    free(x); free(y);
    ASSERT(ok);
    PASS();
}

TEST quantize_int8_rounds_halves_to_even_and_clamps(void)
{
    /* amax 127 makes the scale 1, so that the halves are exact */
    float x[12] = { 127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 126.5f, -126.5f, -127, 125.5f, 0 };
    static const int want[12] = { 127, 0, 2, 2, 0, -2, -2, 126, -126, -127, 126, 0 };
    int8_t y[12];
    ASSERT_EQ_FMT(1.0, (double)dsa_quantize_int8(x, 12, y), "%g");
    for (int i = 0; i < 12; i++) ASSERT_EQ_FMT(want[i], y[i], "%d");
    const float least = 1e-4f / 127;
    float zero[3] = { 0, 0, -0.0f }, tiny[3] = { 5e-5f, -1e-4f, 1e-12f };
    ASSERT_EQ_FMT((double)least, (double)dsa_quantize_int8(zero, 3, y), "%g");
    for (int i = 0; i < 3; i++) ASSERT_EQ_FMT(0, y[i], "%d");
    ASSERT_EQ_FMT((double)least, (double)dsa_quantize_int8(tiny, 3, y), "%g");
    ASSERT_EQ_FMT(-127, y[1], "%d");
    /* whatever amax/127 rounds to, nothing ever reaches -128 */
    brute_rng r = { 7 };
    for (int i = 0; i < 20000; i++) {
        float pair[2];
        pair[0] = -fabsf((float)brute_normal(&r)) - 1e-3f;
        pair[1] = pair[0] / 2;
        dsa_quantize_int8(pair, 2, y);
        ASSERT_EQ_FMT(-127, y[0], "%d");
    }
    PASS();
}

/* ---- norms -------------------------------------------------------------------------------------- */
enum { PAD = 3 };                                  /* floats between rows that must stay as they are */
static const float MARK = 12345.0f;

TEST rms_norm_matches_double(int32_t dim)
{
    enum { ROWS = 5 };
    brute_rng r = { 8 };
    int64_t stride = dim + PAD;
    float *x = brute_normals(&r, ROWS * stride), *y = brute_alloc(sizeof *y * (size_t)(ROWS * stride)), *gain = brute_normals(&r, dim);
    float eps = 1e-6f;
    int ok = 1;
    for (int64_t i = 0; i < ROWS * stride; i++) x[i] = i % stride >= dim ? MARK : x[i] * (float)(1 << (3 * (i / stride)));
    for (int32_t i = 0; i < dim; i++) x[2 * stride + i] = 0;      /* a zero row stays zero */
    memcpy(y, x, sizeof *y * (size_t)(ROWS * stride));
    dsa_status status = dsa_rms_norm(y, ROWS, stride, dim, gain, eps);
    for (int64_t t = 0; t < ROWS; t++) {
        double square = 0;
        for (int32_t i = 0; i < dim; i++) square += (double)x[t * stride + i] * (double)x[t * stride + i];
        for (int32_t i = 0; i < dim; i++) {
            double want = (double)x[t * stride + i] / sqrt(square / dim + (double)eps) * (double)gain[i];
            ok = ok && fabs((double)y[t * stride + i] - want) <= 2e-6 * fabs(want);
        }
        for (int32_t i = 0; i < PAD; i++) ok = ok && y[t * stride + dim + i] == MARK;
    }
    free(x); free(y); free(gain);
    ASSERT_EQ(DSA_OK, status);
    ASSERT(ok);
    PASS();
}

TEST layer_norm_matches_double(int32_t dim)
{
    enum { ROWS = 4 };
    brute_rng r = { 9 };
    int64_t stride = dim + PAD;
    float *x = brute_normals(&r, ROWS * stride), *y = brute_alloc(sizeof *y * (size_t)(ROWS * stride));
    float *gain = brute_normals(&r, dim), *bias = brute_normals(&r, dim), eps = 1e-6f;
    int ok = 1;
    for (int64_t i = 0; i < ROWS * stride; i++)
        if (i % stride >= dim) x[i] = MARK;
        else if (i / stride == 1) x[i] += 1000;                     /* a large mean: needs the centred second moment */
        else if (i / stride == 2) x[i] = 7;                         /* no variance at all: eps alone */
    memcpy(y, x, sizeof *y * (size_t)(ROWS * stride));
    dsa_status status = dsa_layer_norm(y, ROWS, stride, dim, gain, bias, eps);
    for (int64_t t = 0; t < ROWS; t++) {
        double mean = 0, variance = 0;
        for (int32_t i = 0; i < dim; i++) mean += (double)x[t * stride + i] / dim;
        for (int32_t i = 0; i < dim; i++) variance += ((double)x[t * stride + i] - mean) * ((double)x[t * stride + i] - mean) / dim;
        for (int32_t i = 0; i < dim; i++) {
            double unit = ((double)x[t * stride + i] - mean) / sqrt(variance + (double)eps);
            double want = unit * (double)gain[i] + (double)bias[i];
            /* an f32 mean of 1000 is good to 6e-5 of the deviation */
            double tolerance = (t == 1 ? 4e-4 : 4e-6) * (fabs((double)gain[i]) * (fabs(unit) + 1) + fabs((double)bias[i]));
            ok = ok && fabs((double)y[t * stride + i] - want) <= tolerance;
        }
        for (int32_t i = 0; i < PAD; i++) ok = ok && y[t * stride + dim + i] == MARK;
    }
    free(x); free(y); free(gain); free(bias);
    ASSERT_EQ(DSA_OK, status);
    ASSERT(ok);
    PASS();
}

/* eps matters: with eps = 1 the two norms of a unit-variance row differ from eps = 0 by sqrt(2). */
TEST norms_use_their_eps(void)
{
    float x[4] = { 1, -1, 1, -1 }, y[4] = { 1, -1, 1, -1 }, gain[4] = { 1, 1, 1, 2 }, bias[4] = { 0, 0, 0, 5 };
    ASSERT_EQ(DSA_OK, dsa_rms_norm(x, 1, 4, 4, gain, 1.0f));
    ASSERT_IN_RANGE(0.70710678, x[0], 1e-6);
    ASSERT_IN_RANGE(-1.41421356, x[3], 1e-6);
    ASSERT_EQ(DSA_OK, dsa_layer_norm(y, 1, 4, 4, gain, bias, 1.0f));
    ASSERT_IN_RANGE(0.70710678, y[0], 1e-6);
    ASSERT_IN_RANGE(5 - 1.41421356, y[3], 1e-6);
    PASS();
}

/* ---- Hadamard ----------------------------------------------------------------------------------- */
TEST hadamard_matches_the_matrix(int32_t dim)
{
    enum { ROWS = 3 };
    brute_rng r = { 10 };
    int64_t stride = dim + PAD;
    float *x = brute_normals(&r, ROWS * stride), *y = brute_alloc(sizeof *y * (size_t)(ROWS * stride));
    double worst = 0, back = 0, length = 0;
    int marks = 1;
    for (int64_t t = 0; t < ROWS; t++) for (int32_t i = 0; i < PAD; i++) x[t * stride + dim + i] = MARK;
    memcpy(y, x, sizeof *y * (size_t)(ROWS * stride));
    dsa_status status = dsa_hadamard_rows(y, ROWS, stride, dim);
    for (int64_t t = 0; t < ROWS; t++) {
        double before = 0, after = 0;
        for (int32_t i = 0; i < dim; i++) {
            double want = 0;
            for (int32_t j = 0; j < dim; j++) {                     /* H[i][j] = (-1)^(number of common one bits) */
                int odd = 0;
                for (int32_t b = i & j; b != 0; b &= b - 1) odd = !odd;
                want += odd ? -(double)x[t * stride + j] : (double)x[t * stride + j];
            }
            worst = fmax(worst, fabs(want / sqrt(dim) - (double)y[t * stride + i]));
            before += (double)x[t * stride + i] * (double)x[t * stride + i];
            after += (double)y[t * stride + i] * (double)y[t * stride + i];
        }
        length = fmax(length, fabs(after / before - 1));
        for (int32_t i = 0; i < PAD; i++) marks = marks && y[t * stride + dim + i] == MARK;
    }
    dsa_hadamard_rows(y, ROWS, stride, dim);
    for (int64_t i = 0; i < ROWS * stride; i++) back = fmax(back, fabs((double)x[i] - (double)y[i]));
    free(x); free(y);
    ASSERT_EQ(DSA_OK, status);
    ASSERT_IN_RANGE(0, worst, 3e-6);
    ASSERT_IN_RANGE(0, length, 2e-6);
    ASSERT_IN_RANGE(0, back, 5e-6);
    ASSERT(marks);
    PASS();
}

TEST hadamard_wants_a_power_of_two(void)
{
    static const int32_t dims[] = { 3, 6, 12, 96, 100, 127, 0, -1, -4, INT32_MIN };
    float x[128], y[128];
    brute_rng r = { 11 };
    brute_fill_normal(&r, x, 128, 1);
    memcpy(y, x, sizeof y);
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) ASSERT_EQ(DSA_ERR_SHAPE, dsa_hadamard_rows(y, 1, 128, dims[i]));
    ASSERT_MEM_EQ(x, y, sizeof x);
    PASS();
}

/* ---- RoPE --------------------------------------------------------------------------------------- */
typedef struct rope_case { const char *name; int32_t heads, dim_row, offset, width; double theta, factor; } rope_case;

static const rope_case rope_cases[] = {
    { "whole_row",      1,  64,   0, 64, 10000, 0 },
    { "first_64",       3, 128,   0, 64, 10000, 0 },
    { "last_64",        2, 192, 128, 64, 1e6, 0 },
    { "middle",         2,  40,   7, 26, 8e6, 0 },
    { "one_pair",       4,   5,   3,  2, 10000, 0 },
    { "yarn",           2, 128,   0, 64, 10000, 40 },
    { "yarn_width_32",  1,  48,  16, 32, 160000, 16 },
};
static const int64_t rope_positions[] = { 0, 1, 2, 63, 4095, 4096, 163839, 999999, 1000000 };
enum { ROPE_ROWS = (int)(sizeof rope_positions / sizeof *rope_positions) };

/* Frequencies in double, spec 2.1 with n = width. */
static double rope_frequency(const rope_case *c, int32_t i)
{
    double n = c->width, base = pow(c->theta, -2.0 * i / n), original = 4096;
    if (!(c->factor > 1)) return base;
    double low = floor(n * log(original / (2 * 3.14159265358979323846 * 32)) / (2 * log(c->theta)));
    double high = ceil(n * log(original / (2 * 3.14159265358979323846)) / (2 * log(c->theta)));
    low = low > 0 ? low : 0;
    high = high < n - 1 ? high : n - 1;
    if (low == high) high += 0.001;
    double ramp = (i - low) / (high - low);
    ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
    return base * (1 - ramp) + base / c->factor * ramp;
}

static dsa_rope rope_of(const rope_case *c, dsa_rope_layout layout)
{
    dsa_rope rope;
    memset(&rope, 0, sizeof rope);
    rope.layout = layout;
    rope.offset = c->offset;
    rope.width = c->width;
    rope.theta = c->theta;
    rope.factor = c->factor;
    return rope;
}

/* Rotates forth, compares with the double formula, looks at lengths and at untouched channels, rotates back. */
TEST rope_matches_double(const rope_case *c, dsa_rope_layout layout)
{
    brute_rng r = { 12 };
    int64_t head_stride = c->dim_row + 1, row_stride = c->heads * head_stride + PAD, n = ROPE_ROWS * row_stride;
    float *x = brute_normals(&r, n), *y = brute_alloc(sizeof *y * (size_t)n);
    double *want = brute_alloc(sizeof *want * (size_t)n), worst = 0, length = 0, back = 0;
    dsa_rope rope = rope_of(c, layout);
    memcpy(y, x, sizeof *y * (size_t)n);
    for (int64_t i = 0; i < n; i++) want[i] = (double)x[i];
    for (int t = 0; t < ROPE_ROWS; t++)
        for (int32_t h = 0; h < c->heads; h++)
            for (int32_t i = 0; i < c->width / 2; i++) {
                int64_t at = t * row_stride + h * head_stride + c->offset;
                int64_t a = layout == DSA_ROPE_HALF ? at + i : at + 2 * i, b = layout == DSA_ROPE_HALF ? a + c->width / 2 : a + 1;
                double angle = (double)rope_positions[t] * rope_frequency(c, i);
                want[a] = (double)x[a] * cos(angle) - (double)x[b] * sin(angle);
                want[b] = (double)x[a] * sin(angle) + (double)x[b] * cos(angle);
            }
    dsa_status status = dsa_rope_rows(y, ROPE_ROWS, row_stride, c->heads, head_stride, c->dim_row, &rope, rope_positions, 0);
    int untouched = 1;
    for (int64_t i = 0; i < n; i++) {
        int64_t channel = i % row_stride % head_stride;
        int inside = i % row_stride < c->heads * head_stride && channel >= c->offset && channel < c->offset + c->width;
        if (!inside) untouched = untouched && x[i] == y[i];
        worst = fmax(worst, fabs(want[i] - (double)y[i]));
    }
    for (int t = 0; t < ROPE_ROWS; t++) {
        double before = 0, after = 0;
        for (int64_t i = 0; i < row_stride; i++) {
            before += (double)x[t * row_stride + i] * (double)x[t * row_stride + i];
            after += (double)y[t * row_stride + i] * (double)y[t * row_stride + i];
        }
        length = fmax(length, fabs(after / before - 1));
    }
    int still = memcmp(x, y, sizeof *x * (size_t)row_stride) == 0;  /* position 0 turns nothing */
    dsa_rope_rows(y, ROPE_ROWS, row_stride, c->heads, head_stride, c->dim_row, &rope, rope_positions, 1);
    for (int64_t i = 0; i < n; i++) back = fmax(back, fabs((double)x[i] - (double)y[i]));
    free(x); free(y); free(want);
    ASSERT_EQ(DSA_OK, status);
    ASSERT_IN_RANGE(0, worst, 2e-6);
    ASSERT(untouched);
    ASSERT_IN_RANGE(0, length, 1e-6);
    ASSERT(still);
    ASSERT_IN_RANGE(0, back, 2e-6);
    PASS();
}

/* The two layouts are the same rotation of permuted channels. */
TEST rope_layouts_are_permutations(void)
{
    enum { W = 64 };
    brute_rng r = { 13 };
    float a[W], b[W];
    int64_t position = 777;
    rope_case c = { "", 1, W, 0, W, 10000, 0 };
    dsa_rope half = rope_of(&c, DSA_ROPE_HALF), interleaved = rope_of(&c, DSA_ROPE_INTERLEAVED);
    brute_fill_normal(&r, a, W, 1);
    for (int i = 0; i < W / 2; i++) { b[2 * i] = a[i]; b[2 * i + 1] = a[i + W / 2]; }
    ASSERT_EQ(DSA_OK, dsa_rope_rows(a, 1, W, 1, W, W, &half, &position, 0));
    ASSERT_EQ(DSA_OK, dsa_rope_rows(b, 1, W, 1, W, W, &interleaved, &position, 0));
    for (int i = 0; i < W / 2; i++) {
        ASSERT_EQ(a[i], b[2 * i]);
        ASSERT_EQ(a[i + W / 2], b[2 * i + 1]);
    }
    PASS();
}

/* <R(p) q, R(s) k> depends on p - s only: the point of it all. */
TEST rope_is_relative(dsa_rope_layout layout)
{
    enum { W = 64 };
    brute_rng r = { 14 };
    float q[W], k[W];
    rope_case c = { "", 1, W, 0, W, 10000, 0 };
    dsa_rope rope = rope_of(&c, layout);
    double first = 0;
    brute_fill_normal(&r, q, W, 1);
    brute_fill_normal(&r, k, W, 1);
    for (int64_t shift = 0; shift <= 100000; shift = shift * 10 + 1) {
        float a[W], b[W];
        int64_t p = 100 + shift, s = 37 + shift;
        double dot = 0;
        memcpy(a, q, sizeof a);
        memcpy(b, k, sizeof b);
        ASSERT_EQ(DSA_OK, dsa_rope_rows(a, 1, W, 1, W, W, &rope, &p, 0));
        ASSERT_EQ(DSA_OK, dsa_rope_rows(b, 1, W, 1, W, W, &rope, &s, 0));
        for (int i = 0; i < W; i++) dot += (double)a[i] * (double)b[i];
        if (shift == 0) first = dot;
        ASSERT_IN_RANGE(first, dot, 2e-5);
    }
    PASS();
}

TEST rope_checks_its_shape(void)
{
    float x[8] = { 1, 2, 3, 4, 5, 6, 7, 8 }, before[8];
    int64_t position = 3;
    static const struct { int32_t dim_row, offset, width; } bad[] = {
        { 8, 0, 3 }, { 8, 0, 10 }, { 8, 4, 6 }, { 8, -2, 4 }, { 8, 0, -2 }, { 8, 8, 2 }, { 8, INT32_MAX, 2 }, { 4, 0, 8 } };
    memcpy(before, x, sizeof x);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        rope_case c = { "", 1, bad[i].dim_row, bad[i].offset, bad[i].width, 10000, 0 };
        dsa_rope rope = rope_of(&c, DSA_ROPE_HALF);
        ASSERT_EQ(DSA_ERR_SHAPE, dsa_rope_rows(x, 1, 8, 1, 8, bad[i].dim_row, &rope, &position, 0));
    }
    rope_case none = { "", 1, 8, 0, 0, 10000, 0 };
    dsa_rope rope = rope_of(&none, DSA_ROPE_HALF);
    ASSERT_EQ(DSA_OK, dsa_rope_rows(x, 1, 8, 1, 8, 8, &rope, &position, 0));      /* width 0: nothing is rotated */
    ASSERT_MEM_EQ(before, x, sizeof x);
    PASS();
}

/* Numbers outside their domain are refused, with or without YaRN, not taken for defaults; zeros are defaults. */
TEST rope_checks_its_numbers(void)
{
    static const double bad_theta[] = { -1, 0.5, 1, (double)INFINITY, (double)NAN }, bad_factor[] = { -1, 0.5, (double)INFINITY, (double)NAN },
                        bad_other[] = { -1, -1e-300, (double)INFINITY, (double)NAN };
    float x[8] = { 1, 2, 3, 4, 5, 6, 7, 8 }, before[8];
    double f[4], plain[4];
    int64_t position = 3;
    rope_case c = { "", 1, 8, 0, 8, 10000, 40 };
    memcpy(before, x, sizeof x);
    for (int field = 0; field < 5; field++)
        for (int i = 0; i < (field == 0 ? 5 : 4); i++) {
            dsa_rope rope = rope_of(&c, DSA_ROPE_HALF);
            if (field == 0) rope.theta = bad_theta[i];
            if (field == 1) rope.factor = bad_factor[i];
            if (field == 2) rope.original_context = bad_other[i];
            if (field == 3) rope.beta_fast = bad_other[i];
            if (field == 4) rope.beta_slow = bad_other[i];
            memset(f, 0x55, sizeof f);
            memcpy(plain, f, sizeof f);
            ASSERT_EQ(DSA_ERR_ARGUMENT, dsa_rope_frequencies(&rope, f));
            ASSERT_MEM_EQ(plain, f, sizeof f);
            ASSERT_EQ(DSA_ERR_ARGUMENT, dsa_rope_rows(x, 1, 8, 1, 8, 8, &rope, &position, 0));
            ASSERT_MEM_EQ(before, x, sizeof x);
        }
    dsa_rope zeros, spelt = rope_of(&c, DSA_ROPE_HALF);
    memset(&zeros, 0, sizeof zeros);
    zeros.width = 8;
    spelt.factor = 1;
    spelt.original_context = 4096;
    spelt.beta_fast = 32;
    spelt.beta_slow = 1;
    ASSERT_EQ(DSA_OK, dsa_rope_frequencies(&zeros, plain));
    ASSERT_EQ(DSA_OK, dsa_rope_frequencies(&spelt, f));
    ASSERT_MEM_EQ(plain, f, sizeof f);
    PASS();
}

TEST rope_frequencies_match_double(const rope_case *c)
{
    double f[64];
    dsa_rope rope = rope_of(c, DSA_ROPE_HALF);
    ASSERT_EQ(DSA_OK, dsa_rope_frequencies(&rope, f));
    for (int32_t i = 0; i < c->width / 2; i++) ASSERT_IN_RANGE(1, f[i] / rope_frequency(c, i), 1e-12);
    PASS();
}

/* The check values of spec 2.1, to the digits printed there. */
TEST yarn_check_values(void)
{
    static const struct { double theta, original, factor; int i; double f, digits; } table[] = {
        { 1e4, 4096, 40, 1, 0.7498942093, 1e-10 },
        { 1e4, 4096, 40, 10, 0.05623413252, 1e-11 },
        { 1e4, 4096, 40, 16, 5.5e-3, 1e-12 },
        { 1e4, 4096, 40, 22, 1.778279410e-4, 1e-13 },
        { 1e4, 4096, 40, 31, 3.333803580e-6, 1e-15 },
        { 160000, 65536, 16, 1, 0.6876560219, 1e-10 },
        { 160000, 65536, 16, 15, 3.635538584e-3, 1e-12 },
        { 160000, 65536, 16, 20, 2.969777783e-4, 1e-13 },
        { 160000, 65536, 16, 31, 5.680529037e-7, 1e-16 } };
    for (size_t t = 0; t < sizeof table / sizeof *table; t++) {
        dsa_rope rope;
        double f[32];
        memset(&rope, 0, sizeof rope);
        rope.width = 64;
        rope.theta = table[t].theta;
        rope.factor = table[t].factor;
        rope.original_context = table[t].original;
        ASSERT_EQ(DSA_OK, dsa_rope_frequencies(&rope, f));
        ASSERT_IN_RANGE(table[t].f, f[table[t].i], table[t].digits);
    }
    PASS();
}

/* low and high fall on the same number: the 0.001 of spec 2.1 keeps the ramp finite. */
TEST yarn_with_a_single_step(void)
{
    dsa_rope rope;
    double f[2];
    memset(&rope, 0, sizeof rope);
    rope.width = 4;
    rope.factor = 8;
    rope.beta_fast = rope.beta_slow = 6.5e-5;        /* cd = 4 ln(4096 / (2 pi 6.5e-5)) / (2 ln 1e4) = 3.5: low 3, high min(4, 3) */
    ASSERT_EQ(DSA_OK, dsa_rope_frequencies(&rope, f));
    ASSERT_IN_RANGE(1, f[0], 1e-12);
    ASSERT_IN_RANGE(0.01, f[1], 1e-12);
    rope.beta_fast = rope.beta_slow = 652;           /* cd = -0.00003: low max(-1, 0), high 0 */
    ASSERT_EQ(DSA_OK, dsa_rope_frequencies(&rope, f));
    ASSERT_IN_RANGE(1, f[0], 1e-12);
    ASSERT_IN_RANGE(0.01 / 8, f[1], 1e-12);
    PASS();
}

/* A context so long that the slow end of the ramp falls beyond the last channel: spec 2.1 holds it at n - 1 = 7. */
TEST yarn_ramp_ends_at_the_last_channel(void)
{
    dsa_rope rope;
    double f[4];
    memset(&rope, 0, sizeof rope);
    rope.width = 8;
    rope.theta = 100;
    rope.factor = 4;
    rope.original_context = 1e6;                     /* cd(1) = 8 ln(1e6 / (2 pi)) / (2 ln 100) = 10.4 */
    rope.beta_fast = 1e6;                            /* cd = -1.6: low 0 */
    ASSERT_EQ(DSA_OK, dsa_rope_frequencies(&rope, f));
    for (int i = 0; i < 4; i++) {
        double base = pow(100, -i / 4.0), ramp = i / 7.0;
        ASSERT_IN_RANGE(base * (1 - ramp) + base / 4 * ramp, f[i], 1e-12);
    }
    PASS();
}

/* ---- presets and small queries ------------------------------------------------------------------- */
TEST preset_constants(void)
{
    static const struct { dsa_preset preset; int32_t hidden, heads, q_lora, nope, v, index_heads; double scale; } table[] = {
        { DSA_DEEPSEEK_V32, 7168, 128, 1536, 128, 128, 64, 0.1352338 },       /* spec 1 */
        { DSA_GLM_5, 6144, 64, 2048, 192, 256, 32, 0.0625 },
        { DSA_GLM_52, 6144, 64, 2048, 192, 256, 32, 0.0625 } };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        dsa_config config;
        dsa_ctx ctx;
        ASSERT_EQ(DSA_OK, dsa_config_preset(table[i].preset, &config));
        ASSERT_EQ(DSA_OK, dsa_init(&ctx, &config));
        ASSERT_EQ_FMT(table[i].hidden, ctx.config.dim_hidden, "%d");
        ASSERT_EQ_FMT(table[i].heads, ctx.config.n_heads, "%d");
        ASSERT_EQ_FMT(table[i].q_lora, ctx.config.dim_q_lora, "%d");
        ASSERT_EQ_FMT(table[i].nope, ctx.config.dim_nope, "%d");
        ASSERT_EQ_FMT(table[i].v, ctx.config.dim_v, "%d");
        ASSERT_EQ_FMT(table[i].index_heads, ctx.config.n_index_heads, "%d");
        ASSERT_EQ_FMT(512, ctx.config.dim_latent, "%d");
        ASSERT_EQ_FMT(64, ctx.config.dim_rope, "%d");
        ASSERT_EQ_FMT(128, ctx.config.dim_index, "%d");
        ASSERT_EQ_FMT(2048, ctx.config.top_k, "%d");
        ASSERT_IN_RANGE(table[i].scale, ctx.config.softmax_scale, 1e-7);
    }
    PASS();
}

/* The indexer of DeepSeek-V3.2 pairs halves, the main attention pairs neighbours; GLM interleaves both (spec 10, fault 1). */
TEST preset_rope_layouts(void)
{
    static const struct { dsa_preset preset; dsa_rope_layout index; double theta, factor; } table[] = {
        { DSA_DEEPSEEK_V32, DSA_ROPE_HALF, 1e4, 40 },
        { DSA_GLM_5, DSA_ROPE_INTERLEAVED, 1e6, 1 },
        { DSA_GLM_52, DSA_ROPE_INTERLEAVED, 8e6, 1 } };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        dsa_config config;
        dsa_ctx ctx;
        double f[32], g[32];
        ASSERT_EQ(DSA_OK, dsa_config_preset(table[i].preset, &config));
        ASSERT_EQ(DSA_OK, dsa_init(&ctx, &config));
        dsa_rope main_rope = dsa_config_rope(&ctx, 192), index_rope = dsa_config_index_rope(&ctx);
        rope_case c = { "", 1, 64, 0, 64, table[i].theta, table[i].factor };
        ASSERT_EQ(DSA_ROPE_INTERLEAVED, main_rope.layout);
        ASSERT_EQ(table[i].index, index_rope.layout);
        ASSERT_EQ_FMT(128, main_rope.offset, "%d");
        ASSERT_EQ_FMT(64, main_rope.width, "%d");
        ASSERT_EQ_FMT(0, index_rope.offset, "%d");
        ASSERT_EQ_FMT(64, index_rope.width, "%d");
        ASSERT_EQ(DSA_OK, dsa_rope_frequencies(&main_rope, f));
        ASSERT_EQ(DSA_OK, dsa_rope_frequencies(&index_rope, g));
        for (int j = 0; j < 32; j++) {
            ASSERT_IN_RANGE(1, f[j] / rope_frequency(&c, j), 1e-12);
            ASSERT_EQ(f[j], g[j]);
        }
    }
    PASS();
}

/* GLM-5.2: 0, 1, 2, 6, 10, ..., 74 of 78 layers have an indexer; 21 in all (spec 1). */
TEST index_share_pattern(void)
{
    dsa_config config;
    int full = 0;
    ASSERT_EQ(DSA_OK, dsa_config_preset(DSA_GLM_52, &config));
    for (int32_t i = 0; i < 78; i++) {
        int want = i < 3 || (i >= 6 && (i - 6) % 4 == 0);
        ASSERT_EQ_FMT(want, dsa_layer_has_indexer(config.index_share_freq, config.index_share_offset, i), "%d");
        full += want;
        ASSERT_EQ_FMT(1, dsa_layer_has_indexer(0, 3, i), "%d");
        ASSERT_EQ_FMT(1, dsa_layer_has_indexer(1, 0, i), "%d");
    }
    ASSERT_EQ_FMT(21, full, "%d");
    PASS();
}

TEST names_and_texts(void)
{
    ASSERT_EQ_FMT(DSA_VERSION_MAJOR * 10000 + DSA_VERSION_MINOR * 100 + DSA_VERSION_PATCH, dsa_version(), "%d");
    for (int i = 0; i < (int)DSA__STATUS_COUNT; i++) {
        ASSERT(strlen(dsa_status_text((dsa_status)i)) > 0);
        for (int j = 0; j < i; j++) ASSERT(strcmp(dsa_status_text((dsa_status)i), dsa_status_text((dsa_status)j)) != 0);
    }
    ASSERT(dsa_status_text(DSA__STATUS_COUNT) != NULL);
    ASSERT_STR_EQ("auto", dsa_isa_name(DSA_ISA_AUTO));
    ASSERT_STR_EQ("scalar", dsa_isa_name(DSA_ISA_SCALAR));
    ASSERT_STR_EQ("avx2", dsa_isa_name(DSA_ISA_AVX2));
    ASSERT_STR_EQ("avx512", dsa_isa_name(DSA_ISA_AVX512));
    ASSERT_STR_EQ("neon", dsa_isa_name(DSA_ISA_NEON));
    ASSERT_STR_EQ("avx512base", dsa_isa_name(DSA_ISA_AVX512_BASE));
    PASS();
}

TEST isa_is_what_was_forced(void)
{
    dsa_isa isas[BRUTE_ISAS];
    int n = brute_isas(isas), found = 0;
    dsa_config config;
    dsa_ctx ctx;
    memset(&config, 0, sizeof config);
    ASSERT(n >= 1);
    ASSERT(getenv("DSA_TEST_ISA") || isas[0] == DSA_ISA_SCALAR);
    ASSERT_EQ(DSA_OK, dsa_init(&ctx, &config));
    for (int i = 0; i < n; i++) found += dsa_query_isa(&ctx) == isas[i];
    ASSERT_EQ_FMT(1, found, "%d");                                  /* AUTO resolves to one of them */
    for (int i = 0; i < n; i++) {
        config.isa = isas[i];
        ASSERT_EQ(DSA_OK, dsa_init(&ctx, &config));
        ASSERT_EQ(isas[i], dsa_query_isa(&ctx));
    }
    PASS();
}

SUITE(numeric_suite)
{
    char name[64];
    RUN_TEST(bf16_decodes_every_code);
    RUN_TEST(bf16_round_trips_every_code);
    RUN_TEST(bf16_rounds_halves_to_even);
    RUN_TEST(bf16_keeps_nan);
    RUN_TEST(bf16_matches_double_rounding);
    RUN_TEST(f16_decodes_every_code);
    RUN_TEST(f16_round_trips_every_code);
    RUN_TEST(f16_rounds_halves_to_even);
    RUN_TEST(f16_handles_the_ends_of_the_range);
    RUN_TEST(f16_matches_double_rounding);
    RUN_TEST(e4m3_decodes_every_code);
    RUN_TEST(e4m3_round_trips_every_code);
    RUN_TEST(e4m3_rounds_halves_to_even);
    RUN_TEST(e4m3_saturates_and_keeps_nan);
    RUN_TEST(e4m3_matches_a_search_for_the_nearest);
    RUN_TEST(ue8m0_decodes_every_code);
    RUN_TEST(ue8m0_rounds_up);
    RUN_TEST(pow2_ceil_is_the_least_power);

    static const int32_t rows[] = { 1, 7, 128, 1000 };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        snprintf(name, sizeof name, "%d", rows[i]);
        greatest_set_test_suffix(name);
        RUN_TESTp(quantize_e4m3_matches_the_formula, rows[i]);
        greatest_set_test_suffix(name);
        RUN_TESTp(quantize_int8_matches_the_formula, rows[i]);
        greatest_set_test_suffix(name);
        RUN_TESTp(rms_norm_matches_double, rows[i]);
        greatest_set_test_suffix(name);
        RUN_TESTp(layer_norm_matches_double, rows[i]);
    }
    RUN_TEST(quantize_e4m3_scale_edges);
    RUN_TEST(scales_stay_finite);
    RUN_TEST(quantize_int8_rounds_halves_to_even_and_clamps);
    RUN_TEST(norms_use_their_eps);

    for (int32_t dim = 1; dim <= 1024; dim *= 2) {
        snprintf(name, sizeof name, "%d", dim);
        greatest_set_test_suffix(name);
        RUN_TESTp(hadamard_matches_the_matrix, dim);
    }
    RUN_TEST(hadamard_wants_a_power_of_two);

    for (size_t i = 0; i < sizeof rope_cases / sizeof *rope_cases; i++) {
        snprintf(name, sizeof name, "interleaved_%s", rope_cases[i].name);
        greatest_set_test_suffix(name);
        RUN_TESTp(rope_matches_double, &rope_cases[i], DSA_ROPE_INTERLEAVED);
        snprintf(name, sizeof name, "half_%s", rope_cases[i].name);
        greatest_set_test_suffix(name);
        RUN_TESTp(rope_matches_double, &rope_cases[i], DSA_ROPE_HALF);
        greatest_set_test_suffix(rope_cases[i].name);
        RUN_TESTp(rope_frequencies_match_double, &rope_cases[i]);
    }
    RUN_TEST(rope_layouts_are_permutations);
    greatest_set_test_suffix("interleaved");
    RUN_TESTp(rope_is_relative, DSA_ROPE_INTERLEAVED);
    greatest_set_test_suffix("half");
    RUN_TESTp(rope_is_relative, DSA_ROPE_HALF);
    RUN_TEST(rope_checks_its_shape);
    RUN_TEST(rope_checks_its_numbers);
    RUN_TEST(yarn_check_values);
    RUN_TEST(yarn_with_a_single_step);
    RUN_TEST(yarn_ramp_ends_at_the_last_channel);

    RUN_TEST(preset_constants);
    RUN_TEST(preset_rope_layouts);
    RUN_TEST(index_share_pattern);
    RUN_TEST(names_and_texts);
    RUN_TEST(isa_is_what_was_forced);
}

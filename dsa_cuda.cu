/* dsa_cuda.cu - the GPU behind dsa.h - MIT or public domain, as dsa.h
   SPDX-License-Identifier: MIT OR Unlicense

   One file that a user adds to the build (make cuda; nvcc 12 or 13, any compute capability from 8.0 on). dsa.h, CUDA at the end of its
   declarations, says what it offers: config.cuda for caches that live on a GPU, and the same operations on device pointers.

   CONTENTS: search for the marker
     >>common       formats, pools of pages, batches
     >>append       rows into the caches
     >>index        queries of the indexer, index scores
     >>topk         exact selection
     >>attend       attention, merging
     >>api          arguments, workspace, the device

   Three paths of kernels. REFERENCE multiplies and adds one product after the other, in the order and rounding of the scalar path of dsa.h
   (>>ref there): it gives the same bits, takes any shape, and is what the others are tested against. Every float operation of it that the
   compiler might contract is spelled __fmul_rn and __fadd_rn. PORTABLE and HOPPER use tensor cores. No path adds floats atomically, and
   how the work is cut follows from a row's own length, so repeated calls give the same bits. */
#ifndef DSA_CUDA
#  define DSA_CUDA
#endif
#include "dsa.h"

#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ============================================================================================
   >>common                                   formats, pools of pages, batches
   ============================================================================================ */

#define DSA__CU_NONE (-INFINITY)

/* A pool of pages on the device and the block tables of a batch over it (LAYOUTS in dsa.h). */
typedef struct dsa__cu_pool {
    int32_t format, dim, dim_rope, hadamard, planar, page_size;
    int64_t n_pages, n_blocks;                           /* n_blocks: of one table; n_pages without tables */
    unsigned char *data, *scales;                        /* scales: of page 0, wherever they lie */
    size_t row_stride, page_stride, scale_page_stride;   /* row_stride of planar pages: dim */
    const int32_t *tables;                               /* [n_seqs, n_blocks] or NULL */
} dsa__cu_pool;

/* The query rows of a batch and what they see. */
typedef struct dsa__cu_batch {
    int32_t n_seqs, n_q;                                 /* n_q: of every sequence, where there is no `first` */
    int64_t n_rows, max_len;
    const int32_t *lens, *first;
} dsa__cu_batch;

typedef struct dsa__cu_row { int32_t seq; int64_t len, visible; } dsa__cu_row;

static __device__ __forceinline__ int64_t dsa__cu_clamp(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

static __device__ __forceinline__ dsa__cu_row dsa__cu_row_of(const dsa__cu_batch &b, int64_t row)
{
    dsa__cu_row r;
    int64_t begin, n_q = b.n_q;
    if (b.first) {                                       /* the last sequence that begins at or before the row: empty ones are passed over */
        int32_t lo = 0, hi = b.n_seqs;
        while (hi - lo > 1) {
            int32_t mid = lo + (hi - lo) / 2;
            if (b.first[mid] <= row) lo = mid; else hi = mid;
        }
        r.seq = lo;
        begin = b.first[lo];
        n_q = b.first[lo + 1] - begin;
    } else {
        r.seq = (int32_t)(row / n_q);
        begin = r.seq * n_q;
    }
    r.len = dsa__cu_clamp(b.lens[r.seq], 0, b.max_len);
    r.visible = r.len - n_q + (row - begin) + 1;
    if (r.visible < 0) r.visible = 0;
    if (r.visible > r.len) r.visible = r.len;            /* rows beyond the last sequence's end, if n_rows is larger than `first` says */
    return r;
}

/* Address of offset `offset` in page `page`. */
static __device__ __forceinline__ unsigned char *dsa__cu_in(const dsa__cu_pool &p, int64_t page, int64_t offset)
{
    return p.data + (size_t)page * p.page_stride + (size_t)offset * p.row_stride;
}

static __device__ __forceinline__ unsigned char *dsa__cu_scale_in(const dsa__cu_pool &p, int64_t page, int64_t offset)
{
    return p.scales + (size_t)page * p.scale_page_stride + 4 * (size_t)offset;
}

/* Page and offset of a position; page -1: the table does not reach so far, or names a page outside the pool. */
static __device__ __forceinline__ int32_t dsa__cu_page_of(const dsa__cu_pool &p, int32_t seq, int64_t position, int32_t *offset)
{
    uint32_t block = (uint32_t)position / (uint32_t)p.page_size;
    int32_t page;
    *offset = (int32_t)((uint32_t)position - block * (uint32_t)p.page_size);
    if (position < 0 || block >= p.n_blocks) return -1;
    page = p.tables ? __ldg(p.tables + (int64_t)seq * p.n_blocks + block) : (int32_t)block;
    return page >= 0 && page < p.n_pages ? page : -1;
}

/* ---- number formats: the same bits as in dsa.h, >>numeric. Rows may have any alignment. ------------------ */
static __device__ __forceinline__ float dsa__cu_load_f32(const unsigned char *p)
{
    if (((uintptr_t)p & 3) == 0) return *(const float *)p;
    return __uint_as_float((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
}

static __device__ __forceinline__ float dsa__cu_load_bf16(const unsigned char *p)
{
    uint32_t b = ((uintptr_t)p & 1) == 0 ? *(const uint16_t *)p : (uint32_t)p[0] | (uint32_t)p[1] << 8;
    return __uint_as_float(b << 16);
}

static __device__ __forceinline__ void dsa__cu_store_f32(unsigned char *p, float x)
{
    uint32_t b = __float_as_uint(x);
    if (((uintptr_t)p & 3) == 0) *(float *)p = x;
    else { p[0] = (unsigned char)b; p[1] = (unsigned char)(b >> 8); p[2] = (unsigned char)(b >> 16); p[3] = (unsigned char)(b >> 24); }
}

static __device__ __forceinline__ uint32_t dsa__cu_bf16(float x)
{
    uint32_t b = __float_as_uint(x);
    if ((b & 0x7FFFFFFFu) > 0x7F800000u) return (b >> 16 | 0x40u) & 0xFFFFu;
    return (b + 0x7FFFu + (b >> 16 & 1u)) >> 16;
}

static __device__ __forceinline__ void dsa__cu_store_bf16(unsigned char *p, float x)
{
    uint32_t b = dsa__cu_bf16(x);
    if (((uintptr_t)p & 1) == 0) *(uint16_t *)p = (uint16_t)b;
    else { p[0] = (unsigned char)b; p[1] = (unsigned char)(b >> 8); }
}

static __device__ __forceinline__ float dsa__cu_e4m3(uint32_t x)
{
    uint32_t sign = (x & 0x80u) << 24, m = x & 0x7Fu;
    uint32_t b = m < 8u ? __float_as_uint((float)(int32_t)m * 0.001953125f) : (m << 20) + 0x3C000000u;
    return __uint_as_float(sign | (m == 0x7Fu ? 0x7FC00000u : b));
}

static __device__ __forceinline__ uint32_t dsa__cu_e4m3_code(float x)
{
    uint32_t b = __float_as_uint(x), sign = b >> 24 & 0x80u, a = b & 0x7FFFFFFFu, r, normal, small;
    r = a < 0x43E00000u ? a : 0x43E00000u;
    normal = (r + 0x7FFFFu + (r >> 20 & 1u) - 0x3C000000u) >> 20;
    small = __float_as_uint(__fadd_rn(__uint_as_float(r), 16384.0f)) - 0x46800000u;
    r = r < 0x3C800000u ? small : normal;
    return sign | (a > 0x7F800000u ? 0x7Fu : r);
}

static __device__ __forceinline__ float dsa__cu_pow2_ceil(float x)   /* of a normal number */
{
    return __uint_as_float((__float_as_uint(x) + 0x7FFFFFu) & 0x7F800000u);
}

static __device__ __forceinline__ int32_t dsa__cu_int8(float x, float s)
{
    float v = __fdiv_rn(x, s);
    v = v != v ? 0.0f : v;
    v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
    return (int32_t)__fadd_rn(__fadd_rn(v, 12582912.0f), -12582912.0f);
}

/* Element d of a stored index key, FP8 and INT8 unscaled. */
static __device__ __forceinline__ float dsa__cu_key(int32_t format, const unsigned char *p, int32_t d)
{
    if (format == DSA_F32) return dsa__cu_load_f32(p + 4 * (size_t)d);
    if (format == DSA_BF16) return dsa__cu_load_bf16(p + 2 * (size_t)d);
    if (format == DSA_FP8) return dsa__cu_e4m3(p[d]);
    return (float)(int8_t)p[d];
}

/* Channel d of a stored latent row [R + r]. */
static __device__ __forceinline__ float dsa__cu_latent(int32_t format, int32_t R, const unsigned char *p, int32_t d)
{
    if (format == DSA_F32) return dsa__cu_load_f32(p + 4 * (size_t)d);
    if (format == DSA_BF16) return dsa__cu_load_bf16(p + 2 * (size_t)d);
    if (d < R) return __fmul_rn(dsa__cu_e4m3(p[d]), dsa__cu_load_f32(p + R + d / 128 * 4));
    return dsa__cu_load_bf16(p + R + (R + 127) / 128 * 4 + 2 * (size_t)(d - R));
}

/* Element i of a caller's array in F32 or BF16. */
static __device__ __forceinline__ float dsa__cu_operand(const void *x, int32_t bf16, int64_t i)
{
    return bf16 ? __uint_as_float((uint32_t)((const uint16_t *)x)[i] << 16) : ((const float *)x)[i];
}

/* ---- one block works on one row of up to DSA_MAX_DIM_INDEX floats in shared memory ------------------------- */
static __device__ __forceinline__ uint32_t dsa__cu_block_max(uint32_t x, uint32_t *shared)   /* shared [32] */
{
    uint32_t n_warps = (blockDim.x + 31) / 32, i, most = 0;
    x = __reduce_max_sync(~0u, x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = x;
    __syncthreads();
    for (i = 0; i < n_warps; i++) most = shared[i] > most ? shared[i] : most;
    return most;
}

/* Largest magnitude as bits: NaN is passed over. *nan: is there one? */
static __device__ __forceinline__ float dsa__cu_amax(const float *x, int32_t n, uint32_t *shared, int *nan)
{
    uint32_t most = 0, all = 0, a;
    for (int32_t i = (int32_t)threadIdx.x; i < n; i += (int32_t)blockDim.x) {
        a = __float_as_uint(x[i]) & 0x7FFFFFFFu;
        all = a > all ? a : all;
        a = a > 0x7F800000u ? 0u : a;
        most = a > most ? a : most;
    }
    most = dsa__cu_block_max(most, shared);
    *nan = dsa__cu_block_max(all, shared) > 0x7F800000u;
    return most >= 0x7F800000u ? 3.402823466e+38f : __uint_as_float(most);
}

/* Butterflies at strides 1, 2, 4, .. as in dsa.h, then times dim^-0.5 (spec 3.2). */
static __device__ __forceinline__ void dsa__cu_hadamard(float *x, int32_t dim)
{
    float norm = (float)(1.0 / sqrt((double)dim));
    for (int32_t s = 1; s < dim; s *= 2) {
        __syncthreads();
        for (int32_t i = (int32_t)threadIdx.x; i < dim / 2; i += (int32_t)blockDim.x) {
            int32_t lo = i / s * 2 * s + i % s;
            float a = x[lo], b = x[lo + s];
            x[lo] = __fadd_rn(a, b);
            x[lo + s] = __fsub_rn(a, b);
        }
    }
    __syncthreads();
    for (int32_t i = (int32_t)threadIdx.x; i < dim; i += (int32_t)blockDim.x) x[i] = __fmul_rn(x[i], norm);
    __syncthreads();
}

/* A row of D floats in shared memory becomes a row of the format at y; returns its scale (1 for F32, BF16). keys and query heads alike
   (ROUNDING in dsa.h). */
static __device__ __forceinline__ float dsa__cu_round_row(int32_t format, int32_t hadamard, int32_t D, float *x, unsigned char *y, uint32_t *shared)
{
    int nan;
    float s = 1.0f, a;
    int32_t i;
    if (hadamard) dsa__cu_hadamard(x, D);
    if (format == DSA_FP8 || format == DSA_INT8) {
        a = dsa__cu_amax(x, D, shared, &nan);
        a = a > 1e-4f ? a : 1e-4f;
        s = format == DSA_FP8 ? dsa__cu_pow2_ceil(__fmul_rn(a, 1.0f / 448.0f)) : __fdiv_rn(a, 127.0f);
        for (i = (int32_t)threadIdx.x; i < D; i += (int32_t)blockDim.x)
            y[i] = format == DSA_FP8 ? (unsigned char)dsa__cu_e4m3_code(__fdiv_rn(x[i], s)) : (unsigned char)(int8_t)dsa__cu_int8(x[i], s);
        if (format == DSA_INT8 && nan) s = __uint_as_float(0x7FC00000u);
    } else {
        for (i = (int32_t)threadIdx.x; i < D; i += (int32_t)blockDim.x) {
            if (format == DSA_F32) dsa__cu_store_f32(y + 4 * (size_t)i, x[i]);
            else dsa__cu_store_bf16(y + 2 * (size_t)i, x[i]);
        }
    }
    return s;
}

/* ============================================================================================
   >>append                                   rows into the caches
   ============================================================================================ */

/* One block per row. slots: physical places; NULL: the last positions below each sequence's length. */
static __global__ void __launch_bounds__(128) dsa__cu_append_row(dsa__cu_pool p, dsa__cu_batch b, int32_t index_key, const void *rows, int32_t bf16,
                                                                  const int64_t *slots)
{
    __shared__ float x[DSA_MAX_DIM_INDEX];
    __shared__ uint32_t shared[32];
    const int64_t row = blockIdx.x, width = (int64_t)p.dim + p.dim_rope;
    int32_t page, offset, i, g, n;
    int nan;
    unsigned char *y, *scales;
    float s;
    if (slots) {
        int64_t slot = slots[row];
        if (slot < 0 || slot >= p.n_pages * p.page_size) return;
        page = (int32_t)(slot / p.page_size);
        offset = (int32_t)(slot % p.page_size);
    } else {
        dsa__cu_row r = dsa__cu_row_of(b, row);
        page = dsa__cu_page_of(p, r.seq, r.visible - 1, &offset);
        if (page < 0) return;
    }
    y = dsa__cu_in(p, page, offset);
    if (index_key) {
        for (i = (int32_t)threadIdx.x; i < p.dim; i += (int32_t)blockDim.x) x[i] = dsa__cu_operand(rows, bf16, row * width + i);
        __syncthreads();
        s = dsa__cu_round_row(p.format, p.hadamard, p.dim, x, y, shared);
        if (p.planar && threadIdx.x == 0) dsa__cu_store_f32(dsa__cu_scale_in(p, page, offset), s);
        return;
    }
    if (p.format != DSA_FP8) {
        for (i = (int32_t)threadIdx.x; i < width; i += (int32_t)blockDim.x) {
            float v = dsa__cu_operand(rows, bf16, row * width + i);
            if (p.format == DSA_F32) dsa__cu_store_f32(y + 4 * (size_t)i, v);
            else dsa__cu_store_bf16(y + 2 * (size_t)i, v);
        }
        return;
    }
    scales = y + p.dim;                                  /* tile scale 2^ceil(log2(max(amax / 448, 1e-4))) (spec 6.1) */
    for (g = 0; g < p.dim; g += 128) {
        n = p.dim - g < 128 ? p.dim - g : 128;
        __syncthreads();
        for (i = (int32_t)threadIdx.x; i < n; i += (int32_t)blockDim.x) x[i] = dsa__cu_operand(rows, bf16, row * width + g + i);
        __syncthreads();
        s = __fdiv_rn(dsa__cu_amax(x, n, shared, &nan), 448.0f);
        s = dsa__cu_pow2_ceil(s > 1e-4f ? s : 1e-4f);
        for (i = (int32_t)threadIdx.x; i < n; i += (int32_t)blockDim.x) y[g + i] = (unsigned char)dsa__cu_e4m3_code(__fdiv_rn(x[i], s));
        if (threadIdx.x == 0) dsa__cu_store_f32(scales + g / 128 * 4, s);
    }
    scales += (p.dim + 127) / 128 * 4;
    for (i = (int32_t)threadIdx.x; i < p.dim_rope; i += (int32_t)blockDim.x)
        dsa__cu_store_bf16(scales + 2 * (size_t)i, dsa__cu_operand(rows, bf16, row * width + p.dim + i));
}

/* Rows [begin, begin + gridDim.x) of sequence 0 as f32: dsa_cache_read. */
static __global__ void __launch_bounds__(128) dsa__cu_read_row(dsa__cu_pool p, int32_t index_key, int64_t begin, float *out)
{
    const int64_t width = (int64_t)p.dim + p.dim_rope;
    int32_t offset, page = dsa__cu_page_of(p, 0, begin + blockIdx.x, &offset);
    float *y = out + blockIdx.x * width;
    if (page < 0) return;
    const unsigned char *row = dsa__cu_in(p, page, offset);
    float s = p.planar ? dsa__cu_load_f32(dsa__cu_scale_in(p, page, offset)) : 1.0f;
    for (int32_t i = (int32_t)threadIdx.x; i < width; i += (int32_t)blockDim.x) {
        if (index_key) y[i] = p.planar ? __fmul_rn(dsa__cu_key(p.format, row, i), s) : dsa__cu_key(p.format, row, i);
        else y[i] = dsa__cu_latent(p.format, p.dim, row, i);
    }
}

/* ============================================================================================
   >>index                                    queries of the indexer, index scores
   ============================================================================================ */

/* Heads of the indexer in the form of the key format: x [n_rows, HI, D] in its elements, v [n_rows, HI] = w times the head's scale. One
   block per head of a row. q_type FP8: prepared already, only copied. */
static __global__ void __launch_bounds__(128) dsa__cu_query(int32_t format, int32_t hadamard, int32_t D, const void *q, int32_t q_type, const float *w,
                                                            unsigned char *x, float *v)
{
    __shared__ float head[DSA_MAX_DIM_INDEX];
    __shared__ uint32_t shared[32];
    const int64_t at = blockIdx.x;
    const int32_t bytes = format == DSA_F32 ? 4 : format == DSA_BF16 ? 2 : 1;
    float s;
    if (q_type == DSA_FP8) {
        for (int32_t i = (int32_t)threadIdx.x; i < D; i += (int32_t)blockDim.x) x[at * D + i] = ((const unsigned char *)q)[at * D + i];
        if (threadIdx.x == 0) v[at] = w[at];
        return;
    }
    for (int32_t i = (int32_t)threadIdx.x; i < D; i += (int32_t)blockDim.x) head[i] = dsa__cu_operand(q, q_type == DSA_BF16, at * D + i);
    __syncthreads();
    s = dsa__cu_round_row(format, hadamard, D, head, x + at * D * bytes, shared);
    if (threadIdx.x == 0) v[at] = __fmul_rn(w[at], s);
}

/* The keys that a row sees: [lo, hi). */
typedef struct dsa__cu_ranges {
    dsa__cu_batch batch;                                 /* lens NULL: columns of stored scores, [0, max_len) */
    const int32_t *ks, *ke;                              /* optional */
} dsa__cu_ranges;

static __device__ __forceinline__ int32_t dsa__cu_range(const dsa__cu_ranges &r, int64_t row, int64_t *lo, int64_t *hi)
{
    dsa__cu_row of = { 0, r.batch.max_len, r.batch.max_len };
    if (r.batch.lens) of = dsa__cu_row_of(r.batch, row);
    *lo = 0;
    *hi = of.visible;
    if (r.ks) {
        *lo = dsa__cu_clamp(r.ks[row], 0, of.len);
        *hi = dsa__cu_clamp(r.ke[row], *lo, of.len);
    }
    return of.seq;
}

#define DSA__CU_TILE 32                                  /* keys of a block: one per lane */
#define DSA__CU_CHUNK_D 128                              /* channels in shared memory at a time */

/* I[t][s] = scale[s] Sum_h v[t,h] ReLU(<x[t,h], k_s>), the sums in the order of dsa__ref_score: d ascending, h ascending, the scale last.
   A block: one row, DSA__CU_TILE keys; 8 warps take a head each, a lane takes a key. fill: columns outside the row's range get -inf (else
   they are left alone). Rows that see at most `skip` keys are left alone. A page that the table does not have: -inf. */
template <int FORMAT>
static __global__ void __launch_bounds__(256) dsa__cu_score_reference(dsa__cu_pool p, dsa__cu_ranges ranges, int32_t n_heads, const unsigned char *x,
                                                                      const float *v, float *I, int64_t ldi, int64_t row0, int64_t n_cols,
                                                                      int32_t fill, int64_t skip)
{
    __shared__ float k[DSA__CU_TILE][DSA__CU_CHUNK_D + 1], q[8][DSA__CU_CHUNK_D], part[8][DSA__CU_TILE];
    __shared__ const unsigned char *rows[DSA__CU_TILE];
    const int32_t bytes = FORMAT == DSA_F32 ? 4 : FORMAT == DSA_BF16 ? 2 : 1, D = p.dim;
    const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int64_t row = row0 + blockIdx.y, key = (int64_t)blockIdx.x * DSA__CU_TILE + lane;
    int64_t lo, hi;
    int32_t seq = dsa__cu_range(ranges, row, &lo, &hi), h0, d0, n, i;
    int on = key >= lo && key < hi && key < n_cols;
    float sum = 0.0f, scale = 1.0f;
    if (hi - lo <= skip || (!fill && !__any_sync(~0u, on))) return;       /* the same in every warp */
    if (warp == 0) {
        int32_t offset, page = on ? dsa__cu_page_of(p, seq, key, &offset) : -1;
        rows[lane] = page < 0 ? NULL : dsa__cu_in(p, page, offset);
        if (page >= 0 && p.planar) scale = dsa__cu_load_f32(dsa__cu_scale_in(p, page, offset));
    }
    __syncthreads();
    for (h0 = 0; h0 < n_heads && __any_sync(~0u, on); h0 += 8) {
        float dot = 0.0f;
        for (d0 = 0; d0 < D; d0 += DSA__CU_CHUNK_D) {
            n = D - d0 < DSA__CU_CHUNK_D ? D - d0 : DSA__CU_CHUNK_D;
            if (h0 == 0 || D > DSA__CU_CHUNK_D)
                for (i = (int32_t)threadIdx.x; i < DSA__CU_TILE * n; i += 256)
                    k[i / n][i % n] = rows[i / n] ? dsa__cu_key(FORMAT, rows[i / n], d0 + i % n) : 0.0f;
            for (i = (int32_t)threadIdx.x; i < 8 * n; i += 256) {
                int32_t h = h0 + i / n;
                q[i / n][i % n] = h < n_heads ? dsa__cu_key(FORMAT, x + ((size_t)(row - row0) * n_heads + h) * D * bytes, d0 + i % n) : 0.0f;
            }
            __syncthreads();
            for (i = 0; i < n; i++) dot = __fadd_rn(dot, __fmul_rn(k[lane][i], q[warp][i]));
            __syncthreads();
        }
        part[warp][lane] = dot;
        __syncthreads();
        if (warp == 0)
            for (i = 0; i < 8 && h0 + i < n_heads; i++) {
                float d = part[i][lane];
                sum = __fadd_rn(sum, __fmul_rn(v[(row - row0) * n_heads + h0 + i], d < 0.0f ? 0.0f : d));
            }
        __syncthreads();
    }
    if (warp != 0 || key >= n_cols || (!on && !fill)) return;
    I[(row - row0) * ldi + key] = on && rows[lane] ? p.planar ? __fmul_rn(sum, scale) : sum : DSA__CU_NONE;
}

/* ============================================================================================
   >>topk                                     exact selection
   ============================================================================================ */

/* Monotone map of floats: score descending is key descending. What may not be selected (NaN, -inf) is 0. */
static __device__ __forceinline__ uint32_t dsa__cu_sort_key(float s)
{
    uint32_t b = __float_as_uint(__fadd_rn(s, 0.0f));    /* -0 + 0 = +0 */
    if (!(s > DSA__CU_NONE)) return 0u;
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}

typedef struct dsa__cu_selection {
    int64_t k;
    int32_t rank, fallback;                              /* by rank; rows of at most k columns take them all, unseen */
    int32_t *indices, *counts;
    float *scores;
    uint64_t *sort;                                      /* rank and places > DSA__CU_SORT: [n_rows of a tile, places] */
    int64_t places;                                      /* power of two >= k */
} dsa__cu_selection;

#define DSA__CU_SORT 2048                                /* pairs that are sorted in shared memory */

/* Ascending bitonic sort of n = 2^m keys by one block. */
static __device__ void dsa__cu_sort(uint64_t *a, int64_t n)
{
    for (int64_t size = 2; size <= n; size *= 2)
        for (int64_t step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int64_t i = threadIdx.x; i < n / 2; i += blockDim.x) {
                int64_t lo = i / step * 2 * step + i % step, hi = lo + step;
                uint64_t x = a[lo], y = a[hi];
                if ((x > y) == ((lo & size) == 0)) { a[lo] = y; a[hi] = x; }
            }
        }
    __syncthreads();
}

/* One block selects from one row of stored scores: the k-th largest key by four passes over its bytes, then the columns above it and the
   first ones equal to it, in order. Counters are integers, so their order does not matter. */
static __global__ void __launch_bounds__(1024) dsa__cu_select_reference(dsa__cu_ranges ranges, const float *scores, int64_t ld, int64_t row0,
                                                                        dsa__cu_selection sel)
{
    __shared__ uint32_t bins[256], warps[32], chosen, left;
    __shared__ uint64_t pairs[DSA__CU_SORT];
    const int64_t row = row0 + blockIdx.x, k = sel.k;
    const int32_t tid = (int32_t)threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const float *I = scores + blockIdx.x * ld;
    int32_t *out = sel.indices + row * k;
    float *out_s = sel.scores ? sel.scores + row * k : NULL;
    int64_t lo, hi, at, base = 0;
    uint32_t prefix = 0, need, equal = 0;
    dsa__cu_range(ranges, row, &lo, &hi);
    if (sel.fallback && hi - lo <= k) {
        for (at = tid; at < k; at += 1024) out[at] = at < hi - lo ? (int32_t)(lo + at) : -1;
        if (sel.counts && tid == 0) sel.counts[row] = (int32_t)(hi - lo);
        return;
    }
    /* the cut: all columns with a key > prefix and the first `need` of those equal to it */
    need = (uint32_t)(k < hi - lo ? k : hi - lo);
    for (int shift = 24; shift >= 0 && need > 0; shift -= 8) {
        for (int i = tid; i < 256; i += 1024) bins[i] = 0;
        __syncthreads();
        for (at = lo + tid; at < hi; at += 1024) {
            uint32_t key = dsa__cu_sort_key(I[at]);
            if (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8)) atomicAdd(&bins[key >> shift & 255u], 1u);
        }
        __syncthreads();
        if (tid == 0) {                                  /* the largest byte with at least `need` keys at or above it */
            uint32_t n = need;
            int bin = 255;
            while (bin > 0 && bins[bin] < n) n -= bins[bin--];
            chosen = (uint32_t)bin;
            left = n;
        }
        __syncthreads();
        prefix |= chosen << shift;
        need = left;
        __syncthreads();
    }
    if (prefix == 0) need = 0;                           /* fewer than k are selectable: all of them, none of the others */
    for (at = lo; at < hi; at += 1024) {
        uint32_t key = at + tid < hi ? dsa__cu_sort_key(I[at + tid]) : 0u, mine, before = 0, all = 0, e, a;
        mine = key > prefix ? 1u : key == prefix && prefix != 0 ? 0x10000u : 0u;        /* two counters: above, equal */
        uint32_t above = __ballot_sync(~0u, mine == 1u), same = __ballot_sync(~0u, mine == 0x10000u), below = (1u << lane) - 1u;
        if (lane == 0) warps[warp] = __popc(above) | __popc(same) << 16;
        __syncthreads();
        for (int i = 0; i < 32; i++) { if (i < warp) before += warps[i]; all += warps[i]; }
        a = (before & 0xFFFFu) + __popc(above & below);
        e = equal + (before >> 16) + __popc(same & below);
        if (mine == 1u || (mine && e < need)) {
            int64_t to = base + a + (e < need ? e : need) - (equal < need ? equal : need);
            out[to] = (int32_t)(at + tid);
            if (out_s) out_s[to] = I[at + tid];
        }
        base += (all & 0xFFFFu) + (equal + (all >> 16) < need ? equal + (all >> 16) : need) - (equal < need ? equal : need);
        equal += all >> 16;
        __syncthreads();
    }
    if (sel.rank) {                                      /* score descending, then index ascending: both in one ascending key */
        uint64_t *a = sel.places <= DSA__CU_SORT ? pairs : sel.sort + blockIdx.x * sel.places;
        int64_t n = 1;
        while (n < base) n *= 2;
        for (at = tid; at < n; at += 1024)
            a[at] = at < base ? (uint64_t)~dsa__cu_sort_key(I[out[at]]) << 32 | (uint32_t)out[at] : ~(uint64_t)0;
        dsa__cu_sort(a, n);
        for (at = tid; at < base; at += 1024) {
            out[at] = (int32_t)(uint32_t)a[at];
            if (out_s) out_s[at] = I[(uint32_t)a[at]];
        }
    }
    for (at = base + tid; at < k; at += 1024) {
        out[at] = -1;
        if (out_s) out_s[at] = DSA__CU_NONE;
    }
    if (sel.counts && tid == 0) sel.counts[row] = (int32_t)base;
}

/* ============================================================================================
   >>attend                                   attention, merging
   ============================================================================================ */

/* One call. A row's entries are its list, or the positions [ks, ke), or all that it sees. */
typedef struct dsa__cu_attend {
    dsa__cu_pool pool;
    dsa__cu_batch batch;
    int32_t n_heads, dim_v, what, physical;
    float scale;
    const void *q;                                       /* [n_rows, n_heads, R + r] */
    int32_t q_bf16, out_bf16, exact;
    const int32_t *indices, *counts, *ks, *ke;
    const int32_t *limits;                               /* optional [n_rows]: a list's valid positions are [0, limit) instead of [0, len) */
    int64_t n_indices, index_stride;
    int32_t resume, finish;                              /* begin with the state; end with out, lse, max_logit instead of the state */
    float *max, *sum, *acc;                              /* the state [n_rows, n_heads], acc [.., dim_v] from row0 on (out may be acc) */
    int64_t row0;                                        /* the grid begins with this row */
    const float *sinks;
    void *out;
    float *lse, *max_logit;
} dsa__cu_attend;

typedef struct dsa__cu_entries { const int32_t *list; int32_t seq; int64_t begin, end, limit; } dsa__cu_entries;

static __device__ __forceinline__ dsa__cu_entries dsa__cu_entries_of(const dsa__cu_attend &A, int64_t row)
{
    dsa__cu_row r = dsa__cu_row_of(A.batch, row);
    dsa__cu_entries e;
    e.seq = r.seq;
    e.list = NULL;
    e.begin = 0;
    e.limit = r.len;
    e.end = r.visible;
    if (A.what == DSA_ATTEND_RANGE) {
        e.begin = dsa__cu_clamp(A.ks[row], 0, r.len);
        e.end = dsa__cu_clamp(A.ke[row], 0, r.len);
    } else if (A.what == DSA_ATTEND_LIST) {
        e.list = A.indices + row * A.index_stride;
        e.end = A.counts ? dsa__cu_clamp(A.counts[row], 0, A.n_indices) : A.n_indices;
        if (A.limits) e.limit = dsa__cu_clamp(A.limits[row], 0, A.batch.max_len);
        if (A.physical) e.limit = A.pool.n_pages * A.pool.page_size;
    }
    return e;
}

/* The row that entry i names, or NULL. */
static __device__ __forceinline__ const unsigned char *dsa__cu_entry(const dsa__cu_attend &A, const dsa__cu_entries &e, int64_t i)
{
    int64_t at = e.list ? __ldg(e.list + i) : i;
    int32_t page, offset;
    if (at < 0 || at >= e.limit) return NULL;
    if (e.list && A.physical) return dsa__cu_in(A.pool, at / A.pool.page_size, at % A.pool.page_size);
    page = dsa__cu_page_of(A.pool, e.seq, at, &offset);
    return page < 0 ? NULL : dsa__cu_in(A.pool, page, offset);
}

/* dsa__exp of dsa.h, operation by operation. */
static __device__ __forceinline__ float dsa__cu_exp(float x)
{
    float t = x > -87.0f ? x : -87.0f, r, y;
    int32_t n = (int32_t)__fsub_rn(__fmul_rn(t, 1.44269504f), 0.5f);
    r = __fsub_rn(t, __fmul_rn((float)n, 0.693359375f));
    r = __fsub_rn(r, __fmul_rn((float)n, -2.12194440e-4f));
    y = 1.0f / 5040.0f;
    y = __fadd_rn(__fmul_rn(y, r), 1.0f / 720.0f);
    y = __fadd_rn(__fmul_rn(y, r), 1.0f / 120.0f);
    y = __fadd_rn(__fmul_rn(y, r), 1.0f / 24.0f);
    y = __fadd_rn(__fmul_rn(y, r), 1.0f / 6.0f);
    y = __fadd_rn(__fmul_rn(y, r), 0.5f);
    y = __fadd_rn(__fmul_rn(y, r), 1.0f);
    y = __fadd_rn(__fmul_rn(y, r), 1.0f);
    y = __fmul_rn(y, __uint_as_float((uint32_t)(n + 127) << 23));
    y = x < -87.0f ? 0.0f : y;
    return x != x ? x : y;
}

static __device__ __forceinline__ void dsa__cu_put(void *out, int32_t bf16, int64_t at, float x)
{
    if (bf16) ((uint16_t *)out)[at] = (uint16_t)dsa__cu_bf16(x);
    else ((float *)out)[at] = x;
}

#define DSA__CU_ROWS 64                                  /* valid entries of a step, DSA__REF_ROWS of dsa.h: part of the same bits */

/* dsa__ref_attend_block of dsa.h for 8 heads of one row, block after block of DSA__CU_ROWS valid entries. Dot products: a thread has two
   (entry, head) pairs and adds d = 0, 1, ..; values: a thread has a channel of all 8 heads and adds entry after entry. */
static __global__ void __launch_bounds__(256) dsa__cu_attend_reference(dsa__cu_attend A)
{
    __shared__ const unsigned char *rows[DSA__CU_ROWS + 32];
    __shared__ float kv[DSA__CU_ROWS][33], q[8][33], x[DSA__CU_ROWS][8], max[8], sum[8], keep[8];
    __shared__ int32_t held;
    const int32_t tid = (int32_t)threadIdx.x, groups = (A.n_heads + 7) / 8, R = A.pool.dim, dim = R + A.pool.dim_rope, format = A.pool.format;
    const int64_t row = A.row0 + blockIdx.x / groups, head = (int64_t)(blockIdx.x % groups) * 8, at = row * A.n_heads + head;
    const int32_t lanes = (int32_t)(A.n_heads - head < 8 ? A.n_heads - head : 8);
    const dsa__cu_entries E = dsa__cu_entries_of(A, row);
    float *acc = A.acc + (at - A.row0 * A.n_heads) * A.dim_v;
    int64_t next = E.begin;
    int32_t n, h, s, d, d0, i, first = !A.resume;
    if (tid < lanes) {
        max[tid] = A.resume ? A.max[at + tid] : DSA__CU_NONE;
        sum[tid] = A.resume ? A.sum[at + tid] : 0.0f;
    }
    if (tid == 0) held = 0;
    __syncthreads();
    for (;;) {
        if (tid < 32) {                                  /* the first warp gathers */
            int32_t have = held;
            while (have < DSA__CU_ROWS && next < E.end) {
                const unsigned char *p = next + tid < E.end ? dsa__cu_entry(A, E, next + tid) : NULL;
                uint32_t valid = __ballot_sync(~0u, p != NULL);
                if (p) rows[have + __popc(valid & ((1u << tid) - 1u))] = p;
                have += __popc(valid);
                next += 32;
            }
            __syncwarp();                                /* all lanes have read it */
            if (tid == 0) held = have;
        }
        __syncthreads();
        n = held < DSA__CU_ROWS ? held : DSA__CU_ROWS;
        if (n == 0) break;
        float dot[2] = { 0.0f, 0.0f };
        for (d0 = 0; d0 < dim; d0 += 32) {
            int32_t m = dim - d0 < 32 ? dim - d0 : 32;
            for (i = tid; i < n * 32; i += 256) if (i % 32 < m) kv[i / 32][i % 32] = dsa__cu_latent(format, R, rows[i / 32], d0 + i % 32);
            for (i = tid; i < lanes * 32; i += 256) if (i % 32 < m) q[i / 32][i % 32] = dsa__cu_operand(A.q, A.q_bf16, (at + i / 32) * dim + d0 + i % 32);
            __syncthreads();
            for (d = 0; d < m; d++) {
                dot[0] = __fadd_rn(dot[0], __fmul_rn(kv[tid / 8][d], q[tid % 8][d]));
                dot[1] = __fadd_rn(dot[1], __fmul_rn(kv[tid / 8 + 32][d], q[tid % 8][d]));
            }
            __syncthreads();
        }
        x[tid / 8][tid % 8] = __fmul_rn(dot[0], A.scale);
        x[tid / 8 + 32][tid % 8] = __fmul_rn(dot[1], A.scale);
        __syncthreads();
        if (tid < lanes) {
            float m = max[tid], add = 0.0f;
            for (s = 0; s < n; s++) if (x[s][tid] > m) m = x[s][tid];
            keep[tid] = max[tid] == DSA__CU_NONE ? 0.0f : dsa__cu_exp(__fsub_rn(max[tid], m));
            for (s = 0; s < n; s++) {
                float v = x[s][tid], p = v == DSA__CU_NONE ? 0.0f : dsa__cu_exp(__fsub_rn(v, m));
                x[s][tid] = p;
                add = __fadd_rn(add, p);
            }
            sum[tid] = __fadd_rn(__fmul_rn(sum[tid], keep[tid]), add);
            max[tid] = m;
        }
        __syncthreads();
        for (d = tid; d < A.dim_v; d += 256) {
            float o[8];                                  /* heads that are not there stay 0 */
#pragma unroll
            for (h = 0; h < 8; h++) {
                o[h] = first || h >= lanes ? 0.0f : acc[(int64_t)h * A.dim_v + d];
                if (h < lanes && keep[h] != 1.0f) o[h] = __fmul_rn(o[h], keep[h]);
            }
            for (s = 0; s < n; s++) {
                float v = dsa__cu_latent(format, R, rows[s], d);
#pragma unroll
                for (h = 0; h < 8; h++) if (h < lanes) o[h] = __fadd_rn(o[h], __fmul_rn(x[s][h], v));
            }
#pragma unroll
            for (h = 0; h < 8; h++) if (h < lanes) acc[(int64_t)h * A.dim_v + d] = o[h];
        }
        first = 0;
        __syncthreads();
        if (tid < 32) {                                  /* what was gathered beyond the block */
            const unsigned char *p = rows[DSA__CU_ROWS + tid];
            __syncwarp();
            rows[tid] = p;
            if (tid == 0) held -= n;
        }
        __syncthreads();
    }
    if (!A.finish) {
        for (d = tid; first && d < lanes * A.dim_v; d += 256) acc[d] = 0.0f;
        if (tid < lanes) { A.max[at + tid] = max[tid]; A.sum[at + tid] = sum[tid]; }
        return;
    }
    for (h = 0; h < lanes; h++) {                        /* dsa__attend_finish_heads of dsa.h */
        float f = 0.0f, l = sum[h], m = max[h], z = A.sinks ? A.sinks[head + h] : DSA__CU_NONE;
        if (l != 0.0f) {
            if (z == DSA__CU_NONE) f = __fdiv_rn(1.0f, l);
            else if (z <= m) f = __fdiv_rn(1.0f, __fadd_rn(l, dsa__cu_exp(__fsub_rn(z, m))));
            else {
                float e = dsa__cu_exp(__fsub_rn(m, z));
                f = __fdiv_rn(e, __fadd_rn(__fmul_rn(l, e), 1.0f));
            }
        }
        for (d = tid; d < A.dim_v; d += 256) {
            int64_t to = (int64_t)h * A.dim_v + d;
            dsa__cu_put(A.out, A.out_bf16, at * A.dim_v + to, l == 0.0f ? 0.0f : __fmul_rn(acc[to], f));
        }
        if (tid == 0) {
            if (A.max_logit) A.max_logit[at + h] = m;
            if (A.lse) A.lse[at + h] = l == 0.0f ? INFINITY : __fadd_rn(m, (float)log((double)l));
        }
    }
}

/* dsa_attend_merge of dsa.h: one block per (row, head). An lse of +inf is an empty row of attend and weighs as much as -inf: nothing. */
static __global__ void __launch_bounds__(128) dsa__cu_merge(int32_t n_parts, const float *outs, const float *lses, int64_t n, int32_t n_heads,
                                                            int32_t dim_v, const float *sinks, void *out, int32_t bf16, float *lse)
{
    const int64_t i = blockIdx.x;
    float max = DSA__CU_NONE, sum = 0.0f, total, top, z = sinks ? sinks[i % n_heads] : DSA__CU_NONE;
    for (int32_t p = 0; p < n_parts; p++) {
        float l = lses[p * n + i];
        if (l != INFINITY && l > max) max = l;
    }
    top = z > max ? z : max;
    for (int32_t p = 0; p < n_parts; p++) {
        float l = lses[p * n + i];
        if (l != INFINITY && l != DSA__CU_NONE) sum = __fadd_rn(sum, dsa__cu_exp(__fsub_rn(l, max)));
    }
    if (lse && threadIdx.x == 0) lse[i] = sum == 0.0f ? INFINITY : __fadd_rn(max, (float)log((double)sum));
    total = __fadd_rn(__fmul_rn(sum, dsa__cu_exp(__fsub_rn(max, top))), z == DSA__CU_NONE ? 0.0f : dsa__cu_exp(__fsub_rn(z, top)));
    for (int32_t d = (int32_t)threadIdx.x; d < dim_v; d += 128) {
        float o = 0.0f;
        if (sum != 0.0f && z != INFINITY)
            for (int32_t p = 0; p < n_parts; p++) {
                float l = lses[p * n + i], f = l == INFINITY || l == DSA__CU_NONE ? 0.0f : __fdiv_rn(dsa__cu_exp(__fsub_rn(l, top)), total);
                if (f != 0.0f) o = __fadd_rn(o, __fmul_rn(f, outs[(p * n + i) * dim_v + d]));
            }
        dsa__cu_put(out, bf16, i * dim_v + d, o);
    }
}

/* ============================================================================================
   >>api                                      arguments, workspace, the device
   ============================================================================================ */

typedef struct dsa__cu {
    dsa_cuda hooks;                                      /* first: a dsa_cuda is one of these */
    int32_t device, capability, n_sm;
    dsa_cuda_path path;
    cudaStream_t stream;                                 /* of host-level calls */
    unsigned char *scratch;                              /* their operands, on the device */
    size_t size;
    int32_t *staging;                                    /* host [2 DSA__CU_HOST_ROWS + 1] */
    dsa_allocator host;
} dsa__cu;

#define DSA__CU_HOST_ROWS 4096                           /* most query rows of a tile of a host-level call */
#define DSA__CU_SCRATCH ((size_t)256 << 20)
#define DSA__CU_BUDGET ((size_t)224 << 20)               /* what scores in a workspace may take, one row at least */
#define DSA__CU_MAX_POS ((int64_t)2147483647)

static dsa_status dsa__cu_fail(const dsa_ctx *ctx, dsa_status status, const char *text)
{
    if (ctx && ctx->config.detail && ctx->config.detail_size) {
        size_t n = strlen(text);
        if (n > ctx->config.detail_size - 1) n = ctx->config.detail_size - 1;
        memcpy(ctx->config.detail, text, n);
        ctx->config.detail[n] = 0;
    }
    return status;
}

/* What was launched was accepted. */
static dsa_status dsa__cu_launched(void) { return cudaGetLastError() == cudaSuccess ? DSA_OK : DSA_ERR_DEVICE; }

static int64_t dsa__cu_min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t dsa__cu_max(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t dsa__cu_bound(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

/* As dsa__arena of dsa.h: measures with base NULL, then carves. Pieces start on 256 bytes. */
typedef struct dsa__cu_arena { unsigned char *base; size_t used; int overflow; } dsa__cu_arena;

static void *dsa__cu_take(dsa__cu_arena *a, int64_t n, int64_t m, size_t element)
{
    size_t at = a->used, bytes;
    if (n < 0 || m < 0 || (m != 0 && (uint64_t)n > ((size_t)-1 >> 2) / (uint64_t)m / element)) { a->overflow = 1; return NULL; }
    bytes = (size_t)n * (size_t)m * element;
    if (bytes > ((size_t)-1 >> 2) - at) { a->overflow = 1; return NULL; }
    a->used = (at + bytes + 255) & ~(size_t)255;
    return a->base ? a->base + at : NULL;
}

static dsa__cu_arena dsa__cu_over(void *workspace)
{
    dsa__cu_arena a = { (unsigned char *)workspace, 0, 0 };
    if (a.base) a.base += (size_t)(-(uintptr_t)a.base & 255u);
    return a;
}

static size_t dsa__cu_bytes(const dsa__cu_arena *a) { return a->used ? a->used + 255 : 0; }

static dsa_status dsa__cu_arena_check(const dsa_ctx *ctx, const dsa__cu_arena *a, const void *workspace, size_t size)
{
    if (a->overflow) return dsa__cu_fail(ctx, DSA_ERR_OVERFLOW, "cuda: the workspace does not fit in size_t");
    if (a->used == 0) return DSA_OK;
    if (!workspace) return dsa__cu_fail(ctx, DSA_ERR_NULL, "cuda: workspace is NULL");
    return size < dsa__cu_bytes(a) ? dsa__cu_fail(ctx, DSA_ERR_WORKSPACE, "cuda: workspace_size is smaller than the size query says") : DSA_OK;
}

static dsa__cu *dsa__cu_of(const dsa_ctx *ctx) { return (dsa__cu *)ctx->config.cuda; }

static int32_t dsa__cu_planar(const dsa_cache *c) { return c->kind == DSA_INDEX_KEY && (c->format == DSA_FP8 || c->format == DSA_INT8); }

/* A cache as kernels see it; tables: on the device. */
static dsa__cu_pool dsa__cu_pool_of(const dsa_cache *c, const int32_t *tables, int64_t n_blocks)
{
    dsa__cu_pool p;
    memset(&p, 0, sizeof p);
    p.format = c->format;
    p.dim = c->dim;
    p.dim_rope = c->dim_rope;
    p.hadamard = c->hadamard;
    p.planar = dsa__cu_planar(c);
    p.page_size = c->page_size;
    p.n_pages = c->n_pages;
    p.tables = tables;
    p.n_blocks = tables ? n_blocks : c->n_pages;
    p.data = (unsigned char *)c->data;
    p.page_stride = c->page_stride;
    p.row_stride = p.planar ? (size_t)c->dim : c->row_stride;
    p.scales = c->scales ? (unsigned char *)c->scales : p.data + (size_t)c->page_size * (size_t)c->dim;
    p.scale_page_stride = c->scales ? c->scale_page_stride : c->page_stride;
    return p;
}

/* ---- scoring and selecting, planned and launched ----------------------------------------------------------- */
typedef struct dsa__cu_score_call {
    dsa__cu_pool pool;
    dsa__cu_ranges ranges;
    int32_t n_heads, q_type, select;
    const void *q;
    const float *w;
    float *scores;                                       /* plain scores [n_rows, stride], or of a tile */
    int64_t n_cols, stride;
    dsa__cu_selection sel;
    /* planned */
    int64_t tile;                                        /* rows at a time */
    unsigned char *x;                                    /* prepared queries of a tile, and v */
    float *v;
} dsa__cu_score_call;

static int64_t dsa__cu_key_bytes(int32_t format) { return format == DSA_F32 ? 4 : format == DSA_BF16 ? 2 : 1; }

static dsa__cu_selection dsa__cu_selection_of(const dsa_selection *out)
{
    dsa__cu_selection s;
    memset(&s, 0, sizeof s);
    s.k = out->top_k;
    s.rank = out->order == DSA_ORDER_RANK;
    s.indices = out->indices;
    s.scores = out->scores;
    s.counts = out->counts;
    s.fallback = !s.rank && !out->scores;
    for (s.places = 1; s.places < s.k; s.places *= 2) { }
    return s;
}

static int64_t dsa__cu_sort_bytes(const dsa__cu_selection *s) { return s->rank && s->places > DSA__CU_SORT ? 8 * s->places : 0; }

static void dsa__cu_score_plan(dsa__cu_score_call *c, dsa__cu_arena *arena)
{
    int64_t head = c->n_heads * (c->pool.dim * dsa__cu_key_bytes(c->pool.format) + 4), n_rows = c->ranges.batch.n_rows, row = head;
    if (c->select) {
        c->n_cols = c->ranges.batch.max_len;
        c->stride = (c->n_cols + 31) / 32 * 32;
        row += 4 * c->stride + dsa__cu_sort_bytes(&c->sel);
    }
    c->tile = dsa__cu_bound((int64_t)DSA__CU_BUDGET / row, 1, dsa__cu_min(dsa__cu_max(n_rows, 1), 65535));
    c->x = (unsigned char *)dsa__cu_take(arena, c->tile, (int64_t)c->n_heads * c->pool.dim * dsa__cu_key_bytes(c->pool.format), 1);
    c->v = (float *)dsa__cu_take(arena, c->tile, c->n_heads, 4);
    if (!c->select) return;
    c->scores = (float *)dsa__cu_take(arena, c->tile, c->stride, 4);
    c->sel.sort = (uint64_t *)dsa__cu_take(arena, c->tile, dsa__cu_sort_bytes(&c->sel), 1);
}

static dsa_status dsa__cu_score_launch(const dsa__cu_score_call *c, cudaStream_t stream)
{
    const int64_t n_rows = c->ranges.batch.n_rows, width = (int64_t)c->n_heads * c->pool.dim;
    const int64_t q_bytes = c->q_type == DSA_FP8 ? 1 : c->q_type == DSA_BF16 ? 2 : 4;
    for (int64_t row = 0; row < n_rows; row += c->tile) {
        const int64_t n = dsa__cu_min(c->tile, n_rows - row), skip = c->select && c->sel.fallback ? c->sel.k : c->select ? 0 : -1;
        float *I = c->scores + (c->select ? 0 : row * c->stride);
        dim3 grid((unsigned)((c->n_cols + DSA__CU_TILE - 1) / DSA__CU_TILE), (unsigned)n);
        dsa__cu_query<<<(unsigned)(n * c->n_heads), 128, 0, stream>>>(c->pool.format, c->pool.hadamard, c->pool.dim,
            (const unsigned char *)c->q + row * width * q_bytes, c->q_type, c->w + row * c->n_heads, c->x, c->v);
#define DSA__CU_GO(FORMAT) dsa__cu_score_reference<FORMAT><<<grid, 256, 0, stream>>>(c->pool, c->ranges, c->n_heads, c->x, c->v, I, \
            c->stride, row, c->n_cols, !c->select, skip)
        if (c->n_cols > 0) {
            if (c->pool.format == DSA_F32) DSA__CU_GO(DSA_F32);
            else if (c->pool.format == DSA_BF16) DSA__CU_GO(DSA_BF16);
            else if (c->pool.format == DSA_FP8) DSA__CU_GO(DSA_FP8);
            else DSA__CU_GO(DSA_INT8);
        }
#undef DSA__CU_GO
        if (c->select) dsa__cu_select_reference<<<(unsigned)n, 1024, 0, stream>>>(c->ranges, I, c->stride, row, c->sel);
        if (dsa__cu_launched() != DSA_OK) return DSA_ERR_DEVICE;
    }
    return DSA_OK;
}

/* ---- attention, planned and launched ------------------------------------------------------------------------ */
static int64_t dsa__cu_attend_rows(const dsa__cu_attend *a)
{
    return a->out_bf16 ? dsa__cu_bound((int64_t)(DSA__CU_BUDGET / 4) / ((int64_t)a->n_heads * a->dim_v), 1, dsa__cu_max(a->batch.n_rows, 1))
                       : dsa__cu_max(dsa__cu_min(a->batch.n_rows, 1 << 20), 1);
}

static void dsa__cu_attend_plan(dsa__cu_attend *a, dsa__cu_arena *arena)
{
    if (a->out_bf16) a->acc = (float *)dsa__cu_take(arena, dsa__cu_attend_rows(a), (int64_t)a->n_heads * a->dim_v, 4);
    else if (a->finish) a->acc = (float *)a->out;
}

static dsa_status dsa__cu_attend_launch(const dsa__cu_attend *call, cudaStream_t stream)
{
    const int64_t tile = dsa__cu_attend_rows(call), groups = (call->n_heads + 7) / 8;
    for (int64_t row = 0; row < call->batch.n_rows; row += tile) {
        dsa__cu_attend a = *call;
        int64_t n = dsa__cu_min(dsa__cu_min(tile, a.batch.n_rows - row), DSA__CU_MAX_POS / groups);
        a.row0 = row;
        if (!a.out_bf16) a.acc += row * a.n_heads * a.dim_v;
        dsa__cu_attend_reference<<<(unsigned)(n * groups), 256, 0, stream>>>(a);
        if (dsa__cu_launched() != DSA_OK) return DSA_ERR_DEVICE;
    }
    return DSA_OK;
}

/* ---- device level ------------------------------------------------------------------------------------------- */
/* The context has a device, the batch is sound, the cache is of the kind, on the device, and has the config's dims. */
static dsa_status dsa__cu_check(const dsa_ctx *ctx, const dsa_cuda_batch *b, const dsa_cache *cache, dsa_kind kind)
{
    dsa_cache c;
    dsa_status st;
    if (!ctx) return DSA_ERR_NULL;
    if (!ctx->kernels) return DSA_ERR_ARGUMENT;
    if (!ctx->config.cuda) return dsa__cu_fail(ctx, DSA_ERR_NO_DEVICE, "cuda: config.cuda is NULL");
    if (b) {
        if (b->n_seqs < 0 || b->n_rows < 0 || b->max_len < 0 || b->max_len > DSA__CU_MAX_POS || b->n_rows > DSA__CU_MAX_POS ||
            (b->n_seqs == 0 && b->n_rows > 0) || (!b->first_row && b->n_seqs > 0 && b->n_rows % b->n_seqs != 0))
            return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "cuda: batch.n_seqs, n_rows or max_len");
        if (b->n_rows > 0 && !b->lens) return dsa__cu_fail(ctx, DSA_ERR_NULL, "cuda: batch.lens is NULL");
    }
    if (!cache) return dsa__cu_fail(ctx, DSA_ERR_NULL, "cuda: a cache is NULL");
    if (cache->kind != kind) return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "cuda: latents where index keys belong, or the other way round");
    if (cache->device != DSA_DEVICE_CUDA) return dsa__cu_fail(ctx, DSA_ERR_NO_DEVICE, "cuda: the cache is not on the device");
    c = *cache;                                          /* the table is out of reach */
    c.block_table = NULL;
    c.len = 0;
    st = dsa_cache_check(ctx, &c);
    if (st != DSA_OK) return st;
    if (kind == DSA_LATENT ? c.dim != ctx->config.dim_latent || c.dim_rope != ctx->config.dim_rope : c.dim != ctx->config.dim_index)
        return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "cuda: a cache's dims differ from the config's");
    if (kind == DSA_INDEX_KEY && ctx->config.hadamard != DSA_HADAMARD_AUTO && (c.hadamard != 0) != (ctx->config.hadamard == DSA_HADAMARD_ON))
        return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "cuda: a cache's Hadamard flag differs from the config's");
    return DSA_OK;
}

static dsa__cu_batch dsa__cu_batch_of(const dsa_cuda_batch *b)
{
    dsa__cu_batch r;
    r.n_seqs = b->n_seqs;
    r.n_q = b->n_seqs > 0 ? (int32_t)(b->n_rows / b->n_seqs) : 1;
    r.n_rows = b->n_rows;
    r.max_len = b->max_len;
    r.lens = b->lens;
    r.first = b->first_row;
    return r;
}

static int dsa__cu_is_operand(dsa_type t) { return t == DSA_F32 || t == DSA_BF16; }

extern "C" dsa_status dsa_cuda_append(const dsa_ctx *ctx, const dsa_cuda_append_args *a, void *stream)
{
    dsa_status st;
    if (!ctx) return DSA_ERR_NULL;
    if (!a) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_append: args is NULL");
    if (!a->latent && !a->index) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_append: both caches are NULL");
    st = a->latent ? dsa__cu_check(ctx, &a->batch, a->latent, DSA_LATENT) : DSA_OK;
    if (st == DSA_OK && a->index) st = dsa__cu_check(ctx, &a->batch, a->index, DSA_INDEX_KEY);
    if (st != DSA_OK) return st;
    if (!dsa__cu_is_operand(a->type)) return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "dsa_cuda_append: type is F32 or BF16");
    if (a->batch.n_rows == 0) return DSA_OK;
    if ((a->latent && !a->latent_rows) || (a->index && !a->index_rows)) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_append: rows are NULL");
    if (a->latent)
        dsa__cu_append_row<<<(unsigned)a->batch.n_rows, 128, 0, (cudaStream_t)stream>>>(
            dsa__cu_pool_of(a->latent, a->latent->block_table, a->latent->n_blocks), dsa__cu_batch_of(&a->batch), 0, a->latent_rows,
            a->type == DSA_BF16, a->slots);
    if (a->index)
        dsa__cu_append_row<<<(unsigned)a->batch.n_rows, 128, 0, (cudaStream_t)stream>>>(
            dsa__cu_pool_of(a->index, a->index->block_table, a->index->n_blocks), dsa__cu_batch_of(&a->batch), 1, a->index_rows,
            a->type == DSA_BF16, a->slots);
    return dsa__cu_launched() == DSA_OK ? DSA_OK : dsa__cu_fail(ctx, DSA_ERR_DEVICE, "dsa_cuda_append: a launch was refused");
}

static dsa_status dsa__cu_score_args(const dsa_ctx *ctx, const dsa_cuda_score_args *a, const dsa_selection *out, dsa__cu_arena *arena,
                                     dsa__cu_score_call *c)
{
    dsa_status st;
    memset(c, 0, sizeof *c);
    if (!ctx) return DSA_ERR_NULL;
    if (!a) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_score: args is NULL");
    st = dsa__cu_check(ctx, &a->batch, a->index, DSA_INDEX_KEY);
    if (st != DSA_OK) return st;
    c->n_heads = a->n_index_heads ? a->n_index_heads : ctx->config.n_index_heads;
    if (c->n_heads < 1 || c->n_heads > DSA_MAX_DIM) return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_score: n_index_heads");
    if (!dsa__cu_is_operand(a->q_type) && !(a->q_type == DSA_FP8 && a->index->format == DSA_FP8))
        return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "dsa_cuda_score: q_type is F32, BF16, or FP8 over FP8 keys");
    if ((a->ks == NULL) != (a->ke == NULL)) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_score: ks and ke go together");
    c->pool = dsa__cu_pool_of(a->index, a->index->block_table, a->index->n_blocks);
    c->ranges.batch = dsa__cu_batch_of(&a->batch);
    c->ranges.ks = a->ks;
    c->ranges.ke = a->ke;
    c->q = a->q;
    c->q_type = a->q_type;
    c->w = a->w;
    if (out) {
        dsa_selection sel = *out;
        if (sel.top_k == 0) sel.top_k = ctx->config.top_k;
        if (sel.top_k < 1) return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_score_select: top_k is negative");
        if (sel.order != DSA_ORDER_INDEX && sel.order != DSA_ORDER_RANK)
            return dsa__cu_fail(ctx, DSA_ERR_ARGUMENT, "dsa_cuda_score_select: unknown order");
        c->select = 1;
        c->sel = dsa__cu_selection_of(&sel);
    }
    dsa__cu_score_plan(c, arena);
    return arena->overflow ? dsa__cu_fail(ctx, DSA_ERR_OVERFLOW, "cuda: the workspace does not fit in size_t") : DSA_OK;
}

static dsa_status dsa__cu_score_bytes(const dsa_ctx *ctx, const dsa_cuda_score_args *a, const dsa_selection *out, size_t *bytes)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa__cu_score_call c;
    dsa_status st = dsa__cu_score_args(ctx, a, out, &arena, &c);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_score: bytes is NULL");
    *bytes = dsa__cu_bytes(&arena);
    return DSA_OK;
}

static dsa_status dsa__cu_score_start(const dsa_ctx *ctx, const dsa_cuda_score_args *a, const dsa_selection *out, dsa__cu_score_call *c)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa_status st = dsa__cu_score_args(ctx, a, out, &arena, c);
    if (st != DSA_OK) return st;
    if (a->batch.n_rows > 0 && (!a->q || !a->w)) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_score: q or w is NULL");
    if (a->batch.n_rows > 0 && out && !out->indices) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_score_select: indices is NULL");
    st = dsa__cu_arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__cu_over(a->workspace);
    return dsa__cu_score_args(ctx, a, out, &arena, c);
}

static dsa_status dsa__cu_refused(const dsa_ctx *ctx, dsa_status st)
{
    return st == DSA_OK ? st : dsa__cu_fail(ctx, st, "cuda: a launch was refused");
}

extern "C" dsa_status dsa_cuda_score_workspace(const dsa_ctx *ctx, const dsa_cuda_score_args *a, size_t *bytes)
{
    return dsa__cu_score_bytes(ctx, a, NULL, bytes);
}

extern "C" dsa_status dsa_cuda_score_select_workspace(const dsa_ctx *ctx, const dsa_cuda_score_args *a, const dsa_selection *out, size_t *bytes)
{
    if (!out) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_score_select: out is NULL");
    return dsa__cu_score_bytes(ctx, a, out, bytes);
}

extern "C" dsa_status dsa_cuda_score(const dsa_ctx *ctx, const dsa_cuda_score_args *a, float *scores, int64_t n_cols, int64_t stride, void *stream)
{
    dsa__cu_score_call c;
    dsa_status st = dsa__cu_score_start(ctx, a, NULL, &c);
    if (st != DSA_OK) return st;
    if (n_cols < 0 || stride < n_cols) return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_score: not 0 <= n_cols <= stride");
    if (a->batch.n_rows == 0 || n_cols == 0) return DSA_OK;
    if (!scores) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_score: scores is NULL");
    c.scores = scores;
    c.n_cols = n_cols;
    c.stride = stride;
    return dsa__cu_refused(ctx, dsa__cu_score_launch(&c, (cudaStream_t)stream));
}

extern "C" dsa_status dsa_cuda_score_select(const dsa_ctx *ctx, const dsa_cuda_score_args *a, const dsa_selection *out, void *stream)
{
    dsa__cu_score_call c;
    dsa_status st;
    if (!out) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_score_select: out is NULL");
    st = dsa__cu_score_start(ctx, a, out, &c);
    if (st != DSA_OK || a->batch.n_rows == 0) return st;
    return dsa__cu_refused(ctx, dsa__cu_score_launch(&c, (cudaStream_t)stream));
}

static dsa_status dsa__cu_select_args(const dsa_ctx *ctx, const dsa_cuda_select_args *a, const dsa_selection *out, dsa__cu_arena *arena,
                                      dsa__cu_selection *sel)
{
    dsa_selection s;
    if (!ctx) return DSA_ERR_NULL;
    if (!a || !out) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_select: args or out is NULL");
    if (!ctx->config.cuda) return dsa__cu_fail(ctx, DSA_ERR_NO_DEVICE, "cuda: config.cuda is NULL");
    if (a->n_rows < 0 || a->n_rows > DSA__CU_MAX_POS || a->n_cols < 0 || a->n_cols > a->stride || a->n_cols > DSA__CU_MAX_POS)
        return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_select: n_rows, or not 0 <= n_cols <= stride");
    if ((a->ks == NULL) != (a->ke == NULL)) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_select: ks and ke go together");
    s = *out;
    if (s.top_k == 0) s.top_k = ctx->config.top_k;
    if (s.top_k < 1) return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_select: top_k is negative");
    if (s.order != DSA_ORDER_INDEX && s.order != DSA_ORDER_RANK) return dsa__cu_fail(ctx, DSA_ERR_ARGUMENT, "dsa_cuda_select: unknown order");
    *sel = dsa__cu_selection_of(&s);
    sel->fallback = 0;                                   /* stored scores are seen: NaN and -inf are left out of short rows, too */
    sel->sort = (uint64_t *)dsa__cu_take(arena, a->n_rows, dsa__cu_sort_bytes(sel), 1);
    return arena->overflow ? dsa__cu_fail(ctx, DSA_ERR_OVERFLOW, "cuda: the workspace does not fit in size_t") : DSA_OK;
}

extern "C" dsa_status dsa_cuda_select_workspace(const dsa_ctx *ctx, const dsa_cuda_select_args *a, const dsa_selection *out, size_t *bytes)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa__cu_selection sel;
    dsa_status st = dsa__cu_select_args(ctx, a, out, &arena, &sel);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_select: bytes is NULL");
    *bytes = dsa__cu_bytes(&arena);
    return DSA_OK;
}

extern "C" dsa_status dsa_cuda_select(const dsa_ctx *ctx, const dsa_cuda_select_args *a, const dsa_selection *out, void *stream)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa__cu_selection sel;
    dsa__cu_ranges ranges;
    dsa_status st = dsa__cu_select_args(ctx, a, out, &arena, &sel);
    if (st == DSA_OK) st = dsa__cu_arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK || a->n_rows == 0) return st;
    if (!out->indices || (a->n_cols > 0 && !a->scores)) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_select: scores or indices is NULL");
    arena = dsa__cu_over(a->workspace);
    st = dsa__cu_select_args(ctx, a, out, &arena, &sel);
    if (st != DSA_OK) return st;
    memset(&ranges, 0, sizeof ranges);
    ranges.batch.max_len = a->n_cols;
    ranges.ks = a->ks;
    ranges.ke = a->ke;
    dsa__cu_select_reference<<<(unsigned)a->n_rows, 1024, 0, (cudaStream_t)stream>>>(ranges, a->scores, a->stride, 0, sel);
    return dsa__cu_refused(ctx, dsa__cu_launched());
}

static dsa_status dsa__cu_attend_args(const dsa_ctx *ctx, const dsa_cuda_attend_args *a, dsa__cu_arena *arena, dsa__cu_attend *c)
{
    dsa_status st;
    memset(c, 0, sizeof *c);
    if (!ctx) return DSA_ERR_NULL;
    if (!a) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_attend: args is NULL");
    st = dsa__cu_check(ctx, &a->batch, a->latent, DSA_LATENT);
    if (st != DSA_OK) return st;
    c->pool = dsa__cu_pool_of(a->latent, a->latent->block_table, a->latent->n_blocks);
    c->batch = dsa__cu_batch_of(&a->batch);
    c->n_heads = a->n_heads ? a->n_heads : ctx->config.n_heads;
    c->dim_v = a->dim_v ? a->dim_v : ctx->config.dim_latent;
    c->what = a->what;
    c->physical = a->index_kind == DSA_PHYSICAL;
    c->scale = a->scale == 0.0f ? ctx->config.softmax_scale : a->scale;
    c->q = a->q;
    c->q_bf16 = a->q_type == DSA_BF16;
    c->out = a->out;
    c->out_bf16 = a->out_type == DSA_BF16;
    c->exact = a->latent->format == DSA_F32 || ctx->config.precision == DSA_PRECISION_F32;
    c->indices = a->indices;
    c->n_indices = a->n_indices ? a->n_indices : ctx->config.top_k;
    c->index_stride = a->index_stride ? a->index_stride : c->n_indices;
    c->counts = a->counts;
    c->ks = a->ks;
    c->ke = a->ke;
    c->sinks = a->sinks;
    c->lse = a->lse;
    c->max_logit = a->max_logit;
    c->finish = 1;
    if (c->n_heads < 1 || c->n_heads > DSA_MAX_DIM || c->dim_v < 1 || c->dim_v > c->pool.dim + c->pool.dim_rope)
        return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_attend: n_heads, or dim_v is wider than a cache row");
    if (!(fabsf(c->scale) <= 3.402823466e+38f)) return dsa__cu_fail(ctx, DSA_ERR_ARGUMENT, "dsa_cuda_attend: scale is not finite");
    if (c->n_indices < 0 || c->index_stride < c->n_indices)
        return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_attend: not 0 <= n_indices <= index_stride");
    if (!dsa__cu_is_operand(a->q_type) || !dsa__cu_is_operand(a->out_type))
        return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "dsa_cuda_attend: q_type and out_type are F32 or BF16");
    if ((a->what != DSA_ATTEND_LIST && a->what != DSA_ATTEND_RANGE && a->what != DSA_ATTEND_VISIBLE) ||
        (a->index_kind != DSA_LOGICAL && a->index_kind != DSA_PHYSICAL))
        return dsa__cu_fail(ctx, DSA_ERR_ARGUMENT, "dsa_cuda_attend: unknown what or index_kind");
    dsa__cu_attend_plan(c, arena);
    return arena->overflow ? dsa__cu_fail(ctx, DSA_ERR_OVERFLOW, "cuda: the workspace does not fit in size_t") : DSA_OK;
}

extern "C" dsa_status dsa_cuda_attend_workspace(const dsa_ctx *ctx, const dsa_cuda_attend_args *a, size_t *bytes)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa__cu_attend c;
    dsa_status st = dsa__cu_attend_args(ctx, a, &arena, &c);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_attend: bytes is NULL");
    *bytes = dsa__cu_bytes(&arena);
    return DSA_OK;
}

extern "C" dsa_status dsa_cuda_attend(const dsa_ctx *ctx, const dsa_cuda_attend_args *a, void *stream)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa__cu_attend c;
    dsa_status st = dsa__cu_attend_args(ctx, a, &arena, &c);
    if (st == DSA_OK) st = dsa__cu_arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK || a->batch.n_rows == 0) return st;
    if (!a->q || !a->out) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_attend: q or out is NULL");
    if (a->what == DSA_ATTEND_LIST && !a->indices) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_attend: indices is NULL");
    if (a->what == DSA_ATTEND_RANGE && (!a->ks || !a->ke)) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_attend: ks or ke is NULL");
    arena = dsa__cu_over(a->workspace);
    st = dsa__cu_attend_args(ctx, a, &arena, &c);
    return st == DSA_OK ? dsa__cu_refused(ctx, dsa__cu_attend_launch(&c, (cudaStream_t)stream)) : st;
}

extern "C" dsa_status dsa_cuda_merge(const dsa_ctx *ctx, int32_t n_parts, const float *outs, const float *lses, int64_t n_rows, int32_t n_heads,
                                     int32_t dim_v, const float *sinks, void *out, dsa_type out_type, float *lse, void *stream)
{
    if (!ctx) return DSA_ERR_NULL;
    if (!ctx->config.cuda) return dsa__cu_fail(ctx, DSA_ERR_NO_DEVICE, "cuda: config.cuda is NULL");
    if (n_parts < 0 || n_rows < 0 || n_heads < 1 || dim_v < 1 || n_rows > DSA__CU_MAX_POS / n_heads)
        return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_merge: a count or dim");
    if (!dsa__cu_is_operand(out_type)) return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "dsa_cuda_merge: out_type is F32 or BF16");
    if (n_rows == 0) return DSA_OK;
    if (!out || (n_parts > 0 && (!outs || !lses))) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_merge: outs, lses or out is NULL");
    dsa__cu_merge<<<(unsigned)(n_rows * n_heads), 128, 0, (cudaStream_t)stream>>>(n_parts, outs, lses, n_rows * n_heads, n_heads, dim_v, sinks, out,
                                                                                  out_type == DSA_BF16, lse);
    return dsa__cu_refused(ctx, dsa__cu_launched());
}

typedef struct dsa__cu_step { dsa_cuda_append_args append; dsa_cuda_score_args score; dsa_selection sel; dsa_cuda_attend_args attend; } dsa__cu_step;

/* The calls that a step is. Scoring and attention share their scratch: they follow each other. */
static dsa_status dsa__cu_step_args(const dsa_ctx *ctx, const dsa_cuda_step_args *a, dsa__cu_arena *arena, dsa__cu_step *c)
{
    size_t score_bytes = 0, attend_bytes = 0;
    dsa_status st;
    memset(c, 0, sizeof *c);
    if (!ctx) return DSA_ERR_NULL;
    if (!a) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_step: args is NULL");
    if ((a->latent_rows == NULL) != (a->index_rows == NULL))
        return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_step: latent_rows and index_rows go together");
    if (!dsa__cu_is_operand(a->type)) return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "dsa_cuda_step: type is F32 or BF16");
    c->append.batch = c->score.batch = c->attend.batch = a->batch;
    c->append.latent = c->attend.latent = a->latent;
    c->append.index = c->score.index = a->index;
    c->append.latent_rows = a->latent_rows;
    c->append.index_rows = a->index_rows;
    c->append.type = c->attend.q_type = a->type;
    c->score.q = a->index_q;
    c->score.q_type = a->index_q_type;
    c->score.w = a->index_w;
    c->sel.top_k = a->top_k ? a->top_k : ctx->config.top_k;
    if (c->sel.top_k < 1) return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_step: top_k is negative");
    c->sel.indices = (int32_t *)dsa__cu_take(arena, a->indices ? 0 : a->batch.n_rows, c->sel.top_k, sizeof(int32_t));
    if (a->indices) c->sel.indices = a->indices;
    c->attend.q = a->q;
    c->attend.scale = a->scale;
    c->attend.indices = c->sel.indices;
    c->attend.n_indices = c->sel.top_k;
    c->attend.sinks = a->sinks;
    c->attend.out = a->out;
    c->attend.out_type = a->out_type;
    c->attend.lse = a->lse;
    st = dsa_cuda_score_select_workspace(ctx, &c->score, &c->sel, &score_bytes);
    if (st == DSA_OK) st = dsa_cuda_attend_workspace(ctx, &c->attend, &attend_bytes);
    if (st != DSA_OK) return st;
    c->score.workspace_size = c->attend.workspace_size = score_bytes > attend_bytes ? score_bytes : attend_bytes;
    c->score.workspace = c->attend.workspace = dsa__cu_take(arena, 1, (int64_t)c->score.workspace_size, 1);
    return arena->overflow ? dsa__cu_fail(ctx, DSA_ERR_OVERFLOW, "cuda: the workspace does not fit in size_t") : DSA_OK;
}

extern "C" dsa_status dsa_cuda_step_workspace(const dsa_ctx *ctx, const dsa_cuda_step_args *a, size_t *bytes)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa__cu_step c;
    dsa_status st = dsa__cu_step_args(ctx, a, &arena, &c);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_step: bytes is NULL");
    *bytes = dsa__cu_bytes(&arena);
    return DSA_OK;
}

extern "C" dsa_status dsa_cuda_step(const dsa_ctx *ctx, const dsa_cuda_step_args *a, void *stream)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa__cu_step c;
    dsa_status st = dsa__cu_step_args(ctx, a, &arena, &c);
    if (st != DSA_OK || a->batch.n_rows == 0) return st;
    if (!a->q || !a->index_q || !a->index_w || !a->out) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_step: q, index_q, index_w or out is NULL");
    st = dsa__cu_arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__cu_over(a->workspace);
    st = dsa__cu_step_args(ctx, a, &arena, &c);
    if (st == DSA_OK && a->latent_rows) st = dsa_cuda_append(ctx, &c.append, stream);
    if (st == DSA_OK) st = dsa_cuda_score_select(ctx, &c.score, &c.sel, stream);
    if (st == DSA_OK) st = dsa_cuda_attend(ctx, &c.attend, stream);
    return st;
}

/* ---- host level: operands up, results down ------------------------------------------------------------------ */
/* Makes the device current for the length of a call. */
typedef struct dsa__cu_turn { int before; cudaError_t err; } dsa__cu_turn;

static dsa__cu_turn dsa__cu_enter(const dsa__cu *g)
{
    dsa__cu_turn t = { 0, cudaSuccess };
    t.err = cudaGetDevice(&t.before);
    if (t.err == cudaSuccess && t.before != g->device) t.err = cudaSetDevice(g->device);
    return t;
}

/* Waits for what the call has sent to the stream, and gives the caller his device back. */
static dsa_status dsa__cu_leave(const dsa__cu *g, dsa__cu_turn t, dsa_status st)
{
    cudaError_t err = cudaStreamSynchronize(g->stream);
    if (t.before != g->device) (void)cudaSetDevice(t.before);
    return st == DSA_OK && (err != cudaSuccess || t.err != cudaSuccess) ? DSA_ERR_DEVICE : st;
}

/* Pageable memory: up returns once the bytes are on their way, down once they are there. */
static void dsa__cu_up(const dsa__cu *g, dsa__cu_turn *t, void *to, const void *from, size_t bytes)
{
    if (t->err == cudaSuccess && bytes > 0) t->err = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, g->stream);
}

static void dsa__cu_down(const dsa__cu *g, dsa__cu_turn *t, void *to, const void *from, size_t bytes)
{
    if (t->err == cudaSuccess && bytes > 0) t->err = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, g->stream);
}

/* The part of a cache's table that `len` rows need. */
static int64_t dsa__cu_blocks(const dsa_cache *c, int64_t len) { return c->block_table ? (len + c->page_size - 1) / c->page_size : 0; }

static int64_t dsa__cu_n_q(const dsa_seq *s) { return s->n_q == 0 ? 1 : s->n_q == DSA_NONE ? 0 : s->n_q; }
static int64_t dsa__cu_len(const dsa_seq *s, const dsa_cache *c) { return s->len == 0 ? c->len : s->len == DSA_NONE ? 0 : s->len; }

static dsa__cu_batch dsa__cu_one(int64_t n, int64_t len, const int32_t *lens)
{
    dsa__cu_batch b;
    memset(&b, 0, sizeof b);
    b.n_seqs = 1;
    b.n_q = (int32_t)n;
    b.n_rows = n;
    b.max_len = len;
    b.lens = lens;
    return b;
}

static dsa_status dsa__cu_host_append(const dsa_ctx *ctx, const dsa_cache *c, int64_t n, const float *x, const int64_t *slots)
{
    dsa__cu *g = dsa__cu_of(ctx);
    dsa__cu_turn t = dsa__cu_enter(g);
    const int64_t width = (int64_t)c->dim + c->dim_rope, blocks = slots ? 0 : dsa__cu_blocks(c, c->len + n);
    int64_t done, m = dsa__cu_min(n, DSA__CU_HOST_ROWS);
    int32_t *table, *lens;
    int64_t *to;
    float *rows;
    dsa__cu_arena a;
    for (;; m /= 2) {
        a = dsa__cu_over(g->scratch);
        table = (int32_t *)dsa__cu_take(&a, blocks, 1, 4);
        lens = (int32_t *)dsa__cu_take(&a, 1, 1, 4);
        to = (int64_t *)dsa__cu_take(&a, slots ? m : 0, 1, 8);
        rows = (float *)dsa__cu_take(&a, m, width, 4);
        if (!a.overflow && a.used <= g->size) break;
        if (m <= 1) return dsa__cu_leave(g, t, DSA_ERR_WORKSPACE);
    }
    dsa__cu_up(g, &t, table, c->block_table, (size_t)blocks * 4);
    for (done = 0; done < n && t.err == cudaSuccess; done += m) {
        m = dsa__cu_min(m, n - done);
        g->staging[0] = (int32_t)(c->len + done + m);
        dsa__cu_up(g, &t, lens, g->staging, 4);
        if (slots) dsa__cu_up(g, &t, to, slots + done, (size_t)m * 8);
        dsa__cu_up(g, &t, rows, x + done * width, (size_t)(m * width) * 4);
        if (t.err != cudaSuccess) break;
        dsa__cu_append_row<<<(unsigned)m, 128, 0, g->stream>>>(dsa__cu_pool_of(c, blocks ? table : NULL, blocks),
            dsa__cu_one(m, DSA__CU_MAX_POS, lens), c->kind == DSA_INDEX_KEY, rows, 0, slots ? to : NULL);
        t.err = cudaGetLastError();
    }
    return dsa__cu_leave(g, t, DSA_OK);
}

static dsa_status dsa__cu_host_read(const dsa_ctx *ctx, const dsa_cache *c, int64_t begin, int64_t end, float *out)
{
    dsa__cu *g = dsa__cu_of(ctx);
    dsa__cu_turn t = dsa__cu_enter(g);
    const int64_t width = (int64_t)c->dim + c->dim_rope, blocks = dsa__cu_blocks(c, end);
    int64_t m = dsa__cu_min(end - begin, DSA__CU_HOST_ROWS), n;
    int32_t *table;
    float *rows;
    dsa__cu_arena a;
    if (m <= 0) return dsa__cu_leave(g, t, DSA_OK);
    for (;; m /= 2) {
        a = dsa__cu_over(g->scratch);
        table = (int32_t *)dsa__cu_take(&a, blocks, 1, 4);
        rows = (float *)dsa__cu_take(&a, m, width, 4);
        if (!a.overflow && a.used <= g->size) break;
        if (m <= 1) return dsa__cu_leave(g, t, DSA_ERR_WORKSPACE);
    }
    dsa__cu_up(g, &t, table, c->block_table, (size_t)blocks * 4);
    for (; begin < end && t.err == cudaSuccess; begin += n, out += n * width) {
        n = dsa__cu_min(m, end - begin);
        dsa__cu_read_row<<<(unsigned)n, 128, 0, g->stream>>>(dsa__cu_pool_of(c, blocks ? table : NULL, blocks), c->kind == DSA_INDEX_KEY, begin, rows);
        t.err = cudaGetLastError();
        dsa__cu_down(g, &t, out, rows, (size_t)(n * width) * 4);
    }
    return dsa__cu_leave(g, t, DSA_OK);
}

/* Device arrays of a tile of m rows of one sequence. */
typedef struct dsa__cu_score_host { int32_t *table, *lens, *ks; float *q, *w; dsa_selection out; float *scores; dsa__cu_score_call call; } dsa__cu_score_host;

static dsa__cu_arena dsa__cu_score_lay(const dsa__cu *g, const dsa_ctx *ctx, const dsa_score_args *a, const dsa_selection *out, const dsa_cache *c, int64_t len,
                                       int64_t longest, int64_t m, int64_t n_cols, dsa__cu_score_host *t)
{
    dsa__cu_arena arena = dsa__cu_over(g->scratch);
    const int64_t blocks = dsa__cu_blocks(c, len), HI = a->n_index_heads;
    memset(t, 0, sizeof *t);
    t->table = (int32_t *)dsa__cu_take(&arena, blocks, 1, 4);
    t->lens = (int32_t *)dsa__cu_take(&arena, 1, 1, 4);
    t->ks = (int32_t *)dsa__cu_take(&arena, 2 * m, 1, 4);
    t->q = (float *)dsa__cu_take(&arena, m, HI * ctx->config.dim_index, 4);
    t->w = (float *)dsa__cu_take(&arena, m, HI, 4);
    if (out) {
        t->out = *out;
        t->out.indices = (int32_t *)dsa__cu_take(&arena, m, out->top_k, 4);
        if (out->scores) t->out.scores = (float *)dsa__cu_take(&arena, m, out->top_k, 4);
        if (out->counts) t->out.counts = (int32_t *)dsa__cu_take(&arena, m, 1, 4);
        t->call.select = 1;
        t->call.sel = dsa__cu_selection_of(&t->out);
    } else {
        t->scores = (float *)dsa__cu_take(&arena, m, n_cols, 4);
        t->call.scores = t->scores;
        t->call.n_cols = t->call.stride = n_cols;
    }
    t->call.pool = dsa__cu_pool_of(c, blocks ? t->table : NULL, blocks);
    t->call.ranges.batch = dsa__cu_one(m, len, t->lens);
    t->call.ranges.ks = t->ks;
    t->call.ranges.ke = t->ks + m;
    t->call.n_heads = a->n_index_heads;
    t->call.q_type = DSA_F32;
    t->call.q = t->q;
    t->call.w = t->w;
    if (out) t->call.ranges.batch.max_len = longest;     /* columns to keep scores for: no key range ends later */
    dsa__cu_score_plan(&t->call, &arena);
    t->call.ranges.batch.max_len = len;
    return arena;
}

static dsa_status dsa__cu_host_score(const dsa_ctx *ctx, const dsa_score_args *a, const dsa_selection *out, int64_t n_rows, float *scores, int64_t n_cols,
                                     int64_t stride, int run)
{
    dsa__cu *g = dsa__cu_of(ctx);
    dsa__cu_turn t = { 0, cudaSuccess };
    dsa__cu_score_host tile;
    dsa__cu_arena arena;
    int64_t row = 0, at, i, m;
    const int64_t width = (int64_t)a->n_index_heads * ctx->config.dim_index;
    dsa_status st = DSA_OK;
    if (n_rows == 0) return DSA_OK;
    if (run) t = dsa__cu_enter(g);
    for (int32_t s = 0; s < a->n_seqs && st == DSA_OK && t.err == cudaSuccess; s++) {
        const dsa_seq *seq = &a->seqs[s];
        const dsa_cache *c = seq->index;
        const int64_t len = dsa__cu_len(seq, c), n_q = dsa__cu_n_q(seq);
        for (at = 0; at < n_q && st == DSA_OK; at += m, row += m) {
            for (m = run ? dsa__cu_min(n_q - at, DSA__CU_HOST_ROWS) : 1; ; m /= 2) {
                arena = dsa__cu_score_lay(g, ctx, a, out, c, len, len, m, n_cols, &tile);
                if (!arena.overflow && arena.used <= g->size) break;
                if (m <= 1) { st = DSA_ERR_WORKSPACE; break; }
            }
            if (!run) break;
            if (st != DSA_OK) break;
            for (i = 0; i < m; i++) {
                int64_t ks = 0, ke = dsa__cu_max(len - n_q + at + i + 1, 0);
                if (a->ks) {
                    ks = dsa__cu_bound(a->ks[row + i], 0, len);
                    ke = dsa__cu_bound(a->ke[row + i], 0, len);
                }
                g->staging[i] = (int32_t)ks;
                g->staging[m + i] = (int32_t)dsa__cu_max(ks, ke);
            }
            g->staging[2 * m] = (int32_t)len;
            dsa__cu_up(g, &t, tile.ks, g->staging, (size_t)m * 8);
            dsa__cu_up(g, &t, tile.lens, g->staging + 2 * m, 4);
            dsa__cu_up(g, &t, tile.table, c->block_table, (size_t)dsa__cu_blocks(c, len) * 4);
            dsa__cu_up(g, &t, tile.q, a->q + row * width, (size_t)(m * width) * 4);
            dsa__cu_up(g, &t, tile.w, a->w + row * a->n_index_heads, (size_t)(m * a->n_index_heads) * 4);
            if (t.err == cudaSuccess) st = dsa__cu_score_launch(&tile.call, g->stream);
            if (st != DSA_OK || t.err != cudaSuccess) break;
            if (out) {
                dsa__cu_down(g, &t, out->indices + row * out->top_k, tile.out.indices, (size_t)(m * out->top_k) * 4);
                if (out->scores) dsa__cu_down(g, &t, out->scores + row * out->top_k, tile.out.scores, (size_t)(m * out->top_k) * 4);
                if (out->counts) dsa__cu_down(g, &t, out->counts + row, tile.out.counts, (size_t)m * 4);
            } else if (n_cols > 0) {
                t.err = cudaMemcpy2DAsync(scores + row * stride, (size_t)stride * 4, tile.scores, (size_t)n_cols * 4, (size_t)n_cols * 4, (size_t)m,
                                          cudaMemcpyDeviceToHost, g->stream);
            }
        }
    }
    return run ? dsa__cu_leave(g, t, st) : st;
}

typedef struct dsa__cu_attend_host { int32_t *table, *lens, *ks, *counts, *indices; float *q, *sinks; dsa__cu_attend call; } dsa__cu_attend_host;

static dsa__cu_arena dsa__cu_attend_lay(const dsa__cu *g, const dsa_ctx *ctx, const dsa_attend_args *a, const dsa_attend_state *state, int fused, const dsa_cache *c,
                                        int64_t len, int64_t blocks, int64_t m, const float *sinks, dsa__cu_attend_host *t)
{
    dsa__cu_arena arena = dsa__cu_over(g->scratch);
    const int64_t H = state->n_heads, W = (int64_t)ctx->config.dim_latent + ctx->config.dim_rope;
    const int list = a->what == DSA_ATTEND_LIST;
    dsa__cu_attend *A = &t->call;
    memset(t, 0, sizeof *t);
    t->table = (int32_t *)dsa__cu_take(&arena, blocks, 1, 4);
    t->lens = (int32_t *)dsa__cu_take(&arena, 1, 1, 4);
    t->ks = (int32_t *)dsa__cu_take(&arena, 2 * m, 1, 4);
    t->counts = (int32_t *)dsa__cu_take(&arena, list && a->counts ? m : 0, 1, 4);
    t->indices = (int32_t *)dsa__cu_take(&arena, list ? m : 0, a->n_indices, 4);
    t->sinks = (float *)dsa__cu_take(&arena, sinks ? H : 0, 1, 4);
    t->q = (float *)dsa__cu_take(&arena, m, H * W, 4);
    A->pool = dsa__cu_pool_of(c, blocks ? t->table : NULL, blocks);
    A->batch = dsa__cu_one(m, len, t->lens);
    A->n_heads = state->n_heads;
    A->dim_v = state->dim_v;
    A->what = list ? DSA_ATTEND_LIST : DSA_ATTEND_RANGE;
    A->physical = a->index_kind == DSA_PHYSICAL;
    A->scale = a->scale;
    A->q = t->q;
    A->indices = t->indices;
    A->counts = list && a->counts ? t->counts : NULL;
    A->ks = list ? NULL : t->ks;
    A->ke = list ? NULL : t->ks + m;
    A->limits = list ? t->ks : NULL;
    A->n_indices = A->index_stride = a->n_indices;
    A->resume = !fused;
    A->finish = fused;
    A->max = (float *)dsa__cu_take(&arena, m, H, 4);
    A->sum = (float *)dsa__cu_take(&arena, m, H, 4);
    A->lse = (float *)dsa__cu_take(&arena, m, H, 4);
    A->acc = (float *)dsa__cu_take(&arena, m, H * state->dim_v, 4);
    A->out = A->acc;
    A->sinks = sinks ? t->sinks : NULL;
    dsa__cu_attend_plan(A, &arena);
    return arena;
}

static dsa_status dsa__cu_host_attend(const dsa_ctx *ctx, const dsa_attend_args *a, const dsa_attend_state *state, int exact, int fused, const float *sinks,
                                      float *lse, int run)
{
    dsa__cu *g = dsa__cu_of(ctx);
    dsa__cu_turn t = { 0, cudaSuccess };
    dsa__cu_attend_host tile;
    dsa__cu_arena arena;
    const int64_t H = state->n_heads, W = (int64_t)ctx->config.dim_latent + ctx->config.dim_rope, dv = state->dim_v;
    int64_t row = 0, at, i, m;
    dsa_status st = DSA_OK;
    if (state->n_rows == 0) return DSA_OK;
    if (run) t = dsa__cu_enter(g);
    for (int32_t s = 0; s < a->n_seqs && st == DSA_OK && t.err == cudaSuccess; s++) {
        const dsa_seq *seq = &a->seqs[s];
        const dsa_cache *c = seq->latent;
        const int64_t len = dsa__cu_len(seq, c), n_q = dsa__cu_n_q(seq), blocks = dsa__cu_blocks(c, len);
        for (at = 0; at < n_q && st == DSA_OK; at += m, row += m) {
            for (m = run ? dsa__cu_min(n_q - at, DSA__CU_HOST_ROWS) : 1; ; m /= 2) {
                arena = dsa__cu_attend_lay(g, ctx, a, state, fused, c, len, blocks, m, sinks, &tile);
                if (!arena.overflow && arena.used <= g->size) break;
                if (m <= 1) { st = DSA_ERR_WORKSPACE; break; }
            }
            if (!run) break;
            if (st != DSA_OK) break;
            tile.call.exact = exact;
            for (i = 0; i < m; i++) {
                int64_t visible = dsa__cu_max(len - n_q + at + i + 1, 0), ks = 0, ke = visible;
                if (a->what == DSA_ATTEND_LIST) ks = fused ? visible : len;          /* the limit of valid positions */
                if (a->what == DSA_ATTEND_RANGE) {
                    int64_t end = fused ? visible : len;
                    ks = dsa__cu_bound(a->ks[row + i], 0, end);
                    ke = dsa__cu_bound(a->ke[row + i], 0, end);
                }
                g->staging[i] = (int32_t)ks;
                g->staging[m + i] = (int32_t)ke;
            }
            g->staging[2 * m] = (int32_t)len;
            dsa__cu_up(g, &t, tile.ks, g->staging, (size_t)m * 8);
            dsa__cu_up(g, &t, tile.lens, g->staging + 2 * m, 4);
            dsa__cu_up(g, &t, tile.table, c->block_table, (size_t)blocks * 4);
            dsa__cu_up(g, &t, tile.q, a->q + row * H * W, (size_t)(m * H * W) * 4);
            if (sinks) dsa__cu_up(g, &t, tile.sinks, sinks, (size_t)H * 4);
            if (tile.call.counts) dsa__cu_up(g, &t, tile.counts, a->counts + row, (size_t)m * 4);
            if (a->what == DSA_ATTEND_LIST && a->n_indices > 0 && t.err == cudaSuccess)
                t.err = cudaMemcpy2DAsync(tile.indices, (size_t)a->n_indices * 4, a->indices + row * a->index_stride, (size_t)a->index_stride * 4,
                                          (size_t)a->n_indices * 4, (size_t)m, cudaMemcpyHostToDevice, g->stream);
            if (!fused) {
                dsa__cu_up(g, &t, tile.call.max, state->max + row * H, (size_t)(m * H) * 4);
                dsa__cu_up(g, &t, tile.call.sum, state->sum + row * H, (size_t)(m * H) * 4);
                dsa__cu_up(g, &t, tile.call.acc, state->out + row * H * dv, (size_t)(m * H * dv) * 4);
            }
            if (t.err == cudaSuccess) st = dsa__cu_attend_launch(&tile.call, g->stream);
            if (st != DSA_OK) break;
            dsa__cu_down(g, &t, state->out + row * H * dv, tile.call.acc, (size_t)(m * H * dv) * 4);
            if (!fused) {
                dsa__cu_down(g, &t, state->max + row * H, tile.call.max, (size_t)(m * H) * 4);
                dsa__cu_down(g, &t, state->sum + row * H, tile.call.sum, (size_t)(m * H) * 4);
            } else if (lse) {
                dsa__cu_down(g, &t, lse + row * H, tile.call.lse, (size_t)(m * H) * 4);
            }
        }
    }
    return run ? dsa__cu_leave(g, t, st) : st;
}

/* ---- the device --------------------------------------------------------------------------------------------- */
static void *dsa__cu_alloc(void *user, size_t bytes)
{
    dsa__cu *g = (dsa__cu *)user;
    dsa__cu_turn t = dsa__cu_enter(g);
    void *p = NULL;
    if (t.err == cudaSuccess && cudaMalloc(&p, bytes) != cudaSuccess) { p = NULL; (void)cudaGetLastError(); }
    if (t.before != g->device) (void)cudaSetDevice(t.before);
    return p;
}

static void dsa__cu_release(void *user, void *memory)
{
    dsa__cu *g = (dsa__cu *)user;
    dsa__cu_turn t = dsa__cu_enter(g);
    if (t.err == cudaSuccess) (void)cudaFree(memory);
    if (t.before != g->device) (void)cudaSetDevice(t.before);
}

static void *dsa__cu_malloc(void *user, size_t bytes) { (void)user; return malloc(bytes); }
static void dsa__cu_free(void *user, void *memory) { (void)user; free(memory); }

extern "C" void dsa_cuda_destroy(dsa_cuda *cuda)
{
    dsa__cu *g = (dsa__cu *)cuda;
    if (!g) return;
    if (g->scratch) dsa__cu_release(g, g->scratch);
    if (g->stream) {
        dsa__cu_turn t = dsa__cu_enter(g);
        if (t.err == cudaSuccess) (void)cudaStreamDestroy(g->stream);
        if (t.before != g->device) (void)cudaSetDevice(t.before);
    }
    g->host.release(g->host.user, g);
}

extern "C" dsa_status dsa_cuda_create(const dsa_cuda_desc *desc, dsa_cuda **cuda)
{
    dsa_cuda_desc d;
    dsa__cu *g;
    cudaFuncAttributes code;
    int n = 0, major = 0, minor = 0, sms = 0;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    if (!cuda || (d.allocator.alloc == NULL) != (d.allocator.release == NULL)) return DSA_ERR_NULL;
    if ((int)d.path < 0 || d.path > DSA_CUDA_HOPPER || d.device < 0) return DSA_ERR_ARGUMENT;
    if (!d.allocator.alloc) { d.allocator.alloc = dsa__cu_malloc; d.allocator.release = dsa__cu_free; }
    if (cudaGetDeviceCount(&n) != cudaSuccess || d.device >= n ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d.device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, d.device) != cudaSuccess ||
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, d.device) != cudaSuccess) {
        (void)cudaGetLastError();                        /* no driver, say: nothing that the program's own CUDA calls should find */
        return DSA_ERR_NO_DEVICE;
    }
    if (major < 8 || (d.path == DSA_CUDA_HOPPER && major != 9)) return DSA_ERR_NO_DEVICE;
    g = (dsa__cu *)d.allocator.alloc(d.allocator.user, sizeof *g + (2 * DSA__CU_HOST_ROWS + 1) * sizeof(int32_t));
    if (!g) return DSA_ERR_MEMORY;
    memset(g, 0, sizeof *g);
    g->staging = (int32_t *)(g + 1);
    g->host = d.allocator;
    g->device = d.device;
    g->capability = 10 * major + minor;
    g->n_sm = sms;
    g->path = d.path != DSA_CUDA_AUTO ? d.path : DSA_CUDA_REFERENCE;
    g->size = d.scratch ? d.scratch : DSA__CU_SCRATCH;
    g->hooks.allocator.alloc = dsa__cu_alloc;
    g->hooks.allocator.release = dsa__cu_release;
    g->hooks.allocator.user = g;
    g->hooks.append = dsa__cu_host_append;
    g->hooks.read = dsa__cu_host_read;
    g->hooks.score = dsa__cu_host_score;
    g->hooks.attend = dsa__cu_host_attend;
    {
        dsa__cu_turn t = dsa__cu_enter(g);
        if (t.err == cudaSuccess) t.err = cudaFuncGetAttributes(&code, dsa__cu_attend_reference);   /* is there code for this device? */
        if (t.err == cudaSuccess) t.err = cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking);
        (void)cudaGetLastError();
        if (t.before != g->device) (void)cudaSetDevice(t.before);
        if (t.err != cudaSuccess) { dsa_cuda_destroy(&g->hooks); return DSA_ERR_NO_DEVICE; }
    }
    g->scratch = (unsigned char *)dsa__cu_alloc(g, g->size);
    if (!g->scratch) { dsa_cuda_destroy(&g->hooks); return DSA_ERR_MEMORY; }
    *cuda = &g->hooks;
    return DSA_OK;
}

extern "C" dsa_cuda_path dsa_cuda_query_path(const dsa_cuda *cuda) { return cuda ? ((const dsa__cu *)cuda)->path : DSA_CUDA_AUTO; }

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
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ============================================================================================
   >>common                                   formats, pools of pages, batches
   ============================================================================================ */

#define DSA__CU_NONE (-INFINITY)

typedef struct dsa__cu {
    dsa_cuda hooks;                                      /* first: a dsa_cuda is one of these */
    int32_t device, n_sm, shared;                        /* shared: memory of a block, most */
    int32_t cluster;                                     /* blocks of the largest cluster: 16, or 0 */
    int32_t overlap;                                     /* kernels wait for those before them: programmatic dependent launch */
    dsa_cuda_path path;
    cudaStream_t stream;                                 /* of host-level calls */
    unsigned char *scratch;                              /* their operands, on the device */
    size_t size;
    int32_t *staging;                                    /* host [2 DSA__CU_HOST_ROWS + 1] */
    dsa_allocator host;
} dsa__cu;


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

typedef struct dsa__cu_seen { int32_t seq; int64_t len, visible; } dsa__cu_seen;

static __device__ __forceinline__ int64_t dsa__cu_clamp(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

static __device__ __forceinline__ dsa__cu_seen dsa__cu_row_of(const dsa__cu_batch &b, int64_t row)
{
    dsa__cu_seen r;
    int64_t begin, n_q = b.n_q;
    /* the last sequence that begins at or before the row: empty ones are passed over */
    if (b.first) {
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

/* Programmatic dependent launch: nothing before this reads what the launch before wrote. */
static __device__ __forceinline__ void dsa__cu_wait_launch(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* From here on the next launch may take places that become free. */
static __device__ __forceinline__ void dsa__cu_let_launch(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* ---- PTX ---------------------------------------------------------------------------------------- */
static __device__ __forceinline__ uint32_t dsa__cu_smem(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* A launch that may overlap the one before (its kernels call dsa__cu_wait_launch), in clusters of so many blocks. */
template <typename F> static cudaError_t dsa__cu_launch(F f, dim3 grid, int block, size_t smem, cudaStream_t stream, int overlap,
    int cluster, void **args)
{
    cudaLaunchConfig_t c = {};
    cudaLaunchAttribute at[2];
    cudaError_t err = smem > 48 * 1024 ? cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem) : cudaSuccess;
    if (err != cudaSuccess) return err;
    c.gridDim = grid; c.blockDim = dim3((unsigned)block); c.dynamicSmemBytes = smem; c.stream = stream;
    at[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    at[0].val.programmaticStreamSerializationAllowed = overlap;
    c.attrs = at;
    at[1].id = cudaLaunchAttributeClusterDimension;
    at[1].val.clusterDim.x = (unsigned)cluster; at[1].val.clusterDim.y = 1; at[1].val.clusterDim.z = 1;
    c.numAttrs = cluster > 1 ? 2 : overlap ? 1 : 0;
    return cudaLaunchKernelExC(&c, (const void *)f, args);
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
static __device__ __forceinline__ float dsa__cu_key_value(int32_t format, const unsigned char *p, int32_t d)
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
static __device__ __forceinline__ float dsa__cu_round_row(int32_t format, int32_t hadamard, int32_t D, float *x, unsigned char *y,
    uint32_t *shared)
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

/* Rows for one cache. slots: physical places; NULL: the last positions below each sequence's length. */
typedef struct dsa__cu_append {
    dsa__cu_pool pool;
    const void *rows;
    const int64_t *slots;
    int32_t index_key, bf16;
    int64_t n;
} dsa__cu_append;

/* dsa__cu_round_row for 128 channels in FP8 or INT8 by one warp, four channels a lane: butterflies at strides 1 and 2 within the lane, at
   4 .. 64 between lanes, the lower one of a pair adding and the upper one subtracting. *code: the lane's four bytes. */
static __device__ __forceinline__ float dsa__cu_round_128(int32_t format, int32_t hadamard, float (&x)[4], uint32_t *code)
{
    const int32_t lane = threadIdx.x & 31;
    const float norm = (float)(1.0 / sqrt(128.0));
    uint32_t most = 0, all = 0;
    float s, a;
    if (hadamard) {
        float y[4] = { __fadd_rn(x[0], x[1]), __fsub_rn(x[0], x[1]), __fadd_rn(x[2], x[3]), __fsub_rn(x[2], x[3]) };
        x[0] = __fadd_rn(y[0], y[2]); x[2] = __fsub_rn(y[0], y[2]);
        x[1] = __fadd_rn(y[1], y[3]); x[3] = __fsub_rn(y[1], y[3]);
#pragma unroll
        for (int step = 1; step < 32; step *= 2)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float other = __shfl_xor_sync(~0u, x[i], step);
                x[i] = lane & step ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
            }
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = __fmul_rn(x[i], norm);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t b = __float_as_uint(x[i]) & 0x7FFFFFFFu;
        all = b > all ? b : all;
        b = b > 0x7F800000u ? 0u : b;
        most = b > most ? b : most;
    }
    most = __reduce_max_sync(~0u, most);
    all = __reduce_max_sync(~0u, all);
    a = most >= 0x7F800000u ? 3.402823466e+38f : __uint_as_float(most);
    a = a > 1e-4f ? a : 1e-4f;
    s = format == DSA_FP8 ? dsa__cu_pow2_ceil(__fmul_rn(a, 1.0f / 448.0f)) : __fdiv_rn(a, 127.0f);
    *code = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        *code |= (format == DSA_FP8 ? dsa__cu_e4m3_code(__fdiv_rn(x[i], s)) : (uint32_t)dsa__cu_int8(x[i], s) & 0xFFu) << 8 * i;
    return format == DSA_INT8 && all > 0x7F800000u ? __uint_as_float(0x7FC00000u) : s;
}

/* One block stores one row. x [DSA_MAX_DIM_INDEX], shared [32]. */
static __device__ __forceinline__ void dsa__cu_append_row(const dsa__cu_append &a, const dsa__cu_batch &b, int64_t row, float *x,
    uint32_t *shared)
{
    const dsa__cu_pool &p = a.pool;
    const void *rows = a.rows;
    const int64_t *slots = a.slots, width = (int64_t)p.dim + p.dim_rope;
    const int32_t bf16 = a.bf16;
    int32_t page, offset, i, g, n;
    int nan;
    unsigned char *y, *scales;
    float s, v[4];
    /* the rows that decoding appends: a lane has four channels, on their way while their place is looked up */
    const int32_t lanes = a.index_key ? p.planar && p.dim == 128 ? 32 : 0 : p.format == DSA_FP8 && p.dim % 128 == 0 ? p.dim / 4 : 0;
    if ((int32_t)threadIdx.x < lanes) {
#pragma unroll
        for (i = 0; i < 4; i++) v[i] = dsa__cu_operand(rows, bf16, row * width + 4 * (int32_t)threadIdx.x + i);
    }
    if (slots) {
        int64_t slot = slots[row];
        if (slot < 0 || slot >= p.n_pages * p.page_size) return;
        page = (int32_t)(slot / p.page_size);
        offset = (int32_t)(slot % p.page_size);
    } else {
        dsa__cu_seen r = dsa__cu_row_of(b, row);
        page = dsa__cu_page_of(p, r.seq, r.visible - 1, &offset);
        if (page < 0) return;
    }
    y = dsa__cu_in(p, page, offset);
    if (a.index_key && lanes && ((uintptr_t)y & 3) == 0) {
        if (threadIdx.x < 32) {                          /* one warp: nobody waits for a barrier */
            uint32_t code;
            s = dsa__cu_round_128(p.format, p.hadamard, v, &code);
            *(uint32_t *)(y + 4 * threadIdx.x) = code;
            if (threadIdx.x == 0) dsa__cu_store_f32(dsa__cu_scale_in(p, page, offset), s);
        }
        return;
    }
    if (a.index_key) {
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
    if (lanes && ((uintptr_t)y & 3) == 0) {              /* a warp for every 128 channels */
        const int32_t begin = (int32_t)threadIdx.x / 32 * 128;
        for (g = begin; g < p.dim; g += 4 * (int32_t)blockDim.x) {
            uint32_t most = 0, code = 0;
#pragma unroll
            for (i = 0; g > begin && i < 4; i++) v[i] = dsa__cu_operand(rows, bf16, row * width + g + 4 * ((int32_t)threadIdx.x & 31) + i);
#pragma unroll
            for (i = 0; i < 4; i++) {
                const uint32_t m = __float_as_uint(v[i]) & 0x7FFFFFFFu;
                most = m <= 0x7F800000u && m > most ? m : most;
            }
            most = __reduce_max_sync(~0u, most);
            s = __fdiv_rn(most >= 0x7F800000u ? 3.402823466e+38f : __uint_as_float(most), 448.0f);
            s = dsa__cu_pow2_ceil(s > 1e-4f ? s : 1e-4f);
#pragma unroll
            for (i = 0; i < 4; i++) code |= dsa__cu_e4m3_code(__fdiv_rn(v[i], s)) << 8 * i;
            *(uint32_t *)(y + g + 4 * (threadIdx.x & 31)) = code;
            if ((threadIdx.x & 31) == 0) dsa__cu_store_f32(scales + g / 128 * 4, s);
        }
    } else for (g = 0; g < p.dim; g += 128) {
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
        if (index_key) y[i] = p.planar ? __fmul_rn(dsa__cu_key_value(p.format, row, i), s) : dsa__cu_key_value(p.format, row, i);
        else y[i] = dsa__cu_latent(p.format, p.dim, row, i);
    }
}

/* ============================================================================================
   >>index                                    queries of the indexer, index scores
   ============================================================================================ */

/* The keys that a row sees: [lo, hi). */
typedef struct dsa__cu_ranges {
    dsa__cu_batch batch;                                 /* lens NULL: columns of stored scores, [0, max_len) */
    const int32_t *ks, *ke;                              /* optional */
} dsa__cu_ranges;

static __device__ __forceinline__ int32_t dsa__cu_range(const dsa__cu_ranges &r, int64_t row, int64_t *lo, int64_t *hi)
{
    dsa__cu_seen of = { 0, r.batch.max_len, r.batch.max_len };
    if (r.batch.lens) of = dsa__cu_row_of(r.batch, row);
    *lo = 0;
    *hi = of.visible;
    if (r.ks) {
        *lo = dsa__cu_clamp(r.ks[row], 0, of.len);
        *hi = dsa__cu_clamp(r.ke[row], *lo, of.len);
    }
    return of.seq;
}

/* What the faster kernels want to know of a row instead of asking themselves. lo, hi: its range within n_cols and within its table; end:
   hi, or lo where nothing need be scored because at most `skip` keys are seen. */
/* [rows of a tile]; lo NULL: none are wanted */
typedef struct dsa__cu_bounds { int32_t *lo, *hi, *end, *seq; int64_t skip, n_cols; } dsa__cu_bounds;

static __device__ __forceinline__ void dsa__cu_bound_row(const dsa__cu_bounds &b, const dsa__cu_ranges &ranges, int64_t row0, int64_t row)
{
    int64_t lo, hi;
    int32_t seq = dsa__cu_range(ranges, row0 + row, &lo, &hi);
    if (lo > b.n_cols) lo = b.n_cols;
    if (hi > b.n_cols) hi = b.n_cols;
    b.lo[row] = (int32_t)lo;
    b.hi[row] = (int32_t)hi;
    if (b.end) b.end[row] = (int32_t)(hi - lo <= b.skip ? lo : hi);
    if (b.seq) b.seq[row] = seq;
}

/* Heads of the indexer in the form of the key format: x [n_rows, HI, D] in its elements, v [n_rows, HI] = w times the head's scale.
   q_type FP8: prepared already, only copied. With them, what the faster kernels want to know of the rows. */
typedef struct dsa__cu_queries {
    int32_t format, hadamard, D, n_heads, q_type;
    const void *q;
    const float *w;
    unsigned char *x;
    float *v;
    dsa__cu_bounds bounds;
    dsa__cu_ranges ranges;
    int64_t row0, n;                                     /* n heads, of rows from row0 on */
    int32_t per;                                         /* heads of a block; 0: only bounds are wanted, a thread does a row */
    int64_t n_blocks;
} dsa__cu_queries;

static __device__ __forceinline__ void dsa__cu_query_head(const dsa__cu_queries &Q, int64_t at, float *head, uint32_t *shared)
{
    const int32_t bytes = Q.format == DSA_F32 ? 4 : Q.format == DSA_BF16 ? 2 : 1, D = Q.D;
    float s;
    if (Q.bounds.lo && at % Q.n_heads == 0 && threadIdx.x == 0) dsa__cu_bound_row(Q.bounds, Q.ranges, Q.row0, at / Q.n_heads);
    if (Q.q_type == DSA_FP8) {
        for (int32_t i = (int32_t)threadIdx.x; i < D; i += (int32_t)blockDim.x) Q.x[at * D + i] = ((const unsigned char *)Q.q)[at * D + i];
        if (threadIdx.x == 0) Q.v[at] = Q.w[at];
        return;
    }
    for (int32_t i = (int32_t)threadIdx.x; i < D; i += (int32_t)blockDim.x)
        head[i] = dsa__cu_operand(Q.q, Q.q_type == DSA_BF16, at * D + i);
    __syncthreads();
    s = dsa__cu_round_row(Q.format, Q.hadamard, D, head, Q.x + at * D * bytes, shared);
    if (threadIdx.x == 0) Q.v[at] = __fmul_rn(Q.w[at], s);
}

/* The same operations for a head of 128 channels over planar keys by one warp, four channels a lane: butterflies at strides 1 and 2 within
   the lane, at 4 .. 64 between lanes, the lower one of a pair adding and the upper one subtracting. */
static __device__ __forceinline__ void dsa__cu_query_head_128(const dsa__cu_queries &Q, int64_t at)
{
    const int32_t lane = threadIdx.x & 31;
    uint32_t code;
    float x[4], s;
    if (Q.bounds.lo && at % Q.n_heads == 0 && lane == 0) dsa__cu_bound_row(Q.bounds, Q.ranges, Q.row0, at / Q.n_heads);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = dsa__cu_operand(Q.q, Q.q_type == DSA_BF16, at * 128 + 4 * lane + i);
    s = dsa__cu_round_128(Q.format, Q.hadamard, x, &code);
    *(uint32_t *)(Q.x + at * 128 + 4 * lane) = code;
    if (lane == 0) Q.v[at] = __fmul_rn(Q.w[at], s);
}

/* q of attention, f32, in bf16. */
typedef struct dsa__cu_convert { const float *q; __nv_bfloat16 *to; int64_t n; } dsa__cu_convert;

/* All that comes before scoring, in one launch: a block stores a row, rounds a head, or converts 1024 elements. */
static __global__ void __launch_bounds__(128) dsa__cu_begin(dsa__cu_batch b, dsa__cu_append latent, dsa__cu_append index,
    dsa__cu_queries queries, dsa__cu_convert convert)
{
    __shared__ float x[DSA_MAX_DIM_INDEX];
    __shared__ uint32_t shared[32];
    int64_t at = blockIdx.x;
    dsa__cu_wait_launch();                               /* what follows may count on all that was there before this launch */
    dsa__cu_let_launch();
    if (at < latent.n) { dsa__cu_append_row(latent, b, at, x, shared); return; }
    at -= latent.n;
    if (at < index.n) { dsa__cu_append_row(index, b, at, x, shared); return; }
    at -= index.n;
    if (at < queries.n_blocks) {
        if (queries.per == 1) {
            dsa__cu_query_head(queries, at, x, shared);
        } else if (queries.per) {
            at = at * queries.per + threadIdx.x / 32;
            if (at < queries.n) dsa__cu_query_head_128(queries, at);
        } else {
            at = at * 128 + threadIdx.x;
            if (at * queries.n_heads < queries.n && queries.bounds.lo) dsa__cu_bound_row(queries.bounds, queries.ranges, queries.row0, at);
        }
        return;
    }
    at = (at - queries.n_blocks) * 1024 + threadIdx.x;
    for (int i = 0; i < 8 && at < convert.n; i++, at += 128) convert.to[at] = __float2bfloat16_rn(convert.q[at]);
}

/* Rows of scores begin at -inf where a kernel writes only what is seen. */
static __global__ void __launch_bounds__(256) dsa__cu_fill(float *I, int64_t ldi, int64_t n_cols)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n_cols) I[blockIdx.y * ldi + i] = DSA__CU_NONE;
}

#define DSA__CU_TILE 32                                  /* keys of a block: one per lane */
#define DSA__CU_CHUNK_D 128                              /* channels in shared memory at a time */

/* I[t][s] = scale[s] Sum_h v[t,h] ReLU(<x[t,h], k_s>), the sums in the order of dsa__ref_score: d ascending, h ascending, the scale last.
   A block: one row, DSA__CU_TILE keys; 8 warps take a head each, a lane takes a key. fill: columns outside the row's range get -inf (else
   they are left alone). Rows that see at most `skip` keys are left alone. A page that the table does not have: -inf. */
template <int FORMAT>
static __global__ void __launch_bounds__(256) dsa__cu_score_reference(dsa__cu_pool p, dsa__cu_ranges ranges, int32_t n_heads,
    const unsigned char *x, const float *v, float *I, int64_t ldi, int64_t row0, int64_t n_cols, int32_t fill, int64_t skip)
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
                    k[i / n][i % n] = rows[i / n] ? dsa__cu_key_value(FORMAT, rows[i / n], d0 + i % n) : 0.0f;
            for (i = (int32_t)threadIdx.x; i < 8 * n; i += 256) {
                int32_t h = h0 + i / n;
                const unsigned char *head = x + ((size_t)(row - row0) * n_heads + h) * D * bytes;
                q[i / n][i % n] = h < n_heads ? dsa__cu_key_value(FORMAT, head, d0 + i % n) : 0.0f;
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

/* ---- tensor cores ---------------------------------------------------------------------------------- */
struct dsa__cu_index_args {
    const void          *q;
    const float         *w;
    const unsigned char *pages, *scales;             /* scales: of page 0 */
    int64_t              page_stride, scale_stride, n_pages;
    int32_t              page_size, page_shift;      /* shift: -1 if the size is no power of two */
    /* [n_seqs, table_ld]; outside [0, n_pages): a hole, its logits are -inf; NULL: block b is page b */
    const int32_t       *table;
    int64_t              table_ld;
    int32_t              table_rows, first;          /* row t is of sequence seq[t], or (first + t) / table_rows */
    const int32_t       *seq;
    const int32_t       *lo, *hi;                    /* row t scores keys [lo[t], hi[t]) and writes nothing else; NULL: 0, n */
    int32_t              n, rows, heads, dim, format, block_rows, chunk, chunks;
    float               *I;                          /* [rows, ldi] */
    int64_t              ldi;
    const int32_t       *lens;                       /* of a single row's sequence: its keys are asked for before the launch ahead ends */
    uint32_t            *clear;                      /* counters of the kernels that follow, set to 0 */
    int32_t              n_clear;
};

#define DSA__CU_HOLE 0xFFC0401Eu                         /* the scale of a key that is not there: a NaN of its own */

static __device__ __forceinline__ float dsa__cu_scaled(float sum, float scale)
{
    return __float_as_uint(scale) == DSA__CU_HOLE ? DSA__CU_NONE : sum * scale;
}

/* Where the table of a row's sequence begins. */
__device__ __forceinline__ int64_t dsa__cu_index_table(const dsa__cu_index_args &a, int32_t row)
{
    return a.table ? (int64_t) (a.seq ? a.seq[row] : (a.first + row) / a.table_rows) * a.table_ld : 0;
}

/* Address of key s, its scale's in *scale; NULL in a hole. */
__device__ __forceinline__ const unsigned char *dsa__cu_index_key(const dsa__cu_index_args &a, int64_t table_at, int32_t s,
    int32_t row_bytes, const float **scale)
{
    int32_t page = a.page_shift >= 0 ? s >> a.page_shift : s / a.page_size, at = s - page * a.page_size;
    if (a.table) page = __ldg(&a.table[table_at + page]);
    if (page < 0 || page >= a.n_pages) return NULL;
    *scale = (const float *) (a.scales + page * a.scale_stride + 4 * (int64_t) at);
    return a.pages + page * a.page_stride + (int64_t) at * row_bytes;
}

/* The keys of a single row on their way into the L2. They and the tables were there before the launch that this one overlaps, but for the
   row that it appends: what is asked for here is not read before that is stored. */
__device__ __forceinline__ void dsa__cu_index_ahead(const dsa__cu_index_args &a)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (!a.lens) return;
    const int64_t first = (int64_t) blockIdx.x * a.chunk, most = min(a.chunk, (int32_t) (196608 / gridDim.x));       /* half of the L2 */
    const int64_t end = min(first + most, (int64_t) min(__ldg(a.lens), a.n));
    for (int64_t block = first / a.page_size + threadIdx.x; block * a.page_size < end; block += blockDim.x) {
        const int64_t page = a.table ? __ldg(&a.table[block]) : block;
        if (page < 0 || page >= a.n_pages) continue;
        const int64_t begin = block * a.page_size, from = max(first - begin, (int64_t) 0);
        const int64_t n = min(end - begin, (int64_t) a.page_size) - from;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(a.pages + page * a.page_stride + from * 128),
            "r"((uint32_t) n * 128));
        const unsigned char *scales = a.scales + page * a.scale_stride + 4 * from;
        for (int64_t i = 0; i < 4 * n; i += 128) asm volatile("prefetch.global.L2 [%0];" :: "l"(scales + i));
    }
#endif
}

__device__ __forceinline__ void dsa__cu_index_clear(const dsa__cu_index_args &a)
{
    if (blockIdx.x == 0) for (int32_t i = threadIdx.x; i < a.n_clear; i += blockDim.x) a.clear[i] = 0;
}

/* Block b: which rows, which keys. Row blocks go fastest, so that the blocks that run together read the same keys. */
__device__ __forceinline__ bool dsa__cu_index_range(const dsa__cu_index_args &a, int32_t *row0, int32_t *n_rows, int32_t *s0, int32_t *s1)
{
    const int32_t row_blocks = (a.rows + a.block_rows - 1) / a.block_rows, part = blockIdx.x / row_blocks;
    *row0 = (int32_t) (blockIdx.x - part * row_blocks) * a.block_rows;
    *n_rows = min(a.block_rows, a.rows - *row0);
    int32_t lo = a.n, hi = 0;
    for (int32_t i = 0; i < *n_rows; i++) {
        lo = min(lo, a.lo ? __ldg(&a.lo[*row0 + i]) : 0);
        hi = max(hi, a.hi ? __ldg(&a.hi[*row0 + i]) : a.n);
    }
    const int64_t first = (int64_t) part * a.chunk;
    *s0 = (int32_t) max(first, (int64_t) lo);
    *s1 = (int32_t) min(min(first + a.chunk, (int64_t) hi), (int64_t) a.n);
    return *s0 < *s1;
}

__device__ __forceinline__ float dsa__cu_relu(float x)       /* keeps a NaN */
{
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- portable (sm_80): every e4m3 and int8 value is exact in bf16, products are exact in f32 ---- */

__device__ __forceinline__ uint32_t dsa__cu_bf16x2(float lo, float hi)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

/* Four e4m3 to two bf16 pairs: exponent and mantissa moved into place, then times 2^120 (exact, subnormals too). 0x7f would become 480: it
   is put right, rarely. */
__device__ __forceinline__ void dsa__cu_e4m3x4(uint32_t x, uint32_t *lo, uint32_t *hi)
{
    /* bytes 0 x0 0 x1: the value in the high byte of each half */
    const uint32_t a = __byte_perm(x, 0, 0x1404), b = __byte_perm(x, 0, 0x3424);
    const uint32_t sa = (a & 0x80008000u) | (a & 0x7f007f00u) >> 4, sb = (b & 0x80008000u) | (b & 0x7f007f00u) >> 4;
    asm("{\n.reg .b32 z;\nmov.b32 z, 0x80008000;\nfma.rn.bf16x2 %0, %2, %4, z;\nfma.rn.bf16x2 %1, %3, %4, z;\n}" : "=r"(*lo), "=r"(*hi)
        : "r"(sa), "r"(sb), "r"(0x7b807b80u));
    if ((((x & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) != 0) {
        if ((a & 0x7f00u) == 0x7f00u) *lo |= 0x7fc0u;
        if ((a & 0x7f000000u) == 0x7f000000u) *lo |= 0x7fc00000u;
        if ((b & 0x7f00u) == 0x7f00u) *hi |= 0x7fc0u;
        if ((b & 0x7f000000u) == 0x7f000000u) *hi |= 0x7fc00000u;
    }
}

template <int FORMAT> __device__ __forceinline__ float dsa__cu_index_value(const void *p, int64_t i)
{
    if (FORMAT == DSA_F32) return ((const float *) p)[i];
    if (FORMAT == DSA_BF16) return __uint_as_float((uint32_t) ((const uint16_t *) p)[i] << 16);
    if (FORMAT == DSA_FP8) return dsa__cu_e4m3(((const unsigned char *) p)[i]);
    return (float) ((const signed char *) p)[i];
}

/* d [16 keys, 8 heads] += a [16, 16] b [16, 8]. Not volatile: the compiler may order them. */
static __device__ __forceinline__ void dsa__cu_index_product(float *d, const uint32_t *a, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#define DSA__CU_INDEX_THREADS 128

/* A warp takes 32 keys as the A operand, straight from memory: lane c of a quad loads elements [c D/4, (c + 1) D/4) of its rows. That
   permutes the sum over d, which is free as long as the queries (B, in shared memory as fragments) are permuted alike. ReLU, weights and
   the sum over heads stay in registers; the quad is summed last. */
template <int FORMAT, int D>
__global__ void __launch_bounds__(DSA__CU_INDEX_THREADS, 4) dsa__cu_index_mma(dsa__cu_index_args a)
{
    constexpr int KS = D / 16, BYTES = FORMAT == DSA_BF16 ? 2 : 1, WORDS = D / 16 * BYTES;      /* WORDS: of one lane and row */
    extern __shared__ uint4 dsa__cu_index_shared[];
    dsa__cu_let_launch();
    dsa__cu_wait_launch();
    dsa__cu_index_clear(a);
    int32_t row0, n_rows, s0, s1;
    if (!dsa__cu_index_range(a, &row0, &n_rows, &s0, &s1)) return;
    const int32_t HI = a.heads, tiles = (HI + 7) / 8, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    uint4 *B = dsa__cu_index_shared;                                    /* [row][tile][KS / 2][lane] */
    float *w = (float *) (B + (int64_t) a.block_rows * tiles * (KS / 2) * 32);      /* [row][8 tiles] */
    for (int32_t i = threadIdx.x; i < n_rows * tiles * (KS / 2) * 32; i += DSA__CU_INDEX_THREADS) {
        const int32_t l = i & 31, ks = i / 32 % (KS / 2) * 2, tile = i / (16 * KS) % tiles, r = i / (16 * KS) / tiles,
            h = 8 * tile + (l >> 2);
        uint32_t b[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t at = ((int64_t) (row0 + r) * HI + h) * D + (l & 3) * (D / 4) + 4 * ks + 2 * j;
            b[j] = h < HI ? dsa__cu_bf16x2(dsa__cu_index_value<FORMAT>(a.q, at), dsa__cu_index_value<FORMAT>(a.q, at + 1)) : 0;
        }
        B[i] = make_uint4(b[0], b[1], b[2], b[3]);
    }
    for (int32_t i = threadIdx.x; i < n_rows * 8 * tiles; i += DSA__CU_INDEX_THREADS) {
        const int32_t r = i / (8 * tiles), h = i % (8 * tiles);
        w[i] = h < HI ? a.w[(int64_t) (row0 + r) * HI + h] : 0;
    }
    __syncthreads();
    const int64_t table_at = dsa__cu_index_table(a, row0);
    for (int32_t s = s0 + 32 * warp; s < s1; s += 32 * (DSA__CU_INDEX_THREADS / 32)) {
        uint32_t A[2][KS][4];
        float    scale[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {                                   /* rows g, g + 8 of both 16-key tiles */
            const int32_t key = s + g + 8 * i;
            const float *ps = NULL;
            const unsigned char *p = key < s1 ? dsa__cu_index_key(a, table_at, key, D * BYTES, &ps) : NULL;
            uint32_t x[WORDS];
            if (p) {
                p += c * (4 * WORDS);
                if (WORDS % 4 == 0 && ((uintptr_t) p & 15) == 0) {
#pragma unroll
                    for (int j = 0; j < WORDS / 4; j++) {
                        const uint4 v = __ldg((const uint4 *) p + j);
                        x[4 * j] = v.x; x[4 * j + 1] = v.y; x[4 * j + 2] = v.z; x[4 * j + 3] = v.w;
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < WORDS; j++) x[j] = __ldg((const uint32_t *) p + j);
                }
                scale[i] = FORMAT == DSA_BF16 ? 1.0f : __ldg(ps);
            } else {
#pragma unroll
                for (int j = 0; j < WORDS; j++) x[j] = 0;
                scale[i] = __uint_as_float(DSA__CU_HOLE);
            }
#pragma unroll
            for (int ks = 0; ks < KS; ks++) {
                uint32_t lo, hi;
                if (FORMAT == DSA_BF16) { lo = x[2 * ks % WORDS]; hi = x[(2 * ks + 1) % WORDS]; }
                else if (FORMAT == DSA_FP8) dsa__cu_e4m3x4(x[ks % WORDS], &lo, &hi);
                else {
                    const uint32_t v = x[ks % WORDS];
                    lo = dsa__cu_bf16x2((float) (int8_t) v, (float) (int8_t) (v >> 8));
                    hi = dsa__cu_bf16x2((float) (int8_t) (v >> 16), (float) (int8_t) (v >> 24));
                }
                A[i / 2][ks][i & 1] = lo;
                A[i / 2][ks][2 + (i & 1)] = hi;
            }
        }
        for (int32_t r = 0; r < n_rows; r++) {
            float sum[4] = { 0, 0, 0, 0 };
            const uint4 *b = B + r * tiles * (KS / 2) * 32 + lane;
            for (int32_t tile = 0; tile < tiles; tile++, b += (KS / 2) * 32) {
                float acc[2][4] = { { 0, 0, 0, 0 }, { 0, 0, 0, 0 } };
#pragma unroll
                for (int j = 0; j < KS / 2; j++) {
                    const uint4 v = b[32 * j];
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        float *d = acc[m];
                        uint32_t *x = A[m][2 * j], *y = A[m][2 * j + 1];
                        dsa__cu_index_product(d, x, v.x, v.y);
                        dsa__cu_index_product(d, y, v.z, v.w);
                    }
                }
                const float2 u = *(const float2 *) &w[r * 8 * tiles + 8 * tile + 2 * c];
                const int32_t h = 8 * tile + 2 * c;
                if (8 * tile + 8 <= HI || h + 1 < HI) {
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[i] = fmaf(u.y, dsa__cu_relu(acc[i / 2][2 * (i & 1) + 1]), fmaf(u.x,
                        dsa__cu_relu(acc[i / 2][2 * (i & 1)]), sum[i]));
                } else if (h < HI) {
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[i] = fmaf(u.x, dsa__cu_relu(acc[i / 2][2 * (i & 1)]), sum[i]);
                }
            }
            const int32_t lo = a.lo ? a.lo[row0 + r] : 0, hi = min(s1, a.hi ? a.hi[row0 + r] : a.n);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float v = sum[i];
                v += __shfl_xor_sync(~0u, v, 1);
                v += __shfl_xor_sync(~0u, v, 2);
                const int32_t key = s + g + 8 * i;
                if (c == i && key >= lo && key < hi) a.I[(row0 + r) * a.ldi + key] = dsa__cu_scaled(v, scale[i]);
            }
        }
    }
}

/* ---- Hopper (sm_90a): FP8 wgmma. Two warpgroups compute 64 keys each (A) against all heads of the block's rows (B, resident), a third
   one fetches keys. ---- */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define DSA__CU_HOPPER 1
#endif

#define DSA__CU_HOPPER_TILE 128

template <int N> struct dsa__cu_hopper_shape { static constexpr int stages = N > 64 ? 8 : 5; };

#ifdef DSA__CU_HOPPER
__device__ __forceinline__ void dsa__cu_mbar_wait(uint32_t bar, uint32_t phase)
{
    uint32_t ok = 0;
    while (!ok)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(ok)
            : "r"(bar), "r"(phase) : "memory");
}

__device__ __forceinline__ void dsa__cu_mbar_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}

/* A K-major tile with rows of 128 bytes in the 128-byte swizzle: 8 rows are 1024 bytes. */
__device__ __forceinline__ uint64_t dsa__cu_wgmma_desc(uint32_t smem)
{
    return (uint64_t) ((smem & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ void dsa__cu_wgmma_e4m3(float (&d)[32], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void dsa__cu_wgmma_e4m3(float (&d)[64], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(add));
}
/* HP: heads padded with weight 0 (64, 128); ROWS: rows of the block. Columns of B: [row][head]. */
template <int HP, int ROWS>
__global__ void __launch_bounds__(384, HP * ROWS > 64 ? 1 : 2) dsa__cu_index_hopper(dsa__cu_index_args a)
{
    constexpr int N = HP * ROWS, NU = N < 128 ? N : 128, U = N / NU, Q = NU / HP, S = dsa__cu_hopper_shape<N>::stages, LAG = S - 2;
    extern __shared__ unsigned char dsa__cu_hopper_raw[];
    __shared__ __align__(8) uint64_t full[S], empty[S];
    dsa__cu_let_launch();
    dsa__cu_index_ahead(a);
    dsa__cu_wait_launch();
    dsa__cu_index_clear(a);
    int32_t row0, n_rows, s0, s1;
    if (!dsa__cu_index_range(a, &row0, &n_rows, &s0, &s1)) return;
    unsigned char *B = (unsigned char *) (((uintptr_t) dsa__cu_hopper_raw + 1023) & ~(uintptr_t) 1023), *K = B + N * 128;
    float *scales = (float *) (K + S * DSA__CU_HOPPER_TILE * 128), *w = scales + S * DSA__CU_HOPPER_TILE;
    const int32_t tid = threadIdx.x, HI = a.heads;
    for (int32_t i = tid; i < N * 8; i += 384) {
        const int32_t col = i / 8, r = col / HP, h = col % HP;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (r < n_rows && h < HI) v = __ldg((const uint4 *) ((const unsigned char *) a.q + ((int64_t) (row0 + r) * HI + h) * 128) + i % 8);
        *(uint4 *) (B + col * 128 + ((i % 8 ^ col % 8) << 4)) = v;
    }
    for (int32_t i = tid; i < N; i += 384) w[i] = i / HP < n_rows && i % HP < HI ? a.w[(int64_t) (row0 + i / HP) * HI + i % HP] : 0;
    if (tid == 0) {
        for (int i = 0; i < S; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(dsa__cu_smem(&full[i])), "r"(128));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(dsa__cu_smem(&empty[i])), "r"(8));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const int32_t first = s0 / DSA__CU_HOPPER_TILE * DSA__CU_HOPPER_TILE,
        tiles = (s1 - first + DSA__CU_HOPPER_TILE - 1) / DSA__CU_HOPPER_TILE;

    if (tid >= 256) {                                                   /* the fetching warpgroup */
        if (N > 64) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        const int32_t t = tid - 256;
        const int64_t table_at = dsa__cu_index_table(a, row0);
        const int32_t lane = t & 31, warp0 = t & ~31;
        /* A thread looks up one key (a load of the table that all its other loads wait for, so one tile ahead) and copies a part of eight.
           */
        const unsigned char *p = NULL;
        const float *ps = NULL;
        if (first + t >= s0 && first + t < s1) p = dsa__cu_index_key(a, table_at, first + t, 128, &ps);
        for (int32_t i = 0; i < tiles + LAG; i++) {
            if (i < tiles) {
                const int32_t st = i % S;
                if (i >= S) dsa__cu_mbar_wait(dsa__cu_smem(&empty[st]), (uint32_t) (i / S - 1) & 1);
                const uint32_t to = dsa__cu_smem(K + st * DSA__CU_HOPPER_TILE * 128);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const int32_t r = 4 * j + lane / 8;
                    const unsigned char *from = (const unsigned char *) __shfl_sync(~0u, (unsigned long long) p, r);
                    const uint32_t at = to + (warp0 + r) * 128 + ((lane % 8 ^ r % 8) << 4);
                    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(at), "l"(from ? from + 16 * (lane % 8)
                        : a.pages), "r"(from ? 16 : 0) : "memory");
                }
                if (p) asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(dsa__cu_smem(&scales[st * DSA__CU_HOPPER_TILE + t])),
                    "l"(ps) : "memory");
                else scales[st * DSA__CU_HOPPER_TILE + t] = __uint_as_float(DSA__CU_HOLE);
                const int32_t s = first + (i + 1) * DSA__CU_HOPPER_TILE + t;
                p = NULL;
                if (s < s1) p = dsa__cu_index_key(a, table_at, s, 128, &ps);
            }
            asm volatile("cp.async.commit_group;" ::: "memory");
            if (i >= LAG) {
                asm volatile("cp.async.wait_group %0;" :: "n"(LAG) : "memory");
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                dsa__cu_mbar_arrive(dsa__cu_smem(&full[(i - LAG) % S]));
            }
        }
    } else {
        if (N > 64) asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        const int32_t group = tid >> 7, warp = tid >> 5 & 3, lane = tid & 31, g = lane >> 2, c = lane & 3;
        float u[ROWS][HP / 4];                                          /* the weights of this lane's columns */
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < HP / 4; j++) u[r][j] = w[r * HP + j / 2 * 8 + 2 * c + j % 2];
        int32_t lo[ROWS], hi[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            lo[r] = r < n_rows ? max(s0, a.lo ? a.lo[row0 + r] : 0) : 0;
            hi[r] = r < n_rows ? min(s1, a.hi ? a.hi[row0 + r] : a.n) : 0;
        }
        const uint64_t db = dsa__cu_wgmma_desc(dsa__cu_smem(B));
        float acc[U][NU / 2];
        for (int32_t i = 0; i < tiles; i++) {
            const int32_t st = i % S, s = first + i * DSA__CU_HOPPER_TILE + 64 * group + 16 * warp + g;
            dsa__cu_mbar_wait(dsa__cu_smem(&full[st]), (uint32_t) (i / S) & 1);
            const uint64_t da = dsa__cu_wgmma_desc(dsa__cu_smem(K + (st * DSA__CU_HOPPER_TILE + 64 * group) * 128));
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int n = 0; n < U; n++) {
#pragma unroll
                for (int ks = 0; ks < 4; ks++) dsa__cu_wgmma_e4m3(acc[n], da + 2 * ks, db + n * (NU * 128 >> 4) + 2 * ks, ks);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            }
            const float *sc = scales + st * DSA__CU_HOPPER_TILE + 64 * group + 16 * warp + g;
            const float sc0 = sc[0], sc1 = sc[8];
#pragma unroll
            for (int n = 0; n < U; n++) {
                if (U == 2 && n == 0) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                else asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
                for (int j = 0; j < NU / 2; j++) asm volatile("" : "+f"(acc[n][j]) :: "memory");
                if (n == U - 1) {
                    __syncwarp();
                    if (lane == 0) dsa__cu_mbar_arrive(dsa__cu_smem(&empty[st]));
                }
                float v[2 * Q];
#pragma unroll
                for (int r = 0; r < Q; r++) {
                    float x = 0, y = 0;
#pragma unroll
                    for (int j = 0; j < HP / 8; j++) {
                        const float *d = &acc[n][4 * (r * (HP / 8) + j)];
                        const float w0 = u[n * Q + r][2 * j], w1 = u[n * Q + r][2 * j + 1];
                        x = fmaf(w0, dsa__cu_relu(d[0]), x);
                        y = fmaf(w0, dsa__cu_relu(d[2]), y);
                        x = fmaf(w1, dsa__cu_relu(d[1]), x);
                        y = fmaf(w1, dsa__cu_relu(d[3]), y);
                    }
                    v[2 * r] = x;
                    v[2 * r + 1] = y;
                }
                /* Sum of the quad; each pair of lanes keeps one of the two keys, with two rows each lane one. */
                float z[Q];
#pragma unroll
                for (int r = 0; r < Q; r++) {
                    const float keep = c & 1 ? v[2 * r + 1] : v[2 * r], give = c & 1 ? v[2 * r] : v[2 * r + 1];
                    z[r] = keep + __shfl_xor_sync(~0u, give, 1);
                }
                const int32_t key = s + 8 * (c & 1);
                const float scale = c & 1 ? sc1 : sc0;
                if (Q == 2) {
                    const float keep = c & 2 ? z[Q - 1] : z[0], give = c & 2 ? z[0] : z[Q - 1];
                    const float sum = keep + __shfl_xor_sync(~0u, give, 2);
                    const int32_t r = n * 2 + (c >> 1), l = c & 2 ? lo[(n * Q + Q - 1) % ROWS] : lo[n * Q % ROWS], e = c & 2
                        ? hi[(n * Q + Q - 1) % ROWS] : hi[n * Q % ROWS];
                    if (key >= l && key < e) a.I[(row0 + r) * a.ldi + key] = dsa__cu_scaled(sum, scale);
                } else {
                    const float sum = z[0] + __shfl_xor_sync(~0u, z[0], 2);
                    if (c < 2 && key >= lo[n] && key < hi[n]) a.I[(row0 + n) * a.ldi + key] = dsa__cu_scaled(sum, scale);
                }
            }
        }
    }
}
#else
template <int HP, int ROWS> __global__ void dsa__cu_index_hopper(dsa__cu_index_args a) { }
#endif

template <int N> static constexpr size_t dsa__cu_hopper_bytes()
{
    return 1024 + N * 128 + dsa__cu_hopper_shape<N>::stages * 128 * 132 + N * 4;
}

#define DSA__CU_INDEX_SHARED (96 * 1024)       /* portable: queries of one block */

static inline cudaError_t dsa__cu_index_init(bool hopper)
{
    cudaError_t e = cudaSuccess;
#define DSA__CU_MAX(f, n) if (!e) e = cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) (n))
    DSA__CU_MAX((dsa__cu_index_mma<DSA_FP8, 128>), DSA__CU_INDEX_SHARED);
    DSA__CU_MAX((dsa__cu_index_mma<DSA_FP8, 64>), DSA__CU_INDEX_SHARED);
    DSA__CU_MAX((dsa__cu_index_mma<DSA_FP8, 32>), DSA__CU_INDEX_SHARED);
    DSA__CU_MAX((dsa__cu_index_mma<DSA_INT8, 128>), DSA__CU_INDEX_SHARED);
    DSA__CU_MAX((dsa__cu_index_mma<DSA_INT8, 64>), DSA__CU_INDEX_SHARED);
    DSA__CU_MAX((dsa__cu_index_mma<DSA_INT8, 32>), DSA__CU_INDEX_SHARED);
    DSA__CU_MAX((dsa__cu_index_mma<DSA_BF16, 128>), DSA__CU_INDEX_SHARED);
    DSA__CU_MAX((dsa__cu_index_mma<DSA_BF16, 64>), DSA__CU_INDEX_SHARED);
    DSA__CU_MAX((dsa__cu_index_mma<DSA_BF16, 32>), DSA__CU_INDEX_SHARED);
    if (hopper) {
        DSA__CU_MAX((dsa__cu_index_hopper<64, 1>), dsa__cu_hopper_bytes<64>());
        DSA__CU_MAX((dsa__cu_index_hopper<64, 2>), dsa__cu_hopper_bytes<128>());
        DSA__CU_MAX((dsa__cu_index_hopper<64, 4>), dsa__cu_hopper_bytes<256>());
        DSA__CU_MAX((dsa__cu_index_hopper<128, 1>), dsa__cu_hopper_bytes<128>());
        DSA__CU_MAX((dsa__cu_index_hopper<128, 2>), dsa__cu_hopper_bytes<256>());
    }
#undef DSA__CU_MAX
    return e;
}

/* Which shapes the two kernels take; dsa__cu_score_reference takes the others. */
static inline bool dsa__cu_index_takes(const dsa__cu_pool &p, int32_t heads)
{
    const int64_t bytes = p.dim * (p.format == DSA_BF16 ? 2 : 1);
    if (p.format == DSA_F32 || (p.dim != 32 && p.dim != 64 && p.dim != 128) || p.row_stride != (size_t) bytes) return false;
    if ((heads + 7) / 8 * 8 * (p.dim * 2 + 4) > DSA__CU_INDEX_SHARED) return false;
    if (((uintptr_t) p.data & 15) != 0 || (p.page_stride % 16 != 0 && p.n_pages > 1)) return false;
    return !p.planar || (((uintptr_t) p.scales & 3) == 0 && (p.scale_page_stride % 4 == 0 || p.n_pages <= 1));
}

/* Fills in block_rows, chunk, chunks, page_shift of `a` and scores. hopper: the device has compute capability 9.0 (false forces the
   portable path). */
static inline cudaError_t dsa__cu_index_launch(cudaStream_t stream, const dsa__cu *g, dsa__cu_index_args a)
{
    const bool hopper = g->path == DSA_CUDA_HOPPER;
    const int32_t n_sm = g->n_sm;
    if (a.rows < 1 || a.n < 1) return cudaSuccess;
    const bool fast = hopper && a.format == DSA_FP8 && a.dim == 128 && a.heads <= 128;
    const int32_t tiles = (a.heads + 7) / 8;
    a.page_shift = -1;
    for (int i = 0; i < 31; i++) if (a.page_size == 1 << i) a.page_shift = i;
    int32_t most = fast ? (a.heads <= 64 ? 4 : 2) : DSA__CU_INDEX_SHARED / (tiles * 8 * (a.dim * 2 + 4));
    if (a.seq) most = 1;
    if (most > 4) most = 4;
    if (most == 3) most = 2;
    /* the rows of a block share their keys */
    while (most > 1 && ((a.table && (a.table_rows % most || a.first % most)) || most >= 2 * a.rows)) most /= 2;
    a.block_rows = most;
    const int32_t blocks = (a.rows + most - 1) / most;
    const int32_t room = n_sm * (fast ? (most * (a.heads <= 64 ? 64 : 128) > 64 ? 1 : 2) : 4);
    /* One wave if there are few rows; otherwise pieces long enough to pay for the queries. */
    int64_t parts = room / blocks;
    const int64_t longest = fast && most >= 2 ? 8192 : 16384;
    if (parts < (a.n + longest - 1) / longest) parts = (a.n + longest - 1) / longest;
    int64_t chunk = ((a.n + parts - 1) / parts + 127) / 128 * 128;
    a.chunk = (int32_t) chunk;
    a.chunks = (int32_t) ((a.n + chunk - 1) / chunk);
    const uint32_t grid = (uint32_t) (blocks * a.chunks);
    void *args[1] = { &a };
    cudaError_t err;
    if (fast) {
#define DSA__CU_GO(HP, ROWS) dsa__cu_launch(dsa__cu_index_hopper<HP, ROWS>, dim3(grid), 384, \
        dsa__cu_hopper_bytes<HP * ROWS>(), stream, g->overlap, 1, args)
        if (a.heads <= 64) err = most == 4 ? DSA__CU_GO(64, 4) : most == 2 ? DSA__CU_GO(64, 2) : DSA__CU_GO(64, 1);
        else err = most == 2 ? DSA__CU_GO(128, 2) : DSA__CU_GO(128, 1);
#undef DSA__CU_GO
    } else {
        const size_t shared = (size_t) most * tiles * 8 * (a.dim * 2 + 4);
#define DSA__CU_GO2(F, D) dsa__cu_launch(dsa__cu_index_mma<F, D>, dim3(grid), DSA__CU_INDEX_THREADS, shared, stream, \
        g->overlap, 1, args)
#define DSA__CU_GO(F) (a.dim == 128 ? DSA__CU_GO2(F, 128) : a.dim == 64 ? DSA__CU_GO2(F, 64) : DSA__CU_GO2(F, 32))
        if (a.format == DSA_FP8) err = DSA__CU_GO(DSA_FP8);
        else if (a.format == DSA_INT8) err = DSA__CU_GO(DSA_INT8);
        else err = DSA__CU_GO(DSA_BF16);
#undef DSA__CU_GO
#undef DSA__CU_GO2
    }
    return err;
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
static __global__ void __launch_bounds__(1024) dsa__cu_select_reference(dsa__cu_ranges ranges, const float *scores, int64_t ld,
    int64_t row0, dsa__cu_selection sel)
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

/* ---- by a sampled threshold -------------------------------------------------------------------------- */
typedef unsigned long long dsa__u64;

#ifndef DSA__CU_TOPK_THREADS
#define DSA__CU_TOPK_THREADS 512
#endif
#define DSA__CU_TOPK_BINS (2048 / DSA__CU_TOPK_THREADS)
#define DSA__CU_TOPK_SAMPLE (4096 / DSA__CU_TOPK_THREADS)
#define DSA__CU_TOPK_WINDOW  (512 * 1024)   /* positions of one bitmap in shared memory: 64 KB */
#define DSA__CU_TOPK_CAP     12288          /* most candidates: 96 KB */
/* half of it where a block may not have all */
#define DSA__CU_TOPK_SHARED  (DSA__CU_TOPK_CAP * 8 + DSA__CU_TOPK_WINDOW / 8 + 2 * 2048 * 4)
#define DSA__CU_TOPK_RANKED  8192           /* most that are sorted by rank: 64 KB */

struct dsa__cu_topk_args {
    const float   *I;            /* [rows, ldi] */
    int64_t        ldi;
    const int32_t *lo, *hi;      /* row r selects among positions [lo[r], hi[r]); NULL: 0, n */
    int32_t        n, k, rows, splits, sample, group, cap, window;
    int32_t       *indices;      /* [rows, k] ascending by position, then -1 */
    float         *scores;       /* [rows, k] or NULL */
    dsa__u64      *candidates;   /* [rows, cap], only with splits > 1 */
    uint32_t      *counts;       /* [rows, 2]: candidates, blocks done; zero before the launch */
    int32_t       *found;        /* [rows] or NULL: how many were selected */
    int32_t        fallback;     /* rows of at most k positions take them all, unseen */
};

/* Larger score, larger key; 0: never selected. x + 0 makes -0 a +0. */
__device__ __forceinline__ uint32_t dsa__cu_key(float x)
{
    uint32_t b = __float_as_uint(x + 0.0f);
    uint32_t key = b ^ ((uint32_t) ((int32_t) b >> 31) | 0x80000000u);
    return x > -INFINITY ? key : 0u;
}

__device__ __forceinline__ dsa__u64 dsa__cu_rank(float x, uint32_t s)
{
    return (dsa__u64) dsa__cu_key(x) << 32 | (uint32_t) ~s;
}

/* Sum of v over the threads before this one; *total: over all. sums: 32 words. */
__device__ __forceinline__ uint32_t dsa__cu_scan(uint32_t v, uint32_t *sums, uint32_t *total)
{
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint32_t x = v, before = 0, all = 0;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) { uint32_t y = __shfl_up_sync(~0u, x, d); if (lane >= (uint32_t) d) x += y; }
    if (lane == 31) sums[warp] = x;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < DSA__CU_TOPK_THREADS / 32; i++) { uint32_t y = sums[i]; all += y; if ((uint32_t) i < warp) before += y; }
    __syncthreads();
    *total = all;
    return before + x - v;
}

/* Equal digits are the adversary of shared atomics (equal scores: 32 in one place): the first lane's digit is counted by a vote. */
__device__ __forceinline__ void dsa__cu_count(uint32_t *hist, uint32_t digit, bool on)
{
    const uint32_t active = __ballot_sync(~0u, on);
    if (!active) return;
    const int      leader = __ffs(active) - 1;
    const uint32_t first = __shfl_sync(~0u, digit, leader), same = __ballot_sync(~0u, on && digit == first);
    if ((int) (threadIdx.x & 31) == leader) atomicAdd(&hist[first], (uint32_t) __popc(same));
    if (on && digit != first) atomicAdd(&hist[digit], 1u);
}

/* The rank-th largest (from 1) of the c that `each` visits, or rather the smallest cut with count(c >= cut) >= rank whose low bits are not
   yet needed: digits of 11 bits from bit top down, and no further once a whole bin is taken. passes < 6 stops early with a cut that is too
   low. 0 and *found < rank if there are fewer than rank. */
template <class Each>
__device__ dsa__u64 dsa__cu_cut(Each each, uint32_t rank, int top, int passes, uint32_t *hist, uint32_t *sums,
    uint32_t *bin /* 3 shared words */)
{
    dsa__u64 prefix = 0;
    int shift = top;
    for (int p = 0; p < passes && shift; p++) {
        const int bits = min(11, shift);
        shift -= bits;
        for (int i = threadIdx.x; i < 2048; i += DSA__CU_TOPK_THREADS) hist[i] = 0;
        if (threadIdx.x == 0) bin[2] = 0;
        __syncthreads();
        each([&](dsa__u64 c, bool on) {
            if (p) on = on && c >> (shift + bits) == prefix;
            dsa__cu_count(hist, (uint32_t) (c >> shift) & ((1u << bits) - 1), on);
        });
        __syncthreads();
        uint32_t h[DSA__CU_TOPK_BINS], sum = 0, total;
#pragma unroll
        for (int i = 0; i < DSA__CU_TOPK_BINS; i++) { h[i] = hist[2047 - DSA__CU_TOPK_BINS * (int) threadIdx.x - i]; sum += h[i]; }
        uint32_t above = dsa__cu_scan(sum, sums, &total);
        if (total < rank) return 0;
        if (above < rank && rank <= above + sum) {
#pragma unroll
            for (int i = 0; i < DSA__CU_TOPK_BINS; i++) {
                if (above < rank && rank <= above + h[i]) { bin[0] = 2047 - DSA__CU_TOPK_BINS * threadIdx.x - i; bin[1] = rank - above;
                    bin[2] = h[i]; }
                above += h[i];
            }
        }
        __syncthreads();
        prefix = prefix << bits | bin[0];
        rank = bin[1];
        const uint32_t in_bin = bin[2];
        __syncthreads();
        if (in_bin == rank) break;
    }
    return prefix << shift;
}

/* Writes the selected positions in ascending order: `fill` sets the bits of one window in `bitmap`, every thread then counts and emits its
   own run of words. */
template <class Fill>
__device__ void dsa__cu_emit(Fill fill, int32_t lo, int32_t hi, int32_t window, int32_t k, const float *I, int32_t *indices, float *scores,
    int32_t *found, uint32_t *bitmap, uint32_t *sums)
{
    uint32_t done = 0;
    for (int32_t base = lo; base < hi; base += window) {
        /* odd: no bank conflicts */
        const int32_t words = (min(window, hi - base) + 31) / 32, mine = (words + DSA__CU_TOPK_THREADS - 1) / DSA__CU_TOPK_THREADS | 1;
        fill(base, words);
        __syncthreads();
        uint32_t count = 0, total;
        const int32_t w0 = (int32_t) threadIdx.x * mine, w1 = min(words, w0 + mine);
        for (int32_t w = w0; w < w1; w++) count += (uint32_t) __popc(bitmap[w]);
        uint32_t at = done + dsa__cu_scan(count, sums, &total);
        for (int32_t w = w0; w < w1; w++)
            for (uint32_t b = bitmap[w]; b; b &= b - 1) {
                const int32_t s = base + 32 * w + __ffs(b) - 1;
                indices[at] = s;
                if (scores) scores[at] = I[s];
                at++;
            }
        done += total;
        __syncthreads();
        if (hi - base <= window) break;
    }
    if (found && threadIdx.x == 0) *found = (int32_t) done;
    for (int32_t i = (int32_t) (done + threadIdx.x); i < k; i += DSA__CU_TOPK_THREADS) { indices[i] = -1;
        if (scores) scores[i] = -INFINITY; }
}

/* One row, cut over `splits` blocks. 1. A sample gives a threshold that some more than k scores should pass (rank + 4 sigma). 2. Each block
   lists what passes in its part. 3. The last block finds the exact cut among the candidates. Where the sample misled (too few, too many),
   that block counts digits over the whole row instead: at most six readings, whatever the scores. */
__global__ void __launch_bounds__(DSA__CU_TOPK_THREADS, 1024 / DSA__CU_TOPK_THREADS) dsa__cu_topk(dsa__cu_topk_args a)
{
    extern __shared__ dsa__u64 dsa__cu_topk_shared[];
    dsa__cu_wait_launch();                               /* bounds too are of a launch that may still run */
    dsa__u64 *cand = dsa__cu_topk_shared;
    uint32_t *bitmap = (uint32_t *) (cand + a.cap), *hist = bitmap + a.window / 32;
    __shared__ uint32_t sums[32], bin[4], n_cand, last;
    const int32_t row = blockIdx.x / a.splits, part = blockIdx.x % a.splits, k = a.k, tid = threadIdx.x;
    const int32_t lo = a.lo ? a.lo[row] : 0, hi = max(lo, a.hi ? a.hi[row] : a.n), n = hi - lo;
    const float *I = a.I + row * a.ldi;
    uint32_t threshold = 1;
    if (tid == 0) n_cand = 0;
    if (a.fallback && n <= k) {                                         /* the dense fallback (contracts): nothing was scored */
        for (int32_t i = tid; part == 0 && i < k; i += DSA__CU_TOPK_THREADS) a.indices[(int64_t) row * k + i] = i < n ? lo + i : -1;
        if (a.found && part == 0 && tid == 0) a.found[row] = n;
        return;
    }
    /* parts begin at 16-byte addresses */
    const int32_t skew = (int32_t) (((uintptr_t) (I + lo) >> 2) & 3), quads = (n + skew + 3) / 4;
    const int32_t q_part = ((quads + a.splits - 1) / a.splits + 7) & ~7, q0 = min(quads, part * q_part), q1 = min(quads, q0 + q_part);
    const float4 *I4 = (const float4 *) (I + lo - skew);
    if (a.splits > 1) for (int32_t q = q0 + 8 * tid; q < q1;
        q += 8 * DSA__CU_TOPK_THREADS) asm volatile("prefetch.global.L2 [%0];" :: "l"(I4 + q));
    if (n > a.cap && k < a.cap) {
        float x[DSA__CU_TOPK_SAMPLE];
        const double step = (double) n / a.sample;
        const float want = (float) ((double) k / step);
        const uint32_t rank = (uint32_t) (want + 4.0f * sqrtf(want) + 2.0f);
#pragma unroll
        for (int i = 0; i < DSA__CU_TOPK_SAMPLE; i++) {
            /* jitter, lest a period of the scores be met */
            const uint32_t j = (uint32_t) tid + DSA__CU_TOPK_THREADS * i, hash = (j * 2654435761u) >> 8;
            x[i] = j < (uint32_t) a.sample ? I[lo + min((int32_t) ((j + hash * (1.0f / 16777216.0f)) * step), n - 1)] : -INFINITY;
        }
        /* Scores crowd into few digits, and crowded digits are slow atomics. The least of the maxima of small groups lies a little under
           the threshold (in a group of s of m samples: at about the fraction ln(m / s) / s from the top); above it few samples remain, and
           their own range spreads them. */
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < DSA__CU_TOPK_SAMPLE; i++) most = max(most, dsa__cu_key(x[i]));
        uint32_t least = most;
        for (int d = 1; d < a.group; d *= 2) least = max(least, __shfl_xor_sync(~0u, least, d));
        least = __reduce_min_sync(~0u, least);
        most = __reduce_max_sync(~0u, most);
        if (tid % 32 == 0) { hist[tid / 32] = least; hist[32 + tid / 32] = most; }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < DSA__CU_TOPK_THREADS / 32; i++) { least = min(least, hist[i]); most = max(most, hist[32 + i]); }
        __syncthreads();
        least = max(least, 1u);
        dsa__u64 cut = 0;
        const dsa__u64 base = (dsa__u64) least << 32;
        if (most > least) cut = dsa__cu_cut([&](auto f) {
#pragma unroll
            for (int i = 0; i < DSA__CU_TOPK_SAMPLE; i++)
                if (DSA__CU_TOPK_THREADS * i < a.sample) { const uint32_t key = dsa__cu_key(x[i]); f((dsa__u64) (key - least) << 32,
                    key >= least); }
        }, rank, 64 - __clz(most - least), 1, hist, sums, bin);
        if (cut) cut += base;
        else cut = dsa__cu_cut([&](auto f) {                            /* too few above it */
#pragma unroll
            for (int i = 0; i < DSA__CU_TOPK_SAMPLE; i++)
                if (DSA__CU_TOPK_THREADS * i < a.sample) { const dsa__u64 c = dsa__cu_rank(x[i], 0); f(c, c >> 32 != 0); }
        }, rank, 64, 2, hist, sums, bin);
        threshold = max((uint32_t) (cut >> 32), 1u);
    }
    __syncthreads();

    for (int32_t q = q0 + tid; q < q1; q += 4 * DSA__CU_TOPK_THREADS) {
        float x[16];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t j = q + DSA__CU_TOPK_THREADS * i, s = 4 * j - skew;
            float4 v = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
            if (j < q1) {
                if (s >= 0 && s + 4 <= n) v = __ldg(&I4[j]);
                else {
                    if (s >= 0 && s < n) v.x = I[lo + s];
                    if (s + 1 >= 0 && s + 1 < n) v.y = I[lo + s + 1];
                    if (s + 2 >= 0 && s + 2 < n) v.z = I[lo + s + 2];
                    if (s + 3 >= 0 && s + 3 < n) v.w = I[lo + s + 3];
                }
            }
            x[4 * i] = v.x; x[4 * i + 1] = v.y; x[4 * i + 2] = v.z; x[4 * i + 3] = v.w;
        }
        uint32_t hits = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) hits |= (uint32_t) (dsa__cu_key(x[i]) >= threshold) << i;
        if (hits) {
            uint32_t at = atomicAdd(&n_cand, (uint32_t) __popc(hits));
#pragma unroll
            for (int i = 0; i < 16; i++)
                if (hits >> i & 1) {
                    if (at < (uint32_t) a.cap) cand[at] = dsa__cu_rank(x[i],
                        (uint32_t) (lo + 4 * (q + DSA__CU_TOPK_THREADS * (i / 4)) - skew + i % 4));
                    at++;
                }
        }
    }
    __syncthreads();
    uint32_t found = n_cand;

    if (a.splits > 1) {
        dsa__u64 *all = a.candidates + (int64_t) row * a.cap;
        if (tid == 0) bin[3] = atomicAdd(&a.counts[2 * row], found);
        __syncthreads();
        const uint32_t at = bin[3];
        for (uint32_t i = tid; i < min(found, (uint32_t) a.cap);
            i += DSA__CU_TOPK_THREADS) if (at + i < (uint32_t) a.cap) all[at + i] = cand[i];
        __threadfence();
        __syncthreads();
        if (tid == 0) last = atomicAdd(&a.counts[2 * row + 1], 1u) == (uint32_t) a.splits - 1;
        __syncthreads();
        if (!last) return;
        __threadfence();
        found = *(volatile uint32_t *) &a.counts[2 * row];
        for (uint32_t i = tid; i < min(found, (uint32_t) a.cap); i += DSA__CU_TOPK_THREADS) cand[i] = __ldcg(&all[i]);
        __syncthreads();
    }

    int32_t *indices = a.indices + (int64_t) row * k;
    float   *scores = a.scores ? a.scores + (int64_t) row * k : NULL;
    if (found <= (uint32_t) a.cap && (found >= (uint32_t) k || threshold == 1)) {
        dsa__u64 cut = 1ull << 32;
        if (found > (uint32_t) k) {
            uint32_t most = 0;
            for (uint32_t i = tid; i < found; i += DSA__CU_TOPK_THREADS) most = max(most, (uint32_t) (cand[i] >> 32));
            most = __reduce_max_sync(~0u, most);
            if (tid % 32 == 0) sums[tid / 32] = most;
            __syncthreads();
#pragma unroll
            for (int i = 0; i < DSA__CU_TOPK_THREADS / 32; i++) most = max(most, sums[i]);
            __syncthreads();
            const dsa__u64 base = (dsa__u64) threshold << 32;
            cut = base + dsa__cu_cut([&](auto f) {
                for (uint32_t i = 0; i < found; i += DSA__CU_TOPK_THREADS) { const bool on = i + tid < found; f(on ? cand[i + tid] - base
                    : 0, on); }
            }, (uint32_t) k, 64 - __clz(most - threshold), 6, hist, sums, bin);
        }
        dsa__cu_emit([&](int32_t base, int32_t words) {
            for (int32_t w = tid; w < words; w += DSA__CU_TOPK_THREADS) bitmap[w] = 0;
            __syncthreads();
            for (uint32_t i = tid; i < found; i += DSA__CU_TOPK_THREADS) {
                const dsa__u64 c = cand[i];
                const uint32_t s = ~(uint32_t) c - (uint32_t) base;
                if (c >= cut && s < 32u * (uint32_t) words) atomicOr(&bitmap[s / 32], 1u << (s % 32));
            }
        }, lo, hi, a.window, k, I, indices, scores, a.found ? a.found + row : NULL, bitmap, sums);
    } else {
        dsa__u64 cut = dsa__cu_cut([&](auto f) {
            for (int32_t s = 0; s < n; s += DSA__CU_TOPK_THREADS * 4) {
                float x[4];
#pragma unroll
                for (int i = 0; i < 4; i++) { const int32_t j = s + DSA__CU_TOPK_THREADS * i + tid; x[i] = j < n ? I[lo + j] : -INFINITY; }
#pragma unroll
                for (int i = 0; i < 4; i++) { const dsa__u64 c = dsa__cu_rank(x[i], (uint32_t) (lo + s + DSA__CU_TOPK_THREADS * i + tid));
                    f(c, c >> 32 != 0); }
            }
        }, (uint32_t) k, 64, 6, hist, sums, bin);
        if (cut < 1ull << 32) cut = 1ull << 32;
        dsa__cu_emit([&](int32_t base, int32_t words) {
            for (int32_t w = tid / 32; w < words; w += DSA__CU_TOPK_THREADS / 32) {
                const int32_t s = base + 32 * w + tid % 32;
                const uint32_t b = __ballot_sync(~0u, s < hi && dsa__cu_rank(s < hi ? I[s] : -INFINITY, (uint32_t) s) >= cut);
                if (tid % 32 == 0) bitmap[w] = b;
            }
        }, lo, hi, a.window, k, I, indices, scores, a.found ? a.found + row : NULL, bitmap, sums);
    }
}

/* Ascending positions to the total order: a bitonic sort of c in shared memory; -1 sorts last. k2: k rounded up to a power of two, at most
   DSA__CU_TOPK_RANKED. */
__global__ void __launch_bounds__(DSA__CU_TOPK_THREADS) dsa__cu_topk_by_rank(int32_t k, int32_t k2, int32_t *indices, float *scores)
{
    extern __shared__ dsa__u64 dsa__cu_topk_shared[];
    dsa__u64 *c = dsa__cu_topk_shared;
    indices += (int64_t) blockIdx.x * k;
    scores += (int64_t) blockIdx.x * k;
    for (int32_t i = threadIdx.x; i < k2; i += DSA__CU_TOPK_THREADS) c[i] = i < k && indices[i] >= 0 ? dsa__cu_rank(scores[i],
        (uint32_t) indices[i]) : 0;
    for (int32_t size = 2; size <= k2; size *= 2)
        for (int32_t d = size / 2; d; d /= 2) {
            __syncthreads();
            for (int32_t t = threadIdx.x; t < k2 / 2; t += DSA__CU_TOPK_THREADS) {
                const int32_t i = 2 * t - (t & (d - 1)), j = i + d;
                const dsa__u64 x = c[i], y = c[j];
                if ((x < y) == ((i & size) == 0)) { c[i] = y; c[j] = x; }
            }
        }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < k; i += DSA__CU_TOPK_THREADS) {
        const uint32_t key = (uint32_t) (c[i] >> 32);
        indices[i] = key ? (int32_t) ~(uint32_t) c[i] : -1;
        scores[i] = key ? __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key) : -INFINITY;
    }
}

/* ---- a few long rows (Hopper): a cluster of blocks holds a row in registers ---------------------------- */
/* What a launch less costs is what this saves: no list of candidates in global memory, no counters, no last block. Blocks tell each
   other what they found by st.async, which counts itself off at the receiver's barrier: no fence, no barrier of the cluster.
   1. Groups of about n / k scores: the least of their maxima has at least k scores at or above it. 2. A histogram of the keys from there
   to the largest, 2048 bins of equal width: each block adds up its share of the bins, and sends the sums to all. 3. The few keys of the
   bin with the cut go to all, who find the cut and know how many each block selects; if there are many, that bin becomes 2048 bins. */
#define DSA__CU_ROW_MOST (16 * 1024 * 16 - 6)             /* positions, the first at any place within 16 bytes */
#define DSA__CU_ROW_SHORT (16 * 512 * 20 - 6)
#define DSA__CU_ROW_LIST 64                              /* most keys of the cut's bin that are listed */

struct dsa__cu_row_args {
    const float   *I;
    int64_t        ldi;
    const int32_t *lo, *hi;                              /* NULL: ks, ke */
    const int32_t *ks, *ke;                              /* NULL: 0, n */
    int32_t        n, k, fallback;
    int32_t       *indices;
    float         *scores;
    int32_t       *found;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
static __device__ __forceinline__ uint32_t dsa__cu_remote(uint32_t at, uint32_t rank)
{
    uint32_t to;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(at), "r"(rank));
    return to;
}

static __device__ __forceinline__ void dsa__cu_send16(uint32_t to, uint4 v, uint32_t bar)
{
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" :: "r"(to), "r"(v.x),
        "r"(v.y), "r"(v.z), "r"(v.w), "r"(bar) : "memory");
}

/* What the other blocks of the cluster send: `bytes` in each turn. */
static __device__ __forceinline__ void dsa__cu_expect(uint32_t bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}

/* The acquire is the cluster's: the stores are remote ones. */
static __device__ __forceinline__ void dsa__cu_receive(uint32_t bar, uint32_t phase)
{
    uint32_t ok = 0;
#ifdef DSA__CU_BOUNDED
    uint32_t spin = 0;
#endif
    while (!ok) {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(ok) : "r"(bar), "r"(phase) : "memory");
#ifdef DSA__CU_BOUNDED
        if (++spin > 2000000) __trap();
#endif
    }
}

/* C blocks of T threads, ITEMS scores of a thread. */
template <int C, int ITEMS, int T>
__global__ void __launch_bounds__(T, 1) dsa__cu_topk_row(dsa__cu_row_args a)
{
    constexpr int Q = ITEMS / 4, BINS = 2048, OWN = BINS / C, L = DSA__CU_ROW_LIST;
    __shared__ __align__(16) uint32_t hist[BINS], part[BINS / 2], owned[OWN], whole[BINS], lists[C][4 + L], mine[4 + L];
    __shared__ __align__(16) uint4 ranges[C];
    __shared__ __align__(8) uint64_t bars[4];
    __shared__ uint32_t sums[32], least[32], most[32], n_groups, bin[3], cut[4], compact[L];
    const int32_t tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const uint32_t rank = blockIdx.x % C;
    const int64_t row = blockIdx.x / C;
    const uint32_t bar = dsa__cu_smem(bars);
    const int32_t k = a.k;
    dsa__cu_let_launch();
    if (tid == 0) {
        for (int i = 0; i < 4; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(bar + 8 * i) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        dsa__cu_expect(bar, 16 * C);
        dsa__cu_expect(bar + 8, BINS * 2);
        dsa__cu_expect(bar + 16, BINS * 4);
        dsa__cu_expect(bar + 24, 4 * (4 + L) * C);
        n_groups = 0;
        cut[0] = cut[1] = cut[2] = cut[3] = 0;
    }
    for (int i = tid; i < BINS; i += T) hist[i] = 0;
    __syncthreads();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    dsa__cu_wait_launch();
    int32_t lo = 0, hi = a.n;
    if (a.lo) { lo = a.lo[row]; hi = a.hi[row]; }
    else if (a.ks) { lo = min(max(a.ks[row], 0), a.n); hi = min(max(a.ke[row], lo), a.n); }
    hi = max(lo, hi);
    const int32_t n = hi - lo;
    int32_t *indices = a.indices + row * k;
    float *scores = a.scores ? a.scores + row * k : NULL;
    if (a.fallback && n <= k) {                          /* the dense fallback (contracts): nothing was scored */
        for (int32_t i = (int32_t) rank * T + tid; i < k; i += C * T) indices[i] = i < n ? lo + i : -1;
        if (a.found && rank == 0 && tid == 0) a.found[row] = n;
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
        return;
    }
    const float *I = a.I + row * a.ldi + lo;
    const int32_t skew = (int32_t) (((uintptr_t) I >> 2) & 3), quads = (n + skew + 3) / 4, per = (quads + C - 1) / C;
    const int32_t q0 = min(quads, (int32_t) rank * per), q1 = min(quads, q0 + per);
    const float4 *I4 = (const float4 *) (I - skew);
    uint32_t key[ITEMS];
#pragma unroll
    for (int i = 0; i < Q; i++) {
        const int32_t j = q0 + tid + T * i, s = 4 * j - skew;
        float4 v = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        if (j < q1) {
            if (s >= 0 && s + 4 <= n) v = __ldcg(&I4[j]);
            else {
                if (s >= 0 && s < n) v.x = I[s];
                if (s + 1 >= 0 && s + 1 < n) v.y = I[s + 1];
                if (s + 2 >= 0 && s + 2 < n) v.z = I[s + 2];
                if (s + 3 >= 0 && s + 3 < n) v.w = I[s + 3];
            }
        }
        key[4 * i] = dsa__cu_key(v.x); key[4 * i + 1] = dsa__cu_key(v.y); key[4 * i + 2] = dsa__cu_key(v.z);
        key[4 * i + 3] = dsa__cu_key(v.w);
    }

    {   /* groups of a power of two of neighbouring threads; those with nothing do not count */
        int32_t width = 1;
        while (width < 32 && (int64_t) C * min(per, T) / (2 * width) >= k) width *= 2;
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) top = max(top, key[i]);
        uint32_t low = top;
        int on = q0 + tid < q1;
        for (int d = 1; d < width; d *= 2) { low = max(low, __shfl_xor_sync(~0u, low, d)); on |= __shfl_xor_sync(~0u, on, d); }
        low = __reduce_min_sync(~0u, on ? low : ~0u);
        top = __reduce_max_sync(~0u, top);
        const uint32_t groups = (uint32_t) __popc(__ballot_sync(~0u, on && (lane & (width - 1)) == 0));
        if (lane == 0) { least[warp] = low; most[warp] = top; if (groups) atomicAdd(&n_groups, groups); }
        __syncthreads();
        if (warp == 0) {
            low = __reduce_min_sync(~0u, lane < T / 32 ? least[lane] : ~0u);
            top = __reduce_max_sync(~0u, lane < T / 32 ? most[lane] : 0u);
        }
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");          /* all barriers are there */
        if (tid < C) dsa__cu_send16(dsa__cu_remote(dsa__cu_smem(&ranges[rank]), (uint32_t) tid), make_uint4(low, top, n_groups, 0),
            dsa__cu_remote(bar, (uint32_t) tid));
    }
    dsa__cu_receive(bar, 0);
    uint32_t from, to, edge;
    {
        const uint4 r = lane < C ? ranges[lane] : make_uint4(~0u, 0, 0, 0);
        from = __reduce_min_sync(~0u, r.x);
        to = __reduce_max_sync(~0u, r.y);
        from = __reduce_add_sync(~0u, r.z) < (uint32_t) k || from == 0 ? 1u : from;
    }
    /* Selected is key > cut, and of key == cut the first `equal`. */
    uint32_t need = (uint32_t) k, equal = 0, cut_key = 0, listed = 0;
    for (uint32_t turn = 0; ; turn ^= 1) {
        if (from > to) { edge = 0; break; }              /* nothing can be selected */
        const int shift = max(0, 21 - __clz(to - from));
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (key[i] >= from && key[i] <= to) atomicAdd(&hist[(key[i] - from) >> shift], 1u);
        __syncthreads();
        for (int i = tid; i < C * (OWN / 8); i += T) {   /* 8 bins in 16 bytes: a block has at most 65535 keys */
            const uint32_t dest = (uint32_t) i / (OWN / 8), piece = (uint32_t) i % (OWN / 8);
            const uint4 x = *(const uint4 *) &hist[dest * OWN + 8 * piece], y = *(const uint4 *) &hist[dest * OWN + 8 * piece + 4];
            dsa__cu_send16(dsa__cu_remote(dsa__cu_smem(&part[rank * (OWN / 2) + 4 * piece]), dest),
                make_uint4(x.x | x.y << 16, x.z | x.w << 16, y.x | y.y << 16, y.z | y.w << 16), dsa__cu_remote(bar + 8, dest));
        }
        dsa__cu_receive(bar + 8, turn);
        if (tid == 0) dsa__cu_expect(bar + 8, BINS * 2);
        if (tid < OWN) {
            uint32_t sum = 0;
#pragma unroll
            for (int c = 0; c < C; c++) sum += part[c * (OWN / 2) + tid / 2] >> (tid % 2 * 16) & 0xFFFFu;
            owned[tid] = sum;
        }
        __syncthreads();
        for (int i = tid; i < BINS; i += T) hist[i] = 0; /* for a next turn */
        for (int i = tid; i < C * (OWN / 4); i += T) {
            const uint32_t dest = (uint32_t) i / (OWN / 4), at = (uint32_t) i % (OWN / 4) * 4;
            dsa__cu_send16(dsa__cu_remote(dsa__cu_smem(&whole[rank * OWN + at]), dest), *(const uint4 *) &owned[at],
                dsa__cu_remote(bar + 16, dest));
        }
        dsa__cu_receive(bar + 16, turn);
        if (tid == 0) dsa__cu_expect(bar + 16, BINS * 4);
        {   /* the bin with the cut: bins in descending order, several of a thread */
            constexpr int EACH = BINS / T;
            uint32_t h[EACH], x = 0, sum, above, total;
#pragma unroll
            for (int i = 0; i < EACH; i++) { h[i] = whole[BINS - 1 - EACH * tid - i]; x += h[i]; }
            sum = x;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) { const uint32_t y = __shfl_up_sync(~0u, x, d); if (lane >= d) x += y; }
            if (lane == 31) sums[warp] = x;
            __syncthreads();
            const uint32_t other = lane < T / 32 ? sums[lane] : 0;
            above = x - sum + __reduce_add_sync(~0u, lane < warp ? other : 0);
            total = __reduce_add_sync(~0u, other);
            if (total < need) { edge = 0; break; }       /* fewer than k: all of them (the same in all threads) */
            if (above < need && need <= above + sum) {
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    if (above < need && need <= above + h[i]) {
                        bin[0] = (uint32_t) (BINS - 1 - EACH * tid - i);
                        bin[1] = need - above;
                        bin[2] = h[i];
                    }
                    above += h[i];
                }
            }
            __syncthreads();
        }
        need = bin[1];
        from += bin[0] << shift;
        to = min(to, from + ((1u << shift) - 1));
        if (bin[2] == need) { cut_key = edge = from - 1; break; }
        if (shift == 0) { cut_key = edge = from; equal = need; listed = 1; break; }
        if (bin[2] <= L) { edge = to; listed = 2; break; }
    }

    {   /* what each block has above the bin and in it */
        uint32_t count = 0;                              /* above | in << 16 */
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            count += key[i] > edge;
            if (listed && key[i] >= from && key[i] <= to) {
                count += 0x10000u;
                if (listed == 2) mine[4 + atomicAdd(&cut[1], 1u)] = key[i];
            }
        }
        count = __reduce_add_sync(~0u, count);
        if (lane == 0 && count) atomicAdd(&cut[0], count);
        __syncthreads();
        for (int i = tid; i < C * (1 + L / 4); i += T) {
            const uint32_t dest = (uint32_t) i / (1 + L / 4), piece = (uint32_t) i % (1 + L / 4);
            const uint4 v = piece ? *(const uint4 *) &mine[4 * piece] : make_uint4(cut[0] & 0xFFFFu, cut[0] >> 16, 0, 0);
            dsa__cu_send16(dsa__cu_remote(dsa__cu_smem(&lists[rank][4 * piece]), dest), v, dsa__cu_remote(bar + 24, dest));
        }
        dsa__cu_receive(bar + 24, 0);
    }
    /* each warp: of the blocks before this one, and of all: above, equal */
    const uint32_t has_above = lane < C ? lists[lane][0] : 0, has_in = lane < C ? lists[lane][1] : 0;
    uint32_t above = has_above, same = listed == 1 ? has_in : 0;
    if (listed == 2) {
        uint32_t at = has_in, before;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) { const uint32_t y = __shfl_up_sync(~0u, at, d); if (lane >= d) at += y; }
        before = at - has_in;
        if (warp < C) {                                  /* warp w moves block w's keys together */
            const uint32_t b = __shfl_sync(~0u, before, warp), m = __shfl_sync(~0u, has_in, warp);
            for (uint32_t i = lane; i < m; i += 32) compact[b + i] = lists[warp][4 + i];
        }
        __syncthreads();
        const uint32_t all = __shfl_sync(~0u, at, 31);
        for (uint32_t i = tid; i < all; i += T) {
            const uint32_t x = compact[i];
            uint32_t greater = 0, level = 0;
            for (uint32_t j = 0; j < all; j++) { greater += compact[j] > x; level += compact[j] == x; }
            if (greater < need && need <= greater + level) { cut[2] = x; cut[3] = need - greater; }
        }
        __syncthreads();
        cut_key = cut[2];
        equal = cut[3];
        for (uint32_t i = before; i < at; i++) { above += compact[i] > cut_key; same += compact[i] == cut_key; }
    }
    const uint32_t above_all = __reduce_add_sync(~0u, above), same_all = __reduce_add_sync(~0u, same);
    const uint32_t above0 = __reduce_add_sync(~0u, lane < rank ? above : 0), same0 = __reduce_add_sync(~0u, lane < rank ? same : 0);
    const uint32_t found = above_all + min(same_all, equal);

    /* A bit for each position of the block, set by few; then a thread has a word of them. */
    constexpr int WORDS = ITEMS * T / 32;
    uint32_t *const above_bits = hist, *const same_bits = hist + WORDS;
    static_assert(2 * WORDS <= BINS && WORDS <= T && C <= T / 32, "the bits lie over the histogram");
#pragma unroll
    for (int i = 0; i < Q; i++) {
        uint32_t above_4 = 0, same_4 = 0;
        const int32_t j = tid + T * i;
#pragma unroll
        for (int b = 0; b < 4; b++) {
            above_4 |= (uint32_t) (key[4 * i + b] > cut_key) << b;
            same_4 |= (uint32_t) (key[4 * i + b] == cut_key) << b;
        }
        if (above_4) atomicOr(&above_bits[j / 8], above_4 << (j % 8 * 4));
        if (equal && same_4) atomicOr(&same_bits[j / 8], same_4 << (j % 8 * 4));
    }
    __syncthreads();
    if (tid < WORDS) {                                   /* whole warps */
        const uint32_t x = above_bits[tid], y = same_bits[tid], c = (uint32_t) __popc(x) | (uint32_t) __popc(y) << 16;
        uint32_t at = c;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) { const uint32_t o = __shfl_up_sync(~0u, at, d); if (lane >= d) at += o; }
        if (lane == 31) sums[warp] = at;
        asm volatile("bar.sync 1, %0;" :: "n"(WORDS) : "memory");
        at += __reduce_add_sync(~0u, lane < warp ? sums[lane] : 0) - c;
        uint32_t above_at = above0 + (at & 0xFFFFu), same_at = same0 + (at >> 16);
        for (uint32_t rest = x | y; rest; rest &= rest - 1) {
            const uint32_t bit = (uint32_t) __ffs(rest) - 1;
            const int32_t s = 4 * q0 - skew + 32 * tid + (int32_t) bit;
            const bool is_above = x >> bit & 1;
            if (is_above || same_at < equal) {
                indices[above_at + min(same_at, equal)] = lo + s;
                if (scores) scores[above_at + min(same_at, equal)] = I[s];
            }
            above_at += is_above;
            same_at += !is_above;
        }
    }
    for (uint32_t i = found + rank * T + tid; i < (uint32_t) k; i += C * T) { indices[i] = -1; if (scores) scores[i] = -INFINITY; }
    if (a.found && rank == 0 && tid == 0) a.found[row] = (int32_t) found;
}
#else
template <int C, int ITEMS, int T> __global__ void dsa__cu_topk_row(dsa__cu_row_args a) { (void) a; }
#endif

struct dsa__cu_topk_plan { int32_t splits, sample, group, cap, window; size_t shared, bytes, count_bytes; };

static inline dsa__cu_topk_plan dsa__cu_topk_prepare(const dsa__cu *g, int32_t rows, int32_t n, int32_t k)
{
    const int32_t n_sm = g->n_sm, most = g->shared < DSA__CU_TOPK_SHARED ? DSA__CU_TOPK_CAP / 2 : DSA__CU_TOPK_CAP;
    const int32_t window = g->shared < DSA__CU_TOPK_SHARED ? DSA__CU_TOPK_WINDOW / 2 : DSA__CU_TOPK_WINDOW;
    if (n < 1) n = 1;
    dsa__cu_topk_plan p;
    p.sample = n > 256 * 1024 ? 4096 : 2048;
    const double step = (double) n / p.sample, want = k / step, rank = want + 4 * sqrt(want) + 2;
    p.group = 16;
    for (; p.group > 1; p.group /= 2) {
        const double s = (double) p.sample / DSA__CU_TOPK_THREADS * p.group;
        if (log(p.sample / s) / s >= 1.5 * rank / p.sample) break;
    }
    double cap = n < 8192 ? n : (rank + 5 * sqrt(rank) + 2) * step;
    if (cap < k + 64) cap = k + 64;
    if (cap < 4096) cap = 4096;
    if (cap > most) cap = most;
    p.cap = ((int32_t) cap + 255) / 256 * 256;
    p.window = n < window ? (n + 127) / 128 * 128 : window;
    if (p.window < 128) p.window = 128;
    p.splits = (2 * n_sm) / (rows > 0 ? rows : 1);
    if (p.splits > n / 4096) p.splits = n / 4096;
    if (p.splits > 128) p.splits = 128;
    if (p.splits < 1) p.splits = 1;
    p.shared = (size_t) p.cap * 8 + (size_t) p.window / 8 + 2048 * 4;
    p.count_bytes = p.splits > 1 ? ((size_t) rows * 8 + 255) / 256 * 256 : 0;
    p.bytes = p.splits > 1 ? p.count_bytes + (size_t) rows * p.cap * 8 : 0;
    return p;
}

/* Bytes that any number of rows up to `rows` need: most where as many as can be are still split, 2 blocks each. */
static inline size_t dsa__cu_topk_most(const dsa__cu *g, int64_t rows, int64_t n, int64_t k)
{
    const int64_t split = rows < g->n_sm ? rows : g->n_sm;
    return dsa__cu_topk_prepare(g, (int32_t) split, (int32_t) n, (int32_t) k).bytes;
}

/* Once per device, before any capture. */
static inline cudaError_t dsa__cu_topk_init(dsa__cu *g)
{
    if (g->path == DSA_CUDA_HOPPER) {                    /* 16 blocks of a cluster are more than every device promises */
        cudaLaunchConfig_t c = {};
        cudaLaunchAttribute at;
        int n = 0;
        at.id = cudaLaunchAttributeClusterDimension;
        at.val.clusterDim.x = 16; at.val.clusterDim.y = 1; at.val.clusterDim.z = 1;
        c.gridDim = dim3(16); c.blockDim = dim3(1024); c.attrs = &at; c.numAttrs = 1;
        if (cudaFuncSetAttribute(dsa__cu_topk_row<16, 20, 512>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
            cudaFuncSetAttribute(dsa__cu_topk_row<16, 16, 1024>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
            cudaOccupancyMaxActiveClusters(&n, dsa__cu_topk_row<16, 16, 1024>, &c) == cudaSuccess && n > 0) g->cluster = 16;
        (void) cudaGetLastError();
    }
    cudaError_t e = cudaFuncSetAttribute(dsa__cu_topk, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         g->shared < DSA__CU_TOPK_SHARED ? DSA__CU_TOPK_SHARED / 2 : DSA__CU_TOPK_SHARED);
    return e ? e : cudaFuncSetAttribute(dsa__cu_topk_by_rank, cudaFuncAttributeMaxDynamicSharedMemorySize, DSA__CU_TOPK_RANKED * 8);
}

/* Which selections go to clusters; the plan's workspace is not needed then. */
static inline bool dsa__cu_topk_is_row(const dsa__cu *g, int64_t rows, int64_t n)
{
    return g->cluster == 16 && rows * g->cluster <= g->n_sm && n >= 8192 && n <= DSA__CU_ROW_MOST;
}

static cudaError_t dsa__cu_topk_row_launch(cudaStream_t stream, const dsa__cu *g, dsa__cu_row_args a, int32_t rows)
{
    void *args[1] = { &a };
    const dim3 grid((unsigned) (rows * 16));
    if (a.n <= DSA__CU_ROW_SHORT) return dsa__cu_launch(dsa__cu_topk_row<16, 20, 512>, grid, 512, 0, stream, 1, 16, args);
    return dsa__cu_launch(dsa__cu_topk_row<16, 16, 1024>, grid, 1024, 0, stream, 1, 16, args);
}

static void dsa__cu_by_rank_launch(cudaStream_t stream, int32_t rows, int32_t k, int32_t *indices, float *scores)
{
    int32_t k2 = 2;
    while (k2 < k) k2 *= 2;
    dsa__cu_topk_by_rank<<<rows, DSA__CU_TOPK_THREADS, (size_t) k2 * 8, stream>>>(k, k2, indices, scores);
}

/* A planned selection. workspace: plan.bytes, any contents, 16-byte aligned. follows: a scoring kernel before it in the stream
   has set the counts at the start of the workspace to zero; overlap: by programmatic dependent launch (sm_90). */
static inline cudaError_t dsa__cu_topk_launch(cudaStream_t stream, const dsa__cu *g, const dsa__cu_topk_plan &p, const float *I,
    int64_t ldi, const int32_t *lo, const int32_t *hi, int32_t rows, int32_t n, int32_t k, bool by_rank, bool follows, bool fallback,
    int32_t *indices, float *scores, int32_t *found, void *workspace)
{
    const bool overlap = g->overlap != 0;
    if (rows < 1 || k < 1) return cudaSuccess;
    if (dsa__cu_topk_is_row(g, rows, n)) {
        const dsa__cu_row_args r = { I, ldi, lo, hi, NULL, NULL, n, k, fallback, indices, scores, found };
        const cudaError_t e = dsa__cu_topk_row_launch(stream, g, r, rows);
        if (e == cudaSuccess && by_rank) dsa__cu_by_rank_launch(stream, rows, k, indices, scores);
        return e ? e : cudaGetLastError();
    }
    dsa__cu_topk_args a = { I, ldi, lo, hi, n, k, rows, p.splits, p.sample, p.group, p.cap, p.window, indices, scores,
        (dsa__u64 *) ((char *) workspace + p.count_bytes), (uint32_t *) workspace,
                            found, fallback };
    if (p.splits > 1 && !follows) {
        cudaError_t e = cudaMemsetAsync(workspace, 0, p.count_bytes, stream);
        if (e) return e;
    }
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned) (rows * p.splits));
    config.blockDim = dim3(DSA__CU_TOPK_THREADS);
    config.dynamicSmemBytes = p.shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = follows && overlap;
    const cudaError_t launched = cudaLaunchKernelEx(&config, dsa__cu_topk, a);
    if (launched) return launched;
    if (by_rank) dsa__cu_by_rank_launch(stream, rows, k, indices, scores);
    return cudaGetLastError();
}

/* Ranges of the rows of stored scores, and zeroed counters. */
static __global__ void __launch_bounds__(256) dsa__cu_select_begin(dsa__cu_ranges ranges, dsa__cu_bounds bounds, int64_t n_rows,
    uint32_t *clear, size_t n_clear)
{
    const int64_t i = (int64_t) blockIdx.x * 256 + threadIdx.x;
    if (i < n_rows) dsa__cu_bound_row(bounds, ranges, 0, i);
    for (int64_t j = i; j < (int64_t) n_clear; j += (int64_t) gridDim.x * 256) clear[j] = 0;
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
    const __nv_bfloat16 *q16;                            /* the same in bf16: what tensor cores take */
    int32_t q_bf16, out_bf16, exact;
    const int32_t *indices, *counts, *ks, *ke;
    /* optional [n_rows]: a list's valid positions are [0, limit) instead of [0, len) */
    const int32_t *limits;
    int64_t index_stride;
    int32_t k;                                           /* entries of a list; else at least those of the longest range */
    int32_t prepared;                                    /* q16 is there: a step */
    int32_t early;                                       /* q, lens and tables were there before the launch that this one follows */
    int32_t resume, finish;                              /* begin with the state; end with out, lse, max_logit instead of the state */
    float *max, *sum, *acc;                              /* the state [n_rows, n_heads], acc [.., dim_v] from row0 on (out may be acc) */
    int64_t row0;                                        /* the grid begins with this row */
    const float *sinks;                                  /* optional [n_heads], natural, not scaled */
    void *out;                                           /* [n_rows, n_heads, dim_v] */
    float *lse, *max_logit;                              /* optional [n_rows, n_heads], natural, without the sink; empty rows +inf, -inf */
    /* PORTABLE and HOPPER: blocks that share a row's list */
    int32_t n_chunks, leaves_per_chunk, n_leaves;        /* n_leaves of k: strides of parts and stats */
    int32_t n_units;                                     /* pieces of work that resident blocks share */
    float *parts, *stats;                                /* [n_rows, n_leaves, n_heads, dim_v] and [n_rows, n_leaves, n_heads, 2] */
} dsa__cu_attend;

typedef struct dsa__cu_entries {
    const int32_t *list, *table;
    uint32_t limit;                                      /* valid are [0, limit), at most 2^31: negative entries fail the same comparison */
    int32_t begin, count, shift;                         /* first position of a range; entries; log2 page_size, or -1 */
} dsa__cu_entries;

static __device__ __forceinline__ dsa__cu_entries dsa__cu_entries_of(const dsa__cu_attend &A, int64_t row)
{
    dsa__cu_seen r = dsa__cu_row_of(A.batch, row);
    int64_t limit = min(r.len, A.pool.n_blocks * A.pool.page_size), begin = 0, end = r.visible;
    dsa__cu_entries e;
    e.table = A.pool.tables && !(A.physical && A.what == DSA_ATTEND_LIST) ? A.pool.tables + r.seq * A.pool.n_blocks : NULL;
    e.list = NULL;
    e.shift = (A.pool.page_size & (A.pool.page_size - 1)) == 0 ? 31 - __clz(A.pool.page_size) : -1;
    if (A.what == DSA_ATTEND_LIST) {
        e.list = A.indices + row * A.index_stride;
        end = A.counts ? A.counts[row] : A.k;
        if (A.limits) limit = dsa__cu_clamp(A.limits[row], 0, limit);
        if (A.physical) limit = min(A.pool.n_pages * A.pool.page_size, (int64_t)1 << 31);
    } else if (A.what == DSA_ATTEND_RANGE) {
        begin = dsa__cu_clamp(A.ks[row], 0, r.len);
        end = dsa__cu_clamp(A.ke[row], begin, r.len);
    }
    e.limit = (uint32_t)limit;
    e.begin = (int32_t)begin;
    e.count = (int32_t)dsa__cu_clamp(end - begin, 0, A.k);
    return e;
}

/* *from where `on`, else `otherwise`. Predicated, not branched around: behind a branch the compiler copies the result, so waits. Volatile:
   never before dsa__cu_wait_launch, since the launch ahead writes lists. */
static __device__ __forceinline__ int32_t dsa__cu_load4(const int32_t *from, int on, int32_t otherwise)
{
    int32_t v;
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, %3; @p ld.global.nc.b32 %0, [%1]; }" : "=&r"(v) : "l"(from), "r"(on),
        "r"(otherwise));
    return v;
}

/* What entry i says; -1 from `end` on. */
static __device__ __forceinline__ int32_t dsa__cu_entry_before(const dsa__cu_entries &e, int i, int end)
{
    const int on = i < end;
    return dsa__cu_load4(e.list + i, on && e.list, on && !e.list ? e.begin + i : -1);
}

/* What entry i says; -1 behind the last. */
static __device__ __forceinline__ int32_t dsa__cu_entry(const dsa__cu_entries &e, int i)
{
    return i >= e.count ? -1 : e.list ? __ldg(e.list + i) : e.begin + i;
}


/* The page of an entry; what is not in [0, n_pages) is none. */
static __device__ __forceinline__ int32_t dsa__cu_entry_page(const dsa__cu_attend &A, const dsa__cu_entries &e, int32_t at)
{
    const int on = (uint32_t)at < e.limit;
    const uint32_t block = e.shift >= 0 ? (uint32_t)at >> e.shift : (uint32_t)at / (uint32_t)A.pool.page_size;
    return dsa__cu_load4(e.table + block, on && e.table, on && !e.table ? (int32_t)block : -1);
}

/* The row that an entry names, or NULL. page: what dsa__cu_entry_page said. */
static __device__ __forceinline__ const unsigned char *dsa__cu_row_in(const dsa__cu_attend &A, const dsa__cu_entries &e, int32_t at,
    int32_t page)
{
    const uint32_t size = (uint32_t)A.pool.page_size, offset = e.shift >= 0 ? (uint32_t)at & (size - 1) : (uint32_t)at % size;
    if (page < 0 || page >= A.pool.n_pages) return NULL;
    return A.pool.data + (uint32_t)page * A.pool.page_stride + offset * A.pool.row_stride;
}

/* The row that an entry names, or NULL. */
static __device__ __forceinline__ const unsigned char *dsa__cu_row(const dsa__cu_attend &A, const dsa__cu_entries &e, int32_t at)
{
    uint32_t page, offset;
    if ((uint32_t)at >= e.limit) return NULL;
    page = e.shift >= 0 ? (uint32_t)at >> e.shift : (uint32_t)at / (uint32_t)A.pool.page_size;
    offset = (uint32_t)at - page * (uint32_t)A.pool.page_size;
    if (e.table) {
        int32_t p = __ldg(e.table + page);
        if (p < 0 || p >= A.pool.n_pages) return NULL;
        page = (uint32_t)p;
    }
    return A.pool.data + page * A.pool.page_stride + offset * A.pool.row_stride;
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
    const int32_t tid = (int32_t)threadIdx.x, groups = (A.n_heads + 7) / 8, R = A.pool.dim, dim = R + A.pool.dim_rope,
        format = A.pool.format;
    const int64_t row = A.row0 + blockIdx.x / groups, head = (int64_t)(blockIdx.x % groups) * 8, at = row * A.n_heads + head;
    const int32_t lanes = (int32_t)(A.n_heads - head < 8 ? A.n_heads - head : 8);
    const dsa__cu_entries E = dsa__cu_entries_of(A, row);
    float *acc = A.acc + (at - A.row0 * A.n_heads) * A.dim_v;
    int32_t next = 0, n, h, s, d, d0, i, first = !A.resume;
    if (tid < lanes) {
        max[tid] = A.resume ? A.max[at + tid] : DSA__CU_NONE;
        sum[tid] = A.resume ? A.sum[at + tid] : 0.0f;
    }
    if (tid == 0) held = 0;
    __syncthreads();
    for (;;) {
        if (tid < 32) {                                  /* the first warp gathers */
            int32_t have = held;
            while (have < DSA__CU_ROWS && next < E.count) {
                const unsigned char *p = dsa__cu_row(A, E, dsa__cu_entry(E, next + tid));
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
            for (i = tid; i < lanes * 32; i += 256)
                if (i % 32 < m) q[i / 32][i % 32] = dsa__cu_operand(A.q, A.q_bf16, (at + i / 32) * dim + d0 + i % 32);
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
static __global__ void __launch_bounds__(128) dsa__cu_merge(int32_t n_parts, const float *outs, const float *lses, int64_t n,
    int32_t n_heads, int32_t dim_v, const float *sinks, void *out, int32_t bf16, float *lse)
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

/* ---- tensor cores -------------------------------------------------------------------------------------- */
#define DSA__CU_LOG2E 1.4426950408889634f
#define DSA__CU_LN2   0.6931471805599453f

/* ---- PTX ---------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float dsa__cu_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16 or 4 bytes global -> shared; zeros where `on` is 0 (nothing is read then). */
static __device__ __forceinline__ void dsa__cu_copy16(uint32_t to, const void *from, int on)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(on ? 16 : 0) : "memory");
}

static __device__ __forceinline__ void dsa__cu_copy4(uint32_t to, const void *from, int on)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(from), "r"(on ? 4 : 0) : "memory");
}

static __device__ __forceinline__ void dsa__cu_copy_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void dsa__cu_copy_wait(void)
{
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

static __device__ __forceinline__ void dsa__cu_bar(int id, int n) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(n) : "memory"); }

static __device__ __forceinline__ uint32_t dsa__cu_pack(float lo, float hi)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *(uint32_t *)&v;
}

/* 4 e4m3 values times a scale, each rounded once to bf16 */
static __device__ __forceinline__ uint2 dsa__cu_widen4(uint32_t w, float s)
{
    __half2_raw a = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(w & 0xFFFF), __NV_E4M3);
    __half2_raw b = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(w >> 16), __NV_E4M3);
    float2 x = __half22float2(__half2(a)), y = __half22float2(__half2(b));
    return make_uint2(dsa__cu_pack(x.x * s, x.y * s), dsa__cu_pack(y.x * s, y.y * s));
}

/* ---- rows ahead ------------------------------------------------------------------------------------ */
/* Where the rows of one place of every leaf lie. N neighbouring lanes share the place, and lane i of them looks up the leaves N b + i:
   list, table and row are three trips to memory, and each is asked for leaves before it is used. Leaves count from a block's first. */
typedef struct dsa__cu_ahead {
    uint64_t now;                                        /* an address */
    uint32_t low, high;                                  /* of the next N: an entry, then with its page, then both halves of the address */
} dsa__cu_ahead;

/* The lines of a row. */
static __device__ __forceinline__ void dsa__cu_prefetch(const unsigned char *row, int bytes)
{
    if (!row || bytes <= 0) return;
    for (int i = 0; i < bytes + 127; i += 128) asm volatile("prefetch.global.L2 [%0];" :: "l"(row + (i < bytes ? i : bytes - 1)));
}

/* at: the entry of this lane's leaf among the first N; those from `end` on are not wanted. */
static __device__ __forceinline__ dsa__cu_ahead dsa__cu_ahead_begin(const dsa__cu_attend &A, const dsa__cu_entries &E, int at, int end)
{
    dsa__cu_ahead x = { (uint64_t)dsa__cu_row(A, E, dsa__cu_entry_before(E, at, end)), 0, 0 };
    return x;
}

/* Once for each leaf, 0, 1, .., before its row is asked for. at: the entry of this lane's leaf among the N after those of `leaf`. */
template <int N>
static __device__ __forceinline__ void dsa__cu_ahead_step(const dsa__cu_attend &A, const dsa__cu_entries &E, dsa__cu_ahead &x, int leaf,
    int at, int end, int bytes)
{
    const int phase = leaf % N;
    if (phase == 0) {
        if (leaf > 0) x.now = (uint64_t)x.high << 32 | x.low;
        x.low = (uint32_t)dsa__cu_entry_before(E, at, end);
    } else if (phase == N / 4) {
        x.high = (uint32_t)dsa__cu_entry_page(A, E, (int32_t)x.low);
    } else if (phase == N / 2) {
        const unsigned char *row = dsa__cu_row_in(A, E, (int32_t)x.low, (int32_t)x.high);
        dsa__cu_prefetch(row, bytes);
        x.low = (uint32_t)(uint64_t)row;
        x.high = (uint32_t)((uint64_t)row >> 32);
    }
}

template <int N> static __device__ __forceinline__ const unsigned char *dsa__cu_ahead_row(const dsa__cu_ahead &x, int leaf)
{
    return (const unsigned char *)__shfl_sync(~0u, (unsigned long long)x.now, (threadIdx.x & (32 - N)) | leaf % N);
}

/* ---- the fold and the end ------------------------------------------------------------------------- */
/* What O and O_i are multiplied by when a leaf of maximum m comes to one of M. -inf - -inf never happens. */
static __device__ __forceinline__ float dsa__cu_weigh(float M, float m, float &a, float &b)
{
    float top = fmaxf(M, m), safe = top == -INFINITY ? 0.0f : top;
    a = dsa__cu_exp2(M - safe);
    b = dsa__cu_exp2(m - safe);
    return top;
}

static __device__ __forceinline__ void dsa__cu_fold(float &M, float &L, float m, float l, float &a, float &b)
{
    float top = dsa__cu_weigh(M, m, a, b);
    L = __fmaf_rn(b, l, __fmul_rn(a, L));
    M = top;
}

/* What O is multiplied by at the end: 1 / (L + 2^(z - M)), and 0 for an empty row. z: the sink in base 2 or -inf. */
static __device__ __forceinline__ float dsa__cu_norm(float M, float L, float z)
{
    if (L == 0.0f) return 0.0f;
    if (z == -INFINITY) return 1.0f / L;
    if (z <= M) return 1.0f / (L + dsa__cu_exp2(z - M));
    return dsa__cu_exp2(M - z) / (L * dsa__cu_exp2(M - z) + 1.0f);
}

static __device__ __forceinline__ float dsa__cu_sink(const dsa__cu_attend &A, int head)
{
    return A.sinks ? A.sinks[head] * DSA__CU_LOG2E : -INFINITY;
}

static __device__ __forceinline__ void dsa__cu_stats(const dsa__cu_attend &A, int64_t at, float M, float L)
{
    if (A.lse) A.lse[at] = L == 0.0f ? INFINITY : (M + log2f(L)) * DSA__CU_LN2;
    if (A.max_logit) A.max_logit[at] = M * DSA__CU_LN2;
}

static __device__ __forceinline__ void dsa__cu_put2(const dsa__cu_attend &A, int64_t at, float x, float y)
{
    if (A.out_bf16 == 0) *(float2 *)((float *)A.out + at) = make_float2(x, y);
    else *(uint32_t *)((__nv_bfloat16 *)A.out + at) = dsa__cu_pack(x, y);
}

/* Folds the leaves of one (row, head) that several blocks computed. Grid: n_rows * n_heads; block: dim_v / 4 threads rounded up to warps.
   The maxima so far are a scan (max is exact), so that only the sum is a chain; the first leaves' values are on their way meanwhile. */
static __global__ void dsa__cu_attend_merge(const __grid_constant__ dsa__cu_attend A, int leaf)
{
    extern __shared__ float2 coef[];                     /* a, b of each leaf */
    __shared__ float end;
    enum { AHEAD = 16 };
    const int64_t at = blockIdx.x, step = (int64_t)A.n_heads * A.dim_v;
    const int row = (int)(at / A.n_heads), head = (int)(at % A.n_heads), d = 4 * threadIdx.x;
    const bool mine = d < A.dim_v;
    const float *part = A.parts + ((int64_t)row * A.n_leaves * A.n_heads + head) * A.dim_v + d;
    float4 x[AHEAD], O = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    int n;
    dsa__cu_wait_launch();
    dsa__cu_let_launch();
    n = (dsa__cu_entries_of(A, row).count + leaf - 1) / leaf;
#pragma unroll
    for (int j = 0; j < AHEAD; j++) if (mine && j < n) x[j] = __ldcg((const float4 *)(part + j * step));
    if (threadIdx.x < 32) {
        const float2 *stats = (const float2 *)A.stats + (int64_t)row * A.n_leaves * A.n_heads + head;
        float M = -INFINITY, L = 0.0f;
        for (int i0 = 0; i0 < n; i0 += 32) {
            const int i = i0 + threadIdx.x;
            const float2 s = i < n ? __ldcg(stats + (int64_t)i * A.n_heads) : make_float2(-INFINITY, 0.0f);
            float top = s.x, before, a, b;
            for (int k = 1; k < 32; k *= 2) {
                float o = __shfl_up_sync(~0u, top, k);
                if (threadIdx.x >= k) top = fmaxf(top, o);
            }
            top = fmaxf(top, M);
            before = __shfl_up_sync(~0u, top, 1);
            if (threadIdx.x == 0) before = M;
            dsa__cu_weigh(before, s.x, a, b);
            if (i < n) coef[i] = make_float2(a, b);
            for (int k = 0; k < 32 && i0 + k < n; k++)
                L = __fmaf_rn(__shfl_sync(~0u, b, k), __shfl_sync(~0u, s.y, k), __fmul_rn(__shfl_sync(~0u, a, k), L));
            M = __shfl_sync(~0u, top, 31);
        }
        if (threadIdx.x == 0) {
            end = dsa__cu_norm(M, L, dsa__cu_sink(A, head));
            dsa__cu_stats(A, at, M, L);
        }
    }
    __syncthreads();
    if (!mine) return;
    for (int i0 = 0; i0 < n; i0 += AHEAD) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++) if (i0 + j < n) {
            const float2 c = coef[i0 + j];
            O.x = __fmaf_rn(c.y, x[j].x, __fmul_rn(c.x, O.x));
            O.y = __fmaf_rn(c.y, x[j].y, __fmul_rn(c.x, O.y));
            O.z = __fmaf_rn(c.y, x[j].z, __fmul_rn(c.x, O.z));
            O.w = __fmaf_rn(c.y, x[j].w, __fmul_rn(c.x, O.w));
            if (i0 + j + AHEAD < n) x[j] = __ldcg((const float4 *)(part + (i0 + j + AHEAD) * step));
        }
    }
    dsa__cu_put2(A, at * A.dim_v + d, O.x * end, O.y * end);
    dsa__cu_put2(A, at * A.dim_v + d + 2, O.z * end, O.w * end);
}

/* Folds a partial (out, lse, max_logit: natural) into the state. One block per (row, head). */
static __global__ void __launch_bounds__(128) dsa__cu_fold_state(dsa__cu_attend A)
{
    const int64_t i = blockIdx.x;
    const float m = A.max[i], n = A.max_logit[i], lse = A.lse[i], top = fmaxf(m, n);
    const float a = m == DSA__CU_NONE ? 0.0f : expf(m - top), b = lse == INFINITY ? 0.0f : expf(lse - top);
    for (int32_t d = (int32_t)threadIdx.x; d < A.dim_v; d += 128) {
        float *o = A.acc + i * A.dim_v + d;
        *o = (m == DSA__CU_NONE ? 0.0f : a * *o) + (b == 0.0f ? 0.0f : b * ((const float *)A.out)[i * A.dim_v + d]);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        A.sum[i] = a * A.sum[i] + b;
        if (lse != INFINITY) A.max[i] = top;
    }
}

/* ---- portable path: mma.sync, cp.async (sm_80 and later) ------------------------------------------- */
/* A block attends for 32 heads of one row. Warp (g, w): heads 16 g .. 16 g + 15 of the block; it scores keys 8 w .. 8 w + 7 of a leaf
   and owns DV / 4 columns of the output. q stays in registers (36 steps of 16 dims: 144 of them), since shared memory of sm_86,
   89 and 120 (99 KB) has room for two leaves of 32 rows only. Leaf: 32 entries. */
#define DSA__CU_LEAF_PORTABLE 32

static __device__ __forceinline__ void dsa__cu_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ void dsa__cu_ldmatrix(uint32_t (&r)[4], uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(at) : "memory");
}

static __device__ __forceinline__ void dsa__cu_ldmatrix_t(uint32_t (&r)[4], uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(at) : "memory");
}

template <int DQ> struct dsa__cu_portable_smem {
    static constexpr int leaf = DSA__CU_LEAF_PORTABLE, row = DQ * 2, tile = leaf * row, scores = 36;
    static constexpr int raw_row = DQ + 128;               /* FP8 row: R + 4 ceil(R/128) + 2 r; rows 64 bytes apart modulo 128 */
    static constexpr int at_raw = 2 * tile, at_scores_bf16 = 2 * tile, at_scores_fp8 = 2 * tile + leaf * raw_row;
    static constexpr int bytes_bf16 = at_scores_bf16 + 32 * scores * 4 + 4 * leaf, bytes_fp8 = at_scores_fp8 + 32 * scores * 4 + 4 * leaf;
};

/* MLA: R = 512, r = 64, dim_v = 512, known when compiled. */
template <int DQ, int DV, bool FP8, bool SPLIT, bool MLA>
static __global__ void __launch_bounds__(256, 1) dsa__cu_attend_portable(const __grid_constant__ dsa__cu_attend A)
{
    using S = dsa__cu_portable_smem<DQ>;
    constexpr int LEAF = S::leaf, STEPS = DQ / 16, TILES = DV / 32;         /* TILES: of 8 columns, per warp */
    extern __shared__ __align__(1024) unsigned char smem[];
    float *scores = (float *)(smem + (FP8 ? S::at_scores_fp8 : S::at_scores_bf16));
    /* [4][LEAF]: two more than slots, since a fast warp may be a leaf ahead */
    unsigned char *valid = (unsigned char *)(scores + 32 * S::scores);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = warp >> 2, w = warp & 3;
    const int n_groups = (A.n_heads + 31) / 32, R = MLA ? 512 : A.pool.dim, r = MLA ? 64 : A.pool.dim_rope, D = R + r;
    const int dim_v = MLA ? 512 : A.dim_v;
    int unit = blockIdx.x;
    const int group = unit % n_groups;
    unit /= n_groups;
    const int chunk = unit % A.n_chunks, row = unit / A.n_chunks;
    const float c = A.scale * DSA__CU_LOG2E;
    const int head = group * 32 + g * 16 + (lane >> 2);                     /* and head + 8 */

    dsa__cu_wait_launch();
    if (SPLIT) dsa__cu_let_launch();
    const dsa__cu_entries E = dsa__cu_entries_of(A, row);
    const int n_leaves = (E.count + LEAF - 1) / LEAF;
    const int first = SPLIT ? chunk * A.leaves_per_chunk : 0;
    const int last = SPLIT ? min(first + A.leaves_per_chunk, n_leaves) : n_leaves;
    if (SPLIT && first >= last) return;

    /* rows: thread t brings pieces t % 8, t % 8 + 8, ... of entry t / 8 of the leaf */
    const int mine = tid >> 3, piece = tid & 7;
    const uint32_t tile = dsa__cu_smem(smem), raw = tile + S::at_raw;
    const int raw_bytes = R + (R + 127) / 128 * 4 + 2 * r;
    const bool wide = (((uintptr_t)A.pool.data | A.pool.row_stride | A.pool.page_stride) & 15) == 0;
    const int row_bytes = FP8 ? raw_bytes : 0;           /* prefetched; bf16 rows are copied a leaf ahead as it is: 9 % slower with both */
    const int end = min(last * LEAF, E.count);
    dsa__cu_ahead ahead = dsa__cu_ahead_begin(A, E, (first + piece) * LEAF + mine, end);
    auto fetch = [&](int leaf) {                                            /* issues the copies of a leaf */
        const int slot = leaf & 1;
        if (leaf < last) {
            dsa__cu_ahead_step<8>(A, E, ahead, leaf - first, (first + ((leaf - first) & ~7) + 8 + piece) * LEAF + mine, end, row_bytes);
            const unsigned char *from = dsa__cu_ahead_row<8>(ahead, leaf - first);
            const int on = from != NULL;
            if (!on) from = A.pool.data;
            if (piece == 0) valid[(leaf & 3) * LEAF + mine] = (unsigned char)on;
            if (FP8) {
                uint32_t to = raw + mine * S::raw_row;
                if (MLA && wide) {                       /* 656 bytes: five pieces each, one more for the first thread */
#pragma unroll
                    for (int i = 0; i < 5; i++) dsa__cu_copy16(to + piece * 16 + 128 * i, from + piece * 16 + 128 * i, on);
                    if (piece == 0) dsa__cu_copy16(to + 640, from + 640, on);
                } else if (wide) for (int i = piece * 16; i < raw_bytes; i += 128) {
                    if (i + 16 <= raw_bytes) dsa__cu_copy16(to + i, from + i, on);
                    else for (int j = i; j < raw_bytes; j += 4) dsa__cu_copy4(to + j, from + j, on);
                }
                else for (int i = piece * 4; i < raw_bytes; i += 32) dsa__cu_copy4(to + i, from + i, on);
            } else {
                uint32_t to = tile + slot * S::tile + mine * S::row;
                if (wide) {
#pragma unroll
                    for (int i = 0; i < DQ / 64; i++) {
                        int u = i * 8 + piece;
                        if (u * 8 < D) dsa__cu_copy16(to + ((u ^ (mine & 7)) << 4), from + u * 16, on);
                    }
                } else for (int i = 0; i < DQ / 64; i++) {
                    int u = i * 8 + piece;
                    if (u * 8 < D) for (int j = 0; j < 16; j += 4) dsa__cu_copy4(to + ((u ^ (mine & 7)) << 4) + j, from + u * 16 + j, on);
                }
            }
        }
        dsa__cu_copy_commit();
    };

    /* columns between D and DQ: zeros that no copy touches */
    for (int i = tid; i < 2 * LEAF * (DQ / 8); i += 256) {
        int r = i / (DQ / 8), u = i % (DQ / 8);
        if (u * 8 >= D) *(uint4 *)(smem + r * S::row + ((u ^ (r & 7)) << 4)) = make_uint4(0, 0, 0, 0);
    }
    /* FP8: widens piece i of the next leaf's raw rows. A row's raw bytes are copied and widened by the same 8 threads. */
    const unsigned char *raw_mine = smem + S::at_raw + mine * S::raw_row;
    float widen_scale = 0.0f;
    auto widen = [&](int leaf, int i) {
        const int u = i * 8 + piece;
        uint4 y = make_uint4(0, 0, 0, 0);
        if (u * 8 < R) {
            uint2 x = *(const uint2 *)(raw_mine + u * 8);
            if (!(i & 1)) widen_scale = *(const float *)(raw_mine + R + 4 * (i >> 1));
            const float s = widen_scale;
            uint2 a = dsa__cu_widen4(x.x, s), b = dsa__cu_widen4(x.y, s);
            y = make_uint4(a.x, a.y, b.x, b.y);
        } else if (u * 8 < D) {
            const uint32_t *x = (const uint32_t *)(raw_mine + R + (R + 127) / 128 * 4 + 2 * (u * 8 - R));
            y = make_uint4(x[0], x[1], x[2], x[3]);
        }
        if (u * 8 < D) *(uint4 *)(smem + (leaf & 1) * S::tile + mine * S::row + ((u ^ (mine & 7)) << 4)) = y;
    };
    fetch(first);
    dsa__cu_prefetch((const unsigned char *)ahead.now, row_bytes);
    if (FP8) {
        dsa__cu_copy_wait<0>();
        __syncwarp();
#pragma unroll
        for (int i = 0; i < DQ / 64; i++) widen(first, i);
        __syncwarp();
        fetch(first + 1);
    }

    uint32_t q[STEPS][4];
    {
        const __nv_bfloat16 *q0 = A.q16 + ((int64_t)row * A.n_heads + head) * D + 2 * (lane & 3), *q1 = q0 + 8 * (int64_t)D;
        const int col = 2 * (lane & 3);
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            q[s][0] = head     < A.n_heads && 16 * s + col     < D ? *(const uint32_t *)(q0 + 16 * s) : 0;
            q[s][1] = head + 8 < A.n_heads && 16 * s + col     < D ? *(const uint32_t *)(q1 + 16 * s) : 0;
            q[s][2] = head     < A.n_heads && 16 * s + col + 8 < D ? *(const uint32_t *)(q0 + 16 * s + 8) : 0;
            q[s][3] = head + 8 < A.n_heads && 16 * s + col + 8 < D ? *(const uint32_t *)(q1 + 16 * s + 8) : 0;
        }
    }
    float O[TILES][4], M0 = -INFINITY, M1 = -INFINITY, L0 = 0.0f, L1 = 0.0f;
#pragma unroll
    for (int t = 0; t < TILES; t++) O[t][0] = O[t][1] = O[t][2] = O[t][3] = 0.0f;

    for (int leaf = first; leaf < last; leaf++) {
        const int slot = leaf & 1;
        const uint32_t rows = tile + slot * S::tile;
        if (!FP8) dsa__cu_copy_wait<0>();
        __syncthreads();                                 /* the leaf's rows are there; nobody reads the leaf before any more */
        if (!FP8) fetch(leaf + 1);

        /* scores of 16 heads x 8 keys: three sums, for a third of the chain of dependent products */
        float sum[3][4] = { { 0.0f, 0.0f, 0.0f, 0.0f }, { 0.0f, 0.0f, 0.0f, 0.0f }, { 0.0f, 0.0f, 0.0f, 0.0f } };
        /* unit 2 s + lane / 8 lies at its own XOR key % 8: two addresses, 128 bytes apart for each further four steps */
        const int key = w * 8 + (lane & 7);
        const uint32_t at0 = rows + key * S::row + (((lane >> 3) ^ (key & 7)) << 4), at1 = at0 ^ 64;
#pragma unroll
        for (int s = 0; s < STEPS; s += 2) {
            uint32_t b[4];
            dsa__cu_ldmatrix(b, (s & 2 ? at1 : at0) + (s >> 2) * 128);
            dsa__cu_mma(sum[s % 3], q[s], b[0], b[1]);
            dsa__cu_mma(sum[(s + 1) % 3], q[s + 1], b[2], b[3]);
        }
        {
            const int col = w * 8 + 2 * (lane & 3);
            const bool on0 = valid[(leaf & 3) * LEAF + col] != 0, on1 = valid[(leaf & 3) * LEAF + col + 1] != 0;
            float *to = scores + (g * 16 + (lane >> 2)) * S::scores + col;
            *(float2 *)to = make_float2(on0 ? (sum[0][0] + sum[1][0] + sum[2][0]) * c : -INFINITY,
                on1 ? (sum[0][1] + sum[1][1] + sum[2][1]) * c : -INFINITY);
            *(float2 *)(to + 8 * S::scores) = make_float2(on0 ? (sum[0][2] + sum[1][2] + sum[2][2]) * c : -INFINITY,
                on1 ? (sum[0][3] + sum[1][3] + sum[2][3]) * c : -INFINITY);
        }
        dsa__cu_bar(1 + g, 128);

        /* each of the four warps takes the weights of all 32 keys, as operands */
        float x[16], m0 = -INFINITY, m1 = -INFINITY, l0 = 0.0f, l1 = 0.0f;
        {
            const float *from = scores + (g * 16 + (lane >> 2)) * S::scores + 2 * (lane & 3);
#pragma unroll
            for (int t = 0; t < 4; t++) {
                float2 u = *(const float2 *)(from + 8 * t), v = *(const float2 *)(from + 8 * t + 8 * S::scores);
                x[4 * t] = u.x; x[4 * t + 1] = u.y; x[4 * t + 2] = v.x; x[4 * t + 3] = v.y;
                m0 = fmaxf(m0, fmaxf(u.x, u.y));
                m1 = fmaxf(m1, fmaxf(v.x, v.y));
            }
        }
        m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 1)); m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 2));
        m1 = fmaxf(m1, __shfl_xor_sync(~0u, m1, 1)); m1 = fmaxf(m1, __shfl_xor_sync(~0u, m1, 2));
        uint32_t p[2][4];
        {
            const float z0 = m0 == -INFINITY ? 0.0f : m0, z1 = m1 == -INFINITY ? 0.0f : m1;
#pragma unroll
            for (int t = 0; t < 4; t++) {
                float a0 = dsa__cu_exp2(x[4 * t] - z0), a1 = dsa__cu_exp2(x[4 * t + 1] - z0);
                float b0 = dsa__cu_exp2(x[4 * t + 2] - z1), b1 = dsa__cu_exp2(x[4 * t + 3] - z1);
                l0 += a0 + a1;
                l1 += b0 + b1;
                p[t >> 1][(t & 1) * 2] = dsa__cu_pack(a0, a1);
                p[t >> 1][(t & 1) * 2 + 1] = dsa__cu_pack(b0, b1);
            }
        }
        l0 += __shfl_xor_sync(~0u, l0, 1); l0 += __shfl_xor_sync(~0u, l0, 2);
        l1 += __shfl_xor_sync(~0u, l1, 1); l1 += __shfl_xor_sync(~0u, l1, 2);

        float a0 = 0.0f, a1 = 0.0f, b0 = 0.0f, b1 = 0.0f;
        if (!SPLIT) {
            dsa__cu_fold(M0, L0, m0, l0, a0, b0);
            dsa__cu_fold(M1, L1, m1, l1, a1, b1);
        }
        const int64_t at = SPLIT ? ((int64_t)row * A.n_leaves + leaf) * A.n_heads + head : 0;
        if (SPLIT && w == 0 && (lane & 3) == 0) {
            if (head < A.n_heads)     *(float2 *)(A.stats + 2 * at)       = make_float2(m0, l0);
            if (head + 8 < A.n_heads) *(float2 *)(A.stats + 2 * (at + 8)) = make_float2(m1, l1);
        }
        if (FP8) {                                       /* the next leaf is widened between the products, to fill their waits */
            dsa__cu_copy_wait<0>();
            __syncwarp();
        }
        uint32_t values[2][4];                           /* one tile ahead */
        dsa__cu_ldmatrix_t(values[0], rows + lane * S::row + (((w * TILES) ^ (lane & 7)) << 4));
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const uint32_t (&v)[4] = values[t & 1];
            float y[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
            if (t + 1 < TILES) dsa__cu_ldmatrix_t(values[(t + 1) & 1], rows + lane * S::row + (((w * TILES + t + 1) ^ (lane & 7)) << 4));
            if (FP8 && t == DQ / 64) {                   /* the raw rows have been read: the copies behind them may start */
                __syncwarp();
                fetch(leaf + 2);
            }
            if (FP8 && t < DQ / 64) widen(leaf + 1, t);             /* behind the last leaf: stale bytes into a tile that nobody reads */
            dsa__cu_mma(y, p[0], v[0], v[1]);
            dsa__cu_mma(y, p[1], v[2], v[3]);
            if (SPLIT) {
                const int col = (w * TILES + t) * 8 + 2 * (lane & 3);
                if (col < dim_v && head < A.n_heads)     *(float2 *)(A.parts + at * dim_v + col)       = make_float2(y[0], y[1]);
                if (col < dim_v && head + 8 < A.n_heads) *(float2 *)(A.parts + (at + 8) * dim_v + col) = make_float2(y[2], y[3]);
            } else {
                O[t][0] = __fmaf_rn(b0, y[0], __fmul_rn(a0, O[t][0]));
                O[t][1] = __fmaf_rn(b0, y[1], __fmul_rn(a0, O[t][1]));
                O[t][2] = __fmaf_rn(b1, y[2], __fmul_rn(a1, O[t][2]));
                O[t][3] = __fmaf_rn(b1, y[3], __fmul_rn(a1, O[t][3]));
            }
        }
    }
    if (SPLIT) return;

    const int64_t at = (int64_t)row * A.n_heads + head;
    const float f0 = head < A.n_heads ? dsa__cu_norm(M0, L0, dsa__cu_sink(A, head)) : 0.0f;
    const float f1 = head + 8 < A.n_heads ? dsa__cu_norm(M1, L1, dsa__cu_sink(A, head + 8)) : 0.0f;
    if (w == 0 && (lane & 3) == 0) {
        if (head < A.n_heads)     dsa__cu_stats(A, at, M0, L0);
        if (head + 8 < A.n_heads) dsa__cu_stats(A, at + 8, M1, L1);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int col = (w * TILES + t) * 8 + 2 * (lane & 3);
        if (col < dim_v && head < A.n_heads)     dsa__cu_put2(A, at * dim_v + col, O[t][0] * f0, O[t][1] * f0);
        if (col < dim_v && head + 8 < A.n_heads) dsa__cu_put2(A, (at + 8) * dim_v + col, O[t][2] * f1, O[t][3] * f1);
    }
}

/* ---- Hopper path: wgmma, mbarriers, a producer warpgroup (sm_90a) ----------------------------------- */
/* R = dim_v = 512, r = 64 or 0, everything on 16 bytes. A block attends for 64 heads of a row. A leaf of 128 entries is two tiles of 64
   rows. Warpgroup 2 brings rows. Warpgroup w of 0, 1 scores tile w (64 heads x 64 keys, 36 steps); both agree on the leaf's
   maximum, swap weights, and multiply all 128 keys' weights with their half of the columns, 64 columns at a time (O: 64 x 256, 128
   registers), 8 products a fold. A tile is 9 (8 without rope) chunks of 64 columns, each 64 rows of 128 bytes with the 128-byte swizzle:
   unit u of row s lies at u ^ (s % 8). The rope chunk is read only by scores, so the weights are swapped in its place. A chunk of both
   tiles goes back to the producer as soon as it is multiplied, and scores take chunks in the order in which they come back: 0 4 1 5
   2 6 3 7, then rope. A block goes through several (row, part of the list, head group); the producer is ahead with rows and q.
   TWO (FP8, 65..128 heads): two blocks of a cluster do the two head groups of a row and share its rows: each widens one tile for both, by
   two warpgroups. tools/ladder/cuda.md says what each of these brought. */
#define DSA__CU_LEAF_HOPPER 128
#define DSA__CU_CHUNK 8192                               /* bytes of 64 rows x 64 columns */

struct dsa__cu_hopper_smem {
    static constexpr int q = 0, tile = 9 * DSA__CU_CHUNK, kv = tile, swap = 3 * tile, bars = swap + 4 * 128 * 8, valid = bars + 128;
    static constexpr int bytes = valid + 64;
};

struct dsa__cu_one_smem {                                /* of dsa__cu_attend_one */
    static constexpr int tile = 9 * DSA__CU_CHUNK, kv = tile, swap = 3 * tile, stats = swap + 4 * 128 * 8, coef = stats + 512,
        end = coef + 512, bars = end + 16, valid = bars + 16, bytes = valid + 16, row = 1056;
    /* row: bytes of 256 floats of an output of the leaf, in the place of q; 32 more, or 8 lanes would meet in a bank */
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
static __device__ __forceinline__ void dsa__cu_bar_init(uint32_t bar, int n)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(n) : "memory");
}
static __device__ __forceinline__ void dsa__cu_bar_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
/* arrives once all copies that this thread has issued are there */
static __device__ __forceinline__ void dsa__cu_bar_arrive_copies(uint32_t bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(bar) : "memory");
}
static __device__ __forceinline__ void dsa__cu_bar_wait(uint32_t bar, int parity)
{
    uint32_t done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    } while (!done);
}
/* what other threads stored, seen through a barrier, may now be read by wgmma and bulk copies */
static __device__ __forceinline__ void dsa__cu_proxy_fence(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
static __device__ __forceinline__ void dsa__cu_wgmma_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void dsa__cu_wgmma_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void dsa__cu_wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

/* Matrix descriptor: 128-byte swizzle, 8-row groups 1024 bytes apart, next 64 columns a chunk away. The upper half is a constant; the lower
   half comes as a warp-uniform number, or else every product pays for moving it to uniform registers. */
#define DSA__CU_DESC_HIGH 0x40000040                     /* swizzle 1 << 30 | 1024 / 16 */
static __device__ __forceinline__ uint32_t dsa__cu_desc(uint32_t at)
{
    return __shfl_sync(~0u, (at & 0x3FFFF) >> 4 | (uint32_t)(DSA__CU_CHUNK >> 4) << 16, 0);
}

#define DSA__CU_D32(d) \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define DSA__CU_N32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"

/* d [64, 64] (+)= a [64, 16] b [64, 16]^T, both in shared memory, columns (the summed dimension) contiguous */
static __device__ __forceinline__ void dsa__cu_wgmma_ss(float (&d)[32], uint32_t a, uint32_t b, int add)
{
    asm volatile("{ .reg .pred p; .reg .b64 a, b; setp.ne.b32 p, %34, 0; mov.b64 a, {%32, %35}; mov.b64 b, {%33, %35};\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " DSA__CU_N32 ", a, b, p, 1, 1, 0, 0; }"
        : DSA__CU_D32(d) : "r"(a), "r"(b), "r"(add), "n"(DSA__CU_DESC_HIGH));
}

/* d [64, 64] (+)= a [64, 16] b [16, 64], a in registers, b in shared memory with its 64 columns contiguous */
static __device__ __forceinline__ void dsa__cu_wgmma_rs(float (&d)[32], const uint32_t *a, uint32_t b, int add)
{
    asm volatile("{ .reg .pred p; .reg .b64 b; setp.ne.b32 p, %37, 0; mov.b64 b, {%36, %38};\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " DSA__CU_N32 ", {%32,%33,%34,%35}, b, p, 1, 1, 1; }"
        : DSA__CU_D32(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(DSA__CU_DESC_HIGH));
}

/* 16 bytes, zeros where `on` is 0. Predicated, not branched around: behind a branch the compiler copies the result, and so waits for it. */
static __device__ __forceinline__ uint4 dsa__cu_load16(const void *from, int on)
{
    uint4 v;
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
        "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4]; }" : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
            : "l"(from), "r"(on));
    return v;
}

static __device__ __forceinline__ void dsa__cu_store16(uint32_t to, uint4 v)
{
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" :: "r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

static __device__ __forceinline__ uint4 dsa__cu_read16(uint32_t from)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}

static __device__ __forceinline__ void dsa__cu_store8(uint32_t to, float x, float y)
{
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" :: "r"(to), "f"(x), "f"(y) : "memory");
}

static __device__ __forceinline__ float2 dsa__cu_read8(uint32_t from)
{
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
    return v;
}

/* The 4 threads of a row ask for its 6 lines, so that what they load later waits for the L2 only. */
static __device__ __forceinline__ void dsa__cu_prefetch_fp8(const unsigned char *row, int u)
{
    asm volatile("{ .reg .pred p; setp.ne.b64 p, %0, 0; @p prefetch.global.L2 [%0 + 0]; }" :: "l"(row ? row + 128 * u : row));
    asm volatile("{ .reg .pred p; setp.ne.b64 p, %0, 0; @p prefetch.global.L2 [%0 + 0]; }" :: "l"(row && u < 2 ? row + 512 + 128 * u
        : NULL));
}

/* Which rows of tile w are there, as the producer's warps wrote it. */
template <bool TWO> static __device__ __forceinline__ uint64_t dsa__cu_valid(uint32_t at, int w)
{
    const uint4 x = dsa__cu_read16(at + (TWO ? 32 : 16) * w);
    if (!TWO) return (uint64_t)(x.z | x.w << 16) << 32 | (x.x | x.y << 16);
    const uint4 y = dsa__cu_read16(at + 32 * w + 16);
    return (uint64_t)(y.x | y.y << 8 | y.z << 16 | y.w << 24) << 32 | (x.x | x.y << 8 | x.z << 16 | x.w << 24);
}

/* The end of a block that saw the whole list: O / (L + sink) of warpgroup w's half of the columns,
    lse and max. A thread has 2 columns of each
   8; four threads swap theirs so that each stores 8 columns at once: shared memory stays with what comes next. */
static __device__ __forceinline__ void dsa__cu_attend_end(const dsa__cu_attend &A, float (&O)[4][32], float M0, float M1, float L0,
    float L1, int row, int group, int w)
{
    const int tid = threadIdx.x, lane = tid & 31, l = lane & 3, head = group * 64 + 16 * ((tid >> 5) & 3) + (lane >> 2);
    const int64_t at = (int64_t)row * A.n_heads + head;
    const bool on0 = head < A.n_heads, on1 = head + 8 < A.n_heads;
    const float f0 = on0 ? dsa__cu_norm(M0, L0, dsa__cu_sink(A, head)) : 0.0f;
    const float f1 = on1 ? dsa__cu_norm(M1, L1, dsa__cu_sink(A, head + 8)) : 0.0f;
    if (w == 0 && l == 0) {
        if (on0) dsa__cu_stats(A, at, M0, L0);
        if (on1) dsa__cu_stats(A, at + 8, M1, L1);
    }
    if (A.out_bf16 == 0) {
        float *to = (float *)A.out + at * 512 + w * 256 + 2 * l;
        if (on0) {
#pragma unroll
            for (int j = 0; j < 32; j++) *(float2 *)(to + 8 * j) = make_float2(O[j >> 3][4 * (j & 7)] * f0,
                O[j >> 3][4 * (j & 7) + 1] * f0);
        }
        if (on1) {
#pragma unroll
            for (int j = 0; j < 32; j++) *(float2 *)(to + 4096 + 8 * j) = make_float2(O[j >> 3][4 * (j & 7) + 2] * f1,
                O[j >> 3][4 * (j & 7) + 3] * f1);
        }
        return;
    }
    __nv_bfloat16 *to = (__nv_bfloat16 *)A.out + at * 512 + w * 256 + 8 * l;
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t x[4], y[4];                         /* x[t]: my columns of group j + t. Wanted: all columns of group j + l */
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const float *o = O[(j + t) >> 3] + 4 * ((j + t) & 7) + 2 * h;
                x[t] = dsa__cu_pack(o[0] * (h ? f1 : f0), o[1] * (h ? f1 : f0));
            }
            /* a transpose of 4 x 4: swap with the neighbour, then with the one behind it */
            y[0] = l & 1 ? x[0] : x[1]; y[1] = l & 1 ? x[2] : x[3];
            y[0] = __shfl_xor_sync(~0u, y[0], 1); y[1] = __shfl_xor_sync(~0u, y[1], 1);
            if (l & 1) { x[0] = y[0]; x[2] = y[1]; } else { x[1] = y[0]; x[3] = y[1]; }
            y[0] = l & 2 ? x[0] : x[2]; y[1] = l & 2 ? x[1] : x[3];
            y[0] = __shfl_xor_sync(~0u, y[0], 2); y[1] = __shfl_xor_sync(~0u, y[1], 2);
            if (l & 2) { x[0] = y[0]; x[1] = y[1]; } else { x[2] = y[0]; x[3] = y[1]; }
            if (h ? on1 : on0) *(uint4 *)(to + h * 4096 + 8 * j) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

/* One unit of work. */
typedef struct dsa__cu_unit { int32_t row, group, first, n; } dsa__cu_unit;

template <bool SPLIT>
static __device__ __forceinline__ dsa__cu_unit dsa__cu_unit_of(const dsa__cu_attend &A, int unit, int count)
{
    dsa__cu_unit u;
    const int n_groups = (A.n_heads + 63) / 64, n_leaves = (count + 127) / 128;
    (void)unit;
    u.group = unit % n_groups;
    unit /= n_groups;
    u.row = unit / A.n_chunks;
    u.first = SPLIT ? min(unit % A.n_chunks * A.leaves_per_chunk, n_leaves) : 0;
    u.n = SPLIT ? min(A.leaves_per_chunk, n_leaves - u.first) : n_leaves;
    return u;
}

static __device__ __forceinline__ int dsa__cu_unit_row(const dsa__cu_attend &A, int unit)
{
    return unit / ((A.n_heads + 63) / 64) / A.n_chunks;
}

static __device__ __forceinline__ uint32_t dsa__cu_peer(uint32_t at, uint32_t rank)
{
    uint32_t to;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(at), "r"(rank));
    return to;
}
/* What goes to the other block counts itself off at its barrier. Plain stores and arrivals that release over the cluster cost a fence of
   the whole memory and a flush of the L1 each (64 rows: 189 us), st.async of 16 bytes a lane is bound by the way between the
   multiprocessors (138 us); bulk copies of what a warp has just widened for its own block are neither (117 us). */
static __device__ __forceinline__ void dsa__cu_peer_copy(uint32_t to, uint32_t from, int bytes, uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(to), "r"(from),
        "r"(bytes), "r"(bar) : "memory");
}
static __device__ __forceinline__ void dsa__cu_peer_store4(uint32_t to, uint32_t v, uint32_t bar)
{
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" :: "r"(to), "r"(v), "r"(bar) : "memory");
}
static __device__ __forceinline__ void dsa__cu_bar_arrive_expect(uint32_t bar, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}
/* Only gives back what was read, so it need not release writes. */
static __device__ __forceinline__ void dsa__cu_peer_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(bar) : "memory");
}
/* Hands over no data (barriers' set-up has its own fence), so it need not release. */
static __device__ __forceinline__ void dsa__cu_cluster_sync(void)
{
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
/* q of a unit into its place, by the W warps of the producer. It is free once both warpgroups have scored the last leaf before. */
template <int ROPE, int W>
static __device__ __forceinline__ void dsa__cu_produce_q(const dsa__cu_attend &A, const dsa__cu_unit &U, uint32_t base, uint32_t q_full,
    uint32_t q_free, int turn)
{
    constexpr int DIM = 512 + ROPE;
    const int u = threadIdx.x & 7;
    const __nv_bfloat16 *q = A.q16 + ((int64_t)U.row * A.n_heads + U.group * 64) * DIM + u * 8;
    if (turn) dsa__cu_bar_wait(q_free, (turn + 1) & 1);
#pragma unroll 1
    for (int r = (threadIdx.x - 256) >> 3; r < 64; r += 4 * W) {
        const int on = U.group * 64 + r < A.n_heads;
        const __nv_bfloat16 *from = on ? q + (int64_t)r * DIM : A.q16;
        const uint32_t to = base + r * 128 + ((u ^ (r & 7)) << 4);
#pragma unroll
        for (int c = 0; c < DIM / 64; c++) dsa__cu_copy16(to + c * DSA__CU_CHUNK, from + (on ? c * 64 : 0), on);
    }
    dsa__cu_bar_arrive_copies(q_full);
}

template <int ROPE, bool SPLIT>
static __device__ __forceinline__ void dsa__cu_produce_bf16(const dsa__cu_attend &A, uint32_t kv, uint32_t full, uint32_t empty,
    uint32_t *valid)
{
    const int lane = threadIdx.x & 31, p = (threadIdx.x >> 5) & 3, sub = lane >> 3, unit16 = lane & 7;
    const uint32_t to = kv + (16 * p + sub) * 128;
    const uint32_t even = to + ((unit16 ^ sub) << 4), odd = to + 512 + ((unit16 ^ (sub + 4)) << 4);       /* rows 4 j + sub, modulo 8 */
    uint32_t it = 0;
    int turn = 0;
    for (int unit = blockIdx.x; unit < A.n_units; unit += gridDim.x) {
        const dsa__cu_entries E = dsa__cu_entries_of(A, dsa__cu_unit_row(A, unit));
        const dsa__cu_unit U = dsa__cu_unit_of<SPLIT>(A, unit, E.count);
        int32_t next[8];
#pragma unroll
        for (int j = 0; j < 8; j++) next[j] = dsa__cu_entry(E, U.first * 128 + (j >> 2) * 64 + 16 * p + 4 * (j & 3) + sub);
        dsa__cu_produce_q<ROPE, 4>(A, U, kv - dsa__cu_hopper_smem::kv, empty + 72, empty + 80, turn++);
        for (int i = 0; i < U.n; i++, it++) {
            const unsigned char *from[8];
            uint32_t bits[2] = { 0, 0 }, on = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                from[j] = dsa__cu_row(A, E, next[j]);
                uint32_t v = __ballot_sync(~0u, from[j] != NULL);
                bits[j >> 2] |= ((v & 1) | (v >> 7 & 2) | (v >> 14 & 4) | (v >> 21 & 8)) << (4 * (j & 3));
                on |= (uint32_t)(from[j] != NULL) << j;
                from[j] = (from[j] ? from[j] : A.pool.data) + unit16 * 16;
            }
#pragma unroll
            for (int j = 0; j < 8; j++) next[j] = dsa__cu_entry(E, (U.first + i + 1) * 128 + (j >> 2) * 64 + 16 * p + 4 * (j & 3) + sub);
#pragma unroll
            for (int g = 0; g < 4; g++) {
#pragma unroll
                for (int x = 0; x < (g == 0 && ROPE ? 3 : 2); x++) {
                    const int c = x == 2 ? 8 : g + 4 * x;
                    if (it > 0) dsa__cu_bar_wait(empty + 8 * c, (it + 1) & 1);
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        dsa__cu_copy16((j & 1 ? odd : even) + (j >> 2) * dsa__cu_hopper_smem::tile + c * DSA__CU_CHUNK + (j & 2) * 512,
                            from[j] + c * 128, on >> j & 1);
                }
                if (g == 0) {
                    if (!ROPE && it > 0) dsa__cu_bar_wait(empty + 64, (it + 1) & 1);
                    if (lane == 0) {
                        valid[p] = bits[0];
                        valid[4 + p] = bits[1];
                        dsa__cu_bar_arrive(full);
                    }
                }
                dsa__cu_bar_arrive_copies(full + 8 * g);
            }
        }
    }
}

/* FP8: four lanes share a row. 4 warps have SLOTS = 4 rows a thread, PER of either tile; in a cluster 8 warps have one row of tile `rank`
   each, which goes to both blocks. Widening waits for its own results, not for the units, so warps help (128 rows: 239 -> 217 us). v: the
   values of the next AHEAD groups of chunks, on their way while others are widened. Prefetching a later leaf's rows was slower there. */
template <int ROPE, bool SPLIT, bool TWO>
static __device__ __forceinline__ void dsa__cu_produce_fp8(const dsa__cu_attend &A, uint32_t kv, uint32_t full, uint32_t empty,
    uint32_t valid)
{
    constexpr int W = TWO ? 8 : 4, PER = 8 / W, SLOTS = TWO ? 1 : 4, AHEAD = TWO ? 2 : 1;
    const int lane = threadIdx.x & 31, p = (threadIdx.x >> 5) - 8, sub = lane >> 2, u = lane & 3;
    const uint32_t rank = TWO ? blockIdx.x & 1 : 0;
    const uint32_t to = kv + rank * dsa__cu_hopper_smem::tile + (8 * PER * p + sub) * 128, to0 = to + (((2 * u) ^ sub) << 4),
        to1 = to + (((2 * u + 1) ^ sub) << 4);
    const uint32_t warp8 = kv + rank * dsa__cu_hopper_smem::tile + 8 * PER * p * 128;                      /* a warp's 8 rows of chunk 0 */
    const uint32_t far8 = TWO ? dsa__cu_peer(warp8, rank ^ 1) : 0, far_full = TWO ? dsa__cu_peer(full, rank ^ 1) : 0;
    uint32_t it = 0;
    int turn = 0;
    for (int unit = blockIdx.x; unit < A.n_units; unit += gridDim.x) {
        const dsa__cu_entries E = dsa__cu_entries_of(A, dsa__cu_unit_row(A, unit));
        const dsa__cu_unit U = dsa__cu_unit_of<SPLIT>(A, unit, E.count);
        uint4 v[AHEAD][SLOTS][2], scale[SLOTS], rope[TWO ? SLOTS : 1][2];
        const unsigned char *row[SLOTS];                 /* slot s: row 8 (PER p + s % PER) + sub of tile rank + s / PER */
        int32_t next[SLOTS];
#pragma unroll
        for (int s = 0; s < SLOTS; s++) next[s] = dsa__cu_entry(E, U.first * 128 + (rank + s / PER) * 64 + 8 * (PER * p + s % PER) + sub);
        /* while the list is on its way */
        dsa__cu_produce_q<ROPE, W>(A, U, kv - dsa__cu_hopper_smem::kv, empty + 72, empty + 80, turn++);
#pragma unroll
        for (int s = 0; s < SLOTS; s++) row[s] = dsa__cu_row(A, E, next[s]);
        if (U.n <= 0) continue;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            next[s] = dsa__cu_entry(E, (U.first + 1) * 128 + (rank + s / PER) * 64 + 8 * (PER * p + s % PER) + sub);
            dsa__cu_prefetch_fp8(row[s], u);
        }
#pragma unroll
        for (int d = 0; d < AHEAD; d++)
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
#pragma unroll
                for (int x = 0; x < 2; x++) v[d][s][x] = dsa__cu_load16(row[s] + 256 * x + 64 * d + 16 * u, row[s] != NULL);
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            scale[s] = dsa__cu_load16(row[s] + 512, row[s] != NULL);
            if (TWO && ROPE) {
                rope[s][0] = dsa__cu_load16(row[s] + 528 + 32 * u, row[s] != NULL);
                rope[s][1] = dsa__cu_load16(row[s] + 544 + 32 * u, row[s] != NULL);
            }
        }
        for (int i = 0; i < U.n; i++, it++) {
            uint32_t bits[2] = { 0, 0 };
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                uint32_t ball = __ballot_sync(~0u, row[s] != NULL && u == 0);
#pragma unroll
                for (int j = 0; j < 8; j++) bits[s / PER] |= (ball >> (4 * j) & 1) << (8 * (s % PER) + j);
            }
            if (it > 0) dsa__cu_bar_wait(empty + 64, (it + 1) & 1);
            if (ROPE) {
#pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    const int at = s / PER * dsa__cu_hopper_smem::tile + 8 * DSA__CU_CHUNK + s % PER * 1024;
                    if (TWO) {
                        dsa__cu_store16(to0 + at, rope[s][0]);
                        dsa__cu_store16(to1 + at, rope[s][1]);
                    } else {
                        const unsigned char *from = row[s] ? row[s] + 528 + 32 * u : A.pool.data;
                        dsa__cu_copy16(to0 + at, from, row[s] != NULL);
                        dsa__cu_copy16(to1 + at, from + 16, row[s] != NULL);
                    }
                }
                if (!TWO) dsa__cu_bar_arrive_copies(full);
            }
            if (lane == 0) {
#pragma unroll
                for (int t = 0; t < SLOTS / PER; t++) {
                    const uint32_t at = valid + 4 * W * (rank + t) + 4 * p;
                    asm volatile("st.shared.u32 [%0], %1;" :: "r"(at), "r"(bits[t]) : "memory");
                    if (TWO) dsa__cu_peer_store4(dsa__cu_peer(at, rank ^ 1), bits[t], far_full);
                }
            }
#pragma unroll
            for (int g = 0; g < 4; g++) {
                if (g == 4 - AHEAD) {                    /* what is loaded from here on belongs to the next leaf */
#pragma unroll
                    for (int s = 0; s < SLOTS; s++) row[s] = i + 1 < U.n ? dsa__cu_row(A, E, next[s]) : NULL;
#pragma unroll
                    for (int s = 0; s < SLOTS; s++) {
                        next[s] = dsa__cu_entry(E, (U.first + i + 2) * 128 + (rank + s / PER) * 64 + 8 * (PER * p + s % PER) + sub);
                        if (!TWO) dsa__cu_prefetch_fp8(row[s], u);
                    }
                }
                if (it > 0) {
                    dsa__cu_bar_wait(empty + 8 * g, (it + 1) & 1);
                    dsa__cu_bar_wait(empty + 8 * (g + 4), (it + 1) & 1);
                }
#pragma unroll
                for (int s = 0; s < SLOTS; s++) {
#pragma unroll
                    for (int x = 0; x < 2; x++) {
                        const uint4 y = v[g % AHEAD][s][x];
                        const float f = __uint_as_float(x ? g < 2 ? scale[s].z : scale[s].w : g < 2 ? scale[s].x : scale[s].y);
                        const uint2 a0 = dsa__cu_widen4(y.x, f), a1 = dsa__cu_widen4(y.y, f), a2 = dsa__cu_widen4(y.z, f),
                            a3 = dsa__cu_widen4(y.w, f);
                        const int at = s / PER * dsa__cu_hopper_smem::tile + (g + 4 * x) * DSA__CU_CHUNK + s % PER * 1024;
                        v[g % AHEAD][s][x] = dsa__cu_load16(row[s] + 256 * x + (g + AHEAD) % 4 * 64 + 16 * u, row[s] != NULL);
                        dsa__cu_store16(to0 + at, make_uint4(a0.x, a0.y, a1.x, a1.y));
                        dsa__cu_store16(to1 + at, make_uint4(a2.x, a2.y, a3.x, a3.y));
                    }
                    if (g == 3) {
                        scale[s] = dsa__cu_load16(row[s] + 512, row[s] != NULL);
                        if (TWO && ROPE) {
                            rope[s][0] = dsa__cu_load16(row[s] + 528 + 32 * u, row[s] != NULL);
                            rope[s][1] = dsa__cu_load16(row[s] + 544 + 32 * u, row[s] != NULL);
                        }
                    }
                }
                if (TWO) dsa__cu_proxy_fence();
                __syncwarp();
                if (TWO && lane < (g == 0 && ROPE ? 3 : 2)) {
                    const uint32_t at = (lane == 2 ? 8 : g + 4 * lane) * DSA__CU_CHUNK;
                    dsa__cu_peer_copy(far8 + at, warp8 + at, 1024, far_full + 8 * g);
                }
                /* a warp of the other block sends 8 rows of two chunks; with the first the rope and the bits */
                if (lane == 0) {
                    if (TWO) dsa__cu_bar_arrive_expect(full + 8 * g, 2048 + (g ? 0 : 8 * 2 * ROPE + 4));
                    else dsa__cu_bar_arrive(full + 8 * g);
                }
            }
        }
    }
}

template <int ROPE, bool FP8, bool SPLIT, bool TWO>
static __global__ void __launch_bounds__(TWO ? 512 : 384, 1) dsa__cu_attend_hopper(const __grid_constant__ dsa__cu_attend A)
{
    using S = dsa__cu_hopper_smem;
    extern __shared__ __align__(1024) unsigned char smem[];
    const uint32_t base = dsa__cu_smem(smem), kv = base + S::kv, full = base + S::bars, empty = full + 32;
    uint32_t *valid = (uint32_t *)(smem + S::valid);                        /* of a producer's warp: [2][4] x 16 bits, TWO [2][8] x 8 */
    const uint32_t q_full = empty + 72, q_free = empty + 80;
    const int tid = threadIdx.x, lane = tid & 31, w = __shfl_sync(~0u, tid >> 7, 0);

    if (tid == 0) {
        dsa__cu_bar_init(q_full, TWO ? 256 : 128);
        dsa__cu_bar_init(q_free, 8);
        for (int i = 0; i < 4; i++)
            dsa__cu_bar_init(full + 8 * i, TWO ? 8 : FP8 ? 4 + (ROPE && i == 0 ? 128 : 0) : i ? 128 : 132);
        for (int i = 0; i < 9; i++) dsa__cu_bar_init(empty + 8 * i, (i < 8 ? 4 : 8) * (TWO ? 2 : 1));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (TWO) dsa__cu_cluster_sync();
    dsa__cu_wait_launch();
    if (SPLIT) dsa__cu_let_launch();                     /* the merge may take its place; it waits for our end */

    if (w >= 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(TWO ? 56 : FP8 ? 104 : 88));
        if (FP8) dsa__cu_produce_fp8<ROPE, SPLIT, TWO>(A, kv, full, empty, base + S::valid);
        else     dsa__cu_produce_bf16<ROPE, SPLIT>(A, kv, full, empty, valid);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(FP8 ? 200 : 208));
        constexpr int DIM = 512 + ROPE;
        /* the maximum is taken before the scale, so that must be positive */
        const bool flip = A.scale < 0.0f;
        const float scale = fabsf(A.scale) * DSA__CU_LOG2E;
        const int me = tid & 127;
        const uint32_t qd = dsa__cu_desc(base), kd = dsa__cu_desc(kv + w * S::tile), vd = dsa__cu_desc(kv + w * 4 * DSA__CU_CHUNK);
        const uint32_t swap = base + S::swap + me * 8, p_mine = kv + w * S::tile + 8 * DSA__CU_CHUNK + me * 16;
        const uint32_t p_other = kv + (1 - w) * S::tile + 8 * DSA__CU_CHUNK + me * 16;
        const uint32_t far_empty = TWO ? dsa__cu_peer(empty, (blockIdx.x & 1) ^ 1) : 0;
        uint32_t it = 0;
        int turn = 0;
        for (int unit = blockIdx.x; unit < A.n_units; unit += gridDim.x) {
            const dsa__cu_unit U = dsa__cu_unit_of<SPLIT>(A, unit, dsa__cu_entries_of(A, dsa__cu_unit_row(A, unit)).count);
            const int head = U.group * 64 + 16 * ((tid >> 5) & 3) + (lane >> 2);                           /* and head + 8 */
            dsa__cu_bar_wait(q_full, turn++ & 1);
            if (U.n == 0) {
                __syncwarp();
                if (lane == 0) dsa__cu_bar_arrive(q_free);
            }
            float O[4][32], M0 = -INFINITY, M1 = -INFINITY, L0 = 0.0f, L1 = 0.0f;
#pragma unroll
            for (int c = 0; c < 4; c++)
#pragma unroll
                for (int j = 0; j < 32; j++) O[c][j] = 0.0f;

            for (int i = 0; i < U.n; i++, it++) {
                float m0 = -INFINITY, m1 = -INFINITY, l0 = 0.0f, l1 = 0.0f, a0 = 0.0f, a1 = 0.0f, b0 = 0.0f, b1 = 0.0f;
                uint32_t p[8][4];                                           /* weights of both tiles, tile 0 first */
                {
                    float s[32];
#pragma unroll
                    for (int k = 0; k < DIM / 16; k++) {
                        const int c = k < 32 ? (k >> 3) + (k & 4) : 8, at = (c * DSA__CU_CHUNK + (k & 3) * 32) >> 4;
                        if (k % 8 == 0 && k < 32) {
                            dsa__cu_bar_wait(full + k, it & 1);
                            dsa__cu_proxy_fence();
                            dsa__cu_wgmma_fence();
                        }
                        dsa__cu_wgmma_ss(s, qd + at, kd + at, k > 0);
                        if (k % 8 == 7 || k == DIM / 16 - 1) dsa__cu_wgmma_commit();
                    }
                    dsa__cu_wgmma_wait<0>();
                    if (i == U.n - 1) {
                        __syncwarp();
                        if (lane == 0) dsa__cu_bar_arrive(q_free);
                    }
                    const uint64_t all = dsa__cu_valid<TWO>(base + S::valid, w);
                    if (flip) {
#pragma unroll
                        for (int j = 0; j < 32; j++) s[j] = -s[j];
                    }
                    if (all != ~(uint64_t)0) {
                        const uint64_t bits = all >> (2 * (lane & 3));
#pragma unroll
                        for (int j = 0; j < 32; j++) if (!(bits >> (8 * (j >> 2) + (j & 1)) & 1)) s[j] = -INFINITY;
                    }
#pragma unroll
                    for (int j = 0; j < 32; j += 4) {
                        m0 = fmaxf(m0, fmaxf(s[j], s[j + 1]));
                        m1 = fmaxf(m1, fmaxf(s[j + 2], s[j + 3]));
                    }
                    m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 1)); m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 2));
                    m1 = fmaxf(m1, __shfl_xor_sync(~0u, m1, 1)); m1 = fmaxf(m1, __shfl_xor_sync(~0u, m1, 2));
                    dsa__cu_store8(swap + w * 1024, m0, m1);
                    dsa__cu_bar(1, 256);
                    const float2 o = dsa__cu_read8(swap + (1 - w) * 1024);
                    m0 = __fmul_rn(fmaxf(m0, o.x), scale);
                    m1 = __fmul_rn(fmaxf(m1, o.y), scale);
                    const float z0 = m0 == -INFINITY ? 0.0f : -m0, z1 = m1 == -INFINITY ? 0.0f : -m1;
                    uint32_t mine[4][4];
#pragma unroll
                    for (int k = 0; k < 4; k++) {
#pragma unroll
                        for (int t = 0; t < 2; t++) {
                            const float *x = s + 8 * k + 4 * t;
                            float e0 = dsa__cu_exp2(__fmaf_rn(x[0], scale, z0)), e1 = dsa__cu_exp2(__fmaf_rn(x[1], scale, z0));
                            float f0 = dsa__cu_exp2(__fmaf_rn(x[2], scale, z1)), f1 = dsa__cu_exp2(__fmaf_rn(x[3], scale, z1));
                            l0 += e0 + e1;
                            l1 += f0 + f1;
                            mine[k][2 * t] = dsa__cu_pack(e0, e1);
                            mine[k][2 * t + 1] = dsa__cu_pack(f0, f1);
                        }
                        dsa__cu_store16(p_mine + k * 2048, make_uint4(mine[k][0], mine[k][1], mine[k][2], mine[k][3]));
                    }
                    l0 += __shfl_xor_sync(~0u, l0, 1); l0 += __shfl_xor_sync(~0u, l0, 2);
                    l1 += __shfl_xor_sync(~0u, l1, 1); l1 += __shfl_xor_sync(~0u, l1, 2);
                    dsa__cu_store8(swap + 2048 + w * 1024, l0, l1);
                    dsa__cu_bar(1, 256);
                    const float2 r = dsa__cu_read8(swap + 2048 + (1 - w) * 1024);
                    l0 = l0 + r.x;                                          /* the same either way round */
                    l1 = l1 + r.y;
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        uint4 v = dsa__cu_read16(p_other + k * 2048);
                        const uint32_t other[4] = { v.x, v.y, v.z, v.w };
#pragma unroll
                        for (int t = 0; t < 4; t++) {
                            p[k][t] = w ? other[t] : mine[k][t];
                            p[4 + k][t] = w ? mine[k][t] : other[t];
                        }
                    }
                    __syncwarp();
                    if (lane == 0) {
                        dsa__cu_bar_arrive(empty + 64);
                        if (TWO) dsa__cu_peer_arrive(far_empty + 64);
                    }
                }
                const int64_t at = SPLIT ? ((int64_t)U.row * A.n_leaves + U.first + i) * A.n_heads + head : 0;
                if (SPLIT) {
                    if (w == 0 && (lane & 3) == 0) {
                        if (head < A.n_heads)     *(float2 *)(A.stats + 2 * at)       = make_float2(m0, l0);
                        if (head + 8 < A.n_heads) *(float2 *)(A.stats + 2 * (at + 8)) = make_float2(m1, l1);
                    }
                } else {
                    dsa__cu_fold(M0, L0, m0, l0, a0, b0);
                    dsa__cu_fold(M1, L1, m1, l1, a1, b1);
                }
                const bool same = __all_sync(~0u, a0 == 1.0f && a1 == 1.0f);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float x[32], *o = O[c];
                    dsa__cu_wgmma_fence();
#pragma unroll
                    for (int k = 0; k < 8; k++) dsa__cu_wgmma_rs(x, p[k],
                        vd + (((k >> 2) * S::tile + c * DSA__CU_CHUNK + (k & 3) * 2048) >> 4), k > 0);
                    dsa__cu_wgmma_commit();
                    dsa__cu_wgmma_wait<0>();
                    __syncwarp();
                    if (lane == 0) {
                        dsa__cu_bar_arrive(empty + 8 * (4 * w + c));
                        if (TWO) dsa__cu_peer_arrive(far_empty + 8 * (4 * w + c));
                    }
                    if (SPLIT) {
                        float *to = A.parts + at * 512 + w * 256 + c * 64 + 2 * (lane & 3);
                        if (head < A.n_heads) {
#pragma unroll
                            for (int j = 0; j < 8; j++) *(float2 *)(to + 8 * j) = make_float2(x[4 * j], x[4 * j + 1]);
                        }
                        if (head + 8 < A.n_heads) {
#pragma unroll
                            for (int j = 0; j < 8; j++) *(float2 *)(to + 8 * j + 8 * 512) = make_float2(x[4 * j + 2], x[4 * j + 3]);
                        }
                    } else {
                        if (!same) {
#pragma unroll
                            for (int j = 0; j < 32; j++) o[j] = __fmul_rn(j & 2 ? a1 : a0, o[j]);
                        }
#pragma unroll
                        for (int j = 0; j < 32; j++) o[j] = __fmaf_rn(j & 2 ? b1 : b0, x[j], o[j]);
                    }
                }
            }
            if (!SPLIT) dsa__cu_attend_end(A, O, M0, M1, L0, L1, U.row, U.group, w);
        }
    }
    if (TWO) dsa__cu_cluster_sync();                     /* nobody leaves while the other block may still reach for its memory */
}

/* One row of FP8 entries, at most 16 leaves: what a step of one stream attends. Its time is latency: so a leaf has a block for each half
   of the columns, 64 blocks for 128 heads, and all leaves of a half and a head group are a cluster, whose blocks fold each a few heads:
   neither partial results in global memory nor a second launch. All 16 warps widen rows, group of chunks by group, while the tensor
   cores score what came before. Each sum and each fold is the one of dsa__cu_attend_hopper and dsa__cu_attend_merge, so are the bits. */
template <int ROPE>
static __global__ void __launch_bounds__(512, 1) dsa__cu_attend_one(const __grid_constant__ dsa__cu_attend A)
{
    using S = dsa__cu_one_smem;
    constexpr int DIM = 512 + ROPE;
    extern __shared__ __align__(1024) unsigned char smem[];
    const uint32_t base = dsa__cu_smem(smem), kv = base + S::kv, stat_bar = base + S::bars, x_bar = stat_bar + 8;
    const int tid = threadIdx.x, lane = tid & 31, w = __shfl_sync(~0u, tid >> 7, 0), groups = (A.n_heads + 63) / 64;
    const int leaf = blockIdx.x & 15, half = blockIdx.x >> 4 & 1, group = (blockIdx.x >> 5) % groups, row = (blockIdx.x >> 5) / groups;
    if (tid == 0) {
        dsa__cu_bar_init(stat_bar, 1);
        dsa__cu_bar_init(x_bar, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        dsa__cu_bar_arrive_expect(stat_bar, 16 * 32);
        dsa__cu_bar_arrive_expect(x_bar, 16 * 4096);
    }
    __syncthreads();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    dsa__cu_let_launch();
    if (!A.early) dsa__cu_wait_launch();
    const dsa__cu_entries E = dsa__cu_entries_of(A, row);
    {
        const int r = tid >> 3, u = tid & 7, on = group * 64 + r < A.n_heads;
        const __nv_bfloat16 *q = on ? A.q16 + ((int64_t)row * A.n_heads + group * 64 + r) * DIM + u * 8 : A.q16;
        const uint32_t to = base + r * 128 + ((u ^ (r & 7)) << 4);
#pragma unroll
        for (int c = 0; c < DIM / 64; c++) dsa__cu_copy16(to + c * DSA__CU_CHUNK, q + (on ? c * 64 : 0), on);
    }
    if (A.early) {
        /* while the selection runs: the table into the L1, and the translations of the addresses that are read later */
        const int64_t blocks = E.table ? ((int64_t)E.limit + A.pool.page_size - 1) / A.pool.page_size : 0;
        for (int64_t i = 8 * tid; i < blocks && i < 4096; i += 8 * 512) {
            int32_t x;
            asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(x) : "l"(E.table + i));
        }
        if (tid < 4 && E.list && leaf * 128 + tid * 32 < E.count)
            asm volatile("prefetch.global.L2 [%0];" :: "l"(E.list + leaf * 128 + tid * 32));
        if (((size_t)tid << 21) < (size_t)A.pool.n_pages * A.pool.page_stride)
            asm volatile("prefetch.global.L2 [%0];" :: "l"(A.pool.data + ((size_t)tid << 21)));
        dsa__cu_wait_launch();
    }
    const int key = tid >> 2, u = tid & 3, sub = key & 7;                   /* four threads of a row: of 64 bytes 16 each */
    const unsigned char *from = dsa__cu_row(A, E, dsa__cu_entry(E, leaf * 128 + key));
    const int on = from != NULL;
    uint4 v[4][2];
#pragma unroll
    for (int g = 0; g < 4; g++)
#pragma unroll
        for (int x = 0; x < 2; x++) v[g][x] = dsa__cu_load16(from + 256 * x + 64 * g + 16 * u, on);
    const uint4 scales = dsa__cu_load16(from + 512, on);
    const uint32_t to = kv + (key >> 6) * S::tile + (key & 63) * 128;
    const uint32_t to0 = to + (((2 * u) ^ sub) << 4), to1 = to + (((2 * u + 1) ^ sub) << 4);
    if (ROPE) {
        dsa__cu_copy16(to0 + 8 * DSA__CU_CHUNK, on ? from + 528 + 32 * u : A.pool.data, on);
        dsa__cu_copy16(to1 + 8 * DSA__CU_CHUNK, on ? from + 544 + 32 * u : A.pool.data, on);
    }
    dsa__cu_copy_commit();
    {
        uint32_t ball = __ballot_sync(~0u, on && u == 0), bits = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) bits |= (ball >> (4 * j) & 1) << j;
        if (lane == 0) smem[S::valid + (tid >> 5)] = (unsigned char)bits;
    }
    const auto widen = [&](int g) {
#pragma unroll
        for (int x = 0; x < 2; x++) {
            const uint4 y = v[g][x];
            const float f = __uint_as_float(x ? g < 2 ? scales.z : scales.w : g < 2 ? scales.x : scales.y);
            const uint2 a0 = dsa__cu_widen4(y.x, f), a1 = dsa__cu_widen4(y.y, f), a2 = dsa__cu_widen4(y.z, f), a3 = dsa__cu_widen4(y.w, f);
            dsa__cu_store16(to0 + (g + 4 * x) * DSA__CU_CHUNK, make_uint4(a0.x, a0.y, a1.x, a1.y));
            dsa__cu_store16(to1 + (g + 4 * x) * DSA__CU_CHUNK, make_uint4(a2.x, a2.y, a3.x, a3.y));
        }
        if (g == 0) dsa__cu_copy_wait<0>();
        dsa__cu_proxy_fence();
        dsa__cu_bar(2, 512);
    };

    if (w < 2) {
        const uint32_t qd = dsa__cu_desc(base), kd = dsa__cu_desc(kv + w * S::tile);
        const uint32_t vd = dsa__cu_desc(kv + (4 * half + 2 * w) * DSA__CU_CHUNK);
        float s[32];
#pragma unroll
        for (int g = 0; g < 4; g++) {
            widen(g);
            dsa__cu_wgmma_fence();
#pragma unroll
            for (int k = 8 * g; k < 8 * g + 8; k++) {
                const int c = (k >> 3) + (k & 4), at = (c * DSA__CU_CHUNK + (k & 3) * 32) >> 4;
                dsa__cu_wgmma_ss(s, qd + at, kd + at, k > 0);
            }
            if (ROPE && g == 3) {
#pragma unroll
                for (int k = 0; k < 4; k++)
                    dsa__cu_wgmma_ss(s, qd + ((8 * DSA__CU_CHUNK + k * 32) >> 4), kd + ((8 * DSA__CU_CHUNK + k * 32) >> 4), 1);
            }
            dsa__cu_wgmma_commit();
        }
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  /* everybody's barriers are there */
        const bool flip = A.scale < 0.0f;                                   /* the maximum is taken before the scale */
        const float scale = fabsf(A.scale) * DSA__CU_LOG2E;
        const int me = tid & 127;
        const uint32_t swap = base + S::swap + me * 8, p_mine = kv + w * S::tile + 8 * DSA__CU_CHUNK + me * 16;
        const uint32_t p_other = kv + (1 - w) * S::tile + 8 * DSA__CU_CHUNK + me * 16;
        float m0 = -INFINITY, m1 = -INFINITY, l0 = 0.0f, l1 = 0.0f;
        uint32_t p[8][4];
        dsa__cu_wgmma_wait<0>();
        const float2 set = dsa__cu_read8(base + S::valid + 8 * w);
        const uint64_t all = (uint64_t)__float_as_uint(set.y) << 32 | __float_as_uint(set.x);
        if (flip) {
#pragma unroll
            for (int j = 0; j < 32; j++) s[j] = -s[j];
        }
        if (all != ~(uint64_t)0) {
            const uint64_t bits = all >> (2 * (lane & 3));
#pragma unroll
            for (int j = 0; j < 32; j++) if (!(bits >> (8 * (j >> 2) + (j & 1)) & 1)) s[j] = -INFINITY;
        }
#pragma unroll
        for (int j = 0; j < 32; j += 4) {
            m0 = fmaxf(m0, fmaxf(s[j], s[j + 1]));
            m1 = fmaxf(m1, fmaxf(s[j + 2], s[j + 3]));
        }
        m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 1)); m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 2));
        m1 = fmaxf(m1, __shfl_xor_sync(~0u, m1, 1)); m1 = fmaxf(m1, __shfl_xor_sync(~0u, m1, 2));
        dsa__cu_store8(swap + w * 1024, m0, m1);
        dsa__cu_bar(1, 256);
        const float2 o = dsa__cu_read8(swap + (1 - w) * 1024);
        m0 = __fmul_rn(fmaxf(m0, o.x), scale);
        m1 = __fmul_rn(fmaxf(m1, o.y), scale);
        const float z0 = m0 == -INFINITY ? 0.0f : -m0, z1 = m1 == -INFINITY ? 0.0f : -m1;
        uint32_t mine[4][4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const float *x = s + 8 * k + 4 * t;
                float e0 = dsa__cu_exp2(__fmaf_rn(x[0], scale, z0)), e1 = dsa__cu_exp2(__fmaf_rn(x[1], scale, z0));
                float f0 = dsa__cu_exp2(__fmaf_rn(x[2], scale, z1)), f1 = dsa__cu_exp2(__fmaf_rn(x[3], scale, z1));
                l0 += e0 + e1;
                l1 += f0 + f1;
                mine[k][2 * t] = dsa__cu_pack(e0, e1);
                mine[k][2 * t + 1] = dsa__cu_pack(f0, f1);
            }
            dsa__cu_store16(p_mine + k * 2048, make_uint4(mine[k][0], mine[k][1], mine[k][2], mine[k][3]));
        }
        l0 += __shfl_xor_sync(~0u, l0, 1); l0 += __shfl_xor_sync(~0u, l0, 2);
        l1 += __shfl_xor_sync(~0u, l1, 1); l1 += __shfl_xor_sync(~0u, l1, 2);
        dsa__cu_store8(swap + 2048 + w * 1024, l0, l1);
        dsa__cu_bar(1, 256);
        const float2 r = dsa__cu_read8(swap + 2048 + (1 - w) * 1024);
        l0 = l0 + r.x;                                                      /* the same either way round */
        l1 = l1 + r.y;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint4 y = dsa__cu_read16(p_other + k * 2048);
            const uint32_t other[4] = { y.x, y.y, y.z, y.w };
#pragma unroll
            for (int t = 0; t < 4; t++) {
                p[k][t] = w ? other[t] : mine[k][t];
                p[4 + k][t] = w ? mine[k][t] : other[t];
            }
        }
        /* Block b of the cluster folds heads 4 b .. 4 b + 3. What it gets of a leaf also says that the leaf's scores are done: the other
           half of its columns is free. */
        const int head = 16 * (me >> 5) + (lane >> 2);
        if (w == 0 && (lane & 3) < 2) {
            const int h = head + 8 * (lane & 1);
            const uint32_t rank = (uint32_t)h >> 2, at = base + S::stats + leaf * 32 + (h & 3) * 8;
            const float m = lane & 1 ? m1 : m0, l = lane & 1 ? l1 : l0;
            asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];"
                :: "r"(dsa__cu_peer(at, rank)), "r"(__float_as_uint(m)), "r"(__float_as_uint(l)), "r"(dsa__cu_peer(stat_bar, rank))
                : "memory");
        }
        float x[2][32];
        dsa__cu_wgmma_fence();
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int k = 0; k < 8; k++) dsa__cu_wgmma_rs(x[c], p[k], vd + (((k >> 2) * S::tile + c * DSA__CU_CHUNK + (k & 3) * 2048) >> 4),
                k > 0);
            dsa__cu_wgmma_commit();
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const uint32_t at = base + head * S::row + ((2 * w + c) * 64 + 2 * (lane & 3)) * 4;
            if (c == 0) dsa__cu_wgmma_wait<1>();
            else dsa__cu_wgmma_wait<0>();
#pragma unroll
            for (int j = 0; j < 8; j++) {
                dsa__cu_store8(at + 32 * j, x[c][4 * j], x[c][4 * j + 1]);
                dsa__cu_store8(at + 32 * j + 8 * S::row, x[c][4 * j + 2], x[c][4 * j + 3]);
            }
        }
        dsa__cu_proxy_fence();
        dsa__cu_bar(1, 256);
        if (tid < 64) {
            dsa__cu_receive(stat_bar, 0);                                   /* all have scored */
            /* Everybody begins with another block. What a block keeps goes by small stores: a bulk copy to oneself is sound, but
               compute-sanitizer takes it for a write beyond the cluster. */
            const uint32_t rank = ((uint32_t)tid / 4 + leaf) % 16, r = 4 * rank + tid % 4;
            const uint32_t at = kv + (leaf >> 3) * S::tile + (1 - half) * 4 * DSA__CU_CHUNK + (leaf & 7) * 4096;
            if (tid >= 4) dsa__cu_peer_copy(dsa__cu_peer(at + tid % 4 * 1024, rank), base + r * S::row, 1024, dsa__cu_peer(x_bar, rank));
#pragma unroll
            for (int j = 0; j < 4; j++)
                dsa__cu_send16(dsa__cu_peer(at + j * 1024 + tid * 16, leaf), dsa__cu_read16(base + (4 * leaf + j) * S::row + tid * 16),
                    dsa__cu_peer(x_bar, leaf));
        }
    } else {                                             /* warps 8 .. 11: how the leaves of a head are folded */
        const int h = (tid >> 5) & 3, head = group * 64 + 4 * leaf + h;
        const int n = w == 2 ? (E.count + 127) / 128 : 0;
#pragma unroll
        for (int g = 0; g < 4; g++) widen(g);
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
        if (w == 2) dsa__cu_receive(stat_bar, 0);
        const float2 st = lane < n && lane < 16 ? dsa__cu_read8(base + S::stats + lane * 32 + h * 8) : make_float2(-INFINITY, 0.0f);
        float top = st.x, before, a, b, L = 0.0f;
#pragma unroll
        for (int k = 1; k < 16; k *= 2) {
            float o = __shfl_up_sync(~0u, top, k);
            if (lane >= k) top = fmaxf(top, o);
        }
        before = __shfl_up_sync(~0u, top, 1);
        if (lane == 0) before = -INFINITY;
        dsa__cu_weigh(before, st.x, a, b);
        if (w == 2 && lane < 16) dsa__cu_store8(base + S::coef + h * 128 + lane * 8, a, b);
        for (int k = 0; k < n; k++) L = __fmaf_rn(__shfl_sync(~0u, b, k), __shfl_sync(~0u, st.y, k), __fmul_rn(__shfl_sync(~0u, a, k), L));
        const float M = __shfl_sync(~0u, top, n > 0 ? n - 1 : 0);
        if (w == 2 && lane == 0 && head < A.n_heads) {
            *(float *)(smem + S::end + 4 * h) = dsa__cu_norm(M, L, dsa__cu_sink(A, head));
            if (half == 0) dsa__cu_stats(A, (int64_t)row * A.n_heads + head, M, L);
        }
    }
    __syncthreads();
    dsa__cu_receive(x_bar, 0);
    {
        const int h = tid >> 7, col = 2 * (tid & 127), head = group * 64 + 4 * leaf + h, n = (E.count + 127) / 128;
        const uint32_t at = kv + (1 - half) * 4 * DSA__CU_CHUNK + h * 1024 + col * 4;
        float2 O = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            if (i < n) {
                const float2 x = dsa__cu_read8(at + (i >> 3) * S::tile + (i & 7) * 4096);
                const float2 c = dsa__cu_read8(base + S::coef + h * 128 + i * 8);
                O.x = __fmaf_rn(c.y, x.x, __fmul_rn(c.x, O.x));
                O.y = __fmaf_rn(c.y, x.y, __fmul_rn(c.x, O.y));
            }
        }
        if (head < A.n_heads) {
            const float f = *(const float *)(smem + S::end + 4 * h);
            dsa__cu_put2(A, ((int64_t)row * A.n_heads + head) * 512 + half * 256 + col, O.x * f, O.y * f);
        }
    }
    dsa__cu_cluster_sync();                              /* what was sent from here has arrived */
}
#else
template <int ROPE> static __global__ void dsa__cu_attend_one(const __grid_constant__ dsa__cu_attend A) { (void)A; }
template <int ROPE, bool FP8, bool SPLIT, bool TWO>
static __global__ void dsa__cu_attend_hopper(const __grid_constant__ dsa__cu_attend A) { (void)A; }
#endif

/* ---- launch ---------------------------------------------------------------------------------------- */
static cudaError_t dsa__cu_attend_init(void)
{
    const cudaError_t e = cudaFuncSetAttribute(dsa__cu_attend_one<64>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return e ? e : cudaFuncSetAttribute(dsa__cu_attend_one<0>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

static int dsa__cu_attend_is_hopper(const dsa__cu *g, const dsa__cu_attend *A)
{
    return g->path == DSA_CUDA_HOPPER && A->pool.dim == 512 && (A->pool.dim_rope == 64 || A->pool.dim_rope == 0) && A->dim_v == 512 &&
           (((uintptr_t)A->pool.data | A->pool.row_stride | A->pool.page_stride) & 15) == 0;
}

static int dsa__cu_attend_leaf(const dsa__cu *g, const dsa__cu_attend *A)
{
    return dsa__cu_attend_is_hopper(g, A) ? DSA__CU_LEAF_HOPPER : DSA__CU_LEAF_PORTABLE;
}

#define DSA__CU_PARTS_MOST ((size_t)128 << 20)

/* dsa__cu_attend_one takes it: n_leaves is known. Its clusters want a GPC each. */
static int dsa__cu_attend_is_one(const dsa__cu *g, const dsa__cu_attend *A)
{
    return dsa__cu_attend_is_hopper(g, A) && A->pool.format == DSA_FP8 && g->cluster == 16 && A->n_leaves >= 4 && A->n_leaves <= 16 &&
           A->batch.n_rows * ((A->n_heads + 63) / 64) <= 2;
}

/* Which calls tensor cores take; dsa__cu_attend_reference takes the others. */
static int dsa__cu_attend_takes(const dsa__cu *g, const dsa__cu_attend *A)
{
    const int64_t R = A->pool.dim, r = A->pool.dim_rope;
    const int small = R + r <= 320 && A->dim_v <= 256, fp8 = A->pool.format == DSA_FP8;
    const size_t shared = small ? fp8 ? dsa__cu_portable_smem<320>::bytes_fp8 : dsa__cu_portable_smem<320>::bytes_bf16
                                : fp8 ? dsa__cu_portable_smem<576>::bytes_fp8 : dsa__cu_portable_smem<576>::bytes_bf16;
    if (!dsa__cu_attend_is_hopper(g, A) && shared > (size_t)g->shared) return 0;
    if (g->path == DSA_CUDA_REFERENCE || A->exact || (A->pool.format != DSA_BF16 && !fp8)) return 0;
    if (R % 8 || r % 8 || A->dim_v % 8 || A->dim_v > 512 || R + r > 576) return 0;
    const int64_t raw = R + (R + 127) / 128 * 4 + 2 * r;
    if (fp8 && raw > (small ? dsa__cu_portable_smem<320>::raw_row : dsa__cu_portable_smem<576>::raw_row)) return 0;
    if ((((uintptr_t)(A->q_bf16 ? A->q : NULL) | (uintptr_t)A->out) & 15) != 0) return 0;
    if ((((uintptr_t)A->pool.data | A->pool.row_stride | A->pool.page_stride) & 3) != 0) return 0;
    return A->batch.n_rows * ((A->n_heads + 31) / 32) * (int64_t)(g->n_sm + 1) < INT32_MAX;
}

/* Blocks that share a row's list: fills n_chunks, leaves_per_chunk, n_leaves and returns the bytes of workspace (0: no sharing). Sharing
   pays while a few rows leave multiprocessors idle and the leaves' outputs (dim_v floats per head and leaf) stay in the L2. */
static size_t dsa__cu_attend_plan(const dsa__cu *g, dsa__cu_attend *A)
{
    const int hopper = dsa__cu_attend_is_hopper(g, A), leaf = dsa__cu_attend_leaf(g, A), per = hopper ? 64 : 32;
    const int64_t units = (int64_t)A->batch.n_rows * ((A->n_heads + per - 1) / per);
    int64_t chunks;
    A->n_leaves = (A->k + leaf - 1) / leaf;
    A->leaves_per_chunk = A->n_leaves;
    A->n_chunks = 1;
    if (dsa__cu_attend_is_one(g, A)) return 0;
    chunks = units > 0 ? g->n_sm / units : 1;
    if (chunks < 4) chunks = 1;
    if (chunks > A->n_leaves) chunks = A->n_leaves;
    if (chunks < 1) chunks = 1;
    A->leaves_per_chunk = chunks > 1 ? (int32_t)((A->n_leaves + chunks - 1) / chunks) : A->n_leaves;
    A->n_chunks = chunks > 1 ? (A->n_leaves + A->leaves_per_chunk - 1) / A->leaves_per_chunk : 1;
    if (A->n_chunks <= 1) return 0;
    chunks = (int64_t)A->batch.n_rows * A->n_leaves * A->n_heads * (A->dim_v + 2) * (int64_t)sizeof(float);
    if (chunks <= (int64_t)DSA__CU_PARTS_MOST) return (size_t)chunks;
    A->leaves_per_chunk = A->n_leaves;                   /* a long dense range: its leaves would not stay in the L2 */
    A->n_chunks = 1;
    return 0;
}

/* Bytes that any number of rows up to the call's needs: only few rows are shared. */
static size_t dsa__cu_attend_most(const dsa__cu *g, const dsa__cu_attend *A)
{
    dsa__cu_attend few = *A;
    size_t most = 0;
    for (few.batch.n_rows = A->batch.n_rows < g->n_sm ? A->batch.n_rows : g->n_sm; few.batch.n_rows > 0; few.batch.n_rows--) {
        const size_t bytes = dsa__cu_attend_plan(g, &few);
        if (bytes > most) most = bytes;
    }
    return most;
}

/* A planned call (dsa__cu_attend_plan has seen it). workspace: as many bytes as the plan said, on 16 bytes. */
static cudaError_t dsa__cu_attend_run(const dsa__cu *g, const dsa__cu_attend *call, void *workspace, cudaStream_t stream)
{
    dsa__cu_attend A = *call;
    const int hopper = dsa__cu_attend_is_hopper(g, &A), D = A.pool.dim + A.pool.dim_rope, split = A.n_chunks > 1,
        fp8 = A.pool.format == DSA_FP8;
    const int per = hopper ? 64 : 32;
    const int64_t grid = (int64_t)A.batch.n_rows * A.n_chunks * ((A.n_heads + per - 1) / per);
    void *args[2] = { &A, NULL };
    cudaError_t err;
    int leaf = dsa__cu_attend_leaf(g, &A);
    if (A.batch.n_rows == 0) return cudaSuccess;
    if (grid > 0x7FFFFFFF || D % 8 || A.dim_v % 8 || A.dim_v > D || D > 576 || A.dim_v > 512) return cudaErrorInvalidValue;
    if (dsa__cu_attend_is_one(g, &A)) {
        const dim3 blocks((unsigned)(A.batch.n_rows * ((A.n_heads + 63) / 64) * 32));
        return A.pool.dim_rope ? dsa__cu_launch(dsa__cu_attend_one<64>, blocks, 512, dsa__cu_one_smem::bytes, stream, 1, 16, args)
                               : dsa__cu_launch(dsa__cu_attend_one<0>, blocks, 512, dsa__cu_one_smem::bytes, stream, 1, 16, args);
    }
    A.parts = (float *)workspace;
    A.stats = split ? A.parts + (size_t)A.batch.n_rows * A.n_leaves * A.n_heads * A.dim_v : NULL;
    if (hopper) {
        const int groups = (A.n_heads + 63) / 64, two = fp8 && groups == 2;
        const int64_t all = grid < g->n_sm ? grid : two ? g->n_sm & ~1 : g->n_sm;                    /* blocks that stay */
        A.n_units = (int32_t)grid;
#define DSA__CU_GO(ROPE, F, SP, TWO) dsa__cu_launch(dsa__cu_attend_hopper<ROPE, F, SP, TWO>, dim3((unsigned)all), TWO ? 512 : 384, \
        dsa__cu_hopper_smem::bytes, stream, 1, TWO ? 2 : 1, args)
#define DSA__CU_GO6(ROPE) !fp8 ? split ? DSA__CU_GO(ROPE, false, true, false) : DSA__CU_GO(ROPE, false, false, false) \
        : two ? split ? DSA__CU_GO(ROPE, true, true, true) : DSA__CU_GO(ROPE, true, false, true) \
              : split ? DSA__CU_GO(ROPE, true, true, false) : DSA__CU_GO(ROPE, true, false, false)
        if (A.pool.dim_rope) err = DSA__CU_GO6(64);
        else err = DSA__CU_GO6(0);
#undef DSA__CU_GO6
#undef DSA__CU_GO
    } else {
#define DSA__CU_GO(DQ, DV, F, SP, MLA) dsa__cu_launch(dsa__cu_attend_portable<DQ, DV, F, SP, MLA>, dim3((unsigned)grid), 256, \
        (F ? dsa__cu_portable_smem<DQ>::bytes_fp8 : dsa__cu_portable_smem<DQ>::bytes_bf16), stream, g->overlap, 1, args)
        const int small = D <= 320 && A.dim_v <= 256;
        const int raw = A.pool.dim + (A.pool.dim + 127) / 128 * 4 + 2 * A.pool.dim_rope;
        if (fp8 && raw > (small ? dsa__cu_portable_smem<320>::raw_row : dsa__cu_portable_smem<576>::raw_row)) return cudaErrorInvalidValue;
#define DSA__CU_GO4(DQ, DV, MLA) (fp8 ? split ? DSA__CU_GO(DQ, DV, true, true, MLA) : DSA__CU_GO(DQ, DV, true, false, MLA) \
                                      : split ? DSA__CU_GO(DQ, DV, false, true, MLA) : DSA__CU_GO(DQ, DV, false, false, MLA))
        if (small) err = DSA__CU_GO4(320, 256, false);
        else if (A.pool.dim == 512 && A.pool.dim_rope == 64 && A.dim_v == 512) err = DSA__CU_GO4(576, 512, true);
        else err = DSA__CU_GO4(576, 512, false);
#undef DSA__CU_GO4
#undef DSA__CU_GO
    }
    if (err != cudaSuccess || !split) return err;
    args[1] = &leaf;
    return dsa__cu_launch(dsa__cu_attend_merge, dim3((unsigned)(A.batch.n_rows * A.n_heads)), (A.dim_v / 4 + 31) / 32 * 32,
        (size_t)A.n_leaves * 8, stream, g->overlap, 1, args);
}

/* ============================================================================================
   >>api                                      arguments, workspace, the device
   ============================================================================================ */

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
    return size < dsa__cu_bytes(a) ? dsa__cu_fail(ctx, DSA_ERR_WORKSPACE, "cuda: workspace_size is smaller than the size query says")
        : DSA_OK;
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

/* Any of its parts may be missing: NULL. */
static void dsa__cu_begin_launch(const dsa__cu *g, const dsa__cu_batch *b, const dsa__cu_append *latent, const dsa__cu_append *index,
    const dsa__cu_queries *queries, const dsa__cu_convert *convert, cudaStream_t stream)
{
    dsa__cu_append l, x;
    dsa__cu_queries q;
    dsa__cu_convert c;
    memset(&l, 0, sizeof l);
    memset(&x, 0, sizeof x);
    memset(&q, 0, sizeof q);
    memset(&c, 0, sizeof c);
    if (latent) l = *latent;
    if (index) x = *index;
    if (queries) q = *queries;
    if (convert) c = *convert;
    int64_t n = l.n + x.n + q.n_blocks + (c.n + 1023) / 1024;
    void *args[5] = { (void *)b, &l, &x, &q, &c };
    if (n > 0) (void)dsa__cu_launch(dsa__cu_begin, dim3((unsigned)n), 128, 0, stream, g->overlap, 1, args);
}

static dsa__cu_append dsa__cu_append_of(dsa__cu_pool pool, int32_t index_key, const void *rows, int32_t bf16, const int64_t *slots,
    int64_t n)
{
    dsa__cu_append a = { pool, rows, slots, index_key, bf16, n };
    return a;
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
    int32_t fast, fast_select;                           /* by tensor cores; by the sampled threshold */
    dsa__cu_bounds bounds;
    void *topk;
    int32_t prepared;                                    /* x, v and bounds are there: a step */
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

static void dsa__cu_score_plan(const dsa__cu *g, dsa__cu_score_call *c, dsa__cu_arena *arena)
{
    int64_t n_rows = c->ranges.batch.n_rows, row = c->n_heads * (c->pool.dim * dsa__cu_key_bytes(c->pool.format) + 4) + 16;
    c->fast = g->path != DSA_CUDA_REFERENCE && dsa__cu_index_takes(c->pool, c->n_heads);
    c->fast_select = c->select && g->path != DSA_CUDA_REFERENCE && (!c->sel.rank || (c->sel.scores && c->sel.k <= DSA__CU_TOPK_RANKED));
    if (c->select) {
        c->n_cols = c->ranges.batch.max_len;
        c->stride = (c->n_cols + 31) / 32 * 32;
        row += 4 * c->stride + dsa__cu_sort_bytes(&c->sel);
    }
    const int64_t most = dsa__cu_bound((int64_t)DSA__CU_BUDGET / row, 1, dsa__cu_min(dsa__cu_max(n_rows, 1), 65535));
    c->tile = most;                                      /* the workspace has room for `most`: what serves many rows serves fewer */
    if (most < n_rows && most > 8) {                     /* tiles of about equal size, whole blocks of rows each */
        int64_t n = (n_rows + most - 1) / most;
        c->tile = dsa__cu_min(most / 8 * 8, ((n_rows + n - 1) / n + 7) / 8 * 8);
    }
    c->x = (unsigned char *)dsa__cu_take(arena, most, (int64_t)c->n_heads * c->pool.dim * dsa__cu_key_bytes(c->pool.format), 1);
    c->v = (float *)dsa__cu_take(arena, most, c->n_heads, 4);
    memset(&c->bounds, 0, sizeof c->bounds);
    if (c->fast || c->fast_select) {
        c->bounds.lo = (int32_t *)dsa__cu_take(arena, most, 1, 4);
        c->bounds.hi = (int32_t *)dsa__cu_take(arena, most, 1, 4);
        c->bounds.end = (int32_t *)dsa__cu_take(arena, most, 1, 4);
        c->bounds.seq = (int32_t *)dsa__cu_take(arena, c->ranges.batch.first ? most : 0, 1, 4);
        if (!c->ranges.batch.first) c->bounds.seq = NULL;
    }
    if (!c->select) return;
    c->scores = (float *)dsa__cu_take(arena, most, c->stride, 4);
    if (c->fast_select) c->topk = dsa__cu_take(arena, 1, (int64_t)dsa__cu_topk_most(g, most, c->n_cols, c->sel.k), 1);
    else c->sel.sort = (uint64_t *)dsa__cu_take(arena, most, dsa__cu_sort_bytes(&c->sel), 1);
}

/* Prepared queries that the fast kernel may read where they are. */
static int dsa__cu_in_place(const dsa__cu_score_call *c) { return c->q_type == DSA_FP8 && c->fast && ((uintptr_t)c->q & 15) == 0; }

/* Tensor cores' part of a tile: rows [row, row + n) of the call. clear: counters of the selection behind it. */
static cudaError_t dsa__cu_score_fast(const dsa__cu *g, const dsa__cu_score_call *c, float *I, int64_t row, int64_t n, uint32_t *clear,
    size_t n_clear, cudaStream_t stream)
{
    dsa__cu_index_args a;
    memset(&a, 0, sizeof a);
    a.q = dsa__cu_in_place(c) ? (const unsigned char *)c->q + row * c->n_heads * c->pool.dim : c->x;
    a.w = dsa__cu_in_place(c) ? c->w + row * c->n_heads : c->v;
    a.pages = c->pool.data;
    a.scales = c->pool.scales;
    a.page_stride = (int64_t)c->pool.page_stride;
    a.scale_stride = (int64_t)c->pool.scale_page_stride;
    a.n_pages = c->pool.n_pages;
    a.page_size = c->pool.page_size;
    a.table = c->pool.tables;
    a.table_ld = c->pool.n_blocks;
    a.table_rows = c->ranges.batch.n_seqs > 1 ? c->ranges.batch.n_q : 1 << 30;      /* blocks of rows do not straddle tables */
    a.first = (int32_t)row;
    a.seq = c->ranges.batch.n_seqs > 1 ? c->bounds.seq : NULL;
    a.lo = c->bounds.lo;
    a.hi = c->bounds.end;
    a.n = (int32_t)c->n_cols;
    a.rows = (int32_t)n;
    a.heads = c->n_heads;
    a.dim = c->pool.dim;
    a.format = c->pool.format;
    a.I = I;
    a.ldi = c->stride;
    a.lens = c->ranges.batch.n_rows == 1 ? c->ranges.batch.lens : NULL;
    a.clear = clear;
    a.n_clear = (int32_t)n_clear;
    return dsa__cu_index_launch(stream, g, a);
}

/* The queries of n rows from `row` on. */
static dsa__cu_queries dsa__cu_queries_of(const dsa__cu_score_call *c, int64_t row, int64_t n)
{
    const int64_t bytes = c->q_type == DSA_FP8 ? 1 : c->q_type == DSA_BF16 ? 2 : 4;
    dsa__cu_queries q;
    memset(&q, 0, sizeof q);
    q.format = c->pool.format;
    q.hadamard = c->pool.hadamard;
    q.D = c->pool.dim;
    q.n_heads = c->n_heads;
    q.q_type = c->q_type;
    q.q = (const unsigned char *)c->q + row * c->n_heads * c->pool.dim * bytes;
    q.w = c->w + row * c->n_heads;
    q.x = c->x;
    q.v = c->v;
    q.bounds = c->bounds;
    q.bounds.skip = !c->select ? -1 : c->sel.fallback ? c->sel.k : 0;
    /* behind its table a row has no keys */
    q.bounds.n_cols = c->fast ? dsa__cu_min(c->n_cols, c->pool.n_blocks * c->pool.page_size) : c->n_cols;
    q.ranges = c->ranges;
    q.row0 = row;
    q.n = n * c->n_heads;
    q.per = dsa__cu_in_place(c) ? 0 : c->pool.planar && c->pool.dim == 128 && c->q_type != DSA_FP8 ? 4 : 1;
    q.n_blocks = q.per ? (q.n + q.per - 1) / q.per : (n + 127) / 128;
    return q;
}

static dsa_status dsa__cu_score_launch(const dsa__cu *g, const dsa__cu_score_call *c, cudaStream_t stream)
{
    const int64_t n_rows = c->ranges.batch.n_rows;
    for (int64_t row = 0; row < n_rows; row += c->tile) {
        const int64_t n = dsa__cu_min(c->tile, n_rows - row), skip = c->select && c->sel.fallback ? c->sel.k : c->select ? 0 : -1;
        float *I = c->scores + (c->select ? 0 : row * c->stride);
        dim3 grid((unsigned)((c->n_cols + DSA__CU_TILE - 1) / DSA__CU_TILE), (unsigned)n);
        dsa__cu_topk_plan plan;
        cudaError_t err = cudaSuccess;
        memset(&plan, 0, sizeof plan);
        if (!c->prepared) {
            dsa__cu_queries queries = dsa__cu_queries_of(c, row, n);
            dsa__cu_begin_launch(g, &c->ranges.batch, NULL, NULL, &queries, NULL, stream);
        }
        if (c->fast_select) plan = dsa__cu_topk_prepare(g, (int32_t)n, (int32_t)c->n_cols, (int32_t)c->sel.k);
        if (c->fast && c->n_cols > 0) {
            dim3 fill((unsigned)((c->n_cols + 255) / 256), (unsigned)n);
            if (!c->select) dsa__cu_fill<<<fill, 256, 0, stream>>>(I, c->stride, c->n_cols);
            err = dsa__cu_score_fast(g, c, I, row, n, (uint32_t *)c->topk, plan.count_bytes / 4, stream);
        } else if (c->n_cols > 0) {
#define DSA__CU_GO(FORMAT) dsa__cu_score_reference<FORMAT><<<grid, 256, 0, stream>>>(c->pool, c->ranges, c->n_heads, c->x, c->v, I, \
            c->stride, row, c->n_cols, !c->select, skip)
            if (c->pool.format == DSA_F32) DSA__CU_GO(DSA_F32);
            else if (c->pool.format == DSA_BF16) DSA__CU_GO(DSA_BF16);
            else if (c->pool.format == DSA_FP8) DSA__CU_GO(DSA_FP8);
            else DSA__CU_GO(DSA_INT8);
#undef DSA__CU_GO
        }
        if (c->fast_select && err == cudaSuccess)
            err = dsa__cu_topk_launch(stream, g, plan, I, c->stride, c->bounds.lo, c->bounds.hi, (int32_t)n, (int32_t)c->n_cols,
                                      (int32_t)c->sel.k, c->sel.rank != 0, c->fast && c->n_cols > 0, c->sel.fallback,
                                      c->sel.indices + row * c->sel.k, c->sel.scores ? c->sel.scores + row * c->sel.k : NULL,
                                      c->sel.counts ? c->sel.counts + row : NULL, c->topk);
        else if (c->select) dsa__cu_select_reference<<<(unsigned)n, 1024, 0, stream>>>(c->ranges, I, c->stride, row, c->sel);
        if (err != cudaSuccess || dsa__cu_launched() != DSA_OK) return DSA_ERR_DEVICE;
    }
    return DSA_OK;
}

/* ---- attention, planned and launched ------------------------------------------------------------------------ */
static int64_t dsa__cu_attend_rows(const dsa__cu_attend *a)
{
    return a->out_bf16 ? dsa__cu_bound((int64_t)(DSA__CU_BUDGET / 4) / ((int64_t)a->n_heads * a->dim_v), 1, dsa__cu_max(a->batch.n_rows, 1))
                       : dsa__cu_max(dsa__cu_min(a->batch.n_rows, 1 << 20), 1);
}

/* The scratch of a call. On tensor cores: q in bf16, the leaves that several blocks share, and out as f32 where it goes into a state. */
static void dsa__cu_attend_place(const dsa__cu *g, dsa__cu_attend *a, dsa__cu_arena *arena, float **parts)
{
    const int64_t heads = a->batch.n_rows * a->n_heads;
    *parts = NULL;
    a->q16 = NULL;
    if (!dsa__cu_attend_takes(g, a)) {
        if (a->out_bf16) a->acc = (float *)dsa__cu_take(arena, dsa__cu_attend_rows(a), (int64_t)a->n_heads * a->dim_v, 4);
        else if (a->finish) a->acc = (float *)a->out;
        return;
    }
    if (a->q_bf16) a->q16 = (const __nv_bfloat16 *)a->q;
    else a->q16 = (const __nv_bfloat16 *)dsa__cu_take(arena, heads, a->pool.dim + a->pool.dim_rope, 2);
    if (!a->finish) {                                    /* a partial, then folded into the state */
        a->out = dsa__cu_take(arena, heads, a->dim_v, 4);
        a->lse = (float *)dsa__cu_take(arena, heads, 1, 4);
        a->max_logit = (float *)dsa__cu_take(arena, heads, 1, 4);
    }
    *parts = (float *)dsa__cu_take(arena, 1, (int64_t)dsa__cu_attend_most(g, a), 1);
    (void)dsa__cu_attend_plan(g, a);
}

/* n 0: nothing to convert. */
static dsa__cu_convert dsa__cu_convert_of(const dsa__cu *g, const dsa__cu_attend *a)
{
    dsa__cu_convert c = { (const float *)a->q, (__nv_bfloat16 *)a->q16, a->batch.n_rows * a->n_heads * (a->pool.dim + a->pool.dim_rope) };
    if (!dsa__cu_attend_takes(g, a) || a->q_bf16) c.n = 0;
    return c;
}

static dsa_status dsa__cu_attend_launch(const dsa__cu *g, const dsa__cu_attend *call, float *parts, cudaStream_t stream)
{
    const int64_t tile = dsa__cu_attend_rows(call), groups = (call->n_heads + 7) / 8, heads = call->batch.n_rows * call->n_heads;
    if (dsa__cu_attend_takes(g, call)) {
        dsa__cu_convert convert = dsa__cu_convert_of(g, call);
        if (!call->prepared) dsa__cu_begin_launch(g, &call->batch, NULL, NULL, NULL, &convert, stream);
        if (dsa__cu_attend_run(g, call, parts, stream) != cudaSuccess) return DSA_ERR_DEVICE;
        if (!call->finish) dsa__cu_fold_state<<<(unsigned)heads, 128, 0, stream>>>(*call);
        return dsa__cu_launched();
    }
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
    const dsa_config *f;
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
    f = &ctx->config;
    if (f->stride > 1 || f->pooling != DSA_POOL_NONE || f->index_groups > 1 || f->index_linear || f->index_no_weights ||
        f->block_size > 1 || f->n_local_blocks || f->n_kv_heads || f->dim_value != f->dim_latent)
        return dsa__cu_fail(ctx, DSA_ERR_UNSUPPORTED, "cuda: pools, groups, blocks and n_kv_heads run on the CPU only");
    if (kind == DSA_LATENT ? c.dim != ctx->config.dim_latent || c.dim_rope != ctx->config.dim_rope : c.dim != ctx->config.dim_index)
        return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "cuda: a cache's dims differ from the config's");
    if (kind == DSA_INDEX_KEY && ctx->config.hadamard != DSA_HADAMARD_AUTO &&
        (c.hadamard != 0) != (ctx->config.hadamard == DSA_HADAMARD_ON))
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

/* What a checked call stores in either cache; n 0: nothing. */
static void dsa__cu_appends(const dsa_cuda_append_args *a, dsa__cu_append *latent, dsa__cu_append *index)
{
    memset(latent, 0, sizeof *latent);
    memset(index, 0, sizeof *index);
    if (a->latent)
        *latent = dsa__cu_append_of(dsa__cu_pool_of(a->latent, a->latent->block_table, a->latent->n_blocks), 0, a->latent_rows,
            a->type == DSA_BF16,
                                    a->slots, a->batch.n_rows);
    if (a->index)
        *index = dsa__cu_append_of(dsa__cu_pool_of(a->index, a->index->block_table, a->index->n_blocks), 1, a->index_rows,
            a->type == DSA_BF16,
                                   a->slots, a->batch.n_rows);
}

extern "C" dsa_status dsa_cuda_append(const dsa_ctx *ctx, const dsa_cuda_append_args *a, void *stream)
{
    dsa__cu_append latent, index;
    dsa__cu_batch batch;
    dsa_status st;
    if (!ctx) return DSA_ERR_NULL;
    if (!a) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_append: args is NULL");
    if (!a->latent && !a->index) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_append: both caches are NULL");
    st = a->latent ? dsa__cu_check(ctx, &a->batch, a->latent, DSA_LATENT) : DSA_OK;
    if (st == DSA_OK && a->index) st = dsa__cu_check(ctx, &a->batch, a->index, DSA_INDEX_KEY);
    if (st != DSA_OK) return st;
    if (!dsa__cu_is_operand(a->type)) return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "dsa_cuda_append: type is F32 or BF16");
    if (a->batch.n_rows == 0) return DSA_OK;
    if ((a->latent && !a->latent_rows) || (a->index && !a->index_rows)) return dsa__cu_fail(ctx, DSA_ERR_NULL,
        "dsa_cuda_append: rows are NULL");
    dsa__cu_appends(a, &latent, &index);
    batch = dsa__cu_batch_of(&a->batch);
    dsa__cu_begin_launch(dsa__cu_of(ctx), &batch, &latent, &index, NULL, NULL, (cudaStream_t)stream);
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
    dsa__cu_score_plan(dsa__cu_of(ctx), c, arena);
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

extern "C" dsa_status dsa_cuda_score_select_workspace(const dsa_ctx *ctx, const dsa_cuda_score_args *a, const dsa_selection *out,
    size_t *bytes)
{
    if (!out) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_score_select: out is NULL");
    return dsa__cu_score_bytes(ctx, a, out, bytes);
}

extern "C" dsa_status dsa_cuda_score(const dsa_ctx *ctx, const dsa_cuda_score_args *a, float *scores, int64_t n_cols, int64_t stride,
    void *stream)
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
    return dsa__cu_refused(ctx, dsa__cu_score_launch(dsa__cu_of(ctx), &c, (cudaStream_t)stream));
}

extern "C" dsa_status dsa_cuda_score_select(const dsa_ctx *ctx, const dsa_cuda_score_args *a, const dsa_selection *out, void *stream)
{
    dsa__cu_score_call c;
    dsa_status st;
    if (!out) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_score_select: out is NULL");
    st = dsa__cu_score_start(ctx, a, out, &c);
    if (st != DSA_OK || a->batch.n_rows == 0) return st;
    return dsa__cu_refused(ctx, dsa__cu_score_launch(dsa__cu_of(ctx), &c, (cudaStream_t)stream));
}

static dsa_status dsa__cu_select_args(const dsa_ctx *ctx, const dsa_cuda_select_args *a, const dsa_selection *out, dsa__cu_arena *arena,
    dsa__cu_selection *sel, dsa__cu_bounds *bounds, void **topk)
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
    if (s.order != DSA_ORDER_INDEX && s.order != DSA_ORDER_RANK) return dsa__cu_fail(ctx, DSA_ERR_ARGUMENT,
        "dsa_cuda_select: unknown order");
    *sel = dsa__cu_selection_of(&s);
    sel->fallback = 0;                                   /* stored scores are seen: NaN and -inf are left out of short rows, too */
    memset(bounds, 0, sizeof *bounds);
    *topk = NULL;
    if (dsa__cu_of(ctx)->path != DSA_CUDA_REFERENCE && (!sel->rank || (sel->scores && sel->k <= DSA__CU_TOPK_RANKED))) {
        bounds->lo = (int32_t *)dsa__cu_take(arena, a->n_rows, 1, 4);
        bounds->hi = (int32_t *)dsa__cu_take(arena, a->n_rows, 1, 4);
        bounds->n_cols = a->n_cols;
        *topk = dsa__cu_take(arena, 1, 256 + (int64_t)dsa__cu_topk_most(dsa__cu_of(ctx), a->n_rows, a->n_cols, sel->k), 1);
    } else {
        sel->sort = (uint64_t *)dsa__cu_take(arena, a->n_rows, dsa__cu_sort_bytes(sel), 1);
    }
    return arena->overflow ? dsa__cu_fail(ctx, DSA_ERR_OVERFLOW, "cuda: the workspace does not fit in size_t") : DSA_OK;
}

extern "C" dsa_status dsa_cuda_select_workspace(const dsa_ctx *ctx, const dsa_cuda_select_args *a, const dsa_selection *out, size_t *bytes)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa__cu_selection sel;
    dsa__cu_bounds bounds;
    void *topk = NULL;
    dsa_status st = dsa__cu_select_args(ctx, a, out, &arena, &sel, &bounds, &topk);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_select: bytes is NULL");
    *bytes = dsa__cu_bytes(&arena);
    return DSA_OK;
}

extern "C" dsa_status dsa_cuda_select(const dsa_ctx *ctx, const dsa_cuda_select_args *a, const dsa_selection *out, void *stream)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa__cu_selection sel;
    dsa__cu_bounds bounds;
    void *topk = NULL;
    dsa__cu_ranges ranges;
    dsa_status st = dsa__cu_select_args(ctx, a, out, &arena, &sel, &bounds, &topk);
    if (st == DSA_OK) st = dsa__cu_arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK || a->n_rows == 0) return st;
    if (!out->indices || (a->n_cols > 0 && !a->scores)) return dsa__cu_fail(ctx, DSA_ERR_NULL,
        "dsa_cuda_select: scores or indices is NULL");
    arena = dsa__cu_over(a->workspace);
    st = dsa__cu_select_args(ctx, a, out, &arena, &sel, &bounds, &topk);
    if (st != DSA_OK) return st;
    memset(&ranges, 0, sizeof ranges);
    ranges.batch.max_len = a->n_cols;
    ranges.ks = a->ks;
    ranges.ke = a->ke;
    if (topk && dsa__cu_topk_is_row(dsa__cu_of(ctx), a->n_rows, a->n_cols)) {
        const dsa__cu_row_args r = { a->scores, a->stride, NULL, NULL, a->ks, a->ke, (int32_t)a->n_cols, (int32_t)sel.k, 0, sel.indices,
            sel.scores, sel.counts };
        const cudaError_t e = dsa__cu_topk_row_launch((cudaStream_t)stream, dsa__cu_of(ctx), r, (int32_t)a->n_rows);
        if (e == cudaSuccess && sel.rank)
            dsa__cu_by_rank_launch((cudaStream_t)stream, (int32_t)a->n_rows, (int32_t)sel.k, sel.indices, sel.scores);
        return dsa__cu_refused(ctx, e == cudaSuccess ? dsa__cu_launched() : DSA_ERR_DEVICE);
    }
    if (topk) {
        const dsa__cu *g = dsa__cu_of(ctx);
        dsa__cu_topk_plan plan = dsa__cu_topk_prepare(g, (int32_t)a->n_rows, (int32_t)a->n_cols, (int32_t)sel.k);
        dsa__cu_select_begin<<<(unsigned)((a->n_rows + 255) / 256), 256, 0, (cudaStream_t)stream>>>(ranges, bounds, a->n_rows,
            (uint32_t *)topk, plan.count_bytes / 4);
        return dsa__cu_refused(ctx, dsa__cu_topk_launch((cudaStream_t)stream, g, plan, a->scores, a->stride, bounds.lo, bounds.hi,
            (int32_t)a->n_rows,
            (int32_t)a->n_cols, (int32_t)sel.k, sel.rank != 0, 0, 0, sel.indices, sel.scores, sel.counts, topk) == cudaSuccess ? DSA_OK
                : DSA_ERR_DEVICE);
    }
    dsa__cu_select_reference<<<(unsigned)a->n_rows, 1024, 0, (cudaStream_t)stream>>>(ranges, a->scores, a->stride, 0, sel);
    return dsa__cu_refused(ctx, dsa__cu_launched());
}

static dsa_status dsa__cu_attend_args(const dsa_ctx *ctx, const dsa_cuda_attend_args *a, dsa__cu_arena *arena, dsa__cu_attend *c,
    float **parts)
{
    int64_t n_indices;
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
    n_indices = a->n_indices ? a->n_indices : ctx->config.top_k;
    c->index_stride = a->index_stride ? a->index_stride : n_indices;
    c->k = (int32_t)(a->what == DSA_ATTEND_LIST ? n_indices : a->batch.max_len);
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
    if (n_indices < 0 || n_indices > DSA__CU_MAX_POS || c->index_stride < n_indices)
        return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_attend: not 0 <= n_indices <= index_stride");
    if (!dsa__cu_is_operand(a->q_type) || !dsa__cu_is_operand(a->out_type))
        return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "dsa_cuda_attend: q_type and out_type are F32 or BF16");
    if ((a->what != DSA_ATTEND_LIST && a->what != DSA_ATTEND_RANGE && a->what != DSA_ATTEND_VISIBLE) ||
        (a->index_kind != DSA_LOGICAL && a->index_kind != DSA_PHYSICAL))
        return dsa__cu_fail(ctx, DSA_ERR_ARGUMENT, "dsa_cuda_attend: unknown what or index_kind");
    dsa__cu_attend_place(dsa__cu_of(ctx), c, arena, parts);
    return arena->overflow ? dsa__cu_fail(ctx, DSA_ERR_OVERFLOW, "cuda: the workspace does not fit in size_t") : DSA_OK;
}

extern "C" dsa_status dsa_cuda_attend_workspace(const dsa_ctx *ctx, const dsa_cuda_attend_args *a, size_t *bytes)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa__cu_attend c;
    float *parts;
    dsa_status st = dsa__cu_attend_args(ctx, a, &arena, &c, &parts);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_attend: bytes is NULL");
    *bytes = dsa__cu_bytes(&arena);
    return DSA_OK;
}

static dsa_status dsa__cu_attend_start(const dsa_ctx *ctx, const dsa_cuda_attend_args *a, dsa__cu_attend *c, float **parts)
{
    dsa__cu_arena arena = dsa__cu_over(NULL);
    dsa_status st = dsa__cu_attend_args(ctx, a, &arena, c, parts);
    if (st == DSA_OK) st = dsa__cu_arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK || a->batch.n_rows == 0) return st;
    if (!a->q || !a->out) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_attend: q or out is NULL");
    if (a->what == DSA_ATTEND_LIST && !a->indices) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_attend: indices is NULL");
    if (a->what == DSA_ATTEND_RANGE && (!a->ks || !a->ke)) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_attend: ks or ke is NULL");
    arena = dsa__cu_over(a->workspace);
    return dsa__cu_attend_args(ctx, a, &arena, c, parts);
}

extern "C" dsa_status dsa_cuda_attend(const dsa_ctx *ctx, const dsa_cuda_attend_args *a, void *stream)
{
    dsa__cu_attend c;
    float *parts;
    dsa_status st = dsa__cu_attend_start(ctx, a, &c, &parts);
    if (st != DSA_OK || a->batch.n_rows == 0) return st;
    return dsa__cu_refused(ctx, dsa__cu_attend_launch(dsa__cu_of(ctx), &c, parts, (cudaStream_t)stream));
}

extern "C" dsa_status dsa_cuda_merge(const dsa_ctx *ctx, int32_t n_parts, const float *outs, const float *lses, int64_t n_rows,
    int32_t n_heads, int32_t dim_v, const float *sinks, void *out, dsa_type out_type, float *lse, void *stream)
{
    if (!ctx) return DSA_ERR_NULL;
    if (!ctx->config.cuda) return dsa__cu_fail(ctx, DSA_ERR_NO_DEVICE, "cuda: config.cuda is NULL");
    if (n_parts < 0 || n_rows < 0 || n_heads < 1 || dim_v < 1 || n_rows > DSA__CU_MAX_POS / n_heads)
        return dsa__cu_fail(ctx, DSA_ERR_SHAPE, "dsa_cuda_merge: a count or dim");
    if (!dsa__cu_is_operand(out_type)) return dsa__cu_fail(ctx, DSA_ERR_FORMAT, "dsa_cuda_merge: out_type is F32 or BF16");
    if (n_rows == 0) return DSA_OK;
    if (!out || (n_parts > 0 && (!outs || !lses))) return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_merge: outs, lses or out is NULL");
    dsa__cu_merge<<<(unsigned)(n_rows * n_heads), 128, 0, (cudaStream_t)stream>>>(n_parts, outs, lses, n_rows * n_heads, n_heads, dim_v,
        sinks, out, out_type == DSA_BF16, lse);
    return dsa__cu_refused(ctx, dsa__cu_launched());
}

typedef struct dsa__cu_step {
    dsa_cuda_append_args append;
    dsa_cuda_score_args score;
    dsa_selection sel;
    dsa_cuda_attend_args attend;
    __nv_bfloat16 *q16;
} dsa__cu_step;

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
    c->q16 = (__nv_bfloat16 *)dsa__cu_take(arena, a->type == DSA_F32 ? a->batch.n_rows : 0,
                                           (int64_t)ctx->config.n_heads * (ctx->config.dim_latent + ctx->config.dim_rope), 2);
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
    dsa__cu_score_call score;
    dsa__cu_attend attend;
    dsa__cu_append latent, index;
    dsa__cu_queries queries;
    dsa__cu_convert convert;
    float *parts;
    dsa_status st = dsa__cu_step_args(ctx, a, &arena, &c);
    if (st != DSA_OK || a->batch.n_rows == 0) return st;
    if (!a->q || !a->index_q || !a->index_w || !a->out)
        return dsa__cu_fail(ctx, DSA_ERR_NULL, "dsa_cuda_step: q, index_q, index_w or out is NULL");
    st = dsa__cu_arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__cu_over(a->workspace);
    st = dsa__cu_step_args(ctx, a, &arena, &c);
    if (st == DSA_OK) st = dsa__cu_score_start(ctx, &c.score, &c.sel, &score);
    if (st == DSA_OK) st = dsa__cu_attend_start(ctx, &c.attend, &attend, &parts);
    if (st == DSA_OK && a->latent_rows) st = dsa__cu_check(ctx, &a->batch, a->latent, DSA_LATENT);
    if (st != DSA_OK) return st;
    /* The attention's scratch lies over that of the scores, but q in bf16 is made before them: behind both. */
    dsa__cu_appends(&c.append, &latent, &index);
    if (!a->latent_rows) latent.n = index.n = 0;
    queries = dsa__cu_queries_of(&score, 0, a->batch.n_rows);
    score.prepared = score.tile >= a->batch.n_rows;
    convert = dsa__cu_convert_of(dsa__cu_of(ctx), &attend);
    attend.prepared = 1;
    attend.early = attend.q_bf16;
    if (convert.n > 0) convert.to = c.q16;
    if (convert.n > 0) attend.q16 = c.q16;
    dsa__cu_begin_launch(dsa__cu_of(ctx), &score.ranges.batch, &latent, &index, score.prepared ? &queries : NULL, &convert,
        (cudaStream_t)stream);
    st = dsa__cu_score_launch(dsa__cu_of(ctx), &score, (cudaStream_t)stream);
    if (st == DSA_OK) st = dsa__cu_attend_launch(dsa__cu_of(ctx), &attend, parts, (cudaStream_t)stream);
    return dsa__cu_refused(ctx, st);
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
    dsa__cu_append row;
    dsa__cu_batch batch;
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
        row = dsa__cu_append_of(dsa__cu_pool_of(c, blocks ? table : NULL, blocks), c->kind == DSA_INDEX_KEY, rows, 0, slots ? to : NULL, m);
        batch = dsa__cu_one(m, DSA__CU_MAX_POS, lens);
        dsa__cu_begin_launch(g, &batch, &row, NULL, NULL, NULL, g->stream);
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
        dsa__cu_read_row<<<(unsigned)n, 128, 0, g->stream>>>(dsa__cu_pool_of(c, blocks ? table : NULL, blocks), c->kind == DSA_INDEX_KEY,
            begin, rows);
        t.err = cudaGetLastError();
        dsa__cu_down(g, &t, out, rows, (size_t)(n * width) * 4);
    }
    return dsa__cu_leave(g, t, DSA_OK);
}

/* Device arrays of a tile of m rows of one sequence. */
typedef struct dsa__cu_score_host {
    int32_t *table, *lens, *ks;
    float *q, *w, *scores;
    dsa_selection out;
    dsa__cu_score_call call;
} dsa__cu_score_host;

static dsa__cu_arena dsa__cu_score_lay(const dsa__cu *g, const dsa_ctx *ctx, const dsa_score_args *a, const dsa_selection *out,
    const dsa_cache *c, int64_t len, int64_t longest, int64_t m, int64_t n_cols, dsa__cu_score_host *t)
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
    dsa__cu_score_plan(g, &t->call, &arena);
    t->call.ranges.batch.max_len = len;
    return arena;
}

static dsa_status dsa__cu_host_score(const dsa_ctx *ctx, const dsa_score_args *a, const dsa_selection *out, int64_t n_rows, float *scores,
    int64_t n_cols, int64_t stride, int run)
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
            if (t.err == cudaSuccess) st = dsa__cu_score_launch(g, &tile.call, g->stream);
            if (st != DSA_OK || t.err != cudaSuccess) break;
            if (out) {
                dsa__cu_down(g, &t, out->indices + row * out->top_k, tile.out.indices, (size_t)(m * out->top_k) * 4);
                if (out->scores) dsa__cu_down(g, &t, out->scores + row * out->top_k, tile.out.scores, (size_t)(m * out->top_k) * 4);
                if (out->counts) dsa__cu_down(g, &t, out->counts + row, tile.out.counts, (size_t)m * 4);
            } else if (n_cols > 0) {
                t.err = cudaMemcpy2DAsync(scores + row * stride, (size_t)stride * 4, tile.scores, (size_t)n_cols * 4, (size_t)n_cols * 4,
                    (size_t)m,
                                          cudaMemcpyDeviceToHost, g->stream);
            }
        }
    }
    return run ? dsa__cu_leave(g, t, st) : st;
}

typedef struct dsa__cu_attend_host {
    int32_t *table, *lens, *ks, *counts, *indices;
    float *q, *sinks, *parts;
    dsa__cu_attend call;
} dsa__cu_attend_host;

static dsa__cu_arena dsa__cu_attend_lay(const dsa__cu *g, const dsa_ctx *ctx, const dsa_attend_args *a, const dsa_attend_state *state,
    int exact, int fused, const dsa_cache *c, int64_t len, int64_t blocks, int64_t m, const float *sinks, dsa__cu_attend_host *t)
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
    A->index_stride = a->n_indices;
    A->k = (int32_t)(list ? a->n_indices : len);
    A->exact = exact;
    A->resume = !fused;
    A->finish = fused;
    A->max = (float *)dsa__cu_take(&arena, m, H, 4);
    A->sum = (float *)dsa__cu_take(&arena, m, H, 4);
    A->lse = (float *)dsa__cu_take(&arena, m, H, 4);
    A->max_logit = (float *)dsa__cu_take(&arena, m, H, 4);
    A->acc = (float *)dsa__cu_take(&arena, m, H * state->dim_v, 4);
    A->out = A->acc;
    A->sinks = sinks ? t->sinks : NULL;
    dsa__cu_attend_place(g, A, &arena, &t->parts);
    return arena;
}

static dsa_status dsa__cu_host_attend(const dsa_ctx *ctx, const dsa_attend_args *a, const dsa_attend_state *state, int exact, int fused,
    int causal, const float *sinks, float *lse, float *max_logit, int run)
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
                arena = dsa__cu_attend_lay(g, ctx, a, state, exact, fused, c, len, blocks, m, sinks, &tile);
                if (!arena.overflow && arena.used <= g->size) break;
                if (m <= 1) { st = DSA_ERR_WORKSPACE; break; }
            }
            if (!run) break;
            if (st != DSA_OK) break;
            for (i = 0; i < m; i++) {
                int64_t visible = dsa__cu_max(len - n_q + at + i + 1, 0), ks = 0, ke = visible;
                if (a->what == DSA_ATTEND_LIST) ks = causal ? visible : len;         /* the limit of valid positions */
                if (a->what == DSA_ATTEND_RANGE) {
                    int64_t end = causal ? visible : len;
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
                t.err = cudaMemcpy2DAsync(tile.indices, (size_t)a->n_indices * 4, a->indices + row * a->index_stride,
                    (size_t)a->index_stride * 4,
                                          (size_t)a->n_indices * 4, (size_t)m, cudaMemcpyHostToDevice, g->stream);
            if (!fused) {
                dsa__cu_up(g, &t, tile.call.max, state->max + row * H, (size_t)(m * H) * 4);
                dsa__cu_up(g, &t, tile.call.sum, state->sum + row * H, (size_t)(m * H) * 4);
                dsa__cu_up(g, &t, tile.call.acc, state->out + row * H * dv, (size_t)(m * H * dv) * 4);
            }
            if (t.err == cudaSuccess) st = dsa__cu_attend_launch(g, &tile.call, tile.parts, g->stream);
            if (st != DSA_OK) break;
            dsa__cu_down(g, &t, state->out + row * H * dv, tile.call.acc, (size_t)(m * H * dv) * 4);
            if (!fused) {
                dsa__cu_down(g, &t, state->max + row * H, tile.call.max, (size_t)(m * H) * 4);
                dsa__cu_down(g, &t, state->sum + row * H, tile.call.sum, (size_t)(m * H) * 4);
            }
            if (lse) dsa__cu_down(g, &t, lse + row * H, tile.call.lse, (size_t)(m * H) * 4);
            if (max_logit) dsa__cu_down(g, &t, max_logit + row * H, tile.call.max_logit, (size_t)(m * H) * 4);
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
    int n = 0, major = 0, sms = 0, shared = 0, hopper;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    if (!cuda || (d.allocator.alloc == NULL) != (d.allocator.release == NULL)) return DSA_ERR_NULL;
    if ((int)d.path < 0 || d.path > DSA_CUDA_HOPPER || d.device < 0) return DSA_ERR_ARGUMENT;
    if (!d.allocator.alloc) { d.allocator.alloc = dsa__cu_malloc; d.allocator.release = dsa__cu_free; }
    if (cudaGetDeviceCount(&n) != cudaSuccess || d.device >= n ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d.device) != cudaSuccess ||
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, d.device) != cudaSuccess ||
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, d.device) != cudaSuccess) {
        (void)cudaGetLastError();                        /* no driver, say: nothing that the program's own CUDA calls should find */
        return DSA_ERR_NO_DEVICE;
    }
    if (major < 8) return DSA_ERR_NO_DEVICE;
    g = (dsa__cu *)d.allocator.alloc(d.allocator.user, sizeof *g + (2 * DSA__CU_HOST_ROWS + 1) * sizeof(int32_t));
    if (!g) return DSA_ERR_MEMORY;
    memset(g, 0, sizeof *g);
    g->staging = (int32_t *)(g + 1);
    g->host = d.allocator;
    g->device = d.device;
    g->n_sm = sms;
    g->shared = shared;
    g->path = d.path;
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
        g->overlap = t.err == cudaSuccess && code.ptxVersion >= 90;      /* code for older devices does not wait */
        if (t.err == cudaSuccess) t.err = cudaFuncGetAttributes(&code, dsa__cu_attend_hopper<64, true, false, true>);
        hopper = t.err == cudaSuccess && major == 9 && code.numRegs > 100;   /* what other architectures have in its place is empty */
        if (t.err == cudaSuccess && g->path == DSA_CUDA_HOPPER && !hopper) t.err = cudaErrorInvalidDeviceFunction;
        if (g->path == DSA_CUDA_AUTO) g->path = hopper ? DSA_CUDA_HOPPER : DSA_CUDA_PORTABLE;
        if (t.err == cudaSuccess) t.err = dsa__cu_index_init(hopper);
        if (t.err == cudaSuccess) t.err = dsa__cu_topk_init(g);
        if (t.err == cudaSuccess && g->cluster) t.err = dsa__cu_attend_init();
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

/* dsa.h - v0.1.0 - public domain or MIT - DeepSeek Sparse Attention in one C header (implementation section follows soon) */
/* ============================================================================================
   >>api                                      declarations
   ============================================================================================ */
#ifndef DSA_H_INCLUDED
#define DSA_H_INCLUDED

#include <stddef.h>
#include <stdint.h>

#define DSA_VERSION_MAJOR 0
#define DSA_VERSION_MINOR 1
#define DSA_VERSION_PATCH 0
#define DSA_VERSION_STRING "0.1.0"

#ifndef DSA_API
#  ifdef DSA_STATIC
#    define DSA_API static
#  else
#    define DSA_API extern
#  endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status ------------------------------------------------------------------------------- */
/* One list makes the enum and the texts of dsa_status_text(). */
#define DSA_STATUS_LIST(X) \
    X(DSA_OK,              "success") \
    X(DSA_ERR_NULL,        "a required pointer is NULL") \
    X(DSA_ERR_ARGUMENT,    "an argument has a value outside its domain") \
    X(DSA_ERR_SHAPE,       "dimensions are missing, negative or do not fit together") \
    X(DSA_ERR_OVERFLOW,    "a size does not fit in size_t or a position not in int32") \
    X(DSA_ERR_FORMAT,      "formats, dims or Hadamard flags of the caches in one call differ from each other or from the config") \
    X(DSA_ERR_TABLE,       "a block table is too short or names a page outside the pool") \
    X(DSA_ERR_CAPACITY,    "a cache has no room for the rows") \
    X(DSA_ERR_WORKSPACE,   "the workspace is smaller than the size query says") \
    X(DSA_ERR_MEMORY,      "the allocator returned NULL") \
    X(DSA_ERR_THREAD,      "a thread could not be started") \
    X(DSA_ERR_NO_DEVICE,   "no usable device of the requested kind") \
    X(DSA_ERR_UNSUPPORTED, "not supported by this build, this CPU or this version")

#define DSA__ENUM(name, text) name,
typedef enum dsa_status { DSA_STATUS_LIST(DSA__ENUM) DSA__STATUS_COUNT } dsa_status;
#undef DSA__ENUM

/* Everywhere in a struct: 0 means the default. DSA_NONE says "zero, and I mean it"
   (a latent cache without rotary dims: dim_rope = DSA_NONE). */
#define DSA_NONE (-1)

/* ---- enums -------------------------------------------------------------------------------- */
typedef enum dsa_type {          /* element type of a tensor or format of a cache row */
    DSA_F32 = 0,
    DSA_BF16,
    DSA_F16,
    DSA_FP8,                     /* float8_e4m3fn, scales beside it (see the manual, LAYOUTS) */
    DSA_INT8                     /* int8, one f32 scale per row; index keys only */
} dsa_type;

typedef enum dsa_kind { DSA_LATENT = 0, DSA_INDEX_KEY } dsa_kind;   /* what a cache holds */

typedef enum dsa_isa { DSA_ISA_AUTO = 0, DSA_ISA_SCALAR, DSA_ISA_AVX2, DSA_ISA_AVX512, DSA_ISA_NEON } dsa_isa;

typedef enum dsa_device { DSA_DEVICE_CPU = 0, DSA_DEVICE_CUDA, DSA_DEVICE_AUTO } dsa_device;

typedef enum dsa_precision {
    DSA_PRECISION_AUTO = 0,      /* q and P may be rounded to bf16 over bf16 and FP8 latents (vector paths; the scalar path never does) */
    DSA_PRECISION_F32            /* f32 products everywhere in attention */
} dsa_precision;

typedef enum dsa_hadamard {      /* rotation of index queries and keys before rounding */
    DSA_HADAMARD_AUTO = 0,       /* on for FP8 and INT8 keys, off for F32 and BF16 */
    DSA_HADAMARD_ON,
    DSA_HADAMARD_OFF
} dsa_hadamard;

typedef enum dsa_rope_layout {
    DSA_ROPE_INTERLEAVED = 0,    /* pairs (x[2i], x[2i+1]) */
    DSA_ROPE_HALF,               /* pairs (x[i], x[i + n/2]) */
    DSA_ROPE_DEFAULT = 0
} dsa_rope_layout;

typedef enum dsa_order {
    DSA_ORDER_INDEX = 0,         /* ascending logical position */
    DSA_ORDER_RANK               /* descending score, then ascending position */
} dsa_order;

typedef enum dsa_index_kind {
    DSA_LOGICAL = 0,             /* position in the sequence; valid in [0, len) */
    DSA_PHYSICAL                 /* slot = page * page_size + offset; valid in [0, n_pages * page_size) */
} dsa_index_kind;

typedef enum dsa_preset { DSA_DEEPSEEK_V32 = 0, DSA_GLM_5, DSA_GLM_52 } dsa_preset;

/* ---- hooks -------------------------------------------------------------------------------- */
/* Runs task(arg, i) for every i in [0, n_tasks), in any order, on any threads, each exactly once, and
   returns when all are done. n_tasks never exceeds dsa_config.n_threads. Must not fail. */
typedef void (*dsa_task)(void *arg, int32_t i);
typedef void (*dsa_parallel_for)(void *user, int32_t n_tasks, dsa_task task, void *arg);

/* C[m, n] = A[m, k] . B[n, k]^T, f32, row-major, leading dimensions in elements. For the layer's dense
   projections only; must be exact to f32 rounding. See examples/ and tools/ for BLIS. */
typedef void (*dsa_gemm)(void *user, int64_t m, int64_t n, int64_t k,
                         const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc);

/* alloc returns NULL on failure; any alignment malloc gives is enough. */
typedef struct dsa_allocator {
    void *(*alloc)(void *user, size_t bytes);
    void (*release)(void *user, void *memory);
    void *user;
} dsa_allocator;

/* ---- rotary embedding --------------------------------------------------------------------- */
/* Frequencies (spec 2.1): base_i = theta^(-2i/width). factor > 1 turns YaRN on. */
typedef struct dsa_rope {
    dsa_rope_layout layout;
    int32_t offset;              /* first rotated channel of a row */
    int32_t width;               /* rotated channels n, even; 0 = nothing is rotated */
    double theta;                /* 0 = 10000 */
    double factor;               /* YaRN context extension; 0 or 1 = plain RoPE */
    double original_context;     /* YaRN: tokens of the original training, 0 = 4096 */
    double beta_fast, beta_slow; /* YaRN: 0 = 32 and 1 */
} dsa_rope;

/* ---- config ------------------------------------------------------------------------------- */
/* Zero everywhere = DeepSeek-V3.2 on one thread. dsa_config_preset() fills the model part explicitly. */
typedef struct dsa_config {
    /* shapes of the mechanism */
    int32_t n_heads;             /* H    query heads                                   0 = 128 */
    int32_t dim_latent;          /* R    width of the latent c = width of the value    0 = 512 */
    int32_t dim_rope;            /* r    rotary dims stored behind it                  0 = 64, DSA_NONE = 0 */
    int32_t n_index_heads;       /* HI   heads of the lightning indexer                0 = 64 */
    int32_t dim_index;           /* D    width of an index key                         0 = 128 */
    int32_t top_k;               /* k    tokens kept per query                         0 = 2048 */
    /* shapes of the layer around it */
    int32_t dim_hidden;          /* width of x and y                                   0 = 7168 */
    int32_t dim_q_lora;          /* width of the compressed query qr                   0 = 1536 */
    int32_t dim_nope;            /* per head, query/key part without RoPE              0 = 128 */
    int32_t dim_v;               /* per head, value width after W_UV                   0 = 128 */
    /* numbers */
    float softmax_scale;         /* 0 = (dim_nope + dim_rope)^-0.5 * m^2, m = 0.1 mscale ln(factor) + 1 under YaRN */
    float mscale;                /* YaRN's mscale_all_dim                              0 = 1, DSA_NONE = 0 (m = 1) */
    float norm_eps;              /* eps of q_a_layernorm and kv_a_layernorm            0 = 1e-6 */
    float index_norm_eps;        /* eps of the index key's LayerNorm                   0 = 1e-6 */
    double rope_theta;           /*                                                    0 = 10000 */
    double rope_factor;          /* YaRN factor; 0 or 1 = plain RoPE. Preset V3.2: 40 */
    double rope_original_context;/*                                                    0 = 4096 */
    double rope_beta_fast, rope_beta_slow; /*                                          0 = 32, 1 */
    dsa_rope_layout rope_layout; /* main attention, last dim_rope channels of q        0 = interleaved */
    int32_t index_rope_interleaved; /* 1: GLM; 0: half-split as DeepSeek-V3.2 */
    int32_t index_rope_offset;   /* first rotated channel of an index key              0 = 0 */
    int32_t index_rope_width;    /* rotated channels of an index key                   0 = dim_rope, DSA_NONE = 0 */
    int32_t index_share_freq;    /* GLM-5.2 IndexShare, see dsa_layer_has_indexer()    0 = every layer has one */
    int32_t index_share_offset;
    dsa_hadamard hadamard;
    /* run time */
    dsa_isa isa;                 /* 0 = the best this CPU has */
    dsa_precision precision;
    int32_t n_threads;           /* most tasks of one call; sizes the workspace        0 = 1 */
    dsa_parallel_for parallel_for; /* NULL: tasks run one after the other on the caller's thread */
    void *parallel_user;
    dsa_gemm gemm;               /* NULL: built-in */
    void *gemm_user;
    dsa_allocator allocator;     /* used by dsa_cache_create and dsa_pool_create only; zero = malloc/free */
    char *detail;                /* optional: on error, which argument of which call; zero-terminated */
    size_t detail_size;          /* (copies of a context on several threads want a buffer each) */
} dsa_config;

struct dsa__kernels;

/* A context: the resolved config and the kernel table. Plain data in the caller's memory: nothing to free,
   may be copied, read-only for every call and therefore shared by threads. */
typedef struct dsa_ctx {
    dsa_config config;           /* resolved: no zeros left where a default exists */
    const struct dsa__kernels *kernels;
} dsa_ctx;

DSA_API int         dsa_version(void);                     /* major * 10000 + minor * 100 + patch */
DSA_API const char *dsa_status_text(dsa_status status);    /* never NULL */
DSA_API const char *dsa_isa_name(dsa_isa isa);             /* "auto", "scalar", "avx2", "avx512", "neon" */
/* Fills the model part of *config and zeroes the rest. ERR_NULL, ERR_ARGUMENT. */
DSA_API dsa_status  dsa_config_preset(dsa_preset preset, dsa_config *config);
/* Resolves defaults, checks the config (ERR_SHAPE, ERR_ARGUMENT), picks the kernels (ERR_UNSUPPORTED if the forced
   ISA is not in this build or this CPU). config may be NULL: all defaults. */
DSA_API dsa_status  dsa_init(dsa_ctx *ctx, const dsa_config *config);
/* The ISA that dsa_init chose. */
DSA_API dsa_isa     dsa_query_isa(const dsa_ctx *ctx);
/* The config's two rotary embeddings: of the main attention for a row of dim_row channels (rotates its last dim_rope),
   and of the indexer. */
DSA_API dsa_rope    dsa_config_rope(const dsa_ctx *ctx, int32_t dim_row);
DSA_API dsa_rope    dsa_config_index_rope(const dsa_ctx *ctx);
/* GLM-5.2 IndexShare (spec 1): 1 if 0-based layer i has its own indexer: max(i - offset + 1, 0) % freq == 0, or freq <= 1. */
DSA_API int         dsa_layer_has_indexer(int32_t freq, int32_t offset, int32_t i);

/* ---- number formats (each usable on its own; no context, cannot fail) ------------------------ */
DSA_API float    dsa_bf16_to_f32(uint16_t x);
DSA_API uint16_t dsa_f32_to_bf16(float x);        /* round to nearest even; NaN stays NaN */
DSA_API float    dsa_f16_to_f32(uint16_t x);
DSA_API uint16_t dsa_f32_to_f16(float x);         /* round to nearest even; overflow to inf; subnormals kept */
DSA_API float    dsa_e4m3_to_f32(uint8_t x);      /* 0x7F, 0xFF: NaN */
DSA_API uint8_t  dsa_f32_to_e4m3(float x);        /* round to nearest even, saturates at 448 (inf too); NaN: 0x7F with its sign */
DSA_API float    dsa_ue8m0_to_f32(uint8_t x);     /* 2^(x-127); 0 is 2^-127, 255 is NaN */
DSA_API uint8_t  dsa_f32_to_ue8m0_ceil(float x);  /* least b with 2^(b-127) >= x, for x > 0 */
/* Smallest power of two >= x, for finite x > 0 (spec 3.4). */
DSA_API float    dsa_pow2_ceil(float x);
/* One row of n values to e4m3 / int8; returns the f32 scale, x ~ scale * y.
   e4m3: s = 2^ceil(log2(max(amax, 1e-4) / 448))   int8: s = max(amax, 1e-4) / 127, half to even, clamp +-127 */
DSA_API float    dsa_quantize_e4m3(const float *x, int32_t n, uint8_t *y);
DSA_API float    dsa_quantize_int8(const float *x, int32_t n, int8_t *y);

/* ---- row operations of the layer (each usable on its own) ----------------------------------- */
/* In place on n_rows rows, `stride` floats apart. ERR_NULL, ERR_SHAPE. */
DSA_API dsa_status dsa_rms_norm(float *x, int64_t n_rows, int64_t stride, int32_t dim, const float *gain, float eps);
DSA_API dsa_status dsa_layer_norm(float *x, int64_t n_rows, int64_t stride, int32_t dim, const float *gain, const float *bias, float eps);
/* Sylvester order, times dim^-0.5: orthonormal and self-inverse. dim must be a power of two. */
DSA_API dsa_status dsa_hadamard_rows(float *x, int64_t n_rows, int64_t stride, int32_t dim);
/* Rotates channels [offset, offset + width) of n_heads heads (head_stride floats apart) of each row by the row's
   position; inverse != 0 rotates back. positions [n_rows]. dim_row only bounds the check offset + width <= dim_row. */
DSA_API dsa_status dsa_rope_rows(float *x, int64_t n_rows, int64_t row_stride, int32_t n_heads, int64_t head_stride,
                                 int32_t dim_row, const dsa_rope *rope, const int64_t *positions, int inverse);
/* f_i for i in [0, width/2), spec 2.1 with n = width. */
DSA_API dsa_status dsa_rope_frequencies(const dsa_rope *rope, double *f);

/* ---- caches ------------------------------------------------------------------------------- */
/* What a cache is; zero = contiguous f32 latents of the config's dims. */
typedef struct dsa_cache_desc {
    dsa_kind kind;               /* DSA_LATENT: rows [c | k_pe]; DSA_INDEX_KEY: rows k_I */
    dsa_type format;             /* latent: F32, BF16, FP8; index key: F32, BF16, FP8, INT8 */
    int32_t dim;                 /* R or D                                    0 = from the config */
    int32_t dim_rope;            /* latent only: r                            0 = from the config, DSA_NONE = 0 */
    dsa_hadamard hadamard;       /* index keys only                           0 = the config's, which may be AUTO */
    dsa_device device;
    int64_t capacity;            /* rows, 1 .. 2^31 - 1 */
    int32_t page_size;           /* rows per page                             0 = one page of `capacity` rows */
} dsa_cache_desc;

/* One sequence's rows of one layer: a view plus its length. Every field may be read; the first group may be filled by
   hand to lay a view over memory that the library does not know (then call dsa_cache_check once).

   Row i lives in page p = block_table[i / page_size] (p = i / page_size without a table), at offset o = i % page_size:
     F32, BF16, FP8 latents  data + p * page_stride + o * row_stride
     FP8, INT8 index keys    data + p * page_stride + o * dim,  its f32 scale at
                             scales + p * scale_page_stride + o * 4  (scales NULL: behind the page's data, at
                             data + p * page_stride + page_size * dim + o * 4: DeepGEMM's planar page) */
typedef struct dsa_cache {
    dsa_kind kind;
    dsa_type format;
    int32_t dim, dim_rope;       /* resolved: dim_rope >= 0 here */
    int32_t hadamard;            /* 1: rows are Hadamard-rotated (append rotates them, score rotates the queries) */
    int32_t page_size;           /* rows per page, >= 1 */
    int64_t n_pages;             /* pages in the pool `data` points to */
    int64_t n_blocks;            /* entries of block_table; pages of this sequence */
    const int32_t *block_table;  /* NULL: block b is page b */
    void *data;
    void *scales;
    size_t row_stride, page_stride, scale_page_stride;   /* bytes */
    int64_t len;                 /* rows written so far */
    dsa_device device;           /* where the rows live: CPU or CUDA, never AUTO */
    void *owned;                 /* memory to release, or NULL */
    dsa_allocator allocator;     /* whose it is */
} dsa_cache;

/* Layout calculators. dim_rope: 0 or DSA_NONE = none here (no config is at hand).
   Latent row bytes: F32 4(R+r), BF16 2(R+r), FP8 R + 4 ceil(R/128) + 2r. Index key: F32 4D, BF16 2D, FP8 and INT8 D + 4.
   A planar page: page_size * (D + 4), rounded up to 4. ERR_SHAPE, ERR_FORMAT, ERR_OVERFLOW. */
DSA_API dsa_status dsa_row_bytes(dsa_kind kind, dsa_type format, int32_t dim, int32_t dim_rope, size_t *bytes);
DSA_API dsa_status dsa_page_bytes(dsa_kind kind, dsa_type format, int32_t dim, int32_t dim_rope, int32_t page_size, size_t *bytes);
/* Bytes that dsa_cache_init wants for this desc. */
DSA_API dsa_status dsa_cache_bytes(const dsa_ctx *ctx, const dsa_cache_desc *desc, size_t *bytes);
/* Empty cache in the caller's memory (any alignment; contents need no initialisation). ERR_CAPACITY if it is too small. */
DSA_API dsa_status dsa_cache_init(const dsa_ctx *ctx, const dsa_cache_desc *desc, void *memory, size_t bytes, dsa_cache *cache);
/* The same in memory from the config's allocator; dsa_cache_destroy gives it back. ERR_MEMORY. */
DSA_API dsa_status dsa_cache_create(const dsa_ctx *ctx, const dsa_cache_desc *desc, dsa_cache *cache);
DSA_API void       dsa_cache_destroy(dsa_cache *cache);    /* NULL and zeroed caches are fine */
/* View over a pool of pages that the caller owns. page_stride 0 = tight. block_table may be NULL. */
DSA_API dsa_status dsa_cache_view(const dsa_ctx *ctx, const dsa_cache_desc *desc, void *pool, int64_t n_pages, size_t page_stride,
                                  const int32_t *block_table, int64_t n_blocks, int64_t len, dsa_cache *cache);
/* Checks a view filled by hand: ERR_NULL, ERR_SHAPE, ERR_FORMAT, ERR_TABLE, ERR_CAPACITY, ERR_OVERFLOW. */
DSA_API dsa_status dsa_cache_check(const dsa_ctx *ctx, const dsa_cache *cache);
DSA_API int64_t    dsa_cache_capacity(const dsa_cache *cache);
/* Keeps rows [0, n_rows). ERR_ARGUMENT if n_rows > len. Clear is truncate(0). */
DSA_API dsa_status dsa_cache_truncate(const dsa_ctx *ctx, dsa_cache *cache, int64_t n_rows);
/* Rows [begin, end) as f32 [end - begin, dim + dim_rope], dequantised. Hadamard-rotated keys come back as stored
   (rotated); dsa_hadamard_rows undoes it. ERR_ARGUMENT unless 0 <= begin <= end <= len. */
DSA_API dsa_status dsa_cache_read(const dsa_ctx *ctx, const dsa_cache *cache, int64_t begin, int64_t end, float *out);

/* ---- batches ------------------------------------------------------------------------------ */
/* One sequence in a call. A call serves n_seqs of them; its query rows are the sequences' rows one after the other
   ("rows" below: sum of n_q). Query i of a sequence sits at row len - n_q + i and sees rows [0, len - n_q + i]
   unless ks/ke say otherwise: decode is n_q = 1, drafts are n_q = 2.., a prefill chunk is any n_q. */
typedef struct dsa_seq {
    dsa_cache *latent;           /* NULL where the call does not read latents */
    dsa_cache *index;            /* NULL where the call does not read index keys */
    int64_t len;                 /* rows visible to this call; 0 = the cache's len, DSA_NONE = 0. Pass your own beside an appender. */
    int32_t n_q;                 /* queries (append: rows to write); 0 = 1, DSA_NONE = 0 */
} dsa_seq;

/* ---- 1. append ---------------------------------------------------------------------------- */
typedef struct dsa_append_args {
    int32_t n_seqs;
    const dsa_seq *seqs;         /* n_q rows go behind row len - 1 of each cache; seq.len is ignored */
    const float *latent;         /* [rows, R + r]  normalised c, then rotated k_pe; NULL = no latent cache is written */
    const float *index_key;      /* [rows, D]      normalised and rotated k_I, before Hadamard; NULL likewise */
    const int64_t *slots;        /* optional [rows]: write to these physical slots instead; -1 = skip; len stays as it is */
} dsa_append_args;
/* All or nothing: capacity, tables and slots of every sequence are checked before the first byte is written. */
DSA_API dsa_status dsa_append(const dsa_ctx *ctx, const dsa_append_args *args);

/* ---- 2. score ----------------------------------------------------------------------------- */
/* I[t,s] = sum_h w[t,h] ReLU(<q[t,h], k[s]>)    DeepSeek-V3.2-Exp paper, eq. (1) */
typedef struct dsa_score_args {
    int32_t n_seqs;
    const dsa_seq *seqs;         /* index caches: one format, one set of dims, one Hadamard flag */
    const float *q;              /* [rows, HI, D]  after RoPE, before Hadamard and rounding */
    const float *w;              /* [rows, HI]     with HI^-0.5 D^-0.5 already in; may be negative */
    const int64_t *ks, *ke;      /* optional [rows]: half-open key range, clamped to [0, len]; both or neither */
    int32_t n_index_heads;       /* 0 = the config's */
    void *workspace;             /* any alignment */
    size_t workspace_size;
} dsa_score_args;

/* What selection writes. */
typedef struct dsa_selection {
    int32_t top_k;               /* k; 0 = the config's */
    dsa_order order;
    int32_t *indices;            /* [rows, k] logical positions, unused places -1 */
    float *scores;               /* optional [rows, k] in the same order, unused places -inf */
    int32_t *counts;             /* optional [rows] places used */
} dsa_selection;

DSA_API dsa_status dsa_score_workspace(const dsa_ctx *ctx, const dsa_score_args *args, size_t *bytes);
/* scores [rows, stride]: columns [0, n_cols), -inf outside the row's key range. n_cols <= stride. */
DSA_API dsa_status dsa_score(const dsa_ctx *ctx, const dsa_score_args *args, float *scores, int64_t n_cols, int64_t stride);

/* ---- 3. select ---------------------------------------------------------------------------- */
typedef struct dsa_select_args {
    int64_t n_rows;
    const float *scores;         /* [n_rows, stride] */
    int64_t n_cols, stride;      /* floats */
    const int64_t *ks, *ke;      /* optional [n_rows]: only columns [ks, ke) are read; both or neither; clamped to [0, n_cols] */
    void *workspace;
    size_t workspace_size;
} dsa_select_args;
/* Exact top-k under the total order (score descending, then lower index); NaN and -inf are never selected, -0 == +0. */
DSA_API dsa_status dsa_select_workspace(const dsa_ctx *ctx, const dsa_select_args *args, const dsa_selection *out, size_t *bytes);
DSA_API dsa_status dsa_select(const dsa_ctx *ctx, const dsa_select_args *args, const dsa_selection *out);

/* Score and select in one pass; a row of scores never exists. Rows with at most k visible keys skip scoring and take them
   all, ascending (dense fallback), unless order is RANK or scores are asked for. */
DSA_API dsa_status dsa_score_select_workspace(const dsa_ctx *ctx, const dsa_score_args *args, const dsa_selection *out, size_t *bytes);
DSA_API dsa_status dsa_score_select(const dsa_ctx *ctx, const dsa_score_args *args, const dsa_selection *out);

/* The exact top-k of the union of several selections (shards of one sequence, whose indices the caller has already made
   global and which must be disjoint). indices[p], scores[p]: [n_rows, k_in]; entries -1 are skipped. */
typedef struct dsa_merge_topk_args {
    int32_t n_parts, k_in;
    int64_t n_rows;
    const int32_t *const *indices;
    const float *const *scores;
    void *workspace;
    size_t workspace_size;
} dsa_merge_topk_args;
DSA_API dsa_status dsa_merge_topk_workspace(const dsa_ctx *ctx, const dsa_merge_topk_args *args, const dsa_selection *out, size_t *bytes);
DSA_API dsa_status dsa_merge_topk(const dsa_ctx *ctx, const dsa_merge_topk_args *args, const dsa_selection *out);

/* ---- 4. attend ---------------------------------------------------------------------------- */
/* The running softmax of every (row, head): after any number of adds over keys s with logits x_s = scale <q, kv_s>
       max = max x_s      sum = Sum e^(x_s - max)      out = Sum e^(x_s - max) c_s       (empty: -inf, 0, 0)
   The arrays are the caller's and may be stored, sent or inspected between calls. */
typedef struct dsa_attend_state {
    int64_t n_rows;
    int32_t n_heads;             /* 0 = the config's */
    int32_t dim_v;               /* width of the value, the first dim_v channels of a row; 0 = the config's dim_latent */
    float *max;                  /* [n_rows, n_heads] */
    float *sum;                  /* [n_rows, n_heads] */
    float *out;                  /* [n_rows, n_heads, dim_v] */
} dsa_attend_state;

typedef enum dsa_attend_what {
    DSA_ATTEND_LIST = 0,         /* the index list of each row */
    DSA_ATTEND_RANGE,            /* rows [ks, ke), clamped to [0, len] */
    DSA_ATTEND_VISIBLE           /* rows [0, len - n_q + i + 1) of query i */
} dsa_attend_what;

typedef struct dsa_attend_args {
    int32_t n_seqs;
    const dsa_seq *seqs;         /* latent caches: one format and one set of dims */
    const float *q;              /* [rows, n_heads, R + r]  [q_lat | q_pe] */
    float scale;                 /* softmax scale; 0 = the config's */
    dsa_attend_what what;
    dsa_index_kind index_kind;
    const int32_t *indices;      /* LIST: [rows, index_stride]; anything invalid is skipped; duplicates count as often as they appear */
    int64_t n_indices;           /* entries read per row; 0 = the config's top_k */
    int64_t index_stride;        /* int32s from row to row; 0 = n_indices */
    const int32_t *counts;       /* optional [rows]: read only the first counts[row] entries (clamped to [0, n_indices]) */
    const int64_t *ks, *ke;      /* RANGE: [rows] */
    void *workspace;
    size_t workspace_size;
} dsa_attend_args;

DSA_API dsa_status dsa_attend_begin(const dsa_ctx *ctx, const dsa_attend_state *state);
DSA_API dsa_status dsa_attend_workspace(const dsa_ctx *ctx, const dsa_attend_args *args, const dsa_attend_state *state, size_t *bytes);
DSA_API dsa_status dsa_attend_add(const dsa_ctx *ctx, const dsa_attend_args *args, const dsa_attend_state *state);
/* out [n_rows, n_heads, dim_v] (may be state->out), lse and max_logit [n_rows, n_heads] optional, natural log, without the
   sink. sinks [n_heads] optional: logits z_h of a column whose value is 0, not scaled; -inf has no effect, +inf gives 0.
   Empty row: out 0, lse +inf, max_logit -inf. */
DSA_API dsa_status dsa_attend_finish(const dsa_ctx *ctx, const dsa_attend_state *state, const float *sinks,
                                     float *out, float *lse, float *max_logit);
/* Keeps the state as a partial: out normalised, no sink, lse natural, -inf where empty. */
DSA_API dsa_status dsa_attend_partial(const dsa_ctx *ctx, const dsa_attend_state *state, float *out, float *lse);
/* Merges n_parts partials, in this order, exactly: out = Sum_p e^(lse_p - L) out_p, L = ln Sum_p e^lse_p. Sinks as in finish.
   outs[p] [n_rows, n_heads, dim_v], lses[p] [n_rows, n_heads]. lse (optional) is +inf where everything was empty. */
DSA_API dsa_status dsa_attend_merge(const dsa_ctx *ctx, int32_t n_parts, const float *const *outs, const float *const *lses,
                                    int64_t n_rows, int32_t n_heads, int32_t dim_v, const float *sinks, float *out, float *lse);

/* ---- the fused step: [append] -> score + select -> attend ------------------------------------ */
typedef struct dsa_step_args {
    int32_t n_seqs;
    const dsa_seq *seqs;         /* both caches; n_q queries each */
    const float *latent;         /* optional [rows, R + r]: rows to append first, with index_key; both or neither */
    const float *index_key;      /* optional [rows, D]. When appending, seq.len is ignored: the new rows are the queries' */
    const float *q;              /* [rows, H, R + r] */
    const float *index_q;        /* [rows, HI, D] */
    const float *index_w;        /* [rows, HI] */
    float scale;                 /* 0 = the config's */
    const float *sinks;          /* optional [H] */
    int32_t top_k;               /* 0 = the config's */
    float *out;                  /* [rows, H, R] */
    float *lse;                  /* optional [rows, H] */
    int32_t *indices;            /* optional [rows, k]: what was selected, ascending */
    void *workspace;
    size_t workspace_size;
} dsa_step_args;
DSA_API dsa_status dsa_step_workspace(const dsa_ctx *ctx, const dsa_step_args *args, size_t *bytes);
DSA_API dsa_status dsa_step(const dsa_ctx *ctx, const dsa_step_args *args);

/* ---- 5. the layer ------------------------------------------------------------------------- */
/* A weight in the caller's memory, row-major [out, in], any alignment. FP8: scale_inv [ceil(out/128), ceil(in/128)] f32,
   value = e4m3 * scale_inv (DeepSeek's weight_scale_inv). Vectors are tensors with out = 1. */
typedef struct dsa_tensor {
    const void *data;
    dsa_type type;               /* F32, BF16, F16, FP8 */
    const float *scale_inv;      /* FP8 only */
} dsa_tensor;

/* Hugging Face names in the comments. The indexer's five are NULL in layers that share another layer's list. */
typedef struct dsa_layer_weights {
    dsa_tensor q_a;              /* q_a_proj            [q_lora, hidden] */
    dsa_tensor q_a_norm;         /* q_a_layernorm       [q_lora] */
    dsa_tensor q_b;              /* q_b_proj            [H (nope + rope), q_lora] */
    dsa_tensor kv_a;             /* kv_a_proj_with_mqa  [R + r, hidden] */
    dsa_tensor kv_a_norm;        /* kv_a_layernorm      [R] */
    dsa_tensor kv_b;             /* kv_b_proj           [H (nope + v), R]: per head W_UK then W_UV */
    dsa_tensor o;                /* o_proj              [hidden, H v] */
    dsa_tensor index_q_b;        /* indexer.wq_b        [HI D, q_lora] */
    dsa_tensor index_k;          /* indexer.wk          [D, hidden] */
    dsa_tensor index_k_norm;     /* indexer.k_norm.weight [D] */
    dsa_tensor index_k_bias;     /* indexer.k_norm.bias   [D] */
    dsa_tensor index_w;          /* indexer.weights_proj  [HI, hidden] */
} dsa_layer_weights;

typedef enum dsa_layer_mode {
    DSA_LAYER_SPARSE = 0,        /* DSA */
    DSA_LAYER_DENSE,             /* everything visible */
    DSA_LAYER_WINDOW             /* the newest top_k visible rows, the query's own included */
} dsa_layer_mode;

typedef struct dsa_layer_args {
    const dsa_layer_weights *weights;
    int32_t n_seqs;
    const dsa_seq *seqs;         /* n_q new rows each, appended to both caches (index NULL in a layer without indexer); seq.len is ignored */
    const float *x;              /* [rows, hidden]  output of input_layernorm */
    float *y;                    /* [rows, hidden]  output of o_proj, before the residual; may not alias x */
    const int64_t *positions;    /* optional [rows] RoPE positions; NULL = the row number in the cache */
    dsa_layer_mode mode;
    const int32_t *indices_in;   /* optional [rows, k]: use these lists (a shared layer's, or a replay); index keys are still written */
    int32_t *indices_out;        /* optional [rows, k]: the lists used; SPARSE only, may not alias indices_in */
    void *workspace;
    size_t workspace_size;
} dsa_layer_args;
DSA_API dsa_status dsa_layer_workspace(const dsa_ctx *ctx, const dsa_layer_args *args, size_t *bytes);
/* Works through the rows in tiles of DSA_LAYER_TILE, so the workspace does not grow with the chunk. */
DSA_API dsa_status dsa_layer(const dsa_ctx *ctx, const dsa_layer_args *args);
#define DSA_LAYER_TILE 32

/* ---- threads ------------------------------------------------------------------------------ */
#ifndef DSA_NO_THREADS
/* A small pool: n_threads - 1 workers plus the caller. config.parallel_for = dsa_pool_run, parallel_user = the pool,
   n_threads = the pool's. One call at a time may run on a pool. */
typedef struct dsa_pool dsa_pool;
DSA_API dsa_status dsa_pool_create(const dsa_allocator *allocator, int32_t n_threads, dsa_pool **pool);   /* allocator may be NULL */
DSA_API void       dsa_pool_destroy(dsa_pool *pool);                                                     /* NULL is fine */
DSA_API void       dsa_pool_run(void *pool, int32_t n_tasks, dsa_task task, void *arg);                  /* a dsa_parallel_for */
#endif

#ifdef __cplusplus
}
#endif
#endif /* DSA_H_INCLUDED */

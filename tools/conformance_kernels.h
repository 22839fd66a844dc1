/* conformance_kernels.h - the files that hold one kernel's operands and results: FlashMLA's sparse forward, FlashMLA's
   FP8 cache, DeepGEMM's MQA logits. All sizes come from the tensors. */
#ifndef CONFORMANCE_KERNELS_H
#define CONFORMANCE_KERNELS_H

#define PAGE 16                  /* rows per page where the file names no page size; small, so that lists cross many pages */

static const char *const layout_names[] = { "contiguous", "paged", "paged-slots" };
typedef enum layout { CONTIGUOUS, PAGED, PAGED_SLOTS } layout;

/* ---- FlashMLA sparse forward ---------------------------------------------------------------- */
typedef struct flash {
    int64_t n_rows, n_kv;
    int32_t n_heads, dim, dim_v, n_indices;
    float scale;
    float *q, *kv, *sinks, *out, *lse, *max_logit;  /* operands (sinks may be NULL), and the file's results */
    int32_t *indices, *counts;                       /* counts may be NULL */
} flash;

static void flash_free(flash *f)
{
    free(f->q); free(f->kv); free(f->sinks); free(f->out); free(f->lse); free(f->max_logit);
    free(f->indices); free(f->counts);
}

/* 0, or FILE_BAD after a message. */
static int flash_read(const run *r, const st_file *file, flash *f)
{
    static const char *const names[] = { "q", "kv", "indices", "sm_scale", "out_f32", "max_logits", "lse" };
    const st_tensor *t[7], *sink = st_find(file, "attn_sink"), *counts = st_find(file, "topk_length");
    memset(f, 0, sizeof *f);
    for (int i = 0; i < 7; i++)
        if ((t[i] = st_find(file, names[i])) == NULL) return bad_file(r, "tensor %s is missing", names[i]);
    const int64_t any[] = { -1, -1, -1 };
    if (!has_shape(r, t[0], 3, any)) return FILE_BAD;
    const int64_t kv[] = { -1, 1, t[0]->shape[2] }, indices[] = { t[0]->shape[0], 1, -1 }, one[] = { 1 };
    const int64_t out[] = { t[0]->shape[0], t[0]->shape[1], -1 }, *rows = t[0]->shape, *heads = t[0]->shape + 1;
    if (!has_shape(r, t[1], 3, kv) || !has_shape(r, t[2], 3, indices) || !has_shape(r, t[3], 1, one) ||
        !has_shape(r, t[4], 3, out) || !has_shape(r, t[5], 2, out) || !has_shape(r, t[6], 2, out) ||
        (sink && !has_shape(r, sink, 1, heads)) || (counts && !has_shape(r, counts, 1, rows)))
        return FILE_BAD;
    if (t[4]->shape[2] > t[0]->shape[2]) return bad_file(r, "out_f32: wider than the rows of kv");
    if (!has_dtype(t[3], "F32")) return bad_file(r, "sm_scale: dtype %s where F32 is wanted", t[3]->dtype);
    f->n_rows = t[0]->shape[0];
    f->n_heads = (int32_t)t[0]->shape[1];
    f->dim = (int32_t)t[0]->shape[2];
    f->n_kv = t[1]->shape[0];
    f->n_indices = (int32_t)t[2]->shape[2];
    f->dim_v = (int32_t)t[4]->shape[2];
    memcpy(&f->scale, t[3]->data, sizeof f->scale);
    f->q = tensor_floats(r, t[0]);
    f->kv = tensor_floats(r, t[1]);
    f->indices = tensor_int32(r, t[2]);
    f->out = tensor_floats(r, t[4]);
    f->max_logit = tensor_floats(r, t[5]);
    f->lse = tensor_floats(r, t[6]);
    if (sink) f->sinks = tensor_floats(r, sink);
    if (counts) f->counts = tensor_int32(r, counts);
    return f->q && f->kv && f->indices && f->out && f->max_logit && f->lse && (!sink || f->sinks) &&
           (!counts || f->counts) ? 0 : FILE_BAD;
}

/* Fills every row that no list names with NaN: what is not selected must not leak. */
static void flash_poison_unused(flash *f)
{
    unsigned char *used = (unsigned char *)allocate((size_t)f->n_kv, 1);
    memset(used, 0, (size_t)f->n_kv);
    for (int64_t row = 0; row < f->n_rows; row++) {
        int32_t n = f->counts && f->counts[row] < f->n_indices ? f->counts[row] : f->n_indices;
        const int32_t *list = f->indices + row * f->n_indices;
        for (int32_t i = 0; i < n; i++)
            if (list[i] >= 0 && list[i] < f->n_kv) used[list[i]] = 1;
    }
    for (int64_t s = 0; s < f->n_kv; s++)
        if (!used[s]) memset(f->kv + s * f->dim, 0xFF, (size_t)f->dim * sizeof(float));
    free(used);
}

/* The index lists as physical slots; what is invalid as a position stays invalid as a slot. */
static int32_t *flash_slots(const flash *f, const dsa_cache *cache)
{
    int64_t n = f->n_rows * f->n_indices, n_slots = cache->n_pages * cache->page_size;
    int32_t *slots = (int32_t *)allocate((size_t)n, sizeof *slots);
    for (int64_t i = 0; i < n; i++) {
        int64_t s = f->indices[i];
        if (s >= f->n_kv) s = s - f->n_kv + n_slots;
        else if (s >= 0) s = (int64_t)cache->block_table[s / cache->page_size] * cache->page_size + s % cache->page_size;
        slots[i] = s > INT32_MAX ? INT32_MAX : (int32_t)s;
    }
    return slots;
}

/* Rows [begin, begin + n) of a state. */
static dsa_attend_state state_rows(const dsa_attend_state *all, int64_t begin, int64_t n)
{
    dsa_attend_state part = *all;
    part.n_rows = n;
    part.max += begin * all->n_heads;
    part.sum += begin * all->n_heads;
    part.out += begin * all->n_heads * all->dim_v;
    return part;
}

static dsa_attend_state state_make(int64_t n_rows, int32_t n_heads, int32_t dim_v)
{
    dsa_attend_state state;
    state.n_rows = n_rows;
    state.n_heads = n_heads;
    state.dim_v = dim_v;
    state.max = allocate_floats(n_rows * n_heads);
    state.sum = allocate_floats(n_rows * n_heads);
    state.out = allocate_floats(n_rows * n_heads * dim_v);
    return state;
}

static void state_free(dsa_attend_state *state) { free(state->max); free(state->sum); free(state->out); }

/* Adds entries [first, end) of every row's list to the state, in the calls of a schedule. */
static dsa_status flash_add(const dsa_ctx *ctx, const flash *f, store *kv, const int32_t *list, layout where,
                            schedule plan, int32_t first, int32_t end, const dsa_attend_state *all)
{
    dsa_status status = DSA_OK;
    for (int64_t done = 0, n; status == DSA_OK && done < f->n_rows; done += n) {
        n = next_chunk(plan, done, f->n_rows);
        dsa_attend_state state = state_rows(all, done, n);
        dsa_attend_args args = { 0 };
        int32_t *counts = (int32_t *)allocate((size_t)n, sizeof *counts);
        size_t bytes = 0;
        for (int64_t i = 0; i < n; i++) {
            int32_t count = f->counts ? f->counts[done + i] : f->n_indices;
            counts[i] = count > first ? count - first : 0;       /* beyond the list: the call clamps */
        }
        dsa_seq *seqs = query_seqs(kv, n, &args.n_seqs);
        args.seqs = seqs;
        args.q = f->q + done * f->n_heads * f->dim;
        args.scale = f->scale;
        args.index_kind = where == PAGED_SLOTS ? DSA_PHYSICAL : DSA_LOGICAL;
        args.indices = list + done * f->n_indices + first;
        args.n_indices = end - first;
        args.index_stride = f->n_indices;
        args.counts = f->counts ? counts : NULL;
        status = dsa_attend_workspace(ctx, &args, &state, &bytes);
        args.workspace = poisoned(bytes);
        args.workspace_size = bytes;
        if (status == DSA_OK) status = dsa_attend_add(ctx, &args, &state);
        free(args.workspace);
        free(counts);
        free(seqs);
    }
    return status;
}

static void flash_compare(run *r, const flash *f, const float *out, const float *lse, const float *max_logit, const char *path)
{
    int64_t n = f->n_rows * f->n_heads;
    report(r, "tolerance", tolerance_used(out, f->out, n * f->dim_v, 8e-4, 3.01 / 128), 1, "%s/out", path);
    report(r, "sim", similarity_gap(out, f->out, n * f->dim_v), 7e-6, "%s/out", path);
    report(r, "tolerance", tolerance_used(lse, f->lse, n, 1e-6, 2.01 / 65536), 1, "%s/lse", path);
    if (max_logit)
        report(r, "tolerance", tolerance_used(max_logit, f->max_logit, n, 1e-6, 2.01 / 65536), 1, "%s/max_logits", path);
}

static void flash_attend(run *r, const dsa_ctx *ctx, const flash *f, store *kv, layout where, schedule plan, const char *format)
{
    int64_t n = f->n_rows * f->n_heads;
    dsa_attend_state state = state_make(f->n_rows, f->n_heads, f->dim_v);
    float *out = allocate_floats(n * f->dim_v), *lse = allocate_floats(n), *max_logit = allocate_floats(n);
    int32_t *slots = where == PAGED_SLOTS ? flash_slots(f, &kv->cache) : NULL;
    char path[96];
    snprintf(path, sizeof path, "%s/%s/%s", format, layout_names[where], schedule_names[plan]);
    if (called(r, dsa_attend_begin(ctx, &state), path) &&
        called(r, flash_add(ctx, f, kv, slots ? slots : f->indices, where, plan, 0, f->n_indices, &state), path) &&
        called(r, dsa_attend_finish(ctx, &state, f->sinks, out, lse, max_logit), path))
        flash_compare(r, f, out, lse, max_logit, path);
    free(slots);
    free(out);
    free(lse);
    free(max_logit);
    state_free(&state);
}

/* The lists cut in two: both halves added to one state, then each half as a shard of its own, merged. */
static void flash_halves(run *r, const dsa_ctx *ctx, const flash *f, store *kv, const char *format)
{
    int64_t n = f->n_rows * f->n_heads;
    int32_t half = f->n_indices / 2;
    dsa_attend_state whole = state_make(f->n_rows, f->n_heads, f->dim_v), part = state_make(f->n_rows, f->n_heads, f->dim_v);
    float *out = allocate_floats(n * f->dim_v), *lse = allocate_floats(n), *max_logit = allocate_floats(n);
    float *outs[2], *lses[2];
    char path[96];
    for (int i = 0; i < 2; i++) outs[i] = allocate_floats(n * f->dim_v), lses[i] = allocate_floats(n);

    snprintf(path, sizeof path, "%s/two-adds", format);
    int ok = called(r, dsa_attend_begin(ctx, &whole), path) &&
             called(r, flash_add(ctx, f, kv, f->indices, CONTIGUOUS, ONE_SHOT, 0, half, &whole), path) &&
             called(r, flash_add(ctx, f, kv, f->indices, CONTIGUOUS, ONE_SHOT, half, f->n_indices, &whole), path) &&
             called(r, dsa_attend_finish(ctx, &whole, f->sinks, out, lse, max_logit), path);
    if (ok) flash_compare(r, f, out, lse, max_logit, path);

    snprintf(path, sizeof path, "%s/merged-partials", format);
    ok = 1;
    for (int i = 0; ok && i < 2; i++)
        ok = called(r, dsa_attend_begin(ctx, &part), path) &&
             called(r, flash_add(ctx, f, kv, f->indices, CONTIGUOUS, ONE_SHOT, i ? half : 0, i ? f->n_indices : half, &part), path) &&
             called(r, dsa_attend_partial(ctx, &part, outs[i], lses[i]), path);
    if (ok && called(r, dsa_attend_merge(ctx, 2, (const float *const *)outs, (const float *const *)lses, f->n_rows, f->n_heads,
                                         f->dim_v, f->sinks, out, lse), path))
        flash_compare(r, f, out, lse, NULL, path);

    for (int i = 0; i < 2; i++) { free(outs[i]); free(lses[i]); }
    free(out);
    free(lse);
    free(max_logit);
    state_free(&whole);
    state_free(&part);
}

static int check_sparse_forward(run *r, const st_file *file)
{
    static const struct { dsa_type type; const char *name; } formats[] = { { DSA_F32, "f32" }, { DSA_BF16, "bf16" } };
    dsa_config config = r->base;
    dsa_ctx ctx;
    flash f;
    int bad = flash_read(r, file, &f);
    if (bad) {
        flash_free(&f);
        return bad;
    }
    flash_poison_unused(&f);
    config.n_heads = f.n_heads;
    config.dim_latent = f.dim_v;
    config.dim_rope = f.dim > f.dim_v ? f.dim - f.dim_v : DSA_NONE;
    config.index_rope_width = DSA_NONE;    /* no indexer in this file: its defaults need not suit these dims */
    if (called(r, dsa_init(&ctx, &config), "init"))
        for (int i = 0; i < 2; i++)
            for (int where = CONTIGUOUS; where <= PAGED_SLOTS; where++) {
                dsa_cache_desc desc = { 0 };
                store kv;
                desc.format = formats[i].type;
                desc.capacity = f.n_kv;
                if (called(r, store_make(&ctx, desc, where == CONTIGUOUS ? 0 : PAGE, &kv), "cache") &&
                    called(r, store_append(&ctx, &kv, f.kv, f.n_kv, CHUNKED), "append")) {
                    for (int plan = 0; plan < N_SCHEDULES; plan++)
                        flash_attend(r, &ctx, &f, &kv, (layout)where, (schedule)plan, formats[i].name);
                    if (where == CONTIGUOUS) flash_halves(r, &ctx, &f, &kv, formats[i].name);
                }
                store_free(&kv);
            }
    flash_free(&f);
    return FILE_OK;
}

/* ---- FlashMLA FP8 cache --------------------------------------------------------------------- */
/* The split of a row into R latent and r rotary channels, from its width and its bytes R + 4 ceil(R/128) + 2r. Several
   R can give the same bytes (512 + 64 and 516 + 60); the bf16 tail, stored unchanged, decides for the longest that fits. */
static int32_t split_of_row(const uint16_t *kv, const unsigned char *bytes, int64_t n_rows, int64_t dim, int64_t row_bytes)
{
    int32_t first = 0;
    for (int64_t latent = 1; latent <= dim; latent++) {
        int64_t tail = dim - latent, row = 0;
        if (latent + 4 * ((latent + 127) / 128) + 2 * tail != row_bytes) continue;
        if (!first) first = (int32_t)latent;
        while (row < n_rows && memcmp(bytes + (row + 1) * row_bytes - 2 * tail, kv + (row + 1) * dim - tail, (size_t)(2 * tail)) == 0) row++;
        if (row == n_rows) return (int32_t)latent;
    }
    return first;                /* no tail fits: the byte comparison will say so */
}

/* Gathers the bytes of rows [0, n) of a cache. */
static unsigned char *cache_bytes(const dsa_cache *cache, int64_t n, size_t row_bytes)
{
    unsigned char *bytes = (unsigned char *)allocate((size_t)n, row_bytes);
    for (int64_t i = 0; i < n; i++) {
        int64_t page = i / cache->page_size;
        if (cache->block_table) page = cache->block_table[page];
        memcpy(bytes + (size_t)i * row_bytes, (const unsigned char *)cache->data + (size_t)page * cache->page_stride +
               (size_t)(i % cache->page_size) * cache->row_stride, row_bytes);
    }
    return bytes;
}

static double bytes_differ(const unsigned char *a, const unsigned char *b, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += a[i] != b[i];
    return (double)count;
}

static void fp8_compare(run *r, const dsa_ctx *ctx, const dsa_cache *cache, int64_t n, const unsigned char *want_bytes,
                        size_t row_bytes, const float *want, const char *path)
{
    int64_t width = cache->dim + cache->dim_rope;
    unsigned char *bytes = cache_bytes(cache, n, row_bytes);
    float *read = allocate_floats(n * width);
    report(r, "bytes_differ", bytes_differ(bytes, want_bytes, (size_t)n * row_bytes), 0, "%s/v32_bytes", path);
    if (called(r, dsa_cache_read(ctx, cache, 0, n, read), path))
        report(r, "values_differ", values_differ(read, want, n * width), 0, "%s/v32_dequant", path);
    free(bytes);
    free(read);
}

static int check_fp8_cache(run *r, const st_file *file)
{
    const st_tensor *kv = st_find(file, "kv"), *packed = st_find(file, "v32_bytes"), *dequant = st_find(file, "v32_dequant");
    const int64_t any[] = { -1, -1, -1, -1 };
    if (!kv || !packed || !dequant) return bad_file(r, "kv, v32_bytes and v32_dequant belong together, one is missing");
    if (!has_shape(r, kv, 4, any) || !has_shape(r, dequant, 4, kv->shape)) return FILE_BAD;
    const int64_t want[] = { kv->shape[0], kv->shape[1], kv->shape[2], -1 };
    if (!has_shape(r, packed, 4, want)) return FILE_BAD;
    if (!has_dtype(kv, "BF16")) return bad_file(r, "kv: dtype %s where BF16 is wanted", kv->dtype);
    if (!has_dtype(packed, "U8")) return bad_file(r, "v32_bytes: dtype %s where U8 is wanted", packed->dtype);

    int64_t dim = kv->shape[3], n = kv->count / dim, page = kv->shape[1] * kv->shape[2];
    size_t row_bytes = (size_t)packed->shape[3], size = 0;
    const unsigned char *bytes = (const unsigned char *)packed->data;
    int32_t latent = split_of_row((const uint16_t *)kv->data, bytes, n, dim, packed->shape[3]);
    if (!latent) return bad_file(r, "v32_bytes: %zu bytes fit no split of %lld channels", row_bytes, (long long)dim);
    float *rows = tensor_floats(r, kv), *values = tensor_floats(r, dequant);
    if (!rows || !values) {
        free(rows);
        free(values);
        return FILE_BAD;
    }
    dsa_config config = r->base;
    dsa_ctx ctx;
    config.dim_latent = latent;
    config.dim_rope = dim > latent ? (int32_t)(dim - latent) : DSA_NONE;
    config.index_rope_width = DSA_NONE;
    dsa_cache_desc desc = { 0 };
    desc.format = DSA_FP8;
    desc.capacity = n;
    int ok = called(r, dsa_init(&ctx, &config), "init") &&
             called(r, dsa_row_bytes(DSA_LATENT, DSA_FP8, latent, ctx.config.dim_rope, &size), "row_bytes");
    if (ok) report(r, "bytes_differ", fabs((double)size - (double)row_bytes), 0, "row_bytes");
    ok = ok && size == row_bytes;        /* a row of another size is another layout: nothing below would mean anything */

    for (int where = CONTIGUOUS; ok && where <= PAGED_SLOTS; where++)
        for (int plan = 0; plan < N_SCHEDULES; plan++) {
            char path[96];
            store s;
            snprintf(path, sizeof path, "%s/%s", layout_names[where], schedule_names[plan]);
            if (called(r, store_make(&ctx, desc, where == CONTIGUOUS ? 0 : (int32_t)page, &s), path)) {
                dsa_status status = DSA_OK;
                if (where == PAGED_SLOTS) {  /* rows go where slot_mapping says, as vLLM and SGLang append; then a reader's length */
                    for (int64_t done = 0, m; status == DSA_OK && done < n; done += m) {
                        dsa_seq seq = { 0 };
                        dsa_append_args args = { 0 };
                        m = next_chunk((schedule)plan, done, n);
                        int64_t *slots = (int64_t *)allocate((size_t)m, sizeof *slots);
                        for (int64_t i = 0; i < m; i++) slots[i] = s.table[(done + i) / page] * page + (done + i) % page;
                        seq.latent = &s.cache;
                        seq.n_q = (int32_t)m;
                        args.n_seqs = 1;
                        args.seqs = &seq;
                        args.latent = rows + done * dim;
                        args.slots = slots;
                        status = dsa_append(&ctx, &args);
                        free(slots);
                    }
                    s.cache.len = n;
                } else {
                    status = store_append(&ctx, &s, rows, n, (schedule)plan);
                }
                if (called(r, status, path)) fp8_compare(r, &ctx, &s.cache, n, bytes, row_bytes, values, path);
            }
            store_free(&s);
        }

    if (ok) {                    /* the file's own bytes, read through a view */
        dsa_cache view;
        int shared;
        unsigned char *copy = store_memory(&ctx, packed->bytes, &shared);
        memcpy(copy, packed->data, packed->bytes);
        desc.page_size = (int32_t)page;
        desc.device = DSA_DEVICE_AUTO;
        if (called(r, dsa_cache_view(&ctx, &desc, copy, n / page, 0, NULL, n / page, n, &view), "view"))
            fp8_compare(r, &ctx, &view, n, bytes, row_bytes, values, "view");
        store_memory_free(copy, shared);
    }
    free(rows);
    free(values);
    return FILE_OK;
}

/* ---- DeepGEMM MQA logits -------------------------------------------------------------------- */
typedef struct mqa {
    int64_t n_rows, n_keys;
    int32_t n_heads, dim;
    float *q;
    const unsigned char *key;
    const float *key_scale, *w, *logits;
    int64_t *ks, *ke;
} mqa;

/* The file's keys as a cache, laid out by hand: one range of bytes and one of scales, or DeepGEMM's planar pages. */
static dsa_status mqa_store(const dsa_ctx *ctx, const mqa *m, layout where, store *s)
{
    dsa_cache_desc desc = { 0 };
    desc.kind = DSA_INDEX_KEY;
    desc.format = DSA_FP8;
    desc.capacity = m->n_keys;
    dsa_status status = store_make(ctx, desc, where == CONTIGUOUS ? 0 : PAGE, s);
    if (status != DSA_OK) return status;
    if (where == CONTIGUOUS) {
        size_t keys = (size_t)m->n_keys * (size_t)m->dim;
        store_memory_free(s->memory, s->shared);
        s->memory = store_memory(ctx, keys + (size_t)m->n_keys * 4, &s->shared);
        memcpy(s->memory, m->key, keys);
        memcpy(s->memory + keys, m->key_scale, (size_t)m->n_keys * 4);
        s->cache.data = s->memory;
        s->cache.scales = s->memory + keys;
    } else {
        for (int64_t i = 0; i < m->n_keys; i++) {
            unsigned char *page = s->memory + (size_t)s->table[i / PAGE] * s->cache.page_stride;
            memcpy(page + (i % PAGE) * m->dim, m->key + i * m->dim, (size_t)m->dim);
            memcpy(page + PAGE * m->dim + (i % PAGE) * 4, m->key_scale + i, 4);
        }
    }
    s->cache.len = m->n_keys;
    return dsa_cache_check(ctx, &s->cache);
}

static int mqa_score(run *r, const dsa_ctx *ctx, const mqa *m, store *s, layout where, schedule plan)
{
    int64_t stride = m->n_keys + 3, n = m->n_rows * m->n_keys;   /* an odd stride: columns are not assumed tight */
    float *scores = allocate_floats(m->n_rows * stride), *tight = allocate_floats(n);
    int32_t k = m->n_keys > 8 ? (int32_t)(m->n_keys / 8) : 1;
    int32_t *lists = (int32_t *)allocate((size_t)m->n_rows * (size_t)k, sizeof *lists);
    dsa_status status = DSA_OK;
    char path[96];
    snprintf(path, sizeof path, "%s/%s", layout_names[where], schedule_names[plan]);
    memset(scores, 0xFF, (size_t)(m->n_rows * stride) * sizeof *scores);
    for (int64_t done = 0, rows; status == DSA_OK && done < m->n_rows; done += rows) {
        dsa_score_args args = { 0 };
        dsa_selection picked = { 0 };
        size_t bytes = 0;
        rows = next_chunk(plan, done, m->n_rows);
        dsa_seq *seqs = query_seqs(s, rows, &args.n_seqs);
        args.seqs = seqs;
        args.q = m->q + done * m->n_heads * m->dim;
        args.w = m->w + done * m->n_heads;
        args.ks = m->ks + done;
        args.ke = m->ke + done;
        status = dsa_score_workspace(ctx, &args, &bytes);
        args.workspace = poisoned(bytes);
        args.workspace_size = bytes;
        if (status == DSA_OK) status = dsa_score(ctx, &args, scores + done * stride, m->n_keys, stride);
        free(args.workspace);

        picked.top_k = k;
        picked.indices = lists + done * k;
        if (status == DSA_OK) status = dsa_score_select_workspace(ctx, &args, &picked, &bytes);
        args.workspace = poisoned(bytes);
        args.workspace_size = bytes;
        if (status == DSA_OK) status = dsa_score_select(ctx, &args, &picked);
        free(args.workspace);
        free(seqs);
    }
    int ok = called(r, status, path);
    if (ok) {
        int64_t misplaced = 0, wrong = 0;
        double *row = (double *)allocate((size_t)m->n_keys, 2 * sizeof *row);
        for (int64_t i = 0; i < m->n_rows; i++) memcpy(tight + i * m->n_keys, scores + i * stride, (size_t)m->n_keys * sizeof *tight);
        for (int64_t i = 0; i < n; i++) misplaced += (tight[i] == -HUGE_VALF) != (m->logits[i] == -HUGE_VALF);
        report(r, "sim", similarity_gap(tight, m->logits, n), 5e-6, "%s/logits", path);
        report(r, "max_abs", max_abs(tight, m->logits, n), (double)NAN, "%s/logits", path);
        report(r, "inf_misplaced", (double)misplaced, 0, "%s/logits", path);
        for (int64_t i = 0; i < m->n_rows; i++) {
            for (int64_t j = 0; j < m->n_keys; j++) row[j] = (double)m->logits[i * m->n_keys + j];
            wrong += !is_top_k(lists + i * k, k, row, 0, m->n_keys, 0, 1e-5, row + m->n_keys);
        }
        report(r, "rows_differ", (double)wrong, 0, "%s/top-%d", path, (int)k);
        free(row);
    }
    free(scores);
    free(tight);
    free(lists);
    return ok;
}

/* select on the file's own logits: one right answer, so it must be that one, ties included. */
static void mqa_select(run *r, const dsa_ctx *ctx, const mqa *m)
{
    int32_t k = m->n_keys > 8 ? (int32_t)(m->n_keys / 8) : 1;
    dsa_select_args args = { 0 };
    dsa_selection picked = { 0 };
    size_t bytes = 0;
    int64_t wrong = 0;
    picked.top_k = k;
    picked.indices = (int32_t *)allocate((size_t)m->n_rows * (size_t)k, sizeof *picked.indices);
    args.n_rows = m->n_rows;
    args.scores = m->logits;
    args.n_cols = args.stride = m->n_keys;
    dsa_status status = dsa_select_workspace(ctx, &args, &picked, &bytes);
    args.workspace = poisoned(bytes);
    args.workspace_size = bytes;
    if (status == DSA_OK) status = dsa_select(ctx, &args, &picked);
    if (called(r, status, "select")) {
        double *row = (double *)allocate((size_t)m->n_keys, 2 * sizeof *row);
        for (int64_t i = 0; i < m->n_rows; i++) {
            for (int64_t j = 0; j < m->n_keys; j++) row[j] = (double)m->logits[i * m->n_keys + j];
            wrong += !is_top_k(picked.indices + i * k, k, row, 0, m->n_keys, 0, 0, row + m->n_keys);
        }
        report(r, "rows_differ", (double)wrong, 0, "stored-logits/top-%d", (int)k);
        free(row);
    }
    free(args.workspace);
    free(picked.indices);
}

static int check_mqa_logits(run *r, const st_file *file)
{
    static const struct { const char *name, *dtype; int rank; } want[7] = {
        { "q", "U8", 3 }, { "k", "U8", 2 }, { "k_scale", "F32", 1 }, { "weights", "F32", 2 }, { "ks", "I32", 1 },
        { "ke", "I32", 1 }, { "logits", "F32", 2 } };
    const st_tensor *t[7];
    mqa m = { 0 };
    for (int i = 0; i < 7; i++) {
        t[i] = st_find(file, want[i].name);
        if (!t[i]) return bad_file(r, "tensor %s is missing", want[i].name);
        if (!has_dtype(t[i], want[i].dtype))
            return bad_file(r, "%s: dtype %s where %s is wanted", want[i].name, t[i]->dtype, want[i].dtype);
    }
    const int64_t any[] = { -1, -1, -1 };
    if (!has_shape(r, t[0], 3, any)) return FILE_BAD;
    const int64_t *q = t[0]->shape, keys[] = { -1, q[2] };
    if (!has_shape(r, t[1], 2, keys)) return FILE_BAD;
    const int64_t logits[] = { q[0], t[1]->shape[0] };
    if (!has_shape(r, t[2], 1, t[1]->shape) || !has_shape(r, t[3], 2, q) || !has_shape(r, t[4], 1, q) ||
        !has_shape(r, t[5], 1, q) || !has_shape(r, t[6], 2, logits))
        return FILE_BAD;
    m.n_rows = q[0];
    m.n_heads = (int32_t)q[1];
    m.dim = (int32_t)q[2];
    m.n_keys = t[1]->shape[0];
    m.key = (const unsigned char *)t[1]->data;
    m.key_scale = (const float *)t[2]->data;
    m.w = (const float *)t[3]->data;
    m.logits = (const float *)t[6]->data;
    /* The library rounds FP8 queries itself, with a power-of-two scale: values that already are e4m3 come out unchanged. */
    m.q = allocate_floats(t[0]->count);
    for (int64_t i = 0; i < t[0]->count; i++) m.q[i] = dsa_e4m3_to_f32(((const unsigned char *)t[0]->data)[i]);
    m.ks = (int64_t *)allocate((size_t)m.n_rows, sizeof *m.ks);
    m.ke = (int64_t *)allocate((size_t)m.n_rows, sizeof *m.ke);
    for (int64_t i = 0; i < m.n_rows; i++) {
        m.ks[i] = ((const int32_t *)t[4]->data)[i];
        m.ke[i] = ((const int32_t *)t[5]->data)[i];
    }
    dsa_config config = r->base;
    dsa_ctx ctx;
    config.n_index_heads = m.n_heads;
    config.dim_index = m.dim;
    config.index_rope_width = DSA_NONE;
    config.hadamard = DSA_HADAMARD_OFF;  /* these keys are not rotated */
    if (called(r, dsa_init(&ctx, &config), "init")) {
        for (int where = CONTIGUOUS; where <= PAGED; where++) {
            store s;
            if (called(r, mqa_store(&ctx, &m, (layout)where, &s), layout_names[where]))
                for (int plan = 0; plan < N_SCHEDULES; plan++)
                    if (!mqa_score(r, &ctx, &m, &s, (layout)where, (schedule)plan)) break;
            store_free(&s);
        }
        mqa_select(r, &ctx, &m);
    }
    free(m.q);
    free(m.ks);
    free(m.ke);
    return FILE_OK;
}

#endif

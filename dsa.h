/* dsa.h - v0.1.0 - DeepSeek Sparse Attention in one C header - MIT or public domain
   SPDX-License-Identifier: MIT OR Unlicense

   Attention that reads k cached rows per query however long the context is, as DeepSeek-V3.2 and GLM-5 do it: a small indexer
   scores every row (the one part that still grows), the best k are selected exactly, and absorbed multi-head latent attention
   (MLA) runs over those. For engines: paged and quantised caches, ragged batches, prefill, decode, drafts, shards.
   C99 that also compiles as C++17; needs libc, libm and, unless DSA_NO_THREADS, pthreads.

   QUICK START                                        // one decode step; all of it: examples/01_quick_start.c
     #define DSA_IMPLEMENTATION                       // in exactly one file, before this include
     #include "dsa.h"

     dsa_config config = { .n_heads = 8, .dim_latent = 128, .dim_rope = 16, .n_index_heads = 4, .dim_index = 32, .top_k = 64 };
     dsa_ctx ctx;
     dsa_cache latents, keys;                         // check what the calls return: a dsa_status, 0 = DSA_OK
     dsa_init(&ctx, &config);
     dsa_cache_create(&ctx, &(dsa_cache_desc){ .kind = DSA_LATENT, .capacity = 4096 }, &latents);
     dsa_cache_create(&ctx, &(dsa_cache_desc){ .kind = DSA_INDEX_KEY, .capacity = 4096 }, &keys);
     dsa_seq seq = { .latent = &latents, .index = &keys, .n_q = 4096 };
     dsa_append(&ctx, &(dsa_append_args){ .n_seqs = 1, .seqs = &seq, .latent = latent, .index_key = index_key });
                                                      // f32: latent [4096, 128 + 16], index_key [4096, 32], q [8, 128 + 16],
                                                      // index_q [4, 32], index_w [4], out [8, 128]; int32_t indices [64]
     seq.n_q = 1;                                     // one query, at the newest row: which rows matter, and attend to them
     dsa_step(&ctx, &(dsa_step_args){ .n_seqs = 1, .seqs = &seq, .q = q, .index_q = index_q, .index_w = index_w,
         .out = out, .indices = indices, .workspace = workspace, .workspace_size = sizeof workspace });

   Compile: cc -O2 app.c -lm -pthread    (no -m flags. -ffast-math takes away NaN and exact rounding: an error in the file with the
   implementation. C++ fills the same structs by assignment: dsa_config config = {}; config.n_heads = 8;)

   CONTENTS: search for the marker
     >>manual       what it computes, which call to use, layouts, rounding, contracts, threads, memory, errors, options
     >>api          declarations: every type and function, shapes in the comments
     >>platform     libc, asserts, sizes, the scratch arena
     >>numeric      number formats and row operations
     >>ref          the algorithm in plain C: lesson, oracle and fallback
     >>kernels      what a vector ISA may replace
     >>topk         exact selection under a total order
     >>matmul       the layer's projections: what the vector ISAs share
     >>avx2         AVX2, FMA, F16C: selection, and eight f32 lanes for >>f32x8
     >>neon         eight f32 lanes of AArch64, for >>f32x8
     >>f32x8        scoring and attention in f32, eight lanes at a time
     >>avx512       selection, scoring and attention with AVX-512
     >>avx512_matmul   the layer's projections with AVX-512
     >>dispatch     the kernel table and its choice
     >>threads      the optional pool
     >>config       defaults, presets, contexts
     >>cache        rows in memory: layouts, pages, append, read back
     >>validate     arguments, checked once at the edge
     >>append       1. rows into the caches
     >>compress     1b. entries of several tokens
     >>score        2. and 3. index scores, selection, and both in one pass
     >>attend       4. attention over what was selected, as an accumulator
     >>step         append, score, select and attend in one call
     >>layer        5. one attention layer, hidden states in and out
     >>backward     6. gradients of norms, projections, attention and the indexer
     >>layer_backward 7. gradients of the layer
     >>shards       8. one sequence on several machines
     >>pages        9. pages shared by sequences
     >>end          of the implementation
     >>revisions    what changed, and the licence */

/* ============================================================================================
   >>manual                                   what it computes, how to call it, what it promises
   ============================================================================================
   Chapters: WHAT IT DOES NOT DO, ALGORITHM, LAYER, MODELS, CALLS, BATCHES, PAGES, BACKWARD, LAYOUTS, ROUNDING, CONTRACTS, THREADS, CUDA,
   MEMORY, ERRORS, OPTIONS, CONVENTIONS, PEERS, LIMITS, SOURCES.

   WHAT IT DOES NOT DO
     No model: no files, tokens, embeddings, MLP or experts, no residual; the layer ends at o_proj. Backward passes, but no optimiser:
     examples/train_dsa.c has one.
     On GPUs: no projections, no backward, NVIDIA only. DeepSeek-V4's compressed caches (584-byte rows, FP4 keys) are not there.
     No eviction from the front of a cache, no rings. It never allocates behind your back,
     prints, exits, or keeps global state.

   ALGORITHM
     symbol   config field     V3.2   GLM-5   what it is
     H        n_heads          128    64      query heads
     R, r     dim_latent       512    512     width of the latent c, which is key and value at once;
              dim_rope         64     64      width of k_pe, the rotated part of the key, one for all heads
     HI, D    n_index_heads    64     32      heads of the lightning indexer;
              dim_index        128    128     width of its keys and queries
     k        top_k            2048   2048    rows kept per query
     nope     dim_nope         128    192     per head, the layer only: width of q and key without RoPE;
     v        dim_v            128    256     width of the value after W_UV
     L        a cache's len                   rows in the cache. t is a query, s a row, h a head.

     Lightning indexer, eq. (1) of the DeepSeek-V3.2-Exp paper. One score per query and row, all heads summed:
         I[t,s] = Sum_h w[t,h] ReLU(<q_I[t,h], k_I[s]>)         q_I [HI, D], w [HI], k_I [D], I scalar
     w comes with HI^-0.5 D^-0.5 already in it and may be negative. Over FP8 and INT8 keys, q_I ~ s_q q8 and k_I ~ s_k k8:
         I[t,s] = s_k[s] Sum_h (w[t,h] s_q[t,h]) ReLU(<q8[t,h], k8[s]>)
     Selection: S_t = the k first of the rows that t may see, ordered by score descending, then by position ascending.
     Absorbed MLA over the latents, for the rows of S_t only:
         x[h,s] = scale (<q_lat[h], c[s]> + <q_pe[h], k_pe[s]>)  q = [q_lat | q_pe] [H, R + r], row = [c | k_pe] [R + r]
         lse[h] = ln Sum_s e^x[h,s]                              natural logarithm
         out[h] = Sum_s e^(x[h,s] - lse[h]) c[s]                 [H, R]: the value is the latent itself
     scale = (nope + r)^-0.5 m^2, m = 0.1 mscale ln(rope_factor) + 1 under YaRN, else 1: 0.1352338 for V3.2, 0.0625 for
     GLM-5. It is not (R + r)^-0.5: absorption widens the dot product without changing its value.
     A sink z[h] is one more column with the logit z (not scaled) and the value 0: out is multiplied by 1 / (1 + e^(z - lse)).
     Parts of the rows, each with its own out_p and lse_p, merge exactly:
         lse = ln Sum_p e^lse_p          out = Sum_p e^(lse_p - lse) out_p

   LAYER (weights under their Hugging Face names: dsa_layer_weights; x is the output of input_layernorm)
     x [hidden] --q_a_proj--> RMSNorm --> qr [q_lora] --q_b_proj--> q [H, nope | r] --RoPE(last r)--> q_nope, q_pe
        |                                  +--wq_b--> q_I [HI, D] --RoPE--> queries of the indexer
        +--kv_a_proj--> [R | r] --RMSNorm(first R), RoPE(last r)--> [c | k_pe]        row of the latent cache
        +--wk--> LayerNorm --> RoPE --> k_I [D]                                       row of the index-key cache
        +--weights_proj--> times HI^-0.5 D^-0.5 --> w [HI]
     q_lat[h] = W_UK[h]^T q_nope[h]   --attend over S_t-->   o_lat [H, R]   --W_UV[h]-->   o [H, v]   --o_proj-->   y [hidden]
     W_UK, W_UV are the rows [0, nope) and [nope, nope + v) of each head in kv_b_proj. The indexer reads the normalised qr.
     index_rope_interleaved: 0 for V3.2 (half-split), 1 for GLM. The wrong one goes unnoticed until L exceeds k.

   MODELS: the same calls for every model with a lightning indexer. 0 in each field below is DeepSeek-V3.2
     keys       An entry is what has an index key: a token, or a pool of `stride` tokens. It is rotated for its first token's position and
                seen by a query that sees its last token. pooling, over the rows x_i of its tokens, per channel:
                MEAN; GATED: Sum_i softmax_i(z_i + b_i) x_i; GATED_OVERLAP: the same over the first half of the channels of the last
                block's rows and the second half of the own ones'. index_norm comes before or, norm_pooled, after it, RoPE last.
                dsa_compress keeps the rows of the unfinished entry and writes finished ones; token keys go through dsa_append.
     scores     I[t,g,s] = Sum_(h in group g) w[t,h] a(<q_I[t,h], k_I[s]>): index_groups lists a query, a = ReLU or, index_linear, nothing.
                index_no_weights: every w is index_scale.
     selection  An item is an entry or a block of block_size entries, which scores what its best visible one does (a NaN is none).
                The n_local_blocks newest are in, whatever they score; the others compete for the rest of top_k.
     lists      name the visible tokens of their items, and with keep_tail those behind the last whole entry, which no entry stands for
                yet. list_entries: the items themselves. dsa_list_length int32s each.
     attention  Head h reads list h index_groups / H. The value is the first dim_value channels of the row or, n_kv_heads, a row of its
                own: head h reads KV head h n_kv / H of both. Several caches: one dsa_attend_add each, then finish with the sinks.
     helpers    dsa_norm_rows; dsa_rope_rows with inverse (V4 turns the last channels of its output back); dsa_gate.
     The projections around these are the model's own: tools/conformance_layers.h writes three families out, dsa_layer knows LAYER only and
     refuses the rest, as dsa_step, dsa_select, gradients and devices refuse what they do not know (DSA_ERR_UNSUPPORTED).
     model         preset              beside the widths, it sets                                          held to tests/vectors/
     deepseek_v32  DSA_DEEPSEEK_V32    nothing                                                             deepseek_v32_*
     glm_moe_dsa   DSA_GLM_5, GLM_52   index_rope_interleaved; 5.2: index_share_freq, _offset              glm_moe_dsa_shared
     deepseek_v3   DSA_DEEPSEEK_V3     no indexer: attend VISIBLE, DSA_LAYER_DENSE                         backward/torch (layer dense)
     axk2          DSA_AXK2            nothing; output gate                                                models/axk2
     hy_v4         DSA_HY_V4           index_rope_offset, index_share_freq, _offset; sinks, output gate    models/hy_v4
     glm5_next     DSA_GLM5_NEXT       stride 16, GATED, keep_tail; no RoPE                                models/glm5_next
     minimax_m3    DSA_MINIMAX_M3      n_kv_heads, index_groups 4, index_linear, index_no_weights,         models/minimax_m3
                                       block_size 128, n_local_blocks 1, index_norm RMS_PLUS_ONE
     qwen4_exp     DSA_QWEN4_EXP       n_kv_heads, stride (yours), MEAN, norm_pooled, keep_tail,           models/qwen4_exp
                                       index_no_weights, index_norm RMS_PLUS_ONE; output gate
     deepseek_v4   DSA_DEEPSEEK_V4_    stride 4, GATED_OVERLAP, index_norm RMS, norm_pooled, list_entries, models/deepseek_v4
                   FLASH, _PRO         dim_value 512 of 448 + 64, window; sinks; inverse RoPE
     What a variant costs: without ReLU a head counts twice (x = ReLU(x) - ReLU(-x), to the bit). A group's heads fill vector lanes of
     their own. Grouped queries copy each row they read, per KV head, and dot products run over dim_value + R channels. A compressor
     keeps 4 width bytes for each of stride + n_kept tokens (OVERLAP 2 stride and 2 width), twice that with gates.

   CALLS
     dsa_append            rows into one or both caches                      an engine that has its own projections
     dsa_compress          rows into entries of several tokens               pooled index keys, DeepSeek-V4's compressed rows
     dsa_score             all scores of a query, [rows, stride] f32         inspection, training data, your own selection
     dsa_select            exact top-k of stored scores                      scores from elsewhere (a GPU, dsa_score)
     dsa_score_select      both in one pass, no row of L scores              the normal way to choose rows
     dsa_attend_begin      state = (max, sum, out), in your memory
     dsa_attend_add        adds a list, a range or all visible rows          once per cache or pool: windows, shared prefixes
     dsa_attend_finish     out, lse, max logit; sinks enter here             leaves the state as it is unless out is state.out
     dsa_attend            the three in one                                 one list or range, and nothing to add
     dsa_attend_partial    out and lse of a shard, then dsa_attend_merge     shards on several threads, machines, disks
     dsa_merge_topk        the exact top-k over several shards' lists
     dsa_step              [append] -> score_select -> attend                decode and drafts of a whole ragged batch
     dsa_layer             hidden states in and out                          from weights, prefill and decode alike
     A layer that reuses another layer's choice (GLM-5.2: dsa_layer_has_indexer) gets that layer's indices_out as indices_in.
     dsa_layer's modes DENSE (all visible rows) and WINDOW (the newest k) are baselines over the same caches.

   BATCHES
     Each call serves n_seqs sequences (dsa_seq), each with its own caches, length and n_q queries; arrays called [rows, ..]
     hold the first sequence's queries, then the second's, and so on. Visibility: query i of n_q sits at row len - n_q + i and
     sees the rows up to itself, so rows are appended before they are queried (dsa_step and dsa_layer do both):
         rows   0 . . . . . . . . . len-1           len = 10, n_q = 3
         i = 0  # # # # # # # # - -                 decode          n_q = 1
         i = 1  # # # # # # # # # -                 drafts          n_q = 1 + drafts; refused ones go by dsa_cache_truncate,
         i = 2  # # # # # # # # # #                                 on both caches
                                                    chunked prefill  n_q = the chunk; any cut gives the same lists
     ks, ke replace that rule by a half-open range per query, clamped to [0, len]. A list given to dsa_attend_add is not held
     against it: any position in [0, len) counts, whether or not it lies after the query. dsa_layer skips the entries of indices_in
     that lie after their query, so that any cut of a chunk gives the same.
     Sequences of a call may share pages or whole caches (common prefixes, beams) as long as nobody appends to a shared page.
     seq.len: 0 = the cache's own. Another value, up to the capacity, says how many rows the call may see.
         dsa_seq batch[2] = { { .latent = &la, .index = &ia, .n_q = 1 }, { .latent = &lb, .index = &ib, .n_q = 3 } };   // 4 rows
     A prompt of n tokens through one layer, in chunks; decode is the same call with n_q = 1:
         dsa_layer_args args = { .weights = &weights, .n_seqs = 1, .seqs = &seq, .workspace = workspace, .workspace_size = bytes };
         for (at = 0; at < n; at += seq.n_q) {
             seq.n_q = n - at < 512 ? n - at : 512;
             args.x = x + (size_t)at * hidden;                          // [n_q, hidden]
             args.y = y + (size_t)at * hidden;
             status = dsa_layer(&ctx, &args);
         }
     A union, here the newest rows and a list over one cache or two; a row named twice counts twice:
         dsa_attend_begin(&ctx, &state);
         dsa_attend_add(&ctx, &window, &state);                         // .what = DSA_ATTEND_RANGE, ks, ke
         dsa_attend_add(&ctx, &chosen, &state);                         // .what = DSA_ATTEND_LIST, indices
         dsa_attend_finish(&ctx, &state, sinks, out, lse, NULL);        // sinks, lse may be NULL
     Paged memory: dsa_cache_view lays a cache over your pool and block table. Table entries beyond the rows in use are not
     read, so n_blocks may count pages that are yet to come; set block_table and n_blocks in the dsa_cache when they move.
     Engines with slot mappings give dsa_append their slots: one list for both caches, len stays, seq.len says what exists.
     Shards (examples/05_sharded_attention.c): each scores its rows and keeps k with scores; make the positions global; merge
     with dsa_merge_topk; each attends to its part of the merged list (foreign positions are skipped); merge the partials.
     With several queries give ks and ke: the visibility rule would take a shard for the whole sequence. dsa_shard does this
     arithmetic for blocks dealt round like cards, so that a growing sequence keeps every shard equally busy:
         dsa_shard shard = { .n_shards = 8, .shard = rank, .block = 64 };
         dsa_shard_ranges(&shard, len, n_q, ks, ke);                    // for dsa_score_args, with seq.len = the shard's own rows
         dsa_score_select(&ctx, &score, &mine);                         // mine.scores set: unscored lists cannot be merged
         dsa_shard_to_global(&shard, n_q * k, mine.indices);            // send indices and scores to all, then everywhere the same:
         dsa_merge_topk(&ctx, &merge, &chosen);                         // the list of one undivided cache, bit for bit
         dsa_shard_to_local(&shard, n_q * k, chosen.indices, list);     // -1: on another shard
     then dsa_attend_begin, _add, _partial over list, out and lse to all, dsa_attend_merge in the order of the shards. Scored lists
     have no short-context fallback: a row whose key is NaN is never chosen.

   PAGES: sequences that share rows (dsa_pages)
     The caches of all layers are pools of pages; page p means page p in each of them. dsa_pages knows which sequence holds which pages
     and which tokens made them. Serving a request:
         dsa_cache_create(&ctx, &(dsa_cache_desc){ .kind = .., .capacity = 4096 * 64, .page_size = 64 }, &planes[i]);   // once, all layers
         dsa_pages_create(&ctx, &(dsa_pages_desc){ .n_planes = n, .planes = planes, .max_seqs = 256 }, &pages);
         dsa_pages_open(&ctx, pages, prompt, n_prompt - 1, &seq, &n_cached);      // rows [0, n_cached) are there: no prefill for them
         dsa_pages_reserve(&ctx, pages, seq, n);                                  // DSA_ERR_CAPACITY: out of pages, try later
         dsa_pages_view(&ctx, pages, seq, i, &cache);                             // for each plane: then append, step or layer as ever
         dsa_pages_commit(&ctx, pages, seq, prompt + n_cached, n);                // now they count, and others may share them
         dsa_pages_close(&ctx, pages, seq);                                       // its pages stay as long as nobody needs them
     Copy on write: a page that somebody else holds, or whose rows the index has promised, is copied when it would be written on. Drafts:
     reserve and write them all, commit the accepted ones; the others are written over. Beams: fork. A shared row has the bits that its
     first writer gave it; that these are the bits of recomputing is what CONTRACTS (Same bits) says of append, step and layer.
     Prefixes are found to the token, not only to the page: full pages through a hash of their tokens and the page before them (then
     compared), the rest by comparing with the pages behind the last full one. Only pages that no sequence holds are evicted.

   BACKWARD (gradients only: the optimiser is yours)
     dsa_layer_backward    all of a layer's gradients: weights, x, and the indexer's loss     from weights
     dsa_attend_backward   dq, dkv, dz, and the indexer's target p                            an engine that has its own projections
     dsa_index_backward    dq_I, dw, dk_I from dI, or from the KL loss
     dsa_linear, dsa_linear_backward, dsa_rms_norm_backward, dsa_layer_norm_backward          the pieces, for the rest of a model
     RoPE's backward is dsa_rope_rows turned round (inverse), Hadamard's is Hadamard.
     Attention, x_s = scale <q, kv_s>, from the saved lse (L: with the sink z, if any), nothing of size [H, L] kept between the calls:
         delta = <out, dout>        P_s = e^(x_s - L)        dS_s = scale P_s (<dout, c_s> - delta)
         dq = Sum_s dS_s kv_s       dkv_s += dS_s q + P_s dout        dz -= e^(z - L) delta
     Indexer: g = dI, d[h,s] = <q_I[h], k_I[s]>, ReLU' = 0 at 0:
         u[h,s] = g_s w[h] ReLU'(d[h,s])
         dw[h] = Sum_s g_s ReLU(d[h,s])     dq_I[h] = Sum_s u[h,s] k_I[s]     dk_I[s] += Sum_h u[h,s] q_I[h]
     The recipe (DeepSeek-V3.2-Exp, spec 8). Top-k has no gradient. The indexer learns from its own loss only, whose inputs x and qr and
     whose target are constants; all else learns from the language model's loss only:
         p_s = Sum_h P[h,s] / Sum_s Sum_h P[h,s]      KL_t = Sum_s p_s (ln p_s - ln softmax(I)_s)      dI_s = weight (softmax(I)_s - p_s)
         warm-up        mode DENSE, d_y NULL: the main model is frozen, S_t = all visible rows
         sparse stage   mode SPARSE with d_y: S_t = the selected rows, the forward call's indices_out given as indices_in
     A step of one layer, its caches empty before the forward call, gradients cleared:
         dsa_layer(&ctx, &forward);                                     // y; caches and lists are all that is kept
         dsa_layer_backward_args back = { .layer = forward, .d_y = d_y, .d_x = d_x, .grads = &grads, .index_weight = 1.0f / rows };
         back.layer.indices_in = lists;  back.layer.indices_out = NULL; // and this call's own workspace
         dsa_layer_backward(&ctx, &back);
     examples/train_dsa.c trains a model from nothing by these calls: all three stages, the optimiser, files that resume exactly.
     Every d_ array is added to: clear it first. Train over F32 caches; over rounded ones the gradient is that of the f32 formula at the
     rounded rows. No number of threads changes a bit; sums over queries (rows, weights, sinks) may move in the last bits with the batch.
     Workspaces: dsa_attend_backward's does not depend on lengths; the indexer's and the layer's grow with the longest sequence. Held
     by the tests: max |error| <= 1e-5 max |gradient| against central differences in double and PyTorch's float64.

   LAYOUTS (any alignment; numbers in the machine's byte order, little-endian where caches are exchanged; dsa_row_bytes and
   dsa_page_bytes compute the sizes)
     position i -> page p = block_table[i / page_size], offset o = i % page_size; slot = p page_size + o
     Latent row, at data + p page_stride + o row_stride. With e = 4 (F32) or 2 (BF16) bytes an element:
         +----------------------+-----------------+
         | c[0 .. R)            | k_pe[0 .. r)    |       F32 2304 bytes at 512 + 64, BF16 1152
         +----------------------+-----------------+
         0                      e R               e (R + r)
     FP8, the row of FlashMLA generalised, R + 4 ceil(R/128) + 2 r bytes, no padding: 656 at 512 + 64, 164 at 128 + 16:
         +----------------------+-----------------------+----------------------+
         | R x e4m3             | ceil(R/128) x f32     | r x bf16, k_pe       |       c[i] = e4m3[i] scale[i / 128]
         +----------------------+-----------------------+----------------------+
         0                      R = 512                 R + 4 ceil(R/128) = 528    656
       Scales are written as powers of two; any f32 is read. A last tile shorter than 128 has a scale of its own.
     Index key, F32 and BF16: rows of e D bytes, row_stride apart. FP8 and INT8: the planar page of DeepGEMM. n = page_size:
         +---------+---------+-----+-----------+--------+--------+-----+----------+
         | key 0   | key 1   | ... | key n-1   | s_k[0] | s_k[1] | ... | s_k[n-1] |       n (D + 4) bytes, rounded up to 4:
         | D bytes | D bytes |     | D bytes   | f32    | f32    |     | f32      |       132 a token at D = 128
         +---------+---------+-----+-----------+--------+--------+-----+----------+
         0         D                           n D      n D + 4              n (D + 4)       n = 64, D = 128: scales from 8192
       With one page of `capacity` rows (page_size 0) all keys come first, then all scales. page_stride may be any multiple of
       4 that holds a page. Scales elsewhere: set .scales and .scale_page_stride by hand, then dsa_cache_check.
     Bytes a token and layer, V3.2: FP8 656 + 132 = 788, BF16 1152 + 256 = 1408, F32 2304 + 512 = 2816.

   ROUNDING: the format fixes what both sides are rounded to, on every ISA
     index keys   stored as                                           queries are rounded to
     F32          f32                                                 f32: never through bf16 products
     BF16         bf16, nearest even                                  bf16
     FP8          e4m3, s = 2^ceil(log2(max(amax, 1e-4) / 448))       e4m3 with such a scale per head, folded into w
     INT8         half to even, +-127, s = max(amax, 1e-4) / 127      int8 likewise
     latents      c                                                   k_pe
     F32, BF16    as the format says                                  the same
     FP8          e4m3, s = 2^ceil(log2(max(amax / 448, 1e-4)))       bf16, never quantised
     amax is over the row of D channels (keys, query heads) or the tile of 128 (latents). e4m3 is float8_e4m3fn: nearest even,
     beyond 448 and infinity -> 448, NaN -> 0x7F with its sign. NaN is left out of amax; an int8 row holding one gets a NaN scale.
     Attention over F32 latents multiplies in f32. Over BF16 and FP8 latents, vector kernels may round q and the weights
     e^(x - max) to bf16 (the scalar path never does); DSA_PRECISION_F32 forbids it. Sums are f32 everywhere, those of the norms
     double.
     Hadamard: an orthonormal rotation of q_I and k_I before rounding spreads outliers. AUTO: on for FP8 and INT8 keys, off
     for F32 and BF16. D must then be a power of two, else DSA_ERR_SHAPE: say OFF. The flag is kept with the cache; a config
     that says ON or OFF refuses caches that differ. Append takes unrotated keys, score unrotated queries.

   CONTRACTS
     Order     The top-k is exact under a total order: score descending, then lower position. -0 equals +0. NaN and -inf are
               never selected, +inf is a score like others. Fewer than k: the rest is -1 (score -inf). Output ascending by position
               or, DSA_ORDER_RANK, by rank. One order means one answer, whatever the threads, tiles or shards.
     Same bits On one ISA, one row's result does not depend on threads, batch mates, chunking or paging (score, select, attend);
               only a NaN's sign and payload may.
               dsa_layer as well, except that a gemm hook's projections may move by 1e-5 with the chunking.
               Work is cut into fixed blocks, so one dsa_attend_add over a list and two over its halves may differ in the last bits.
     Across ISAs, scores differ by the order of their f32 sums: to first order by 2 (D + HI + 2) 2^-24 Sum_h |w_h| Sum_d |q_hd k_d|
               (times s_k) at most; int8 dot products are exact. Attention differs by f32 rounding and, where bf16 is allowed,
               by 2^-9 of each q and each weight. Sets may differ where such differences reorder scores at the cut. sin, cos
               and ln come from libm, so another libm may move the last bit.
     Fallback  A query that sees at most k rows gets them all, ascending, unscored (rows with NaN keys too), unless the
               order is RANK or scores are asked for. Index keys are still written, for the day L exceeds k.
     NaN       A NaN in a key or a query makes that score NaN: not selected. A NaN in a row that attention is told to read reaches
               that query's output (so does a logit of +inf); in any other row, page or unused place it reaches nothing.
     Indices   Every int32 is allowed in a list; outside [0, len) (DSA_LOGICAL) or [0, n_pages page_size) (DSA_PHYSICAL) it is
               skipped. Duplicates count as often as they appear. PHYSICAL is for lists that came through a block table already.
     Empty row No valid row, or only logits of -inf: out 0, lse +inf, max logit -inf. As a partial: lse -inf, weight 0.
     Sinks     Enter finish, merge, dsa_attend and step only, never lse. -inf changes nothing, +inf gives out 0.
     Errors    A call that returns an error has changed nothing but `detail`. Append checks capacity, tables and slots of the whole
               batch before the first byte. One format, dims and Hadamard flag per call. NaN and inf in data are no errors.
               Only DSA_ERR_DEVICE comes in the middle of work: rows may have been appended (the caches' len says which), outputs begun.
     Memory    Outputs overlap neither inputs, workspace nor one another. Exception: out of finish and partial may be state.out.
               Caches, weights and workspaces may have any alignment; all other arrays that of their type.
     Beside an appender: rows below len never change, so other threads may score, attend and step (without append) while one
               appends to the same caches, if their seq.len is their own, handed over with your own synchronisation. What reads the
               cache's len may not run then: len = 0, dsa_cache_read, dsa_cache_check. Truncate, destroy, a table that moves: lock.
     Contexts  Read-only for calls, so threads may share one; calls at the same time need their own workspace, outputs, pool and
               detail buffer (copy the dsa_ctx and set config.detail).

   THREADS: the library starts none by itself
     config.n_threads is the most tasks of a call; parallel_for runs them, in any order, on any threads. Tasks never wait for
     each other. Without a hook they run one after the other. OpenMP, and the built-in pool:
         static void omp_for(void *user, int32_t n, dsa_task task, void *arg)
         {
             int32_t i;
             (void)user;
             #pragma omp parallel for schedule(static, 1)
             for (i = 0; i < n; i++) task(arg, i);
         }
         config.n_threads = 8;  config.parallel_for = omp_for;

         dsa_pool *pool;
         dsa_pool_create(NULL, 8, &pool);                 // 7 workers and the caller; NULL: malloc
         config.n_threads = 8;  config.parallel_for = dsa_pool_run;  config.parallel_user = pool;
         dsa_init(&ctx, &config);                         // contexts hold a copy of the config: fill it before
         dsa_pool_destroy(pool);                          // at the end; a pool runs one call at a time, and no call from a task

   CUDA: dsa_cuda.cu, one more file of the build (nvcc 12 or 13; make cuda); compute capability 8.0 and later
     Define DSA_CUDA before the include where you call dsa_cuda_create. Caches then live on the GPU, and the calls on them run there:
         dsa_cuda *gpu;
         dsa_cuda_create(NULL, &gpu);                     // DSA_ERR_NO_DEVICE: none; leave config.cuda NULL, and AUTO means the CPU
         config.cuda = gpu;  dsa_init(&ctx, &config);
         desc.device = DSA_DEVICE_AUTO;  dsa_cache_create(&ctx, &desc, &cache);
     Operands and results stay in host memory: append, score, score_select, attend_add, attend, step, layer (its attention) and
     cache_read copy what they need through the scratch of the dsa_cuda, in tiles of rows, and wait. They need next to no workspace.
     Select, merge, begin, finish and partial work on host memory in any case. One call at a time runs on a dsa_cuda; another thread
     wants another one. A view over your own device memory says device CUDA; its block table stays on the host. The backward
     calls refuse such caches. Engines that live on the GPU use the device level instead: dsa_cuda_append to dsa_cuda_step.
     Promises: those of CONTRACTS, the same bits for a row whatever its batch mates, tiles and pages, on one path and device. Over F32
     latents, with DSA_PRECISION_F32, and for shapes that tensor cores do not take, the kernels of DSA_CUDA_REFERENCE run.
     Index scores: exact products and f32 sums, on Hopper's FP8 tensor cores with their narrower accumulator.

   MEMORY
     Only dsa_cache_create, dsa_pages_create and dsa_pool_create allocate (config.allocator, the pool's argument, or malloc), once.
     dsa_cache_init and dsa_pages_init take your memory instead (dsa_cache_bytes, dsa_pages_bytes say how much).
     Scattered rows like huge pages: an allocator that asks for them (Linux: mmap on 2 MiB, madvise MADV_HUGEPAGE; tools/bench.h)
     took 1 % off sparse attention over 128K rows where it was measured.
     Everything else works in a workspace that you own:
         size_t bytes;
         dsa_step_args args = { .n_seqs = 1, .seqs = &seq };        // pointers to data may still be NULL
         dsa_step_workspace(&ctx, &args, &bytes);
         args.workspace = malloc(bytes);  args.workspace_size = bytes;
     Any alignment and content will do, and one workspace may serve all calls in turn. The size depends on the context, on formats
     and on the counts in args (rows, n_q, heads, k, n_cols; dsa_layer: rows only up to DSA_LAYER_TILE), not on the length of a
     cache, and never shrinks when rows or n_q grow: ask once, for the largest batch with the longest n_q.
     One query of dsa_score_select over 1,048,576 keys: at most 256 KiB per thread at k = 2048, HI = 64, D = 128.

   ERRORS
     0 is DSA_OK; DSA_STATUS_LIST names the rest. dsa_status_text gives a fixed text, and calls with a context put a sentence about
     the argument into config.detail:
         char why[200];
         config.detail = why;  config.detail_size = sizeof why;
         dsa_init(&ctx, &config);
         dsa_status status = dsa_step(&ctx, &args);
         if (status != DSA_OK) fprintf(stderr, "%s: %s\n", dsa_status_text(status), why);   // read it only after an error

   OPTIONS: define before the include. "every file": the same in all files of the program that include dsa.h
     macro               default                scope                  effect
     DSA_IMPLEMENTATION  not defined            one file               makes the functions. The file may have seen dsa.h before
     DSA_STATIC          not defined            implementation         functions are static to that file, which alone can call them;
                                                                       several files may each hold a private copy
     DSA_API             extern                 every file             before each public function, e.g. a visibility attribute
     DSA_NO_THREADS      not defined            every file             no pthread.h, no dsa_pool_x; the parallel_for hook stays
     DSA_NO_MALLOC       not defined            implementation         no malloc and free: dsa_cache_create and dsa_pool_create need
                                                                       an allocator, else DSA_ERR_UNSUPPORTED
     DSA_NO_SIMD         not defined            implementation         leaves the vector sections out: scalar only
     DSA_ASSERT(x)       ((void)0)              implementation         internal invariants; arguments are checked with or without

   CONVENTIONS
     n_ counts, dim_ widths; [a, b] in a comment is a row-major shape; [x, y) half open. 0 in a struct means the default: clear a
     struct, then set what differs. DSA_NONE (-1) says zero and means it (dim_rope, mscale, n_q, len). Resolved values: ctx.config;
     do not feed them to dsa_init again, it would take their zeros for defaults. For a real model start from dsa_config_preset:
     plain zeros have V3.2's shapes but no YaRN. Public names start with dsa_ or DSA_; dsa__ and DSA__ are private.
     Versions: dsa_version() = 10000 major + 100 minor + patch. Within a minor version your source keeps compiling and meaning
     the same. No ABI promise between any two versions: keep header and implementation together.

   PEERS: where results or bytes differ, on purpose
     lse          natural log, without the sink. FlashMLA the same (its README says base 2), FlashInfer base 2 with the sink.
     empty row    out 0, lse +inf (FlashMLA); FlashInfer writes -1e30.
     bad index    anything out of range is skipped. FlashMLA's decode kernel knows only -1 and reads out of bounds otherwise.
     ties         lower position. torch.topk leaves them open; GPU radix selections often vary from run to run.
     FP8 scales   powers of two are written, any f32 is read. Older vLLM and SGLang caches hold raw amax / 448.
     Hadamard     DeepSeek's code, ik_llama.cpp and SGLang (V3.2) rotate; vLLM and transformers do not. Scores agree up to
                  rounding, stored keys do not: a cache moves between engines only if both do the same.
     k_pe         interleaved pairs, behind the latent. transformers de-interleaves it, ik_llama.cpp puts it in front.

   PROJECTIONS of dsa_layer: f32 products and sums of activations as they are; weights are never copied, whatever their type.
     On vector ISAs an FP8 block's scale multiplies the activations instead of the weights: x times scale must be a number of f32.
     A decoding step is limited by reading the weights, a chunk of DSA_LAYER_TILE rows by f32 multiply-adds.

   LIMITS
     Positions and lengths up to 2^31 - 1 (indices are int32), as many rows in one call; sizes and offsets are size_t, strides
     bytes, and what does not fit is DSA_ERR_OVERFLOW. Widths and head counts up to DSA_MAX_DIM, index keys up to
     DSA_MAX_DIM_INDEX, threads up to 4096. Caches: F32, BF16, FP8, and INT8 for index keys; weights F32, BF16, F16, FP8.
     On the scalar path e^x is within 2 ulp, and 0 for x < -87. Held by the tests and build/conformance: attention outputs and
     logits within 5e-5 of transformers in f32; FlashMLA's and DeepGEMM's own tolerances; attention outputs over rounded caches
     against those over f32, 1 - 2<a,b>/(|a|^2 + |b|^2): at most 6e-5 for bf16 latents, 2e-3 for FP8.

   SOURCES
     (spec n) in comments counts the chapters of the project's notes: 1 model constants, 2 layer (2.1 YaRN), 3 indexer (3.2
     Hadamard, 3.3 and 3.4 formats), 4 top-k, 5 attention (5.1 prefill, 5.3 merging), 6 cache layouts, 7 logits, 9 tolerances, 10
     pitfalls. They were read from: deepseek-ai/DeepSeek-V3.2-Exp (paper, inference/model.py, kernel.py), deepseek-ai/FlashMLA
     9241ae3 (rows, lse, sinks), deepseek-ai/DeepGEMM 54e2261 (index pages), huggingface/transformers (GLM), arXiv 2603.12201
     (GLM-5.2 index sharing).
*/

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
#  if defined(DSA_STATIC) && defined(__GNUC__)
#    define DSA_API static __attribute__((unused))     /* nobody calls everything. DSA_STATIC belongs in files with the implementation */
#  elif defined(DSA_STATIC)
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
    X(DSA_ERR_FORMAT,      "formats, dims, Hadamard flags or devices of the caches in one call differ from each other or the config") \
    X(DSA_ERR_TABLE,       "a block table is too short or names a page outside the pool") \
    X(DSA_ERR_CAPACITY,    "a cache has no room for the rows") \
    X(DSA_ERR_WORKSPACE,   "the workspace is smaller than the size query says") \
    X(DSA_ERR_MEMORY,      "the allocator returned NULL") \
    X(DSA_ERR_THREAD,      "a thread could not be started") \
    X(DSA_ERR_NO_DEVICE,   "no usable device of the requested kind") \
    X(DSA_ERR_UNSUPPORTED, "not supported by this build, this CPU or this version") \
    X(DSA_ERR_DEVICE,      "the device failed: a copy or a launch returned an error") \
    X(DSA_ERR_DATA,        "stored data is damaged, or was made for something else")

#define DSA__ENUM(name, text) name,
typedef enum dsa_status { DSA_STATUS_LIST(DSA__ENUM) DSA__STATUS_COUNT } dsa_status;
#undef DSA__ENUM

/* Widths above these are refused with DSA_ERR_SHAPE. An index key must fit the scratch that append keeps on its stack. */
#define DSA_MAX_DIM (1 << 20)
#define DSA_MAX_DIM_INDEX 1024

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

typedef enum dsa_kind { DSA_LATENT = 0, DSA_INDEX_KEY, DSA_VALUE } dsa_kind;   /* what a cache holds; DSA_VALUE: only with n_kv_heads */

typedef enum dsa_isa {
    DSA_ISA_AUTO = 0,            /* the best that this build and this CPU have */
    DSA_ISA_SCALAR,
    DSA_ISA_AVX2,                /* AVX2, FMA, F16C */
    DSA_ISA_AVX512,              /* AVX-512 F, BW, VL, DQ; VNNI, and BF16 with VBMI, where the CPU has them */
    DSA_ISA_NEON,                /* AArch64 */
    DSA_ISA_AVX512_BASE          /* AVX-512 without those, for tests */
} dsa_isa;

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

typedef enum dsa_pooling {       /* how `stride` rows become one entry; the manual's chapter MODELS */
    DSA_POOL_NONE = 0,           /* one row, one entry */
    DSA_POOL_MEAN,
    DSA_POOL_GATED,              /* a softmax over the rows, for every channel */
    DSA_POOL_GATED_OVERLAP       /* the same over this block's rows and the last one's */
} dsa_pooling;

typedef enum dsa_norm {
    DSA_NORM_LAYER = 0,          /* weight and bias */
    DSA_NORM_RMS,                /* weight */
    DSA_NORM_RMS_PLUS_ONE,       /* 1 + weight */
    DSA_NORM_NONE
} dsa_norm;

typedef enum dsa_preset {
    DSA_DEEPSEEK_V32 = 0,
    DSA_GLM_5,                   /* and GLM-5.1 */
    DSA_GLM_52,
    DSA_DEEPSEEK_V3,             /* dense: no indexer */
    DSA_AXK2, DSA_HY_V4, DSA_GLM5_NEXT, DSA_MINIMAX_M3,
    DSA_QWEN4_EXP,               /* top_k, stride, n_index_heads and dim_index are the checkpoint's: dsa_init wants stride set */
    DSA_DEEPSEEK_V4_FLASH,       /* CSA layers. HCA: stride 128, DSA_POOL_GATED, no indexer. Window only: plain RoPE of theta 1e4 */
    DSA_DEEPSEEK_V4_PRO
} dsa_preset;

/* ---- hooks -------------------------------------------------------------------------------- */
/* Runs task(arg, i) for every i in [0, n_tasks), in any order, on any threads, each exactly once, and
   returns when all are done. n_tasks never exceeds dsa_config.n_threads. Must not fail. Tasks never wait for each other. */
typedef void (*dsa_task)(void *arg, int32_t i);
typedef void (*dsa_parallel_for)(void *user, int32_t n_tasks, dsa_task task, void *arg);

/* C[m, n] = A[m, k] . B[n, k]^T, f32, row-major, leading dimensions in elements. For the layer's dense
   projections only (kv_b's products, head by head, stay built-in): it may sum in any order, in f32 or better. Called from the
   caller's thread. tools/blis.h: BLIS. */
typedef void (*dsa_gemm)(void *user, int64_t m, int64_t n, int64_t k,
                         const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc);

/* alloc returns NULL on failure; any alignment malloc gives is enough. Both functions or neither, called from the caller's thread;
   release gets what alloc gave. */
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
    double theta;                /* > 1; 0 = 10000 */
    double factor;               /* YaRN context extension, >= 1; 0 or 1 = plain RoPE */
    double original_context;     /* YaRN: tokens of the original training, 0 = 4096 */
    double beta_fast, beta_slow; /* YaRN: 0 = 32 and 1 */
} dsa_rope;

/* ---- device ------------------------------------------------------------------------------- */
/* A GPU that caches may live on: dsa_cuda_create() makes it (DSA_CUDA, at the end of the declarations), config.cuda names it. */
typedef struct dsa_cuda dsa_cuda;

/* ---- config ------------------------------------------------------------------------------- */
/* Zero everywhere: DeepSeek-V3.2's shapes, plain RoPE, one thread. For a real model start from dsa_config_preset(). */
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
    float softmax_scale;         /* 0 = (dim_nope + dim_rope)^-0.5 m^2, m = 0.1 mscale ln(factor) + 1 under YaRN; positive and finite.
                                    Not (R + r)^-0.5 */
    float mscale;                /* YaRN's mscale_all_dim                              0 = 1, DSA_NONE = 0 (m = 1) */
    float norm_eps;              /* eps of q_a_layernorm and kv_a_layernorm            0 = 1e-6 */
    float index_norm_eps;        /* eps of the index key's LayerNorm                   0 = 1e-6 */
    double rope_theta;           /*                                                    0 = 10000 */
    double rope_factor;          /* YaRN factor; 0 or 1 = plain RoPE. Preset V3.2: 40 */
    double rope_original_context;/*                                                    0 = 4096 */
    double rope_beta_fast, rope_beta_slow; /*                                          0 = 32, 1 */
    dsa_rope_layout rope_layout; /* main attention, last dim_rope channels of q        0 = interleaved */
    int32_t index_rope_interleaved; /* not 0: interleaved, GLM; 0: half-split, DeepSeek-V3.2 */
    int32_t index_rope_offset;   /* first rotated channel of an index key              0 = 0 */
    int32_t index_rope_width;    /* rotated channels of an index key                   0 = dim_rope, DSA_NONE = 0 */
    int32_t index_share_freq;    /* GLM-5.2 IndexShare                                 0 = every layer has one */
    int32_t index_share_offset;  /* both for the caller's dsa_layer_has_indexer(): no call reads them */
    dsa_hadamard hadamard;
    /* what other models change; zero everywhere is DeepSeek-V3.2 (the manual's chapter MODELS) */
    int32_t stride;              /* tokens per entry of the index                      0 = 1 */
    dsa_pooling pooling;         /* how they become one */
    dsa_norm index_norm;         /* norm of an index key, */
    int32_t norm_pooled;         /* not 0: after pooling; 0: of the rows before it */
    int32_t index_groups;        /* lists per query: the index heads of one are summed, its query heads share it     0 = 1 */
    int32_t index_linear;        /* not 0: scores without ReLU */
    int32_t index_no_weights;    /* not 0: w is NULL in calls, every head weighs index_scale */
    float index_scale;           /* 0 = HI^-0.5 D^-0.5, without weights D^-0.5 */
    int32_t block_size;          /* entries that are chosen together, by the highest score among them         0 = 1 */
    int32_t n_local_blocks;      /* newest blocks that are chosen whatever they score, within top_k */
    int32_t keep_tail;           /* not 0: lists end with the visible tokens behind the last whole entry */
    int32_t list_entries;        /* not 0: lists name entries or blocks; 0: their tokens */
    int32_t n_kv_heads;          /* 0: one row for all heads, value in front. Else grouped queries: keys [n_kv, dim_latent] in the
                                    latent cache (dim_rope DSA_NONE), values [n_kv, dim_value] in one of kind DSA_VALUE */
    int32_t dim_value;           /* width of the value                                 0 = dim_latent */
    int32_t rope_width;          /* rotated channels of a query head and key           0 = dim_rope, DSA_NONE = 0 */
    int32_t rope_first;          /* not 0: they are the first ones, 0: the last */
    int32_t window;              /* sliding window beside the entries, for the caller's own range: no call reads it */
    int32_t foreign_layer;       /* not 0: the layer around it is not the manual's LAYER, dsa_layer is refused */
    /* run time */
    dsa_isa isa;                 /* 0 = the best this CPU has */
    dsa_precision precision;
    int32_t n_threads;           /* most tasks of one call; sizes the workspace        0 = 1 */
    dsa_parallel_for parallel_for; /* NULL: tasks run one after the other on the caller's thread */
    void *parallel_user;
    dsa_gemm gemm;               /* NULL: built-in */
    void *gemm_user;
    dsa_allocator allocator;     /* used by dsa_cache_create, dsa_pages_create and dsa_pool_create only; zero = malloc/free */
    dsa_cuda *cuda;              /* NULL: none. Caches created or viewed with device CUDA or AUTO live there */
    char *detail;                /* optional: on error, which argument of which call; zero-terminated. Left alone on success, but
                                    emptied by dsa_init */
    size_t detail_size;          /* (copies of a context on several threads want a buffer each) */
} dsa_config;

struct dsa__kernels;

/* A context: the resolved config and the kernel table. Plain data in the caller's memory: nothing to free,
   may be copied, read-only for every call and therefore shared by threads. */
typedef struct dsa_ctx {
    dsa_config config;           /* resolved: defaults filled in, DSA_NONE has become 0; not to be given to dsa_init again. isa and
                                    hadamard stay as they were given */
    const struct dsa__kernels *kernels;
} dsa_ctx;

DSA_API int         dsa_version(void);                     /* major * 10000 + minor * 100 + patch */
DSA_API const char *dsa_status_text(dsa_status status);    /* never NULL */
DSA_API const char *dsa_isa_name(dsa_isa isa);             /* "auto", "scalar", "avx2", "avx512", "neon", "avx512base" */
/* Fills the model part of *config and zeroes the rest. ERR_NULL, ERR_ARGUMENT. */
DSA_API dsa_status  dsa_config_preset(dsa_preset preset, dsa_config *config);
/* Resolves defaults, checks the config (ERR_SHAPE, ERR_ARGUMENT), picks the kernels (ERR_UNSUPPORTED if the forced
   ISA is not in this build or this CPU). config may be NULL: all defaults. */
DSA_API dsa_status  dsa_init(dsa_ctx *ctx, const dsa_config *config);
/* The ISA that dsa_init chose. */
DSA_API dsa_isa     dsa_query_isa(const dsa_ctx *ctx);
/* The config's two rotary embeddings: of the main attention for a row of dim_row channels (rotates its last rope_width, or the
   first ones), and of the indexer. ctx: initialised, not NULL. */
DSA_API dsa_rope    dsa_config_rope(const dsa_ctx *ctx, int32_t dim_row);
DSA_API dsa_rope    dsa_config_index_rope(const dsa_ctx *ctx);
/* GLM-5.2 IndexShare (spec 1): 1 if 0-based layer i has its own indexer: max(i - offset + 1, 0) % freq == 0, or freq <= 1. */
DSA_API int         dsa_layer_has_indexer(int32_t freq, int32_t offset, int32_t i);
/* int32s of one list: top_k (0 = the config's), or the tokens of as many entries or blocks, and those of the tail. 0: ctx is not
   initialised, or top_k negative. */
DSA_API int64_t     dsa_list_length(const dsa_ctx *ctx, int32_t top_k);

/* ---- number formats (each usable on its own; no context, cannot fail) ------------------------ */
DSA_API float    dsa_bf16_to_f32(uint16_t x);
DSA_API uint16_t dsa_f32_to_bf16(float x);        /* round to nearest even; NaN stays NaN */
DSA_API float    dsa_f16_to_f32(uint16_t x);
DSA_API uint16_t dsa_f32_to_f16(float x);         /* round to nearest even; overflow to inf; subnormals kept */
DSA_API float    dsa_e4m3_to_f32(uint8_t x);      /* 0x7F, 0xFF: NaN */
DSA_API uint8_t  dsa_f32_to_e4m3(float x);        /* round to nearest even, saturates at 448 (inf too); NaN: 0x7F with its sign */
DSA_API float    dsa_ue8m0_to_f32(uint8_t x);     /* 2^(x-127); 0 is 2^-127, 255 is NaN */
DSA_API uint8_t  dsa_f32_to_ue8m0_ceil(float x);  /* least b with 2^(b-127) >= x, for x > 0; at most 254 */
/* Smallest power of two >= x, for finite x > 0 (spec 3.4); +inf above 2^127. */
DSA_API float    dsa_pow2_ceil(float x);
/* One row of n values to e4m3 / int8; returns the f32 scale, x ~ scale * y. x, y [n].
   NaN has no part in amax, an infinity counts as FLT_MAX there. e4m3 keeps a NaN (0x7F); int8 cannot: its scale becomes NaN.
   e4m3: s = 2^ceil(log2(max(amax, 1e-4) / 448))   int8: s = max(amax, 1e-4) / 127, half to even, clamp +-127 */
DSA_API float    dsa_quantize_e4m3(const float *x, int32_t n, uint8_t *y);
DSA_API float    dsa_quantize_int8(const float *x, int32_t n, int8_t *y);

/* ---- row operations of the layer (each usable on its own) ----------------------------------- */
/* In place on n_rows rows, `stride` floats apart, sums in double; gain, bias [dim]. ERR_NULL, ERR_SHAPE.
   y = x (mean(x^2) + eps)^-0.5 gain          y = (x - mean) (var + eps)^-0.5 gain + bias, biased variance */
DSA_API dsa_status dsa_rms_norm(float *x, int64_t n_rows, int64_t stride, int32_t dim, const float *gain, float eps);
DSA_API dsa_status dsa_layer_norm(float *x, int64_t n_rows, int64_t stride, int32_t dim, const float *gain, const float *bias, float eps);
/* Whichever norm: PLUS_ONE takes weights w for gains 1 + w; of RMS gain may be NULL (all 1); LAYER wants bias; NONE does nothing. */
DSA_API dsa_status dsa_norm_rows(dsa_norm norm, float *x, int64_t n_rows, int64_t stride, int32_t dim, const float *gain,
                                 const float *bias, float eps);
/* An output gate: y[i] = y[i] sigmoid(g[i]) for i < n. ERR_NULL, ERR_SHAPE. */
DSA_API dsa_status dsa_gate(float *y, const float *g, int64_t n);
/* Sylvester order, times dim^-0.5: orthonormal and self-inverse. dim must be a power of two. */
DSA_API dsa_status dsa_hadamard_rows(float *x, int64_t n_rows, int64_t stride, int32_t dim);
/* Rotates channels [offset, offset + width) of n_heads heads (head_stride floats apart) of each row by the row's
   position; inverse != 0 rotates back. positions [n_rows]. dim_row only bounds the check offset + width <= dim_row. Strides in
   floats. Angles in double, their cos and sin rounded to f32. ERR_NULL, ERR_SHAPE, ERR_ARGUMENT (a number of rope). */
DSA_API dsa_status dsa_rope_rows(float *x, int64_t n_rows, int64_t row_stride, int32_t n_heads, int64_t head_stride,
                                 int32_t dim_row, const dsa_rope *rope, const int64_t *positions, int inverse);
/* f_i for i in [0, width/2), spec 2.1 with n = width. Errors likewise. */
DSA_API dsa_status dsa_rope_frequencies(const dsa_rope *rope, double *f);

/* ---- caches ------------------------------------------------------------------------------- */
/* What a cache is; zero = contiguous f32 latents of the config's dims. */
typedef struct dsa_cache_desc {
    dsa_kind kind;               /* DSA_LATENT: rows [c | k_pe]; DSA_INDEX_KEY: rows k_I; DSA_VALUE: rows [n_kv, dim_value] */
    dsa_type format;             /* latent: F32, BF16, FP8 (not under n_kv_heads); index key: F32, BF16, FP8, INT8; value: F32, BF16 */
    int32_t dim;                 /* R (n_kv R), D or n_kv dim_value           0 = from the config */
    int32_t dim_rope;            /* latent only: r                            0 = from the config, DSA_NONE = 0 */
    dsa_hadamard hadamard;       /* index keys only                           0 = the config's, which may be AUTO */
    dsa_device device;           /* CUDA: config.cuda, else ERR_NO_DEVICE; AUTO: config.cuda if there is one, else CPU */
    int64_t capacity;            /* rows, 1 .. 2^31 - 1; a view reads it only where page_size is 0 */
    int32_t page_size;           /* rows per page                             0 = one page of `capacity` rows */
} dsa_cache_desc;

/* One sequence's rows of one layer: a view plus its length. Every field may be read; kind to len may be filled by hand, in a
   zeroed struct, to lay a view over memory that the library does not know (then call dsa_cache_check once).

   Row i lives in page p = block_table[i / page_size] (p = i / page_size without a table), at offset o = i % page_size:
     F32, BF16, FP8 latents  data + p * page_stride + o * row_stride        F32 and BF16 index keys likewise
     FP8, INT8 index keys    data + p * page_stride + o * dim,  its f32 scale at
                             scales + p * scale_page_stride + o * 4  (scales NULL: behind the page's data, at
                             data + p * page_stride + page_size * dim + o * 4: DeepGEMM's planar page) */
typedef struct dsa_cache {
    dsa_kind kind;
    dsa_type format;
    int32_t dim, dim_rope;       /* resolved: dim_rope >= 0 here, 0 for index keys */
    int32_t hadamard;            /* 0 or 1 (not the enum). 1: rows are Hadamard-rotated (append rotates them, score rotates the queries) */
    int32_t page_size;           /* rows per page, >= 1 */
    int64_t n_pages;             /* pages in the pool `data` points to */
    int64_t n_blocks;            /* entries of block_table; those beyond the rows in use are not read. Ignored without a table */
    const int32_t *block_table;  /* NULL: block b is page b */
    void *data;
    void *scales;                /* planar pages only; NULL: in the page */
    size_t row_stride, page_stride, scale_page_stride;   /* bytes. Planar: no row_stride, and page_stride a multiple of 4 unless scales
                                    is set. The last two only count from the second page on */
    int64_t len;                 /* rows written so far */
    dsa_device device;           /* where the rows live: CPU or CUDA, never AUTO. CUDA: data and scales are device pointers (block_table
                                    is not) */
    void *owned;                 /* memory to release, or NULL */
    dsa_allocator allocator;     /* whose it is */
} dsa_cache;

/* Layout calculators. dim_rope: 0 or DSA_NONE = none here (no config is at hand).
   Latent row bytes: F32 4(R+r), BF16 2(R+r), FP8 R + 4 ceil(R/128) + 2r. Index key: F32 4D, BF16 2D, FP8 and INT8 D + 4.
   (D + 4 is a token's share of a planar page, no stride.) A planar page: page_size * (D + 4), rounded up to 4; others are not
   rounded. ERR_NULL, ERR_SHAPE, ERR_FORMAT, ERR_OVERFLOW. */
DSA_API dsa_status dsa_row_bytes(dsa_kind kind, dsa_type format, int32_t dim, int32_t dim_rope, size_t *bytes);
DSA_API dsa_status dsa_page_bytes(dsa_kind kind, dsa_type format, int32_t dim, int32_t dim_rope, int32_t page_size, size_t *bytes);
/* Bytes that dsa_cache_init wants for this desc. */
DSA_API dsa_status dsa_cache_bytes(const dsa_ctx *ctx, const dsa_cache_desc *desc, size_t *bytes);
/* Empty cache in the caller's memory (any alignment; contents need no initialisation), which must outlive it. ERR_CAPACITY if it is
   too small. */
DSA_API dsa_status dsa_cache_init(const dsa_ctx *ctx, const dsa_cache_desc *desc, void *memory, size_t bytes, dsa_cache *cache);
/* The same in memory from the config's allocator; dsa_cache_destroy gives it back. What *cache held before is not released.
   ERR_MEMORY; ERR_UNSUPPORTED under DSA_NO_MALLOC without an allocator. */
DSA_API dsa_status dsa_cache_create(const dsa_ctx *ctx, const dsa_cache_desc *desc, dsa_cache *cache);
DSA_API void       dsa_cache_destroy(dsa_cache *cache);    /* NULL and zeroed caches are fine */
/* View over a pool of pages; pool and table stay the caller's and must outlive it. kind, format, dims, hadamard and page_size come
   from desc. page_stride 0 = tight. block_table may be NULL. The first len rows are there already. Errors as dsa_cache_check. */
DSA_API dsa_status dsa_cache_view(const dsa_ctx *ctx, const dsa_cache_desc *desc, void *pool, int64_t n_pages, size_t page_stride,
                                  const int32_t *block_table, int64_t n_blocks, int64_t len, dsa_cache *cache);
/* Checks a view filled by hand: ERR_NULL, ERR_ARGUMENT, ERR_SHAPE, ERR_FORMAT, ERR_TABLE, ERR_OVERFLOW, ERR_NO_DEVICE. */
DSA_API dsa_status dsa_cache_check(const dsa_ctx *ctx, const dsa_cache *cache);
DSA_API int64_t    dsa_cache_capacity(const dsa_cache *cache);
/* Keeps rows [0, n_rows). ERR_ARGUMENT if n_rows > len. Clear is truncate(0). Not beside an appender, nor is dsa_cache_read. */
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
    dsa_cache *index;            /* NULL where the call does not read index keys. stride > 1: its rows are entries, everything else
                                    here still counts tokens, and len 0 is the latent cache's len */
    int64_t len;                 /* rows visible to this call; 0 = the cache's len, DSA_NONE = 0. Pass your own beside an appender. It may
                                    exceed the cache's len, up to the capacity: then you vouch for the rows */
    int32_t n_q;                 /* queries (append: rows to write); 0 = 1, DSA_NONE = 0 */
    dsa_cache *value;            /* n_kv_heads > 0: the values, in the format of the latent cache, which then holds the keys */
} dsa_seq;

/* ---- 1. append ---------------------------------------------------------------------------- */
typedef struct dsa_append_args {
    int32_t n_seqs;
    const dsa_seq *seqs;         /* n_q rows go behind row len - 1 of each cache; seq.len is ignored. No cache twice, unless slots are
                                    given or n_q is DSA_NONE: ERR_ARGUMENT */
    const float *latent;         /* [rows, R + r]  normalised c, then rotated k_pe; NULL = no latent cache is written */
    const float *index_key;      /* [rows, D]      normalised and rotated k_I, before Hadamard; NULL likewise */
    const int64_t *slots;        /* optional [rows], for all caches: write to these physical slots instead, in [0, n_pages page_size),
                                    -1 = skip, else ERR_TABLE; len stays as it is */
    const float *value;          /* [rows, n_kv, dim_value]; NULL likewise */
} dsa_append_args;
/* All or nothing: capacity, tables and slots of every sequence are checked before the first byte is written. Needs no workspace, runs
   on the caller's thread. ERR_CAPACITY, ERR_TABLE, ERR_FORMAT, ERR_ARGUMENT, ERR_NULL and what dsa_cache_check gives. */
DSA_API dsa_status dsa_append(const dsa_ctx *ctx, const dsa_append_args *args);

/* ---- 1b. entries of several tokens ---------------------------------------------------------- */
/* Pools `stride` rows into one row of a cache: index keys (kind DSA_INDEX_KEY: D channels, index_norm with index_norm_eps, the
   index RoPE) or DeepSeek-V4's compressed rows (DSA_LATENT: R + r channels, index_norm with norm_eps, the main RoPE), as the config's
   stride, pooling and norm_pooled say. The entry of tokens [w stride, (w + 1) stride) is row w, rotated for position w stride. It is
   written when its last token comes. One for each sequence and cache, in the caller's memory; what it points to must outlive it. */
typedef struct dsa_compressor_desc {
    dsa_kind kind;
    const float *gain, *bias;    /* of the norm [dim]; as dsa_norm_rows wants them */
    const float *gate_bias;      /* GATED: optional [stride, width], added to the gates of a block's tokens. width: dim, OVERLAP 2 dim */
    int64_t n_kept;              /* tokens that truncate may take back, whatever they leave (fewer reach back more often than not);
                                    4 width bytes each, gated 8 width. 0: those that an entry needs and no more */
} dsa_compressor_desc;

typedef struct dsa_compressor {  /* read-only for callers */
    dsa_compressor_desc desc;
    dsa_pooling pooling;
    dsa_norm norm;
    int32_t norm_pooled, stride, dim, width;
    float eps;
    dsa_rope rope;
    int64_t len, first, room;    /* tokens so far; the rows of tokens [first, len) are kept; places for rows */
    float *rows, *gates;         /* [room, width] token j in place j % room, normed already where the norm comes first */
    float *entry, *max, *sum;    /* [dim] scratch */
} dsa_compressor;

/* ERR_NULL, ERR_ARGUMENT, ERR_SHAPE, ERR_OVERFLOW; init also ERR_CAPACITY if the memory (any alignment) is too small. */
DSA_API dsa_status dsa_compressor_bytes(const dsa_ctx *ctx, const dsa_compressor_desc *desc, size_t *bytes);
DSA_API dsa_status dsa_compressor_init(const dsa_ctx *ctx, const dsa_compressor_desc *desc, void *memory, size_t bytes, dsa_compressor *c);
/* n_rows more tokens: rows [n_rows, width], gates likewise (GATED only, else NULL), before norm and RoPE. The cache holds the entries so
   far and gets those that become whole: all or nothing. The same bits however the tokens are cut into calls. No workspace, the caller's
   thread. ERR_ARGUMENT if the cache is not at entry len / stride; ERR_CAPACITY and what dsa_cache_check gives. */
DSA_API dsa_status dsa_compress(const dsa_ctx *ctx, dsa_compressor *c, int64_t n_rows, const float *rows, const float *gates,
                                dsa_cache *cache);
/* Back to n_tokens, the cache to n_tokens / stride entries. ERR_ARGUMENT if n_tokens > len; ERR_CAPACITY if the rows of an entry that is
   now incomplete (OVERLAP: and of the one before) are no longer kept: n_kept. A multiple of stride always works, but for OVERLAP. */
DSA_API dsa_status dsa_compressor_truncate(const dsa_ctx *ctx, dsa_compressor *c, dsa_cache *cache, int64_t n_tokens);

/* ---- 2. score ----------------------------------------------------------------------------- */
/* I[t,s] = sum_h w[t,h] ReLU(<q[t,h], k[s]>)    DeepSeek-V3.2-Exp paper, eq. (1) */
typedef struct dsa_score_args {
    int32_t n_seqs;
    const dsa_seq *seqs;         /* index caches: one format, one set of dims, one Hadamard flag */
    const float *q;              /* [rows, HI, D]  after RoPE, before Hadamard and rounding */
    const float *w;              /* [rows, HI]     with HI^-0.5 D^-0.5 already in; may be negative. index_no_weights: NULL */
    const int64_t *ks, *ke;      /* optional [rows]: half-open key range instead of the visible rows, clamped to [0, len]: rows after the
                                    query count, too. Both or neither; ks >= ke: none. Selection: only where items are index rows and
                                    are named themselves (ERR_UNSUPPORTED with block_size, n_local_blocks, or a span of tokens) */
    int32_t n_index_heads;       /* 0 = the config's */
    void *workspace;             /* any alignment */
    size_t workspace_size;
} dsa_score_args;

/* What selection writes. */
typedef struct dsa_selection {
    int32_t top_k;               /* k >= 1; 0 = the config's */
    dsa_order order;
    int32_t *indices;            /* [rows, k] logical positions, unused places -1; in general [rows, index_groups, dsa_list_length] */
    float *scores;               /* optional [rows, k] in the same order, unused places -inf. RANK and scores: only where items are named
                                    themselves (list_entries, or tokens of their own) */
    int32_t *counts;             /* optional [rows] places used */
} dsa_selection;

/* All x_workspace functions: checks and errors of the call itself; pointers to data may still be NULL; *bytes is written on success
   only. */
DSA_API dsa_status dsa_score_workspace(const dsa_ctx *ctx, const dsa_score_args *args, size_t *bytes);
/* scores [rows, stride], in general [rows, index_groups, stride]: columns [0, n_cols), -inf outside the row's key range; the columns
   behind them are left alone, keys from n_cols on not scored. ERR_SHAPE unless 0 <= n_cols <= stride. */
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
   global and which must be disjoint). indices[p], scores[p]: [n_rows, k_in]; negative indices and scores that are NaN or -inf are
   skipped. Runs on the caller's thread. */
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
    int32_t dim_v;               /* width of the value, the first dim_v channels of a row; 0 = the config's dim_value */
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
    float scale;                 /* softmax scale, any finite value; 0 = the config's */
    dsa_attend_what what;
    dsa_index_kind index_kind;
    const int32_t *indices;      /* LIST: [rows, n_lists, index_stride]; anything invalid is skipped; duplicates count as often as they
                                    appear; rows after the query count, too */
    int64_t n_indices;           /* entries read per list; 0 = dsa_list_length, plainly top_k (for none: counts of 0) */
    int64_t index_stride;        /* int32s from list to list; 0 = n_indices */
    const int32_t *counts;       /* optional [rows, n_lists]: read only the first counts[row] entries (clamped to [0, n_indices]) */
    const int64_t *ks, *ke;      /* RANGE: [rows] */
    void *workspace;
    size_t workspace_size;
    int32_t n_lists;             /* lists per row, each for its n_heads / n_lists query heads; 0 = the config's index_groups */
} dsa_attend_args;

DSA_API dsa_status dsa_attend_begin(const dsa_ctx *ctx, const dsa_attend_state *state);
DSA_API dsa_status dsa_attend_workspace(const dsa_ctx *ctx, const dsa_attend_args *args, const dsa_attend_state *state, size_t *bytes);
DSA_API dsa_status dsa_attend_add(const dsa_ctx *ctx, const dsa_attend_args *args, const dsa_attend_state *state);
/* out [n_rows, n_heads, dim_v] (may be state->out), lse and max_logit [n_rows, n_heads] optional, natural log, without the
   sink. sinks [n_heads] optional: logits z_h of a column whose value is 0, not scaled; -inf has no effect, +inf gives 0.
   Empty row: out 0, lse +inf, max_logit -inf. The state stays as it is, unless out is state->out. */
DSA_API dsa_status dsa_attend_finish(const dsa_ctx *ctx, const dsa_attend_state *state, const float *sinks,
                                     float *out, float *lse, float *max_logit);
/* begin, add and finish in one pass, for a single list or range; every thread clears and divides its own heads. Same bits as the three.
   state->out is the result, max and sum are as add leaves them. */
DSA_API dsa_status dsa_attend(const dsa_ctx *ctx, const dsa_attend_args *args, const dsa_attend_state *state, const float *sinks,
                              float *lse, float *max_logit);
/* Keeps the state as a partial: out normalised, no sink, lse natural, -inf where empty. out may be state->out, which ends the state. */
DSA_API dsa_status dsa_attend_partial(const dsa_ctx *ctx, const dsa_attend_state *state, float *out, float *lse);
/* Merges n_parts partials (not results of finish: their empty rows have lse +inf), in this order, up to f32 rounding:
   out = Sum_p e^(lse_p - L) out_p, L = ln Sum_p e^lse_p. Sinks as in finish.
   outs[p] [n_rows, n_heads, dim_v], lses[p] [n_rows, n_heads]; out and lse are none of them. lse (optional) is +inf where everything
   was empty. */
DSA_API dsa_status dsa_attend_merge(const dsa_ctx *ctx, int32_t n_parts, const float *const *outs, const float *const *lses,
                                    int64_t n_rows, int32_t n_heads, int32_t dim_v, const float *sinks, float *out, float *lse);

/* ---- the fused step: [append] -> score + select -> attend ------------------------------------ */
typedef struct dsa_step_args {
    int32_t n_seqs;
    const dsa_seq *seqs;         /* both caches; n_q queries each. len 0: both caches of one length, else ERR_ARGUMENT */
    const float *latent;         /* optional [rows, R + r]: rows to append first, with index_key; both or neither */
    const float *index_key;      /* optional [rows, D]. When appending, seq.len must be 0: the new rows are the queries' */
    const float *q;              /* [rows, H, R + r] */
    const float *index_q;        /* [rows, HI, D] */
    const float *index_w;        /* [rows, HI] */
    float scale;                 /* 0 = the config's */
    const float *sinks;          /* optional [H] */
    int32_t top_k;               /* 0 = the config's */
    float *out;                  /* [rows, H, R] */
    float *lse;                  /* optional [rows, H] */
    int32_t *indices;            /* optional [rows, k]: what was selected, ascending; NULL: they lie in the workspace, which is then
                                    larger: query with the pointer you will pass, or with NULL */
    void *workspace;
    size_t workspace_size;
} dsa_step_args;
DSA_API dsa_status dsa_step_workspace(const dsa_ctx *ctx, const dsa_step_args *args, size_t *bytes);
DSA_API dsa_status dsa_step(const dsa_ctx *ctx, const dsa_step_args *args);

/* ---- 5. the layer ------------------------------------------------------------------------- */
/* A weight in the caller's memory, row-major [out, in], any alignment. FP8: scale_inv [ceil(out/128), ceil(in/128)] f32,
   value = e4m3 * scale_inv (DeepSeek's weight_scale_inv). Vectors are tensors with out = 1. Nothing can hold it to its shape: a
   tensor that is too small is read beyond its end. */
typedef struct dsa_tensor {
    const void *data;
    dsa_type type;               /* F32, BF16, F16, FP8 */
    const float *scale_inv;      /* FP8 only */
} dsa_tensor;

/* Hugging Face names in the comments. The memory must outlive the call. index_k.data == NULL: a layer without indexer, which
   shares another layer's list; else all five index weights are needed. */
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
    DSA_LAYER_WINDOW             /* the config's top_k newest visible rows, the query's own included */
} dsa_layer_mode;

typedef struct dsa_layer_args {
    const dsa_layer_weights *weights;
    int32_t n_seqs;
    const dsa_seq *seqs;         /* n_q new rows each, appended to both caches (a layer without indexer ignores index); len must be 0 */
    const float *x;              /* [rows, hidden]  output of input_layernorm, f32 */
    float *y;                    /* [rows, hidden]  output of o_proj, before the residual; may not alias x */
    const int64_t *positions;    /* optional [rows] RoPE positions; NULL = the row number in the cache */
    dsa_layer_mode mode;
    const int32_t *indices_in;   /* optional [rows, k]: use these lists (a shared layer's, or a replay), SPARSE only; entries after the
                                    query's own row are skipped like invalid ones; index keys are still written */
    int32_t *indices_out;        /* optional [rows, k]: the lists used; SPARSE only, may not alias indices_in */
    void *workspace;
    size_t workspace_size;
} dsa_layer_args;
DSA_API dsa_status dsa_layer_workspace(const dsa_ctx *ctx, const dsa_layer_args *args, size_t *bytes);
/* Works through the rows in tiles of DSA_LAYER_TILE, so the workspace does not grow with the chunk. */
DSA_API dsa_status dsa_layer(const dsa_ctx *ctx, const dsa_layer_args *args);
#define DSA_LAYER_TILE 32

/* ---- 6. and 7. backward ------------------------------------------------------------------- */
/* d_x is the derivative of one scalar loss by x: f32, x's shape. Every d_ array that a call puts out is added to (clear it first),
   so parts, chunks and micro-batches sum up; NULL where it is not wanted. The manual's chapter BACKWARD has the formulas.
   Hadamard is its own backward; that of dsa_rope_rows is the same call with inverse turned round. */
/* x is the input of the norm, all rows `stride` floats apart; d_x is not d_y. ERR_NULL, ERR_SHAPE. */
DSA_API dsa_status dsa_rms_norm_backward(const float *x, const float *d_y, int64_t n_rows, int64_t stride, int32_t dim, const float *gain,
                                         float eps, float *d_x, float *d_gain);
DSA_API dsa_status dsa_layer_norm_backward(const float *x, const float *d_y, int64_t n_rows, int64_t stride, int32_t dim, const float *gain,
                                           float eps, float *d_x, float *d_gain, float *d_bias);

/* A projection y = x W^T and its backward d_x += d_y W, d_w += d_y^T x, by the context's kernels and threads: what a layer is made
   of, and an engine's MLP and head as well. Rows are tight. */
typedef struct dsa_linear_args {
    int64_t n_rows;
    int32_t dim_in, dim_out;
    dsa_tensor w;                /* [dim_out, dim_in] */
    const float *x;              /* [n_rows, dim_in]; backward: for d_w only */
    float *y;                    /* [n_rows, dim_out]  forward: the result */
    const float *d_y;            /* [n_rows, dim_out]  backward */
    float *d_x;                  /* optional [n_rows, dim_in] */
    float *d_w;                  /* optional [dim_out, dim_in] */
    void *workspace;
    size_t workspace_size;
} dsa_linear_args;
DSA_API dsa_status dsa_linear_workspace(const dsa_ctx *ctx, const dsa_linear_args *args, size_t *bytes);
DSA_API dsa_status dsa_linear(const dsa_ctx *ctx, const dsa_linear_args *args);
DSA_API dsa_status dsa_linear_backward(const dsa_ctx *ctx, const dsa_linear_args *args);

/* Backward of attention over lists or ranges. For a union call it once per part, each time with the out and lse of the whole.
   Rounding of q and P (BF16 and FP8 latents) is passed straight through. */
typedef struct dsa_attend_backward_args {
    dsa_attend_args attend;      /* as given to dsa_attend_add, with this call's workspace. LOGICAL lists only */
    const float *out;            /* [rows, H, R]  from finish, after sinks */
    const float *lse;            /* [rows, H]     from finish: natural, without the sink, +inf where empty */
    const float *sinks;          /* optional [H] */
    const float *d_out;          /* [rows, H, R]; NULL: only target is wanted, out may be NULL, too */
    float *d_q;                  /* optional [rows, H, R + r] */
    float *const *d_latent;      /* optional [n_seqs]: of each sequence's rows, [len, R + r]; sequences that share rows may share it */
    float *d_sinks;              /* optional [H] */
    float *target;               /* optional [rows, target_stride], written: p = Sum_h P / Sum_s Sum_h P, the indexer's target (spec 8.2).
                                    Column: the entry of the list, or the position; 0 elsewhere */
    int64_t target_stride;       /* floats; at least n_indices (LIST), or the longest len */
} dsa_attend_backward_args;
DSA_API dsa_status dsa_attend_backward_workspace(const dsa_ctx *ctx, const dsa_attend_backward_args *args, size_t *bytes);
DSA_API dsa_status dsa_attend_backward(const dsa_ctx *ctx, const dsa_attend_backward_args *args);

/* Backward of the index scores I[t,s], s in the set S_t, either from their derivatives or from the indexer's loss
       KL_t = Sum_s p_s (ln p_s - ln sigma_s)     sigma = softmax of I over S_t     dI = weight (sigma - p), exactly
   S_t = all visible rows is the warm-up's loss, S_t = the selected list the sparse stage's (spec 8.1). A row whose target is all 0
   has no loss. */
typedef struct dsa_index_backward_args {
    dsa_attend_args set;         /* S_t, said as for attention: n_seqs, seqs (their index caches), what, indices.., ks, ke, and this
                                    call's workspace; its q and scale are not read. LOGICAL lists only */
    const float *q, *w;          /* [rows, HI, D], [rows, HI]: as in dsa_score_args. Rounding to the keys' format is passed straight
                                    through */
    const float *d_scores;       /* either dI [rows, stride] */
    const float *target;         /* or p [rows, stride], whose rows sum to 1 or are 0: from dsa_attend_backward, columns as there */
    int64_t stride;              /* floats */
    float weight;                /* of one row's loss in the whole, say 1 / rows */
    float *loss;                 /* optional [rows], written: KL_t, not weighted */
    float *d_q, *d_w;            /* optional [rows, HI, D], [rows, HI] */
    float *const *d_key;         /* optional [n_seqs]: of each sequence's keys before Hadamard, [len, D] */
} dsa_index_backward_args;
DSA_API dsa_status dsa_index_backward_workspace(const dsa_ctx *ctx, const dsa_index_backward_args *args, size_t *bytes);
DSA_API dsa_status dsa_index_backward(const dsa_ctx *ctx, const dsa_index_backward_args *args);

/* Gradients of dsa_layer_weights: f32, row-major whatever the weight's own type, each optional (frozen). */
typedef struct dsa_layer_grads {
    float *q_a, *q_a_norm, *q_b, *kv_a, *kv_a_norm, *kv_b, *o;                         /* from d_y */
    float *index_q_b, *index_k, *index_k_norm, *index_k_bias, *index_w;               /* from the indexer's loss */
} dsa_layer_grads;

/* Backward of dsa_layer, by the recipe: the indexer learns only from its loss, whose target and inputs (x, qr, the attention) are
   constants to it; everything else only from d_y. Nothing is saved between the two calls but the caches and the lists: the rest is
   computed again from x. Rows that lay in the caches before the call's own are constants. */
typedef struct dsa_layer_backward_args {
    dsa_layer_args layer;        /* as given to dsa_layer, which has run: the caches end with its rows (seqs[].len is 0 here, too). SPARSE:
                                    indices_in = the lists that it used. y, indices_out: not read. This call's workspace, which grows
                                    with the lengths of the sequences */
    const float *d_y;            /* [rows, hidden]; NULL: the main model is frozen, as in the warm-up */
    float *d_x;                  /* optional [rows, hidden] */
    const dsa_layer_grads *grads;
    float index_weight;          /* of one row's KL in the loss; 0: no indexer loss. S_t is what the mode attends over */
    float *index_loss;           /* optional [rows], written: KL_t (0 without an indexer) */
} dsa_layer_backward_args;
DSA_API dsa_status dsa_layer_backward_workspace(const dsa_ctx *ctx, const dsa_layer_backward_args *args, size_t *bytes);
DSA_API dsa_status dsa_layer_backward(const dsa_ctx *ctx, const dsa_layer_backward_args *args);

/* ---- 8. shards ---------------------------------------------------------------------------- */
/* A sequence dealt to n_shards caches in blocks of rows, one after the other: rows [b block, b block + block) lie on shard b % n_shards,
   in order. A block of at least len / n_shards rows makes contiguous pieces. All calls: ERR_NULL; ERR_ARGUMENT unless
   0 <= shard < n_shards and block >= 1. */
typedef struct dsa_shard { int32_t n_shards, shard, block; } dsa_shard;
/* How many of rows [0, len) the shard holds. ERR_ARGUMENT: len outside [0, 2^31 - 1]. */
DSA_API dsa_status dsa_shard_len(const dsa_shard *shard, int64_t len, int64_t *n_rows);
/* What the newest n_q queries of a sequence of len rows may see of the shard: ks, ke [n_q], in the shard's own positions.
   ERR_ARGUMENT, also if n_q is negative. */
DSA_API dsa_status dsa_shard_ranges(const dsa_shard *shard, int64_t len, int32_t n_q, int64_t *ks, int64_t *ke);
/* Positions in the shard to positions in the sequence, in place; negative ones (unused places) become -1. ERR_OVERFLOW: beyond
   2^31 - 1, nothing is changed. ERR_SHAPE: n is negative. */
DSA_API dsa_status dsa_shard_to_global(const dsa_shard *shard, int64_t n, int32_t *indices);
/* The way back, each in its place: what another shard holds, and what is negative, becomes -1. local may be indices. */
DSA_API dsa_status dsa_shard_to_local(const dsa_shard *shard, int64_t n, const int32_t *indices, int32_t *local);

/* ---- 9. pages shared by sequences --------------------------------------------------------- */
/* Which page holds which rows of which sequence, for a pool of pages that sequences share, copy on write, and an index of token
   prefixes that are in the pool already (manual: PAGES). It only keeps the books: rows lie in the caller's caches, and page number p
   means page p in every one of them. Not to be mixed up with dsa_pool, which is a pool of threads. */
typedef struct dsa_pages dsa_pages;
typedef struct dsa_pages_desc {
    int32_t n_planes;
    const dsa_cache *planes;     /* [n_planes] the memory: caches without a block table, all of one page_size and n_pages, say the latents
                                    and the index keys of every layer. Their len is not read; the memory must outlive the books */
    int32_t max_seqs;            /* sequences that can be open at a time, >= 1 */
    int64_t max_len;             /* rows of the longest; 0 = all pages. Sizes the block tables: max_seqs ceil(max_len / page_size) int32s */
} dsa_pages_desc;
typedef struct dsa_pages_usage {
    int64_t n_rows;
    int32_t n_pages;             /* a sequence: that it holds; the pool: that any sequence holds */
    int32_t n_own;               /* of these, held by no other sequence */
    size_t latent_bytes, index_bytes; /* of the n_pages pages, over all planes, as strides lay them out; values count as latents */
    size_t own_latent_bytes, own_index_bytes; /* of the n_own pages */
    int32_t n_cached, n_free;    /* the pool only: pages that no sequence holds, but the index does; and the rest */
    int32_t n_seqs;              /* the pool only: open sequences */
} dsa_pages_usage;
/* Bytes for the books (about 40 + 4 page_size a page), and the books in the caller's memory, any alignment. ERR_NULL, ERR_SHAPE (counts,
   planes that differ in pages), ERR_ARGUMENT (a plane with a block table), ERR_OVERFLOW, ERR_CAPACITY, and those of dsa_cache_check. */
DSA_API dsa_status dsa_pages_bytes(const dsa_ctx *ctx, const dsa_pages_desc *desc, size_t *bytes);
DSA_API dsa_status dsa_pages_init(const dsa_ctx *ctx, const dsa_pages_desc *desc, void *memory, size_t bytes, dsa_pages **pages);
/* The same in memory from the config's allocator, one block. ERR_MEMORY, ERR_UNSUPPORTED. */
DSA_API dsa_status dsa_pages_create(const dsa_ctx *ctx, const dsa_pages_desc *desc, dsa_pages **pages);
DSA_API void       dsa_pages_destroy(dsa_pages *pages);    /* NULL is fine */
/* All calls below: ERR_NULL; ERR_ARGUMENT if seq is not open. No call allocates. The caller locks: one call at a time. */
/* Opens a sequence that holds the longest prefix of tokens [n_tokens] in the pool: n_cached rows that need no prefill. Give n_tokens - 1
   if the last token's output is wanted. n_tokens 0: an empty one. ERR_CAPACITY: max_seqs are open; ERR_SHAPE: n_tokens < 0. */
DSA_API dsa_status dsa_pages_open(const dsa_ctx *ctx, dsa_pages *pages, const int32_t *tokens, int64_t n_tokens,
                                  int32_t *seq, int64_t *n_cached);
/* Another sequence with the first n_rows rows of seq, whatever n_rows in [0, len]. No row is copied. ERR_ARGUMENT, ERR_CAPACITY. */
DSA_API dsa_status dsa_pages_fork(const dsa_ctx *ctx, dsa_pages *pages, int32_t seq, int64_t n_rows, int32_t *forked);
/* Makes rows [len, len + n_rows) writable for seq alone: takes pages, evicts cached ones (least recently used first), copies a last
   page that others need. All or nothing: ERR_CAPACITY if max_len is exceeded or the pages do not suffice. */
DSA_API dsa_status dsa_pages_reserve(const dsa_ctx *ctx, dsa_pages *pages, int32_t seq, int64_t n_rows);
/* The next n_rows reserved rows are written in every plane; they are those of tokens [n_rows], whose full pages others find from now on.
   tokens NULL: not to be found, nor what follows. ERR_ARGUMENT: more rows than are reserved. */
DSA_API dsa_status dsa_pages_commit(const dsa_ctx *ctx, dsa_pages *pages, int32_t seq, const int32_t *tokens, int64_t n_rows);
/* Keeps rows [0, n_rows) and no reserved ones. ERR_ARGUMENT if n_rows lies outside [0, len]. */
DSA_API dsa_status dsa_pages_truncate(const dsa_ctx *ctx, dsa_pages *pages, int32_t seq, int64_t n_rows);
/* Ends the sequence. Its rows with known tokens stay in the index, the last page too, until their pages are needed. */
DSA_API dsa_status dsa_pages_close(const dsa_ctx *ctx, dsa_pages *pages, int32_t seq);
/* Frees up to n_pages pages that only the index holds, least recently used first. INT32_MAX: all. ERR_ARGUMENT: negative. */
DSA_API dsa_status dsa_pages_evict(const dsa_ctx *ctx, dsa_pages *pages, int32_t n_pages);
/* The sequence's rows in plane i as a cache for the other calls: len is the committed length, its capacity ends with the reserved pages.
   It is good until the next reserve, truncate or close of this sequence. ERR_ARGUMENT: no such plane. */
DSA_API dsa_status dsa_pages_view(const dsa_ctx *ctx, const dsa_pages *pages, int32_t seq, int32_t plane, dsa_cache *cache);
/* Rows of seq whose tokens are known, and tokens [begin, end) of these. ERR_ARGUMENT beyond. */
DSA_API dsa_status dsa_pages_known(const dsa_ctx *ctx, const dsa_pages *pages, int32_t seq, int64_t *n_tokens);
DSA_API dsa_status dsa_pages_tokens(const dsa_ctx *ctx, const dsa_pages *pages, int32_t seq, int64_t begin, int64_t end, int32_t *tokens);
/* seq DSA_NONE: the pool. */
DSA_API dsa_status dsa_pages_get_usage(const dsa_ctx *ctx, const dsa_pages *pages, int32_t seq, dsa_pages_usage *usage);
/* Holds every count and link against every other; ERR_DATA and the sentence in `detail` say what is wrong. For tests and debugging: it
   walks everything. */
DSA_API dsa_status dsa_pages_check(const dsa_ctx *ctx, dsa_pages *pages);

/* ---- threads ------------------------------------------------------------------------------ */
#ifndef DSA_NO_THREADS
/* A small pool: n_threads - 1 workers plus the caller. config.parallel_for = dsa_pool_run, parallel_user = the pool,
   n_threads = the pool's. One call at a time may run on a pool, and none from inside a task. n_threads in [1, 4096], else
   ERR_ARGUMENT; ERR_NULL (pool, or half an allocator), ERR_MEMORY, ERR_THREAD, ERR_UNSUPPORTED (DSA_NO_MALLOC, no allocator). */
typedef struct dsa_pool dsa_pool;
DSA_API dsa_status dsa_pool_create(const dsa_allocator *allocator, int32_t n_threads, dsa_pool **pool);   /* allocator NULL: malloc */
DSA_API void       dsa_pool_destroy(dsa_pool *pool);                                                     /* NULL is fine */
DSA_API void       dsa_pool_run(void *pool, int32_t n_tasks, dsa_task task, void *arg);                  /* a dsa_parallel_for */
#endif

/* ---- CUDA --------------------------------------------------------------------------------- */
/* How calls reach a device: dsa_cuda.cu fills this in, nobody else touches it. The arguments have been checked and their defaults
   resolved. run = 0 only asks whether a row fits in the device's scratch (ERR_WORKSPACE). */
struct dsa_cuda {
    dsa_allocator allocator;     /* of device memory */
    dsa_status (*append)(const dsa_ctx *ctx, const dsa_cache *cache, int64_t n, const float *x, const int64_t *slots);
    dsa_status (*read)(const dsa_ctx *ctx, const dsa_cache *cache, int64_t begin, int64_t end, float *out);
    dsa_status (*score)(const dsa_ctx *ctx, const dsa_score_args *args, const dsa_selection *out, int64_t n_rows,
                        float *scores, int64_t n_cols, int64_t stride, int run);
    dsa_status (*attend)(const dsa_ctx *ctx, const dsa_attend_args *args, const dsa_attend_state *state, int exact, int fused, int causal,
                         const float *sinks, float *lse, float *max_logit, int run);
};

#ifdef DSA_CUDA                  /* what follows is in dsa_cuda.cu: make cuda */
typedef enum dsa_cuda_path {
    DSA_CUDA_AUTO = 0,           /* the best that the device has */
    DSA_CUDA_REFERENCE,          /* no tensor cores: bit for bit the CPU's scalar path (lse but for the last bit of its logarithm) */
    DSA_CUDA_PORTABLE,           /* tensor cores of compute capability 8.0 */
    DSA_CUDA_HOPPER              /* 9.0 */
} dsa_cuda_path;

typedef struct dsa_cuda_desc {
    int32_t device;              /* CUDA's number of the device                       0 = the first */
    dsa_cuda_path path;
    size_t scratch;              /* device memory for the operands of host-level calls 0 = 256 MiB */
    dsa_allocator allocator;     /* of the little that lies on the host; zero = malloc */
} dsa_cuda_desc;

/* A device for config.cuda, with its stream and its scratch: every call on caches that live there copies its operands to the scratch and
   its results back, in tiles of rows, and returns when they are there. One such call at a time may run on a dsa_cuda; it must outlive its
   caches. desc NULL: all defaults. ERR_NO_DEVICE: no such device, no driver, compute capability below 8.0, or a path it does not have. */
extern dsa_status    dsa_cuda_create(const dsa_cuda_desc *desc, dsa_cuda **cuda);
extern void          dsa_cuda_destroy(dsa_cuda *cuda);                /* NULL is fine */
extern dsa_cuda_path dsa_cuda_query_path(const dsa_cuda *cuda);       /* the path that AUTO became */

/* Device level, for engines that live on the GPU: all pointers in the structs below are device pointers (but to caches), the work goes to
   `stream` (a cudaStream_t of config.cuda's device, which is current; NULL = the default stream), nothing is allocated and nothing waits:
   the calls may be captured in a CUDA graph. What lies in device memory is not checked; entries outside their range are skipped.
   ERR_DEVICE: a launch was refused. Workspace: device memory of any alignment, one call at a time; what the size query says for the most
   rows serves fewer rows as well. Arrays want the alignment of their elements; where pools, strides, q and out lie on 16 bytes the fast
   kernels may run, so ask for sizes with pointers of the call's alignment (NULL counts as such).

   A cache says where the pool lies and what is in it: kind to page_size, n_pages, data, scales, strides (dsa_cache_view with device CUDA
   fills it in). Its len is not read, and block_table, set by hand afterwards, is a device pointer here: [n_seqs, n_blocks], or NULL: block
   b of every sequence is page b. */
typedef struct dsa_cuda_batch {
    int32_t n_seqs;
    int64_t n_rows;              /* query rows of all sequences */
    int64_t max_len;             /* no len exceeds it (those that do are cut): it sizes grids and workspace */
    const int32_t *lens;         /* [n_seqs] rows that a sequence sees, those of its queries included */
    const int32_t *first_row;    /* optional [n_seqs + 1], ascending from 0: sequence b has the query rows [first_row[b], first_row[b + 1]);
                                    NULL: n_rows / n_seqs each */
} dsa_cuda_batch;

typedef struct dsa_cuda_append_args {
    dsa_cuda_batch batch;        /* query row i of a sequence's n goes to position len - n + i */
    const dsa_cache *latent;     /* optional */
    const dsa_cache *index;      /* optional */
    const void *latent_rows;     /* [n_rows, R + r] */
    const void *index_rows;      /* [n_rows, D] before Hadamard */
    dsa_type type;               /* of both: F32, BF16 */
    const int64_t *slots;        /* optional [n_rows]: these physical slots instead; what lies outside the pool is skipped */
} dsa_cuda_append_args;
extern dsa_status dsa_cuda_append(const dsa_ctx *ctx, const dsa_cuda_append_args *args, void *stream);

typedef struct dsa_cuda_score_args {
    dsa_cuda_batch batch;
    const dsa_cache *index;
    const void *q;               /* [n_rows, HI, D] */
    dsa_type q_type;             /* F32, BF16: after RoPE, before Hadamard and rounding. FP8 (over FP8 keys): rotated and rounded, the scale
                                    of each head already in w */
    const float *w;              /* [n_rows, HI] */
    const int32_t *ks, *ke;      /* optional [n_rows] as in dsa_score_args */
    int32_t n_index_heads;       /* 0 = the config's */
    void *workspace;
    size_t workspace_size;
} dsa_cuda_score_args;
/* scores and the arrays of *out as in dsa_score and dsa_score_select, on the device. The workspace does not hold all scores. */
extern dsa_status dsa_cuda_score_workspace(const dsa_ctx *ctx, const dsa_cuda_score_args *args, size_t *bytes);
extern dsa_status dsa_cuda_score(const dsa_ctx *ctx, const dsa_cuda_score_args *args, float *scores, int64_t n_cols, int64_t stride,
                                 void *stream);
extern dsa_status dsa_cuda_score_select_workspace(const dsa_ctx *ctx, const dsa_cuda_score_args *args, const dsa_selection *out,
                                                  size_t *bytes);
extern dsa_status dsa_cuda_score_select(const dsa_ctx *ctx, const dsa_cuda_score_args *args, const dsa_selection *out, void *stream);

typedef struct dsa_cuda_select_args {
    int64_t n_rows;
    const float *scores;         /* [n_rows, stride] */
    int64_t n_cols, stride;      /* floats */
    const int32_t *ks, *ke;      /* optional [n_rows] */
    void *workspace;
    size_t workspace_size;
} dsa_cuda_select_args;
extern dsa_status dsa_cuda_select_workspace(const dsa_ctx *ctx, const dsa_cuda_select_args *args, const dsa_selection *out, size_t *bytes);
extern dsa_status dsa_cuda_select(const dsa_ctx *ctx, const dsa_cuda_select_args *args, const dsa_selection *out, void *stream);

/* begin, add and finish in one. The result without sinks is a partial for dsa_cuda_merge. */
typedef struct dsa_cuda_attend_args {
    dsa_cuda_batch batch;
    const dsa_cache *latent;
    const void *q;               /* [n_rows, n_heads, R + r] */
    dsa_type q_type;             /* F32, BF16 */
    float scale;                 /* 0 = the config's */
    dsa_attend_what what;
    dsa_index_kind index_kind;
    const int32_t *indices;      /* LIST: [n_rows, index_stride] */
    int64_t n_indices, index_stride;   /* 0 = the config's top_k; 0 = n_indices */
    const int32_t *counts;       /* optional [n_rows] */
    const int32_t *ks, *ke;      /* RANGE: [n_rows] */
    int32_t n_heads, dim_v;      /* 0 = the config's n_heads, dim_latent */
    const float *sinks;          /* optional [n_heads] */
    void *out;                   /* [n_rows, n_heads, dim_v] */
    dsa_type out_type;           /* F32, BF16 */
    float *lse, *max_logit;      /* optional [n_rows, n_heads]; an empty row: +inf, -inf */
    void *workspace;
    size_t workspace_size;
} dsa_cuda_attend_args;
extern dsa_status dsa_cuda_attend_workspace(const dsa_ctx *ctx, const dsa_cuda_attend_args *args, size_t *bytes);
extern dsa_status dsa_cuda_attend(const dsa_ctx *ctx, const dsa_cuda_attend_args *args, void *stream);
/* dsa_attend_merge of outs [n_parts, n_rows, n_heads, dim_v] f32 and lses [n_parts, n_rows, n_heads]; an lse of +inf or -inf is an empty
   part. out may not be one of them. */
extern dsa_status dsa_cuda_merge(const dsa_ctx *ctx, int32_t n_parts, const float *outs, const float *lses, int64_t n_rows, int32_t n_heads,
                                 int32_t dim_v, const float *sinks, void *out, dsa_type out_type, float *lse, void *stream);

typedef struct dsa_cuda_step_args {
    dsa_cuda_batch batch;
    const dsa_cache *latent, *index;
    const void *latent_rows;     /* optional, with index_rows: rows to append first, to the last positions below lens */
    const void *index_rows;
    dsa_type type;               /* of the new rows and of q: F32, BF16 */
    const void *q;               /* [n_rows, H, R + r] */
    const void *index_q;         /* [n_rows, HI, D] */
    dsa_type index_q_type;       /* as in dsa_cuda_score_args */
    const float *index_w;        /* [n_rows, HI] */
    float scale;                 /* 0 = the config's */
    const float *sinks;          /* optional [H] */
    int32_t top_k;               /* 0 = the config's */
    void *out;                   /* [n_rows, H, R] */
    dsa_type out_type;           /* F32, BF16 */
    float *lse;                  /* optional [n_rows, H] */
    int32_t *indices;            /* optional [n_rows, k]; NULL: in the workspace */
    void *workspace;
    size_t workspace_size;
} dsa_cuda_step_args;
extern dsa_status dsa_cuda_step_workspace(const dsa_ctx *ctx, const dsa_cuda_step_args *args, size_t *bytes);
extern dsa_status dsa_cuda_step(const dsa_ctx *ctx, const dsa_cuda_step_args *args, void *stream);
#endif

#ifdef __cplusplus
}
#endif
#endif /* DSA_H_INCLUDED */

/* ============================================================================================
   implementation
   ============================================================================================
   Outside the include guard, so that a file which has already seen the declarations can still create it.
   A section calls only sections above it. */
#if defined(DSA_IMPLEMENTATION) && !defined(DSA_IMPLEMENTATION_DONE)
#define DSA_IMPLEMENTATION_DONE

/* ============================================================================================
   >>platform                                 libc, asserts, sizes, the scratch arena
   ============================================================================================ */
#include <float.h>
#include <math.h>
#include <string.h>
#ifndef DSA_NO_MALLOC
#  include <stdlib.h>
#endif
#ifndef DSA_NO_THREADS
#  include <pthread.h>
#endif
/* The vector sections. They need no compiler flags: every function in them names its own target. */
#if !defined(DSA_NO_SIMD) && defined(__GNUC__) && defined(__x86_64__)
#  define DSA__X86
#  include <cpuid.h>
#  include <immintrin.h>
#elif !defined(DSA_NO_SIMD) && defined(__GNUC__) && defined(__aarch64__) && defined(__ARM_NEON) && !defined(__ARM_BIG_ENDIAN)
#  define DSA__ARM
#  include <arm_neon.h>
#  if defined(__linux__)
#    include <sys/auxv.h>
#  endif
#endif
#ifndef DSA_ASSERT
#  define DSA_ASSERT(x) ((void)0)      /* internal invariants only; arguments are checked with or without it */
#endif

/* Tests for NaN and infinity, and rounding in the order of the text, are what the results rest on: these flags take them away. */
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ + 0)
#  error "dsa.h: compile the file with DSA_IMPLEMENTATION without -ffast-math, -Ofast and their parts"
#endif

/* "Same inputs, same bits" needs every product rounded where the text rounds it: no a*b+c contraction behind our back. Nobody here
   looks at floating-point exception flags; minding them would keep gcc from turning a ? b : c into vector code. */
#if defined(__clang__)
#  pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#  pragma GCC push_options
#  pragma GCC optimize ("fp-contract=off", "no-trapping-math")
/* gcc 12: -O2 leaves loops of unknown length scalar, -O3 unrolls the 8-lane loops before it could vectorise them (3 instead of 15
   GMAC/s in dsa__ref_dots). This mix does well whichever the caller uses. */
#  if defined(__OPTIMIZE__) && !defined(__OPTIMIZE_SIZE__)
#    pragma GCC optimize ("O2", "tree-loop-vectorize", "vect-cost-model=dynamic")
#  endif
#endif

#if defined(__GNUC__)
#  define DSA__RESTRICT __restrict__
#  define DSA__INLINE __attribute__((always_inline)) static __inline__
#else
#  define DSA__RESTRICT
#  define DSA__INLINE static
#endif

/* Loops of constant length over registers: without this gcc -O2 keeps them as loops and the registers in memory. */
#if defined(__clang__)
#  define DSA__UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#  define DSA__UNROLL _Pragma("GCC unroll 32")
#else
#  define DSA__UNROLL
#endif

#define DSA__MAX_POS INT64_C(2147483647)    /* positions are int32 in index lists */
#define DSA__LANES 8                        /* heads (or weight rows) that one kernel tile works on side by side */
#define DSA__KEYS 96                        /* most keys of one call of the scoring kernel: 24 KiB of bf16 at D = 128, within L1 */
#define DSA__ROWS 192                       /* rows per block of the online softmax; part of the same-bits promise */
#define DSA__AHEAD 8                        /* rows of the next block that the attention kernel hears of, to prefetch them */

static int32_t dsa__min32(int32_t a, int32_t b) { return a < b ? a : b; }
static int64_t dsa__min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t dsa__max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t dsa__up64(int64_t n) { return (n + 63) & ~INT64_C(63); }                         /* to a multiple of 64 */
static int64_t dsa__clamp64(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : (x > hi ? hi : x); }

DSA__INLINE uint32_t dsa__bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
DSA__INLINE float dsa__from_bits(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
static float dsa__infinity(void) { return dsa__from_bits(0x7F800000u); }
static float dsa__nan(void) { return dsa__from_bits(0x7FC00000u); }

/* *r = a * b, 0 if that does not fit. */
static int dsa__mul(size_t a, size_t b, size_t *r)
{
    if (b != 0 && a > (size_t)-1 / b) return 0;
    *r = a * b;
    return 1;
}

/* A bump allocator over the caller's workspace. The same code path first runs with base = NULL to measure (that is what the
   *_workspace calls do) and then with memory to carve, so that the two can never disagree. Each piece starts on 64 bytes. */
typedef struct dsa__arena { unsigned char *base; size_t used; int overflow; } dsa__arena;

static void *dsa__take(dsa__arena *a, int64_t n, int64_t m, size_t element)
{
    size_t bytes, at = a->used;
    if (n < 0 || m < 0 || (uint64_t)n > (size_t)-1 || (uint64_t)m > (size_t)-1 ||
        !dsa__mul((size_t)n, (size_t)m, &bytes) || !dsa__mul(bytes, element, &bytes) || bytes > (size_t)-1 - 128 - at) {
        a->overflow = 1;
        return NULL;
    }
    a->used = at + ((bytes + 63) & ~(size_t)63);
    return a->base ? a->base + at : NULL;
}

/* Bytes to ask of the caller for what was taken: 63 more, because his memory may have any alignment. */
static size_t dsa__arena_bytes(const dsa__arena *a) { return a->used ? a->used + 63 : 0; }

/* Carving went well: it took no more than what measuring had found and the call had checked. */
#define DSA__CARVED(status, arena, size) DSA_ASSERT((status) == DSA_OK && dsa__arena_bytes(&(arena)) <= (size))

static dsa__arena dsa__arena_over(void *workspace)
{
    dsa__arena a;
    a.base = (unsigned char *)workspace;
    if (a.base) a.base += (size_t)(-(uintptr_t)a.base & 63u);
    a.used = 0;
    a.overflow = 0;
    return a;
}

/* Every error leaves through here: the status, and for people a sentence in the caller's buffer. */
static dsa_status dsa__fail(const dsa_ctx *ctx, dsa_status status, const char *text)
{
    if (ctx && ctx->config.detail && ctx->config.detail_size) {
        size_t n = strlen(text);
        if (n > ctx->config.detail_size - 1) n = ctx->config.detail_size - 1;
        memcpy(ctx->config.detail, text, n);
        ctx->config.detail[n] = 0;
    }
    return status;
}

/* Runs task(arg, 0 .. n-1) through the caller's hook, or right here. */
static void dsa__parallel(const dsa_ctx *ctx, int64_t n, dsa_task task, void *arg)
{
    int32_t i, n_tasks = (int32_t)dsa__min64(n, ctx->config.n_threads);
    if (n_tasks > 1 && ctx->config.parallel_for) {
        ctx->config.parallel_for(ctx->config.parallel_user, n_tasks, task, arg);
        return;
    }
    for (i = 0; i < n_tasks; i++) task(arg, i);
}

/* ============================================================================================
   >>numeric                                  number formats and row operations
   ============================================================================================
   bf16, f16, e4m3, ue8m0, int8 (spec 3.3, 3.4) and RMSNorm, LayerNorm, Hadamard, RoPE (spec 2, 2.1, 3.2). */

DSA_API float dsa_bf16_to_f32(uint16_t x) { return dsa__from_bits((uint32_t)x << 16); }

DSA_API uint16_t dsa_f32_to_bf16(float x)
{
    uint32_t b = dsa__bits(x);
    if ((b & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)((b >> 16) | 0x40u);   /* NaN: keep it one */
    return (uint16_t)((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16);
}

DSA_API float dsa_f16_to_f32(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16, e = (x >> 10) & 31u, m = x & 0x3FFu;
    float y;
    if (e == 31) return dsa__from_bits(sign | 0x7F800000u | (m << 13));
    if (e != 0) return dsa__from_bits(sign | ((e + 112u) << 23) | (m << 13));
    y = (float)m * 5.9604644775390625e-8f;                                       /* 2^-24 */
    return sign ? -y : y;
}

DSA_API uint16_t dsa_f32_to_f16(float x)
{
    uint32_t b = dsa__bits(x), sign = (b >> 16) & 0x8000u, a = b & 0x7FFFFFFFu, shift, m, r;
    if (a > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (a >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);                     /* >= 65520 rounds to inf */
    if (a >= 0x38800000u) {                                                      /* >= 2^-14: normal */
        a += 0xFFFu + ((a >> 13) & 1u);
        return (uint16_t)(sign | ((a - 0x38000000u) >> 13));
    }
    if (a < 0x33000000u) return (uint16_t)sign;                                  /* < 2^-25 */
    shift = 126u - (a >> 23);                                                    /* 14 .. 24 */
    m = (a & 0x7FFFFFu) | 0x800000u;
    r = m >> shift;
    m &= (1u << shift) - 1u;
    if (m > (1u << (shift - 1)) || (m == (1u << (shift - 1)) && (r & 1u))) r++;
    return (uint16_t)(sign | r);
}

/* Without branches, so that loops over rows become vector code: normal numbers move their 7 bits to f32's place and change the bias,
   subnormals are multiples of 2^-9. */
DSA__INLINE float dsa__e4m3_value(uint32_t x)
{
    uint32_t sign = (x & 0x80u) << 24, m = x & 0x7Fu;
    float small = (float)(int32_t)m * 0.001953125f;
    uint32_t b = m < 8u ? dsa__bits(small) : (m << 20) + 0x3C000000u;
    return dsa__from_bits(sign | (m == 0x7Fu ? 0x7FC00000u : b));
}

DSA__INLINE uint32_t dsa__e4m3_code(float x)
{
    uint32_t b = dsa__bits(x), sign = (b >> 24) & 0x80u, a = b & 0x7FFFFFFFu, r, normal, small;
    r = a < 0x43E00000u ? a : 0x43E00000u;                                       /* 448 */
    normal = (r + 0x7FFFFu + ((r >> 20) & 1u) - 0x3C000000u) >> 20;              /* half to even at the third mantissa bit */
    small = dsa__bits(dsa__from_bits(r) + 16384.0f) - 0x46800000u;               /* 2^14 leaves steps of 2^-9: the adder rounds */
    r = r < 0x3C800000u ? small : normal;                                        /* 2^-6 */
    return sign | (a > 0x7F800000u ? 0x7Fu : r);
}

DSA_API float dsa_e4m3_to_f32(uint8_t x) { return dsa__e4m3_value(x); }
DSA_API uint8_t dsa_f32_to_e4m3(float x) { return (uint8_t)dsa__e4m3_code(x); }

DSA_API float dsa_ue8m0_to_f32(uint8_t x)
{
    if (x == 255) return dsa__nan();
    return dsa__from_bits(x == 0 ? 0x00400000u : (uint32_t)x << 23);             /* 0 is 2^-127, a subnormal f32 */
}

DSA_API float dsa_pow2_ceil(float x)
{
    uint32_t b = dsa__bits(x), p;
    if (b >= 0x00800000u) return dsa__from_bits((b + 0x7FFFFFu) & 0x7F800000u);
    for (p = 1; p < b; p <<= 1) { }                                              /* subnormal x */
    return dsa__from_bits(p);
}

DSA_API uint8_t dsa_f32_to_ue8m0_ceil(float x)
{
    uint32_t b = dsa__bits(dsa_pow2_ceil(x)) >> 23;
    if (x <= dsa__from_bits(0x00400000u)) return 0;
    return (uint8_t)(b > 254u ? 254u : (b == 0 ? 1u : b));
}

/* Largest magnitude of a row. NaN is passed over and infinity counts as the largest finite number, so a scale is always finite.
   Magnitudes of floats compare like their bits. */
DSA__INLINE float dsa__amax(const float *x, int64_t n)
{
    uint32_t most = 0;
    int64_t i;
    for (i = 0; i < n; i++) {
        uint32_t a = dsa__bits(x[i]) & 0x7FFFFFFFu;
        a = a > 0x7F800000u ? 0u : a;
        most = a > most ? a : most;
    }
    return most >= 0x7F800000u ? FLT_MAX : dsa__from_bits(most);
}

/* Scales of a row (spec 3.4, contracts), and x / s as the whole number that int8 holds; NaN counts as 0. */
DSA__INLINE float dsa__e4m3_scale(const float *x, int32_t n)
{
    float a = dsa__amax(x, n), s = (a > 1e-4f ? a : 1e-4f) * (1.0f / 448.0f);
    return dsa_pow2_ceil(s);
}

DSA__INLINE float dsa__int8_scale(const float *x, int32_t n)
{
    float a = dsa__amax(x, n), s = (a > 1e-4f ? a : 1e-4f) / 127.0f;
    return s;
}

DSA__INLINE float dsa__int8_value(float x, float s)
{
    float v = x / s;
    v = v != v ? 0.0f : v;
    v = v > 127.0f ? 127.0f : (v < -127.0f ? -127.0f : v);
    v += 12582912.0f;                /* 1.5 2^23 leaves steps of 1: the adder rounds to even, and the assignment drops x87's extra bits */
    return v - 12582912.0f;
}

DSA__INLINE int dsa__any_nan(const float *x, int32_t n)
{
    uint32_t most = 0;
    int32_t i;
    for (i = 0; i < n; i++) {
        uint32_t a = dsa__bits(x[i]) & 0x7FFFFFFFu;
        most = a > most ? a : most;
    }
    return most > 0x7F800000u;
}

DSA_API float dsa_quantize_e4m3(const float *x, int32_t n, uint8_t *y)
{
    float s = dsa__e4m3_scale(x, n);
    int32_t i;
    for (i = 0; i < n; i++) y[i] = (uint8_t)dsa__e4m3_code(x[i] / s);
    return s;
}

DSA_API float dsa_quantize_int8(const float *x, int32_t n, int8_t *y)
{
    float s = dsa__int8_scale(x, n);
    int32_t i;
    for (i = 0; i < n; i++) y[i] = (int8_t)(int32_t)dsa__int8_value(x[i], s);
    return dsa__any_nan(x, n) ? dsa__nan() : s;   /* int8 has no NaN: the scale carries it, so that such a key is never selected */
}

/* y = x / sqrt(mean(x^2) + eps) * g */
DSA_API dsa_status dsa_rms_norm(float *x, int64_t n_rows, int64_t stride, int32_t dim, const float *gain, float eps)
{
    int64_t t;
    int32_t i;
    if (n_rows > 0 && (!x || !gain)) return DSA_ERR_NULL;
    if (n_rows < 0 || dim < 1 || stride < dim) return DSA_ERR_SHAPE;
    for (t = 0; t < n_rows; t++) {
        float *r = x + t * stride, inv;
        double sum = 0.0;
        for (i = 0; i < dim; i++) sum += (double)r[i] * (double)r[i];
        inv = (float)(1.0 / sqrt(sum / dim + (double)eps));
        for (i = 0; i < dim; i++) r[i] = r[i] * inv * gain[i];
    }
    return DSA_OK;
}

/* y = (x - mean) / sqrt(var + eps) * g + b, biased variance */
DSA_API dsa_status dsa_layer_norm(float *x, int64_t n_rows, int64_t stride, int32_t dim, const float *gain, const float *bias, float eps)
{
    int64_t t;
    int32_t i;
    if (n_rows > 0 && (!x || !gain || !bias)) return DSA_ERR_NULL;
    if (n_rows < 0 || dim < 1 || stride < dim) return DSA_ERR_SHAPE;
    for (t = 0; t < n_rows; t++) {
        float *r = x + t * stride;
        double mean = 0.0, var = 0.0, inv;
        for (i = 0; i < dim; i++) mean += r[i];
        mean /= dim;
        for (i = 0; i < dim; i++) { double d = r[i] - mean; var += d * d; }
        inv = 1.0 / sqrt(var / dim + (double)eps);
        for (i = 0; i < dim; i++) r[i] = (float)((r[i] - mean) * inv) * gain[i] + bias[i];
    }
    return DSA_OK;
}

/* e^x for x <= 0, within 2 ulp; 0 below -87, NaN stays NaN. Ours, so that results do not depend on the libm at hand.
   x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial (remainder r^8/8! < 6e-9), times 2^n. */
static float dsa__exp(float x)
{
    float t = x > -87.0f ? x : -87.0f, r, y;
    int32_t n = (int32_t)(t * 1.44269504f - 0.5f);
    r = t - (float)n * 0.693359375f;                     /* ln 2 in two parts: the first has few bits, so n times it is exact */
    r = r - (float)n * -2.12194440e-4f;
    y = 1.0f / 5040.0f;
    y = y * r + 1.0f / 720.0f;
    y = y * r + 1.0f / 120.0f;
    y = y * r + 1.0f / 24.0f;
    y = y * r + 1.0f / 6.0f;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    y *= dsa__from_bits((uint32_t)(n + 127) << 23);
    y = x < -87.0f ? 0.0f : y;
    return x != x ? x : y;
}

DSA_API dsa_status dsa_norm_rows(dsa_norm norm, float *x, int64_t n_rows, int64_t stride, int32_t dim, const float *gain,
                                 const float *bias, float eps)
{
    int64_t t;
    int32_t i;
    if (norm == DSA_NORM_NONE) return DSA_OK;
    if (norm == DSA_NORM_LAYER) return dsa_layer_norm(x, n_rows, stride, dim, gain, bias, eps);
    if (norm != DSA_NORM_RMS && norm != DSA_NORM_RMS_PLUS_ONE) return DSA_ERR_ARGUMENT;
    if (norm == DSA_NORM_RMS && gain) return dsa_rms_norm(x, n_rows, stride, dim, gain, eps);
    if (n_rows > 0 && (!x || (norm == DSA_NORM_RMS_PLUS_ONE && !gain))) return DSA_ERR_NULL;
    if (n_rows < 0 || dim < 1 || stride < dim) return DSA_ERR_SHAPE;
    for (t = 0; t < n_rows; t++) {
        float *r = x + t * stride, inv;
        double sum = 0.0;
        for (i = 0; i < dim; i++) sum += (double)r[i] * (double)r[i];
        inv = (float)(1.0 / sqrt(sum / dim + (double)eps));
        for (i = 0; i < dim; i++) r[i] = r[i] * inv * (gain ? 1.0f + gain[i] : 1.0f);
    }
    return DSA_OK;
}

/* sigmoid(x) = 1 / (1 + e^-x) = e^x / (1 + e^x): of the two the one whose exponent is not positive */
DSA_API dsa_status dsa_gate(float *y, const float *g, int64_t n)
{
    int64_t i;
    if (n < 0) return DSA_ERR_SHAPE;
    if (n > 0 && (!y || !g)) return DSA_ERR_NULL;
    for (i = 0; i < n; i++) {
        float e = dsa__exp(g[i] > 0.0f ? -g[i] : g[i]);
        y[i] *= (g[i] > 0.0f ? 1.0f : e) / (1.0f + e);
    }
    return DSA_OK;
}

static void dsa__load_bf16(const unsigned char *p, int32_t n, float *x)
{
    int32_t i;
    for (i = 0; i < n; i++) {
        uint16_t b;
        memcpy(&b, p + 2 * (size_t)i, 2);
        x[i] = dsa_bf16_to_f32(b);
    }
}

/* A stored index key as f32 [dim], FP8 and INT8 unscaled. */
static void dsa__expand_key(dsa_type format, int32_t dim, const unsigned char *p, float *x)
{
    int32_t i;
    if (format == DSA_F32)       memcpy(x, p, 4 * (size_t)dim);
    else if (format == DSA_BF16) dsa__load_bf16(p, dim, x);
    else if (format == DSA_FP8)  for (i = 0; i < dim; i++) x[i] = dsa__e4m3_value(p[i]);
    else                         for (i = 0; i < dim; i++) x[i] = (float)(int8_t)p[i];
}

/* A stored latent row as f32 [R + r]. FP8: R e4m3 | ceil(R/128) f32 scales | r bf16 (spec 6.1). */
static void dsa__expand_latent(dsa_type format, int32_t R, int32_t r, const unsigned char *p, float *x)
{
    const unsigned char *scales = p + R;
    int32_t i, g;
    float s;
    if (format == DSA_F32) {
        memcpy(x, p, 4 * (size_t)(R + r));
    } else if (format == DSA_BF16) {
        dsa__load_bf16(p, R + r, x);
    } else {
        for (g = 0; g < R; g += 128) {
            memcpy(&s, scales + g / 32, 4);
            for (i = g; i < dsa__min32(R, g + 128); i++) x[i] = dsa__e4m3_value(p[i]) * s;
        }
        dsa__load_bf16(scales + (R + 127) / 128 * 4, r, x + R);
    }
}

static int dsa__is_pow2(int32_t n) { return n > 0 && (n & (n - 1)) == 0; }

/* Butterflies at strides 1, 2, 4, ..: (a, b) -> (a + b, a - b); then times dim^-0.5 (spec 3.2). The first three strides are done
   eight values at a time, where a loop would be all overhead; the others leave runs of 8 for vectors. */
DSA__INLINE void dsa__hadamard(float *x, int32_t dim)
{
    float norm = (float)(1.0 / sqrt((double)dim));
    int32_t s, i, j;
    for (i = 0; dim >= 8 && i < dim; i += 8) {
        float *y = x + i, a[8], b[8];
        for (j = 0; j < 8; j += 2) { a[j] = y[j] + y[j + 1]; a[j + 1] = y[j] - y[j + 1]; }
        for (j = 0; j < 8; j += 4) {
            b[j] = a[j] + a[j + 2]; b[j + 1] = a[j + 1] + a[j + 3];
            b[j + 2] = a[j] - a[j + 2]; b[j + 3] = a[j + 1] - a[j + 3];
        }
        for (j = 0; j < 4; j++) { y[j] = b[j] + b[j + 4]; y[j + 4] = b[j] - b[j + 4]; }
    }
    for (s = dim >= 8 ? 8 : 1; s < dim; s *= 2)
        for (i = 0; i < dim; i += 2 * s) {
            float *lo = x + i, *hi = lo + s;
            for (j = 0; j < s; j++) {
                float a = lo[j], b = hi[j];
                lo[j] = a + b;
                hi[j] = a - b;
            }
        }
    for (i = 0; i < dim; i++) x[i] *= norm;
}

DSA_API dsa_status dsa_hadamard_rows(float *x, int64_t n_rows, int64_t stride, int32_t dim)
{
    int64_t t;
    if (n_rows > 0 && !x) return DSA_ERR_NULL;
    if (n_rows < 0 || !dsa__is_pow2(dim) || stride < dim) return DSA_ERR_SHAPE;
    for (t = 0; t < n_rows; t++) dsa__hadamard(x + t * stride, dim);
    return DSA_OK;
}

/* One frequency of RoPE, with YaRN's blend between base and base / factor (spec 2.1, n = width):
   cd(r) = n ln(orig / (2 pi r)) / (2 ln theta), ramp from floor(cd(beta_fast)) to ceil(cd(beta_slow)). */
static double dsa__rope_frequency(const dsa_rope *rope, int32_t i)
{
    double n = rope->width, theta = rope->theta > 0 ? rope->theta : 10000.0;
    double base = pow(theta, -2.0 * i / n), orig, fast, slow, low, high, ramp;
    if (rope->factor <= 1.0) return base;
    orig = rope->original_context > 0 ? rope->original_context : 4096.0;
    fast = rope->beta_fast > 0 ? rope->beta_fast : 32.0;
    slow = rope->beta_slow > 0 ? rope->beta_slow : 1.0;
    low  = floor(n * log(orig / (6.283185307179586 * fast)) / (2.0 * log(theta)));
    high = ceil(n * log(orig / (6.283185307179586 * slow)) / (2.0 * log(theta)));
    if (low < 0.0) low = 0.0;
    if (high > n - 1.0) high = n - 1.0;
    if (low == high) high += 0.001;
    ramp = (i - low) / (high - low);
    ramp = ramp < 0.0 ? 0.0 : (ramp > 1.0 ? 1.0 : ramp);
    return base * (1.0 - ramp) + base / rope->factor * ramp;
}

/* Is x what it may be, or 0 for its default? False for NaN. */
static int dsa__rope_number(double x, double above) { return x == 0.0 || (x > above && x <= DBL_MAX); }

static dsa_status dsa__rope_check(const dsa_rope *rope)
{
    if (rope->width < 0 || rope->width % 2 != 0 || rope->offset < 0 ||
        (rope->layout != DSA_ROPE_INTERLEAVED && rope->layout != DSA_ROPE_HALF)) return DSA_ERR_SHAPE;
    if (!dsa__rope_number(rope->theta, 1.0) || !(dsa__rope_number(rope->factor, 1.0) || rope->factor == 1.0) ||
        !dsa__rope_number(rope->original_context, 0.0) || !dsa__rope_number(rope->beta_fast, 0.0) ||
        !dsa__rope_number(rope->beta_slow, 0.0)) return DSA_ERR_ARGUMENT;
    return DSA_OK;
}

DSA_API dsa_status dsa_rope_frequencies(const dsa_rope *rope, double *f)
{
    int32_t i;
    dsa_status st;
    if (!rope || !f) return DSA_ERR_NULL;
    st = dsa__rope_check(rope);
    if (st != DSA_OK) return st;
    for (i = 0; i < rope->width / 2; i++) f[i] = dsa__rope_frequency(rope, i);
    return DSA_OK;
}

/* (a, b) -> (a cos - b sin, a sin + b cos) with the angle pos * f_i, pairs laid out as rope->layout says (spec 2). */
DSA_API dsa_status dsa_rope_rows(float *x, int64_t n_rows, int64_t row_stride, int32_t n_heads, int64_t head_stride,
                                 int32_t dim_row, const dsa_rope *rope, const int64_t *positions, int inverse)
{
    int64_t t, h;
    int32_t i;
    dsa_status st;
    if (!rope || (n_rows > 0 && n_heads > 0 && (!x || !positions))) return DSA_ERR_NULL;
    if (n_rows < 0 || n_heads < 0 || rope->offset > (int64_t)dim_row - rope->width) return DSA_ERR_SHAPE;
    st = dsa__rope_check(rope);
    if (st != DSA_OK) return st;
    for (i = 0; i < rope->width / 2; i++) {
        double f = dsa__rope_frequency(rope, i);
        int64_t ia = rope->offset + (rope->layout == DSA_ROPE_HALF ? i : 2 * i);
        int64_t ib = rope->layout == DSA_ROPE_HALF ? ia + rope->width / 2 : ia + 1;
        for (t = 0; t < n_rows; t++) {
            float c = (float)cos((double)positions[t] * f), s = (float)sin((double)positions[t] * f);
            if (inverse) s = -s;
            for (h = 0; h < n_heads; h++) {
                float *r = x + t * row_stride + h * head_stride, a = r[ia], b = r[ib];
                r[ia] = a * c - b * s;
                r[ib] = a * s + b * c;
            }
        }
    }
    return DSA_OK;
}

/* ---- weights -------------------------------------------------------------------------------- */
static int64_t dsa__type_bytes(dsa_type type) { return type == DSA_F32 ? 4 : (type == DSA_FP8 ? 1 : 2); }
static float dsa__float_at(const unsigned char *p) { float x; memcpy(&x, p, 4); return x; }

/* Column `col` of row `row` of a weight [.., in]. */
static const unsigned char *dsa__weight_at(const dsa_tensor *w, int64_t row, int64_t in, int64_t col)
{
    return (const unsigned char *)w->data + (size_t)((row * in + col) * dsa__type_bytes(w->type));
}

/* The scale of its 128 x 128 block, those of the blocks to the right behind it, at any address; NULL: it has none. */
static const unsigned char *dsa__weight_scales(const dsa_tensor *w, int64_t row, int64_t in, int64_t col)
{
    if (w->type != DSA_FP8) return NULL;
    return (const unsigned char *)w->scale_inv + 4 * (size_t)(row / 128 * ((in + 127) / 128) + col / 128);
}

/* Columns [at, at + n) of row `row` of a weight [.., in] as f32; for any cut of the row. */
static void dsa__weight_part(const dsa_tensor *w, int64_t row, int64_t in, int64_t at, int64_t n, float *x)
{
    const unsigned char *p = dsa__weight_at(w, row, in, at);
    float s = 0.0f;
    int64_t i;
    if (w->type == DSA_F32) {
        memcpy(x, p, 4 * (size_t)n);
    } else if (w->type == DSA_BF16) {
        dsa__load_bf16(p, (int32_t)n, x);
    } else if (w->type == DSA_F16) {
        for (i = 0; i < n; i++) { uint16_t b; memcpy(&b, p + 2 * i, 2); x[i] = dsa_f16_to_f32(b); }
    } else {
        for (i = 0; i < n; i++) {
            if (i == 0 || (at + i) % 128 == 0) s = dsa__float_at(dsa__weight_scales(w, row, in, at + i));
            x[i] = dsa__e4m3_value(p[i]) * s;
        }
    }
}

static void dsa__weight_row(const dsa_tensor *w, int64_t row, int64_t in, float *x) { dsa__weight_part(w, row, in, 0, in, x); }

/* ============================================================================================
   >>ref                                      the algorithm in plain C: lesson, oracle and fallback
   ============================================================================================
   Four kernels over small f32 tiles do all the arithmetic of the library; every other section only brings rows to them and
   puts results away. A vector ISA replaces them one by one. Their loops run over DSA__LANES heads side by side (innermost, so
   that any compiler can use its vectors) while each sum still adds its terms one after the other in f32, d = 0, 1, 2, ..: the
   tile shape never changes a bit. */

/* c[j][h] = Sum_d a[j][d] bt[d][h]          n rows a (stride lda), bt [dim, DSA__LANES], c [n, DSA__LANES] */
static void dsa__ref_dots(int32_t n, int32_t dim, const float *a, int64_t lda, const float *bt, float *c)
{
    int32_t j, d, h, i;
    for (j = 0; j + 4 <= n; j += 4) {                    /* four rows share each load of bt */
        const float *a0 = a + j * lda, *a1 = a0 + lda, *a2 = a1 + lda, *a3 = a2 + lda;
        float s0[DSA__LANES] = {0}, s1[DSA__LANES] = {0}, s2[DSA__LANES] = {0}, s3[DSA__LANES] = {0};
        for (d = 0; d < dim; d++) {
            const float *b = bt + (int64_t)d * DSA__LANES;
            for (h = 0; h < DSA__LANES; h++) s0[h] += a0[d] * b[h];
            for (h = 0; h < DSA__LANES; h++) s1[h] += a1[d] * b[h];
            for (h = 0; h < DSA__LANES; h++) s2[h] += a2[d] * b[h];
            for (h = 0; h < DSA__LANES; h++) s3[h] += a3[d] * b[h];
        }
        memcpy(c + (j + 0) * DSA__LANES, s0, sizeof s0);
        memcpy(c + (j + 1) * DSA__LANES, s1, sizeof s1);
        memcpy(c + (j + 2) * DSA__LANES, s2, sizeof s2);
        memcpy(c + (j + 3) * DSA__LANES, s3, sizeof s3);
    }
    for (i = j; i < n; i++) {
        float s[DSA__LANES] = {0};
        for (d = 0; d < dim; d++)
            for (h = 0; h < DSA__LANES; h++) s[h] += a[i * lda + d] * bt[(int64_t)d * DSA__LANES + h];
        memcpy(c + i * DSA__LANES, s, sizeof s);
    }
}

/* y[d] = y[d] + Sum_j p[j] x[j][d], j one after the other      p [n] (stride ldp), x [n, dim] (stride ldx) */
static void dsa__ref_axpys(int32_t n, int32_t dim, const float *p, int64_t ldp, const float *x, int64_t ldx, float *DSA__RESTRICT y)
{
    int32_t j, d;
    for (j = 0; j + 4 <= n; j += 4) {                    /* four rows per load and store of y */
        const float *x0 = x + j * ldx, *x1 = x0 + ldx, *x2 = x1 + ldx, *x3 = x2 + ldx;
        float p0 = p[j * ldp], p1 = p[(j + 1) * ldp], p2 = p[(j + 2) * ldp], p3 = p[(j + 3) * ldp];
        for (d = 0; d < dim; d++) y[d] = (((y[d] + p0 * x0[d]) + p1 * x1[d]) + p2 * x2[d]) + p3 * x3[d];
    }
    for (; j < n; j++) {
        const float *xj = x + j * ldx;
        float pj = p[j * ldp];
        for (d = 0; d < dim; d++) y[d] += pj * xj[d];
    }
}

/* The heads of one query in the form of the key format (contracts: both sides are rounded alike): Hadamard when the keys have it;
   BF16 rounded; FP8 and INT8 quantised per head, the scale folded into w (spec 3.1). q [HI, D], w [HI] -> x [HI, D], v [HI]. The text
   is plain C; vector sections compile it again for their own target. */
DSA__INLINE void dsa__round_heads(dsa_type format, int hadamard, int32_t n_heads, int32_t D, const float *q, const float *w,
                                  float *x, float *v)
{
    int32_t h, d;
    for (h = 0; h < n_heads; h++, x += D) {
        float s = 1.0f;
        memcpy(x, q + (int64_t)h * D, sizeof(float) * (size_t)D);
        if (hadamard) dsa__hadamard(x, D);
        if (format == DSA_BF16) {
            for (d = 0; d < D; d++) x[d] = dsa_bf16_to_f32(dsa_f32_to_bf16(x[d]));
        } else if (format == DSA_FP8) {
            s = dsa__e4m3_scale(x, D);
            for (d = 0; d < D; d++) x[d] = dsa__e4m3_value(dsa__e4m3_code(x[d] / s));
        } else if (format == DSA_INT8) {
            s = dsa__any_nan(x, D) ? dsa__nan() : dsa__int8_scale(x, D);
            for (d = 0; d < D; d++) x[d] = dsa__int8_value(x[d], s);
        }
        v[h] = w[h] * s;
    }
}

static void dsa__ref_query_round(dsa_type format, int hadamard, int32_t n_heads, int32_t dim, const float *q, const float *w,
                                 float *x, float *v)
{
    dsa__round_heads(format, hadamard, n_heads, dim, q, w, x, v);
}

/* Packed heads: [ceil(H / LANES)][dim][LANES], LANES heads side by side, absent ones zero. */
static void dsa__ref_pack(int32_t n_heads, int32_t dim, const float *q, float *packed)
{
    int32_t h, d;
    for (h = 0; h < (n_heads + DSA__LANES - 1) / DSA__LANES * DSA__LANES; h++) {
        float *lane = packed + (int64_t)(h / DSA__LANES) * dim * DSA__LANES + h % DSA__LANES;
        for (d = 0; d < dim; d++) lane[(int64_t)d * DSA__LANES] = h < n_heads ? q[(int64_t)h * dim + d] : 0.0f;
    }
}

static size_t dsa__ref_pack_floats(int32_t n_heads, int32_t dim)
{
    return ((size_t)n_heads + DSA__LANES - 1) / DSA__LANES * DSA__LANES * (size_t)dim;
}

/* A prepared query of the indexer: w [HI], then the heads packed. */
static size_t dsa__ref_query_bytes(dsa_type format, int32_t n_heads, int32_t dim)
{
    (void)format;
    return sizeof(float) * ((size_t)n_heads + dsa__ref_pack_floats(n_heads, dim));
}

static void dsa__ref_query_pack(dsa_type format, int32_t n_heads, int32_t dim, const float *q, const float *w, void *packed)
{
    (void)format;
    memcpy(packed, w, sizeof(float) * (size_t)n_heads);
    dsa__ref_pack(n_heads, dim, q, (float *)packed + n_heads);
}

#define DSA__REF_KEYS 32                                 /* keys expanded at a time: 16 KiB at D = 128 */

static size_t dsa__ref_score_bytes(dsa_type format, int32_t n_heads, int32_t dim)
{
    (void)format; (void)n_heads;
    return sizeof(float) * DSA__REF_KEYS * ((size_t)dim + DSA__LANES);
}

/* The index scores of n_q queries against n <= DSA__KEYS keys, eq. (1) of the DeepSeek-V3.2-Exp paper:

       I[t][s] = scale[s] Sum_h w[t,h] ReLU(<q[t,h], k[s]>)

   The query's heads are rounded as the key format demands and its own scales folded into w. rows[s] is key s as the cache holds
   it; e4m3 and int8 values go in unscaled: their products and, up to D = 1024, int8 sums are exact in f32. scale [n] or NULL.
   f32 sums; h ascending; the key's scale last. */
static void dsa__ref_score(dsa_type format, int32_t n_heads, int32_t dim, int32_t n_q, const void *const *queries, int32_t n,
                           const unsigned char *const *rows, const float *scale, float *I, int64_t ldi, void *scratch)
{
    float *k = (float *)scratch, *dots = k + (int64_t)DSA__REF_KEYS * dim;
    int32_t at, m, t, h0, h, s;
    for (at = 0; at < n; at += m) {
        m = dsa__min32(DSA__REF_KEYS, n - at);
        for (s = 0; s < m; s++) dsa__expand_key(format, dim, rows[at + s], k + (int64_t)s * dim);
        for (t = 0; t < n_q; t++) {
            const float *w = (const float *)queries[t], *q = w + n_heads;
            float *It = I + t * ldi + at;
            for (s = 0; s < m; s++) It[s] = 0.0f;
            for (h0 = 0; h0 < n_heads; h0 += DSA__LANES) {
                int32_t lanes = dsa__min32(DSA__LANES, n_heads - h0);
                dsa__ref_dots(m, dim, k, dim, q + (int64_t)h0 * dim, dots);
                for (s = 0; s < m; s++)
                    for (h = 0; h < lanes; h++) {
                        float d = dots[s * DSA__LANES + h];
                        It[s] += w[h0 + h] * (d < 0.0f ? 0.0f : d);   /* this way round a NaN stays one and is never selected */
                    }
            }
            if (scale) for (s = 0; s < m; s++) It[s] *= scale[at + s];
        }
    }
}

#define DSA__REF_ROWS 64                                 /* rows expanded at a time; divides DSA__ROWS */

/* What an attention kernel needs to know of its operands. */
typedef struct dsa__attend_shape {
    dsa_type format;                                     /* of the cache rows */
    int32_t exact;                                       /* f32 products only: f32 rows, or DSA_PRECISION_F32 */
    int32_t n_heads, dim_latent, dim_rope, dim_v;
    float scale;
} dsa__attend_shape;

/* One step of the online softmax for n <= DSA__REF_ROWS rows and lanes <= LANES heads (absorbed MLA, spec 2 and 5):

       x_s = scale <q, kv_s>      m' = max(m, max_s x_s)      p_s = e^(x_s - m')
       sum = e^(m - m') sum + Sum_s p_s                       out = e^(m - m') out + Sum_s p_s kv_s[0 : dim_v]

   qt [dim_qk, LANES] one lane per head; kv [n, dim_qk] f32; x [DSA__REF_ROWS, LANES] scratch;
   max, sum [lanes]; out [lanes, dim_v]. */
static void dsa__ref_attend_block(int32_t n, int32_t lanes, int32_t dim_qk, int32_t dim_v, float scale,
                                  const float *qt, const float *kv, float *x, float *max, float *sum, float *out)
{
    const float none = -dsa__infinity();
    int32_t h, s, d;
    dsa__ref_dots(n, dim_qk, kv, dim_qk, qt, x);
    for (h = 0; h < lanes; h++) {
        float m = max[h], keep, add = 0.0f, *o = out + (int64_t)h * dim_v;
        for (s = 0; s < n; s++) {
            float v = x[s * DSA__LANES + h] * scale;
            x[s * DSA__LANES + h] = v;
            if (v > m) m = v;
        }
        keep = max[h] == none ? 0.0f : dsa__exp(max[h] - m);
        for (s = 0; s < n; s++) {                        /* a logit of -inf weighs nothing, even before any other */
            float v = x[s * DSA__LANES + h], p = v == none ? 0.0f : dsa__exp(v - m);
            x[s * DSA__LANES + h] = p;
            add += p;
        }
        if (keep != 1.0f) for (d = 0; d < dim_v; d++) o[d] *= keep;
        sum[h] = sum[h] * keep + add;
        max[h] = m;
        dsa__ref_axpys(n, dim_v, x + h, DSA__LANES, kv, dim_qk, o);
    }
}

static size_t dsa__ref_attend_query_bytes(const dsa__attend_shape *s)
{
    return sizeof(float) * dsa__ref_pack_floats(s->n_heads, s->dim_latent + s->dim_rope);
}

static void dsa__ref_attend_pack(const dsa__attend_shape *s, const float *q, void *packed)
{
    dsa__ref_pack(s->n_heads, s->dim_latent + s->dim_rope, q, (float *)packed);
}

static size_t dsa__ref_attend_bytes(const dsa__attend_shape *s)
{
    return sizeof(float) * DSA__REF_ROWS * ((size_t)s->dim_latent + (size_t)s->dim_rope + DSA__LANES);
}

/* The same for n <= DSA__ROWS cache rows and any number of heads: max, sum [n_heads], out [n_heads, dim_v]. */
static void dsa__ref_attend(const dsa__attend_shape *s, const void *packed, int32_t n, int32_t n_ahead, const unsigned char *const *rows,
                            float *max, float *sum, float *out, void *scratch)
{
    int32_t dim_qk = s->dim_latent + s->dim_rope, at, m, j, h;
    float *kv = (float *)scratch, *x = kv + (int64_t)DSA__REF_ROWS * dim_qk;
    (void)n_ahead;
    for (at = 0; at < n; at += m) {
        m = dsa__min32(DSA__REF_ROWS, n - at);
        for (j = 0; j < m; j++) dsa__expand_latent(s->format, s->dim_latent, s->dim_rope, rows[at + j], kv + (int64_t)j * dim_qk);
        for (h = 0; h < s->n_heads; h += DSA__LANES)
            dsa__ref_attend_block(m, dsa__min32(DSA__LANES, s->n_heads - h), dim_qk, s->dim_v, s->scale,
                                  (const float *)packed + (int64_t)h * dim_qk, kv, x, max + h, sum + h, out + (int64_t)h * s->dim_v);
    }
}

/* The projections of the layer. A call takes n <= DSA_LAYER_TILE rows of x and rows first .. first + n_out of a weight [.., in]:

       matmul      y[t][o] = Sum_i x[t][i] W[first + o][i]        o < n_out
       matmul_t    y[t][i] = Sum_o x[t][o] W[first + o][i]        i < in                                                        */
static int64_t dsa__ref_matmul_bytes(int64_t n, int64_t in, int64_t in_t)
{
    return 4 * dsa__max64((in + n) * DSA__LANES + in, in_t);
}

static void dsa__ref_matmul(int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx, const dsa_tensor *w, int64_t first,
                            float *y, int64_t ldy, void *scratch)
{
    float *row = (float *)scratch, *bt = row + in, *c = bt + in * DSA__LANES;
    int64_t o, i, j, t;
    for (o = 0; o < n_out; o += DSA__LANES) {
        int64_t lanes = dsa__min64(DSA__LANES, n_out - o);
        for (j = 0; j < DSA__LANES; j++) {
            if (j < lanes) dsa__weight_row(w, first + o + j, in, row);
            for (i = 0; i < in; i++) bt[i * DSA__LANES + j] = j < lanes ? row[i] : 0.0f;
        }
        dsa__ref_dots((int32_t)n, (int32_t)in, x, ldx, bt, c);
        for (t = 0; t < n; t++) memcpy(y + t * ldy + o, c + t * DSA__LANES, sizeof(float) * (size_t)lanes);
    }
}

static void dsa__ref_matmul_t(int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx, const dsa_tensor *w, int64_t first,
                              float *y, int64_t ldy, void *scratch)
{
    float *row = (float *)scratch;
    int64_t o, t;
    for (t = 0; t < n; t++) memset(y + t * ldy, 0, sizeof(float) * (size_t)in);
    for (o = 0; o < n_out; o++) {
        dsa__weight_row(w, first + o, in, row);
        for (t = 0; t < n; t++) dsa__ref_axpys(1, (int32_t)in, x + t * ldx + o, 1, row, 0, y + t * ldy);
    }
}

/* ---- the backward pass's own ----------------------------------------------------------------- */
/* c[i][j] = c[i][j] + Sum_k a[i][k] b[k][j], k = 0, 1, 2, ..: the one product of >>backward. a has a stride for each index, so that its
   transpose is the same call. Every c[i][j] sees the same operations wherever it lies and however depth is cut. */
static void dsa__ref_madd(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                          float *c, int64_t ldc)
{
    int64_t i, j, k;
    for (i = 0; i < m; i++)
        for (k = 0; k < depth; k++) {
            const float x = a[i * a_row + k * a_col], *DSA__RESTRICT bk = b + k * ldb;
            float *DSA__RESTRICT ci = c + i * ldc;
            for (j = 0; j < n; j++) ci[j] += x * bk[j];
        }
}

/* The softmax of n keys for `lanes` heads side by side, from its saved L = ln Sum e^x, and its derivative (spec 8.4):
       P = e^(scale x - L)        dS = scale P (dP - delta)
   x [n][ld] becomes P, dp [n][ld] (or NULL) becomes dS. L, delta [lanes]. Rounding may lift an exponent above 0, never by much. */
static void dsa__ref_weights(int32_t n, int32_t lanes, float scale, const float *L, const float *delta, float *x, float *dp, int64_t ld)
{
    int32_t j, h;
    for (j = 0; j < n; j++)
        for (h = 0; h < lanes; h++) {
            float e = x[j * ld + h] * scale - L[h], p = dsa__exp(e > 0.0f ? 0.0f : e);
            x[j * ld + h] = p;
            if (dp) dp[j * ld + h] = scale * p * (dp[j * ld + h] - delta[h]);
        }
}

/* Heads side by side: y[d][h] = x[h][d] for h < n, 0 for the others up to `lanes`. */
static void dsa__ref_turn(int32_t n, int32_t lanes, int32_t dim, const float *x, float *y)
{
    int32_t d, h;
    for (d = 0; d < dim; d++)
        for (h = 0; h < lanes; h++) y[(int64_t)d * lanes + h] = h < n ? x[(int64_t)h * dim + d] : 0.0f;
}

/* x[i] becomes e^(x[i] - max); returns their sum. -inf becomes 0. */
static float dsa__ref_exps(int64_t n, float max, float *x)
{
    float sum = 0.0f;
    int64_t i;
    for (i = 0; i < n; i++) {
        x[i] = x[i] == -dsa__infinity() ? 0.0f : dsa__exp(x[i] - max);
        sum += x[i];
    }
    return sum;
}

/* I[j] = Sum_h w[h] ReLU(d[j][h])      d [n][ld], h < lanes */
static void dsa__ref_fold(int32_t n, int32_t lanes, const float *w, const float *d, int64_t ld, float *I)
{
    int32_t j, h;
    for (j = 0; j < n; j++) {
        I[j] = 0.0f;
        for (h = 0; h < lanes; h++) I[j] += w[h] * (d[j * ld + h] < 0.0f ? 0.0f : d[j * ld + h]);
    }
}

/* Its backward, for g = dI (spec 8.3); ReLU' = 0 at 0:   dw[h] += Sum_j g[j] ReLU(d[j][h])      d[j][h] becomes g[j] w[h] ReLU'(d[j][h]) */
static void dsa__ref_unfold(int32_t n, int32_t lanes, const float *w, const float *g, float *d, int64_t ld, float *dw)
{
    int32_t j, h;
    for (j = 0; j < n; j++)
        for (h = 0; h < lanes; h++) {
            float x = d[j * ld + h];
            dw[h] += g[j] * (x > 0.0f ? x : 0.0f);
            d[j * ld + h] = x > 0.0f ? g[j] * w[h] : 0.0f;
        }
}

/* ============================================================================================
   >>kernels                                  what a vector ISA may replace
   ============================================================================================
   Every entry has a plain C version; a vector ISA overrides what it does better. `packed` and `scratch` are on 64 bytes. One
   key's score and one head's attention are computed by the same operations in the same order wherever they lie in a call, so
   that callers may cut their work as they like. */
typedef struct dsa__kernels {
    dsa_isa isa;
    /* scoring: dsa__ref_score */
    void (*query_round)(dsa_type format, int hadamard, int32_t n_heads, int32_t dim, const float *q, const float *w, float *x, float *v);
    size_t (*query_bytes)(dsa_type format, int32_t n_heads, int32_t dim);
    void (*query_pack)(dsa_type format, int32_t n_heads, int32_t dim, const float *q, const float *w, void *packed);
    size_t (*score_bytes)(dsa_type format, int32_t n_heads, int32_t dim);
    void (*score)(dsa_type format, int32_t n_heads, int32_t dim, int32_t n_q, const void *const *queries, int32_t n,
                  const unsigned char *const *rows, const float *scale, float *I, int64_t ldi, void *scratch);
    /* attention: dsa__ref_attend. Heads may be split between calls at multiples of 16. */
    size_t (*attend_query_bytes)(const dsa__attend_shape *s);
    void (*attend_pack)(const dsa__attend_shape *s, const float *q, void *packed);
    size_t (*attend_bytes)(const dsa__attend_shape *s);
    void (*attend)(const dsa__attend_shape *s, const void *packed, int32_t n, int32_t n_ahead, const unsigned char *const *rows,
                   float *max, float *sum, float *out, void *scratch);
    /* projections: dsa__ref_matmul. One output's bits depend neither on the other outputs nor on the other rows of a call. */
    int64_t (*matmul_bytes)(int64_t n, int64_t in, int64_t in_t);            /* of scratch, for matmul [.., in] and matmul_t [.., in_t] */
    void (*matmul)(int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx, const dsa_tensor *w, int64_t first,
                   float *y, int64_t ldy, void *scratch);
    void (*matmul_t)(int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx, const dsa_tensor *w, int64_t first,
                     float *y, int64_t ldy, void *scratch);
    /* the backward pass: dsa__ref_madd and what follows it. lanes are multiples of 8 */
    void (*madd)(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                 float *c, int64_t ldc);
    void (*weights)(int32_t n, int32_t lanes, float scale, const float *L, const float *delta, float *x, float *dp, int64_t ld);
    void (*turn)(int32_t n, int32_t lanes, int32_t dim, const float *x, float *y);
    float (*exps)(int64_t n, float max, float *x);
    void (*fold)(int32_t n, int32_t lanes, const float *w, const float *d, int64_t ld, float *I);
    void (*unfold)(int32_t n, int32_t lanes, const float *w, const float *g, float *d, int64_t ld, float *dw);
    /* selection: dsa__ref_filter, dsa__ref_count, dsa__ref_keep */
    int32_t (*filter)(const float *s, int32_t n, int32_t first, float above, float *out_s, int32_t *out_i);
    int64_t (*count)(const float *s, int64_t n, float least);
    int64_t (*keep)(const float *s, const int32_t *i, int64_t n, float cut, int equal, float *out_s, int32_t *out_i);
} dsa__kernels;

/* ============================================================================================
   >>topk                                     exact selection under a total order
   ============================================================================================
   Order: score descending, then lower index; -0 equals +0; NaN and -inf are not there at all (spec 4).

   A running selection holds a few thousand candidates in index order and a threshold. Three kernels touch them all: filter
   lets new scores in that exceed the threshold, count and keep shrink a full buffer to its k best and so raise it. A later
   score that only equals the threshold has a higher index than k others that are no smaller, so a strict > is exact.

   The k-th best is found by bisection, first over a few of the scores, then over all floats between two of them, mapped to
   unsigned integers in the same order: at most 39 counts, whatever the values are; some 14 when they are distinct. */

#define DSA__PROBES 32

/* Appends to out_s, out_i the s[j] > above (false for NaN) and their indices first + j, in order; returns how many.
   May write 16 places beyond those. */
static int32_t dsa__ref_filter(const float *s, int32_t n, int32_t first, float above, float *out_s, int32_t *out_i)
{
    int32_t j, m = 0;
    for (j = 0; j < n; j++) {                /* no branch: it would be mispredicted at every other candidate */
        out_s[m] = s[j];
        out_i[m] = first + j;
        m += s[j] > above;
    }
    return m;
}

/* How many s[j] >= least. */
static int64_t dsa__ref_count(const float *s, int64_t n, float least)
{
    int64_t at, m = 0;
    for (at = 0; at < n; at += 4096) {       /* an int32 sum uses a vector's lanes better */
        int32_t j, part = 0, end = (int32_t)dsa__min64(4096, n - at);
        for (j = 0; j < end; j++) part += s[at + j] >= least;
        m += part;
    }
    return m;
}

/* Moves the pairs with s[j] > cut (equal != 0: >= cut) to out, in order; returns how many. out may be the input itself:
   place j is written only after pair j has been read, and nothing from place n on. */
static int64_t dsa__ref_keep(const float *s, const int32_t *i, int64_t n, float cut, int equal, float *out_s, int32_t *out_i)
{
    int64_t j, m = 0;
    for (j = 0; j < n; j++) {
        float v = s[j];
        out_s[m] = v;
        out_i[m] = i[j];
        m += equal ? v >= cut : v > cut;
    }
    return m;
}

static int dsa__selectable(float s) { return s > -dsa__infinity(); }      /* false for NaN */

/* Monotone map of all that is no NaN: a < b iff key(a) < key(b). And back. */
static uint32_t dsa__sort_key(float s)
{
    uint32_t b = dsa__bits(s + 0.0f);                                     /* -0 + 0 = +0 */
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}
static float dsa__from_sort_key(uint32_t key) { return dsa__from_bits(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

/* A threshold that x itself exceeds, and little else below x. -inf stays. Below 0 no denormal: a program may have told the CPU
   to take those for 0. */
static float dsa__below(float x)
{
    if (x == 0.0f) return -FLT_MIN;
    return dsa__selectable(x) ? dsa__from_sort_key(dsa__sort_key(x) - 1) : x;
}

/* Finds a cut with k .. k + slack of the n scores >= it (then *n_equal = n), or, where ties are in the way, the value of the
   k-th best: fewer than k are > it, and the first *n_equal of those equal to it complete them. More than k must be selectable. */
static float dsa__topk_cut(const dsa__kernels *kernels, const float *s, int64_t n, int64_t k, int64_t slack, int64_t *n_equal)
{
    uint32_t lo = dsa__sort_key(-FLT_MAX), hi = dsa__sort_key(dsa__infinity()) + 1;    /* at least k are >= lo; fewer are >= hi */
    uint32_t probe[DSA__PROBES], key;
    int64_t m, above = 0, j, i;
    int32_t a = 0, b = DSA__PROBES, tie = 1, mid;
    for (j = 0; j < DSA__PROBES; j++) {      /* some of the scores, sorted: dense where they are, and often what many of them are */
        key = dsa__sort_key(s[j * n / DSA__PROBES]);
        for (i = j; i > 0 && probe[i - 1] > key; i--) probe[i] = probe[i - 1];
        probe[i] = key;
    }
    while (hi - lo > 1) {
        mid = (a + b) / 2;
        if (a < b) key = probe[mid];                     /* bisect the probes; */
        else if (tie) { key = lo + 1; tie = 0; }         /* on a plateau, such as ReLU's zeros, lo is the cut now; */
        else key = lo + (hi - lo) / 2;                   /* else bisect all floats between two probes */
        if (key <= lo) key = lo + 1;
        if (key >= hi) key = hi - 1;
        m = kernels->count(s, n, dsa__from_sort_key(key));
        if (m < k) {
            hi = key;
            above = m;
            b = mid;
        } else {
            lo = key;
            a = mid + 1;
            if (m <= k + slack) { *n_equal = n; return dsa__from_sort_key(lo); }
        }
    }
    *n_equal = k - above;
    return dsa__from_sort_key(lo);
}

/* A running selection over a stream of (score, index) that arrives in ascending index order. */
typedef struct dsa__topk {
    const dsa__kernels *kernels;
    int64_t k, n, room;          /* wanted; held; places */
    float above;                 /* enter only with a score > above */
    float *s;                    /* [room] */
    int32_t *i;                  /* [room] ascending */
} dsa__topk;

static void dsa__topk_begin(dsa__topk *t) { t->n = 0; t->above = -dsa__infinity(); }

/* Keeps the k best of those held, and up to slack more, in their order. */
static void dsa__topk_shrink(dsa__topk *t, int64_t slack)
{
    int64_t n_equal, at = t->n, m;
    float cut;
    if (t->n <= t->k + slack) return;
    cut = dsa__topk_cut(t->kernels, t->s, t->n, t->k, slack, &n_equal);
    if (n_equal < t->n)                      /* behind the last tie that stays */
        for (at = 0; n_equal > 0; at++) n_equal -= t->s[at] == cut;
    m = t->kernels->keep(t->s, t->i, at, cut, 1, t->s, t->i);
    m += t->kernels->keep(t->s + at, t->i + at, t->n - at, cut, 0, t->s + m, t->i + m);
    t->n = m;
    t->above = cut;
}

static void dsa__topk_compact(dsa__topk *t) { dsa__topk_shrink(t, 0); }

/* While more is to come, the k best and up to an eighth more will do: a quarter of the counts. */
static void dsa__topk_make_room(dsa__topk *t) { dsa__topk_shrink(t, t->k / 8); }

/* Adds n <= DSA__KEYS scores of the indices first, first + 1, .. */
static void dsa__topk_push(dsa__topk *t, const float *s, int64_t n, int64_t first)
{
    if (t->n + n > t->room) dsa__topk_make_room(t);
    DSA_ASSERT(t->n + n <= t->room);
    t->n += t->kernels->filter(s, (int32_t)n, (int32_t)first, t->above, t->s + t->n, t->i + t->n);
}

/* Adds what another selection holds; its indices all lie above those held here. */
static void dsa__topk_join(dsa__topk *t, const dsa__topk *from)
{
    int64_t at, n;
    for (at = 0; at < from->n; at += n) {
        if (t->n == t->room) dsa__topk_make_room(t);
        n = dsa__min64(from->n - at, t->room - t->n);
        t->n += t->kernels->keep(from->s + at, from->i + at, n, t->above, 0, t->s + t->n, t->i + t->n);
    }
}

#define DSA__SAMPLE 256                      /* most pieces of a row in its sample, */
#define DSA__PIECE 16                        /* each so many scores: a line of memory */

/* Guesses from a sample of row s[0 .. n) a score that k of its scores, and not many more, reach; -inf: no guess.
   One piece from each of m equal parts of the row, at an offset that a multiplicative hash of the part's number picks: even
   spread for rows with a trend, no common period with rows that repeat. salt moves all offsets. The k-th best should be the
   sample's e-th, e = k m / n; its e + 4 sqrt(e)-th leaves less than 1 in 1000 random rows short of k. Scores that are high
   together tell less than independent ones: the variance grows by how many of them share a piece.
   The sample lies in the free places of the buffer. */
static float dsa__topk_guess(const dsa__topk *t, const float *s, int64_t n, uint32_t salt)
{
    float *sample = t->s + t->n, cut;
    int64_t pieces = n / DSA__PIECE, m = dsa__clamp64(pieces / 64, DSA__SAMPLE / 2, DSA__SAMPLE), rank, high, unused, j;
    double expected, together = 1.0;
    m = dsa__min64(m, (t->room - t->n) / DSA__PIECE);    /* scattered reads are dear: these cost up to a sixth of reading the row */
    for (j = 0; j < m; j++) {
        uint32_t hash = ((uint32_t)j + 1 + salt * 0x10001u) * 2654435761u;
        int64_t piece = j * pieces / m + (int64_t)((uint64_t)hash * (uint64_t)(pieces / m) >> 32);
        memcpy(sample + j * DSA__PIECE, s + piece * DSA__PIECE, DSA__PIECE * sizeof(float));
    }
    expected = (double)t->k * (double)(m * DSA__PIECE) / (double)n;
    for (;;) {
        rank = (int64_t)(expected + 4.0 * sqrt(expected * together)) + 1;
        if (t->kernels->count(sample, m * DSA__PIECE, -FLT_MAX) <= rank) return -dsa__infinity();
        cut = dsa__topk_cut(t->kernels, sample, m * DSA__PIECE, rank, rank / 16, &unused);
        if (together > 1.0) return cut;
        for (high = 0, j = 0; j < m; j++) {
            int32_t l, any = 0;
            for (l = 0; l < DSA__PIECE; l++) any |= sample[j * DSA__PIECE + l] >= cut;
            high += any;
        }
        if (rank < 2 * high) return cut;                 /* of independent scores, too, some share a piece */
        together = (double)rank / (double)high;
    }
}

/* Selects from a whole stored row s[0 .. n), index of s[0]: first.

   A guessed threshold lets the scan pass over nearly everything: about 1.5 k of 64K random scores enter, the buffer never
   fills, and one cut ends it. The guess decides only what this costs, never what is selected:
     too low    the buffer fills and shrinks to its k best, whose worst is a threshold that needs no guess. Should that happen
                in the first half of the row, a sample of the rest may raise it further.
     too high   fewer than k reach the guess: the scan starts again, the second time with another sample, the third without.
   So whatever the scores are: at most three scans and five samples. A shrink takes at most 39 counts and one keep over `room`
   entries and sets free 7/16 of them or more: over all shrinks of a scan less than 100 such steps for each score that enters,
   some 10 when they are distinct, and in vectors a step is a fraction of an instruction. No input takes more than linear time.
   Measured by tools/ladder/topk.c on a Zen 4 with AVX-512, rows of 64K, relative to a random row: 1.5 to 1.8 for inputs made to
   deceive the samples, up to 1.4 for all others. */
static void dsa__topk_row(dsa__topk *t, const float *s, int64_t n, int64_t first)
{
    const dsa__kernels *k = t->kernels;
    uint32_t attempt, guesses = 0;
    int64_t at, m;
    for (attempt = 0; ; attempt++) {
        const int guess = attempt < 2 && n > 2 * t->room;
        float least = -dsa__infinity(), other;           /* the guess: scores below it may be missing from the buffer */
        dsa__topk_begin(t);
        if (guess) least = dsa__topk_guess(t, s, n, guesses++);
        t->above = dsa__below(least);
        for (at = 0; at < n; at += m) {
            m = dsa__min64(dsa__min64(n - at, t->room - t->n), 1 << 30);
            if (m == n - at || m >= t->room / 16) {
                t->n += k->filter(s + at, (int32_t)m, (int32_t)(first + at), t->above, t->s + t->n, t->i + t->n);
                continue;
            }
            m = 0;
            dsa__topk_make_room(t);
            if (!guess || at >= n / 2 || guesses >= 5) continue;
            other = dsa__topk_guess(t, s + at, n - at, guesses++);
            if (other <= t->above) continue;
            least = other;
            t->above = dsa__below(least);
            t->n = k->keep(t->s, t->i, t->n, least, 1, t->s, t->i);
        }
        if (!dsa__selectable(least) || k->count(t->s, t->n, least) >= t->k) break;
    }
}

/* Does (s, i) come before (s2, i2) in the total order? */
static int dsa__ranks_before(float s, int32_t i, float s2, int32_t i2) { return s > s2 || (s == s2 && i < i2); }

/* Heapsort of pairs: by rank, or by ascending index. No recursion, no allocation, n log n for every input. */
static void dsa__pairs_sort(float *s, int32_t *x, int64_t n, int by_rank)
{
    int64_t start = n / 2, end = n, root, child;
    float vs;
    int32_t vx;
    while (end > 1) {
        if (start > 0) {
            start--;
            vs = s[start]; vx = x[start];
        } else {
            end--;
            vs = s[end]; vx = x[end];
            s[end] = s[0]; x[end] = x[0];
        }
        for (root = start; (child = 2 * root + 1) < end; root = child) {  /* the heap's top is the pair that goes last */
            if (child + 1 < end && (by_rank ? dsa__ranks_before(s[child], x[child], s[child + 1], x[child + 1])
                                            : x[child] < x[child + 1])) child++;
            if (by_rank ? !dsa__ranks_before(vs, vx, s[child], x[child]) : vx >= x[child]) break;
            s[root] = s[child]; x[root] = x[child];
        }
        s[root] = vs; x[root] = vx;
    }
}

/* Writes a finished selection to row `row` of the caller's arrays. */
static void dsa__topk_emit(dsa__topk *t, const dsa_selection *out, int64_t row)
{
    int64_t k = out->top_k, i;
    int32_t *x = out->indices + row * k;
    dsa__topk_compact(t);
    if (out->order == DSA_ORDER_RANK) dsa__pairs_sort(t->s, t->i, t->n, 1);
    for (i = 0; i < t->n; i++) x[i] = t->i[i];
    for (; i < k; i++) x[i] = -1;
    if (out->scores) {
        float *s = out->scores + row * k;
        for (i = 0; i < t->n; i++) s[i] = t->s[i];
        for (; i < k; i++) s[i] = -dsa__infinity();
    }
    if (out->counts) out->counts[row] = (int32_t)t->n;
}

/* Carves a running selection that keeps k. A buffer of about 2 k is full after k more: a cheap shrink, and seldom. */
static void dsa__topk_take(dsa__arena *a, const dsa__kernels *kernels, int64_t k, dsa__topk *t)
{
    t->kernels = kernels;
    t->k = k;
    t->room = 2 * dsa__max64(k, 1024) + DSA__KEYS;
    t->s = (float *)dsa__take(a, t->room + 16, 1, sizeof(float));         /* 16: filter's overrun */
    t->i = (int32_t *)dsa__take(a, t->room + 16, 1, sizeof(int32_t));
}

/* ============================================================================================
   >>matmul                                   the layer's projections: what the vector ISAs share
   ============================================================================================
   Lanes lie along the columns of W: lane l of an output's sum takes vector after vector of the columns, each in one fma, and the
   lanes are added last, in a fixed tree. Decoding needs it so, since W must be read in the order of memory; a chunk of rows does it
   the same way, in register tiles of 4 outputs x `tall` rows of x, because then an output's bits do not depend on how many rows
   share a call. It costs a chunk little: a tile of 4 x 6 does 24 fma on 10 loads, and adding the lanes is 1 to 10 % of the fma.

   One row reads W straight into its sums. More rows share an expansion of 4 outputs x 512 columns to f32, in L1 while all rows of
   x pass over it. Between passes over the columns the sums wait in L2, lanes apart.

   FP8 weights are expanded to their e4m3 values, and x is multiplied by the block's scale instead, once for 128 outputs: no work
   per weight, one rounding per term as for W. So x times a scale must be a number that f32 can hold.

   matmul_t has the columns of W as outputs: plain sums in the order of the rows, in tiles of 6 rows of x and 64 columns. */
#if defined(DSA__X86) || defined(DSA__ARM)
#define DSA__MATMUL_K 512                                /* columns in a pass; a multiple of 128 */
#define DSA__MATMUL_OUT 128                              /* outputs in a pass: rows of W that share scales */
#define DSA__MATMUL_ROWS 32                              /* rows of W in a pass of matmul_t, */
#define DSA__MATMUL_TALL 6                               /* and of x in a tile of it */

/* What is about registers. A vector is `lanes` f32s. 64 columns are 64 / lanes vectors, in an order that is the ISA's and the
   type's own: the columns are dealt out to them. */
typedef struct dsa__matmul_isa {
    int32_t lanes, tall;
    /* x [n] times its scales (f32 at any address, one per 128 columns; NULL: 1), dealt out, and zeros up to a multiple of 64.
       Vector v goes to to + v * stride. */
    void (*deal)(dsa_type type, int64_t n, const float *x, const unsigned char *scale, float *to, int64_t stride);
    /* n columns of 4 rows of W likewise: vector v of row r goes to to + r * row_stride + v * stride. */
    void (*expand)(dsa_type type, int64_t n, const unsigned char *const *rows, float *to, int64_t row_stride, int64_t stride);
    /* y[o] = <W[o], x> for n_out rows of W at w and x dealt out. */
    void (*dots)(dsa_type type, int64_t in, int64_t n_out, const unsigned char *w, const float *x, float *y);
    /* c[t][o] (+)= Sum of `steps` vectors w[s][o] x[s][t], rows t < tall, 4 outputs o. first: c starts at 0. last: the lanes are
       added, and n_out <= 4 outputs go to y [t, ldy]. */
    void (*tile)(int32_t tall, int64_t steps, const float *w, const float *x, float *c, int first, int last,
                 int64_t n_out, float *y, int64_t ldy);
    /* c[t][0..64) += Sum_o a[t][o] w[o][0..64), o < n one after the other, rows t < `tall` <= 6. */
    void (*tile_t)(int32_t tall, int64_t n, const float *a, int64_t lda, const float *w, int64_t ldw, float *c, int64_t ldc);
    /* c += x[0] W[0] + x[1] W[1] + .. for one row of x and `rows` rows of W that share their scales, each in one fma as in tile_t. */
    void (*axpys)(dsa_type type, int64_t in, int64_t rows, const unsigned char *w, const float *x, const unsigned char *scale, float *c);
    /* n columns back in their order: y [n] from what deal would make of it. */
    void (*undeal)(dsa_type type, int64_t n, const float *x, float *y);
} dsa__matmul_isa;

static int64_t dsa__matmul_bytes(int64_t n, int64_t in, int64_t in_t)
{
    int64_t one = dsa__up64(in), more = (n + 4) * DSA__MATMUL_K + n * DSA__MATMUL_OUT * 16;
    int64_t back = n * dsa__up64(in_t) + (DSA__MATMUL_ROWS + 3) * DSA__MATMUL_K + n * DSA__MATMUL_ROWS;
    return 4 * dsa__max64(back, n > 1 ? dsa__max64(one, more) : one);
}

/* 4 rows of W from column `col`; behind the last row the last again. */
static void dsa__weight_rows4(const dsa_tensor *w, int64_t row, int64_t rows, int64_t in, int64_t col, const unsigned char **p)
{
    int64_t r;
    for (r = 0; r < 4; r++) p[r] = dsa__weight_at(w, row + dsa__min64(r, rows - 1), in, col);
}

/* A line of L2 for each 64 of `bytes` bytes, `ahead` of p: that may lie behind the weight. Inline, because gcc drops calls of a
   function that does nothing but prefetch. */
DSA__INLINE void dsa__ask(const unsigned char *p, int64_t ahead, int64_t bytes)
{
    int64_t i;
    for (i = 0; i < bytes; i += 64) __builtin_prefetch((const void *)((uintptr_t)p + (uintptr_t)(ahead + i)), 0, 2);
}

/* F for one type of weights, a constant in each branch: what the type does not need leaves no trace in the code. */
#define DSA__BY_WEIGHT(F, ...)                                                                                                      \
    if (type == DSA_F32)       F(DSA_F32, __VA_ARGS__);                                                                             \
    else if (type == DSA_BF16) F(DSA_BF16, __VA_ARGS__);                                                                            \
    else if (type == DSA_F16)  F(DSA_F16, __VA_ARGS__);                                                                             \
    else                       F(DSA_FP8, __VA_ARGS__);

/* n > 1 rows of x, and rows first .. first + rows of W, which share their scales. */
static void dsa__matmul_block(const dsa__matmul_isa *isa, int64_t n, int64_t in, int64_t rows, const float *x, int64_t ldx,
                              const dsa_tensor *w, int64_t first, float *y, int64_t ldy, void *scratch)
{
    const int64_t groups = (n + isa->tall - 1) / isa->tall, size = dsa__type_bytes(w->type);
    float *xs = (float *)scratch, *panel = xs + n * DSA__MATMUL_K, *sums = panel + 4 * DSA__MATMUL_K;
    int64_t k, kn, q, g, t, t0, tall, r;
    for (k = 0; k < in; k += kn) {
        kn = dsa__min64(DSA__MATMUL_K, in - k);
        for (g = 0; g < groups; g++) {                   /* equal groups of at most `tall` rows, each with its vectors side by side */
            t0 = n * g / groups;
            tall = n * (g + 1) / groups - t0;
            for (t = 0; t < tall; t++)
                isa->deal(w->type, kn, x + (t0 + t) * ldx + k, dsa__weight_scales(w, first, in, k),
                          xs + t0 * DSA__MATMUL_K + t * isa->lanes, tall * isa->lanes);
        }
        for (q = 0; q < rows; q += 4) {
            const unsigned char *p[4], *next[4];
            int64_t ahead = q + 4 < rows ? kn : dsa__min64(DSA__MATMUL_K, in - k - kn);
            dsa__weight_rows4(w, first + q, rows - q, in, k, p);
            if (q + 4 < rows) dsa__weight_rows4(w, first + q + 4, rows - q - 4, in, k, next);
            else dsa__weight_rows4(w, first, rows, in, k + kn, next);
            isa->expand(w->type, kn, p, panel, isa->lanes, 4 * isa->lanes);
            for (g = 0; g < groups; g++) {
                t0 = n * g / groups;
                tall = n * (g + 1) / groups - t0;
                for (r = 0; r < 4; r++)                  /* W's next columns come to L2 while these are multiplied */
                    dsa__ask(next[r], ahead * size * g / groups, ahead * size / groups);
                isa->tile((int32_t)tall, dsa__up64(kn) / isa->lanes, panel, xs + t0 * DSA__MATMUL_K, sums + (q * n + 4 * t0) * isa->lanes,
                          k == 0, k + kn == in, dsa__min64(4, rows - q), y + t0 * ldy + q, ldy);
            }
        }
    }
}

static void dsa__matmul_vector(const dsa__matmul_isa *isa, int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx,
                               const dsa_tensor *w, int64_t first, float *y, int64_t ldy, void *scratch)
{
    int64_t o, rows;
    for (o = 0; o < n_out; o += rows) {
        rows = n_out - o;
        if (n > 1 || w->type == DSA_FP8) rows = dsa__min64(rows, DSA__MATMUL_OUT - (first + o) % DSA__MATMUL_OUT);
        if (n > 1) {
            dsa__matmul_block(isa, n, in, rows, x, ldx, w, first + o, y + o, ldy, scratch);
        } else {
            if (o == 0 || w->type == DSA_FP8)
                isa->deal(w->type, in, x, dsa__weight_scales(w, first + o, in, 0), (float *)scratch, isa->lanes);
            isa->dots(w->type, in, rows, dsa__weight_at(w, first + o, in, 0), (const float *)scratch, y + o);
        }
    }
}

static void dsa__matmul_t_vector(const dsa__matmul_isa *isa, int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx,
                                 const dsa_tensor *w, int64_t first, float *y, int64_t ldy, void *scratch)
{
    const int64_t wide = dsa__up64(in), groups = (n + DSA__MATMUL_TALL - 1) / DSA__MATMUL_TALL;
    float *sums = (float *)scratch, *panel = sums + n * wide, *xs = panel + (DSA__MATMUL_ROWS + 3) * DSA__MATMUL_K;
    int64_t o, rows, k, kn, b, c, g, t, t0, r;
    memset(sums, 0, sizeof(float) * (size_t)(n * wide));
    for (o = 0; o < n_out; o += rows) {
        rows = dsa__min64(dsa__min64(n_out - o, n > 1 ? DSA__MATMUL_ROWS : n_out), DSA__MATMUL_OUT - (first + o) % DSA__MATMUL_OUT);
        if (n == 1) {
            isa->axpys(w->type, in, rows, dsa__weight_at(w, first + o, in, 0), x + o, dsa__weight_scales(w, first + o, in, 0), sums);
            continue;
        }
        for (k = 0; k < in; k += kn) {
            kn = dsa__min64(DSA__MATMUL_K, in - k);
            for (r = 0; r < rows; r += 4) {
                const unsigned char *p[4];
                dsa__weight_rows4(w, first + o + r, rows - r, in, k, p);
                isa->expand(w->type, kn, p, panel + r * DSA__MATMUL_K, DSA__MATMUL_K, isa->lanes);
            }
            for (b = 0; b < kn; b += 128) {              /* columns that share a scale */
                const unsigned char *scale = dsa__weight_scales(w, first + o, in, k + b);
                const float s = scale ? dsa__float_at(scale) : 1.0f;
                for (t = 0; t < n; t++)
                    for (r = 0; r < rows; r++) xs[t * DSA__MATMUL_ROWS + r] = x[t * ldx + o + r] * s;
                for (g = 0; g < groups; g++) {
                    t0 = n * g / groups;
                    t = n * (g + 1) / groups - t0;
                    for (c = b; c < dsa__min64(b + 128, kn); c += 64)
                        isa->tile_t((int32_t)t, rows, xs + t0 * DSA__MATMUL_ROWS, DSA__MATMUL_ROWS, panel + c, DSA__MATMUL_K,
                                    sums + t0 * wide + k + c, wide);
                }
            }
        }
    }
    for (t = 0; t < n; t++) isa->undeal(w->type, in, sums + t * wide, y + t * ldy);
}
#endif

/* ============================================================================================
   >>avx2                                     AVX2, FMA, F16C: selection, and eight f32 lanes for >>f32x8
   ============================================================================================ */
#if defined(DSA__X86)
#define DSA__AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))

/* Entry m: the numbers of the bits set in m, ascending, a byte each. */
static const uint32_t dsa__set_bits[16] = {
    0, 0, 0x1, 0x0100, 0x2, 0x0200, 0x0201, 0x020100, 0x3, 0x0300, 0x0301, 0x030100, 0x0302, 0x030200, 0x030201, 0x03020100
};

/* The lanes in mask to out, in order; returns how many. Writes 8 places. */
DSA__AVX2 static inline int32_t dsa__pack_avx2(int mask, __m256 s, __m256i i, float *out_s, int32_t *out_i)
{
    const unsigned low = (unsigned)mask & 15u, high = (unsigned)mask >> 4;
    const uint64_t lanes = dsa__set_bits[low] | (uint64_t)(dsa__set_bits[high] + 0x04040404u) << (8 * _mm_popcnt_u32(low));
    const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)lanes));
    _mm256_storeu_ps(out_s, _mm256_permutevar8x32_ps(s, order));
    _mm256_storeu_si256((__m256i *)(void *)out_i, _mm256_permutevar8x32_epi32(i, order));
    return (int32_t)_mm_popcnt_u32((unsigned)mask);
}

DSA__AVX2 static int32_t dsa__filter_avx2(const float *s, int32_t n, int32_t first, float above, float *out_s, int32_t *out_i)
{
    const __m256 a = _mm256_set1_ps(above);
    const __m256i next = _mm256_set1_epi32(8);
    __m256i i0 = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    int32_t j, m = 0;
    for (j = 0; j + 32 <= n; j += 32) {      /* one branch for 32: few are mispredicted, whether candidates are rare or frequent */
        const __m256 s0 = _mm256_loadu_ps(s + j), s1 = _mm256_loadu_ps(s + j + 8),
                     s2 = _mm256_loadu_ps(s + j + 16), s3 = _mm256_loadu_ps(s + j + 24);
        const __m256 a0 = _mm256_cmp_ps(s0, a, _CMP_GT_OQ), a1 = _mm256_cmp_ps(s1, a, _CMP_GT_OQ),
                     a2 = _mm256_cmp_ps(s2, a, _CMP_GT_OQ), a3 = _mm256_cmp_ps(s3, a, _CMP_GT_OQ);
        const __m256i i1 = _mm256_add_epi32(i0, next), i2 = _mm256_add_epi32(i1, next), i3 = _mm256_add_epi32(i2, next);
        if (_mm256_movemask_ps(_mm256_or_ps(_mm256_or_ps(a0, a1), _mm256_or_ps(a2, a3))) != 0) {
            m += dsa__pack_avx2(_mm256_movemask_ps(a0), s0, i0, out_s + m, out_i + m);
            m += dsa__pack_avx2(_mm256_movemask_ps(a1), s1, i1, out_s + m, out_i + m);
            m += dsa__pack_avx2(_mm256_movemask_ps(a2), s2, i2, out_s + m, out_i + m);
            m += dsa__pack_avx2(_mm256_movemask_ps(a3), s3, i3, out_s + m, out_i + m);
        }
        i0 = _mm256_add_epi32(i3, next);
    }
    for (; j + 8 <= n; j += 8) {
        const __m256 v = _mm256_loadu_ps(s + j);
        m += dsa__pack_avx2(_mm256_movemask_ps(_mm256_cmp_ps(v, a, _CMP_GT_OQ)), v, i0, out_s + m, out_i + m);
        i0 = _mm256_add_epi32(i0, next);
    }
    return m + dsa__ref_filter(s + j, n - j, first + j, above, out_s + m, out_i + m);
}

DSA__AVX2 static int64_t dsa__count_avx2(const float *s, int64_t n, float least)
{
    const __m256 v = _mm256_set1_ps(least);
    __m256i m0 = _mm256_setzero_si256(), m1 = m0;        /* a true comparison is -1 */
    int32_t part[8], l;
    int64_t j, m = 0;
    for (j = 0; j + 16 <= n; j += 16) {
        m0 = _mm256_sub_epi32(m0, _mm256_castps_si256(_mm256_cmp_ps(_mm256_loadu_ps(s + j), v, _CMP_GE_OQ)));
        m1 = _mm256_sub_epi32(m1, _mm256_castps_si256(_mm256_cmp_ps(_mm256_loadu_ps(s + j + 8), v, _CMP_GE_OQ)));
    }
    _mm256_storeu_si256((__m256i *)(void *)part, _mm256_add_epi32(m0, m1));
    for (l = 0; l < 8; l++) m += part[l];
    return m + dsa__ref_count(s + j, n - j, least);
}

DSA__AVX2 static int64_t dsa__keep_avx2(const float *s, const int32_t *i, int64_t n, float cut, int equal, float *out_s, int32_t *out_i)
{
    const __m256 c = _mm256_set1_ps(cut);
    const int ties = equal ? 0xFF : 0;
    int64_t j, m = 0;
    for (j = 0; j + 8 <= n; j += 8) {
        __m256 v = _mm256_loadu_ps(s + j);
        int mask = _mm256_movemask_ps(_mm256_cmp_ps(v, c, _CMP_GT_OQ)) | (ties & _mm256_movemask_ps(_mm256_cmp_ps(v, c, _CMP_EQ_OQ)));
        m += dsa__pack_avx2(mask, v, _mm256_loadu_si256((const __m256i *)(const void *)(i + j)), out_s + m, out_i + m);
    }
    return m + dsa__ref_keep(s + j, i + j, n - j, cut, equal, out_s + m, out_i + m);
}

/* ---- eight lanes ---------------------------------------------------------------------------- */
#define DSA__F32X8 __attribute__((target("avx2,fma,f16c")))
#define DSA__F32X8_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))
#define DSA__TILE_ROWS 6
#define DSA__TILE_SET 0
#define DSA__TILE_ADD 1
#define DSA__TILE_FOLD 2

typedef __m256 dsa__f32x8;

DSA__F32X8_INLINE dsa__f32x8 dsa__load8(const float *x) { return _mm256_loadu_ps(x); }
DSA__F32X8_INLINE void dsa__store8(float *y, dsa__f32x8 x) { _mm256_storeu_ps(y, x); }
DSA__F32X8_INLINE dsa__f32x8 dsa__set8(float x) { return _mm256_set1_ps(x); }
DSA__F32X8_INLINE dsa__f32x8 dsa__add8(dsa__f32x8 a, dsa__f32x8 b) { return _mm256_add_ps(a, b); }
DSA__F32X8_INLINE dsa__f32x8 dsa__sub8(dsa__f32x8 a, dsa__f32x8 b) { return _mm256_sub_ps(a, b); }
DSA__F32X8_INLINE dsa__f32x8 dsa__mul8(dsa__f32x8 a, dsa__f32x8 b) { return _mm256_mul_ps(a, b); }
DSA__F32X8_INLINE dsa__f32x8 dsa__fma8(dsa__f32x8 a, dsa__f32x8 b, dsa__f32x8 c) { return _mm256_fmadd_ps(a, b, c); }
DSA__F32X8_INLINE dsa__f32x8 dsa__max8(dsa__f32x8 a, dsa__f32x8 b) { return _mm256_max_ps(a, b); }     /* a > b ? a : b */
DSA__F32X8_INLINE dsa__f32x8 dsa__and8(dsa__f32x8 a, dsa__f32x8 b) { return _mm256_and_ps(a, b); }
DSA__F32X8_INLINE dsa__f32x8 dsa__less8(dsa__f32x8 a, dsa__f32x8 b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
DSA__F32X8_INLINE dsa__f32x8 dsa__equal8(dsa__f32x8 a, dsa__f32x8 b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
DSA__F32X8_INLINE dsa__f32x8 dsa__pick8(dsa__f32x8 mask, dsa__f32x8 a, dsa__f32x8 b) { return _mm256_blendv_ps(b, a, mask); }

/* x 2^n, where n is the whole number that was added to 1.5 2^23 to give t. No overflow: x 2^n must be a normal number. */
DSA__F32X8_INLINE dsa__f32x8 dsa__scale8(dsa__f32x8 x, dsa__f32x8 t)
{
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}

/* 16 values of a cache row or a weight as f32, unscaled. */
DSA__F32X8_INLINE void dsa__widen16(dsa_type format, const unsigned char *x, dsa__f32x8 *lo, dsa__f32x8 *hi)
{
    if (format == DSA_F32) {
        *lo = _mm256_loadu_ps((const float *)(const void *)x);
        *hi = _mm256_loadu_ps((const float *)(const void *)(x + 32));
    } else if (format == DSA_BF16) {
        *lo = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)x)), 16));
        *hi = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(x + 16))), 16));
    } else if (format == DSA_F16) {
        *lo = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)x));
        *hi = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(x + 16)));
    } else if (format == DSA_INT8) {
        __m128i b = _mm_loadu_si128((const __m128i *)(const void *)x);
        *lo = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
        *hi = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)));
    } else {
        /* e4m3 seeeemmm becomes the half s0eeeemmm0000000, 2^-8 of it, subnormals included (the conversion heeds no flush-to-zero
           mode). The NaN code is all ones: only there the sum carries into the free bit and makes the half a NaN too. */
        __m256i h = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)x)), 7);
        __m256i nan = _mm256_add_epi16(_mm256_and_si256(h, _mm256_set1_epi16(0x3F80)), _mm256_set1_epi16(0x0080));
        h = _mm256_or_si256(_mm256_and_si256(h, _mm256_set1_epi16(-0x4001)), _mm256_and_si256(nan, _mm256_set1_epi16(0x4000)));
        *lo = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_set1_ps(256.0f));
        *hi = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)), _mm256_set1_ps(256.0f));
    }
}

/* Lane j of the result is the sum of x[8 j .. 8 j + 8), as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). */
DSA__F32X8_INLINE dsa__f32x8 dsa__sums8(const float *x)
{
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)),
                              _mm256_hadd_ps(_mm256_loadu_ps(x + 16), _mm256_loadu_ps(x + 24)));
    __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(_mm256_loadu_ps(x + 32), _mm256_loadu_ps(x + 40)),
                              _mm256_hadd_ps(_mm256_loadu_ps(x + 48), _mm256_loadu_ps(x + 56)));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

/* y[i][j] = x[j][i] for 8 x 8 */
DSA__F32X8_INLINE void dsa__transpose8(const float *x, int64_t ldx, float *y, int64_t ldy)
{
    int32_t i;
    for (i = 0; i < 8; i += 4, x += 4, y += 4 * ldy) {   /* four columns at a time: rows 0..3 in the lower half, 4..7 in the upper */
        __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)), _mm_loadu_ps(x + 4 * ldx), 1);
        __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + ldx)), _mm_loadu_ps(x + 5 * ldx), 1);
        __m256 c = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + 2 * ldx)), _mm_loadu_ps(x + 6 * ldx), 1);
        __m256 d = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + 3 * ldx)), _mm_loadu_ps(x + 7 * ldx), 1);
        __m256 ab = _mm256_unpacklo_ps(a, b), AB = _mm256_unpackhi_ps(a, b), cd = _mm256_unpacklo_ps(c, d), CD = _mm256_unpackhi_ps(c, d);
        _mm256_storeu_ps(y, _mm256_shuffle_ps(ab, cd, 0x44));
        _mm256_storeu_ps(y + ldy, _mm256_shuffle_ps(ab, cd, 0xEE));
        _mm256_storeu_ps(y + 2 * ldy, _mm256_shuffle_ps(AB, CD, 0x44));
        _mm256_storeu_ps(y + 3 * ldy, _mm256_shuffle_ps(AB, CD, 0xEE));
    }
}

/* The one hot loop: c[r][0..16) = Sum_d a[r][d] b[d][0..16) for rows <= 6, d = 0, 1, 2, .. one fma after the other.
   6 rows x 2 vectors: 12 sums hide the latency of two fma units, 2 loads of b and a broadcast fill the registers, and 8 loads per
   12 fma leave the load units room. Absent rows repeat the last one. Then, by `how`:
   DSA__TILE_SET  y[r][0..16) = c      DSA__TILE_ADD  y[r][0..16) + c, the sums start from y
   DSA__TILE_FOLD y[r][0..8) += w[0..8) ReLU(c[0..8)) + w[8..16) ReLU(c[8..16)), of absent heads (w[16..32) = 0, else all ones) nothing. */
DSA__F32X8_INLINE void dsa__tile8(int how, int32_t rows, int32_t depth, const float *a, int64_t lda, const float *b, int64_t ldb,
                                       float *y, int64_t ldy, const float *w)
{
    const float *a0 = a, *a1 = rows > 1 ? a0 + lda : a0, *a2 = rows > 2 ? a1 + lda : a1;
    const float *a3 = rows > 3 ? a2 + lda : a2, *a4 = rows > 4 ? a3 + lda : a3, *a5 = rows > 5 ? a4 + lda : a4;
    const int32_t tall = how == DSA__TILE_ADD ? rows : 6;
    float *y0 = y, *y1 = tall > 1 ? y0 + ldy : y0, *y2 = tall > 2 ? y1 + ldy : y1;
    float *y3 = tall > 3 ? y2 + ldy : y2, *y4 = tall > 4 ? y3 + ldy : y3, *y5 = tall > 5 ? y4 + ldy : y4;
    __m256 c0, c1, c2, c3, c4, c5, d0, d1, d2, d3, d4, d5, b0, b1, x;
    int32_t i;
    c0 = c1 = c2 = c3 = c4 = c5 = d0 = d1 = d2 = d3 = d4 = d5 = _mm256_setzero_ps();
    if (how == DSA__TILE_ADD) {
#define DSA__ROW(r) \
        x = _mm256_set1_ps(w[tall > r ? r : tall - 1]); \
        c##r = _mm256_mul_ps(x, _mm256_loadu_ps(y##r)); d##r = _mm256_mul_ps(x, _mm256_loadu_ps(y##r + 8));
        DSA__ROW(0) DSA__ROW(1) DSA__ROW(2) DSA__ROW(3) DSA__ROW(4) DSA__ROW(5)
#undef DSA__ROW
    }
    for (i = 0; i < depth; i++, b += ldb) {
        b0 = _mm256_loadu_ps(b);
        b1 = _mm256_loadu_ps(b + 8);
#define DSA__ROW(r) x = _mm256_set1_ps(a##r[i]); c##r = _mm256_fmadd_ps(x, b0, c##r); d##r = _mm256_fmadd_ps(x, b1, d##r);
        DSA__ROW(0) DSA__ROW(1) DSA__ROW(2) DSA__ROW(3) DSA__ROW(4) DSA__ROW(5)
#undef DSA__ROW
    }
    if (how == DSA__TILE_FOLD) {
        const __m256 w0 = _mm256_loadu_ps(w), w1 = _mm256_loadu_ps(w + 8), zero = _mm256_setzero_ps();
#define DSA__ROW(r) \
        x = _mm256_fmadd_ps(w0, _mm256_and_ps(_mm256_max_ps(zero, c##r), _mm256_loadu_ps(w + 16)), _mm256_loadu_ps(y##r)); \
        x = _mm256_fmadd_ps(w1, _mm256_and_ps(_mm256_max_ps(zero, d##r), _mm256_loadu_ps(w + 24)), x); \
        _mm256_storeu_ps(y##r, x);
        DSA__ROW(0) DSA__ROW(1) DSA__ROW(2) DSA__ROW(3) DSA__ROW(4) DSA__ROW(5)
#undef DSA__ROW
        return;
    }
#define DSA__ROW(r) _mm256_storeu_ps(y##r, c##r); _mm256_storeu_ps(y##r + 8, d##r);
    DSA__ROW(0) DSA__ROW(1) DSA__ROW(2) DSA__ROW(3) DSA__ROW(4) DSA__ROW(5)
#undef DSA__ROW
}

/* int8 keys stay whole numbers: int16 pairs, which vpmaddwd multiplies and adds to int32, 16 products where an fma does 8. The tile
   takes 0.67 of the f32 tile's time, and 1024 x 128 x 127 < 2^24 makes every sum an exact f32. n values, y has room for 15 more. */
#define DSA__INT8_DIMS 2                     /* dims of a key in 4 bytes */
static DSA__F32X8 void dsa__keep_int8(int32_t n, const unsigned char *x, void *out)
{
    int16_t *y = (int16_t *)out;
    unsigned char tail[16] = {0};
    int32_t i;
    for (i = 0; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(void *)(y + i), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(x + i))));
    if (i == n) return;
    memcpy(tail, x + i, (size_t)(n - i));
    _mm256_storeu_si256((__m256i *)(void *)(y + i), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)tail)));
}

/* DSA__TILE_FOLD over `pairs` pairs of dims: keys of int16, ldk times 4 bytes apart, q [pairs][16 heads][2]. No masks: an absent head's
   product is 0. The empty asm keeps gcc 12 from gathering all multiplies before the additions, for which the registers do not suffice:
   1.11 instead of 0.67. */
static DSA__F32X8 void dsa__tile_fold_int8(int32_t rows, int32_t pairs, const float *keys, int64_t ldk, const void *q, const float *w,
                                           float *y)
{
    const int64_t lda = 2 * ldk;
    const int16_t *b = (const int16_t *)q, *a0 = (const int16_t *)(const void *)keys, *a1 = rows > 1 ? a0 + lda : a0;
    const int16_t *a2 = rows > 2 ? a1 + lda : a1, *a3 = rows > 3 ? a2 + lda : a2, *a4 = rows > 4 ? a3 + lda : a3;
    const int16_t *a5 = rows > 5 ? a4 + lda : a4;
    const __m256 w0 = _mm256_loadu_ps(w), w1 = _mm256_loadu_ps(w + 8), zero = _mm256_setzero_ps();
    __m256i c0, c1, c2, c3, c4, c5, d0, d1, d2, d3, d4, d5, b0, b1, x;
    __m256 v;
    int32_t i, pair;
    c0 = c1 = c2 = c3 = c4 = c5 = d0 = d1 = d2 = d3 = d4 = d5 = _mm256_setzero_si256();
    for (i = 0; i < pairs; i++, b += 32) {
        b0 = _mm256_loadu_si256((const __m256i *)(const void *)b);
        b1 = _mm256_loadu_si256((const __m256i *)(const void *)(b + 16));
#define DSA__ROW(r) \
        memcpy(&pair, a##r + 2 * i, 4); \
        x = _mm256_set1_epi32(pair); \
        c##r = _mm256_add_epi32(c##r, _mm256_madd_epi16(x, b0)); d##r = _mm256_add_epi32(d##r, _mm256_madd_epi16(x, b1)); \
        __asm__("" : "+x"(c##r), "+x"(d##r));
        DSA__ROW(0) DSA__ROW(1) DSA__ROW(2) DSA__ROW(3) DSA__ROW(4) DSA__ROW(5)
#undef DSA__ROW
    }
#define DSA__ROW(r) \
    v = _mm256_fmadd_ps(w0, _mm256_max_ps(zero, _mm256_cvtepi32_ps(c##r)), _mm256_loadu_ps(y + 8 * r)); \
    v = _mm256_fmadd_ps(w1, _mm256_max_ps(zero, _mm256_cvtepi32_ps(d##r)), v); \
    _mm256_storeu_ps(y + 8 * r, v);
    DSA__ROW(0) DSA__ROW(1) DSA__ROW(2) DSA__ROW(3) DSA__ROW(4) DSA__ROW(5)
#undef DSA__ROW
}
#endif

/* ============================================================================================
   >>neon                                     eight f32 lanes of AArch64, for >>f32x8
   ============================================================================================
   Baseline AArch64, little endian, and the dot-product extension for int8 keys where the CPU has it. Written for 32 registers of
   128 bits and run only in an emulator so far: the tile's shape follows from the register and latency counts, it has not been timed. */
#ifdef DSA__ARM
#define DSA__F32X8
#define DSA__F32X8_INLINE static inline __attribute__((always_inline))
#define DSA__TILE_ROWS 4
#define DSA__TILE_SET 0
#define DSA__TILE_ADD 1
#define DSA__TILE_FOLD 2

typedef struct dsa__f32x8 { float32x4_t lo, hi; } dsa__f32x8;

DSA__F32X8_INLINE dsa__f32x8 dsa__pair8(float32x4_t lo, float32x4_t hi) { dsa__f32x8 x; x.lo = lo; x.hi = hi; return x; }
DSA__F32X8_INLINE dsa__f32x8 dsa__load8(const float *x) { return dsa__pair8(vld1q_f32(x), vld1q_f32(x + 4)); }
DSA__F32X8_INLINE void dsa__store8(float *y, dsa__f32x8 x) { vst1q_f32(y, x.lo); vst1q_f32(y + 4, x.hi); }
DSA__F32X8_INLINE dsa__f32x8 dsa__set8(float x) { return dsa__pair8(vdupq_n_f32(x), vdupq_n_f32(x)); }
DSA__F32X8_INLINE dsa__f32x8 dsa__add8(dsa__f32x8 a, dsa__f32x8 b) { return dsa__pair8(vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)); }
DSA__F32X8_INLINE dsa__f32x8 dsa__sub8(dsa__f32x8 a, dsa__f32x8 b) { return dsa__pair8(vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)); }
DSA__F32X8_INLINE dsa__f32x8 dsa__mul8(dsa__f32x8 a, dsa__f32x8 b) { return dsa__pair8(vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)); }
DSA__F32X8_INLINE dsa__f32x8 dsa__fma8(dsa__f32x8 a, dsa__f32x8 b, dsa__f32x8 c)
{
    return dsa__pair8(vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi));
}
DSA__F32X8_INLINE float32x4_t dsa__mask4(uint32x4_t x) { return vreinterpretq_f32_u32(x); }
DSA__F32X8_INLINE uint32x4_t dsa__bits4(float32x4_t x) { return vreinterpretq_u32_f32(x); }
DSA__F32X8_INLINE dsa__f32x8 dsa__less8(dsa__f32x8 a, dsa__f32x8 b)
{
    return dsa__pair8(dsa__mask4(vcltq_f32(a.lo, b.lo)), dsa__mask4(vcltq_f32(a.hi, b.hi)));
}
DSA__F32X8_INLINE dsa__f32x8 dsa__equal8(dsa__f32x8 a, dsa__f32x8 b)
{
    return dsa__pair8(dsa__mask4(vceqq_f32(a.lo, b.lo)), dsa__mask4(vceqq_f32(a.hi, b.hi)));
}
DSA__F32X8_INLINE dsa__f32x8 dsa__and8(dsa__f32x8 a, dsa__f32x8 b)
{
    return dsa__pair8(dsa__mask4(vandq_u32(dsa__bits4(a.lo), dsa__bits4(b.lo))), dsa__mask4(vandq_u32(dsa__bits4(a.hi), dsa__bits4(b.hi))));
}
DSA__F32X8_INLINE dsa__f32x8 dsa__pick8(dsa__f32x8 mask, dsa__f32x8 a, dsa__f32x8 b)
{
    return dsa__pair8(vbslq_f32(dsa__bits4(mask.lo), a.lo, b.lo), vbslq_f32(dsa__bits4(mask.hi), a.hi, b.hi));
}
DSA__F32X8_INLINE dsa__f32x8 dsa__max8(dsa__f32x8 a, dsa__f32x8 b) { return dsa__pick8(dsa__less8(b, a), a, b); }     /* a > b ? a : b */

/* x 2^n, where n is the whole number that was added to 1.5 2^23 to give t. No overflow: x 2^n must be a normal number. */
DSA__F32X8_INLINE dsa__f32x8 dsa__scale8(dsa__f32x8 x, dsa__f32x8 t)
{
    return dsa__pair8(dsa__mask4(vaddq_u32(dsa__bits4(x.lo), vshlq_n_u32(dsa__bits4(t.lo), 23))),
                      dsa__mask4(vaddq_u32(dsa__bits4(x.hi), vshlq_n_u32(dsa__bits4(t.hi), 23))));
}

/* Eight e4m3 as f32. seeeemmm becomes the half s0eeeemmm0000000, 2^-8 of it, subnormals included (the conversion heeds no
   flush-to-zero mode). The NaN code is all ones: only there the sum carries into the free bit and makes the half a NaN too. */
DSA__F32X8_INLINE dsa__f32x8 dsa__widen_e4m3_neon(int8x8_t x)
{
    uint16x8_t h = vreinterpretq_u16_s16(vshll_n_s8(x, 7));
    uint16x8_t nan = vandq_u16(vaddq_u16(vandq_u16(h, vdupq_n_u16(0x3F80)), vdupq_n_u16(0x0080)), vdupq_n_u16(0x4000));
    float16x8_t y = vreinterpretq_f16_u16(vorrq_u16(vandq_u16(h, vdupq_n_u16(0xBFFF)), nan));
    return dsa__pair8(vmulq_n_f32(vcvt_f32_f16(vget_low_f16(y)), 256.0f), vmulq_n_f32(vcvt_high_f32_f16(y), 256.0f));
}

/* 16 values of a cache row or a weight as f32, unscaled. */
DSA__F32X8_INLINE void dsa__widen16(dsa_type format, const unsigned char *x, dsa__f32x8 *lo, dsa__f32x8 *hi)
{
    uint8x16_t b = vld1q_u8(x);
    if (format == DSA_F32) {
        *lo = dsa__pair8(vreinterpretq_f32_u8(b), vreinterpretq_f32_u8(vld1q_u8(x + 16)));
        *hi = dsa__pair8(vreinterpretq_f32_u8(vld1q_u8(x + 32)), vreinterpretq_f32_u8(vld1q_u8(x + 48)));
    } else if (format == DSA_BF16) {
        uint16x8_t y = vreinterpretq_u16_u8(b), z = vreinterpretq_u16_u8(vld1q_u8(x + 16));
        *lo = dsa__pair8(dsa__mask4(vshll_n_u16(vget_low_u16(y), 16)), dsa__mask4(vshll_high_n_u16(y, 16)));
        *hi = dsa__pair8(dsa__mask4(vshll_n_u16(vget_low_u16(z), 16)), dsa__mask4(vshll_high_n_u16(z, 16)));
    } else if (format == DSA_F16) {
        float16x8_t y = vreinterpretq_f16_u8(b), z = vreinterpretq_f16_u8(vld1q_u8(x + 16));
        *lo = dsa__pair8(vcvt_f32_f16(vget_low_f16(y)), vcvt_high_f32_f16(y));
        *hi = dsa__pair8(vcvt_f32_f16(vget_low_f16(z)), vcvt_high_f32_f16(z));
    } else if (format == DSA_INT8) {
        int16x8_t y = vmovl_s8(vreinterpret_s8_u8(vget_low_u8(b))), z = vmovl_high_s8(vreinterpretq_s8_u8(b));
        *lo = dsa__pair8(vcvtq_f32_s32(vmovl_s16(vget_low_s16(y))), vcvtq_f32_s32(vmovl_high_s16(y)));
        *hi = dsa__pair8(vcvtq_f32_s32(vmovl_s16(vget_low_s16(z))), vcvtq_f32_s32(vmovl_high_s16(z)));
    } else {
        *lo = dsa__widen_e4m3_neon(vreinterpret_s8_u8(vget_low_u8(b)));
        *hi = dsa__widen_e4m3_neon(vreinterpret_s8_u8(vget_high_u8(b)));
    }
}

/* Lane j of the result is the sum of x[8 j .. 8 j + 8), as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). */
DSA__F32X8_INLINE float32x4_t dsa__sums4_neon(const float *x)
{
    float32x4_t a = vpaddq_f32(vld1q_f32(x), vld1q_f32(x + 4)), b = vpaddq_f32(vld1q_f32(x + 8), vld1q_f32(x + 12));
    float32x4_t c = vpaddq_f32(vld1q_f32(x + 16), vld1q_f32(x + 20)), d = vpaddq_f32(vld1q_f32(x + 24), vld1q_f32(x + 28));
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}
DSA__F32X8_INLINE dsa__f32x8 dsa__sums8(const float *x) { return dsa__pair8(dsa__sums4_neon(x), dsa__sums4_neon(x + 32)); }

/* y[i][j] = x[j][i] for 8 x 8 */
DSA__F32X8_INLINE void dsa__transpose8(const float *x, int64_t ldx, float *y, int64_t ldy)
{
    int32_t i;
    for (i = 0; i < 4; i++) {                            /* a quarter at a time */
        const float *from = x + i / 2 * 4 * ldx + i % 2 * 4;
        float *to = y + i % 2 * 4 * ldy + i / 2 * 4;
        float32x4_t a = vld1q_f32(from), b = vld1q_f32(from + ldx), c = vld1q_f32(from + 2 * ldx), d = vld1q_f32(from + 3 * ldx);
        float64x2_t ab = vreinterpretq_f64_f32(vzip1q_f32(a, b)), AB = vreinterpretq_f64_f32(vzip2q_f32(a, b));
        float64x2_t cd = vreinterpretq_f64_f32(vzip1q_f32(c, d)), CD = vreinterpretq_f64_f32(vzip2q_f32(c, d));
        vst1q_f32(to, vreinterpretq_f32_f64(vzip1q_f64(ab, cd)));
        vst1q_f32(to + ldy, vreinterpretq_f32_f64(vzip2q_f64(ab, cd)));
        vst1q_f32(to + 2 * ldy, vreinterpretq_f32_f64(vzip1q_f64(AB, CD)));
        vst1q_f32(to + 3 * ldy, vreinterpretq_f32_f64(vzip2q_f64(AB, CD)));
    }
}

/* The one hot loop: c[r][0..16) = Sum_d a[r][d] b[d][0..16) for rows <= 4, d = 0, 1, 2, .. one fma after the other.
   4 rows x 4 vectors: 16 sums hide the latency of four fma units, and with 4 values of each row and 4 vectors of b all lies in
   registers. A row's values come four to a load and are multiplied by lane: a load that repeats one value would take up a vector
   unit on most cores. Absent rows repeat the last one. Then, by `how`: as in >>avx2. */
DSA__F32X8_INLINE void dsa__tile8(int how, int32_t rows, int32_t depth, const float *a, int64_t lda, const float *b, int64_t ldb,
                            float *y, int64_t ldy, const float *w)
{
    const float *a0 = a, *a1 = rows > 1 ? a0 + lda : a0, *a2 = rows > 2 ? a1 + lda : a1, *a3 = rows > 3 ? a2 + lda : a2;
    const int32_t tall = how == DSA__TILE_ADD ? rows : 4;
    float *y0 = y, *y1 = tall > 1 ? y0 + ldy : y0, *y2 = tall > 2 ? y1 + ldy : y1, *y3 = tall > 3 ? y2 + ldy : y2;
    dsa__f32x8 c0, c1, c2, c3, d0, d1, d2, d3;
    float32x4_t x0, x1, x2, x3, b0, b1, b2, b3;
    int32_t i;
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = dsa__set8(0.0f);
    if (how == DSA__TILE_ADD) {
#define DSA__ROW(r) \
        c##r = dsa__set8(w[tall > r ? r : tall - 1]); \
        d##r = dsa__mul8(c##r, dsa__load8(y##r + 8)); c##r = dsa__mul8(c##r, dsa__load8(y##r));
        DSA__ROW(0) DSA__ROW(1) DSA__ROW(2) DSA__ROW(3)
#undef DSA__ROW
    }
#define DSA__ROW(r, lane) \
    c##r.lo = vfmaq_laneq_f32(c##r.lo, b0, x##r, lane); c##r.hi = vfmaq_laneq_f32(c##r.hi, b1, x##r, lane); \
    d##r.lo = vfmaq_laneq_f32(d##r.lo, b2, x##r, lane); d##r.hi = vfmaq_laneq_f32(d##r.hi, b3, x##r, lane);
#define DSA__STEP(lane) \
    b0 = vld1q_f32(b); b1 = vld1q_f32(b + 4); b2 = vld1q_f32(b + 8); b3 = vld1q_f32(b + 12); b += ldb; \
    DSA__ROW(0, lane) DSA__ROW(1, lane) DSA__ROW(2, lane) DSA__ROW(3, lane)
    for (i = 0; i + 4 <= depth; i += 4) {
        x0 = vld1q_f32(a0 + i); x1 = vld1q_f32(a1 + i); x2 = vld1q_f32(a2 + i); x3 = vld1q_f32(a3 + i);
        DSA__STEP(0) DSA__STEP(1) DSA__STEP(2) DSA__STEP(3)
    }
    for (; i < depth; i++) {
        x0 = vdupq_n_f32(a0[i]); x1 = vdupq_n_f32(a1[i]); x2 = vdupq_n_f32(a2[i]); x3 = vdupq_n_f32(a3[i]);
        DSA__STEP(0)
    }
#undef DSA__STEP
#undef DSA__ROW
    if (how == DSA__TILE_FOLD) {
        const dsa__f32x8 zero = dsa__set8(0.0f), w0 = dsa__load8(w), w1 = dsa__load8(w + 8);
        const dsa__f32x8 m0 = dsa__load8(w + 16), m1 = dsa__load8(w + 24);
#define DSA__ROW(r) \
        c##r = dsa__fma8(w0, dsa__and8(dsa__max8(zero, c##r), m0), dsa__load8(y##r)); \
        dsa__store8(y##r, dsa__fma8(w1, dsa__and8(dsa__max8(zero, d##r), m1), c##r));
        DSA__ROW(0) DSA__ROW(1) DSA__ROW(2) DSA__ROW(3)
#undef DSA__ROW
        return;
    }
    dsa__store8(y0, c0); dsa__store8(y0 + 8, d0);
    dsa__store8(y1, c1); dsa__store8(y1 + 8, d1);
    dsa__store8(y2, c2); dsa__store8(y2 + 8, d2);
    dsa__store8(y3, c3); dsa__store8(y3 + 8, d3);
}

/* With the dot-product extension int8 keys stay whole: sdot adds four products to each of four int32, where an fma does four in all,
   and the sums are exact. Assembler, for clang's header hides the intrinsic from a function that brings its own target. Its
   shape follows from the registers, too: 16 sums, 4 keys, 4 vectors of the query. */
#define DSA__INT8_DIMS 4                     /* dims of a key in 4 bytes */
static void dsa__keep_int8(int32_t n, const unsigned char *x, void *y)
{
    memcpy(y, x, (size_t)n);
    memset((unsigned char *)y + n, 0, (size_t)(-n & 15));
}

#if defined(__clang__)
#  define DSA__DOT __attribute__((target("dotprod")))
#else
#  define DSA__DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define DSA__SDOT(c, q, k, lane) __asm__("sdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(c) : "w"(q), "w"(k));

/* DSA__TILE_FOLD over `words` words of 4 dims, a multiple of 4: keys of int8, ldk times 4 bytes apart, q [words][16 heads][4]. No masks:
   an absent head's product is 0. */
static DSA__DOT void dsa__tile_fold_int8(int32_t rows, int32_t words, const float *keys, int64_t ldk, const void *q, const float *w,
                                         float *y)
{
    const int64_t lda = 4 * ldk;
    const int8_t *b = (const int8_t *)q, *a0 = (const int8_t *)(const void *)keys, *a1 = rows > 1 ? a0 + lda : a0;
    const int8_t *a2 = rows > 2 ? a1 + lda : a1, *a3 = rows > 3 ? a2 + lda : a2;
    const dsa__f32x8 zero = dsa__set8(0.0f), w0 = dsa__load8(w), w1 = dsa__load8(w + 8);
    int32x4_t c0[4], c1[4], c2[4], c3[4];
    int32_t i, v;
    DSA__UNROLL for (v = 0; v < 4; v++) c0[v] = c1[v] = c2[v] = c3[v] = vdupq_n_s32(0);
    for (i = 0; i < 4 * words; i += 16) {
        const int8x16_t x0 = vld1q_s8(a0 + i), x1 = vld1q_s8(a1 + i), x2 = vld1q_s8(a2 + i), x3 = vld1q_s8(a3 + i);
#define DSA__STEP(lane) \
        DSA__UNROLL for (v = 0; v < 4; v++, b += 16) { \
            const int8x16_t x = vld1q_s8(b); \
            DSA__SDOT(c0[v], x, x0, lane) DSA__SDOT(c1[v], x, x1, lane) DSA__SDOT(c2[v], x, x2, lane) DSA__SDOT(c3[v], x, x3, lane) \
        }
        DSA__STEP(0) DSA__STEP(1) DSA__STEP(2) DSA__STEP(3)
#undef DSA__STEP
    }
#define DSA__ROW(r) { \
        dsa__f32x8 d = dsa__pair8(vcvtq_f32_s32(c##r[0]), vcvtq_f32_s32(c##r[1])); \
        dsa__f32x8 e = dsa__pair8(vcvtq_f32_s32(c##r[2]), vcvtq_f32_s32(c##r[3])); \
        d = dsa__fma8(w0, dsa__max8(zero, d), dsa__load8(y + 8 * r)); \
        dsa__store8(y + 8 * r, dsa__fma8(w1, dsa__max8(zero, e), d)); }
    DSA__ROW(0) DSA__ROW(1) DSA__ROW(2) DSA__ROW(3)
#undef DSA__ROW
}
#undef DSA__SDOT
#endif

/* ============================================================================================
   >>f32x8                                    scoring and attention in f32, eight lanes at a time
   ============================================================================================
   One text for AVX2 and NEON: no build has both, and seen as eight lanes (one register, or two of NEON's) they differ only in
   the dozen operations, the widening of cache values and the one hot loop of the section above. All arithmetic is f32 fma. Rows are
   widened once per call into scratch, so every format runs the same loops; that costs 2-6 % of the products at 64 heads. */
#ifdef DSA__F32X8
#define DSA__COLS 16                                     /* heads (or dims of the output) side by side in one tile */
#ifndef DSA__WIDE_KEYS
#define DSA__WIDE_KEYS 24                                /* keys widened at a time: 12 KiB at D = 128, beside 8 KiB of heads in L1 */
#endif

static int64_t dsa__round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

/* e^x for x <= 0, within 2 ulp; 0 below -87, NaN stays NaN. As dsa__exp, but n is rounded to nearest by adding 1.5 2^23, and
   with fma the reduction loses nothing. */
DSA__F32X8_INLINE dsa__f32x8 dsa__exp8(dsa__f32x8 x)
{
    dsa__f32x8 low = dsa__set8(-87.0f), magic = dsa__set8(12582912.0f), c = dsa__max8(x, low), t, n, r, y;
    t = dsa__fma8(c, dsa__set8(1.44269504f), magic);
    n = dsa__sub8(t, magic);
    r = dsa__fma8(n, dsa__set8(-0.693145752f), c);
    r = dsa__fma8(n, dsa__set8(-1.42860677e-6f), r);
    y = dsa__fma8(dsa__set8(1.0f / 5040.0f), r, dsa__set8(1.0f / 720.0f));
    y = dsa__fma8(y, r, dsa__set8(1.0f / 120.0f));
    y = dsa__fma8(y, r, dsa__set8(1.0f / 24.0f));
    y = dsa__fma8(y, r, dsa__set8(1.0f / 6.0f));
    y = dsa__fma8(y, r, dsa__set8(0.5f));
    y = dsa__fma8(y, r, dsa__set8(1.0f));
    y = dsa__fma8(y, r, dsa__set8(1.0f));
    y = dsa__pick8(dsa__less8(x, low), dsa__set8(0.0f), dsa__scale8(y, t));
    return dsa__pick8(dsa__equal8(x, x), y, x);
}

/* n / 16 16ths of a row; `format` and `scaled` are constants in each use, so each is a loop of its own. */
DSA__F32X8_INLINE void dsa__widen_loop_f32x8(dsa_type format, int scaled, int32_t n, const unsigned char *x, float scale, float *y)
{
    const int32_t size = format == DSA_F32 ? 4 : (format == DSA_BF16 ? 2 : 1);
    const dsa__f32x8 s = dsa__set8(scale);
    dsa__f32x8 lo, hi;
    for (; n >= 16; n -= 16, x += 16 * size, y += 16) {
        dsa__widen16(format, x, &lo, &hi);
        if (scaled) { lo = dsa__mul8(lo, s); hi = dsa__mul8(hi, s); }
        dsa__store8(y, lo);
        dsa__store8(y + 8, hi);
    }
}

/* y[0 .. n) = x, times scale in FP8, in whole vectors of 16: y has room for 15 more. Never reads past x's end. */
static DSA__F32X8 void dsa__widen_f32x8(dsa_type format, int32_t n, const unsigned char *x, float scale, float *y)
{
    const int32_t size = format == DSA_F32 ? 4 : (format == DSA_BF16 ? 2 : 1), whole = n & ~15;
    unsigned char tail[64] = {0};
    if (format == DSA_F32)       dsa__widen_loop_f32x8(DSA_F32, 0, n, x, scale, y);
    else if (format == DSA_BF16) dsa__widen_loop_f32x8(DSA_BF16, 0, n, x, scale, y);
    else if (format == DSA_INT8) dsa__widen_loop_f32x8(DSA_INT8, 0, n, x, scale, y);
    else if (scale == 1.0f)      dsa__widen_loop_f32x8(DSA_FP8, 0, n, x, scale, y);
    else                         dsa__widen_loop_f32x8(DSA_FP8, 1, n, x, scale, y);
    if (whole == n) return;
    memcpy(tail, x + whole * size, (size_t)((n - whole) * size));
    dsa__widen_f32x8(format, 16, tail, scale, y + whole);
}

/* Heads packed in groups of 16: [dim][16], absent ones zero; groups start `stride` floats apart. */
static void dsa__pack_f32x8(int32_t n_heads, int32_t dim, const float *q, float *packed, int64_t stride)
{
    int32_t h, d;
    for (h = 0; h < (n_heads + DSA__COLS - 1) / DSA__COLS * DSA__COLS; h++) {
        float *lane = packed + h / DSA__COLS * stride + h % DSA__COLS;
        for (d = 0; d < dim; d++) lane[d * DSA__COLS] = h < n_heads ? q[(int64_t)h * dim + d] : 0.0f;
    }
}

/* Asks for a row that will be needed. A number, not a pointer: the guess of a row need not exist, which no prefetch minds. */
static void dsa__prefetch_f32x8(uintptr_t row, int32_t bytes)
{
    int32_t i;
    for (i = 0; i < bytes; i += 64) __builtin_prefetch((const void *)(row + (uintptr_t)i), 0, 1);
}

/* The tile's three uses, each a function of its own (see dsa__tile8). */
static DSA__F32X8 void dsa__tile_set_f32x8(int32_t rows, int32_t depth, const float *a, int64_t lda, const float *b, float *y)
{
    dsa__tile8(DSA__TILE_SET, rows, depth, a, lda, b, DSA__COLS, y, DSA__COLS, NULL);
}

static DSA__F32X8 void dsa__tile_fold_f32x8(int32_t rows, int32_t depth, const float *a, int64_t lda, const float *b, const float *w,
                                            float *y)
{
    dsa__tile8(DSA__TILE_FOLD, rows, depth, a, lda, b, DSA__COLS, y, 8, w);
}

static DSA__F32X8 void dsa__tile_add_f32x8(int32_t rows, int32_t depth, const float *a, int64_t lda, const float *b, int64_t ldb,
                                           const float *keep, float *y, int64_t ldy)
{
    dsa__tile8(DSA__TILE_ADD, rows, depth, a, lda, b, ldb, y, ldy, keep);
}

/* Vectors of 16 heads that a query takes: one per dim, or per 4 bytes of a key where int8 stays whole (`whole`, a constant in every
   use). */
static int32_t dsa__steps_f32x8(int whole, dsa_type format, int32_t dim)
{
    return whole && format == DSA_INT8 ? (int32_t)dsa__round_up(dim, 16) / DSA__INT8_DIMS : dim;
}

/* A prepared query of the indexer, per group of 16 heads: q [steps][16], w [16], and a mask [16] that is all ones for a head that is
   there. An absent head's product with a key of infinities would be NaN. */
static size_t dsa__query_bytes_any_f32x8(int whole, dsa_type format, int32_t n_heads, int32_t dim)
{
    return sizeof(float) * (size_t)dsa__round_up(n_heads, DSA__COLS) * ((size_t)dsa__steps_f32x8(whole, format, dim) + 2);
}

static void dsa__query_pack_any_f32x8(int whole, dsa_type format, int32_t n_heads, int32_t dim, const float *q, const float *w,
                                      void *packed)
{
    const int32_t steps = dsa__steps_f32x8(whole, format, dim);
    const int64_t stride = ((int64_t)steps + 2) * DSA__COLS;
    const uint32_t ones = 0xFFFFFFFFu;
    int32_t h;
    memset(packed, 0, dsa__query_bytes_any_f32x8(whole, format, n_heads, dim));
    if (whole && format == DSA_INT8) {
        const int32_t per = DSA__INT8_DIMS;
        int32_t d;
        for (h = 0; h < n_heads; h++)
            for (d = 0; d < dim; d++) {
                const int64_t at = (h / DSA__COLS * stride + d / per * DSA__COLS + h % DSA__COLS) * per + d % per;
                const int32_t x = (int32_t)q[(int64_t)h * dim + d];
                if (per == 2) ((int16_t *)packed)[at] = (int16_t)x;
                else          ((int8_t *)packed)[at] = (int8_t)x;
            }
    } else {
        dsa__pack_f32x8(n_heads, dim, q, (float *)packed, stride);
    }
    for (h = 0; h < n_heads; h++) {
        float *group = (float *)packed + h / DSA__COLS * stride, *tail = group + (int64_t)steps * DSA__COLS + h % DSA__COLS;
        tail[0] = w[h];
        memcpy(tail + DSA__COLS, &ones, 4);
    }
}

/* Scratch: keys as f32 [WIDE_KEYS][dim'], running sums [WIDE_KEYS][8]. */
static size_t dsa__score_bytes_f32x8(dsa_type format, int32_t n_heads, int32_t dim)
{
    (void)format; (void)n_heads;
    return sizeof(float) * DSA__WIDE_KEYS * (size_t)(dsa__round_up(dim, 16) + 8);
}

/* Head h of a group goes into sum h % 8 of its key, groups ascending; the eight are added as a tree at the end. The keys of the
   next round are prefetched tile by tile; after the last ones given, those that would follow in memory: most often they come next. */
DSA__F32X8_INLINE void dsa__score_any_f32x8(int whole, dsa_type format, int32_t n_heads, int32_t dim, int32_t n_q,
                                            const void *const *queries, int32_t n, const unsigned char *const *rows,
                                            const float *scales, float *I, int64_t ldi, void *scratch)
{
    const int64_t ldk = dsa__round_up(dim, 16);
    const int32_t steps = dsa__steps_f32x8(whole, format, dim);
    const uintptr_t bytes = (uintptr_t)(dim * (format == DSA_F32 ? 4 : (format == DSA_BF16 ? 2 : 1)));
    float *k = (float *)scratch, *sums = k + DSA__WIDE_KEYS * ldk, s8[8];
    int32_t at, m, t, h, j, i;
    for (at = 0; at < n; at += m) {
        int32_t next, n_tiles, due = 0;
        m = dsa__min32(DSA__WIDE_KEYS, n - at);
        next = at + m;
        n_tiles = (m + DSA__TILE_ROWS - 1) / DSA__TILE_ROWS * ((n_heads + DSA__COLS - 1) / DSA__COLS);
        for (j = 0; j < m; j++)
            if (whole && format == DSA_INT8) dsa__keep_int8(dim, rows[at + j], k + j * ldk);
            else dsa__widen_f32x8(format, dim, rows[at + j], 1.0f, k + j * ldk);
        for (t = 0; t < n_q; t++) {
            const float *q = (const float *)queries[t];
            for (j = 0; j < DSA__WIDE_KEYS; j++) dsa__store8(sums + 8 * j, dsa__set8(0.0f));
            for (h = 0; h < n_heads; h += DSA__COLS, q += (steps + 2) * DSA__COLS)
                for (j = 0; j < m; j += DSA__TILE_ROWS) {
                    for (due += t == 0 ? m : 0; due >= n_tiles; due -= n_tiles, next++)
                        dsa__prefetch_f32x8((uintptr_t)rows[dsa__min32(next, n - 1)] + (uintptr_t)dsa__max64(next - n + 1, 0) * bytes,
                                            (int32_t)bytes);
                    i = dsa__min32(DSA__TILE_ROWS, m - j);
                    if (whole && format == DSA_INT8)
                        dsa__tile_fold_int8(i, steps, k + j * ldk, ldk, q, q + steps * DSA__COLS, sums + 8 * j);
                    else
                        dsa__tile_fold_f32x8(i, dim, k + j * ldk, ldk, q, q + steps * DSA__COLS, sums + 8 * j);
                }
            for (j = 0; j < m; j += 8) {
                dsa__store8(s8, dsa__sums8(sums + 8 * j));
                for (i = 0; i < dsa__min32(8, m - j); i++) I[t * ldi + at + j + i] = scales ? s8[i] * scales[at + j + i] : s8[i];
            }
        }
    }
}

#define DSA__SCORE_ENTRIES_F32X8(SUFFIX, WHOLE)                                                                                     \
static size_t dsa__query_bytes_##SUFFIX(dsa_type format, int32_t n_heads, int32_t dim)                                              \
{                                                                                                                                   \
    return dsa__query_bytes_any_f32x8(WHOLE, format, n_heads, dim);                                                                 \
}                                                                                                                                   \
static void dsa__query_pack_##SUFFIX(dsa_type format, int32_t n_heads, int32_t dim, const float *q, const float *w, void *packed)   \
{                                                                                                                                   \
    dsa__query_pack_any_f32x8(WHOLE, format, n_heads, dim, q, w, packed);                                                           \
}                                                                                                                                   \
static DSA__F32X8 void dsa__score_##SUFFIX(dsa_type format, int32_t n_heads, int32_t dim, int32_t n_q, const void *const *queries,  \
                                           int32_t n, const unsigned char *const *rows, const float *scales, float *I, int64_t ldi, \
                                           void *scratch)                                                                           \
{                                                                                                                                   \
    dsa__score_any_f32x8(WHOLE, format, n_heads, dim, n_q, queries, n, rows, scales, I, ldi, scratch);                              \
}
#if defined(DSA__X86)
DSA__SCORE_ENTRIES_F32X8(avx2, 1)
#else
DSA__SCORE_ENTRIES_F32X8(neon, 0)
DSA__SCORE_ENTRIES_F32X8(neon_dot, 1)
#endif

static size_t dsa__attend_query_bytes_f32x8(const dsa__attend_shape *s)
{
    return sizeof(float) * (size_t)(dsa__round_up(s->n_heads, DSA__COLS) * ((int64_t)s->dim_latent + s->dim_rope));
}

static void dsa__attend_pack_f32x8(const dsa__attend_shape *s, const float *q, void *packed)
{
    int32_t dim = s->dim_latent + s->dim_rope;
    dsa__pack_f32x8(s->n_heads, dim, q, (float *)packed, (int64_t)dim * DSA__COLS);
}

/* Floats from one widened row to the next: room for the overhang of two parts, and an odd number of cache lines, so that a column of
   16 dims spreads over all sets of L1. */
static int64_t dsa__attend_stride_f32x8(const dsa__attend_shape *s)
{
    return ((dsa__round_up((int64_t)s->dim_latent + s->dim_rope + 15, 16) / 16) | 1) * 16;
}

/* Scratch: rows as f32 [F32_ROWS][stride], logits of one group [F32_ROWS][16], weights p [H'][F32_ROWS] and keep [H'] with
   H' = 16 ceil(H/16), one edge tile. */
static size_t dsa__attend_bytes_f32x8(const dsa__attend_shape *s)
{
    return sizeof(float) * (size_t)(DSA__ROWS * (dsa__attend_stride_f32x8(s) + DSA__COLS) +
                                    (DSA__ROWS + 1) * dsa__round_up(s->n_heads, DSA__COLS) + DSA__TILE_ROWS * DSA__COLS);
}

static int32_t dsa__latent_bytes_f32x8(const dsa__attend_shape *s)
{
    int32_t R = s->dim_latent, r = s->dim_rope;
    return s->format == DSA_F32 ? 4 * (R + r) : (s->format == DSA_BF16 ? 2 * (R + r) : R + (R + 127) / 128 * 4 + 2 * r);
}

/* A cache row as f32: [R + r]. */
static DSA__F32X8 void dsa__widen_latent_f32x8(const dsa__attend_shape *s, const unsigned char *row, float *y)
{
    int32_t R = s->dim_latent, d;
    const unsigned char *scales = row + R;
    float scale;
    if (s->format != DSA_FP8) {
        dsa__widen_f32x8(s->format, R + s->dim_rope, row, 1.0f, y);
        return;
    }
    for (d = 0; d < R; d += 128) {                       /* R e4m3 | ceil(R/128) f32 scales | r bf16 (spec 6.1) */
        memcpy(&scale, scales + d / 128 * 4, 4);
        dsa__widen_f32x8(DSA_FP8, dsa__min32(128, R - d), row + d, scale, y + d);
    }
    dsa__widen_f32x8(DSA_BF16, s->dim_rope, scales + (R + 127) / 128 * 4, 1.0f, y + R);
}

/* The softmax of eight heads over n logits x [n][16]: updates max and sum [8], gives what to keep of the old output [8] and the
   weights p [8][F32_ROWS]. Each head is a lane of its own; its terms are added in the order of the rows. */
static DSA__F32X8 void dsa__softmax_f32x8(int32_t n, float scale, float *x, float *max, float *sum, float *keep, float *p)
{
    const dsa__f32x8 zero = dsa__set8(0.0f), none = dsa__set8(-dsa__infinity()), f = dsa__set8(scale), old = dsa__load8(max);
    dsa__f32x8 m = old, add = zero, e;
    int32_t j;
    for (j = 0; j < n; j++) m = dsa__max8(dsa__mul8(dsa__load8(x + 16 * j), f), m);              /* a NaN logit leaves m */
    for (j = 0; j < n; j++) {                            /* -inf weighs nothing, whatever m is */
        e = dsa__mul8(dsa__load8(x + 16 * j), f);
        e = dsa__pick8(dsa__equal8(e, none), zero, dsa__exp8(dsa__sub8(e, m)));
        dsa__store8(x + 16 * j, e);
        add = dsa__add8(add, e);
    }
    for (j = 0; j < n; j += 8) dsa__transpose8(x + 16 * j, 16, p + j, DSA__ROWS);
    e = dsa__pick8(dsa__equal8(old, none), zero, dsa__exp8(dsa__sub8(old, m)));
    dsa__store8(keep, e);
    dsa__store8(sum, dsa__fma8(dsa__load8(sum), e, add));
    dsa__store8(max, m);
}

static DSA__F32X8 void dsa__attend_f32x8(const dsa__attend_shape *s, const void *packed, int32_t n, int32_t n_ahead,
                                         const unsigned char *const *rows, float *max, float *sum, float *out, void *scratch)
{
    const int64_t ldv = dsa__attend_stride_f32x8(s), dim_v = s->dim_v, groups = dsa__round_up(s->n_heads, DSA__COLS);
    const int32_t H = s->n_heads, dim = s->dim_latent + s->dim_rope, bytes = dsa__latent_bytes_f32x8(s);
    float *kv = (float *)scratch, *x = kv + DSA__ROWS * ldv, *p = x + DSA__ROWS * DSA__COLS, *keep = p + groups * DSA__ROWS;
    float *edge = keep + groups;
    int32_t j, h, i, d, wide, tall;
    for (j = 0; j < n; j++) {
        if (j + DSA__AHEAD < n + n_ahead) dsa__prefetch_f32x8((uintptr_t)rows[j + DSA__AHEAD], bytes);
        dsa__widen_latent_f32x8(s, rows[j], kv + j * ldv);
    }
    for (h = 0; h < H; h += DSA__COLS) {
        float m16[16] = {0}, s16[16] = {0};
        const float *q = (const float *)packed + (int64_t)h * dim;
        const size_t size = sizeof(float) * (size_t)dsa__min32(DSA__COLS, H - h);
        for (j = 0; j < n; j += DSA__TILE_ROWS)
            dsa__tile_set_f32x8(dsa__min32(DSA__TILE_ROWS, n - j), dim, kv + j * ldv, ldv, q, x + j * DSA__COLS);
        memcpy(m16, max + h, size);
        memcpy(s16, sum + h, size);
        for (i = 0; i < 16; i += 8)
            dsa__softmax_f32x8(n, s->scale, x + i, m16 + i, s16 + i, keep + h + i, p + (int64_t)(h + i) * DSA__ROWS);
        memcpy(max + h, m16, size);
        memcpy(sum + h, s16, size);
    }
    for (d = 0; d < s->dim_v; d += DSA__COLS) {          /* a column of 16 dims lies in L1 while all heads pass over it */
        wide = dsa__min32(DSA__COLS, s->dim_v - d);
        for (h = 0; h < H; h += DSA__TILE_ROWS) {
            const float *ph = p + (int64_t)h * DSA__ROWS;
            float *o = out + h * dim_v + d;
            tall = dsa__min32(DSA__TILE_ROWS, H - h);
            if (wide == DSA__COLS) {
                dsa__tile_add_f32x8(tall, n, ph, DSA__ROWS, kv + d, ldv, keep + h, o, dim_v);
                continue;
            }
            for (i = 0; i < tall; i++) memcpy(edge + i * DSA__COLS, o + i * dim_v, sizeof(float) * (size_t)wide);
            dsa__tile_add_f32x8(tall, n, ph, DSA__ROWS, kv + d, ldv, keep + h, edge, DSA__COLS);
            for (i = 0; i < tall; i++) memcpy(o + i * dim_v, edge + i * DSA__COLS, sizeof(float) * (size_t)wide);
        }
    }
}

static DSA__F32X8 void dsa__query_round_f32x8(dsa_type format, int hadamard, int32_t n_heads, int32_t dim, const float *q, const float *w,
                                              float *x, float *v)
{
    dsa__round_heads(format, hadamard, n_heads, dim, q, w, x, v);
}

/* ---- the backward pass ------------------------------------------------------------------------ */
/* rows x vecs vectors of c: 4 x 3 sums fill the registers, 7 loads per 12 fma; narrow products take 8 rows of one vector. */
DSA__F32X8_INLINE void dsa__madd_tile8(const int rows, const int vecs, int64_t depth, const float *a, int64_t a_row, int64_t a_col,
                                       const float *b, int64_t ldb, float *c, int64_t ldc)
{
    dsa__f32x8 s[8][3], v[3], x;
    int64_t k;
    int i, j;
    DSA__UNROLL
    for (i = 0; i < rows; i++) {
        DSA__UNROLL
        for (j = 0; j < vecs; j++) s[i][j] = dsa__load8(c + i * ldc + 8 * j);
    }
    for (k = 0; k < depth; k++, a += a_col, b += ldb) {
        DSA__UNROLL
        for (j = 0; j < vecs; j++) v[j] = dsa__load8(b + 8 * j);
        DSA__UNROLL
        for (i = 0; i < rows; i++) {
            x = dsa__set8(a[i * a_row]);
            DSA__UNROLL
            for (j = 0; j < vecs; j++) s[i][j] = dsa__fma8(x, v[j], s[i][j]);
        }
    }
    DSA__UNROLL
    for (i = 0; i < rows; i++) {
        DSA__UNROLL
        for (j = 0; j < vecs; j++) dsa__store8(c + i * ldc + 8 * j, s[i][j]);
    }
}

/* All rows of one column of tiles; tall is 4, 6 or 8. */
DSA__F32X8_INLINE void dsa__madd_column8(const int tall, const int vecs, int64_t m, int64_t depth, const float *a, int64_t a_row,
                                         int64_t a_col, const float *b, int64_t ldb, float *c, int64_t ldc)
{
    for (; m >= tall; m -= tall, a += tall * a_row, c += tall * ldc) dsa__madd_tile8(tall, vecs, depth, a, a_row, a_col, b, ldb, c, ldc);
    if (tall > 4 && m >= 4) {
        dsa__madd_tile8(4, vecs, depth, a, a_row, a_col, b, ldb, c, ldc);
        m -= 4; a += 4 * a_row; c += 4 * ldc;
    }
    if (m == 3) dsa__madd_tile8(3, vecs, depth, a, a_row, a_col, b, ldb, c, ldc);
    if (m == 2) dsa__madd_tile8(2, vecs, depth, a, a_row, a_col, b, ldb, c, ldc);
    if (m == 1) dsa__madd_tile8(1, vecs, depth, a, a_row, a_col, b, ldb, c, ldc);
}

#define DSA__MADD_DEPTH 64                               /* rows of b at a time: three vectors of each stay in L1 whatever their stride */

static DSA__F32X8 void dsa__madd_f32x8(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_row, int64_t a_col,
                                       const float *b, int64_t ldb, float *c, int64_t ldc)
{
    int64_t at, part, j, i, k;
    for (at = 0; at < depth; at += part, a += part * a_col, b += part * ldb) {
        part = dsa__min64(DSA__MADD_DEPTH, depth - at);
        for (j = 0; j + 24 <= n; j += 24) dsa__madd_column8(4, 3, m, part, a, a_row, a_col, b + j, ldb, c + j, ldc);
        for (; j + 16 <= n; j += 16) dsa__madd_column8(6, 2, m, part, a, a_row, a_col, b + j, ldb, c + j, ldc);
        for (; j + 8 <= n; j += 8) dsa__madd_column8(8, 1, m, part, a, a_row, a_col, b + j, ldb, c + j, ldc);
        if (j < n) {                                     /* the last columns through a copy with eight */
            const size_t size = sizeof(float) * (size_t)(n - j);
            float wide[DSA__MADD_DEPTH * 8] = {0}, last[8] = {0};
            for (k = 0; k < part; k++) memcpy(wide + 8 * k, b + k * ldb + j, size);
            for (i = 0; i < m; i++) {
                memcpy(last, c + i * ldc + j, size);
                dsa__madd_tile8(1, 1, part, a + i * a_row, 0, a_col, wide, 8, last, 8);
                memcpy(c + i * ldc + j, last, size);
            }
        }
    }
}

/* lanes: a multiple of 8 here and below */
static DSA__F32X8 void dsa__weights_f32x8(int32_t n, int32_t lanes, float scale, const float *L, const float *delta, float *x, float *dp,
                                          int64_t ld)
{
    const dsa__f32x8 f = dsa__set8(scale), zero = dsa__set8(0.0f);
    int32_t j, h;
    for (h = 0; h < lanes; h += 8) {
        const dsa__f32x8 l = dsa__load8(L + h), mean = dsa__load8(delta + h);
        for (j = 0; j < n; j++) {
            float *xj = x + j * ld + h, *pj = dp ? dp + j * ld + h : NULL;
            dsa__f32x8 e = dsa__sub8(dsa__mul8(dsa__load8(xj), f), l), p = dsa__exp8(dsa__pick8(dsa__less8(zero, e), zero, e));
            dsa__store8(xj, p);
            if (pj) dsa__store8(pj, dsa__mul8(dsa__mul8(f, p), dsa__sub8(dsa__load8(pj), mean)));
        }
    }
}

static DSA__F32X8 void dsa__turn_f32x8(int32_t n, int32_t lanes, int32_t dim, const float *x, float *y)
{
    int32_t h, d;
    for (h = 0; h < lanes; h += 8) {
        for (d = 0; n - h >= 8 && d + 8 <= dim; d += 8) dsa__transpose8(x + (int64_t)h * dim + d, dim, y + (int64_t)d * lanes + h, lanes);
        for (; d < dim; d++) {
            int32_t i;
            for (i = h; i < h + 8; i++) y[(int64_t)d * lanes + i] = i < n ? x[(int64_t)i * dim + d] : 0.0f;
        }
    }
}

static DSA__F32X8 float dsa__exps_f32x8(int64_t n, float max, float *x)
{
    const dsa__f32x8 m = dsa__set8(max), none = dsa__set8(-dsa__infinity()), zero = dsa__set8(0.0f);
    dsa__f32x8 sum = zero, v;
    float last[8], sums[64] = {0};
    int64_t i;
    int32_t k;
    for (i = 0; i < n; i += 8) {
        const int32_t part = (int32_t)dsa__min64(8, n - i);
        for (k = 0; k < 8; k++) last[k] = k < part ? x[i + k] : -dsa__infinity();
        v = dsa__load8(part == 8 ? x + i : last);
        v = dsa__pick8(dsa__equal8(v, none), zero, dsa__exp8(dsa__sub8(v, m)));
        sum = dsa__add8(sum, v);
        dsa__store8(last, v);
        memcpy(x + i, last, sizeof(float) * (size_t)part);
    }
    dsa__store8(sums, sum);
    dsa__store8(last, dsa__sums8(sums));
    return last[0];
}

static DSA__F32X8 void dsa__fold_f32x8(int32_t n, int32_t lanes, const float *w, const float *d, int64_t ld, float *I)
{
    const dsa__f32x8 zero = dsa__set8(0.0f);
    float sums[64] = {0}, s[8];
    int32_t at, j, h;
    for (at = 0; at < n; at += 8) {
        const int32_t m = dsa__min32(8, n - at);
        for (j = 0; j < m; j++) {
            const float *dj = d + (at + j) * ld;
            dsa__f32x8 sum = zero;
            for (h = 0; h < lanes; h += 8) sum = dsa__fma8(dsa__load8(w + h), dsa__max8(zero, dsa__load8(dj + h)), sum);
            dsa__store8(sums + 8 * j, sum);
        }
        dsa__store8(s, dsa__sums8(sums));
        memcpy(I + at, s, sizeof(float) * (size_t)m);
    }
}

static DSA__F32X8 void dsa__unfold_f32x8(int32_t n, int32_t lanes, const float *w, const float *g, float *d, int64_t ld, float *dw)
{
    const dsa__f32x8 zero = dsa__set8(0.0f);
    int32_t j, h;
    for (h = 0; h < lanes; h += 8) {
        const dsa__f32x8 wh = dsa__load8(w + h);
        dsa__f32x8 sum = dsa__load8(dw + h);
        for (j = 0; j < n; j++) {
            const dsa__f32x8 x = dsa__load8(d + j * ld + h), gj = dsa__set8(g[j]), on = dsa__less8(zero, x);
            sum = dsa__fma8(gj, dsa__and8(on, x), sum);
            dsa__store8(d + j * ld + h, dsa__and8(on, dsa__mul8(gj, wh)));
        }
        dsa__store8(dw + h, sum);
    }
}

/* ---- projections: dsa__matmul_isa. All types keep the order of the columns. ---------------------- */
static DSA__F32X8 void dsa__matmul_deal_f32x8(dsa_type type, int64_t n, const float *x, const unsigned char *scale, float *to,
                                              int64_t stride)
{
    float s = 1.0f, tail[8] = {0};
    int64_t i;
    (void)type;
    for (i = 0; i < dsa__up64(n); i += 8, to += stride) {
        if (scale && i % 128 == 0) s = dsa__float_at(scale + i / 128 * 4);
        if (i + 8 <= n) {
            dsa__store8(to, dsa__mul8(dsa__load8(x + i), dsa__set8(s)));
        } else {
            memset(tail, 0, sizeof tail);
            if (i < n) memcpy(tail, x + i, sizeof(float) * (size_t)(n - i));
            dsa__store8(to, dsa__mul8(dsa__load8(tail), dsa__set8(s)));
        }
    }
}

static void dsa__matmul_undeal_f32x8(dsa_type type, int64_t n, const float *x, float *y)
{
    (void)type;
    memcpy(y, x, sizeof(float) * (size_t)n);
}

/* The last columns of 4 rows with zeros behind them: 64 of each. */
static void dsa__matmul_tails_f32x8(int64_t bytes, const unsigned char *const *rows, int64_t at, unsigned char tail[4][256])
{
    int32_t r;
    memset(tail, 0, 4 * 256);
    for (r = 0; r < 4; r++) memcpy(tail[r], rows[r] + at, (size_t)bytes);
}

DSA__F32X8_INLINE void dsa__matmul_expand_as_f32x8(dsa_type type, int64_t n, const unsigned char *const *rows, float *to,
                                                   int64_t row_stride, int64_t stride)
{
    const int64_t size = dsa__type_bytes(type), whole = n & ~INT64_C(63);
    unsigned char tail[4][256];
    dsa__f32x8 lo, hi;
    int64_t i;
    int32_t r;
    if (n > whole) dsa__matmul_tails_f32x8((n - whole) * size, rows, whole * size, tail);
    for (r = 0; r < 4; r++) {
        float *t = to + r * row_stride;
        for (i = 0; i < dsa__up64(n); i += 16, t += 2 * stride) {
            dsa__widen16(type, i < whole ? rows[r] + i * size : tail[r] + (i - whole) * size, &lo, &hi);
            dsa__store8(t, lo);
            dsa__store8(t + stride, hi);
        }
    }
}

static DSA__F32X8 void dsa__matmul_expand_f32x8(dsa_type type, int64_t n, const unsigned char *const *rows, float *to,
                                                int64_t row_stride, int64_t stride)
{
    DSA__BY_WEIGHT(dsa__matmul_expand_as_f32x8, n, rows, to, row_stride, stride)
}

/* Four runs of rows at a time: streams that the prefetchers can follow. A run that is shorter does its last row again. */
DSA__F32X8_INLINE void dsa__matmul_dots_as_f32x8(dsa_type type, int64_t in, int64_t n_out, const unsigned char *w, const float *x, float *y)
{
    const int64_t size = dsa__type_bytes(type), whole = in & ~INT64_C(63), runs = (n_out + 3) / 4;
    unsigned char tail[4][256];
    float lanes[64], sums[8];
    int64_t o, i, row[4];
    int32_t r;
    memset(lanes, 0, sizeof lanes);
    for (o = 0; o < runs; o++) {
        const unsigned char *p[4];
        dsa__f32x8 s0, s1, s2, s3, u, v, lo, hi;
        for (r = 0; r < 4; r++) {
            row[r] = dsa__min64(o + r * runs, n_out - 1);
            p[r] = w + (size_t)(row[r] * in * size);
        }
        s0 = s1 = s2 = s3 = dsa__set8(0.0f);
#define DSA__ROW(r, P) dsa__widen16(type, P, &lo, &hi); s##r = dsa__fma8(lo, u, s##r); s##r = dsa__fma8(hi, v, s##r);
        for (i = 0; i < whole; i += 16) {
            u = dsa__load8(x + i);
            v = dsa__load8(x + i + 8);
            DSA__ROW(0, p[0] + i * size) DSA__ROW(1, p[1] + i * size) DSA__ROW(2, p[2] + i * size) DSA__ROW(3, p[3] + i * size)
        }
        if (in > whole) dsa__matmul_tails_f32x8((in - whole) * size, p, whole * size, tail);
        for (; i < dsa__up64(in); i += 16) {
            const int64_t at = (i - whole) * size;
            u = dsa__load8(x + i);
            v = dsa__load8(x + i + 8);
            DSA__ROW(0, tail[0] + at) DSA__ROW(1, tail[1] + at) DSA__ROW(2, tail[2] + at) DSA__ROW(3, tail[3] + at)
        }
#undef DSA__ROW
        dsa__store8(lanes, s0);
        dsa__store8(lanes + 8, s1);
        dsa__store8(lanes + 16, s2);
        dsa__store8(lanes + 24, s3);
        dsa__store8(sums, dsa__sums8(lanes));
        for (r = 0; r < 4; r++) y[row[r]] = sums[r];
    }
}

static DSA__F32X8 void dsa__matmul_dots_f32x8(dsa_type type, int64_t in, int64_t n_out, const unsigned char *w, const float *x, float *y)
{
    DSA__BY_WEIGHT(dsa__matmul_dots_as_f32x8, in, n_out, w, x, y)
}

/* Up to 3 rows: 4 x 3 sums, 3 vectors of x and one of W are the 16 registers of AVX2, and the 32 of NEON. */
DSA__F32X8_INLINE void dsa__matmul_tile_as_f32x8(const int32_t tall, int64_t steps, const float *w, const float *x, float *c,
                                                 int first, int last, int64_t n_out, float *y, int64_t ldy)
{
    dsa__f32x8 a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, u, v0, v1, v2;
    float lanes[64], sums[8], *to;
    int64_t o;
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = v1 = v2 = dsa__set8(0.0f);
#define DSA__ROW(s, t) s##0 = dsa__load8(c + 32 * t); s##1 = dsa__load8(c + 32 * t + 8); \
                       s##2 = dsa__load8(c + 32 * t + 16); s##3 = dsa__load8(c + 32 * t + 24);
    if (!first) {
        DSA__ROW(a, 0)
        if (tall > 1) { DSA__ROW(b, 1) }
        if (tall > 2) { DSA__ROW(c, 2) }
    }
#undef DSA__ROW
#define DSA__OUTPUT(o) u = dsa__load8(w + 8 * o); a##o = dsa__fma8(u, v0, a##o); \
                       if (tall > 1) { b##o = dsa__fma8(u, v1, b##o); } if (tall > 2) { c##o = dsa__fma8(u, v2, c##o); }
    for (; steps > 0; steps--, w += 32, x += 8 * tall) {
        v0 = dsa__load8(x);
        if (tall > 1) v1 = dsa__load8(x + 8);
        if (tall > 2) v2 = dsa__load8(x + 16);
        DSA__OUTPUT(0) DSA__OUTPUT(1) DSA__OUTPUT(2) DSA__OUTPUT(3)
    }
#undef DSA__OUTPUT
#define DSA__ROW(s, t) \
    to = last ? lanes : c + 32 * t; \
    dsa__store8(to, s##0); dsa__store8(to + 8, s##1); dsa__store8(to + 16, s##2); dsa__store8(to + 24, s##3); \
    if (last) { dsa__store8(sums, dsa__sums8(lanes)); for (o = 0; o < n_out; o++) y[t * ldy + o] = sums[o]; }
    memset(lanes, 0, sizeof lanes);
    DSA__ROW(a, 0)
    if (tall > 1) { DSA__ROW(b, 1) }
    if (tall > 2) { DSA__ROW(c, 2) }
#undef DSA__ROW
}

static DSA__F32X8 void dsa__matmul_tile_f32x8(int32_t tall, int64_t steps, const float *w, const float *x, float *c, int first, int last,
                                              int64_t n_out, float *y, int64_t ldy)
{
    if (tall == 1)      dsa__matmul_tile_as_f32x8(1, steps, w, x, c, first, last, n_out, y, ldy);
    else if (tall == 2) dsa__matmul_tile_as_f32x8(2, steps, w, x, c, first, last, n_out, y, ldy);
    else                dsa__matmul_tile_as_f32x8(3, steps, w, x, c, first, last, n_out, y, ldy);
}

static DSA__F32X8 void dsa__matmul_tile_t_f32x8(int32_t tall, int64_t n, const float *a, int64_t lda, const float *w, int64_t ldw,
                                                float *c, int64_t ldc)
{
    dsa__madd_f32x8(tall, 64, n, a, lda, 1, w, ldw, c, ldc);
}

/* One row at a time: see >>avx512_matmul. */
DSA__F32X8_INLINE void dsa__matmul_axpys_as_f32x8(dsa_type type, int64_t in, int64_t rows, const unsigned char *w, const float *x,
                                                  const unsigned char *scale, float *c)
{
    const int64_t size = dsa__type_bytes(type), whole = in & ~INT64_C(63);
    unsigned char tail[256];
    int64_t o, i;
    memset(tail, 0, sizeof tail);
    for (o = 0; o < rows; o++, w += in * size) {
        dsa__f32x8 a = dsa__set8(x[o]), lo, hi;
        if (in > whole) memcpy(tail, w + whole * size, (size_t)((in - whole) * size));
        for (i = 0; i < dsa__up64(in); i += 16) {
            if (scale && i % 128 == 0) a = dsa__set8(x[o] * dsa__float_at(scale + i / 128 * 4));
            if (i * size % 64 == 0) dsa__ask(w + i * size, 16 * in * size, 64);
            dsa__widen16(type, i < whole ? w + i * size : tail + (i - whole) * size, &lo, &hi);
            dsa__store8(c + i, dsa__fma8(a, lo, dsa__load8(c + i)));
            dsa__store8(c + i + 8, dsa__fma8(a, hi, dsa__load8(c + i + 8)));
        }
    }
}

static DSA__F32X8 void dsa__matmul_axpys_f32x8(dsa_type type, int64_t in, int64_t rows, const unsigned char *w, const float *x,
                                               const unsigned char *scale, float *c)
{
    DSA__BY_WEIGHT(dsa__matmul_axpys_as_f32x8, in, rows, w, x, scale, c)
}

static const dsa__matmul_isa dsa__matmul_isa_f32x8 = {
    8, 3, dsa__matmul_deal_f32x8, dsa__matmul_expand_f32x8, dsa__matmul_dots_f32x8, dsa__matmul_tile_f32x8,
    dsa__matmul_tile_t_f32x8, dsa__matmul_axpys_f32x8, dsa__matmul_undeal_f32x8
};

static void dsa__matmul_f32x8(int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx, const dsa_tensor *w, int64_t first,
                              float *y, int64_t ldy, void *scratch)
{
    dsa__matmul_vector(&dsa__matmul_isa_f32x8, n, in, n_out, x, ldx, w, first, y, ldy, scratch);
}

static void dsa__matmul_t_f32x8(int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx, const dsa_tensor *w, int64_t first,
                                float *y, int64_t ldy, void *scratch)
{
    dsa__matmul_t_vector(&dsa__matmul_isa_f32x8, n, in, n_out, x, ldx, w, first, y, ldy, scratch);
}
#endif

/* ============================================================================================
   >>avx512                                   selection, scoring and attention with AVX-512
   ============================================================================================
   Three levels of CPU share the texts: F, BW, VL, DQ (everything in f32 fma); with VNNI (int8 keys by vpdpbusd, exact int32 sums);
   with BF16, VBMI and VBMI2 (bf16 and FP8 keys, and attention that may round q and P, by vdpbf16ps: exact products, f32 sums).
   Selection is the three primitives of >>topk. Scoring is eq. (1) with heads in the lanes, attention the online softmax of
   dsa__ref_attend_block as two matrix products: see the heads of the two parts. */
#if defined(DSA__X86)
#if !defined(__clang__)                      /* g++ 12 warns about its own intrinsics (gcc bug 105593) */
#  pragma GCC diagnostic push
#  pragma GCC diagnostic ignored "-Wuninitialized"
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define DSA__AVX512_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,popcnt"
#define DSA__AVX512      __attribute__((target(DSA__AVX512_TARGET)))
#define DSA__AVX512_BF16 __attribute__((target(DSA__AVX512_TARGET ",avx512bf16")))
#define DSA__AVX512_VNNI __attribute__((target(DSA__AVX512_TARGET ",avx512vnni")))
#define DSA__AVX512_FP8  __attribute__((target(DSA__AVX512_TARGET ",avx512bf16,avx512vbmi")))

/* The first n lanes, n >= 0. */
DSA__AVX512 static inline __mmask16 dsa__lanes_avx512(int64_t n) { return (__mmask16)(n < 16 ? (1u << n) - 1u : 0xFFFFu); }

/* The lanes in mask to out, in order; returns how many. Writes at most 16 places. To registers first: Zen 4 takes 100 cycles to
   compress to memory. Half a vector usually does, and stores faster. */
DSA__AVX512 static inline int32_t dsa__pack_avx512(__mmask16 mask, __m512 s, __m512i i, float *out_s, int32_t *out_i)
{
    int32_t m = (int32_t)_mm_popcnt_u32(mask);
    s = _mm512_maskz_compress_ps(mask, s);
    i = _mm512_maskz_compress_epi32(mask, i);
    _mm256_storeu_ps(out_s, _mm512_castps512_ps256(s));
    _mm256_storeu_si256((__m256i *)(void *)out_i, _mm512_castsi512_si256(i));
    if (m > 8) {
        _mm512_storeu_ps(out_s, s);
        _mm512_storeu_si512((void *)out_i, i);
    }
    return m;
}

DSA__AVX512 static int32_t dsa__filter_avx512(const float *s, int32_t n, int32_t first, float above, float *out_s, int32_t *out_i)
{
    const __m512 a = _mm512_set1_ps(above);
    const __m512i next = _mm512_set1_epi32(16);
    __m512i i0 = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    int32_t j, m = 0;
    for (j = 0; j + 64 <= n; j += 64) {      /* one branch for 64: fewer are mispredicted, whether candidates are rare or frequent */
        const __m512 s0 = _mm512_loadu_ps(s + j), s1 = _mm512_loadu_ps(s + j + 16),
                     s2 = _mm512_loadu_ps(s + j + 32), s3 = _mm512_loadu_ps(s + j + 48);
        const __mmask16 m0 = _mm512_cmp_ps_mask(s0, a, _CMP_GT_OQ), m1 = _mm512_cmp_ps_mask(s1, a, _CMP_GT_OQ),
                        m2 = _mm512_cmp_ps_mask(s2, a, _CMP_GT_OQ), m3 = _mm512_cmp_ps_mask(s3, a, _CMP_GT_OQ);
        const __m512i i1 = _mm512_add_epi32(i0, next), i2 = _mm512_add_epi32(i1, next), i3 = _mm512_add_epi32(i2, next);
        if ((m0 | m1 | m2 | m3) != 0) {
            m += dsa__pack_avx512(m0, s0, i0, out_s + m, out_i + m);
            m += dsa__pack_avx512(m1, s1, i1, out_s + m, out_i + m);
            m += dsa__pack_avx512(m2, s2, i2, out_s + m, out_i + m);
            m += dsa__pack_avx512(m3, s3, i3, out_s + m, out_i + m);
        }
        i0 = _mm512_add_epi32(i3, next);
    }
    for (; j < n; j += 16) {
        const __mmask16 lanes = dsa__lanes_avx512(n - j);
        const __m512 v = _mm512_maskz_loadu_ps(lanes, s + j);
        m += dsa__pack_avx512(_mm512_mask_cmp_ps_mask(lanes, v, a, _CMP_GT_OQ), v, i0, out_s + m, out_i + m);
        i0 = _mm512_add_epi32(i0, next);
    }
    return m;
}

/* With VBMI2, 64 scores go at once and without a branch that candidates decide: the numbers of those that enter are compressed as
   bytes and look the scores up. A tenth less time for a row than above; of 1M scores, where the branch is worst, a seventh. */
#define DSA__AVX512_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,f16c,popcnt")))

DSA__AVX512_VBMI2 static int32_t dsa__filter_avx512_vbmi2(const float *s, int32_t n, int32_t first, float above,
                                                          float *out_s, int32_t *out_i)
{
    const __m512 a = _mm512_set1_ps(above);
    const __m512i number = _mm512_set_epi64(0x3F3E3D3C3B3A3938, 0x3736353433323130, 0x2F2E2D2C2B2A2928, 0x2726252423222120,
                                            0x1F1E1D1C1B1A1918, 0x1716151413121110, 0x0F0E0D0C0B0A0908, 0x0706050403020100);
    int32_t j, m = 0;
    for (j = 0; j + 64 <= n; j += 64) {
        const __m512 s0 = _mm512_loadu_ps(s + j), s1 = _mm512_loadu_ps(s + j + 16),
                     s2 = _mm512_loadu_ps(s + j + 32), s3 = _mm512_loadu_ps(s + j + 48);
        const __mmask64 mask = _mm512_kunpackd(
            _mm512_kunpackw(_mm512_cmp_ps_mask(s3, a, _CMP_GT_OQ), _mm512_cmp_ps_mask(s2, a, _CMP_GT_OQ)),
            _mm512_kunpackw(_mm512_cmp_ps_mask(s1, a, _CMP_GT_OQ), _mm512_cmp_ps_mask(s0, a, _CMP_GT_OQ)));
        const int32_t entering = (int32_t)_mm_popcnt_u64(mask);
        const __m512i i = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(_mm512_maskz_compress_epi8(mask, number)));
        if (entering > 16) {                 /* more than a vector holds: seldom, or always */
            m += dsa__filter_avx512(s + j, 64, first + j, above, out_s + m, out_i + m);
            continue;
        }
        _mm512_storeu_ps(out_s + m, _mm512_mask_blend_ps(_mm512_cmpgt_epi32_mask(i, _mm512_set1_epi32(31)),
                                                         _mm512_permutex2var_ps(s0, i, s1), _mm512_permutex2var_ps(s2, i, s3)));
        _mm512_storeu_si512((void *)(out_i + m), _mm512_add_epi32(i, _mm512_set1_epi32(first + j)));
        m += entering;
    }
    return m + dsa__filter_avx512(s + j, n - j, first + j, above, out_s + m, out_i + m);
}

DSA__AVX512 static int64_t dsa__count_avx512(const float *s, int64_t n, float least)
{
    const __m512 v = _mm512_set1_ps(least);
    const __m512i one = _mm512_set1_epi32(1);
    __m512i m0 = _mm512_setzero_si512(), m1 = m0;
    int64_t j;
    for (j = 0; j + 32 <= n; j += 32) {
        m0 = _mm512_mask_add_epi32(m0, _mm512_cmp_ps_mask(_mm512_loadu_ps(s + j), v, _CMP_GE_OQ), m0, one);
        m1 = _mm512_mask_add_epi32(m1, _mm512_cmp_ps_mask(_mm512_loadu_ps(s + j + 16), v, _CMP_GE_OQ), m1, one);
    }
    for (; j < n; j += 16) {
        const __mmask16 lanes = dsa__lanes_avx512(n - j);
        m0 = _mm512_mask_add_epi32(m0, _mm512_mask_cmp_ps_mask(lanes, _mm512_maskz_loadu_ps(lanes, s + j), v, _CMP_GE_OQ), m0, one);
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(m0, m1));
}

DSA__AVX512 static int64_t dsa__keep_avx512(const float *s, const int32_t *i, int64_t n, float cut, int equal, float *out_s, int32_t *out_i)
{
    const __m512 c = _mm512_set1_ps(cut);
    const __mmask16 ties = equal ? 0xFFFF : 0;
    int64_t j, m = 0;
    for (j = 0; j + 16 <= n; j += 16) {
        const __m512 v = _mm512_loadu_ps(s + j);
        const __mmask16 mask = (__mmask16)(_mm512_cmp_ps_mask(v, c, _CMP_GT_OQ) | _mm512_mask_cmp_ps_mask(ties, v, c, _CMP_EQ_OQ));
        m += dsa__pack_avx512(mask, v, _mm512_loadu_si512((const void *)(i + j)), out_s + m, out_i + m);
    }
    return m + dsa__ref_keep(s + j, i + j, n - j, cut, equal, out_s + m, out_i + m);     /* writes nothing beyond place n */
}

/* r[i][j] <-> r[j][i], 4-byte words: one bit of the row's number changes places with one of the lane's, four times. */
DSA__INLINE DSA__AVX512 void dsa__transpose_avx512(__m512i *r)
{
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), other = _mm512_set1_epi32(16);
    int i, bit;
    DSA__UNROLL for (bit = 1; bit < 16; bit *= 2) {
        const __m512i bits = _mm512_set1_epi32(bit);
        const __mmask16 set = _mm512_test_epi32_mask(lane, bits);
        const __m512i lo = _mm512_mask_add_epi32(lane, set, _mm512_sub_epi32(lane, bits), other);
        const __m512i hi = _mm512_mask_add_epi32(_mm512_add_epi32(lane, bits), set, lane, other);
        DSA__UNROLL for (i = 0; i < 16; i++) {
            const __m512i x = r[i], y = r[i | bit];
            if (i & bit) continue;
            r[i] = _mm512_permutex2var_epi32(x, lo, y);
            r[i | bit] = _mm512_permutex2var_epi32(x, hi, y);
        }
    }
}

/* ---- index scores --------------------------------------------------------------------------------------------------
   Lanes are heads. A unit is what multiplies: it takes words of 4 bytes that hold 1 (f32), 2 (bf16) or 4 (int8) dims of one key
   or of one head. */

static uint64_t dsa__first_bits(int64_t n) { return n >= 64 ? ~UINT64_C(0) : n > 0 ? (UINT64_C(1) << n) - 1 : 0; }

typedef enum dsa__unit { DSA__UNIT_F32 = 0, DSA__UNIT_BF16, DSA__UNIT_INT8 } dsa__unit;

/* Accumulators keep one element type all along: gcc 12 makes copies of an __m512i that is used as 16 integers, and spills them. */
typedef int32_t dsa__ints __attribute__((vector_size(64)));

/* acc + <key word, query word>, lane by lane */
DSA__AVX512 DSA__INLINE __m512 dsa__madd_f32_avx512(__m512 acc, __m512i k, __m512i q)
{
    return _mm512_fmadd_ps(_mm512_castsi512_ps(k), _mm512_castsi512_ps(q), acc);
}

DSA__AVX512_BF16 DSA__INLINE __m512 dsa__madd_bf16_avx512(__m512 acc, __m512i k, __m512i q)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)q, (__m512bh)k);
}

/* The unit multiplies unsigned by signed bytes: keys come as k + 128, and acc starts at -128 Sum_d q[d]. */
DSA__AVX512_VNNI DSA__INLINE dsa__ints dsa__madd_int8_avx512(dsa__ints acc, __m512i k, __m512i q)
{
    __m512i sign = _mm512_set1_epi32((int32_t)0x80808080u);
    __asm__("" : "+v"(sign));            /* keeps clang from moving the xor in front of the broadcast, out of its memory operand */
    return (dsa__ints)_mm512_dpbusd_epi32((__m512i)acc, _mm512_xor_si512(k, sign), q);
}

/* ReLU of finished dots, as f32. max(0, x) in this order keeps a NaN x. */
DSA__AVX512 DSA__INLINE __m512 dsa__relu_f32_avx512(__m512 x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }
DSA__AVX512 DSA__INLINE __m512 dsa__relu_bf16_avx512(__m512 x) { return dsa__relu_f32_avx512(x); }
DSA__AVX512 DSA__INLINE __m512 dsa__relu_int8_avx512(dsa__ints x)
{
    return _mm512_cvtepi32_ps(_mm512_max_epi32((__m512i)x, _mm512_setzero_si512()));
}

/* One pass over the keys of a call, for one group of heads of one query. */
typedef struct dsa__score_pass {
    int32_t bytes;                       /* of a key's words */
    int32_t dim;
    int32_t first;                       /* the first pass over the keys, which fetches and expands them */
    int32_t add;                         /* not the query's first group: add to part */
    uint64_t heads;                      /* bit h: the group has a head h. A head of padding could make 0 * inf = NaN. */
    size_t row_bytes;                    /* of an expanded key */
    const __m512i *table;                /* FP8: the four halves of two byte tables, the order of unpacking, the sign bits */
} dsa__score_pass;

/* What a tile does for later ones, between its dots. Keys are prefetched a line of each at a time: all at once they would take every
   miss buffer, and the query's own loads would wait behind them. FP8 keys are expanded to bf16 by the tile before theirs, where the
   shuffles and stores find idle ports; in front of their own tile they cost a tenth. */

/* Expands 32 dims of keys j and j + 1 to byte i of their bf16 rows; zeros behind the last dim. e4m3 -> bf16 is exact: the 7 bits
   below the sign look up the low and the high byte. The constants come from memory, for no register is free. */
DSA__AVX512_FP8 DSA__INLINE void dsa__expand_fp8_avx512(const dsa__score_pass *c, const unsigned char *const *rows, unsigned char *out,
                                                        int64_t j, int64_t i)
{
    __mmask32 m = (__mmask32)dsa__first_bits(c->dim - i / 2);
    __m512i x = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(m, rows[j] + i / 2)), low, high;
    x = _mm512_inserti64x4(x, _mm256_maskz_loadu_epi8(m, rows[j + 1] + i / 2), 1);
    x = _mm512_permutexvar_epi64(c->table[4], x);                                   /* 8 dims of one key, 8 of the other, .. */
    low = _mm512_permutex2var_epi8(c->table[0], x, c->table[1]);
    high = _mm512_permutex2var_epi8(c->table[2], x, c->table[3]);
    high = _mm512_ternarylogic_epi64(high, x, c->table[5], 0xF8);                   /* high | (x & sign) */
    out += (size_t)j * c->row_bytes + (size_t)i;
    _mm512_store_si512((__m512i *)(void *)out, _mm512_unpacklo_epi8(low, high));
    _mm512_store_si512((__m512i *)(void *)(out + c->row_bytes), _mm512_unpackhi_epi8(low, high));
}

#define DSA__FETCH(KEYS, AT)                                                                                                        \
    DSA__UNROLL for (j = 0; j < KEYS; j++) _mm_prefetch((const char *)rows[2 * KEYS + j] + (AT), _MM_HINT_T0);                      \
    _mm_prefetch((const char *)rows[2 * KEYS] + 4096 + (AT), _MM_HINT_T0);
#define DSA__BESIDE(KEYS)                                                                                                            \
    if (i % 64 == 0 && c->first) { DSA__FETCH(KEYS, i) }
/* one pair of keys every few steps */
#define DSA__BESIDE_FP8(KEYS)                                                                                                        \
    if (i % 128 == 0) { DSA__FETCH(KEYS, i / 2) }                                                                                   \
    if (i % 16 == 0 && i % 64 < 8 * KEYS)                                                                                           \
        dsa__expand_fp8_avx512(c, rows + KEYS, expanded + KEYS * c->row_bytes, i % 64 / 8, i & ~INT64_C(63));

typedef void dsa__score_tile(const dsa__score_pass *c, const unsigned char *const *rows, unsigned char *expanded, const __m512i *q,
                             __m512 *part);

/* part[j / 2] = (add ? part[j / 2] : 0) + half-summed w ReLU(<q, key j>) of two keys; KEYS keys against NV vectors of heads.
   Few instructions around the loop: the CPU looks ahead over some 300, and what does not fit stops the multipliers. */
#define DSA__SCORE_TILE(NAME, TARGET, UNIT, ACC, KEYS, NV, AHEAD)                                                                   \
TARGET static void NAME(const dsa__score_pass *c, const unsigned char *const *rows, unsigned char *expanded, const __m512i *q,      \
                        __m512 *part)                                                                                               \
{                                                                                                                                   \
    const int64_t bytes = c->bytes;                                                                                                 \
    const unsigned char *k[KEYS];                                                                                                   \
    ACC a[KEYS][NV];                                                                                                                \
    uint64_t heads;                                                                                                                 \
    int64_t i;                                                                                                                      \
    int j, t, v, add;                                                                                                               \
    DSA__UNROLL for (j = 0; j < KEYS; j++) k[j] = expanded ? expanded + (size_t)j * c->row_bytes : rows[j];                         \
    DSA__UNROLL for (j = 0; j < KEYS; j++)                                                                                          \
        DSA__UNROLL for (v = 0; v < NV; v++) a[j][v] = (ACC)q[v];                                                                   \
    for (i = 0, q += NV; i < bytes; i += 4, q += NV) {                                                                              \
        __m512i b[NV];                                                                                                              \
        AHEAD(KEYS)                                                                                                                 \
        DSA__UNROLL for (v = 0; v < NV; v++) b[v] = q[v];                                                                           \
        DSA__UNROLL for (j = 0; j < KEYS; j++) {                                                                                    \
            int32_t word;                                                                                                           \
            __m512i x;                                                                                                              \
            memcpy(&word, k[j] + i, 4);                                                                                             \
            x = _mm512_set1_epi32(word);                                                                                            \
            DSA__UNROLL for (v = 0; v < NV; v++) a[j][v] = dsa__madd_##UNIT##_avx512(a[j][v], x, b[v]);                             \
        }                                                                                                                           \
    }                                                                                                                               \
    heads = c->heads;                                                                                                               \
    add = c->add;                                                                                                                   \
    DSA__UNROLL for (j = 0; j < KEYS; j += 2) {                                                                                     \
        __m512 s[2];                                                                                                                \
        DSA__UNROLL for (t = 0; t < 2; t++) {                                                                                       \
            s[t] = _mm512_maskz_mul_ps((__mmask16)heads, dsa__relu_##UNIT##_avx512(a[j + t][0]), (__m512)q[0]);                     \
            DSA__UNROLL for (v = 1; v < NV; v++)                                                                                    \
                s[t] = _mm512_mask3_fmadd_ps(dsa__relu_##UNIT##_avx512(a[j + t][v]), (__m512)q[v], s[t], (__mmask16)(heads >> 16 * v));\
        }                                                                                                                           \
        s[0] = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));                                       \
        part[j / 2] = add ? _mm512_add_ps(part[j / 2], s[0]) : s[0];                                                                \
    }                                                                                                                               \
}
DSA__SCORE_TILE(dsa__score_tile_f32_1_avx512, DSA__AVX512, f32, __m512, 8, 1, DSA__BESIDE)
DSA__SCORE_TILE(dsa__score_tile_f32_2_avx512, DSA__AVX512, f32, __m512, 8, 2, DSA__BESIDE)
DSA__SCORE_TILE(dsa__score_tile_f32_4_avx512, DSA__AVX512, f32, __m512, 6, 4, DSA__BESIDE)
DSA__SCORE_TILE(dsa__score_tile_bf16_1_avx512, DSA__AVX512_BF16, bf16, __m512, 8, 1, DSA__BESIDE)
DSA__SCORE_TILE(dsa__score_tile_bf16_2_avx512, DSA__AVX512_BF16, bf16, __m512, 8, 2, DSA__BESIDE)
DSA__SCORE_TILE(dsa__score_tile_bf16_4_avx512, DSA__AVX512_BF16, bf16, __m512, 6, 4, DSA__BESIDE)
DSA__SCORE_TILE(dsa__score_tile_fp8_1_avx512, DSA__AVX512_FP8, bf16, __m512, 8, 1, DSA__BESIDE_FP8)
DSA__SCORE_TILE(dsa__score_tile_fp8_2_avx512, DSA__AVX512_FP8, bf16, __m512, 8, 2, DSA__BESIDE_FP8)
DSA__SCORE_TILE(dsa__score_tile_fp8_4_avx512, DSA__AVX512_FP8, bf16, __m512, 6, 4, DSA__BESIDE_FP8)
DSA__SCORE_TILE(dsa__score_tile_int8_1_avx512, DSA__AVX512_VNNI, int8, dsa__ints, 8, 1, DSA__BESIDE)
DSA__SCORE_TILE(dsa__score_tile_int8_2_avx512, DSA__AVX512_VNNI, int8, dsa__ints, 8, 2, DSA__BESIDE)
DSA__SCORE_TILE(dsa__score_tile_int8_4_avx512, DSA__AVX512_VNNI, int8, dsa__ints, 6, 4, DSA__BESIDE)

/* by unit, then by vectors of heads: 1, 2, 4 */
static dsa__score_tile *const dsa__score_tiles_avx512[3][3] = {
    { dsa__score_tile_f32_1_avx512,  dsa__score_tile_f32_2_avx512,  dsa__score_tile_f32_4_avx512 },
    { dsa__score_tile_bf16_1_avx512, dsa__score_tile_bf16_2_avx512, dsa__score_tile_bf16_4_avx512 },
    { dsa__score_tile_int8_1_avx512, dsa__score_tile_int8_2_avx512, dsa__score_tile_int8_4_avx512 }
};
static dsa__score_tile *const dsa__score_tiles_fp8_avx512[3] = {
    dsa__score_tile_fp8_1_avx512, dsa__score_tile_fp8_2_avx512, dsa__score_tile_fp8_4_avx512
};

DSA__AVX512_FP8 static void dsa__score_first_fp8_avx512(const dsa__score_pass *c, const unsigned char *const *rows, unsigned char *out,
                                                        int64_t n)
{
    int64_t i, j;
    for (j = 0; j < n; j += 2)
        for (i = 0; i < c->bytes; i += 64) dsa__expand_fp8_avx512(c, rows, out, j, i);
}

/* Other keys that their unit cannot read in place. bf16 and int8 rows that end within a word: */
DSA__AVX512 static void dsa__score_copy_avx512(dsa_type format, int32_t dim, const unsigned char *row, unsigned char *out)
{
    int32_t i, bytes = format == DSA_BF16 ? 2 * dim : dim;
    for (i = 0; i < bytes; i += 64)
        _mm512_store_si512((__m512i *)(void *)(out + i), _mm512_maskz_loadu_epi8(dsa__first_bits(bytes - i), row + i));
}

/* anything -> f32, exact */
DSA__AVX512 static void dsa__score_widen_avx512(dsa_type format, int32_t dim, const unsigned char *row, unsigned char *out)
{
    const __m512i top = _mm512_set1_epi32(127);
    int32_t d;
    for (d = 0; d < dim; d += 16) {
        __mmask16 m = (__mmask16)dsa__first_bits(dim - d);
        __m512i x, a;
        if (format == DSA_BF16) {
            x = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, row + 2 * d)), 16);
        } else {
            __m128i c = _mm_maskz_loadu_epi8(m, row + d);
            if (format == DSA_INT8) {
                x = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(c)));
            } else {                                                                /* e4m3: bias 7 instead of 127 */
                x = _mm512_cvtepu8_epi32(c);
                a = _mm512_and_si512(x, top);
                x = _mm512_slli_epi32(_mm512_andnot_si512(top, x), 24);
                x = _mm512_or_si512(x, _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a, _mm512_set1_epi32(7)),
                    _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(a), _mm512_set1_ps(0.001953125f))),      /* subnormal */
                    _mm512_add_epi32(_mm512_slli_epi32(a, 20), _mm512_set1_epi32(120 << 23))));
                x = _mm512_mask_blend_epi32(_mm512_cmpeq_epi32_mask(a, top), x, _mm512_set1_epi32(0x7FC00000));
            }
        }
        _mm512_store_si512((__m512i *)(void *)(out + 4 * d), x);
    }
}

/* dsa__round_heads, the same bits, for D in whole vectors: the 16 to 18 us of a V3.2 query become 5 to 6, and every thread of a decode
   step waits for them. */
DSA__AVX512 static void dsa__hadamard_avx512(float *x, int32_t dim)
{
    const __m512 norm = _mm512_set1_ps((float)(1.0 / sqrt((double)dim)));
    int32_t s, i, j;
    for (i = 0; i < dim; i += 16) {          /* (a, b) -> (a + b, a - b) with the lane 1, 2, 4, 8 away */
        __m512 a = _mm512_loadu_ps(x + i), b = _mm512_permute_ps(a, 0xB1);
        a = _mm512_mask_sub_ps(_mm512_add_ps(a, b), 0xAAAA, b, a);
        b = _mm512_permute_ps(a, 0x4E);
        a = _mm512_mask_sub_ps(_mm512_add_ps(a, b), 0xCCCC, b, a);
        b = _mm512_shuffle_f32x4(a, a, 0xB1);
        a = _mm512_mask_sub_ps(_mm512_add_ps(a, b), 0xF0F0, b, a);
        b = _mm512_shuffle_f32x4(a, a, 0x4E);
        _mm512_storeu_ps(x + i, _mm512_mask_sub_ps(_mm512_add_ps(a, b), 0xFF00, b, a));
    }
    for (s = 16; s < dim; s *= 2)
        for (i = 0; i < dim; i += 2 * s)
            for (j = i; j < i + s; j += 16) {
                const __m512 a = _mm512_loadu_ps(x + j), b = _mm512_loadu_ps(x + j + s);
                _mm512_storeu_ps(x + j, _mm512_add_ps(a, b));
                _mm512_storeu_ps(x + j + s, _mm512_sub_ps(a, b));
            }
    for (i = 0; i < dim; i += 16) _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), norm));
}

/* The e4m3 value that x rounds to, |x| beyond 448 to 448: half to even at the third mantissa bit; below 2^-6 the adder rounds to
   steps of 2^-9, and keeps NaN. */
DSA__INLINE DSA__AVX512 __m512 dsa__round_e4m3_avx512(__m512 x)
{
    const __m512 big = _mm512_set1_ps(16384.0f);
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
    const __m512 a = _mm512_min_ps(_mm512_set1_ps(448.0f), _mm512_abs_ps(x));                       /* min gives its second: NaN */
    __m512i r = _mm512_castps_si512(a);
    r = _mm512_add_epi32(r, _mm512_add_epi32(_mm512_set1_epi32(0x7FFFF), _mm512_and_si512(_mm512_srli_epi32(r, 20), _mm512_set1_epi32(1))));
    r = _mm512_andnot_si512(_mm512_set1_epi32(0xFFFFF), r);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, _mm512_set1_ps(0.015625f), _CMP_NGE_UQ),
                              _mm512_castps_si512(_mm512_sub_ps(_mm512_add_ps(a, big), big)));
    return _mm512_castsi512_ps(_mm512_or_si512(r, sign));
}

DSA__AVX512 static void dsa__query_round_avx512(dsa_type format, int hadamard, int32_t n_heads, int32_t dim, const float *q, const float *w,
                                                float *x, float *v)
{
    const __m512i nan = _mm512_set1_epi32(0x7F800000);
    int32_t h, d;
    if (dim % 16 != 0 || (format != DSA_FP8 && format != DSA_INT8)) {
        dsa__round_heads(format, hadamard, n_heads, dim, q, w, x, v);
        return;
    }
    for (h = 0; h < n_heads; h++, x += dim) {
        __m512i most = _mm512_setzero_si512();
        __m512 scale;
        __mmask16 nans = 0;
        float amax, s;
        memcpy(x, q + (int64_t)h * dim, sizeof(float) * (size_t)dim);
        if (hadamard) dsa__hadamard_avx512(x, dim);
        for (d = 0; d < dim; d += 16) {
            const __m512i a = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + d)));
            const __mmask16 is = _mm512_cmpgt_epi32_mask(a, nan);
            most = _mm512_mask_max_epi32(most, (__mmask16)~is, most, a);
            nans |= is;
        }
        d = _mm512_reduce_max_epi32(most);
        amax = d >= 0x7F800000 ? FLT_MAX : dsa__from_bits((uint32_t)d);
        s = format == DSA_FP8 ? dsa__e4m3_scale(&amax, 1) : nans ? dsa__nan() : dsa__int8_scale(&amax, 1);
        scale = _mm512_set1_ps(s);
        for (d = 0; d < dim; d += 16) {
            const __m512 y = _mm512_div_ps(_mm512_loadu_ps(x + d), scale);
            if (format == DSA_FP8) {
                _mm512_storeu_ps(x + d, dsa__round_e4m3_avx512(y));
            } else {                         /* dsa__int8_value; NaN fails both comparisons and the mask makes it 0 */
                const __m512 magic = _mm512_set1_ps(12582912.0f);
                __m512 z = _mm512_max_ps(_mm512_min_ps(y, _mm512_set1_ps(127.0f)), _mm512_set1_ps(-127.0f));
                z = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, y, _CMP_ORD_Q), z);
                _mm512_storeu_ps(x + d, _mm512_sub_ps(_mm512_add_ps(z, magic), magic));
            }
        }
        v[h] = w[h] * s;
    }
}

/* How one format is scored on a CPU of a given level: 0 AVX-512 F, BW, VL and DQ; 1 also VNNI; 2 also BF16 and VBMI. */
typedef struct dsa__score_how {
    dsa__unit unit;
    int32_t words;                       /* of a key, or of a head of the query */
    int32_t n_vectors;                   /* of 16 heads */
    int32_t n_tables;                    /* vectors at the start of a packed query: constants of the FP8 expansion */
    size_t row_bytes;                    /* of an expanded key; 0: keys are read in place */
    void (*expand)(dsa_type format, int32_t dim, const unsigned char *row, unsigned char *out);
} dsa__score_how;

static dsa__score_how dsa__score_how_avx512(int level, dsa_type format, int32_t n_heads, int32_t dim)
{
    dsa__score_how p = { DSA__UNIT_F32, 0, 0, 0, 0, NULL };
    int32_t per;                         /* dims of a word */
    if (level >= 1 && format == DSA_INT8) p.unit = DSA__UNIT_INT8;
    if (level >= 2 && (format == DSA_BF16 || format == DSA_FP8)) p.unit = DSA__UNIT_BF16;
    per = 1 << (int)p.unit;
    p.words = (dim + per - 1) / per;
    p.n_vectors = (n_heads + 15) / 16;
    if (p.unit == DSA__UNIT_F32) p.expand = format == DSA_F32 ? NULL : dsa__score_widen_avx512;
    else if (format == DSA_FP8) { p.n_tables = 6; p.words = (p.words + 15) / 16 * 16; }      /* whole lines: dsa__expand_fp8_avx512 */
    else if (dim % per != 0) p.expand = dsa__score_copy_avx512;
    if (p.expand || p.n_tables) p.row_bytes = ((size_t)dim + 63) / 64 * 64 * (size_t)(4 / per);
    return p;
}

/* Vectors of heads that the next tile takes. */
static int32_t dsa__score_group_avx512(int32_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* A packed query: the constants of the FP8 expansion; then for each group of vectors where its sums start, its words dim by dim, and
   its weights: in the order in which a tile needs them. */
static size_t dsa__query_bytes_level_avx512(int level, dsa_type format, int32_t n_heads, int32_t dim)
{
    dsa__score_how p = dsa__score_how_avx512(level, format, n_heads, dim);
    return 64 * ((size_t)p.n_tables + (size_t)p.n_vectors * ((size_t)p.words + 2));
}

/* 16 words of a unit from n or more f32 that fit it exactly; zeros behind the last */
DSA__INLINE DSA__AVX512 __m512i dsa__words_avx512(dsa__unit unit, const float *q, int32_t n)
{
    __m512i x[4], even, odd;
    int i;
    for (i = 0; i < 1 << (int)unit; i++)
        x[i] = _mm512_castps_si512(_mm512_maskz_loadu_ps((__mmask16)dsa__first_bits(n - 16 * i), q + 16 * i));
    if (unit == DSA__UNIT_F32) return x[0];
    if (unit == DSA__UNIT_BF16) {            /* the upper halves, in order */
        even = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
                                31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        return _mm512_permutex2var_epi16(x[0], even, x[1]);
    }
    for (i = 0; i < 4; i++) x[i] = _mm512_cvtps_epi32(_mm512_castsi512_ps(x[i]));
    even = _mm512_packs_epi32(x[0], x[1]);
    odd = _mm512_packs_epi32(x[2], x[3]);
    return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), _mm512_packs_epi16(even, odd));
}

/* acc + the four signed bytes of a word */
DSA__INLINE DSA__AVX512 __m512i dsa__add_bytes_avx512(__m512i acc, __m512i x)
{
    const __m512i pairs = _mm512_add_epi16(_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

DSA__AVX512 static void dsa__query_pack_level_avx512(int level, dsa_type format, int32_t n_heads, int32_t dim,
                                                     const float *q, const float *w, void *packed)
{
    dsa__score_how p = dsa__score_how_avx512(level, format, n_heads, dim);
    const int32_t per = 1 << (int)p.unit;
    unsigned char *group = (unsigned char *)packed;
    int32_t v, h, d, c, nv;
    if (p.n_tables) {
        memset(group, 0, 64 * (size_t)p.n_tables);
        for (c = 0; c < 128; c++) {
            uint32_t b = dsa__bits(dsa_e4m3_to_f32((uint8_t)c)) >> 16;
            group[c] = (unsigned char)(b & 255u);
            group[128 + c] = (unsigned char)(b >> 8);
        }
        for (c = 0; c < 8; c++) group[256 + 8 * c] = (unsigned char)(c / 2 + c % 2 * 4);
        memset(group + 320, 128, 64);
        group += 64 * p.n_tables;
    }
    for (v = 0; v < p.n_vectors; v += nv) {
        nv = dsa__score_group_avx512(p.n_vectors - v);
        for (c = 0; c < nv; c++) {           /* 16 heads: 16 words of each at a time, transposed */
            const int32_t first = 16 * (v + c), heads = dsa__min32(n_heads - first, 16);
            const size_t step = 64 * (size_t)nv;
            unsigned char *x = group + 64 * (size_t)c;
            __m512i start = _mm512_setzero_si512(), r[16];
            for (d = 0; d < p.words; d += 16) {
                for (h = 0; h < 16; h++) {
                    r[h] = _mm512_setzero_si512();
                    if (h < heads) r[h] = dsa__words_avx512(p.unit, q + (int64_t)(first + h) * dim + per * d, dim - per * d);
                }
                dsa__transpose_avx512(r);
                for (h = 0; h < 16 && d + h < p.words; h++) {
                    _mm512_storeu_si512(x + step * (size_t)(1 + d + h), r[h]);
                    if (p.unit == DSA__UNIT_INT8) start = dsa__add_bytes_avx512(start, r[h]);
                }
            }
            _mm512_storeu_si512(x, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), start), 7));      /* -128 Sum_d q */
            _mm512_storeu_ps((float *)(void *)(x + step * (size_t)(1 + p.words)),
                             _mm512_maskz_loadu_ps(dsa__lanes_avx512(heads), w + first));
        }
        group += 64 * (size_t)nv * ((size_t)p.words + 2);
    }
}

/* Scratch: part [KEYS / 2], expanded keys [KEYS, row_bytes]. */
static size_t dsa__score_bytes_level_avx512(int level, dsa_type format, int32_t n_heads, int32_t dim)
{
    dsa__score_how p = dsa__score_how_avx512(level, format, n_heads, dim);
    return DSA__KEYS * (32 + p.row_bytes);
}

/* The lane sums of 16 keys, given as 8 vectors of two keys whose halves of each quarter are added already (lanes 0 + 2, 1 + 3).
   Every key adds its lanes in the same order. */
DSA__AVX512 static __m512 dsa__sum_lanes_avx512(const __m512 *x)
{
    __m512 b[4], c[2];
    int i;
    DSA__UNROLL for (i = 0; i < 4; i++) {
        __m512d y = _mm512_castps_pd(x[2 * i]), z = _mm512_castps_pd(x[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(y, z)), _mm512_castpd_ps(_mm512_unpackhi_pd(y, z)));
    }
    DSA__UNROLL for (i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x44), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xEE));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xDD));
}

DSA__AVX512 static void dsa__score_level_avx512(int level, dsa_type format, int32_t n_heads, int32_t dim, int32_t n_q,
                                                const void *const *queries, int32_t n, const unsigned char *const *rows,
                                                const float *scales, float *I, int64_t ldi, void *scratch)
{
    const dsa__score_how p = dsa__score_how_avx512(level, format, n_heads, dim);
    const size_t key_bytes = (size_t)dim * (format == DSA_F32 ? 4 : format == DSA_BF16 ? 2 : 1);
    const unsigned char *at[DSA__KEYS + 16];
    __m512 *part = (__m512 *)scratch;
    unsigned char *expanded = p.row_bytes ? (unsigned char *)(part + DSA__KEYS / 2) : NULL;
    dsa__score_pass c;
    int32_t i, j, v, nv, n_tile;
    /* The last tile is a full one, too: the last key repeated. Only prefetches go behind a full chunk: to where rows would go on. */
    memcpy(at, rows, (size_t)n * sizeof *at);
    for (j = n; j < DSA__KEYS + 16; j++) at[j] = rows[n - 1] + (n < DSA__KEYS ? 0 : (size_t)(j - n + 1) * key_bytes);
    c.bytes = 4 * p.words;
    c.dim = dim;
    c.row_bytes = p.row_bytes;
    c.table = (const __m512i *)queries[0];
    if (scales) for (j = 0; j < n; j += 16) _mm_prefetch((const char *)(scales + j), _MM_HINT_T0);
    if (p.expand) for (j = 0; j < n; j++) p.expand(format, dim, rows[j], expanded + (size_t)j * p.row_bytes);
    for (i = 0; i < n_q; i++) {
        const __m512i *q = (const __m512i *)queries[i] + p.n_tables;
        for (v = 0; v < p.n_vectors; v += nv) {
            dsa__score_tile *tile;
            nv = dsa__score_group_avx512(p.n_vectors - v);
            n_tile = nv == 4 ? 6 : 8;
            c.first = i == 0 && v == 0;
            c.add = v > 0;
            c.heads = dsa__first_bits(n_heads - 16 * v);
            tile = dsa__score_tiles_avx512[p.unit][nv / 2];
            j = 0;
            if (c.first && p.n_tables) {
                dsa__score_first_fp8_avx512(&c, at, expanded, n_tile);
                for (; j + n_tile < n; j += n_tile)
                    dsa__score_tiles_fp8_avx512[nv / 2](&c, at + j, expanded + (size_t)j * p.row_bytes, q, part + j / 2);
            }
            for (; j < n; j += n_tile) tile(&c, at + j, expanded ? expanded + (size_t)j * p.row_bytes : NULL, q, part + j / 2);
            q += nv * (p.words + 2);
        }
        for (j = 0; j < n; j += 16) {
            __mmask16 m = (__mmask16)dsa__first_bits(n - j);
            __m512 s = dsa__sum_lanes_avx512(part + j / 2);
            if (scales) s = _mm512_mul_ps(s, _mm512_maskz_loadu_ps(m, scales + j));
            _mm512_mask_storeu_ps(I + i * ldi + j, m, s);
        }
    }
}

#define DSA__SCORE_ENTRIES(SUFFIX, LEVEL)                                                                                           \
static size_t dsa__query_bytes_##SUFFIX(dsa_type format, int32_t n_heads, int32_t dim)                                              \
{                                                                                                                                   \
    return dsa__query_bytes_level_avx512(LEVEL, format, n_heads, dim);                                                              \
}                                                                                                                                   \
static void dsa__query_pack_##SUFFIX(dsa_type format, int32_t n_heads, int32_t dim, const float *q, const float *w, void *packed)   \
{                                                                                                                                   \
    dsa__query_pack_level_avx512(LEVEL, format, n_heads, dim, q, w, packed);                                                        \
}                                                                                                                                   \
static size_t dsa__score_bytes_##SUFFIX(dsa_type format, int32_t n_heads, int32_t dim)                                              \
{                                                                                                                                   \
    return dsa__score_bytes_level_avx512(LEVEL, format, n_heads, dim);                                                              \
}                                                                                                                                   \
static void dsa__score_##SUFFIX(dsa_type format, int32_t n_heads, int32_t dim, int32_t n_q, const void *const *queries, int32_t n,  \
                                const unsigned char *const *rows, const float *scales, float *I, int64_t ldi, void *scratch)        \
{                                                                                                                                   \
    dsa__score_level_avx512(LEVEL, format, n_heads, dim, n_q, queries, n, rows, scales, I, ldi, scratch);                           \
}
DSA__SCORE_ENTRIES(avx512f, 0)
DSA__SCORE_ENTRIES(avx512vnni, 1)
DSA__SCORE_ENTRIES(avx512, 2)

/* ---- attention (AVX-512) -----------------------------------------------------------------------------------------------------
   A block's two products, logits = rows q^T and out += P V (spec 5), are one tile: 8 broadcast words times up to 3 vectors. A word
   is 4 bytes: one f32, or a pair of bf16 for vdpbf16ps, which adds both products in f32, rounds to even, and takes subnormal
   operands as 0 whatever MXCSR says.

       logits  sum[row][head]    a: word s of 8 rows, where they lie            b: the query, 16 heads to a vector
       values  sum[head][d]      a: p of a row (f32) or of two rows (bf16)      b: V, 48 d at a time, so that it stays in L1

   Every sum is one chain over the words in their order, whatever the tile's width: a head's bits depend on its own numbers only. */

/* How many of n vectors the next tile takes: 3, but 4 as 2 + 2, since 8 chains of one vector are too few to hide the latency. */
static int32_t dsa__tile_cut(int32_t n) { return n == 4 || n == 2 ? 2 : (n < 3 ? n : 3); }

static __inline__ int32_t dsa__word_at(const unsigned char *p) { int32_t w; memcpy(&w, p, 4); return w; }

/* 16 values as f32: bf16, and e4m3 by way of f16, which holds the same bits at an exponent bias of 15 instead of 7, a factor of 2^8,
   subnormals too (as bits of an f32 these would cost Intel an assist). */
DSA__INLINE DSA__AVX512 __m512 dsa__bf16_f32_avx512(__m256i x)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

DSA__INLINE DSA__AVX512 __m512 dsa__e4m3_f32_avx512(__m128i x)
{
    const __m128i low7 = _mm_set1_epi8(0x7F);
    __m256i h = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(x), 7), _mm256_set1_epi16((int16_t)0xBF80));
    h = _mm256_mask_mov_epi16(h, _mm_cmpeq_epi8_mask(_mm_and_si128(x, low7), low7), _mm256_set1_epi16(0x7E00));
    return _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(256.0f));
}

/* 32 e4m3 times 2^e as bf16: their bits moved to bf16's place, and the bias, 128 (e + 120), added to the exponent; subnormals from a
   table of 8: 0, 1, .. 7 times 2^(e-9). */
DSA__INLINE DSA__AVX512 __m512i dsa__e4m3_bf16_avx512(__m256i x, __m512i bias)
{
    const __m512i small = _mm512_castsi128_si512(_mm_set_epi16(0x0060, 0x0040, 0x0020, 0x0000, -0x0040, -0x0080, -0x0100, 0));
    const __m512i table = _mm512_maskz_add_epi16(0xFE, small, bias);
    const __m256i low7 = _mm256_set1_epi8(0x7F);
    const __m512i w = _mm512_cvtepi8_epi16(x), v = _mm512_and_si512(_mm512_slli_epi16(w, 4), _mm512_set1_epi16((int16_t)0x87F0));
    __m512i y = _mm512_add_epi16(v, bias);
    y = _mm512_mask_permutexvar_epi16(y, _mm512_testn_epi16_mask(v, _mm512_set1_epi16(0x780)), w, table);
    y = _mm512_mask_mov_epi16(y, _mm256_cmpeq_epi8_mask(_mm256_and_si256(x, low7), low7), _mm512_set1_epi16(0x7FC0));
    return _mm512_ternarylogic_epi32(y, v, _mm512_set1_epi16(INT16_MIN), 0xF8);              /* y | (v & sign) */
}

/* What is done for later beside the words of a tile, a bit after every 16 of them: there are idle ports, and what would wait for the
   cache between the tiles costs nothing. While logits are made: rows come near, and the next 8 of FP8 become bf16. While values are
   made: the next nv vectors of V are brought together, [words][nv] vectors, of f32 rows or of bf16 pairs of rows. */
typedef struct dsa__attend_aside {
    const unsigned char *ahead[8];                       /* rows to prefetch, a line of each at a time, bytes [0, ahead_last] */
    size_t ahead_last;
    int32_t n_fp8, dims;                                 /* rows to expand, and how many elements of each: a multiple of 32 */
    const unsigned char *fp8[8];
    unsigned char *bf16[8];
    int16_t bias[8][16];                                 /* per row and 128 elements: dsa__e4m3_bf16_avx512 */
    const unsigned char *const *rows;                    /* rows of the block, */
    int32_t n, j, per, d, nv;                            /* n of them; next one; words per turn; columns of V */
    __mmask16 last;                                      /* of the last vector */
    unsigned char *v;                                    /* next word's */
} dsa__attend_aside;

DSA__INLINE DSA__AVX512 void dsa__aside_logits_f32_avx512(const dsa__attend_aside *t, size_t at)
{
    const size_t to = at < t->ahead_last ? at : t->ahead_last;
    int i;
    for (i = 0; i < 8; i++) _mm_prefetch((const char *)t->ahead[i] + to, _MM_HINT_T1);
}

DSA__INLINE DSA__AVX512 void dsa__aside_logits_bf16_avx512(const dsa__attend_aside *t, size_t at)
{
    const size_t d = at / 2;
    int32_t i;
    dsa__aside_logits_f32_avx512(t, at);
    if (d < (size_t)t->dims)
        for (i = 0; i < t->n_fp8; i++) {
            const __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(t->fp8[i] + d));
            _mm512_storeu_si512(t->bf16[i] + at, dsa__e4m3_bf16_avx512(x, _mm512_set1_epi16(t->bias[i][d / 128])));
        }
}

DSA__INLINE DSA__AVX512 void dsa__aside_values_f32_avx512(dsa__attend_aside *t, int32_t words)
{
    int32_t i;
    for (; words > 0 && t->j < t->n; words--, t->j++)
        for (i = 0; i < t->nv; i++, t->v += 64)
            _mm512_storeu_ps((float *)(void *)t->v,
                             _mm512_maskz_loadu_ps(i + 1 < t->nv ? 0xFFFF : t->last, t->rows[t->j] + 4 * (t->d + 16 * i)));
}

DSA__INLINE DSA__AVX512 void dsa__aside_values_bf16_avx512(dsa__attend_aside *t, int32_t words)
{
    const __m512i odd = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,
                                         7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    int32_t i;
    for (; words > 0 && t->j < t->n; words--, t->j += 2) {
        const unsigned char *row = t->rows[t->j] + 2 * t->d, *next = t->j + 1 < t->n ? t->rows[t->j + 1] + 2 * t->d : NULL;
        for (i = 0; i < t->nv; i++, t->v += 64) {
            const __mmask16 mask = i + 1 < t->nv ? 0xFFFF : t->last;
            __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + 32 * i));      /* the last row's partner: zeros */
            if (next) {
                const __m512i y = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, next + 32 * i));
                x = _mm512_mask_permutexvar_epi16(x, 0xAAAAAAAAu, odd, y);
            }
            _mm512_storeu_si512(t->v, x);
        }
    }
}

/* logits: c = f x; values: c = f c + x */
DSA__INLINE DSA__AVX512 void dsa__attend_put_avx512(int logits, float *c, __mmask16 mask, float f, __m512 x)
{
    if (logits) _mm512_storeu_ps(c, _mm512_mul_ps(_mm512_set1_ps(f), x));
    else _mm512_mask_storeu_ps(c, mask, _mm512_fmadd_ps(_mm512_set1_ps(f), _mm512_maskz_loadu_ps(mask, c), x));
}

/* Row i < n, vector v to c + i ldi + v ldv, the last one under a mask. The last word's row ends in its stores: with all 24 behind the
   word they would fill the scheduler while they wait for their sums, and the next tile would wait with them, 45 cycles of 2300. */
#define DSA__ATTEND_TILE(NAME, ISA, UNIT, NV)                                                                                       \
DSA__INLINE ISA void NAME(int logits, int32_t words, const unsigned char *const *a, const unsigned char *b,                         \
                          dsa__attend_aside *aside, int32_t n, const float *f, float *c, size_t ldi, __mmask16 last)                \
{                                                                                                                                   \
    const size_t step = logits ? 4 : 64, end = step * (size_t)(words - 1), ldv = logits ? 16 * DSA__ROWS : 16;                      \
    const unsigned char *k[8];                                                                                                      \
    __m512 sum[8][NV];                                                                                                              \
    __m512i w[NV], x;                                                                                                               \
    size_t at = 0, stop;                                                                                                            \
    int i, v;                                                                                                                       \
    DSA__UNROLL for (i = 0; i < 8; i++) k[i] = logits ? a[i] : a[0] + 4 * i;                                                        \
    DSA__UNROLL for (i = 0; i < 8; i++)                                                                                             \
        DSA__UNROLL for (v = 0; v < NV; v++) sum[i][v] = _mm512_setzero_ps();                                                       \
    while (at < end) {                                                                                                              \
        stop = end - at > 16 * step ? at + 16 * step : end;                                                                         \
        if (logits) dsa__aside_logits_##UNIT##_avx512(aside, at);                                                                   \
        else        dsa__aside_values_##UNIT##_avx512(aside, aside->per);                                                           \
        for (; at < stop; at += step, b += 64 * NV) {                                                                               \
            DSA__UNROLL for (v = 0; v < NV; v++) w[v] = _mm512_loadu_si512(b + 64 * v);                                             \
            DSA__UNROLL for (i = 0; i < 8; i++) {                                                                                   \
                x = _mm512_set1_epi32(dsa__word_at(k[i] + at));                                                                     \
                DSA__UNROLL for (v = 0; v < NV; v++) sum[i][v] = dsa__madd_##UNIT##_avx512(sum[i][v], x, w[v]);                     \
            }                                                                                                                       \
        }                                                                                                                           \
    }                                                                                                                               \
    DSA__UNROLL for (v = 0; v < NV; v++) w[v] = _mm512_loadu_si512(b + 64 * v);                                                     \
    DSA__UNROLL for (i = 0; i < 8; i++) {                                                                                           \
        x = _mm512_set1_epi32(dsa__word_at(k[i] + end));                                                                            \
        DSA__UNROLL for (v = 0; v < NV; v++) sum[i][v] = dsa__madd_##UNIT##_avx512(sum[i][v], x, w[v]);                             \
        if (i < n) {                                                                                                                \
            float *o = c + (size_t)i * ldi, k1 = logits ? f[0] : f[i];                                                              \
            DSA__UNROLL for (v = 0; v < NV; v++)                                                                                    \
                dsa__attend_put_avx512(logits, o + (size_t)v * ldv, v + 1 < NV ? 0xFFFF : last, k1, sum[i][v]);                     \
        }                                                                                                                           \
    }                                                                                                                               \
}

/* Logits of 8 rows and all heads, x [groups of 16 heads, DSA__ROWS, 16] from the first of the rows on; and out of all heads for nv
   vectors of V. Tiles of heads go 8, 0, 24, 16, ..: at a constant stride the prefetcher would run on to the heads that follow, and take
   them from the thread that is working on them: a sixth of P V. */
#define DSA__ATTEND_PRODUCTS(UNIT, ISA)                                                                                             \
DSA__ATTEND_TILE(dsa__attend_tile_##UNIT##_1_avx512, ISA, UNIT, 1)                                                                  \
DSA__ATTEND_TILE(dsa__attend_tile_##UNIT##_2_avx512, ISA, UNIT, 2)                                                                  \
DSA__ATTEND_TILE(dsa__attend_tile_##UNIT##_3_avx512, ISA, UNIT, 3)                                                                  \
static ISA void dsa__attend_logits_##UNIT##_avx512(int32_t groups, int32_t words, const unsigned char *const *rows,                 \
                                                   const unsigned char *q, dsa__attend_aside *aside, int32_t n, float scale, float *x) \
{                                                                                                                                   \
    while (groups > 0) {                                                                                                            \
        int32_t nv = dsa__tile_cut(groups);                                                                                         \
        if (nv == 3)      dsa__attend_tile_##UNIT##_3_avx512(1, words, rows, q, aside, n, &scale, x, 16, 0xFFFF);                   \
        else if (nv == 2) dsa__attend_tile_##UNIT##_2_avx512(1, words, rows, q, aside, n, &scale, x, 16, 0xFFFF);                   \
        else              dsa__attend_tile_##UNIT##_1_avx512(1, words, rows, q, aside, n, &scale, x, 16, 0xFFFF);                   \
        q += (size_t)nv * (size_t)words * 64;                                                                                       \
        x += nv * 16 * DSA__ROWS;                                                                                                   \
        groups -= nv;                                                                                                               \
        aside->ahead_last = 0;                                                                                                      \
        aside->dims = 0;                                                                                                            \
    }                                                                                                                               \
}                                                                                                                                   \
static ISA void dsa__attend_values_##UNIT##_avx512(int32_t nv, int32_t n_heads, int32_t words, dsa__attend_aside *aside,             \
                                                   const float *p, const unsigned char *v, const float *keep, float *out, size_t dim_v, \
                                                   __mmask16 last)                                                                  \
{                                                                                                                                   \
    int32_t at;                                                                                                                     \
    for (at = 0; at < n_heads + 8; at += 8) {                                                                                       \
        const int32_t h = at ^ 8;                                                                                                   \
        const unsigned char *a = (const unsigned char *)(p + h / 16 * (16 * DSA__ROWS) + h % 16);                                   \
        float *o = out + (size_t)h * dim_v;                                                                                         \
        if (h >= n_heads) continue;                                                                                                 \
        if (nv == 3)      dsa__attend_tile_##UNIT##_3_avx512(0, words, &a, v, aside, n_heads - h, keep + h, o, dim_v, last);        \
        else if (nv == 2) dsa__attend_tile_##UNIT##_2_avx512(0, words, &a, v, aside, n_heads - h, keep + h, o, dim_v, last);        \
        else              dsa__attend_tile_##UNIT##_1_avx512(0, words, &a, v, aside, n_heads - h, keep + h, o, dim_v, last);        \
    }                                                                                                                               \
}
DSA__ATTEND_PRODUCTS(f32, DSA__AVX512)
DSA__ATTEND_PRODUCTS(bf16, DSA__AVX512_BF16)

/* e^x for x <= 0 within 1.4 ulp (every float was tried), e^0 = 1; 0 below -87, NaN stays NaN. x = n ln 2 / 16 + r, |r| <= ln 2 / 32:
   e^r by its Taylor polynomial of degree 3 (remainder 1e-8); 2^(n/16) from a table whose bits lack (n % 16) << 19, so that adding
   n << 19 sets the exponent. Whatever comes out below -87 is masked. */
DSA__INLINE DSA__AVX512 __m512 dsa__exp_avx512(__m512 x)
{
    const __m512i table = _mm512_set_epi32(0x3F7D257D, 0x3F7AC0C7, 0x3F78CCDF, 0x3F7744FD, 0x3F76248C, 0x3F75672A, 0x3F7508A4, 0x3F7504F3,
                                           0x3F75583F, 0x3F75FED7, 0x3F76F532, 0x3F7837F0, 0x3F79C3D3, 0x3F7B95C2, 0x3F7DAAC3, 0x3F800000);
    const __m512 round = _mm512_set1_ps(12582912.0f);                       /* 1.5 * 2^23: the low bits of a sum with it are n */
    __m512 y = _mm512_fmadd_ps(x, _mm512_set1_ps(23.0831207f), round), n = _mm512_sub_ps(y, round), r, p, s;
    __m512i k = _mm512_castps_si512(y);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.0433216989f), x);              /* ln 2 / 16 in two parts */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-1.190408952e-10f), r);
    p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.0f / 6.0f), _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    s = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutexvar_epi32(k, table), _mm512_slli_epi32(k, 19)));
    return _mm512_maskz_fmadd_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ), _mm512_mul_ps(s, r), p, s);
}

/* p of two rows to place j of P: as f32, or as bf16 pairs. Rounding to bf16 (2^-9) is what P V may cost. */
DSA__INLINE DSA__AVX512 void dsa__put_p_f32_avx512(float *x, int32_t j, __m512 p, __m512 p1)
{
    _mm512_storeu_ps(x + j * 16, p);
    _mm512_storeu_ps(x + j * 16 + 16, p1);
}

DSA__INLINE DSA__AVX512_BF16 void dsa__put_p_bf16_avx512(float *x, int32_t j, __m512 p, __m512 p1)
{
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(x + j * 8, _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(p1, p)));
}

/* Online softmax of 16 heads (those in mask): logits x [n, 16] become P in place, keep [16] = e^(m - m'). The sum takes p before it is
   rounded: p that all round the same way would put lse off by up to 2^-9, twice what FlashMLA's tolerance grants it at 2048 rows.
   The max gives its second operand when one is NaN, and so passes a NaN logit over; its p makes the head NaN. As long as there was
   nothing but -inf, 0 stands for the max, so that p and keep are 0. */
#define DSA__SOFTMAX(UNIT, ISA)                                                                                                     \
static ISA void dsa__softmax_##UNIT##_avx512(int32_t n, __mmask16 mask, float *x, float *max, float *sum, float *keep)              \
{                                                                                                                                   \
    const __m512 none = _mm512_set1_ps(-dsa__infinity());                                                                           \
    __m512 m0 = _mm512_mask_loadu_ps(none, mask, max), m = m0, m1 = m0, base, k, p, p1, add = _mm512_setzero_ps();                  \
    int32_t j;                                                                                                                      \
    for (j = 0; j < n; j += 2) {                                                                                                    \
        m = _mm512_max_ps(_mm512_loadu_ps(x + j * 16), m);                                                                          \
        if (j + 1 < n) m1 = _mm512_max_ps(_mm512_loadu_ps(x + j * 16 + 16), m1);                                                    \
    }                                                                                                                               \
    m = _mm512_max_ps(m, m1);                                                                                                       \
    base = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(m, none, _CMP_NEQ_UQ), m);                                                        \
    for (j = 0; j < n; j += 2) {                                                                                                    \
        p = dsa__exp_avx512(_mm512_sub_ps(_mm512_loadu_ps(x + j * 16), base));                                                      \
        p1 = _mm512_setzero_ps();                                                                                                   \
        if (j + 1 < n) p1 = dsa__exp_avx512(_mm512_sub_ps(_mm512_loadu_ps(x + j * 16 + 16), base));                                 \
        add = _mm512_add_ps(_mm512_add_ps(add, p), p1);                                                                             \
        dsa__put_p_##UNIT##_avx512(x, j, p, p1);                                                                                    \
    }                                                                                                                               \
    k = dsa__exp_avx512(_mm512_sub_ps(m0, base));                                                                                   \
    _mm512_mask_storeu_ps(sum, mask, _mm512_fmadd_ps(k, _mm512_maskz_loadu_ps(mask, sum), add));                                    \
    _mm512_mask_storeu_ps(max, mask, m);                                                                                            \
    _mm512_storeu_ps(keep, k);                                                                                                      \
}
DSA__SOFTMAX(f32, DSA__AVX512)
DSA__SOFTMAX(bf16, DSA__AVX512_BF16)

/* A cache row as f32 or bf16. Up to 31 elements behind it are written too, the first one 0: partner of an odd row's last element. */
static DSA__AVX512 void dsa__expand_f32_avx512(const dsa__attend_shape *s, const unsigned char *row, unsigned char *out)
{
    int32_t R = s->dim_latent, r = s->dim_rope, d;
    float *y = (float *)(void *)out, scale;
    if (s->format == DSA_FP8) {
        for (d = 0; d < R; d += 16) {
            __m128i x = d + 16 <= R ? _mm_loadu_si128((const __m128i *)(const void *)(row + d))
                                    : _mm_maskz_loadu_epi8((__mmask16)dsa__first_bits(R - d), row + d);
            memcpy(&scale, row + R + d / 128 * 4, 4);
            _mm512_storeu_ps(y + d, _mm512_mul_ps(dsa__e4m3_f32_avx512(x), _mm512_set1_ps(scale)));
        }
        row += R + (R + 127) / 128 * 4;
        y += R;
    } else {
        r += R;
    }
    for (d = 0; d < r; d += 16)
        _mm512_storeu_ps(y + d, dsa__bf16_f32_avx512(_mm256_maskz_loadu_epi16((__mmask16)dsa__first_bits(r - d), row + 2 * d)));
}

/* The last R % 32 elements of the latent part, and all of the rest, if its scales are powers of two as dsa.h writes them: then the
   products are exact in bf16, and integers make them, later, as `aside` says. With other scales the whole row now; products are rounded
   twice, to f32 and to bf16. */
static DSA__AVX512_BF16 void dsa__expand_bf16_avx512(const dsa__attend_shape *s, const unsigned char *row, unsigned char *y,
                                                     dsa__attend_aside *aside)
{
    int32_t R = s->dim_latent, r = s->dim_rope, n = (R + 127) / 128, d = 0;
    float scale;
    if (s->format == DSA_FP8) {
        const __mmask16 m = (__mmask16)dsa__first_bits(n);
        const __m512i bits = _mm512_maskz_loadu_epi32(m, row + R), e = _mm512_srai_epi32(bits, 23);     /* a sign bit makes e < 0 */
        const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7FFFFF)) |
                              _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(28)) | _mm512_cmpgt_epi32_mask(e, _mm512_set1_epi32(226));
        if (n <= 16 && !(m & odd)) {
            const __m512i shift = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(7)), 7);
            int16_t *bias = aside->bias[aside->n_fp8];
            _mm256_storeu_si256((__m256i *)(void *)bias, _mm512_cvtepi32_epi16(shift));
            aside->fp8[aside->n_fp8] = row;
            aside->bf16[aside->n_fp8++] = y;
            aside->dims = d = R / 32 * 32;
            if (d < R) {
                const __m256i x = _mm256_maskz_loadu_epi8((__mmask32)dsa__first_bits(R - d), row + d);
                _mm512_storeu_si512(y + 2 * d, dsa__e4m3_bf16_avx512(x, _mm512_set1_epi16(bias[d / 128])));
            }
        } else {
            for (; d < R; d += 16) {
                __m512 x = dsa__e4m3_f32_avx512(_mm_maskz_loadu_epi8((__mmask16)dsa__first_bits(R - d), row + d));
                memcpy(&scale, row + R + d / 128 * 4, 4);
                _mm256_storeu_si256((__m256i *)(void *)(y + 2 * d), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(x, _mm512_set1_ps(scale))));
            }
        }
        row += R + n * 4;
        y += 2 * R;
    } else {
        r += R;
    }
    for (d = 0; d < r; d += 32) _mm512_storeu_si512(y + 2 * d, _mm512_maskz_loadu_epi16((__mmask32)dsa__first_bits(r - d), row + 2 * d));
    memset(y + 2 * r, 0, 2);
}

/* 16 words of a head that has n elements left, the absent ones 0 */
DSA__INLINE DSA__AVX512 __m512i dsa__words_f32_avx512(const float *q, int32_t n)
{
    return _mm512_castps_si512(_mm512_maskz_loadu_ps((__mmask16)dsa__first_bits(n), q));
}

DSA__INLINE DSA__AVX512_BF16 __m512i dsa__words_bf16_avx512(const float *q, int32_t n)
{
    const uint32_t bits = (uint32_t)dsa__first_bits(n);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps((__mmask16)(bits >> 16), q + 16), _mm512_maskz_loadu_ps((__mmask16)bits, q));
}

/* The query: [tiles of nv vectors][words][nv][16 heads], absent heads 0. 16 words of 16 heads at a time, transposed (the scatter that it
   replaces took a percent of the attention). */
#define DSA__ATTEND_PACK(UNIT, ISA, PER)                                                                                            \
static ISA void dsa__attend_pack_##UNIT##_avx512(const dsa__attend_shape *s, const float *q, unsigned char *packed)                 \
{                                                                                                                                   \
    const int32_t dim = s->dim_latent + s->dim_rope, words = (dim + PER - 1) / PER, groups = (s->n_heads + 15) / 16;                \
    int32_t v, nv = 0, first = 0, at, i;                                                                                            \
    for (v = 0; v < groups; v++) {                                                                                                  \
        if (v == first + nv) { first = v; nv = dsa__tile_cut(groups - v); }                                                         \
        for (at = 0; at < words; at += 16) {                                                                                        \
            __m512i r[16];                                                                                                          \
            for (i = 0; i < 16; i++) {                                                                                              \
                const int32_t h = v * 16 + i;                                                                                       \
                r[i] = _mm512_setzero_si512();                                                                                      \
                if (h < s->n_heads) r[i] = dsa__words_##UNIT##_avx512(q + (int64_t)h * dim + at * PER, dim - at * PER);             \
            }                                                                                                                       \
            dsa__transpose_avx512(r);                                                                                               \
            for (i = 0; i < 16 && at + i < words; i++)                                                                              \
                _mm512_storeu_si512(packed + ((int64_t)first * words + (int64_t)(at + i) * nv + v - first) * 64, r[i]);             \
        }                                                                                                                           \
    }                                                                                                                               \
}
DSA__ATTEND_PACK(f32, DSA__AVX512, 1)
DSA__ATTEND_PACK(bf16, DSA__AVX512_BF16, 2)

/* Where everything is. bf16: the products are made of bf16 pairs. Rows are read in place, or expanded to what the products take: of
   bf16 also those with an odd number of elements, whose last pair would reach beyond the row, and that may end where memory does. */
typedef struct dsa__attend_how {
    int32_t groups, words, in_place;
    size_t row_bytes, width;                             /* of a cache row; of an expanded one */
    size_t query, x, v, rows;                            /* bytes of the query and of each part of the scratch */
} dsa__attend_how;

static dsa__attend_how dsa__attend_how_avx512(int bf16, const dsa__attend_shape *s)
{
    const int32_t R = s->dim_latent, r = s->dim_rope;
    dsa__attend_how p;
    p.groups = (s->n_heads + 15) / 16;
    p.words = bf16 ? (R + r + 1) / 2 : R + r;
    p.in_place = s->format == DSA_F32 || (s->format == DSA_BF16 && bf16 && (R + r) % 2 == 0);
    p.row_bytes = (size_t)(s->format == DSA_F32 ? 4 * (R + r) : (s->format == DSA_BF16 ? 2 * (R + r) : R + (R + 127) / 128 * 4 + 2 * r));
    p.width = ((size_t)(R + r) + 63) / 32 * 32 * (bf16 ? 2 : 4);
    p.query = (size_t)p.groups * (size_t)p.words * 64;
    p.x = (size_t)p.groups * DSA__ROWS * 64;
    p.v = (size_t)DSA__ROWS * (bf16 ? 96 : 192);         /* 48 columns, twice */
    p.rows = p.in_place ? 0 : DSA__ROWS * p.width;
    return p;
}

static size_t dsa__attend_bytes_unit_avx512(int bf16, const dsa__attend_shape *s)
{
    const dsa__attend_how p = dsa__attend_how_avx512(bf16, s);
    return p.x + 2 * p.v + p.rows + (size_t)p.groups * 64;
}

/* Makes rows [j, j + 8) of the block ready for the products, FP8 rows but for what `aside` shall do. */
static void dsa__attend_rows_avx512(int bf16, const dsa__attend_shape *s, const dsa__attend_how *p, int32_t n,
                                    const unsigned char *const *rows, int32_t j, unsigned char *expanded, const unsigned char **kv,
                                    dsa__attend_aside *aside)
{
    int32_t i;
    aside->n_fp8 = aside->dims = 0;
    for (i = j; i < j + 8; i++) {
        const int32_t row = dsa__min32(i, n - 1);                               /* the last tile's spare rows repeat its last row */
        kv[i] = p->in_place ? rows[row] : expanded + (size_t)row * p->width;
        if (p->in_place || i >= n) continue;
        if (bf16) dsa__expand_bf16_avx512(s, rows[i], expanded + (size_t)i * p->width, aside);
        else      dsa__expand_f32_avx512(s, rows[i], expanded + (size_t)i * p->width);
    }
}

/* What `aside` shall bring together next: columns d and on of V. */
static void dsa__attend_columns(dsa__attend_aside *aside, int32_t d, int32_t dim_v, unsigned char *v)
{
    aside->d = d;
    aside->j = d < dim_v ? 0 : aside->n;
    aside->nv = dsa__tile_cut((dim_v - d + 15) / 16);
    aside->last = (__mmask16)dsa__first_bits(d < dim_v ? dim_v - d - 16 * (aside->nv - 1) : 0);
    aside->v = v;
}

/* The first rows and columns have no tile before them, and the last words of a column may find no turn: all that is left, now. */
static DSA__AVX512_BF16 void dsa__aside_rows_avx512(const dsa__attend_aside *aside)
{
    size_t at;
    for (at = 0; at < 2 * (size_t)aside->dims; at += 64) dsa__aside_logits_bf16_avx512(aside, at);
}

static DSA__AVX512 void dsa__aside_columns_avx512(int bf16, dsa__attend_aside *aside)
{
    if (bf16) dsa__aside_values_bf16_avx512(aside, DSA__ROWS);
    else      dsa__aside_values_f32_avx512(aside, DSA__ROWS);
}

static DSA__AVX512 void dsa__attend_unit_avx512(int bf16, const dsa__attend_shape *s, const void *packed, int32_t n, int32_t n_ahead,
                                                const unsigned char *const *rows, float *max, float *sum, float *out, void *scratch)
{
    const dsa__attend_how p = dsa__attend_how_avx512(bf16, s);
    float *x = (float *)scratch, *keep = (float *)(void *)((unsigned char *)scratch + p.x);            /* x: logits, then P */
    unsigned char *v = (unsigned char *)(keep + p.groups * 16), *v_next = v + p.v, *expanded = v + 2 * p.v;
    const unsigned char *q = (const unsigned char *)packed, *kv[DSA__ROWS + 8];
    const int32_t words = bf16 ? (n + 1) / 2 : n, turns = (words + 14) / 16 * ((s->n_heads + 7) / 8);
    int32_t j, i, d, nv;
    dsa__attend_aside aside;

    /* All the block's pages at once: a row in a page that no TLB knows costs 350 cycles of its own, 70 among many. Under a hypervisor
       that backs memory with 4 KiB pages this is so for huge pages too. Of the first rows all lines. */
    for (j = 0; j < n + n_ahead; j++) {
        for (d = 0; j < 16 && d < (int32_t)p.row_bytes; d += 64) _mm_prefetch((const char *)rows[j] + d, _MM_HINT_T1);
        _mm_prefetch((const char *)rows[j], _MM_HINT_T1);
        _mm_prefetch((const char *)rows[j] + p.row_bytes - 1, _MM_HINT_T1);
    }
    for (i = 0; i < 8; i++) aside.ahead[i] = rows[0];
    aside.ahead_last = 0;
    dsa__attend_rows_avx512(bf16, s, &p, n, rows, 0, expanded, kv, &aside);
    if (bf16) dsa__aside_rows_avx512(&aside);
    for (j = 0; j < n; j += 8) {
        if (j + 8 < n) dsa__attend_rows_avx512(bf16, s, &p, n, rows, j + 8, expanded, kv, &aside);
        for (i = 0; i < 8; i++) aside.ahead[i] = rows[dsa__min32(j + 16 + i, n + n_ahead - 1)];
        aside.ahead_last = p.row_bytes - 1;
        if (bf16) dsa__attend_logits_bf16_avx512(p.groups, p.words, kv + j, q, &aside, n - j, s->scale, x + j * 16);
        else      dsa__attend_logits_f32_avx512(p.groups, p.words, kv + j, q, &aside, n - j, s->scale, x + j * 16);
    }
    for (i = 0; i < p.groups; i++) {
        float *xi = x + (size_t)i * (16 * DSA__ROWS);
        const __mmask16 heads = (__mmask16)dsa__first_bits(s->n_heads - 16 * i);
        if (bf16) dsa__softmax_bf16_avx512(n, heads, xi, max + i * 16, sum + i * 16, keep + i * 16);
        else      dsa__softmax_f32_avx512(n, heads, xi, max + i * 16, sum + i * 16, keep + i * 16);
    }
    aside.rows = kv;
    aside.n = n;
    aside.per = turns > 0 ? (words + turns - 1) / turns : 0;
    dsa__attend_columns(&aside, 0, s->dim_v, v);
    for (d = 0; d < s->dim_v; d += nv * 16) {
        const __mmask16 last = aside.last;
        unsigned char *now = v;
        dsa__aside_columns_avx512(bf16, &aside);
        nv = aside.nv;
        v = v_next;
        v_next = now;
        dsa__attend_columns(&aside, d + nv * 16, s->dim_v, v);
        if (bf16) dsa__attend_values_bf16_avx512(nv, s->n_heads, words, &aside, x, now, keep, out + d, (size_t)s->dim_v, last);
        else      dsa__attend_values_f32_avx512(nv, s->n_heads, words, &aside, x, now, keep, out + d, (size_t)s->dim_v, last);
    }
}

#define DSA__ATTEND_ENTRIES(SUFFIX, BF16)                                                                                           \
static size_t dsa__attend_query_bytes_##SUFFIX(const dsa__attend_shape *s) { return dsa__attend_how_avx512(BF16, s).query; }        \
static size_t dsa__attend_bytes_##SUFFIX(const dsa__attend_shape *s) { return dsa__attend_bytes_unit_avx512(BF16, s); }             \
static void dsa__attend_pack_##SUFFIX(const dsa__attend_shape *s, const float *q, void *packed)                                     \
{                                                                                                                                   \
    if (BF16) dsa__attend_pack_bf16_avx512(s, q, (unsigned char *)packed);                                                          \
    else      dsa__attend_pack_f32_avx512(s, q, (unsigned char *)packed);                                                           \
}                                                                                                                                   \
static void dsa__attend_##SUFFIX(const dsa__attend_shape *s, const void *packed, int32_t n, int32_t n_ahead,                        \
                                 const unsigned char *const *rows, float *max, float *sum, float *out, void *scratch)               \
{                                                                                                                                   \
    dsa__attend_unit_avx512(BF16, s, packed, n, n_ahead, rows, max, sum, out, scratch);                                             \
}
DSA__ATTEND_ENTRIES(avx512f, 0)
DSA__ATTEND_ENTRIES(avx512, !s->exact)
#if !defined(__clang__)
#  pragma GCC diagnostic pop
#endif
#endif

/* ============================================================================================
   >>avx512_matmul                            the layer's projections with AVX-512
   ============================================================================================
   What >>matmul asks of an ISA. e4m3 is dealt out 32 columns at a time, even before odd, as two of them in a word become two f32 by
   a shift and a mask; all else keeps its order. So an FP8 weight's sums differ from those of the same weight in f32 in their order. */
#if defined(DSA__X86)
#if !defined(__clang__)                      /* as in >>avx512 */
#  pragma GCC diagnostic push
#  pragma GCC diagnostic ignored "-Wuninitialized"
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

/* With VBMI: the bytes of a bf16, which holds every e4m3, are looked up among 128 each. */
typedef struct dsa__e4m3_tables { __m512i low[2], high[2], order; } dsa__e4m3_tables;

DSA__INLINE DSA__AVX512_FP8 void dsa__e4m3_tables_vbmi(dsa__e4m3_tables *t)
{
    const __m512i bytes = _mm512_set_epi64(0x3F3E3D3C3B3A3938, 0x3736353433323130, 0x2F2E2D2C2B2A2928, 0x2726252423222120,
                                           0x1F1E1D1C1B1A1918, 0x1716151413121110, 0x0F0E0D0C0B0A0908, 0x0706050403020100);
    int i;
    DSA__UNROLL for (i = 0; i < 2; i++) {                /* bf16 of eeeemmm is 0eeeemmm0000 + (120 << 7) */
        __m512i code = _mm512_add_epi8(bytes, _mm512_set1_epi8((char)(64 * i)));
        t->low[i] = _mm512_and_si512(_mm512_slli_epi16(code, 4), _mm512_set1_epi8((char)0xF0));
        t->high[i] = _mm512_add_epi8(_mm512_and_si512(_mm512_srli_epi16(code, 4), _mm512_set1_epi8(0x0F)), _mm512_set1_epi8(0x3C));
    }
    /* but 0, the subnormals 1 .. 7 times 2^-9, and NaN */
    t->low[0] = _mm512_mask_set1_epi64(t->low[0], 1, 0x60402000C0800000);
    t->high[0] = _mm512_mask_set1_epi64(t->high[0], 1, 0x3C3C3C3C3B3B3B00);
    t->low[1] = _mm512_mask_set1_epi8(t->low[1], UINT64_C(1) << 63, (char)0xC0);
    t->high[1] = _mm512_mask_set1_epi8(t->high[1], UINT64_C(1) << 63, 0x7F);
    t->order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
}

/* Without: nothing to look up. */
DSA__INLINE DSA__AVX512 void dsa__e4m3_tables_f16(dsa__e4m3_tables *t) { (void)t; }

/* 64 columns of a row of W, those from `left` on 0, as four vectors. */
DSA__INLINE DSA__AVX512 void dsa__widen64_f16(dsa_type type, const dsa__e4m3_tables *t, const unsigned char *p, int64_t left, __m512 *v)
{
    int j;
    (void)t;
    if (type == DSA_FP8) {
        /* e4m3 seeeemmm becomes the f16 s0eeeemmm0000000, 2^-8 of it, as in >>avx2. A product or an arithmetic shift brings the bits
           there, and a NaN's all-ones are carried into the exponent. */
        __m512i b = left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(dsa__first_bits(left), p), h[2];
        h[0] = _mm512_maddubs_epi16(_mm512_set1_epi16(128), b);                  /* even bytes */
        h[1] = _mm512_srai_epi16(b, 1);                                          /* odd bytes */
        DSA__UNROLL for (j = 0; j < 2; j++) {
            __m512i nan = _mm512_add_epi16(_mm512_and_si512(h[j], _mm512_set1_epi16(0x3F80)), _mm512_set1_epi16(0x0080));
            h[j] = _mm512_ternarylogic_epi32(_mm512_set1_epi16((short)0xBF80), h[j], nan, 0xCA);
        }
        DSA__UNROLL for (j = 0; j < 4; j++) {
            __m256i half = j < 2 ? _mm512_castsi512_si256(h[j & 1]) : _mm512_extracti64x4_epi64(h[j & 1], 1);
            v[j] = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
        }
        return;
    }
    DSA__UNROLL for (j = 0; j < 4; j++) {
        const __mmask16 m = left >= 64 ? 0xFFFF : dsa__lanes_avx512(dsa__max64(left - 16 * j, 0));
        if (type == DSA_F32)       v[j] = _mm512_maskz_loadu_ps(m, p + 64 * j);
        else if (type == DSA_BF16) v[j] = dsa__bf16_f32_avx512(_mm256_maskz_loadu_epi16(m, p + 32 * j));
        else                       v[j] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p + 32 * j));
    }
}

DSA__INLINE DSA__AVX512_FP8 void dsa__widen64_vbmi(dsa_type type, const dsa__e4m3_tables *t, const unsigned char *p, int64_t left,
                                                   __m512 *v)
{
    __m512i b, low, high, w[2];
    int j;
    if (type != DSA_FP8) {
        dsa__widen64_f16(type, t, p, left, v);
        return;
    }
    b = left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(dsa__first_bits(left), p);
    b = _mm512_permutexvar_epi64(t->order, b);           /* so that interleaving quarters gives columns in order */
    low = _mm512_permutex2var_epi8(t->low[0], b, t->low[1]);
    high = _mm512_permutex2var_epi8(t->high[0], b, t->high[1]);
    high = _mm512_ternarylogic_epi32(high, b, _mm512_set1_epi8((char)0x80), 0xF8);
    w[0] = _mm512_unpacklo_epi8(low, high);
    w[1] = _mm512_unpackhi_epi8(low, high);
    DSA__UNROLL for (j = 0; j < 2; j++) {
        v[2 * j] = _mm512_castsi512_ps(_mm512_slli_epi32(w[j], 16));
        v[2 * j + 1] = _mm512_castsi512_ps(_mm512_and_si512(w[j], _mm512_set1_epi32((int)0xFFFF0000u)));
    }
}

DSA__AVX512 static void dsa__matmul_deal_avx512(dsa_type type, int64_t n, const float *x, const unsigned char *scale, float *to,
                                                int64_t stride)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    int64_t i;
    for (i = 0; i < dsa__up64(n); i += 32, to += 2 * stride) {
        __m512 a, b;
        if (i + 32 <= n) {
            a = _mm512_loadu_ps(x + i);
            b = _mm512_loadu_ps(x + i + 16);
        } else {
            a = _mm512_maskz_loadu_ps(dsa__lanes_avx512(dsa__max64(n - i, 0)), x + i);
            b = _mm512_maskz_loadu_ps(dsa__lanes_avx512(dsa__max64(n - i - 16, 0)), x + i + 16);
        }
        if (scale) {
            const __m512 s = _mm512_set1_ps(dsa__float_at(scale + i / 128 * 4));
            a = _mm512_mul_ps(a, s);
            b = _mm512_mul_ps(b, s);
        }
        if (type == DSA_FP8) {
            __m512 both = a;
            a = _mm512_permutex2var_ps(both, even, b);
            b = _mm512_permutex2var_ps(both, odd, b);
        }
        _mm512_storeu_ps(to, a);
        _mm512_storeu_ps(to + stride, b);
    }
}

DSA__AVX512 static void dsa__matmul_undeal_avx512(dsa_type type, int64_t n, const float *x, float *y)
{
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    int64_t i;
    for (i = 0; i < n; i += 32) {
        __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + 16), both = a;
        if (type == DSA_FP8) {
            a = _mm512_permutex2var_ps(both, first, b);
            b = _mm512_permutex2var_ps(both, second, b);
        }
        _mm512_mask_storeu_ps(y + i, dsa__lanes_avx512(n - i), a);
        _mm512_mask_storeu_ps(y + i + 16, dsa__lanes_avx512(dsa__max64(n - i - 16, 0)), b);
    }
}

/* y[o] = the sum of the lanes of c[o] for 4 outputs: halves, quarters, then within a quarter. */
DSA__INLINE DSA__AVX512 __m128 dsa__sum4_avx512(__m512 c0, __m512 c1, __m512 c2, __m512 c3)
{
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(c0, c1, 0x44), _mm512_shuffle_f32x4(c0, c1, 0xEE));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(c2, c3, 0x44), _mm512_shuffle_f32x4(c2, c3, 0xEE));
    a = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4E));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xB1));
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, a));
}

/* 4 rows x `tall` columns of vectors in registers: 24 sums hide the latency of two fma units. */
DSA__INLINE DSA__AVX512 void dsa__matmul_tile_as_avx512(const int32_t tall, int64_t steps, const float *w, const float *x, float *c,
                                                        int first, int last, int64_t n_out, float *y, int64_t ldy)
{
    __m512 s[24];
    int32_t i, t;
    DSA__UNROLL for (i = 0; i < 4 * tall; i++) s[i] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + 16 * i);
    for (; steps > 0; steps--, w += 64, x += 16 * tall) {
        const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16), w2 = _mm512_loadu_ps(w + 32), w3 = _mm512_loadu_ps(w + 48);
        DSA__UNROLL for (t = 0; t < tall; t++) {
            const __m512 v = _mm512_loadu_ps(x + 16 * t);
            s[4 * t] = _mm512_fmadd_ps(w0, v, s[4 * t]);
            s[4 * t + 1] = _mm512_fmadd_ps(w1, v, s[4 * t + 1]);
            s[4 * t + 2] = _mm512_fmadd_ps(w2, v, s[4 * t + 2]);
            s[4 * t + 3] = _mm512_fmadd_ps(w3, v, s[4 * t + 3]);
        }
    }
    if (last) {
        DSA__UNROLL for (t = 0; t < tall; t++)
            _mm_mask_storeu_ps(y + t * ldy, (__mmask8)((1u << n_out) - 1u),
                               dsa__sum4_avx512(s[4 * t], s[4 * t + 1], s[4 * t + 2], s[4 * t + 3]));
        return;
    }
    DSA__UNROLL for (i = 0; i < 4 * tall; i++) _mm512_storeu_ps(c + 16 * i, s[i]);
}

DSA__AVX512 static void dsa__matmul_tile_avx512(int32_t tall, int64_t steps, const float *w, const float *x, float *c, int first, int last,
                                                int64_t n_out, float *y, int64_t ldy)
{
    switch (tall) {
    case 1: dsa__matmul_tile_as_avx512(1, steps, w, x, c, first, last, n_out, y, ldy); break;
    case 2: dsa__matmul_tile_as_avx512(2, steps, w, x, c, first, last, n_out, y, ldy); break;
    case 3: dsa__matmul_tile_as_avx512(3, steps, w, x, c, first, last, n_out, y, ldy); break;
    case 4: dsa__matmul_tile_as_avx512(4, steps, w, x, c, first, last, n_out, y, ldy); break;
    case 5: dsa__matmul_tile_as_avx512(5, steps, w, x, c, first, last, n_out, y, ldy); break;
    default: dsa__matmul_tile_as_avx512(6, steps, w, x, c, first, last, n_out, y, ldy); break;
    }
}

DSA__INLINE DSA__AVX512 void dsa__matmul_tile_t_as_avx512(const int32_t tall, int64_t n, const float *a, int64_t lda, const float *w,
                                                          int64_t ldw, float *c, int64_t ldc)
{
    const float *a3 = tall > 3 ? a + 3 * lda : a;
    __m512 s[24];
    int32_t t, j;
    DSA__UNROLL for (t = 0; t < tall; t++)
        DSA__UNROLL for (j = 0; j < 4; j++) s[4 * t + j] = _mm512_loadu_ps(c + t * ldc + 16 * j);
    for (; n > 0; n--, a++, a3++, w += ldw) {
        const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16), w2 = _mm512_loadu_ps(w + 32), w3 = _mm512_loadu_ps(w + 48);
        DSA__UNROLL for (t = 0; t < tall; t++) {
            const __m512 v = _mm512_set1_ps(t < 3 ? a[t * lda] : a3[(t - 3) * lda]);
            s[4 * t] = _mm512_fmadd_ps(v, w0, s[4 * t]);
            s[4 * t + 1] = _mm512_fmadd_ps(v, w1, s[4 * t + 1]);
            s[4 * t + 2] = _mm512_fmadd_ps(v, w2, s[4 * t + 2]);
            s[4 * t + 3] = _mm512_fmadd_ps(v, w3, s[4 * t + 3]);
        }
    }
    DSA__UNROLL for (t = 0; t < tall; t++)
        DSA__UNROLL for (j = 0; j < 4; j++) _mm512_storeu_ps(c + t * ldc + 16 * j, s[4 * t + j]);
}

DSA__AVX512 static void dsa__matmul_tile_t_avx512(int32_t tall, int64_t n, const float *a, int64_t lda, const float *w, int64_t ldw,
                                                  float *c, int64_t ldc)
{
    switch (tall) {
    case 1: dsa__matmul_tile_t_as_avx512(1, n, a, lda, w, ldw, c, ldc); break;
    case 2: dsa__matmul_tile_t_as_avx512(2, n, a, lda, w, ldw, c, ldc); break;
    case 3: dsa__matmul_tile_t_as_avx512(3, n, a, lda, w, ldw, c, ldc); break;
    case 4: dsa__matmul_tile_t_as_avx512(4, n, a, lda, w, ldw, c, ldc); break;
    case 5: dsa__matmul_tile_t_as_avx512(5, n, a, lda, w, ldw, c, ldc); break;
    default: dsa__matmul_tile_t_as_avx512(6, n, a, lda, w, ldw, c, ldc); break;
    }
}

/* The three functions that read W.

   dots: four runs of rows at a time, since long streams are what the prefetchers can follow, and four sums hide the latency; a run
   that is shorter does its last row again. Where x overflows L1, or expanding takes about as long as reading, asking for W a page
   ahead makes 22 of 20 and 20 of 16 GB/s (Zen 4, bf16 and FP8, one thread, of 31); where the machine's own prefetchers have nothing
   to disturb them, it would make 22 of 30.

   axpys: one row at a time, so that W is read strictly in order: its rows are short, 1 KB at 512 columns of bf16, and four at a
   time, which would spare loads and stores of c, took twice as long. 16 rows ahead is 8 to 16 KB. */
#define DSA__MATMUL_AVX512(SUFFIX, ISA, E4M3)                                                                                       \
DSA__INLINE ISA void dsa__matmul_dots_as_##SUFFIX(const dsa_type type, int64_t in, int64_t n_out, const unsigned char *w,           \
                                                  const float *x, float *y)                                                         \
{                                                                                                                                   \
    const int64_t size = dsa__type_bytes(type), runs = (n_out + 3) / 4;                                                             \
    const int ahead = type == DSA_FP8 || in > 4096;                                                                                 \
    dsa__e4m3_tables tables;                                                                                                        \
    int64_t o, i, row[4];                                                                                                           \
    int r, j;                                                                                                                       \
    if (type == DSA_FP8) dsa__e4m3_tables_##E4M3(&tables);                                                                          \
    for (o = 0; o < runs; o++) {                                                                                                    \
        __m512 s[4], v[4], u[4];                                                                                                    \
        const unsigned char *p[4];                                                                                                  \
        float sums[4];                                                                                                              \
        DSA__UNROLL for (r = 0; r < 4; r++) {                                                                                       \
            s[r] = _mm512_setzero_ps();                                                                                             \
            row[r] = dsa__min64(o + r * runs, n_out - 1);                                                                           \
            p[r] = w + (size_t)(row[r] * in * size);                                                                                \
        }                                                                                                                           \
        for (i = 0; i + 64 <= in; i += 64) {                                                                                        \
            DSA__UNROLL for (j = 0; j < 4; j++) u[j] = _mm512_loadu_ps(x + i + 16 * j);                                             \
            DSA__UNROLL for (r = 0; r < 4; r++) {                                                                                   \
                if (ahead) dsa__ask(p[r] + i * size, 4096, 64 * size);                                                              \
                dsa__widen64_##E4M3(type, &tables, p[r] + i * size, 64, v);                                                         \
                DSA__UNROLL for (j = 0; j < 4; j++) s[r] = _mm512_fmadd_ps(v[j], u[j], s[r]);                                       \
            }                                                                                                                       \
        }                                                                                                                           \
        if (i < in) {                                                                                                               \
            DSA__UNROLL for (j = 0; j < 4; j++) u[j] = _mm512_loadu_ps(x + i + 16 * j);                                             \
            DSA__UNROLL for (r = 0; r < 4; r++) {                                                                                   \
                dsa__widen64_##E4M3(type, &tables, p[r] + i * size, in - i, v);                                                     \
                DSA__UNROLL for (j = 0; j < 4; j++) s[r] = _mm512_fmadd_ps(v[j], u[j], s[r]);                                       \
            }                                                                                                                       \
        }                                                                                                                           \
        _mm_storeu_ps(sums, dsa__sum4_avx512(s[0], s[1], s[2], s[3]));                                                              \
        for (r = 0; r < 4; r++) y[row[r]] = sums[r];                                                                                \
    }                                                                                                                               \
}                                                                                                                                   \
static ISA void dsa__matmul_dots_##SUFFIX(dsa_type type, int64_t in, int64_t n_out, const unsigned char *w, const float *x,         \
                                          float *y)                                                                                 \
{                                                                                                                                   \
    DSA__BY_WEIGHT(dsa__matmul_dots_as_##SUFFIX, in, n_out, w, x, y)                                                                \
}                                                                                                                                   \
DSA__INLINE ISA void dsa__matmul_expand_as_##SUFFIX(const dsa_type type, int64_t n, const unsigned char *const *rows, float *to,    \
                                                    int64_t row_stride, int64_t stride)                                             \
{                                                                                                                                   \
    const int64_t size = dsa__type_bytes(type);                                                                                     \
    dsa__e4m3_tables tables;                                                                                                        \
    __m512 v[4];                                                                                                                    \
    int64_t i;                                                                                                                      \
    int r, j;                                                                                                                       \
    if (type == DSA_FP8) dsa__e4m3_tables_##E4M3(&tables);                                                                          \
    for (r = 0; r < 4; r++) {                                                                                                       \
        float *t = to + r * row_stride;                                                                                             \
        for (i = 0; i < n; i += 64, t += 4 * stride) {                                                                              \
            if (n - i >= 64) dsa__widen64_##E4M3(type, &tables, rows[r] + i * size, 64, v);                                         \
            else             dsa__widen64_##E4M3(type, &tables, rows[r] + i * size, n - i, v);                                      \
            DSA__UNROLL for (j = 0; j < 4; j++) _mm512_storeu_ps(t + j * stride, v[j]);                                             \
        }                                                                                                                           \
    }                                                                                                                               \
}                                                                                                                                   \
static ISA void dsa__matmul_expand_##SUFFIX(dsa_type type, int64_t n, const unsigned char *const *rows, float *to,                  \
                                            int64_t row_stride, int64_t stride)                                                     \
{                                                                                                                                   \
    DSA__BY_WEIGHT(dsa__matmul_expand_as_##SUFFIX, n, rows, to, row_stride, stride)                                                 \
}                                                                                                                                   \
DSA__INLINE ISA void dsa__matmul_axpys_as_##SUFFIX(const dsa_type type, int64_t in, int64_t rows, const unsigned char *w,           \
                                                   const float *x, const unsigned char *scale, float *c)                            \
{                                                                                                                                   \
    const int64_t size = dsa__type_bytes(type);                                                                                     \
    dsa__e4m3_tables tables;                                                                                                        \
    int64_t o, i;                                                                                                                   \
    int j;                                                                                                                          \
    if (type == DSA_FP8) dsa__e4m3_tables_##E4M3(&tables);                                                                          \
    for (o = 0; o < rows; o++, w += in * size) {                                                                                    \
        __m512 a = _mm512_set1_ps(x[o]), v[4];                                                                                      \
        for (i = 0; i < in; i += 64) {                                                                                              \
            if (scale && i % 128 == 0) a = _mm512_set1_ps(x[o] * dsa__float_at(scale + i / 128 * 4));                               \
            if (in - i >= 64) {                                                                                                     \
                dsa__ask(w + i * size, 16 * in * size, 64 * size);                                                                  \
                dsa__widen64_##E4M3(type, &tables, w + i * size, 64, v);                                                            \
            } else {                                                                                                                \
                dsa__widen64_##E4M3(type, &tables, w + i * size, in - i, v);                                                        \
            }                                                                                                                       \
            DSA__UNROLL for (j = 0; j < 4; j++)                                                                                     \
                _mm512_storeu_ps(c + i + 16 * j, _mm512_fmadd_ps(a, v[j], _mm512_loadu_ps(c + i + 16 * j)));                        \
        }                                                                                                                           \
    }                                                                                                                               \
}                                                                                                                                   \
static ISA void dsa__matmul_axpys_##SUFFIX(dsa_type type, int64_t in, int64_t rows, const unsigned char *w, const float *x,         \
                                           const unsigned char *scale, float *c)                                                    \
{                                                                                                                                   \
    DSA__BY_WEIGHT(dsa__matmul_axpys_as_##SUFFIX, in, rows, w, x, scale, c)                                                         \
}                                                                                                                                   \
static const dsa__matmul_isa dsa__matmul_isa_##SUFFIX = {                                                                           \
    16, 6, dsa__matmul_deal_avx512, dsa__matmul_expand_##SUFFIX, dsa__matmul_dots_##SUFFIX, dsa__matmul_tile_avx512,                \
    dsa__matmul_tile_t_avx512, dsa__matmul_axpys_##SUFFIX, dsa__matmul_undeal_avx512                                                \
};                                                                                                                                  \
static void dsa__matmul_##SUFFIX(int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx, const dsa_tensor *w,            \
                                 int64_t first, float *y, int64_t ldy, void *scratch)                                               \
{                                                                                                                                   \
    dsa__matmul_vector(&dsa__matmul_isa_##SUFFIX, n, in, n_out, x, ldx, w, first, y, ldy, scratch);                                 \
}                                                                                                                                   \
static void dsa__matmul_t_##SUFFIX(int64_t n, int64_t in, int64_t n_out, const float *x, int64_t ldx, const dsa_tensor *w,          \
                                   int64_t first, float *y, int64_t ldy, void *scratch)                                             \
{                                                                                                                                   \
    dsa__matmul_t_vector(&dsa__matmul_isa_##SUFFIX, n, in, n_out, x, ldx, w, first, y, ldy, scratch);                               \
}
DSA__MATMUL_AVX512(avx512f, DSA__AVX512, f16)
DSA__MATMUL_AVX512(avx512, DSA__AVX512_FP8, vbmi)
#if !defined(__clang__)
#  pragma GCC diagnostic pop
#endif
#endif

/* ============================================================================================
   >>dispatch                                 the kernel tables and the choice of one
   ============================================================================================
   A new ISA is one more section above this one and one more table here; entries that it does not improve are the scalar ones. */

static const dsa__kernels dsa__kernels_ref = {
    DSA_ISA_SCALAR,
    dsa__ref_query_round, dsa__ref_query_bytes, dsa__ref_query_pack, dsa__ref_score_bytes, dsa__ref_score,
    dsa__ref_attend_query_bytes, dsa__ref_attend_pack, dsa__ref_attend_bytes, dsa__ref_attend,
    dsa__ref_matmul_bytes, dsa__ref_matmul, dsa__ref_matmul_t,
    dsa__ref_madd, dsa__ref_weights, dsa__ref_turn, dsa__ref_exps, dsa__ref_fold, dsa__ref_unfold,
    dsa__ref_filter, dsa__ref_count, dsa__ref_keep
};

#ifdef DSA__ARM
static const dsa__kernels dsa__kernels_neon = {
    DSA_ISA_NEON,
    dsa__query_round_f32x8, dsa__query_bytes_neon, dsa__query_pack_neon, dsa__score_bytes_f32x8, dsa__score_neon,
    dsa__attend_query_bytes_f32x8, dsa__attend_pack_f32x8, dsa__attend_bytes_f32x8, dsa__attend_f32x8,
    dsa__matmul_bytes, dsa__matmul_f32x8, dsa__matmul_t_f32x8,
    dsa__madd_f32x8, dsa__weights_f32x8, dsa__turn_f32x8, dsa__exps_f32x8, dsa__fold_f32x8, dsa__unfold_f32x8,
    dsa__ref_filter, dsa__ref_count, dsa__ref_keep
};

static const dsa__kernels dsa__kernels_neon_dot = {
    DSA_ISA_NEON,
    dsa__query_round_f32x8, dsa__query_bytes_neon_dot, dsa__query_pack_neon_dot, dsa__score_bytes_f32x8, dsa__score_neon_dot,
    dsa__attend_query_bytes_f32x8, dsa__attend_pack_f32x8, dsa__attend_bytes_f32x8, dsa__attend_f32x8,
    dsa__matmul_bytes, dsa__matmul_f32x8, dsa__matmul_t_f32x8,
    dsa__madd_f32x8, dsa__weights_f32x8, dsa__turn_f32x8, dsa__exps_f32x8, dsa__fold_f32x8, dsa__unfold_f32x8,
    dsa__ref_filter, dsa__ref_count, dsa__ref_keep
};

/* The system says it, or the compiler was told. */
static int dsa__has_dot(void)
{
#if defined(__ARM_FEATURE_DOTPROD)
    return 1;
#elif defined(__linux__)
    return (int)(getauxval(AT_HWCAP) >> 20 & 1);
#else
    return 0;
#endif
}
#endif

#ifdef DSA__X86
static const dsa__kernels dsa__kernels_avx2 = {
    DSA_ISA_AVX2,
    dsa__query_round_f32x8, dsa__query_bytes_avx2, dsa__query_pack_avx2, dsa__score_bytes_f32x8, dsa__score_avx2,
    dsa__attend_query_bytes_f32x8, dsa__attend_pack_f32x8, dsa__attend_bytes_f32x8, dsa__attend_f32x8,
    dsa__matmul_bytes, dsa__matmul_f32x8, dsa__matmul_t_f32x8,
    dsa__madd_f32x8, dsa__weights_f32x8, dsa__turn_f32x8, dsa__exps_f32x8, dsa__fold_f32x8, dsa__unfold_f32x8,
    dsa__filter_avx2, dsa__count_avx2, dsa__keep_avx2
};

static const dsa__kernels dsa__kernels_avx512_base = {
    DSA_ISA_AVX512,
    dsa__query_round_avx512, dsa__query_bytes_avx512f, dsa__query_pack_avx512f, dsa__score_bytes_avx512f, dsa__score_avx512f,
    dsa__attend_query_bytes_avx512f, dsa__attend_pack_avx512f, dsa__attend_bytes_avx512f, dsa__attend_avx512f,
    dsa__matmul_bytes, dsa__matmul_avx512f, dsa__matmul_t_avx512f,
    dsa__madd_f32x8, dsa__weights_f32x8, dsa__turn_f32x8, dsa__exps_f32x8, dsa__fold_f32x8, dsa__unfold_f32x8,
    dsa__filter_avx512, dsa__count_avx512, dsa__keep_avx512
};

static const dsa__kernels dsa__kernels_avx512_vnni = {
    DSA_ISA_AVX512,
    dsa__query_round_avx512, dsa__query_bytes_avx512vnni, dsa__query_pack_avx512vnni, dsa__score_bytes_avx512vnni, dsa__score_avx512vnni,
    dsa__attend_query_bytes_avx512f, dsa__attend_pack_avx512f, dsa__attend_bytes_avx512f, dsa__attend_avx512f,
    dsa__matmul_bytes, dsa__matmul_avx512f, dsa__matmul_t_avx512f,
    dsa__madd_f32x8, dsa__weights_f32x8, dsa__turn_f32x8, dsa__exps_f32x8, dsa__fold_f32x8, dsa__unfold_f32x8,
    dsa__filter_avx512, dsa__count_avx512, dsa__keep_avx512
};

static const dsa__kernels dsa__kernels_avx512 = {
    DSA_ISA_AVX512,
    dsa__query_round_avx512, dsa__query_bytes_avx512, dsa__query_pack_avx512, dsa__score_bytes_avx512, dsa__score_avx512,
    dsa__attend_query_bytes_avx512, dsa__attend_pack_avx512, dsa__attend_bytes_avx512, dsa__attend_avx512,
    dsa__matmul_bytes, dsa__matmul_avx512, dsa__matmul_t_avx512,
    dsa__madd_f32x8, dsa__weights_f32x8, dsa__turn_f32x8, dsa__exps_f32x8, dsa__fold_f32x8, dsa__unfold_f32x8,
    dsa__filter_avx512_vbmi2, dsa__count_avx512, dsa__keep_avx512
};

/* What the CPU can do and the operating system saves: an instruction set is usable only if its registers survive a task switch,
   which XGETBV tells (2, 4: SSE and AVX; 0xE0: the three parts of AVX-512). */
enum { DSA__HAS_AVX2 = 1, DSA__HAS_AVX512 = 2, DSA__HAS_VNNI = 4, DSA__HAS_BF16 = 8 };

static int dsa__cpu_features(void)
{
    const unsigned need = 1u << 27 | 1u << 28 | 1u << 12 | 1u << 29 | 1u << 23;             /* OSXSAVE, AVX, FMA, F16C, POPCNT */
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;                      /* F, DQ, BW, VL */
    const unsigned more = 1u << 1 | 1u << 6;                                                /* VBMI, VBMI2 */
    unsigned a, b, c, d, saved, high;
    int has = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if ((c & need) != need) return 0;
    __asm__ __volatile__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & 6u) != 6u || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (b & (1u << 5)) has = DSA__HAS_AVX2;
    if (has && (saved & 0xE0u) == 0xE0u && (b & avx512) == avx512) {
        has |= DSA__HAS_AVX512;
        if (c & (1u << 11)) has |= DSA__HAS_VNNI;
        if ((has & DSA__HAS_VNNI) && (c & more) == more && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5)))
            has |= DSA__HAS_BF16;
    }
    return has;
}
#endif

/* NULL: this build or this CPU does not have it. */
static const dsa__kernels *dsa__kernels_for(dsa_isa isa)
{
#ifdef DSA__X86
    int has = dsa__cpu_features();
    if ((has & DSA__HAS_AVX512) && isa == DSA_ISA_AVX512_BASE) return &dsa__kernels_avx512_base;
    if ((has & DSA__HAS_AVX512) && (isa == DSA_ISA_AUTO || isa == DSA_ISA_AVX512))
        return has & DSA__HAS_BF16 ? &dsa__kernels_avx512 : (has & DSA__HAS_VNNI ? &dsa__kernels_avx512_vnni : &dsa__kernels_avx512_base);
    if ((has & DSA__HAS_AVX2) && (isa == DSA_ISA_AUTO || isa == DSA_ISA_AVX2)) return &dsa__kernels_avx2;
#endif
#ifdef DSA__ARM
    if (isa == DSA_ISA_AUTO || isa == DSA_ISA_NEON) return dsa__has_dot() ? &dsa__kernels_neon_dot : &dsa__kernels_neon;
#endif
    if (isa == DSA_ISA_AUTO || isa == DSA_ISA_SCALAR) return &dsa__kernels_ref;
    return NULL;
}

/* ============================================================================================
   >>threads                                  the optional pool
   ============================================================================================
   Task i belongs to thread i % n_threads: nothing is claimed at run time. A decode step is a few calls of a millisecond each, and
   waking a sleeper costs tens of microseconds, so whoever waits looks for some 20 us before it sleeps on a condition. */
#ifndef DSA_NO_MALLOC
static void *dsa__malloc(void *user, size_t bytes) { (void)user; return malloc(bytes); }
static void dsa__free(void *user, void *memory) { (void)user; free(memory); }
#endif

/* The allocator to use: the given one, or where it is NULL or zero malloc, if this build has it. */
static dsa_allocator dsa__allocator(const dsa_allocator *given)
{
    dsa_allocator a;
    memset(&a, 0, sizeof a);
    if (given && given->alloc && given->release) a = *given;
#ifndef DSA_NO_MALLOC
    else { a.alloc = dsa__malloc; a.release = dsa__free; }
#endif
    return a;
}

#ifndef DSA_NO_THREADS
/* Memory that two threads look at without the lock. */
#if defined(__GNUC__)
static uint32_t dsa__atomic_get(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static void dsa__atomic_set(uint32_t *p, uint32_t x) { __atomic_store_n(p, x, __ATOMIC_RELEASE); }
#  if defined(__x86_64__) || defined(__i386__)
static void dsa__pause(void) { __builtin_ia32_pause(); }
#  elif defined(__aarch64__)
static void dsa__pause(void) { __asm__ __volatile__("yield"); }
#  else
static void dsa__pause(void) { }
#  endif
#  define DSA__SPIN 1000
#else
static uint32_t dsa__atomic_get(const uint32_t *p) { return *p; }
static void dsa__atomic_set(uint32_t *p, uint32_t x) { *p = x; }
static void dsa__pause(void) { }
#  define DSA__SPIN 0                        /* only under the lock */
#endif

typedef struct dsa__worker { struct dsa_pool *pool; int32_t index; pthread_t thread; } dsa__worker;

struct dsa_pool {
    dsa_allocator allocator;
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    dsa_task task;
    void *arg;
    uint32_t generation;         /* counts runs; a worker that sees a new number has work */
    uint32_t n_busy;             /* workers that have not finished this run; both are written under the lock, read anywhere */
    int32_t n_threads, n_tasks, stop;
    dsa__worker *workers;        /* [n_threads - 1] */
};

static void *dsa__worker_main(void *arg)
{
    dsa__worker *w = (dsa__worker *)arg;
    struct dsa_pool *p = w->pool;
    uint32_t seen = 0;
    int32_t i;
    for (;;) {
        for (i = 0; i < DSA__SPIN && dsa__atomic_get(&p->generation) == seen; i++) dsa__pause();
        pthread_mutex_lock(&p->lock);
        while (p->generation == seen && !p->stop) pthread_cond_wait(&p->wake, &p->lock);
        if (p->stop) break;
        seen = p->generation;
        pthread_mutex_unlock(&p->lock);
        for (i = w->index; i < p->n_tasks; i += p->n_threads) p->task(p->arg, i);
        pthread_mutex_lock(&p->lock);
        dsa__atomic_set(&p->n_busy, p->n_busy - 1);
        if (p->n_busy == 0) pthread_cond_signal(&p->done);
        pthread_mutex_unlock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

static void dsa__pool_stop(dsa_pool *p, int32_t n_started)
{
    int32_t i;
    pthread_mutex_lock(&p->lock);
    p->stop = 1;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (i = 0; i < n_started; i++) pthread_join(p->workers[i].thread, NULL);
    pthread_cond_destroy(&p->done);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    p->allocator.release(p->allocator.user, p);
}

DSA_API dsa_status dsa_pool_create(const dsa_allocator *allocator, int32_t n_threads, dsa_pool **pool)
{
    dsa_allocator a = dsa__allocator(allocator);
    dsa_pool *p;
    int32_t i;
    if (!pool || (allocator && (allocator->alloc == NULL) != (allocator->release == NULL))) return DSA_ERR_NULL;
    if (n_threads < 1 || n_threads > 4096) return DSA_ERR_ARGUMENT;
    if (!a.alloc) return DSA_ERR_UNSUPPORTED;
    p = (dsa_pool *)a.alloc(a.user, sizeof *p + (size_t)n_threads * sizeof *p->workers);
    if (!p) return DSA_ERR_MEMORY;
    memset(p, 0, sizeof *p);
    p->allocator = a;
    p->n_threads = n_threads;
    p->workers = (dsa__worker *)(void *)(p + 1);
    if (pthread_mutex_init(&p->lock, NULL) != 0) { a.release(a.user, p); return DSA_ERR_THREAD; }
    if (pthread_cond_init(&p->wake, NULL) != 0) { pthread_mutex_destroy(&p->lock); a.release(a.user, p); return DSA_ERR_THREAD; }
    if (pthread_cond_init(&p->done, NULL) != 0) {
        pthread_cond_destroy(&p->wake); pthread_mutex_destroy(&p->lock); a.release(a.user, p);
        return DSA_ERR_THREAD;
    }
    for (i = 0; i + 1 < n_threads; i++) {
        p->workers[i].pool = p;
        p->workers[i].index = i + 1;
        if (pthread_create(&p->workers[i].thread, NULL, dsa__worker_main, &p->workers[i]) != 0) {
            dsa__pool_stop(p, i);
            return DSA_ERR_THREAD;
        }
    }
    *pool = p;
    return DSA_OK;
}

DSA_API void dsa_pool_destroy(dsa_pool *pool)
{
    if (pool) dsa__pool_stop(pool, pool->n_threads - 1);
}

DSA_API void dsa_pool_run(void *pool, int32_t n_tasks, dsa_task task, void *arg)
{
    dsa_pool *p = (dsa_pool *)pool;
    int32_t i;
    pthread_mutex_lock(&p->lock);
    DSA_ASSERT(p->n_busy == 0);                          /* one call at a time */
    p->task = task;
    p->arg = arg;
    p->n_tasks = n_tasks;
    dsa__atomic_set(&p->n_busy, (uint32_t)p->n_threads - 1);
    dsa__atomic_set(&p->generation, p->generation + 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (i = 0; i < n_tasks; i += p->n_threads) task(arg, i);
    for (i = 0; i < DSA__SPIN && dsa__atomic_get(&p->n_busy) > 0; i++) dsa__pause();
    pthread_mutex_lock(&p->lock);
    while (p->n_busy > 0) pthread_cond_wait(&p->done, &p->lock);
    pthread_mutex_unlock(&p->lock);
}
#endif

/* ============================================================================================
   >>config                                   defaults, presets, contexts
   ============================================================================================ */

DSA_API int dsa_version(void) { return DSA_VERSION_MAJOR * 10000 + DSA_VERSION_MINOR * 100 + DSA_VERSION_PATCH; }

DSA_API const char *dsa_status_text(dsa_status status)
{
#define DSA__TEXT(name, text) case name: return text;
    switch ((int)status) { DSA_STATUS_LIST(DSA__TEXT) default: break; }
#undef DSA__TEXT
    return "unknown status";
}

DSA_API const char *dsa_isa_name(dsa_isa isa)
{
    static const char *const names[] = { "auto", "scalar", "avx2", "avx512", "neon", "avx512base" };
    return (int)isa >= 0 && (int)isa < 6 ? names[isa] : "unknown";
}

DSA_API int dsa_layer_has_indexer(int32_t freq, int32_t offset, int32_t i)
{
    int64_t n = (int64_t)i - offset + 1;
    return freq <= 1 || dsa__max64(n, 0) % freq == 0;
}

/* Models whose layers are not the manual's LAYER. Class defaults of transformers 5.17.0 (theta, too, where it has one); V4 from the
   published configs (spec 1). A checkpoint's config.json has the last word. */
static void dsa__preset_foreign(dsa_preset preset, dsa_config *c)
{
    int v4 = preset == DSA_DEEPSEEK_V4_FLASH || preset == DSA_DEEPSEEK_V4_PRO, pro = preset == DSA_DEEPSEEK_V4_PRO;
    c->foreign_layer = 1;
    c->dim_index = 128;
    c->top_k = 2048;
    c->norm_eps = c->index_norm_eps = 1e-6f;
    if (preset == DSA_AXK2) {                            /* MLA; q and gate from one projection of [qr | W_qa x] */
        c->n_heads = 32; c->dim_latent = 128; c->dim_rope = 32; c->n_index_heads = 16;
        c->dim_hidden = 2048; c->dim_q_lora = 384; c->dim_nope = 64; c->dim_v = 64;
        c->index_rope_width = 32;
    } else if (preset == DSA_HY_V4) {                    /* MLA; sinks and an output gate */
        c->n_heads = 32; c->dim_latent = 512; c->dim_rope = 64; c->n_index_heads = 16;
        c->dim_hidden = 2816; c->dim_q_lora = 1536; c->dim_nope = 192; c->dim_v = 256;
        c->index_norm_eps = 1e-5f;
        c->rope_layout = DSA_ROPE_HALF;
        c->index_rope_width = 64; c->index_rope_offset = 64;
        c->index_share_freq = 4; c->index_share_offset = 2;
    } else if (preset == DSA_GLM5_NEXT) {                /* MLA without RoPE; 128 pools of 16 tokens */
        c->n_heads = 64; c->dim_latent = 512; c->dim_rope = DSA_NONE; c->n_index_heads = 32;
        c->dim_hidden = 4096; c->dim_q_lora = 1536; c->dim_nope = 256; c->dim_v = 256;
        c->norm_eps = 1e-5f;
        c->index_rope_width = DSA_NONE;
        c->stride = 16; c->pooling = DSA_POOL_GATED; c->keep_tail = 1; c->top_k = 128;
    } else if (preset == DSA_MINIMAX_M3) {               /* grouped queries; 16 blocks of 128 tokens for each KV head */
        c->n_heads = 64; c->n_kv_heads = 4; c->dim_latent = c->dim_value = 128; c->dim_rope = DSA_NONE;
        c->n_index_heads = c->index_groups = 4;
        c->dim_hidden = 6144;
        c->rope_layout = DSA_ROPE_HALF; c->rope_first = 1; c->rope_width = c->index_rope_width = 128; c->rope_theta = 5e6;
        c->index_norm = DSA_NORM_RMS_PLUS_ONE; c->index_linear = c->index_no_weights = 1; c->index_scale = 1.0f;
        c->block_size = 128; c->n_local_blocks = 1; c->top_k = 16;
    } else if (preset == DSA_QWEN4_EXP) {                /* grouped queries; means of the keys of a block; an output gate */
        c->n_heads = 16; c->n_kv_heads = 2; c->dim_latent = c->dim_value = 256; c->dim_rope = DSA_NONE;
        c->dim_hidden = 2048;
        c->rope_layout = DSA_ROPE_HALF; c->rope_first = 1; c->rope_width = 256; c->index_rope_width = 128;
        c->index_norm = DSA_NORM_RMS_PLUS_ONE; c->norm_pooled = 1; c->index_no_weights = 1;
        c->stride = DSA_NONE; c->pooling = DSA_POOL_MEAN; c->keep_tail = 1;
    } else if (v4) {                                     /* one key for all heads, all of it value; chosen entries and a window */
        c->n_heads = pro ? 128 : 64; c->dim_latent = 448; c->dim_rope = 64; c->dim_value = 512; c->n_index_heads = 64;
        c->dim_hidden = pro ? 7168 : 4096; c->dim_q_lora = pro ? 1536 : 1024;
        c->softmax_scale = 0.0441941738f;                /* 512^-0.5 */
        c->rope_theta = 160000; c->rope_factor = 16; c->rope_original_context = 65536;
        c->index_rope_interleaved = 1; c->index_rope_width = 64; c->index_rope_offset = 64;
        c->stride = 4; c->pooling = DSA_POOL_GATED_OVERLAP; c->index_norm = DSA_NORM_RMS; c->norm_pooled = 1;
        c->list_entries = 1; c->window = 128; c->top_k = pro ? 1024 : 512;
    }
}

DSA_API dsa_status dsa_config_preset(dsa_preset preset, dsa_config *c)
{
    if (!c) return DSA_ERR_NULL;
    if ((int)preset < 0 || preset > DSA_DEEPSEEK_V4_PRO) return DSA_ERR_ARGUMENT;
    memset(c, 0, sizeof *c);
    if (preset > DSA_DEEPSEEK_V3) {
        dsa__preset_foreign(preset, c);
        return DSA_OK;
    }
    c->dim_latent = 512;                                 /* spec 1 */
    c->dim_rope = 64;
    c->dim_index = 128;
    c->top_k = 2048;
    c->norm_eps = 1e-6f;
    c->index_norm_eps = 1e-6f;
    c->index_rope_width = 64;
    if (preset == DSA_DEEPSEEK_V32 || preset == DSA_DEEPSEEK_V3) {
        c->n_heads = 128;
        c->n_index_heads = preset == DSA_DEEPSEEK_V32 ? 64 : DSA_NONE;
        c->dim_hidden = 7168;
        c->dim_q_lora = 1536;
        c->dim_nope = 128;
        c->dim_v = 128;
        c->mscale = 1.0f;
        c->rope_theta = 1e4;
        c->rope_factor = 40;
        c->rope_original_context = 4096;
        c->rope_beta_fast = 32;
        c->rope_beta_slow = 1;
    } else {
        c->n_heads = 64;
        c->n_index_heads = 32;
        c->dim_hidden = 6144;
        c->dim_q_lora = 2048;
        c->dim_nope = 192;
        c->dim_v = 256;
        c->rope_theta = preset == DSA_GLM_5 ? 1e6 : 8e6;
        c->index_rope_interleaved = 1;
        if (preset == DSA_GLM_52) { c->index_share_freq = 4; c->index_share_offset = 3; }
    }
    return DSA_OK;
}

/* Tokens that one item of a selection stands for in its list; 1: the item is named itself. */
static int64_t dsa__list_span(const dsa_config *c) { return c->list_entries ? 1 : (int64_t)c->stride * c->block_size; }

DSA_API int64_t dsa_list_length(const dsa_ctx *ctx, int32_t top_k)
{
    const dsa_config *c = ctx ? &ctx->config : NULL;
    if (!c || c->stride < 1 || c->block_size < 1 || top_k < 0) return 0;
    return (top_k ? top_k : c->top_k) * dsa__list_span(c) + (c->keep_tail ? c->stride - 1 : 0);
}

static int32_t dsa__default32(int32_t x, int32_t def) { return x == 0 ? def : (x == DSA_NONE ? 0 : x); }

static dsa_rope dsa__config_yarn(const dsa_ctx *ctx)
{
    dsa_rope r;
    memset(&r, 0, sizeof r);
    r.theta = ctx->config.rope_theta;
    r.factor = ctx->config.rope_factor;
    r.original_context = ctx->config.rope_original_context;
    r.beta_fast = ctx->config.rope_beta_fast;
    r.beta_slow = ctx->config.rope_beta_slow;
    return r;
}

/* What other models change, after its defaults are filled in. */
static dsa_status dsa__init_models(const dsa_ctx *ctx)
{
    const dsa_config *c = &ctx->config;
    if (c->stride < 1 || c->index_groups < 1 || c->block_size < 1 || c->n_local_blocks < 0 || c->n_kv_heads < 0 || c->dim_value < 1 ||
        c->dim_value > DSA_MAX_DIM || c->rope_width < 0 || c->rope_width % 2 != 0)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_init: stride (a preset may leave it to you), index_groups, block_size, n_local_blocks, "
                         "n_kv_heads, dim_value or rope_width");
    if ((int)c->pooling < 0 || c->pooling > DSA_POOL_GATED_OVERLAP || (int)c->index_norm < 0 || c->index_norm > DSA_NORM_NONE)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_init: unknown pooling or index_norm");
    if (!(c->index_scale > 0.0f) || c->index_scale > FLT_MAX)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_init: index_scale must be positive and finite");
    if (c->stride > 1 && c->pooling == DSA_POOL_NONE)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_init: a stride above 1 needs a pooling");
    if (c->n_index_heads % c->index_groups != 0 || c->n_heads % c->index_groups != 0)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_init: index_groups must divide n_index_heads and n_heads");
    if (c->n_local_blocks > c->top_k) return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_init: more n_local_blocks than top_k");
    if (c->keep_tail && c->list_entries)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_init: keep_tail adds tokens, so list_entries cannot be set with it");
    if (c->block_size > 1 && c->stride > 1)
        return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "dsa_init: blocks of pooled entries (block_size and stride) are not built");
    if (c->n_kv_heads > 0) {
        if (c->n_heads % c->n_kv_heads != 0 || c->dim_rope != 0 || c->rope_width > c->dim_latent ||
            (int64_t)c->n_kv_heads * c->dim_latent > DSA_MAX_DIM || (int64_t)c->n_kv_heads * c->dim_value > DSA_MAX_DIM)
            return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_init: n_kv_heads must divide n_heads, dim_rope be DSA_NONE, a row fit DSA_MAX_DIM");
    } else if (c->dim_value > c->dim_latent + c->dim_rope || c->rope_width > c->dim_latent + c->dim_rope) {
        return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_init: dim_value or rope_width is wider than a latent row");
    }
    return dsa_list_length(ctx, 0) > DSA__MAX_POS ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_init: a list exceeds 2^31 - 1 tokens") : DSA_OK;
}

/* Calls that are written for DeepSeek-V3.2's form of the algorithm refuse every other one, rather than compute something else. */
static dsa_status dsa__plain_only(const dsa_ctx *ctx, const char *text)
{
    const dsa_config *c = &ctx->config;
    int plain = c->stride == 1 && c->pooling == DSA_POOL_NONE && c->index_groups == 1 && !c->index_linear && !c->index_no_weights &&
                c->block_size == 1 && c->n_local_blocks == 0 && c->n_kv_heads == 0 && c->dim_value == c->dim_latent;
    return plain ? DSA_OK : dsa__fail(ctx, DSA_ERR_UNSUPPORTED, text);
}

DSA_API dsa_status dsa_init(dsa_ctx *ctx, const dsa_config *config)
{
    dsa_ctx t;
    dsa_config *c = &t.config;
    const dsa__kernels *kernels;
    dsa_rope rope;
    dsa_status st;
    if (!ctx) return DSA_ERR_NULL;
    memset(&t, 0, sizeof t);
    if (config) *c = *config;
    if (c->detail && c->detail_size) c->detail[0] = 0;

    c->n_heads       = dsa__default32(c->n_heads, 128);
    c->dim_latent    = dsa__default32(c->dim_latent, 512);
    c->dim_rope      = dsa__default32(c->dim_rope, 64);
    c->n_index_heads = dsa__default32(c->n_index_heads, 64);
    c->dim_index     = dsa__default32(c->dim_index, 128);
    c->top_k         = dsa__default32(c->top_k, 2048);
    c->dim_hidden    = dsa__default32(c->dim_hidden, 7168);
    c->dim_q_lora    = dsa__default32(c->dim_q_lora, 1536);
    c->dim_nope      = dsa__default32(c->dim_nope, 128);
    c->dim_v         = dsa__default32(c->dim_v, 128);
    c->index_rope_width = dsa__default32(c->index_rope_width, c->dim_rope);
    c->stride        = dsa__default32(c->stride, 1);
    c->index_groups  = dsa__default32(c->index_groups, 1);
    c->block_size    = dsa__default32(c->block_size, 1);
    c->dim_value     = dsa__default32(c->dim_value, c->dim_latent);
    c->rope_width    = dsa__default32(c->rope_width, c->dim_rope);
    c->n_threads     = dsa__default32(c->n_threads, 1);
    if (c->n_heads < 1 || c->dim_latent < 1 || c->dim_rope < 0 || c->n_index_heads < 0 || c->dim_index < 1 || c->top_k < 1 ||
        c->dim_hidden < 1 || c->dim_q_lora < 1 || c->dim_nope < 1 || c->dim_v < 1)
        return dsa__fail(&t, DSA_ERR_SHAPE, "dsa_init: a dimension is negative");
    if (c->n_heads > DSA_MAX_DIM || c->dim_latent > DSA_MAX_DIM || c->dim_rope > DSA_MAX_DIM || c->n_index_heads > DSA_MAX_DIM ||
        c->dim_nope > DSA_MAX_DIM || c->dim_v > DSA_MAX_DIM || c->dim_hidden > DSA_MAX_DIM || c->dim_q_lora > DSA_MAX_DIM)
        return dsa__fail(&t, DSA_ERR_SHAPE, "dsa_init: a dimension exceeds DSA_MAX_DIM");
    if (c->dim_index > DSA_MAX_DIM_INDEX)
        return dsa__fail(&t, DSA_ERR_SHAPE, "dsa_init: dim_index exceeds DSA_MAX_DIM_INDEX");
    if (c->dim_rope % 2 != 0 || c->index_rope_width < 0 || c->index_rope_width % 2 != 0 || c->index_rope_offset < 0 ||
        c->index_rope_offset > c->dim_index - c->index_rope_width)
        return dsa__fail(&t, DSA_ERR_SHAPE, "dsa_init: a rotary width is odd or reaches beyond its row");
    if (c->hadamard == DSA_HADAMARD_ON && !dsa__is_pow2(c->dim_index))
        return dsa__fail(&t, DSA_ERR_SHAPE, "dsa_init: Hadamard needs a dim_index that is a power of two");
    if ((int)c->hadamard < 0 || c->hadamard > DSA_HADAMARD_OFF || (int)c->precision < 0 || c->precision > DSA_PRECISION_F32 ||
        (int)c->isa < 0 || c->isa > DSA_ISA_AVX512_BASE || (int)c->rope_layout < 0 || c->rope_layout > DSA_ROPE_HALF)
        return dsa__fail(&t, DSA_ERR_ARGUMENT, "dsa_init: unknown enum value");
    if (c->n_threads < 1 || c->n_threads > 4096)
        return dsa__fail(&t, DSA_ERR_ARGUMENT, "dsa_init: n_threads must lie in [1, 4096]");
    if ((c->allocator.alloc == NULL) != (c->allocator.release == NULL))
        return dsa__fail(&t, DSA_ERR_NULL, "dsa_init: allocator.alloc and .release go together");

    if (c->norm_eps == 0.0f)       c->norm_eps = 1e-6f;
    if (c->index_norm_eps == 0.0f) c->index_norm_eps = 1e-6f;
    if (c->rope_theta == 0.0)            c->rope_theta = 10000.0;
    if (c->rope_factor == 0.0)           c->rope_factor = 1.0;
    if (c->rope_original_context == 0.0) c->rope_original_context = 4096.0;
    if (c->rope_beta_fast == 0.0)        c->rope_beta_fast = 32.0;
    if (c->rope_beta_slow == 0.0)        c->rope_beta_slow = 1.0;
    c->mscale = c->mscale == 0.0f ? 1.0f : (c->mscale == (float)DSA_NONE ? 0.0f : c->mscale);
    rope = dsa__config_yarn(&t);
    if (!(c->norm_eps > 0.0f) || !(c->index_norm_eps > 0.0f) || !(c->mscale >= 0.0f) || dsa__rope_check(&rope) != DSA_OK)
        return dsa__fail(&t, DSA_ERR_ARGUMENT, "dsa_init: an eps, a rope parameter or mscale is out of its domain");
    if (c->softmax_scale == 0.0f) {                      /* spec 1 and 2.1: (nope + rope)^-0.5 m^2 */
        double m = c->rope_factor > 1.0 ? 0.1 * (double)c->mscale * log(c->rope_factor) + 1.0 : 1.0;
        c->softmax_scale = (float)(m * m / sqrt(c->n_kv_heads ? (double)c->dim_latent : (double)c->dim_nope + c->dim_rope));
    }
    if (!(c->softmax_scale > 0.0f) || c->softmax_scale > FLT_MAX)
        return dsa__fail(&t, DSA_ERR_ARGUMENT, "dsa_init: softmax_scale must be positive and finite");

    if (c->index_scale == 0.0f)
        c->index_scale = (float)(1.0 / sqrt((c->index_no_weights ? 1.0 : (double)dsa__max64(c->n_index_heads, 1)) * c->dim_index));
    st = dsa__init_models(&t);
    if (st != DSA_OK) return st;

    kernels = dsa__kernels_for(c->isa);
    if (!kernels) return dsa__fail(&t, DSA_ERR_UNSUPPORTED, "dsa_init: this build or this CPU does not have the forced isa");
    t.kernels = kernels;
    *ctx = t;
    return DSA_OK;
}

DSA_API dsa_isa dsa_query_isa(const dsa_ctx *ctx)
{
    if (!ctx || !ctx->kernels) return DSA_ISA_AUTO;
    return ctx->config.isa == DSA_ISA_AUTO ? ctx->kernels->isa : ctx->config.isa;
}

DSA_API dsa_rope dsa_config_rope(const dsa_ctx *ctx, int32_t dim_row)
{
    dsa_rope r = dsa__config_yarn(ctx);
    r.layout = ctx->config.rope_layout;
    r.width = ctx->config.rope_width;
    r.offset = ctx->config.rope_first ? 0 : dim_row - r.width;
    return r;
}

DSA_API dsa_rope dsa_config_index_rope(const dsa_ctx *ctx)
{
    dsa_rope r = dsa__config_yarn(ctx);
    r.layout = ctx->config.index_rope_interleaved ? DSA_ROPE_INTERLEAVED : DSA_ROPE_HALF;
    r.width = ctx->config.index_rope_width;
    r.offset = ctx->config.index_rope_offset;
    return r;
}

/* ============================================================================================
   >>cache                                    rows in memory: layouts, pages, append, read back
   ============================================================================================
   A row is addressed by its slot = page * page_size + offset; a logical position becomes one through the block table. */

/* The rows of a cache on a device are out of reach here: the calls that touch them go to config.cuda once all is checked. */
static int dsa__on_device(const dsa_cache *c) { return c && c->device == DSA_DEVICE_CUDA; }

static dsa_status dsa__fail_device(const dsa_ctx *ctx, dsa_status st)
{
    if (st == DSA_ERR_WORKSPACE) return dsa__fail(ctx, st, "cuda: one row of this call does not fit in the device's scratch");
    return st == DSA_OK ? st : dsa__fail(ctx, st, "cuda: a copy or a launch failed");
}

static int dsa__planar(dsa_kind kind, dsa_type format) { return kind == DSA_INDEX_KEY && (format == DSA_FP8 || format == DSA_INT8); }

DSA_API dsa_status dsa_row_bytes(dsa_kind kind, dsa_type format, int32_t dim, int32_t dim_rope, size_t *bytes)
{
    size_t n, r;
    if (!bytes) return DSA_ERR_NULL;
    if (dim_rope == DSA_NONE) dim_rope = 0;
    if (dim < 1 || dim > DSA_MAX_DIM || dim_rope < 0 || dim_rope > DSA_MAX_DIM) return DSA_ERR_SHAPE;
    if (kind != DSA_LATENT && dim_rope != 0) return DSA_ERR_SHAPE;
    n = (size_t)dim;
    r = (size_t)dim_rope;
    if ((int)kind < 0 || kind > DSA_VALUE) return DSA_ERR_FORMAT;
    if (format == DSA_F32) *bytes = 4 * (n + r);
    else if (format == DSA_BF16) *bytes = 2 * (n + r);
    else if (format == DSA_FP8 && kind == DSA_LATENT) *bytes = n + 4 * ((n + 127) / 128) + 2 * r;
    else if (dsa__planar(kind, format)) *bytes = n + 4;
    else return DSA_ERR_FORMAT;
    return DSA_OK;
}

DSA_API dsa_status dsa_page_bytes(dsa_kind kind, dsa_type format, int32_t dim, int32_t dim_rope, int32_t page_size, size_t *bytes)
{
    size_t row;
    dsa_status st = dsa_row_bytes(kind, format, dim, dim_rope, &row);
    if (st != DSA_OK) return st;
    if (!bytes) return DSA_ERR_NULL;
    if (page_size < 1) return DSA_ERR_SHAPE;
    if (!dsa__mul(row, (size_t)page_size, &row) || row > (size_t)-1 - 3) return DSA_ERR_OVERFLOW;
    *bytes = dsa__planar(kind, format) ? (row + 3) & ~(size_t)3 : row;
    return DSA_OK;
}

static dsa_status dsa__ctx_check(const dsa_ctx *ctx)
{
    if (!ctx) return DSA_ERR_NULL;
    return ctx->kernels ? DSA_OK : DSA_ERR_ARGUMENT;     /* dsa_init did not succeed on it */
}

/* Width of a row, without dim_rope. */
static int32_t dsa__config_dim(const dsa_config *f, dsa_kind kind)
{
    if (kind == DSA_INDEX_KEY) return f->dim_index;
    return dsa__min32(DSA_MAX_DIM, (f->n_kv_heads ? f->n_kv_heads : 1) * (kind == DSA_VALUE ? f->dim_value : f->dim_latent));
}

/* A cache without memory: everything in it that follows from the desc. page_bytes is one tight page. */
static dsa_status dsa__cache_shape(const dsa_ctx *ctx, const dsa_cache_desc *desc, dsa_cache *c, size_t *page_bytes)
{
    dsa_hadamard h;
    int64_t page;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!desc) return dsa__fail(ctx, DSA_ERR_NULL, "cache: desc is NULL");
    memset(c, 0, sizeof *c);
    *page_bytes = 0;
    c->kind = desc->kind;
    c->format = desc->format;
    c->dim = dsa__default32(desc->dim, dsa__config_dim(&ctx->config, desc->kind));
    c->dim_rope = desc->kind == DSA_LATENT ? dsa__default32(desc->dim_rope, ctx->config.dim_rope) : 0;
    if (desc->kind == DSA_INDEX_KEY && c->dim > DSA_MAX_DIM_INDEX)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: an index key is wider than DSA_MAX_DIM_INDEX");
    h = desc->hadamard == DSA_HADAMARD_AUTO ? ctx->config.hadamard : desc->hadamard;
    if (desc->kind == DSA_INDEX_KEY)
        c->hadamard = h == DSA_HADAMARD_ON || (h == DSA_HADAMARD_AUTO && dsa__planar(desc->kind, desc->format));
    if (c->hadamard && !dsa__is_pow2(c->dim))
        return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: Hadamard needs a dim that is a power of two; FP8 and INT8 use it unless OFF");
    if (desc->device != DSA_DEVICE_CPU && desc->device != DSA_DEVICE_CUDA && desc->device != DSA_DEVICE_AUTO)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "cache: unknown device");
    c->device = desc->device != DSA_DEVICE_CPU && ctx->config.cuda ? DSA_DEVICE_CUDA : DSA_DEVICE_CPU;
    if (desc->device == DSA_DEVICE_CUDA && !ctx->config.cuda)
        return dsa__fail(ctx, DSA_ERR_NO_DEVICE, "cache: config.cuda is NULL, there is no device for it");
    if (desc->capacity < 0 || desc->capacity > DSA__MAX_POS || desc->page_size < 0)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: capacity must lie in [0, 2^31 - 1] and page_size may not be negative");
    page = desc->page_size ? desc->page_size : dsa__max64(desc->capacity, 1);
    c->page_size = (int32_t)page;
    st = dsa_row_bytes(c->kind, c->format, c->dim, c->dim_rope, &c->row_stride);
    if (st == DSA_OK) st = dsa_page_bytes(c->kind, c->format, c->dim, c->dim_rope, c->page_size, page_bytes);
    if (st != DSA_OK) return dsa__fail(ctx, st, "cache: this kind cannot have this format or these dims");
    if (dsa__planar(c->kind, c->format)) c->row_stride = (size_t)c->dim;
    c->page_stride = *page_bytes;
    return DSA_OK;
}

DSA_API dsa_status dsa_cache_bytes(const dsa_ctx *ctx, const dsa_cache_desc *desc, size_t *bytes)
{
    dsa_cache c;
    size_t page = 0;
    dsa_status st = dsa__cache_shape(ctx, desc, &c, &page);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_cache_bytes: bytes is NULL");
    if (desc->capacity < 1) return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_cache_bytes: capacity must be at least 1");
    if (!dsa__mul(page, (size_t)((desc->capacity + c.page_size - 1) / c.page_size), bytes))
        return dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_cache_bytes: the size does not fit in size_t");
    return DSA_OK;
}

DSA_API dsa_status dsa_cache_init(const dsa_ctx *ctx, const dsa_cache_desc *desc, void *memory, size_t bytes, dsa_cache *cache)
{
    dsa_cache c;
    size_t page = 0, need = 0;
    dsa_status st = dsa_cache_bytes(ctx, desc, &need);
    if (st != DSA_OK) return st;
    if (!memory || !cache) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_cache_init: memory or cache is NULL");
    if (bytes < need) return dsa__fail(ctx, DSA_ERR_CAPACITY, "dsa_cache_init: memory is smaller than dsa_cache_bytes says");
    st = dsa__cache_shape(ctx, desc, &c, &page);
    if (st != DSA_OK) return st;
    c.data = memory;
    c.n_pages = c.n_blocks = (desc->capacity + c.page_size - 1) / c.page_size;
    *cache = c;
    return DSA_OK;
}

DSA_API dsa_status dsa_cache_create(const dsa_ctx *ctx, const dsa_cache_desc *desc, dsa_cache *cache)
{
    size_t need = 0, need_page = 0;
    void *memory;
    dsa_cache c;
    dsa_allocator a;
    dsa_status st = dsa_cache_bytes(ctx, desc, &need);
    if (st != DSA_OK) return st;
    if (!cache) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_cache_create: cache is NULL");
    st = dsa__cache_shape(ctx, desc, &c, &need_page);
    if (st != DSA_OK) return st;
    a = c.device == DSA_DEVICE_CUDA ? ctx->config.cuda->allocator : dsa__allocator(&ctx->config.allocator);
    if (!a.alloc) return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "dsa_cache_create: DSA_NO_MALLOC needs config.allocator");
    memory = a.alloc(a.user, need);
    if (!memory) return dsa__fail(ctx, DSA_ERR_MEMORY, "dsa_cache_create: the allocator returned NULL");
    st = dsa_cache_init(ctx, desc, memory, need, cache);
    if (st != DSA_OK) { a.release(a.user, memory); return st; }
    cache->owned = memory;
    cache->allocator = a;
    return DSA_OK;
}

DSA_API void dsa_cache_destroy(dsa_cache *cache)
{
    if (!cache) return;
    if (cache->owned && cache->allocator.release) cache->allocator.release(cache->allocator.user, cache->owned);
    memset(cache, 0, sizeof *cache);
}

DSA_API int64_t dsa_cache_capacity(const dsa_cache *c)
{
    int64_t blocks = c ? (c->block_table ? c->n_blocks : c->n_pages) : 0;
    if (blocks <= 0 || c->page_size < 1) return 0;
    return blocks > DSA__MAX_POS / c->page_size ? DSA__MAX_POS : blocks * c->page_size;
}

/* Everything about a cache but its contents; `len` rows must be reachable through its table. */
static dsa_status dsa__cache_check(const dsa_ctx *ctx, const dsa_cache *c, dsa_kind kind, int64_t len)
{
    size_t row, page, tight;
    int64_t b;
    dsa_status st;
    if (c->kind != kind) return dsa__fail(ctx, DSA_ERR_FORMAT, "cache: latents where index keys belong, or the other way round");
    if (c->device != DSA_DEVICE_CPU && c->device != DSA_DEVICE_CUDA) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "cache: unknown device");
    if (c->device == DSA_DEVICE_CUDA && !ctx->config.cuda)
        return dsa__fail(ctx, DSA_ERR_NO_DEVICE, "cache: the rows lie on a device, and config.cuda is NULL");
    st = dsa_row_bytes(c->kind, c->format, c->dim, c->dim_rope, &row);
    if (st != DSA_OK) return dsa__fail(ctx, st, "cache: this kind cannot have this format or these dims");
    if (kind == DSA_INDEX_KEY && c->dim > DSA_MAX_DIM_INDEX)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: an index key is wider than DSA_MAX_DIM_INDEX");
    if (c->dim_rope < 0) return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: dim_rope is negative; in a cache 0 means none");
    if (c->hadamard != 0 && c->hadamard != 1) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "cache: hadamard is 0 or 1, not the enum");
    if (c->hadamard && (kind != DSA_INDEX_KEY || !dsa__is_pow2(c->dim)))
        return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: hadamard is for index keys whose dim is a power of two");
    if (c->page_size < 1 || c->n_pages < 0 || c->n_blocks < 0)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: page_size, n_pages or n_blocks");
    if (dsa__planar(c->kind, c->format)) {
        row = (size_t)c->dim;
        if (!dsa__mul(row, (size_t)c->page_size, &tight)) return dsa__fail(ctx, DSA_ERR_OVERFLOW, "cache: page size");
        if (!c->scales) tight += 4 * (size_t)c->page_size;
        else if (c->n_pages > 1 && c->scale_page_stride < 4 * (size_t)c->page_size)
            return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: scale_page_stride is smaller than a page of scales");
        if (!c->scales && c->page_stride % 4 != 0 && c->n_pages > 1)
            return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: page_stride of a planar page must be a multiple of 4");
    } else {
        if (c->row_stride < row) return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: row_stride is smaller than a row");
        if (!dsa__mul(c->row_stride, (size_t)c->page_size - 1, &tight) || tight > (size_t)-1 - row)
            return dsa__fail(ctx, DSA_ERR_OVERFLOW, "cache: page size");
        tight += row;
    }
    if (c->n_pages > 1 && c->page_stride < tight) return dsa__fail(ctx, DSA_ERR_SHAPE, "cache: page_stride is smaller than a page");
    if (c->n_pages > DSA__MAX_POS) return dsa__fail(ctx, DSA_ERR_OVERFLOW, "cache: more than 2^31 - 1 pages");
    if (c->n_pages > 0 && (!dsa__mul(c->n_pages > 1 ? c->page_stride : tight, (size_t)c->n_pages, &page) || page > (size_t)-1 / 2))
        return dsa__fail(ctx, DSA_ERR_OVERFLOW, "cache: the pool does not fit in size_t");
    if (c->n_pages > 0 && !c->data) return dsa__fail(ctx, DSA_ERR_NULL, "cache: data is NULL");
    if (len < 0 || len > DSA__MAX_POS) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "cache: len lies outside [0, 2^31 - 1]");
    if (len > dsa_cache_capacity(c)) return dsa__fail(ctx, DSA_ERR_TABLE, "cache: fewer pages than rows");
    if (c->block_table)
        for (b = 0; b < (len + c->page_size - 1) / c->page_size; b++)
            if (c->block_table[b] < 0 || c->block_table[b] >= c->n_pages)
                return dsa__fail(ctx, DSA_ERR_TABLE, "cache: the block table names a page outside the pool");
    return DSA_OK;
}

DSA_API dsa_status dsa_cache_check(const dsa_ctx *ctx, const dsa_cache *cache)
{
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!cache) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_cache_check: cache is NULL");
    if ((int)cache->kind < 0 || cache->kind > DSA_VALUE) return dsa__fail(ctx, DSA_ERR_FORMAT, "dsa_cache_check: unknown kind");
    return dsa__cache_check(ctx, cache, cache->kind, cache->len);
}

DSA_API dsa_status dsa_cache_view(const dsa_ctx *ctx, const dsa_cache_desc *desc, void *pool, int64_t n_pages, size_t page_stride,
                                  const int32_t *block_table, int64_t n_blocks, int64_t len, dsa_cache *cache)
{
    dsa_cache c;
    size_t page = 0;
    dsa_status st = dsa__cache_shape(ctx, desc, &c, &page);
    if (st != DSA_OK) return st;
    if (!cache || (!pool && n_pages > 0)) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_cache_view: pool or cache is NULL");
    c.data = pool;
    c.n_pages = n_pages;
    c.block_table = block_table;
    c.n_blocks = block_table ? n_blocks : n_pages;
    if (page_stride) c.page_stride = page_stride;
    c.len = len;
    st = dsa__cache_check(ctx, &c, c.kind, len);
    if (st == DSA_OK) *cache = c;
    return st;
}

DSA_API dsa_status dsa_cache_truncate(const dsa_ctx *ctx, dsa_cache *cache, int64_t n_rows)
{
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!cache) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_cache_truncate: cache is NULL");
    if (n_rows < 0 || n_rows > cache->len) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_cache_truncate: n_rows lies outside [0, len]");
    cache->len = n_rows;
    return DSA_OK;
}

static unsigned char *dsa__row_in(const dsa_cache *c, int64_t page, int64_t offset)
{
    return (unsigned char *)c->data + (size_t)page * c->page_stride +
           (size_t)offset * (dsa__planar(c->kind, c->format) ? (size_t)c->dim : c->row_stride);
}

static unsigned char *dsa__scale_in(const dsa_cache *c, int64_t page, int64_t offset)     /* planar pages */
{
    if (c->scales) return (unsigned char *)c->scales + (size_t)page * c->scale_page_stride + 4 * (size_t)offset;
    return (unsigned char *)c->data + (size_t)page * c->page_stride + (size_t)c->page_size * (size_t)c->dim + 4 * (size_t)offset;
}

static unsigned char *dsa__row_at(const dsa_cache *c, int64_t slot) { return dsa__row_in(c, slot / c->page_size, slot % c->page_size); }
static unsigned char *dsa__scale_at(const dsa_cache *c, int64_t slot) { return dsa__scale_in(c, slot / c->page_size, slot % c->page_size); }

/* Page of a logical position and its offset there. Both fit in 31 bits: a 32-bit division is a third of the 64-bit one, and
   attention does one per gathered row. */
static int64_t dsa__page_of(const dsa_cache *c, int64_t position, int64_t *offset)
{
    uint32_t page_size = (uint32_t)c->page_size, block = (uint32_t)position / page_size;
    DSA_ASSERT(position >= 0 && position < dsa_cache_capacity(c));
    *offset = (uint32_t)position - block * page_size;
    return c->block_table ? c->block_table[block] : (int64_t)block;
}

static int64_t dsa__slot(const dsa_cache *c, int64_t position)
{
    int64_t offset, page = dsa__page_of(c, position, &offset);
    return page * c->page_size + offset;
}

static void dsa__store_bf16(unsigned char *p, int32_t n, const float *x)
{
    int32_t i;
    for (i = 0; i < n; i++) {
        uint16_t b = dsa_f32_to_bf16(x[i]);
        memcpy(p + 2 * (size_t)i, &b, 2);
    }
}

static void dsa__store_row(const dsa_cache *c, int64_t slot, const float *x)
{
    unsigned char *p = dsa__row_at(c, slot);
    float rotated[DSA_MAX_DIM_INDEX], s;
    uint8_t y[128];
    int32_t i, j;
    if (c->hadamard) {
        memcpy(rotated, x, 4 * (size_t)c->dim);
        dsa__hadamard(rotated, c->dim);
        x = rotated;
    }
    if (c->format == DSA_F32) {
        memcpy(p, x, 4 * (size_t)(c->dim + c->dim_rope));
    } else if (c->format == DSA_BF16) {
        dsa__store_bf16(p, c->dim + c->dim_rope, x);
    } else if (dsa__planar(c->kind, c->format)) {
        s = c->format == DSA_FP8 ? dsa_quantize_e4m3(x, c->dim, p) : dsa_quantize_int8(x, c->dim, (int8_t *)p);
        memcpy(dsa__scale_at(c, slot), &s, 4);
    } else {                                             /* tile scale 2^ceil(log2(max(amax / 448, 1e-4))), as FlashMLA (spec 6.1) */
        unsigned char *scales = p + c->dim;
        for (i = 0; i < c->dim; i += 128) {
            int32_t n = dsa__min32(128, c->dim - i);
            s = dsa__amax(x + i, n) / 448.0f;
            s = dsa_pow2_ceil(s > 1e-4f ? s : 1e-4f);
            for (j = 0; j < n; j++) y[j] = (uint8_t)dsa__e4m3_code(x[i + j] / s);
            memcpy(p + i, y, (size_t)n);
            memcpy(scales + i / 128 * 4, &s, 4);
        }
        dsa__store_bf16(scales + (c->dim + 127) / 128 * 4, c->dim_rope, x + c->dim);
    }
}

DSA_API dsa_status dsa_cache_read(const dsa_ctx *ctx, const dsa_cache *cache, int64_t begin, int64_t end, float *out)
{
    int64_t t, width;
    int32_t i;
    dsa_status st = dsa_cache_check(ctx, cache);
    if (st != DSA_OK) return st;
    if (begin < 0 || begin > end || end > cache->len)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_cache_read: not 0 <= begin <= end <= len");
    if (begin < end && !out) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_cache_read: out is NULL");
    width = (int64_t)cache->dim + cache->dim_rope;
    if (dsa__on_device(cache)) return dsa__fail_device(ctx, ctx->config.cuda->read(ctx, cache, begin, end, out));
    for (t = begin; t < end; t++) {
        int64_t slot = dsa__slot(cache, t);
        const unsigned char *p = dsa__row_at(cache, slot);
        float *x = out + (t - begin) * width, s;
        if (cache->kind != DSA_INDEX_KEY) {
            dsa__expand_latent(cache->format, cache->dim, cache->dim_rope, p, x);
            continue;
        }
        dsa__expand_key(cache->format, cache->dim, p, x);
        if (!dsa__planar(cache->kind, cache->format)) continue;
        memcpy(&s, dsa__scale_at(cache, slot), 4);
        for (i = 0; i < cache->dim; i++) x[i] *= s;
    }
    return DSA_OK;
}

/* ============================================================================================
   >>validate                                 arguments, checked once at the edge
   ============================================================================================ */

static int64_t dsa__n_q(const dsa_seq *s) { return dsa__default32(s->n_q, 1); }

/* Rows that a call may see. A caller who gives his own len is never asked for the cache's: an appender may be writing it. */
static int64_t dsa__len(const dsa_seq *s, const dsa_cache *c) { return s->len == 0 ? c->len : (s->len == DSA_NONE ? 0 : s->len); }

static dsa_cache *dsa__cache_of(const dsa_seq *s, dsa_kind kind)
{
    return kind == DSA_LATENT ? s->latent : (kind == DSA_INDEX_KEY ? s->index : s->value);
}

/* Tokens of a sequence as its index cache counts them: entries of a pool cannot say how many are in the tail. */
static int64_t dsa__tokens(const dsa_ctx *ctx, const dsa_seq *s)
{
    return dsa__len(s, ctx->config.stride > 1 && s->latent ? s->latent : s->index);
}

static dsa_status dsa__rows(const dsa_ctx *ctx, int32_t n_seqs, const dsa_seq *seqs, int64_t *n_rows)
{
    int32_t i;
    *n_rows = 0;
    if (n_seqs < 0) return dsa__fail(ctx, DSA_ERR_SHAPE, "n_seqs is negative");
    if (n_seqs > 0 && !seqs) return dsa__fail(ctx, DSA_ERR_NULL, "seqs is NULL");
    for (i = 0; i < n_seqs; i++) {
        if (seqs[i].n_q < DSA_NONE) return dsa__fail(ctx, DSA_ERR_SHAPE, "seqs[].n_q is negative");
        if (seqs[i].len < DSA_NONE) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "seqs[].len is negative");
        *n_rows += dsa__n_q(&seqs[i]);
    }
    return *n_rows > DSA__MAX_POS ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "more than 2^31 - 1 rows in one call") : DSA_OK;
}

static const char *dsa__null_text(dsa_kind kind)
{
    return kind == DSA_LATENT ? "seqs[].latent is NULL" : (kind == DSA_INDEX_KEY ? "seqs[].index is NULL" : "seqs[].value is NULL");
}

/* The batch's caches of one kind: present, sound, of the config's dims and all alike. */
static dsa_status dsa__batch_check(const dsa_ctx *ctx, int32_t n_seqs, const dsa_seq *seqs, dsa_kind kind)
{
    const dsa_config *f = &ctx->config;
    const dsa_cache *first = NULL;
    int32_t i;
    for (i = 0; i < n_seqs; i++) {
        const dsa_cache *c = dsa__cache_of(&seqs[i], kind);
        int64_t len;
        dsa_status st;
        if (!c) return dsa__fail(ctx, DSA_ERR_NULL, dsa__null_text(kind));
        len = dsa__len(&seqs[i], c);
        if (kind == DSA_INDEX_KEY && f->stride > 1) {
            if (seqs[i].len == 0 && !seqs[i].latent)
                return dsa__fail(ctx, DSA_ERR_NULL, "seqs[].latent is NULL and len 0: entries do not say how many tokens there are");
            len = dsa__tokens(ctx, &seqs[i]) / f->stride;
            if (seqs[i].len == 0 && c->len < len) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "a pooled index cache lacks entries");
        }
        st = dsa__cache_check(ctx, c, kind, len);
        if (st != DSA_OK) return st;
        if (!first) first = c;
        if (c->dim != dsa__config_dim(f, kind) || (kind == DSA_LATENT && c->dim_rope != f->dim_rope))
            return dsa__fail(ctx, DSA_ERR_FORMAT, "a cache's dims differ from the config's");
        if (kind == DSA_INDEX_KEY && f->hadamard != DSA_HADAMARD_AUTO && (c->hadamard != 0) != (f->hadamard == DSA_HADAMARD_ON))
            return dsa__fail(ctx, DSA_ERR_FORMAT, "a cache's Hadamard flag differs from the config's");
        if (c->format != first->format || (c->hadamard != 0) != (first->hadamard != 0))
            return dsa__fail(ctx, DSA_ERR_FORMAT, "the caches of one call differ in format or Hadamard flag");
        if (c->device != first->device) return dsa__fail(ctx, DSA_ERR_FORMAT, "the caches of one call live on different devices");
    }
    return DSA_OK;
}

static dsa_status dsa__arena_check(const dsa_ctx *ctx, const dsa__arena *a, const void *workspace, size_t size)
{
    if (a->overflow) return dsa__fail(ctx, DSA_ERR_OVERFLOW, "the workspace does not fit in size_t");
    if (a->used == 0) return DSA_OK;
    if (!workspace) return dsa__fail(ctx, DSA_ERR_NULL, "workspace is NULL");
    return size < dsa__arena_bytes(a) ? dsa__fail(ctx, DSA_ERR_WORKSPACE, "workspace_size is smaller than the size query says") : DSA_OK;
}

/* Calls that use both caches of a sequence want as many rows in one as in the other: a list from one addresses the other. */
static dsa_status dsa__pairs_check(const dsa_ctx *ctx, int32_t n_seqs, const dsa_seq *seqs)
{
    int32_t i;
    for (i = 0; i < n_seqs; i++)
        if (seqs[i].len == 0 && seqs[i].latent->len != seqs[i].index->len)
            return dsa__fail(ctx, DSA_ERR_ARGUMENT, "a sequence's latent and index caches differ in length");
    return DSA_OK;
}

/* Walks the rows of a batch in ascending order: which sequence a row belongs to and what it may see. */
typedef struct dsa__cursor { const dsa_seq *seqs; int32_t seq; int64_t first; } dsa__cursor;

/* Query i of its sequence (returned) is row `row` of the call; rows [0, *visible) of the sequence come before or at it. */
static const dsa_seq *dsa__seek(dsa__cursor *c, int64_t row)
{
    DSA_ASSERT(row >= c->first);
    while (row >= c->first + dsa__n_q(&c->seqs[c->seq])) c->first += dsa__n_q(&c->seqs[c->seq++]);
    return &c->seqs[c->seq];
}

static int64_t dsa__visible(const dsa__cursor *c, const dsa_seq *s, const dsa_cache *cache, int64_t row)
{
    return dsa__max64(dsa__len(s, cache) - dsa__n_q(s) + (row - c->first) + 1, 0);
}

/* ============================================================================================
   >>append                                   1. rows into the caches
   ============================================================================================ */

/* Would a cache get rows twice? Each is marked by its own len, as -1 - len, and the marks come off again: no memory, and a batch
   of thousands costs no more than a walk. Nobody else reads len beside an appender (contracts). */
static int dsa__append_twice(int32_t n_seqs, const dsa_seq *seqs, dsa_kind kind)
{
    int32_t i, j;
    int twice = 0;
    for (i = 0; i < n_seqs && !twice; i++) {
        dsa_cache *c = dsa__cache_of(&seqs[i], kind);
        if (dsa__n_q(&seqs[i]) == 0) continue;
        twice = c->len < 0;
        if (!twice) c->len = -1 - c->len;
    }
    for (j = 0; j < i; j++) {
        dsa_cache *c = dsa__cache_of(&seqs[j], kind);
        if (c->len < 0) c->len = -1 - c->len;
    }
    return twice;
}

/* Checks that n_q rows fit behind every cache of a kind, and that no cache appears twice. Leaves everything as it is. */
static dsa_status dsa__append_check(const dsa_ctx *ctx, int32_t n_seqs, const dsa_seq *seqs, dsa_kind kind, const int64_t *slots)
{
    const dsa_config *f = &ctx->config;
    int64_t row = 0, t;
    int32_t i;
    for (i = 0; i < n_seqs; i++) {
        const dsa_cache *c = dsa__cache_of(&seqs[i], kind);
        int64_t n = dsa__n_q(&seqs[i]);
        dsa_status st;
        if (!c) return dsa__fail(ctx, DSA_ERR_NULL, dsa__null_text(kind));
        if (kind == DSA_VALUE && dsa__on_device(c))
            return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "append: values of grouped queries stay on the CPU");
        if (c->dim != dsa__config_dim(f, kind) || (kind == DSA_LATENT && c->dim_rope != f->dim_rope))
            return dsa__fail(ctx, DSA_ERR_FORMAT, "append: a cache's dims differ from the config's");
        if (kind == DSA_INDEX_KEY && f->hadamard != DSA_HADAMARD_AUTO && (c->hadamard != 0) != (f->hadamard == DSA_HADAMARD_ON))
            return dsa__fail(ctx, DSA_ERR_FORMAT, "append: a cache's Hadamard flag differs from the config's");
        st = dsa__cache_check(ctx, c, kind, c->len);
        if (st != DSA_OK) return st;
        if (slots) {
            for (t = 0; t < n; t++)
                if (slots[row + t] < -1 || slots[row + t] >= c->n_pages * c->page_size)
                    return dsa__fail(ctx, DSA_ERR_TABLE, "append: a slot lies outside the pool");
        } else {
            if (n > dsa_cache_capacity(c) - c->len) return dsa__fail(ctx, DSA_ERR_CAPACITY, "append: a cache is full");
            st = dsa__cache_check(ctx, c, kind, c->len + n);
            if (st != DSA_OK) return st;
        }
        row += n;
    }
    if (!slots && n_seqs > 1 && dsa__append_twice(n_seqs, seqs, kind))
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "append: the same cache appears twice in one call");
    return DSA_OK;
}

static dsa_status dsa__append_rows(const dsa_ctx *ctx, dsa_cache *c, int64_t n, const float *x, const int64_t *slots)
{
    int64_t t, width = (int64_t)c->dim + c->dim_rope;
    dsa_status st = n > 0 && dsa__on_device(c) ? ctx->config.cuda->append(ctx, c, n, x, slots) : DSA_OK;
    if (st != DSA_OK) return dsa__fail_device(ctx, st);
    for (t = 0; t < n && !dsa__on_device(c); t++) {
        int64_t slot = slots ? slots[t] : dsa__slot(c, c->len + t);
        if (slot >= 0) dsa__store_row(c, slot, x + t * width);
    }
    if (!slots) c->len += n;
    return DSA_OK;
}

DSA_API dsa_status dsa_append(const dsa_ctx *ctx, const dsa_append_args *a)
{
    int64_t n_rows, row = 0;
    int32_t i;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!a) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_append: args is NULL");
    st = dsa__rows(ctx, a->n_seqs, a->seqs, &n_rows);
    if (st == DSA_OK && n_rows > 0 && !a->latent && !a->index_key && !a->value)
        st = dsa__fail(ctx, DSA_ERR_NULL, "dsa_append: latent, index_key and value are NULL");
    if (st == DSA_OK && a->index_key && ctx->config.stride > 1)
        st = dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "dsa_append: entries of a pool come from dsa_compress");
    if (st == DSA_OK && a->value && ctx->config.n_kv_heads == 0)
        st = dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_append: values of their own belong to n_kv_heads");
    if (st == DSA_OK && a->latent) st = dsa__append_check(ctx, a->n_seqs, a->seqs, DSA_LATENT, a->slots);
    if (st == DSA_OK && a->index_key) st = dsa__append_check(ctx, a->n_seqs, a->seqs, DSA_INDEX_KEY, a->slots);
    if (st == DSA_OK && a->value) st = dsa__append_check(ctx, a->n_seqs, a->seqs, DSA_VALUE, a->slots);
    if (st != DSA_OK) return st;
    for (i = 0; i < a->n_seqs && st == DSA_OK; i++) {
        const dsa_seq *s = &a->seqs[i];
        int64_t n = dsa__n_q(s);
        const int64_t *slots = a->slots ? a->slots + row : NULL;
        if (a->latent)
            st = dsa__append_rows(ctx, s->latent, n, a->latent + row * (dsa__config_dim(&ctx->config, DSA_LATENT) +
                                  (int64_t)ctx->config.dim_rope), slots);
        if (a->index_key && st == DSA_OK)
            st = dsa__append_rows(ctx, s->index, n, a->index_key + row * ctx->config.dim_index, slots);
        if (a->value && st == DSA_OK)
            st = dsa__append_rows(ctx, s->value, n, a->value + row * dsa__config_dim(&ctx->config, DSA_VALUE), slots);
        row += n;
    }
    return st;
}

/* ============================================================================================
   >>compress                                 1b. entries of several tokens
   ============================================================================================
   A ring of rows per sequence. An entry is computed from the ring alone, when its last token has come, by one sequence of f32
   operations: how the tokens were cut into calls cannot show. Per channel, over the slots i of the block (OVERLAP: first the block
   before, channels [0, dim) of its rows, then the own one, channels [dim, 2 dim); entry 0 has no block before):

       m = max_i z_i          entry = Sum_i e^(z_i - m) x_i / Sum_i e^(z_i - m)          z_i = gate + gate_bias[i] */

static dsa_status dsa__compressor_plan(const dsa_ctx *ctx, const dsa_compressor_desc *desc, dsa__arena *arena, dsa_compressor *c)
{
    const dsa_config *f;
    int gated, overlap;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    f = &ctx->config;
    memset(c, 0, sizeof *c);
    if (!desc) return dsa__fail(ctx, DSA_ERR_NULL, "compressor: desc is NULL");
    if (desc->kind != DSA_INDEX_KEY && desc->kind != DSA_LATENT) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "compressor: kind");
    if (desc->kind == DSA_LATENT && f->n_kv_heads)
        return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "compressor: pooled keys and values of grouped queries are not built");
    if (desc->n_kept < 0 || desc->n_kept > DSA__MAX_POS) return dsa__fail(ctx, DSA_ERR_SHAPE, "compressor: n_kept");
    if ((f->index_norm != DSA_NORM_NONE && !desc->gain) || (f->index_norm == DSA_NORM_LAYER && !desc->bias))
        return dsa__fail(ctx, DSA_ERR_NULL, "compressor: gain or bias of the norm is NULL");
    gated = f->pooling == DSA_POOL_GATED || f->pooling == DSA_POOL_GATED_OVERLAP;
    overlap = f->pooling == DSA_POOL_GATED_OVERLAP;
    c->desc = *desc;
    c->pooling = f->pooling;
    c->norm = f->index_norm;
    c->norm_pooled = f->norm_pooled != 0;
    c->stride = f->stride;
    c->dim = desc->kind == DSA_INDEX_KEY ? f->dim_index : f->dim_latent + f->dim_rope;
    c->width = c->dim * (overlap ? 2 : 1);
    c->eps = desc->kind == DSA_INDEX_KEY ? f->index_norm_eps : f->norm_eps;
    c->rope = desc->kind == DSA_INDEX_KEY ? dsa_config_index_rope(ctx) : dsa_config_rope(ctx, c->dim);
    if (overlap && !c->norm_pooled && c->norm != DSA_NORM_NONE)
        return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "compressor: a norm of the rows before an overlapping pool is not built");
    c->room = (int64_t)f->stride * (overlap ? 2 : 1) + desc->n_kept;
    c->rows  = (float *)dsa__take(arena, c->room, c->width, sizeof(float));
    c->gates = (float *)dsa__take(arena, gated ? c->room : 0, c->width, sizeof(float));
    c->entry = (float *)dsa__take(arena, c->dim, 1, sizeof(float));
    c->max   = (float *)dsa__take(arena, c->dim, 1, sizeof(float));
    c->sum   = (float *)dsa__take(arena, c->dim, 1, sizeof(float));
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "compressor: the rows do not fit in size_t") : DSA_OK;
}

DSA_API dsa_status dsa_compressor_bytes(const dsa_ctx *ctx, const dsa_compressor_desc *desc, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa_compressor c;
    dsa_status st = dsa__compressor_plan(ctx, desc, &arena, &c);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_compressor_bytes: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

DSA_API dsa_status dsa_compressor_init(const dsa_ctx *ctx, const dsa_compressor_desc *desc, void *memory, size_t bytes, dsa_compressor *c)
{
    dsa__arena arena;
    dsa_compressor t;
    size_t need = 0;
    dsa_status st = dsa_compressor_bytes(ctx, desc, &need);
    if (st != DSA_OK) return st;
    if (!memory || !c) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_compressor_init: memory or compressor is NULL");
    if (bytes < need) return dsa__fail(ctx, DSA_ERR_CAPACITY, "dsa_compressor_init: memory is smaller than dsa_compressor_bytes says");
    arena = dsa__arena_over(memory);
    st = dsa__compressor_plan(ctx, desc, &arena, &t);
    if (st == DSA_OK) *c = t;
    return st;
}

/* One block's `stride` rows and gates from token j0 on, channels [at, at + dim): pass 0 finds the maxima, pass 1 adds up. */
static void dsa__compress_block(const dsa_compressor *c, int pass, int64_t j0, int32_t at)
{
    int32_t i, d;
    for (i = 0; i < c->stride; i++) {
        const float *x = c->rows + (j0 + i) % c->room * c->width + at, *z, *b;
        z = c->gates + (j0 + i) % c->room * c->width + at;
        b = c->desc.gate_bias ? c->desc.gate_bias + (int64_t)i * c->width + at : NULL;
        for (d = 0; d < c->dim; d++) {
            float v = b ? z[d] + b[d] : z[d], e;
            if (pass == 0) {
                if (v > c->max[d]) c->max[d] = v;
            } else if (v != -dsa__infinity()) {          /* a gate of -inf takes no part, be it the only one */
                e = dsa__exp(v - c->max[d]);
                c->sum[d] += e;
                c->entry[d] += e * x[d];
            }
        }
    }
}

/* Entry w, whose tokens are all in the ring, into c->entry. */
static void dsa__compress_entry(const dsa_compressor *c, int64_t w)
{
    int64_t j0 = w * c->stride;
    int32_t i, d, pass;
    for (d = 0; d < c->dim; d++) { c->entry[d] = 0.0f; c->max[d] = -dsa__infinity(); c->sum[d] = 0.0f; }
    if (c->pooling == DSA_POOL_NONE || c->pooling == DSA_POOL_MEAN) {
        for (i = 0; i < c->stride; i++) {
            const float *x = c->rows + (j0 + i) % c->room * c->width;
            for (d = 0; d < c->dim; d++) c->entry[d] += x[d];
        }
        for (d = 0; d < c->dim; d++) c->entry[d] /= (float)c->stride;
    } else {
        for (pass = 0; pass < 2; pass++) {
            if (c->pooling == DSA_POOL_GATED_OVERLAP && w > 0) dsa__compress_block(c, pass, j0 - c->stride, 0);
            dsa__compress_block(c, pass, j0, c->width - c->dim);
        }
        for (d = 0; d < c->dim; d++) c->entry[d] = c->sum[d] == 0.0f ? 0.0f : c->entry[d] / c->sum[d];
    }
    if (c->norm_pooled) (void)dsa_norm_rows(c->norm, c->entry, 1, c->dim, c->dim, c->desc.gain, c->desc.bias, c->eps);
    (void)dsa_rope_rows(c->entry, 1, c->dim, 1, 0, c->dim, &c->rope, &j0, 0);
}

/* The cache is of the compressor's kind and stands where it does; `entries` more fit behind it. */
static dsa_status dsa__compress_check(const dsa_ctx *ctx, const dsa_compressor *c, const dsa_cache *cache, int64_t entries)
{
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!c || !cache) return dsa__fail(ctx, DSA_ERR_NULL, "compress: compressor or cache is NULL");
    if (!c->rows) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "compress: dsa_compressor_init did not succeed on it");
    st = dsa__cache_check(ctx, cache, c->desc.kind, cache->len);
    if (st != DSA_OK) return st;
    if (dsa__on_device(cache)) return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "compress: entries are made on the CPU only");
    if (cache->dim + cache->dim_rope != c->dim || (c->desc.kind == DSA_LATENT && cache->dim != ctx->config.dim_latent))
        return dsa__fail(ctx, DSA_ERR_FORMAT, "compress: the cache's dims differ from the config's");
    if (cache->len != c->len / c->stride) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "compress: the cache is not at entry len / stride");
    if (entries > dsa_cache_capacity(cache) - cache->len) return dsa__fail(ctx, DSA_ERR_CAPACITY, "compress: the cache is full");
    return dsa__cache_check(ctx, cache, c->desc.kind, cache->len + entries);
}

DSA_API dsa_status dsa_compress(const dsa_ctx *ctx, dsa_compressor *c, int64_t n_rows, const float *rows, const float *gates,
                                dsa_cache *cache)
{
    int64_t j;
    dsa_status st;
    if (c && (n_rows < 0 || n_rows > DSA__MAX_POS - c->len)) return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_compress: n_rows");
    st = dsa__compress_check(ctx, c, cache, c ? (c->len + n_rows) / c->stride - c->len / c->stride : 0);
    if (st != DSA_OK) return st;
    if (n_rows > 0 && (!rows || ((c->pooling >= DSA_POOL_GATED) != (gates != NULL))))
        return dsa__fail(ctx, DSA_ERR_NULL, "dsa_compress: rows is NULL, or gates where there are none or the other way round");
    for (j = 0; j < n_rows; j++) {
        float *x = c->rows + c->len % c->room * c->width;
        memcpy(x, rows + j * c->width, sizeof(float) * (size_t)c->width);
        if (gates) memcpy(c->gates + c->len % c->room * c->width, gates + j * c->width, sizeof(float) * (size_t)c->width);
        if (!c->norm_pooled) (void)dsa_norm_rows(c->norm, x, 1, c->dim, c->dim, c->desc.gain, c->desc.bias, c->eps);
        c->len++;
        c->first = dsa__max64(c->first, c->len - c->room);
        if (c->len % c->stride != 0) continue;
        dsa__compress_entry(c, c->len / c->stride - 1);
        (void)dsa__append_rows(ctx, cache, 1, c->entry, NULL);           /* on the CPU, with room: it cannot fail */
    }
    return DSA_OK;
}

DSA_API dsa_status dsa_compressor_truncate(const dsa_ctx *ctx, dsa_compressor *c, dsa_cache *cache, int64_t n_tokens)
{
    int64_t need;
    dsa_status st = dsa__compress_check(ctx, c, cache, 0);
    if (st != DSA_OK) return st;
    if (n_tokens < 0 || n_tokens > c->len) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_compressor_truncate: not 0 <= n_tokens <= len");
    need = n_tokens / c->stride * c->stride;             /* what the next entry will be made of besides rows to come */
    if (c->pooling == DSA_POOL_GATED_OVERLAP) need = dsa__max64(need - c->stride, 0);
    if (need < n_tokens && need < c->first)
        return dsa__fail(ctx, DSA_ERR_CAPACITY, "dsa_compressor_truncate: rows of the incomplete entry are no longer kept (n_kept)");
    c->len = n_tokens;
    c->first = dsa__min64(c->first, n_tokens);
    cache->len = n_tokens / c->stride;
    return DSA_OK;
}

/* ============================================================================================
   >>score                                    2. and 3. index scores, selection, and both in one pass
   ============================================================================================ */

#define DSA__GROUP 32                        /* most query rows that share one pass over the keys */
#define DSA__GROUP_SPLIT 8                   /* the same where every task holds all of them, each for its part of the keys */

/* One task's scratch, for up to `group` query rows at a time. */
typedef struct dsa__score_task {
    float *head;                             /* the heads of one query, rotated and rounded [HI, D] */
    float *w;                                /* [HI] with the query's scales in */
    float *ones;                             /* [HI] index_scale, where heads have no weights of their own */
    unsigned char *packed;                   /* [group] prepared queries, query_bytes apart */
    const unsigned char **rows;              /* [KEYS] */
    float *scale;                            /* [KEYS] */
    float *I;                                /* [group, KEYS] */
    void *scratch;
    dsa__topk *top;                          /* [group] */
    const void **queries;                    /* [group] what is handed to the kernel */
    int64_t *ks, *ke;                        /* [group] key range of each row, empty where there is nothing to score */
    int64_t *visible, *items, *local;        /* [group] tokens that it sees, items to choose from, and newest ones that are forced in */
    float *best;                             /* [group] highest score so far in a block that the last chunk of keys cut in two */
} dsa__score_task;

/* A row of the call is a query or, with index_groups, one group of its heads: a list per group is a list per smaller query. Without
   ReLU a head goes in twice, x = ReLU(x) - ReLU(-x): one of the two is 0, so the score is the same to the bit. An item is what
   is chosen: a key, or a block of keys. */

typedef struct dsa__score_call {
    const dsa_ctx *ctx;
    const dsa_score_args *args;
    const dsa_selection *out;                /* NULL: plain scores */
    dsa_selection sel;                       /* *out with its defaults resolved */
    dsa__score_task *tasks;                  /* [n_threads] */
    int32_t n_heads, n_tasks, group;         /* n_heads: as the kernel sees them */
    int32_t n_lists, per_list, block;        /* rows per query, index heads of a row, keys per item */
    int64_t n_rows, span, length;            /* tokens per item in a list, and the list's length */
    size_t query_bytes;
    float *scores;                           /* plain scores: [n_rows, stride] */
    int64_t n_cols, stride;
    int64_t row, n;                          /* the rows whose keys are being split */
    int on_device;                           /* the keys are on config.cuda: no scratch here */
} dsa__score_call;

/* The call, or with run = 0 only whether it can run, on the device that holds the keys. */
static dsa_status dsa__score_device(const dsa__score_call *call, int run)
{
    dsa_score_args a = *call->args;
    a.n_index_heads = call->n_heads;
    return dsa__fail_device(call->ctx, call->ctx->config.cuda->score(call->ctx, &a, call->out ? &call->sel : NULL, call->n_rows,
                                                                      call->scores, call->n_cols, call->stride, run));
}

/* Resolves and checks; takes the scratch of all tasks from the arena. */
static dsa_status dsa__score_plan(const dsa_ctx *ctx, const dsa_score_args *a, const dsa_selection *out,
                                  dsa__arena *arena, dsa__score_call *call)
{
    const dsa__kernels *kernels;
    const dsa_config *f;
    dsa_type format = DSA_F32;
    int64_t longest = 0;
    int32_t t, i, D, room;                               /* room: query rows that a task's scratch holds */
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    memset(call, 0, sizeof *call);
    if (!a) return dsa__fail(ctx, DSA_ERR_NULL, "score: args is NULL");
    kernels = ctx->kernels;
    call->ctx = ctx;
    call->args = a;
    call->out = out;
    f = &ctx->config;
    call->n_lists = f->index_groups;
    call->per_list = (a->n_index_heads ? a->n_index_heads : f->n_index_heads) / call->n_lists;
    if (call->per_list < 1 || call->per_list > DSA_MAX_DIM || (a->n_index_heads && a->n_index_heads % call->n_lists != 0))
        return dsa__fail(ctx, DSA_ERR_SHAPE, "score: n_index_heads");
    call->n_heads = call->per_list * (f->index_linear ? 2 : 1);
    st = dsa__rows(ctx, a->n_seqs, a->seqs, &call->n_rows);
    if (st == DSA_OK) st = dsa__batch_check(ctx, a->n_seqs, a->seqs, DSA_INDEX_KEY);
    if (st != DSA_OK) return st;
    call->n_rows *= call->n_lists;
    if (call->n_rows > DSA__MAX_POS) return dsa__fail(ctx, DSA_ERR_OVERFLOW, "score: more than 2^31 - 1 lists in one call");
    call->block = out ? f->block_size : 1;
    call->span = dsa__list_span(f);
    if (out) {
        call->sel = *out;
        if (call->sel.top_k == 0) call->sel.top_k = ctx->config.top_k;
        if (call->sel.top_k < 1) return dsa__fail(ctx, DSA_ERR_SHAPE, "select: top_k is negative");
        if (out->order != DSA_ORDER_INDEX && out->order != DSA_ORDER_RANK) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "select: unknown order");
        call->length = dsa_list_length(ctx, call->sel.top_k);
        if (call->length > DSA__MAX_POS) return dsa__fail(ctx, DSA_ERR_OVERFLOW, "select: a list exceeds 2^31 - 1 tokens");
        if (call->span > 1 && (out->scores || out->order == DSA_ORDER_RANK))
            return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "select: scores and rank belong to items, so they need list_entries");
        if (a->ks && (call->span > 1 || call->block > 1 || f->n_local_blocks))
            return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "select: ks and ke are not built for blocks, local blocks and pools named by token");
    }
    for (i = 0; i < a->n_seqs; i++) {
        longest = dsa__max64(longest, dsa__n_q(&a->seqs[i]));
        format = a->seqs[i].index->format;
    }
    longest *= call->n_lists;
    call->on_device = a->n_seqs > 0 && dsa__on_device(a->seqs[0].index);
    if (call->on_device) {
        st = dsa__plain_only(ctx, "score: pools, groups, blocks and index_linear run on the CPU only");
        return st == DSA_OK ? dsa__score_device(call, 0) : st;
    }
    D = f->dim_index;
    call->n_tasks = ctx->config.n_threads;               /* of no length: an append between query and call changes no size */
    call->group = (int32_t)dsa__max64(1, dsa__min64(longest, call->n_rows < call->n_tasks ? DSA__GROUP_SPLIT
                        : dsa__min64(DSA__GROUP, (call->n_rows + call->n_tasks - 1) / call->n_tasks)));
    /* Fewer rows than tasks go in larger groups: with room for those, a workspace serves any smaller batch as well. */
    room = (int32_t)dsa__max64(call->group, dsa__min64(longest, dsa__min64(DSA__GROUP_SPLIT, call->n_tasks - 1)));
    call->query_bytes = (kernels->query_bytes(format, call->n_heads, D) + 63) & ~(size_t)63;
    call->tasks = (dsa__score_task *)dsa__take(arena, call->n_tasks, 1, sizeof *call->tasks);
    for (t = 0; t < call->n_tasks; t++) {
        dsa__score_task k;
        memset(&k, 0, sizeof k);
        k.head    = (float *)dsa__take(arena, call->n_heads, D, sizeof(float));
        k.w       = (float *)dsa__take(arena, call->n_heads, 1, sizeof(float));
        k.ones    = (float *)dsa__take(arena, f->index_no_weights ? call->per_list : 0, 1, sizeof(float));
        k.packed  = (unsigned char *)dsa__take(arena, room, 1, call->query_bytes);
        k.rows    = (const unsigned char **)dsa__take(arena, DSA__KEYS, 1, sizeof *k.rows);
        k.scale   = (float *)dsa__take(arena, DSA__KEYS, 1, sizeof(float));
        k.I       = (float *)dsa__take(arena, room, DSA__KEYS, sizeof(float));
        k.scratch = dsa__take(arena, 1, 1, kernels->score_bytes(format, call->n_heads, D));
        k.top     = (dsa__topk *)dsa__take(arena, room, 1, sizeof *k.top);
        k.queries = (const void **)dsa__take(arena, room, 1, sizeof *k.queries);
        k.ks      = (int64_t *)dsa__take(arena, room, 1, sizeof(int64_t));
        k.ke      = (int64_t *)dsa__take(arena, room, 1, sizeof(int64_t));
        k.visible = (int64_t *)dsa__take(arena, room, 1, sizeof(int64_t));
        k.items   = (int64_t *)dsa__take(arena, room, 1, sizeof(int64_t));
        k.local   = (int64_t *)dsa__take(arena, room, 1, sizeof(int64_t));
        k.best    = (float *)dsa__take(arena, room, 1, sizeof(float));
        for (i = 0; out && i < room; i++) {
            dsa__topk top;
            memset(&top, 0, sizeof top);
            dsa__topk_take(arena, kernels, call->sel.top_k, &top);
            if (arena->base && k.top) k.top[i] = top;
        }
        for (i = 0; arena->base && f->index_no_weights && i < call->per_list; i++) k.ones[i] = f->index_scale;
        if (arena->base && call->tasks) call->tasks[t] = k;
    }
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "score: the workspace does not fit in size_t") : DSA_OK;
}

/* The same, with the caller's memory and the arguments that only the real call needs. */
static dsa_status dsa__score_start(const dsa_ctx *ctx, const dsa_score_args *a, const dsa_selection *out, dsa__score_call *call)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa_status st = dsa__score_plan(ctx, a, out, &arena, call);
    if (st != DSA_OK) return st;
    if (call->n_rows > 0 && (!a->q || (!a->w && !ctx->config.index_no_weights)))
        return dsa__fail(ctx, DSA_ERR_NULL, "score: q or w is NULL");
    if (a->w && ctx->config.index_no_weights) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "score: w beside index_no_weights");
    if ((a->ks == NULL) != (a->ke == NULL)) return dsa__fail(ctx, DSA_ERR_NULL, "score: ks and ke go together");
    if (out && call->n_rows > 0 && !out->indices) return dsa__fail(ctx, DSA_ERR_NULL, "select: indices is NULL");
    st = dsa__arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__arena_over(a->workspace);
    st = dsa__score_plan(ctx, a, out, &arena, call);
    DSA__CARVED(st, arena, a->workspace_size);
    return st;
}

/* Prepares the query of row `row`: q [HI, D] and w [HI] rounded to the key format, then packed as the kernel wants them. */
static void dsa__score_query(const dsa__score_call *call, const dsa__score_task *t, int64_t row, const dsa_cache *c, void *packed)
{
    const dsa__kernels *kernels = call->ctx->kernels;
    const float *q = call->args->q + row * call->per_list * c->dim, *w = call->args->w ? call->args->w + row * call->per_list : t->ones;
    int64_t n = (int64_t)call->per_list * c->dim, i;
    kernels->query_round(c->format, c->hadamard, call->per_list, c->dim, q, w, t->head, t->w);
    if (call->n_heads > call->per_list) {
        for (i = 0; i < n; i++) t->head[n + i] = -t->head[i];
        for (i = 0; i < call->per_list; i++) t->w[call->per_list + i] = -t->w[i];
    }
    kernels->query_pack(c->format, call->n_heads, c->dim, t->head, t->w, packed);
}

/* Prepares rows [row, row + n) of one sequence: key ranges, queries, empty selections. Rows that have nothing to choose take
   all they see and leave an empty range: the dense fallback. */
static const dsa_cache *dsa__score_begin(const dsa__score_call *call, dsa__score_task *t, dsa__cursor *cur, int64_t row, int64_t n)
{
    const dsa_config *f = &call->ctx->config;
    const dsa_seq *seq = dsa__seek(cur, row / call->n_lists);
    const dsa_cache *c = seq->index;
    int64_t tokens = dsa__tokens(call->ctx, seq), len = tokens / f->stride, i, j;
    for (i = 0; i < n; i++) {
        int64_t query = (row + i) / call->n_lists, ks = 0, ke;
        t->visible[i] = dsa__max64(tokens - dsa__n_q(seq) + (query - cur->first) + 1, 0);
        ke = t->visible[i] / f->stride;                  /* an entry is seen when its last token is */
        if (call->args->ks) {
            ks = dsa__clamp64(call->args->ks[query], 0, len);
            ke = dsa__clamp64(call->args->ke[query], 0, len);
        }
        if (!call->out) {
            ks = dsa__min64(ks, call->n_cols);
            ke = dsa__min64(ke, call->n_cols);
        } else {
            dsa__topk *top = &t->top[i];
            dsa__topk_begin(top);
            top->k = call->sel.top_k;
            t->local[i] = 0;
            t->best[i] = -dsa__infinity();
            t->items[i] = (dsa__max64(ke - ks, 0) + call->block - 1) / call->block;
            if (call->sel.order == DSA_ORDER_INDEX && !call->sel.scores && t->items[i] <= call->sel.top_k) {
                for (j = ks; j < ks + t->items[i]; j++) top->i[top->n++] = (int32_t)j;
                ke = ks;
            } else if (f->n_local_blocks) {              /* they are not scored: the others compete for what they leave of k */
                t->local[i] = dsa__min64(dsa__min64(f->n_local_blocks, call->sel.top_k), t->items[i]);
                top->k -= t->local[i];
                ke = top->k > 0 ? (t->items[i] - t->local[i]) * call->block : 0;
            }
        }
        t->ks[i] = ks;
        t->ke[i] = dsa__max64(ks, ke);
        if (ke > ks) dsa__score_query(call, t, row + i, c, t->packed + (size_t)i * call->query_bytes);
    }
    return c;
}

/* From the scores I of keys [lo, hi) of row i to those of its blocks: the highest (a NaN is none). A block may go on in the next chunk. */
static void dsa__score_blocks(const dsa__score_call *call, dsa__score_task *t, int64_t i, const float *I, int64_t lo, int64_t hi)
{
    float done[DSA__KEYS], best = t->best[i];
    int64_t first = lo / call->block, n = 0, s, end;
    for (s = lo; s < hi; ) {
        end = dsa__min64((s / call->block + 1) * call->block, hi);
        for (; s < end; s++) best = I[s - lo] > best ? I[s - lo] : best;
        if (s % call->block == 0 || s == t->ke[i]) {
            done[n++] = best;
            best = -dsa__infinity();
        }
    }
    t->best[i] = best;
    dsa__topk_push(&t->top[i], done, n, first);
}

/* Scores the keys of [begin, end) that the n prepared rows see, chunk after chunk, each for all rows while it lies in L1. */
static void dsa__score_keys(const dsa__score_call *call, dsa__score_task *t, const dsa_cache *c, int64_t row, int64_t n,
                            int64_t begin, int64_t end)
{
    int planar = dsa__planar(c->kind, c->format);
    int64_t at, i, lo, hi;
    int32_t j, m, n_q;
    for (at = begin; at < end; at += m) {
        int32_t of[DSA__GROUP];
        m = (int32_t)dsa__min64(DSA__KEYS, end - at);
        for (i = 0, n_q = 0; i < n; i++)
            if (dsa__max64(t->ks[i], at) < dsa__min64(t->ke[i], at + m)) {       /* never an empty range: its query is not prepared */
                t->queries[n_q] = t->packed + (size_t)i * call->query_bytes;
                of[n_q++] = (int32_t)i;
            }
        if (n_q == 0) continue;
        for (j = 0; j < m; ) {                                            /* page after page */
            int64_t offset, page = dsa__page_of(c, at + j, &offset);
            int32_t run = (int32_t)dsa__min64(m - j, c->page_size - offset), r;
            size_t stride = planar ? (size_t)c->dim : c->row_stride;
            const unsigned char *p = dsa__row_in(c, page, offset);
            for (r = 0; r < run; r++) t->rows[j + r] = p + (size_t)r * stride;
            if (planar) memcpy(t->scale + j, dsa__scale_in(c, page, offset), 4 * (size_t)run);
            j += run;
        }
        call->ctx->kernels->score(c->format, call->n_heads, c->dim, n_q, t->queries, m, t->rows, planar ? t->scale : NULL,
                                  t->I, DSA__KEYS, t->scratch);
        for (j = 0; j < n_q; j++) {
            const float *I = t->I + (int64_t)j * DSA__KEYS;
            i = of[j];
            lo = dsa__max64(t->ks[i], at);
            hi = dsa__min64(t->ke[i], at + m);
            if (call->block > 1) dsa__score_blocks(call, t, i, I + (lo - at), lo, hi);
            else if (call->out) dsa__topk_push(&t->top[i], I + (lo - at), hi - lo, lo);
            else memcpy(call->scores + (row + i) * call->stride + lo, I + (lo - at), sizeof(float) * (size_t)(hi - lo));
        }
    }
}

/* The widest range of keys that any of the n prepared rows sees. */
static void dsa__score_span(const dsa__score_task *t, int64_t n, int64_t *begin, int64_t *end)
{
    int64_t i;
    *begin = DSA__MAX_POS;
    *end = 0;
    for (i = 0; i < n; i++)
        if (t->ks[i] < t->ke[i]) {
            *begin = dsa__min64(*begin, t->ks[i]);
            *end = dsa__max64(*end, t->ke[i]);
        }
}

/* How many rows from `row` on, at most `most`, belong to the sequence of `row`. */
static int64_t dsa__score_rows(const dsa__score_call *call, dsa__cursor *cur, int64_t row, int64_t most)
{
    const dsa_seq *s = dsa__seek(cur, row / call->n_lists);
    return dsa__min64(dsa__min64(most, call->n_rows - row), (cur->first + dsa__n_q(s)) * call->n_lists - row);
}

/* Writes the list of a finished selection: what was chosen, the forced items (the newest, so they come last), and their tokens. */
static void dsa__score_emit(const dsa__score_call *call, dsa__score_task *t, int64_t i, int64_t row)
{
    dsa__topk *top = &t->top[i];
    int32_t *x = call->sel.indices + row * call->length;
    int64_t n = 0, j, s, stride = call->ctx->config.stride, visible = t->visible[i];
    if (t->local[i] > 0) {
        dsa__topk_compact(top);
        for (j = t->items[i] - t->local[i]; j < t->items[i]; j++) {
            top->s[top->n] = dsa__infinity();
            top->i[top->n++] = (int32_t)j;
        }
        top->k = call->sel.top_k;
    }
    if (call->span == 1) {
        dsa__topk_emit(top, &call->sel, row);
        return;
    }
    dsa__topk_compact(top);
    for (j = 0; j < top->n; j++)
        for (s = top->i[j] * call->span; s < dsa__min64((top->i[j] + 1) * call->span, visible); s++) x[n++] = (int32_t)s;
    if (call->ctx->config.keep_tail)
        for (s = visible / stride * stride; s < visible; s++) x[n++] = (int32_t)s;
    if (call->sel.counts) call->sel.counts[row] = (int32_t)n;
    while (n < call->length) x[n++] = -1;
}

/* Plain scores start at -inf everywhere. */
static void dsa__score_clear(const dsa__score_call *call, int64_t row, int64_t n)
{
    int64_t i, j;
    for (i = row; !call->out && i < row + n; i++)
        for (j = 0; j < call->n_cols; j++) call->scores[i * call->stride + j] = -dsa__infinity();
}

/* Groups of whole rows, every n_tasks-th. */
static void dsa__score_rows_task(void *arg, int32_t task)
{
    dsa__score_call *call = (dsa__score_call *)arg;
    dsa__score_task *t = &call->tasks[task];
    dsa__cursor cur = { call->args->seqs, 0, 0 };
    int64_t row = 0, n, unit = 0, begin, end, i;
    for (; row < call->n_rows; row += n, unit++) {
        const dsa_cache *c;
        n = dsa__score_rows(call, &cur, row, call->group);
        if (unit % call->n_tasks != task) continue;
        c = dsa__score_begin(call, t, &cur, row, n);
        dsa__score_clear(call, row, n);
        dsa__score_span(t, n, &begin, &end);
        dsa__score_keys(call, t, c, row, n, begin, end);
        for (i = 0; call->out && i < n; i++) dsa__score_emit(call, t, i, row + i);
    }
}

/* The task-th part of the keys of rows [call->row, + call->n). */
static void dsa__score_split_task(void *arg, int32_t task)
{
    dsa__score_call *call = (dsa__score_call *)arg;
    dsa__score_task *t = &call->tasks[task];
    dsa__cursor cur = { call->args->seqs, 0, 0 };
    const dsa_cache *c = dsa__score_begin(call, t, &cur, call->row, call->n);
    int64_t begin, end, part, i;
    dsa__score_span(t, call->n, &begin, &end);
    part = ((end - begin) / DSA__KEYS + 1 + call->n_tasks - 1) / call->n_tasks * DSA__KEYS;
    part = (part + call->block - 1) / call->block * call->block;             /* no block in two parts: with blocks begin is 0 */
    dsa__score_keys(call, t, c, call->row, call->n, begin + task * part, dsa__min64(end, begin + (task + 1) * part));
    for (i = 0; call->out && i < call->n; i++) dsa__topk_compact(&t->top[i]);
}

/* Runs a checked call. With enough rows every task takes whole ones. Otherwise the keys are split: the total order makes the
   union's top-k unique, so the parts do not matter. A row of the dense fallback is complete in every task and is taken from the
   first. */
static void dsa__score_run(dsa__score_call *call)
{
    dsa__cursor cur = { call->args->seqs, 0, 0 };
    int64_t i;
    int32_t t;
    if (call->n_rows >= call->n_tasks) {
        dsa__parallel(call->ctx, call->n_tasks, dsa__score_rows_task, call);
        return;
    }
    for (; call->row < call->n_rows; call->row += call->n) {
        call->n = dsa__score_rows(call, &cur, call->row, call->group);
        dsa__score_clear(call, call->row, call->n);
        dsa__parallel(call->ctx, call->n_tasks, dsa__score_split_task, call);
        for (i = 0; call->out && i < call->n; i++) {
            for (t = 1; t < call->n_tasks && call->tasks[0].ks[i] < call->tasks[0].ke[i]; t++)
                dsa__topk_join(&call->tasks[0].top[i], &call->tasks[t].top[i]);
            dsa__score_emit(call, &call->tasks[0], i, call->row + i);
        }
    }
}

static dsa_status dsa__score_workspace(const dsa_ctx *ctx, const dsa_score_args *args, const dsa_selection *out, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__score_call call;
    dsa_status st = dsa__score_plan(ctx, args, out, &arena, &call);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "score: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

DSA_API dsa_status dsa_score_workspace(const dsa_ctx *ctx, const dsa_score_args *args, size_t *bytes)
{
    return dsa__score_workspace(ctx, args, NULL, bytes);
}

DSA_API dsa_status dsa_score_select_workspace(const dsa_ctx *ctx, const dsa_score_args *args, const dsa_selection *out, size_t *bytes)
{
    if (!out) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_score_select: out is NULL");
    return dsa__score_workspace(ctx, args, out, bytes);
}

DSA_API dsa_status dsa_score(const dsa_ctx *ctx, const dsa_score_args *args, float *scores, int64_t n_cols, int64_t stride)
{
    dsa__score_call call;
    dsa_status st = dsa__score_start(ctx, args, NULL, &call);
    if (st != DSA_OK) return st;
    if (n_cols < 0 || stride < n_cols) return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_score: not 0 <= n_cols <= stride");
    if (call.n_rows > 0 && n_cols > 0 && !scores) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_score: scores is NULL");
    call.scores = scores;
    call.n_cols = n_cols;
    call.stride = stride;
    if (call.on_device) return dsa__score_device(&call, 1);
    dsa__score_run(&call);
    return DSA_OK;
}

DSA_API dsa_status dsa_score_select(const dsa_ctx *ctx, const dsa_score_args *args, const dsa_selection *out)
{
    dsa__score_call call;
    dsa_status st;
    if (!out) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_score_select: out is NULL");
    st = dsa__score_start(ctx, args, out, &call);
    if (st == DSA_OK && call.on_device) return dsa__score_device(&call, 1);
    if (st == DSA_OK) dsa__score_run(&call);
    return st;
}

/* ---- selection over stored scores ---------------------------------------------------------- */
typedef struct dsa__select_call {
    const dsa_select_args *args;
    dsa_selection sel;
    dsa__topk *tops;                         /* [n_tasks] */
    int32_t n_tasks;
} dsa__select_call;

static dsa_status dsa__select_plan(const dsa_ctx *ctx, const dsa_select_args *a, const dsa_selection *out,
                                   dsa__arena *arena, dsa__select_call *call)
{
    int32_t t;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    memset(call, 0, sizeof *call);
    if (!a || !out) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_select: args or out is NULL");
    if (a->n_rows < 0 || a->n_cols < 0 || a->n_cols > a->stride || a->n_cols > DSA__MAX_POS)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_select: n_rows, or not 0 <= n_cols <= stride");
    if (dsa__list_span(&ctx->config) > 1 || ctx->config.block_size > 1 || ctx->config.n_local_blocks)
        return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "dsa_select: blocks, local blocks and pools named by token: dsa_score_select");
    call->args = a;
    call->sel = *out;
    if (call->sel.top_k == 0) call->sel.top_k = ctx->config.top_k;
    if (call->sel.top_k < 1) return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_select: top_k is negative");
    if (out->order != DSA_ORDER_INDEX && out->order != DSA_ORDER_RANK) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_select: unknown order");
    call->n_tasks = (int32_t)dsa__min64(ctx->config.n_threads, dsa__max64(a->n_rows, 1));
    call->tops = (dsa__topk *)dsa__take(arena, call->n_tasks, 1, sizeof(dsa__topk));
    for (t = 0; t < call->n_tasks; t++) {
        dsa__topk top;
        memset(&top, 0, sizeof top);
        dsa__topk_take(arena, ctx->kernels, dsa__min64(call->sel.top_k, dsa__max64(a->n_cols, 1)), &top);
        if (arena->base && call->tops) call->tops[t] = top;
    }
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_select: the workspace does not fit in size_t") : DSA_OK;
}

static void dsa__select_task(void *arg, int32_t task)
{
    dsa__select_call *call = (dsa__select_call *)arg;
    dsa__topk *top = &call->tops[task];
    const dsa_select_args *a = call->args;
    int64_t row, ks, ke;
    for (row = task; row < a->n_rows; row += call->n_tasks) {
        ks = a->ks ? dsa__clamp64(a->ks[row], 0, a->n_cols) : 0;
        ke = a->ke ? dsa__clamp64(a->ke[row], 0, a->n_cols) : a->n_cols;
        dsa__topk_row(top, a->scores + row * a->stride + ks, dsa__max64(ke - ks, 0), ks);
        dsa__topk_emit(top, &call->sel, row);
    }
}

DSA_API dsa_status dsa_select_workspace(const dsa_ctx *ctx, const dsa_select_args *args, const dsa_selection *out, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__select_call call;
    dsa_status st = dsa__select_plan(ctx, args, out, &arena, &call);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_select: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

DSA_API dsa_status dsa_select(const dsa_ctx *ctx, const dsa_select_args *a, const dsa_selection *out)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__select_call call;
    dsa_status st = dsa__select_plan(ctx, a, out, &arena, &call);
    if (st != DSA_OK) return st;
    if (a->n_rows > 0 && (!out->indices || (a->n_cols > 0 && !a->scores)))
        return dsa__fail(ctx, DSA_ERR_NULL, "dsa_select: scores or indices is NULL");
    if ((a->ks == NULL) != (a->ke == NULL)) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_select: ks and ke go together");
    st = dsa__arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__arena_over(a->workspace);
    st = dsa__select_plan(ctx, a, out, &arena, &call);
    DSA__CARVED(st, arena, a->workspace_size);
    if (st != DSA_OK) return st;
    dsa__parallel(ctx, dsa__min64(call.n_tasks, a->n_rows), dsa__select_task, &call);
    return DSA_OK;
}

/* ---- merging shards ------------------------------------------------------------------------ */
static dsa_status dsa__merge_plan(const dsa_ctx *ctx, const dsa_merge_topk_args *a, const dsa_selection *out,
                                  dsa__arena *arena, dsa_selection *sel, float **s, int32_t **x)
{
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!a || !out) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_merge_topk: args or out is NULL");
    if (a->n_parts < 0 || a->k_in < 0 || a->n_rows < 0) return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_merge_topk: a count is negative");
    *sel = *out;
    if (sel->top_k == 0) sel->top_k = ctx->config.top_k;
    if (sel->top_k < 1) return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_merge_topk: top_k is negative");
    if (out->order != DSA_ORDER_INDEX && out->order != DSA_ORDER_RANK)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_merge_topk: unknown order");
    *s = (float *)dsa__take(arena, a->n_parts, a->k_in, sizeof(float));
    *x = (int32_t *)dsa__take(arena, a->n_parts, a->k_in, sizeof(int32_t));
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_merge_topk: the workspace does not fit in size_t") : DSA_OK;
}

DSA_API dsa_status dsa_merge_topk_workspace(const dsa_ctx *ctx, const dsa_merge_topk_args *args, const dsa_selection *out, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa_selection sel;
    float *s;
    int32_t *x;
    dsa_status st = dsa__merge_plan(ctx, args, out, &arena, &sel, &s, &x);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_merge_topk: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

/* A few thousand candidates a row: sorted outright, by rank, cut at k, and back into index order if that is wanted. */
DSA_API dsa_status dsa_merge_topk(const dsa_ctx *ctx, const dsa_merge_topk_args *a, const dsa_selection *out)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa_selection sel;
    dsa__topk top;
    int64_t row, j;
    int32_t p;
    dsa_status st;
    memset(&top, 0, sizeof top);
    st = dsa__merge_plan(ctx, a, out, &arena, &sel, &top.s, &top.i);
    if (st != DSA_OK) return st;
    if (a->n_rows > 0 && !out->indices) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_merge_topk: out->indices is NULL");
    if (a->n_parts > 0 && (!a->indices || !a->scores)) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_merge_topk: indices or scores is NULL");
    for (p = 0; p < a->n_parts; p++)
        if (a->n_rows > 0 && a->k_in > 0 && (!a->indices[p] || !a->scores[p]))
            return dsa__fail(ctx, DSA_ERR_NULL, "dsa_merge_topk: a part is NULL");
    st = dsa__arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__arena_over(a->workspace);
    st = dsa__merge_plan(ctx, a, out, &arena, &sel, &top.s, &top.i);
    DSA__CARVED(st, arena, a->workspace_size);
    if (st != DSA_OK) return st;
    for (row = 0; row < a->n_rows; row++) {
        top.n = 0;
        for (p = 0; p < a->n_parts; p++)
            for (j = row * a->k_in; j < (row + 1) * a->k_in; j++)
                if (a->indices[p][j] >= 0 && dsa__selectable(a->scores[p][j])) {
                    top.s[top.n] = a->scores[p][j];
                    top.i[top.n++] = a->indices[p][j];
                }
        dsa__pairs_sort(top.s, top.i, top.n, 1);
        top.n = top.k = dsa__min64(top.n, sel.top_k);
        if (sel.order == DSA_ORDER_INDEX) dsa__pairs_sort(top.s, top.i, top.n, 0);
        dsa__topk_emit(&top, &sel, row);
    }
    return DSA_OK;
}

/* ============================================================================================
   >>attend                                   4. attention over what was selected, as an accumulator
   ============================================================================================
   A unit of work is one row with all its heads, or, with fewer rows than threads, with some of its heads: heads know nothing
   of each other, so nothing has to be merged and no cut can change a bit. Within a unit the rows are taken in blocks of DSA__ROWS
   valid entries from the start of the list or range. */

#define DSA__HEADS 16                                    /* heads are split at multiples of this */

typedef struct dsa__attend_task {
    void *packed, *scratch;
    const unsigned char **rows;
    unsigned char *tile;                     /* rows brought into the kernel's form */
    float *q;                                /* the queries to match */
} dsa__attend_task;

/* A head of grouped queries reads its KV head's part of two rows. They meet in a tile as [value | key], and the query becomes
   [0 | q]: the kernels then see a latent whose first dim_v channels are the value. The zeros cost half a dot product more, the copy
   a fraction of that; no kernel knows of it. */

typedef struct dsa__attend_call {
    const dsa_ctx *ctx;
    const dsa_attend_args *args;
    dsa_attend_state state;                  /* with its defaults resolved */
    dsa__attend_shape shape;                 /* of one unit */
    dsa__attend_task *tasks;                 /* [n_threads] */
    int32_t n_parts;                         /* units per row */
    int32_t n_lists, n_kv;                   /* lists per row; KV heads of grouped queries, else 0 */
    size_t tile_row;                         /* bytes of a row in a tile, 0: rows are read where they lie */
    int64_t n_indices, index_stride;
    int fused;                               /* begin and finish within the unit, while its rows of out are in the cache */
    int causal;                              /* a list may not see what only a longer chunk has appended already: dsa_step, dsa_layer */
    const float *sinks;
    float *lse, *max_logit;
    int on_device;                           /* the rows are on config.cuda: no scratch here */
} dsa__attend_call;

static dsa_status dsa__attend_device(const dsa__attend_call *call, int run)
{
    dsa_attend_args a = *call->args;
    a.scale = call->shape.scale;
    a.n_indices = call->n_indices;
    a.index_stride = call->index_stride;
    return dsa__fail_device(call->ctx, call->ctx->config.cuda->attend(call->ctx, &a, &call->state, call->shape.exact, call->fused,
                                                                       call->causal, call->sinks, call->lse, call->max_logit, run));
}

static dsa_status dsa__state_check(const dsa_ctx *ctx, const dsa_attend_state *state, dsa_attend_state *s)
{
    dsa_status st = dsa__ctx_check(ctx);
    memset(s, 0, sizeof *s);
    if (st != DSA_OK) return st;
    if (!state) return dsa__fail(ctx, DSA_ERR_NULL, "attend: state is NULL");
    *s = *state;
    if (s->n_heads == 0) s->n_heads = ctx->config.n_heads;
    if (s->dim_v == 0) s->dim_v = ctx->config.dim_value;
    if (s->n_rows < 0 || s->n_rows > DSA__MAX_POS || s->n_heads < 1 || s->n_heads > DSA_MAX_DIM || s->dim_v < 1 || s->dim_v > DSA_MAX_DIM)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "attend: state.n_rows, n_heads or dim_v");
    return DSA_OK;
}

static dsa_status dsa__state_pointers(const dsa_ctx *ctx, const dsa_attend_state *s)
{
    return s->n_rows > 0 && (!s->max || !s->sum || !s->out)
        ? dsa__fail(ctx, DSA_ERR_NULL, "attend: state.max, sum or out is NULL") : DSA_OK;
}

static void dsa__attend_begin_heads(const dsa_attend_state *s, int64_t at, int64_t n)
{
    int64_t i;
    for (i = at; i < at + n; i++) { s->max[i] = -dsa__infinity(); s->sum[i] = 0.0f; }
    for (i = at * s->dim_v; i < (at + n) * s->dim_v; i++) s->out[i] = 0.0f;
}

/* out = (acc / sum) e^L / (e^L + e^z), L = max + ln sum (spec 5.1), for heads [at, at + n) of the state's [n_rows, n_heads] */
static void dsa__attend_finish_heads(const dsa_attend_state *s, int64_t at, int64_t n, const float *sinks,
                                     float *out, float *lse, float *max_logit)
{
    int64_t i;
    int32_t d;
    for (i = at; i < at + n; i++) {
        const float *acc = s->out + i * s->dim_v;
        float *o = out + i * s->dim_v, sum = s->sum[i], max = s->max[i], f = 0.0f, z = sinks ? sinks[i % s->n_heads] : -dsa__infinity();
        int empty = sum == 0.0f;
        if (!empty) {
            if (z == -dsa__infinity()) f = 1.0f / sum;
            else if (z <= max) f = 1.0f / (sum + dsa__exp(z - max));
            else f = dsa__exp(max - z) / (sum * dsa__exp(max - z) + 1.0f);             /* z = +inf: 0 */
        }
        if (empty) for (d = 0; d < s->dim_v; d++) o[d] = 0.0f;
        else       for (d = 0; d < s->dim_v; d++) o[d] = acc[d] * f;
        if (max_logit) max_logit[i] = max;
        if (lse) lse[i] = empty ? dsa__infinity() : max + (float)log((double)sum);
    }
}

DSA_API dsa_status dsa_attend_begin(const dsa_ctx *ctx, const dsa_attend_state *state)
{
    dsa_attend_state s;
    dsa_status st = dsa__state_check(ctx, state, &s);
    if (st == DSA_OK) st = dsa__state_pointers(ctx, &s);
    if (st == DSA_OK) dsa__attend_begin_heads(&s, 0, s.n_rows * s.n_heads);
    return st;
}

static int32_t dsa__gcd(int32_t a, int32_t b)
{
    while (b) { int32_t r = a % b; a = b; b = r; }
    return a;
}

/* Values of grouped queries: beside every row of keys, in a format that a kernel can read side by side with it. */
static dsa_status dsa__grouped_check(const dsa_ctx *ctx, int32_t n_seqs, const dsa_seq *seqs)
{
    int32_t i;
    dsa_status st = dsa__batch_check(ctx, n_seqs, seqs, DSA_VALUE);
    for (i = 0; st == DSA_OK && i < n_seqs; i++) {
        const dsa_cache *k = seqs[i].latent, *v = seqs[i].value;
        if (k->format != v->format || (k->format != DSA_F32 && k->format != DSA_BF16))
            st = dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "attend: keys and values of grouped queries are both f32 or both bf16");
        else if (seqs[i].len == 0 && k->len != v->len)
            st = dsa__fail(ctx, DSA_ERR_ARGUMENT, "attend: a sequence's keys and values differ in length");
    }
    return st;
}

static dsa_status dsa__attend_plan(const dsa_ctx *ctx, const dsa_attend_args *a, const dsa_attend_state *state,
                                   dsa__arena *arena, dsa__attend_call *call)
{
    const dsa__kernels *kernels;
    dsa__attend_shape *shape = &call->shape;
    int64_t n_rows;
    int32_t t, n_tasks, groups;
    dsa_status st;
    memset(call, 0, sizeof *call);
    st = dsa__state_check(ctx, state, &call->state);
    if (st != DSA_OK) return st;
    if (!a) return dsa__fail(ctx, DSA_ERR_NULL, "attend: args is NULL");
    kernels = ctx->kernels;
    call->ctx = ctx;
    call->args = a;
    call->n_indices = a->n_indices ? a->n_indices : dsa_list_length(ctx, 0);
    call->index_stride = a->index_stride ? a->index_stride : call->n_indices;
    call->n_lists = a->n_lists ? a->n_lists : ctx->config.index_groups;
    call->n_kv = ctx->config.n_kv_heads;
    shape->scale = a->scale == 0.0f ? ctx->config.softmax_scale : a->scale;
    shape->dim_latent = ctx->config.dim_latent;
    shape->dim_rope = ctx->config.dim_rope;
    shape->dim_v = call->state.dim_v;
    if (call->n_kv) {
        shape->dim_latent = ctx->config.dim_value;
        shape->dim_rope = ctx->config.dim_latent;
        if (shape->dim_v > ctx->config.dim_value) return dsa__fail(ctx, DSA_ERR_SHAPE, "attend: dim_v is wider than the value");
    }
    if (call->n_lists < 1 || call->state.n_heads % call->n_lists != 0 || (call->n_kv && call->state.n_heads % call->n_kv != 0))
        return dsa__fail(ctx, DSA_ERR_SHAPE, "attend: n_lists or n_kv_heads does not divide n_heads");
    if (shape->dim_v > shape->dim_latent + shape->dim_rope) return dsa__fail(ctx, DSA_ERR_SHAPE, "attend: dim_v is wider than a cache row");
    if (shape->scale != shape->scale || shape->scale > FLT_MAX || shape->scale < -FLT_MAX)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "attend: scale is not finite");
    if (call->n_indices < 0 || call->index_stride < call->n_indices)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "attend: not 0 <= n_indices <= index_stride");
    if (a->what != DSA_ATTEND_LIST && a->what != DSA_ATTEND_RANGE && a->what != DSA_ATTEND_VISIBLE)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "attend: unknown what");
    if (a->index_kind != DSA_LOGICAL && a->index_kind != DSA_PHYSICAL)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "attend: unknown index_kind");
    st = dsa__rows(ctx, a->n_seqs, a->seqs, &n_rows);
    if (st == DSA_OK) st = dsa__batch_check(ctx, a->n_seqs, a->seqs, DSA_LATENT);
    if (st == DSA_OK && call->n_kv) st = dsa__grouped_check(ctx, a->n_seqs, a->seqs);
    if (st != DSA_OK) return st;
    if (n_rows != call->state.n_rows) return dsa__fail(ctx, DSA_ERR_SHAPE, "attend: state.n_rows differs from the rows of seqs");
    for (t = 0; t < a->n_seqs; t++) shape->format = a->seqs[t].latent->format;
    shape->exact = shape->format == DSA_F32 || ctx->config.precision == DSA_PRECISION_F32;
    call->on_device = a->n_seqs > 0 && dsa__on_device(a->seqs[0].latent);
    if (call->on_device) {
        st = dsa__plain_only(ctx, "attend: grouped queries and a dim_value of its own run on the CPU only");
        if (st == DSA_OK && call->n_lists > 1) st = dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "attend: several lists a row run on the CPU only");
        return st == DSA_OK ? dsa__attend_device(call, 0) : st;
    }

    n_tasks = ctx->config.n_threads;
    groups = (call->state.n_heads + DSA__HEADS - 1) / DSA__HEADS;
    call->n_parts = n_rows < 1 || n_rows >= n_tasks ? 1 : dsa__min32(groups, (int32_t)((n_tasks + n_rows - 1) / n_rows));
    shape->n_heads = dsa__min32(call->state.n_heads, (groups + call->n_parts - 1) / call->n_parts * DSA__HEADS);
    if (call->n_lists > 1 || call->n_kv > 1)             /* a unit has one list and one KV head */
        shape->n_heads = dsa__gcd(call->state.n_heads / call->n_lists, call->state.n_heads / (call->n_kv ? call->n_kv : 1));
    call->n_parts = (call->state.n_heads + shape->n_heads - 1) / shape->n_heads;
    if (call->n_kv) call->tile_row = (size_t)dsa__type_bytes(shape->format) * ((size_t)shape->dim_latent + (size_t)shape->dim_rope);
    call->tasks = (dsa__attend_task *)dsa__take(arena, n_tasks, 1, sizeof *call->tasks);
    for (t = 0; t < n_tasks; t++) {
        dsa__attend_task k;
        k.packed  = dsa__take(arena, 1, 1, kernels->attend_query_bytes(shape));
        k.scratch = dsa__take(arena, 1, 1, kernels->attend_bytes(shape));
        k.rows    = (const unsigned char **)dsa__take(arena, DSA__ROWS + DSA__AHEAD, 1, sizeof *k.rows);
        k.tile    = (unsigned char *)dsa__take(arena, call->tile_row ? DSA__ROWS + DSA__AHEAD : 0, (int64_t)call->tile_row, 1);
        k.q       = (float *)dsa__take(arena, call->n_kv ? shape->n_heads : 0, (int64_t)shape->dim_latent + shape->dim_rope, sizeof(float));
        if (arena->base && call->tasks) call->tasks[t] = k;
    }
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "attend: the workspace does not fit in size_t") : DSA_OK;
}

/* The address of entry i of a row's list or range, NULL if it is invalid. */
static const unsigned char *dsa__attend_row(const dsa_attend_args *a, const dsa_cache *c, int64_t len, const int32_t *list, int64_t i)
{
    int64_t position = list ? list[i] : i, offset, page;
    if (list && a->index_kind == DSA_PHYSICAL)
        return position < 0 || position >= c->n_pages * c->page_size ? NULL : dsa__row_at(c, position);
    if (position < 0 || position >= len) return NULL;
    page = dsa__page_of(c, position, &offset);
    return dsa__row_in(c, page, offset);
}

/* [value | key] of KV head kv in y, from the rows of the two caches; NULL if one is not there. */
static const unsigned char *dsa__attend_pair(const dsa__attend_call *call, const unsigned char *key, const unsigned char *value,
                                             int64_t kv, unsigned char *y)
{
    size_t e = (size_t)dsa__type_bytes(call->shape.format), dv = e * (size_t)call->shape.dim_latent, dk = e * (size_t)call->shape.dim_rope;
    if (!key || !value) return NULL;
    memcpy(y, value + (size_t)kv * dv, dv);
    memcpy(y + dv, key + (size_t)kv * dk, dk);
    return y;
}

/* The query heads [0, n) of a unit, as the kernel wants them. */
static const float *dsa__attend_query(const dsa__attend_call *call, const float *q, int32_t n, float *y)
{
    int32_t dv = call->shape.dim_latent, dk = call->shape.dim_rope, h;
    if (!call->n_kv) return q;
    for (h = 0; h < n; h++) {
        memset(y + (int64_t)h * (dv + dk), 0, sizeof(float) * (size_t)dv);
        memcpy(y + (int64_t)h * (dv + dk) + dv, q + (int64_t)h * dk, sizeof(float) * (size_t)dk);
    }
    return y;
}

static void dsa__attend_task_run(void *arg, int32_t task)
{
    dsa__attend_call *call = (dsa__attend_call *)arg;
    const dsa__kernels *kernels = call->ctx->kernels;
    const dsa_attend_state *s = &call->state;
    const dsa_attend_args *a = call->args;
    dsa__attend_task *t = &call->tasks[task];
    dsa__cursor cur = { a->seqs, 0, 0 };
    int64_t unit, n_units = s->n_rows * call->n_parts;
    int32_t n_tasks = (int32_t)dsa__min64(call->ctx->config.n_threads, n_units);
    for (unit = task; unit < n_units; unit += n_tasks) {
        dsa__attend_shape shape = call->shape;
        int64_t row = unit / call->n_parts, head = unit % call->n_parts * shape.n_heads, at = row * s->n_heads + head, i = 0, end;
        const dsa_seq *seq = dsa__seek(&cur, row);
        const dsa_cache *c = seq->latent;
        const int64_t lists = row * call->n_lists + head * call->n_lists / s->n_heads, kv = head * call->n_kv / s->n_heads;
        const int32_t *list = a->what == DSA_ATTEND_LIST ? a->indices + lists * call->index_stride : NULL;
        int64_t len = dsa__len(seq, c), dim_q = (int64_t)call->ctx->config.dim_latent + call->ctx->config.dim_rope;
        int32_t n = 0, now, place = 0;
        shape.n_heads = (int32_t)dsa__min64(shape.n_heads, s->n_heads - head);
        if (call->causal) len = dsa__visible(&cur, seq, c, row);
        if (call->fused) dsa__attend_begin_heads(s, at, shape.n_heads);
        kernels->attend_pack(&shape, dsa__attend_query(call, a->q + at * dim_q, shape.n_heads, t->q), t->packed);
        end = list ? call->n_indices : dsa__visible(&cur, seq, c, row);
        if (list && a->counts) end = dsa__clamp64(a->counts[lists], 0, call->n_indices);
        if (a->what == DSA_ATTEND_RANGE) {
            i = dsa__clamp64(a->ks[row], 0, len);
            end = dsa__clamp64(a->ke[row], 0, len);
        }
        while (i < end || n > 0) {                       /* up to a block and a glance at the next, then the block goes */
            for (; i < end && n < DSA__ROWS + DSA__AHEAD; i++) {
                t->rows[n] = dsa__attend_row(a, c, len, list, i);
                if (call->n_kv) {                        /* as many places as rows wait at most: none is overwritten in use */
                    t->rows[n] = dsa__attend_pair(call, t->rows[n], dsa__attend_row(a, seq->value, len, list, i), kv,
                                                  t->tile + (size_t)place * call->tile_row);
                    place = t->rows[n] ? (place + 1) % (DSA__ROWS + DSA__AHEAD) : place;
                }
                n += t->rows[n] != NULL;
            }
            now = dsa__min32(n, DSA__ROWS);
            if (now > 0)
                kernels->attend(&shape, t->packed, now, n - now, t->rows, s->max + at, s->sum + at, s->out + at * s->dim_v, t->scratch);
            memmove((void *)t->rows, (const void *)(t->rows + now), (size_t)(n - now) * sizeof *t->rows);
            n -= now;
        }
        if (call->fused) dsa__attend_finish_heads(s, at, shape.n_heads, call->sinks, s->out, call->lse, call->max_logit);
    }
}

static dsa_status dsa__attend_run(dsa__attend_call *call)
{
    if (call->on_device) return dsa__attend_device(call, 1);
    dsa__parallel(call->ctx, call->state.n_rows * call->n_parts, dsa__attend_task_run, call);
    return DSA_OK;
}

DSA_API dsa_status dsa_attend_workspace(const dsa_ctx *ctx, const dsa_attend_args *args, const dsa_attend_state *state, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__attend_call call;
    dsa_status st = dsa__attend_plan(ctx, args, state, &arena, &call);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "attend: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

/* Checks everything and lays the call out in the caller's workspace. */
static dsa_status dsa__attend_start(const dsa_ctx *ctx, const dsa_attend_args *a, const dsa_attend_state *state, dsa__attend_call *call)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa_status st = dsa__attend_plan(ctx, a, state, &arena, call);
    if (st == DSA_OK) st = dsa__state_pointers(ctx, &call->state);
    if (st != DSA_OK) return st;
    if (call->state.n_rows > 0) {
        if (!a->q) return dsa__fail(ctx, DSA_ERR_NULL, "attend: q is NULL");
        if (a->what == DSA_ATTEND_LIST && !a->indices) return dsa__fail(ctx, DSA_ERR_NULL, "attend: indices is NULL");
        if (a->what == DSA_ATTEND_RANGE && (!a->ks || !a->ke)) return dsa__fail(ctx, DSA_ERR_NULL, "attend: ks or ke is NULL");
    }
    st = dsa__arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__arena_over(a->workspace);
    st = dsa__attend_plan(ctx, a, state, &arena, call);
    DSA__CARVED(st, arena, a->workspace_size);
    return st;
}

DSA_API dsa_status dsa_attend_add(const dsa_ctx *ctx, const dsa_attend_args *a, const dsa_attend_state *state)
{
    dsa__attend_call call;
    dsa_status st = dsa__attend_start(ctx, a, state, &call);
    return st == DSA_OK ? dsa__attend_run(&call) : st;
}

static dsa_status dsa__attend_fused(const dsa_ctx *ctx, const dsa_attend_args *a, const dsa_attend_state *state, int causal,
                                    const float *sinks, float *lse, float *max_logit)
{
    dsa__attend_call call;
    dsa_status st = dsa__attend_start(ctx, a, state, &call);
    if (st != DSA_OK) return st;
    call.fused = 1;
    call.causal = causal;
    call.sinks = sinks;
    call.lse = lse;
    call.max_logit = max_logit;
    return dsa__attend_run(&call);
}

DSA_API dsa_status dsa_attend(const dsa_ctx *ctx, const dsa_attend_args *a, const dsa_attend_state *state, const float *sinks,
                              float *lse, float *max_logit)
{
    return dsa__attend_fused(ctx, a, state, 0, sinks, lse, max_logit);
}

DSA_API dsa_status dsa_attend_finish(const dsa_ctx *ctx, const dsa_attend_state *state, const float *sinks,
                                     float *out, float *lse, float *max_logit)
{
    dsa_attend_state s;
    dsa_status st = dsa__state_check(ctx, state, &s);
    if (st == DSA_OK) st = dsa__state_pointers(ctx, &s);
    if (st != DSA_OK) return st;
    if (s.n_rows > 0 && !out) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_attend_finish: out is NULL");
    dsa__attend_finish_heads(&s, 0, s.n_rows * s.n_heads, sinks, out, lse, max_logit);
    return DSA_OK;
}

DSA_API dsa_status dsa_attend_partial(const dsa_ctx *ctx, const dsa_attend_state *state, float *out, float *lse)
{
    dsa_attend_state s;
    int64_t i;
    dsa_status st;
    if (!lse) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_attend_partial: lse is NULL");
    st = dsa__state_check(ctx, state, &s);
    if (st == DSA_OK) st = dsa_attend_finish(ctx, state, NULL, out, lse, NULL);
    if (st != DSA_OK) return st;
    for (i = 0; i < s.n_rows * s.n_heads; i++)
        if (s.sum[i] == 0.0f) lse[i] = -dsa__infinity();
    return DSA_OK;
}

/* out = Sum_p e^(lse_p - M) out_p / (Sum_p e^(lse_p - M) + e^(z - M)), M = max(lse_p, z)  (spec 5.3, natural base) */
DSA_API dsa_status dsa_attend_merge(const dsa_ctx *ctx, int32_t n_parts, const float *const *outs, const float *const *lses,
                                    int64_t n_rows, int32_t n_heads, int32_t dim_v, const float *sinks, float *out, float *lse)
{
    const float none = -dsa__infinity();
    int64_t i;
    int32_t p, d;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (n_parts < 0 || n_rows < 0 || n_rows > DSA__MAX_POS || n_heads < 1 || n_heads > DSA_MAX_DIM || dim_v < 1 || dim_v > DSA_MAX_DIM)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_attend_merge: a count or dim");
    if (n_rows > 0 && (!out || (n_parts > 0 && (!outs || !lses))))
        return dsa__fail(ctx, DSA_ERR_NULL, "dsa_attend_merge: outs, lses or out is NULL");
    for (p = 0; p < n_parts; p++)
        if (n_rows > 0 && (!outs[p] || !lses[p])) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_attend_merge: a part is NULL");
    for (i = 0; i < n_rows * n_heads; i++) {
        float max = none, sum = 0.0f, total, z = sinks ? sinks[i % n_heads] : none, top, *o = out + i * dim_v;
        for (p = 0; p < n_parts; p++) if (lses[p][i] > max) max = lses[p][i];
        top = z > max ? z : max;
        for (p = 0; p < n_parts; p++) if (lses[p][i] != none) sum += dsa__exp(lses[p][i] - max);
        for (d = 0; d < dim_v; d++) o[d] = 0.0f;
        if (lse) lse[i] = sum == 0.0f ? dsa__infinity() : max + (float)log((double)sum);
        if (sum == 0.0f || z == dsa__infinity()) continue;
        total = sum * dsa__exp(max - top) + (z == none ? 0.0f : dsa__exp(z - top));
        for (p = 0; p < n_parts; p++) {
            float f = lses[p][i] == none ? 0.0f : dsa__exp(lses[p][i] - top) / total;
            if (f != 0.0f) for (d = 0; d < dim_v; d++) o[d] += f * outs[p][i * dim_v + d];
        }
    }
    return DSA_OK;
}

/* ============================================================================================
   >>step                                     append, score, select and attend in one call
   ============================================================================================ */

typedef struct dsa__step_call {
    dsa_append_args append;
    dsa_score_args score;
    dsa_selection sel;
    dsa_attend_args attend;
    dsa_attend_state state;
} dsa__step_call;

/* The calls that a step is, their scratch from one arena. Scoring and attention share theirs: they follow each other. */
static dsa_status dsa__step_plan(const dsa_ctx *ctx, const dsa_step_args *a, dsa__arena *arena, dsa__step_call *c)
{
    size_t score_bytes = 0, attend_bytes = 0;
    int32_t i;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    memset(c, 0, sizeof *c);
    if (!a) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_step: args is NULL");
    st = dsa__plain_only(ctx, "dsa_step: pools, groups, blocks and n_kv_heads go through append, score_select and attend");
    if (st != DSA_OK) return st;
    if ((a->latent == NULL) != (a->index_key == NULL)) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_step: latent and index_key go together");
    st = dsa__rows(ctx, a->n_seqs, a->seqs, &c->state.n_rows);
    if (st != DSA_OK) return st;
    for (i = 0; a->latent && i < a->n_seqs; i++)
        if (a->seqs[i].len != 0) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_step: seqs[].len must be 0 when rows are appended");
    c->append.n_seqs = c->score.n_seqs = c->attend.n_seqs = a->n_seqs;
    c->append.seqs = c->score.seqs = c->attend.seqs = a->seqs;
    c->append.latent = a->latent;
    c->append.index_key = a->index_key;
    c->score.q = a->index_q;
    c->score.w = a->index_w;
    c->sel.top_k = a->top_k ? a->top_k : ctx->config.top_k;
    if (c->sel.top_k < 1) return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_step: top_k is negative");
    c->sel.indices = (int32_t *)dsa__take(arena, a->indices ? 0 : c->state.n_rows, c->sel.top_k, sizeof(int32_t));
    if (a->indices) c->sel.indices = a->indices;
    c->state.n_heads = ctx->config.n_heads;
    c->state.dim_v = ctx->config.dim_latent;
    c->state.max = (float *)dsa__take(arena, c->state.n_rows, c->state.n_heads, sizeof(float));
    c->state.sum = (float *)dsa__take(arena, c->state.n_rows, c->state.n_heads, sizeof(float));
    c->state.out = a->out;
    c->attend.q = a->q;
    c->attend.scale = a->scale;
    c->attend.indices = c->sel.indices;
    c->attend.n_indices = c->sel.top_k;
    st = dsa_score_select_workspace(ctx, &c->score, &c->sel, &score_bytes);
    if (st == DSA_OK) st = dsa_attend_workspace(ctx, &c->attend, &c->state, &attend_bytes);
    if (st == DSA_OK) st = dsa__pairs_check(ctx, a->n_seqs, a->seqs);
    if (st != DSA_OK) return st;
    c->score.workspace_size = c->attend.workspace_size = score_bytes > attend_bytes ? score_bytes : attend_bytes;
    c->score.workspace = c->attend.workspace = dsa__take(arena, 1, (int64_t)c->score.workspace_size, 1);
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_step: the workspace does not fit in size_t") : DSA_OK;
}

DSA_API dsa_status dsa_step_workspace(const dsa_ctx *ctx, const dsa_step_args *args, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__step_call c;
    dsa_status st = dsa__step_plan(ctx, args, &arena, &c);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_step: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

DSA_API dsa_status dsa_step(const dsa_ctx *ctx, const dsa_step_args *a)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__step_call c;
    dsa_status st = dsa__step_plan(ctx, a, &arena, &c);
    if (st != DSA_OK) return st;
    if (c.state.n_rows == 0) return DSA_OK;
    if (!a->q || !a->index_q || !a->index_w || !a->out) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_step: q, index_q, index_w or out is NULL");
    st = dsa__arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st == DSA_OK && a->latent) st = dsa__append_check(ctx, a->n_seqs, a->seqs, DSA_LATENT, NULL);
    if (st == DSA_OK && a->latent) st = dsa__append_check(ctx, a->n_seqs, a->seqs, DSA_INDEX_KEY, NULL);
    if (st != DSA_OK) return st;                         /* from here on nothing can fail */
    arena = dsa__arena_over(a->workspace);
    st = dsa__step_plan(ctx, a, &arena, &c);
    DSA__CARVED(st, arena, a->workspace_size);
    if (st == DSA_OK && a->latent) st = dsa_append(ctx, &c.append);
    if (st == DSA_OK) st = dsa_score_select(ctx, &c.score, &c.sel);
    if (st == DSA_OK) st = dsa__attend_fused(ctx, &c.attend, &c.state, 1, a->sinks, a->lse, NULL);
    DSA_ASSERT(st == DSA_OK || st == DSA_ERR_DEVICE);
    return st;
}

/* ============================================================================================
   >>layer                                    5. one attention layer, hidden states in and out
   ============================================================================================
   The forward pass of DeepSeek-V3.2 and GLM-5 (spec 2, 3.1) in its absorbed form, tile after tile of DSA_LAYER_TILE rows:

     qr    = RMSNorm(W_qa x)                    q = W_qb qr -> [H, nope | rope], rope part rotated
     c     = RMSNorm((W_kva x)[0:R])            k_pe = RoPE((W_kva x)[R:])                        -> latent cache
     k_I   = RoPE(LayerNorm(W_k x))                                                               -> index-key cache
     q_I   = RoPE(W_qb_I qr)                    w = (W_w x) HI^-0.5 D^-0.5
     S     = the k best rows by eq. (1)
     q_lat = W_UK^T q_nope                      o_lat = attention of [q_lat | q_pe] over S
     y     = W_o concat_h(W_UV o_lat)

   The indexer reads the normalised qr (feeding it W_qa x is a known fault, spec 10 #3). */

/* y[t][h][o] = Sum_i x[t][h][i] W[first + h rows_per_head + o][i] for heads h, which are one but in the absorbed projections. */
typedef struct dsa__gemm_call {
    const dsa_ctx *ctx;
    const dsa_tensor *w;
    const float *x;
    float *y;
    unsigned char *scratch;
    int64_t scratch_stride;                              /* of a task */
    int64_t n, in, n_out, ldx, ldy, first;
    int64_t n_heads, rows_per_head, head_x, head_y;
} dsa__gemm_call;

/* One of n_tasks equal runs of blocks of LANES output channels, head after head: rows of W that lie one after the other. */
static void dsa__gemm_task(void *arg, int32_t task)
{
    dsa__gemm_call *g = (dsa__gemm_call *)arg;
    int64_t blocks = (g->n_out + DSA__LANES - 1) / DSA__LANES, units = blocks * g->n_heads, unit, end, head, o, m;
    int64_t n_tasks = dsa__min64(g->ctx->config.n_threads, units);
    end = units * (task + 1) / n_tasks;
    for (unit = units * task / n_tasks; unit < end; unit += m) {
        head = unit / blocks;
        o = unit % blocks * DSA__LANES;
        m = dsa__min64(end - unit, blocks - unit % blocks);
        g->ctx->kernels->matmul(g->n, g->in, dsa__min64(m * DSA__LANES, g->n_out - o), g->x + head * g->head_x, g->ldx,
                                g->w, g->first + head * g->rows_per_head + o, g->y + head * g->head_y + o, g->ldy,
                                g->scratch + (size_t)(task * g->scratch_stride));
    }
}

/* The other direction, y[t][h][i] = Sum_o x[t][h][o] W[first + h rows_per_head + o][i]: W_UK^T q_nope. A unit is one head. */
static void dsa__gemm_transposed_task(void *arg, int32_t task)
{
    dsa__gemm_call *g = (dsa__gemm_call *)arg;
    int64_t n_tasks = dsa__min64(g->ctx->config.n_threads, g->n_heads), head = g->n_heads * task / n_tasks;
    for (; head < g->n_heads * (task + 1) / n_tasks; head++)
        g->ctx->kernels->matmul_t(g->n, g->in, g->n_out, g->x + head * g->head_x, g->ldx, g->w, g->first + head * g->rows_per_head,
                                  g->y + head * g->head_y, g->ldy, g->scratch + (size_t)(task * g->scratch_stride));
}

#define DSA__PANEL 64                                    /* weight rows expanded per call of the GEMM hook */

/* y [n, n_out] = x [n, in] W^T for a whole weight: the hook's, panel by panel, or ours. */
static void dsa__project(dsa__gemm_call g, const dsa_tensor *w, const float *x, int64_t in, int64_t n_out, float *y)
{
    const dsa_config *f = &g.ctx->config;
    int64_t o, j;
    g.w = w; g.x = x; g.y = y; g.in = in; g.n_out = n_out; g.ldx = in; g.ldy = n_out;
    g.first = 0; g.n_heads = 1; g.rows_per_head = 0; g.head_x = 0; g.head_y = 0;
    if (!f->gemm) {
        dsa__parallel(g.ctx, (n_out + DSA__LANES - 1) / DSA__LANES, dsa__gemm_task, &g);
        return;
    }
    for (o = 0; o < n_out; o += DSA__PANEL) {
        int64_t rows = dsa__min64(DSA__PANEL, n_out - o);
        float *panel = (float *)(void *)g.scratch;
        for (j = 0; j < rows; j++) dsa__weight_row(w, o + j, in, panel + j * in);
        f->gemm(f->gemm_user, g.n, rows, in, x, in, panel, in, y + o, n_out);
    }
}

/* What a layer call works with: scratch for one tile. Shapes with n <= DSA_LAYER_TILE rows. */
typedef struct dsa__layer_call {
    int64_t n_rows, dim_q, dim_qk;
    int has_indexer;
    float *q_norm, *kv_norm, *k_norm, *k_bias;           /* gains as f32 */
    float *qr, *q, *kv, *key;                            /* [n, q_lora] [n, H (nope + rope)] [n, R + r] [n, D] */
    float *index_q, *index_w;                            /* [n, HI D] [n, HI] */
    float *q_abs, *o_lat, *o;                            /* [n, H (R + r)] [n, H R] [n, H v] */
    float *max, *sum;                                    /* [n, H] */
    int32_t *indices;                                    /* [n, k] */
    int64_t *positions, *ks, *ke;                        /* [n] */
    dsa_seq *seqs;                                       /* [n] the tile's sequences */
    unsigned char *gemm;
    int64_t gemm_stride;
    void *shared;                                        /* scoring, then attention */
    size_t shared_size;
} dsa__layer_call;

static dsa_status dsa__tensor_check(const dsa_ctx *ctx, const dsa_tensor *w, const char *text)
{
    if (!w->data || (w->type == DSA_FP8 && !w->scale_inv)) return dsa__fail(ctx, DSA_ERR_NULL, text);
    if (w->type != DSA_F32 && w->type != DSA_BF16 && w->type != DSA_F16 && w->type != DSA_FP8) return dsa__fail(ctx, DSA_ERR_FORMAT, text);
    return DSA_OK;
}

static dsa_status dsa__layer_plan(const dsa_ctx *ctx, const dsa_layer_args *a, dsa__arena *arena, dsa__layer_call *c)
{
    const dsa_config *f;
    const dsa_layer_weights *w;
    int64_t n, widest, H, gemm_bytes;
    int32_t i, t;
    size_t score_bytes = 0, attend_bytes = 0;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    f = &ctx->config;
    memset(c, 0, sizeof *c);
    if (!a || !a->weights) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_layer: args or weights is NULL");
    st = dsa__plain_only(ctx, "dsa_layer: only DeepSeek-V3.2's form of the algorithm (the manual's chapter MODELS)");
    if (st == DSA_OK && (f->foreign_layer || f->index_norm != DSA_NORM_LAYER || f->rope_width != f->dim_rope || f->rope_first))
        st = dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "dsa_layer: the config's layer is not the manual's LAYER: its projections are yours");
    if (st != DSA_OK) return st;
    w = a->weights;
    st = dsa__rows(ctx, a->n_seqs, a->seqs, &c->n_rows);
    if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->q_a, "dsa_layer: weight q_a");
    if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->q_a_norm, "dsa_layer: weight q_a_norm");
    if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->q_b, "dsa_layer: weight q_b");
    if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->kv_a, "dsa_layer: weight kv_a");
    if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->kv_a_norm, "dsa_layer: weight kv_a_norm");
    if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->kv_b, "dsa_layer: weight kv_b");
    if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->o, "dsa_layer: weight o");
    c->has_indexer = w->index_k.data != NULL;
    if (c->has_indexer) {
        if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->index_q_b, "dsa_layer: weight index_q_b");
        if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->index_k, "dsa_layer: weight index_k");
        if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->index_k_norm, "dsa_layer: weight index_k_norm");
        if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->index_k_bias, "dsa_layer: weight index_k_bias");
        if (st == DSA_OK) st = dsa__tensor_check(ctx, &w->index_w, "dsa_layer: weight index_w");
    }
    if (st != DSA_OK) return st;
    if (a->mode != DSA_LAYER_SPARSE && a->mode != DSA_LAYER_DENSE && a->mode != DSA_LAYER_WINDOW)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_layer: unknown mode");
    for (i = 0; i < a->n_seqs; i++)
        if (a->seqs[i].len != 0) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_layer: seqs[].len must be 0, rows are appended");
    st = dsa__batch_check(ctx, a->n_seqs, a->seqs, DSA_LATENT);
    if (st == DSA_OK && c->has_indexer) st = dsa__batch_check(ctx, a->n_seqs, a->seqs, DSA_INDEX_KEY);
    if (st == DSA_OK && c->has_indexer) st = dsa__pairs_check(ctx, a->n_seqs, a->seqs);
    if (st != DSA_OK) return st;

    n = dsa__min64(c->n_rows, DSA_LAYER_TILE);
    H = f->n_heads;
    if (H * f->dim_v > DSA__MAX_POS)
        return dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_layer: the input of o_proj, n_heads * dim_v, is too wide");
    c->dim_q = f->dim_nope + f->dim_rope;
    c->dim_qk = f->dim_latent + f->dim_rope;
    c->q_norm    = (float *)dsa__take(arena, f->dim_q_lora, 1, sizeof(float));
    c->kv_norm   = (float *)dsa__take(arena, f->dim_latent, 1, sizeof(float));
    c->k_norm    = (float *)dsa__take(arena, f->dim_index, 1, sizeof(float));
    c->k_bias    = (float *)dsa__take(arena, f->dim_index, 1, sizeof(float));
    c->qr        = (float *)dsa__take(arena, n, f->dim_q_lora, sizeof(float));
    c->q         = (float *)dsa__take(arena, n, H * c->dim_q, sizeof(float));
    c->kv        = (float *)dsa__take(arena, n, c->dim_qk, sizeof(float));
    c->key       = (float *)dsa__take(arena, n, f->dim_index, sizeof(float));
    c->index_q   = (float *)dsa__take(arena, n, (int64_t)f->n_index_heads * f->dim_index, sizeof(float));
    c->index_w   = (float *)dsa__take(arena, n, f->n_index_heads, sizeof(float));
    c->q_abs     = (float *)dsa__take(arena, n, H * c->dim_qk, sizeof(float));
    c->o_lat     = (float *)dsa__take(arena, n, H * f->dim_latent, sizeof(float));
    c->o         = (float *)dsa__take(arena, n, H * f->dim_v, sizeof(float));
    c->max       = (float *)dsa__take(arena, n, H, sizeof(float));
    c->sum       = (float *)dsa__take(arena, n, H, sizeof(float));
    c->indices   = (int32_t *)dsa__take(arena, n, f->top_k, sizeof(int32_t));
    c->positions = (int64_t *)dsa__take(arena, n, 1, sizeof(int64_t));
    c->ks        = (int64_t *)dsa__take(arena, n, 1, sizeof(int64_t));
    c->ke        = (int64_t *)dsa__take(arena, n, 1, sizeof(int64_t));
    c->seqs      = (dsa_seq *)dsa__take(arena, n, 1, sizeof(dsa_seq));
    widest = dsa__max64(dsa__max64(f->dim_hidden, f->dim_q_lora), dsa__max64(f->dim_latent, H * f->dim_v));
    c->gemm_stride = dsa__up64(ctx->kernels->matmul_bytes(n, widest, f->dim_latent));
    gemm_bytes = c->gemm_stride * f->n_threads;
    if (f->gemm) gemm_bytes = dsa__max64(gemm_bytes, DSA__PANEL * widest * (int64_t)sizeof(float));
    c->gemm      = (unsigned char *)dsa__take(arena, gemm_bytes, 1, 1);

    /* What tiles of n rows and of fewer rows than threads need (then the work is cut in another way), any tile needs. */
    for (t = 0; t < 2 && n > 0; t++) {
        dsa_seq seq;
        dsa_score_args score;
        dsa_selection sel;
        dsa_attend_args attend;
        dsa_attend_state state;
        memset(&score, 0, sizeof score);
        memset(&sel, 0, sizeof sel);
        memset(&attend, 0, sizeof attend);
        memset(&state, 0, sizeof state);
        seq = a->seqs[0];
        seq.n_q = (int32_t)(t == 0 ? n : dsa__min64(n, dsa__max64(f->n_threads - 1, 1)));
        score.n_seqs = attend.n_seqs = 1;
        score.seqs = attend.seqs = &seq;
        state.n_rows = seq.n_q;
        if (c->has_indexer) st = dsa_score_select_workspace(ctx, &score, &sel, &score_bytes);
        if (st == DSA_OK) st = dsa_attend_workspace(ctx, &attend, &state, &attend_bytes);
        if (st != DSA_OK) return st;
        if (score_bytes > c->shared_size) c->shared_size = score_bytes;
        if (attend_bytes > c->shared_size) c->shared_size = attend_bytes;
    }
    c->shared = dsa__take(arena, 1, (int64_t)c->shared_size, 1);
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_layer: the workspace does not fit in size_t") : DSA_OK;
}

DSA_API dsa_status dsa_layer_workspace(const dsa_ctx *ctx, const dsa_layer_args *args, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__layer_call c;
    dsa_status st = dsa__layer_plan(ctx, args, &arena, &c);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_layer: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

/* One tile: rows [row, row + n) of the call, which are the queries of c->seqs[0 .. n_seqs). */
static dsa_status dsa__layer_tile(const dsa_ctx *ctx, const dsa_layer_args *a, dsa__layer_call *c, int64_t row, int64_t n, int32_t n_seqs)
{
    const dsa_config *f = &ctx->config;
    const dsa_layer_weights *w = a->weights;
    const float *x = a->x + row * f->dim_hidden;
    const int32_t *list = a->indices_in && a->mode == DSA_LAYER_SPARSE ? a->indices_in + row * f->top_k : NULL;
    int64_t H = f->n_heads, t, h;
    dsa_rope q_rope = dsa_config_rope(ctx, (int32_t)c->dim_q), kv_rope = dsa_config_rope(ctx, (int32_t)c->dim_qk);
    dsa_rope i_rope = dsa_config_index_rope(ctx);
    dsa_append_args append;
    dsa_attend_args attend;
    dsa_attend_state state;
    dsa__gemm_call g;
    dsa__cursor cur;
    int sparse_rows = 0;
    dsa_status st;
    memset(&g, 0, sizeof g);
    g.ctx = ctx;
    g.n = n;
    g.scratch = c->gemm;
    g.scratch_stride = c->gemm_stride;

    /* queries, latents, index keys */
    dsa__project(g, &w->q_a, x, f->dim_hidden, f->dim_q_lora, c->qr);
    (void)dsa_rms_norm(c->qr, n, f->dim_q_lora, f->dim_q_lora, c->q_norm, f->norm_eps);
    dsa__project(g, &w->q_b, c->qr, f->dim_q_lora, H * c->dim_q, c->q);
    (void)dsa_rope_rows(c->q, n, H * c->dim_q, f->n_heads, c->dim_q, (int32_t)c->dim_q, &q_rope, c->positions, 0);
    dsa__project(g, &w->kv_a, x, f->dim_hidden, c->dim_qk, c->kv);
    (void)dsa_rms_norm(c->kv, n, c->dim_qk, f->dim_latent, c->kv_norm, f->norm_eps);
    (void)dsa_rope_rows(c->kv, n, c->dim_qk, 1, 0, (int32_t)c->dim_qk, &kv_rope, c->positions, 0);
    memset(&append, 0, sizeof append);
    append.n_seqs = n_seqs;
    append.seqs = c->seqs;
    append.latent = c->kv;
    if (c->has_indexer) {
        dsa__project(g, &w->index_k, x, f->dim_hidden, f->dim_index, c->key);
        (void)dsa_layer_norm(c->key, n, f->dim_index, f->dim_index, c->k_norm, c->k_bias, f->index_norm_eps);
        (void)dsa_rope_rows(c->key, n, f->dim_index, 1, 0, f->dim_index, &i_rope, c->positions, 0);
        append.index_key = c->key;
    }
    st = dsa_append(ctx, &append);
    if (st != DSA_OK) return st;

    /* selection */
    cur.seqs = c->seqs;
    cur.seq = 0;
    cur.first = 0;
    for (t = 0; t < n; t++) {
        const dsa_seq *s = dsa__seek(&cur, t);
        c->ke[t] = dsa__visible(&cur, s, s->latent, t);
        c->ks[t] = dsa__max64(c->ke[t] - f->top_k, 0);
        sparse_rows |= c->ks[t] > 0;
    }
    if (a->mode == DSA_LAYER_SPARSE && !list) {
        dsa_score_args score;
        dsa_selection sel;
        memset(&score, 0, sizeof score);
        memset(&sel, 0, sizeof sel);
        if (sparse_rows) {                               /* a tile of dense-fallback rows needs no queries */
            float scale = f->index_scale;
            dsa__project(g, &w->index_q_b, c->qr, f->dim_q_lora, (int64_t)f->n_index_heads * f->dim_index, c->index_q);
            (void)dsa_rope_rows(c->index_q, n, (int64_t)f->n_index_heads * f->dim_index, f->n_index_heads, f->dim_index,
                                f->dim_index, &i_rope, c->positions, 0);
            dsa__project(g, &w->index_w, x, f->dim_hidden, f->n_index_heads, c->index_w);
            for (t = 0; t < n * f->n_index_heads; t++) c->index_w[t] *= scale;
        }
        score.n_seqs = n_seqs;
        score.seqs = c->seqs;
        score.q = c->index_q;
        score.w = c->index_w;
        score.workspace = c->shared;
        score.workspace_size = c->shared_size;
        sel.indices = c->indices;
        st = dsa_score_select(ctx, &score, &sel);
        if (st != DSA_OK) return st;
        list = c->indices;
    }
    if (a->indices_out && list) memcpy(a->indices_out + row * f->top_k, list, sizeof(int32_t) * (size_t)(n * f->top_k));

    /* attention over [q_lat | q_pe], then back through W_UV and W_o */
    g.w = &w->kv_b;
    g.x = c->q; g.ldx = H * c->dim_q; g.head_x = c->dim_q;
    g.y = c->q_abs; g.ldy = H * c->dim_qk; g.head_y = c->dim_qk;
    g.in = f->dim_latent; g.n_out = f->dim_nope;
    g.n_heads = H; g.rows_per_head = f->dim_nope + f->dim_v; g.first = 0;
    dsa__parallel(ctx, H, dsa__gemm_transposed_task, &g);
    for (t = 0; t < n; t++)
        for (h = 0; h < H; h++)
            memcpy(c->q_abs + (t * H + h) * c->dim_qk + f->dim_latent, c->q + (t * H + h) * c->dim_q + f->dim_nope,
                   sizeof(float) * (size_t)f->dim_rope);
    memset(&attend, 0, sizeof attend);
    attend.n_seqs = n_seqs;
    attend.seqs = c->seqs;
    attend.q = c->q_abs;
    attend.what = a->mode == DSA_LAYER_SPARSE ? DSA_ATTEND_LIST : (a->mode == DSA_LAYER_DENSE ? DSA_ATTEND_VISIBLE : DSA_ATTEND_RANGE);
    attend.indices = list;
    attend.n_indices = f->top_k;
    attend.ks = c->ks;
    attend.ke = c->ke;
    attend.workspace = c->shared;
    attend.workspace_size = c->shared_size;
    state.n_rows = n;
    state.n_heads = f->n_heads;
    state.dim_v = f->dim_latent;
    state.max = c->max;
    state.sum = c->sum;
    state.out = c->o_lat;
    st = dsa__attend_fused(ctx, &attend, &state, 1, NULL, NULL, NULL);
    if (st != DSA_OK) return st;
    g.x = c->o_lat; g.ldx = H * f->dim_latent; g.head_x = f->dim_latent;
    g.y = c->o; g.ldy = H * f->dim_v; g.head_y = f->dim_v;
    g.n_out = f->dim_v; g.first = f->dim_nope;
    dsa__parallel(ctx, H * ((f->dim_v + DSA__LANES - 1) / DSA__LANES), dsa__gemm_task, &g);
    dsa__project(g, &w->o, c->o, H * f->dim_v, f->dim_hidden, a->y + row * f->dim_hidden);
    return DSA_OK;
}

DSA_API dsa_status dsa_layer(const dsa_ctx *ctx, const dsa_layer_args *a)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__layer_call c;
    const dsa_config *f;
    int64_t row = 0, n, used = 0;                        /* used: rows of sequence `seq` done by earlier tiles */
    int32_t seq = 0, n_seqs;
    dsa_status st = dsa__layer_plan(ctx, a, &arena, &c);
    if (st != DSA_OK) return st;
    f = &ctx->config;
    if (c.n_rows == 0) return DSA_OK;
    if (!a->x || !a->y) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_layer: x or y is NULL");
    if (a->mode == DSA_LAYER_SPARSE && !c.has_indexer && !a->indices_in)
        return dsa__fail(ctx, DSA_ERR_NULL, "dsa_layer: a layer without indexer weights needs indices_in");
    st = dsa__arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st == DSA_OK) st = dsa__append_check(ctx, a->n_seqs, a->seqs, DSA_LATENT, NULL);
    if (st == DSA_OK && c.has_indexer) st = dsa__append_check(ctx, a->n_seqs, a->seqs, DSA_INDEX_KEY, NULL);
    if (st != DSA_OK) return st;                         /* from here on nothing can fail */
    arena = dsa__arena_over(a->workspace);
    st = dsa__layer_plan(ctx, a, &arena, &c);
    DSA__CARVED(st, arena, a->workspace_size);
    dsa__weight_row(&a->weights->q_a_norm, 0, f->dim_q_lora, c.q_norm);
    dsa__weight_row(&a->weights->kv_a_norm, 0, f->dim_latent, c.kv_norm);
    if (c.has_indexer) {
        dsa__weight_row(&a->weights->index_k_norm, 0, f->dim_index, c.k_norm);
        dsa__weight_row(&a->weights->index_k_bias, 0, f->dim_index, c.k_bias);
    }
    for (; row < c.n_rows && st == DSA_OK; row += n) {
        for (n = 0, n_seqs = 0; n < DSA_LAYER_TILE && seq < a->n_seqs; ) {
            dsa_seq *s = &c.seqs[n_seqs];
            int64_t take = dsa__min64(dsa__n_q(&a->seqs[seq]) - used, DSA_LAYER_TILE - n), i;
            if (take > 0) {
                *s = a->seqs[seq];
                s->n_q = (int32_t)take;
                for (i = 0; i < take; i++)
                    c.positions[n + i] = a->positions ? a->positions[row + n + i] : s->latent->len + i;
                n_seqs++;
                n += take;
                used += take;
            }
            if (used >= dsa__n_q(&a->seqs[seq])) { seq++; used = 0; }
        }
        st = dsa__layer_tile(ctx, a, &c, row, n, n_seqs);
    }
    DSA_ASSERT(st == DSA_OK || st == DSA_ERR_DEVICE);
    return st;
}

/* ============================================================================================
   >>backward                                 6. gradients of norms, projections, attention and the indexer
   ============================================================================================
   The derivatives of the formulas above (spec 8). A tile of 8 to DSA__BACK_ROWS queries is worked through in two phases a block of
   DSA__BACK_KEYS keys: first tasks own queries and find P, dS and what goes into dQ; then tasks own rows of the cache, DSA__STRIPE by
   DSA__STRIPE, walk over the same queries in order and add what goes into dKV. So no number is written by two tasks, every sum
   runs in one order whatever the number of threads, and the scatter-add needs no atomics. */
#define DSA__BACK_ROWS DSA_LAYER_TILE
#define DSA__BACK_KEYS 256
#define DSA__BACK_MOST 2048                              /* sets up to this are one block for the indexer, whose dot products are kept */
#define DSA__STRIPE 8

/* Queries of a tile: what phase 1 leaves for phase 2 should stay in L2, and few heads need many queries between two barriers. 32 for
   all made V3.2's shapes a third slower. It does not depend on the threads, since over several blocks the order of sums depends on it. */
static int32_t dsa__back_rows(int32_t heads) { return (int32_t)dsa__clamp64(256 / heads, 8, DSA__BACK_ROWS); }

/* x^ = x inv:   dg += dy x^      dx += inv (g dy - x^ mean(g dy x^)) */
DSA_API dsa_status dsa_rms_norm_backward(const float *x, const float *d_y, int64_t n_rows, int64_t stride, int32_t dim, const float *gain,
                                         float eps, float *d_x, float *d_gain)
{
    int64_t t;
    int32_t i;
    if (n_rows > 0 && (!x || !d_y || !gain)) return DSA_ERR_NULL;
    if (n_rows < 0 || dim < 1 || stride < dim) return DSA_ERR_SHAPE;
    for (t = 0; t < n_rows; t++) {
        const float *r = x + t * stride, *dy = d_y + t * stride;
        double sum = 0.0, dot = 0.0, inv;
        for (i = 0; i < dim; i++) sum += (double)r[i] * (double)r[i];
        inv = 1.0 / sqrt(sum / dim + (double)eps);
        for (i = 0; i < dim; i++) dot += (double)gain[i] * (double)dy[i] * (double)r[i];
        dot *= inv * inv / dim;
        for (i = 0; d_gain && i < dim; i++) d_gain[i] += (float)((double)dy[i] * (double)r[i] * inv);
        for (i = 0; d_x && i < dim; i++) d_x[t * stride + i] += (float)(inv * ((double)gain[i] * (double)dy[i] - (double)r[i] * dot));
    }
    return DSA_OK;
}

/* x^ = (x - mean) inv:   db += dy      dg += dy x^      dx += inv (g dy - mean(g dy) - x^ mean(g dy x^)) */
DSA_API dsa_status dsa_layer_norm_backward(const float *x, const float *d_y, int64_t n_rows, int64_t stride, int32_t dim, const float *gain,
                                           float eps, float *d_x, float *d_gain, float *d_bias)
{
    int64_t t;
    int32_t i;
    if (n_rows > 0 && (!x || !d_y || !gain)) return DSA_ERR_NULL;
    if (n_rows < 0 || dim < 1 || stride < dim) return DSA_ERR_SHAPE;
    for (t = 0; t < n_rows; t++) {
        const float *r = x + t * stride, *dy = d_y + t * stride;
        double mean = 0.0, var = 0.0, dot = 0.0, sum = 0.0, inv;
        for (i = 0; i < dim; i++) mean += (double)r[i];
        mean /= dim;
        for (i = 0; i < dim; i++) var += ((double)r[i] - mean) * ((double)r[i] - mean);
        inv = 1.0 / sqrt(var / dim + (double)eps);
        for (i = 0; i < dim; i++) {
            double d = (double)gain[i] * (double)dy[i];
            sum += d;
            dot += d * ((double)r[i] - mean) * inv;
        }
        sum /= dim;
        dot /= dim;
        for (i = 0; i < dim; i++) {
            double n = ((double)r[i] - mean) * inv;
            if (d_gain) d_gain[i] += (float)((double)dy[i] * n);
            if (d_bias) d_bias[i] += dy[i];
            if (d_x) d_x[t * stride + i] += (float)(inv * ((double)gain[i] * (double)dy[i] - sum - n * dot));
        }
    }
    return DSA_OK;
}

/* ---- projections --------------------------------------------------------------------------- */
#define DSA__MM_OUT 24                                   /* outputs side by side: one column of tiles */
#define DSA__MM_IN 48
#define DSA__MM_DEPTH 128

/* y[t][h][o] = Sum_i x[t][h][i] W[h][o][i] and its two derivatives. Most weights are one head; kv_b's parts are one per head, of which
   W holds the rows first + h step + [0, n_out). */
typedef struct dsa__mm {
    const dsa_ctx *ctx;
    const dsa_tensor *w;
    int64_t n, n_in, n_out, first, step;
    int32_t n_heads;
    const float *x, *y;                                  /* y: the given d_y of the derivatives */
    float *dx, *out;                                     /* dx = W^T y, added; out = W x, written */
    float *dw;                                           /* [H ..][n_in] like W: += y x^T */
    int64_t ldx, ldy, head_x, head_y;                    /* also of dx and out */
    float *scratch;                                      /* [n_threads, DSA__MM_SCRATCH] */
} dsa__mm;

#define DSA__MM_SCRATCH (DSA__MM_IN * DSA__MM_DEPTH)

static dsa__mm dsa__mm_of(const dsa_ctx *ctx, const dsa_tensor *w, int64_t n, int64_t n_in, int64_t n_out, float *scratch)
{
    dsa__mm m;
    memset(&m, 0, sizeof m);
    m.ctx = ctx; m.w = w; m.n = n; m.n_in = m.ldx = n_in; m.n_out = m.ldy = n_out; m.n_heads = 1; m.scratch = scratch;
    return m;
}

/* Blocks of outputs of every head: W's rows turned into columns, a part of the depth at a time. */
static void dsa__mm_forward_task(void *arg, int32_t task)
{
    const dsa__mm *m = (const dsa__mm *)arg;
    float *b = m->scratch + (int64_t)task * DSA__MM_SCRATCH, row[DSA__MM_DEPTH];
    int64_t blocks = (m->n_out + DSA__MM_OUT - 1) / DSA__MM_OUT, unit, at, i, j, t;
    int32_t n_tasks = (int32_t)dsa__min64(m->ctx->config.n_threads, blocks * m->n_heads);
    for (unit = task; unit < blocks * m->n_heads; unit += n_tasks) {
        int64_t head = unit / blocks, o = unit % blocks * DSA__MM_OUT, wide = dsa__min64(DSA__MM_OUT, m->n_out - o);
        float *out = m->out + head * m->head_y + o;
        for (t = 0; t < m->n; t++) memset(out + t * m->ldy, 0, sizeof(float) * (size_t)wide);
        for (at = 0; at < m->n_in; at += DSA__MM_DEPTH) {
            int64_t depth = dsa__min64(DSA__MM_DEPTH, m->n_in - at);
            for (j = 0; j < wide; j++) {
                dsa__weight_part(m->w, m->first + head * m->step + o + j, m->n_in, at, depth, row);
                for (i = 0; i < depth; i++) b[i * DSA__MM_OUT + j] = row[i];
            }
            m->ctx->kernels->madd(m->n, wide, depth, m->x + head * m->head_x + at, m->ldx, 1, b, DSA__MM_OUT, out, m->ldy);
        }
    }
}

/* Blocks of inputs of every head. */
static void dsa__mm_dx_task(void *arg, int32_t task)
{
    const dsa__mm *m = (const dsa__mm *)arg;
    float *b = m->scratch + (int64_t)task * DSA__MM_SCRATCH;
    int64_t blocks = (m->n_in + DSA__MM_IN - 1) / DSA__MM_IN, unit, at, j;
    int32_t n_tasks = (int32_t)dsa__min64(m->ctx->config.n_threads, blocks * m->n_heads);
    for (unit = task; unit < blocks * m->n_heads; unit += n_tasks) {
        int64_t head = unit / blocks, i = unit % blocks * DSA__MM_IN, wide = dsa__min64(DSA__MM_IN, m->n_in - i);
        for (at = 0; at < m->n_out; at += DSA__MM_DEPTH) {
            int64_t depth = dsa__min64(DSA__MM_DEPTH, m->n_out - at);
            for (j = 0; j < depth; j++)
                dsa__weight_part(m->w, m->first + head * m->step + at + j, m->n_in, i, wide, b + j * DSA__MM_IN);
            m->ctx->kernels->madd(m->n, wide, depth, m->y + head * m->head_y + at, m->ldy, 1, b, DSA__MM_IN,
                                  m->dx + head * m->head_x + i, m->ldx);
        }
    }
}

/* Blocks of W's rows. */
static void dsa__mm_dw_task(void *arg, int32_t task)
{
    const dsa__mm *m = (const dsa__mm *)arg;
    int64_t blocks = (m->n_out + DSA__MM_OUT - 1) / DSA__MM_OUT, unit, at;
    int32_t n_tasks = (int32_t)dsa__min64(m->ctx->config.n_threads, blocks * m->n_heads);
    for (unit = task; unit < blocks * m->n_heads; unit += n_tasks) {
        int64_t head = unit / blocks, o = unit % blocks * DSA__MM_OUT, tall = dsa__min64(DSA__MM_OUT, m->n_out - o);
        for (at = 0; at < m->n; at += DSA__MM_DEPTH)
            m->ctx->kernels->madd(tall, m->n_in, dsa__min64(DSA__MM_DEPTH, m->n - at), m->y + at * m->ldy + head * m->head_y + o, 1,
                                  m->ldy, m->x + at * m->ldx + head * m->head_x, m->ldx,
                                  m->dw + (m->first + head * m->step + o) * m->n_in, m->n_in);
    }
}

static void dsa__mm_forward(dsa__mm *m, const float *x, float *out)
{
    m->x = x;
    m->out = out;
    dsa__parallel(m->ctx, (m->n_out + DSA__MM_OUT - 1) / DSA__MM_OUT * m->n_heads, dsa__mm_forward_task, m);
}

/* dx += y W, dw += y^T x, each where it is wanted */
static void dsa__mm_backward(dsa__mm *m, const float *x, const float *y, float *dx, float *dw)
{
    m->x = x;
    m->y = y;
    m->dx = dx;
    m->dw = dw;
    if (dx) dsa__parallel(m->ctx, (m->n_in + DSA__MM_IN - 1) / DSA__MM_IN * m->n_heads, dsa__mm_dx_task, m);
    if (dw) dsa__parallel(m->ctx, (m->n_out + DSA__MM_OUT - 1) / DSA__MM_OUT * m->n_heads, dsa__mm_dw_task, m);
}

static dsa_status dsa__linear_plan(const dsa_ctx *ctx, const dsa_linear_args *a, dsa__arena *arena, float **scratch)
{
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!a) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_linear: args is NULL");
    if (a->n_rows < 0 || a->n_rows > DSA__MAX_POS || a->dim_in < 1 || a->dim_out < 1)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_linear: n_rows, dim_in or dim_out");
    *scratch = (float *)dsa__take(arena, ctx->config.n_threads, DSA__MM_SCRATCH, sizeof(float));
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_linear: the workspace does not fit in size_t") : DSA_OK;
}

DSA_API dsa_status dsa_linear_workspace(const dsa_ctx *ctx, const dsa_linear_args *args, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    float *scratch;
    dsa_status st = dsa__linear_plan(ctx, args, &arena, &scratch);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_linear: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

static dsa_status dsa__linear_start(const dsa_ctx *ctx, const dsa_linear_args *a, int needs_w, dsa__mm *m)
{
    dsa__arena arena = dsa__arena_over(NULL);
    float *scratch;
    dsa_status st = dsa__linear_plan(ctx, a, &arena, &scratch);
    if (st == DSA_OK && needs_w) st = dsa__tensor_check(ctx, &a->w, "dsa_linear: w");
    if (st == DSA_OK) st = dsa__arena_check(ctx, &arena, a->workspace, a->workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__arena_over(a->workspace);
    st = dsa__linear_plan(ctx, a, &arena, &scratch);
    DSA__CARVED(st, arena, a->workspace_size);
    *m = dsa__mm_of(ctx, &a->w, a->n_rows, a->dim_in, a->dim_out, scratch);
    return st;
}

DSA_API dsa_status dsa_linear(const dsa_ctx *ctx, const dsa_linear_args *a)
{
    dsa__mm m;
    dsa_status st = dsa__linear_start(ctx, a, 1, &m);
    if (st != DSA_OK || a->n_rows == 0) return st;
    if (!a->x || !a->y) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_linear: x or y is NULL");
    dsa__mm_forward(&m, a->x, a->y);
    return DSA_OK;
}

DSA_API dsa_status dsa_linear_backward(const dsa_ctx *ctx, const dsa_linear_args *a)
{
    dsa__mm m;
    dsa_status st = dsa__linear_start(ctx, a, a && a->d_x, &m);
    if (st != DSA_OK || a->n_rows == 0) return st;
    if (!a->d_y || (a->d_w && !a->x)) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_linear_backward: d_y or x is NULL");
    dsa__mm_backward(&m, a->x, a->d_y, a->d_x, a->d_w);
    return DSA_OK;
}

/* ---- the set of a query ---------------------------------------------------------------------- */
/* Columns [lo, hi) of a query's row of numbers: entries of its list, or positions. */
typedef struct dsa__span { const dsa_cache *cache; const int32_t *list; int64_t lo, hi, limit; int32_t seq; } dsa__span;

/* The entries of block `block` of `keys` columns that name a row: positions and columns, ascending by column; returns how many. */
static int32_t dsa__span_block(const dsa__span *s, int64_t block, int64_t keys, int32_t *position, int32_t *column)
{
    int64_t from = dsa__max64(s->lo, block * keys), to = dsa__min64(s->hi, (block + 1) * keys), i;
    int32_t n = 0;
    for (i = from; i < to; i++) {
        int64_t p = s->list ? s->list[i] : i;
        position[n] = (int32_t)p;
        column[n] = (int32_t)i;
        n += p >= 0 && p < s->limit;
    }
    return n;
}

/* Which of n entries belong to stripe `task` of n_tasks. */
static int32_t dsa__stripe(const int32_t *position, int32_t n, int32_t task, int32_t n_tasks, int32_t *mine)
{
    int32_t j, m = 0;
    for (j = 0; j < n; j++) {
        mine[m] = j;
        m += position[j] / DSA__STRIPE % n_tasks == task;
    }
    return m;
}

/* Adds m rows of sums to the cache rows that they belong to, one after the other: a list may name a row twice. */
static void dsa__scatter(int32_t m, const int32_t *mine, const int32_t *position, int32_t dim, const float *sum, int64_t lds, float *to)
{
    int32_t i, d;
    for (i = 0; i < m; i++) {
        float *DSA__RESTRICT row = to + (int64_t)position[mine[i]] * dim;
        const float *DSA__RESTRICT from = sum + i * lds;
        for (d = 0; d < dim; d++) row[d] += from[d];
    }
}

/* The sets of rows [row, row + n) of the call; returns how many columns the longest has. `causal`: a list may not look ahead. */
static int64_t dsa__spans(const dsa_ctx *ctx, const dsa_attend_args *a, dsa_kind kind, int causal, dsa__cursor *cur, int64_t row, int64_t n,
                          dsa__span *spans)
{
    int64_t n_indices = a->n_indices ? a->n_indices : ctx->config.top_k, stride = a->index_stride ? a->index_stride : n_indices;
    int64_t most = 0, t;
    for (t = 0; t < n; t++) {
        const dsa_seq *seq = dsa__seek(cur, row + t);
        const dsa_cache *c = kind == DSA_LATENT ? seq->latent : seq->index;
        dsa__span *s = &spans[t];
        int64_t visible = dsa__visible(cur, seq, c, row + t);
        s->cache = c;
        s->seq = cur->seq;
        s->list = NULL;
        s->limit = causal ? visible : dsa__len(seq, c);
        s->lo = 0;
        s->hi = visible;
        if (a->what == DSA_ATTEND_RANGE) {
            s->lo = dsa__clamp64(a->ks[row + t], 0, s->limit);
            s->hi = dsa__clamp64(a->ke[row + t], 0, s->limit);
        } else if (a->what == DSA_ATTEND_LIST) {
            s->list = a->indices + (row + t) * stride;
            s->hi = a->counts ? dsa__clamp64(a->counts[row + t], 0, n_indices) : n_indices;
        }
        if (s->lo < s->hi) most = dsa__max64(most, s->hi);
    }
    return most;
}

/* Gradients are computed on the CPU only. */
static dsa_status dsa__on_host(const dsa_ctx *ctx, int32_t n_seqs, const dsa_seq *seqs)
{
    int32_t i;
    for (i = 0; i < n_seqs; i++)
        if (dsa__on_device(seqs[i].latent) || dsa__on_device(seqs[i].index))
            return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "backward: the caches live on a device");
    return DSA_OK;
}

/* What can be wrong with a set, and how many columns its rows may have. */
static dsa_status dsa__set_check(const dsa_ctx *ctx, const dsa_attend_args *a, dsa_kind kind, int64_t *n_rows, int64_t *n_columns)
{
    int64_t n_indices = a->n_indices ? a->n_indices : ctx->config.top_k;
    int32_t i;
    dsa_status st = dsa__plain_only(ctx, "backward: pools, groups, blocks, n_kv_heads and index_linear are not built");
    if (st == DSA_OK) st = dsa__rows(ctx, a->n_seqs, a->seqs, n_rows);
    if (st == DSA_OK) st = dsa__batch_check(ctx, a->n_seqs, a->seqs, kind);
    if (st == DSA_OK) st = dsa__on_host(ctx, a->n_seqs, a->seqs);
    if (st != DSA_OK) return st;
    if (a->what != DSA_ATTEND_LIST && a->what != DSA_ATTEND_RANGE && a->what != DSA_ATTEND_VISIBLE)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "backward: unknown what");
    if (a->index_kind != DSA_LOGICAL) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "backward: lists must be logical positions");
    if (n_indices < 0 || (a->index_stride != 0 && a->index_stride < n_indices))
        return dsa__fail(ctx, DSA_ERR_SHAPE, "backward: not 0 <= n_indices <= index_stride");
    *n_columns = n_indices;
    if (a->what == DSA_ATTEND_LIST) return DSA_OK;
    for (*n_columns = 0, i = 0; i < a->n_seqs; i++)
        *n_columns = dsa__max64(*n_columns, dsa__len(&a->seqs[i], kind == DSA_LATENT ? a->seqs[i].latent : a->seqs[i].index));
    return DSA_OK;
}

static dsa_status dsa__set_pointers(const dsa_ctx *ctx, const dsa_attend_args *a)
{
    if (a->what == DSA_ATTEND_LIST && !a->indices) return dsa__fail(ctx, DSA_ERR_NULL, "backward: indices is NULL");
    if (a->what == DSA_ATTEND_RANGE && (!a->ks || !a->ke)) return dsa__fail(ctx, DSA_ERR_NULL, "backward: ks or ke is NULL");
    return DSA_OK;
}

/* One gradient array per sequence, or none at all. */
static dsa_status dsa__rows_check(const dsa_ctx *ctx, const dsa_attend_args *a, float *const *d_rows)
{
    int32_t i;
    for (i = 0; d_rows && i < a->n_seqs; i++)
        if (!d_rows[i]) return dsa__fail(ctx, DSA_ERR_NULL, "backward: the gradient of a sequence's rows is NULL");
    return DSA_OK;
}

/* n rows of a range as they lie in the cache, `width` floats each and *stride apart, or NULL where they must be expanded: other formats,
   rotated keys, lists, several pages. */
static const float *dsa__rows_in_place(const dsa__span *s, const int32_t *position, int32_t n, int64_t *stride)
{
    const dsa_cache *c = s->cache;
    int64_t first, last, page;
    const unsigned char *p;
    if (s->list || n == 0 || c->format != DSA_F32 || c->hadamard || c->row_stride % sizeof(float) != 0) return NULL;
    page = dsa__page_of(c, position[0], &first);
    if (dsa__page_of(c, position[n - 1], &last) != page || last - first != n - 1) return NULL;
    p = dsa__row_in(c, page, first);
    if ((uintptr_t)p % sizeof(float) != 0) return NULL;
    *stride = (int64_t)(c->row_stride / sizeof(float));
    return (const float *)(const void *)p;
}

static int32_t dsa__eights(int32_t n) { return (n + 7) / 8 * 8; }

/* ---- attention ------------------------------------------------------------------------------ */
/* For each query and head, over its set (spec 8.4); L is lse with the sink z, if there is one:
       delta = <out, dout>      P_s = e^(scale <q, kv_s> - L)      dP_s = <dout, kv_s[0:R]>      dS_s = scale P_s (dP_s - delta)
       dq += Sum_s dS_s kv_s    dkv_s += dS_s q + P_s dout         dz -= e^(z - L) delta */
typedef struct dsa__attend_back {
    const dsa_ctx *ctx;
    const dsa_attend_backward_args *args;
    int causal;
    int64_t n_rows, row, n, block;                       /* of the call; the tile's first, its size; the block in work */
    int32_t H, wide, lanes, groups, dim_qk, R, rows;     /* wide: H rounded up to whole vectors; groups of heads, `lanes` wide */
    int64_t ldk;                                         /* an odd number of cache lines: a column of rows spreads over all sets of L1 */
    float scale;
    dsa__span *spans;                                    /* [rows] */
    float *L, *delta;                                    /* [rows, wide] */
    int32_t *n_keys, *position, *column;                 /* [rows], [rows, KEYS] twice */
    float *p, *ds;                                       /* [rows, groups, KEYS, lanes] */
    float *scratch;                                      /* per task: rows [KEYS, ldk], then the larger of q and dout side by side, and P
                                                            and dS of a stripe with its entries */
    int64_t scratch_stride;
} dsa__attend_back;

static dsa_status dsa__attend_back_plan(const dsa_ctx *ctx, dsa__arena *arena, dsa__attend_back *c)
{
    const dsa_config *f = &ctx->config;
    int64_t tile;
    memset(c, 0, sizeof *c);
    c->ctx = ctx;
    c->H = f->n_heads;
    c->wide = dsa__eights(c->H);
    c->rows = dsa__back_rows(c->wide);
    tile = c->rows * DSA__BACK_KEYS;
    c->R = f->dim_latent;
    c->lanes = dsa__min32(c->wide, DSA__HEADS);
    c->groups = (c->H + c->lanes - 1) / c->lanes;
    c->dim_qk = f->dim_latent + f->dim_rope;
    c->ldk = (((int64_t)c->dim_qk + 15) / 16 | 1) * 16;
    c->spans    = (dsa__span *)dsa__take(arena, c->rows, 1, sizeof *c->spans);
    c->L        = (float *)dsa__take(arena, c->rows, c->wide, sizeof(float));
    c->delta    = (float *)dsa__take(arena, c->rows, c->wide, sizeof(float));
    c->n_keys   = (int32_t *)dsa__take(arena, c->rows, 1, sizeof(int32_t));
    c->position = (int32_t *)dsa__take(arena, tile, 1, sizeof(int32_t));
    c->column   = (int32_t *)dsa__take(arena, tile, 1, sizeof(int32_t));
    c->p        = (float *)dsa__take(arena, tile, (int64_t)c->groups * c->lanes, sizeof(float));
    c->ds       = (float *)dsa__take(arena, tile, (int64_t)c->groups * c->lanes, sizeof(float));
    c->scratch_stride = DSA__BACK_KEYS * c->ldk +
                        dsa__max64(DSA__HEADS * ((int64_t)c->dim_qk + c->R), 2 * DSA__BACK_KEYS * (int64_t)c->wide) + 2 * DSA__BACK_KEYS;
    c->scratch  = (float *)dsa__take(arena, f->n_threads, c->scratch_stride, sizeof(float));
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_attend_backward: the workspace does not fit in size_t") : DSA_OK;
}

/* Phase 1: a unit is a query and one group of its heads. */
static void dsa__attend_back_queries(void *arg, int32_t task)
{
    dsa__attend_back *c = (dsa__attend_back *)arg;
    const dsa__kernels *k = c->ctx->kernels;
    const dsa_attend_backward_args *a = c->args;
    float *kv = c->scratch + task * c->scratch_stride, *qt = kv + DSA__BACK_KEYS * c->ldk, *ot = qt + c->lanes * (int64_t)c->dim_qk;
    int32_t *where = (int32_t *)(void *)(kv + c->scratch_stride - 2 * DSA__BACK_KEYS), lanes = c->lanes, j;
    int64_t unit;
    int32_t n_tasks = (int32_t)dsa__min64(c->ctx->config.n_threads, c->n * c->groups);
    for (unit = task; unit < c->n * c->groups; unit += n_tasks) {
        int64_t t = unit / c->groups, at = t * DSA__BACK_KEYS, offset, ldk = c->ldk;
        int32_t h = (int32_t)(unit % c->groups) * lanes, heads = dsa__min32(lanes, c->H - h), n;
        const dsa__span *s = &c->spans[t];
        const int64_t head = (c->row + t) * c->H + h;
        const float *rows;
        float *p = c->p + unit * DSA__BACK_KEYS * lanes, *ds = a->d_out ? c->ds + unit * DSA__BACK_KEYS * lanes : NULL;
        n = dsa__span_block(s, c->block, DSA__BACK_KEYS, where, where + DSA__BACK_KEYS);
        if (h == 0) {                                    /* for phase 2 */
            c->n_keys[t] = n;
            memcpy(c->position + at, where, sizeof(int32_t) * (size_t)n);
            memcpy(c->column + at, where + DSA__BACK_KEYS, sizeof(int32_t) * (size_t)n);
        }
        rows = dsa__rows_in_place(s, where, n, &ldk);
        for (j = 0; !rows && j < n; j++) {
            int64_t page = dsa__page_of(s->cache, where[j], &offset);
            dsa__expand_latent(s->cache->format, c->R, c->dim_qk - c->R, dsa__row_in(s->cache, page, offset), kv + j * ldk);
        }
        if (!rows) rows = kv;
        memset(p, 0, sizeof(float) * (size_t)n * (size_t)lanes);
        k->turn(heads, lanes, c->dim_qk, a->attend.q + head * c->dim_qk, qt);
        k->madd(n, lanes, c->dim_qk, rows, ldk, 1, qt, lanes, p, lanes);
        if (ds) {
            memset(ds, 0, sizeof(float) * (size_t)n * (size_t)lanes);
            k->turn(heads, lanes, c->R, a->d_out + head * c->R, ot);
            k->madd(n, lanes, c->R, rows, ldk, 1, ot, lanes, ds, lanes);
        }
        k->weights(n, lanes, c->scale, c->L + t * c->wide + h, c->delta + t * c->wide + h, p, ds, lanes);
        if (ds && a->d_q) k->madd(heads, c->dim_qk, n, ds, 1, lanes, rows, ldk, a->d_q + head * c->dim_qk, c->dim_qk);
    }
}

/* Phase 2: a task is a stripe of the cache's rows. A range adds a stripe at a time where it belongs; of a list, which may name a row
   twice, all rows are summed up over the heads first and then added one after the other. */
static void dsa__attend_back_rows(void *arg, int32_t task)
{
    dsa__attend_back *c = (dsa__attend_back *)arg;
    const dsa_attend_backward_args *a = c->args;
    const dsa__kernels *k = c->ctx->kernels;
    float *sum = c->scratch + task * c->scratch_stride, *p = sum + DSA__BACK_KEYS * c->ldk;
    float *ds = p + DSA__BACK_KEYS * (int64_t)c->wide;
    int32_t *mine = (int32_t *)(void *)(sum + c->scratch_stride - 2 * DSA__BACK_KEYS), n_tasks = c->ctx->config.n_threads, i, m, h, n;
    int64_t t;
    for (t = 0; t < c->n; t++) {
        const int64_t at = t * DSA__BACK_KEYS, head = (c->row + t) * c->H;
        const float *all_p = c->p + at * c->groups * c->lanes, *all_ds = c->ds + at * c->groups * c->lanes;
        const float *q = a->attend.q + head * c->dim_qk, *dout = a->d_out ? a->d_out + head * c->R : NULL;
        float *to = a->d_latent ? a->d_latent[c->spans[t].seq] : NULL;
        m = dsa__stripe(c->position + at, c->n_keys[t], task, n_tasks, mine);
        for (i = 0; a->target && i < m; i++) {
            float r = 0.0f;
            for (h = 0; h < c->H; h++) r += all_p[((int64_t)(h / c->lanes) * DSA__BACK_KEYS + mine[i]) * c->lanes + h % c->lanes];
            a->target[(c->row + t) * a->target_stride + c->column[at + mine[i]]] = r;
        }
        if (!dout || !to) continue;
        for (i = 0; !c->spans[t].list && i < m; i += n) {
            float *row = to + (int64_t)c->position[at + mine[i]] * c->dim_qk;
            for (n = 1; i + n < m && mine[i + n] == mine[i] + n; n++) { }
            for (h = 0; h < c->H; h += c->lanes) {
                const int64_t first = ((int64_t)(h / c->lanes) * DSA__BACK_KEYS + mine[i]) * c->lanes;
                const int32_t heads = dsa__min32(c->lanes, c->H - h);
                k->madd(n, c->dim_qk, heads, all_ds + first, c->lanes, 1, q + (int64_t)h * c->dim_qk, c->dim_qk, row, c->dim_qk);
                k->madd(n, c->R, heads, all_p + first, c->lanes, 1, dout + (int64_t)h * c->R, c->R, row, c->dim_qk);
            }
        }
        if (!c->spans[t].list) continue;
        for (i = 0; i < m; i++)
            for (h = 0; h < c->H; h += c->lanes) {
                const int64_t first = ((int64_t)(h / c->lanes) * DSA__BACK_KEYS + mine[i]) * c->lanes;
                const size_t size = sizeof(float) * (size_t)dsa__min32(c->lanes, c->wide - h);
                memcpy(p + (int64_t)i * c->wide + h, all_p + first, size);
                memcpy(ds + (int64_t)i * c->wide + h, all_ds + first, size);
            }
        memset(sum, 0, sizeof(float) * (size_t)m * (size_t)c->ldk);
        k->madd(m, c->dim_qk, c->H, ds, c->wide, 1, q, c->dim_qk, sum, c->ldk);
        k->madd(m, c->R, c->H, p, c->wide, 1, dout, c->R, sum, c->ldk);
        dsa__scatter(m, mine, c->position + at, c->dim_qk, sum, c->ldk, to);
    }
}

/* L and delta of the tile's rows, and what the sinks get. */
static void dsa__attend_back_heads(dsa__attend_back *c)
{
    const dsa_attend_backward_args *a = c->args;
    int64_t t, i;
    int32_t h, d;
    for (t = 0; t < c->n; t++)
        for (h = 0; h < c->wide; h++) {
            float L = 0.0f, delta = 0.0f;
            i = (c->row + t) * c->H + h;
            if (h < c->H) {
                double sum = 0.0, lse = (double)a->lse[i], z = a->sinks ? (double)a->sinks[h] : -1.0;
                L = a->lse[i];
                if (a->d_out) for (d = 0; d < c->R; d++) sum += (double)a->out[i * c->R + d] * (double)a->d_out[i * c->R + d];
                delta = (float)sum;
                if (a->sinks && a->sinks[h] != -dsa__infinity() && L != dsa__infinity()) {
                    /* the sink's share e^(z - L); L = ln(e^lse + e^z), taken from the larger of the two */
                    double share = z > lse ? 1.0 / (1.0 + exp(lse - z)) : exp(z - lse) / (1.0 + exp(z - lse));
                    L = (float)(z > lse ? z + log(1.0 + exp(lse - z)) : lse + log(1.0 + exp(z - lse)));
                    if (a->d_sinks) a->d_sinks[h] -= (float)(share * sum);
                }
            }
            c->L[t * c->wide + h] = L;
            c->delta[t * c->wide + h] = delta;
        }
}

/* p = r / Sum_s r */
static void dsa__attend_back_target(dsa__attend_back *c)
{
    int64_t t, i;
    for (t = 0; t < c->n; t++) {
        float *r = c->args->target + (c->row + t) * c->args->target_stride;
        double sum = 0.0;
        for (i = c->spans[t].lo; i < c->spans[t].hi; i++) sum += (double)r[i];
        for (i = c->spans[t].lo; i < c->spans[t].hi && sum > 0.0; i++) r[i] = (float)((double)r[i] / sum);
    }
}

/* A checked call in a carved workspace. */
static void dsa__attend_back_run(dsa__attend_back *c, const dsa_attend_backward_args *a, int causal)
{
    int64_t n_blocks, t;
    dsa__cursor cur;
    cur.seqs = a->attend.seqs;
    cur.seq = 0;
    cur.first = 0;
    c->args = a;
    c->causal = causal;
    c->scale = a->attend.scale == 0.0f ? c->ctx->config.softmax_scale : a->attend.scale;
    for (c->row = 0; c->row < c->n_rows; c->row += c->n) {
        c->n = dsa__min64(c->rows, c->n_rows - c->row);
        n_blocks = dsa__spans(c->ctx, &a->attend, DSA_LATENT, causal, &cur, c->row, c->n, c->spans);
        n_blocks = (n_blocks + DSA__BACK_KEYS - 1) / DSA__BACK_KEYS;
        dsa__attend_back_heads(c);
        for (t = 0; a->target && t < c->n; t++)
            memset(a->target + (c->row + t) * a->target_stride, 0, sizeof(float) * (size_t)a->target_stride);
        for (c->block = 0; c->block < n_blocks; c->block++) {
            dsa__parallel(c->ctx, c->n * c->groups, dsa__attend_back_queries, c);
            dsa__parallel(c->ctx, c->ctx->config.n_threads, dsa__attend_back_rows, c);
        }
        if (a->target) dsa__attend_back_target(c);
    }
}

static dsa_status dsa__attend_back_check(const dsa_ctx *ctx, const dsa_attend_backward_args *a, dsa__arena *arena, dsa__attend_back *c)
{
    int64_t n_rows, n_columns = 0;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!a) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_attend_backward: args is NULL");
    st = dsa__set_check(ctx, &a->attend, DSA_LATENT, &n_rows, &n_columns);
    if (st != DSA_OK) return st;
    if (!(a->attend.scale >= -FLT_MAX && a->attend.scale <= FLT_MAX))
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_attend_backward: scale is not finite");
    if (a->target && a->target_stride < n_columns)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_attend_backward: target_stride is smaller than a row has columns");
    st = dsa__attend_back_plan(ctx, arena, c);
    c->n_rows = n_rows;
    return st;
}

DSA_API dsa_status dsa_attend_backward_workspace(const dsa_ctx *ctx, const dsa_attend_backward_args *args, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__attend_back c;
    dsa_status st = dsa__attend_back_check(ctx, args, &arena, &c);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_attend_backward: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

DSA_API dsa_status dsa_attend_backward(const dsa_ctx *ctx, const dsa_attend_backward_args *a)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__attend_back c;
    dsa_status st = dsa__attend_back_check(ctx, a, &arena, &c);
    if (st == DSA_OK) st = dsa__rows_check(ctx, &a->attend, a->d_latent);
    if (st != DSA_OK) return st;
    if (c.n_rows > 0) {
        st = dsa__set_pointers(ctx, &a->attend);
        if (st == DSA_OK && (!a->attend.q || !a->lse)) st = dsa__fail(ctx, DSA_ERR_NULL, "dsa_attend_backward: q or lse is NULL");
        if (st == DSA_OK && a->d_out && !a->out) st = dsa__fail(ctx, DSA_ERR_NULL, "dsa_attend_backward: out is NULL");
        if (st != DSA_OK) return st;
    }
    st = dsa__arena_check(ctx, &arena, a->attend.workspace, a->attend.workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__arena_over(a->attend.workspace);
    st = dsa__attend_back_check(ctx, a, &arena, &c);
    DSA__CARVED(st, arena, a->attend.workspace_size);
    if (st == DSA_OK) dsa__attend_back_run(&c, a, 0);
    return st;
}

/* ---- the indexer ----------------------------------------------------------------------------- */
/* For each query over its set, with d[h,s] = <q[h], k[s]> and g = dI (spec 8.3):
       dw[h] += Sum_s g_s ReLU(d[h,s])     u[h,s] = g_s w[h] ReLU'(d[h,s])     dq[h] += Sum_s u[h,s] k[s]     dk[s] += Sum_h u[h,s] q[h]
   q and k before Hadamard: the rotation does not change <q, k>. */
typedef struct dsa__index_back {
    const dsa_ctx *ctx;
    const dsa_index_backward_args *args;
    int64_t n_rows, n_columns, row, n, n_blocks, block;
    int32_t HI, wide, D, rows, keys;                     /* keys of a block */
    dsa__span *spans;                                    /* [rows] */
    int32_t *n_keys, *position;                          /* [rows], [rows, keys] */
    float *g;                                            /* [rows, n_columns]: scores, then their derivatives */
    float *u;                                            /* [rows, keys, wide] */
    float *scratch;                                      /* per task: keys [keys, D], q side by side [D, wide], w, dw [wide], g of the block
                                                            [keys], columns [keys]; or sums [keys, D], u of a stripe [keys, wide]; its
                                                            entries [keys] */
    int64_t scratch_stride;
} dsa__index_back;

static dsa_status dsa__index_back_plan(const dsa_ctx *ctx, int64_t n_columns, dsa__arena *arena, dsa__index_back *c)
{
    const dsa_config *f = &ctx->config;
    memset(c, 0, sizeof *c);
    c->ctx = ctx;
    c->HI = f->n_index_heads;
    if (c->HI < 1) return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_index_backward: the config has no n_index_heads");
    c->wide = dsa__eights(c->HI);
    c->D = f->dim_index;
    c->n_columns = n_columns;
    c->rows = dsa__back_rows(c->wide);
    c->keys = n_columns <= DSA__BACK_MOST ? (int32_t)dsa__max64(n_columns, 1) : DSA__BACK_KEYS;
    c->spans    = (dsa__span *)dsa__take(arena, c->rows, 1, sizeof *c->spans);
    c->n_keys   = (int32_t *)dsa__take(arena, c->rows, 1, sizeof(int32_t));
    c->position = (int32_t *)dsa__take(arena, c->rows, c->keys, sizeof(int32_t));
    c->g        = (float *)dsa__take(arena, c->rows, n_columns, sizeof(float));
    c->u        = (float *)dsa__take(arena, (int64_t)c->rows * c->keys, c->wide, sizeof(float));
    c->scratch_stride = c->keys * ((int64_t)c->D + 3) + c->wide * dsa__max64((int64_t)c->D + 2, c->keys);
    c->scratch  = (float *)dsa__take(arena, f->n_threads, c->scratch_stride, sizeof(float));
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_index_backward: the workspace does not fit in size_t") : DSA_OK;
}

/* A key before Hadamard, with its scale. */
static void dsa__index_back_key(const dsa_cache *c, int64_t position, float *x)
{
    int64_t offset, page = dsa__page_of(c, position, &offset);
    int32_t d;
    dsa__expand_key(c->format, c->dim, dsa__row_in(c, page, offset), x);
    if (dsa__planar(c->kind, c->format)) {
        float s;
        memcpy(&s, dsa__scale_in(c, page, offset), 4);
        for (d = 0; d < c->dim; d++) x[d] *= s;
    }
    if (c->hadamard) dsa__hadamard(x, c->dim);
}

/* KL_t (where it is wanted), and over the scores their derivatives: g = weight (sigma - p). Columns that name nothing have I = -inf and
   p = 0: their g is 0. */
static float dsa__index_back_loss(const dsa__kernels *k, int64_t n, const float *p, float weight, int wanted, float *DSA__RESTRICT I)
{
    const float none = -dsa__infinity();
    double total = 0.0, cross = 0.0, entropy = 0.0;
    float max = none, sum;
    int64_t i;
    for (i = 0; i < n; i++) {
        max = I[i] > max ? I[i] : max;
        total += (double)p[i];
    }
    if (total == 0.0) {
        for (i = 0; i < n; i++) I[i] = 0.0f;
        return 0.0f;
    }
    for (i = 0; wanted && i < n; i++)
        if (p[i] > 0.0f) {
            entropy += (double)p[i] * log((double)p[i]);
            cross += (double)p[i] * (double)I[i];
        }
    sum = k->exps(n, max, I);
    for (i = 0; i < n; i++) I[i] = weight * (I[i] / sum - p[i]);
    return wanted ? (float)(entropy - cross + total * ((double)max + log((double)sum))) : 0.0f;
}

/* The keys of block `block` of query t, in place or in `keys`, and their d[h,s]. */
static const float *dsa__index_back_dots(dsa__index_back *c, int64_t t, int64_t block, float *keys, const float *qt, int32_t *column,
                                         int64_t *ldk)
{
    const dsa__span *s = &c->spans[t];
    int32_t *position = c->position + t * c->keys, n = dsa__span_block(s, block, c->keys, position, column), j;
    float *u = c->u + t * c->keys * c->wide;
    const float *rows;
    c->n_keys[t] = n;
    *ldk = c->D;
    rows = dsa__rows_in_place(s, position, n, ldk);
    for (j = 0; !rows && j < n; j++) dsa__index_back_key(s->cache, position[j], keys + (int64_t)j * c->D);
    if (!rows) rows = keys;
    memset(u, 0, sizeof(float) * (size_t)n * (size_t)c->wide);
    c->ctx->kernels->madd(n, c->wide, c->D, rows, *ldk, 1, qt, c->wide, u, c->wide);
    return rows;
}

/* Phase 1 of a query. Block -1: the scores of all blocks and the loss; a set of one block then goes on at once. */
static void dsa__index_back_queries(void *arg, int32_t task)
{
    dsa__index_back *c = (dsa__index_back *)arg;
    const dsa_index_backward_args *a = c->args;
    const dsa__kernels *k = c->ctx->kernels;
    float *keys = c->scratch + task * c->scratch_stride, *qt = keys + (int64_t)c->keys * c->D, *w = qt + (int64_t)c->wide * c->D;
    float *dw = w + c->wide, *g = dw + c->wide;
    int32_t *column = (int32_t *)(void *)(g + c->keys), n_tasks = (int32_t)dsa__min64(c->ctx->config.n_threads, c->n), h, j;
    int64_t t, b, i, ldk = c->D;
    for (t = task; t < c->n; t += n_tasks) {
        const dsa__span *s = &c->spans[t];
        const int64_t row = c->row + t;
        const float *q = a->q + row * c->HI * c->D, *rows = keys;
        float *u = c->u + t * c->keys * c->wide, *I = c->g + t * c->n_columns, loss;
        const float *of = a->target ? I : a->d_scores + row * a->stride;
        k->turn(c->HI, c->wide, c->D, q, qt);
        for (h = 0; h < c->wide; h++) w[h] = h < c->HI ? a->w[row * c->HI + h] : 0.0f;
        if (c->block < 0 && a->target) {
            for (i = s->lo; i < s->hi; i++) I[i] = -dsa__infinity();
            c->n_keys[t] = 0;
            for (b = 0; b < c->n_blocks; b++) {
                rows = dsa__index_back_dots(c, t, b, keys, qt, column, &ldk);
                k->fold(c->n_keys[t], c->wide, w, u, c->wide, g);
                for (j = 0; j < c->n_keys[t]; j++) I[column[j]] = g[j];
            }
            loss = 0.0f;
            if (s->lo < s->hi)
                loss = dsa__index_back_loss(k, s->hi - s->lo, a->target + row * a->stride + s->lo, a->weight, a->loss != NULL, I + s->lo);
            if (a->loss) a->loss[row] = loss;
        }
        if (c->block < 0 && c->n_blocks > 1) continue;
        if (c->block >= 0 || !a->target) rows = dsa__index_back_dots(c, t, dsa__max64(c->block, 0), keys, qt, column, &ldk);
        for (j = 0; j < c->n_keys[t]; j++) g[j] = of[column[j]];
        for (h = 0; h < c->wide; h++) dw[h] = a->d_w && h < c->HI ? a->d_w[row * c->HI + h] : 0.0f;
        k->unfold(c->n_keys[t], c->wide, w, g, u, c->wide, dw);
        if (a->d_w) memcpy(a->d_w + row * c->HI, dw, sizeof(float) * (size_t)c->HI);
        if (a->d_q) k->madd(c->HI, c->D, c->n_keys[t], u, 1, c->wide, rows, ldk, a->d_q + row * c->HI * c->D, c->D);
    }
}

/* Phase 2: a task is a stripe of the cache's keys. */
static void dsa__index_back_keys(void *arg, int32_t task)
{
    dsa__index_back *c = (dsa__index_back *)arg;
    const dsa_index_backward_args *a = c->args;
    const dsa__kernels *k = c->ctx->kernels;
    float *sum = c->scratch + task * c->scratch_stride, *u = sum + (int64_t)c->keys * c->D;
    int32_t *mine = (int32_t *)(void *)(sum + c->scratch_stride - c->keys), n_tasks = c->ctx->config.n_threads, i, m, n;
    int64_t t;
    for (t = 0; t < c->n; t++) {
        const int64_t at = t * c->keys;
        const float *q = a->q + (c->row + t) * c->HI * c->D, *all = c->u + at * c->wide;
        float *to = a->d_key[c->spans[t].seq];
        m = dsa__stripe(c->position + at, c->n_keys[t], task, n_tasks, mine);
        for (i = 0; !c->spans[t].list && i < m; i += n) {
            for (n = 1; i + n < m && mine[i + n] == mine[i] + n; n++) { }
            k->madd(n, c->D, c->HI, all + (int64_t)mine[i] * c->wide, c->wide, 1, q, c->D,
                    to + (int64_t)c->position[at + mine[i]] * c->D, c->D);
        }
        if (!c->spans[t].list) continue;
        for (i = 0; i < m; i++) memcpy(u + (int64_t)i * c->wide, all + (int64_t)mine[i] * c->wide, sizeof(float) * (size_t)c->wide);
        memset(sum, 0, sizeof(float) * (size_t)m * (size_t)c->D);
        k->madd(m, c->D, c->HI, u, c->wide, 1, q, c->D, sum, c->D);
        dsa__scatter(m, mine, c->position + at, c->D, sum, c->D, to);
    }
}

static void dsa__index_back_run(dsa__index_back *c, const dsa_index_backward_args *a, int causal)
{
    dsa__cursor cur;
    cur.seqs = a->set.seqs;
    cur.seq = 0;
    cur.first = 0;
    c->args = a;
    for (c->row = 0; c->row < c->n_rows; c->row += c->n) {
        c->n = dsa__min64(c->rows, c->n_rows - c->row);
        c->n_blocks = (dsa__spans(c->ctx, &a->set, DSA_INDEX_KEY, causal, &cur, c->row, c->n, c->spans) + c->keys - 1) / c->keys;
        c->block = -1;
        dsa__parallel(c->ctx, c->n, dsa__index_back_queries, c);
        for (c->block = 0; c->block < c->n_blocks; c->block++) {
            if (c->n_blocks > 1) dsa__parallel(c->ctx, c->n, dsa__index_back_queries, c);
            if (a->d_key) dsa__parallel(c->ctx, c->ctx->config.n_threads, dsa__index_back_keys, c);
        }
    }
}

static dsa_status dsa__index_back_check(const dsa_ctx *ctx, const dsa_index_backward_args *a, dsa__arena *arena, dsa__index_back *c)
{
    int64_t n_rows, n_columns = 0;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!a) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_index_backward: args is NULL");
    st = dsa__set_check(ctx, &a->set, DSA_INDEX_KEY, &n_rows, &n_columns);
    if (st != DSA_OK) return st;
    if ((a->target || a->d_scores) && a->stride < n_columns)
        return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_index_backward: stride is smaller than a row has columns");
    if (!(a->weight >= -FLT_MAX && a->weight <= FLT_MAX))
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_index_backward: weight is not finite");
    st = dsa__index_back_plan(ctx, n_columns, arena, c);
    c->n_rows = n_rows;
    return st;
}

DSA_API dsa_status dsa_index_backward_workspace(const dsa_ctx *ctx, const dsa_index_backward_args *args, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__index_back c;
    dsa_status st = dsa__index_back_check(ctx, args, &arena, &c);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_index_backward: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

DSA_API dsa_status dsa_index_backward(const dsa_ctx *ctx, const dsa_index_backward_args *a)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__index_back c;
    dsa_status st = dsa__index_back_check(ctx, a, &arena, &c);
    if (st == DSA_OK) st = dsa__rows_check(ctx, &a->set, a->d_key);
    if (st != DSA_OK) return st;
    if (c.n_rows > 0) {
        st = dsa__set_pointers(ctx, &a->set);
        if (st == DSA_OK && (!a->q || !a->w)) st = dsa__fail(ctx, DSA_ERR_NULL, "dsa_index_backward: q or w is NULL");
        if (st == DSA_OK && (a->target == NULL) == (a->d_scores == NULL))
            st = dsa__fail(ctx, DSA_ERR_NULL, "dsa_index_backward: target or d_scores, one of the two");
        if (st != DSA_OK) return st;
    }
    st = dsa__arena_check(ctx, &arena, a->set.workspace, a->set.workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__arena_over(a->set.workspace);
    st = dsa__index_back_check(ctx, a, &arena, &c);
    DSA__CARVED(st, arena, a->set.workspace_size);
    if (st == DSA_OK) dsa__index_back_run(&c, a, 0);
    return st;
}

/* ============================================================================================
   >>layer_backward                           7. gradients of the layer
   ============================================================================================
   Tile after tile the queries' side, computed again from x as dsa_layer does, then backwards from y; what it adds to the latents' and
   keys' gradients is carried on to W_kva and W_k when all queries are through. */
typedef struct dsa__layer_back {
    const dsa_layer_backward_args *args;
    dsa__layer_call fwd;                                 /* the forward pass's tile, its row norms and sequences */
    int64_t n_rows, n_columns, target_stride;
    int has_indexer, wants_index;
    float *d_latent, *d_key;                             /* all sequences' rows, [Sum len, R + r] and [Sum len, D] */
    float **latent_rows, **key_rows;                     /* [n_seqs] where each sequence's begin */
    float **tile_latents, **tile_keys;                   /* [n] those of the tile */
    float *qa, *lse;                                     /* [n, q_lora] before the norm, [n, H] */
    float *d_qr, *d_qa, *d_q, *d_abs, *d_olat, *d_o;     /* like the forward's */
    float *d_iq, *d_iw;
    float *kv, *d_kv, *key, *d_key_in;                   /* [n, R + r] twice, [n, D] twice: before the norms */
    float *target;                                       /* [n, target_stride] */
    float *mm;
    dsa__attend_back attend;
    dsa__index_back index;
} dsa__layer_back;

static dsa_status dsa__layer_back_plan(const dsa_ctx *ctx, const dsa_layer_backward_args *a, dsa__arena *arena, dsa__layer_back *c)
{
    const dsa_config *f;
    int64_t n, H, total = 0, longest = 0;
    int32_t i;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    f = &ctx->config;
    memset(c, 0, sizeof *c);
    c->args = a;
    if (!a || !a->grads) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_layer_backward: args or grads is NULL");
    st = dsa__layer_plan(ctx, &a->layer, arena, &c->fwd);
    if (st == DSA_OK) st = dsa__on_host(ctx, a->layer.n_seqs, a->layer.seqs);
    if (st != DSA_OK) return st;
    if (!(a->index_weight >= -FLT_MAX && a->index_weight <= FLT_MAX))
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_layer_backward: index_weight is not finite");
    c->n_rows = c->fwd.n_rows;
    c->has_indexer = c->fwd.has_indexer;
    c->wants_index = c->has_indexer && (a->index_weight != 0.0f || a->index_loss);
    n = dsa__min64(c->n_rows, DSA_LAYER_TILE);
    H = f->n_heads;
    for (i = 0; i < a->layer.n_seqs; i++) {
        int64_t len = a->layer.seqs[i].latent->len;
        if (len < dsa__n_q(&a->layer.seqs[i]))
            return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_layer_backward: a cache is shorter than n_q; the forward call comes first");
        total += len;
        longest = dsa__max64(longest, len);
    }
    c->n_columns = c->target_stride = a->layer.mode == DSA_LAYER_SPARSE ? f->top_k : longest;
    c->d_latent     = (float *)dsa__take(arena, total, c->fwd.dim_qk, sizeof(float));
    c->d_key        = (float *)dsa__take(arena, c->has_indexer ? total : 0, f->dim_index, sizeof(float));
    c->latent_rows  = (float **)dsa__take(arena, a->layer.n_seqs, 1, sizeof(float *));
    c->key_rows     = (float **)dsa__take(arena, a->layer.n_seqs, 1, sizeof(float *));
    c->tile_latents = (float **)dsa__take(arena, n, 1, sizeof(float *));
    c->tile_keys    = (float **)dsa__take(arena, n, 1, sizeof(float *));
    c->qa       = (float *)dsa__take(arena, n, f->dim_q_lora, sizeof(float));
    c->lse      = (float *)dsa__take(arena, n, H, sizeof(float));
    c->d_qr     = (float *)dsa__take(arena, n, f->dim_q_lora, sizeof(float));
    c->d_qa     = (float *)dsa__take(arena, n, f->dim_q_lora, sizeof(float));
    c->d_q      = (float *)dsa__take(arena, n, H * c->fwd.dim_q, sizeof(float));
    c->d_abs    = (float *)dsa__take(arena, n, H * c->fwd.dim_qk, sizeof(float));
    c->d_olat   = (float *)dsa__take(arena, n, H * f->dim_latent, sizeof(float));
    c->d_o      = (float *)dsa__take(arena, n, H * f->dim_v, sizeof(float));
    c->d_iq     = (float *)dsa__take(arena, n, (int64_t)f->n_index_heads * f->dim_index, sizeof(float));
    c->d_iw     = (float *)dsa__take(arena, n, f->n_index_heads, sizeof(float));
    c->kv       = (float *)dsa__take(arena, n, c->fwd.dim_qk, sizeof(float));
    c->d_kv     = (float *)dsa__take(arena, n, c->fwd.dim_qk, sizeof(float));
    c->key      = (float *)dsa__take(arena, n, f->dim_index, sizeof(float));
    c->d_key_in = (float *)dsa__take(arena, n, f->dim_index, sizeof(float));
    c->target   = (float *)dsa__take(arena, c->wants_index ? n : 0, c->target_stride, sizeof(float));
    c->mm       = (float *)dsa__take(arena, f->n_threads, DSA__MM_SCRATCH, sizeof(float));
    st = dsa__attend_back_plan(ctx, arena, &c->attend);
    if (st == DSA_OK && c->has_indexer) st = dsa__index_back_plan(ctx, c->n_columns, arena, &c->index);
    if (st != DSA_OK) return st;
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "dsa_layer_backward: the workspace does not fit in size_t") : DSA_OK;
}

DSA_API dsa_status dsa_layer_backward_workspace(const dsa_ctx *ctx, const dsa_layer_backward_args *args, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__layer_back c;
    dsa_status st = dsa__layer_back_plan(ctx, args, &arena, &c);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_layer_backward: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

/* The projections W_UK (which = 0) and W_UV (1) of every head: rows of kv_b. */
static dsa__mm dsa__mm_kv_b(const dsa_ctx *ctx, const dsa_layer_weights *w, int64_t n, int which, float *scratch)
{
    const dsa_config *f = &ctx->config;
    dsa__mm m = dsa__mm_of(ctx, &w->kv_b, n, f->dim_latent, which ? f->dim_v : f->dim_nope, scratch);
    m.n_heads = f->n_heads;
    m.step = (int64_t)f->dim_nope + f->dim_v;
    m.first = which ? f->dim_nope : 0;
    return m;
}

/* The queries of one tile: rows [row, row + n) of the call, those of fwd.seqs[0 .. n_seqs). */
static dsa_status dsa__layer_back_queries(const dsa_ctx *ctx, dsa__layer_back *c, int64_t row, int64_t n, int32_t n_seqs)
{
    const dsa_config *f = &ctx->config;
    const dsa_layer_backward_args *a = c->args;
    const dsa_layer_weights *w = a->layer.weights;
    const dsa_layer_grads *d = a->grads;
    dsa__layer_call *s = &c->fwd;
    const float *x = a->layer.x + row * f->dim_hidden, *dy = a->d_y ? a->d_y + row * f->dim_hidden : NULL;
    const int64_t H = f->n_heads, dim_q = s->dim_q, dim_qk = s->dim_qk, R = f->dim_latent;
    const int64_t index_dim = (int64_t)f->n_index_heads * f->dim_index;
    const float index_scale = f->index_scale;
    dsa_rope q_rope = dsa_config_rope(ctx, (int32_t)dim_q), i_rope = dsa_config_index_rope(ctx);
    dsa__mm q_a = dsa__mm_of(ctx, &w->q_a, n, f->dim_hidden, f->dim_q_lora, c->mm);
    dsa__mm q_b = dsa__mm_of(ctx, &w->q_b, n, f->dim_q_lora, H * dim_q, c->mm);
    dsa__mm uk = dsa__mm_kv_b(ctx, w, n, 0, c->mm), uv = dsa__mm_kv_b(ctx, w, n, 1, c->mm);
    dsa__mm o = dsa__mm_of(ctx, &w->o, n, H * f->dim_v, f->dim_hidden, c->mm);
    dsa_attend_backward_args at;
    dsa_attend_state state;
    dsa__cursor cur;
    int64_t t, h;
    dsa_status st;

    /* forward: qr, q, q_abs, then out and lse */
    dsa__mm_forward(&q_a, x, c->qa);
    memcpy(s->qr, c->qa, sizeof(float) * (size_t)(n * f->dim_q_lora));
    (void)dsa_rms_norm(s->qr, n, f->dim_q_lora, f->dim_q_lora, s->q_norm, f->norm_eps);
    dsa__mm_forward(&q_b, s->qr, s->q);
    (void)dsa_rope_rows(s->q, n, H * dim_q, f->n_heads, dim_q, (int32_t)dim_q, &q_rope, s->positions, 0);
    memset(s->q_abs, 0, sizeof(float) * (size_t)(n * H * dim_qk));
    uk.ldx = H * dim_qk; uk.head_x = dim_qk;             /* its input is the latent side, q_abs; its output q_nope */
    uk.ldy = H * dim_q;  uk.head_y = dim_q;
    dsa__mm_backward(&uk, NULL, s->q, s->q_abs, NULL);
    for (t = 0; t < n; t++)
        for (h = 0; h < H; h++)
            memcpy(s->q_abs + (t * H + h) * dim_qk + R, s->q + (t * H + h) * dim_q + f->dim_nope, sizeof(float) * (size_t)f->dim_rope);
    memset(&at, 0, sizeof at);
    at.attend.n_seqs = n_seqs;
    at.attend.seqs = s->seqs;
    at.attend.q = s->q_abs;
    at.attend.what = a->layer.mode == DSA_LAYER_SPARSE ? DSA_ATTEND_LIST
                   : (a->layer.mode == DSA_LAYER_DENSE ? DSA_ATTEND_VISIBLE : DSA_ATTEND_RANGE);
    at.attend.indices = at.attend.what == DSA_ATTEND_LIST ? a->layer.indices_in + row * f->top_k : NULL;
    at.attend.n_indices = f->top_k;
    cur.seqs = s->seqs;
    cur.seq = 0;
    cur.first = 0;
    for (t = 0; t < n; t++) {
        const dsa_seq *seq = dsa__seek(&cur, t);
        s->ke[t] = dsa__visible(&cur, seq, seq->latent, t);
        s->ks[t] = dsa__max64(s->ke[t] - f->top_k, 0);
    }
    at.attend.ks = s->ks;
    at.attend.ke = s->ke;
    at.attend.workspace = s->shared;
    at.attend.workspace_size = s->shared_size;
    state.n_rows = n;
    state.n_heads = f->n_heads;
    state.dim_v = f->dim_latent;
    state.max = s->max;
    state.sum = s->sum;
    state.out = s->o_lat;
    st = dsa__attend_fused(ctx, &at.attend, &state, 1, NULL, c->lse, NULL);
    if (st != DSA_OK) return st;

    /* backward: y -> o -> o_lat -> q_abs -> q -> qr -> x */
    at.out = s->o_lat;
    at.lse = c->lse;
    if (c->wants_index) {
        at.target = c->target;
        at.target_stride = c->target_stride;
    }
    if (dy) {
        uv.ldx = H * R;        uv.head_x = R;
        uv.ldy = H * f->dim_v; uv.head_y = f->dim_v;
        dsa__mm_forward(&uv, s->o_lat, s->o);
        memset(c->d_o, 0, sizeof(float) * (size_t)(n * H * f->dim_v));
        memset(c->d_olat, 0, sizeof(float) * (size_t)(n * H * R));
        memset(c->d_abs, 0, sizeof(float) * (size_t)(n * H * dim_qk));
        memset(c->d_qr, 0, sizeof(float) * (size_t)(n * f->dim_q_lora));
        memset(c->d_qa, 0, sizeof(float) * (size_t)(n * f->dim_q_lora));
        dsa__mm_backward(&o, s->o, dy, c->d_o, d->o);
        dsa__mm_backward(&uv, s->o_lat, c->d_o, c->d_olat, d->kv_b);
        at.d_out = c->d_olat;
        at.d_q = c->d_abs;
        at.d_latent = (float *const *)c->tile_latents;
    }
    c->attend.n_rows = n;
    if (dy || c->wants_index) dsa__attend_back_run(&c->attend, &at, 1);
    if (dy) {
        dsa__mm_forward(&uk, c->d_abs, c->d_q);
        if (d->kv_b) dsa__mm_backward(&uk, c->d_abs, s->q, NULL, d->kv_b);
        for (t = 0; t < n; t++)
            for (h = 0; h < H; h++)
                memcpy(c->d_q + (t * H + h) * dim_q + f->dim_nope, c->d_abs + (t * H + h) * dim_qk + R,
                       sizeof(float) * (size_t)f->dim_rope);
        (void)dsa_rope_rows(c->d_q, n, H * dim_q, f->n_heads, dim_q, (int32_t)dim_q, &q_rope, s->positions, 1);
        dsa__mm_backward(&q_b, s->qr, c->d_q, c->d_qr, d->q_b);
        (void)dsa_rms_norm_backward(c->qa, c->d_qr, n, f->dim_q_lora, f->dim_q_lora, s->q_norm, f->norm_eps, c->d_qa, d->q_a_norm);
        dsa__mm_backward(&q_a, x, c->d_qa, a->d_x ? a->d_x + row * f->dim_hidden : NULL, d->q_a);
    }
    if (a->index_loss) memset(a->index_loss + row, 0, sizeof(float) * (size_t)n);
    if (!c->wants_index) return DSA_OK;

    /* the indexer: KL -> q_I, w, k_I; x and qr are constants to it */
    {
        dsa__mm iq = dsa__mm_of(ctx, &w->index_q_b, n, f->dim_q_lora, index_dim, c->mm);
        dsa__mm iw = dsa__mm_of(ctx, &w->index_w, n, f->dim_hidden, f->n_index_heads, c->mm);
        dsa_index_backward_args ix;
        memset(&ix, 0, sizeof ix);
        dsa__mm_forward(&iq, s->qr, s->index_q);
        (void)dsa_rope_rows(s->index_q, n, index_dim, f->n_index_heads, f->dim_index, f->dim_index, &i_rope, s->positions, 0);
        dsa__mm_forward(&iw, x, s->index_w);
        for (t = 0; t < n * f->n_index_heads; t++) s->index_w[t] *= index_scale;
        memset(c->d_iq, 0, sizeof(float) * (size_t)(n * index_dim));
        memset(c->d_iw, 0, sizeof(float) * (size_t)(n * f->n_index_heads));
        ix.set = at.attend;
        ix.q = s->index_q;
        ix.w = s->index_w;
        ix.target = c->target;
        ix.stride = c->target_stride;
        ix.weight = a->index_weight;
        ix.loss = a->index_loss ? a->index_loss + row : NULL;
        ix.d_q = c->d_iq;
        ix.d_w = c->d_iw;
        ix.d_key = (float *const *)c->tile_keys;
        c->index.n_rows = n;
        dsa__index_back_run(&c->index, &ix, 1);
        (void)dsa_rope_rows(c->d_iq, n, index_dim, f->n_index_heads, f->dim_index, f->dim_index, &i_rope, s->positions, 1);
        for (t = 0; t < n * f->n_index_heads; t++) c->d_iw[t] *= index_scale;
        dsa__mm_backward(&iq, s->qr, c->d_iq, NULL, d->index_q_b);
        dsa__mm_backward(&iw, x, c->d_iw, NULL, d->index_w);
    }
    return DSA_OK;
}

/* The latents and keys of one tile, whose gradients are complete: the call's rows [row, row + n). */
static void dsa__layer_back_rows(const dsa_ctx *ctx, dsa__layer_back *c, int64_t row, int64_t n, int32_t n_seqs)
{
    const dsa_config *f = &ctx->config;
    const dsa_layer_backward_args *a = c->args;
    const dsa_layer_weights *w = a->layer.weights;
    const dsa_layer_grads *d = a->grads;
    dsa__layer_call *s = &c->fwd;
    const float *x = a->layer.x + row * f->dim_hidden;
    const int64_t dim_qk = s->dim_qk;
    dsa_rope kv_rope = dsa_config_rope(ctx, (int32_t)dim_qk), i_rope = dsa_config_index_rope(ctx);
    int64_t t = 0, i;
    int32_t q;
    for (q = 0; q < n_seqs; q++) {                       /* the tile's rows out of their sequences' arrays, which are not needed again */
        int64_t rows = dsa__n_q(&s->seqs[q]), first = s->seqs[q].len - rows;
        memcpy(s->kv + t * dim_qk, c->tile_latents[q] + first * dim_qk, sizeof(float) * (size_t)(rows * dim_qk));
        if (c->has_indexer)
            memcpy(s->key + t * f->dim_index, c->tile_keys[q] + first * f->dim_index, sizeof(float) * (size_t)(rows * f->dim_index));
        t += rows;
    }
    if (a->d_y) {
        dsa__mm kv_a = dsa__mm_of(ctx, &w->kv_a, n, f->dim_hidden, dim_qk, c->mm);
        (void)dsa_rope_rows(s->kv, n, dim_qk, 1, 0, (int32_t)dim_qk, &kv_rope, s->positions, 1);
        dsa__mm_forward(&kv_a, x, c->kv);
        memset(c->d_kv, 0, sizeof(float) * (size_t)(n * dim_qk));
        (void)dsa_rms_norm_backward(c->kv, s->kv, n, dim_qk, f->dim_latent, s->kv_norm, f->norm_eps, c->d_kv, d->kv_a_norm);
        for (i = 0; i < n; i++)
            memcpy(c->d_kv + i * dim_qk + f->dim_latent, s->kv + i * dim_qk + f->dim_latent, sizeof(float) * (size_t)f->dim_rope);
        dsa__mm_backward(&kv_a, x, c->d_kv, a->d_x ? a->d_x + row * f->dim_hidden : NULL, d->kv_a);
    }
    if (c->wants_index) {
        dsa__mm k = dsa__mm_of(ctx, &w->index_k, n, f->dim_hidden, f->dim_index, c->mm);
        (void)dsa_rope_rows(s->key, n, f->dim_index, 1, 0, f->dim_index, &i_rope, s->positions, 1);
        dsa__mm_forward(&k, x, c->key);
        memset(c->d_key_in, 0, sizeof(float) * (size_t)(n * f->dim_index));
        (void)dsa_layer_norm_backward(c->key, s->key, n, f->dim_index, f->dim_index, s->k_norm, f->index_norm_eps, c->d_key_in,
                                      d->index_k_norm, d->index_k_bias);
        dsa__mm_backward(&k, x, c->d_key_in, NULL, d->index_k);
    }
}

/* Cuts the call into tiles, for the queries (pass 0) and the rows (pass 1). */
static dsa_status dsa__layer_back_pass(const dsa_ctx *ctx, dsa__layer_back *c, int pass)
{
    const dsa_layer_args *a = &c->args->layer;
    int64_t row, n, used = 0, i;
    int32_t seq = 0, n_seqs;
    dsa_status st = DSA_OK;
    for (row = 0; row < c->n_rows && st == DSA_OK; row += n) {
        for (n = 0, n_seqs = 0; n < DSA_LAYER_TILE && seq < a->n_seqs; ) {
            dsa_seq *s = &c->fwd.seqs[n_seqs];
            int64_t n_q = dsa__n_q(&a->seqs[seq]), take = dsa__min64(n_q - used, DSA_LAYER_TILE - n);
            if (take > 0) {
                int64_t first = a->seqs[seq].latent->len - n_q + used;
                *s = a->seqs[seq];
                s->n_q = (int32_t)take;
                s->len = first + take;
                c->tile_latents[n_seqs] = c->latent_rows[seq];
                c->tile_keys[n_seqs] = c->key_rows[seq];
                for (i = 0; i < take; i++) c->fwd.positions[n + i] = a->positions ? a->positions[row + n + i] : first + i;
                n_seqs++;
                n += take;
                used += take;
            }
            if (used >= n_q) { seq++; used = 0; }
        }
        if (pass == 0) st = dsa__layer_back_queries(ctx, c, row, n, n_seqs);
        else dsa__layer_back_rows(ctx, c, row, n, n_seqs);
    }
    return st;
}

DSA_API dsa_status dsa_layer_backward(const dsa_ctx *ctx, const dsa_layer_backward_args *a)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa__layer_back c;
    const dsa_config *f;
    int64_t at = 0;
    int32_t i;
    dsa_status st = dsa__layer_back_plan(ctx, a, &arena, &c);
    if (st != DSA_OK) return st;
    f = &ctx->config;
    if (c.n_rows == 0) return DSA_OK;
    if (!a->layer.x) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_layer_backward: x is NULL");
    if (a->layer.mode == DSA_LAYER_SPARSE && !a->layer.indices_in)
        return dsa__fail(ctx, DSA_ERR_NULL, "dsa_layer_backward: indices_in, the lists that the forward call used, is NULL");
    st = dsa__arena_check(ctx, &arena, a->layer.workspace, a->layer.workspace_size);
    if (st != DSA_OK) return st;
    arena = dsa__arena_over(a->layer.workspace);
    st = dsa__layer_back_plan(ctx, a, &arena, &c);
    DSA__CARVED(st, arena, a->layer.workspace_size);
    dsa__weight_row(&a->layer.weights->q_a_norm, 0, f->dim_q_lora, c.fwd.q_norm);
    dsa__weight_row(&a->layer.weights->kv_a_norm, 0, f->dim_latent, c.fwd.kv_norm);
    if (c.has_indexer) {
        dsa__weight_row(&a->layer.weights->index_k_norm, 0, f->dim_index, c.fwd.k_norm);
        dsa__weight_row(&a->layer.weights->index_k_bias, 0, f->dim_index, c.fwd.k_bias);
    }
    for (i = 0; i < a->layer.n_seqs; i++) {
        int64_t len = a->layer.seqs[i].latent->len;
        c.latent_rows[i] = c.d_latent + at * c.fwd.dim_qk;
        c.key_rows[i] = c.has_indexer ? c.d_key + at * f->dim_index : NULL;
        at += len;
    }
    memset(c.d_latent, 0, sizeof(float) * (size_t)(at * c.fwd.dim_qk));
    if (c.has_indexer) memset(c.d_key, 0, sizeof(float) * (size_t)(at * f->dim_index));
    st = dsa__layer_back_pass(ctx, &c, 0);
    if (st == DSA_OK) st = dsa__layer_back_pass(ctx, &c, 1);
    DSA_ASSERT(st == DSA_OK);
    return st;
}

/* ============================================================================================
   >>shards                                   8. one sequence on several machines
   ============================================================================================
   Only arithmetic. Why the rest is exact: a row outside its shard's best k is outside the best k of all, shards keep the order of
   the rows, so ties fall the same way, and partials merge (spec 5.3). */

static dsa_status dsa__shard_check(const dsa_shard *s, const void *a, const void *b)
{
    if (!s || !a || !b) return DSA_ERR_NULL;
    return s->shard < 0 || s->shard >= s->n_shards || s->block < 1 ? DSA_ERR_ARGUMENT : DSA_OK;
}

/* Of rows [0, len): whole rounds of n_shards blocks, and of the last, unfinished round what this shard got. */
static int64_t dsa__shard_len(const dsa_shard *s, int64_t len)
{
    int64_t round = (int64_t)s->n_shards * s->block;
    return len / round * s->block + dsa__clamp64(len % round - (int64_t)s->shard * s->block, 0, s->block);
}

DSA_API dsa_status dsa_shard_len(const dsa_shard *shard, int64_t len, int64_t *n_rows)
{
    dsa_status st = dsa__shard_check(shard, n_rows, n_rows);
    if (st != DSA_OK) return st;
    if (len < 0 || len > DSA__MAX_POS) return DSA_ERR_ARGUMENT;
    *n_rows = dsa__shard_len(shard, len);
    return DSA_OK;
}

DSA_API dsa_status dsa_shard_ranges(const dsa_shard *shard, int64_t len, int32_t n_q, int64_t *ks, int64_t *ke)
{
    int32_t i;
    dsa_status st = dsa__shard_check(shard, ks, ke);
    if (st != DSA_OK) return st;
    if (len < 0 || len > DSA__MAX_POS || n_q < 0) return DSA_ERR_ARGUMENT;
    for (i = 0; i < n_q; i++) {
        ks[i] = 0;
        ke[i] = dsa__shard_len(shard, dsa__max64(len - n_q + i + 1, 0));
    }
    return DSA_OK;
}

/* May lie beyond 2^31 - 1, not beyond 2^63: the first term is at most position * n_shards, the second shard * block. */
static int64_t dsa__shard_global(const dsa_shard *s, int32_t position)
{
    return (int64_t)(position / s->block) * s->n_shards * s->block + (int64_t)s->shard * s->block + position % s->block;
}

DSA_API dsa_status dsa_shard_to_global(const dsa_shard *shard, int64_t n, int32_t *indices)
{
    int64_t i;
    dsa_status st = dsa__shard_check(shard, indices, indices);
    if (st != DSA_OK) return st;
    if (n < 0) return DSA_ERR_SHAPE;
    for (i = 0; i < n; i++)
        if (indices[i] >= 0 && dsa__shard_global(shard, indices[i]) > DSA__MAX_POS) return DSA_ERR_OVERFLOW;
    for (i = 0; i < n; i++) indices[i] = indices[i] < 0 ? -1 : (int32_t)dsa__shard_global(shard, indices[i]);
    return DSA_OK;
}

DSA_API dsa_status dsa_shard_to_local(const dsa_shard *shard, int64_t n, const int32_t *indices, int32_t *local)
{
    int64_t i;
    dsa_status st = dsa__shard_check(shard, indices, local);
    if (st != DSA_OK) return st;
    if (n < 0) return DSA_ERR_SHAPE;
    for (i = 0; i < n; i++) {
        int32_t block = indices[i] < 0 ? -1 : indices[i] / shard->block;
        local[i] = block < 0 || block % shard->n_shards != shard->shard ? -1
                 : block / shard->n_shards * shard->block + indices[i] % shard->block;
    }
    return DSA_OK;
}

/* ============================================================================================
   >>pages                                    9. pages shared by sequences
   ============================================================================================
   Every page is free, held (refs > 0) or cached (refs == 0, in the index). The index is a tree: a page's tokens, and for a parent the
   page before it, so a path from the root spells a prefix, and pages with equal tokens behind different prefixes differ. Full pages
   are found by a hash of (parent, tokens) and then by comparing; the end of a prefix by walking the children of the last full page.

   A page in the index never changes the tokens and rows it has there. What makes that simple:
     - Whoever holds a page holds, as the page before it, the same page as everybody else who does. For a page gets to a second holder
       by fork or open only, which hand out whole prefixes.
     - So a page is held at most as often as its parent in the index, and what is cached is closed under children.
     - Cached pages enter the list children first. Its oldest page therefore has no child, and eviction needs no search.
   Two sequences that computed the same prefix at the same time each keep their own rows; only the first's are in the index. The other's
   continuation is hung in when it closes: rows never change under an open sequence. */

typedef struct dsa__page {
    int32_t refs;                /* sequences that hold it */
    int32_t n_tokens;            /* its tokens in the index, 0: it is not in there */
    int32_t parent, child, next, prev;    /* the tree, siblings in a list; -1: none */
    int32_t chain;               /* the next full page of the same bucket */
    int32_t older, newer;        /* the list of cached pages; free ones are chained by newer */
    int32_t seen;                /* for dsa_pages_check */
} dsa__page;

typedef struct dsa__pages_seq {
    int32_t open;                /* 1, or 0 and then n_blocks is the next closed one */
    int32_t n_blocks;            /* pages it holds: of its len rows and of the reserved ones */
    int32_t n_published;         /* leading pages, full ones, that are in the index themselves (not just their tokens) */
    int64_t len, reserved, n_known;       /* n_known <= len <= reserved: rows with known tokens, rows, rows it may write up to */
} dsa__pages_seq;

struct dsa_pages {
    int32_t n_planes, n_pages, page_size, max_seqs, max_blocks, n_buckets;    /* n_buckets: a power of two */
    int32_t root, free_page, free_seq, oldest, newest, n_free, n_cached, n_seqs;      /* root: the first page of the first block */
    size_t latent_bytes, index_bytes;     /* of one page */
    dsa_cache *planes;
    dsa__page *page;             /* [n_pages] */
    int32_t *tokens;             /* [n_pages, page_size] */
    int32_t *bucket;             /* [n_buckets] */
    dsa__pages_seq *seqs;        /* [max_seqs] */
    int32_t *tables;             /* [max_seqs, max_blocks], -1 behind n_blocks */
    dsa_allocator allocator;
    void *owned;
};

/* Checks the desc, fills *p and carves its arrays, after itself, from the arena. */
static dsa_status dsa__pages_plan(const dsa_ctx *ctx, const dsa_pages_desc *d, dsa__arena *arena, dsa_pages *p, dsa_pages **home)
{
    int64_t rows, blocks;
    int32_t i;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    memset(p, 0, sizeof *p);
    if (!d) return dsa__fail(ctx, DSA_ERR_NULL, "pages: desc is NULL");
    if (d->n_planes < 1 || d->max_seqs < 1) return dsa__fail(ctx, DSA_ERR_SHAPE, "pages: n_planes and max_seqs must be at least 1");
    if (!d->planes) return dsa__fail(ctx, DSA_ERR_NULL, "pages: planes is NULL");
    for (i = 0; i < d->n_planes; i++) {
        const dsa_cache *c = &d->planes[i];
        size_t bytes, *sum = c->kind == DSA_INDEX_KEY ? &p->index_bytes : &p->latent_bytes;
        if (c->kind != DSA_LATENT && c->kind != DSA_INDEX_KEY && c->kind != DSA_VALUE)
            return dsa__fail(ctx, DSA_ERR_FORMAT, "pages: a plane of unknown kind");
        st = dsa__cache_check(ctx, c, c->kind, 0);
        if (st != DSA_OK) return st;
        if (dsa__on_device(c)) return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "pages: copies of rows on a device are not built");
        if (c->block_table) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "pages: a plane has a block table; the books hold those");
        if (c->n_pages < 1 || c->page_size != d->planes[0].page_size || c->n_pages != d->planes[0].n_pages)
            return dsa__fail(ctx, DSA_ERR_SHAPE, "pages: planes differ in page_size or n_pages, or have none");
        if (c->n_pages > 1) bytes = c->page_stride;
        else st = dsa_page_bytes(c->kind, c->format, c->dim, c->dim_rope, c->page_size, &bytes);
        if (st != DSA_OK) return st;
        if (c->scales && c->n_pages > 1) bytes += c->scale_page_stride;
        if (bytes > (size_t)-1 / 2 / (size_t)d->n_planes / (size_t)c->n_pages)
            return dsa__fail(ctx, DSA_ERR_OVERFLOW, "pages: the planes do not fit in size_t");
        *sum += bytes;
    }
    p->n_planes = d->n_planes;
    p->n_pages = (int32_t)d->planes[0].n_pages;
    p->page_size = d->planes[0].page_size;
    p->max_seqs = d->max_seqs;
    rows = dsa__min64((int64_t)p->n_pages * p->page_size, DSA__MAX_POS);
    if (d->max_len < 0 || d->max_len > DSA__MAX_POS) return dsa__fail(ctx, DSA_ERR_SHAPE, "pages: max_len lies outside [0, 2^31 - 1]");
    if (d->max_len > 0) rows = dsa__min64(rows, d->max_len);
    blocks = (rows + p->page_size - 1) / p->page_size;
    p->max_blocks = (int32_t)blocks;
    for (p->n_buckets = 1; p->n_buckets < p->n_pages && p->n_buckets < 1 << 30; ) p->n_buckets *= 2;
    *home      = (dsa_pages *)dsa__take(arena, 1, 1, sizeof *p);
    p->planes  = (dsa_cache *)dsa__take(arena, p->n_planes, 1, sizeof *p->planes);
    p->page    = (dsa__page *)dsa__take(arena, p->n_pages, 1, sizeof *p->page);
    p->tokens  = (int32_t *)dsa__take(arena, p->n_pages, p->page_size, sizeof *p->tokens);
    p->bucket  = (int32_t *)dsa__take(arena, p->n_buckets, 1, sizeof *p->bucket);
    p->seqs    = (dsa__pages_seq *)dsa__take(arena, p->max_seqs, 1, sizeof *p->seqs);
    p->tables  = (int32_t *)dsa__take(arena, p->max_seqs, p->max_blocks, sizeof *p->tables);
    return arena->overflow ? dsa__fail(ctx, DSA_ERR_OVERFLOW, "pages: the books do not fit in size_t") : DSA_OK;
}

DSA_API dsa_status dsa_pages_bytes(const dsa_ctx *ctx, const dsa_pages_desc *desc, size_t *bytes)
{
    dsa__arena arena = dsa__arena_over(NULL);
    dsa_pages p, *home;
    dsa_status st = dsa__pages_plan(ctx, desc, &arena, &p, &home);
    if (st != DSA_OK) return st;
    if (!bytes) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_pages_bytes: bytes is NULL");
    *bytes = dsa__arena_bytes(&arena);
    return DSA_OK;
}

DSA_API dsa_status dsa_pages_init(const dsa_ctx *ctx, const dsa_pages_desc *desc, void *memory, size_t bytes, dsa_pages **pages)
{
    dsa__arena arena;
    dsa_pages p, *home;
    size_t need = 0;
    int64_t i;
    dsa_status st = dsa_pages_bytes(ctx, desc, &need);
    if (st != DSA_OK) return st;
    if (!memory || !pages) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_pages_init: memory or pages is NULL");
    if (bytes < need) return dsa__fail(ctx, DSA_ERR_CAPACITY, "dsa_pages_init: memory is smaller than dsa_pages_bytes says");
    arena = dsa__arena_over(memory);
    st = dsa__pages_plan(ctx, desc, &arena, &p, &home);
    DSA__CARVED(st, arena, bytes);
    if (st != DSA_OK) return st;
    memcpy(p.planes, desc->planes, (size_t)p.n_planes * sizeof *p.planes);
    memset(p.page, 0, (size_t)p.n_pages * sizeof *p.page);
    memset(p.tokens, 0, (size_t)p.n_pages * (size_t)p.page_size * sizeof *p.tokens);
    for (i = 0; i < p.n_pages; i++) p.page[i].newer = i + 1 < p.n_pages ? (int32_t)i + 1 : -1;
    for (i = 0; i < p.n_buckets; i++) p.bucket[i] = -1;
    for (i = 0; i < (int64_t)p.max_seqs * p.max_blocks; i++) p.tables[i] = -1;
    memset(p.seqs, 0, (size_t)p.max_seqs * sizeof *p.seqs);
    for (i = 0; i < p.max_seqs; i++) p.seqs[i].n_blocks = i + 1 < p.max_seqs ? (int32_t)i + 1 : -1;
    p.root = p.oldest = p.newest = -1;
    p.n_free = p.n_pages;
    *home = p;
    *pages = home;
    return DSA_OK;
}

DSA_API dsa_status dsa_pages_create(const dsa_ctx *ctx, const dsa_pages_desc *desc, dsa_pages **pages)
{
    size_t need = 0;
    void *memory;
    dsa_allocator a;
    dsa_status st = dsa_pages_bytes(ctx, desc, &need);
    if (st != DSA_OK) return st;
    if (!pages) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_pages_create: pages is NULL");
    a = dsa__allocator(&ctx->config.allocator);
    if (!a.alloc) return dsa__fail(ctx, DSA_ERR_UNSUPPORTED, "dsa_pages_create: DSA_NO_MALLOC needs config.allocator");
    memory = a.alloc(a.user, need);
    if (!memory) return dsa__fail(ctx, DSA_ERR_MEMORY, "dsa_pages_create: the allocator returned NULL");
    st = dsa_pages_init(ctx, desc, memory, need, pages);
    if (st != DSA_OK) { a.release(a.user, memory); return st; }
    (*pages)->allocator = a;
    (*pages)->owned = memory;
    return DSA_OK;
}

DSA_API void dsa_pages_destroy(dsa_pages *pages)
{
    if (pages && pages->owned) pages->allocator.release(pages->allocator.user, pages->owned);
}

/* ---- the index, and the list of cached pages ------------------------------------------------- */

static int32_t *dsa__page_tokens(const dsa_pages *p, int32_t page) { return p->tokens + (size_t)page * (size_t)p->page_size; }

/* Only where to look: a page is found by its parent and all of its tokens. */
static int32_t *dsa__bucket_of(const dsa_pages *p, int32_t parent, const int32_t *tokens)
{
    uint64_t h = (uint64_t)(int64_t)parent;
    int32_t i;
    for (i = 0; i < p->page_size; i++) {
        h = (h ^ (uint32_t)tokens[i]) * UINT64_C(0x9E3779B97F4A7C15);
        h ^= h >> 32;
    }
    return &p->bucket[h & (uint64_t)(p->n_buckets - 1)];
}

/* The full page of these tokens behind parent, or -1. */
static int32_t dsa__page_find(const dsa_pages *p, int32_t parent, const int32_t *tokens)
{
    int32_t x = *dsa__bucket_of(p, parent, tokens);
    while (x >= 0 && (p->page[x].parent != parent || memcmp(dsa__page_tokens(p, x), tokens, 4 * (size_t)p->page_size) != 0))
        x = p->page[x].chain;
    return x;
}

/* The child of parent that shares most of the n tokens, and how many; -1 if none shares any. */
static int32_t dsa__page_nearest(const dsa_pages *p, int32_t parent, const int32_t *tokens, int64_t n, int32_t *n_same)
{
    int32_t x, best = -1;
    *n_same = 0;
    for (x = parent < 0 ? p->root : p->page[parent].child; x >= 0; x = p->page[x].next) {
        const int32_t *own = dsa__page_tokens(p, x);
        int32_t i = 0, most = (int32_t)dsa__min64(n, p->page[x].n_tokens);
        while (i < most && own[i] == tokens[i]) i++;
        if (i > *n_same) { *n_same = i; best = x; }
    }
    return best;
}

static void dsa__page_hash(dsa_pages *p, int32_t x)
{
    int32_t *bucket = dsa__bucket_of(p, p->page[x].parent, dsa__page_tokens(p, x));
    p->page[x].chain = *bucket;
    *bucket = x;
}

/* Puts page x into the index with its first n_tokens tokens, or more of them if it is in there. */
static void dsa__page_publish(dsa_pages *p, int32_t x, int32_t parent, int32_t n_tokens)
{
    dsa__page *page = &p->page[x];
    int32_t *first = parent < 0 ? &p->root : &p->page[parent].child;
    DSA_ASSERT(page->n_tokens == 0 || (page->parent == parent && page->n_tokens < n_tokens));
    if (page->n_tokens == 0) {
        page->parent = parent;
        page->child = page->prev = -1;
        page->next = *first;
        if (*first >= 0) p->page[*first].prev = x;
        *first = x;
    }
    page->n_tokens = n_tokens;
    if (n_tokens == p->page_size) dsa__page_hash(p, x);
}

static void dsa__page_unpublish(dsa_pages *p, int32_t x)
{
    dsa__page *page = &p->page[x];
    DSA_ASSERT(page->n_tokens > 0 && page->child < 0);
    if (page->n_tokens == p->page_size) {
        int32_t *link = dsa__bucket_of(p, page->parent, dsa__page_tokens(p, x));
        while (*link != x) link = &p->page[*link].chain;
        *link = page->chain;
    }
    if (page->next >= 0) p->page[page->next].prev = page->prev;
    if (page->prev >= 0) p->page[page->prev].next = page->next;
    else if (page->parent >= 0) p->page[page->parent].child = page->next;
    else p->root = page->next;
    page->n_tokens = 0;
}

static void dsa__page_uncache(dsa_pages *p, int32_t x)
{
    dsa__page *page = &p->page[x];
    if (page->older >= 0) p->page[page->older].newer = page->newer; else p->oldest = page->newer;
    if (page->newer >= 0) p->page[page->newer].older = page->older; else p->newest = page->older;
    p->n_cached--;
}

static void dsa__page_cache(dsa_pages *p, int32_t x)     /* as the most recently used */
{
    dsa__page *page = &p->page[x];
    page->older = p->newest;
    page->newer = -1;
    if (p->newest >= 0) p->page[p->newest].newer = x; else p->oldest = x;
    p->newest = x;
    p->n_cached++;
}

static void dsa__page_free(dsa_pages *p, int32_t x)
{
    p->page[x].newer = p->free_page;
    p->free_page = x;
    p->n_free++;
}

static void dsa__page_evict(dsa_pages *p)
{
    int32_t x = p->oldest;
    dsa__page_uncache(p, x);
    dsa__page_unpublish(p, x);
    dsa__page_free(p, x);
}

static void dsa__page_hold(dsa_pages *p, int32_t x)
{
    if (p->page[x].refs++ == 0) dsa__page_uncache(p, x);
}

static void dsa__page_release(dsa_pages *p, int32_t x)
{
    DSA_ASSERT(p->page[x].refs > 0);
    if (--p->page[x].refs > 0) return;
    if (p->page[x].n_tokens > 0) dsa__page_cache(p, x); else dsa__page_free(p, x);
}

/* A page for one holder. There is one. */
static int32_t dsa__page_take(dsa_pages *p)
{
    int32_t x;
    if (p->n_free == 0) dsa__page_evict(p);
    x = p->free_page;
    p->free_page = p->page[x].newer;
    p->n_free--;
    p->page[x].refs = 1;
    return x;
}

/* ---- sequences ----------------------------------------------------------------------------- */

static int32_t *dsa__pages_table(const dsa_pages *p, int32_t seq) { return p->tables + (size_t)seq * (size_t)p->max_blocks; }

static dsa_status dsa__pages_seq_check(const dsa_ctx *ctx, const dsa_pages *p, int32_t seq)
{
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!p) return dsa__fail(ctx, DSA_ERR_NULL, "pages is NULL");
    if (seq < 0 || seq >= p->max_seqs || !p->seqs[seq].open) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "pages: no such sequence is open");
    return DSA_OK;
}

static int32_t dsa__pages_new(dsa_pages *p)
{
    int32_t seq = p->free_seq;
    p->free_seq = p->seqs[seq].n_blocks;
    memset(&p->seqs[seq], 0, sizeof p->seqs[seq]);
    p->seqs[seq].open = 1;
    p->n_seqs++;
    return seq;
}

static void dsa__pages_set_len(dsa__pages_seq *s, int64_t len, int32_t page_size)
{
    s->len = s->reserved = len;
    s->n_known = dsa__min64(s->n_known, len);
    s->n_published = (int32_t)dsa__min64(s->n_published, len / page_size);
}

/* Gives back the pages from block n on, last one first: see above. */
static void dsa__pages_drop(dsa_pages *p, int32_t seq, int32_t n)
{
    int32_t *table = dsa__pages_table(p, seq);
    dsa__pages_seq *s = &p->seqs[seq];
    while (s->n_blocks > n) {
        dsa__page_release(p, table[--s->n_blocks]);
        table[s->n_blocks] = -1;
    }
}

DSA_API dsa_status dsa_pages_open(const dsa_ctx *ctx, dsa_pages *p, const int32_t *tokens, int64_t n_tokens,
                                  int32_t *seq, int64_t *n_cached)
{
    int64_t at = 0;
    int32_t x = -1, next, n = 0, n_same, i, *table;
    dsa__pages_seq *s;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!p || !seq) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_pages_open: pages or seq is NULL");
    if (n_tokens < 0) return dsa__fail(ctx, DSA_ERR_SHAPE, "dsa_pages_open: n_tokens is negative");
    if (n_tokens > 0 && !tokens) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_pages_open: tokens is NULL");
    if (p->free_seq < 0) return dsa__fail(ctx, DSA_ERR_CAPACITY, "dsa_pages_open: max_seqs sequences are open");
    *seq = dsa__pages_new(p);
    s = &p->seqs[*seq];
    table = dsa__pages_table(p, *seq);
    while (n < p->max_blocks && n_tokens - at >= p->page_size && (next = dsa__page_find(p, x, tokens + at)) >= 0) {
        table[n++] = x = next;
        at += p->page_size;
    }
    s->n_published = n;
    if (n < p->max_blocks && at < n_tokens) {
        next = dsa__page_nearest(p, x, tokens + at, n_tokens - at, &n_same);
        if (next >= 0) table[n++] = next;
        at += n_same;
    }
    for (i = 0; i < n; i++) dsa__page_hold(p, table[i]);
    s->n_blocks = n;
    s->len = s->reserved = s->n_known = at;
    if (n_cached) *n_cached = at;
    return DSA_OK;
}

DSA_API dsa_status dsa_pages_fork(const dsa_ctx *ctx, dsa_pages *p, int32_t seq, int64_t n_rows, int32_t *forked)
{
    int32_t i, to, *table;
    dsa_status st = dsa__pages_seq_check(ctx, p, seq);
    if (st != DSA_OK) return st;
    if (!forked) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_pages_fork: forked is NULL");
    if (n_rows < 0 || n_rows > p->seqs[seq].len) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_pages_fork: n_rows lies outside [0, len]");
    if (p->free_seq < 0) return dsa__fail(ctx, DSA_ERR_CAPACITY, "dsa_pages_fork: max_seqs sequences are open");
    to = dsa__pages_new(p);
    p->seqs[to] = p->seqs[seq];
    p->seqs[to].n_blocks = (int32_t)((n_rows + p->page_size - 1) / p->page_size);
    dsa__pages_set_len(&p->seqs[to], n_rows, p->page_size);
    table = dsa__pages_table(p, to);
    for (i = 0; i < p->seqs[to].n_blocks; i++) {
        table[i] = dsa__pages_table(p, seq)[i];
        dsa__page_hold(p, table[i]);
    }
    *forked = to;
    return DSA_OK;
}

/* The first n rows of a page, in every plane, and their tokens. */
static void dsa__page_copy(dsa_pages *p, int32_t from, int32_t to, int32_t n)
{
    int32_t i, t;
    for (i = 0; i < p->n_planes; i++) {
        const dsa_cache *c = &p->planes[i];
        size_t row = 0;
        if (dsa__planar(c->kind, c->format)) {
            memcpy(dsa__row_in(c, to, 0), dsa__row_in(c, from, 0), (size_t)n * (size_t)c->dim);
            memcpy(dsa__scale_in(c, to, 0), dsa__scale_in(c, from, 0), (size_t)n * 4);
            continue;
        }
        (void)dsa_row_bytes(c->kind, c->format, c->dim, c->dim_rope, &row);
        for (t = 0; t < n; t++) memcpy(dsa__row_in(c, to, t), dsa__row_in(c, from, t), row);
    }
    memcpy(dsa__page_tokens(p, to), dsa__page_tokens(p, from), 4 * (size_t)n);
}

/* A last page that is not full may be written on where it is if nobody else holds it and the index has no row of it that would be
   written over. Else it is copied, or, if no page is left and only the index stands in the way, taken out of the index. */
DSA_API dsa_status dsa_pages_reserve(const dsa_ctx *ctx, dsa_pages *p, int32_t seq, int64_t n_rows)
{
    dsa__pages_seq *s;
    int64_t n_new;
    int32_t *table, tail, used, copy = 0, x;
    dsa_status st = dsa__pages_seq_check(ctx, p, seq);
    if (st != DSA_OK) return st;
    s = &p->seqs[seq];
    table = dsa__pages_table(p, seq);
    if (n_rows < 0) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_pages_reserve: n_rows is negative");
    if (n_rows > DSA__MAX_POS - s->len || s->len + n_rows > (int64_t)p->max_blocks * p->page_size)
        return dsa__fail(ctx, DSA_ERR_CAPACITY, "dsa_pages_reserve: the sequence would be longer than max_len");
    if (n_rows == 0) return DSA_OK;
    tail = (int32_t)(s->len / p->page_size);
    used = (int32_t)(s->len % p->page_size);
    if (used > 0) copy = p->page[table[tail]].refs > 1 || p->page[table[tail]].n_tokens > used;
    n_new = dsa__max64((s->len + n_rows + p->page_size - 1) / p->page_size - s->n_blocks, 0);
    if (n_new + (copy && p->page[table[tail]].refs > 1) > (int64_t)p->n_free + p->n_cached)
        return dsa__fail(ctx, DSA_ERR_CAPACITY, "dsa_pages_reserve: out of pages");
    while (n_new-- > 0) table[s->n_blocks++] = dsa__page_take(p);
    if (copy && p->n_free + p->n_cached > 0) {
        x = dsa__page_take(p);
        dsa__page_copy(p, table[tail], x, used);
        dsa__page_release(p, table[tail]);
        table[tail] = x;
    } else if (copy) {
        dsa__page_unpublish(p, table[tail]);
    }
    s->reserved = dsa__max64(s->reserved, s->len + n_rows);
    return DSA_OK;
}

DSA_API dsa_status dsa_pages_commit(const dsa_ctx *ctx, dsa_pages *p, int32_t seq, const int32_t *tokens, int64_t n_rows)
{
    dsa__pages_seq *s;
    int64_t i;
    int32_t *table, b;
    dsa_status st = dsa__pages_seq_check(ctx, p, seq);
    if (st != DSA_OK) return st;
    s = &p->seqs[seq];
    table = dsa__pages_table(p, seq);
    if (n_rows < 0 || n_rows > s->reserved - s->len)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_pages_commit: more rows than are reserved, or a negative number");
    if (tokens && s->n_known == s->len) {
        for (i = 0; i < n_rows; i++)
            dsa__page_tokens(p, table[(s->len + i) / p->page_size])[(s->len + i) % p->page_size] = tokens[i];
        s->n_known += n_rows;
    }
    s->len += n_rows;
    for (b = s->n_published; ((int64_t)b + 1) * p->page_size <= s->n_known; b++) {
        int32_t parent = b > 0 ? table[b - 1] : -1;
        if (p->page[table[b]].n_tokens < p->page_size) {
            if (dsa__page_find(p, parent, dsa__page_tokens(p, table[b])) >= 0) break;        /* somebody else's rows were first */
            dsa__page_publish(p, table[b], parent, p->page_size);
        }
        s->n_published = b + 1;
    }
    return DSA_OK;
}

DSA_API dsa_status dsa_pages_truncate(const dsa_ctx *ctx, dsa_pages *p, int32_t seq, int64_t n_rows)
{
    dsa_status st = dsa__pages_seq_check(ctx, p, seq);
    if (st != DSA_OK) return st;
    if (n_rows < 0 || n_rows > p->seqs[seq].len)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_pages_truncate: n_rows lies outside [0, len]");
    dsa__pages_drop(p, seq, (int32_t)((n_rows + p->page_size - 1) / p->page_size));
    dsa__pages_set_len(&p->seqs[seq], n_rows, p->page_size);
    return DSA_OK;
}

/* Follows the sequence's tokens through the index and hangs in what is missing there. Returns the last page of that path. Behind
   somebody else's page only what nobody else holds can be hung in: other holders do not hold that page. */
static int32_t dsa__pages_merge(dsa_pages *p, int32_t seq)
{
    const dsa__pages_seq *s = &p->seqs[seq];
    const int32_t *table = dsa__pages_table(p, seq);
    int64_t at;
    int32_t at_page = -1, b = 0, n_same;
    for (at = 0; at < s->n_known; at += p->page_size, b++) {
        int32_t x = table[b], n = (int32_t)dsa__min64(p->page_size, s->n_known - at), there = -1;
        const int32_t *tokens = dsa__page_tokens(p, x);
        if (n == p->page_size) {
            there = dsa__page_find(p, at_page, tokens);
        } else {
            there = dsa__page_nearest(p, at_page, tokens, n, &n_same);
            if (n_same < n) there = -1;
        }
        if (there < 0) {
            if (p->page[x].refs > 1 && at_page != (b > 0 ? table[b - 1] : -1)) break;
            dsa__page_publish(p, x, at_page, n);
            there = x;
        }
        at_page = there;
    }
    return at_page;
}

DSA_API dsa_status dsa_pages_close(const dsa_ctx *ctx, dsa_pages *p, int32_t seq)
{
    int32_t x;
    dsa_status st = dsa__pages_seq_check(ctx, p, seq);
    if (st != DSA_OK) return st;
    x = dsa__pages_merge(p, seq);
    dsa__pages_drop(p, seq, 0);
    for (; x >= 0; x = p->page[x].parent) {              /* the whole path was used now, children before parents */
        if (p->page[x].refs > 0) continue;
        dsa__page_uncache(p, x);
        dsa__page_cache(p, x);
    }
    p->seqs[seq].open = 0;
    p->seqs[seq].n_blocks = p->free_seq;
    p->free_seq = seq;
    p->n_seqs--;
    return DSA_OK;
}

DSA_API dsa_status dsa_pages_evict(const dsa_ctx *ctx, dsa_pages *p, int32_t n_pages)
{
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!p) return dsa__fail(ctx, DSA_ERR_NULL, "pages is NULL");
    if (n_pages < 0) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_pages_evict: n_pages is negative");
    for (; n_pages > 0 && p->n_cached > 0; n_pages--) dsa__page_evict(p);
    return DSA_OK;
}

DSA_API dsa_status dsa_pages_view(const dsa_ctx *ctx, const dsa_pages *p, int32_t seq, int32_t plane, dsa_cache *cache)
{
    dsa_status st = dsa__pages_seq_check(ctx, p, seq);
    if (st != DSA_OK) return st;
    if (!cache) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_pages_view: cache is NULL");
    if (plane < 0 || plane >= p->n_planes) return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_pages_view: no such plane");
    *cache = p->planes[plane];
    cache->block_table = dsa__pages_table(p, seq);
    cache->n_blocks = p->seqs[seq].n_blocks;
    cache->len = p->seqs[seq].len;
    cache->owned = NULL;
    return DSA_OK;
}

DSA_API dsa_status dsa_pages_known(const dsa_ctx *ctx, const dsa_pages *p, int32_t seq, int64_t *n_tokens)
{
    dsa_status st = dsa__pages_seq_check(ctx, p, seq);
    if (st != DSA_OK) return st;
    if (!n_tokens) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_pages_known: n_tokens is NULL");
    *n_tokens = p->seqs[seq].n_known;
    return DSA_OK;
}

DSA_API dsa_status dsa_pages_tokens(const dsa_ctx *ctx, const dsa_pages *p, int32_t seq, int64_t begin, int64_t end, int32_t *tokens)
{
    dsa_status st = dsa__pages_seq_check(ctx, p, seq);
    int64_t i;
    if (st != DSA_OK) return st;
    if (begin < 0 || begin > end || end > p->seqs[seq].n_known)
        return dsa__fail(ctx, DSA_ERR_ARGUMENT, "dsa_pages_tokens: not 0 <= begin <= end <= the known ones");
    if (begin < end && !tokens) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_pages_tokens: tokens is NULL");
    for (i = begin; i < end; i++)
        tokens[i - begin] = dsa__page_tokens(p, dsa__pages_table(p, seq)[i / p->page_size])[i % p->page_size];
    return DSA_OK;
}

DSA_API dsa_status dsa_pages_get_usage(const dsa_ctx *ctx, const dsa_pages *p, int32_t seq, dsa_pages_usage *usage)
{
    dsa_pages_usage u;
    int32_t i;
    dsa_status st = seq == DSA_NONE ? dsa__ctx_check(ctx) : dsa__pages_seq_check(ctx, p, seq);
    if (st != DSA_OK) return st;
    if (!p || !usage) return dsa__fail(ctx, DSA_ERR_NULL, "dsa_pages_get_usage: pages or usage is NULL");
    memset(&u, 0, sizeof u);
    if (seq == DSA_NONE) {
        u.n_cached = p->n_cached;
        u.n_free = p->n_free;
        u.n_seqs = p->n_seqs;
        u.n_pages = p->n_pages - p->n_free - p->n_cached;
        for (i = 0; i < p->n_pages; i++) u.n_own += p->page[i].refs == 1;
        for (i = 0; i < p->max_seqs; i++) if (p->seqs[i].open) u.n_rows += p->seqs[i].len;
    } else {
        u.n_rows = p->seqs[seq].len;
        u.n_pages = p->seqs[seq].n_blocks;
        for (i = 0; i < u.n_pages; i++) u.n_own += p->page[dsa__pages_table(p, seq)[i]].refs == 1;
    }
    u.latent_bytes = p->latent_bytes * (size_t)u.n_pages;
    u.index_bytes = p->index_bytes * (size_t)u.n_pages;
    u.own_latent_bytes = p->latent_bytes * (size_t)u.n_own;
    u.own_index_bytes = p->index_bytes * (size_t)u.n_own;
    *usage = u;
    return DSA_OK;
}

/* ---- the checker --------------------------------------------------------------------------- */

static const char *dsa__pages_check_seq(const dsa_pages *p, int32_t seq)
{
    const dsa__pages_seq *s = &p->seqs[seq];
    const int32_t *table = dsa__pages_table(p, seq);
    int32_t b;
    if (s->n_known < 0 || s->n_known > s->len || s->len > s->reserved || s->n_blocks > p->max_blocks ||
        s->reserved > (int64_t)s->n_blocks * p->page_size || (int64_t)s->n_published * p->page_size > s->n_known)
        return "pages: a sequence's lengths do not fit together";
    for (b = 0; b < p->max_blocks; b++) {
        if (b >= s->n_blocks ? table[b] != -1 : table[b] < 0 || table[b] >= p->n_pages) return "pages: a block table is wrong";
        if (b < s->n_blocks) p->page[table[b]].seen++;
        if (b < s->n_published && (p->page[table[b]].n_tokens != p->page_size || p->page[table[b]].parent != (b > 0 ? table[b - 1] : -1)))
            return "pages: a published page is not in the index";
    }
    return NULL;
}

static const char *dsa__pages_check_tree(const dsa_pages *p, int32_t x)
{
    const dsa__page *page = &p->page[x], *parent = page->parent < 0 ? NULL : &p->page[page->parent];
    int32_t first = parent ? parent->child : p->root;
    if (page->n_tokens > p->page_size) return "pages: too many tokens in a page of the index";
    if (parent && parent->n_tokens != p->page_size) return "pages: a page of the index lies behind one that is not full, or not in it";
    if (parent && parent->refs < page->refs) return "pages: a page is held more often than the one before it";
    if (page->prev < 0 ? first != x : p->page[page->prev].next != x || p->page[page->prev].parent != page->parent)
        return "pages: a list of siblings is broken";
    if (page->next >= 0 && p->page[page->next].prev != x) return "pages: a list of siblings is broken";
    if (page->n_tokens == p->page_size && dsa__page_find(p, page->parent, dsa__page_tokens(p, x)) != x)
        return "pages: a full page is not found by its tokens, or another one is";
    if (page->n_tokens < p->page_size && page->child >= 0) return "pages: a page that is not full has a page behind it";
    return NULL;
}

DSA_API dsa_status dsa_pages_check(const dsa_ctx *ctx, dsa_pages *p)
{
    const char *why = NULL;
    int32_t i, x, n, held = 0, hashed = 0;
    dsa_status st = dsa__ctx_check(ctx);
    if (st != DSA_OK) return st;
    if (!p) return dsa__fail(ctx, DSA_ERR_NULL, "pages is NULL");
    for (i = 0; i < p->n_pages; i++) p->page[i].seen = 0;
    for (i = n = 0; i < p->max_seqs && !why; i++)
        if (p->seqs[i].open) { why = dsa__pages_check_seq(p, i); n++; }
    if (!why && n != p->n_seqs) why = "pages: the number of open sequences is wrong";
    for (x = p->free_seq; x >= 0 && !why; x = p->seqs[x].n_blocks, n++)
        if (n >= p->max_seqs || p->seqs[x].open) why = "pages: the list of closed sequences is broken";
    if (!why && n != p->max_seqs) why = "pages: a closed sequence is lost";
    for (i = 0; i < p->n_pages && !why; i++) {
        if (p->page[i].seen != p->page[i].refs) why = "pages: a page is not held as often as it says";
        else if (p->page[i].n_tokens > 0) why = dsa__pages_check_tree(p, i);
        held += p->page[i].refs > 0;
        hashed += p->page[i].n_tokens == p->page_size;
    }
    for (i = 0; i < p->n_pages; i++) p->page[i].seen = 0;
    for (x = p->free_page, n = 0; x >= 0 && !why; x = p->page[x].newer, n++)
        if (n >= p->n_free || p->page[x].refs != 0 || p->page[x].n_tokens != 0 || p->page[x].seen++)
            why = "pages: the list of free pages is broken";
    if (!why && n != p->n_free) why = "pages: a free page is lost";
    for (x = p->oldest, n = 0; x >= 0 && !why; x = p->page[x].newer, n++) {
        const dsa__page *page = &p->page[x];
        if (n >= p->n_cached || page->refs != 0 || page->n_tokens == 0 || (page->newer < 0 ? p->newest : p->page[page->newer].older) != x)
            why = "pages: the list of cached pages is broken";
        else if (page->parent >= 0 && p->page[page->parent].seen) why = "pages: a page would be evicted before those behind it";
        p->page[x].seen = 1;
    }
    if (!why && (n != p->n_cached || held + p->n_free + p->n_cached != p->n_pages)) why = "pages: a page is lost";
    for (i = n = 0; i < p->n_buckets && !why; i++)
        for (x = p->bucket[i]; x >= 0 && n <= hashed; x = p->page[x].chain) n++;
    if (!why && n != hashed) why = "pages: a list of the hash table is broken";
    return why ? dsa__fail(ctx, DSA_ERR_DATA, why) : DSA_OK;
}

/* ============================================================================================
   >>end                                      of the implementation
   ============================================================================================ */
#if defined(__clang__)
#  pragma STDC FP_CONTRACT DEFAULT
#elif defined(__GNUC__)
#  pragma GCC pop_options
#endif
#endif /* DSA_IMPLEMENTATION */

/* ============================================================================================
   >>revisions                                what changed, and the licence
   ============================================================================================
   0.1.0  First version. Append, score, select, attend, step, layer and their backward passes on the CPU; f32, bf16, FP8 and int8
          caches. The parameters of other models, entries of several tokens. Shards. Pages shared by sequences. CUDA in dsa_cuda.cu.
*/

/*
dsa.h is available under either of two licences; choose the one you prefer.

------------------------------------------------------------------------------
ALTERNATIVE A - MIT License

Copyright (c) 2026 the dsa.h authors

Permission is hereby granted, free of charge, to any person obtaining a copy of
this software and associated documentation files (the "Software"), to deal in
the Software without restriction, including without limitation the rights to
use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
of the Software, and to permit persons to whom the Software is furnished to do
so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.

------------------------------------------------------------------------------
ALTERNATIVE B - Public Domain (www.unlicense.org)

This is free and unencumbered software released into the public domain.

Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
software, either in source code form or as a compiled binary, for any purpose,
commercial or non-commercial, and by any means.

In jurisdictions that recognize copyright laws, the author or authors of this
software dedicate any and all copyright interest in the software to the public
domain. We make this dedication for the benefit of the public at large and to
the detriment of our heirs and successors. We intend this dedication to be an
overt act of relinquishment in perpetuity of all present and future rights to
this software under copyright law.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/

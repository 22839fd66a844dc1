"""dsa_peers - the Python calls of FlashMLA and DeepGEMM, computed by dsa.h on the CPU.

    make shared                                          # build/libdsa.so
    PYTHONPATH=tools/python python3
    >>> import numpy, dsa_peers
    >>> out, max_logits, lse = dsa_peers.flash_mla_sparse_fwd(q, kv, indices, sm_scale)

The four functions have the signatures, shapes and results of their namesakes (FlashMLA 9241ae3, DeepGEMM 54e2261). Arguments are NumPy
arrays or Torch CPU tensors, and results are of the same kind. Caches, block tables and index lists are used where they lie, whatever
their row and page strides, so long as their last dimension is contiguous; queries and weights are converted to f32, which is what dsa.h
takes. NumPy has no bf16 and no FP8 of its own: ml_dtypes' types are understood, and uint8 counts as float8_e4m3fn.

Where the namesakes leave memory undefined, -inf is written here. Not there: MODEL1 (DeepSeek-V4) caches, FP4, tensors on a GPU: each is
refused with an exception. Needs numpy; torch only if you pass tensors."""

import ctypes
import os
import threading

import numpy as np

_HERE = os.path.dirname(os.path.abspath(__file__))
F32, BF16, F16, FP8, INT8 = range(5)                     # dsa_type
_LIST, _RANGE, _VISIBLE = range(3)                       # dsa_attend_what
_P = ctypes.c_void_p


class DsaError(ValueError):
    """A call that dsa.h refused; the text is its own."""


class _Options(ctypes.Structure):                        # flat_options of dsa_shared.c
    _fields_ = [('isa', ctypes.c_int32), ('precision', ctypes.c_int32), ('n_threads', ctypes.c_int32), ('pool', _P),
                ('detail', ctypes.c_char_p), ('detail_size', ctypes.c_size_t)]


class _Pages(ctypes.Structure):                          # flat_pages
    _fields_ = [('data', _P), ('scales', _P), ('n_pages', ctypes.c_int64), ('page_size', ctypes.c_int32), ('format', ctypes.c_int32),
                ('row_stride', ctypes.c_size_t), ('page_stride', ctypes.c_size_t), ('block_table', _P), ('n_blocks', ctypes.c_int64),
                ('table_stride', ctypes.c_int64), ('lens', _P)]


_lib, _options, _lock = None, None, threading.Lock()


def load(path=None):
    """Loads build/libdsa.so, or path, or $DSA_LIBRARY. Happens by itself at the first call."""
    global _lib
    path = path or os.environ.get('DSA_LIBRARY') or os.path.join(_HERE, '..', '..', 'build', 'libdsa.so')
    if not os.path.exists(path):
        raise ImportError('%s is missing: make shared' % os.path.normpath(path))
    _lib = ctypes.CDLL(path)
    _lib.dsa_status_text.restype = ctypes.c_char_p
    _lib.dsa_isa_name.restype = ctypes.c_char_p
    i32, i64, f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float
    _lib.dsa_flat_attend_add.argtypes = [_P, _P, i32, i32, i32, i32, i32, _P, f32, i32, i32, _P, i64, i64, _P, _P, _P, _P, _P, _P]
    _lib.dsa_flat_attend_finish.argtypes = [_P, i64, i32, i32, _P, _P, _P, _P, _P, _P]
    _lib.dsa_flat_score.argtypes = [_P, _P, i32, i32, i32, i32, _P, _P, _P, _P, i64, _P]
    return _lib


def configure(threads=1, isa='auto', precision='auto'):
    """threads: of a pool. isa: auto, scalar, avx2, avx512, neon. precision: auto, or f32 = no bf16 products in attention."""
    global _options
    with _lock:
        _lib or load()
        isas = {_lib.dsa_isa_name(i).decode(): i for i in range(6)}
        if isa not in isas:
            raise ValueError('isa: one of ' + ', '.join(isas))
        if _options is not None and _options.pool:
            _lib.dsa_pool_destroy(_P(_options.pool))
        pool = _P()
        if threads > 1:
            _check(_lib.dsa_pool_create(None, threads, ctypes.byref(pool)))
        _options = _Options(isas[isa], {'auto': 0, 'f32': 1}[precision], threads, pool, None, 0)


def _check(status, detail=b''):
    if status != 0:
        raise DsaError(_lib.dsa_status_text(status).decode() + (': ' + detail.decode() if detail else ''))


def _call(name, *args):
    """The pool and the buffer for reasons are one each, so calls take turns."""
    if _options is None:
        configure()
    with _lock:
        detail = ctypes.create_string_buffer(256)
        _options.detail, _options.detail_size = ctypes.cast(detail, ctypes.c_char_p), 256
        _check(getattr(_lib, name)(ctypes.byref(_options), *args), detail.value)


# ---- arrays: NumPy or Torch, without importing either's extras ------------------------------------------------------------------------

def _is_torch(x):
    return type(x).__module__.split('.')[0] == 'torch'


class _View:
    """Address, shape, strides in bytes and type name of an array that somebody else owns; keeps it alive."""
    def __init__(self, x, what):
        if _is_torch(x):
            if x.device.type != 'cpu':
                raise NotImplementedError('%s is on %s: this build of dsa.h works on the CPU' % (what, x.device))
            size = x.element_size()
            self.address, self.shape, self.strides = x.data_ptr(), tuple(x.shape), tuple(s * size for s in x.stride())
            self.type, self.size = str(x.dtype).replace('torch.', ''), size
        else:
            x = np.asarray(x)
            self.address, self.shape, self.strides = x.ctypes.data, x.shape, x.strides
            self.type, self.size = x.dtype.name, x.dtype.itemsize
        self.array = x

    def rows_contiguous(self):
        return self.shape[-1] <= 1 or self.strides[-1] == self.size


def _expect(condition, text, *args):
    if not condition:
        raise ValueError(text % args if args else text)


def _contiguous(x):
    return x.contiguous() if _is_torch(x) else np.ascontiguousarray(x)


def _view(x, what, types, rank):
    """Copies only where the last dimension is not contiguous."""
    v = _View(x, what)
    _expect(len(v.shape) == rank, '%s: %d dimensions instead of %d', what, len(v.shape), rank)
    _expect(v.type in types, '%s: %s instead of %s', what, v.type, ' or '.join(types))
    return v if v.rows_contiguous() else _View(_contiguous(x), what)


_E4M3 = None


def _from_e4m3(codes):
    global _E4M3
    if _E4M3 is None:
        _lib or load()
        to_f32 = _lib.dsa_e4m3_to_f32
        to_f32.restype, to_f32.argtypes = ctypes.c_float, [ctypes.c_uint8]
        _E4M3 = np.array([to_f32(c) for c in range(256)], np.float32)
    return _E4M3[codes]


def _floats(x, what, rank):
    """A contiguous f32 copy, or x itself if it is one."""
    v = _View(x, what)
    _expect(len(v.shape) == rank, '%s: %d dimensions instead of %d', what, len(v.shape), rank)
    if _is_torch(x):
        return x.detach().float().contiguous().numpy()
    if v.type in ('uint8', 'int8'):
        return np.ascontiguousarray(_from_e4m3(x.view(np.uint8)))
    return np.ascontiguousarray(x, np.float32)


def _int64(x):
    return np.ascontiguousarray((x.numpy() if _is_torch(x) else np.asarray(x)), np.int64)


def _int32(x):
    return np.ascontiguousarray((x.numpy() if _is_torch(x) else np.asarray(x)), np.int32)


def _like(result, x, half=False, dtype=None):
    """The f32 result as what x is, a tensor or an array; half: of x's type where that has 2 bytes; or of dtype."""
    name = _View(x, '').type
    if _is_torch(x):
        import torch
        result = torch.from_numpy(result)
        return result.to(dtype or (x.dtype if half and name in ('bfloat16', 'float16') else torch.float32))
    return result.astype(dtype or (x.dtype if half and name in ('bfloat16', 'float16') else np.float32), copy=False)


def _address(x):
    return None if x is None else x.ctypes.data


_FORMATS = {'float32': F32, 'bfloat16': BF16}


# ---- FlashMLA -------------------------------------------------------------------------------------------------------------------------

class FlashMLASchedMeta:
    """FlashMLA's schedule; a CPU needs none."""


def get_mla_metadata(*args, **kwargs):
    return FlashMLASchedMeta(), None


def _state(rows, heads, dim_v):
    return np.full((rows, heads), -np.inf, np.float32), np.zeros((rows, heads), np.float32), np.zeros((rows, heads, dim_v), np.float32)


def _finish(state, sinks, dim_v):
    max_, sum_, out = state
    rows, heads = max_.shape
    lse, max_logit = np.empty((rows, heads), np.float32), np.empty((rows, heads), np.float32)
    if sinks is not None:
        sinks = _floats(sinks, 'attn_sink', 1)
        _expect(sinks.shape == (heads,), 'attn_sink: shape %s instead of [%d]', sinks.shape, heads)
    _call('dsa_flat_attend_finish', rows, heads, dim_v, _address(sinks), *[_address(x) for x in state], _address(lse), _address(max_logit))
    return out, lse, max_logit


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    """q [s_q, h_q, d_qk], kv [s_kv, 1, d_qk] bf16 or f32, indices [s_q, 1, topk] int32 -> (out [s_q, h_q, d_v], max_logits, lse)."""
    k, lists = _view(kv, 'kv', _FORMATS, 3), _view(indices, 'indices', ('int32',), 3)
    queries = _floats(q, 'q', 3)
    s_q, h_q, d_qk = queries.shape
    _expect(k.shape[1] == 1 and k.shape[2] == d_qk, 'kv: shape %s does not fit q', k.shape)
    _expect(lists.shape[:2] == (s_q, 1), 'indices: shape %s does not fit q', lists.shape)
    _expect(0 < d_v <= d_qk, 'd_v: %d', d_v)
    counts = None if topk_length is None else _int32(topk_length)
    _expect(counts is None or counts.shape == (s_q,), 'topk_length: one number per query')
    pages = _Pages(k.address, None, 1, k.shape[0], _FORMATS[k.type], k.strides[0], k.strides[0] * k.shape[0], None, 0, 0, None)
    state = _state(s_q, h_q, d_v)
    if lists.shape[2] > 0 and s_q > 0:
        _call('dsa_flat_attend_add', ctypes.byref(pages), 1, s_q, h_q, d_v, d_qk - d_v, _address(queries), sm_scale, _LIST, 0,
              lists.address, lists.shape[2], lists.strides[0] // 4, _address(counts), None, None, *[_address(x) for x in state])
    out, lse, max_logit = _finish(state, attn_sink, d_v)
    return _like(out, q, True), _like(max_logit, q), _like(lse, q)


def _latent_pages(cache, what, fp8, head_dim_v, d_qk, keep):
    v = _view(cache, what, ('float8_e4m3fn', 'uint8', 'int8') if fp8 else tuple(_FORMATS), 4)
    keep.append(v)
    _expect(v.shape[2] == 1, '%s: one head of keys instead of %d', what, v.shape[2])
    if fp8:
        want = head_dim_v + 4 * ((head_dim_v + 127) // 128) + 2 * (d_qk - head_dim_v)
        if v.shape[3] != want:
            raise NotImplementedError('%s: rows of %d bytes; dsa.h reads FlashMLA\'s V3.2 layout, %d bytes at %d + %d' %
                                      (what, v.shape[3], want, head_dim_v, d_qk - head_dim_v))
    else:
        _expect(v.shape[3] == d_qk, '%s: width %d instead of %d', what, v.shape[3], d_qk)
    return _Pages(v.address, None, v.shape[0], v.shape[1], FP8 if fp8 else _FORMATS[v.type], v.strides[1], v.strides[0], None, 0, 0, None)


def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata=None, num_splits=None,
                           softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None,
                           extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None):
    """q [b, s_q, h_q, d_qk] -> (out [b, s_q, h_q, head_dim_v], lse [b, h_q, s_q]). With indices [b, s_q, topk]: slots of the pool, sparse;
    without: dense over block_table and cache_seqlens."""
    queries, keep = _floats(q, 'q', 4), []
    b, s_q, h_q, d_qk = queries.shape
    scale = d_qk ** -0.5 if softmax_scale is None else softmax_scale
    state = _state(b * s_q, h_q, head_dim_v)

    def add(cache, slots, lengths, what):
        pages = _latent_pages(cache, what, is_fp8_kvcache, head_dim_v, d_qk, keep)
        lists = _View(slots, 'indices')
        _expect(lists.type == 'int32' and lists.shape[:2] == (b, s_q) and len(lists.shape) == 3, 'indices: int32 [b, s_q, topk]')
        if not lists.rows_contiguous() or lists.strides[0] != s_q * lists.strides[1]:
            lists = _View(_contiguous(slots), 'indices')
        counts = None
        if lengths is not None:
            counts = np.repeat(_int32(lengths), s_q)
            _expect(counts.shape == (b * s_q,), 'topk_length: one number per sequence')
        if lists.shape[2] > 0:
            _call('dsa_flat_attend_add', ctypes.byref(pages), 1, b * s_q, h_q, head_dim_v, d_qk - head_dim_v, _address(queries), scale,
                  _LIST, 1, lists.address, lists.shape[2], lists.strides[1] // 4, _address(counts), None, None,
                  *[_address(x) for x in state])

    if indices is not None:
        _expect(not causal, 'causal is for dense attention')
        add(k_cache, indices, topk_length, 'k_cache')
        if extra_k_cache is not None:
            add(extra_k_cache, extra_indices_in_kvcache, extra_topk_length, 'extra_k_cache')
    else:
        _expect(extra_k_cache is None and topk_length is None and attn_sink is None, 'sparse arguments without indices')
        _expect(block_table is not None and cache_seqlens is not None, 'dense attention needs block_table and cache_seqlens')
        pages = _latent_pages(k_cache, 'k_cache', is_fp8_kvcache, head_dim_v, d_qk, keep)
        table, lens = _view(block_table, 'block_table', ('int32',), 2), _int64(cache_seqlens)
        _expect(table.shape[0] == b and lens.shape == (b,), 'block_table, cache_seqlens: one row per sequence')
        pages.block_table, pages.n_blocks, pages.table_stride = table.address, table.shape[1], table.strides[0] // 4
        pages.lens = _address(lens)
        # Query i of s_q sees len - s_q + i + 1 rows, all of them without causal.
        ke = lens[:, None] + (np.arange(1 - s_q, 1)[None, :] if causal else np.zeros((1, s_q), np.int64))
        ke, ks = np.ascontiguousarray(np.maximum(ke, 0).reshape(-1)), np.zeros(b * s_q, np.int64)
        _call('dsa_flat_attend_add', ctypes.byref(pages), b, s_q, h_q, head_dim_v, d_qk - head_dim_v, _address(queries), scale, _RANGE, 0,
              None, 1, 0, None, _address(ks), _address(ke), *[_address(x) for x in state])
    out, lse, _ = _finish(state, attn_sink, head_dim_v)
    lse = np.ascontiguousarray(lse.reshape(b, s_q, h_q).transpose(0, 2, 1))
    return _like(out.reshape(b, s_q, h_q, head_dim_v), q, True), _like(lse, q)


# ---- DeepGEMM -------------------------------------------------------------------------------------------------------------------------

_BYTES = ('float8_e4m3fn', 'uint8', 'int8')


def _fp8_query(q):
    if isinstance(q, (tuple, list)):                     # fp8_fp4_mqa_logits: (q, None)
        if q[1] is not None:
            raise NotImplementedError('FP4 queries')
        q = q[0]
    _expect(_View(q, 'q').type in _BYTES, 'q: float8_e4m3fn')
    return q


def fp8_mqa_logits(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits=True, max_seqlen_k=0, logits_dtype=None):
    """q e4m3 [M, H, D], kv (e4m3 [N, D], f32 [N]), weights [M, H], int32 [M] twice -> f32 [M, N], or [M, max_seqlen_k] from each row's
    start. The scale of q is in the weights. (dsa.h rounds queries to e4m3 with a power of two per head: e4m3 values go through exactly.)"""
    q = _fp8_query(q)
    queries, w = _floats(q, 'q', 3), _floats(weights, 'weights', 2)
    m, h, d = queries.shape
    keys, scales = _view(kv[0], 'kv[0]', _BYTES, 2), _floats(kv[1], 'kv[1]', 1)
    if keys.strides[0] != d and keys.shape[0] > 1:
        keys = _View(_contiguous(kv[0]), 'kv[0]')
    n = keys.shape[0]
    _expect(keys.shape[1] == d and scales.shape == (n,) and w.shape == (m, h), 'kv, weights: shapes do not fit q')
    ks, ke = _int64(cu_seq_len_k_start), _int64(cu_seq_len_k_end)
    _expect(ks.shape == (m,) and ke.shape == (m,), 'cu_seq_len_k_start, cu_seq_len_k_end: one number per query')
    _expect(max_seqlen_k == 0 or not clean_logits, 'max_seqlen_k needs clean_logits = False')
    pages = _Pages(keys.address, _address(scales), 1, n, FP8, 0, (n * d + 3) // 4 * 4, None, 0, 0, None)
    logits = np.empty((m, n), np.float32)
    if m > 0:
        _call('dsa_flat_score', ctypes.byref(pages), 1, m, h, d, _address(queries), _address(w), _address(ks), _address(ke), n,
              _address(logits))
    if max_seqlen_k > 0:
        whole, logits = logits, np.full((m, max_seqlen_k), -np.inf, np.float32)
        for i in range(m):
            begin, end = max(ks[i], 0), min(ke[i], n, ks[i] + max_seqlen_k)
            if begin < end:
                logits[i, begin - ks[i]:end - ks[i]] = whole[i, begin:end]
    return _like(logits, weights, dtype=logits_dtype)


def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None):
    """DeepGEMM's schedule; a CPU needs none."""
    return None


def fp8_paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, schedule_meta=None, max_context_len=None, clean_logits=False,
                         logits_dtype=None, indices=None):
    """q e4m3 [B, next_n, H, D], kv_cache [blocks, block, 1, D + 4] bytes (keys, then f32 scales), weights [B next_n, H], context_lens int32
    [B, next_n] (or [B]: the lengths behind the last of next_n queries), block_table int32 [B, .] -> f32 [B next_n, max_context_len]."""
    q = _fp8_query(q)
    queries, w = _floats(q, 'q', 4), _floats(weights, 'weights', 2)
    b, next_n, h, d = queries.shape
    cache = _View(kv_cache, 'kv_cache')
    _expect(cache.type in _BYTES and len(cache.shape) == 4 and cache.shape[2:] == (1, d + 4),
            'kv_cache: bytes [blocks, block, 1, %d]', d + 4)
    if cache.strides[3] != 1 or (cache.strides[1] != d + 4 and cache.shape[1] > 1) or cache.strides[0] % 4 != 0:
        cache = _View(_contiguous(kv_cache), 'kv_cache')
    table, lens = _view(block_table, 'block_table', ('int32',), 2), _int64(context_lens)
    if lens.ndim == 1:
        lens = lens[:, None] + np.arange(1 - next_n, 1)[None, :]
    _expect(lens.shape == (b, next_n) and table.shape[0] == b and w.shape == (b * next_n, h), 'context_lens, block_table, weights: shapes')
    ke, ks = np.ascontiguousarray(np.maximum(lens, 0).reshape(-1)), np.zeros(b * next_n, np.int64)
    longest = np.ascontiguousarray(np.maximum(lens.max(axis=1), 0))
    columns = int(longest.max()) if max_context_len is None else int(max_context_len)
    pages = _Pages(cache.address, None, cache.shape[0], cache.shape[1], FP8, 0, cache.strides[0], table.address, table.shape[1],
                   table.strides[0] // 4, _address(longest))
    logits = np.empty((b * next_n, columns), np.float32)
    _call('dsa_flat_score', ctypes.byref(pages), b, next_n, h, d, _address(queries), _address(w), _address(ks), _address(ke), columns,
          _address(logits))
    return _like(logits, weights, dtype=logits_dtype)


fp8_fp4_mqa_logits, fp8_fp4_paged_mqa_logits = fp8_mqa_logits, fp8_paged_mqa_logits      # DeepGEMM's newer names; FP4 is refused

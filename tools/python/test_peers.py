#!/usr/bin/env python3
"""Holds dsa_peers.py to the formulas in NumPy and double precision, over the kinds of cases that FlashMLA's and DeepGEMM's own tests have:
their shapes (the smaller ones), lists with every sort of invalid index, lengths, sinks of +-inf, NaN in rows that no list names, pages
with a stride, two caches, ranges of context parallelism, several tokens of one sequence. Tolerances are theirs.

    make shared && python3 tools/python/test_peers.py [-v]       needs numpy; cases with tensors run where torch is there

Exit status: 0 all passed, 1 one failed, 2 numpy is missing."""

import os
import sys

try:
    import numpy as np
except ImportError:
    print('test_peers.py: numpy is missing', file=sys.stderr)
    sys.exit(2)
try:
    import torch
except ImportError:
    torch = None

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import dsa_peers

BAD = [-2147483648, -123456, -1, 114514, 2147480000, 2147483647]


# ---- the formulas once more -----------------------------------------------------------------------------------------------------------

CODES = np.array([(-1.0 if c & 128 else 1.0) * ((c & 7) * 2.0 ** -9 if c & 120 == 0 else (8 + (c & 7)) * 2.0 ** ((c >> 3 & 15) - 10))
                  for c in range(256)])                 # e4m3; 0x7F and 0xFF are NaN and never made here
POSITIVE = CODES[:127]


def to_e4m3(x):
    """Codes of the nearest values, ties to the even code, saturating."""
    a = np.minimum(np.abs(x), 448.0)
    up = np.clip(np.searchsorted(POSITIVE, a), 0, 126)
    down = np.maximum(up - 1, 0)
    d_up, d_down = POSITIVE[up] - a, a - POSITIVE[down]
    code = np.where((d_down < d_up) | ((d_down == d_up) & (down % 2 == 0)), down, up)
    return (code | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def to_bf16(x):
    """x rounded to bf16, still f32."""
    b = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((b + 0x7FFF + ((b >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def attention(q, rows, scale, d_v, sink):
    """One query [h, d] over rows [n, d]: out, lse, max logit."""
    h = q.shape[0]
    if len(rows) == 0:
        return np.zeros((h, d_v)), np.full(h, np.inf), np.full(h, -np.inf)
    x = scale * (q.astype(np.float64) @ rows.astype(np.float64).T)
    m = x.max(axis=1)
    p = np.exp(x - m[:, None])
    lse = m + np.log(p.sum(axis=1))
    out = (p @ rows[:, :d_v].astype(np.float64)) / p.sum(axis=1)[:, None]
    if sink is not None:
        with np.errstate(over='ignore'):
            out *= (1 / (1 + np.exp(sink.astype(np.float64) - lse)))[:, None]
    return out, lse, m


def fp8_rows(rows):
    """FlashMLA's 656 bytes, and what they mean."""
    n, d = rows.shape
    bytes_, means = np.zeros((n, 656), np.uint8), np.zeros((n, d), np.float32)
    for t in range(4):
        x = rows[:, 128 * t:128 * t + 128].astype(np.float64)
        s = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(x).max(axis=1) / 448, 1e-4)))
        code = to_e4m3(x / s[:, None])
        bytes_[:, 128 * t:128 * t + 128] = code
        bytes_[:, 512 + 4 * t:516 + 4 * t] = s.astype(np.float32)[:, None].view(np.uint8)
        means[:, 128 * t:128 * t + 128] = CODES[code] * s[:, None]
    rope = to_bf16(rows[:, 512:])
    bytes_[:, 528:] = (rope.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(n, 128)
    means[:, 512:] = rope
    return bytes_, means


def logits(q, k, w):
    """Sum_h w max(<q, k>, 0), [m, n]."""
    s = np.maximum(np.einsum('mhd,nd->hmn', q.astype(np.float64), k.astype(np.float64)), 0)
    return np.einsum('hmn,mh->mn', s, w.astype(np.float64))


# ---- comparisons ----------------------------------------------------------------------------------------------------------------------

def similar(a, b):
    """1 - 2<a,b>/(|a|^2 + |b|^2)"""
    total = (a * a).sum() + (b * b).sum()
    return 0.0 if total == 0 else 1 - 2 * (a * b).sum() / total


def close(name, got, want, absolute, relative, difference):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, '%s: shape %s instead of %s' % (name, got.shape, want.shape)
    odd = ~np.isfinite(want)
    assert np.array_equal(got[odd], want[odd], equal_nan=True) and np.isfinite(got[~odd]).all(), name + ': infinities at other places'
    got, want = got[~odd], want[~odd]
    error = np.abs(got - want)
    bad = (error >= absolute) & (error >= relative * np.abs(want))
    assert not bad.any(), '%s: %d of %d off, by up to %g' % (name, bad.sum(), bad.size, error.max())
    assert similar(got, want) < difference, '%s: similarity %g' % (name, similar(got, want))


# ---- FlashMLA -------------------------------------------------------------------------------------------------------------------------

def random_lists(rng, rows, n, topk):
    """Distinct rows below n in random order, the rest invalid in every way."""
    lists = np.empty((rows, topk), np.int32)
    for r in range(rows):
        some = rng.permutation(n)[:topk]
        lists[r, :len(some)] = some
        lists[r, len(some):] = rng.choice(BAD + [n], topk - len(some))
        rng.shuffle(lists[r])
    return lists


def random_sinks(rng, h):
    sink, kind = rng.standard_normal(h).astype(np.float32), rng.standard_normal(h)
    sink[kind < -0.5], sink[kind > 0.5] = -np.inf, np.inf
    return sink


def sparse_forward(s_q, s_kv, topk, h_q, d_qk, sinks, lengths, invalid=False, tensors=False):
    rng = np.random.default_rng(s_q * 1000003 + s_kv * 101 + topk + h_q + d_qk)
    q = to_bf16(rng.standard_normal((s_q, h_q, d_qk)) / 10 + 0.02)
    kv = to_bf16(rng.standard_normal((s_kv, 1, d_qk)) / 10 + 0.02)
    lists = random_lists(rng, s_q, s_kv, topk)
    if invalid:
        lists[::2] = rng.choice(BAD + [s_kv])
    sink = random_sinks(rng, h_q) if sinks else None
    counts = np.minimum(rng.integers(0, max(topk + 1, 64), s_q), topk).astype(np.int32) if lengths else None
    # Rows that no list names are NaN, and the arrays lie in wider ones.
    used = [lists[i, :counts[i]] if lengths else lists[i] for i in range(s_q)]
    named = np.unique(np.concatenate(used))
    kv[~np.isin(np.arange(s_kv), named)] = np.nan
    wide_kv, wide_lists = np.full((s_kv, 1, d_qk + 24), np.nan, np.float32), np.full((s_q, 1, topk + 3), 5, np.int32)
    wide_kv[:, :, :d_qk], wide_lists[:, 0, :topk] = kv, lists
    args = [q, wide_kv[:, :, :d_qk], wide_lists[:, :, :topk], 0.5, 512, sink, counts]
    if tensors:                                          # in bf16, as the peers call it
        args = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args]
        args[0], args[1] = args[0].bfloat16(), torch.from_numpy(wide_kv).bfloat16()[:, :, :d_qk]
    out, max_logits, lse = dsa_peers.flash_mla_sparse_fwd(*args)
    if tensors:
        assert out.dtype == torch.bfloat16 and lse.dtype == max_logits.dtype == torch.float32
        out, max_logits, lse = out.float().numpy(), max_logits.numpy(), lse.numpy()
    want = [attention(q[i], kv[u[(u >= 0) & (u < s_kv)], 0], 0.5, 512, sink) for i, u in enumerate(used)]
    close('out', out, np.stack([w[0] for w in want]), 8e-4, 3.01 / 128, 7e-6)
    close('lse', lse, np.stack([w[1] for w in want]), 1e-6, 2.01 / 65536, 1e-7)
    close('max_logits', max_logits, np.stack([w[2] for w in want]), 1e-6, 2.01 / 65536, 1e-7)


def decode(b, h_q, s_q, s_k, topk, block, sinks=True, lengths=False, extra=None, invalid=False, zero=False, tensors=False):
    rng = np.random.default_rng(b * 7919 + s_k * 31 + topk + block)
    q = to_bf16(rng.standard_normal((b, s_q, h_q, 576)) / 10 + 0.02)
    scale = 576 ** -0.55
    sink = random_sinks(rng, h_q) if sinks else None

    def scope(s_k, topk, block, lengths):
        blocks = (s_k + block - 1) // block
        rows = np.clip(rng.standard_normal((b * blocks, block, 576)) / 10, -1, 1).astype(np.float32)
        table = rng.permutation(b * blocks).reshape(b, blocks)
        lens = rng.integers(1, s_k + 1, b)
        if zero:
            lens[rng.integers(b)] = 0
        at = np.full((b, s_q, topk), -1, np.int64)
        for i in range(b):
            for j in range(s_q):
                some = rng.permutation(lens[i])[:topk]
                at[i, j, :len(some)] = table[i, some // block] * block + some % block
        if invalid:
            at[0] = -1
        counts = rng.integers(0, topk + 1, b).astype(np.int32) if lengths else None
        bytes_, means = fp8_rows(rows.reshape(-1, 576))
        used = [[(lambda u: u[u >= 0])(at[i, j, :counts[i]] if lengths else at[i, j]) for j in range(s_q)] for i in range(b)]
        named = np.unique(np.concatenate([u for us in used for u in us]))
        bytes_[~np.isin(np.arange(len(bytes_)), named)] = 0x7F       # NaN
        pool = np.full((b * blocks, block + 1, 1, 656), 0x7F, np.uint8)
        pool[:, :block, 0] = bytes_.reshape(b * blocks, block, 656)
        return pool[:, :block], at.astype(np.int32), counts, means, used

    cache, lists, counts, means, used = scope(s_k, topk, block, lengths)
    more = scope(*extra, lengths) if extra else (None, None, None, None, None)
    args = [q, cache, None, None, 512, dsa_peers.get_mla_metadata()[0], None, scale, False, True, lists, sink, more[0], more[1], counts,
            more[2]]
    if tensors:
        args = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args]
        args[0], args[1] = args[0].bfloat16(), args[1].view(torch.float8_e4m3fn)
    out, lse = dsa_peers.flash_mla_with_kvcache(*args)
    if tensors:
        out, lse = out.float().numpy(), lse.numpy()
    want = [[attention(q[i, j], np.concatenate([means[used[i][j]]] + ([more[3][more[4][i][j]]] if extra else [])), scale, 512, sink)
             for j in range(s_q)] for i in range(b)]
    close('out', out, np.stack([[w[0] for w in ws] for ws in want]), 1e-3, 2.01 / 128, 5e-6)
    close('lse', lse, np.stack([[w[1] for w in ws] for ws in want]).transpose(0, 2, 1), 1e-6, 8.01 / 65536, 1e-7)


def dense_decode(b, h_q, s_q, s_k, block, causal):
    rng = np.random.default_rng(b + s_k + block)
    blocks = (s_k + block - 1) // block
    pool = to_bf16(rng.standard_normal((b * blocks, block, 1, 576)) / 10)
    table = np.full((b, blocks + 2), -1, np.int32)
    table[:, :blocks] = rng.permutation(b * blocks).reshape(b, blocks)
    lens = rng.integers(s_q, s_k + 1, b).astype(np.int32)
    q = to_bf16(rng.standard_normal((b, s_q, h_q, 576)))
    out, lse = dsa_peers.flash_mla_with_kvcache(q, pool, table, lens, 512, causal=causal)
    for i in range(b):
        rows = pool[table[i, :blocks]].reshape(-1, 576)
        for j in range(s_q):
            want = attention(q[i, j], rows[:lens[i] - (s_q - 1 - j if causal else 0)], 576 ** -0.5, 512, None)
            close('out', out[i, j], want[0], 1e-3, 2.01 / 128, 5e-6)
            close('lse', lse[i, :, j], want[1], 1e-6, 8.01 / 65536, 1e-7)


# ---- DeepGEMM -------------------------------------------------------------------------------------------------------------------------

def check_logits(got, want, real, inside):
    """want: over the rounded values; real: over the unrounded."""
    assert np.array_equal(got == -np.inf, ~inside), 'logits: -inf at other places'
    assert similar(got[inside].astype(np.float64), want[inside]) < 5e-6, 'logits: similarity to the rounded formula'
    assert similar(got[inside].astype(np.float64), real[inside]) < 1e-3, 'logits: similarity to the formula'


def mqa_logits(m, n, h, d, parallel, compressed, tensors=False):
    rng = np.random.default_rng(m + n + h + d)
    q, k, w = rng.standard_normal((m, h, d)), rng.standard_normal((n, d)), rng.standard_normal((m, h)).astype(np.float32)
    if parallel:                                         # one rank of context parallelism: two far chunks
        chunk, size = m // 2, n // m
        ks = np.zeros(m, np.int32)
        ke = np.concatenate([size // 3 * chunk + np.arange(chunk), (2 * size - 1 - size // 3) * chunk + np.arange(chunk)])
    else:
        ks, ke = (np.arange(m) // 3).astype(np.int32), np.arange(m) + n - m
    ke = ke.astype(np.int32)
    scale = (np.maximum(np.abs(k).max(axis=1), 1e-4) / 448).astype(np.float32)
    k8, q8 = to_e4m3(k / scale[:, None]), to_e4m3(q)
    args = dict(q=q8, kv=(k8, scale), weights=w, cu_seq_len_k_start=ks, cu_seq_len_k_end=ke, clean_logits=not compressed,
                max_seqlen_k=int((ke - ks).max()) if compressed else 0)
    if tensors:
        turn = torch.from_numpy
        args.update(q=(turn(q8).view(torch.float8_e4m3fn), None), kv=(turn(k8).view(torch.float8_e4m3fn), turn(scale)), weights=turn(w),
                    cu_seq_len_k_start=turn(ks), cu_seq_len_k_end=turn(ke))
        got = dsa_peers.fp8_fp4_mqa_logits(**args).numpy()
    else:
        got = dsa_peers.fp8_mqa_logits(**args)
    if compressed:
        assert got.shape == (m, (ke - ks).max())
        whole = np.full((m, n), -np.inf, np.float32)
        for i in range(m):
            whole[i, ks[i]:ke[i]] = got[i, :ke[i] - ks[i]]
        got = whole
    inside = (np.arange(n)[None, :] >= ks[:, None]) & (np.arange(n)[None, :] < ke[:, None])
    check_logits(got, logits(CODES[q8], CODES[k8] * scale[:, None].astype(np.float64), w), logits(q, k, w), inside)


def paged_mqa_logits(b, next_n, h, d, block, longest, flat_lens=False, tensors=False):
    rng = np.random.default_rng(b + next_n + h + d + block)
    lens = rng.integers(int(0.7 * longest), int(1.3 * longest), b)
    per = (lens + block - 1) // block
    k = rng.standard_normal((per.sum(), block, d))
    table, pool = np.zeros((b, per.max()), np.int32), rng.permutation(per.sum())
    for i in range(b):
        table[i, :per[i]] = pool[per[:i].sum():per[:i].sum() + per[i]]
    scale = (np.maximum(np.abs(k).max(axis=2), 1e-4) / 448).astype(np.float32)
    k8 = to_e4m3(k / scale[:, :, None])
    cache = np.zeros((len(k), block * (d + 4)), np.uint8)
    cache[:, :block * d] = k8.reshape(len(k), -1)
    cache[:, block * d:] = scale.view(np.uint8)
    q, w = rng.standard_normal((b, next_n, h, d)), rng.standard_normal((b * next_n, h)).astype(np.float32)
    q8 = to_e4m3(q)
    if flat_lens:
        context = lens.astype(np.int32)
        limit = lens[:, None] - next_n + np.arange(next_n)[None, :] + 1
    else:
        limit = ((lens[:, None] + 1) * rng.random((b, next_n))).astype(np.int64)
        limit[:, -1] = lens
        context = limit.astype(np.int32)
    columns = int(per.max()) * block
    args = [q8, cache.reshape(len(k), block, 1, d + 4), w, context, table, None, columns]
    if tensors:
        args = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args]
        args[0] = args[0].view(torch.float8_e4m3fn)
    got = dsa_peers.fp8_paged_mqa_logits(*args)
    got = got.numpy() if tensors else got
    inside = np.arange(columns)[None, :] < limit.reshape(-1, 1)
    want, real = np.zeros((b * next_n, columns)), np.zeros((b * next_n, columns))
    for i in range(b):
        rows, at = table[i, :per[i]], slice(i * next_n, (i + 1) * next_n)
        n = per[i] * block
        want[at, :n] = logits(CODES[q8[i]], (CODES[k8[rows]] * scale[rows][:, :, None].astype(np.float64)).reshape(n, d), w[at])
        real[at, :n] = logits(q[i], k[rows].reshape(n, d), w[at])
    check_logits(got, want, real, inside)


# ---- what must be refused -------------------------------------------------------------------------------------------------------------

def refusals():
    def refused(kind, call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except kind:
            return
        raise AssertionError('%s accepted what it should refuse' % call.__name__)
    q, kv, lists = np.zeros((2, 4, 576), np.float32), np.zeros((8, 1, 576), np.float32), np.zeros((2, 1, 4), np.int32)
    f = dsa_peers.flash_mla_sparse_fwd
    f(q, kv, lists, 1.0)
    refused(ValueError, f, q, kv[:, :, :512], lists, 1.0)
    refused(ValueError, f, q, kv, lists.astype(np.int64), 1.0)
    refused(ValueError, f, q, kv, lists[:1], 1.0)
    refused(ValueError, f, q, kv, lists, 1.0, attn_sink=np.zeros(3, np.float32))
    refused(dsa_peers.DsaError, f, q, kv, lists, float('nan'))
    g = dsa_peers.flash_mla_with_kvcache
    q4, pool = np.zeros((1, 1, 4, 576), np.float32), np.zeros((2, 8, 1, 576), np.float32)
    refused(NotImplementedError, g, q4, np.zeros((2, 8, 1, 584), np.uint8), None, None, 512, is_fp8_kvcache=True, indices=lists[:1])
    refused(dsa_peers.DsaError, g, q4, pool, np.array([[7]], np.int32), np.array([3], np.int32), 512)      # a page that is not there
    refused(dsa_peers.DsaError, g, q4, pool, np.array([[0]], np.int32), np.array([9], np.int32), 512)      # longer than the table
    refused(NotImplementedError, dsa_peers.fp8_mqa_logits, (np.zeros((1, 8, 64), np.uint8), 1), None, None, None, None)


def cases():
    yield 'refusals', refusals, ()
    for d_qk in (512, 576):
        for h_q, s_kv, topk, s_q in ((128, 128, 128, 1), (64, 592, 128, 33), (128, 1521, 512, 5), (64, 95, 128, 31), (64, 114, 384, 9)):
            for features in ((False, False), (True, False), (True, True)):
                yield 'sparse_fwd', sparse_forward, (s_q, s_kv, topk, h_q, d_qk) + features
        yield 'sparse_fwd, no valid index', sparse_forward, (6, 128, 128, 64, d_qk, True, True, True)
        yield 'sparse_fwd, mostly invalid', sparse_forward, (2, 64, 8192, 64, d_qk, True, True)
    for s_k, topk, block in ((512, 64, 2), (512, 64, 69), (300, 576, 61), (650, 576, 53), (1000, 1024, 64)):
        yield 'decode', decode, (3, 64, 3, s_k, topk, block)
        yield 'decode, lengths', decode, (3, 64, 1, s_k, topk, block, False, True)
    yield 'decode, 128 heads', decode, (2, 128, 1, 1024, 576, 61)
    yield 'decode, no valid index', decode, (4, 64, 3, 512, 64, 61, True, False, None, True, True)
    yield 'decode, two caches', decode, (2, 64, 2, 512, 64, 61, True, True, (300, 128, 64))
    for causal in (False, True):
        yield 'dense decode', dense_decode, (3, 64, 3, 300, 64, causal)
    for h, d in ((32, 128), (64, 128), (64, 64), (8, 32)):
        for parallel in (False, True):
            yield 'mqa_logits', mqa_logits, (64, 512, h, d, parallel, parallel)
    for b, next_n, h, block, flat_lens in ((5, 1, 64, 64, False), (4, 2, 32, 64, False), (4, 6, 16, 32, False), (3, 3, 64, 64, True)):
        yield 'paged_mqa_logits', paged_mqa_logits, (b, next_n, h, 128, block, 400, flat_lens)
    if torch is not None:
        yield 'tensors: sparse_fwd', sparse_forward, (33, 592, 128, 64, 576, True, True, False, True)
        yield 'tensors: decode', decode, (3, 64, 2, 512, 64, 61, True, True, None, False, False, True)
        yield 'tensors: mqa_logits', mqa_logits, (64, 512, 64, 128, True, True, True)
        yield 'tensors: paged_mqa_logits', paged_mqa_logits, (4, 2, 32, 128, 64, 400, False, True)


def main():
    verbose, failed, passed = '-v' in sys.argv[1:], 0, 0
    for threads, isa in ((1, 'scalar'), (2, 'auto')):
        dsa_peers.configure(threads=threads, isa=isa)
        for name, test, args in cases():
            if isa == 'scalar' and name not in ('refusals', 'sparse_fwd, no valid index', 'decode, two caches', 'mqa_logits'):
                continue                                 # the plain C path is slow, and has its own tests
            try:
                test(*args)
            except AssertionError as error:
                print('FAIL %s%s, %s: %s' % (name, args, isa, error))
                failed += 1
                continue
            passed += 1
            if verbose:
                print('PASS %s%s, %s' % (name, args, isa))
    print('%d passed, %d failed%s' % (passed, failed, '' if torch is not None else '; torch is missing: no cases with tensors'))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())

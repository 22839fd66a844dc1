#!/usr/bin/env python3
"""What attention costs: dense MLA beside DSA, from a config, a context, a batch and a line about the hardware.

    tools/cost.py                                            DeepSeek-V3.2 on an H800, contexts from 1K to 128K
    tools/cost.py --config examples/tiny-dsa/config.json --hardware "laptop,100,50"
    tools/cost.py --csv build/cost.csv && tools/plot.py build/cost.csv       the curves as a picture
    tools/cost.py --layer --hardware "this machine,0.23,30" --measured build/sweep.csv     beside `make bench-sweep`

  --config FILE       a Hugging Face config.json; v3.2 (default), glm-5, tiny
  --contexts LIST     say 4096,131072 (default: powers of two from 1K to 128K)
  --batch B           sequences decoded together, each with such a context; they share the weights (default 64)
  --chunk N           queries of a prefill chunk (default 512)
  --hardware LINE     name,peak TFLOP/s,GB/s: what is reached of them counts, not the data sheet. A fourth number is the peak for FP8
                      products, of the indexer only (default: the peak). h800 (default): 8 GPUs at half of 989 TFLOP/s bf16, 1979 FP8,
                      3350 GB/s
  --format F          of the caches: fp8 (default), bf16, f32
  --layer             one attention layer alone, in ms a call, without MLP or experts: what build/bench --sweep measures
  --weights N         bytes of a weight (default: 1, FP8; with --layer and no FP8 format that of the format)
  --price P           dollars an hour for all of the hardware: also prints dollars per million tokens
  --csv FILE          the curves in the format of build/bench --sweep, for tools/plot.py
  --measured FILE     such a CSV of measured calls: prints measured / computed, call by call
  --check             the shape of DeepSeek's published curves (DeepSeek_V3_2.pdf, inference costs of V3.1-Terminus and V3.2-Exp over the
                      token's position): dense rises in a straight line, DSA hardly, and at 128K DSA costs less than half, both phases.
                      Decoding in large batches (512 unless --batch says otherwise): with few sequences the experts' weights cost most
  --json              one object a line instead of the table

The model of a time: each part takes the longer of its FLOPs at peak and its bytes at bandwidth; parts follow one another. Multiply and add
are 2 FLOPs. Decode and DSA use the absorbed form (the latent is key and value), dense prefill the expanded one (a key and a value per
head), as DeepSeek's own code does; --layer takes the absorbed form throughout, as dsa.h does. Network, softmax, norms, and what kernels
lose are not in it. Exit status: 0, or 1 if --check fails, 2 for bad usage or input."""

import argparse
import csv
import json
import sys

PRESETS = {
    'v3.2': dict(name='DeepSeek-V3.2', hidden=7168, layers=61, heads=128, R=512, r=64, nope=128, v=128, q_lora=1536, HI=64, D=128, k=2048,
                 inter=18432, dense_layers=3, experts=8, shared=1, routed=256, expert_inter=2048, vocab=129280),
    'glm-5': dict(name='GLM-5', hidden=6144, layers=78, heads=64, R=512, r=64, nope=192, v=256, q_lora=2048, HI=32, D=128, k=2048,
                  inter=12288, dense_layers=3, experts=8, shared=1, routed=256, expert_inter=2048, vocab=154880),
}
H800 = 'half of 8 H800,3956,13400,7916'


def fail(text):
    print('cost.py: ' + text, file=sys.stderr)
    sys.exit(2)


def read_config(path):
    if path == 'tiny':
        path = 'examples/tiny-dsa/config.json'
    if path in PRESETS:
        return dict(PRESETS[path])
    try:
        with open(path) as f:
            c = json.load(f)
        m = dict(name=path, hidden=c['hidden_size'], layers=c['num_hidden_layers'], heads=c['num_attention_heads'], R=c['kv_lora_rank'],
                 r=c['qk_rope_head_dim'], nope=c['qk_nope_head_dim'], v=c['v_head_dim'], q_lora=c['q_lora_rank'], HI=c['index_n_heads'],
                 D=c['index_head_dim'], k=c['index_topk'], inter=c['intermediate_size'], vocab=c['vocab_size'])
        m['dense_layers'] = min(c.get('first_k_dense_replace', m['layers']), m['layers'])
        m['experts'], m['shared'] = c.get('num_experts_per_tok', 0), c.get('n_shared_experts', 0)
        m['routed'], m['expert_inter'] = c.get('n_routed_experts', 0), c.get('moe_intermediate_size', 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail('%s: %s' % (path, error if isinstance(error, OSError) else 'no config of this kind: %r' % error))
    if not all(isinstance(m[x], int) and m[x] > 0 for x in ('hidden', 'layers', 'heads', 'R', 'k', 'D', 'HI')):
        fail(path + ': sizes must be positive integers')
    return m


def row_bytes(m, form):
    """Of one token and layer: latent, index key."""
    if form == 'fp8':
        return m['R'] + 4 * ((m['R'] + 127) // 128) + 2 * m['r'], m['D'] + 4
    size = {'bf16': 2, 'f32': 4}[form]
    return size * (m['R'] + m['r']), size * m['D']


class Part:
    """FLOPs and bytes of one part of the work; index: products that may run at the FP8 peak."""
    def __init__(self, flops=0.0, bytes_=0.0, index=0):
        self.flops, self.bytes, self.index = flops, bytes_, index

    def seconds(self, hw):
        return max(self.flops / (hw['index_peak'] if self.index else hw['peak']), self.bytes / hw['bandwidth'])


def parts(m, mode, phase, context, o):
    """The work for `tokens` queries at the end of a context: (tokens, {name: Part}) of one layer, and of the whole model's rest."""
    batch, tokens = (o.batch, o.batch) if phase == 'decode' else (1, o.chunk)
    latent, key = row_bytes(m, o.format)
    H, R, r, nope, v, HI, D, hid, ql = (m[x] for x in ('heads', 'R', 'r', 'nope', 'v', 'HI', 'D', 'hidden', 'q_lora'))
    # Rows that a query sees, on average; rows that the sequence has.
    sees = context if phase == 'decode' else context - (tokens - 1) / 2
    keep = min(m['k'], sees)
    work = {}
    weights = hid * ql + ql * H * (nope + r) + hid * (R + r) + R * H * (nope + v) + H * v * hid
    expanded = mode == 'dense' and phase == 'prefill' and not o.layer
    work['projections'] = Part(2 * tokens * weights, o.weight_bytes * weights)
    if mode == 'dsa':
        index_weights = ql * HI * D + hid * D + hid * HI
        work['indexer projections'] = Part(2 * tokens * index_weights, o.weight_bytes * index_weights)
        if sees > m['k']:                                # else all rows are taken unseen
            work['indexer'] = Part(tokens * sees * HI * (2 * D + 2), batch * context * key, 1)
        # Prefill: queries of a chunk share rows; at most the whole sequence is read, per query k.
        rows = batch * keep if phase == 'decode' else min(context, tokens * keep)
        work['attention'] = Part(2 * tokens * keep * H * (R + r + R), rows * latent)
    elif expanded:
        work['expansion'] = Part(2 * context * R * H * (nope + v), context * latent)
        work['attention'] = Part(2 * tokens * sees * H * (nope + r + v), context * latent)
    else:
        work['attention'] = Part(2 * tokens * sees * H * (R + r + R), batch * context * latent)
    rest = {}
    if not o.layer:
        sparse = m['layers'] - m['dense_layers']
        one, dense = 3 * hid * m['expert_inter'], 3 * hid * m['inter'] * m['dense_layers']
        # Experts that at least one of the tokens is sent to, were each token to choose evenly.
        touched = m['routed'] * (1 - (1 - m['experts'] / m['routed']) ** tokens) if m['routed'] else 0
        rest['experts'] = Part(2 * tokens * one * (m['experts'] + m['shared']) * sparse,
                               o.weight_bytes * one * (touched + m['shared']) * sparse)
        rest['dense MLP'] = Part(2 * tokens * dense, o.weight_bytes * dense)
        if phase == 'decode':
            rest['head'] = Part(2 * tokens * hid * m['vocab'], o.weight_bytes * hid * m['vocab'])
    return tokens, work, rest


def cost(m, mode, phase, context, o):
    tokens, work, rest = parts(m, mode, phase, context, o)
    layers = 1 if o.layer else m['layers']
    latent, key = row_bytes(m, o.format)
    seconds = layers * sum(p.seconds(o.hw) for p in work.values()) + sum(p.seconds(o.hw) for p in rest.values())
    attention = layers * sum(p.seconds(o.hw) for name, p in work.items() if 'projections' not in name)
    return dict(phase=phase, mode=mode, context=context, tokens=tokens,
                gflops=(layers * sum(p.flops for p in work.values()) + sum(p.flops for p in rest.values())) / tokens / 1e9,
                mbytes=(layers * sum(p.bytes for p in work.values()) + sum(p.bytes for p in rest.values())) / tokens / 1e6,
                cache_mb=layers * context * (latent + (key if mode == 'dsa' else 0)) / 1e6,
                us=1e6 * seconds / tokens, attention_us=1e6 * attention / tokens, ms=1e3 * seconds)


def crossover(m, phase, o):
    """The least context from which DSA is quicker, to 1 %, or None up to 16M."""
    def wins(n):
        return cost(m, 'dsa', phase, n, o)['us'] < cost(m, 'dense', phase, n, o)['us']
    low, high = o.chunk + 1, 1 << 24
    if not wins(high):
        return None
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


def check(m, o):
    """The shape of the published curves: which lines hold and which do not."""
    bad = 0
    for phase in ('prefill', 'decode'):
        at = {n: {mode: cost(m, mode, phase, n, o)['us'] for mode in ('dense', 'dsa')} for n in (4096, 32768, 65536, 98304, 131072)}
        slope = [(at[b]['dense'] - at[a]['dense']) / (b - a) for a, b in ((32768, 65536), (65536, 98304), (98304, 131072))]
        flat = (at[131072]['dsa'] - at[32768]['dsa']) / (at[131072]['dense'] - at[32768]['dense'])
        ratio = at[131072]['dense'] / at[131072]['dsa']
        for text, holds in (('dense rises in a straight line (ns per 1000 rows: %s)' % ', '.join('%.4g' % (1e6 * s) for s in slope),
                             max(slope) < 1.05 * min(slope)),
                            ('DSA rises by %.0f %% of dense, at most 40 %%' % (100 * flat), flat < 0.4),
                            ('at 128K dense costs %.1f times as much as DSA, at least 2' % ratio, ratio >= 2),
                            ('at 4K they are within 30 %% of one another (%.2f)' % (at[4096]['dsa'] / at[4096]['dense']),
                             0.7 < at[4096]['dsa'] / at[4096]['dense'] < 1.3)):
            print('%s  %-8s %s' % ('ok  ' if holds else 'FAIL', phase, text))
            bad += not holds
    return 1 if bad else 0


def compare(m, path, o):
    """measured / computed for each call of a sweep."""
    try:
        with open(path, newline='') as f:
            lines = [l for l in f if not l.startswith('#')]
        rows = [r for r in csv.DictReader(lines) if r['ms']]
        print('%-8s %-6s %9s %8s %12s %12s %9s' % ('phase', 'mode', 'context', 'queries', 'computed ms', 'measured ms', 'ratio'))
        for r in rows:
            o.chunk, o.batch = int(r['queries']), int(r['queries'])
            ms = cost(m, r['mode'], r['phase'], int(r['context']), o)['ms']
            print('%-8s %-6s %9s %8s %12.4g %12.4g %9.2f' %
                  (r['phase'], r['mode'], r['context'], r['queries'], ms, float(r['ms']), float(r['ms']) / ms))
    except (OSError, KeyError, ValueError) as error:
        fail('%s: %s' % (path, error))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='v3.2')
    parser.add_argument('--contexts', default=','.join(str(1 << i) for i in range(10, 18)))
    parser.add_argument('--batch', type=int)
    parser.add_argument('--chunk', type=int, default=512)
    parser.add_argument('--hardware', default='h800')
    parser.add_argument('--format', choices=['fp8', 'bf16', 'f32'], default='fp8')
    parser.add_argument('--weights', type=float, dest='weight_bytes')
    parser.add_argument('--price', type=float)
    parser.add_argument('--measured')
    parser.add_argument('--csv')
    for flag in ('--layer', '--check', '--json'):
        parser.add_argument(flag, action='store_true')
    o = parser.parse_args()
    m = read_config(o.config)
    if o.batch is None:
        o.batch = 1 if o.layer else 512 if o.check else 64
    if o.weight_bytes is None:
        o.weight_bytes = {'fp8': 1, 'bf16': 2, 'f32': 4}[o.format] if o.layer else 1
    try:
        fields = (H800 if o.hardware == 'h800' else o.hardware).split(',')
        peak, bandwidth = 1e12 * float(fields[1]), 1e9 * float(fields[2])
        o.hw = dict(name=fields[0], peak=peak, bandwidth=bandwidth, index_peak=1e12 * float(fields[3]) if len(fields) > 3 else peak)
        contexts = [int(c) for c in o.contexts.split(',')]
        if peak <= 0 or bandwidth <= 0 or o.batch < 1 or o.chunk < 1 or min(contexts) < 1:
            raise ValueError('numbers must be positive')
    except (ValueError, IndexError) as error:
        fail('--hardware takes name,TFLOP/s,GB/s and --contexts whole numbers: %s' % error)
    if o.check:
        return check(m, o)
    if o.measured:
        compare(m, o.measured, o)
        return 0
    results = [cost(m, mode, phase, n, o) for phase in ('decode', 'prefill') for n in contexts for mode in ('dense', 'dsa')
               if phase == 'decode' or n >= o.chunk]
    for r in results:
        if o.price:
            r['dollars_per_million'] = r['us'] / 3600 * o.price
    if o.csv:
        with open(o.csv, 'w') as f:
            f.write('# %s%s, computed, %s caches; %s\nphase,mode,context,queries,ms,note\n' %
                    (m['name'], ', one layer' if o.layer else '', o.format, o.hw['name']))
            for r in results:
                f.write('%s,%s,%d,%d,%.6g,\n' % (r['phase'], r['mode'], r['context'], r['tokens'], r['ms']))
    if o.json:
        for r in results:
            print(json.dumps(r))
        return 0
    print('%s, %s caches, batch %d, chunks of %d; %s: %.4g TFLOP/s (indexer %.4g), %.4g GB/s\n' %
          (m['name'], o.format, o.batch, o.chunk, o.hw['name'], o.hw['peak'] / 1e12, o.hw['index_peak'] / 1e12, o.hw['bandwidth'] / 1e9))
    print('%-8s %-6s %9s %13s %11s %15s %10s %13s%s' %
          ('phase', 'mode', 'context', 'GFLOP/token', 'MB/token', 'cache MB a seq.', 'us/token', 'of attention',
           '   $ / million' if o.price else ''))
    for r in results:
        print('%-8s %-6s %9d %13.4g %11.4g %15.4g %10.4g %13.4g%s' %
              (r['phase'], r['mode'], r['context'], r['gflops'], r['mbytes'], r['cache_mb'], r['us'], r['attention_us'],
               '%14.4g' % r['dollars_per_million'] if o.price else ''))
    for phase in ('decode', 'prefill'):
        n = crossover(m, phase, o)
        where = 'from about %d tokens on' % n if n else 'nowhere up to 16M'
        print('%s%s: DSA is quicker %s' % ('\n' if phase == 'decode' else '', phase, where))
    return 0


if __name__ == '__main__':
    sys.exit(main())

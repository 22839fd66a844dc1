#!/usr/bin/env python3
"""Runs FlashMLA's and DeepGEMM's own Python tests against dsa.h on the CPU, through dsa_peers.py.

    git clone https://github.com/deepseek-ai/FlashMLA; git clone https://github.com/deepseek-ai/DeepGEMM
    make shared && python3 tools/python/run_peers.py --flashmla FlashMLA --deepgemm DeepGEMM [--cases 20]

Their files are read where they lie and stay there; nothing of them is in this repository. What is changed on the way, in memory: the
device is the CPU, modules that only exist with CUDA are replaced by stand-ins, cases are a random sample of those that a CPU can do
(DeepGEMM's lengths are made 64 times shorter), and nothing is timed. Cases for what dsa.h does not have are left out and counted:
MODEL1 (DeepSeek-V4) caches in FlashMLA's decoding, FP4. Their references and tolerances decide. Written for FlashMLA 9241ae3 and DeepGEMM
54e2261. Needs torch and numpy. Exit status: 0 all passed, 1 a case failed, 2 bad usage."""

import argparse
import os
import random
import sys
import types

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)


def stand_in(name, **things):
    module = types.ModuleType(name)
    module.__dict__.update(things)
    sys.modules[name] = module
    return module


def source(path, *changes):
    """The text of a file for the CPU. Each change must be possible: else the file is another version."""
    with open(path) as f:
        text = f.read()
    for old, new in (('cuda:0', 'cpu'), ("'cuda'", "'cpu'")) + changes:
        if old not in text and (old, new) in changes:
            sys.exit('run_peers.py: %s: "%s" is not there: written for another version' % (path, old))
        text = text.replace(old, new)
    return compile(text, path, 'exec')


def flashmla(folder, cases, seed):
    import torch
    import dsa_peers
    tests = os.path.join(folder, 'tests')
    sys.path.insert(0, tests)
    stand_in('flash_mla', flash_mla_sparse_fwd=dsa_peers.flash_mla_sparse_fwd, flash_mla_with_kvcache=dsa_peers.flash_mla_with_kvcache,
             get_mla_metadata=dsa_peers.get_mla_metadata)
    stand_in('rich')
    stand_in('rich.console')
    stand_in('rich.table')
    for name in ('synchronize', 'empty_cache', 'set_device'):
        setattr(torch.cuda, name, lambda *args: None)
    torch.Tensor.cuda = lambda self, *args, **more: self
    torch.set_default_dtype(torch.bfloat16)
    torch.set_float32_matmul_precision('highest')
    results = []
    for name, file, run in (('sparse prefill', 'test_flash_mla_sparse_prefill.py', 'run_test'),
                            ('sparse decoding', 'test_flash_mla_sparse_decoding.py', 'test_flash_mla')):
        space = {'__name__': 'peer'}
        change = ("if __name__ == '__main__':", 'def all_cases():') if run == 'run_test' else ('def gen_testcase', 'def gen_testcase')
        end = ('is_no_cooldown = lib.is_no_cooldown()', 'return testcases') if run == 'run_test' else change
        exec(source(os.path.join(tests, file), change, end), space)
        everything = space['all_cases']() if run == 'run_test' else [t.to_test_param() for t in space['gen_testcase']()]
        torch.set_default_device('cpu')
        wanted = [t for t in everything if t.num_runs == 0 and t.check_correctness]
        able = [t for t in wanted if not (t.decode and t.d_qk != 576)]
        pairs = [(t.decode.b if t.decode else 1) * t.s_q * t.h_q * t.topk for t in able]
        small = [t for t, n in zip(able, pairs) if n < 1 << 24]
        chosen = random.Random(seed).sample(small, min(cases, len(small)))
        good = 0
        for t in chosen:
            answer = space[run](t)
            good += bool(getattr(answer, 'is_correct', answer))
        results.append('FlashMLA, %s: %d of %d passed (of %d cases, %d with MODEL1 caches left out, %d too large for a CPU)' %
                       (name, good, len(chosen), len(wanted), len(wanted) - len(able), len(able) - len(small)))
        results.append(good == len(chosen) and len(chosen) > 0)
    torch.set_default_dtype(torch.float32)
    return results


def deepgemm(folder, cases):
    import torch
    import dsa_peers
    sys.path.insert(0, os.path.join(folder, 'deep_gemm'))
    names = {}
    for path in ('testing/numeric.py', 'utils/math.py'):
        exec(source(os.path.join(folder, 'deep_gemm', path)), names)
    nothing = dict(test_filter=lambda condition: lambda f: f, ignore_env=lambda name, condition: lambda f: f, get_arch_major=lambda: 9,
                   bench_kineto=lambda f, kernels, **more: (1.0,) * len(kernels))
    stand_in('deep_gemm', fp8_fp4_mqa_logits=dsa_peers.fp8_mqa_logits, fp8_fp4_paged_mqa_logits=dsa_peers.fp8_paged_mqa_logits,
             get_paged_mqa_logits_metadata=dsa_peers.get_paged_mqa_logits_metadata, get_num_sms=lambda: 1)
    stand_in('deep_gemm.testing', **dict(names, **nothing))
    stand_in('deep_gemm.utils', **names)
    stand_in('generators', generate_normal=None, get_ue8m0_usage=None, get_kernel_types=None, reset_seed=None, MajorTypeAB=None,
             get_arch_major=nothing['get_arch_major'])
    os.environ['DG_MQA_NUM_CASES'] = str(cases)
    for name in ('synchronize', 'reset_peak_memory_stats'):
        setattr(torch.cuda, name, lambda *args: None)
    space = {'__name__': 'peer'}
    shorter = (('for seq_len in (2048, 8192)', 'for seq_len in (32, 128)'),
               ('for seq_len_kv in (8192, 65536)', 'for seq_len_kv in (128, 1024)'),
               ('for avg_kv in (8192, 65536)', 'for avg_kv in (128, 1024)'), ('for batch_size in (256, 4096)', 'for batch_size in (4, 16)'),
               ('for _ in range(20)', 'for _ in range(2)'))
    exec(source(os.path.join(folder, 'tests', 'test_attention.py'), *shorter), space)
    torch.manual_seed(0)
    random.seed(0)
    results = []
    for name in ('test_mqa_logits', 'test_paged_mqa_logits'):
        try:
            space[name]()
            results += ['DeepGEMM, %s: passed' % name, True]
        except AssertionError as error:
            results += ['DeepGEMM, %s: FAILED: %s' % (name, error), False]
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--flashmla')
    parser.add_argument('--deepgemm')
    parser.add_argument('--cases', type=int, default=20, help='of each test')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    if not args.flashmla and not args.deepgemm:
        parser.error('--flashmla or --deepgemm')
    import dsa_peers
    dsa_peers.configure(threads=args.threads)
    results = deepgemm(args.deepgemm, args.cases) if args.deepgemm else []
    results += flashmla(args.flashmla, args.cases, args.seed) if args.flashmla else []
    print()
    for text in results[::2]:
        print(text)
    return 0 if all(results[1::2]) else 1


if __name__ == '__main__':
    sys.exit(main())

#!/usr/bin/env python3
"""Mutation testing of dsa.h's scalar code: one small fault at a time, and the tests have to notice.

    python3 tools/mutate.py --sample 300 --seed 1          a sample over all sections, survivors on standard output
    python3 tools/mutate.py --sections ref,topk --all      every mutant of two sections
    python3 tools/mutate.py --list --sections ref          what could be changed, nothing is run
    python3 tools/mutate.py --function dsa__exp --all      every mutant of one function

A mutant is one token of the implementation replaced by another one: a comparison by its neighbour or its opposite, + by -, * by /, && by
||, a whole number by the next one, a float by its double, an error by another error, a condition by its negation. Comments, strings,
preprocessor lines and DSA_ASSERT are left alone. The scalar build (DSA_NO_SIMD, -O0, which compiles in a third of a second) of each
mutant is linked with the tests; the suites that reach the mutated section run one after the other until one fails. What survives is
compiled with -O1 and compared with the original's code, then runs the first two of them, and `faults`, once more under ASan and UBSan,
which see a read or write too far that changes no result.

  killed      a test failed, crashed, or took more than four times its usual time
  same code   the compiler made the same object file: no mutant at all, not counted
  explained   survived, and tests/mutants.txt says why no test can see it (or none should): same results, or only time differs
  survived    survived, and nobody has said why

Exit status: 0 if at most 5 % of the mutants survived unexplained, 1 if more, 2 for bad usage. Needs a C compiler with sanitizers."""

import argparse, concurrent.futures, os, random, re, resource, shlex, signal, subprocess, sys, tempfile, threading, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PREFIX = []
EXPLAINED = os.path.join(ROOT, 'tests', 'mutants.txt')

# The sections of plain C, and the suites that can see their faults, the quickest to see them first.
ALL = ['attend', 'cache', 'errors', 'numeric', 'step', 'layer', 'score', 'random', 'threads', 'faults', 'matmul', 'shards', 'pages',
       'device', 'models', 'backward', 'select', 'golden']
SECTIONS = {
    'platform': ALL, 'kernels': ALL, 'numeric': ['numeric'] + ALL,
    'ref': ['attend', 'score', 'faults', 'backward', 'layer', 'random', 'golden'],
    'topk': ['select', 'score', 'faults', 'step', 'threads', 'random', 'golden'], 'threads': ['threads', 'errors'],
    'config': ['numeric', 'errors', 'faults', 'cache', 'layer', 'attend', 'random', 'score', 'golden'],
    'cache': ['cache', 'errors', 'faults', 'models', 'attend', 'step', 'layer', 'random', 'score', 'golden'],
    'validate': ['errors', 'cache', 'faults', 'attend', 'step', 'layer', 'score'],
    'append': ['cache', 'errors', 'faults', 'models', 'step', 'layer', 'random'],
    'score': ['score', 'errors', 'faults', 'models', 'step', 'threads', 'layer', 'random', 'select', 'golden'],
    'attend': ['attend', 'errors', 'faults', 'models', 'step', 'threads', 'layer', 'random', 'backward', 'golden'],
    'matmul': ['matmul', 'layer', 'faults', 'golden'], 'compress': ['models', 'errors', 'faults'],
    'shards': ['shards', 'errors'], 'pages': ['pages', 'errors'],
    'step': ['step', 'errors', 'faults', 'threads', 'random'], 'layer': ['layer', 'errors', 'faults', 'threads', 'golden'],
    'backward': ['backward', 'errors', 'faults'], 'layer_backward': ['backward', 'errors', 'faults'],
}
SUITES = sorted(ALL)

TOKEN = re.compile(r'''
      (?P<comment>/\*.*?\*/|//[^\n]*) | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    | (?P<line>^[ \t]*\#(?:\\\n|/\*.*?\*/|[^\n])*)
    | (?P<number>0[xX][0-9a-fA-F]+[uUlL]*|(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?[fF]?|\d+[uUlL]*)
    | (?P<name>[A-Za-z_]\w*) | (?P<op><<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|[-+*/%&|^~!<>=?:;,.(){}\[\]])
''', re.X | re.S | re.M)

SWAPS = {
    '<': ['<=', '>='], '<=': ['<', '>'], '>': ['>=', '<='], '>=': ['>', '<'], '==': ['!='], '!=': ['=='], '&&': ['||'], '||': ['&&'],
    '+': ['-'], '-': ['+'], '*': ['/'], '/': ['*'], '%': ['/'], '&': ['|'], '|': ['&'], '^': ['|'], '<<': ['>>'], '>>': ['<<'],
    '+=': ['-=', '='], '-=': ['+='], '*=': ['/=', '='], '/=': ['*='], '|=': ['&='], '&=': ['|='], '<<=': ['>>='], '>>=': ['<<='],
}


class Mutant:
    def __init__(self, section, function, text, at, end, new, line, nth):
        self.section, self.function, self.at, self.end, self.new = section, function, at, end, new
        self.old, self.line, self.nth = text[at:end], line, nth
        begin = text.rfind('\n', 0, at) + 1
        self.code = re.sub(r'\s*/\*.*?(\*/|$)', '', text[begin:text.find('\n', at)]).strip()

    def key(self):                                  # how tests/mutants.txt names it: stays when lines move
        return '%s | %s | %s -> %s #%d' % (self.function, self.code, self.old, self.new, self.nth)

    def __str__(self):
        return 'dsa.h:%d %s' % (self.line, self.key())


def replacements(token, kind, before, after):
    """What a token may become. before, after: its neighbours that are no comments."""
    if kind == 'number':
        if token.lower().startswith('0x'):
            digits, suffix = re.match(r'(0[xX][0-9a-fA-F]+)(\w*)', token).groups()
            return ['0x%X%s' % (int(digits, 16) + 1, suffix)]
        if re.search(r'[.eE]', token):
            digits, suffix = re.match(r'([^fF]+)([fF]?)', token).groups()
            value = float(digits)
            return [('1.0' if value == 0 else repr(2 * value)) + suffix]
        digits, suffix = re.match(r'(\d+)(\w*)', token).groups()
        value = int(digits)
        return ['%d%s' % (value + 1, suffix)] + (['0' + suffix] if value == 1 else [])
    if kind == 'name':
        if token.startswith('DSA_ERR_'):
            return ['DSA_ERR_THREAD']
        if token == 'if' and after == '(':
            return ['if (!']                        # see apply()
        return []
    if token in ('-', '+', '*', '&') and (before is None or not re.match(r'[\w\])]', before[-1]) or before in ('return', 'case')):
        return []                                   # a sign, a pointer, an address
    return SWAPS.get(token, [])


def mutants_of(text, sections, function):
    """All mutants of the sections, in the order of the text."""
    marks = [(m.start(), m.group(1)) for m in re.finditer(r'^ +>>(\w+) {3,}\S', text, re.M) if m.end() > text.index('>>platform', 9000)]
    found, tokens = [], []
    for m in TOKEN.finditer(text, marks[0][0]):
        if m.lastgroup not in ('comment',):
            tokens.append((m.start(), m.end(), m.lastgroup))
    depth, parens, current, asserted, last_name, statics, per_line = 0, 0, '', 0, '', False, {}
    for i, (at, end, kind) in enumerate(tokens):
        token = text[at:end]
        if kind in ('line', 'string'):
            continue
        if depth == 0:
            if kind == 'name' and i + 1 < len(tokens) and text[tokens[i + 1][0]] == '(' and not token.startswith('__'):
                last_name = token
            if token == '{':
                current = last_name
            if token == '=':                        # a table outside functions
                current = text[tokens[i - 1][0]:tokens[i - 1][1]]
        if token == '{':
            depth += 1
        elif token == '}':
            depth = max(0, depth - 1)
        if kind == 'name' and token == 'DSA_ASSERT':
            asserted = parens + 1
        if token == '(':
            parens += 1
        elif token == ')':
            if asserted == parens:
                asserted = 0
            parens -= 1
        if depth == 0 or asserted:
            continue
        section = [name for start, name in marks if start <= at][-1]
        if section not in sections or (function and current != function):
            continue
        before = text[tokens[i - 1][0]:tokens[i - 1][1]]
        after = text[tokens[i + 1][0]:tokens[i + 1][1]] if i + 1 < len(tokens) else ''
        # Declarations: pointers and the brackets of arrays of a fixed size.
        if token == '*' and (before in ('float', 'double', 'char', 'void', 'const', 'int32_t', 'int64_t', 'size_t', 'uint32_t', 'uint16_t')
                             or re.match(r'dsa_\w+$', before) and kind == 'op' and after and re.match(r'[*A-Za-z_]', after) and
                             re.match(r'[;{}(,]|const|static', text[tokens[i - 2][0]:tokens[i - 2][1]])):
            continue
        line = text.count('\n', 0, at) + 1
        for new in replacements(token, kind, before, after):
            place = (line, token, new)
            per_line[place] = per_line.get(place, 0) + 1
            found.append(Mutant(section, current, text, at, end, new, line, per_line[place]))
    return found


def apply(text, m):
    if m.old != 'if':
        return text[:m.at] + m.new + text[m.end:]
    depth, i = 0, m.end                             # if (c) becomes if (!(c))
    while True:
        depth += {'(': 1, ')': -1}.get(text[i], 0)
        i += 1
        if depth == 0 and text[i - 1] == ')':
            break
    return text[:m.end] + ' (!' + text[m.end:i].strip() + ')' + text[i:]


def explained():
    try:
        with open(EXPLAINED) as f:
            lines = [l.rstrip('\n') for l in f if l.strip() and not l.startswith('#')]
    except OSError:
        return {}
    keys = {}
    for l in lines:
        key, _, reason = l.rpartition(' | ')
        keys[key] = reason
    return keys


class Builder:
    """Test objects once, dsa.h once per mutant; plain and sanitised."""
    def __init__(self, cc, folder):
        self.cc, self.folder = cc, folder
        self.sources = ['main'] + sorted(f[:-2] for f in os.listdir(os.path.join(ROOT, 'tests')) if re.match(r'test_\w+\.c$', f))
        self.flags = {'plain': ['-std=c99', '-O0', '-DDSA_NO_SIMD'], 'code': ['-std=c99', '-O1', '-DDSA_NO_SIMD']}
        self.flags['checked'] = self.flags['code'] + ['-fsanitize=address,undefined', '-fno-sanitize-recover=all']

    def compile(self, flags, source, object_):
        return subprocess.run(PREFIX + [self.cc] + flags + ['-c', source, '-o', object_], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode == 0

    def prepare(self, pool):
        jobs = []
        for name in ('plain', 'checked'):
            os.makedirs(os.path.join(self.folder, name), exist_ok=True)
            for s in self.sources:
                flags = ['-O2' if f == '-O0' else f for f in self.flags[name]]
                jobs.append(pool.submit(self.compile, flags, os.path.join(ROOT, 'tests', s + '.c'), self.object(name, s)))
        if not all(j.result() for j in jobs):
            sys.exit('mutate.py: the tests do not compile')

    def object(self, name, source):
        return os.path.join(self.folder, name, source + '.o')

    def build(self, name, work, text):
        """Returns the object's bytes, or None where it does not compile; the program (not of 'code') is work/test."""
        flags = self.flags[name]
        os.makedirs(os.path.join(work, 'tests'), exist_ok=True)
        for target, body in (('dsa.h', text), ('tests/impl.c', open(os.path.join(ROOT, 'tests/impl.c')).read())):
            with open(os.path.join(work, target), 'w') as f:
                f.write(body)
        impl = os.path.join(work, 'impl.o')
        done = subprocess.run(PREFIX + [self.cc] + flags + ['-c', 'tests/impl.c', '-o', impl], cwd=work, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
        if done.returncode != 0:
            return None
        if name == 'code':
            return open(impl, 'rb').read()
        link = [self.cc] + flags + [impl] + [self.object(name, s) for s in self.sources] + ['-lm', '-pthread', '-o', work + '/test']
        if subprocess.run(link, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode != 0:
            return None
        return open(impl, 'rb').read()


def cpu_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_suite(program, suite, seconds, plain):
    """None if the suite passes, else how it ended. CPU time is what counts; the wall clock only ends what sleeps for ever."""
    def limits():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 2))
        if plain:
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    try:
        done = subprocess.run(PREFIX + [program, '-f', '-s', suite + '_suite'], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=60 + 5 * seconds, preexec_fn=limits)
    except subprocess.TimeoutExpired:
        return 'time'
    if done.returncode == 0:
        return None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return 'time'
    failed = re.search(rb'^FAIL (\w+)', done.stdout, re.M)
    return failed.group(1).decode() if failed else 'crash' if done.returncode < 0 else 'sanitizer or abort'


def judge(builder, text, original, usual, m, slot):
    """('killed', by) or ('same code' | 'no code' | 'survived', '')"""
    work = os.path.join(builder.folder, 'work%d' % slot)
    changed = apply(text, m)
    if builder.build('plain', work, changed) is None:
        return 'no code', ''
    order = list(dict.fromkeys(SECTIONS[m.section]))
    for suite in order:
        by = run_suite(work + '/test', suite, 3 + 4 * usual['plain', suite], True)
        if by:
            return 'killed', by
    if builder.build('code', work, changed) == original:
        return 'same code', ''
    builder.build('checked', work, changed)
    for suite in order[:2] + ['faults'] * ('faults' in order[2:]):
        by = run_suite(work + '/test', suite, 10 + 4 * usual['checked', suite], False)
        if by:
            return 'killed', by
    return 'survived', ''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sections', default=','.join(SECTIONS))
    parser.add_argument('--function', help='only mutants of this function')
    parser.add_argument('--sample', type=int, default=100)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--all', action='store_true', help='every mutant instead of a sample')
    parser.add_argument('--list', action='store_true', help='print the mutants and stop')
    parser.add_argument('--only', help='only mutants whose printed line holds this text')
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--seconds', type=float, default=0, help='start no further mutant after so many seconds')
    parser.add_argument('--prefix', default='', help='goes before each command, say: nice')
    parser.add_argument('--log', help='one line per mutant goes here as well; what is there already is not run again')
    args = parser.parse_args()
    sections = args.sections.split(',')
    PREFIX[:] = shlex.split(args.prefix)
    for s in sections:
        if s not in SECTIONS:
            parser.error('no such section: ' + s)
    text = open(os.path.join(ROOT, 'dsa.h')).read()
    mutants = mutants_of(text, sections, args.function)
    if args.only:
        mutants = [m for m in mutants if args.only in str(m)]
    total = len(mutants)
    if not args.all:
        mutants = random.Random(args.seed).sample(mutants, min(args.sample, total))
    if args.list:
        for m in mutants:
            print(m)
        print('%d of %d mutants' % (len(mutants), total))
        return 0

    reasons, counts, survivors, began = explained(), {}, [], time.time()
    done = {}
    if args.log and os.path.exists(args.log):
        for line in open(args.log):
            result, by, name = line.rstrip('\n').split('\t')
            done[name] = result, by
    lock, log = threading.Lock(), open(args.log, 'a') if args.log else None
    with tempfile.TemporaryDirectory(prefix='mutate') as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        builder, usual = Builder(os.environ.get('CC', 'cc'), folder), {}
        builder.prepare(pool)
        # The unchanged header: its object file, and the usual time of each suite. It must pass.
        work = os.path.join(folder, 'work0')
        original = builder.build('code', work, text)
        for name in ('plain', 'checked'):
            if builder.build(name, work, text) is None:
                sys.exit('mutate.py: dsa.h does not compile')
            for suite in SUITES:
                start = cpu_of_children()
                by = run_suite(work + '/test', suite, 600, name == 'plain')
                if by:
                    sys.exit('mutate.py: without any mutant, %s fails: %s' % (suite, by))
                usual[name, suite] = cpu_of_children() - start
        slots = list(range(1, args.jobs + 1))

        def one(m):
            if str(m) in done:
                result, by, slot = done[str(m)] + (None,)
            elif args.seconds and time.time() - began > args.seconds:
                return
            else:
                with lock:
                    slot = slots.pop()
                result, by = judge(builder, text, original, usual, m, slot)
            if result == 'survived' and m.key() in reasons:
                result, by = 'explained', reasons[m.key()]
            with lock:
                if slot is not None:
                    slots.append(slot)
                counts[result] = counts.get(result, 0) + 1
                if result == 'survived':
                    survivors.append(m)
                if log and slot is not None:
                    log.write('%s\t%s\t%s\n' % (result, by, m))
                    log.flush()
                if sys.stderr.isatty():
                    sys.stderr.write('\r%d of %d, %d survivors ' % (sum(counts.values()), len(mutants), len(survivors)))
        list(pool.map(one, mutants))

    for m in sorted(survivors, key=lambda m: m.at):
        print('survived  ' + str(m))
    real = counts.get('killed', 0) + counts.get('explained', 0) + counts.get('survived', 0)
    share = 100.0 * len(survivors) / max(1, real)
    print('%d mutants of %d (seed %d): %d killed, %d explained, %d survived (%.1f %%); %d the same code, %d no code; %.0f s' %
          (real, total, args.seed, counts.get('killed', 0), counts.get('explained', 0), len(survivors), share,
           counts.get('same code', 0), counts.get('no code', 0), time.time() - began))
    return 1 if share > 5 else 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except BrokenPipeError:
        sys.exit(1)

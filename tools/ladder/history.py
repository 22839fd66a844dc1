#!/usr/bin/env python3
"""The ladder whose rungs are commits: builds tools/bench of each and times them in turn, so that all see the same machine.

    python3 tools/ladder/history.py --rounds 4 b15e06b 395a551 HEAD -- --case score_select --context 64K --seconds 3

Prints for every case the lowest and the median ratio to the floor, per commit. What each rung did and what lost: README.md beside this.
"""
import json
import os
import subprocess
import sys
import tarfile
import io

RUNS = 4


def build(commit):
    name = subprocess.run(["git", "rev-parse", "--short", commit], capture_output=True, text=True, check=True).stdout.strip()
    home = os.path.join("build", "ladder", name)
    if not os.path.exists(os.path.join(home, "build", "bench")):
        tar = subprocess.run(["git", "archive", commit, "Makefile", "dsa.h", "tools", "examples"], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(tar)) as files:
            files.extractall(home)
        subprocess.run(["make", "-s", "-C", home, "build/bench"], check=True)
    return name, os.path.join(home, "build", "bench")


def main(args):
    rounds = RUNS
    if args[:1] == ["--rounds"] and len(args) > 1:
        rounds, args = int(args[1]), args[2:]
    split = args.index("--") if "--" in args else len(args)
    if split == 0:
        print(__doc__, file=sys.stderr)
        return 2
    rungs = [build(c) for c in args[:split]]
    ratios = {}
    for _ in range(rounds):
        for name, program in rungs:
            out = subprocess.run([program, "--json"] + args[split + 1:], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
            for line in out.splitlines():
                d = json.loads(line)
                if not d["case"].startswith("peak"):
                    key = tuple(str(d[k]) for k in ("case", "format", "input", "context", "queries", "threads", "isa"))
                    ratios.setdefault(key, {}).setdefault(name, []).append(d["ratio"])
    print("%-58s" % "case, format, input, context, queries, threads, isa", *("%13s" % name for name, _ in rungs))
    for key, by in ratios.items():
        cells = ["%.3f / %.3f" % (min(by[n]), sorted(by[n])[len(by[n]) // 2]) if n in by else "-" for n, _ in rungs]
        print("%-58s" % " ".join(key), *("%13s" % c for c in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

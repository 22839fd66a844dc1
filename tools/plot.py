#!/usr/bin/env python3
"""Draws the CSV of `build/bench --sweep FILE`: how one layer's cost grows with the context, dense beside DSA.

    plot.py build/sweep.csv [build/sweep.png]     the picture's name defaults to the CSV's with .png

Prints where DSA overtakes dense and how far it gets ahead. Without matplotlib it prints only that, says so, and leaves
the CSV as it is. Exit status: 0 success, 2 bad usage or bad input.
"""
import csv
import os
import sys

NAMES = {"decode": "decode, one token", "prefill": "prefill, a chunk of {} tokens"}


def read(path):
    """The title, and {phase: {mode: [(context, ms)]}} with the number of queries by phase; cut-off rows are left out."""
    title, rows = "", []
    with open(path, newline="") as f:
        for line in f:
            if line.startswith("#"):
                title = line[1:].strip()
            else:
                rows.append(line)
    curves, queries = {}, {}
    for row in csv.DictReader(rows):
        queries[row["phase"]] = int(row["queries"])
        modes = curves.setdefault(row["phase"], {"dsa": [], "dense": []})
        if row["ms"]:
            modes[row["mode"]].append((int(row["context"]), float(row["ms"])))
    return title, curves, queries


def short(n):
    return f"{n >> 20}M" if n >= 1 << 20 and n % (1 << 20) == 0 else f"{n >> 10}K"


def overtakes(modes):
    """The context from which on DSA stays quicker than dense, or None; and the largest context both were measured at."""
    dense, first = dict(modes["dense"]), None
    both = [(n, ms, dense[n]) for n, ms in modes["dsa"] if n in dense]
    for n, ms, other in both:
        if ms >= other:
            first = None
        elif first is None:
            first = n
    return first, both[-1] if both else None


def tell(phase, modes):
    first, last = overtakes(modes)
    if last is None:
        return f"{phase}: DSA and dense share no context"
    where = f"quicker from {short(first)} on" if first else "nowhere quicker"
    return f"{phase}: DSA is {where}; at {short(last[0])} it takes {last[1]:.4g} ms, dense {last[2]:.4g} ms ({last[2] / last[1]:.2f}x)"


def draw(plt, title, curves, queries, path):
    figure, axes = plt.subplots(1, len(curves), figsize=(6 * len(curves), 4.5), squeeze=False)
    for axis, (phase, modes) in zip(axes[0], curves.items()):
        for mode, colour, label in (("dense", "tab:gray", "dense"), ("dsa", "tab:blue", "DSA, top 2048")):
            axis.plot(*zip(*modes[mode]), marker="o", markersize=4, color=colour, label=label) if modes[mode] else None
        first, last = overtakes(modes)
        if first:
            axis.axvline(first, color="tab:blue", linewidth=0.8, linestyle=":")
        if last:
            axis.annotate(f"{last[2] / last[1]:.1f}x", (last[0], last[2]), textcoords="offset points", xytext=(-4, 7), ha="right")
        contexts = [n for n, _ in modes["dsa"]]
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.margins(y=0.12)
        axis.set_xticks(contexts[::2], [short(n) for n in contexts[::2]])
        axis.set_title(NAMES.get(phase, phase).format(queries[phase]))
        axis.set_xlabel("context, tokens")
        axis.set_ylabel("ms a call")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend()
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    if not 2 <= len(sys.argv) <= 3 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr if len(sys.argv) < 2 or sys.argv[1] != "--help" else sys.stdout)
        return 0 if sys.argv[1:] == ["--help"] else 2
    source = sys.argv[1]
    target = sys.argv[2] if len(sys.argv) == 3 else os.path.splitext(source)[0] + ".png"
    try:
        title, curves, queries = read(source)
    except (OSError, KeyError, ValueError) as error:
        print(f"plot.py: {source}: {error}", file=sys.stderr)
        return 2
    if not curves:
        print(f"plot.py: {source} has no rows", file=sys.stderr)
        return 2
    for phase, modes in curves.items():
        print(tell(phase, modes))
    try:
        import matplotlib
    except ImportError:
        print(f"plot.py: no picture, matplotlib is missing (pip install matplotlib); {source} is complete", file=sys.stderr)
        return 0
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    draw(plt, title, curves, queries, target)
    print(f"picture: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

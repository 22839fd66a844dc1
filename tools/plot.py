#!/usr/bin/env python3
"""Draws what the tools have measured; the picture's name defaults to the file's with .png.

    plot.py build/sweep.csv [PICTURE]      of `build/bench --sweep FILE`: one layer's cost over the context, dense beside DSA
    plot.py build/quality.json [PICTURE]   of `build/quality --json`: what the selected rows keep, and what the model loses
    plot.py build/recall.csv [PICTURE]     of `build/train_dsa --log FILE`: loss and KL over the steps

Prints the figures that the picture is about. Without matplotlib it prints only those, says so, and leaves the file as it
is. Exit status: 0 success, 2 bad usage or bad input.
"""
import csv
import json
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


def tell_quality(data):
    for budget in sorted({row["budget"] for row in data["layers"]}):
        rows = [row for row in data["layers"] if row["budget"] == budget]
        means = {key: sum(row[key] for row in rows) / len(rows) for key in ("mass", "window", "best", "recall", "error")}
        print(f"budget {budget:4}: " + ", ".join(f"{key} {mean:.3f}" for key, mean in means.items()))
    for row in data.get("retrieval", []):
        print(f"{row['attention']:6} {row['budget']:5}: {100 * row['accuracy']:.1f} % right, {row['bits_per_byte']:.4f} bits per byte")


def draw_quality(plt, data, path):
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5))
    layers, budgets = sorted({row["layer"] for row in data["layers"]}), sorted({row["budget"] for row in data["layers"]})
    for layer in layers:
        colour = f"C{layer % 10}"
        for key, style in (("mass", "-"), ("window", ":"), ("best", "--")):
            points = []
            for budget in budgets:
                rows = [row[key] for row in data["layers"] if row["layer"] == layer and row["budget"] == budget]
                points.append(sum(rows) / len(rows))
            marker, label = ("o", f"layer {layer}") if key == "mass" else (None, None)
            axes[0].plot(budgets, points, style, color=colour, marker=marker, markersize=4, label=label)
    axes[0].set_title("captured mass: selected (line), best (dashed), window (dotted)")
    modes = {}
    for row in data.get("retrieval", []):
        modes.setdefault(row["attention"], []).append(row)
    for axis, key, title in ((axes[1], "accuracy", "answers right"), (axes[2], "bits_per_byte", "bits per byte")):
        for mode, colour in (("dsa", "tab:blue"), ("window", "tab:orange")):
            rows = modes.get(mode, [])
            axis.plot([row["budget"] for row in rows], [row[key] for row in rows], marker="o", markersize=4, color=colour, label=mode)
        for row in modes.get("dense", []):
            axis.axhline(row[key], color="tab:gray", linewidth=1, label="dense")
        axis.set_title(title)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, budgets)
        axis.set_xlabel("rows kept")
        axis.grid(True, alpha=0.3)
        axis.legend()
    figure.suptitle(f"context {data['context']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def read_training(path):
    """{stage: [(step, loss, kl)]} in the order of the run; a step that a resumed run did again counts once."""
    stages = {}
    with open(path, newline="") as f:
        for row in csv.DictReader(f):
            stages.setdefault(row["stage"], {})[int(row["step"])] = (float(row["loss"]), float(row["kl"]))
    return {stage: [(step, *values) for step, values in sorted(rows.items())] for stage, rows in stages.items()}


def draw_training(plt, stages, path):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    before = 0
    for stage, rows in stages.items():
        steps = [before + row[0] for row in rows]
        axes[0].plot(steps, [row[1] for row in rows], label=stage)
        if stage != "dense":
            axes[1].plot(steps, [row[2] for row in rows], label=stage)
        before += rows[-1][0] + 1
    for axis, title in zip(axes, ("language-model loss, nats", "KL of the indexer, nats a row")):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(True, alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    if not 2 <= len(sys.argv) <= 3 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr if len(sys.argv) < 2 or sys.argv[1] != "--help" else sys.stdout)
        return 0 if sys.argv[1:] == ["--help"] else 2
    source = sys.argv[1]
    target = sys.argv[2] if len(sys.argv) == 3 else os.path.splitext(source)[0] + ".png"
    try:
        with open(source, encoding="utf-8") as f:
            start = f.read(11)
        if start.startswith("{"):
            with open(source, encoding="utf-8") as f:
                data = json.load(f)
            tell_quality(data)
            picture = lambda plt: draw_quality(plt, data, target)
        elif start.startswith("stage,step,"):
            stages = read_training(source)
            for stage, rows in stages.items():
                print(f"{stage}: {len(rows)} steps, loss {rows[0][1]:.4f} to {rows[-1][1]:.4f}, KL {rows[0][2]:.4f} to {rows[-1][2]:.4f}")
            picture = lambda plt: draw_training(plt, stages, target)
        else:
            title, curves, queries = read(source)
            if not curves:
                raise ValueError("no rows")
            for phase, modes in curves.items():
                print(tell(phase, modes))
            picture = lambda plt: draw(plt, title, curves, queries, target)
    except (OSError, KeyError, ValueError, TypeError) as error:
        print(f"plot.py: {source}: {error}", file=sys.stderr)
        return 2
    try:
        import matplotlib
    except ImportError:
        print(f"plot.py: no picture, matplotlib is missing (pip install matplotlib); {source} is complete", file=sys.stderr)
        return 0
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    picture(plt)
    print(f"picture: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

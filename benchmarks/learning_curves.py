"""Draw the learning curves of training runs that follow each other: loss, and J on windows for validation.

    python benchmarks/learning_curves.py runs/stills runs/joint runs/fine --out learning-curves.png

Reads the ``history.json`` of every run. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    figure, (loss, j) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    start = 0.0
    for run in arguments.runs:
        history = json.loads((run / "history.json").read_text())
        steps = [start + entry["step"] for entry in history]
        (line,) = loss.plot(steps, [entry["loss"] for entry in history], marker=".", label=run.name)
        j.plot(steps, [entry["j"] for entry in history], marker=".", color=line.get_color())
        start = steps[-1]
        for axes in (loss, j):
            axes.axvline(start, color="0.85", linewidth=1, zorder=0)
    loss.set_ylabel("training loss")
    loss.legend()
    j.set_ylabel("J, 64 windows of DAVIS-16 val")
    j.set_xlabel("steps")
    j.set_ylim(0, 1)
    figure.savefig(arguments.out, dpi=100)


if __name__ == "__main__":
    main()

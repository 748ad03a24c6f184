"""Draw the learning curves of consecutive training runs: loss and held-out J.

    python benchmarks/learning_curves.py runs/shipped/stills runs/shipped/trunk --out learning-curves.png

Reads the ``history.json`` of every run.
"""

import argparse
from pathlib import Path

from model.training.learning_curve import draw_learning_curve
from model.training.trainer import read_history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw_learning_curve({run.name: read_history(run) for run in arguments.runs}).save(arguments.out)


if __name__ == "__main__":
    main()

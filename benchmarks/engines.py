"""Draw what the engines take for a frame, beside the published loop, from figures of ``imcnet benchmark``.

    imcnet benchmark clip.mp4 --json resnet18.json
    imcnet benchmark clip.mp4 --backbone resnet50 --json resnet50.json
    python benchmarks/engines.py resnet18.json resnet50.json --out docs/engines.png

Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

STAGES = {"encode_ms": "encoding frames", "window_ms": "windows", "rest": "resizing, thresholds"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    documents = [json.loads(path.read_text()) for path in arguments.figures]
    figure, plots = plt.subplots(
        1, len(documents), figsize=(4.2 * len(documents), 3.2), layout="constrained", squeeze=False
    )
    for axes, document in zip(plots[0], documents, strict=True):
        engines = document["engines"]
        names = [engine["name"].replace("sampled deformable convolution", "sampled") for engine in engines]
        left = [0.0] * len(engines)
        for stage, label in STAGES.items():
            widths = [milliseconds(engine, stage) for engine in engines]
            axes.barh(names, widths, left=left, label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for place, engine in enumerate(engines):
            # A ratio that is bought with other masks is none.
            mark = f" ×{engine['ratio']:.1f}" + ("" if engine["passes"] or place < 2 else " (gate shut)")
            axes.text(left[place], place, mark, va="center", fontsize=8)
        for name in document.get("unavailable", {}):
            axes.barh([name], [0])
            axes.text(0, name, " unavailable", va="center", fontsize=8)
        axes.set_xlim(0, 1.3 * max(left))
        axes.invert_yaxis()
        axes.set_title(f"{document['backbone']}, {document['input_size']} × {document['input_size']}")
        axes.set_xlabel("ms a frame")
    for axes in plots[0][1:]:
        axes.set_yticklabels([])
    plots[0][0].legend(fontsize=8)
    figure.savefig(arguments.out, dpi=100)


def milliseconds(engine: dict[str, float], stage: str) -> float:
    if stage == "rest":
        return engine["ms_per_frame"] - engine["encode_ms"] - engine["window_ms"]
    return engine[stage]


if __name__ == "__main__":
    main()

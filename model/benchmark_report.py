"""Results of `model.benchmark`, as figures and as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from model.benchmark import Result

_HEAD = (
    "| engine | ms a frame | encode | window | times as fast | encodes | cached | flipped | IoU | MiB "
    "| on the GPU |"
)


def figures(result: Result) -> dict[str, Any]:
    """The figures of a candidate that has run, for JSON; times and ratios are medians over rounds."""
    agreement = result.agreement
    assert agreement is not None, "every candidate has run"
    return {
        "name": result.name,
        "ms_per_frame": result.milliseconds(lambda work: work.seconds),
        "encode_ms": result.milliseconds(lambda work: work.encode_s),
        "window_ms": result.milliseconds(lambda work: work.window_s),
        "ratio": result.speedup,
        "ratios": result.ratios,
        "encodes_per_frame": result.runs[-1].encoded / result.frames,
        "cached_frames": result.runs[-1].cached,
        "flipped": agreement.flipped,
        "iou": agreement.iou,
        "passes": result.passes,
        "memory_mib": max(work.memory_mib for work in result.runs),
        "device_mib": max(work.device_mib for work in result.runs),
        "runs": [asdict(work) for work in result.runs],
    }


def engine_table(found: Sequence[dict[str, Any]], *, decimals: int = 0) -> Iterator[str]:
    """Lines of a Markdown table, one for each candidate's ``figures``.

    Args:
        decimals: Of milliseconds.
    """
    yield _HEAD
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for one in found:
        times = " | ".join(f"{one[name]:.{decimals}f}" for name in ("ms_per_frame", "encode_ms", "window_ms"))
        low, high = min(one["ratios"]), max(one["ratios"])
        yield (
            f"| {one['name']} | {times} | {one['ratio']:.2f} ({low:.2f}-{high:.2f}) "
            f"| {one['encodes_per_frame']:.1f} | {one['cached_frames']} | {one['flipped']:.3%} "
            f"| {one['iou']:.4f} | {one['memory_mib']:.0f} | {one['device_mib']:.0f} |"
        )

"""How the engine on CUDA runs a program on static inputs, and how images get into them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

Maps = tuple[Tensor, ...]
Program = Callable[..., Maps]
Upload = Callable[[Sequence[Tensor], Tensor], object]

_WARM_UPS = 3


class Runner(Protocol):
    """Runs a program on ``inputs``, which the caller overwrites before each run."""

    inputs: Maps

    def run(self, count: int) -> Maps:
        """Return the program's outputs for the first ``count`` entries; later runs leave them alone."""
        ...


class EagerRunner:
    """Runs a program kernel by kernel, on any device."""

    def __init__(self, program: Program, inputs: Maps) -> None:
        self.inputs = inputs
        self._program = program

    def run(self, count: int) -> Maps:
        # Not slices: the entries that fill up the bucket need not stay in memory.
        return tuple(output[:count].clone() for output in self._program(*self.inputs))


class SharedByGraphs:
    """What the graphs of an engine share.

    Attributes:
        pool: Memory. The graphs do not run at the same time, and what one leaves in its outputs is copied
            before the next runs, so they may overwrite each other.
        stream: For warming up and capturing: libraries keep their workspaces by stream, and those must be
            there before the capture.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = new_stream()


class GraphRunner:
    """Captures a program once, and replays it."""

    def __init__(self, program: Program, inputs: Maps, shared: SharedByGraphs) -> None:
        pool, stream = shared.pool, shared.stream
        self.inputs = inputs
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):  # compiles Triton's kernels, and lets cuDNN choose its own
                program(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Of this thread only: what another one allocates meanwhile does not spoil the capture.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._outputs = program(*inputs)

    def run(self, count: int) -> Maps:
        self._graph.replay()
        return tuple(output[:count].clone() for output in self._outputs)


def new_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def stack_into(images: Sequence[Tensor], target: Tensor) -> None:
    torch.stack(tuple(images), out=target)


@dataclass(frozen=True)
class _Slot:
    pinned: Tensor
    staged: Tensor
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    taken: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class PinnedUpload:
    """Copies images to the device while it computes, through two slots by turns.

    The host waits only if both slots are still on their way.

    Args:
        like: Shape, type and device of a whole batch.
        copies: The stream that copies.
    """

    def __init__(self, like: Tensor, copies: torch.cuda.Stream) -> None:
        self._copies = copies
        slots = [
            _Slot(torch.empty(like.shape, dtype=like.dtype, pin_memory=True), torch.empty_like(like))
            for _ in range(2)
        ]
        for slot in slots:
            # The memory of `staged` may still be in use by what this stream has yet to do.
            slot.taken.record()
        self._slots = cycle(slots)

    def __call__(self, images: Sequence[Tensor], target: Tensor) -> None:
        """Put ``images``, ``(3, S, S)`` each, into ``target`` on the current stream."""
        slot = next(self._slots)
        slot.copied.synchronize()  # until then, the copy before still reads the pinned memory
        stack_into(images, slot.pinned)
        with torch.cuda.stream(self._copies):
            slot.taken.wait()
            slot.staged.copy_(slot.pinned, non_blocking=True)
            slot.copied.record()
        # Both buffers live as long as this object, and the current stream waits for every copy: so when they
        # are freed, no stream but this one can be using them, and record_stream has nothing to tell.
        slot.copied.wait()
        target.copy_(slot.staged)
        slot.taken.record()

"""Packets → decoded frames, leaving out what is damaged and keeping count of it."""

from collections.abc import Iterator

import av

from service.media import MediaLimits, OpenVideo, claimed_frames, no_frame, stream_duration_seconds

# How far short of its duration a video may end: seconds, a share of the duration, mean frame intervals (the
# last picture of a slide show stands for long).
_SHORTFALL_SECONDS, _SHORTFALL_FRACTION, _SHORTFALL_FRAMES = 0.5, 0.05, 2


def ends_early(declared_seconds: float, reached_seconds: float, *, frames: int) -> bool:
    """Whether a video of so many frames ends too far short of its declared duration to be complete."""
    tolerance = max(
        _SHORTFALL_SECONDS,
        _SHORTFALL_FRACTION * declared_seconds,
        _SHORTFALL_FRAMES * declared_seconds / max(frames, 1),
    )
    return declared_seconds - reached_seconds > tolerance


class PacketDecoder:
    """Packets → decoded frames, leaving out what cannot be decoded.

    ``packets`` and ``damaged`` count packets; ``broke_off``: the container could not be read to its end;
    ``out_of_memory``: reading or decoding would have taken more memory than the process may have. A damaged
    packet may ask for any amount, so that alone is no reason to give up. Some decoders call it damage.
    """

    def __init__(self, video: OpenVideo, limits: MediaLimits) -> None:
        self._video = video
        self._limits = limits
        self._key_seen = False
        self._reached_pts = 0  # where the last packet ends
        self.packets = 0
        self.damaged = 0
        self.broke_off = False
        self.out_of_memory = False

    def frames(self) -> Iterator[av.VideoFrame]:
        """Raises: UnusableVideo: ``dimensions_exceed_limit``."""
        try:
            for packet in self._video.container.demux(self._video.stream):
                yield from self._decode(packet)
        except av.FFmpegError as error:
            self.broke_off = True
            self.out_of_memory |= isinstance(error, MemoryError)

    def seconds(self, pts: int | None) -> float | None:
        time_base = self._video.stream.time_base
        return None if pts is None or time_base is None else float(pts * time_base)

    def reached_seconds(self) -> float:
        return self.seconds(self._reached_pts) or 0.0

    def declared_seconds(self) -> float | None:
        """The duration that the container claims for the video, which for MPEG-TS is what the file holds."""
        container, stream, _ = self._video
        if container.format.name == "avi" and stream.average_rate:
            # FFmpeg shortens the duration by what is missing of an AVI file; the header still tells.
            return float(stream.frames / stream.average_rate)
        declared = stream_duration_seconds(stream)
        if declared is None and container.duration is not None and len(container.streams) == 1:
            return container.duration / av.time_base
        return declared

    def claimed_frames(self) -> int | None:
        return claimed_frames(self._video.stream, self.declared_seconds())

    def _decode(self, packet: "av.Packet[av.VideoStream]") -> list[av.VideoFrame]:
        """The frames that a packet completes, or those left at the end, which an empty packet stands for."""
        start = packet.dts if packet.pts is None else packet.pts
        if start is not None:
            self._reached_pts = max(self._reached_pts, start + (packet.duration or 0))
        self._key_seen = self._key_seen or packet.is_keyframe
        self.packets += bool(packet.size)
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            self._check_size()
            self.out_of_memory |= isinstance(error, MemoryError)
            # A recording that starts between two key frames is not damaged for that.
            self.damaged += self._key_seen
            return []
        self.damaged += packet.is_corrupt or any(frame.is_corrupt for frame in frames)
        return frames

    def _check_size(self) -> None:
        """Tell a picture that the decoder refuses for its size from damage."""
        context = self._video.stream.codec_context
        if context.width * context.height > self._limits.max_pixels:
            raise no_frame(self._video, self._limits)

"""Where decoding may begin, and the cheapest way to the frames that are wanted.

A decoder that starts in the middle of a stream must show exactly what one that came from the start would. A
container's keyframe flag does not promise that, so the packet itself is read: only a picture after which the
codec's own rules forbid any look back is an entry. Everything else is known from the packets: in which
order they are decoded and when each is shown.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import av
from av.container import InputContainer

SAME_TIME = 1e-6  # s; timestamps are rationals with denominators up to 90,000 and more, compared as floats.

# What one seek costs, in decoded packets: finding the place, and filling the decoder again, which shows a
# picture only after those it reorders. benchmarks/decode.py measures 3.3 to 4.7 (H.264, 180p to 1080p).
SEEK_PACKETS = 4
# A whole file is read by seeking only if that costs at most this share of one pass to its end: the pass also
# finds damage between the frames that are wanted, which is worth more than a little time.
WHOLE_FILE_SHARE = 0.75


class LandedElsewhereError(Exception):
    """A seek did not reach its packet, or what was decoded from there is not what the timeline says."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A packet that decoding may start from; ticks are of its stream's time base."""

    order: int  # how many packets of the stream are decoded before it
    time: float  # s, when it is shown
    pts: int
    dts: int | None
    position: int | None  # byte in the file
    size: int

    def is_packet(self, packet: av.Packet) -> bool:
        return (packet.pts, packet.pos, packet.size) == (self.pts, self.position, self.size)


@dataclasses.dataclass
class Run:
    """Targets that are decoded in one go, from an entry or (None) from the start of the stream."""

    entry: Entry | None
    targets: list[float]
    shown: list[float]  # for each target the time of the packet whose frame is on screen then
    last: int  # how many packets are decoded before the last one that is needed

    @property
    def packets(self) -> int:
        return self.last + 1 - (self.entry.order if self.entry else 0)


def on_screen(times: Sequence[float], time: float) -> int:
    """Which of ascending `times` is the one of the frame shown at `time`; the first before all of them."""
    return max(bisect.bisect_right(times, time + SAME_TIME) - 1, 0)


def plan_runs(
    times: Sequence[float], decoded: Sequence[float], entries: Sequence[Entry], targets: Sequence[float]
) -> list[Run]:
    """The runs of a decoder that seeks: each from the entry before its first target, merged where going on
    decoding costs no more than a seek.

    Args:
        times: when the stream's frames are shown, ascending.
        decoded: the same times in the order of decoding.
        entries: where decoding may begin, ascending.
        targets: times to show, ascending.
    """
    order = {time: number for number, time in enumerate(decoded)}
    starts = [entry.time for entry in entries]
    runs: list[Run] = []
    for target in targets:
        shown = times[on_screen(times, target)]
        found = bisect.bisect_right(starts, shown) - 1
        entry = entries[found] if found >= 0 and entries[found].order > 0 else None
        ahead = (entry.order if entry else 0) - runs[-1].last - 1 if runs else 0
        if not runs or ahead > SEEK_PACKETS:
            runs.append(Run(entry, [], [], 0))
        run = runs[-1]
        run.targets.append(target)
        run.shown.append(shown)
        run.last = max(run.last, order[shown])
    return runs


def seek_cost(runs: Sequence[Run]) -> int:
    """What runs cost, in decoded packets."""
    return sum(run.packets + (SEEK_PACKETS if run.entry else 0) for run in runs)


def seeking_pays(runs: Sequence[Run], packets: int, whole_file: bool) -> bool:
    """Whether runs are better than one pass: to the last of `packets` for a whole file, else to the last
    frame that is wanted. A whole file is read to its end unless there is something to leap over."""
    if whole_file:
        return any(run.entry for run in runs) and seek_cost(runs) <= WHOLE_FILE_SHARE * packets
    return seek_cost(runs) < max(run.last for run in runs) + 1


def decode_from(
    container: InputContainer, stream: av.video.stream.VideoStream | av.audio.stream.AudioStream, entry: Entry
) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Decodes a stream from an entry to its end.

    Raises:
        LandedElsewhereError: the container did not lead to the entry's packet.
    """
    begun = False
    # Containers index by presentation (Matroska) or by decoding time (mp4), which is earlier.
    for ticks in dict.fromkeys((entry.pts, entry.pts if entry.dts is None else entry.dts)):
        try:
            container.seek(ticks, stream=stream, backward=True)
        except av.error.FFmpegError:
            continue
        for packet in container.demux(stream):
            if not begun:
                if packet.pts is not None and packet.pts > entry.pts:
                    break  # it landed behind the entry
                begun = entry.is_packet(packet)
            if begun:
                yield from packet.decode()
        if begun:
            return
    raise LandedElsewhereError


# Entries, by codec
# -------------------------------------------------------------------------------------------------------


def starts_afresh(codec: str, extradata: bytes | None, data: bytes) -> bool:
    """Whether a packet begins with a picture after which no frame shown later looks back beyond it.

    Args:
        codec: FFmpeg's name of the codec; any but those below gives False.
        extradata: the codec's header in the container, which says how H.264 and HEVC packets are divided.
        data: the packet.
    """
    check = _CHECKS.get(codec)
    return check is not None and check(extradata or b"", data)


def _nal_types(extradata: bytes, data: bytes, length_byte: int) -> Iterator[int]:
    """First byte of each NAL unit: behind lengths if the extradata is a configuration record, else after
    start codes (ITU-T H.264 annex B; ISO/IEC 14496-15 for the records)."""
    if len(extradata) > length_byte and extradata[0] == 1:
        width, place = (extradata[length_byte] & 3) + 1, 0
        while place + width < len(data):
            yield data[place + width]
            place += width + int.from_bytes(data[place : place + width], "big")
    else:
        place = data.find(b"\0\0\1")
        while 0 <= place < len(data) - 3:
            yield data[place + 3]
            place = data.find(b"\0\0\1", place + 3)


def _h264(extradata: bytes, data: bytes) -> bool:
    """An IDR picture (nal_unit_type 5, ITU-T H.264 table 7-1)."""
    for byte in _nal_types(extradata, data, 4):
        if 1 <= byte & 31 <= 5:
            return byte & 31 == 5
    return False


def _hevc(extradata: bytes, data: bytes) -> bool:
    """An IRAP picture (nal_unit_type 16 to 21, ITU-T H.265 table 7-1): what follows it in both orders does
    not look back; what is shown before it may, and is never taken from there."""
    for byte in _nal_types(extradata, data, 21):
        kind = byte >> 1 & 63
        if kind < 32:
            return 16 <= kind <= 21
    return False


def _av1(extradata: bytes, data: bytes) -> bool:
    """A shown key frame behind a sequence header (AV1 bitstream specification 5.3 to 5.9, 7.20)."""
    place, sequence = 0, False
    while place < len(data):
        header = data[place]
        kind = header >> 3 & 15
        place += 2 if header & 4 else 1
        size = len(data) - place
        if header & 2:  # leb128
            size = 0
            for shift in range(0, 56, 7):
                if place >= len(data):
                    return False
                byte = data[place]
                place += 1
                size |= (byte & 127) << shift
                if byte < 128:
                    break
        if kind in (3, 6):  # frame header, frame: show_existing_frame 0, frame_type 0, show_frame 1
            return sequence and place < len(data) and data[place] >> 4 == 1
        sequence = sequence or kind == 1
        place += size
    return False


def _vp9(extradata: bytes, data: bytes) -> bool:
    """A key frame (VP9 bitstream specification 6.2): it replaces all references."""
    if not data or data[0] >> 6 != 2:
        return False
    shift = 2 if data[0] >> 4 & 3 == 3 else 3  # profile 3 has a reserved bit
    return data[0] >> shift & 1 == 0 and data[0] >> (shift - 1) & 1 == 0


def _vp8(extradata: bytes, data: bytes) -> bool:
    """A key frame (RFC 6386, 9.1)."""
    return bool(data) and data[0] & 1 == 0


def _mpeg4(extradata: bytes, data: bytes) -> bool:
    """An intra-coded VOP (ISO/IEC 14496-2, 6.2.5)."""
    place = data.find(b"\0\0\1\xb6")
    return 0 <= place < len(data) - 4 and data[place + 4] >> 6 == 0


_CHECKS = {"h264": _h264, "hevc": _hevc, "av1": _av1, "vp9": _vp9, "vp8": _vp8, "mpeg4": _mpeg4}

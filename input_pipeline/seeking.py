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


PARAMETRIC_CODECS = ("h264", "hevc", "mpeg4")


def parameter_sets(codec: str, extradata: bytes | None, data: bytes | None = None) -> frozenset[bytes]:
    """What a packet, or (None) the extradata, lays down for the pictures from there on until it is replaced.

    H.264's and HEVC's parameter sets and MPEG-4's video object layers. A decoder that starts behind some that
    the container does not have knows nothing of them, and may decode to other pictures without an error. In
    AV1, VP9 and VP8 an entry carries all that it needs.
    """
    extradata = extradata or b""
    if codec == "mpeg4":
        units = _behind_start_codes(extradata if data is None else data)
        return frozenset(unit for unit in units if 0x20 <= unit[0] <= 0x2F)
    if codec not in PARAMETRIC_CODECS:
        return frozenset()
    units = _record_units(codec, extradata) if data is None else _units(codec, extradata, data)
    if codec == "h264":
        return frozenset(unit for unit in units if unit[0] & 31 in (7, 8))
    return frozenset(unit for unit in units if 32 <= unit[0] >> 1 & 63 <= 34)


# Where a configuration record says how many bytes give a unit's length (ISO/IEC 14496-15, 5.3.3 and 8.3.3).
_LENGTH_BYTES = {"h264": 4, "hevc": 21}


def _units(codec: str, extradata: bytes, data: bytes) -> Iterator[bytes]:
    """A packet's NAL units: behind lengths if the extradata is a configuration record, else after start codes."""
    length_byte = _LENGTH_BYTES[codec]
    if len(extradata) <= length_byte or extradata[0] != 1:
        yield from _behind_start_codes(data)
        return
    width, place = (extradata[length_byte] & 3) + 1, 0
    while place + width < len(data):
        size = int.from_bytes(data[place : place + width], "big")
        place += width
        if size:
            yield data[place : place + size]
        place += size


def _behind_start_codes(data: bytes) -> Iterator[bytes]:
    """The units of a byte stream (ITU-T H.264 annex B; ISO/IEC 14496-2, 6.2.1), the codes left out."""
    place = data.find(b"\0\0\1")
    while 0 <= place < len(data) - 3:
        end = data.find(b"\0\0\1", place + 3)
        # Zeros in front of the next code are the code's.
        unit = data[place + 3 : end if end >= 0 else len(data)].rstrip(b"\0")
        yield unit or b"\0"
        place = end


def _record_units(codec: str, extradata: bytes) -> Iterator[bytes]:
    """The NAL units of a configuration record (ISO/IEC 14496-15, 5.3.3 and 8.3.3), or of a byte stream."""
    if len(extradata) <= _LENGTH_BYTES[codec] or extradata[0] != 1:
        yield from _behind_start_codes(extradata)
        return
    arrays = 2 if codec == "h264" else int.from_bytes(extradata[22:23], "big")
    place = 5 if codec == "h264" else 23
    for _ in range(arrays):
        if codec == "h264":  # first those of sequences, in five bits, then those of pictures
            count = int.from_bytes(extradata[place : place + 1], "big") & 31
            place += 1
        else:
            count = int.from_bytes(extradata[place + 1 : place + 3], "big")
            place += 3
        for _ in range(count):
            size = int.from_bytes(extradata[place : place + 2], "big")
            if place + 2 + size > len(extradata):
                return
            if size:
                yield extradata[place + 2 : place + 2 + size]
            place += 2 + size


def _h264(extradata: bytes, data: bytes) -> bool:
    """An IDR picture (nal_unit_type 5, ITU-T H.264 table 7-1)."""
    for unit in _units("h264", extradata, data):
        if 1 <= unit[0] & 31 <= 5:
            return unit[0] & 31 == 5
    return False


def _hevc(extradata: bytes, data: bytes) -> bool:
    """An IRAP picture (nal_unit_type 16 to 21, ITU-T H.265 table 7-1): what follows it in both orders does
    not look back; what is shown before it may, and is never taken from there."""
    for unit in _units("hevc", extradata, data):
        kind = unit[0] >> 1 & 63
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

"""What sound files state about their own end, where FFmpeg does not tell: whether one is cut off.

Bytes in, no decoding. Containers whose length FFmpeg passes on are dealt with in containers.py.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

UNSTATED = (0, 0xFFFFFFFF)  # Sizes in the header of a WAV that was written to a pipe or never finished.
OGG_TAIL = 128 * 1024  # bytes; an Ogg page has at most 65,307 (RFC 3533, section 6)
OGG_LAST = 0x04  # a page's flag
MP3_TAG_REACH = (
    4 + 2 + 32 + 8
)  # A frame's header, checksum and longest side information; the tag's name and flags.


def wav_bytes_missing(file: BinaryIO) -> int:
    """By how much the file is shorter than its data chunk states; 0 if that states nothing.

    RIFF, its big-endian sister RIFX, and RF64 (EBU Tech 3306) with its sizes of 64 bits.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    magic, place, long_size = file.read(12)[:4], 12, None
    order = ">" if magic == b"RIFX" else "<"
    while place + 8 <= end:
        file.seek(place)
        name, size = struct.unpack(f"{order}4sI", file.read(8))
        if name == b"ds64" and place + 24 <= end:
            _, long_size = struct.unpack("<QQ", file.read(16))
        if name == b"data":
            if long_size is not None and size == 0xFFFFFFFF:
                size = long_size
            return 0 if size in UNSTATED else max(place + 8 + size - end, 0)
        place += 8 + size + size % 2
    return 0


def ogg_is_ended(file: BinaryIO) -> bool:
    """Whether every stream with pages at the end of the file has its last page there, and that one whole."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - OGG_TAIL, 0))
    tail, ended = file.read(), {}
    place = tail.find(b"OggS\0")
    while 0 <= place <= len(tail) - 27:
        flags, serial, segments = tail[place + 5], tail[place + 14 : place + 18], tail[place + 26]
        table = tail[place + 27 : place + 27 + segments]
        size = 27 + segments + sum(table)
        whole = len(table) == segments and place + size <= len(tail)
        ended[serial] = whole and bool(flags & OGG_LAST)
        place = tail.find(b"OggS\0", place + (size if whole else 4))
    return bool(ended) and all(ended.values())


def mp3_states_length(file: BinaryIO) -> bool:
    """Whether the first frame is a Xing or Info tag that counts the frames; without one FFmpeg guesses."""
    file.seek(0)
    place, head = 0, file.read(10)
    while len(head) == 10 and head.startswith(b"ID3"):
        size = 0
        for byte in head[6:10]:  # seven bits each (ID3v2.4.0, section 6.2), without header and footer
            size = size << 7 | byte & 0x7F
        place += 10 + size + (10 if head[5] & 0x10 else 0)
        file.seek(place)
        head = file.read(10)
    file.seek(place)
    frame = file.read(4096).lstrip(b"\0")[:MP3_TAG_REACH]
    found = max(frame.find(b"Xing"), frame.find(b"Info"))
    return 4 <= found <= len(frame) - 8 and bool(frame[found + 7] & 1)

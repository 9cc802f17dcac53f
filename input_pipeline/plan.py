"""What a run will do, settled before it starts: the listing by media file, cut into shards, with a sha256.

The cut depends on the listing alone, never on how many machines or processes work on it: that is why the
shards come out the same for any number of them, and why a killed run can be taken up.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import msgpack

from input_pipeline.containers import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from input_pipeline.manifest import MediaLine, group_by_media
from input_pipeline.paths import AnyPath, appearing

# Room that a media file takes in a shard; about the bytes of its record at the default MediaSpec.
WEIGHTS = {"image": 1, "audio": 4, "video": 16}
WANTED_SHARDS = 64  # Enough for the cores of one machine, while few files are to be kept.
SMALLEST_SHARD = WEIGHTS["video"]
LARGEST_SHARD = 256 * WEIGHTS["video"]  # 256 videos or 4096 images: some 500 MB, minutes of one core's work.


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One shard's part of the plan's file: bytes `start` to `start + size`."""

    index: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is to be done.

    Attributes:
        groups: the lines of each media file; each group becomes one record.
        shards: their parts of the file that `write` makes.
        sha256: of the groups and of the settings that shape the records.
    """

    groups: list[list[MediaLine]]
    shards: list[ShardPlan]
    sha256: str

    def write(self, path: AnyPath) -> None:
        """Writes the groups, one msgpack value after the other, as `read_groups` reads them."""
        with appearing(path) as temporary, open(temporary, "wb") as file:
            file.writelines(map(_pack, self.groups))


def make_plan(lines: Iterable[MediaLine], settings: Mapping[str, Any]) -> Plan:
    """Plans the records of these lines.

    Args:
        lines: what to prepare.
        settings: everything else that shapes the records (media spec, limits, ...), as JSON values; another
            value makes another plan.
    """
    groups = group_by_media(lines)
    digest = hashlib.sha256(msgpack.packb(sorted(settings.items())))
    shards, start, size = [], 0, 0
    for opens, group in zip(_opens_shard(groups), groups, strict=True):
        if opens and size:
            shards.append(ShardPlan(len(shards), start, size))
            start, size = start + size, 0
        packed = _pack(group)
        digest.update(packed)
        size += len(packed)
    if size:
        shards.append(ShardPlan(len(shards), start, size))
    return Plan(groups, shards, digest.hexdigest())


def read_groups(path: AnyPath, shard: ShardPlan) -> list[list[dict[str, Any]]]:
    """The groups of one shard, each line as the fields of a MediaLine."""
    with path.open("rb") as file:
        file.seek(shard.start)
        data = file.read(shard.size)
    unpacker = msgpack.Unpacker(max_buffer_size=shard.size, strict_map_key=False)
    unpacker.feed(data)
    return list(unpacker)


def _opens_shard(groups: Sequence[Sequence[MediaLine]]) -> Iterator[bool]:
    """For each group in order, whether a new shard begins with it: whenever the room of one more is filled."""
    weights = [WEIGHTS[media_kind(group[0])] for group in groups]
    capacity = min(max(-(-sum(weights) // WANTED_SHARDS), SMALLEST_SHARD), LARGEST_SHARD)
    filled, last = 0, -1
    for weight in weights:
        yield filled // capacity > last
        last = filled // capacity
        filled += weight


def media_kind(line: MediaLine) -> str:
    """Is it "video", "audio" or "image", by the suffix where the line does not say."""
    if line.kind != "auto":
        return line.kind
    suffix = PurePosixPath(line.path).suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else "video"


def _pack(group: Sequence[MediaLine]) -> bytes:
    return msgpack.packb([vars(line) for line in group])

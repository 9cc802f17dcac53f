"""Records: one media file with its conversations as one msgpack map, in ArrayRecord shards with a manifest.

A folder of records holds

    shard-00000-of-00002.array_record   the records, group_size:1 for random access
    manifest.json                       schema version, MediaSpec, counts, sha256 of every shard
    samples.jsonl                       one line per sample: its record, number, id, task, source, conversations
    rejected.jsonl                      one line per manifest line that failed: path, id, reason, stage
    lengths/                            token lengths of the samples, kept by training (see lengths.py)

It is written beside its final place, shard by shard, and renamed when complete: a folder that has its name is
whole (see working_folder.py). A finished shard has a sidecar there, so that a killed run can be taken up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import msgpack
import numpy as np
from PIL import Image

from input_pipeline.errors import UserError
from input_pipeline.features import feature_shapes, keep_large_buffers
from input_pipeline.paths import AnyPath, appearing, file_size, is_remote, map_files, to_path, write_text
from input_pipeline.spec import PIXELS, MediaSpec

if TYPE_CHECKING:
    from input_pipeline.media import LoadedMedia

SCHEMA_VERSION = 2  # 2: samples.jsonl holds the conversations.
# 45 dB on real footage (nasa_13013.mp4), far above what H.264 left of it, in 25 KiB a frame of 384 x 384. 95 gives 48 dB
# in 37 KiB, and JPEG decoding is what a loader spends its time on.
JPEG_QUALITY = 90
JPEG_SUBSAMPLING = 0  # 4:4:4. Pictures are already small here; halving their colour once more would show.
PCM_SCALE = 32768.0  # int16 full scale; a 16 kHz 16-bit source passes through unchanged.
# Random access reads one record and not its neighbours. JPEG and features do not shrink, and a reader would spend
# milliseconds a clip on finding that out.
WRITER_OPTIONS = "group_size:1,uncompressed"
MANIFEST, SAMPLES, REJECTED = "manifest.json", "samples.jsonl", "rejected.jsonl"
OPEN_SHARDS = 256  # Of a process, which may open 1024 files on most systems. Opening one anew takes 40 us.
SIDECAR = ".json"  # Behind a shard's name; a finished folder holds none.
# Without --overwrite records whose plan is the same are not made anew.
MAKE_AGAIN = "`avlm prepare --overwrite` makes records again, `avlm cache-features --overwrite` features"
LENGTHS = "lengths"  # What training computes once and keeps; not part of the records.
# max_intervals is not baked into a record: times are parsed from the question when it is loaded.
BAKED_FIELDS = ("num_frames", "image_size", "sampler", "window_frames", "max_windows")


class RecordError(UserError):
    """A folder of records that is missing, unfinished, damaged, or made for another MediaSpec."""


def encode_record(
    media: LoadedMedia, *, media_id: str, source: str = "", samples: Sequence[Mapping[str, Any]] = ()
) -> bytes:
    """Packs one media file and its conversations; frames become JPEG (quality 90, 4:4:4), sound int16.

    Args:
        media: what `load_media` returned.
        media_id: the key of the media file within its data set.
        source: name of the data set.
        samples: maps with "id", "task", "conversations" and any further keys; they are kept as they are.
    """
    windows = [
        {"span": [start, end], "pcm": _to_int16(samples).tobytes()} for start, end, samples in media.windows
    ]
    record = {
        "schema": SCHEMA_VERSION,
        "id": media_id,
        "source": source,
        "duration": float(media.duration),
        "has_video": media.has_video,
        "has_audio": media.has_audio,
        "frames": [_to_jpeg(frame) for frame in media.frames],
        "frame_times": [float(t) for t in media.frame_times],
        "windows": windows,
        "samples": [dict(sample) for sample in samples],
    }
    return msgpack.packb(record, use_bin_type=True)


def unpack_record(data: bytes) -> dict[str, Any]:
    """The record's map as stored (JPEG and PCM still encoded). Raises RecordError for another schema."""
    try:
        record = msgpack.unpackb(data, raw=False)
        version = record["schema"]
    except (ValueError, msgpack.exceptions.UnpackException, KeyError, TypeError) as error:
        raise RecordError(f"this is no record of schema {SCHEMA_VERSION} ({type(error).__name__})") from None
    if version != SCHEMA_VERSION:
        raise RecordError(f"record has schema {version}, this program reads {SCHEMA_VERSION}; {MAKE_AGAIN}")
    return record


# Writing
# ---------------------------------------------------------------------------------------------------------


def shard_name(index: int, num_shards: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}-of-{num_shards:05d}.array_record"


def write_shard(
    folder: str | os.PathLike[str],
    index: int,
    num_shards: int,
    records: Iterable[bytes],
    *,
    rejected: Iterable[Mapping[str, str]] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes one shard under its final name, and after it a sidecar that says it is whole.

    Both appear at once and complete, whenever the process is killed; the same records give the same bytes.

    Args:
        folder: the working folder, local or gs://; it exists.
        index, num_shards: which shard of how many.
        records: made by `encode_record`; may be none.
        rejected: rows of rejected.jsonl for what did not become a record; looked at after `records` has
            ended, so a generator of records may fill it.
        extra: further JSON values of the entry; looked at after `records` has ended, too.

    Returns:
        The entry for `finish_records`: "file", "count" (records), "sha256", "bytes", "samples", "rejected"
        (both counted) and `extra`.
    """
    folder, name = to_path(folder), shard_name(index, num_shards)
    sample_rows: list[dict[str, Any]] = []
    with appearing(folder / name) as temporary:
        count = _write_array_record(temporary, records, sample_rows)
        digest, size = sha256(temporary), temporary.stat().st_size
    rejected_rows = [dict(row) for row in rejected]
    entry = {
        "file": name,
        "count": count,
        "sha256": digest,
        "bytes": size,
        "samples": len(sample_rows),
        "rejected": len(rejected_rows),
        **(extra or {}),
    }
    sidecar = {"entry": entry, "sample_rows": sample_rows, "rejected_rows": rejected_rows}
    write_text(folder / f"{name}{SIDECAR}", json.dumps(sidecar, ensure_ascii=False))
    return entry


def finished_shard(
    folder: str | os.PathLike[str], index: int, num_shards: int, *, verify: bool = True
) -> dict[str, Any] | None:
    """The entry of a shard that an earlier, killed run has finished; None if it must be made (again).

    Args:
        folder, index, num_shards: as for `write_shard`.
        verify: also compare the sha256 of a local shard; the size is compared always. An object of Cloud
            Storage appears whole and is kept with a checksum of its own.
    """
    shard = to_path(folder) / shard_name(index, num_shards)
    sidecar = _read_sidecar(shard)
    if sidecar is None:
        return None
    entry = sidecar["entry"]
    try:
        size = file_size(shard)
    except FileNotFoundError:
        return None
    if size != entry["bytes"] or (verify and not is_remote(shard) and sha256(shard) != entry["sha256"]):
        return None
    return entry


def finish_records(
    folder: str | os.PathLike[str],
    spec: MediaSpec,
    entries: Iterable[Mapping[str, Any]],
    *,
    plan: str,
    manifest_lines: int,
    rejected: Iterable[Mapping[str, str]] = (),
    **sections: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Writes samples.jsonl, rejected.jsonl and, last of all, manifest.json beside finished shards.

    Args:
        folder: where `write_shard` wrote.
        spec: what the records were made for.
        entries: of all shards, in order.
        plan: sha256 of what was asked for; the same plan gives the same records.
        manifest_lines: how many lines (or files) were asked for, rejected ones included.
        rejected: rows of rejected.jsonl for lines that came into no shard; they stand first.
        sections: further sections of the manifest, by name; None leaves one out. "features" says what records of
            cached features hold, "audio_backend" what else than PyAV has read the sound.

    Returns:
        The manifest.

    Raises:
        RecordError: a shard's sidecar is missing or damaged.
    """
    folder = to_path(folder)
    shards, counts = [], {"records": 0, "samples": 0, "rejected": 0}
    with appearing(folder / SAMPLES) as sample_path, appearing(folder / REJECTED) as rejected_path:
        with (
            open(sample_path, "w", encoding="utf-8") as sample_file,
            open(rejected_path, "w", encoding="utf-8") as rejected_file,
        ):
            counts["rejected"] += _write_rows(rejected_file, rejected)
            entries = list(entries)
            sidecars = map_files(_read_sidecar, (folder / entry["file"] for entry in entries), folder)
            for entry, sidecar in zip(entries, sidecars, strict=True):
                if sidecar is None:
                    raise RecordError(f"{folder / entry['file']}{SIDECAR} is missing or damaged; run again")
                first = counts["records"]
                rows = ({**row, "record": first + row["record"]} for row in sidecar["sample_rows"])
                counts["samples"] += _write_rows(sample_file, rows)
                counts["rejected"] += _write_rows(rejected_file, sidecar["rejected_rows"])
                counts["records"] += entry["count"]
                shards.append({key: entry[key] for key in ("file", "count", "sha256", "bytes")})
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "media_spec": dataclasses.asdict(spec),
        "counts": {"manifest_lines": manifest_lines, **counts},
        "plan": plan,
        **{name: dict(section) for name, section in sections.items() if section is not None},
        "shards": shards,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def _write_array_record(path: Path, records: Iterable[bytes], sample_rows: list[dict[str, Any]]) -> int:
    """Writes the records and appends a row per sample; returns their number."""
    # not needed by decoding workers
    from array_record.python.array_record_module import ArrayRecordWriter

    count, writer = 0, ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        for data in records:
            writer.write(data)
            sample_rows.extend(_sample_rows(unpack_record(data), count))
            count += 1
    finally:
        writer.close()
    return count


def _sample_rows(record: Mapping[str, Any], number: int) -> Iterator[dict[str, Any]]:
    for index, sample in enumerate(record["samples"]):
        yield {
            "record": number,
            "sample": index,
            "id": sample.get("id", ""),
            "task": sample.get("task", ""),
            "source": sample.get("source", record["source"]),
            "has_video": record["has_video"],
            "has_audio": record["has_audio"],
            "conversations": sample.get("conversations", []),
        }


def _write_rows(file: TextIO, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    for row in rows:
        file.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
        count += 1
    return count


def _read_sidecar(shard: AnyPath) -> dict[str, Any] | None:
    try:
        sidecar = json.loads(shard.with_name(f"{shard.name}{SIDECAR}").read_text())
        return sidecar if sidecar.keys() >= {"entry", "sample_rows", "rejected_rows"} else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


# Reading
# ---------------------------------------------------------------------------------------------------------


class RecordReader:
    """Random access to a folder of records: `reader[i]` is the i-th record's bytes, for `decode_record`.

    May be pickled into loader processes and read from several threads.

    Attributes:
        spec: the MediaSpec the records were made with.
        manifest: manifest.json.
        features: what its records hold as features instead of pictures and samples.

    Raises:
        RecordError: the folder is no finished folder of records, a shard is missing or has another size than
            the manifest says, or the records were made for another MediaSpec than `spec`.
    """

    def __init__(self, directory: str | os.PathLike[str], spec: MediaSpec | None = None) -> None:
        if is_remote(directory):
            raise RecordError(
                f"{os.fspath(directory)}: records are read from a file system; mount the bucket with Cloud Storage "
                "FUSE (gcsfuse) or copy the folder with `gcloud storage cp --recursive`, and name the local path"
            )
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        self.spec = MediaSpec(**self.manifest["media_spec"])
        self.features = feature_shapes(self.manifest)
        if spec is not None:
            check_spec(self.spec, spec, self.directory)
        self._first: list[int] = []  # number of the first record of each shard
        self._paths: list[Path] = []
        count = 0
        for shard in self.manifest["shards"]:
            path = self.directory / shard["file"]
            if not path.exists():
                raise RecordError(
                    f"{path} is missing, though manifest.json names it; copy it or {MAKE_AGAIN}"
                )
            if path.stat().st_size != shard["bytes"]:
                raise RecordError(
                    f"{path} has {path.stat().st_size} bytes, manifest.json says {shard['bytes']}; "
                    f"copy it again or {MAKE_AGAIN}"
                )
            self._paths.append(path)
            self._first.append(count)
            count += shard["count"]
        self._count = count

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the manifest, which holds the sha256 of every shard."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The rows of samples.jsonl, in order, read when first asked for; RecordError if they are damaged."""
        path = self.directory / SAMPLES
        try:
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
        except (OSError, ValueError) as error:
            raise RecordError(f"{path} cannot be read ({error}); {MAKE_AGAIN}") from None
        expected = self.manifest["counts"]["samples"]
        if len(rows) != expected:
            raise RecordError(f"{path} has {len(rows)} lines, manifest.json says {expected}; {MAKE_AGAIN}")
        return rows

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < self._count:
            raise IndexError(f"record {index} of {self._count} in {self.directory}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        if self.features != PIXELS:
            keep_large_buffers()
        try:
            reader = _open_shard(self._paths[shard], self.manifest["shards"][shard]["sha256"])
            (data,) = reader.read([index - self._first[shard]])
        except Exception as error:  # array_record raises bare RuntimeError and IndexError
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RecordError(
                f"{self._paths[shard]}: record {index} cannot be read ({reason}); the shard is damaged, "
                f"copy it again or {MAKE_AGAIN}"
            ) from None
        return data

    def verify(self) -> None:
        """Compares every shard's sha256 with the manifest's; RecordError names the one that differs."""
        for path, shard in zip(self._paths, self.manifest["shards"], strict=True):
            if sha256(path) != shard["sha256"]:
                raise RecordError(
                    f"{path} differs from manifest.json's sha256; copy it again or {MAKE_AGAIN}"
                )

    def close(self) -> None:
        """Closes all shards that are open in this process; reading opens them again."""
        _open_shard.cache_clear()


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(path: Path, digest: str) -> Any:
    """The reader of a shard; one that leaves the cache closes when the last thread that reads it lets go.

    `digest` is in the key alone: records that were replaced have the old ones' file names.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    # Without read-ahead: access is random (array_record's own advice).
    return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")


def check_spec(made: MediaSpec, wanted: MediaSpec, directory: str | os.PathLike[str]) -> None:
    """Raises RecordError naming each field in which records differ from the MediaSpec that is asked for."""
    differing = [
        f"{name} is {getattr(made, name)!r} in the records, {getattr(wanted, name)!r} in the config"
        for name in BAKED_FIELDS
        if getattr(made, name) != getattr(wanted, name)
    ]
    if differing:
        raise RecordError(
            f"{directory} was prepared for another media spec: {'; '.join(differing)}; "
            "run `avlm prepare` with this config or set config.media to the records' values"
        )


def is_record_file(name: str) -> bool:
    """Whether a file of this name belongs to a folder of records."""
    return name in (MANIFEST, SAMPLES, REJECTED, LENGTHS) or (
        name.startswith("shard-") and name.endswith(".array_record")
    )


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.exists():
        what = "has no manifest.json" if directory.exists() else "does not exist"
        raise RecordError(
            f"{directory} {what}: no finished records are there; run `avlm prepare --out {directory}`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} cannot be read ({type(error).__name__}: {error}); {MAKE_AGAIN}") from None
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema_version {version}, this program reads {SCHEMA_VERSION}; {MAKE_AGAIN}"
        )
    with contextlib.suppress(KeyError, TypeError):
        missing = {"media_spec", "counts", "shards"} - manifest.keys()
        unknown = set(manifest["media_spec"]) - {field.name for field in dataclasses.fields(MediaSpec)}
        if not missing and not unknown:
            return manifest
    raise RecordError(
        f"{path} lacks media_spec, counts or shards, or has an unknown field there; {MAKE_AGAIN}"
    )


def _to_jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=JPEG_SUBSAMPLING)
    return buffer.getvalue()


def _to_int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(samples * PCM_SCALE), -PCM_SCALE, PCM_SCALE - 1).astype("<i2")

"""Records: one media file with its conversations as one msgpack map, in ArrayRecord shards with a manifest.

A folder of records holds

    shard-00000-of-00002.array_record   the records, group_size:1 for random access
    manifest.json                       schema version, MediaSpec, counts, sha256 of every shard
    samples.jsonl                       one line per conversation: its record, number, id, task, source, text
    rejected.jsonl                      one line per manifest line that failed: path, id, reason, stage
    lengths/                            token lengths of the samples, kept by training (see lengths.py)

It is written beside its final place and renamed when complete: a folder that has its name is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
from PIL import Image

from input_pipeline.errors import UserError
from input_pipeline.spec import MediaSpec

if TYPE_CHECKING:
    from input_pipeline.media import LoadedMedia

SCHEMA_VERSION = 1
JPEG_QUALITY = 95
JPEG_SUBSAMPLING = 0  # 4:4:4. Pictures are already small here; halving their colour once more would show.
PCM_SCALE = 32768.0  # int16 full scale; a 16 kHz 16-bit source passes through unchanged.
SHARD_BYTES = 512 * 2**20  # Large enough for few files, small enough to move and to verify one by one.
MANIFEST, SAMPLES, REJECTED = "manifest.json", "samples.jsonl", "rejected.jsonl"
LENGTHS = "lengths"  # What training computes once and keeps; not part of the records.
# max_intervals is not baked into a record: times are parsed from the question when it is loaded.
BAKED_FIELDS = ("num_frames", "image_size", "sampler", "window_frames", "max_windows")


class RecordError(UserError):
    """A folder of records that is missing, unfinished, damaged, or made for another MediaSpec."""


def encode_record(
    media: LoadedMedia, *, media_id: str, source: str = "", samples: Sequence[Mapping[str, Any]] = ()
) -> bytes:
    """Packs one media file and its conversations; frames become JPEG (quality 95, 4:4:4), sound int16.

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
        raise RecordError(
            f"record has schema {version}, this program reads {SCHEMA_VERSION}; run `avlm prepare` again"
        )
    return record


def decode_record(data: bytes, spec: MediaSpec, *, frames: bool = True, audio: bool = True) -> dict[str, Any]:
    """Unpacks a record into the arrays of one batch row.

    Args:
        data: one record as `RecordReader` or Grain's ArrayRecord source gives it.
        spec: the MediaSpec of the batch.
        frames, audio: False leaves that modality out (mask False) and saves its decoding.

    Returns:
        frames uint8 [t h w 3], frame_times f32 [t], frame_mask bool [t], audio f32 [w s],
        audio_spans f32 [w 2], audio_mask bool [w], duration f32 [], all padded on the right, and "samples"
        (list of maps), "id", "source".

    Raises:
        RecordError: another schema, another picture size, or more frames or windows than the spec has room
            for.
    """
    record = unpack_record(data)
    pictures = [_from_jpeg(jpeg) for jpeg in record["frames"]] if frames else []
    times = record["frame_times"] if frames else []
    windows = []
    if audio:
        for window in record["windows"]:
            samples = np.frombuffer(window["pcm"], "<i2").astype(np.float32) / PCM_SCALE
            windows.append((*window["span"], samples))
    row = pad_media(pictures, times, windows, record["duration"], spec, name=record["id"])
    return {**row, "samples": record["samples"], "id": record["id"], "source": record["source"]}


def pad_media(
    frames: Sequence[np.ndarray] | np.ndarray,
    frame_times: Sequence[float] | np.ndarray,
    windows: Sequence[tuple[float, float, np.ndarray]],
    duration: float,
    spec: MediaSpec,
    *,
    name: str = "media",
) -> dict[str, np.ndarray]:
    """Pads frames and windows to the spec's static shapes; what is missing is masked. See `decode_record`.

    Also takes the fields of a `LoadedMedia` directly. Raises RecordError naming `name` if something does not
    fit.
    """
    t, h, w, s = spec.num_frames, spec.image_size, spec.max_windows, spec.window_samples
    if len(frames) > t or len(windows) > w:
        raise RecordError(
            f"{name} has {len(frames)} frames and {len(windows)} audio windows, the spec has room for "
            f"{t} and {w}; prepare it for this media spec"
        )
    row = {
        "frames": np.zeros((t, h, h, 3), np.uint8),
        "frame_times": np.zeros(t, np.float32),
        "frame_mask": np.arange(t) < len(frames),
        "audio": np.zeros((w, s), np.float32),
        "audio_spans": np.zeros((w, 2), np.float32),
        "audio_mask": np.arange(w) < len(windows),
        "duration": np.float32(duration),
    }
    for i, (frame, time) in enumerate(zip(frames, frame_times, strict=True)):
        if frame.shape != (h, h, 3):
            raise RecordError(f"{name} has frames of {list(frame.shape)}, the spec wants [{h}, {h}, 3]")
        row["frames"][i], row["frame_times"][i] = frame, time
    for i, (start, end, samples) in enumerate(windows):
        if len(samples) > s:
            raise RecordError(
                f"{name} has audio windows of {len(samples)} samples, the spec has room for {s}"
            )
        row["audio"][i, : len(samples)] = samples
        row["audio_spans"][i] = start, end
    return row


class RecordWriter:
    """Writes a folder of records so that it appears complete or not at all.

    Use as a context manager and call `finish` last; leaving without it (or being killed) leaves `out_dir` as
    it was.

    Raises:
        RecordError: `out_dir` holds records already and `overwrite` is False, or holds something else.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        spec: MediaSpec,
        *,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._out = Path(os.path.abspath(out_dir))
        self._spec = spec
        self._overwrite = overwrite
        self._shard_bytes = shard_bytes
        self._check_place()
        self._partial = self._out.with_name(f".{self._out.name}.partial")
        self._counts: list[int] = []  # records per shard
        self._shard_size = 0
        self._writer: Any = None
        self._samples = 0

    def _check_place(self) -> None:
        out = self._out
        if not out.exists():
            return
        if not out.is_dir():
            raise RecordError(f"{out} is a file; name a folder for the records")
        foreign = [path.name for path in out.iterdir() if not _is_ours(path.name)]
        if foreign:
            raise RecordError(f"{out} holds other files ({foreign[0]}, ...); name a new or an empty folder")
        if (out / MANIFEST).exists() and not self._overwrite:
            raise RecordError(f"{out} holds records already; pass --overwrite to replace them")

    def __enter__(self) -> RecordWriter:
        shutil.rmtree(self._partial, ignore_errors=True)  # what a killed run left
        self._partial.mkdir(parents=True)
        self._sample_file = open(self._partial / SAMPLES, "w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_shard()
        self._sample_file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, data: bytes) -> None:
        """Appends one record made by `encode_record`."""
        # not needed by decoding workers
        from array_record.python.array_record_module import ArrayRecordWriter

        if self._writer is not None and self._shard_size + len(data) > self._shard_bytes:
            self._close_shard()
        if self._writer is None:
            path = self._partial / f"{len(self._counts):05d}"
            self._writer = ArrayRecordWriter(str(path), "group_size:1")
            self._counts.append(0)
            self._shard_size = 0
        record = unpack_record(data)
        number = sum(self._counts)
        for index, sample in enumerate(record["samples"]):
            row = {
                "record": number,
                "sample": index,
                "id": sample.get("id", ""),
                "task": sample.get("task", ""),
                "source": sample.get("source", record["source"]),
                "has_video": record["has_video"],
                "has_audio": record["has_audio"],
                "conversations": sample.get("conversations", []),
            }
            self._sample_file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._samples += 1
        self._writer.write(data)
        self._counts[-1] += 1
        self._shard_size += len(data)

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def finish(self, *, manifest_lines: int, rejected: Sequence[Mapping[str, str]] = ()) -> dict[str, Any]:
        """Closes the shards, writes the manifest and puts the folder in its place; returns the manifest.

        Args:
            manifest_lines: how many lines (or files) were asked for, rejected ones included.
            rejected: rows of rejected.jsonl.
        """
        self._close_shard()
        self._sample_file.close()
        with open(self._partial / REJECTED, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rejected)
        shards = []
        for index, count in enumerate(self._counts):
            path = self._partial / f"shard-{index:05d}-of-{len(self._counts):05d}.array_record"
            os.rename(self._partial / f"{index:05d}", path)
            shards.append(
                {"file": path.name, "count": count, "sha256": sha256(path), "bytes": path.stat().st_size}
            )
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "media_spec": dataclasses.asdict(self._spec),
            "counts": {
                "manifest_lines": manifest_lines,
                "records": sum(self._counts),
                "samples": self._samples,
                "rejected": len(rejected),
            },
            "shards": shards,
        }
        with open(self._partial / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        self._put_in_place()
        return manifest

    def _put_in_place(self) -> None:
        replaced = self._out.with_name(f".{self._out.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self._out.exists():
            self._check_place()  # someone else may have finished in the meantime
            os.rename(self._out, replaced)
        os.rename(self._partial, self._out)
        shutil.rmtree(replaced, ignore_errors=True)


class RecordReader:
    """Random access to a folder of records: `reader[i]` is the i-th record's bytes, for `decode_record`.

    May be pickled into loader processes and read from several threads.

    Attributes:
        spec: the MediaSpec the records were made with.
        manifest: manifest.json.

    Raises:
        RecordError: the folder is no finished folder of records, a shard is missing or has another size than
            the manifest says, or the records were made for another MediaSpec than `spec`.
    """

    def __init__(self, directory: str | os.PathLike[str], spec: MediaSpec | None = None) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        self.spec = MediaSpec(**self.manifest["media_spec"])
        if spec is not None:
            check_spec(self.spec, spec, self.directory)
        self._first: list[int] = []  # number of the first record of each shard
        self._paths: list[Path] = []
        count = 0
        for shard in self.manifest["shards"]:
            path = self.directory / shard["file"]
            if not path.exists():
                raise RecordError(
                    f"{path} is missing, though manifest.json names it; copy it or prepare again"
                )
            if path.stat().st_size != shard["bytes"]:
                raise RecordError(
                    f"{path} has {path.stat().st_size} bytes, manifest.json says {shard['bytes']}; "
                    "copy it again or prepare again"
                )
            self._paths.append(path)
            self._first.append(count)
            count += shard["count"]
        self._count = count
        self._readers: dict[int, Any] = {}

    @functools.cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The rows of samples.jsonl, in order, read when first asked for; RecordError if they are damaged."""
        path = self.directory / SAMPLES
        try:
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
        except (OSError, ValueError) as error:
            raise RecordError(f"{path} cannot be read ({error}); prepare again") from None
        expected = self.manifest["counts"]["samples"]
        if len(rows) != expected:
            raise RecordError(f"{path} has {len(rows)} lines, manifest.json says {expected}; prepare again")
        return rows

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < self._count:
            raise IndexError(f"record {index} of {self._count} in {self.directory}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        try:
            (data,) = self._reader(shard).read([index - self._first[shard]])
        except Exception as error:  # array_record raises bare RuntimeError and IndexError
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RecordError(
                f"{self._paths[shard]}: record {index} cannot be read ({reason}); the shard is damaged, "
                "copy it again or prepare again"
            ) from None
        return data

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader

            # Without read-ahead: access is random (array_record's own advice).
            options = "readahead_buffer_size:0,max_parallelism:0"
            self._readers[shard] = ArrayRecordReader(str(self._paths[shard]), options)
        return self._readers[shard]

    def verify(self) -> None:
        """Compares every shard's sha256 with the manifest's; RecordError names the one that differs."""
        for path, shard in zip(self._paths, self.manifest["shards"], strict=True):
            if sha256(path) != shard["sha256"]:
                raise RecordError(
                    f"{path} differs from manifest.json's sha256; copy it again or prepare again"
                )

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}


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


def _is_ours(name: str) -> bool:
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
        raise RecordError(f"{path} cannot be read ({type(error).__name__}: {error}); prepare again") from None
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema_version {version}, this program reads {SCHEMA_VERSION}; prepare again"
        )
    with contextlib.suppress(KeyError, TypeError):
        missing = {"media_spec", "counts", "shards"} - manifest.keys()
        unknown = set(manifest["media_spec"]) - {field.name for field in dataclasses.fields(MediaSpec)}
        if not missing and not unknown:
            return manifest
    raise RecordError(
        f"{path} lacks media_spec, counts or shards, or has an unknown field there; prepare again"
    )


def _to_jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=JPEG_SUBSAMPLING)
    return buffer.getvalue()


def _from_jpeg(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise RecordError(f"a frame of this record is no readable JPEG ({error}); prepare again") from None


def _to_int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(samples * PCM_SCALE), -PCM_SCALE, PCM_SCALE - 1).astype("<i2")

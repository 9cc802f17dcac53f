"""Cached features and the encoders they came from: what a folder of features says, and whether it fits a configuration.

Features are what `System.encode_frames` and `System.encode_audio` give, rounded to bf16. Where the encoder itself runs in
bf16 nothing is lost; from an encoder in fp32 each value moves by at most 2^-9 of itself (half a unit of 8 bits).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from avlm_jax.assembly import Assembly
from avlm_jax.config import ConfigError
from avlm_jax.quantize import float_dtype
from avlm_jax.state import flatten, split
from input_pipeline.features import FIELDS, SUFFIX
from input_pipeline.mixture import SourceConfig
from input_pipeline.records import MANIFEST, RecordReader

# Of an encoder's config: how it is computed, not what: the kernel of its attention, how much at a time.
FREE = ("backend", "chunk")


def features_folder(records: str) -> str:
    """Where `avlm cache-features` puts the features of a folder of records, and where training looks for them."""
    return records.rstrip("/") + SUFFIX


def describe_features(assembly: Assembly, modalities: Sequence[str]) -> dict[str, Any]:
    """The section "features" of a manifest, by modality: shape of a frame's or window's features, encoder, weights."""
    encoders = assembly.system.encoders
    drawn = f"drawn from config.seed {assembly.config.seed}"
    return {
        name: {
            "dtype": "bfloat16",
            "shape": list(encoders[name].shape),
            "encoder": dataclasses.asdict(encoders[name].config),
            # An int8 base has its encoders in bf16.
            "frozen_dtype": float_dtype(assembly.config.frozen_dtype),
            "weights": assembly.weights.get(encoders[name].part, drawn),
        }
        for name in modalities
    }


def check_features(assembly: Assembly, reader: RecordReader) -> None:
    """Raises ConfigError if features are not those that this configuration's encoders would give.

    Refused are other weights, another encoder (sizes, feature layer, mask, dtype), and records that have been prepared
    anew since. Where the records themselves are not at hand any more, features cannot be out of date.
    """
    section, folder = reader.manifest["features"], reader.directory
    again = "run `avlm cache-features --overwrite` with this configuration"
    for name, now in describe_features(assembly, [name for name in FIELDS if name in section]).items():
        part, there = assembly.system.encoders[name].part, section[name]
        if there.get("weights") != now["weights"]:
            raise ConfigError(
                f"{folder} holds features of other weights of {part}: sha256 {there.get('weights')!r} there, "
                f"{now['weights']!r} now; let --config.init.{part}=DIR name the same weights, or {again}"
            )
        ours, theirs = (
            {"shape": s.get("shape"), "frozen_dtype": s.get("frozen_dtype"), **s.get("encoder", {})}
            for s in (now, there)
        )
        wrong = [
            f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} now"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) and key not in FREE
        ]
        if wrong:
            raise ConfigError(
                f"{folder} holds features of another {part} encoder ({'; '.join(wrong)}); use the configuration it was "
                f"made with, or {again}"
            )
    records = Path(str(folder).removesuffix(SUFFIX))
    if records != folder and (records / MANIFEST).exists():
        there, now = section.get("source_manifest"), RecordReader(records).digest
        if there != now:
            raise ConfigError(
                f"{folder} is out of date: it was made from records with the manifest {there}, {records} has {now}; "
                "run `avlm cache-features --overwrite`"
            )


def cached_in(reader: RecordReader) -> list[str]:
    """Modalities that a folder of records holds as features."""
    return [name for name in FIELDS if getattr(reader.features, name) is not None]


def open_features(
    assembly: Assembly,
    name: str,
    sources: Mapping[str, SourceConfig],
    learnt: Collection[str],
    *,
    beside: bool,
) -> tuple[dict[str, SourceConfig], tuple[str, ...]]:
    """The sources that a stage reads, checked where they hold features, and which encoders then have no input.

    Args:
        assembly: of the run.
        name: of the stage, for messages.
        sources: by name; those of weight 0 are left out.
        learnt: paths of all parameters that this stage or one before it trains.
        beside: read the features that lie beside the sources' records in place of these.

    Raises:
        ConfigError: features are missing or not of this configuration's encoders, or an encoder whose features stand in
            is not frozen.
        RecordError: a folder cannot be used.
    """
    found, cached = {}, []
    for key, source in sources.items():
        if not source.weight:
            continue
        folder = features_folder(source.records) if beside else source.records
        if beside and not (Path(folder) / MANIFEST).exists():
            raise ConfigError(
                f"stage {name} reads features (config.stage.{name}.features), and there are none in {folder}; make them "
                f"with `avlm cache-features --records {source.records}` and the same --config"
            )
        reader = RecordReader(folder, assembly.system.spec)
        if beside and not cached_in(reader):
            raise ConfigError(
                f"{folder} holds records without features; remove it and run `avlm cache-features`"
            )
        if cached_in(reader):
            check_features(assembly, reader)
        found[key] = dataclasses.replace(source, records=folder)
        cached.append(set(cached_in(reader)))
    # Sources that do not come alike are the loader's to refuse.
    idle = set.intersection(*cached) if cached else set()
    parts = tuple(assembly.system.encoders[modality].part for modality in FIELDS if modality in idle)
    check_frozen(parts, learnt, f"stage {name}")
    return found, parts


def check_untrained(assembly: Assembly, name: str, trained: Collection[str]) -> None:
    """Raises ConfigError if stage `name` is to train an encoder, through which no gradient comes."""
    parts = {encoder.part for encoder in assembly.system.encoders.values()}
    for path in trained:
        if path.partition("/")[0] in parts:
            raise ConfigError(
                f"stage {name} trains {path}, but {assembly.config.system} keeps its encoders frozen: no gradient reaches "
                f"{', '.join(sorted(parts))}; take it out of config.stage.{name}.trainable"
            )


def check_readable(assembly: Assembly, reader: RecordReader) -> None:
    """Raises ConfigError if a folder of records holds features that are not those of a trained model's encoders."""
    cached = cached_in(reader)
    if not cached:
        return
    check_features(assembly, reader)
    abstract, stages = assembly.abstract_params(), assembly.config.stage
    learnt = {path for name in stages for path in flatten(split(abstract, stages[name].trainable)[0])}
    parts = [assembly.system.encoders[name].part for name in cached]
    check_frozen(parts, sorted(learnt), "the model")


def check_frozen(parts: Collection[str], learnt: Collection[str], what: str) -> None:
    """Raises ConfigError if training has changed (or is to change) an encoder whose features are cached."""
    for path in learnt:
        if path.partition("/")[0] in parts:
            raise ConfigError(
                f"{what} depends on {path} as training makes it, but reads features of the encoder as it was; read "
                "pixels and waveforms (features=False, the records themselves), or cache without that modality"
            )


def feature_counts(manifest: Mapping[str, Any]) -> str:
    """ "video [729, 1152], audio [512, 768]" of a manifest's features."""
    return ", ".join(
        f"{name} {manifest['features'][name]['shape']}" for name in FIELDS if name in manifest["features"]
    )

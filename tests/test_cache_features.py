"""Cached features: one to one with the records, made again exactly after a kill, and as good as pixels and waveforms."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax import cache_features as verb
from avlm_jax import cli
from avlm_jax.assembly import Assembly, assemble
from avlm_jax.cache_features import Encoders, Tally, all_records, cache_features, make_encoders
from avlm_jax.config import ConfigError, apply_overrides, load_config
from avlm_jax.evaluate import evaluate
from avlm_jax.features import check_features, describe_features, features_folder, open_features
from avlm_jax.models.api import build_system, init_params
from avlm_jax.monitoring.writer import read_metrics
from avlm_jax.state import Tree, merge, split
from input_pipeline.errors import UserError
from input_pipeline.loader import Loader
from input_pipeline.mixture import SourceConfig
from input_pipeline.records import RecordReader, encode_record, unpack_record
from input_pipeline.spec import FEATURE_DTYPE, FeatureShapes
from input_pipeline.transforms.media import decode_record
from tests.record_folder import write_folder
from tests.tiny_system import CONFIG, SIZES, make_media, random_params, save_tokenizer, tiny_config

# (frames, windows): a video, a silent one, sound alone, a picture, neither, and a video with little sound.
MEDIA = ((4, 3), (4, 0), (0, 3), (1, 0), (0, 0), (4, 1))
SHARDS = 2
ULP = 2.0**-8  # Between neighbouring bf16 numbers, relative; rounding moves a feature by half of it at most.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def assembly(tokenizer: Path) -> Assembly:
    return assemble(tiny_config(tokenizer))


@pytest.fixture(scope="module")
def params(assembly: Assembly, encoders: Encoders) -> Tree:
    """The encoders' are those that the features came from; the rest does something."""
    return random_params(assembly) | encoders.params


def write_media(folder: Path, assembly: Assembly) -> str:
    records = []
    for number, (frames, windows) in enumerate(MEDIA):
        media = make_media(assembly.system.spec, number, frames=frames, windows=windows)
        samples = [
            {
                "id": f"m{number}-q{question}",
                "task": "mcq",
                "conversations": [
                    {"from": "human", "value": f"<video>\nWhich?{number}\nA: a\nB: b"},
                    {"from": "gpt", "value": "b (B)"},
                ],
                "answer": "B",
                "options": ["a", "b"],
            }
            for question in range(2)
        ]
        records.append(encode_record(media, media_id=f"m{number}", source="noise", samples=samples))
    write_folder(folder, assembly.system.spec, records, manifest_lines=2 * len(MEDIA), shards=SHARDS)
    return str(folder)


@pytest.fixture(scope="module")
def encoders(assembly: Assembly) -> Encoders:
    """Both, in steps of three frames or windows; compiled once for all tests."""
    return make_encoders(assembly, ("video", "audio"), 3)


def only(encoders: Encoders, *modalities: str) -> Encoders:
    return dataclasses.replace(encoders, modalities=modalities)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, assembly: Assembly, encoders: Encoders
) -> dict[str, str]:
    """The same media thrice, by what is cached beside them."""
    place = tmp_path_factory.mktemp("records")
    found = {}
    for modalities in ("video,audio", "video", "audio"):
        found[modalities] = write_media(place / modalities.replace(",", "-"), assembly)
        cache_features(only(encoders, *modalities.split(",")), found[modalities])
    return found


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def batch_of(assembly: Assembly, folder: str, modalities: tuple[str, ...] = ("video", "audio")) -> dict:
    """All samples of a folder as one batch, in order."""
    source = SourceConfig(folder, modalities=modalities)
    with Loader(
        [source], assembly.builder(), batch_size=2 * len(MEDIA) - 2, shuffle=False, threads=0
    ) as loader:
        return dict(next(loader))


# What is written
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", ["video,audio", "video", "audio"])
def test_a_folder_of_features_is_one_to_one_with_its_records(
    folders: dict[str, str], assembly: Assembly, params: Tree, modalities: str
) -> None:
    records = folders[modalities]
    before, after = RecordReader(records), RecordReader(features_folder(records))
    assert after.manifest["counts"] == before.manifest["counts"]
    for name in ("samples.jsonl", "rejected.jsonl"):
        assert files(records)[name] == files(features_folder(records))[name]
    counts = [[shard["count"] for shard in reader.manifest["shards"]] for reader in (before, after)]
    assert counts[0] == counts[1] == [3, 3]
    system, cached = assembly.system, modalities.split(",")
    assert after.features == FeatureShapes(**{name: system.encoders[name].shape for name in cached})
    for number, (frames, windows) in enumerate(MEDIA):
        pixels, features = (unpack_record(reader[number]) for reader in (before, after))
        for key in ("id", "source", "duration", "has_video", "has_audio", "frame_times", "samples"):
            assert features[key] == pixels[key]
        assert [w["span"] for w in features["windows"]] == [w["span"] for w in pixels["windows"]]
        media, row = (decode_record(reader[number], reader.spec) for reader in (before, after))
        for key in ("frame_mask", "frame_times", "audio_mask", "audio_spans", "duration"):
            np.testing.assert_array_equal(row[key], media[key])
        if "video" in cached:
            assert "frames" not in row and row["frame_features"].shape == (4, 4, 16)
            made = system.apply({"params": params}, media["frames"], method="encode_frames")
            np.testing.assert_allclose(
                row["frame_features"][:frames].astype(np.float32), made[:frames], rtol=ULP, atol=1e-6
            )
            assert not row["frame_features"][frames:].any() and (not frames or row["frame_features"].any())
        else:
            np.testing.assert_array_equal(row["frames"], media["frames"])
        if "audio" in cached:
            assert "audio" not in row and row["audio_features"].shape == (3, 16, 32)
            inputs = (media[key] for key in ("audio", "audio_spans", "audio_mask"))
            made = system.apply({"params": params}, *inputs, method="encode_audio")
            np.testing.assert_allclose(
                row["audio_features"][:windows].astype(np.float32), made[:windows], rtol=ULP, atol=1e-6
            )
            assert not row["audio_features"][windows:].any()
        else:
            np.testing.assert_array_equal(row["audio"], media["audio"])


def test_a_killed_run_is_taken_up_and_ends_with_the_same_bytes(
    folders: dict[str, str], encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = folders["video,audio"]
    read = RecordReader.__getitem__

    def stop(reader: RecordReader, number: int) -> bytes:
        if number == 4:  # Inside the second shard.
            raise KeyboardInterrupt
        return read(reader, number)

    monkeypatch.setattr(RecordReader, "__getitem__", stop)
    with pytest.raises(KeyboardInterrupt):
        cache_features(encoders, records, str(tmp_path / "f"))
    monkeypatch.undo()
    assert not (tmp_path / "f").exists()
    tally = Tally()
    cache_features(encoders, records, str(tmp_path / "f"), tally=tally)
    assert (tally.clips, tally.frames, tally.windows) == (3, 5, 1)  # The second shard alone.
    assert files(str(tmp_path / "f")) == files(features_folder(records))
    # A third run finds all of it.
    tally = Tally()
    cache_features(encoders, records, str(tmp_path / "f"), tally=tally)
    assert tally.clips == 0


def test_features_do_not_depend_on_what_they_are_encoded_with(
    folders: dict[str, str], encoders: Encoders, tmp_path: Path
) -> None:
    """Steps of 3 frames, as the folders were made, against steps of one: fp32 sums in another order, then bf16."""
    records = folders["video,audio"]
    cache_features(dataclasses.replace(encoders, size=1), records, str(tmp_path / "one"))
    alone, together = RecordReader(tmp_path / "one"), RecordReader(features_folder(records))
    for number in range(len(MEDIA)):
        ours, theirs = (decode_record(reader[number], reader.spec) for reader in (alone, together))
        for key in ("frame_features", "audio_features"):
            np.testing.assert_allclose(
                ours[key].astype(np.float32), theirs[key].astype(np.float32), rtol=ULP, atol=1e-5
            )


def test_other_features_are_replaced_only_when_asked(
    folders: dict[str, str], encoders: Encoders, tmp_path: Path
) -> None:
    records, out = folders["audio"], str(tmp_path / "f")
    cache_features(only(encoders, "audio"), records, out)
    with pytest.raises(UserError, match="--overwrite"):
        cache_features(encoders, records, out)
    assert RecordReader(out).features.video is None
    cache_features(encoders, records, out, overwrite=True)
    assert RecordReader(out).features.video
    with pytest.raises(ConfigError, match="holds features already"):
        cache_features(encoders, out)


def test_two_processes_share_the_shards(
    folders: dict[str, str], encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As process 1 of 2 sees it, which does not hold the folder; then process 0 finds its own share left."""
    records, out = folders["video,audio"], tmp_path / "f"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    met: list[str] = []
    monkeypatch.setattr(verb.multihost_utils, "sync_global_devices", met.append)
    monkeypatch.setattr(verb.multihost_utils, "broadcast_one_to_all", lambda value: value)
    tally = Tally()
    # Process 0 comes first, as the real one does to make the folder, and misses the other's shard.
    with pytest.raises(UserError, match="shard 1 is missing"):
        cache_features(encoders, records, str(out), tally=tally)
    assert tally.clips == 3 and met == ["features written"]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(verb, "_told_by_first", lambda value: verb._WANTED)
    with pytest.raises(UserError, match="does not exist"):  # Process 0 would have put it in place by now.
        cache_features(encoders, records, str(out), tally=tally)
    assert tally.clips == 6
    monkeypatch.undo()
    tally = Tally()
    cache_features(encoders, records, str(out), tally=tally)
    assert tally.clips == 0 and files(str(out)) == files(features_folder(records))


# What is read
# --------------------------------------------------------------------------------------------------------


Run = Callable[[Tree, dict], tuple[Any, Tree]]


@pytest.fixture(scope="module")
def run(assembly: Assembly) -> Run:
    """(parameters, batch) -> (loss, gradients of what stage 2b trains)."""
    patterns = assembly.config.stage["2b"].trainable

    @jax.jit
    def both(params: Tree, batch: dict) -> tuple[Any, Tree]:
        trainable, frozen = split(params, patterns)

        def loss(trainable: Tree) -> Any:
            sums = assembly.system.apply({"params": merge(trainable, frozen)}, batch, 64, method="loss_sums")
            return sums[0] / sums[1]

        return jax.value_and_grad(loss)(trainable)

    return both


@pytest.fixture(scope="module")
def encoded(assembly: Assembly) -> Callable[[Tree, dict], tuple]:
    """(parameters, batch) -> what the connector is given of frames and windows."""
    return jax.jit(lambda params, batch: assembly.system.apply({"params": params}, batch, method="encoded"))


def distance(one: Tree, other: Tree) -> float:
    """|one - other| / |one| of whole trees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    squares = [(float(jnp.sum((a - b) ** 2)), float(jnp.sum(a**2))) for a, b in pairs]
    return (sum(s for s, _ in squares) / sum(s for _, s in squares)) ** 0.5


@pytest.mark.parametrize("shown", [("video", "audio"), ("video",), ("audio",), ()], ids=str)
@pytest.mark.parametrize("cached", ["video,audio", "video", "audio"])
def test_features_give_the_loss_and_gradients_of_pixels_and_waveforms(
    folders: dict[str, str],
    assembly: Assembly,
    params: Tree,
    run: Run,
    encoded: Callable[[Tree, dict], tuple],
    cached: str,
    shown: tuple[str, ...],
) -> None:
    """Batches of a video, a silent one, sound alone, a picture and neither, of which all or one modality is shown."""
    batches = [batch_of(assembly, f, shown) for f in (folders[cached], features_folder(folders[cached]))]
    assert ("frame_features" in batches[1], "audio_features" in batches[1]) == (
        "video" in cached,
        "audio" in cached,
    )
    loss, gradients = run(params, batches[0])
    # The encoders' parameters may be left out where features stand in for them.
    parts = {"video": "vision", "audio": "audio"}
    kept = {name: leaf for name, leaf in params.items() if name not in {parts[c] for c in cached.split(",")}}
    loss_f, gradients_f = run(kept, batches[1])
    assert jax.tree.structure(gradients) == jax.tree.structure(gradients_f)
    assert abs(loss_f - loss) <= ULP / 2 * loss
    # Rounding is all that lies between the two: with the encoders' output rounded here, they agree but for the few values
    # that steps of another size have put on the other side of a border. How much it moves gradients is a matter of the
    # network (5 % with sound alone in this random one, whose tokens are alike and round the same way).
    frames, windows = encoded(params, batches[0])
    here = {"frame_features": frames, "audio_features": windows}
    rounded = {key: np.asarray(here[key]).astype(FEATURE_DTYPE) for key in here if key in batches[1]}
    loss_r, gradients_r = run(kept, batches[1] | rounded)
    assert abs(loss_f - loss_r) <= 1e-6 * loss and distance(gradients_r, gradients_f) < 1e-3
    # What stands in is read: without it the loss is another one, and so are the gradients. What is not shown is not.
    blank = {key: np.zeros_like(batches[1][key]) for key in batches[1] if key.endswith("_features")}
    loss_0, gradients_0 = run(kept, batches[1] | blank)
    if set(shown) & set(cached.split(",")):
        assert abs(loss_0 - loss) > 2**-8 * loss and distance(gradients, gradients_0) > 0.1
    else:
        assert loss_0 == loss_f == loss


def test_only_the_rounding_of_features_is_between_the_two(
    folders: dict[str, str],
    assembly: Assembly,
    params: Tree,
    run: Run,
    encoded: Callable[[Tree, dict], tuple],
) -> None:
    """Unrounded features give the loss to fp32: what the model does with them is the same."""
    batch = batch_of(assembly, folders["video,audio"])
    frames, windows = encoded(params, batch)
    exact = {key: value for key, value in batch.items() if key not in ("frames", "audio")}
    exact |= {"frame_features": frames, "audio_features": windows}
    (loss, gradients), (loss_f, gradients_f) = run(params, batch), run(params, exact)
    assert abs(loss_f - loss) < 1e-6 * loss and distance(gradients, gradients_f) < 1e-5


def test_parameters_do_not_depend_on_features(folders: dict[str, str], assembly: Assembly) -> None:
    features = batch_of(assembly, features_folder(folders["video,audio"]))
    made = jax.eval_shape(lambda: init_params(assembly.system, features, 0))
    expected = assembly.abstract_params()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


def test_questions_may_be_asked_about_features(
    folders: dict[str, str], assembly: Assembly, params: Tree
) -> None:
    asked = [
        evaluate(assembly, params, folder, batch_size=5, max_new_tokens=2)
        for folder in (folders["video,audio"], features_folder(folders["video,audio"]))
    ]
    assert [report["total"] for report in asked] == [2 * len(MEDIA)] * 2
    trained = assemble(apply_overrides(assembly.config, ["stage.1b.trainable=('audio/.*',)"]))
    with pytest.raises(ConfigError, match="the model depends on audio/"):
        evaluate(trained, params, features_folder(folders["video,audio"]))


def test_the_7b_system_reads_features_of_its_bf16_encoders() -> None:
    """Its encoders compute in bf16, so that caching rounds nothing; a video of 16 frames takes 25.6 MiB."""
    config = load_config(f"{CONFIG}:size=7b,features=true")
    system = build_system(config, media_token_id=151_650)
    shapes = {name: encoder.shape for name, encoder in system.encoders.items()}
    assert shapes == {"video": (729, 1152), "audio": (512, 768)}

    def batch(features: FeatureShapes) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = system.spec.batch_shapes(2, config.text.max_length, features=features)
        return {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in arrays.items()}

    cached = batch(FeatureShapes(**shapes))
    frames = cached["frame_features"]
    assert (frames.shape, frames.dtype.name) == ((2, 16, 729, 1152), "bfloat16")
    assert frames.size // 2 * frames.dtype.itemsize == 26_873_856  # Bytes of one clip.
    params = jax.eval_shape(lambda b: init_params(system, b, 0), batch(FeatureShapes()))

    def outputs(params: Tree, batch: dict) -> list[tuple]:
        found = jax.eval_shape(lambda p, b: system.apply({"params": p}, b, method="encoded"), params, batch)
        return [(x.shape, x.dtype.name) for x in found]

    made = outputs(params, batch(FeatureShapes()))
    assert made == [((2, 16, 729, 1152), "bfloat16"), ((2, 16, 512, 768), "bfloat16")]
    rest = {part: tree for part, tree in params.items() if part not in ("vision", "audio")}
    assert outputs(rest, cached) == made
    sums = jax.eval_shape(lambda p, b: system.apply({"params": p}, b, 256, method="loss_sums"), rest, cached)
    assert [x.shape for x in sums] == [()] * 3


# Training
# --------------------------------------------------------------------------------------------------------


def train(tokenizer: Path, records: str, workdir: Path, *more: str, stage: str = "2b") -> list[str]:
    (source,) = load_config(f"{CONFIG}:size=demo").stage[stage].sources
    overrides = [
        *SIZES,
        f"text.tokenizer={tokenizer}",
        "log_every=1",
        f"stage.{stage}.sources.{source}.records={records}",
        f"stage.{stage}.sources.{source}.tasks=()",
        f"stage.{stage}.parent=",
        f"stage.{stage}.max_length=0",
        f"stage.{stage}.steps=10",
        f"stage.{stage}.batch_size=4",
        f"stage.{stage}.optim.lr=0.01",
        *more,
    ]
    return [
        "train",
        "--config",
        f"{CONFIG}:size=demo,stage={stage}",
        "--workdir",
        str(workdir),
        *(f"--config.{override}" for override in overrides),
    ]


def test_ten_steps_from_features_are_ten_steps_from_pixels(
    folders: dict[str, str], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    records = folders["video,audio"]
    pixels = train(tokenizer, records, tmp_path / "pixels")
    features = train(tokenizer, records, tmp_path / "features", "stage.2b.features=true")
    assert cli.main(pixels) == 0
    assert "\nvision  " in capsys.readouterr().out
    assert cli.main(features) == 0
    sizes = capsys.readouterr().out
    assert "\nvision  " not in sizes and "\naudio  " not in sizes  # Not even on the devices.
    lines = [read_metrics(tmp_path / name / "2b") for name in ("pixels", "features")]
    losses = np.array([[line["loss"] for line in run] for run in lines])
    assert losses.shape == (2, 10) and losses[0, -1] < losses[0, 0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=ULP)
    # What is read is part of what a run is: it neither ends nor goes on as another one.
    switched = [*pixels, "--config.stage.2b.features=true"]
    for unfinished in (False, True):
        if unfinished:
            shutil.rmtree(tmp_path / "pixels" / "2b" / "final")
        assert cli.main(switched) == 2
        assert "stage.2b.features: False there, True now" in capsys.readouterr().err


# What is refused
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "seed=1",
            "other weights of vision: sha256 'drawn from config.seed 0' there, 'drawn from config.seed 1' now",
        ),
        ("model.vision.feature_layer=-1", "vision encoder .feature_layer is -2 there, -1 now"),
        ("model.vision.dtype=bfloat16", "vision encoder .dtype is 'float32' there, 'bfloat16' now"),
        ("model.audio.mask=unilm", "audio encoder .mask is 'time_patch' there, 'unilm' now"),
        ("frozen_dtype=bfloat16", "vision encoder .frozen_dtype is 'float32' there, 'bfloat16' now"),
    ],
)
def test_features_of_another_encoder_are_refused(
    folders: dict[str, str], tokenizer: Path, override: str, told: str
) -> None:
    other = assemble(tiny_config(tokenizer, override))
    with pytest.raises(ConfigError, match=told) as caught:
        check_features(other, RecordReader(features_folder(folders["video,audio"])))
    assert "avlm cache-features --overwrite" in str(caught.value)


def test_another_attention_kernel_is_the_same_encoder(folders: dict[str, str], tokenizer: Path) -> None:
    folder = features_folder(folders["video,audio"])
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    assert manifest["features"]["video"]["encoder"]["backend"] == "auto"
    reader = RecordReader(folder)
    reader.manifest["features"]["video"]["encoder"]["backend"] = "cudnn"
    check_features(assemble(tiny_config(tokenizer)), reader)


def test_an_int8_base_has_the_same_encoders_as_a_bf16_one(tokenizer: Path) -> None:
    found, expected = (
        describe_features(assemble(tiny_config(tokenizer, f"frozen_dtype={name}")), ("video", "audio"))
        for name in ("int8", "bfloat16")
    )
    assert found == expected


def test_features_of_records_that_were_prepared_anew_are_refused(
    assembly: Assembly, encoders: Encoders, tmp_path: Path
) -> None:
    records = write_media(tmp_path / "r", assembly)
    cache_features(only(encoders, "audio"), records)
    reader = RecordReader(features_folder(records))
    check_features(assembly, reader)
    (tmp_path / "elsewhere").mkdir()
    Path(records).rename(tmp_path / "elsewhere" / "r")
    check_features(assembly, reader)  # Features stand alone: the records need not be where training is.
    media = make_media(assembly.system.spec, 9)
    write_folder(records, assembly.system.spec, [encode_record(media, media_id="n")], manifest_lines=1)
    with pytest.raises(ConfigError, match=r"out of date.*--overwrite"):
        check_features(assembly, reader)


def test_a_stage_needs_features_and_frozen_encoders(
    folders: dict[str, str], assembly: Assembly, tmp_path: Path
) -> None:
    source = SourceConfig(folders["video,audio"], modalities=("video",), weight=0.5)
    sources, idle = open_features(assembly, "2b", {"mine": source}, ["connector/tlp/kernel"], beside=True)
    (found,) = sources.items()
    assert found == ("mine", SourceConfig(features_folder(source.records), modalities=("video",), weight=0.5))
    assert idle == ("vision", "audio")
    audio = {"mine": SourceConfig(folders["audio"])}
    assert open_features(assembly, "2b", audio, ["vision/pos_embed"], beside=True)[1] == ("audio",)
    with pytest.raises(ConfigError, match=r"audio/proj/kernel.*features=False"):
        open_features(assembly, "2b", audio, ["audio/proj/kernel"], beside=True)
    plain = write_media(tmp_path / "plain", assembly)
    with pytest.raises(
        ConfigError, match=rf"none in {plain}.features.*avlm cache-features --records {plain}"
    ):
        open_features(assembly, "2b", {"mine": SourceConfig(plain)}, [], beside=True)
    # A source of weight 0 may lack them, and even its records.
    gone = {"gone": SourceConfig(str(tmp_path / "gone"), weight=0)}
    assert open_features(assembly, "2b", audio | gone, [], beside=True)[0].keys() == {"mine"}
    assert open_features(assembly, "2b", gone, ["audio/proj/kernel"], beside=True) == ({}, ())


def test_features_that_a_stage_names_itself_are_checked_all_the_same(
    folders: dict[str, str],
    assembly: Assembly,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    records = {"mine": SourceConfig(folders["audio"])}
    assert open_features(assembly, "2b", records, ["audio/proj/kernel"], beside=False) == (records, ())
    named = {"mine": SourceConfig(features_folder(folders["audio"]))}
    assert open_features(assembly, "2b", named, [], beside=False) == (named, ("audio",))
    with pytest.raises(ConfigError, match=r"stage 2b depends on audio/proj/kernel"):
        open_features(assembly, "2b", named, ["audio/proj/kernel"], beside=False)
    command = train(tokenizer, features_folder(folders["audio"]), tmp_path / "w", "seed=1")
    assert cli.main(command) == 2
    assert "holds features of other weights of audio" in capsys.readouterr().err


def test_sources_of_a_stage_must_come_alike(folders: dict[str, str], assembly: Assembly) -> None:
    sources = [SourceConfig(features_folder(folders[name])) for name in ("video", "audio")]
    with pytest.raises(UserError, match=r"video features \[4, 16\].*audio features \[16, 32\].*--modalities"):
        Loader(sources, assembly.builder(), batch_size=2)


# The command
# --------------------------------------------------------------------------------------------------------


def test_the_command_caches_and_counts(
    tokenizer: Path, assembly: Assembly, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    records = write_media(tmp_path / "r", assembly)
    overrides = [f"--config.{item}" for item in (*SIZES, f"text.tokenizer={tokenizer}")]
    command = ["cache-features", "--config", f"{CONFIG}:size=demo", "--records", records, *overrides]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "6 clips with 12 samples, video [4, 16], audio [16, 32]" in told
    assert "encoded 6 clips (13 frames, 7 audio windows)" in told and "clips/s" in told
    assert cli.main(command) == 0
    assert "all of it was there before" in capsys.readouterr().out
    assert cli.main([*command, "--records", records, records, "--out", str(tmp_path / "o")]) == 2
    assert "--out is for one folder" in capsys.readouterr().err


def test_the_records_of_a_configuration() -> None:
    config = load_config(f"{CONFIG}:size=7b")
    assert all_records(config)[:3] == ["records/lcs558k", "records/panda70m", "records/audiocaps"]
    assert all_records(load_config(f"{CONFIG}:size=demo")) == ["runs/demo/records/train"]
    left_out = load_config(f"{CONFIG}:size=7b", ["stage.1a.sources.lcs558k.weight=0.0"])
    assert all_records(left_out)[0] == "records/panda70m"
    switched = load_config(f"{CONFIG}:size=7b,features=true")
    assert all(switched.stage[name].features for name in switched.stage)

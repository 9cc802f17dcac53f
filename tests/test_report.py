"""The comparison table, the resampler's attention, and the picture of a timeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avlm_jax.assembly import Assembly, assemble
from avlm_jax.report import (
    Happening,
    ResamplerAttention,
    comparison_table,
    draw_timeline,
    happenings,
    resampler_attention,
    save_timeline,
)
from input_pipeline.errors import UserError
from tests.tiny_system import make_media, padded, random_params, save_tokenizer, tiny_config, write_records

# SAVEn-Vid's form, as input_pipeline/synthetic/annotate.py writes it.
CLIP = {
    "start": 0.2,
    "end": 1.1,
    "visual": "From 00:00:00.200 to 00:00:01.100, we can see red circle rises.",
    "audio": "From 00:00:00.200 to 00:00:01.100, we can hear bell.",
    "av": "",
}


def test_table_lines_up() -> None:
    rows = {
        "full model": {
            "accuracy": 0.6504,
            "n": 250,
            "ci95": [0.58, 0.71],
            "unparsed": 0,
            "protocol": "official",
        },
        "text only": {"accuracy": 1.0, "n": 9, "ci95": [0.05, 1.0], "unparsed": 10, "protocol": "official"},
        "nothing": {"accuracy": None, "n": 0, "ci95": None},
    }
    table = comparison_table(rows)
    lines = table.splitlines()
    assert "full model    65.0 %   58.0 to  71.0 %" in table
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1].endswith("protocol official")
    assert lines[4].split() == ["nothing", "-", "-", "0", "-"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def assembly(place: Path) -> Assembly:
    return assemble(tiny_config(place, "model.avts.time_scope=inside"))


@pytest.fixture(scope="module")
def params(assembly: Assembly) -> dict:
    return random_params(assembly)


def arrays(assembly: Assembly, **kept: int) -> dict[str, np.ndarray]:
    spec = assembly.system.spec
    sample = {"id": "s", "conversations": [{"from": "human", "value": "At 1 s, what?"}]}
    return assembly.builder(prompt=True).build(padded(make_media(spec, 0, **kept), spec), sample).arrays


def test_attention(assembly: Assembly, params: dict) -> None:
    row = arrays(assembly, frames=3)
    attention = resampler_attention(assembly, params, {key: value[None] for key, value in row.items()})
    # "At 1 s": the groups whose share of the two seconds the asked time does not touch are masked and show nothing.
    used = sum(part.sum(axis=1) for part in attention)
    np.testing.assert_allclose(used, [0, 0, 0, 0, 1, 1, 0, 0], atol=1e-5)

    row["intervals"][0] = (0.0, 2.0)
    seen, heard, time = resampler_attention(
        assembly, params, {key: value[None] for key, value in row.items()}
    )
    queries, frames = 8, assembly.system.spec.num_frames
    assert seen.shape == (queries, frames) and heard.shape == (queries, 3 * 2) and time.shape == (queries, 6)
    np.testing.assert_allclose(
        seen.sum(1) + heard.sum(1) + time.sum(1), used_everywhere(seen, heard), atol=1e-5
    )
    assert (seen[:, 3] == 0).all()  # A masked frame gets nothing,
    assert (time[:, 2:] == 0).all()  # nor do the slots of intervals that are not there.
    # Group i of the queries reads the frames of its share of the duration: frames lie at 1/3, 1 and 5/3 of 2 s.
    assert (seen[:2, 0] > 0).all() and (seen[:2, 1:] == 0).all()
    assert (seen[4:6, 1] > 0).all() and (seen[4:6, 0] == 0).all()


def used_everywhere(seen: np.ndarray, heard: np.ndarray) -> np.ndarray:
    """1 for queries with a frame or a sound to read, 0 for the masked others."""
    return ((seen.sum(axis=1) + heard.sum(axis=1)) > 0).astype(np.float32)


def test_attention_over_pooled_tokens(place: Path) -> None:
    overrides = ("model.avts.visual_pool=frame", "model.avts.freq_pool=window", "model.avts.scope=global")
    assembly = assemble(tiny_config(place, *overrides, "model.avts.time_scope=all"))
    batch = {key: value[None] for key, value in arrays(assembly).items()}
    seen, heard, time = resampler_attention(assembly, random_params(assembly), batch)
    assert seen.shape == (8, 4) and heard.shape == (8, 3) and time.shape == (8, 6)
    np.testing.assert_allclose(seen.sum(1) + heard.sum(1) + time.sum(1), 1, atol=1e-5)
    assert (seen > 0).all() and (heard > 0).all()


def test_queries_that_may_read_nothing_attend_to_nothing(assembly: Assembly, params: dict) -> None:
    # Only the first quarter of the time is seen and heard, and asked about.
    row = arrays(assembly, frames=1, windows=1)
    row["frame_times"][0], row["intervals"][0] = 0.1, (0.0, 0.2)
    batch = {key: value[None] for key, value in row.items()}
    sums = sum(part.sum(axis=1) for part in resampler_attention(assembly, params, batch))
    np.testing.assert_allclose(sums, [1] * 2 + [0] * 6, atol=1e-5)


def test_attention_of_a_connector_without_any(place: Path) -> None:
    assembly = assemble(tiny_config(place, "model.avts.resampler=mlp", "text.max_length=320"))
    batch = {key: value[None] for key, value in arrays(assembly).items()}
    with pytest.raises(UserError, match="does not attend"):
        resampler_attention(assembly, random_params(assembly), batch)


def test_happenings() -> None:
    quiet = {**CLIP, "audio": "From 00:00:00.200 to 00:00:01.100, we can hear silence."}
    assert happenings({"clips": [CLIP, quiet]}) == [
        Happening(0.2, 1.1, "red circle rises", "visual"),
        Happening(0.2, 1.1, "bell", "sound"),
        Happening(0.2, 1.1, "red circle rises", "visual"),
    ]


def test_save_timeline(assembly: Assembly, params: dict, place: Path) -> None:
    records = write_records(place / "records", assembly.system.spec, 2)
    annotation = {"video_id": "v0", "clips": [CLIP], "qa": [{"id": "v0-q1"}]}
    (place / "annotations.json").write_text(json.dumps([annotation]))
    path = place / "pictures" / "timeline.png"
    kept = {"max_new_tokens": 2, "annotations": place / "annotations.json"}
    assert save_timeline(path, assembly, params, records, **kept) == path
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1200
    assert (
        len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    )  # Noise frames, bars and heat maps are really there.
    with pytest.raises(UserError, match="no sample v9"):
        save_timeline(path, assembly, params, records, sample_id="v9")


@pytest.mark.parametrize("kept", [{"frames": 0}, {"windows": 0}, {"frames": 0, "windows": 0}])
def test_timeline_without_a_modality(assembly: Assembly, tmp_path: Path, kept: dict[str, int]) -> None:
    attention = ResamplerAttention(np.full((8, 4), 0.1), np.full((8, 6), 0.1), np.zeros((8, 6)))
    # A pair of dollar signs must not be read as mathematics.
    draw_timeline(tmp_path / "t.png", arrays(assembly, **kept), attention, groups=4, question="$a_ or $b_?")
    with Image.open(tmp_path / "t.png") as image:
        assert image.size[0] > 1200

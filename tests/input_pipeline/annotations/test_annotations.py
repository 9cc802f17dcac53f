"""What all importers share: wrong files, options, streaming, the choice of samples, manifests written and read."""

import itertools
import json
import random
import shutil

import pytest

from input_pipeline.annotations import (
    DATASETS,
    AnnotationError,
    describe_dataset,
    describe_datasets,
    import_annotations,
)
from input_pipeline.annotations import rows as rows_module
from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.rows import csv_rows, json_rows
from input_pipeline.annotations.youtube import clip_stems
from input_pipeline.errors import UserError
from input_pipeline.manifest import read_manifest, write_manifest
from tests import fake_gcs

FILES = {
    "lcs558k": "blip_laion_cc_sbu_558k.json",
    "panda70m": "panda70m.csv",
    "audioset": "segments.csv",
    "audiocaps": "audiocaps_val.csv",
    "auto_acd": "auto_acd.csv",
    "videoinstruct": "VideoInstruct100K.json",
    "internvid": "internvid.jsonl",
    "vggsound": "vggsound.csv",
    "saven_vid": "saven_vid.json",
    "avbench": "saven_vid.json",
    "videomme": "videomme_flat.jsonl",
    "music_avqa": "avqa-test.json",
}


def test_every_data_set_is_described_and_has_a_fixture():
    assert set(FILES) == set(DATASETS)
    described = describe_datasets()
    for name, importer in DATASETS.items():
        assert f"  {name} " in described and importer.title in described
        assert importer.__doc__ and "Media" in importer.__doc__
        assert "options:\n  max_samples=0: " in describe_dataset(importer.title)
    one = describe_dataset("vggsound")
    for text in (
        "VGGSound (--dataset vggsound)",
        "No header",
        "<id>_000030",
        "  split=train: train, test or all",
    ):
        assert text in one
    assert '"qa": [{"id", "type": 1..5' in describe_dataset("avbench")


@pytest.mark.parametrize(
    ("dataset", "other"),
    [pair for pair in itertools.permutations(FILES, 2) if FILES[pair[0]] != FILES[pair[1]]],
)
def test_the_file_of_another_data_set_is_named(load, fixtures, dataset, other):
    with pytest.raises(AnnotationError) as error:
        load(dataset, FILES[other], ("a.mp4",))
    message = str(error.value)
    title = "SAVEn-Vid" if FILES[other] == "saven_vid.json" else DATASETS[other].title
    assert str(fixtures / FILES[other]) in message and f"it looks like {title}" in message


def test_the_missing_column_is_named(load):
    with pytest.raises(
        AnnotationError, match=r"no column 'videoID' but audiocap_id, .*AudioCaps \(--dataset audiocaps\)"
    ):
        load("panda70m", FILES["audiocaps"], ("a.mp4",))
    with pytest.raises(
        AnnotationError, match=r"have no 'question_id' but q, a, video_id; it looks like VideoInstruct"
    ):
        load("music_avqa", FILES["videoinstruct"], ("a.mp4",))


def test_unknown_data_sets_files_and_folders(load, fixtures, tmp_path, media):
    root = media("a.mp4")
    with pytest.raises(AnnotationError, match="did you mean audiocaps"):
        load("audiocap", FILES["audiocaps"])
    with pytest.raises(AnnotationError, match="no such annotation file"):
        import_annotations("audiocaps", tmp_path / "none.csv", root)
    with pytest.raises(AnnotationError, match="no such media folder"):
        import_annotations("audiocaps", fixtures / FILES["audiocaps"], tmp_path / "none")
    with pytest.raises(AnnotationError, match="holds no media file"):
        import_annotations("audiocaps", fixtures / FILES["audiocaps"], fixtures)
    for content, reason in (
        (b"", "no column"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"videoID,url\n", "'timestamp'"),
    ):
        (tmp_path / "p.csv").write_bytes(content)
        with pytest.raises(AnnotationError, match=reason):
            import_annotations("panda70m", tmp_path / "p.csv", root)
    for content, reason in (
        (b"", "neither"),
        (b"\xff\xfe[", "UTF-8"),
        (b"[]", "no row"),
        (b'[{"q": 1', "is no JSON"),
    ):
        (tmp_path / "v.json").write_bytes(content)
        with pytest.raises(AnnotationError, match=reason):
            import_annotations("videoinstruct", tmp_path / "v.json", root)


@pytest.mark.parametrize("dataset", FILES)
def test_a_listing_is_written_and_read_back_unchanged(load, media, tmp_path, dataset):
    names = [
        "00000/0000000_00000.mp4", "aaaaaaaaaa1.mp4", "Y--bbbbbbbb1.wav", "cccccccccc1.wav", "oddddddddd1_000117.wav",
        "v_k_ZXmr8pmrs.mp4", "ffffffffff1.mp4", "--ggggggg_2.mp4", "hike.mp4", "kkkkkkkkkk1.mp4", "00000001.mp4",
    ]  # fmt: skip
    listing = load(dataset, FILES[dataset], names)
    assert listing.lines and listing.rejections
    path = tmp_path / "manifest.jsonl"
    write_manifest(listing, path)
    assert read_manifest(path, media()) == listing
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["manifest.jsonl"]
    # Its lines are native ones: a reader that knows nothing of notes sees every sample.
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("conversations" in row for row in rows) == len(listing.lines)


def test_samples_are_chosen_without_a_seed(fixtures, tmp_path, media):
    root = media(*(f"aaaaaaa{n:04d}.mp4" for n in range(300)))
    lines = [
        json.dumps({
            "YoutubeID": f"aaaaaaa{n:04d}", "Start_timestamp": "00:00:01.000", "End_timestamp": "00:00:02.000",
            "Caption": "a boat",
        })
        for n in range(300)
    ]  # fmt: skip
    path = tmp_path / "i.jsonl"
    path.write_text("\n".join(lines))
    everything = import_annotations("internvid", path, root)
    few = import_annotations("internvid", path, root, max_samples=50)
    more = import_annotations("internvid", path, root, max_samples="120")
    assert few == import_annotations("internvid", path, root, max_samples=50)
    assert len(few.lines) == 50 and few.left_out == {"beyond max_samples=50": 250}
    assert {line.id for line in few.lines} < {line.id for line in more.lines}
    kept = [everything.lines.index(line) for line in few.lines]
    assert kept == sorted(kept) and kept[:10] != list(range(10))  # The file's order, not its beginning.
    assert import_annotations("internvid", path, root, max_samples=300) == everything
    with pytest.raises(AnnotationError, match="max_samples is -1"):
        import_annotations("internvid", path, root, max_samples=-1)


def test_media_are_listed_once(media, monkeypatch):
    root = media("a/x.mp4", "b/.y.mp4", ".c/z.mp4", "b/x.wav", "b/notes.txt")
    files = MediaFiles(root)
    assert files.by_stem == {"x": ["a/x.mp4", "b/x.wav"]}
    monkeypatch.setattr("os.walk", None)
    assert files.find(["none", "x"], ("audio", "video")) == ("b/x.wav", "x")
    assert files.find(["x"]) == ("a/x.mp4", "x")


@pytest.fixture
def bucket(tmp_path, monkeypatch, fixtures):
    """gs://bucket on the local disk, with all annotation files in gs://bucket/annotations."""
    monkeypatch.setenv(fake_gcs.ROOT, str(tmp_path / "gcs"))
    fake_gcs.register()
    shutil.copytree(fixtures, tmp_path / "gcs" / "bucket" / "annotations")
    return tmp_path / "gcs" / "bucket"


def test_annotations_and_media_in_a_bucket(bucket, fixtures):
    names = ("a/Ycccccccccc1.wav", "Y-_ccccccc_2.wav", ".trash/Y-_ccccccc_2.wav", "a/.Ycccccccccc1.wav")
    for name in names:
        (bucket / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / "audio" / name).touch()
    listing = import_annotations(
        "audiocaps", "gs://bucket/annotations/audiocaps_val.csv", "gs://bucket/audio/"
    )
    assert {(line.path, line.name) for line in listing.lines} == {
        ("gs://bucket/audio/a/Ycccccccccc1.wav", "a/Ycccccccccc1.wav"),
        ("gs://bucket/audio/Y-_ccccccc_2.wav", "Y-_ccccccc_2.wav"),
    }
    with pytest.raises(AnnotationError, match="gs://bucket/none: holds no media file"):
        import_annotations("audiocaps", fixtures / "audiocaps_val.csv", "gs://bucket/none")
    with pytest.raises(AnnotationError, match=r"gs://bucket/none\.csv: no such annotation file"):
        import_annotations("audiocaps", "gs://bucket/none.csv", "gs://bucket/audio")


@pytest.mark.parametrize("dataset", FILES)
def test_every_data_set_is_read_from_a_bucket(bucket, fixtures, dataset):
    local = bucket / "media"
    for name in (
        "aaaaaaaaaa1.mp4",
        "Y--bbbbbbbb1.wav",
        "hike.mp4",
        "kkkkkkkkkk1.mp4",
        "00000001.mp4",
        "v_k_ZXmr8pmrs.mp4",
    ):
        local.mkdir(exist_ok=True)
        (local / name).touch()
    there = import_annotations(dataset, f"gs://bucket/annotations/{FILES[dataset]}", "gs://bucket/media")
    here = import_annotations(dataset, fixtures / FILES[dataset], local)
    assert [(line.id, line.name) for line in there.lines] == [(line.id, line.name) for line in here.lines]
    assert len(there.rejections) == len(here.rejections) and there.left_out == here.left_out


def test_without_gcsfs_a_bucket_says_what_to_install(fixtures, monkeypatch):
    import fsspec

    def missing(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for path, root in (("gs://bucket/a.csv", fixtures), (fixtures / FILES["audiocaps"], "gs://bucket/audio")):
        with pytest.raises(UserError, match=r"pip install 'avlm_jax\[gcp\]'"):
            import_annotations("audiocaps", path, root)


def test_names_of_clips():
    assert clip_stems("abcdefghij_", 30.0, 40.0)[:5] == [
        "abcdefghij__000030", "abcdefghij__30_40", "abcdefghij__30.000_40.000", "abcdefghij__30000_40000",
        "abcdefghij__30",
    ]  # fmt: skip
    assert not any(stem.endswith("_000000") for stem in clip_stems("abcdefghijk", 0.48, 10.0))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_arrays_are_read_in_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(rows_module, "CHUNK", chunk)
    generator = random.Random(0)
    items = [{"k": "x" * generator.randrange(40), "n": [n, {"é": None}]} for n in range(30)]
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(items, indent=indent) + "\n")
        assert [row.values for row in json_rows(path, ("k",))] == items
    path.write_text('[{"k": 1}, 123456, {"n": 2}]')
    assert [(row.values, row.problem[:14]) for row in json_rows(path, ("k",))] == [
        ({"k": 1}, ""), ({}, "is no JSON obj"), ({}, "has no 'k'")
    ]  # fmt: skip


def test_damaged_arrays_name_the_line(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    for chunk in (4, 1 << 20):
        monkeypatch.setattr(rows_module, "CHUNK", chunk)
        for text, line, reason in (
            ('[{"k": 1},\n{"k": 2},\n{"k": }]', 3, "Expecting value"),
            ('[{"k": 1}\n{"k": 2}]', 2, "a comma is expected"),
            ('[{"k": 1},\n\n{"k": 2},\n', 4, "not closed"),
            ('[{"k": 1},\n\n{"k": 2', 3, "is no JSON"),
        ):
            path.write_text(text)
            with pytest.raises(AnnotationError, match=f"a.json, line {line}: .*{reason}"):
                list(json_rows(path, ("k",)))


def test_bad_csv_rows_are_told_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,2\n"1"x,2\n\n1,2,3\n"two\nlines",4\n5,"never closed\n6,7\n')
    rows = list(csv_rows(path, ("a", "b")))
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert [bool(row.problem) for row in rows] == [False, True, True, False, True]
    assert "line 3" in rows[1].problem and "has 3 fields where 2" in rows[2].problem
    assert rows[3].values == {"a": "two\nlines", "b": "4"} and "line 8" in rows[4].problem

"""Every way in which a file can fail to be a JSON object is one error that names it."""

from __future__ import annotations

import pytest

from avlm_jax.weights.json_file import JsonFileError, file_sha256, read_json_object


def test_an_object(tmp_path):
    (tmp_path / "x.json").write_bytes('{"a": [1, "\u00e9"]}'.encode())
    assert read_json_object(tmp_path / "x.json") == {"a": [1, "\u00e9"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b'{"a": "\xff"}', "no valid JSON .*utf-8"),
        (b"[" * 100_000, "no valid JSON .nested too deep"),
        (b"[]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_other_content(tmp_path, content, message):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(JsonFileError, match=f"x.json: {message}.*; fetch or copy it again"):
        read_json_object(file)


def test_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(JsonFileError, match="x.json: missing; fetch or copy it again"):
        read_json_object(tmp_path / "x.json")
    with pytest.raises(JsonFileError, match="folder: missing; a model has one"):
        read_json_object(tmp_path / "folder", "a model has one")


def test_a_digest(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from avlm_jax.weights import safetensors_io
from avlm_jax.weights.safetensors_io import (
    SafetensorsError,
    read_file,
    read_folder,
    write_file,
    write_folder,
)


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b.half": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "b.byte": np.array([True, False, True]),
        "c.scalar": np.array(3.5, np.float64),
        "d.empty": np.zeros((0, 4), np.int32),
        "e.transposed": rng.normal(size=(4, 6)).astype(np.float16).T,
    }


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        stored = np.asarray(found[name])
        assert stored.dtype == array.dtype and stored.shape == array.shape, name
        assert stored.tobytes() == np.ascontiguousarray(array).tobytes(), name


def raw_file(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_round_trip_of_every_kind(tmp_path):
    write_file(tmp_path / "x.safetensors", some_tensors())
    found = read_file(tmp_path / "x.safetensors")
    assert_same(found, some_tensors())
    assert not np.asarray(found["a"]).flags.writeable
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]  # no half-written file is left
    # Aligned as torch's and numpy's frombuffer want it.
    assert all(tensor.begin % tensor.dtype.itemsize == 0 for tensor in found.values())


def test_the_reference_implementation_agrees(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {n: np.ascontiguousarray(a) for n, a in some_tensors().items() if n != "b.half"}
    safetensors.save_file(tensors, tmp_path / "theirs.safetensors")
    assert_same(read_file(tmp_path / "theirs.safetensors"), tensors)
    write_file(tmp_path / "ours.safetensors", tensors)
    assert_same(safetensors.load_file(tmp_path / "ours.safetensors"), tensors)


def test_sharded_folder_and_a_smaller_one_over_it(tmp_path):
    tensors = some_tensors()
    files = write_folder(tmp_path, tensors, max_shard_bytes=60)
    assert len(files) > 3 and files[-1].name == safetensors_io.INDEX_FILE
    assert_same(read_folder(tmp_path), tensors)
    small = {"a": tensors["a"]}
    write_folder(tmp_path, small)
    assert [p.name for p in tmp_path.iterdir()] == [safetensors_io.SINGLE_FILE]
    assert_same(read_folder(tmp_path), small)
    assert_same(read_folder(tmp_path / safetensors_io.SINGLE_FILE), small)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    class Broken:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("gone")

    write_file(tmp_path / "x.safetensors", some_tensors())
    with pytest.raises(RuntimeError, match="gone"):
        write_file(tmp_path / "x.safetensors", {"z": Broken()})
    assert_same(read_file(tmp_path / "x.safetensors"), some_tensors())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


GOOD = entry([2], 0, 8)


@pytest.mark.parametrize(
    "header,data,message",
    [
        ({"x": GOOD}, b"1234567", r"'x': ends at byte \d+ of \d+; truncated"),
        ({"x": GOOD}, b"123456789", "1 bytes follow the last tensor"),
        ({"x": entry([3], 0, 8)}, b"12345678", r"'x': 8 bytes, but F32\[3\] takes 12"),
        ({"x": GOOD, "y": entry([2], 4, 12)}, b"123456789012", "'y' overlaps"),
        ({"x": GOOD, "y": entry([1], 12, 16)}, b"1234567890123456", "'y' leaves a hole"),
        ({"x": entry([2], 0, 8, "Q4")}, b"12345678", "'x': dtype 'Q4' is unknown"),
        ({"x": entry([-2], 0, 8)}, b"12345678", "'x': shape"),
        ({"x": {"dtype": "F32"}}, b"", "'x': the header entry lacks"),
        ({"x": entry([2], 8, 0)}, b"12345678", "'x': -8 bytes"),
        (b"[1, 2]", b"", "header is a list"),
        (b"{nonsense", b"", "no valid JSON"),
        (b'{"x": 1, "x": 2}', b"", "'x' stands twice"),
    ],
)
def test_broken_files_name_file_and_key(tmp_path, header, data, message):
    file = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(SafetensorsError, match=message) as error:
        read_folder(tmp_path)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "0 bytes are no safetensors"),
        (b"PK\x03\x04" + b"\xff" * 60, "too large"),
        ((5000).to_bytes(8, "little") + b"{}", "truncated inside its header"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SafetensorsError, match=message):
        read_folder(tmp_path)


def test_a_folder_whose_parts_disagree(tmp_path):
    with pytest.raises(SafetensorsError, match="no such folder"):
        read_folder(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SafetensorsError, match="found: notes.txt"):
        read_folder(tmp_path)
    write_folder(tmp_path, some_tensors(), max_shard_bytes=60)
    index = tmp_path / safetensors_io.INDEX_FILE
    good = json.loads(index.read_text())

    def with_map(change: dict) -> None:
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], **change}}))

    with_map({"ghost": good["weight_map"]["a"]})
    with pytest.raises(SafetensorsError, match="'ghost' is in the index but not in the file"):
        read_folder(tmp_path)
    with_map({"a": "../elsewhere.safetensors"})
    with pytest.raises(SafetensorsError, match="not a plain file name"):
        read_folder(tmp_path)
    with_map({"a": "model-9.safetensors"})
    with pytest.raises(SafetensorsError, match="model-9.safetensors: missing"):
        read_folder(tmp_path)
    fewer = {n: f for n, f in good["weight_map"].items() if n != "b.half"}
    index.write_text(json.dumps({"weight_map": {**fewer, "b.byte": good["weight_map"]["b.half"]}}))
    with pytest.raises(SafetensorsError, match="'b.(half|byte)' is in the (file|index) but not"):
        read_folder(tmp_path)
    index.write_text("{}")
    with pytest.raises(SafetensorsError, match="not an index"):
        read_folder(tmp_path)
    write_file(tmp_path / safetensors_io.SINGLE_FILE, some_tensors())
    with pytest.raises(SafetensorsError, match="holds both"):
        read_folder(tmp_path)


def test_an_unknown_dtype_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(SafetensorsError, match="'x' has dtype complex64"):
        write_file(tmp_path / "x.safetensors", {"x": np.zeros(2, np.complex64)})
    assert not list(tmp_path.iterdir())


def test_reading_is_lazy(tmp_path):
    """The file's tail can be missing from memory: only what is sliced is touched."""
    big = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    write_file(tmp_path / "x.safetensors", {"big": big})
    tensor = read_file(tmp_path / "x.safetensors")["big"]
    view = np.asarray(tensor)
    assert view.base is not None and tensor.nbytes == big.nbytes
    np.testing.assert_array_equal(view[700, 5:9], big[700, 5:9])
    assert np.asarray(tensor, dtype=np.float64).dtype == np.float64


def test_progress_counts_tensors(tmp_path, capsys):
    write_folder(tmp_path, some_tensors(), max_shard_bytes=60, label="writing")
    assert "writing: 6 tensors done in " in capsys.readouterr().err
    write_folder(tmp_path, {}, label="writing")
    assert "writing: 0 tensors done in " in capsys.readouterr().err
    write_folder(tmp_path, some_tensors())
    assert capsys.readouterr().err == ""

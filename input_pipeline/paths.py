"""Local paths and gs:// paths behind one interface: etils.epath, and what it leaves open."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from input_pipeline.errors import UserError

if TYPE_CHECKING:
    from etils import epath  # Imported when an address is named: it takes longer than all else here.

AnyPath: TypeAlias = "Path | epath.Path"

COPY_BYTES = 16 * 2**20
REQUESTS_AT_ONCE = 16  # Of Cloud Storage, side by side; each takes some round trips and little bandwidth.

Item, Result = TypeVar("Item"), TypeVar("Result")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address, gs://bucket/object."""
    return "://" in os.fspath(path)


def to_path(path: str | os.PathLike[str]) -> AnyPath:
    """A pathlib.Path, or an epath.Path for gs://.

    Raises:
        UserError: an address of another kind, or one that cannot be reached with what is installed.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return Path(text)
    if not text.startswith("gs://"):
        raise UserError(f"{text}: only local paths and gs:// addresses are supported")
    # epath takes TensorFlow's file system where TensorFlow is installed, and fsspec's otherwise.
    if importlib.util.find_spec("tensorflow") is None:
        import fsspec

        try:
            fsspec.get_filesystem_class("gcs")
            # A run looks again and again for what other machines have written meanwhile.
            fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{text}: Google Cloud Storage cannot be reached ({error}); pip install 'avlm_jax[gcp]'"
            ) from None
    from etils import epath

    return epath.Path(text)


def walk(folder: AnyPath) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, also of a folder on gs://; the names are full paths or addresses."""
    if not is_remote(folder):
        yield from os.walk(folder)
        return
    for directory, folders, files in folder.walk(on_error=_raise_unless_missing):
        text = os.fspath(directory)  # fsspec leaves the scheme out.
        yield text if is_remote(text) else f"gs://{text.lstrip('/')}", folders, files


def _raise_unless_missing(error: OSError) -> None:
    """What cannot be listed is no empty folder."""
    if not isinstance(error, FileNotFoundError):
        raise error


def join(root: str | os.PathLike[str], name: str) -> str:
    """`name` below `root`, absolute and normalised; `name` itself where it is absolute or an address."""
    root = os.fspath(root)
    if is_remote(name):
        root, name = name, ""
    if not is_remote(root) or os.path.isabs(name):
        return os.path.normpath(os.path.join(os.path.abspath(root), name))
    scheme, _, rest = root.partition("://")
    return f"{scheme}://{os.path.normpath(os.path.join(rest, name))}"


def file_size(path: AnyPath) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return path.stat().length if is_remote(path) else path.stat().st_size


def map_files(
    function: Callable[[Item], Result], items: Iterable[Item], folder: str | os.PathLike[str]
) -> Iterator[Result]:
    """`function` of each item, in order; on gs:// side by side and no further ahead than REQUESTS_AT_ONCE.

    Args:
        function: reads a file of `folder`.
        items: what it takes.
        folder: local or gs://.
    """
    if not is_remote(folder):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as executor:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(executor.submit(function, item))
            if len(ahead) == REQUESTS_AT_ONCE:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@contextlib.contextmanager
def appearing(path: AnyPath) -> Iterator[Path]:
    """A local path to write to; on leaving without an error the file appears, complete, as `path`."""
    if is_remote(path):  # An object appears when all of it has arrived.
        with tempfile.TemporaryDirectory(prefix="avlm-") as folder:
            temporary = Path(folder, path.name)
            yield temporary
            with open(temporary, "rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)  # So that the name outlives a power failure as the content does.


def write_text(path: AnyPath, text: str) -> None:
    """Writes a UTF-8 file that appears complete or not at all."""
    with appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

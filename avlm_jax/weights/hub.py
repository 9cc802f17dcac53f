"""Where weights come from: a folder or file of this machine, else a repository of the Hugging Face hub.

Of a repository only data are fetched: JSON, safetensors, tokenizer files and chat templates of its top level. Pickles
(.bin, .pt) and code (.py) stay where they are.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from input_pipeline.errors import UserError
from input_pipeline.progress import PLAIN_LINE_SECONDS

FETCHED = (
    "*.json",
    "model*.safetensors",  # Not "*": some repositories hold the weights once more, as consolidated.safetensors.
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "*.jinja",
    "LICENSE*",
)
NOT_FETCHED = ("*/*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.py")

# The hub's own rule for names (huggingface_hub.utils.validate_repo_id), and a branch, tag or commit.
_REPOSITORY = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")


class HubError(UserError):
    """A name that is neither here nor on the hub, or a repository that cannot be fetched."""


def resolve(name: str | os.PathLike[str]) -> Path:
    """The folder or file that `name` stands for.

    A path that exists always wins. Otherwise `owner/name` or `owner/name@revision` (branch, tag or commit) is
    fetched from the hub, or found complete in its local cache ($HF_HOME); HF_TOKEN opens gated repositories.

    Raises:
        HubError: nothing has that name; the repository is gated, has no such revision or no safetensors; the
            hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    match = _REPOSITORY.fullmatch(str(name))
    if match is None or str(name).endswith((".pt", ".safetensors", ".bin")):
        raise HubError(
            f"{name}: no such file or folder, and no hub name like owner/name or owner/name@revision"
        )
    return _fetch(match["repository"], match["revision"], str(name))


def source_name(name: str | os.PathLike[str], path: Path) -> str:
    """What to record as the source of `path = resolve(name)`: owner/name@commit, or the absolute path."""
    if not Path(name).expanduser().exists() and _SNAPSHOT.fullmatch(path.name):
        return f"{str(name).partition('@')[0]}@{path.name}"
    return str(path.absolute())


def _fetch(repository: str, revision: str | None, name: str) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import tqdm as terminal_bar

    def refuse(what: str) -> HubError:
        return HubError(f"there is no folder {name!r} here, and {what}")

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(FETCHED),
            ignore_patterns=list(NOT_FETCHED),
            tqdm_class=terminal_bar if sys.stderr.isatty() else _Lines,
        )
    except errors.GatedRepoError:
        raise refuse(
            f"{repository} on the hub is gated: accept its terms on https://huggingface.co/{repository}, then set "
            "HF_TOKEN to your token"
        ) from None
    except errors.RevisionNotFoundError:
        raise refuse(f"{repository} on the hub has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise refuse(f"the hub knows no repository {repository} (a private one wants HF_TOKEN set)") from None
    except errors.HFValidationError as error:
        raise refuse(f"{repository} is no hub name: {error}") from None
    except (errors.HTTPError, OSError) as error:
        # HTTPError: the client's own, where no connection comes about. The hub's other errors are OSErrors.
        reason = str(error).strip().partition("\n")[0]
        raise refuse(
            f"{repository} cannot be fetched from the hub ({reason}). Without a network, copy the repository's "
            "folder to this machine and give its path"
        ) from error
    found = sorted(file.name for file in Path(folder).iterdir())
    if not any(file.endswith(".safetensors") for file in found):
        raise HubError(
            f"{repository} holds no model*.safetensors (fetched: {', '.join(found) or 'nothing'}). Weights that are "
            "published as .bin or .pt only are pickles and are not fetched: take a repository or revision with "
            "safetensors"
        )
    return Path(folder)


class _Lines(tqdm):
    """A bar where there is no terminal: a plain line now and then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "mininterval": PLAIN_LINE_SECONDS, "file": sys.stderr})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.n:
            print(
                self.format_meter(**{**self.format_dict, "bar_format": None, "ncols": 0}),
                file=self.fp,
                flush=True,
            )

    def close(self) -> None:
        if not self.disable:
            self.display()
            self.disable = True

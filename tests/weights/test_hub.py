"""Names of weights: what is here wins; of a repository on the hub only data are fetched."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from avlm_jax.weights.hub import HubError, resolve, source_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "model-00001-of-00001.safetensors": b"weights" * 1000,
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ x }}",
    "LICENSE": b"free",
    "pytorch_model.bin": b"a pickle",
    "model.pt": b"a pickle",
    "modeling_own.py": b"import os",
    "consolidated.safetensors": b"the weights again",
    "onnx/config.json": b"{}",
}
FETCHED = list(FILES)[:7]

# In a process of its own: huggingface_hub reads its settings once, when it is imported.
RESOLVE = """
import sys
from avlm_jax.weights.hub import HubError, resolve, source_name
try:
    path = resolve(sys.argv[1])
    print(source_name(sys.argv[1], path), *sorted(file.name for file in path.iterdir()))
except HubError as error:
    print(error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as snapshot_download uses."""

    protocol_version = "HTTP/1.1"
    asked: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, code: int, body: bytes | dict | list, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"content-length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        owner, _, rest = path.removeprefix("/api/models/").partition("/")
        files = FILES if owner == "open" else {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
        if path.startswith(("/open/", "/pickles/")):
            content = FILES[path.split("/", 5)[5]]
            self.answer(200, content, etag=f'"{hashlib.sha1(content).hexdigest()}"', x_repo_commit=COMMIT)
        elif owner == "gated":
            self.answer(403, {"error": "gated"}, x_error_code="GatedRepo")
        elif owner not in ("open", "pickles"):
            self.answer(401, {"error": "Repository not found"}, x_error_code="RepoNotFound")
        elif "/tree/" in rest:
            self.answer(
                200,
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for name, content in files.items()
                ],
            )
        elif rest.endswith(("model", "revision/main", "revision/v1.0")):
            self.answer(200, {"id": f"{owner}/model", "sha": COMMIT, "siblings": []})
        else:
            self.answer(404, {"error": "Revision not found"}, x_error_code="RevisionNotFound")


@pytest.fixture
def hub():
    """(address, paths that were asked for)."""
    handler = type("Handler", (Hub,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


def ask(name: str, address: str, home: Path, repository: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value
        for key, value in os.environ.items()
        if "proxy" not in key.lower() and not key.startswith("HF_")
    }
    environment |= {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(repository),
    }
    result = subprocess.run(
        [sys.executable, "-c", RESOLVE, name], cwd=home, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result


def test_what_is_here_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name")
    assert source_name("owner/name", Path("owner/name")) == str(tmp_path / "owner" / "name")
    (tmp_path / "x.pt").write_bytes(b"")
    assert resolve(tmp_path / "x.pt") == tmp_path / "x.pt"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/x.pt") == tmp_path / "x.pt"


@pytest.mark.parametrize("name", ["weights", "a/b/c", "/nowhere/at/all", "owner/BEATs.pt", "a b/c", "../x/y"])
def test_what_is_neither_here_nor_a_hub_name(name):
    with pytest.raises(HubError, match="no such file or folder, and no hub name"):
        resolve(name)


def test_only_data_are_fetched_and_the_commit_is_recorded(tmp_path, hub, repository):
    address, asked = hub
    for name in ("open/model", "open/model@v1.0"):
        result = ask(name, address, tmp_path, repository)
        assert result.stdout.split() == [f"open/model@{COMMIT}", *sorted(FETCHED)]
    assert "100%" in result.stderr or "Fetching" in result.stderr
    fetched = {path.rpartition("/")[2] for path in asked if "/resolve/" in path}
    assert fetched == set(FETCHED)
    # Without the hub, what was fetched once is found again.
    again = ask("open/model", "http://127.0.0.1:9", tmp_path, repository)
    assert again.stdout.split()[0] == f"open/model@{COMMIT}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gated/model",
            "gated/model on the hub is gated: accept its terms on https://huggingface.co/gated/model",
        ),
        ("open/model@v2", "open/model on the hub has no revision 'v2'"),
        ("nobody/model", "the hub knows no repository nobody/model"),
        ("pickles/model", "pickles/model holds no model*.safetensors (fetched: config.json)"),
    ],
)
def test_refusals_of_the_hub(tmp_path, hub, repository, name, message):
    assert message in ask(name, hub[0], tmp_path, repository).stdout


def test_without_a_network(tmp_path, repository):
    message = ask("open/model", "http://127.0.0.1:9", tmp_path, repository).stdout
    assert "there is no folder 'open/model' here, and open/model cannot be fetched from the hub" in message
    assert "copy the repository's folder to this machine and give its path" in message

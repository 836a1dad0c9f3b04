"""An upload to the hub, by huggingface_hub's own client, to a server on this machine that speaks the hub's language."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from xgblora.cli import main


class Hub(BaseHTTPRequestHandler):
    """Takes a repository and one commit. Without the right token it refuses, as the hub does."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        store: dict[str, Any] = self.server.store  # type: ignore[attr-defined]
        if self.path == "/api/validate-yaml":  # of the card; it asks no token
            store["card"] = json.loads(body)["content"]
            return self._answer({"errors": [], "warnings": []})
        if self.headers["Authorization"] != "Bearer hf_right":
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            store["repository"] = json.loads(body)
            return self._answer({"url": f"http://{self.headers['Host']}/me/{json.loads(body)['name']}"})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if self.path.endswith("/commit/main"):
            store["commit"] = [json.loads(line) for line in body.splitlines()]
            oid = "a" * 40
            return self._answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/{oid}", "commitOid": oid, "success": True}
            )
        return self._answer({"error": f"no {self.path}"}, 404)

    def do_GET(self) -> None:
        self._answer({"id": "me/mine", "siblings": [], "sha": "b" * 40})

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.store = {}  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def push(hub: ThreadingHTTPServer, token: str, *argv: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads the hub's address when it is imported."""
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    env = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    command = [sys.executable, "-m", "xgblora", "push", *map(str, argv)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=env, check=False, timeout=120)


@pytest.fixture
def run_folder(small: list[str], tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    assert main(["train", *small, "--max_steps", "2", "--output_dir", str(folder)]) == 0
    return folder


def test_the_adapter_with_its_card_is_uploaded(hub: ThreadingHTTPServer, run_folder: Path) -> None:
    done = push(hub, "hf_right", run_folder, "me/mine", "--private", "--message", "My first")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("/commit/" + "a" * 40)
    store: dict[str, Any] = hub.store  # type: ignore[attr-defined]
    assert store["repository"]["name"] == "mine"
    assert store["repository"].get("private") or store["repository"].get("visibility") == "private"
    header, *files = store["commit"]
    assert header["value"]["summary"] == "My first"
    sent = {entry["value"]["path"]: base64.b64decode(entry["value"]["content"]) for entry in files}
    for file in (run_folder / "adapter").iterdir():
        assert sent[file.name] == file.read_bytes()
    assert "library_name: peft" in store["card"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "task.yaml"} <= set(sent)


def test_a_refusal_is_one_line(hub: ThreadingHTTPServer, run_folder: Path) -> None:
    for token, place, says in (
        ("hf_wrong", "me/mine", "cannot upload to me/mine: "),
        ("hf_right", "not/a/name", "cannot upload to not/a/name: "),
    ):
        done = push(hub, token, run_folder, place)
        assert done.returncode == 2
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert says in last
    assert main(["push", str(run_folder)]) == 2

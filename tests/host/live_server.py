"""A real ComfyUI server as a subprocess, headless, in a temp base directory, driven through its HTTP API."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS, RUN_SECONDS, REQUEST_SECONDS = 600.0, 900.0, 300.0
"""When to give a server up. Much more than it needs anywhere: a busy machine must not look like a broken server."""
POLL_SECONDS = 0.2
SHIM = Path(__file__).with_name("cpu_torch.py")


class PromptError(RuntimeError):
    """A prompt was refused or failed; `details` is what the server said, node by node."""

    def __init__(self, message: str, details: Any) -> None:
        super().__init__(message)
        self.details = details


@dataclass(frozen=True)
class LiveServer:
    """Handle of a running server. `base` has models/, input/ and output/."""

    process: subprocess.Popen[bytes]
    port: int
    base: Path
    log_file: Path

    def get(self, path: str) -> bytes:
        """Body of a GET request, e.g. `/object_info`."""
        return self._request(urllib.request.Request(self._url(path)))

    def get_json(self, path: str) -> Any:
        """Decoded JSON of a GET request."""
        return json.loads(self.get(path))

    def post_json(self, path: str, payload: Any) -> Any:
        """Decoded answer of a POST with a JSON body; None when the server answers nothing."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url(path), json.dumps(payload).encode(), headers)
        answer = self._request(request)
        return json.loads(answer) if answer else None

    def object_info(self, node_id: str | None = None) -> dict[str, Any]:
        """All node schemas, or those of one node."""
        if node_id is None:
            return self.get_json("/object_info")
        return self.get_json(f"/object_info/{node_id}")[node_id]

    def submit(self, prompt: dict[str, Any]) -> str:
        """Queues a prompt in API format; returns its id. PromptError when validation refuses it."""
        try:
            return self.post_json("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})["prompt_id"]
        except urllib.error.HTTPError as error:
            details = json.loads(error.read())
            raise PromptError(f"refused: {json.dumps(details, indent=1)}", details) from None

    def queue(self, prompt: dict[str, Any], *, timeout: float = RUN_SECONDS) -> dict[str, Any]:
        """Runs a prompt to its end; returns its history entry. PromptError when it was refused or a node failed."""
        return self.wait(self.submit(prompt), timeout=timeout)

    def wait(self, prompt_id: str, *, timeout: float = RUN_SECONDS) -> dict[str, Any]:
        """Waits for a submitted prompt; returns its history entry, with `outputs` by node id."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return _succeeded(entry)
            self.pause()
        raise TimeoutError(f"prompt {prompt_id} ran longer than {timeout} s; log:\n{self.log_tail()}")

    def view(self, image: dict[str, str]) -> bytes:
        """File bytes of one entry of a history's `images`."""
        return self.get("/view?" + urllib.parse.urlencode(image))

    def upload_image(self, path: Path, *, name: str | None = None) -> str:
        """Uploads into input/; returns the name LoadImage wants."""
        boundary = uuid.uuid4().hex
        disposition = f'form-data; name="image"; filename="{name or path.name}"'
        head = f"--{boundary}\r\nContent-Disposition: {disposition}\r\nContent-Type: application/octet-stream\r\n\r\n"
        tail = f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{boundary}--\r\n'
        body = head.encode() + path.read_bytes() + tail.encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return json.loads(self._request(urllib.request.Request(self._url("/upload/image"), body, headers)))["name"]

    def interrupt(self) -> None:
        """Stops the running prompt, as the Cancel button does."""
        self.post_json("/interrupt", {})

    def pause(self) -> None:
        """One bounded wait between two looks; RuntimeError with the log when the server has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with code {self.process.returncode}; log:\n{self.log_tail()}")
        time.sleep(POLL_SECONDS)

    def free(self) -> None:
        """Unloads every model and empties the node cache, as the Free button does."""
        self.post_json("/free", {"unload_models": True, "free_memory": True})

    def log_text(self) -> str:
        """Everything the server wrote so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, for messages."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def stop(self) -> None:
        """Ends the server: politely, then by force after 10 s."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _request(self, request: urllib.request.Request) -> bytes:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
            return answer.read()


def start_server(checkout: Path, base: Path, pack_root: Path, *, arguments: tuple[str, ...] = ()) -> LiveServer:
    """Starts `main.py` of a checkout on CPU and a free port with this pack in its custom_nodes; waits until it answers.

    `base` is a prepared base directory; nothing is written outside it. RuntimeError with the log when it fails.
    """
    link_pack(pack_root, base / "custom_nodes" / "ComfyUI-FusedID")
    shims = base / "shims"
    shims.mkdir(exist_ok=True)
    shutil.copyfile(SHIM, shims / "sitecustomize.py")
    port, log_file = _free_port(), base / "server.log"
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base)]
    command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", *arguments]
    path = os.pathsep.join([str(shims), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=checkout, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT
        )
    server = LiveServer(process=process, port=port, base=base, log_file=log_file)
    try:
        _wait_until_up(server)
    except BaseException:
        server.stop()
        raise
    return server


def link_pack(pack_root: Path, place: Path) -> None:
    """Links the repository into custom_nodes; copies it where links need rights (Windows)."""
    if place.exists():
        return
    try:
        place.symlink_to(pack_root, target_is_directory=True)
    except OSError:
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "tests", "benchmarks", ".*_cache")
        shutil.copytree(pack_root, place, ignore=ignored)


def _wait_until_up(server: LiveServer) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            server.get("/system_stats")
            return
        except OSError:
            server.pause()
    raise RuntimeError(f"ComfyUI did not answer within {START_SECONDS} s; log:\n{server.log_tail()}")


def _succeeded(entry: dict[str, Any]) -> dict[str, Any]:
    if entry["status"]["status_str"] == "success":
        return entry
    failures = [data for kind, data in entry["status"]["messages"] if kind.startswith("execution_")]
    last = failures[-1] if failures else {}
    raise PromptError(f"{last.get('node_type', 'prompt')}: {last.get('exception_message', 'interrupted')}", last)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

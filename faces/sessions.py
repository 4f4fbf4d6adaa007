"""One onnxruntime session per model file and provider for the whole process, with a bounded number of threads."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .providers import SUFFIX, available_providers, choose_provider, clash_hint, installed_builds, repair_hint

logger = logging.getLogger("fusedid")

MAX_THREADS = 4
"""Face models are small; more threads only take cores from the sampler."""
MAX_SESSIONS = 8

_sessions: dict[tuple[str, int, int, str], OnnxModel] = {}
_lock = threading.Lock()


class OnnxModel:
    """A loaded model: call it with one NCHW or NHWC float32 array, get the list of outputs."""

    def __init__(self, path: Path, provider: str) -> None:
        self.path = path
        self._session = _create_session(path, provider)
        self.provider = self._session.get_providers()[0].removesuffix(SUFFIX)
        if self.provider != provider:
            logger.warning(_fallback_message(path, provider, self.provider))
        self._input = self._session.get_inputs()[0].name

    def __call__(self, batch: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {self._input: np.ascontiguousarray(batch, dtype=np.float32)})


def load_model(path: Path, provider: str = "auto") -> OnnxModel:
    """The session for a file and a provider (short name or ``auto``); loaded once, reused by everybody.

    Raises ``ValueError`` for a missing or damaged file, a provider that is not there, or a missing onnxruntime.
    """
    chosen = choose_provider(provider, available_providers())
    key = (*_file_key(path), chosen)
    with _lock:
        if key not in _sessions:
            while len(_sessions) >= MAX_SESSIONS:
                _sessions.pop(next(iter(_sessions)))
            _sessions[key] = OnnxModel(path, chosen)
        return _sessions[key]


def release_models() -> int:
    """Forget all sessions so that their memory is freed with the last user; returns how many there were."""
    with _lock:
        count = len(_sessions)
        _sessions.clear()
    return count


def file_sha256(path: Path) -> str:
    """sha256 of a file's content; read once per version of the file."""
    return _sha256(*_file_key(path))


def _file_key(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"the face model {path} cannot be read ({error.strerror}); put the file back") from error
    return str(path.resolve()), stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=64)
def _sha256(path: str, _mtime: int, _size: int) -> str:
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _create_session(path: Path, provider: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, min(MAX_THREADS, os.cpu_count() or 1))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    wanted = list(dict.fromkeys([provider + SUFFIX, "CPU" + SUFFIX]))
    try:
        return onnxruntime.InferenceSession(str(path), sess_options=options, providers=wanted)
    # onnxruntime raises classes of its compiled part that share only Exception as a base.
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"onnxruntime cannot load the face model {path} ({first_line}); the file is damaged or made for a newer "
            "onnxruntime: download it again or upgrade onnxruntime"
        ) from error


def _fallback_message(path: Path, wanted: str, got: str) -> str:
    hint = clash_hint(installed_builds(), available_providers()) or repair_hint()
    return f"{path.name} runs on {got} although {wanted} was chosen: its libraries did not load. {hint}"

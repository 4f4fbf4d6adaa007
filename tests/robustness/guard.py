"""Sees what hostile input must never cause: programs, network, unpickling, much memory, hangs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
PICKLES = ("pickle.find_class",)
"""CPython reports these (sys.addaudithook). torch's weights-only unpickler finds its classes without this event."""
CASE_SECONDS = 20.0
"""Of computing: a case takes milliseconds, and what other programs take of the machine does not count."""
MEMORY_BYTES = 256 << 20
"""What one case may need at most beyond what was there before."""

_watched: list[tuple[frozenset[str], list[str]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for names, seen in _watched:
        if event in names and not _is_local(event, arguments):
            seen.append(f"{event}{arguments!r}"[:300])


def _is_local(event: str, arguments: tuple[Any, ...]) -> bool:
    """Unix sockets and the event loop's own pair are no network."""
    return event == "socket.connect" and isinstance(arguments[1], (str, bytes))


sys.addaudithook(_hook)


@contextmanager
def forbidden(*events: str) -> Iterator[list[str]]:
    """Fails when one of these audit events happens inside the block."""
    seen: list[str] = []
    entry = (frozenset(events), seen)
    _watched.append(entry)
    try:
        yield seen
    finally:
        _watched.remove(entry)
    assert not seen, f"hostile input caused {seen}"


@contextmanager
def opened() -> Iterator[list[str]]:
    """Every file that Python opens inside the block."""
    seen: list[str] = []
    entry = (frozenset({"open"}), seen)
    _watched.append(entry)
    try:
        yield seen
    finally:
        _watched.remove(entry)


@contextmanager
def limited_time() -> Iterator[None]:
    """Fails when the block computed longer than any case may."""
    start = time.process_time()
    yield
    took = time.process_time() - start
    assert took < CASE_SECONDS, f"one case took {took:.0f} s"


@contextmanager
def limited_memory(allowed: int = MEMORY_BYTES) -> Iterator[None]:
    """Fails when the process's peak inside the block lies further above its start than allowed (Linux; else unseen)."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        yield
        return
    reset.write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    yield
    grown = _status("VmHWM") - before
    assert grown <= allowed, f"one case took {grown >> 20} MiB"


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:")) << 10

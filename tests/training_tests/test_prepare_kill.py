"""Killed at random places and started again, the preparation ends with the identical files."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import prepare_kit as kit
import pytest

ROOT = Path(__file__).parents[2]
KILLS = 5
PATIENCE = 600.0
"""Seconds after which a run counts as hanging; it takes a few."""


def start(photos: Path, output: Path, sets: list[str]) -> subprocess.Popen[bytes]:
    arguments = ["--input", str(photos), "--output", str(output), "--quiet", "--workers", "2"]
    settings = [part for setting in sets for part in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-m", "training.prepare", *arguments, *settings],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def work_files(output: Path) -> int:
    return len(list(output.glob("work/*/*.parquet"))) if output.exists() else 0


def kill_after_files(process: subprocess.Popen[bytes], output: Path, files: int) -> bool:
    """Kill the run without warning once so many results exist; False when it ended before."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if work_files(output) >= files:
            process.kill()
            # Ends only when no worker holds the pipe any more.
            process.communicate(timeout=PATIENCE)
            return True
        time.sleep(0.005)
    process.communicate()
    return False


@pytest.mark.slow
def test_killed_at_random_and_run_again_gives_the_identical_index(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 40)
    (photos / "copy.png").write_bytes(kit.png(0))
    (photos / "broken.png").write_bytes(b"x")
    sets = [*kit.WITHOUT_FACES[:-1], "run.batch=3", "pack.samples_per_shard=4"]
    kit.run(photos, tmp_path / "whole", "run.batch=3", "pack.samples_per_shard=4")
    total, output = work_files(tmp_path / "whole"), tmp_path / "killed"
    draw = random.Random(7)
    kills = 0
    for number in range(KILLS):
        # Spread over the whole run, at a random place of each part.
        target = int(total * (number + draw.random()) / KILLS)
        kills += kill_after_files(start(photos, output, sets), output, max(1, target))
    assert kills >= KILLS - 1
    last = start(photos, output, sets)
    message = last.communicate(timeout=PATIENCE)[1].decode()
    assert last.returncode == 0, message
    assert kit.digests(output) == kit.digests(tmp_path / "whole")
    assert not list(output.rglob(".tmp-*"))
    accounted = {row["source"] for row in kit.index(output)} | set(kit.dropped(output))
    assert accounted == {path.name for path in photos.iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 40)
    sets = [*kit.WITHOUT_FACES[:-1], "run.batch=1", "run.executor=inline"]
    process = start(photos, tmp_path / "out", sets)
    deadline = time.monotonic() + PATIENCE
    while work_files(tmp_path / "out") < 45 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 130
    assert "finished work is kept" in message and "Traceback" not in message

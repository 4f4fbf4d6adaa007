"""The identity file keeps everything, survives being killed while saving, and hostile files only raise ValueError."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from faces.embed import WHOLE, embed_faces
from faces.encoder import FaceEncoder
from faces.identity import Identity, identity_hash
from faces.identity_file import identity_path, load_identity, save_identity

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ada(make_identity: Callable[..., Identity]) -> Identity:
    return make_identity([1, 2, 3, 4], [4, 3, 2, 1], weights=[0.25, 1.75], name="Ada Ünïcode")


@pytest.fixture
def saved(ada: Identity, tmp_path: Path) -> Path:
    path = tmp_path / "ada.safetensors"
    save_identity(ada, path)
    return path


def rewrite(path: Path, *, tensors: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None) -> None:
    """The same file with some tensors and metadata replaced, or removed where the new value is None."""
    with safe_open(str(path), framework="numpy") as file:
        kept_metadata = dict(file.metadata())
    kept = {**load_file(path), **(tensors or {})}
    kept_metadata.update(metadata or {})
    save_file(
        {key: value for key, value in kept.items() if value is not None},
        path,
        metadata={key: value for key, value in kept_metadata.items() if value is not None},
    )


def test_round_trip_of_a_real_identity_keeps_every_byte(
    scrfd_encoder: FaceEncoder, tight_portraits: dict[str, np.ndarray], tmp_path: Path
) -> None:
    pictures = [tight_portraits["trip0_a"], np.zeros((64, 64, 3), dtype=np.uint8), tight_portraits["trip0_b"]]
    identity = embed_faces(pictures, scrfd_encoder, policy=WHOLE, weights=[1, 0.5, 2], name="Trip").identity
    path = tmp_path / "sub" / "trip.safetensors"
    save_identity(identity, path)
    loaded = load_identity(path)
    assert identity_hash(loaded) == identity_hash(identity)
    assert (loaded.name, loaded.encoder) == (identity.name, identity.encoder)
    for one, other in zip(loaded.references, identity.references, strict=True):
        assert (one.score, one.weight) == pytest.approx((other.score, other.weight))
        for part in ("crop", "embedding", "keypoints", "aligned"):
            assert np.array_equal(getattr(one, part), getattr(other, part)), part


def test_the_thumbnail_is_a_png_of_the_heaviest_reference(saved: Path) -> None:
    picture = Image.open(io.BytesIO(load_file(saved)["thumbnail"].tobytes()))
    assert (picture.format, picture.size) == ("PNG", (256, 256))
    assert np.asarray(picture).max() == 2


def test_metadata_says_what_the_file_is(saved: Path) -> None:
    with safe_open(str(saved), framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["fusedid.kind"] == "identity" and metadata["fusedid.format"] == "1"
    assert json.loads(metadata["fusedid.encoder"])["name"] == "stand-in"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill without warning")
def test_killed_while_saving_the_former_file_stays(saved: Path, make_identity: Callable[..., Identity]) -> None:
    before = saved.read_bytes()
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from faces import identity_file
        path = Path(sys.argv[1])
        identity = identity_file.load_identity(path)
        real = os.fsync
        def die(handle):
            real(handle)
            os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = die
        identity_file.save_identity(type(identity)(identity.references * 3, identity.encoder), path)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(saved)], cwd=ROOT, timeout=600)
    assert done.returncode == -signal.SIGKILL
    assert saved.read_bytes() == before
    save_identity(make_identity([0, 0, 0, 1]), saved)
    assert len(load_identity(saved).references) == 1


def test_a_failed_write_leaves_nothing_behind(saved: Path, ada: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_identity(ada, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_every_truncation_is_a_value_error(saved: Path) -> None:
    data = saved.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        saved.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"ada\.safetensors cannot be used as an identity"):
            load_identity(saved)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_damaged_bytes_never_crash_the_reader(saved: Path, seed: int, count: int) -> None:
    data = bytearray(saved.read_bytes())
    rng = np.random.default_rng(seed)
    header = int.from_bytes(data[:8], "little") + 8
    for place in rng.integers(0, header, count):
        data[place] = rng.integers(0, 256)
    damaged = saved.with_name("damaged.safetensors")
    damaged.write_bytes(data)
    try:
        loaded = load_identity(damaged)
    except ValueError as error:
        assert "damaged.safetensors" in str(error)
    else:
        assert len(loaded.references) == 2


EMPTY = np.zeros(0, dtype=np.float32)
HOSTILE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"fusedid.kind": None}, "not written by FusedID"),
    ({}, {"fusedid.kind": "fusion"}, "'fusion' file"),
    ({}, {"fusedid.format": "2"}, "format 2"),
    ({}, {"fusedid.encoder": None}, "cannot be used"),
    ({}, {"fusedid.encoder": "[" * 100_000}, "cannot be used"),
    ({}, {"fusedid.encoder": '{"name": 3}'}, "incomplete"),
    ({}, {"fusedid.encoder": "[1, 2]"}, "incomplete"),
    ({"weights": None}, {}, "cannot be used"),
    ({"weights": np.ones(3)}, {}, "2 references but 3 weights"),
    ({"weights": np.array([1.0, -1.0])}, {}, "weight"),
    ({"weights": np.array([1.0, np.nan])}, {}, "weight"),
    ({"scores": EMPTY}, {}, "0 scores"),
    ({"reference.000.crop": None}, {}, "not numbered"),
    ({"reference.007.crop": np.zeros((16, 16, 3), dtype=np.uint8)}, {}, "not numbered"),
    ({"reference.000.crop": np.zeros((16, 16, 4), dtype=np.uint8)}, {}, "crop must be"),
    ({"reference.000.crop": np.zeros((5000, 1, 3), dtype=np.uint8)}, {}, "larger than 4096"),
    ({"reference.000.crop": np.zeros((), dtype=np.uint8)}, {}, "crop must be"),
    ({"reference.000.embedding": np.full(4, np.inf, dtype=np.float32)}, {}, "infinity"),
    ({"reference.000.embedding": np.ones(9, dtype=np.float32)}, {}, "9 numbers"),
    ({"reference.000.embedding": np.ones(4, dtype=np.float16)}, {}, "float32"),
    ({"reference.000.keypoints": np.ones(10, dtype=np.float32)}, {}, "key points"),
]


@pytest.mark.parametrize(("tensors", "metadata", "reason"), HOSTILE)
def test_hostile_files_are_refused_with_the_reason(
    saved: Path, tensors: dict[str, Any], metadata: dict[str, Any], reason: str
) -> None:
    rewrite(saved, tensors=tensors, metadata=metadata)
    with pytest.raises(ValueError, match=reason) as caught:
        load_identity(saved)
    assert "ada.safetensors" in str(caught.value)


def test_pickles_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    pickled = tmp_path / "evil.safetensors"
    pickled.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    for path, reason in ((pickled, "cannot be used"), (tmp_path, "cannot be used"), (tmp_path / "no", "not exist")):
        with pytest.raises(ValueError, match=reason):
            load_identity(path)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "..",
        "../x",
        "a/../../x",
        "/etc/x",
        "C:\\x",
        "C:x",
        "a\\..\\..\\x",
        "a//b",
        "a/ /b",
        "a\x00b",
        "~/../..",
        ".",
    ],
)
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a usable name|leaves the identities folder"):
        identity_path(tmp_path, name)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "identities"
    inside.mkdir()
    (inside / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leaves the identities folder"):
        identity_path(inside, "out/x")


def test_usable_names_stay_inside(tmp_path: Path) -> None:
    assert identity_path(tmp_path, "Ada Lovelace") == tmp_path / "Ada Lovelace.safetensors"
    assert identity_path(tmp_path, "people\\ada.safetensors") == tmp_path / "people" / "ada.safetensors"
    assert identity_path(tmp_path, "v1.2") == tmp_path / "v1.2.safetensors"

"""Damaged and unusual pictures, unreadable folders, a full disk: a clear reason each, and no lost work."""

from __future__ import annotations

import errno
import io
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import prepare_kit as kit
import pytest
from PIL import Image

from training.prepare import unit as unit_module
from training.prepare import walk as walk_module
from training.prepare.decode import DropError, decode
from training.storage import LocalStore
from training.train import main as train

LIMIT = 100_000_000


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy())


def hostile_png(width: int, height: int) -> bytes:
    """A PNG whose header promises far more pixels than there are."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_cmyk_looks_like_rgb() -> None:
    data = kit.encode(gradient().convert("CMYK"), "JPEG", quality=95)
    picture = decode(data, max_pixels=LIMIT)
    assert picture.mode == "CMYK"
    assert np.abs(picture.pixels.astype(int) - np.asarray(gradient()).astype(int)).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_greys(kind: str) -> None:
    deep = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    picture = decode(kit.encode(Image.fromarray(deep), kind), max_pixels=LIMIT)
    expected = np.round(deep / 257.0)
    assert np.abs(picture.pixels[..., 0] - expected).max() <= 1


def test_transparency_becomes_white_and_grey_becomes_rgb() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (decode(kit.encode(clear, "PNG"), max_pixels=LIMIT).pixels == 255).all()
    grey = Image.new("L", (4, 4), 77)
    assert (decode(kit.encode(grey, "PNG"), max_pixels=LIMIT).pixels == 77).all()
    one_bit = Image.new("1", (4, 4), 1)
    assert (decode(kit.encode(one_bit, "PNG"), max_pixels=LIMIT).pixels == 255).all()


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = kit.encode(gradient(40, 30), "JPEG", exif=exif, quality=95)
    pixels = decode(data, max_pixels=LIMIT).pixels
    assert pixels.shape == (40, 30, 3)
    assert pixels[0].mean() < 20 < 235 < pixels[-1].mean()


@pytest.mark.parametrize("mode", ["first_frame", "drop"])
def test_animation_is_its_first_frame_or_dropped(tmp_path: Path, mode: str) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 1)
    frames = [Image.fromarray(kit.pixels(seed)) for seed in (60, 61, 62)]
    frames[0].save(photos / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    kit.run(photos, tmp_path / "out", f"scan.animated={mode}")
    dropped = kit.dropped(tmp_path / "out")
    assert dropped == ({} if mode == "first_frame" else {"moving.webp": "animated"})
    assert len(kit.index(tmp_path / "out")) == (2 if mode == "first_frame" else 1)


def test_damaged_and_extreme_files_have_a_reason_each(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 1)
    whole = kit.encode(Image.fromarray(kit.pixels(5, 200, 200)), "JPEG")
    bad = {
        "empty.jpg": (b"", "corrupt"),
        "noise.png": (os.urandom(500), "corrupt"),
        "text.jpg": (b"<html>404 not found</html>", "corrupt"),
        "truncated.jpg": (whole[: len(whole) // 2], "corrupt"),
        "onepixel.png": (kit.png(1, 1, 1), "too_small"),
        "bomb.png": (hostile_png(60000, 60000), "too_many_pixels"),
        "big.png": (hostile_png(20000, 20000), "too_many_pixels"),
        "lying.png": (hostile_png(200, 200), "corrupt"),
    }
    for name, (data, _) in bad.items():
        (photos / name).write_bytes(data)
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    kit.run(photos, tmp_path / "out")
    assert kit.dropped(tmp_path / "out") == {name: reason for name, (_, reason) in bad.items()} | {
        "gone.png": "unreadable"
    }
    assert len(kit.index(tmp_path / "out")) == 1


def test_a_picture_of_20000_pixels_is_used(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 1)
    Image.new("RGB", (20000, 64), (200, 30, 30)).save(photos / "panorama.png")
    kit.run(photos, tmp_path / "out", "crops.mode=bucket")
    row = {row["source"]: row for row in kit.index(tmp_path / "out")}["panorama.png"]
    assert (row["source_width"], row["source_height"]) == (20000, 64)
    assert row["width"] * row["height"] <= 64 * 64


def test_the_users_own_pixel_limit_counts_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = kit.png(1, 100, 100)
    with pytest.raises(DropError, match="100x100 is more than 9000"):
        decode(data, max_pixels=9000)
    assert decode(data, max_pixels=10000).pixels.shape == (100, 100, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_decoding_never_fails_but_by_drop_error() -> None:
    whole = kit.encode(Image.fromarray(kit.pixels(5, 64, 64)), "JPEG")
    generator = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), 12):
            data[place] = generator.integers(0, 256)
        try:
            assert decode(bytes(data), max_pixels=LIMIT).pixels.ndim == 3
        except DropError as error:
            assert error.reason in ("corrupt", "too_many_pixels")


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_unusable_input_folder_says_what_is_wanted(tmp_path: Path, what: str) -> None:
    source = tmp_path / "in"
    if what == "file":
        source.write_text("x")
    elif what == "empty":
        source.mkdir()
    words = {"missing": "does not exist", "file": "is a file", "empty": "found no pictures"}[what]
    with pytest.raises(ValueError, match=words):
        kit.run(source, tmp_path / "out")


def test_unreadable_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 1)

    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(walk_module.os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot be read .Permission denied"):
        kit.run(photos, tmp_path / "out")


def test_unreadable_subfolder_is_reported_and_the_rest_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 2)
    (photos / "secret").mkdir()
    real = os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(walk_module.os, "scandir", refuse)
    kit.run(photos, tmp_path / "out")
    assert kit.dropped(tmp_path / "out") == {"secret": "unreadable"}
    assert len(kit.index(tmp_path / "out")) == 2


def test_output_must_be_ours_and_outside_the_input(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 1)
    with pytest.raises(ValueError, match="lies inside the input"):
        kit.run(photos, photos / "out")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.doc").write_text("x")
    with pytest.raises(ValueError, match=r"not ours \(thesis.doc\)"):
        kit.run(photos, tmp_path / "busy")
    assert [path.name for path in (tmp_path / "busy").iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize("when", ["scan", "shards", "index.parquet"])
def test_full_disk_keeps_finished_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 6), tmp_path / "out"
    opened = Path.open
    state = {"left": 1 if when == "scan" else 0}

    class FullDisk(io.FileIO):
        def write(self, data: object) -> int:
            if state["left"]:
                state["left"] -= 1
                return super().write(data)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_on_full_disk(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        hit = when in path.parts or path.name.endswith(when)
        return (
            FullDisk(path, "w") if mode == "wb" and hit and "out" in path.parts else opened(path, mode, *args, **kwargs)
        )

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(ValueError, match=r"the disk is full: could not write .*run the same command again"):
            kit.run(photos, output, "run.batch=2")
    assert not list(output.rglob(".tmp-*"))
    finished = {path: path.stat().st_mtime_ns for path in output.glob("work/*/*.parquet")}
    assert finished
    kit.run(photos, output, "run.batch=2")
    assert len(kit.index(output)) == 6
    redone = [path for path, stamp in finished.items() if path.stat().st_mtime_ns != stamp]
    assert not redone


def test_everything_dropped_says_why_and_keeps_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 3), tmp_path / "out"
    with pytest.raises(ValueError, match=r"all 3 inputs were dropped(.|\n)*3 too_small: .*select.min_side"):
        kit.run(photos, output, "select.min_side=500")
    assert set(kit.dropped(output).values()) == {"too_small"}
    assert "too_small" in (output / "report.md").read_text()
    assert train(["--set", f"data.root={output}", "--set", "model.base=sd15", "--set", f"run={tmp_path / 'run'}"]) == 2
    assert "has no samples; see its report.md" in caplog.text
    kit.run(photos, output)
    assert len(kit.index(output)) == 3


def test_file_that_changes_meanwhile_is_dropped_not_mixed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 3), tmp_path / "out"
    real = unit_module.run_unit

    def change_before_packing(context: object, unit: unit_module.Unit) -> object:
        if unit.stage == "pack":
            (photos / "photo001.png").write_bytes(kit.png(99))
        return real(context, unit)

    monkeypatch.setattr("training.prepare.executors.run_unit", change_before_packing)
    kit.run(photos, output)
    assert kit.dropped(output) == {"photo001.png": "changed"}
    assert [row["source"] for row in kit.index(output)] == ["photo000.png", "photo002.png"]


def test_leaking_regex_split_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from training.prepare.config import SplitConfig
    from training.prepare.splits import assign_splits

    with caplog.at_level(logging.WARNING, logger="fusedid"):
        splits = assign_splits(["a1", "a2"], ["ann", "ann"], SplitConfig(by="regex", val_regex="2$"))
    assert splits == ["train", "val"]
    assert "ann" in caplog.text and "more than one split" in caplog.text


def test_store_writes_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(str(tmp_path))
    store.write("a/b.bin", b"old")

    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        store.write("a/b.bin", b"new")
    assert store.read("a/b.bin") == b"old"
    assert store.names("a") == ["b.bin"]

"""What counts as an input: folders, captions, webdataset tars, img2dataset's output, URLs."""

from __future__ import annotations

import json
from pathlib import Path

import prepare_kit as kit
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.prepare.keys import make_keys


def test_every_input_is_in_the_index_or_in_dropped(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 4)
    (photos / "sub.d").mkdir()
    (photos / "sub.d" / "photo000.jpg").write_bytes(kit.encode(kit.Image.fromarray(kit.pixels(50)), "JPEG"))
    (photos / "copy.png").write_bytes(kit.png(0))
    (photos / "notes.md").write_text("hello")
    (photos / "photo001.txt").write_text("  a  person\n in the rain ")
    (photos / "photo002.json").write_text(json.dumps({"caption": ["first", "second"], "width": 3}))
    (photos / "lonely.txt").write_text("nobody's caption")
    output = tmp_path / "out"
    kit.run(photos, output)
    kept = {row["source"]: row for row in kit.index(output)}
    assert set(kept) == {"copy.png", *(f"photo{n:03d}.png" for n in range(1, 4)), "sub.d/photo000.jpg"}
    assert kit.dropped(output) == {
        "photo000.png": "duplicate",
        "notes.md": "not_an_image",
        "lonely.txt": "not_an_image",
    }
    captions = {name: (row["caption"], row["caption_from"]) for name, row in kept.items()}
    assert captions["photo001.png"] == ("a person in the rain", "txt")
    assert captions["photo002.png"] == ("first", "json:caption")
    assert captions["photo003.png"] == ("", "default")


def test_required_captions_drop_what_has_none(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 2)
    (photos / "photo001.txt").write_text("a caption")
    kit.run(photos, tmp_path / "out", "captions.required=true")
    assert kit.dropped(tmp_path / "out") == {"photo000.png": "no_caption"}


def test_webdataset_tar_is_read_in_place(tmp_path: Path) -> None:
    members = {
        "a/0001.png": kit.png(1),
        "a/0001.txt": b"one",
        "a/0001.json": b"{}",
        "0002.png": kit.png(2),
        "0002.json": json.dumps({"text": "two"}).encode(),
        "readme.md": b"x",
    }
    archive = kit.write_tar(tmp_path / "data.tar", members)
    kit.run(archive, tmp_path / "out")
    captions = {row["source"]: row["caption"] for row in kit.index(tmp_path / "out")}
    assert captions == {"data.tar::a/0001.png": "one", "data.tar::0002.png": "two"}
    assert kit.dropped(tmp_path / "out") == {"data.tar::readme.md": "not_an_image"}


@pytest.mark.parametrize("layout", ["tar", "files"])
def test_img2dataset_output_with_its_failures(tmp_path: Path, layout: str) -> None:
    source = tmp_path / "laion"
    source.mkdir()
    members = {"000000000.png": kit.png(1), "000000000.txt": b"cap", "000000000.json": b'{"caption": "cap"}'}
    if layout == "tar":
        kit.write_tar(source / "00000.tar", members)
    else:
        (source / "00000").mkdir()
        for name, data in members.items():
            (source / "00000" / name).write_bytes(data)
    rows = {
        "key": ["000000000", "000000001"],
        "url": ["http://a.example", "http://b.example"],
        "status": ["success", "failed_to_download"],
        "error_message": [None, "HTTP Error 404"],
    }
    pq.write_table(pa.table(rows), source / "00000.parquet")
    (source / "00000_stats.json").write_text("{}")
    kit.run(source, tmp_path / "out")
    assert [row["caption"] for row in kit.index(tmp_path / "out")] == ["cap"]
    assert kit.dropped(tmp_path / "out") == {"00000.parquet::000000001": "download_failed"}
    detail = pq.read_table(tmp_path / "out" / "dropped.parquet")["detail"].to_pylist()
    assert "404" in detail[0] and "b.example" in detail[0]


def test_truncated_tar_keeps_what_is_whole(tmp_path: Path) -> None:
    archive = kit.write_tar(tmp_path / "data.tar", {f"{n}.png": kit.png(n) for n in range(4)})
    whole = archive.read_bytes()
    archive.write_bytes(whole[: whole.index(kit.png(3)) + 100])
    kit.run(archive, tmp_path / "out")
    assert len(kit.index(tmp_path / "out")) == 3
    reasons = kit.dropped(tmp_path / "out")
    assert reasons["data.tar"] == "corrupt"


def test_compressed_tar_is_refused_with_the_way_out(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 1)
    (photos / "more.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="unpack it"):
        kit.run(photos, tmp_path / "out")


def test_several_inputs_may_hold_the_same_names(tmp_path: Path) -> None:
    first = kit.photo_folder(tmp_path / "a", 2)
    second = kit.photo_folder(tmp_path / "b", 2)
    (second / "photo000.png").write_bytes(kit.png(70))
    (second / "photo001.png").write_bytes(kit.png(71))
    kit.run(f"[{first}, {second}]", tmp_path / "out")
    keys = [row["key"] for row in kit.index(tmp_path / "out")]
    assert keys == ["0/photo000", "0/photo001", "1/photo000", "1/photo001"]


def test_urls_are_read_and_written(tmp_path: Path) -> None:
    from training.shards import ShardSource
    from training.storage import open_store

    remote = open_store("memory://prepare-urls/in")
    for seed in range(3):
        remote.write(f"p{seed}.png", kit.png(seed))
    remote.write("more.tar", kit.write_tar(tmp_path / "x.tar", {"t.png": kit.png(9)}).read_bytes())
    kit.run("memory://prepare-urls/in", "memory://prepare-urls/out")
    source = ShardSource("memory://prepare-urls/out", "all")
    assert [source.record(n).key for n in range(4)] == ["more_tar/t", "p0", "p1", "p2"]
    assert source.picture(3).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("url", "words"), [("nope://x", "cannot open"), ("memory://nobody-home/in", "empty or does not")]
)
def test_wrong_urls_are_said(tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kit.run(url, tmp_path / "out")


@settings(max_examples=200)
@given(st.lists(st.text(alphabet="aA./-_ é:", min_size=1, max_size=8), unique=True, max_size=8))
def test_keys_are_unique_and_safe_for_webdataset(sources: list[str]) -> None:
    keys = make_keys(sources)
    assert len({key.lower() for key in keys}) == len(sources)
    assert all(key and "." not in key and not key.startswith("/") for key in keys)
    assert keys == make_keys(sources)

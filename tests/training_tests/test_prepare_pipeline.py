"""The whole run on synthetic pictures: idempotent, resumable by stage, the same on every executor."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import prepare_kit as kit
import pyarrow as pa
import pytest
from PIL import Image

from training.prepare import unit as unit_module
from training.prepare.__main__ import main
from training.prepare.executors import ProcessExecutor
from training.prepare.pipeline import prepare
from training.prepare.tables import content_digest, to_table

SAMPLE_ROWS = [("a", True, [1.0]), (None, None, None), ("c", False, []), ("dd", True, [2.0, 3.0])] * 2


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages whose units really ran."""
    ran: list[str] = []
    real = unit_module.run_unit

    def count(context: object, unit: unit_module.Unit) -> object:
        ran.append(unit.stage)
        return real(context, unit)

    monkeypatch.setattr("training.prepare.executors.run_unit", count)
    return ran


def test_second_run_does_nothing_and_gives_the_same(tmp_path: Path, counted: list[str]) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 7), tmp_path / "out"
    kit.run(photos, output, "run.batch=3")
    first = kit.digests(output)
    assert len(first) == 4 and counted
    counted.clear()
    kit.run(photos, output, "run.batch=3")
    assert kit.digests(output) == first
    assert counted == []


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        ("captions.default=hello", {"captions", "pack", "cache"}),
        ("pack.quality=80", {"pack", "cache"}),
        ("mask.dilate=0.5", {"mask"}),
        ("select.max_yaw=50", {"select"}),
        ("split.seed=9", set()),
    ],
)
def test_a_setting_redoes_only_what_depends_on_it(
    tmp_path: Path, counted: list[str], setting: str, stages: set[str]
) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 3), tmp_path / "out"
    kit.run(photos, output)
    counted.clear()
    kit.run(photos, output, setting)
    assert set(counted) == stages
    fresh = tmp_path / "fresh"
    kit.run(photos, fresh, setting)
    assert kit.digests(fresh) == kit.digests(output)


def test_changed_and_added_files_redo_their_shards_only(tmp_path: Path, counted: list[str]) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 6), tmp_path / "out"
    kit.run(photos, output, "run.batch=2", "pack.samples_per_shard=2")
    counted.clear()
    (photos / "photo005.png").write_bytes(kit.png(77))
    kit.photo_folder(photos, 2, first=6)
    kit.run(photos, output, "run.batch=2", "pack.samples_per_shard=2")
    assert counted.count("scan") == 2 and counted.count("pack") == 2
    kit.run(photos, tmp_path / "fresh", "run.batch=2", "pack.samples_per_shard=2")
    assert kit.digests(tmp_path / "fresh") == kit.digests(output)


def test_digest_of_a_table_is_that_of_its_values() -> None:
    rows = [{"name": name, "flag": flag, "spot": spot} for name, flag, spot in SAMPLE_ROWS]
    schema = pa.schema([("name", pa.string()), ("flag", pa.bool_()), ("spot", pa.list_(pa.float32()))])
    whole = to_table(rows, schema)
    for start, size in ((0, 3), (3, 2), (2, 5)):
        alone = to_table(rows[start : start + size], schema)
        assert content_digest(whole.slice(start, size)) == content_digest(alone)
        assert content_digest(
            pa.concat_tables([whole.slice(start, 1), whole.slice(start + 1, size - 1)])
        ) == content_digest(alone)
        assert content_digest(alone) != content_digest(whole.slice(start, size - 1))


def test_touched_but_equal_files_are_only_scanned_again(tmp_path: Path, counted: list[str]) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 3), tmp_path / "out"
    kit.run(photos, output)
    before = kit.digests(output)
    counted.clear()
    os.utime(photos / "photo001.png", (1, 1))
    kit.run(photos, output)
    assert "pack" not in counted and kit.digests(output) == before


def test_shards_of_a_longer_run_are_removed(tmp_path: Path) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 5), tmp_path / "out"
    kit.run(photos, output, "pack.samples_per_shard=1", "run.batch=1")
    (output / "shards" / "mine.txt").write_text("not yours")
    kit.run(photos, output, "pack.samples_per_shard=2", "run.batch=4")
    assert sorted(path.name for path in (output / "shards").iterdir()) == [
        *("000000.tar", "000001.tar", "000002.tar", "mine.txt")
    ]
    assert len(list((output / "work" / "scan").iterdir())) == 2


def test_damaged_work_file_is_made_again(tmp_path: Path) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 3), tmp_path / "out"
    kit.run(photos, output)
    before = kit.digests(output)
    (output / "work" / "scan" / "000000.parquet").write_bytes(b"PAR1 not really")
    (output / "shards" / "000000.tar").unlink()
    kit.run(photos, output)
    assert kit.digests(output) == before


def test_two_processes_give_the_index_of_one(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 9)
    kit.run(photos, tmp_path / "one", "run.batch=2", "pack.samples_per_shard=3")
    kit.run(
        photos, tmp_path / "two", "run.batch=2", "pack.samples_per_shard=3", "run.executor=processes", "run.workers=2"
    )
    assert kit.digests(tmp_path / "two") == kit.digests(tmp_path / "one")


def test_killed_worker_is_explained(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 2)
    kit.run(photos, tmp_path / "out")
    config = kit.make_config(photos, tmp_path / "out", "run.executor=processes", "run.workers=2")
    with ProcessExecutor(config, 2) as executor:
        units = [unit_module.Unit("scan", 0, "mark")] * 50
        results = executor.run(units)
        next(results)
        for process in executor._pool._processes.values():
            process.kill()
        with pytest.raises(unit_module.UnitError, match=r"lack of memory.*run\.workers"):
            list(results)


@pytest.fixture
def ray_cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes with one worker each, on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
def test_two_ray_workers_give_the_index_of_one_process(tmp_path: Path, ray_cluster: str) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 9)
    settings = ["run.batch=2", "pack.samples_per_shard=3"]
    kit.run(photos, tmp_path / "one", *settings)
    kit.run(photos, tmp_path / "ray", *settings, "run.executor=ray", f"run.ray_address={ray_cluster}")
    assert kit.digests(tmp_path / "ray") == kit.digests(tmp_path / "one")


def test_missing_ray_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    photos = kit.photo_folder(tmp_path / "photos", 1)
    with pytest.raises(ValueError, match=r"pip install 'ray\[data\]'"):
        kit.run(photos, tmp_path / "out", "run.executor=ray", "run.workers=2")


def test_users_files_are_never_touched(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 3)
    (photos / "copy.png").write_bytes(kit.png(0))
    (photos / "broken.png").write_bytes(b"x")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in photos.iterdir()}
    kit.run(photos, tmp_path / "out")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in photos.iterdir()} == before


def test_tars_are_webdataset_and_the_index_points_into_them(tmp_path: Path) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 3), tmp_path / "out"
    (photos / "photo001.txt").write_text("a caption with é")
    kit.run(photos, output)
    raw = (output / "shards" / "000000.tar").read_bytes()
    with tarfile.open(output / "shards" / "000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    expected = "photo000.jpg photo000.json photo001.jpg photo001.txt photo001.json photo002.jpg photo002.json"
    assert " ".join(members) == expected
    for row in kit.index(output):
        for member, suffix in (("target", "jpg"), ("json", "json"), ("text", "txt")):
            piece = raw[row[f"{member}_offset"] :][: row[f"{member}_size"]]
            assert piece == members.get(f"{row['key']}.{suffix}", b"")
        assert (
            json.loads(members[f"{row['key']}.json"])["sha256"]
            == hashlib.sha256(kit.png(int(row["key"][-3:]))).hexdigest()
        )
    assert Image.open(io.BytesIO(members["photo000.jpg"])).size == (64, 64)


def test_lossless_packing_keeps_pixels(tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "p.png").write_bytes(kit.png(1, 64, 64))
    kit.run(photos, output, "pack.quality=100")
    with tarfile.open(output / "shards" / "000000.tar") as tar:
        stored = np.asarray(Image.open(io.BytesIO(tar.extractfile("p.png").read())))
    assert np.array_equal(stored, kit.pixels(1, 64, 64))


def test_report_accounts_for_everything(tmp_path: Path) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 4), tmp_path / "out"
    (photos / "copy.png").write_bytes(kit.png(0))
    (photos / "tiny.png").write_bytes(kit.png(9, 8, 8))
    kit.run(photos, output)
    facts = json.loads((output / "report.json").read_text())
    reasons = {entry["reason"]: entry["count"] for entry in facts["dropped"]}
    assert facts["inputs"] == 6 and facts["kept"] == 4 and reasons == {"duplicate": 1, "too_small": 1}
    assert [timing["stage"] for timing in facts["timings"]] == [
        *("scan", "dedupe", "faces", "select", "crops", "mask", "captions", "identity", "plan", "pack", "cache")
    ]
    text = (output / "report.md").read_text()
    for name in ("kept.jpg", "dropped.jpg", "histograms.png"):
        assert f"report/{name}" in text and Image.open(output / "report" / name).size[0] > 300


def test_every_stage_has_a_bar_with_speed_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 4)
    prepare(kit.make_config(photos, tmp_path / "out", "run.batch=2"))
    bars = capsys.readouterr().err
    for stage in ("scan", "faces", "select", "pack"):
        assert re.search(rf"{stage}: 100%\|.*4/4 \[\d+:\d+<\d+:\d+, +[\d.]+(img/s|s/img)\]", bars), stage


def test_command_line_ends_with_codes_and_advice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 2)
    sets = [part for setting in kit.WITHOUT_FACES for part in ("--set", setting)]
    arguments = ["--input", str(photos), "--output", str(tmp_path / "out"), "--quiet", *sets]
    with caplog.at_level(logging.INFO):
        assert main(arguments) == 0
        assert "2 samples" in caplog.text
        assert main([*arguments, "--set", "select.min_size=3"]) == 1
        assert "did you mean 'select.min_side'" in caplog.text
        assert main(["--output", "x"]) == 1
        assert "input: Field required" in caplog.text


def test_workers_start_without_torch() -> None:
    code = (
        "import sys, training.prepare.stages, training.prepare.unit; print(sorted({'torch', 'cv2'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert result.stdout.strip() == "[]"


def test_module_runs_from_the_shell(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "training.prepare", "--schema"],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    schema = json.loads(result.stdout)
    assert "crops" in schema["properties"]
    assert "Least short side" in schema["$defs"]["SelectConfig"]["properties"]["min_side"]["description"]

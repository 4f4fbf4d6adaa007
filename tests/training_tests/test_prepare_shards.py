"""Reading prepared data: the source the trainer uses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import prepare_kit as kit
import pytest

from training.shards import ShardSource


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    photos = kit.photo_folder(folder / "photos", 8)
    (photos / "photo003.txt").write_text("third")
    sets = ["split.by=regex", "split.val_regex=00[67]$", "pack.samples_per_shard=3", "pack.quality=100"]
    kit.run(photos, folder / "out", *sets)
    return folder / "out"


def test_samples_in_index_order_by_split(prepared: Path) -> None:
    names = {split: ShardSource(str(prepared), split) for split in ("train", "val", "all")}
    assert [len(source) for source in names.values()] == [6, 2, 8]
    assert [names["val"].record(n).key for n in range(2)] == ["photo006", "photo007"]
    record = names["train"].record(3)
    assert (record.key, record.caption, record.has_face) == ("photo003", "third", False)
    assert record.original_size == (48, 48) and record.embedding is None
    assert len({source.fingerprint for source in names.values()}) == 3
    assert names["train"].encoder == ""


def test_pictures_without_faces(prepared: Path) -> None:
    source = ShardSource(str(prepared), "all")
    assert source.picture(7).shape == (64, 64, 3) and source.picture(7).dtype == np.uint8
    assert not source.face_mask(0).any() and source.face_mask(0).shape == (64, 64)
    assert source.same_person(0) == []
    with pytest.raises(ValueError, match="photo000 has no reference"):
        source.face(0)
    with pytest.raises(ValueError, match=r"no cache of 'vae'.*cache.base_model"):
        source.moments(0, "target")
    with pytest.raises(IndexError):
        source.record(8)


def test_travels_to_loader_processes(prepared: Path) -> None:
    source = ShardSource(str(prepared), "all")
    source.picture(0)
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.picture(5), source.picture(5))


def test_wrong_or_damaged_data_sets_are_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a prepared data set"):
        ShardSource(str(tmp_path))
    with pytest.raises(ValueError, match="no split 'dev'"):
        ShardSource(str(prepared), "dev")
    with pytest.raises(ValueError, match=r"no samples in the split 'test'.*train: 6"):
        ShardSource(str(prepared), "test")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        ShardSource(str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps({"fusedid.prepare": 99}))
    with pytest.raises(ValueError, match="prepare it again"):
        ShardSource(str(tmp_path))


def test_missing_shard_names_the_sample(prepared: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "index.parquet"):
        (tmp_path / name).write_bytes((prepared / name).read_bytes())
    (tmp_path / "shards").mkdir()
    source = ShardSource(str(tmp_path), "all")
    with pytest.raises(ValueError, match="photo000: cannot read"):
        source.picture(0)
    (tmp_path / "shards" / "000000.tar").write_bytes((prepared / "shards" / "000000.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"photo000: .* is cut off"):
        ShardSource(str(tmp_path), "all").picture(0)

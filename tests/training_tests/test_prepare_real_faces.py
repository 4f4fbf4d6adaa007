"""Real portraits through the real detector and recogniser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import prepare_kit as kit
import pytest
from PIL import Image

from training.shards import ShardSource

pytestmark = pytest.mark.assets
PORTRAITS = 12


@pytest.fixture(scope="module")
def prepared(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve people once, one of them again in a larger scan, three people in three photos each, a crowd, noise."""
    folder = tmp_path_factory.mktemp("faces")
    photos = folder / "photos"
    photos.mkdir()
    names = sorted(path.name for path in (assets / "faces/congress_gpo_450x550").glob("*.jpg"))[:PORTRAITS]
    for name in names:
        (photos / name).write_bytes((assets / "faces/congress_gpo_225x275" / name).read_bytes())
    (photos / f"zz_large_{names[0]}").write_bytes((assets / "faces/congress_gpo_450x550" / names[0]).read_bytes())
    for trip in (0, 4, 5):
        for letter in "abc":
            name = f"trip{trip}_{letter}.jpg"
            (photos / name).write_bytes((assets / "faces/sfhq_crops" / name).read_bytes())
    sheet = sorted((assets / "faces/sfhq_sheets").iterdir())[0]
    (photos / f"sheet{sheet.suffix}").write_bytes(sheet.read_bytes())
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "noise.png")
    root = f"faces.roots=[{assets / 'insightface'}]"
    kit.run(photos, folder / "out", root, "split.val=0.3", base=kit.WITH_FACES)
    return folder / "out"


def test_portraits_are_kept_and_the_rest_has_its_reason(prepared: Path) -> None:
    dropped = kit.dropped(prepared)
    near = [name for name, reason in dropped.items() if reason == "near_duplicate"]
    assert len(near) == 1 and not near[0].startswith("zz_large")
    assert dropped["noise.png"] == "no_face"
    assert next(reason for name, reason in dropped.items() if name.startswith("sheet")) == "too_many_faces"
    kept = kit.index(prepared)
    assert len(kept) == PORTRAITS + 9 and len(dropped) == 3
    assert all(row["human"] and row["n_faces"] == 1 for row in kept)


def test_same_people_are_found_and_stay_in_one_split(prepared: Path) -> None:
    people: dict[str, list[dict]] = {}
    for row in kit.index(prepared):
        people.setdefault(row["person"], []).append(row)
    several = {name: sorted(row["key"] for row in rows) for name, rows in people.items() if len(rows) > 1}
    assert several == {f"trip{n}_a": [f"trip{n}_{letter}" for letter in "abc"] for n in (0, 4, 5)}
    assert all(len({row["split"] for row in rows}) == 1 for rows in people.values())
    assert {row["split"] for rows in people.values() for row in rows} == {"train", "val"}


def test_trainer_reads_faces_masks_embeddings_and_pairs(prepared: Path) -> None:
    source = ShardSource(str(prepared), "all")
    keys = [source.record(n).key for n in range(len(source))]
    trip = keys.index("trip4_b")
    others = source.same_person(trip)
    assert [keys[other] for other in others] == ["trip4_a", "trip4_c"]
    own, other = (source.record(n).embedding for n in (trip, others[0]))
    assert own is not None and other is not None and own.shape == (128,) and own.dtype == np.float32
    assert own @ other / np.linalg.norm(own) / np.linalg.norm(other) > 0.5
    assert source.face(trip).shape == (64, 64, 3)
    x0, y0, x1, y1 = source.row(trip)["face_box"]
    mask = source.face_mask(trip)
    assert mask[round((y0 + y1) / 2), round((x0 + x1) / 2)] == 255
    assert 0.5 < (mask > 0).sum() / ((x1 - x0) * (y1 - y0)) < 1.6
    assert len(source.encoder) == 64


def test_pairs_table_names_same_person_photos(prepared: Path) -> None:
    import pyarrow.parquet as pq

    pairs = pq.read_table(prepared / "pairs.parquet").to_pylist()
    assert len(pairs) == 18
    assert all(pair["key"][:5] == pair["other"][:5] and pair["cosine"] > 0.4 for pair in pairs)


def test_packed_face_is_found_again_where_the_index_says(prepared: Path, assets: Path) -> None:
    from faces.detect import find_faces
    from faces.pack_choice import open_encoder

    encoder = open_encoder("test_pack", [assets / "insightface"], det_size=320)
    source = ShardSource(str(prepared), "all")
    for number in range(3):
        picture = np.asarray(Image.fromarray(source.picture(number)).resize((256, 256)))
        found = find_faces(picture, encoder).faces[0]
        assert np.array(found.box) == pytest.approx(np.array(source.row(number)["face_box"]) * 4, abs=20)


def test_manifest_names_the_encoder(prepared: Path) -> None:
    encoder = json.loads((prepared / "manifest.json").read_text())["face_encoder"]
    assert encoder["name"] == "test_pack" and encoder["dim"] == 128 and len(encoder["recogniser_sha256"]) == 64


def test_moved_and_renamed_face_pack_redoes_nothing(assets: Path, tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "a.jpg").write_bytes((assets / "faces/sfhq_crops/syn05.jpg").read_bytes())
    kit.run(photos, output, f"faces.roots=[{assets / 'insightface'}]", base=kit.WITH_FACES)
    stamp = (output / "work/faces/000000.parquet").stat().st_mtime_ns
    (tmp_path / "root/models").mkdir(parents=True)
    (tmp_path / "root/models/mine").symlink_to(assets / "insightface/models/test_pack")
    kit.run(photos, output, f"faces.roots=[{tmp_path / 'root'}]", "faces.pack=mine", base=kit.WITH_FACES)
    assert (output / "work/faces/000000.parquet").stat().st_mtime_ns == stamp
    assert json.loads((output / "manifest.json").read_text())["face_encoder"]["name"] == "mine"


def test_unknown_face_pack_is_said_before_any_work(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 1)
    with pytest.raises(ValueError, match="buffalo_l"):
        kit.run(photos, tmp_path / "out", "faces.pack=buffalo_l", f"faces.roots=[{tmp_path}]", base=kit.WITH_FACES)
    assert not (tmp_path / "out" / "work").exists()

"""Who takes part: folders, prepared data sets, references, and the optional networks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prepare_kit import WITH_FACES, run
from tiny_models import tiny_text

from faces.encoder import FaceEncoder
from training.evaluate.clip_score import ClipScorer
from training.evaluate.config import PeopleConfig, Protocol, ScorerConfig
from training.evaluate.drawing import write_picture
from training.evaluate.face_distances import WORKER, measure_distances
from training.evaluate.people import Subject, groups, load_people
from training.evaluate.plan import Job, make_row, plan_row
from training.people import open_pack


@pytest.fixture(scope="module")
def encoder(assets: Path) -> FaceEncoder:
    return open_pack("test_pack", [str(assets / "insightface")])


@pytest.fixture(scope="module")
def folder(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    (folder / "anna").mkdir()
    for letter in "abc":
        shutil.copy(assets / "faces" / "sfhq_crops" / f"trip0_{letter}.jpg", folder / "anna")
    for number in (1, 2):
        shutil.copy(assets / "faces" / "sfhq_crops" / f"syn0{number}.jpg", folder / f"p{number}.jpg")
    (folder / "notes.txt").write_text("no photo", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def subjects(folder: Path, encoder: FaceEncoder) -> tuple[Subject, ...]:
    return load_people(PeopleConfig(photos=str(folder)), encoder, references=4).subjects


def test_one_photo_is_held_out_where_there_are_several(subjects, folder, encoder):
    assert [one.name for one in subjects] == ["anna", "p1", "p2"]
    assert [photo.name for photo in subjects[0].photos] == ["trip0_a.jpg", "trip0_b.jpg"]
    assert subjects[0].held_out.name == "trip0_c.jpg" and subjects[1].held_out is None
    shown = load_people(PeopleConfig(photos=str(folder), held_out=False, count=1), encoder, references=4).subjects
    assert len(shown) == 1 and len(shown[0].photos) == 3 and shown[0].held_out is None


def test_further_references_are_changed_crops_and_always_the_same(subjects):
    crops = subjects[0].references(5)
    assert crops[0] is subjects[0].photos[0].crop and crops[1] is subjects[0].photos[1].crop
    assert crops[2].shape == crops[0].shape and not np.array_equal(crops[2], crops[0])
    assert not np.array_equal(crops[2], crops[4])
    assert all(np.array_equal(a, b) for a, b in zip(crops, subjects[0].references(5)))


def test_groups_share_nobody(subjects):
    assert [[one.name for one in party] for party in groups(subjects, 2)] == [["anna", "p1"]]
    with pytest.raises(ValueError, match="4 people per picture, but there are only 3"):
        groups(subjects, 4)


@pytest.mark.assets
def test_people_of_a_prepared_data_set_come_with_their_captions_and_crops(assets, encoder, tmp_path):
    photos = sorted((assets / "faces" / "congress_gpo_450x550").glob("*.jpg"))[:2]
    (tmp_path / "photos").mkdir()
    for photo in photos:
        shutil.copy(photo, tmp_path / "photos")
        (tmp_path / "photos" / f"{photo.stem}.txt").write_text(f"portrait of {photo.stem}", encoding="utf-8")
    roots = f"faces.roots=[{assets / 'insightface'}]"
    run(tmp_path / "photos", tmp_path / "data", roots, "crops.reference_size=128", "split.val=0", base=WITH_FACES)
    options = PeopleConfig(data=str(tmp_path / "data"), split="all")
    subjects = load_people(options, encoder, references=1).subjects
    assert [one.caption for one in subjects] == [f"portrait of {photo.stem}" for photo in photos]
    assert subjects[0].photos[0].crop.shape == (128, 128, 3)
    protocol = Protocol.model_validate(
        {
            "people": {"data": "x"},
            "model": {"base": "x"},
            "rows": {"a": {}},
            "draw": {"prompts": ["{caption}, old"]},
        }
    )
    jobs = plan_row(protocol, make_row(protocol, "a", {}), subjects, tmp_path)
    assert jobs[0].prompt == f"portrait of {photos[0].stem}, old"


def jobs_of(subjects: tuple[Subject, ...], out: Path, **row: object) -> list[Job]:
    values = {"people": {"photos": "x"}, "model": {"base": "x"}, "rows": {"a": row}, "draw": {"seeds": 1}}
    protocol = Protocol.model_validate(values)
    return plan_row(protocol, make_row(protocol, "a", {}), subjects, out)


def test_the_key_of_a_picture_changes_with_what_it_is_made_from_and_with_nothing_else(subjects, tmp_path):
    key = jobs_of(subjects, tmp_path, adapter="x")[0].key
    assert jobs_of(subjects[:2], tmp_path / "other", adapter="x")[0].key == key
    for change in ({"strength": 2}, {"references": 2}, {"length": "paper"}, {"width": 64}, {"seed": 1}):
        assert jobs_of(subjects, tmp_path, adapter="x", **change)[0].key != key, change
    assert jobs_of(subjects[1:], tmp_path, adapter="x")[0].key != key
    assert jobs_of(subjects[1:], tmp_path)[0].key == jobs_of(subjects, tmp_path)[0].key, "nobody is shown"


def test_the_control_shows_the_next_person_and_means_this_one(subjects, tmp_path):
    jobs = jobs_of(subjects, tmp_path, adapter="x", wrong_person=True)
    assert [(job.meant[0].name, job.shown[0].name) for job in jobs] == [("anna", "p1"), ("p1", "p2"), ("p2", "anna")]


def test_routed_people_have_bands_and_others_none(subjects, tmp_path):
    routed = jobs_of(subjects, tmp_path, adapter="x", people=2)[0].shot
    assert [person.mask.sum() for person in routed.people] == [512 * 256, 512 * 256]
    free = jobs_of(subjects, tmp_path, adapter="x", people=2, routed=False)[0].shot
    assert [person.mask for person in free.people] == [None, None]


FAKE = """#!{python}
import json, sys
assert sys.argv[1].endswith("deepface_worker.py")
print(json.dumps({{"deepface": "0.0.99"}}))
for number, line in enumerate(sys.stdin):
    pair = json.loads(line)
    with open({log!r}, "a") as log: log.write(pair["picture"] + "\\n")
    answer = {{"missed": "no face"}} if number == 1 else {{"distances": {{n: 0.25 for n in pair["networks"]}}}}
    print(json.dumps({{"id": pair["id"], **answer}}))
"""


def fake_python(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def drawn(subjects, tmp_path) -> list[Job]:
    from PIL import Image

    jobs = jobs_of(subjects, tmp_path)
    for job in jobs:
        write_picture(job, Image.new("RGB", (32, 32)), 1.0)
    return jobs


def test_deepface_is_asked_once_per_picture_in_a_process_of_its_own(drawn, tmp_path):
    log = tmp_path / "asked.txt"
    python = fake_python(tmp_path / "python", FAKE.format(python=sys.executable, log=str(log)))
    options = ScorerConfig(deepface_python=python, deepface_networks=("ArcFace",))
    for _ in range(2):
        found = measure_distances(options, drawn, tmp_path)
        assert found.version == "0.0.99"
        assert [found.of(job) for job in drawn] == [{"deepface_ArcFace": value} for value in (0.25, 1.0, 0.25)]
    assert len(log.read_text(encoding="utf-8").splitlines()) == 3, "the second run knows the answers"
    assert measure_distances(ScorerConfig(), drawn, tmp_path).of(drawn[0]) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!{python}\nprint('Hello')", "answered 'Hello"),
        ("#!{python}\nimport sys; sys.exit(3)", "ended with code 3"),
        ('#!{python}\nprint(\'{{"deepface": "1"}}\')', "3 pictures left"),
        (None, "cannot be started"),
    ],
)
def test_an_interpreter_that_does_not_answer_is_named(text, message, drawn, tmp_path):
    python = tmp_path / "python"
    if text is not None:
        fake_python(python, text.format(python=sys.executable))
    with pytest.raises(ValueError, match=message):
        measure_distances(ScorerConfig(deepface_python=str(python)), drawn, tmp_path)


def test_the_worker_speaks_with_deepface_and_nothing_else_reaches_its_answers(tmp_path):
    (tmp_path / "deepface-0.0.98.dist-info").mkdir()
    (tmp_path / "deepface-0.0.98.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepface\nVersion: 0.0.98\n", encoding="utf-8"
    )
    (tmp_path / "deepface.py").write_text(
        "print('TensorFlow says hello')\n"
        "class DeepFace:\n"
        "    @staticmethod\n"
        "    def verify(picture, reference, model_name, distance_metric):\n"
        "        print('loading', model_name)\n"
        "        if picture == 'wall.png': raise ValueError('Face could not be detected')\n"
        "        return {'distance': 0.5, 'verified': True}\n",
        encoding="utf-8",
    )
    asked = [
        {"id": "1", "picture": "a.png", "reference": "b.png", "networks": ["ArcFace", "VGG-Face"]},
        {"id": "2", "picture": "wall.png", "reference": "b.png", "networks": ["ArcFace"]},
    ]
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input="".join(json.dumps(one) + "\n" for one in asked),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"deepface": "0.0.98"},
        {"id": "1", "distances": {"ArcFace": 0.5, "VGG-Face": 0.5}},
        {"id": "2", "missed": "Face could not be detected"},
    ]


def test_the_clip_score_is_a_hundred_times_the_cosine(tmp_path):
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    text, tokenizer = tiny_text()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision, projection_dim=8)).eval()
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer)
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    scorer = ClipScorer(str(tmp_path / "clip"))
    picture = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    scores = [scorer(picture, prompt) for prompt in ("a man", "abc " * 100)]
    assert all(0 <= score <= 100 for score in scores) and scores[0] != scores[1]
    assert list(scorer.files) == ["model.safetensors"] and len(scorer.files["model.safetensors"]) == 64

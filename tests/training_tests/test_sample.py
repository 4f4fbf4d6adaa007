"""Pictures without ComfyUI: the file the node loads, several people with masks, the command line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from memory_source import drawn_face
from PIL import Image
from tiny_run import settings, train_tiny

from attention.adapter import AdapterSettings, Projection, save_adapter
from attention.fusion import FaceControls
from training.config import ModelConfig
from training.draw import DrawOptions, Shot
from training.references import Person
from training.sample import Studio, main, open_studio

SMALL = {"width": 64, "height": 64, "steps": 3, "prompt": "a man"}


def faces(*numbers: int) -> tuple[np.ndarray, ...]:
    return tuple(drawn_face(number, 80) for number in numbers)


def studio(base, adapter: str = "training-free") -> Studio:
    return open_studio(ModelConfig(base=str(base)), adapter, reference_size=64)


def pixels(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in pictures])


@pytest.mark.parametrize("which", ["tiny_base", "tiny_base_xl"])
def test_a_face_changes_the_picture_and_strength_zero_is_the_base_model(which, request):
    drawing = studio(request.getfixturevalue(which))
    plain = pixels(drawing.draw([], DrawOptions(**SMALL)))
    off = pixels(drawing.draw([Person(faces(1))], DrawOptions(**SMALL, controls=FaceControls(strength=0))))
    shown = pixels(drawing.draw([Person(faces(1))], DrawOptions(**SMALL)))
    assert plain.shape == (1, 64, 64, 3)
    assert np.array_equal(plain, off)
    assert np.abs(plain - shown).max() > 2
    assert np.array_equal(pixels(drawing.draw([], DrawOptions(**SMALL))), plain), "nothing may stay behind"


def test_the_same_seed_gives_the_same_picture_and_count_gives_several(tiny_base):
    drawing = studio(tiny_base)
    two = pixels(drawing.draw([Person(faces(1))], DrawOptions(**SMALL, count=2, seed=4)))
    again = pixels(drawing.draw([Person(faces(1))], DrawOptions(**SMALL, count=1, seed=5)))
    assert two.shape[0] == 2 and not np.array_equal(two[0], two[1])
    assert np.abs(two[1] - again[0]).max() <= 1


def test_the_order_of_people_with_their_masks_does_not_matter(tiny_base):
    drawing = studio(tiny_base)
    left = np.zeros((64, 96), np.float32)
    left[:, :40] = 1
    right = np.zeros((48, 48), np.float32)
    right[:, 30:] = 1
    one, two = Person(faces(1, 2), mask=left), Person(faces(3), mask=right)
    options = DrawOptions(**SMALL | {"width": 96})
    a, b = (pixels(drawing.draw(order, options)) for order in ([one, two], [two, one]))
    swapped = pixels(drawing.draw([Person(faces(3), mask=left), Person(faces(1, 2), mask=right)], options))
    assert np.abs(a - b).max() <= 1
    assert np.abs(a - swapped).max() > 2


def test_the_file_a_run_wrote_is_the_file_that_is_drawn_with(tiny_base, tmp_path):
    path = train_tiny(settings(tiny_base, tmp_path / "run", optimizer__lr=1e-2))
    trained = pixels(studio(tiny_base, str(path)).draw([Person(faces(1))], DrawOptions(**SMALL)))
    untrained = pixels(studio(tiny_base).draw([Person(faces(1))], DrawOptions(**SMALL)))
    assert np.abs(trained - untrained).max() > 0


@pytest.mark.parametrize("setting", [{"timestep": "matched"}, {"text": "positive"}, {"combine": "decoupled"}])
def test_the_adapters_own_settings_are_followed(setting, tiny_base, tmp_path):
    drawing = studio(tiny_base)
    reference = pixels(drawing.draw([Person(faces(1))], DrawOptions(**SMALL)))
    file = AdapterSettings(base="custom", reference_size=64, **setting)
    save_adapter(tmp_path / "a.safetensors", drawing.model.export_projections(), file, dtype=torch.float32)
    other = studio(tiny_base, str(tmp_path / "a.safetensors"))
    assert not np.array_equal(pixels(other.draw([Person(faces(1))], DrawOptions(**SMALL))), reference)


def test_a_weight_of_zero_drops_a_reference(tiny_base):
    drawing = studio(tiny_base)
    one = pixels(drawing.draw([Person(faces(1))], DrawOptions(**SMALL)))
    weighted = pixels(drawing.draw([Person(faces(1, 2), weights=(1.0, 0.0))], DrawOptions(**SMALL)))
    assert np.abs(one - weighted).max() <= 1


def test_the_command_line_writes_pictures(tiny_base, tmp_path):
    for number in (1, 2):
        Image.fromarray(drawn_face(number, 90)).save(tmp_path / f"{number}.png")
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :32] = 255 * (number == 1)
        mask[:, 32:] = 255 * (number == 2)
        Image.fromarray(mask).save(tmp_path / f"m{number}.png")
    arguments = ["--base", str(tiny_base), "--width", "64", "--height", "64", "--steps", "2", "--device", "cpu"]
    people = [
        a
        for n in (1, 2)
        for a in ("--face", str(tmp_path / f"{n}.png"), "--mask", str(tmp_path / f"m{n}.png"))
    ]  # fmt: skip
    out = tmp_path / "out" / "picture.png"
    assert main([*arguments, *people, "--out", str(out), "--reference-size", "64", "--count", "2"]) == 0
    assert Image.open(out.with_name("picture_01.png")).size == (64, 64)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--mask", "m.png", "--mask", "n.png"], "1 people (--face) but 2 masks"),
        (["--width", "100"], "multiple of 8"),
        (["--base", "nowhere"], "does not exist"),
        (["--adapter", "nowhere.safetensors"], "no such file"),
        (["--face-pack", "no_such_pack"], "no_such_pack"),
    ],
)
def test_wrong_arguments_end_with_a_message(extra, message, tiny_base, tmp_path, caplog):
    Image.fromarray(drawn_face(1, 64)).save(tmp_path / "1.png")
    arguments = ["--base", str(tiny_base), "--face", str(tmp_path / "1.png"), "--device", "cpu"]
    assert main([*arguments, *extra]) == 2
    assert message in caplog.text


def test_an_unreadable_face_is_named(tiny_base, tmp_path, caplog):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert main(["--base", str(tiny_base), "--face", str(tmp_path / "broken.jpg"), "--device", "cpu"]) == 2
    assert "broken.jpg is no readable picture" in caplog.text


@pytest.mark.parametrize("setting", [{}, {"timestep": "matched"}, {"text": "positive"}])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_pictures_of_different_people_in_one_batch_are_those_drawn_alone(setting, scale, tiny_base):
    drawing = studio(tiny_base)
    drawing.model.settings = replace(drawing.model.settings, **setting)
    options = DrawOptions(**SMALL | {"guidance_scale": scale})
    shots = [Shot([Person(faces(n, n + 1))], f"a man {letter}", seed) for n, letter, seed in [(1, "a", 3), (5, "b", 9)]]
    together = pixels(drawing.draw_shots(shots, options))
    alone = [pixels(drawing.draw(s.people, replace(options, prompt=s.prompt, seed=s.seed)))[0] for s in shots]
    assert np.abs(together - np.stack(alone)).max() <= 1
    assert not np.array_equal(together[0], together[1])


def test_shots_that_do_not_fit_together_are_refused(tiny_base):
    shots = [Shot([Person(faces(1))], "", 0), Shot([Person(faces(1, 2))], "", 0)]
    with pytest.raises(ValueError, match="same number of people, references and weights"):
        studio(tiny_base).draw_shots(shots, DrawOptions(**SMALL))


def test_another_adapter_on_the_loaded_base_draws_as_if_it_had_been_there_from_the_start(tiny_base, tmp_path):
    drawing = studio(tiny_base)
    person, options = [Person(faces(1))], DrawOptions(**SMALL)
    free = pixels(drawing.draw(person, options))
    weights = {
        path: Projection(2 * p.key, -p.value) for path, p in drawing.model.export_projections().items()
    }  # fmt: skip
    settings = AdapterSettings(base="custom", reference_size=64)
    save_adapter(tmp_path / "a.safetensors", weights, settings, dtype=torch.float32)
    exchanged = pixels(drawing.with_adapter(str(tmp_path / "a.safetensors")).draw(person, options))
    assert np.array_equal(exchanged, pixels(studio(tiny_base, str(tmp_path / "a.safetensors")).draw(person, options)))
    back = drawing.with_adapter("training-free", reference_size=64)
    assert np.array_equal(pixels(back.draw(person, options)), free) and not np.array_equal(free, exchanged)

"""The miniature that ships: small, whole, readable by everything that reads models, and it keeps a likeness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from attention.adapter import load_adapter
from attention.files import read_header
from faces.encoder import FaceEncoder
from training import demo, sample
from training.augment import square, to_rgb_pm1
from training.base import load_base
from training.config import ModelConfig
from training.draw import DrawOptions, Shot
from training.miniature import ADAPTER_PREFIX, BASE_FILE, CHECKPOINT, SHIPPED, SIDE, load_miniature, main, pack, unpack
from training.people import open_pack
from training.pictures import likeness
from training.quantise import quantised, restored
from training.references import Person
from training.unet import Reference, TextContext

ADAPTER = SHIPPED / f"{ADAPTER_PREFIX}fused.safetensors"
MIB = 2**20


def test_eight_bits_are_off_by_at_most_half_a_step():
    generator = torch.Generator().manual_seed(0)
    weights = {"conv": torch.randn(64, 32, 3, 3, generator=generator), "zero": torch.zeros(128, 64)}
    weights["conv"] *= torch.logspace(-3, 1, 64)[:, None, None, None]
    weights["bias"] = torch.randn(64, generator=generator)
    packed = quantised(weights)
    assert packed["conv"].dtype == torch.int8 and packed["bias"].dtype == torch.float16
    back = restored(packed)
    assert back.keys() == weights.keys()
    step = weights["conv"].flatten(1).abs().amax(1)[:, None, None, None] / 127
    assert bool(((back["conv"] - weights["conv"]).abs() <= 0.5001 * step).all())
    assert not back["zero"].any()


def test_what_ships_is_small_and_says_where_it_comes_from():
    files = sorted(SHIPPED.glob("*.safetensors"))
    assert {BASE_FILE, ADAPTER.name} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 60 * MIB
    for path in files:
        metadata = read_header(path).metadata
        assert metadata["fusedid.license"] and metadata["fusedid.training_config"]
        assert "/" not in metadata["fusedid.license"]


def test_packing_what_was_unpacked_gives_the_same_weights(tmp_path):
    unpack(tmp_path)
    again = pack(tmp_path / "diffusers" / "fusedid_mini", {"fused": ADAPTER}, tmp_path / "again")
    first, second = (load_miniature(path).unet.state_dict() for path in (SHIPPED / BASE_FILE, again / BASE_FILE))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, atol=1e-6, rtol=2e-3)
    header = read_header(tmp_path / CHECKPOINT)
    assert header.shapes["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] == (49408, 768)
    adapter = load_adapter(tmp_path / "fusedid" / ADAPTER.name)
    assert adapter.settings.reference_size == SIDE


def test_sample_draws_from_the_shipped_files(tmp_path):
    Image.fromarray(demo.found_face(demo.astronaut(), None)).save(tmp_path / "face.png")
    words = ["--base", str(SHIPPED / BASE_FILE), "--adapter", str(ADAPTER), "--face", str(tmp_path / "face.png")]
    words += ["--width", "128", "--height", "128", "--steps", "4", "--device", "cpu"]
    pictures = []
    for strength in ("1", "0"):
        out = tmp_path / f"{strength}.png"
        assert sample.main([*words, "--strength", strength, "--out", str(out)]) == 0
        pictures.append(np.asarray(Image.open(out)).astype(float))
    assert pictures[0].shape == (SIDE, SIDE, 3)
    assert min(picture.std() for picture in pictures) > 20
    assert np.abs(pictures[0] - pictures[1]).mean() > 5


def test_the_demo_finds_the_astronaut_without_any_face_model():
    crop = demo.found_face(demo.astronaut(), None)
    assert 120 <= crop.shape[0] <= 260
    with pytest.raises(ValueError, match="finds no face"):
        demo.found_face(np.full((200, 200, 3), 127, np.uint8), None)


def test_the_demo_writes_its_sheet(tmp_path, capsys):
    words = ["--out", str(tmp_path), "--steps", "3", "--face-pack-root", str(tmp_path)]
    assert demo.main(words) == 0
    said = capsys.readouterr().out
    assert "value strength 0.5" in said and "likeness was not measured" in said
    picture = np.asarray(Image.open(tmp_path / "miniature.png"))
    assert picture.shape[1] > 4 * demo.SHOWN and picture[..., 0].std() > 30


@pytest.fixture(scope="module")
def strangers(assets) -> tuple[FaceEncoder, list[np.ndarray]]:
    """The scorer, and synthetic people, none of whom was in the training set."""
    encoder = open_pack("test_pack", [str(assets / "insightface")])
    paths = sorted((assets / "faces" / "sfhq_crops").glob("syn*.jpg"))[:16]
    return encoder, [demo.found_face(np.asarray(Image.open(path).convert("RGB")), encoder) for path in paths]


@pytest.fixture(scope="module")
def studio() -> sample.Studio:
    return sample.open_studio(ModelConfig(base=str(SHIPPED / BASE_FILE)), str(ADAPTER))


@pytest.mark.assets
def test_the_shipped_adapter_knows_faces_it_was_never_trained_on(strangers, studio):
    """Their own face helps, somebody else's does not: the error of the prediction at high noise."""
    faces = strangers[1]
    own, nobody, other = (denoising_error(studio, faces, shown) for shown in (faces, None, faces[1:] + faces[:1]))
    assert own < 0.6 * nobody, (own, nobody)
    assert own < 0.4 * other, (own, other)


@pytest.mark.assets
def test_a_recogniser_sees_the_likeness_of_people_never_trained_on(strangers, studio):
    """The mean over 80 people and its interval are in docs/results.md."""
    encoder, faces = strangers
    options = DrawOptions(width=SIDE, height=SIDE, steps=12, guidance_scale=2.0)
    gains = []
    for shown in (True, False):
        shots = [Shot((Person((face,)),) if shown else (), "", seed) for seed, face in enumerate(faces[:8])]
        pictures = studio.draw_shots(shots, options)
        gains.append(
            np.mean([likeness(face, np.asarray(picture), encoder) or 0.0 for face, picture in zip(faces, pictures)])
        )
    assert gains[0] - gains[1] > 0.15, gains


@torch.no_grad()
def denoising_error(studio: sample.Studio, faces: list[np.ndarray], shown: list[np.ndarray] | None) -> float:
    """Mean squared error of the prediction for noised faces, with references or none."""
    latents = studio.base.encode(torch.stack([to_rgb_pm1(square(face, SIDE)) for face in faces]))
    generator = torch.Generator().manual_seed(0)
    noise, timesteps = torch.randn(latents.shape, generator=generator), torch.full((len(faces),), 800)
    schedule = DDPMScheduler.from_config(studio.base.pipeline.scheduler.config)
    text = TextContext(studio.base.prompts([""])[0].expand(len(faces), -1, -1))
    references = []
    if shown is not None:
        pixels = torch.stack([to_rgb_pm1(square(face, SIDE)) for face in shown])
        references = [Reference(studio.base.encode(pixels), text)]
    made = studio.model(schedule.add_noise(latents, noise, timesteps), timesteps, text, references)
    return float((made - schedule.get_velocity(latents, noise, timesteps)).square().mean())


def test_wrong_files_are_refused_by_name(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"whole SD1\.5 or SDXL checkpoint"):
        load_base(ModelConfig(base=str(ADAPTER)))
    assert main(["pack", "--base", str(tmp_path), "--adapter", "fused", "--out", str(tmp_path)]) == 2
    assert "NAME=FILE" in caplog.text

"""The style image on its way into HybridGuidance, in the real host."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.host


@pytest.fixture
def style(pack):
    return pack.submodule("nodes.guidance_style")


@pytest.fixture(scope="module")
def clip_vision(comfyui, tmp_path_factory):
    """The host's CLIP vision class with a tiny configuration."""
    import comfy.clip_vision

    config = {
        "hidden_act": "quick_gelu", "hidden_size": 32, "image_size": 224, "intermediate_size": 64,
        "layer_norm_eps": 1e-5, "model_type": "clip_vision_model", "num_attention_heads": 2, "num_channels": 3,
        "num_hidden_layers": 3, "patch_size": 32, "projection_dim": 12,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("vision") / "config.json"
    path.write_text(json.dumps(config))
    vision = comfy.clip_vision.ClipVisionModel(str(path))
    generator = torch.Generator().manual_seed(4)
    for parameter in vision.model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return vision


TINY = ("ViT(32)/32@224", 12)


def settings_with(pack, *towers: tuple[str, int]):
    module = pack.submodule("attention.guidance_settings")
    return module.GuidanceSettings(
        base="sd15", towers=tuple(module.Tower(*t) for t in towers), face_width=6, face_encoder=""
    )


def picture(seed: int = 0, size: tuple[int, int] = (64, 80), channels: int = 3) -> torch.Tensor:
    return torch.rand(1, *size, channels, generator=torch.Generator().manual_seed(seed))


def encode(pack, style, images, clip_vision, *towers, find_weights=lambda _: None):
    return style.encode_style(settings_with(pack, *towers), images, clip_vision, find_weights=find_weights, name="g")


def test_style_is_the_hosts_own_image_embedding(pack, style, clip_vision):
    assert (style.tower_of(clip_vision).name, style.tower_of(clip_vision).width) == TINY
    expected = clip_vision.encode_image(picture())["image_embeds"]
    torch.testing.assert_close(encode(pack, style, picture(), clip_vision, TINY), expected)


def test_a_batch_of_style_images_gives_their_mean(pack, style, clip_vision):
    batch = torch.cat([picture(0), picture(1)])
    alone = [encode(pack, style, image[None], clip_vision, TINY) for image in batch]
    torch.testing.assert_close(encode(pack, style, batch, clip_vision, TINY), sum(alone) / 2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_style_images_work(pack, style, clip_vision, channels):
    assert encode(pack, style, picture(channels=channels), clip_vision, TINY).shape == (1, 12)


def test_bad_style_images_are_refused(pack, style, clip_vision):
    for images, words in (
        (torch.rand(0, 64, 64, 3), "0, 64, 64"),
        (torch.rand(1, 1, 1, 3), "16 x 16"),
        (torch.full((1, 64, 64, 3), float("nan")), "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            encode(pack, style, images, clip_vision, TINY)


def test_another_tower_is_refused_with_both_names(pack, style, clip_vision):
    with pytest.raises(ValueError, match=r"ViT-L/14 \(768\).*ViT\(32\)/32@224 \(12\)"):
        encode(pack, style, picture(), clip_vision, ("ViT-L/14", 768))


def test_a_missing_tower_names_the_file_to_get(pack, style, clip_vision):
    with pytest.raises(ValueError, match=r"RN101 is missing.*models/clip_vision as RN101\.safetensors"):
        encode(pack, style, picture(), clip_vision, TINY, ("RN101", 512))
    with pytest.raises(ValueError, match=r"unheard-of.*open_clip does not have"):
        encode(pack, style, picture(), clip_vision, TINY, ("unheard-of", 7))


def test_weights_are_found_by_the_models_name(style):
    files = {
        name: Path(name)
        for name in ("clip_vit_l.safetensors", "sub/ViT-B-32-openai.pt", "rn101.safetensors", "RN101.txt")
    }
    assert style.weights_file("RN101", files) == Path("rn101.safetensors")
    assert style.weights_file("ViT-B-32", files) == Path("sub/ViT-B-32-openai.pt")
    assert style.weights_file("ViT-L-14", files) is None


@pytest.mark.slow
def test_the_papers_further_towers_come_from_open_clip(pack, style, clip_vision, tmp_path):
    open_clip = pytest.importorskip("open_clip", exc_type=Exception)
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    path = tmp_path / "ViT-B-32.pt"
    torch.save(model.state_dict(), path)
    got = encode(pack, style, picture(), clip_vision, TINY, ("ViT-B/32", 512), find_weights=lambda _: path)
    import comfy.clip_vision

    with torch.no_grad():
        expected = model.encode_image(comfy.clip_vision.clip_preprocess(picture()))
    assert got.shape == (1, 524)
    torch.testing.assert_close(got[:, 12:], expected, atol=1e-4, rtol=1e-4)


def test_a_file_that_is_a_program_is_not_run(style, pack, tmp_path):
    pytest.importorskip("open_clip", exc_type=Exception)
    tower = pack.submodule("attention.guidance_settings").Tower("ViT-B/32", 512)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"ViT-B-32\.pt could not be loaded.*safetensors"):
        style.load_open_clip("ViT-B-32", tmp_path / "ViT-B-32.pt", tower)


def test_a_masked_region_of_the_style_image_says_nothing(pack, style, clip_vision):
    mask = torch.zeros(1, 32, 40)
    mask[:, 8:24, 8:24] = 1
    one, two = picture(0), picture(0)
    two[:, 18:46, 18:46] = 0.9
    hidden = [style.hide_masked(image, mask) for image in (one, two)]
    torch.testing.assert_close(*hidden)
    assert not torch.equal(
        encode(pack, style, hidden[0], clip_vision, TINY), encode(pack, style, one, clip_vision, TINY)
    )
    with pytest.raises(ValueError, match="batch of 1"):
        style.hide_masked(one, torch.zeros(2, 8, 8))


class FakeEncoder:
    """Detects one face where the picture has a red square."""

    fingerprint, det_size, score_floor = None, 640, 0.5


def test_faces_in_the_style_image_are_hidden(style, monkeypatch):
    from types import SimpleNamespace

    boxes = {"found": [SimpleNamespace(box=(20.0, 16.0, 52.0, 48.0))]}
    detect = lambda image, _encoder: SimpleNamespace(faces=boxes["found"])  # noqa: E731
    monkeypatch.setattr(style, "find_faces_cached", detect)
    image = picture()
    hidden = style.hide_faces(image, FakeEncoder())
    np.testing.assert_allclose(hidden[0, 32, 36].numpy(), [0.4815, 0.4578, 0.4082], atol=1e-3)
    assert torch.equal(hidden[0, 2], image[0, 2])
    boxes["found"] = []
    with pytest.raises(ValueError, match=r"no face was found in style image 1.*Disconnect the face encoder"):
        style.hide_faces(image, FakeEncoder())

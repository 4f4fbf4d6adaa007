"""Cached outputs of frozen models equal what the models say about the packed pictures."""

from __future__ import annotations

from pathlib import Path

import prepare_kit as kit
import pytest
import torch
from safetensors import safe_open

from training.shards import ShardSource


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP vision tower of 24 numbers on 32 px."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=24,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_moments_and_texts_are_the_models(tmp_path: Path, tiny_base: Path) -> None:
    from training.prepare.encoders import load_base_parts

    photos, output = kit.photo_folder(tmp_path / "photos", 5), tmp_path / "out"
    (photos / "photo002.txt").write_text("a face")
    sets = [f"cache.base_model={tiny_base}", "cache.text=true", "pack.samples_per_shard=2"]
    kit.run(photos, output, *sets)
    source = ShardSource(str(output), "all")
    vae, prompts = load_base_parts(str(tiny_base), "cpu")
    pixels = torch.from_numpy(source.picture(2)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.parameters[0]
        context, pooled = prompts(["a face"])
    moments = source.moments(2, "target")
    assert moments.dtype == torch.float16 and moments.shape[0] == 8
    assert torch.allclose(moments.float(), expected, atol=2e-3)
    found, found_pooled = source.text(2)
    assert torch.allclose(found.float(), context[0], atol=2e-3)
    assert pooled is None and found_pooled is None
    assert torch.allclose(source.text(None)[0].float(), prompts([""])[0][0], atol=2e-3)
    with pytest.raises(ValueError, match="no entry 'photo002/reference'"):
        source.moments(2, "reference")


def test_sdxl_keeps_the_pooled_text(tmp_path: Path, tiny_base_xl: Path) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 1), tmp_path / "out"
    kit.run(photos, output, f"cache.base_model={tiny_base_xl}", "cache.text=true", "cache.vae=false")
    context, pooled = ShardSource(str(output), "all").text(0)
    assert pooled is not None and pooled.ndim == 1 and context.ndim == 2
    assert not (output / "cache" / "vae").exists()


def test_style_is_clip_of_the_picture(tmp_path: Path, clip_folder: Path) -> None:
    from training.prepare.encoders import encode_style, load_vision

    photos, output = kit.photo_folder(tmp_path / "photos", 3), tmp_path / "out"
    kit.run(photos, output, f"cache.clip_vision=[{clip_folder}, {clip_folder}]")
    source = ShardSource(str(output), "all")
    image = torch.from_numpy(source.picture(1)) / 255
    expected = encode_style(load_vision((str(clip_folder),), "cpu"), [image], 1)[0]
    assert torch.allclose(source.style(1), torch.cat([expected, expected]), atol=1e-5)
    assert source.style(0).shape == (48,)


@pytest.mark.assets
def test_style_does_not_see_the_face(tmp_path: Path, clip_folder: Path, assets: Path) -> None:
    from training.prepare.encoders import encode_style, load_vision

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes((assets / "faces/sfhq_crops/syn05.jpg").read_bytes())
    sets = [f"faces.roots=[{assets / 'insightface'}]", f"cache.clip_vision=[{clip_folder}]", "select.min_score=0.5"]
    kit.run(photos, tmp_path / "out", *sets, base=kit.WITH_FACES)
    source = ShardSource(str(tmp_path / "out"), "all")
    image, hidden = torch.from_numpy(source.picture(0)) / 255, torch.from_numpy(source.face_mask(0)) > 0
    shown = encode_style(load_vision((str(clip_folder),), "cpu"), [image], 1)[0]
    image[hidden] = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    expected = encode_style(load_vision((str(clip_folder),), "cpu"), [image], 1)[0]
    assert torch.allclose(source.style(0), expected, atol=1e-5)
    assert not torch.allclose(source.style(0), shown, atol=1e-3)


def test_cache_is_added_later_and_redone_for_another_model(tmp_path: Path, tiny_base: Path, tiny_base_xl: Path) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 2), tmp_path / "out"
    kit.run(photos, output)
    shard = (output / "shards" / "000000.tar").stat().st_mtime_ns
    kit.run(photos, output, f"cache.base_model={tiny_base}")
    path = output / "cache" / "vae" / "000000.safetensors"
    first = path.stat().st_mtime_ns
    kit.run(photos, output, f"cache.base_model={tiny_base}")
    assert path.stat().st_mtime_ns == first
    kit.run(photos, output, f"cache.base_model={tiny_base_xl}")
    assert path.stat().st_mtime_ns != first
    assert (output / "shards" / "000000.tar").stat().st_mtime_ns == shard
    with safe_open(path, "pt") as file:
        assert file.metadata()["fusedid.kind"] == "cache-vae"


def test_missing_models_are_said_before_any_work(tmp_path: Path) -> None:
    photos = kit.photo_folder(tmp_path / "photos", 1)
    with pytest.raises(ValueError, match=r"does not exist; check cache\.base_model"):
        kit.run(photos, tmp_path / "out", f"cache.base_model={tmp_path / 'nothing'}")
    assert not (tmp_path / "out" / "work").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no .safetensors"):
        kit.run(photos, tmp_path / "out", f"cache.clip_vision=[{tmp_path / 'empty'}]")


def test_damaged_cache_file_is_named(tmp_path: Path, tiny_base: Path) -> None:
    photos, output = kit.photo_folder(tmp_path / "photos", 1), tmp_path / "out"
    kit.run(photos, output, f"cache.base_model={tiny_base}")
    path = output / "cache" / "vae" / "000000.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], b"\xff" * 64, whole[:8] + b"x" * (len(whole) - 8), whole[:-10]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000000\.safetensors"):
            ShardSource(str(output), "all").moments(0, "target")

"""What community adapters see of an identity: the host's CLIP vision, the aligned face, files in users' folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import community_files as files
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

HIDDEN, EMBED, PATCHES = 64, 48, 256
CLIP = {
    "hidden_act": "quick_gelu",
    "hidden_size": HIDDEN,
    "image_size": 224,
    "intermediate_size": 128,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "projection_dim": EMBED,
}


@pytest.fixture(scope="module")
def clip_vision(comfyui: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The host's own ClipVisionModel, tiny, with random weights."""
    from comfy.clip_vision import ClipVisionModel

    path = tmp_path_factory.mktemp("clip") / "config.json"
    path.write_text(json.dumps(CLIP))
    model = ClipVisionModel(str(path))
    shapes = {name: tuple(weight.shape) for name, weight in model.get_sd().items()}
    model.load_sd(files.random_tensors(shapes))
    return model


def _identity(pack: Any, *, encoder: str = "buffalo_l", count: int = 2, with_face: bool = True) -> Any:
    module = pack.submodule("faces.identity")
    rng = np.random.default_rng(0)
    fingerprint = module.EncoderFingerprint(encoder, "insightface", "a" * 64, "b" * 64, 512, "test")
    points = np.array([[70, 90], [130, 88], [100, 120], [75, 150], [126, 149]], dtype=np.float32)
    references = tuple(
        module.Reference(
            crop=rng.integers(0, 255, (200, 200, 3), dtype=np.uint8),
            embedding=(20 * rng.standard_normal(512)).astype(np.float32) if with_face else None,
            keypoints=points if with_face else None,
            score=0.9,
        )
        for _ in range(count)
    )
    return module.Identity(references, fingerprint, "someone")


def _recognised(pack: Any, family: str, width: int = 0) -> Any:
    shapes = files.file_shapes(family, "sd15", depth=1)
    if width:
        name = {
            "standard": "proj.weight",
            "plus": "proj_in.weight",
            "faceid-plus": "perceiver_resampler.proj_in.weight",
        }
        key = f"image_proj.{name[family]}"
        shapes[key] = (shapes[key][0], width)
    return pack.submodule("attention.community.recognise").recognise(shapes, name="synthetic")


def test_the_standard_family_sees_projected_embeddings(pack: Any, clip_vision: Any) -> None:
    module = pack.submodule("nodes.community_inputs")
    found = module.face_inputs(_recognised(pack, "standard", EMBED), _identity(pack), clip_vision=clip_vision)
    crop = torch.from_numpy(_identity(pack).references[1].crop).float()[None] / 255
    torch.testing.assert_close(found.clip_embeds[1:], clip_vision.encode_image(crop)["image_embeds"])
    assert found.clip_embeds.shape == (2, EMBED)
    assert found.embedding is None


def test_the_plus_family_sees_penultimate_hidden_states(pack: Any, clip_vision: Any) -> None:
    module = pack.submodule("nodes.community_inputs")
    found = module.face_inputs(_recognised(pack, "plus", HIDDEN), _identity(pack), clip_vision=clip_vision)
    assert found.clip_hidden.shape == (2, 1 + PATCHES, HIDDEN)
    zero = clip_vision.model(pixel_values=torch.zeros(1, 3, 224, 224), intermediate_output=-2)[1]
    torch.testing.assert_close(found.clip_hidden_blank, zero)


def test_faceid_plus_sees_the_aligned_face(pack: Any, clip_vision: Any) -> None:
    module, align = pack.submodule("nodes.community_inputs"), pack.submodule("faces.align")
    identity = _identity(pack)
    found = module.face_inputs(_recognised(pack, "faceid-plus", HIDDEN), identity, clip_vision=clip_vision)
    reference = identity.references[0]
    turn = align.similarity_transform(reference.keypoints, align.ARCFACE_POINTS * 2)
    face = torch.from_numpy(align.warp(reference.crop, turn, 224, 224).copy()).float()[None] / 255
    expected = clip_vision.encode_image(face)["penultimate_hidden_states"]
    torch.testing.assert_close(found.clip_hidden[:1], expected)
    assert found.embedding.shape == (2, 512)
    assert found.encoder == "buffalo_l"


def test_a_person_without_a_found_face_has_no_embedding(pack: Any) -> None:
    module = pack.submodule("nodes.community_inputs")
    found = module.face_inputs(_recognised(pack, "faceid"), _identity(pack, with_face=False))
    assert found.embedding is None


def test_an_unknown_face_pack_is_noted(pack: Any) -> None:
    module, faceid = pack.submodule("nodes.community_inputs"), _recognised(pack, "faceid")
    assert module.encoder_note(faceid, _identity(pack)) == ""
    assert "trained with the face pack buffalo_l" in module.encoder_note(faceid, _identity(pack, encoder="mine"))


@pytest.fixture
def community_folder(pack: Any, comfyui_base: Path) -> Any:
    """models/ipadapter and models/pulid with a usable file each, a stranger, and a text file."""
    module = pack.submodule("nodes.community_files")
    module.register_community_folders()
    folder = comfyui_base / "models" / "ipadapter"
    (comfyui_base / "models" / "pulid").mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = files.random_tensors(files.file_shapes("standard", "sd15"), dtype=torch.float16)
    save_file(tensors, folder / "whatever.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, folder / "style_lora.safetensors")
    (folder / "put_models_here").write_text("")
    return module


def test_files_are_listed_by_what_they_are_not_by_name(community_folder: Any) -> None:
    entries = community_folder.community_choices()
    assert "ipadapter/whatever.safetensors" in entries
    assert not any("style_lora" in entry or "put_models" in entry for entry in entries)
    loaded = community_folder.load_community_choice("ipadapter/whatever.safetensors", "as recognised")
    assert loaded.family.name == "ip-adapter"


def test_a_file_that_went_away_is_a_clear_error(community_folder: Any) -> None:
    with pytest.raises(ValueError, match="not there any more"):
        community_folder.community_path("ipadapter/gone.safetensors")
    with pytest.raises(ValueError, match="not there any more"):
        community_folder.community_path("checkpoints/secret.safetensors")


def test_a_changed_file_is_read_again(community_folder: Any, comfyui_base: Path) -> None:
    entry = "ipadapter/whatever.safetensors"
    before = community_folder.community_fingerprint(entry)
    shapes = files.file_shapes("plus", "sd15", depth=1)
    save_file(files.random_tensors(shapes, dtype=torch.float16), comfyui_base / "models" / entry)
    assert community_folder.community_fingerprint(entry) != before
    assert community_folder.recognised_choice(entry).family.name == "ip-adapter-plus"


def test_pulids_tower_is_found_by_its_tensors(community_folder: Any, comfyui_base: Path) -> None:
    mark = {"visual.blocks.0.attn.inner_attn_ln.weight": torch.zeros(8)}
    save_file(mark, comfyui_base / "models" / "pulid" / "renamed.safetensors")
    assert community_folder.load_eva() is not None

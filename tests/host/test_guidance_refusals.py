"""HybridGuidance refuses what cannot work, before sampling and with the remedy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from guidance_lab import NO_PRIOR, Lab

from attention.guidance_file import load_guidance, save_guidance

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def lab(pack, small_models, comfyui) -> Lab:
    return Lab(pack, small_models, comfyui.base)


BAD = {
    "alpha too large": ({"alpha": 1.5}, "alpha is 1.5, accepted is 0"),
    "a missing guidance file": ({"guidance": "gone.safetensors"}, "'gone.safetensors' is not there"),
    "a missing prior": (
        {"text": "a cat", "prior": "gone.safetensors", "clip": object()},
        "the prior 'gone.safetensors'",
    ),
    "a text without CLIP": ({"text": "a cat"}, "no CLIP to read it"),
    "a style mask without an image": ({"style_mask": torch.ones(1, 8, 8)}, "without a style image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_sampling(lab, case):
    inputs, words = BAD[case]
    with pytest.raises(ValueError, match="HybridGuidance") as error:
        lab.run(**inputs)
    assert words in str(error.value)


def test_another_face_encoder_is_refused_with_both_names(lab):
    with pytest.raises(ValueError, match=r"pack A \(6 numbers.*pack C \(6 numbers"):
        lab.run(identity=lab.identity(1, sha="cd" * 32))
    with pytest.raises(ValueError, match=r"pack A \(6 numbers.*pack A \(7 numbers"):
        lab.run(identity=lab.identity(1, dim=7))


def test_an_sdxl_model_with_an_sd15_file_is_refused(lab, small_models):
    with pytest.raises(ValueError, match=r"Stable Diffusion 1\.x \(context width 768\).*2048"):
        lab.run(model=small_models.load_unet("sdxl_tiny"))


def test_a_model_without_cross_attention_is_refused(lab):
    with pytest.raises(ValueError, match=r"no SD1\.5 or SDXL UNet"):
        lab.run(model=SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(2, 2))))


def test_zero_identities_too_many_masks_and_double_wiring_are_refused(lab):
    routed = lab.two_people()
    with pytest.raises(ValueError, match="0 identities"):
        lab.run(routed=lab.routed((), routed.masks))
    with pytest.raises(ValueError, match="3 masks for 2 identities"):
        lab.run(routed=lab.routed(routed.identities, torch.ones(3, 8, 8)))
    with pytest.raises(ValueError, match="both identity and routed"):
        lab.run(routed=routed, identity=lab.identity(1))


def test_people_without_a_place_are_refused_by_name(lab, pack):
    people = lab.two_people().identities
    masks = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
    with pytest.raises(ValueError, match=r"mask of person 2 \(person 2\) is empty"):
        lab.run(routed=lab.routed(people, masks))
    place = pack.submodule("nodes.wire_types").Place
    with pytest.raises(ValueError, match=r"waiting: person 1 \(person 1\), person 2"):
        lab.run(routed=lab.routed(people, None, places=(place(), place())))


def test_the_drop_downs_list_guidance_files_only(lab, pack, small_models):
    files = pack.submodule("nodes.guidance_files")
    (lab.file.parent / "noise.safetensors").write_bytes(b"not a model")
    names = files.guidance_choices()
    assert lab.file.name in names
    assert "noise.safetensors" not in names
    assert names[-1].startswith("identity Linear")
    assert files.prior_choices()[-1] == NO_PRIOR


def test_a_changed_guidance_file_is_noticed(lab, pack):
    node = pack.nodes["HybridGuidance"]
    stamp = lambda: node.fingerprint_inputs(guidance=lab.file.name, prior=NO_PRIOR)  # noqa: E731
    before = stamp()
    save_guidance(lab.file, load_guidance(lab.file))
    assert stamp() != before

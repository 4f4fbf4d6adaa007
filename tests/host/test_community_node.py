"""Community files through FusedIDAttentionPatch in the real host: each layer is text plus face; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import community_files as files
import fusion_lab
import pytest
import torch
from fusion_lab import FusionLab, largest, relative
from safetensors.torch import save_file

from attention.naive import naive_fused_attention

FOLDERS = {"instantid": "instantid", "pulid-v1.1": "pulid"}


@pytest.fixture(scope="module")
def labs(pack: Any, small_models: Any) -> Callable[[str], FusionLab]:
    made: dict[str, FusionLab] = {}

    def lab(layout: str) -> FusionLab:
        if layout not in made:
            made[layout] = FusionLab(pack, small_models, layout)
        return made[layout]

    return lab


def place(lab: FusionLab, family: str, name: str, change: Callable[[dict[str, Any]], Any] | None = None) -> str:
    """A synthetic file of a family with the model's widths in the folder its users have; the drop-down's entry."""
    order = lab.pack.submodule("attention.community.layers").processor_order(lab.sites)
    base = "sdxl" if lab.sites[0].context == 2048 else "sd15"
    shapes = files.file_shapes(family, base, depth=1, widths=[site.channels for site in order], rank=4)
    tensors = files.random_tensors(shapes, dtype=torch.float16)
    if change is not None:
        change(tensors)
    folder = FOLDERS.get(family, "ipadapter")
    path = Path(lab.pack.host.base) / "models" / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return f"{folder}/{name}"


def person(lab: FusionLab, family: str, seed: int = 0) -> Any:
    """An identity from the face pack the family was trained with."""
    identity = lab.identity(seed, weights=(1.0, 1.0))
    if family == "instantid":
        module = lab.pack.submodule("faces.identity")
        encoder = module.EncoderFingerprint("antelopev2", "insightface", "c" * 64, "d" * 64, 512, "test")
        return type(identity)(identity.references, encoder, identity.name)
    return identity


@pytest.mark.parametrize(("family", "layout"), [
    ("faceid", "sd15_small"), ("portrait", "sd15_small"), ("faceid", "sdxl_tiny"), ("instantid", "sdxl_tiny"),
])  # fmt: skip
def test_every_layer_adds_the_families_own_branch(labs, pack, family, layout):
    """out = attention(q, text) + strength * attention(q, face), for the positive prompt; "no face" for the negative."""
    lab = labs(layout)
    entry = place(lab, family, f"{family}_{layout}.safetensors")
    identity = person(lab, family)
    patched, report = lab.patch(adapter=entry, vae=None, identity=identity, strength=0.7)
    assert report.startswith(f"{len(lab.sites)} of {len(lab.sites)} layers, 2 references") and "decoupled" in report
    features = lab.pack.submodule("nodes.community_source").community_features(
        lab.pack.submodule("nodes.community_files").load_community_choice(entry, "as recognised"), lab.sites, identity
    )
    for site in lab.sites[:: max(1, len(lab.sites) // 6)]:
        (call,) = lab.calls_at(patched, site, steps=1)
        negative, positive = features.negative.layers[site.path], [one.layers[site.path] for one in features.positive]
        assert call.options["cond_or_uncond"] == [1, 0]
        for row, layers in ((0, [negative]), (1, positive)):
            q, k, v = (tensor[row : row + 1] for tensor in (call.q, call.k, call.v))
            keys, values = (torch.cat([getattr(layer, name) for layer in layers], 1) for name in ("key", "value"))
            branch = naive_fused_attention(q, keys, values, [], heads=site.heads)
            text = naive_fused_attention(q, k, v, [], heads=site.heads)
            assert relative(call.out[row : row + 1], text + 0.7 * branch) < 1e-4, (site.path, row)


def test_the_files_own_lora_acts_and_can_be_turned_off(labs):
    lab = labs("sd15_small")
    entry = place(lab, "faceid", "faceid_with_lora.safetensors")
    given = {"adapter": entry, "vae": None, "identity": person(lab, "faceid")}
    with_lora, without = (lab.patch(lora_strength=strength, **given)[0] for strength in (1.0, 0.0))
    assert relative(lab.sample(with_lora), lab.sample(without)) > 1e-3
    off, _ = lab.patch(strength=0.0, **given)
    assert torch.equal(lab.sample(off), lab.sample(lab.model)), "strength 0 takes the LoRA away as well"


def test_the_files_lora_is_added_once_and_the_report_says_so(labs):
    lab = labs("sd15_small")
    given = {"adapter": place(lab, "faceid", "faceid_twice.safetensors"), "vae": None}
    first, before = lab.patch(identity=person(lab, "faceid", 1), lora_strength=0.5, **given)
    second, report = lab.patch(first, identity=person(lab, "faceid", 2), **given)
    assert "already carries" not in before
    assert "the model already carries the LoRA of faceid_twice.safetensors (strength 0.5, 56 layers)" in report
    assert [len(patches) for patches in second.patches.values()] == [1] * 56


@pytest.mark.parametrize("combine", ["decoupled", "fused"])
def test_regions_keep_people_apart(labs, combine):
    lab, masks = labs("sd15_small"), fusion_lab.halves()
    entry = place(lab, "portrait", "portrait_routed.safetensors")
    calls = []
    for other in (5, 6):
        people = [person(lab, "portrait", 3), person(lab, "portrait", other)]
        patched, _ = lab.patch(adapter=entry, vae=None, routed=lab.routed(people, masks), combine=combine)
        calls.append(lab.calls_at(patched, lab.sites[0], steps=1)[0])
    left, right = (fusion_lab.tokens(mask, fusion_lab.grid_of(calls[0])) for mask in masks)
    assert largest(calls[0].out[1, left] - calls[1].out[1, left]) == 0.0
    assert largest(calls[0].out[1, right] - calls[1].out[1, right]) > 1e-3


def refused(lab: FusionLab, **inputs: Any) -> str:
    options = repr(lab.model.model_options)
    with lab.counted_passes() as rows, pytest.raises(ValueError) as caught:
        lab.patch(vae=None, **inputs)
    assert rows == [] and repr(lab.model.model_options) == options and not lab.model.patches, "never a partial patch"
    assert str(caught.value).startswith("FusedIDAttentionPatch: ")
    return str(caught.value)


def test_an_sdxl_file_on_sd15(labs):
    entry = place(labs("sdxl_tiny"), "faceid", "faceid_sdxl.safetensors")
    lab = labs("sd15_small")
    message = refused(lab, adapter=entry, identity=person(lab, "faceid"))
    assert ("2048" in message and "768" in message) or "SDXL" in message


def test_a_file_with_half_of_its_layers(labs):
    lab = labs("sd15_small")

    def halve(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("ip_adapter.") and int(name.split(".")[1]) > 6]:
            del tensors[name]

    entry = place(lab, "portrait", "half_of_it.safetensors", halve)
    message = refused(lab, adapter=entry, identity=person(lab, "portrait"))
    assert "half_of_it" in message and "layers" in message


def test_a_second_file_of_another_width_leaves_the_first_as_it_was(labs, pack, small_models):
    lab = labs("sd15_small")
    entry = place(lab, "portrait", "fits.safetensors")
    other = place(labs("sdxl_tiny"), "portrait", "fits_not.safetensors")
    first, _ = lab.patch(adapter=entry, vae=None, identity=person(lab, "portrait"))
    wanted = lab.sample(first)
    with pytest.raises(ValueError, match="FusedIDAttentionPatch: "):
        lab.patch(first, adapter=other, vae=None, identity=person(lab, "portrait"))
    assert torch.equal(lab.sample(first), wanted)


def test_a_lora_in_a_community_folder_is_not_offered_and_is_refused_by_name(labs):
    lab = labs("sd15_small")
    path = Path(lab.pack.host.base) / "models" / "ipadapter" / "a_lora.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"lora_unet_mid_block_proj_in.lora_down.weight": torch.zeros(4, 320)}, path)
    assert "ipadapter/a_lora.safetensors" not in lab.pack.submodule("nodes.adapter_choice").adapter_choices()
    assert "LoRA" in refused(lab, adapter="ipadapter/a_lora.safetensors", identity=person(lab, "faceid"))


def test_a_family_that_looks_through_clip_names_the_model_it_wants(labs):
    lab = labs("sd15_small")
    entry = place(lab, "plus", "plus.safetensors")
    assert "CLIP-ViT-H" in refused(lab, adapter=entry, identity=person(lab, "faceid"))


def test_an_identity_from_another_face_pack_is_named(labs):
    """InstantID was trained with antelopev2; embeddings of another recogniser of the same width mean nothing to it."""
    lab = labs("sdxl_tiny")
    entry = place(lab, "instantid", "instantid.safetensors")
    message = refused(lab, adapter=entry, identity=lab.identity())
    assert "antelopev2" in message and "buffalo_l" in message

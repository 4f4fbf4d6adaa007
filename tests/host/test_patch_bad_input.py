"""Bad input to FusedIDAttentionPatch: an error that names the node and the remedy, before anything is sampled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fusion_lab
import pytest
import torch
from fusion_lab import FusionLab
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, "sd15_tiny")


def refused(lab: FusionLab, **inputs: Any) -> str:
    """The message; nothing ran through the model, nothing was cached, written or left in the MODEL."""
    cache = lab.pack.submodule("nodes.reference_cache").CACHE
    files = sorted(path for path in Path(lab.pack.host.base).rglob("*") if path.is_file())
    entries, options = cache.stats().entries, repr(lab.model.model_options)
    with lab.counted_passes() as rows, pytest.raises(ValueError) as caught:
        lab.patch(**inputs)
    assert rows == [] and cache.stats().entries == entries and repr(lab.model.model_options) == options
    assert sorted(path for path in Path(lab.pack.host.base).rglob("*") if path.is_file()) == files
    message = str(caught.value)
    assert message.startswith("FusedIDAttentionPatch: ")
    return message


def changed_adapter(lab: FusionLab, name: str, change: Any) -> str:
    """A copy of the adapter after `change(tensors, metadata)`, beside it in models/fusedid."""
    tensors = load_file(lab.adapter)
    with safe_open(lab.adapter, "pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, lab.adapter.with_name(name), metadata)
    return name


def test_an_adapter_of_the_wrong_base(lab, small_models):
    name = changed_adapter(lab, "sdxl_named.safetensors", lambda _, metadata: metadata.update({"fusedid.base": "sdxl"}))
    sd15 = FusionLab(lab.pack, small_models, "sd15_full")
    message = refused(sd15, adapter=name)
    assert "Stable Diffusion XL" in message and "Stable Diffusion 1.x" in message


def test_an_adapter_of_another_size_of_model(lab, small_models):
    other = small_models.adapter("sd15_small")
    message = refused(lab, adapter=other.name)
    assert "4 cross-attention layers" in message and "7" in message and "trained for this base model" in message


def test_a_missing_layer(lab):
    path = lab.sites[0].path

    def drop(tensors: Any, _: Any) -> None:
        for kind in ("k", "v"):
            del tensors[f"{path}.attn2.to_{kind}_face.weight"]

    assert f"missing: {path}" in refused(lab, adapter=changed_adapter(lab, "missing.safetensors", drop))


def test_half_a_layer(lab):
    name = f"{lab.sites[0].path}.attn2.to_k_face.weight"
    message = refused(lab, adapter=changed_adapter(lab, "half.safetensors", lambda tensors, _: tensors.pop(name)))
    assert "only one of key and value" in message


def test_an_extra_layer(lab):
    def add(tensors: Any, _: Any) -> None:
        for kind in ("k", "v"):
            tensors[f"input_blocks.9.1.transformer_blocks.0.attn2.to_{kind}_face.weight"] = torch.zeros(320, 320)

    assert "too many: input_blocks.9.1" in refused(lab, adapter=changed_adapter(lab, "extra.safetensors", add))


def test_nan_weights(lab):
    def spoil(tensors: Any, _: Any) -> None:
        tensors[f"{lab.sites[1].path}.attn2.to_v_face.weight"][3, 5] = float("nan")

    message = refused(lab, adapter=changed_adapter(lab, "nan.safetensors", spoil))
    assert "nan.safetensors" in message and lab.sites[1].path in message


def test_weights_of_another_width(lab):
    def shrink(tensors: Any, _: Any) -> None:
        name = f"{lab.sites[1].path}.attn2.to_v_face.weight"
        tensors[name] = tensors[name][:, :100].contiguous()

    message = refused(lab, adapter=changed_adapter(lab, "narrow.safetensors", shrink))
    assert "[320, 100]" in message and "[320, 320]" in message


def test_a_truncated_file(lab):
    path = lab.adapter.with_name("truncated.safetensors")
    path.write_bytes(lab.adapter.read_bytes()[:-100])
    assert "truncated.safetensors" in refused(lab, adapter=path.name)


def test_no_safetensors_file_at_all(lab):
    path = lab.adapter.with_name("text.safetensors")
    path.write_text("<html>404 not found</html>")
    assert "text.safetensors" in refused(lab, adapter=path.name)


@pytest.mark.parametrize(("key", "family"), [
    ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
    ("lora_unet_input_blocks_1_1_proj_in.lora_down.weight", "LoRA"),
    ("controlnet_cond_embedding.conv_in.weight", "ControlNet"),
    ("model.diffusion_model.input_blocks.0.0.weight", "checkpoint"),
])  # fmt: skip
def test_a_file_of_another_family(lab, key, family):
    path = lab.adapter.with_name("stranger.safetensors")
    save_file({key: torch.zeros(4, 4)}, path)
    assert family.lower() in refused(lab, adapter=path.name).lower()


def test_an_adapter_that_is_gone(lab):
    message = refused(lab, adapter="never_was.safetensors")
    assert "models/fusedid" in message and "refresh" in message


def test_a_guidance_file_in_the_adapters_place(lab):
    def rename(_: Any, metadata: Any) -> None:
        metadata["fusedid.kind"] = "guidance"

    message = refused(lab, adapter=changed_adapter(lab, "guidance.safetensors", rename))
    assert "guidance" in message and "HybridGuidance" in message


def test_a_model_that_is_no_such_unet(lab):
    """What the host gives for Flux: a diffusion model without cross-attention sites."""
    from comfy.model_patcher import ModelPatcher

    base = torch.nn.Module()
    base.diffusion_model = torch.nn.ModuleDict({"double_blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    flux = ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FusedIDAttentionPatch: needs an SD1.5, SD2 or SDXL model, got Module"):
        lab.patch(flux)


def test_no_vae(lab):
    assert "'vae' is not connected" in refused(lab, vae=None)


@pytest.mark.parametrize("channels", [16, 3])
def test_a_vae_of_another_kind(lab, channels):
    vae = SimpleNamespace(encode=lambda pixels: torch.zeros(1, channels, pixels.shape[1] // 8, pixels.shape[2] // 8))
    assert f"[1, {channels}, 8, 8]" in refused(lab, vae=vae)


def test_a_vae_that_gives_nan(lab):
    vae = SimpleNamespace(encode=lambda _: torch.full((1, 4, 8, 8), float("nan")))
    assert "--fp32-vae" in refused(lab, vae=vae)


def test_neither_or_both_of_identity_and_routed(lab):
    assert "got neither" in refused(lab, identity=None)
    routed = lab.routed([lab.identity(1)], fusion_lab.halves()[:1])
    assert "got both" in refused(lab, identity=lab.identity(), routed=routed)


def test_only_references_of_weight_0(lab):
    assert "weight above 0" in refused(lab, identity=lab.identity(weights=(0.0, 0.0)))


def test_start_after_end(lab):
    assert "start_percent is 0.7 and end_percent 0.3" in refused(lab, start_percent=0.7, end_percent=0.3)


def test_a_text_encoder_of_another_model(lab):
    clip = SimpleNamespace(tokenize=str, encode_from_tokens=lambda *_, **__: (torch.zeros(1, 77, 2048), None))
    message = refused(lab, clip=clip)
    assert "2048" in message and "768" in message


def test_adain_with_an_adapter(lab):
    assert "training-free" in refused(lab, adain=True)


def test_masks_that_fit_no_layer_say_what_to_remove(lab):
    """Token merging in self-attention with masks: refused in the run, by name."""
    routed = lab.routed([lab.identity(1), lab.identity(2)], fusion_lab.halves())
    patched, _ = lab.patch(routed=routed, adapter="training-free")
    patched.set_model_attn1_patch(lambda n, context, value, extra: (n[:, ::2], context[:, ::2], value))
    with pytest.raises(ValueError, match="FusedIDAttentionPatch: another node merges or tiles the tokens"):
        lab.sample(patched)

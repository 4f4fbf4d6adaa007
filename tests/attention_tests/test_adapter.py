"""The adapter file: what is saved is loaded, and every wrong file is refused with a reason and a remedy."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_kit import SITES, first_names, projections, rewrite, write_adapter
from safetensors.torch import save_file

from attention.adapter import (
    PROMPT_CONTEXT,
    PROMPT_POOLED,
    AdapterSettings,
    Projection,
    check_adapter_fits,
    load_adapter,
    save_adapter,
)
from attention.files import read_header, write_atomic
from attention.sites import SD15_SITES, SDXL_SITES

KEY, VALUE = first_names()
TRAINED = AdapterSettings(
    base="sd15",
    timestep="matched",
    text="positive",
    length="paper",
    combine="decoupled",
    reference_size=384,
    base_checkpoint='Realistic Vision v4.0 \n"ü" 顔',
    base_hash="ab" * 32,
    encoder="antelopev2 " + "c" * 64,
    samples_seen=80_000,
    license="CC-BY-4.0",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An adapter that fits `SITES`."""
    return write_adapter(tmp_path / "face.safetensors")


def test_round_trip(tmp_path: Path) -> None:
    context, pooled = torch.randn(77, 768), torch.randn(1280)
    weights = projections()
    path = tmp_path / "face.safetensors"
    save_adapter(path, weights, TRAINED, prompt_context=context, prompt_pooled=pooled, dtype=torch.float32)
    adapter = load_adapter(str(path))
    assert adapter.settings == TRAINED
    assert set(adapter.projections) == set(weights)
    for site, projection in weights.items():
        assert torch.equal(adapter.projections[site].key, projection.key)
        assert torch.equal(adapter.projections[site].value, projection.value)
    assert torch.equal(adapter.prompt_context, context) and torch.equal(adapter.prompt_pooled, pooled)
    assert adapter.num_bytes == sum(2 * 4 * site.channels**2 for site in SITES)
    check_adapter_fits(adapter, SITES, name="face")


def test_the_weights_are_half_precision_by_default(file: Path) -> None:
    adapter = load_adapter(file)
    weights = projections()
    assert all(torch.equal(p.key, weights[site].key.half()) for site, p in adapter.projections.items())
    assert adapter.prompt_context is None and adapter.prompt_pooled is None


def test_names_in_the_file_are_the_documented_ones(file: Path) -> None:
    names = set(read_header(file).shapes)
    assert len(names) == 32
    assert "input_blocks.1.1.transformer_blocks.0.attn2.to_k_face.weight" in names
    assert "middle_block.1.transformer_blocks.0.attn2.to_v_face.weight" in names


@pytest.mark.parametrize(("sites", "megabytes"), [(SD15_SITES, 49.6), (SDXL_SITES, 410)], ids=["sd15", "sdxl"])
def test_the_size_is_the_documented_one(sites: Any, megabytes: float) -> None:
    halves = sum(2 * site.channels**2 for site in sites)
    assert 2 * halves / 1e6 == pytest.approx(megabytes, rel=0.02)


def test_metadata_are_strings_with_every_decision(tmp_path: Path) -> None:
    path = write_adapter(
        tmp_path / "x.safetensors", settings=TRAINED, extra_metadata={"fusedid.training": "{}", "fusedid.kind": "liar"}
    )
    metadata = read_header(path).metadata
    expected = {f"fusedid.{key}": str(value) for key, value in asdict(TRAINED).items()}
    assert expected.items() <= metadata.items()
    assert metadata["fusedid.format"] == "1" and metadata["fusedid.kind"] == "fusion"
    assert metadata["fusedid.training"] == "{}"
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/fusedid-fusion"
    assert metadata["modelspec.license"] == "CC-BY-4.0"
    assert load_adapter(path).metadata == metadata


def test_settings_an_older_file_does_not_name_have_their_defaults(file: Path) -> None:
    silent = {f"fusedid.{key}": None for key in asdict(TRAINED) if key != "base"}
    assert load_adapter(rewrite(file, metadata=silent)).settings == AdapterSettings(base="sd15")


def test_the_fingerprint_is_of_the_content_not_of_the_name(file: Path) -> None:
    original = load_adapter(file).fingerprint
    assert load_adapter(write_adapter(file.with_name("other.safetensors"))).fingerprint == original
    assert load_adapter(rewrite(file, metadata={"fusedid.length": "paper"})).fingerprint != original
    weights = load_adapter(file).projections[SITES[0].path].key.clone()
    weights[0, 0] += 1
    changed = rewrite(write_adapter(file), tensors={KEY: weights})
    assert load_adapter(changed).fingerprint != original


def test_tied_key_and_value_weights_are_saved(tmp_path: Path) -> None:
    """As they are before the first step when both start from one tensor."""
    weight = torch.randn(8, 8, dtype=torch.float16)
    save_adapter(tmp_path / "x.safetensors", {SITES[0].path: Projection(weight, weight)}, TRAINED)
    loaded = load_adapter(tmp_path / "x.safetensors").projections[SITES[0].path]
    assert torch.equal(loaded.key, weight) and torch.equal(loaded.value, weight)


def test_weights_too_large_for_the_dtype_are_not_written(file: Path) -> None:
    before = file.read_bytes()
    large = {SITES[0].path: Projection(torch.full((8, 8), 1e6), torch.ones(8, 8))}
    with pytest.raises(ValueError, match=rf"^face\.safetensors: the weights of {KEY} hold NaN or infinity.*as float16"):
        save_adapter(file, large, TRAINED)
    assert file.read_bytes() == before
    save_adapter(file, large, TRAINED, dtype=torch.bfloat16)
    assert load_adapter(file).projections[SITES[0].path].key.dtype == torch.bfloat16


# Files that are no adapter for this model


def refused(file: Path, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{file.name}.*{message}"):
        load_adapter(file)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(file: Path, value: float) -> None:
    refused(rewrite(file, tensors={VALUE: torch.full((8, 8), value)}), f"the weights of {VALUE} hold NaN or infinity")


@pytest.mark.parametrize("missing", [KEY, VALUE], ids=["keys", "values"])
def test_half_a_pair_is_refused(file: Path, missing: str) -> None:
    refused(rewrite(file, tensors={missing: None}), f"layer {SITES[0].path} has only one of key and value weights")


def test_foreign_tensors_are_refused(file: Path) -> None:
    refused(rewrite(file, tensors={"ip_adapter.1.to_k_ip.weight": torch.ones(1)}), "holds tensors no adapter has")


def test_a_file_without_projections_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    metadata = {"fusedid.kind": "fusion", "fusedid.format": "1", "fusedid.base": "sd15"}
    write_atomic(path, {PROMPT_CONTEXT: torch.ones(2, 2)}, metadata)
    refused(path, "holds no face projections")


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [(KEY, (8,), 2), (KEY, (8, 8, 1), 2), (VALUE, (0, 8), 2), (PROMPT_CONTEXT, (77,), 2), (PROMPT_POOLED, (1, 8), 1)],
)
def test_a_wrong_number_of_axes_is_refused(file: Path, name: str, shape: tuple[int, ...], axes: int) -> None:
    refused(rewrite(file, tensors={name: torch.ones(shape)}), f"has shape .*, expected {axes} non-empty axes")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_weights_that_are_no_floats_are_refused(file: Path, dtype: torch.dtype) -> None:
    refused(rewrite(file, tensors={KEY: torch.ones(8, 8, dtype=dtype)}), rf"{KEY} is {dtype}.* floating point")


def test_a_truncated_file_is_refused(file: Path) -> None:
    content = file.read_bytes()
    for keep in (len(content) - 1, len(content) // 2, 20):
        file.write_bytes(content[:keep])
        refused(file, "is not a readable safetensors file.*download or save it again")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ip_adapter.1.to_k_ip.weight", "an InstantID or IP-Adapter file"),
        ("image_proj.latents", "an InstantID or IP-Adapter file"),
        ("id_adapter_attn_layers.0.id_to_k.weight", "a PuLID file"),
        ("id_encoder.fuse_module.mlp1.fc1.weight", "a PhotoMaker file"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", "a LoRA"),
        ("model.diffusion_model.out.2.weight", "a whole checkpoint"),
    ],
)
def test_foreign_families_are_refused_by_name(tmp_path: Path, name: str, what: str) -> None:
    save_file({name: torch.ones(4, 4)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", f"is {what}, but a FusedID fusion file is needed here")


@pytest.mark.parametrize("number", ["2", "10", "abc"])
def test_a_newer_format_is_refused_with_the_remedy(file: Path, number: str) -> None:
    refused(rewrite(file, metadata={"fusedid.format": number}), rf"has file format {number}.*Update FusedID")


def test_a_file_without_its_base_is_refused(file: Path) -> None:
    refused(rewrite(file, metadata={"fusedid.base": None}), r"does not say which base model .*fusedid\.base is missing")


@pytest.mark.parametrize("setting", ["base", "timestep", "text", "length", "combine"])
def test_an_unknown_setting_value_is_refused_with_the_known_ones(file: Path, setting: str) -> None:
    damaged = rewrite(file, metadata={f"fusedid.{setting}": "later"})
    refused(damaged, rf"adapter setting {setting} is 'later'; known: \w+, .*Update FusedID, or get the file again")


@pytest.mark.parametrize("text", ["-1", "1.5", "", "x", "9" * 5000, "٣", " 5", "1e3"])
@pytest.mark.parametrize("setting", ["reference_size", "samples_seen"])
def test_a_number_that_is_none_is_refused(file: Path, setting: str, text: str) -> None:
    refused(rewrite(file, metadata={f"fusedid.{setting}": text}), f"fusedid.{setting} is .*expected a whole number")


def test_a_reference_smaller_than_a_latent_pixel_is_refused(file: Path) -> None:
    refused(rewrite(file, metadata={"fusedid.reference_size": "7"}), "reference_size is 7; at least 8 px")


# An adapter against the model's sites


def fits(adapter: Any, sites: Any) -> None:
    check_adapter_fits(adapter, sites, name="face.safetensors")


@pytest.mark.parametrize(
    ("base", "sites", "message"),
    [
        ("sdxl", SITES, r"for Stable Diffusion XL, but the model is Stable Diffusion 1\.x"),
        ("sd15", SDXL_SITES, r"for Stable Diffusion 1\.x, but the model is Stable Diffusion XL"),
        ("sd15", [replace(s, context=1024) for s in SITES], r"for Stable Diffusion 1\.x, but .* Stable Diffusion 2\.x"),
        ("sd20", SITES, r"for Stable Diffusion 2\.x, but the model is Stable Diffusion 1\.x"),
    ],
)
def test_another_base_is_refused_by_both_names(file: Path, base: str, sites: Any, message: str) -> None:
    adapter = load_adapter(rewrite(file, metadata={"fusedid.base": base}))
    with pytest.raises(ValueError, match=rf"^face\.safetensors is an adapter {message}\. Use an adapter trained for"):
        fits(adapter, sites)


@pytest.mark.parametrize("number", [1, 5])
def test_missing_layers_are_refused(tmp_path: Path, number: int) -> None:
    adapter = load_adapter(write_adapter(tmp_path / "x.safetensors", SITES[number:]))
    more = r" and 2 more" if number == 5 else ""
    paths = ", ".join(sorted(site.path for site in SITES[:number])[:3])
    with pytest.raises(
        ValueError, match=rf"the model has 16 .*, the adapter {16 - number}; missing: {paths}{more}\. Use"
    ):
        fits(adapter, SITES)


def test_extra_layers_are_refused(file: Path) -> None:
    custom = load_adapter(rewrite(file, metadata={"fusedid.base": "custom"}))
    message = rf"model has 15 .*, the adapter 16; too many: {SITES[-1].path}\. Use an adapter"
    with pytest.raises(ValueError, match=message):
        fits(custom, SITES[:-1])


def test_another_layer_in_one_s_place_is_refused(file: Path) -> None:
    moved = [*SITES[:-1], replace(SITES[-1], path="output_blocks.2.1.transformer_blocks.0")]
    with pytest.raises(ValueError, match=r"missing: output_blocks\.2.*; too many: output_blocks\.11"):
        fits(load_adapter(file), moved)


@pytest.mark.parametrize(("name", "label"), [(KEY, "keys"), (VALUE, "values")])
@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (16, 16)], ids=str)
def test_a_wrong_width_is_refused(file: Path, name: str, label: str, shape: tuple[int, int]) -> None:
    adapter = load_adapter(rewrite(file, tensors={name: torch.ones(shape)}))
    message = rf"layer {SITES[0].path} has {label} weights of shape \[{shape[0]}, {shape[1]}\], .* needs \[8, 8\]\. Use"
    with pytest.raises(ValueError, match=message):
        fits(adapter, SITES)


def test_a_custom_base_is_judged_by_its_layers(file: Path) -> None:
    fits(load_adapter(rewrite(file, metadata={"fusedid.base": "custom"})), SITES)
    small = load_adapter(write_adapter(file, SITES[:4], settings=AdapterSettings(base="custom")))
    fits(small, SITES[:4])

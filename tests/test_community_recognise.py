"""Community files are told apart by tensor names and shapes, and strangers are refused with what they are."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import community_files as files
import pytest
import torch
from safetensors.torch import save_file

from attention.community.container import canonical, open_community
from attention.community.families import AS_RECOGNISED, EVA, VIT_BIGG, VIT_H
from attention.community.layers import check_fits, lora_state_dict, processor_order, read_layer_table
from attention.community.recognise import recognise
from attention.community.source import inspect_community, load_community
from attention.sites import SD15_SITES, SDXL_SITES, ldm_to_diffusers

PUBLISHED = [
    ("standard", "sd15", "ip-adapter", VIT_H, 4),
    ("standard", "sdxl", "ip-adapter", VIT_H, 4),
    ("plus", "sd15", "ip-adapter-plus", VIT_H, 16),
    ("plus", "sdxl", "ip-adapter-plus", VIT_H, 16),
    ("full-face", "sd15", "ip-adapter-full-face", VIT_H, 0),
    ("faceid", "sd15", "faceid", "", 4),
    ("faceid", "sdxl", "faceid", "", 4),
    ("faceid-plus", "sd15", "faceid-plus", VIT_H, 4),
    ("faceid-plus", "sdxl", "faceid-plus", VIT_H, 4),
    ("portrait", "sd15", "faceid-portrait", "", 16),
    ("portrait", "sdxl", "faceid-portrait", "", 16),
    ("instantid", "sdxl", "instantid", "", 16),
    ("pulid-v1", "sdxl", "pulid-v1", EVA, 10),
    ("pulid-v1.1", "sdxl", "pulid-v1.1", EVA, 32),
]


@pytest.mark.parametrize(("family", "base", "expected", "clip", "tokens"), PUBLISHED)
def test_every_published_file_is_recognised_by_its_shapes(
    family: str, base: str, expected: str, clip: str, tokens: int
) -> None:
    found = recognise(files.file_shapes(family, base), name="renamed.bin")
    assert (found.family.name, found.layers.base, found.clip_model, found.num_tokens) == (expected, base, clip, tokens)
    assert found.has_lora == (family in ("faceid", "faceid-plus"))
    assert found.embedding_width == (512 if found.family.encoder else 0)


def test_clip_models_are_told_apart_by_width() -> None:
    shapes = files.file_shapes("standard", "sdxl") | {"image_proj.proj.weight": (8192, 1280)}
    assert recognise(shapes, name="x").clip_model == VIT_BIGG


def test_pulid_names_mean_the_same_as_ip_adapter_names() -> None:
    ours = "ip_adapter.121.to_k_ip.weight"
    assert canonical("id_adapter_attn_layers.121.id_to_k.weight") == ours == canonical(ours)
    assert canonical("id_adapter.mapping_0.0.weight") == "image_proj.mapping_0.0.weight"


STRANGERS = [
    ({"id_encoder.visual_projection_2.weight": (2048, 1024), "lora_weights.a": (1,)}, "PhotoMaker"),
    ({"pulid_encoder.latents": (1, 32, 1024), "pulid_ca.0.to_q.weight": (2048, 3072)}, "PuLID for FLUX"),
    ({"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": (3072, 4096)}, "FLUX"),
    ({"FacialEncoder.a": (1,), "adapter_modules.1.to_k_ip.weight": (320, 768)}, "ConsistentID"),
    ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}, "a LoRA"),
    ({"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a whole checkpoint"),
    ({"reference_adapter.0.ref_net.weight": (3, 3)}, "ai-toolkit"),
    ({"whatever": (1,)}, "no file of a known family"),
]


@pytest.mark.parametrize(("shapes", "what"), STRANGERS)
def test_strangers_are_refused_with_what_they_are(shapes: dict[str, tuple[int, ...]], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        recognise({canonical(name): shape for name, shape in shapes.items()}, name="file.safetensors")


def test_transformer_adapters_are_refused_by_their_even_numbers() -> None:
    shapes = files.file_shapes("plus", "sdxl") | {"ip_adapter.0.to_k_ip.weight": (3072, 2048)}
    with pytest.raises(ValueError, match="FLUX, SD3"):
        recognise(shapes, name="x")


def test_kolors_files_are_refused() -> None:
    shapes = files.file_shapes("plus", "sdxl") | {"image_proj.latents": (1, 16, 2048)}
    with pytest.raises(ValueError, match="Kolors"):
        recognise(shapes, name="x")


@pytest.mark.parametrize("dropped", ["ip_adapter.", "image_proj."])
def test_half_a_file_is_refused(dropped: str) -> None:
    shapes = {name: s for name, s in files.file_shapes("plus", "sd15").items() if not name.startswith(dropped)}
    with pytest.raises(ValueError, match="half of it is missing"):
        recognise(shapes, name="x")


def test_a_missing_layer_or_half_a_layer_is_refused() -> None:
    whole = files.file_shapes("standard", "sd15")
    gap = {name: s for name, s in whole.items() if not name.startswith("ip_adapter.15.")}
    with pytest.raises(ValueError, match="lacks layer 15"):
        recognise(gap, name="x")
    no_value = {name: s for name, s in whole.items() if name != "ip_adapter.15.to_v_ip.weight"}
    with pytest.raises(ValueError, match="layer 15 lacks keys or values"):
        recognise(no_value, name="x")


def test_a_file_with_the_first_half_of_its_layers_never_fits_a_model() -> None:
    table = read_layer_table(files.file_shapes("standard", "sd15", widths=files.WIDTHS["sd15"][:8]), name="x")
    with pytest.raises(ValueError, match="8 of the model's 16 layers"):
        check_fits(table, SD15_SITES, name="x")


@pytest.mark.parametrize(("base", "sites"), [("sdxl", SD15_SITES), ("sd15", SDXL_SITES)])
def test_a_file_for_the_other_base_model_is_refused_by_name(base: str, sites: tuple) -> None:
    table = read_layer_table(files.file_shapes("faceid", base), name="faceid.bin")
    with pytest.raises(ValueError, match=r"faceid\.bin is for Stable Diffusion"):
        check_fits(table, sites, name="faceid.bin")


@pytest.mark.parametrize("sites", [SD15_SITES, SDXL_SITES])
def test_processor_order_is_down_up_middle(sites: tuple) -> None:
    paths = [ldm_to_diffusers(site.path) for site in processor_order(sites)]
    places = [path.split(".")[0] for path in paths]
    assert places == sorted(places, key=["down_blocks", "up_blocks", "mid_block"].index)
    widths = [site.channels for site in processor_order(sites)]
    assert widths == files.WIDTHS["sd15" if len(sites) == 16 else "sdxl"]


def test_processor_order_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 64), attention_head_dim=8, norm_num_groups=8, cross_attention_dim=16
    )
    names = [name.removesuffix(".attn2.processor") for name in unet.attn_processors if ".attn2." in name]
    assert names == [ldm_to_diffusers(site.path) for site in processor_order(SD15_SITES)]


def test_the_lora_part_goes_to_the_projections_its_numbers_mean() -> None:
    tensors = files.random_tensors(
        {f"ip_adapter.{k}": s for k, s in files.lora_shapes(files.WIDTHS["sd15"], 768, rank=1).items()}
    )
    lora = lora_state_dict(tensors, SD15_SITES)
    assert len(lora) == 16 * 2 * 4 * 2
    place = "diffusion_model.middle_block.1.transformer_blocks.0"
    assert lora[f"{place}.attn1.to_out.0.lora_up.weight"] is tensors["ip_adapter.30.to_out_lora.up.weight"]
    assert lora[f"{place}.attn2.to_k.lora_down.weight"] is tensors["ip_adapter.31.to_k_lora.down.weight"]


@pytest.fixture
def standard_tensors() -> dict[str, torch.Tensor]:
    return files.random_tensors(files.file_shapes("standard", "sd15"), dtype=torch.float16)


def test_bin_and_safetensors_hold_the_same(tmp_path: Path, standard_tensors: dict[str, torch.Tensor]) -> None:
    torch.save(files.nested(standard_tensors), tmp_path / "a.bin")
    save_file(standard_tensors, tmp_path / "a.safetensors")
    one, other = (load_community(tmp_path / name) for name in ("a.bin", "a.safetensors"))
    assert one.recognised == other.recognised == inspect_community(tmp_path / "a.bin")
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_the_old_torch_format_is_read_too(tmp_path: Path, standard_tensors: dict[str, torch.Tensor]) -> None:
    torch.save(files.nested(standard_tensors), tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    assert inspect_community(tmp_path / "a.bin").family.name == "ip-adapter"


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_payload_does_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "was_run"
    torch.save({"image_proj": _Payload(marker)}, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="refused: it holds Python objects"):
        open_community(tmp_path / "a.bin")
    assert not marker.exists()
    (tmp_path / "b.bin").write_bytes(pickle.dumps(_Payload(marker)))
    with pytest.raises(ValueError, match=r"b\.bin"):
        open_community(tmp_path / "b.bin")
    assert not marker.exists()


def _truncated() -> bytes:
    buffer = io.BytesIO()
    torch.save({"image_proj": {"proj.weight": torch.zeros(8, 8)}}, buffer)
    return buffer.getvalue()[:-200]


@pytest.mark.parametrize("content", [b"", b"not a torch file", b"PK\x03\x04broken", _truncated()])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_damaged_files_are_value_errors_that_name_the_file(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        open_community(path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), {"a": {"b": {"c": {"d": {"e": torch.zeros(1)}}}}}])
def test_torch_files_of_another_make_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.bin")
    with pytest.raises(ValueError, match=r"odd\.bin .*no adapter"):
        open_community(tmp_path / "odd.bin")


def test_missing_files_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        open_community(tmp_path / "gone.bin")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="unknown format"):
        open_community(tmp_path / "a.zip")


def test_nan_weights_are_refused(tmp_path: Path, standard_tensors: dict[str, torch.Tensor]) -> None:
    standard_tensors["image_proj.norm.bias"][0] = float("nan")
    save_file(standard_tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        load_community(tmp_path / "a.safetensors")


def test_a_stated_variant_applies_only_to_files_with_its_tensors(
    tmp_path: Path, standard_tensors: dict[str, torch.Tensor]
) -> None:
    save_file(standard_tensors, tmp_path / "a.safetensors")
    assert load_community(tmp_path / "a.safetensors", variant=AS_RECOGNISED).family.name == "ip-adapter"
    with pytest.raises(ValueError, match="cannot be used as FaceID-PlusV2"):
        load_community(tmp_path / "a.safetensors", variant="FaceID-PlusV2")
    with pytest.raises(ValueError, match="unknown variant"):
        load_community(tmp_path / "a.safetensors", variant="V3")

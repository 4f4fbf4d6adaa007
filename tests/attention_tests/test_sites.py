"""The site tables against the real UNets of ComfyUI and diffusers, full size, on the meta device (no memory)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_layouts import UNetLayout, unet_shapes
from torch import nn

from attention.grid import grid_at_level
from attention.sites import (
    FAMILIES,
    LAYER_GROUPS,
    SD15_SITES,
    SDXL_SITES,
    Site,
    diffusers_to_ldm,
    discover_sites,
    family_of,
    layer_groups,
    ldm_to_diffusers,
    native_size,
    patch_key,
)

TABLES = {"sd15": SD15_SITES, "sdxl": SDXL_SITES}
SD15_LAYOUT = UNetLayout(
    widths=(320, 640, 1280, 1280),
    res_blocks=2,
    depth_in=(1,) * 6 + (0, 0),
    depth_middle=1,
    depth_out=(0,) * 3 + (1,) * 9,
)
SDXL_LAYOUT = UNetLayout(
    widths=(320, 640, 1280),
    res_blocks=2,
    depth_in=(0, 0, 2, 2, 10, 10),
    depth_middle=10,
    depth_out=(10,) * 3 + (2,) * 3 + (0,) * 3,
    context_dim=2048,
    adm_dim=2816,
)
LAYOUTS = {"sd15": SD15_LAYOUT, "sdxl": SDXL_LAYOUT, "sd20": replace(SD15_LAYOUT, context_dim=1024)}
# unet/config.json of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0
DIFFUSERS_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.fixture(scope="module")
def host_unet(comfyui: Any) -> Callable[[str], nn.Module]:
    """The host's own UNet of a family, as its detection builds it from the weights' names and shapes."""
    import comfy.model_detection

    def build(family: str) -> nn.Module:
        shapes = unet_shapes(LAYOUTS[family])
        # Norms and biases are real: the host looks at one's values to tell SD2's two kinds of prediction apart.
        weights = {n: torch.zeros(shape, device="cpu" if len(shape) == 1 else "meta") for n, shape in shapes.items()}
        config = comfy.model_detection.model_config_from_unet(weights, "")
        unet = config.get_model(weights, "", device="meta").diffusion_model
        assert {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()} == shapes
        return unet

    return functools.cache(build)


def diffusers_unet(family: str) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**DIFFUSERS_CONFIGS[family])


def blocks_of(unet: nn.Module) -> dict[str, Any]:
    """Transformer blocks with cross-attention by module name."""
    return {name: block for name, block in unet.named_modules() if getattr(block, "attn2", None) is not None}


def forward(unet: nn.Module, family: str, latent_hw: tuple[int, int], options: dict[str, Any]) -> None:
    """A call of the host's UNet as the host makes it, shapes only."""
    layout = LAYOUTS[family]
    options = {**options, "optimized_attention_override": lambda _, q, *rest, **how: q}  # a kernel would ask for memory
    with torch.device("meta"):
        y = None if layout.adm_dim is None else torch.empty(1, layout.adm_dim)
        x, t, context = torch.empty(1, 4, *latent_hw), torch.empty(1), torch.empty(1, 77, layout.context_dim)
        unet(x, t, context=context, y=y, transformer_options=options)


def tokens_per_block(unet: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Hidden tokens that reach each block's attn2 in a forward pass."""
    seen: dict[str, int] = {}

    def note(name: str) -> Callable[[Any, Any], None]:
        return lambda _, inputs: seen.update({name: inputs[0].shape[1]})

    hooks = [block.attn2.register_forward_pre_hook(note(name)) for name, block in blocks_of(unet).items()]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("family", "number"), [("sd15", 16), ("sdxl", 70)])
def test_tables_are_what_the_host_s_unet_has(family: str, number: int, host_unet: Callable[[str], nn.Module]) -> None:
    unet = host_unet(family)
    assert len(TABLES[family]) == number
    assert discover_sites(unet) == TABLES[family]
    assert {site.path for site in TABLES[family]} == set(blocks_of(unet))


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("latent", [(64, 64), (45, 128)], ids=str)
def test_levels_give_the_tokens_of_a_real_forward_pass(
    family: str, latent: tuple[int, int], host_unet: Callable[[str], nn.Module]
) -> None:
    unet = host_unet(family)
    seen = tokens_per_block(unet, lambda: forward(unet, family, latent, {}))
    assert seen == {site.path: math.prod(grid_at_level(latent, site.level)) for site in TABLES[family]}


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_host_s_unet_is_of_its_family(family: str, host_unet: Callable[[str], nn.Module]) -> None:
    sites = discover_sites(host_unet(family))
    assert family_of(sites) == family
    known = next(entry for entry in FAMILIES if entry.name == family)
    assert len(sites) == known.num_sites and {site.context for site in sites} == {known.context}


@pytest.mark.parametrize("family", TABLES)
def test_the_keys_are_the_ones_the_host_looks_up(family: str, host_unet: Callable[[str], nn.Module]) -> None:
    """A forward pass of the host says itself where it is: `block` and `block_index` at every attn2."""
    unet = host_unet(family)
    told: list[tuple[str, int, int]] = []

    def note(n: Any, context: Any, value: Any, options: dict[str, Any]) -> Any:
        told.append((*options["block"], options["block_index"]))
        return n, context, value

    forward(unet, family, (8, 8), {"patches": {"attn2_patch": [note]}})
    assert told == [site.key for site in TABLES[family]]
    assert ("middle", 0, 0) in told and not any(key[:2] == ("middle", 1) for key in told)


@pytest.mark.parametrize("family", TABLES)
def test_names_are_the_diffusers_module_names_and_back(family: str) -> None:
    blocks = blocks_of(diffusers_unet(family))
    names = {ldm_to_diffusers(site.path): site for site in TABLES[family]}
    assert set(names) == set(blocks)
    assert [diffusers_to_ldm(name) for name in names] == [site.path for site in TABLES[family]]
    for name, site in names.items():
        attn2 = blocks[name].attn2
        assert tuple(attn2.to_k.weight.shape) == (site.channels, site.context) and attn2.heads == site.heads


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_names_go_there_and_back_for_other_depths(layers: int) -> None:
    for path in ("input_blocks.1.1", f"input_blocks.{layers + 2}.1", "middle_block.1", "output_blocks.0.1"):
        block = f"{path}.transformer_blocks.3"
        assert diffusers_to_ldm(ldm_to_diffusers(block, layers), layers) == block
    assert ldm_to_diffusers(f"input_blocks.{layers + 2}.1.transformer_blocks.0", layers).startswith("down_blocks.1.")


@pytest.mark.parametrize("path", ["input_blocks.1.1", "down_blocks.0.attentions.0.transformer_blocks.0", "", "x" * 99])
def test_other_names_are_no_ldm_path(path: str) -> None:
    with pytest.raises(ValueError, match=r"is not the LDM path of a transformer block"):
        patch_key(path)
    with pytest.raises(ValueError, match=r"is not the LDM path of a transformer block"):
        ldm_to_diffusers(path)


@pytest.mark.parametrize("path", ["mid_block.resnets.0", "input_blocks.1.1.transformer_blocks.0", ""])
def test_other_names_are_no_diffusers_path(path: str) -> None:
    with pytest.raises(ValueError, match=r"is not the diffusers path of a transformer block"):
        diffusers_to_ldm(path)


def test_the_middle_block_s_key_is_zero_although_its_path_says_one() -> None:
    assert patch_key("middle_block.1.transformer_blocks.7") == ("middle", 0, 7)
    assert patch_key("input_blocks.11.1.transformer_blocks.0") == ("input", 11, 0)
    assert patch_key("output_blocks.0.1.transformer_blocks.9") == ("output", 0, 9)


@pytest.mark.parametrize("family", TABLES)
def test_layer_groups(family: str) -> None:
    sites = TABLES[family]
    groups = layer_groups(sites)
    assert tuple(groups) == LAYER_GROUPS
    every = {site.path for site in sites}
    assert groups["all"] == every
    assert groups["down"] | groups["middle"] | groups["up"] == groups["coarse"] | groups["fine"] == every
    sizes = {name: len(group) for name, group in groups.items()}
    expected = {
        "sd15": {"all": 16, "down": 6, "middle": 1, "up": 9, "coarse": 6, "fine": 10},
        "sdxl": {"all": 70, "down": 24, "middle": 10, "up": 36, "coarse": 60, "fine": 10},
    }
    assert sizes == expected[family]
    assert {site.level for site in sites if site.path in groups["fine"]} == ({0, 1} if family == "sd15" else {1})


def test_other_unets_have_no_family_and_no_sites() -> None:
    assert family_of(SD15_SITES[:-1]) == family_of([]) == "custom"
    assert family_of(replace(site, context=1280) for site in SD15_SITES) == "custom"
    assert layer_groups([])["coarse"] == frozenset()
    assert discover_sites(nn.TransformerEncoderLayer(8, 2, device="meta")) == ()


def test_a_block_without_cross_attention_is_no_site() -> None:
    class Block(nn.Module):
        def __init__(self, attn2: nn.Module | None) -> None:
            super().__init__()
            self.attn2 = attn2

    class Attention(nn.Module):
        heads = 4

        def __init__(self) -> None:
            super().__init__()
            self.to_k = nn.Linear(48, 32, device="meta")

    unet = nn.Module()
    transformer = nn.Module()
    transformer.transformer_blocks = nn.ModuleList([Block(Attention()), Block(None)])
    unet.input_blocks = nn.ModuleList([nn.Identity(), nn.ModuleList([nn.Identity(), transformer])])
    assert discover_sites(unet) == (Site("input_blocks.1.1.transformer_blocks.0", 32, 4, 48, 0),)


@pytest.mark.parametrize(
    ("sites", "size"),
    [
        (SD15_SITES, 512),
        (SDXL_SITES, 1024),
        (SDXL_SITES[:36], 1024),  # SSD-1B keeps about half of the blocks
        (SD15_SITES[:4], 512),
        ((), 512),
    ],
)
def test_pruned_models_are_as_large_as_their_family(sites, size):
    assert native_size(sites) == size

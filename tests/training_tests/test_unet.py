"""training/unet.py: diffusers' UNet with the fused attention of attention/."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from attention.adapter import AdapterSettings, load_adapter, save_adapter
from attention.fusion import FaceControls
from attention.sites import SD15_SITES, SDXL_SITES
from training.unet import FusedUNet, Reference, TextContext
from training.unet_sites import unet_sites

SETTINGS = AdapterSettings(base="custom", reference_size=64)


def context(rows: int, kind: str = "sd15", seed: int = 0) -> TextContext:
    generator = torch.Generator().manual_seed(seed)
    width = tiny_models.CONTEXT * (2 if kind == "sdxl" else 1)
    tokens = torch.randn(rows, 7, width, generator=generator)
    if kind == "sd15":
        return TextContext(tokens)
    pooled = torch.randn(rows, tiny_models.CONTEXT, generator=generator)
    return TextContext(tokens, pooled, torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(rows, -1))


def latents(rows: int, seed: int = 1, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(seed))


def fused(kind: str = "sd15", settings: AdapterSettings = SETTINGS) -> FusedUNet:
    return FusedUNet(tiny_models.tiny_unet(kind), settings).eval()


def reference(seed: int = 5, identity: int = 0, kind: str = "sd15", rows: int = 1, weight: float = 1.0) -> Reference:
    return Reference(latents(rows, seed), context(1, kind, seed=9), identity=identity, weight=weight)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_without_reference_or_at_strength_zero_the_unet_is_untouched_bit_for_bit(kind):
    x, t, c = latents(2), torch.tensor([10, 500]), context(2, kind)
    plain = tiny_models.tiny_unet(kind)
    expected = plain(x, t, c.tokens, added_cond_kwargs=c.added()).sample
    model = fused(kind)
    assert torch.equal(model(x, t, c), expected)
    off = model(x, t, c, [reference(kind=kind)], controls=FaceControls(strength=0.0))
    assert torch.equal(off, expected)
    assert torch.equal(model(x, t, c, [reference(kind=kind)], rows=torch.tensor([], dtype=torch.long)), expected)
    assert not torch.allclose(model(x, t, c, [reference(kind=kind)]), expected, atol=1e-4)


def test_the_projections_start_from_the_own_self_attention_of_every_site():
    model = fused()
    projections = model.export_projections()
    for entry in model.site_table:
        block = model.unet.get_submodule(entry.name)
        assert torch.equal(projections[entry.path].key, block.attn1.to_k.weight)
        assert torch.equal(projections[entry.path].value, block.attn1.to_v.weight)
    assert len(projections) == 4


def test_only_to_k_face_and_to_v_face_learn():
    model = fused()
    names = [name for name, _ in model.trainable()]
    assert len(names) == 2 * len(model.site_table)
    assert all(name.endswith((".to_k_face.weight", ".to_v_face.weight")) for name in names)
    assert not any(weight.requires_grad for weight in model.unet.parameters())


def test_the_reference_pass_keeps_no_gradient_memory():
    model = fused().train()
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.reference_hidden(reference())
    assert kept == []
    assert all(not h.requires_grad and h.grad_fn is None for h in hidden.values())


def test_every_trained_weight_gets_a_gradient_and_no_frozen_one():
    model = fused().train()
    model(latents(2), torch.tensor([10, 500]), context(2), [reference(rows=2)]).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for _, weight in model.trainable())
    assert all(weight.grad is None for weight in model.unet.parameters())


def test_a_batch_without_faces_still_has_every_trained_weight_in_its_graph():
    model = fused().train()
    none = torch.tensor([], dtype=torch.long)
    model(latents(2), torch.tensor([10, 500]), context(2), [reference(rows=2)], rows=none).sum().backward()
    assert all(weight.grad is not None and bool((weight.grad == 0).all()) for _, weight in model.trainable())


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = fused().train()
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        model(latents(2), torch.tensor([10, 500]), context(2), [reference(rows=2)]).square().mean().backward()
        grads.append({name: weight.grad for name, weight in model.trainable()})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-7), name


@pytest.mark.slow
def test_sites_that_are_alike_share_their_compiled_code():
    """torch compiles a block eight times by default and then goes on uncompiled, without an error: here that is one."""
    from training.compiled import compile_blocks

    torch._dynamo.reset()
    model = FusedUNet(tiny_models.tiny_unet("sdxl", widths=(32, 32)), SETTINGS).train()
    inputs = latents(2), torch.tensor([10, 500]), context(2, "sdxl"), [reference(kind="sdxl")]
    expected = model(*inputs)
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        compiled.append(graph)
        return graph.forward

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compile_blocks(model.unet, backend=backend)
        assert torch.allclose(model(*inputs), expected, atol=1e-5)
    assert 0 < len(compiled) < 2 * len(model.sites)


def test_rows_without_a_face_are_as_if_alone():
    model = fused()
    x, t, c = latents(3), torch.tensor([10, 500, 900]), context(3)
    mixed = model(x, t, c, [reference(rows=2)], rows=torch.tensor([0, 2]))
    assert torch.allclose(mixed[1:2], model(x[1:2], t[1:2], TextContext(c.tokens[1:2])), atol=1e-5)
    face_of_row_2 = Reference(latents(2, seed=5)[1:], context(1, seed=9))
    assert torch.allclose(mixed[2:], model(x[2:], t[2:], TextContext(c.tokens[2:]), [face_of_row_2]), atol=1e-5)


def test_the_order_of_references_does_not_matter():
    model = fused()
    x, t, c = latents(1), torch.tensor([300]), context(1)
    one = model(x, t, c, [reference(5), reference(6)])
    two = model(x, t, c, [reference(6), reference(5)])
    assert torch.allclose(one, two, atol=1e-5)


def test_balanced_length_keeps_the_share_of_a_repeated_reference():
    model = fused()
    x, t, c = latents(1), torch.tensor([300]), context(1)
    once = model(x, t, c, [reference(5)])
    assert torch.allclose(model(x, t, c, [reference(5)] * 3), once, atol=1e-5)


def test_a_reference_weight_scales_its_share():
    model = fused()
    x, t, c = latents(1), torch.tensor([300]), context(1)
    light = model(x, t, c, [reference(5, weight=0.25)])
    strength = model(x, t, c, [reference(5)], controls=FaceControls(strength=0.25))
    assert torch.allclose(light, strength, atol=1e-5)


def test_odd_sizes_route_to_every_site():
    model = fused()
    masks = torch.zeros(2, 88, 120)
    masks[0, :, :40], masks[1, :, 80:] = 1, 1
    size = (11, 15)
    regions = model.regions(masks, size)
    for entry in model.site_table:
        h, w = entry.grid(size)
        assert sum(len(r.queries) for r in regions[entry.path]) == h * w
    out = model(
        latents(1, size=size),
        torch.tensor([300]),
        context(1),
        [reference(5), reference(6, identity=1)],
        regions=regions,
    )
    assert out.shape == (1, 4, *size)


def test_an_adapter_file_goes_round_and_a_foreign_one_is_refused(tmp_path):
    model = fused()
    for _, weight in model.trainable():
        weight.data.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    save_adapter(tmp_path / "a.safetensors", model.export_projections(), model.settings, dtype=torch.float32)
    other = fused()
    other.load_adapter(load_adapter(tmp_path / "a.safetensors"), name="a.safetensors")
    for (_, ours), (_, theirs) in zip(model.trainable(), other.trainable()):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"a\.safetensors does not fit this model"):
        fused("sdxl").load_adapter(load_adapter(tmp_path / "a.safetensors"), name="a.safetensors")


@pytest.mark.parametrize(("kind", "expected"), [("sd15", SD15_SITES), ("sdxl", SDXL_SITES)])
def test_site_names_of_the_real_layouts(kind, expected):
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    sd15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
    sdxl = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    }
    with init_empty_weights():
        unet = UNet2DConditionModel(**(sd15 if kind == "sd15" else sdxl))
    entries = unet_sites(unet)
    assert tuple(entry.site for entry in entries) == expected


def test_a_unet_without_cross_attention_or_with_uneven_blocks_is_refused():
    from diffusers import UNet2DConditionModel

    with pytest.raises(ValueError, match="no cross-attention"):
        unet_sites(
            UNet2DConditionModel(
                block_out_channels=(32,),
                down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",),
                mid_block_type=None,
                cross_attention_dim=8,
            )
        )
    uneven = UNet2DConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=(1, 2),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    with pytest.raises(ValueError, match="layers per block"):
        unet_sites(uneven)

"""Rows of the matrix that need other people's packs. Only their nodes are called, and functions where a node would need
files that nobody may ship."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import fusion_lab
import peer_packs
import torch
from peer_matrix import LATENT, Graph, Install, Kit, Predictions, Row
from peer_rows_host import NO_GUIDANCE, ONE_PERSON, blurred, node_on_model, perturbed
from torch import Tensor

IPADAPTER, INSTANTID, PULID = "ComfyUI_IPAdapter_plus", "ComfyUI_InstantID", "PuLID_ComfyUI"
COUPLE, PPM, PROMPTS = "cgem156-ComfyUI", "ComfyUI-ppm", "comfyui-prompt-control"
A8R8, COMFY_COUPLE, DENSE = "A8R8_ComfyUI_nodes", "ComfyUI-ComfyCouple", "ComfyUI_densediffusion"
CONTROLNET, ANIMATEDIFF = "ComfyUI-Advanced-ControlNet", "ComfyUI-AnimateDiff-Evolved"
PERTURBED, KJ, TILED = "sd-perturbed-attention", "ComfyUI-KJNodes", "ComfyUI-TiledDiffusion"
SKIMMED, ALIGNED = "Skimmed_CFG", "style_aligned_comfy"
REGION = 1  # seed of another region's text


def module_of(kit: Kit, pack: str, name: str) -> Any:
    """A module of a loaded pack."""
    return sys.modules[f"{peer_packs.load_peer(kit.host, pack).__name__}.{name}"]


# Adapters that speak the `add` protocol

PATCHES = {
    IPADAPTER: ("IPAdapterPlus", "set_model_patch_replace", "ipadapter"),
    INSTANTID: ("InstantID", "_set_model_patch_replace", "ipadapter"),
    PULID: ("pulid", "set_model_patch_replace", "pulid"),
}


def adapter(pack: str, name: str, thorough: bool = False, **options: Any) -> Row:
    """An adapter of theirs with random weights in every layer, through their own patch function."""

    def install(kit: Kit, graph: Graph) -> Graph:
        file, function, holder = PATCHES[pack]
        patch = getattr(module_of(kit, pack, file), function)
        sites = kit.lab.sites
        layers = kit.kept("their layers", lambda: peer_packs.PeerLayers(320, 768, range(1, 2 * len(sites), 2)))
        model = graph.model.clone()
        given = {
            "weight": 0.8, "cond": peer_packs.peer_tokens(1, 768), "uncond": peer_packs.peer_tokens(2, 768),
            "mask": None, "sigma_start": 1e9, "sigma_end": 0.0, **options, holder: layers,
        }  # fmt: skip
        for number, site in enumerate(sites):
            # IPAdapter_plus names SD1.5 layers by two parts, the others by three.
            place = site.key[:2] if pack == IPADAPTER else site.key
            patch(model, {**given, "module_key": str(2 * number + 1)}, place)
        return graph.having(model=model)

    return Row(name, install, "adds", pack=pack, thorough=thorough)


def _mask() -> Tensor:
    return fusion_lab.halves(8 * LATENT[0], 8 * LATENT[1])[0][None]


# Attention couple


def _bands(kit: Kit, graph: Graph, num: int) -> list[Tensor]:
    """Horizontal bands as masks `[1, H, W]`."""
    height, width = (8 * n for n in graph.hw)
    rows = torch.arange(height) * num // height
    return [(rows == i).float()[None, :, None].expand(1, height, width).contiguous() for i in range(num)]


def in_bands(num: int) -> Callable[[Kit, Predictions], dict[tuple[str, str], Tensor]]:
    """The first layer by hand: in band r of the picture, the layer that the text of region r gives alone."""

    def value(kit: Kit, alone: Predictions) -> dict[tuple[str, str], Tensor]:
        prompts = [alone.base.positive, *(kit.text(REGION + i) for i in range(1, num))]
        seen = [alone.layers(prompt) for prompt in prompts]
        tokens = seen[0]["attn2", "positive"].shape[1]
        band = torch.arange(tokens) * num // tokens
        parts = [one["attn2", "positive"] * (band == i)[None, :, None] for i, one in enumerate(seen)]
        return {("attn2", "positive"): sum(parts), ("attn2", "negative"): seen[0]["attn2", "negative"]}

    return value


def coupled(pack: str, name: str, num: int, install: Install, **given: Any) -> Row:
    """Regions with a text each, repeated before the slot."""
    why = "every region's queries see that region's text and our people"
    return Row(name, install, "layers", pack=pack, layers=in_bands(num), why=why, **{"forms": NO_GUIDANCE, **given})


def _couple(num: int) -> Install:
    def install(kit: Kit, graph: Graph) -> Graph:
        node, masks = peer_packs.load_couple_node(kit.host)(), _bands(kit, graph, num)
        regions = {f"cond_{i}": kit.text(REGION + i) for i in range(1, num)}
        regions |= {f"mask_{i}": masks[i] for i in range(1, num)}
        return graph.having(model=node.attention_couple_simple(graph.model, masks[0], **regions)[0])

    return install


def _couple_ppm(num: int) -> Install:
    def install(kit: Kit, graph: Graph) -> Graph:
        masks = _bands(kit, graph, num)
        regions = {f"cond_{i}": kit.text(REGION + i) for i in range(1, num)}
        regions |= {f"mask_{i}": masks[i] for i in range(1, num)}
        given = {"model": graph.model, "base_cond": graph.positive, "base_mask": masks[0], **regions}
        return graph.having(model=kit.host.node("AttentionCouplePPM").execute(**given).args[0])

    return install


def _couple_prompts(num: int) -> Install:
    def install(kit: Kit, graph: Graph) -> Graph:
        couple = module_of(kit, PROMPTS, "prompt_control.attention_couple_ppm").set_cond_attnmask
        masks = _bands(kit, graph, num)

        def masked(prompt: Any, mask: Tensor) -> Any:
            return [prompt[0][0], {**prompt[0][1], "mask": mask, "mask_strength": 1.0}]

        others = [masked(kit.text(REGION + i), masks[i]) for i in range(1, num)]
        return graph.having(positive=couple([masked(graph.positive, masks[0])], others))

    return install


def _couple_a8r8(num: int) -> Install:
    """Its base prompt has a mask of zeros and a global one of the same text: two regions with the prompt's text."""

    def install(kit: Kit, graph: Graph) -> Graph:
        masks = _bands(kit, graph, num)
        regions = [{"cond": kit.text(REGION + i), "mask": masks[i], "weight": 1.0} for i in range(1, num)]
        height, width = (8 * n for n in graph.hw)
        regions.insert(0, {"cond": graph.positive, "mask": masks[0], "weight": 1.0})
        given = {"base_prompt": graph.positive, "global_prompt_weight": 1e-9, "height": height, "width": width}
        node = module_of(kit, A8R8, "attention_couple").AttentionCouple()  # ppm-like packs use the same id
        return graph.having(
            model=node.attention_couple(graph.model, regions=regions, ip_adapter_active=False, **given)[0]
        )

    return install


def _comfy_couple(kit: Kit, graph: Graph) -> Graph:
    height, width = (8 * n for n in graph.hw)
    model, positive, negative = kit.host.node("Comfy Couple")().process(
        graph.model, graph.positive, kit.text(REGION + 1), graph.negative, "vertical", 0.5, width, height
    )
    return graph.having(model=model, positive=positive, negative=negative)


def _dense(kit: Kit, graph: Graph) -> Graph:
    masks, model = _bands(kit, graph, 2), graph.model
    for prompt, mask in zip((kit.lab.positive, kit.text(REGION + 1)), masks):
        model = kit.host.node("DenseDiffusionAddCondNode")().append(model, prompt, 1.0, mask)[0]
    return graph.having(model=kit.host.node("DenseDiffusionApplyNode")().apply(model)[0])


def _dense_prompts(kit: Kit, graph: Graph) -> Graph:
    """All regions' texts one after the other, as its node gives them out."""
    texts = [prompt[0][0] for prompt in (kit.lab.positive, kit.text(REGION + 1))]
    return graph.having(positive=[[torch.cat(texts, 1), graph.positive[0][1]]], negative=kit.text(6, tokens=154))


# Reference ControlNet, motion


def _reference(kind: str) -> Install:
    def install(kit: Kit, graph: Graph) -> Graph:
        image = torch.rand(1, 8 * graph.hw[0], 8 * graph.hw[1], 3, generator=torch.Generator().manual_seed(2))
        execute = lambda node_id, **given: kit.host.node(node_id).execute(**given)  # noqa: E731
        control = execute("ACN_ReferenceControlNet", reference_type=kind, style_fidelity=0.5, ref_weight=1.0)
        size = {"samples": torch.zeros(1, 4, *graph.hw)}
        hint = execute("ACN_ReferencePreprocessor", image=image, vae=kit.lab.vae, latent_size=size)
        given = {"control_net": _first(control), "image": _first(hint), "strength": 1.0}
        out = execute(
            "ACN_AdvancedControlNetApply_v2", positive=graph.positive, negative=graph.negative, start_percent=0.0,
            end_percent=1.0, **given,
        )  # fmt: skip
        positive, negative = getattr(out, "args", out)[:2]
        return graph.having(positive=positive, negative=negative)

    return install


def _first(out: Any) -> Any:
    return getattr(out, "args", out)[0]


def _motion(windows: bool) -> Install:
    def install(kit: Kit, graph: Graph) -> Graph:
        motion = kit.kept("motion module", lambda: _motion_module(kit))
        models = kit.host.node("ADE_ApplyAnimateDiffModelSimple")().apply_motion_model(motion)[0]
        context = kit.host.node("ADE_StandardStaticContextOptions")().create_options(3, 1)[0] if windows else None
        model = kit.host.node("ADE_UseEvolvedSampling")().use_evolved_sampling(
            graph.model, "use existing", m_models=models, context_options=context
        )[0]
        return graph.having(model=model)

    return install


def _motion_module(kit: Kit) -> Any:
    """A motion module file of random weights through their loader. Theirs are as wide as the real SD1.5; ours follows
    the small model's constant width, for which their blocks are built narrower while it loads."""
    import folder_paths
    from safetensors.torch import save_file

    module = module_of(kit, ANIMATEDIFF, "animatediff.motion_module_ad")
    wide = module.MotionModule

    def narrow(_width: int, **given: Any) -> Any:
        return wide(320, **given)

    path = kit.host.base / "models" / "animatediff_models" / "peers_mm.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path("animatediff_models", str(path.parent))
    module.MotionModule = narrow
    try:
        if not path.exists():
            save_file(_motion_weights(), path)
        return kit.host.node("ADE_LoadAnimateDiffModel")().load_motion_model(path.name)[0]
    finally:
        module.MotionModule = wide


def _motion_weights() -> dict[str, Tensor]:
    from small_models import random_weights

    width, shapes = 320, {}
    for side, count in (("down_blocks", 2), ("up_blocks", 3)):
        for block in range(4):
            for number in range(count):
                name = f"{side}.{block}.motion_modules.{number}.temporal_transformer"
                inner = f"{name}.transformer_blocks.0"
                shapes |= {f"{name}.norm.{kind}": (width,) for kind in ("weight", "bias")}
                for part in ("proj_in", "proj_out"):
                    shapes |= {f"{name}.{part}.weight": (width, width), f"{name}.{part}.bias": (width,)}
                for i in (0, 1):
                    attention = f"{inner}.attention_blocks.{i}"
                    shapes |= {f"{attention}.to_{part}.weight": (width, width) for part in "qkv"}
                    shapes |= {f"{attention}.to_out.0.weight": (width, width), f"{attention}.to_out.0.bias": (width,)}
                    shapes |= {f"{attention}.pos_encoder.pe": (1, 32, width)}
                    shapes |= {f"{inner}.norms.{i}.{kind}": (width,) for kind in ("weight", "bias")}
                shapes |= {f"{inner}.ff.net.0.proj.weight": (8 * width, width), f"{inner}.ff.net.2.bias": (width,)}
                shapes |= {f"{inner}.ff.net.0.proj.bias": (8 * width,), f"{inner}.ff.net.2.weight": (width, 4 * width)}
                shapes |= {f"{inner}.ff_norm.{kind}": (width,) for kind in ("weight", "bias")}
    return {name: weight * (0.3 if "proj_out" in name else 1.0) for name, weight in random_weights(shapes).items()}


# Guidance


def _nag(kit: Kit, graph: Graph) -> Graph:
    return graph.having(
        model=kit.node("NormalizedAttentionGuidance", model=graph.model, negative=kit.text(4), scale=3.0, tau=2.5)[0]
    )


def their_guidance(pack: str, node_id: str, **given: Any) -> Row:
    """A node of a pack that changes how two predictions are guided."""
    install = node_on_model(node_id, **given)
    value = lambda kit, alone: alone.through(install(kit, kit.graph).model)  # noqa: E731
    return Row(node_id, install, "value", pack=pack, value=value, nodes=(node_id,), negative_is_theirs=False)


# Tiles


def _tiled(method: str) -> Install:
    size = {"tile_width": 32, "tile_height": 32, "tile_overlap": 0, "tile_batch_size": 4}
    return node_on_model("TiledDiffusion", method=method, **size)


def tiles_by_hand(kit: Kit, alone: Predictions) -> Tensor:
    """Two tiles without overlap: the predictions of the two halves of the latent, side by side."""
    height, width = alone.base.hw
    halves = [(0, 0, height // 2, width), (height // 2, 0, height // 2, width)]
    return torch.cat([alone.part(place).guided() for place in halves], dim=2)


def _sage(kit: Kit, graph: Graph) -> Graph:
    """KJNodes' choice of SageAttention, whose library is a stand-in that drops masks as the real one does."""
    import types

    def attention(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", **_: Any) -> Tensor:
        if tensor_layout == "NHD":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2) if tensor_layout == "NHD" else out

    library = types.ModuleType("sageattention")
    library.sageattn = attention
    sys.modules["sageattention"] = library
    try:
        return node_on_model("PathchSageAttentionKJ", sage_attention="auto")(kit, graph)
    finally:
        del sys.modules["sageattention"]


def _aligned(kit: Kit, graph: Graph) -> Graph:
    given = {"share_norm": "disabled", "share_attn": "q+k+v", "scale": 1.0}
    return node_on_model("StyleAlignedBatchAlign", **given)(kit, graph)


FULL = {"layout": "sd15_full"}
ADE_FORMS = ("fused", "community", "training-free", "routed")


def pack_rows() -> list[Row]:
    """Every row that needs a pack."""
    return [
        adapter(IPADAPTER, "linear", thorough=True),
        adapter(IPADAPTER, "ease in-out", weight_type="ease in-out"),
        adapter(IPADAPTER, "strong middle", weight_type="strong middle"),
        adapter(IPADAPTER, "style transfer", weight={0: 1.0, 2: 0.5}, weight_type="style transfer"),
        adapter(IPADAPTER, "K+mean(V)", embeds_scaling="K+mean(V) w/ C penalty"),
        adapter(IPADAPTER, "with a mask", mask=_mask()),
        adapter(INSTANTID, "patch"),
        adapter(PULID, "patch", ortho=False, ortho_v2=False),
        adapter(PULID, "patch, orthogonal", ortho=False, ortho_v2=True),
        coupled(COUPLE, "AttentionCouple, 2 regions", 2, _couple(2), thorough=True),
        coupled(COUPLE, "AttentionCouple, 4 regions", 4, _couple(4)),
        coupled(PPM, "AttentionCouplePPM, 2 regions", 2, _couple_ppm(2)),
        coupled(PPM, "AttentionCouplePPM, 4 regions", 4, _couple_ppm(4)),
        coupled(PROMPTS, "COUPLE, 2 regions", 2, _couple_prompts(2), model=False),
        coupled(PROMPTS, "COUPLE, 4 regions", 4, _couple_prompts(4), model=False),
        coupled(A8R8, "AttentionCouple, 2 regions", 2, _couple_a8r8(2)),
        Row("Comfy Couple", _comfy_couple, "adds", pack=COMFY_COUPLE, forms=NO_GUIDANCE, base={"hw": (8, 8)}, **FULL),
        Row("DenseDiffusion", _dense, "adds", pack=DENSE, prompts=_dense_prompts, forms=NO_GUIDANCE, **FULL),
        *(Row(kind, _reference(kind), "orders", pack=CONTROLNET, model=False, nodes=("ACN_ReferenceControlNet",),
              forms=("fused", "community", "training-free", "routed"), base={"hw": (8, 8)}, **FULL)
          for kind in ("reference_attn", "reference_adain", "reference_attn+adain")),
        Row("motion module", _motion(False), "orders", thorough=True, pack=ANIMATEDIFF, base={"frames": 4},
            forms=ADE_FORMS, **FULL),
        Row("motion module in windows", _motion(True), "orders", pack=ANIMATEDIFF, base={"frames": 5},
            forms=("fused", "training-free"), **FULL),
        Row("PerturbedAttention", node_on_model("PerturbedAttention", scale=2.0, unet_block="middle", unet_block_id=0),
            "value", pack=PERTURBED, value=perturbed(2.0), nodes=("PerturbedAttention",)),
        Row("SmoothedEnergyGuidanceAdvanced", node_on_model(
            "SmoothedEnergyGuidanceAdvanced", scale=2.0, blur_sigma=-1.0, unet_block="middle", unet_block_id=0),
            "value", thorough=True, pack=PERTURBED, value=perturbed(2.0, blurred),
            nodes=("SmoothedEnergyGuidanceAdvanced",)),
        Row("SlidingWindowGuidanceAdvanced", node_on_model(
            "SlidingWindowGuidanceAdvanced", scale=2.0, tile_width=16, tile_height=16, tile_overlap=0, sigma_end=-1.0),
            "orders", pack=PERTURBED, nodes=("SlidingWindowGuidanceAdvanced",), forms=ONE_PERSON),
        Row("TokenPerturbationGuidance", node_on_model("TokenPerturbationGuidance", scale=2.0, unet_block_list=""),
            "orders", pack=PERTURBED, nodes=("TokenPerturbationGuidance",), forms=ONE_PERSON, twice=False),
        Row("NormalizedAttentionGuidance", _nag, "adds", pack=PERTURBED, nodes=("NormalizedAttentionGuidance",),
            forms=NO_GUIDANCE, why="it normalises the text's attention; the face is added to what it gives"),
        Row("PLADIS", node_on_model("PLADIS", scale=2.0), "adds", thorough=True, pack=PERTURBED,
            nodes=("PLADIS",), forms=NO_GUIDANCE),
        Row("ModelAttentionSelector", node_on_model("ModelAttentionSelector", attention="sub_quad"), "same", pack=PPM),
        their_guidance(PPM, "RenormCFGPost", renorm_cfg=1.0, sigma_start=-1.0, sigma_end=-1.0),
        their_guidance(PPM, "DynamicThresholdingSimplePost", mimic_scale=2.0, threshold_percentile=0.9),
        their_guidance(PPM, "RescaleCFGPost", multiplier=0.7),
        Row("PathchSageAttentionKJ", _sage, "same", pack=KJ, nodes=("PathchSageAttentionKJ",), tolerance=5e-3,
            negative_is_theirs=False, why="its kernel runs in half precision"),
        Row("MultiDiffusion", _tiled("MultiDiffusion"), "value", thorough=True, pack=TILED, value=tiles_by_hand),
        Row("Mixture of Diffusers", _tiled("Mixture of Diffusers"), "orders", pack=TILED, forms=ONE_PERSON,
            formula=False),
        their_guidance(SKIMMED, "Skimmed CFG", Skimming_CFG=2.0, full_skim_negative=False),
        Row("StyleAlignedBatchAlign", _aligned, "orders", pack=ALIGNED, base={"frames": 2}, forms=NO_GUIDANCE),
    ]  # fmt: skip

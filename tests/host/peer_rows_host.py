"""Rows of the matrix that need no pack: the host's own nodes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import fusion_lab
import peer_standins
import torch
from peer_matrix import FORMS, PLAIN, SAID_TO_ALL, Graph, Install, Kit, Predictions, Row
from safetensors.torch import save_file
from torch import Tensor

EMPTY, MIDDLE, AREA = 9, 8, 5  # seeds of further prompts
NO_GUIDANCE = tuple(form for form in FORMS if form != "guidance")
ONE_PERSON = ("fused", "community", "training-free")


def node_on_model(node_id: str, **given: Any) -> Install:
    """A node that takes a MODEL and gives one."""
    return lambda kit, graph: graph.having(model=kit.node(node_id, model=graph.model, **given)[0])


def through(node_id: str, **given: Any) -> Row:
    """A node that changes how two predictions are guided: its own functions on the predictions of single prompts."""
    install = node_on_model(node_id, **given)
    value = lambda kit, alone: alone.through(install(kit, kit.graph).model)  # noqa: E731
    return Row(node_id, install, "value", value=value, nodes=(node_id,), negative_is_theirs=False)


def prompt_by_prompt(install: Install) -> Callable[[Kit, Predictions], Tensor]:
    """Guidance of the changed prompts, each asked alone."""

    def value(kit: Kit, alone: Predictions) -> Tensor:
        graph = install(kit, alone.base)
        cond, uncond = alone.positive(prompt=graph.positive), alone.plain(graph.negative)
        return uncond + graph.cfg * (cond - uncond)

    return value


def with_their_negative(install: Install) -> Callable[[Kit, Predictions], Tensor]:
    """The same where the host gives the negative prompt the positive one's areas or boxes: asked beside it, of a model
    without us, at guidance 0."""

    def value(kit: Kit, alone: Predictions) -> Tensor:
        graph = install(kit, alone.base)
        form = alone.form if alone.form in SAID_TO_ALL else PLAIN
        cond, uncond = alone.positive(prompt=graph.positive), kit.run(kit.ours(form, graph).having(cfg=0.0)).samples
        return uncond + graph.cfg * (cond - uncond)

    return value


def on_prompts(name: str, install: Install, **given: Any) -> Row:
    """A row that changes prompts and no MODEL."""
    forms = given.pop("forms", NO_GUIDANCE)
    return Row(name, install, "value", value=prompt_by_prompt(install), model=False, forms=forms, **given)


# Guidance with passes of its own


def _without_attention(model: Any) -> Any:
    """What perturbed attention guidance asks for: the middle block's self-attention is its values."""
    clone = model.clone()
    clone.set_model_attn1_replace(lambda q, k, v, extra: v, "middle", 0, 0)
    return clone


def perturbed(scale: float, change: Callable[[Any], Any] = _without_attention) -> Callable[[Kit, Predictions], Tensor]:
    """cfg + scale * (positive - the same positive through a changed network)."""
    return lambda kit, alone: alone.guided() + scale * (alone.positive() - alone.positive(change))


def blurred(model: Any) -> Any:
    """Smoothed energy guidance at infinite blur: every query of the middle block is their mean."""
    from comfy.ldm.modules.attention import optimized_attention

    clone = model.clone()
    clone.set_model_attn1_replace(
        lambda q, k, v, extra: optimized_attention(q.mean(1, keepdim=True).expand_as(q), k, v, extra["n_heads"]),
        "middle", 0, 0,
    )  # fmt: skip
    return clone


def _sag(kit: Kit, alone: Predictions) -> Tensor:
    """Its term is made of the negative prompt alone, so at guidance 0 nothing else is left beside that prompt."""
    form = alone.form if alone.form in SAID_TO_ALL else PLAIN
    graph = node_on_model("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0)(kit, kit.ours(form, alone.base))
    return alone.guided() + kit.run(graph.having(cfg=0.0)).samples - alone.plain(alone.base.negative)


def _perp_neg(kit: Kit, alone: Predictions) -> Tensor:
    empty = alone.plain(kit.text(EMPTY))
    positive, negative = alone.positive() - empty, alone.plain(alone.base.negative) - empty
    perpendicular = negative - (negative * positive).sum() / positive.norm() ** 2 * positive
    return empty + alone.base.cfg * (positive - perpendicular)


def _perp_neg_node(kit: Kit, graph: Graph) -> Graph:
    return node_on_model("PerpNeg", empty_conditioning=kit.text(EMPTY), neg_scale=1.0)(kit, graph)


def _perp_neg_guider(kit: Kit, graph: Graph) -> Graph:
    def guider(graph: Graph, model: Any) -> Any:
        given = {"positive": graph.positive, "negative": graph.negative, "empty_conditioning": kit.text(EMPTY)}
        return kit.node("PerpNegGuider", model=model, cfg=graph.cfg, neg_scale=1.0, **given)[0]

    return graph.having(guider=guider)


def _dual_cfg_guider(nested: bool) -> Install:
    def install(kit: Kit, graph: Graph) -> Graph:
        def guider(graph: Graph, model: Any) -> Any:
            from comfy_extras.nodes_custom_sampler import Guider_DualCFG

            dual = Guider_DualCFG(model)
            dual.set_conds(graph.positive, kit.text(MIDDLE), graph.negative)
            dual.set_cfg(graph.cfg, 2.0, nested=nested)
            return dual

        return graph.having(guider=guider)

    return install


def _dual_cfg(nested: bool) -> Callable[[Kit, Predictions], Tensor]:
    def value(kit: Kit, alone: Predictions) -> Tensor:
        positive, negative = alone.positive(), alone.plain(alone.base.negative)
        middle, cfg = alone.plain(kit.text(MIDDLE)), alone.base.cfg
        if nested:
            return negative + 2.0 * (middle + cfg * (positive - middle) - negative)
        return negative + 2.0 * (middle - negative) + cfg * (positive - middle)

    return value


def _other_model(kit: Kit) -> Any:
    return kit.kept("another model", lambda: kit.small_models.load_unet(kit.layout, seed=1))


def _dual_model_guider(same: bool) -> Install:
    def install(kit: Kit, graph: Graph) -> Graph:
        def guider(graph: Graph, model: Any) -> Any:
            given = {"positive": graph.positive, "negative": graph.negative, "cfg": graph.cfg}
            other = graph.model if same else _other_model(kit)
            return kit.node("DualModelGuider", model=model, model_negative=other, **given)[0]

        return graph.having(guider=guider)

    return install


def _dual_model(kit: Kit, alone: Predictions) -> Tensor:
    # The guider hands the first MODEL's options to the second: what we say to negative prompts is said there too.
    cond, uncond = alone.positive(), alone.on(_other_model(kit)).plain(alone.base.negative)
    return uncond + alone.base.cfg * (cond - uncond)


# Weights and prompts


def _merge(kit: Kit, graph: Graph) -> Graph:
    return graph.having(model=kit.node("ModelMergeSimple", model1=graph.model, model2=_other_model(kit), ratio=0.7)[0])


def _lora_name(kit: Kit) -> str:
    return kit.small_models.lora(kit.layout).name


def _lora(strength: float) -> Install:
    return lambda kit, graph: graph.having(
        model=kit.node("LoraLoaderModelOnly", model=graph.model, lora_name=_lora_name(kit), strength_model=strength)[0]
    )


def _hook_lora(keyframe: float | None) -> Install:
    def install(kit: Kit, graph: Graph) -> Graph:
        import comfy.hooks

        hooks = kit.node("CreateHookLora", lora_name=_lora_name(kit), strength_model=1.0, strength_clip=0.0)[0]
        if keyframe is not None:
            frames = kit.node("CreateHookKeyframe", strength_mult=keyframe, start_percent=0.0)[0]
            hooks = kit.node("SetHookKeyframes", hooks=hooks, hook_kf=frames)[0]
        return graph.having(positive=comfy.hooks.set_hooks_for_conditioning(graph.positive, hooks))

    return install


def _hook_value(strength: float) -> Callable[[Kit, Predictions], Tensor]:
    """A LoRA hooked to the positive prompt is that LoRA in the model's weights, for that prompt alone."""

    def value(kit: Kit, alone: Predictions) -> Tensor:
        load = lambda model: _lora(strength)(kit, kit.graph.having(model=model)).model  # noqa: E731
        cond, uncond = alone.positive(load), alone.plain(alone.base.negative)
        return uncond + alone.base.cfg * (cond - uncond)

    return value


def _hypernetwork(kit: Kit, graph: Graph) -> Graph:
    folder = kit.host.base / "models" / "hypernetworks"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "peers.pt"
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        layers = {
            width: [
                {
                    "linear.0.weight": torch.randn(width, width, generator=generator) / width**0.5,
                    "linear.0.bias": torch.zeros(width),
                }
                for _ in "kv"
            ]
            for width in (320, 768)
        }
        torch.save(layers, path)
    given = {"hypernetwork_name": path.name, "strength": 0.3}
    return graph.having(model=kit.node("HypernetworkLoader", model=graph.model, **given)[0])


def _masked_prompts(kit: Kit, graph: Graph) -> Graph:
    height, width = (8 * n for n in graph.hw)
    left, right = fusion_lab.halves(height, width)
    given = {"strength": 1.0, "set_cond_area": "default"}
    first = kit.node("ConditioningSetMask", conditioning=graph.positive, mask=left[None], **given)[0]
    second = kit.node("ConditioningSetMask", conditioning=kit.text(AREA), mask=right[None], **given)[0]
    return graph.having(positive=first + second)


def _area(kit: Kit, graph: Graph) -> Graph:
    given = {"width": 32, "height": 32, "x": 0, "y": 32, "strength": 1.0}
    return graph.having(
        positive=graph.positive + kit.node("ConditioningSetArea", conditioning=kit.text(AREA), **given)[0]
    )


def _longer(which: str) -> Install:
    def install(kit: Kit, graph: Graph) -> Graph:
        return graph.having(**{which: kit.text(3, tokens=154)})

    return install


def _schedule(kit: Kit, graph: Graph) -> Graph:
    given = {"start": 0.0, "end": 1.0}
    timed = kit.node("ConditioningSetTimestepRange", conditioning=kit.text(AREA), **given)[0]
    return graph.having(positive=graph.positive + timed)


def _controlnet(kit: Kit, graph: Graph) -> Graph:
    control = kit.kept(
        "controlnet",
        lambda: kit.node("ControlNetLoader", control_net_name=kit.small_models.controlnet(kit.layout).name)[0],
    )
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    positive, negative = kit.node(
        "ControlNetApplyAdvanced", positive=graph.positive, negative=graph.negative, control_net=control, image=image,
        strength=1.0, start_percent=0.0, end_percent=1.0,
    )[:2]  # fmt: skip
    return graph.having(positive=positive, negative=negative)


def _gligen(kit: Kit, graph: Graph) -> Graph:
    gligen = kit.kept("gligen", lambda: _random_gligen(kit))
    box = (torch.randn(1, 768, generator=torch.Generator().manual_seed(4)), 4, 4, 2, 2)
    placed = [[text, {**extra, "gligen": ("position", gligen, [box])}] for text, extra in graph.positive]
    return graph.having(positive=placed)


def _random_gligen(kit: Kit) -> Any:
    import comfy.sd

    shapes: dict[str, tuple[int, ...]] = {
        "position_net.null_positive_feature": (768,),
        "position_net.null_position_feature": (64,),
        "position_net.linears.0.weight": (512, 832), "position_net.linears.0.bias": (512,),
        "position_net.linears.2.weight": (512, 512), "position_net.linears.2.bias": (512,),
        "position_net.linears.4.weight": (768, 512), "position_net.linears.4.bias": (768,),
    }  # fmt: skip
    for site in kit.lab.sites:
        width, fuser = site.channels, f"{site.path}.fuser"
        shapes |= {f"{fuser}.linear.weight": (width, 768), f"{fuser}.linear.bias": (width,)}
        shapes |= {f"{fuser}.attn.to_{part}.weight": (width, width) for part in "qkv"}
        shapes |= {f"{fuser}.attn.to_out.0.weight": (width, width), f"{fuser}.attn.to_out.0.bias": (width,)}
        shapes |= {f"{fuser}.ff.net.0.proj.weight": (8 * width, width), f"{fuser}.ff.net.0.proj.bias": (8 * width,)}
        shapes |= {f"{fuser}.ff.net.2.weight": (width, 4 * width), f"{fuser}.ff.net.2.bias": (width,)}
        shapes |= {f"{fuser}.norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{fuser}.alpha_{kind}": () for kind in ("attn", "dense")}
    folder = kit.host.base / "models" / "gligen"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"peers_{kit.layout}.safetensors"
    save_file({name: _weight(name, shape) for name, shape in shapes.items()}, path)
    return comfy.sd.load_gligen(str(path))


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    if not shape:
        return torch.tensor(0.7)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator)
    return values / shape[-1] ** 0.5 if len(shape) > 1 else values * 0.1 + (1.0 if "norm" in name else 0.0)


def _override(kit: Kit, graph: Graph) -> Graph:
    return graph.having(model=peer_standins.override_attention(graph.model, []))


LONG_RUN = (6.0, 5.0, 4.5, 4.0, 0.0)
VIDEO = {"frames": 4, "hw": (4, 4), "sigmas": (5.0, 4.0, 3.0, 0.0)}  # the host compares a noise level per frame
NO_GRID = {("separation", order): "merges or tiles the tokens" for order in ("ours first", "theirs first")}
HYPERTILE = {"tile_size": 32, "swap_size": 2, "max_depth": 0, "scale_depth": False}
CACHE = {"reuse_threshold": 2.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
WINDOWS = {"context_length": 2, "context_overlap": 1, "dim": 0}


def host_rows() -> list[Row]:
    """Every row that needs no pack."""
    return [
        Row("PerturbedAttentionGuidance", node_on_model("PerturbedAttentionGuidance", scale=2.0), "value",
            thorough=True, value=perturbed(2.0), why="a layer without attention keeps what we add to it"),
        Row("SelfAttentionGuidance", node_on_model("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0), "value",
            thorough=True, value=_sag, base={"hw": (8, 8)}, why="its term is the negative prompt's: no face"),
        Row("PerpNeg", _perp_neg_node, "value", thorough=True, value=_perp_neg,
            why="neither the negative nor the empty prompt sees a face"),
        Row("PerpNegGuider", _perp_neg_guider, "value", value=_perp_neg, model=False,
            why="neither the negative nor the empty prompt sees a face"),
        Row("DualCFGGuider", _dual_cfg_guider(False), "value", thorough=True, value=_dual_cfg(False), model=False,
            negative_is_theirs=False, why="the positive prompt sees the face, middle and negative do not"),
        Row("DualCFGGuider, nested", _dual_cfg_guider(True), "value", value=_dual_cfg(True), model=False,
            negative_is_theirs=False, why="the positive prompt sees the face, middle and negative do not"),
        Row("DualModelGuider", _dual_model_guider(False), "value", value=_dual_model, model=False,
            nodes=("DualModelGuider",)),
        Row("DualModelGuider, one model", _dual_model_guider(True), "same", model=False, nodes=("DualModelGuider",)),
        through("RescaleCFG", multiplier=0.7),
        through("TCFG"),
        through("CFGZeroStar"),
        through("CFGNorm", strength=1.0),
        through("Mahiro"),
        through("APG", eta=0.5, norm_threshold=2.0, momentum=0.0),
        through("FreSca", scale_low=1.0, scale_high=1.5, freq_cutoff=2),
        Row("NAGuidance", node_on_model("NAGuidance", nag_scale=3.0, nag_alpha=0.5, nag_tau=1.5), "orders",
            nodes=("NAGuidance",), forms=NO_GUIDANCE, why="it acts where both prompts are in one call"),
        Row("FreeU_V2", node_on_model("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2), "orders", first=("attn1", "attn2"),
            layout="sd15_small"),
        Row("PatchModelAddDownscale", node_on_model(
            "PatchModelAddDownscale", block_number=1, downscale_factor=2.0, start_percent=0.0, end_percent=1.0,
            downscale_after_skip=True, downscale_method="bicubic", upscale_method="bicubic"), "orders",
            first=("attn1", "attn2"), why="the first layer comes before it: ours is whole there"),
        Row("HyperTile", node_on_model("HyperTile", **HYPERTILE), "orders", refused=NO_GRID),
        Row("TomePatchModel", node_on_model("TomePatchModel", ratio=0.4), "orders", refused=NO_GRID, forms=NO_GUIDANCE,
            why="it draws numbers at every call, and routed text needs a call of its own"),
        *(Row(name, node_on_model(name, q=1.2, k=1.0, v=1.0, out=0.9), "orders", formula=False)
          for name in ("UNetSelfAttentionMultiply", "UNetCrossAttentionMultiply")),
        *(Row(name, node_on_model(name, **CACHE), "orders", base={"sigmas": LONG_RUN}, nodes=(name,),
              first=("attn1", "attn2")) for name in ("EasyCache", "LazyCache")),
        Row("HypernetworkLoader", _hypernetwork, "orders", formula=False),
        Row("ModelMergeSimple", _merge, "orders", formula=False),
        Row("LoraLoaderModelOnly", _lora(1.0), "orders", formula=False),
        Row("ModelSamplingDiscrete", node_on_model("ModelSamplingDiscrete", sampling="eps", zsnr=True), "orders",
            why="percent becomes a noise level when sampling starts"),
        Row("attention override", _override, "same"),
        Row("ContextWindowsManual", node_on_model("ContextWindowsManual", **WINDOWS), "same", base=VIDEO,
            nodes=("ContextWindowsManual",), forms=(*ONE_PERSON, "routed"),
            why="without a motion model frames are independent: windows change nothing"),
        on_prompts("hook LoRA", _hook_lora(None)),
        on_prompts("hook LoRA with a keyframe", _hook_lora(0.5)),
        on_prompts("masks on two prompts", _masked_prompts),
        on_prompts("an area prompt", _area),
        on_prompts("a prompt of a time range", _schedule),
        on_prompts("a longer negative prompt", _longer("negative"), forms=FORMS, thorough=True,
                   why="the host repeats the shorter text; the face's share must not change"),
        on_prompts("a longer positive prompt", _longer("positive")),
        on_prompts("GLIGEN", _gligen),
        on_prompts("ControlNet", _controlnet, layout="sd15_full", forms=("fused", "training-free", "routed")),
    ]  # fmt: skip


def with_values(rows: Sequence[Row]) -> list[Row]:
    """Rows whose value is not simply prompt by prompt: hooked LoRAs are judged by the same LoRA in the weights."""
    values = {
        "hook LoRA": _hook_value(1.0), "hook LoRA with a keyframe": _hook_value(0.5),
        "an area prompt": with_their_negative(_area), "GLIGEN": with_their_negative(_gligen),
    }  # fmt: skip
    return [replace(row, value=values.get(row.name, row.value)) for row in rows]

"""FusedIDAttentionPatch: puts faces into a MODEL's cross-attention (METHOD 1)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as host_attention_module
import folder_paths
import numpy as np
import torch
from comfy_api.v0_0_2 import io
from PIL import Image

from ..attention.adapter import COMBINE_MODES, TEXT_MODES, TIMESTEP_MODES, check_adapter_fits, load_adapter
from ..attention.cache import MIB, ReferenceFeatures
from ..attention.fusion import LENGTH_MODES, FaceControls
from ..attention.grid import LATENT_SCALE, grid_at_level
from ..attention.schedule import Window, check_percents
from ..attention.sites import LAYER_GROUPS, Site, discover_sites, layer_groups
from .advanced import advanced
from .community_files import community_choices, community_fingerprint, is_community_choice, load_community_choice
from .community_source import community_features, with_adapter_lora
from .folders import ADAPTERS
from .patch import FusionPatch, install_fusion
from .reference import ReferenceLatent, ReferenceText, latent_fingerprint
from .separation import patch_separation
from .wire_types import Identity, Routed, RoutedIdentities

NODE = "FusedIDAttentionPatch"
FROM_ADAPTER = "from adapter"
NONE_FOUND = "(put an adapter into models/fusedid)"


def adapter_choices() -> list[str]:
    """Drop-down entries: our adapters, then community files that are usable."""
    ours = [name for name in folder_paths.get_filename_list(ADAPTERS) if name.endswith(".safetensors")]
    return [*ours, *community_choices()] or [NONE_FOUND]


class FusedIDAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        modes = [FROM_ADAPTER]
        return io.Schema(
            node_id="FusedIDAttentionPatch",
            display_name="FusedID Attention Patch",
            category="FusedID",
            description="Puts one or several people into the pictures an SD1.5 or SDXL model makes.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2 or SDXL model, with its LoRAs already applied."),
                io.Combo.Input(
                    "adapter",
                    options=adapter_choices(),
                    tooltip=(
                        "FusedID adapter from models/fusedid, or an IP-Adapter, FaceID, InstantID or PuLID file you "
                        "already have."
                    ),
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The model's VAE: encodes the reference face. Not needed for community adapters.",
                ),
                Identity.Input(
                    "identity",
                    optional=True,
                    tooltip="One person, from FaceEmbed or FusedIDLoadIdentity. Connect this or 'routed'.",
                ),
                Routed.Input(
                    "routed", optional=True, tooltip="Several people with their masks, from MultiIDMaskRouter."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip=(
                        "0 is the unpatched model bit for bit, 1 the paper, above 1 a larger share of attention for "
                        "the face."
                    ),
                ),
                advanced(
                    io.Float.Input(
                        "key_strength",
                        default=1.0,
                        min=0.0,
                        max=10.0,
                        step=0.05,
                        optional=True,
                        tooltip="Factor on the face keys: how sharply pixels choose parts of the face. 1 is the paper.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "value_strength",
                        default=1.0,
                        min=0.0,
                        max=10.0,
                        step=0.05,
                        optional=True,
                        tooltip="Factor on the face values: how strongly they act once chosen. 1 is the paper.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "attention_scale",
                        default=1.0,
                        min=0.05,
                        max=10.0,
                        step=0.05,
                        optional=True,
                        tooltip="Factor on all attention scores. 1 is the paper, higher is sharper.",
                    )
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Fraction of the sampling run at which the identity begins to act.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Fraction of the sampling run after which it no longer acts.",
                ),
                advanced(
                    io.Combo.Input(
                        "layers",
                        options=list(LAYER_GROUPS),
                        default="all",
                        optional=True,
                        tooltip=(
                            "Which layers see the face: all; by place (down, middle, up); coarse (layout, head shape) "
                            "or fine (features, skin)."
                        ),
                    )
                ),
                advanced(
                    io.Int.Input(
                        "reference_size",
                        default=0,
                        min=0,
                        max=2048,
                        step=64,
                        optional=True,
                        tooltip=(
                            "Side of the reference in pixels; 0 is the size the adapter was trained with. Smaller is "
                            "faster."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "timestep",
                        options=[*modes, *TIMESTEP_MODES],
                        optional=True,
                        default=FROM_ADAPTER,
                        tooltip=(
                            "clean: the reference runs once and is cached. matched: it is noised and run again every "
                            "step (slower)."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "length",
                        options=[*modes, *LENGTH_MODES],
                        optional=True,
                        default=FROM_ADAPTER,
                        tooltip=(
                            "balanced: the face's share does not depend on the reference's size or number. paper: it "
                            "does."
                        ),
                    )
                ),
                io.Combo.Input(
                    "combine",
                    options=[*modes, *COMBINE_MODES],
                    optional=True,
                    default=FROM_ADAPTER,
                    tooltip=(
                        "fused: one softmax over text and face (the paper). decoupled: two, added, as IP-Adapter does."
                    ),
                ),
                advanced(
                    io.Combo.Input(
                        "apply_to",
                        options=["positive", "both"],
                        optional=True,
                        default="positive",
                        tooltip=(
                            "Which prompts see the face. both is rarely wanted: it cancels in classifier-free guidance."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "reference_text",
                        options=[*modes, *TEXT_MODES],
                        optional=True,
                        default=FROM_ADAPTER,
                        tooltip="Prompt of the reference pass: the empty one, or the positive prompt of the picture.",
                    )
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "Only to encode the empty prompt of the reference pass with your own text encoder, when the "
                        "adapter carries none."
                    ),
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip=(
                        "For community adapters that look at the face through CLIP; the error names the model they "
                        "want."
                    ),
                ),
                advanced(
                    io.Combo.Input(
                        "variant",
                        options=_variants(),
                        optional=True,
                        tooltip="For community files that cannot be told apart by their content.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "lora_strength",
                        default=1.0,
                        min=-2.0,
                        max=2.0,
                        step=0.05,
                        optional=True,
                        tooltip="Strength of the LoRA inside FaceID files.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "structure",
                        default=1.0,
                        min=0.0,
                        max=5.0,
                        step=0.05,
                        optional=True,
                        tooltip="FaceID-PlusV2: weight of the face's structure against its identity.",
                    )
                ),
            ],
            outputs=[io.Model.Output(display_name="model"), io.String.Output(display_name="report")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str, **_: Any) -> str:
        if is_community_choice(adapter):
            return community_fingerprint(adapter)
        path = folder_paths.get_full_path(ADAPTERS, adapter)
        return f"{adapter}:{Path(path).stat().st_mtime_ns}" if path else adapter

    @classmethod
    def execute(cls, model: Any, adapter: str, **given: Any) -> io.NodeOutput:
        try:
            return io.NodeOutput(*patch_model(model, adapter, **given))
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error


def _variants() -> list[str]:
    from ..attention.community.families import AS_RECOGNISED, VARIANTS

    return [AS_RECOGNISED, *VARIANTS]


def patch_model(
    model: Any, adapter: str, *, vae: Any = None, identity: Any = None, routed: RoutedIdentities | None = None,
    strength: float = 1.0, key_strength: float = 1.0, value_strength: float = 1.0, attention_scale: float = 1.0,
    start_percent: float = 0.0, end_percent: float = 1.0, layers: str = "all", reference_size: int = 0,
    timestep: str = FROM_ADAPTER, length: str = FROM_ADAPTER, combine: str = FROM_ADAPTER, apply_to: str = "positive",
    reference_text: str = FROM_ADAPTER, clip: Any = None, clip_vision: Any = None, variant: str = "as recognised",
    lora_strength: float = 1.0, structure: float = 1.0,
) -> tuple[Any, str]:  # fmt: skip
    """A patched clone of the MODEL and the self-check report. Raises ValueError before anything is sampled."""
    people = _people(identity, routed)
    sites = require_sites(model)
    check_percents(start_percent, end_percent)
    sampling = model.get_model_object("model_sampling")
    window = Window(sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent))
    if start_percent == 0.0:
        window = replace(window, sigma_start=float("inf"))
    settings: dict[str, Any] = {
        "sites": sites, "window": window, "routed": routed, "both": apply_to == "both",
        "active": layer_groups(sites)[layers],
    }  # fmt: skip
    if is_community_choice(adapter):
        source = load_community_choice(adapter, variant)
        features = [community_features(source, sites, p, clip_vision=clip_vision, structure=structure) for p in people]
        flat = [(i, f, w) for i, c in enumerate(features) for f, w in zip(c.positive, c.weights) if w > 0]
        settings |= {
            "references": tuple(ReferenceLatent(torch.empty(0), i, w, "") for i, _, w in flat),
            "given": tuple(f for _, f, _ in flat), "negative": features[0].negative, "text": None, "adapter": None,
            "combine": "decoupled" if combine == FROM_ADAPTER else combine,
            "length": "paper", "timestep": "clean", "text_mode": "empty",
        }  # fmt: skip
        notes = [c.note for c in features if c.note]
        if strength > 0:
            model = with_adapter_lora(model, source, sites, lora_strength)
    else:
        fusion = load_adapter(_adapter_path(adapter))
        check_adapter_fits(fusion, sites, name=adapter)
        chosen = fusion.settings
        size = reference_size or chosen.reference_size
        text = _reference_text(fusion, clip, sites)
        notes = [f"reference text: {text.label}"]
        settings |= {
            "references": _reference_latents(model, vae, people, size), "text": text, "adapter": fusion,
            "combine": chosen.combine if combine == FROM_ADAPTER else combine,
            "length": chosen.length if length == FROM_ADAPTER else length,
            "timestep": chosen.timestep if timestep == FROM_ADAPTER else timestep,
            "text_mode": chosen.text if reference_text == FROM_ADAPTER else reference_text,
        }  # fmt: skip
    if strength == 0:
        return model.clone(), "strength 0: the model is unpatched"
    controls = FaceControls(strength, key_strength, value_strength, attention_scale)
    patch = FusionPatch(controls=controls, **settings)
    clone, installed = install_fusion(model, patch)
    if installed != len(patch.active):
        raise ValueError(f"only {installed} of {len(patch.active)} layers could be patched; report this as a bug")
    if routed is not None and routed.separation > 0:
        clone = patch_separation(clone, routed.masks, routed.separation)
    return clone, _report(patch, installed, notes)


def require_sites(model: Any) -> tuple[Site, ...]:
    """The MODEL's cross-attention layers. Raises ValueError when it is no SD-type UNet."""
    sites = discover_sites(model.model.diffusion_model)
    if not sites:
        raise ValueError(
            f"needs an SD1.5, SD2 or SDXL model, got {type(model.model).__name__} "
            f"({type(model.model.diffusion_model).__name__}). Load such a checkpoint"
        )
    return sites


def _people(identity: Any, routed: RoutedIdentities | None) -> tuple[Any, ...]:
    if (identity is None) == (routed is None):
        got = "neither" if identity is None else "both"
        raise ValueError(f"connect either 'identity' (one person) or 'routed' (several with masks); got {got}")
    return (identity,) if routed is None else routed.identities


def _adapter_path(adapter: str) -> str:
    path = folder_paths.get_full_path(ADAPTERS, adapter)
    if path is None:
        raise ValueError(
            f"adapter {adapter!r} is not in models/fusedid. Put the file there and refresh, or choose another"
        )
    return path


def _reference_latents(model: Any, vae: Any, people: tuple[Any, ...], size: int) -> tuple[ReferenceLatent, ...]:
    if vae is None:
        raise ValueError("'vae' is not connected: a FusedID adapter needs the model's VAE to encode the reference face")
    found = []
    for number, person in enumerate(people):
        for reference in person.references:
            if reference.weight <= 0:
                continue
            latent = vae.encode(_pixels(reference.crop, size))
            if latent.ndim != 4 or latent.shape[1] != 4 or not bool(torch.isfinite(latent).all()):
                raise ValueError(f"the VAE gave a latent of shape {list(latent.shape)}; connect the model's own SD VAE")
            latent = model.model.process_latent_in(latent.float())
            found.append(ReferenceLatent(latent, number, float(reference.weight), latent_fingerprint(latent)))
    if not found:
        raise ValueError("every reference of the identity has weight 0; give one a weight above 0")
    return tuple(found)


def _pixels(crop: np.ndarray, size: int) -> torch.Tensor:
    side = max(LATENT_SCALE, size // LATENT_SCALE * LATENT_SCALE)
    resized = Image.fromarray(crop).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)[None]


def _reference_text(adapter: Any, clip: Any, sites: tuple[Site, ...]) -> ReferenceText:
    if clip is not None:
        context, pooled = clip.encode_from_tokens(clip.tokenize(""), return_pooled=True)
        label = "empty prompt"
    elif adapter.prompt_context is not None:
        context, pooled, label = adapter.prompt_context[None], adapter.prompt_pooled, "empty prompt of the adapter"
        pooled = None if pooled is None else pooled.reshape(1, -1)
    else:
        context, pooled, label = torch.zeros(1, 77, sites[0].context), None, "zeros (connect clip for the empty prompt)"
    if context.shape[-1] != sites[0].context:
        raise ValueError(f"the text encoder gives width {context.shape[-1]}, the model takes {sites[0].context}")
    return ReferenceText(context, pooled, label, latent_fingerprint(context))


def _report(patch: FusionPatch, installed: int, notes: list[str]) -> str:
    count = len(patch.references)
    people = 1 if patch.routed is None else len(patch.routed.identities)
    routing = "" if patch.routed is None else f", {people} people routed (background {patch.routed.background})"
    kernel = getattr(host_attention_module.optimized_attention, "__name__", "unknown")
    line = (
        f"{installed} of {len(patch.sites)} layers, {count} reference{'s' * (count != 1)}, {_mib(patch):.1f} MiB, "
        f"kernel {kernel}, {patch.combine}{routing}"
    )
    return "\n".join([line, *notes])


def _mib(patch: FusionPatch) -> float:
    """Keys and values of all references in half precision, in MiB."""
    if patch.given is not None:
        return sum(feature.num_bytes for feature in _unique(patch.given)) / 2 / MIB
    total = 0
    for reference in patch.references:
        for site in patch.sites:
            rows, columns = grid_at_level((reference.latent.shape[-2], reference.latent.shape[-1]), site.level)
            total += 2 * 2 * rows * columns * site.channels
    return total / MIB


def _unique(features: tuple[ReferenceFeatures, ...]) -> list[ReferenceFeatures]:
    return list({id(feature): feature for feature in features}.values())

"""HybridGuidance: style image, prompt and faces become the CONDITIONING of a FaceStudio model (METHOD 2)."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..attention.guidance import Guidance, check_alpha
from ..attention.guidance_routing import GUIDANCE_BACKGROUNDS, sampled_mask
from ..attention.guidance_settings import check_base
from ..attention.sites import discover_sites, family_of
from .guidance_conditioning import Conditioning, face_embeddings, guidance_tokens, negative, positive, routing_for
from .guidance_files import (
    GUIDANCE_FOLDER,
    PRIOR_FOLDER,
    file_stamp,
    guidance_choices,
    open_guidance,
    prior_choices,
    prior_path,
    vision_weights,
)
from .guidance_patch import patch_guidance
from .guidance_report import Prompt, branch_lines, file_lines, routing_lines
from .guidance_style import encode_style, hide_faces, hide_masked, weights_file
from .guidance_text import remembered_text
from .input_ranges import require_in_range
from .prior import NO_PRIOR, text_to_image_space
from .separation import patch_separation
from .wire_types import Encoder, Identity, Routed, require_places

FREE_MASK = 64  # side of the all-ones noise mask when nothing is frozen


class HybridGuidance(io.ComfyNode):
    """Translator from sockets to `guide`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridGuidance",
            display_name="Hybrid Guidance (FaceStudio)",
            category="FusedID",
            description=(
                "Blends a style image and a prompt with one or several faces into the conditioning of a UNet trained "
                "for it. Connect positive and negative to a KSampler. For image-to-image, start the KSampler from the "
                "VAE-encoded photo with a denoise below 1."
            ),
            inputs=_inputs(),
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Model.Output(display_name="model"),
                io.Mask.Output(display_name="noise_mask"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """A guidance file or prior that changed on disk is read again."""
        return file_stamp(inputs["guidance"], GUIDANCE_FOLDER) + file_stamp(inputs["prior"], PRIOR_FOLDER)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        try:
            require_in_range(cls, inputs, files=("guidance", "prior"))
            return io.NodeOutput(*guide(**inputs))
        except ValueError as error:
            raise ValueError(f"HybridGuidance: {error}") from error


def _inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The FaceStudio or image-variation UNet. Checked against the guidance file."),
        io.Combo.Input(
            "guidance", options=guidance_choices(),
            tooltip="The trained Linear (models/fusedid). The identity Linear passes a CLIP ViT-L/14 image embedding "
            "on as it is: for SD image-variation checkpoints; faces have no effect there.",
        ),
        io.Float.Input(
            "alpha", default=0.5, min=0.0, max=1.0, step=0.01,
            tooltip="1: style image only. 0: prompt only. Between: a blend. No effect when one of them is missing.",
        ),
        io.String.Input(
            "text", multiline=True, default="", dynamic_prompts=True,
            tooltip="The prompt; empty: style image only. Weights such as (word:1.2) have no effect here; beyond 77 "
            "tokens the mean of its parts is used.",
        ),
        io.Combo.Input(
            "prior", options=prior_choices(), default=NO_PRIOR,
            tooltip="Turns the prompt into a CLIP image embedding (models/fusedid/priors, such as Karlo's; run "
            "by diffusers). Without a prior the projected text itself is used: experimental.",
        ),
        io.Int.Input("prior_steps", default=25, min=1, max=1000, tooltip="Steps of the prior."),
        io.Float.Input(
            "prior_scale", default=4.0, min=1.0, max=30.0, step=0.1,
            tooltip="Guidance scale of the prior: higher follows the prompt more literally; 1 is off.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
            tooltip="Of the prior's noise and of the random background.",
        ),
        io.Combo.Input(
            "background", options=list(GUIDANCE_BACKGROUNDS), default="mean",
            tooltip="Several people only: what pixels outside every mask listen to. random: somebody, by seed (paper); "
            "mean: the mean of all; first: the first person; freeze: they keep the input latent (connect noise_mask "
            "to Set Latent Noise Mask).",
        ),
        Identity.Input("identity", optional=True, tooltip="One person. Nothing connected: no person (zero embedding)."),
        Routed.Input("routed", optional=True, tooltip="Several people with their masks. Use the model output then."),
        io.ClipVision.Input(
            "clip_vision", optional=True,
            tooltip="CLIP ViT-L/14 for the style image. Further towers a guidance file asks for come from "
            "models/clip_vision through open_clip.",
        ),
        io.Image.Input("style_image", optional=True, tooltip="Style, clothing, setting. A batch counts as its mean."),
        io.Clip.Input(
            "clip", optional=True,
            tooltip="CLIP-L with text_projection (clip_l.safetensors). The CLIP of an SD1.5 checkpoint lacks it.",
        ),
        Encoder.Input(
            "face_encoder", optional=True,
            tooltip="Hides the faces found in the style image, as in training. Not connected: it is used as it is.",
        ),
        io.Mask.Input("style_mask", optional=True, tooltip="Region of the style image to hide, such as its face."),
    ]  # fmt: skip


def guide(
    *, model: Any, guidance: str, alpha: float, text: str, prior: str, prior_steps: int, prior_scale: float, seed: int,
    background: Any, identity: Any = None, routed: Any = None, clip_vision: Any = None,
    style_image: Tensor | None = None, clip: Any = None, face_encoder: Any = None, style_mask: Tensor | None = None,
) -> tuple[Conditioning, Conditioning, Any, Tensor, str]:  # fmt: skip
    """Everything the node does. Returns (positive, negative, model, noise mask `[1, H, W]`, report)."""
    check_alpha(alpha)
    identities = _identities(identity, routed)
    opened = _open(model, guidance, identities)
    faces = face_embeddings(opened.settings, identities, name=guidance)
    style = _style(opened, guidance, style_image, clip_vision, face_encoder, style_mask)
    prompt = _prompt(opened, text, clip, prior, steps=prior_steps, scale=prior_scale, seed=seed)
    tokens = guidance_tokens(opened, faces, style=style, text=prompt and prompt.embedding, alpha=alpha)
    routing = None
    patched, noise_mask = model.clone(), torch.ones(1, FREE_MASK, FREE_MASK)
    if routed is not None:
        routing = routing_for(
            routed.masks, identities, num_tokens=opened.settings.num_tokens, background=background, seed=seed
        )
        noise_mask = sampled_mask(routed.masks, background)
        patched = patch_separation(patch_guidance(model, routing), routed.masks, routed.separation)
    conditioning = positive(tokens, routing)
    null = negative(opened, conditioning[0][0].shape[1])
    report = [
        *file_lines(opened.settings, guidance, identities),
        *branch_lines(opened.settings, style is not None, prompt, alpha),
        *(routing_lines(routing, routed.separation) if routing else ()),
    ]
    return conditioning, null, patched, noise_mask, "\n".join(report)


def _identities(identity: Any, routed: Any) -> tuple[Any, ...]:
    if identity is not None and routed is not None:
        raise ValueError(
            "both identity and routed are connected. Connect identity for one person, routed for several with masks"
        )
    if routed is not None:
        if not routed.identities:
            raise ValueError("the router holds 0 identities. Connect at least one person to it")
        require_places(routed)
        return tuple(routed.identities)
    return () if identity is None else (identity,)


def _open(model: Any, name: str, identities: tuple[Any, ...]) -> Guidance:
    sites = discover_sites(model.model.diffusion_model)
    if not sites:
        raise ValueError(
            f"the model ({type(model.model).__name__}) is no SD1.5 or SDXL UNet with cross-attention. "
            "Load the UNet the guidance file was trained with"
        )
    width, family = sites[0].context, family_of(sites)
    face_width = identities[0].encoder.dim if identities else 0
    guidance = open_guidance(name, context_width=width, family=family, face_width=face_width)
    check_base(guidance.settings, family=family, context_width=width, name=name)
    return guidance


def _style(
    guidance: Guidance, name: str, image: Tensor | None, clip_vision: Any, face_encoder: Any, mask: Tensor | None
) -> Tensor | None:
    if image is None:
        if mask is not None or face_encoder is not None:
            raise ValueError("a style mask or face encoder is connected without a style image. Connect style_image")
        return None
    image = hide_faces(image, face_encoder) if face_encoder is not None else image
    image = hide_masked(image, mask) if mask is not None else image
    return encode_style(
        guidance.settings, image, clip_vision,
        find_weights=lambda model_name: weights_file(model_name, vision_weights()), name=name,
    )  # fmt: skip


def _prompt(
    guidance: Guidance, text: str, clip: Any, prior: str, *, steps: int, scale: float, seed: int
) -> Prompt | None:
    if not text.strip():
        return None
    if clip is None:
        raise ValueError(
            "there is a text but no CLIP to read it. Connect a CLIP-L with text_projection, or clear the text"
        )
    path, chunks = prior_path(prior), remembered_text(clip, text)
    embedding = text_to_image_space(
        path, chunks, remembered_text(clip, "")[0], steps=steps, scale=scale, seed=seed,
        style_width=guidance.settings.style_width, towers=guidance.settings.tower_names,
    )  # fmt: skip
    return Prompt(embedding, prior, len(chunks))

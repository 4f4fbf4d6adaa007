"""Hybrid guidance (FaceStudio, METHOD 2.1): one shared Linear from style and face to the UNet's context.

Legend: B rows, S style width (all CLIP vision towers concatenated), D face width, T guidance tokens, C context width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .guidance_settings import GuidanceSettings, Tower

IDENTITY_NAME = "identity Linear (image-variation checkpoints)"


class Guidance(nn.Module):
    """The shared Linear `[S + D] -> [T * C]`. Image branch and text branch are this one module (same weights).

    `settings` says what the columns mean; `fingerprint` is the sha256 of the file it came from, empty when trained now.
    """

    def __init__(self, settings: GuidanceSettings, *, fingerprint: str = "") -> None:
        super().__init__()
        self.settings = settings
        self.fingerprint = fingerprint
        inputs = settings.style_width + settings.face_width
        self.linear = nn.Linear(inputs, settings.num_tokens * settings.context_width)

    def forward(self, style_BS: Tensor, face_BD: Tensor) -> Tensor:
        """Linear(e_style || e_face): `[B, S]`, `[B, D]` -> `[B, T, C]`.

        Both are taken as they are meant by `settings`: see `prepare_style` and `prepare_face`. Either may be all
        zeros: no style, or no human in the picture (METHOD 2.5). Raises ValueError on a wrong width.
        """
        _require_width(style_BS, self.settings.style_width, f"style embedding ({self.settings.tower_names})")
        _require_width(face_BD, self.settings.face_width, f"face embedding ({self.settings.face_encoder_name})")
        inputs = torch.cat([style_BS, face_BD], dim=-1).to(self.linear.weight)
        return self.linear(inputs).unflatten(-1, (self.settings.num_tokens, self.settings.context_width))

    def null(self, batch: int = 1) -> Tensor:
        """Guidance of the unconditional side `[B, T, C]`: both embeddings zero *before* the Linear (its bias stays)."""
        zeros = self.linear.weight.new_zeros
        return self(zeros(batch, self.settings.style_width), zeros(batch, self.settings.face_width))


def prepare_face(face_BD: Tensor, normalisation: str) -> Tensor:
    """Raw recogniser output `[B, D]` as the Linear wants it: `unit` length or `raw`. Zero rows (no human) stay zero."""
    return _normalised(face_BD, normalisation)


def prepare_style(style_BS: Tensor, towers: tuple[Tower, ...], normalisation: str) -> Tensor:
    """Concatenated tower outputs `[B, S]` as the Linear wants them; `unit` normalises every tower on its own."""
    parts = style_BS.float().split([tower.width for tower in towers], dim=-1)
    return torch.cat([_normalised(part, normalisation) for part in parts], dim=-1)


def _normalised(x: Tensor, normalisation: str) -> Tensor:
    x = x.float()
    if normalisation == "raw":
        return x
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def check_alpha(alpha: float) -> None:
    """Raises ValueError unless alpha lies in [0, 1]."""
    if not (math.isfinite(alpha) and 0.0 <= alpha <= 1.0):
        raise ValueError(
            f"alpha is {alpha:g}, accepted is 0 (text only) to 1 (style image only). Set it to a value in between"
        )


def blend(image_BTC: Tensor, text_BTC: Tensor, alpha: float) -> Tensor:
    """e_g = alpha * e_i + (1 - alpha) * e_t. alpha in [0, 1], else ValueError."""
    check_alpha(alpha)
    return alpha * image_BTC + (1.0 - alpha) * text_BTC


def hybrid_guidance(
    guidance: Guidance, *, face_BD: Tensor, style_BS: Tensor | None, text_BS: Tensor | None, alpha: float
) -> Tensor:
    """e_g `[B, T, C]` from raw embeddings (METHOD 2.1).

    Receives: face `[B, D]` raw recogniser output, zeros where there is no human; style `[B or 1, S]` CLIP image
    embeddings; text `[B or 1, S]` the prompt in the same space (a prior's output); alpha in [0, 1].
    An absent branch leaves the other alone; without both, the face alone with a dropped style (trained: METHOD 2.5).
    Raises ValueError for alpha out of range and for wrong widths.
    """
    check_alpha(alpha)
    settings = guidance.settings
    face = prepare_face(face_BD, settings.face_normalisation)

    def branch(style: Tensor) -> Tensor:
        _require_width(style, settings.style_width, f"style embedding ({settings.tower_names})")
        prepared = prepare_style(style, settings.towers, settings.style_normalisation)
        return guidance(prepared.expand(len(face), -1), face)

    if style_BS is None and text_BS is None:
        return branch(face.new_zeros(1, settings.style_width))
    if text_BS is None or (alpha == 1.0 and style_BS is not None):
        assert style_BS is not None
        return branch(style_BS)
    if style_BS is None or alpha == 0.0:
        return branch(text_BS)
    return blend(branch(style_BS), branch(text_BS), alpha)


def identity_linear(*, context_width: int, face_width: int, base: str) -> Guidance:
    """A Linear that hands the ViT-L/14 image embedding through: what SD image-variation checkpoints were trained on.

    One token, weight `[I | 0]`, no bias: the face has no effect until someone trains its columns.
    """
    tower = Tower("ViT-L/14", 768)
    if context_width != tower.width:
        raise ValueError(
            f"the identity Linear gives {tower.width} numbers per token, but this model's cross-attention takes "
            f"{context_width}. Use it with an SD1.x image-variation checkpoint, or choose a guidance file"
        )
    settings = GuidanceSettings(
        base=base, towers=(tower,), face_width=face_width, face_encoder="", face_encoder_name="any",
        context_width=context_width,
    )  # fmt: skip
    guidance = Guidance(settings, fingerprint="identity-linear")
    with torch.no_grad():
        guidance.linear.bias.zero_()
        guidance.linear.weight.zero_()
        guidance.linear.weight[:, : tower.width] = torch.eye(tower.width)
    return guidance.requires_grad_(False)


def _require_width(x: Tensor, width: int, what: str) -> None:
    if x.ndim != 2 or x.shape[-1] != width:
        raise ValueError(
            f"the {what} must be [rows, {width}], got {list(x.shape)}. "
            "Use the encoders and the prior this guidance file was trained with"
        )

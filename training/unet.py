"""Fused attention inside diffusers' UNet: the trainer's twin of the ComfyUI patch (METHOD 1.1, 1.2).

Both call the same functions of `attention/`, and a host test compares their outputs. Legend: B rows, F rows that see a
face, N tokens of a reference at a site, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention.adapter import AdapterSettings, FusionAdapter, Projection, check_adapter_fits
from attention.fusion import PAPER, FaceControls, FaceKeys, length_term
from attention.grid import LATENT_SCALE
from attention.routing import Background, Region, route
from attention.sites import Site

from .processors import FaceCall, FaceCrossAttention, Recording, SelfAttention, other_rows
from .unet_sites import UNet, UNetSite, unet_sites


@dataclass(frozen=True, eq=False)
class TextContext:
    """What a UNet row is told: tokens `[B, T, D_c]`; for SDXL also pooled text `[B, P]` and time ids `[B, 6]`."""

    tokens: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def added(self) -> dict[str, Tensor] | None:
        """diffusers' `added_cond_kwargs`; None for models without them."""
        if self.pooled is None or self.time_ids is None:
            return None
        return {"text_embeds": self.pooled, "time_ids": self.time_ids}

    def rows(self, num: int) -> TextContext:
        """The same for `num` rows; a single row is repeated."""
        tensors = (self.tokens, self.pooled, self.time_ids)
        return TextContext(*(None if t is None else t.expand(num, *t.shape[1:]) for t in tensors))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Reference:
    """What one identity shows the UNet: scaled latents `[1 or F, 4, h, w]`, the text and the t of the reference pass.

    timesteps: None is the clean pass at t = 0; else `[F]`, and the latents are noised to it (METHOD 1.2 `matched`).
    """

    latents: Tensor
    context: TextContext
    timesteps: Tensor | None = None
    identity: int = 0
    weight: float = 1.0
    hidden: Mapping[str, Tensor] | None = None
    """What the reference pass would give, where it is known already; the latents are not looked at then."""


class FaceProjection(nn.Module):
    """W_kf and W_vf of one site, without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_k_face = nn.Linear(channels, channels, bias=False)
        self.to_v_face = nn.Linear(channels, channels, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states `[F, N, C]` -> (K_f, V_f), both `[F, N, C]`."""
        hidden = hidden.to(self.to_k_face.weight.dtype)  # the frozen UNet may run in half precision
        return self.to_k_face(hidden), self.to_v_face(hidden)


class FusedUNet(nn.Module):
    """A frozen UNet plus the trained projections. The UNet's processors are replaced; its weights are not touched."""

    def __init__(self, unet: UNet, settings: AdapterSettings) -> None:
        super().__init__()
        self.unet = unet
        self.settings = settings
        self.site_table = unet_sites(unet)
        _install(unet, self.site_table)
        unet.requires_grad_(False)
        self.projections = nn.ModuleDict({_slug(s.path): FaceProjection(s.site.channels) for s in self.site_table})
        self.reset_projections()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in LDM order."""
        return tuple(entry.site for entry in self.site_table)

    @torch.no_grad()
    def reset_projections(self) -> None:
        """Starts from the block's own self-attention, which is made for that hidden space (METHOD 1.5)."""
        for entry in self.site_table:
            block = self.unet.get_submodule(entry.name)
            projection = self._projection(entry.path)
            projection.to_k_face.weight.copy_(block.attn1.to_k.weight)
            projection.to_v_face.weight.copy_(block.attn1.to_v.weight)

    @torch.no_grad()
    def load_adapter(self, adapter: FusionAdapter, *, name: str) -> None:
        """Takes an adapter's weights. Raises ValueError when it was made for another model."""
        check_adapter_fits(adapter, self.sites, name=name)
        for path, weights in adapter.projections.items():
            self._projection(path).to_k_face.weight.copy_(weights.key)
            self._projection(path).to_v_face.weight.copy_(weights.value)
        self.settings = adapter.settings

    def export_projections(self) -> dict[str, Projection]:
        """LDM path -> weights, as `attention.adapter.save_adapter` takes them."""
        return {
            entry.path: Projection(
                self._projection(entry.path).to_k_face.weight.detach(),
                self._projection(entry.path).to_v_face.weight.detach(),
            )
            for entry in self.site_table
        }

    def weight_prefix(self, path: str) -> str:
        """What the names of a site's trained weights begin with in this module's state dict."""
        return f"projections.{_slug(path)}."

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Name and weight of everything that learns: `to_k_face` and `to_v_face` of every site, nothing else."""
        return [(name, weight) for name, weight in self.named_parameters() if weight.requires_grad]

    @torch.no_grad()
    def reference_hidden(self, reference: Reference) -> dict[str, Tensor]:
        """The reference pass: hidden states `[F, N, C]` by site, from the plain UNet, without gradient (METHOD 1.2)."""
        rows = reference.latents.shape[0]
        timesteps = reference.timesteps
        if timesteps is None:
            timesteps = torch.zeros(rows, dtype=torch.long, device=reference.latents.device)
        recording = Recording()
        self._run(reference.latents, timesteps, reference.context.rows(rows), recording)
        return recording.hidden

    def face_keys(self, references: Sequence[Reference]) -> dict[str, list[FaceKeys]]:
        """Reference passes and projections: LDM path -> keys and values of every reference, with their terms."""
        counts = _references_per_identity(references)
        keys: dict[str, list[FaceKeys]] = {entry.path: [] for entry in self.site_table}
        for reference in references:
            hidden = self.reference_hidden(reference) if reference.hidden is None else reference.hidden
            for entry in self.site_table:
                key, value = self._projection(entry.path)(hidden[entry.path])
                term = self._log_weight(entry, key.shape[1], counts[reference.identity], reference.weight)
                keys[entry.path].append(FaceKeys(key, value, reference.identity, term))
        return keys

    def regions(
        self, masks_IHW: Tensor, latent_hw: tuple[int, int], *, background: Background = "all", soft: bool = False
    ) -> dict[str, tuple[Region, ...]]:
        """Who sees whom at every site, from resolved image-space masks (METHOD 1.4)."""
        by_grid: dict[tuple[int, int], tuple[Region, ...]] = {}
        for entry in self.site_table:
            grid = entry.grid(latent_hw)
            if grid not in by_grid:
                by_grid[grid] = route(masks_IHW, grid, background=background, soft=soft)
        return {entry.path: by_grid[entry.grid(latent_hw)] for entry in self.site_table}

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        context: TextContext,
        references: Sequence[Reference] = (),
        *,
        rows: Tensor | None = None,
        regions: Mapping[str, tuple[Region, ...]] | None = None,
        controls: FaceControls = PAPER,
    ) -> Tensor:
        """The UNet's prediction `[B, 4, h, w]` for noisy latents, with the references fused in.

        rows: which rows of the batch see the references (None: all). A reference has 1 row or `len(rows)` rows.
        """
        if not references or controls.strength == 0 or (rows is not None and len(rows) == 0):
            return self._run(noisy, timesteps, context, None) + self._nothing()
        others = None if rows is None else other_rows(rows, len(noisy))
        call = FaceCall(self.face_keys(references), rows, others, regions, controls, self.settings.combine)
        return self._run(noisy, timesteps, context, call)

    def _nothing(self) -> Tensor | float:
        """Zero that depends on every trained weight: distributed engines expect each one in every step's graph."""
        if not (self.training and torch.is_grad_enabled()):
            return 0.0
        return sum((weight.sum() * 0.0 for _, weight in self.trainable()), torch.zeros(()).to(self.unet.device))

    def _run(self, x: Tensor, t: Tensor, context: TextContext, faces: FaceCall | Recording | None) -> Tensor:
        return self.unet(
            x,
            t,
            encoder_hidden_states=context.tokens,
            added_cond_kwargs=context.added(),
            cross_attention_kwargs=None if faces is None else {"faces": faces},
            return_dict=False,
        )[0]

    def _projection(self, path: str) -> FaceProjection:
        projection = self.projections[_slug(path)]
        assert isinstance(projection, FaceProjection)
        return projection

    def _log_weight(self, entry: UNetSite, num_tokens: int, num_references: int, weight: float) -> float:
        side = self.settings.reference_size // LATENT_SCALE
        h, w = entry.grid((side, side))
        length = length_term(
            self.settings.length, num_tokens=num_tokens, num_references=num_references, num_trained=h * w
        )
        return length + math.log(weight)


def _install(unet: UNet, sites: Sequence[UNetSite]) -> None:
    for entry in sites:
        block = unet.get_submodule(entry.name)
        block.attn1.set_processor(SelfAttention())
        block.attn2.set_processor(FaceCrossAttention(entry.path))


def _slug(path: str) -> str:
    return path.replace(".", "-")  # module names may hold no dot


def _references_per_identity(references: Sequence[Reference]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for reference in references:
        counts[reference.identity] = counts.get(reference.identity, 0) + 1
    return counts

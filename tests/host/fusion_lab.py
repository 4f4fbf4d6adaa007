"""What the host tests of FusedIDAttentionPatch share: a small model, people, the node, a sampler, recordings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peer_ours
import torch
from torch import Tensor

from attention.sites import Site, discover_sites

LATENT = (8, 8)
SIGMA = 3.0


@dataclass(frozen=True, eq=False)
class Call:
    """One layer in one UNet call: its inputs, the options it was given, its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    out: Tensor


class FusionLab:
    """A model of a layout with everything the node wants. Pictures are 64 pixels, latents 8 x 8.

    reference_size: pixels, of the adapter.
    """

    def __init__(
        self,
        pack: Any,
        small_models: Any,
        layout: str = "sd15_tiny",
        *,
        dtype: torch.dtype = torch.float32,
        reference_size: int = 64,
    ) -> None:
        self.pack, self.layout, self._small_models = pack, layout, small_models
        self.model = small_models.load_unet(layout, dtype=dtype)
        self.vae = small_models.load_vae()
        self.adapter: Path = small_models.adapter(layout, reference_size=reference_size)
        self.positive = small_models.conditioning(layout, seed=1)
        self.negative = small_models.conditioning(layout, seed=2)

    @property
    def unet(self) -> torch.nn.Module:
        """The host's UNet."""
        return self.model.model.diffusion_model

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its cross-attention layers."""
        return discover_sites(self.unet)

    def identity(self, seed: int = 0, weights: Sequence[float] = (1.0,)) -> Any:
        """A person; every reference is a picture of its own (blocks of random colours)."""
        module = self.pack.submodule("faces.identity")
        rng = np.random.default_rng(seed)
        fingerprint = module.EncoderFingerprint("buffalo_l", "insightface", "a" * 64, "b" * 64, 512, "test")
        crops = [rng.integers(0, 255, (4, 4, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1) for _ in weights]
        references = tuple(
            module.Reference(crop, rng.standard_normal(512).astype(np.float32), None, 0.9, weight)
            for crop, weight in zip(crops, weights)
        )
        return module.Identity(references, fingerprint, f"person {seed}")

    def routed(self, people: Sequence[Any], masks: Sequence[Tensor], **settings: Any) -> Any:
        """The output of a chain of MultiIDMaskRouter nodes."""
        routed = None
        for person, mask in zip(people, masks):
            given = {"identity": person, "mask": mask[None], "routed": routed, **settings}
            given = {name: value for name, value in given.items() if value is not None}
            routed = peer_ours.run_node(self.pack.nodes["MultiIDMaskRouter"], **given)[0]
        return routed

    def patch(self, model: Any = None, **inputs: Any) -> tuple[Any, str]:
        """The node on a MODEL (default: the plain one): the patched MODEL and the report."""
        given = {"model": model or self.model, "adapter": self.adapter.name, "vae": self.vae, **inputs}
        if "routed" not in given:
            given.setdefault("identity", self.identity())
        return peer_ours.run_node(self.pack.nodes["FusedIDAttentionPatch"], **given)

    def call(self, model: Any, *, sigma: float = SIGMA, latent: Tensor | None = None) -> Tensor:
        """One denoising step with guidance through the host's own sampling code, as float32 `[B, 4, h, w]`."""
        import comfy.samplers

        x = noise(1, LATENT) * sigma if latent is None else latent
        seen: list[Tensor] = []

        def one_step(denoise: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
            seen.append(denoise(x, sigmas[0].expand(len(x)), **extra_args).clone())
            return x

        sampler = comfy.samplers.KSAMPLER(one_step)
        sigmas = torch.tensor([sigma, 0.0])
        self.run(model, sampler=sampler, sigmas=sigmas, noise=x / sigma, latent=torch.zeros_like(x))
        return seen[0]

    @torch.no_grad()
    def run(
        self, model: Any, *, sampler: Any, sigmas: Tensor, noise: Tensor, latent: Tensor, cfg: float = 3.0
    ) -> Tensor:
        """The host's CFGGuider on given noise levels."""
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(cfg)
        return guider.sample(noise, latent, sampler, sigmas, seed=7, disable_pbar=True)

    def sample(self, model: Any, **inputs: Any) -> Tensor:
        """Samples `[B, 4, h, w]` of the host's KSampler node."""
        latent = inputs.pop("latent", torch.zeros(1, 4, *LATENT))
        values = {
            "positive": self.positive, "negative": self.negative, "latent_image": {"samples": latent}, "seed": 7,
            "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, **inputs,
        }  # fmt: skip
        import nodes

        return nodes.KSampler().sample(model, **values)[0]["samples"]

    def calls_at(self, model: Any, site: Site, attention: str = "attn2", **inputs: Any) -> list[Call]:
        """What a layer of a MODEL received and gave, while sampling."""
        return record(model, site.key, attention, lambda patched: self.sample(patched, **inputs))

    @contextmanager
    def counted_passes(self) -> Iterator[list[int]]:
        """Rows of every pass through the UNet inside the block."""
        rows: list[int] = []
        handle = self.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        try:
            yield rows
        finally:
            handle.remove()


def labs_of(pack: Any, small_models: Any) -> Callable[..., FusionLab]:
    """`lab(layout)`, made when first asked for."""
    made: dict[str, FusionLab] = {}

    def lab(layout: str = "sd15_tiny") -> FusionLab:
        if layout not in made:
            made[layout] = FusionLab(pack, small_models, layout)
        return made[layout]

    return lab


def record(model: Any, key: tuple[Any, ...], attention: str, run: Any) -> list[Call]:
    """What a layer of a MODEL received and gave while `run` samples with a clone of it.

    Read from outside, at the layer's own projections, so that whoever computes between them is left alone.
    """
    clone, calls = model.clone(), []
    site = next(one for one in discover_sites(clone.model.diffusion_model) if one.key == tuple(key))
    block = clone.model.diffusion_model.get_submodule(site.path)
    layer = getattr(block, attention)
    state: dict[str, Any] = {}

    def note_options(n: Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple[Tensor, Any, Any]:
        if (*extra["block"], extra["block_index"]) == site.key:
            state["options"] = dict(extra)
        return n, context, value

    def note_output(_: Any, given: tuple[Tensor, ...]) -> None:
        if "options" in state:  # else the pass of a reference
            calls.append(Call(state["q"], state["k"], state["v"], state.pop("options"), given[0].clone()))

    def note(name: str) -> Any:
        return lambda _, __, out: state.update({name: out.clone()})

    getattr(clone, f"set_model_{attention}_patch")(note_options)
    handles = [getattr(layer, f"to_{name}").register_forward_hook(note(name)) for name in "qkv"]
    handles.append(layer.to_out.register_forward_pre_hook(note_output))
    try:
        run(clone)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def noise(rows: int, hw: tuple[int, int], seed: int = 0) -> Tensor:
    """Gaussian `[rows, 4, h, w]`."""
    return torch.randn(rows, 4, *hw, generator=torch.Generator().manual_seed(seed))


def halves(height: int = 64, width: int = 64, gap: int = 0) -> list[Tensor]:
    """Masks of a left and a right half, with a gap of background between."""
    left, right = torch.zeros(height, width), torch.zeros(height, width)
    left[:, : width // 2 - gap], right[:, width // 2 + gap :] = 1, 1
    return [left, right]


def features_by_hand(lab: FusionLab, person: Any, size: int = 64) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """K_f and V_f of every reference at every site: the UNet at t = 0, then the file's matrices (METHOD 1.2)."""
    import safetensors.torch
    from PIL import Image

    weights = {name: w.float() for name, w in safetensors.torch.load_file(lab.adapter).items()}
    found = []
    for reference in person.references:
        crop = np.asarray(Image.fromarray(reference.crop).resize((size, size), Image.Resampling.LANCZOS))
        latent = lab.vae.encode(torch.from_numpy(crop.astype(np.float32) / 255)[None])
        states = hidden_states(lab, lab.model.model.process_latent_in(latent), weights)
        found.append(
            {
                site.path: tuple(
                    states[site.key] @ weights[f"{site.path}.attn2.to_{kind}_face.weight"].T for kind in ("k", "v")
                )
                for site in lab.sites
            }
        )
    return found


def hidden_states(lab: FusionLab, latent: Tensor, weights: dict[str, Tensor]) -> dict[tuple[Any, ...], Tensor]:
    """norm2 states of the host's UNet for a clean latent and the file's prompt."""
    states: dict[tuple[Any, ...], Tensor] = {}

    def note(n: Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple[Tensor, Any, Any]:
        states[(*extra["block"], extra["block_index"])] = n.clone()
        return n, context, value

    base, y = lab.model.model, None
    if base.adm_channels:
        side = latent.shape[-1] * 8
        pooled = weights["reference_prompt.pooled"][None]
        y = base.encode_adm(
            pooled_output=pooled, width=side, height=side, crop_w=0, crop_h=0, target_width=side, target_height=side,
            device=torch.device("cpu"),
        )  # fmt: skip
    with torch.no_grad():
        lab.unet(
            latent.float(), torch.zeros(1), context=weights["reference_prompt.context"][None], y=y,
            transformer_options={"patches": {"attn2_patch": [note]}},
        )  # fmt: skip
    return states


def tokens(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Token positions a mask of whole cells covers."""
    rows, columns = mask.shape[0] // grid[0], mask.shape[1] // grid[1]
    return (mask[::rows, ::columns].flatten() > 0.5).nonzero()[:, 0]


def grid_of(call: Call) -> tuple[int, int]:
    """Token grid of a layer."""
    height, width = call.options["activations_shape"][-2:]
    assert call.q.shape[1] == height * width
    return height, width


def largest(difference: Tensor) -> float:
    """max |x|."""
    return float(difference.abs().max())


def relative(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| over |theirs|, both as Euclidean norms."""
    return float((ours - theirs).norm() / max(float(theirs.norm()), math.ulp(1.0)))

"""From CLIP's text space to its image space: a pretrained diffusion prior (METHOD 2.1), run by diffusers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.files import read_header, read_tensors, require_finite
from ..faces.install import pip_install
from .guidance_text import TextChunk

log = logging.getLogger("fusedid")

NO_PRIOR = "no prior: projected text embedding (experimental)"
HEAD_WIDTH = 64  # of Karlo and of every published prior of this layout; a config.json beside the file overrides it
CLAMP = 5.0  # Karlo's prior was trained with embeddings clamped to [-5, 5]
FORBIDDEN = -10000.0  # diffusers' score for a token in the future
REMEMBERED = 64

_remembered: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()


def load_prior(path: Path) -> Any:
    """A diffusers `PriorTransformer` from a safetensors file, in the file's dtype, on the CPU.

    Sizes come from the tensors, or from `config.json` in the same folder. Raises ValueError when the file is no prior,
    is damaged, or diffusers is missing.
    """
    try:
        from diffusers import PriorTransformer
    except Exception as error:  # a broken optional dependency of diffusers raises anything
        raise ValueError(
            f"running a prior needs diffusers, which cannot be imported here ({error}). Install it with "
            f"{pip_install('diffusers')} and restart ComfyUI, or choose '{NO_PRIOR}'"
        ) from error
    header = read_header(path)
    config = _config(path, header.shapes)
    tensors = read_tensors(header)
    require_finite(path.name, tensors)
    with torch.device("meta"):  # a billion random weights would take longer to draw than the real ones to read
        prior = PriorTransformer(**config)
    try:
        prior.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path.name} does not fit the prior it describes: {str(error)[:300]}. Get it again"
        ) from error
    length = prior.causal_attention_mask.shape[-1]
    prior.causal_attention_mask = torch.full([1, length, length], FORBIDDEN, dtype=prior.clip_mean.dtype).triu_(1)
    return prior.eval().requires_grad_(False)


def _config(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    needed = (
        "proj_in.weight",
        "positional_embedding",
        "prd_embedding",
        "clip_mean",
        "encoder_hidden_states_proj.weight",
    )
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(
            f"{path.name} is no diffusion prior: it has no {missing[0]}. Use the prior of Karlo "
            "(karlo-v1-alpha, prior/diffusion_pytorch_model.safetensors)"
        )
    inner, width = shapes["proj_in.weight"]
    layers = {name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}
    head = _head_width(path.parent / "config.json", inner)
    return {
        "num_attention_heads": inner // head,
        "attention_head_dim": head,
        "num_layers": len(layers),
        "embedding_dim": width,
        "num_embeddings": shapes["positional_embedding"][1] - 4,
        "additional_embeddings": 4,
    }


def _head_width(config: Path, inner: int) -> int:
    head = HEAD_WIDTH
    if config.is_file():
        try:
            head = int(json.loads(config.read_text(encoding="utf-8")).get("attention_head_dim", HEAD_WIDTH))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{config.name} beside the prior cannot be read ({error}). Get it again or delete it"
            ) from error
    if head < 1 or inner % head:
        raise ValueError(f"a prior of width {inner} cannot have heads of {head}. Put its config.json beside the file")
    return head


def check_prior_width(prior_width: int, style_width: int, *, prior_name: str, towers: str) -> None:
    """Raises ValueError unless the prior's output is what the Linear takes as a style embedding."""
    if prior_width != style_width:
        raise ValueError(
            f"{prior_name} gives embeddings of {prior_width} numbers (CLIP ViT-L/14), but this guidance file takes "
            f"{style_width} ({towers}). Clear the text and use a style image, or choose a guidance file trained with "
            "ViT-L/14 alone"
        )


@torch.no_grad()
def sample_prior(
    prior: Any,
    text: TextChunk,
    empty: TextChunk,
    *,
    steps: int,
    scale: float,
    seed: int,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """CLIP image embedding `[1, D]` for one text chunk, fp32 on the CPU.

    steps: of the unCLIP schedule, 1 to 1000. scale: classifier-free guidance against the empty prompt, 1 = none.
    Noise comes from a CPU generator, so a seed means the same on every device.
    """
    from diffusers import UnCLIPScheduler

    scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=CLAMP
    )
    scheduler.set_timesteps(steps, device=device)
    dtype = prior.proj_in.weight.dtype
    both = (empty, text) if scale != 1.0 else (text,)
    embedding, hidden = (torch.cat([getattr(t, n) for t in both]).to(device, dtype) for n in ("embedding", "hidden"))
    mask = torch.cat([t.mask for t in both]).to(device)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, prior.config.embedding_dim, generator=generator).to(device) * scheduler.init_noise_sigma
    times = scheduler.timesteps
    for i, t in enumerate(times):
        predicted = prior(
            x.to(dtype).expand(len(both), -1), timestep=t, proj_embedding=embedding, encoder_hidden_states=hidden,
            attention_mask=mask,
        ).predicted_image_embedding.float()  # fmt: skip
        x0 = predicted if len(both) == 1 else predicted[:1] + scale * (predicted[1:] - predicted[:1])
        following = times[i + 1] if i + 1 < len(times) else None
        x = scheduler.step(x0, timestep=t, sample=x, generator=generator, prev_timestep=following).prev_sample
        if on_step:
            on_step(i + 1, len(times))
    return prior.post_process_latents(x.to(dtype)).float().cpu()


def text_to_image_space(
    path: Path | None, chunks: list[TextChunk], empty: TextChunk, *, steps: int, scale: float, seed: int,
    style_width: int, towers: str,
) -> Tensor:  # fmt: skip
    """e_T `[1, D]`: the prior's output averaged over the chunks, or without a prior the projected text itself.

    Results are remembered, so that moving alpha does not run the prior again.
    """
    if path is None:
        embedding = torch.cat([chunk.embedding for chunk in chunks]).mean(0, keepdim=True)
        check_prior_width(embedding.shape[1], style_width, prior_name="The projected text", towers=towers)
        return embedding
    key = (str(path), path.stat().st_mtime_ns, steps, scale, seed, style_width, *map(_digest, [*chunks, empty]))
    if key not in _remembered:
        _remembered[key] = _run(
            path, chunks, empty, steps=steps, scale=scale, seed=seed, style_width=style_width, towers=towers
        )
        while len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    return _remembered[key]


def _digest(chunk: TextChunk) -> str:
    return hashlib.sha256(chunk.hidden.numpy().tobytes() + chunk.embedding.numpy().tobytes()).hexdigest()


def _run(
    path: Path, chunks: list[TextChunk], empty: TextChunk, *, steps: int, scale: float, seed: int, style_width: int,
    towers: str,
) -> Tensor:  # fmt: skip
    import comfy.model_management as management
    import comfy.utils

    prior = load_prior(path)
    check_prior_width(prior.config.embedding_dim, style_width, prior_name=path.name, towers=towers)
    check_text_width(chunks[0].embedding.shape[1], prior.config.embedding_dim, prior_name=path.name)
    device = management.get_torch_device()
    size = sum(p.numel() * p.element_size() for p in prior.parameters())
    management.free_memory(size * 1.2, device)
    torch.nn.Module.to(prior, device, torch.float32 if torch.device(device).type == "cpu" else None)
    bar = comfy.utils.ProgressBar(steps * len(chunks))

    def on_step(_done: int, _of: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update(1)

    log.info("HybridGuidance: running %s, %d steps", path.name, steps)
    results = [
        sample_prior(prior, chunk, empty, steps=steps, scale=scale, seed=seed, device=device, on_step=on_step)
        for chunk in chunks
    ]
    return torch.cat(results).mean(0, keepdim=True)


def check_text_width(text_width: int, prior_width: int, *, prior_name: str) -> None:
    """Raises ValueError unless the text encoder's joint space is the prior's."""
    if text_width != prior_width:
        raise ValueError(
            f"{prior_name} takes text embeddings of {prior_width} numbers, but this CLIP gives {text_width}. "
            "Load the CLIP-L text encoder with CLIPLoader"
        )

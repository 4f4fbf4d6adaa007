"""Every evaluation of prompts that a guider asks for in one step, beside the same prompt evaluated by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WHO = "test_prompt"
"""Under this key a CONDITIONING of these tests carries whose it is, through all copies of the host."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One prompt in one `calc_cond_batch` of the host: whose it is, where, with what in the layers, and the result."""

    who: str
    conds: list[dict[str, Any]]
    x: Tensor
    sigma: Tensor
    options: dict[str, Any]
    out: Tensor


def named(conditioning: Any, who: str) -> Any:
    """The CONDITIONING with its name in it."""
    return [[tokens, {**values, WHO: who}] for tokens, values in conditioning]


@contextmanager
def evaluations() -> Iterator[list[Evaluation]]:
    """All of them inside the block."""
    import comfy.samplers

    seen: list[Evaluation] = []
    original = comfy.samplers.calc_cond_batch

    def spy(model: Any, conds: Any, x: Tensor, sigma: Tensor, options: Any) -> Any:
        outs = original(model, conds, x, sigma, options)
        for one, out in zip(conds, outs):
            if one:  # the host leaves a prompt out where guidance is 1
                seen.append(Evaluation(one[0][WHO], one, x.clone(), sigma.clone(), options, out.clone()))
        return outs

    comfy.samplers.calc_cond_batch = spy
    try:
        yield seen
    finally:
        comfy.samplers.calc_cond_batch = original


def one_step(guider: Any, sigma: float, x: Tensor, known: Tensor | None = None) -> Tensor:
    """The guider's prediction for `x` `[B, 4, h, w]` at one noise level."""
    import comfy.samplers

    seen = []

    def sampler(denoise: Any, _: Tensor, sigmas: Tensor, extra_args: Any = None, **__: Any) -> Tensor:
        seen.append(denoise(x, sigmas[0].expand(len(x)), **extra_args).clone())
        return x

    latent = torch.zeros_like(x)
    with torch.no_grad():
        guider.sample(x / sigma, latent, comfy.samplers.KSAMPLER(sampler), torch.tensor([sigma, 0.0]), seed=7,
                      disable_pbar=True)  # fmt: skip
    return seen[0]


def alone(model: Any, conditioning: Any, seen: Evaluation) -> Tensor:
    """What a MODEL predicts for a positive prompt by itself, with the input and the foreign layers of an evaluation."""
    from comfy.samplers import CFGGuider

    clone = model.clone()
    replaced = seen.options.get("transformer_options", {}).get("patches_replace", {})
    clone.model_options["transformer_options"] = {
        **clone.model_options["transformer_options"],
        "patches_replace": {kind: dict(layers) for kind, layers in replaced.items()},
    }
    guider = CFGGuider(clone)
    guider.inner_set_conds({"positive": named(conditioning, "alone")})
    guider.set_cfg(1.0)
    return one_step(guider, float(seen.sigma.flatten()[0]), seen.x)

"""What cheaper forms of a reference cost in quality: outputs of the layers and of the UNet against the usual form.

Measured with random weights: it tells the order of magnitude, not the likeness of a face.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .scene import SIGMA, Scene

FORMS: dict[str, dict[str, Any]] = {
    "fp8 keys and values": {"cache_precision": "fp8"},
    "keys and values in RAM": {"cache_device": "cpu"},
    "3/4 of the tokens": {"reference_tokens": 0.75},
    "half of the tokens": {"reference_tokens": 0.5},
    "a quarter of the tokens": {"reference_tokens": 0.25},
    "half of the tokens, fp8": {"reference_tokens": 0.5, "cache_precision": "fp8"},
}


def compare(scene: Scene, reference: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Per form the relative errors of the layers' positive rows (mean, largest) and of the UNet's prediction.

    of_face: the prediction's error in units of what the face changes in it. cosine: of the prediction, smallest row.
    """
    person = scene.person()

    def outputs(model: Any) -> tuple[list[Tensor], Tensor]:
        return _outputs(scene, model)

    def patched(**form: Any) -> Any:
        return scene.patch(identity=person, reference_size=reference, **form)[0]

    usual = patched()
    _, plain = outputs(scene.model)
    layers, prediction = outputs(usual)
    rows = []
    for name, form in FORMS.items():
        # The layers are compared on the same inputs: those of the usual form.
        found = _replayed(scene, usual, patched(**form))
        errors = [_relative(ours, wanted) for ours, wanted in zip(found, layers)]
        _, ours = outputs(patched(**form))
        rows.append(
            {
                "form": name,
                "layer_mean": statistics.mean(errors),
                "layer_max": max(errors),
                "prediction": _relative(ours, prediction),
                "of_face": float((ours - prediction).norm() / (prediction - plain).norm()),
                "cosine": float(torch.cosine_similarity(ours.flatten(1), prediction.flatten(1)).min()),
            }
        )
        progress(f"quality of {name}")
    return rows


def lines(rows: list[dict[str, Any]], reference: int) -> list[str]:
    """As a Markdown table."""
    head = [
        f"Quality, 1 reference of {reference} px, random weights, against the usual form:",
        "",
        "| form | layer outputs, mean | largest | prediction | of what the face changes | cosine |",
        "|---|---|---|---|---|---|",
    ]
    numbers = ("layer_mean", "layer_max", "prediction", "of_face")
    body = [
        f"| {row['form']} | {' | '.join(f'{row[name]:.4f}' for name in numbers)} | {row['cosine']:.6f} |"
        for row in rows
    ]
    return [*head, *body]


def _outputs(scene: Scene, model: Any) -> tuple[list[Tensor], Tensor]:
    """Every layer's output on the positive row, and the UNet's prediction, of one step."""
    found: list[Tensor] = []
    prediction = scene.call(_watched(scene, model, None, found), latent=_latent(scene))
    return found, prediction


def _replayed(scene: Scene, leading: Any, other: Any) -> list[Tensor]:
    """The layers of `other` on the inputs they get inside `leading`."""
    found: list[Tensor] = []
    slots = other.model_options["transformer_options"]["patches_replace"]["attn2"]
    scene.call(_watched(scene, other, leading, found, slots), latent=_latent(scene))
    return found


def _watched(scene: Scene, model: Any, leading: Any, found: list[Tensor], slots: dict[Any, Any] | None = None) -> Any:
    """A clone whose layers note their outputs; with `leading` its layers' outputs go on to the next layer."""
    from comfy.ldm.modules.attention import optimized_attention

    clone = model.clone()
    own = slots or clone.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    if leading is not None:
        leading_slots = leading.model_options["transformer_options"]["patches_replace"]["attn2"]
        for where in ("wrappers", "callbacks"):
            for event, entries in getattr(leading, where).items():
                getattr(clone, where).setdefault(event, {}).update(entries)
    for site in scene.sites:
        inner = own.get(site.key)
        lead = None if leading is None else leading_slots[site.key]

        def layer(q: Any, k: Any, v: Any, options: Any, inner: Any = inner, lead: Any = lead) -> Any:
            out = optimized_attention(q, k, v, options["n_heads"]) if inner is None else inner(q, k, v, options)
            found.append(out[options["cond_or_uncond"].index(0)].float())
            return out if lead is None else lead(q, k, v, options)

        clone.set_model_attn2_replace(layer, *site.key)
    return clone


def _latent(scene: Scene) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return SIGMA * torch.randn(1, 4, scene.size // 8, scene.size // 8, generator=generator)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())

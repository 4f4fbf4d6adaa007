"""What cheaper forms of a reference cost in quality: outputs of the layers and of the UNet against the usual form.

Measured with random weights: it tells the order of magnitude, not the likeness of a face.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

    _, plain = outputs(scene.model)
    layers, prediction = outputs(patched())
    rows = []
    for name, form in FORMS.items():
        # The layers are compared on the same inputs: those of the usual form.
        found = _replayed(scene, layers, patched(**form))
        errors = [_relative(ours[-1], wanted[-1]) for ours, wanted in zip(found, layers)]
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
    """Every layer's output, and the UNet's prediction, of one step; positive rows come last."""
    found: list[Tensor] = []
    with _heard(scene, found, None):
        prediction = scene.call(model, latent=_latent(scene))
    return found, prediction


def _replayed(scene: Scene, leading: Sequence[Tensor], other: Any) -> list[Tensor]:
    """The layers of `other` on the inputs they get where the layers before them gave what `leading` says."""
    found: list[Tensor] = []
    with _heard(scene, found, leading):
        scene.call(other, latent=_latent(scene))
    return found


@contextmanager
def _heard(scene: Scene, found: list[Tensor], instead: Sequence[Tensor] | None) -> Iterator[None]:
    """Notes every layer's output `[2, Q, C]` in `found`, and lets `instead` go on to the next layer."""

    def note(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if len(given[0]) != 2:  # the pass of a reference
            return None
        found.append(given[0].clone())
        return None if instead is None else (instead[len(found) - 1],)

    layers = [scene.unet.get_submodule(site.path).attn2.to_out for site in scene.sites]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _latent(scene: Scene) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return SIGMA * torch.randn(1, 4, scene.size // 8, scene.size // 8, generator=generator)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())

"""Routed attention of four people at the 64x64 level: split by region against one call with a dense mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .bars import DENSE_BAR
from .measure import clock, interleaved
from .scene import Scene

GRID, CHANNELS, HEADS, TEXT = 64, 320, 8, 77
KERNELS = ("SDPA", "the host's kernel")


def compare(scene: Scene, rounds: int, reference: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of both ways and how much faster ours is, per kernel, for references of `reference` pixels.

    The two results are compared as well: a faster answer that differs would be no answer.
    """
    layer = _layer(scene, reference)
    rows = []
    for kernel in KERNELS:
        split, dense = _ways(scene, layer, kernel)
        with torch.no_grad():
            error = float((split() - dense()).abs().max())
            assert error < (1e-4 if scene.device == "cpu" else 1e-2), f"the two ways differ by {error}"
            ways = {"split": timed(split, scene.device), "dense": timed(dense, scene.device)}
            timings = interleaved(ways, rounds, scene.device, progress)
        gains = timings["dense"].ratios(timings["split"])
        rows.append({"kernel": kernel, "reference_px": reference, "gains": gains, "bar": DENSE_BAR})
    return rows


def _layer(scene: Scene, reference: int) -> dict[str, Any]:
    routing = scene.pack.submodule("attention.routing")
    fusion = scene.pack.submodule("attention.fusion")
    device, dtype = scene.device, torch.float32 if scene.device == "cpu" else torch.float16

    def randn(tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, CHANNELS, device=device, dtype=dtype)

    masks = torch.zeros(4, 512, 512)
    for i in range(4):
        masks[i, :, 128 * i : 128 * (i + 1)] = 1.0
    weights = routing.token_weights(masks, (GRID, GRID), background="all", soft=False)
    regions = tuple(region.to(device) for region in routing.regions_from_weights(weights))
    tokens = (reference // 8) ** 2
    faces = [fusion.FaceKeys(randn(tokens), randn(tokens), i) for i in range(4)]
    return {"q": randn(GRID * GRID), "k": randn(TEXT), "v": randn(TEXT), "faces": faces, "regions": regions,
            "weights": weights.to(device)}  # fmt: skip


def _ways(scene: Scene, layer: dict[str, Any], kernel: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    fusion = scene.pack.submodule("attention.fusion")
    masked = _sdpa if kernel == "SDPA" else _host
    q, k, v, faces = (layer[name] for name in ("q", "k", "v", "faces"))
    visible = [torch.zeros(GRID * GRID, TEXT, device=q.device)]
    visible += [layer["weights"][i].log()[:, None].expand(-1, face.key.shape[1]) for i, face in enumerate(faces)]
    mask = torch.cat(visible, 1).to(q)
    keys = torch.cat([k, *(face.key for face in faces)], 1)
    values = torch.cat([v, *(face.value for face in faces)], 1)

    def split() -> Any:
        return fusion.fused_attention(q, k, v, faces, heads=HEADS, attend=masked, regions=layer["regions"])

    return split, lambda: masked(q, keys, values, HEADS, mask)


def _sdpa(q: Any, k: Any, v: Any, heads: int, mask: Any = None) -> Any:
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _host(q: Any, k: Any, v: Any, heads: int, mask: Any = None) -> Any:
    from comfy.ldm.modules.attention import optimized_attention_masked

    return optimized_attention_masked(q, k, v, heads, mask=mask)


def timed(way: Callable[[], Any], device: str) -> Callable[[], float]:
    """The seconds a call takes."""

    def run() -> float:
        start = clock(device)
        way()
        return clock(device) - start

    return run

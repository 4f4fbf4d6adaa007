"""UltimateSDUpscale's tiles, Impact Pack's detailer and Advanced-ControlNet with FusedIDPlaceInPicture.

A stand-in for the VAE keeps the pictures it is asked to encode. Every pixel's colour is its place, so the pictures say
which parts the packs really cut, however they decided on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import peer_ours
import peer_packs
import pytest
import torch
from test_told_place import Lab, view_of
from torch import Tensor

HEIGHT, WIDTH = 128, 192
SAMPLING = {"seed": 3, "steps": 1, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.6}


class KeepingVAE:
    """Latents of zeros for pictures; decoded they are the picture that was encoded last."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def encode(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels.float().clone())
        return torch.zeros(len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8)

    def decode(self, samples: Tensor) -> Tensor:
        return self.seen[-1]

    def parts(self) -> list[tuple[float, ...]]:
        """Where each of the pictures lies, from the colours at its middle and how fast they change."""
        found = []
        for picture in (one for batch in self.seen for one in batch):
            down, across = picture[:, :, 1] * 255, picture[:, :, 0] * 255
            found.append((*_ends(down.mean(1)), *_ends(across.mean(0))))
        return [(top / HEIGHT, left / WIDTH, bottom / HEIGHT, right / WIDTH) for top, bottom, left, right in found]


def _ends(places: Tensor) -> tuple[float, float]:
    """First and last border of a run of pixel numbers that was perhaps resized."""
    num, quarter = len(places), len(places) // 4
    step = float(places[-quarter] - places[quarter]) / (num - 2 * quarter)
    middle = float(places[quarter : num - quarter].mean()) + 0.5
    middle -= step * (quarter + (num - quarter) - num) / 2
    return middle - step * num / 2, middle + step * num / 2


def coordinates() -> Tensor:
    """IMAGE whose red is the column and green the row, in 8 bits."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)], -1)[None].float() / 255


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> Lab:
    return Lab(pack, small_models)


@pytest.fixture(scope="module", autouse=True)
def routes() -> Iterator[None]:
    """Impact Pack asks the server for routes while it is imported."""
    import server

    class Anything:
        def __getattr__(self, _name: str) -> Any:
            return lambda *_a, **_k: lambda function: function

    before = getattr(server.PromptServer, "instance", None)
    nothing = SimpleNamespace(routes=Anything(), app=Anything(), send_sync=lambda *_: None, client_id=None)
    nothing.add_on_prompt_handler = lambda *_: None
    nothing.send_progress_text = lambda *_: None
    server.PromptServer.instance = nothing
    yield
    server.PromptServer.instance = before


@pytest.fixture
def watched(lab: Lab) -> tuple[Any, list[Any]]:
    """A MODEL that reads places, and what every call of it was told, one view per latent of the positive prompt."""
    import comfy.patcher_extension as extension

    calls: list[Any] = []

    def note(executor: Any, x: Tensor, *given: Any, **named: Any) -> Any:
        options = named.get("transformer_options", given[4] if len(given) > 4 else {})
        kinds, view = options["cond_or_uncond"], options.get(lab.told.VIEW) or (0.0, 0.0, 1.0, 1.0)
        if 0 in kinds:
            each = len(x) // len(kinds)
            views = view if isinstance(view[0], tuple) else (view,) * len(x)
            calls.extend(views[kinds.index(0) * each : (kinds.index(0) + 1) * each])
        return executor(x, *given, **named)

    model = lab.model.clone()
    model.add_wrapper_with_key(extension.WrappersMP.OUTER_SAMPLE, "place", lab.told.note_view)
    model.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, "note", note)
    return model, calls


def close(found: Any, wanted: Any, pixels: float = 1.0) -> bool:
    sizes = (HEIGHT, WIDTH, HEIGHT, WIDTH)
    return len(found) == len(wanted) and all(
        abs(a - b) * side <= pixels for one, other in zip(found, wanted) for a, b, side in zip(one, other, sizes)
    )


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(("padding", "uniform", "batch"), [(0, False, 1), (8, False, 1), (16, True, 1), (16, True, 4)])
def test_every_tile_of_ultimate_sd_upscale_tells_where_it_is(
    lab: Lab, watched: Any, control: bool, padding: int, uniform: bool, batch: int
) -> None:
    peer_packs.load_peer(lab.pack.host, "ComfyUI_UltimateSDUpscale")
    model, calls = watched
    vae, picture = KeepingVAE(), coordinates()
    prompts = lab.control(lab.positive, lab.negative) if control else (lab.positive, lab.negative)
    positive, negative = lab.place(*prompts, image=picture)
    given = {
        "upscaled_image": picture, "model": model, "positive": positive, "negative": negative, "vae": vae,
        "mode_type": "Linear", "tile_width": 64, "tile_height": 64, "mask_blur": 0, "tile_padding": padding,
        "seam_fix_mode": "Band Pass", "seam_fix_denoise": 0.5, "seam_fix_mask_blur": 0, "seam_fix_width": 16,
        "seam_fix_padding": 8, "force_uniform_tiles": uniform, "tiled_decode": False, "batch_size": batch, **SAMPLING,
    }  # fmt: skip
    lab.pack.host.node("UltimateSDUpscaleNoUpscale")().upscale(**given)
    wanted = vae.parts()
    assert len(wanted) >= 6 and len(set(wanted)) == len(wanted)
    assert close(calls, wanted), (calls, wanted)


def test_every_face_of_impacts_detailer_tells_where_it_is(lab: Lab, watched: Any) -> None:
    peer_packs.load_impact(lab.pack.host)
    from impact.core import SEG

    model, calls = watched
    boxes = [(16, 24, 80, 88), (100, 8, 140, 48), (120, 60, 192, 128)]  # left, top, right, bottom
    segments = [
        SEG(None, np.ones((bottom - top, right - left), np.float32), 0.9, box, box, "face", None)
        for box in boxes
        for left, top, right, bottom in [box]
    ]
    positive, negative = lab.place(image=coordinates())
    lab.pack.host.node("DetailerForEach").do_detail(
        coordinates(), ((HEIGHT, WIDTH), segments), model, None, KeepingVAE(), 96, True, 256, 3, 1, 4.0, "euler",
        "normal", positive, negative, 0.6, 0, True, True,
    )  # fmt: skip
    assert calls == [view_of((top, left, bottom, right), (HEIGHT, WIDTH)) for left, top, right, bottom in boxes]


def test_advanced_controlnet_leaves_it_in_force(lab: Lab, watched: Any) -> None:
    peer_packs.load_peer(lab.pack.host, "ComfyUI-Advanced-ControlNet")
    from tile_standins import cut_hints

    model, calls = watched
    node, load = (
        lab.pack.host.node(f"ACN_{name}") for name in ("AdvancedControlNetApply_v2", "ControlNetLoaderAdvanced")
    )
    (net,) = peer_ours.run_node(load, cnet=lab.models.controlnet("sd15_tiny").name)
    hint = torch.rand(1, HEIGHT, WIDTH, 3)
    region, size = (32, 64, 96, 160), (HEIGHT, WIDTH)

    def apply(prompts: Any) -> Any:
        return peer_ours.run_node(node, positive=prompts[0], negative=prompts[1], control_net=net, image=hint)[:2]

    plain = (lab.positive, lab.negative)
    picture = coordinates()
    expected = lab.run(model, *(cut_hints(p, region, size, (64, 96)) for p in apply(plain)), (8, 12))
    calls.clear()
    for prompts in (lab.place(*apply(plain), image=picture), apply(lab.place(*plain, image=picture))):
        found = lab.run(model, *(cut_hints(p, region, size, (64, 96)) for p in prompts), (8, 12))
        assert torch.allclose(found, expected, atol=1e-5)
        assert set(calls) == {view_of(region, size)}
        calls.clear()

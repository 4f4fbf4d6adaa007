"""Prompts around HybridGuidance for a server that also has the probes, and what its sockets carried."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from guidance_lab import NO_PRIOR
from live_server import LiveServer
from PIL import Image
from safetensors.torch import load_file

from attention.guidance_file import load_guidance

FACE, FILE = 128, "guidance_http.safetensors"  # width of the test pack's recogniser; the file every prompt names
SIDE = 64
PEOPLE = ("syn00.jpg", "syn01.jpg")


class Client:
    """A server that also has the probes, and the prompts of these tests."""

    def __init__(self, server: LiveServer, pack_entry: str, unet: str) -> None:
        self.server, self._unet, self._numbers = server, unet, itertools.count()
        self.guidance = load_guidance(server.base / "models" / "fusedid" / FILE)  # as `training` imports it
        self._loaders = {
            "unet": ("UNETLoader", {"unet_name": unet, "weight_dtype": "default"}),
            "vision": ("CLIPVisionLoader", {"clip_name": "clip_vit_l.safetensors"}),
            "clip": ("CLIPLoader", {"clip_name": "clip_l_projected.safetensors", "type": "stable_diffusion"}),
            "style": ("LoadImage", {"image": "style.png"}),
            "encoder": ("LoadIdentityEncoder", {"face_pack": pack_entry, "provider": "auto", "det_size": 640}),
        }

    def guided(self, **inputs: Any) -> dict[str, Any]:
        """A prompt whose node `guide` is HybridGuidance with a style image, a text and these inputs."""
        values = {
            "model": ["unet", 0], "guidance": FILE, "alpha": 0.5, "text": "a watercolour", "prior": NO_PRIOR,
            "prior_steps": 2, "prior_scale": 2.0, "seed": 3, "background": "mean", "clip_vision": ["vision", 0],
            "style_image": ["style", 0], "clip": ["clip", 0], **inputs,
        }  # fmt: skip
        given = {name: value for name, value in values.items() if value is not None}
        return self.prompt(guide=("HybridGuidance", given))

    def styled(self, **inputs: Any) -> dict[str, Any]:
        """The same without a text."""
        return self.guided(text="", clip=None, **inputs)

    def person(self, number: int) -> dict[str, Any]:
        """Nodes `photo<n>` and `face<n>`: one of the test photos as an identity."""
        widgets = {"face": "largest", "number": 1, "no_face": "error", "weights": "", "min_size": 0, "margin": 0.3}
        face = {"encoder": ["encoder", 0], "image": [f"photo{number}", 0], **widgets, "name": f"person {number}"}
        return self.prompt(
            **{
                f"photo{number}": ("LoadImage", {"image": PEOPLE[number - 1]}),
                f"face{number}": ("FaceEmbed", face | {"min_sharpness": 0.0, "min_score": 0.0}),
            }
        )

    def two_people(self, order: tuple[int, int] = (1, 2), **last: Any) -> dict[str, Any]:
        """Persons 1 left and 2 right, chained through the router in this order; the end is `["router2", 0]`."""
        routers = {}
        for place, number in enumerate(order, start=1):
            inputs = {"identity": [f"face{number}", 0], "mask": [f"mask{number}", 0]}
            inputs |= {"routed": ["router1", 0], **last} if place == 2 else {}
            routers[f"router{place}"] = ("MultiIDMaskRouter", inputs)
        masks = {f"mask{n}": ("LoadImageMask", {"image": f"mask{n}.png", "channel": "red"}) for n in order}
        return {**self.person(1), **self.person(2), **self.prompt(**masks, **routers)}

    def probe(self, api: dict[str, Any], kind: str, **sockets: Any) -> torch.Tensor:
        """What a socket carries."""
        return self.probe_all(api, kind, **sockets)["value"]

    def probe_all(self, api: dict[str, Any], kind: str, **sockets: Any) -> dict[str, torch.Tensor]:
        name = f"probe{next(self._numbers)}"
        self.server.queue({**api, **self.prompt(probe=(kind, {**sockets, "name": name}))})
        return load_file(self.server.base / "output" / f"{name}.safetensors")

    def conditioning(self, api: dict[str, Any], output: int = 0) -> torch.Tensor:
        """Context `[1, N, C]` of HybridGuidance's positive (0) or negative (1)."""
        return self.probe(api, "ProbeConditioning", conditioning=["guide", output])

    def attention(self, api: dict[str, Any]) -> torch.Tensor:
        """The first cross-attention's output `[1, 64, C]` with the node's model and positive."""
        return self.probe(api, "ProbeAttention", model=["guide", 2], conditioning=["guide", 0])

    def embedding(self, number: int) -> torch.Tensor:
        """A person's raw face embedding `[1, D]`."""
        return self.probe(self.person(number), "ProbeIdentity", identity=[f"face{number}", 0])[None]

    def report(self, api: dict[str, Any]) -> str:
        """HybridGuidance's report."""
        shown = self.server.queue({**api, **self.prompt(shown=("PreviewAny", {"source": ["guide", 4]}))})
        return shown["outputs"]["shown"]["text"][0]

    def prompt(self, **nodes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in {**self._loaders, **nodes}.items()
        }


def write_pictures(folder: Path, assets: Path) -> None:
    """Photos of the two people, their masks (columns 0-2 and 5-7 of the latent) and two style images."""
    for name in PEOPLE:
        shutil.copyfile(assets / "faces" / "sfhq_crops" / name, folder / name)
    for number in (1, 2):
        mask = np.zeros((SIDE, SIDE, 3), np.uint8)
        columns = slice(0, 24) if number == 1 else slice(40, SIDE)
        mask[:, columns] = 255
        Image.fromarray(mask).save(folder / f"mask{number}.png")
    for number, name in enumerate(("style.png", "style2.png")):
        pixels = np.random.default_rng(number).integers(0, 255, (96, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)

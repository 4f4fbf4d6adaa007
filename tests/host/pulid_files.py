"""Synthetic PuLID files and people for host tests: what EVA-CLIP would see in their pictures is drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import community_files as files
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

PATCHES = 9
DEPTHS = {"pulid-v1": 4, "pulid-v1.1": 5}


def write_pulid(pack: Any, sites: Any, family: str = "pulid-v1.1", *, depth: int | None = None) -> tuple[str, Any]:
    """A file with a model's widths in models/pulid; the drop-down's entry, and its tensors by our names."""
    order = pack.submodule("attention.community.layers").processor_order(sites)
    shapes = files.file_shapes(family, "sdxl", depth=depth or DEPTHS[family], widths=[site.channels for site in order])
    tensors = files.random_tensors(shapes)
    path = Path(pack.host.base) / "models" / "pulid" / f"{family}_{len(order)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(files.as_pulid(tensors), path)
    return f"pulid/{path.name}", tensors


def seen(number: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Of one picture: face embedding `[1, 512]`, EVA-CLIP embedding `[1, 768]` and its five levels `[1, n, 1024]`."""
    generator = torch.Generator().manual_seed(100 + number)
    embedding = 20 * torch.randn(1, 512, generator=generator)
    eva = torch.randn(1, 768, generator=generator)
    return embedding, eva, [torch.randn(1, PATCHES, 1024, generator=generator) for _ in range(5)]


def person(pack: Any, *numbers: int, weights: tuple[float, ...] = (), name: str = "p") -> Any:
    """An identity from antelopev2 whose pictures show `seen(number)`."""
    module = pack.submodule("faces.identity")
    encoder = module.EncoderFingerprint("antelopev2", "insightface", "a" * 64, "b" * 64, 512, "test")
    references = tuple(
        module.Reference(np.full((64, 64, 3), number, np.uint8), seen(number)[0][0].numpy(), None, 0.9, weight)
        for number, weight in zip(numbers, weights or (1.0,) * len(numbers))
    )
    return module.Identity(references, encoder, name)


def without_tower(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PuLID's inputs as drawn by `seen`: the tower has 300 million weights."""
    source, inputs = pack.submodule("nodes.community_source"), pack.submodule("attention.community.inputs")

    def face_inputs(_: Any, identity: Any, **__: Any) -> Any:
        found = [seen(int(reference.crop[0, 0, 0])) for reference in identity.references]
        return inputs.FaceInputs(
            embedding=torch.cat([one[0] for one in found]),
            encoder="antelopev2",
            eva_embed=torch.cat([one[1] for one in found]),
            eva_hidden=tuple(torch.cat([one[2][i] for one in found]) for i in range(5)),
        )

    monkeypatch.setattr(source, "face_inputs", face_inputs)
    monkeypatch.setattr(source, "load_eva", object)

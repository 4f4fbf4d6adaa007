"""A model, prompts and our patch on it, for the tests beside other packs: through FusedIDAttentionPatch itself.

The face comes from a synthetic FaceID file in models/ipadapter, which needs neither a VAE nor a CLIP vision model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import community_files as files
import numpy as np
import torch
from safetensors.torch import save_file


@dataclass(frozen=True, eq=False)
class Scene:
    """`model`: a MODEL. `keys`: its cross-attention layers. `patched(model)`: another MODEL with our identity in it."""

    pack: Any
    model: Any
    keys: list[tuple[str, int, int]]
    positive: Any
    negative: Any
    identity: Any
    adapter: str

    def patched(self, model: Any, *, combine: str = "decoupled") -> Any:
        """Our node on a MODEL."""
        given = {"model": model, "identity": self.identity, "adapter": self.adapter, "combine": combine}
        return run_node(self.pack.nodes["FusedIDAttentionPatch"], **given)[0]


def run_node(node: Any, **given: Any) -> tuple[Any, ...]:
    """Executes a V3 node with the defaults of its schema for what is not given. Unknown names are an error."""
    declared = node.INPUT_TYPES()
    inputs = {**declared.get("required", {}), **declared.get("optional", {})}
    unknown = set(given) - set(inputs)
    assert not unknown, f"{node.__name__} has no input {sorted(unknown)}; it has {sorted(inputs)}"
    values = {name: default for name, spec in inputs.items() if (default := _default(spec)) is not None}
    return node.execute(**{**values, **given}).args


def _default(spec: Any) -> Any:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options")
    return choices[0] if choices else None


def make_scene(pack: Any, small_models: Any, layout: str) -> Scene:
    """A small model of a layout with random prompts, an identity, and a FaceID file of its widths (without LoRA)."""
    model = small_models.load_unet(layout)
    sites = pack.submodule("attention.sites").discover_sites(model.model.diffusion_model)
    order = pack.submodule("attention.community.layers").processor_order(sites)
    # Portrait has FaceID's projection and no LoRA, which would change every layer of the model as well.
    shapes = files.file_shapes("portrait", "sd15", widths=[site.channels for site in order])
    folder = pack.host.base / "models" / "ipadapter"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(files.random_tensors(shapes, dtype=torch.float16), folder / f"peers_{layout}.safetensors")
    return Scene(
        pack=pack,
        model=model,
        keys=[site.key for site in sites],
        positive=small_models.conditioning(layout, seed=1),
        negative=small_models.conditioning(layout, seed=2),
        identity=make_identity(pack),
        adapter=f"ipadapter/peers_{layout}.safetensors",
    )


def make_identity(pack: Any, count: int = 2, seed: int = 0) -> Any:
    """An identity of random references with buffalo_l embeddings."""
    module, rng = pack.submodule("faces.identity"), np.random.default_rng(seed)
    fingerprint = module.EncoderFingerprint("buffalo_l", "insightface", "a" * 64, "b" * 64, 512, "test")
    references = tuple(
        module.Reference(
            crop=rng.integers(0, 255, (64, 64, 3), dtype=np.uint8),
            embedding=rng.standard_normal(512).astype(np.float32),
            keypoints=None,
            score=0.9,
        )
        for _ in range(count)
    )
    return module.Identity(references, fingerprint, "someone")

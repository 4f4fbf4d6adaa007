"""What the host tests of HybridGuidance share: a random guidance file, people, a style encoder, a sampler."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from attention.guidance import Guidance
from attention.guidance_file import save_guidance
from attention.guidance_settings import GuidanceSettings, Tower

SHA = "ab" * 32
FACE = 6
NO_PRIOR = "no prior: projected text embedding (experimental)"
IDENTITY_LINEAR = "identity Linear (image-variation checkpoints)"
DEFAULTS = {
    "alpha": 0.5, "text": "", "prior": NO_PRIOR, "prior_steps": 2, "prior_scale": 2.0, "seed": 0, "background": "mean",
}  # fmt: skip
STYLE = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(1))


def settings(**changes: Any) -> GuidanceSettings:
    values: dict[str, Any] = {
        "base": "sd15", "towers": (Tower("ViT-L/14", 768),), "face_width": FACE, "face_encoder": SHA,
        "face_encoder_name": "pack A", "num_tokens": 2,
    }  # fmt: skip
    return GuidanceSettings(**{**values, **changes})


def write_guidance(path: Path, **changes: Any) -> Path:
    """A random guidance file that reacts strongly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    guidance = Guidance(settings(**changes))
    with torch.no_grad():
        guidance.linear.weight.mul_(8)
    save_guidance(path, guidance)
    return path


class Vision:
    """A CLIP_VISION of ViT-L/14's shape whose embedding is a seeded function of the image's mean."""

    image_size = 224

    def __init__(self) -> None:
        patch = SimpleNamespace(weight=torch.empty(1024, 3, 14, 14, device="meta"))
        embeddings = SimpleNamespace(patch_embedding=patch)
        projection = SimpleNamespace(weight=torch.empty(768, 1024, device="meta"))
        self.model = SimpleNamespace(vision_model=SimpleNamespace(embeddings=embeddings), visual_projection=projection)
        self.weight = torch.randn(3, 768, generator=torch.Generator().manual_seed(8)) * 3

    def encode_image(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image_embeds": images.mean((1, 2)) @ self.weight}


def embedding(seed: int, dim: int = FACE) -> np.ndarray:
    """A raw face embedding `[D]`."""
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32) * 9


class Lab:
    """The node with everything it needs."""

    def __init__(self, pack: Any, small_models: Any, base: Path) -> None:
        self._pack, self._base, self._small_models = pack, base, small_models
        self.file = write_guidance(base / "models" / "fusedid" / "guidance_test.safetensors")
        self.unet = small_models.load_unet("sd15_small")
        self.vision = Vision()

    def identity(self, seed: int, sha: str = SHA, dim: int = FACE) -> Any:
        """A person with a random embedding, as the pack's own class."""
        module = self._pack.submodule("faces.identity")
        encoder = module.EncoderFingerprint(f"pack {sha[0].upper()}", "insightface", sha, "", dim, "none")
        reference = module.Reference(np.zeros((32, 32, 3), np.uint8), embedding(seed, dim), None, 0.9)
        return module.Identity((reference,), encoder, f"person {seed}")

    def run(self, **inputs: Any) -> tuple[Any, ...]:
        """The node's five outputs."""
        values = {"model": self.unet, "guidance": self.file.name, **DEFAULTS, **inputs}
        return self._pack.nodes["HybridGuidance"].execute(**values).args

    def styled(self, **inputs: Any) -> tuple[Any, ...]:
        """The same with the style image connected."""
        return self.run(style_image=STYLE, clip_vision=self.vision, **inputs)

    def two_people(self, order: tuple[int, int] = (0, 1), **options: Any) -> Any:
        """Persons 1 and 2, left and right, with a strip of background between, as the router hands them over."""
        masks = torch.zeros(2, 64, 64)
        masks[0, :, :24], masks[1, :, 40:] = 1, 1
        people = (self.identity(1), self.identity(2))
        return self.routed(tuple(people[i] for i in order), masks[list(order)], **options)

    def routed(self, identities: tuple[Any, ...], masks: torch.Tensor | None, **options: Any) -> Any:
        """What the router's socket carries, as the pack's own class."""
        return self._pack.submodule("nodes.wire_types").RoutedIdentities(identities, masks, **options)


def sample(
    model: Any,
    positive: Any,
    negative: Any,
    *,
    latent=None,
    denoise: float = 1.0,
    steps: int = 2,
    cfg: float = 3.0,
    mask=None,
):
    import comfy.sample

    latent = torch.zeros(1, 4, 8, 8) if latent is None else latent
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "normal", positive, negative, latent, denoise=denoise, disable_pbar=True,
        noise_mask=mask, seed=7,
    )  # fmt: skip


def attention_output(model, positive) -> torch.Tensor:
    """What the first cross-attention gives, through the host's own sampler; nothing has spread over the latent yet."""
    seen: list[torch.Tensor] = []
    clone = model.clone()
    clone.set_model_attn2_output_patch(lambda n, options: seen.append(n.clone()) or n)
    sample(clone, positive, positive, steps=1, cfg=1.0)
    return seen[0]

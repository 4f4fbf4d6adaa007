"""The style image through every CLIP vision tower a guidance file asks for (METHOD 2.1)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..attention.guidance_settings import GuidanceSettings, Tower, check_towers
from ..attention.guidance_style import face_region, hide_region
from ..faces.cache import find_faces_cached
from ..faces.install import pip_install
from .remember import Remembered, digest

log = logging.getLogger("fusedid")

KNOWN_TOWERS = {
    (1024, 14, 224): "ViT-L/14",
    (1024, 14, 336): "ViT-L/14@336",
    (1280, 14, 224): "ViT-H/14",
    (1664, 14, 224): "ViT-bigG/14",
}
OPEN_CLIP_NAMES = {"ViT-L/14": "ViT-L-14", "RN101": "RN101", "ViT-B/32": "ViT-B-32"}
OPENAI_FILES = "open_clip_model.safetensors of timm's CLIP models named .openai"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin")
SMALLEST_STYLE = 16
_embeddings: Remembered[Tensor] = Remembered(16)

Encode = Callable[[Tensor], Tensor]
"""`encode(images [B, H, W, 3] in [0, 1]) -> [B, width]`."""


def tower_of(clip_vision: Any) -> Tower:
    """Name and width of the tower in ComfyUI's CLIP_VISION. Raises ValueError when it has no projected embedding."""
    vision = getattr(clip_vision.model, "vision_model", None)
    projection = getattr(clip_vision.model, "visual_projection", None)
    if vision is None or not hasattr(projection, "weight"):
        raise ValueError(
            "this CLIP_VISION gives no projected image embedding (it is no CLIP model). Load CLIP ViT-L/14 "
            "(clip-vit-large-patch14) with CLIPVisionLoader"
        )
    hidden, _, patch, _ = vision.embeddings.patch_embedding.weight.shape
    size = int(clip_vision.image_size)
    name = KNOWN_TOWERS.get((hidden, patch, size), f"ViT({hidden})/{patch}@{size}")
    return Tower(name, projection.weight.shape[0])


def encode_style(
    settings: GuidanceSettings,
    images: Tensor,
    clip_vision: Any,
    *,
    find_weights: Callable[[str], Path | None],
    name: str,
) -> Tensor:
    """Concatenated raw embeddings `[1, S]` of all towers of the guidance file; several images give their mean.

    Receives: images `[B, H, W, C]` in [0, 1]; clip_vision or None; find_weights: open_clip model name -> file or None;
    name: the guidance file's. Raises ValueError when a tower is missing or another one is connected.
    """
    images = check_style(images)
    connected = None if clip_vision is None else tower_of(clip_vision)
    if connected is not None and connected not in settings.towers:
        check_towers(settings, (connected,), name=name)
    parts = []
    for tower in settings.towers:
        if tower == connected:
            encoded = _embeddings.get(clip_vision, digest(images), partial(_host_encode, clip_vision, images))
        else:
            encoded = _open_clip_tower(tower, find_weights, name)(images)
        parts.append(encoded.float().cpu())
    return torch.cat(parts, dim=-1).mean(0, keepdim=True)


def _host_encode(clip_vision: Any, images: Tensor) -> Tensor:
    return clip_vision.encode_image(images)["image_embeds"]


def check_style(images: Tensor) -> Tensor:
    """The images as `[B, H, W, 3]`. Raises ValueError for empty batches, tiny images, NaN."""
    if images.ndim != 4 or images.shape[0] == 0 or min(images.shape[1:3]) < SMALLEST_STYLE:
        raise ValueError(
            f"the style image is {list(images.shape)}, accepted is a batch [B, H, W, C] of at least "
            f"{SMALLEST_STYLE} x {SMALLEST_STYLE} pixels. Connect another image"
        )
    if not bool(torch.isfinite(images).all()):
        raise ValueError("the style image holds NaN or infinite pixels. Connect another image")
    if images.shape[3] == 1:
        return images.expand(-1, -1, -1, 3)
    return images[..., :3].clamp(0.0, 1.0)


def hide_faces(images: Tensor, encoder: Any) -> Tensor:
    """Style images `[B, H, W, 3]` with every found face hidden, as in training.

    Raises ValueError naming the first image in which no face is found.
    """
    images = check_style(images)
    regions = []
    for number, image in enumerate(images, start=1):
        pixels = (image * 255.0).round().to(torch.uint8).cpu().numpy()
        faces = find_faces_cached(pixels, encoder).faces
        if not faces:
            raise ValueError(
                f"no face was found in style image {number}, so there is none to hide. Disconnect the face encoder to "
                "use the image as it is, or connect an image with a visible person"
            )
        boxes = torch.tensor([list(map(float, face.box)) for face in faces])
        regions.append(face_region(boxes, image.shape[0], image.shape[1]))
    return hide_region(images, torch.stack(regions))


def hide_masked(images: Tensor, mask: Tensor) -> Tensor:
    """Style images with the user's mask `[H, W]` or `[B or 1, h, w]` hidden; the mask is scaled to the image."""
    images = check_style(images)
    mask = (mask[None] if mask.ndim == 2 else mask).float()
    if mask.ndim != 3 or mask.shape[0] not in (1, images.shape[0]):
        raise ValueError(
            f"the style mask is {list(mask.shape)}, but the style image is a batch of {images.shape[0]}. "
            "Connect one mask, or one per image"
        )
    size = tuple(images.shape[1:3])
    scaled = torch.nn.functional.interpolate(mask[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return hide_region(images, scaled.expand(images.shape[0], -1, -1))


def weights_file(model_name: str, files: dict[str, Path]) -> Path | None:
    """The file that holds an open_clip model (`RN101`, `ViT-B-32`): its name contains the model's."""
    wanted = _plain(model_name)
    fitting = (name for name in sorted(files) if name.endswith(WEIGHT_SUFFIXES) and wanted in _plain(name))
    return next((files[name] for name in fitting), None)


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _open_clip_tower(tower: Tower, find_weights: Callable[[str], Path | None], name: str) -> Encode:
    model_name = OPEN_CLIP_NAMES.get(tower.name)
    if model_name is None:
        raise ValueError(
            f"{name} was trained with the CLIP vision tower {tower.name} ({tower.width}), which is not connected and "
            "which open_clip does not have. Load it with CLIPVisionLoader, or choose another guidance file"
        )
    path = find_weights(model_name)
    if path is None:
        raise ValueError(
            f"{name} was trained with the CLIP vision towers of several networks and {tower.name} is missing. Put "
            f"OpenAI's weights into models/clip_vision as {model_name}.safetensors ({OPENAI_FILES})"
            + (", or connect CLIP_VISION" if tower.name == "ViT-L/14" else "")
        )
    return load_open_clip(model_name, path, tower)


def load_open_clip(model_name: str, path: Path, tower: Tower) -> Encode:
    """An open_clip vision tower from a file on disk; nothing is downloaded. Raises ValueError when it does not load."""
    try:
        import open_clip
    except Exception as error:  # open_clip needs torchvision, whose import can fail with anything
        raise ValueError(
            f"the vision tower {tower.name} needs open_clip, which cannot be imported here ({error}). Install it with "
            f"{pip_install('open_clip_torch')} and restart ComfyUI, or choose a guidance file trained with ViT-L/14 "
            "alone"
        ) from error
    # OpenAI's weights were trained with the sigmoid approximation of GELU; open_clip has a configuration for each.
    retrained = any(word in path.name.lower() for word in ("laion", "datacomp"))
    try:
        model = open_clip.create_model(model_name if retrained else f"{model_name}-quickgelu", pretrained=str(path))
    except (RuntimeError, OSError, ValueError, KeyError, UnpicklingError) as error:
        raise ValueError(
            f"{path.name} could not be loaded as {model_name} ({str(error)[:200]}). Use the safetensors file "
            f"({OPENAI_FILES}); OpenAI's first .pt files are programs, which are not run here"
        ) from error
    model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        import comfy.clip_vision

        pixels = comfy.clip_vision.clip_preprocess(images.cpu().float(), size=224)
        return model.encode_image(pixels)

    return encode

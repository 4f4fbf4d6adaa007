"""What makes an example workflow run here and now: small random models, synthetic faces, the test pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo import choose_pack
from face_pack import PACK, copy_face_pack
from live_server import LiveServer
from PIL import Image
from small_models import SmallModels

LAYOUT = "sd15_full"


def put_photos(server: LiveServer, assets: Path, photos: dict[str, str]) -> None:
    """Writes synthetic faces into input/ under the names that the examples use."""
    for name, photo in photos.items():
        place = server.base / "input" / f"{name}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(assets / "faces" / "sfhq_crops" / f"{photo}.jpg").save(place)


def put_face_pack(server: LiveServer, assets: Path) -> str:
    """Puts the test pack into the server's models; returns its entry in the drop-down."""
    copy_face_pack(server.base / "models", assets)
    return choose_pack(server, PACK)


def fusion_inputs(server: LiveServer, small_models: SmallModels, assets: Path, *, side: int) -> dict[str, Any]:
    """Inputs by node class for the examples with a fusion adapter."""
    return {
        "CheckpointLoaderSimple": {"ckpt_name": small_models.checkpoint(LAYOUT).name},
        "LoadIdentityEncoder": {"face_pack": put_face_pack(server, assets)},
        "FusedIDAttentionPatch": {"adapter": small_models.adapter(LAYOUT).name},
        "EmptyLatentImage": {"width": side, "height": side},
        "KSampler": {"steps": 2},
    }

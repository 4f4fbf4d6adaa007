"""The test pack of face models where users put packs: in a base directory's models/insightface/models."""

from __future__ import annotations

import shutil
from pathlib import Path

PACK = "test_pack"


def copy_face_pack(models: Path, assets: Path) -> Path:
    """Copies it there unless it is there already; returns models/insightface.

    A copy, since a test may touch the files it uses and the assets are everybody's.
    """
    root = models / "insightface"
    place = root / "models" / PACK
    if not place.exists():
        shutil.copytree(assets / "insightface" / "models" / PACK, place)
    return root

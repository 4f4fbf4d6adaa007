"""Which face packs are on disk, and which known ones could be downloaded. Reads only file headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .onnx_header import OnnxHeader, read_header
from .scrfd import STRIDES_BY_OUTPUTS

RESEARCH = "non-commercial research only"
UNKNOWN_LICENSE = "licence unknown, ask its author"
RECOGNISER_SIDES = range(112, 257, 16)
LANDMARK_SIDE = 192
"""Landmark models look like recognisers (one square picture in, one row out) except for this size."""


@dataclass(frozen=True)
class KnownPack:
    """A pack that InsightFace publishes."""

    name: str
    detector: str
    recogniser: str
    megabytes: int
    """Size of the download, MB."""
    license: str = RESEARCH


KNOWN_PACKS = (
    KnownPack("buffalo_l", "det_10g.onnx", "w600k_r50.onnx", 289),
    KnownPack("antelopev2", "scrfd_10g_bnkps.onnx", "glintr100.onnx", 361),
    KnownPack("buffalo_m", "det_2.5g.onnx", "w600k_r50.onnx", 276),
    KnownPack("buffalo_s", "det_500m.onnx", "w600k_mbf.onnx", 128),
    KnownPack("buffalo_sc", "det_500m.onnx", "w600k_mbf.onnx", 15),
)

PUBLISHED_SHA256 = {
    "det_10g.onnx": "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
    "scrfd_10g_bnkps.onnx": "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
    "det_2.5g.onnx": "041f73f47371333d1d17a6fee6c8ab4e6aecabefe398ff32cca4e2d5eaee0af9",
    "det_500m.onnx": "5e4447f50245bbd7966bd6c0fa52938c61474a04ec7def48753668a9d8b4ea3a",
    "w600k_r50.onnx": "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
    "w600k_mbf.onnx": "9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f",
    "glintr100.onnx": "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
}
"""What InsightFace published under these names; other files of a pack (age, landmarks) are not used here."""


@dataclass(frozen=True)
class FacePack:
    """A detector and a recogniser on disk."""

    name: str
    detector: Path
    recogniser: Path
    license: str


def known_pack(name: str) -> KnownPack | None:
    """The published pack of that name, if there is one."""
    return next((pack for pack in KNOWN_PACKS if pack.name == name), None)


def find_packs(roots: Sequence[Path]) -> list[FacePack]:
    """Packs under ``<root>/models/<pack>/`` and ``<root>/models/<pack>/<pack>/`` (zips that contain their own folder).

    Known packs come first, in their order; others by name. Of packs with equal names the earlier root wins.
    """
    found: dict[str, FacePack] = {}
    for root in roots:
        for folder in _folders(root / "models"):
            pack = _read_pack(folder)
            if pack is not None:
                found.setdefault(pack.name, pack)
    order = {pack.name: place for place, pack in enumerate(KNOWN_PACKS)}
    return sorted(found.values(), key=lambda pack: (order.get(pack.name, len(order)), pack.name))


def searched_places(roots: Sequence[Path], name: str) -> str:
    """The folders in which a pack of that name would be found, for error messages."""
    return " or ".join(str(root / "models" / name) for root in roots) or "no folder, none is registered"


def model_role(path: Path) -> str | None:
    """``detector``, ``recogniser`` or None for anything else, judged by inputs and outputs, not by the file's name."""
    try:
        stat = path.stat()
        return _role(str(path), stat.st_mtime_ns, stat.st_size)
    except OSError:
        return None


@lru_cache(maxsize=512)
def _role(path: str, _mtime: int, _size: int) -> str | None:
    try:
        return header_role(read_header(Path(path)))
    except (ValueError, OSError):
        return None


def header_role(header: OnnxHeader) -> str | None:
    """Role of a model by its header: see :func:`model_role`."""
    shapes = list(header.inputs.values())
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        return None
    height, width = shapes[0][2:]
    if len(header.outputs) in STRIDES_BY_OUTPUTS:
        return "detector"
    square = height == width and height in RECOGNISER_SIDES and height != LANDMARK_SIDE
    return "recogniser" if square and len(header.outputs) == 1 else None


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(folder for folder in parent.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    except OSError:
        return []


def _read_pack(folder: Path) -> FacePack | None:
    for place in (folder, folder / folder.name):
        try:
            models = sorted(path for path in place.iterdir() if path.suffix == ".onnx")
        except OSError:
            continue
        roles = {role: path for path in reversed(models) if (role := model_role(path)) is not None}
        if "detector" in roles and "recogniser" in roles:
            known = known_pack(folder.name)
            license_text = known.license if known else UNKNOWN_LICENSE
            return FacePack(folder.name, roles["detector"], roles["recogniser"], license_text)
    return None

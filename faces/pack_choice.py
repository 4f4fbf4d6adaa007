"""The drop-down of face packs: what a user reads, what it stands for, and the one place where a pack is downloaded."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .encoder import FaceEncoder
from .install import pip_install
from .opencv_backend import LICENSE as OPENCV_LICENSE
from .opencv_backend import NAME as OPENCV
from .opencv_backend import OpenCvFiles, find_opencv_files, open_opencv_encoder
from .packs import (
    KNOWN_PACKS,
    PUBLISHED_SHA256,
    FacePack,
    KnownPack,
    find_packs,
    known_pack,
    searched_places,
)
from .sessions import file_sha256

logger = logging.getLogger("fusedid")

NOTHING = "choose a face pack"
"""First entry where no pack is on disk, so that nobody downloads by pressing Run on a new node."""
DOWNLOAD = "(download, "
RELEASES = "https://github.com/deepinsight/insightface/releases"
DEFAULT_DET_SIZE = 640


def opencv_folders(roots: Sequence[Path]) -> list[Path]:
    """Where YuNet and SFace are looked for: each face folder, ``opencv`` and ``models/opencv`` in it, or beside it."""
    places = [(root, root / "opencv", root / "models" / "opencv", root.parent / "opencv") for root in roots]
    return [place for group in places for place in group]


def pack_choices(roots: Sequence[Path]) -> list[str]:
    """Entries of the drop-down: packs on disk with their licence, then ``<name> (download, <licence>, <size>)``."""
    packs = find_packs(roots)
    on_disk = [f"{pack.name} ({pack.license})" for pack in packs]
    files = find_opencv_files(opencv_folders(roots))
    if files is not None:
        limit = "" if files.recogniser else "; finds faces only, SFace is missing"
        on_disk.append(f"{OPENCV} ({OPENCV_LICENSE}{limit})")
    missing = [pack for pack in KNOWN_PACKS if pack.name not in {found.name for found in packs}]
    downloads = [f"{pack.name} {DOWNLOAD}{pack.license}, {pack.megabytes} MB)" for pack in missing]
    return [*(on_disk or [NOTHING]), *downloads]


def choice_problem(choice: str, roots: Sequence[Path]) -> str | None:
    """Why a drop-down entry cannot be used here, or None.

    Judged by the pack's name: an entry saved as ``(download, ...)`` stays good once the pack is there, and the other
    way round it is refused, because only a chosen download entry may download.
    """
    name = choice_name(choice)
    if name == OPENCV:
        found = find_opencv_files(opencv_folders(roots)) is not None
    else:
        found = any(pack.name == name for pack in find_packs(roots)) or _wants_download(choice)
    if found:
        return None
    return _missing(name, roots)


def choice_stamp(choice: str, roots: Sequence[Path]) -> str:
    """Changes when the files behind an entry change; empty while they are not there."""
    name = choice_name(choice)
    if name == OPENCV:
        files = find_opencv_files(opencv_folders(roots))
        paths = [path for path in (files.detector, files.recogniser) if path] if files else []
    else:
        pack = _find(name, roots)
        paths = [pack.detector, pack.recogniser] if pack else []
    return "|".join(f"{path}:{path.stat().st_mtime_ns}:{path.stat().st_size}" for path in paths)


def choice_name(choice: str) -> str:
    """The pack's name in a drop-down entry (or the bare name)."""
    return choice.partition(" (")[0].strip()


def open_encoder(
    choice: str, roots: Sequence[Path], *, det_size: int = DEFAULT_DET_SIZE, provider: str = "auto"
) -> FaceEncoder:
    """Open the encoder behind a drop-down entry or a bare pack name.

    Downloads only when the entry is a ``(download, ...)`` one and the pack is not there yet, into the first root.
    Raises ``ValueError`` when the pack is not here, damaged, or the provider does not exist.
    """
    from .insightface_backend import open_pack

    problem = choice_problem(choice, roots)
    if problem:
        raise ValueError(problem)
    name = choice_name(choice)
    if name == OPENCV:
        return open_opencv_encoder(_opencv_files(roots), det_size=det_size)
    pack = _find(name, roots) or download_pack(_known(name), roots[0])
    return open_pack(pack, det_size=det_size, provider=provider)


def download_pack(known: KnownPack, root: Path) -> FacePack:
    """Fetch a pack with insightface's own downloader into ``<root>/models/<name>``; nothing stays behind on failure.

    Only the detector and the recogniser are kept, and only when they are the published ones: the downloader itself
    checks no content.
    """
    try:
        from insightface.utils import ensure_available
    except ImportError as error:
        raise ValueError(
            f"downloading {known.name} needs the insightface package; run: {pip_install('insightface')}. Or unpack "
            f"{known.name}.zip from {RELEASES} into {root / 'models' / known.name}"
        ) from error
    target = root / "models" / known.name
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("Downloading face pack %s (%d MB, %s)", known.name, known.megabytes, known.license)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
        try:
            fetched = Path(ensure_available("models", known.name, root=temporary))
        # The downloader raises RuntimeError, OSError, zip and network errors alike.
        except Exception as error:
            raise ValueError(
                f"downloading {known.name} failed ({error}); try again, or unpack {known.name}.zip from {RELEASES} "
                f"into {target}"
            ) from error
        models = [_genuine(known, fetched, name) for name in (known.detector, known.recogniser)]
        target.mkdir(exist_ok=True)
        for model in models:
            model.replace(target / model.name)
    pack = _find(known.name, [root])
    if pack is None:
        raise ValueError(
            f"the download of {known.name} has no usable detector and recogniser; delete {target} and try again"
        )
    return pack


def _genuine(known: KnownPack, fetched: Path, name: str) -> Path:
    """The downloaded file of that name; ``ValueError`` unless its sha256 is the published one."""
    file = next(iter(sorted(fetched.rglob(name))), None)
    found, wanted = file_sha256(file) if file else "missing", PUBLISHED_SHA256[name]
    if file is None or found != wanted:
        raise ValueError(
            f"what was downloaded as {known.name} is not what InsightFace published, and was deleted: {name} has the "
            f"sha256 {found}, expected {wanted}. Try again on another network, or get {known.name}.zip from {RELEASES}"
        )
    return file


def _missing(name: str, roots: Sequence[Path]) -> str:
    known = known_pack(name)
    if name == NOTHING:
        problem = f"no face pack is chosen (packs are looked for in {searched_places(roots, '<pack>')})"
    else:
        problem = f"the face pack {name!r} is not on this machine (looked in {searched_places(roots, name)})"
    files = f"; it needs {known.detector} and {known.recogniser} there" if known else ""
    download = f"choose '{name} {DOWNLOAD}...)' to download it, or " if known else ""
    choices = [choice for choice in pack_choices(roots) if choice != NOTHING]
    return f"{problem}{files}; {download}choose one of: {'; '.join(choices)}"


def _wants_download(choice: str) -> bool:
    return DOWNLOAD in choice and known_pack(choice_name(choice)) is not None


def _find(name: str, roots: Sequence[Path]) -> FacePack | None:
    return next((pack for pack in find_packs(roots) if pack.name == name), None)


def _known(name: str) -> KnownPack:
    known = known_pack(name)
    assert known is not None, "choice_problem lets only known packs through to the download"
    return known


def _opencv_files(roots: Sequence[Path]) -> OpenCvFiles:
    files = find_opencv_files(opencv_folders(roots))
    assert files is not None, "choice_problem refuses opencv without its files"
    return files

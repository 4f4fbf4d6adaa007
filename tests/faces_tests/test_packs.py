"""Which packs are found where, what the drop-down says, and that nothing is downloaded unless chosen."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from faces.onnx_header import read_header
from faces.pack_choice import NOTHING, choice_problem, open_encoder, pack_choices
from faces.packs import KNOWN_PACKS, PUBLISHED_SHA256, RESEARCH, UNKNOWN_LICENSE, find_packs, known_pack, model_role
from faces.sessions import load_model

CopyPack = Callable[..., Path]
PUBLISHED = dict(PUBLISHED_SHA256)
DETECTOR, RECOGNISER = "det_500m.onnx", "mobilefacenet_ms1m_128d.onnx"


@pytest.fixture
def copy_pack(roots: list[Path], tmp_path: Path) -> CopyPack:
    source = roots[0] / "models" / "test_pack"

    def copy(
        name: str, *, nested: bool = False, files: tuple[str, ...] = (DETECTOR, RECOGNISER), root: str = "r"
    ) -> Path:
        folder = tmp_path / root / "models" / name / (name if nested else "")
        folder.mkdir(parents=True)
        for file in files:
            shutil.copy(source / file, folder / file)
        return tmp_path / root

    return copy


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, roots: list[Path]) -> list[tuple[str, str]]:
    """insightface's downloader, replaced by one that copies the test pack (nested, as antelopev2's zip) and counts.

    The copies have the names of the wished pack's files, and their sha256 counts as the published one.
    """
    calls: list[tuple[str, str]] = []

    def ensure_available(kind: str, name: str, root: str) -> str:
        calls.append((kind, name))
        folder, known, (pack,) = Path(root) / kind / name, known_pack(name), find_packs(roots)
        assert known is not None
        (folder / name).mkdir(parents=True)
        for source, wanted in ((pack.detector, known.detector), (pack.recogniser, known.recogniser)):
            shutil.copy(source, folder / name / wanted)
            monkeypatch.setitem(PUBLISHED_SHA256, wanted, hashlib.sha256(source.read_bytes()).hexdigest())
        (folder / name / "genderage.onnx").write_bytes(b"not used here")
        return str(folder)

    utils = types.ModuleType("insightface.utils")
    utils.ensure_available = ensure_available  # type: ignore[attr-defined]
    package = types.ModuleType("insightface")
    package.utils = utils  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "insightface", package)
    monkeypatch.setitem(sys.modules, "insightface.utils", utils)
    return calls


def test_packs_are_found_flat_and_nested_known_first(copy_pack: CopyPack) -> None:
    copy_pack("zoe")
    copy_pack("antelopev2", nested=True)
    root = copy_pack("buffalo_l")
    found = find_packs([root])
    assert [pack.name for pack in found] == ["buffalo_l", "antelopev2", "zoe"]
    assert [pack.license for pack in found] == [RESEARCH, RESEARCH, UNKNOWN_LICENSE]
    assert found[1].detector == root / "models/antelopev2/antelopev2" / DETECTOR


def test_a_nested_pack_embeds_like_the_flat_one(copy_pack: CopyPack, roots: list[Path]) -> None:
    nested = open_encoder("antelopev2", [copy_pack("antelopev2", nested=True)])
    flat = open_encoder("test_pack", roots)
    assert nested.fingerprint.accepts(flat.fingerprint)
    faces = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
    assert np.array_equal(nested.embed(faces), flat.embed(faces))


def test_half_packs_other_models_and_broken_files_are_no_packs(copy_pack: CopyPack, assets: Path) -> None:
    copy_pack("only_detector", files=(DETECTOR,))
    root = copy_pack("only_recogniser", files=(RECOGNISER,))
    other = root / "models" / "other"
    other.mkdir()
    for model in (assets / "models").glob("*.onnx"):
        shutil.copy(model, other / model.name)
    broken = root / "models" / "broken"
    broken.mkdir()
    (broken / DETECTOR).write_bytes(b"\xff" * 1000)
    (broken / RECOGNISER).write_bytes(b"")
    assert find_packs([root, root / "does not exist"]) == []


def test_the_first_root_wins(copy_pack: CopyPack) -> None:
    first, second = copy_pack("zoe", root="a"), copy_pack("zoe", root="b")
    packs = find_packs([second, first])
    assert len(packs) == 1 and packs[0].detector.is_relative_to(second)


def test_choices_say_licence_and_size_and_start_with_what_is_there(roots: list[Path], tmp_path: Path) -> None:
    choices = pack_choices(roots)
    assert choices[0] == f"test_pack ({UNKNOWN_LICENSE})"
    assert choices[1] == f"buffalo_l (download, {RESEARCH}, 289 MB)"
    assert len(choices) == 1 + len(KNOWN_PACKS)
    assert pack_choices([tmp_path])[0] == NOTHING


def test_opencv_is_a_choice_when_its_files_are_there(assets: Path, tmp_path: Path) -> None:
    shutil.copy(assets / "models" / "face_detection_yunet_2023mar.onnx", tmp_path)
    (choice,) = [choice for choice in pack_choices([tmp_path]) if choice.startswith("opencv")]
    assert "commercial use allowed" in choice and "SFace is missing" in choice
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    assert open_encoder(choice, [tmp_path]).fingerprint.backend == "opencv"


def test_listing_and_opening_never_download(
    downloads: list[tuple[str, str]], roots: list[Path], tmp_path: Path
) -> None:
    pack_choices([tmp_path])
    open_encoder("test_pack (whatever licence)", roots)
    for choice in ("buffalo_l", f"buffalo_l ({RESEARCH})", NOTHING, "nobody (download, free, 1 MB)"):
        with pytest.raises(ValueError, match=r"is not on this machine|no face pack is chosen"):
            open_encoder(choice, [tmp_path])
    assert downloads == []
    assert list(tmp_path.iterdir()) == []


def test_a_chosen_download_happens_once_and_stays_good(downloads: list[tuple[str, str]], tmp_path: Path) -> None:
    choice = next(choice for choice in pack_choices([tmp_path]) if choice.startswith("antelopev2"))
    assert choice_problem(choice, [tmp_path]) is None
    for _ in range(2):
        assert open_encoder(choice, [tmp_path]).fingerprint.name == "antelopev2"
    assert downloads == [("models", "antelopev2")]
    assert choice_problem(choice, [tmp_path]) is None
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    kept = sorted(path.name for path in (tmp_path / "models" / "antelopev2").iterdir())
    assert kept == ["glintr100.onnx", "scrfd_10g_bnkps.onnx"]


def test_the_real_file_has_the_published_sha256(roots: list[Path]) -> None:
    assert hashlib.sha256(find_packs(roots)[0].detector.read_bytes()).hexdigest() == PUBLISHED["det_500m.onnx"]
    needed = {name for known in KNOWN_PACKS for name in (known.detector, known.recogniser)}
    assert set(PUBLISHED) == needed and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in PUBLISHED.values())


@pytest.mark.parametrize("wrong", ["changed", "missing"])
def test_a_download_that_is_not_the_published_one_is_refused_and_deleted(
    downloads: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    utils = sys.modules["insightface.utils"]
    honest = utils.ensure_available

    def tampered(kind: str, name: str, root: str) -> str:
        folder = Path(honest(kind, name, root))
        (file,) = folder.rglob("w600k_mbf.onnx")
        if wrong == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes() + b"x")
        return str(folder)

    monkeypatch.setattr(utils, "ensure_available", tampered)
    with pytest.raises(ValueError, match=r"not what InsightFace published, and was deleted: w600k_mbf\.onnx"):
        open_encoder(f"buffalo_s (download, {RESEARCH}, 128 MB)", [tmp_path])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [] and find_packs([tmp_path]) == []


def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    downloads: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(kind: str, name: str, root: str) -> str:
        (Path(root) / kind / name).mkdir(parents=True)
        raise RuntimeError("Failed downloading url")

    monkeypatch.setattr(sys.modules["insightface.utils"], "ensure_available", fail)
    with pytest.raises(ValueError, match=r"Failed downloading url.*unpack buffalo_s\.zip"):
        open_encoder(f"buffalo_s (download, {RESEARCH}, 128 MB)", [tmp_path])
    assert find_packs([tmp_path]) == []
    assert list(tmp_path.glob(".download-*")) == []


def test_a_download_without_insightface_names_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface.utils", None)
    with pytest.raises(ValueError, match="pip install insightface"):
        open_encoder(f"buffalo_s (download, {RESEARCH}, 128 MB)", [tmp_path])


def test_a_missing_pack_is_refused_with_the_folders_searched(roots: list[Path]) -> None:
    problem = choice_problem("antelopev2 (some licence)", roots)
    assert problem is not None
    assert str(roots[0] / "models" / "antelopev2") in problem
    assert "antelopev2 (download, ...)" in problem and "test_pack" in problem


def test_roles_are_read_from_the_models_not_their_names(roots: list[Path], assets: Path) -> None:
    folder = roots[0] / "models" / "test_pack"
    assert model_role(folder / DETECTOR) == "detector"
    assert model_role(folder / RECOGNISER) == "recogniser"
    assert {model_role(path) for path in (assets / "models").glob("*.onnx")} == {None}


def test_headers_agree_with_the_onnx_package(assets: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    for path in assets.rglob("*.onnx"):
        graph = onnx.load(str(path), load_external_data=False).graph
        header = read_header(path)

        def shapes(values: object) -> dict[str, tuple[int | None, ...]]:
            return {
                value.name: tuple(dim.dim_value or None for dim in value.type.tensor_type.shape.dim)
                for value in values  # type: ignore[attr-defined]
            }

        assert header.inputs == shapes(graph.input)
        assert header.outputs == shapes(graph.output)
        assert header.first_nodes == tuple((node.name, node.op_type) for node in list(graph.node)[:8])


def test_damaged_models_are_value_errors_everywhere(roots: list[Path], tmp_path: Path) -> None:
    data = (roots[0] / "models" / "test_pack" / DETECTOR).read_bytes()
    path = tmp_path / "broken.onnx"
    rng = np.random.default_rng(0)
    variants = [b"", b"\x00" * 64, data[:1000], data[: len(data) // 2], b"<html>not found</html>"]
    variants += [rng.bytes(300) for _ in range(200)]
    for variant in variants:
        path.write_bytes(variant)
        with pytest.raises(ValueError, match="not an ONNX model"):
            read_header(path)
    with pytest.raises(ValueError, match="download it again"):
        load_model(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path / "nothing.onnx")


def test_a_detector_of_one_fixed_size_is_used_at_that_size(
    copy_pack: CopyPack, load: Callable[[str], np.ndarray], roots: list[Path]
) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    root = copy_pack("fixed")
    path = root / "models" / "fixed" / DETECTOR
    model = onnx.load(str(path))
    for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.dim_value = 640
    onnx.save(model, str(path))
    picture = load("group/newton_painting.png")
    fixed, free = open_encoder("fixed", [root]), open_encoder("test_pack", roots)
    found = fixed.detect(picture, 320, 0.5)
    assert np.allclose(found[0].box, free.detect(picture, 640, 0.5)[0].box, atol=1e-3)


def test_no_pack_at_all_says_where_to_put_one(tmp_path: Path) -> None:
    problem = choice_problem(NOTHING, [tmp_path])
    assert problem is not None and problem.startswith("no face pack is chosen")
    assert str(tmp_path / "models") in problem and "buffalo_l (download" in problem
    problem = choice_problem("buffalo_l", [tmp_path])
    assert problem is not None and "it needs det_10g.onnx and w600k_r50.onnx there" in problem

"""The provider is what onnxruntime really has, and a clash of two builds is recognised with its repair."""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from faces import providers, sessions
from faces.providers import available_providers, choose_provider, clash_hint, installed_builds, provider_choices

ROOT = Path(__file__).resolve().parents[2]


def test_choices_are_what_onnxruntime_reports() -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    real = [f"{name}ExecutionProvider" for name in available_providers()]
    assert real == onnxruntime.get_available_providers()
    assert provider_choices() == ["auto", *available_providers()]


@pytest.mark.parametrize(
    ("wanted", "available", "chosen"),
    [
        ("auto", ["Tensorrt", "CUDA", "CPU"], "CUDA"),
        ("auto", ["CoreML", "CPU"], "CPU"),
        ("auto", ["Dml", "CPU"], "Dml"),
        ("auto", ["CPU"], "CPU"),
        ("CPU", ["CUDA", "CPU"], "CPU"),
    ],
)
def test_the_choice_of_a_provider(wanted: str, available: list[str], chosen: str) -> None:
    assert choose_provider(wanted, available) == chosen


def test_a_missing_provider_is_refused_instead_of_silently_being_the_cpu() -> None:
    with pytest.raises(ValueError, match="'CUDA' is not in this onnxruntime, which has CPU"):
        choose_provider("CUDA", ["CPU"])
    with pytest.raises(ValueError, match="not installed or broken"):
        choose_provider("auto", [])


def test_two_builds_over_each_other_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["numpy", "onnxruntime", "onnxruntime_gpu", "onnxruntime-extensions", "onnx", None]
    fake = [SimpleNamespace(metadata={"Name": name}) for name in names]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: fake)
    builds = installed_builds()
    assert builds == ["onnxruntime", "onnxruntime-gpu"]
    hint = clash_hint(builds, ["CPU"])
    assert "only CPU works" in hint
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && " in hint
    assert hint.endswith("pip install onnxruntime-gpu")
    assert clash_hint(["onnxruntime"], ["CPU"]) == ""
    with pytest.raises(ValueError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        choose_provider("CUDA", ["CPU"])


def test_a_provider_whose_libraries_do_not_load_is_reported(
    roots: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real: Any = sessions._create_session
    monkeypatch.setattr(sessions, "_create_session", lambda path, provider: real(path, "CPU"))
    path = roots[0] / "models" / "test_pack" / "det_500m.onnx"
    with caplog.at_level(logging.WARNING, logger="fusedid"):
        model = sessions.OnnxModel(path, "CUDA")
    assert model.provider == "CPU"
    assert "runs on CPU although CUDA was chosen" in caplog.text


def test_one_session_per_file_for_all_threads(roots: list[Path]) -> None:
    sessions.release_models()
    path = roots[0] / "models" / "test_pack" / "det_500m.onnx"
    loaded: list[sessions.OnnxModel] = []
    threads = [threading.Thread(target=lambda: loaded.append(sessions.load_model(path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(model) for model in loaded}) == 1
    assert sessions.release_models() == 1


@pytest.mark.parametrize(("cores", "threads"), [(64, sessions.MAX_THREADS), (2, 2), (None, 1)])
def test_a_session_leaves_cores_to_the_sampler(
    roots: list[Path], monkeypatch: pytest.MonkeyPatch, cores: int | None, threads: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    session = sessions._create_session(roots[0] / "models" / "test_pack" / "det_500m.onnx", "CPU")
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)


def test_sessions_are_bounded(roots: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions.release_models()
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
    data = (roots[0] / "models" / "test_pack" / "det_500m.onnx").read_bytes()
    for number in range(4):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(data)
        sessions.load_model(path)
    assert sessions.release_models() == 2


def test_everything_imports_without_insightface_onnxruntime_and_opencv(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import importlib, pathlib, sys
        for name in ("insightface", "onnxruntime", "cv2", "scipy", "onnx", "skimage"):
            sys.modules[name] = None
        for path in sorted(pathlib.Path("faces").glob("*.py")):
            importlib.import_module("faces." + path.stem)
        from faces.pack_choice import pack_choices, open_encoder
        from faces.providers import provider_choices
        root = pathlib.Path(sys.argv[1])
        assert len(pack_choices([root])) == 6
        assert provider_choices() == ["auto"]
        from faces.sessions import load_model
        try:
            load_model(root)
        except ValueError as error:
            assert "pip install onnxruntime" in str(error), error
        else:
            raise SystemExit("no error")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_embedding_in_a_batch_equals_one_by_one(roots: list[Path]) -> None:
    from faces import arcface
    from faces.onnx_header import read_header

    path = roots[0] / "models" / "test_pack" / "mobilefacenet_ms1m_128d.onnx"
    faces = np.random.default_rng(1).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    model, header = sessions.load_model(path), read_header(path)
    together = arcface.embed(model, header, faces)
    apart = np.concatenate([arcface.embed(model, header, face[None]) for face in faces])
    assert np.array_equal(together, apart)
    assert providers.AUTO == "auto"

"""The doctor reports what is there, what is missing with licence and place, and the exact command that helps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from faces import doctor, install, provider_probe

ROOT = Path(__file__).resolve().parents[1]


def _texts(findings: list[doctor.Finding], level: str) -> str:
    return "\n".join(f"{f.text} | {f.remedy}" for f in findings if f.level == level)


@pytest.mark.parametrize(
    ("system", "machine", "package"),
    [
        ("Linux", "x86_64", "onnxruntime-gpu"),
        ("Windows", "AMD64", "onnxruntime-gpu"),
        ("Darwin", "arm64", "onnxruntime"),
        ("Linux", "aarch64", "onnxruntime"),
    ],
)
def test_the_onnxruntime_build_fits_the_platform(system: str, machine: str, package: str) -> None:
    assert install.onnxruntime_package(system, machine) == package


def test_pip_commands_name_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.sys, "executable", "/opt/my python/bin/python")
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    assert install.pip_install("insightface") == "'/opt/my python/bin/python' -m pip install insightface"
    monkeypatch.setattr(install.sys, "executable", r"C:\ComfyUI portable\python.exe")
    monkeypatch.setattr(install.platform, "system", lambda: "Windows")
    assert install.pip_install("a", upgrade=True) == r'"C:\ComfyUI portable\python.exe" -m pip install -U a'


def test_the_cpu_provider_is_really_in_use() -> None:
    pytest.importorskip("onnxruntime")
    assert provider_probe.providers_in_use(["CPU"]) == {"CPU": "CPU"}


def test_a_provider_that_is_not_there_is_seen_as_such() -> None:
    pytest.importorskip("onnxruntime")
    assert provider_probe.providers_in_use(["NoSuch"])["NoSuch"] != "NoSuch"


def test_two_onnxruntime_builds_are_a_problem_with_its_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_builds", lambda: ["onnxruntime", "onnxruntime-gpu"])
    monkeypatch.setattr(doctor, "providers_in_use", lambda: {"CPU": "CPU"})
    problem = _texts(doctor.provider_findings(), "problem")
    assert "installed over each other; only CPU works" in problem
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && " in problem
    assert problem.endswith("-m pip install onnxruntime-gpu")


def test_a_provider_that_falls_back_to_the_cpu_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_builds", lambda: ["onnxruntime-gpu"])
    monkeypatch.setattr(doctor, "providers_in_use", lambda: {"CUDA": "CPU", "CPU": "CPU"})
    assert "provider CUDA gives CPU" in _texts(doctor.provider_findings(), "problem")


def test_without_onnxruntime_the_command_for_this_platform_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_builds", list)
    monkeypatch.setattr(doctor, "providers_in_use", dict)
    assert install.pip_install(install.onnxruntime_package()) in _texts(doctor.provider_findings(), "problem")


def test_two_opencv_builds_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: "5.0" if name.startswith("opencv-python") else None)
    assert "installed over each other" in _texts(doctor.library_findings(), "problem")


def test_missing_packs_are_named_with_licence_and_place(tmp_path: Path) -> None:
    findings = doctor.pack_findings([tmp_path])
    notes = _texts(findings, "note")
    for name in ("buffalo_l", "antelopev2"):
        assert f"face pack {name} is not here (licence: non-commercial research only" in notes
        assert str(tmp_path / "models" / name) in notes
    assert "face_recognition_sface" in notes
    assert "no face pack found" in _texts(findings, "problem")


@pytest.mark.assets
def test_packs_on_disk_are_listed_with_their_place(assets: Path) -> None:
    findings = doctor.pack_findings([assets / "insightface"])
    assert f"face pack test_pack in {assets / 'insightface' / 'models' / 'test_pack'}" in _texts(findings, "ok")
    assert not _texts(findings, "problem")


def test_roots_are_those_of_the_comfyui_the_pack_lies_in(tmp_path: Path) -> None:
    module = tmp_path / "ComfyUI" / "custom_nodes" / "fusedid" / "faces" / "doctor.py"
    expected = tmp_path / "ComfyUI" / "models" / "insightface"
    assert doctor.default_roots(module)[0] == expected


def test_the_command_line_reports_and_fails_when_something_is_broken(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "faces.doctor", "--root", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1, result.stderr
    assert "Python 3." in result.stdout
    assert "!! no face pack found" in result.stdout


def test_a_healthy_report_ends_with_zero(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda roots: [doctor.Finding("ok", "all well", "")])
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == "ok all well\n"

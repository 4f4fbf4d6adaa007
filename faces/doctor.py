"""`python -m faces.doctor`: what this machine has for faces, what is missing, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .install import onnxruntime_package, pip_install, pip_replace
from .opencv_backend import DETECTOR_PATTERN, RECOGNISER_PATTERN, SOURCE, find_opencv_files
from .opencv_backend import LICENSE as OPENCV_LICENSE
from .pack_choice import RELEASES, opencv_folders
from .packs import KNOWN_PACKS, find_packs
from .provider_probe import providers_in_use
from .providers import choose_provider, installed_builds

LIBRARIES = ("numpy", "pillow", "scipy", "insightface", "onnxruntime", "onnxruntime-gpu", "torch", "safetensors")
OPENCV_BUILDS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
MARKS = {"ok": "ok", "note": "--", "problem": "!!"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. level: `ok`, `note` (something optional is absent) or `problem`. remedy: what to do."""

    level: str
    text: str
    remedy: str = ""


def version_of(distribution: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def library_findings(libraries: Iterable[str] = LIBRARIES) -> list[Finding]:
    """Python, platform and library versions. What is absent and optional is a note; onnxruntime is judged elsewhere."""
    found = [f"{name} {version}" for name in libraries if (version := version_of(name))]
    where = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return [Finding("ok", where), Finding("ok", f"libraries: {', '.join(found) or 'none'}"), _opencv_finding()]


def _opencv_finding() -> Finding:
    builds = [f"{name} {version}" for name in OPENCV_BUILDS if (version := version_of(name))]
    if not builds:
        command = pip_install("opencv-python-headless")
        return Finding("note", "OpenCV is not installed: the opencv face pack cannot be used", command)
    if len(builds) > 1:
        keep = "opencv-contrib-python" if any("contrib" in build for build in builds) else "opencv-python"
        remedy = pip_replace([build.split()[0] for build in builds], keep)
        return Finding("problem", f"{' and '.join(builds)} are installed over each other", remedy)
    return Finding("ok", builds[0])


def provider_findings() -> list[Finding]:
    """onnxruntime: installed or not, two builds over each other, and the provider each session really gets."""
    builds, used = installed_builds(), providers_in_use()
    findings = []
    if len(builds) > 1:
        wanted = next((name for name in builds if name != "onnxruntime"), builds[0])
        text = f"{' and '.join(builds)} are installed over each other; only {', '.join(used) or 'nothing'} works"
        findings.append(Finding("problem", text, pip_replace(builds, wanted)))
    if not used:
        command = pip_install(onnxruntime_package())
        return [*findings, Finding("problem", "onnxruntime is not installed: no face pack but opencv works", command)]
    for asked, got in used.items():
        level, text = (
            ("ok", f"provider {asked} works") if asked == got else ("problem", f"provider {asked} gives {got}")
        )
        remedy = (
            "" if asked == got else "its libraries did not load: install the CUDA and cuDNN versions onnxruntime names"
        )
        findings.append(Finding(level, text, remedy))
    return [*findings, Finding("ok", f"'auto' chooses {choose_provider('auto', list(used))}")]


def pack_findings(roots: Sequence[Path]) -> list[Finding]:
    """Face packs on disk with licence and place, and the published ones that are not there with where they go."""
    packs = find_packs(roots)
    findings = [
        Finding("ok", f"face pack {pack.name} in {pack.detector.parent} (licence: {pack.license})") for pack in packs
    ]
    files = find_opencv_files(opencv_folders(roots))
    if files is not None:
        findings.append(Finding("ok", f"face pack opencv in {files.detector.parent} (licence: {OPENCV_LICENSE})"))
    if not findings:
        searched = ", ".join(str(root) for root in roots) or "no folder"
        findings.append(Finding("problem", f"no face pack found in {searched}", "get one of those below"))
    target = roots[0] if roots else Path("models") / "insightface"
    missing = [known for known in KNOWN_PACKS if known.name not in {pack.name for pack in packs}]
    findings += [
        Finding(
            "note",
            f"face pack {known.name} is not here (licence: {known.license}, {known.megabytes} MB)",
            f"choose it in LoadIdentityEncoder, or unpack {known.name}.zip from {RELEASES} into "
            f"{target / 'models' / known.name}",
        )
        for known in missing
    ]
    return [*findings, *_opencv_model_findings(roots, target)]


def _opencv_model_findings(roots: Sequence[Path], target: Path) -> list[Finding]:
    files = find_opencv_files(opencv_folders(roots))
    absent = [DETECTOR_PATTERN] if files is None else []
    absent += [RECOGNISER_PATTERN] if files is None or files.recogniser is None else []
    place = target / "opencv"
    return [
        Finding("note", f"{pattern} is not here (licence: {OPENCV_LICENSE})", f"put it from {SOURCE} into {place}")
        for pattern in absent
    ]


def diagnose(roots: Sequence[Path]) -> list[Finding]:
    """Everything about faces, in reading order. Never raises for a broken installation: that is what it reports."""
    return [*library_findings(), *provider_findings(), *pack_findings(roots)]


def format_report(findings: Iterable[Finding]) -> str:
    """One line per finding, its remedy indented below."""
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.level]} {finding.text}")
        if finding.remedy:
            lines.append(f"     {finding.remedy}")
    return "\n".join(lines)


def default_roots(start: Path | None = None) -> list[Path]:
    """`models/insightface` of the ComfyUI this pack is installed in, and InsightFace's own folder."""
    pack = (start or Path(__file__)).resolve().parents[1]
    inside = [parent.parent for parent in pack.parents if parent.name == "custom_nodes"]
    return [*(comfy / "models" / "insightface" for comfy in inside), Path.home() / ".insightface"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report; returns 1 when something is broken, else 0."""
    parser = argparse.ArgumentParser(prog="python -m faces.doctor", description=__doc__)
    parser.add_argument(
        "--root",
        action="append",
        type=Path,
        default=[],
        help="folder that holds models/<pack>/*.onnx, such as ComfyUI/models/insightface (may be given several times)",
    )
    roots = parser.parse_args(arguments).root or default_roots()
    findings = diagnose(roots)
    sys.stdout.write(format_report(findings) + "\n")
    return int(any(finding.level == "problem" for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())

"""Fixtures: shared assets, the real ComfyUI in this process, the pack as ComfyUI loads it, small models.

Ends with how many host, assets and browser tests ran, and why others did not.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import dev

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "host"))  # last, so that nothing there can shadow a real module

import comfy_host  # noqa: E402
import cpu_torch  # noqa: E402
import face_pack  # noqa: E402
import live_server  # noqa: E402
import run_counts  # noqa: E402
import small_models as small_models_module  # noqa: E402

cpu_torch.install()
# The same drawn cases in every run, so that an unrelated change never fails by luck, and no clock: machines are busy.
# `--hypothesis-profile=default` draws new ones.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")
TITLES = {"host": "HOST TESTS", "assets": "ASSETS", "browser": "BROWSER"}
counted_tests: dict[str, set[str]] = {marker: set() for marker in TITLES}
"""Node ids of the collected tests by marker; a report's keywords would also match the folder's name."""


def find_assets() -> Path | None:
    """The folder of real face models and photos: FUSEDID_ASSETS, else ../shared/assets beside the repository."""
    folder = Path(os.environ.get("FUSEDID_ASSETS", ROOT.parent / "shared" / "assets"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder with `insightface/models`, `models` and `faces`; skips when it is absent."""
    folder = find_assets()
    if folder is None:
        wanted = os.environ.get("FUSEDID_ASSETS", "../shared/assets")
        pytest.skip(f"no folder {wanted}: set FUSEDID_ASSETS to the real face models and photos")
    return folder


@pytest.fixture(scope="session")
def comfyui_checkout() -> Path:
    """The newest ComfyUI checkout found; skips when there is none."""
    checkouts = dev.find_checkouts()
    if not checkouts:
        pytest.skip(comfy_host.HOW_TO)
    return checkouts[0].path


@pytest.fixture(scope="session")
def comfyui_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base directory that the in-process host and the server share."""
    return comfy_host.make_base(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def comfyui(comfyui_checkout: Path, comfyui_base: Path) -> comfy_host.Host:
    """The real ComfyUI imported in this process, on CPU: `.nodes`, `.node(id)`, `.extra(name)`, `.base`."""
    return comfy_host.import_host(comfyui_checkout, comfyui_base)


@pytest.fixture(scope="session")
def pack(comfyui: comfy_host.Host) -> comfy_host.Pack:
    """This repository, loaded by the host's load_custom_node (`.nodes[id]`, `.submodule("nodes.patch")`, `.module`)."""
    return comfy_host.load_pack(comfyui, ROOT)


@pytest.fixture(scope="session")
def small_models(comfyui_base: Path) -> small_models_module.SmallModels:
    """Random-weight checkpoints in the session's models folder; the `load_` methods also need `comfyui`."""
    return small_models_module.SmallModels(comfyui_base / "models")


@pytest.fixture(scope="session")
def face_models(assets: Path, comfyui_base: Path) -> Path:
    """models/insightface of the session's base directory, with the test pack in it."""
    return face_pack.copy_face_pack(comfyui_base / "models", assets)


@pytest.fixture(scope="session")
def server(comfyui_checkout: Path, comfyui_base: Path) -> Iterator[live_server.LiveServer]:
    """A real ComfyUI server with this pack, in its own process (`.queue(prompt)`, `.object_info()`, `.view(image)`)."""
    running = live_server.start_server(comfyui_checkout, comfyui_base, ROOT)
    yield running
    running.stop()


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever uses a ComfyUI checkout is a host test, whoever uses the assets an assets test."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "comfyui_checkout" in fixtures:
            item.add_marker(pytest.mark.host)
        if "assets" in fixtures:
            item.add_marker(pytest.mark.assets)
    for marker, tests in counted_tests.items():
        tests.update(item.nodeid for item in items if item.get_closest_marker(marker))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says loudly what ran and what did not: a green run without a host or a real face model proves much less."""
    try:
        checkout = next(iter(dev.find_checkouts()), None)
    except SystemExit as error:
        terminalreporter.write_line(f"HOST TESTS: {error}", bold=True, red=True)
        return
    possible = {
        "host": checkout is not None,
        "assets": find_assets() is not None,
        "browser": checkout is not None and shutil.which("chromium") is not None,
    }
    where = f"ComfyUI {checkout.version}" if checkout else "without ComfyUI"
    if checkout and (wrong := comfy_host.foreign_frontend(checkout.path)):
        terminalreporter.write_line(f"WRONG ENVIRONMENT for {where}: {wrong}; use dev.py test", bold=True, red=True)
    for marker, title in TITLES.items():
        ran, skipped = run_counts.run_and_skipped(terminalreporter.stats, counted_tests[marker])
        line = f"{title} ({where}): {run_counts.sentence(ran, skipped)}"
        terminalreporter.write_line(line, bold=True)
        run_counts.tell_dev(line, ran, possible=possible[marker])

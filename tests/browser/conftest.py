"""Fixtures: a headless Chromium per module, a fresh page of the real frontend per test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from frontend import LOAD_MS, VIEW, Frontend, chromium_path, open_browser, ready_for_browsers

HOW_TO = "no Chromium: install one (Debian: apt-get install chromium) or set FUSEDID_CHROMIUM to its program"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser of playwright's; skips without playwright or a Chromium."""
    pytest.importorskip("playwright", reason="pip install playwright to run the browser tests")
    path = chromium_path()
    if path is None:
        pytest.skip(HOW_TO)
    with open_browser(path) as browser:
        yield browser


@pytest.fixture(scope="module")
def english_page(chromium: Any, server: Any) -> Iterator[Frontend]:
    """The loaded frontend; one for all tests of a module, since it takes seconds to load."""
    yield from opened(chromium, server, "en-US")


@pytest.fixture
def frontend(english_page: Frontend) -> Frontend:
    """The frontend with an empty canvas, no dialog and no side bar."""
    english_page.tidy()
    return english_page


@pytest.fixture
def chinese_frontend(chromium: Any, server: Any) -> Iterator[Frontend]:
    """The frontend as a Chinese browser shows it."""
    yield from opened(chromium, server, "zh-CN")


def opened(chromium: Any, server: Any, locale: str) -> Iterator[Frontend]:
    """A page in a browser profile of its own, closed afterwards."""
    ready_for_browsers(server)
    context = chromium.new_context(viewport=VIEW, locale=locale)
    context.set_default_timeout(LOAD_MS)
    frontend = Frontend(context.new_page(), f"http://127.0.0.1:{server.port}/")
    frontend.open()
    yield frontend
    context.close()

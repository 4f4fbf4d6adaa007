"""Fixtures of the training tests: tiny base models on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.append(str(Path(__file__).parent))

import tiny_models

if TYPE_CHECKING:
    from training.cost import Cost


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with the SD1.5 layout (4 sites)."""
    return tiny_models.write_base(tmp_path_factory.mktemp("base") / "tiny-sd15", "sd15")


@pytest.fixture(scope="session")
def tiny_base_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with the SDXL layout: two text encoders, added conditions."""
    return tiny_models.write_base(tmp_path_factory.mktemp("base") / "tiny-sdxl", "sdxl")


@pytest.fixture(scope="session")
def sd15_cost() -> Cost:
    """The calculated cost of SD1.5 at 512 pixels; takes some seconds."""
    from training.cost import cost

    return cost("sd15", 512)


@pytest.fixture(autouse=True)
def fresh_engine():
    """accelerate keeps its settings per process; every test starts without them."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)

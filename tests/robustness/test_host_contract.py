"""A change in ComfyUI fails here, by name, before it fails a user. How to record a version: see host_contract.py."""

from __future__ import annotations

from typing import Any

import jobs
import pytest
from fusion_lab import FusionLab
from host_contract import changes, contract, recorded_contracts

HOW_TO = "python dev.py host --comfyui PATH"
OPTIONS_WE_READ = {
    "attn2_replace": {"n_heads", "activations_shape", "cond_or_uncond", "sigmas", "uuids", "block", "block_index"},
    "attn1_replace": {"n_heads", "activations_shape", "uuids", "block", "block_index"},
    "attn2_patch": {"block", "block_index"},
}
COND_WE_READ = {"uuid", "area"}


@pytest.fixture(scope="module")
def found(pack: Any, small_models: Any) -> dict[str, Any]:
    return contract(FusionLab(pack, small_models, jobs.LAYOUT))


def test_the_oldest_and_a_newer_host_are_recorded() -> None:
    versions = list(recorded_contracts())
    assert versions[0] == "0.3.64" and len(versions) >= 2


def test_the_host_is_as_recorded(found: dict[str, Any], comfyui: Any) -> None:
    """A recorded version is exactly so; of an unknown one everything recorded last is still there."""
    versions = recorded_contracts()
    recorded = versions.get(comfyui.version) or list(versions.values())[-1]
    lines = changes(recorded, found, only_missing=comfyui.version not in versions)
    assert not lines, f"ComfyUI {comfyui.version} differs from the record ({HOW_TO}):\n" + "\n".join(lines)


@pytest.mark.parametrize("version", list(recorded_contracts()))
def test_every_recorded_host_has_what_the_layers_read(version: str) -> None:
    recorded = recorded_contracts()[version]
    for call, wanted in OPTIONS_WE_READ.items():
        assert wanted <= set(recorded["calls"][call]["options"]), (version, call)
    assert set(recorded["calls"]["CALC_COND_BATCH"]["cond"]) >= COND_WE_READ
    assert recorded["calls"]["CALC_COND_BATCH"]["area"] == "tuple[int] * 4"
    assert recorded["calls"]["attn2_replace"]["options"]["activations_shape"] == "list[int] * 4"


def test_a_change_is_told_by_name() -> None:
    record = {"signatures": {"f": ["a", "b="]}, "calls": {"x": "Tensor[1]"}}
    newer = {"signatures": {"f": ["a", "b=", "c="]}, "calls": {"x": "Tensor[1]", "y": "int"}}
    assert changes(record, newer, only_missing=True) == []
    assert changes(record, newer, only_missing=False) == [
        "/signatures/f: was ['a', 'b='], is ['a', 'b=', 'c=']",
        "/calls/y is new",
    ]
    older = {"signatures": {"f": ["a"]}, "calls": {}}
    assert changes(record, older, only_missing=True) == ["/signatures/f: b= is gone", "/calls/x is gone"]

"""A change in ComfyUI fails here, by name, before it fails a user. How to record a version: see host_contract.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from host_contract import changes, missing, recorded_contracts

HOW_TO = "python dev.py host --comfyui PATH"


@pytest.fixture(scope="module")
def found(comfyui_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own: node packs that other tests load exchange functions of the host."""
    folder = tmp_path_factory.mktemp("contract")
    script = Path(__file__).with_name("host_contract.py")
    done = subprocess.run(
        [sys.executable, str(script), "--comfyui", str(comfyui_checkout), "--into", str(folder)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = folder.glob("*.json")
    return json.loads(record.read_text(encoding="utf-8"))


def test_the_supported_and_the_present_hosts_are_recorded() -> None:
    assert list(recorded_contracts()) == ["0.3.64", "0.8.0", "0.28.0", "0.33.0"]


def test_the_host_is_as_recorded(found: dict[str, Any], comfyui: Any) -> None:
    """A recorded version is exactly so; of an unknown one everything recorded last is still there."""
    versions = recorded_contracts()
    recorded = versions.get(comfyui.version) or list(versions.values())[-1]
    lines = changes(recorded, found, only_missing=comfyui.version not in versions)
    assert not lines, f"ComfyUI {comfyui.version} differs from the record ({HOW_TO}):\n" + "\n".join(lines)


@pytest.mark.parametrize("version", list(recorded_contracts()))
def test_every_recorded_host_has_what_we_rely_on(version: str) -> None:
    recorded = recorded_contracts()[version]
    assert missing(recorded, version) == []
    calls = recorded["calls"]
    assert calls["CALC_COND_BATCH"]["area"] == "tuple[int] * 4"
    assert calls["attn2_replace"]["options"]["activations_shape"] == "list[int] * 4"
    assert calls["OUTER_SAMPLE"]["class_obj"] == "CFGGuider"


def test_what_a_host_lacks_is_told_unless_it_is_known_to_come_later() -> None:
    recorded = recorded_contracts()["0.33.0"]
    recorded["attributes"]["weight hook"].remove("weights")
    del recorded["calls"]["OUTER_SAMPLE"]["cond"]["uuid"]
    del recorded["signatures"]["comfy.model_patcher.ModelPatcher.is_dynamic"]
    later = "comfy.model_patcher.ModelPatcher.is_dynamic"
    assert missing(recorded, "0.33.0") == [later, "weight hook.weights", "OUTER_SAMPLE/cond/uuid"]
    assert later not in missing(recorded, "0.8.0")


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

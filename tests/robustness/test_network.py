"""No node of the pack connects anywhere, unless a download entry is chosen."""

from __future__ import annotations

import ast
import inspect
import socket
from typing import Any

import guard
import peer_ours
import pytest
import test_hostile_values as values
from fusion_lab import FusionLab


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, "sd15_tiny")


def test_every_node_of_the_pack_runs_under_the_guard(pack: Any) -> None:
    """test_hostile_values runs them all but the doctor (below) with the network forbidden."""
    text = {node.value for node in ast.walk(ast.parse(inspect.getsource(values))) if isinstance(node, ast.Constant)}
    assert set(pack.nodes) - {name for name in text if isinstance(name, str)} == {"FusedIDDoctor"}


def test_the_doctor_looks_only_at_this_machine(pack: Any, lab: FusionLab) -> None:
    with guard.forbidden(*guard.NETWORK):
        assert "layers" in peer_ours.run_node(pack.nodes["FusedIDDoctor"], model=lab.model)[0]


def test_loading_and_listing_the_pack_connects_nowhere(pack: Any) -> None:
    with guard.forbidden(*guard.NETWORK, "os.system", "os.exec"):
        for node in pack.nodes.values():
            node.GET_SCHEMA()


def test_a_chosen_download_does_connect(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the guard sees what the one permitted node does, and nothing is kept when it fails."""
    pytest.importorskip("insightface.utils", reason="its downloader")

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", offline)
    node, folder = pack.nodes["LoadIdentityEncoder"], pack.host.base / "models" / "insightface"
    before = sorted(folder.rglob("*.onnx"))
    declared = node.INPUT_TYPES()["required"]["face_pack"]
    options = declared[0] if isinstance(declared[0], list) else declared[1]["options"]
    choice = next(option for option in options if option.startswith("buffalo_sc (download"))
    refused = pytest.raises(ValueError, match="LoadIdentityEncoder: downloading buffalo_sc failed")
    with pytest.raises(AssertionError, match="hostile input caused"), guard.forbidden(*guard.NETWORK), refused:
        peer_ours.run_node(node, face_pack=choice)
    assert sorted(folder.rglob("*.onnx")) == before

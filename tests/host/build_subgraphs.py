"""`python dev.py subgraphs --comfyui PATH`: writes the two subgraph blueprints that the node library offers.

A blueprint is a workflow of one node whose inside is a graph of ours. `INPUT` as the source of a link stands for an
input of the blueprint.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from build_workflows import write  # noqa: E402
from comfy_host import make_base  # noqa: E402
from live_server import start_server  # noqa: E402
from workflow_forms import NODE_WIDTH, WIDGET_TYPES, Api, Schemas, completed, ui_from_api  # noqa: E402

PLACE = ROOT / "subgraphs"
INPUT, INPUT_NODE, OUTPUT_NODE = "input", -10, -20
ADAPTER, PACK = "training-free", "buffalo_l (non-commercial research only)"


@dataclass(frozen=True)
class Blueprint:
    """`inputs`: (name, type) in order. `outputs`: (name, node, output number)."""

    name: str
    api: Api
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str, int], ...]


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _face(image: str, name: str) -> dict[str, Any]:
    return _node("FaceEmbed", encoder=["1", 0], image=[INPUT, image], name=name)


def _patch(**person: Any) -> dict[str, Any]:
    wired = {"model": [INPUT, "model"], "vae": [INPUT, "vae"], "adapter": [INPUT, "adapter"]}
    return _node("FusedIDAttentionPatch", **wired, strength=[INPUT, "strength"], **person)


ENCODER = _node("LoadIdentityEncoder", face_pack=[INPUT, "face_pack"])
MODEL_INPUTS = (("model", "MODEL"), ("vae", "VAE"))
WIDGET_INPUTS = (("face_pack", "COMBO"), ("adapter", "COMBO"), ("strength", "FLOAT"))
BLUEPRINTS = (
    Blueprint(
        "FusedID One Person",
        {"1": ENCODER, "2": _face("photo", ""), "3": _patch(identity=["2", 0])},
        (*MODEL_INPUTS, ("photo", "IMAGE"), *WIDGET_INPUTS),
        (("model", "3", 0), ("preview", "2", 1), ("report", "3", 1)),
    ),
    Blueprint(
        "FusedID Two People",
        {
            "1": ENCODER,
            "2": _face("photo_a", "A"),
            "3": _face("photo_b", "B"),
            "4": _node("MultiIDMaskRouter", identity=["2", 0]),
            "5": _node(
                "MultiIDMaskRouter",
                identity=["3", 0], routed=["4", 0], content=[INPUT, "content"], encoder=["1", 0],
            ),
            "6": _patch(routed=["5", 0]),
        },
        (*MODEL_INPUTS, ("photo_a", "IMAGE"), ("photo_b", "IMAGE"), ("content", "IMAGE"), *WIDGET_INPUTS),
        (("model", "6", 0), ("preview", "5", 1), ("report", "6", 1)),
    ),
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Writes every blueprint."""
    parser = argparse.ArgumentParser(prog="dev.py subgraphs", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout; only read")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fusedid-subgraphs-", ignore_cleanup_errors=True) as folder:
        server = start_server(options.comfyui.resolve(), make_base(Path(folder)), ROOT)
        try:
            schemas = server.object_info()
        finally:
            server.stop()
    PLACE.mkdir(exist_ok=True)
    for blueprint in BLUEPRINTS:
        write(PLACE / f"{blueprint.name}.json", blueprint_form(blueprint, schemas))
    return 0


def blueprint_form(blueprint: Blueprint, schemas: Schemas) -> dict[str, Any]:
    """The workflow with one node that the frontend opens."""
    own_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"fusedid/subgraphs/{blueprint.name}"))
    outer = {
        "id": 1,
        "type": own_id,
        "pos": [0, 0],
        "size": [NODE_WIDTH, 240],
        "flags": {},
        "order": 0,
        "mode": 0,
        "title": blueprint.name,
        "inputs": [_outer_input(name, kind) for name, kind in blueprint.inputs],
        "outputs": [
            {"name": name, "type": _type(blueprint, schemas, name), "links": []} for name, *_ in blueprint.outputs
        ],
        "properties": {},
        "widgets_values": [],
    }
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"fusedid/blueprints/{blueprint.name}")),
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [outer],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [_inside(blueprint, schemas, own_id)]},
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _outer_input(name: str, kind: str) -> dict[str, Any]:
    widget = {"widget": {"name": name}} if kind in WIDGET_TYPES else {}
    return {"name": name, "type": kind, "link": None, **widget}


def _type(blueprint: Blueprint, schemas: Schemas, output: str) -> str:
    node, slot = next((node, slot) for name, node, slot in blueprint.outputs if name == output)
    return schemas[blueprint.api[node]["class_type"]]["output"][slot]


def _inside(blueprint: Blueprint, schemas: Schemas, own_id: str) -> dict[str, Any]:
    """The graph inside, its links as objects, with those from its inputs and to its outputs."""
    from_input = {
        (key, name): value[1]
        for key, entry in blueprint.api.items()
        for name, value in entry["inputs"].items()
        if isinstance(value, list) and value[0] == INPUT
    }
    ui = ui_from_api(completed(_without(blueprint.api, from_input), schemas), schemas)
    nodes = {str(node["id"]): node for node in ui["nodes"]}
    links = [
        dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), row)) for row in ui["links"]
    ]
    used: dict[str, list[int]] = {}

    def add(origin: int, origin_slot: int, target: int, target_slot: int, kind: str) -> int:
        number = len(links) + 1
        links.append({
            "id": number, "origin_id": origin, "origin_slot": origin_slot, "target_id": target,
            "target_slot": target_slot, "type": kind,
        })  # fmt: skip
        return number

    order = [name for name, _ in blueprint.inputs]
    for (key, name), given in from_input.items():
        slot, socket = next((i, s) for i, s in enumerate(nodes[key]["inputs"]) if s["name"] == name)
        socket["link"] = add(INPUT_NODE, order.index(given), int(key), slot, socket["type"])
        used.setdefault(given, []).append(socket["link"])
    outputs = []
    for number, (name, key, slot) in enumerate(blueprint.outputs):
        kind = _type(blueprint, schemas, name)
        link = add(int(key), slot, OUTPUT_NODE, number, kind)
        nodes[key]["outputs"][slot]["links"] = [*(nodes[key]["outputs"][slot]["links"] or []), link]
        outputs.append(_socket(own_id, name, kind, [link]))
    right = max(node["pos"][0] + node["size"][0] for node in ui["nodes"])
    return {
        "id": own_id,
        "version": 1,
        "state": {
            "lastGroupId": 0, "lastNodeId": ui["last_node_id"], "lastLinkId": len(links), "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "inputNode": {"id": INPUT_NODE, "bounding": [-220, 0, 120, 40 + 20 * len(order)]},
        "outputNode": {"id": OUTPUT_NODE, "bounding": [right + 80, 0, 120, 100]},
        "inputs": [_socket(own_id, name, kind, used[name]) for name, kind in blueprint.inputs],
        "outputs": outputs,
        "widgets": [],
        "nodes": ui["nodes"],
        "groups": [],
        "links": links,
        "extra": {},
    }  # fmt: skip


def _socket(own_id: str, name: str, kind: str, links: list[int]) -> dict[str, Any]:
    number = str(uuid.uuid5(uuid.UUID(own_id), f"{name} {kind} {links}"))
    return {"id": number, "name": name, "type": kind, "linkIds": links, "pos": [0, 0]}


def _without(api: Api, from_input: dict[tuple[str, str], str]) -> Api:
    """The API form without the links from the blueprint's inputs; widgets among them get a plain value."""
    defaults = {"adapter": ADAPTER, "face_pack": PACK}
    result = {}
    for key, entry in api.items():
        kept = {name: value for name, value in entry["inputs"].items() if (key, name) not in from_input}
        given = {name: defaults[name] for (node, name) in from_input if node == key and name in defaults}
        result[key] = {**entry, "inputs": kept | given}
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

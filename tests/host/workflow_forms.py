"""The two forms of an example workflow: API (what the server runs) and UI (what the template browser opens).

The API form is written by hand; `_meta` of a node may hold `title` and `pos` [x, y]. The UI form is made from it and
from the server's node schemas, and `api_from_ui` goes back as the frontend does when it queues, so that a test can
show that both are the same workflow.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = {"seed", "noise_seed"}
NODE_WIDTH, COLUMN, ROW = 320, 380, 60
TITLE_HEIGHT, SLOT_HEIGHT, WIDGET_HEIGHT, TEXT_HEIGHT, PICTURE_HEIGHT = 30, 20, 24, 120, 264
FRAME_HEIGHT, WIDGETS_FRAME_HEIGHT = 6, 8
PICTURE_NODES = {"LoadImage", "PreviewImage", "SaveImage", "FusedIDAttentionMap"}
TEXT_NODES = {"PreviewAny", "FusedIDDoctor", "FusedIDFaceSimilarity", "FusedIDSaveIdentity"}
NOTE_SIZE = (440, 420)
NOTE_TYPES = {"MarkdownNote", "Note"}
FILE_INPUTS = {
    *("ckpt_name", "image", "pack", "face_pack", "adapter", "vae_name", "lora_name", "clip_name", "guidance"),
    *("control_net_name", "folder", "identity_file"),
}

Api = dict[str, dict[str, Any]]
Schemas = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class InputSpec:
    """One input of a node: `is_widget` when it is edited on the node, `options` its settings."""

    name: str
    type: str
    is_widget: bool
    required: bool
    options: dict[str, Any]

    @property
    def default(self) -> Any:
        """The value of an untouched widget; None when there is none."""
        choices = self.options.get("options") or [None]
        return self.options.get("default", choices[0])

    @property
    def follow_ups(self) -> list[str]:
        """Values of the extra widgets the frontend puts behind this one."""
        if self.type == "INT" and (self.options.get("control_after_generate") or self.name in SEEDS):
            return ["fixed"]
        return ["image"] if self.options.get("image_upload") else []


def input_specs(schema: dict[str, Any]) -> list[InputSpec]:
    """Inputs of a node in the order of its schema, from `/object_info`."""
    specs = []
    for group in ("required", "optional"):
        for name, (kind, *rest) in schema["input"].get(group, {}).items():
            options = dict(rest[0]) if rest else {}
            type_name = "COMBO" if isinstance(kind, list) else kind
            if isinstance(kind, list):
                options["options"] = kind
            is_widget = type_name in WIDGET_TYPES and not options.get("forceInput")
            specs.append(InputSpec(name, type_name, is_widget, group == "required", options))
    return specs


def with_inputs(api: Api, changes: dict[str, dict[str, Any]]) -> Api:
    """A copy in which inputs are replaced in every node of a class: `{"KSampler": {"steps": 2}}`."""
    return {
        key: {**entry, "inputs": {**entry["inputs"], **changes.get(entry["class_type"], {})}}
        for key, entry in api.items()
    }


def completed(api: Api, schemas: Schemas) -> Api:
    """A copy in which widgets that were left out have their node's default, behind what was given."""
    result = {}
    for key, entry in api.items():
        widgets = [spec for spec in input_specs(schemas[entry["class_type"]]) if spec.is_widget]
        defaults = {spec.name: spec.default for spec in widgets if spec.default is not None}
        missing = {name: value for name, value in defaults.items() if name not in entry["inputs"]}
        result[key] = {**entry, "inputs": {**entry["inputs"], **missing}}
    return result


def faults(api: Api, schemas: Schemas) -> list[str]:
    """What a server would refuse: unknown nodes and inputs, wrong links, values out of range or not in the list.

    Lists of files differ between machines and are not compared.
    """
    found = []
    for key, entry in api.items():
        schema = schemas.get(entry["class_type"])
        if schema is None:
            found.append(f"{key}: no node {entry['class_type']}")
            continue
        specs = {spec.name: spec for spec in input_specs(schema)}
        given = entry["inputs"]
        found += [f"{key}: {entry['class_type']} has no input {name}" for name in given if name not in specs]
        found += [f"{key}: {name} is missing" for name, spec in specs.items() if spec.required and name not in given]
        for name, value in given.items():
            if name in specs:
                problem = _problem(value, specs[name], api, schemas)
                found += [f"{key}: {entry['class_type']}.{name} {problem}"] if problem else []
    return found


def _problem(value: Any, spec: InputSpec, api: Api, schemas: Schemas) -> str | None:
    if is_link(value):
        source = api.get(value[0])
        outputs = schemas[source["class_type"]]["output"] if source else []
        kind = outputs[value[1]] if value[1] < len(outputs) else "nothing"
        return None if kind in spec.type.split(",") or "*" in (kind, spec.type) else f"is linked to {kind}"
    if spec.type in ("INT", "FLOAT"):
        low, high = spec.options.get("min", value), spec.options.get("max", value)
        return None if low <= value <= high else f"is {value}, not in [{low}, {high}]"
    if spec.type == "COMBO" and not _lists_files(spec):
        choices = spec.options.get("options", [])
        return None if value in choices else f"is {value!r}, not in {choices}"
    return None if spec.is_widget else "is no link"


def _lists_files(spec: InputSpec) -> bool:
    return spec.name in FILE_INPUTS


def is_link(value: Any) -> bool:
    """Links in API form are [node id, output number]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def ui_from_api(api: Api, schemas: Schemas, *, note: str = "", name: str = "") -> dict[str, Any]:
    """The UI form: places nodes in columns by their depth unless `_meta.pos` says where; adds a note when given."""
    numbers = {key: int(key) for key in api}
    links: list[list[Any]] = []
    nodes = []
    places = _places(api, schemas)
    for order, key in enumerate(sorted(api, key=lambda key: (_depth(api, key), numbers[key]))):
        entry = api[key]
        node = _ui_node(entry, schemas[entry["class_type"]], numbers[key], places[key], order)
        for slot, socket in enumerate(node["inputs"]):
            value = entry["inputs"].get(socket["name"])
            if is_link(value):
                source, output = value
                socket["link"] = len(links) + 1
                links.append([socket["link"], numbers[source], output, numbers[key], slot, socket["type"]])
        nodes.append(node)
    _fill_outputs(nodes, links)
    last_node = max(numbers.values())
    if note:
        last_node += 1
        nodes.append(_note(last_node, note, len(nodes)))
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"fusedid/{name}")),
        "revision": 0,
        "last_node_id": last_node,
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def api_from_ui(ui: dict[str, Any], schemas: Schemas) -> Api:
    """The prompt that the frontend would queue for a UI form, without `_meta`.

    Widgets that were added to a node after the form was saved have their default, as in the frontend.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    api: Api = {}
    for node in ui["nodes"]:
        if node["type"] in NOTE_TYPES:
            continue
        values = iter(node.get("widgets_values", []))
        linked = {socket["name"]: sources[socket["link"]] for socket in node["inputs"] if socket["link"] is not None}
        inputs: dict[str, Any] = {}
        for spec in input_specs(schemas[node["type"]]):
            if spec.is_widget:
                inputs[spec.name] = next(values, spec.default)
                for _ in spec.follow_ups:
                    next(values, None)
            if spec.name in linked:
                inputs[spec.name] = linked[spec.name]
        api[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return api


def _ui_node(entry: dict[str, Any], schema: dict[str, Any], number: int, pos: list[int], order: int) -> dict[str, Any]:
    specs = input_specs(schema)
    inputs = [{"name": spec.name, "type": spec.type, "link": None} for spec in specs if not spec.is_widget]
    inputs += [
        {"name": spec.name, "type": spec.type, "widget": {"name": spec.name}, "link": None}
        for spec in specs
        if spec.is_widget
    ]
    widgets: list[Any] = []
    for spec in specs:
        if spec.is_widget:
            value = entry["inputs"].get(spec.name)
            widgets += [spec.default if value is None or is_link(value) else value, *spec.follow_ups]
    names = schema.get("output_name") or schema["output"]
    outputs = [
        {"name": name, "type": kind, "links": None, "slot_index": slot}
        for slot, (name, kind) in enumerate(zip(names, schema["output"]))
    ]
    node = {
        "id": number,
        "type": entry["class_type"],
        "pos": pos,
        "size": [NODE_WIDTH, node_height(entry["class_type"], schema)],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        "properties": {"Node name for S&R": entry["class_type"]},
        "widgets_values": widgets,
    }
    title = entry.get("_meta", {}).get("title")
    return {**node, "title": title} if title else node


def _fill_outputs(nodes: list[dict[str, Any]], links: list[list[Any]]) -> None:
    by_number = {node["id"]: node for node in nodes}
    for link, source, output, *_ in links:
        socket = by_number[source]["outputs"][output]
        socket["links"] = [*(socket["links"] or []), link]


def _note(number: int, text: str, order: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [-NOTE_SIZE[0] - ROW, 0],
        "size": list(NOTE_SIZE),
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
        "title": "What this does",
    }


def _depth(api: Api, key: str) -> int:
    sources = _sources(api, key)
    return 1 + max((_depth(api, source) for source in sources), default=-1)


def _sources(api: Api, key: str) -> list[str]:
    return [value[0] for value in api[key]["inputs"].values() if is_link(value)]


def _column(api: Api, key: str) -> int:
    """The depth; nodes without inputs stand just before the first node that uses them."""
    users = [_depth(api, user) for user in api if key in _sources(api, user)]
    return min(users, default=1) - 1 if not _sources(api, key) else _depth(api, key)


def node_height(node_type: str, schema: dict[str, Any]) -> int:
    """Pixels that the classic canvas gives a node without its title, with room for its picture or text.

    It folds nothing, so inputs marked as advanced count. Nodes 2.0 need at most `ROW` more while they are folded.
    """
    specs = input_specs(schema)
    widgets = [spec for spec in specs if spec.is_widget]
    texts = sum(bool(spec.options.get("multiline")) for spec in widgets) + (node_type in TEXT_NODES)
    slots = max(len(specs) - len(widgets), len(schema["output"]), 1)
    rows = sum(1 + len(spec.follow_ups) for spec in widgets)
    height = FRAME_HEIGHT + slots * SLOT_HEIGHT + texts * TEXT_HEIGHT + PICTURE_HEIGHT * (node_type in PICTURE_NODES)
    return height + (WIDGETS_FRAME_HEIGHT + rows * WIDGET_HEIGHT if rows else 0)


def _places(api: Api, schemas: Schemas) -> dict[str, list[int]]:
    """Columns from left to right in the order of work, rows stacked; `_meta.pos` wins."""
    heights: dict[int, int] = {}
    places = {}
    for key, entry in api.items():
        column = _column(api, key)
        height = heights.get(column, 0)
        places[key] = entry.get("_meta", {}).get("pos") or [column * COLUMN, height]
        node_type = entry["class_type"]
        heights[column] = height + TITLE_HEIGHT + node_height(node_type, schemas[node_type]) + ROW
    return places

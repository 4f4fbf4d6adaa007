"""What a saved workflow relies on, per node: inputs in order with types, defaults, choices, ranges; outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from help_lists import FILES
from workflow_forms import FILE_INPUTS, InputSpec, input_specs

PINNED = Path(__file__).resolve().parents[1] / "data" / "node_contract.json"
BY_MACHINE = FILES | FILE_INPUTS

Contract = dict[str, Any]


def pinned() -> dict[str, Contract]:
    """The contract as it was promised; empty before the first one."""
    return json.loads(PINNED.read_text(encoding="utf-8")) if PINNED.exists() else {}


def contract_of(schema: dict[str, Any]) -> Contract:
    """The contract of one node from `/object_info`."""
    names = schema.get("output_name") or schema["output"]
    return {
        "inputs": [_input(spec) for spec in input_specs(schema)],
        "outputs": [list(pair) for pair in zip(names, schema["output"])],
    }


def _input(spec: InputSpec) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": spec.name, "type": spec.type, "required": spec.required}
    if not spec.is_widget or spec.name in BY_MACHINE:
        return entry
    entry["default"] = spec.default
    if spec.type == "COMBO":
        entry["choices"] = list(spec.options["options"])
    if spec.type in ("INT", "FLOAT"):
        entry["range"] = [spec.options["min"], spec.options["max"]]
    return entry


def broken(old: dict[str, Contract], new: dict[str, Contract]) -> list[str]:
    """How `new` breaks a workflow that was saved with `old`; additions at the end do not."""
    found = [f"node {name} is gone" for name in old if name not in new]
    for name in old.keys() & new.keys():
        found += [f"{name}: {problem}" for problem in _node_problems(old[name], new[name])]
    return sorted(found)


def _node_problems(old: Contract, new: Contract) -> list[str]:
    found = []
    if new["outputs"][: len(old["outputs"])] != old["outputs"]:
        found.append(f"outputs were {old['outputs']}, are {new['outputs']}")
    names = [[entry["name"] for entry in contract["inputs"]] for contract in (old, new)]
    if names[1][: len(names[0])] != names[0]:
        found.append(f"inputs were {names[0]}, are {names[1]}")
        return found
    for was, now in zip(old["inputs"], new["inputs"]):
        found += [f"{was['name']}: {problem}" for problem in _input_problems(was, now)]
    added = new["inputs"][len(old["inputs"]) :]
    return found + [f"the new input {entry['name']} is required" for entry in added if entry["required"]]


def _input_problems(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = [
        f"{key} was {was[key]!r}, is {now.get(key)!r}"
        for key in ("type", "default")
        if key in was and was[key] != now.get(key)
    ]
    if now["required"] and not was["required"]:
        found.append("was optional, is required")
    if lost := [choice for choice in was.get("choices", []) if choice not in now.get("choices", [])]:
        found.append(f"lost the choices {lost}")
    if "range" in was and not (now["range"][0] <= was["range"][0] and was["range"][1] <= now["range"][1]):
        found.append(f"range was {was['range']}, is {now['range']}")
    return found

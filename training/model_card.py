"""The README of a published model: what it is, how to use it, how it was made, under which licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

SETTINGS = ("base", "base_checkpoint", "base_hash", "timestep", "text", "length", "combine", "reference_size")
TRAINING = ("samples_seen", "training_steps", "training_config_hash", "data_fingerprint", "encoder", "code_revision")


@dataclass(frozen=True, kw_only=True)
class CardParts:
    """What a card is made from; empty parts are left out, except the evaluation, whose absence is said."""

    title: str
    file_name: str
    license: str
    metadata: Mapping[str, str]
    data_report: str = ""
    evaluation: str = ""


def model_card(parts: CardParts) -> str:
    """Markdown with the front matter that model hubs read."""
    sections = [
        _front_matter(parts),
        f"# {parts.title}\n\n{_summary(parts)}",
        f"## Use\n\n{_use(parts)}",
        f"## Settings\n\n{_table(parts.metadata, SETTINGS)}",
        f"## Training\n\n{_table(parts.metadata, TRAINING)}\n\n{_config(parts.metadata)}",
        f"## Evaluation\n\n{parts.evaluation or 'Not evaluated.'}",
        _nested(parts.data_report),
        f"## Licence and consent\n\n{_licence(parts)}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(parts: CardParts) -> str:
    base = parts.metadata.get("fusedid.base_checkpoint", "")
    lines = ["---", f"license: {json.dumps(parts.license)}", "library_name: fusedid"]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    return "\n".join([*lines, "tags: [comfyui, fusedid, identity]", "---"])


def _summary(parts: CardParts) -> str:
    kind = parts.metadata.get("fusedid.kind", "fusion")
    if kind == "guidance":
        return "Hybrid guidance weights for FusedID: style and identity steer the image without tuning."
    return "A fusion adapter for FusedID: one softmax over text and face keys shows a person without tuning."


def _use(parts: CardParts) -> str:
    base = parts.metadata.get("fusedid.base_checkpoint", "BASE")
    return (
        f"ComfyUI: put `{parts.file_name}` into `models/fusedid/` and choose it in the FusedID node.\n\n"
        "Without ComfyUI, from a checkout of FusedID:\n\n"
        f"```\npython -m training.sample --base {base} --adapter {parts.file_name} "
        '--face person.jpg --prompt "a portrait"\n```'
    )


def _table(metadata: Mapping[str, str], names: tuple[str, ...]) -> str:
    rows = [f"| {name} | `{metadata[f'fusedid.{name}']}` |" for name in names if metadata.get(f"fusedid.{name}")]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _config(metadata: Mapping[str, str]) -> str:
    text = metadata.get("fusedid.training_config")
    if not text:
        return ""
    pretty = json.dumps(json.loads(text), indent=2, sort_keys=True)
    versions = metadata.get("fusedid.versions", "{}")
    body = f"```json\n{pretty}\n```\n\nVersions: `{versions}`"
    return f"<details><summary>Whole configuration</summary>\n\n{body}\n\n</details>"


def _nested(report: str) -> str:
    """The report's headings one level down, so that they do not compete with the card's."""
    lines = (f"#{line}" if line.startswith("#") else line for line in report.strip().splitlines())
    return "\n".join(line for line in lines if not line.startswith("!["))


def _licence(parts: CardParts) -> str:
    return (
        f"Weights: {parts.license}. The base model's licence applies to what is made with it.\n\n"
        "Show only people who agreed to it, and say that a picture is generated where it could be taken for a photo."
    )

"""FusedIDSaveIdentity and FusedIDLoadIdentity: people in models/identities, as safetensors that run no code."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.v0_0_2 import io, ui

from ..faces.identity import Identity as Person
from ..faces.identity import embedded_references, identity_hash
from ..faces.identity_file import SUFFIX, identity_path, load_identity, save_identity
from ..faces.mix import require_encoder
from .folders import IDENTITIES
from .images import identity_strip
from .input_ranges import require_in_range
from .wire_types import Encoder, Identity

NUMBER, OVERWRITE = "add a number", "overwrite"
NONE_SAVED = "no identity saved yet"


class SaveIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDSaveIdentity",
            display_name="Save Identity",
            category="FusedID",
            description="Keeps a person for other workflows: reference crops, embeddings, weights, a thumbnail and "
            "which face encoder made it, in one .safetensors file in models/identities.",
            inputs=[
                Identity.Input("identity", tooltip="The person to keep."),
                io.String.Input(
                    "name", default="person",
                    tooltip="File name in models/identities; '/' makes subfolders. Names that leave the folder are "
                    "refused.",
                ),
                io.Combo.Input(
                    "if_exists", options=[NUMBER, OVERWRITE], default=NUMBER,
                    tooltip="A file of that name is there already: write person_2, person_3 ..., or replace it. The "
                    "same identity is not written twice.",
                ),
            ],
            outputs=[
                Identity.Output(display_name="identity"),
                io.String.Output(display_name="file"),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, identity: Person, name: str, if_exists: str) -> io.NodeOutput:
        folder = Path(folder_paths.get_folder_paths(IDENTITIES)[0])
        try:
            require_in_range(cls, {"if_exists": if_exists})
            path = keep(identity, folder, name, overwrite=if_exists == OVERWRITE)
        except (ValueError, OSError) as error:
            raise ValueError(f"FusedIDSaveIdentity: {error}") from error
        file = path.relative_to(folder).as_posix()
        named = replace(identity, name=path.stem)
        return io.NodeOutput(named, file, ui=ui.PreviewText(f"saved as {file}"))


class LoadIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDLoadIdentity",
            display_name="Load Identity",
            category="FusedID",
            description="Loads a person that Save Identity kept in models/identities.",
            inputs=[
                io.Combo.Input(
                    "identity_file", options=saved_identities() or [NONE_SAVED],
                    tooltip="Files in models/identities and in the identities folders of extra_model_paths.yaml.",
                ),
                Encoder.Input(
                    "encoder", optional=True,
                    tooltip="Connected: an identity made with another face encoder is refused here, by both names.",
                ),
            ],
            outputs=[
                Identity.Output(display_name="identity"),
                io.Image.Output(display_name="preview"),
                io.String.Output(display_name="report"),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, identity_file: str) -> bool | str:
        return _problem(identity_file) or True

    @classmethod
    def fingerprint_inputs(cls, identity_file: str, **_: Any) -> str:
        """A file that changed on disk is read again."""
        path = folder_paths.get_full_path(IDENTITIES, identity_file)
        if path is None:
            return identity_file
        stat = Path(path).stat()
        return f"{path} {stat.st_mtime_ns} {stat.st_size}"

    @classmethod
    def execute(cls, identity_file: str, encoder: Any = None) -> io.NodeOutput:
        try:
            identity = open_identity(identity_file)
            if encoder is not None:
                require_encoder(identity, encoder.fingerprint)
        except ValueError as error:
            raise ValueError(f"FusedIDLoadIdentity: {error}") from error
        return io.NodeOutput(identity, identity_strip(identity), describe(identity))


def saved_identities() -> list[str]:
    """Names of the identity files on disk, as the drop-down shows them."""
    return [name for name in folder_paths.get_filename_list(IDENTITIES) if name.endswith(SUFFIX)]


def keep(identity: Person, folder: Path, name: str, *, overwrite: bool) -> Path:
    """Write an identity under a name inside `folder`; where it went. An equal file is left as it is."""
    path = identity_path(folder, name)
    for number in itertools.count(1):
        free = path if number == 1 else path.with_name(f"{path.stem}_{number}{SUFFIX}")
        if not overwrite and free.exists():
            if _holds(free, identity):
                break
            continue
        try:
            save_identity(replace(identity, name=free.stem), free, overwrite=overwrite)
            break
        except FileExistsError:  # another ComfyUI that shares the folder was quicker
            continue
    return free


def open_identity(name: str) -> Person:
    """The identity of a drop-down entry. ValueError when it is gone or damaged."""
    problem = _problem(name)
    if problem:
        raise ValueError(problem)
    return load_identity(Path(folder_paths.get_full_path_or_raise(IDENTITIES, name)))


def describe(identity: Person) -> str:
    """Name, references and encoder for people."""
    count, faces = len(identity.references), len(embedded_references(identity))
    without = f", {count - faces} of them without an embedding" if faces < count else ""
    weights = ", ".join(f"{reference.weight:g}" for reference in identity.references)
    return (
        f"{identity.name or 'unnamed'}: {count} reference{'' if count == 1 else 's'}{without}, weights {weights}\n"
        f"encoder {identity.encoder}\nlicence of the face models: {identity.encoder.license}"
    )


def _problem(name: str) -> str | None:
    if name in saved_identities():
        return None
    folders = " or ".join(folder_paths.get_folder_paths(IDENTITIES))
    return f"the identity {name!r} is not in {folders}; save one with Save Identity, or choose another"


def _holds(path: Path, identity: Person) -> bool:
    try:
        return identity_hash(load_identity(path)) == identity_hash(identity)
    except ValueError:
        return False

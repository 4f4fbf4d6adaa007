"""Configuration files: YAML into a pydantic model, with ``--set a.b=c`` overrides and messages that name the field."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Config(BaseModel):
    """Base of every configuration: frozen, and a misspelt key is an error instead of a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(model: type[ConfigT], path: Path | str | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file (or start from the defaults), apply ``a.b=c`` overrides and validate.

    Raises ``ValueError`` naming every wrong field, what it got and, for unknown keys, the nearest known one.
    """
    values = read_yaml(path) if path is not None else {}
    for override in overrides:
        set_value(values, *parse_override(override))
    return validate(model, values, origin=str(path) if path is not None else "the options")


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML file as a dict. Missing, unparsable or non-mapping files are a ``ValueError``."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"the configuration file {path} does not exist; check the path given to --config") from None
    except OSError as error:
        raise ValueError(f"cannot read the configuration file {path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration file {path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"the configuration file {path} must hold 'key: value' lines, got a {type(values).__name__}")
    return values


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=c`` as ``(["a", "b"], value)``; the value is YAML, so ``0.5``, ``true``, ``[1, 2]`` work."""
    import yaml

    name, equals, value = text.partition("=")
    keys = [part.strip() for part in name.split(".")]
    if not equals or not all(keys):
        raise ValueError(
            f"--set needs the form section.field=value, got {text!r}; for example --set select.max_faces=3"
        )
    try:
        return keys, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read the value of --set {text!r} as YAML: {error}") from error


def set_value(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a nested key in place, making the sections on the way."""
    *sections, last = keys
    for section in sections:
        child = values.get(section)
        if child is None:
            child = values[section] = {}
        if not isinstance(child, dict):
            raise ValueError(f"--set {'.'.join(keys)}: {section!r} is a single value ({child!r}), not a section")
        values = child
    values[last] = value


def validate(model: type[ConfigT], values: Mapping[str, Any], *, origin: str) -> ConfigT:
    """Build the model, or raise one ``ValueError`` that lists every problem by field."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [_describe(model, problem) for problem in error.errors()]
    raise ValueError(f"{origin}: {len(problems)} wrong setting(s)\n" + "\n".join(f"  {line}" for line in problems))


def dump_yaml(config: BaseModel) -> str:
    """The whole configuration, defaults included, as YAML that ``load_config`` reads back to an equal object."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_hash(config: BaseModel) -> str:
    """sha256 of the resolved configuration; equal settings give equal hashes whatever file they came from."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _describe(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location) or "(whole file)"
    if problem["type"] != "extra_forbidden":
        message = str(problem["msg"]).removeprefix("Value error, ")
        return f"{name}: {message}; got {problem.get('input')!r}"
    known = sorted(_field_names(model))
    near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(
        location[-1], [field.rsplit(".", 1)[-1] for field in known], n=1
    )
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_siblings(known, location))}"
    return f"{name}: unknown setting{hint}"


def _field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind, between in ((field.annotation, "."), *((kind, ".*.") for kind in get_args(field.annotation))):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _field_names(kind, f"{prefix}{name}{between}")


def _siblings(known: Sequence[str], location: Sequence[str]) -> list[str]:
    prefix = ".".join([*location[:-1], ""]) if len(location) > 1 else ""
    found = [name for name in known if name.startswith(prefix) and "." not in name[len(prefix) :]]
    return found or [name for name in known if "." not in name]

"""The fusion adapter: W_kf and W_vf of every cross-attention site, and how they were trained (METHOD 1.1, 1.5).

File: safetensors, `<site>.attn2.to_k_face.weight` and `...to_v_face.weight` `[C, D]` per site, fp16 by default,
optionally `reference_prompt.context` `[T, D_c]` and `reference_prompt.pooled` `[P]`: the text the reference pass was
trained with, so that a node needs no text encoder for it. Metadata: `fusedid.*` strings and `modelspec.*`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from .files import FORMAT, Header, read_header, read_tensors, require_finite, require_kind, write_atomic
from .fusion import COMBINE_MODES, LENGTH_MODES
from .grid import LATENT_SCALE
from .sites import FAMILIES, Site, family_of

TIMESTEP_MODES = ("clean", "matched")
TEXT_MODES = ("empty", "positive")
KEY_SUFFIX = ".attn2.to_k_face.weight"
VALUE_SUFFIX = ".attn2.to_v_face.weight"
PROMPT_CONTEXT = "reference_prompt.context"
PROMPT_POOLED = "reference_prompt.pooled"


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """METHOD's decisions, as the adapter was trained with them. Everything is stored as a string."""

    base: str
    """Family of the base model: sd15, sd20, sdxl, custom."""
    timestep: str = "clean"
    """Reference pass at t=0 without noise (`clean`) or at the target's t (`matched`)."""
    text: str = "empty"
    """Prompt of the reference pass: `empty` or the target's `positive` prompt."""
    length: str = "balanced"
    """Length term: `balanced` or `paper`."""
    combine: str = "fused"
    """One softmax (`fused`) or two (`decoupled`)."""
    reference_size: int = 512
    """Side of the square reference in training, pixels."""
    base_checkpoint: str = ""
    """Name of the checkpoint it was trained on."""
    base_hash: str = ""
    """sha256 of that checkpoint's weights."""
    encoder: str = ""
    """Fingerprint of the face encoder that chose the training pairs, if any."""
    samples_seen: int = 0
    license: str = ""

    def __post_init__(self) -> None:
        for name, accepted in _ACCEPTED.items():
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"adapter setting {name} is {value!r}; known: {', '.join(accepted)}")
        if self.reference_size < LATENT_SCALE:
            raise ValueError(f"adapter setting reference_size is {self.reference_size}; at least {LATENT_SCALE} px")


_ACCEPTED = {
    "base": (*(family.name for family in FAMILIES), "custom"),
    "timestep": TIMESTEP_MODES,
    "text": TEXT_MODES,
    "length": LENGTH_MODES,
    "combine": COMBINE_MODES,
}


@dataclass(frozen=True, eq=False)
class Projection:
    """W_kf and W_vf of one site, both `[C, D]`."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class FusionAdapter:
    """A loaded adapter. `projections`: LDM path of the site -> weights. `fingerprint`: sha256 of its content."""

    projections: dict[str, Projection]
    settings: AdapterSettings
    fingerprint: str
    prompt_context: Tensor | None = None
    prompt_pooled: Tensor | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Memory of all projection weights."""
        weights = (w for p in self.projections.values() for w in (p.key, p.value))
        return sum(w.numel() * w.element_size() for w in weights)


def save_adapter(
    path: Path | str,
    projections: Mapping[str, Projection],
    settings: AdapterSettings,
    *,
    prompt_context: Tensor | None = None,
    prompt_pooled: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    extra_metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the file the node loads, atomically. `extra_metadata` is added as it is (training config, versions)."""
    tensors: dict[str, Tensor] = {}
    for site, projection in projections.items():
        tensors[site + KEY_SUFFIX] = projection.key.to(dtype)
        tensors[site + VALUE_SUFFIX] = projection.value.to(dtype)
    if prompt_context is not None:
        tensors[PROMPT_CONTEXT] = prompt_context.to(dtype)
    if prompt_pooled is not None:
        tensors[PROMPT_POOLED] = prompt_pooled.to(dtype)
    remedy = f"Nothing was written: the training diverged, or they are too large as {str(dtype).removeprefix('torch.')}"
    require_finite(Path(path).name, tensors, remedy=remedy)
    write_atomic(path, tensors, {**_modelspec(settings), **(extra_metadata or {}), **_to_metadata(settings)})


def load_adapter(path: Path | str) -> FusionAdapter:
    """Reads and validates an adapter file.

    Raises ValueError when the file is truncated, of another family or kind, incomplete, malformed, or holds NaN.
    """
    header = read_header(path)
    require_kind(header, "fusion")
    settings = _from_metadata(header)
    sites = _sites_in(header)
    tensors = read_tensors(header)
    _require_floats(header.path.name, tensors)
    require_finite(header.path.name, tensors)
    return FusionAdapter(
        projections={s: Projection(tensors[s + KEY_SUFFIX], tensors[s + VALUE_SUFFIX]) for s in sites},
        settings=settings,
        fingerprint=_fingerprint(tensors, header.metadata),
        prompt_context=tensors.get(PROMPT_CONTEXT),
        prompt_pooled=tensors.get(PROMPT_POOLED),
        metadata=header.metadata,
    )


def check_adapter_fits(adapter: FusionAdapter, sites: Iterable[Site], *, name: str) -> None:
    """Raises ValueError unless the adapter has exactly the model's sites at the model's widths.

    A partial patch would be a silent loss of likeness, so one missing layer is an error (DESIGN promise 4).
    """
    sites = tuple(sites)
    base, model = adapter.settings.base, family_of(sites)
    relatives = [f.label for f in FAMILIES if {f.context} == {site.context for site in sites}]
    if model == "custom" and base != "custom" and relatives and _label(base) not in relatives:
        raise ValueError(
            f"{name} is an adapter for {_label(base)}, but the model is a relative of {relatives[0]} (pruned or "
            "distilled). Use an adapter trained for this very model"
        )
    if base != model and "custom" not in (base, model):
        raise ValueError(
            f"{name} is an adapter for {_label(base)}, but the model is {_label(model)}. "
            "Use an adapter trained for this base model"
        )
    expected = {site.path: site for site in sites}
    missing = sorted(set(expected) - set(adapter.projections))
    extra = sorted(set(adapter.projections) - set(expected))
    if missing or extra:
        raise ValueError(
            f"{name} does not fit this model: the model has {len(expected)} cross-attention layers, the adapter "
            f"{len(adapter.projections)}{_listing('missing', missing)}{_listing('too many', extra)}. "
            "Use an adapter trained for this base model"
        )
    for path, projection in adapter.projections.items():
        width = expected[path].channels
        for label, weight in (("keys", projection.key), ("values", projection.value)):
            if tuple(weight.shape) != (width, width):
                raise ValueError(
                    f"{name}: layer {path} has {label} weights of shape {list(weight.shape)}, the model needs "
                    f"[{width}, {width}]. Use an adapter trained for this base model"
                )


def _label(family: str) -> str:
    return next((f.label for f in FAMILIES if f.name == family), "of a custom layout")


def _listing(what: str, paths: list[str]) -> str:
    if not paths:
        return ""
    return f"; {what}: {', '.join(paths[:3])}" + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _sites_in(header: Header) -> list[str]:
    keys = {k.removesuffix(KEY_SUFFIX) for k in header.shapes if k.endswith(KEY_SUFFIX)}
    values = {k.removesuffix(VALUE_SUFFIX) for k in header.shapes if k.endswith(VALUE_SUFFIX)}
    unpaired = sorted(keys ^ values)
    if unpaired:
        raise ValueError(f"{header.path.name}: layer {unpaired[0]} has only one of key and value weights")
    known = {s + suffix for s in keys for suffix in (KEY_SUFFIX, VALUE_SUFFIX)} | {PROMPT_CONTEXT, PROMPT_POOLED}
    strangers = sorted(set(header.shapes) - known)
    if strangers:
        raise ValueError(f"{header.path.name} holds tensors no adapter has, such as {strangers[0]}")
    if not keys:
        raise ValueError(f"{header.path.name} holds no face projections; it is no usable adapter")
    _check_ranks(header, known)
    return sorted(keys)


def _check_ranks(header: Header, known: set[str]) -> None:
    for name in known & set(header.shapes):
        rank = 1 if name == PROMPT_POOLED else 2
        shape = header.shapes[name]
        if len(shape) != rank or 0 in shape:
            raise ValueError(f"{header.path.name}: {name} has shape {list(shape)}, expected {rank} non-empty axes")


def _require_floats(name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name}: {key} is {tensor.dtype}, weights must be floating point. Get the file as fp16, bf16 or fp32"
            )


def _to_metadata(settings: AdapterSettings) -> dict[str, str]:
    values = {f"fusedid.{key}": str(value) for key, value in asdict(settings).items()}
    return {"fusedid.format": FORMAT, "fusedid.kind": "fusion", **values}


def _from_metadata(header: Header) -> AdapterSettings:
    values: dict[str, object] = {}
    for entry in fields(AdapterSettings):
        text = header.metadata.get(f"fusedid.{entry.name}")
        if text is None:
            continue
        values[entry.name] = _whole_number(header, entry.name, text) if entry.type == "int" else text
    if "base" not in values:
        raise ValueError(f"{header.path.name} does not say which base model it is for (fusedid.base is missing)")
    try:
        return AdapterSettings(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{header.path.name}: {error}. Update FusedID, or get the file again") from error


def _whole_number(header: Header, name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise ValueError(f"{header.path.name}: fusedid.{name} is {text[:40]!r}, expected a whole number")
    return int(text)


def _modelspec(settings: AdapterSettings) -> dict[str, str]:
    architecture = {"sd15": "stable-diffusion-v1", "sd20": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1"}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture.get(settings.base, 'custom')}/fusedid-fusion",
        "modelspec.implementation": "fusedid",
        "modelspec.title": "FusedID fusion adapter",
        "modelspec.license": settings.license,
    }


def _fingerprint(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(repr(sorted(metadata.items())).encode())
    return digest.hexdigest()

"""What a file is, told by its tensor names and shapes alone: file names lie, and users rename."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..files import foreign_family
from . import families as known
from .families import CommunityFamily
from .layers import LayerTable, has_lora, read_layer_table

Shapes = Mapping[str, tuple[int, ...]]
ACCEPTED = "IP-Adapter, FaceID, InstantID and PuLID files for Stable Diffusion 1.x and XL are accepted"


@dataclass(frozen=True)
class Recognised:
    """family; layers: which model it fits; num_tokens per reference; clip_width: of the CLIP features it reads, or 0;
    has_lora: whether the UNet's own projections change too; embedding_width: of the face embedding, or 0."""

    family: CommunityFamily
    layers: LayerTable
    num_tokens: int
    clip_width: int = 0
    embedding_width: int = 0
    has_lora: bool = False

    @property
    def clip_model(self) -> str:
        """Name of the CLIP vision model it was trained with; empty when it needs none."""
        if self.family.clip == "eva":
            return known.EVA
        table = {"embeds": known.CLIP_BY_EMBED, "hidden": known.CLIP_BY_HIDDEN}.get(self.family.clip, {})
        return table.get(self.clip_width, f"CLIP vision of width {self.clip_width}" if self.clip_width else "")


def recognise(shapes: Shapes, *, name: str) -> Recognised:
    """The family, base and needs of a file with these (canonical) tensor names.

    Raises ValueError that says what the file is when it is none of ours: PhotoMaker, FLUX, ConsistentID, a LoRA, ...
    """
    _refuse_strangers(shapes, name)
    table = read_layer_table(shapes, name=name)
    image_proj = {key.removeprefix("image_proj."): s for key, s in shapes.items() if key.startswith("image_proj.")}
    if not image_proj:
        raise ValueError(
            f"{name} has attention layers but no image projection; half of it is missing, download it again"
        )
    family, tokens, clip, embedding = _family(image_proj, table.context, has_lora(shapes), name)
    return Recognised(family, table, tokens, clip, embedding, has_lora(shapes))


def _family(proj: Shapes, context: int, lora: bool, name: str) -> tuple[CommunityFamily, int, int, int]:
    """(family, tokens, CLIP width, embedding width)."""

    def size(tensor: str, axis: int, rank: int = 2) -> int:
        return _size(proj, tensor, axis, rank, name)

    if "id_embedding_mapping.0.weight" in proj and "latents" in proj:
        width = size("id_embedding_mapping.0.weight", 1) - known.EVA_EMBED
        return known.PULID_V11, size("latents", 1, rank=3), known.EVA_WIDTH, width
    if "body.0.weight" in proj and "mapping_patch_0.0.weight" in proj:
        tokens = size("body.6.weight", 0) // context + known.EVA_LEVELS
        return known.PULID_V1, tokens, known.EVA_WIDTH, size("body.0.weight", 1) - known.EVA_EMBED
    if "perceiver_resampler.proj_in.weight" in proj:
        _refuse_kolors(size("perceiver_resampler.proj_in.weight", 0) != context, name)
        tokens, clip = size("proj.2.weight", 0) // context, size("perceiver_resampler.proj_in.weight", 1)
        return known.FACEID_PLUS, tokens, clip, size("proj.0.weight", 1)
    if "latents" in proj and "proj_in.weight" in proj:
        _refuse_kolors(context == 2048 and size("latents", 2, rank=3) == 2048, name)
        tokens, width = size("latents", 1, rank=3), size("proj_in.weight", 1)
        # 512 features are a face embedding, every CLIP tower is wider.
        return (known.INSTANTID, tokens, 0, width) if width == 512 else (known.PLUS, tokens, width, 0)
    if "proj.3.weight" in proj:
        return known.FULL_FACE, 0, size("proj.0.weight", 1), 0
    if "proj.2.weight" in proj:
        family = known.FACEID if lora else known.PORTRAIT
        return family, size("proj.2.weight", 0) // context, 0, size("proj.0.weight", 1)
    if "proj.weight" in proj:
        return known.STANDARD, size("proj.weight", 0) // context, size("proj.weight", 1), 0
    raise ValueError(f"{name} has an image projection of an unknown kind ({_example(proj)}). {ACCEPTED}")


def _size(proj: Shapes, tensor: str, axis: int, rank: int, name: str) -> int:
    shape = proj.get(tensor)
    if shape is None or len(shape) != rank or 0 in shape:
        got = "missing" if shape is None else f"of the shape {list(shape)}"
        raise ValueError(f"{name}: image_proj.{tensor} is {got}; the file is incomplete or damaged, download it again")
    return shape[axis]


def _refuse_kolors(is_kolors: bool, name: str) -> None:
    if is_kolors:
        raise ValueError(f"{name} is an IP-Adapter for Kolors, which this version does not read. {ACCEPTED}")


_STRANGERS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("ConsistentID", lambda key: key.startswith("FacialEncoder.")),
    (
        "PhotoMaker (load it with the host's PhotoMaker nodes)",
        lambda key: key.startswith(("id_encoder.", "lora_weights.")),
    ),
    ("PuLID for FLUX", lambda key: key.startswith(("pulid_encoder.", "pulid_ca."))),
    ("an IP-Adapter for FLUX", lambda key: key.startswith(("double_blocks.", "single_blocks."))),
    ("an IP-Adapter for FLUX", lambda key: "ip_adapter_double_stream" in key),
    ("a reference adapter of ai-toolkit", lambda key: key.startswith("reference_adapter.")),
    ("a Custom Diffusion file", lambda key: "_custom_diffusion." in key),
)


def _refuse_strangers(shapes: Shapes, name: str) -> None:
    for label, test in _STRANGERS:
        if any(test(key) for key in shapes):
            raise ValueError(f"{name} is {label}, which is no key/value adapter for these models. {ACCEPTED}")
    if any(key.startswith(("ip_adapter.", "image_proj.")) for key in shapes):
        return
    what = foreign_family(shapes)
    advice = "Load it with a LoRA loader node instead" if what == "a LoRA" else ACCEPTED
    raise ValueError(f"{name} is {what}, not an identity adapter. {advice}")


def _example(names: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(names[name])}" for name in sorted(names)[:2])

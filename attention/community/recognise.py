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
    if "id_embedding_mapping.0.weight" in proj and "latents" in proj:
        return known.PULID_V11, proj["latents"][1], known.EVA_WIDTH, _face_part(proj["id_embedding_mapping.0.weight"])
    if "body.0.weight" in proj and "mapping_patch_0.0.weight" in proj:
        tokens = proj["body.6.weight"][0] // context + known.EVA_LEVELS
        return known.PULID_V1, tokens, known.EVA_WIDTH, _face_part(proj["body.0.weight"])
    if "perceiver_resampler.proj_in.weight" in proj:
        _refuse_kolors(proj["perceiver_resampler.proj_in.weight"][0] != context, name)
        width, tokens = proj["proj.0.weight"][1], proj["proj.2.weight"][0] // context
        return known.FACEID_PLUS, tokens, proj["perceiver_resampler.proj_in.weight"][1], width
    if "latents" in proj and "proj_in.weight" in proj:
        return _resampler_family(proj, context, name)
    if "proj.3.weight" in proj:
        return known.FULL_FACE, 0, proj["proj.0.weight"][1], 0
    if "proj.2.weight" in proj:
        family = known.FACEID if lora else known.PORTRAIT
        return family, proj["proj.2.weight"][0] // context, 0, proj["proj.0.weight"][1]
    if "proj.weight" in proj:
        return known.STANDARD, proj["proj.weight"][0] // context, proj["proj.weight"][1], 0
    raise ValueError(f"{name} has an image projection of an unknown kind ({_example(proj)}). {ACCEPTED}")


def _resampler_family(proj: Shapes, context: int, name: str) -> tuple[CommunityFamily, int, int, int]:
    tokens, width = proj["latents"][1], proj["proj_in.weight"][1]
    dim = proj["latents"][2]
    _refuse_kolors(context == 2048 and dim == 2048, name)
    # 512 features are a face embedding, every CLIP tower is wider.
    if width == 512:
        return known.INSTANTID, tokens, 0, width
    return known.PLUS, tokens, width, 0


def _face_part(shape: tuple[int, ...]) -> int:
    return shape[1] - known.EVA_EMBED


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

"""What a guidance file was trained with, and whether it fits what the user wired to it (METHOD 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from .sites import FAMILIES

NORMALISATIONS = ("unit", "raw")
BASES = (*(family.name for family in FAMILIES), "custom")
MOST_TOKENS = 1024
WIDEST = 65536


@dataclass(frozen=True)
class Tower:
    """One CLIP vision tower: its name (`ViT-L/14`, `RN101`, `ViT-B/32`) and the width of its projected embedding."""

    name: str
    width: int


PAPER_TOWERS = (Tower("ViT-L/14", 768), Tower("RN101", 512), Tower("ViT-B/32", 512))


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """METHOD 2's decisions as one Linear was trained with them. Everything is stored as a string."""

    base: str
    """Family of the UNet it was trained with: sd15, sd20, sdxl, custom."""
    towers: tuple[Tower, ...]
    """CLIP vision towers in the order of the Linear's columns."""
    face_width: int
    """Numbers per face embedding."""
    face_encoder: str
    """sha256 of the recogniser's file; empty accepts any recogniser of the same width."""
    face_encoder_name: str = ""
    """What the user called that encoder, for error messages."""
    context_width: int = 768
    """Width C of the UNet's cross-attention context."""
    num_tokens: int = 1
    """Guidance tokens per picture. 1 is the paper; with 1 cross-attention is constant over the image."""
    face_normalisation: str = "unit"
    """`unit` length or `raw` recogniser output."""
    style_normalisation: str = "raw"
    """`raw` projected CLIP embeddings, or each tower at `unit` length."""
    prior: str = ""
    """Prior whose output the style columns take, such as `karlo`; empty when no public one fits the towers."""
    base_checkpoint: str = ""
    base_hash: str = ""
    samples_seen: int = 0
    license: str = ""

    def __post_init__(self) -> None:
        _require(self.base in BASES, "base", self.base, ", ".join(BASES))
        for name in ("face_normalisation", "style_normalisation"):
            _require(getattr(self, name) in NORMALISATIONS, name, getattr(self, name), ", ".join(NORMALISATIONS))
        _require(1 <= self.num_tokens <= MOST_TOKENS, "num_tokens", self.num_tokens, f"1 to {MOST_TOKENS}")
        _require(1 <= self.context_width <= WIDEST, "context_width", self.context_width, f"1 to {WIDEST}")
        _require(0 <= self.face_width <= WIDEST, "face_width", self.face_width, f"0 to {WIDEST}")
        _require(len(self.towers) > 0, "towers", "empty", "at least one CLIP vision tower")
        for tower in self.towers:
            _require(bool(tower.name), "towers", "a tower without a name", "named towers")
            _require(1 <= tower.width <= WIDEST, f"width of tower {tower.name}", tower.width, f"1 to {WIDEST}")

    @property
    def style_width(self) -> int:
        """Numbers of all towers together."""
        return sum(tower.width for tower in self.towers)

    @property
    def tower_names(self) -> str:
        """`ViT-L/14 (768) + RN101 (512)`."""
        return describe_towers(self.towers)


def _require(holds: bool, name: str, got: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"guidance setting {name} is {got!r}; accepted: {accepted}")


def describe_towers(towers: tuple[Tower, ...]) -> str:
    """Names and widths in order, for messages."""
    return " + ".join(f"{tower.name} ({tower.width})" for tower in towers)


def prior_for(towers: tuple[Tower, ...]) -> str:
    """The public prior that ends in these towers' space: Karlo for ViT-L/14 alone; RN101 and ViT-B/32 have none."""
    return "karlo" if towers == PAPER_TOWERS[:1] else ""


def check_towers(settings: GuidanceSettings, towers: tuple[Tower, ...], *, name: str) -> None:
    """Raises ValueError naming both tower sets unless they are the same towers in the same order."""
    if settings.towers != towers:
        raise ValueError(
            f"{name} was trained with the CLIP vision towers {settings.tower_names}, but the style image was encoded "
            f"with {describe_towers(towers)}. Load those towers, or choose a guidance file trained with yours"
        )


def check_face_encoder(
    settings: GuidanceSettings, *, width: int, recogniser_sha256: str, encoder_name: str, name: str
) -> None:
    """Raises ValueError naming both encoders unless the face embeddings mean what the Linear was trained on."""
    same_file = not settings.face_encoder or settings.face_encoder == recogniser_sha256
    if width != settings.face_width or not same_file:
        trained = _encoder_label(settings.face_encoder_name, settings.face_width, settings.face_encoder)
        raise ValueError(
            f"{name} was trained with the face encoder {trained}, but the identity was embedded with "
            f"{_encoder_label(encoder_name, width, recogniser_sha256)}. Embed the face with the first one, or choose "
            "a guidance file trained with the second"
        )


def _encoder_label(name: str, width: int, sha256: str) -> str:
    return f"{name or 'unnamed'} ({width} numbers{', ' + sha256[:12] if sha256 else ''})"


def check_base(settings: GuidanceSettings, *, family: str, context_width: int, name: str) -> None:
    """Raises ValueError unless the guidance tokens are as wide as the model's cross-attention context."""
    labels = {f.name: f.label for f in FAMILIES}
    if settings.context_width != context_width or (settings.base != family and "custom" not in (settings.base, family)):
        raise ValueError(
            f"{name} makes guidance for {labels.get(settings.base, 'a custom model')} (context width "
            f"{settings.context_width}), but the model is {labels.get(family, 'of a custom layout')} (context width "
            f"{context_width}). Load the model it was trained with, or choose another guidance file"
        )

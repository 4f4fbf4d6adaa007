"""From the values of FusedIDAttentionPatch to a patched MODEL and its report."""

from __future__ import annotations

from typing import Any

from ..attention.adapter import AdapterSettings, FusionAdapter, check_adapter_fits, load_adapter
from ..attention.community.families import PULID
from ..attention.community.orthogonal import OFF
from ..attention.community.pulid_methods import PulidMethod
from ..attention.fusion import FaceControls
from ..attention.schedule import check_percents
from ..attention.sites import Site, discover_sites, family_of, layer_groups, native_size
from ..attention.storage import AS_COMPUTED, Storage, require_fp8
from . import reference_inputs
from .adapter_choice import FROM_ADAPTER, TRAINING_FREE, WITHOUT_FILE, adapter_path
from .community_files import is_community_choice, load_community_choice
from .community_lora import carried_lora, with_adapter_lora
from .community_options import CommunityOptions
from .community_source import community_features
from .face_sources import AdapterSource, FaceSource, OwnProjections, SharedSelfAttention
from .fusion_effect import FusionEffect, install_fusion
from .fusion_plan import FusionPlan, GivenFaces, ReferencePass, shown_references
from .fusion_report import fusion_report
from .host.install import effects_of
from .host.neighbours import neighbours
from .reference_cache import compute_dtype
from .separation import patch_separation
from .wire_types import RoutedIdentities, require_places

Chosen = dict[str, str]


def patch_model(
    model: Any, adapter: str, *, vae: Any = None, identity: Any = None, routed: RoutedIdentities | None = None,
    strength: float = 1.0, key_strength: float = 1.0, value_strength: float = 1.0, attention_scale: float = 1.0,
    start_percent: float = 0.0, end_percent: float = 1.0, layers: str = "all", reference_size: int = 0,
    timestep: str = FROM_ADAPTER, length: str = FROM_ADAPTER, combine: str = FROM_ADAPTER, apply_to: str = "positive",
    reference_text: str = FROM_ADAPTER, clip: Any = None, clip_vision: Any = None, variant: str = "as recognised",
    lora_strength: float = 1.0, structure: float = 1.0, adain: bool = False, reference_tokens: float = 1.0,
    cache_precision: str = "model", cache_device: str = "model", community: CommunityOptions | None = None,
) -> tuple[Any, str]:  # fmt: skip
    """A patched clone of the MODEL and the self-check report. Raises ValueError before anything is sampled."""
    people = _people(identity, routed)
    sites = require_sites(model)
    active = _active(sites, layers)
    check_percents(start_percent, end_percent)
    controls = FaceControls(max(strength, 1e-9), key_strength, value_strength, attention_scale)
    storage = Storage(cache_precision, cache_device)
    wishes = {"timestep": timestep, "length": length, "combine": combine, "text": reference_text}
    common: dict[str, Any] = {
        "sites": sites, "active": active, "start": start_percent, "end": end_percent, "controls": controls,
        "routed": routed, "both": apply_to == "both", "names": tuple(person.name for person in people),
    }  # fmt: skip
    if adain and adapter != TRAINING_FREE:
        raise ValueError(f"'adain' belongs to the adapter choice {TRAINING_FREE!r}, got {adapter!r}. Turn it off")
    if is_community_choice(adapter):
        source = load_community_choice(adapter, variant)
        options = CommunityOptions() if community is None else community
        plan, notes = _community_plan(source, people, wishes, clip_vision, structure, options.pulid, common)
        if community is not None and source.family not in PULID:
            notes.append(f"community: PuLID's method has no effect on {source.family.label}")
        if (reference_tokens, storage) != (1.0, AS_COMPUTED):
            notes = [*notes, "reference_tokens, cache_precision and cache_device have no effect on community weights"]
        if strength > 0:
            if lora_strength != 0 and (carried := carried_lora(model, source, sites)) is not None:
                notes = [*notes, carried.note(source.name)]
            model = with_adapter_lora(model, source, sites, lora_strength)
    else:
        face_source, settings, fusion = _own_source(adapter, sites)
        chosen, notes = _decided(wishes, settings)
        if adapter in WITHOUT_FILE and clip is not None and reference_text == FROM_ADAPTER:
            chosen["text"] = "empty"
        if strength == 0:
            return _unpatched(model)
        plan, label = _reference_plan(
            model, vae, clip, people, reference_size or settings.reference_size, face_source, fusion, chosen,
            {"share": reference_tokens, "storage": _storage(model, storage, chosen)}, {**common, "adain": adain},
        )  # fmt: skip
        notes = [f"reference text: {label}", *notes]
        if community is not None:
            notes.append("community: has no effect, this adapter is no community file")
        if chosen["timestep"] == "matched" and storage != AS_COMPUTED:
            notes.append(
                "cache_precision and cache_device have no effect: matched references are kept for one step only"
            )
    if strength == 0:
        return _unpatched(model)
    return _installed(model, plan, notes)


def require_sites(model: Any) -> tuple[Site, ...]:
    """The MODEL's cross-attention layers. Raises ValueError when it is no SD-type UNet."""
    unet = getattr(model.model, "diffusion_model", None)
    sites = () if unet is None else discover_sites(unet)
    if not sites:
        raise ValueError(
            f"needs an SD1.5, SD2 or SDXL model, got {type(model.model).__name__} ({type(unet).__name__}). Load such a "
            "checkpoint"
        )
    return sites


def _unpatched(model: Any) -> tuple[Any, str]:
    return model.clone(), "strength 0: the model is unpatched"


def _people(identity: Any, routed: RoutedIdentities | None) -> tuple[Any, ...]:
    if (identity is None) == (routed is None):
        got = "neither" if identity is None else "both"
        raise ValueError(f"connect either 'identity' (one person) or 'routed' (several with masks); got {got}")
    if routed is None:
        return (identity,)
    require_places(routed)
    return routed.identities


def _active(sites: tuple[Site, ...], layers: str) -> frozenset[str]:
    active = layer_groups(sites)[layers]
    if not active:
        raise ValueError(f"this model has no layers in the group {layers!r}; choose another, such as 'all'")
    return active


def _own_source(adapter: str, sites: tuple[Site, ...]) -> tuple[FaceSource, AdapterSettings, FusionAdapter | None]:
    if adapter in WITHOUT_FILE:
        family = family_of(sites)
        size = native_size(sites)
        free = adapter == TRAINING_FREE
        settings = AdapterSettings(
            base=family, timestep="matched" if free else "clean", text="positive", length="paper", reference_size=size
        )
        return (SharedSelfAttention(size) if free else OwnProjections(size)), settings, None
    fusion = load_adapter(adapter_path(adapter))
    check_adapter_fits(fusion, sites, name=adapter)
    return AdapterSource(fusion), fusion.settings, fusion


def _decided(wishes: Chosen, settings: AdapterSettings) -> tuple[Chosen, list[str]]:
    """Every mode as the user or else the adapter wants it, and a note where the two differ."""
    trained = {name: getattr(settings, name) for name in wishes}
    chosen = {name: trained[name] if wish == FROM_ADAPTER else wish for name, wish in wishes.items()}
    differ = [f"{name} {chosen[name]} (adapter: {trained[name]})" for name in wishes if chosen[name] != trained[name]]
    return chosen, [f"unlike the adapter: {', '.join(differ)}"] if differ else []


def _storage(model: Any, wish: Storage, chosen: Chosen) -> Storage:
    """How references are kept. Raises ValueError when the model's device cannot."""
    if chosen["timestep"] == "matched":
        return AS_COMPUTED
    if wish.precision == "fp8":
        require_fp8(model.load_device)
    return wish


def _reference_plan(
    model: Any, vae: Any, clip: Any, people: tuple[Any, ...], size: int, source: FaceSource,
    fusion: FusionAdapter | None, chosen: Chosen, form: dict[str, Any], common: dict[str, Any],
) -> tuple[FusionPlan, str]:  # fmt: skip
    text = reference_inputs.reference_text(fusion, clip, common["sites"])
    latents, shown = reference_inputs.reference_latents(model, vae, people, size)
    positive = chosen["text"] == "positive"
    matched = chosen["timestep"] == "matched"
    faces = ReferencePass(source, latents, text, matched=matched, positive_text=positive, **form)
    plan = FusionPlan(
        faces, shown, attention=source.attention, combine=chosen["combine"], length=chosen["length"], **common
    )
    return plan, "the positive prompt" if positive else text.label


def _community_plan(
    source: Any, people: tuple[Any, ...], wishes: Chosen, clip_vision: Any, structure: float, pulid: PulidMethod,
    common: dict[str, Any],
) -> tuple[FusionPlan, list[str]]:  # fmt: skip
    is_pulid = source.family in PULID
    combine = "decoupled" if wishes["combine"] == FROM_ADAPTER else wishes["combine"]
    zeros = pulid.zero_tokens if is_pulid else 0
    found = [
        community_features(source, common["sites"], p, clip_vision=clip_vision, structure=structure, zero_tokens=zeros)
        for p in people
    ]
    used = [
        (features, (i, float(weight), pictures))
        for i, one in enumerate(found)
        for features, weight, pictures in zip(one.positive, one.weights, one.pictures)
        if weight > 0
    ]
    plan = FusionPlan(
        GivenFaces(tuple(features for features, _ in used), found[0].negative),
        shown_references([one for _, one in used]),
        combine=combine,
        length="paper",
        orthogonal=pulid.orthogonal if is_pulid and combine == "decoupled" else OFF,
        **common,
    )
    notes = [one.note for one in found if one.note]
    if is_pulid:
        notes.insert(0, f"PuLID method {pulid.label}")
        if plan.orthogonal != pulid.orthogonal:
            notes.insert(1, "combine fused has one softmax and no added branch: orthogonal has no effect")
    return plan, notes


def _beside(model: Any, plan: FusionPlan) -> list[str]:
    """A note about patches of ours that the MODEL has already: copied nodes and chained groups add up unnoticed."""
    before = [effect.plan for effect in effects_of(model) if isinstance(effect, FusionEffect)]
    if not before:
        return []
    same = any(set(one.names) & set(plan.names) - {""} for one in before)
    people = "the same person twice" if same else "they add up"
    return [
        f"another FusedID Attention Patch acts on this model already ({people}); for several people in places of their "
        "own use the Multi-ID Mask Router"
    ]


def _installed(model: Any, plan: FusionPlan, notes: list[str]) -> tuple[Any, str]:
    notes = [*_beside(model, plan), *notes]
    clone = install_fusion(model, plan)
    routed = plan.routed
    if routed is not None and routed.separation > 0:
        clone = patch_separation(clone, routed.masks, routed.separation)
        notes = [*notes, f"people held apart in self-attention (separation {routed.separation:g})"]
    if routed is not None:
        height, width = routed.masks.shape[-2:]
        notes = [*notes, f"masks of {width} x {height}; tiles and detailers need FusedID Place in Picture to fit them"]
    others = neighbours(model, plan.attention)
    if others:
        notes = [*notes, f"beside other nodes in these layers: {', '.join(others)}"]
    return clone, fusion_report(plan, notes, compute_dtype(model.model).itemsize)

"""Values of workflows: whatever a saved workflow or a linked node hands to a node of ours, it answers or explains.

The host checks neither NaN nor numbers and choices that come through links, so the nodes are called past its checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fusion_lab
import guard
import numpy as np
import peer_ours
import pytest
import torch
from cases import hostile, outcome
from fusion_lab import FusionLab
from hostile import WORDS
from hypothesis import assume, given
from hypothesis import strategies as st

INTEGERS = st.one_of(st.integers(-5, 100), st.sampled_from([2**31, 2**63, 2**64, 2**100, -(2**63), -(10**30)]))
FLOATS = st.one_of(st.floats(), st.floats(-2, 12), st.sampled_from([0.0, 1.0, 0.5]))


@pytest.fixture(autouse=True)
def nothing_but_errors() -> Iterator[None]:
    with guard.forbidden(*guard.PROGRAMS, *guard.NETWORK, *guard.PICKLES):
        yield


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, "sd15_tiny")


class Encoder:
    """A face encoder that finds one face in every picture."""

    provider, det_size, score_floor = "CPU", 64, 0.5

    def __init__(self, pack: Any, fingerprint: Any) -> None:
        self._face = pack.submodule("faces.encoder").Face
        self.fingerprint = fingerprint

    def detect(self, image: np.ndarray, size: int, threshold: float) -> list[Any]:
        points = np.array([[20, 25], [40, 25], [30, 35], [22, 45], [38, 45]], dtype=np.float32)
        return [self._face((10.0, 10.0, 50.0, 55.0), 0.9, points)]

    def embed(self, aligned: np.ndarray) -> np.ndarray:
        return np.ones((len(aligned), 512), dtype=np.float32)


@pytest.fixture(scope="module")
def encoder(pack: Any, lab: FusionLab) -> Encoder:
    return Encoder(pack, lab.identity().encoder)


def tensors(channels: int | None) -> st.SearchStrategy[torch.Tensor]:
    """IMAGE (channels) or MASK (None) of odd sizes and values."""
    sides = st.sampled_from([0, 1, 15, 16, 64])
    values = st.sampled_from([0.0, 1.0, 0.5, -3.0, 255.0, float("nan"), float("inf")])
    kinds = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.uint8, torch.bool])
    wrong = st.lists(st.integers(0, 20), max_size=5)
    usual = st.tuples(st.integers(0, 2), sides, sides)
    shapes = st.one_of(usual.map(lambda s: (*s, channels) if channels else s), wrong)
    odd = st.builds(lambda shape, value, kind: torch.full(tuple(shape), value).to(kind), shapes, values, kinds)
    sound = torch.rand((1, 64, 64, 3) if channels else (1, 64, 64), generator=torch.Generator().manual_seed(1))
    return st.one_of(odd, st.just(sound))


def widget_values(node: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Hostile values for some of a node's widgets; the others keep their defaults."""
    declared = node.INPUT_TYPES()
    values: dict[str, st.SearchStrategy[Any]] = {}
    for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        if isinstance(kind, list) or kind == "COMBO":
            choices = kind if isinstance(kind, list) else options["options"]
            values[name] = st.one_of(st.sampled_from(choices), WORDS) if choices else WORDS
        elif kind in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            by_kind = {"INT": INTEGERS, "FLOAT": FLOATS, "STRING": WORDS, "BOOLEAN": st.booleans()}
            values[name] = by_kind[kind]
    return st.lists(st.sampled_from(sorted(values)), max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: values[name] for name in names})
    )


def run(pack: Any, node_id: str, **given: Any) -> Any:
    return outcome(f"values of {node_id}", node_id, lambda: peer_ours.run_node(pack.nodes[node_id], **given))


@hostile(30, share=0.05)
@given(data=st.data())
def test_hostile_values_of_the_attention_patch(data: st.DataObject, pack: Any, lab: FusionLab) -> None:
    values = data.draw(widget_values(pack.nodes["FusedIDAttentionPatch"]))
    given_sockets = {"model": lab.model, "vae": lab.vae, "identity": lab.identity(), "adapter": lab.adapter.name}
    result = run(pack, "FusedIDAttentionPatch", **{**given_sockets, **values})
    if result is not None and data.draw(st.integers(0, 9)) == 0:
        assert bool(torch.isfinite(lab.call(result[0])).all()), values


@hostile(30, share=0.05)
@given(data=st.data())
def test_hostile_values_of_the_router(data: st.DataObject, pack: Any, lab: FusionLab, encoder: Encoder) -> None:
    values = data.draw(widget_values(pack.nodes["MultiIDMaskRouter"]))
    values["mask"] = data.draw(st.one_of(st.none(), tensors(None)))
    if data.draw(st.booleans()):
        values |= {"content": data.draw(tensors(3)), "encoder": encoder}
    result = run(pack, "MultiIDMaskRouter", identity=lab.identity(), **values)
    if result is not None:
        masks = result[2]
        if not isinstance(masks, torch.Tensor):  # somebody still waits for a place: the output is blocked
            return
        assert bool(torch.isfinite(masks).all()) and float(masks.min()) >= 0 and float(masks.max()) <= 1


@hostile(30, share=0.05)
@given(data=st.data())
def test_hostile_values_of_face_embed(data: st.DataObject, pack: Any, encoder: Encoder) -> None:
    values = data.draw(widget_values(pack.nodes["FaceEmbed"]))
    run(pack, "FaceEmbed", encoder=encoder, image=data.draw(tensors(3)), **values)


@hostile(30, share=0.05)
@given(data=st.data())
def test_hostile_values_of_similarity(data: st.DataObject, pack: Any, lab: FusionLab, encoder: Encoder) -> None:
    values = data.draw(widget_values(pack.nodes["FusedIDFaceSimilarity"]))
    given_sockets = {"encoder": encoder, "image": data.draw(tensors(3)), "identity_1": lab.identity()}
    run(pack, "FusedIDFaceSimilarity", **given_sockets, **values)


@hostile(30, share=0.05)
@given(data=st.data())
def test_hostile_values_of_mix(data: st.DataObject, pack: Any, lab: FusionLab) -> None:
    values = data.draw(widget_values(pack.nodes["FusedIDMix"]))
    run(pack, "FusedIDMix", identity_1=lab.identity(1), identity_2=lab.identity(2), **values)


@hostile(30, share=0.05)
@given(data=st.data())
def test_hostile_values_of_guidance(data: st.DataObject, pack: Any, lab: FusionLab) -> None:
    values = data.draw(widget_values(pack.nodes["HybridGuidance"]))
    values["style_mask"] = data.draw(st.one_of(st.none(), tensors(None)))
    values["style_image"] = data.draw(st.one_of(st.none(), tensors(3)))
    sockets = {"identity": lab.identity()}
    if data.draw(st.booleans()):
        sockets = {"routed": lab.routed([lab.identity(1), lab.identity(2)], fusion_lab.halves())}
    run(pack, "HybridGuidance", model=lab.model, **sockets, **values)


@hostile(30, share=0.05)
@given(data=st.data())
def test_hostile_values_of_the_file_nodes(data: st.DataObject, pack: Any, lab: FusionLab) -> None:
    """Loaders and the folder reader. Entries that download are chosen elsewhere."""
    node_id = data.draw(st.sampled_from(["FusedIDLoadIdentity", "FusedIDFaceFolder", "LoadIdentityEncoder"]))
    values = data.draw(widget_values(pack.nodes[node_id]))
    assume("(download" not in str(values.get("face_pack")))
    run(pack, node_id, **values)


@hostile(30, share=0.05)
@given(data=st.data())
def test_hostile_names_for_saving(data: st.DataObject, pack: Any, lab: FusionLab) -> None:
    base = pack.host.base
    before = {path for path in base.parent.rglob("*") if base / "models" / "identities" not in path.parents}
    run(
        pack,
        "FusedIDSaveIdentity",
        identity=lab.identity(),
        **data.draw(widget_values(pack.nodes["FusedIDSaveIdentity"])),
    )
    after = {path for path in base.parent.rglob("*") if base / "models" / "identities" not in path.parents}
    assert after - before <= {base / "models" / "identities"}


@hostile(20, share=0.05)
@given(data=st.data())
def test_hostile_values_of_the_attention_map(data: st.DataObject, pack: Any, lab: FusionLab) -> None:
    """Recorded, or not recorded at all: the map is drawn or the message says what is missing."""
    patched, _ = lab.patch()
    values = data.draw(widget_values(pack.nodes["FusedIDRecordAttention"]))
    found = run(pack, "FusedIDRecordAttention", model=patched, **values)
    if found is None:
        return
    model, recording = found
    if data.draw(st.booleans()):
        lab.sample(model, steps=1)
    values = data.draw(widget_values(pack.nodes["FusedIDAttentionMap"]))
    run(pack, "FusedIDAttentionMap", recording=recording, image=data.draw(tensors(3)), **values)


@hostile(30, share=0.05)
@given(data=st.data())
def test_hostile_values_of_parts_of_a_picture(data: st.DataObject, pack: Any, lab: FusionLab) -> None:
    """Cut and pasted again, or told to a node that cuts by itself; parts may get lost between the two."""
    image, values = data.draw(tensors(3)), data.draw(widget_values(pack.nodes["FusedIDCutPicture"]))
    if data.draw(st.booleans()):
        values["routed"] = lab.routed([lab.identity(1), lab.identity(2)], fusion_lab.halves())
    found = run(pack, "FusedIDCutPicture", image=image, **values)
    parts, places = ([], []) if found is None else found
    refined = data.draw(st.one_of(st.just(parts), st.lists(tensors(3), max_size=3)))
    whole = [data.draw(st.one_of(st.just(image), tensors(3)))]
    run(pack, "FusedIDPasteParts", image=whole, parts=refined, places=places)
    told: dict[str, Any] = {"image": data.draw(st.one_of(st.none(), tensors(3)))}
    told["place"] = places[0] if places and data.draw(st.booleans()) else None
    run(pack, "FusedIDPlaceInPicture", positive=lab.positive, negative=lab.negative, **told)


@hostile(30, share=0.05)
@given(data=st.data())
def test_hostile_values_of_community_options(data: st.DataObject, pack: Any, lab: FusionLab, encoder: Encoder) -> None:
    run(pack, "FusedIDCommunityOptions", **data.draw(widget_values(pack.nodes["FusedIDCommunityOptions"])))
    values = data.draw(widget_values(pack.nodes["FusedIDInstantIDControl"]))
    # A sound file of another test would be read, which takes its memory.
    assume(not str(values.get("adapter", "")).startswith("instantid/"))
    if data.draw(st.booleans()):
        values |= {"image": data.draw(tensors(3)), "encoder": encoder}
    sockets = {"positive": lab.positive, "negative": lab.negative, "identity": lab.identity()}
    run(pack, "FusedIDInstantIDControl", **{"adapter": "instantid/none.bin", **sockets, **values})


# Names that lead out of the model folders

OUTSIDE = ["../secret.safetensors", "../../secret.safetensors", "a/../../secret.safetensors", "..\\secret.safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, "absolute"])
@pytest.mark.parametrize(
    ("node_id", "widget", "prefix"),
    [
        ("FusedIDAttentionPatch", "adapter", ""),
        ("FusedIDAttentionPatch", "adapter", "ipadapter/"),
        ("FusedIDInstantIDControl", "adapter", ""),
        ("FusedIDInstantIDControl", "adapter", "instantid/"),
        ("FusedIDLoadIdentity", "identity_file", ""),
        ("HybridGuidance", "guidance", ""),
        ("HybridGuidance", "prior", ""),
        ("FusedIDFaceFolder", "folder", ""),
        ("LoadIdentityEncoder", "face_pack", ""),
    ],
)
def test_no_name_leads_out_of_the_model_folders(
    pack: Any, lab: FusionLab, name: str, node_id: str, widget: str, prefix: str
) -> None:
    """A sound file lies beside the folders; its name is refused, and the file is never opened."""
    models = pack.host.base / "models"
    secrets = [models / "secret.safetensors", pack.host.base / "secret.safetensors"]
    for secret in secrets:
        secret.write_bytes(lab.adapter.read_bytes())
    value = prefix + (str(secrets[0]) if name == "absolute" else name)
    sockets: dict[str, Any] = {}
    if node_id in ("FusedIDAttentionPatch", "HybridGuidance"):
        sockets = {"model": lab.model, "identity": lab.identity()}
    if node_id == "FusedIDInstantIDControl":
        sockets = {"positive": lab.positive, "negative": lab.negative, "identity": lab.identity()}
    if widget == "prior":
        sockets |= {"text": "a face", "clip": object()}
    try:
        with guard.opened() as opened, pytest.raises(ValueError, match=node_id):
            peer_ours.run_node(pack.nodes[node_id], **sockets, **{widget: value})
    finally:
        for secret in secrets:
            secret.unlink()
    assert not [path for path in opened if "secret.safetensors" in path]

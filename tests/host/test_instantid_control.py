"""FusedIDInstantIDControl: the ControlNet reads the face's tokens, the model the text; five points as InstantID's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import community_files as files
import fusion_lab
import numpy as np
import peer_ours
import peer_packs
import pulid_files
import pytest
import torch
from fusion_lab import FusionLab, relative
from safetensors.torch import save_file
from torch import Tensor

from faces.keypoints_picture import draw_keypoints

NODE = "FusedIDInstantIDControl"
POINTS = np.array([[20, 24], [44, 25], [33, 38], [22, 48], [43, 49]], dtype=np.float32)


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, "sdxl_tiny")


@pytest.fixture(scope="module")
def entry(lab: FusionLab) -> str:
    order = lab.pack.submodule("attention.community.layers").processor_order(lab.sites)
    tensors = files.random_tensors(files.file_shapes("instantid", "sdxl", widths=[site.channels for site in order]))
    path = Path(lab.pack.host.base) / "models" / "instantid" / "control.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return "instantid/control.safetensors"


def person(lab: FusionLab, *numbers: int, keypoints: np.ndarray | None = POINTS) -> Any:
    module = lab.pack.submodule("faces.identity")
    identity = pulid_files.person(lab.pack, *numbers)
    references = tuple(
        module.Reference(one.crop, one.embedding, keypoints, one.score, one.weight) for one in identity.references
    )
    return module.Identity(references, identity.encoder, identity.name)


def control(lab: FusionLab, entry: str, **given: Any) -> tuple[Any, Any, Tensor]:
    given = {"positive": lab.positive, "negative": lab.negative, "adapter": entry, **given}
    given.setdefault("identity", person(lab, 1))
    return peer_ours.run_node(lab.pack.nodes[NODE], **given)


def applied(lab: FusionLab, small_models: Any, positive: Any, negative: Any, picture: Tensor) -> tuple[Any, Any, Any]:
    import nodes

    net = nodes.ControlNetLoader().load_controlnet(small_models.controlnet("sdxl_tiny").name)[0]
    return (*nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, net, picture, 0.7, 0.0, 1.0), net)


def test_the_controlnet_reads_the_tokens_and_the_model_the_text(lab: FusionLab, entry: str, small_models: Any) -> None:
    positive, negative, picture = control(lab, entry, identity=person(lab, 1, 2), width=64, height=64)
    source, community = lab.pack.submodule("nodes.community_source"), lab.pack.submodule("nodes.community_files")
    adapter = community.load_community_choice(entry, "as recognised")
    tokens = source.identity_tokens(adapter, person(lab, 1, 2))[0]
    assert "cross_attn_controlnet" not in lab.positive[0][1]
    assert (
        positive[0][0] is lab.positive[0][0] and positive[0][1]["pooled_output"] is lab.positive[0][1]["pooled_output"]
    )
    with_net = applied(lab, small_models, positive, negative, picture)
    seen: dict[str, list[Tensor]] = {"control": [], "model": []}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].append(kwargs.get("context", args[3:] and args[3])),
            with_kwargs=True,
        )
        for name, module in (("control", with_net[2].control_model), ("model", lab.unet))
    ]
    try:
        out = lab.sample(lab.model, positive=with_net[0], negative=with_net[1], steps=1)
    finally:
        for hook in hooks:
            hook.remove()
    (context,) = seen["control"]
    torch.testing.assert_close(context.float(), torch.cat([tokens.negative, tokens.positive]), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(seen["model"][0], torch.cat([lab.negative[0][0], lab.positive[0][0]]))
    text = applied(lab, small_models, lab.positive, lab.negative, picture)
    assert relative(lab.sample(lab.model, positive=text[0], negative=text[1], steps=1), out) > 1e-3


def test_it_is_what_the_instantid_pack_does(lab: FusionLab, entry: str, small_models: Any) -> None:
    peer = sys.modules[f"{peer_packs.load_peer(lab.pack.host, 'ComfyUI_InstantID').__name__}.InstantID"]
    (loaded,) = peer.InstantIDModelLoader().load_model(entry.split("/")[1])
    mean = torch.stack([pulid_files.seen(number)[0] for number in (1, 2)]).mean(0)[None]
    cond, uncond = loaded.get_image_embeds(mean, torch.zeros_like(mean))
    positive, negative, picture = control(lab, entry, identity=person(lab, 1, 2), width=64, height=64)
    ours = applied(lab, small_models, positive, negative, picture)
    theirs = peer.ApplyInstantIDControlNet().apply_controlnet(
        {"cond": cond, "uncond": uncond}, ours[2], picture, lab.positive, lab.negative, 0.7, 0.0, 1.0
    )
    plain, mine, wanted = (
        lab.sample(lab.model, positive=p, negative=n, steps=1)
        for p, n in ((lab.positive, lab.negative), ours[:2], theirs)
    )
    assert relative(wanted, plain) > 1e-3
    assert relative(mine - plain, wanted - plain) < 1e-3


def test_the_points_look_as_the_instantid_pack_draws_them(pack: Any) -> None:
    peer = sys.modules[f"{peer_packs.load_peer(pack.host, 'ComfyUI_InstantID').__name__}.InstantID"]
    rng = np.random.default_rng(0)
    face = np.array([[0.35, 0.4], [0.65, 0.4], [0.5, 0.55], [0.38, 0.7], [0.62, 0.7]]) - 0.5
    for _ in range(20):
        height, width = rng.integers(300, 1200, 2)
        turn, scale = rng.uniform(-1, 1), rng.uniform(0.2, 1.2) * min(width, height)
        rotated = face @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        points = (rotated * scale + rng.normal(0, 8, (5, 2)) + [width / 2, height / 2]).astype(np.float32)
        theirs = np.asarray(peer.draw_kps(np.zeros((height, width, 3), np.uint8), points))
        ours = draw_keypoints(points, int(width), int(height))
        assert (ours != theirs).any(-1).sum() <= 0.002 * theirs.any(-1).sum()


def test_the_picture_has_the_wanted_size_and_the_face_its_place(lab: FusionLab, entry: str) -> None:
    big = control(lab, entry, width=256, height=512)[2]
    assert big.shape == (1, 512, 256, 3)
    assert tuple(big[0, 128 + 4 * 24, 4 * 20].tolist()) == (1.0, 0.0, 0.0), "left eye, four times as large, centred"
    assert control(lab, entry, width=0, height=0)[2].shape == (1, 64, 64, 3)


class OneFace:
    """An encoder that finds two faces, the second larger, at fixed places."""

    det_size, score_floor, provider = 640, 0.5, "CPU"

    def detect(self, image: np.ndarray, size: int, threshold: float) -> list[Any]:
        from faces.encoder import Face

        if image.max() == 0:
            return []
        return [
            Face((0.0, 0.0, 30.0, 30.0), 0.95, POINTS / 4),
            Face((30.0, 30.0, 96.0, 96.0), 0.9, POINTS + 30),
        ]


def test_a_picture_gives_the_pose_of_its_largest_face(lab: FusionLab, entry: str) -> None:
    image = torch.full((2, 100, 120, 3), 0.5)
    drawn = control(lab, entry, image=image, encoder=OneFace(), width=0, height=0)[2]
    assert drawn.shape == (2, 100, 120, 3)
    expected = torch.from_numpy(draw_keypoints(POINTS + 30, 120, 100)).float() / 255
    assert torch.equal(drawn[1], expected)
    image[1] = 0
    with pytest.raises(ValueError, match=r"FusedIDInstantIDControl: no face found in picture 2"):
        control(lab, entry, image=image, encoder=OneFace())


def test_what_it_cannot_take_it_says(lab: FusionLab, entry: str) -> None:
    routed = lab.routed([person(lab, 1), person(lab, 2)], fusion_lab.halves())
    cases = (
        ({"identity": routed}, "got 2 routed people; InstantID's ControlNet takes one person"),
        ({"identity": None}, "got NoneType as identity"),
        ({"identity": person(lab, 1, keypoints=None)}, "there are no key points"),
        ({"image": torch.zeros(1, 64, 64, 3)}, "'encoder' is not"),
        ({"identity": lab.identity()}, "trained with the face pack antelopev2"),
        ({"width": 9000}, "accepted is 0 to 8192"),
    )
    for given, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            control(lab, entry, **given)
        assert str(caught.value).startswith(f"{NODE}: ")


def test_only_instantids_files_are_offered(lab: FusionLab, entry: str) -> None:
    pulid, _ = pulid_files.write_pulid(lab.pack, lab.sites, "pulid-v1")
    choices = lab.pack.submodule("nodes.instantid_control").instantid_choices()
    assert entry in choices and pulid not in choices
    node = lab.pack.nodes[NODE]
    assert node.validate_inputs(adapter=entry) is True
    assert "is PuLID v1; needed is InstantID's ip-adapter.bin" in node.validate_inputs(adapter=pulid)
    assert "is not there or not readable" in node.validate_inputs(adapter="instantid/gone.bin")

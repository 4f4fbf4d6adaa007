"""The face nodes inside the real ComfyUI: sockets, validation, errors that name the node, files on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Run = Callable[..., tuple[Any, ...]]
NODE_IDS = (
    "LoadIdentityEncoder",
    "FaceEmbed",
    "FusedIDSaveIdentity",
    "FusedIDLoadIdentity",
    "FusedIDMix",
    "FusedIDFaceSimilarity",
)


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_every_input_has_a_tooltip_and_the_node_a_description(pack: Any, face_models: Path, node_id: str) -> None:
    schema = pack.nodes[node_id].define_schema()
    assert schema.node_id == node_id and schema.category == "FusedID" and schema.display_name and schema.description
    missing = [entry.id for entry in schema.inputs if not entry.tooltip]
    assert missing == []


def test_advanced_inputs_are_marked_for_the_frontend(pack: Any) -> None:
    optional = pack.nodes["FaceEmbed"].INPUT_TYPES()["required"]
    assert optional["margin"][1]["advanced"] is True and "advanced" not in optional["face"][1]
    assert optional["margin"][1]["max"] == 2.0


def test_the_drop_down_lists_packs_on_disk_first_with_licences(pack: Any, face_models: Path) -> None:
    options = pack.nodes["LoadIdentityEncoder"].define_schema().inputs[0].options
    assert options[0].startswith("test_pack (licence unknown")
    assert any(option.startswith("antelopev2 (download, non-commercial") for option in options)


def test_a_pack_that_is_not_there_is_refused_before_running(pack: Any, face_models: Path) -> None:
    node = pack.nodes["LoadIdentityEncoder"]
    assert node.validate_inputs(face_pack="test_pack (download, x, 1 MB)") is True
    assert node.validate_inputs(face_pack="buffalo_l (download, non-commercial research only, 289 MB)") is True
    problem = node.validate_inputs(face_pack="buffalo_l (non-commercial research only)")
    assert "not on this machine" in problem and str(face_models / "models" / "buffalo_l") in problem


def test_the_encoder_is_loaded_again_when_its_files_change(pack: Any, face_models: Path) -> None:
    node = pack.nodes["LoadIdentityEncoder"]
    inputs = {"face_pack": "test_pack (any)", "provider": "auto", "det_size": 640}
    before = node.fingerprint_inputs(**inputs)
    assert node.fingerprint_inputs(**inputs) == before
    detector = face_models / "models" / "test_pack" / "det_500m.onnx"
    stat = detector.stat()
    os.utime(detector, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert node.fingerprint_inputs(**inputs) != before


def test_a_missing_provider_is_an_error_that_names_the_node(run: Run) -> None:
    with pytest.raises(ValueError, match=r"LoadIdentityEncoder: the provider 'NoSuch' is not in this onnxruntime"):
        run("LoadIdentityEncoder", face_pack="test_pack", provider="NoSuch", det_size=640)


def test_face_embed_gives_identity_preview_and_report(
    to_image: Any, embed: Run, tight_portraits: dict[str, np.ndarray]
) -> None:
    pictures = [tight_portraits[f"trip0_{rendering}"] for rendering in "abc"]
    identity, preview, report = embed(*pictures, weights="1, 0.5; 2", name=" Trip ")
    assert identity.name == "Trip" and [r.weight for r in identity.references] == [1.0, 0.5, 2.0]
    assert identity.references[0].embedding.shape == (128,)
    assert preview.shape == (3, *pictures[0].shape) and preview.dtype == torch.float32
    assert preview.min() >= 0 and preview.max() <= 1
    assert not torch.equal(preview, to_image(*pictures))
    assert report.startswith("3 references, encoder test_pack") and report.count("used number 1") == 3


def test_the_input_image_is_not_changed(
    embed_defaults: dict[str, Any], to_image: Any, embed: Run, run: Any, encoder: Any
) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    image = to_image(data.astronaut())
    before = image.clone()
    run("FaceEmbed", encoder=encoder, image=image, **embed_defaults)
    assert torch.equal(image, before)


def test_photos_of_another_size_are_added_to_an_identity(
    embed: Run, tight_portraits: dict[str, np.ndarray], load: Callable[[str], np.ndarray]
) -> None:
    first = embed(tight_portraits["trip0_a"], name="Trip")[0]
    both = embed(load("congress_gpo_225x275/A000014.jpg"), add_to=first)[0]
    assert len(both.references) == 2 and both.name == "Trip"
    assert both.references[0] is first.references[0]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (torch.full((1, 64, 64, 3), float("nan")), "picture 1 has 12288 values that are NaN"),
        (torch.zeros(1, 1, 1, 3), "picture 1 is 1 x 1 pixels"),
        (torch.zeros(0, 64, 64, 3), "empty batch"),
        (torch.zeros(64, 64, 3), r"shape \[64, 64, 3\]"),
        (torch.zeros(1, 64, 64, 2), "1, 3 or 4 channels"),
        (torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(0)), "picture 1: no face found"),
    ],
)
def test_bad_images_are_errors_that_name_the_node(
    embed_defaults: dict[str, Any], run: Run, encoder: Any, image: torch.Tensor, reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"^FaceEmbed: .*{reason}"):
        run("FaceEmbed", encoder=encoder, image=image, **embed_defaults)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"weights": "1, x"}, "no list of numbers"),
        ({"weights": "1 2"}, "got 2 weights for 1 pictures"),
        ({"weights": "-1"}, "weight must be a finite number >= 0"),
        ({"number": 2}, "face number 2 was asked for, but 1 face was found"),
        ({"face": "most similar"}, "needs an identity"),
        ({"min_size": 4000}, "wanted are 4000 px"),
    ],
)
def test_bad_settings_are_errors_that_name_the_node(
    embed: Run, tight_portraits: dict[str, np.ndarray], inputs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^FaceEmbed: .*{reason}"):
        embed(tight_portraits["syn00"], **inputs)


def test_saved_identities_load_with_everything_and_show_in_the_drop_down(
    run: Run, pack: Any, embed: Any, encoder: Any, tight_portraits: dict[str, np.ndarray]
) -> None:
    identity = embed(tight_portraits["syn00"], tight_portraits["syn01"], weights="1 3")[0]
    named, file = run("FusedIDSaveIdentity", identity=identity, name="set/Ada", if_exists="overwrite")
    assert (named.name, file) == ("Ada", "set/Ada.safetensors")
    node = pack.nodes["FusedIDLoadIdentity"]
    choices = node.define_schema().inputs[0].options
    (choice,) = [choice for choice in choices if choice.replace("\\", "/") == file]
    assert node.validate_inputs(identity_file=choice) is True
    loaded, preview, report = run("FusedIDLoadIdentity", identity_file=choice, encoder=encoder)
    hashed = pack.submodule("faces.identity").identity_hash
    assert hashed(loaded) == hashed(identity)
    assert preview.shape == (2, 256, 256, 3)
    assert report.startswith("Ada: 2 references, weights 1, 3\nencoder test_pack")


def test_saving_again_adds_a_number_but_never_the_same_person_twice(
    run: Run, embed: Any, tight_portraits: dict[str, np.ndarray]
) -> None:
    one, other = embed(tight_portraits["syn02"])[0], embed(tight_portraits["syn03"])[0]
    files = [
        run("FusedIDSaveIdentity", identity=identity, name="twice", if_exists="add a number")[1]
        for identity in (one, one, other, other)
    ]
    assert files == [f"twice{suffix}.safetensors" for suffix in ("", "", "_2", "_2")]
    run("FusedIDSaveIdentity", identity=other, name="twice", if_exists="overwrite")
    assert run("FusedIDSaveIdentity", identity=other, name="twice", if_exists="add a number")[1] == files[0]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "C:\\evil", "a/../../evil", ""])
def test_names_that_leave_the_folder_are_refused_and_nothing_is_written(
    run: Run,
    embed: Any,
    comfyui_base: Path,
    tight_portraits: dict[str, np.ndarray],
    name: str,
) -> None:
    identity = embed(tight_portraits["syn02"])[0]
    before = sorted(comfyui_base.rglob("*.safetensors"))
    with pytest.raises(ValueError, match=r"^FusedIDSaveIdentity: .*not a usable name"):
        run("FusedIDSaveIdentity", identity=identity, name=name, if_exists="overwrite")
    assert sorted(comfyui_base.rglob("*.safetensors")) == before


def test_missing_damaged_and_changed_files(
    run: Run,
    pack: Any,
    embed: Any,
    comfyui_base: Path,
    tight_portraits: dict[str, np.ndarray],
) -> None:
    node = pack.nodes["FusedIDLoadIdentity"]
    assert "is not in" in node.validate_inputs(identity_file="nobody.safetensors")
    assert "is not in" in node.validate_inputs(identity_file="../../secret.safetensors")
    file = run("FusedIDSaveIdentity", identity=embed(tight_portraits["syn04"])[0], name="x", if_exists="overwrite")[1]
    path = next((comfyui_base / "models" / "identities").rglob(file))
    before = node.fingerprint_inputs(identity_file=file)
    path.write_bytes(path.read_bytes()[:1000])
    assert node.fingerprint_inputs(identity_file=file) != before
    with pytest.raises(ValueError, match=r"^FusedIDLoadIdentity: x\.safetensors cannot be used as an identity"):
        run("FusedIDLoadIdentity", identity_file=file)

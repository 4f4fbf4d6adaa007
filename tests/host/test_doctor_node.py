"""FusedIDDoctor inside the host: versions, folders, and whose patches a MODEL carries."""

from __future__ import annotations

from typing import Any

import peer_ours


def _execute(pack: Any, model: Any = None) -> str:
    return pack.nodes["FusedIDDoctor"].execute(model=model).args[0]


def test_the_report_names_host_kernel_and_folders(pack: Any) -> None:
    report = _execute(pack)
    assert f"ComfyUI {pack.host.version}, device cpu, attention kernel" in report
    assert str(pack.host.base / "models" / "ipadapter") in report
    assert "face pack buffalo_l" in report
    assert "model:" not in report


def test_an_unpatched_model_has_no_replaced_layer(pack: Any, small_models: Any) -> None:
    report = _execute(pack, small_models.load_unet())
    number = len(pack.submodule("attention.sites").discover_sites(small_models.load_unet().model.diffusion_model))
    assert f"{number} cross-attention layers" in report
    assert f"no layer is replaced (0 of {number})" in report


def test_layers_another_pack_replaces_are_counted_with_its_name(pack: Any, small_models: Any) -> None:
    model = small_models.load_unet().clone()
    site = pack.submodule("attention.sites").discover_sites(model.model.diffusion_model)[0]

    def theirs(q: Any, k: Any, v: Any, extra_options: dict) -> Any:
        return v

    theirs.__module__ = "/some/ComfyUI/custom_nodes/SomePack.attention"
    model.set_model_attn2_replace(theirs, *site.key)
    report = _execute(pack, model)
    assert "SomePack (test_layers_another_pack_replaces_are_counted_with_its_name.theirs) replaces 1 of" in report


def test_it_runs_every_time(pack: Any) -> None:
    mark = pack.nodes["FusedIDDoctor"].fingerprint_inputs()
    assert mark != mark


def test_our_layers_are_counted_as_ours(pack: Any, small_models: Any) -> None:
    scene = peer_ours.make_scene(pack, small_models, "sd15_tiny")
    number = len(scene.keys)
    report = _execute(pack, scene.patched(scene.model))
    assert f"FusedIDAttentionPatch acts in {number} of {number} cross-attention layers" in report

"""HybridGuidance through the real server's HTTP API: style, text with a prior, faces, regions, refusals."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guidance_files import clip_vision_vit_l, clip_with_projection, guidance_for, prior_vit_l
from guidance_lab import write_guidance
from live_server import PromptError
from PIL import Image
from stand_ins import put_face_pack
from workflow_forms import with_inputs

from attention.guidance_settings import PAPER_TOWERS

pytestmark = pytest.mark.host

FACE = 128  # width of the test pack's recogniser
PRIOR = "tiny/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files(server, small_models) -> dict[str, str]:
    """Everything the prompt names, on the server's disk."""
    models = server.base / "models"
    clip_vision_vit_l(models)
    clip_with_projection(small_models)
    prior_vit_l(models)
    guidance_for(models, face_width=FACE)
    small_models.vae()
    pixels = np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(server.base / "input" / "style.png")
    return {"unet": small_models.unet("sd15_tiny").name}


def clip_l(name: str) -> dict[str, str]:
    return {"clip_name": name, "type": "stable_diffusion"}


def prompt(files: dict[str, str], **guidance: Any) -> dict[str, Any]:
    """Style image, text and prior into a one-step sample and the node's report."""
    inputs = {
        "model": ["1", 0], "guidance": "guidance_http.safetensors", "alpha": 0.5, "text": "a watercolour",
        "prior": PRIOR, "prior_steps": 3, "prior_scale": 2.0, "seed": 1, "background": "mean",
        "clip_vision": ["3", 0], "style_image": ["4", 0], "clip": ["5", 0],
    }  # fmt: skip
    sampler = {
        "model": ["6", 2], "positive": ["6", 0], "negative": ["6", 1], "latent_image": ["7", 0], "seed": 1, "steps": 1,
        "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
    }  # fmt: skip
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": files["unet"], "weight_dtype": "default"}},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": "taesd"}},
        "3": {"class_type": "CLIPVisionLoader", "inputs": {"clip_name": "clip_vit_l.safetensors"}},
        "4": {"class_type": "LoadImage", "inputs": {"image": "style.png"}},
        "5": {"class_type": "CLIPLoader", "inputs": clip_l("clip_l_projected.safetensors")},
        "6": {"class_type": "HybridGuidance", "inputs": {**inputs, **guidance}},
        "7": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "8": {"class_type": "KSampler", "inputs": sampler},
        "9": {"class_type": "VAEDecode", "inputs": {"samples": ["8", 0], "vae": ["2", 0]}},
        "10": {"class_type": "SaveImage", "inputs": {"images": ["9", 0], "filename_prefix": "guidance"}},
        "11": {"class_type": "PreviewAny", "inputs": {"source": ["6", 4]}},
    }  # fmt: skip


def run(server, api: dict[str, Any]) -> tuple[np.ndarray, str]:
    """The picture and the report."""
    outputs = server.queue(api)["outputs"]
    picture = np.asarray(Image.open(io.BytesIO(server.view(outputs["10"]["images"][0]))))
    return picture.astype(np.float32), outputs["11"]["text"][0]


def without(api: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**api, "6": {**api["6"], "inputs": {k: v for k, v in api["6"]["inputs"].items() if k not in names}}}


def test_alpha_moves_between_text_and_style_over_http(server, files):
    pictures = {alpha: run(server, prompt(files, alpha=alpha))[0] for alpha in (0.0, 1.0)}
    style_only = run(server, without(prompt(files, text=""), "clip"))[0]
    text_only = run(server, without(prompt(files), "style_image", "clip_vision"))[0]
    np.testing.assert_array_equal(pictures[1.0], style_only)
    np.testing.assert_array_equal(pictures[0.0], text_only)
    assert np.abs(pictures[0.0] - pictures[1.0]).max() > 2
    assert pictures[1.0].std() > 1


def test_the_report_says_what_was_done(server, files):
    report = run(server, prompt(files, alpha=0.25))[1]
    assert "25% style image, 75% text" in report
    assert PRIOR in report
    assert "faces: none" in report


@pytest.mark.assets
def test_a_face_reaches_the_picture_over_http(server, files, assets):
    encoder = {"face_pack": put_face_pack(server, assets), "provider": "auto", "det_size": 640}
    pictures = []
    for photo in sorted((assets / "faces" / "sfhq_crops").glob("syn*"))[:2]:
        api = without(prompt(files, alpha=1.0, text="", identity=["22", 0]), "clip")
        api |= {
            "20": {"class_type": "LoadImage", "inputs": {"image": server.upload_image(photo)}},
            "21": {"class_type": "LoadIdentityEncoder", "inputs": encoder},
            "22": {"class_type": "FaceEmbed", "inputs": face_embed_inputs(server)},
        }
        pictures.append(run(server, api)[0])
    assert np.abs(pictures[0] - pictures[1]).max() > 2


def face_embed_inputs(server) -> dict[str, Any]:
    """Every widget at its default."""
    required = server.object_info("FaceEmbed")["input"]["required"]
    defaults = {name: spec[1]["default"] for name, spec in required.items() if "default" in (spec[1:] or [{}])[0]}
    return {**defaults, "encoder": ["21", 0], "image": ["20", 0]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"HybridGuidance": {"clip": ["12", 0]}}, r"text_projection.*clip_l\.safetensors"),
        ({"UNETLoader": {"unet_name": "XL"}}, r"Stable Diffusion 1\.x.*2048"),
        ({"HybridGuidance": {"guidance": "guidance_three.safetensors"}}, "RN101 is missing"),
    ],
    ids=["no text_projection", "an SDXL model", "missing towers"],
)
def test_refusals_reach_the_user_over_http(server, files, small_models, changes, words):
    folder: Path = server.base / "models" / "fusedid"
    write_guidance(folder / "guidance_three.safetensors", towers=PAPER_TOWERS, face_width=FACE, face_encoder="")
    if "UNETLoader" in changes:
        changes = {"UNETLoader": {"unet_name": small_models.unet("sdxl_tiny").name}}
    api = with_inputs(prompt(files), changes)
    api["12"] = {
        "class_type": "CLIPLoader",
        "inputs": {"clip_name": small_models.clip().name, "type": "stable_diffusion"},
    }
    with pytest.raises(PromptError, match="(?s)HybridGuidance: .*" + words):
        server.queue(api)


def test_alpha_out_of_range_is_refused_before_anything_runs(server, files):
    with pytest.raises(PromptError, match="alpha"):
        server.queue(prompt(files, alpha=1.5))

"""The server helper against the real server: a picture comes out, and errors arrive as exceptions."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from live_server import RUN_SECONDS, PromptError
from PIL import Image


def text_to_image(checkpoint: str, *, steps: int = 1, size: int = 64) -> dict:
    """The smallest useful prompt in API format."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a portrait"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": 1,
                "steps": steps,
                "cfg": 5.0,
                "sampler_name": "euler_ancestral",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "live"}},
    }


def test_picture_comes_out_of_the_real_server(server, small_models):
    prompt = text_to_image(small_models.checkpoint("sd15_tiny").name)
    (image,) = server.queue(prompt)["outputs"]["7"]["images"]
    picture = np.asarray(Image.open(io.BytesIO(server.view(image))))
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 5
    assert (server.base / "output" / image["filename"]).is_file()


def test_refused_prompt_says_what_is_wrong(server):
    prompt = text_to_image("absent.safetensors")
    with pytest.raises(PromptError, match=r"absent\.safetensors"):
        server.queue(prompt)


def test_failing_node_raises_with_its_name(server, small_models):
    prompt = text_to_image(small_models.checkpoint("sd15_tiny").name)
    prompt["8"] = {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}
    prompt["9"] = {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}
    (server.base / "input" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(PromptError, match="LoadImage") as failure:
        server.queue({key: prompt[key] for key in ("8", "9")})
    assert failure.value.details["node_id"] == "8"


def test_interrupt_stops_a_run(server, small_models):
    prompt_id = server.submit(text_to_image(small_models.checkpoint("sd15_tiny").name, steps=5000))
    give_up = time.monotonic() + RUN_SECONDS
    while time.monotonic() < give_up and not server.get_json(f"/history/{prompt_id}"):
        server.interrupt()  # again and again: the host forgets one that comes before the run has begun
        server.pause()
    with pytest.raises(PromptError, match="interrupted"):
        server.wait(prompt_id)


def test_uploaded_picture_is_offered_to_load_image(server, tmp_path):
    Image.new("RGB", (9, 7), (200, 10, 10)).save(tmp_path / "red.png")
    name = server.upload_image(tmp_path / "red.png")
    assert name in server.object_info("LoadImage")["input"]["required"]["image"][0]
    shown = server.view({"filename": name, "type": "input", "subfolder": ""})
    assert Image.open(io.BytesIO(shown)).size == (9, 7)

"""The promises of hybrid guidance, by name, through a real server's HTTP API, on what its sockets carry."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import make_base
from guidance_client import FACE, Client, write_pictures
from guidance_files import clip_vision_vit_l, clip_with_projection, guidance_for, prior_vit_l
from guidance_lab import IDENTITY_LINEAR, write_guidance
from live_server import PromptError, start_server
from stand_ins import put_face_pack

from attention.guidance import hybrid_guidance
from attention.guidance_settings import Tower

pytestmark = [pytest.mark.host, pytest.mark.assets]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def client(comfyui_checkout, comfyui_base, small_models, assets, tmp_path_factory) -> Iterator[Client]:
    base = tmp_path_factory.mktemp("probed")
    (base / "models").symlink_to(comfyui_base / "models", target_is_directory=True)
    make_base(base)
    shutil.copyfile(Path(__file__).with_name("probe_nodes.py"), base / "custom_nodes" / "probe_nodes.py")
    models = base / "models"
    clip_vision_vit_l(models)
    clip_with_projection(small_models)
    prior_vit_l(models)
    guidance_for(models, face_width=FACE)
    small_models.vae()
    write_pictures(base / "input", assets)
    unet = small_models.unet("sd15_tiny").name
    server = start_server(comfyui_checkout, base, ROOT)
    try:
        yield Client(server, put_face_pack(server, assets), unet)
    finally:
        server.stop()


def other_style(api: dict[str, Any]) -> dict[str, Any]:
    return {**api, "style": {"class_type": "LoadImage", "inputs": {"image": "style2.png"}}}


def with_person(client: Client, number: int, **inputs: Any) -> dict[str, Any]:
    return {**client.person(number), **client.guided(identity=[f"face{number}", 0], **inputs)}


def test_alpha_1_and_0_are_one_branch_alone_and_between_is_linear(client):
    image = client.conditioning(client.styled())
    text = client.conditioning(client.guided(style_image=None, clip_vision=None))
    at = {alpha: client.conditioning(client.guided(alpha=alpha)) for alpha in (0.0, 0.3, 1.0)}
    assert torch.equal(at[1.0], image)
    assert torch.equal(at[0.0], text)
    assert float((image - text).abs().max()) > 1
    torch.testing.assert_close(at[0.3], 0.3 * image + 0.7 * text, atol=1e-5, rtol=1e-5)


def test_both_branches_go_through_the_one_linear_of_the_file(client):
    """The identity Linear hands out each branch's own embedding; the file's Linear must map both."""
    style = client.conditioning(client.styled(guidance=IDENTITY_LINEAR))[0]
    text = client.conditioning(client.guided(guidance=IDENTITY_LINEAR, style_image=None, clip_vision=None))[0]
    nobody = torch.zeros(1, FACE)
    with torch.no_grad():
        expected = [client.guidance(branch, nobody) for branch in (style, text)]
    torch.testing.assert_close(client.conditioning(client.guided(alpha=1.0)), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(client.conditioning(client.guided(alpha=0.0)), expected[1], atol=1e-5, rtol=1e-5)


def test_swapping_the_face_changes_only_the_identity_part(client):
    first, second = (client.conditioning(with_person(client, n)) for n in (1, 2))
    elsewhere = [client.conditioning(other_style(with_person(client, n, text="a forest"))) for n in (1, 2)]
    torch.testing.assert_close(second - first, elsewhere[1] - elsewhere[0], atol=1e-4, rtol=1e-4)
    unit = [face / face.norm() for face in (client.embedding(1), client.embedding(2))]
    columns = client.guidance.linear.weight[:, 768:]
    expected = ((unit[1] - unit[0]) @ columns.T).reshape(first.shape)
    torch.testing.assert_close(second - first, expected, atol=1e-4, rtol=1e-4)
    assert float(expected.abs().max()) > 0.1


def test_a_zero_face_embedding_is_the_non_human_case(client):
    style = client.conditioning(client.styled(guidance=IDENTITY_LINEAR))[0]
    W, b = client.guidance.linear.weight, client.guidance.linear.bias
    expected = (style @ W[:, :768].T + b).reshape(1, 2, 768)
    torch.testing.assert_close(client.conditioning(client.styled()), expected, atol=1e-5, rtol=1e-5)


def test_the_guidance_file_gives_the_conditioning_of_the_training_code(client):
    style = client.conditioning(client.styled(guidance=IDENTITY_LINEAR))[0]
    api = {**client.person(1), **client.styled(identity=["face1", 0])}
    with torch.no_grad():
        expected = hybrid_guidance(
            client.guidance, face_BD=client.embedding(1), style_BS=style, text_BS=None, alpha=1.0
        )
    probed = client.probe_all(api, "ProbeConditioning", conditioning=["guide", 0])
    torch.testing.assert_close(probed["value"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(client.conditioning(api, 1), client.guidance.null(), atol=1e-5, rtol=1e-5)
    assert not probed["pooled"].any()


def test_per_region_output_equals_running_that_identity_alone(client):
    together = client.attention({**client.two_people(), **client.styled(routed=["router2", 0])})
    left = (torch.arange(64) % 8) < 3
    for number, mine in ((1, left), (2, left.reshape(8, 8).flip(1).flatten())):
        alone = client.attention({**client.person(number), **client.styled(identity=[f"face{number}", 0])})
        torch.testing.assert_close(together[:, mine], alone[:, mine], atol=2e-4, rtol=1e-4)
        assert float((together[:, ~mine] - alone[:, ~mine]).abs().max()) > 1e-3


@pytest.mark.parametrize("background", ["mean", "random", "freeze"])
def test_permuting_identities_with_their_masks_changes_nothing(client, background):
    outputs = [
        client.attention({**client.two_people(order), **client.styled(routed=["router2", 0], background=background)})
        for order in ((1, 2), (2, 1))
    ]
    torch.testing.assert_close(*outputs, atol=2e-4, rtol=1e-4)


def test_freeze_keeps_the_background_in_a_real_ksampler(client):
    """What no mask covers is the input latent after sampling; the people are new."""
    api = {**client.two_people(), **client.styled(routed=["router2", 0], background="freeze")}
    sampler = {
        "model": ["guide", 2], "positive": ["guide", 0], "negative": ["guide", 1], "latent_image": ["masked", 0],
        "seed": 1, "steps": 3, "cfg": 3.0, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 0.8,
    }  # fmt: skip
    api |= client.prompt(
        vae=("VAELoader", {"vae_name": "taesd"}),
        small=(
            "ImageScale",
            {"image": ["photo1", 0], "upscale_method": "area", "width": 64, "height": 64, "crop": "center"},
        ),
        before=("VAEEncode", {"pixels": ["small", 0], "vae": ["vae", 0]}),
        masked=("SetLatentNoiseMask", {"samples": ["before", 0], "mask": ["guide", 3]}),
        after=("KSampler", sampler),
    )
    before, after = (client.probe(api, "ProbeLatent", latent=[name, 0]) for name in ("before", "after"))
    torch.testing.assert_close(after[..., 3:5], before[..., 3:5], atol=1e-5, rtol=1e-5)
    for people in (slice(0, 3), slice(5, 8)):
        assert float((after[..., people] - before[..., people]).abs().mean()) > 0.05
    assert "Set Latent Noise Mask" in client.report(api)


def test_separation_of_the_router_acts_with_this_node_alone(client):
    routed = {amount: client.two_people(separation=amount) for amount in (0.0, 8.0)}
    outputs = []
    for amount, people in routed.items():
        api = {**people, **client.styled(routed=["router2", 0])}
        outputs.append(client.attention(api))
        assert ("self-attention separation 8" in client.report(api)) == (amount > 0)
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-4


def test_a_text_beyond_77_tokens_is_averaged_and_the_report_says_so(client):
    api = client.guided(text="a photo of a cat, " * 40, style_image=None, clip_vision=None)
    assert "the mean of its 4 parts" in client.report(api)
    assert torch.isfinite(client.conditioning(api)).all()


def refused(client: Client, api: dict[str, Any], words: str) -> None:
    with pytest.raises(PromptError, match="(?s)" + words):
        client.server.queue({**api, **client.prompt(shown=("PreviewAny", {"source": ["guide", 4]}))})


def test_another_face_encoder_or_tower_set_is_refused_with_both_names(client):
    folder = client.server.base / "models" / "fusedid"
    write_guidance(
        folder / "encoder_b.safetensors", face_width=FACE, face_encoder="cd" * 32, face_encoder_name="pack B"
    )
    write_guidance(folder / "vit_h.safetensors", face_width=FACE, face_encoder="", towers=(Tower("ViT-H/14", 1024),))
    refused(client, with_person(client, 1, guidance="encoder_b.safetensors"), r"pack B \(128 numbers.*test_pack \(128")
    refused(client, client.styled(guidance="vit_h.safetensors"), r"ViT-H/14 \(1024\).*ViT-L/14 \(768\)")


def test_bad_input_is_refused_before_sampling(client):
    people = client.two_people()
    both = {"batch": {"class_type": "MaskToImage", "inputs": {"mask": ["mask1", 0]}}}
    both["two"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["batch", 0], "amount": 2}}
    both["masks"] = {"class_type": "ImageToMask", "inputs": {"image": ["two", 0], "channel": "red"}}
    nobody = {**people, "router2": {"class_type": "MultiIDMaskRouter", "inputs": {"mask": ["mask1", 0]}}}
    many = {**people, **both}
    many["router2"] = {
        "class_type": "MultiIDMaskRouter",
        "inputs": {**people["router2"]["inputs"], "mask": ["masks", 0]},
    }
    routed = client.styled(routed=["router2", 0])
    refused(client, {**nobody, **routed}, "identity")
    refused(client, {**many, **routed}, "batch of 2 masks")
    refused(client, client.styled(face_encoder=["encoder", 0]), "no face was found in style image 1")
    refused(client, client.guided(prior="gone.safetensors"), r"prior.*gone\.safetensors")
    refused(client, client.guided(alpha=-0.1), "alpha")


def test_a_prior_of_another_width_is_refused_with_both_numbers(client):
    from diffusers import PriorTransformer

    folder = client.server.base / "models" / "fusedid" / "priors" / "narrow"
    PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16).save_pretrained(
        folder
    )
    client.server.object_info("HybridGuidance")  # as a refresh of the page: the list of files is read again
    refused(client, client.guided(prior="narrow/diffusion_pytorch_model.safetensors"), r"16 numbers.*768")

"""HybridGuidance in the real host: what it hands to the sampler, and what the sampler makes of it."""

from __future__ import annotations

import pytest
import torch
from fusion_lab import relative
from guidance_lab import FACE, IDENTITY_LINEAR, STYLE, Lab, attention_output, embedding, sample, write_guidance

from attention.guidance import hybrid_guidance
from attention.guidance_file import load_guidance

pytestmark = pytest.mark.host

ROUNDING = 1e-4  # of the whole picture's size; the small models give numbers of hundreds, and some near 0


@pytest.fixture(scope="module")
def lab(pack, small_models, comfyui) -> Lab:
    return Lab(pack, small_models, comfyui.base)


def test_the_node_and_the_training_code_give_the_same_conditioning(lab):
    positive, negative = lab.styled(identity=lab.identity(1))[:2]
    trained = load_guidance(lab.file)  # the module as `training` imports it
    face = torch.from_numpy(embedding(1))[None]
    style = lab.vision.encode_image(STYLE)["image_embeds"]
    expected = hybrid_guidance(trained, face_BD=face, style_BS=style, text_BS=None, alpha=1.0)
    torch.testing.assert_close(positive[0][0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(negative[0][0], trained.null(), atol=1e-5, rtol=1e-5)


def test_without_identity_the_face_embedding_is_zero(lab):
    positive = lab.styled()[0]
    style = lab.vision.encode_image(STYLE)["image_embeds"]
    expected = load_guidance(lab.file)(style, torch.zeros(1, FACE))
    torch.testing.assert_close(positive[0][0], expected, atol=1e-5, rtol=1e-5)


def test_one_person_leaves_the_model_unpatched(lab):
    model, noise_mask, report = lab.styled(identity=lab.identity(1))[2:]
    assert model is not lab.unet
    assert model.model is lab.unet.model
    assert model.model_options == lab.unet.model_options
    assert not model.wrappers
    assert bool((noise_mask == 1).all())
    assert "person 1" in report
    assert "style image alone" in report


def test_identity_style_and_alpha_reach_the_image(lab):
    base = lab.run(identity=lab.identity(1), style_image=STYLE, clip_vision=lab.vision)
    other_face = lab.run(identity=lab.identity(2), style_image=STYLE, clip_vision=lab.vision)
    other_style = lab.run(identity=lab.identity(1), style_image=STYLE * 0.3, clip_vision=lab.vision)
    images = [sample(out[2], out[0], out[1]) for out in (base, base, other_face, other_style)]
    assert torch.equal(images[0], images[1])
    assert bool(torch.isfinite(images[0]).all())
    for image in images[2:]:
        assert float((image - images[0]).abs().max()) > 1e-3


def test_per_region_output_equals_running_that_identity_alone(lab):
    """At the first cross-attention the hidden state is the same in all runs, so equality is exact."""
    together = lab.styled(routed=lab.two_people())
    out = attention_output(together[2], together[0])
    columns = torch.zeros(8, 8).index_fill(1, torch.tensor([0, 1, 2]), 1).flatten().bool()
    for person, mine in ((1, columns), (2, columns.reshape(8, 8).flip(1).flatten())):
        alone = lab.styled(identity=lab.identity(person))
        expected = attention_output(alone[2], alone[0])
        assert relative(out[:, mine], expected[:, mine]) < ROUNDING
        assert float((out[:, ~mine] - expected[:, ~mine]).abs().max()) > 1e-3


@pytest.mark.parametrize("background", ["mean", "random", "freeze"])
def test_permuting_identities_with_their_masks_changes_nothing(lab, background):
    results = []
    for order in ((0, 1), (1, 0)):
        routed = lab.two_people(order)
        out = lab.styled(routed=routed, background=background, seed=4)
        results.append(sample(out[2], out[0], out[1]))
    assert relative(*results) < ROUNDING


def test_routing_acts_and_needs_the_model_output(lab):
    out = lab.styled(routed=lab.two_people())
    assert float((sample(out[2], out[0], out[1]) - sample(lab.unet, out[0], out[1])).abs().max()) > 1e-3


def test_routing_holds_when_the_host_repeats_the_context(lab, small_models):
    """Beside 12 negative tokens the host repeats our 6 to 12 in one batch; beside 84 it runs them apart."""
    out = lab.styled(routed=lab.two_people())
    assert out[0][0][0].shape[1] == 6
    tokens = small_models.conditioning(tokens=12)[0][0]
    batched = sample(out[2], out[0], [[tokens, {}]])
    apart = sample(out[2], out[0], [[tokens.repeat(1, 7, 1), {}]])
    assert relative(batched, apart) < ROUNDING


def test_the_input_model_is_never_changed_and_clones_share_one_state(lab):
    before = repr(lab.unet.model_options)
    out = lab.styled(routed=lab.two_people())
    again = out[2].clone().clone()
    assert repr(lab.unet.model_options) == before
    assert not lab.unet.wrappers
    torch.testing.assert_close(sample(again, out[0], out[1]), sample(out[2], out[0], out[1]))


def test_an_ordinary_prompt_on_the_routed_model_is_untouched(lab, small_models):
    out = lab.styled(routed=lab.two_people())
    positive, negative = small_models.conditioning(seed=1), small_models.conditioning(seed=2)
    assert torch.equal(sample(out[2], positive, negative), sample(lab.unet, positive, negative))


def test_freeze_keeps_the_background_latent(lab):
    out = lab.styled(routed=lab.two_people(), background="freeze")
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    result = sample(out[2], out[0], out[1], latent=latent, denoise=0.7, mask=out[3])
    torch.testing.assert_close(result[..., 3:5], latent[..., 3:5], atol=1e-5, rtol=1e-5)
    assert float((result[..., :3] - latent[..., :3]).abs().max()) > 1e-2


def test_image_to_image_starts_from_the_photo(lab):
    """METHOD 2.4: with a low denoise the photo's latent stays visible, with denoise 1 it does not matter."""
    out = lab.styled(identity=lab.identity(1))
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 5
    near = sample(out[2], out[0], out[1], latent=latent, denoise=0.2, steps=4)
    far = sample(out[2], out[0], out[1], steps=4)
    assert float((near - latent).abs().mean()) < float((far - latent).abs().mean())


def test_image_variation_checkpoints_work_with_the_identity_linear(lab):
    out = lab.styled(guidance=IDENTITY_LINEAR, identity=lab.identity(1))
    assert torch.equal(out[0][0][0], lab.vision.encode_image(STYLE)["image_embeds"][:, None])
    assert torch.equal(out[1][0][0], torch.zeros(1, 1, 768))
    assert "no effect" in out[4]
    other = lab.run(guidance=IDENTITY_LINEAR, style_image=STYLE * 0.3, clip_vision=lab.vision)
    assert float((sample(out[2], out[0], out[1]) - sample(other[2], other[0], other[1])).abs().max()) > 1e-3


def test_sdxl_samples_with_a_guidance_file_of_its_width(lab, small_models):
    wide = write_guidance(lab.file.with_name("guidance_xl.safetensors"), base="sdxl", context_width=2048)
    model = small_models.load_unet("sdxl_tiny")
    out = lab.styled(model=model, guidance=wide.name, routed=lab.two_people())
    image = sample(out[2], out[0], out[1])
    assert bool(torch.isfinite(image).all())
    assert float((image - sample(model, out[0], out[1])).abs().max()) > 1e-4

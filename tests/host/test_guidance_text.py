"""The prompt on its way into HybridGuidance, in the real host."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def clip(comfyui, small_models):
    """A CLIP-L with a text projection put in by hand: the small file has none."""
    clip = small_models.load_clip()
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.03)
    return clip


@pytest.fixture
def text(pack):
    return pack.submodule("nodes.guidance_text")


def test_text_enters_the_joint_space(clip, text):
    (chunk,) = text.encode_text(clip, "a photo of a cat")
    clip.cond_stage_model.set_clip_options({"projected_pooled": True})
    hidden, pooled = clip.encode_from_tokens(clip.tokenize("a photo of a cat"), return_pooled=True)
    encoder = clip.cond_stage_model.clip_l
    W = encoder.transformer.text_projection.weight.float()
    torch.testing.assert_close(chunk.embedding, pooled.float() @ W.T, atol=2e-2, rtol=2e-2)
    assert torch.equal(chunk.hidden, hidden.float())
    assert chunk.mask.sum() == 7  # start, five words, end


def test_bracket_weights_have_no_effect(clip, text):
    plain, weighted = (text.encode_text(clip, t)[0] for t in ("a cat", "a (cat:1.5)"))
    assert torch.equal(plain.hidden, weighted.hidden)
    assert torch.equal(plain.embedding, weighted.embedding)


def test_clip_options_are_restored(clip, text):
    encoder = clip.cond_stage_model.clip_l
    encoder.layer, encoder.layer_idx, encoder.return_projected_pooled = "hidden", -2, False
    text.encode_text(clip, "a cat")
    assert (encoder.layer, encoder.layer_idx, encoder.return_projected_pooled) == ("hidden", -2, False)
    encoder.reset_clip_options()


def test_a_text_longer_than_77_tokens_is_chunked_and_says_so(clip, text, caplog):
    with caplog.at_level("WARNING", logger="fusedid"):
        chunks = text.encode_text(clip, "a photo of a cat, " * 40)
    assert len(chunks) == 4
    assert "77 tokens" in caplog.text
    assert "4 parts" in caplog.text


def spoil(weight: torch.Tensor, how: str, encoder) -> None:
    if how == "zeros":
        weight.zero_()
    elif how == "half empty":
        weight[300:] = 0
    elif how == "NaN":
        weight[0, 0] = float("nan")
    elif how == "absurd numbers":
        weight[5, 5] = 30000.0
    elif how == "identity":
        weight.copy_(torch.eye(len(weight)))
    elif how == "another layer":
        weight.copy_(encoder.transformer.text_model.encoder.layers[3].self_attn.k_proj.weight)


@pytest.mark.parametrize("how", ["zeros", "half empty", "NaN", "absurd numbers", "identity", "another layer"])
def test_a_clip_without_text_projection_is_refused_with_the_remedy(clip, text, how):
    encoder = clip.cond_stage_model.clip_l
    weight = encoder.transformer.text_projection.weight
    kept = weight.clone()
    try:
        spoil(weight, how, encoder)
        with pytest.raises(ValueError, match=r"text_projection.*clip_l\.safetensors"):
            text.encode_text(clip, "a cat")
    finally:
        weight.copy_(kept)


def test_a_text_encoder_that_is_no_clip_l_is_refused(text):
    class Other:
        cond_stage_model = object()

    with pytest.raises(ValueError, match="no CLIP-L"):
        text.encode_text(Other(), "a cat")

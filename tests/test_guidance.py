"""Promises of hybrid guidance (METHOD 2.1), by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention.guidance import Guidance, blend, hybrid_guidance, identity_linear, prepare_face, prepare_style
from attention.guidance_settings import (
    PAPER_TOWERS,
    GuidanceSettings,
    Tower,
    check_base,
    check_face_encoder,
    check_towers,
)

TOWERS = (Tower("ViT-L/14", 12), Tower("RN101", 8))
SETTINGS = GuidanceSettings(
    base="sd15", towers=TOWERS, face_width=6, face_encoder="ab" * 32, face_encoder_name="pack A", context_width=16,
    num_tokens=4,
)  # fmt: skip


def make(settings: GuidanceSettings = SETTINGS) -> Guidance:
    torch.manual_seed(0)
    return Guidance(settings)


def embeddings(seed: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, n, generator=generator) for n in (20, 20, 6))  # type: ignore[return-value]


def guide(guidance: Guidance, style, text, face, alpha: float) -> torch.Tensor:
    return hybrid_guidance(guidance, face_BD=face, style_BS=style, text_BS=text, alpha=alpha)


def test_alpha_1_is_the_image_branch_alone():
    guidance, (style, text, face) = make(), embeddings(1)
    assert torch.equal(guide(guidance, style, text, face, 1.0), guide(guidance, style, None, face, 0.3))


def test_alpha_0_is_the_text_branch_alone():
    guidance, (style, text, face) = make(), embeddings(1)
    assert torch.equal(guide(guidance, style, text, face, 0.0), guide(guidance, None, text, face, 0.3))


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5, 0.9])
def test_alpha_is_linear_between(alpha):
    guidance, (style, text, face) = make(), embeddings(1)
    ends = [guide(guidance, style, text, face, a) for a in (0.0, 1.0)]
    torch.testing.assert_close(guide(guidance, style, text, face, alpha), (1 - alpha) * ends[0] + alpha * ends[1])


def test_both_branches_use_one_linear_with_the_same_storage():
    guidance, (style, text, face) = make(), embeddings(1)
    assert [name for name, _ in guidance.named_parameters()] == ["linear.weight", "linear.bias"]
    before = [guide(guidance, style, None, face, 1.0), guide(guidance, None, text, face, 0.0)]
    with torch.no_grad():
        guidance.linear.weight.zero_()
    after = [guide(guidance, style, None, face, 1.0), guide(guidance, None, text, face, 0.0)]
    assert not torch.equal(before[0], before[1])
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0].flatten(), guidance.linear.bias)


def test_it_is_the_papers_formula():
    guidance, (style, text, face) = make(), embeddings(1)
    W, b, unit = guidance.linear.weight, guidance.linear.bias, face / face.norm()
    e_i = W @ torch.cat([style, unit], 1)[0] + b
    e_t = W @ torch.cat([text, unit], 1)[0] + b
    expected = (0.3 * e_i + 0.7 * e_t).reshape(1, 4, 16)
    torch.testing.assert_close(guide(guidance, style, text, face, 0.3), expected)


def test_swapping_the_face_changes_only_the_identity_part():
    guidance, (style, text, face) = make(), embeddings(1)
    other = embeddings(2)[2]
    change = guide(guidance, style, text, other, 0.4) - guide(guidance, style, text, face, 0.4)
    columns = guidance.linear.weight[:, 20:]
    expected = (columns @ (other / other.norm() - face / face.norm())[0]).reshape(1, 4, 16)
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)
    different_style = guide(guidance, -style, text, other, 0.4) - guide(guidance, -style, text, face, 0.4)
    torch.testing.assert_close(change, different_style, atol=1e-5, rtol=1e-4)


def test_zero_face_embedding_is_the_papers_non_human_case():
    guidance, (style, _, face) = make(), embeddings(1)
    got = guide(guidance, style, None, torch.zeros_like(face), 1.0)
    expected = (guidance.linear.weight[:, :20] @ style[0] + guidance.linear.bias).reshape(1, 4, 16)
    torch.testing.assert_close(got, expected)
    assert bool(torch.isfinite(got).all())


def test_null_guidance_drops_both_embeddings_before_the_linear():
    guidance = make()
    assert torch.equal(guidance.null(2), guidance.linear.bias.reshape(1, 4, 16).expand(2, -1, -1))


def test_without_style_and_text_the_face_stands_alone():
    guidance, (_, _, face) = make(), embeddings(1)
    expected = guidance(torch.zeros(1, 20), face / face.norm())
    assert torch.equal(guide(guidance, None, None, face, 0.5), expected)


def test_several_faces_share_one_style():
    guidance, (style, text, _) = make(), embeddings(1)
    faces = embeddings(3, rows=3)[2]
    together = guide(guidance, style, text, faces, 0.5)
    alone = torch.cat([guide(guidance, style, text, face[None], 0.5) for face in faces])
    torch.testing.assert_close(together, alone)


def test_faces_are_scale_free_when_unit_and_not_when_raw():
    guidance, (style, _, face) = make(), embeddings(1)
    assert torch.allclose(guide(guidance, style, None, face, 1), guide(guidance, style, None, 7 * face, 1), atol=1e-6)
    raw = make(replace(SETTINGS, face_normalisation="raw"))
    assert not torch.allclose(guide(raw, style, None, face, 1), guide(raw, style, None, 7 * face, 1), atol=1e-3)
    assert torch.equal(prepare_face(torch.zeros(2, 6), "unit"), torch.zeros(2, 6))


def test_unit_style_normalises_every_tower_on_its_own():
    got = prepare_style(embeddings(1)[0] * 9, TOWERS, "unit")
    torch.testing.assert_close(got[:, :12].norm(dim=1), torch.ones(1))
    torch.testing.assert_close(got[:, 12:].norm(dim=1), torch.ones(1))


def test_identity_linear_hands_the_image_embedding_through():
    guidance = identity_linear(context_width=768, face_width=128, base="sd15")
    style, face = torch.randn(1, 768), torch.randn(1, 128)
    assert torch.equal(guide(guidance, style, None, face, 1.0), style[:, None])
    assert torch.equal(guidance.null(), torch.zeros(1, 1, 768))
    with pytest.raises(ValueError, match="2048"):
        identity_linear(context_width=2048, face_width=128, base="sdxl")


def test_paper_size_is_the_published_parameter_count():
    settings = replace(SETTINGS, towers=PAPER_TOWERS, face_width=512, context_width=768, num_tokens=1)
    assert make(settings).linear.weight.numel() == 2304 * 768


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf")])
def test_alpha_out_of_range_is_refused(alpha):
    guidance, (style, text, face) = make(), embeddings(1)
    with pytest.raises(ValueError, match=r"alpha is .*accepted is 0 .* to 1"):
        guide(guidance, style, text, face, alpha)
    with pytest.raises(ValueError, match="alpha"):
        blend(style[None], text[None], alpha)


def test_wrong_widths_are_refused_with_both_numbers():
    guidance, (style, text, face) = make(), embeddings(1)
    with pytest.raises(ValueError, match=r"ViT-L/14 \(12\).*20\], got \[1, 12\]"):
        guide(guidance, style[:, :12], None, face, 1.0)
    with pytest.raises(ValueError, match=r"20\], got \[1, 12\]"):
        guide(guidance, None, text[:, :12], face, 0.0)
    with pytest.raises(ValueError, match=r"face embedding \(pack A\).*6\], got \[1, 7\]"):
        guide(guidance, style, None, torch.zeros(1, 7), 1.0)


def test_another_face_encoder_is_refused_with_both_names():
    with pytest.raises(ValueError, match=r"pack A .*pack B"):
        check_face_encoder(SETTINGS, width=6, recogniser_sha256="cd" * 32, encoder_name="pack B", name="g")
    with pytest.raises(ValueError, match=r"pack A \(6 numbers.*pack A \(7 numbers"):
        check_face_encoder(SETTINGS, width=7, recogniser_sha256="ab" * 32, encoder_name="pack A", name="g")
    check_face_encoder(SETTINGS, width=6, recogniser_sha256="ab" * 32, encoder_name="renamed", name="g")
    anyone = replace(SETTINGS, face_encoder="")
    check_face_encoder(anyone, width=6, recogniser_sha256="cd" * 32, encoder_name="pack B", name="g")


@pytest.mark.parametrize("towers", [TOWERS[:1], TOWERS[::-1], (TOWERS[0], Tower("ViT-B/32", 8))])
def test_another_tower_set_is_refused_with_both_names(towers):
    with pytest.raises(ValueError, match=rf"ViT-L/14 \(12\) \+ RN101 \(8\).*{towers[-1].name}"):
        check_towers(SETTINGS, towers, name="g")


def test_another_base_model_is_refused_with_both_names():
    with pytest.raises(ValueError, match=r"Stable Diffusion 1\.x.*Stable Diffusion XL"):
        check_base(SETTINGS, family="sdxl", context_width=2048, name="g")
    with pytest.raises(ValueError, match=r"16.*768"):
        check_base(SETTINGS, family="sd15", context_width=768, name="g")
    check_base(SETTINGS, family="custom", context_width=16, name="g")


@pytest.mark.parametrize(
    "change",
    [{"base": "flux"}, {"towers": ()}, {"num_tokens": 0}, {"num_tokens": 10**9}, {"context_width": 0},
     {"face_width": -1}, {"face_normalisation": "l1"}, {"towers": (Tower("", 3),)}, {"towers": (Tower("x", 0),)}],
)  # fmt: skip
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match="accepted"):
        replace(SETTINGS, **change)

"""PuLID's orthogonal projections: formula, properties, regions; and the official processor where it is at hand."""

from __future__ import annotations

import importlib.util
import os
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attention.community.orthogonal import LEADING, OFF, ORTHOGONAL, V1, V2, V2_COMFYUI, orthogonal_branch
from attention.community.pulid_methods import METHODS, choose_method
from attention.fusion import FaceControls, FaceKeys, decoupled_attention, face_branch
from attention.naive import naive_decoupled_attention
from attention.routing import route

HEADS, WIDTH, QUERIES = 2, 8, 24
CONTROLS = FaceControls(strength=0.7, key_strength=1.2, value_strength=0.9, scale=1.1)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _layer(tokens: int = 9) -> tuple[Tensor, Tensor, Tensor, list[FaceKeys]]:
    q = _randn(2, QUERIES, HEADS * WIDTH, seed=1)
    text_key, text_value = (_randn(2, 7, HEADS * WIDTH, seed=s) for s in (2, 3))
    key, value = (0.5 * _randn(1, tokens, HEADS * WIDTH, seed=s) for s in (4, 5))
    return q, text_key, text_value, [FaceKeys(key, value)]


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("orthogonal", ORTHOGONAL)
def test_the_fast_form_is_the_naive_one(orthogonal: str) -> None:
    q, text_key, text_value, faces = _layer()
    faces = [replace(faces[0], log_weight=0.4), replace(faces[0], value=faces[0].value + 1, log_size=_randn(9, seed=8))]
    given = {"heads": HEADS, "controls": CONTROLS, "orthogonal": orthogonal}
    got = decoupled_attention(q, text_key, text_value, faces, **given)
    expected = naive_decoupled_attention(q, text_key, text_value, faces, **given)
    assert _relative(got, expected) < 1e-5
    others = [o for o in ORTHOGONAL if o != orthogonal]
    for other in others:  # a tenth of the difference between two choices would be seen
        wrong = naive_decoupled_attention(
            q, text_key, text_value, faces, heads=HEADS, controls=CONTROLS, orthogonal=other
        )
        assert _relative(wrong, expected) > 1e-3, other


def test_off_is_todays_sum_bit_for_bit() -> None:
    q, text_key, text_value, faces = _layer()
    plain = decoupled_attention(q, text_key, text_value, faces, heads=HEADS)
    assert torch.equal(decoupled_attention(q, text_key, text_value, faces, heads=HEADS, orthogonal=OFF), plain)


def test_v1_adds_nothing_along_the_text_in_any_channel() -> None:
    q, text_key, text_value, faces = _layer()
    text = decoupled_attention(q, text_key, text_value, [], heads=HEADS)
    out = decoupled_attention(q, text_key, text_value, faces, heads=HEADS, orthogonal=V1)
    along = ((out - text) * text).sum(1) / (text * text).sum(1)
    assert float(along.abs().max()) < 1e-5
    plain = decoupled_attention(q, text_key, text_value, faces, heads=HEADS) - text
    assert float(((plain * text).sum(1) / (text * text).sum(1)).abs().max()) > 0.1


def test_v2_keeps_all_where_only_leading_tokens_are_seen_and_nothing_where_none_is() -> None:
    q, text_key, text_value, faces = _layer(tokens=LEADING)
    plain = decoupled_attention(q, text_key, text_value, faces, heads=HEADS)
    v1 = decoupled_attention(q, text_key, text_value, faces, heads=HEADS, orthogonal=V1)
    far = replace(faces[0], key=torch.cat([-1e3 * torch.ones(1, LEADING, 16), torch.zeros(1, 3, 16)], 1).sign())
    far = replace(far, value=_randn(1, LEADING + 3, 16, seed=9))
    ones = torch.ones_like(q) * 40
    for form in (V2, V2_COMFYUI):
        torch.testing.assert_close(
            decoupled_attention(q, text_key, text_value, faces, heads=HEADS, orthogonal=form), plain
        )
        torch.testing.assert_close(
            decoupled_attention(ones, text_key, text_value, [far], heads=HEADS, orthogonal=form),
            decoupled_attention(ones, text_key, text_value, [far], heads=HEADS, orthogonal=V1),
        )
    assert _relative(v1, plain) > 0.01


def test_a_silent_text_channel_loses_nothing() -> None:
    face, text = _randn(1, 6, 4), _randn(1, 6, 4, seed=1)
    text[..., 2] = 0.0
    out = orthogonal_branch(face, text)
    assert torch.isfinite(out).all() and torch.equal(out[..., 2], face[..., 2])


@pytest.mark.parametrize("orthogonal", [V1, V2, V2_COMFYUI])
@pytest.mark.parametrize("background", ["all", "none"])
def test_a_region_is_projected_over_its_own_queries_and_knows_nobody_else(orthogonal: str, background: str) -> None:
    q, text_key, text_value, faces = _layer()
    other = FaceKeys(_randn(1, 9, 16, seed=11), _randn(1, 9, 16, seed=12), identity=1)
    masks = torch.zeros(2, 4, 6)
    masks[0, :, :2], masks[1, :, 4:] = 1.0, 1.0
    regions = route(masks, (4, 6), background=background, soft=False)
    given = {"heads": HEADS, "regions": regions, "orthogonal": orthogonal}
    out = decoupled_attention(q, text_key, text_value, [faces[0], other], **given)
    changed = decoupled_attention(q, text_key, text_value, [faces[0], replace(other, value=other.value + 1)], **given)
    left = masks[0].flatten().bool()
    assert torch.equal(out[:, left], changed[:, left])
    alone = naive_decoupled_attention(q[:, left], text_key, text_value, faces, heads=HEADS, orthogonal=orthogonal)
    assert _relative(out[:, left], alone) < 1e-5


def test_a_soft_border_fades_what_was_projected() -> None:
    q, text_key, text_value, faces = _layer()
    masks = torch.linspace(0.2, 0.8, 6).expand(1, 4, 6).contiguous()
    regions = route(masks, (4, 6), background="none", soft=True)
    text = decoupled_attention(q, text_key, text_value, [], heads=HEADS)
    given = {"heads": HEADS, "regions": regions}
    plain = face_branch(q, faces, **given)
    out = decoupled_attention(q, text_key, text_value, faces, orthogonal=V1, **given)
    fade = masks.flatten()[None, :, None]
    expected = text + fade * orthogonal_branch(plain / fade, text)
    assert _relative(out, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_the_value(dtype: torch.dtype) -> None:
    q, text_key, text_value, faces = _layer()
    exact = decoupled_attention(q, text_key, text_value, faces, heads=HEADS, orthogonal=V2)
    half = decoupled_attention(*(t.to(dtype) for t in (q, text_key, text_value)), faces, heads=HEADS, orthogonal=V2)
    assert half.dtype == dtype and _relative(half.float(), exact) < 8 * torch.finfo(dtype).eps


def test_the_methods_are_those_their_users_know() -> None:
    known = {name: (method.zero_tokens, method.orthogonal) for name, method in METHODS.items()}
    assert known == {
        "fidelity": (8, V2_COMFYUI), "style": (16, V1), "neutral": (0, OFF), "official v1.1": (20, V2),
    }  # fmt: skip
    assert choose_method("fidelity") == METHODS["fidelity"]
    assert choose_method("style", zero_tokens=3).label == "style, changed (3 zero tokens, orthogonal v1)"
    for given in (("sharp",), ("style", 81), ("style", 3, "v3")):
        with pytest.raises(ValueError, match=r"known|accepted"):
            choose_method(*given)
    with pytest.raises(ValueError, match="known: off"):
        decoupled_attention(*_layer(), heads=HEADS, orthogonal="v3")


# --- the official processor ----------------------------------------------------------------------------------------


def _official() -> types.ModuleType:
    root = Path(os.environ.get("FUSEDID_PEERS", Path.home() / "comfyui-peers"))
    file = root / "PuLID" / "pulid" / "attention_processor.py"
    if not file.is_file():
        pytest.skip(f"no {file}: set FUSEDID_PEERS to a folder with a clone of https://github.com/ToTheBeginning/PuLID")
    spec = importlib.util.spec_from_file_location("official_pulid_attention", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Attention(nn.Module):
    """What the official processor asks of diffusers' attention; q, k and v are given, the output is not projected."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.spatial_norm = self.group_norm = None
        self.norm_cross = self.residual_connection = False
        self.heads, self.rescale_output_factor = HEADS, 1.0
        self.to_q, self.to_k, self.to_v = nn.Identity(), lambda _: k, lambda _: v
        self.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])


@torch.no_grad()
@pytest.mark.parametrize(("zeros", "orthogonal"), [(0, OFF), (16, V1), (8, V2), (20, V2)])
def test_it_is_the_official_processor(zeros: int, orthogonal: str) -> None:
    module = _official()
    module.NUM_ZERO, module.ORTHO, module.ORTHO_v2 = zeros, orthogonal == V1, orthogonal == V2
    q, text_key, text_value, _ = _layer()
    processor = module.IDAttnProcessor2_0(HEADS * WIDTH, 12)
    tokens = _randn(2, 10, 12, seed=20)
    expected = processor(
        _Attention(text_key, text_value), q, encoder_hidden_states=text_key, id_embedding=tokens, id_scale=0.7
    )
    padded = nn.functional.pad(tokens, (0, 0, 0, zeros))
    face = FaceKeys(processor.id_to_k(padded), processor.id_to_v(padded))
    got = decoupled_attention(
        q, text_key, text_value, [face], heads=HEADS, controls=FaceControls(strength=0.7), orthogonal=orthogonal
    )
    assert _relative(got, expected) < 1e-5

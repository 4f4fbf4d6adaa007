"""The EVA-CLIP tower equals its formula written another way, and the public implementation where that is at hand."""

from __future__ import annotations

import importlib
import math
import os
import sys
import types
from functools import partial
from pathlib import Path

import community_files as files
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from attention.community.eva_clip import EvaTower, is_eva_tower, load_eva_tower, look

WIDTH, INNER, GRID, DEPTH, PATCH = 128, 341, 6, 24, 14


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + GRID * GRID, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "head.weight": (48, WIDTH),
        "head.bias": (48,),
    }
    for n in range(DEPTH):
        block = f"blocks.{n}"
        shapes |= {f"{block}.attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkv"}
        shapes |= {f"{block}.attn.{part}_bias": (WIDTH,) for part in "qv"}
        shapes |= {f"{block}.attn.proj.weight": (WIDTH, WIDTH), f"{block}.attn.proj.bias": (WIDTH,)}
        for norm, width in (("norm1", WIDTH), ("norm2", WIDTH), ("attn.inner_attn_ln", WIDTH), ("mlp.ffn_ln", INNER)):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for layer, (out, into) in (("w1", (INNER, WIDTH)), ("w2", (INNER, WIDTH)), ("w3", (WIDTH, INNER))):
            shapes |= {f"{block}.mlp.{layer}.weight": (out, into), f"{block}.mlp.{layer}.bias": (out,)}
    return shapes


@pytest.fixture(scope="module")
def tower() -> EvaTower:
    return EvaTower(files.random_tensors(_shapes()))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randn(2, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(1))


def _norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _turn(x: Tensor) -> Tensor:
    """Rotary positions as multiplication of complex numbers, token by token: `[B, 1 + GRID^2, 64]`."""
    out = x.clone()
    for token in range(GRID * GRID):
        place = torch.tensor([token // GRID] * 16 + [token % GRID] * 16) * 16 / GRID
        angle = place * torch.tensor([10000 ** (-2 * i / 32) for i in range(16)] * 2)
        pairs = torch.view_as_complex(x[:, 1 + token].reshape(-1, 32, 2).contiguous())
        out[:, 1 + token] = torch.view_as_real(pairs * torch.polar(torch.ones(32), angle)).flatten(1)
    return out


def _block(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = _norm(w, f"{name}.norm1", x)
    q = y @ w[f"{name}.attn.q_proj.weight"].T + w[f"{name}.attn.q_bias"]
    k = y @ w[f"{name}.attn.k_proj.weight"].T
    v = y @ w[f"{name}.attn.v_proj.weight"].T + w[f"{name}.attn.v_bias"]
    heads = []
    for h in range(0, WIDTH, 64):
        scores = _turn(q[..., h : h + 64]) @ _turn(k[..., h : h + 64]).transpose(1, 2) / math.sqrt(64)
        heads.append(scores.softmax(-1) @ v[..., h : h + 64])
    seen = _norm(w, f"{name}.attn.inner_attn_ln", torch.cat(heads, -1))
    x = x + seen @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
    y = _norm(w, f"{name}.norm2", x)
    gate = y @ w[f"{name}.mlp.w1.weight"].T + w[f"{name}.mlp.w1.bias"]
    wide = gate * gate.sigmoid() * (y @ w[f"{name}.mlp.w2.weight"].T + w[f"{name}.mlp.w2.bias"])
    return x + _norm(w, f"{name}.mlp.ffn_ln", wide) @ w[f"{name}.mlp.w3.weight"].T + w[f"{name}.mlp.w3.bias"]


def _assert_close(got: Tensor, wanted: Tensor) -> None:
    """To a part of the largest number: after 24 layers the rounding of large ones lies in the small ones too."""
    torch.testing.assert_close(got, wanted, atol=5e-5 * float(wanted.abs().max()), rtol=0)


@torch.no_grad()
def test_the_tower_is_its_formula(tower: EvaTower, pictures: Tensor) -> None:
    w = tower.weights
    tiles = pictures.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(2, -1, 588)
    x = tiles @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].repeat(2, 1, 1), x], 1) + w["pos_embed"]
    expected = []
    for n in range(DEPTH):
        if n in (4, 8, 12, 16, 20):
            expected.append(x)
        x = _block(w, f"blocks.{n}", x)
    embed, levels = look(tower, pictures)
    _assert_close(embed, _norm(w, "norm", x)[:, 0] @ w["head.weight"].T + w["head.bias"])
    assert len(levels) == 5
    for got, wanted in zip(levels, expected):
        _assert_close(got, wanted)


def _public_tower(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    folder = Path(os.environ.get("FUSEDID_PEERS", Path.home() / "comfyui-peers")) / "PuLID_ComfyUI" / "eva_clip"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set FUSEDID_PEERS to a folder with node packs such as PuLID_ComfyUI")
    helpers = types.ModuleType("timm.layers")
    helpers.drop_path, helpers.trunc_normal_ = lambda x, *_: x, nn.init.trunc_normal_
    helpers.to_2tuple = lambda x: (x, x)
    package = types.ModuleType("eva_clip_of_peer")
    package.__path__ = [str(folder)]
    for name, module in {"timm": types.ModuleType("timm"), "timm.layers": helpers, package.__name__: package}.items():
        monkeypatch.setitem(sys.modules, name, module)
    make = importlib.import_module("eva_clip_of_peer.eva_vit_model").EVAVisionTransformer
    norm = partial(nn.LayerNorm, eps=1e-6)
    options = {"qkv_bias": True, "rope": True, "intp_freq": True, "naiveswiglu": True, "subln": True, "xattn": False}
    return make(
        img_size=GRID * PATCH, patch_size=PATCH, num_classes=48, use_mean_pooling=False, embed_dim=WIDTH, depth=DEPTH,
        num_heads=2, mlp_ratio=INNER / WIDTH + 1e-6, norm_layer=norm, pt_hw_seq_len=16, **options,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_the_tower_equals_the_public_implementation(
    tower: EvaTower, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = _public_tower(monkeypatch)
    missing, unexpected = public.load_state_dict(tower.weights, strict=False)
    assert not unexpected
    assert all("rope" in name for name in missing)
    expected, expected_levels = public(pictures, return_all_features=False, return_hidden=True, shuffle=False)
    embed, levels = look(tower, pictures)
    for got, wanted in zip((embed, *levels), (expected, *expected_levels), strict=True):
        _assert_close(got, wanted)


def test_a_tower_is_found_bare_or_inside_a_whole_clip(tmp_path: Path, tower: EvaTower, pictures: Tensor) -> None:
    save_file({f"visual.{k}": v for k, v in tower.weights.items()}, tmp_path / "whole.safetensors")
    torch.save(tower.weights, tmp_path / "bare.pt")
    expected = look(tower, pictures[:1])[0]
    for name in ("whole.safetensors", "bare.pt"):
        loaded = load_eva_tower(tmp_path / name)
        assert loaded.image_size == GRID * PATCH
        torch.testing.assert_close(look(loaded, pictures[:1])[0], expected)


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"visual.proj": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert not is_eva_tower({"visual.proj": (2,)})
    with pytest.raises(ValueError, match=r"a\.safetensors is no EVA-CLIP"):
        load_eva_tower(tmp_path / "a.safetensors")

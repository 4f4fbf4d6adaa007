"""The guidance file: round trip, and everything that can be wrong with a file from the internet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from attention.guidance import Guidance
from attention.guidance_file import BIAS, WEIGHT, load_guidance, save_guidance
from attention.guidance_settings import GuidanceSettings, Tower

SETTINGS = GuidanceSettings(
    base="sd15", towers=(Tower("ViT-L/14", 12), Tower("RN101", 8)), face_width=6, face_encoder="ab" * 32,
    face_encoder_name="pack A", context_width=16, num_tokens=4, prior="karlo", samples_seen=9, license="Apache-2.0",
)  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_guidance(tmp_path / "g.safetensors", Guidance(SETTINGS), extra_metadata={"fusedid.config": "{}"})
    return tmp_path / "g.safetensors"


def rewritten(path: Path, *, tensors: dict | None = None, **metadata: str | None) -> Path:
    """The same file with other tensors or metadata; None removes an entry."""
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in (WEIGHT, BIAS)}
        texts = dict(file.metadata())
    texts.update({f"fusedid.{key}": value for key, value in metadata.items() if value is not None})
    for key, value in metadata.items():
        if value is None:
            texts.pop(f"fusedid.{key}")
    save_file({**kept, **tensors} if tensors else kept, path, metadata=texts)
    return path


def test_round_trip_keeps_weights_and_settings(saved):
    torch.manual_seed(0)
    original, loaded = Guidance(SETTINGS), load_guidance(saved)
    assert loaded.settings == SETTINGS
    assert torch.equal(loaded.linear.weight, original.linear.weight)
    assert torch.equal(loaded.linear.bias, original.linear.bias)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert len(loaded.fingerprint) == 64


def test_half_precision_file_loads_as_fp32(tmp_path):
    guidance = Guidance(SETTINGS)
    save_guidance(tmp_path / "h.safetensors", guidance, dtype=torch.float16)
    loaded = load_guidance(tmp_path / "h.safetensors")
    assert loaded.linear.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.linear.weight, guidance.linear.weight, atol=1e-3, rtol=1e-3)


def test_metadata_names_towers_encoder_prior_tokens_and_normalisation(saved):
    import safetensors

    with safetensors.safe_open(saved, framework="pt") as file:
        texts = file.metadata()
    assert texts["fusedid.kind"] == "guidance"
    assert texts["fusedid.format"] == "1"
    assert json.loads(texts["fusedid.towers"]) == [["ViT-L/14", 12], ["RN101", 8]]
    assert texts["fusedid.face_encoder"] == "ab" * 32
    assert texts["fusedid.face_encoder_name"] == "pack A"
    assert texts["fusedid.prior"] == "karlo"
    assert texts["fusedid.num_tokens"] == "4"
    assert texts["fusedid.face_normalisation"] == "unit"
    assert texts["modelspec.architecture"] == "stable-diffusion-v1/fusedid-guidance"
    assert texts["fusedid.config"] == "{}"


def test_fingerprint_follows_the_content(saved):
    before = load_guidance(saved).fingerprint
    assert load_guidance(rewritten(saved)).fingerprint == before
    assert load_guidance(rewritten(saved, tensors={BIAS: torch.ones(64)})).fingerprint != before


HOSTILE = {
    "no metadata at all": {"kind": None},
    "a fusion adapter": {"kind": "fusion"},
    "a future format": {"format": "2"},
    "no towers": {"towers": None},
    "no face encoder": {"face_encoder": None},
    "no base": {"base": None},
    "towers that are no list": {"towers": '"ViT"'},
    "towers that are no JSON": {"towers": "[["},
    "deeply nested towers": {"towers": "[" * 4000},
    "endless towers": {"towers": "[" + '["a", 1],' * 9999 + '["a", 1]]'},
    "a tower with a boolean width": {"towers": '[["ViT-L/14", true]]'},
    "a tower with a negative width": {"towers": '[["ViT-L/14", -20]]'},
    "a huge tower": {"towers": '[["ViT-L/14", 99999999999]]'},
    "tokens as a word": {"num_tokens": "four"},
    "tokens in another script": {"num_tokens": "４"},
    "a number of a million digits": {"num_tokens": "9" * 10**6},
    "another number of tokens than the weights": {"num_tokens": "2"},
    "another context width": {"context_width": "768"},
    "another face width": {"face_width": "512"},
    "an unknown family": {"base": "flux"},
    "an unknown normalisation": {"face_normalisation": "l1"},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata_is_a_clear_error(saved, case):
    with pytest.raises(ValueError, match=r"g\.safetensors"):
        load_guidance(rewritten(saved, **HOSTILE[case]))


@pytest.mark.parametrize(
    "tensors",
    [
        {WEIGHT: torch.zeros(64, 25)},
        {WEIGHT: torch.zeros(64 * 26)},
        {BIAS: torch.zeros(64, 1)},
        {BIAS: torch.full((64,), float("nan"))},
        {WEIGHT: torch.zeros(64, 26, dtype=torch.int64)},
        {"extra.weight": torch.zeros(1)},
    ],
)
def test_wrong_tensors_are_a_clear_error(saved, tensors):
    with pytest.raises(ValueError, match=r"g\.safetensors"):
        load_guidance(rewritten(saved, tensors=tensors))


def test_truncated_and_missing_files_are_a_clear_error(saved):
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"g\.safetensors.*truncated"):
        load_guidance(saved)
    with pytest.raises(ValueError, match="no such file"):
        load_guidance(saved.with_name("absent.safetensors"))


def test_saving_nan_is_refused_and_leaves_the_old_file(saved):
    before, guidance = saved.read_bytes(), Guidance(SETTINGS)
    with torch.no_grad():
        guidance.linear.bias[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_guidance(saved, guidance)
    assert saved.read_bytes() == before

"""Safetensors files from the internet: hostile until shown otherwise, and never half written by us."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_kit import raw_safetensors, write_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from attention import files
from attention.files import (
    foreign_family,
    read_header,
    read_tensors,
    require_finite,
    require_kind,
    write_atomic,
)

OLD = {"a": torch.arange(6.0).reshape(2, 3)}
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)
FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def is_untouched(folder: Path) -> bool:
    """The old file is there with its old content, and nothing else."""
    header = read_header(folder / "x.safetensors")
    same = torch.equal(read_tensors(header)["a"], OLD["a"]) and header.metadata == {"k": "old"}
    return same and [file.name for file in folder.iterdir()] == ["x.safetensors"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A written file; a failed write over it must leave it as it is."""
    write_atomic(tmp_path / "x.safetensors", OLD, {"k": "old"})
    return tmp_path / "x.safetensors"


def test_round_trip_of_tensors_shapes_and_metadata(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(2, 3).half(),
        "bf16": torch.randn(4).bfloat16(),
        "transposed": torch.randn(3, 5).T,
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    metadata = {"fusedid.kind": "fusion", "note": 'Zoë 顔 \n"quoted"'}
    write_atomic(tmp_path / "x.safetensors", tensors, metadata)
    header = read_header(str(tmp_path / "x.safetensors"))
    assert header.kind == "fusion" and header.metadata == metadata
    assert header.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    read = read_tensors(header)
    assert all(read[name].dtype == t.dtype and torch.equal(read[name], t) for name, t in tensors.items())
    assert list(read_tensors(header, ["half"])) == ["half"]


def test_one_tensor_under_two_names_and_views_of_one_tensor_are_written(tmp_path: Path) -> None:
    whole = torch.arange(8.0)
    tensors = {"a": whole[:4], "b": whole[4:], "c": whole, "d": whole}
    write_atomic(tmp_path / "x.safetensors", tensors, {})
    read = read_tensors(read_header(tmp_path / "x.safetensors"))
    assert all(torch.equal(read[name], t) for name, t in tensors.items())
    assert (tmp_path / "x.safetensors").stat().st_size < 1000


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()], ids=repr
)
def test_a_failure_while_writing_leaves_the_old_file(
    old: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def half_written(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(files, "save_file", half_written)
    with pytest.raises(type(error)):
        write_atomic(old, {"a": torch.zeros(9)}, {})
    assert is_untouched(old.parent)


def test_a_crash_between_write_and_rename_leaves_the_old_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def crash(temporary: Path, target: Path) -> Path:
        seen.append((read_header(temporary).metadata, temporary.parent == old.parent, target))
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_atomic(old, {"a": torch.zeros(9)}, {"k": "new"})
    assert seen == [({"k": "new"}, True, old)]  # all was written, in the same folder (one file system)
    assert is_untouched(old.parent)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_process_leaves_the_old_file_and_nothing_a_drop_down_shows(old: Path) -> None:
    child = os.fork()
    if child == 0:
        Path.replace = lambda *_: os._exit(9)  # type: ignore[assignment, method-assign]
        write_atomic(old, {"a": torch.zeros(9)}, {"k": "new"})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert read_header(old).metadata == {"k": "old"}
    assert [file.name for file in old.parent.iterdir() if not file.name.startswith(".")] == ["x.safetensors"]
    assert not list(old.parent.glob(".*.safetensors"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_real_full_disk_leaves_the_old_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_full_disk(tensors: Any, path: str, metadata: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x" * 4096)

    monkeypatch.setattr(files, "save_file", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(old, {"a": torch.zeros(9)}, {})
    assert is_untouched(old.parent)


def test_a_new_file_replaces_the_old_and_can_be_read_by_others(old: Path) -> None:
    write_atomic(str(old), {"b": torch.ones(2)}, {})
    assert read_header(old).shapes == {"b": (2,)}
    assert [file.name for file in old.parent.iterdir()] == ["x.safetensors"]
    if os.name == "posix":
        assert stat.S_IMODE(old.stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["ein Name.safetensors", "Zoë 顔.safetensors", "-rf.safetensors", "a.b.c.safetensors"])
def test_unusual_file_names(tmp_path: Path, name: str) -> None:
    write_atomic(tmp_path / name, OLD, {})
    assert read_header(tmp_path / name).path == tmp_path / name
    assert [file.name for file in tmp_path.iterdir()] == [name]


# Reading


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(ValueError, match=r"no such file\. Put the file into the folder"):
            read_header(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 50, -1], ids=lambda k: f"{k} bytes")
def test_a_truncated_file_is_refused(old: Path, keep: int) -> None:
    old.write_bytes(old.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^x\.safetensors is not a readable safetensors file .*download or save it"):
        read_header(old)


HOSTILE = {
    "header of 2^60 bytes": raw_safetensors({}, length=2**60),
    "header of 2^64-1 bytes": raw_safetensors({}, length=2**64 - 1),
    "header of 99 MB that is not there": raw_safetensors({}, length=99_000_000),
    "header is no JSON": raw_safetensors(b"{not json"),
    "header is a list": raw_safetensors([1, 2]),
    "header is deep": raw_safetensors(b"[" * 20_000),
    "header is no UTF-8": raw_safetensors(b'{"\xff\xfe": 1}'),
    "offsets beyond the data": raw_safetensors({"a": {**FLOATS, "data_offsets": [0, 1 << 40]}}, b"\0" * 8),
    "offsets backwards": raw_safetensors({"a": {**FLOATS, "data_offsets": [8, 0]}}, b"\0" * 8),
    "shape and data disagree": raw_safetensors({"a": {**FLOATS, "shape": [3]}}, b"\0" * 8),
    "shape overflows": raw_safetensors({"a": {**FLOATS, "shape": [1 << 62, 1 << 62]}}, b"\0" * 8),
    "shape is negative": raw_safetensors({"a": {**FLOATS, "shape": [-2]}}, b"\0" * 8),
    "unknown dtype": raw_safetensors({"a": {**FLOATS, "dtype": "F7"}}, b"\0" * 8),
    "tensors overlap": raw_safetensors({"a": FLOATS, "b": FLOATS}, b"\0" * 8),
    "bytes nobody owns": raw_safetensors({"a": FLOATS}, b"\0" * 80),
    "metadata is no text": raw_safetensors({"__metadata__": {"fusedid.kind": 1}, "a": FLOATS}, b"\0" * 8),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^bad\.safetensors is not a readable safetensors file"):
        read_header(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"noise\.safetensors"):
        read_header(path)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(place=st.integers(0, 4000), value=st.integers(0, 255))
def test_a_damaged_byte_gives_a_clear_error_or_valid_tensors(tmp_path: Path, place: int, value: int) -> None:
    content = bytearray(write_adapter(tmp_path / "whole.safetensors").read_bytes())
    content[place % len(content)] = value
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
        assert set(read_tensors(header)) == set(header.shapes)
    except ValueError as error:
        assert str(error).startswith("damaged.safetensors")


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["FUSEDID_TEST_BOMB"])),)


@pytest.mark.parametrize("kind", ["torch", "torch, old format", "pickle"])
def test_a_pickle_is_refused_by_name_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("FUSEDID_TEST_BOMB", str(tmp_path / "exploded"))
    path = tmp_path / "model.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": Bomb()}))
    else:
        torch.save({"a": Bomb()}, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(ValueError, match=r"^model\.safetensors is a PyTorch pickle.* only safetensors files are read"):
        read_header(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"\n<html>", "a web page"),
    ],
)
def test_a_download_gone_wrong_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^model\.safetensors is {what}.* [Dd]ownload"):
        read_header(path)


def test_tensors_that_became_unreadable_are_a_clear_error(old: Path) -> None:
    header = read_header(old)
    with pytest.raises(ValueError, match=r"^x\.safetensors could not be read .* again"):
        read_tensors(header, ["absent"])
    old.unlink()
    with pytest.raises(ValueError, match=r"^x\.safetensors could not be read"):
        read_tensors(header)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((dtype, value) for dtype in (torch.float16, torch.bfloat16, torch.float32) for value in NOT_FINITE),
        (torch.float8_e4m3fn, torch.nan),  # has no infinity
    ],
    ids=str,
)
def test_weights_that_are_not_finite_are_refused(dtype: torch.dtype, value: float) -> None:
    bad = torch.tensor([1.0, value]).to(dtype)
    require_finite("x", {"a": torch.ones(2).to(dtype), "count": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"^x: the weights of b hold NaN or infinity\. .* again"):
        require_finite("x", {"a": torch.ones(2), "b": bad})


# Whose file it is

FOREIGN = {
    "an InstantID or IP-Adapter file": ("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight", "image_proj.latents"),
    "a PuLID file": (
        "id_adapter.id_embedding_mapping.0.weight",
        "id_adapter_attn_layers.0.id_to_k.weight",
        "pulid_ca.0",
    ),
    "a PhotoMaker file": ("id_encoder.visual_projection.weight",),
    "a LoRA": (
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
    ),
    "a whole checkpoint": ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"),
    "a VAE": ("encoder.conv_in.weight", "decoder.conv_in.bias"),
    "a ControlNet": ("control_model.zero_convs.0.0.weight", "controlnet_cond_embedding.conv_in.weight"),
    "a bare UNet": ("input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight"),
    "no file of a known family": ("something.else", "weights"),
}


@pytest.mark.parametrize(("label", "name"), [(label, name) for label, names in FOREIGN.items() for name in names])
def test_foreign_families_are_refused_by_name(tmp_path: Path, label: str, name: str) -> None:
    assert foreign_family({name: (1,)}) == label
    save_file({name: torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^x\.safetensors is {label}, but a FusedID fusion file is needed here"):
        require_kind(read_header(tmp_path / "x.safetensors"), "fusion")


def test_photomaker_with_its_lora_is_still_photomaker() -> None:
    names = ("lora_weights.unet.down_blocks.1.to_q_lora.down.weight", "id_encoder.fuse_module.mlp1.fc1.weight")
    assert foreign_family(dict.fromkeys(names, (1,))) == "a PhotoMaker file"


@pytest.mark.parametrize(("kind", "node"), [("guidance", "HybridGuidance"), ("identity", "FusedIDLoadIdentity")])
def test_our_other_kinds_are_refused_by_name(tmp_path: Path, kind: str, node: str) -> None:
    write_atomic(tmp_path / "x.safetensors", OLD, {"fusedid.kind": kind, "fusedid.format": "1"})
    with pytest.raises(
        ValueError, match=rf"is a FusedID {kind} file, but a FusedID fusion file is needed here\. Load it with {node}"
    ):
        require_kind(read_header(tmp_path / "x.safetensors"), "fusion")
    require_kind(read_header(tmp_path / "x.safetensors"), kind)


@pytest.mark.parametrize("number", ["2", "99", "1.5", ""])
def test_another_format_number_is_refused_with_the_remedy(tmp_path: Path, number: str) -> None:
    write_atomic(tmp_path / "x.safetensors", OLD, {"fusedid.kind": "fusion", "fusedid.format": number})
    with pytest.raises(ValueError, match=rf"has file format {number}, this version reads format 1\. Update FusedID"):
        require_kind(read_header(tmp_path / "x.safetensors"), "fusion")

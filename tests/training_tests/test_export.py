"""From a run to a folder ready to upload, and between naming schemes."""

from __future__ import annotations

import pytest
import torch
from tiny_run import settings, train_tiny

from attention.adapter import load_adapter
from attention.files import read_header, read_tensors, write_atomic
from attention.sites import SD15_SITES, SDXL_SITES
from training.export import main
from training.naming import naming_of, to_diffusers, to_ldm


@pytest.fixture
def run(tiny_base, tmp_path):
    train_tiny(settings(tiny_base, tmp_path / "run"))
    return tmp_path / "run"


def test_a_run_becomes_a_folder_with_weights_and_a_card(run, tmp_path):
    data, table = tmp_path / "data", tmp_path / "evaluation.md"
    data.mkdir()
    (data / "report.md").write_text("# Report\n\n12 of 14 kept\n\n![face](a.png)\n", encoding="utf-8")
    table.write_text("| metric | value |\n|---|---|\n| identity | 0.7 |\n", encoding="utf-8")
    out = tmp_path / "release"
    arguments = ["--run", str(run), "--out", str(out), "--license", "openrail", "--data", str(data), "--name", "anna"]
    assert main([*arguments, "--evaluation", str(table)]) == 0
    adapter = load_adapter(out / "anna.safetensors")
    assert adapter.settings.license == "openrail" and adapter.settings.samples_seen == 8
    assert next(iter(adapter.projections.values())).key.dtype == torch.float16
    card = (out / "README.md").read_text(encoding="utf-8")
    parts = ["## Report", "12 of 14 kept", "identity | 0.7", "samples_seen | `8`", '"steps": 4', 'license: "openrail"']
    for part in parts:
        assert part in card, part
    assert "![" not in card and str(tmp_path) not in card


def test_weights_survive_the_way_to_diffusers_names_and_back(run, tmp_path):
    license_ = ["--license", "CC0", "--dtype", "fp32"]
    assert main(["--run", str(run), "--out", str(tmp_path / "a"), "--naming", "diffusers", *license_]) == 0
    there = tmp_path / "a" / "adapter.safetensors"
    assert (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_face.weight" in read_header(there).shapes
    )
    assert main(["--file", str(there), "--out", str(tmp_path / "b"), *license_]) == 0
    one = read_tensors(read_header(run / "adapter.safetensors"))
    two = read_tensors(read_header(tmp_path / "b" / "adapter.safetensors"))
    assert one.keys() == two.keys() and all(torch.equal(one[name].float(), two[name]) for name in one)


@pytest.mark.parametrize("sites", [SD15_SITES, SDXL_SITES])
def test_every_name_of_the_real_layouts_converts_and_converts_back(sites):
    tensors = {f"{s.path}.attn2.to_{x}_face.weight": torch.tensor([i]) for i, s in enumerate(sites) for x in "kv"}
    there = to_diffusers(tensors)
    assert len(there) == 2 * len(sites) and naming_of(there) == "diffusers" and naming_of(tensors) == "ldm"
    assert to_ldm(there) == tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--run": "nowhere"}, "has not finished"),
        ({"--license": ""}, "no licence"),
        ({"--data": "nowhere"}, "report.md does not exist"),
        ({"--evaluation": "nowhere.md"}, "cannot read nowhere.md"),
    ],
)
def test_wrong_arguments_end_with_a_message(change, message, run, tmp_path, caplog):
    options = {"--run": str(run), "--out": str(tmp_path / "out"), "--license": "CC0", **change}
    assert main([word for pair in options.items() for word in pair]) == 2
    assert message in caplog.text


def test_nothing_is_overwritten_and_strangers_are_refused(run, tmp_path, caplog):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine", encoding="utf-8")
    assert main(["--run", str(run), "--out", str(tmp_path / "full"), "--license", "CC0"]) == 2
    assert "is not empty" in caplog.text
    write_atomic(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"fusedid.kind": "fusion", "fusedid.license": "CC0"})
    assert main(["--file", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "new")]) == 2
    assert "no fusion adapter" in caplog.text

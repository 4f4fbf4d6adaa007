"""A whole evaluation of a tiny random base with real faces: what is drawn, scored, kept and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from attention.adapter import AdapterSettings, save_adapter
from training.config import ModelConfig
from training.evaluate.__main__ import main
from training.evaluate.table import main as table_main
from training.evaluate.table import results_table
from training.export import main as export_main
from training.sample import open_studio

PROTOCOL = """
name: tiny
people: {{count: 3}}
scorer: {{face_pack: test_pack, face_roots: ["{roots}"]}}
draw: {{prompts: [a man], seeds: 2, width: 64, height: 64, steps: 2, guidance_scale: 1, reference_size: 64}}
rows:
  without identity: {{adapter: none}}
  fused: {{adapter: fused.safetensors}}
  fused 2: {{adapter: fused.safetensors, strength: 2, references: 3}}
  decoupled: {{adapter: fused.safetensors, combine: decoupled, timestep: matched}}
  wrong person: {{adapter: fused.safetensors, wrong_person: true}}
  through the VAE: {{adapter: vae}}
  copies: {{pictures: "{copies}"}}
  2 people: {{adapter: training-free, people: 2, width: 128}}
timing: {{row: fused, references: [1, 2], repeats: 1}}
device: cpu
"""


@pytest.fixture(scope="module")
def photos(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people with three photos, one with one."""
    folder, source = tmp_path_factory.mktemp("photos"), assets / "faces" / "sfhq_crops"
    for person in ("trip0", "trip2"):
        (folder / person).mkdir()
        for photo in source.glob(f"{person}_*.jpg"):
            Image.open(photo).resize((256, 256)).save(folder / person / photo.name, quality=95)
    shutil.copy(source / "syn00.jpg", folder / "zoe.jpg")
    return folder


@pytest.fixture(scope="module")
def copies(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures "drawn elsewhere": the first reference itself, and one without a face."""
    folder = tmp_path_factory.mktemp("copies")
    for person in ("trip0", "trip2"):
        (folder / person).mkdir()
        Image.open(photos / person / f"{person}_a.jpg").save(folder / person / "copy.png")
    Image.new("RGB", (256, 256), "green").save(folder / "trip2" / "nobody.png")
    return folder


@pytest.fixture(scope="module")
def weights(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    fused = open_studio(ModelConfig(base=str(tiny_base)), "training-free", reference_size=64).model
    settings = AdapterSettings(base="custom", reference_size=64)
    save_adapter(folder / "fused.safetensors", fused.export_projections(), settings, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def arguments(assets, photos, copies, weights, tiny_base, tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("protocol") / "tiny.yaml"
    file.write_text(PROTOCOL.format(roots=assets / "insightface", copies=copies), encoding="utf-8")
    given = {"--protocol": file, "--base": tiny_base, "--weights": weights, "--people": photos}
    return [word for name, value in given.items() for word in (name, str(value))]


@pytest.fixture(scope="module")
def out(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    assert main([*arguments, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_every_row_has_its_pictures(out, results):
    counts = {name: row["pictures"] for name, row in results["rows"].items()}
    assert counts == {**dict.fromkeys(counts, 6), "copies": 3, "2 people": 2}
    assert len(list((out / "pictures").rglob("*.png"))) == 6 * 6 + 2
    assert Image.open(next((out / "pictures" / "2_people").glob("*.png"))).size == (128, 64)


def test_a_perfect_copy_scores_1_and_a_picture_without_a_face_0(out, results):
    lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
    copies = {Path(r["picture"]).name + r["person"]: r for r in map(json.loads, lines) if r["row"] == "copies"}
    for key in ("copy.pngtrip0", "copy.pngtrip2"):
        assert copies[key]["identity"] == pytest.approx(1, abs=1e-4) and copies[key]["found"] == 1
        assert copies[key]["copy_paste"] == pytest.approx(1, abs=0.02)
        assert copies[key]["ssim"] == pytest.approx(1, abs=1e-4) and copies[key]["psnr"] == 100
    missed = copies["nobody.pngtrip2"]
    assert (missed["identity"], missed["held_out"], missed["found"], missed["ssim"]) == (0, 0, 0, None)
    means = {name: found["mean"] for name, found in results["rows"]["copies"]["metrics"].items()}
    assert means["identity"] == pytest.approx(0.75, abs=1e-3), "the mean over people of 1 and (1 + 0) / 2"
    assert means["found"] == pytest.approx(0.75) and means["identity_found"] == pytest.approx(1, abs=1e-3)


def test_rows_are_compared_with_the_one_without_identity_of_their_size(results):
    pairs = {(entry["row"], entry["minus"]) for entry in results["comparisons"]}
    assert ("fused", "without identity") in pairs and ("copies", "without identity") in pairs
    assert not any("2 people" in pair for pair in pairs)
    gain = next(e for e in results["comparisons"] if (e["row"], e["metric"]) == ("copies", "identity"))
    assert gain["mean"] == pytest.approx(0.75, abs=1e-3) and gain["excludes_zero"] and not gain["intervals_overlap"]


def test_the_results_say_what_made_them_and_no_folder(results, out, tiny_base, tmp_path):
    models = results["models"]
    assert set(models["base"]) >= {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert len(models["adapters"]["fused"]["sha256"]) == len(models["face_pack"]["recogniser_sha256"]) == 64
    assert models["adapters"]["fused"]["trained"]["combine"] == "fused"
    assert results["versions"]["torch"] and results["machine"]["device"] == "cpu"
    assert results["command"].startswith("python -m training.evaluate --protocol tiny.yaml --base tiny-sd15")
    text = (out / "results.json").read_text(encoding="utf-8") + (out / "report.md").read_text(encoding="utf-8")
    assert str(out.parent) not in text and str(tiny_base.parent) not in text


def test_the_report_has_tables_plots_pictures_and_what_is_missing(out):
    text = (out / "report.md").read_text(encoding="utf-8")
    for part in (
        "| copies | 3 | 0.750 [",
        "CLIP score: scorer.clip",
        "deepface distances:",
        "N references, row *fused*",
    ):
        assert part in text, part
    assert "3 people have fewer than 3 photos: their further references are changed crops" in text
    shown = [part.split(")")[0] for part in text.split("](")[1:]]
    assert {"plots/bars_identity.png", "plots/cosines.png", "plots/timing.png", "grids/pictures_1.png"} <= set(shown)
    assert all(Image.open(out / name).size[0] > 100 for name in shown)


def test_a_second_run_draws_only_what_is_missing_or_made_otherwise(arguments, out):
    def times() -> dict[str, int]:
        return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.png")}

    before, words = times(), [*arguments, "--out", str(out)]
    gone = sorted(before)[0]
    (out / gone).unlink()
    assert main([*words, "--set", "rows.fused 2.strength=3", "--set", "timing.row=null"]) == 0
    after = times()
    assert before.keys() == after.keys()
    drawn = {name for name in after if after[name] != before[name]}
    assert drawn == {gone, *(name for name in after if name.startswith("pictures/fused_2/"))}


def test_the_table_is_printed_and_goes_into_a_model_card(results, out, weights, tmp_path, capsys):
    assert table_main([str(out / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert "| row | pictures | identity |" in printed and "| copies | without identity | identity | +0.750 [" in printed
    card = ["--file", str(weights / "fused.safetensors"), "--license", "CC0", "--out", str(tmp_path / "card")]
    assert export_main([*card, "--evaluation", str(out / "results.json")]) == 0
    text = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "## Evaluation" in text and "| copies | 3 | 0.750 [" in text and "python -m training.evaluate" in text
    assert results_table(results).count("\n| ") > 10


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--people", "nowhere"], "nowhere is no folder"),
        (["--people", "{empty}"], "holds no pictures"),
        (["--people", "{faceless}"], "no face was found in the photos of any of 1 people"),
        (["--set", "rows.fused.adaptr=x"], "rows.fused.adaptr: unknown setting; did you mean 'rows.*.adapter'"),
        (["--set", "rows.fused.adapter=gone.safetensors"], "row 'fused': gone.safetensors: no such file"),
        (["--set", "rows.fused.adapter=other.safetensors"], "row 'fused': other.safetensors"),
        (["--set", "timing.row=gone"], "there is no row 'gone'"),
        (["--set", "rows.fused.people=9"], "rows.fused.people"),
        (["--set", "rows.fused.people=4"], "there are only 3"),
        (["--set", "scorer.clip={empty}"], "is no transformers CLIP folder"),
        (["--set", "scorer.face_pack=gone"], "'gone' is not on this machine"),
        (["--rows", "gone"], "there is no row 'gone'"),
        (["--base", "nowhere"], "nowhere does not exist"),
        (["--protocol", "gone"], "gone does not exist"),
    ],
)
def test_wrong_input_ends_with_a_message(extra, message, arguments, weights, tiny_base_xl, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    (tmp_path / "faceless").mkdir()
    Image.new("RGB", (64, 64), "green").save(tmp_path / "faceless" / "wall.png")
    if "other" in "".join(extra):
        model = open_studio(ModelConfig(base=str(tiny_base_xl)), "training-free", reference_size=64).model
        settings = AdapterSettings(base="custom", reference_size=64)
        save_adapter(weights / "other.safetensors", model.export_projections(), settings)
    words = [word.format(empty=tmp_path / "empty", faceless=tmp_path / "faceless") for word in extra]
    assert main([*arguments, "--out", str(tmp_path / "out"), *words]) == 2
    assert message in caplog.text

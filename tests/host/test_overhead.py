"""Speed and memory: the bars of docs/speed.md that a CPU can show. Machines are noisy, so only clear misses fail."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attention.cache import MIB
from benchmarks import dense_mask, overhead, quality
from benchmarks.cases import cases
from benchmarks.measure import interleaved
from benchmarks.results import verdict
from benchmarks.scene import Scene

ROOT = Path(__file__).resolve().parents[2]
NOISE = 0.05
ROUNDS = 3
ATTEMPTS = 5


@pytest.fixture(scope="module")
def scene(pack: Any) -> Scene:
    return Scene(pack, "sd15_full", size=256, trained=256, device="cpu")


@pytest.mark.slow
def test_a_step_stays_within_the_bars(scene: Scene) -> None:
    """All 16 layers at half of SD1.5's picture side; `--model sd15 --size 512` measures the real one."""
    wanted = [case for case in cases(scene, "cpu") if case.bar is not None]
    assert [case.bar for case in wanted] == [1.35, 1.12, 1.04, 1.04, 1.04, 1.0]
    first = next(case for case in cases(scene, "cpu") if case.name == wanted[2].against)
    models = {"unpatched": scene.model} | {case.name: case.patch(scene) for case in [*wanted, first]}
    for model in models.values():
        scene.step(model)
    steps = {name: lambda model=model: scene.step(model) for name, model in models.items()}

    def over_the_bar(best: dict[str, float]) -> dict[str, float]:
        ratios = {case.name: best[case.name] / best[case.against or "unpatched"] for case in wanted}
        return {case.name: ratios[case.name] for case in wanted if ratios[case.name] > case.bar + NOISE}

    assert missed(steps, ROUNDS, over_the_bar) == {}


def missed(
    ways: dict[str, Callable[[], float]], rounds: int, over: Callable[[dict[str, float]], dict[str, float]]
) -> dict[str, float]:
    """What is `over` by the fastest seconds of every way; measured longer while anything is.

    Another program beside a measurement can only make it slower, so the fastest is what the way itself takes.
    """
    best: dict[str, float] = {}
    found: dict[str, float] = {}
    for _ in range(ATTEMPTS):
        for name, timing in interleaved(ways, rounds, "cpu", lambda _: None).items():
            best[name] = min([*timing.seconds, best.get(name, math.inf)])
        found = over(best)
        if not found:
            break
    return found


def test_strength_0_leaves_nothing_in_the_model(scene: Scene) -> None:
    """So it costs nothing, whatever the clock says."""
    (case,) = [case for case in cases(scene, "cpu") if case.group == "strength 0"]
    patched = case.patch(scene)
    assert patched.model_options == scene.model.model_options
    assert (patched.wrappers, patched.callbacks, patched.additional_models) == ({}, {}, {})
    assert not patched.patches and not patched.object_patches


def test_a_second_run_with_another_seed_and_prompt_costs_no_reference_pass(scene: Scene) -> None:
    scene.pack.submodule("nodes.reference_cache").CACHE.drop(lambda _: True)
    runs = []
    for seed in (1, 2):
        model, _ = scene.patch(identity=scene.person(2, seed=9), reference_size=64)
        runs.append(scene.passes(model, steps=1, seed=seed)[0])
    assert runs == [2, 0]


@pytest.mark.parametrize(("layout", "side", "mib"), [("sd15", 512, 44.1), ("sd15", 256, 11.0), ("sdxl", 1024, 400.0)])
def test_keys_and_values_of_a_reference_take_what_was_counted(pack: Any, layout: str, side: int, mib: float) -> None:
    plans, sites = pack.submodule("nodes.fusion_plan"), pack.submodule("attention.sites")
    reference = pack.submodule("nodes.reference")
    table = {"sd15": sites.SD15_SITES, "sdxl": sites.SDXL_SITES}[layout]
    latent = reference.ReferenceLatent(torch.zeros(1, 4, side // 8, side // 8), "")
    plan = plans.FusionPlan(
        plans.ReferencePass(None, (latent,), None), (plans.Shown(0, 1.0),), table,
        frozenset(), pack.submodule("attention.fusion").PAPER, "fused", "paper",
    )  # fmt: skip
    assert plans.features_bytes(plan, 2) / MIB == pytest.approx(mib, rel=0.02)


def test_four_routed_people_are_much_faster_than_a_dense_mask(scene: Scene) -> None:
    gains = dict.fromkeys(dense_mask.KERNELS, 0.0)
    for _ in range(ATTEMPTS):
        for row in dense_mask.compare(scene, ROUNDS, reference=256, progress=lambda _: None):
            gains[row["kernel"]] = max(gains[row["kernel"]], statistics.median(row["gains"]))
        if min(gains.values()) >= 1.5:
            break
    assert set(gains) == set(dense_mask.KERNELS)
    assert min(gains.values()) >= 1.5


@pytest.mark.parametrize(("inputs", "allowed"), [({}, 1.15), ({"log_weight": 0.7}, 1.35)], ids=["plain", "with a term"])
def test_a_layer_costs_little_beyond_its_arithmetic(pack: Any, inputs: dict[str, float], allowed: float) -> None:
    """Against PyTorch's kernel on finished keys and values. A term widens heads of 40 to 48 channels: 1.2 by count."""
    fusion = pack.submodule("attention.fusion")
    q, text = torch.randn(1, 4096, 320), torch.randn(1, 77, 320)
    face = fusion.FaceKeys(torch.randn(1, 1024, 320), torch.randn(1, 1024, 320), **inputs)
    k, v = torch.cat([text, face.key], 1), torch.cat([text, face.value], 1)
    ways = {"ours": lambda: fusion.fused_attention(q, text, text, [face], heads=8),
            "kernel": lambda: fusion.sdpa_attend(q, k, v, 8)}  # fmt: skip
    with torch.no_grad():
        timed = {name: dense_mask.timed(way, "cpu") for name, way in ways.items()}

        def over(best: dict[str, float]) -> dict[str, float]:
            ratio = best["ours"] / best["kernel"]
            return {"ours": ratio} if ratio > allowed else {}

        assert missed(timed, 7, over) == {}


@pytest.mark.parametrize(
    ("value", "bar", "noise", "word"),
    [(1.3, None, 0.0, ""), (1.1, 1.12, 0.0, "met"), (1.13, 1.12, 0.02, "within noise"), (1.2, 1.12, 0.02, "NOT met")],
)
def test_the_table_says_whether_a_bar_is_met(value: float, bar: float | None, noise: float, word: str) -> None:
    assert verdict(value, bar, noise) == word


@pytest.mark.slow
def test_the_command_measures_and_writes_what_it_printed(comfyui_checkout: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.overhead", "--comfyui", str(comfyui_checkout), "--device", "cpu"]
    command += ["--size", "128", "--rounds", "1", "--rows", "size,strength 0,passes", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    (data,), (plot,) = tmp_path.glob("*.json"), tmp_path.glob("*.svg")
    (model,) = json.loads(data.read_text())["models"]
    assert len(json.loads(data.read_text()).get("gpu_bars", [])) in (0, 8)
    assert "| SDXL 1024 px, 1 reference of 512 px | <= 1.06 x | 1.014 x | not measured: " in done.stdout
    names = [row["name"] for row in model["rows"]]
    assert names == ["1 reference of 128 px", "1 reference of 64 px", "1 reference of 32 px", "strength 0"]
    assert all(f"| {row['name']} | {row['ratio']:.3f} |" in done.stdout for row in model["rows"])
    assert model["rows"][0]["flops"] > model["rows"][1]["flops"] > model["rows"][3]["flops"] == 1.0
    assert "run 2: 0 reference passes" in done.stdout and str(comfyui_checkout) not in data.read_text()
    assert plot.read_text().count("<rect") > len(names)


def test_wrong_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in (
        (["--comfyui", str(tmp_path)], "has no nodes.py"), (["--rows", "colours"], "unknown rows colours"),
        (["--size", "100"], "accepted are multiples of 64"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            overhead.main(wrong)
        assert said in capsys.readouterr().err


def test_without_cuda_every_gpu_bar_is_shown_as_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert overhead._why_no_gpu("cpu") == "not measured: no CUDA here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert overhead._why_no_gpu("cpu") == "not measured: --device cpu"
    assert overhead._why_no_gpu("cuda") is None


def test_every_case_of_the_issue_is_a_row(scene: Scene) -> None:
    for device in ("cpu", "cuda"):
        names = " | ".join(case.name for case in cases(scene, device))
        for wanted in ("1 reference of", "2 references", "4 references", "8 references", "1 routed", "2 routed",
                       "3 routed", "4 routed", "of 128 px", "decoupled", "matched", "training-free", "strength 0",
                       "fp8", "in RAM", "half of the tokens"):  # fmt: skip
            assert wanted in names


@pytest.mark.slow
def test_cheaper_forms_are_measured_against_the_usual_one(scene: Scene) -> None:
    """Random weights: orders of magnitude. docs/speed.md has the table."""
    rows = {row["form"]: row for row in quality.compare(scene, scene.size, lambda _: None)}
    assert rows["keys and values in RAM"]["layer_max"] == rows["keys and values in RAM"]["prediction"] == 0.0
    assert rows["fp8 keys and values"]["layer_max"] < 0.02
    merged = [
        rows[name]["layer_mean"] for name in ("3/4 of the tokens", "half of the tokens", "a quarter of the tokens")
    ]
    assert 0.0 < merged[0] < merged[1] < merged[2] < 0.03
    assert all(row["cosine"] > 0.999 and row["of_face"] < 0.05 for row in rows.values())
    assert len(quality.lines([*rows.values()], scene.size)) == 4 + len(rows)

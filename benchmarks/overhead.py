"""What FusedID adds to a sampling step: patched over unpatched, in one process, round by round.

    python -m benchmarks.overhead --comfyui PATH                        this machine's default, 5 minutes on two cores
    python -m benchmarks.overhead --comfyui PATH --model sd15 --size 512 --rows size
    python -m benchmarks.overhead --comfyui PATH --device cuda          SD1.5 at 512 px and SDXL at 1024 px, all rows

Models have random weights: speed does not depend on them. `sd15_full` has SD1.5's 16 layers at a constant width of 320,
so attention is a larger share of it than of SD1.5. On a CPU, seconds are the process's own. Results go to
benchmarks/results. With FUSEDID_PEERS naming a folder with ComfyUI_IPAdapter_plus, its FaceID is a row too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import dense_mask, floor, peers, quality
from .bars import PEER_BAR
from .cases import Case, cases
from .measure import MIB, Timing, interleaved, machine, spread
from .results import row_of, table, verdict, write
from .scene import Scene, start_host

RESULTS = Path(__file__).resolve().parent / "results"
DEFAULTS = {"cpu": [("sd15_full", 256)], "cuda": [("sd15", 512), ("sdxl", 1024)]}
TRAINED = {"sdxl": 1024}  # reference side an adapter of the family is trained at; else that of the picture
PEER = "IPAdapter_plus FaceID"
GROUPS = ("references", "size", "people", "mode", "form", "strength 0", "peers", "growth", "passes", "mask", "quality")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the files."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    models = DEFAULTS[options.device] if options.model is None else [(options.model, options.size or 512)]
    with tempfile.TemporaryDirectory() as base:
        pack = start_host(options.comfyui, Path(base), options.device)
        measured = [_model(pack, layout, options.size or size, options) for layout, size in models]
        result = {"machine": machine(options.device), "host": f"ComfyUI {pack.host.version}", "models": measured}
    if (reason := _why_no_gpu(options.device)) is not None:
        result["gpu_bars"] = [{**dataclasses.asdict(one), "measured": reason} for one in floor.gpu_floors()]
    print(table(result))
    if reason is not None:
        print("\n".join(floor.gpu_table(reason)))
    for path in write(result, options.out, f"overhead-{options.device}-{'-'.join(layout for layout, _ in models)}"):
        print(f"wrote {path}")
    return 0


def _why_no_gpu(device: str) -> str | None:
    """Why the bars for a GPU were not measured, or None where they were."""
    if device == "cuda":
        return None
    return "not measured: --device cpu" if torch.cuda.is_available() else "not measured: no CUDA here"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = os.environ.get("COMFYUI_PATH", "").split(os.pathsep)[0]
    default = Path(named).expanduser() if named else Path.home() / "ComfyUI"
    parser.add_argument("--comfyui", type=Path, default=default, help="a ComfyUI checkout (COMFYUI_PATH or ~/ComfyUI)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=("sd15_full", "sd15", "sdxl_full", "sdxl"))
    parser.add_argument("--size", type=int, help="side of the picture in pixels, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of the CPU")
    parser.add_argument("--rows", default=",".join(GROUPS), help=f"which of {', '.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and plot (benchmarks/results)")
    options = parser.parse_args(argv)
    options.rows = options.rows.split(",")
    if unknown := set(options.rows) - set(GROUPS):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; known: {', '.join(GROUPS)}")
    if options.size is not None and (options.size < 128 or options.size % 64):
        parser.error(f"--size is {options.size}; accepted are multiples of 64 from 128")
    if not (options.comfyui / "nodes.py").is_file():
        parser.error(f"{options.comfyui} has no nodes.py; name a ComfyUI checkout with --comfyui")
    return options


def _model(pack: Any, layout: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """All rows of one model."""
    _say(f"{layout} at {size} px: making random weights")
    scene = Scene(pack, layout, size, TRAINED.get(layout.split("_")[0], size), options.device)
    chosen, notes = _chosen(scene, options)
    models: dict[str, Any] = {"unpatched": scene.model}
    held: dict[str, float | None] = {}
    for case in chosen:
        models[case.name] = case.patch(scene)
        held[case.name] = _features_mib(models[case.name])  # the store is the model's: the next patch changes it
    flops = {name: _flops(scene, model) for name, model in models.items()}
    steps = {name: _stepper(scene, model) for name, model in models.items()}
    timings = interleaved(steps, options.rounds, options.device, _say)
    rows = [_row(case, timings, flops, held) for case in chosen]
    if "growth" in options.rows:
        rows += _growth(scene, options)
    if "passes" in options.rows:
        notes += _passes(scene)
    if "mask" in options.rows:
        notes += _dense(scene, options)
    lost = quality.compare(scene, size, _say) if "quality" in options.rows else []
    numbers = pack.submodule("nodes.reference_cache").compute_dtype(scene.model.model)
    return {
        "layout": layout, "size": size, "dtype": str(numbers).removeprefix("torch."), "kernel": _kernel(),
        "rounds": options.rounds, "unpatched_s": timings["unpatched"].median, "rows": rows, "notes": notes,
        "quality": lost, "quality_lines": quality.lines(lost, size) if lost else [],
    }  # fmt: skip


def _chosen(scene: Scene, options: argparse.Namespace) -> tuple[list[Case], list[str]]:
    every = cases(scene, options.device)
    chosen = [case for case in every if case.group in options.rows]
    if "peers" not in options.rows:
        return chosen, []
    reason = peers.missing(scene)
    if reason is not None:
        return chosen, [f"{PEER} not measured: {reason}"]
    half = next(case for case in every if case.name == f"1 reference of {scene.size // 2} px")
    compared = Case("peers", f"{half.name} (against {PEER})", half.patch, PEER_BAR, PEER)
    return [*chosen, Case("peers", PEER, peers.faceid), compared], []


def _row(
    case: Case, timings: dict[str, Timing], flops: dict[str, float], held: dict[str, float | None]
) -> dict[str, Any]:
    timing, base = timings[case.name], timings["unpatched"]
    against = timing.ratios(timings[case.against]) if case.against else timing.ratios(base)
    compared = sorted(against)[len(against) // 2]
    return row_of(
        case,
        timing.ratios(base),
        flops=flops[case.name] / flops["unpatched"],
        peak_mib=timing.peak_mib,
        features_mib=held[case.name],
        ratio_against=compared,
        verdict=verdict(compared, case.bar, spread(against)),
    )


def _stepper(scene: Scene, model: Any, size: int = 0) -> Callable[[], float]:
    return lambda: scene.step(model, size)


def _flops(scene: Scene, model: Any, size: int = 0) -> float:
    """Of one step with the reference pass done, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    scene.step(model, size)
    with FlopCounterMode(display=False) as counter:
        scene.step(model, size)
    return counter.get_total_flops() / (scene.untimed + scene.timed)


def _features_mib(model: Any) -> float | None:
    """Keys and values a patched MODEL will hold, as the host is told."""
    expected = [one.model_size() for key, more in model.additional_models.items() for one in more if "fusedid" in key]
    return expected[0] / MIB if expected else None


def _growth(scene: Scene, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One reference as large as the picture, for growing pictures: each size against its own unpatched step."""
    rows = []
    for size in (scene.size // 2, scene.size * 3 // 4):
        case = Case("growth", f"picture and reference of {size} px", lambda s: None)
        patched, _ = scene.patch(identity=scene.person(), reference_size=size)
        models = {"unpatched": scene.model, "patched": patched}
        flops = {name: _flops(scene, model, size) for name, model in models.items()}
        steps = {name: _stepper(scene, model, size) for name, model in models.items()}
        timings = interleaved(steps, options.rounds, options.device, _say)
        ratios = timings["patched"].ratios(timings["unpatched"])
        more = {"flops": flops["patched"] / flops["unpatched"], "peak_mib": timings["patched"].peak_mib}
        rows.append(row_of(case, ratios, features_mib=None, verdict="", **more))
    return rows


def _passes(scene: Scene) -> list[str]:
    """Reference passes of a first run, and of a second with another seed and prompt."""
    cache = scene.pack.submodule("nodes.reference_cache").CACHE
    cache.drop(lambda _: True)
    found = []
    for number in (1, 2):
        model, _ = scene.patch(identity=scene.person(2, seed=9), reference_size=scene.size)
        count, seconds = scene.passes(model, steps=2, seed=number)
        found.append(f"run {number}: {count} reference passes, {seconds:.2f} s")
    held = "met" if found[1].startswith("run 2: 0 ") else "NOT met"
    return [f"2 references, 2 steps, new seed and prompt; {'; '.join(found)} (bar: 0 in the second run, {held})"]


def _dense(scene: Scene, options: argparse.Namespace) -> list[str]:
    notes = []
    for row in dense_mask.compare(scene, options.rounds, min(scene.size, 512), _say):
        gain = sorted(row["gains"])[len(row["gains"]) // 2]
        held = verdict(gain, row["bar"], spread(row["gains"]), at_least=True)
        notes.append(
            f"4 routed people at the 64x64 level, references of {row['reference_px']} px, {row['kernel']}: "
            f"{gain:.2f} x faster than a dense mask (bar: >= {row['bar']:.1f} x, {held})"
        )
    return notes


def _kernel() -> str:
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention.__name__


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

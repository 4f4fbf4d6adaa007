"""What of ComfyUI this pack relies on, as it is in one version: signatures, option keys, shapes, schema classes.

`python dev.py host --comfyui PATH` writes tests/data/host_contract/<version>.json.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import jobs

FOLDER = jobs.ROOT / "tests" / "data" / "host_contract"
CALLED = {
    "comfy.model_patcher": (
        "ModelPatcher.__init__", "ModelPatcher.clone", "ModelPatcher.add_wrapper_with_key",
        "ModelPatcher.add_callback_with_key", "ModelPatcher.set_additional_models", "ModelPatcher.model_size",
        "ModelPatcher.loaded_size", "ModelPatcher.detach", "ModelPatcher.get_model_object",
        "ModelPatcher.set_model_attn1_replace", "ModelPatcher.set_model_attn2_replace",
    ),
    "comfy.model_base": (
        "BaseModel.apply_model", "BaseModel.get_dtype", "BaseModel.process_latent_in", "BaseModel.memory_required",
        "SDXL.encode_adm",
    ),
    "comfy.model_sampling": (
        "EPS.noise_scaling", "EPS.calculate_input", "ModelSamplingDiscrete.timestep",
        "ModelSamplingDiscrete.percent_to_sigma",
    ),
    "comfy.model_management": (
        "get_torch_device", "unet_offload_device", "intermediate_device", "soft_empty_cache", "free_memory",
        "load_model_gpu", "throw_exception_if_processing_interrupted",
    ),
    "comfy.samplers": ("calc_cond_batch", "CFGGuider.sample", "KSampler.sample"),
    "comfy.sd": ("load_lora_for_models", "VAE.encode", "CLIP.encode_from_tokens"),
    "comfy.clip_vision": ("clip_preprocess", "ClipVisionModel.encode_image"),
    "comfy.utils": ("ProgressBar.update", "ProgressBar.update_absolute"),
    "comfy.ldm.modules.attention": ("attention_pytorch", "CrossAttention.forward"),
    "folder_paths": (
        "add_model_folder_path", "get_filename_list", "get_full_path", "get_full_path_or_raise", "get_folder_paths",
        "get_input_directory", "get_input_subfolders",
    ),
    "nodes": ("KSampler.sample", "ConditioningSetArea.append", "load_custom_node"),
    "comfy_execution.graph_utils": ("ExecutionBlocker.__init__",),
}  # fmt: skip
INPUTS = ("Int", "Float", "String", "Boolean", "Combo", "Image", "Mask", "Model", "Vae", "Clip", "ClipVision")
ATTRIBUTES = {
    "patcher": ("model", "model_options", "patches", "patches_uuid", "current_hooks", "load_device"),
    "base": (
        "diffusion_model", "model_sampling", "model_config", "manual_cast_dtype", "adm_channels", "current_patcher",
        "latent_format",
    ),
}  # fmt: skip
Record = dict[str, Any]


def contract(lab: Any) -> Record:
    """Everything, from the running host."""
    return {
        "signatures": signatures(),
        "inputs": {name: inspect_parameters(_io(f"{name}.Input").__init__) for name in INPUTS},
        "schema": inspect_parameters(_io("Schema").__init__),
        "node output": inspect_parameters(_io("NodeOutput").__init__),
        "wrappers": _names("comfy.patcher_extension", "WrappersMP"),
        "callbacks": _names("comfy.patcher_extension", "CallbacksMP"),
        "attributes": {
            "patcher": [name for name in ATTRIBUTES["patcher"] if hasattr(lab.model, name)],
            "base": [name for name in ATTRIBUTES["base"] if hasattr(lab.model.model, name)],
        },
        "calls": observed_calls(lab),
    }


def signatures() -> dict[str, list[str]]:
    """Parameter names of every function and method we call or override."""
    found = {}
    for module_name, names in CALLED.items():
        module = importlib.import_module(module_name)
        for name in names:
            target: Any = module
            for part in name.split("."):
                target = getattr(target, part)
            found[f"{module_name}.{name}"] = inspect_parameters(inspect.unwrap(target))
    return found


def inspect_parameters(function: Callable[..., Any]) -> list[str]:
    """`name`, `name=` with a default, `*args`, `**kwargs`."""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*{}", inspect.Parameter.VAR_KEYWORD: "**{}"}
    return [
        marks.get(entry.kind, "{}").format(name) + ("=" if entry.default is not entry.empty else "")
        for name, entry in inspect.signature(function).parameters.items()
    ]


def observed_calls(lab: Any) -> Record:
    """What the host hands to attention patches and wrappers in a real run with an area prompt."""
    import comfy.patcher_extension as extension
    import torch

    import nodes

    seen: Record = {}
    clone = lab.model.clone()

    def replace(name: str) -> Callable[..., Any]:
        def layer(q: Any, k: Any, v: Any, options: Record) -> Any:
            from comfy.ldm.modules.attention import optimized_attention

            seen.setdefault(name, {"q": kind(q), "k": kind(k), "v": kind(v), "options": kinds(options)})
            return optimized_attention(q, k, v, options["n_heads"])

        return layer

    def patch(n: Any, context: Any, value: Any, options: Record) -> Any:
        given = {"n": kind(n), "context": kind(context), "value": kind(value), "options": kinds(options)}
        seen.setdefault("attn2_patch", given)
        return n, context, value

    def apply_model(executor: Any, *args: Any, **named: Any) -> Any:
        seen.setdefault(
            "APPLY_MODEL",
            {
                "executor": sorted(name for name in ("class_obj", "original") if hasattr(executor, name)),
                "positional": [kind(argument) for argument in args],
                "named": kinds(named),
                "transformer_options": kinds(args[5] if len(args) > 5 else named["transformer_options"]),
            },
        )
        return executor(*args, **named)

    def calc_cond_batch(executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: Any, *rest: Any) -> Any:
        if "CALC_COND_BATCH" not in seen:
            both = [cond for group in conds for cond in group or ()]
            seen["CALC_COND_BATCH"] = {
                "cond": sorted({key for cond in both for key in cond}),
                "area": kind(next(cond["area"] for cond in both if cond.get("area"))),
                "uuid": type(both[0]["uuid"]).__name__,
                "x": kind(x), "timestep": kind(timestep), "options": sorted(options), "more": len(rest),
            }  # fmt: skip
        return executor(model, conds, x, timestep, options, *rest)

    site = lab.sites[0]
    clone.set_model_attn1_replace(replace("attn1_replace"), *site.key)
    clone.set_model_attn2_replace(replace("attn2_replace"), *site.key)
    clone.set_model_attn2_patch(patch)
    clone.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, "contract", apply_model)
    clone.add_wrapper_with_key(extension.WrappersMP.CALC_COND_BATCH, "contract", calc_cond_batch)
    area = nodes.ConditioningSetArea().append(lab.positive, 64, 64, 0, 0, 1.0)[0]
    result = lab.sample(clone, positive=area, steps=1, latent=torch.zeros(1, 4, 8, 8))
    return {**seen, "result": kind(result)}


def kinds(values: Record) -> dict[str, str]:
    return {key: kind(value) for key, value in sorted(values.items())}


def kind(value: Any) -> str:
    """Type and size of a value, not its content: `Tensor[2, 64, 320]`, `list[int] * 4`."""
    if hasattr(value, "shape"):
        return f"Tensor{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        inner = sorted({type(entry).__name__ for entry in value})
        return f"{type(value).__name__}[{', '.join(inner)}] * {len(value)}"
    return type(value).__name__


def changes(recorded: Any, found: Any, place: str = "", *, only_missing: bool) -> list[str]:
    """Differences, one line each. only_missing: of a newer host, which may have more than was recorded."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        lost = [f"{place}/{key} is gone" for key in recorded if key not in found]
        new = [] if only_missing else [f"{place}/{key} is new" for key in found if key not in recorded]
        common = [key for key in recorded if key in found]
        inner = [changes(recorded[key], found[key], f"{place}/{key}", only_missing=only_missing) for key in common]
        return lost + new + [line for lines in inner for line in lines]
    if only_missing and isinstance(recorded, list) and isinstance(found, list):
        return [f"{place}: {entry} is gone" for entry in recorded if entry not in found]
    return [] if recorded == found else [f"{place}: was {recorded}, is {found}"]


def recorded_contracts() -> dict[str, Record]:
    """Every recorded version, the oldest first."""
    files = sorted(FOLDER.glob("*.json"), key=lambda file: [int(part) for part in file.stem.split(".")])
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def _io(name: str) -> Any:
    target: Any = importlib.import_module("comfy_api.v0_0_2").io
    for part in name.split("."):
        target = getattr(target, part)
    return target


def _names(module: str, name: str) -> list[str]:
    return sorted(key for key in vars(getattr(importlib.import_module(module), name)) if key.isupper())


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py host", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="the checkout to record")
    checkout = parser.parse_args().comfyui.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        lab = jobs.open_lab(checkout, base)
        FOLDER.mkdir(parents=True, exist_ok=True)
        text = json.dumps(contract(lab), indent=1, sort_keys=True) + "\n"
        (FOLDER / f"{lab.pack.host.version}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

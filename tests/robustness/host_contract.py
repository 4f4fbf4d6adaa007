"""What of ComfyUI this pack relies on, as it is in one version: signatures, option keys, shapes, schema classes.

Something more to rely on is a word more in CALLED, ATTRIBUTES or READ (and in SINCE where older versions lack it); then
`python dev.py host --comfyui PATH` for each version writes tests/data/host_contract/<version>.json anew.
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

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "data" / "host_contract"
LAYOUT = "sd15_tiny"
CALLED = {
    "comfy.model_patcher": (
        "ModelPatcher.__init__", "ModelPatcher.clone", "ModelPatcher.add_wrapper_with_key",
        "ModelPatcher.add_callback_with_key", "ModelPatcher.set_additional_models", "ModelPatcher.model_size",
        "ModelPatcher.loaded_size", "ModelPatcher.detach", "ModelPatcher.get_model_object",
        "ModelPatcher.set_model_attn1_replace", "ModelPatcher.set_model_attn2_replace", "ModelPatcher.inject_model",
        "ModelPatcher.eject_model", "ModelPatcher.use_ejected", "ModelPatcher.set_injections", "ModelPatcher.pre_run",
        "ModelPatcher.cleanup", "ModelPatcher.is_dynamic",
    ),
    "comfy.patcher_extension": (
        "WrapperExecutor.__call__", "WrapperExecutor.execute", "add_wrapper_with_key", "get_all_wrappers",
        "PatcherInjection.__init__",
    ),
    "comfy.hooks": (
        "HookGroup.add", "HookGroup.get_type", "HookGroup.clone", "WeightHook.__init__", "create_hook_lora",
        "set_hooks_for_conditioning",
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
    "comfy.samplers": (
        "calc_cond_batch", "CFGGuider.sample", "CFGGuider.set_conds", "CFGGuider.inner_set_conds",
        "CFGGuider.outer_sample", "CFGGuider.predict_noise", "KSampler.sample",
    ),
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
    "patcher": (
        "model", "model_options", "patches", "patches_uuid", "current_hooks", "load_device", "injections",
        "is_injected", "additional_models", "hook_patches", "forced_hooks",
    ),
    "base": (
        "diffusion_model", "model_sampling", "model_config", "manual_cast_dtype", "adm_channels", "current_patcher",
        "latent_format",
    ),
    "guider": ("model_patcher", "model_options", "original_conds", "conds", "cfg", "inner_model", "loaded_models"),
    "hook group": ("hooks",),
    "weight hook": (
        "hook_type", "hook_ref", "hook_id", "hook_keyframe", "hook_scope", "strength", "strength_model", "weights",
        "weights_clip", "need_weight_init",
    ),
    "wrappers": ("OUTER_SAMPLE", "CALC_COND_BATCH", "APPLY_MODEL", "DIFFUSION_MODEL"),
    "callbacks": ("ON_CLONE", "ON_PRE_RUN", "ON_CLEANUP"),
}  # fmt: skip
READ = {
    "attn2_replace/options": (
        "n_heads", "activations_shape", "cond_or_uncond", "sigmas", "uuids", "block", "block_index",
    ),
    "attn1_replace/options": ("n_heads", "activations_shape", "uuids", "block", "block_index"),
    "attn2_patch/options": ("block", "block_index"),
    "APPLY_MODEL/transformer_options": ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers"),
    "DIFFUSION_MODEL/transformer_options": ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers"),
    "CALC_COND_BATCH/cond": ("uuid", "area"),
    "OUTER_SAMPLE/conds": ("positive", "negative"),
    "OUTER_SAMPLE/cond": ("uuid",),
}  # fmt: skip
"""Keys of what the host hands to patches and wrappers, by their place in the record's `calls`."""
SINCE = {"comfy.model_patcher.ModelPatcher.is_dynamic": "0.28.0"}
"""The first recorded version that has it. Whatever is not here has been there since the oldest."""
Record = dict[str, Any]


def contract(small_models: Any) -> Record:
    """Everything, from the running host. Our pack takes no part in it."""
    model = small_models.load_unet(LAYOUT)
    calls, guider = observed_calls(model, *(small_models.conditioning(LAYOUT, seed=seed) for seed in (1, 2)))
    return {
        "signatures": signatures(),
        "inputs": {name: inspect_parameters(_io(f"{name}.Input").__init__) for name in INPUTS},
        "schema": inspect_parameters(_io("Schema").__init__),
        "node output": inspect_parameters(_io("NodeOutput").__init__),
        "calls": calls,
        "attributes": {**attributes(model), "guider": guider},
    }


def signatures() -> dict[str, list[str]]:
    """Parameter names of every function and method we call or override, where this version has it."""
    found = {}
    for module_name, names in CALLED.items():
        module = importlib.import_module(module_name)
        for name in names:
            target: Any = module
            for part in name.split("."):
                target = getattr(target, part, None)
            if target is not None:
                found[f"{module_name}.{name}"] = inspect_parameters(inspect.unwrap(target))
    return found


def attributes(model: Any) -> dict[str, list[str]]:
    """Which of ATTRIBUTES are there, but for the guider's: those come and go while it samples."""
    import comfy.hooks
    import comfy.patcher_extension as extension

    owners = {
        "patcher": model, "base": model.model, "hook group": comfy.hooks.HookGroup(),
        "weight hook": comfy.hooks.WeightHook(), "wrappers": extension.WrappersMP, "callbacks": extension.CallbacksMP,
    }  # fmt: skip
    return {name: [word for word in ATTRIBUTES[name] if hasattr(owner, word)] for name, owner in owners.items()}


def inspect_parameters(function: Callable[..., Any]) -> list[str]:
    """`name`, `name=` with a default, `*args`, `**kwargs`."""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*{}", inspect.Parameter.VAR_KEYWORD: "**{}"}
    return [
        marks.get(entry.kind, "{}").format(name) + ("=" if entry.default is not entry.empty else "")
        for name, entry in inspect.signature(function).parameters.items()
    ]


def observed_calls(model: Any, positive: Any, negative: Any) -> tuple[Record, list[str]]:
    """What the host hands to patches, wrappers and callbacks in a real run; what of ATTRIBUTES a busy guider has."""
    import torch

    import nodes

    observer, clone = Observer(), model.clone()
    observer.install(clone, first_layer(model.model.diffusion_model))
    area = nodes.ConditioningSetArea().append(positive, 64, 64, 0, 0, 1.0)[0]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    result = nodes.KSampler().sample(clone.clone(), 7, 1, 3.0, "euler", "normal", area, negative, latent, 1.0)
    return {**observer.seen, "result": kind(result[0]["samples"])}, observer.guider_attributes


def first_layer(unet: Any) -> tuple[str, int]:
    """Where patches_replace has its first transformer block."""
    blocks = enumerate(unet.input_blocks)
    return "input", next(n for n, block in blocks if any(hasattr(part, "transformer_blocks") for part in block))


class Observer:
    """Installed into a ModelPatcher it notes the first call of everything we hang into the host."""

    def __init__(self) -> None:
        self.seen: Record = {}
        self.guider: Any = None
        self.guider_attributes: list[str] = []

    def __deepcopy__(self, _: Any) -> Observer:
        """ComfyUI up to 0.8 copies the methods among a model's options with their owner at every clone."""
        return self

    def install(self, model: Any, key: tuple[str, int]) -> None:
        """key: a cross-attention layer."""
        from comfy.patcher_extension import CallbacksMP, WrappersMP

        model.set_model_attn1_replace(self.replace("attn1_replace"), *key)
        model.set_model_attn2_replace(self.replace("attn2_replace"), *key)
        model.set_model_attn2_patch(self.attn2_patch)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "contract", self.outer_sample)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "contract", self.calc_cond_batch)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "contract", self.apply_model)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "contract", self.diffusion_model)
        for name in ATTRIBUTES["callbacks"]:
            model.add_callback_with_key(getattr(CallbacksMP, name), "contract", self.callback(name))

    def replace(self, name: str) -> Callable[..., Any]:
        def layer(q: Any, k: Any, v: Any, options: Record) -> Any:
            from comfy.ldm.modules.attention import optimized_attention

            self.seen.setdefault(name, {"q": kind(q), "k": kind(k), "v": kind(v), "options": kinds(options)})
            return optimized_attention(q, k, v, options["n_heads"])

        return layer

    def attn2_patch(self, n: Any, context: Any, value: Any, options: Record) -> Any:
        given = {"n": kind(n), "context": kind(context), "value": kind(value), "options": kinds(options)}
        self.seen.setdefault("attn2_patch", given)
        return n, context, value

    def outer_sample(self, executor: Any, *args: Any, **named: Any) -> Any:
        self.guider = executor.class_obj
        conds = self.guider.conds
        self.seen["OUTER_SAMPLE"] = executor_call(executor, args, named) | {
            "conds": {name: kind(group) for name, group in sorted(conds.items())},
            "cond": kinds({key: value for group in conds.values() for cond in group for key, value in cond.items()}),
            "model_options": sorted(self.guider.model_options),
        }
        return executor(*args, **named)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: Any, *rest: Any
    ) -> Any:
        self.guider_attributes = [name for name in ATTRIBUTES["guider"] if hasattr(self.guider, name)]
        both = [cond for group in conds for cond in group or ()]
        given = {
            "cond": sorted({key for cond in both for key in cond}),
            "area": kind(next(cond["area"] for cond in both if cond.get("area"))),
            "uuid": type(both[0]["uuid"]).__name__,
            "x": kind(x), "timestep": kind(timestep), "options": sorted(options), "more": len(rest),
        }  # fmt: skip
        self.seen.setdefault("CALC_COND_BATCH", given)
        return executor(model, conds, x, timestep, options, *rest)

    def apply_model(self, executor: Any, *args: Any, **named: Any) -> Any:
        self.seen.setdefault("APPLY_MODEL", executor_call(executor, args, named))
        return executor(*args, **named)

    def diffusion_model(self, executor: Any, *args: Any, **named: Any) -> Any:
        self.seen.setdefault("DIFFUSION_MODEL", executor_call(executor, args, named))
        return executor(*args, **named)

    def callback(self, name: str) -> Callable[..., None]:
        def call(*args: Any, **named: Any) -> None:
            self.seen.setdefault(name, {"positional": [kind(argument) for argument in args], "named": kinds(named)})

        return call


def executor_call(executor: Any, args: tuple[Any, ...], named: Record) -> Record:
    """A wrapper's call; `transformer_options` are the sixth of the model's arguments."""
    options = args[5] if len(args) > 5 else named.get("transformer_options")
    return {
        "executor": sorted(name for name in ("class_obj", "original") if hasattr(executor, name)),
        "class_obj": type(executor.class_obj).__name__,
        "positional": [kind(argument) for argument in args],
        "named": kinds(named),
        **({"transformer_options": kinds(options)} if isinstance(options, dict) else {}),
    }


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


def missing(record: Record, version: str) -> list[str]:
    """What CALLED, ATTRIBUTES and READ name and a recorded version lacks though SINCE does not say so."""
    called = [f"{module}.{name}" for module, names in CALLED.items() for name in names]
    lost = [name for name in called if name not in record["signatures"]]
    for owner, names in ATTRIBUTES.items():
        lost += [f"{owner}.{name}" for name in names if name not in record["attributes"].get(owner, ())]
    for place, keys in READ.items():
        found = record["calls"]
        for part in place.split("/"):
            found = found.get(part, {})
        lost += [f"{place}/{key}" for key in keys if key not in found]
    return [name for name in lost if version_key(SINCE.get(name, "0")) <= version_key(version)]


def version_key(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def recorded_contracts() -> dict[str, Record]:
    """Every recorded version, the oldest first."""
    files = sorted(FOLDER.glob("*.json"), key=lambda file: version_key(file.stem))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def _io(name: str) -> Any:
    target: Any = importlib.import_module("comfy_api.v0_0_2").io
    for part in name.split("."):
        target = getattr(target, part)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py host", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="the checkout to record")
    parser.add_argument("--into", type=Path, default=FOLDER, help="folder of the record")
    options = parser.parse_args()
    checkout = options.comfyui.resolve()
    sys.path += [str(ROOT), str(ROOT / "tests" / "host")]
    import cpu_torch

    cpu_torch.install()
    import comfy_host
    from small_models import SmallModels

    with tempfile.TemporaryDirectory() as temporary:
        base = comfy_host.make_base(Path(temporary))
        host = comfy_host.import_host(checkout, base)
        text = json.dumps(contract(SmallModels(base / "models")), indent=1, sort_keys=True) + "\n"
    options.into.mkdir(parents=True, exist_ok=True)
    (options.into / f"{host.version}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the doctor adds inside ComfyUI: host, device, adapters on disk, and which layers of a MODEL are patched."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import folder_paths
import torch

from ..attention.community.layers import LABELS
from ..attention.sites import FAMILIES, discover_sites, family_of
from ..faces.doctor import Finding, version_of
from .community_files import FOLDERS, recognised_choice
from .host.kernel import kernel_name
from .host.neighbours import layers_of_ours, layers_taken

OWN_FOLDERS = ("fusedid", "identities")
TOOLS = ("torch", "transformers", "safetensors", "einops", "diffusers", "open_clip_torch")


def host_findings() -> list[Finding]:
    """ComfyUI's version, the device, the attention kernel, and the libraries the nodes may need."""
    kernel = kernel_name().removeprefix("attention_")
    device = comfy.model_management.get_torch_device()
    tools = [f"{name} {version}" for name in TOOLS if (version := version_of(name))]
    return [
        Finding("ok", f"ComfyUI {_host_version()}, device {device}, attention kernel {kernel}"),
        Finding("ok", ", ".join(tools)),
    ]


def _host_version() -> str:
    try:
        from comfyui_version import __version__
    except ImportError:
        return "of unknown version"
    return __version__


def folder_findings() -> list[Finding]:
    """Our folders and the community ones: where they are and what in them can be used."""
    findings = []
    for name in OWN_FOLDERS:
        if name in folder_paths.folder_names_and_paths:
            files = folder_paths.get_filename_list(name)
            findings.append(Finding("ok", f"{name}: {_count(len(files), 'file')} in {_places(name)}"))
    for name in FOLDERS:
        findings += _community_findings(name)
    clip = folder_paths.get_filename_list("clip_vision")
    return [*findings, Finding("ok", f"clip_vision: {', '.join(clip) or 'no file'} in {_places('clip_vision')}")]


def _community_findings(folder: str) -> list[Finding]:
    names = folder_paths.get_filename_list(folder)
    known = {name: recognised_choice(f"{folder}/{name}") for name in names}
    usable = [
        Finding("ok", f"{folder}/{name}: {found.family.label} for {LABELS[found.layers.base]}")
        for name, found in known.items()
        if found is not None
    ]
    level = "ok" if usable else "note"
    return [
        Finding(level, f"{folder}: {len(usable)} of {_count(len(names), 'file')} usable in {_places(folder)}"),
        *usable,
    ]


def model_findings(model: Any) -> list[Finding]:
    """In how many layers of a MODEL (a ModelPatcher) we act, and which nodes replace how many."""
    sites = discover_sites(model.model.diffusion_model)
    if not sites:
        kind = type(model.model).__name__
        return [Finding("problem", f"the model ({kind}) has no cross-attention FusedID knows", "use SD1.5 or SDXL")]
    label = next((f.label for f in FAMILIES if f.name == family_of(sites)), "a UNet of another layout")
    findings = [Finding("ok", f"model: {label}, {len(sites)} cross-attention layers")]
    for name, attention, number, times in layers_of_ours(model):
        where = "cross-attention" if attention == "attn2" else "self-attention"
        who = name if times == 1 else f"{times} times {name}: each"
        level = "ok" if times == 1 else "note"
        findings.append(Finding(level, f"{who} acts in {number} of {len(sites)} {where} layers"))
    others = sorted(layers_taken(model, sites).items())
    findings += [Finding("note", f"{owner} replaces {number} of {len(sites)} layers") for owner, number in others]
    if len(findings) == 1:
        findings.append(Finding("ok", f"no layer is replaced (0 of {len(sites)})"))
    return findings


def cuda_findings() -> list[Finding]:
    """Whether PyTorch sees a GPU that onnxruntime's build cannot use."""
    from ..faces.providers import available_providers

    providers = available_providers()
    if not torch.cuda.is_available() or not providers or "CUDA" in providers:
        return []
    text = f"PyTorch uses a GPU, onnxruntime only {', '.join(providers)}: faces are found on the CPU (about 0.1 s each)"
    return [Finding("note", text)]


def _places(folder: str) -> str:
    return ", ".join(folder_paths.get_folder_paths(folder))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")

"""Which onnxruntime providers this machine really has, and the repair when two builds overwrite each other."""

from __future__ import annotations

import importlib.metadata
import re

from .install import onnxruntime_package, pip_install, pip_replace

SUFFIX = "ExecutionProvider"
AUTO = "auto"
AUTO_ORDER = ("CUDA", "ROCM", "MIGraphX", "Dml", "CPU")
"""TensorRT is left out because it compiles for minutes, CoreML because it fails on the detectors' free sizes."""


def available_providers() -> list[str]:
    """Short names (``CUDA``, ``CPU``, ...) of what the installed onnxruntime offers; empty when it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return []
    # A half-removed onnxruntime leaves an importable folder without its functions.
    names: list[str] = getattr(onnxruntime, "get_available_providers", list)()
    return [name.removesuffix(SUFFIX) for name in names]


def provider_choices() -> list[str]:
    """What a user can pick: ``auto`` first, then the available providers."""
    return [AUTO, *available_providers()]


def choose_provider(wanted: str, available: list[str]) -> str:
    """The provider for the wish ``wanted``; a missing one is a ``ValueError``, because it would silently be CPU."""
    if not available:
        raise ValueError(f"onnxruntime is not installed or broken, so face models cannot run; {repair_hint()}")
    if wanted == AUTO:
        return next((name for name in AUTO_ORDER if name in available), available[0])
    if wanted not in available:
        raise ValueError(
            f"the provider {wanted!r} is not in this onnxruntime, which has {', '.join(available)}; "
            f"choose one of these or 'auto'. {repair_hint()}"
        )
    return wanted


def installed_builds() -> list[str]:
    """The onnxruntime distributions that are installed, e.g. ``['onnxruntime', 'onnxruntime-gpu']``."""
    names = (distribution.metadata["Name"] or "" for distribution in importlib.metadata.distributions())
    canonical = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    return sorted(
        name for name in canonical if re.fullmatch(r"onnxruntime(-[a-z]+)?", name) and "extensions" not in name
    )


def clash_hint(builds: list[str], available: list[str]) -> str:
    """How to repair two builds that own the same module (the last one installed wins); empty when there is no clash."""
    if len(builds) < 2:
        return ""
    wanted = next((name for name in builds if name != "onnxruntime"), builds[0])
    return (
        f"{' and '.join(builds)} are installed over each other and only {', '.join(available) or 'nothing'} works; "
        f"repair: {pip_replace(builds, wanted)}"
    )


def repair_hint() -> str:
    """One sentence on how to get a working onnxruntime on this machine."""
    return (
        clash_hint(installed_builds(), available_providers())
        or f"install it with: {pip_install(onnxruntime_package())}"
    )

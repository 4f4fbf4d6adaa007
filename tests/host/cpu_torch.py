"""Lets ComfyUI, and diffusers beside it, import where torch is a CPU build; does nothing elsewhere.

The registry's torchvision is built for CUDA: beside a CPU torch its compiled part does not load, and importing it then
fails because two operators are not declared. Declaring them is enough, nothing here calls them. torchaudio has no
wheel for every torch; ComfyUI imports it at start, images never use it, so an empty module stands in when it is absent.
Used in-process by `conftest.py`, and copied as `sitecustomize.py` for server processes: standard library only.
"""

import importlib.abc
import importlib.machinery
import pathlib
import sys
import types

MISSING_OPERATORS = ("nms", "qnms")


class DeclareTorchvisionOperators(importlib.abc.MetaPathFinder):
    """Sees the first import of torchvision and declares the operators when its compiled part cannot be loaded."""

    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(name)
            if spec is not None and not _compiled_part_loads(pathlib.Path(spec.origin).parent):
                _declare_operators()
        return None


class EmptyTorchaudio(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on sys.meta_path: only asked when no real torchaudio was found."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torchaudio":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _empty_class
        return module

    def exec_module(self, module):
        return None


def install() -> None:
    """Idempotent; costs nothing until torchvision or torchaudio is imported."""
    kinds = {type(finder).__name__ for finder in sys.meta_path}
    if DeclareTorchvisionOperators.__name__ not in kinds:
        sys.meta_path.insert(0, DeclareTorchvisionOperators())
    if EmptyTorchaudio.__name__ not in kinds:
        sys.meta_path.append(EmptyTorchaudio())


def _compiled_part_loads(package: pathlib.Path) -> bool:
    import torch

    try:
        for library in (*package.glob("_C*.so"), *package.glob("_C*.pyd")):
            torch.ops.load_library(str(library))
            return True
    except OSError:
        return False
    return False


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in MISSING_OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch._fusedid_torchvision_operators = library  # a declaration lives as long as this object


def _empty_class(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


if __name__ == "sitecustomize":
    install()

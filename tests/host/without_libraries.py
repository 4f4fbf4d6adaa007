"""Run as a program: loads the pack in the real host while some libraries cannot be imported; prints JSON.

Arguments: the checkout, a base folder, the repository. The libraries are hidden as if they were not installed: nothing
finds them, neither `import` nor `importlib.metadata`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import sys
import traceback
from pathlib import Path
from typing import Any

HIDDEN = ("insightface", "onnxruntime", "cv2", "diffusers", "open_clip", "facexlib", "skimage")
HIDDEN_DISTRIBUTIONS = ("insightface", "onnxruntime", "opencv", "diffusers", "open", "facexlib", "scikit-image")


def hide_libraries() -> None:
    """From here on these libraries are not installed."""
    find_spec = importlib.machinery.PathFinder.find_spec
    distributions, version = importlib.metadata.distributions, importlib.metadata.version

    def hidden_name(name: str) -> bool:
        return name.lower().startswith(HIDDEN_DISTRIBUTIONS)

    def find(name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in HIDDEN else find_spec(name, path, target)

    def version_or_error(name: str) -> str:
        if hidden_name(name):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    importlib.machinery.PathFinder.find_spec = find  # type: ignore[method-assign, assignment]
    importlib.metadata.version = version_or_error
    importlib.metadata.distributions = lambda **options: [  # type: ignore[assignment]
        d for d in distributions(**options) if not hidden_name(d.metadata["Name"] or "")
    ]


def main() -> None:
    checkout, base, root = (Path(argument) for argument in sys.argv[1:4])
    sys.path.append(str(Path(__file__).parent))
    import comfy_host
    import cpu_torch

    cpu_torch.install()
    hide_libraries()
    host = comfy_host.import_host(checkout, comfy_host.make_base(base))
    pack = comfy_host.load_pack(host, root)
    report: dict[str, Any] = {"nodes": {}, "imported": sorted(set(HIDDEN) & set(sys.modules))}
    for node_id, node in pack.nodes.items():
        report["nodes"][node_id] = sorted(node.INPUT_TYPES().get("required", {}))
    report["doctor"] = pack.submodule("nodes.doctor").examine()
    report["errors"] = {name: _error(pack, name) for name in ("embed", "opencv", "prior", "style")}
    sys.stdout.write("\nREPORT " + json.dumps(report) + "\n")


def _error(pack: Any, what: str) -> str:
    """The message of the ValueError that using a missing library gives."""
    try:
        _use(pack, what)
    except ValueError as error:
        return str(error)
    except Exception:
        return "not a ValueError: " + traceback.format_exc()
    return "no error"


def _use(pack: Any, what: str) -> None:
    model = Path(__file__)
    if what == "embed":
        pack.submodule("faces.sessions").load_model(model)
    elif what == "opencv":
        backend = pack.submodule("faces.opencv_backend")
        backend.open_opencv_encoder(backend.OpenCvFiles(model, None), det_size=640)
    elif what == "prior":
        pack.submodule("nodes.prior").load_prior(model)
    else:
        tower = pack.submodule("attention.guidance_settings").Tower("RN101", 512)
        pack.submodule("nodes.guidance_style").load_open_clip("RN101", model, tower)


if __name__ == "__main__":
    main()

"""`python dev.py demo --comfyui PATH`: the one-person workflow through the real server, on a real face photo.

Everything happens in a temp base directory with links to the files given; the checkout is only read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from comfy_host import comfyui_version, make_base  # noqa: E402
from live_server import LiveServer, start_server  # noqa: E402
from small_models import SmallModels  # noqa: E402
from workflow_forms import Api, with_inputs  # noqa: E402

LAYOUT = "sd15_full"
SMALL_SIDE, FULL_SIDE = 192, 512
RUN_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class DemoFiles:
    """Names as the server's drop-downs show them."""

    checkpoint: str
    adapter: str
    face_pack: str
    photo: str
    side: int


def main(argv: Sequence[str]) -> int:
    """Runs the demo; returns the exit status. SystemExit explains what is missing."""
    options = parse(argv)
    checkout = find_checkout(options.comfyui)
    with tempfile.TemporaryDirectory(prefix="fusedid-demo-", ignore_cleanup_errors=True) as folder:
        base = make_base(Path(folder))
        link(find_face_models(checkout, options.face_pack_root), base / "models" / "insightface")
        say(f"Starting ComfyUI {comfyui_version(checkout)} on CPU ...")
        checkpoint, adapter, side = base_models(base, options)
        server = start_server(checkout, base, ROOT)
        try:
            files = DemoFiles(
                checkpoint=checkpoint,
                adapter=adapter,
                face_pack=choose_pack(server, options.face_pack),
                photo=server.upload_image(photo_file(options.photo, base), name="photo.png"),
                side=side,
            )
            image, report, seconds = run_one_person(server, files)
        finally:
            server.stop()
    options.out.mkdir(parents=True, exist_ok=True)
    place = options.out / "one_person.png"
    place.write_bytes(image)
    say(f"{report}\nPicture after {seconds:.0f} s: {place.resolve()}")
    if not options.checkpoint or not options.adapter:
        say("Random weights were used: the picture is noise. Give --checkpoint and --adapter for a real one.")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The demo's own command line."""
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument("--comfyui", type=Path, help="a ComfyUI checkout; only read")
    parser.add_argument("--photo", type=Path, help="a photo with a face (default: the astronaut of scikit-image)")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder for the picture (default: demo)")
    parser.add_argument("--checkpoint", type=Path, help="an SD1.5 checkpoint (default: small random weights)")
    parser.add_argument("--adapter", type=Path, help="a FusedID adapter (default: random weights)")
    parser.add_argument("--face-pack", help="name of the face pack (default: the first one found)")
    parser.add_argument("--face-pack-root", type=Path, help="folder with models/<pack>/*.onnx")
    return parser.parse_args(argv)


def find_checkout(given: Path | None) -> Path:
    """The checkout as a resolved path."""
    if given is None or not (given / "nodes.py").is_file():
        raise SystemExit(f"--comfyui is {given}; it must be a ComfyUI checkout, the folder with main.py and nodes.py")
    return given.resolve()


def find_face_models(checkout: Path, given: Path | None) -> Path:
    """A folder with face packs, or with OpenCV's YuNet as an emergency."""
    assets = Path(os.environ.get("FUSEDID_ASSETS", ROOT.parent / "shared" / "assets"))
    places = [checkout / "models" / "insightface", ROOT / "models" / "insightface", assets / "insightface"]
    for place in [given] if given else places:
        if list(place.glob("models/*/*.onnx")) or list(place.glob("models/*/*/*.onnx")) or list(place.glob("*.onnx")):
            return place.resolve()
    looked = "\n  ".join(str(place) for place in ([given] if given else places))
    raise SystemExit(
        f"no face models found in\n  {looked}\nThe demo needs a detector and a recogniser. Either put a pack such as "
        "buffalo_l (non-commercial research only) into models/insightface/models/buffalo_l, or OpenCV's YuNet and "
        "SFace (free for any use) into models/insightface, and name that insightface folder with --face-pack-root."
    )


def base_models(base: Path, options: argparse.Namespace) -> tuple[str, str, int]:
    """Names of checkpoint and adapter in the base directory, and the picture's side in pixels."""
    small = SmallModels(base / "models")
    if bool(options.checkpoint) != bool(options.adapter):
        raise SystemExit("--checkpoint and --adapter belong together: an adapter fits the base model it was made for")
    if not options.checkpoint:
        say("Making small models with random weights ...")
        return small.checkpoint(LAYOUT).name, small.adapter(LAYOUT).name, SMALL_SIDE
    for path, folder in ((options.checkpoint, "checkpoints"), (options.adapter, "fusedid")):
        if not path.is_file():
            raise SystemExit(f"there is no file {path}")
        link(path.resolve(), base / "models" / folder / path.name)
    return options.checkpoint.name, options.adapter.name, FULL_SIDE


def photo_file(given: Path | None, base: Path) -> Path:
    """The photo to use; without one NASA's portrait of Eileen Collins, public domain."""
    if given is not None:
        if not given.is_file():
            raise SystemExit(f"--photo is {given}; there is no such file")
        return given
    from PIL import Image
    from skimage.data import astronaut

    place = base / "astronaut.png"
    Image.fromarray(astronaut()).save(place)
    return place


def choose_pack(server: LiveServer, wanted: str | None) -> str:
    """The entry of LoadIdentityEncoder's drop-down that is on disk and starts with the wanted name."""
    schema = server.object_info("LoadIdentityEncoder")["input"]["required"]
    choices = next(combo_choices(value) for name, value in schema.items() if "pack" in name)
    on_disk = [
        choice for choice in choices if "(download" not in choice and (wanted is None or choice.startswith(wanted))
    ]
    if not on_disk:
        raise SystemExit(f"no face pack {wanted or ''} on disk; the server offers: {', '.join(choices)}")
    return on_disk[0]


def combo_choices(spec: Sequence[Any]) -> list[str]:
    """Entries of a drop-down in `/object_info`, in both of its spellings."""
    return list(spec[0]) if isinstance(spec[0], list) else list(spec[1]["options"])


def run_one_person(server: LiveServer, files: DemoFiles) -> tuple[bytes, str, float]:
    """Runs example_workflows/api/one_person.json on these files; returns PNG bytes, the report, seconds."""
    workflow = json.loads((ROOT / "example_workflows" / "api" / "one_person.json").read_text(encoding="utf-8"))
    started = time.monotonic()
    outputs = server.queue(filled(workflow, files), timeout=RUN_SECONDS)["outputs"]
    (image,) = next(output["images"] for key, output in outputs.items() if is_a(workflow[key], "SaveImage"))
    reports = [output["text"][0] for key, output in outputs.items() if is_a(workflow[key], "PreviewAny")]
    return server.view(image), "\n".join(reports), time.monotonic() - started


def filled(workflow: Api, files: DemoFiles) -> Api:
    """The example workflow on other files and at another size."""
    return with_inputs(
        workflow,
        {
            "CheckpointLoaderSimple": {"ckpt_name": files.checkpoint},
            "LoadImage": {"image": files.photo},
            "LoadIdentityEncoder": {"face_pack": files.face_pack},
            "FusedIDAttentionPatch": {"adapter": files.adapter},
            "EmptyLatentImage": {"width": files.side, "height": files.side},
        },
    )


def is_a(entry: dict[str, Any], class_type: str) -> bool:
    """Whether a workflow's node is of a class."""
    return entry["class_type"] == class_type


def link(source: Path, place: Path) -> None:
    """A link, or a copy where links need rights (Windows)."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copyfile(source, place)


def say(text: str) -> None:
    """One line for the person who started the demo."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

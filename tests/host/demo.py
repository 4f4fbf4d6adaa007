"""`python dev.py demo`: the shipped miniature on a real face photo; with `--comfyui PATH` through the real server.

Without ComfyUI `training/demo.py` draws the sheet. With it the template *miniature* does, or with `--checkpoint` and
`--adapter` the template *one_person* on those files. Everything happens in a temp base directory with links to the
files given; the checkout is only read.
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

import cpu_torch  # noqa: E402
from comfy_host import comfyui_version, make_base  # noqa: E402
from live_server import LiveServer, start_server  # noqa: E402
from workflow_forms import Api, with_inputs  # noqa: E402

SIDE = 512
RUN_SECONDS = 3600.0
MINIATURE_PANELS = (
    "Without identity",
    "Value strength 0.25",
    "Value strength 0.5",
    "Value strength 1",
    "A made-up person",
    "Both, routed",
)
MINIATURE, MINIATURE_ADAPTER = "fusedid_mini.safetensors", "fusedid_mini_fused.safetensors"


@dataclass(frozen=True, kw_only=True)
class DemoFiles:
    """Names as the server's drop-downs show them."""

    checkpoint: str
    adapter: str
    face_pack: str
    photo: str

    @property
    def workflow(self) -> str:
        """The template that shows these files."""
        return "miniature" if self.checkpoint == MINIATURE else "one_person"


def main(argv: Sequence[str]) -> int:
    """Runs the demo; returns the exit status. SystemExit explains what is missing."""
    options = parse(argv)
    cpu_torch.install()  # the development environment may hold a torchvision that does not load
    if options.comfyui is None:
        return without_comfyui(options)
    if options.made_up is not None:
        raise SystemExit("--made-up is for the demo without --comfyui; give a --photo")
    checkout = find_checkout(options.comfyui)
    with tempfile.TemporaryDirectory(prefix="fusedid-demo-", ignore_cleanup_errors=True) as folder:
        base = make_base(Path(folder))
        faces = find_face_models(checkout, options.face_pack_root)
        link(faces, base / "models" / "insightface")
        checkpoint, adapter = base_models(base, options)
        say(f"Starting ComfyUI {comfyui_version(checkout)} on CPU ...")
        server = start_server(checkout, base, ROOT)
        try:
            files = DemoFiles(
                checkpoint=checkpoint,
                adapter=adapter,
                face_pack=choose_pack(server, options.face_pack),
                photo=server.upload_image(photo_file(options.photo, base), name="photo.png"),
            )
            started = time.monotonic()
            images, report = run_workflow(server, files)
            seconds = time.monotonic() - started
        finally:
            server.stop()
    options.out.mkdir(parents=True, exist_ok=True)
    place = options.out / f"{files.workflow}_comfyui.png"
    if files.workflow == "miniature":
        save_sheet(images, options, faces, place)
    else:
        place.write_bytes(images["Save Image"])
    say(f"{report}\nPicture after {seconds:.0f} s: {place.resolve()}")
    return 0


def without_comfyui(options: argparse.Namespace) -> int:
    """The sheet by diffusers alone."""
    from training.demo import main as draw

    if options.checkpoint or options.adapter:
        raise SystemExit("--checkpoint and --adapter belong to --comfyui PATH; python -m training.sample takes others")
    words = ["--out", str(options.out)]
    words += ["--photo", str(options.photo)] if options.photo else []
    words += [] if options.made_up is None else ["--made-up", str(options.made_up)]
    words += ["--face-pack", options.face_pack] if options.face_pack else []
    roots = [options.face_pack_root] if options.face_pack_root else with_face_models(places_of_faces(None))
    return draw([*words, *(word for root in roots for word in ("--face-pack-root", str(root)))])


def save_sheet(images: dict[str, bytes], options: argparse.Namespace, faces: Path, place: Path) -> None:
    """The miniature's pictures on one sheet, as the demo without ComfyUI arranges them, with scores."""
    import io

    import numpy as np
    from PIL import Image

    from training.demo import Panel, astronaut, found_face, open_scorer, scored, sheet
    from training.people import read_picture

    encoder = open_scorer(argparse.Namespace(face_pack=options.face_pack, face_pack_root=[faces]))
    face = found_face(astronaut() if options.photo is None else read_picture(options.photo), encoder)
    panels = [Panel(face, "reference")]
    for title in MINIATURE_PANELS:
        picture = np.asarray(Image.open(io.BytesIO(images[title])).convert("RGB"))
        shown = picture[:, : picture.shape[0]]  # of the routed one the photo's person, on the left
        label = title if title == "A made-up person" else scored(title, face, shown, encoder)
        panels.append(Panel(picture, label))
    sheet(panels).save(place)
    say("\n".join(f"  {panel.label}" for panel in panels))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The demo's own command line."""
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument("--comfyui", type=Path, help="a ComfyUI checkout; only read (default: without ComfyUI)")
    parser.add_argument("--photo", type=Path, help="a photo with a face (default: the astronaut of scikit-image)")
    parser.add_argument("--made-up", type=int, metavar="SEED", help="instead a person that the miniature makes up")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder for the picture (default: demo)")
    parser.add_argument("--checkpoint", type=Path, help="an SD1.5 checkpoint, with --comfyui (default: the miniature)")
    parser.add_argument("--adapter", type=Path, help="a FusedID adapter for it (default: the miniature's)")
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
    places = [given] if given else places_of_faces(checkout)
    if found := with_face_models(places):
        return found[0].resolve()
    looked = "\n  ".join(str(place) for place in places)
    raise SystemExit(
        f"no face models found in\n  {looked}\nThe demo needs a detector and a recogniser. Either put a pack such as "
        "buffalo_l (non-commercial research only) into models/insightface/models/buffalo_l, or OpenCV's YuNet and "
        "SFace (free for any use) into models/insightface, and name that insightface folder with --face-pack-root."
    )


def places_of_faces(checkout: Path | None) -> list[Path]:
    """Where face packs are looked for: ComfyUI's models, this folder's, the development files."""
    assets = Path(os.environ.get("FUSEDID_ASSETS", ROOT.parent / "shared" / "assets"))
    own = [ROOT / "models" / "insightface", assets / "insightface"]
    return own if checkout is None else [checkout / "models" / "insightface", *own]


def with_face_models(places: Sequence[Path]) -> list[Path]:
    """Those of the places that hold a face pack."""
    patterns = ("models/*/*.onnx", "models/*/*/*.onnx", "*.onnx")
    return [place for place in places if any(list(place.glob(pattern)) for pattern in patterns)]


def base_models(base: Path, options: argparse.Namespace) -> tuple[str, str]:
    """Names of checkpoint and adapter in the base directory."""
    if bool(options.checkpoint) != bool(options.adapter):
        raise SystemExit("--checkpoint and --adapter belong together: an adapter fits the base model it was made for")
    if not options.checkpoint:
        from training.miniature import unpack

        unpack(base / "models")
        return MINIATURE, MINIATURE_ADAPTER
    for path, folder in ((options.checkpoint, "checkpoints"), (options.adapter, "fusedid")):
        if not path.is_file():
            raise SystemExit(f"there is no file {path}")
        link(path.resolve(), base / "models" / folder / path.name)
    return options.checkpoint.name, options.adapter.name


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


def run_workflow(server: LiveServer, files: DemoFiles) -> tuple[dict[str, bytes], str]:
    """Runs the template on these files; returns the saved PNGs by their node's title, and the report."""
    place = ROOT / "example_workflows" / "api" / f"{files.workflow}.json"
    workflow = filled(json.loads(place.read_text(encoding="utf-8")), files)
    outputs = server.queue(workflow, timeout=RUN_SECONDS)["outputs"]
    images, reports = {}, []
    for key, output in outputs.items():
        title = workflow[key].get("_meta", {}).get("title", "Save Image")
        if is_a(workflow[key], "SaveImage"):
            (image,) = output["images"]
            images[title] = server.view(image)
        elif is_a(workflow[key], "PreviewAny"):
            reports += output["text"]
    return images, "\n".join(reports)


def filled(workflow: Api, files: DemoFiles) -> Api:
    """The template on other files, and one_person at the size of the checkpoint."""
    inputs: dict[str, dict[str, Any]] = {
        "CheckpointLoaderSimple": {"ckpt_name": files.checkpoint},
        "LoadImage": {"image": files.photo},
        "LoadIdentityEncoder": {"face_pack": files.face_pack},
        "FusedIDAttentionPatch": {"adapter": files.adapter},
    }
    if files.workflow == "one_person":
        inputs["EmptyLatentImage"] = {"width": SIDE, "height": SIDE}
    return with_inputs(workflow, inputs)


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

"""`python dev.py pictures --comfyui PATH [NAME ...]`: thumbnails, pictures of the help pages, the README's picture.

The real frontend draws everything; nothing is painted afterwards. The only photo shown is NASA's public-domain portrait
of Eileen Collins; face models come from the folder that FUSEDID_ASSETS names. Names: examples, nodes, or `readme`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "host"), str(Path(__file__).parent)]

from comfy_host import make_base  # noqa: E402
from frontend import NODE, Frontend, chromium_path, open_browser, ready_for_browsers  # noqa: E402
from live_server import LiveServer, start_server  # noqa: E402
from locale_words import own_schemas  # noqa: E402
from readme_picture import draw_readme  # noqa: E402
from stand_ins import put_face_pack  # noqa: E402
from workflow_forms import ui_from_api  # noqa: E402

EXAMPLES, HELP = ROOT / "example_workflows", ROOT / "web" / "docs" / "images"
README_PICTURE = ROOT / "docs" / "pictures" / "identity.jpg"
VIEW = {"width": 1500, "height": 1000}
THUMBNAIL_WIDTH, NODE_SCALE, MARGIN = 640, 1.6, 24
QUALITY = 82
SIDE_BAR, MENU = 66, 78  # pixels that the frontend takes at the left and at the top
FLATTEST = 0.8  # height to width of a thumbnail
PHOTOS = ("person", "person_a", "person_b", "person_c", "style", "scene", "person_1", "person_2", "person_3")
SHOWN_IN_USE = ("FaceEmbed", "MultiIDMaskRouter", "FusedIDFaceSimilarity")


def main(argv: Sequence[str]) -> int:
    """Writes every picture; SystemExit when there is no browser or no folder of faces."""
    parser = argparse.ArgumentParser(prog="dev.py pictures", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout; only read")
    parser.add_argument("names", nargs="*", help="examples, node ids or `readme` (default: everything)")
    options = parser.parse_args(argv)
    program = chromium_path() or sys.exit("no Chromium found; set FUSEDID_CHROMIUM to its program")
    assets = Path(os.environ.get("FUSEDID_ASSETS", ROOT.parent / "shared" / "assets"))
    if not assets.is_dir():
        sys.exit(f"no folder {assets}; set FUSEDID_ASSETS to the synthetic faces of the tests")
    with tempfile.TemporaryDirectory(prefix="fusedid-pictures-", ignore_cleanup_errors=True) as folder:
        server = start_server(options.comfyui.resolve(), make_base(Path(folder)), ROOT)
        try:
            draw_all(server, assets, program, options.names)
        finally:
            server.stop()
    return 0


def draw_all(server: LiveServer, assets: Path, program: str, names: Sequence[str]) -> None:
    """Thumbnails, help pictures and the README's; those of these names when there are any."""
    put_photos(server)
    ready_for_browsers(server)
    ours = list(own_schemas(server.object_info()))

    def wanted(name: str) -> bool:
        return not names or name in names

    HELP.mkdir(parents=True, exist_ok=True)
    with open_browser(program) as browser:
        page = browser.new_context(viewport=VIEW, locale="en-US", device_scale_factor=NODE_SCALE).new_page()
        frontend = Frontend(page, f"http://127.0.0.1:{server.port}/")
        frontend.open()
        frontend.hide_minimap()
        for path in filter(lambda path: wanted(path.stem), sorted(EXAMPLES.glob("*.json"))):
            frontend.load(json.loads(path.read_text(encoding="utf-8")))
            frontend.fit_to([*ours, "LoadImage"])
            box = squarer(frontend.graph_box(MARGIN, [*ours, "LoadImage"]))
            save(frontend, box, path.with_suffix(".jpg"), width=THUMBNAIL_WIDTH)
        for name in filter(wanted, ours):
            if name not in SHOWN_IN_USE:
                frontend.start_with(name)
                save(frontend, frontend.graph_box(MARGIN), HELP / f"{name}.jpg")
        used = graphs_in_use(server, assets)
        for name, graph in ((name, used[name]) for name in filter(wanted, used)):
            frontend.load(ui_from_api(graph, server.object_info()))
            frontend.run()
            frontend.wait_for(f"{NODE % 'PreviewImage'}.imgs?.[0]?.naturalWidth")
            save(frontend, frontend.graph_box(MARGIN), HELP / f"{name}.jpg", width=int(THUMBNAIL_WIDTH * NODE_SCALE))
        if wanted("readme"):
            draw_readme(server, frontend, put_face_pack(server, assets), EXAMPLES, README_PICTURE)


def put_photos(server: LiveServer) -> None:
    """The public-domain portrait under the names that the examples use, and beside its mirror image as two people."""
    from PIL import ImageOps
    from skimage.data import astronaut

    photo = Image.fromarray(astronaut())
    for name in PHOTOS:
        photo.save(server.base / "input" / f"{name}.png")
    pair = Image.new("RGB", (2 * photo.width, photo.height))
    pair.paste(photo)
    pair.paste(ImageOps.mirror(photo), (photo.width, 0))
    pair.save(server.base / "input" / "two_people.png")


def graphs_in_use(server: LiveServer, assets: Path) -> dict[str, Any]:
    """Small graphs whose previews show what a node is for, in API form."""
    start = {
        "1": {"class_type": "LoadIdentityEncoder", "inputs": {"face_pack": put_face_pack(server, assets)}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "two_people.png"}},
    }

    def face(number: int) -> dict[str, Any]:
        inputs = {"encoder": ["1", 0], "image": ["2", 0], "face": "left to right", "number": number}
        return {"class_type": "FaceEmbed", "inputs": inputs}

    def person(identity: str, **more: Any) -> dict[str, Any]:
        return {"class_type": "MultiIDMaskRouter", "inputs": {"identity": [identity, 0], **more}}

    def preview(source: str, output: int = 1) -> dict[str, Any]:
        return {"class_type": "PreviewImage", "inputs": {"images": [source, output]}}

    compared = {"encoder": ["1", 0], "image": ["2", 0], "identity_1": ["3", 0], "identity_2": ["4", 0]}
    judge = {"class_type": "FusedIDFaceSimilarity", "inputs": compared}

    last = person("4", routed=["5", 0], content=["2", 0], encoder=["1", 0])
    return {
        "FaceEmbed": start | {"3": face(1), "4": preview("3")},
        "MultiIDMaskRouter": start | {"3": face(1), "4": face(2), "5": person("3"), "6": last, "7": preview("6")},
        "FusedIDFaceSimilarity": start | {"3": face(1), "4": face(2), "5": judge, "6": preview("5", 5)},
    }


def squarer(box: dict[str, float]) -> dict[str, float]:
    """A box grown towards the square in which the template browser shows it, inside the canvas."""
    left, top = SIDE_BAR, MENU
    width = min(max(box["width"], box["height"]), VIEW["width"] - left)
    height = min(max(box["width"] * FLATTEST, box["height"]), VIEW["height"] - top)
    x = min(max(left, box["x"] + (box["width"] - width) / 2), VIEW["width"] - width)
    y = min(max(top, box["y"] + (box["height"] - height) / 2), VIEW["height"] - height)
    return {"x": x, "y": y, "width": width, "height": height}


def save(frontend: Frontend, box: dict[str, float], place: Path, *, width: int | None = None) -> None:
    """A part of the page as JPEG, scaled down to a width when it is wider."""
    frontend.page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(frontend.page.screenshot(clip=box))).convert("RGB")
    if width and picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    picture.save(place, quality=QUALITY, optimize=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

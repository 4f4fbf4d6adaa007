"""The picture at the top of the README: two previews from the real server beside a graph in the real frontend.

The person is Eileen Collins, as photographed by NASA (public domain) and handed out by scikit-image. Nobody is
generated: without public weights there is no honest likeness to show.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from frontend import Frontend
from live_server import LiveServer
from PIL import Image

WIDTH, GAP, PREVIEWS = 1200, 12, 0.3
GROUND = (24, 24, 24)
QUALITY = 80
PHOTO = "astronaut.png"
EXAMPLE = "one_person"
SHOWN = ["LoadImage", "LoadIdentityEncoder", "FaceEmbed", "FusedIDAttentionPatch"]


def draw_readme(server: LiveServer, frontend: Frontend, face_pack: str, examples: Path, place: Path) -> None:
    """Writes the picture as JPEG: previews in a column on the left, the graph on the right."""
    from skimage.data import astronaut

    Image.fromarray(astronaut()).save(server.base / "input" / PHOTO)
    side = round(WIDTH * PREVIEWS)
    previews = [one.resize((side, side), Image.Resampling.LANCZOS) for one in previews_of(server, face_pack)]
    graph = graph_picture(frontend, json.loads((examples / f"{EXAMPLE}.json").read_text(encoding="utf-8")))
    width, height = WIDTH - side - GAP, 2 * side + GAP
    scale = min(width / graph.width, height / graph.height)
    graph = graph.resize((round(graph.width * scale), round(graph.height * scale)), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (WIDTH, height), GROUND)
    for row, preview in enumerate(previews):
        sheet.paste(preview, (0, row * (side + GAP)))
    sheet.paste(graph, (side + GAP + (width - graph.width) // 2, (height - graph.height) // 2))
    place.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(place, quality=QUALITY, optimize=True)


def previews_of(server: LiveServer, face_pack: str) -> list[Image.Image]:
    """FaceEmbed's numbered preview and the router's coloured one."""
    graph: dict[str, Any] = {
        "1": {"class_type": "LoadIdentityEncoder", "inputs": {"face_pack": face_pack}},
        "2": {"class_type": "LoadImage", "inputs": {"image": PHOTO}},
        "3": {"class_type": "FaceEmbed", "inputs": {"encoder": ["1", 0], "image": ["2", 0]}},
        "4": {"class_type": "MultiIDMaskRouter", "inputs": {"identity": ["3", 0], "content": ["2", 0]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["3", 1]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["4", 1]}},
    }
    graph["4"]["inputs"]["encoder"] = ["1", 0]
    outputs = server.queue(graph_with_defaults(server, graph))["outputs"]
    images = [outputs[key]["images"][0] for key in ("5", "6")]
    return [Image.open(io.BytesIO(server.view(image))).convert("RGB") for image in images]


def graph_with_defaults(server: LiveServer, graph: dict[str, Any]) -> dict[str, Any]:
    """The graph with every widget at its default where it says nothing."""
    from workflow_forms import completed

    return completed(graph, server.object_info())


def graph_picture(frontend: Frontend, workflow: dict[str, Any]) -> Image.Image:
    """The identity part of the example as the frontend draws it, with the astronaut as its photo."""
    for node in workflow["nodes"]:
        if node["type"] == "LoadImage":
            node["widgets_values"][0] = PHOTO
    frontend.load(workflow)
    frontend.fit_to(SHOWN)
    frontend.page.wait_for_timeout(1500)  # the photo is fetched
    box = frontend.graph_box(20, SHOWN)
    return Image.open(io.BytesIO(frontend.page.screenshot(clip=box))).convert("RGB")

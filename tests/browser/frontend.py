"""The real frontend in a headless Chromium: open, look, drag wires, queue; no node is drawn by anything else."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACK = "ComfyUI-FusedID"
SCREENSHOTS = Path(__file__).with_name("screenshots")
VIEW = {"width": 1600, "height": 1000}
LOAD_MS, RUN_MS = 300_000, 600_000
"""When to give up. Much more than it takes: a busy machine must not look like a broken frontend."""
MOST_DIALOGS = 5
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOADED_WIDTH = """image => new Promise(done => {
    const look = left => image.naturalWidth || !left ? done(image.naturalWidth) : setTimeout(() => look(left - 1), 100)
    look(600)
})"""
NODE = "(app.graph._nodes.find(node => node.type === %r))"


def chromium_path() -> str | None:
    """FUSEDID_CHROMIUM, else a Chromium on the PATH; None when there is none."""
    return os.environ.get("FUSEDID_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


@dataclass(frozen=True)
class Frontend:
    """One browser page on a running server. Nodes are named by their type: the tests have one of each."""

    page: Any
    url: str

    def open(self, *, wanted: str = "FaceEmbed") -> None:
        """Loads the frontend and waits until it knows a node of the pack."""
        self.page.goto(self.url)
        known = f"() => !!(window.app?.graph && window.LiteGraph?.registered_node_types?.[{wanted!r}])"
        self.page.wait_for_function(known, timeout=LOAD_MS)
        self.page.wait_for_function("() => app.graph._nodes.length > 0", timeout=LOAD_MS)  # the start workflow

    def tidy(self) -> None:
        """Closes dialogs and both side bars, and empties the canvas."""
        for _ in range(MOST_DIALOGS):
            if not self.page.locator(".p-dialog").count():
                break
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(400)
        if self.page.locator("[data-testid=properties-panel]").count():
            self.page.get_by_role("button", name="Toggle properties panel").click()
        self.page.evaluate(
            """() => {
                app.clean()
                app.graph.clear()
                app.canvas.ds.reset()
                const bar = app.extensionManager.sidebarTab
                if (bar.activeSidebarTabId) bar.toggleSidebarTab(bar.activeSidebarTabId)
            }"""
        )

    def refresh_lists(self) -> None:
        """Reads the lists of files anew, as the key R does."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")

    @property
    def folds(self) -> bool:
        """Whether this frontend's Nodes 2.0 know advanced inputs (they came with this setting)."""
        return self._setting("Comfy.Node.AlwaysShowAdvancedWidgets") is not None

    def draw_by(self, renderer: str) -> None:
        """Chooses what draws nodes, `classic` or `nodes 2.0`; an empty canvas afterwards."""
        wanted = renderer == "nodes 2.0"
        if self._setting("Comfy.VueNodes.Enabled") == wanted:
            return
        self.page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", wanted)
        self.page.wait_for_timeout(1500)  # nodes are mounted or dropped
        self.tidy()

    def _setting(self, name: str) -> Any:
        return self.page.evaluate("name => app.extensionManager.setting.get(name)", name)

    def load(self, workflow: dict[str, Any]) -> None:
        """Opens a workflow in UI form, as dropping its file does, and shows all of it."""
        self.page.evaluate("workflow => app.loadGraphData(workflow, true, true)", workflow)
        self.fit()

    def fit(self) -> None:
        """Zooms so that the whole graph is seen."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(700)  # FitView moves smoothly

    def open_templates(self) -> None:
        """Opens the template browser at this pack's templates."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_text(PACK, exact=True).first.click(timeout=LOAD_MS)
        self.page.locator("[data-testid^=template-workflow-]").first.wait_for(timeout=LOAD_MS)

    def shown_templates(self, least: int) -> dict[str, bool]:
        """Template cards by name, and whether their thumbnail was loaded; scrolls until there are so many."""
        cards = self.page.locator("[data-testid^=template-workflow-]")
        give_up = time.monotonic() + LOAD_MS / 1000
        while cards.count() < least and time.monotonic() < give_up:  # more cards appear near the end
            cards.last.scroll_into_view_if_needed()
            self.page.wait_for_timeout(500)
        shown = {}
        for card in cards.all():
            card.scroll_into_view_if_needed()
            width = card.locator("img").first.evaluate(LOADED_WIDTH)
            shown[card.get_attribute("data-testid").removeprefix("template-workflow-")] = width > 0
        return shown

    def open_template(self, name: str) -> None:
        """Clicks a template's card and waits for its graph."""
        self.page.locator(f"[data-testid='template-workflow-{name}']").click()
        self.page.wait_for_function(
            "() => app.graph._nodes.some(node => node.type === 'MarkdownNote')", timeout=LOAD_MS
        )
        self.fit()

    def hide_minimap(self) -> None:
        """Leaves nothing over the graph but the side bar and the menus, and draws text at every zoom."""
        self.page.evaluate(
            """() => {
                const setting = app.extensionManager.setting
                setting.set('Comfy.Minimap.Visible', false)
                setting.set('Comfy.Graph.CanvasInfo', false)
                setting.set('Comfy.Graph.CanvasMenu', false)
                app.canvas.min_font_size_for_lod = 0
            }"""
        )

    def fit_to(self, nodes: Sequence[str]) -> None:
        """Zooms so that the nodes of these types are seen."""
        self.page.evaluate(
            """types => {
                app.canvas.deselectAll()
                app.canvas.selectNodes(app.graph._nodes.filter(node => types.includes(node.type)))
            }""",
            list(nodes),
        )
        self.fit()
        self.page.evaluate("() => app.canvas.deselectAll()")

    def graph_box(self, margin: int, nodes: Sequence[str] = ()) -> dict[str, float]:
        """The part of the page that the nodes (of these types) take, for `page.screenshot(clip=...)`."""
        return self.page.evaluate(
            """([margin, types]) => {
                const nodes = app.graph._nodes.filter(node => !types.length || types.includes(node.type))
                const boxes = nodes.map(node => node.boundingRect ?? node.getBounding())
                const ends = (low, high) => [
                    Math.min(...boxes.map(box => box[low])), Math.max(...boxes.map(box => box[low] + box[high]))]
                const { scale, offset } = app.canvas.ds, page = app.canvas.canvas.getBoundingClientRect()
                const [[x0, x1], [y0, y1]] = [ends(0, 2), ends(1, 3)]
                const left = Math.max(0, (x0 + offset[0]) * scale + page.left - margin)
                const top = Math.max(0, (y0 + offset[1]) * scale + page.top - margin)
                return {
                    x: left, y: top,
                    width: Math.min(page.right, (x1 + offset[0]) * scale + page.left + margin) - left,
                    height: Math.min(page.bottom, (y1 + offset[1]) * scale + page.top + margin) - top,
                }
            }""",
            [margin, list(nodes)],
        )

    def nodes(self) -> list[dict[str, Any]]:
        """Per node: type, id, whether the frontend knows it, its errors."""
        return self.page.evaluate(
            """() => app.graph._nodes.map(node => ({
                id: node.id, type: node.type, title: node.title, known: !!LiteGraph.registered_node_types[node.type],
                broken: !!node.has_errors, errors: app.lastNodeErrors?.[node.id]?.errors ?? [],
            }))"""
        )

    def value(self, node: str, expression: str) -> Any:
        """A property of a node: `frontend.value("SaveImage", "imgs?.length")`."""
        return self.page.evaluate(f"() => {NODE % node}.{expression}")

    def set_widgets(self, changes: dict[str, dict[str, Any]]) -> None:
        """Sets widgets in every node of a type and tells the frontend, as the mouse does: `{"KSampler": {"steps": 2}}`.

        Without the telling, the frontend would keep the errors of the values before.
        """
        self.page.evaluate(
            """changes => app.graph._nodes.forEach(node => Object.entries(changes[node.type] ?? {}).forEach(
                ([name, value]) => {
                    const widget = node.widgets.find(widget => widget.name === name)
                    if (!widget) throw Error(`${node.title} has no widget ${name}: ${node.widgets.map(w => w.name)}`)
                    const before = widget.value
                    widget.value = value
                    widget.callback?.(value, app.canvas, node, app.canvas.graph_mouse)
                    node.onWidgetChanged?.(name, value, before, widget)
                }))""",
            changes,
        )

    def drawn_widgets(self, node: str) -> list[str]:
        """Names of a node's widgets that the classic canvas has drawn below each other, inside the node's box."""
        return self.page.evaluate(
            f"""() => {{
                const node = {NODE % node}
                let end = 0
                return node.widgets.filter(widget => {{
                    const top = widget.last_y ?? widget.y
                    if (!node.isWidgetVisible(widget) || top < end) return false
                    end = top + 20
                    return end <= node.size[1]
                }}).map(widget => widget.name)
            }}"""
        )

    def shown_labels(self) -> list[str]:
        """Labels of the widgets that Nodes 2.0 show, from top to bottom."""
        labels = self.page.locator("[data-node-id] [data-testid=widget-layout-field-label]")
        return [label.inner_text().strip() for label in labels.all() if label.is_visible()]

    def press(self, words: str) -> None:
        """Clicks a button by its words and waits for what it does."""
        self.page.get_by_text(words, exact=True).click()
        self.page.wait_for_timeout(700)

    def covered_nodes(self) -> list[tuple[str, str]]:
        """Titles of nodes that lie over each other, titles and bodies."""
        pairs = self.page.evaluate(
            """() => app.graph._nodes.flatMap((node, i) => app.graph._nodes.slice(i + 1).filter(other => {
                const [[ax, ay, aw, ah], [bx, by, bw, bh]] = [node, other].map(one => one.boundingRect)
                return ax < bx + bw && bx < ax + aw && ay < by + bh && by < ay + ah
            }).map(other => [node.title, other.title]))"""
        )
        return [tuple(pair) for pair in pairs]

    def queued_inputs(self, node: str) -> dict[str, Any]:
        """A node's inputs in the prompt that Run would send."""
        return self.page.evaluate(
            "async type => Object.values((await app.graphToPrompt()).output).find(n => n.class_type === type).inputs",
            node,
        )

    def told_error(self, words: str) -> str:
        """The text on the page that says these words about an error: in a dialog, or behind a notice's button."""
        details = self.page.get_by_role("button", name="View details")
        details.or_(self.page.locator(".p-dialog")).first.wait_for()
        if details.count():
            details.click()
        said = self.page.get_by_text(words).first
        said.wait_for()  # a report is there later than its stack trace
        return said.inner_text()

    def start_with(self, *nodes: str) -> None:
        """An empty canvas with new nodes side by side."""
        self.page.evaluate(
            """types => {
                app.graph.clear()
                app.canvas.ds.reset()
                types.forEach((type, i) => {
                    const node = LiteGraph.createNode(type)
                    node.pos = [400 + 450 * i, 150]
                    app.graph.add(node)
                })
            }""",
            nodes,
        )
        self.page.wait_for_timeout(300)

    def connect(self, source: tuple[str, int], target: tuple[str, str]) -> None:
        """Wires output (node, number) to input (node, name) without the mouse."""
        slot = f"{NODE % target[0]}.findInputSlot({target[1]!r})"
        self.page.evaluate(f"() => {NODE % source[0]}.connect({source[1]}, {NODE % target[0]}, {slot})")

    def add(self, node: str, x: int, y: int) -> None:
        """Puts a new node beside what is there."""
        self.page.evaluate(
            """([type, pos]) => {
                const node = LiteGraph.createNode(type)
                node.pos = pos
                app.graph.add(node)
            }""",
            [node, [x, y]],
        )

    def drag_wire(self, source: tuple[str, int], target: tuple[str, str]) -> None:
        """Drags with the mouse from output (node, number) to input (node, name)."""
        start = self._place(source[0], f"getConnectionPos(false, {source[1]})")
        slot = f"{NODE % target[0]}.findInputSlot({target[1]!r})"
        end = self._place(target[0], f"getConnectionPos(true, {slot})")
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down()
        mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=5)
        mouse.move(*end, steps=10)
        self.page.wait_for_timeout(100)
        mouse.up()
        self.page.wait_for_timeout(200)

    def wired(self, node: str, name: str) -> bool:
        """Whether an input of a node has a wire."""
        return self.value(node, f"inputs.find(input => input.name === {name!r}).link") is not None

    def select(self, node: str) -> None:
        """Clicks a node's title."""
        x, y = self._place(node, "pos")
        self.page.mouse.click(x + 60, y - 10)
        self.page.wait_for_timeout(300)

    def run(self) -> None:
        """Presses Run."""
        self.page.locator("[data-testid=queue-button]").first.click()

    def wait_for(self, condition: str) -> None:
        """Waits until a JavaScript expression holds."""
        self.page.wait_for_function(f"() => !!({condition})", timeout=RUN_MS)

    def picture_size(self, node: str) -> list[int]:
        """[width, height] of the first picture shown on a node, once it is there."""
        self.wait_for(f"{NODE % node}.imgs?.[0]?.naturalWidth")
        return self.value(node, "imgs.map(image => [image.naturalWidth, image.naturalHeight])[0]")

    def screenshot(self, name: str) -> Path:
        """Keeps what is seen, for people to look at."""
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def _place(self, node: str, expression: str) -> tuple[float, float]:
        """A point of the graph in pixels of the page."""
        x, y = self.page.evaluate(
            f"""() => {{
                const [x, y] = {NODE % node}.{expression}
                const {{ scale, offset }} = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect()
                return [(x + offset[0]) * scale + box.left, (y + offset[1]) * scale + box.top]
            }}"""
        )
        return x, y


def ready_for_browsers(server: Any) -> None:
    """A server whose frontend does not begin with the template browser, as it does for new users."""
    server.post_json("/settings", {"Comfy.TutorialCompleted": True})


@contextmanager
def open_browser(executable: str) -> Iterator[Any]:
    """A headless Chromium that ends with the block.

    Playwright keeps an event loop running in this thread meanwhile: nothing inside may call asyncio.run.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()

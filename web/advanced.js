// Folds the inputs that the pack marks as advanced, for frontends that pass the mark on without reading it (seen up to
// 1.35; 1.58 does it by itself). "Show Advanced" in the node's context menu unfolds them; a workflow that uses one of
// them opens unfolded.
import { app } from "../../scripts/app.js"

const NATIVE_SETTING = "Comfy.Node.AlwaysShowAdvancedWidgets"
const NO_ROOM = () => [0, -4] // widgets are 4 px apart

const isOurs = (node) => node.constructor.nodeData?.python_module?.endsWith("ComfyUI-FusedID") ?? false
const isNative = () => app.extensionManager.setting.get(NATIVE_SETTING) !== undefined

function fold(node, widgets, shown) {
  for (const widget of widgets) {
    widget.hidden = !shown
    if (shown) delete widget.computeSize
    else widget.computeSize = NO_ROOM
  }
  const [width, height] = node.computeSize()
  node.setSize([Math.max(width, node.size[0]), height])
}

app.registerExtension({
  name: "FusedID.AdvancedInputs",
  nodeCreated(node) {
    const widgets = node.widgets?.filter((widget) => widget.options?.advanced) ?? []
    if (!isOurs(node) || !widgets.length || isNative()) return
    let shown = false
    for (const widget of widgets) widget.advanced = true // makes the context menu offer "Show Advanced"
    // The menu entry and loading a workflow both set this property.
    Object.defineProperty(node, "showAdvanced", {
      get: () => shown,
      set: (value) => {
        shown = Boolean(value)
        fold(node, widgets, shown)
      },
    })
    fold(node, widgets, shown)
    node.fusedidAdvanced = widgets.map((widget) => [widget, widget.value])
  },
  loadedGraphNode(node) {
    if (node.fusedidAdvanced?.some(([widget, initial]) => widget.value !== initial)) node.showAdvanced = true
  },
})

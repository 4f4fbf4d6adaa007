"""FusedID: identity-preserving image synthesis for ComfyUI.

Nothing is imported at module level: pytest imports this file as a plain module, and ComfyUI imports it under a
name made from its full path. Only the entry point knows the nodes.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Returns the ComfyExtension that lists the pack's nodes (called once by ComfyUI's loader)."""
    import logging

    try:
        from .nodes import FusedIDExtension
    except Exception:
        # The loader shows only str(error) of a failing entry point; the traceback is what a bug report needs.
        logging.exception("FusedID could not be loaded")
        raise
    return FusedIDExtension()

"""Pure tensor mathematics of FusedID: no ComfyUI, no diffusers, no face library."""

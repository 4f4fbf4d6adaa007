"""From a folder of photos to the file the node loads. Standalone: imports attention and faces, never ComfyUI."""

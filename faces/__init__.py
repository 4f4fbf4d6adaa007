"""Faces: find, align, embed, select and mix. Knows nothing of ComfyUI; images are ``uint8 [H, W, 3]`` RGB arrays."""

"""All that the pack knows of ComfyUI's insides. No node is defined here, and nothing here knows of one."""

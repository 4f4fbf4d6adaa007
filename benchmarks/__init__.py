"""What FusedID costs, measured inside the real ComfyUI with random weights: `python -m benchmarks.overhead`."""

"""CLIP score: how well a picture says its prompt (Hessel et al. 2021, without their factor 2.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from faces.sessions import file_sha256


class ClipScorer:
    """A whole CLIP model (vision and text) from a transformers folder; nothing is downloaded.

    Raises ValueError when the folder is missing or holds something else.
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        path = Path(folder).expanduser()
        try:
            self.model: Any = CLIPModel.from_pretrained(path, local_files_only=True).eval().to(device)
            self.processor: Any = CLIPProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"scorer.clip: {folder} is no transformers CLIP folder with model and preprocessor ({error}); give a "
                "checkout of, for example, openai/clip-vit-large-patch14"
            ) from error
        self.name = path.name
        self.files = {file.name: file_sha256(file) for file in sorted(path.glob("*.safetensors"))}

    @torch.no_grad()
    def __call__(self, picture: np.ndarray, prompt: str) -> float:
        """100 * max(cosine, 0) between uint8 `[H, W, 3]` and a text, which is cut to CLIP's length."""
        given = self.processor(
            text=[prompt], images=Image.fromarray(picture), return_tensors="pt", padding=True, truncation=True
        ).to(self.model.device)
        out = self.model(**given)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return 100.0 * max(float(cosine), 0.0)

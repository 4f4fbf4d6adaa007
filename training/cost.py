"""`python -m training.cost`: what training and inference cost, by calculation on tensors that hold no numbers.

Every figure comes from running the real code of `unet.py` on fake tensors: operations are counted, and the memory that
the backward pass keeps is summed. No GPU, no weights. Kernels' temporary buffers and fragmentation are not in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from attention.adapter import AdapterSettings
from attention.fusion import FaceKeys
from attention.grid import LATENT_SCALE

from .unet import FusedUNet, Reference, TextContext

MIB, GIB = 2**20, 2**30
SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
LAYOUTS: dict[str, dict[str, Any]] = {"sd15": SD15, "sdxl": SDXL}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_G: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
TEXT_ENCODERS = {"sd15": (CLIP_L,), "sdxl": (CLIP_L, CLIP_G)}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One row. Operations in GFLOP (2 per multiply-add) per sample; memory at batch 1, bf16 frozen weights."""

    family: str
    resolution: int
    reference: int
    forward: float
    """UNet forward without faces."""
    fused: float
    """What one reference adds to a forward, once its keys are known."""
    projection: float
    """K_f and V_f of one reference, after its pass."""
    step: float
    """A training step: reference pass, forward, backward."""
    trained: int
    cache_mib: float
    """K_f and V_f of one reference in fp16: what a node keeps."""
    weights_gib: float
    """Frozen UNet in bf16; trained weights, gradients, Adam and averaged weights in fp32."""
    activations_gib: float
    activations_checkpointed_gib: float

    @property
    def total_gib(self) -> float:
        """Without checkpointing."""
        return self.weights_gib + self.activations_gib

    @property
    def total_checkpointed_gib(self) -> float:
        """With checkpointing."""
        return self.weights_gib + self.activations_checkpointed_gib


def cost(family: str, resolution: int, reference: int | None = None) -> Cost:
    """Runs one training step on fake tensors. `reference`: its side in pixels, default the target's."""
    reference = reference or resolution
    with FakeTensorMode():
        model = _model(family, reference)
        inputs, shown = (step_inputs(family, size, 1, make=_empty) for size in (resolution, reference))
        faces = [Reference(shown[0], shown[2])]
        forward = _gflop(lambda: model(*inputs))
        reference_pass = _gflop(lambda: model.reference_hidden(faces[0]))
        shown_keys: dict[str, Sequence[FaceKeys]] = {}
        keys = _gflop(lambda: shown_keys.update(model.face_keys(faces)))
        held, held_checkpointed = _Held(model), _Held(model)
        outputs: list[Tensor] = []
        with held:
            with_face = _gflop(lambda: outputs.append(model(*inputs, faces)))
        backward = _gflop(lambda: outputs.pop().sum().backward())
        model.unet.enable_gradient_checkpointing()
        with held_checkpointed:
            model(*inputs, faces)
        trained = sum(weight.numel() for _, weight in model.trainable())
        frozen = sum(weight.numel() for weight in model.unet.parameters())
    return Cost(
        family=family,
        resolution=resolution,
        reference=reference,
        forward=forward,
        fused=with_face - keys - forward,
        projection=keys - reference_pass,
        step=with_face + backward,
        trained=trained,
        cache_mib=_fp16_bytes(shown_keys) / MIB,
        weights_gib=(2 * frozen + 4 * 5 * trained) / GIB,
        activations_gib=held.bytes / GIB,
        activations_checkpointed_gib=held_checkpointed.bytes / GIB,
    )


def _model(family: str, reference: int) -> FusedUNet:
    from diffusers import UNet2DConditionModel

    settings = AdapterSettings(base=family, reference_size=reference)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # autocast's arithmetic; trained weights are counted as fp32 all the same
    try:
        return FusedUNet(UNet2DConditionModel(**LAYOUTS[family]), settings).train()
    finally:
        torch.set_default_dtype(kept)


def step_inputs(
    family: str, size: int, batch: int, *, make: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, TextContext]:
    """Latents, timesteps and context of a layout, made by `make(*shape)`."""
    latent = make(batch, 4, size // LATENT_SCALE, size // LATENT_SCALE)
    width = LAYOUTS[family]["cross_attention_dim"]
    extra = (make(batch, 1280), make(batch, 6)) if family == "sdxl" else (None, None)
    return latent, torch.full((batch,), 500.0), TextContext(make(batch, 77, width), *extra)


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def _gflop(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False, custom_mapping=cpu_attention_flops()) as counter:
        run()
    return counter.get_total_flops() / 1e9


def cpu_attention_flops() -> dict[Any, Any]:
    """The CPU's attention kernel and its backward pass, which torch's counter does not know."""

    def forward(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(q, k, v) * 5 // 2  # recomputes the scores, then four products

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


class _Held(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd holds between forward and backward, each storage once, weights left out."""

    def __init__(self, model: FusedUNet) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._own = {weight.untyped_storage()._cdata for weight in model.parameters()}
        self._sizes: dict[int, int] = {}
        self._alive: list[torch.UntypedStorage] = []

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._sizes[storage._cdata] = storage.nbytes()
            self._alive.append(storage)  # a freed storage's address could come back for another one
        return tensor.detach()  # a saved output must not hold the graph it is saved in

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(self._sizes.values())


def _fp16_bytes(keys: Mapping[str, Sequence[FaceKeys]]) -> int:
    return sum(2 * (face.key.numel() + face.value.numel()) for faces in keys.values() for face in faces)


COLUMNS: tuple[tuple[str, Callable[[Cost], str]], ...] = (
    ("base", lambda c: f"{c.family} @{c.resolution}, reference {c.reference}"),
    ("forward GFLOP", lambda c: f"{c.forward:.0f}"),
    ("+ per reference", lambda c: f"{c.fused:.0f} ({100 * c.fused / c.forward:.1f} %)"),
    ("projection", lambda c: f"{c.projection:.1f}"),
    ("training step TFLOP", lambda c: f"{c.step / 1000:.2f}"),
    ("trained weights", lambda c: f"{c.trained / 1e6:.2f} M"),
    ("K, V per reference MiB", lambda c: f"{c.cache_mib:.2f}"),
    ("weights GiB", lambda c: f"{c.weights_gib:.2f}"),
    ("activations GiB", lambda c: f"{c.activations_gib:.2f}"),
    ("checkpointed GiB", lambda c: f"{c.activations_checkpointed_gib:.2f}"),
    ("total GiB", lambda c: f"{c.total_gib:.1f}"),
    ("total checkpointed GiB", lambda c: f"{c.total_checkpointed_gib:.1f}"),
)


def table(rows: Sequence[Cost]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(name for name, _ in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(show(row) for _, show in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def beside_gib() -> dict[str, float]:
    """Memory of the parts that the table leaves out: the VAE in fp32, the text encoders of each family in bf16."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        found = {"VAE": 4 * _num_weights(AutoencoderKL(**VAE)) / GIB}
        for family, towers in TEXT_ENCODERS.items():
            num = sum(_num_weights(CLIPTextModel(CLIPTextConfig(**tower))) for tower in towers)
            found[f"text encoders of {family}"] = 2 * num / GIB
    return found


def _num_weights(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters())


def beside_line() -> str:
    """`beside_gib` as a sentence."""
    return "Beside these: " + ", ".join(f"{name} {gib:.2f} GiB" for name, gib in beside_gib().items()) + ".\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.cost", description="Cost and memory by calculation.")
    parser.add_argument("--family", choices=LAYOUTS, action="append")
    parser.add_argument("--resolution", type=int, action="append")
    parser.add_argument("--reference", type=int, help="side of the reference; default: the target's")
    options = parser.parse_args(arguments)
    sizes = options.resolution or [512, 1024]
    rows = [cost(family, size, options.reference) for family in options.family or LAYOUTS for size in sizes]
    sys.stdout.write(table(rows) + "\n" + beside_line())
    return 0


if __name__ == "__main__":
    sys.exit(main())

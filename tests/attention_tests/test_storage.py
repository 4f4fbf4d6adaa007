"""How features are kept: 8 bits with a measured error, RAM, and layers that are fetched one ahead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fusion_kit import make_layer, randn
from torch import Tensor

from attention import prefetch
from attention.cache import LayerFeatures, ReferenceFeatures
from attention.fusion import FaceKeys
from attention.merge import merged
from attention.prefetch import Arrival, Prefetch, begin_copy
from attention.storage import (
    AS_COMPUTED,
    Storage,
    StoredFeatures,
    StoredLayer,
    layer_bytes,
    require_fp8,
    stored,
)
from attention.training_free import statistics

FP8 = Storage("fp8")
RAM = Storage("model", "cpu")
CPU = torch.device("cpu")


def features(tokens: int = 400, channels: int = 40, dtype: torch.dtype = torch.float32) -> LayerFeatures:
    """With what real features have: a mean far from zero, channels of very different size."""
    sizes = torch.logspace(-3, 1, channels)
    key, value = (((randn(1, tokens, channels, seed=s) + 2) * sizes).to(dtype) for s in (1, 2))
    return LayerFeatures(key, value, tokens, statistics(key, key))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize("storage", [AS_COMPUTED, RAM])
def test_without_fp8_nothing_changes_bit_for_bit(storage: Storage) -> None:
    layer = features()
    back = stored(layer, storage).expanded()
    assert all(torch.equal(a, b) for a, b in zip(back.tensors, layer.tensors, strict=True))
    assert back.num_trained == layer.num_trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fp8_keeps_every_channel_to_3_percent(dtype: torch.dtype) -> None:
    """e4m3 has 3 bits behind the point: half a step is 1/16, its mean square about 1/40 of a number."""
    layer = features(dtype=dtype)
    kept = stored(layer, FP8)
    assert kept.features.key.dtype == kept.features.value.dtype == torch.float8_e4m3fn
    back = kept.expanded()
    for ours, theirs in ((back.key, layer.key), (back.value, layer.value)):
        assert ours.dtype == dtype and ours.shape == theirs.shape and bool(torch.isfinite(ours).all())
        for channel in range(0, theirs.shape[2], 7):
            spread = theirs[..., channel].float() - theirs[..., channel].float().mean()
            error = (ours[..., channel] - theirs[..., channel]).float().norm() / spread.norm()
            assert float(error) < 0.03 + 4 * torch.finfo(dtype).eps
    assert back.statistics is layer.statistics


def test_what_all_tokens_share_is_kept_exactly() -> None:
    """A channel that is the same everywhere, zero among them, and one with a huge mean."""
    key = torch.zeros(1, 50, 3)
    key[..., 1] = 7.0
    key[..., 2] = 1000.0 + randn(1, 50, seed=3)
    back = stored(LayerFeatures(key, key, 50), FP8).expanded().key
    assert torch.equal(back[..., :2], key[..., :2])
    assert float((back[..., 2] - key[..., 2]).abs().max()) < 0.2


@pytest.mark.parametrize("combine", ["fused", "decoupled"])
def test_quality_of_a_layer_s_output_with_fp8(combine: str) -> None:
    """The cost that docs/speed.md states, on random layers: the face changes the output; fp8 changes that a little."""
    layer = make_layer([[400]], heads=4, width=40, grid=(12, 12), length="paper")
    (face,) = layer.faces
    small = stored(LayerFeatures(face.key, face.value, 400), FP8).expanded()
    ours = replace(layer, faces=(FaceKeys(small.key, small.value),)).fast(combine)
    wanted = replace(layer, faces=(FaceKeys(face.key, face.value),)).fast(combine)
    assert relative(ours, wanted) < 0.04
    assert float(torch.cosine_similarity(ours.flatten(), wanted.flatten(), dim=0)) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("storage", [AS_COMPUTED, FP8, RAM, Storage("fp8", "cpu")], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_bytes_are_those_of_the_tensors(storage: Storage, share: float, dtype: torch.dtype) -> None:
    layer = merged(replace(features(dtype=dtype), statistics=None), share)
    held = StoredFeatures({"a": stored(layer, storage), "b": stored(layer, storage)})
    tokens = layer.key.shape[1]
    sizes = 4 * tokens if share < 1 else 0
    assert held.num_bytes == 2 * (layer_bytes(tokens, 40, dtype.itemsize, storage) + sizes)
    plain = ReferenceFeatures({"a": layer, "b": layer}).num_bytes
    assert held.num_bytes == plain if storage.precision == "model" else held.num_bytes < 0.75 * plain


def test_a_device_without_8_bit_floats_is_named() -> None:
    require_fp8(CPU)
    with pytest.raises(ValueError, match="the device mps has no 8-bit floats"):
        require_fp8(torch.device("mps"))  # this build has none


# One layer ahead


class Copies:
    """Notes which layers are begun and waited for, in order."""

    def __init__(self, features: StoredFeatures) -> None:
        self.names = {id(layer): path for path, layer in features.layers.items()}
        self.events: list[str] = []

    def __call__(self, layers: list[StoredLayer], _: torch.device) -> Arrival:
        name = self.names[id(layers[0])]
        self.events.append(f"begin {name}")

        def arrival() -> list[StoredLayer]:
            self.events.append(f"take {name}")
            return layers

        return arrival


def four_layers() -> StoredFeatures:
    return StoredFeatures({path: stored(features(20 + i), RAM) for i, path in enumerate("abcd")})


def test_the_next_layer_is_on_its_way_before_this_one_is_used() -> None:
    held = four_layers()
    copies = Copies(held)
    ahead = Prefetch([held], "abcd", CPU, copies)
    assert copies.events == ["begin a"], "the first one when the UNet is called"
    taken = [ahead.layers(path) for path in "abcd"]
    assert copies.events == ["begin a", "begin b", "take a", "begin c", "take b", "begin d", "take c", "take d"]
    assert [len(layers) for layers in taken] == [1] * 4
    assert all(layers[0].key is held.layers[path].features.key for path, layers in zip("abcd", taken))


def test_layers_out_of_order_twice_or_left_out_still_come() -> None:
    held = four_layers()
    ahead = Prefetch([held], "ab", CPU, Copies(held))  # c and d are not in the order
    for path in "cabbda":
        (layer,) = ahead.layers(path)
        assert layer.key is held.layers[path].features.key
    assert Prefetch([held], "", CPU, Copies(held)).layers("d")[0].key.shape[1] == 23


def test_every_reference_comes_expanded() -> None:
    one, other = (StoredFeatures({"a": stored(features(n), FP8)}) for n in (30, 50))
    layers = Prefetch([one, other], "a", CPU).layers("a")
    assert [layer.key.shape[1] for layer in layers] == [30, 50]
    assert all(layer.key.dtype == torch.float32 for layer in layers)


def test_on_a_cpu_nothing_is_copied() -> None:
    layer = stored(features(), RAM)
    (there,) = begin_copy([layer], CPU)()
    assert there.features.key is layer.features.key


# What a GPU would do, on stand-ins for its streams


class Gpu:
    """Streams, events and a layer's tensors that note what happens to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.device = torch.device("cuda:0")
        self.tensors = (self,)
        monkeypatch.setattr(prefetch, "_streams", {})
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("copying", self.events))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("computing", self.events))

    def record_stream(self, stream: Stream) -> None:
        self.events.append(f"memory kept for {stream.name}")


class Stream:
    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def __enter__(self) -> None:
        self.events.append(f"enter {self.name}")

    def __exit__(self, *_: object) -> None:
        self.events.append(f"leave {self.name}")

    def record_event(self) -> str:
        self.events.append(f"event in {self.name}")
        return "event"

    def wait_event(self, event: str) -> None:
        self.events.append(f"{self.name} waits for the {event}")


class InRam:
    device = CPU

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def to(self, _: torch.device) -> Gpu:
        self.gpu.events.append("copy")
        return self.gpu


def test_a_gpu_copies_in_a_stream_of_its_own_and_the_layer_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    arrival = begin_copy([InRam(gpu)], gpu.device)  # type: ignore[list-item]
    assert gpu.events == ["enter copying", "copy", "leave copying", "event in copying"]
    gpu.events.clear()
    assert list(arrival()) == [gpu]
    assert gpu.events == ["computing waits for the event", "memory kept for computing"]


def test_features_in_ram_are_pinned_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (pinned.append(self), self)[1])
    kept = stored(features(), Storage("fp8", "cpu"))
    assert len(pinned) == len(kept.tensors) == 2 + 4 + 4

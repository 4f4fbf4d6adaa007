"""Which onnxruntime provider a session really gets: with a CUDA library missing it is CPU, silently."""

from __future__ import annotations

from collections.abc import Sequence

from .providers import SUFFIX, available_providers


def providers_in_use(names: Sequence[str] | None = None) -> dict[str, str]:
    """Provider asked for -> provider a session got, by opening a one-node model with each (short names).

    Empty without onnxruntime. A provider that fails outright maps to `failed: <reason>`.
    """
    return {name: _probe(name) for name in (available_providers() if names is None else names)}


def _probe(name: str) -> str:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    wanted = list(dict.fromkeys([name + SUFFIX, "CPU" + SUFFIX]))
    try:
        session = onnxruntime.InferenceSession(identity_model(), sess_options=options, providers=wanted)
    # onnxruntime raises classes of its compiled part that share only Exception as a base.
    except Exception as error:
        return f"failed: {str(error).splitlines()[0][:120]}"
    got: str = session.get_providers()[0]
    return got.removesuffix(SUFFIX)


def identity_model() -> bytes:
    """The smallest ONNX model: y = Identity(x), both float [1]; by hand, so the onnx package is not needed."""
    shape = _field(2, _field(1, _number(1, 1)))
    value_type = _field(2, _field(1, _number(1, 1) + shape))
    node = _field(1, _field(1, b"x") + _field(2, b"y") + _field(4, b"Identity"))
    graph = node + _field(2, b"g") + _field(11, _field(1, b"x") + value_type) + _field(12, _field(1, b"y") + value_type)
    return _number(1, 8) + _field(7, graph) + _field(8, _number(2, 13))


def _number(tag: int, value: int) -> bytes:
    return bytes([tag << 3, value])


def _field(tag: int, content: bytes) -> bytes:
    assert len(content) < 128, "one length byte is enough for this model"
    return bytes([tag << 3 | 2, len(content)]) + content

"""Files from the internet only ever give what they hold or a ValueError that names them.

In every run a few hundred cases. `FUSEDID_HOSTILE_CASES=15000 python -m pytest tests/robustness -k hostile` runs
15,000 per kind of file, well above 100,000 in all.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import community_files
import guard
import numpy as np
import pytest
import torch
from cases import hostile, outcome
from hostile import NUMBERS, SHAPES, SIZES, WORDS, damaged_bytes, hostile_file
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as save_tensors

from attention.adapter import AdapterSettings, Projection, load_adapter, save_adapter
from attention.community.container import open_community
from attention.community.eva_clip import is_eva_tower, load_eva_tower
from attention.community.inputs import FaceInputs
from attention.community.recognise import recognise
from attention.community.source import face_tokens, load_community
from attention.guidance import Guidance
from attention.guidance_file import load_guidance, save_guidance
from attention.guidance_settings import GuidanceSettings, Tower
from attention.sites import SD15_SITES
from faces.identity import EncoderFingerprint, Identity, Reference
from faces.identity_file import load_identity, save_identity
from faces.onnx_header import read_header as read_onnx_header
from faces.packs import header_role
from faces.pictures import as_rgb_batch

NAME = "hostile.safetensors"
FAMILIES = ("standard", "plus", "full-face", "faceid", "faceid-plus", "portrait", "instantid", "pulid-v1", "pulid-v1.1")


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def nothing_but_errors() -> Iterator[None]:
    """No program, no network, no unpickling; every case also has a bound of memory and time."""
    with guard.forbidden(*guard.PROGRAMS, *guard.NETWORK, *guard.PICKLES):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the files; in memory where the system has one, the cases are many and small."""
    memory = Path("/dev/shm")
    return Path(tmp_path_factory.mktemp("hostile", numbered=True)) if not memory.is_dir() else _in_memory(memory)


def _in_memory(memory: Path) -> Path:
    folder = memory / f"fusedid-hostile-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    return folder


def written(place: Path, content: bytes, name: str = NAME) -> Path:
    path = place / name
    path.write_bytes(content)
    return path


# One sound file of every kind


def sound_adapter(folder: Path) -> bytes:
    path = folder / "sound.safetensors"
    weights = {site.path: Projection(torch.ones(2, 2), torch.ones(2, 2)) for site in SD15_SITES[:3]}
    save_adapter(path, weights, AdapterSettings(base="sd15"), prompt_context=torch.ones(2, 3))
    return path.read_bytes()


def sound_guidance(folder: Path) -> bytes:
    path = folder / "sound.safetensors"
    settings = GuidanceSettings(
        base="sd15", towers=(Tower("ViT-L/14", 4),), face_width=2, face_encoder="", context_width=3, num_tokens=2
    )
    save_guidance(path, Guidance(settings))
    return path.read_bytes()


def sound_identity(folder: Path) -> bytes:
    path = folder / "sound.safetensors"
    crop, points = np.zeros((16, 16, 3), np.uint8), np.ones((5, 2), np.float32)
    reference = Reference(crop, np.ones(4, np.float32), points, 0.5, 1.0, np.zeros((112, 112, 3), np.uint8))
    save_identity(Identity((reference,), EncoderFingerprint("x", "insightface", "a", "b", 4, "test"), "Ada"), path)
    return path.read_bytes()


COMMUNITY_NAMES = sorted({name for family in FAMILIES for name in community_files.image_proj_shapes(family, "sd15")})
SMALL = {"image_proj.proj.weight": (12, 5), "image_proj.norm.weight": (3,), "image_proj.norm.bias": (3,)}
LAYERS = {f"ip_adapter.{number}.to_{part}_ip.weight": (2, 3) for number in (1, 3) for part in "kv"}


def sound_community() -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in {**SMALL, **LAYERS}.items()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    makers = {"adapter": sound_adapter, "guidance": sound_guidance, "identity": sound_identity}
    files = {kind: make(folder) for kind, make in makers.items()}
    return {**files, "community": save_tensors(sound_community(), metadata={"format": "pt"})}


# Safetensors: adapter, guidance, identity, community


@hostile(150)
@given(data=st.data())
def test_hostile_adapters(data: st.DataObject, place: Path, sound: dict[str, bytes]) -> None:
    path = written(place, data.draw(hostile_file(sound["adapter"])))
    adapter = outcome("adapter file", NAME, lambda: load_adapter(path))
    if adapter is not None:
        weights = [w for projection in adapter.projections.values() for w in (projection.key, projection.value)]
        assert weights and all(bool(torch.isfinite(w.float()).all()) for w in weights)


@hostile(150)
@given(data=st.data())
def test_hostile_guidance_files(data: st.DataObject, place: Path, sound: dict[str, bytes]) -> None:
    path = written(place, data.draw(hostile_file(sound["guidance"])))
    guidance = outcome("guidance file", NAME, lambda: load_guidance(path))
    if guidance is not None:
        assert bool(torch.isfinite(guidance.linear.weight).all())


@hostile(150)
@given(data=st.data())
def test_hostile_identities(data: st.DataObject, place: Path, sound: dict[str, bytes]) -> None:
    path = written(place, data.draw(hostile_file(sound["identity"])))
    identity = outcome("identity file", NAME, lambda: load_identity(path))
    if identity is not None:
        assert len(identity.references) > 0


@hostile(150)
@given(data=st.data())
def test_hostile_community_files(data: st.DataObject, place: Path, sound: dict[str, bytes]) -> None:
    path = written(place, data.draw(hostile_file(sound["community"])))
    outcome("community file", NAME, lambda: load_community(path))


DIMENSION = st.one_of(st.sampled_from([0, 1, 3, 4, 320, 512, 640, 768, 1024, 1280, 2048]), NUMBERS)
NAMES = st.one_of(
    st.sampled_from([f"image_proj.{name}" for name in COMMUNITY_NAMES]),
    st.builds(
        "ip_adapter.{}.to_{}".format,
        st.one_of(st.integers(0, 9), NUMBERS),
        st.sampled_from(["k_ip.weight", "v_ip.weight", "q_lora.down.weight", "out_lora.up.weight", "k"]),
    ),
    st.sampled_from(["blocks.0.attn.inner_attn_ln.weight", "pulid_ca.0", "lora_x", "FacialEncoder.a"]),
    st.text(max_size=9),
)


@hostile(300)
@given(
    extra=st.dictionaries(NAMES, st.lists(DIMENSION, max_size=4).map(tuple), max_size=5),
    family=st.sampled_from([*FAMILIES, ""]),
    with_layers=st.booleans(),
    dropped=st.integers(0, 40),
)
def test_hostile_shapes_are_recognised_or_refused(
    extra: dict[str, tuple[int, ...]], family: str, with_layers: bool, dropped: int
) -> None:
    shapes = dict(LAYERS) if with_layers else {}
    if family:
        proj = community_files.image_proj_shapes(family, "sd15", depth=1)
        kept = [name for place, name in enumerate(sorted(proj)) if place != dropped]
        shapes |= {f"image_proj.{name}": proj[name] for name in kept}
    found = outcome("community recognition", NAME, lambda: recognise({**shapes, **extra}, name=NAME))
    if found is not None:
        assert found.num_tokens >= 0 and found.clip_model is not None


@hostile(100)
@given(
    dropped=st.sampled_from([*SMALL, ""]),
    odd=st.sampled_from([*SMALL, ""]),
    shape=SHAPES,
    width=st.sampled_from([5, 7]),
)
def test_hostile_image_projections(dropped: str, odd: str, shape: list[int], width: int, place: Path) -> None:
    tensors = sound_community() | ({odd: torch.ones(shape)} if odd else {})
    tensors.pop(dropped, None)
    path = written(place, save_tensors(tensors, metadata={"format": "pt"}))
    adapter = outcome("community file (incomplete)", NAME, lambda: load_community(path))
    if adapter is not None:
        faces = FaceInputs(clip_embeds=torch.ones(2, width), encoder="buffalo_l")
        outcome("community file (use)", NAME, lambda: face_tokens(adapter, faces))


# Torch files


def torch_file(content: Any, *, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@pytest.fixture(scope="module")
def torch_files() -> dict[bool, bytes]:
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in sound_community().items():
        part, _, rest = name.partition(".")
        nested[part][rest] = tensor
    return {zipped: torch_file(nested, zipped=zipped) for zipped in (True, False)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@hostile(100, share=0.5)
@given(data=st.data())
def test_hostile_torch_files(data: st.DataObject, zipped: bool, place: Path, torch_files: dict[bool, bytes]) -> None:
    path = written(place, data.draw(damaged_bytes(torch_files[zipped])), "hostile.bin")
    outcome(f"torch file ({'zip' if zipped else 'old'})", "hostile.bin", lambda: load_community(path))


@st.composite
def odd_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors that claim more than they store, have no plain layout, or an odd type."""
    size = draw(st.lists(st.sampled_from([0, 1, 3, 2**20, 2**30]), max_size=2))
    kind = draw(st.sampled_from(["strided", "meta", "sparse", "bool", "complex", "nan", "plain"]))
    if kind == "strided":
        return torch.zeros(1).as_strided(size, [0] * len(size))
    if kind == "meta":
        return torch.empty(size, device="meta")
    if kind == "sparse":
        return torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (2**40,))
    types = {"bool": torch.bool, "complex": torch.complex64, "nan": torch.float16, "plain": torch.float32}
    return torch.full((2, 3), torch.nan if kind == "nan" else 1, dtype=types[kind])


CONTENT = st.recursive(
    st.one_of(odd_tensors(), st.none(), st.integers(), st.text(max_size=5), st.floats()),
    lambda inner: st.one_of(
        st.dictionaries(
            st.one_of(
                st.sampled_from(["image_proj", "ip_adapter", "proj.weight", "1.to_k_ip.weight", "1.to_v_ip.weight"]),
                st.integers(0, 3),
            ),
            inner,
            max_size=4,
        ),
        st.lists(inner, max_size=2),
    ),
    max_leaves=8,
)


@hostile(100, share=0.5)
@given(content=CONTENT, zipped=st.booleans())
def test_hostile_content_of_torch_files(content: Any, zipped: bool, place: Path) -> None:
    try:
        stored = torch_file(content, zipped=zipped)
    except RuntimeError:  # torch itself cannot write it in this form
        return
    path = written(place, stored, "hostile.bin")
    outcome("torch file (content)", "hostile.bin", lambda: load_community(path))


class Bomb:
    """Would run a program when it is unpickled."""

    def __init__(self, function: Any, argument: str) -> None:
        self._call = (function, (argument,))

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec, open, __import__], ids=lambda f: f.__name__)
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "old", "bare pickle"])
def test_no_pickle_runs_whatever_it_calls_itself(
    tmp_path: Path, function: Any, suffix: str, zipped: bool | None
) -> None:
    bomb = {"image_proj": Bomb(function, str(tmp_path / "exploded")), "ip_adapter": {}}
    path = tmp_path / f"hostile{suffix}"
    path.write_bytes(pickle.dumps(bomb) if zipped is None else torch_file(bomb, zipped=zipped))
    for read in (load_community, load_adapter, load_guidance, load_identity, load_eva_tower):
        with pytest.raises(ValueError, match="hostile"):
            read(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_compressed_torch_file_is_refused_before_it_unpacks(tmp_path: Path, torch_files: dict[bool, bytes]) -> None:
    path = tmp_path / "bomb.bin"
    with zipfile.ZipFile(io.BytesIO(torch_files[True])) as sound, zipfile.ZipFile(path, "w") as packed:
        for entry in sound.infolist():
            packed.writestr(entry.filename, sound.read(entry), zipfile.ZIP_DEFLATED)
        packed.writestr("archive/data/9", b"\0" * (1 << 26), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=r"^bomb\.bin is not a readable torch file \(.* is compressed"):
        open_community(path)


def test_a_few_bytes_that_claim_2_to_the_60_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.bin"
    wide = torch.zeros(1).as_strided((2**20, 2**40), (0, 0))
    torch.save({"image_proj": {"proj.weight": wide}}, path)
    with pytest.raises(ValueError, match=r"^bomb\.bin: image_proj\.proj\.weight .* is no plain"):
        open_community(path)


def test_one_table_under_a_million_names_is_refused_at_once(tmp_path: Path) -> None:
    table: dict[int, Any] = {}
    for _ in range(3):
        table = dict.fromkeys(range(1000), table)
    torch.save(table, tmp_path / "bomb.bin")
    with guard.limited_time(), pytest.raises(ValueError, match="more than 100000 entries"):
        open_community(tmp_path / "bomb.bin")


def test_a_table_that_holds_itself_is_refused(tmp_path: Path) -> None:
    table: dict[str, Any] = {"a": torch.ones(1)}
    table["again"] = table
    torch.save(table, tmp_path / "bomb.bin")
    with pytest.raises(ValueError, match="more than 4 levels deep"):
        open_community(tmp_path / "bomb.bin")


def test_is_eva_tower_takes_any_names() -> None:
    assert not is_eva_tower({"blocks.0.attn.inner_attn_ln.weight.x": (1,)})


# Headers that declare more than any memory


@pytest.mark.parametrize("read", [load_adapter, load_guidance, load_identity, load_community])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_a_header_that_declares_2_to_the_60_elements_is_refused(read: Any, kind: str, tmp_path: Path) -> None:
    size = SIZES[kind] << 60
    entry = {"dtype": kind, "shape": [1 << 30, 1 << 30], "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"fusedid.kind": "fusion"}, "a": entry}).encode()
    path = tmp_path / NAME
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with guard.limited_memory(64 << 20), pytest.raises(ValueError, match=NAME):
        read(path)


# ONNX headers and pictures


def onnx_model() -> bytes:
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 112, 112])]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 512])]
    nodes = [helper.make_node("Flatten", ["input"], ["out"], name="first")]
    weights = [helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, weights)).SerializeToString()


@pytest.fixture(scope="module")
def onnx_bytes() -> bytes:
    pytest.importorskip("onnx", reason="onnx comes with insightface")
    return onnx_model()


@hostile(150)
@given(data=st.data())
def test_hostile_onnx_headers(data: st.DataObject, place: Path, onnx_bytes: bytes) -> None:
    content = data.draw(st.one_of(damaged_bytes(onnx_bytes, 300), st.binary(max_size=60)))
    path = written(place, content, "hostile.onnx")
    header = outcome("onnx header", "ONNX", lambda: read_onnx_header(path))
    if header is not None:
        assert header_role(header) in (None, "detector", "recogniser")


def picture_file(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)).save(stream, kind)
    return stream.getvalue()


ARRAYS = st.builds(
    lambda shape, dtype, value: np.full(shape, value).astype(dtype),
    st.one_of(
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 15, 16, 17]), max_size=5),
        st.tuples(st.sampled_from([16, 40]), st.sampled_from([17, 40]), st.sampled_from([1, 3, 4])),
    ),
    st.sampled_from(["uint8", "float16", "float32", "float64", "int64", "bool", "complex64", "object", "<U3"]),
    st.sampled_from([0, 1, 0.5, -1, 255, 1e30, np.nan, np.inf, -np.inf]),
)


@hostile(200)
@given(pictures=st.lists(ARRAYS, max_size=2))
def test_hostile_picture_arrays(pictures: list[np.ndarray]) -> None:
    result = outcome("picture array", "picture", lambda: as_rgb_batch(pictures))
    for picture in result or ():
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3


@pytest.fixture(scope="module")
def read_picture(pack: Any) -> Any:
    return pack.submodule("nodes.face_folder").read_picture


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@hostile(40, share=0.25)
@given(data=st.data())
def test_hostile_picture_files(data: st.DataObject, kind: str, place: Path, read_picture: Any) -> None:
    path = written(place, data.draw(damaged_bytes(picture_file(kind), 120)), "hostile.png")
    outcome(f"picture file ({kind})", "hostile.png", lambda: read_picture(path))


def test_a_picture_of_a_billion_pixels_is_refused(tmp_path: Path, read_picture: Any) -> None:
    content = bytearray(picture_file("BMP"))
    content[18:26] = (40_000).to_bytes(4, "little") * 2
    path = written(tmp_path, bytes(content), "hostile.bmp")
    with guard.limited_memory(), pytest.raises(ValueError, match=r"^hostile\.bmp cannot be read"):
        read_picture(path)


@hostile(100)
@given(name=st.one_of(WORDS, st.text(alphabet="./\\~ ab:\x00", max_size=12)))
def test_hostile_names_of_identities_stay_in_their_folder(name: str, place: Path) -> None:
    from faces.identity_file import identity_path

    found = outcome("identity name", "", lambda: identity_path(place, name))
    if found is not None:
        assert found.resolve().is_relative_to(place.resolve()) and found.resolve() != place.resolve()

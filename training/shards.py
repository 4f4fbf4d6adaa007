"""Reading what ``python -m training.prepare`` wrote: samples by number, from disk or any fsspec URL."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from .safetensors_ranges import TensorFile
from .source import Record
from .storage import Store, open_store

SPLITS = ("train", "val", "test", "all")
OPEN_CACHE_FILES = 8
EMPTY_PROMPT = "empty prompt"
"""Name of the empty caption's text cache; sample keys never contain a blank."""


class ShardSource:
    """One split of a prepared data set; satisfies ``training.source.Source``.

    The index is kept in Arrow: a loader process gets it without copying millions of Python objects. Raises
    ``ValueError`` when the folder is not a prepared data set, or the split is empty.
    """

    def __init__(self, root: str, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
        self.root, self.split = root, split
        self._store: Store = open_store(root)
        self.manifest = _manifest(self._store, root)
        index = pq.read_table(io.BytesIO(self._store.read("index.parquet")))
        if not index.num_rows:
            raise ValueError(f"the data set {root} has no samples; see its report.md for the reasons")
        self._index = index if split == "all" else index.filter(pc.equal(index["split"], split)).combine_chunks()
        if not self._index.num_rows:
            counts = ", ".join(
                f"{row['values']}: {row['counts']}" for row in pc.value_counts(index["split"]).to_pylist()
            )
            raise ValueError(
                f"the data set {root} has no samples in the split {split!r} (it has {counts}); prepare it with another "
                "split.val or split.test, or choose another split"
            )
        self._cache_files: dict[tuple[str, int], TensorFile] = {}

    def __len__(self) -> int:
        return self._index.num_rows

    @property
    def fingerprint(self) -> str:
        """Changes when any sample changes."""
        return f"{self.manifest['index_sha256']}:{self.split}"

    @property
    def encoder(self) -> str:
        """sha256 of the recogniser, which decides whether embeddings fit; empty when no faces were looked for.

        ``manifest["face_encoder"]`` also has its dim and licence.
        """
        return str(self.manifest["face_encoder"].get("recogniser_sha256", ""))

    @property
    def encoder_name(self) -> str:
        """Name of the face pack; empty when no faces were looked for."""
        return str(self.manifest["face_encoder"].get("name", ""))

    def row(self, index: int) -> dict[str, Any]:
        """All columns of one sample's row in ``index.parquet``."""
        return self._index.slice(self._checked(index), 1).to_pylist()[0]

    def record(self, index: int) -> Record:
        """Everything but the pictures."""
        row = self.row(index)
        data = self._member(row, "embedding")
        return Record(
            key=row["key"],
            caption=row["caption"] or "",
            has_face=bool(row["human"]),
            original_size=(row["source_height"], row["source_width"]),
            embedding=np.load(io.BytesIO(data)) if data else None,
        )

    def same_person(self, index: int) -> Sequence[int]:
        """Other samples of the same person in this split, in the order of the index."""
        person = self._people[self._checked(index)]
        if person < 0:
            return []
        start, end = np.searchsorted(self._sorted_people, [person, person + 1])
        return [int(other) for other in self._by_person[start:end] if other != index]

    def picture(self, index: int) -> np.ndarray:
        """The target, uint8 ``[H, W, 3]``."""
        return self._image(index, "target", "RGB")

    def face(self, index: int) -> np.ndarray:
        """The face crop, uint8 ``[S, S, 3]``. ``ValueError`` for a sample without a face."""
        return self._image(index, "reference", "RGB")

    def face_mask(self, index: int) -> np.ndarray:
        """Where the face is in the target, uint8 ``[H, W]``, 255 = face; all 0 without a face."""
        row = self.row(index)
        if not row["mask_size"]:
            return np.zeros((row["height"], row["width"]), dtype=np.uint8)
        return self._image(index, "mask", "L")

    def moments(self, index: int, which: str) -> Tensor:
        """Cached VAE moments ``[8, h, w]`` of the ``target`` or the ``reference``, fp16, unscaled."""
        return self._cached(index, "vae", f"/{which}")

    def style(self, index: int) -> Tensor:
        """Cached CLIP image embedding ``[S]`` of the target with its face hidden."""
        return self._cached(index, "clip_vision", "")

    def text(self, index: int | None) -> tuple[Tensor, Tensor | None]:
        """Cached text context ``[T, D_c]`` and, for SDXL, pooled embedding ``[P]`` of a caption; None: of no text."""
        row = self.row(index or 0)
        name = EMPTY_PROMPT if index is None else row["key"]
        file = self._tensor_file("text", row["shard"])
        pooled = file.tensor(f"{name}/pooled") if f"{name}/pooled" in file.names else None
        return file.tensor(f"{name}/context"), pooled

    @cached_property
    def _people(self) -> np.ndarray:
        codes = self._index["person"].combine_chunks().dictionary_encode().indices.fill_null(-1)
        return np.asarray(codes)

    @cached_property
    def _by_person(self) -> np.ndarray:
        return np.argsort(self._people, kind="stable")

    @cached_property
    def _sorted_people(self) -> np.ndarray:
        return self._people[self._by_person]

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return index

    def _member(self, row: dict[str, Any], member: str) -> bytes:
        size = row[f"{member}_size"]
        if not size:
            return b""
        path = f"shards/{row['shard']:06d}.tar"
        try:
            data = self._store.read_range(path, row[f"{member}_offset"], size)
        except OSError as error:
            raise ValueError(
                f"sample {row['key']}: cannot read {self.root}/{path} ({error}); is it all there?"
            ) from error
        if len(data) < size:
            raise ValueError(f"sample {row['key']}: {self.root}/{path} is cut off; run the preparation again")
        return data

    def _image(self, index: int, member: str, mode: str) -> np.ndarray:
        row = self.row(index)
        data = self._member(row, member)
        if not data:
            raise ValueError(f"sample {row['key']} has no {member}: no face was found in it")
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.array(image.convert(mode))
        except OSError as error:
            raise ValueError(f"sample {row['key']}: its {member} does not decode ({error}); prepare again") from error

    def _tensor_file(self, kind: str, shard: int) -> TensorFile:
        if (kind, shard) not in self._cache_files:
            path = f"cache/{kind}/{shard:06d}.safetensors"
            if not self._store.exists(path):
                raise ValueError(
                    f"the data set {self.root} has no cache of {kind!r}; run the preparation again with "
                    "cache.base_model (vae, text) or cache.clip_vision set, which adds it, or train without the cache"
                )
            while len(self._cache_files) >= OPEN_CACHE_FILES:
                self._cache_files.pop(next(iter(self._cache_files)))
            self._cache_files[kind, shard] = TensorFile(self._store, path)
        return self._cache_files[kind, shard]

    def _cached(self, index: int, kind: str, suffix: str) -> Tensor:
        row = self.row(index)
        return self._tensor_file(kind, row["shard"]).tensor(f"{row['key']}{suffix}")


def _manifest(store: Store, root: str) -> dict[str, Any]:
    try:
        manifest = json.loads(store.read("manifest.json"))
    except FileNotFoundError:
        raise ValueError(
            f"{root} is not a prepared data set (no manifest.json); run python -m training.prepare --output {root}, "
            "and let it finish"
        ) from None
    except ValueError as error:
        raise ValueError(f"{root}/manifest.json is damaged ({error}); run the preparation again") from error
    if not isinstance(manifest, dict) or manifest.get("fusedid.prepare") != 1:
        raise ValueError(f"{root} was not made by this version of python -m training.prepare; prepare it again")
    return manifest

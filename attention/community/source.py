"""A community file as a key/value source: tokens per face, then keys and values per site, for the same attention.

K = tokens W_k^T, V = tokens W_v^T. Community families were trained `decoupled` (two softmaxes, outputs added) and with
tokens for the negative prompt's rows as well: the projection of "no face".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import LayerFeatures, ReferenceFeatures
from ..files import require_finite
from ..sites import Site
from . import families as known
from .container import open_community
from .faceid import faceid_plus_tokens, faceid_tokens
from .families import AS_RECOGNISED, CommunityFamily, choose_variant
from .inputs import FaceInputs, check_inputs, entering_embedding
from .instantid import averaged, instantid_tokens
from .ip_adapter import full_face_tokens, plus_tokens, standard_tokens
from .layers import check_fits, lora_state_dict, projections
from .modules import under
from .pulid import identity_condition, joined_v1_tokens, pulid_v1_tokens, pulid_v11_tokens, relative_log_weights
from .recognise import Recognised, recognise

COMBINE = "decoupled"
"""How all community families were trained."""


@dataclass(frozen=True, eq=False)
class CommunityAdapter:
    """A loaded community file. name: for messages. weights: its tensors by our names, as stored."""

    name: str
    recognised: Recognised
    weights: dict[str, Tensor]

    @property
    def family(self) -> CommunityFamily:
        return self.recognised.family

    @property
    def base(self) -> str:
        """`sd15`, `sdxl` or `custom`."""
        return self.recognised.layers.base


@dataclass(frozen=True, eq=False)
class FaceTokens:
    """Tokens of one person: `[S, n, D_context]` for positive rows, and `[1, n', D_context]` for negative ones.

    S is 1 in families that take all references together, else their number. log_weight: `[n]`, added to the scores of
    the tokens of an only set whose references have different weights.
    """

    positive: Tensor
    negative: Tensor
    log_weight: Tensor | None = None


def inspect_community(path: Path | str) -> Recognised:
    """What a file is, without reading its tensors (drop-downs). Raises ValueError as `load_community`."""
    container = open_community(path)
    return recognise(container.shapes, name=container.path.name)


def load_community(path: Path | str, *, variant: str = AS_RECOGNISED) -> CommunityAdapter:
    """Reads and checks a community file.

    variant: the stated choice between families with equal tensors (`families.VARIANTS`).
    Raises ValueError that says what the file is when it cannot be used, or that it is damaged.
    """
    container = open_community(path)
    name = container.path.name
    recognised = recognise(container.shapes, name=name)
    family = choose_variant(recognised.family, variant, name=name)
    weights = container.tensors()
    require_finite(name, weights)
    return CommunityAdapter(name, replace(recognised, family=family), weights)


@torch.no_grad()
def face_tokens(
    adapter: CommunityAdapter,
    inputs: FaceInputs,
    *,
    structure: float = 1.0,
    weights: Sequence[float] = (),
    zero_tokens: int = 0,
) -> FaceTokens:
    """Tokens of a person's references, and of "no face". Raises ValueError when something the family reads is missing.

    structure: FaceID-PlusV2's weight of the CLIP picture. weights: of the references, > 0, read by families that take
    them together; none is equal ones. PuLID v1's first reference is its whole one. zero_tokens: PuLID's, at the end.
    """
    check_inputs(adapter.recognised, inputs, name=adapter.name)
    try:
        found = FaceTokens(
            _tokens(adapter, inputs, structure, weights),
            _tokens(adapter, _no_face(adapter.family, inputs), structure, ()),
            _log_weight(adapter, weights),
        )
    except (KeyError, IndexError, RuntimeError) as error:  # a tensor that is absent or of another shape
        raise ValueError(
            f"{adapter.name}: its image projection is incomplete or damaged ({error}); download it again"
        ) from error
    return _with_zeros(found, zero_tokens) if zero_tokens else found


def _with_zeros(tokens: FaceTokens, count: int) -> FaceTokens:
    positive, negative = (F.pad(one, (0, 0, 0, count)) for one in (tokens.positive, tokens.negative))
    return FaceTokens(positive, negative, None if tokens.log_weight is None else F.pad(tokens.log_weight, (0, count)))


def _log_weight(adapter: CommunityAdapter, weights: Sequence[float]) -> Tensor | None:
    """Of the tokens that stay apart; elsewhere the weights act before there are tokens."""
    if adapter.family != known.PULID_V1 or len(set(weights)) < 2:
        return None
    first = adapter.recognised.num_tokens
    return relative_log_weights(weights, [first, *(first - known.EVA_LEVELS for _ in weights[1:])])


def _no_face(family: CommunityFamily, inputs: FaceInputs) -> FaceInputs:
    """The negative input of all families: zeros for embeddings, an empty picture for CLIP hidden states.

    One reference of it, but in PuLID v1 as many as there are of the person.
    """

    def zero(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros_like(x if family == known.PULID_V1 else x[:1])

    return FaceInputs(
        embedding=zero(inputs.embedding),
        clip_embeds=zero(inputs.clip_embeds),
        clip_hidden=inputs.clip_hidden_blank,
        eva_embed=zero(inputs.eva_embed),
        eva_hidden=tuple(level for level in map(zero, inputs.eva_hidden) if level is not None),
    )


def _tokens(
    adapter: CommunityAdapter, inputs: FaceInputs, structure: float, reference_weights: Sequence[float]
) -> Tensor:
    family, weights = adapter.family, under(adapter.weights, "image_proj.")
    hidden = None if inputs.clip_hidden is None else inputs.clip_hidden.float()
    if family == known.STANDARD:
        assert inputs.clip_embeds is not None
        return standard_tokens(weights, inputs.clip_embeds.float())
    if family in (known.PLUS, known.FULL_FACE):
        assert hidden is not None
        return plus_tokens(weights, hidden) if family == known.PLUS else full_face_tokens(weights, hidden)
    embedding = entering_embedding(adapter.recognised, inputs)
    if family in (known.FACEID, known.PORTRAIT):
        return faceid_tokens(weights, embedding)
    if family in (known.FACEID_PLUS, known.FACEID_PLUS_V2):
        assert hidden is not None
        shortcut = family == known.FACEID_PLUS_V2
        return faceid_plus_tokens(weights, embedding, hidden, shortcut=shortcut, structure=structure)
    if family == known.INSTANTID:
        return instantid_tokens(weights, averaged(embedding, reference_weights))
    if family == known.PORTRAIT_UNNORM:
        return instantid_tokens(weights, embedding)
    assert inputs.eva_embed is not None
    condition = identity_condition(embedding, inputs.eva_embed)
    levels = [level.float() for level in inputs.eva_hidden]
    if family == known.PULID_V1:
        return joined_v1_tokens(pulid_v1_tokens(weights, condition, levels, adapter.recognised.layers.context))
    stacked = [level.flatten(0, 1)[None] for level in levels]
    return pulid_v11_tokens(weights, condition[None], stacked, reference_weights)


@torch.no_grad()
def token_features(
    adapter: CommunityAdapter, sites: Sequence[Site], tokens_ND: Tensor, log_weight: Tensor | None = None
) -> ReferenceFeatures:
    """Keys and values of one set of tokens `[n, D_context]` at every site, as the reference pass would hand them on.

    log_weight: `[n]`, of the tokens. Raises ValueError when the file does not have exactly the model's layers.
    """
    check_fits(adapter.recognised.layers, sites, name=adapter.name)
    tokens = tokens_ND.float()[None]
    layers = {
        path: LayerFeatures(
            F.linear(tokens, key.float()), F.linear(tokens, value.float()), tokens.shape[1], log_size=log_weight
        )
        for path, (key, value) in projections(adapter.weights, sites).items()
    }
    return ReferenceFeatures(layers)


def adapter_lora(adapter: CommunityAdapter, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The file's LoRA part for the host's LoRA loader, empty without one. Raises ValueError as `token_features`."""
    check_fits(adapter.recognised.layers, sites, name=adapter.name)
    return lora_state_dict(adapter.weights, sites)

"""From masks in image space to weights per query token, at every level of a UNet.

Legend: I identities, H W image pixels, h w token grid, Q = h*w query tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LATENT_SCALE = 8  # image pixels per latent pixel, SD1.5 and SDXL alike
BORDER = 1e-3  # pixels; a view's border this near a pixel's is that pixel's

View = tuple[float, float, float, float]
"""(top, left, bottom, right) of a part of the picture, as fractions of the whole."""


def halve(size: int) -> int:
    """Size after one stride-2, padding-1, kernel-3 convolution: the UNet rounds odd sizes up."""
    return (size + 1) // 2


def grid_at_level(latent_hw: tuple[int, int], level: int) -> tuple[int, int]:
    """Token grid (h, w) after `level` downsamplings of a latent of size `latent_hw`.

    Integer arithmetic only: for a 45x128 latent, two levels down, the truth is 12x32 and no square root finds it.
    """
    h, w = latent_hw
    for _ in range(level):
        h, w = halve(h), halve(w)
    return h, w


def levels_between(full_hw: tuple[int, int], grid_hw: tuple[int, int], most: int = 8) -> int:
    """Number of downsamplings that lead from `full_hw` to `grid_hw`.

    Raises ValueError when no number does (a host that pads or crops between the levels).
    """
    for level in range(most + 1):
        if grid_at_level(full_hw, level) == tuple(grid_hw):
            return level
    raise ValueError(
        f"a token grid of {grid_hw[0]}x{grid_hw[1]} does not follow from a latent of {full_hw[0]}x{full_hw[1]} by "
        "halving; this model is not an SD1.5 or SDXL UNet"
    )


def masks_to_tokens(masks_IHW: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Share of every token cell that each mask covers.

    Receives: masks `[I, H, W]` in [0, 1], grid `(h, w)`.
    Returns: `[I, h*w]` in [0, 1], float32. Along each axis, cells are averages of the pixels they touch when the grid
    is coarser than the mask, and interpolated when it is finer. No pixel is skipped, so no mask is lost.
    """
    masks = masks_IHW.float()[None]
    size = masks.shape[-2:]
    finer = (max(grid_hw[0], size[0]), max(grid_hw[1], size[1]))
    if finer != tuple(size):
        masks = F.interpolate(masks, size=finer, mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(masks, grid_hw)[0].flatten(1).clamp(0.0, 1.0)


def view_masks(masks_IHW: Tensor, view: View) -> Tensor:
    """The part of image-space masks that a view of the picture shows: of a tile, or of the crop around a face.

    Receives: masks `[I, H, W]`; the view, its borders anywhere in a pixel. Returns: masks `[I, h, w]` with the view's
    borders as edges and cells no larger than the pixels were. Where the borders are pixel borders these are the pixels
    themselves, else each cell is the mean of what it covers. What lies outside the picture is nobody's.
    Raises ValueError for a view without height or width.
    """
    top, left, bottom, right = view
    height, width = masks_IHW.shape[-2:]
    if not (top < bottom and left < right):
        raise ValueError(f"a part of a picture reaches from {(top, left)} to {(bottom, right)}: it shows nothing")
    rows, columns = (top * height, bottom * height), (left * width, right * width)
    whole = [_whole_pixels(span, size) for span, size in ((rows, height), (columns, width))]
    if whole[0] is not None and whole[1] is not None:
        return masks_IHW[:, whole[0], whole[1]]
    seen_rows, seen_columns = _shares(rows, height).to(masks_IHW.device), _shares(columns, width).to(masks_IHW.device)
    return seen_rows @ masks_IHW.float() @ seen_columns.T


def seen_elsewhere(masks_IHW: Tensor, view: View) -> Tensor:
    """Which identities also have a place outside the view: bool `[I]`."""
    top, left, bottom, right = view
    height, width = masks_IHW.shape[-2:]
    rows = _overlaps((top * height, bottom * height), 1, height)[0]
    columns = _overlaps((left * width, right * width), 1, width)[0]
    outside = 1.0 - rows[:, None] * columns
    return (masks_IHW.float() * outside.to(masks_IHW.device)).sum((1, 2)) > BORDER


def _whole_pixels(span: tuple[float, float], size: int) -> slice | None:
    start, stop = round(span[0]), round(span[1])
    near = max(abs(span[0] - start), abs(span[1] - stop)) < BORDER
    return slice(start, stop) if near and 0 <= start < stop <= size else None


def _shares(span: tuple[float, float], size: int) -> Tensor:
    """`[n, size]`: of which pixels each of n equal cells of a span is the mean."""
    cells = max(1, math.ceil(span[1] - span[0] - BORDER))
    return _overlaps(span, cells, size) * (cells / (span[1] - span[0]))


def _overlaps(span: tuple[float, float], cells: int, size: int) -> Tensor:
    """`[cells, size]`: length of each pixel within each of the span's equal cells."""
    edges = torch.linspace(span[0], span[1], cells + 1, dtype=torch.float64)
    pixels = torch.arange(size, dtype=torch.float64)
    upper = torch.minimum(edges[1:, None], pixels + 1)
    return (upper - torch.maximum(edges[:-1, None], pixels)).clamp_min(0.0).float()


def exclusive_tokens(coverage_IQ: Tensor, grid_hw: tuple[int, int], elsewhere_I: Tensor | None = None) -> Tensor:
    """Hard ownership: every token belongs to one identity or to the background (METHOD 1.4).

    Receives: coverage `[I, Q]` in [0, 1] from `masks_to_tokens` on the same grid; for a view of a larger picture bool
    `[I]` from `seen_elsewhere`. Returns: `[I, Q]` of zeros and ones.

    A token goes to the identity that covers most of it, if that is at least half of the cell; between equals to the
    smaller identity. An identity whose mask covers something but wins no token takes the token it covers most, or the
    nearest to it that is not another's only one: a face never vanishes, however small, as long as there are as many
    tokens as identities; whose place reaches out of the view has tokens there. The order of the identities does not
    matter.
    """
    order = _by_looks(coverage_IQ)
    coverage = coverage_IQ[order]
    owner_Q, background = _owners(coverage)
    owned = torch.zeros_like(coverage)
    owned.scatter_(0, owner_Q[None], (~background).to(owned.dtype)[None])
    elsewhere = None if elsewhere_I is None else elsewhere_I.to(coverage.device)[order]
    for i in _vanished(coverage, owned, elsewhere):
        _give_one_token(owned, coverage, i, grid_hw)
    return torch.empty_like(owned).index_copy_(0, torch.tensor(order, device=owned.device), owned)


def _by_looks(coverage_IQ: Tensor) -> list[int]:
    """An order of the identities that depends on their masks alone, smallest first; it decides all ties."""
    rows = coverage_IQ.tolist()
    return sorted(range(len(rows)), key=lambda i: (sum(rows[i]), rows[i]))


def _owners(coverage_IQ: Tensor) -> tuple[Tensor, Tensor]:
    best, owner = coverage_IQ.max(dim=0)
    return owner, best < 0.5


def _vanished(coverage_IQ: Tensor, owned_IQ: Tensor, elsewhere_I: Tensor | None) -> list[int]:
    lost = (coverage_IQ.sum(1) > 0) & (owned_IQ.sum(1) == 0)
    if elsewhere_I is not None:
        lost &= ~elsewhere_I
    # The faintest identity chooses last.
    order = coverage_IQ.amax(1).argsort(descending=True, stable=True)
    return [int(i) for i in order if bool(lost[i])]


def _give_one_token(owned_IQ: Tensor, coverage_IQ: Tensor, i: int, grid_hw: tuple[int, int]) -> None:
    counts = owned_IQ.sum(1)
    holder = owned_IQ.argmax(0)
    free = (owned_IQ.sum(0) == 0) | (counts[holder] > 1)  # never take another identity's last token
    if not bool(free.any()):
        return
    near = -_distance(int(coverage_IQ[i].argmax()), grid_hw).to(coverage_IQ)
    rank = torch.where(coverage_IQ[i] > 0, coverage_IQ[i], near)  # covered tokens by how much, then the nearest
    token = int(torch.where(free, rank, rank.new_tensor(-torch.inf)).argmax())
    owned_IQ[:, token] = 0
    owned_IQ[i, token] = 1


def _distance(token: int, grid_hw: tuple[int, int]) -> Tensor:
    """Squared distance `[Q]` of every token from one, in cells."""
    h, w = grid_hw
    rows, columns = torch.arange(h) - token // w, torch.arange(w) - token % w
    return (rows[:, None] ** 2 + columns[None] ** 2).flatten()

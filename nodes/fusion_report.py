"""The self-check line of FusedIDAttentionPatch: what is patched, with how much, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

from ..attention.cache import MIB
from .fusion_plan import FusionPlan, ReferencePass, features_bytes, share_left
from .host.kernel import kernel_name
from .reference_cache import CACHE


def fusion_report(plan: FusionPlan, notes: Sequence[str], itemsize: int) -> str:
    """For example `16 of 16 layers, 1 reference, 44.1 MiB, kernel attention_pytorch, fused`, then a line per note.

    itemsize: bytes per number that the model computes in.
    """
    count = sum(one.pictures for one in plan.shown)
    routed = plan.routed
    routing = [] if routed is None else [f"{len(routed.identities)} people routed (background {routed.background})"]
    where = [] if plan.attention == "attn2" else ["in self-attention"]
    facts = [
        f"{len(plan.active)} of {len(plan.sites)} layers",
        f"{count} reference{'s' * (count != 1)}",
        f"{features_bytes(plan, itemsize) / MIB:.1f} MiB{_form(plan)}",
        f"kernel {kernel_name()}",
        plan.combine,
        *where,
        *routing,
    ]
    stats = CACHE.stats()
    held = f"{stats.entries} entries, {stats.mib:.1f} of {stats.budget_mib:.0f} MiB, {stats.hits} hits"
    return "\n".join([", ".join(facts), *notes, f"cache before this run: {held}"])


def _form(plan: FusionPlan) -> str:
    """How the features are kept, where it is not as the model computes them."""
    faces = plan.faces
    if not isinstance(faces, ReferencePass):
        return ""
    words = [" in fp8"] if faces.storage.precision == "fp8" else []
    words += [" in RAM"] if faces.storage.place == "cpu" else []
    words += [f" ({share_left(plan):.0%} of the tokens)"] if faces.share < 1 else []
    return "".join(words)

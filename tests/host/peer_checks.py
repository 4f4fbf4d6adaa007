"""How a cell of the matrix is decided: the runs, the right value, what must not have changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fusion_lab
import torch
from peer_matrix import ATTN1, FORMS, PLAIN, SAID_TO_ALL, Cell, Graph, Kit, Predictions, Row, Seen, size
from torch import Tensor

from attention.fusion import FaceKeys, length_term
from attention.grid import grid_at_level
from attention.naive import naive_fused_attention

NOTHING, LEAST = 1e-5, 1e-4
OURS_FIRST, THEIRS_FIRST = "ours first", "theirs first"


class Trial:
    """A row beside a form."""

    def __init__(self, kit: Kit, row: Row, form: str) -> None:
        self.kit, self.row, self.form = kit, row, form
        self.base = kit.graph.having(**row.base)
        key: tuple[Any, ...] = tuple(sorted(row.base.items()))
        if row.prompts is not None:
            self.base, key = kit.kept(("prompts", row.id), lambda: row.prompts(kit, self.base)), (*key, row.id)
        self.plain: Seen = kit.kept(("plain", key), lambda: kit.run(self.base))
        self.mine: Seen = kit.kept((form, key), lambda: kit.run(kit.ours(form, self.base)))
        self.theirs: Seen = kit.kept(("theirs", row.id), lambda: kit.run(row.install(kit, self.base)))

    def orders(self) -> Iterator[tuple[str, Graph, Graph]]:
        """(name, what is there first, both). Everything is installed twice: nothing may add up."""
        mine = self.kit.ours(self.form, self.base)
        self._install(mine) if self.row.twice else self.kit.run(self.base)
        yield OURS_FIRST, mine, self._install(mine)
        if self.row.model:
            if not self.row.twice:
                self.kit.run(self.base)
            theirs = self._install(self.base)
            self.kit.ours(self.form, theirs)
            yield THEIRS_FIRST, theirs, self.kit.ours(self.form, theirs)

    def _install(self, graph: Graph) -> Graph:
        return self.row.install(self.kit, graph)

    def cells(self) -> list[Cell]:
        """Runs the row in every order."""
        self._require_effects()
        found, results = [], []
        for order, upstream, both in self.orders():
            words = self.row.refused.get((self.form, order))
            if words is not None:
                found.append(self._refused(order, both, words))
                continue
            got = self.kit.run(both)
            problems = list(self._problems(got))
            error = self._error(got, results[0] if results else None)
            if self.form == "fused" and self.row.check == "orders" and self.row.formula:
                error = max(error, formula_error(self.kit, both))
            if error > self.row.tolerance:
                problems.append(f"off by {error:.1e} of a contribution")
            alone = self.mine if order == OURS_FIRST else self.theirs
            if not torch.equal(self.kit.run(upstream).samples, alone.samples):
                problems.append("the graph before it changed")
            if self.form == "fused" and not torch.equal(self.kit.run(both).samples, got.samples):
                problems.append("a second run differs")
            found.append(self._cell(order, got, error, problems))
            results.append(got)
        if not torch.equal(self.kit.run(self.base).samples, self.plain.samples):
            found = [replace(cell, verdict="the plain model changed") for cell in found]
        return found

    def _refused(self, order: str, both: Graph, words: str) -> Cell:
        """A pair that cannot work must say so, and who is in the way."""
        try:
            self.kit.run(both)
        except ValueError as error:
            verdict = "ok (refused)" if words in str(error) else f"refused without {words!r}: {error}"
        else:
            verdict = "runs, where it cannot be right"
        return Cell(self.row.id, self.form, order, "refused", 0.0, 0.0, 0.0, verdict)

    def _require_effects(self) -> None:
        least = LEAST * size(self.plain.samples)
        assert size(self.mine.samples - self.plain.samples) > least, "ours does nothing here"
        if self.row.check != "same":
            assert size(self.theirs.samples - self.plain.samples) > least, f"{self.row.id} does nothing here"

    def _cell(self, order: str, got: Seen, error: float, problems: list[str]) -> Cell:
        theirs, mine = (size(one.samples - self.plain.samples) for one in (self.theirs, self.mine))
        return Cell(
            self.row.id, self.form, order, self.row.check,
            theirs=size(got.samples - self.mine.samples) / theirs if theirs else 0.0,
            ours=size(got.samples - self.theirs.samples) / mine,
            error=error, verdict="; ".join(problems) or "ok",
        )  # fmt: skip

    def _problems(self, got: Seen) -> Iterator[str]:
        least = LEAST * size(self.plain.samples)
        if self.row.check != "same" and size(got.samples - self.mine.samples) < least:
            yield "theirs is lost"
        if size(got.samples - self.theirs.samples) < least:
            yield "ours is lost"
        if self.row.negative_is_theirs and self.form not in SAID_TO_ALL and self.theirs.uncond is not None:
            change = size(got.uncond - self.theirs.uncond) / size(self.theirs.uncond)
            if change > NOTHING:
                yield f"the negative prompt sees the face ({change:.1e})"
        for attention in self.row.first:
            for role in ("positive", "negative"):
                if (attention, role) in self.mine.layers:
                    change = self._layer(got, self.mine, attention, role)
                    if change > self.row.tolerance:
                        yield f"{role} {attention} of the first layer is not ours ({change:.1e})"

    def _layer(self, got: Seen, wanted: Seen, attention: str, role: str) -> float:
        a, b = got.layers[attention, role], wanted.layers[attention, role]
        return size(a - b) / size(b)

    def _error(self, got: Seen, other_order: Seen | None) -> float:
        if self.row.check == "value":
            return self._off(got.samples, self._value(self.form))
        if self.row.check == "same":
            return self._off(got.samples, self.mine.samples)
        if self.row.check == "layers":
            return self._off_layers(got)
        orders = 0.0 if other_order is None else self._off(got.samples, other_order.samples)
        return max(orders, self._layer_error(got) if self.row.check == "adds" else 0.0)

    def _off(self, got: Tensor, wanted: Tensor) -> float:
        contributions = [size(wanted - one.samples) for one in (self.mine, self.theirs)]
        smallest = min([c for c in contributions if c > 0] or [size(wanted)])
        if self.row.check == "same":
            smallest = size(self.mine.samples - self.plain.samples)
        return size(got - wanted) / smallest

    def _value(self, form: str) -> Tensor:
        """The composition by hand; it must explain what they do alone, or it is no judge."""
        value = self.row.value
        assert value is not None
        plain = Predictions(self.kit, PLAIN, self.base)
        alone = self.kit.kept(("value", self.row.id), lambda: value(self.kit, plain))
        wrong = size(alone - self.theirs.samples) / max(size(self.theirs.samples - self.plain.samples), 1e-12)
        assert wrong < self.row.tolerance, f"the value by hand is not what {self.row.id} does alone ({wrong:.1e})"
        return value(self.kit, Predictions(self.kit, form, self.base))

    def _off_layers(self, got: Seen) -> float:
        assert self.row.layers is not None
        by_hand = self.row.layers(self.kit, Predictions(self.kit, PLAIN, self.base))
        wanted = self.row.layers(self.kit, Predictions(self.kit, self.form, self.base))
        errors = []
        for key, alone in by_hand.items():
            wrong = size(alone - self.theirs.layers[key]) / size(alone)
            assert wrong < self.row.tolerance, f"the layer by hand is not what {self.row.id} does alone ({wrong:.1e})"
            errors.append(size(got.layers[key] - wanted[key]) / size(wanted[key]))
        return max(errors)

    def _layer_error(self, got: Seen) -> float:
        """At the first transformer all runs have the same input, so contributions must add up exactly."""
        errors = []
        for role in ("positive", "negative"):
            plain, mine, theirs = (one.layers for one in (self.plain, self.mine, self.theirs))
            if self.form in ATTN1:
                key = ("attn1", role)
                errors.append(size(got.layers[key] - mine[key]) / size(mine[key]))
                continue
            key = ("attn2", role)
            wanted = mine[key] + theirs[key] - plain[key]
            changes = [size(one[key] - plain[key]) for one in (mine, theirs)]
            smallest = min([c for c in changes if c > LEAST * size(wanted)] or [size(wanted)])
            errors.append(size(got.layers[key] - wanted) / smallest)
        return max(errors)


def formula_error(kit: Kit, graph: Graph) -> float:
    """How far the first and the last layer are from METHOD 1.1 by hand, whatever the other pack made of their inputs.

    Read at the layers' projections. Rows of the positive prompts see text and face, all others text alone.
    """
    features = kit.kept("features", lambda: fusion_lab.features_by_hand(kit.lab, kit.person))
    sites, names, errors = kit.lab.sites, {}, []
    for site in (sites[0], sites[-1]):
        calls = fusion_lab.record(
            graph.model, site.key, "attn2", lambda model: names.update(kit.run(graph.having(model=model)).names)
        )
        assert calls
        for call in calls:
            prompts = call.options["uuids"]
            each = len(call.q) // len(prompts)
            for i, prompt in enumerate(prompts):
                rows = slice(i * each, (i + 1) * each)
                seen = names.get(prompt) == "positive"
                wanted = _by_hand(site, call, rows, [found[site.path] for found in features] if seen else [])
                errors.append(size(call.out[rows] - wanted) / size(wanted))
    return max(errors)


def _by_hand(site: Any, call: Any, rows: slice, faces: list[tuple[Tensor, Tensor]]) -> Tensor:
    trained, num = math.prod(grid_at_level(fusion_lab.LATENT, site.level)), len(faces)
    terms = [length_term("balanced", num_tokens=k.shape[1], num_references=num, num_trained=trained) for k, _ in faces]
    keys = [FaceKeys(key, value, 0, term) for (key, value), term in zip(faces, terms)]
    text = slice(0, 77)  # the host repeats it to the length of the longest text in the call
    return naive_fused_attention(call.q[rows], call.k[rows, text], call.v[rows, text], keys, heads=site.heads)


def markdown(cells: list[Cell]) -> str:
    """A line per row with the largest error of each form, then a line per cell."""
    rows = list(dict.fromkeys(cell.row for cell in cells))
    lines = [
        f"| node | right value | {' | '.join(FORMS)} | theirs | ours |",
        f"|---|---|{'---|' * len(FORMS)}---|---|",
    ]
    for row in rows:
        found = [cell for cell in cells if cell.row == row]
        forms = [_summary([cell for cell in found if cell.form == form]) for form in FORMS]
        checks = " / ".join(dict.fromkeys(cell.check for cell in found if cell.check != "refused"))
        ratios = [
            _span([getattr(cell, who) for cell in found if cell.check != "refused"]) for who in ("theirs", "ours")
        ]
        lines.append(f"| {row} | {checks} | {' | '.join(forms)} | {' | '.join(ratios)} |")
    lines += [
        "",
        "| node | form of ours | order | right value | theirs | ours | error | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.row} | {c.form} | {c.order} | {c.check} | {c.theirs:.2f} | {c.ours:.2f} | {c.error:.1e} | {c.verdict} |"
        for c in cells
    ]
    return "\n".join(lines) + "\n"


def _summary(cells: list[Cell]) -> str:
    """The largest error of a form in a row, or what was not right."""
    if not cells:
        return ""
    wrong = [f"**{cell.order}: {cell.verdict}**" for cell in cells if not cell.verdict.startswith("ok")]
    if wrong:
        return "; ".join(wrong)
    if cells[0].check == "orders" and len(cells) == 1 and cells[0].form != "fused":
        return "acts"  # nothing to compare with: both act, and nothing else changed
    return "refused" if cells[0].check == "refused" else f"{max(cell.error for cell in cells):.0e}"


def _span(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values, default=0.0), max(values, default=0.0)))
    return low if low == high else f"{low}-{high}"

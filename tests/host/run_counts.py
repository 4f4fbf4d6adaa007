"""Which tests of one kind ran, which were skipped and why: in a sentence for people, in a file for dev.py."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

RAN = ("passed", "failed", "error", "xfailed", "xpassed")
REASON_LENGTH = 100
DEV_FILE = os.environ.pop("FUSEDID_COUNTS", None)  # of this run, not of a pytest that a test starts


def run_and_skipped(stats: Mapping[str, Sequence[Any]], tests: Collection[str]) -> tuple[int, Counter[str]]:
    """How many of `tests` (node ids) ran, and the others by the reason of their skip. stats: pytest's reports."""
    ran = {report.nodeid for kind in RAN for report in stats.get(kind, ())} & set(tests)
    reasons = {report.nodeid: skip_reason(report) for report in stats.get("skipped", ()) if report.nodeid in tests}
    return len(ran), Counter(reason for test, reason in reasons.items() if test not in ran)


def skip_reason(report: Any) -> str:
    """The message up to its remedy, which pytest's own summary shows."""
    message = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return message.removeprefix("Skipped: ").split(": ")[0].splitlines()[0][:REASON_LENGTH]


def sentence(ran: int, skipped: Counter[str]) -> str:
    """`812 ran, 4 skipped (2: needs a GPU; 2: no ComfyUI_X in /peers)`, the most frequent reason first."""
    reasons = "; ".join(f"{number}: {reason}" for reason, number in skipped.most_common())
    return f"{ran} ran, {skipped.total()} skipped" + (f" ({reasons})" if reasons else "")


def tell_dev(line: str, ran: int, *, possible: bool) -> None:
    """Appends to the file that dev.py named, so that it can repeat the line at the end and judge it."""
    if DEV_FILE:
        with Path(DEV_FILE).open("a", encoding="utf-8") as counts:
            counts.write(json.dumps({"line": line, "ran": ran, "possible": possible}) + "\n")

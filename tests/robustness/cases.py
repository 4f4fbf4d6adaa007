"""How many hostile cases run, and what became of them: shown at the end of the run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from guard import limited_memory, limited_time
from hypothesis import HealthCheck, settings

VARIABLE = "FUSEDID_HOSTILE_CASES"
"""Cases per target; every target also has a small number of its own, which counts when this is not set."""
OUTCOMES: dict[str, Counter[str]] = {}
Test = TypeVar("Test", bound=Callable[..., Any])


def hostile(default: int, share: float = 1.0) -> Callable[[Test], Test]:
    """Settings of one target. share: of the wished number of cases, for targets whose cases are slow."""
    wished = os.environ.get(VARIABLE)
    # The small number is the same cases in every run, so that an unrelated change never fails by luck.
    return settings(
        max_examples=max(1, round(int(wished) * share)) if wished else default,
        derandomize=not wished,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(target: str, name: str, read: Callable[[], Any]) -> Any:
    """Runs one case: it gives something, or a ValueError with a message that names the file. Returns None when refused.

    Everything else that is raised fails the test.
    """
    counts = OUTCOMES.setdefault(target, Counter())
    with limited_time(), limited_memory():
        try:
            result = read()
        except ValueError as error:
            assert type(error) is ValueError, f"a bare {type(error).__name__} reached the user: {error}"
            assert name in str(error), f"the message does not name {name}: {error}"
            counts["refused"] += 1
            return None
    counts["accepted"] += 1
    return result

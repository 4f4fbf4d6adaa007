"""Makes the helpers beside the tests importable, and tells how many hostile cases ran."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import cases


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for target, counts in sorted(cases.OUTCOMES.items()):
        terminalreporter.write_line(f"HOSTILE CASES: {target}: {sum(counts.values())} ({dict(counts)})")
    total = sum(sum(counts.values()) for counts in cases.OUTCOMES.values())
    if total:
        terminalreporter.write_line(f"HOSTILE CASES: {total} in all", bold=True)

"""When the identity acts: both ends belong to the window."""

from __future__ import annotations

import math

import pytest

from attention.schedule import Window, check_percents


@pytest.mark.parametrize(
    ("sigma", "inside"),
    [
        (10.0, True),
        (2.0, True),
        (5.0, True),
        (math.nextafter(10.0, 11.0), False),
        (math.nextafter(2.0, 1.0), False),
        (0.0, False),
        (math.inf, False),
        (math.nan, False),
    ],
)
def test_both_ends_are_inside(sigma: float, inside: bool) -> None:
    assert Window(sigma_start=10.0, sigma_end=2.0).contains(sigma) is inside


def test_the_default_window_is_the_whole_run() -> None:
    assert Window().always
    assert all(Window().contains(sigma) for sigma in (0.0, 1e-9, 14.6, 1e9, math.inf))


@pytest.mark.parametrize("window", [Window(10.0, 0.0), Window(math.inf, 0.1), Window(10.0, 10.0)])
def test_a_bounded_window_is_not_always_open(window: Window) -> None:
    assert not window.always


def test_an_empty_run_contains_its_one_noise_level_only() -> None:
    window = Window(3.0, 3.0)
    assert window.contains(3.0) and not window.contains(3.1) and not window.contains(2.9)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.0), (1.0, 1.0), (0.3, 0.3), (0.2, 0.8)])
def test_percents_in_order_are_accepted(start: float, end: float) -> None:
    check_percents(start, end)


@pytest.mark.parametrize(
    ("start", "end"), [(-0.1, 1.0), (0.0, 1.1), (0.8, 0.2), (math.nan, 1.0), (0.0, math.nan), (0.0, math.inf)]
)
def test_other_percents_are_refused(start: float, end: float) -> None:
    with pytest.raises(
        ValueError, match=rf"start_percent is {start:g} and end_percent {end:g}; both lie between 0 and 1"
    ):
        check_percents(start, end)

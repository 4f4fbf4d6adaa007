"""The numbers of an evaluation against known answers."""

from __future__ import annotations

import numpy as np
import pytest

from faces.similarity import PictureScore, confidence, leakage, separation
from training.evaluate.aggregate import unit_means
from training.evaluate.bootstrap import Estimate, estimate, paired_difference
from training.evaluate.copy_paste import copy_paste
from training.evaluate.pixel_metrics import psnr, psnr_wrapped_uint8, ssim
from training.evaluate.plan import bands, check_slugs, slug
from training.evaluate.timing import fit_line


@pytest.fixture(scope="module")
def unrelated() -> list[np.ndarray]:
    """Crops of natural pictures that have nothing to do with each other."""
    data = pytest.importorskip("skimage.data")
    pictures = [data.astronaut(), data.coffee(), data.chelsea()]
    return [picture[y : y + 112, x : x + 112] for picture in pictures for y in (0, 112) for x in (0, 112, 224)]


def test_a_picture_compared_with_itself_is_perfect(unrelated):
    one = unrelated[0]
    assert psnr(one, one) == float("inf") and psnr_wrapped_uint8(one, one) == float("inf")
    assert ssim(one, one) == pytest.approx(1.0)


def test_wrapped_psnr_of_unrelated_pictures_is_28_dB_where_the_true_one_is_about_10(unrelated):
    pairs = [(a, b) for i, a in enumerate(unrelated) for j, b in enumerate(unrelated) if i // 6 < j // 6]
    assert np.mean([psnr_wrapped_uint8(a, b) for a, b in pairs]) == pytest.approx(28.0, abs=0.5)
    assert np.mean([psnr(a, b) for a, b in pairs]) == pytest.approx(9.8, abs=3)


def test_psnr_by_hand():
    black = np.zeros((16, 16, 3), np.uint8)
    assert psnr(black, black + 10) == pytest.approx(10 * np.log10(255**2 / 100))
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr_wrapped_uint8(black, black + 255) == pytest.approx(10 * np.log10(255**2))  # (-255) ** 2 wraps to 1


def test_pictures_of_different_shape_are_refused(unrelated):
    for measure in (psnr, psnr_wrapped_uint8, ssim):
        with pytest.raises(ValueError, match=r"uint8 pictures of one shape .* got uint8 \[112, 112, 3\]"):
            measure(unrelated[0], unrelated[0][:100])


def test_copy_paste_is_1_for_the_reference_and_minus_1_for_the_unseen_photo():
    reference, unseen, nobody = np.eye(3, dtype=np.float32)
    assert copy_paste(reference, unseen, reference) == pytest.approx(1)
    assert copy_paste(unseen, unseen, reference) == pytest.approx(-1)
    assert copy_paste(reference + unseen, unseen, reference) == pytest.approx(0, abs=1e-6)
    assert copy_paste(nobody, unseen, reference) == pytest.approx(0, abs=1e-6)
    assert copy_paste(nobody, reference, reference) is None


def test_the_interval_covers_the_true_mean_about_19_times_of_20():
    rng = np.random.default_rng(1)
    runs = [estimate(rng.normal(0.4, 0.2, 30), resamples=400, seed=n) for n in range(300)]
    covered = np.mean([run.low <= 0.4 <= run.high for run in runs])
    assert 0.88 <= covered <= 0.98


def test_an_interval_is_the_same_for_the_same_seed_and_absent_for_one_person():
    values = [0.1, 0.5, 0.4, 0.9]
    assert estimate(values, resamples=500, seed=3) == estimate(values, resamples=500, seed=3)
    assert estimate(values, resamples=500, seed=3) != estimate(values, resamples=500, seed=4)
    assert estimate([0.5], resamples=100, seed=0) == Estimate(0.5, None, None, 1)
    assert estimate([], resamples=100, seed=0) is None


def test_pairing_finds_a_small_gain_that_the_two_intervals_hide():
    people = np.random.default_rng(0).uniform(0, 1, 20)
    ours = {n: float(value + 0.05 + 0.01 * (n % 2)) for n, value in enumerate(people)}
    theirs = {n: float(value) for n, value in enumerate(people)}
    gain = paired_difference(ours, {**theirs, 99: 1.0}, resamples=1000, seed=0)
    assert gain.count == 20 and gain.mean == pytest.approx(0.055) and gain.excludes_zero
    apart = [estimate(list(values.values()), resamples=1000, seed=0) for values in (ours, theirs)]
    assert apart[0].overlaps(apart[1])
    assert apart[0].overlaps(Estimate(0, None, None, 1)) is None


def test_people_are_averaged_before_the_interval():
    records = [{"unit": 0, "x": 1.0}, {"unit": 0, "x": 0.0}, {"unit": 1, "x": 1.0}, {"unit": 2, "x": None}]
    assert unit_means(records, "x") == {0: 0.5, 1: 1.0}


def two_people(table: list[list[float]], chosen: tuple[int | None, ...], embeddings: list[list[float]]) -> PictureScore:
    cosines = tuple(0.0 if face is None else table[i][face] for i, face in enumerate(chosen))
    return PictureScore((), chosen, cosines, np.float32(table), np.float32(embeddings))


def test_leakage_separation_and_confidence_by_hand():
    score = two_people([[0.8, 0.3], [0.2, 0.6]], (0, 1), [[1, 0, 0], [0, 1, 0]])
    strangers = np.float32([[0.1, 0, np.sqrt(0.99)], [0.3, 0, np.sqrt(0.91)]])
    assert separation(score, 0) == pytest.approx(0.8 - 0.2)
    assert separation(score, 1) == pytest.approx(0.6 - 0.3)
    assert leakage(score, 0, strangers) == pytest.approx(0.2 - 0.2, abs=1e-6)
    assert leakage(score, 1, strangers) == pytest.approx(0.3 - 0.0, abs=1e-6)
    assert confidence(score, 0) == pytest.approx(1 - 0.2 / 0.8)
    assert confidence(score, 1) == pytest.approx(1 - 0.3 / 0.6)


def test_who_is_not_there_leaks_nothing():
    score = two_people([[0.8], [0.2]], (0, None), [[1, 0, 0]])
    strangers = np.eye(3, dtype=np.float32)
    assert [measure(score, 1) for measure in (separation, confidence)] == [None, None]
    assert leakage(score, 1, strangers) is None and leakage(score, 0, strangers[:0]) is None
    alone = PictureScore((), (0,), (0.8,), np.float32([[0.8]]), np.float32([[1, 0, 0]]))
    assert (separation(alone, 0), confidence(alone, 0), leakage(alone, 0, strangers)) == (None, None, None)


def test_the_line_through_the_papers_times():
    exact = fit_line({n: [3.6 + 0.04 * n] * 2 for n in (1, 2, 4, 8, 11)})
    assert (exact.a, exact.b) == (pytest.approx(3.6), pytest.approx(0.04))
    rng = np.random.default_rng(0)
    noisy = fit_line({n: list(3.6 + 0.04 * n + rng.normal(0, 0.02, 5)) for n in (1, 2, 4, 8, 11)})
    assert noisy.b_bounds[0] < 0.04 < noisy.b_bounds[1] and noisy.count == 25
    assert fit_line({1: [1.0], 2: [1.5]}).b_bounds is None
    with pytest.raises(ValueError, match="two different numbers"):
        fit_line({2: [1.0, 1.1]})


def test_every_column_lies_in_exactly_one_band():
    masks = bands(3, 16, 100)
    assert np.array_equal(np.sum(masks, axis=0), np.ones((16, 100))) and [m[0].sum() for m in masks] == [33, 34, 33]


def test_rows_with_one_folder_are_refused():
    assert slug("4 references, paper length") == "4_references_paper_length"
    with pytest.raises(ValueError, match="would share one folder"):
        check_slugs(["a b", "a?b"])

"""The reference cache: least recently used first out, bounded in MiB, one computation per key even among threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from attention.cache import MIB, CacheStats, LayerFeatures, ReferenceCache, ReferenceFeatures

MIB_TOKENS = MIB // (2 * 4 * 64)  # tokens of 64 channels whose float32 keys and values take one MiB
PATIENCE = 300.0
"""Seconds after which threads count as deadlocked; a busy machine may keep them waiting."""


def features(mib: float = 1.0) -> ReferenceFeatures:
    tokens = round(mib * MIB_TOKENS)
    layer = LayerFeatures(torch.zeros(1, tokens // 2, 64), torch.zeros(1, tokens // 2, 64), num_trained=1)
    return ReferenceFeatures({"a": layer, "b": layer})


class Computer:
    """Computes features and counts how often."""

    def __init__(self, mib: float = 1.0) -> None:
        self.mib, self.calls = mib, 0

    def __call__(self) -> ReferenceFeatures:
        self.calls += 1
        return features(self.mib)


def fill(cache: ReferenceCache, *keys: str, mib: float = 1.0) -> list[int]:
    """Asks for the keys in order; returns how often each was computed."""
    computers = [Computer(mib) for _ in keys]
    for key, computer in zip(keys, computers):
        cache.get(key, computer)
    return [computer.calls for computer in computers]


def test_features_count_their_keys_and_values() -> None:
    assert features(1.0).num_bytes == MIB
    half = features(1.0).to(torch.device("cpu"), torch.float16)
    assert half.num_bytes == MIB // 2 and half.layers["a"].num_trained == 1


def test_an_entry_is_computed_once() -> None:
    cache, computer = ReferenceCache(8), Computer()
    first = cache.get("a", computer)
    assert cache.get("a", computer) is first and computer.calls == 1
    assert cache.stats() == CacheStats(entries=1, mib=1.0, budget_mib=8.0, hits=1, misses=1)


def test_the_least_recently_used_leaves_first() -> None:
    cache = ReferenceCache(3)
    fill(cache, "a", "b", "c")
    assert fill(cache, "a", "d") == [0, 1]  # b is the oldest now and leaves
    assert fill(cache, "c", "a", "d", "b") == [0, 0, 0, 1]
    assert cache.stats().entries == 3


def test_the_budget_is_never_exceeded() -> None:
    cache = ReferenceCache(2.5)
    for number in range(20):
        fill(cache, str(number), mib=0.25 + number % 4 / 2)
        assert cache.stats().mib <= 2.5
    assert cache.stats().entries >= 1


def test_an_entry_larger_than_the_budget_is_handed_out_but_not_kept() -> None:
    cache = ReferenceCache(2)
    large = Computer(3.0)
    assert cache.get("large", large).num_bytes == 3 * MIB
    assert cache.stats().entries == 0
    cache.get("large", large)
    assert large.calls == 2


def test_an_entry_larger_than_the_budget_does_not_drive_out_the_others() -> None:
    cache = ReferenceCache(2)
    fill(cache, "a", "b")
    fill(cache, "large", mib=3.0)
    assert fill(cache, "a", "b") == [0, 0]


def test_a_smaller_budget_takes_effect_at_once() -> None:
    cache = ReferenceCache(4)
    fill(cache, "a", "b", "c", "d")
    cache.set_budget(2)
    assert cache.stats() == CacheStats(entries=2, mib=2.0, budget_mib=2.0, hits=0, misses=4)
    assert fill(cache, "c", "d") == [0, 0]
    cache.set_budget(0)
    assert cache.stats().entries == 0


def test_drop_forgets_what_matches() -> None:
    cache = ReferenceCache(8)
    for model in (0, 1):
        for name in "ab":
            cache.get((model, name), Computer())
    assert cache.drop(lambda key: key[0] == 0) == 2
    assert cache.drop(lambda key: key[0] == 0) == 0
    assert cache.stats().entries == 2
    kept, gone = Computer(), Computer()
    cache.get((1, "a"), kept)
    cache.get((0, "a"), gone)
    assert (kept.calls, gone.calls) == (0, 1)


def test_a_failed_computation_leaves_nothing_and_can_be_tried_again() -> None:
    cache = ReferenceCache(8)

    def fail() -> ReferenceFeatures:
        raise RuntimeError("out of memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            cache.get("a", fail)
    assert cache.stats().entries == 0
    assert fill(cache, "a", "a") == [1, 0]


def test_a_computation_may_ask_for_another_entry() -> None:
    cache, inner = ReferenceCache(8), Computer()
    cache.get("outer", lambda: cache.get("inner", inner))
    assert cache.stats().entries == 2 and inner.calls == 1


def together(number: int, work: Callable[[int], object]) -> list[object]:
    """`work(i)` in as many threads, started at the same time; a deadlock fails instead of hanging."""
    barrier = threading.Barrier(number)

    def run(i: int) -> object:
        barrier.wait(PATIENCE)
        return work(i)

    with ThreadPoolExecutor(number) as pool:
        return [future.result(timeout=PATIENCE) for future in [pool.submit(run, i) for i in range(number)]]


@pytest.fixture
def wait_for_waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Returns once so many threads wait for another thread's computation, however long it takes them to get there."""
    waiting = threading.Semaphore(0)

    class Watched(Future):
        def exception(self, timeout: float | None = None) -> BaseException | None:
            waiting.release()
            return super().exception(timeout)

    def wait(number: int) -> None:
        assert all(waiting.acquire(timeout=PATIENCE) for _ in range(number))

    monkeypatch.setattr("attention.cache.Future", Watched)
    return wait


@pytest.mark.parametrize("mib", [1.0, 9.0], ids=["kept", "larger than the budget"])
def test_threads_that_ask_for_the_same_key_share_one_computation(
    wait_for_waiting: Callable[[int], None], mib: float
) -> None:
    cache, calls = ReferenceCache(8), []

    def slow() -> ReferenceFeatures:
        calls.append(threading.get_ident())
        wait_for_waiting(5)
        return features(mib)

    results = together(6, lambda _: cache.get("same", slow))
    assert len(calls) == 1 and all(result is results[0] for result in results)
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (5, 1)


def test_a_thread_that_waited_for_a_failure_computes_itself(wait_for_waiting: Callable[[int], None]) -> None:
    cache = ReferenceCache(8)
    calls = []

    def fails_once() -> ReferenceFeatures:
        calls.append(1)
        if len(calls) == 1:
            wait_for_waiting(3)
            raise KeyboardInterrupt
        return features()

    def work(i: int) -> object:
        try:
            return cache.get("same", fails_once)
        except KeyboardInterrupt:
            return None

    results = together(4, work)
    assert sum(result is None for result in results) == 1 and len(calls) == 2
    assert len({id(result) for result in results if result is not None}) == 1


def test_different_keys_do_not_wait_for_each_other() -> None:
    cache, met = ReferenceCache(8), threading.Barrier(2)

    def compute() -> ReferenceFeatures:
        met.wait(PATIENCE)  # only passes when both are inside at the same time
        return features()

    together(2, lambda i: cache.get(i, compute))
    assert cache.stats().entries == 2


def test_threads_leave_the_bookkeeping_consistent() -> None:
    cache = ReferenceCache(1)

    def work(i: int) -> None:
        for step in range(60):
            key = (i * 7 + step) % 11
            assert cache.get(key, Computer(0.2)).num_bytes == features(0.2).num_bytes
            if step % 10 == 9:
                cache.drop(lambda key: key == i)
            if step % 17 == 0:
                cache.set_budget(0.5 + step % 2)

    together(6, work)
    stats = cache.stats()
    assert stats.hits + stats.misses == 360 and stats.mib <= stats.budget_mib and stats.hits > 0

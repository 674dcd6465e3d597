"""The probes measure what they say, on things of known size and duration."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from earlyexit.cost.memory import peak_rss_bytes, peak_tensor_bytes
from earlyexit.cost.timing import interleaved_times, median_ratio
from earlyexit.devices import resolve_device

CPU, MIB = torch.device("cpu"), 2**20


def test_functions_are_called_in_turn_and_none_always_follows_the_same():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abcd"}
    seconds = interleaved_times(functions, CPU, repeats=40)
    assert {name: s.shape for name, s in seconds.items()} == dict.fromkeys("abcd", (40,))
    assert calls[::2] == calls[1::2]  # once untimed, right before
    calls = calls[::2]
    rounds = ["".join(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert all(sorted(order) == list("abcd") for order in rounds) and len(rounds) == 40
    for name in "abcd":
        before = [calls[i - 1] for i in range(4, len(calls)) if calls[i] == name]
        assert all(before.count(other) >= 5 for other in set("abcd") - {name})


def test_times_are_seconds_of_the_function():
    functions = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}
    seconds = interleaved_times(functions, CPU, repeats=5)
    assert all((s > 0).all() for s in seconds.values())
    assert np.median(seconds["long"]) >= 0.02
    assert np.median(seconds["short"]) < np.median(seconds["long"])


def test_ratio_of_medians_lies_in_its_interval():
    rng = np.random.default_rng(0)
    baseline, other = 2 + 0.1 * rng.random(40), 1 + 0.1 * rng.random(40)
    ratio, low, high = median_ratio(baseline, other)
    assert ratio == pytest.approx(np.median(baseline) / np.median(other))
    assert 1.8 < low <= ratio <= high < 2.1
    assert median_ratio(baseline, other) == (ratio, low, high)
    noisy = median_ratio(2 + rng.random(40), 1 + rng.random(40))
    assert noisy[2] - noisy[1] > high - low


@pytest.mark.slow
def test_peak_counts_what_is_alive_at_once():
    kept = torch.ones(4 * MIB)

    def one_after_another():
        for _ in range(3):
            torch.empty(8 * MIB, dtype=torch.uint8)

    def together():
        a = torch.empty(8 * MIB, dtype=torch.uint8)
        b = torch.empty(4 * MIB, dtype=torch.uint8)
        del a
        return b, torch.empty(2 * MIB, dtype=torch.uint8)

    assert peak_tensor_bytes(one_after_another, CPU) == 8 * MIB
    assert peak_tensor_bytes(together, CPU) == 12 * MIB
    assert peak_tensor_bytes(lambda: kept.sum(), CPU) < MIB  # it was there before
    assert peak_tensor_bytes(lambda: None, CPU) == 0


def hold(work: bool, mebibytes: int) -> None:
    """What the child process runs."""
    if work:
        torch.ones(mebibytes * MIB, dtype=torch.uint8)


@pytest.mark.slow
def test_peak_resident_memory_of_a_fresh_process():
    torch.ones(500 * MIB, dtype=torch.uint8)  # what the parent once held is not the child's
    assert peak_rss_bytes(hold, 200) == pytest.approx(200 * MIB, rel=0.2)


def fail(work: bool) -> None:
    raise SystemExit(1)


@pytest.mark.slow
def test_a_child_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="ended without"):
        peak_rss_bytes(fail)


def test_devices():
    assert resolve_device("cpu") == resolve_device(CPU) == CPU
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device().type == resolve_device("auto").type == automatic
    for name in ("abacus", "meta", "cpu:x", "xla"):
        with pytest.raises(ValueError, match=f"^device {name}: choose auto, cpu or cuda"):
            resolve_device(name)

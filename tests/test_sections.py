"""The timer of a step: what each section gets, and that the parts add up to the whole."""

from __future__ import annotations

import time

import pytest
import torch

from neuclip_scale.sections import OTHER, StepTimer, left_out, section

CPU = torch.device("cpu")


@section("decorated")
def decorated(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_time_goes_to_the_innermost_section_and_adds_up() -> None:
    began = time.perf_counter()
    with StepTimer(CPU) as timer:
        time.sleep(0.02)
        with section("outer"):
            time.sleep(0.03)
            for _ in range(2):
                with section("outer/inner"):
                    time.sleep(0.02)
            decorated(0.01)
        with section("outer"):
            time.sleep(0.03)
    whole = time.perf_counter() - began
    seconds = timer.seconds()
    assert seconds.keys() == {OTHER, "outer", "outer/inner", "decorated"}
    # A sleep is never shorter than asked for, but may be longer on a busy machine.
    for name, least in ((OTHER, 0.02), ("outer", 0.06), ("outer/inner", 0.04), ("decorated", 0.01)):
        assert seconds[name] >= least
    assert sum(seconds.values()) == pytest.approx(whole, abs=2e-3)


def test_a_section_may_contain_itself_and_end_by_an_exception() -> None:
    with StepTimer(CPU) as timer:
        with section("a"), section("a"):
            time.sleep(0.01)
        with pytest.raises(ValueError, match="no"), section("b"):
            raise ValueError("no")
        time.sleep(0.02)
    seconds = timer.seconds()
    assert seconds["a"] >= 0.01
    assert seconds["b"] < 0.01
    assert seconds[OTHER] >= 0.02


def test_what_is_left_out_counts_for_nobody() -> None:
    with StepTimer(CPU) as timer:
        with section("a"), left_out(), section("hidden"):
            time.sleep(0.05)
        with section("b"):
            time.sleep(0.01)
    seconds = timer.seconds()
    assert seconds.keys() == {OTHER, "a", "b"}
    assert sum(seconds.values()) < 0.05


def test_nothing_is_measured_outside_a_timer() -> None:
    with StepTimer(CPU) as timer:
        pass
    with section("late"), left_out():
        assert decorated(0.0) == 0.0
    assert timer.seconds().keys() == {OTHER}


def test_a_section_costs_little_without_a_timer() -> None:
    """Less than what the smallest operation on a tensor costs, so that it may stay in the code for good."""
    fastest, operation = float("inf"), float("inf")
    tensor = torch.zeros(1)
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(2000):
            with section("idle"):
                pass
        fastest = min(fastest, time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(2000):
            tensor.add_(1)
        operation = min(operation, time.perf_counter() - began)
    assert fastest < operation

"""Progress that a person can believe: no time left until it is known, one line of 80 columns."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from psycho import progress
from psycho.eta import Eta, said


def watched(arrivals: dict[int, int], total: int, until: int) -> list[tuple[int, float | None]]:
    """What is said each second, where `arrivals` says how many rows there are from a second on."""
    eta, rows, found = Eta(total), 0, []
    for second in range(1, until + 1):
        rows = arrivals.get(second, rows)
        eta.see(second, rows, 10 * rows)
        found.append((second, eta.left(second)))
    return found


def test_a_slow_start_promises_no_hours() -> None:
    """Engines start for 40 s, then 10 rows a second: 1,000 rows are done at 140 s."""
    arrivals = {40 + second: 10 * second for second in range(1, 101)}
    found = watched(arrivals, 1000, 139)
    assert all(left is None for second, left in found if second < 56)
    known = [(second, left) for second, left in found if left is not None]
    assert known[0][0] <= 60
    assert all(abs(second + left - 140) < 3 for second, left in known)


def test_one_early_row_is_not_a_rate() -> None:
    """A row at 2 s and the next at 33 s was 554 minutes for some thousand rows."""
    found = watched({2: 1, 33: 2}, 1500, 35)
    assert all(left is None for _, left in found)


def test_batches_that_come_at_once_give_a_steady_time() -> None:
    """Twenty batches of 64 rows, one each 30 s, the first after 50: between them the time runs down and never jumps."""
    arrivals = {50 + 30 * n: 64 * (n + 1) for n in range(20)}
    end = 50 + 30 * 19
    ends = [second + left for second, left in watched(arrivals, 1280, end - 1) if left is not None]
    assert ends and max(ends) - min(ends) < 0.1 * end
    assert abs(ends[-1] - end) < 20


def test_rows_that_stop_coming_lengthen_the_time() -> None:
    arrivals = {10 + second: 10 * second for second in range(1, 51)}
    found = dict(watched(arrivals, 1000, 200))
    early, late = found[60], found[200]
    assert early is not None and late is not None and late > 2 * early


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 50)), min_size=1, max_size=60))
def test_the_time_left_is_never_negative_and_all_done_has_none(steps):
    eta, second, rows = Eta(sum(step for _, step in steps)), 0, 0
    for wait, step in steps:
        for _ in range(wait):
            second += 1
            left = eta.left(second)
            assert left is None or left >= 0
        rows += step
        eta.see(second, rows)
    assert eta.left(second + 1) is None


def test_a_count_that_failed_changes_nothing() -> None:
    eta = Eta(100)
    for second in range(1, 40):
        eta.see(second, second)
    before = eta.left(39)
    eta.see(39, 0)  # the counter did not answer
    assert before is not None and eta.left(39) == pytest.approx(before)


def test_tokens_a_second_leave_the_start_out() -> None:
    eta = Eta(100)
    eta.see(60, 1, 100)
    assert eta.tokens_per_s() is None
    eta.see(70, 11, 1100)
    assert eta.tokens_per_s() == 100


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s left"), (600, "10 min left"), (36_000, "10.0 h left")])
def test_a_time_as_a_person_says_it(seconds: float, text: str) -> None:
    assert said(seconds) == text


def known_eta() -> Eta:
    eta = Eta(12_000)
    for second in range(1, 120):
        eta.see(second, 20 * second, 4000 * second)
    return eta


def test_the_bar_keeps_to_a_line_of_eighty_columns() -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    shown = progress.bar(console, "answers and verdicts")
    text = progress.detail(known_eta(), 119, "a note that is longer than the room that is left for it on the line")
    shown.add_task("train_online", total=12_000, completed=2_380, detail=text)
    with console.capture() as capture:
        console.print(shown.get_renderable())
    lines = capture.get().splitlines()
    assert len(lines) == 1
    plain = Console(width=200, no_color=True).render_str(lines[0]).plain
    assert "2380/12000" in plain and "train_online" in plain and "answers and verdicts" in plain


def test_a_pipe_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bar and no control characters, a line now and then, with the time left once it is known."""
    file = io.StringIO()
    told = progress.Progress(Console(file=file, width=80))
    clock = iter(range(10_000))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    stop = threading.Event()
    looks: list[int] = []

    def read(name: str) -> tuple[int, int, str]:
        looks.append(len(looks))
        if len(looks) == 120:
            stop.set()
        return 10 * len(looks), 0, ""

    monkeypatch.setattr(progress, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(told, "_read", read)
    told._log("evaluate", 3_000, "answers and verdicts", stop)
    lines = file.getvalue().splitlines()
    assert 3 < len(lines) < 60 and "\x1b" not in file.getvalue()
    assert all(len(line) <= 80 for line in lines)
    assert "left" in lines[-1]


def test_before_anything_is_known_only_the_note_is_shown() -> None:
    unknown: Any = Eta(10)
    assert progress.detail(unknown, 5, "") == "" and progress.detail(unknown, 5, "engine starts") == " · engine starts"

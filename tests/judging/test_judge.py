"""Rating with a judge that fails on purpose: retried, then left out with a reason, never made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from psycho.config import JudgeConfig, SamplingConfig
from psycho.evaluation.comparison import both_orders
from psycho.inference.worker import Completion
from psycho.judging.digits import rating_places
from psycho.judging.judge import rate_pairs, rate_single
from psycho.judging.rows import FAILED, FAILURES, rating_row
from psycho.judging.rubric import answer, dump, single_schema
from psycho.principles import STEMS
from psycho.schema import RATING

Messages = list[dict[str, str]]
TORN = '{"empathy": {"evid'


def ratings(value: int) -> dict[str, Any]:
    return answer(dict.fromkeys(STEMS, value), dict.fromkeys(STEMS, "none"))


class FakeWorker:
    """Answers with `reply(prompt, try)`; remembers every call."""

    def __init__(self, reply: Callable[[str, int], str | Completion], floors: tuple[float, ...] = ()) -> None:
        self.reply, self.floors = reply, floors
        self.calls: list[dict[str, Any]] = []
        self.tries: dict[str, int] = {}

    def generate(
        self,
        conversations: Sequence[Messages],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        schema: str | None = None,
        spans: Sequence[Sequence[str]] | None = None,
        digits: str | None = None,
    ) -> list[Completion]:
        prompts = [messages[-1]["content"] for messages in conversations]
        self.calls.append(
            {
                "conversations": list(conversations),
                "prompts": prompts,
                "seeds": list(seeds),
                "sampling": sampling,
                "schema": schema,
                "spans": spans,
                "digits": digits,
            }
        )
        answers = []
        for prompt in prompts:
            self.tries[prompt] = self.tries.get(prompt, 0) + 1
            given = self.reply(prompt, self.tries[prompt])
            if isinstance(given, str):
                given = Completion(given, prompt_tokens=9, output_tokens=7, span_floors=self.floors if spans else ())
            answers.append(given)
        return answers


def judge(**settings: Any) -> JudgeConfig:
    return JudgeConfig(**({"model": "fake", "template": "compact"} | settings))


ITEMS = [("speech", f"reply {number}") for number in range(4)]


def test_an_answer_that_does_not_parse_is_asked_again_alone_with_another_seed():
    worker = FakeWorker(lambda prompt, n: TORN if "reply 2" in prompt and n == 1 else dump(ratings(4)))
    rated = rate_single(worker, judge(), ITEMS, [10, 20, 30, 40])
    assert [rating.overall for rating, *_ in rated] == [4, 4, 4, 4]
    assert [attempts for _, _, attempts, _ in rated] == [1, 1, 2, 1]
    first, again = worker.calls
    assert (first["seeds"], again["seeds"]) == ([10, 20, 30, 40], [31])
    assert again["prompts"] == [first["prompts"][2]] and again["schema"] == first["schema"]
    assert first["sampling"].temperature == 0 < again["sampling"].temperature


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_an_answer_that_never_parses_is_left_out_with_a_reason(retries):
    worker = FakeWorker(lambda prompt, n: TORN if "reply 1" in prompt else dump(ratings(2)))
    rated = rate_single(worker, judge(retries=retries), ITEMS, [1, 2, 3, 4])
    assert [rating is None for rating, *_ in rated] == [False, True, False, False]
    assert [attempts for _, _, attempts, _ in rated] == [1, 1 + retries, 1, 1]
    asked = [seed for call in worker.calls[1:] for seed in call["seeds"]]
    assert asked == [2 + n for n in range(1, retries + 1)]
    row = rating_row(REQUEST, judge(), *rated[1])
    assert row["error"] == FAILED and row["overall"] is None
    assert all(row[f"{stem}_rating"] is None and row[f"{stem}_evidence"] is None for stem in STEMS)


def test_retries_are_counted_in_tokens():
    worker = FakeWorker(lambda prompt, n: TORN if "reply 1" in prompt and n <= 2 else dump(ratings(2)))
    rated = rate_single(worker, judge(retries=3), ITEMS[:2], [1, 2])
    assert [(done.prompt_tokens, done.output_tokens) for *_, done in rated] == [(9, 7), (27, 21)]


SAID = ("I feel lost since I moved.", "It sounds like you feel lost. You might choose to rest.")


def quoting(empathy: str, rating: int = 4) -> str:
    evidence = dict.fromkeys(STEMS, "reply: none") | {"empathy": f"reply: {empathy}; client: lost"}
    return dump(answer(dict.fromkeys(STEMS, rating), evidence))


def test_invented_evidence_is_dropped_and_marked_and_the_rating_stays():
    worker = FakeWorker(lambda *_: quoting("ashamed"))
    [kept] = rate_single(worker, judge(), [SAID], [1], kept=True)
    row = rating_row(REQUEST, judge(), *kept)
    assert (row["empathy_rating"], row["empathy_evidence"], row["unfaithful_evidence"]) == (4, None, ["empathy"])
    assert row["safety_evidence"] == "reply: none" and len(worker.calls) == 1, (
        "no try is paid for unless it is asked for"
    )
    for settings, keeps in (({"evidence_check": "off"}, True), ({}, False)):
        [unchecked] = rate_single(worker, judge(**settings), [SAID], [1], kept=keeps)
        assert unchecked[0].evidence["empathy"] == "reply: ashamed; client: lost" and unchecked[0].unfaithful == ()


def test_invented_evidence_is_asked_for_again_and_what_invents_least_is_kept():
    worker = FakeWorker(lambda prompt, n: quoting("ashamed", 2) if n == 1 else quoting("lost", 5))
    [(rating, _, attempts, done)] = rate_single(worker, judge(evidence_check="retry"), [SAID], [1], kept=True)
    assert (rating.overall, rating.unfaithful, attempts) == (5, (), 2)
    assert (rating.evidence["empathy"], done.output_tokens) == ("reply: lost; client: lost", 14)
    worker = FakeWorker(lambda prompt, n: quoting("ashamed", 2) if n == 1 else TORN if n == 2 else quoting("angry", 5))
    [(rating, _, attempts, done)] = rate_single(
        worker, judge(evidence_check="retry", retries=2), [SAID], [1], kept=True
    )
    assert (rating.overall, rating.unfaithful, attempts, done.output_tokens) == (2, ("empathy",), 3, 21)
    assert done.text == quoting("ashamed", 2), "expected ratings are read in the answer that was kept"


REQUEST = {"request_id": "r", "speech_id": "s", "split": "train", "model": "m", "question": "q", "response": "a"}


def test_a_prompt_that_cannot_be_served_is_not_asked_again_and_keeps_its_reason():
    long = Completion(error="prompt of 9000 tokens is over the model's limit of 8192")
    worker = FakeWorker(lambda prompt, n: long if "reply 0" in prompt else dump(ratings(5)))
    rated = rate_single(worker, judge(retries=3), ITEMS, [1, 2, 3, 4])
    assert len(worker.calls) == 1 and rated[0][0] is None and rated[1][0].overall == 5
    assert rating_row(REQUEST, judge(), *rated[0])["error"] == long.error


def test_a_rating_row_is_of_the_schema():
    [rated] = rate_single(FakeWorker(lambda *_: dump(ratings(4))), judge(), ITEMS[:1], [1])
    row = rating_row(REQUEST, judge(), *rated)
    assert set(row) == {*RATING.names, "error"}
    assert (row["error"], row["overall"], row["clarity_rating"], row["attempts"], row["output_tokens"]) == (
        None,
        4,
        4,
        1,
        7,
    )


@pytest.mark.parametrize(
    ("floor", "found", "floored"),
    [(-8.0, -9.0, True), (-8.0, -8.0, False), (-8.0, -1.0, False), (None, -99.0, False)],
)
def test_the_floor_lowers_clarity_and_nothing_else(floor, found, floored):
    worker = FakeWorker(lambda *_: dump(ratings(5)), floors=(found,))
    [(rating, is_floored, _, _)] = rate_single(worker, judge(fluency_floor=floor), ITEMS[:1], [1])
    assert is_floored is floored
    assert rating.ratings == dict.fromkeys(STEMS, 5) | ({"clarity": 1} if floored else {})
    assert worker.calls[0]["spans"] == ([["reply 0"]] if floor is not None else None)


def test_a_failed_rating_is_not_floored_into_one():
    worker = FakeWorker(lambda *_: TORN, floors=(-99.0,))
    [(rating, floored, _, _)] = rate_single(worker, judge(fluency_floor=-8.0), ITEMS[:1], [1])
    assert rating is None and floored is False


def test_the_floor_of_a_retried_answer_is_that_of_its_prompt():
    worker = FakeWorker(lambda prompt, n: TORN if n == 1 else dump(ratings(5)), floors=(-9.0,))
    [(rating, floored, _, _)] = rate_single(worker, judge(fluency_floor=-8.0), ITEMS[:1], [1])
    assert floored and rating.ratings["clarity"] == 1 and worker.calls[1]["spans"] is None


TEMPLATES = pytest.mark.parametrize("template", ["rubric", "compact"])
BOTH_ORDERS = [("speech", "policy's", "baseline's"), ("speech", "baseline's", "policy's")]


def comparing(rate: Callable[[str, bool], int]) -> Callable[[str, int], str]:
    """A judge that rates each text by `rate(text, stands first)`, in both formats."""

    def reply(prompt: str, _: int) -> str:
        if "<first_response>" in prompt:
            first, second = re.findall(r"<(?:first|second)_response>\n(.*?)\n</", prompt)
            return dump({"first": ratings(rate(first, True)), "second": ratings(rate(second, False))})
        return dump(ratings(rate(prompt.split("Reply: ")[1], not prompt.startswith("\n"))))

    return reply


@TEMPLATES
@pytest.mark.parametrize("bad_side", [0, 1])
def test_in_a_pair_the_floor_is_each_sides_own(template, bad_side):
    floors = (-9.0, -1.0) if bad_side == 0 else (-1.0, -9.0)
    worker = FakeWorker(comparing(lambda text, first: 5), floors)
    [pair] = rate_pairs(worker, judge(template=template, fluency_floor=-8.0), [("s", "one", "other")], [1])
    assert worker.calls[-1]["spans"] == [["one", "other"]]
    assert [side.ratings["clarity"] for side in pair] == ([1, 5] if bad_side == 0 else [5, 1])
    assert all(side.ratings["empathy"] == 5 for side in pair)


@TEMPLATES
@pytest.mark.parametrize("items", [("s", "bad", "b"), ("s", "a", "bad")])
def test_a_pair_that_never_parses_is_none(template, items):
    whole = comparing(lambda text, first: 5 if first else 1)
    worker = FakeWorker(lambda prompt, n: TORN if "bad" in prompt else whole(prompt, n))
    failed, done = rate_pairs(worker, judge(template=template), [items, ("s", "a", "b")], [1, 2])
    assert failed is None and [side.overall for side in done] == [5, 1]


def test_a_pair_with_one_side_missing_is_none():
    worker = FakeWorker(lambda *_: dump({"first": ratings(5)}))
    assert rate_pairs(worker, judge(template="rubric"), [("s", "a", "b")], [1]) == [None]


def test_a_judge_who_rates_in_turn_sees_the_first_reply_and_its_ratings_before_the_second():
    worker = FakeWorker(comparing(lambda text, first: 4))
    rate_pairs(worker, judge(), [("speech", "one", "other")], [1])
    [conversation] = worker.calls[1]["conversations"]
    assert [message["role"] for message in conversation] == ["user", "assistant", "user"]
    texts = [message["content"] for message in conversation]
    assert texts == ["speech\nReply: one", dump(ratings(4)), "\nReply: other"]


@TEMPLATES
@pytest.mark.parametrize(("favourite", "expected"), [("policy's", 1.0), ("baseline's", 0.0)])
def test_a_planted_judge_flips_the_label(template, favourite, expected):
    worker = FakeWorker(comparing(lambda text, first: 5 if text == favourite else 1))
    assert both_orders(*rate_pairs(worker, judge(template=template), BOTH_ORDERS, [1, 2])) == expected


@TEMPLATES
def test_a_judge_who_favours_a_place_favours_nobody(template):
    worker = FakeWorker(comparing(lambda text, first: 5 if first else 4))
    assert both_orders(*rate_pairs(worker, judge(template=template), BOTH_ORDERS, [1, 2])) == 0.5


DIRECT = {"mode": "direct", "template": "rubric"}


def test_direct_ratings_are_seven_digits_of_one_token_each():
    worker = FakeWorker(lambda *_: "5432154")
    [(rating, *_)] = rate_single(worker, judge(**DIRECT), ITEMS[:1], [1])
    assert list(rating.ratings.values()) == [5, 4, 3, 2, 1, 5, 4] and set(rating.evidence.values()) == {""}
    [call] = worker.calls
    assert (call["schema"], call["digits"], call["sampling"].max_tokens) == (None, "only", 7)


def test_direct_ratings_of_a_compact_judge_are_its_own_json_without_quotations():
    worker = FakeWorker(lambda *_: dump(ratings(2)))
    [(rating, *_)] = rate_single(worker, judge(mode="direct"), ITEMS[:1], [1])
    assert rating.overall == 2 and worker.calls[0]["schema"] == json.dumps(single_schema(200, quoted=False))


@pytest.mark.parametrize("text", ["543215", "54321543", "5432150", "five", "", "5 4 3 2 1 5 4"])
def test_digits_that_are_not_seven_ratings_are_no_rating(text):
    [(rating, _, attempts, _)] = rate_single(FakeWorker(lambda *_: text), judge(**DIRECT), ITEMS[:1], [1])
    assert rating is None and attempts == 2


def test_a_direct_judge_compares_in_twice_seven_digits():
    """Quotations that are thrown away would cost a hundred times as many tokens."""
    worker = FakeWorker(lambda *_: "5432154" + "1111112")
    [(first, second)] = rate_pairs(worker, judge(**DIRECT), [("speech", "one", "other")], [1])
    assert list(first.ratings.values()) == [5, 4, 3, 2, 1, 5, 4] and list(second.ratings.values()) == [1] * 6 + [2]
    [call] = worker.calls
    assert (call["schema"], call["digits"], call["sampling"].max_tokens) == (None, "only", 14)
    assert (
        "14 digits" in call["conversations"][0][0]["content"] and "JSON" not in call["conversations"][0][0]["content"]
    )


@pytest.mark.parametrize("text", ["5432154", "543215411111120", "5432154 111111", "54321540000000", ""])
def test_digits_that_are_not_twice_seven_ratings_compare_nothing(text):
    assert rate_pairs(FakeWorker(lambda *_: text), judge(**DIRECT), [("s", "one", "other")], [1]) == [None]


REFUSAL = "I cannot rate this conversation."


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        (Completion(text=TORN, finish_reason="length"), "truncated"),
        (Completion(text=TORN, finish_reason="stop"), "unparsed"),
        (Completion(text=REFUSAL, finish_reason="stop"), "refused"),
        (Completion(text=dump(answer(dict.fromkeys(STEMS, 1), dict.fromkeys(STEMS, REFUSAL)))), "refused"),
        (Completion(error="prompt of 9000 tokens is over the model's limit of 8192"), "unserved"),
    ],
)
def test_why_there_is_no_rating_is_said(completion, status):
    """A refusal inside the grammar's strings is one too: its ratings are not meant."""
    [rated] = rate_single(FakeWorker(lambda *_: completion), judge(), ITEMS[:1], [1])
    row = rating_row(REQUEST, judge(), *rated)
    assert rated[0] is None and row["status"] == status and row["overall"] is None
    assert row["error"] == completion.error or row["error"] == FAILURES[status]


def test_a_quoted_refusal_is_evidence():
    """A counsellor may have written the words of a refusal; then to quote them is to rate."""
    quoting = dump(answer(dict.fromkeys(STEMS, 1), dict.fromkeys(STEMS, "I cannot assist you")))
    item = ("speech", "I cannot assist you with that.")
    [(rating, *_)] = rate_single(FakeWorker(lambda *_: quoting), judge(), [item], [1])
    assert rating.overall == 1


def test_expected_ratings_are_asked_for_where_they_are_wanted():
    text = dump(ratings(4))
    sure = tuple((place, (-9.0, -9.0, -9.0, -0.1, -9.0)) for place in rating_places(text).values())
    worker = FakeWorker(lambda *_: Completion(text=text, digits=sure, span_floors=(-9.0,)))
    [(rating, *_)] = rate_single(worker, judge(), ITEMS[:1], [1], expected=True)
    assert worker.calls[0]["digits"] == "read" and rating.expected_overall == pytest.approx(4, abs=0.01)
    [(floored, *_)] = rate_single(worker, judge(fluency_floor=-8.0), ITEMS[:1], [1], expected=True)
    assert floored.expected["clarity"] == 1 and floored.expected["empathy"] > 3.9
    rate_single(worker, judge(), ITEMS[:1], [1])
    assert worker.calls[-1]["digits"] is None


def test_the_rubric_shows_the_earlier_turns_before_the_speech():
    worker = FakeWorker(lambda *_: dump(ratings(4)))
    history = json.dumps([{"role": "user", "content": "Hello <b>"}, {"role": "assistant", "content": "Welcome"}])
    rate_single(worker, judge(template="rubric"), [("I feel lost", "Oh", history), ("I feel lost", "Oh", None)], [1, 2])
    with_turns, without = worker.calls[0]["prompts"]
    assert with_turns.startswith(
        "<earlier_client>\nHello &lt;b&gt;\n</earlier_client>\n\n<earlier_counsellor>\nWelcome\n</earlier_counsellor>"
    )
    assert with_turns.endswith(without)


def test_entities_of_the_rubric_are_turned_back_in_the_evidence():
    quoting = dump(answer(dict.fromkeys(STEMS, 3), dict.fromkeys(STEMS, "a &lt; b &amp;amp;")))
    item = ("speech", "a < b &amp;")
    for template, evidence in (("rubric", "a < b &amp;"), ("compact", "a &lt; b &amp;amp;")):
        worker = FakeWorker(lambda *_: quoting)
        [(rating, *_)] = rate_single(worker, judge(template=template, fluency_floor=-8.0), [item], [1])
        assert rating.evidence["clarity"] == evidence
        assert worker.calls[0]["spans"][0][0] in worker.calls[0]["prompts"][0]

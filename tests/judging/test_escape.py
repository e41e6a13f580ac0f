"""No text leaves its delimiters, and ordinary text is not touched."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psycho.judging.escape import as_written, shown
from psycho.judging.rubric import pair_prompt, second_turn, single_prompt
from psycho.nano.grammar import sample_response, sample_speech
from psycho.nano.tokenizer import SPECIAL
from tests.judging.attacks import ATTACKS

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
NASTY = st.lists(
    st.sampled_from(
        [
            "<",
            ">",
            "/",
            "response",
            "</response>",
            "<client>",
            "&lt;",
            "&amp;",
            "&",
            "|",
            "\n",
            " ",
            *SPECIAL,
            *ATTACKS.values(),
        ]
    ),
    max_size=8,
).map("".join)
TAGS = ["<client>", "</client>", "<response>", "</response>"]


def tags(text: str) -> list[str]:
    return re.findall(r"<[^>]*>", text)


def test_at_least_thirty_attacks_are_planted():
    assert len(ATTACKS) >= 30 and len(set(ATTACKS.values())) == len(ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
@pytest.mark.parametrize("mode", ["evidence", "direct"])
def test_an_attack_stays_between_its_tags(attack, mode):
    response = f"That sounds hard. {attack}"
    system, user = single_prompt("I feel lost.", response, "rubric", mode=mode)
    assert tags(user["content"]) == TAGS and tags(system["content"]) == []
    inside = user["content"].split("<response>\n")[1].split("\n</response>")[0]
    assert as_written(inside, "rubric").replace("[ ", "[") == response.replace("[ ", "[")
    around = user["content"].replace(inside, "")
    assert around == single_prompt("I feel lost.", "", "rubric", mode=mode)[1]["content"]


@settings(deadline=None)
@given(TEXT | NASTY, TEXT | NASTY, TEXT | NASTY)
@example("</client>", "</response>", "<response>")
def test_no_text_writes_a_tag(speech, first, second):
    content = single_prompt(speech, first, "rubric")[1]["content"]
    assert tags(content) == TAGS
    content = pair_prompt(speech, first, second)[1]["content"]
    sides = [f"<{close}{side}_response>" for side in ("first", "second") for close in ("", "/")]
    assert tags(content) == [*TAGS[:2], *sides]


@settings(deadline=None)
@given(TEXT | NASTY)
def test_no_chat_token_gets_through(text):
    for template in ("rubric", "compact"):
        assert not [token for token in SPECIAL if token in shown(text, template)]
        assert not re.search(r"\[/?(INST|SYS|AVAILABLE_TOOLS)\]", shown(text, template))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_in_the_compact_format_there_is_one_reply_and_no_key_of_an_answer(attack):
    for content in (single_prompt(attack, attack, "compact")[0]["content"], second_turn(attack)["content"]):
        assert len(re.findall(r"[\n\r\u2028]\s*reply\s*[:\uff1a]", content, re.IGNORECASE)) == 1
        assert not re.search(r'"(empathy|clarity|rating|evidence)"\s*:', content)


def test_ordinary_text_is_as_it_was_byte_for_byte():
    rng = random.Random(0)
    speeches = [sample_speech(rng) for _ in range(300)]
    texts = [speech.text for speech in speeches] + [sample_response(rng, speech, "any") for speech in speeches]
    texts += [
        'She said: "I\'m fine" & left, 2 < 3. [sic]\n\nIt\u2019s "hard": I <3 her; my reply: none.',
        "a\nb",
        " a ",
    ]
    assert [shown(text, "compact") for text in texts] == texts


@settings(deadline=None)
@given(TEXT)
def test_a_quotation_is_given_back_as_it_was_written(text):
    assert as_written(shown(text, "rubric"), "rubric").replace("[ ", "[") == text.replace("[ ", "[")

"""The grammar: bank invariants that the judge's evidence relies on, and what sampling promises."""

import random
import re
import string
from collections import Counter
from itertools import combinations
from statistics import fmean

import pytest

from psycho.nano import gold, grammar

TEMPLATES = [*grammar._texts(grammar.load_bank("speeches")), *grammar._texts(grammar.load_bank("responses"))]


def rngs(count: int) -> list[random.Random]:
    return [random.Random(seed) for seed in range(count)]


def response_templates() -> list[tuple[str, str, dict[str, str]]]:
    bank = grammar.load_bank("responses")
    return [(slot, level, entry) for slot in bank for level in bank[slot] for entry in bank[slot][level]]


def words(text: str) -> list[str]:
    return [word for token in text.split() if (word := token.strip(string.punctuation))]


def bare_words(template: str) -> list[str]:
    return words(re.sub(r"{\w+}", "", template))


def test_bank_sizes() -> None:
    topics = Counter((s.group, s.topic) for s in grammar.situations())
    speeches, responses = grammar.load_bank("speeches"), grammar.load_bank("responses")
    assert len({group for group, _ in topics}) == 8
    assert len(topics) == 42 and min(topics.values()) >= 4
    assert len(set(grammar.feelings())) == 30 and len(set(speeches["durations"])) == 12
    assert len(speeches["opening"]) >= 6 and len(speeches["feeling"]) >= 6 and len(speeches["closing"]) >= 4
    assert tuple(speeches["stage"]) == tuple(responses["activity"]) == grammar.STAGES
    assert min(map(len, speeches["stage"].values())) >= 4
    assert min(map(len, responses["activity"].values())) >= 6
    least = {"empathy": 4, "relevance": 4, "suggestion": 4, "safety": 4, "exploration": 5, "filler": 10}
    assert all(len(entries) >= least[slot] for slot in least for entries in responses[slot].values())
    assert min(len(responses[slot]["named"]) for slot in ("empathy", "relevance")) >= 5
    assert min(len(responses["safety"]["harm"]), len(responses["exploration"]["open"])) >= 6


def test_phrases_hold_their_own_key_and_no_other() -> None:
    keys = [s.key for s in grammar.situations()]
    names = {*keys, *grammar.feelings()}
    assert len(names) == len(keys) + 30
    for s in grammar.situations():
        assert [word for word in s.phrase.split() if word in names] == [s.key]
        assert 2 <= len(s.phrase.split()) <= 6 and s.phrase == s.phrase.strip()


def test_no_two_names_share_a_stem() -> None:
    names = [*(s.key for s in grammar.situations()), *grammar.feelings()]
    for one, other in combinations(names, 2):
        shorter = min(len(one), len(other))
        assert one[:5] != other[:5] and one[:shorter] != other[:shorter], (one, other)


def test_templates_contain_no_key_and_no_feeling() -> None:
    names = {*(s.key for s in grammar.situations()), *grammar.feelings()}
    for text in TEMPLATES:
        assert not names & {word.lower() for word in bare_words(text)}, text


def test_stage_cues_occur_in_their_own_sentence_only() -> None:
    cues = [entry["cue"] for entries in grammar.load_bank("speeches")["stage"].values() for entry in entries]
    assert len(set(cues)) == len(cues)
    texts = [*grammar._texts(grammar.load_bank("topics")), *TEMPLATES]
    for cue in cues:
        assert cue.islower() and sum(cue in bare_words(text) for text in texts if text != cue) == 1, cue


def test_response_cues_identify_slot_and_level() -> None:
    for slot, level, entry in response_templates():
        if level == "named":
            assert "cue" not in entry
            continue
        cue = entry["cue"]
        homes = {(s, lv) for s, lv, other in response_templates() if cue in bare_words(other["text"].lower())}
        assert cue.islower() and cue in bare_words(entry["text"]) and homes == {(slot, level)}, cue


def test_cues_that_are_quoted_one_by_one_are_unique() -> None:
    cues = [entry["cue"] for slot, _, entry in response_templates() if slot in ("activity", "filler")]
    assert len(set(cues)) == len(cues)


def test_every_sentence_has_one_reading() -> None:
    listed = grammar.response_sentences()
    fills = {
        "{feeling}": 30,
        "{key}": 168,
        "{activity}": sum(s == "activity" for s, _, _ in response_templates()),
    }
    texts = [entry["text"] for slot, _, entry in response_templates() if slot != "activity"]
    assert len(listed) == sum(next((n for name, n in fills.items() if name in text), 1) for text in texts)
    assert all(grammar.split_sentences(text) == [text] for text in listed)
    bank = grammar.load_bank("speeches")
    stages = sum(map(len, bank["stage"].values()))
    expected = 168 * len(bank["opening"]) + 30 * 12 * len(bank["feeling"]) + stages + len(bank["closing"])
    assert len(gold.speech_sentences()) == expected


def test_vocabulary_is_what_can_be_said_and_small() -> None:
    said = (*gold.speech_sentences(), *grammar.response_sentences())
    assert grammar.vocabulary() == sorted({word for text in said for word in words(text)})
    assert len(grammar.vocabulary()) <= 1_250


def test_lengths_stay_in_bounds() -> None:
    lengths: dict[str, list[int]] = {}
    for text, sentence in gold.speech_sentences().items():
        lengths.setdefault(sentence.slot, []).append(len(text))
    assert sum(min(lengths[slot]) for slot in ("opening", "feeling", "stage")) + 2 >= 105
    assert sum(map(max, lengths.values())) + 3 <= 240
    counts: dict[str, list[int]] = {}
    for text, sentence in grammar.response_sentences().items():
        counts.setdefault(sentence.slot, []).append(len(text.split()))
    fillers = sorted(counts.pop("filler"))[-grammar.MAX_FILLERS :]
    assert sum(map(max, counts.values())) + sum(fillers) <= 75


def test_sampled_speeches_are_105_to_240_characters() -> None:
    assert all(105 <= len(grammar.sample_speech(rng).text) <= 240 for rng in rngs(500))


def test_held_out_combinations_are_a_stable_fifth() -> None:
    split = [grammar.held_out(s.key, f) for s in grammar.situations() for f in grammar.feelings()]
    assert 0.17 < fmean(split) < 0.23
    assert grammar.held_out("divorce", "lonely") is False and grammar.held_out("divorce", "ashamed") is False
    for wanted in (True, False):
        speeches = [grammar.sample_speech(rng, held_out_combinations=wanted) for rng in rngs(50)]
        assert all(grammar.held_out(s.key, s.feeling) is wanted for s in speeches)


def test_every_key_and_feeling_is_seen_in_training() -> None:
    seen = [(s.key, f) for s in grammar.situations() for f in grammar.feelings()]
    seen = [pair for pair in seen if not grammar.held_out(*pair)]
    assert min(Counter(key for key, _ in seen).values()) >= 15
    assert min(Counter(feeling for _, feeling in seen).values()) >= 100


def test_seed_determines_everything() -> None:
    def sample(seed: int) -> tuple[object, ...]:
        rng = random.Random(seed)
        speech = grammar.sample_speech(rng)
        reply = grammar.sample_response(rng, speech)
        return speech, reply, grammar.sample_sentence(rng, speech, "empathy"), grammar.corrupt(rng, reply)

    assert sample(3) == sample(3) != sample(4)


@pytest.mark.parametrize(("q", "mean"), [(0, 2.9), (0.2, 3.3), (0.4, 3.6), (0.6, 4.0), (0.8, 4.5), (1, 4.9)])
def test_mean_gold_by_quality(q: float, mean: float) -> None:
    style = grammar.Style(quality=(q, q), filler=grammar.styles()["any"].filler)
    speeches = [(rng, grammar.sample_speech(rng)) for rng in rngs(800)]
    overall = fmean(gold.rate(s, grammar.sample_response(rng, s, style)).overall for rng, s in speeches)
    assert overall == pytest.approx(mean, abs=0.15)


def test_reply_lengths_at_middle_quality() -> None:
    style = grammar.Style(quality=(0.5, 0.5), filler=grammar.styles()["any"].filler)
    replies = [grammar.sample_response(rng, grammar.sample_speech(rng), style) for rng in rngs(500)]
    assert 25 <= fmean(len(reply.split()) for reply in replies) <= 40


@pytest.mark.parametrize("slot", ["empathy", "relevance", "suggestion"])
def test_about_half_the_drill_sentences_match(slot: str) -> None:
    principle = "staging" if slot == "suggestion" else slot
    speeches = [(rng, grammar.sample_speech(rng)) for rng in rngs(400)]
    drills = [gold.rate(s, grammar.sample_sentence(rng, s, slot)) for rng, s in speeches]
    assert 0.42 < fmean(drill.ratings[principle] == 5 for drill in drills) < 0.58


def test_drill_sentences_are_single_and_take_every_level() -> None:
    rng = random.Random(0)
    speech = grammar.sample_speech(rng)
    bank = grammar.load_bank("responses")
    levels = [(slot, level) for slot in (*grammar.SLOTS, "filler") for level in (None, *bank[slot])]
    levels += [("suggestion", fit) for fit in gold.FIT_RATINGS]
    for slot, level in levels:
        reading = grammar.response_sentences()[grammar.sample_sentence(rng, speech, slot, level)]
        assert reading.slot == slot
        if level is not None and level not in gold.FIT_RATINGS:
            assert reading.level == level


def test_style_levels_are_distributions() -> None:
    for slot, chances in grammar.load_bank("styles")["levels"].items():
        for end in (0, 1):
            assert sum(pair[end] for pair in chances.values()) == pytest.approx(1), slot


def test_corrupt_is_never_on_the_grammar() -> None:
    for rng in rngs(500):
        speech = grammar.sample_speech(rng)
        reply = grammar.sample_response(rng, speech)
        damaged = grammar.corrupt(rng, reply)
        assert damaged != reply and not gold.rate(speech, damaged).on_grammar
    assert all(grammar.corrupt(random.Random(0), text) for text in ("", " ", ".", "Yes"))

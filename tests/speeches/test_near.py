"""Near-duplicates: against all pairs by their true similarity, and against datasketch's own tables."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from psycho.nano.grammar import sample_speech
from psycho.speeches import near
from psycho.speeches.near import PERMUTATIONS, NearIndex, band_keys, banding, shingles, signatures

THRESHOLD = 0.7
WORDS = [f"w{n}" for n in range(500)]


def corpus(count: int, seed: int = 0) -> list[str]:
    """Texts of 30 to 60 words; every third is the one before it with 1 to 8 words changed."""
    draw = random.Random(seed)
    texts: list[str] = []
    for number in range(count):
        words = texts[-1].split() if number % 3 == 2 else draw.choices(WORDS, k=draw.randint(30, 60))
        for _ in range(draw.randint(1, 8) if number % 3 == 2 else 0):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        texts.append(" ".join(words))
    return texts


def clusters(texts: list[str], folder: Path, rows: list[int] | None = None, batch: int = 50) -> list[int]:
    index = NearIndex(folder, THRESHOLD)
    for start in range(0, len(texts), batch):
        index.add(signatures(texts[start : start + batch]))
    index.close()
    return index.clusters(np.array(range(len(texts)) if rows is None else rows, np.int64)).tolist()


def similarity(a: str, b: str) -> float:
    one, other = set(shingles(a)), set(shingles(b))
    return len(one & other) / len(one | other)


def test_clusters_are_the_pairs_above_the_threshold_joined(tmp_path):
    texts = corpus(600)
    found = clusters(texts, tmp_path)
    missed = false = planted = 0
    for place in range(2, 600, 3):  # the only pairs that share more than chance
        true = similarity(texts[place - 1], texts[place])
        planted += true >= THRESHOLD
        missed += true >= THRESHOLD + 0.07 and found[place] != found[place - 1]
        false += true < THRESHOLD - 0.12 and found[place] == found[place - 1]
    assert planted > 40 and missed <= 1 and false <= 1
    assert all(found[place] == place for place in range(0, 600, 3))


def test_the_same_as_the_tables_of_the_library(tmp_path):
    texts = corpus(300, seed=1)
    found = clusters(texts, tmp_path)
    bands, rows = banding(THRESHOLD)
    lsh = MinHashLSH(num_perm=PERMUTATIONS, params=(bands, rows))
    hashes = list(
        MinHash.generator(map(shingles, texts), num_perm=PERMUTATIONS, hashfunc=near.crc32, scheme="affine32")
    )
    for place, minhash in enumerate(hashes):
        theirs = {other for other in lsh.query(minhash) if hashes[other].jaccard(minhash) >= THRESHOLD + 0.02}
        assert all(found[other] == found[place] for other in theirs)
        lsh.insert(place, minhash)


def test_a_cluster_is_named_by_its_first_and_joins_through_its_members(tmp_path):
    words = WORDS[:60]
    chain = [" ".join(words[: 60 - new] + [f"new{n}" for n in range(new)]) for new in (0, 6, 12)]
    other = " ".join(WORDS[100:160])
    assert similarity(chain[0], chain[2]) < THRESHOLD < similarity(chain[0], chain[1])
    assert clusters([other, chain[2], chain[0], chain[1]], tmp_path) == [0, 1, 1, 1]


def test_only_the_rows_asked_for_are_compared(tmp_path):
    texts = ["a b c d e f g", "a b c d e f g", "h i j k l m", "a b c d e f g", "h i j k l m"]
    assert clusters(texts, tmp_path, rows=[1, 2, 3, 4]) == [0, 1, 0, 1]


def test_a_key_that_all_rows_share_costs_no_more_than_a_line(tmp_path, monkeypatch):
    compared = 0
    real = NearIndex._similarity

    def count(self, a, b):
        nonlocal compared
        compared += len(a)
        return real(self, a, b)

    monkeypatch.setattr(NearIndex, "_similarity", count)
    assert clusters(["the same three words again and again"] * 2000, tmp_path) == [0] * 2000
    assert compared <= 6 * 2000


def test_candidates_are_the_next_few_of_a_key_and_its_first():
    keys = np.array([7, 3, 7, 7, 5, 7, 7, 7, 7, 5], np.uint64)
    places = [0, 2, 3, 5, 6, 7, 8]
    found = {(int(a), int(b)) for left, right in near._candidates(keys) for a, b in zip(left, right, strict=True)}
    close = {(a, b) for i, a in enumerate(places) for b in places[i + 1 : i + 5]}
    assert found == close | {(0, 7), (0, 8), (4, 9)}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95, 1.0])
def test_banding_meets_pairs_at_the_threshold(threshold):
    bands, rows = banding(threshold)
    assert bands * rows <= PERMUTATIONS and (1 - (1 - threshold**rows) ** bands >= 0.99 or rows == 1)


def test_band_keys_are_equal_where_the_rows_of_the_band_are():
    draw = np.random.default_rng(0)
    one = draw.integers(0, 2**32, (50, PERMUTATIONS), dtype=np.uint32)
    other = np.where(draw.random(one.shape) < 0.6, one, draw.integers(0, 2**32, one.shape, dtype=np.uint32))
    bands, rows = 25, 5
    equal = (one == other)[:, :125].reshape(50, bands, rows).all(axis=2)
    assert 20 < equal.sum() < 400
    assert np.array_equal(band_keys(one, bands, rows) == band_keys(other, bands, rows), equal)


def test_texts_without_blanks_and_short_ones_have_shingles():
    assert shingles("one") == [b"one"] and shingles("") == [b""] and shingles("A b, c!") == [b"a b c"]
    assert len(shingles("我不知道该怎么办")) == 6


def test_speeches_of_the_nano_world_are_not_taken_for_one_another(tmp_path):
    draw = random.Random(0)
    texts = list(dict.fromkeys(sample_speech(draw).text for _ in range(300)))
    found = clusters(texts, tmp_path)
    assert sum(a != place for place, a in enumerate(found)) < 0.2 * len(texts)


def test_no_rows(tmp_path):
    assert clusters([], tmp_path) == []

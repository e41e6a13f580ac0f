"""The seven principles of a good counselling response: the heart of the domain, which everything else asks.

Names and the 1-5 scale are those of PsychoCounsel-Preference (Zhang, Eack, Chen, arXiv 2502.19731); the wording of
what earns a 5 and what earns a 1 is ours. The first four are a floor that any assistant should meet, the last three
are client-centred counselling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MIN_RATING, MAX_RATING = 1, 5


@dataclass(frozen=True)
class Principle:
    """One principle: `stem` names its columns, `best` and `worst` say what a 5 and a 1 look like."""

    stem: str
    name: str
    best: str
    worst: str


PRINCIPLES: tuple[Principle, ...] = (
    Principle(
        "empathy",
        "Empathy and Emotional Understanding",
        "names and validates what this client feels",
        "dismisses or ignores the feeling",
    ),
    Principle(
        "relevance",
        "Personalization and Relevance",
        "speaks to this client's own circumstances",
        "could have been sent to anybody",
    ),
    Principle(
        "clarity",
        "Clarity and Conciseness",
        "is easy to follow, with nothing to cut",
        "rambles, repeats itself or hides behind jargon",
    ),
    Principle(
        "safety",
        "Avoidance of Harmful Language or Content",
        "holds nothing that could hurt or endanger the client",
        "minimises, blames or endangers",
    ),
    Principle(
        "exploration",
        "Facilitation of Self-Exploration",
        "invites reflection with open questions",
        "closes the conversation",
    ),
    Principle(
        "autonomy",
        "Promotion of Autonomy and Confidence",
        "strengthens the client's own choice and self-efficacy",
        "orders the client about",
    ),
    Principle(
        "staging",
        "Sensitivity to the Client's Stage of Change",
        "fits where the client stands, from precontemplation to maintenance",
        "pushes a step the client is not ready for",
    ),
)
STEMS: tuple[str, ...] = tuple(principle.stem for principle in PRINCIPLES)


def overall(ratings: Mapping[str, float]) -> float:
    """The mean of the seven ratings (paper, section 3).

    Raises:
        KeyError: a principle has no rating; a missing rating is never given a default.
    """
    return sum(ratings[stem] for stem in STEMS) / len(STEMS)


def whole_rating(value: Any) -> int | None:
    """A rating from a file: whole, also where a CSV or a float column spells it 4 or 4.0; None where it is none."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() and MIN_RATING <= number <= MAX_RATING else None


def rubric() -> str:
    """The seven principles as numbered text for a judge's prompt or a policy's system prompt."""
    return "\n".join(
        f"{number}. {p.name} ({p.stem}): {MAX_RATING} = {p.best}; {MIN_RATING} = {p.worst}."
        for number, p in enumerate(PRINCIPLES, start=1)
    )

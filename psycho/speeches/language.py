"""Which language a speech is in, by lingua (its models are in the wheel; about 20 MB for these languages).

The detector knows a fixed set of languages beside those wanted, so that what is none of them is not forced into one.
"""

from __future__ import annotations

from functools import cache

from lingua import IsoCode639_1, Language, LanguageDetector, LanguageDetectorBuilder

from psycho.errors import BadInput

_KNOWN = ("en", "de", "es", "fr", "it", "pt", "nl", "pl", "tr", "id", "ru", "ar", "hi", "zh", "ja")
_ENOUGH_CHARS = 120  # more text costs time and hardly changes the answer


def check_languages(codes: tuple[str, ...]) -> None:
    """Refuse what the detector does not know.

    Raises:
        BadInput: a code is not ISO 639-1, or of a language without a model.
    """
    known = {language.iso_code_639_1.name.lower() for language in Language.all()}
    for code in codes:
        if code not in known:
            raise BadInput(f"speeches.languages: {code!r} is no language code that lingua knows; write for example en")


def language(text: str, wanted: tuple[str, ...]) -> tuple[str, float]:
    """ISO 639-1 code of the likeliest language and its probability among those known; "" where there are no words."""
    values = _detector(frozenset(wanted) | frozenset(_KNOWN)).compute_language_confidence_values(text[:_ENOUGH_CHARS])
    if not values or values[0].value == 0:
        return "", 0.0
    return values[0].language.iso_code_639_1.name.lower(), values[0].value


@cache
def _detector(codes: frozenset[str]) -> LanguageDetector:
    isos = [getattr(IsoCode639_1, code.upper()) for code in sorted(codes)]
    # Low accuracy: trigrams alone, which is what lingua uses for texts of this length anyway.
    return LanguageDetectorBuilder.from_iso_codes_639_1(*isos).with_low_accuracy_mode().build()

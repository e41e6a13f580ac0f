"""Personal data in what a client says: found and masked before anything is stored.

E-mail and URL patterns, telephone numbers and the frame around them are presidio's (and `phonenumbers`'); addresses,
handles, names and signatures have patterns of our own, for presidio's recogniser of names needs a language model that
would have to be downloaded. So a name is found where its context tells it ("my name is", "my brother", "Dr.", the end
of a letter) or where it is a first name that means nothing else (`personal.yaml`). Nothing here opens a connection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import regex
import tldextract
import yaml

from psycho.speeches.leave_out import leave_out

with leave_out("torch", "transformers", "stanza"):  # 400 MB and many seconds in each worker, for engines not used here
    from presidio_analyzer import LocalRecognizer, Pattern, PatternRecognizer, RecognizerResult
    from presidio_analyzer.predefined_recognizers import EmailRecognizer, PhoneRecognizer, UrlRecognizer

TYPES = ("EMAIL", "URL", "ADDRESS", "PHONE", "HANDLE", "NAME")  # of two that overlap the earlier type stands
_REGIONS = ("US", "GB", "AU", "IN", "DE", "FR")
_POSSIBLE = 0  # of phonenumbers' leniency: the shape of a number; validity would miss made-up and foreign ones
# A capitalised word that does not begin a sentence: without one there is no context to look for.
_CAPITAL_INSIDE = regex.compile(r"(?:[\p{L}\d,;:'\"()]|\b(?:Dr|Mr|Mrs|Ms|Mx|Prof|Rev)\.)\s+(?:\p{Lu}['’])?\p{Lu}\p{Ll}")
_SIGNATURE_CHARS = 120  # at the end of a text
_BEHIND_HOST = regex.compile(r":\d{1,5}\b(?:[/?#]\S*[\w/=])?")
_BARE_DOMAINS = ("com", "org", "net", "edu", "gov", "io", "co.uk", "org.uk", "de", "ca", "com.au")


@dataclass(frozen=True)
class Span:
    """A piece of text that tells who somebody is."""

    start: int
    end: int
    type: str


@dataclass(frozen=True)
class _Finder:
    """A recogniser, and a cheap test of whether a text can hold anything for it."""

    type: str
    recognizer: LocalRecognizer
    worth_it: Callable[[str], Any]


def find(text: str) -> list[Span]:
    """Personal data in reading order, without overlaps."""
    found: list[Span] = []
    for finder in _finders():
        if not finder.worth_it(text):
            continue
        recognizer: Any = finder.recognizer  # presidio wants the words of a language model, and does without them
        for result in recognizer.analyze(text, recognizer.supported_entities, None):
            span = Span(result.start, result.end, finder.type)
            if all(span.end <= other.start or other.end <= span.start for other in found):
                found.append(span)
    return sorted(found, key=lambda span: span.start)


def mask(text: str) -> tuple[str, Counter[str]]:
    """The text with a typed placeholder for each piece of personal data, and how many there were of each type."""
    parts, at = [], 0
    spans = find(text)
    for span in spans:
        parts += [text[at : span.start], f"[{span.type}]"]
        at = span.end
    return "".join([*parts, text[at:]]), Counter(span.type for span in spans)


class _Email(EmailRecognizer):
    """presidio's, with the list of top-level domains that comes with `tldextract`; its own would be fetched."""

    def validate_result(self, pattern_text: str) -> bool:
        return bool(_domains()(pattern_text).suffix)


class _Url(UrlRecognizer):
    """presidio's, and what it leaves of an address with a port; a domain without `https://` or `www.` must be a common
    one, for people forget the blank after a full stop ("at home.My mother")."""

    def analyze(
        self, text: str, entities: list[str], nlp_artifacts: Any = None, regex_flags: int | None = None
    ) -> list[RecognizerResult]:
        results = super().analyze(text, entities, nlp_artifacts, regex_flags)
        for result in results:
            rest = _BEHIND_HOST.match(text, result.end)
            result.end = rest.end() if rest else result.end
        return results

    def validate_result(self, pattern_text: str) -> bool:
        text = pattern_text.strip("\"'")
        if text.lower().startswith(("http://", "https://", "www.")):
            return True
        host, _, path = text.partition("/")
        suffix = _domains()(host).suffix
        return host == host.lower() and (suffix in _BARE_DOMAINS or bool(suffix and path))


class _Phone(PhoneRecognizer):
    """presidio's; runs of digits that only look like a number (years, scores) are told apart by their separators."""

    def analyze(self, text: str, entities: list[str], nlp_artifacts: Any = None) -> list[RecognizerResult]:
        results = super().analyze(text, entities, nlp_artifacts)
        return sorted((r for r in results if _like_a_number(text, r.start, r.end)), key=lambda r: r.start - r.end)


class _Names(PatternRecognizer):
    """Names by their context, in signatures, and first names that mean nothing else with what follows of the name."""

    def __init__(self) -> None:
        super().__init__("NAME", patterns=_name_patterns(), global_regex_flags=regex.V0)
        self._signatures = PatternRecognizer("NAME", patterns=_signature_patterns(), global_regex_flags=regex.V0)

    def analyze(
        self, text: str, entities: list[str], nlp_artifacts: Any = None, regex_flags: int | None = None
    ) -> list[RecognizerResult]:
        in_context = _CAPITAL_INSIDE.search(text) or "name" in text.lower()
        results = super().analyze(text, entities, nlp_artifacts, regex_flags) if in_context else []
        begin = max(0, len(text) - _SIGNATURE_CHARS)
        for result in self._signatures.analyze(text[begin:], entities):
            result.start, result.end = result.start + begin, result.end + begin
            results.append(result)
        results += [
            RecognizerResult(self.supported_entities[0], match.start(), match.end(), 0.5)
            for match in _full_name().finditer(text)
            if match["first"] in _words()["first_names"]
        ]
        return sorted(results, key=lambda result: result.start - result.end)  # the longest of those that overlap

    def validate_result(self, pattern_text: str) -> bool | None:
        """A name written small must be a known one."""
        return pattern_text.title() in _words()["first_names"] if pattern_text.islower() else None


def _like_a_number(text: str, start: int, end: int) -> bool:
    number = text[start:end]
    digits = sum(c.isdigit() for c in number)
    if number.startswith("+") or regex.search(r"\(\d+\)", number):
        return digits >= 7
    if regex.fullmatch(r"(?:19|20)\d\d\s*[-/.]\s*(?:19|20)\d\d", number) or regex.search(r"\s[-/]\s", number):
        return False
    groups = regex.findall(r"\d+", number)
    if any(len(group) < 2 for group in groups):  # "10 5 3 20 1": counting
        return False
    if len(groups) > 1:
        return digits >= 9 or bool(regex.fullmatch(r"\d{3}[-.]\d{4}", number))
    before = text[max(0, start - 40) : start].lower()
    return digits >= 10 or (
        digits >= 7 and bool(regex.search(r"phone|call|text|number|cell|mobile|reach|tel\b", before))
    )


@cache
def _words() -> dict[str, frozenset[str]]:
    text = resources.files("psycho.speeches").joinpath("personal.yaml").read_text(encoding="utf-8")
    return {key: frozenset(words.split()) for key, words in yaml.safe_load(text).items()}


@cache
def _domains() -> tldextract.TLDExtract:
    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)


def _name(*excluded: str) -> str:
    """A capitalised word that is none of the lists `excluded`."""
    stop = "|".join(sorted(word for words in excluded for word in _words()[words]))
    return rf"(?!(?:{stop})\b)(?:\p{{Lu}}['’])?\p{{Lu}}\p{{Ll}}+(?:-\p{{Lu}}\p{{Ll}}+)?"


def _further(name: str) -> str:
    """Up to two more names after a first one, with initials between them."""
    return rf"(?:\s+(?:\p{{Lu}}\.\s+)?{name}){{0,2}}\b"


@cache
def _full_name() -> Any:
    name = _name("not_names", "seldom_names")
    return regex.compile(rf"\b(?P<first>{name}){_further(name)}")


def _patterns(*expressions: str) -> list[Pattern]:
    return [Pattern(str(number), expression, 0.6) for number, expression in enumerate(expressions)]


def _name_patterns() -> list[Pattern]:
    name = _name("not_names")
    full = name + _further(name)
    people = (
        "husband|wife|son|daughter|brother|sister|boyfriend|girlfriend|fianc[eé]e?|partner|ex|friend|mom|mum|mother|dad|"
        "father|boss|manager|therapist|counsell?or|psychiatrist|psychologist|cousin|aunt|uncle|nephew|niece|roommate|"
        "coworker|co-worker|colleague|teacher|neighbou?r|stepson|stepdaughter|stepfather|stepmother|stepdad|stepmom"
    )
    return _patterns(
        rf"(?i:\bmy (?:full |real |first )?name(?: is|'s)|\bpeople call me|\bi am called)\s+\K{full}",
        r"(?i:\bmy (?:full |real |first )?name(?: is|'s))\s+\K\p{Ll}{2,}\b",
        rf"(?i:\bi'm|\bi am|\b(?:hi|hello|hey),? this is|\bcall me)\s+\K{full}"
        r"(?=\s*(?:,\s*(?:an?\b|and\b|\d)|\.\s|\(\d|\band i'm\b|$))",
        rf"\b(?:Dr|Mr|Mrs|Ms|Mx|Prof|Professor|Doctor|Pastor|Rev|Coach|Miss)\.?\s+\K{full}",
        rf"(?i:\bmy|\bhis|\bher|\bour|\btheir)\s+(?:\w+[- ]){{0,2}}?(?:{people})\s*,?\s+\K{full}",
        rf"\b(?:named|called|name is|name was)\s+\K{full}",
    )


def _signature_patterns() -> list[Pattern]:
    name = _name("not_names")
    full = name + _further(name)
    closing = (
        "best(?: wishes| regards)?|kind regards|warm regards|warmly|regards|sincerely|yours(?: sincerely| truly)?|"
        "respectfully|thanks(?: so much| a lot| again| in advance)?|thank you(?: so much)?|many thanks|cheers|love|"
        "signed|take care"
    )
    return _patterns(
        rf"(?:^|[.!?,;)]\s*|\n)\s*(?i:{closing})\s*[,.!\n–—-]*\s*\K{full}(?=\s*[.!]?\s*\Z)",
        rf"(?:[-–—~]\s?)\K{full}(?=\s*[.!]?\s*\Z)",
    )


def _address_patterns() -> list[Pattern]:
    word = r"(?:\p{Lu}[\p{L}'’.-]*|\d+(?:st|nd|rd|th))"
    kind = (
        "Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Pl|Way|Terrace|Close|Crescent|"
        "Square|Highway|Hwy|Parkway|Pkwy|Circle|Cir|Trail|Row|Mews|Gardens|Grove|Hill|Walk"
    )
    side = r"(?:\s+(?:[NS][EW]?|[EW])\b)?"
    flat = r"(?:,?\s+(?:Apt|Apartment|Unit|Suite|Flat|Room|#)\.?\s*#?\w{1,5})?"
    city = r"(?:,\s*\p{Lu}[\p{L}.-]+(?:\s\p{Lu}[\p{L}.-]+){0,2})?"
    code = r"(?:,?\s+[A-Z]{2}\.?)?(?:,?\s+(?:\d{5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]?\s?\d[A-Z]{2}))?"
    small = r"(?!(?:the|down|a|of|per|my|our|his|her|this|that|same|main|miles?|blocks?|minutes?|hours?)\b)\p{Ll}{3,}"
    return _patterns(
        rf"\b\d{{1,5}}[A-Za-z]?,?\s+(?:[NSEW]{{1,2}}\.?\s+)?(?:{word}\s+){{1,3}}(?:{kind})\b\.?{side}{flat}{city}{code}",
        rf"\b\d{{1,5}}\s+{small}\s+(?:street|avenue|road|lane|drive|boulevard)\b",
        rf"(?i:\bP\.?\s?O\.?\s*Box)\s+\d+{city}{code}",
        r"\b(?:Flat|Apartment|Apt|Unit)\.?\s+\d{1,4}[A-Za-z]?,\s+\d{1,5}\s+\p{Lu}\p{L}+(?:\s\p{Lu}\p{L}+){0,2}",
        r"\b\p{Lu}[\p{L}-]*(?:straße|strasse|str\.|weg|platz|gasse|allee)\s+\d{1,4}[a-z]?\b(?:,?\s+\d{5}\s+\p{Lu}\p{L}+)?",
        r"\b\d{1,4},?\s+(?:rue|avenue|boulevard|place|chemin|via|calle|piazza)\s+(?:d[eu]s?\s+|l[ae]s?\s+|della\s+)*\p{Lu}[\p{L}'-]+",
        r"\b(?:Calle|Via|Rue|Avenida|Rua)\s+(?:\p{Lu}?[\p{L}'-]+\s+){1,3}\d{1,4}\b",
        r"\b\p{Lu}[\p{L}.-]+(?:\s\p{Lu}[\p{L}.-]+)?,\s*[A-Z]{2}\.?\s+\d{5}(?:-\d{4})?\b",
        r"\b[A-Z]{1,2}\d[A-Z\d]?\s\d[A-Z]{2}\b",
    )


_APPS = (
    r"instagram|insta|ig|snap(?:chat)?|twitter|tik\s?tok|discord|telegram|kik|skype|reddit|steam|twitch|wechat|"
    r"user\s?name|screen\s?name|handle|gamer\s?tag"
)
# Pieces of those words, for a first look that is quick.
_HINTS = (
    *("@", "u/", "#", "insta", "ig ", "ig:", "snap", "twit", "tik", "disc", "tele", "kik", "skyp", "redd", "steam"),
    *("wechat", "user", "screen", "handle", "gamer"),
)
_HANDLES = (
    r"(?<![\w@./+-])@[A-Za-z0-9_](?:[\w.]{0,28}\w)\b(?!@)",
    r"(?<![\w/])/?u/[A-Za-z0-9_-]{3,20}\b",
    rf"(?i)\b(?:{_APPS})\b"
    r"(?:\s+(?:is|account|name|username|handle|id|user|at|under|as|me|on))*\s*[:=]?\s*[\"']?"
    r"\K[A-Za-z][\w.]*[\d_.#][\w.#]*\w\b",
    r"\b[A-Za-z]\w{2,31}#\d{4}\b",
)
_PHONES = (
    r"(?<![\w.-])(?:\+?1[\s.-]?)?(?:\(\d{3}\)\s?|\d{3}[\s.-])\d{3}[\s.-]\d{4}\b",
    r"(?<!\w)\+\d{1,3}[\s.-]?(?:\(\d+\)[\s.-]?)?\d[\d\s.-]{5,13}\d\b",
    r"(?i)\b(?:phone|call|text|number|cell|mobile|reach|tel)\b\D{0,25}\K\d{3}[-.\s]\d{4}\b",
)
_AT = (
    r"(?i)\b[\w.+-]+\s*[(\[]\s*at\s*[)\]]\s*[\w-]+(?:\s*[(\[]\s*dot\s*[)\]]\s*|\.)[a-z]{2,}\b"
    r"|\b[\w.+-]+ at [\w-]+ dot (?:com|net|org|edu|de)\b"
)


@cache
def _finders() -> tuple[_Finder, ...]:
    def own(kind: str, patterns: Iterable[str] | list[Pattern]) -> PatternRecognizer:
        made = [p if isinstance(p, Pattern) else Pattern("own", p, 0.6) for p in patterns]
        return PatternRecognizer(kind, patterns=made, global_regex_flags=regex.MULTILINE)

    digits = regex.compile(r"\d\D{0,4}\d\D{0,4}\d\D{0,4}\d\D{0,4}\d\D{0,4}\d\D{0,4}\d").search
    house = regex.compile(r"\d").search
    after_dot = regex.compile(r"\.[A-Za-z]").search

    def handles(text: str) -> bool:
        small = text.lower()
        return any(hint in small for hint in _HINTS)

    return (
        _Finder("EMAIL", _Email(), lambda text: "@" in text),
        _Finder("EMAIL", own("EMAIL", [_AT]), regex.compile(r"(?i)[(\[]\s*at\b|\bdot\b").search),
        _Finder("URL", _Url(), lambda text: "://" in text or after_dot(text)),
        _Finder("ADDRESS", own("ADDRESS", _address_patterns()), house),
        _Finder("PHONE", own("PHONE", _PHONES), digits),
        _Finder("PHONE", _Phone(supported_regions=_REGIONS, leniency=_POSSIBLE), digits),
        _Finder("HANDLE", own("HANDLE", _HANDLES), handles),
        _Finder("NAME", _Names(), regex.compile(r"\p{Lu}\p{Ll}|(?i)name(?: is|'s)").search),
    )

"""Referring expressions: one list per image from whatever holds them, and cleaned of what web text suffers from."""

import html
import re
import unicodedata
from collections.abc import Callable
from html.entities import html5
from typing import Any

from .image_decoding_sera import as_list

DEFAULT_MAX_TOKENS = 77  # CLIP's, for tokenizers where nobody set a limit
CHARACTERS_PER_TOKEN = 128  # more than the longest token of a vocabulary has
WINDOWS = (1, 4)  # how much of a text is cleaned, in multiples of what its tokens can hold, until enough is left
MAX_PASSES = 8  # three settle all texts but those made to need more
SHOWN_CHARACTERS = 60  # of an expression in a message
MAX_DIGITS = 8  # a reference of more is to no character

AMPERSANDS = re.compile("&(?:(?:amp|#0*38|#[xX]0*26);)+")  # one that was escaped again and again
ENTITY = re.compile("&(?:#(?:[0-9]+|[xX][0-9a-fA-F]+)|[A-Za-z][A-Za-z0-9]{1,40});")
ENTITY_REACH = 50  # an entity that a replacement completes begins at most this far before it
PLAIN_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′", "'"),
        **dict.fromkeys("“”„‟″", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        "…": "...",
    }
)
# The byte behind each character when UTF-8 is decoded as Windows-1252. Five bytes have no character there. Like all of
# 0x80-0x9f in Latin-1, they become the control character of the same number.
BYTE_OF_CHARACTER = {chr(byte): byte for byte in range(0x80, 0x100)} | {
    character: byte for byte in range(0x80, 0xA0) if (character := bytes([byte]).decode("cp1252", errors="ignore"))
}
_CONTINUATION = "[" + "".join(re.escape(c) for c, byte in BYTE_OF_CHARACTER.items() if byte < 0xC0) + "]"
# Leading bytes of accented Latin letters, punctuation and emoji only. With all of them, real text would be changed too: an
# upper-case accented letter before a closing quote, for example.
MOJIBAKE = re.compile(f"[\xc2\xc3]{_CONTINUATION}|[\xe2\xef]{_CONTINUATION}{{2}}|\xf0{_CONTINUATION}{{3}}")
MOJIBAKE_REACH = 3


def clean_expression(text: str, max_tokens: int = DEFAULT_MAX_TOKENS) -> str:
    """Repair what web text suffers from, without changing what it says; cleaning twice changes nothing.

    HTML entities are resolved (escaped twice too), UTF-8 that was decoded as Windows-1252 or Latin-1 is decoded again,
    characters are composed (NFC), curly quotes and dashes made plain, control and zero-width characters removed, white space
    collapsed. The tokenizer changes the case. (Ours, for what CLIP's first tokenizer left to ftfy.)

    The time is bounded by the tokens that are read: no more characters are cleaned and kept than they can hold.

    Args:
        text: the expression, of any length.
        max_tokens: how many tokens of it the model reads.

    Returns:
        The cleaned text, at most `CHARACTERS_PER_TOKEN * max_tokens` characters.
    """
    limit = CHARACTERS_PER_TOKEN * max_tokens
    text = AMPERSANDS.sub("&", text.strip())
    for window in WINDOWS:
        cleaned = _cleaned(text[: window * limit])
        if len(cleaned) >= limit or window * limit >= len(text):
            break
    return cleaned[:limit].rstrip()


def grouped_expressions(text: Any, max_tokens: int = DEFAULT_MAX_TOKENS) -> tuple[list[list[str]], bool]:
    """Check expressions and clean them.

    Args:
        text: a string; or a list, tuple, array, `datasets` Column or pandas Series of strings, or of lists of strings.
        max_tokens: see `clean_expression`.

    Returns:
        One list of cleaned expressions per image, and whether `text` was nested.

    Raises:
        TypeError: text that is no such thing, an expression that is no string.
        ValueError: no expression, or one with nothing in it.
    """
    items = [text] if isinstance(text, str) else as_list(text)
    if items is None:
        raise TypeError(f"text must be a string, a list of strings or of such lists, got {type(text).__name__}.")
    if not items:
        raise ValueError("text is empty: give at least one expression.")
    lists = [as_list(item) for item in items]
    is_nested = all(group is not None for group in lists)
    groups: list[list[str]] = []
    for i, group in enumerate(lists if is_nested else [[item] for item in items]):
        if not group:
            raise ValueError(f"text[{i}] is empty: every image needs at least one expression.")
        groups.append([])
        for j, expression in enumerate(group):
            place = "text" if isinstance(text, str) else f"text[{i}][{j}]" if is_nested else f"text[{i}]"
            if not isinstance(expression, str):
                raise TypeError(f"{place} must be a string, got {type(expression).__name__}.")
            groups[-1].append(clean_expression(expression, max_tokens))
            if not groups[-1][-1]:
                raise ValueError(f"{place} is an empty expression: {shortened(expression)!r}.")
    return groups, is_nested


def shortened(expression: str) -> str:
    """An expression as messages show it."""
    return expression if len(expression) <= SHOWN_CHARACTERS else expression[: SHOWN_CHARACTERS - 1] + "…"


def _cleaned(text: str) -> str:
    for _ in range(MAX_PASSES):
        before = text
        text = unicodedata.normalize("NFC", text)
        text = _replaced(ENTITY, _resolved, text, ENTITY_REACH)
        text = _replaced(MOJIBAKE, _decoded_again, text, MOJIBAKE_REACH)
        text = unicodedata.normalize("NFC", text).translate(PLAIN_CHARACTERS)
        text = " ".join(_visible(text).split())  # only now: control characters are parts of UTF-8 decoded as Latin-1
        if text == before:
            break
    return text


def _replaced(pattern: re.Pattern, replace: Callable[[str], str], text: str, reach: int) -> str:
    """Replace matches from left to right, those too that begin before a replacement and end in it, until none is left."""
    start = 0
    while match := pattern.search(text, start):
        found = match[0]
        new = replace(found)
        if new == found:
            start = match.start() + 1
        else:  # each replacement is shorter than what it replaces, so this ends
            text = text[: match.start()] + new + text[match.end() :]
            start = max(match.start() - reach, 0)
    return text


def _resolved(entity: str) -> str:
    """The characters that an HTML entity stands for; itself where there are none."""
    if entity[1] != "#":
        return unicodedata.normalize("NFC", html5.get(entity[1:], entity))
    is_hexadecimal = entity[2] in "xX"
    digits = entity[3 if is_hexadecimal else 2 : -1].lstrip("0") or "0"
    if len(digits) > MAX_DIGITS:
        return "\ufffd"  # as HTML has it for a number that is no character's
    return unicodedata.normalize("NFC", html.unescape(f"&#{'x' if is_hexadecimal else ''}{digits};"))


def _decoded_again(characters: str) -> str:
    try:
        decoded = bytes(BYTE_OF_CHARACTER[c] for c in characters).decode("utf-8")
    except UnicodeDecodeError:
        return characters
    return unicodedata.normalize("NFC", decoded)


def _visible(text: str) -> str:
    """A text without control, format and surrogate characters, white space aside."""
    hidden = [c for c in set(text) if not c.isspace() and unicodedata.category(c) in ("Cc", "Cf", "Cs")]
    return text.translate(dict.fromkeys(map(ord, hidden))) if hidden else text


__all__ = ["DEFAULT_MAX_TOKENS", "clean_expression", "grouped_expressions", "shortened"]

"""Test-time augmentation with a horizontal flip: answers averaged over an image and its flipped image (ours)."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_SIDES = {"l": "right", "r": "left"}  # by the first letter of a side as it is written
# Sides as people type them, and what they join to a side without a space. Other words, such as "bright", have other parts.
_LEFT, _RIGHT = "left+|lef|letf|lfet|lft", "right+|rigth|rigt|righ|rihgt|rght"
_PLACES = "top|bottom|upper|lower|middle|mid|center|centre|front|back|rear|far|most"
_BEFORE = f"{_PLACES}|on|the|to|from|in|at"
_AFTER = f"{_PLACES}|hand|handed|side|sides|sided|corner|er|est|ward|wards|y|s"
_SIDE_WORD = re.compile(
    rf"(?<![a-z])(?P<before>(?:{_BEFORE})*)(?P<side>{_LEFT}|{_RIGHT})(?P<after>(?:{_AFTER})*)(?![a-z])", re.IGNORECASE
)
# "right" before one of these means "exactly", as in "right behind the cup", unless a word that a side follows is before it.
_EXACTLY = re.compile(
    r"\s+(?:behind|above|below|beneath|under|underneath|next|beside|between|against|after|before|by|here|there|now|up|where"
    r"|on top|in (?:front|between|(?:the )?(?:middle|center|centre)))(?![a-z])",
    re.IGNORECASE,
)
_NAMES_A_SIDE = re.compile(
    rf"(?<![a-z])(?:{_BEFORE}|looking|facing|second|third|\d(?:nd|rd|th)|her|his|its|my|our|their|your)[\s-]+$",
    re.IGNORECASE,
)
_NO_SIDE = re.compile(r"(?:[\s-]side)?\s+(?:up|out)\b(?! of)|\s+angle", re.IGNORECASE)  # as in "right side up"


def swap_left_right(sentence: str) -> str:
    """The sentence that is true of the horizontally flipped image (ours).

    "left" and "right" change places, also in longer words ("leftmost", "bottomright") and in common misspellings ("rigth", which
    becomes "left"). "right" stays where it means "exactly" ("right behind the cup") and in words that have nothing to do with a
    side ("bright").

    Args:
        sentence: An expression.

    Returns:
        The expression with sides swapped; the swapped sides are in lower case, everything else is as before.
    """
    return _SIDE_WORD.sub(_swapped, sentence)


def _swapped(found: re.Match[str]) -> str:
    side = found["side"].lower()
    if side.startswith("r") and not found["before"] and not found["after"]:
        earlier, later = found.string[: found.start()], found.string[found.end() :]
        if _NO_SIDE.match(later) or (_EXACTLY.match(later) and not _NAMES_A_SIDE.search(earlier)):
            return found[0]
    return found["before"] + _SIDES[side[0]] + found["after"]


def average_answers(answer: Mapping[str, Tensor], flipped: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The logits of the mean probabilities of an image and of its flipped image. The columns of the second are turned back.

    Args:
        answer: The model's "logits" (N, h, w) for the images and, if it predicts presence, "presence_logits" (N,).
        flipped: The same for the flipped images.

    Returns:
        The same names, float32.
    """
    averaged = {"logits": _mean(answer["logits"], flipped["logits"].flip(-1))}
    if answer.get("presence_logits") is not None:
        averaged["presence_logits"] = _mean(answer["presence_logits"], flipped["presence_logits"])
    return averaged


def _mean(one: Tensor, other: Tensor) -> Tensor:
    """The logit of the mean of two probabilities, from their logits; also where a probability rounds to 0 or 1."""
    one, other = one.float(), other.float()
    return torch.logaddexp(logsigmoid(one), logsigmoid(other)) - torch.logaddexp(logsigmoid(-one), logsigmoid(-other))


__all__ = ["average_answers", "swap_left_right"]

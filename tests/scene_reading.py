"""A second reading of the scenes' expressions: from the text alone, over the words, the attributes and the masks.

It shares nothing with the generator's own: neither its grammar nor its geometry.
"""

import re

import numpy as np

WORDS = {
    "shape": {
        "circle": "circle disc circles discs",
        "square": "square squares",
        "triangle": "triangle triangles",
        "star": "star stars",
        "ring": "ring hoop rings hoops",
        "frame": "frame frames",
        "bar": "bar rod stick bars rods sticks",
        "heart": "heart hearts",
        "cross": "cross plus crosses pluses",
        "moon": "moon crescent moons crescents",
        "hourglass": "hourglass hourglasses",
        "arch": "arch arc arches arcs",
        None: "thing object shape one things objects shapes",
    },
    "color": {name: name for name in ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")},
    "size": {"large": "large big huge long", "small": "small little tiny short"},
    "texture": {
        "striped": "striped stripes",
        "dotted": "dotted spotted dots spots",
        "checkered": "checkered checked checks",
        "plain": "plain",
    },
}
LEXICON = {
    word: (attribute, value)
    for attribute, values in WORDS.items()
    for value, words in values.items()
    for word in words.split()
}
PATTERNS = [
    ("largest", r"(?:largest|biggest) of the (?P<a>.+)"),
    ("smallest", r"smallest of the (?P<a>.+)"),
    ("largest", r"(?P<a>.+) that is the (?:largest|biggest)"),
    ("smallest", r"(?P<a>.+) that is the smallest"),
    (
        "beside",
        r"(?P<a>.+?)(?: that is| which is| located)? (?:to the |on the )?(?P<side>left|right) of the (?P<b>.+)",
    ),
    (
        "beside",
        r"(?P<a>.+?)(?: that is| which is| located)? (?P<side>above|below|higher than|lower than) the (?P<b>.+)",
    ),
    ("nearest", r"(?P<a>.+?)(?: that is)? (?:closest|nearest) to the (?P<b>.+)"),
    ("farthest", r"(?P<a>.+?)(?: that is)? farthest(?: away)? from the (?P<b>.+)"),
    ("contact", r"(?P<a>.+?) (?:overlapping|that overlaps|touching|that touches) the (?P<b>.+)"),
    ("front", r"(?P<a>.+?) (?:(?:that is )?in front of|covering part of|that covers part of) the (?P<b>.+)"),
    (
        "behind",
        r"(?P<a>.+?) (?:(?:that is )?behind|partly hidden by|that is partly covered by) the (?P<b>.+)",
    ),
    ("rank", r"(?P<rank>second|third) (?P<a>.+) from (?:the )?(?P<side>left|right|top|bottom)"),
    ("corner", r"(?P<v>top|upper|bottom|lower) (?P<h>left|right) (?P<a>.+)"),
    ("corner", r"(?P<a>.+?) (?:in the |at the )?(?P<v>top|upper|bottom|lower) (?P<h>left|right)(?: corner)?"),
    ("rank", r"far (?P<side>left|right) (?P<a>.+)"),
    ("rank", r"(?P<a>.+) on the far (?P<side>left|right)"),
    ("rank", r"(?P<side>left|right|top|bottom|highest|lowest)(?:most)? (?P<a>.+)"),
    ("side", r"(?P<a>.+) on (?:the )?(?P<side>left|right)(?: side)?"),
    ("side", r"(?P<a>.+) (?:at|near) the (?P<side>top|bottom)"),
    ("middle", r"(?:middle|center) (?P<a>.+)"),
    ("middle", r"(?P<a>.+) in the (?:middle|center)"),
    ("largest", r"(?:largest|biggest) (?P<a>.+)"),
    ("smallest", r"smallest (?P<a>.+)"),
    ("plain", r"(?P<a>.+)"),
]
SIDES = {"above": "top", "highest": "top", "higher than": "top", "upper": "top"}
SIDES |= {"below": "bottom", "lowest": "bottom", "lower than": "bottom", "lower": "bottom"}


def parse(text):
    """(relation, the regular expression's groups): what the words say, or an error where they say nothing known."""
    text = text.removeprefix("the ")
    for relation, pattern in PATTERNS:
        match = re.fullmatch(pattern, text)
        if match and {*match["a"].split()} <= {*LEXICON, "with"}:  # the outermost relation follows plain attributes
            return relation, {key: SIDES.get(value, value) for key, value in match.groupdict().items()}
    raise AssertionError(f"no reading of {text!r}")


def candidates(phrase, objects):
    """Numbers of the objects that have every attribute named: strictly, and with a lenient eye."""
    wanted = dict(LEXICON[word] for word in phrase.split() if word != "with")
    alike = {("circle", "ring"), ("square", "frame"), ("moon", "arch"), ("arch", "moon")}
    alike |= {("small", "medium"), ("large", "medium")}
    strict, lenient = set(), set()
    for i, item in enumerate(objects):
        pairs = [(value, getattr(item, key)) for key, value in wanted.items() if value is not None]
        if all(a == b for a, b in pairs):
            strict.add(i)
        if all(a == b or (a, b) in alike for a, b in pairs):
            lenient.add(i)
    return strict, lenient


def centers(objects):
    """Centres of the visible pixels, (x, y) in 0..1."""
    found = []
    for item in objects:
        y, x = np.nonzero(item.mask)
        found.append(((x.mean() + 0.5) / item.mask.shape[1], (y.mean() + 0.5) / item.mask.shape[0]))
    return np.array(found)


def answers(relation, groups, among, anchor, objects, xy):
    """Those of `among` that satisfy the relation in the plainest sense of the words."""
    along = {"left": xy[:, 0], "right": 1 - xy[:, 0], "top": xy[:, 1], "bottom": 1 - xy[:, 1]}
    among = sorted(among - {anchor})
    if relation == "plain":
        return set(among)
    if relation == "rank":
        rank = {"second": 1, "third": 2}.get(groups.get("rank"), 0)
        return set(sorted(among, key=lambda i: along[groups["side"]][i])[rank : rank + 1])
    if relation == "side":
        return {i for i in among if along[groups["side"]][i] < 0.43}
    if relation == "corner":
        return {i for i in among if along[groups["v"]][i] < 0.46 and along[groups["h"]][i] < 0.46}
    if relation == "middle":
        return {i for i in among if np.abs(xy[i] - 0.5).max() < 0.2}
    if relation in ("largest", "smallest"):
        best = max if relation == "largest" else min
        return {best(among, key=lambda i: objects[i].full_mask.sum())}
    if relation == "beside":
        return {i for i in among if along[groups["side"]][i] < along[groups["side"]][anchor]}
    if relation in ("nearest", "farthest"):
        best = min if relation == "nearest" else max
        return {best(among, key=lambda i: np.hypot(*(xy[i] - xy[anchor])))}
    found = set()
    for i in among:
        shared = objects[i].full_mask & objects[anchor].full_mask
        over, under = (shared & objects[i].mask).sum(), (shared & objects[anchor].mask).sum()
        if {"contact": over + under, "front": over, "behind": under}[relation]:
            found.add(i)
    return found


def readings(text, objects, xy):
    """Numbers of the objects that the text may mean: by a strict and by a lenient look at attributes.

    A relation's anchor must be one object in either look; what follows it may be a relation of its own.
    """
    relation, groups = parse(text)
    anchor = None
    if "b" in groups:
        strict, lenient = readings(groups["b"], objects, xy)
        assert len(strict) == 1 and strict == lenient, text
        (anchor,) = strict
    return tuple(answers(relation, groups, among, anchor, objects, xy) for among in candidates(groups["a"], objects))

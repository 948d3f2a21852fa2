"""Copy-paste images: what is seen of each object, and that every sentence is true of its object alone."""

import numpy as np
import pytest
from builders import disc
from PIL import Image
from squares import COLORS, make_rows

from training.examples.copy_paste import CopyPaste, CutOut, describe, names_a_place, nouns

ROWS = [{"red": ["red square", "left one"], "green": ["green thing there"]}, {"blue": ["blue square"]}]


def cut_out(category: str, sentences: list[str] | None = None) -> CutOut:
    blank = Image.new("RGB", (8, 8))
    return CutOut(blank, Image.new("L", (8, 8), 255), category, nouns(category, sentences or []), sentences or [])


def described(
    categories: list[str], centres: list[tuple[int, int]], radii: list[int], draws: int = 40
) -> list[set[str]]:
    """All sentences of discs in an image of 100×200 pixels, over many draws."""
    masks = [disc((100, 200), centre, radius) for centre, radius in zip(centres, radii, strict=True)]
    found = [set() for _ in categories]
    for seed in range(draws):
        texts = describe([cut_out(category) for category in categories], masks, np.random.default_rng(seed))
        for seen, sentences in zip(found, texts, strict=True):
            seen.update(sentences)
    return found


def test_places_are_those_of_the_objects():
    first, second, third = described(["dog"] * 3, [(50, 30), (50, 100), (50, 170)], [12, 12, 12])
    assert {"left dog", "far left", "left"} <= first and {"right dog", "far right", "right"} <= third
    assert {"middle dog", "middle", "second dog from left", "second dog from right"} <= second
    assert "third dog from left" in third and "third dog from right" in first
    for mine, words in ((first, ("right dog", "rightmost", "middle")), (third, ("left dog", "leftmost", "middle"))):
        assert not any(word in sentence for sentence in mine for word in words)
    assert not any(sentence.startswith(("left", "right", "far")) for sentence in second)
    assert not any("big" in sentence or "small" in sentence for sentence in first | second | third)
    # no sentence is said of two objects
    assert not (first & second or first & third or second & third)


def test_heights_sizes_and_lone_objects():
    high, low, cat = described(["dog", "dog", "cat"], [(20, 60), (70, 60), (50, 150)], [8, 20, 12])
    assert "top dog" in high and "bottom dog" in low and {"cat", "the cat"} == cat
    assert {"smaller dog", "smallest dog"} <= high and {"big dog", "biggest dog"} <= low
    # right above each other: neither is the left one, and the cat, which is no dog, does not make "left" alone ambiguous
    assert not any("left" in sentence or "right" in sentence for sentence in high | low)


def test_a_word_alone_is_said_where_it_is_true_among_all_objects():
    dog, other, cat = described(["dog", "dog", "cat"], [(50, 60), (50, 170), (50, 20)], [12, 12, 12])
    assert "left dog" in dog and not {"left", "left one", "far left"} & dog
    assert {"right", "far right"} <= other and "cat" in cat


def test_people_are_called_what_their_sentences_call_them():
    assert nouns("person", ["Woman in red", "the lady"]) == ["woman", "lady", "person"]
    assert nouns("person", ["red shirt"]) == ["person"]
    assert nouns("wine glass", ["a man"]) == ["glass", "wine glass"]


def test_objects_are_whole_enough_and_apart_and_keep_sentences_without_a_place():
    copy_paste = CopyPaste(make_rows(ROWS))
    colors = {"red square": "red", "green thing there": "green", "blue square": "blue"}
    said = set()
    for seed in range(30):
        example = copy_paste.draw(np.random.default_rng(seed))
        pixels = np.asarray(example.image)
        masks = dict(zip(example.sources, example.masks, strict=True))
        assert all(row == -1 for row, _ in masks)
        assert np.sum(list(masks.values()), axis=0).max() == 1
        for text, mask in zip(example.text, example.masks, strict=True):
            assert mask.shape == pixels.shape[:2] and mask.sum() >= 0.006 * mask.size
            if text in colors:
                assert np.abs(np.median(pixels[mask], axis=0) - COLORS[colors[text]]).max() < 12
        said |= set(example.text)
    assert set(colors) <= said


def test_own_sentences_that_name_a_place_are_left_out():
    copy_paste = CopyPaste(
        make_rows([{"red": ["square on the left", "red square next to it", "a red one", "red"]}] * 2)
    )
    assert copy_paste._cut_out(0).sentences == ["a red one"]


def test_the_same_numbers_draw_the_same_image():
    copy_paste = CopyPaste(make_rows(ROWS))
    one, same, another = (copy_paste.draw(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(np.asarray(one.image), np.asarray(same.image)) and one.text == same.text
    assert one.image.size != another.image.size or not np.array_equal(np.asarray(one.image), np.asarray(another.image))


def test_rows_without_a_category_or_with_several_objects_are_not_cut_out():
    rows = make_rows(ROWS)
    nameless = rows.map(lambda row, i: {"category": "" if i == 1 else row["category"]}, with_indices=True)
    assert CopyPaste(nameless).usable == [0, 2]
    several = rows.map(lambda row, i: {"ann_ids": [1, 2] if i == 0 else row["ann_ids"]}, with_indices=True)
    assert CopyPaste(several).usable == [1, 2]
    with pytest.raises(ValueError, match="category"):
        CopyPaste(rows.map(lambda row: {"category": ""}))


def test_a_split_without_objects_to_cut_out_is_refused():
    with pytest.raises(ValueError, match="fewer than two objects"):
        CopyPaste(make_rows([{"red": ["red square"]}]))


@pytest.mark.parametrize("sentence", ["dog left", "luggage bottomrigth", "dog lef", "cat in the picture", "second cup"])
def test_sentences_that_name_a_place_are_known(sentence):
    assert names_a_place(sentence)
    assert not names_a_place("a bright red cup with a handle")

"""The records of REFER's files: pickles that may hold plain data alone, and fields of wrong types, named with their file."""

import builtins
import collections
import copyreg
import datetime
import io
import json
import os
import pickle
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from builders import Folder, spoil

from training.sources.refer import load_refer
from training.sources.refer_records import load_plain_pickle

# Pickles


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_loads_from_every_protocol(tmp_path, protocol):
    data = [{"a": 1, "ü": -(2**70), "x": 1.5, "t": (True, None, ()), "s": "naïve 🦓", "n": {"deep": [[], {}]}}]
    if protocol >= 3:
        data.append(b"\x00\xff")
    if protocol >= 4:
        data.append({1, 2, frozenset("a")})
    assert load_plain_pickle(write(tmp_path / "refs.p", pickle.dumps(data, protocol))) == data


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"(lp0\nS'left zebra'\np1\na.", ["left zebra"]),
        (b"(lp0\nS'caf\\xc3\\xa9'\np1\na.", ["café"]),
        (b"(lp0\nVcaf\\u00e9\np1\na.", ["café"]),
        (b"\x80\x02]q\x00U\x05caf\xc3\xa9q\x01a.", ["café"]),
        (b"\x80\x02]q\x00T\x05\x00\x00\x00caf\xc3\xa9q\x01a.", ["café"]),
        (b"\x80\x02]q\x00U\x04caf\xe9q\x01a.", ["café"]),
        (b"\x80\x02]q\x00(U\x04caf\xe9X\x05\x00\x00\x00caf\xc3\xa9e.", ["café", "café"]),
        (b"(lp0\nI01\naL12345678901234567890L\na.", [True, 12345678901234567890]),
    ],
    ids=["0 str", "0 utf-8", "0 unicode", "2 utf-8", "2 long utf-8", "2 latin-1", "2 latin-1 and unicode", "0 long"],
)
def test_pickles_of_python_2_load_with_their_accents(tmp_path, content, expected):
    assert load_plain_pickle(write(tmp_path / "refs.p", content)) == expected


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda marker: Attack(os.system, f"touch {marker}"), "system"),
        (lambda marker: Attack(builtins.eval, f"open({str(marker)!r}, 'w')"), "eval"),
        (lambda marker: Attack(builtins.getattr, "text", "upper"), "getattr"),
        (lambda marker: np.arange(3), "numpy"),
        (lambda marker: np.float64(1.0), "numpy"),
        (lambda marker: collections.OrderedDict(a=1), r"collections\.OrderedDict"),
        (lambda marker: datetime.date(2016, 1, 1), r"datetime\.date"),
        (lambda marker: Path("x"), "pathlib"),
        (lambda marker: dict, "dict"),
        (lambda marker: 1j, "complex"),
    ],
    ids=["os.system", "eval", "getattr", "array", "numpy scalar", "OrderedDict", "date", "Path", "a class", "complex"],
)
def test_a_pickle_that_names_anything_is_refused_and_not_run(tmp_path, make, name, protocol):
    marker = tmp_path / "was_run"
    content = pickle.dumps([{"ref_id": 1, "sentences": [make(marker)]}], protocol)
    path = write(tmp_path / "refs(evil).p", content)
    with pytest.raises(pickle.UnpicklingError, match=rf"refs\(evil\)\.p.*names .*{name}"):
        load_plain_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "opcodes", ["(S'touch {}'\nios\nsystem\n.", "(cos\nsystem\nS'touch {}'\no."], ids=["INST", "OBJ"]
)
def test_the_old_ways_to_make_an_instance_are_refused_and_not_run(tmp_path, opcodes):
    marker = tmp_path / "was_run"
    path = write(tmp_path / "refs.p", opcodes.format(marker).encode())
    with pytest.raises(pickle.UnpicklingError, match=r"refs\.p.*os\.system"):
        load_plain_pickle(path)
    assert not marker.exists()


def test_persistent_ids_are_refused(tmp_path):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return "elsewhere" if value == "outside" else None

    buffer = io.BytesIO()
    Pickler(buffer).dump(["inside", "outside"])
    with pytest.raises(pickle.UnpicklingError, match=r"refs\.p.*persistent id 'elsewhere'"):
        load_plain_pickle(write(tmp_path / "refs.p", buffer.getvalue()))


def test_extension_codes_are_refused_known_or_not(tmp_path):
    path = write(tmp_path / "refs.p", b"\x80\x02\x82\xf0.")
    with pytest.raises(pickle.UnpicklingError, match=r"refs\.p.*extension code"):
        load_plain_pickle(path)
    copyreg.add_extension("collections", "OrderedDict", 0xF0)
    try:
        assert pickle.loads(path.read_bytes()) is collections.OrderedDict  # now known, and in the cache
        with pytest.raises(pickle.UnpicklingError, match=r"refs\.p.*collections\.OrderedDict"):
            load_plain_pickle(path)
    finally:
        copyreg.remove_extension("collections", "OrderedDict", 0xF0)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_truncated_pickle_is_refused_wherever_it_is_cut(tmp_path, protocol):
    content = pickle.dumps([{"ref_id": 7, "sent": "the left one, naïvely", "ids": [1, 2, 300, 70000]}], protocol)
    path = tmp_path / "refs.p"
    for cut in range(len(content)):
        with pytest.raises(pickle.UnpicklingError, match=r"refs\.p is refused"):
            load_plain_pickle(write(path, content[:cut]))


@pytest.mark.parametrize(
    "content", [b"<html>404</html>", b"\x89PNG\r\n", b"\x80\xff.", b"a.", b"h\x05.", b"\x80\x02X\x01\0\0\0\xff."]
)
def test_what_is_no_pickle_is_refused(tmp_path, content):
    with pytest.raises(pickle.UnpicklingError, match=r"refs\.p is refused"):
        load_plain_pickle(write(tmp_path / "refs.p", content))


def test_a_missing_pickle_names_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.p"):
        load_plain_pickle(tmp_path / "gone.p")


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


# Records of wrong types


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil(refs_1={"ref_id": True}), "ref True: its ref_id must be an integer, got True"),
        (spoil(refs_1={"ref_id": 2**63}), "its ref_id must be an integer, got 9223372036854775808"),
        (spoil(refs_1={"ann_id": 501.0}), r"ref 101: its ann_id must be an integer or a list of integers, got 501\.0"),
        (spoil(refs_1={"ann_id": [True]}), r"ref 101: its ann_id must be .*, got \[True\]"),
        (spoil(refs_1={"no_target": "no"}), "ref 101: its no_target must be true or false, got 'no'"),
        (
            spoil(refs_1={"sentences": [{"sent_id": [5], "sent": "zebra"}]}),
            "ref 101: one of its sentences has no sent_id",
        ),
        (
            spoil(refs_1={"sentences": [{"sent_id": 5.0, "sent": "zebra"}]}),
            "ref 101: one of its sentences has no sent_id",
        ),
        (spoil(annotations_1={"image_id": [11]}), r"ref 101: it is about image 11, its annotation 501 about \[11\]"),
        (spoil(annotations_1={"image_id": 11.0}), r"ref 101: it is about image 11, its annotation 501 about 11\.0"),
        (spoil(annotations_1={"category_id": [3]}), r"ref 101: the category \[3\] of its annotation 501 is missing"),
        (spoil(annotations_1={"category_id": 3.0}), r"ref 101: the category 3\.0 of its annotation 501 is missing"),
        (spoil(categories_0={"name": 7}), "ref 101: the category 3 of its annotation 501 .* has no name"),
        (spoil(annotations_1={"bbox": [4, 4, 10, 10**400]}), "ref 101: the bbox of its annotation 501 .* got .*…"),
        (spoil(annotations_1={"bbox": [4, 4, 10, True]}), "ref 101: the bbox of its annotation 501 must be 4 finite"),
        (spoil(annotations_1={"bbox": [4, 4, -10, 10]}), "ref 101: the bbox of its annotation 501 must be 4 finite"),
        (
            spoil(annotations_1={"area": "big"}),
            "ref 101: the area of its annotation 501 must be a finite number .* 'big'",
        ),
        (spoil(images_1={"height": 40.0}), "ref 101: its image 11 needs file_name, height and width"),
        (spoil(images_1={"height": True}), "ref 101: its image 11 needs file_name, height and width"),
        (
            spoil(images_1={"height": 10**6, "width": 10**6}),
            "ref 101: its image 11 has 1000000 x 1000000 pixels, more than",
        ),
        (spoil(images_1={"file_name": "a\0b"}), "ref 101: its image .* does not exist"),
        (
            spoil(annotations_1={"segmentation": [[True, 4, 14, 4, 14, 14]]}),
            "501 is malformed: a polygon is a flat list",
        ),
        (
            spoil(annotations_1={"segmentation": {"size": [40, 60], "counts": [True, 2399]}}),
            "501 is malformed: the counts of a run-length code are whole numbers",
        ),
        (
            spoil(annotations_1={"segmentation": {"size": [40, 60], "counts": "o" * 10**6}}),
            "501 is malformed: .* end in the middle of a number",
        ),
    ],
)
def test_a_field_of_a_wrong_type_is_named_with_file_and_ref(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=rf"refs\(unc\)\.p: .*{message}"):
        folder.load(splits=["val"])


@pytest.mark.parametrize("value", [[1], None, 1.0, True, "1", {}, 2**64])
@pytest.mark.parametrize("table", ["images", "annotations", "categories"])
def test_an_id_of_a_wrong_type_is_named_with_its_place(folder, table, value):
    getattr(folder, table)[0]["id"] = value
    place = (
        rf"instances\.json is not JSON with .*: {table}\[0\] must have an integer as id, got {re.escape(repr(value))}"
    )
    with pytest.raises(ValueError, match=place):
        folder.load()


HOSTILE = [
    None,
    True,
    0,
    -1,
    1.0,
    2.5,
    float("nan"),
    float("inf"),
    1e300,
    2**31,
    -(2**63),
    2**63,
    10**400,
    "",
    " ",
    "7",
]
HOSTILE += [
    "\ud800",
    "a\0b",
    "x" * 5000,
    [],
    [1],
    [[1]],
    [None],
    {},
    {"id": 1},
    [-1],
    {"size": [40, 60], "counts": "9"},
]


def places(tree: list | dict) -> list[tuple[list | dict, int | str]]:
    """Every place in nested lists and dicts, as a container and a key."""
    found = []
    for key in range(len(tree)) if isinstance(tree, list) else list(tree):
        found.append((tree, key))
        if isinstance(tree[key], (list, dict)):
            found += places(tree[key])
    return found


def change(records: dict[str, list], rng: np.random.Generator) -> str:
    """Puts something else in a random place, removes the place, or repeats what is there."""
    every = places(records)
    container, key = every[rng.integers(len(every))]
    way = rng.choice(["replace", "remove", "repeat", "move"], p=[0.7, 0.1, 0.1, 0.1])
    if way == "replace":
        container[key] = HOSTILE[rng.integers(len(HOSTILE))]
    elif way == "remove":
        del container[key]
    elif way == "repeat" and isinstance(container, list):
        container.append(container[key])
    else:
        container[key] = every[rng.integers(len(every))][0]
    return f"{way} {key!r}"


@pytest.mark.parametrize("dataset", ["refcoco", "grefcoco"])
def test_changed_records_load_or_are_refused_with_the_files_name(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(datasets.arrow_dataset, "generate_fingerprint", lambda _: "0")  # it takes most of the time
    folder = Folder(tmp_path, dataset=dataset)
    folder.refs = folder.refs[:3]
    for ref, annotation in zip(folder.refs, folder.annotations, strict=False):
        ref["split"] = "train"
        annotation["area"] = 7 if isinstance(annotation["segmentation"], dict) else 100
    if dataset == "grefcoco":
        folder.refs[0]["ann_id"], folder.refs[1]["ann_id"], folder.refs[1]["no_target"] = [500, 502, 504], [-1], True
    tables = ("refs", "images", "annotations", "categories")
    sound = json.dumps({table: getattr(folder, table) for table in tables})
    rng, refused = np.random.default_rng(5), 0
    for _ in range(1000):
        records = json.loads(sound)
        made = change(records, rng)
        for table in tables:
            setattr(folder, table, records.get(table))
        try:
            folder.write()
        except (ValueError, RecursionError):  # moved into itself: no such file can be written
            continue
        try:
            load_refer(tmp_path, dataset)
        except (ValueError, FileNotFoundError, pickle.UnpicklingError) as error:
            refused += 1
            assert re.search(r"refs\(unc\)\.(p|json)|instances\.json", str(error)), made
    assert 300 < refused < 950

"""Images with the expressions asked about them: what is found by its name, what is refused, and that nothing is kept in memory."""

import os
import pickle

import datasets
import pytest
from builders import image_bytes

from training.sources.asked_images import Columns, open_asked_images, with_bytes


def everything(row: int) -> bool:
    return True


def write_parquet(folder, file="data.parquet", **columns):
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / file)
    return str(folder)


def test_rows_that_are_not_wanted_are_not_made(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(image_bytes("PNG"))
    asked = open_asked_images(str(tmp_path), expressions=["cup"])
    rows = list(asked.read(0, lambda row: row in (1, 4)))
    assert [row and row.key for row in rows] == [None, "1.png", None, None, "4.png", None] and asked.count() == 6


def test_what_reads_can_be_sent_to_another_process(tmp_path):
    data = write_parquet(tmp_path / "parquet", image=[image_bytes("PNG")] * 3, text=["a", "b", "c"])
    for asked in (open_asked_images(data), open_asked_images(data, limit=2)):
        again = pickle.loads(pickle.dumps(asked))
        assert list(again.read(0, everything)) == list(asked.read(0, everything))
        assert again.count() == len(list(again.read(0, everything)))


def test_the_identity_is_the_inputs_and_not_its_places(tmp_path):
    columns = {"image": ["x.png"] * 2, "text": ["a", "b"]}
    one, same = (open_asked_images(write_parquet(tmp_path / name, **columns)) for name in ("one", "same"))
    assert one.identity == same.identity
    write_parquet(tmp_path / "same", file="more.parquet", **columns)
    assert open_asked_images(str(tmp_path / "same")).identity != one.identity


def test_columns_are_found_by_name_or_named(tmp_path):
    columns = {"picture": ["x.png", "y.png"], "what": [["a", "b"], []], "name": [7, 8]}
    data = write_parquet(tmp_path / "data", **columns)
    with pytest.raises(ValueError, match="no column that is known to hold the image; it has picture, what, name"):
        open_asked_images(data)
    for given, option in ((Columns("image", "what"), "--image_column"), (Columns("picture", "text"), "--text_column")):
        with pytest.raises(ValueError, match=option):
            open_asked_images(data, columns=given)
    first, second = open_asked_images(data, columns=Columns("picture", "what", "name")).read(0, everything)
    assert (first.key, first.expressions) == ("7", ["a", "b"]) and (second.key, second.expressions) == ("8", [])
    assert first.image == {"path": str(tmp_path / "data" / "x.png"), "bytes": None}
    (tmp_path / "table.csv").write_text("picture,what\nx.png,a\n")
    with pytest.raises(ValueError, match=r"table\.csv has no column that is known to hold the image"):
        open_asked_images(str(tmp_path / "table.csv"))


def test_a_table_is_text_as_it_stands(tmp_path):
    rows = '007,"left, ""big"" cup"\n007,none\n1e3,NA\n'
    (tmp_path / "table.csv").write_text("\ufefffile,phrase\n" + rows, encoding="utf-8")
    asked = list(open_asked_images(str(tmp_path / "table.csv")).read(0, everything))
    assert [(row.key, row.expressions) for row in asked] == [("007", ['left, "big" cup', "none"]), ("1e3", ["NA"])]


def test_a_split_is_named_where_there_are_several(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / "data", file=f"{split}-00000-of-00001.parquet", image=["x"], text=[split])
    with pytest.raises(ValueError, match="has the splits train, test, but no split is named"):
        open_asked_images(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="there is no split 'val'"):
        open_asked_images(str(tmp_path / "data"), split="val")
    (row,) = open_asked_images(str(tmp_path / "data"), split="test").read(0, everything)
    assert row.expressions == ["test"]


def test_what_is_no_data_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "two" / name).write_text("file,phrase\n")
    (tmp_path / "notes.md").write_text("none")
    for data, phrases, message in (
        ("empty", None, "needs one table of phrases"),
        ("empty", ["cup"], "holds no image"),
        ("two", None, "it has a.csv, b.csv"),
        ("two/a.csv", None, "cannot be read: it has no rows"),
        ("two/a.csv", ["cup"], "exclude each other"),
        ("notes.md", None, "is no table"),
    ):
        with pytest.raises(ValueError, match=message):
            open_asked_images(str(tmp_path / data), expressions=phrases)
    for data, message in (("absent", "no folder and no file here"), ("*.tar", "No file matches")):
        with pytest.raises(FileNotFoundError, match=message):
            open_asked_images(str(tmp_path / data))


def test_a_file_name_that_is_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xe9.png"
    try:
        with open(name, "wb") as file:
            file.write(image_bytes("PNG"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (row,) = open_asked_images(str(tmp_path), expressions=["cup"]).read(0, everything)
    assert row.key == r"\xe9.png" and os.path.isfile(row.image["path"])


def test_an_image_at_an_address_is_fetched(tmp_path):
    import fsspec

    with fsspec.open("memory://asked/x.png", "wb") as file:
        file.write(image_bytes("PNG"))
    assert with_bytes({"path": "memory://asked/x.png", "bytes": None})["bytes"] == image_bytes("PNG")
    with pytest.raises(ValueError, match=r"memory://asked/y\.png cannot be fetched"):
        with_bytes({"path": "memory://asked/y.png", "bytes": None})

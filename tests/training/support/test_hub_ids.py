"""Options that take a folder or an id on the Hub: a folder that is not there is called so, and the Hub is never asked for it."""

from pathlib import Path

import pytest

from training.support.hub_ids import folder_or_id


@pytest.mark.parametrize(
    "source",
    [
        "/no/such/folder",
        "./model",
        "../model",
        "~/no-such-folder-here",
        "outputs/run/model",
        "runs/model",  # lies in a folder that exists
        "model/",
        "my model",  # no id on the Hub has a space
    ],
)
def test_what_looks_like_a_path_must_be_there(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        folder_or_id(source, "model.text_model")
    assert str(error.value) == f"model.text_model: There is no folder {source}."


@pytest.mark.parametrize("source", ["gpt2", "facebook/dinov2-small", "openai/clip-vit-base-patch32"])
def test_what_can_be_an_id_is_left_to_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_or_id(source, "model.vision_model") == source


def test_a_folder_is_taken_as_it_is_and_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "runs" / "model"
    folder.mkdir(parents=True)
    assert folder_or_id(folder) == str(folder)
    assert folder_or_id("~/runs/model") == str(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file"):
        folder_or_id(folder / "config.json")

"""Where a model, its settings and its scores lie, by whichever of its folders it is named."""

import re

import pytest

from training.support.model_location import locate_model


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a run, a self-contained model, and a model without settings; it is the working folder."""
    for folder in ("run/model", "checkpoint", "bare", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("run/model", "checkpoint", "bare"):
        (tmp_path / folder / "config.json").write_text("{}")
    for folder in ("run", "checkpoint"):
        (tmp_path / folder / "settings.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", ["run", "run/", "run/model", "run/model/", "./run"])
def test_a_run_and_its_model_are_the_same_model(place, given):
    for name in (given, f"{place}/{given}"):
        location = locate_model(name)
        assert (place / location.source).samefile(place / "run" / "model")
        assert location.home.samefile(place / "run") and location.settings.samefile(place / "run" / "settings.yaml")
        assert location.name == "run"


def test_a_self_contained_folder_is_its_own_home(place):
    location = locate_model("checkpoint")
    assert location.source == "checkpoint" and str(location.home) == "checkpoint" and location.name == "checkpoint"
    assert location.settings.is_file()
    bare = locate_model(place / "bare")
    assert bare.home == place / "bare" and bare.name == "bare" and not bare.settings.exists()


@pytest.mark.parametrize(
    ("folder", "given", "home"), [("run", "model", "run"), ("run", ".", "run"), ("bare", ".", "bare")]
)
def test_the_working_folder_may_be_the_run_or_inside_it(place, monkeypatch, folder, given, home):
    monkeypatch.chdir(place / folder)
    location = locate_model(given)
    assert location.home.samefile(place / home) and location.name == home
    if folder == "run":
        monkeypatch.chdir(place / "run" / "model")
        inside = locate_model(".")
        assert inside.home.samefile(place / "run") and inside.name == "run"


def test_a_self_contained_folder_may_be_called_model(place):
    (place / "run" / "model" / "settings.yaml").write_text("")
    location = locate_model(place / "run" / "model")
    assert location.home == place / "run" / "model" and location.name == "model"


def test_a_model_on_the_hub_has_no_folder_here(place):
    location = locate_model("someone/zebra-finder")
    assert location == ("someone/zebra-finder", location.home, "someone/zebra-finder", None)
    assert location.home.samefile(place)


@pytest.mark.parametrize("given", ["nowhere", "a/b/c", "./nowhere", "../x", "/nowhere/model", "~/x", "a b/c"])
def test_what_is_neither_a_folder_nor_an_id_is_named(place, given):
    with pytest.raises(FileNotFoundError, match=f"no folder {re.escape(given)}"):
        locate_model(given)


def test_a_folder_without_a_model_is_named(place):
    with pytest.raises(ValueError, match=r"empty holds no model: it has no config\.json, and no model/config\.json"):
        locate_model("empty")

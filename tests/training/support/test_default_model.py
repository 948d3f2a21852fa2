"""The model of `sera-segment` without `--model`: a clone's, or an archive's with its checksum, or a message that says both ways."""

import hashlib
import tarfile
from pathlib import Path

import pytest
from conftest import save_tiny_model

from training import prediction
from training.support import default_model


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no clone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "CLONE", tmp_path / "elsewhere")
    return tmp_path / "cache" / "sera" / "sera-photos"


def packed(folder: Path, name: str = "sera-photos") -> tuple[str, str]:
    """An archive that holds the folder under a name, and its checksum."""
    archive = folder.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as files:
        files.add(folder, name)
    return str(archive), hashlib.sha256(archive.read_bytes()).hexdigest()


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        prediction.main(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_an_installed_archive_is_the_model_where_none_is_named(cache, tmp_path, image, capsys):
    photo = tmp_path / "photo.png"
    image.save(photo)
    asked = [str(photo), "the cup", "--out", str(tmp_path / "out")]
    assert "--model" in (message := refusal(capsys, *asked)) and "--install" in message
    archive, checksum = packed(save_tiny_model(tmp_path / "saved"))
    with pytest.raises(SystemExit) as ended:
        prediction.main(["--install", archive, checksum])
    assert ended.value.code == 0 and str(cache) in capsys.readouterr().out
    prediction.main(asked)
    assert (tmp_path / "out" / "mask-1.png").is_file()


def test_another_checksum_or_another_archive_is_refused_and_leaves_nothing(cache, tmp_path, capsys):
    archive, checksum = packed(save_tiny_model(tmp_path / "saved"), "another-name")
    assert checksum in refusal(capsys, "--install", archive, "0" * 64)
    assert "has no sera-photos/config.json" in refusal(capsys, "--install", archive, checksum)
    text = tmp_path / "page.html"
    text.write_text("not found")
    assert "is no archive" in refusal(capsys, "--install", str(text), hashlib.sha256(b"not found").hexdigest())
    assert "no file" in refusal(capsys, "--install", str(tmp_path / "absent.tar.gz"), checksum)
    assert not cache.exists() and not list(cache.parent.glob(".*"))


def test_the_model_of_a_clone_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "CLONE", tmp_path)
    folder = save_tiny_model(tmp_path / "checkpoints" / "sera-photos")
    assert default_model.default_model() == folder

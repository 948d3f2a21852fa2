"""One rule for all commands: where a saved model, its run's settings and its scores lie (ours).

A run's folder holds its model in `model/`. A self-contained folder, as in `checkpoints/`, holds the model's files itself. A command
takes either of them, or the `model/` inside a run's folder, or an id on the Hub. Settings and scores lie in the run's folder, or in
the self-contained one. The model has the name of that folder.
"""

import os
from pathlib import Path
from typing import NamedTuple

from training.support.hub_ids import folder_or_id

MODEL_FOLDER = "model"  # the model's folder in a run's folder
CONFIG, SETTINGS = "config.json", "settings.yaml"


class ModelLocation(NamedTuple):
    """Where a model lies.

    Attributes:
        source: The folder that holds `config.json`, or the id on the Hub. `from_pretrained` takes it.
        home: The folder for the model's scores; the working folder for a model on the Hub.
        name: The name of `home`, or the id on the Hub. It is no path of this machine.
        settings: `settings.yaml` in `home`, which may be absent. `None` for a model on the Hub.
    """

    source: str
    home: Path
    name: str
    settings: Path | None


def locate_model(given: str | Path) -> ModelLocation:
    """Find a model by a run's folder, by the model's own folder, or by its id on the Hub.

    Args:
        given: Folder, or "user/name".

    Returns:
        Where the model, its settings and its scores lie. Paths stay relative where `given` is relative.

    Raises:
        FileNotFoundError: There is no such folder, and it cannot be an id on the Hub.
        ValueError: The folder holds no model.
    """
    folder = Path(folder_or_id(given))
    if not folder.is_dir():
        if str(given).count("/") != 1:
            raise FileNotFoundError(f"There is no folder {given}, and an id on the Hub has the form user/name.")
        return ModelLocation(str(given), Path(), str(given), None)
    if not (folder / CONFIG).is_file():
        if not (folder / MODEL_FOLDER / CONFIG).is_file():
            raise ValueError(f"{folder} holds no model: it has no {CONFIG}, and no {MODEL_FOLDER}/{CONFIG} either.")
        folder = folder / MODEL_FOLDER
    home = folder
    absolute = Path(os.path.abspath(folder))
    if absolute.name == MODEL_FOLDER and not (folder / SETTINGS).is_file():
        home = folder.parent if folder.name == MODEL_FOLDER else absolute.parent  # the latter for "."
    return ModelLocation(str(folder), home, Path(os.path.abspath(home)).name, home / SETTINGS)

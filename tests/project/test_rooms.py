"""The rooms of training/: who may import whom, and what a room is called."""

import ast
import re
import sys

import pytest
from conftest import REPOSITORY

TRAINING = REPOSITORY / "training"
# From the ground floor up. A room imports from itself and from lower floors only.
FLOORS = (
    {"configuration", "support"},
    {"sources"},
    {"learning"},
    {"examples"},
    {"scoring", "distil_text"},
    {"ablations", "evaluation", "prediction", "publishing"},
    {"ablation", "experts", "export", "papers_table", "preparation", "push", "scene_statistics", "segment", "train"},
)
MODULES = sorted(TRAINING.rglob("*.py"))
MAX_LINES = 600


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module below training/, such as "sources" of ("sources", "scenes", "rows")."""
    return parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imported_rooms(source: str) -> set[str]:
    """The rooms that a module imports from, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "training":
            rooms.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("training."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms.update(name.name.split(".")[1] for name in node.names if name.name.startswith("training."))
    return rooms


def test_every_room_has_its_floor():
    there = {room_of(path.relative_to(TRAINING).parts) for path in MODULES} - {"__init__"}
    assert there == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(there)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TRAINING)))
def test_imports_run_downwards(path):
    room = room_of(path.relative_to(TRAINING).parts)
    if room == "__init__":
        assert imported_rooms(path.read_text()) == set()
        return
    for other in imported_rooms(path.read_text()) - {room}:
        assert floor_of(other) <= floor_of(room), f"{path.name} imports training.{other}, which is on a higher floor"
        assert floor_of(other) < floor_of(room) or floor_of(room) == 0, f"{path.name} imports its neighbour {other}"


def test_every_room_says_what_lives_there():
    for folder in {path.parent for path in MODULES if path.parent.name != "referring_iou"}:
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert docstring and (folder == TRAINING or "import" in docstring)


def test_no_module_hides_one_of_pythons():
    """A command run as a script finds its own folder first."""
    assert not {path.stem for path in TRAINING.iterdir()} & sys.stdlib_module_names
    assert not {path.stem for path in MODULES} & sys.stdlib_module_names
    assert not {"accelerate", "datasets", "evaluate"} & {path.stem for path in MODULES}


def test_no_test_module_imports_another():
    """Each folder of tests runs alone. What several test modules share lies in modules of tests/ itself."""
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        assert not re.search(r"^\s*(from|import) test_", path.read_text(), flags=re.MULTILINE), path


def test_no_file_is_long():
    for folder in ("modeling_sera", "processing_sera", "training", "hub", "benchmarks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= MAX_LINES, f"{path} is longer than {MAX_LINES} lines"

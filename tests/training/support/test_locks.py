"""The lock of a folder: one command at a time, free after any end of it, and nothing left behind."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from training.support.locks import FolderInUseError, locked_folder

CONTEXT = multiprocessing.get_context("fork")


def hold(folder: Path, held: multiprocessing.Event, with_child: bool = False) -> None:
    with locked_folder(folder, "wait"):
        if with_child and os.fork() == 0:
            time.sleep(3)  # outlives the command
            os._exit(0)
        held.set()
        time.sleep(10)


def start(folder: Path, **options: bool) -> multiprocessing.Process:
    held = CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(folder, held), kwargs=options)
    process.start()
    assert held.wait(10)
    return process


def test_a_second_command_is_refused_at_once_and_in_words(tmp_path):
    process = start(tmp_path / "run")
    with (
        pytest.raises(FolderInUseError, match="run: another command is at work there; name another folder"),
        locked_folder(tmp_path / "run", "name another folder", wait_s=0.2),
    ):
        pytest.fail("both have it")
    process.kill()
    process.join()


@pytest.mark.parametrize("with_child", [False, True])
def test_a_killed_command_leaves_it_free_even_where_a_forked_process_lives_on(tmp_path, with_child):
    process = start(tmp_path / "run", with_child=with_child)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked_folder(tmp_path / "run", "wait", wait_s=1):
        pass


def test_nothing_is_left_of_it_but_what_was_written_meanwhile(tmp_path):
    with locked_folder(tmp_path / "a" / "b", "wait"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="fails"), locked_folder(tmp_path / "a" / "b", "wait"):
        (tmp_path / "a" / "b" / "kept").touch()
        raise ValueError("it fails")
    assert list((tmp_path / "a" / "b").iterdir()) == [tmp_path / "a" / "b" / "kept"]


def take_turns(folder: Path) -> None:
    for _ in range(20):
        with locked_folder(folder, "wait", wait_s=60):
            counter = folder.parent / "at-work"
            counter.touch(exist_ok=False)  # fails where another is at work
            counter.unlink()


def test_those_that_wait_take_turns(tmp_path):
    processes = [CONTEXT.Process(target=take_turns, args=(tmp_path / "run",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0

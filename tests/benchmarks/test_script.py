"""A job writes all of its files or none, and Ctrl-C ends it with one line."""

import argparse
import os
import re
import signal

import pytest
import script


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("table.json", "part/a", "part/b", "other"):
        (tmp_path / name).write_text("old")
    return tmp_path


def fill(new):
    (new / "part").mkdir()
    for name in ("table.json", "part/a", "figure.png"):
        (new / name).write_text("new")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("--rank 0"), 2, "error: --rank 0"),
        (OSError("no wheel"), 1, "^job: no wheel$"),
    ],
)
def test_exit_on_error_prints_one_line(error, status, message, capsys):
    parser = argparse.ArgumentParser(prog="job")
    with pytest.raises(SystemExit) as stop, script.exit_on_error(parser, OSError):
        raise error
    assert stop.value.code == status
    assert re.search(message, capsys.readouterr().err.strip())


def test_exit_on_error_raises_unexpected_errors():
    with pytest.raises(RuntimeError, match="a bug"):
        with script.exit_on_error(argparse.ArgumentParser(), OSError):
            raise RuntimeError("a bug")


def test_staged_replaces_old_files_and_folders(folder):
    with script.staged(folder) as new:
        fill(new)
        assert set(tree(folder).values()) == {"old", "new"}
        assert (folder / "table.json").read_text() == "old"
    names = "table.json", "part/a", "figure.png"
    assert tree(folder) == dict.fromkeys(names, "new") | {"other": "old"}
    assert sorted(os.listdir(folder)) == ["figure.png", "other", "part", "table.json"]


def test_staged_creates_a_missing_folder(tmp_path):
    with script.staged(tmp_path / "a" / "b") as new:
        fill(new)
    assert set(tree(tmp_path / "a" / "b").values()) == {"new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_staged_leaves_old_files_if_the_job_ends_early(folder, error):
    before = tree(folder)
    with pytest.raises(error), script.staged(folder) as new:
        fill(new)
        raise error
    assert tree(folder) == before
    assert sorted(os.listdir(folder)) == ["other", "part", "table.json"]


def test_staged_finishes_its_moves_at_ctrl_c(folder, monkeypatch):
    replace = os.replace

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        replace(*args)

    monkeypatch.setattr(script.os, "replace", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with script.staged(folder) as new:
        fill(new)
    assert signal.getsignal(signal.SIGINT) is before
    assert tree(folder)["figure.png"] == tree(folder)["table.json"] == "new"


@pytest.mark.parametrize("name", ["", "in step 3 of 9"])
def test_exit_on_interrupt_names_the_inner_phase(tmp_path, capsys, name):
    parser = argparse.ArgumentParser("job.py")
    with pytest.raises(SystemExit) as error, script.exit_on_interrupt(parser, tmp_path):
        if not name:
            raise KeyboardInterrupt
        with script.phase("after that"), script.phase(name):
            raise KeyboardInterrupt
    assert error.value.code == 130
    stopped = " ".join(["stopped", *filter(None, [name])])
    line = f"job.py: {stopped}; nothing was written to {tmp_path}\n"
    assert re.fullmatch(re.escape(line), capsys.readouterr().err)

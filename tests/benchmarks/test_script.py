"""A job leaves all of its files or none, and says at Ctrl-C what was done."""

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
    ("error", "status", "says"),
    [
        (ValueError("--rank 0"), 2, "error: --rank 0"),
        (OSError("no wheel"), 1, "^job: no wheel$"),
    ],
)
def test_what_cannot_begin_ends_in_one_line(error, status, says, capsys):
    parser = argparse.ArgumentParser(prog="job")
    with pytest.raises(SystemExit) as stop, script.exit_on_error(parser, OSError):
        raise error
    assert stop.value.code == status
    assert re.search(says, capsys.readouterr().err.strip())


def test_an_error_of_ours_is_none_of_the_options():
    with pytest.raises(RuntimeError, match="ours"):
        with script.exit_on_error(argparse.ArgumentParser(), OSError):
            raise RuntimeError("ours")


def test_files_and_folders_take_the_places_of_old_ones(folder):
    with script.staged(folder) as new:
        fill(new)
        assert set(tree(folder).values()) == {"old", "new"}
        assert (folder / "table.json").read_text() == "old"
    names = "table.json", "part/a", "figure.png"
    assert tree(folder) == dict.fromkeys(names, "new") | {"other": "old"}
    assert sorted(os.listdir(folder)) == ["figure.png", "other", "part", "table.json"]


def test_a_folder_that_is_not_there_is_made(tmp_path):
    with script.staged(tmp_path / "a" / "b") as new:
        fill(new)
    assert set(tree(tmp_path / "a" / "b").values()) == {"new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_whatever_ends_the_job_leaves_what_was_there(folder, error):
    before = tree(folder)
    with pytest.raises(error), script.staged(folder) as new:
        fill(new)
        raise error
    assert tree(folder) == before
    assert sorted(os.listdir(folder)) == ["other", "part", "table.json"]


def test_ctrl_c_waits_until_all_files_are_in_their_places(folder, monkeypatch):
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


@pytest.mark.parametrize("where", ["", "in step 3 of 9"])
def test_ctrl_c_is_one_line(tmp_path, capsys, where):
    parser = argparse.ArgumentParser("job.py")
    with pytest.raises(SystemExit) as error, script.exit_on_interrupt(parser, tmp_path):
        if not where:
            raise KeyboardInterrupt
        with script.phase("after that"), script.phase(where):  # the inner one counts
            raise KeyboardInterrupt
    assert error.value.code == 130
    said = " ".join(["stopped", *filter(None, [where])])
    line = f"job.py: {said}; nothing was written to {tmp_path}\n"
    assert re.fullmatch(re.escape(line), capsys.readouterr().err)

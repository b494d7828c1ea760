"""The README's figure is drawn from files of results."""

import json
from pathlib import Path

import picture
import pytest
from PIL import Image


def plan(base="bfloat16", methods=None, **settings):
    given = dict(model="tiny", device="tpu-v5e", batch=1, sequence=8, rank=2)
    peaks = methods or {"lora": 17.7e9, "full": 63e9}
    return {
        "methods": {name: {"peak": x} for name, x in peaks.items()},
        "sequence": 8,
        "settings": given
        | dict(layers=None, chunk=None, dtype="bfloat16", base=base)
        | settings,
    }


JOB = {
    name: dict(accuracy=0.83, trainable=n, adapter_bytes=4 * n, memory={"optimizer": n})
    for name, n in {"lora": 3_000, "full": 2_000_000}.items()
}


@pytest.fixture
def results(tmp_path):
    def write(*plans, job=JOB):
        for i, x in enumerate(plans):
            (tmp_path / str(i)).mkdir()
            (tmp_path / str(i) / "memory.json").write_text(json.dumps(x))
        (tmp_path / "finetune.json").write_text(json.dumps(job))
        given = [str(tmp_path / str(i)) for i in range(len(plans))]
        given += ["--job", str(tmp_path / "finetune.json")]
        return [*given, "--output", str(tmp_path / "out" / "picture.png")]

    return write


def test_main_draws_a_small_file(results, tmp_path, capsys):
    picture.main(results(plan(), plan("nf4", {"lora": 6.4e9})))
    path = tmp_path / "out" / "picture.png"
    assert path.stat().st_size < 150_000
    with Image.open(path) as drawn:
        assert drawn.width > 800
        assert drawn.convert("RGB").getpixel((2, 2)) == (0xF6, 0xF8, 0xFA)
    assert str(path) in capsys.readouterr().out


def test_steps_has_a_bar_for_full_fine_tuning_and_for_each_base():
    bars = picture.steps([plan(), plan("nf4", {"lora": 6.4e9})])
    names = ["full fine-tuning", "LoRA, base in bfloat16", "LoRA, base in NF4"]
    assert [*bars] == names
    assert [size for size, _ in bars.values()] == [63.0, 17.7, 6.4]


def test_compared_formats_the_results_of_the_job():
    words = picture.compared(JOB)
    assert words["held-out accuracy"] == ("83.0%", "83.0%")
    assert words["trainable parameters"] == ("0.00 million", "2.00 million")
    assert words["saved file"] == ("0.0 MB", "8.0 MB")


@pytest.mark.parametrize(
    ("plans", "job", "message"),
    [
        ([plan(), plan("nf4", batch=2)], JOB, "of different jobs"),
        ([plan("nf4", {"lora": 6e9})], JOB, "no full fine-tuning: run it with"),
        ([plan(methods={"full": 6e9})], JOB, "no peak of 'lora'"),
        ([plan()], {"lora": JOB["lora"]}, "lacks 'lora' or 'full'"),
    ],
)
def test_main_refuses_results_that_do_not_match(results, capsys, plans, job, message):
    with pytest.raises(SystemExit):
        picture.main(results(*plans, job=job))
    assert message in capsys.readouterr().err


def test_main_refuses_a_folder_without_results(results, tmp_path, capsys):
    given = results(plan())
    (tmp_path / "0" / "memory.json").unlink()
    with pytest.raises(SystemExit):
        picture.main(given)
    assert "memory.json contains no results" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_picture_of_the_readme_is_small():
    drawn = (Path(picture.__file__).parent / "picture.png").read_bytes()
    assert drawn.startswith(b"\x89PNG") and len(drawn) < 150_000

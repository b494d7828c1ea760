"""The roofline benchmark parses XLA's programs for a TPU, and its FLOPs are XLA's."""

import json

import hlo
import pytest
import roofline
from models.architectures import ARCHITECTURES, GPT2, Architecture

# Shortened from a LoRA step of gpt-0.87b for a v5e, 4 x 1,024 tokens, rank 8.
TEXT = r"""HloModule jit_step, is_scheduled=true

%low_rank (p0: bf16[4,1024,2048], p1: bf16[8,2048,1]) -> bf16[4,1024,8] {
  %p0 = bf16[4,1024,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[8,2048,1]{1,0,2:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c0 = bf16[4,1024,8]{1,2,0:T(8,128)(2,1)S(1)} convolution(%p0, %p1), window={size=1}, dim_labels=0bf_oi0->0bf, metadata={op_name="jit(step)/jvp(Model/Model.hidden/blocks_0/attention/query)/jit(_dot_general)/dot_general"}
}

%look_up (p2: bf16[32000,2048], p3: s32[4096]) -> bf16[4096,2048] {
  %p2 = bf16[32000,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %p3 = s32[4096]{0:T(1024)S(1)} parameter(1)
  ROOT %g0 = bf16[4096,2048]{1,0:T(8,128)(2,1)S(1)} gather(%p2, %p3), offset_dims={1}
}

ENTRY %main (x: bf16[4,1024,2048], a: bf16[8,2048,1], t: bf16[32000,2048]) -> bf16[4,1024,8] {
  %x = bf16[4,1024,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %a = bf16[8,2048,1]{1,0,2:T(8,128)(2,1)} parameter(1)
  %t = bf16[32000,2048]{1,0:T(8,128)(2,1)} parameter(2)
  %copy-start = (bf16[8,2048,1]{1,0,2:T(8,128)(2,1)S(1)}, bf16[8,2048,1]{1,0,2:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = bf16[8,2048,1]{1,0,2:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %i = s32[4096]{0:T(1024)S(1)} iota(), iota_dimension=0
  %rows = bf16[4096,2048]{1,0:T(8,128)(2,1)S(1)} fusion(%t, %i), kind=kCustom, calls=%look_up
  ROOT %h = bf16[4,1024,8]{1,2,0:T(8,128)(2,1)S(1)} fusion(%x, %copy-done), kind=kOutput, calls=%low_rank, metadata={op_name="jit(step)/jvp(Model/Model.hidden/blocks_0/attention/query)/jit(_dot_general)/dot_general"}, backend_config={"window_config":{"estimated_cycles":"6541"}}
}
"""  # noqa: E501


def test_operations_of_a_program():
    copied, _, rows, h = hlo.operations(TEXT)
    assert (copied.moved, copied.nbytes) == (2 * 8 * 2048, 0)
    assert rows.nbytes == 2 * 4096 * 2048  # only the looked-up rows of the table
    assert h.flops == 2 * 4096 * 2048 * 8
    assert h.nbytes == 2 * 4096 * 2048  # x; A and h are in VMEM
    assert h.cycles == 6541
    assert h.products[0].shortest == 8


def test_operations_refuses_a_text_without_an_entry():
    with pytest.raises(ValueError, match="No line begins with ENTRY"):
        hlo.operations("HloModule nothing\n")


@pytest.mark.parametrize(("rank", "kind"), [(8, "low_rank"), (4, "weights")])
def test_summed_by_kind(rank, kind):
    found = roofline.summed(hlo.operations(TEXT), rank)
    assert found["bound"][kind] == 2 * 4096 * 2048 / roofline.BANDWIDTH
    assert found["estimate"][kind] == 6541 / roofline.CLOCK
    assert found["moved"] == 2 * 8 * 2048


def test_pairs_of_a_batched_product():
    # 4 x 16 products of 1024 x 128 with 128 x 1024, batched by dilated windows.
    pairs = hlo.pairs(4, 4, 4, 3, 0, 4, 1)
    assert pairs == 4


@pytest.mark.slow
@pytest.mark.usefixtures("third_party", "uncached")
def test_main_compiles_for_an_absent_chip(tmp_path, monkeypatch, capsys):
    pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")
    tiny = Architecture(1, 512, 4, 1024, 2048, positions=256, tied=False, **GPT2)
    monkeypatch.setitem(ARCHITECTURES, "tiny", tiny)
    given = ["--model", "tiny", "--layers", "1", "--sequence", "256", "--no-alone"]
    roofline.main([*given, "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "roofline.json").read_text())["steps"]
    assert list(found) == ["full", "LoRA, rank 8", "W + AB, rank 8", "floor"]
    for name, x in found.items():
        assert name in shown
        # The FLOPs of products are XLA's total except elementwise operations.
        assert 0.96 < x["products"] / x["flops"] <= 1
        assert 0 < sum(x["hbm"].values()) < x["accessed"]
        assert (x["bound"]["low_rank"] > 0) == ("rank" in name)
    full, lora, _, floor = (x["products"] for x in found.values())
    assert floor < lora < 1.1 * floor < full
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        *("programs", "roofline.json", "roofline.png")
    ]
    assert len([*(tmp_path / "programs").iterdir()]) == 4


def test_main_refuses_options_that_do_not_fit_the_model(capsys):
    with pytest.raises(SystemExit):
        roofline.main(["--model", "gpt2-medium", "--sequence", "2048"])
    assert "fewer than --sequence 2048" in capsys.readouterr().err

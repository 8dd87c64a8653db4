"""What generated kernels move, counted on a machine without a GPU."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpd_verl.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]


def count_kernels(*arguments: str) -> tuple[int, dict[str, float], str]:
    """Exit status, bytes a logit by objective, and the errors of ``traffic.py --kernels``."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, str(ROOT / "benchmarks/traffic.py"), "--kernels", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    rows = csv.DictReader(io.StringIO(done.stdout))
    return done.returncode, {row["objective"]: float(row["bytes_a_logit"]) for row in rows}, done.stderr


@pytest.mark.slow
def test_every_objective_is_within_its_bytes() -> None:
    """16 bytes a logit over the vocabulary, 12 over tokens; none is cheaper than its reads and its write.

    Where torch has changed under the counter, its one line is the failure.
    """
    status, found, errors = count_kernels()
    assert status == 0, errors
    assert set(found) == set(OBJECTIVES)
    for name, each in OBJECTIVES.items():
        # Student: read twice, written once. Teacher: read once for its sums, and in both passes over the vocabulary.
        least = 14 if each.over == "vocabulary" else 8 if each.needs_teacher else 6
        if name == "vopd":  # weighs the label alone: its second pass needs no teacher
            least = 12
        assert found[name] >= least, name


def test_a_changed_torch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated code of another form ends in one line, not in a number."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fake_cuda

    for code in (
        "",
        "def call(args):\n    kernel_0.run(arg0_1)",
        "def call(args):\n    triton_x.run(arg0_1, stream=0)",
    ):
        with pytest.raises(fake_cuda.TorchChanged, match="its generated code has another form"):
            fake_cuda.kernels(code, 4)


def test_kernels_are_counted_load_by_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that loads again counts again; what is smaller than the launch counts once."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fake_cuda

    code = """
triton_meta={'signature': {'in_ptr0': '*bf16', 'out_ptr0': '*fp32', 'xnumel': 'i32', 'r0_numel': 'i32'}, 'x': 1},
def triton_red_a(in_ptr0, out_ptr0, xnumel, r0_numel, XBLOCK : tl.constexpr):
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp0 = tl.load(in_ptr0 + (r0_1 + 100*x0), r0_mask)
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp1 = tl.load(in_ptr0 + (r0_1 + 100*x0), r0_mask)
    tl.store(out_ptr0 + (x0), tmp2, xmask)
'''
def call(args):
    arg0_1, arg1_1 = args
    s7 = arg0_1
    assert_size_stride(arg1_1, (s7, 100), (100, 1), 'input')
    buf0 = empty_strided_cuda((s7, ), (1, ), torch.float32)
    triton_red_a.run(arg1_1, buf0, s7, 100, stream=stream0)
"""
    (kernel,) = fake_cuda.kernels(code, 8)
    assert kernel == fake_cuda.Kernel("triton_red_a", 2 * 8 * 100 * 2 + 8 * 4)

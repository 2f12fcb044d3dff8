import io
import os
import sys

import pytest
import torch

from minillm.base import device
from minillm.base.device import peak_flops
from minillm.training.progress import Progress, duration, time

ROW = {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.75, "tokens_per_s": 12345.6, "mfu": 0.125}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_parts_of_the_loss_stand_behind_it(capsys):
    row = {**ROW, "preference_loss": 0.69314, "sft_loss": 1.80686, "accuracy": 0.0, "z_loss": 0.01}  # z: beside it
    Progress(100, 0, enabled=True).show(1, row, left_s=None)
    line = capsys.readouterr().out
    assert (
        line == "step 1/100 loss 2.5000 (preference 0.6931, sft 1.8069) lr 1.00e-03 grad 0.75 12,346 tok/s mfu 12.5%\n"
    )


def test_a_pipe_gets_the_first_line_the_last_and_one_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0 + now[0])
    progress = Progress(100, 0, enabled=True, every_s=10)
    for step in range(1, 101):
        now[0] += 0.5
        progress.show(step, ROW, left_s=65)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/100 loss 2.5000 lr 1.00e-03 grad 0.75 12,346 tok/s mfu 12.5% left 1:05"
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 21", "step 41", "step 61", "step 81", "step 100"]


def test_a_terminal_of_no_columns_gets_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(Terminal, "fileno", lambda self: 2)
    for columns, has_bar in ((0, False), (80, True)):
        monkeypatch.setattr(os, "get_terminal_size", lambda fd, columns=columns: os.terminal_size((columns, 24)))
        progress = Progress(2, 0, enabled=True)
        progress.show(1, ROW, left_s=None)
        progress.close()
        assert (progress.bar is not None) == has_bar
    assert capsys.readouterr().out.count("step 1/2 loss") == 1


def test_what_is_left_is_shown_once_it_is_known(capsys):
    Progress(100, 0, enabled=True).show(1, ROW, left_s=None)
    assert capsys.readouterr().out.endswith("mfu 12.5%\n")


def test_a_machine_whose_peak_is_unknown_has_no_share_of_it(capsys):
    Progress(1, 0, enabled=True).show(1, {**ROW, "mfu": None}, 0)
    assert "mfu" not in capsys.readouterr().out


def test_a_terminal_gets_a_bar_that_begins_where_the_run_was(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(100, 40, enabled=True)
    progress.show(41, ROW, 10)
    assert progress.bar.n == 41 and progress.bar.total == 100
    progress.close()
    assert "41/100" in sys.stderr.getvalue() and "loss 2.5000" in sys.stderr.getvalue()


def test_other_ranks_say_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(2, 0, enabled=False)
    progress.show(1, ROW, 0)
    progress.print("hello")
    progress.close()
    assert capsys.readouterr().out == "" and sys.stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 80GB HBM3", torch.float32, 494),
        ("NVIDIA H100 PCIe", torch.float16, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, 835),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989),
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA H200 NVL", torch.bfloat16, 835),
        ("NVIDIA H800", torch.bfloat16, 989),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA H20", torch.bfloat16, 148),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40", torch.bfloat16, 181),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA GeForce RTX 3090", torch.bfloat16, 71),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165),
        ("NVIDIA GeForce RTX 5090", torch.bfloat16, 209),
        ("NVIDIA RTX A1000", torch.bfloat16, None),
        ("NVIDIA T400", torch.bfloat16, None),
        ("Tesla T4", torch.float16, 65),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("Something Else", torch.bfloat16, None),
    ],
)
def test_the_peak_of_a_gpu_is_its_own(monkeypatch, name, dtype, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda", 0), dtype)
    assert peak == (None if teraflops is None else teraflops * 1e12)


def test_the_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
    assert peak_flops(torch.device("mps"), torch.float32) is None


def test_the_peak_of_a_cpu_is_that_of_all_its_threads_in_time_of_their_own(monkeypatch):
    """Other programs take time, but none of the thread's own; what they slow down is a round that does not count."""
    threads = []
    monkeypatch.setattr(device, "n_cores", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # two of them share a core
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    slow, quick = [0.0, 0.0, 0.08, 0.08], [0.0, 0.0, 0.015, 0.03, 0.03]  # one product in 0.08 s, two in 0.03 s
    own_time = iter((slow + 7 * quick) * 3)
    monkeypatch.setattr(device.time, "process_time", lambda: next(own_time))
    monkeypatch.setattr(device.time, "perf_counter", None)
    assert peak_flops(torch.device("cpu"), torch.float32) == pytest.approx(3 * 2 * 2 * 1024**3 / 0.03)
    assert threads == [1, 4]

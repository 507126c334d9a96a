"""Model FLOPs utilization: by hand with a clock of ours, in records old and new, in claims and the live table."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from helpers.runs import train
from helpers.specs import tiny
from scaling_lab.core.record import RunRecord
from scaling_lab.core.spec import Execution, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.progress import SweepProgress
from scaling_lab.planning.devices import device_of_label, peak_of_label
from scaling_lab.tracking.sink.trackers import record_summary
from scaling_lab.training.engine.cuda_features import cuda_features
from scaling_lab.training.measure import utilization
from scaling_lab.training.run.session import open_program


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_mfu_by_hand(monkeypatch):
    """Counted from the end of the first block, without evaluations, also not the one after the last block."""
    clock = Clock()
    monkeypatch.setattr(utilization, "time", clock)
    spec = tiny(40)
    shape = spec.shape
    head = 6 * shape.vocab_size * shape.width
    blocks = 6 * 12 * shape.width**2 * shape.depth
    attention = 12 * shape.depth * shape.width * shape.context
    step_flops = (blocks + head + attention) * spec.batch_tokens
    meter = utilization.UtilizationMeter(spec, 1e9)
    assert meter.mfu is None
    clock.now += 50.0  # compiles
    meter.add(1)
    assert meter.mfu is None
    clock.now += 2.0
    meter.add(10)
    assert meter.mfu == pytest.approx(10 * step_flops / 2.0 / 1e9)
    for seconds in (3.0, 7.0):
        with meter.paused():
            clock.now += seconds
        clock.now += 1.0
        meter.add(10)
    with meter.paused():
        clock.now += 9.0
    assert meter.mfu == pytest.approx(30 * step_flops / 4.0 / 1e9)
    unknown = utilization.UtilizationMeter(spec, None)
    unknown.add(1)
    unknown.add(1)
    assert unknown.mfu is None


def test_a_stack_counts_its_live_members():
    specs = [tiny(40, seed_init=k) for k in range(3)]
    program = open_program(specs, Execution(), stacked=True)
    steps = []
    program.sessions[0].utilization.add = steps.append
    program.run_block({0: 0, 2: 5}, 4)
    assert steps == [8]


def test_peaks_of_labels():
    assert peak_of_label("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_of_label("NVIDIA A100-PCIE-40GB", "bfloat16") == 312e12
    assert peak_of_label("Tesla T4", "bfloat16") is None
    assert peak_of_label("Tesla T4", "float32") == 8.1e12
    for label in (
        *(
            "NVIDIA H100 PCIe",
            "NVIDIA H200 NVL",
            "NVIDIA GH200 480GB",
            "NVIDIA RTX A1000 Laptop GPU",
            "NVIDIA T400 4GB",
        ),
        *("NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU"),
    ):
        assert device_of_label(label) is None, label


def test_a_record_has_the_mfu_of_a_known_device(tmp_path, monkeypatch):
    without = train(RunStore(tmp_path / "cpu"), tiny(150))
    assert without.mfu is None
    monkeypatch.setattr("scaling_lab.training.run.session.peak_flops_per_s", lambda device, dtype: 1e12)
    store = RunStore(tmp_path / "known")
    record = train(store, tiny(150))
    assert record.mfu is not None
    assert 0 < record.mfu < 1
    assert store.read_record(record.run_id).mfu == record.mfu
    assert record_summary(record)["mfu"] == record.mfu
    assert "mfu" not in record_summary(without)
    assert [p.train_loss_nats for p in record.curve] == [p.train_loss_nats for p in without.curve]
    old = without.to_dict()
    del old["mfu"]
    assert RunRecord.from_dict(old, without.curve) == without


@pytest.mark.parametrize("mfu", [None, 0.4321])
def test_the_live_table_shows_it_where_it_is_known(tmp_path, mfu):
    from rich.console import Console

    from scaling_lab.cli.display.progress import running_table

    store, spec = RunStore(tmp_path), tiny(40)
    claim = store.claim(spec)
    assert claim is not None
    claim.heartbeat(step=5, steps=40, tokens_per_s=1000.0, train_loss_nats=3.0, mfu=mfu)
    progress = SweepProgress(store, [PlannedRun(spec, Execution())])
    progress.look()
    console = Console(width=120)
    with console.capture() as captured:
        console.print(running_table("t", progress))
    assert ("MFU" in captured.get()) == ("43.2%" in captured.get()) == (mfu is not None)
    assert "3.000" in captured.get()


def test_doctor_shows_what_a_gpu_offers(monkeypatch, capsys):
    """On a machine whose torch says that it has one; capturing a graph then fails, which is a line too."""
    from scaling_lab.cli.main import main

    def shown(label: str, bfloat16: bool):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: label)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
        return {feature.name: feature for feature in cuda_features()}

    assert cuda_features() == []
    h100 = shown("NVIDIA H100 80GB HBM3", True)
    assert list(h100) == ["GPU peak", "GPU dtype", "CUDA graph", "GPU compile", "NCCL"]
    assert "989 TFLOP/s bfloat16" in h100["GPU peak"].found
    assert "bfloat16 (dtype=auto" in h100["GPU dtype"].found
    if not torch.version.cuda:
        assert not h100["CUDA graph"].ok
        assert "one by one" in h100["CUDA graph"].advice
    t4 = shown("Tesla T4", False)
    assert "8.1 TFLOP/s float32" in t4["GPU peak"].found
    assert "bfloat16" not in t4["GPU peak"].found
    assert "no bfloat16" in t4["GPU dtype"].found
    assert "not in the table" in shown("Some GPU", True)["GPU peak"].found
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))
    assert main(["doctor", "--json"]) == 0
    found = {f["what"]: f["found"] for f in json.loads(capsys.readouterr().out)["findings"]}
    assert list(found)[4:10] == ["accelerator", *h100]
    assert found["GPU peak"].startswith("Some GPU")


@pytest.mark.gpu
def test_a_record_of_a_gpu_has_an_mfu_if_the_table_has_its_peak(tmp_path):
    spec = tiny(300, dtype="float32")
    record = train(RunStore(tmp_path), spec, Execution(device="cuda"))
    peak = peak_of_label(torch.cuda.get_device_name(), spec.dtype)
    assert (record.mfu is None) == (peak is None)
    assert record.mfu is None or 0 < record.mfu < 1

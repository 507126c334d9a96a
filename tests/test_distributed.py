"""One run over several processes: the same losses as on one device, and resuming on another number of processes.

Two real processes over gloo, started by torchrun once for all tests here (tests/helpers/team.py); one process for comparison.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.processes import torchrun
from helpers.runs import interrupted_at, train
from helpers.specs import SHAPE, tiny
from helpers.team_runs import OVERLAPPED, SPECS, STACK, STEPS, planned_stack
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord
from scaling_lab.core.spec import Execution, OptimizerSpec, Plan, PlannedRun, RunSpec
from scaling_lab.core.storage.claims import last_claim
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import train_pending
from scaling_lab.training.engine.devices import apply_execution
from scaling_lab.training.engine.gradient import ModelWithLoss
from scaling_lab.training.engine.memory import load_micro_batch_hint
from scaling_lab.training.engine.optimizer import control_rows
from scaling_lab.training.engine.step import LOSS, TrainStep
from scaling_lab.training.models import build_model
from scaling_lab.training.parallel import data_parallel
from scaling_lab.training.parallel.data_parallel import DataParallelStep, batch_share
from scaling_lab.training.parallel.team import Team, TeamLost, World, check_places, first_host
from scaling_lab.training.run.checkpoint import clean, load_latest, read_checkpoint

TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 5e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The results of two processes that executed tests/helpers/team.py."""
    folder = tmp_path_factory.mktemp("team")
    for name in ("1-to-2", "1-to-2-fsdp", "1-2-1"):
        interrupted_at(RunStore(folder / name), SPECS["even"], 7)
    process = torchrun("-m", "helpers.team", str(folder), port=29_500 + os.getpid() % 1000)
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, RunRecord]:
    """The same runs in a single process."""
    return {name: train(RunStore(tmp_path_factory.mktemp(name)), spec) for name, spec in SPECS.items()}


def same(a: RunRecord, b: RunRecord, tolerance: float = TOLERANCE) -> bool:
    """Whether steps, tokens and FLOPs are equal, and losses equal within the tolerance."""
    pairs = list(zip(a.curve, b.curve, strict=True))
    assert [(p.step, p.tokens, p.train_flops, p.lr) for p, _ in pairs] == [
        (q.step, q.tokens, q.train_flops, q.lr) for _, q in pairs
    ]
    assert [p.val_loss_nats is None for p, _ in pairs] == [q.val_loss_nats is None for _, q in pairs]
    found = [(p.train_loss_nats, q.train_loss_nats) for p, q in pairs]
    found += [(p.val_loss_nats, q.val_loss_nats) for p, q in pairs if p.val_loss_nats is not None]
    return all(x == pytest.approx(y, abs=tolerance) for x, y in found)


def record(folder: Path, name: str, spec=SPECS["even"]) -> RunRecord:
    return RunStore(folder / name).read_record(spec.run_id())


# Uneven shares are refused under fsdp, which tests/helpers/team.py checks.
REFUSED = {("fsdp", "uneven"), ("ddp", "tied-bfloat16")}  # or, in the second case, not trained
KINDS = [(k, name) for name in SPECS for k in ("ddp", "fsdp") if (k, name) not in REFUSED]
KINDS += [("overlap", name) for name in OVERLAPPED]


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_two_processes_have_the_losses_of_one(folder, alone, kind, name):
    # In bfloat16, sums in another order differ in the third digit.
    tolerance = BFLOAT16_TOLERANCE if "bfloat16" in name else TOLERANCE
    together = record(folder, f"{kind}-{name}", SPECS[name])
    assert same(together, alone[name], tolerance)
    assert (together.environment.processes, alone[name].environment.processes) == (2, 1)


@pytest.mark.parametrize("name", ["fsdp-micro", "ddp-compiled", "overlap-micro"])
def test_micro_batches_and_compiled_steps(folder, alone, name):
    assert same(record(folder, name), alone["even"])


def test_micro_batches_of_a_sharded_run_in_bfloat16(folder, alone):
    assert same(
        record(folder, "fsdp-micro-bfloat16", SPECS["bfloat16"]), alone["bfloat16"], BFLOAT16_TOLERANCE
    )


@pytest.mark.parametrize(("name", "micro"), [("overlap-short", 1), ("overlap-fails", None)])
def test_a_process_that_fails_during_an_overlapped_sum_keeps_nobody_waiting(folder, alone, name, micro):
    """Where the second process ran out of memory both go on with smaller micro-batches; after another error without overlap."""
    together = record(folder, name)
    assert together.execution.micro_batch_sequences == micro
    assert same(together, alone["even"])


def test_the_update_of_shards_is_adamw():
    """`adamw_update` for lists, with the settings of each tensor's own group."""
    from scaling_lab.training.engine.optimizer import GroupVectors, ParameterGroup, adamw_update
    from scaling_lab.training.parallel.sharded import foreach_adamw_update

    optimizer = OptimizerSpec(peak_lr=0.02, weight_decay=0.1)
    groups = [ParameterGroup(1.0, 0.1, 1e-8), ParameterGroup(0.25, 0.0, 1e-6)]
    generator = torch.Generator().manual_seed(0)
    new = [[torch.randn(n, generator=generator) for n in (5, 3)] for _ in range(3)]
    new.append([torch.rand(n, generator=generator) for n in (5, 3)])
    old = [[t.clone() for t in tensors] for tensors in new]
    controls = torch.tensor([0.02, 0.19, 0.0975])
    parameters, gradients, first, second = new
    foreach_adamw_update(parameters, gradients, first, second, groups, optimizer, controls)
    for k, group in enumerate(groups):
        one = torch.ones(1)
        vectors = GroupVectors(group.lr_ratio * one, group.weight_decay * one, group.eps)
        adamw_update(old[0][k], old[1][k], old[2][k], old[3][k], vectors, optimizer, controls)
        for tensors, expected in ((parameters, old[0]), (first, old[2]), (second, old[3])):
            torch.testing.assert_close(tensors[k], expected[k], rtol=1e-6, atol=1e-7)


def test_buckets_cover_the_parameters_from_the_end():
    from scaling_lab.training.engine.optimizer import FlatLayout
    from scaling_lab.training.parallel.overlap import make_buckets

    layout = FlatLayout.of(build_model(SHAPE))
    buckets = make_buckets(layout, 1000)
    total = sum(shape.numel() for shape in layout.shapes)
    assert len(buckets) > 2
    assert (buckets[0].last, buckets[-1].first) == (total, 0)
    assert all(a.first == b.last for a, b in pairwise(buckets))
    assert all(bucket.last - bucket.first >= 1000 for bucket in buckets[:-1])
    assert [name for bucket in buckets for name in bucket.names] == list(reversed(layout.names))


@contextmanager
def process_group(device: str) -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses_by_kind(spec: RunSpec, execution: Execution) -> dict[str, list[float]]:
    """Eight steps of the run without a team, and in a team of one: with ddp, overlapped, and with fsdp."""
    # Imported here, because torch.distributed.fsdp takes a tenth of the suite's collection time.
    from scaling_lab.training.parallel.sharded import ShardedStep

    device = apply_execution(execution, spec.dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (10_000,), generator=generator, dtype=torch.uint8).to(device)
    starts = torch.randint(9_000, (8, spec.batch_sequences), generator=generator).to(device)
    controls = control_rows([0.02] * 8, 0, spec.optimizer).to(device)
    found = {}
    for kind in ("alone", "ddp", "fsdp"):
        torch.manual_seed(0)
        model, team = build_model(spec.shape), Team(World(0, 1, 0), kind)
        if kind == "alone":
            step = TrainStep(model.to(device), tokens, spec, replace(execution, compile=False))
        elif kind == "ddp":
            step = DataParallelStep(model.to(device), tokens, spec, execution, team)
        else:
            step = ShardedStep(model, tokens, spec, execution, team)
        found[kind] = step.run(starts, controls).cpu()[:, LOSS].tolist()
        assert kind != "ddp" or step.overlaps
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", TOLERANCE), ("bfloat16", BFLOAT16_TOLERANCE)])
def test_ddp_and_fsdp_of_one_process_on_the_device(monkeypatch, run_device, dtype, tolerance):
    """NCCL, sums during the backward pass, sharded parameters, compiled blocks, several micro-batches."""
    if run_device == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("fsdp on a CPU needs a newer torch")
    monkeypatch.setattr(data_parallel, "OVERLAP_DEVICES", (run_device,))
    execution = Execution(run_device, compile=run_device == "cuda", micro_batch_sequences=2)
    with process_group(run_device):
        found = losses_by_kind(tiny(dtype=dtype), execution)
    assert found["ddp"] == pytest.approx(found["alone"], abs=tolerance)
    assert found["fsdp"] == pytest.approx(found["alone"], abs=tolerance)


@pytest.mark.slow
def test_compiled_blocks_of_ddp_and_fsdp(monkeypatch):
    monkeypatch.setattr(data_parallel, "OVERLAP_DEVICES", ("cpu",))
    with process_group("cpu"):
        found = losses_by_kind(tiny(), Execution(compile=True))
    assert found["ddp"] == pytest.approx(found["alone"], abs=TOLERANCE)
    assert found["fsdp"] == pytest.approx(found["alone"], abs=TOLERANCE)


def test_two_processes_with_the_same_gpu_are_refused():
    check_places([("a", "GPU-1"), ("b", "GPU-1"), ("a", "GPU-2")])
    check_places([None, None])
    with pytest.raises(UserError, match=r"same GPU on b.*--gpus-per-node=N --gpu-bind=none"):
        check_places([("a", "GPU-1"), ("b", "GPU-1"), ("b", "GPU-1")])


@pytest.mark.timeout(240)
def test_slurm_tasks_form_one_run(tmp_path, alone):
    """Two tasks of one srun, by a stand-in for Slurm's environment."""
    spec, store = SPECS["even"], RunStore(tmp_path)
    store.write_plan(Plan("t", (PlannedRun(spec, Execution()),), spec.convention, spec.data.fingerprint()))
    variables = {
        "SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "scaling_lab.worker", str(store.folder), "--parallel=ddp"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **variables, "SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)},
        )
        for k in range(2)
    ]  # fmt: skip
    said = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    done = store.read_record(spec.run_id())
    assert done.environment.processes == 2
    assert same(done, alone["even"])


def test_a_stack_over_two_processes(folder, tmp_path):
    train_pending(RunStore(tmp_path), planned_stack())
    for spec in STACK:
        assert same(record(folder, "ddp-stack", spec), RunStore(tmp_path).read_record(spec.run_id()))


@pytest.mark.parametrize("name", ["1-to-2", "1-to-2-fsdp", "fsdp-to-ddp", "fsdp-to-fsdp"])
def test_a_run_resumes_with_more_processes(folder, alone, name):
    assert same(record(folder, name), alone["even"])


@pytest.mark.parametrize("name", ["2-to-1", "2-to-1-fsdp", "1-2-1"])
def test_a_run_of_two_processes_resumes_in_one(folder, alone, name, caplog):
    store = RunStore(folder / name)
    files = {p.name for p in store.run_folder(SPECS["even"].run_id()).glob("checkpoint/*/*")}
    # fsdp: each process has written its shards.
    assert files == (set() if name == "2-to-1" else {".metadata", "__0_0.distcp", "__1_0.distcp"})
    assert store.state(SPECS["even"].run_id()).state == "interrupted"
    caplog.set_level("INFO")
    assert same(train(store, SPECS["even"]), alone["even"])
    assert f"of {STEPS}." in caplog.text  # "resumes from step ..."


def test_checkpoints_of_one_process_and_of_two_are_the_same(folder, alone, tmp_path):
    spec = SPECS["tied"]
    train(RunStore(tmp_path), spec)
    path = Path("checkpoint") / f"step-{spec.steps}.pt"
    one = read_checkpoint(RunStore(tmp_path).run_folder(spec.run_id()) / path, spec.run_id())
    for kind in ("ddp", "fsdp"):
        two = read_checkpoint(
            RunStore(folder / f"{kind}-tied").run_folder(spec.run_id()) / path, spec.run_id()
        )
        assert two.tensors.keys() == one.tensors.keys()
        for name, tensor in one.tensors.items():
            assert two.tensors[name].shape == tensor.shape
            # Adam divides small gradients by small numbers, so single weights differ by more than losses do.
            assert float((two.tensors[name] - tensor).norm() / tensor.norm()) < 1e-3


def test_shards_count_only_once_a_json_names_them_with_their_checksums(folder, tmp_path):
    spec = SPECS["tied"]
    original = RunStore(folder / "fsdp-tied").run_folder(spec.run_id()) / "checkpoint"
    assert sorted(p.name for p in original.iterdir()) == [f"step-{STEPS}.dcp", f"step-{STEPS}.json"]
    for damage in ("none", "flipped", "gone", "no json"):
        copy = shutil.copytree(original, tmp_path / damage)
        shard = copy / f"step-{STEPS}.dcp" / "__1_0.distcp"
        if damage == "flipped":
            shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        elif damage == "gone":
            shard.unlink()
        elif damage == "no json":
            (copy / f"step-{STEPS}.json").unlink()
        found = load_latest(copy, spec.run_id(), Execution(), spec.data.fingerprint())
        assert (found is not None) == (damage == "none")
        clean(copy)
        assert (copy / f"step-{STEPS}.dcp").exists() == (damage != "no json")


def test_shares_cover_a_batch_and_differ_by_at_most_one():
    for sequences, size in ((8, 2), (7, 3), (3, 3), (100, 16)):
        parts = [batch_share(sequences, World(rank, size, rank)) for rank in range(size)]
        assert [k for first, last in parts for k in range(first, last)] == list(range(sequences))
        lengths = [last - first for first, last in parts]
        assert max(lengths) - min(lengths) <= 1
    with pytest.raises(UserError, match="batch of 3 sequences cannot be shared by 4 processes"):
        batch_share(3, World(0, 4, 0))


SHORT = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def group_of_one():
    """A process group with only this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Follower(Team):
    """A team as the processes other than the first see it."""

    leads = False


def fail_in_a_step(monkeypatch, team: Team, run_folder: Path, micro: int, error: Exception) -> None:
    """A step of four sequences in micro-batches of `micro`, whose forward pass raises `error`."""
    # Imported here, because torch.distributed.fsdp takes a tenth of the suite's collection time.
    from scaling_lab.training.parallel.sharded import ShardedStep

    def forward(*_):
        raise error

    monkeypatch.setattr(ModelWithLoss, "forward", forward)
    team.run_folder = run_folder
    tokens = torch.zeros(1000, dtype=torch.uint8)
    execution = Execution(micro_batch_sequences=micro)
    step = ShardedStep(build_model(SHAPE), tokens, tiny(), execution, team)
    step.run(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("leads", "micro", "error", "ends"),
    [
        (True, 4, SHORT, TeamLost),
        (False, 4, SHORT, TeamLost),
        (True, 1, SHORT, UserError),
        (False, 1, SHORT, TeamLost),
        (True, 4, RuntimeError("Connection reset by peer"), TeamLost),
    ],
)
@pytest.mark.usefixtures("group_of_one")
def test_an_error_in_a_sharded_step_ends_the_team(tmp_path, monkeypatch, leads, micro, error, ends):
    """All processes end with `TeamLost`, so that a requeue resumes the run, with smaller micro-batches if memory ran out. If a
    single sequence was too much, the first process raises a `UserError` instead, which is not requeued."""
    team = (Team if leads else Follower)(World(0, 1, 0), "fsdp")
    with pytest.raises(ends) as stop:
        fail_in_a_step(monkeypatch, team, tmp_path, micro, error)
    assert stop.value.__cause__ is error
    assert load_micro_batch_hint(tmp_path) == (2 if error is SHORT and micro == 4 else None)
    if ends is UserError:
        assert "micro-batches of 1 sequences per process" in str(stop.value)


@pytest.mark.usefixtures("group_of_one")
def test_a_hint_that_cannot_be_written_does_not_keep_the_team_waiting(tmp_path, monkeypatch):
    """The others wait in a collective until this process ends."""
    team = Follower(World(0, 1, 0), "fsdp")
    with pytest.raises(TeamLost, match="out of memory"):
        fail_in_a_step(monkeypatch, team, tmp_path / "not there", 4, SHORT)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_team_that_runs_out_of_memory_resumes_with_smaller_micro_batches(tmp_path, alone):
    """At its next start. The process that runs out of memory is the second one, which does not write checkpoints."""
    spec, store = SPECS["even"], RunStore(tmp_path)
    store.write_plan(Plan("t", (PlannedRun(spec, Execution()),), spec.convention, spec.data.fingerprint()))
    said = []
    for port in (26_500, 25_500):
        process = torchrun(
            "-m", "helpers.team_short_of_memory", str(store.folder), "--parallel=fsdp",
            port=port + os.getpid() % 1000,
        )  # fmt: skip
        out, _ = process.communicate(timeout=140)
        said.append((process.returncode, out))
    assert said[0][0] != 0
    assert (
        "process 1: parallel=fsdp: out of memory with micro-batches of 2 sequences per process; when started again"
        in said[0][1]
    )
    assert said[1][0] == 0, said[1][1]
    done = store.read_record(spec.run_id())
    assert done.execution.micro_batch_sequences == 1
    assert same(done, alone["even"])
    assert last_claim(store.run_folder(spec.run_id())).generation == 2


def test_world_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what is set below
        monkeypatch.delenv(name)
    assert World.from_environment("auto") is None
    with pytest.raises(UserError, match="parallel=ddp needs several processes"):
        World.from_environment("ddp")
    with pytest.raises(UserError, match="parallel='dpd' is not known. Did you mean 'ddp'"):
        World.from_environment("dpd")
    for name, value in {
        "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12345",
        "SLURM_STEP_NODELIST": "gpu[003-004,9],login",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert (
        World.from_environment("auto") is None
    )  # Slurm tasks work on their own unless `parallel` says otherwise
    assert World.from_environment("ddp") == World(5, 8, 1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu003", "22345")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert World.from_environment("auto") == World(1, 2, 0)
    assert World.from_environment("none") is None
    assert [first_host(nodes) for nodes in ("a,b", "n[7,9]", "n-1")] == ["a", "n7", "n-1"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_team_that_is_stopped_or_loses_a_process_can_resume(tmp_path, number):
    """SIGTERM to torchrun, as a scheduler sends it; SIGKILL to the second process, as if its node were lost."""
    spec, store = tiny(200_000), RunStore(tmp_path)
    store.write_plan(Plan("t", (PlannedRun(spec, Execution()),), spec.convention, spec.data.fingerprint()))
    process = torchrun("-m", "scaling_lab.worker", str(store.folder), port=28_500 + os.getpid() % 1000)
    deadline = time.monotonic() + 120
    while len(store.read_curve(spec.run_id())) < 50 and time.monotonic() < deadline:
        time.sleep(0.2)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        follower = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        leader = store.state(spec.run_id()).claim.pid
        os.kill(next(int(pid) for pid in follower if int(pid) != leader), number)
    process.communicate(timeout=120)
    assert store.state(spec.run_id()).state == "interrupted"
    assert not (store.run_folder(spec.run_id()) / "record.json").exists()
    if number == signal.SIGTERM:
        assert list((store.run_folder(spec.run_id()) / "checkpoint").glob("step-*.pt"))


@pytest.mark.slow
def test_the_command_under_torchrun_writes_and_prints_everything_once(tmp_path):
    options = [
        "sweep=p",
        f"results_dir={tmp_path}",
        "model.width=16",
        "model.depth=1",
        "device=cpu",
        "train_tokens=20k",
    ]
    command = [str(Path(sys.executable).parent / "scaling-lab"), "train", *options, "compile=false"]
    process = torchrun(*command, port=27_500 + os.getpid() % 1000)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert out.count("records: ") == 1
    assert len(list(tmp_path.glob("p/runs/*/record.json"))) == 1
    assert len(list(tmp_path.glob("p/runs/*/claim-*.json"))) == 1


def test_sweep_under_torchrun_is_refused_with_the_right_command(tmp_path, monkeypatch, capsys):
    from scaling_lab.cli.main import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", "sweep=p", f"results_dir={tmp_path}"]) == 2
    assert "torchrun --nproc_per_node=N -m scaling_lab.worker" in capsys.readouterr().err

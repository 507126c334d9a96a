"""Options of plan, sweep, quickstart and train: their form, and conversion of a composed config to `SweepSettings`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.configs import (
    config_folders,
    default_groups,
    find_config,
    group_choices,
    plain_tree,
    read_yaml,
)
from scaling_lab.cli.options.forms import Form, GroupOption, Option, build, options_of, type_hints
from scaling_lab.cli.options.machine import resolve_device, resolve_dtype
from scaling_lab.cli.options.scales import GROUP as SCALE_GROUP
from scaling_lab.cli.options.scales import Scale
from scaling_lab.cli.options.values import read_value, unquoted
from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.installation import is_installed
from scaling_lab.core.parametrization import parametrization_class
from scaling_lab.core.registry import member
from scaling_lab.core.spec import DTYPES, EvalSpec, schedule_class, shape_class, source_class
from scaling_lab.planning.devices import AUTO, get_device
from scaling_lab.planning.settings import CorpusUse, ExecutionSettings, ModelSettings, SweepSettings

# Config groups with one choice each, whose options depend on the choice.
PARTS = ("model", "data", "schedule", "parametrization", "recipe", "design", "tracker")
GROUP_MEANINGS = {
    "model": "model family",
    "data": "training corpus",
    "schedule": "learning rate over a run",
    "parametrization": "how LRs and initial values scale with the shape",
    "recipe": "batch, learning rate and warmup from size and horizon",
    "design": "which sizes at which budgets",
    "tracker": "experiment tracker",
    "experiment": "a complete sweep by name",
}
# Fields without effect because the recipe or the design sets them.
SET_BY_RECIPE = {"schedule.warmup_fraction": "the recipe decides it; set recipe.warmup_fraction instead."}
SET_BY_DESIGN = {
    "model.width": "the design chooses the widths; set design.sizes.min_width and design.sizes.max_width instead.",
    "model.depth": "the design chooses the depths; set design.sizes.aspect_ratio or design.sizes.min_depth instead.",
}


@dataclass(frozen=True)
class Common:
    """Top-level options shared by the four commands."""

    sweep: str | None = None
    results_dir: str = "results"
    config_dir: str | None = None
    """A folder with your own configs, searched before the built-in ones"""
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "tf32"] = "auto"
    """Precision of computation; auto: bfloat16 on GPUs that have it (by gpu=, else the one at hand), else float32; bfloat16 is
    autocast (weights, moments and losses stay float32); tf32 needs CUDA"""
    convention: Convention = Convention.SIX_N_WITH_HEAD
    """What N and FLOP budgets count"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on; auto: CUDA if available, else MPS, else the CPU"""
    compile: Literal["auto", "true", "false"] = "auto"
    """Use torch.compile; auto: if the plan trains long enough that it pays off"""
    threads: int | None = None
    """CPU threads per run; null: one, or all cores if the plan's models are large"""
    stack: Literal["auto", "false"] = "auto"
    """auto: train seeds and learning rates of the same shape as one program if that is faster"""
    memory_gb: float | None = None
    """Memory that one run may use, GB; null: the device's (that of gpu=, if given). Larger batches are split into micro-batches"""
    deterministic: bool = True
    """Same machine, same losses"""
    keep: Literal["weights", "none", "resume"] = "weights"
    """What a completed run leaves behind: its weights, only curve and record, or a checkpoint with the optimizer's state"""
    eval: EvalSpec = field(default_factory=EvalSpec)

    def __post_init__(self) -> None:
        assert self.dtype in (AUTO, *DTYPES)


@dataclass(frozen=True)
class SweepOnly:
    """Additional options of sweep and quickstart."""

    workers: int | None = None
    """Worker processes of the local launcher; default: one per core, or a few per GPU"""
    retry: Literal["failed"] | None = None
    """failed: train failed runs again from their last checkpoint, and diverged runs from scratch"""
    gpu: str | None = None
    """GPU to show time and cost for: h100, h200, b200, a100, l40s, rtx4090, rtx3090, t4, or auto for the one here"""
    scale: Scale | None = None
    """Size of the experiment: smoke (seconds), cpu, gpu or gpu_day; null or auto: that of the sweep's plan, else by the device"""
    count: int = 1
    """How many of them"""
    price_per_hour: float | None = None
    """Price of one GPU for an hour, in any currency"""
    study: str | None = None
    """What the sweep is for: the report begins with what this study finds. No run depends on it"""

    def __post_init__(self) -> None:
        if self.retry not in (None, "failed"):
            raise unknown("retry", self.retry, ("failed",))
        if self.study is not None:
            from scaling_lab.analysis.studies import get_study

            get_study(self.study)
        if self.gpu not in (None, AUTO):
            get_device(self.gpu)
        if self.count < 1:
            raise UserError(f"count={self.count} must be at least 1.")
        if self.price_per_hour is not None and not self.price_per_hour >= 0:
            raise UserError(f"price_per_hour={self.price_per_hour} must not be negative.")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers={self.workers} must be at least 1.")


@dataclass(frozen=True)
class PlanOnly:
    """Additional options of plan."""

    probe: bool = False
    """Measure 30 s of the planned steps on the device at hand; this plan's time, and that of later ones, then comes from it"""


@dataclass(frozen=True)
class TrainOnly:
    """Additional options of train."""

    train_tokens: int | None = None
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How processes started by torchrun (or by srun, with ddp or fsdp) share the run; auto: fsdp if memory requires it"""


@dataclass(frozen=True)
class WandbOptions:
    """Options of tracker=wandb."""

    project: str = "scaling_lab"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"


@dataclass(frozen=True)
class NoOptions:
    """A choice without options."""


def study_form(arguments: Arguments, config_name: str, extra: Sequence[type] = ()) -> Form:
    """The form for help, with the groups chosen in `arguments`; does not use Hydra."""
    config_dir = arguments.get("config_dir")
    folders = config_folders(None if config_dir is None else unquoted(config_dir))
    defaults = default_groups(config_name, folders)
    chosen = {g.package: unquoted(v) for g in defaults if (v := arguments.get(g.package)) is not None}
    for group in defaults:
        if group.package in chosen and chosen[group.package] != "null":
            find_config(f"{group.name}/{chosen[group.package]}", folders)
    tree, meanings = plain_tree(config_name, {k: v for k, v in chosen.items() if k != "experiment"}, folders)
    groups = tuple(
        GroupOption(
            g.package,
            chosen.get(g.package, default),
            tuple(group_choices(g.name, folders)),
            GROUP_MEANINGS[g.name],
        )
        for g, default in defaults.items()
        if g.package != SCALE_GROUP
    )
    return dataclasses.replace(form_of_tree(tree, meanings, extra), groups=groups)


def form_of_tree(
    tree: Mapping[str, Any], meanings: Mapping[str, str] | None = None, extra: Sequence[type] = ()
) -> Form:
    """The form of a composed config tree; its options depend on the kinds chosen in the tree."""
    options: dict[str, Option] = {}
    for cls in (Common, *extra):
        options |= options_of(cls, meanings=meanings)
    for name in PARTS:
        if name in tree:
            cls = part_class(name, tree[name])
            options |= options_of(cls, f"{name}.", meanings=meanings, skip=("kind", "options"))
    if "model" in tree:
        own = options_of(
            shape_class(kind_of("model", tree["model"])), "model.", meanings=meanings, skip=("vocab_size",)
        )
        options |= {key: option for key, option in own.items() if key not in options}
    if "data" in tree:
        options |= options_of(CorpusUse, "data.", meanings=meanings)
    elsewhere = SET_BY_RECIPE | (SET_BY_DESIGN if "design" in tree else {})
    known = {key: _with_tree_default(option, tree) for key, option in options.items() if key not in elsewhere}
    return Form(known, elsewhere=elsewhere)


def _with_tree_default(option: Option, tree: Mapping[str, Any]) -> Option:
    """The option with the default from the config, if the config sets one."""
    node: Any = tree
    for part in option.key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return option
        node = node[part]
    try:
        return dataclasses.replace(option, default=read_value(option.key, node, option.value_type))
    except UserError:
        return option  # an invalid value in a config file is reported when it is used


def kind_of(name: str, node: Any) -> str:
    """The `kind` of a group's node."""
    if not isinstance(node, Mapping):
        raise UserError(f"{name}={node!r} is invalid: expected a config of the group {name}.")
    kind = node.get("kind")
    if not isinstance(kind, str):
        raise UserError(f"{name}: the config has no `kind: NAME` line, which determines its options.")
    return kind


def part_class(name: str, node: Any) -> type:
    """The dataclass whose fields are the options of a group's choice."""
    kind = kind_of(name, node)
    if name == "model":
        shape_class(kind)
        return ModelSettings
    if name == "tracker":
        trackers: dict[str, type] = {"none": NoOptions, "wandb": WandbOptions}
        if kind not in trackers:
            raise unknown("tracker", kind, trackers)
        return trackers[kind]
    if name == "data":
        return source_class(kind)
    if name == "schedule":
        return schedule_class(kind)
    if name == "parametrization":
        return parametrization_class(kind)
    return member(f"scaling_lab.planning.{name}s", name, kind)


def sweep_settings(
    tree: Mapping[str, Any], extra: Sequence[type] = (), *, device: str | None = None
) -> SweepSettings:
    """Typed settings from a composed config tree.

    Args:
        device: the device to plan for whatever the tree says; None: the tree's, and for `device=auto` that of `gpu=`, else
            that of this machine.

    Raises:
        UserError: unknown keys, wrong types, a missing sweep name, or values that the settings reject.
    """
    parts = {name: tree[name] for name in PARTS if name in tree}
    own = {
        key: value
        for key, value in tree.items()
        if key not in parts and key not in ("hydra", "run_ids", "experiment")
    }
    names = {f.name for cls in extra for f in dataclasses.fields(cls)}
    for cls in extra:
        build(
            cls,
            {key: value for key, value in own.items() if key in {f.name for f in dataclasses.fields(cls)}},
        )
    common: Common = build(Common, own, skip=tuple(names))
    if not common.sweep:
        raise UserError(
            "sweep=NAME is missing: give the sweep a name (its folder in results_dir), or give experiment=NAME."
        )
    tracker_options(tree)
    data_node = dict(parts["data"])
    use_fields = {f.name for f in dataclasses.fields(CorpusUse)}
    use_node = {name: data_node.pop(name) for name in list(data_node) if name in use_fields}
    use: CorpusUse = build(CorpusUse, use_node, "data.")
    gpu = tree.get("gpu")
    device = device or resolve_device(common.device, gpu)
    return SweepSettings(
        sweep=common.sweep,
        design=_part("design", parts["design"]) if "design" in parts else None,
        recipe=_part("recipe", parts["recipe"]),
        model=model_settings(parts["model"]),
        data=_part("data", complete(data_node)),
        schedule=_part("schedule", parts["schedule"]),
        parametrization=_part("parametrization", parts["parametrization"]),
        eval=common.eval,
        max_epochs=use.max_epochs,
        **{f.name: getattr(use, f.name) for f in dataclasses.fields(CorpusUse) if f.name != "max_epochs"},
        convention=common.convention,
        seed=common.seed,
        scale=tree.get("scale"),
        dtype=resolve_dtype(common.dtype, device, gpu),
        execution=execution_settings(common, device, gpu),
    )


def execution_settings(common: Common, device: str, gpu: str | None = None) -> ExecutionSettings:
    """How runs should be computed, with the memory of `gpu`, or of this machine's GPU, unless memory_gb is given."""
    memory_gb = common.memory_gb
    if memory_gb is None and device == "cuda" and gpu not in (None, AUTO):
        memory_gb = get_device(str(gpu)).memory_gb
    elif memory_gb is None and device == "cuda" and is_installed("torch"):
        from scaling_lab.training.engine.devices import cuda_memory_gb

        memory_gb = cuda_memory_gb()
    return ExecutionSettings(
        device=device,
        compile=common.compile,
        threads=common.threads,
        deterministic=common.deterministic,
        stack=common.stack,
        memory_gb=memory_gb,
        keep=common.keep,
    )


def complete(data_node: Mapping[str, Any]) -> Mapping[str, Any]:
    """A source's options, including those that the source determines itself."""
    completed = getattr(part_class("data", data_node), "completed", None)
    return data_node if completed is None else dict(completed(data_node))


def tracker_options(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`kind` and validated options of the tracker, as plain values for a worker's command line."""
    node = tree.get("tracker") or {"kind": "none"}
    options = build(part_class("tracker", node), node, "tracker.")
    return {"kind": kind_of("tracker", node), **dataclasses.asdict(options)}


def model_settings(node: Mapping[str, Any]) -> ModelSettings:
    """The settings of a model family; fields specific to the family go into `options`."""
    kind = kind_of("model", node)
    shape_fields = type_hints(shape_class(kind))
    ours = {f.name for f in dataclasses.fields(ModelSettings)} - {"options", "kind"}
    special = {f.name for f in dataclasses.fields(shape_class(kind))} - ours - {"vocab_size"}
    options = {k: read_value(f"model.{k}", v, shape_fields[k]) for k, v in node.items() if k in special}
    settings: ModelSettings = build(
        ModelSettings, node, "model.", given={"kind": kind, "options": options}, skip=tuple(special)
    )
    return settings


def _part(name: str, node: Any) -> Any:
    return build(part_class(name, node), node, f"{name}.")


def experiment_name(name: str | None, config_dir: str | None) -> str | None:
    """The sweep name of an experiment: its `sweep:` field, else the name of its file."""
    if name is None or name == "null":
        return None
    path: Path = find_config(f"experiment/{name}", config_folders(config_dir))
    own = read_yaml(path).get("sweep")
    return str(own) if own else name

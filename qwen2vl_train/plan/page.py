"""A forecast as tables for a terminal: data, cost, memory, and the settings that fit.

Enters: a `Forecast`. Leaves: rich renderables that 80 columns have room for; no decision is taken here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qwen2vl_train.model.cost import parameter_counts
from qwen2vl_train.plan.forecast import Forecast, StageForecast
from qwen2vl_train.plan.hardware import USABLE
from qwen2vl_train.plan.memory import Choice

GB = 1e9
STAGES_A_TABLE = 4
SOURCE_LEGEND = (
    "wanted, got: shares of the samples drawn; of tokens: share of the packs; tokens each: of a sample; media: share "
    "of the source's tokens; epochs: at the stage's end\n"
)


def page(plan: Forecast) -> Group:
    """All tables, and the verdict last."""
    return Group(*_parts(plan))


def _parts(plan: Forecast) -> Iterator[RenderableType]:
    counts = parameter_counts(plan.model)
    parts = ", ".join(f"{part} {_short(count)}" for part, count in counts.items())
    machine = plan.hardware
    peak = f", {machine.peak_flops / 1e12:,.0f} TFLOP/s" if machine.peak_flops else ""
    yield Text(
        f"{_short(sum(counts.values()))} parameters ({parts}) on {machine.gpus} x {machine.name} of "
        f"{machine.memory_gb:g} GB{peak}, {plan.setting.precision}"
    )
    if plan.no_data:
        yield Text(f"{plan.no_data}; what follows is the memory alone", style="yellow")
    for stage in plan.stages:
        if stage.rehearsal is not None:
            yield from _sources(stage)
    if plan.no_data is None:
        yield Text(SOURCE_LEGEND, style="dim italic")
        yield from _costs(plan)
    yield from _memory(plan)
    yield _choices(plan)
    yield _verdict(plan)


def _sources(stage: StageForecast) -> Iterator[RenderableType]:
    """What the stage's sources hold, and what it takes of them: two tables, 80 columns have no room for one."""
    data = stage.rehearsal
    assert data is not None
    yield Text(_planned(stage), style="bold")
    yield Text(
        f"fill {data.fill:.2%} ({data.packs_under_98:.1%} of packs under 98%), "
        f"{data.supervised / max(1, data.tokens):.1%} of tokens supervised"
    )
    held = _table("what the sources hold", ("samples", "unusable", "tokens an epoch"))
    taken = _table(f"what {stage.name} takes of them", ("wanted", "got", "of tokens", "tokens each", "media", "epochs"))
    for source in data.sources:
        name, unusable = escape(source.name), source.samples - source.usable
        held.add_row(name, f"{source.samples:,}", f"{unusable:,}" if unusable else "", _short(source.epoch_tokens))
        taken.add_row(
            name,
            f"{source.wanted:.1%}",
            f"{source.got:.1%}",
            f"{source.planned_tokens / max(1, data.tokens):.1%}",
            f"{source.planned_tokens / max(1, source.planned_samples):,.0f}",
            f"{source.planned_media_tokens / max(1, source.planned_tokens):.0%}",
            f"{data.epochs(source, stage.steps):,.2f}",
        )
    yield held
    yield taken


def _planned(stage: StageForecast) -> str:
    """Which of the stage's steps were planned, and what stands for the others."""
    data = stage.rehearsal
    assert data is not None
    if data.steps >= stage.steps:
        return f"{stage.name}: all {stage.steps:,} steps planned, {data.packs:,} packs"
    said = f"{stage.name}: {data.steps:,} of {stage.steps:,} steps planned, {data.packs:,} packs; "
    if len(data.slices) == 1:
        return f"{said}the rest extrapolated from these"
    parts = (f"{part.steps:,} of {part.of_steps:,.0f} from {_short(part.from_tokens)} tokens" for part in data.slices)
    return f"{said}the rest extrapolated by phase of the mixture ({', '.join(parts)})"


def _costs(plan: Forecast) -> Iterator[RenderableType]:
    """Tokens, FLOPs, imbalance and time of each stage: a column a stage."""
    facts = {}
    for stage in plan.stages:
        data = stage.rehearsal
        assert data is not None
        total = sum(data.flops.values())
        facts[stage.name] = {
            "steps": f"{stage.steps:,}",
            "packs a step": f"{stage.packs_per_step:,}",
            "tokens": _short(stage.tokens or 0),
            "FLOPs a step": _short(data.flops_per_step),
            **{
                f"  {label}": f"{data.flops[part] / total:.1%}"
                for part, label in (("vit", "ViT"), ("merger", "merger"), ("llm", "LLM"), ("head", "head"))
            },
            "imbalance": f"{data.imbalance:.2f}",
            "  as dealt": f"{data.imbalance_sorted:.2f}",
            "time": _time(stage.seconds),
        }
    yield from _columns(f"cost at an MFU of {plan.mfu:.0%}", facts)
    yield Text(
        "imbalance: the slowest rank's FLOPs over the mean, by micro-step, packs in plan order; as dealt: packs of "
        "like cost side by side, as training deals them\n",
        style="dim italic",
    )


def _memory(plan: Forecast) -> Iterator[RenderableType]:
    """Bytes by what they hold, of the configured settings."""
    parts = ("parameters", "gradients", "optimizer", "gathered", "buckets", "activations")
    facts: dict[str, dict[str, RenderableType]] = {
        stage.name: {
            **{name: f"{getattr(stage.memory, name) / GB:.2f}" for name in parts},
            "total": _mark(stage.memory.total, plan),
            "host memory": f"{stage.memory.host / GB:.2f}",
        }
        for stage in plan.stages
    }
    yield from _columns("memory of a rank as configured, GB", facts)
    yield Text(
        f"for the heaviest pack that the budgets allow; {USABLE:.0%} of the memory "
        f"({plan.hardware.usable_bytes / GB:.1f} GB) can hold tensors\n",
        style="dim italic",
    )


def _choices(plan: Forecast) -> Table:
    """Settings by rows, checkpointing by columns: GB of the stage that needs most."""
    columns = {(0, 0): "all\nkept", (0, 1): "LLM\nrecomputed", (1, 1): "all\nrecomputed"}
    headings = ("ranks\na pack", "offload", *columns.values(), "host\nmemory")
    table = _table("GB by setting, the stage that needs most (green fits)", headings)
    rows: dict[tuple[int, int, bool, bool], dict[tuple[int, int], Choice]] = {}
    for choice in plan.choices:
        one = choice.setting
        row = rows.setdefault(
            (one.zero_stage, one.sequence_parallel, one.offload_optimizer, one.offload_parameters), {}
        )
        row[one.vision_checkpointing, one.text_checkpointing] = choice
    for (zero_stage, split, optimizer, parameters), by in rows.items():
        table.add_row(
            f"ZeRO-{zero_stage}",
            str(split),
            "all" if parameters else "optimizer" if optimizer else "",
            *(_mark(by[key].bytes, plan) for key in columns),
            f"{max(choice.host for choice in by.values()) / GB:.1f}",
        )
    return table


def _verdict(plan: Forecast) -> Text:
    need, room = plan.needed_bytes / GB, plan.hardware.usable_bytes / GB
    if plan.fits:
        return Text(f"The configured settings fit: {need:.1f} of {room:.1f} GB.", style="bold green")
    said = f"The configured settings do not fit: a rank needs {need:.1f} GB, {room:.1f} can be used."
    if plan.best is not None:
        said += f" The fastest that fits ({plan.best.bytes / GB:.1f} GB): {plan.best.setting.words}"
        return Text(said, style="bold yellow")
    said += f" No setting fits {plan.hardware.gpus} x {plan.hardware.memory_gb:g} GB."
    if plan.fewest_gpus is not None:
        said += f" {plan.fewest_gpus} such GPUs would do with ZeRO-3 and every block recomputed."
    else:
        said += " No number of them would: lower plan.max_tokens and plan.max_patches, or take larger GPUs."
    return Text(said, style="bold red")


def _mark(count: int, plan: Forecast) -> Text:
    return Text(f"{count / GB:.1f}", style="green" if count <= plan.hardware.usable_bytes else "red")


def _columns(title: str, facts: Mapping[str, Mapping[str, RenderableType]]) -> Iterator[Table]:
    """Tables of one fact a line and a column for each stage, as many side by side as 80 columns have room for."""
    names = list(facts)
    for first in range(0, len(names), STAGES_A_TABLE):
        shown = names[first : first + STAGES_A_TABLE]
        table = _table(title, [escape(name) for name in shown])
        for fact in facts[shown[0]]:
            table.add_row(fact, *(facts[name][fact] for name in shown))
        yield table


def _table(title: str, headings: Sequence[str]) -> Table:
    """An empty table: names on the left (folded where long), then figures, which are never cut."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _short(count: float) -> str:
    """2_208_985_600 -> "2.21 G"."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "peak unknown"
    units: Sequence[tuple[float, str]] = ((86_400, "days"), (3_600, "hours"), (60, "minutes"))
    for size, unit in units:
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"

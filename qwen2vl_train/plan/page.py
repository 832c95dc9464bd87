"""A forecast as tables for a terminal: data, cost, memory, and the settings that fit.

Enters: a `Forecast`. Leaves: rich renderables; no decision is taken here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qwen2vl_train.model.cost import parameter_counts
from qwen2vl_train.plan.forecast import Forecast, StageForecast
from qwen2vl_train.plan.hardware import USABLE
from qwen2vl_train.plan.memory import Choice, RankMemory

GB = 1e9
SOURCE_LEGEND = (
    "samples (-: unusable) and tokens of one epoch; wanted, got: shares of the samples drawn; of tokens: share of the\n"
    "packs; media: share of the source's tokens; epochs: at the stage's end\n"
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
            yield _sources(stage)
    if plan.no_data is None:
        yield Text(SOURCE_LEGEND, style="dim italic")
        yield _costs(plan)
    yield _memory(plan)
    yield _choices(plan)
    yield _verdict(plan)


def _sources(stage: StageForecast) -> Table:
    """What each source gives to the stage."""
    data = stage.rehearsal
    assert data is not None
    what = "the whole" if data.steps >= stage.steps else f"{data.steps:,} of {stage.steps:,} steps of the"
    table = _table(
        f"{stage.name}: {what} stage, {data.packs:,} packs, fill {data.fill:.2%} ({data.packs_under_98:.1%} of packs "
        f"under 98%), {data.supervised / max(1, data.tokens):.1%} of tokens supervised"
    )
    for heading in ("samples", "tokens", "wanted", "got", "of tokens", "per sample", "media", "epochs"):
        table.add_column(heading, justify="right")
    for source in data.sources:
        unusable = source.samples - source.usable
        table.add_row(
            source.name,
            f"{source.samples:,}" + (f" (-{unusable:,})" if unusable else ""),
            _short(source.epoch_tokens),
            f"{source.wanted:.1%}",
            f"{source.got:.1%}",
            f"{source.planned_tokens / max(1, data.tokens):.1%}",
            f"{source.planned_tokens / max(1, source.planned_samples):,.0f}",
            f"{source.planned_media_tokens / max(1, source.planned_tokens):.0%}",
            f"{data.epochs(source, stage.steps):,.2f}",
        )
    return table


def _costs(plan: Forecast) -> Table:
    """Tokens, FLOPs, imbalance and time of each stage."""
    table = _table(f"cost at an MFU of {plan.mfu:.0%}")
    for heading in ("steps", "tokens", "FLOPs a step", "ViT", "merger", "LLM", "head", "imbalance", "sorted", "time"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        data = stage.rehearsal
        if data is None:
            continue
        total = sum(data.flops.values())
        table.add_row(
            stage.name,
            f"{stage.steps:,} x {stage.packs_per_step}",
            _short(stage.tokens or 0),
            _short(data.flops_per_step),
            *(f"{data.flops[part] / total:.1%}" for part in ("vit", "merger", "llm", "head")),
            f"{data.imbalance:.2f}",
            f"{data.imbalance_sorted:.2f}",
            _time(stage.seconds),
        )
    table.caption = (
        "imbalance: the slowest rank's FLOPs over the mean, by micro-step, packs in plan order; sorted: packs of\n"
        "like cost side by side, as training deals them"
    )
    return table


def _memory(plan: Forecast) -> Table:
    """Bytes by what they hold, of the configured settings."""
    table = _table("memory of a rank as configured, GB, for the heaviest pack that the budgets allow")
    headings = {
        "parameters": "weights", "gradients": "grads", "optimizer": "optim", "gathered": "gathered",
        "buckets": "buckets", "activations": "activations",
    }  # fmt: skip
    for heading in (*headings.values(), "total", "host"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        memory: RankMemory = stage.memory
        table.add_row(
            stage.name,
            *(f"{getattr(memory, name) / GB:.2f}" for name in headings),
            _mark(memory.total, plan),
            f"{memory.host / GB:.2f}",
        )
    table.caption = f"{USABLE:.0%} of the memory ({plan.hardware.usable_bytes / GB:.1f} GB) can hold tensors"
    return table


def _choices(plan: Forecast) -> Table:
    """Settings by rows, checkpointing by columns: GB of the stage that needs most."""
    table = _table("GB by setting, the stage that needs most (green fits)")
    columns = {(0, 0): "all kept", (0, 1): "LLM recomputed", (1, 1): "all recomputed"}
    for heading in ("ranks a pack", "offload", *columns.values(), "host"):
        table.add_column(heading, justify="right")
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


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", title_style="bold")
    table.add_column("")
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

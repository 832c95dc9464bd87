"""Under which heading a figure is shown, in wandb and in the report alike."""

from __future__ import annotations

SECTIONS = ("loss", "evaluation", "optimisation", "throughput", "data")
_OF_FIGURE = {  # first word of a figure's name -> section
    "loss": "loss",
    "gradient_norm": "optimisation",
    "lr": "optimisation",
    "skipped_updates": "optimisation",
    "rollbacks": "optimisation",
    "tokens_per_s": "throughput",
    "samples_per_s": "throughput",
    "step_s": "throughput",
    "data_wait_share": "throughput",
    "tflops_per_s": "throughput",
    "mfu": "throughput",
    "memory_gb": "throughput",
    "held_out": "evaluation",
}


def section_of(name: str) -> str:
    """The section of a metric, by what stands before its "/"; "data" for those of no other."""
    return _OF_FIGURE.get(name.split("/")[0], "data")

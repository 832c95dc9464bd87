"""The section of settings: the resolved configuration by dotted keys, and the machine's environment.

Enters: nested mappings as JSON gave them. Leaves: folded tables. A key reads as it is overridden on the command line
(`stages.vision.steps`), so that a value seen here can be changed there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from qwen2vl_train.report.folder import Run
from qwen2vl_train.report.markup import Html, element


def settings_section(run: Run) -> Html:
    """Configuration by group, then environment, then what could not be read."""
    groups = [_group(name, rows) for name, rows in _grouped(run.config).items()]
    environment = list(_flatten("", run.environment))
    return element(
        "section",
        element("h2", "Configuration and environment"),
        element("p", "Keys as the command line takes them: KEY=VALUE.", class_="hint") if groups else None,
        groups or element("p", "config.json is missing.", class_="hint"),
        _group("environment", environment)
        if environment
        else element("p", "environment.json is missing.", class_="hint"),
        id="configuration",
    )


def _group(name: str, rows: list[tuple[str, str]]) -> Html:
    body = [element("tr", element("td", key), element("td", value)) for key, value in rows]
    summary = element("summary", name, " ", element("small", f"{len(rows)} value{'s' * (len(rows) != 1)}"))
    return element("details", summary, element("div", element("table", body, class_="keys-values"), class_="scroll"))


def _grouped(config: Mapping[str, object]) -> dict[str, list[tuple[str, str]]]:
    """Rows by top-level key; each stage is a group of its own, and loose values share the first one, "run"."""
    groups: dict[str, list[tuple[str, str]]] = {"run": []}
    for key, value in config.items():
        if key == "stages" and isinstance(value, dict):
            for stage, settings in value.items():
                groups[f"stages.{stage}"] = list(_flatten(f"stages.{stage}", settings))
        elif isinstance(value, dict) and value:
            groups[key] = list(_flatten(key, value))
        else:
            groups["run"] += _flatten(key, value)
    return {name: rows for name, rows in groups.items() if rows}


def _flatten(key: str, value: object) -> Iterator[tuple[str, str]]:
    """("optim.lr.vit", "0.0002") for each leaf; lists stay whole, as one writes them."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(f"{key}.{name}" if key else str(name), inner)
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""The order in which packages may import each other, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "data_pipelines").rglob("*.py")) + sorted((ROOT / "qwen2vl_train").rglob("*.py"))
# A layer may import itself and every layer above it in this list.
ORDER = [
    ["errors", "samples", "config", "tokenizer", "whole", "processes"],
    ["shards", "decode"],
    ["encode"],
    ["index", "sources"],
    ["ledger", "plan", "pack"],
    ["loader", "streaming"],
    ["report"],
    ["cli", "__main__"],
]
LAYER = {name: number for number, names in enumerate(ORDER) for name in names}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_one_way(path):
    module = module_of(path)
    for name in imports_of(path):
        if module.startswith("data_pipelines"):
            assert not name.startswith("qwen2vl_train"), f"{module} imports {name}: data never knows the trainer"
        if module.startswith("qwen2vl_train.model"):
            assert not name.startswith(("torch.distributed", "deepspeed")), f"{module} imports {name}"
            assert not name.startswith(("qwen2vl_train.training", "qwen2vl_train.evaluation")), f"{module}: {name}"
        if name.split(".")[0] == "deepspeed":
            assert module == "qwen2vl_train.training.engine", f"{module} imports DeepSpeed; only the engine may"
        if name.split(".")[0] in ("hydra", "omegaconf"):
            assert module == "qwen2vl_train.compose", f"{module} imports {name}"
        if name.startswith(("qwen2vl_train.evaluation", "qwen2vl_train.stages")):
            assert not module.startswith("qwen2vl_train.training"), f"{module} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-2:] != ("data_pipelines", "__init__.py")], ids=module_of)
def test_data_layers_keep_their_order(path):
    module = module_of(path).split(".")
    if module[0] != "data_pipelines" or len(module) < 2:
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "data_pipelines" and len(parts) > 1:
            assert LAYER[parts[1]] <= LAYER[module[1]], f"{'.'.join(module)} imports {name} from a later layer"


def test_no_import_cycle():
    graph = {module_of(path): {name for name in imports_of(path) if name in known()} for path in FILES}
    done: set[str] = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for name in graph[module]:
                visit(name, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def known() -> set[str]:
    return {module_of(path) for path in FILES}

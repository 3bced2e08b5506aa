"""The layers of ARCHITECTURE.md: who may import whom, and where Ray may be loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nanochat_ray"
BOTTOM = {"config", "messages", "remote", "run_dir"}
GROUND = BOTTOM | {"model", "text", "corpus"}
TOOLS = GROUND | {"engine", "sandbox"}
MEASURES = TOOLS | {"tasks", "metrics", "report"}
RAY_ROOMS = {"data", "train", "rollout", "evals", "observe", "serve", "cloud"}
# every file and folder of the package: what it may import of the others
ALLOWED = {
    "__init__": set(),
    "config": set(),
    "messages": set(),
    "remote": set(),
    "run_dir": {"remote"},
    "flags": {"config"},
    "presets": {"config"},
    "model": BOTTOM,
    "text": BOTTOM,
    "corpus": BOTTOM | {"text"},
    "engine": GROUND,
    "sandbox": BOTTOM,
    "tasks": TOOLS,
    "metrics": TOOLS | {"tasks"},
    "report": BOTTOM,
    "interchange": MEASURES | {"presets"},
    "stages": MEASURES,
    "data": MEASURES | {"stages"},
    "evals": MEASURES | {"stages", "interchange"},
    "observe": BOTTOM | {"report"},
    "rollout": MEASURES | {"stages", "interchange"},
    "train": MEASURES | {"stages", "data", "rollout", "observe"},
    "serve": TOOLS | {"interchange"},
    "plan": MEASURES | {"stages", "presets"},
    "cloud": BOTTOM,
}
FORBIDDEN_IN_PLAIN = {"ray", "wandb", "fastapi", "uvicorn", "starlette", "click", "typer"}


def rooms() -> set[str]:
    found = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    return {path.stem if path.is_file() else path.name for path in found}


def imports(path: Path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            if node.module == "nanochat_ray":
                found |= {f"nanochat_ray.{alias.name}" for alias in node.names}
    return found


def files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]


def plain_modules() -> list[str]:
    found = []
    for room in sorted(rooms() - RAY_ROOMS - {"__init__"}):
        for path in files(room):
            if "hf_folder" in path.parts:  # goes into exported folders, where Transformers imports it
                continue
            module = ".".join(("nanochat_ray", *path.relative_to(PACKAGE).with_suffix("").parts))
            found.append(module.removesuffix(".__init__"))
    return found


def test_the_table_lists_every_room():
    assert rooms() == ALLOWED.keys()


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_go_downwards(room):
    for path in files(room):
        inner = {name.split(".")[1] for name in imports(path, False) if name.startswith("nanochat_ray.")}
        assert inner - {room} <= ALLOWED[room], f"{path} imports {inner - {room} - ALLOWED[room]}"


@pytest.mark.parametrize("room", sorted(ALLOWED.keys() - RAY_ROOMS))
def test_plain_rooms_name_no_ray(room):
    for path in files(room):
        outer = {name.split(".")[0] for name in imports(path, top_level_only=False)}
        assert "ray" not in outer, path
        top = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        assert not top & FORBIDDEN_IN_PLAIN, path


def loaded_by(modules: list[str], suspects: set[str]) -> str:
    code = f"import sys\nfor m in {modules!r}:\n    __import__(m)\nprint(sorted(set(sys.modules) & {suspects!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_plain_modules_loads_no_ray():
    assert loaded_by(plain_modules(), {"ray", "wandb", "matplotlib"}) == "[]"


def test_settings_load_neither_torch_nor_ray():
    settings = ["nanochat_ray.config", "nanochat_ray.flags", "nanochat_ray.presets"]
    assert loaded_by(settings, {"torch", "ray", "numpy"}) == "[]"


def test_only_jobs_join_or_start_a_cluster():
    for path in PACKAGE.rglob("*.py"):
        assert "ray.init(" not in path.read_text(), path


def test_nothing_loads_pickles_or_evaluates_text():
    inside = PACKAGE / "sandbox" / "inside.py"  # which runs a program where it can do no harm
    reader = PACKAGE / "interchange" / "nanochat_tensors.py"  # of nanochat's own files, tensors only
    for path in set(PACKAGE.rglob("*.py")) - {inside}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if path == reader and called == "torch.load":
                    assert [ast.unparse(word) for word in node.keywords if word.arg == "weights_only"] == [
                        "weights_only=True"
                    ]
                    continue
                assert called not in {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load"}, path


def test_files_are_short():
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "jobs").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path

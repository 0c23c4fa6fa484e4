"""The arrows of docs/architecture.md: who may import whom, and which heavy packages stand where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bert2bert"

# room -> the rooms and modules (prefixes) that it may import beside itself; `commands` may import all
ALLOWED = {
    "errors": (),
    "files": ("errors",),
    "terminal": ("errors",),
    "ranks": ("files", "errors"),
    "checkpoints": ("ranks", "files", "errors"),
    "algebra": ("errors",),
    "tables": ("algebra", "errors"),
    "operators": ("tables", "algebra", "errors"),
    "growth": ("operators", "tables", "algebra", "checkpoints", "files", "errors"),
    "growths": ("growth", "operators", "errors"),
    "api": ("commands", "growth", "measure", "checkpoints", "errors"),
    "__init__": ("api",),
    "measure": ("growth", "tables", "algebra", "checkpoints", "files", "data", "model", "errors"),
    "model": ("tables", "errors"),
    "recipe": ("data.objective", "model", "tables", "errors"),
    "data": ("model.batch", "files.sniff", "terminal", "errors"),
    "train": ("recipe", "data", "model", "tables", "checkpoints", "ranks", "files", "errors"),
    "report": ("errors",),
}
ROOMS = ALLOWED.keys() | {"commands", "__main__"}
ONLY_IN = {
    "deepspeed": ("train/engine.py", "train/sharded.py"),
    "mpi4py": ("ranks/comm.py",),
    "datasets": ("data/records.py",),
    "transformers": (
        "measure/transformers_models.py",
        "growth/live.py",
        "api.py",
        "data/tokenizer_files.py",
        "model/settings.py",
        "model/rotary.py",
        "model/modules.py",
        "model/hosted.py",
    ),
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = node.module == "bert2bert"  # from bert2bert import axes
            found |= {f"bert2bert.{alias.name}" for alias in node.names} if inside else {node.module}
    return found


def modules() -> list[tuple[str, Path]]:
    return [(p.relative_to(PACKAGE).as_posix(), p) for p in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("name,path", modules(), ids=[name for name, _ in modules()])
def test_arrows(name: str, path: Path) -> None:
    part = name.removesuffix(".py").split("/")[0]
    assert part in ROOMS, f"{name} stands in no known room"
    used = imports(path)
    for module in used:
        top, _, rest = module.partition(".")
        if top in ONLY_IN:
            assert name in ONLY_IN[top], f"{name} imports {module}"
        if top == "bert2bert" and part in ALLOWED:
            allowed = (part, *ALLOWED[part], "__version__")
            assert any(rest == a or rest.startswith(a + ".") for a in allowed), f"{name} imports {module}"


def used_by(path: Path) -> set[str]:
    """The project's own modules that a file imports, as `modules` names them without their suffix."""
    names = {name.removesuffix(".py").replace("/", "."): name for name, _ in modules()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bert2bert"):
            base = (node.module or "").removeprefix("bert2bert").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found |= {
                    names.get(inner) or names.get(f"{inner}.__init__") or names.get(base) or f"{base}/__init__.py"
                }
    return found


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """What reaches itself along the arrows."""
    reach = {a: set(b) for a, b in arrows.items()}
    while any(len(there) < len(there.union(*(reach.get(b, set()) for b in there))) for there in reach.values()):
        reach = {a: there.union(*(reach.get(b, set()) for b in there)) for a, there in reach.items()}
    return {a for a, there in reach.items() if a in there}


def test_no_import_goes_in_a_circle() -> None:
    """Not among modules, not among rooms; imports inside functions and for type checkers count."""
    between = {name: used_by(path) - {name} for name, path in modules()}
    assert not circles(between)
    rooms: dict[str, set[str]] = {}
    for name, used in between.items():
        room = name.split("/")[0]
        rooms.setdefault(room, set()).update(other.split("/")[0].replace("bert2bert", "") for other in used)
    assert not circles({room: used - {room, "__init__.py"} for room, used in rooms.items()})


LATE = ("torch", "transformers", "tokenizers", "datasets", "deepspeed", "safetensors", "mpi4py", "tqdm")


@pytest.mark.parametrize("name,path", modules(), ids=[name for name, _ in modules()])
def test_imports_inside_functions_have_a_reason(name: str, path: Path) -> None:
    """Commands delay imports; elsewhere a function imports a heavy package, or a comment says why it imports."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.Import | ast.ImportFrom) and not name.startswith("commands/"):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            line = lines[node.lineno - 1]
            assert "#" in line or (module or "").split(".")[0] in LATE, f"{name}:{node.lineno} {line.strip()}"


@pytest.mark.parametrize(
    "module",
    [
        "bert2bert",
        "bert2bert.growths",
        "bert2bert.commands.cli",
        "bert2bert.recipe.recipe",
        "bert2bert.growth.plan",
        "bert2bert.checkpoints.groups",
    ],
)
def test_light_modules_import_no_torch(module: str) -> None:
    heavy = ("torch", "deepspeed", "transformers", "datasets", "matplotlib")
    code = f"import sys, {module}; sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_shards_and_algebra_name_the_states_alike() -> None:
    from bert2bert.algebra import states
    from bert2bert.checkpoints import source

    assert tuple(states.STATES) == source.STATES


def test_functions_and_modules_stay_short() -> None:
    """60 lines a function; 300 a module, or its docstring says why it is longer. The algebra and a table are small."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in modules()}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    longer = [name for name, text in texts.items() if lines[name] > 300 and "Longer than other modules" not in text]
    assert not longer
    for name, text in texts.items():
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        assert not [f"{name}: {f.name}" for f in functions if (f.end_lineno or 0) - f.lineno >= 60]
    assert sum(lines[f"algebra/{m}.py"] for m in ("axes", "maps", "plan", "states", "realise")) <= 700
    assert lines["tables/bert.py"] <= 80

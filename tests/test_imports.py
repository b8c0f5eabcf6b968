"""The package is one pipe: a module imports from those before it, never from those after it."""

from __future__ import annotations

import ast
from pathlib import Path

import diffusion2gan

# From first to last. A package's modules may import each other; a module named here is apart from its package.
LAYERS = (
    ("errors",),
    ("config", "device", "embedded", "embedded.emoji", "embedded.weights", "ema", "files", "fit", "images", "interrupt", "lora", "losses",
     "precision", "report", "run_log", "schedule", "worker"),
    ("teachers",),
    ("pairs",),
    ("generator",),
    ("perceptual",),
    ("discriminator",),
    ("training",),
    ("pipeline", "single_file", "export"),
    ("recipe",),
    ("evaluation",),
    ("benchmark",),
    ("evaluation.commands", "plan", "run", "run_report"),
    ("embedded.autoencoder", "embedded.build", "embedded.card", "embedded.perceptual", "embedded.text_to_image", "embedded.triplets"),
    ("demo",),
    ("cli",),
    ("__main__",),
)  # fmt: skip
PACKAGE = Path(diffusion2gan.__file__).parent
PLACES = {name: number for number, names in enumerate(LAYERS) for name in names}


def _place(module: str) -> int:
    name = module
    while name not in PLACES:
        assert "." in name, f"{module} has no place in LAYERS"
        name = name.rpartition(".")[0]
    return PLACES[name]


def _is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _imports(tree: ast.Module) -> set[str]:
    """Modules of the package that are imported with a file, in whatever form; those inside functions come later."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if _is_module(whole.removeprefix("diffusion2gan.")) else str(node.module))
    return {name.removeprefix("diffusion2gan.") for name in found if name.startswith("diffusion2gan.")}


def test_imports_go_one_way() -> None:
    wrong, seen = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__":
            continue
        for imported in _imports(ast.parse(path.read_text())):
            seen += 1
            if _place(imported) > _place(module):
                wrong.append(f"{module} imports {imported}")
    assert not wrong, wrong
    assert seen > 300


def test_nothing_after_the_teachers_names_a_family() -> None:
    """But for what is about the embedded teacher, and `plan`, which counts without loading."""
    allowed = {"plan", "benchmark", "demo", "embedded.card"}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        families = {
            i for i in _imports(ast.parse(path.read_text())) if i in {f"teachers.{n}" for n in ("stable_diffusion", "sdxl", "pixel")}
        }
        if families and not module.startswith("teachers.") and module not in allowed:
            wrong.append((module, families))
    assert not wrong, wrong

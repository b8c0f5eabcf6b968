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


def _imports(tree: ast.Module) -> set[str]:
    """Modules of the package that are imported at the top of a file."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusion2gan."):
            found.add(str(node.module).removeprefix("diffusion2gan."))
        assert not (isinstance(node, ast.ImportFrom) and node.level), "imports are absolute"
    return found


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

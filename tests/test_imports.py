"""The package is one pipe: a module imports from those before it, never from those after it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
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


def _modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def _others(tree: ast.Module) -> set[str]:
    """Packages other than ours that are imported with a file; what is inside functions is there only for those who use it."""
    outside = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    found: set[str] = set()
    for node in outside:
        if id(node) not in inside:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            found |= {name.partition(".")[0] for name in names}
    return found - {"diffusion2gan"}


def test_what_is_imported_is_a_dependency() -> None:
    """torchvision, scipy and the scoring networks may be there by chance: here they are, with a user's plain install they are not."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", d, maxsplit=1)[0] for d in project["dependencies"]}
    known = {"pillow": "PIL", "pyyaml": "yaml"}
    allowed = {known.get(n, n.replace("-", "_")) for n in names} | set(sys.stdlib_module_names)
    wrong = {module: missing for module, tree in _modules().items() if (missing := _others(tree) - allowed)}
    assert not wrong, wrong
    assert "torchvision" not in allowed


def test_what_scores_is_in_no_loss() -> None:
    """The networks that score are used in no loss, and those of losses do not score."""
    scoring = ("scoring", "extractors", "metrics", "protocols", "evaluate", "emoji10k")
    modules = _modules()
    for name in scoring:
        of_losses = {
            i for i in _imports(modules[f"evaluation.{name}"]) if i.partition(".")[0] in ("perceptual", "training", "discriminator")
        }
        assert not of_losses, (name, of_losses)


def test_nothing_is_compiled_at_import_and_no_dead_id_is_named() -> None:
    sources = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".yaml")]
    assert len(sources) > 100
    for path in sources:
        text = path.read_text()
        # The released metric builds CUDA code at first use; runwayml's repositories are gone.
        assert "cpp_extension" not in text, path
        assert "runwayml/" not in text, path


_LOSS_ALONE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ImportError("not installed: " + name)

sys.meta_path.insert(0, Refuse())
import torch
from diffusion2gan import ELatentLPIPS
from diffusion2gan.embedded.weights import embedded_folder

loss = ELatentLPIPS.from_pretrained(embedded_folder("latent_vgg"))
x = torch.randn(2, 4, 8, 8, requires_grad=True)
loss(x, torch.randn(2, 4, 8, 8)).mean().backward()
assert x.grad.abs().sum() > 0
"""


def test_the_loss_needs_five_packages() -> None:
    """What docs/e_latent_lpips.md says to install for it alone; none of the package's other dependencies."""
    needed = {"torch", "numpy", "safetensors", "tqdm"}  # and huggingface_hub, for what comes from there
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = {re.split("[>=<]", d)[0] for d in project["dependencies"]}
    refused = {"PIL" if d == "pillow" else "yaml" if d == "pyyaml" else d for d in declared - needed} | {"huggingface_hub"}
    assert {"diffusers", "transformers", "accelerate", "pydantic", "PIL"} <= refused
    subprocess.run([sys.executable, "-c", _LOSS_ALONE.format(refused=refused)], check=True)

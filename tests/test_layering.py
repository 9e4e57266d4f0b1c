"""The floors: a file imports from lower floors or from its own folder, and heavy libraries stay where they belong.

Every statement here is read from the source, imports within functions included; nothing of jaxrl is run but for the
last test, which asks a fresh Python what an import drags in.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up; a folder stands for all in it that has no line of its own. A new file is given its floor here.
FLOORS = [
    {"user_code", "host_memory", "offload", "preemption", "cluster", "wire", "link", "launching"},
    {"config", "batch", "packing", "tasks", "progress", "algorithms", "rewards"},
    {"models", "parallel", "topology", "distributed", "sources", "data", "gpu_memory"},
    {"weights", "rollout", "optimizer", "compression", "checkpoint", "metrics", "loggers", "run_folder"},
    {"update", "prepare", "weights.sync"},
    {"rollout.vllm_engine", "rollout.vllm_publication", "rollout.vllm_transfer"},
    {"roles", "reward_model", "collector", "ahead", "doctor", "learner"},
    {"plan"},
    {"trainer"},
]

# Who may import a library, and where: in the whole file, or only within functions (so that it is optional).
# `parallel` says what the axis words on weights mean, and Linen wants to be told through its own context manager.
LIBRARIES = {
    "flax": {"models": "file", "parallel": "file"},
    "optax": {"optimizer": "file"},
    "orbax": {"checkpoint": "file", "weights.orbax_folder": "function"},
    # Files from before torch 1.6, which only torch reads, and the comparison with transformers where it is installed.
    "torch": {
        "weights.torch_bin": "function",
        "weights.verify": "function",
        "weights.live": "function",
        "scripts.benchmarks": "function",
        "rollout.vllm_adapter": "function",
    },
    "wandb": {"loggers": "function"},
    "gguf": {"weights.gguf": "function"},
    "vllm": {"rollout.vllm_adapter": "function"},
    "trl": {},
    "peft": {"weights.live": "function"},  # of whoever hands over a PeftModel
    "bitsandbytes": {},
}

# Where programs are compiled. All of training is in `update`; the others begin a run, or are the engine's. `parallel` has
# the class of those in which axis words mean a mesh.
COMPILES = {"update", "prepare", "roles", "rollout", "parallel"}

# What a launcher, a sidecar or a dataset script imports; JAX would take seconds and the accelerator.
WITHOUT_JAX = [
    "cluster", "wire", "link", "launching", "config", "batch", "packing", "tasks", "progress", "user_code", "rewards",
    "sources", "data", "rollout.engine", "rollout.cuda", "rollout.protocol", "rollout.vllm_adapter", "rollout.vllm_server",
    "rollout.vllm_process", "models.config", "weights.folder", "weights.hf_names", "weights.safetensors_writer", "weights.gguf",
]  # fmt: skip


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


class Import(NamedTuple):
    module: str  # "jaxrl.weights.load", or a library's name with its submodules
    in_function: bool
    only_for_types: bool


def name_of(path: Path) -> str:
    """jaxrl/weights/load.py -> "jaxrl.weights.load"; a package is its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((ROOT / "jaxrl").rglob("*.py"))}
SCRIPTS = {name_of(path): path for path in sorted((ROOT / "scripts").rglob("*.py"))}


@cache
def imports_of(name: str, path: Path) -> list[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, in_function, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*up, *([node.module] if node.module else [])])
            for (
                alias
            ) in node.names:  # `from .models import decoder` names a module, `from .batch import Prompt` does not
                inner = f"{module}.{alias.name}"
                yield Import(inner if inner in FILES else module, in_function, for_types)
        else:
            in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for child in ast.iter_child_nodes(node):
                yield from walk(child, in_function, for_types)

    return list(walk(tree_of(path), False, False))


def within(name: str, part: str) -> bool:
    """Whether a module is the one, or lies in the folder, that a line of the tables names (that of a script in full)."""
    return name in (part, f"jaxrl.{part}") or name.startswith((f"jaxrl.{part}.", f"{part}."))


def floor_of(name: str) -> int:
    """The floor of the longest line of the table that holds this module."""
    found = [(len(part), floor) for floor, parts in enumerate(FLOORS) for part in parts if within(name, part)]
    assert found, f"{name} has no floor: give it one in FLOORS of {Path(__file__).name}"
    return max(found)[1]


def folder_of(name: str) -> Path:
    return FILES[name].parent


@pytest.mark.parametrize("name", [name for name in FILES if name != "jaxrl"])
def test_a_file_imports_only_from_lower_floors_or_from_its_own_folder(name):
    own = floor_of(name)
    for imported in imports_of(name, FILES[name]):
        if not imported.module.startswith("jaxrl"):
            continue
        assert imported.module in FILES, f"{name} imports {imported.module}, which does not exist"
        other = floor_of(imported.module)
        beside = other == own and folder_of(name) == folder_of(imported.module)
        assert other < own or beside, f"{name} (floor {own}) imports {imported.module} (floor {other})"


def test_no_two_files_need_each_other():
    graph = {name: {i.module for i in imports_of(name, path) if i.module in FILES} for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_nothing_imports_a_script_and_scripts_do_not_import_each_other():
    for name, path in {**FILES, **SCRIPTS}.items():
        for imported in imports_of(name, path):
            assert imported.module.split(".")[0] not in ("scripts", "tests"), f"{name} imports {imported.module}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_heavy_library_is_imported_only_where_it_belongs(library):
    for name, path in {**FILES, **SCRIPTS}.items():
        for imported in imports_of(name, path):
            if imported.module.split(".")[0] != library or imported.only_for_types:
                continue
            allowed = [where for part, where in LIBRARIES[library].items() if within(name, part)]
            assert allowed, f"{name} imports {library}"
            assert "file" in allowed or imported.in_function, f"{name} imports {library} for everyone who imports it"


def test_programs_are_compiled_in_few_places():
    for name, path in {**FILES, **SCRIPTS}.items():
        uses = [
            n
            for n in ast.walk(tree_of(path))
            if isinstance(n, ast.Attribute) and ast.unparse(n) in ("jax.jit", "jax.pmap")
        ]
        imported = any(i.module in ("jax.jit", "jax.pmap") for i in imports_of(name, path))
        if uses or imported:
            assert any(within(name, part) for part in COMPILES), f"{name} line {uses[0].lineno} compiles a program"


def test_training_takes_its_gradients_in_the_update_alone():
    for name, path in FILES.items():
        names = {ast.unparse(n) for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute)}
        if names & {"jax.grad", "jax.value_and_grad", "jax.vjp"}:
            # The backward pass of `models.routed` computes a block again, and that block's.
            assert within(name, "update") or name == "jaxrl.models.routed", f"{name} takes a gradient"


def test_config_data_and_rewards_start_no_jax():
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module('jaxrl.' + name)\n"
        "    heavy = {'jax', 'flax', 'torch', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'jaxrl.{name} imports {heavy}'\n"
    )
    run = subprocess.run([sys.executable, "-c", code, *WITHOUT_JAX], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

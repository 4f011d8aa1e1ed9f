"""The house rules that a syntax tree can show: who imports whom, no cycles, no patches, nothing hidden.

Every rule is a function from one module's name and source to the offences in it. Each has a negative control below: a
small offending source that it must catch, beside one that it must let pass.
"""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# docs/design.md, "Who may import whom". A unit is a module or a package directly below msamp_like.
_CORE = ["formats", "host_copy", "kernels", "policy", "tensor", "scaling", "nn"]
_ENGINE = [*_CORE, "optim", "comm", "checkpoint", "amp", "telemetry"]
MAY_IMPORT: dict[str, set[str]] = {
    "formats": set(),
    "host_copy": set(),
    "kernels": {"formats"},
    "recipes": {"formats"},
    "policy": {"formats", "recipes"},
    "tensor": {"formats", "kernels"},
    "scaling": {"formats", "host_copy", "kernels", "policy", "tensor"},
    "nn": set(_CORE),
    "optim": set(_CORE),
    "comm": set(_CORE),
    "checkpoint": set(_CORE),
    "amp": {*_CORE, "optim", "comm", "checkpoint", "telemetry"},
    "telemetry": set(_CORE),
    "integrations": set(_ENGINE),
    "models": set(),
}
MAY_IMPORT_ANYTHING = {"", "launchers", "cli", "doctor"}  # "" is msamp_like/__init__.py, the public names
KNOWS_DISTRIBUTED = {"amp", "comm", "integrations", "launchers", "cli", "doctor"}
HOSTS = {"accelerate", "apex", "deepspeed", "lightning", "megatron", "transformer_engine", "transformers", "trl"}
MAX_LINES = 400
MAX_LINES_OF_A_MODEL = 700


def _sources() -> dict[str, str]:
    """Source by module name, the names as setup.cfg maps them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    found = {}
    for package, folder in folders.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text()
    return found


SOURCES = _sources()
PACKAGES = {name.rpartition(".")[0] for name in SOURCES}


def unit(module: str) -> str:
    """``msamp_like.kernels.cpu`` -> ``kernels``; the root package -> the empty string."""
    return (module.split(".") + [""])[1]


UNITS = {unit(name) for name in SOURCES if name != "msamp_like"} | set(MAY_IMPORT)


def imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything imported, at any depth; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if module in PACKAGES else module.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, str(name.value)) for name in node.args if isinstance(name, ast.Constant))


def aliases(module: str, source: str, wanted: set[str]) -> set[str]:
    """Local names that an import binds to a wanted top-level package or to something inside it."""
    bound = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in wanted:
                    bound.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in wanted:
            bound.update(alias.asname or alias.name for alias in node.names)
    return bound


# --- the rules ------------------------------------------------------------------------------------------------------


def imports_within_the_table(module: str, source: str) -> Iterator[str]:
    """A unit imports what its row allows; a unit without a row is an addition to the table, to be made on purpose."""
    own = unit(module)
    if own in MAY_IMPORT_ANYTHING:
        return
    if own not in MAY_IMPORT:
        yield f"{module}: '{own}' has no row in the table of imports; add one here and in docs/design.md"
        return
    for line, name in imports(module, source):
        target = unit(name)
        if name.split(".")[0] != "msamp_like" or target == own:
            continue
        if target in UNITS and target not in MAY_IMPORT[own]:
            yield f"{module}:{line}: {own} may not import {target}"
        if target not in UNITS and name != "msamp_like":  # of `from msamp_like import amp`, the second name tells
            yield f"{module}:{line}: imports {name}, a public name; import the module that defines it"


def distributed_at_home(module: str, source: str) -> Iterator[str]:
    """``torch.distributed`` is used where the table says; everyone else is handed a reduction."""
    if unit(module) in KNOWS_DISTRIBUTED:
        return
    for line, name in imports(module, source):
        if name.startswith("torch.distributed"):
            yield f"{module}:{line}: imports torch.distributed; only {', '.join(sorted(KNOWS_DISTRIBUTED))} may"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield f"{module}:{node.lineno}: uses torch.distributed; only {', '.join(sorted(KNOWS_DISTRIBUTED))} may"


def hosts_in_integrations(module: str, source: str) -> Iterator[str]:
    """A host library is imported by its integration (or a script), never by the engine."""
    if unit(module) in {"integrations", "launchers"}:
        return
    for line, name in imports(module, source):
        if name.split(".")[0] in HOSTS:
            yield f"{module}:{line}: imports {name}; hosts belong to msamp_like/integrations"


def models_in_plain_torch(module: str, source: str) -> Iterator[str]:
    """A model file can be lifted out of the project: torch and the standard library."""
    if unit(module) != "models":
        return
    for line, name in imports(module, source):
        top = name.split(".")[0]
        if name.startswith("msamp_like.models") or name == "msamp_like":
            continue
        if top == "msamp_like" or (top in {"numpy", "safetensors", *HOSTS}):
            yield f"{module}:{line}: a model imports {name}; models are plain torch"


def no_patches(module: str, source: str) -> Iterator[str]:
    """Nothing assigns to an attribute of torch; only an integration may substitute in a host, inside one call."""
    foreign = {"torch"} if unit(module) == "integrations" else {"torch", *HOSTS}
    names = aliases(module, source, foreign)
    for node in ast.walk(ast.parse(source)):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"setattr", "delattr"}:
            targets = [ast.Attribute(node.args[0], "attribute")] if node.args else []
        flat = [leaf for t in targets for leaf in (t.elts if isinstance(t, ast.Tuple | ast.List) else [t])]
        for target in flat:
            if isinstance(target, ast.Attribute) and _root(target) in names:
                yield f"{module}:{node.lineno}: assigns to {ast.unparse(target)}, which is not ours"


def _root(node: ast.expr) -> str:
    """``torch`` of ``torch.nn.Linear.forward``; empty when the chain starts at a call or a subscript."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def no_environment(module: str, source: str) -> Iterator[str]:
    """The library takes arguments; only launchers read what torchrun sets."""
    if unit(module) == "launchers":
        return
    for line, name in imports(module, source):
        if name in {"os.environ", "os.getenv", "os.putenv"}:
            yield f"{module}:{line}: imports {name}; pass an argument instead"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.putenv"}:
            yield f"{module}:{node.lineno}: uses {ast.unparse(node)}; pass an argument instead"


def no_assert(module: str, source: str) -> Iterator[str]:
    """``python -O`` deletes an assert, and its text rarely names a remedy."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            yield f"{module}:{node.lineno}: assert; raise ValueError, TypeError or RuntimeError with the remedy"


def no_blanket_except(module: str, source: str) -> Iterator[str]:
    """Catch what is expected: a blanket handler turns every later bug into a silent fallback."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or ast.unparse(kind) in {"Exception", "BaseException"} for kind in kinds):
                yield f"{module}:{node.lineno}: catches everything; name the exceptions that are expected"


def of_readable_size(module: str, source: str) -> Iterator[str]:
    """Past this length a file holds two ideas; find the noun to split by."""
    limit = MAX_LINES_OF_A_MODEL if unit(module) == "models" else MAX_LINES
    count = source.count("\n")
    if count > limit:
        yield f"{module}: {count} lines, more than {limit}"


def cycles(sources: dict[str, str]) -> list[list[str]]:
    """Groups of modules that import each other, lazy imports counted (Tarjan, "Depth-first search", 1972)."""
    edges = {
        module: {target for _, target in imports(module, source) if target in sources and target != module}
        for module, source in sources.items()
    }
    for module, targets in edges.items():  # `from package import module` depends on the module, not on its siblings
        named = {name for _, name in imports(module, sources[module])}
        targets -= {
            package for package in targets if package in PACKAGES and not _takes_a_name(package, named, sources)
        }
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(edges[module]):
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sources:
        if module not in index:
            visit(module)
    return found


def _takes_a_name(package: str, named: set[str], sources: dict[str, str]) -> bool:
    """Whether something of ``package`` itself is imported, and not only modules inside it."""
    inside = {name for name in named if name.startswith(package + ".") and name.count(".") == package.count(".") + 1}
    return not inside or any(name not in sources for name in inside)


# --- the tree -------------------------------------------------------------------------------------------------------

RULES = [
    imports_within_the_table,
    distributed_at_home,
    hosts_in_integrations,
    models_in_plain_torch,
    no_patches,
    no_environment,
    no_assert,
    no_blanket_except,
    of_readable_size,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    offences = [text for module, source in SOURCES.items() for text in rule(module, source)]
    assert not offences, "\n".join([rule.__doc__, *offences])


def test_no_cycles():
    assert cycles(SOURCES) == []


# --- negative controls: every rule catches what it is for, and lets its neighbour pass --------------------------------

CONTROLS = [
    (imports_within_the_table, "msamp_like.formats", "from msamp_like.tensor import ScalingTensor", "import math"),
    (imports_within_the_table, "msamp_like.optim.adam", "from msamp_like import comm", "from msamp_like import nn"),
    (imports_within_the_table, "msamp_like.comm.zero", "def f():\n import msamp_like.optim", "import torch"),
    (imports_within_the_table, "msamp_like.models.gpt", "from msamp_like import amp", "from torch import nn"),
    (imports_within_the_table, "msamp_like.nn.linear", "from ..amp import initialize", "from ..tensor import T"),
    (imports_within_the_table, "msamp_like.amp", "from msamp_like import __version__", "from msamp_like import comm"),
    (imports_within_the_table, "msamp_like.novelty", "import math", None),
    (distributed_at_home, "msamp_like.optim.base", "import torch.distributed as dist", "import torch.nn as nn"),
    (distributed_at_home, "msamp_like.nn.linear", "import torch\nx = torch.distributed.get_rank()", "import torch"),
    (distributed_at_home, "msamp_like.models.gpt", "from torch import distributed", "from torch import nn"),
    (hosts_in_integrations, "msamp_like.amp", "def f():\n    import deepspeed", "import torch"),
    (models_in_plain_torch, "msamp_like.models.gpt", "from msamp_like.formats import E4M3", "import dataclasses"),
    (models_in_plain_torch, "msamp_like.models.gpt", "import numpy as np", "import math"),
    (no_patches, "msamp_like.amp", "import torch\ntorch.zeros_like = f", "import torch\nx = torch.zeros_like(y)"),
    (no_patches, "msamp_like.amp", "import torch.nn.functional as F\nF.linear = f", "self.linear = f"),
    (no_patches, "msamp_like.amp", "from torch import Tensor\nTensor.cast = f", "x.cast = f"),
    (no_patches, "msamp_like.amp", "import torch\nsetattr(torch.Tensor, 'cast', f)", "setattr(module, 'weight', p)"),
    (no_patches, "msamp_like.integrations.fsdp2", "import torch\ntorch.a, x = 1, 2", "import apex\napex.f = g"),
    (no_patches, "msamp_like.nn.linear", "import apex\napex.f = g", "import torch\nf(torch.float32)"),
    (no_environment, "msamp_like.scaling", "import os\nos.environ['X']", "import os\nos.cpu_count()"),
    (no_environment, "msamp_like.cli", "from os import getenv", "from os import path"),
    (no_assert, "msamp_like.tensor", "assert x", "if not x:\n    raise ValueError(x)"),
    (no_blanket_except, "msamp_like.tensor", "try: f()\nexcept Exception: pass", "try: f()\nexcept OSError: pass"),
    (no_blanket_except, "msamp_like.tensor", "try: f()\nexcept: pass", "try: f()\nfinally: g()"),
    (no_blanket_except, "msamp_like.tensor", "try: f()\nexcept (OSError, Exception): pass", None),
    (of_readable_size, "msamp_like.tensor", "x = 1\n" * 401, "x = 1\n" * 400),
    (of_readable_size, "msamp_like.models.gpt", "x = 1\n" * 701, "x = 1\n" * 700),
]


@pytest.mark.parametrize(("rule", "module", "bad", "good"), CONTROLS)
def test_rule_catches_an_offence(rule, module, bad, good):
    assert list(rule(module, bad))
    assert good is None or not list(rule(module, good))


def test_launchers_may_read_the_environment():
    assert not list(no_environment("msamp_like.launchers.pretrain", "import os\nos.environ['RANK']"))


def test_a_lazy_cycle_is_found():
    lazy = {
        "msamp_like.tensor": "from msamp_like import scaling",
        "msamp_like.scaling": "def f():\n    from msamp_like.tensor import ScalingTensor",
        "msamp_like.formats": "import msamp_like.formats",
    }
    assert cycles(lazy) == [["msamp_like.scaling", "msamp_like.tensor"]]
    assert cycles({**lazy, "msamp_like.scaling": ""}) == []

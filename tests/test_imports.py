"""The house's walls: imports go one way and are declared, every file says what it is for."""

import ast
import importlib
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("mimo_jax", "pallas_kernels")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FOREIGN = {"torch", "transformers", "tensorflow"}
IMPORT_NAMES = {"orbax-checkpoint": "orbax"}
PUBLIC_NAMES = 25

LAYERS = (
    ("pallas_kernels", "mimo_jax.errors"),
    ("mimo_jax.fields", "mimo_jax.json_files", "mimo_jax.progress", "mimo_jax.compilation"),
    ("mimo_jax.transformers_config",),
    ("mimo_jax.config", "mimo_jax.quant", "mimo_jax.plots"),
    ("mimo_jax.drafter_config",),
    ("mimo_jax.presets", "mimo_jax.sharding", "mimo_jax.text"),
    ("mimo_jax.cache",),
    ("mimo_jax.model",),
    ("mimo_jax.decode", "mimo_jax.checkpoint"),
    ("mimo_jax.planning",),
    ("mimo_jax.engine", "mimo_jax.train"),
    ("mimo_jax.loading",),
    ("mimo_jax",),
    ("mimo_jax.bench",),
    ("mimo_jax.commands", "mimo_jax.server"),
    ("mimo_jax.cli",),
    ("mimo_jax.__main__",),
)
"""From the ground up: a unit imports from itself and lower rows, never from its row's others."""

LEVEL = {unit: level for level, row in enumerate(LAYERS) for unit in row}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def unit_of(module: str) -> str:
    """The unit that a module belongs to: pallas_kernels, or the top module of mimo_jax it is in."""
    parts = module.split(".")
    return parts[0] if parts[0] == "pallas_kernels" else ".".join(parts[:2])


def imported(source: str) -> set[str]:
    """Every module that a source imports, at the top, inside functions, or for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & MODULES
            found |= submodules
            if names - submodules:
                found.add(node.module)
    return found


def upward_imports(module: str, source: str) -> list[str]:
    """What a module imports and may not, in words."""
    unit = unit_of(module)
    if unit not in LEVEL:
        return [f"{unit} is in no row of LAYERS: add it where it belongs"]
    targets = {unit_of(name) for name in imported(source) if name.split(".")[0] in PACKAGES}
    targets.discard(unit)
    return [
        f"{module} imports {target}, which is not below {unit}"
        for target in sorted(targets)
        if LEVEL.get(target, len(LAYERS)) >= LEVEL[unit]
    ]


def declared() -> set[str]:
    """Import names of what pyproject.toml declares, extras included, and jaxlib, jax's own half."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.match(r"[\w-]+", line)[0] for group in groups for line in group}
    return {"jaxlib"} | {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    assert not upward_imports(module_name(path), path.read_text())


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_declared_packages(path):
    tops = {name.split(".")[0] for name in imported(path.read_text())}
    tops -= sys.stdlib_module_names | set(PACKAGES)
    assert not tops & FOREIGN, "an oracle's package, imported at run time"
    assert not tops - declared(), "imported, but not in pyproject.toml"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_imports(module):
    if module.endswith("__main__"):
        pytest.skip("runs the command")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in declared():
            raise
        pytest.skip(f"{error.name} is in an extra that is not installed")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.expert_ffn.api", "from mimo_jax.errors import MimoError"),
        ("mimo_jax.model.moe", "def f():\n    import mimo_jax.decode.loop"),
        ("mimo_jax.quant.mxfp4", "from mimo_jax import model"),
        ("mimo_jax.train.data", "from mimo_jax.engine import Engine"),
        ("mimo_jax.engine", "from mimo_jax import load"),
        ("mimo_jax.nowhere", ""),
    ],
)
def test_an_upward_import_is_seen(module, source):
    assert upward_imports(module, source)


def test_every_file_opens_with_its_purpose():
    silent = [
        str(path.relative_to(ROOT))
        for path in [*FILES, *(ROOT / "tests").rglob("*.py")]
        if not path.read_text().startswith(('"""', 'r"""')) and path.stat().st_size
    ]
    assert not silent


def test_public_names():
    tree = ast.parse((ROOT / "mimo_jax/__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and "__all__" in {ast.unparse(t) for t in node.targets}:
            names = ast.literal_eval(node.value)
            assert len(names) <= PUBLIC_NAMES
            assert sorted(set(names)) == sorted(names), "a name twice"


def test_no_path_of_somebodys_machine():
    homes = "|".join(("home", "root", "Users", "work", "workspace"))
    private = re.compile(rf"""(?:^|[\s"'`=(:])/(?:{homes})/[\w.]""", re.MULTILINE)
    kinds = {".py", ".md", ".toml", ".ipynb", ".json", ".yml", ".yaml", ".sh", ""}
    folders = [p for p in ROOT.iterdir() if p.is_dir() and (p.name == ".ci" or p.name[0] != ".")]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    for path in files:
        if path.suffix in kinds and path.stat().st_size < 2**22:
            match = private.search(path.read_text(errors="ignore"))
            assert not match, f"{path.relative_to(ROOT)}: {match[0].strip()}..."

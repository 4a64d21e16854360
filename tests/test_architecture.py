"""Which room may import which, and other rules of the house, read from the sources. `docs/architecture.md` says why."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pomona"
MAX_LINES = 500


@dataclass(frozen=True)
class Rule:
    """What a room may import of this house, and what it must not reach, not even through others."""

    rooms: frozenset[str]
    never: frozenset[str]
    only: frozenset[str] | None = None  # third parties that it may import, where they are few


def _rule(rooms: str, never: str, only: str | None = None) -> Rule:
    return Rule(frozenset(rooms.split()), frozenset(never.split()), None if only is None else frozenset(only.split()))


RECORDS = {
    "adapters", "aggregation_settings", "errors", "privacy_settings", "settings", "manifest", "protocol", "payload",
    "mos_settings", "forget_settings", "ranks", "seeds", "strategies",
}  # fmt: skip
ROOMS = {
    "aggregation": _rule("records spine kernels", "flwr sqlalchemy ray peft opacus"),
    "client": _rule("records spine kernels privacy continual", "sqlalchemy alembic ray"),
    "continual": _rule("records spine kernels aggregation client", "flwr sqlalchemy alembic ray"),
    "coordinator": _rule("records spine kernels aggregation client continual privacy storage", ""),
    "privacy": _rule("records spine kernels", "flwr sqlalchemy ray"),
    "kernels": _rule("records spine", "flwr sqlalchemy ray peft", only="torch triton"),
    "storage": _rule("records spine", "torch flwr ray peft transformers"),
}
RULES = ROOMS | {
    "records": _rule("records", "flwr sqlalchemy ray peft", only="pydantic pydantic_core torch"),
    "spine": _rule("records spine kernels", "sqlalchemy alembic ray"),
    "cli": _rule("records spine client coordinator privacy storage", "", only="typer rich"),
}
MAY_START_CLIENTS = {"pomona.coordinator.demo", "pomona.coordinator.simulate"}
TRAINS_ITSELF = "pomona.coordinator.trusted"
NO_NOUNS = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@dataclass(frozen=True)
class Module:
    name: str
    path: Path

    @property
    def room(self) -> str:
        top = self.name.split(".")[1] if "." in self.name else ""
        top = "cli" if top == "__main__" else top
        return top if top in {*ROOMS, "cli"} else "records" if top in RECORDS else "spine"

    @property
    def tree(self) -> ast.Module:
        return _parse(self.path)


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _modules() -> Iterator[Module]:
    for folder, prefix in [(PACKAGE, ("pomona",)), *((ROOT / room, ("pomona", room)) for room in ROOMS)]:
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).with_suffix("").parts
            if folder == PACKAGE and inside[0] in ROOMS:
                continue  # a link, which a newer Python would follow
            yield Module(".".join((*prefix, *inside)).removesuffix(".__init__"), path)


MODULES = {module.name: module for module in _modules()}
every_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


@cache
def imports(module: Module) -> frozenset[str]:
    """Every module that is imported anywhere in a module, by its full name as far as it is one of ours."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(source), names=names, level=0):
                members = {f"{source}.{alias.name}" for alias in names} & MODULES.keys()
                found |= members or {source}
                if len(members) < len(names):
                    found.add(source)
    return frozenset(found)


def rooms(module: Module) -> set[str]:
    """The rooms that a module imports from."""
    return {MODULES[name].room for name in imports(module) & MODULES.keys()}


def third_parties(module: Module) -> set[str]:
    tops = {name.split(".")[0] for name in imports(module)}
    return tops - sys.stdlib_module_names - {"pomona"}


def reached(module: Module) -> dict[str, str]:
    """Every third party that a module reaches through our modules, and the module of ours that imports it."""
    found: dict[str, str] = {}
    seen, queue = {module.name}, [module]
    for current in queue:
        found |= {name: current.name for name in third_parties(current) if name not in found}
        for name in imports(current) & MODULES.keys() - seen:
            seen.add(name)
            queue.append(MODULES[name])
    return found


@every_module
def test_a_module_imports_only_rooms_that_its_room_may(module: Module) -> None:
    allowed = RULES[module.room].rooms | {module.room}
    ours = {name for name in imports(module) if name.split(".")[0] == "pomona"} - {"pomona"}
    assert ours <= MODULES.keys()
    assert {name for name in ours if MODULES[name].room not in allowed} == set()


@every_module
def test_a_module_reaches_no_third_party_that_its_room_must_not(module: Module) -> None:
    rule = RULES[module.room]
    assert {name: via for name, via in reached(module).items() if name in rule.never} == {}
    assert rule.only is None or third_parties(module) <= rule.only


def test_the_coordinator_starts_clients_in_two_modules_only() -> None:
    assert {
        module.name for module in MODULES.values() if module.room == "coordinator" and "client" in rooms(module)
    } - {TRAINS_ITSELF} <= MAY_START_CLIENTS
    ours = {name for name in imports(MODULES[TRAINS_ITSELF]) if name.startswith("pomona.client")}
    assert ours == {"pomona.client.train"}


def test_nothing_imports_the_command_line() -> None:
    assert {module.name for module in MODULES.values() if module.room != "cli" and "cli" in rooms(module)} == set()


def test_flower_and_peft_have_one_door_each_into_the_spine() -> None:
    doors = {
        (name, module.name) for module in MODULES.values() if module.room == "spine" for name in third_parties(module)
    }
    assert {pair for pair in doors if pair[0] in {"flwr", "peft"}} == {
        ("flwr", "pomona.messages"),
        ("peft", "pomona.lora_layers"),
    }


def test_the_house_is_linked_and_does_not_shadow_kernels() -> None:
    links = {path.name: path.readlink() for path in PACKAGE.iterdir() if path.is_symlink()}
    assert links == {room: Path("..", "..", room) for room in ROOMS}
    assert all((ROOT / room).is_dir() for room in ROOMS)
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's; see kernels/README.md"


def test_the_type_checkers_see_every_room() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    # pyright does not follow links, mypy does
    assert {"src/pomona", *(f"src/pomona/{room}" for room in ROOMS)} <= set(tools["pyright"]["include"])
    assert "src/pomona" in tools["mypy"]["files"]


def test_importing_the_package_imports_no_third_party() -> None:
    program = "import sys; before = set(sys.modules); import pomona; print(*set(sys.modules) - before, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "src", capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "pomona" in loaded
    assert {name for name in loaded - sys.stdlib_module_names if not name.startswith("_")} == {"pomona"}


def test_a_module_is_named_after_a_noun() -> None:
    assert {name for name in MODULES if NO_NOUNS & set(name.split("."))} == set()


@every_module
def test_a_module_is_short(module: Module) -> None:
    assert len(module.path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@every_module
def test_a_module_runs_nothing_that_it_reads(module: Module) -> None:
    assert list(_dangers(module)) == []


def _dangers(module: Module) -> Iterator[str]:
    yield from sorted(third_parties(module) & RUNS_WHAT_IT_READS)
    yield from sorted(imports(module) & RUNS_WHAT_IT_READS)
    for node in ast.walk(module.tree):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield f"line {node.lineno}: {name}()"
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield f"line {node.lineno}: torch.load"
            case ast.Attribute(value=ast.Name(id="os"), attr="system" | "popen" as name):
                yield f"line {node.lineno}: os.{name}"
            case ast.keyword(arg="shell" | "allow_pickle" as name, value=value) if not _is_false(value):
                yield f"line {node.lineno}: {name}="
            case ast.keyword(arg="trust_remote_code", value=value) if not _is_false(value):
                yield f"line {node.lineno}: trust_remote_code="


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False

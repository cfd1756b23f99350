from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import merge_kit
from merge_kit import errors
from merge_kit.methods import registry
from merge_kit.plan.values import Plan

ROOT = Path(merge_kit.__file__).parent.parent


def run(code: str) -> str:
    """Return what a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_else():
    heavy = "{'torch', 'numpy', 'yaml', 'pydantic', 'click', 'huggingface_hub', 'safetensors'}"
    loaded = (
        f"import sys, merge_kit; print({heavy} & set(sys.modules), 'merge_kit.api' in sys.modules)"
    )
    assert run(loaded) == "set() False"


def test_planning_by_the_library_loads_no_torch():
    code = "import sys, merge_kit as mk; mk.plan, mk.slerp, mk.load, mk.TaskVector, mk.method"
    assert run(f"{code}; print('torch' in sys.modules)") == "False"


def test_every_exported_name_is_there_and_listed():
    for name in merge_kit.__all__:
        assert getattr(merge_kit, name) is not None
        assert name in dir(merge_kit)


def test_every_error_of_the_package_is_exported():
    found = {
        n for n, v in vars(errors).items() if inspect.isclass(v) and v.__module__ == errors.__name__
    }
    assert found <= set(merge_kit.__all__)
    assert merge_kit.HubError is errors.HubError


def test_every_method_of_the_package_is_exported():
    own = {n for n in registry.names() if registry.find(n).__module__.startswith("merge_kit.")}
    missing = own - set(merge_kit.__all__)
    assert not missing, "add them to merge_kit/__init__.py: import for type checkers, and __all__"


def test_signatures_for_type_checkers_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "scripts/generate_functions.py", "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("first", ["pass", "import merge_kit.plan.build", "import merge_kit.api"])
def test_plan_is_a_function_whatever_was_imported_before(first):
    code = (
        f"{first}\nimport merge_kit as mk\nimport merge_kit.plan.cost as cost\n"
        "try:\n    mk.plan('nowhere.yaml')\n"
        "except mk.UsageError as error:\n    print(error.problem, cost.__name__)"
    )
    assert run(code) == "there is no such recipe merge_kit.plan.cost"


def test_the_plan_function_gives_a_plan(family):
    recipe = {
        "merge_method": "linear",
        "models": [{"model": family.path("code"), "parameters": {"weight": 1.0}}],
    }
    assert isinstance(merge_kit.plan(recipe, threads=1), Plan)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'slurp'"):
        merge_kit.slurp  # noqa: B018
    assert not hasattr(merge_kit, "__wrapped__")


def test_type_checkers_see_every_exported_name(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import merge_kit as mk\n"
        "folder = (mk.load('a') + 0.5 * mk.TaskVector('b', 'a')).save('c')\n"
        "difference: mk.TaskVector = mk.load('a') - mk.load('b')\n"
        "mk.linear(['a', 'b'], weight=[1.0, 2.0]).state_dict()\n"
        "print(mk.plan('a.yaml').seed, folder.name, mk.__version__)\n"
        "mk.linear(['a'], wieght=1.0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    (problem, *rest) = [line for line in done.stdout.splitlines() if "error" in line]
    assert 'Unexpected keyword argument "wieght"' in problem, done.stdout
    assert rest == ["Found 1 error in 1 file (checked 1 source file)"]

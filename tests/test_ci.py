"""The scripts that run the tests call what exists."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]


def test_the_newest_jax_leaves_out_only_what_exists():
    """A missing path would leave out nothing, or everything if it were the one to run."""
    import run

    named = re.findall(r"tests/[\w/*.]+", " ".join(run.CORE_ON_NEWEST))
    assert len(named) > 5
    for path in named:
        assert list(ROOT.glob(path)), path


def test_the_oldest_jax_runs_what_exists_on_the_floors():
    """The pins of the oldest environment are the floors that the library asks for."""
    import run

    named = [argument for argument in run.CORE_ON_OLDEST if argument.startswith("tests/")]
    assert len(named) > 5
    assert all((ROOT / path.partition("::")[0]).is_file() for path in named)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {
        r.partition("==")[0]: r.partition("==")[2]
        for r in project["optional-dependencies"]["oldest"]
    }
    floors = dict(r.split(">=") for r in project["dependencies"])
    for name in ("jax", "flax", "optax", "orbax-checkpoint"):
        assert pins[name] == floors[name]


class Item:
    def __init__(self, nodeid):
        self.nodeid = nodeid


def test_cases_of_each_test(request):
    """`--cases` keeps the first, the last and some between, and tests without parameters."""
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    names = ["a.py::one", *(f"a.py::many[{n}]" for n in range(7)), "a.py::Class::two[0]"]

    def kept(most):
        items, dropped = [Item(name) for name in names], []
        hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
        config = SimpleNamespace(option=SimpleNamespace(cases=most), hook=hook)
        conftest.pytest_collection_modifyitems(config, items)
        assert len(items) + len(dropped) == len(names)
        return [name for name in names if name in {item.nodeid for item in items}]

    assert kept(None) == names
    assert kept(1) == ["a.py::one", "a.py::many[0]", "a.py::Class::two[0]"]
    assert kept(2) == ["a.py::one", "a.py::many[0]", "a.py::many[6]", "a.py::Class::two[0]"]
    assert kept(3)[1:4] == ["a.py::many[0]", "a.py::many[3]", "a.py::many[6]"]
    assert kept(9) == names


def test_ci_calls_commands_that_exist():
    import run

    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    called = re.findall(r"python3? run\.py ([\w-]+)", text)
    assert (
        {"test", "test-long", "test-newest", "test-oldest", "example"}
        <= set(called)
        <= run.COMMANDS.keys()
    )


def test_the_workflow_calls_what_exists():
    """It cannot run here: a command or a path that is gone would be seen only after a push."""
    import yaml

    import run

    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert "concurrency" in workflow
    assert {"tests", "lint"} <= workflow["jobs"].keys()
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions), actions
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    called = [line.split()[2:] for line in lines if line.startswith("python run.py ")]
    assert {command for command, *_ in called} >= {"test", "test-long", "test-newest", "example"}
    for command, *arguments in called:
        assert command in run.COMMANDS
        assert all((ROOT / path).exists() for path in arguments if "/" in path), arguments
    extras = re.findall(r'-e "\.\[([\w,]+)\]"', text)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = {name for names in extras for name in names.split(",")}
    assert named <= settings["project"]["optional-dependencies"].keys()


def test_publishing_tries_what_it_uploads_and_only_then_may_ask_for_a_token():
    import yaml

    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    assert (jobs["try"]["needs"], jobs["publish"]["needs"]) == ("build", "try")
    assert {name for name, job in jobs.items() if "permissions" in job} == {"publish"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    classifiers = settings["project"]["classifiers"]
    pythons = [c.split()[-1] for c in classifiers if re.fullmatch(r".*Python :: 3\.\d+", c)]
    assert jobs["try"]["strategy"]["matrix"]["python"] == [pythons[0], pythons[-1]]
    assert settings["project"]["requires-python"] == f">={pythons[0]}"


def test_the_readme_lists_the_extras():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"Extras: ([^.]+)\.", text)
    assert set(re.findall(r"`(\w+)`", listed)) == set(settings["project"]["optional-dependencies"])

"""What a code host and pre-commit read is valid YAML of the form that they expect, and in step with the checkout."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
ELEMENTS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


class Strict(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which plain YAML keeps the last; `on` stays a string."""


def _mapping(loader: Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    assert len(keys) == len(set(keys)), f"a key occurs twice: {keys}"
    return loader.construct_mapping(node, deep=True)


Strict.add_constructor("tag:yaml.org,2002:map", _mapping)
# YAML 1.1 reads on, off, yes and no as truth values; hosts follow YAML 1.2, which knows true and false alone.
Strict.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Strict.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))


def load(path: Path) -> Any:
    """The content of a YAML file."""
    return yaml.load(path.read_text(encoding="utf-8"), Strict)


def test_the_loader_refuses_what_hosts_refuse(tmp_path: Path) -> None:
    file = tmp_path / "file.yml"
    file.write_text("on: 1\nno: true\n")
    assert load(file) == {"on": 1, "no": True}
    file.write_text("a: 1\na: 2\n")
    with pytest.raises(AssertionError, match="twice"):
        load(file)


def test_there_is_a_form_for_each_kind_of_issue() -> None:
    assert [path.stem for path in FORMS] == ["bug_report", "feature_request", "new_gpu"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form(path: Path) -> None:
    form = load(path)
    assert set(form) == {"name", "description", "labels", "body"}
    assert all(isinstance(form[key], str) and form[key] for key in ("name", "description"))
    identifiers = [element["id"] for element in form["body"]]
    assert len(identifiers) == len(set(identifiers))
    assert any(element.get("validations") == {"required": True} for element in form["body"])
    for element in form["body"]:
        assert set(element) <= {"type", "id", "attributes", "validations"}
        assert element["type"] in ELEMENTS
        assert isinstance(element["attributes"]["label"], str)
        assert re.fullmatch(r"[a-z-]+", element["id"])
        # A dropdown refuses options that are not strings, such as a bare yes under YAML 1.1.
        options = element["attributes"].get("options", ["none needed"])
        assert all(isinstance(option, str) for option in options)
        assert (element["type"] == "dropdown") == ("options" in element["attributes"])


def test_commands_in_forms_exist() -> None:
    """What a form asks people to run is in the documentation under the same name."""
    documents = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in FORMS)
    commands = set(re.findall(r"`((?:tinysr|python -m) [^`]+)`", text))
    assert len(commands) >= 4
    for command in commands:
        assert " ".join(command.split()[: 4 if command.startswith("python") else 2]) in documents, command


def test_pull_request_template_names_targets_that_exist() -> None:
    text = (GITHUB / "pull_request_template.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)`", text))
    assert {"test", "lint"} <= named <= set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


def test_workflow_runs_the_checks_and_nothing_else() -> None:
    workflow = load(GITHUB / "workflows" / "ci.yml")
    assert set(workflow["on"]) == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    assert list(workflow["jobs"]) == ["checks"]
    checkout, python, run = workflow["jobs"]["checks"]["steps"]
    assert checkout["uses"].startswith("actions/checkout@")
    assert python["uses"].startswith("actions/setup-python@")
    assert python["with"] == {"python-version": "3.11"}
    assert run == {"run": "bash .ci/run"}
    assert (ROOT / ".ci" / "run").is_file()


def test_hooks_use_the_pinned_tools() -> None:
    pins = set((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    (local,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    hooks = {hook["id"]: hook for hook in local["hooks"]}
    assert set(hooks) == {"ruff-format", "ruff-check", "mypy"}
    for hook in hooks.values():
        assert {"id", "name", "language", "entry"} <= set(hook)
        assert set(hook.get("additional_dependencies", [])) <= pins
    assert hooks["ruff-format"]["additional_dependencies"] == hooks["ruff-check"]["additional_dependencies"]
    assert hooks["mypy"]["language"] == "system"


def test_every_extra_is_pinned() -> None:
    """constraints.txt names a version of all that pyproject.toml asks for, so that a run repeats."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tables = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    wanted = set(re.findall(r'"([A-Za-z0-9-]+)(?:\[\w+\])?(?:[><=][^"]*)?"', tables)) - {"tinysr-kernels"}
    wanted -= set(re.findall(r'"([A-Za-z0-9-]+)"', re.search(r"keywords = .*", text)[0]))  # type: ignore[index]
    pinned = set(
        re.findall(r"^([A-Za-z0-9-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {"torch", "sphinx", "ruff", "pytest"} <= wanted
    assert wanted <= pinned

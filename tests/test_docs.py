"""The documentation says what the package does: commands, settings, links and examples."""

import ast
import dataclasses
import importlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from compress import passes as passes_module
from compress.cli import main
from compress.cli.run import read_config
from compress.config import RunConfig, from_mapping, read_yaml
from compress.data import DataFolder, embedded_data
from compress.passes import OWN, Context, Pass, build, passes
from compress.pipeline import plan
from compress.table import FIELDS
from compress.training.recipe import Recipe, read_recipe

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
EXAMPLES = REPOSITORY / "examples"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(EXAMPLES.rglob("*.md"))]
RUN_FILES = sorted(EXAMPLES.rglob("*.yaml"))

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))


def blocks(path: Path, *languages: str) -> Iterator[str]:
    """Give the fenced blocks of a page in these languages, without their indentation."""
    for indent, language, text in re.findall(r"^( *)```(\w+)\n(.*?)^ *```$", path.read_text("utf-8"), re.M | re.S):
        if language in languages:
            yield "\n".join(line.removeprefix(indent) for line in text.split("\n"))


def command_lines(path: Path) -> list[str]:
    """Give the lines of shell blocks that call the command."""
    text = "\n".join(blocks(path, "sh", "console")).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in text.split("\n")]
    return [line for line in lines if line.startswith("compress ")]


def prose(path: Path) -> str:
    """Give a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text("utf-8"), flags=re.M | re.S)


def parse(arguments: list[str]) -> click.Context:
    """Parse a command line down to its last subcommand, without running it."""
    command: click.Command = main.cli
    context = click.Context(command, info_name="compress")
    rest = [argument for argument in arguments if argument != "--debug"]
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, f"no command {name}"
        command, parent = found, context
        context = click.Context(command, parent, name)
        if not isinstance(command, click.Group):
            context = command.make_context(name, rest, parent)
    return context


def anchors(path: Path) -> set[str]:
    """Give the anchors that a page's headings get when it is rendered."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def every_option(command: click.Command) -> set[str]:
    """Give the long options of a command and its subcommands."""
    found = {name for option in command.params for name in option.opts if name.startswith("--")}
    if isinstance(command, click.Group):
        found |= {name for inner in command.commands.values() for name in every_option(inner)}
    return found


@page
def test_every_command_line_parses(path: Path) -> None:
    for line in command_lines(path):
        try:
            context = parse(shlex.split(line, comments=True)[1:])
        except click.ClickException as error:
            pytest.fail(f"{path.name}: `{line}`: {error.format_message()}")
        name = context.command.name
        if name == "run":
            given = context.params
            read_config(given["config"] and REPOSITORY / given["config"], given["passes"], given["assignments"], {})
        elif name in passes():
            settings = {field.name: context.params[field.name] for field in dataclasses.fields(passes()[name])}
            build(passes()[name], {key: value for key, value in settings.items() if value is not None})


@page
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(there), f"{path.name} links to {target}; that page has no such heading"


@page
def test_python_is_valid_and_its_imports_exist(path: Path) -> None:
    for text in blocks(path, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "compress":
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{path.name}: {node.module} has no {missing}"


@page
def test_yaml_is_a_run_or_a_recipe(path: Path, tmp_path: Path) -> None:
    for text in blocks(path, "yaml"):
        if path.name == "training.md":
            file = tmp_path / "recipe.yaml"
            file.write_text(text, "utf-8")
            assert read_recipe(file) != Recipe()
        else:
            assert from_mapping(yaml.safe_load(text), path.name).passes


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.parent.name)
def test_the_configurations_of_the_examples_load(path: Path) -> None:
    assert isinstance(from_mapping(read_yaml(path), path.name), RunConfig)


def test_the_example_of_fine_tuning_can_be_planned(
    speech_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names folders that its README makes: ``test`` with trials, ``own`` without; neither has a ``calib.scp``."""
    speech = DataFolder.read(embedded_data()).calibration()
    (tmp_path / "data" / "own").mkdir(parents=True)
    lines = [f"{name} {path}\n" for name, path in speech.paths.items()]
    (tmp_path / "data" / "own" / "wav.scp").write_text("".join(lines), "utf-8")
    shutil.copytree(speech_folder, tmp_path / "data" / "test", ignore=shutil.ignore_patterns("calib.scp"))
    monkeypatch.chdir(tmp_path)
    planned = plan(read_config(EXAMPLES / "06-finetune-own-data" / "run.yaml", None, (), {}))
    assert [step.folder.name for step in planned.steps][1:] == ["01-prune", "02-finetune", "03-onnx", "04-ptq"]


def test_every_example_has_a_readme() -> None:
    folders = [folder for folder in EXAMPLES.iterdir() if folder.is_dir()]
    assert folders
    assert all((folder / "README.md").is_file() for folder in folders)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_a_page_that_names_its_options(name: str) -> None:
    text = (DOCS / "commands" / f"{name}.md").read_text("utf-8")
    command = main.cli.get_command(click.Context(main.cli), name)
    assert command is not None
    assert not [option for option in every_option(command) if f"`{option}" not in text]
    assert name in {parse(shlex.split(line)[1:]).command_path.split()[1] for line in command_lines_of(name)}


def command_lines_of(name: str) -> list[str]:
    return command_lines(DOCS / "commands" / f"{name}.md")


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.name)
def test_every_pass_has_a_page_with_its_settings_and_defaults(kind: type[Pass]) -> None:
    text = (DOCS / "passes" / f"{kind.name}.md").read_text("utf-8")
    assert f"{kind.accepts.value} -> {kind.returns.value}" in text
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`? \|", text, re.M))
    assert rows == {field.name: str(field.default) for field in dataclasses.fields(kind)}


def test_a_pass_as_a_command_has_its_common_options_described() -> None:
    text = (DOCS / "commands" / "one-pass.md").read_text("utf-8")
    for kind in OWN:
        command = main.cli.get_command(click.Context(main.cli), kind.name)
        assert command is not None
        own = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)}
        assert not [option for option in every_option(command) - own if f"`{option}" not in text]


def test_the_page_of_run_names_every_key_of_a_configuration() -> None:
    text = (DOCS / "commands" / "run.md").read_text("utf-8")
    keys = [field.name for field in dataclasses.fields(RunConfig)]
    assert not [key for key in keys if f"`{key}`" not in text and f"`--{key.replace('_', '-')}" not in text]


def test_every_field_of_the_table_is_explained() -> None:
    text = (DOCS / "artifact.md").read_text("utf-8")
    assert not [name for name in FIELDS if f"`{name}`" not in text]


def test_every_key_of_a_recipe_is_explained() -> None:
    text = (DOCS / "training.md").read_text("utf-8")
    recipe = Recipe()
    keys = [field.name for kind in (recipe, recipe.augmentation) for field in dataclasses.fields(kind)]
    assert not [key for key in keys if f"`{key}`" not in text]


@pytest.fixture
def documented_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Pass]]:
    """The pass of docs/extend.md as an installed distribution would offer it."""
    (code,) = [text for text in blocks(DOCS / "extend.md", "python") if "class RoundWeights" in text]
    (project,) = blocks(DOCS / "extend.md", "toml")
    (entry,) = re.findall(r'\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"', project)
    (tmp_path / "round_weights.py").write_text(code, "utf-8")
    info = tmp_path / "round_weights-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: round-weights\nVersion: 0.1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[{entry[0]}]\n{entry[1]} = {entry[2]}\n", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    passes_module.passes.cache_clear()
    yield passes()["round_weights"]
    passes_module.passes.cache_clear()


def test_the_documented_pass_is_found_built_and_does_what_it_says(documented_pass, tiny) -> None:
    maker = build(documented_pass, {"kind": "bf16", "skip": "embedding"})
    rounded = maker.run(tiny, Context())
    before, after = tiny.module.state_dict(), rounded.module.state_dict()
    assert (after["first.weight"] == before["first.weight"].bfloat16().float()).all()
    assert (after["embedding.weight"] == before["embedding.weight"]).all()
    assert rounded.history[-1].settings == {"kind": "bf16", "skip": ["embedding"]}


def test_the_documented_pass_has_a_command_and_takes_settings_of_a_run(documented_pass) -> None:
    page_text = (DOCS / "extend.md").read_text("utf-8")
    run_line, own_line = re.findall(r"^compress .*round_weights.*$", page_text, re.M)
    context = parse(shlex.split(own_line)[1:])
    assert context.command.name == documented_pass.name
    parsed = parse(shlex.split(run_line)[1:]).params
    config = read_config(None, parsed["passes"], parsed["assignments"], {})
    assert config.passes[0] == documented_pass(kind="bf16")

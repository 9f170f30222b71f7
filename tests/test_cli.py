"""The command line: how arguments are read, and what is printed."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT, run_here
from tunix_mlflow.cli import bench, stages, table
from tunix_mlflow.cli.arguments import ConfigurableCommand
from tunix_mlflow.cli.main import cli, invoke
from tunix_mlflow.cli.terminal import Terminal, print_json
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import BenchmarkConfig
from tunix_mlflow.errors import ConfigError, InputError
from tunix_mlflow.runtime.report import Reporter

Values = dict[str, Any]


@pytest.fixture
def parse() -> Callable[..., Values]:
    """Parse the arguments of a stage, and return what its body would be given."""

    def parsed(name: str, *arguments: str) -> Values:
        command: click.Command = getattr(stages, name)
        return command.make_context(name, list(arguments)).params

    return parsed


@pytest.mark.parametrize(
    "arguments",
    [
        ["golden-v2", "training.steps=3", "dataset=x-v1"],
        ["--config", "golden-v2", "--training.steps", "3", "--dataset", "x-v1"],
        ["--training.steps=3", "dataset=x-v1", "--config=golden-v2"],
        ["config=golden-v2", "dataset=x-v1", "--training.steps", "3"],
    ],
)
def test_three_spellings_of_a_command_line(
    parse: Callable[..., Values], arguments: list[str]
) -> None:
    """key=value, --key value and --key=value mean the same: `mlflow run` passes the second."""
    values = parse("train", *arguments)
    assert values["config"] == "golden-v2"
    assert values["overrides"] == {"training.steps": "3", "dataset": "x-v1"}


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("train", ["--plan", "a"], {"plan": True, "config": "a"}),
        ("train", ["--plan", "true", "--force", "false"], {"plan": True, "force": False}),
        ("train", ["plan=true"], {"plan": True}),
        ("train", ["resume=auto", "step=5"], {"resume": "auto", "step": 5}),
        ("train", ["--seed", "3"], {"overrides": {"seed": "3"}}),
        ("train", ["a.yaml", "x=1=2"], {"config": "a.yaml", "overrides": {"x": "1=2"}}),
        ("train", ["--", "--odd"], {"config": "--odd"}),
        ("resume", ["r", "--fork", "--step", "3"], {"run_id": "r", "fork": True, "step": 3}),
        ("evaluate", ["--model", "m", "--dataset", "d"], {"model": "m", "dataset": "d"}),
        ("evaluate", ["m", "dataset=d", "limit=5"], {"dataset": "d", "limit": 5}),
        ("promote", ["m", "name=n"], {"model": "m", "name": "n"}),
        ("promote", ["name=n", "m"], {"model": "m", "name": "n"}),
        ("promote", ["m", "n"], {"model": "m", "name": "n"}),
        ("promote", ["m"], {"model": "m", "name": None}),
        ("promote", ["m", "model.layers=2"], {"overrides": {"model.layers": "2"}}),
        ("seed", ["d", "num_traces=5", "key=e-v1"], {"num_traces": 5, "key": "e-v1"}),
        ("seed", ["--dataset", "d", "--num_traces", "5"], {"dataset": "d", "num_traces": 5}),
    ],
)
def test_options_arguments_and_keys(
    parse: Callable[..., Values], command: str, arguments: list[str], expected: Values
) -> None:
    """Each name is an option, an argument or a configuration key, however it is spelled."""
    values = parse(command, *arguments)
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--forse"], "No such option '--forse'"),
        (["train", "--forse"], "--force"),
        (["train", "--stesp", "3"], "No such option '--stesp'"),
        (["train", "--training.steps"], "--training.steps needs a value"),
        (["train", "seed=1", "--seed", "2"], "seed is given twice: '1' and '2'"),
        (["train", "--plan=maybe"], "plan: expected true or false, got 'maybe'"),
        (["train", "a", "b"], "unexpected extra argument"),
        (["train", "trainning.steps=3"], "unknown key trainning (on the command line); did you"),
        (["train", "training.steps=many"], "training.steps: expected int, got 'many'"),
        (["train", "absent"], "no configuration 'absent'"),
        (["train", "--step", "3"], "--step and --fork need --resume RUN_ID"),
        (["train", "other", "--resume", "r"], "a resumed run keeps its configuration"),
        (["train", "--step", "x"], "'x' is not a valid integer"),
        (["train", "--="], "'--=' is not an option"),
        (["evaluate"], "Missing argument 'MODEL'"),
        (["promote", "name=x"], "Missing argument 'MODEL'"),
        (["seed"], "Missing argument 'KEY'"),
        (["bench", "--suite", "absent"], "'absent' is not one of"),
        (["bench", "suite=absent"], "'absent' is not one of"),
        (["tarin"], "No such command 'tarin'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2; the line names what is wrong and where help is."""
    assert run_here(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tunix-mlflow: error: ")
    assert err.count("\n") == 1
    assert message in err


@given(
    st.lists(
        st.text(max_size=20)
        | st.sampled_from(["--", "--a", "a=1", "=", "--=", "seed=1", "training.steps=", "--seed"])
    )
)
def test_any_command_line_is_read_or_refused(arguments: list[str]) -> None:
    """No words make anything but a configuration or an error of one line."""
    try:
        values = stages.train.make_context("train", list(arguments)).params
        load_config(values["config"] or "golden-v2", values["overrides"])
    except click.exceptions.Exit:
        assert "--help" in arguments
    except (click.ClickException, ConfigError) as error:
        assert str(error)


def test_the_demo_has_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's store or state, and libraries as quiet as in other commands."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ |= {"MLFLOW_EXPERIMENT_NAME": "theirs", "MLFLOW_DISABLE_TELEMETRY": "false"}
    assert run_here("demo", "training.steps=many") == 2
    folder = Path.cwd() / ".demo"
    ours = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "TUNIX_MLFLOW_"))}
    assert ours.pop("TUNIX_MLFLOW_HOME") == str(folder / "state")
    assert ours.pop("MLFLOW_TRACKING_URI") == f"sqlite:///{folder / 'mlflow.db'}"
    assert ours["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert "MLFLOW_EXPERIMENT_NAME" not in ours


def test_click_errors_are_ours() -> None:
    """They have our exit code, and name the command whose help to read."""
    with pytest.raises(InputError, match=r"See `tunix-mlflow datasets show --help`"):
        invoke(["datasets", "show"])


def commands(group: click.Group, prefix: str) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix} {name}")
        else:
            found[f"{prefix} {name}"] = command
    return found


@pytest.mark.parametrize("name", commands(cli, "tunix-mlflow"))
def test_every_option_has_help(name: str) -> None:
    """And none has the metavar that click makes of a range."""
    command = commands(cli, "tunix-mlflow")[name]
    for param in command.params:
        if isinstance(param, click.Option):
            assert param.help, param.name
    output = CliRunner().invoke(cli, [*name.split()[1:], "--help"]).output
    assert "INTEGER RANGE" not in output
    assert ("[KEY=VALUE]..." in output) == isinstance(command, ConfigurableCommand)


PHRASES = (
    *("go on with", "goes on", "mend", "does not have", "taken up", "believe", "large product"),
    *(
        "computed again",
        "whole or by adapters",
        "way back",
        "stands in",
        "all the same",
        "held out",
    ),
)
"""Of the table in the style guide, as far as help could have them."""


def test_help_is_plain_english() -> None:
    """In the words of JAX's and MLflow's documentation."""
    names = [[], *(name.split()[1:] for name in commands(cli, "tunix-mlflow"))]
    for name in names:
        output = CliRunner().invoke(cli, [*name, "--help"]).output.lower()
        assert [phrase for phrase in PHRASES if phrase in output] == [], name


def test_train_help_lists_its_options() -> None:
    """Not only in prose."""
    output = CliRunner().invoke(cli, ["train", "--help"]).output
    for option in ("--plan", "--force", "--resume", "--step", "--fork"):
        assert re.search(rf"^  {option}\b", output, re.MULTILINE)


def test_help_loads_no_library() -> None:
    """The time of --help is Python's and click's."""
    code = (
        "import sys\n"
        "from tunix_mlflow.cli.main import cli\n"
        "try:\n    cli(['train', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = ('jax', 'mlflow', 'duckdb', 'numpy', 'yaml', 'msgspec', 'tqdm', 'psutil')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "Usage" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_the_suites_are_the_schemas() -> None:
    """The command line has its own list, so that --help loads no schema."""
    hints = typing.get_type_hints(BenchmarkConfig)
    assert typing.get_args(hints["suite"]) == bench.SUITES


def test_projects_are_the_commands() -> None:
    """Each script of projects/ runs the command of its name, in about ten lines."""
    scripts = {path.stem: path.read_text() for path in (ROOT / "projects").glob("[a-z]*.py")}
    assert set(scripts) == {"main", "seed", "train", "evaluate", "bench", "promote"}
    for name, text in scripts.items():
        assert f'run_command("{name}")' in text
        assert name in cli.commands
        assert len(text.splitlines()) <= 15


HEADERS = ("KEY", "COUNT", "SPLITS")
ROWS = [("a-v1", 5, "train 4, test 1"), ("b" * 60 + "-v12", 1_000_000, None)]


def test_a_table_has_headers_and_aligned_columns() -> None:
    """Numbers to the right, with separators; a long key moves the columns, and is not cut."""
    assert table.render(HEADERS, ROWS).splitlines() == [
        f"{'KEY':64}      COUNT  SPLITS",
        f"{'a-v1':64}          5  train 4, test 1",
        f"{'b' * 60}-v12  1,000,000",
    ]


def test_a_narrow_terminal_cuts_nothing() -> None:
    """Where the columns do not fit, each value has a line of its own."""
    text = table.render(HEADERS, ROWS, width=60)
    assert f"KEY     {'b' * 60}-v12" in text.splitlines()
    assert "COUNT   1,000,000" in text
    assert table.render(HEADERS, ROWS[:1], width=60).startswith("KEY ")


def test_tables_and_json_show_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """What data says cannot move the cursor or clear the screen."""
    assert r"\x1b[2J" in table.render(("KEY",), [("\x1b[2J",)])
    print_json({"key": "\x9b2J\x1b\u00e9"})
    text = capsys.readouterr().out
    assert text == '{"key": "\\u009b2J\\u001b\u00e9"}\n'
    assert json.loads(text) == {"key": "\x9b2J\x1b\u00e9"}


class Screen(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its figures; messages stand above it, and it is closed at the end."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with Terminal() as terminal:
        reporter: Reporter = terminal
        reporter.progress("train", 0, 4, {})
        reporter.progress("train", 2, 4, {"loss": 0.12345, "tok/s": 12345.6})
        reporter.info("run x\x1b")
        reporter.progress("train", 4, 4, {})
    text = screen.getvalue()
    assert "4/4" in text
    assert "loss=0.1235, tok/s=12,346" in text
    assert r"run x\x1b" in text


def test_progress_elsewhere_is_a_line_a_tenth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what takes longer than a second, with the latest value of each figure."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    terminal = Terminal()
    for step in range(41):
        now = step / 2
        terminal.progress("train", step, 40, {"validation loss": 2.0} if step == 1 else {})
    terminal.progress("quick", 1, 1, {})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "train 4/40: validation loss 2, 18 s left"

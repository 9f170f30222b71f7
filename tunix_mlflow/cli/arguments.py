"""Command lines of `mlflow run` and of ours: `[WORD] key=value --key value --key=value`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tunix_mlflow import paths
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


class Arguments(NamedTuple):
    """A parsed command line."""

    config: str | None  # a file or a preset
    stage: dict[str, str]  # the stage's own arguments
    overrides: dict[str, str]  # dotted key -> text

    def require(self, name: str, what: str) -> str:
        """One of the stage's own arguments.

        Raises:
            ConfigError: if it is missing, saying what to give.
        """
        value = self.stage.get(name)
        if not value:
            raise ConfigError(f"{name} is missing; give {what}")
        return value

    def load(self, default: str | None = None) -> Config:
        """The configuration that they mean; `default` is the preset when none is named."""
        presets = paths.project_root() / "projects" / "configs"
        return load_config(self.config or default, self.overrides, presets)


def parse(
    argv: Sequence[str],
    own: Iterable[str] = (),
    positional: str = "config",
    flags: Iterable[str] = (),
) -> Arguments:
    """Read `[WORD] key=value --key value --key=value`, in any order.

    `mlflow run` hands undeclared parameters on as `--key value`, which is why both forms
    are read.

    Args:
        argv: without the program's name.
        own: names that are the stage's and not the configuration's.
        positional: what a bare word stands for.
        flags: names of the stage's own that may stand alone, as `--name`, for `true`.

    Raises:
        ConfigError: naming the argument that makes no sense.
    """
    alone = {f"--{flag}": flag for flag in flags}
    names = {*own, *flags, "config"}
    values: dict[str, str] = {}
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if argument in alone and argv[position : position + 1] not in (["true"], ["false"]):
            key, value = alone[argument], "true"
        elif argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            if not equals:
                if position == len(argv):
                    raise ConfigError(f"--{key} needs a value")
                value = argv[position]
                position += 1
        elif "=" in argument:
            key, _, value = argument.partition("=")
        else:
            key, value = positional, argument
        if not _KEY.fullmatch(key):
            raise ConfigError(f"{argument!r} is not key=value or --key value")
        if key in values and values[key] != value:
            raise ConfigError(f"{key} is given twice: {values[key]!r} and {value!r}")
        values[key] = value
    return Arguments(
        values.get("config") or None,
        {key: value for key, value in values.items() if key in names and key != "config"},
        {key: value for key, value in values.items() if key not in names},
    )

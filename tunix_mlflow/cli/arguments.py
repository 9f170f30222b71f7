"""Command lines of ours and of `mlflow run`: options, and configuration keys as `key=value`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import click

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


class Number(click.IntRange):
    """An integer option, shown as N."""

    def get_metavar(self, *_: Any, **__: Any) -> str:
        """Return it; click's own is `INTEGER RANGE`."""
        return "N"


class ConfigurableCommand(click.Command):
    """A command that takes configuration keys besides its options, as the argument `overrides`.

    `key=value`, `--key value` and `--key=value` are the same, for options and arguments of the
    command and for configuration keys: `mlflow run` passes all parameters as `--key value`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Separate the overrides, and let click parse the rest."""
        overrides: dict[str, str] = {}
        rest = super().parse_args(ctx, self._split(ctx, args, overrides))
        ctx.params["overrides"] = overrides
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return the pieces of the usage line, with the overrides as its last one."""
        return [*super().collect_usage_pieces(ctx), "[KEY=VALUE]..."]

    def _split(self, ctx: click.Context, args: list[str], overrides: dict[str, str]) -> list[str]:
        """Return options and arguments as click reads them; put configuration keys aside.

        Raises:
            click.UsageError: naming an argument that is not an option, a key or a value.
        """
        params = self.get_params(ctx)
        options = {opt: p for p in params if isinstance(p, click.Option) for opt in p.opts}
        arguments = [p for p in params if isinstance(p, click.Argument)]
        names = {argument.name for argument in arguments}
        positionals: list[str] = []
        parsed: list[str] = []
        given: dict[str, str] = {}
        named: dict[str, str] = {}
        words = list(args)
        while words:
            word = words.pop(0)
            if word == "--":
                positionals += words
                break
            is_option = word.startswith("-")
            key, equals, value = word.removeprefix("--").partition("=")
            if not is_option and not (equals and _KEY.fullmatch(key)):
                positionals.append(word)
                continue
            option = options.get(f"--{key.replace('_', '-')}")
            if option is not None and option.is_flag:
                if not equals:
                    value = words.pop(0) if words[:1] in (["true"], ["false"]) else "true"
                if value not in ("true", "false"):
                    raise click.UsageError(f"{key}: expected true or false, got {value!r}", ctx)
                parsed += [option.opts[0]] if value == "true" else []
                continue
            if not _KEY.fullmatch(key):
                raise click.UsageError(f"{word!r} is not an option, nor key=value", ctx)
            if option is None and key not in names and is_option:
                _require_key(key, word, options, ctx)
            if not equals:
                if not words:
                    raise click.UsageError(f"--{key} needs a value", ctx)
                value = words.pop(0)
            if given.setdefault(key, value) != value:
                raise click.UsageError(f"{key} is given twice: {given[key]!r} and {value!r}", ctx)
            if option is not None:
                parsed.append(f"{option.opts[0]}={value}")
            elif key in names:
                named[key] = value
            else:
                overrides[key] = value
        return [*parsed, "--", *_in_order(arguments, positionals, named, ctx)]


def _in_order(
    arguments: Iterable[click.Argument],
    positionals: list[str],
    named: dict[str, str],
    ctx: click.Context,
) -> list[str]:
    """Return the values of the arguments: those given by name, between those given by position."""
    values: list[str] = []
    positionals = list(positionals)
    missing: click.Argument | None = None
    for argument in arguments:
        value = named.get(str(argument.name)) or (positionals.pop(0) if positionals else None)
        if value is None:
            missing = missing or argument
        elif missing is not None:
            raise click.MissingParameter(ctx=ctx, param=missing)
        else:
            values.append(value)
    return values + positionals


def _require_key(key: str, word: str, options: dict[str, Any], ctx: click.Context) -> None:
    """Raise NoSuchOption unless `key` can be a key of the configuration."""
    from msgspec.structs import fields

    from tunix_mlflow.config.schema import Config

    known = [field.name for field in fields(Config)]
    if key.partition(".")[0] in known or "." in key:
        return
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name, [*options, *(f"--{each}" for each in known)])
    raise click.NoSuchOption(name, possibilities=near, ctx=ctx)

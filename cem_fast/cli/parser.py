"""Flags and YAML files of settings, on top of click."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, get_args, get_origin

import click
import yaml

from cem_fast._support.setting_types import from_yaml, is_of, type_name
from cem_fast.config import SEEDED, GridConfig, SharedConfig, described

CONFIG, PRINT = "config", "print_config"
MAX_BYTES = 200_000  # of a YAML file
MAX_NODES = 100_000  # of a YAML file, counted with repetitions by aliases
MOST_INTEGER = 2**63 - 1
# of YAML, also when a value does not fit a tag such as !!int or !!timestamp
UNREADABLE = (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "allow_extra_args": True,  # reported by Command.parse_args
}


class Kind(click.ParamType):
    """Type of a flag; its text is read by the rules of YAML.

    Args:
        kind: the type; a list is given as ``0,1`` or ``[0, 1]``.
        at_least: lower bound of an integer; None for no bound.
    """

    def __init__(self, kind: Any, at_least: int | None = None):
        self.kind, self.at_least = kind, at_least
        name = type_name(kind).partition(" of ")[0].removesuffix(" or null").replace("str", "text")
        self.name = "true|false" if kind is bool else name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert the text of a flag, and keep a default that is no text."""
        return self.from_text(value, param, ctx) if isinstance(value, str) else value

    def from_text(self, text: str, param: click.Parameter | None = None, ctx: click.Context | None = None) -> Any:
        """Convert the text of a flag."""
        item = _item(self.kind)
        if item is None:
            value = from_yaml(self.kind, _loaded(text)) if text else text
            if isinstance(value, str) or not is_of(self.kind, value):  # a folder named 2024 is no number
                value = text if is_of(self.kind, text) else value
            return self.checked(value, param, ctx)
        if text.startswith("["):
            return self.checked(_loaded(text), param, ctx)
        if is_of(item, "") and text:
            return self.checked([each.strip() for each in text.split(",")], param, ctx)
        return self.checked(_loaded(f"[{text}]"), param, ctx)

    def from_file(self, value: Any, param: click.Parameter | None = None, ctx: click.Context | None = None) -> Any:
        """Convert a value of a YAML file."""
        if isinstance(value, str) and not is_of(self.kind, value) and _item(self.kind) is None:
            return self.from_text(value, param, ctx)  # such as 1e-1, a text in YAML 1.1
        return self.checked(value, param, ctx)

    def checked(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a value of YAML with the type of the flag, or fail and name the expected type."""
        item = _item(self.kind)
        if item is not None and isinstance(value, list):
            for each in value:
                if not is_of(item, from_yaml(item, each)):
                    self.fail(f"{type_name(item)}, got {each}", param, ctx)
            return tuple(from_yaml(item, each) for each in value)
        value, expected = from_yaml(self.kind, value), type_name(self.kind)
        if item is not None:
            expected = "list or null" if is_of(self.kind, None) else "list"
        if self.at_least is not None:
            expected = f"an integer of at least {self.at_least}"
        if not is_of(self.kind, value) or (self.at_least is not None and value < self.at_least):
            shown = repr(value) if value == "" else value
            self.fail(f"{expected}, got {shown}", param, ctx)
        return value


class Option(click.Option):
    """A flag with a heading that ``--help`` lists it under.

    Args:
        name: name of the value; ``noise_std`` is the flag ``--noise-std``.
        help: description, without the default.
        kind: type of the value.
        default: value without the flag.
        group: the heading.
        at_least: lower bound of an integer; None for no bound.
    """

    def __init__(
        self,
        name: str,
        help: str,
        kind: Any = str,
        default: Any = None,
        group: str = "options",
        at_least: int | None = None,
    ):
        self.group = group
        if kind is not bool or default is not False:
            shown = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
            shown = shown.replace("...", "").strip() if default not in (None, "") else ""
            help += f" (default: {shown})" if shown else ""
            super().__init__([_flag(name)], type=Kind(kind, at_least), default=default, help=help)
        else:
            super().__init__([_flag(name)], is_flag=True, default=False, help=help)


class Argument(click.Argument):
    """A positional argument that ``--help`` describes.

    Args:
        name: name of the value.
        help: its description.
        required: whether it must be given; None stands for one that is not.
    """

    group = "arguments"

    def __init__(self, name: str, help: str, required: bool = True):
        super().__init__([name], type=Kind(str if required else str | None), required=required)
        self.text = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Return name and description."""
        return self.human_readable_name, self.text


class Command(click.Command):
    """A command that reads settings from flags and from ``--config`` files, and returns them with its function.

    Args:
        function: function of the command.
        params: its flags and arguments.
    """

    def __init__(self, function: Callable[..., int], params: Sequence[click.Parameter]):
        summary = (function.__doc__ or "").strip()
        super().__init__(
            function.__name__.rstrip("_"),
            params=list(params),
            callback=lambda **values: (function, values),
            help=summary,
            short_help=summary,
            context_settings=CONTEXT,
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; of a setting's flag and ``--config`` files with it, the last one counts."""
        *_, order = self.make_parser(ctx).parse_args(list(args))
        super().parse_args(ctx, args)
        if ctx.args:
            raise click.UsageError(f"unrecognized arguments: {' '.join(ctx.args)}", ctx)
        files = iter(ctx.params.pop(CONFIG, ()))
        found: dict[str, Any] = {}
        for param in order:
            if param.name == CONFIG:
                found.update(self.read(ctx, Path(next(files))))
            else:
                found.pop(param.name, None)
        ctx.params.update(found)
        if ctx.params.pop(PRINT, False):
            values = [(param.name, ctx.params[param.name]) for param in self.params if param.name in ctx.params]
            shown = {name: list(value) if isinstance(value, tuple) else value for name, value in values}
            click.echo(yaml.safe_dump(shown, sort_keys=False), nl=False)
            ctx.exit()
        return []

    def read(self, ctx: click.Context, path: Path) -> dict[str, Any]:
        """Read the settings of a YAML file, each with the type of its flag."""
        options = {param.name: param for param in self.params if isinstance(param, Option)}
        found = {}
        for key, value in read_mapping(path).items():
            name = key.replace("-", "_")
            if name == CONFIG:
                raise click.UsageError(f"{path} must not name another file under {CONFIG!r}", ctx)
            if name not in options:
                raise click.NoSuchOption(name, ctx=ctx)
            option = options[name]
            kind = option.type if isinstance(option.type, Kind) else Kind(bool)
            found[name] = kind.from_file(value, option, ctx)
        return found

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write arguments and flags under their headings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "group", "options"), []).append(record)
        for heading, rows in sections.items():
            with formatter.section(heading[0].upper() + heading[1:]):
                formatter.write_dl(rows)


class Program(click.Group):
    """The program with its commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in their own order."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of the first argument."""
        name, *rest = args
        if name not in self.commands:
            raise click.UsageError(f"unknown command {name!r}{_nearest(name, self.commands)}", ctx)
        return name, self.commands[name], rest


def settings(config: type[SharedConfig], *, hidden: Collection[str] = (), **defaults: Any) -> list[click.Parameter]:
    """The flags of a configuration, with ``--config`` for a YAML file of them.

    Args:
        config: the configuration.
        hidden: settings that ``--help`` does not list, since the command refuses other values than the defaults.
        defaults: defaults that differ from those of the configuration.
    """
    text = "YAML file of settings; flags after it take precedence"
    file = click.Option([_flag(CONFIG)], multiple=True, metavar="FILE", help=text)
    shown = Option(PRINT, "print all settings as YAML, and stop", bool, False)
    flags = [
        Option(s.name, plain(s.text), s.kind, defaults.get(s.name, s.default), s.group)
        for s in described(config).values()
    ]
    for flag in flags:
        flag.hidden = flag.name in hidden
    return [file, shown, *flags]


def plain(text: str) -> str:
    """A description without Markdown."""
    return text.replace("``", "")


def build(config: type[Any], values: dict[str, Any]) -> Any:
    """Build a configuration from parsed values, which may hold more.

    Raises:
        ValueError: a setting is unknown, out of range or of the wrong type.
    """
    try:
        return config(**{name: values[name] for name in config.__dataclass_fields__})
    except TypeError as error:
        raise ValueError(str(error)) from None


def read_grid(path: Path, **changes: Any) -> GridConfig:
    """Read a grid from a YAML file of grid settings.

    Args:
        path: the file.
        changes: settings that replace those of the file.

    Raises:
        click.UsageError: the file is not there or not valid.
        ValueError: a setting is out of range.
    """

    command = Command(lambda: 0, settings(GridConfig))
    values = {setting.name: setting.default for setting in described(GridConfig).values()}
    values |= command.read(click.Context(command), path)
    grid: GridConfig = build(GridConfig, values | changes)
    return grid


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        click.UsageError: the file is not there, not UTF-8, not YAML, no mapping with text keys, or far too large.
    """
    if not path.is_file():
        raise click.UsageError(f"the file given as --config is not there, or is no file: '{path.absolute()}'")
    if path.stat().st_size > MAX_BYTES:
        raise click.UsageError(f"the file given as --config must have at most {MAX_BYTES:,} bytes: '{path.absolute()}'")
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = _load(StringIO(text))  # a stream, for messages without an excerpt of the file
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the file given as --config is not UTF-8 text: {error}") from error
    except UNREADABLE as error:
        raise click.UsageError(f"the file given as --config is not YAML: {error}") from error
    if not isinstance(found, dict):
        line = " ".join(text.split()) or "nothing"
        raise click.UsageError(f"the file given as --config must hold settings, one 'name: value' a line, got {line}")
    for key in found:
        if not isinstance(key, str):
            raise click.UsageError(f"the names of settings in the file given as --config must be text, got {key!r}")
    return found


def explain(error: click.ClickException, known: Collection[str]) -> str:
    """Describe an error of the command line in one line.

    Args:
        error: the error of click.
        known: names of the flags of all commands.
    """
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command if context is not None else None
    if isinstance(error, click.NoSuchOption):
        name = error.option_name.lstrip("-").replace("-", "_")
        options = [str(param.name) for param in command.params if isinstance(param, click.Option)] if command else []
        if name in known and name not in options:
            reason = f", {SEEDED}" if name == "secure" and "seeds" in options else ""
            return f"{name} is no setting of this command{reason}"
        return f"unknown setting {name!r}{_nearest(name, options)}"
    if isinstance(error, click.MissingParameter) and context is not None and command is not None:
        missing = [str(p.name) for p in command.params if isinstance(p, Argument) and p.name not in context.params]
        return f"{command.name} needs {' and '.join(missing)}: see cem-fast {command.name} --help"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"{error.param.name} must be {error.message}"
    if isinstance(error, click.BadOptionUsage):
        return error.message[:1].lower() + error.message[1:].rstrip(".")
    return " ".join(error.format_message().split())


class _Loader(yaml.SafeLoader):
    """YAML with numbers such as 1e-3, and without dates, merges, and keys that come twice."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse merges, which could double the size of a mapping many times over, and repeated keys."""
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merges by << are not read", key.start_mark)
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is set twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load(text: str | StringIO) -> Any:
    """Load YAML; fail for values of very many nodes, since a short file of nested aliases may stand for billions."""
    value = yaml.load(text, _Loader)
    left, count = [value], 0
    while left:
        each = left.pop()
        count += 1
        if count > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES:,} values, counted with repetitions by aliases")
        if isinstance(each, int) and abs(each) > MOST_INTEGER:
            raise yaml.YAMLError("an integer of more than 64 bits")
        left.extend(each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
    return value


def _loaded(text: str) -> Any:
    """The value of a YAML text; the text itself if it is not YAML. Digits are decimal, also after a zero."""
    try:
        return int(text) if text.isdecimal() else _load(text)
    except UNREADABLE:
        return text


def _item(kind: Any) -> Any:
    """The type of a list's items; None if the type is no list."""
    for option in (kind, *get_args(kind)):
        if get_origin(option) is tuple:
            return get_args(option)[0]
    return None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _nearest(name: str, options: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(options), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""

"""The command line of every job, made from the settings models in config.py.

Flags win over `--config FILE.yaml`, which wins over the defaults. A flag has nanochat's name; `-1` for a number that
may be unset means unset. Whatever a person got wrong ends in one readable message and exit code 2. Nothing heavy is
imported here, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import difflib
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from nanochat_ray.config import Settings

S = TypeVar("S", bound=Settings)

# Flags that a nanochat or torchrun command line has and that mean nothing here: flag -> why, and what to do.
REFUSED = {
    "hf-path": "base_eval.py takes it",
    "dry-run": "every stage keeps what it did; give another --model-tag for a trial",
    "num-files": "what the training horizon needs is fetched; --max-shards is a limit (download.py takes it)",
    "num-workers": "training ranks are --workers (download.py takes it)",
    "num-gpus": "training takes --workers, evaluation --eval-workers",
    "nproc-per-node": "ranks are started by Ray, not by torchrun; use --workers",
    "standalone": "ranks are started by Ray, not by torchrun; use --workers",
}


@dataclass(frozen=True)
class Section:
    """One settings model on the command line: flags `--<prefix>.<field>`, or `--<field>` with an empty prefix.

    `key` names it in a config file and in the result.
    """

    key: str
    defaults: Settings
    prefix: str = ""

    def flag(self, field: str, negated: bool = False) -> str:
        name = ("no-" if negated else "") + field.replace("_", "-")
        return f"--{self.prefix.replace('_', '-')}.{name}" if self.prefix else f"--{name}"

    @property
    def fields(self) -> dict[str, FieldInfo]:
        return type(self.defaults).model_fields


@dataclass(frozen=True)
class _Kind:
    """What the command line needs to know of a field's type."""

    base: Any  # bool, int, float, str or tuple
    optional: bool
    choices: tuple[str, ...] = ()

    @staticmethod
    def of(info: FieldInfo) -> _Kind:
        annotation, optional = info.annotation, False
        if get_origin(annotation) in (Union, types.UnionType):
            members = [member for member in get_args(annotation) if member is not type(None)]
            assert len(members) == 1, f"a setting has one type, or that and None; got {annotation}"
            annotation, optional = members[0], True
        if get_origin(annotation) is Literal:
            return _Kind(str, optional, get_args(annotation))
        return _Kind(get_origin(annotation) or annotation, optional)

    @property
    def metavar(self) -> str:
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return {bool: "0|1", int: "INT", float: "FLOAT"}.get(self.base, "TEXT")

    def clean(self, value: Any) -> Any:
        """Turn nanochat's "unset" (-1 for a number, an empty text) into None."""
        if not self.optional or isinstance(value, list | bool):
            return value
        minus_one = self.base in (bool, int, float) and str(value).strip() in ("-1", "-1.0")
        return None if value == "" or minus_one else value


@dataclass(frozen=True)
class _Given:
    """A value that a person gave, and where: a flag, or a key of the config file."""

    value: Any
    origin: str

    def __str__(self) -> str:
        if isinstance(self.value, bool):  # --x and --no-x say it themselves
            return self.origin
        return " ".join([self.origin, *map(str, self.value if isinstance(self.value, list) else [self.value])])


class Flags:
    """A read command line. `args` holds the job's own options, those that its `extra` added."""

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        sections: Sequence[Section],
        given: dict[str, dict[str, _Given]],
        args: argparse.Namespace,
    ):
        self.args = args
        self._parser = parser
        self._sections = sections
        self._given = given

    def settings(self, kind: type[S], defaults: S | None = None) -> S:
        """What the person gave of this section over `defaults` (unset: the section's own, else a preset's values).

        Ends the process with exit code 2 and a message if a value is refused.
        """
        found_sections = [section for section in self._sections if type(section.defaults) is kind]
        assert len(found_sections) == 1, f"{kind.__name__} is not one section of this command line"
        section = found_sections[0]
        base = section.defaults if defaults is None else defaults
        given = self._given[section.key]
        try:
            found = kind.model_validate({**base.model_dump(), **{name: item.value for name, item in given.items()}})
        except ValidationError as error:
            self.fail("\n".join(_explain(section, given, dict(problem)) for problem in error.errors()))
        for name, item in given.items():
            value = getattr(found, name)
            if isinstance(value, float) and not math.isfinite(value):
                self.fail(f"{item}: must be a finite number")
        return found

    def all(self) -> dict[str, Settings]:
        """Every section by its key."""
        return {section.key: self.settings(type(section.defaults)) for section in self._sections}

    def fail(self, message: str) -> NoReturn:
        """End the process as for a bad flag: the message on stderr, exit code 2."""
        self._parser.error(message)


def read_flags(
    description: str,
    sections: Sequence[Section],
    argv: Sequence[str] | None = None,
    epilog: str = "",
    extra: Callable[[argparse.ArgumentParser], object] | None = None,
) -> Flags:
    """Read a job's command line (`sys.argv` if `argv` is None); values are checked by `Flags.settings`.

    `extra` adds the job's own options to the parser; they may stand in the config file too. Exits with code 2 on an
    unknown or refused flag and on a config file that cannot be used, with 0 after `--help`.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        usage="%(prog)s [--config FILE.yaml] [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings as YAML or JSON data; flags win over it")
    if extra is not None:
        extra(parser)
    own = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for section in sections:
        _add_section(parser, section)

    values, unknown = parser.parse_known_args(_with_dashes(argv))
    if unknown:
        parser.error(_unknown_message(unknown, list(parser._option_string_actions)))
    given: dict[str, dict[str, _Given]] = {section.key: {} for section in sections}
    if values.config is not None:
        try:
            from_file, own_from_file = _read_config(values.config, sections, list(own))
        except (OSError, ValueError) as error:
            parser.error(f"--config {values.config}: {error}")
        given.update(from_file)
        for dest, value in own_from_file.items():
            choices = own[dest].choices
            if choices is not None and value not in choices:
                parser.error(f"{values.config}: {dest} {value}: must be one of {', '.join(map(str, choices))}")
        parser.set_defaults(**own_from_file)
        values, _ = parser.parse_known_args(_with_dashes(argv))
    for section in sections:
        for name, info in section.fields.items():
            dest = f"{section.key}.{name}"
            if hasattr(values, dest):
                given[section.key][name] = _Given(_Kind.of(info).clean(getattr(values, dest)), section.flag(name))
    return Flags(parser, sections, given, argparse.Namespace(**{dest: getattr(values, dest) for dest in own}))


def dump(settings: Settings | Mapping[str, Settings]) -> dict[str, Any]:
    """Settings as plain JSON values that `--config` reads back to the same settings."""
    if isinstance(settings, Settings):
        return settings.model_dump(mode="json")
    return {key: value.model_dump(mode="json") for key, value in settings.items()}


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint "; did you mean a, b?" with the known names most like `name`, or nothing.

    The part after the last dot is compared, so that a stage's flag is found without its stage.
    """
    by_leaf: dict[str, list[str]] = {}
    for other in known:
        by_leaf.setdefault(_split(other)[1], []).append(other)
    stage, leaf = _split(name)
    leaves = [leaf] if leaf in by_leaf else difflib.get_close_matches(leaf, by_leaf, n=3, cutoff=0.7)
    found = [other for like in leaves for other in by_leaf[like]]
    found = [other for other in found if _split(other)[0] == stage] or found
    return f"; did you mean {', '.join(found[:3])}?" if found else ""


def _split(name: str) -> tuple[str, str]:
    """Stage and field of a flag or a key of a config file."""
    stage, _, leaf = name.lstrip("-").rpartition(".")
    return stage, leaf


def _add_section(parser: argparse.ArgumentParser, section: Section) -> None:
    title = (type(section.defaults).__doc__ or section.key).splitlines()[0].rstrip(".")
    group = parser.add_argument_group(title)
    for name, info in section.fields.items():
        kind = _Kind.of(info)
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        options = [section.flag(name)]
        if "short" in extra and not section.prefix:
            options.insert(0, str(extra["short"]))
        if "alias" in extra and not section.prefix:
            options.append(str(extra["alias"]))
        shape: dict[str, Any] = {"dest": f"{section.key}.{name}", "default": argparse.SUPPRESS}
        help_text = _help(section, name, info, kind)
        if kind.base is bool:
            group.add_argument(*options, nargs="?", const=True, metavar="0|1", help=help_text, **shape)
            no = section.flag(name, negated=True)
            group.add_argument(no, action="store_const", const=False, help=argparse.SUPPRESS, **shape)
        elif kind.base is tuple:
            group.add_argument(*options, nargs="+", metavar="TEXT", help=help_text, **shape)
        else:
            group.add_argument(*options, metavar=kind.metavar, help=help_text, **shape)


def _help(section: Section, name: str, info: FieldInfo, kind: _Kind) -> str:
    default = getattr(section.defaults, name)
    notes = []
    if kind.base is bool and default is not None:
        notes.append(f"default: {'on' if default else 'off'}")
    elif default is not None:
        notes.append(f"default: {default}")
    elif "unset" not in (info.description or ""):
        notes.append("default: unset")
    if kind.base is bool and default:
        notes.append(f"{section.flag(name, negated=True)} turns it off")
    text = " ".join(filter(None, [info.description, f"({'; '.join(notes)})" if notes else ""]))
    return text.replace("%", "%%")


def _with_dashes(argv: Sequence[str] | None) -> list[str] | None:
    """`--device_batch_size=8` as `--device-batch-size=8`; both spellings are used with nanochat."""
    if argv is None:
        import sys

        argv = sys.argv[1:]
    found = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        found.append(name.replace("_", "-") + equals + value if argument.startswith("--") else argument)
    return found


def _unknown_message(unknown: Sequence[str], known: Sequence[str]) -> str:
    names = [text.partition("=")[0] for text in unknown if text.startswith("-") and not text[1:2].isdigit()]
    if not names:
        return f"what is {' '.join(unknown)!r} for? Only flags are taken"
    lines = []
    for name in names:
        reason = REFUSED.get(_split(name)[1])
        unknown_line = f"unknown flag {name}{nearest(name, known)}"
        lines.append(f"{name} has no meaning here: {reason}" if reason else unknown_line)
    return "\n".join(lines)


def _read_config(
    path: str, sections: Sequence[Section], own: Sequence[str]
) -> tuple[dict[str, dict[str, _Given]], dict[str, Any]]:
    """The settings in a YAML file, by section, and the job's own options in it."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None
    if not isinstance(content, dict | None):
        raise ValueError("a mapping of names to values is expected")
    known = list(own) + [section.key for section in sections]
    for section in sections:
        known += [f"{section.key}.{name}" for name in section.fields]
        known += [] if section.prefix else list(section.fields)
    given: dict[str, dict[str, _Given]] = {section.key: {} for section in sections}
    own_values: dict[str, Any] = {}

    def put(section: Section, field: str, value: Any, key: str) -> None:
        if field not in section.fields:
            raise ValueError(f"unknown setting {key}{nearest(key, known)}")
        given[section.key][field] = _Given(_Kind.of(section.fields[field]).clean(value), f"{path}: {key}")

    for raw_key, value in (content or {}).items():
        key = str(raw_key).replace("-", "_")
        head, dot, field = key.partition(".")
        named = next((section for section in sections if section.key == head), None)
        flat = next((section for section in sections if not section.prefix and key in section.fields), None)
        if named is not None and dot:
            put(named, field, value, key)
        elif named is not None and (isinstance(value, dict) or (value is None and flat is None)):
            for name, item in (value or {}).items():
                put(named, str(name).replace("-", "_"), item, f"{key}.{name}")
        elif flat is not None:
            put(flat, key, value, key)
        elif key in own:
            own_values[key] = value
        else:
            raise ValueError(f"unknown setting {key}{nearest(key, known)}")
    return given, own_values


_MESSAGES = {
    "greater_than_equal": "must be >= {ge:g}",
    "greater_than": "must be > {gt:g}",
    "less_than_equal": "must be <= {le:g}",
    "less_than": "must be < {lt:g}",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be 0 or 1",
    "bool_type": "must be 0 or 1",
    "string_type": "must be text; in a file, put it in quotes",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
}


def _explain(section: Section, given: Mapping[str, _Given], problem: Mapping[str, Any]) -> str:
    """One readable line for one of pydantic's problems: `--device-batch-size 0: must be >= 1`."""
    template = _MESSAGES.get(problem["type"])
    message = template.format(**problem.get("ctx", {})) if template else problem["msg"]
    if not problem["loc"]:  # a check over several fields; its message names them
        return message
    name = problem["loc"][0]
    kind = _Kind.of(section.fields[name])
    if kind.optional and kind.base in (int, float) and problem["type"] != "value_error":
        message += ", or -1 for unset"
    return f"{given.get(name, section.flag(name))}: {message}"

"""``slidex train``. Its options are the fields of `TrainConfig`."""

from __future__ import annotations

import dataclasses
import json
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click

from slidex.cli.command import Command, echo_json
from slidex.train.config import PRESETS, TrainConfig, merge_settings, preset_settings, read_toml

if TYPE_CHECKING:
    from collections.abc import Callable


class Widths(click.ParamType):
    """Whole numbers, comma-separated."""

    name = "INTEGER,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Text to a tuple."""
        try:
            return (
                value if isinstance(value, tuple) else tuple(int(part) for part in value.split(",") if part)
            )
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 512,128.", param, ctx)


class IndexOption(click.ParamType):
    """A name and a number, true or false, or else text."""

    name = "NAME=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int | float | bool | str]:
        """``bits=9`` to ``("bits", 9)``."""
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            self.fail(f"{value!r} is not a setting such as tables=20.", param, ctx)
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = text
        return name.replace("-", "_"), parsed if isinstance(parsed, bool | int | float | str) else text


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for every field of `TrainConfig`; one that is not given is None."""
    hints = get_type_hints(TrainConfig)
    for item in reversed(dataclasses.fields(TrainConfig)):
        hint = hints[item.name]
        kind = next((k for k in get_args(hint) if k is not types.NoneType), hint) if get_args(hint) else hint
        flag = "--" + item.name.replace("_", "-")
        limits = item.metadata
        text = limits["help"]
        if item.default not in {None, dataclasses.MISSING}:
            shown = str(item.default).lower() if kind is bool else item.default
            text += f"  [default: {'none' if shown == () else shown}]"
        options: dict[str, Any] = {"default": None, "show_default": False, "help": text}
        if item.name == "dense_widths":
            options["type"] = Widths()
        elif item.name == "index_options":
            flag = "--index-option"
            options |= {"type": IndexOption(), "multiple": True, "callback": _as_table}
        elif kind is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        elif "choices" in limits:
            options["type"] = click.Choice(limits["choices"])
        else:
            options["type"] = kind
        command = click.option(flag, item.name, **options)(command)
    return command


def _as_table(
    _ctx: click.Context, _param: click.Parameter, pairs: tuple[tuple[str, Any], ...]
) -> dict[str, Any] | None:
    return dict(pairs) or None


@click.command(
    cls=Command,
    examples=(
        "slidex train data --out run",
        "slidex train data --out run --mode per_sample --epochs 3 --rehash drift",
    ),
)
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory to make.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Settings by name; options override them.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="TOML file of settings; options override it.",
)
@click.option("--resume", is_flag=True, help="Continue the run in --out from its newest checkpoint.")
@click.option("--print-config", is_flag=True, help="Print all settings as JSON and stop.")
@config_options
def train(
    data: Path,
    out: Path,
    preset: str | None,
    config: Path | None,
    resume: bool,
    print_config: bool,
    **given: Any,
) -> None:
    """Train a model on the prepared data set DATA.

    Settings come from options, then SLIDEX_TRAIN_* environment variables, then --config, then --preset, then the
    defaults. Ctrl-C and SIGTERM save the state first; continue with --resume.
    """
    settings = read_toml(config) if config else {}
    settings = merge_settings(settings, {name: value for name, value in given.items() if value is not None})
    if preset:
        settings = merge_settings(preset_settings(preset), settings)
    if resume:
        from slidex.train.run import Run  # noqa: PLC0415

        settings = merge_settings(Run.open(out).meta["config"], settings)
    chosen = TrainConfig.from_mapping(settings)
    if print_config:
        echo_json(chosen.to_mapping(), indent=1)
        return
    from slidex.cli.training_display import TrainingDisplay  # noqa: PLC0415
    from slidex.data import Dataset  # noqa: PLC0415
    from slidex.errors import CollapseWarning  # noqa: PLC0415
    from slidex.train.distributed import launched_processes  # noqa: PLC0415
    from slidex.train.loop import fit  # noqa: PLC0415

    with launched_processes() as processes, TrainingDisplay() as display, warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # the display shows it
        run = fit(Dataset.open(data), out, chosen, resume=resume, notify=display, processes=processes)
    if processes.main:
        click.echo(f"trained: {run.path}", err=True)

"""The command line: parse, call the library, map errors to exit codes.

Results go to standard output, progress and logs to standard error. Heavy modules are imported inside the commands,
so that ``--help`` answers at once.

Exit codes: 0 done, 1 handled failure, 2 usage or settings, 3 bad data, 4 diverged, 75 stopped by a signal after
saving, 130 and 143 stopped by Ctrl-C and SIGTERM without saving.
"""

from __future__ import annotations

import os

import click

from slidex import __version__
from slidex.cli.command import MainGroup
from slidex.cli.evaluate import evaluate
from slidex.cli.inspect import doctor, inspect
from slidex.cli.predict import predict
from slidex.cli.prepare import prepare
from slidex.cli.train import train
from slidex.cli.tune_index import tune_index


@click.group(
    cls=MainGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "SLIDEX",
        "show_default": True,
        "max_content_width": 110,
    },
    examples=(
        "slidex prepare python-source --out data",
        "slidex train data --out run && slidex eval run data",
    ),
)
@click.version_option(__version__, prog_name="slidex")
def main() -> None:
    """Train and serve classifiers with very many classes.

    Results go to standard output, progress and logs to standard error. Exit codes: 0 done, 1 failure, 2 wrong usage
    or settings, 3 bad data, 4 diverged, 75 stopped by a signal after saving, 130 and 143 stopped by Ctrl-C and
    SIGTERM with nothing to save.
    """
    # GNU OpenMP threads wait for work by spinning. torch and Numba have a pool each, and where another program wants
    # the cores too, spinning threads keep working ones from running: training was three times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


for command in (prepare, train, evaluate, tune_index, predict, inspect, doctor):
    main.add_command(command)

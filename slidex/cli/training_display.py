"""What a person sees while a model trains: one bar that counts steps, and a line for each report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from slidex.cli.progress import bar

if TYPE_CHECKING:
    from tqdm import tqdm

COMPILING = (
    "compiling kernels for this processor: up to a minute, once; later runs of the same kind load them"
)


class TrainingDisplay:
    """Told of the training's events (see `slidex.train.loop.Notify`); writes to standard error only."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._told = self._naming = False
        self._stage: str | None = None

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        """Shows one event."""
        if event == "start":
            config = facts["config"]
            self._line(
                f"mode {config['mode']}, {facts['total_steps']:,} steps of {config['batch_size']} rows, "
                f"precision {config['precision']}, index {config['index'] if config['mode'] != 'exact' else 'none'}"
                + (f", on {config['device']}" if config["device"] != "cpu" else "")
            )
            self._bar = bar(facts["total_steps"], "step", "train", initial=facts["step"])
        elif event == "compiling":
            self._compiling(facts["kernel"])
        elif event == "step" and self._bar is not None:
            if self._naming:
                self._bar.set_postfix_str("", refresh=False)
                self._naming = False
            self._bar.update(facts["step"] - self._bar.n)
        elif event == "report":
            self._line(report_line(facts))
        elif event == "validation":
            mark = " (best so far)" if facts["best"] else ""
            self._line(f"step {facts['step']:,}: validation P@1 {100 * facts['P@1']:.2f}{mark}")
        elif event == "ranker":
            self._ranker(facts)
        elif event == "warning":
            self._line(f"warning: step {facts['step']:,}: {facts['text']}")
        elif event == "message":
            self._line(facts["text"])

    def _compiling(self, kernel: str) -> None:
        """Says once what the wait is for; then the bar names each kernel, so that it moves."""
        if not self._told:
            self._line(COMPILING)
            self._told = True
        if self._bar is not None:
            self._bar.set_postfix_str(f"compiling {kernel}")
            self._naming = True

    def _ranker(self, facts: dict[str, Any]) -> None:
        """One more bar for each stage."""
        if self._bar is None or facts["stage"] != self._stage:
            if self._bar is not None:
                self._bar.close()
            self._stage = facts["stage"]
            unit = {"candidates": "row", "weights": "class", "groups": "group"}[facts["stage"]]
            self._bar = bar(facts["total"], unit, f"ranker: {facts['stage']}")
        self._bar.update(facts["done"] - self._bar.n)

    def _line(self, text: str) -> None:
        if self._bar is None or self._bar.disable:
            click.echo(text, err=True)
        else:
            self._bar.write(text, file=self._bar.fp)


def report_line(report: dict[str, Any]) -> str:
    """One report on one line."""
    shares = sorted(report["time_share"].items(), key=lambda item: -item[1])
    parts = [
        f"step {report['step']:,}",
        f"epoch {report['epoch']:.2f}",
        f"loss {report['loss']:.3f}",
        f"{report['samples_per_second']:,.0f} samples/s",
        f"{report['active_classes']:,.0f} active classes",
        f"{100 * report['classes_seen']:.0f} % of classes seen, {100 * report['epoch_coverage']:.0f} % in this epoch",
    ]
    if report["index_recall"] is not None:
        parts.append(f"index recall {report['index_recall']:.2f}")
    parts.append(
        "time: " + " ".join(f"{stage} {100 * share:.0f}" for stage, share in shares if share >= 0.02) + " %"
    )
    return " | ".join(parts)

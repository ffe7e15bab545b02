"""The training loop: batches in, steps, rehashes, validations, checkpoints, and a truthful account of all of it.

Everything random is a function of (seed, step), and the order of rows one of (seed, epoch), so the state to save is
weights, moments, hash codes and a few counters, and a resumed run takes the very steps it would have taken.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slidex.errors import CheckpointError, CollapseWarning, DataError, DivergedError, InterruptedRunError
from slidex.kernels import StepSettings
from slidex.kernels.compiling import compilations
from slidex.lsh import recall_at_k
from slidex.metrics import MetricAccumulator
from slidex.nn.class_record import NEGATIVE, SEEN, ClassRecord
from slidex.nn.classifier import Classifier
from slidex.nn.rehash import Rehasher
from slidex.train.checkpoint import list_checkpoints, prune_checkpoints, save_checkpoint, write_atomically
from slidex.train.coverage import CollapseWatch
from slidex.train.dense_adam import DenseAdam
from slidex.train.queries import draw_queries
from slidex.train.run import Run, fingerprint
from slidex.train.settle import (
    STREAM_ORDER,
    STREAM_PROBE,
    STREAM_VALID,
    counter_rng,
    learning_rate,
    settle,
)
from slidex.train.signals import SignalCatcher
from slidex.train.state import collect_state, newest_sound_checkpoint, restore_state
from slidex.train.telemetry import Interval

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from slidex.data import Dataset
    from slidex.data.csr import CsrArrays
    from slidex.lsh.index import QuerySample
    from slidex.train.config import TrainConfig

Notify = Callable[[str, dict[str, Any]], None]
"""Called with an event and its facts: ``compiling`` (a kernel, before or in the first steps), ``start``, ``message``,
``step``, ``report``, ``epoch``, ``warning``, ``validation``, ``checkpoint``."""

PROBE_ROWS, PROBE_K = 256, 10
"""The probe: the exact top 10 of so many training rows (or of a batch, if that is smaller)."""
PROBE_SHARE = 0.02
"""The index's recall is probed against exact top-k as long as that takes no more than this share of the time."""
RESUME_MAY_CHANGE = {
    "epochs",
    "max_steps",
    "patience",
    "checkpoint_every",
    "keep_last",
    "report_every",
    "threads",
}


def fit(
    dataset: Dataset,
    out: str | Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    notify: Notify | None = None,
) -> Run:
    """Trains a model and leaves it in a run directory.

    Args:
        dataset: With a ``train`` split.
        out: The run directory; must not hold anything yet, unless `resume`.
        config: All settings.
        resume: Continue from the newest checkpoint in `out` that passes its checksums. `config` must equal the
            run's own, except for settings that say how long to train and how often to report.
        notify: Told of everything that happens, as it happens.

    Returns:
        The run, with at least one checkpoint.

    Raises:
        CheckpointError: if `out` is in the way, or does not fit `dataset` and `config` when resuming.
        ConfigError: if settings do not fit each other or the data set; nothing has been written then.
        DataError: if no training row has a label.
        DivergedError: if the loss becomes non-finite; the step's update is not applied.
        InterruptedRunError: after SIGTERM or Ctrl-C, when the state has been saved.

    Warns:
        CollapseWarning: if few classes are ever negatives, or accuracy falls while the loss does.
    """
    config, tell = settle(config, dataset), notify or (lambda *_: None)
    with compilations(lambda kernel: tell("compiling", {"kernel": kernel})):
        if resume:
            run = Run.open(out)
            _check_same_run(run, dataset, config)
            return Trainer(dataset, config, tell).fit(run, resume=True)
        trainer = Trainer(dataset, config, tell)
        return trainer.fit(Run.create(out, config, dataset), resume=False)


class Trainer:
    """One run in progress. Use `fit`; this class is its parts by name."""

    run: Run

    def __init__(self, dataset: Dataset, config: TrainConfig, notify: Notify) -> None:
        self.config, self.notify = config, notify
        self.train_split = dataset.split("train")
        self.class_counts = dataset.class_counts()
        self.num_classes = dataset.num_classes
        self.rows, self.valid = self._split_rows(dataset)
        self.model = Classifier.from_config(
            config, dataset.num_features, dataset.num_classes, self.class_counts
        )
        trained = [parameter for parameter in self.model.encoder.parameters() if parameter.requires_grad]
        self.dense_optimizer = DenseAdam(trained, config.beta1, config.beta2, config.epsilon)
        self.steps_per_epoch = math.ceil(len(self.rows) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.record = ClassRecord(dataset.num_classes)
        self.collapse = CollapseWatch(config, dataset.num_classes)
        self.rehasher: Rehasher | None = None
        if self.model.index is not None:
            self.rehasher = Rehasher(
                config, self.model.index, self.model.head, self.record, self._query_sample
            )
        self.step = 0
        self.bad_validations = 0
        self.seconds = 0.0
        self.interval = Interval()
        self._probe_seconds = 0.0
        self._kept_order = -1, self.rows

    def fit(self, run: Run, *, resume: bool) -> Run:
        """Trains to the end, writing into `run`; see `fit`."""
        self.run = run
        if resume:
            self._resume()
        facts = {"step": self.step, "total_steps": self.total_steps, "config": self.config.to_mapping()}
        self.notify("start", facts)
        started = time.perf_counter() - self.seconds
        with SignalCatcher() as signals:
            for batch_x, batch_y in self.batches():
                self.train_step(batch_x, batch_y)
                self.seconds = time.perf_counter() - started
                if self.step == self.total_steps or self.step % self.config.report_every == 0:
                    self._report()
                epoch_end = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
                if epoch_end:
                    self._end_epoch()
                stop = False
                if self.valid is not None and self._every(self.config.valid_every, epoch_end):
                    stop = self._validate(*self.valid)
                last = stop or self.step == self.total_steps
                if last or signals.received or self._every(self.config.checkpoint_every, epoch_end):
                    self._save()
                if signals.received and not last:
                    raise InterruptedRunError(
                        f"stopped by {signals.received} after step {self.step:,}; the state is saved. "
                        f"Continue with: slidex train DATA --out {self.run.path} --resume"
                    )
                if last:
                    break
        return self.run

    def _every(self, steps: int | None, epoch_end: bool) -> bool:
        return epoch_end if steps is None else self.step % steps == 0

    def _split_rows(self, dataset: Dataset) -> tuple[np.ndarray, tuple[CsrArrays, CsrArrays] | None]:
        """Ids of the training rows that have a label, and features and labels of the validation rows."""
        labels_per_row = np.diff(self.train_split.y.indptr)
        rows = np.flatnonzero(labels_per_row)
        if len(rows) == 0:
            raise DataError("no row of the train split has a label.", path=dataset.path)
        rng = counter_rng(self.config.seed, STREAM_VALID, 0)
        if "valid" in dataset.splits:
            split = dataset.split("valid")
            chosen = np.arange(split.num_rows)
        elif self.config.valid_fraction > 0:
            split = self.train_split
            chosen = rng.choice(rows, max(1, int(len(rows) * self.config.valid_fraction)), replace=False)
            rows = np.setdiff1d(rows, chosen)
        elif self.config.patience is None:
            return rows, None
        else:
            raise DataError(
                "the 'patience' setting needs validation rows: give 'valid_fraction', or prepare a valid split.",
                path=dataset.path,
            )
        if len(chosen) > self.config.valid_rows:
            chosen = rng.choice(chosen, self.config.valid_rows, replace=False)
        return rows, (split.x.take(chosen), split.y.take(chosen))

    def batches(self) -> Iterator[tuple[CsrArrays, CsrArrays]]:
        """Batches from the current step to the last, the next one read while this one trains."""

        def read(step: int) -> tuple[CsrArrays, CsrArrays]:
            epoch, position = divmod(step, self.steps_per_epoch)
            first = position * self.config.batch_size
            chosen = np.sort(self._order(epoch)[first : first + self.config.batch_size])
            return self.train_split.x.take(chosen), self.train_split.y.take(chosen)

        with ThreadPoolExecutor(1) as pool:
            upcoming = None
            for step in range(self.step, self.total_steps):
                batch = upcoming.result() if upcoming is not None else read(step)
                upcoming = pool.submit(read, step + 1) if step + 1 < self.total_steps else None
                self.interval.watch.lap("data")
                yield batch

    def _order(self, epoch: int) -> np.ndarray:
        """Order of the training rows in an epoch; the one asked for last is kept."""
        if self._kept_order[0] != epoch:
            order = counter_rng(self.config.seed, STREAM_ORDER, epoch).permutation(self.rows)
            self._kept_order = epoch, order
        return self._kept_order[1]

    def train_step(self, x: CsrArrays, y: CsrArrays) -> None:
        """One step; `self.step` counts steps taken, so the step at hand has the next number."""
        step, model, watch = self.step + 1, self.model, self.interval.watch
        watch.lap("other")
        self._rehash()
        watch.lap("rehash")
        hidden_ND, graph = model.encoder.forward_train(x, step)
        watch.lap("encoder")
        scored = model.head.score(hidden_ND, y, step)
        watch.lap("kernel")
        watch.move("kernel", "query", scored.query_seconds)
        loss = float(scored.loss_N.sum())
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of step {step:,} is {loss}; its update was not applied. "
                f"Lower 'learning_rate' (now {self.config.learning_rate:g}) or set 'warmup'."
            )
        settings = self._step_settings(step)
        grad_hidden_ND = model.head.update(scored, settings)
        watch.lap("update")
        model.encoder.backward(graph, grad_hidden_ND, settings)
        self.dense_optimizer.step(settings.learning_rate)
        self.dense_optimizer.zero_grad()
        watch.lap("encoder")
        self.step = step
        self.record.note(scored.ids, y)
        self.collapse.note_loss(loss, x.num_rows)
        interval = self.interval
        interval.rows += x.num_rows
        interval.loss += loss
        interval.active += scored.active * x.num_rows
        self.notify("step", {"step": step, "loss": loss / x.num_rows})
        watch.lap("other")

    def _step_settings(self, step: int) -> StepSettings:
        config = self.config
        return StepSettings(
            learning_rate=learning_rate(config, step, self.total_steps),
            beta1=config.beta1,
            beta2=config.beta2,
            epsilon=config.epsilon,
            step=step,
            weight_decay=config.weight_decay,
        )

    def _rehash(self) -> None:
        done = self.rehasher.rehash_if_due(self.step) if self.rehasher is not None else None
        if done is not None:
            self.interval.rehashes += 1
            self.interval.index_updates += done.updated
            self.interval.rows_rehashed += done.rows

    def _query_sample(self, step: int) -> QuerySample:
        split, config = self.train_split, self.config
        return draw_queries(
            self.model.encoder, split.x, split.y, self.rows, config.index_sample, seed=config.seed, step=step
        )

    def _report(self) -> None:
        recall = self._probe_recall()
        self.interval.watch.lap("other")
        report = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "seconds": round(self.seconds, 3),
            "learning_rate": learning_rate(self.config, self.step, self.total_steps),
            "index_recall": recall,
            "classes_seen": self.record.share(SEEN),
            "epoch_coverage": self.record.share(NEGATIVE),
            **self.interval.facts(),
        }
        self._log("report", report)
        self.interval = Interval()

    def _end_epoch(self) -> None:
        """Logs the share of classes that were negatives since the epoch began, and begins a new one."""
        epoch = math.ceil(self.step / self.steps_per_epoch)
        steps = self.step - (epoch - 1) * self.steps_per_epoch
        coverage = self.record.share(NEGATIVE)
        self._log("epoch", {"epoch": epoch, "step": self.step, "epoch_coverage": coverage})
        self._warn(self.collapse.epoch_ended(epoch, steps, coverage))
        self.record.clear(NEGATIVE)
        self.interval.watch.lap("other")

    def _warn(self, text: str | None) -> None:
        if text is not None:
            self._log("warning", {"step": self.step, "text": text})
            warnings.warn(text, CollapseWarning, stacklevel=2)

    def _probe_recall(self) -> float | None:
        """Share of a few rows' exact top 10 that the index proposes for them as it does in training."""
        index, head = self.model.index, self.model.head
        budget = head.selector.retrieved if head.selector is not None else 0
        if index is None or budget == 0 or self._probe_seconds > PROBE_SHARE * self.seconds:
            return None
        started = time.perf_counter()
        rng = counter_rng(self.config.seed, STREAM_PROBE, 0)
        size = min(PROBE_ROWS, self.config.batch_size, len(self.rows))
        chosen = np.sort(rng.choice(self.rows, size, replace=False))
        with torch.no_grad():
            hidden_ND = self.model.encoder(self.train_split.x.take(chosen))
            _, exact_NK = head.topk(hidden_ND, PROBE_K)
        if head.mode == "shared":
            pool = index.pool(hidden_ND, budget)
            recall = float(torch.isin(exact_NK, pool)[exact_NK >= 0].float().mean())
        else:
            recall = recall_at_k(index.query(hidden_ND, budget), exact_NK)
        self._probe_seconds += time.perf_counter() - started
        return recall

    def _validate(self, x: CsrArrays, y: CsrArrays) -> bool:
        """Logs the accuracy on validation rows, notes the best; True if training should stop early."""
        metrics = MetricAccumulator(self.class_counts, len(self.rows), ks=(1, 3, 5))
        first = 0
        for _, ids in self.model.topk(x, 5):
            metrics.update(ids.numpy(), y.slice(first, first + len(ids)))
            first += len(ids)
        result = metrics.compute()
        best = self.run.best()
        improved = best is None or result["P@1"] > best["P@1"]
        self.bad_validations = 0 if improved else self.bad_validations + 1
        event = {"step": self.step, "seconds": round(self.seconds, 3), "rows": x.num_rows, "best": improved}
        self._log("validation", event | {name: result[name] for name in ("P@1", "P@3", "P@5")})
        self._warn(self.collapse.validated(result["P@1"], x.num_rows))
        if improved:
            self._save()
            text = json.dumps({"step": self.step, "P@1": result["P@1"]})
            write_atomically(self.run.path / "best.json", text)
        self.interval.watch.lap("validation")
        return self.config.patience is not None and self.bad_validations >= self.config.patience

    def _log(self, kind: str, facts: dict[str, Any]) -> None:
        with (self.run.path / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": kind, **facts}) + "\n")
        self.notify(kind, facts)

    def _save(self) -> None:
        """Takes a checkpoint, unless there is one of this step; drops those no longer wanted."""
        if self.step in {checkpoint.step for checkpoint in list_checkpoints(self.run.checkpoints)}:
            return
        saved = save_checkpoint(self.run.checkpoints, self.step, *collect_state(self))
        best = self.run.best()
        prune_checkpoints(self.run.checkpoints, self.config.keep_last, best["step"] if best else None)
        self._log("checkpoint", {"step": self.step, "path": saved.path.name})
        self.interval.watch.lap("checkpoint")

    def _resume(self) -> None:
        checkpoint = newest_sound_checkpoint(
            self.run.checkpoints, lambda text: self.notify("message", {"text": text})
        )
        if checkpoint is None:
            text = "the run has no checkpoint yet: starting at its first step"
        else:
            restore_state(self, checkpoint)
            text = f"resumed from {checkpoint.path.name}"
        self.notify("message", {"text": text})


def _check_same_run(run: Run, dataset: Dataset, config: TrainConfig) -> None:
    """CheckpointError if the run was made from other data or with other settings."""
    if run.meta["data"]["fingerprint"] != fingerprint(dataset):
        raise CheckpointError(f"{run.path}: was trained on another data set ({run.meta['data']['path']}).")
    old, new = run.config.to_mapping(), config.to_mapping()
    for name in old.keys() | new.keys():
        if name not in RESUME_MAY_CHANGE and old.get(name) != new.get(name):
            raise CheckpointError(
                f"{run.path}: cannot be resumed with {name} = {new.get(name)!r}; the run has {old.get(name)!r}."
            )

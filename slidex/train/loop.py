"""The training loop: batches in, steps, rehashes, validations, checkpoints, and a truthful account of all of it.

Everything random is a function of (seed, step), and the order of rows one of (seed, epoch), so the state to save is
weights, moments, hash codes and a few counters, and a resumed run takes the very steps it would have taken.

On several processes all run this loop in step (`slidex.train.distributed`): each encodes its rows of a batch and scores
all rows on its classes. Process 0 writes and speaks.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slidex.data.csr import CsrArrays
from slidex.errors import CollapseWarning, InterruptedRunError, LostPeerError
from slidex.kernels import StepSettings
from slidex.kernels.compiling import compilations
from slidex.kernels.dense_adam import DenseAdam
from slidex.metrics import MetricAccumulator
from slidex.nn import placement as placements
from slidex.nn.class_record import NEGATIVE, SEEN, ClassRecord
from slidex.nn.classifier import Classifier
from slidex.nn.rehash import Rehasher
from slidex.train.batches import BatchReader
from slidex.train.checkpoint import (
    Checkpoint,
    list_checkpoints,
    prune_checkpoints,
    save_checkpoint,
    write_atomically,
)
from slidex.train.config import TrainConfig
from slidex.train.coverage import CollapseWatch
from slidex.train.distributed import Solo
from slidex.train.loss_check import LossCheck
from slidex.train.placing import place_model
from slidex.train.probe import RecallProbe
from slidex.train.queries import draw_queries, own_classes
from slidex.train.ranking import fit_ranker
from slidex.train.rows import split_rows
from slidex.train.run import Run, check_same_run
from slidex.train.settle import learning_rate, settle
from slidex.train.signals import SignalCatcher
from slidex.train.state import collect_state, newest_sound_checkpoint, restore_state
from slidex.train.telemetry import Interval

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slidex.data import Dataset
    from slidex.lsh.index import QuerySample
    from slidex.nn.bag_inputs import BagInputs
    from slidex.nn.device_labels import DeviceLabels
    from slidex.train.batches import Batch

Notify = Callable[[str, dict[str, Any]], None]
"""Called with an event and its facts: ``compiling`` (a kernel, before or in the first steps), ``start``, ``message``,
``step`` (without its loss on a GPU, which is not waited for), ``report``, ``epoch``, ``warning``, ``validation``,
``checkpoint``; then ``ranker``."""


def fit(
    dataset: Dataset,
    out: str | Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    notify: Notify | None = None,
    processes: Solo | None = None,
) -> Run:
    """Trains a model and leaves it in a run directory.

    Args:
        dataset: With a ``train`` split.
        out: The run directory; must not hold anything yet, unless `resume`.
        config: All settings.
        resume: Continue from the newest checkpoint in `out` that passes its checksums. `config` must equal the
            run's own, except for settings that say how long to train and how often to report.
        notify: Told of everything that happens, as it happens; in process 0 alone.
        processes: `slidex.train.distributed.Ranks` where all processes of a group call this, with equal arguments, to
            train one model together; `out` must be one directory for all. None is this process alone.

    Returns:
        The run, with at least one checkpoint.

    Raises:
        CheckpointError: if `out` is in the way, or does not fit `dataset` and `config` when resuming.
        ConfigError: if settings do not fit each other or the data set; nothing has been written then.
        DataError: if no training row has a label.
        DivergedError: if the loss becomes non-finite; the step's update is not applied, or on a GPU, where it is found
            out a few steps later, not saved.
        DeviceError: if the GPU that `config` asks for cannot be used, or has too little memory.
        MissingExtraError: if packages for it are not installed.
        InterruptedRunError: after SIGTERM or Ctrl-C, when the state has been saved.
        LostPeerError: if another process has ended; says how to go on.

    Warns:
        CollapseWarning: if few classes are ever negatives, or accuracy falls while the loss does.
    """
    ranks = processes or Solo()
    config = TrainConfig.from_mapping(ranks.on_main(settle(config, dataset, ranks).to_mapping))
    tell = notify if notify is not None and ranks.main else _say_nothing
    with compilations(lambda kernel: tell("compiling", {"kernel": kernel})):
        run = Run.open(out) if resume else None
        if run is not None:
            check_same_run(run, dataset, config)
        trainer = Trainer(dataset, config, tell, ranks)
        run = run or Run(Path(out), ranks.on_main(lambda: Run.create(out, config, dataset).meta))
        trainer.fit(run, resume=resume)
        del trainer  # with the optimizer's state: the ranker needs the memory
        if config.ranker_candidates and ranks.main:  # nobody waits for it
            fit_ranker(run, dataset, tell)
        return run


class Trainer:
    """One run in progress. Use `fit`; this class is its parts by name."""

    run: Run

    def __init__(
        self, dataset: Dataset, config: TrainConfig, notify: Notify, ranks: Solo | None = None
    ) -> None:
        self.config, self.notify, self.ranks = config, notify, ranks or Solo()
        self.train_split = dataset.split("train")
        self.class_counts = dataset.class_counts()
        self.num_classes = dataset.num_classes
        self.rows, self.valid = split_rows(dataset, config)
        self.shard = self.ranks.shard(dataset.num_classes)
        self.placement = placements.place(torch.device(config.device))
        sizes = dataset.num_features, dataset.num_classes, self.class_counts
        device = "cpu" if self.placement.waits else "meta"  # drawn on a GPU, once it is known to have room
        self.model = Classifier.from_config(config, *sizes, self.shard, device=device)
        self.record = ClassRecord(len(self.model.head.weight))  # of this process's classes
        place_model(self.model, self.record, self.placement, config, dataset)
        self._loss = LossCheck(self.placement, config.learning_rate)
        rules = self.model.encoder.rules
        self._reader = BatchReader(self.train_split, self.rows, config, rules, self.placement)
        trained = [parameter for parameter in self.model.encoder.parameters() if parameter.requires_grad]
        self.dense_optimizer = DenseAdam(trained, config.beta1, config.beta2, config.epsilon)
        self.steps_per_epoch = math.ceil(len(self.rows) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
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
        self._probe = RecallProbe()

    def fit(self, run: Run, *, resume: bool) -> None:
        """Trains to the end, writing into `run`; see `fit`."""
        self.run = run
        try:
            self._train(resume)
        except LostPeerError as error:
            saved = list_checkpoints(run.checkpoints)
            at = (
                f"the newest checkpoint is of step {saved[-1].step:,}"
                if saved
                else "there is no checkpoint yet"
            )
            raise LostPeerError(
                f"{error} Training has stopped after step {self.step:,}; {at}. Continue with the same command and "
                "--resume, on any number of processes."
            ) from error

    def _train(self, resume: bool) -> None:
        if resume:
            self._resume()
        start = {"step": self.step, "total_steps": self.total_steps}
        self.notify("start", start | {"config": self.config.to_mapping()})
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
                received = self.ranks.agree_signal(signals.received)
                if last or received or self._every(self.config.checkpoint_every, epoch_end):
                    self._save()
                if received and not last:
                    raise InterruptedRunError(
                        f"stopped by {received} after step {self.step:,}; the state is saved. "
                        f"Continue with: slidex train DATA --out {self.run.path} --resume"
                    )
                if last:
                    break

    def _every(self, steps: int | None, epoch_end: bool) -> bool:
        return epoch_end if steps is None else self.step % steps == 0

    def batches(self) -> Iterator[Batch]:
        """Batches from the current step to the last, the next one read while this one trains."""
        for batch in self._reader.batches(self.step, self.total_steps, self.steps_per_epoch):
            self.interval.watch.lap("data")
            yield batch

    def train_step(self, x: CsrArrays | BagInputs, y: CsrArrays | DeviceLabels) -> None:
        """One step; `self.step` counts steps taken, so the step at hand has the next number."""
        step, model, watch, ranks = self.step + 1, self.model, self.interval.watch, self.ranks
        watch.lap("other")
        self._rehash()
        watch.lap("rehash")
        own = ranks.rows(x.num_rows)
        hidden_ND, graph = model.encoder.forward_train(x, step, own)
        watch.lap("encoder")
        hidden_ND = ranks.gather_rows(hidden_ND, x.num_rows)
        watch.lap(ranks.waiting_stage)
        scored = model.head.score(hidden_ND, y, step)
        watch.lap("kernel")
        watch.move("kernel", "query", scored.query_seconds)
        loss = self._loss.total(scored, step)
        settings = self._step_settings(step)
        grad_hidden_ND = model.head.update(scored, settings)
        watch.lap("update")
        grad_hidden_ND = ranks.add(grad_hidden_ND)[own]
        watch.lap(ranks.waiting_stage)
        model.encoder.backward(
            graph, grad_hidden_ND, settings, lambda grad_ND: ranks.gather_rows(grad_ND, x.num_rows)
        )
        ranks.add_gradients(model.encoder.dense.parameters())
        self.dense_optimizer.step(settings.learning_rate)
        self.dense_optimizer.zero_grad()
        watch.lap("encoder")
        self.step = step
        if self.shard is not None and isinstance(y, CsrArrays):
            y = self.shard.local(y)
        self.record.note(scored.ids, y)
        self.collapse.note_loss(loss, x.num_rows)
        interval = self.interval
        interval.rows += x.num_rows
        interval.loss += loss
        interval.active += scored.active * x.num_rows
        told = {} if isinstance(loss, torch.Tensor) else {"loss": loss / x.num_rows}
        self.notify("step", {"step": step, **told})
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
            seed=config.seed,
        )

    def _rehash(self) -> None:
        done = self.rehasher.rehash_if_due(self.step) if self.rehasher is not None else None
        if done is not None:
            self.interval.rehashes += 1
            self.interval.index_updates += done.updated
            self.interval.rows_rehashed += done.rows

    def _query_sample(self, step: int) -> QuerySample:
        split, config = self.train_split, self.config
        sample = draw_queries(
            self.model.encoder, split.x, split.y, self.rows, config.index_sample, seed=config.seed, step=step
        )
        return sample if self.shard is None else own_classes(sample, self.shard)

    def _shares(self, *bits: int) -> list[float]:
        """Shares of the classes of all processes that have the bits."""
        counts = self.ranks.totals(*(self.record.count(bit) for bit in bits))
        return [count / self.num_classes for count in counts]

    def _report(self) -> None:
        self._loss.settle()
        recall = self._probe.recall(self)
        seen, covered = self._shares(SEEN, NEGATIVE)
        self.interval.add_up(self.ranks)
        self.interval.watch.lap("other")
        report = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "seconds": round(self.seconds, 3),
            "learning_rate": learning_rate(self.config, self.step, self.total_steps),
            "index_recall": recall,
            "classes_seen": seen,
            "epoch_coverage": covered,
            **self.interval.facts(),
        }
        self._log("report", report)
        self.interval = Interval()

    def _end_epoch(self) -> None:
        """Logs the share of classes that were negatives since the epoch began, and begins a new one."""
        epoch = math.ceil(self.step / self.steps_per_epoch)
        steps = self.step - (epoch - 1) * self.steps_per_epoch
        (coverage,) = self._shares(NEGATIVE)
        self._log("epoch", {"epoch": epoch, "step": self.step, "epoch_coverage": coverage})
        self._warn(self.collapse.epoch_ended(epoch, steps, coverage))
        self.record.clear(NEGATIVE)
        self.interval.watch.lap("other")

    def _warn(self, text: str | None) -> None:
        if text is not None:
            self._log("warning", {"step": self.step, "text": text})
        if text is not None and self.ranks.main:
            warnings.warn(text, CollapseWarning, stacklevel=2)

    def _validate(self, x: CsrArrays, y: CsrArrays) -> bool:
        """Logs the accuracy on validation rows, notes the best; True if training should stop early."""
        self._loss.settle()
        best = [ids for _, ids in self.model.topk(x, 5)]
        p_at_1, improved = self.ranks.on_main(lambda: self._judge(best, y))
        self.bad_validations = 0 if improved else self.bad_validations + 1
        if improved:
            self._save()
            text = json.dumps({"step": self.step, "P@1": p_at_1})
            self.ranks.on_main(lambda: write_atomically(self.run.path / "best.json", text))
        self.interval.watch.lap("validation")
        return self.config.patience is not None and self.bad_validations >= self.config.patience

    def _judge(self, best: list[torch.Tensor], y: CsrArrays) -> tuple[float, bool]:
        """Logs what the best classes of validation rows are worth: P@1, and whether it is the highest so far."""
        metrics = MetricAccumulator(self.class_counts, len(self.rows), ks=(1, 3, 5))
        first = 0
        for ids in best:
            metrics.update(ids.numpy(), y.slice(first, first + len(ids)))
            first += len(ids)
        result, before = metrics.compute(), self.run.best()
        improved = before is None or result["P@1"] > before["P@1"]
        event = {"step": self.step, "seconds": round(self.seconds, 3), "rows": y.num_rows, "best": improved}
        self._log("validation", event | {name: result[name] for name in ("P@1", "P@3", "P@5")})
        self._warn(self.collapse.validated(result["P@1"], y.num_rows))
        return result["P@1"], improved

    def _log(self, kind: str, facts: dict[str, Any]) -> None:
        if not self.ranks.main:
            return
        with (self.run.path / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": kind, **facts}) + "\n")
        self.notify(kind, facts)

    def _save(self) -> None:
        """Takes a checkpoint, unless there is one of this step; drops those no longer wanted."""
        self._loss.settle()
        if self.ranks.on_main(lambda: self.step in {c.step for c in list_checkpoints(self.run.checkpoints)}):
            return
        saved = save_checkpoint(self.run.checkpoints, self.step, *collect_state(self), self.ranks)
        if self.ranks.main:
            best = self.run.best()
            prune_checkpoints(self.run.checkpoints, self.config.keep_last, best["step"] if best else None)
        self._log("checkpoint", {"step": self.step, "path": saved.path.name})
        self.interval.watch.lap("checkpoint")

    def _resume(self) -> None:
        def newest() -> str | None:
            found = newest_sound_checkpoint(self.run.checkpoints, self._say)
            return None if found is None else found.path.name

        name = self.ranks.on_main(newest)
        if name is None:
            self._say("the run has no checkpoint yet: starting at its first step")
        else:
            restore_state(self, Checkpoint(self.run.checkpoints / name), self._say)
            self._say(f"resumed from {name}")

    def _say(self, text: str) -> None:
        self.notify("message", {"text": text})


def _say_nothing(_event: str, _facts: dict[str, Any]) -> None:
    """A `Notify` for those who do not listen."""

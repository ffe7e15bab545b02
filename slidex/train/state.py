"""A trainer's state as tensors and JSON values, and back: all that the next step depends on.

Random numbers and the order of rows are functions of (seed, step), so they are not part of it. The index is: it was
built from older weights than the current ones.

A run on a GPU saves what one on the CPU saves, and either resumes the other's.

On several processes each has the rows, moments, record and index of its own classes; all else is the same in all of
them, and process 0 saves it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slidex.errors import CheckpointError
from slidex.kernels import RowState
from slidex.train.checkpoint import Checkpoint, list_checkpoints, part_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from slidex.train.loop import Trainer


def collect_state(trainer: Trainer) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """This process's tensors by file and name, and JSON values, as `save_checkpoint` takes them."""
    encoder, head, index, ranks = (
        trainer.model.encoder,
        trainer.model.head,
        trainer.model.index,
        trainer.ranks,
    )
    flags_C1 = trainer.record.flags_C1
    tensors = {
        "head": head.state_dict(),
        "optimizer": _moments({"weight": head.weight_state, "bias": head.bias_state}),
        "progress": {"classes": flags_C1 if trainer.shard is None else flags_C1[:-1]},
    }
    if index is not None:
        tensors["index"] = index.state()
    tensors = {part_name(name, ranks): on_cpu(group) for name, group in tensors.items()}
    if ranks.main:
        moments = _moments({"bag": encoder.bag_state})
        for name, parameter in encoder.named_parameters():
            for part, value in trainer.dense_optimizer.state.get(parameter, {}).items():
                moments[f"dense.{name}.{part}"] = value
        tensors["encoder"] = on_cpu(encoder.state_dict())
        tensors["optimizer"] = tensors.get("optimizer", {}) | on_cpu(moments)
    values: dict[str, Any] = {
        "step": trainer.step,
        "total_steps": trainer.total_steps,
        "seconds": trainer.seconds,
        "bad_validations": trainer.bad_validations,
        "collapse": trainer.collapse.state_dict(),
    }
    if trainer.rehasher is not None:
        schedules = ranks.everywhere(trainer.rehasher.state_dict)
        values["rehash"] = schedules[0] if ranks.size == 1 else schedules
    return tensors, values


def restore_state(trainer: Trainer, checkpoint: Checkpoint, say: Callable[[str], None]) -> None:
    """Puts a trainer of the same settings where the checkpoint was taken; `say` is told if that is not exact."""
    encoder, head = trainer.model.encoder, trainer.model.head
    values = checkpoint.state()
    trainer.step, trainer.seconds = values["step"], values["seconds"]
    trainer.bad_validations = values["bad_validations"]
    trainer.collapse.load_state_dict(values["collapse"])
    encoder.load_state_dict(checkpoint.tensors("encoder"))
    begin, end = (0, head.num_classes) if trainer.shard is None else (trainer.shard.begin, trainer.shard.end)
    head.load_state_dict(checkpoint.rows("head", ("weight", "bias"), begin, end))
    # One process also keeps the flag at the end, which is of no class.
    flags = checkpoint.rows("progress", ("classes",), begin, end + 1)["classes"]
    trainer.record.flags_C1[: len(flags)] = flags
    _restore_moments(trainer, checkpoint, begin, end)
    if trainer.rehasher is not None:
        _restore_index(trainer, checkpoint, values["rehash"], say)


def _restore_index(trainer: Trainer, checkpoint: Checkpoint, saved: Any, say: Callable[[str], None]) -> None:
    index, head, rehasher, ranks = (
        trainer.model.index,
        trainer.model.head,
        trainer.rehasher,
        trainer.ranks,
    )
    if index is None or rehasher is None:
        return
    schedules = saved if isinstance(saved, list) else [saved]
    if checkpoint.processes == ranks.size:
        rehasher.load_state_dict(schedules[ranks.rank])
        index.load_state(checkpoint.tensors(part_name("index", ranks)), head.weight, head.bias)
        return
    say(
        f"the checkpoint was written by {checkpoint.processes} processes, this job has {ranks.size}: "
        "the index is built anew, and other classes are drawn"
    )
    rehasher.load_state_dict(schedules[0])
    rehasher.build(trainer.step)


def _restore_moments(trainer: Trainer, checkpoint: Checkpoint, begin: int, end: int) -> None:
    head, encoder = trainer.model.head, trainer.model.encoder
    own = {"weight": head.weight_state, "bias": head.bias_state}
    moments = checkpoint.rows("optimizer", tuple(_moments(own)), begin, end)
    moments |= checkpoint.tensors("optimizer", ("bag.", "dense."))
    for name, state in {**own, "bag": encoder.bag_state}.items():
        state.moment1.copy_(moments[f"{name}.moment1"])
        state.moment2.copy_(moments[f"{name}.moment2"])
    for name, parameter in encoder.named_parameters():
        prefix = f"dense.{name}."
        parts = {key.removeprefix(prefix): moments[key] for key in moments if key.startswith(prefix)}
        if parts:
            trainer.dense_optimizer.restore(parameter, parts)


def on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, those of a GPU copied: a checkpoint is that of any device."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _moments(states: Mapping[str, RowState]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": getattr(state, part) for name, state in states.items() for part in RowState._fields
    }


def newest_sound_checkpoint(directory: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that passes its checksums, or None if there is no checkpoint at all.

    One that was altered is moved aside, and `say` told of it.

    Raises:
        CheckpointError: if there are checkpoints, and all of them were altered.
    """
    checkpoints = list_checkpoints(directory)
    for checkpoint in reversed(checkpoints):
        try:
            checkpoint.verify()
        except CheckpointError as error:
            aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
            checkpoint.path.rename(aside)
            say(f"{error} Moved to {aside.name}; trying an older checkpoint.")
        else:
            return checkpoint
    if checkpoints:
        raise CheckpointError(f"{directory}: holds no checkpoint that is as it was written.")
    return None

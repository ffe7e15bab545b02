"""A trainer's state as tensors and JSON values, and back: all that the next step depends on.

Random numbers and the order of rows are functions of (seed, step), so they are not part of it. The index is: it was
built from older weights than the current ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from slidex.errors import CheckpointError
from slidex.train.checkpoint import Checkpoint, list_checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from slidex.kernels import RowState
    from slidex.train.loop import Trainer


def collect_state(trainer: Trainer) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Tensors by file and name, and JSON values, as `save_checkpoint` takes them."""
    encoder, head, index = trainer.model.encoder, trainer.model.head, trainer.model.index
    moments = {
        f"{name}.{part}": getattr(state, part)
        for name, state in _row_states(trainer).items()
        for part in ("moment1", "moment2")
    }
    for name, parameter in encoder.named_parameters():
        for part, value in trainer.dense_optimizer.state.get(parameter, {}).items():
            moments[f"dense.{name}.{part}"] = value
    tensors = {
        "encoder": encoder.state_dict(),
        "head": head.state_dict(),
        "optimizer": moments,
        "progress": {"classes": torch.from_numpy(trainer.record.flags_C1)},
    }
    if index is not None:
        tensors["index"] = index.state()
    values = {
        "step": trainer.step,
        "total_steps": trainer.total_steps,
        "seconds": trainer.seconds,
        "bad_validations": trainer.bad_validations,
        "collapse": trainer.collapse.state_dict(),
    }
    if trainer.rehasher is not None:
        values["rehash"] = trainer.rehasher.state_dict()
    return tensors, values


def restore_state(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Puts a trainer of the same settings where the checkpoint was taken."""
    encoder, head, index = trainer.model.encoder, trainer.model.head, trainer.model.index
    values = checkpoint.state()
    trainer.step, trainer.seconds = values["step"], values["seconds"]
    trainer.bad_validations = values["bad_validations"]
    trainer.collapse.load_state_dict(values["collapse"])
    if trainer.rehasher is not None:
        trainer.rehasher.load_state_dict(values["rehash"])
    encoder.load_state_dict(checkpoint.tensors("encoder"))
    head.load_state_dict(checkpoint.tensors("head"))
    trainer.record.flags_C1[:] = checkpoint.tensors("progress")["classes"].numpy()
    if index is not None:
        index.load_state(checkpoint.tensors("index"), head.weight, head.bias)
    moments = checkpoint.tensors("optimizer")
    for name, state in _row_states(trainer).items():
        state.moment1.copy_(moments[f"{name}.moment1"])
        state.moment2.copy_(moments[f"{name}.moment2"])
    for name, parameter in encoder.named_parameters():
        prefix = f"dense.{name}."
        parts = {key.removeprefix(prefix): moments[key].clone() for key in moments if key.startswith(prefix)}
        if parts:
            trainer.dense_optimizer.state[parameter] = parts


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


def _row_states(trainer: Trainer) -> dict[str, RowState]:
    head, encoder = trainer.model.head, trainer.model.encoder
    return {"weight": head.weight_state, "bias": head.bias_state, "bag": encoder.bag_state}

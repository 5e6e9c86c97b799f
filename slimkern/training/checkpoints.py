"""State that lies beside a Trainer's checkpoint: where that is, and how it is found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from slimkern.training.state_files import read_state, write_state


def write_beside(state: Any, args: TrainingArguments, at: TrainerState, name: str) -> None:
    """Write ``state`` beside the checkpoint that has just been written (main process only)."""
    if at.is_world_process_zero:
        write_state(state, _folder(args, at.global_step), name)


def read_beside(args: TrainingArguments, step: int, name: str) -> Any:
    """The state of this name that lies beside the checkpoint that training is resumed from.

    The Trainer does not tell a callback which folder that is: it is the one given in the arguments,
    or the one of this step in the output folder.

    Raises:
        FileNotFoundError: neither folder holds it.
    """
    folders = [_folder(args, step)]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        if (folder / f"{name}.json").is_file():
            return read_state(folder, name)
    looked = " nor ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"training is resumed at step {step}, but {looked} holds {name}.json; resume from a "
        f"checkpoint in output_dir, or name its folder in TrainingArguments(resume_from_checkpoint)"
    )


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

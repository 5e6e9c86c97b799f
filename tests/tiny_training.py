"""A tiny model folder and tiny data files, for everything that trains."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    TrainerCallback,
)

from slimkern.training import (
    DistillTrainer,
    EmbeddingTask,
    Teacher,
    TrainingSettings,
    disable_dropout,
)
from slimkern.training.data import read_pairs

WORDS = ["cat", "dog", "bird", "fish", "runs", "sleeps", "eats", "sings", "red", "blue", "a", "the"]


def write_model(folder: Path, head: int | None = None, layers: int = 2) -> Path:
    """A random BERT (width 32, 4 heads, FFN 64), with ``head`` labels if given; its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=layers,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    if head is None:
        BertModel(config).save_pretrained(folder)
    else:
        config.num_labels = head
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_pairs(path: Path, rows: int = 48, seed: int = 0, kind: str = "score") -> Path:
    """Random sentences and how many words they share: a score of 0..5, or the class of it."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence1", "sentence2", "score" if kind == "score" else "label"])
        for _ in range(rows):
            first = draw.choices(WORDS, k=draw.randint(2, 6))
            second = draw.choices(WORDS, k=draw.randint(2, 6))
            shared = 5 * len(set(first) & set(second)) / len(set(first) | set(second))
            label = f"{shared:.3f}" if kind == "score" else ("near" if shared > 0.7 else "far")
            writer.writerow([" ".join(first), " ".join(second), label])
    return path


def setting_of(tmp_path_factory):
    """A model's folder, the task of embeddings, and 48 training rows of it."""
    folder = write_model(tmp_path_factory.mktemp("model"))
    pairs = read_pairs(write_pairs(tmp_path_factory.mktemp("data") / "train.csv"))
    task = EmbeddingTask(5.0)
    return folder, task, task.encode(pairs, AutoTokenizer.from_pretrained(folder), 16, "f")


def trainer_of(setting, folder, *callbacks, epochs=4, teacher=False, **arguments):
    """A Trainer of 6 steps an epoch; its own teacher if asked for."""
    source, task, rows = setting
    settings = TrainingSettings(epochs, 1e-3, batch_size=8, warmup=0.0, dropout=False)
    made = settings.arguments(folder)
    for name, value in arguments.items():
        setattr(made, name, value)
    model = disable_dropout(task.load_model(str(source)))
    kept = Teacher(task.load_model(str(source)), task, rows) if teacher else None
    return DistillTrainer(model, task, rows, made, teacher=kept, callbacks=callbacks)


class StopAt(TrainerCallback):
    """Saves a checkpoint at a step and stops there."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True

"""The other trainers of `benchmarks.trainer`, each over the same model and rows.

    python -m benchmarks.trainer_peers sft|topk|gkd --folder DIR --steps 4 --batch 8

`sft` is TRL's SFTTrainer; `topk` a Hugging Face Trainer whose `compute_loss` takes the whole logits
and stored outcomes with their tail, as one writes it by hand; `gkd` TRL's GKDTrainer with the
teacher in the same process and everything off-policy. Prints one JSON line: supervised tokens, CPU
seconds after the first step (with the teacher's forward apart), memory over start, losses.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.trainer_data import LENGTH, PROMPT
from benchmarks.trainer_memory import MemoryPeak

COMMON = {
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "adam_beta2": 0.95,
    "optim": "adamw_torch_fused",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
    "gradient_checkpointing": False,
    "seed": 7,
}


class Clock(TrainerCallback):
    """CPU time from the end of the first step to the end of the last, and every loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.marks: list[float] = []

    def on_step_end(self, args, state, control, **more) -> None:  # type: ignore[no-untyped-def]
        self.marks.append(time.process_time())

    def on_log(self, args, state, control, logs=None, **more) -> None:  # type: ignore[no-untyped-def]
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class InOrder:
    """Keeps the rows in their order: every trainer sees the same steps."""

    def _get_train_sampler(self, *_arguments):  # type: ignore[no-untyped-def]
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


def rows_of(folder: Path, steps: int, batch: int) -> dict[str, np.ndarray]:
    found = np.load(folder / "rows.npz")
    return {name: found[name][: steps * batch] for name in found.files}


def dataset(rows: dict[str, np.ndarray]):  # type: ignore[no-untyped-def]
    from datasets import Dataset

    mask = [0] * PROMPT + [1] * (LENGTH - PROMPT)
    ids = [row.tolist() for row in rows["ids"]]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": [mask] * len(ids)})


def tokenizer():  # type: ignore[no-untyped-def]
    """Trainers want one; the rows are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def sft(folder: Path, steps: int, batch: int, clock: Clock):  # type: ignore[no-untyped-def]
    from trl import SFTConfig, SFTTrainer

    class Ours(InOrder, SFTTrainer):  # type: ignore[misc]
        pass

    config = SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        max_length=LENGTH,
        packing=False,
        completion_only_loss=True,
        shuffle_dataset=False,
        **COMMON,
    )
    return Ours(
        model=_model(folder),
        args=config,
        train_dataset=dataset(rows_of(folder, steps, batch)),
        processing_class=tokenizer(),
        callbacks=[clock],
    )


def topk(folder: Path, steps: int, batch: int, clock: Clock):  # type: ignore[no-untyped-def]
    rows = rows_of(folder, steps, batch)

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(rows["ids"])

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {
                "input_ids": torch.from_numpy(rows["ids"][index]),
                "kept": torch.from_numpy(rows["kept"][index]),
                "logp": torch.from_numpy(rows["logp"][index]).float(),
                "tail": torch.from_numpy(rows["tail"][index]).float(),
            }

    class TopK(InOrder, Trainer):  # type: ignore[misc]
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            logits = model(input_ids=inputs["input_ids"]).logits[:, PROMPT - 1 : -1]
            log_q = logits.log_softmax(-1)
            kept = log_q.gather(-1, inputs["kept"])
            without = log_q.scatter(-1, inputs["kept"], -torch.inf)
            p, tail = inputs["logp"].exp(), inputs["tail"]
            loss = (p * (inputs["logp"] - kept)).sum(-1)
            loss = loss + tail.exp() * (tail - without.logsumexp(-1))
            return loss.mean()

    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        remove_unused_columns=False,
        **COMMON,
    )
    return TopK(model=_model(folder), args=arguments, train_dataset=Rows(), callbacks=[clock])


def gkd(folder: Path, steps: int, batch: int, clock: Clock):  # type: ignore[no-untyped-def]
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Ours(InOrder, GKDTrainer):  # type: ignore[misc]
        pass

    config = GKDConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        max_length=LENGTH,
        lmbda=0.0,
        beta=0.0,
        seq_kd=False,
        **COMMON,
    )
    found = rows_of(folder, steps, batch)

    def collate(rows):  # type: ignore[no-untyped-def]
        ids = torch.stack([torch.tensor(row["input_ids"]) for row in rows])
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        ones = torch.ones_like(ids)
        return {
            "input_ids": ids,
            "attention_mask": ones,
            "labels": labels,
            "prompts": ids[:, :PROMPT],
            "prompt_attention_mask": ones[:, :PROMPT],
        }

    trainer = Ours(
        model=_model(folder),
        teacher_model=_model(folder, "teacher"),
        args=config,
        train_dataset=dataset(found),
        processing_class=tokenizer(),
        data_collator=collate,
        callbacks=[clock],
    )
    teacher = trainer.teacher_model
    inner = teacher.forward

    def timed(*given, **named):  # type: ignore[no-untyped-def]
        started = time.process_time()
        try:
            return inner(*given, **named)
        finally:
            TEACHER_SECONDS.append(time.process_time() - started)

    teacher.forward = timed
    return trainer


TEACHER_SECONDS: list[float] = []


def _model(folder: Path, name: str = "model"):  # type: ignore[no-untyped-def]
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainer", choices=("sft", "topk", "gkd"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    told = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    made = {"sft": sft, "topk": topk, "gkd": gkd}[told.trainer]
    trainer = made(told.folder, told.steps, told.batch, clock)
    with MemoryPeak() as memory:
        trainer.train()
    tokens = (told.steps - 1) * told.batch * (LENGTH - PROMPT)
    print(
        json.dumps(
            {
                "tokens": tokens,
                "cpu_seconds": clock.marks[-1] - clock.marks[0],
                "teacher_seconds": sum(TEACHER_SECONDS[1:]),
                "memory_mb": memory.over_start / 2**20,
                "losses": clock.losses,
            }
        )
    )


if __name__ == "__main__":
    main()

"""One member: fine-tune on train rows, choose the epoch on tune rows, score the held-out ones."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from ensemble import artifacts, canonical, dataset, metrics
from ensemble.backbone import Member, build_member, save_classifier
from ensemble.canonical import Plan
from ensemble.errors import UnavailableError
from ensemble.labels import LABELS
from ensemble.loader import Rows, collate
from ensemble.recipe import Recipe
from ensemble.score import Runner, score_images

TRAINING_VERSION = 1  # raised by hand when training the same recipe would give another member

Say = Callable[[str], object]


class Objective(nn.Module):
    """What Trainer minimises: binary cross-entropy of the member's logit, views averaged."""

    def __init__(self, member: Member, label_smoothing: float) -> None:
        super().__init__()
        self.member = member
        self.label_smoothing = label_smoothing

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 [N, K, S, S, 3] and float [N] -> loss and logits float32 [N]."""
        logits = self.member(pixels.flatten(0, 1)).view(pixels.shape[0], -1).mean(dim=1)
        targets = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        loss = functional.binary_cross_entropy_with_logits(logits, targets)
        return {"loss": loss, "logits": logits}


def train_member(
    recipe: Recipe, checkpoint: Path | None, frame: pd.DataFrame, run: Path, seed: int, device: str, say: Say
) -> dict[str, Any]:
    """Train one member and move it to its place in the run; returns its member.json.

    frame: the run's rows. checkpoint: see `build_member`. An older member of the same name
    is replaced only once this one is complete.
    """
    started = time.monotonic()
    transformers.set_seed(seed)
    work = artifacts.work_path(run, recipe.name)
    shutil.rmtree(work, ignore_errors=True)
    member = build_member(recipe, checkpoint)
    plan = canonical.read_plan(artifacts.canonical_path(run))
    history, best = _fit(member, recipe, frame, plan, work, seed, device, say)
    folder = work / "member"
    artifacts.ensure_folder(folder)
    heldout = _heldout(member, recipe, frame, plan, seed, torch.device(device))
    artifacts.write_parquet(folder / "heldout.parquet", heldout)
    artifacts.write_json(folder / "history.json", {"epochs": history})
    save_classifier(member.cpu(), folder)
    info = {
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json", exclude={"name"}),
        "labels": list(LABELS),
        "contract": member.contract.to_dict(),
        "parameters": sum(p.numel() for p in member.parameters()),
        "best": best,
        "recipe_sha256": recipe.sha256,
        "data_sha256": dataset.run_sha256(frame, run),
        "training_version": TRAINING_VERSION,
        "seed": seed,
        "files": {path.name: artifacts.file_sha256(path) for path in sorted(folder.iterdir())},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": device,
        "seconds": round(time.monotonic() - started, 1),
    }
    artifacts.write_json(folder / "member.json", info)
    artifacts.replace_folder(folder, artifacts.member_path(run, recipe.name))
    shutil.rmtree(work, ignore_errors=True)
    return info


def choose_device(device: str) -> str:
    """`auto` as cuda where there is one, else cpu; UnavailableError for a device that is not here."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UnavailableError("no CUDA device was found by torch; use --device cpu, or check the driver")
    return ("cuda" if available else "cpu") if device == "auto" else device


def torch_runner(name: str, member: Member, device: torch.device) -> Runner:
    """The member as a Runner, in float32."""
    member.eval().to(device)

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return member(torch.from_numpy(pixels).to(device)).float().cpu().numpy()

    return Runner(name, member.contract, run)


def _precision(recipe: Recipe, device: str) -> str:
    """`auto`: half precision where the hardware multiplies in it, else fp32."""
    if recipe.train.precision != "auto":
        if recipe.train.precision == "fp16" and device == "cpu":
            raise UnavailableError(f"{recipe.name}: fp16 training needs a GPU; use bf16 or fp32")
        return recipe.train.precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capable = torch.cpu.get_capabilities()
    return "bf16" if capable.get("amx_bf16") or capable.get("avx512_bf16") else "fp32"


def _arguments(recipe: Recipe, work: Path, seed: int, device: str) -> transformers.TrainingArguments:
    train, precision = recipe.train, _precision(recipe, device)
    return transformers.TrainingArguments(
        output_dir=str(work / "checkpoints"),
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=train.lr,
        weight_decay=train.weight_decay,
        warmup_steps=train.warmup,  # below 1 it is a share of all steps
        lr_scheduler_type="cosine",
        max_grad_norm=train.clip,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device == "cpu",
        seed=seed,
        data_seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="auroc",
        greater_is_better=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_num_workers=min(os.cpu_count() or 1, 8) if device == "cuda" else 0,
        dataloader_pin_memory=device == "cuda",
        report_to="none",
    )


def _fit(
    member: Member,
    recipe: Recipe,
    frame: pd.DataFrame,
    plan: Plan | None,
    work: Path,
    seed: int,
    device: str,
    say: Say,
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Train in place and leave the best epoch's weights in `member`; returns (history, best)."""
    parts = {split: frame[frame["split"] == split] for split in ("train", "tune")}
    rows = {
        split: Rows(
            dataset.files(part),
            part["label"].to_numpy(),
            member.contract,
            recipe.augment if split == "train" else None,
            seed,
            plan,
        )
        for split, part in parts.items()
    }
    report = _Report(recipe.train.epochs, rows["train"], say)
    trainer = transformers.Trainer(
        model=Objective(member, recipe.train.label_smoothing),
        args=_arguments(recipe, work, seed, device),
        train_dataset=rows["train"],
        eval_dataset=rows["tune"],
        data_collator=collate,
        compute_metrics=_tune_scores,
        callbacks=[report],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.train()
    best = max(report.history, key=lambda epoch: (epoch["tune_auroc"], -epoch["epoch"]))
    return report.history, best


def _tune_scores(predicted: transformers.EvalPrediction) -> dict[str, float]:
    labels, logits = predicted.label_ids, predicted.predictions
    return {
        "auroc": metrics.auroc(labels, logits),
        "log_loss": metrics.log_loss(labels, metrics.sigmoid(logits)),
    }


class _Report(transformers.TrainerCallback):
    """A progress bar over all steps with the time left, a line an epoch, and the epochs' numbers."""

    def __init__(self, epochs: int, rows: Rows, say: Say) -> None:
        self.epochs, self.rows, self.say = epochs, rows, say
        self.history: list[dict[str, float]] = []
        self.loss = float("nan")
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc="  train", unit="step", leave=False, disable=None)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rows.epoch = round(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        scores = metrics or {}
        epoch = {
            "epoch": round(state.epoch or 0),
            "train_loss": self.loss,
            "tune_auroc": scores["eval_auroc"],
            "tune_log_loss": scores["eval_log_loss"],
        }
        self.history.append(epoch)
        self.bar.clear()
        self.say(
            f"  epoch {epoch['epoch']}/{self.epochs}: train loss {epoch['train_loss']:.4f}, "
            f"tune AUROC {epoch['tune_auroc']:.4f}, tune log-loss {epoch['tune_log_loss']:.4f}"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def _heldout(
    member: Member, recipe: Recipe, frame: pd.DataFrame, plan: Plan | None, seed: int, device: torch.device
) -> pd.DataFrame:
    """id, label, split, fold, logit of every row that no weight and no choice has seen."""
    rows = frame[~frame["split"].isin(["train", "tune"])]
    runner = torch_runner(recipe.name, member, device)
    read: dict[str, Any] = {}
    if plan is not None:
        read = {"read": lambda row, file: canonical.read_canonical(file, plan, [seed, 0, row])}
    with tqdm(total=len(rows), desc="  held-out", unit="image", leave=False, disable=None) as bar:
        batch = recipe.train.batch_size
        logits, errors = score_images(dataset.files(rows), [runner], batch, progress=bar.update, **read)
    if errors:
        raise FileNotFoundError(next(iter(errors.values())))
    return rows[["id", "label", "split", "fold"]].assign(logit=logits[:, 0]).reset_index(drop=True)

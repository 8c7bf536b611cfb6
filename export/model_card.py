"""The model card of a bundle on the Hub: what it is, was trained on and scores. No torch.

The fields of its YAML are those of huggingface_hub's ModelCardData and EvalResult.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble import artifacts, members, report_data, report_facts
from ensemble.commands import audit_headline
from ensemble.contract import ImageContract
from ensemble.errors import HubError
from ensemble.evaluate_tables import read_interval
from export import bundle, heldout_rows, points

BEGIN = "<!-- manyeyes push: what stands between these two marks is replaced by the next push -->"
END = "<!-- manyeyes push: end -->"
TAGS = ["image-classification", "ai-generated-image-detection", "ensemble", "onnx", "manyeyes"]
TITLES = {"auroc": "AUROC", "log_loss": "log-loss"}
HUB_ID = re.compile(r"(?:[\w-][\w.-]*)/(?:[\w-][\w.-]*)", re.ASCII)
SPECIAL = "\\`*_{}[]|~$@:#!"  # beyond & < >, what means something within a line of Markdown
LISTED = 30  # generators, at most

INTENDED = """\
For sorting and ranking: which images deserve a closer look, how much of a collection may be AI-made. `target` is a
probability under the shares and sources of the images it was fitted on, not a verdict on one image.

- Generators, cameras and edits that it was not trained on can be missed, or mistaken; scores above are of images like
  those it was trained on, unless they say otherwise.
- Compression, resizing, screenshots and retouching remove the traces that it looks for.
- A score is no proof. Do not accuse a person, or decide about them, by it.
- Measure it on images of your own before relying on it: `python cli.py evaluate --model hf://{repo} --data YOURS`."""


@dataclass(frozen=True)
class Base:
    """What a member was fine-tuned from. checkpoint: its name on the Hub, "" for none. licence: "" if not known."""

    member: str
    checkpoint: str
    words: str
    licence: str = ""


def bases(run: Path, names: Sequence[str]) -> list[Base]:
    """Where the weights of a run's members come from; a folder of this machine is not named."""
    found = []
    for name in names:
        backbone = members.read_info(run, name)["recipe"].get("backbone", {})
        checkpoint, architecture = backbone.get("checkpoint"), backbone.get("architecture") or ""
        if checkpoint and HUB_ID.fullmatch(checkpoint) and not Path(checkpoint).is_dir():
            found.append(Base(name, checkpoint, f"[{escaped(checkpoint)}](https://huggingface.co/{checkpoint})"))
        elif checkpoint:
            found.append(Base(name, "", "a local checkpoint"))
        else:
            weights = ", with weights of a file" if backbone.get("weights") else ", from random weights"
            found.append(Base(name, "", escaped(architecture or "not named") + weights))
    return found


@bundle.damage_told("stacker.json")
def write_card(repo: str, folder: Path, run: Path | None, known: Sequence[Base], licence: str | None) -> str:
    """YAML and text of the bundle at `folder`; of the data it was trained on only where `run` is given.

    known: of each member that the run trained. licence: what the user says, as the Hub names it.
    """
    stacker, values = artifacts.read_json(folder / "stacker.json", bundle.REMEDY), bundle.contents(folder)
    certificate = bundle.certificate_of(folder)
    parts = [
        BEGIN,
        _opening(repo, stacker),
        _use(repo, stacker),
        "## Members\n\n" + _members(stacker, values, known),
        "## Trained on\n\n" + _data(run),
        "## Scores\n\n" + _scores(stacker),
        "## Exported files\n\n" + _certificate(values, certificate) + _point(folder, values),
        "## Intended use, and limits\n\n" + INTENDED.format(repo=repo),
        END,
    ]
    return f"---\n{_metadata(repo, stacker, known, licence)}\n---\n" + "\n\n".join(parts) + "\n"


def merged(repo: str, older: str, card: str) -> str:
    """The new card, with what others wrote in the older one around our part, and fields of its YAML that ours lacks."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import CardData

    if not older.strip():
        return card
    try:
        kept, new = ModelCard(older, ignore_metadata_errors=True), ModelCard(card)
    except Exception as error:  # its YAML is read by a library that raises in many ways
        raise HubError(
            f"{repo}: the YAML of its README.md cannot be read ({type(error).__name__}); mend it there"
        ) from None
    marks = (kept.text.count(BEGIN), kept.text.count(END))
    if marks == (1, 1) and kept.text.index(BEGIN) < kept.text.index(END):
        before, rest = kept.text.split(BEGIN)
        text = before.lstrip("\n") + new.text.strip("\n") + rest.split(END)[1]
    elif marks == (0, 0):
        text = new.text.strip("\n") + "\n\n" + kept.text.lstrip("\n")
    else:
        raise HubError(
            f"{repo}: its README.md has lost one of the two marks that push puts around its part; remove both"
        )
    old, fields = kept.data.to_dict(), new.data.to_dict()
    if fields["license"] == "unknown":
        fields["license"] = old.get("license") or "unknown"
    fields["tags"] = list(dict.fromkeys([*fields["tags"], *(old.get("tags") or ())]))
    others = {name: value for name, value in old.items() if name not in (*fields, "base_model", "model-index")}
    return f"---\n{CardData(**fields, **others).to_yaml()}\n---\n{text.rstrip()}\n"


def escaped(text: str) -> str:
    """Text of unknown origin as one line of Markdown that shows it and does nothing else."""
    line = " ".join("".join(c if not unicodedata.category(c).startswith("C") else " " for c in text).split())
    named = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    shown = "".join(named.get(c, f"\\{c}" if c in SPECIAL else c) for c in line)
    return re.sub(r"(?i)(www)\.", r"\1\\.", shown)  # which alone would make a link


def _metadata(repo: str, stacker: Mapping[str, Any], known: Sequence[Base], licence: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    rows = stacker.get("rows", {})
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="AI-made or real",
            dataset_type="held-out",
            dataset_name=f"{rows.get('images')} held-out images of its own data in {rows.get('groups')} groups",
            metric_type="roc_auc" if name == "auroc" else name,
            metric_name=f"{TITLES[name]} [95 % interval: {interval.low:.4f}, {interval.high:.4f}]",
            metric_value=round(interval.value, 4),
        )
        for name in TITLES
        if (interval := _score(stacker, "stack", name)) is not None and np.isfinite(interval.value)
    ]
    data = ModelCardData(
        license=licence or "unknown",
        library_name="manyeyes",
        pipeline_tag="image-classification",
        tags=TAGS,
        base_model=sorted({base.checkpoint for base in known if base.checkpoint}) or None,
        model_name=repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _opening(repo: str, stacker: Mapping[str, Any]) -> str:
    names, kind = stacker["members"], stacker.get("kind", "mean")
    how = "the mean of their logits" if kind == "mean" else f"{escaped(kind)} weights, fitted on held-out images"
    return (
        f"# {escaped(repo.rpartition('/')[2])}\n\n"
        f"Tells AI-made images from real photographs: {len(names)} fine-tuned vision models, combined by {how}. "
        "It gives `target`, the probability that an image is AI-made. Made with manyeyes."
    )


def _use(repo: str, stacker: Mapping[str, Any]) -> str:
    rule = escaped(str(stacker.get("threshold_rule", ""))) or "not said"
    return f"""\
## Use

```
python cli.py infer --bundle hf://{repo} --input photos/ --output scores.csv
```

```python
from export import Predictor

predictor = Predictor.load("hf://{repo}")
```

Call an image AI-made where `target` is at least **{stacker["threshold"]:.4f}** (rule: {rule}). The files are ONNX:
uint8 pixels [N, S, S, 3] in, a float32 logit [N] out."""


def _members(stacker: Mapping[str, Any], values: Mapping[str, Any], known: Sequence[Base]) -> str:
    origin = {base.member: base for base in known}
    lines = []
    for name, weight in zip(stacker["members"], stacker["coef"], strict=True):
        entry = values["members"].get(name)
        contract = ImageContract.from_dict(entry["contract"]) if entry else None
        pixels = f"{contract.size} px, {contract.geometry}" if contract else "trained elsewhere, scores looked up by id"
        base = origin.get(name, Base(name, "", "not known here"))
        licence = escaped(base.licence) or ("see its page" if base.checkpoint else "-")
        lines.append([escaped(name), f"{weight:.4f}", base.words, licence, escaped(pixels)])
    return _table(["member", "weight", "made from", "licence of that", "image"], lines)


def _data(run: Path | None) -> str:
    if run is None:
        return "Not known here: this was pushed from a bundle alone."
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    counted = report_data.counts(frame)
    splits = _table(
        ["rows", "class", "images", "groups"],
        [[escaped(row["name"]), row["of"], row["images"], row["groups"]] for row in counted["split"]],
    )
    made = [row for row in counted["generator"] if row["of"] == "ai" and row["name"] != "not named"]
    sources = {row["name"] for row in counted["source"]} - {"not named"}
    named = ", ".join(f"{escaped(row['name'])} ({row['images']})" for row in made[:LISTED]) or "none is named"
    more = f", and {len(made) - LISTED} more" if len(made) > LISTED else ""
    return (
        f"{len(frame)} images in {frame['group'].nunique()} groups of copies and near-duplicates. Sources: "
        f"{len(sources) or 'not named'}. Generators, with their images: {named}{more}.\n\n{splits}\n\n"
        f"{escaped(audit_headline(run))}{_null(run)}"
    )


def _null(run: Path) -> str:
    scores = report_facts.null_scores(report_facts.read_audit(run))
    if not scores:
        return ""
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in scores.items())
    return f" (The shortcut null, which knows how files are stored and sees no picture: {said}.)"


def _scores(stacker: Mapping[str, Any]) -> str:
    if not stacker.get("scores"):
        return "None were measured."
    rows = stacker["rows"]
    lines = [
        [escaped(name), *(str(_score(stacker, name, score) or "") for score in TITLES)] for name in stacker["scores"]
    ]
    few = " So few groups make them rough, and rather too short." if rows["groups"] < report_facts.FEW_GROUPS else ""
    basis = "scored out of fold" if rows["stack"] == "out of fold" else escaped(rows["stack"])
    return (
        _table(["", *TITLES.values()], lines)
        + f"\n\nOn {rows['images']} held-out images in {rows['groups']} groups; the stack was {basis}. In brackets: "
        f"95 % intervals, by drawing groups again.{few}"
    )


def _score(stacker: Mapping[str, Any], name: str, score: str) -> Any:
    found = stacker.get("scores", {}).get(name)
    return read_interval(found[score]) if found else None


def _certificate(values: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    differences = [
        found["max_abs_difference"]
        for member in certificate["members"].values()
        for found in member.get("fp32", {}).values()
    ]
    largest = f" Largest difference of a logit from the original's: {max(differences):.1e}." if differences else ""
    lines = [
        f"- {escaped(key)}: {escaped(', '.join(found['members']))}; "
        + ("certified" if found["certified"] else "**not certified**, allowed by the word of who exported it")
        for key, found in values.get("precisions", {}).items()
    ]
    lower = "Below fp32 may run:\n\n" + "\n".join(lines) if lines else "Nothing may run below fp32."
    fitting = (
        " `heldout.parquet` has logits of held-out images, no ids and no paths: `infer --cascade` is fitted on them."
    )
    held = fitting if heldout_rows.FILE in values["files"] else ""
    return f"Every file is listed in `bundle.json` with its SHA-256.{largest}{held}\n\n{lower}"


def _point(folder: Path, values: Mapping[str, Any]) -> str:
    """What runs unasked, where frontier chose some of the members."""
    chosen = points.read(folder, values)
    if chosen is None:
        return ""
    total = len(bundle.stacker_of(folder).members)
    return f"\n\nUnasked it runs {escaped(points.told(chosen, total))}."


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)

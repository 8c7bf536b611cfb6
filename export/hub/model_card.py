"""The model card of a bundle on the Hub: members, training data, scores, limits. No torch.

The YAML has the fields of huggingface_hub's ModelCardData and EvalResult.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.audit.headline import audit_headline, read_audit
from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, HubError
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.data.splits import FITTED_SPLITS
from ensemble.evaluation import report_data
from ensemble.models import members
from ensemble.stacking.stacker import read_stacker_values
from export.bundle import bundle, heldout_rows, hub_bundles, operating_point
from export.bundle.operating_point import OperatingPoint
from export.hub import card_scores
from export.hub.markdown import escape, table

BEGIN_MARK = "<!-- manyeyes push: what stands between these two marks is replaced by the next push -->"
END_MARK = "<!-- manyeyes push: end -->"
TAGS = ["image-classification", "ai-generated-image-detection", "ensemble", "onnx", "manyeyes"]
UNKNOWN = "not known"
MAX_GENERATORS = 30  # listed by name

INTENDED = """\
For sorting and ranking: which images deserve a closer look, how much of a collection may be AI-made. `target` is a
probability under the shares and sources of the images it was fitted on, not a verdict on one image.

- Generators, cameras and edits that it was not trained on can be missed, or mistaken; scores above are of images like
  those it was trained on, unless they say otherwise.
- Compression, resizing, screenshots and retouching remove the traces that it looks for.
- A score is no proof. Do not accuse a person, or decide about them, by it.
- Measure it on images of your own before relying on it:
  `python cli.py evaluate --model hf://{repo} --data YOURS --output evaluated`."""


@dataclass(frozen=True)
class BaseCheckpoint:
    """What a member was fine-tuned from.

    checkpoint: its name on the Hub, "" for none. description: in Markdown. licence: "" if not looked up.
    """

    member: str
    checkpoint: str
    description: str
    licence: str = ""


def base_checkpoint(run: Path, name: str) -> BaseCheckpoint:
    """What a run's member was fine-tuned from; paths on this machine are not named."""
    info = members.read_info(run, name)
    backbone = info["recipe"].get("backbone", {})
    checkpoint, hub_name = backbone.get("checkpoint"), info.get("hub_checkpoint")
    if checkpoint is None:
        architecture = escape(backbone.get("architecture") or "not named")
        if backbone.get("weights"):
            return BaseCheckpoint(name, "", f"{architecture}, with weights of a file", UNKNOWN)
        return BaseCheckpoint(name, "", f"{architecture}, from random weights", "-")
    if hub_name and hub_bundles.NAME.fullmatch(hub_name):
        return BaseCheckpoint(name, hub_name, f"[{escape(hub_name)}](https://huggingface.co/{hub_name})")
    if "hub_checkpoint" in info or not hub_bundles.NAME.fullmatch(checkpoint):
        return BaseCheckpoint(name, "", "a local checkpoint", UNKNOWN)
    # trained before hub_checkpoint was recorded
    return BaseCheckpoint(name, "", "a checkpoint, not known whether of the Hub", UNKNOWN)


def render_card(repo: str, folder: Path, run: Path | None, bases: Sequence[BaseCheckpoint], licence: str | None) -> str:
    """YAML and text of the card for the bundle at `folder`; it describes the training data only where `run` is given.

    bases: of the members that the run trained. licence: as the Hub names it, None if unknown.
    """
    stacker, manifest = read_stacker_values(folder / "stacker.json", bundle.REMEDY), bundle.read_contents(folder)
    try:
        certificate, point = bundle.read_certificate(folder), operating_point.read(folder, manifest)
        evaluations = card_scores.read_evaluations(run, stacker) if run else []
        of_all = default = ""
        if point:  # then only some members run by default
            of_all = "Of all members, as `--full` runs them.\n\n"
            default = f"\n\nBy default it runs {escape(operating_point.describe(point, len(stacker['members'])))}."
        parts = [
            BEGIN_MARK,
            _summary(repo, stacker),
            _usage(repo, stacker, point),
            "## Members\n\n" + _members(stacker, manifest, bases, point),
            "## Trained on\n\n" + _training_data(run),
            "## Scores\n\n" + of_all + card_scores.render_scores(stacker) + card_scores.render_evaluations(evaluations),
            "## Exported files\n\n" + _certificate(manifest, certificate) + default,
            "## Intended use, and limits\n\n" + INTENDED.format(repo=repo),
            END_MARK,
        ]
        return f"---\n{_metadata(repo, stacker, bases, licence, evaluations)}\n---\n" + "\n\n".join(parts) + "\n"
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(f"stacker.json holds what no export writes ({error!r}); {bundle.REMEDY}") from None


def merge_card(repo: str, older: str, card: str) -> str:
    """The new card with what others added to the older one: text outside our two marks, and further YAML fields."""
    from huggingface_hub import ModelCard

    if not older.strip():
        return card
    try:
        old, new = ModelCard(older, ignore_metadata_errors=True), ModelCard(card)
        metadata = _merge_metadata(old.data.to_dict(), new.data.to_dict())
    except Exception as error:  # the YAML library raises many kinds
        raise HubError(
            f"{repo}: the YAML of its README.md cannot be read ({type(error).__name__}); mend it there"
        ) from None
    marks = (old.text.count(BEGIN_MARK), old.text.count(END_MARK))
    if marks == (1, 1) and old.text.index(BEGIN_MARK) < old.text.index(END_MARK):
        before, rest = old.text.split(BEGIN_MARK)
        text = before.lstrip("\n") + new.text.strip("\n") + rest.split(END_MARK)[1]
    elif marks == (0, 0):
        text = new.text.strip("\n") + "\n\n" + old.text.lstrip("\n")
    else:
        raise HubError(
            f"{repo}: its README.md has lost one of the two marks that push puts around its part; remove both"
        )
    return f"---\n{metadata}\n---\n{text.rstrip()}\n"


def _merge_metadata(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """YAML of the new fields and of the old ones that are missing in it; raises many kinds for what is no card."""
    from huggingface_hub.repocard_data import CardData

    fields, tags = dict(new), old.get("tags") or []
    if fields["license"] == "unknown":
        fields["license"] = old.get("license") or "unknown"
    fields["tags"] = list(dict.fromkeys([*fields["tags"], *([tags] if isinstance(tags, str) else tags)]))
    others = {name: value for name, value in old.items() if name not in (*fields, "base_model", "model-index")}
    return str(CardData(**fields, **others).to_yaml())


def _metadata(
    repo: str,
    stacker: Mapping[str, Any],
    bases: Sequence[BaseCheckpoint],
    licence: str | None,
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    from huggingface_hub import ModelCardData

    results = card_scores.eval_results(stacker, evaluations)
    data = ModelCardData(
        license=licence or "unknown",
        library_name="manyeyes",
        pipeline_tag="image-classification",
        tags=TAGS,
        base_model=sorted({base.checkpoint for base in bases if base.checkpoint}) or None,
        model_name=repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _summary(repo: str, stacker: Mapping[str, Any]) -> str:
    names, kind = stacker["members"], stacker.get("kind", "mean")
    of = "calibrated probabilities" if stacker.get("format_version", 1) == 2 and kind != "logit" else "logits"
    how = (
        f"the mean of their {of}"
        if kind == "mean"
        else f"{escape(kind)} weights of their {of}, fitted on held-out images"
    )
    return (
        f"# {escape(repo.rpartition('/')[2])}\n\n"
        f"Tells AI-made images from real photographs: {len(names)} fine-tuned vision models, combined by {how}. "
        "It gives `target`, the probability that an image is AI-made. Made with manyeyes."
    )


def _usage(repo: str, stacker: Mapping[str, Any], point: OperatingPoint | None) -> str:
    called = _threshold(stacker) + (" with `--full`, by all members" if point else "")
    if point:
        called = f"{_threshold(point.stacker.to_dict())} by default, {called}"
    return f"""\
## Use

```
python cli.py infer --bundle hf://{repo} --input photos/ --output scores.csv
```

```python
from export import Predictor

predictor = Predictor.load("hf://{repo}")
```

Call an image AI-made where `target` is at least {called}. The files are ONNX:
uint8 pixels [N, S, S, 3] in, a float32 logit [N] out."""


def _threshold(stacker: Mapping[str, Any]) -> str:
    rule = escape(str(stacker.get("threshold_rule", ""))) or "not said"
    return f"**{stacker['threshold']:.4f}** (rule: {rule})"


def _members(
    stacker: Mapping[str, Any],
    manifest: Mapping[str, Any],
    bases: Sequence[BaseCheckpoint],
    point: OperatingPoint | None,
) -> str:
    note = ""
    if point:  # then only some members run by default
        running = escape(", ".join(point.stacker.members))
        weights = "All members, with their weights in the stack of all, as `--full` runs them."
        note = f"{weights} By default run: {running}.\n\n"
    by_member = {base.member: base for base in bases}
    rows = []
    for name, weight in zip(stacker["members"], stacker["coef"], strict=True):
        entry = manifest["members"].get(name)
        config = PreprocessConfig.from_dict(entry["contract"]) if entry else None
        pixels = f"{config.size} px, {config.geometry}" if config else "trained elsewhere, scores looked up by id"
        base = by_member.get(name, BaseCheckpoint(name, "", "not known here", UNKNOWN))
        licence = escape(base.licence) or "see its page"
        rows.append([escape(name), f"{weight:.4f}", base.description, licence, escape(pixels)])
    return note + table(["member", "weight", "made from", "licence of that", "image"], rows)


def _training_data(run: Path | None) -> str:
    if run is None:
        return "Not known here: this was pushed from a bundle alone."
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    counts = report_data.counts(frame)
    splits = table(
        ["rows", "class", "images", "groups"],
        [[escape(row["name"]), row["of"], row["images"], row["groups"]] for row in counts["split"]],
    )
    fitted = frame[frame["split"].isin(FITTED_SPLITS)]
    fitted_counts = report_data.counts(fitted)
    generators = [row for row in fitted_counts["generator"] if row["of"] == "ai" and row["name"] != "not named"]
    sources = {row["name"] for row in fitted_counts["source"]} - {"not named"}
    listed = [f"{escape(row['name'])} ({row['images']})" for row in generators[:MAX_GENERATORS]]
    names = ", ".join(listed) or "none is named"
    scores = report_data.null_scores(read_audit(run))
    described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in scores.items())
    null = f" (The shortcut null, which knows how files are stored and sees no picture: {described}.)" if scores else ""
    more = f", and {len(generators) - MAX_GENERATORS} more" if len(generators) > MAX_GENERATORS else ""
    return (
        f"{len(fitted)} images in {fitted['group'].nunique()} groups of copies and near-duplicates. Sources: "
        f"{len(sources) or 'not named'}. Generators, with their images: {names}{more}. The other "
        f"{len(frame) - len(fitted)} images below were held out.\n\n{splits}\n\n"
        f"{escape(audit_headline(run))}{null}"
    )


def _certificate(manifest: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    differences = [
        check["max_abs_difference"]
        for member in certificate["members"].values()
        for check in member.get("fp32", {}).values()
    ]
    largest = f" Largest difference of a logit from the original's: {max(differences):.1e}." if differences else ""
    lines = [
        f"- {escape(key)}: {escape(', '.join(precision['members']))}; "
        + ("certified" if precision["certified"] else "**not certified**, allowed by who exported it")
        for key, precision in manifest.get("precisions", {}).items()
    ]
    lower = "Below fp32 may run:\n\n" + "\n".join(lines) if lines else "Nothing may run below fp32."
    heldout = (
        " `heldout.parquet` has logits of held-out images, no ids and no paths: `infer --cascade` is fitted on them."
    )
    listed = heldout if heldout_rows.HELDOUT_FILE in manifest["files"] else ""
    return f"Every file is listed in `bundle.json` with its SHA-256.{largest}{listed}\n\n{lower}"

"""The model card of a bundle on the Hub: what it is, was trained on and scores. No torch.

The fields of its YAML are those of huggingface_hub's ModelCardData and EvalResult.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.commands.train import audit_headline
from ensemble.core import artifacts
from ensemble.core.errors import HubError
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.data.splits import FITTED_SPLITS
from ensemble.evaluation import report_data
from ensemble.evaluation import report_data as report_facts
from ensemble.models import members
from export.bundle import bundle, heldout_rows, hub_bundles, operating_point
from export.bundle.operating_point import OperatingPoint
from export.hub import card_scores
from export.hub.card_scores import escaped, table

BEGIN = "<!-- manyeyes push: what stands between these two marks is replaced by the next push -->"
END = "<!-- manyeyes push: end -->"
TAGS = ["image-classification", "ai-generated-image-detection", "ensemble", "onnx", "manyeyes"]
UNKNOWN = "not known"
LISTED = 30  # generators, at most

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
class Base:
    """What a member was fine-tuned from. checkpoint: its name on the Hub, "" for none. licence: "" if not looked up."""

    member: str
    checkpoint: str
    words: str
    licence: str = ""


def bases(run: Path, names: Sequence[str]) -> list[Base]:
    """Where the weights of a run's members come from; a folder of this machine is not named."""
    return [_base(name, members.read_info(run, name)) for name in names]


def _base(name: str, info: Mapping[str, Any]) -> Base:
    backbone = info["recipe"].get("backbone", {})
    checkpoint, of_hub = backbone.get("checkpoint"), info.get("hub_checkpoint")
    if checkpoint is None:
        architecture = escaped(backbone.get("architecture") or "not named")
        if backbone.get("weights"):
            return Base(name, "", f"{architecture}, with weights of a file", UNKNOWN)
        return Base(name, "", f"{architecture}, from random weights", "-")
    if of_hub and hub_bundles.NAME.fullmatch(of_hub):
        return Base(name, of_hub, f"[{escaped(of_hub)}](https://huggingface.co/{of_hub})")
    if "hub_checkpoint" in info or not hub_bundles.NAME.fullmatch(checkpoint):
        return Base(name, "", "a local checkpoint", UNKNOWN)
    return Base(name, "", "a checkpoint, not known whether of the Hub", UNKNOWN)  # trained before that was recorded


@bundle.damage_told("stacker.json")
def write_card(repo: str, folder: Path, run: Path | None, known: Sequence[Base], licence: str | None) -> str:
    """YAML and text of the bundle at `folder`; of the data it was trained on only where `run` is given.

    known: of each member that the run trained. licence: what the user says, as the Hub names it.
    """
    stacker, values = artifacts.read_json(folder / "stacker.json", bundle.REMEDY), bundle.contents(folder)
    certificate, chosen = bundle.certificate_of(folder), operating_point.read(folder, values)
    evaluations = card_scores.evaluations(run, stacker) if run else []
    parts = [
        BEGIN,
        _opening(repo, stacker),
        _use(repo, stacker, chosen),
        "## Members\n\n" + _all_members(chosen) + _members(stacker, values, known),
        "## Trained on\n\n" + _data(run),
        "## Scores\n\n" + _all_scores(chosen) + card_scores.scores(stacker) + card_scores.evaluated(evaluations),
        "## Exported files\n\n" + _certificate(values, certificate) + _point(stacker, chosen),
        "## Intended use, and limits\n\n" + INTENDED.format(repo=repo),
        END,
    ]
    return f"---\n{_metadata(repo, stacker, known, licence, evaluations)}\n---\n" + "\n\n".join(parts) + "\n"


def merged(repo: str, older: str, card: str) -> str:
    """The new card, with what others wrote in the older one around our part, and fields of its YAML that ours lacks."""
    from huggingface_hub import ModelCard

    if not older.strip():
        return card
    try:
        kept, new = ModelCard(older, ignore_metadata_errors=True), ModelCard(card)
        metadata = _both(kept.data.to_dict(), new.data.to_dict())
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
    return f"---\n{metadata}\n---\n{text.rstrip()}\n"


def _both(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """YAML of the new fields, and of those of the older that these lack; fails in many ways for what no card holds."""
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
    known: Sequence[Base],
    licence: str | None,
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    from huggingface_hub import ModelCardData

    results = card_scores.results(stacker, evaluations)
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


def _use(repo: str, stacker: Mapping[str, Any], chosen: OperatingPoint | None) -> str:
    called = _threshold(stacker) + (" with `--full`, by all members" if chosen else "")
    if chosen:
        called = f"{_threshold(chosen.stacker.to_dict())} as it runs unasked, {called}"
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
    rule = escaped(str(stacker.get("threshold_rule", ""))) or "not said"
    return f"**{stacker['threshold']:.4f}** (rule: {rule})"


def _all_members(chosen: OperatingPoint | None) -> str:
    """What the weights are of, where not all members run."""
    if chosen is None:
        return ""
    few = escaped(", ".join(chosen.stacker.members))
    return f"All members, with their weights in the stack of all, as `--full` runs them. Unasked run: {few}.\n\n"


def _all_scores(chosen: OperatingPoint | None) -> str:
    return "Of all members, as `--full` runs them.\n\n" if chosen else ""


def _members(stacker: Mapping[str, Any], values: Mapping[str, Any], known: Sequence[Base]) -> str:
    origin = {base.member: base for base in known}
    lines = []
    for name, weight in zip(stacker["members"], stacker["coef"], strict=True):
        entry = values["members"].get(name)
        preprocess_config = PreprocessConfig.from_dict(entry["contract"]) if entry else None
        pixels = (
            f"{preprocess_config.size} px, {preprocess_config.geometry}"
            if preprocess_config
            else "trained elsewhere, scores looked up by id"
        )
        base = origin.get(name, Base(name, "", "not known here", UNKNOWN))
        licence = escaped(base.licence) or "see its page"
        lines.append([escaped(name), f"{weight:.4f}", base.words, licence, escaped(pixels)])
    return table(["member", "weight", "made from", "licence of that", "image"], lines)


def _data(run: Path | None) -> str:
    if run is None:
        return "Not known here: this was pushed from a bundle alone."
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    counted = report_data.counts(frame)
    splits = table(
        ["rows", "class", "images", "groups"],
        [[escaped(row["name"]), row["of"], row["images"], row["groups"]] for row in counted["split"]],
    )
    fitted = frame[frame["split"].isin(FITTED_SPLITS)]
    trained = report_data.counts(fitted)
    made = [row for row in trained["generator"] if row["of"] == "ai" and row["name"] != "not named"]
    sources = {row["name"] for row in trained["source"]} - {"not named"}
    named = ", ".join(f"{escaped(row['name'])} ({row['images']})" for row in made[:LISTED]) or "none is named"
    more = f", and {len(made) - LISTED} more" if len(made) > LISTED else ""
    return (
        f"{len(fitted)} images in {fitted['group'].nunique()} groups of copies and near-duplicates. Sources: "
        f"{len(sources) or 'not named'}. Generators, with their images: {named}{more}. The other "
        f"{len(frame) - len(fitted)} images below were held out.\n\n{splits}\n\n"
        f"{escaped(audit_headline(run))}{_null(run)}"
    )


def _null(run: Path) -> str:
    scores = report_facts.null_scores(report_facts.read_audit(run))
    if not scores:
        return ""
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in scores.items())
    return f" (The shortcut null, which knows how files are stored and sees no picture: {said}.)"


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


def _point(stacker: Mapping[str, Any], chosen: OperatingPoint | None) -> str:
    """What runs unasked, where frontier chose some of the members."""
    return f"\n\nUnasked it runs {escaped(operating_point.told(chosen, len(stacker['members'])))}." if chosen else ""

"""canonicalise: write a labelled data set anew in its canonical form, files of both classes alike."""

import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError, ImageError
from ensemble.core.names import LABELS
from ensemble.core.parallel import ordered_map
from ensemble.data import dataset, sources
from ensemble.data.splits import Fractions
from ensemble.images import decode
from ensemble.images.canonical import JPEG_FORMATS, CanonicalPlan, canonical, last_compression, make_plan


def canonicalise(
    frame: pd.DataFrame, plan: CanonicalPlan, output: Path, seed: int
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Write each row's image to ai/ or real/ below `output`, and data.csv, which --data reads; replaces `output`.

    frame: rows of a data set. Returns the rows of data.csv, and why images were left out, by id. File names are
    hashes; the table has id, group, source and generator, and `original`, the file each image came from. The folder
    appears once it is whole. DataError if a class has no image large enough.
    """
    work = output.with_name(f".{output.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    for name in LABELS:
        artifacts.ensure_folder(work / name)
    rows: list[dict[Any, Any]] = frame.to_dict("records")
    results = ordered_map(partial(_write, plan=plan, folder=work, seed=seed), rows)
    table, left_out = [], {}
    bar = tqdm(results, "canonicalise", len(rows), unit="image", leave=False, disable=None)
    for row, result in zip(rows, bar, strict=True):
        if isinstance(result, ImageError):
            left_out[str(row["id"])] = str(result)
            continue
        original = str(Path(row["root"]) / row["path"])
        same = {name: row[name] for name in ("label", "group", "source", "generator")}
        table.append({"id": row["id"], "path": result, **same, "original": original})
    for label, name in enumerate(LABELS):
        if not any(row["label"] == label for row in table):
            shutil.rmtree(work, ignore_errors=True)
            raise DataError(f"no {name} image can be cropped to {plan.size} pixels; lower --size")
    done = pd.DataFrame(table)
    done.to_csv(work / "data.csv", index=False)
    artifacts.write_json(work / "canonical.json", {"plan": plan.to_dict(), "seed": seed, "images": len(done)})
    artifacts.replace_folder(work, output)
    return done, left_out


def _write(row: dict[Any, Any], plan: CanonicalPlan, folder: Path, seed: int) -> str | ImageError:
    # by content and id, not by class or order: random draws must not give the class away
    digest = sha256(f"{seed}/{row['sha256']}/{row['id']}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    file = Path(row["root"]) / row["path"]
    try:
        image = canonical(decode.decode(file), row["format"] in JPEG_FORMATS, plan, rng)
    except ImageError as error:
        return error
    quality, subsampling = last_compression(plan, rng)
    name = f"{LABELS[int(str(row['label']))]}/{digest.hex()[:20]}.jpg"
    image.save(folder / name, "JPEG", quality=quality, subsampling=subsampling)
    return name


def canonicalise_data(
    data: Sequence[Path],
    folder: Path,
    options: sources.ReadOptions,
    skip_unreadable: bool,
    size: int | None,
    quality: tuple[int, int] | None,
    seed: int,
) -> list[str]:
    """Write the canonical form of labelled data; returns lines that describe it."""
    if quality is not None and quality[0] > quality[1]:
        raise DataError(f"--quality {quality[0]} {quality[1]}: the lower one comes first")
    target = folder.resolve()
    if any(path.resolve().is_relative_to(target) or target.is_relative_to(path.resolve()) for path in data):
        raise DataError(f"{folder} holds the data itself, or lies in it; name another folder")
    artifacts.ensure_writable(target.parent)
    if folder.exists() and any(folder.iterdir()) and not (folder / "canonical.json").is_file():
        raise ArtifactError(f"{folder} is not empty and was not written by canonicalise; name another folder")
    items, notes = sources.read_data(data, options)
    items, indexed = dataset.index_items(items, skip_unreadable)
    plan = make_plan(indexed.headers, np.array([item.label for item in items]), size, quality)
    frame = dataset.assemble(items, indexed, dataset.near_pairs(indexed), Fractions(), seed, check=False)
    table, left_out = canonicalise(frame, plan, folder, seed)
    low, high = plan.quality
    counts, lost = Counter(table["label"]), Counter(frame.loc[frame["id"].isin(left_out), "label"])
    reasons = [*left_out.values()][:1]
    return [
        *notes,
        f"crops of {plan.size} pixels, JPEG quality {low} to {high}",
        f"{counts[1]} ai and {counts[0]} real images",
        *(f"left out: {lost[1]} ai and {lost[0]} real images ({reason}, for example)" for reason in reasons),
        *(f"left out: {message}" for message in indexed.errors.values()),
    ]

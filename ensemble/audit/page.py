"""The audit as one self-contained HTML page: findings, spectra, storage-swap test, contact sheets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ensemble.audit import storage_swap
from ensemble.audit.audit import BLOCK_ACCURACY, Audit
from ensemble.audit.metadata_classifier import PROBED_PER_CLASS
from ensemble.audit.train_test_shift import TestSet
from ensemble.core import artifacts
from ensemble.core.parallel import ordered_map
from ensemble.images import decode, figures, html, pixel_traces

SHEET_IMAGES = 32  # of a contact sheet


def render(audited: Audit, test: TestSet | None, data: Sequence[str], run: Path | None = None) -> str:
    """The page as HTML. run: its members score the storage-swap test, instead of a small classifier fitted here."""
    spectra, labels = audited.traces[pixel_traces.SPECTRUM_COLUMNS].to_numpy(), audited.labels[audited.probed]
    measured = ~np.isnan(spectra).any(axis=1)  # images that are large enough
    by_class = {label: spectra[measured & (labels == label)] for label in (0, 1)}
    named = (("metadata alone", audited.metadata), ("and bytes per pixel", audited.metadata_with_bytes))
    return html.render(
        "audit.html",
        data=data,
        audit=audited.to_dict(),
        probes=[(name, probe.to_dict()) for name, probe in named if probe is not None],
        limit=BLOCK_ACCURACY,
        probed=PROBED_PER_CLASS,
        spectra=figures.radial_spectra(by_class) if all(map(len, by_class.values())) else None,
        swap=_swap(audited, run),
        sheets=_sheets(audited, test),
    )


def _swap(audited: Audit, run: Path | None) -> storage_swap.StorageSwap | None:
    rows, labels = audited.probed, audited.labels[audited.probed]
    files = [audited.items[row].file for row in rows]
    if run is not None:
        names = artifacts.list_members(run)
        return storage_swap.swap_test(
            files, labels, storage_swap.member_score_function(run, names), f"the mean logit of {', '.join(names)}"
        )
    measured = audited.traces.notna().all(axis=1).to_numpy()
    if len(set(labels[measured])) < 2 or len(set(audited.groups[rows][measured])) < 4:
        return None
    traces, groups = audited.traces[measured].to_numpy(), audited.groups[rows][measured]
    fitted = storage_swap.fit_small_classifier(labels[measured], traces, groups)
    if fitted is None:
        return None
    score, test_rows = fitted
    scorer = "logistic regression on spectrum and grid traces, fitted on other groups"
    test_rows = np.flatnonzero(measured)[test_rows]
    return storage_swap.swap_test([files[row] for row in test_rows], labels[test_rows], score, scorer)


def _sheets(audited: Audit, test: TestSet | None) -> list[tuple[str, list[tuple[str, str]]]]:
    rng = np.random.default_rng(0)
    pools: list[tuple[str, list[tuple[str, Path]]]] = [
        (f"What counts as {name}", [(item.id, item.file) for item in audited.items if item.label == label])
        for label, name in ((1, "ai"), (0, "real"))
    ]
    if test is not None:
        pools.append(("The test", list(zip(test.names, test.files, strict=True))))
    sheets = []
    for title, images in pools:
        chosen = [images[row] for row in rng.permutation(len(images))[:SHEET_IMAGES]]
        pictures = ordered_map(lambda image: html.picture(decode.decode(image[1])), chosen)
        sheets.append(
            (
                f"{title}: {len(chosen)} at random",
                [(name, picture) for (name, _), picture in zip(chosen, pictures, strict=True)],
            )
        )
    return sheets

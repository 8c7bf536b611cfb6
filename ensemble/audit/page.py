"""The audit as one self-contained HTML page: findings, spectra, storage-swap test, contact sheets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from ensemble.audit import storage_swap
from ensemble.audit.audit import BLOCK_ACCURACY, AuditDetails
from ensemble.audit.metadata_classifier import PROBED_PER_CLASS
from ensemble.audit.train_test_shift import TestSet
from ensemble.core import artifacts
from ensemble.core.parallel import ordered_map
from ensemble.images import decode, html, pixel_traces

SHEET_IMAGES = 32  # of a contact sheet
COLOURS = {"ai": "#b3261e", "real": "#1f5fae"}


def render(audited: AuditDetails, test: TestSet | None, data: Sequence[str], run: Path | None = None) -> str:
    """The page as HTML. run: its members score the storage-swap test, instead of a small classifier fitted here."""
    named = (("metadata alone", audited.audit.metadata), ("and bytes per pixel", audited.audit.metadata_with_bytes))
    return html.render(
        "audit.html",
        data=data,
        audit=audited.audit.to_dict(),
        probes=[(name, probe.to_dict()) for name, probe in named if probe is not None],
        limit=BLOCK_ACCURACY,
        probed=PROBED_PER_CLASS,
        spectra=Markup(spectra(audited)),  # noqa: S704 - numbers and our own words
        swap=_swap(audited, run),
        sheets=_sheets(audited, test),
    )


def _swap(audited: AuditDetails, run: Path | None) -> storage_swap.StorageSwap | None:
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


def _sheets(audited: AuditDetails, test: TestSet | None) -> list[tuple[str, list[tuple[str, str]]]]:
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


def spectra(audited: AuditDetails) -> str:
    """Mean log10 power by radius for both classes, as SVG."""
    values = audited.traces[pixel_traces.SPECTRUM_COLUMNS].to_numpy()
    labels = audited.labels[audited.probed]
    measured = ~np.isnan(values).any(axis=1)
    values, labels = values[measured], labels[measured]
    if len(set(labels)) < 2:
        return "<p>Too few images of at least 32 pixels.</p>"
    low, high = float(np.floor(values.min())), float(np.ceil(values.max()))
    width, height, left, bottom = 720, 320, 50, 40

    def x(index: float) -> float:
        return left + index / (pixel_traces.SPECTRUM_BINS - 1) * (width - left - 10)

    def y(value: float) -> float:
        return (height - bottom) - (value - low) / (high - low) * (height - bottom - 10)

    parts = [
        f'<line x1="{left}" x2="{width - 10}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e4e4e4"/>'
        f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in np.arange(low, high + 1, max(1, round((high - low) / 6)))
    ]
    for share in (0, 0.125, 0.25, 0.375, 0.5):
        at = x(share * 2 * (pixel_traces.SPECTRUM_BINS - 1))
        parts.append(f'<text x="{at:.1f}" y="{height - bottom + 18}" text-anchor="middle">{share:g}</text>')
    for label, name in ((1, "ai"), (0, "real")):
        mean, spread = values[labels == label].mean(axis=0), values[labels == label].std(axis=0)
        band = [(x(i), y(v)) for i, v in enumerate(mean + spread)]
        band += [(x(i), y(v)) for i, v in reversed(list(enumerate(mean - spread)))]
        line = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(mean))
        area = " ".join(f"{a:.1f},{b:.1f}" for a, b in band)
        parts.append(f'<polygon points="{area}" fill="{COLOURS[name]}" opacity="0.12"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        parts.append(f'<text x="{width - 60}" y="{30 + 18 * (1 - label)}" fill="{COLOURS[name]}">{name}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 4}" text-anchor="middle">cycles a pixel</text>')
    parts.append(
        f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" text-anchor="middle">log10 power</text>'
    )
    head = f'<svg viewBox="0 0 {width} {height}" font-size="12" font-family="system-ui, sans-serif" role="img">'
    return f"{head}<title>Mean radial power spectra of ai and real images</title>{''.join(parts)}</svg>"

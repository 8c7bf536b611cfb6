"""The audit as one page that needs nothing else: findings, spectra, swap test, contact sheets."""

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

SHEET = 32  # images of a contact sheet
COLOURS = {"ai": "#b3261e", "real": "#1f5fae"}


def render(audited: AuditDetails, test: TestSet | None, data: Sequence[str], run: Path | None = None) -> str:
    """The page as HTML. With `run`, its members score the swap test instead of a small probe."""
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
    files = [file for file, kept in zip(files, measured, strict=True) if kept]
    traces, groups = audited.traces[measured].to_numpy(), audited.groups[rows][measured]
    found = storage_swap.fit_small_classifier(labels[measured], traces, groups)
    if found is None:
        return None
    score, judged = found
    scorer = "logistic regression on spectrum and grid traces, fitted on other groups"
    return storage_swap.swap_test([files[row] for row in judged], labels[measured][judged], score, scorer)


def _sheets(audited: AuditDetails, test: TestSet | None) -> list[tuple[str, list[tuple[str, str]]]]:
    rng = np.random.default_rng(0)
    sheets = []
    for label, name in ((1, "ai"), (0, "real")):
        rows = rng.permutation(np.flatnonzero(audited.labels == label))[:SHEET]
        chosen = [audited.items[row] for row in rows]
        title = f"What counts as {name}: {len(chosen)} at random"
        sheets.append((title, _pictures([item.id for item in chosen], [item.file for item in chosen])))
    if test is not None:
        rows = rng.permutation(len(test.files))[:SHEET]
        title = f"The test: {len(rows)} at random"
        sheets.append((title, _pictures([test.names[row] for row in rows], [test.files[row] for row in rows])))
    return sheets


def _pictures(names: Sequence[str], files: Sequence[Path]) -> list[tuple[str, str]]:
    return list(zip(names, ordered_map(_picture, files), strict=True))


def _picture(file: Path) -> str:
    return html.picture(decode.decode(file))


def spectra(audited: AuditDetails) -> str:
    """Mean log10 power by radius for both classes, as SVG."""
    values = audited.traces[pixel_traces.SPECTRUM_COLUMNS].to_numpy()
    labels = audited.labels[audited.probed]
    kept = ~np.isnan(values).any(axis=1)
    values, labels = values[kept], labels[kept]
    if len(set(labels)) < 2:
        return "<p>Too few images of at least 32 pixels.</p>"
    low, high = float(np.floor(values.min(axis=0).min())), float(np.ceil(values.max(axis=0).max()))
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
        place = x(share * 2 * (pixel_traces.SPECTRUM_BINS - 1))
        parts.append(f'<text x="{place:.1f}" y="{height - bottom + 18}" text-anchor="middle">{share:g}</text>')
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

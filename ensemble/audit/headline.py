"""A run's audit as it was stored, and its verdict in one line, to stand beside every score. Loads no scikit-learn."""

from pathlib import Path
from typing import Any

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError


def read_audit(run: Path) -> dict[str, Any] | None:
    """The run's audit.json, None where its data was not audited."""
    try:
        return artifacts.read_json(artifacts.audit_path(run), "run train-all again")
    except ArtifactError:
        return None


def audit_headline(run: Path) -> str:
    """The headline of the run's audit.json, and whether images were read in their canonical form."""
    audit = read_audit(run)
    if audit is None:
        return "The data of this run was not audited."
    canonical = " Images were read in their canonical form." if artifacts.canonical_path(run).exists() else ""
    return str(audit["headline"]) + canonical

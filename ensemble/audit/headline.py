"""The audit's verdict on a run's data in one line, to stand beside every score. Loads no scikit-learn."""

from pathlib import Path

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError


def audit_headline(run: Path) -> str:
    """The headline of the run's audit.json, and whether images were read in their canonical form."""
    canonical = " Images were read in their canonical form." if artifacts.canonical_path(run).exists() else ""
    try:
        return str(artifacts.read_json(artifacts.audit_path(run), "run train-all again")["headline"]) + canonical
    except ArtifactError:
        return "The data of this run was not audited."

"""Requests to train a member on a node of a cluster."""

from ensemble.cluster import nodes, train_worker
from ensemble.cluster.train_worker import TrainRequest
from ensemble.core import artifacts
from ensemble.core.recipe import Recipe


def recipe(name="vit", **train):
    values = {"lr": 1e-3, "epochs": 1, "batch_size": 4, **train}
    return Recipe.model_validate({"name": name, "backbone": {"architecture": "resnet"}, "train": values})


def order(run, **changes):
    digest = artifacts.file_sha256(artifacts.dataset_path(run)) if artifacts.dataset_path(run).exists() else ""
    values = {
        "job": "a", "local_paths": (), "versions": nodes.node_versions(train_worker.COMPARED_PACKAGES),
        "recipe": recipe().model_dump(mode="json"), "run": str(run), "data_sha256": digest, "folder": str(run),
        "device": "cpu", "processes": 1, "cpus": 1, "parallel_members": 1, "seed": 0,
        "report_to": (), "save_minutes": 10.0,
    }  # fmt: skip
    return TrainRequest(**values | changes)

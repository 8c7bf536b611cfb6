"""What an image takes of each member and of preparing its pixels, measured on this machine."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice

from tqdm import tqdm

from ensemble.core.preprocess_config import ImageContract
from ensemble.images.decode import Source
from ensemble.stacking.frontier import Costs
from export import bench
from export.plan import Planned, Say, device_of, open_member
from export.runtimes import autotune, capabilities

IMAGES, ROUNDS = 64, 5


def measure(plans: Mapping[str, Sequence[Planned]], sources: Sequence[Source], say: Say) -> Costs:
    """Costs on these images. plans: the same members at each precision; members are remembered, as `--tune` is."""
    (*_, plan) = plans.values()
    device = device_of(plan)
    views = list({member.contract.view: member.contract for member in plan}.values())
    places = {contract.view: place for place, contract in enumerate(views)}
    with tqdm(total=sum(map(len, plans.values())) + ROUNDS, desc="timing", leave=False, disable=None) as bar:
        decode, *more = _pixels(views, sources, device, bar.update)
        members = {precision: _members(each, say, bar.update) for precision, each in plans.items()}
    return Costs(
        decode,
        tuple(max(taken - decode, 0.0) for taken in more),
        {member.name: places[member.contract.view] for member in plan},
        members,
        {precision: _lower(each) for precision, each in plans.items()},
        overlap=device == "cuda",
    )


def _members(plan: Sequence[Planned], say: Say, progress: Callable[[int], object]) -> dict[str, float]:
    machine, found = capabilities.available(), {}
    for member in plan:  # one at a time: together they might not fit into memory
        runner = open_member(member, say)
        found[member.name] = 1000 * autotune.image_seconds(runner, member.setting, member.sha256, machine)
        progress(1)
    return found


def _pixels(
    views: Sequence[ImageContract], sources: Sequence[Source], device: str, progress: Callable[[int], object]
) -> list[float]:
    """Milliseconds an image: to decode it, then to decode it and prepare each view; medians of rounds in turn."""
    drawn = list(islice(cycle(sources), IMAGES))
    ways = [[], *([bench.idle(view)] for view in views)]
    rounds = []
    for _ in range(ROUNDS):
        rounds.append([bench.seconds(lambda way=way: bench.score(drawn, way, device)) for way in ways])  # type: ignore[misc]
        progress(1)
    return [1000 * statistics.median(times) / IMAGES for times in zip(*rounds, strict=True)]


def _lower(plan: Sequence[Planned]) -> frozenset[str]:
    return frozenset(member.name for member in plan if member.setting.precision != "fp32")

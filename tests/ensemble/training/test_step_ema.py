import pytest
import torch
from small_members import small_member

from ensemble.training.step import Ema

FAMILY = "timm/test_efficientnet"  # it has batch norms: floating and integer buffers
WEIGHT, MEAN, COUNT = (
    f"backbone.timm_model.{name}" for name in ("classifier.weight", "bn1.running_mean", "bn1.num_batches_tracked")
)


def move(member, step):
    """What a training step does to a member's state, in place and by a known amount."""
    with torch.no_grad():
        for tensor in member.state_dict().values():
            tensor.add_(1 + step)


def snapshot(member):
    return {name: tensor.clone() for name, tensor in member.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_average_follows_the_formula_for_weights_and_statistics():
    member = small_member(FAMILY)
    ema = Ema(member, 0.5, 1000)
    expected = {name: member.state_dict()[name].clone() for name in (WEIGHT, MEAN)}
    for step in range(12):
        move(member, step)
        ema.update(member)
        decay = min(0.5, (1 + step) / (10 + step))
        for name in expected:
            expected[name] = decay * expected[name] + (1 - decay) * member.state_dict()[name]
    for name, value in expected.items():
        torch.testing.assert_close(ema.average[name], value, rtol=1e-5, atol=1e-4)
    assert torch.equal(ema.average[COUNT], member.state_dict()[COUNT])  # an integer: no average of it
    assert ema.average.keys() == member.state_dict().keys()
    assert ema.count == 12


@pytest.mark.parametrize(
    ("decay", "steps", "expected"), [(0.9999, 200, 0.95), (0.9, 200, 0.9), (0.9999, 10**6, 0.9999), (0.9, 5, 0)]
)
def test_horizon_is_at_most_a_tenth_of_the_steps(decay, steps, expected):
    assert Ema(small_member("vit"), decay, steps).decay == pytest.approx(expected)


@pytest.mark.parametrize("carried", [True, False])
def test_goes_on_exactly_where_it_was(carried):
    member = small_member(FAMILY)
    ema = Ema(member, 0.99, 1000)
    for step in range(3):
        move(member, step)
        ema.update(member)
    saved = {name: tensor.clone() for name, tensor in ema.average.items()}
    resumed = Ema(small_member(FAMILY, seed=1), 0.99, 1000)
    resumed.load(saved, ema.count if carried else 0)
    for step in range(3, 6):
        move(member, step)
        ema.update(member)
        resumed.update(member)
    assert same(resumed.average, ema.average) is carried  # a lost count starts the warm-up again


def test_applied_gives_the_average_and_then_the_weights_back():
    member = small_member(FAMILY).eval()
    ema = Ema(member, 0.9, 1000)
    move(member, 0)
    ema.update(member)
    raw, average = snapshot(member), {name: tensor.clone() for name, tensor in ema.average.items()}
    places = [parameter.data_ptr() for parameter in member.parameters()]
    pixels = torch.randint(0, 255, (1, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        before = member(pixels)
        with ema.applied(member) as inside:
            assert same(snapshot(inside), average)
            assert not same(snapshot(inside), raw)
            assert not torch.equal(inside(pixels), before)
    assert same(snapshot(member), raw)
    assert same(ema.average, average)
    assert [parameter.data_ptr() for parameter in member.parameters()] == places


def test_an_error_inside_still_gives_the_weights_back():
    member = small_member("vit")
    ema = Ema(member, 0.9, 1000)
    move(member, 0)
    raw = snapshot(member)
    with pytest.raises(KeyboardInterrupt), ema.applied(member):
        raise KeyboardInterrupt
    assert same(snapshot(member), raw)
    move(member, 1)
    ema.update(member)  # and training goes on


@pytest.mark.gpu
def test_average_on_a_gpu_is_that_of_the_cpu():
    averages = {}
    for device in ("cpu", "cuda"):
        member = small_member(FAMILY).to(device)
        ema = Ema(member, 0.9, 1000)
        for step in range(3):
            move(member, step)
            ema.update(member)
        assert {tensor.device.type for tensor in ema.average.values()} == {device}
        averages[device] = {name: tensor.cpu() for name, tensor in ema.average.items()}
    torch.testing.assert_close(averages["cuda"], averages["cpu"])

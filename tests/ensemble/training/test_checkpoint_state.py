import pytest
import torch
from torch import nn

from ensemble.core.errors import ArtifactError
from ensemble.training import checkpoint


def test_tensors_and_facts_come_back(tmp_path):
    path = tmp_path / "deep" / "state.safetensors"
    tensors = {"a.weight": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last), "count": torch.tensor(3)}
    checkpoint.write(path, tensors, {"epoch": 2, "losses": [0.5]})
    found, facts = checkpoint.read(path)
    assert facts["epoch"] == 2
    assert facts["losses"] == [0.5]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    checkpoint.write(path, {"a": torch.zeros(8)}, {})
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=r"is damaged.*--fresh"):
        checkpoint.read(path)


def test_a_failed_write_keeps_the_older_state(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    checkpoint.write(path, {"a": torch.zeros(1)}, {"epoch": 1})

    def full(*arguments):
        raise checkpoint.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ArtifactError, match="No space left"):
        checkpoint.write(path, {"a": torch.ones(1)}, {"epoch": 2})
    assert checkpoint.read(path)[1]["epoch"] == 1


def optimizers(network):
    from timm.optim import Lamb, Lion

    return {
        "adamw": torch.optim.AdamW(network.parameters(), lr=0.1),
        "sgd": torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        "lamb": Lamb(network.parameters(), lr=0.1),
        "lion": Lion(network.parameters(), lr=0.1),
    }


def test_moments_take_the_layout_of_their_parameters(tmp_path):
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    tensors, groups = checkpoint.optimizer_state(optimizer)
    checkpoint.write(tmp_path / "s", tensors, {"groups": groups})
    again = torch.optim.AdamW(layer.parameters(), fused=True)
    checkpoint.load_optimizer_state(
        again, *(part if i == 0 else part["groups"] for i, part in enumerate(checkpoint.read(tmp_path / "s")))
    )
    moment = again.state[layer.weight]["exp_avg"]
    assert moment.stride() == layer.weight.stride() != moment.contiguous().stride()
    assert torch.equal(moment, optimizer.state[layer.weight]["exp_avg"])


def walk(network, optimizer, steps):
    for number in range(steps):
        loss = (network(torch.full((2, 3), 1.0 + number)) ** 2).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion"])
def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path, name):
    def fresh():
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        return network, optimizers(network)[name]

    network, optimizer = fresh()
    walk(network, optimizer, 3)
    tensors, groups = checkpoint.optimizer_state(optimizer)
    parts = {"o": tensors, "n": network.state_dict()}
    named = {f"{prefix}.{key}": tensor for prefix, part in parts.items() for key, tensor in part.items()}
    checkpoint.write(tmp_path / "s", named, {"g": groups})
    walk(network, optimizer, 3)

    other, again = fresh()
    found, facts = checkpoint.read(tmp_path / "s")
    other.load_state_dict(checkpoint.strip_prefix("n", found))
    unlike, unlike_optimizer = fresh()
    unlike.load_state_dict(checkpoint.strip_prefix("n", found))
    checkpoint.load_optimizer_state(again, checkpoint.strip_prefix("o", found), facts["g"])
    walk(other, again, 3)
    assert torch.equal(other.weight, network.weight)
    if name in ("adamw", "lamb"):
        walk(unlike, unlike_optimizer, 3)
        assert not torch.equal(unlike.weight, network.weight)  # the optimizer's state matters

import os

import pytest
import torch
from torch import nn

from perennial.errors import PerennialError
from perennial.storage.tensors import load_optimizer, load_tensors, save_optimizer, save_tensors


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path):
    base = torch.randn(6, 4)
    tensors = {
        "float": base,
        "transposed": base.T,
        "row of the same memory": base[2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "bfloat16": torch.randn(5).to(torch.bfloat16),
        "int64": torch.arange(3),
        "bool": torch.tensor([True, False]),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "learning": nn.Parameter(torch.randn(2)),
    }
    save_tensors(tensors, tmp_path / "t.safetensors")
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        raw = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (loaded[name], tensor.reshape(-1))]
        assert torch.equal(*raw)


def test_the_same_tensors_make_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_tensors({"y": torch.ones(3), "x": torch.zeros(2)}, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_truncated_file_a_missing_one_and_one_of_another_kind(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors({"x": torch.ones(100)}, path)
    os.truncate(path, 200)
    with pytest.raises(PerennialError, match=r"t\.safetensors cannot be read"):
        load_tensors(path)
    with pytest.raises(PerennialError, match=r"missing\.safetensors does not exist"):
        load_tensors(tmp_path / "missing.safetensors")
    torch.save({"x": torch.ones(3)}, path)
    with pytest.raises(PerennialError, match=r"t\.safetensors cannot be read"):
        load_tensors(path)


def learner():
    """A small network, AdamW in two groups that are not in the order of the names, and one idle parameter."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    parameters = {**dict(model.named_parameters()), "idle": nn.Parameter(torch.ones(5))}
    first = [parameters["2.weight"], parameters["0.bias"]]
    rest = [p for p in parameters.values() if not any(p is q for q in first)]
    optimizer = torch.optim.AdamW([{"params": first, "lr": 0.1}, {"params": rest, "lr": 0.01}], betas=(0.8, 0.95))
    return model, parameters, optimizer


def train(model, optimizer, steps):
    for step in steps:
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def test_adamw_goes_on_bit_for_bit(tmp_path):
    model, parameters, optimizer = learner()
    train(model, optimizer, range(5))

    stopped, stopped_parameters, stopped_optimizer = learner()
    train(stopped, stopped_optimizer, range(3))
    save_tensors(dict(stopped_parameters), tmp_path / "p.safetensors")
    save_optimizer(stopped_optimizer, stopped_parameters, tmp_path / "o.safetensors")

    resumed, resumed_parameters, resumed_optimizer = learner()
    for name, tensor in load_tensors(tmp_path / "p.safetensors").items():
        resumed_parameters[name].data = tensor
    load_optimizer(resumed_optimizer, dict(reversed(resumed_parameters.items())), tmp_path / "o.safetensors")
    train(resumed, resumed_optimizer, range(3, 5))

    for name, parameter in parameters.items():
        assert torch.equal(resumed_parameters[name], parameter)
        expected, found = optimizer.state.get(parameter, {}), resumed_optimizer.state.get(resumed_parameters[name], {})
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[kind], expected[kind]) for kind in expected)
    assert int(resumed_optimizer.state[resumed_parameters["0.bias"]]["step"]) == 5
    assert [group["lr"] for group in resumed_optimizer.param_groups] == [0.1, 0.01]


def test_the_optimiser_file_is_keyed_by_parameter_name(tmp_path):
    model, parameters, optimizer = learner()
    train(model, optimizer, range(2))
    save_optimizer(optimizer, parameters, tmp_path / "o.safetensors")
    state = load_tensors(tmp_path / "o.safetensors")
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    assert state.keys() == {f"{kind}/{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in names}
    assert state["step/0.bias"].item() == 2


def test_the_memory_of_another_policy_is_refused(tmp_path):
    model, parameters, optimizer = learner()
    train(model, optimizer, range(1))
    save_optimizer(optimizer, parameters, tmp_path / "o.safetensors")
    other = {**parameters, "0.bias": nn.Parameter(torch.zeros(9))}
    with pytest.raises(PerennialError, match=r"'exp_avg/0.bias' in .* has shape \(8,\), .* has \(9,\)"):
        load_optimizer(torch.optim.AdamW(other.values()), other, tmp_path / "o.safetensors")
    fewer = {name: p for name, p in parameters.items() if name != "2.bias"}
    with pytest.raises(PerennialError, match=r"has 'exp_avg/2\.bias', but the policy does not train '2\.bias'"):
        load_optimizer(torch.optim.AdamW(fewer.values()), fewer, tmp_path / "o.safetensors")

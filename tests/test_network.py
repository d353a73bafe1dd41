"""Risk of two-layer networks: values against sums written out, hand-written gradients against automatic ones."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfsde import EmpiricalMeasure, Energy, Neuron, activation, network, risk

FLOAT64 = torch.float64
N_DATA, N_INPUTS = 13, 3


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def some_measure(*lead: int, d: int, n: int = 5, weighted: bool = False) -> EmpiricalMeasure:
    weights = torch.softmax(normals(*lead, n, seed=1), -1) if weighted else None
    return EmpiricalMeasure(normals(*lead, n, d), weights)


def log_cosh(f: Tensor, y: Tensor) -> Tensor:
    each = torch.log(torch.cosh(f - y))
    return each if y.ndim == 1 else each.sum(-1)


LOSSES = {"squared": "squared", "logistic": "logistic", "callable": log_cosh}


def data(k: int | None, n: int = N_DATA) -> tuple[Tensor, Tensor]:
    """Inputs and targets ±1, scalars or k of them."""
    return normals(n, N_INPUTS, seed=3), normals(*((n,) if k is None else (n, k)), seed=4).sign()


def plain_feature(theta: Tensor, z: Tensor) -> Tensor:
    """A feature without a hand-written gradient.    (..., N, 1, 4), (b, 3) -> (..., N, b)."""
    return theta[..., 3] * torch.sin((theta[..., :3] * z).sum(-1))


# Values ---------------------------------------------------------------------------------------------------------------

PLAIN_ACTIVATIONS = {"tanh": np.tanh, "sigmoid": lambda a: 1 / (1 + np.exp(-a)), "relu": lambda a: np.maximum(a, 0)}
PLAIN_LOSSES = {
    "squared": lambda f, y: 0.5 * (f - y) ** 2,
    "logistic": lambda f, y: np.log1p(np.exp(-y * f)),
    "callable": lambda f, y: np.log(np.cosh(f - y)),
}


def risk_by_loops(activation, loss, scale, mu, z, y) -> float:
    z, y, theta, w = (a.numpy() for a in (z, y.reshape(len(y), -1), mu.points, mu.weights))
    total = 0.0
    for s in range(len(z)):
        f = sum(w[j] * scale * PLAIN_ACTIVATIONS[activation](theta[j, :3] @ z[s]) * theta[j, 3:] for j in range(len(w)))
        total += PLAIN_LOSSES[loss](f, y[s]).sum()
    return total / len(z)


every_network = [
    pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"]),
    pytest.mark.parametrize("k", [None, 1, 3]),
    pytest.mark.parametrize("loss", LOSSES),
    pytest.mark.parametrize("weighted", [False, True]),
    pytest.mark.parametrize("scale", [1.0, 2.5]),
]


def for_every_network(test):
    for mark in every_network:
        test = mark(test)
    return test


@for_every_network
def test_the_risk_is_the_average_loss_written_out(activation, k, loss, weighted, scale):
    z, y = data(k)
    mu = some_measure(d=3 + (k or 1), weighted=weighted)
    F = risk(Neuron(activation, k, scale), LOSSES[loss], z, y)
    expected = risk_by_loops(activation, loss, scale, mu, z, y)
    assert F(mu).item() == pytest.approx(expected, rel=1e-13)


# Derivatives ----------------------------------------------------------------------------------------------------------


def agree(found, expected) -> bool:
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(found, expected, strict=True))


def derivatives(F: Energy, mu: EmpiricalMeasure, x: Tensor, y: Tensor) -> list[Tensor]:
    return [
        F.functional_derivative(mu, x),
        F.functional_derivative(mu, mu.points),
        F.intrinsic_derivative(mu, x),
        F.intrinsic_derivative(mu, mu.points),
        F.second_derivative(mu, x, y),
    ]


def automatic(F: Energy) -> Energy:
    """The same value, differentiated automatically."""
    return Energy(lambda mu: F(mu))


@for_every_network
@pytest.mark.parametrize("lead", [(), (2,)])
def test_hand_written_derivatives_are_the_automatic_ones(activation, k, loss, weighted, scale, lead):
    d = 3 + (k or 1)
    F = risk(Neuron(activation, k, scale), LOSSES[loss], *data(k))
    mu = some_measure(*lead, d=d, weighted=weighted)
    x, y = normals(*lead, 4, d, seed=7), normals(*lead, 2, d, seed=8)
    found, expected = derivatives(F, mu, x, y), derivatives(automatic(F), mu, x, y)
    assert [a.shape for a in found] == [b.shape for b in expected]
    assert agree(found, expected)
    assert not any(a.requires_grad for a in found)
    assert not any(agree([-a], [b]) or agree([2 * a], [b]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lead", [(), (2, 2)])
def test_a_plain_feature_has_the_automatic_derivatives_too(loss, weighted, lead):
    F = risk(plain_feature, LOSSES[loss], *data(None))
    mu = some_measure(*lead, d=4, weighted=weighted)
    x, y = normals(*lead, 4, 4, seed=7), normals(*lead, 2, 4, seed=8)
    assert agree(derivatives(F, mu, x, y), derivatives(automatic(F), mu, x, y))


def test_a_particle_of_mass_zero_feels_the_force_too():
    F = risk(Neuron("tanh"), "logistic", *data(None))
    mu = EmpiricalMeasure(normals(3, 4), torch.tensor([0.5, 0.0, 0.5], dtype=FLOAT64))
    expected = automatic(F).intrinsic_derivative(mu, mu.points.clone())
    torch.testing.assert_close(F.intrinsic_derivative(mu, mu.points), expected, rtol=1e-10, atol=1e-12)


def test_the_neuron_as_a_plain_callable_has_the_same_gradient():
    neuron, mu = Neuron("sigmoid", 2, 1.7), some_measure(2, d=5, weighted=True)
    by_hand = risk(neuron, "squared", *data(2)).intrinsic_derivative(mu, mu.points)
    plain = risk(lambda theta, z: neuron(theta, z), "squared", *data(2)).intrinsic_derivative(mu, mu.points)
    torch.testing.assert_close(by_hand, plain, rtol=1e-12, atol=1e-13)


def test_targets_with_one_column_are_those_without():
    z, y = data(None)
    mu = some_measure(d=4)
    column = risk(Neuron("tanh", 1), "logistic", z, y[:, None])
    flat = risk(Neuron("tanh"), "logistic", z, y)
    torch.testing.assert_close(column(mu), flat(mu), rtol=1e-14, atol=0)
    torch.testing.assert_close(
        column.intrinsic_derivative(mu, mu.points), flat.intrinsic_derivative(mu, mu.points), rtol=1e-12, atol=1e-14
    )


@given(
    lead=st.lists(st.integers(1, 2), max_size=2),
    n=st.integers(1, 4),
    m=st.integers(1, 4),
    k=st.sampled_from([None, 1, 2]),
    activation=st.sampled_from(["tanh", "sigmoid", "relu"]),
    dtype=st.sampled_from([torch.float32, FLOAT64]),
)
def test_shapes_and_dtypes_follow_the_particles(lead, n, m, k, activation, dtype):
    d = Neuron(activation, k).dim(N_INPUTS)
    F = risk(Neuron(activation, k), "squared", *data(k))
    mu = EmpiricalMeasure(normals(*lead, n, d).to(dtype))
    x = normals(*lead, m, d, seed=7).to(dtype)
    for value, shape in [
        (F(mu), tuple(lead)),
        (F.functional_derivative(mu, x), (*lead, m)),
        (F.intrinsic_derivative(mu, x), (*lead, m, d)),
        (F.intrinsic_derivative(mu, mu.points), (*lead, n, d)),
        (F.second_derivative(mu, x, mu.points), (*lead, m, n)),
        (F.predict(mu, F._data[0]), (*lead, N_DATA, *(() if k is None else (k,)))),
    ]:
        assert tuple(value.shape) == shape
        assert value.dtype == dtype


@pytest.mark.parametrize("under", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("feature", [Neuron("tanh"), plain_feature])
def test_derivatives_are_detached_whatever_is_tracked(under, feature):
    F = risk(feature, log_cosh, *data(None))
    mu = some_measure(d=4, weighted=True)
    expected = derivatives(F, mu, mu.points, mu.points)
    tracked = EmpiricalMeasure(mu.points.clone().requires_grad_(), mu.weights.clone().requires_grad_())
    with under():
        found = derivatives(F, tracked, tracked.points, tracked.points)
    assert agree(found, expected)
    assert not any(a.requires_grad for a in found)


@pytest.mark.parametrize("k", [None, 2])
def test_the_value_is_differentiable_in_points_and_weights(k):
    F, d = risk(Neuron("tanh", k), "squared", *data(k)), 3 + (k or 1)
    mu = some_measure(d=d, weighted=True)
    points, weights = mu.points.clone().requires_grad_(), mu.weights.clone().requires_grad_()
    of_points, of_weights = torch.autograd.grad(F(EmpiricalMeasure(points, weights)), [points, weights])
    force, first = F.intrinsic_derivative(mu, mu.points), F.functional_derivative(mu, mu.points)
    torch.testing.assert_close(of_points, mu.weights[:, None] * force, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(of_weights - (mu.weights * of_weights).sum(), first, rtol=1e-12, atol=1e-14)


# Chunks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", [Neuron("tanh"), Neuron("relu"), plain_feature])
@pytest.mark.parametrize("rows", [1, 5, 6, 12])
def test_the_size_of_a_chunk_of_data_changes_rounding_only(monkeypatch, feature, rows):
    F = risk(feature, "logistic", *data(None))
    mu, x = some_measure(2, d=4, weighted=True), normals(2, 4, 4, seed=7)
    whole = [F(mu), F.predict(mu, F._data[0]), *derivatives(F, mu, x, x)]
    monkeypatch.setattr(network, "LEAST_CHUNK", rows)
    monkeypatch.setattr(network, "CHUNK_FLOATS", 1)
    assert len(list(F._rows(mu, N_DATA))) == math.ceil(N_DATA / rows)
    chunked = [F(mu), F.predict(mu, F._data[0]), *derivatives(F, mu, x, x)]
    for found, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


class Memory(TorchDispatchMode):
    """The largest tensor made under it, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._record(tensor.untyped_storage())
        return out

    def _record(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.largest = max(self.largest, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def peak(work) -> int:
    with Memory() as used:
        work()
    return used.peak


N_MANY, CHUNK = 200, 16


def many(feature, n_data: int) -> tuple[Energy, EmpiricalMeasure]:
    F, mu = risk(feature, log_cosh, *data(None, n_data)), some_measure(d=4, n=N_MANY)
    F(mu)
    return F, mu


DERIVATIVES = {
    "functional": lambda F, mu: F.functional_derivative(mu, mu.points),
    "intrinsic": lambda F, mu: F.intrinsic_derivative(mu, mu.points),
    "intrinsic elsewhere": lambda F, mu: F.intrinsic_derivative(mu, mu.points.clone()),
    "second": lambda F, mu: F.second_derivative(mu, mu.points[:3], mu.points[:2]),
}


@pytest.mark.parametrize("feature", [Neuron("tanh"), plain_feature], ids=["neuron", "plain"])
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_no_graph_survives_a_chunk(monkeypatch, feature, derivative):
    monkeypatch.setattr(network, "CHUNK_FLOATS", N_MANY * CHUNK)
    few, more = ((lambda n=n: derivative(*many(feature, n))) for n in (4 * CHUNK, 40 * CHUNK))
    of_few, of_more = peak(few), peak(more)
    # What may grow with the data are the data themselves, less than a kilobyte for each chunk.
    assert of_more - of_few < 36 * 1024
    # The automatic derivative keeps every chunk's activations.
    kept = peak(lambda: derivative(automatic(many(feature, 40 * CHUNK)[0]), many(feature, CHUNK)[1]))
    assert kept - of_few > 36 * 8 * N_MANY * CHUNK


@pytest.mark.parametrize("feature", [Neuron("relu"), plain_feature], ids=["neuron", "plain"])
def test_no_tensor_has_n_by_n_entries(monkeypatch, feature):
    monkeypatch.setattr(network, "CHUNK_FLOATS", N_MANY * CHUNK)
    F, mu = many(feature, 5 * CHUNK)
    F.intrinsic_derivative(mu, mu.points)
    for derivative in (lambda F, mu: F(mu), *list(DERIVATIVES.values())[:3]):
        with Memory() as used:
            derivative(F, mu)
        # The plain feature's α·z, of three inputs, is its largest.
        assert used.largest <= 8 * 3 * N_MANY * CHUNK < 8 * N_MANY * N_MANY
    with Memory() as used:
        F.second_derivative(mu, mu.points, mu.points)
    assert used.largest >= 8 * N_MANY * N_MANY


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "inputs", "targets", "message"),
    [
        ("hinge", torch.zeros(2, 3), torch.ones(2), "unknown loss 'hinge'; expected one of squared, logistic"),
        ("squared", torch.zeros(3), torch.ones(3), r"inputs have shape \(3,\)"),
        ("squared", torch.zeros(2, 3), torch.ones(3), r"targets \(3,\); expected \(n, p\)"),
        ("squared", torch.zeros(2, 3), torch.ones(2, 1, 1), "expected"),
        ("squared", torch.zeros(0, 3), torch.ones(0), "n >= 1"),
        ("squared", torch.full((2, 3), math.nan), torch.ones(2), "must be finite"),
        ("squared", torch.zeros(2, 3), torch.tensor([1.0, math.inf]), "must be finite"),
        ("logistic", torch.zeros(2, 3), torch.tensor([0, 1]), r"labels 0 and 1 become 2\*y - 1"),
    ],
)
def test_data_that_do_not_fit_are_refused(loss, inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        risk(Neuron(), loss, inputs, targets)


def test_whole_numbers_become_floats():
    F = risk(Neuron(), "logistic", np.array([[1, 2, 3], [4, 5, 6]]), np.array([1, -1]))
    G = risk(Neuron(), "logistic", torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([1.0, -1]))
    mu = some_measure(d=4)
    assert torch.equal(F(mu), G(mu))


def test_a_neuron_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="unknown activation 'gelu'; expected one of tanh, sigmoid, relu"):
        Neuron("gelu")
    with pytest.raises(ValueError, match="n_outputs = 0"):
        Neuron(n_outputs=0)
    F, mu = risk(Neuron(n_outputs=2), "squared", *data(2)), some_measure(d=4)
    for work in (lambda: F(mu), lambda: F.intrinsic_derivative(mu, mu.points)):
        with pytest.raises(ValueError, match=r"particles have dimension 4; 3 inputs and 2 output\(s\) need 5"):
            work()


@pytest.mark.parametrize(
    "feature",
    [
        lambda theta, z: plain_feature(theta, z).mean(-2),
        lambda theta, z: plain_feature(theta, z).mT,
        lambda theta, z: plain_feature(theta, z).unsqueeze(-1),
        Neuron(n_outputs=1),
    ],
)
@pytest.mark.parametrize("use", [0, 1, 2])
def test_a_feature_of_the_wrong_shape_is_refused(feature, use):
    F, mu = risk(feature, "squared", *data(None)), some_measure(d=4)
    work = [
        lambda: F(mu),
        lambda: F.intrinsic_derivative(mu, mu.points),
        lambda: F.functional_derivative(mu, mu.points),
    ]
    with pytest.raises(ValueError, match=r"feature returned shape .* particle axis, data axis"):
        work[use]()


@pytest.mark.parametrize("loss", [lambda f, y: (f - y).square(), lambda f, y: (f - y).square().mean()])
def test_a_loss_of_the_wrong_shape_is_refused(loss):
    F, mu = risk(Neuron(n_outputs=2), loss, *data(2)), some_measure(2, d=5)
    with pytest.raises(ValueError, match="loss returned shape"):
        F(mu)


# The compiled tangent ------------------------------------------------------------------------------------------------


needs_compiler = pytest.mark.skipif(activation._compiled is None, reason="the compiled activation was not built")


@needs_compiler
def test_the_compiled_tangent_is_that_of_float64_to_a_few_roundings():
    sizes = torch.logspace(-20, 2, 20_001, dtype=FLOAT64)
    exact = torch.cat([-sizes, sizes, torch.linspace(-10, 10, 100_003, dtype=FLOAT64)]).float()
    found = activation.tanh_(exact.clone()).double()
    wanted = torch.tanh(exact.double())
    assert ((found - wanted).abs() <= 4e-7 * wanted.abs()).all()
    assert found.abs().max() == 1


@needs_compiler
def test_the_compiled_tangent_keeps_signs_infinities_and_nan():
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    activation.tanh_(x)
    assert x[:4].tolist() == [0, 0, 1, -1]
    assert torch.signbit(x[1])
    assert torch.isnan(x[4])


@needs_compiler
def test_threads_and_cuts_do_not_change_the_compiled_tangent():
    x = torch.linspace(-6, 6, 70_070).reshape(2, 5, 7007)
    masses = torch.cos(torch.arange(14_014.0)).reshape(2, 7007, 1)
    whole = x.clone()
    sums = activation.tanh_sum_(whole, masses)
    torch.testing.assert_close(sums.double(), torch.bmm(torch.tanh(x.double()), masses.double()), rtol=1e-5, atol=1e-3)
    torch.set_num_threads(2)
    again = x.clone()
    assert torch.equal(activation.tanh_sum_(again, masses), sums)
    assert torch.equal(again, whole)
    for n in (1, 15, 16, 1025):
        assert torch.equal(activation.tanh_(x[..., :n].clone()), whole[..., :n])


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_the_tangent_of_other_tensors_is_torchs(dtype):
    x = torch.linspace(-3, 3, 12, dtype=dtype).reshape(3, 4)
    assert torch.equal(activation.tanh_(x.clone().T), torch.tanh(x).T)
    if dtype is FLOAT64:
        assert torch.equal(activation.tanh_(x.clone()), torch.tanh(x))


def test_the_compiled_activation_leaves_gradients_to_torch():
    x, w = normals(1, 4, 3).float(), normals(3, 5, seed=1).float().requires_grad_()
    masses = normals(1, 5, 1, seed=2).float().requires_grad_()

    def slopes(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value.sum(), inputs)

    torch.testing.assert_close(slopes(activation.tanh_(x @ w), w), slopes(torch.tanh(x @ w), w))
    ours, true = activation.tanh_sum_(x @ w, masses), torch.tanh(x @ w) @ masses
    torch.testing.assert_close(slopes(ours, w, masses), slopes(true, w, masses))
    still = (x @ w).detach()
    torch.testing.assert_close(
        slopes(activation.tanh_sum_(still.clone(), masses), masses), slopes(torch.tanh(still) @ masses, masses)
    )


def test_writing_over_what_a_gradient_needs_is_noticed():
    x, w = normals(4, 3).float(), torch.ones((), requires_grad=True)
    product = x * w
    activation.tanh_(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()

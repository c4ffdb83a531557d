"""Which neurons of an MLP go first, what that costs, and the re-fit of its output linear on those that stay."""

import itertools

import pytest
import torch

from hisvd import neurons
from hisvd.cached_moments import packed
from hisvd.layer_statistics import neuron_statistics
from hisvd.neurons import (
    eliminate,
    fitting_moment,
    narrow_input_spectra,
    narrow_output_spectra,
    refits,
    removal_losses,
    spectrum_widths,
    stacked,
)
from hisvd.whitening_svd import SecondMoment, cholesky_root, optimal_factors, second_moment, whitened

TOKENS = 400


def elimination_loss(weight: torch.Tensor, moment: torch.Tensor, f: SecondMoment, kept: torch.Tensor) -> torch.Tensor:
    """½ tr(F W (C − C_{:,S} C_{S,S}⁻¹ C_{S,:}) Wᵀ): what keeping the neurons S = `kept` (k,) alone adds."""
    removed = torch.ones(len(moment), dtype=torch.bool, device=moment.device).index_fill_(0, kept, False)
    removed = removed.nonzero().flatten()
    inner = moment[removed][:, removed]
    if len(kept):
        root = cholesky_root(moment[kept][:, kept], 0.0)
        seen = torch.linalg.solve_triangular(root, moment[kept][:, removed], upper=False)
        inner = inner - seen.T @ seen
    v = whitened(weight, None, f)[:, removed]
    return ((v @ inner) * v).sum() / 2


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(n, seed, noise=1.5):
    """Hidden neurons (tokens, n) of various scales; half of their variance or more comes from four shared causes."""
    shared = gaussian(TOKENS, 4, seed=seed) @ gaussian(4, n, seed=seed + 1)
    return (shared + noise * gaussian(TOKENS, n, seed=seed + 2)) * (gaussian(n, seed=seed + 3) / 2).exp()


def part(f, rows):
    """The second moment `f` of the entries `rows` alone."""
    return second_moment((f.root @ f.root.T)[rows][:, rows], 0.0)


def output_metric(m, seed):
    g = gaussian(TOKENS, m, seed=seed + 4) @ gaussian(m, m, seed=seed + 5)
    return second_moment(g.T @ g / TOKENS, 1e-2)


def problem(n, m, seed, mean=None):
    """W (m, n), C (n, n) and F (m, m)."""
    h = activations(n, seed)
    moment = h.T @ h / TOKENS
    return gaussian(m, n, seed=seed + 6), fitting_moment(moment, mean, 1e-4), output_metric(m, seed)


def kept_at(order, width):
    return order[len(order) - width :].sort().values


def refitted(weight, moment, kept):
    return refits(weight, moment, kept).at(len(kept))


def loss_of_weight(weight, moment, f, kept, fit):
    """½ tr(F D C Dᵀ), D = W − fit on the kept neurons: the definition."""
    difference = weight.double().clone()
    difference[:, kept] -= fit
    return (f.root @ f.root.T @ difference @ moment @ difference.T).trace() / 2


@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 1), (7, 5), (16, 4), (17, 30), (100, 24)])
def test_recorded_losses_are_those_of_the_neurons_kept(n, m):
    weight, moment, f = problem(n, m, seed=n)
    order, losses = eliminate(weight, moment, f)
    assert sorted(order.tolist()) == list(range(n)) and losses.shape == (n + 1,) and losses.dtype == torch.float64
    assert losses[0] == 0 and bool((losses.diff() >= 0).all())
    for width in range(n + 1):
        expected = elimination_loss(weight, moment, f, kept_at(order, width))
        torch.testing.assert_close(losses[n - width], expected, rtol=1e-8, atol=1e-8 * losses[-1].item())
    whole = (f.root @ f.root.T @ weight @ moment @ weight.T).trace() / 2
    torch.testing.assert_close(losses[-1], whole, rtol=1e-8, atol=0)


def test_elimination_loss_is_that_of_the_refitted_weight():
    weight, moment, f = problem(12, 7, seed=3)
    for width in (1, 5, 11, 12):
        kept = kept_at(torch.randperm(12, generator=torch.Generator().manual_seed(width)), width)
        fit = refitted(weight, moment, kept)
        expected = loss_of_weight(weight, moment, f, kept, fit)
        torch.testing.assert_close(elimination_loss(weight, moment, f, kept), expected, rtol=1e-9, atol=1e-12)


def test_no_set_of_neurons_is_much_better():
    """Against all subsets, of every size. One order serves all sizes, so that no order is the best at each of them."""
    ratios = []
    for n, m in ((4, 3), (6, 12), (8, 5)):
        for seed in range(0, 200, 10):
            weight, moment, f = problem(n, m, seed)
            losses = eliminate(weight, moment, f).losses
            for width in range(1, n):
                sets = map(torch.tensor, itertools.combinations(range(n), width))
                best = min(elimination_loss(weight, moment, f, kept).item() for kept in sets)
                ratios.append(losses[n - width].item() / best)
    ratios.sort()
    assert ratios[0] > 1 - 1e-9 and ratios[-1] < 1.5
    assert ratios[int(0.98 * len(ratios))] <= 1.1 and sum(ratios) / len(ratios) < 1.01


def test_blocks_lose_little_against_one_neuron_at_a_time(monkeypatch):
    weight, moment, f = problem(150, 40, seed=1)
    blocks = eliminate(weight, moment, f).losses
    monkeypatch.setattr(neurons, "BLOCK", 1)
    single = eliminate(weight, moment, f).losses
    assert bool((blocks <= 1.01 * single + 1e-12).all())


def test_refit_is_the_minimum():
    weight, moment, f = problem(20, 8, seed=5)
    kept = kept_at(eliminate(weight, moment, f).order, 9)
    fit = refitted(weight, moment, kept).requires_grad_()
    loss = loss_of_weight(weight, moment, f, kept, fit)
    loss.backward()
    assert fit.grad.abs().max() < 1e-8 * (f.root @ f.root.T @ weight @ moment).abs().max()
    for seed in range(10):
        other = fit.detach() + 1e-3 * gaussian(8, 9, seed=seed)
        assert loss_of_weight(weight, moment, f, kept, other) > loss


def test_refit_on_all_neurons_is_the_weight_itself():
    weight, moment, _ = problem(10, 4, seed=2)
    torch.testing.assert_close(refitted(weight, moment, torch.arange(10)), weight)


def test_one_root_serves_the_refits_on_all_numbers_of_neurons():
    weight, moment, f = problem(20, 8, seed=4)
    order = eliminate(weight, moment, f).order.flip(0)
    every = refits(weight, moment, order[:15])
    for width in (1, 6, 15):
        torch.testing.assert_close(every.at(width), refitted(weight, moment, order[:width]))
        root = cholesky_root(moment[order[:width]][:, order[:width]], 0.0)
        torch.testing.assert_close(every.root[:width, :width], root)
        torch.testing.assert_close(every.at(width) @ root, every.seen[:, :width])


def test_refit_is_least_squares_on_the_activations():
    h, weight = activations(9, seed=8), gaussian(4, 9, seed=1)
    kept = torch.tensor([0, 3, 4, 7])
    expected = torch.linalg.lstsq(h[:, kept], h @ weight.T).solution.T
    torch.testing.assert_close(refitted(weight, h.T @ h / TOKENS, kept), expected, rtol=1e-9, atol=1e-9)


def test_with_a_bias_the_refit_is_least_squares_with_a_constant():
    h, weight = activations(9, seed=8) + 3 * gaussian(9, seed=4), gaussian(4, 9, seed=1)
    kept, mean = torch.tensor([0, 3, 4, 7]), h.mean(0)
    with_one = torch.cat([h[:, kept], h.new_ones(TOKENS, 1)], 1)
    expected = torch.linalg.lstsq(with_one, h @ weight.T).solution.T
    fit = refitted(weight, fitting_moment(h.T @ h / TOKENS, mean, 0), kept)
    torch.testing.assert_close(fit, expected[:, :-1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(weight @ mean - fit @ mean[kept], expected[:, -1], rtol=1e-8, atol=1e-8)


def test_where_a_bias_takes_up_the_means_a_constant_neuron_costs_nothing():
    h, m = activations(6, seed=0), 5
    h[:, 2] = 7.0
    weight, f, moment = gaussian(m, 6, seed=9), output_metric(m, seed=1), h.T @ h / TOKENS
    with_bias = eliminate(weight, fitting_moment(moment, h.mean(0), 1e-9), f)
    assert with_bias.order[0] == 2 and with_bias.losses[1] < 1e-6 * with_bias.losses[-1]
    without = eliminate(weight, fitting_moment(moment, None, 1e-9), f)
    assert without.losses[1] > 1e-3 * without.losses[-1]


def test_dead_neurons_go_first_and_cost_nothing():
    weight, _, f = problem(40, 10, seed=6)
    h = activations(40, seed=6)
    silent, unread, twin = [3, 17], [8, 30], [21, 5]
    h[:, silent] = 0
    h[:, twin[1]] = h[:, twin[0]]  # one of two alike is enough
    weight[:, unread] = 0
    order, losses = eliminate(weight, fitting_moment(h.T @ h / TOKENS, None, 1e-10), f)
    first = set(order[:5].tolist())
    assert {*silent, *unread} < first and first & set(twin)
    assert losses[5] < 1e-6 * losses[-1] and losses[6] > 1e-4 * losses[-1]


def test_moment_of_deficient_rank():
    """Fewer tokens than neurons: as many neurons as there are tokens say all."""
    h, m = activations(30, seed=2)[:12], 6
    weight, f = gaussian(m, 30, seed=1), output_metric(m, seed=2)
    moment = fitting_moment(h.T @ h / 12, None, 1e-8)
    order, losses = eliminate(weight, moment, f)
    assert bool(losses.isfinite().all()) and losses[18] < 1e-5 * losses[-1]
    for width in (3, 12, 25):
        expected = elimination_loss(weight, moment, f, kept_at(order, width))
        torch.testing.assert_close(losses[30 - width], expected, rtol=1e-5, atol=1e-8 * losses[-1].item())
    assert bool(refitted(weight, moment, kept_at(order, 15)).isfinite().all())


def test_nothing_measured_is_no_failure():
    """An MLP that never gets a token, or a loss without gradient: all orders are alike, and nothing divides by zero."""
    weight, moment, f = problem(6, 4, seed=0)
    silent = fitting_moment(torch.zeros(6, 6), None, 1e-4)
    flat = second_moment(torch.zeros(4, 4), 1e-2)
    for c, outputs in ((silent, f), (moment, flat), (silent, flat)):
        order, losses = eliminate(weight, c, outputs)
        assert sorted(order.tolist()) == list(range(6)) and bool(losses.isfinite().all())
        assert bool(refitted(weight, c, kept_at(order, 3)).isfinite().all())


def test_float32_weights_and_moments():
    weight, moment, f = problem(50, 12, seed=4)
    single = eliminate(weight.float(), moment, f)
    double = eliminate(weight.float().double(), moment, f)
    assert torch.equal(single.order, double.order) and torch.equal(single.losses, double.losses)
    fitting = fitting_moment(moment.float(), None, 1e-4)
    assert fitting.dtype == refitted(weight.float(), moment, torch.arange(7)).dtype == torch.float64


def test_the_arguments_are_left_as_they_are_and_results_repeat():
    weight, moment, f = problem(40, 12, seed=7)
    mean = gaussian(40, seed=1)
    before = weight.clone(), moment.clone(), mean.clone()
    first, second = eliminate(weight, moment, f), eliminate(weight, moment, f)
    refitted(weight, moment, kept_at(first.order, 20))
    elimination_loss(weight, moment, f, kept_at(first.order, 20))
    fitting_moment(moment, mean, 1e-2)
    assert torch.equal(first.order, second.order) and torch.equal(first.losses, second.losses)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, moment, mean), strict=True))


def test_damping_is_a_part_of_the_mean_square_with_and_without_a_bias():
    h = activations(5, seed=1)
    moment = h.T @ h / TOKENS
    shift = 0.01 * moment.diagonal().mean() * torch.eye(5)
    torch.testing.assert_close(fitting_moment(moment, None, 0.01), moment + shift)
    centred = moment - torch.outer(h.mean(0), h.mean(0))
    torch.testing.assert_close(fitting_moment(moment, h.mean(0), 0.01), centred + shift)


def test_rows_of_a_fused_linear():
    assert stacked(torch.tensor([0, 2]), 3, fused=1).tolist() == [0, 2]
    assert stacked(torch.tensor([0, 2]), 3, fused=2).tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 160, 1536])
def test_spectra_are_kept_at_ascending_widths_below_the_full_one(n):
    widths = spectrum_widths(n)
    assert widths == sorted(set(widths)) and all(1 <= width < n for width in widths) and len(widths) <= 8
    assert n < 16 or (len(widths) == 8 and widths[0] == round(n / 16))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("n", [1, 7, 40])
def test_losses_of_a_given_order_are_those_of_its_refits(n, biased):
    h = activations(n, seed=n) + 2
    fitting = fitting_moment(h.T @ h / TOKENS, h.mean(0) if biased else None)
    weight, f = gaussian(5, n, seed=3), output_metric(5, n)
    own = eliminate(weight, fitting, f)
    torch.testing.assert_close(
        removal_losses(refits(weight, fitting, own.order.flip(0)), f), own.losses, rtol=1e-6, atol=1e-10
    )
    order = torch.randperm(n)
    found = removal_losses(refits(weight, fitting, order.flip(0)), f)
    for removed, loss in enumerate(found):
        left = order[removed:].sort().values
        narrow = torch.zeros_like(weight).double()
        if len(left):
            narrow[:, left] = refitted(weight, fitting, left)
        error = whitened(weight.double() - narrow, cholesky_root(fitting, 0.0), f)
        torch.testing.assert_close(loss, error.square().sum() / 2, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 3), (7, 5), (40, 12)])
def test_spectra_of_the_output_linear_are_those_of_its_refits(n, m, biased):
    h = activations(n, seed=n) + 2
    moment, mean = h.T @ h / TOKENS, h.mean(0) if biased else None
    weight, f, kept = gaussian(m, n, seed=3), output_metric(m, n), torch.randperm(n)
    fitting = fitting_moment(moment, mean)
    found = narrow_output_spectra(refits(weight, fitting, kept), mean, f, kept)
    assert found.shape == (len(spectrum_widths(n)), m)
    inputs = fitting if mean is None else fitting + torch.outer(mean, mean)
    for values, width in zip(found, spectrum_widths(n), strict=True):
        s = kept[:width]
        narrow = whitened(refitted(weight, fitting, s), cholesky_root(inputs[s][:, s], 0.0), f)
        expected = torch.nn.functional.pad(torch.linalg.svdvals(narrow), (0, m - min(m, width)))
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6 * values[0].item())


@pytest.mark.parametrize(("n", "inputs", "fused"), [(1, 3, 1), (7, 5, 2), (40, 12, 1), (24, 30, 2)])
def test_spectra_of_an_input_linear_are_those_of_its_rows(n, inputs, fused):
    weight, kept = gaussian(fused * n, inputs, seed=3), torch.randperm(n)
    root, f = output_metric(inputs, 1).root, output_metric(fused * n, 2)
    found = narrow_input_spectra(weight, root, f.root @ f.root.T, kept, fused)
    assert found.shape == (len(spectrum_widths(n)), inputs)
    for values, width in zip(found, spectrum_widths(n), strict=True):
        rows = stacked(kept[:width], n, fused)
        expected = torch.linalg.svdvals(whitened(weight[rows], root, part(f, rows)))
        expected = torch.nn.functional.pad(expected, (0, inputs - len(expected)))
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6 * values[0].item())


def test_one_order_whether_gate_and_up_are_fused():
    """neuron_statistics of Phi-3's MLP: the spectrum of gate over up is that of the rows that stay of both."""
    from hisvd.component.adapter import Mlp
    from hisvd.shape_utils import Sublayer

    torch.manual_seed(0)
    n, hidden = 20, 8
    layer = torch.nn.ModuleDict({"up": torch.nn.Linear(hidden, 2 * n), "down": torch.nn.Linear(n, hidden, bias=False)})

    def moment(name, size):
        x = torch.randn(200, size)
        return {name: packed(x.T @ x / 200)}

    statistics = moment("mlp_in.H", hidden) | moment("mlp_mid.H", n) | moment("up.F", 2 * n) | moment("down.F", hidden)
    sublayers = {
        "up": Sublayer("up", 0, "up", "mlp_in", 2 * n, hidden),
        "down": Sublayer("down", 0, "down", "mlp_mid", hidden, n),
    }
    found = neuron_statistics(layer, Mlp(("up",), "down", fused=2), sublayers, statistics)
    assert found["up.narrow_singular_values"].shape == (8, hidden)
    assert found["down.narrow_singular_values"].shape == (8, hidden)
    energy = found["up.narrow_singular_values"].square().sum(1)
    assert bool((energy.diff() > 0).all())  # more neurons, more rows
    assert found["down.removal_order"].dtype == torch.int32 and found["down.removal_losses"].shape == (2, n + 1)
    measured, guarded = found["down.removal_losses"]
    assert bool((guarded >= measured).all()) and guarded[-1] > 1.01 * measured[-1]


def test_factors_do_not_depend_on_the_order_or_the_root_of_the_metric():
    weight, _, f = problem(9, 12, seed=5)
    rows, order = torch.tensor([0, 3, 4, 7, 8, 11]), torch.tensor([3, 0, 5, 1, 2, 4])
    in_another_order = SecondMoment(part(f, rows[order]).root, order)
    values, vectors = torch.linalg.eigh((f.root @ f.root.T)[rows][:, rows])
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    u = torch.linalg.svd(root @ weight[rows]).U[:, :3]
    for metric in (part(f, rows), in_another_order):
        left, right, _ = optimal_factors(weight[rows], None, metric, 3)
        torch.testing.assert_close(left @ right, inverse @ u @ u.T @ root @ weight[rows])

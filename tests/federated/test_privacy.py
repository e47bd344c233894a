import sys

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from test_federated import largest_difference, small_net

from ipmn_core import params
from ipmn_core.federated import Strategy, privacy

Z, ROUNDS = 20.0, 50


@pytest.fixture
def w_global():
    return small_net(seed=0).state_dict()


@pytest.fixture
def state():
    return small_net(seed=1).state_dict()


def drift_of(state, w_global):
    """The update as one vector, buffers included, in float64."""
    keys = [key for key, value in w_global.items() if value.is_floating_point()]
    return torch.cat([(state[key].double() - w_global[key].double()).flatten() for key in keys])


def test_without_a_bound_the_update_is_the_very_same_object(state, w_global):
    assert privacy.protected(state, w_global, Strategy(mu=0.1), [0]) is state


@pytest.mark.parametrize("clip_norm", [1e-3, 0.5])
def test_a_long_update_is_shortened_to_the_bound_and_keeps_its_direction(state, w_global, clip_norm):
    before = drift_of(state, w_global)
    assert before.norm() > clip_norm
    after = drift_of(privacy.protected(state, w_global, Strategy(clip_norm=clip_norm), [0]), w_global)
    assert after.norm().item() == pytest.approx(clip_norm, rel=1e-3)  # float32 weights of about 0.1 to 1
    assert torch.cosine_similarity(before, after, dim=0).item() == pytest.approx(1, abs=1e-5)


def test_a_short_update_stays_as_it_is(state, w_global):
    after = privacy.protected(state, w_global, Strategy(clip_norm=1e3), [0])
    assert largest_difference(after, state) < 1e-6  # w + (v - w) in float32


def test_batchnorms_buffers_count_and_are_bounded_too(w_global):
    moved = {**w_global, "1.running_mean": w_global["1.running_mean"] + 100}
    after = privacy.protected(moved, w_global, Strategy(clip_norm=1.0), [0])
    assert (after["1.running_mean"] - w_global["1.running_mean"]).norm().item() == pytest.approx(1, rel=1e-4)


def test_noise_is_gaussian_of_the_stated_deviation_in_every_floating_entry():
    w = {"a": torch.zeros(40_000), "1.running_mean": torch.zeros(40_000), "n": torch.tensor(7)}
    noised = privacy.protected(w, w, Strategy(clip_norm=0.5, noise_multiplier=3.0), [1, 2])
    for key in ("a", "1.running_mean"):
        sample = noised[key].double().numpy()
        # the deviation of n normal numbers scatters by 1 / sqrt(2 n) = 0.35 %: five of those
        assert sample.std() == pytest.approx(1.5, rel=0.018)
        assert abs(sample.mean()) < 5 * 1.5 / 200
        assert stats.kstest(sample / 1.5, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(noised["a"], noised["1.running_mean"])[0, 1]) < 0.025  # five deviations
    assert noised["n"] is w["n"]


def test_noise_follows_its_seed(state, w_global):
    strategy = Strategy(clip_norm=1.0, noise_multiplier=1.0)
    one, same, other = (
        privacy.protected(state, w_global, strategy, seed) for seed in ([1, 2], [1, 2], [1, 3])
    )
    assert largest_difference(one, same) == 0 < largest_difference(one, other)


def test_noise_has_more_seeds_than_can_be_tried():
    """Torch's generator takes 32 bits: with 2^32 seeds to try, whoever has the update finds the noise."""
    seeds = [[14375], [53572]]
    low = {np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] & 0xFFFFFFFF for seed in seeds}
    assert len(low) == 1  # alike in their first 32 bits, found by trying
    w, strategy = {"a": torch.zeros(8)}, Strategy(clip_norm=1.0, noise_multiplier=1.0)
    one, other = (privacy.protected(w, w, strategy, seed)["a"] for seed in seeds)
    assert not torch.equal(one, other)


def test_variances_stay_positive_under_any_noise(w_global):
    strategy = Strategy(clip_norm=1.0, noise_multiplier=50.0)
    least = min(
        privacy.protected(w_global, w_global, strategy, [seed])["1.running_var"].min() for seed in range(20)
    )
    assert least > 0


def test_shapes_types_and_keys_stay(state, w_global):
    after = privacy.protected(state, w_global, Strategy(clip_norm=1.0, noise_multiplier=1.0), [0])
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_update_that_is_no_number_stays_one_that_will_be_refused(state, w_global, value):
    state["5.bias"] = torch.tensor([0.0, value])
    after = privacy.protected(state, w_global, Strategy(clip_norm=1.0), [0])
    assert not after["5.bias"].isfinite().all()


def test_noise_without_a_bound_is_refused():
    with pytest.raises(params.ParamsError, match="noise is in units of clip_norm"):
        params.validate({"noise_multiplier": 1.0}, "test")


@pytest.mark.parametrize("z", [None, 0.0])
def test_without_noise_nothing_is_promised(z):
    assert privacy.epsilon(z, 1) == float("inf")


def test_epsilon_falls_with_noise_and_grows_with_rounds():
    by_noise = [privacy.epsilon(z, 10) for z in (2.0, 4.0, 8.0, 16.0)]
    by_rounds = [privacy.epsilon(8.0, rounds) for rounds in (1, 10, 100)]
    assert by_noise == sorted(by_noise, reverse=True) and len(set(by_noise)) == 4
    assert by_rounds == sorted(by_rounds) and len(set(by_rounds)) == 3


def rdp_epsilon(z, rounds, delta):
    """The Gaussian mechanism's Rényi divergence alpha / (2 z^2) a round (Mironov 2017), turned into epsilon
    (Balle et al. 2020, Theorem 21) at the best alpha, any real number.
    """

    def at(alpha):
        divergence = rounds * alpha / (2 * z**2)
        return divergence + np.log1p(-1 / alpha) - np.log(delta * alpha) / (alpha - 1)

    return optimize.minimize_scalar(lambda log: at(1 + np.exp(log)), bounds=(-6, 6), method="bounded").fun


def exact_epsilon(z, rounds, delta):
    """Of the same mechanism in closed form (Balle and Wang 2018, Theorem 8); no accountant goes below it."""
    sigma = z / np.sqrt(rounds)

    def excess(eps):
        a, b = 1 / (2 * sigma), eps * sigma
        return stats.norm.cdf(a - b) - np.exp(eps + stats.norm.logcdf(-a - b)) - delta

    return optimize.brentq(excess, 0, 100)


@pytest.mark.parametrize(("z", "rounds", "delta"), [(4.0, 1, 1e-5), (Z, ROUNDS, 1e-5), (30.0, 100, 1e-6)])
def test_epsilon_is_that_of_the_gaussian_mechanism_at_twice_the_sensitivity(z, rounds, delta):
    ours = privacy.epsilon(z, rounds, delta)
    # Opacus tries a grid of alpha: never below the best, and at most 1 % above it
    assert rdp_epsilon(z / 2, rounds, delta) * (1 - 1e-9) <= ours <= 1.01 * rdp_epsilon(z / 2, rounds, delta)
    assert ours >= exact_epsilon(z / 2, rounds, delta)
    assert exact_epsilon(z, rounds, delta) < 0.6 * ours  # whoever forgets the factor of two promises too much


def test_without_opacus_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(RuntimeError, match=r"pip install 'ipmn\[privacy\]'"):
        privacy.epsilon(1.0, 1)

import numpy as np
import pandas as pd
import pytest
import torch
from drawn import is_clean
from matplotlib.colors import to_hex
from sklearn.linear_model import LogisticRegression

from ipmn_core import federated
from ipmn_core.federated import rounds
from ipmn_core.views import by_hand
from ipmn_core.views.by_hand import SERVER, WEIGHTS

pytestmark = pytest.mark.filterwarnings("error")
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
WHOLE = {"local_steps": 50, "rounds": 8}  # the ends of the live view's sliders


def weights(table, client, round_=None):
    """(n, 2) of the rows of a client, or of one of its rounds."""
    rows = table[table["client"] == client]
    return rows.loc[rows["round"] == round_ if round_ is not None else slice(None), WEIGHTS].to_numpy()


def cases(centers, client):
    """Findings (N_k, 2) and labels (N_k,) of a center, or of both, as float64."""
    everything = torch.cat(list(centers.clients.values()))
    indices = everything if client == "all" else centers.clients[client]
    return by_hand.points(centers.data.x[indices]).double().numpy(), centers.data.y[indices].double().numpy()


def gradient(w, x, y):
    """Of the mean cross-entropy of a logistic regression: its closed form."""
    return x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y)


def fit(monkeypatch, centers, mu, local_steps, n_rounds, optimizer):
    """The rounds of `federated.fit_federated` with these settings, and the server's weights after each."""
    if optimizer == "SGD":
        monkeypatch.setattr(rounds, "Learner", by_hand.PlainLearner)
    model, settings = by_hand.TwoWeights(), by_hand.protocol(optimizer, local_steps, n_rounds, 60)
    test, strategy = {"all": torch.arange(len(centers.data.y))}, federated.Strategy(mu=mu)
    run = federated.fit_federated(model, centers.clients, test, centers.data, settings, strategy)
    return zip(*((epoch, model.w.tolist()) for epoch in run), strict=True)


@OPTIMIZERS
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_the_servers_weights_are_those_of_federated_fit_bit_for_bit(monkeypatch, mu, optimizer):
    centers = by_hand.draw_centers()
    paths = by_hand.paths(centers, mu, local_steps=7, rounds=4, optimizer=optimizer)
    epochs, theirs = fit(monkeypatch, centers, mu, 7, 4, optimizer)
    assert weights(paths, SERVER)[1:].tolist() == list(theirs)
    squared = [np.diag(epoch.inner_products) for epoch in epochs]
    drift = by_hand.drift(paths)["distance"].to_numpy().reshape(4, 2)
    np.testing.assert_allclose(drift, np.sqrt(squared), rtol=2e-3)  # `fit` holds updates in half precision


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_every_local_step_is_one_of_gradient_descent_on_eq_3(mu):
    centers = by_hand.draw_centers(0.6)
    paths = by_hand.paths(centers, mu, local_steps=9, rounds=2)
    for client in centers.clients:
        w = w_t = weights(paths, SERVER, 1)[0]
        for walked in weights(paths, client, 2):
            np.testing.assert_allclose(walked, w, atol=1e-6)  # float32 against float64
            w = w - 0.5 * (gradient(w, *cases(centers, client)) + mu * (w - w_t))


def test_one_local_step_a_round_is_gradient_descent_on_all_cases_together():
    centers = by_hand.draw_centers()
    w = np.zeros(2)
    for server in weights(by_hand.paths(centers, local_steps=1, rounds=30), SERVER):
        np.testing.assert_allclose(server, w, atol=1e-5)
        w = w - 0.5 * gradient(w, *cases(centers, "all"))


@OPTIMIZERS
def test_with_one_local_step_fedprox_is_fedavg_at_any_mu(optimizer):
    centers = by_hand.draw_centers()
    fedavg, fedprox = (
        by_hand.paths(centers, mu, local_steps=1, optimizer=optimizer) for mu in (0.0, 1.0)
    )  # at its first step a client is at w_t, where the proximal gradient is 0
    pd.testing.assert_frame_equal(fedavg.drop(columns="mu"), fedprox.drop(columns="mu"), check_exact=True)


@OPTIMIZERS
def test_mu_zero_is_fedavg(optimizer):
    centers = by_hand.draw_centers()
    fedavg, vanishing = (
        by_hand.paths(centers, mu, optimizer=optimizer).drop(columns="mu") for mu in (0.0, 1e-300)
    )  # the second goes through the proximal code, and is 0 in float32
    pd.testing.assert_frame_equal(fedavg, vanishing, check_exact=True)


@OPTIMIZERS
def test_a_larger_mu_is_a_smaller_drift_of_each_client_in_each_round(optimizer):
    paths = by_hand.compare(by_hand.draw_centers(), (0.0, 0.3, 1.0), optimizer=optimizer)
    drift = by_hand.drift(paths).pivot(index=["round", "client"], columns="mu", values="distance")
    assert drift.shape == (12, 3)
    assert (drift[1.0] < drift[0.3]).all() and (drift[0.3] < drift[0.0]).all()


def test_after_eight_rounds_fedavg_is_past_the_optimum_of_all_cases_and_fedprox_nearer():
    centers = by_hand.draw_centers()
    goal = by_hand.optima(centers).set_index("client").loc["all", WEIGHTS].to_numpy(float)
    ends = [weights(by_hand.paths(centers, mu, rounds=8), SERVER)[-1] for mu in (0.0, 0.3)]
    fedavg, fedprox = (np.linalg.norm(end - goal) for end in ends)
    assert fedavg > 0.3 and fedprox < fedavg / 3


def test_the_way_is_whole_and_each_round_starts_where_the_last_ended():
    centers = by_hand.draw_centers()
    paths = by_hand.paths(centers, 0.1, local_steps=5, rounds=3, optimizer="AdamW")
    assert list(paths.columns) == ["optimizer", "mu", "round", "client", "step", *WEIGHTS]
    assert len(paths) == 1 + 3 * (2 * (5 + 1) + 1) and not paths.duplicated().any()
    assert (weights(paths, SERVER, 0) == 0).all()
    for round_ in (1, 2, 3):
        ends = {client: weights(paths, client, round_) for client in "AB"}
        assert all((steps[0] == weights(paths, SERVER, round_ - 1)[0]).all() for steps in ends.values())
        mean = (60 * ends["A"][-1] + 20 * ends["B"][-1]) / 80  # Eq. (2)
        assert (weights(paths, SERVER, round_)[0] == mean.astype(np.float32)).all()


def test_alike_centers_have_nearly_one_optimum_and_the_scale_moves_it():
    alike = by_hand.optima(by_hand.draw_centers(0)).set_index("client")[WEIGHTS]
    apart = by_hand.optima(by_hand.draw_centers(1)).set_index("client")[WEIGHTS]
    gap = [np.linalg.norm(optima.loc["A"] - optima.loc["B"]) for optima in (alike, apart)]
    assert gap[0] < 0.1 and gap[1] > 2
    for client in "AB":
        expected = alike.loc[client] / by_hand.scale(client, 1)  # w x is what it was
        np.testing.assert_allclose(apart.loc[client], expected, rtol=1e-5)  # the cases are float32


@pytest.mark.parametrize("heterogeneity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", [by_hand.SEED, 0])
def test_optima_agree_with_an_unpenalized_logistic_regression(heterogeneity, seed):
    centers = by_hand.draw_centers(heterogeneity, n_k=(60, 40), seed=seed)
    for client, *w, loss in by_hand.optima(centers).itertuples(index=False):
        x, y = cases(centers, client)
        theirs = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x, y)
        np.testing.assert_allclose(w, theirs.coef_[0], rtol=1e-4)
        np.testing.assert_allclose(gradient(np.array(w), x, y), 0, atol=1e-7)
        assert loss == pytest.approx(np.mean(np.logaddexp(0, x @ w) - y * (x @ w)))


def test_a_surface_is_eq_1_and_all_cases_are_its_mean_weighted_by_n_k():
    centers = by_hand.draw_centers()
    w_0, w_1 = np.linspace(-1, 2, 4), np.linspace(0, 3, 3)
    surfaces = {client: by_hand.surface(centers, client, w_0, w_1) for client in "AB"}
    for client, heights in surfaces.items():
        x, y = cases(centers, client)
        z = x @ np.stack(np.meshgrid(w_0, w_1), -1)[..., None]  # (3, 4, N_k, 1)
        expected = (np.logaddexp(0, z) - y[:, None] * z).mean(axis=(2, 3))
        np.testing.assert_allclose(heights, expected, rtol=1e-5)
    optimum = by_hand.optima(centers).set_index("client").loc["all"]
    a, b = (by_hand.surface(centers, c, *optimum[WEIGHTS].to_numpy()[:, None]).item() for c in "AB")
    assert (60 * a + 20 * b) / 80 == pytest.approx(optimum["loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": -0.1}, "mu: -0.1 is negative; 0 is FedAvg"),
        ({"local_steps": 0}, "local_steps: 0, rounds: 6; both must be at least 1"),
        ({"rounds": 0}, "rounds: 0"),
        ({"optimizer": "Adam"}, "optimizer: Adam is unknown; known are SGD, AdamW"),
        ({"heterogeneity": 2}, "heterogeneity: 2 is not between 0"),
    ],
)
def test_values_that_cannot_train_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        by_hand.paths(by_hand.draw_centers(settings.pop("heterogeneity", 1)), **settings)


@pytest.fixture(scope="module")
def shown():
    """Centers and the paths of three mu."""
    centers = by_hand.draw_centers()
    return centers, by_hand.compare(centers)


def lines(ax, color):
    return [line for line in ax.lines if to_hex(line.get_color()) == to_hex(color)]


@pytest.mark.usefixtures("house_style")
def test_the_plane_shows_every_step_every_round_and_the_optima(shown):
    centers, paths = shown
    paths = paths[paths["mu"] == 0.3]
    ax = by_hand.view(centers, paths).axes[0]
    for client in "AB":
        *steps, star = lines(ax, by_hand.COLORS[client])
        drawn = np.concatenate([step.get_xydata() for step in steps])
        assert len(steps) == 6 and (drawn == weights(paths, client)).all()
        assert star.get_label() == f"optimum of {client}"
    server, best = lines(ax, by_hand.COLORS[SERVER])
    assert (server.get_xydata() == weights(paths, SERVER)).all()
    optima = by_hand.optima(centers)[WEIGHTS].to_numpy()
    stars = [line.get_xydata()[0] for line in ax.lines if line.get_marker() == "*"]
    assert (stars == optima).all() and (best.get_xydata()[0] == optima[2]).all()
    assert ax.get_title() == "FedProx, $\\mu$ = 0.3\n20 local steps of SGD per round"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("weight $w_0$ (finding 0)", "weight $w_1$ (finding 1)")
    for contour, client, optimum in zip(ax.collections, "AB", optima[:2], strict=True):
        assert to_hex(contour.get_edgecolor()[0]) == to_hex(by_hand.COLORS[client])
        assert contour.get_paths()[1].contains_point(optimum)  # 0.03 above the least value


@pytest.mark.usefixtures("house_style")
def test_rounds_have_their_numbers_the_last_in_any_case(shown):
    centers, paths = shown
    for mu, rows in paths.groupby("mu"):
        numbers = [text.get_text() for text in by_hand.view(centers, rows).axes[0].texts]
        assert numbers[0] == "6" and numbers[-1] == "0" and len(numbers) < 8, mu


@pytest.mark.usefixtures("house_style")
def test_drift_is_drawn_round_by_round(shown):
    paths = shown[1][shown[1]["mu"] == 1]
    ax = by_hand.view(shown[0], paths).axes[1]
    drift = by_hand.drift(paths)
    for client in "AB":
        (line,) = lines(ax, by_hand.COLORS[client])
        rows = drift.loc[drift["client"] == client, ["round", "distance"]]
        assert (line.get_xydata() == rows.to_numpy()).all()
    assert ax.get_ylim() == (0, pytest.approx(1.05 * by_hand.LEAST_TOP))


@pytest.mark.usefixtures("house_style")
def test_panels_beside_each_other_share_their_axes_and_show_what_is_largest(shown):
    centers, paths = shown
    back = paths.iloc[::-1].sort_values("mu", ascending=False, kind="stable")[::-1]  # largest drift first
    for order in (paths, pd.concat([rows for _, rows in reversed(list(back.groupby("mu")))])):
        figure = by_hand.beside(centers, order)
        planes, drifts = figure.axes[:3], figure.axes[3:]
        top = by_hand.drift(paths)["distance"].max()
        assert len({ax.get_xlim() + ax.get_ylim() for ax in planes}) == 1
        assert len({ax.get_ylim() for ax in drifts}) == 1 and drifts[0].get_ylim()[1] > top
        assert [ax.get_ylabel() != "" for ax in figure.axes] == [True, False, False] * 2
        titles = [ax.get_title().splitlines()[0] for ax in planes]
        assert sorted(titles) == ["FedAvg, $\\mu$ = 0", "FedProx, $\\mu$ = 0.3", "FedProx, $\\mu$ = 1"]


@pytest.mark.usefixtures("house_style")
@pytest.mark.parametrize("draw", ["beside", "view"])
def test_texts_do_not_overlap_and_the_legend_lies_off_the_axes(shown, draw):
    centers, paths = shown
    figure = getattr(by_hand, draw)(centers, paths if draw == "beside" else paths[paths["mu"] == 0])
    assert is_clean(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "local steps of A, 60 cases",
        "optimum of A",
        "local steps of B, 20 cases",
        "optimum of B",
        "server, by round $t$",
        "optimum of all cases",
    ]
    assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)


@OPTIMIZERS
@pytest.mark.parametrize("heterogeneity", [0.0, 1.0])
def test_the_axes_hold_whatever_the_sliders_ask_for(heterogeneity, optimizer):
    centers = by_hand.draw_centers(heterogeneity)
    paths = by_hand.paths(centers, 0.0, optimizer=optimizer, **WHOLE)
    low, high = by_hand.LIMITS
    points = np.concatenate([paths[WEIGHTS], by_hand.optima(centers)[WEIGHTS]])
    assert low < points.min() and points.max() < high


@pytest.mark.usefixtures("house_style")
@pytest.mark.parametrize(
    ("steps", "title"), [(1, "1 local step of SGD per round"), (2, "2 local steps of SGD")]
)
def test_one_round_of_few_steps_has_whole_numbers_on_its_axis(steps, title):
    centers = by_hand.draw_centers(0.5)
    figure = by_hand.view(centers, by_hand.paths(centers, local_steps=steps, rounds=1))
    figure.canvas.draw()
    assert title in figure.axes[0].get_title()
    assert [tick for tick in figure.axes[1].get_xticks() if tick == int(tick)] == [1]

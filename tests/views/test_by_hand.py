import numpy as np
import pytest
import torch
from drawn import is_clean
from matplotlib.colors import to_hex

from ipmn_core import federated
from ipmn_core.federated import rounds
from ipmn_core.views import by_hand
from ipmn_core.views.by_hand import SERVER, WEIGHTS

pytestmark = pytest.mark.filterwarnings("error")


def weights(table, client, round_=None):
    """(n, 2) of the rows of a client, or of one of its rounds."""
    rows = table[table["client"] == client]
    return rows.loc[rows["round"] == round_ if round_ is not None else slice(None), WEIGHTS].to_numpy()


def cases(centers, client):
    """Findings (N_k, 2) and labels (N_k,) of a center, or of both, as float64."""
    everything = torch.cat(list(centers.clients.values()))
    indices = everything if client == "all" else centers.clients[client]
    return centers.data.x[indices, 0, 0, 0].double().numpy(), centers.data.y[indices].double().numpy()


def gradient(w, x, y):
    """Of the mean cross-entropy of a logistic regression: its closed form."""
    return x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y)


def fit(monkeypatch, centers, mu, local_steps, n_rounds, optimizer):
    """The rounds of `federated.fit_federated` with these settings, and the server's weights after each."""
    if optimizer == "SGD":
        monkeypatch.setattr(rounds, "Learner", by_hand.PlainLearner)
    model, settings = by_hand.TwoWeights(), by_hand.protocol(optimizer, local_steps, n_rounds)
    test, strategy = {"all": torch.arange(len(centers.data.y))}, federated.Strategy(mu=mu)
    run = federated.fit_federated(model, centers.clients, test, centers.data, settings, strategy)
    return zip(*((epoch, model.w.tolist()) for epoch in run), strict=True)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
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


def test_after_eight_rounds_fedavg_is_past_the_optimum_of_all_cases_and_fedprox_nearer():
    centers = by_hand.draw_centers()
    goal = by_hand.optima(centers).set_index("client").loc["all", WEIGHTS].to_numpy(float)
    ends = [weights(by_hand.paths(centers, mu, rounds=8), SERVER)[-1] for mu in (0.0, 0.3)]
    fedavg, fedprox = (np.linalg.norm(end - goal) for end in ends)
    assert fedavg > 0.3 and fedprox < fedavg / 3


def test_alike_centers_have_nearly_one_optimum_and_the_scale_moves_it():
    alike = by_hand.optima(by_hand.draw_centers(0)).set_index("client")[WEIGHTS]
    apart = by_hand.optima(by_hand.draw_centers(1)).set_index("client")[WEIGHTS]
    gap = [np.linalg.norm(optima.loc["A"] - optima.loc["B"]) for optima in (alike, apart)]
    assert gap[0] < 0.1 and gap[1] > 2
    for client, scale in (("A", [2, 0.5]), ("B", [0.5, 2])):  # w x is what it was, in float32
        np.testing.assert_allclose(apart.loc[client], alike.loc[client] / scale, rtol=1e-5)


@pytest.mark.parametrize("heterogeneity", [0.0, 0.5, 1.0])
def test_at_an_optimum_the_gradient_is_zero(heterogeneity):
    centers = by_hand.draw_centers(heterogeneity)
    for client, *w, loss in by_hand.optima(centers).itertuples(index=False):
        x, y = cases(centers, client)
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


def lines(ax, color):
    return [line for line in ax.lines if to_hex(line.get_color()) == to_hex(color)]


@pytest.mark.usefixtures("house_style")
def test_the_panels_show_every_step_every_round_the_optima_and_the_drift():
    centers = by_hand.draw_centers()
    paths = by_hand.compare(centers)
    figure, optima = by_hand.beside(centers, paths), by_hand.optima(centers)[WEIGHTS].to_numpy()
    for ax, below, (mu, rows) in zip(figure.axes[:3], figure.axes[3:], paths.groupby("mu"), strict=True):
        assert ax.get_title().startswith(f"{'FedProx' if mu else 'FedAvg'}, $\\mu$ = {mu:g}\n")
        for client in "AB":
            *steps, star = lines(ax, by_hand.COLORS[client])
            drawn = np.concatenate([step.get_xydata() for step in steps])
            assert len(steps) == 6 and (drawn == weights(rows, client)).all()
            assert star.get_label() == f"optimum of {client}"
            drift = by_hand.drift(rows).query("client == @client")[["round", "distance"]]
            assert (lines(below, by_hand.COLORS[client])[0].get_xydata() == drift.to_numpy()).all()
        server, _ = lines(ax, "black")
        assert (server.get_xydata() == weights(rows, SERVER)).all()
        stars = [line.get_xydata()[0] for line in ax.lines if line.get_marker() == "*"]
        assert (stars == optima).all() and [text.get_text() for text in ax.texts] == ["0", "6"]
        for contour, client, optimum in zip(ax.collections, "AB", optima[:2], strict=True):
            assert to_hex(contour.get_edgecolor()[0]) == to_hex(by_hand.COLORS[client])
            assert contour.get_paths()[1].contains_point(optimum)  # 0.03 above the least value
    assert is_clean(figure) and len(figure.legends[0].get_texts()) == 6
    assert len({ax.get_xlim() + ax.get_ylim() for ax in figure.axes[:3]}) == 1
    assert [ax.get_ylabel() != "" for ax in figure.axes] == [True, False, False] * 2

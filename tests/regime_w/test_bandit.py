import numpy as np
import pytest

from regime_w.bandit import Posterior, allocate, choose, posteriors_of, propensities, replay, update


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_uniform_is_even_and_floors_hold() -> None:
    posteriors = [Posterior(90, 10), Posterior(10, 90), Posterior()]
    assert propensities(posteriors, "uniform", rng()).tolist() == pytest.approx([1 / 3] * 3)
    for allocation in ("thompson", "ucb1"):
        shares = propensities(posteriors, allocation, rng(), floor=0.3)
        assert shares.sum() == pytest.approx(1, abs=1e-12)
        assert shares.min() >= 0.1 - 1e-12


def test_thompson_gives_the_probability_of_being_best() -> None:
    equal = propensities([Posterior(5, 5)] * 2, "thompson", rng(), floor=0)
    assert equal == pytest.approx([0.5, 0.5], abs=0.1)
    # P(Beta(2,1) > Beta(1,1)) = E[x] under Beta(2,1) = 2/3
    assert propensities([Posterior(1, 0), Posterior()], "thompson", rng(), floor=0)[0] == pytest.approx(2 / 3, abs=0.1)
    assert propensities([Posterior(100, 0), Posterior(0, 100)], "thompson", rng(), floor=0).tolist() == [1.0, 0.0]


def test_ucb1_by_hand() -> None:
    # bounds: 0.6 + sqrt(2 ln 15 / 10) = 1.336, 0.4 + sqrt(2 ln 15 / 5) = 1.441
    assert propensities([Posterior(6, 4), Posterior(2, 3)], "ucb1", rng(), floor=0).tolist() == [0.0, 1.0]
    # 0.6 + sqrt(2 ln 20 / 10) = 1.374, 0.4 + sqrt(2 ln 20 / 10) = 1.174
    assert propensities([Posterior(6, 4), Posterior(4, 6)], "ucb1", rng(), floor=0).tolist() == [1.0, 0.0]
    assert propensities([Posterior(9, 0), Posterior(), Posterior()], "ucb1", rng(), floor=0).tolist() == [0.0, 0.5, 0.5]
    assert propensities([Posterior(6, 4), Posterior(4, 6)], "ucb1", rng(), floor=0.5).tolist() == [0.75, 0.25]


@pytest.mark.parametrize("floor", [-0.1, 1.1])
def test_an_impossible_floor_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match="floor must lie in"):
        propensities([Posterior()], "uniform", rng(), floor)


def test_an_unknown_allocation_is_refused() -> None:
    with pytest.raises(ValueError, match="uniform, thompson or ucb1, found 'greedy'"):
        propensities([Posterior()], "greedy", rng())


def test_choices_follow_the_stored_propensities() -> None:
    posteriors, generator = [Posterior(9, 1), Posterior(1, 9)], rng()
    choices = [choose(posteriors, "ucb1", generator, floor=0.4) for _ in range(2000)]
    assert {each.propensities for each in choices} == {(0.8, 0.2)}
    assert sum(each.arm for each in choices) / 2000 == pytest.approx(0.2, abs=0.03)


def test_update() -> None:
    assert update([Posterior(1, 2), Posterior(3, 4)], 1, True) == [Posterior(1, 2), Posterior(4, 4)]
    assert update([Posterior(1, 2), Posterior(3, 4)], 0, False) == [Posterior(1, 3), Posterior(3, 4)]


def test_allocate_keeps_the_original_design_under_uniform() -> None:
    assert allocate([Posterior()] * 4, 8, "uniform", 0) == ([2] * 4, pytest.approx([0.25] * 4))
    counts, _ = allocate([Posterior()] * 4, 6, "uniform", 0)
    assert sum(counts) == 6 and counts != [2] * 4
    counts, shares = allocate([Posterior(50, 0), Posterior(0, 50)], 100, "thompson", 0, floor=0.2)
    assert shares == pytest.approx([0.9, 0.1]) and sum(counts) == 100 and counts[0] == pytest.approx(90, abs=12)
    assert (counts, shares) == allocate([Posterior(50, 0), Posterior(0, 50)], 100, "thompson", 0, floor=0.2)


def scored(table: np.ndarray) -> list[dict]:
    return [{"arm_outputs": [{"name": f"arm-{i}", "correct": bool(right)} for i, right in enumerate(row)]}
            for row in table]


def test_replay_finds_the_better_arm_and_counts_regret() -> None:
    table = np.random.default_rng(5).random((240, 4)) < np.array([0.2, 0.25, 0.8, 0.3])
    report = replay(scored(table), repeats=2)
    totals = table.sum(axis=0)
    assert report["questions"] == 240
    assert report["best_arm"] == {"name": "arm-2", "accuracy": pytest.approx(totals[2] / 240)}
    assert report["uniform_expected"] == {"accuracy": pytest.approx(table.mean(), abs=1e-6),
        "regret": totals[2] - totals.mean()}
    for allocation in ("uniform", "thompson", "ucb1"):
        found = report[allocation]
        assert found["regret"] == pytest.approx(totals[2] - 240 * found["accuracy"], abs=1e-3)
        assert found["gain_over_uniform"] == pytest.approx(240 * found["accuracy"] - totals.mean(), abs=1e-3)
        assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-5)
        assert found["ips"] == pytest.approx(table.mean(), abs=0.12)
    assert abs(report["uniform"]["gain_over_uniform"]) < 15
    assert report["thompson"]["shares"]["arm-2"] > 0.6
    assert report["thompson"]["regret"] < 0.5 * report["uniform"]["regret"]
    assert report["ucb1"]["shares"]["arm-2"] > 0.4
    assert report == replay(scored(table), repeats=2) != replay(scored(table), repeats=2, seed=1)


def test_replay_without_a_floor_need_not_try_every_arm() -> None:
    report = replay(scored(np.array([[1, 0]] * 60)), floor=0, repeats=2)
    assert report["thompson"]["shares"]["arm-0"] > 0.9
    assert report["floor"] == 0


@pytest.mark.parametrize(("rows", "text"), [
    ([], "needs scored rows, found none"),
    ([{"arm_outputs": [{"name": "a"}]}], "row 1: an arm's output has no field 'correct'; score the file"),
    ([{"arm_outputs": [{"name": "a", "correct": True}]}, {"arm_outputs": [{"name": "b", "correct": True}]}],
     "row 2: a replay needs the arms of row 1 in their order, a, found b; .* uniform"),
])
def test_rows_that_cannot_be_replayed(rows: list, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replay(rows)


def test_posteriors_of_scored_rows() -> None:
    rows = scored(np.array([[1, 0, 1], [1, 0, 0]]))
    assert posteriors_of(rows, ["arm-2", "arm-0", "new"]) == [Posterior(1, 1), Posterior(2, 0), Posterior(0, 0)]

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regime_w.chsh import CONTEXTS, Outcomes, cbd, chsh_summary, correlations, s_cf_chsh, s_value

OUTCOMES = st.integers(0, 6).flatmap(
    lambda n: st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda right: Outcomes(*right, n)))


def test_e_and_s_by_hand() -> None:
    # W: 3 of 4 right on q, 2 of 4 on q'; M: all right on q, 1 of 4 on q'. Means 0.5, 0, 1, -0.5.
    e = correlations(Outcomes(3, 2, 4), Outcomes(4, 1, 4))
    assert e == {(0, 0): 0.5, (0, 1): -0.25, (1, 0): 0.0, (1, 1): 0.0}
    assert s_value(e) == 0.25
    assert s_value({(0, 0): 1, (0, 1): 2, (1, 0): 4, (1, 1): 8}) == -1


@given(OUTCOMES, OUTCOMES)
def test_e_is_the_mean_over_all_pairs_of_arms(a: Outcomes, b: Outcomes) -> None:
    def outcomes(party: Outcomes, version: int) -> list[int]:
        return [1 if i < party[version] else -1 for i in range(party.arms)]

    for x, y in CONTEXTS:
        pairs = [v * w for v, w in product(outcomes(a, x), outcomes(b, y))]
        assert correlations(a, b)[x, y] == pytest.approx(sum(pairs) / len(pairs) if pairs else 0, abs=1e-12)
    assert abs(s_value(correlations(a, b))) <= 2 + 1e-12  # a local model


@pytest.mark.parametrize(("a", "b", "value"), [
    # all wrong: S = 2, and no merit
    (Outcomes(4, 4, 4), Outcomes(4, 4, 4), 1.0), (Outcomes(0, 0, 4), Outcomes(0, 0, 4), 0.0),
    (Outcomes(4, 0, 4), Outcomes(4, 0, 4), 0.0),  # right on q only: 1 - 1 - 1 - 1 = -2
    (Outcomes(3, 2, 4), Outcomes(4, 1, 4), 0.125), (Outcomes(0, 0, 0), Outcomes(4, 4, 4), 0.0),
    (Outcomes(0, 1, 1), Outcomes(0, 0, 1), 1.0), (Outcomes(0, 0, 1), Outcomes(0, 1, 1), 1.0),
    (Outcomes(1, 0, 1), Outcomes(0, 0, 1), 0.0), (Outcomes(0, 0, 1), Outcomes(1, 0, 1), 0.0),
    (Outcomes(0, 1, 1), Outcomes(1, 0, 1), 1.0), (Outcomes(0, 1, 2), Outcomes(0, 0, 2), 1.0),
    (Outcomes(0, 0, 2), Outcomes(0, 1, 2), 1.0),
])
def test_s_cf_chsh(a: Outcomes, b: Outcomes, value: float) -> None:
    assert s_cf_chsh(a, b) == value


def test_the_summary_of_one_kind_of_question() -> None:
    found = chsh_summary({(Outcomes(4, 4, 4), Outcomes(4, 4, 4)): 10}, 200, 0)
    assert found == {"questions": 10, "s": 2.0, "s_low": 2.0, "s_high": 2.0, "null_mean": 2.0, "null_low": 2.0,
        "null_high": 2.0, "p_value": 1.0}
    assert chsh_summary({}, 200, 0) == {"questions": 0, **dict.fromkeys(list(found)[1:])}


EASY, HARD = Outcomes(4, 4, 4), Outcomes(0, 0, 4)


def test_shared_difficulty_stands_out_against_the_null() -> None:
    cells = {(EASY, EASY): 50, (HARD, HARD): 50}
    found = chsh_summary(cells, 400, 3)
    assert found == chsh_summary(dict(reversed(cells.items())), 400, 3)  # whatever the order, by the seed alone
    assert found["s"] == 2.0
    assert found["null_mean"] == pytest.approx(0, abs=0.05)  # ±2, as often one as the other
    assert found["null_high"] < 1 and found["p_value"] == pytest.approx(1 / 401)
    # exact sd of mean S under random pairing of 50 + 50 with 50 + 50: 2 / sqrt(99)
    assert found["null_high"] - found["null_low"] == pytest.approx(2 * 1.96 * 2 / math.sqrt(99), rel=0.2)


def test_independent_parties_do_not() -> None:
    cells = {(a, b): 25 for a in (EASY, HARD) for b in (EASY, HARD)}
    found = chsh_summary(cells, 400, 0)
    assert found["s"] == 0.0 and 0.3 < found["p_value"] <= 0.8
    # bootstrap: S = ±2 a question, so its standard error is 2 / sqrt(100)
    assert found["s_high"] - found["s_low"] == pytest.approx(2 * 1.96 * 0.2, rel=0.15)
    assert found["s_low"] < 0 < found["s_high"]


def test_the_null_keeps_uneven_margins() -> None:
    a, b = Outcomes(4, 2, 4), Outcomes(1, 3, 4)
    cells = {(EASY, a): 7, (HARD, b): 2, (b, EASY): 4}
    rng = np.random.default_rng(0)
    firsts = [pair[0] for pair, n in cells.items() for _ in range(n)]
    seconds = [pair[1] for pair, n in cells.items() for _ in range(n)]
    values = np.array([[s_value(correlations(x, y)) for y in seconds] for x in firsts])
    deals = [values[np.arange(13), rng.permutation(13)].mean() for _ in range(2000)]
    found = chsh_summary(cells, 1000, 1)
    assert found["null_mean"] == pytest.approx(np.mean(deals), abs=0.03)
    assert found["null_low"] == pytest.approx(np.quantile(deals, 0.025), abs=0.12)
    assert found["s"] == pytest.approx(np.mean([s_value(correlations(x, y)) for x, y in zip(firsts, seconds)]))


def test_contextuality_by_default_of_the_pr_box_and_of_a_local_model() -> None:
    same, opposite = [(1, 1), (-1, -1)], [(1, -1), (-1, 1)]
    box = {(0, 0): same, (0, 1): same, (1, 0): same, (1, 1): opposite}
    assert cbd(box) == {"s_odd": 4.0, "delta": 0.0, "bound": 2.0, "degree": 2.0}
    local = {context: [(1, 1), (1, -1)] for context in CONTEXTS}
    assert cbd(local) == {"s_odd": 0.0, "delta": 0.0, "bound": 2.0, "degree": -2.0}
    moved = {(0, 0): same, (0, 1): opposite, (1, 0): same, (1, 1): same}  # the minus sign may stand anywhere
    assert cbd(moved)["degree"] == 2.0


def test_inconsistent_marginals_raise_the_bound() -> None:
    contexts = {(0, 0): [(1, 1)], (0, 1): [(1, 1)], (1, 0): [(1, 1)], (1, 1): [(1, -1)]}
    # E = 1, 1, 1, -1: s_odd 4; only B on q' differs between its contexts, by 2
    assert cbd(contexts) == {"s_odd": 4.0, "delta": 2.0, "bound": 4.0, "degree": 0.0}
    contexts = {(0, 0): [(1, 1)], (0, 1): [(-1, 1)], (1, 0): [(1, -1)], (1, 1): [(1, 1)]}
    assert cbd(contexts)["delta"] == 2 + 0 + 2 + 0

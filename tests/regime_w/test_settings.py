import pytest

from regime_w.settings import ScoreSettings


def test_defaults_are_the_definition() -> None:
    s = ScoreSettings()
    assert (s.weight_end, s.weight_path, s.weight_cf) == (0.4, 0.3, 0.3)
    assert (s.reward_correct, s.reward_wrong, s.coherence_weight) == (1.0, -0.5, 0.7)
    assert (s.length_penalty, s.free_length) == (0.001, 400)
    assert (s.cf, s.cf_placeholder, s.path_within_style) == ("counterfactual", 0.5, False)


@pytest.mark.parametrize(("wrong", "names"), [
    ({"cf": "bell"}, "counterfactual, placeholder, chsh"),
    ({"cf_placeholder": 1.01}, "cf_placeholder"), ({"cf_placeholder": -0.01}, "cf_placeholder"),
    ({"weight_end": -0.1}, "weight_end"), ({"weight_path": -0.1}, "weight_path"), ({"weight_cf": -0.1}, "weight_cf"),
    ({"weight_end": 0.0, "weight_path": 0.0, "weight_cf": 0.0}, "above 0"),
    ({"reward_correct": -0.5}, "reward_correct"), ({"coherence_weight": -1.0}, "coherence_weight"),
    ({"length_penalty": -1.0}, "length_penalty"), ({"free_length": -1}, "free_length"),
    ({"resamples": 99}, "resamples"), ({"seed": -1}, "seed"),
])
def test_an_impossible_setting_is_named(wrong: dict, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        ScoreSettings(**wrong)


def test_the_limits_themselves_are_possible() -> None:
    ScoreSettings(cf_placeholder=0.0, weight_end=0.0, weight_path=0.0, coherence_weight=0.0, length_penalty=0.0,
                  free_length=0, resamples=100, seed=0)
    ScoreSettings(cf_placeholder=1.0)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        ScoreSettings(cf="bell", weight_cf=-1.0, reward_wrong=2.0, seed=-1)
    assert str(caught.value).splitlines() == [
        "cf must be one of counterfactual, placeholder, chsh, found 'bell'",
        "weight_cf must be 0 or more, found -1.0",
        "reward_correct must be above reward_wrong, found 1.0 and 2.0",
        "seed must be 0 or more, found -1"]

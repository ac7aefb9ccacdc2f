from regime_w.arms import ARMS


def test_two_styles_at_the_four_temperatures_of_the_design() -> None:
    assert [(arm.style, arm.temperature) for arm in ARMS] == [
        (style, temperature) for style in ("wolfram", "maudlin") for temperature in (0.2, 0.3, 0.4, 0.5)]
    assert [arm.name for arm in ARMS] == [f"{arm.style}-{arm.temperature}" for arm in ARMS]


def test_one_instruction_a_style_and_none_asks_for_the_answer_line() -> None:
    assert len({arm.instruction for arm in ARMS}) == 2
    assert len({(arm.style, arm.instruction) for arm in ARMS}) == 2
    assert not any("####" in arm.instruction for arm in ARMS)  # the neutral prompt asks for it

"""The answers to one question, and Regime W's components of them."""

from itertools import compress
from typing import NamedTuple

from regime_w.answers import canonical_answer
from regime_w.chsh import Outcomes, s_cf_chsh
from regime_w.scoring import (s_cf, s_cf_without_each, s_end, s_end_without_each, s_path, s_path_within_style,
                              s_path_without_each, s_wm)
from regime_w.settings import ScoreSettings

PARTIES = ("wolfram", "maudlin")


class AnswerSet(NamedTuple):
    """What scoring needs of a row: one entry an arm. Answers are canonical; `cf_…` is None without a counterfactual."""

    styles: list[str]
    lengths: list[int]
    answers: list[str | None]
    gold: str
    correct: list[bool]
    cf_answers: list[str | None] | None
    cf_gold: str | None

    @classmethod
    def of(cls, row: dict) -> "AnswerSet":
        """Of a checked rollouts row (`rows.check_row`)."""
        outputs, other = row["arm_outputs"], row["counterfactual"]
        gold = canonical_answer(row["gold_answer"])
        answers = [canonical_answer(output["answer"]) for output in outputs]
        return cls(
            styles=[output["style"] for output in outputs],
            lengths=[output["num_tokens"] for output in outputs],
            answers=answers,
            gold=gold,
            correct=[answer == gold for answer in answers],
            cf_answers=other and [canonical_answer(output["counterfactual"]["answer"]) for output in outputs],
            cf_gold=other and canonical_answer(other["gold_answer"]),
        )

    def without(self, i: int) -> "AnswerSet":
        """The same question as answered by the other arms."""
        def rest(values: list) -> list:
            return values[:i] + values[i + 1:]

        return AnswerSet(rest(self.styles), rest(self.lengths), rest(self.answers), self.gold, rest(self.correct),
                         None if self.cf_answers is None else rest(self.cf_answers), self.cf_gold)

    def components(self, settings: ScoreSettings) -> tuple[float, float, float]:
        """(s_end, s_path, s_cf)."""
        return s_end(self.answers), self._s_path(settings), self._s_cf(settings)

    def s_wm_without_each(self, settings: ScoreSettings) -> list[float]:
        """s_wm of the other arms, for each arm."""
        every = range(len(self.answers))
        if settings.path_within_style:
            paths = [self.without(i)._s_path(settings) for i in every]
        else:
            paths = s_path_without_each(self.lengths)
        if settings.cf == "chsh":
            cfs = [self.without(i)._s_cf(settings) for i in every]
        elif self.takes_placeholder(settings):
            cfs = [settings.cf_placeholder for _ in every]
        else:
            cfs = s_cf_without_each(self.cf_answers, self.cf_gold)
        ends = s_end_without_each(self.answers)
        return [s_wm(end, path, cf, settings) for end, path, cf in zip(ends, paths, cfs, strict=True)]

    def _s_path(self, settings: ScoreSettings) -> float:
        return s_path_within_style(self.lengths, self.styles) if settings.path_within_style else s_path(self.lengths)

    def takes_placeholder(self, settings: ScoreSettings) -> bool:
        """Whether s_cf is the constant: by choice, without a counterfactual, or for CHSH without an arm of a style."""
        return (settings.cf == "placeholder" or self.cf_answers is None
                or settings.cf == "chsh" and not set(PARTIES) <= set(self.styles))

    def _s_cf(self, settings: ScoreSettings) -> float:
        if self.takes_placeholder(settings):
            return settings.cf_placeholder
        if settings.cf == "chsh":
            return s_cf_chsh(*self.outcomes())
        return s_cf(self.cf_answers, self.cf_gold)

    def outcomes(self) -> tuple[Outcomes, Outcomes]:
        """Those of the two styles as parties. The question must have a counterfactual."""
        cf_correct = [answer == self.cf_gold for answer in self.cf_answers]
        right, cf_right = list(compress(self.styles, self.correct)), list(compress(self.styles, cf_correct))
        first, second = [Outcomes(right.count(party), cf_right.count(party), self.styles.count(party))
                         for party in PARTIES]
        return first, second

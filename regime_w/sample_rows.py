"""Rollout rows for trying the engine: five worked questions for the demo, any number of random ones."""

import random
from collections.abc import Iterator

from regime_w.arms import ARMS


def worked_rows() -> list[dict]:
    """Five questions whose answers show what each component sees."""
    return [
        _row("all arms agree and are right", "Ann has 3 bags of 6 apples. How many apples has she?", "18",
             ["18"] * 8, [120, 118, 125, 121, 119, 122, 120, 124],
             "Ann has 3 bags of 7 apples. How many apples has she?", "21", ["21"] * 8),
        _row("one arm alone is right", "A train goes 60 miles an hour. How far does it go in 2.5 hours?", "150",
             ["120", "120", "180", "65", "150", "125", None, "120"], [210, 190, 260, 150, 410, 330, 600, 290]),
        _row("right on the question, not on its counterfactual: remembered rather than reasoned",
             "Tom had 24 eggs and used 9. How many are left?", "15", ["15"] * 7 + ["33"],
             [90, 95, 92, 99, 140, 150, 145, 160],
             "Tom had 24 eggs and used 7. How many are left?", "17", ["17", "15", "15", "15", "17", "15", "15", "31"]),
        _row("all arms agree on a wrong answer: coherence alone earns little",
             "A shirt of $40 is sold at 25% off. What does it cost in dollars?", "30", ["10"] * 8, [130] * 8),
        _row("right, but long: each token over the free ones costs", "What is half of 84?", "42",
             ["42", "42", "42", "42", "42", "42", "42", None], [700, 650, 800, 720, 1400, 1250, 1500, 2048]),
    ]


def random_rows(count: int, seed: int = 0) -> Iterator[dict]:
    """`count` rows with random answers, about 60% of them with a counterfactual."""
    random_ = random.Random(seed)
    for i in range(count):
        gold, skill = random_.randint(2, 99), random_.random()
        answers, others = (
            [str(right) if random_.random() < skill else random_.choice([None, str(random_.randint(2, 99))])
             for _ in ARMS]
            for right in (gold, gold + 5))
        lengths = [random_.randint(40, 600) for _ in ARMS]
        changed = random_.random() < 0.6
        yield _row(f"random-{i:06d}", f"question {i}", str(gold), answers, lengths,
                   *((f"question {i}, changed", str(gold + 5), others) if changed else ()))


def _row(name: str, question: str, gold: str, answers: list[str | None], lengths: list[int], changed: str = "",
         changed_gold: str = "", changed_answers: list[str | None] | None = None) -> dict:
    outputs = [  # of the first eight arms, for the worked questions
        {"name": arm.name, "style": arm.style, "temperature": arm.temperature, "answer": answer, "num_tokens": length,
         "counterfactual": changed_answers and {"answer": changed_answers[i]}}
        for i, (arm, answer, length) in enumerate(zip(ARMS, answers, lengths))]
    return {"id": name, "question": question, "gold_answer": gold, "arm_outputs": outputs,
            "counterfactual": {"question": changed, "gold_answer": changed_gold} if changed_answers else None}

"""`python -m regime_w.demo`: five worked questions, scored and explained. `… FILE` does it for a rollouts file."""

import sys
from pathlib import Path

from regime_w.rows import map_rows
from regime_w.sample_rows import worked_rows
from regime_w.score import score_row
from regime_w.settings import ScoreSettings

INTRO = """Regime W scores the answers of several arms (ways to ask: a style at a temperature) to one question, q.
Some questions have a counterfactual, q′: the same question with one number changed, and the answer to that.
  s_end   agreeing pairs of answers / all pairs              {weight_end} of s_wm
  s_path  1 / (1 + CV²) of the answers' lengths in tokens    {weight_path} of s_wm (CV: standard deviation / mean)
  s_cf    share right on q′                                  {weight_cf} of s_wm ({cf_placeholder} where there is none)
  s_wm    their weighted sum: how coherent the answers are, right or wrong
  reward  {reward_correct:+} if any arm is right, else {reward_wrong:+}; + {coherence_weight} s_wm; - {length_penalty} \
a token of mean length over {free_length}
Each arm has a reward of its own: {reward_correct:+} if it is right, else {reward_wrong:+}; if right, \
+ {coherence_weight} of what it adds to s_wm;
- {length_penalty} a token over {free_length}. Its advantage is that reward less the mean of the other arms' rewards.
"""


def main(arguments: list[str]) -> int:
    """Prints the explained scores; 0, or 2 after an error in the file."""
    sys.stdout.reconfigure(errors="replace")  # a terminal need not have every character of a file
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0 if len(arguments) == 1 else 2
    try:
        print(INTRO.format(**vars(ScoreSettings())))
        for text in map_rows(Path(arguments[0]), _explained) if arguments else map(_explained, worked_rows()):
            print(text)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _explained(row: dict) -> str:
    return explain(score_row(row))


def explain(row: dict) -> str:
    """A scored row as a small table and its sums."""
    other = row["counterfactual"]
    lines = [f"── {row['id']}", f"   {row.get('question', '')}  gold: {row['gold_answer']}"]
    if other:
        lines.append(f"   counterfactual: {other.get('question', '')}  gold: {other['gold_answer']}")
    lines.append(f"   {'arm':<14}{'answer':>10}{'right':>7}{'tokens':>8}{'on q′':>10}{'reward':>9}{'advantage':>11}")
    for output in row["arm_outputs"]:
        answered = (output["counterfactual"]["answer"] or "none") if other else "-"
        lines.append(f"   {output['name']:<14}{output['answer'] or 'none':>10}{'yes' if output['correct'] else 'no':>7}"
                     f"{output['num_tokens']:>8}{answered:>10}{output['reward']:>9.3f}{output['advantage']:>z11.3f}")
    parts = row["reward_parts"]
    components = "  ".join(f"{name} {row[name]:.3f}" for name in ("s_end", "s_path", "s_cf"))
    lines.append(f"   {components}  ->  s_wm {row['s_wm']:.3f}")
    lines.append(f"   reward {row['reward']:.3f} = correctness {parts['correctness']:+.3f}, "
                 f"coherence {parts['coherence']:+.3f}, length {parts['length']:+.3f}\n")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

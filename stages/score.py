"""Stage score: Regime W on the stored rollouts, on the CPU and without a model. The argument names the round: 1, 2, …

Reads data/rollouts.jsonl and the sections `score` and `rounds`. Writes data/regime_w_rollouts.jsonl and
metrics/regime_w.json. All three names end in the round's suffix.
"""

from pathlib import Path

from looper.params import load_params, round_of
from looper.stage import run


def main(name: str) -> None:
    params = load_params()
    suffix = round_of(params.rounds, name).suffix
    from looper.files import write_json
    from regime_w.score import score_file

    rollouts, scored = Path(f"data/rollouts{suffix}.jsonl"), Path(f"data/regime_w_rollouts{suffix}.jsonl")
    write_json(Path(f"metrics/regime_w{suffix}.json"), score_file(rollouts, scored, params.score))


if __name__ == "__main__":
    run(main, __doc__, arguments=("ROUND",))

"""Stage score: Regime W on the stored rollouts, on the CPU and without a model.

Reads data/rollouts.jsonl and the section `score`. Writes data/regime_w_rollouts.jsonl and metrics/regime_w.json.
"""

from pathlib import Path

from looper.params import load_params
from looper.stage import run


def main() -> None:
    params = load_params()
    from looper.files import write_json
    from regime_w.score import score_file

    metrics = score_file(Path("data/rollouts.jsonl"), Path("data/regime_w_rollouts.jsonl"), params.score)
    write_json(Path("metrics/regime_w.json"), metrics)


if __name__ == "__main__":
    run(main, __doc__)

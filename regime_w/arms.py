"""The eight arms: two styles of answering, each at four temperatures."""

from dataclasses import dataclass

WOLFRAM = (
    "Derive the result precisely and in a straight line: state each given quantity, then one exact equation per step, "
    "each following from the one before, without digression."
)
MAUDLIN = (
    "First reflect on what the question really asks and which quantities matter. After each step, ask whether it makes "
    "sense and follows from the problem; if it does not, correct it before you go on."
)


@dataclass(frozen=True)
class Arm:
    """One way to answer: `instruction` leads the neutral tutoring prompt, `temperature` is that of sampling.

    The instruction belongs where the model's template wants it (R1 distillations: the user's turn, no system prompt).
    """

    name: str
    style: str
    temperature: float
    instruction: str


ARMS: tuple[Arm, ...] = (
    Arm("wolfram-0.2", "wolfram", 0.2, WOLFRAM),
    Arm("wolfram-0.3", "wolfram", 0.3, WOLFRAM),
    Arm("wolfram-0.4", "wolfram", 0.4, WOLFRAM),
    Arm("wolfram-0.5", "wolfram", 0.5, WOLFRAM),
    Arm("maudlin-0.2", "maudlin", 0.2, MAUDLIN),
    Arm("maudlin-0.3", "maudlin", 0.3, MAUDLIN),
    Arm("maudlin-0.4", "maudlin", 0.4, MAUDLIN),
    Arm("maudlin-0.5", "maudlin", 0.5, MAUDLIN),
)


def arm_of(output: dict) -> str:
    """The name of the arm that gave an output: its `arm` where an arm answers more than once, else its `name`."""
    return output.get("arm", output["name"])

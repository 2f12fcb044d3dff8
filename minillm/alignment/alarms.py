"""What a run that learns by rewards says of itself when it goes astray."""

from minillm.base.errors import UserError
from minillm.training.run import Run


class Alarm:
    """Prints a line when a measure reaches its limit: once, and again when it has become twice as large."""

    def __init__(self, run: Run, limit: float, message: str):
        """message: what to print, with {value} in it."""
        self.run, self.limit, self.message = run, limit, message

    def look_at(self, value: float) -> None:
        if value >= self.limit:
            self.limit = 2 * value
            self.run.print(f"step {self.run.step}: {self.message.format(value=value)}")


def distance_alarm(run: Run, limit: float, remedy: str) -> Alarm:
    """Of the KL from the reference, in nats an answer."""
    return Alarm(run, limit, f"KL {{value:.0f}} nats an answer: the policy has left its reference; {remedy}")


class Idle:
    """Counts the rollouts in a row with nothing to learn, and ends the run after too many. Goes on after a resume."""

    EQUAL = (
        "the answers to each prompt all have the same reward",
        "if it is the best there is, the run is done, so lower --steps; else take prompts that the model answers right "
        "sometimes, a reward with more steps, a higher --temperature or a larger --group_size",
    )
    CUT = (
        "all answers were cut at --max_new_tokens, and --overlong mask leaves those out",
        "raise --max_new_tokens, or choose --overlong keep or penalty",
    )

    def __init__(self, run: Run, most: int):
        self.run, self.most = run, most
        self.in_a_row = run.saved.get("idle", 0)
        self.has_warned = self.in_a_row > 0

    def count(self, n_useful: float, why: tuple[str, str] = EQUAL) -> None:
        """n_useful: groups of a rollout, on all ranks, from which something is learned. why: what is amiss if there are
        none, and the remedy. Raises `UserError` after too many such rollouts.
        """
        self.in_a_row = 0 if n_useful else self.in_a_row + 1
        self.run.facts["idle"] = self.in_a_row
        amiss, remedy = why
        step = self.run.step
        if self.in_a_row and not self.has_warned:
            self.has_warned = True
            self.run.print(f"step {step}: {amiss}: nothing to learn")
        if self.in_a_row >= self.most:
            raise UserError(f"step {step}: {self.in_a_row} rollouts in a row with nothing to learn ({amiss}): {remedy}")

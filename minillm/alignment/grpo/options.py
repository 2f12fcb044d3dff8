"""The options of learning from groups of answers, and what follows from them."""

from dataclasses import dataclass

from minillm.alignment.grpo.advantages import OF_TOKENS, SCALED
from minillm.alignment.options import RewardedConfig
from minillm.alignment.policy_loss import CLIPS, CORRECTIONS, KL_TERMS, PolicyLoss
from minillm.base.options import option
from minillm.checkpoint.train_state import fingerprint


@dataclass(frozen=True)
class GroupConfig(RewardedConfig):
    """What train_grpo.py takes besides data, folder, batch and optimizer."""

    USUAL_REPLAY_WEIGHT = 0.03

    # the reward, and the answers that are judged
    reward: str = option(
        "data/world/reader.py:reward",
        "exact, number, words, check, format:REGEX, length:N, file.py:function, or weighted: 0.7*number,0.3*length:80",
        group="reward",
    )
    group_size: int = option(8, "answers to each prompt", at_least=2, group="rollouts")
    overlong: str = option(
        "keep",
        "answers cut at --max_new_tokens: keep them, mask them out of the loss, or penalty for the last tokens before",
        ("keep", "mask", "penalty"),
        group="rollouts",
    )
    overlong_cushion: int = option(
        32,
        "tokens before --max_new_tokens that cost reward",
        at_least=1,
        only_with=("overlong", ("penalty",)),
        group="rollouts",
    )
    resample: int = option(
        0, "how often prompts without spread are replaced by others in a rollout", at_least=0, group="rollouts"
    )
    no_spread_steps: int = option(
        20, "end the run after so many rollouts in a row in which all groups lack spread", at_least=1, group="rollouts"
    )

    # the loss
    loss: str = option("dr_grpo", "how the policy learns from them", tuple(CLIPS), group="loss")
    beta: float = option(0.02, "price of a nat of distance from the model of --init_from", at_least=0, group="loss")
    kl: str = option(
        "auto",
        "where that price is paid: in the reward, or as a term of the loss; auto: reward unless --loss scales by a std",
        ("auto", "reward", *KL_TERMS),
        group="loss",
    )
    updates: int = option(1, "passes over the answers of a rollout", at_least=1, group="loss")
    clip_low: float | None = option(
        None, "ratio's ε below 1; none: what the loss is known for", at_least=0, below=1, group="loss"
    )
    clip_high: float | None = option(
        None, "ratio's ε above 1; cispo: the cap itself; none: the same", at_least=0, group="loss"
    )
    two_sided: float | None = option(
        None, "most that a ratio counts for a bad answer; none: no limit", above=1, group="loss"
    )
    correction: str = option(
        "none", "of sampler and trainer rounding differently, by their ratio", CORRECTIONS, group="loss"
    )
    correction_cap: float = option(
        3.0, "its largest ratio", above=0, only_with=("correction", CORRECTIONS[1:]), group="loss"
    )

    # what is measured
    optimum_prompts: int = option(
        32, "training prompts on which the best possible objective is estimated; 0: not", at_least=0, group="data"
    )
    optimum_answers: int = option(
        64, "answers of the reference to each of them", at_least=2, only_with=("optimum_prompts", ()), group="data"
    )

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.resample and self.loss in OF_TOKENS:
            problems.append(f"--resample {self.resample}: --loss {self.loss} learns from all answers of a rollout")
        for name in ("clip_low", "two_sided") if self.loss == "cispo" else ():
            if getattr(self, name) is not None:
                problems.append(f"--{name}: --loss cispo has no such bound; its cap is --clip_high")
        loss = self.policy_loss()
        if loss.kind != "cispo" and loss.two_sided is not None and loss.two_sided <= 1 + loss.clip_high:
            problems.append(f"--two_sided {loss.two_sided}: must be above 1 + ε, which is {1 + loss.clip_high:g}")
        return problems

    @property
    def n_models(self) -> tuple[int, int]:
        """The policy, and a reference if there is a price of the distance from it."""
        return 1, int(self.has_own_reference and self.beta > 0)

    @property
    def kl_place(self) -> str:
        """--kl, decided: a std would weigh the price anew in each group."""
        if self.kl != "auto":
            return self.kl
        return "k3" if self.loss in SCALED else "reward"

    @property
    def optimum_of(self) -> str:
        """A fingerprint of what the best objective depends on, as `Run.once` takes it."""
        return fingerprint(self.optimum_prompts, self.optimum_answers, self.beta, self.drawing)

    def policy_loss(self) -> PolicyLoss:
        low, high = CLIPS[self.loss]
        return PolicyLoss(
            self.loss,
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
            self.max_new_tokens,
            two_sided=self.two_sided,
            beta=0.0 if self.kl_place == "reward" else self.beta,
            kl=self.kl_place,
            correction=self.correction,
            correction_cap=self.correction_cap,
        )

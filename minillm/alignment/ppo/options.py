"""The options of proximal policy optimisation, and what follows from them."""

from dataclasses import dataclass

from minillm.alignment.options import RewardedConfig
from minillm.base import bundled_files
from minillm.base.options import option, unused
from minillm.distributed.ranks import world_size

TRUE_REWARD = "data/world/reader.py:reward"  # of the bundled requests


@dataclass(frozen=True)
class PpoConfig(RewardedConfig):
    """What train_ppo.py takes besides data, folder, batch and optimizer."""

    USUAL_REPLAY_WEIGHT = 0.3

    # what an answer is worth
    reward_model: str | None = option(
        "out/reward", "folder of train_reward.py; none: learn from --reward itself", group="reward"
    )
    reward: str | None = option(
        None,
        "the true reward, recorded beside the learned one: a check's name or FILE.py:FUNCTION; none: the world's for "
        "the bundled requests",
        group="reward",
    )
    normalize_reward: bool = option(
        True,
        "learned rewards are scaled to mean 0 and spread 1 on answers of the reference, or to spread 1 alone where "
        "values begin as scores",
        only_with=("reward_model", ()),
        group="reward",
    )
    missing_eos: str = option(
        "subtract",
        "an answer cut at --max_new_tokens: subtract --missing_eos_penalty, or replace its reward by minus that",
        ("subtract", "replace"),
        group="reward",
    )
    missing_eos_penalty: float = option(1.0, "see --missing_eos", at_least=0, group="reward")

    # PPO
    beta: float = option(0.15, "price of a nat of KL from the reference, in units of reward", at_least=0, group="PPO")
    target_kl: float | None = option(
        None,
        "nats an answer that --beta is steered to; none: it stays as it is",
        above=0,
        only_with=("beta", ()),
        group="PPO",
    )
    kl_horizon: int = option(
        10_000,
        "answers in which --beta can change by a fifth",
        at_least=1,
        only_with=("target_kl", ()),
        group="PPO",
    )
    kl_warning: float = option(50.0, "nats an answer from which on a run says that it drifts", above=0, group="PPO")
    gamma: float = option(1.0, "discount of later rewards", at_least=0, at_most=1, group="PPO")
    lam: float = option(0.95, "λ: how far advantages trust rewards over values", at_least=0, at_most=1, group="PPO")
    clip: float = option(0.2, "how far a token's probability may move, as a share", above=0, below=1, group="PPO")
    value_clip: float = option(0.2, "how far a value may move", above=0, group="PPO")
    value_start: str = option(
        "auto",
        "the first values: zero, or the reward model's scores of unfinished answers; auto: these if there are any, and "
        "the value model is a copy of it (--tune full)",
        ("auto", "zero", "reward"),
        group="PPO",
    )
    value_lr: float | None = option(
        None, "peak learning rate of the value model; none: 3 times --lr", at_least=0, group="PPO"
    )
    updates: int = option(1, "passes over a rollout", at_least=1, group="PPO")
    minibatches: int = option(2, "updates of a pass, each on as large a part of it", at_least=1, group="PPO")
    stop_at_kl: float | None = option(
        0.05, "no more passes once ½ mean (log ratio)² exceeds this; none: never", above=0, group="PPO"
    )

    # what is measured
    reference_prompts: int = option(
        32,
        "training prompts whose answers give the reward's scale and the best possible objective",
        at_least=1,
        group="data",
    )
    reference_answers: int = option(32, "answers of the reference to each of them", at_least=2, group="data")

    def problems(self) -> list[str]:
        problems = super().problems()
        n_shares = max(1, world_size() // (self.tensor_parallel * self.context_parallel))  # of the prompts, by ranks
        if self.batch_size % (self.minibatches * n_shares):
            times = f" times {n_shares} ranks" if n_shares > 1 else ""
            problems.append(
                f"--minibatches {self.minibatches}: --batch_size {self.batch_size} is no multiple of it{times}"
            )
        if self.reward_model is None and self.true_reward is None:
            problems.append("--reward_model none: give a --reward to learn from, such as number or FILE.py:FUNCTION")
        if self.value_start == "reward" and not (self.reward_model and self.tune in ("full", "freeze")):
            problems.append(
                "--value_start reward: needs a --reward_model, and --tune full or freeze, where values have a model of "
                "their own"
            )
        if self.true_reward is None:
            problems += unused(self, ("reward_time_s",), "a --reward that is computed")
        if self.updates == 1:
            problems += unused(self, ("stop_at_kl",), "several --updates, which it ends early")
        return problems

    @property
    def n_models(self) -> tuple[int, int]:
        """Policy and value model, unless these are adapters over one base; reference and reward model."""
        has_own = self.has_own_reference
        return 1 + has_own, has_own + (self.reward_model is not None)

    @property
    def values_are_scores(self) -> bool:
        """Whether values begin as the reward model's scores."""
        return self.reward_model is not None and self.has_own_reference and self.value_start != "zero"

    @property
    def true_reward(self) -> str | None:
        is_bundled = bundled_files.is_file(self.data, "requests_train.jsonl")
        return TRUE_REWARD if self.reward is None and is_bundled else self.reward

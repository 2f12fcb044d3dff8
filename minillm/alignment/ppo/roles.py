"""The four models of PPO, in as little memory as they can share."""

import dataclasses
from typing import NamedTuple

import torch

from minillm.alignment import reference
from minillm.alignment.ppo.options import PpoConfig
from minillm.alignment.reference import Reference
from minillm.alignment.reward_model import weights_fingerprint
from minillm.alignment.value import make_value_model, share_equal_weights
from minillm.checkpoint.train_state import fingerprint
from minillm.distributed.ranks import Ranks
from minillm.distributed.shards import is_sharded_model, local
from minillm.model.transformer import Transformer
from minillm.training import sharding, starting_model


class Roles(NamedTuple):
    """The four models of PPO."""

    policy: Transformer  # is trained and kept
    reference: Reference  # the policy as it was, from which it should not stray
    reward: Transformer | None  # judges whole answers, frozen; None: a function does
    value: Transformer  # what an unfinished answer can still expect; of use to training alone

    def describe(self) -> str:
        """Their size in a phrase."""
        models = {"policy": self.policy, "value": self.value, "reward": self.reward, "reference": self.reference.frozen}
        models = {name: model for name, model in models.items() if model is not None}
        held = [local(p) for model in models.values() for p in [*model.parameters(), *model.buffers()]]
        size = sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values()) / 2**20
        trained = starting_model.n_trained(self.policy) + starting_model.n_trained(self.value)
        where = " on each rank" if is_sharded_model(self.policy) else ""
        return f"{', '.join(models)}: {size:.1f} MiB of weights{where}, {trained:,} parameters trained"


def cast_roles(
    training_config: PpoConfig,
    start: starting_model.Start,
    policy: Transformer,
    reward_model: Transformer | None,
    ranks: Ranks,
) -> Roles:
    """The policy and the three models beside it, in as little memory as they can share.

    If the policy is dealt out over the ranks, each of the others is too, by itself: they share no weights then.
    """
    near = reference.make_reference(training_config, start, policy, ranks)
    is_sharded = is_sharded_model(policy)
    beginning = _whole_policy(training_config, start) if is_sharded else policy
    if reward_model is not None and not is_sharded:
        share_equal_weights(reward_model, policy)  # of an adapter over the policy's base the adapter alone remains
    keep_head = training_config.values_are_scores
    value = make_value_model(training_config, beginning, reward_model, training_config.seed, keep_head)
    for model in (reward_model, value):
        if model is not None:
            sharding.shard(training_config, model, ranks)
    return Roles(policy, near, reward_model, value)


def _whole_policy(training_config: PpoConfig, start: starting_model.Start) -> Transformer:
    """The policy as it begins, on the CPU: what a value model is made of where the policy has been dealt out."""
    alone = Ranks(0, 1, torch.device("cpu"))
    undivided = dataclasses.replace(training_config, shard="1", tensor_parallel=1, context_parallel=1)
    return starting_model.make_model(undivided, start.model_config, start.init, None, alone)


def reward_fingerprint(training_config: PpoConfig) -> str:
    """What must not change of the reward while a run goes on."""
    if training_config.reward_model is None:
        return fingerprint(training_config.true_reward)
    return weights_fingerprint(training_config.reward_model)

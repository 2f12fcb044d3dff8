"""Alignment: learning what is wanted from preferences (reward model, DPO) and from rewards (PPO, GRPO)."""

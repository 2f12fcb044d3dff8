"""What comes after instructions: a model that learns what is wanted, from preferences (DPO) or rewards (PPO, GRPO)."""

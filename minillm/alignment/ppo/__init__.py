"""Proximal policy optimisation: its options, its four models and its updates. The loop is in train_ppo.py."""

"""Learning from preferences without rollouts: the losses of DPO and its family, a step, and what is held out."""

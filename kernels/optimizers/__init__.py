"""The steps of the optimizers: AdamW over lists of tensors, and Muon with its Newton-Schulz iteration."""

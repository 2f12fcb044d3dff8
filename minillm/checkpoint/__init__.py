"""Models and training states in folders, whole or absent; other formats."""

from minillm.checkpoint.huggingface import load_model, save_model
from minillm.checkpoint.run_folder import newest_checkpoint

__all__ = ["load_model", "newest_checkpoint", "save_model"]

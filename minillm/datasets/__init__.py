"""From files to batches: token bins, texts, conversations, preferences, and the mask on what is learned."""

from minillm.datasets.batch import Batch
from minillm.datasets.instructions import InstructionRows
from minillm.datasets.preferences import PreferenceRows
from minillm.datasets.prompts import PromptRows
from minillm.datasets.token_bins import TokenBins
from minillm.datasets.windows import TokenWindows

__all__ = ["Batch", "InstructionRows", "PreferenceRows", "PromptRows", "TokenBins", "TokenWindows"]

"""What transformers puts before and after each text, as a folder says it: bos in front, a space in front, or nothing.

With a tokenizer.json its `post_processor` decides, whatever tokenizer_config.json says; without one, `add_bos_token`
does, which counts as false where it is missing (so in transformers 5.24). What stands around a text in any other way is
refused by name, since a text would begin or end otherwise here than there.
"""

from minillm.base.contents import Contents
from minillm.base.errors import UserError
from minillm.tokenizer.folder_files import is_llama_class, read_beside
from minillm.tokenizer.sentencepiece_model import SPACE_MARK, Space
from minillm.tokenizer.tokenizers_model import steps

# Classes of transformers with rules of their own around a text, whatever the files say; all are for models of other
# kinds (encoders, translation, speech).
OTHER_RULES = {
    *("Albert", "Bart", "Barthez", "Bartpho", "Bert", "BigBird", "ByT5", "Camembert", "Canine", "Deberta", "DebertaV2"),
    *("DistilBert", "Electra", "Esm", "Esmc", "Funnel", "Herbert", "Lasr", "LayoutXLM", "LED", "Luke", "M2M100"),
    *("MBart", "MBart50", "MLuke", "MPNet", "MT5", "Marian", "Mvp", "Nllb", "Nougat", "PLBart", "Pegasus", "Perceiver"),
    *("Roberta", "SeamlessM4T", "Siglip", "Speech2Text", "SpeechT5", "T5", "UMT5", "Udop", "Whisper", "XGLM", "XLM"),
    *("XLMRoberta", "XLNet"),
}
WITHOUT_BOS = "GPTNeoXTokenizer"  # this class reads no post_processor
BOS_UNLESS_TOLD = "CodeLlamaTokenizer"  # the only one whose add_bos_token counts as true where it is missing


def first_id(files: dict[str, bytes], config: dict, bos_id: int | None, source: str) -> int | None:
    """The id that transformers puts before each text, None if it puts none there.

    files: the tokenizer's, as `read_companions` gives them; config: its tokenizer_config.json. bos_id: of the piece
    that the folder calls bos, None if there is none. Raises `UserError` for anything else before or after a text.
    """
    settings = Contents(config, f"{source}: tokenizer_config.json beside it")
    class_name = str(settings.get("tokenizer_class", str)).removesuffix("Fast")
    if class_name.removesuffix("Tokenizer") in OTHER_RULES:
        raise UserError(
            f"{source}: its tokenizer_class {class_name} puts tokens around each text that no file of it names; "
            "choose another tokenizer, or set tokenizer_class to PreTrainedTokenizerFast if it needs none of them"
        )
    if class_name == WITHOUT_BOS:
        return None
    if "tokenizer.json" in files:
        described = read_beside(files, "tokenizer.json", source)
        before, after = _around(described.get("post_processor"), source)
    else:
        is_missing = "bos_token" in config and config["bos_token"] is None
        adds_bos = settings.get("add_bos_token", bool, is_llama(files, config) and class_name == BOS_UNLESS_TOLD)
        before = [bos_id] if adds_bos and not is_missing and bos_id is not None else []
        after = ["eos"] if settings.get("add_eos_token", bool, False) else []
    if after or len(before) > 1:
        raise UserError(
            f"{source}: it puts more around each text than bos in front ({before} before, {after} after), which is "
            "not supported: change the post_processor in tokenizer.json, or add_eos_token in tokenizer_config.json"
        )
    return before[0] if before else None


def is_llama(files: dict[str, bytes], config: dict) -> bool:
    """Whether transformers takes its class for Llama's tokenizers, which has rules of its own about spaces."""
    return is_llama_class(config) and b'"ByteLevel"' not in files.get("tokenizer.json", b"")


def llama_rules(space: Space) -> dict:
    """The parts of a tokenizer.json that transformers' class for Llama replaces, whatever the file says of them."""
    scheme = "never" if not space.before else "always" if space.each_part else "first"
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if space.before:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def space_before(files: dict[str, bytes], config: dict, of_model: bool, source: str) -> Space:
    """The space that transformers puts before a text of a SentencePiece model. of_model: whether the model says so."""
    settings = Contents(config, f"{source}: tokenizer_config.json beside it")
    if is_llama(files, config):
        return Space(settings.get("add_prefix_space", bool, True), settings.get("legacy", bool, False), True)
    if "tokenizer.json" not in files:
        legacy = settings.get("legacy", bool, True)
        return Space(of_model, legacy, not legacy)
    described = read_beside(files, "tokenizer.json", source)
    normalizers = steps(described.get("normalizer"), "normalizers")
    if any(step["type"] == "Prepend" for step in normalizers):
        return Space(True, True, False)
    doubles = any(step.get("pattern") == {"Regex": r"\A▁"} for step in normalizers)  # a space at the front
    for step in steps(described.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme", "always")
            return Space(scheme != "never", scheme == "always", not doubles)
    return Space(False, False, False)


def _around(processor: dict | None, source: str) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer.json's post_processor puts before and after a text."""
    if processor is None:
        return [], []
    try:
        kind = processor["type"]
        if kind == "ByteLevel":  # it changes where tokens are said to begin and end in the text
            return [], []
        if kind in ("BertProcessing", "RobertaProcessing"):
            return [processor["cls"][1]], [processor["sep"][1]]
        if kind == "Sequence":
            parts = [_around(inner, source) for inner in processor["processors"]]
            before = [i for first, _ in reversed(parts) for i in first]  # a later one puts its ids further out
            return before, [i for _, last in parts for i in last]
        if kind == "TemplateProcessing":
            ids = [
                processor["special_tokens"][part["SpecialToken"]["id"]]["ids"] if "SpecialToken" in part else [None]
                for part in processor["single"]
            ]
            flat = [i for some in ids for i in some]
            place = flat.index(None)  # of the text
            return flat[:place], flat[place + 1 :]
    except (KeyError, TypeError, ValueError, IndexError) as problem:
        raise UserError(f"{source}: damaged, its post_processor cannot be read ({problem!r})") from None
    raise UserError(f"{source}: its post_processor {kind!r:.80} is not supported")

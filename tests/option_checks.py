"""Run in a changed copy of the project by test_adding_an_option.py: everything that a new model option passes through.

    python -P option_checks.py OPTION VALUE NEW_PARAMETERS_A_LAYER

VALUE is written as on the command line. The working directory holds the copy and `bins`, token bins. Prints a line for
each thing that was found right; the first that is not ends the program with a traceback.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_pretrain
from minillm import __main__ as commands
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.checkpoint import architectures, huggingface
from minillm.generation.completion import generate
from minillm.generation.sampling import GREEDY
from minillm.model.config import preset
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig

SMALL = "--dim 32 --n_layers 2 --n_heads 2 --n_kv_heads 1 --ffn_dim 64 --seq_len 32 --batch_size 4 --warmup_steps 0"
SMALL += " --schedule constant --eval_every 0 --save_every 2 --eval_tokens 512 --device cpu --dtype float32 --data bins"


def call(main, arguments: str) -> int:
    """The exit status of a script or command with these arguments."""
    sys.argv = ["minillm", *arguments.split()]
    return main() or 0


def refused(main, arguments: str, word: str) -> None:
    """Raise AssertionError unless the command is refused in words that name `word`."""
    try:
        call(main, arguments)
    except UserError as problem:
        assert word in str(problem), problem
    else:
        raise AssertionError(f"{arguments}: was not refused")


def shaken(model: Transformer) -> Transformer:
    """The model with weights far from their first values, where a wrong formula shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def check_first_values_and_count(option: str, value: str | bool, new_parameters: int) -> None:
    plain = preset("tiny", vocab_size=50, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=64)
    config = dataclasses.replace(plain, **{option: value})
    assert getattr(plain, option) != value, "the default is the model without the option"
    model = Transformer(config)
    model.init_weights(3)
    assert n_parameters(config) == sum(p.numel() for p in model.parameters())
    assert n_parameters(config) - n_parameters(plain) == 2 * new_parameters
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" not in name:
            assert (parameter == 0).all(), name


def check_generation(model: Transformer) -> None:
    """Token by token, over a cache, the model continues as its whole forward pass says."""
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, model.config.vocab_size, (n,), generator=draw).tolist() for n in (3, 9, 5)]
    for prompt, completion in zip(prompts, generate(model, prompts, 12, sampling=GREEDY), strict=True):
        row = [*prompt, *completion.tokens]
        whole = model(torch.tensor([row]))[0].argmax(-1).tolist()
        assert completion.tokens == whole[len(prompt) - 1 : -1]
        assert len(set(completion.tokens)) > 1


def check_saving(model: Transformer, option: str) -> None:
    """Under our own name the model comes back with its option; under another's it is refused by the option's name."""
    folder = Path("saved")
    folder.mkdir()
    huggingface.save_model(model, folder)
    again, tokens = huggingface.load_model(folder), torch.arange(20)[None]
    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))
    written = json.loads((folder / "config.json").read_text())
    assert written["model_type"] == "minillm" and written[option] == getattr(model.config, option)
    for name in ("llama", "qwen3"):
        try:
            architectures.from_hf(written | {"model_type": name})
        except UserError as problem:
            assert option in str(problem), problem
        else:
            raise AssertionError(f"read as {name}")


def check_adapter(model: Transformer) -> None:
    """LoRA adapts every linear layer of the layers, begins at the base and is trained."""
    tokens = torch.arange(20)[None]
    before = model(tokens)
    linears = [path for path, module in model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    adapter = attach(model, TuningConfig("lora"))
    assert list(adapter.parts) == [f"layers.{path}" for path in linears] and len(linears) == 14
    assert (model(tokens) - before).abs().max() < 1e-5
    model(tokens, tokens.roll(-1, 1)).backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters().values())


def check_training_and_resuming(option: str, text: str, value: str | bool) -> Path:
    """A run that goes on from a step ends as the one that came there. Returns the step folder of the end."""
    arguments = f"{SMALL} --steps 4 --{option} {text}"
    assert call(train_pretrain.main, f"{arguments} --out straight") == 0
    shutil.copytree("straight/step-00000002", "resumed/step-00000002")
    assert call(train_pretrain.main, f"{arguments} --out resumed") == 0
    straight, resumed = (Path(out) / "step-00000004" for out in ("straight", "resumed"))
    for file in ("model.safetensors", "resume/optimizer.safetensors", "config.json"):
        assert (straight / file).read_bytes() == (resumed / file).read_bytes(), file
    assert getattr(huggingface.load_config(straight), option) == value
    first, last = (load_file(f"straight/step-0000000{step}/model.safetensors") for step in (2, 4))
    assert all(not torch.equal(first[name], last[name]) for name in last), "a parameter was not trained"
    return straight


def main(option: str, text: str, new_parameters: int) -> None:
    sys.modules["matplotlib"] = None  # a curve takes longer to draw than the run
    torch.set_num_threads(1)
    value = getattr(parse(train_pretrain.Config, "", [f"--{option}", text]), option)
    check_first_values_and_count(option, value, new_parameters)
    print("first values and count")
    trained = check_training_and_resuming(option, text, value)
    print("training and resuming")
    check_generation(shaken(huggingface.load_model(trained)))
    print("generation")
    check_saving(shaken(huggingface.load_model(trained)), option)
    print("saving and loading")
    check_adapter(huggingface.load_model(trained))
    print("adapter")
    refused(commands.main, f"export --model {trained} --out m.gguf --format gguf", option)
    print("export")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

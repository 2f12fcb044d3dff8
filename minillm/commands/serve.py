"""Serve models over HTTP as OpenAI's clients expect it, with a chat page."""

import gc
import os
from dataclasses import dataclass
from pathlib import Path

from minillm.base.device import DTYPES
from minillm.base.errors import UserError
from minillm.base.options import option, part
from minillm.base.printing import log_line
from minillm.commands.model_options import (
    BitsOptions,
    CompileOptions,
    TemplateOptions,
    learned_texts_only,
    load_folder,
    prepare_steps,
    template_of,
    trained_with,
)
from minillm.generation.batching import Engine, EngineOptions
from minillm.generation.load import find_model
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from minillm.serving.app import App
from minillm.serving.door import Door
from minillm.serving.listen import build_server, check_installed, listening_socket
from minillm.serving.served import Served, share_weights, why_no_chat

KEY_VARIABLE = "MINILLM_API_KEY"


@dataclass(frozen=True)
class Config(BitsOptions, CompileOptions, TemplateOptions, EngineOptions):
    model: tuple[str, ...] = option(
        (), "run or model folders, or NAME=FOLDER; none: the newest of out/sft, else of out/pretrain", group="model"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="model")
    dtype: str | None = option(None, "of the weights; none: as stored", tuple(DTYPES), group="model")
    max_new_tokens: int = option(4096, "tokens of one answer, whatever a request asks for", at_least=1, group="engine")
    host: str = option("127.0.0.1", "address to listen at; any but this machine's own needs a key", group="server")
    port: int = option(8000, "port to listen at; 0: any free one", at_least=0, at_most=65535, group="server")
    api_key: tuple[str, ...] = option(
        (), f"keys, each of which lets in; none: those in the environment's {KEY_VARIABLE}", group="server"
    )
    cors: str | None = option(
        None, "origin of a page elsewhere whose scripts may ask, as https://chat.example.org; *: any", group="server"
    )
    drain_s: float = option(30.0, "seconds for the answers under way when it is told to end", above=0, group="server")


def run(config: Config) -> None:
    # who may ask, and where; before models are loaded, which takes longer
    check_installed()
    keys = config.api_key or keys_of_environment()
    door = Door(keys, config.cors)
    listener = listening_socket(config.host, config.port, has_key=bool(keys))

    models = []
    for name, folder in named_folders(config.model):
        models.append(_load(config, name, folder, [model.engine.model for model in models]))
    app = App(models, door, log_line)
    server = build_server(app, config.drain_s, log_line)
    for model in models:
        model.engine.start()
    set_apart_what_stays()

    address = address_of(listener)
    print(
        f"{address} (chat page), {address}/v1 (OpenAI's API{', with a key' if keys else ''}); Ctrl-C ends", flush=True
    )
    server.run(sockets=[listener])


def keys_of_environment() -> tuple[str, ...]:
    """The keys in the environment. A blank variable is refused: whoever set it would be served without a key."""
    text = os.environ.get(KEY_VARIABLE)
    if text is None:
        return ()
    if not text.strip():
        raise UserError(f"{KEY_VARIABLE}: is set, but to no key; set it to one, or unset it to serve without a key")
    return tuple(text.split())


def set_apart_what_stays() -> None:
    """Let Python look for garbage among what requests make, and no longer among all modules and models.

    Objects that refer to one another, as a closed connection's do, are freed by a search alone. Python searches the
    older ones when a quarter as many have come as there were: beside torch's some 300,000, after tens of thousands of
    requests (https://docs.python.org/3/library/gc.html#gc.set_threshold).
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # from which Python takes the new number of those there are


def named_folders(given: tuple[str, ...]) -> list[tuple[str, Path]]:
    """The name and the model folder of each model that is to be served."""
    folders: dict[str, Path] = {}
    for text in given or (None,):
        name, path = split_name(text)
        folder = find_model(path, log=log_line)
        if not name:
            place = folder.absolute()  # "." is no name
            if ".." in place.parts:
                place = place.resolve()
            name = place.parent.name if place.name.startswith("step-") else place.name
            if not is_name(name):
                raise UserError(f"--model {folder}: its name {name!r} is none to ask for; give NAME=FOLDER")
        if name in folders:
            raise UserError(f"--model {text}: two models have the name {name}; give NAME=FOLDER")
        folders[name] = folder
    return [*folders.items()]


def split_name(text: str | None) -> tuple[str, str | None]:
    """NAME=FOLDER in two; the name is "" where only a folder is given."""
    if text is None or "=" not in text or Path(text).exists():
        return "", text
    name, _, path = text.partition("=")
    if "/" in name:
        return "", text
    if not is_name(name) or not path:
        raise UserError(f"--model {text}: expected NAME=FOLDER")
    return name, path


def is_name(name: str) -> bool:
    """Whether a model can be asked for by this name."""
    return bool(name.strip()) and name.isprintable()


def _load(config: Config, name: str, folder: Path, others: list[Transformer]) -> Served:
    """A model with its engine; says what it is and takes. others: models that are loaded already."""
    model, tokenizer, _ = load_folder(folder, None, config.device, config.dtype, config.bits)
    template = template_of(config, folder)
    no_chat = why_no_chat(tokenizer, template)
    n_shared = share_weights(model, others)
    prepare_steps(config, model)
    engine = Engine(model, part(config, EngineOptions), log=log_line)
    shared = f", {n_shared / 2**20:,.1f} MiB of them shared with models before it" if others else ""
    print(
        f"{name}: {folder} ({n_parameters(model.config):,} parameters{shared}), context {engine.context:,}, "
        f"{config.slots} slots, cache {engine.cache_bytes / 2**20:,.1f} MiB"
    )
    trained = trained_with(folder)
    turns = trained.get("turns")
    if no_chat:
        print(f"{name}: no chats ({no_chat})")
    elif learned_texts_only(trained):
        print(f"{name}: its last training was on texts, so in a chat it goes on with them rather than answers")
    elif turns == 1:
        print(f"{name}: taught single questions, so of a longer conversation it will not make much")
    return Served(
        name=name,
        engine=engine,
        tokenizer=tokenizer,
        template=template,
        no_chat=no_chat,
        turns=1 if turns == 1 else None,
        created=int(folder.stat().st_mtime),
        most_tokens=config.max_new_tokens,
    )


def address_of(listener) -> str:
    """The address of a listening socket, as a browser takes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

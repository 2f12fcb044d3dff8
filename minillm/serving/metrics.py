"""What /metrics tells: counts and times, in the text that Prometheus reads.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from minillm.serving.served import Served

BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

# Of each engine: the counter's name there, its kind, and what it counts.
OF_ENGINE = {
    "waiting": ("gauge", "requests that wait for a slot"),
    "running": ("gauge", "requests that have a slot"),
    "free_slots": ("gauge", "slots that nobody has"),
    "steps": ("counter", "steps of the engine"),
    "requests": ("counter", "answers that the engine was asked for"),
    "cancelled": ("counter", "answers that ended because nobody wanted them any more"),
    "failed": ("counter", "answers that ended by a fault, the end of the server or their time"),
    "refused": ("counter", "answers for which the queue was full"),
    "prompt_tokens": ("counter", "tokens of prompts"),
    "cached_prompt_tokens": ("counter", "of them, tokens that had been read before"),
    "new_tokens": ("counter", "tokens of answers"),
}


class Histogram:
    """Times in seconds, counted by size."""

    def __init__(self):
        self.counts = [0] * (len(BOUNDS_S) + 1)  # of the last: longer than all bounds
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        """Its samples: how many were at most so long, the sum, the number."""
        lines = []
        n = 0
        for bound, count in zip((*BOUNDS_S, "+Inf"), self.counts, strict=True):
            n += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {n}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {n}"]


class Metrics:
    """What the server itself counts; the engines count the rest."""

    def __init__(self):
        self.calls: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.gone = 0  # calls whose client left
        self.first_token = Histogram()
        self.answer = Histogram()

    def text(self, models: Sequence[Served], n_open: int) -> str:
        """All of it."""
        lines = _head("http_requests_total", "counter", "HTTP requests by route and status")
        for (route, status), count in sorted(self.calls.items()):
            lines.append(f'minillm_http_requests_total{{route="{route}",status="{status}"}} {count}')
        lines += [*_head("http_clients_gone_total", "counter", "requests whose client left before the end")]
        lines += [f"minillm_http_clients_gone_total {self.gone}"]
        lines += [*_head("http_requests_open", "gauge", "chats and completions under way")]
        lines += [f"minillm_http_requests_open {n_open}"]

        # of each model
        counters = [(model, model.engine.counters()) for model in models]
        for name, (kind, meaning) in OF_ENGINE.items():
            full_name = f"{name}_total" if kind == "counter" else name
            lines += _head(full_name, kind, meaning)
            for model, values in counters:
                lines.append(f'minillm_{full_name}{{model="{_escaped(model.name)}"}} {values[name]}')
        lines += _head("cache_bytes", "gauge", "memory of the cache, all of it taken at the start")
        for model in models:
            lines.append(f'minillm_cache_bytes{{model="{_escaped(model.name)}"}} {model.engine.cache_bytes}')

        # times
        for name, histogram, meaning in (
            ("first_token_seconds", self.first_token, "from a request to its first token"),
            ("answer_seconds", self.answer, "from a request to the end of its answer"),
        ):
            lines += [*_head(name, "histogram", meaning), *histogram.lines(f"minillm_{name}")]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP minillm_{name} {meaning}", f"# TYPE minillm_{name} {kind}"]


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

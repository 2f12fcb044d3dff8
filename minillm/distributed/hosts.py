"""The machines of a run: what each does once, and whether all hold the same."""

import os
import socket
from collections import defaultdict
from collections.abc import Callable, Sequence

from minillm.base.errors import UserError
from minillm.distributed.ranks import Ranks

MOST_NAMED = 4  # machines that a line names; of more it says how many there are
MAY_DIFFER = ("device",)  # options that belong to a machine; its kind is compared when the ranks join


def first_on_host() -> bool:
    """Whether this process is the first of its machine, by the number that torchrun gives it; alone it is."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def place_on_host() -> tuple[int, int]:
    """Which process of its machine this one is, of how many, by torchrun's numbers; without them it counts as alone."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


def once_a_host(ranks: Ranks, work: Callable[[], object]) -> None:
    """Do what writes files on each machine that has a disk of its own: `work` does nothing where they lie already.

    Rank 0 comes first, so that on a shared disk the other machines find everything done. All ranks wait for the end.
    """
    if ranks.main:
        work()
    ranks.barrier()
    if first_on_host() and not ranks.main:
        work()
    ranks.barrier()


def differences(ranks: Ranks, facts: dict[str, str]) -> list[str]:
    """A line for each fact that is not the same on all ranks, such as "torch: 2.14.1 on host1, 2.11.0 on host2".

    facts: of this rank, of those that JSON can hold. Every rank calls this, and gets the same lines.
    """
    of_all = ranks.exchange([socket.gethostname(), facts])
    return differing([host for host, _ in of_all], [its_facts for _, its_facts in of_all])


def check_options(ranks: Ranks, values: dict[str, object]) -> None:
    """Raise `UserError` on every rank unless all were started with the same options; values: this rank's, by name."""
    written = {f"--{name}": repr(value) for name, value in values.items() if name not in MAY_DIFFER}
    if not ranks.agree(written):
        raise UserError(
            f"the processes were started with different options ({'; '.join(differences(ranks, written))}): give "
            "the same command on every machine"
        )


def differing(hosts: Sequence[str], facts: Sequence[dict[str, str]]) -> list[str]:
    """The lines of `differences`, from the machine and the facts of each rank. A fact may be missing on some."""
    lines = []
    for name in dict.fromkeys(name for its_facts in facts for name in its_facts):
        holders = defaultdict(dict)  # value → its machines, in order
        for host, its_facts in zip(hosts, facts, strict=True):
            holders[its_facts.get(name, "none")][host] = True
        if len(holders) > 1:
            values = [f"{value or 'none'} on {named(list(where))}" for value, where in holders.items()]
            lines.append(f"{name}: {', '.join(values)}")
    return lines


def named(hosts: Sequence[str]) -> str:
    """Machines in words: "host1 and host2", "127 machines"."""
    if len(hosts) > MOST_NAMED:
        return f"{len(hosts)} machines"
    return " and ".join(hosts)

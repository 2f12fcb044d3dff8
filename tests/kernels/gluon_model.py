"""A model of Gluon on the CPU, strict where a GPU forgives: it runs the very source of the Hopper kernels.

Triton's interpreter knows nothing of Gluon. Here every role of a thread block is a Python thread, and the functions
that kernels call are replaced by ones on torch tensors:

- a barrier counts arrivals and promised bytes as the hardware does; a wait that lasts is a deadlock, and an error;
- a copy into shared memory first fills it with NaN, and its data come later, in any order;
- a matrix product reads its operands when it is started, and when it is waited for they must not have changed; its
  result cannot be touched before; the same for what the copy engine carries out of shared memory;
- what threads wrote to shared memory must be fenced before tensor cores or the copy engine read it;
- memory is indexed with bounds.

What it does not know: layouts, registers, and order between the threads of one warpgroup. The compiler holds those.
"""

import functools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType, SimpleNamespace

import torch
from triton.experimental.gluon import language
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr

PATIENCE = 20  # seconds that a wait may last
here = threading.local()  # .block: the thread block; .flying: products not waited for; .leaving: copies out of it


class Scalar(int):
    """An integer of a kernel: it stays one under arithmetic, and can be widened."""

    def to(self, dtype):
        return self


def staying(plain):
    def operation(self, other):
        result = plain(self, other)
        return Scalar(result) if isinstance(result, int) else result

    return operation


for name in ("add", "sub", "mul", "floordiv", "mod", "and", "xor", "radd", "rsub", "rmul", "rfloordiv", "rmod"):
    setattr(Scalar, f"__{name}__", staying(getattr(int, f"__{name}__")))


class Registers(torch.Tensor):
    type = property(lambda self: SimpleNamespace(layout=None))


class Block:
    """A thread block: one lock for everything in it, and who fails wakes all."""

    def __init__(self, program: int, programs: int, seed: int):
        self.program, self.programs = Scalar(program), Scalar(programs)
        self.changed = threading.Condition(threading.RLock())
        self.failure: BaseException | None = None
        self.meeting = threading.Barrier(2)
        self.unfenced: dict[int, int] = {}  # address of shared memory → thread that wrote it
        self.random = random.Random(seed)
        self.engine = ThreadPoolExecutor(4)

    def until(self, true) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.failure or true(), PATIENCE), "deadlock"
            assert not self.failure, "another role failed"

    def fail(self, failure: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or failure
            self.meeting.abort()
            self.changed.notify_all()


class Barrier:
    def __init__(self, count: int):
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def change(self, arrivals: int = 0, promised: int = 0) -> None:
        with here.block.changed:
            self.missing -= arrivals
            self.bytes += promised
            assert self.missing >= 0 and self.bytes >= 0, "more arrivals or bytes than a phase has"
            if self.missing == self.bytes == 0:
                self.phase += 1
                self.missing = self.count
                here.block.changed.notify_all()

    def wait(self, parity: int) -> None:
        here.block.until(lambda: self.phase & 1 != parity)


class Barriers:
    def __init__(self, count: int):
        self.slots: list = [None] * count
        self.shape = [count, 1]

    def index(self, i: int) -> tuple[list, int]:
        return self.slots, i


class Shared:
    def __init__(self, data: torch.Tensor):
        self.data, self.shape, self.dtype = data, list(data.shape), data.dtype

    def index(self, i: int) -> "Shared":
        return Shared(self.data[i])

    def permute(self, order) -> "Shared":
        return Shared(self.data.permute(order))

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return Shared(self.data.narrow(dim, start, length))

    def load(self, layout) -> torch.Tensor:
        return self.data.clone().as_subclass(Registers)

    def store(self, x: torch.Tensor) -> None:
        assert x.dtype == self.dtype and list(x.shape) == self.shape
        self.data.copy_(x)
        here.block.unfenced[self.data.data_ptr()] = threading.get_ident()

    def fenced(self) -> "Shared":
        assert self.data.data_ptr() not in here.block.unfenced, "shared memory read before a fence"
        return self


class Reading:
    """Shared memory that something else reads: until it is done, it must stay as it is."""

    def __init__(self, shared: Shared):
        self.now, self.then = shared.fenced().data, shared.data.clone()

    def end(self) -> None:
        assert torch.equal(self.now.view(torch.int16), self.then.view(torch.int16)), "overwritten while being read"


class Product:
    """A started product: a value only when it has been waited for."""

    def __init__(self, a, b: Shared, acc):
        self.readings = [Reading(x) for x in (a, b) if isinstance(x, Shared)]
        a = a.data if isinstance(a, Shared) else a
        self.value = a.float() @ b.data.float()
        self.done = False
        if acc is not None:
            self.value = self.value + (acc.value if isinstance(acc, Product) else acc)
        self.value = self.value.as_subclass(Registers)
        here.flying.append(self)


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    assert is_async
    return Product(a, b, acc if use_acc else None)


def warpgroup_mma_wait(outstanding, deps):
    if here.block.random.random() < 0.1:
        time.sleep(1e-3)  # others go on meanwhile, if they may
    while len(here.flying) > outstanding:
        product = here.flying.pop(0)
        for reading in product.readings:
            reading.end()
        product.done = True
    values = [x.value if isinstance(x, Product) else x for x in deps]
    assert all(x.done for x in deps if isinstance(x, Product)), "the result of a product that still runs"
    return values[0] if len(values) == 1 else tuple(values)


class Described:
    def __init__(self, descriptor: TensorDescriptor):
        x, self.block_shape, self.layout = descriptor.base.detach(), descriptor.block_shape, None
        self.dtype = x.dtype
        self.all = torch.as_strided(x, descriptor.shape, descriptor.strides)

    def inside(self, at) -> tuple[torch.Tensor, int, int]:
        part = self.all[tuple(slice(i, i + n) for i, n in zip(at, self.block_shape, strict=True))]
        return part, *part.shape


def copy_in(source: Described, at, barrier, target: Shared) -> None:
    assert list(target.shape) == list(source.block_shape)
    target.data.fill_(float("nan"))
    block, slots, i = here.block, *barrier

    def arrive():
        here.block = block
        time.sleep(block.random.random() * 1e-3)
        part, rows, columns = source.inside(at)
        target.data.zero_()  # beyond the end of the tensor
        target.data[:rows, :columns] = part
        slots[i].change(promised=-target.data.numel() * target.data.element_size())

    def guarded():
        try:
            arrive()
        except BaseException as failure:
            block.fail(failure)

    block.engine.submit(guarded)


def copy_out(target: Described, at, source: Shared) -> None:
    here.leaving.append(Reading(source))
    part, rows, columns = target.inside(at)
    part.copy_(source.data[:rows, :columns])


def store_wait(pending: int) -> None:
    assert pending == 0
    while here.leaving:
        here.leaving.pop().end()


class Pointer:
    def __init__(self, memory: torch.Tensor, at=0):
        self.memory, self.at = memory.detach(), at

    def __add__(self, offset):
        return Pointer(self.memory, self.at + offset)

    def places(self, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.as_tensor(self.at).as_subclass(torch.Tensor)
        wanted = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(at.shape)
        chosen = at[wanted]
        assert chosen.numel() == 0 or (chosen.min() >= 0 and chosen.max() < self.memory.numel()), "out of bounds"
        return at, wanted


def load(pointer: Pointer, mask=None, other=0):
    at, wanted = pointer.places(mask)
    result = torch.full(at.shape, other, dtype=pointer.memory.dtype)
    result[wanted] = pointer.memory.view(-1)[at[wanted].long()]
    return result.as_subclass(Registers) if at.dim() else Scalar(result)


def store(pointer: Pointer, x: torch.Tensor, mask=None) -> None:
    at, wanted = pointer.places(mask)
    assert x.dtype == pointer.memory.dtype
    pointer.memory.view(-1)[at[wanted].long()] = x.as_subclass(torch.Tensor)[wanted]


adding = threading.Lock()


def atomic_add(pointer: Pointer, x, sem=None):
    at, _ = pointer.places()
    with adding:
        if at.dim():
            return pointer.memory.view(-1).index_add_(0, at.long(), x.as_subclass(torch.Tensor))
        before = Scalar(pointer.memory.view(-1)[int(at)])
        pointer.memory.view(-1)[int(at)] += x
        return before


def assembly(code: str, constraints, arguments, **_):
    if code.startswith("shfl"):
        return arguments[0]
    assert code.startswith("bar.sync 8, 256"), code
    here.block.meeting.wait(PATIENCE)


def fence() -> None:
    unfenced = here.block.unfenced
    for address in [a for a, thread in unfenced.items() if thread == threading.get_ident()]:
        del unfenced[address]


def role(block: Block, function, arguments) -> None:
    here.block, here.flying, here.leaving = block, [], []
    try:
        function(*arguments)
        assert not here.flying and not here.leaving, "work that nobody waited for"
    except BaseException as failure:
        block.fail(failure)


def warp_specialize(roles, warps, registers) -> None:
    assert len(roles) == len(warps) + 1 == len(registers) + 1
    with ThreadPoolExecutor(len(roles)) as pool:
        for function, arguments in roles:
            pool.submit(role, here.block, function, arguments)


def registers(function):
    return lambda *a, layout=None, **k: function(*a, **k).as_subclass(Registers)


def allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(shape[0])
    empty = torch.zeros(shape, dtype=dtype)
    return Shared(empty.fill_(float("nan")) if dtype.is_floating_point else empty)


def init(barrier, count: int) -> None:
    slots, i = barrier
    slots[i] = Barrier(count)


def reduced(function):
    def reduce(x, axis: int):
        result = function(x, axis)
        return result if result.dim() else Scalar(result)

    return reduce


gl = SimpleNamespace(
    float32=torch.float32, int32=torch.int32, int64=torch.int64,
    program_id=lambda axis: here.block.program, num_programs=lambda axis: here.block.programs,
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype).as_subclass(Registers),
    full=lambda shape, x, dtype, layout: torch.full(shape, int(x), dtype=dtype).as_subclass(Registers),
    arange=registers(lambda begin, end: torch.arange(begin, end, dtype=torch.int32)),
    where=torch.where, exp2=torch.exp2, log2=torch.log2, maximum=torch.maximum,
    max=reduced(torch.amax), sum=reduced(torch.sum), reshape=torch.reshape, permute=torch.permute,
    convert_layout=lambda x, layout, assert_trivial=False: x,
    load=load, store=store, atomic_add=atomic_add, inline_asm_elementwise=assembly, static_range=range,
    allocate_shared_memory=allocate, warp_specialize=warp_specialize,
    NVMMASharedLayout=language.NVMMASharedLayout,
    **dict.fromkeys(
        ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "SwizzledSharedLayout",
         "DistributedLinearLayout"), lambda *a, **k: None,
    ),
)  # fmt: skip
mbarrier = SimpleNamespace(
    MBarrierLayout=lambda: "barriers", init=init,
    wait=lambda barrier, parity: barrier[0][barrier[1]].wait(parity),
    arrive=lambda barrier, count: barrier[0][barrier[1]].change(arrivals=count),
    expect=lambda barrier, size: barrier[0][barrier[1]].change(arrivals=1, promised=size),
)  # fmt: skip
tma = SimpleNamespace(async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=store_wait)
PARTS = dict(gl=gl, mbarrier=mbarrier, tma=tma, fence_async_shared=fence, warpgroup_mma=warpgroup_mma,
             warpgroup_mma_wait=warpgroup_mma_wait)  # fmt: skip


def install(monkeypatch, modules, launch, seed: int = 0) -> None:
    """Let the Gluon kernels of these modules run in the model when `launch.run` starts them."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, GluonJITFunction):
                monkeypatch.setattr(module, name, value.fn)
            elif isinstance(value, constexpr):
                monkeypatch.setattr(module, name, value.value)
            elif name in PARTS:
                monkeypatch.setattr(module, name, PARTS[name])
    by_triton = launch.run

    def run(kernel, grid, *arguments, **options):
        if not isinstance(kernel, FunctionType):
            return by_triton(kernel, grid, *arguments, **options)
        del options["num_warps"]
        kinds = {TensorDescriptor: Described, torch.Tensor: Pointer, int: Scalar}
        arguments = [kinds.get(type(x), lambda x: x)(x) for x in arguments]

        def program(i: int) -> None:
            block = Block(i, grid[0], seed + i)
            with block.engine:
                role(block, functools.partial(kernel, **options), arguments)
            if block.failure:
                raise block.failure

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(program, range(grid[0])))

    monkeypatch.setattr(launch, "run", run)

"""Named sequences' K/V at their owners: put, got, appended to and deleted, bit for bit.

Runs in threads: the client of `kvkeep.client.sequences` blocks.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import numpy.typing as npt

from kvkeep.client.sequence_tensors import Tensor, as_tensor
from kvkeep.client.sequences import SequenceClient
from kvkeep.model.errors import InputError, KvkeepError, RefusedError
from kvkeep.validate.settings import Document
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.needs import SEQUENCES

NAME = "locality"
HEADS, DIM, LAYERS = 4, 32, 4
NUM_SEQUENCES = 24
APPENDERS = 4
APPENDS_EACH = 4
ATTEMPTS_MAX = 200
"""An append that another one overtook is tried again with the length that is there then."""
DTYPES: tuple[str, ...] = ("float32", "float16", "bfloat16", "int8")
_BITS: dict[str, npt.DTypeLike] = {"float32": np.uint32, "int8": np.uint8}

Layers = dict[int, tuple[Tensor, Tensor]]


async def run(context: Context) -> list[SuiteReport]:
    """One report."""
    report = context.new_report(NAME, "sequences", 1)
    report.judges_answers = False
    report.data = "bits with a seed"
    await asyncio.to_thread(_run, context, report)
    return [report]


def _run(context: Context, report: SuiteReport) -> None:
    prefix, urls = context.new_run_id(), list(context.subject.sequence_urls)
    steps: tuple[Callable[[SequenceClient, str, SuiteReport], None], ...] = (
        check_values,
        check_growth,
        check_layers,
        check_refusals,
        check_appenders,
        check_places,
    )
    with SequenceClient(urls) as client:
        for step in steps:
            try:
                step(client, prefix, report)
            except KvkeepError as error:
                report.check(step.__name__.replace("_", " "), False, str(error))


def make_tensor(seed: int, num_tokens: int, dtype: str = "float32") -> Tensor:
    """Any bits; different for each seed."""
    width = _BITS.get(dtype, np.uint16)
    shape = (num_tokens, HEADS, DIM)
    bits = np.random.default_rng(seed).integers(0, np.iinfo(width).max, shape, dtype=width)
    return as_tensor(bits, dtype) if dtype == "bfloat16" else as_tensor(bits.view(dtype))


def make_layers(
    seed: int, num_tokens: int, dtype: str = "float32", num_layers: int = LAYERS
) -> Layers:
    """Keys and values of some layers, no two alike."""
    return {
        layer_idx: (
            make_tensor(1000 * seed + 2 * layer_idx, num_tokens, dtype),
            make_tensor(1000 * seed + 2 * layer_idx + 1, num_tokens, dtype),
        )
        for layer_idx in range(num_layers)
    }


def _joined(parts: list[Tensor]) -> Tensor:
    """What appending one behind the other makes."""
    return as_tensor(np.concatenate([part.numpy() for part in parts]))


def check_values(client: SequenceClient, prefix: str, report: SuiteReport) -> None:
    """What is got is what was put; a delete is once and for all."""
    wrong = []
    for seed, dtype in enumerate(DTYPES, 1):
        name = f"{prefix}-{dtype}"
        layers = make_layers(seed, 7, dtype)
        client.put(name, layers)
        if client.get(name) != layers:
            wrong.append(dtype)
        if client.length(name) != 7:
            wrong.append(f"length of {dtype}")
    report.check("values come back to the bit", not wrong, ", ".join(wrong) or ", ".join(DTYPES))
    name = f"{prefix}-{DTYPES[0]}"
    told = (client.delete(name), client.delete(name), client.get(name), client.length(name))
    report.check("a delete is for good", told == (True, False, None, 0), f"{told}")
    for dtype in DTYPES[1:]:
        client.delete(f"{prefix}-{dtype}")


def check_growth(client: SequenceClient, prefix: str, report: SuiteReport) -> None:
    """An append begins a sequence or stands behind what is there."""
    name, parts = f"{prefix}-grown", [make_layers(seed, seed, num_layers=1) for seed in (3, 1, 5)]
    lengths = [client.append(name, part).length for part in parts]
    found = client.get(name)
    wanted = tuple(_joined([part[0][which] for part in parts]) for which in (0, 1))
    is_right = lengths == [3, 4, 9] and found is not None and found[0] == wanted
    report.check("appends stand in order", is_right, f"lengths {lengths}")
    client.delete(name)


def check_layers(client: SequenceClient, prefix: str, report: SuiteReport) -> None:
    """A layer is put without touching the others."""
    name, layers = f"{prefix}-layered", make_layers(7, 4)
    client.put(name, layers)
    changed = {2: (make_tensor(1, 4), make_tensor(2, 4))}
    client.put_layers(name, changed)
    found = client.get(name)
    report.check("layers are independent", found == {**layers, **changed}, f"{LAYERS} layers")
    client.delete(name)


def check_refusals(client: SequenceClient, prefix: str, report: SuiteReport) -> None:
    """What can't be kept is refused with a 4xx, and changes nothing."""
    name, layers = f"{prefix}-refused", make_layers(9, 4, num_layers=1)
    client.put(name, layers)
    other = as_tensor(np.zeros((2, HEADS + 1, DIM), np.float32))
    refused = _is_refused(client, name, {0: (other, other)})
    # Listeners that were given no name are called by their address.
    url = f"http://{client.owner(name)}/v1/sequences/{name}"
    garbage = httpx.put(url, content=b"\x80\x04not a tensor", timeout=30.0, trust_env=False)
    report.check("mismatched tensors are refused", refused, f"{HEADS + 1} heads behind {HEADS}")
    report.check(
        "malformed bytes are refused",
        400 <= garbage.status_code < 500,
        f"HTTP {garbage.status_code}",
    )
    report.check("a refusal changes nothing", client.get(name) == layers, "got again")
    client.delete(name)


def _is_refused(client: SequenceClient, name: str, layers: Layers) -> bool:
    try:
        client.append(name, layers)
    except (InputError, RefusedError):
        return True
    return False


def check_appenders(client: SequenceClient, prefix: str, report: SuiteReport) -> None:
    """Of appends at once none is lost, none stands twice, and none lies across another."""
    name, lock, num_tries = f"{prefix}-shared", threading.Lock(), 0

    def append_all(first_seed: int) -> None:
        nonlocal num_tries
        for seed in range(first_seed, first_seed + APPENDS_EACH):
            for _ in range(ATTEMPTS_MAX):
                with lock:
                    num_tries += 1
                try:
                    length = client.length(name)
                    client.append(name, make_layers(seed, 2, num_layers=1), expected_length=length)
                    break
                except RefusedError:
                    continue

    with ThreadPoolExecutor(APPENDERS) as threads:
        list(threads.map(append_all, range(100, 100 + 10 * APPENDERS, 10)))
    found = client.get(name)
    seeds = [s + i for s in range(100, 100 + 10 * APPENDERS, 10) for i in range(APPENDS_EACH)]
    wanted = sorted(make_layers(seed, 2, num_layers=1)[0][0].data.tobytes() for seed in seeds)
    got: list[bytes] = []
    if found is not None:
        data = found[0][0].data.tobytes()
        step = len(wanted[0])
        got = sorted(data[at : at + step] for at in range(0, len(data), step))
    report.check(
        "appends at once are kept",
        got == wanted,
        f"{len(got)} of {len(wanted)} pieces, {num_tries} attempts",
    )
    client.delete(name)


def check_places(client: SequenceClient, prefix: str, report: SuiteReport) -> None:
    """A sequence is found where its name says, and there only."""
    names = [f"{prefix}-place-{i}" for i in range(NUM_SEQUENCES)]
    for seed, name in enumerate(names):
        client.put(name, make_layers(seed, 2, num_layers=1))
    before = {name: place.num_found for name, place in client.locality.items()}
    missing = [name for name in names if client.get(name) is None]
    found = {name: place.num_found - before[name] for name, place in client.locality.items()}
    report.numbers |= {f"found_at_{name}": num for name, num in found.items()}
    report.check(
        "read where it was put",
        not missing and sum(found.values()) == len(names),
        f"{sum(found.values())} of {len(names)} at their owners",
    )
    if len(found) > 1:
        idle = [name for name, num in found.items() if not num]
        report.check("every daemon owns some", not idle, f"idle: {', '.join(idle) or 'none'}")
    for name in names:
        client.delete(name)


SUITE = Suite(
    name=NAME,
    title="Puts, gets, appends to and deletes named sequences' K/V.",
    proves="K/V is kept to the bit where its name says, and no append is lost.",
    document=Document.DISTRIBUTED,
    run=run,
    groups=("quick",),
    aliases=("test_cache_locality",),
    needs=(SEQUENCES,),
    needs_sequences=True,
    small_s=10.0,
)

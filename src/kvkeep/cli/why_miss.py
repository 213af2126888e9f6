"""``kvkeep why-miss``: the first block that a request did not find, and why.

A request of an engine is looked up by its id: the daemon noted the reason when it answered. A
prompt is hashed here under every name that an engine announced, and asked for as it stands now;
what a LoRA adapter adds to the names is known to its engine only.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import httpx

from kvkeep.cli.asking import asked_daemon, checked_text
from kvkeep.cli.cache import parse_namespace
from kvkeep.client.connection import Connection
from kvkeep.client.told import told
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import Namespace
from kvkeep.model.tenant import TenantSecret
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import join_hashes

TOKENIZE_S = 30.0
TOKENS_MAX = 1 << 24
SALT_MAX = 1 << 20
NOBODY = "\0"
"""A part of no request's name."""
SHOWN_MAX = 12
"""Fields that differ, shown to a person."""


@click.command("why-miss")
@click.argument("request", required=False)
@click.option("--prompt", help="Text to ask for instead of a request, or @FILE.")
@click.option("--tokens", type=click.Path(path_type=Path), help="File with token ids instead.")
@click.option("--url", help="An engine, whose /tokenize makes ids of the prompt.")
@click.option("--model", help="Its model; by default the first that it serves.")
@click.option("--chat", is_flag=True, help="The prompt is one user's message of a chat.")
@click.option("--salt", help="cache_salt of the request.")
@click.option(
    "--tenant-key-file", type=click.Path(path_type=Path), help="Of the engine, if it has one."
)
@click.option("--namespace", help="Ask under this one only, 64 hexadecimal digits.")
@click.option("--socket", help="Control socket of the daemon; by default this user's own.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def why_miss(
    request: str | None,
    prompt: str | None,
    tokens: Path | None,
    socket: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Say which block of a REQUEST (its id, or a part of it) was missing first, and why.

    Without a request: the latest ones. With --prompt or --tokens: what would be found now.
    """
    if sum(given is not None for given in (request, prompt, tokens)) > 1:
        raise InputError("give one of REQUEST, --prompt and --tokens, not several")
    if request is not None:
        checked_text(request, "a request's id, or the part of it that is looked for,")
    if asked["salt"] is not None:
        checked_text(asked["salt"], "--salt", SALT_MAX)
    with asked_daemon(socket, "why-miss") as connection:
        if prompt is None and tokens is None:
            found = _explain(connection, engine_request=request or "")
        else:
            ids = read_tokens(tokens) if tokens is not None else _tokenize(prompt or "", **asked)
            found = _explain_prefixes(connection, ids, **asked)
    if request is not None and not found["requests"]:
        found["advice"] = NOT_ASKED
    if as_json:
        click.echo(json.dumps(found))
    else:
        for line in lines_of(found):
            click.echo(line)


NOT_ASKED = (
    "no such request is remembered: its prompt has less than a block, the engine's connector is "
    "switched off (its log says why), the engine uses another daemon, or it is long ago"
)


# ---- asking


def _explain(connection: Connection, *, engine_request: str) -> dict[str, Any]:
    request = m.Explain(connection.next_request_id(), engine_request, None, 0, b"")
    (found,) = told(connection, request)
    return found


def _explain_prefixes(
    connection: Connection,
    ids: Sequence[int],
    *,
    salt: str | None = None,
    tenant_key_file: Path | None = None,
    namespace: str | None = None,
    **_: object,
) -> dict[str, Any]:
    """What this prompt would find under each announced name."""
    names = _explain(connection, engine_request=NOBODY)["namespaces"]
    only = None if namespace is None else parse_namespace(namespace).hex()
    extras = {} if salt is None else {"salt": salt}
    key = b"" if tenant_key_file is None else _chain_key(tenant_key_file)
    prefixes = []
    for name in names:
        if name["identity"] is None or only not in (None, name["namespace"]):
            continue
        block_tokens = int(name["identity"]["layout.block_tokens"])
        root = Namespace(bytes.fromhex(name["namespace"]))
        hasher = BlockHasher(root, block_tokens, extras=extras, secret=key)
        # As the engine asks: one token stays to be computed.
        num_blocks = min((len(ids) - 1) // block_tokens, m.HASHES_MAX)
        hashes = hasher.extend(ids)[: max(0, num_blocks)]
        request = m.Explain(connection.next_request_id(), None, root, 0, join_hashes(hashes))
        (found,) = told(connection, request)
        del found["namespaces"]
        prefixes.append(found | {"block_tokens": block_tokens, "num_tokens": len(ids)})
    if not prefixes:
        raise UnavailableError(_nothing_announced(names, only))
    return {"prefixes": prefixes, "namespaces": names}


def _nothing_announced(names: Sequence[Mapping[str, Any]], only: str | None) -> str:
    announced = [name["namespace"] for name in names if name["identity"] is not None]
    if only is None or not announced:
        return (
            "no engine has announced a namespace to this daemon since it started: start an engine "
            "that uses its socket"
        )
    return f"no engine has announced namespace {only}: choose one of {', '.join(announced)}"


def _chain_key(file: Path) -> bytes:
    from kvkeep.tiers.wrappers.key_ring import read_key_file

    return TenantSecret(read_key_file(file)).chain_key


def read_tokens(file: Path) -> list[int]:
    """Token ids: a JSON list, or numbers between spaces.

    Raises:
        InputError: The file can't be read, or holds something else.
    """
    try:
        if not file.is_file() or file.stat().st_size > 8 * TOKENS_MAX:
            raise InputError(f"{file} is no file of token ids, or too long: name another")
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read: {error}") from error
    try:
        ids = _as_ids(json.loads(text) if text.lstrip().startswith("[") else text.split())
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file} does not hold token ids: write a JSON list, or numbers between spaces"
        ) from error
    return checked_tokens(ids, str(file))


def _as_ids(words: Sequence[object]) -> list[int]:
    """Whole numbers, or digits of such; no part of a number is dropped.

    Raises:
        TypeError: Something is neither.
        ValueError: Something else than digits.
    """
    if any(type(word) not in (int, str) for word in words):
        raise TypeError("neither whole numbers nor digits")
    return [int(str(word)) for word in words]


def checked_tokens(ids: list[int], where: str) -> list[int]:
    """The same ids, if all of them can be token ids."""
    if not ids or any(not 0 <= token < 1 << 31 for token in ids):
        raise InputError(f"{where} has no token ids, or some below 0 or above 2^31: mend it")
    return ids


def _tokenize(
    prompt: str, *, url: str | None, model: str | None, chat: bool, **_: object
) -> list[int]:
    """Token ids of a text, as the engine makes them."""
    if url is None:
        raise InputError("--prompt needs an engine to make token ids of it: name it with --url")
    if prompt.startswith("@"):
        try:
            prompt = Path(prompt[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{prompt[1:]} can't be read: {error}") from error
    base = url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(timeout=TOKENIZE_S, trust_env=False) as client:
            if model is None:
                listed = client.get(f"{base}/v1/models").raise_for_status().json()
                model = listed["data"][0]["id"]
            body: dict[str, Any] = {"model": model, "prompt": prompt}
            if chat:
                messages = [{"role": "user", "content": prompt}]
                body = {"model": model, "messages": messages, "add_generation_prompt": True}
            answer = client.post(f"{base}/tokenize", json=body).raise_for_status().json()
        ids = _as_ids(answer["tokens"])
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        RecursionError,
    ) as error:
        raise UnavailableError(
            f"the engine at {url} makes no token ids of it ({error!r}): see --url and --model"
        ) from error
    return checked_tokens(ids, url)


# ---- saying


def differences(mine: Mapping[str, str], other: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Fields in which two names differ: field, here, there."""
    fields = dict.fromkeys([*mine, *other])
    missing = "(not there)"
    return [
        (field, mine.get(field, missing), other.get(field, missing))
        for field in fields
        if mine.get(field) != other.get(field)
    ]


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """An answer for a person."""
    if "advice" in found:
        yield found["advice"]
    names = found["namespaces"]
    for each in found.get("requests", []):
        yield (
            f"request {each['engine_request']} of engine {each['engine_id']}, "
            f"{each['age_s']:.0f} s ago: {each['num_lent']} of {each['num_blocks']} blocks lent"
        )
        yield from _reason_lines(each, each["num_lent"], names)
    for each in found.get("prefixes", []):
        yield (
            f"prompt of {each['num_tokens']} tokens under {each['namespace'][:16]}: "
            f"{each['num_ready']} of {each['num_blocks']} blocks are readable"
        )
        if not each["num_blocks"]:
            yield f"  it has less than a block of {each['block_tokens']} tokens: never asked for"
            continue
        yield from _reason_lines(each, each["num_ready"], names)
    if not found.get("requests") and not found.get("prefixes") and "advice" not in found:
        yield "no engine has asked since the daemon started"


def _reason_lines(
    each: Mapping[str, Any], num_found: int, names: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    if each["first_missing"] is None:
        return
    yield f"  first missing: block {num_found} ({each['first_missing'][:16]})"
    yield f"  why: {each['reason']['text']}"
    if each["reason"]["code"] == "never_stored" and not num_found:
        yield from name_lines(each["namespace"], names)


def name_lines(namespace: str, names: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How the name that was asked under differs from those that blocks are stored under."""
    mine = next((name for name in names if name["namespace"] == namespace), None)
    held = 0 if mine is None else mine["num_blocks"]
    yield f"  under its namespace {namespace[:16]} the pool holds {held} blocks"
    others = [name for name in names if name["namespace"] != namespace]
    if mine is None or mine["identity"] is None:
        yield (
            "  no engine has announced this namespace: an engine whose cache was reset goes on "
            "under a name of its own, as does one whose weights can't be found"
        )
        return
    for other in others:
        if other["identity"] is None:
            continue
        differing = differences(mine["identity"], other["identity"])
        yield f"  {other['namespace'][:16]} holds {other['num_blocks']} blocks and differs in:"
        for field, here, there in itertools.islice(differing, SHOWN_MAX):
            yield f"    {field}: {here or '(empty)'} here, {there or '(empty)'} there"
        if len(differing) > SHOWN_MAX:
            yield f"    and {len(differing) - SHOWN_MAX} more (--json has all)"

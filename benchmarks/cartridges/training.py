"""Trains a cartridge as a user does, and asks it what it was never trained on."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Target, emit

FOLDER = Path(__file__).parent
OPTIONS = {
    "--model": "smollm2",
    "--id": "lighthouse",
    "--tokens": "64",
    "--steps": "120",
    "--questions": str(FOLDER / "questions.jsonl"),
}
MINUTES_MAX = 10.0


def measure(plot: Path | None = None) -> bool:
    """Train, and print the figures; whether they could be taken."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-training-") as place:
        own = {"--library": str(Path(place, "library")), "--work": str(Path(place, "run"))}
        options = OPTIONS | own
        if plot is not None:
            options["--plot"] = str(plot)
        command = [sys.executable, "-m", "kvkeep", "cartridge", "train"]
        command += [str(FOLDER / "document.txt"), "--json"]
        command += [word for option in options.items() for word in option]
        begun_s = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        took_s = time.perf_counter() - begun_s
    if done.returncode != 0:
        return False
    for figure in figures_of(json.loads(done.stdout)["training"], took_s):
        emit(figure)
    return True


def figures_of(record: Mapping[str, Any], took_s: float) -> list[Figure]:
    """What a training is worth.

    Args:
        record: As ``kvkeep cartridge train --json`` prints it.
        took_s: The whole command.
    """
    asked, made_up = record["questions"], record["conversations"]
    fewer = record["num_document_tokens"] / record["num_tokens"]
    whole = {"peer": asked["text"], "peer_name": "the whole text"}
    name = "cartridges.training"
    return [
        Figure(f"{name}.fewer_tokens", fewer, "times", target=Target("value", ">=", 4)),
        Figure(
            f"{name}.way", way(asked), "of the way to the text", target=Target("value", ">=", 0.5)
        ),
        Figure(f"{name}.way_made_up", way(made_up), "of the way to the text"),
        Figure(f"{name}.loss", asked["cartridge"], "nats/token", **whole),
        Figure(f"{name}.loss_without", asked["nothing"], "nats/token", **whole),
        Figure(f"{name}.loss_beginning", asked["beginning"], "nats/token", **whole),
        Figure(f"{name}.time", took_s / 60, "min", target=Target("value", "<=", MINUTES_MAX)),
    ]


def way(losses: Mapping[str, float]) -> float:
    """Share of the way from no text to the whole text."""
    return (losses["nothing"] - losses["cartridge"]) / (losses["nothing"] - losses["text"])

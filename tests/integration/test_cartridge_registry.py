"""Several processes use one registry at once, and some of them are killed while they do."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from kvkeep.cartridges.registry import FILES, Registry
from tests.unit.cartridges.made import contents, written

ROUNDS = 5
REGISTER = """
import json, sys
from pathlib import Path
from kvkeep.cartridges.registry import Registry
folder, name, path = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
seen = []
for _ in range(int(sys.argv[4])):
    with Registry(folder) as registry:
        entry = registry.register(path)
        registry.pin(name)
        seen.append(registry.load(name).head.digest == entry.digest)
        registry.collect_garbage()
        registry.unpin(name)
        assert registry.remove(name)
with Registry(folder) as registry:
    registry.register(path)
print(json.dumps(seen))
"""
WRITE = """
import sys
from pathlib import Path
from kvkeep.cartridges import registry as it
def wait(file, part):
    file.write(b"half of it")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
it.Registry(Path(sys.argv[1]))._take(wait, False)
"""


def test_processes_do_not_lose_each_other_s_cartridges(tmp_path: Path) -> None:
    """Each registers, pins, loads, clears away and removes; none ever misses its own file."""
    library = tmp_path / "library"
    processes = []
    for number in range(4):
        path, _ = written(tmp_path, f"c{number}", kv=contents(seed=number))
        command = [sys.executable, "-c", REGISTER, str(library), f"c{number}", str(path)]
        processes.append(
            subprocess.Popen(
                [*command, str(ROUNDS)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    told = [process.communicate(timeout=150) for process in processes]

    assert [error for _, error in told] == [""] * 4
    assert [json.loads(out) for out, _ in told] == [[True] * ROUNDS] * 4
    with Registry(library) as registry:
        assert [entry.cartridge_id for entry in registry.list_entries()] == ["c0", "c1", "c2", "c3"]
        for number in range(4):
            assert registry.load(f"c{number}").contents.layers == contents(seed=number).layers
    assert len(os.listdir(library / FILES)) == 4


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    """While it lives its file is left alone; when it is dead, the next writer removes it."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        with Registry(tmp_path) as registry:
            assert registry.collect_garbage() == []
            (part,) = os.listdir(tmp_path / FILES)
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)

            assert registry.collect_garbage() == [part]
            assert os.listdir(tmp_path / FILES) == []
    finally:
        process.kill()
        process.communicate(timeout=60)

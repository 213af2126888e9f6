"""What a training keeps while it is under way."""

import stat
from pathlib import Path

import pytest
import torch

from kvkeep.authoring.training.folder import opened
from kvkeep.authoring.training.self_study import Conversation
from kvkeep.model.errors import CapacityError, CorruptDataError, InputError


def test_what_was_kept_is_found_by_the_next_one(tmp_path: Path) -> None:
    """Conversations and state, exactly."""
    made = [Conversation([1, 2], [3]), Conversation([4], [])]
    with opened(tmp_path / "a") as folder:
        assert (folder.conversations(), folder.state()) == ([], None)
        folder.keep_conversations(made)
        folder.keep_state({"steps_done": 3, "moving": [torch.ones(2)]})
    with opened(tmp_path / "a") as folder:
        state = folder.state()
        assert folder.conversations() == made
        assert state is not None
        assert torch.equal(state["moving"][0], torch.ones(2))


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    """A document can be guessed from what lies there."""
    with opened(tmp_path / "a"):
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_two_do_not_train_in_one_folder(tmp_path: Path) -> None:
    """The second is told."""
    with (
        opened(tmp_path / "a"),
        pytest.raises(InputError, match="another process trains in"),
        opened(tmp_path / "a"),
    ):
        pass


def test_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    """It would be a cartridge of two documents."""
    with opened(tmp_path / "a") as folder:
        folder.check_digest("one")
    with opened(tmp_path / "a") as folder:
        folder.check_digest("one")
        with pytest.raises(InputError, match="other settings, another text or another model"):
            folder.check_digest("two")


@pytest.mark.parametrize("name", ["training.json", "conversations.jsonl", "state.pt"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    """And nothing of it is used."""
    (tmp_path / name).write_bytes(b"PK\x03\x04 not what it was\n")
    with opened(tmp_path) as folder:
        read = {
            "training.json": lambda: folder.check_digest("one"),
            "conversations.jsonl": folder.conversations,
            "state.pt": folder.state,
        }
        with pytest.raises(CorruptDataError, match=f"{name} is damaged"):
            read[name]()


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """As one sentence; here a folder stands where the file should."""
    (tmp_path / "state.pt.part").mkdir()
    with opened(tmp_path) as folder, pytest.raises(CapacityError, match="can't be kept in"):
        folder.keep_state({})


def test_a_place_that_can_t_be_a_folder_is_refused(tmp_path: Path) -> None:
    """Bad input."""
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="name another --work folder"), opened(tmp_path / "file"):
        pass

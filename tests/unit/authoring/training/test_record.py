"""Numbers of a finished training."""

from kvkeep.authoring.training.record import Losses, Record


def test_the_way_is_a_share() -> None:
    """From nothing to the whole text."""
    assert Losses(nothing=3.0, beginning=2.0, cartridge=1.5, text=1.0).way == 0.75
    assert Losses(nothing=3.0, beginning=2.0, cartridge=3.0, text=1.0).way == 0.0
    assert Losses(nothing=1.0, beginning=1.0, cartridge=1.0, text=1.0).way == 0.0


def test_the_ratio_is_how_many_times_fewer() -> None:
    """Tokens of the document for each of the cartridge."""
    losses = Losses(1.0, 1.0, 1.0, 1.0)
    record = Record(
        num_tokens=64,
        num_document_tokens=512,
        num_steps=1,
        steps=[],
        conversations=losses,
        questions=None,
    )

    assert record.ratio == 8.0
